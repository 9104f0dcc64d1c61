"""The commands and the store, as processes of their own, on servers as a user has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import FORM

from localstack.contract import Store

REPOSITORY = Path(__file__).parents[2]
CHUNKS = 12
TIMEOUT_S = 100

# Tells as JSON what it did; `action` is save or load.
ENGINE = """
import json, sys
from samples import FORM, LAYOUT, Pages, chain_of
from kvstore.handles import Durability
from kvstore.store import KVStore

action, chunks = sys.argv[1], int(sys.argv[2])
chain = chain_of(chunks)
with KVStore.open(LAYOUT) as store:
    store.wait_connected(timeout_s=60)
    if action == "save":
        handle = store.save(chain, range(chunks), Pages(chunks, FORM, "a"), until=Durability.REMOTE)
        print(json.dumps(handle.wait(60)))
    else:
        pages = Pages(chunks)
        found = store.lookup(chain)
        result = store.load(chain, range(found.chunks), pages).wait(60)
        pages.assert_holds(range(result.chunks))
        print(json.dumps([found.chunks, result.chunks]))
"""


def environment_of(store: Store, *, tls: bool = False, **changes: str) -> dict[str, str]:
    patience = {"KVSTORE_LOOKUP_TIMEOUT_S": "60", "KVSTORE_LOAD_TIMEOUT_S": "60"}
    # Room for every chunk at once, so that none is dropped.
    memory = {
        "KVSTORE_MEMORY_BYTES": str(8 * CHUNKS * FORM.raw_bytes),
        "KVSTORE_UPLOAD_QUEUE_BYTES": str(4 * CHUNKS * FORM.raw_bytes),
    }
    return os.environ | patience | memory | store.environment(tls=tls) | changes


def engine(action: str, environment: dict[str, str]) -> object:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, action, str(CHUNKS)],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def doctor(environment: dict[str, str]) -> tuple[int, dict[str, dict[str, str]]]:
    """Its exit code, and its lines by name of the check."""
    done = subprocess.run(
        [sys.executable, "-m", "kvstore.cli", "doctor", "--json"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {line["check"]: line for line in lines if "check" in line}


def test_a_second_process_loads_over_tls_what_a_first_one_saved(rgw):
    environment = environment_of(rgw, tls=True, KVSTORE_PREFIX="end-to-end")
    assert engine("load", environment) == [0, 0]
    assert engine("save", environment) == {str(index): "stored" for index in range(CHUNKS)}
    assert engine("save", environment) == {str(index): "present" for index in range(CHUNKS)}
    assert engine("load", environment) == [CHUNKS, CHUNKS]


@pytest.mark.parametrize(("server", "tls"), [("rgw", False), ("rgw", True), ("localstack", False)])
def test_doctor_finds_a_real_server_fit(server, tls, request):
    code, checks = doctor(environment_of(request.getfixturevalue(server), tls=tls))
    assert {name for name, line in checks.items() if line["status"] != "pass"} == {"disk", "disk_tier"}
    assert checks["disk"]["status"] == "skip"
    assert code == 0


def test_doctor_names_a_wrong_secret(rgw):
    code, checks = doctor(environment_of(rgw, AWS_SECRET_ACCESS_KEY="guessed"))
    assert (code, checks["bucket"]["status"]) == (3, "fail")
    assert "AWS_SECRET_ACCESS_KEY" in checks["bucket"]["detail"] + checks["bucket"]["fix"]


def test_doctor_names_a_missing_bucket(rgw):
    code, checks = doctor(environment_of(rgw, KVSTORE_BUCKET="no-such-bucket"))
    assert (code, checks["bucket"]["status"]) == (3, "fail")
    assert "KVSTORE_BUCKET" in checks["bucket"]["detail"] + checks["bucket"]["fix"]


def test_doctor_names_an_untrusted_certificate(rgw):
    environment = environment_of(rgw, tls=True)
    del environment["AWS_CA_BUNDLE"]
    code, checks = doctor(environment)
    assert (code, checks["bucket"]["status"]) == (3, "fail")
    assert "KVSTORE_CA_BUNDLE" in checks["bucket"]["detail"] + checks["bucket"]["fix"]
