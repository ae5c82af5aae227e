"""Asks a caller who has fallen silent whether they are still there, at most twice, and then ends the call politely.

The silence begins when the caller has heard the model out, and no tool runs: until then the call is `busy`. A caller
who speaks or presses a key is there: the asking begins anew.

    IDLE_SECONDS=25    of silence before each question; 0: never ask. People pause for up to 20 s, to think or to look
                       for something

Nothing is stored.
"""

import asyncio
import logging
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
try:
    IDLE_SECONDS = float(os.environ.get("IDLE_SECONDS") or 25)
    if not 0 <= IDLE_SECONDS <= 3600:
        raise ValueError
except ValueError:
    log.error("IDLE_SECONDS is %r, so nobody is asked: set it to seconds, 0 to 3600", os.environ["IDLE_SECONDS"])
    IDLE_SECONDS = 0.0


@dataclass
class Silence:
    """One call's silence."""

    since: float  # time.monotonic(), s: the last sign of life of either side
    caller_speaks: bool = False
    asked: int = 0  # questions in this silence
    watch: asyncio.Task[None] | None = None


async def call_started(call: Any, at: float) -> None:
    silence = call.notes["idle"] = Silence(since=at)
    if IDLE_SECONDS:
        silence.watch = asyncio.create_task(watch(call, silence))


async def watch(call: Any, silence: Silence) -> None:
    """Look every now and then: simpler than a timer that every event would have to move."""
    while True:
        await asyncio.sleep(IDLE_SECONDS / 10)
        if call.busy or silence.caller_speaks:
            silence.since = time.monotonic()
        if time.monotonic() - silence.since < IDLE_SECONDS or silence.asked > len(QUESTIONS):
            continue
        silence.since, silence.asked = time.monotonic(), silence.asked + 1
        if silence.asked <= len(QUESTIONS):
            call.tell_model(QUESTIONS[silence.asked - 1])
        else:
            log.info("%s: nobody has answered %d questions: the call is ended", call.sid, len(QUESTIONS))
            call.tell_model(GOODBYE)
            call.hang_up()  # when the goodbye has been heard


async def caller_spoke(call: Any) -> None:
    call.notes["idle"].caller_speaks, call.notes["idle"].asked = True, 0


async def caller_paused(call: Any, at: float) -> None:
    call.notes["idle"].caller_speaks, call.notes["idle"].since = False, at


async def key_pressed(call: Any, at: float) -> None:
    call.notes["idle"].since, call.notes["idle"].asked = at, 0


async def call_ended(call: Any) -> None:
    silence = call.notes.pop("idle")
    if silence.watch:
        silence.watch.cancel()
