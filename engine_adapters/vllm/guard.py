"""Keeps trouble of the cache away from the engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.vllm")
_warn = WarnRarely(_log)
Method = TypeVar("Method", bound=Callable[..., Any])


def guarded(fallback: Callable[..., Any]) -> Callable[[Method], Method]:
    """Make a method return `fallback(self, *args)` instead of raising; says so at most once a minute.

    fallback  what leaves the engine right: a miss, or a load reported as failed. Where it raises
              too, None is returned
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                return _recover(method.__name__, error, lambda: fallback(self, *args, **kwargs))

        return call  # type: ignore[return-value]  # the same signature

    return decorate


def _recover(name: str, error: Exception, fallback: Callable[[], Any]) -> Any:
    _warn(name, f"{name} failed by a defect, the engine computes what it may have missed: {error!r}")
    _log.debug("%s failed", name, exc_info=error)
    try:
        return fallback()
    except Exception as worse:
        _warn(f"after {name}", f"what {name} left behind could not be put in order: {worse!r}")
        return None
