import dataclasses
import json
import logging
import os
import pickle

import pytest
from samples import FORM, LAYOUT

from kvstore.backends.memory import MemoryBackend
from kvstore.errors import MisconfiguredError
from kvstore.settings import Settings, load_settings, resolve_settings, variable
from kvstore.store import KVStore

SECRET = "s3cr3t-of-a-tenant"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a TOML file and have KVSTORE_CONFIG name it."""

    def write(text):
        path = tmp_path / "kvstore.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("KVSTORE_CONFIG", str(path))
        return path

    return write


def refusal(**flags):
    with pytest.raises(MisconfiguredError) as error:
        load_settings(**flags)
    return str(error.value)


def test_with_nothing_set_every_value_is_a_default_that_works():
    resolved = resolve_settings()
    assert set(resolved.origins) == set(Settings.model_fields)
    assert set(resolved.origins.values()) == {"default"}
    assert resolved.settings.bucket.startswith("file:///")


def test_flags_beat_environment_beats_file_beats_defaults(config, monkeypatch):
    path = config('bucket = "from-file"\nprefix = "from-file"\nregion = "from-file"')
    monkeypatch.setenv("KVSTORE_BUCKET", "from-env")
    monkeypatch.setenv("KVSTORE_PREFIX", "from-env")
    resolved = resolve_settings({"bucket": "from-flag"})
    settings = resolved.settings
    assert (settings.bucket, settings.prefix, settings.region) == ("from-flag", "from-env", "from-file")
    origins = [resolved.origins[name] for name in ("bucket", "prefix", "region", "codec")]
    assert origins == ["flag", "environment", f"file {path}", "default"]


def test_a_valid_value_hides_a_malformed_one_of_lower_rank(config, monkeypatch):
    config('codec = "nonsense"')
    monkeypatch.setenv("KVSTORE_CODEC", "zstd:3")
    assert load_settings().codec == "zstd:3"


def test_an_empty_variable_is_as_good_as_none(config, monkeypatch):
    config('prefix = "from-file"')
    monkeypatch.setenv("KVSTORE_PREFIX", "")
    assert load_settings().prefix == "from-file"


MALFORMED = {
    "bucket": [
        "s3://foo",
        "b",
        "https://host/bucket",
        "memory:",
        "file://host/folder",
        "file://[host/folder",
    ],
    "prefix": ["/a", "a/", "a//b", "../a", "a/./b"],
    "endpoint_url": ["localhost:9000", "ftp://host", "http:/host"],
    "addressing_style": ["Path", "dns"],
    "s3_transport": ["boto", "sockets"],
    "ca_bundle": ["/no/such/file.pem"],
    "disk_dir": ["relative/folder", "~/kv"],
    "disk_bytes": ["8 gigs", "0", "-1"],
    "journal_bytes": ["8 gigs", "0", "-1"],
    "memory_bytes": ["8 gigs", "0", "-1", "nan", "inf", "GiB"],
    "codec": ["gzip", "zstd:0", "zstd:99", "zstd:x", "zstd:--1", "ZSTD", "int8:64", "int4:5", "fp8+none"],
    "lossless_layers": ["x", "0,", ",0", "0, 1", "1.0", "--1", "0-3", "all"],
    "chunk_tokens": ["0", "-256", "1.5", "many", str((1 << 20) + 1), "0x10"],
    "durability": ["QUEUED", "disk"],
    "when_full": ["wait", "Drop"],
    "save_timeout_s": ["0", "-1", "soon"],
    "lookup_timeout_s": ["0", "-1", "soon", "nan", "inf", "241"],
    "load_timeout_s": ["0", "-1", "soon", "nan", "inf", "241"],
    "upload_timeout_s": ["0", "1s"],
    "close_timeout_s": ["0", "-0.5"],
    "presence_ttl_s": ["0", "1 minute"],
    "fetch_concurrency": ["0", "-1", "4097", "1.5", "all"],
    "upload_concurrency": ["0", "4097"],
    "upload_queue_bytes": ["0", "lots"],
    "metrics_port": ["http", "-1", "65536", "9465-9464", "1-65", "9464,9465", "0-5", "a b:9464", "9464:host"],
    "price_gb_month": ["-1", "nan", "$0.023"],
    "price_per_1000_put": ["-1", "cheap"],
    "price_per_1000_get": ["inf", "free"],
    "index_bytes": ["-1", "64 megs"],
    "gc_max_bytes": ["0B", "1000000", "10 tons", "-1GiB"],
    "gc_max_namespace_bytes": ["1000000", "lots"],
    "gc_max_tenant_bytes": ["1000000", "lots"],
    "gc_max_age": ["30", "30 days", "0d", "-1d", "1m"],
    "gc_max_idle": ["30", "soon"],
    "gc_grace": ["3600", "29min", "0s"],
    "gc_max_share": ["0", "1.1", "25%", "nan"],
    "gc_requests_per_s": ["0", "fast"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, value) for f, values in MALFORMED.items() for value in values]
)
def test_a_malformed_variable_is_named_with_its_value_and_what_it_takes(monkeypatch, field, value):
    monkeypatch.setenv(variable(field), value)
    said = refusal()
    assert f"{variable(field)}={value!r} (from environment)" in said
    assert said.endswith(f"it takes {Settings.model_fields[field].description}")


def test_every_field_that_can_be_malformed_is_tested():
    free_text = {"region", "tenant_salt", "weights_revision"}
    assert set(Settings.model_fields) == set(MALFORMED) | free_text


@pytest.mark.parametrize(
    "line",
    [
        "bucket = 5",
        "prefix = true",
        "memory_bytes = true",
        "memory_bytes = inf",
        "memory_bytes = nan",
        "memory_bytes = -inf",
        "memory_bytes = 0.5",
        "memory_bytes = []",
        "memory_bytes = 1979-05-27",
        "chunk_tokens = true",
        "chunk_tokens = 1.5",
        "chunk_tokens = inf",
        "load_timeout_s = true",
        "load_timeout_s = nan",
        "fetch_concurrency = true",
        "fetch_concurrency = {}",
        "codec = 1",
        "addressing_style = 1",
        "tenant_salt = 7",
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_named_with_what_it_takes(config, line):
    path = config(line)
    field = line.split(" = ")[0]
    said = refusal()
    assert said.startswith(f"{variable(field)}=")
    assert f"(from file {path})" in said
    assert Settings.model_fields[field].description in said


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("s3://foo", "name alone, foo;"),
        ("s3://foo/", "name alone, foo;"),
        ("s3://foo/team/kv/", "name alone, foo, and the folder as KVSTORE_PREFIX=team/kv;"),
    ],
)
def test_for_a_bucket_as_a_url_the_name_to_write_is_told(url, instead):
    assert instead in refusal(bucket=url)


@pytest.mark.parametrize("value", ["8 gigs", "8bit", "1e9", "-1"])
def test_a_malformed_size_is_told_the_units_there_are(value):
    said = refusal(memory_bytes=value)
    assert all(unit in said for unit in ("kB", "GB", "KiB", "GiB", "Gi", "powers of 1000", "powers of 1024"))


def test_all_that_is_wrong_is_said_at_once(monkeypatch):
    monkeypatch.setenv("KVSTORE_CODEC", "gzip")
    monkeypatch.setenv("KVSTORE_FETCH_CONCURRENCY", "none")
    said = refusal(load_timeout_s="never")
    assert len(said.splitlines()) == 3
    assert "KVSTORE_LOAD_TIMEOUT_S='never' (from flag)" in said


@pytest.mark.parametrize("text", ["memory_byte = 1", "[s3]\nbucket = 'x'", "MEMORY_BYTES = 1", '"" = 1'])
def test_an_unknown_key_in_a_file_is_an_error_that_lists_the_known_ones(config, text):
    path = config(text)
    said = refusal()
    assert f"file {path}" in said
    assert "known: bucket, prefix" in said


def test_an_unknown_flag_is_an_error():
    assert "'bukcet' in the flag is no setting; did you mean bucket?" in refusal(bukcet="x")
    assert "did you mean" not in refusal(xyzzy="x")


def test_an_unknown_variable_is_a_warning_that_names_it_not_its_value(monkeypatch, caplog):
    monkeypatch.setenv("KVSTORE_MEMORY_BYTE", SECRET)
    with caplog.at_level(logging.WARNING):
        load_settings()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "KVSTORE_MEMORY_BYTE is set but is no setting" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("KVSTORE_MEMORY_BYTE", "KVSTORE_MEMORY_BYTES"),
        ("KVSTORE_BUKCET", "KVSTORE_BUCKET"),
        ("KVSTORE_ENDPOINT", "KVSTORE_ENDPOINT_URL"),
        ("KVSTORE_CONFG", "KVSTORE_CONFIG"),
        ("KVSTORE_XYZZY", None),
    ],
)
def test_an_unknown_variable_near_a_setting_is_asked_about(monkeypatch, caplog, name, near):
    monkeypatch.setenv(name, "/no/such/file")
    load_settings()
    (message,) = caplog.messages
    assert message.endswith(f"did you mean {near}?" if near else "known: see `kvstore config`")


@pytest.mark.parametrize("content", [b"bucket = ", b"\xff\xfe", b"bucket 'x'"])
def test_a_file_that_cannot_be_read_is_named(config, content):
    assert f"KVSTORE_CONFIG='{config(content)}' cannot be read" in refusal()


def test_a_missing_file_and_a_folder_are_named(tmp_path, monkeypatch):
    for path in (tmp_path / "nothing.toml", tmp_path):
        monkeypatch.setenv("KVSTORE_CONFIG", str(path))
        assert f"KVSTORE_CONFIG='{path}' cannot be read" in refusal()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("512MiB", 1 << 29), ("8GiB", 8 << 30), ("8Gi", 8 << 30), ("1.5 ki", 1536), (" 8Mi ", 8 << 20)),
        *(("1000000", 10**6), ("1 kB", 1000), ("2G", 2 * 10**9), ("7B", 7)),
    ],
)
def test_sizes_are_read_as_people_write_them(monkeypatch, text, size):
    monkeypatch.setenv("KVSTORE_MEMORY_BYTES", text)
    assert load_settings().memory_bytes == size


def test_the_salt_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SECRET)
    resolved = resolve_settings()
    assert resolved.settings.tenant_salt.get_secret_value() == SECRET
    shown = f"{resolved!r} {resolved.settings} {resolved.settings.model_dump_json()} {resolved.origins}"
    assert SECRET not in shown


@pytest.mark.parametrize("line", ["tenant_salt = 7788990011", "tenant_salt = ['7788990011']"])
def test_a_malformed_salt_is_not_shown_in_its_own_error(config, line):
    config(line)
    said = refusal()
    assert "KVSTORE_TENANT_SALT=****" in said
    assert "7788990011" not in said


def test_a_salt_that_is_no_text_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", f"{SECRET}\udcff")
    said = refusal()
    assert "KVSTORE_TENANT_SALT=****" in said
    assert SECRET not in said


def test_another_malformed_setting_does_not_show_the_salt(monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SECRET)
    monkeypatch.setenv("KVSTORE_CODEC", "gzip")
    with pytest.raises(MisconfiguredError) as error:
        load_settings()
    assert SECRET not in repr(error.value) + str(error.value)
    assert error.value.__cause__ is None


def test_settings_cannot_be_changed():
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.bucket = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_settings().settings = settings


def test_settings_can_be_handed_to_another_process():
    settings = load_settings(bucket="bucket", memory_bytes="1MiB")
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert json.loads(settings.model_dump_json())["memory_bytes"] == 1 << 20


def open_refused(**values):
    settings = Settings(bucket="memory://", **values)
    with pytest.raises(MisconfiguredError) as error:
        KVStore.open(LAYOUT, settings=settings, backend=MemoryBackend()).close()
    return str(error.value)


@pytest.mark.parametrize("memory_bytes", [1, FORM.raw_bytes, 2 * FORM.raw_bytes - 1])
def test_memory_for_fewer_than_two_chunks_is_refused_with_the_size_it_takes(memory_bytes):
    said = open_refused(memory_bytes=memory_bytes)
    assert f"KVSTORE_MEMORY_BYTES={memory_bytes}" in said
    # Slots are whole pages of memory: what the message asks for must be enough.
    needed = int(said.split("set it to ")[1].split()[0])
    KVStore.open(
        LAYOUT, settings=Settings(bucket="memory://", memory_bytes=needed), backend=MemoryBackend()
    ).close()


def test_memory_that_cannot_be_had_is_refused_by_name():
    assert f"KVSTORE_MEMORY_BYTES={1 << 60}" in open_refused(memory_bytes=1 << 60)


def test_an_upload_queue_that_holds_no_chunk_is_refused_by_name():
    # Otherwise every save would be dropped, for as long as the node runs.
    queue_bytes = FORM.raw_bytes - 1
    assert f"KVSTORE_UPLOAD_QUEUE_BYTES={queue_bytes}" in open_refused(upload_queue_bytes=queue_bytes)


def test_the_arena_never_takes_more_than_the_memory_set():
    for memory_bytes in (2 * FORM.raw_bytes, 10 * FORM.raw_bytes + 1, 1 << 20):
        settings = Settings(bucket="memory://", memory_bytes=memory_bytes)
        try:
            store = KVStore.open(LAYOUT, settings=settings, backend=MemoryBackend())
        except MisconfiguredError:
            continue
        with store:
            arena = store._parts.memory.arena
            assert arena.slots * arena.slot_bytes <= memory_bytes
