"""Which engines share chunks, and why others do not: what `kvstore doctor` says of namespaces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from kvstore.backends.contract import Backend
from kvstore.cli.catalog import Target, chunk_objects
from kvstore.cli.differences import differences, lines_of_group, lines_of_pair, model_key, shard_words
from kvstore.cli.examination import Check, Outcome, Site, failed, passed, warned
from kvstore.cli.output import printable
from kvstore.keys import format_folder
from kvstore.layout import Shard
from kvstore.listing import Description, describe, namespaces
from kvstore.namespace import Namespace

NAMESPACES_MAX = 1024
LOOK_S = 6.0
# Of one namespace, to see which kv heads its chunks hold.
OBJECTS_MAX = 200
_AT_ONCE = 16
# Groups of namespaces, and namespaces compared with one, that are told of in full.
_TOLD_MAX = 16
_NEVER = "engines of one never load chunks of another"


@dataclass(frozen=True)
class Seen:
    """One namespace as it was seen.

    objects  that were looked at, OBJECTS_MAX at most
    shards   of the chunks among them
    """

    description: Description
    objects: int
    shards: frozenset[Shard]


@dataclass
class Survey:
    """The namespaces of a bucket by name; not all of them unless `complete`."""

    seen: dict[str, Seen] = field(default_factory=dict)
    complete: bool = True

    @property
    def known(self) -> dict[str, Namespace]:
        """Those that say what they are."""
        found = ((name, seen.description.namespace) for name, seen in self.seen.items())
        return {name: namespace for name, namespace in found if namespace is not None}

    def models(self) -> dict[str, dict[str, Namespace]]:
        """Those that say what they are, by model."""
        models: dict[str, dict[str, Namespace]] = {}
        for name, namespace in self.known.items():
            models.setdefault(model_key(namespace), {})[name] = namespace
        return models


async def survey(backend: Backend, prefix: str, first: str) -> Survey:
    """Look at namespaces for LOOK_S, at NAMESPACES_MAX of them at most, and at `first` before others.

    Raises what the backend raises, and TimeoutError where it gave no answer at all.
    """
    found = Survey()
    try:
        async with asyncio.timeout(LOOK_S):
            await _look(backend, prefix, [first] if first else [], found)
            batch: list[str] = []
            last = ""
            async for each in namespaces(backend, prefix):
                if not isinstance(each, str):
                    continue
                # A store whose listings begin anew would be listed for ever.
                if each <= last or len(found.seen) + len(batch) >= NAMESPACES_MAX:
                    found.complete = False
                    break
                last = each
                if each != first:
                    batch.append(each)
                if len(batch) == _AT_ONCE:
                    await _look(backend, prefix, batch, found)
                    batch = []
            await _look(backend, prefix, batch, found)
    except TimeoutError:
        if not found.seen:
            raise
        found.complete = False
    return found


async def _look(backend: Backend, prefix: str, names: Iterable[str], found: Survey) -> None:
    async def look(name: str) -> None:
        description = await describe(backend, prefix, name)
        shards, objects = set(), 0
        async for _, parts in chunk_objects(backend, prefix, Target(name, "")):
            objects += 1
            if parts is not None:
                shards.add(parts.shard)
            if objects == OBJECTS_MAX:
                break
        found.seen[name] = Seen(description, objects, frozenset(shards))

    await asyncio.gather(*map(look, names))


def namespaces_check(name: str) -> Check:
    """The check that compares namespaces: those of each model, or with `name` that one with the others."""
    run = partial(check_namespace, name=name) if name else check_namespaces
    return Check("namespaces", "what engines share", run, ("bucket",))


async def check_namespaces(site: Site) -> Outcome:
    """In which facts namespaces of one model differ: information, no judgement."""
    found = await survey(site.backend, site.settings.prefix, "")
    models = found.models()
    of_models = "1 model" if len(models) == 1 else f"{len(models)} models"
    lines = [f"{_count(found)}, of {of_models}" if found.seen else "no engine has stored anything yet"]
    apart = {}
    for group in [each for each in models.values() if len(each) > 1][:_TOLD_MAX]:
        differing = differences(group)
        model = next(iter(group.values())).model
        lines.append(f"{printable(model)}: {len(group)} namespaces; {_NEVER}, as they differ in")
        lines += [f"  {line}" for line in lines_of_group(differing)]
        apart[model] = differing
    lines += _degree_lines(found)
    faulty = {name: seen.description.fault for name, seen in found.seen.items() if seen.description.fault}
    lines += [f"{name} cannot be told apart: {fault}" for name, fault in list(faulty.items())[:_TOLD_MAX]]
    counts = {"namespaces": len(found.seen), "complete": found.complete}
    return passed("\n".join(lines), **counts, differences=apart, faults=faulty)


async def check_namespace(site: Site, name: str) -> Outcome:
    """In which facts others of its model differ from one namespace."""
    found = await survey(site.backend, site.settings.prefix, name)
    seen = found.seen[name]
    place = f"{site.backend.location} under {format_folder(site.settings.prefix)}"
    own = seen.description.namespace
    if own is None and not seen.objects:
        return failed(
            f"there is no namespace {name} in {place}{_models(found)}",
            "compare KVSTORE_BUCKET, KVSTORE_PREFIX and KVSTORE_ENDPOINT_URL of the engine with those here; "
            "an engine that runs writes down its namespace when it starts, if it may write",
        )
    if own is None:
        return warned(
            f"{name} cannot be compared: {printable(seen.description.fault)}",
            "let an engine save under it: that writes its namespace.json where there is none",
        )
    others = {each: known for each, known in found.models()[model_key(own)].items() if each != name}
    lines = [f"{name}: {printable(own.summary)}", _chunk_words(seen)]
    if not others:
        lines.append(f"no other namespace of this model in {place}{_models(found)}")
    for other, namespace in list(others.items())[:_TOLD_MAX]:
        lines.append(f"{other} is another, and {_NEVER}: it has")
        lines += [f"  {line}" for line in lines_of_pair(name, own, other, namespace)]
        lines.append(f"  {_chunk_words(found.seen[other])}")
    if len(others) > _TOLD_MAX:
        lines.append(f"and {len(others) - _TOLD_MAX} others of this model")
    lines += _degree_lines(found, [name])
    if not found.complete:
        lines.append(f"not all namespaces were looked at: {_count(found)}")
    apart = {each: differences({name: own, each: known}) for each, known in others.items()}
    return passed("\n".join(lines), namespace=name, complete=found.complete, differences=apart)


def _count(found: Survey) -> str:
    number = len(found.seen)
    text = f"{number} namespace" if number == 1 else f"{number} namespaces"
    return text if found.complete else f"{text} looked at (there are more)"


def _models(found: Survey) -> str:
    models = sorted({printable(namespace.model) for namespace in found.known.values()})
    more = f" and {len(models) - _TOLD_MAX} more" if len(models) > _TOLD_MAX else ""
    return f"; what there is, is of {', '.join(models[:_TOLD_MAX])}{more}" if models else "; there is none"


def _chunk_words(seen: Seen) -> str:
    if not seen.shards:
        return "no chunks yet"
    return f"chunks of kv heads {shard_words(seen.shards)}"


def _degree_lines(found: Survey, names: Iterable[str] | None = None) -> list[str]:
    """Of namespaces that engines of several tensor-parallel degrees share without sharing chunks."""
    shards: Mapping[str, frozenset[Shard]] = {name: seen.shards for name, seen in found.seen.items()}
    several = [
        name
        for name in (shards if names is None else names)
        if len({shard.heads for shard in shards[name]}) > 1
    ]
    return [
        f"{name} has chunks of several tensor-parallel degrees, by kv heads {shard_words(shards[name])}: "
        "an engine loads those of its own degree alone"
        for name in several[:_TOLD_MAX]
    ]
