"""Our signatures are those that botocore makes."""

import calendar
import datetime as dt
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import botocore.auth
import botocore.credentials
from botocore.awsrequest import AWSRequest
from botocore.utils import percent_encode
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.backends.arguments import is_name
from kvstore.backends.sigv4 import Credentials, Signer, encoded_path

MIDNIGHT_S = calendar.timegm((2027, 1, 1, 0, 0, 0))
SEEN = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
WORDS = st.text(SEEN, min_size=1, max_size=40)
VALUES = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
HEADERS = ["a-first", "content-length", "content-type", "if-match", "if-none-match", "range", "x-z"]
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(is_name)
CLOCKS_S = st.integers(0, 2**32) | st.floats(MIDNIGHT_S - 2, MIDNIGHT_S + 2)


class Case(NamedTuple):
    """One request, and who signs it when."""

    method: str = "GET"
    host: str = "s3.example"
    region: str = "us-east-1"
    folder: str = ""
    name: str = "name"
    headers: dict[str, str] = {}  # noqa: RUF012 nobody changes it
    credentials: Credentials = Credentials("AK", "secret")
    now_s: float = MIDNIGHT_S

    @property
    def path(self) -> str:
        return encoded_path(self.folder, self.name)


CASES = st.builds(
    Case,
    st.sampled_from(["GET", "HEAD", "PUT"]),
    st.sampled_from(["s3.example", "bucket.s3.example:8080", "127.0.0.1:9000", "[::1]:9000"]),
    st.sampled_from(["us-east-1", "eu-central-1", "garage"]),
    st.sampled_from(["", "/bucket", "/deep/bucket"]),
    NAMES,
    st.dictionaries(st.sampled_from(HEADERS), VALUES),
    st.builds(Credentials, WORDS, WORDS, st.just("") | WORDS),
    CLOCKS_S,
)


def botocore_fields(case: Case) -> dict[str, str]:
    """What botocore would send, names in lower case."""
    request = AWSRequest(case.method, f"https://{case.host}{case.path}", headers=case.headers)
    request.context["client_config"] = SimpleNamespace(s3={"payload_signing_enabled": False})
    known = case.credentials
    boto = botocore.credentials.Credentials(known.access_key, known.secret_key, known.token or None)
    now = dt.datetime.fromtimestamp(int(case.now_s), dt.UTC)
    with mock.patch.object(botocore.auth, "get_current_datetime", return_value=now):
        botocore.auth.S3SigV4Auth(boto, "s3", case.region).add_auth(request)
    return {"host": case.host} | {name.lower(): value for name, value in request.headers.items()}


def our_fields(lines: str) -> dict[str, str]:
    fields = [line.split(":", 1) for line in lines.splitlines()]
    assert len(dict(fields)) == len(fields)
    return dict(fields)


@given(CASES)
@example(Case(name="a b+c%2F&'\"<é>~(1)*!;:@=,$", headers={"range": "bytes=0-1"}, now_s=MIDNIGHT_S - 0.5))
@example(Case(method="PUT", credentials=Credentials("AK", "se/+=", "to/ken+==")))
def test_a_request_is_signed_as_botocore_signs_it(case):
    signer = Signer(case.host, case.region, clock=lambda: case.now_s)
    lines = signer.lines(case.method, case.path, case.credentials, list(case.headers.items()))
    assert our_fields(lines) == botocore_fields(case)


@given(st.lists(st.tuples(CLOCKS_S, st.integers(0, 2)), min_size=2, max_size=8))
@example([(MIDNIGHT_S - 0.1, 0), (MIDNIGHT_S + 0.1, 0), (MIDNIGHT_S - 1, 0), (MIDNIGHT_S - 1, 1)])
def test_what_a_signer_keeps_never_outlives_its_second_or_its_credentials(requests):
    known = [Credentials("A", "one"), Credentials("A", "two"), Credentials("A", "two", "token")]
    clock = iter([now_s for now_s, _ in requests])
    signer = Signer("s3.example", "us-east-1", clock=lambda: next(clock))
    for now_s, index in requests:
        lines = signer.lines("GET", "/name", known[index])
        assert our_fields(lines) == botocore_fields(Case(credentials=known[index], now_s=now_s))


@given(NAMES)
def test_a_path_is_encoded_as_botocore_encodes_it(name):
    assert encoded_path("", name) == f"/{percent_encode(name, safe='/-_.~')}"
