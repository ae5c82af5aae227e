"""Asks a silent caller twice whether they are still there, and then ends the call politely.

Words and keys show that a caller is there. Sounds without words do not show it, because a cough,
hold music or a television makes them as well.

    IDLE_SECONDS=25    without a word before each question, because people pause for up to 20 s to
                       think or to look for something; 0: never ask

The time stands still while the call is `busy`: the model speaks or is about to, or a tool runs.
After four times IDLE_SECONDS without a word the call ends whatever noise there is. For this, what
the model answers to noise counts as well. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("idle")

QUESTIONS = [
    "発信者がしばらく黙っています。「もしもし、こちらの声は届いておりますでしょうか」のように、"
    "丁寧に短くお尋ねください。",
    "発信者はまだ黙っています。お声が聞こえない旨をお伝えし、もう一度だけ、丁寧に短くお尋ねください。",
]
GOODBYE = (
    "発信者のお返事がないので、この電話を終えます。「お返事がないようですので、失礼いたします。"
    "またのお電話をお待ちしております」のように、丁寧に短くお別れの挨拶をしてください。"
)
try:
    IDLE_SECONDS = float(os.environ.get("IDLE_SECONDS") or 25)
    if not 0 <= IDLE_SECONDS <= 3600:
        raise ValueError
except ValueError:
    wrong = os.environ["IDLE_SECONDS"]
    sys.exit(f"IDLE_SECONDS is {wrong!r}: give seconds, 0 to 3600 (0: nobody is asked)")


@dataclass
class Idle:
    """What the watch of one call knows. Times are of time.monotonic(), in seconds."""

    quiet_since: float  # nobody has spoken since, and nothing was going on
    word_at: float  # the caller's last word or key; moves on while they listen
    asked: int = 0  # questions since that word
    turn: str | None = None  # the caller's last item, until its words have come
    wordless: bool = False  # the caller has made a sound since that word
    answers_noise: bool = False  # what the model does is an answer to such a sound
    transcribed: bool = False  # OpenAI has looked for words in the last turn
    watch: asyncio.Task[None] | None = None

    def word(self, at: float) -> None:
        self.quiet_since = self.word_at = at
        self.asked, self.wordless, self.answers_noise = 0, False, False


# `async def` handlers run on the loop, as the watch does, so no lock is needed.


async def call_started(call: Any, at: float) -> None:
    idle = call.notes["idle"] = Idle(quiet_since=at, word_at=at)
    if IDLE_SECONDS:
        idle.watch = asyncio.create_task(watch(call, idle))


async def watch(call: Any, idle: Idle) -> None:
    """Look every now and then: simpler than a timer that every event would have to move."""
    while True:
        await asyncio.sleep(IDLE_SECONDS / 10)
        now = time.monotonic()
        if call.busy or idle.turn:
            idle.quiet_since = now
        if call.busy and not idle.answers_noise:
            idle.word_at = now  # who listens to a long answer says nothing, and is there
        if now - idle.word_at >= 4 * IDLE_SECONDS:
            break
        if now - idle.quiet_since >= IDLE_SECONDS:
            if idle.asked == len(QUESTIONS):
                break
            call.tell_model(QUESTIONS[idle.asked])
            idle.quiet_since, idle.asked = now, idle.asked + 1
    facts = {"call": call.sid, "questions": idle.asked, "seconds": round(now - idle.word_at, 1)}
    text = "the caller has said nothing for %(seconds).0f s, after %(questions)d questions: goodbye"
    log.info(text, facts, extra=facts)
    call.tell_model(GOODBYE)
    call.hang_up(final=True)  # when the goodbye has been heard; no sound cancels it


async def caller_started_speaking(call: Any, item: str) -> None:
    idle = call.notes["idle"]
    idle.turn, idle.wordless = item, True
    if not call.busy:
        idle.answers_noise = True  # unless words come


async def model_started_speaking(call: Any) -> None:
    # A cough during a long answer does not make that answer one to noise. Only a later one is.
    call.notes["idle"].answers_noise = call.notes["idle"].wordless


async def model_used(call: Any, kind: str) -> None:
    if kind == "transcription":
        call.notes["idle"].transcribed = True


async def caller_said(call: Any, at: float, item: str, text: str) -> None:
    idle = call.notes["idle"]
    if idle.turn == item:  # the words of one turn may come while the next is spoken
        idle.turn = None
    # Where nobody looks for words (no transcription, or it fails), the turn itself counts, because
    # to talk with a television is better than to hang up on a caller who is talking.
    if text or not idle.transcribed:
        idle.word(at)
    idle.transcribed = False


async def key_pressed(call: Any, at: float) -> None:
    call.notes["idle"].word(at)


async def call_ended(call: Any) -> None:
    if watch := call.notes.pop("idle").watch:
        watch.cancel()
