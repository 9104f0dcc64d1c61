"""The one layer that retries. Backends and the clients below them never do."""

from __future__ import annotations

import tenacity

from kvstore.errors import RetryableError

# Bounds the attempts; the caller's deadline bounds the whole by cancelling it.
retrying = tenacity.retry(
    retry=tenacity.retry_if_exception_type(RetryableError),
    stop=tenacity.stop_after_attempt(3),
    wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
    reraise=True,
)
"""Decorates a coroutine that may be repeated: three attempts, full jitter between them."""
