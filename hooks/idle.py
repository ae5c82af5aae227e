"""Asks a caller who has fallen silent whether they are still there, at most twice, and then ends the call politely.

The silence begins when the caller has heard the model out. A caller who speaks or presses a key is there: the asking
begins anew.

    IDLE_SECONDS=25    of silence before each question; 0: never ask. People pause for up to 20 s, to think or to look
                       for something, and a tool may take as long after the model has said "one moment"

Nothing is stored.
"""

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("idle")

QUESTIONS = [
    "発信者がしばらく黙っています。まだお電話口にいらっしゃるか、短く一言でたずねてください。",
    "発信者はまだ黙っています。お声が聞こえないことを伝え、もう一度だけ、短くたずねてください。",
]
GOODBYE = (
    "発信者の返事がないので、この電話を切ります。またいつでもお電話くださいと、短く丁寧に別れの挨拶をしてください。"
)
ANSWER_LIMIT_S = 60.0  # an answer that has not come by then will not come: the silence counts

try:
    IDLE_SECONDS = float(os.environ.get("IDLE_SECONDS") or 25)
    if not 0 <= IDLE_SECONDS <= 3600:
        raise ValueError
except ValueError:
    log.error("IDLE_SECONDS is %r, so nobody is asked: set it to seconds, 0 to 3600", os.environ["IDLE_SECONDS"])
    IDLE_SECONDS = 0.0


@dataclass
class Silence:
    """One call's silence: it has begun when all these times, in seconds of time.monotonic(), have passed."""

    since: float  # the last sign of life; while the caller speaks it is infinite
    played_at: float = 0.0  # when Twilio will have played what it was sent
    asked_at: float = 0.0
    asked: int = 0  # how many times in this silence
    watch: asyncio.Task[None] | None = None


async def call_started(call: Any, at: float) -> None:
    silence = call.notes["idle"] = Silence(since=at)
    if IDLE_SECONDS:
        silence.watch = asyncio.create_task(watch(call, silence))


async def watch(call: Any, silence: Silence) -> None:
    """Look every now and then: simpler than a timer that every event would have to move."""
    while True:
        await asyncio.sleep(IDLE_SECONDS / 10)
        now = time.monotonic()
        began = max(silence.since, silence.played_at, silence.asked_at)
        if now - began < IDLE_SECONDS or silence.asked > len(QUESTIONS):
            continue
        silence.asked, silence.asked_at = silence.asked + 1, now
        if silence.asked <= len(QUESTIONS):
            call.tell_model(QUESTIONS[silence.asked - 1])
        else:
            log.info("%s: nobody has answered %d questions: the call is ended", call.sid, len(QUESTIONS))
            call.tell_model(GOODBYE)
            call.hang_up()  # when the goodbye has been heard


def caller_spoke(call: Any, at: float) -> None:
    silence = call.notes["idle"]
    silence.since, silence.asked = math.inf, 0
    silence.played_at = at  # what was still to be played is thrown away


def caller_paused(call: Any, at: float) -> None:
    call.notes["idle"].since = at + ANSWER_LIMIT_S


def key_pressed(call: Any, at: float) -> None:
    silence = call.notes["idle"]
    silence.since, silence.asked = max(silence.since, at), 0


def model_asked(call: Any, at: float) -> None:
    call.notes["idle"].since = at + ANSWER_LIMIT_S


def model_audio(call: Any, at: float, mulaw: bytes) -> None:
    """It is sent faster than it is played, and Twilio plays one piece after another. 8 bytes are a millisecond."""
    silence = call.notes["idle"]
    silence.played_at = max(silence.played_at, at) + len(mulaw) / 8000


def model_said(call: Any, at: float, heard_ms: int | None) -> None:
    silence = call.notes["idle"]
    if heard_ms is None and silence.since < math.inf:  # heard to its end, and the caller has not begun to speak
        silence.since = at


async def call_ended(call: Any) -> None:
    silence = call.notes.pop("idle")
    if silence.watch:
        silence.watch.cancel()
