import random

import pytest
from gc_samples import chunks_of, hash_of

from kvstore.gc.chunks import Chunks
from kvstore.upkeep.prefix_tree import Node, PrefixTree, merged

ROOT = hash_of("tenant")


def rows_of(edges: dict[str, str | None], *, shards: int = 1) -> list[dict[str, object]]:
    """Chunks by name, each with the one before it; of every shard, whose object has 10 bytes."""
    depths: dict[str, int] = {}
    rows: list[dict[str, object]] = []
    for number, (name, before) in enumerate(edges.items()):
        depths[name] = 0 if before is None else depths.get(before, 6) + 1
        row = {
            "namespace": 0,
            "hash": hash_of(name),
            "parent": ROOT if before is None else hash_of(before),
            "parent_known": True,
            "depth": depths[name],
            "tokens": 8,
            "object_bytes": 10,
            "stored_s": 1.0 * number,
            "touched_s": 100.0 * number,
            "touches": number,
            "pinned": False,
        }
        rows += [row | {"shard": shard} for shard in range(shards)]
    return rows


def chunks(edges: dict[str, str | None], *, shards: int = 1) -> Chunks:
    return merged(chunks_of(rows_of(edges, shards=shards)))


# a-b-c, and behind c: d-e, f, g-h-i
EDGES = {"a": None, "b": "a", "c": "b", "d": "c", "e": "d", "f": "c", "g": "c", "h": "g", "i": "h"}


def nodes(tree: PrefixTree, *, levels: int = 10, nodes_max: int = 100) -> list[Node]:
    [tops] = tree.tops().values()
    return list(tree.nodes(tops, levels=levels, nodes_max=nodes_max))


def test_straight_runs_are_one_node_and_the_largest_comes_first():
    found = nodes(PrefixTree(chunks(EDGES)))
    assert [(node.level, node.run, node.chunks, node.object_bytes) for node in found] == [
        (0, 3, 9, 90),
        (1, 3, 3, 30),
        (1, 2, 2, 20),
        (1, 1, 1, 10),
    ]
    assert [(node.hash, node.last) for node in found[:2]] == [
        (hash_of("a"), hash_of("c")),
        (hash_of("g"), hash_of("i")),
    ]
    assert (found[0].depth, found[0].children, found[0].touches, found[0].touched_s) == (0, 3, 2, 200.0)


def test_what_is_not_shown_is_summed_up():
    [top] = nodes(PrefixTree(chunks(EDGES)), levels=1)
    assert (top.hidden, top.hidden_chunks, top.hidden_bytes) == (3, 6, 60)
    found = nodes(PrefixTree(chunks(EDGES)), nodes_max=2)
    assert [node.hash for node in found] == [hash_of("a"), hash_of("g")]
    assert (found[0].hidden, found[0].hidden_chunks, found[0].hidden_bytes) == (2, 3, 30)


def test_shards_of_a_chunk_are_one_node_of_all_their_bytes():
    found = nodes(PrefixTree(chunks(EDGES, shards=3)))
    assert [(node.chunks, node.object_bytes) for node in found] == [(9, 270), (3, 90), (2, 60), (1, 30)]


def test_what_is_behind_a_hole_has_no_tenant():
    edges = {name: before for name, before in EDGES.items() if name != "g"}
    tops = PrefixTree(chunks(edges)).tops()
    assert {root: len(rows) for root, rows in tops.items()} == {ROOT.hex(): 1, "": 1}


def test_a_chunk_is_found_by_its_first_digits():
    tree = PrefixTree(chunks(EDGES))
    for digits in (6, 7, 64):
        [row] = tree.rows_of(hash_of("d").hex()[:digits])
        assert next(tree.nodes([row], levels=1, nodes_max=1)).hash == hash_of("d")
    assert tree.rows_of("0" * 64) == []


@pytest.mark.parametrize("seed", range(10))
def test_every_chunk_is_in_one_node_or_summed_up_in_one(seed):
    source = random.Random(seed)
    names = [str(number) for number in range(200)]
    edges: dict[str, str | None] = {"0": None}
    for number, name in enumerate(names[1:]):
        edges[name] = (
            None if source.random() < 0.05 else source.choice(names[max(0, number - 8) : number + 1])
        )
    for nodes_max in (1, 7, 1000):
        for levels in (1, 3, 1000):
            tree = PrefixTree(chunks(edges))
            [tops] = tree.tops().values()
            found = list(tree.nodes(tops, levels=levels, nodes_max=nodes_max))
            assert len(found) <= nodes_max
            assert max(node.level for node in found) < levels
            top_bytes = sum(node.object_bytes for node in found if node.level == 0)
            assert top_bytes == sum(10 * node.run + node.hidden_bytes for node in found)
            if nodes_max == levels == 1000:
                assert sum(node.run for node in found) == len(names)
