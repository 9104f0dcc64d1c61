"""Tables as objects: hostile ones cost no memory, and are refused."""

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvstore.gc.records import sealed
from kvstore.index.bucket import RefusedIndexError
from kvstore.index.columns import ROWS_MAX, read_rows, seal_rows

DTYPE = np.dtype([("name", "u1", 5), ("small", "<i4"), ("large", "<u8")])
GOOD = msgpack.unpackb(seal_rows("things", np.zeros(3, DTYPE))[16:])


@given(arrays.arrays(DTYPE, st.integers(0, 20)))
def test_what_is_sealed_is_read(rows):
    np.testing.assert_array_equal(read_rows("x", seal_rows("things", rows), "things", DTYPE), rows)


def columns(**changes):
    return {"columns": GOOD["columns"] | changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 2},
        {"rows": -1},
        {"rows": ROWS_MAX + 1},
        {"rows": "3"},
        {"kind": "others"},
        {"more": 1},
        columns(small=zstandard.compress(bytes(11))),
        columns(small=zstandard.compress(bytes(1 << 24))),
        columns(small=zstandard.compress(bytes(12)) + b"x"),
        columns(small=zstandard.compress(bytes(12))[:-1]),
        columns(small=b"no frame"),
        columns(small=7),
        columns(other=zstandard.compress(bytes(12))),
        {"columns": {"small": GOOD["columns"]["small"]}},
        {"columns": [1]},
    ],
)
def test_p11_what_is_not_just_this_table_is_refused(changes):
    data = sealed(msgpack.packb(GOOD | changes))
    with pytest.raises(RefusedIndexError, match="remove it"):
        read_rows("x", data, "things", DTYPE)


@pytest.mark.parametrize("body", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2})])
def test_p11_what_is_no_map_is_refused(body):
    with pytest.raises(RefusedIndexError, match="remove it"):
        read_rows("x", sealed(body), "things", DTYPE)
