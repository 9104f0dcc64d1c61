"""Every benchmark that needs nothing installed runs, and its last line has what the documents promise."""

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import codecs

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.stem for path in ROOT.glob("benchmarks/*.py") if 'prog="make bench' in path.read_text()
)
# They need nginx and other libraries, LMCache, a GPU, or vLLM.
NOT_RUN = {"read_path", "peer_lmcache", "kernels", "gpu_load", "vllm"}
SMALL = {
    "roundtrip": ["--chunks=1", "--rounds=1", "--backends", "memory", "filesystem"],
    "overhead": ["--chunks=4", "--layers=3", "--rounds=1"],
    "lookup": ["--rounds=1"],
    "layerwise": ["--tokens", "512", "--rounds=1", "--memory-mib=128"],
    "memory": ["--load-mib=640", "--memory-mib=128"],
    "disk_tier": ["--chunks=1", "--rounds=1", "--entries=5000"],
    "write_path": ["--quick", "--without", "obstore"],
    "codecs": ["--made-up", "--sections=2", "--rounds=1"],
    "gc": ["--objects", "1000", "20000", "--snapshot-chunks=3000", "--listed-objects=0"],
}
FIELDS = {
    "roundtrip": {"machine", "chunks", "chunk_bytes", "cases"},
    "gc": {
        "machine",
        "objects",
        "plan_s",
        "peak_rss_bytes",
        "growth_exponent",
        "sizes",
        "snapshot_chunks",
        "snapshot_load_1m_s",
        "snapshot_1m_bytes",
        "snapshot_1m_peak_bytes",
        "snapshot_1m_known_bytes",
    },
    "overhead": {"machine", "us_per_section"},
    "lookup": {
        "machine",
        "cold_512_20ms_s",
        "cold_4096_20ms_s",
        "round_trips_512",
        "warm_512_s",
        "requests_512",
    },
    "codecs": {
        "machine",
        "kv",
        "lossless_ratio",
        "lossless_encode_gbps",
        "lossless_decode_gbps",
        "codecs",
        "peers",
        "two_thread_scaling",
    },
    "layerwise": {"machine", "cases"},
    "memory": {"machine", "peak_rss_bytes"},
    "disk_tier": {
        "machine",
        "cases",
        "leading_4096_us",
        "touch_4096_us",
        "index_bytes",
        "add_us",
        "evict_us",
    },
    "write_path": {"machine", "sizes", "copies_per_byte", "save_call_p99_s", "save_call_full_p99_s"},
}
CODEC_FIELDS = {
    "ratio",
    "encode_gbps",
    "decode_gbps",
    "encode_cpu_s_per_gb",
    "decode_cpu_s_per_gb",
    "max_error",
}
LOSSY = {"int8", "int8+zstd", "int4", "int4+zstd", "fp8", "fp8+zstd"}
CASES = {
    "roundtrip": {"backend", "codec", "save_gbps", "load_gbps", "save_cpu_s_per_gb", "load_cpu_s_per_gb"},
    "layerwise": {
        "tokens",
        "compute_s",
        "transfer_s",
        "layerwise_s",
        "vs_ideal",
        "vs_load_then_compute",
    },
    "disk_tier": {"case", "direction", "gbps", "cpu_s_per_gb", "gbps_vs_raw", "cpu_vs_raw", "cached_share"},
    "write_path": {
        "object_bytes",
        "gbps",
        "gbps_vs_raw",
        "cpu_vs_raw",
        "cpu_vs_aiobotocore",
        "cpu_vs_floor",
        "put_gbps_vs_raw",
        "put_cpu_vs_raw",
        "clients",
    },
}


DOCUMENTED = {
    "read_path": {
        "sizes",
        "object_bytes",
        "range_bytes",
        "gbps",
        "gbps_vs_raw",
        "cpu_vs_raw",
        "cpu_vs_aiobotocore",
        "cpu_vs_best_library",
        "ticker_late_p99_ms",
    },
    "peer_lmcache": {
        "sizes",
        "object_bytes",
        "load_gbps_ratio",
        "load_cpu_ratio",
        "store_gbps_ratio",
        "store_cpu_ratio",
        "lookup_512_20ms_ratio",
    },
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_ends_in_one_json_object_with_its_fields(name):
    result = run(name)
    assert result.keys() >= FIELDS[name]
    for case in result.get("cases", result.get("sizes", [])):
        assert case.keys() >= CASES.get(name, set())
    if name == "write_path":
        # The gather, and the header that is made beside it.
        assert 1.0 <= result["copies_per_byte"] < 1.01
    if name == "codecs":
        check_codecs(result)
    if name == "memory":
        assert result["peak_rss_bytes"] < result["loaded_bytes"] == 640 << 20


def test_every_benchmark_is_run_here_or_known_not_to_be():
    assert set(PROGRAMS) == {*SMALL, *NOT_RUN}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_is_in_the_documents(name):
    assert f"make bench NAME={name}" in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_fields_of_the_others_are_documented(name):
    docstring = ast.get_docstring(ast.parse((ROOT / f"benchmarks/{name}.py").read_text()))
    assert DOCUMENTED[name] <= set(re.findall(r"\w+", docstring))


class ParserMadeError(Exception):
    """Ends a benchmark where it would read its command line."""


@pytest.fixture
def parser_of_benchmark(monkeypatch):
    """Gives the parser of a benchmark's options."""

    def stop(parser, *_):
        raise ParserMadeError(parser)

    def parser(name: str) -> argparse.ArgumentParser:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParserMadeError) as made:
            importlib.import_module(f"benchmarks.{name}").main()
        monkeypatch.undo()
        return made.value.args[0]

    return parser


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_how_to_give_options_what_each_does_and_the_text_as_it_is_written(
    parser_of_benchmark, name
):
    parser = parser_of_benchmark(name)
    shown = parser.format_help()
    assert shown.startswith(f"usage: make bench NAME={name} [ARGS='OPTION...']\n")
    assert ast.get_docstring(ast.parse((ROOT / f"benchmarks/{name}.py").read_text()), clean=False) in shown
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_that_makes_no_sense_is_told_with_its_option_and_what_it_takes(
    parser_of_benchmark, capsys, value
):
    with pytest.raises(SystemExit) as ended:
        parser_of_benchmark("write_path").parse_args([f"--rounds={value}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"error: argument --rounds: '{value}' is no whole number of at least 1")


def check_codecs(result: dict[str, Any]) -> None:
    rows = result["codecs"]
    assert all(row.keys() == CODEC_FIELDS for row in (*rows.values(), *result["peers"].values()))
    assert rows.keys() > LOSSY
    assert {name for name, row in rows.items() if row["max_error"] > 0} == LOSSY
    assert rows["planes+zstd"]["ratio"] == result["lossless_ratio"]
    assert result["two_thread_scaling"].keys() == {"planes+zstd", "int8", "sha256"}


def test_codecs_that_are_not_for_the_kv_that_is_given_are_left_out(tmp_path):
    np.save(tmp_path / "kv.npy", np.arange(2 * 2 * 16 * 2 * 64, dtype=np.uint8).reshape(2, 2, 16, 2, 64))
    rows = run("codecs", f"--kv={tmp_path}", "--rounds=1")["codecs"]
    assert rows
    assert not LOSSY & rows.keys()


def test_kv_files_of_another_shape_are_refused_with_the_shape_that_is_due(tmp_path):
    np.save(tmp_path / "kv.npy", np.zeros((2, 16, 2, 64), np.float16))
    with pytest.raises(
        SystemExit, match=r"kv.npy: needs .* \(sections, 2, tokens, heads, dim\), has \(2, 16"
    ):
        codecs.main([f"--kv={tmp_path}"])


def run(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *(arguments or SMALL[name])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    return json.loads(lines[0])
