# ruff: noqa: D102 S311  tests are described by their names; their random order protects nothing
"""What a backend promises of many objects: lists, deletes, names, instances."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from kvstore.backends.contract import PutStatus, UnfinishedUpload, UploadsInParts
from kvstore.errors import MisconfiguredError
from kvstore.testing.scene import Scene, promise

LIST_PAGE = 1000
NAME_BYTES_MAX = 1024
CLOCK_TOLERANCE_S = 30.0


class StorePromises:
    """Tests; see BackendConformance."""

    objects_may_be_folders: bool

    @promise
    async def test_what_one_instance_put_another_sees_at_once(self, scene: Scene) -> None:
        other = scene.another_backend()
        name = scene.name("object")
        assert await other.head(name) is None
        await scene.put("object", b"shared")
        info = await other.head(name)
        assert info is not None
        assert [found.name async for found in other.list(scene.prefix)] == [name]
        await other.delete([name])
        assert await scene.read("object") is None

    @promise
    async def test_a_list_is_in_the_order_of_utf8_bytes(self, scene: Scene) -> None:
        labels = [
            "a b",
            "a!",
            "a-b",
            "a/b",
            "a/b-c/d",
            "a/b.c",
            "a/c",
            "a0",
            "a\u00e9",
            "b",
            "\u00e9",
            "\uff5e",
            "\U0001f600",
        ]
        if self.objects_may_be_folders:
            labels += ["a", "a/b/c"]
        random.Random(0).shuffle(labels)
        await scene.put_many(labels)
        assert await scene.labels() == sorted(labels, key=str.encode)

    @promise
    async def test_a_list_has_every_name_with_its_prefix(self, scene: Scene) -> None:
        labels = ["a-b", "a/b", "a/c/d", "a/c/e", "ab", "b"]
        await scene.put_many(labels)
        for prefix in ("", "a", "a/", "a/c", "a/c/", "a/c/e", "a/c/e/", "b", "c", "a//", "../", "\u00e9"):
            assert await scene.labels(prefix) == [label for label in labels if label.startswith(prefix)]

    @promise
    async def test_a_list_goes_on_after_a_name(self, scene: Scene) -> None:
        labels = ["a-b", "a/b", "a/c/d", "a/c/e", "ab", "b"]
        await scene.put_many(labels)
        for after in ("", *labels, "a", "a/", "a/c", "a/c/", "a/c/dd", "a/z", "aa", "z"):
            for prefix in ("", "a", "a/c"):
                expected = [label for label in labels if label.startswith(prefix) and label > after]
                assert await scene.labels(prefix, start_after=after) == expected

    @promise
    async def test_lists_and_deletes_have_no_limit(self, scene: Scene) -> None:
        labels = [f"{number % 7}/{number:04}" for number in range(LIST_PAGE + 5)]
        await scene.put_many(labels)
        assert await scene.labels() == sorted(labels)
        await scene.backend.delete([scene.name(label) for label in [*labels[1:], "never-there"]])
        assert await scene.labels() == labels[:1]

    @promise
    async def test_a_list_can_be_left_early(self, scene: Scene) -> None:
        await scene.put_many(["a", "b", "c"])
        async for info in scene.backend.list(scene.prefix):
            assert info.name == scene.name("a")
            break
        assert await scene.labels() == ["a", "b", "c"]

    @promise
    async def test_deleting_twice_is_no_error(self, scene: Scene) -> None:
        await scene.put_many(["a/b/c", "d"])
        for _ in range(2):
            await scene.backend.delete([scene.name("a/b/c"), scene.name("a/b/c")])
            assert await scene.labels() == ["d"]
        await scene.backend.delete([])
        assert (await scene.put("a/b/c", b"again")).status is PutStatus.CREATED

    @promise
    async def test_head_list_and_read_agree(self, scene: Scene) -> None:
        result = await scene.put("object", b"12345")
        info = await scene.backend.head(scene.name("object"))
        (listed,) = await scene.infos()
        assert info is not None
        # HTTP tells a time of modification in whole seconds, where a list may tell it exactly.
        assert abs(listed.modified_s - info.modified_s) < 1
        assert replace(listed, modified_s=info.modified_s) == info
        assert (info.name, info.object_bytes, info.etag) == (scene.name("object"), 5, result.etag)
        reading = await scene.read("object")
        assert reading is not None
        assert (reading.object_bytes, reading.etag) == (5, result.etag)

    @promise
    async def test_the_clock_is_that_of_modification_times(self, scene: Scene) -> None:
        before_s = await scene.backend.clock_s()
        await scene.put("object", b"x")
        info = await scene.backend.head(scene.name("object"))
        assert info is not None
        assert abs(info.modified_s - before_s) < CLOCK_TOLERANCE_S

    @promise
    async def test_names_may_have_1024_bytes(self, scene: Scene) -> None:
        room = NAME_BYTES_MAX - len(scene.prefix)
        label = "/".join(["x" * 99] * 11)[:room]
        await scene.put(label, b"deep")
        assert await scene.data(label) == b"deep"
        assert await scene.labels() == [label]

    @promise
    async def test_impossible_names_are_refused(self, scene: Scene) -> None:
        for label in ("", "/", "a//b", "./a", "a/..", "a/", "a\0b", "a\nb", "x" * NAME_BYTES_MAX, "\ud800"):
            with pytest.raises(MisconfiguredError):
                await scene.put(label, b"x")
            with pytest.raises(MisconfiguredError):
                await scene.read(label)
            with pytest.raises(MisconfiguredError):
                await scene.backend.head(scene.name(label))
            with pytest.raises(MisconfiguredError):
                await scene.backend.delete([scene.name(label)])

    @promise
    async def test_an_object_that_is_also_a_folder_works_or_is_refused(self, scene: Scene) -> None:
        await scene.put_many(["a", "b/c/d"])
        for label in ("a/b", "b", "b/c"):
            for if_absent in (True, False):
                if self.objects_may_be_folders:
                    await scene.put(label, b"both", if_absent=if_absent)
                    assert await scene.data(label) == b"both"
                else:
                    with pytest.raises(MisconfiguredError):
                        await scene.put(label, b"both", if_absent=if_absent)
                    assert await scene.read(label) is None
                    assert await scene.backend.head(scene.name(label)) is None
        await scene.backend.delete([scene.name("b"), scene.name("a/b"), scene.name("b/c")])
        assert await scene.labels() == ["a", "b/c/d"]

    @promise
    async def test_calls_may_overlap(self, scene: Scene) -> None:
        labels = [f"{number}/object" for number in range(20)]

        async def write_and_read(label: str) -> None:
            await scene.put(label, label.encode() * 1000)
            assert await scene.data(label) == label.encode() * 1000
            assert await scene.labels(label) == [label]
            await scene.backend.delete([scene.name(label)])
            assert await scene.read(label) is None

        await asyncio.gather(*(write_and_read(label) for label in labels))

    @promise
    async def test_closing_twice_is_no_error(self, scene: Scene) -> None:
        used, unused = scene.another_backend(), scene.another_backend()
        await used.clock_s()
        for backend in (used, unused):
            await backend.close()
            await backend.close()

    @promise
    async def test_what_was_put_is_no_unfinished_upload(self, scene: Scene) -> None:
        if isinstance(scene.backend, UploadsInParts):
            await scene.put("object", bytes(100_000))
            assert [upload async for upload in scene.backend.unfinished_uploads(scene.prefix)] == []
            await scene.backend.abort_upload(UnfinishedUpload(scene.name("object"), "no-such-upload", 0.0))
            assert await scene.data("object") == bytes(100_000)
