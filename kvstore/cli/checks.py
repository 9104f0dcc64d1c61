"""What `kvstore doctor` checks, in order. Each tries one promise of the Backend contract live."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

from kvstore.backends.contract import ABSENT, PutStatus, UploadsInParts
from kvstore.backends.opening import filesystem_folder, is_s3
from kvstore.cli.credentials import HOW_TO_PROVIDE, find_credentials
from kvstore.cli.disk_tier import check_disk_tier, hung
from kvstore.cli.examination import (
    Check,
    Outcome,
    Site,
    Status,
    failed,
    in_daemon_thread,
    passed,
    warned,
)
from kvstore.cli.exits import ExitCode
from kvstore.cli.output import size_text
from kvstore.errors import MisconfiguredError
from kvstore.keys import format_folder
from kvstore.retries import Retries

PROBE_BYTES = 64 * 1024 + 3
RACERS = 8
ROUNDS = 3
READS = 5
READ_LATENCY_BYTES = 4096
DRIFT_WARN_S = 60.0
DRIFT_FAIL_S = 180.0
FREE_WARN_BYTES = 1 << 30
FREE_FAIL_BYTES = 64 << 20
_CONDITIONAL_FIX = (
    "use a store that honours PUT with If-None-Match: *, and let no proxy drop that header; "
    "without it two engines can overwrite each other's chunks"
)
_UPLOADS_FIX = (
    "allow s3:ListBucketMultipartUploads and s3:AbortMultipartUpload to whoever runs it, "
    "or have a lifecycle rule abort them; engines need neither"
)
_STORE_FIX = "use a store that keeps S3's promises, and let no caching or rewriting proxy stand before it"


async def check_credentials(site: Site) -> Outcome:
    """The AWS chain finds credentials, where the store needs them."""
    if not is_s3(site.settings):
        return Outcome(Status.SKIP, "not needed: the store is not S3")
    found = await in_daemon_thread(lambda: find_credentials(refresh=True))
    if not found.method:
        return Outcome(
            Status.FAIL, "the AWS chain finds no credentials", HOW_TO_PROVIDE, ExitCode.CONFIGURATION
        )
    return passed(f"found by {found.method}", method=found.method)


async def check_bucket(site: Site) -> Outcome:
    """The bucket answers, and says that an object never written is absent."""
    started_s = time.perf_counter()
    absent = await site.read("absent", length=1) is None
    latency_ms = 1e3 * (time.perf_counter() - started_s)
    where = site.backend.location
    # A server that is no object store answers "not found" as well, but cannot list.
    if not absent or await site.listed():
        return failed(f"{where} has an object that was never written", _STORE_FIX)
    return passed(f"{where} answers in {latency_ms:.1f} ms", location=where, latency_ms=round(latency_ms, 3))


async def check_write(site: Site) -> Outcome:
    """An object of several parts is stored whole."""
    parts = secrets.token_bytes(PROBE_BYTES // 2), secrets.token_bytes(PROBE_BYTES - PROBE_BYTES // 2)
    result = await site.put("write", *parts)
    if result.status is not PutStatus.CREATED:
        return failed("a fresh name is said to exist already", _STORE_FIX)
    if await site.read("write") != b"".join(parts):
        return failed("what was written reads back differently", _STORE_FIX)
    return passed(f"{PROBE_BYTES} bytes written and read back", object_bytes=PROBE_BYTES)


async def check_conditional_put(site: Site) -> Outcome:
    """A second put of a name is refused and changes nothing."""
    first, second = secrets.token_bytes(1000), secrets.token_bytes(1000)
    await site.put("conditional", first)
    result = await site.put("conditional", second)
    kept = await site.read("conditional") == first
    if result.status is not PutStatus.EXISTS:
        fate = "and was dropped" if kept else "and replaced the first object"
        return failed(f"a second conditional PUT was accepted {fate}", _CONDITIONAL_FIX)
    if not kept:
        return failed("a second conditional PUT was refused, yet the object changed", _CONDITIONAL_FIX)
    return passed("a second PUT is refused and the first bytes stay")


async def check_race(site: Site) -> Outcome:
    """Of several puts of one name at once exactly one wins, and its bytes are the object's."""
    payloads = [secrets.token_bytes(1000) for _ in range(RACERS)]
    # A loser may be told to try again (409) before it is told that the object exists.
    retried = Retries()
    puts = [partial(site.put, "race", payload) for payload in payloads]
    results = await asyncio.gather(*(retried(put) for put in puts))
    winners = [i for i, result in enumerate(results) if result.status is PutStatus.CREATED]
    if len(winners) != 1:
        return failed(f"{len(winners)} of {RACERS} simultaneous PUTs won, not 1", _CONDITIONAL_FIX)
    if await site.read("race") != payloads[winners[0]]:
        return failed("the object is not the one of the PUT that won", _CONDITIONAL_FIX)
    return passed(f"1 of {RACERS} simultaneous PUTs won", racers=RACERS)


async def check_range_read(site: Site) -> Outcome:
    """Ranged reads give exactly the bytes asked for, also at and past the end."""
    data = secrets.token_bytes(PROBE_BYTES)
    await site.put("range", data)
    name = site.folder + "range"
    ranges = ((0, 16), (1, 4095), (4096, 8192), (PROBE_BYTES - 9, 9), (PROBE_BYTES - 9, 20), (PROBE_BYTES, 8))
    etags = set()
    for offset, length in ranges:
        out = bytearray(length)
        answer = await site.backend.read_into(name, offset, memoryview(out))
        due = data[offset : offset + length]
        where = f"bytes {offset} to {offset + length} of {PROBE_BYTES}"
        if answer is ABSENT:
            return failed(f"{where}: the object is said to be absent", _STORE_FIX)
        if answer.object_bytes != PROBE_BYTES or out[: answer.length] != due:
            return failed(f"{where}: other bytes came back", _STORE_FIX)
        etags.add(answer.etag)
    if len(etags) != 1:
        return failed(f"{len(etags)} different ETags for one unchanged object", _STORE_FIX)
    return passed(f"{len(ranges)} ranges exact, end of object included", ranges=len(ranges))


async def check_read_your_write(site: Site) -> Outcome:
    """An object just written is there for the next request, even where its absence was seen before."""
    for turn in range(ROUNDS):
        label = f"fresh-{turn}"
        seen_early = await site.backend.head(site.folder + label) is not None
        data = secrets.token_bytes(100)
        await site.put(label, data)
        info = await site.backend.head(site.folder + label)
        if seen_early or info is None or info.object_bytes != len(data):
            return failed("HEAD right after PUT does not show the object as it is", _STORE_FIX)
        if await site.read(label) != data:
            return failed("GET right after PUT does not give the object", _STORE_FIX)
    return passed(f"visible at once, {ROUNDS} of {ROUNDS} times")


async def check_list(site: Site) -> Outcome:
    """A listing shows what was written, all of it, nothing else, in order."""
    # In byte order `-` comes before `/`, which a walk through folders gets wrong.
    labels = ["list/a-", "list/a/b", "list/b"]
    for label in reversed(labels):
        await site.put(label, b"x")
    found = await site.listed("list/")
    if found != labels:
        return failed(f"a listing shows {found}, not {labels}", _STORE_FIX)
    if await site.listed("list/", start_after=labels[0]) != labels[1:]:
        return failed("a listing does not continue after a given name", _STORE_FIX)
    return passed(f"{len(labels)} of {len(labels)} objects seen, in order")


async def check_delete(site: Site) -> Outcome:
    """A deleted object is gone, and deleting what is not there is no error."""
    await site.put("delete", b"x")
    names = [site.folder + "delete", site.folder + "never-written"]
    await site.backend.delete(names)
    if await site.backend.head(names[0]) is not None or "delete" in await site.listed("delete"):
        return failed("a deleted object is still there", f"{_STORE_FIX}; allow s3:DeleteObject")
    await site.backend.delete(names)
    return passed("gone at once; deleting it again is no error")


async def check_uploads(site: Site) -> Outcome:
    """Uploads in parts that nobody finished can be found, so that `kvstore gc` can abort them."""
    backend = site.backend
    if not isinstance(backend, UploadsInParts):
        return Outcome(Status.SKIP, "not needed: the store takes no uploads in parts")
    folder = format_folder(site.settings.prefix)
    try:
        unfinished = [upload async for upload in backend.unfinished_uploads(folder)]
    except MisconfiguredError as error:
        return warned(f"`kvstore gc` cannot abort those that nobody finishes: {error}", _UPLOADS_FIX)
    return passed(f"{len(unfinished)} unfinished under {folder}", unfinished=len(unfinished))


async def check_clock(site: Site) -> Outcome:
    """The store's clock and this machine's agree well enough for signatures and ages."""
    before_s = time.time()
    store_s = await site.backend.clock_s()
    drift_s = store_s - (before_s + time.time()) / 2
    side = "ahead of" if drift_s > 0 else "behind"
    detail = f"the store is {abs(drift_s):.1f} s {side} this machine"
    fix = "set this machine's clock by NTP (chrony, systemd-timesyncd); S3 refuses requests 15 minutes off"
    if abs(drift_s) > DRIFT_FAIL_S:
        return failed(detail, fix, drift_s=round(drift_s, 3))
    if abs(drift_s) > DRIFT_WARN_S:
        return warned(detail, fix, drift_s=round(drift_s, 3))
    return passed(detail, drift_s=round(drift_s, 3))


async def check_disk(site: Site) -> Outcome:
    """A filesystem store has room."""
    folder = filesystem_folder(site.settings)
    if folder is None:
        return Outcome(Status.SKIP, "not needed: the store is no folder of this machine")
    usage = await in_daemon_thread(lambda: shutil.disk_usage(_existing(folder)))
    detail = f"{size_text(usage.free)} of {size_text(usage.total)} free under {folder}"
    fix = "free space there, or point KVSTORE_BUCKET at a larger disk"
    if usage.free < FREE_FAIL_BYTES:
        return failed(detail, fix, free_bytes=usage.free)
    if usage.free < FREE_WARN_BYTES:
        return warned(detail, fix, free_bytes=usage.free)
    return passed(detail, free_bytes=usage.free)


async def check_latency(site: Site) -> Outcome:
    """How long a small read takes: information, no judgement."""
    took_ms = []
    for _ in range(READS):
        started_s = time.perf_counter()
        await site.read("write", length=READ_LATENCY_BYTES)
        took_ms.append(1e3 * (time.perf_counter() - started_s))
    median_ms = statistics.median(took_ms)
    detail = f"median of {READS} reads of {size_text(READ_LATENCY_BYTES)}: {median_ms:.1f} ms"
    return passed(detail, latency_ms=round(median_ms, 3), latency_ms_max=round(max(took_ms), 3))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


CHECKS = (
    Check("credentials", "AWS credentials", check_credentials),
    Check("bucket", "bucket reachable", check_bucket, ("credentials",)),
    Check("write", "write", check_write, ("bucket",)),
    Check("conditional_put", "conditional write refuses", check_conditional_put, ("write",)),
    Check("race", "race has one winner", check_race, ("write",)),
    Check("range_read", "ranged read exact", check_range_read, ("write",)),
    Check("read_your_write", "read your write", check_read_your_write, ("write",)),
    Check("list", "list", check_list, ("write",)),
    Check("delete", "delete", check_delete, ("write",)),
    Check("uploads", "uploads in parts", check_uploads, ("bucket",)),
    Check("clock", "clock drift", check_clock, ("bucket",)),
    Check("disk", "free disk", check_disk, unanswered=hung),
    Check("disk_tier", "disk tier", check_disk_tier, unanswered=hung),
    Check("latency", "read latency", check_latency, ("write",)),
)
