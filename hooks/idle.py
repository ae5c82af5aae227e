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

import logging
import os
import sys
import threading
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
    """What is known of one call. Times are of time.monotonic(), in seconds."""

    quiet_since: float  # nobody has spoken since, and nothing was going on
    word_at: float  # the caller's last word or key; moves on while they listen
    asked: int = 0  # questions since that word
    turn: str | None = None  # the caller's last item, until its words have come
    wordless: bool = False  # the caller has made a sound since that word
    answers_noise: bool = False  # what the model does is an answer to such a sound
    transcribed: bool = False  # OpenAI has looked for words in the last turn
    over: bool = False  # the model has been told to say goodbye

    def word(self, at: float) -> None:
        self.quiet_since = self.word_at = at
        self.asked, self.wordless, self.answers_noise = 0, False, False


idles: dict[Any, Idle] = {}  # by call
lock = threading.Lock()  # the handlers run in one thread, and `watch` in another


def watch() -> None:
    """Look every now and then: simpler than a timer that every event would have to move."""
    while True:
        time.sleep(IDLE_SECONDS / 10)
        with lock:
            for call, idle in idles.items():
                look(call, idle, time.monotonic())


def look(call: Any, idle: Idle, now: float) -> None:
    if idle.over:
        return
    if call.busy or idle.turn:
        idle.quiet_since = now
    if call.busy and not idle.answers_noise:
        idle.word_at = now  # who listens to a long answer says nothing, and is there
    unanswered = now - idle.quiet_since >= IDLE_SECONDS
    if now - idle.word_at >= 4 * IDLE_SECONDS or (unanswered and idle.asked == len(QUESTIONS)):
        facts = {"call": call.sid, "questions": idle.asked}
        log.info("the caller is not there (%(questions)d questions): goodbye", facts, extra=facts)
        call.tell_model(GOODBYE)
        call.hang_up(final=True)  # when the goodbye has been heard; no sound cancels it
        idle.over = True
    elif unanswered:
        call.tell_model(QUESTIONS[idle.asked])
        idle.quiet_since, idle.asked = now, idle.asked + 1


def call_started(call: Any, at: float) -> None:
    with lock:
        idles[call] = Idle(quiet_since=at, word_at=at)


def caller_started_speaking(call: Any, item: str) -> None:
    with lock:
        idle = idles[call]
        idle.turn, idle.wordless = item, True
        if not call.busy:
            idle.answers_noise = True  # unless words come


def model_started_speaking(call: Any) -> None:
    # A cough during a long answer does not make that answer one to noise. Only a later one is.
    with lock:
        idles[call].answers_noise = idles[call].wordless


def model_used(call: Any, kind: str) -> None:
    with lock:
        idles[call].transcribed |= kind == "transcription"


def caller_said(call: Any, at: float, item: str, text: str) -> None:
    with lock:
        idle = idles[call]
        if idle.turn == item:  # the words of one turn may come while the next is spoken
            idle.turn = None
        # Where nobody looks for words (no transcription, or it fails), the turn itself counts,
        # because to talk with a television is better than to hang up on a caller who is talking.
        if text or not idle.transcribed:
            idle.word(at)
        idle.transcribed = False


def key_pressed(call: Any, at: float) -> None:
    with lock:
        idles[call].word(at)


def call_ended(call: Any) -> None:
    with lock:
        del idles[call]


if IDLE_SECONDS:
    threading.Thread(target=watch, name="idle watch", daemon=True).start()
else:  # then the bridge need not tell this file anything
    del call_started, caller_started_speaking, model_started_speaking, model_used, caller_said
    del key_pressed, call_ended
