"""What is misspelt on make's command line is told in one line, before anything is installed or run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # This environment is as good as the one that make would build.
    command = ["make", "-s", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["nope", "shared_body", ".*"])
def test_a_benchmark_that_does_not_exist_is_answered_with_those_that_do(name):
    done = make("bench", f"NAME={name}")
    said, _ = done.stderr.splitlines()  # the other one is make's own
    assert done.returncode == 2
    assert said.startswith(f"make bench: NAME='{name}' is no benchmark; one of: codecs ")
    assert said.split(": ")[-1].split() == sorted(
        path.stem for path in ROOT.glob("benchmarks/*.py") if 'prog="make bench' in path.read_text()
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("STORM_S", value) for value in ("abc", "0", "-3", "nan", "inf")),
        *(("KILLS", value) for value in ("abc", "0", "1.5")),
        *(("GC_SEEDS", value) for value in ("abc", "0", "1.5")),
        *((name, "abc") for name in ("STORM_SEED", "KILLS_SEED", "GC_SEED")),
    ],
)
def test_a_torture_of_no_sensible_length_is_refused_by_variable_value_and_what_it_takes(variable, value):
    done = make("torture", f"{variable}={value}")
    said, _ = done.stderr.splitlines()
    assert done.returncode == 2
    assert said.startswith(f"make torture: {variable}='{value}' is not a")
    assert f"such as {variable}=" in said
    assert done.stdout == ""


def test_pytest_refuses_it_in_one_line_too(monkeypatch):
    monkeypatch.setenv("KILLS", "abc")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/torture"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        done.stderr.strip()
        == "ERROR: KILLS='abc' is not a whole number of processes to kill, such as KILLS=500"
    )
