"""What the fault proxy can do to a request: the faults that networks and S3 servers are known for."""

from __future__ import annotations

import asyncio

from fault_exchange import Answer, Exchange
from fault_proxy import Fault


def late(seconds: float) -> Fault:
    """The request takes so much longer."""

    async def strike(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await exchange.pass_on()

    return Fault(f"late by {seconds:g} s", strike)


def refusal(status: str, code: str) -> Fault:
    """The server is not asked; an S3 error is the answer."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()

    async def strike(exchange: Exchange) -> None:
        await exchange.body()
        answer = Answer(status, [("content-type", "application/xml")]).with_body(body)
        await exchange.reply(answer if exchange.head.method != "HEAD" else Answer(status, answer.headers))

    return Fault(f"{status} {code}", strike)


def deaf_in_request(seconds: float) -> Fault:
    """Half of the request's body is taken, and nothing for so long; the rest is never answered."""

    async def strike(exchange: Exchange) -> None:
        await exchange.half_of_body()
        await asyncio.sleep(seconds)
        await exchange.silence()

    return Fault(f"deaf in request for {seconds:g} s", strike)


def answer_of(target: str) -> Fault:
    """The server is asked for another object than the client asks for. It must look at no signature."""

    async def strike(exchange: Exchange) -> None:
        await exchange.reply(await exchange.ask_for(target))

    return Fault("answer of another", strike)


def flipped_answer(part: float) -> Fault:
    """One bit of the body is wrong, after this part of it."""

    async def strike(exchange: Exchange) -> None:
        answer = await exchange.ask()
        await exchange.reply(answer.with_body(_flipped(answer.body, part)) if answer.body else answer)

    return Fault(f"flipped answer at {part:.0%}", strike)


async def _stall(exchange: Exchange) -> None:
    await exchange.silence()


async def _stall_in_answer(exchange: Exchange) -> None:
    await exchange.reply_half(await exchange.ask())
    await exchange.silence()


async def _reset_in_request(exchange: Exchange) -> None:
    await exchange.half_of_body()
    exchange.reset()


async def _reset_in_answer(exchange: Exchange) -> None:
    await exchange.reply_half(await exchange.ask())
    exchange.reset()


async def _close_in_answer(exchange: Exchange) -> None:
    await exchange.reply_half(await exchange.ask())


async def _half_close(exchange: Exchange) -> None:
    await exchange.reply_half(await exchange.ask())
    exchange.end_sending()
    await exchange.silence()


async def _lose_answer_by_reset(exchange: Exchange) -> None:
    await exchange.ask()
    exchange.reset()


async def _lose_answer_by_close(exchange: Exchange) -> None:
    await exchange.ask()


async def _shorten_answer(exchange: Exchange) -> None:
    answer = await exchange.ask()
    await exchange.reply(answer.with_body(answer.body[: len(answer.body) // 2]))


async def _shorten_request(exchange: Exchange) -> None:
    body = await exchange.body()
    await exchange.reply(await exchange.ask_with(body[: len(body) // 2]))


async def _flip_in_request(exchange: Exchange) -> None:
    await exchange.reply(await exchange.ask_with(_flipped(await exchange.body(), _LATE)))


def _flipped(body: bytes, part: float) -> bytes:
    at = int(len(body) * part)
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] if body else body


# Where a chunk has its last sections, and where its header.
_LATE, _EARLY = 0.95, 0.01

STALL = Fault("stall", _stall)
STALL_IN_ANSWER = Fault("stall in answer", _stall_in_answer)
RESET_IN_REQUEST = Fault("reset in request", _reset_in_request)
RESET_IN_ANSWER = Fault("reset in answer", _reset_in_answer)
CLOSE_IN_ANSWER = Fault("close in answer", _close_in_answer)
HALF_CLOSE = Fault("half close", _half_close)
ANSWER_LOST_BY_RESET = Fault("answer lost by reset", _lose_answer_by_reset)
ANSWER_LOST_BY_CLOSE = Fault("answer lost by close", _lose_answer_by_close)
SHORT_ANSWER = Fault("short answer", _shorten_answer)
FLIPPED_ANSWER = flipped_answer(_LATE)
FLIPPED_HEADER = flipped_answer(_EARLY)
SHORT_REQUEST = Fault("short request", _shorten_request)
FLIPPED_REQUEST = Fault("flipped request", _flip_in_request)
INTERNAL_ERROR = refusal("500 Internal Server Error", "InternalError")
UNAVAILABLE = refusal("503 Service Unavailable", "ServiceUnavailable")
SLOW_DOWN = refusal("503 Slow Down", "SlowDown")
TOO_MANY_REQUESTS = refusal("429 Too Many Requests", "TooManyRequests")

# None of these lets an object be stored that is not what was sent.
STORM = (
    late(0.05),
    STALL,
    deaf_in_request(2.0),
    STALL_IN_ANSWER,
    RESET_IN_REQUEST,
    RESET_IN_ANSWER,
    CLOSE_IN_ANSWER,
    HALF_CLOSE,
    ANSWER_LOST_BY_RESET,
    ANSWER_LOST_BY_CLOSE,
    SHORT_ANSWER,
    FLIPPED_ANSWER,
    FLIPPED_HEADER,
    INTERNAL_ERROR,
    UNAVAILABLE,
    SLOW_DOWN,
    TOO_MANY_REQUESTS,
)
