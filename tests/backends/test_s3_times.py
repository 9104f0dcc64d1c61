"""Times in answers are read as botocore reads them, and much sooner."""

import pytest
from botocore.utils import parse_timestamp

from kvstore.backends.s3_client import _time_of


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-24T12:00:00.123Z",
        "2026-11-24T12:00:00Z",
        "2026-11-24T13:00:00+01:00",
        "2026-11-24T12:00:00",
        "Tue, 24 Nov 2026 12:00:00 GMT",
        1_795_521_600,
        "1795521600",
        "20261124",
    ],
)
def test_a_time_is_what_botocore_says(value):
    assert _time_of(value).timestamp() == parse_timestamp(value).timestamp()


def test_what_is_no_time_is_refused_as_botocore_does():
    with pytest.raises(ValueError, match="Invalid timestamp"):
        _time_of("tomorrow")
