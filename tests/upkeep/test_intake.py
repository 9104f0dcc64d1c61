import asyncio

import pytest
import virtual_time
from chunk_samples import raw_object, tiny_keys, tiny_namespace

from kvstore.backends.memory import MemoryBackend
from kvstore.keys import namespace_document_name, parse_object_name
from kvstore.upkeep.intake import Intake, RefusedError

PREFIX = "kvstore"
NAMESPACE = tiny_namespace()
CHUNKS = dict(raw_object(PREFIX, NAMESPACE, key) for key in tiny_keys(NAMESPACE, 2))
DOCUMENT = namespace_document_name(PREFIX, NAMESPACE.name)


async def take(intake: Intake, name: str) -> bool:
    return await intake.take(parse_object_name(PREFIX, name), [CHUNKS[name]])


@pytest.mark.parametrize("kept", [True, False])
def test_p6_what_was_there_when_an_import_was_halted_is_looked_for_again(kept):
    """A person stops the process, or its archive's disk hangs; a collection comes and goes meanwhile."""
    first, second = CHUNKS

    async def work() -> None:
        backend = MemoryBackend()
        intake = Intake(backend, PREFIX, NAMESPACE)
        assert await take(intake, first)
        if not kept:
            await backend.delete([first])
        await asyncio.sleep(600)
        if kept:
            assert await take(intake, second)
        else:
            with pytest.raises(RefusedError, match=r"the chunk before it, .* is not there"):
                await take(intake, second)
            assert await backend.head(second) is None

    virtual_time.run(work())


def test_an_import_leaves_the_document_that_a_collection_removed_meanwhile():
    async def work() -> None:
        backend = MemoryBackend()
        intake = Intake(backend, PREFIX, NAMESPACE)
        await intake.describe()
        for name in CHUNKS:
            await take(intake, name)
            # The namespace was empty when the collection looked.
            await backend.delete([DOCUMENT])
        await intake.close()
        assert await backend.head(DOCUMENT) is not None

    asyncio.run(work())
