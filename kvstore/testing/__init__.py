"""Tests for those who write backends of their own. Needs pytest, which kvstore does not install."""

import pytest

# Before the import: it makes pytest explain the suite's plain asserts when they fail.
pytest.register_assert_rewrite(
    "kvstore.testing.object_promises", "kvstore.testing.scene", "kvstore.testing.store_promises"
)

from kvstore.testing.backend_conformance import BackendConformance  # noqa: E402  see above

__all__ = ["BackendConformance"]
