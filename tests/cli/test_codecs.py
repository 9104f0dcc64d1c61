import json


def test_codecs_are_listed_with_what_they_take_and_guarantee(kvstore):
    ended = kvstore("codecs", "--json")
    listed = {row["codec"]: row for row in map(json.loads, ended.stdout.splitlines())}
    assert ended.code == 0
    assert {"none", "lz4", "zstd", "planes"} <= set(listed)
    assert listed["zstd"]["takes"] == "LEVEL 1 to 22, default 1"
    assert {row["fidelity"] for row in listed.values()} == {"lossless"}


def test_people_see_the_same_codecs_as_programs(kvstore):
    text = kvstore("codecs").stdout
    assert all(name in text for name in ("none", "lz4", "zstd", "planes", "lossless", "general purpose"))
