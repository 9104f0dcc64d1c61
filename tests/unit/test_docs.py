"""The documents name what there is."""

import re
from pathlib import Path

import pytest

from kvstore.engine_adapters.vllm.settings import VLLMSettings
from kvstore.errors import MissReason
from kvstore.handles import SaveOutcome
from kvstore.metrics import Metrics
from kvstore.presence import DAMAGE
from kvstore.settings import CONFIG_VARIABLE, variable

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OPERATIONS = (ROOT / "docs/operations.md").read_text()


def test_the_settings_table_has_every_setting_and_no_other():
    rows = re.findall(r"^\| `(KVSTORE_\w+)` \|", OPERATIONS, re.MULTILINE)
    assert sorted(rows) == sorted(map(variable, VLLMSettings.model_fields))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_that_a_document_names_exist(document):
    known = {*map(variable, VLLMSettings.model_fields), CONFIG_VARIABLE}
    assert set(re.findall(r"KVSTORE_[A-Z0-9_]+", document.read_text())) <= known


def test_metrics_that_are_documented_are_exported_and_the_other_way_round():
    metrics = Metrics().registry.collect()
    exported = {metric.name + ("_total" if metric.type == "counter" else "") for metric in metrics}
    rows = [row for row in OPERATIONS.splitlines() if row.startswith("| `kvstore_")]
    assert {name for row in rows for name in re.findall(r"`(kvstore_\w+)", row)} == exported


def test_reasons_and_outcomes_that_are_documented_exist():
    for word in (*DAMAGE, *SaveOutcome, MissReason.BEHIND_A_MISS):
        if word is not SaveOutcome.QUEUED:
            assert f"`{word}`" in OPERATIONS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    text = document.read_text()
    links = [document.parent / name for name in re.findall(r"\]\(([^):#]+)\)", text)]
    paths = [
        ROOT / name for name in re.findall(r"`((?:tests|kvstore|docs|examples|benchmarks)/[\w./]*)`", text)
    ]
    assert [str(path) for path in links + paths if not path.exists()] == []
