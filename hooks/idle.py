"""Asks a caller who has fallen silent whether they are still there, at most twice, and then ends the call politely.

The silence is counted from the end of what the caller has heard, not of what was sent. While the model speaks, or an
answer is due, no time runs; a caller who speaks or presses a key is there, and the counting begins anew.

    IDLE_SECONDS=25    of silence before each question; 0: never ask. People pause for up to 20 s, to think or to look
                       for something, and a tool may take as long after the model has said "one moment"

Nothing is stored.
"""

from __future__ import annotations

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
    """What is known of one call's silence. Times are those of time.monotonic(), in seconds."""

    since: float  # when the last thing happened that ends a silence
    played_at: float = 0.0  # when what was sent to Twilio will have been played
    caller_at: float = 0.0  # when the caller last spoke or pressed a key
    caller_speaks: bool = False
    answer_due: bool = False  # until it has been heard
    watch: asyncio.Task[None] | None = None

    def too_long_at(self) -> float:
        if self.caller_speaks:
            return math.inf
        return max(self.since, self.played_at) + IDLE_SECONDS + (ANSWER_LIMIT_S if self.answer_due else 0)


async def watch(call: Any, silence: Silence) -> None:
    """Look twice a second, as long as the call lasts: simpler than a timer that everything would have to move."""
    asked, asked_at = 0, -math.inf
    while True:
        await asyncio.sleep(min(0.5, IDLE_SECONDS / 10))
        now = time.monotonic()
        if silence.caller_at > asked_at:
            asked = 0
        if asked > len(QUESTIONS) or now < max(silence.too_long_at(), asked_at + IDLE_SECONDS):
            continue
        asked, asked_at = asked + 1, now
        if asked <= len(QUESTIONS):
            call.tell_model(QUESTIONS[asked - 1])
        else:
            log.info("%s: nobody has answered %d questions: the call is ended", call.sid, len(QUESTIONS))
            call.tell_model(GOODBYE)
            call.hang_up()  # when the goodbye has been heard


async def call_started(call: Any, at: float) -> None:
    silence = call.notes["idle"] = Silence(since=at)
    if IDLE_SECONDS:
        silence.watch = asyncio.create_task(watch(call, silence))


def caller_spoke(call: Any, at: float) -> None:
    silence = call.notes["idle"]
    silence.caller_speaks, silence.caller_at = True, at
    silence.played_at = at  # what the model was still saying is thrown away


def caller_paused(call: Any, at: float) -> None:
    silence = call.notes["idle"]
    silence.caller_speaks, silence.answer_due, silence.since = False, True, at


def key_pressed(call: Any, at: float) -> None:
    call.notes["idle"].caller_at = call.notes["idle"].since = at


def model_asked(call: Any, at: float) -> None:
    silence = call.notes["idle"]
    silence.answer_due, silence.since = True, at


def model_audio(call: Any, at: float, mulaw: bytes) -> None:
    """It is sent faster than it is played, and Twilio plays one piece after another. 8 bytes are a millisecond."""
    silence = call.notes["idle"]
    silence.played_at = max(silence.played_at, at) + len(mulaw) / 8000


def model_said(call: Any, at: float, heard_ms: int | None) -> None:
    if heard_ms is None:  # heard to its end; otherwise the caller has interrupted it
        silence = call.notes["idle"]
        silence.answer_due, silence.since = False, at


async def call_ended(call: Any) -> None:
    silence = call.notes.pop("idle")
    if silence.watch:
        silence.watch.cancel()
