import dataclasses
import hashlib
import json

import pytest
from samples import LAYOUT, namespace_of

from kvstore.errors import MisconfiguredError
from kvstore.keys import PrefixChain
from kvstore.layout import DType, KVLayout
from kvstore.namespace import Namespace

OPAQUE = KVLayout(
    layers=2,
    kv_heads=1,
    head_dim=1,
    dtype=DType.UINT8,
    page_form="opaque:engine-1",
    page_tokens=4,
    chunk_tokens=8,
    page_bytes=100,
)
MLA = KVLayout(
    layers=2, kv_heads=1, head_dim=9, dtype=DType.FLOAT16, page_form="mla", page_tokens=4, chunk_tokens=8
)


def with_layout(layout, **changes):
    return namespace_of(dataclasses.replace(layout, **changes))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Namespace)])
def test_every_field_of_a_namespace_changes_its_digest(field):
    namespace = namespace_of()
    value = dataclasses.replace(LAYOUT, layers=LAYOUT.layers + 1) if field == "layout" else "other"
    other = dataclasses.replace(namespace, **{field: value})
    assert other.digest != namespace.digest
    assert other.name != namespace.name
    one, two = ({key.hash for key in PrefixChain.of(n, range(99)).keys} for n in (namespace, other))
    assert one.isdisjoint(two)


LAYOUT_CHANGES = {
    "layers": 5,
    "kv_heads": 4,
    "head_dim": 8,
    "dtype": DType.FLOAT8_E4M3,
    "page_form": "hnd",
    "chunk_tokens": 12,
    "value_dim": 5,
}


@pytest.mark.parametrize("field", LAYOUT_CHANGES)
def test_every_field_of_a_layout_that_decides_bytes_changes_the_digest(field):
    assert with_layout(LAYOUT, **{field: LAYOUT_CHANGES[field]}).digest != namespace_of().digest


def test_no_field_of_a_layout_is_left_untested():
    tested = {*LAYOUT_CHANGES, "page_tokens", "page_bytes"}
    assert tested == {field.name for field in dataclasses.fields(KVLayout)}


@pytest.mark.parametrize("dtype", sorted(set(DType) - {DType.UINT8}))
def test_element_types_of_one_size_are_told_apart(dtype):
    assert with_layout(LAYOUT, dtype=dtype).digest != namespace_of().digest


@pytest.mark.parametrize("layout", [LAYOUT, MLA], ids=["nhd", "mla"])
def test_engines_with_other_page_sizes_share_a_namespace_where_bytes_are_equal(layout):
    assert with_layout(layout, page_tokens=1).digest == namespace_of(layout).digest


@pytest.mark.parametrize(
    "layout", [dataclasses.replace(LAYOUT, page_form="hnd"), OPAQUE], ids=["hnd", "opaque"]
)
def test_page_size_changes_the_digest_where_bytes_depend_on_it(layout):
    assert with_layout(layout, page_tokens=1).digest != namespace_of(layout).digest


def test_opaque_pages_are_told_apart_by_tag_and_size():
    one = namespace_of(OPAQUE).digest
    assert with_layout(OPAQUE, page_bytes=101).digest != one
    assert with_layout(OPAQUE, page_form="opaque:engine-2").digest != one


def test_a_value_dim_that_says_what_goes_without_saying_changes_nothing():
    plain = dataclasses.replace(LAYOUT, value_dim=None)
    assert with_layout(plain, value_dim=plain.head_dim).digest == namespace_of(plain).digest


@pytest.mark.parametrize("field", ["model", "weights_revision", "attention", "fidelity"])
@pytest.mark.parametrize("value", ["", " ", "\t\n", None])
def test_a_blank_field_is_refused_by_name(field, value):
    with pytest.raises(MisconfiguredError, match=f"namespace {field}"):
        namespace_of(**{field: value})


def test_there_is_no_default_for_the_weights_revision():
    with pytest.raises(TypeError):
        Namespace("model", layout=LAYOUT, attention="rope")


def test_text_that_cannot_be_written_is_refused_by_name():
    with pytest.raises(MisconfiguredError, match="model"):
        _ = namespace_of(model="folder-\udcff").digest


def test_whoever_holds_the_document_can_compute_the_digest():
    namespace = namespace_of(model="modèle", lora="adapter")
    document = namespace.document()
    assert hashlib.sha256(b"kvstore.namespace.v1\0" + document).digest() == namespace.digest
    assert namespace.name == namespace.digest.hex()[:16]
    assert json.loads(document) == namespace.describe()
    assert namespace.describe()["layout"]["dtype"] == "uint8"


def test_fields_cannot_be_shifted_into_each_other():
    one = namespace_of(model="a", weights_revision="b c")
    other = namespace_of(model="a b", weights_revision="c")
    quoted = namespace_of(model='a", "weights_revision": "b c', weights_revision="x")
    assert len({one.digest, other.digest, quoted.digest}) == 3
