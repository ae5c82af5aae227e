"""A telephone in the browser of this computer: open http://localhost:8080/ and call the bridge without Twilio.

The page (_browser_phone.html) is caller and Twilio in one: it asks /twilio/voice, opens the stream, sends the
microphone's voice and plays the model's. This file lends it the bridge's own view of its call, which Twilio would never
see: who said what and when, what a barge-in cut, which tools were used.

Settings: none of its own. OPENAI_API_KEY, OPENAI_REALTIME_URL and OPENAI_REALTIME_MODEL tell the page who answers;
while TWILIO_AUTH_TOKEN is set the bridge takes signed calls only, and a browser cannot sign.

Nothing is written to disk. Of a call that a page asks about, and of no other, the last events are kept in memory until
five minutes after its end.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_EVENTS = 500  # of one call: a page that polls several times a second never misses one
MAX_WATCHED = 20  # calls; of more, the one that was asked about longest ago is forgotten
FORGET_S = 300.0  # after the end of a call
MAX_TEXT = 2000  # characters of a tool's arguments or result: enough to read on a page

URL = os.environ.get("OPENAI_REALTIME_URL", "").strip()
NAMED = parse_qs(urlsplit(URL).query).get("model", [""])[0]
MODEL = NAMED or os.environ.get("OPENAI_REALTIME_MODEL", "").strip() or "gpt-realtime-2.1"
STAND_IN_ANSWERS = not (URL or os.environ.get("OPENAI_API_KEY", "").strip())


@dataclass
class Watched:
    """A call that a page asks about."""

    started_at: float | None = None  # call_started (time.monotonic(), s); the page's times count from there
    count: int = 0  # of events so far
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))


watched_calls: dict[str, Watched] = {}  # by call sid, the one asked about last at the end
lock = threading.Lock()  # pages are served in other threads than the one that handles events


def events(query: dict[str, str]) -> dict[str, Any]:
    """The page: what has happened in ?call=CA… after event ?after=N. To ask before the call begins is to watch it."""
    sid, after = query.get("call", ""), query.get("after", "0")
    answer: dict[str, Any] = {"model": MODEL, "stand_in": STAND_IN_ANSWERS, "events": []}
    if not re.fullmatch(r"CA[0-9a-f]{32}", sid):
        return answer
    with lock:
        watched = watched_calls.pop(sid, None) or Watched()
        watched_calls[sid] = watched
        if len(watched_calls) > MAX_WATCHED:
            del watched_calls[next(iter(watched_calls))]
        known = int(after) if after.isdecimal() else 0
        return answer | {"events": [event for event in watched.events if event["n"] > known]}


def keep(call: Any, at: float, event: str, **facts: Any) -> None:
    with lock:
        if watched := watched_calls.get(call.sid):
            watched.started_at = at if watched.started_at is None else watched.started_at
            watched.count += 1
            at_ms = round((at - watched.started_at) * 1000)
            watched.events.append({"n": watched.count, "event": event, "at_ms": at_ms, **facts})


def call_started(call: Any, at: float) -> None:
    keep(call, at, "call_started")


def caller_spoke(call: Any, at: float) -> None:
    keep(call, at, "caller_spoke")


def caller_paused(call: Any, at: float) -> None:
    keep(call, at, "caller_paused")


def caller_said(call: Any, at: float, text: str) -> None:
    keep(call, at, "caller_said", text=text)


def model_spoke(call: Any, at: float) -> None:
    keep(call, at, "model_spoke")


def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
    keep(call, at, "model_said", text=text, heard_ms=heard_ms)


def model_interrupted(call: Any, at: float, heard_ms: int, sent_ms: int) -> None:
    keep(call, at, "model_interrupted", heard_ms=heard_ms, sent_ms=sent_ms)


def model_failed(call: Any, at: float, error: str) -> None:
    keep(call, at, "model_failed", error=error)


def tool_used(call: Any, at: float, name: str, arguments: str, result: str, seconds: float) -> None:
    short = {"arguments": arguments[:MAX_TEXT], "result": result[:MAX_TEXT]}
    keep(call, at, "tool_used", name=name, seconds=seconds, **short)


def key_pressed(call: Any, at: float, key: str) -> None:
    keep(call, at, "key_pressed", key=key)


async def call_ended(call: Any, at: float, reason: str) -> None:  # on the loop, where a timer is one line
    keep(call, at, "call_ended", reason=reason)
    asyncio.get_running_loop().call_later(FORGET_S, forget, call.sid)


def forget(sid: str) -> None:
    with lock:
        watched_calls.pop(sid, None)


PAGES = {"/": Path(__file__).with_name("_browser_phone.html"), "/browser-phone/events": events}
