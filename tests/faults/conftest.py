from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aws_credentials import use_test_credentials
from certificates import Authority
from fault_proxy import FaultProxy
from moto_buckets import moto_bucket, moto_url
from scripted_server import Script
from socket_stage import PATIENCE_S, LaneKind, Stage, staged

__all__ = ["moto_bucket", "moto_url"]

Scene = Callable[[Stage], Coroutine[Any, Any, None]]
PATIENT = {"read_timeout_s": 60.0, "connect_timeout_s": 60.0}
BRIEF = {"read_timeout_s": 0.1, "connect_timeout_s": 0.1}


@pytest.fixture(autouse=True, scope="module")
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_test_credentials(patch)
        yield


class Theatre:
    """Plays scenes in one event loop. Stages stay, as it takes long to set one up."""

    def __init__(self, runner: asyncio.Runner, authority: Authority) -> None:
        self._runner = runner
        self._authority = authority
        self._stages: dict[tuple[str, bool, bool], Stage] = {}
        self._stack = AsyncExitStack()

    def play(
        self, kind: LaneKind, scene: Scene, *scripts: Script, tls: bool = False, patient: bool = True
    ) -> None:
        """Play a scene whose server plays `scripts`. A patient backend never times out."""
        place = (kind, tls, patient)

        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE_S):
                if place not in self._stages:
                    authority = self._authority if tls else None
                    fresh = staged(kind, authority=authority, **(PATIENT if patient else BRIEF))
                    self._stages[place] = await self._stack.enter_async_context(fresh)
                stage = self._stages[place]
                stage.server.play(*scripts)
                await scene(stage)
                await stage.settle()

        try:
            self._runner.run(bounded())
        except BaseException:
            # The next scene shall not inherit what this one left.
            self._stages.pop(place, None)
            raise

    def close(self) -> None:
        """End all stages."""
        self._runner.run(self._stack.aclose())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def theatre(authority: Authority) -> Iterator[Theatre]:
    with asyncio.Runner() as runner:
        theatre = Theatre(runner, authority)
        yield theatre
        theatre.close()


@pytest.fixture(params=[("loop", False), ("thread", False), ("loop", True)], ids=["loop", "thread", "TLS"])
def play(request: pytest.FixtureRequest, theatre: Theatre) -> Callable[..., None]:
    kind, tls = request.param

    def play(scene: Scene, *scripts: Script, patient: bool = True) -> None:
        theatre.play(kind, scene, *scripts, tls=tls, patient=patient)

    return play


@pytest.fixture(params=["loop", "thread"])
def kind(request: pytest.FixtureRequest) -> LaneKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def play_tls(kind: LaneKind, theatre: Theatre) -> Callable[..., None]:
    def play(scene: Scene, *scripts: Script, patient: bool = True) -> None:
        theatre.play(kind, scene, *scripts, tls=True, patient=patient)

    return play


@pytest.fixture
def proxy(moto_url: str) -> Iterator[FaultProxy]:
    """In front of moto."""
    with FaultProxy(moto_url, seed=4) as proxy:
        yield proxy
