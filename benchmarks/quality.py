"""What codecs cost a model: ratio, perplexity and greedy tokens, on the KV of a trained one.

    make quality
    make quality MODEL=folder
    make quality ARGS='--codecs planes+zstd int8 --windows 32'
    make quality ARGS=--write-docs

Trains a small Llama on text of this machine (minutes on two cores; a larger one where there is a GPU),
or takes MODEL, a folder with config.json, weights and a tokenizer. The trained model is kept under
.cache/quality and used again. Text is held out by whole files.

For each codec, prefixes of held-out text go through generate() of the model, the transformers adapter
and a store in memory with KVSTORE_CODEC set; a new store restores them, and what the model then does is
compared with what it does on a cache that it has computed itself, cut at the same token.

JSON: machine, device, model, layout, windows, prefix_tokens, new_tokens, chunk_tokens,
perplexity (of the unmodified model), and `codecs`: {name: {

    ratio                    bytes of the objects that `none` writes over bytes of its own, headers and all
    ratio_by_layer           host bytes of the sections over stored ones
    perplexity_change        fraction, on the held-out text behind the prefixes; and its standard error
    perplexity_change_stderr
    token_agreement          share of equal tokens, place by place, of two greedy runs of `new_tokens` from
                             the prefixes; behind the first other token both go their own ways, and count
    tokens_until_divergence  how many tokens such runs have in common before, in the mean
    forced_agreement         share of equal greedy tokens where each is chosen after the text itself
    max_error                largest difference of two elements of keys or values
    relative_error           root of the squared differences over that of the squared values
    encode_gbps, decode_gbps host bytes per CPU second of one section after the other; null for `none`
}}. A lossless codec has perplexity_change and errors of 0 and agreements of 1, exactly.

The KV is kept beside the model, in kv/, where `make bench NAME=codecs` finds it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality_codec import CodecTrial
from benchmarks.quality_report import say_table, write_docs
from benchmarks.quality_task import Size, Task, check_length, cut_windows
from benchmarks.quality_text import TextFile, find_text
from benchmarks.report import machine, print_result, say
from benchmarks.trained_kv import CACHE, write_kv
from benchmarks.trained_model import ON_CPU, ModelFolder, Recipe, recipe_for, trained_model

# Every codec there is stands here, at the levels worth knowing: a test compares with the registry.
CODECS = (
    *("none", "lz4", "zstd:1", "planes+zstd", "planes+zstd:3"),
    *("int8", "int8+zstd", "int4", "int4+zstd", "fp8", "fp8+zstd"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    given = options.model and _given_model(options.model, options.cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = recipe_for(device, **{field.name: getattr(options, field.name) for field in fields(Recipe)})
    # Held-out text is the same whatever the model: a given one may have seen it, and is compared with itself.
    corpus = find_text(recipe.text_bytes)
    folder = given or trained_model(recipe, corpus, options.cache, device)
    size = Size(options.windows, options.chunk_tokens, options.chunks, options.new_tokens)
    task = _task(folder, corpus.held_out, size, device)
    result = _measure(task, folder, options.codecs)
    say_table(result)
    if options.write_docs:
        write_docs(result)
    print_result(result)


def _measure(task: Task, folder: ModelFolder, codecs: Sequence[str]) -> dict[str, Any]:
    say(f"{task.size.windows} windows of {task.size.prefix_tokens} tokens and {task.size.new_tokens} more")
    reference = task.reference()
    write_kv(folder.kv, reference.states, task.size.chunk_tokens)
    trial = CodecTrial(task, reference)
    rows = {}
    for codec in codecs:
        say(f"measuring {codec}")
        rows[codec] = trial.row(codec)
    return {
        "machine": machine(),
        "device": _device_name(task.model.device),
        "model": folder.about,
        "windows": task.size.windows,
        "prefix_tokens": task.size.prefix_tokens,
        "new_tokens": task.size.new_tokens,
        "chunk_tokens": task.size.chunk_tokens,
        "layout": trial.describe(),
        "perplexity": round(math.exp(float(reference.losses.mean())), 4),
        "codecs": rows,
    }


def _task(folder: ModelFolder, held_out: Sequence[TextFile], size: Size, device: torch.device) -> Task:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"quality: MODEL={folder.path} cannot be loaded, it takes a folder with config.json, weights "
            f"and a tokenizer: {str(error).splitlines()[0]}"
        ) from None
    check_length(model, size)
    # Every run is greedy and as long as asked for, whatever the model's own settings say.
    model.generation_config = type(model.generation_config)(pad_token_id=0)
    return Task(model.eval().to(device), cut_windows(tokenizer, held_out, size), size)


def _given_model(path: Path, cache: Path) -> ModelFolder:
    config = path / "config.json"
    if not config.is_file():
        raise SystemExit(f"quality: MODEL={path}: takes a folder with config.json, weights and a tokenizer")
    name = hashlib.sha256(str(path.resolve()).encode() + config.read_bytes()).hexdigest()[:16]
    return ModelFolder(path, cache / name / "kv", {"folder": path.resolve().name})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder as transformers keeps models; MODEL=folder")
    parser.add_argument("--codecs", nargs="+", default=CODECS, help="codec strings to measure")
    parser.add_argument("--windows", type=int, default=8, help="texts asked about")
    parser.add_argument("--chunks", type=int, default=2, help="chunks of a prefix")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=512, help="tokens generated, and scored, after it")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/quality.md and its plot")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained models are kept")
    for field in fields(Recipe):
        kind = type(getattr(ON_CPU, field.name))
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help="of the trained model")
    return parser


if __name__ == "__main__":
    main()
