import json

from offered_codecs import DISTRIBUTION, UPPER_BYTES, offered


def test_codecs_are_listed_with_what_they_take_and_guarantee(kvstore):
    ended = kvstore("codecs", "--json")
    listed = {row["codec"]: row for row in map(json.loads, ended.stdout.splitlines())}
    assert ended.code == 0
    assert {"none", "lz4", "zstd", "planes"} <= set(listed)
    assert listed["zstd"]["takes"] == "LEVEL 1 to 22, default 1"
    lossy = {name: row["fidelity"] for name, row in listed.items() if row["fidelity"] != "lossless"}
    assert lossy == {"int8": "int8", "int4": "int4:64", "fp8": "fp8"}
    assert listed["int4"]["takes"] == ":GROUP of 32, 64, 128, default 64; then +CODEC, a byte codec"
    assert "1/254 of the head's largest value" in listed["int8"]["about"]


def test_people_see_the_same_codecs_as_programs(kvstore):
    text = kvstore("codecs").stdout
    assert all(name in text for name in ("none", "lz4", "zstd", "planes", "lossless", "general purpose"))


def test_codecs_of_other_packages_are_listed_with_where_they_come_from(kvstore, tmp_path):
    with offered(tmp_path, UPPER_BYTES, {"upper": "UPPER", "gone": "GONE"}):
        listed = map(json.loads, kvstore("codecs", "--json").stdout.splitlines())
        rows = {row["codec"]: row for row in listed if row["origin"] == DISTRIBUTION}
    assert rows.keys() == {"upper", "gone"}
    assert rows["upper"]["fidelity"] == "upper:2"
    assert rows["gone"]["fidelity"] == ""
    assert rows["gone"]["about"].startswith("cannot be used: codec 'gone'")
