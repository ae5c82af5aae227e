"""Plays a quiet tone while the caller waits, so that nobody takes a silent line for a dead one.

After 2.5 s of waiting (the model is being connected, it thinks, or a tool runs) the caller hears
two soft notes every two seconds, until the model speaks or they do. No voice is ever played over.

Settings: none, because the tone is heard only where silence would be. To have no tone, delete this
file or put `_` before its name. Nothing is stored.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

WAIT_S = 2.5  # a pause of a conversation is shorter
PERIOD_S = 2.0  # from one tone to the next
LOOK_S = 0.25
RATE = 8000  # samples a second, one byte each (G.711)
PEAK = 0.05  # of full scale, -26 dB: the tone is 13 dB quieter than a voice


def mulaw(sample: float) -> int:
    """The byte of G.711 mu-law for a sample from -1 to 1."""
    magnitude = min(round(abs(sample) * 32768), 32635) + 132
    exponent = magnitude.bit_length() - 8
    code = exponent << 4 | magnitude >> exponent + 3 & 15
    return ~(code | (0x80 if sample < 0 else 0)) & 0xFF


def note(hz: float, seconds: float) -> bytes:
    """A note that swells and fades, because a sudden beginning or end is heard as a click."""
    count = round(seconds * RATE)
    samples = (
        PEAK * math.sin(math.pi * n / count) ** 2 * math.sin(2 * math.pi * hz * n / RATE)
        for n in range(count)
    )
    return bytes(mulaw(sample) for sample in samples)


# C and the F above it. The silence after them is not played: the line is free for the model.
TONE = note(523.25, 0.3) + note(698.46, 0.3)


@dataclass
class Wait:
    """What is known of one call."""

    since: float  # time.monotonic(), s: the last moment that was no waiting
    voices: set[str] = field(default_factory=set)  # items of both sides that are being spoken now


# The handlers run in one thread and `watch` in another. There is no lock: what one changes, the
# other sees a moment later, and a tone that comes a moment too late is stopped by the voice.
waits: dict[Any, Wait] = {}  # by call


def watch() -> None:
    """Look at all calls four times a second, because no event says that a tool begins."""
    while True:
        time.sleep(LOOK_S)
        for call, wait in list(waits.items()):
            look(call, wait, time.monotonic())


def look(call: Any, wait: Wait, now: float) -> None:
    if wait.voices or not call.busy:
        wait.since = now
    elif now - wait.since >= WAIT_S:
        call.play(TONE)
        wait.since = now + PERIOD_S - WAIT_S


def call_started(call: Any, at: float) -> None:
    waits[call] = Wait(since=at)


def caller_started_speaking(call: Any, item: str) -> None:
    waits[call].voices.add(item)


def model_started_speaking(call: Any, item: str) -> None:
    waits[call].voices.add(item)


def caller_stopped_speaking(call: Any, at: float, item: str) -> None:
    has_ended(waits[call], item, at)


def caller_said(call: Any, at: float, item: str) -> None:
    # When a session is lost, nobody hears the caller stop.
    has_ended(waits[call], item, at)


def model_said(call: Any, at: float, item: str) -> None:
    has_ended(waits[call], item, at)


def has_ended(wait: Wait, item: str, at: float) -> None:
    if item in wait.voices:
        wait.voices.remove(item)
        wait.since = max(wait.since, at)


def call_ended(call: Any) -> None:
    del waits[call]


threading.Thread(target=watch, name="waiting tone", daemon=True).start()
