"""How long a garbage collection plans, and in how much memory: up to ten million objects.

Trees are synthetic: turns of conversations, each of which continues an earlier one, from a few
system prompts, of three tenants in three namespaces of two shards. The policy has every limit there
is. Each size is planned in a process of its own, so that its peak of memory is its own; that includes
the columns planned over. Then a node learns from a snapshot of a million chunks what there is.

JSON: machine; objects, plan_s, peak_rss_bytes (of the largest size), growth_exponent (of plan_s, from
the smallest size to the largest: 1 is linear); `sizes`: a list of {objects, plan_s, peak_rss_bytes, goes};
snapshot_chunks, snapshot_load_1m_s, snapshot_1m_bytes (of its objects, of which a node reads a part),
snapshot_1m_peak_bytes (how far the load raises the process's memory at most), snapshot_1m_known_bytes (what
is left of that); listing_objects, listing_objects_per_s, listing_cpu_s_per_million (of this process), where
any are to be listed: on a Ceph RGW of this machine, which is installed if it is missing.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.command_line import add_number, add_numbers, parser_of
from benchmarks.report import machine, print_result, say, timed
from kvstore.gc.chunks import Chunks
from kvstore.gc.plan import plan
from kvstore.gc.policy import Policy

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
SIZES = (100_000, 1_000_000, 10_000_000)
CHAIN = 20
ROOTS = 1000


def synthetic_chunks(objects: int, seed: int = 0) -> Chunks:
    """Chains of twenty chunks, each of which continues the end of an earlier one or a system prompt."""
    source = np.random.default_rng(seed)
    row = np.arange(objects, dtype=np.int32)
    parent = row - 1
    starts = np.arange(0, objects, CHAIN)
    # A third begin a prefix, the others continue what was there before.
    parent[starts] = np.where(
        source.random(len(starts)) < 1 / 3, -1, (source.random(len(starts)) * starts - 1)
    )
    parent[0] = -1
    depth = np.zeros(objects, np.int32)
    tree = np.where(parent < 0, row % ROOTS, 0).astype(np.int32)
    for start in range(0, objects, CHAIN):
        above = parent[start]
        first = 0 if above < 0 else depth[above] + 1
        depth[start : start + CHAIN] = np.arange(first, first + CHAIN)[: objects - start]
        tree[start : start + CHAIN] = tree[start] if above < 0 else tree[above]
    digests = np.frombuffer(source.bytes(32 * objects), np.uint8).reshape(objects, 32)
    salts = np.frombuffer(source.bytes(32 * 3), np.uint8).reshape(3, 32)
    parents = digests[parent]
    parents[parent < 0] = salts[tree[parent < 0] % 3]
    stored_s = NOW_S - source.random(objects) * 60 * DAY_S
    return Chunks(
        namespace=tree % 3,
        shard=tree % 2,
        hash=digests,
        parent=parents,
        parent_known=np.ones(objects, np.bool_),
        depth=depth,
        tokens=np.full(objects, 256, np.int32),
        object_bytes=source.integers(8 << 20, 32 << 20, objects),
        stored_s=stored_s,
        touched_s=stored_s + source.random(objects) * (NOW_S - stored_s),
        touches=source.integers(0, 10, objects, np.int32),
        pinned=source.random(objects) < 1e-4,
    )


def measure(objects: int) -> dict[str, int | float]:
    """One size, in this process."""
    chunks = synthetic_chunks(objects)
    total = int(chunks.object_bytes.sum())
    policy = Policy(
        max_bytes=int(total * 0.8),
        max_namespace_bytes=int(total * 0.3),
        max_tenant_bytes=int(total * 0.1),
        max_age_s=50 * DAY_S,
        max_idle_s=40 * DAY_S,
        max_share=0.5,
    )
    with timed() as timing:
        planned = plan(chunks, policy, NOW_S)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "objects": objects,
        "plan_s": round(timing().wall_s, 3),
        "peak_rss_bytes": peak_rss_bytes,
        "goes": len(planned.rows),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=gc", description=__doc__)
    add_numbers(parser, "--objects", SIZES, "how many objects there are, one size after the other")
    add_number(parser, "--snapshot-chunks", 1_000_000, "how many chunks the snapshot has that is loaded")
    add_number(parser, "--listed-objects", 20_000, "how many objects are listed on Ceph RGW", least=0)
    parser.add_argument("--here", action="store_true", help="measure in this process, and print that alone")
    options = parser.parse_args(arguments)
    if options.here:
        print_result(measure(options.objects[0]))
        return
    rows = []
    for objects in sorted(options.objects):
        command = [sys.executable, "-m", "benchmarks.gc", "--here", "--objects", str(objects)]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
        row = rows[-1]
        say(
            f"{objects:>10} objects: planned in {row['plan_s']:.2f} s, {row['goes']} of them go, "
            f"peak of memory {row['peak_rss_bytes'] / (1 << 20):.0f} MiB"
        )
    least, most = rows[0], rows[-1]
    exponent = None
    if len(rows) > 1:
        exponent = math.log(most["plan_s"] / least["plan_s"]) / math.log(most["objects"] / least["objects"])
        say(f"growth exponent {exponent:.2f}")
    # What it needs is no part of the memory that planning takes.
    from benchmarks import snapshot_load

    loaded = snapshot_load.measure(options.snapshot_chunks)
    say(
        f"{options.snapshot_chunks:>10} chunks: loaded in {loaded['snapshot_load_1m_s']:.2f} s, with "
        f"{loaded['snapshot_1m_peak_bytes'] / (1 << 20):.0f} MiB at most, from a snapshot of "
        f"{loaded['snapshot_1m_bytes'] / (1 << 20):.0f} MiB"
    )
    listed = _listed(options.listed_objects) if options.listed_objects else {}
    print_result(
        {
            "machine": machine(),
            **{name: most[name] for name in ("objects", "plan_s", "peak_rss_bytes")},
            "growth_exponent": None if exponent is None else round(exponent, 3),
            "sizes": rows,
            **loaded,
            **listed,
        }
    )


def _listed(objects: int) -> dict[str, int | float]:
    from benchmarks import rgw_listing

    listed = rgw_listing.measure(objects)
    say(
        f"{objects:>10} objects: {listed['listing_objects_per_s']} a second listed on Ceph RGW, "
        f"{listed['listing_cpu_s_per_million']} CPU s a million"
    )
    return listed


if __name__ == "__main__":
    main()
