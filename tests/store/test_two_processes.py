import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from aws_credentials import use_test_credentials
from samples import PATIENCE_S, PREFIX, Pages, chain_of, name_of, settings_of

from kvstore.index.names import parse_log
from kvstore.store import KVStore
from localstack.moto import moto_server

# One process of a fleet: says "ready", waits to be told to go on, and reports as JSON.
NODE = """
import json, sys
from samples import FORM, LAYOUT, Pages, chain_of, settings_of
from kvstore.handles import Durability
from kvstore.store import KVStore

settings, action, chunks = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chain = chain_of(chunks)
with KVStore.open(LAYOUT, settings=settings_of(**settings)) as store:
    store.lookup(chain_of(1, first_token=10**6))
    print("ready", flush=True)
    sys.stdin.readline()
    if action == "save":
        # Both write the same bytes, as two engines do that compute the same prefix.
        handle = store.save(chain, range(chunks), Pages(chunks, FORM, "a"), until=Durability.REMOTE)
        print(json.dumps(handle.wait(60)), flush=True)
    else:
        pages = Pages(chunks)
        found = store.lookup(chain).chunks
        result = store.load(chain, range(found), pages).wait(60)
        pages.assert_holds(range(result.chunks))
        print(json.dumps([found, result.chunks]), flush=True)
"""
CHUNKS = 6


class Node:
    def __init__(self, settings, action):
        folder = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODE, json.dumps(settings), action, str(CHUNKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(folder)},
        )

    def wait_ready(self):
        assert self._process.stdout.readline() == "ready\n"

    def go(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def report(self):
        output, _ = self._process.communicate(timeout=3 * PATIENCE_S)
        assert self._process.returncode == 0
        return json.loads(output)


@pytest.fixture(params=["filesystem", "s3"])
def shared(request, tmp_path, monkeypatch):
    """Settings that name one store for all processes."""
    if request.param == "filesystem":
        yield {"bucket": (tmp_path / "store").as_uri()}
        return
    use_test_credentials(monkeypatch)
    with moto_server() as url:
        urllib.request.urlopen(urllib.request.Request(f"{url}/shared-bucket", method="PUT")).close()
        yield {
            "bucket": "shared-bucket",
            "endpoint_url": url,
            "region": "us-east-1",
            "addressing_style": "path",
        }


def test_of_processes_that_race_to_save_one_chunk_one_wins_and_all_succeed(shared):
    nodes = [Node(shared, "save") for _ in range(2)]
    for node in nodes:
        node.wait_ready()
    for node in nodes:
        node.go()
    reports = [node.report() for node in nodes]
    for index in map(str, range(CHUNKS)):
        assert sorted(report[index] for report in reports) == ["present", "stored"]

    reader = Node(shared, "load")
    reader.wait_ready()
    reader.go()
    assert reader.report() == [CHUNKS, CHUNKS]
    with KVStore.open(Pages(1).form.layout, settings=settings_of(**shared)) as store:
        pages = Pages(CHUNKS)
        assert store.load(chain_of(CHUNKS), range(CHUNKS), pages).wait(PATIENCE_S).chunks == CHUNKS
        pages.assert_holds(range(CHUNKS))
        if shared["bucket"].startswith("file"):
            root = Path(shared["bucket"].removeprefix("file://"))
            files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
            names = {name_of(key) for key in chain_of(CHUNKS).keys}
            # The objects and what they are; nothing half written is left.
            files = {name for name in files if parse_log(PREFIX, name) is None}
            assert files == names | {f"{PREFIX}/v1/{chain_of(1).namespace.name}/namespace.json"}
