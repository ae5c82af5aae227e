"""hooks/waiting.py: the tone that the caller hears while they wait, and when."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
from conftest import Event, Loaded, LoadHook, PretendCall, until


def load(hook: LoadHook) -> Loaded:
    """The file, ten times faster."""
    waiting = hook("waiting")
    waiting.module.WAIT_S, waiting.module.PERIOD_S, waiting.module.LOOK_S = 0.25, 0.2, 0.025
    return waiting


def said(item: str, heard_ms: int | None = None) -> Event:
    return ("model_said", {"item": item, "text": "はい。", "heard_ms": heard_ms})


def of(event: str, item: str, **facts: Any) -> Event:
    return (event, {"item": item, **facts})


async def tones(call: PretendCall, within_s: float) -> int:
    """How many tones begin within this time."""
    before = len(call.did)
    await asyncio.sleep(within_s)
    return len(call.did) - before


async def test_wait(hook: LoadHook) -> None:
    """A tone comes after the wait, and again after each period."""
    waiting, call = load(hook), PretendCall()
    call.busy = True  # the model is being connected
    began = time.monotonic()
    waiting.tell(call, "call_started")
    await until(lambda: call.did)
    assert 0.25 <= time.monotonic() - began < 0.35
    assert await tones(call, 0.5) in (2, 3)
    assert call.did == [f"play {len(waiting.module.TONE)}"] * len(call.did)


async def test_nothing_to_wait_for(hook: LoadHook) -> None:
    """No tone comes when it is the caller's turn, however long they think."""
    waiting, call = load(hook), PretendCall()
    waiting.tell(call, "call_started")
    assert await tones(call, 0.5) == 0


async def test_wait_after_silence(hook: LoadHook) -> None:
    """The time runs from the moment that the call is busy."""
    waiting, call = load(hook), PretendCall()
    waiting.tell(call, "call_started")
    await asyncio.sleep(0.4)
    call.busy = True
    assert await tones(call, 0.2) == 0
    await until(lambda: call.did)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (of("caller_started_speaking", "a"), of("caller_stopped_speaking", "a")),
        (of("caller_started_speaking", "a"), of("caller_said", "a", text="")),
        (of("model_started_speaking", "a"), said("a")),
        (of("model_started_speaking", "a"), said("a", heard_ms=300)),
    ],
    ids=["caller", "caller of a lost session", "model", "interrupted model"],
)
async def test_voice(hook: LoadHook, begin: Event, end: Event) -> None:
    """No tone comes over a voice, and the wait begins when the voice has ended."""
    waiting, call = load(hook), PretendCall()
    call.busy = True
    waiting.tell(call, "call_started", begin)
    assert await tones(call, 0.5) == 0
    waiting.tell(call, end)
    assert await tones(call, 0.2) == 0
    await until(lambda: call.did)


async def test_short_voice(hook: LoadHook) -> None:
    """A voice that begins and ends between two looks is not overlooked."""
    waiting, call = load(hook), PretendCall()
    waiting.module.LOOK_S = 0.15
    call.busy = True
    waiting.tell(call, "call_started")
    await asyncio.sleep(0.2)  # one look was at 0.15 s, the next is at 0.3 s
    waiting.tell(call, of("model_started_speaking", "a"), said("a"))
    assert await tones(call, 0.2) == 0
    await until(lambda: call.did)


async def test_two_voices(hook: LoadHook) -> None:
    """While one of two items sounds, the end of the other brings no tone."""
    waiting, call = load(hook), PretendCall()
    call.busy = True
    waiting.tell(call, "call_started", of("model_started_speaking", "a"))
    waiting.tell(call, of("model_started_speaking", "b"), said("a"))
    assert await tones(call, 0.5) == 0


async def test_end(hook: LoadHook) -> None:
    """No tone comes after the call, and nothing is left of it."""
    waiting, call = load(hook), PretendCall()
    call.busy = True
    waiting.tell(call, "call_started")
    await until(lambda: call.did)
    await waiting.tell_all(call, ("call_ended", {"reason": "caller hung up"}))
    assert await tones(call, 0.5) == 0
    assert not waiting.module.waits and not waiting.warnings


async def test_speed(hook: LoadHook) -> None:
    """A hundred calls cost next to nothing."""
    waiting, calls = hook("waiting"), [PretendCall(f"CA{number}") for number in range(100)]
    for call in calls:
        waiting.tell(call, "call_started")
    await until(lambda: len(waiting.module.waits) == 100)
    used = time.process_time()
    await asyncio.sleep(1)
    assert time.process_time() - used < 0.02
    for call in calls:
        waiting.tell(call, ("call_ended", {"reason": "caller hung up"}))
    await waiting.finish()


def linear(mulaw: bytes) -> list[float]:
    """G.711 mu-law as samples from -1 to 1."""
    samples = []
    for byte in mulaw:
        code = ~byte & 0xFF
        magnitude = (((code & 15) << 3) + 132 << (code >> 4 & 7)) - 132
        samples.append((-magnitude if code & 0x80 else magnitude) / 32768)
    return samples


def test_mulaw(hook: LoadHook) -> None:
    """Every byte comes back as itself; the two zeros are one."""
    mulaw = hook("waiting").module.mulaw
    assert [mulaw(sample) for sample in linear(bytes(range(256)))] == [
        0xFF if byte == 0x7F else byte for byte in range(256)
    ]
    assert (mulaw(-1.0), mulaw(1.0)) == (0x00, 0x80)


def test_sound(hook: LoadHook) -> None:
    """The tone is quiet, shorter than half its period, and begins and ends without a click."""
    waiting = hook("waiting").module
    samples = linear(waiting.TONE)
    assert 0.04 < max(samples) <= 0.051
    assert len(samples) / 8000 < waiting.PERIOD_S / 2
    assert all(abs(sample) < 0.001 for sample in samples[:80] + samples[-80:])
    # As steep as a sine of 700 Hz at this loudness, and no steeper.
    assert max(abs(b - a) for a, b in itertools.pairwise(samples)) < 0.03
