import hashlib
import json
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import LAYOUT, namespace_of

from kvstore.errors import MisconfiguredError
from kvstore.keys import (
    ChunkKey,
    PrefixChain,
    namespace_document_name,
    object_name,
    parse_object_name,
)
from kvstore.layout import DType, KVLayout, Shard
from kvstore.namespace import Namespace

# Two tokens a chunk: many chunks from few tokens.
PAIRS = KVLayout(
    layers=1, kv_heads=1, head_dim=1, dtype=DType.UINT8, page_form="nhd", page_tokens=1, chunk_tokens=2
)
NAMESPACE = namespace_of(PAIRS)
# Few distinct values, among them ones whose bytes look like frames: near-collisions are the rule.
TOKENS = st.lists(st.sampled_from([0, 1, 4, 8, 0x61616161, 2**32 - 1]), max_size=9)
EXTRAS = st.lists(st.lists(st.binary(max_size=3), max_size=3), max_size=4)
SALTS = st.text("a\0", max_size=3)


def by_the_book(namespace_digest, tokens, salt, extra_keys, chunk_tokens):
    """The chain as docs/format.md describes it, written once more from that text alone."""

    def h(*fields):
        return hashlib.sha256(b"".join(len(f).to_bytes(8, "little") + f for f in fields)).digest()

    chain = [h(b"kvstore.prefix.v1", namespace_digest, salt.encode())]
    for i in range(len(tokens) // chunk_tokens):
        ids = b"".join(t.to_bytes(4, "little") for t in tokens[i * chunk_tokens : (i + 1) * chunk_tokens])
        chain.append(h(chain[-1], ids, *(extra_keys[i] if i < len(extra_keys) else ())))
    return chain


def hashes(tokens, **options):
    return [key.hash for key in PrefixChain.of(NAMESPACE, tokens, **options).keys]


@given(TOKENS, SALTS, EXTRAS)
def test_a_chain_is_what_the_format_document_says(tokens, salt, extra_keys):
    keys = PrefixChain.of(NAMESPACE, tokens, tenant_salt=salt, extra_keys=extra_keys).keys
    expected = by_the_book(NAMESPACE.digest, tokens, salt, extra_keys, 2)
    assert [key.parent for key in keys] == expected[:-1]
    assert [key.hash for key in keys] == expected[1:]
    assert [key.depth for key in keys] == list(range(len(keys)))
    assert all(key.namespace_digest == NAMESPACE.digest for key in keys)


def test_known_answers_never_change():
    namespace = Namespace("org/model", "0123abcd", LAYOUT, attention="rope theta=10000")
    assert namespace.digest.hex() == "86f92a8829b944fe14f0d015206aaba991cf6e3de4b66ac09e362855ba522b6a"
    plain = PrefixChain.of(namespace, range(18)).keys
    salted = PrefixChain.of(namespace, range(18), tenant_salt="tenant", extra_keys=[[b"image"]]).keys
    assert [key.hash.hex() for key in plain] == [
        "dc5c4ad9323e90c6e5c465f837fc931e1831ceb163660418361af72bcb2c0f10",
        "30c9504bb17e0506a685a48a3ed73a6ed80fcca7586c4af7b4e5e7a5ab71f3bf",
    ]
    assert [key.hash.hex() for key in salted] == [
        "5f124274b2439758b6f7ca8d4469b4978744862267406a3ab694273555ffafd4",
        "e0eb078a4c011477766a6f1fa24420d0f5faa603eedd345447cf576fbf5f51dc",
    ]


@given(TOKENS, TOKENS)
def test_two_sequences_share_keys_exactly_as_far_as_they_share_chunks(one, other):
    for i, (a, b) in enumerate(zip(hashes(one), hashes(other), strict=False)):
        assert (a == b) == (one[: 2 * i + 2] == other[: 2 * i + 2])


@given(TOKENS, EXTRAS, EXTRAS)
def test_extra_keys_split_chains_from_their_chunk_on(tokens, one, other):
    chunks = len(tokens) // 2
    one, other = ([list(e) for e in extra] + [[]] * (chunks - len(extra)) for extra in (one, other))
    keys = zip(hashes(tokens, extra_keys=one), hashes(tokens, extra_keys=other), strict=True)
    for i, (a, b) in enumerate(keys):
        assert (a == b) == (one[: i + 1] == other[: i + 1])


@given(
    st.tuples(TOKENS, SALTS, EXTRAS),
    st.tuples(TOKENS, SALTS, EXTRAS),
)
def test_no_byte_can_move_between_salt_tokens_and_extra_keys_unnoticed(one, other):
    def padded(tokens, salt, extra_keys):
        chunks = len(tokens) // 2
        extra_keys = [list(e) for e in extra_keys][:chunks]
        return (list(tokens[: 2 * chunks]), salt, extra_keys + [[]] * (chunks - len(extra_keys)))

    def last(tokens, salt, extra_keys):
        return hashes(tokens, tenant_salt=salt, extra_keys=extra_keys)[-1:]

    one, other = padded(*one), padded(*other)
    if one[0] and other[0]:
        assert (last(*one) == last(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[b"ab"]], [[b"a", b"b"]]),
        ([[b"ab"]], [[b"ab", b""]]),
        ([[b"a", b"b"]], [[b"b", b"a"]]),
        ([[b""]], [[]]),
        ([[b"a"], []], [[], [b"a"]]),
        ([[b"\1\0\0\0\0\0\0\0a"]], [[b"", b"a"]]),
    ],
)
def test_extra_keys_are_told_apart_however_they_are_split(one, other):
    assert hashes([1, 2, 3, 4], extra_keys=one)[-1] != hashes([1, 2, 3, 4], extra_keys=other)[-1]


def test_p12_tenants_with_different_salts_share_no_key():
    tokens = range(40)
    tenants = [set(hashes(tokens, tenant_salt=salt)) for salt in ("", "a", "b", "ab", "a\0", " ")]
    assert len(set.union(*tenants)) == 6 * 20


def test_the_order_of_tokens_matters():
    assert set(hashes([1, 2, 3, 4])).isdisjoint(hashes([2, 1, 3, 4]))


def test_tokens_past_the_last_full_chunk_have_no_key():
    assert hashes([1, 2, 3]) == hashes([1, 2])
    assert hashes([1]) == hashes([]) == []
    chain = PrefixChain.of(NAMESPACE, [1, 2, 3])
    assert (len(chain), chain.tokens) == (1, 2)


@pytest.mark.parametrize(
    "form",
    [list, tuple, lambda t: array("q", t), lambda t: array("I", t), np.array, lambda t: np.array(t, "uint8")],
    ids=["list", "tuple", "int64 array", "uint32 array", "numpy int64", "numpy uint8"],
)
def test_keys_depend_on_token_ids_not_on_what_holds_them(form):
    tokens = [5, 250, 7, 8, 0, 1]
    assert hashes(form(tokens)) == hashes(tokens)


@pytest.mark.parametrize("form", [bytes, bytearray, lambda t: memoryview(bytes(t))])
def test_token_ids_in_a_byte_string_are_ids_like_any_other(form):
    # Models that read bytes have them; each byte is one token.
    tokens = list(range(32))
    other = [*range(16), *range(100, 116)]
    assert hashes(form(tokens)) == hashes(tokens)
    assert hashes(form(tokens))[-1] != hashes(form(other))[-1]


@pytest.mark.parametrize("token", [-1, 2**32, 1.0, "a", None, b"a"])
def test_what_is_no_token_id_is_refused(token):
    with pytest.raises(MisconfiguredError, match="token id"):
        hashes([1, token])


def test_a_salt_that_is_no_text_is_refused_without_being_shown():
    with pytest.raises(MisconfiguredError) as error:
        hashes([1, 2], tenant_salt="hidden\udcff")
    assert "hidden" not in str(error.value)


@given(
    st.text("abz09/-", max_size=9).filter(lambda p: p == p.strip("/") and "//" not in p),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 999),
    st.integers(1, 999),
)
def test_parsing_undoes_naming(prefix, digest, chunk_hash, start, heads):
    shard = Shard(start, start + heads)
    name = object_name(prefix, ChunkKey(digest, chunk_hash, b"", 0), shard)
    assert parse_object_name(prefix, name) == (digest.hex()[:16], chunk_hash, shard)
    assert parse_object_name(f"{prefix}x", name) is None


def test_a_name_is_built_as_the_format_document_says():
    key = ChunkKey(b"\x01" * 32, b"\xab" * 32, b"", 0)
    assert object_name("a/b", key, Shard(0, 8)) == f"a/b/v1/{'01' * 8}/ab/{'ab' * 32}.0-8"
    assert object_name("", key, Shard(0, 8)) == f"v1/{'01' * 8}/ab/{'ab' * 32}.0-8"
    assert namespace_document_name("a/b", "01" * 8) == f"a/b/v1/{'01' * 8}/namespace.json"


HASH = "ab" * 32
FOLDER = f"p/v1/{'01' * 8}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        f"{FOLDER}/namespace.json",
        f"{FOLDER}/ab/{HASH}",
        f"{FOLDER}/ab/{HASH}.0",
        f"{FOLDER}/ab/{HASH}.0-",
        f"{FOLDER}/ab/{HASH}.8-8",
        f"{FOLDER}/ab/{HASH}.8-0",
        f"{FOLDER}/ab/{HASH}.-1-8",
        f"{FOLDER}/ac/{HASH}.0-8",
        f"{FOLDER}/ab/{HASH}.0-8.tmp",
        f"{FOLDER}/ab/{HASH}.0-8\n",
        f"{FOLDER}/ab/{HASH.upper()}.0-8",
        f"{FOLDER}/ab/{HASH[:-2]}.0-8",
        f"{FOLDER}/ab/x/{HASH}.0-8",
        f"p/v2/{'01' * 8}/ab/{HASH}.0-8",
        f"p/v1/{'01' * 7}/ab/{HASH}.0-8",
        f"x/v1/{'01' * 8}/ab/{HASH}.0-8",
        f"v1/{'01' * 8}/ab/{HASH}.0-8",
        # Other spellings of a number would give one chunk several names.
        f"{FOLDER}/ab/{HASH}.00-8",
        f"{FOLDER}/ab/{HASH}.0-08",
        f"{FOLDER}/ab/{HASH}.0-\N{ARABIC-INDIC DIGIT EIGHT}",
    ],
)
def test_a_foreign_name_is_none(name):
    assert parse_object_name("p", f"{FOLDER}/ab/{HASH}.0-8") is not None
    assert parse_object_name("p", name) is None


def test_a_chain_and_its_keys_show_no_token():
    chain = PrefixChain.of(NAMESPACE, [4_000_000_001, 4_000_000_002], tenant_salt="hidden salt")
    shown = f"{chain!r} {chain.keys[0]} {json.dumps(chain.namespace.describe())}"
    assert "4000000001" not in shown
    assert "hidden salt" not in shown


@pytest.mark.parametrize("extra", [b"image", ["image"], [None], 7])
def test_extra_keys_that_are_no_bytes_are_refused_naming_the_chunk(extra):
    with pytest.raises(MisconfiguredError, match=r"extra_keys\[1\]"):
        PrefixChain.of(NAMESPACE, range(4), extra_keys=[[b"fine"], extra])
