"""The demo says what is wrong with settings in one line, before it starts anything."""

import os
import subprocess
import sys

import pytest


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
