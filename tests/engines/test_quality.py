"""The quality harness on a tiny model: what it prints, and that it sees what a codec does to KV."""

import json
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import codecs, quality, trained_model
from benchmarks.quality_codec import compare
from benchmarks.quality_report import BEGIN, END, write_docs
from benchmarks.quality_task import Answer
from benchmarks.trained_kv import newest_kv
from kvstore.codecs import registry
from kvstore.codecs.contract import CodecFamily

LOSSLESS = ("none", "planes+zstd")
ZEROING = "zeroing"
NEW_TOKENS = 24
SMALL = {
    "text_bytes": 300_000,
    "vocabulary": 300,
    "hidden": 32,
    "intermediate": 48,
    "layers": 3,
    "head_dim": 16,
    "short_steps": 4,
    "long_steps": 1,
    "step_tokens": 256,
    "short_tokens": 64,
    "long_tokens": 128,
    "windows": 3,
    "chunk_tokens": 16,
    "new_tokens": NEW_TOKENS,
}
FIELDS = {
    "machine",
    "device",
    "model",
    "layout",
    "windows",
    "prefix_tokens",
    "new_tokens",
    "perplexity",
    "codecs",
}
ROW = {
    "ratio",
    "perplexity_change",
    "token_agreement",
    "max_error",
    "relative_error",
    "encode_gbps",
    "decode_gbps",
}


class ZeroingCodec:
    """Saves all it can: gives back zeros."""

    name = ZEROING

    def encode(self, host, out):
        out[0] = 0
        return 1

    def decode(self, stored, out):
        out[:] = bytes(len(out))


def run(cache, *arguments):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    output = StringIO()
    threads = torch.get_num_threads()
    # A second thread costs a model of this size more than it saves.
    torch.set_num_threads(1)
    try:
        with redirect_stdout(output):
            quality.main(["--cache", str(cache), *options, *arguments])
    finally:
        torch.set_num_threads(threads)
    lines = output.getvalue().splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@contextmanager
def zeroing_codec():
    with pytest.MonkeyPatch.context() as patch:
        family = CodecFamily(ZEROING, lambda _: ZeroingCodec(), "for tests")
        patch.setitem(registry._FAMILIES, ZEROING, family)
        patch.setitem(registry._DECODERS, ZEROING, ZeroingCodec())
        yield


@pytest.fixture(scope="module")
def result(cache):
    with zeroing_codec():
        return run(cache, "--codecs", *LOSSLESS, ZEROING)


def test_the_last_line_is_one_json_object_with_the_documented_fields(result):
    assert result.keys() >= FIELDS
    assert list(result["codecs"]) == [*LOSSLESS, ZEROING]
    for row in result["codecs"].values():
        assert row.keys() >= ROW
    assert result["layout"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("codec", LOSSLESS)
def test_a_lossless_codec_changes_exactly_nothing(result, codec):
    row = result["codecs"][codec]
    assert row["perplexity_change"] == row["max_error"] == row["relative_error"] == 0
    assert row["token_agreement"] == row["forced_agreement"] == 1
    assert row["tokens_until_divergence"] == NEW_TOKENS


def test_ratios_are_those_of_objects(result):
    ratios = {name: row["ratio"] for name, row in result["codecs"].items()}
    assert ratios["none"] == 1
    assert 1 < ratios["planes+zstd"] < ratios[ZEROING]
    assert result["codecs"]["none"]["ratio_by_layer"] == [1.0] * SMALL["layers"]


def test_a_codec_that_damages_kv_is_seen(result):
    row = result["codecs"][ZEROING]
    assert row["relative_error"] == 1
    assert row["max_error"] > 0
    assert row["perplexity_change"] != 0


def test_agreement_counts_places_and_the_tokens_before_the_first_other_one():
    states = [(torch.ones(2, 1, 1, 4), torch.full((2, 1, 1, 4), 2.0))]
    losses = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    reference = Answer(states, torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), losses)
    other_states = [(states[0][0], states[0][1] - 0.5)]
    other = Answer(other_states, torch.tensor([[9, 2], [3, 9]]), torch.tensor([[1, 2], [3, 9]]), losses + 0.1)
    row = compare(reference, other)
    assert row["token_agreement"] == 0.5
    assert row["tokens_until_divergence"] == 0.5
    assert row["forced_agreement"] == 0.75
    assert row["perplexity_change"] == pytest.approx(torch.expm1(torch.tensor(0.1)).item())
    assert row["max_error"] == 0.5
    assert row["relative_error"] == pytest.approx((0.25 / 5) ** 0.5)


def test_no_text_is_trained_on_and_held_out(result, cache):
    (listing,) = cache.glob("*/model/text.json")
    text = json.loads(listing.read_text())
    assert text["training"]
    assert text["held_out"]
    assert not text["training"].keys() & text["held_out"].keys()
    assert not {*text["training"].values()} & {*text["held_out"].values()}


def test_a_trained_model_is_used_again(result, cache, monkeypatch):
    monkeypatch.setattr(trained_model, "_train", None)
    again = run(cache, "--codecs", "none")
    assert again["model"] == result["model"]
    assert again["perplexity"] == result["perplexity"]


def test_a_model_folder_is_measured_as_the_trained_one_is(result, cache):
    (folder,) = cache.glob("*/model")
    given = run(cache, "--codecs", "none", "--model", str(folder))
    assert given["model"] == {"folder": "model"}
    assert given["perplexity"] == result["perplexity"]


def test_the_codecs_benchmark_finds_the_kv_of_the_trained_model(result, cache):
    folder = newest_kv(cache)
    assert folder is not None
    sections = codecs._read(folder)
    chunks = SMALL["windows"] * 2
    assert len(sections.sections) == chunks * SMALL["layers"]
    assert {len(one.host) for one in sections.sections} == {result["layout"]["section_bytes"]}
    assert [one.depth for one in sections.sections] == [0, 1] * (len(sections.sections) // 2)


def test_a_byte_codec_that_changes_bits_ends_the_codecs_benchmark(result, cache):
    arguments = [f"--kv={newest_kv(cache)}", "--rounds=1", "--codecs", ZEROING]
    with zeroing_codec(), pytest.raises(SystemExit, match="zeroing is not lossless"):
        codecs.main(arguments)


def test_a_folder_that_is_no_model_is_named(tmp_path, cache):
    with pytest.raises(SystemExit, match=f"MODEL={tmp_path}"):
        run(cache, "--model", str(tmp_path))


def test_every_codec_of_this_package_is_measured():
    ours = {row.codec for row in registry.known_codecs() if row.origin == "kvstore"}
    measured = {name.partition(separator)[0] for name in quality.CODECS for separator in ":+"}
    assert ours <= measured


def test_documents_are_renewed_between_their_marks(result, tmp_path):
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write_docs(result, tmp_path)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}")
    assert text.endswith(f"{END}after\n")
    assert "old" not in text
    plot = ET.fromstring((tmp_path / "quality.svg").read_text())
    labels = {element.text for element in plot.iter("{http://www.w3.org/2000/svg}text")}
    for codec in result["codecs"]:
        assert f"| `{codec}` |" in text
        assert codec in labels
