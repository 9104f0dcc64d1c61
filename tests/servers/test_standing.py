"""Stores that stay up: `python -m localstack up` and `down`, which make calls."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from localstack.__main__ import exports
from localstack.contract import ServerError, Store
from localstack.packages import ensure_programs

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def call(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "localstack", "--state", str(tmp_path / "state"), *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )

    yield run
    run("down")


def exported(output):
    """What a shell has after `eval` of it."""
    script = f"eval {shlex.quote(output)}; env -0"
    found = subprocess.run(
        ["sh", "-c", script], env={"PATH": os.defpath}, capture_output=True, text=True, check=True
    ).stdout
    return dict(entry.split("=", 1) for entry in found.split("\0") if entry)


def doctor(environment):
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", "doctor"],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["moto", "filesystem"])
def test_a_store_stays_up_for_who_evaluates_its_lines(call, kind):
    first = call("up", kind)
    assert first.returncode == 0, first.stderr
    for line in first.stdout.splitlines():
        assert line.startswith(("export KVSTORE_", "export AWS_", "export NO_PROXY=", "export no_proxy="))
    done = doctor(exported(first.stdout))
    assert done.returncode == 0, done.stdout

    # The same store, not another one.
    assert call("up", kind).stdout == first.stdout

    down = call("down", kind)
    assert (down.returncode, down.stdout) == (0, "")
    assert doctor(exported(first.stdout) | {"KVSTORE_BUCKET": "kvstore"}).returncode != 0
    again = call("down")
    assert again.returncode == 0
    assert again.stderr.count("was not up") == 4


def test_a_store_goes_on_with_what_it_had_when_its_keeper_was_killed(call, tmp_path):
    folder = exported(call("up", "filesystem").stdout)["KVSTORE_BUCKET"].removeprefix("file://")
    Path(folder, "object").write_bytes(b"kept")
    os.kill(int(Path(tmp_path, "state", "filesystem", "keeper.pid").read_text()), 9)
    assert exported(call("up", "filesystem").stdout)["KVSTORE_BUCKET"] == f"file://{folder}"
    assert Path(folder, "object").read_bytes() == b"kept"
    assert call("down", "filesystem").returncode == 0
    assert not Path(folder).exists()


def test_two_that_start_a_store_at_once_get_the_same_one(tmp_path):
    command = [sys.executable, "-m", "localstack", "--state", str(tmp_path), "up", "moto"]
    both = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        first, second = (each.communicate()[0] for each in both)
        assert "KVSTORE_ENDPOINT_URL" in first
        assert first == second
    finally:
        subprocess.run([*command[:-2], "down"], cwd=REPOSITORY, check=True)


def test_an_unknown_kind_is_told_which_there_are(call):
    for command, known in (
        ("up", "moto, rgw, localstack, filesystem"),
        ("down", "moto, rgw, localstack, filesystem"),
        ("install", "moto, rgw, localstack, nginx"),
    ):
        done = call(command, "minio")
        assert (done.returncode, done.stdout) == (1, "")
        assert "minio" in done.stderr
        assert known in done.stderr
    # Of make too; -o keeps it from installing anything.
    done = subprocess.run(
        ["make", "-s", "-o", ".venv/.installed", "s3-up", "KIND=minio"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "moto, rgw, localstack, filesystem" in done.stderr


def test_a_start_that_fails_says_why_and_leaves_nothing_running(call, tmp_path):
    blocked = tmp_path / "state" / "filesystem" / "objects"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    done = call("up", "filesystem")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "objects" in done.stderr
    blocked.unlink()
    assert call("up", "filesystem").returncode == 0


def test_values_are_quoted_for_the_shell_and_proxies_stay_bypassed():
    store = Store(bucket="b", endpoint_urls=("http://127.0.0.1:1",), access_key="a b", secret_key="$x'\"`y`")
    found = exports(store, {"NO_PROXY": "internal.example,127.0.0.1"}, tls=False)
    text = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in found.items())
    shell = exported(text)
    assert shell["AWS_ACCESS_KEY_ID"] == "a b"
    assert shell["AWS_SECRET_ACCESS_KEY"] == "$x'\"`y`"
    assert shell["NO_PROXY"] == "internal.example,127.0.0.1"
    assert shell["no_proxy"] == "127.0.0.1"


def test_a_missing_package_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    needed = {"sh": "dash", "no-such-program": "such-package", "none-either": "other-package"}
    with pytest.raises(ServerError) as caught:
        ensure_programs(needed)
    assert "missing packages: other-package such-package" in str(caught.value)
    assert "apt-get install -y --no-install-recommends other-package such-package" in str(caught.value)
    assert "dash" not in str(caught.value)
