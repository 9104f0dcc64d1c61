"""What holds for every command: no secrets, 130 when interrupted, exit codes, completion, progress."""

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import typer
from chunk_samples import raw_object, tiny_keys, tiny_namespace

from kvstore.backends.filesystem import FilesystemBackend
from kvstore.cli.exits import MEANINGS
from kvstore.cli.main import app
from kvstore.gc.names import parse_announcement
from kvstore.keys import namespace_document_name

REPOSITORY = Path(__file__).parents[2]
# Groups of commands are none.
ALL = typer.main.get_command(app).commands
COMMANDS = sorted(name for name, command in ALL.items() if not hasattr(command, "commands"))
NAMESPACE = tiny_namespace()
KEYS = tiny_keys(NAMESPACE, 4)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in KEYS)
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
TARGET = f"{NAMESPACE.name}/{KEYS[2].hash.hex()}"
QUICK = ["--seconds", "0.05", "--write-bytes", "168MiB", "--read-bytes", "168MiB"]
SALT = "canary-tenant-salt"
SECRETS = {
    "KVSTORE_TENANT_SALT": SALT,
    "AWS_SECRET_ACCESS_KEY": "canary-secret-key/abc",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0001",
    "AWS_SESSION_TOKEN": "canary-session-token",
    "AWS_ENDPOINT_URL": "http://canary-user:canary-password@127.0.0.1:1",
}
CANARY = re.compile(r"canary|AKIACANARY", re.IGNORECASE)
PROMPT_TOKEN = 987_654_321


@pytest.fixture
def arguments(tmp_path) -> Callable[[str], list[str]]:
    """What a command is called with: enough to make it do its work."""
    prompts = tmp_path / "prompts.jsonl"
    archive = tmp_path / "prefix.tar"
    with tarfile.open(archive, "w") as tar:
        for name, data in (DOCUMENT | CHUNKS).items():
            member = tarfile.TarInfo(name.removeprefix("kvstore/"))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    prompts.write_text(f"{[PROMPT_TOKEN, *range(40)]}\n[{PROMPT_TOKEN}, null]\n")
    given = {
        "bench": QUICK,
        "du": ["--by", "codec"],
        "export": [TARGET, str(tmp_path / "exported.tar")],
        "import": [str(archive)],
        "index": ["--rebuild"],
        "rm": [NAMESPACE.name],
        "tree": [NAMESPACE.name],
        "gc": ["--apply", "--max-age", "1d", "--force", "--list"],
        "ls": [NAMESPACE.name],
        "pin": [TARGET],
        "report": ["--out", str(tmp_path / "report.html")],
        "show": [TARGET, "--verify"],
        "stats": ["--at", "127.0.0.1:1"],
        "unpin": [TARGET],
        "warm": [NAMESPACE.name, "--tokens", str(prompts)],
    }
    return lambda command: [command, *given.get(command, [])]


@pytest.fixture
def bucket(s3) -> None:
    """A bucket with a few chunks, that the environment names."""
    client = boto3.client("s3", endpoint_url=os.environ["KVSTORE_ENDPOINT_URL"])
    for name, data in (CHUNKS | DOCUMENT).items():
        client.put_object(Bucket=s3, Key=name, Body=data)


@pytest.fixture
def told(bucket, kvstore, arguments, tmp_path, caplog) -> Iterator[Callable[..., str]]:
    """All that a command tells where secrets are set: of a bucket with chunks, and of no bucket."""

    def run(command: str, *form: str) -> str:
        nowhere = ("--endpoint-url", SECRETS["AWS_ENDPOINT_URL"])
        said = [kvstore(*arguments(command), *form, *options).all for options in ((), nowhere)]
        return "".join([*said, caplog.text, *(file.read_text() for file in tmp_path.glob("*.html"))])

    with pytest.MonkeyPatch.context() as environment:
        for name, value in (SECRETS | {"KVSTORE_DISK_DIR": str(tmp_path / "disk")}).items():
            environment.setenv(name, value)
        yield run


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_secret_or_a_token(told, command, form):
    text = told(command, *form)
    assert text
    assert not CANARY.findall(text)
    assert str(PROMPT_TOKEN) not in text


WAITING = sorted({*COMMANDS} - {"codecs", "config", "stats"})


@pytest.fixture
def interrupted(kvstore, folder_contents, arguments, monkeypatch, tmp_path) -> Callable[[str, int], str]:
    """Call a command, with SIGINT at so many calls of the backend; what it told."""
    folder_contents.put(CHUNKS | DOCUMENT)
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(tmp_path / "disk"))
    made = 0

    def interrupting(patching: pytest.MonkeyPatch, name: str, at: int) -> None:
        inner = getattr(FilesystemBackend, name)

        def called(self, *given, **options):
            nonlocal made
            made += 1
            if made == at:
                signal.raise_signal(signal.SIGINT)
            return inner(self, *given, **options)

        patching.setattr(FilesystemBackend, name, called)

    def run(command: str, at: int) -> str:
        with pytest.MonkeyPatch.context() as patching:
            for name in ("read_into", "put", "head", "list", "delete", "clock_s"):
                interrupting(patching, name, at)
            ended = kvstore(*arguments(command))
        # Some have done their work by then.
        assert ended.code == 130 or made < at
        return ended.all

    return run


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("command", WAITING)
def test_an_interrupted_command_ends_with_130_and_leaves_all_as_it_was(
    interrupted, folder_contents, tmp_path, command, at
):
    assert "Traceback" not in interrupted(command, at)
    left = set(folder_contents.names())
    assert set(CHUNKS | DOCUMENT) <= left
    assert not {name for name in left if name.startswith("kvstore/doctor/")}
    assert not list(tmp_path.glob("*report*"))
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file() and ".tmp" in path.parts]


@pytest.fixture
def on_path(tmp_path) -> dict[str, str]:
    """The environment of a shell that finds `kvstore`."""
    program = tmp_path / "bin/kvstore"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncd {REPOSITORY} && exec {sys.executable} -m kvstore.cli "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def bash(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_commands_and_options(on_path):
    completed = 'eval "$(_KVSTORE_COMPLETE=source_bash kvstore)"; '
    words = (
        completed
        + "COMP_WORDS=(kvstore {}); COMP_CWORD={}; _kvstore_completion kvstore; echo ${{COMPREPLY[@]}}"
    )
    assert bash(words.format("rep", 1), on_path).split() == ["report"]
    assert set(bash(words.format("''", 1), on_path).split()) == set(ALL)
    assert "--max-idle" in bash(words.format("gc --max-i", 2), on_path).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_a_group_and_takes_json(kvstore, command):
    ended = kvstore(command, "--help")
    assert ended.code == 0
    assert "--json" in ended.stdout
    assert ALL[command].rich_help_panel


def test_exit_codes_are_documented():
    text = (REPOSITORY / "docs/operations.md").read_text()
    section = re.search(r"## Exit codes of `kvstore`\n(.*)", text, re.DOTALL)
    assert section is not None
    documented = {
        int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*?) \|", section[1], re.MULTILINE)
    }
    assert documented == {int(code): meaning for code, meaning in MEANINGS.items()}
    for command in COMMANDS:
        assert f"`{command}`" in section[1], command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_p6_a_removal_that_is_ended_while_engines_are_given_time_keeps_nobody_waiting(
    folder_contents, number
):
    """Schedulers end what they run by SIGTERM."""
    folder_contents.put(CHUNKS | DOCUMENT)
    command = [sys.executable, "-m", "kvstore.cli", "rm", NAMESPACE.name, "--apply"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until_s = time.monotonic() + 30
    while not announced_sweeps(folder_contents) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert announced_sweeps(folder_contents)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert announced_sweeps(folder_contents) == []


def announced_sweeps(contents) -> list[str]:
    announced = [parse_announcement("kvstore", name) for name in contents.names()]
    return [str(each.span) for each in announced if each is not None and each.sweep]
