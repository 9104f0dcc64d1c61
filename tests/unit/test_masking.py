"""No password is in what people read, however it is written in a URL."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvstore.masking import without_user

# What a new URL begins with; it ends the one before.
NEXT_URL = re.compile(r"[\s\"'`(<\[{=,;|][A-Za-z][A-Za-z0-9+.\-]*://")
ANY = st.text(max_size=12) | st.text("aZ0 \t\n/?#@:%[]'\"=&.\\", max_size=12)
START = st.sampled_from(
    [
        "http://",
        "could not reach https://",
        "HTTPS_PROXY=http://",
        "('s3://",
        "http://other.host/path, then socks5h://",
    ]
)
BEHIND = st.sampled_from(
    ["", ":3128", "/bucket?list=1#part", "/ is not there", " (http://other.host/a)", "'\n"]
)


@given(START, ANY, ANY, ANY, BEHIND)
@example("http://", "user", "/", "", "")
@example("http://", "user", " ", "\n", "")
@example("http://", "user", "@", "?#", "")
@example("http://", "user", "a://b", "", "")
def test_a_password_never_appears(start, user, middle, end, behind):
    assume(not user.startswith("/"))
    password = f"SECRET{middle}SECRET{end}"
    assume(not NEXT_URL.search(f"{user}:{password}"))
    masked = without_user(f"{start}{user}:{password}@host.test{behind}")
    assert "SECRET" not in masked
    assert masked.startswith(f"{start}****@")
    assert masked.endswith(f"@host.test{behind}")


@example("0", "://")
@given(st.text("abZ09.-_", min_size=1), st.text("aZ0/?#@:%='\".\\", max_size=12))
def test_a_password_never_appears_where_the_scheme_was_left_out(user, middle):
    masked = without_user(f"HTTP_PROXY={user}:SECRET{middle}SECRET@host.test:3128")
    assert masked == "HTTP_PROXY=****@host.test:3128"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:pa/ss@host", "http://****@host"),
        ("http://user@host/path", "http://****@host/path"),
        ("http://a:b@one and http://c:d@two", "http://****@one and http://****@two"),
        ("['http://a:b@one', 'https://c:d@two']", "['http://****@one', 'https://****@two']"),
        ("http://one:80/path through http://c:d@two", "http://one:80/path through http://****@two"),
        # It could be the password of a user x.
        ("x:http://user:password@host", "****@host"),
        # It could be a password with a slash.
        ("s3://bucket/some@thing", "s3://****@thing"),
    ],
)
def test_what_stands_before_a_host_is_masked_in_every_url(text, masked):
    assert without_user(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://host:9000/bucket?prefix=a:b",
        "file:///home/some@one/cache",
        "/home/some:one@work/cache",
        "write to someone@host.test",
        "at 12:30:01, 5 @ 7",
        "@pytest: it's http://host",
    ],
)
def test_what_has_no_user_is_left_as_it_is(text):
    assert without_user(text) == text
