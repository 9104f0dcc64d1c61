"""What the standard AWS chain finds, without ever holding a secret longer than the look takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.errors import MisconfiguredError
from kvstore.masking import without_user

# Those of the standard variables that change where requests go and who signs them, and hold no secret.
AWS_VARIABLES = (
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)
HOW_TO_PROVIDE = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
)


@dataclass(frozen=True, slots=True)
class FoundCredentials:
    """Which provider of the chain has credentials, such as env or iam-role; empty when none has."""

    method: str


def find_credentials(*, refresh: bool) -> FoundCredentials:
    """Ask the chain that the S3 backend uses. Blocks; on a machine in a cloud it may ask the network.

    refresh  also obtain what a role or a process hands out, so that a chain that only looks good fails

    Raises MisconfiguredError for a chain that is broken, such as a profile that does not exist.
    """
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        credentials = botocore.session.get_session().get_credentials()
        if credentials is None:
            return FoundCredentials("")
        if refresh:
            credentials.get_frozen_credentials()
        return FoundCredentials(credentials.method)
    except BotoCoreError as error:
        raise MisconfiguredError(f"the AWS credential chain fails: {error}; {HOW_TO_PROVIDE}") from None


def variables_in_use(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of `AWS_VARIABLES` that are set."""
    return {name: without_user(environment[name]) for name in AWS_VARIABLES if environment.get(name)}
