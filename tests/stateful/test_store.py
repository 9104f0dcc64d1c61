"""The whole store against an oracle, whatever happens: any order of saves, loads, crashes and damage.

Two processes share a bucket and a disk folder; both are small, so that chunks are evicted all the
time. Processes are killed between two commands, or at a named step of the write path. More
examples, other ones each time: STATEFUL_EXAMPLES=1000.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from node_process import SHARED_CHUNKS, DiedError, NodeProcess, Prompt, content
from oracle import (
    CHUNKS_MAX,
    KEYS,
    NAMES,
    PROMPT_OF,
    WHOLE_PROMPTS,
    WRITERS,
    do_damage,
    key_of,
    sealed,
    writer_of,
)
from samples import CANARY, FORM, PATIENCE_S, PREFIX, name_of

from kvstore.arena import whole_pages
from kvstore.failpoints import Failpoint
from kvstore.handles import Durability, SaveOutcome
from kvstore.index.names import parse_log
from kvstore.keys import ChunkKey

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "0"))
NAMESPACE_DOCUMENT = f"{PREFIX}/v1/{Prompt('', 0, 1).chain.namespace.name}/namespace.json"
UNTOUCHED = bytes([CANARY]) * FORM.section_bytes
PRESENCE_TTL_S = 60.0
SLOT_BYTES = whole_pages(FORM.raw_bytes)
IN_BUCKET = (SaveOutcome.STORED, SaveOutcome.PRESENT)

NODES = st.sampled_from([0, 1])
PROMPTS = st.builds(
    Prompt, st.sampled_from(["", "other"]), st.sampled_from([0, 1]), st.integers(1, CHUNKS_MAX)
)
NODE_SETTINGS = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(["none", "zstd"]),
        "memory_bytes": st.sampled_from([2 * SLOT_BYTES, 4 * SLOT_BYTES, 64 * SLOT_BYTES]),
        "disk_bytes": st.sampled_from([2 * SLOT_BYTES, 64 * SLOT_BYTES]),
        "journal_bytes": st.sampled_from([2 * SLOT_BYTES, 1 << 30]),
        "upload_queue_bytes": st.sampled_from([FORM.raw_bytes, 1 << 30]),
        "upload_concurrency": st.sampled_from([1, 4]),
        "fetch_concurrency": st.sampled_from([1, 4]),
        "when_full": st.sampled_from(["drop", "block", "spill"]),
        "with_disk": st.sampled_from([True, True, True, False]),
        "layer_by_layer": st.booleans(),
    }
)
DAMAGES = st.sampled_from(
    ["flip", "flip", "flip", "cut", "extend", "empty", "swap", "swap", "delete", "delete"]
)
PLACES = st.floats(0, 1, exclude_max=True)


class StoreMachine(RuleBasedStateMachine):
    """What is promised, by key.

    written    which writers' bytes it may have: of saves that were begun, whatever became of them
    remote     acknowledged as in the bucket, and not touched there behind the store's back since
    journaled  acknowledged as safe on disk, and touched neither there nor in the bucket since;
               journaled_by: by the process that runs now
    spoiled    its object was damaged behind the store's back
    deleted_s  when its object was deleted so, by this machine's clock
    versions   which file its object is; not of those that ever were damaged, as some process may
               remember that, and replace the object
    """

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        where = memory if os.access(memory, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-stateful-", dir=where))
        self.bucket, self.disk = self.folder / "bucket", self.folder / "disk"
        self.nodes: list[NodeProcess | None] = [None, None]
        self.options: list[dict[str, object]] = []
        self.failing_steps = 0
        self.now_s = 0.0
        self.written: dict[ChunkKey, set[str]] = {}
        self.remote: set[ChunkKey] = set()
        self.journaled: set[ChunkKey] = set()
        self.journaled_by: list[set[ChunkKey]] = [set(), set()]
        self.spoiled: set[ChunkKey] = set()
        self.damaged_files: set[str] = set()
        self.damaged_pending: set[str] = set()
        self.deleted_s: dict[ChunkKey, float] = {}
        self.versions: dict[ChunkKey, tuple[int, int]] = {}
        self.seen_spoiled: set[ChunkKey] = set()
        self.quarantined: set[str] = set()

    # Processes. One that has ended is opened again when it is next asked for something.

    @initialize(options=st.tuples(NODE_SETTINGS, NODE_SETTINGS), prompts=st.lists(PROMPTS, max_size=3))
    def begin(self, options, prompts):
        self.options = list(options)
        for prompt in prompts:
            self.save(0, prompt, 0, WRITERS[0], Durability.REMOTE)

    @rule(node=NODES, options=NODE_SETTINGS)
    def close(self, node, options):
        process, self.nodes[node], self.options[node] = self.nodes[node], None, options
        if process is not None:
            with contextlib.suppress(DiedError):
                process.close()

    @rule(node=NODES, options=NODE_SETTINGS)
    def kill(self, node, options):
        process, self.nodes[node], self.options[node] = self.nodes[node], None, options
        if process is not None:
            process.kill()

    @rule(node=NODES, point=st.sampled_from(Failpoint), times=st.integers(1, 3))
    def die_at(self, node, point, times):
        self.ask(node, "die_at", point, times)

    @rule(node=NODES)
    def check_slots(self, node):
        # In an outage uploads go on, and hold theirs.
        if not self.failing:
            self.ask(node, "check_slots")

    # What an engine does.

    @rule(
        node=NODES,
        prompt=PROMPTS,
        skip=st.integers(0, CHUNKS_MAX),
        writer=st.sampled_from(WRITERS),
        until=st.sampled_from(Durability),
    )
    def save(self, node, prompt, skip, writer, until):
        if not self.options[node]["with_disk"] and until is Durability.JOURNALED:
            until = Durability.REMOTE
        keys = prompt.chain.keys
        start = min(skip, self.leading(keys, self.written))
        fresh = [key for key in keys[start:] if writer not in self.written.get(key, ())]
        for key in fresh:
            self.written.setdefault(key, set()).add(writer)
        # What cannot be journaled waits for the backend as well.
        timeout_s = (0.02 if until is Durability.REMOTE else 0.3) if self.failing else PATIENCE_S
        answer = self.ask(node, "save", prompt, start, writer, until, timeout_s)
        if answer is None:
            return
        outcomes, gathered = answer
        for key in set(fresh) - {keys[index] for index in gathered}:
            self.written[key].discard(writer)
            if not self.written[key]:
                del self.written[key]
        assert list(outcomes) == list(range(start, len(keys)))
        for index, outcome in outcomes.items():
            self.note_outcome(node, keys[index], outcome)

    # Hypothesis leaves out some rules in each example; without these, many would have little to lose.

    @rule(node=NODES, prompt=PROMPTS, writer=st.sampled_from(WRITERS))
    def save_until_journaled(self, node, prompt, writer):
        self.save(node, prompt, 0, writer, Durability.JOURNALED)

    @rule(node=NODES, prompt=PROMPTS, writer=st.sampled_from(WRITERS))
    def save_until_remote(self, node, prompt, writer):
        self.save(node, prompt, 0, writer, Durability.REMOTE)

    @rule(node=NODES, prompt=PROMPTS, cancel_at=st.sampled_from([None, None, 0, 2]))
    def load(self, node, prompt, cancel_at):
        keys = prompt.chain.keys
        # A damaged copy on disk may cost one load, where the bucket has another writer's object.
        for _ in range(CHUNKS_MAX + 1):
            loaded = self.ask(node, "load", prompt, None, cancel_at)
            if loaded is None:
                return
            self.check_pages(keys, loaded)
            due = 0 if self.failing or cancel_at is not None else self.leading(keys, self.remote)
            if loaded.chunks >= due:
                return
        raise AssertionError(f"{due} chunks are in the bucket, {loaded.chunks} come")

    @rule(prompt=PROMPTS, index=st.integers(0, CHUNKS_MAX - 1), writer=st.sampled_from(WRITERS))
    def load_what_is_replaced_meanwhile(self, prompt, index, writer):
        keys = prompt.chain.keys
        key = keys[min(index, len(keys) - 1)]
        if key not in self.remote:
            return
        self.written[key].add(writer)
        self.versions.pop(key, None)
        self.load_afresh(prompt, with_disk=False, replace=(name_of(key), sealed(key, writer)))

    @rule(node=NODES, prompt=PROMPTS)
    def lookup(self, node, prompt):
        answer = self.ask(node, "lookup", prompt)
        if answer is not None:
            assert answer[0] <= self.leading(prompt.chain.keys, self.written), "more than was ever saved"

    @rule(node=NODES, prompt=PROMPTS)
    def lookup_when_nothing_is_known_any_more(self, node, prompt):
        keys = prompt.chain.keys
        for _ in range(2):
            self.pass_time()
            answer = self.ask(node, "lookup", prompt)
            if answer is None or self.failing:
                return
            found, local = answer
            assert found >= self.leading(keys, self.remote), "less than is in the bucket"
            missing = [key for key in keys[local:found] if not (self.bucket / name_of(key)).exists()]
            if not missing:
                return
            # Seen while it was uploaded, a chunk stands for those before it. Not twice.
            self.flush(node, Durability.REMOTE)
        raise AssertionError(f"long gone, and still there: {missing}")

    @rule(node=NODES, until=st.sampled_from([Durability.JOURNALED, Durability.REMOTE]))
    def flush(self, node, until):
        report = self.ask(node, "flush", until, 0.02 if self.failing else PATIENCE_S)
        if report is None:
            return
        assert self.failing or report.chunks_left == 0
        if until is Durability.REMOTE and report.chunks_left == 0:
            lost = [key for key in self.journaled & self.journaled_by[node] if not self.is_intact(key)]
            assert not lost, f"nothing is left, but not in the bucket: {lost}"

    @rule()
    def pass_time(self):
        self.now_s += 2 * PRESENCE_TTL_S
        self.tell_all("pass_time", 2 * PRESENCE_TTL_S)

    # What happens to the bucket and the disk.

    @rule(steps=st.integers(1, 6))
    def fail_for_a_while(self, steps):
        self.failing_steps = steps
        self.tell_all("fail")

    @rule(node=NODES, prompt=PROMPTS, writer=st.sampled_from(WRITERS))
    def save_during_an_outage(self, node, prompt, writer):
        self.fail_for_a_while(1)
        self.save(node, prompt, 0, writer, Durability.JOURNALED)
        self.time_heals()
        self.flush(node, Durability.REMOTE)

    @rule(node=NODES, times=st.integers(1, 4))
    def lose_answers(self, node, times):
        self.ask(node, "lose_answers", times)

    @rule(node=NODES, damage=DAMAGES, which=PLACES, at=PLACES)
    def damage_object(self, node, damage, which, at):
        present = [name for name in sorted(NAMES) if (self.bucket / name).exists()]
        if not present:
            return
        name = present[int(which * len(present))]
        other = present[int(at * len(present))]
        for touched in {name, other} if damage == "swap" else {name}:
            key = NAMES[touched]
            self.versions.pop(key, None)
            self.remote.discard(key)
            self.journaled.discard(key)
            if damage == "delete":
                self.deleted_s[key] = self.now_s
            else:
                self.spoiled.add(key)
                self.seen_spoiled.add(key)
        do_damage(damage, self.bucket / name, self.bucket / other, at)
        prompt = PROMPT_OF[NAMES[name]]
        # A load would tell that it is gone.
        self.lookup_when_nothing_is_known_any_more(node, prompt)
        self.load_afresh(prompt, with_disk=False)
        self.load(node, prompt, None)

    @rule(node=NODES, damage=DAMAGES, which=PLACES, at=PLACES)
    def damage_file(self, node, damage, which, at):
        files = self.disk_files()
        if not files:
            return
        path, other = files[int(which * len(files))], files[int(at * len(files))]
        for touched in (path, other) if damage == "swap" else (path,):
            self.journaled.discard(key_of(touched))
            self.damaged_files.add(touched.name)
            self.damaged_pending.discard(touched.name)
        # One that a node removes at this moment need not be damaged.
        with contextlib.suppress(FileNotFoundError):
            do_damage(damage, path, other, at)
        self.load_afresh(PROMPT_OF[key_of(path)], with_disk=True)
        self.load(node, PROMPT_OF[key_of(path)], None)

    @invariant()
    def time_heals(self):
        self.failing_steps = max(-1, self.failing_steps - 1)
        if self.failing_steps == 0:
            self.tell_all("recover")

    @rule(prompt=PROMPTS, damage=DAMAGES, which=PLACES, at=PLACES, options=NODE_SETTINGS)
    def crash_and_damage_what_is_pending(self, prompt, damage, which, at, options):
        """While nobody could upload it before."""
        self.fail_for_a_while(2)
        self.save(0, prompt, 0, WRITERS[0], Durability.JOURNALED)
        for node in range(2):
            self.kill(node, options)
        files = self.pending_files()
        if not files or damage == "swap":
            return
        path = files[int(which * len(files))]
        self.journaled.discard(key_of(path))
        if path.name not in self.damaged_pending:
            do_damage(damage, path, path, at)
            self.damaged_files.add(path.name)
            if damage != "delete":
                self.damaged_pending.add(path.name)

    # What must be true at any time.

    @invariant()
    def the_bucket_has_whole_objects_of_known_chunks_alone(self):
        for path in self.bucket.rglob("*"):
            name = str(path.relative_to(self.bucket))
            if path.is_dir() or name.startswith(".tmp/") or name == NAMESPACE_DOCUMENT:
                continue
            if parse_log(PREFIX, name) is not None:
                continue
            assert name in NAMES, "an object that nobody saved"
            key = NAMES[name]
            found = path.stat()
            version = found.st_ino, found.st_mtime_ns
            if key not in self.seen_spoiled:
                assert version == self.versions.setdefault(key, version), "an object that was replaced"
            if self.is_intact(key):
                self.spoiled.discard(key)
            else:
                assert key in self.spoiled, "an object that is not whole"

    @invariant()
    def what_is_remote_stays_there(self):
        assert all(self.is_intact(key) for key in self.remote)

    @invariant()
    def what_was_set_aside_stays_there(self):
        found = {path.name for path in (self.disk / "quarantine").glob("*")}
        assert self.quarantined <= found
        self.quarantined = found

    def teardown(self):
        fresh = {"with_disk": True, "layer_by_layer": False, "memory_bytes": 2 * SLOT_BYTES}
        try:
            for node in range(2):
                self.kill(node, fresh)
            self.check_what_a_fresh_process_finds()
        finally:
            for node in range(2):
                self.kill(node, fresh)
            shutil.rmtree(self.folder, ignore_errors=True)

    def check_what_a_fresh_process_finds(self):
        self.failing_steps = 0
        self.flush(0, Durability.REMOTE)
        pending = {path.name for path in self.pending_files()}
        # One whose version is damaged is left to a newer process.
        assert pending <= self.damaged_files
        set_aside = " ".join(self.quarantined | {path.name for path in (self.disk / "quarantine").glob("*")})
        # Or it was saved again, and the damaged one replaced.
        gone = [name for name in self.damaged_pending - pending if name not in set_aside]
        assert all(self.is_intact(key_of(Path(name))) for name in gone)
        lost = [key for key in self.journaled if not self.is_intact(key)]
        assert not lost, f"journaled, and lost: {lost}"
        self.the_bucket_has_whole_objects_of_known_chunks_alone()
        self.what_is_remote_stays_there()
        for prompt in WHOLE_PROMPTS:
            self.lookup(0, prompt)
            self.load(0, prompt, None)
        self.check_slots(0)

    # Helpers.

    def opened(self, *, with_disk, layer_by_layer, **options):
        if with_disk:
            options["disk_dir"] = str(self.disk)
        elif options["when_full"] == "spill":
            options["when_full"] = "drop"
        return NodeProcess(
            self.bucket,
            layer_by_layer=layer_by_layer,
            failing=self.failing,
            save_timeout_s=0.02,
            presence_ttl_s=PRESENCE_TTL_S,
            close_timeout_s=0.02 if self.failing else 0.2,
            **options,
        )

    def load_afresh(self, prompt, *, with_disk, replace=None):
        """By a process that has nothing in memory, and reads layer by layer."""
        reader = self.opened(with_disk=with_disk, layer_by_layer=True, when_full="drop")
        try:
            self.check_pages(prompt.chain.keys, reader.ask("load", prompt, replace, None))
        finally:
            reader.kill()

    @property
    def failing(self):
        return self.failing_steps > 0

    def ask(self, node, command, *arguments):
        """The node's answer; None when it died before."""
        try:
            if self.nodes[node] is None:
                self.journaled_by[node].clear()
                self.nodes[node] = self.opened(**self.options[node])
            return self.nodes[node].ask(command, *arguments)
        except DiedError:
            self.nodes[node] = None
            return None

    def tell_all(self, command, *arguments):
        for node in range(2):
            if self.nodes[node] is not None:
                self.ask(node, command, *arguments)

    def note_outcome(self, node, key, outcome):
        # What is there already, as an object or pending, is taken for whole until somebody has read it.
        damaged = key in self.spoiled or Path(name_of(key)).name in self.damaged_files
        if outcome is SaveOutcome.JOURNALED and not damaged:
            self.journaled.add(key)
            self.journaled_by[node].add(key)
        if outcome not in IN_BUCKET:
            return
        if self.is_intact(key):
            self.remote.add(key)
        elif not (self.bucket / name_of(key)).exists():
            # Known to be there from before; that is believed for a while.
            assert self.now_s - self.deleted_s.get(key, -1e9) <= PRESENCE_TTL_S, f"{outcome}, and not there"

    def check_pages(self, keys, loaded):
        assert loaded.leading == sorted(loaded.leading, reverse=True)
        assert loaded.chunks <= loaded.leading[-1]
        for layer, early in enumerate(loaded.early):
            for key, data in zip(keys, early, strict=False):
                assert any(data == content(key, layer, writer) for writer in self.written.get(key, ()))
        for index, (key, layers) in enumerate(zip(keys, loaded.sections, strict=True)):
            whole = [
                [content(key, layer, writer) for layer in range(FORM.layers)]
                for writer in sorted(self.written.get(key, ()))
            ]
            if index < loaded.chunks:
                assert layers in whole, "not what one engine has saved"
            for layer, data in enumerate(layers):
                assert data == UNTOUCHED or data in [each[layer] for each in whole]

    def is_intact(self, key):
        """Whether the bucket has an object of the key that is whole, and one writer's."""
        try:
            data = (self.bucket / name_of(key)).read_bytes()
        except FileNotFoundError:
            return False
        writer = writer_of(key, data)
        assert writer is None or writer in self.written.get(key, ()), "whole, but nobody's"
        return writer is not None

    def pending_files(self):
        return sorted((self.disk / "pending").rglob("*.0-3"))

    def disk_files(self):
        return sorted((self.disk / "v1").rglob("*.0-3")) + self.pending_files()

    @staticmethod
    def leading(keys, among):
        return next((index for index, key in enumerate(keys) if key not in among), len(keys))


def test_the_prompts_here_share_what_they_should():
    assert len(KEYS) == 2 * (SHARED_CHUNKS + 2 * (CHUNKS_MAX - SHARED_CHUNKS))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=EXAMPLES or 25,
    stateful_step_count=40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    # What processes do at the same time differs from run to run, so shrinking leads nowhere.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestStore.pytestmark = [
    pytest.mark.timeout(120 + 5 * EXAMPLES),
    # Other tests leave threads; a store has threads of its own, in the child.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
