"""What the errors of aiobotocore mean to a caller. Importing this imports botocore.

Messages name the bucket and the setting to change. They repeat nothing of what a server says
about credentials.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from kvstore.backends.http_message import BadAnswerError
from kvstore.backends.s3 import S3Options
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError, ThrottledError
from kvstore.masking import without_user

__all__ = [
    "FOREIGN",
    "ClientError",
    "failure",
    "is_absence",
    "raise_refused",
    "refusal",
    "setting_up",
    "status_of",
    "translated",
]

NOT_FOUND = 404
PRECONDITION_FAILED = 412
RANGE_NOT_SATISFIABLE = 416
NOT_IMPLEMENTED = 501
_RETRYABLE_STATUS = (408, 409, 425, 429)
_THROTTLED_STATUS = (429, 503)
_BAD_REQUEST = 400
_SERVER_ERROR = 500

# What libraries and sockets raise. ValueError: a header of an answer that botocore cannot parse.
FOREIGN = (
    boto.BotoCoreError,
    ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
    ValueError,
    BadAnswerError,
)
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.LoginError,
    boto.TokenRetrievalError,
    boto.NoAuthTokenError,
)
_SETTING_ERRORS = (
    boto.ParamValidationError,
    boto.ValidationError,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.EndpointProviderError,
    boto.BaseEndpointResolverError,
    boto.InvalidConfigError,
    boto.InvalidDNSNameError,
    boto.InvalidProxiesConfigError,
    boto.MissingDependencyException,
)
_TRANSPORT_ERRORS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    aiohttp.ClientError,
    OSError,
    BadAnswerError,
)

_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to credentials that are valid for it"
)
_PERMISSION_FIX = (
    "let the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role) do s3:GetObject, "
    "s3:PutObject, s3:DeleteObject and s3:ListBucket there (and kvstore gc s3:ListBucketMultipartUploads and "
    "s3:AbortMultipartUpload), or set KVSTORE_BUCKET to another bucket"
)
# For a refusal without a code: HEAD has no body that could say why.
_REFUSED_FIX = (
    f"the store does not say why: {_CREDENTIALS_FIX}; set this machine's clock; or {_PERMISSION_FIX}"
)
_REGION_FIX = (
    "set KVSTORE_REGION to the bucket's region, and KVSTORE_ENDPOINT_URL to its endpoint if it has one"
)
_SETTINGS_FIX = (
    "check KVSTORE_BUCKET, KVSTORE_ENDPOINT_URL, KVSTORE_REGION, KVSTORE_ADDRESSING_STYLE "
    "and the AWS_ variables"
)
_TLS_FIX = (
    "set KVSTORE_CA_BUNDLE to a file with the certificate authority of the store, "
    "or KVSTORE_ENDPOINT_URL to a URL whose host its certificate names"
)
_REGION = re.compile(r"[a-z0-9-]{1,40}\Z")
_FIXES = {
    "NoSuchBucket": "make the bucket, or set KVSTORE_BUCKET and KVSTORE_ENDPOINT_URL to one that exists",
    "InvalidBucketName": "set KVSTORE_BUCKET to a valid name",
    "AccessDenied": _PERMISSION_FIX,
    "InvalidAccessKeyId": _CREDENTIALS_FIX,
    "SignatureDoesNotMatch": f"{_CREDENTIALS_FIX}; no proxy may change requests",
    "InvalidToken": _CREDENTIALS_FIX,
    "ExpiredToken": _CREDENTIALS_FIX,
    "RequestTimeTooSkewed": "set this machine's clock",
    "RequestExpired": "set this machine's clock",
    "AuthorizationHeaderMalformed": _REGION_FIX,
    "IllegalLocationConstraintException": _REGION_FIX,
    "PermanentRedirect": _REGION_FIX,
    "TemporaryRedirect": _REGION_FIX,
    "EntityTooLarge": "set KVSTORE_CHUNK_TOKENS to fewer tokens",
}
_STATUS_FIXES = {
    301: _REGION_FIX,
    302: _REGION_FIX,
    303: _REGION_FIX,
    307: _REGION_FIX,
    308: _REGION_FIX,
    401: _REFUSED_FIX,
    403: _REFUSED_FIX,
    404: _FIXES["NoSuchBucket"],
    NOT_IMPLEMENTED: "use a store that honours PUT with If-None-Match, ranged reads and ListObjectsV2",
}
# Codes that ask for fewer requests, whatever the status.
_THROTTLED_CODES = ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "ServiceUnavailable")
# Codes of 4xx answers that S3 documents as passing.
_RETRYABLE_CODES = (
    "RequestTimeout",
    "InternalError",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
)


@contextlib.contextmanager
def translated(options: S3Options, action: str) -> Iterator[None]:
    """Raise what the body raises as the contract's errors. `action` says what was tried."""
    try:
        yield
    except ClientError as error:
        raise refusal(_what(options, action), code_of(error), status_of(error), _region_of(error)) from error
    except (*FOREIGN, RuntimeError) as error:
        # RuntimeError: what botocore raises for credentials that are expired when they come.
        raise failure(options, action, error) from error


@contextlib.contextmanager
def setting_up(options: S3Options) -> Iterator[None]:
    """As `translated`, for making a client: a value that botocore cannot parse is a setting here."""
    what = f"cannot set up a client for {options.location}"
    try:
        yield
    except ValueError as error:
        raise MisconfiguredError(f"{what}; {_SETTINGS_FIX}") from error
    except FOREIGN as error:
        raise _failure(what, error) from error


def _what(options: S3Options, action: str) -> str:
    return f"cannot {action} in {options.location}"


def failure(options: S3Options, action: str, error: Exception) -> KVStoreError:
    """What one of FOREIGN means to the contract, when it is no refusal. `action` says what was tried."""
    return _failure(_what(options, action), error)


def raise_refused(options: S3Options, refused: Sequence[Mapping[str, Any]]) -> None:
    """Raise if DeleteObjects refused names; a cause that a person must mend goes first."""
    errors = [
        refusal(f"cannot delete {entry.get('Key')!r} in {options.location}", str(entry.get("Code")), 0)
        for entry in refused
        if entry.get("Code") != "NoSuchKey"
    ]
    errors.sort(key=lambda error: isinstance(error, RetryableError))
    if errors:
        raise errors[0]


def is_absence(error: ClientError) -> bool:
    """Whether the store said that there is no such object, rather than no such bucket."""
    return status_of(error) == NOT_FOUND and code_of(error) != "NoSuchBucket"


def status_of(error: ClientError) -> int:
    """The HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """The store's own code, such as NoSuchBucket; the HTTP status in digits where it sent none."""
    return str(error.response.get("Error", {}).get("Code") or status_of(error))


def _region_of(error: ClientError) -> str:
    """Where the bucket is, if the store tells."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = str(error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or "")
    return region if _REGION.match(region) else ""


def refusal(what: str, code: str, status: int, region: str = "") -> KVStoreError:
    """The error for an answer that says no.

    what    what was tried, and where
    code    the store's own, such as NoSuchBucket; the HTTP status in digits where it sent none
    region  where the bucket is, if the store tells
    """
    shown = code[:60] if code.isascii() and code.isprintable() else "something unreadable"
    message = f"{what}: the store answered {shown}"
    if status and code != str(status):
        message += f" (HTTP {status})"
    fix = _fix_of(code, status)
    if fix is _REGION_FIX and region:
        message += f" from region {region}"
    if fix is not None:
        return MisconfiguredError(f"{message}; {fix}")
    return ThrottledError(message) if _is_throttling(code, status) else RetryableError(message)


def _is_throttling(code: str, status: int) -> bool:
    return code in _THROTTLED_CODES or status in _THROTTLED_STATUS


def _fix_of(code: str, status: int) -> str | None:
    """What a person must change; None where waiting may be enough."""
    if code in _RETRYABLE_CODES or status in _RETRYABLE_STATUS or _is_throttling(code, status):
        return None
    fix = _FIXES.get(code) or _STATUS_FIXES.get(status)
    if fix is None and _BAD_REQUEST <= status < _SERVER_ERROR:
        return _SETTINGS_FIX
    return fix


def _failure(what: str, error: Exception) -> KVStoreError:
    kind = type(error).__name__
    if isinstance(error, _CREDENTIAL_ERRORS):
        return MisconfiguredError(f"{what}: {kind}; {_CREDENTIALS_FIX}")
    # Only these are quoted: others may repeat what a credential helper printed.
    quoted = f"{what}: {kind}: {without_user(str(error))}"
    if isinstance(error, boto.SSLError | ssl.SSLCertVerificationError):
        return MisconfiguredError(f"{quoted}; {_TLS_FIX}")
    if isinstance(error, _SETTING_ERRORS):
        return MisconfiguredError(f"{quoted}; {_SETTINGS_FIX}")
    if isinstance(error, _TRANSPORT_ERRORS):
        return RetryableError(f"{quoted}; if it stays like that, check KVSTORE_ENDPOINT_URL and the network")
    return RetryableError(quoted if isinstance(error, RuntimeError) else f"{what}: {kind}")
