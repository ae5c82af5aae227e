"""hooks/waiting.py: the tone that the caller hears while they wait, and when."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from conftest import Event, LoadHook, PretendCall, Watched, until


@pytest.fixture
def waiting(hook: LoadHook) -> Watched:
    module = hook("waiting").module
    return Watched(module, module.waits, module.LOOK_S)


@pytest.fixture
def call(waiting: Watched) -> PretendCall:
    """One that has begun, and in which the model is about to speak."""
    call = PretendCall()
    call.busy = True
    waiting.tell(call, "call_started")
    return call


def of(event: str, item: str, **facts: Any) -> Event:
    return (event, {"item": item, **facts})


def test_wait(waiting: Watched, call: PretendCall) -> None:
    """A tone comes after the wait, and again after each period."""
    tone = f"play {len(waiting.module.TONE)}"
    assert waiting.wait(call, 2.25) == []
    assert waiting.wait(call, 0.25) == [tone]
    assert waiting.wait(call, 1.75) == []
    assert waiting.wait(call, 2.25) == [tone, tone]


def test_nothing_to_wait_for(waiting: Watched, call: PretendCall) -> None:
    """When it is the caller's turn no tone comes. The time runs from where the call is busy."""
    call.busy = False
    assert waiting.wait(call, 30) == []
    call.busy = True
    assert waiting.wait(call, 2.25) == []
    assert len(waiting.wait(call, 0.25)) == 1


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("caller_started_speaking", "caller_stopped_speaking"),
        ("caller_started_speaking", "caller_said"),  # the session was lost meanwhile
        ("model_started_speaking", "model_said"),
    ],
)
def test_voice(waiting: Watched, call: PretendCall, begin: str, end: str) -> None:
    """No tone comes over a voice, and the wait begins when the voice has ended."""
    waiting.tell(call, of(begin, "a"))
    assert waiting.wait(call, 30) == []
    waiting.tell(call, of(end, "a"))
    assert waiting.wait(call, 2) == []
    waiting.tell(call, of("caller_said", "a"))  # words come late, and change nothing
    assert waiting.wait(call, 0.25) == []
    assert len(waiting.wait(call, 0.25)) == 1


def test_short_voice(waiting: Watched, call: PretendCall) -> None:
    """A voice that begins and ends between two looks is not overlooked."""
    assert waiting.wait(call, 2) == []
    waiting.tell(call, of("model_started_speaking", "a"), of("model_said", "a"))
    assert waiting.wait(call, 2.25) == []
    assert len(waiting.wait(call, 0.25)) == 1


def test_two_voices(waiting: Watched, call: PretendCall) -> None:
    """While one of two items sounds, the end of the other brings no tone."""
    waiting.tell(call, of("model_started_speaking", "a"), of("model_started_speaking", "b"))
    waiting.tell(call, of("model_said", "a"))
    assert waiting.wait(call, 30) == []


async def test_thread(hook: LoadHook) -> None:
    """The file looks by itself, and no more after the call, of which nothing is left."""
    waiting, call = hook("waiting"), PretendCall()
    call.busy = True
    waiting.tell(call, ("call_started", time.monotonic() - 2.5, {}))
    await until(lambda: call.did, 0.5)
    await waiting.tell_all(call, ("call_ended", {"reason": "caller hung up"}))
    assert waiting.module.waits == call.notes == {} and not waiting.warnings


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
