"""The demo says what is wrong with settings in one line, before it starts anything, and how it went."""

import os
import subprocess
import sys

import pytest

from examples import demo


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KVSTORE_MEMORY_BYTES", "a lot"),
        ("KVSTORE_BUCKET", "memory://"),
        ("KVSTORE_BUCKET", "s3://bucket"),
    ],
)
def test_a_setting_that_cannot_work_is_named_without_a_traceback(variable, value):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("KVSTORE_")}
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        env={**environment, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{variable}=" in done.stderr
    assert value in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("rounding", "says"), [(None, "this is a defect"), ("int8", "within the bounds of int8, which rounds")]
)
def test_other_logits_are_a_defect_unless_the_codec_rounds(rounding, says):
    result = {"identical": False, "reused_tokens": 4096, "cold_ttft_s": 6.0, "warm_ttft_s": 0.5}
    assert says in demo._verdict(result, rounding)
