import json
import subprocess
import sys

import pytest

from kvstore.engine_adapters.vllm.settings import VLLMSettings

SALT = "pepper-and-salt"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"


def rows(output: str, kind: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in output.splitlines()]
    return {row["variable"]: row for row in lines if row["kind"] == kind}


def test_every_setting_is_listed_with_value_origin_and_what_it_takes(kvstore):
    ended = kvstore("config", "--json")
    listed = rows(ended.stdout, "setting")
    assert ended.code == 0
    assert {row["setting"] for row in listed.values()} == set(VLLMSettings.model_fields)
    assert listed["KVSTORE_FETCH_CONCURRENCY"]["value"] == 64
    assert listed["KVSTORE_MEMORY_BYTES"]["value"] == 1 << 30
    assert all(row["takes"] and row["origin"] == "default" for row in listed.values())


def test_people_see_the_same_settings_as_programs(kvstore):
    text = kvstore("config").stdout
    assert all(f"KVSTORE_{name.upper()}" in text for name in VLLMSettings.model_fields)
    assert "1073741824 (1.0 GiB)" in text


def test_flags_beat_environment_beats_file_beats_defaults(kvstore, monkeypatch, tmp_path):
    file = tmp_path / "kvstore.toml"
    file.write_text('prefix = "from-file"\ncodec = "zstd"\nchunk_tokens = 64\n')
    monkeypatch.setenv("KVSTORE_CONFIG", str(file))
    monkeypatch.setenv("KVSTORE_PREFIX", "from-environment")
    monkeypatch.setenv("KVSTORE_CODEC", "zstd:3")
    ended = kvstore("config", "--json", "--prefix", "from-flag", "--set", "fetch_concurrency=9")
    found = {name: (row["value"], row["origin"]) for name, row in rows(ended.stdout, "setting").items()}
    assert found["KVSTORE_PREFIX"] == ("from-flag", "flag")
    assert found["KVSTORE_FETCH_CONCURRENCY"] == (9, "flag")
    assert found["KVSTORE_CODEC"] == ("zstd:3", "environment")
    assert found["KVSTORE_CHUNK_TOKENS"] == (64, f"file {file}")
    assert found["KVSTORE_REGION"] == ("", "default")


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize("command", [("config",), ("doctor",), ("ls",), ("show", "abcdef")])
def test_no_command_prints_a_secret(kvstore, monkeypatch, s3, command, form):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SALT)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token-text")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:passphrase@127.0.0.1:1")
    ended = kvstore(*command, *form)
    for secret in (SALT, SECRET, "AKIAEXAMPLEACCESS", "session-token-text", "passphrase"):
        assert secret not in ended.all
    if command == ("config",):
        assert "****" in ended.stdout
        assert "http://****@127.0.0.1:1" in ended.stdout


def test_an_unset_salt_is_not_shown_as_set(kvstore):
    assert rows(kvstore("config", "--json").stdout, "setting")["KVSTORE_TENANT_SALT"]["value"] == ""


def test_user_and_password_of_the_endpoint_are_masked(kvstore):
    ended = kvstore("config", "--endpoint-url", "https://someone:passphrase@store.example")
    assert "https://****@store.example" in ended.stdout
    assert "passphrase" not in ended.all


@pytest.mark.parametrize("command", ["ls", "doctor"])
@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_errors_mask_user_and_password_of_the_endpoint(kvstore, s3, command, scheme):
    ended = kvstore(command, "--endpoint-url", f"{scheme}://someone:passphrase@127.0.0.1:1")
    assert ended.code in (3, 4)
    assert "127.0.0.1:1" in ended.all
    assert "passphrase" not in ended.all


@pytest.mark.parametrize(
    ("variable", "value", "takes"),
    [
        ("KVSTORE_MEMORY_BYTES", "8 gigs", "a size such as 512MiB"),
        ("KVSTORE_ENDPOINT_URL", "localhost:9000", "URL of an S3-compatible server"),
        ("KVSTORE_CODEC", "brotli", "zstd:LEVEL"),
        ("KVSTORE_FETCH_CONCURRENCY", "0", "ranged reads in flight"),
    ],
)
def test_a_malformed_setting_names_variable_value_and_what_it_takes(
    kvstore, monkeypatch, variable, value, takes
):
    monkeypatch.setenv(variable, value)
    for command in ("config", "ls"):
        ended = kvstore(command)
        assert ended.code == 3
        assert ended.stdout == ""
        assert all(text in ended.stderr for text in (variable, repr(value), takes, "environment"))


def test_errors_of_a_real_process_are_messages_not_tracebacks(kvstore_process, monkeypatch):
    monkeypatch.setenv("KVSTORE_CHUNK_TOKENS", "many")
    ended = kvstore_process("config")
    assert ended.code == 3
    assert "Traceback" not in ended.all
    assert ended.stderr.startswith("kvstore: KVSTORE_CHUNK_TOKENS='many'")


def test_a_real_process_prints_no_secret(kvstore_process, monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SALT)
    monkeypatch.setenv("KVSTORE_CHUNK_TOKENS", "many")
    assert SALT not in kvstore_process("doctor").all


def test_an_assignment_without_equals_sign_is_a_usage_error(kvstore):
    assert kvstore("config", "--set", "fetch_concurrency").code == 2


def test_an_unknown_setting_is_a_configuration_error_that_names_the_known_ones(kvstore):
    ended = kvstore("config", "--set", "fetch_concurency=9")
    assert ended.code == 3
    assert "'fetch_concurency'" in ended.stderr
    assert "fetch_concurrency" in ended.stderr


def test_control_characters_of_a_setting_do_not_reach_the_terminal(kvstore):
    ended = kvstore("config", "--region", "[red]eu\x1b[2J\u202e")
    assert "[red]eu\\x1b[2J\\u202e" in ended.stdout
    assert not {"\x1b", "\u202e"} & set(ended.stdout)


def test_credentials_are_named_by_provider(kvstore, monkeypatch, s3):
    environment = rows(kvstore("config", "--json").stdout, "environment")
    assert environment["AWS credentials"]["value"] == "found by env"
    assert environment["AWS_DEFAULT_REGION"]["value"] == "us-east-1"


def test_credentials_of_a_profile_are_found_and_a_missing_profile_is_told(kvstore, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(f"[team]\naws_access_key_id = AKIAEXAMPLEACCESS\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "team")
    environment = rows(kvstore("config", "--json", "--bucket", "some-bucket").stdout, "environment")
    assert environment["AWS_PROFILE"]["value"] == "team"
    assert environment["AWS credentials"]["value"] == "found by shared-credentials-file"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    environment = rows(kvstore("config", "--json", "--bucket", "some-bucket").stdout, "environment")
    assert "nobody" in environment["AWS credentials"]["value"]


def test_absent_credentials_are_told_with_the_fix(kvstore):
    environment = rows(kvstore("config", "--json", "--bucket", "some-bucket").stdout, "environment")
    assert environment["AWS credentials"]["value"].startswith("none found; set AWS_ACCESS_KEY_ID")


def test_a_store_without_credentials_asks_for_none(kvstore, folder):
    assert list(rows(kvstore("config", "--json").stdout, "environment")) == ["KVSTORE_CONFIG"]


def test_help_tells_commands_and_exit_codes(kvstore):
    ended = kvstore("--help")
    assert ended.code == 0
    words = " ".join(ended.stdout.split())
    assert all(command in words for command in ("config", "doctor", "ls", "show"))
    assert all(
        f"{code} {meaning}" in words
        for code, meaning in {0: "done", 1: "done, something", 2: "the command", 3: "a setting"}.items()
    )
    assert "4 the object store does not answer" in words
    assert "130 interrupted" in words


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"torch", "botocore", "aiobotocore", "pydantic", "msgpack"}),
        (["doctor"], {"torch", "aiobotocore"}),
    ],
)
def test_commands_load_no_more_than_they_need(folder, arguments, unwanted):
    program = (
        "import sys\n"
        "from kvstore.cli.main import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('loaded:', *sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert not unwanted & loaded
