"""`kvstore warm`: copies prefixes from the store to this node's disk tier."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.catalog import NoSuchObjectError, Target, chunk_objects, parse_target
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Column, Listing, size_text
from kvstore.cli.prompts import token_lists, tokenized
from kvstore.disk.tier import DiskTier
from kvstore.disk.warmer import Warmed, Warmer, Warming, WarmingEvents
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.gc.headers import DAMAGED, Headers
from kvstore.gc.pace import Pace
from kvstore.keys import ChunkKey, PrefixChain, namespace_folder
from kvstore.layout import ChunkForm, Shard
from kvstore.listing import describe
from kvstore.namespace import Namespace
from kvstore.retries import Retries
from kvstore.settings import Settings, resolve_settings

_HASH_DIGITS = 64
_WARMED = (
    Column("source", "prefix", width=24),
    Column("shard", "shard", width=7),
    Column("chunks", "chunks", right=True, width=7),
    Column("written", "written", right=True, width=7),
    Column("present", "there", right=True, width=7),
    Column("absent", "not in store", right=True, width=12),
    Column("damaged", "damaged", right=True, width=7),
    Column("no_room", "no room", right=True, width=7),
    Column("failed", "failed", right=True, width=7),
    Column("behind", "behind those", right=True, width=12),
    Column("written_bytes", "bytes", size_text, right=True, width=10),
)


@dataclass(frozen=True)
class Request:
    """What is to be warmed.

    target     NAMESPACE/HASH, or NAMESPACE with one of the files
    tokens     a file of token ids
    prompts    a file of texts, for which `tokenizer` is one
    shard      the kv heads to fetch; empty for all that there are of the first chunk
    """

    target: str
    tokens: Path | None
    prompts: Path | None
    tokenizer: Path | None
    shard: str


def warm_prefixes(call: Call, request: Request) -> ExitCode:
    """Copy them, and print what became of each."""
    settings = resolve_settings(call.flags).settings
    target = _parse_target(settings, request)
    if not settings.disk_dir:
        raise MisconfiguredError(
            "KVSTORE_DISK_DIR is not set: there is no disk tier to warm; set it as the engine has it"
        )
    _check_owner(Path(settings.disk_dir))
    shards = [_parse_shard(request.shard)] if request.shard else []

    async def warm(backend: Backend) -> ExitCode:
        described = await describe(backend, settings.prefix, target.namespace)
        if described.namespace is None:
            folder = namespace_folder(settings.prefix, target.namespace)
            raise NoSuchObjectError(f"{folder} in {backend.location}: {described.fault}")
        listing = call.output.listing("warmed", _WARMED)
        site = _Site(backend, settings, described.namespace, shards, listing)
        with call.output.progress(f"copying to {settings.disk_dir}"):
            if target.hash:
                whole = await site.warm_chunk(bytes.fromhex(target.hash))
            else:
                whole = await site.warm_prompts(_prompts(request))
        call.output.line(
            f"{settings.disk_dir}: engines that share it know what was added within a minute", "dim"
        )
        return ExitCode.OK if whole else ExitCode.FINDINGS

    return run_on_backend(settings, warm)


@dataclass(frozen=True)
class _Site:
    """Where from and to, and what to print to."""

    backend: Backend
    settings: Settings
    namespace: Namespace
    shards: Sequence[Shard]
    listing: Listing

    async def warm_chunk(self, hash_: bytes) -> bool:
        """Warm a chunk and all before it; whether all of it is there now."""
        shards = self.shards or await self._shards_of(hash_)
        if not shards:
            raise NoSuchObjectError(f"no chunk {hash_.hex()} in {self.backend.location}; see `kvstore ls`")
        whole = True
        for shard in shards:
            keys = await self._prefix_of(hash_, shard)
            async with self._warmer(shard, len(shards)) as warmer:
                whole &= self._print(hash_.hex()[:24], shard, keys, await warmer.warm(keys))
        return whole

    async def warm_prompts(self, prompts: Iterator[tuple[int, Sequence[int]]]) -> bool:
        """Warm the prefixes of prompts; whether all of them are there now."""
        salt = self.settings.tenant_salt.get_secret_value()
        chains = [
            (line, PrefixChain.of(self.namespace, tokens, tenant_salt=salt).keys) for line, tokens in prompts
        ]
        firsts = {keys[0].hash for _, keys in chains if keys}
        shards = self.shards or sorted(
            {shard for first in firsts for shard in await self._shards_of(first)},
            key=lambda shard: (shard.start, shard.stop),
        )
        whole = True
        # Where nothing of any prompt is stored there is still something to say of each.
        shards = shards or [self.namespace.layout.whole]
        for shard in shards:
            async with self._warmer(shard, len(shards)) as warmer:
                for line, keys in chains:
                    whole &= self._print(f"line {line}", shard, keys, await warmer.warm(keys))
        return whole

    async def _shards_of(self, hash_: bytes) -> list[Shard]:
        target = Target(self.namespace.name, hash_.hex())
        found = chunk_objects(self.backend, self.settings.prefix, target)
        return [name.shard async for _, name in found if name is not None]

    async def _prefix_of(self, hash_: bytes, shard: Shard) -> list[ChunkKey]:
        """A chunk and all before it, first chunk first, by what headers say.

        Raises NoSuchObjectError where one is missing, MissError where one's header is damaged.
        """
        pace = Pace(self.settings.gc_requests_per_s, 1, Retries())
        headers = Headers(self.backend, pace)
        folder = namespace_folder(self.settings.prefix, self.namespace.name)
        keys: list[ChunkKey] = []
        while not keys or keys[-1].depth:
            digits = hash_.hex()
            name = f"{folder}{digits[:2]}/{digits}.{shard}"
            place = await headers.read(name)
            if place is None:
                raise NoSuchObjectError(f"{name} is missing in {self.backend.location}; it begins the prefix")
            if place.depth == DAMAGED or (keys and place.depth != keys[-1].depth - 1):
                raise MissError(MissReason.BAD_HEADER, f"{name} is damaged; see `kvstore show`")
            keys.append(ChunkKey(self.namespace.digest, hash_, place.parent, place.depth))
            hash_ = place.parent
        return keys[::-1]

    @asynccontextmanager
    async def _warmer(self, shard: Shard, shards: int) -> AsyncIterator[Warmer]:
        """Warms one of so many shards, which share the tier's room."""
        settings, events = self.settings, WarmingEvents()
        form = ChunkForm(self.namespace.layout, shard)
        tier = DiskTier(Path(settings.disk_dir), settings.disk_bytes, shard, events=events)
        warmer = Warmer(
            self.backend, settings.prefix, form, tier, events, room_bytes=settings.disk_bytes // shards
        )
        try:
            await warmer.open()
            yield warmer
        finally:
            await tier.close()

    def _print(self, source: str, shard: Shard, keys: Sequence[ChunkKey], warmed: Warmed) -> bool:
        counts = {each.value: warmed.chunks[each] for each in Warming}
        self.listing.add(
            {
                "source": source,
                "namespace": self.namespace.name,
                "hash": keys[-1].hash.hex() if keys else "",
                "shard": str(shard),
                "chunks": len(keys),
                **counts,
                "written_bytes": warmed.written_bytes,
            }
        )
        return warmed.whole


def _parse_target(settings: Settings, request: Request) -> Target:
    target = parse_target(settings.prefix, request.target)
    files = [each for each in (request.tokens, request.prompts) if each is not None]
    if target is None or not target.is_namespace or len(target.hash) not in (0, _HASH_DIGITS):
        raise typer.BadParameter(f"{request.target!r} is neither NAMESPACE/HASH nor NAMESPACE, in hex digits")
    if len(files) != (0 if target.hash else 1):
        raise typer.BadParameter("give NAMESPACE/HASH, or NAMESPACE with one of --tokens and --prompts")
    if (request.prompts is None) != (request.tokenizer is None):
        raise typer.BadParameter("--prompts and --tokenizer belong together")
    return target


def _check_owner(folder: Path) -> None:
    """Refuse root in another user's folder: in what it makes there that user's engines cannot write."""
    owner = os.geteuid()
    # Where it cannot be looked at, opening it says why.
    with contextlib.suppress(OSError):
        owner = folder.stat().st_uid
    if owner and not os.geteuid():
        raise MisconfiguredError(
            f"KVSTORE_DISK_DIR={str(folder)!r} is of the user with id {owner}, and this is root: engines "
            "could write nothing in the folders it would make; run it as that user"
        )


def _parse_shard(text: str) -> Shard:
    start, dash, stop = text.partition("-")
    if not (dash and start.isdecimal() and stop.isdecimal()):
        raise typer.BadParameter(f"{text!r} is no range of kv heads, such as 0-8", param_hint="--shard")
    return Shard(int(start), int(stop))


def _prompts(request: Request) -> Iterator[tuple[int, Sequence[int]]]:
    if request.tokens is not None:
        return token_lists(request.tokens)
    assert request.prompts is not None
    assert request.tokenizer is not None
    return tokenized(request.prompts, request.tokenizer)
