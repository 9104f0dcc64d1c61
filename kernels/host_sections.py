"""`HostSections`: sections in host memory, with the addresses that kernels take."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvstore.kernels.page_checks import writable
from kvstore.kernels.page_lock import is_page_locked


class HostSections(NamedTuple):
    """Sections, or copies of those that are read-only. They are valid as long as `memories` are."""

    memories: list[memoryview]
    addresses: list[int]

    @classmethod
    def of(cls, sections: Sequence[memoryview]) -> HostSections:
        """`sections`, none of them empty."""
        memories = [writable(section) for section in sections]
        return cls(memories, [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in memories])

    def some(self, which: slice) -> HostSections:
        """A slice of them."""
        return HostSections(self.memories[which], self.addresses[which])

    def reached_from(self, device: torch.device) -> bool:
        """Whether a kernel on `device` can read and write them all."""
        if device.type == "cpu":
            return True
        ends = [address + len(memory) for address, memory in zip(self.addresses, self.memories, strict=True)]
        return is_page_locked(min(self.addresses), max(ends)) or all(
            map(is_page_locked, self.addresses, ends)
        )
