import json
import subprocess
import sys

import pytest

import kvstore

IMPORT_S_MAX = 0.15
HEAVY = ("torch", "transformers", "numpy", "boto3", "botocore", "aiobotocore", "aiohttp", "pydantic", "moto")
REPORT = """
import sys, time
before = time.perf_counter()
import {module}
took_s = time.perf_counter() - before
import json
print(json.dumps([took_s, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def fresh_import(module):
    """Seconds an import takes in a process of its own, and the top-level modules it leaves."""
    script = [sys.executable, "-c", REPORT.format(module=module)]
    return json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)


def test_importing_kvstore_loads_nothing_heavy():
    assert set(HEAVY).isdisjoint(fresh_import("kvstore")[1])


@pytest.mark.parametrize("module", ["kvstore.store", "kvstore.settings", "kvstore.backends.filesystem"])
def test_the_store_itself_loads_neither_tensors_nor_an_s3_client(module):
    assert set(HEAVY).difference(["pydantic"]).isdisjoint(fresh_import(module)[1])


def test_importing_kvstore_is_quick():
    # The fastest of several: a busy machine makes any one of them slow, none of them fast.
    assert min(fresh_import("kvstore")[0] for _ in range(5)) < IMPORT_S_MAX


def test_every_public_name_is_there():
    assert all(getattr(kvstore, name) is not None for name in kvstore.__all__)
    assert set(kvstore.__all__) == set(kvstore._HOMES)


def test_a_name_that_is_not_there_is_said():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = kvstore.nothing_of_the_kind
