"""What a bucket holds and what is known of its use, for commands that tell of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.backends.contract import Backend
from kvstore.cli.catalog import NoSuchObjectError
from kvstore.gc.chunks import Int32s
from kvstore.gc.forest import Forest
from kvstore.gc.inventory import Inventory, Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.usage import Usage, note_usage
from kvstore.keys import format_folder
from kvstore.listing import Description, describe
from kvstore.retries import Retries
from kvstore.settings import Settings

AT_ONCE = 32


@dataclass(frozen=True)
class Stock:
    """An inventory, and what goes with it.

    place         bucket and folder, for people
    now_s         by the store's clock
    tops          for each chunk the first one of its prefix that is there; see Forest.tops
    descriptions  what each namespace says it is
    """

    place: str
    now_s: float
    inventory: Inventory
    usage: Usage
    forest: Forest
    tops: Int32s
    descriptions: Mapping[str, Description]

    @property
    def touched(self) -> int:
        """How many chunks are known to have been used since they were stored."""
        return int((self.inventory.chunks.touches > 0).sum())


async def take_stock(backend: Backend, settings: Settings, only: str = "") -> Stock:
    """Look at everything, as `kvstore gc` does: listings, and headers that no run has read before.

    only  the one namespace to look at; empty for all

    Raises NoSuchObjectError where that is not there.
    """
    prefix = settings.prefix
    pace = Pace(settings.gc_requests_per_s, AT_ONCE, Retries())
    clock = StoreClock(await pace(backend.clock_s))
    inventory = await Stocktaking(backend, prefix, pace, clock).run(only)
    if only and only not in (*inventory.namespaces, *inventory.failed):
        raise NoSuchObjectError(
            f"there is no namespace {only} under {format_folder(prefix)}; see `kvstore ls`"
        )
    usage = await note_usage(backend, prefix, pace, inventory)
    forest = Forest.of(inventory.chunks)
    paced = PacedBackend(backend, pace)
    return Stock(
        place=f"{backend.location} under {format_folder(prefix)}",
        now_s=clock.now_s(),
        inventory=inventory,
        usage=usage,
        forest=forest,
        tops=forest.tops(),
        descriptions={name: await describe(paced, prefix, name) for name in inventory.namespaces},
    )
