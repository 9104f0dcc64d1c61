"""What takes minutes and is worth it: `make torture`. Figures are printed."""

import pytest
from real_servers import clean_environment, moto, rgw
from torture.limits import LimitError, check

__all__ = ["clean_environment", "moto", "rgw"]


def pytest_configure() -> None:
    try:
        check()
    except LimitError as error:
        raise pytest.UsageError(str(error)) from None
