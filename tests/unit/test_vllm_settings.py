"""Settings that are the vLLM adapter's own, where there is no vLLM."""

import logging
import os
import subprocess
import sys

import pytest

from kvstore.engine_adapters.vllm.settings import LoadMode, VLLMSettings, resolve, wants_layerwise
from kvstore.errors import MisconfiguredError
from kvstore.settings import Settings, load_settings, variable

OWN = set(VLLMSettings.model_fields) - set(Settings.model_fields)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a TOML file and have KVSTORE_CONFIG name it."""

    def write(text):
        path = tmp_path / "kvstore.toml"
        path.write_text(text)
        monkeypatch.setenv("KVSTORE_CONFIG", str(path))
        return path

    return write


def resolved(**extra_config):
    return resolve(extra_config)


def test_names_of_an_adapters_own_settings_begin_with_its_name():
    assert {"vllm_load", "vllm_async"} == OWN


def test_they_come_from_extra_config_environment_and_file_in_this_order(config, monkeypatch):
    path = config('vllm_load = "whole"\nvllm_async = false\nprefix = "from-file"')
    found = resolved()
    assert (found.settings.vllm_load, found.settings.vllm_async) == (LoadMode.WHOLE, False)
    assert found.settings.prefix == "from-file"
    assert found.origins["vllm_load"] == f"file {path}"
    monkeypatch.setenv("KVSTORE_VLLM_LOAD", "layerwise")
    found = resolved()
    assert (found.settings.vllm_load, found.origins["vllm_load"]) == (LoadMode.LAYERWISE, "environment")
    assert wants_layerwise({})
    found = resolved(KVSTORE_VLLM_LOAD="auto")
    assert found.settings.vllm_load is LoadMode.AUTO
    assert found.origins["vllm_load"] == "kv_connector_extra_config"
    assert not wants_layerwise({"KVSTORE_VLLM_LOAD": "auto"})


def test_processes_without_the_adapter_leave_them_alone(config, monkeypatch, caplog):
    config('vllm_load = "whole"')
    monkeypatch.setenv("KVSTORE_VLLM_ASYNC", "false")
    settings = load_settings()
    assert not hasattr(settings, "vllm_load")
    assert not caplog.records


@pytest.mark.parametrize("prefix", ["nosuch", "vlm", "gc", "transformers", "..", "vllm/../vllm"])
def test_names_of_no_adapter_with_settings_are_no_settings(config, monkeypatch, caplog, prefix):
    name = f"KVSTORE_{prefix.upper()}_SIZE"
    monkeypatch.setenv(name, "1")
    load_settings()
    assert name in caplog.text
    config(f'"{prefix}_size" = 1')
    with pytest.raises(MisconfiguredError, match="is no setting"):
        load_settings()


def test_a_slip_in_a_variable_of_the_adapter_is_warned_of(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="kvstore.settings")
    monkeypatch.setenv("KVSTORE_VLLM_LAOD", "whole")
    resolved()
    assert "KVSTORE_VLLM_LAOD is set but is no setting of this version" in caplog.text
    assert "did you mean KVSTORE_VLLM_LOAD?" in caplog.text


def test_a_slip_in_the_file_is_an_error_that_names_the_nearest(config):
    config("vllm_asink = true")
    with pytest.raises(MisconfiguredError, match=r"did you mean vllm_async\?"):
        resolved()


@pytest.mark.parametrize("key", ["KVSTORE_VLLM_LAOD", "VLLM_LOAD", "vllm_load"])
def test_a_slip_in_the_extra_config_is_an_error_that_names_the_nearest(key):
    with pytest.raises(MisconfiguredError, match=f"'{key}' .* did you mean KVSTORE_VLLM_LOAD?"):
        resolved(**{key: "whole"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("vllm_load", "Auto"), ("vllm_load", "lazy"), ("vllm_async", "maybe"), ("vllm_async", "2")],
)
def test_a_malformed_value_is_named_with_what_it_takes(monkeypatch, field, value):
    monkeypatch.setenv(variable(field), value)
    with pytest.raises(MisconfiguredError) as error:
        resolved()
    assert f"{variable(field)}={value!r} (from environment)" in str(error.value)
    assert str(error.value).endswith(f"it takes {VLLMSettings.model_fields[field].description}")


def test_they_are_read_without_vllm_or_torch():
    code = (
        "import sys, kvstore.engine_adapters.vllm.settings as s; s.resolve_settings_of(s.VLLMSettings);"
        "assert not {'vllm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
