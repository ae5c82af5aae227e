"""A telephone in the browser of this computer: open http://localhost:8080/ and call without Twilio.

The page (_browser_phone.html) is caller and Twilio in one: it asks /twilio/voice, opens the stream,
sends the microphone's voice and plays the model's. This file lends it the bridge's own view of its
call, which Twilio would never see: who said what and when, what a barge-in cut, which tools were
used, and at the end what it cost (hooks/cost.py) and its report (hooks/report.py).

Settings: none of its own. OPENAI_API_KEY, OPENAI_REALTIME_URL and OPENAI_REALTIME_MODEL tell the
page who answers. While TWILIO_AUTH_TOKEN is set the bridge takes signed calls only, and a browser
cannot sign.

Nothing is written to disk. Of a call that a page asks about, and of no other, the last events are
kept in memory until five minutes after its end.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_EVENTS = 1000  # of one call: a page that polls several times a second never misses one
MAX_WATCHED = 20  # calls; of more, the one that was asked about longest ago is forgotten
FORGET_S = 300.0  # after the end of a call
MAX_TEXT = 2000  # characters of a tool's result and the like: enough to read on a page

URL = os.environ.get("OPENAI_REALTIME_URL", "").strip()
NAMED = parse_qs(urlsplit(URL).query).get("model", [""])[0]
MODEL = NAMED or os.environ.get("OPENAI_REALTIME_MODEL", "").strip() or "gpt-realtime-2.1"
OFFLINE = not (URL or os.environ.get("OPENAI_API_KEY", "").strip())


@dataclass
class Watched:
    """A call that a page asks about."""

    call: Any = None  # from its call_started on
    started_at: float = 0.0  # time.monotonic(), s; the page's times count from there
    count: int = 0  # of events so far
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))


watched_calls: dict[str, Watched] = {}  # by call sid, the one asked about last at the end
lock = threading.Lock()  # pages are served in other threads than the one that gets the events


def any_event(call: Any, at: float, event: str, facts: dict[str, Any]) -> None:
    with lock:
        if not (watched := watched_calls.get(call.sid)):
            return
        watched.call = call  # a call that is connected again is another object
        watched.started_at = watched.started_at or at
        watched.count += 1
        at_ms = round((at - watched.started_at) * 1000)
        short = {k: v[:MAX_TEXT] if isinstance(v, str) else v for k, v in facts.items()}
        watched.events.append({**short, "n": watched.count, "event": event, "at_ms": at_ms})
    if event == "call_ended":
        timer = threading.Timer(FORGET_S, forget, [call])
        timer.daemon = True
        timer.start()


def forget(call: Any) -> None:
    with lock:
        if (watched := watched_calls.get(call.sid)) and watched.call is call:  # not connected again
            del watched_calls[call.sid]


def events(query: dict[str, str]) -> dict[str, Any]:
    """What has happened in ?call=CA… after event ?after=N. Asking before the call watches it."""
    sid, after = query.get("call", ""), query.get("after", "0")
    known: dict[str, Any] = {"model": MODEL, "offline": OFFLINE, "events": []}
    if not re.fullmatch(r"CA[0-9a-f]{32}", sid):
        return known
    with lock:
        watched = watched_calls.pop(sid, None) or Watched()
        watched_calls[sid] = watched
        if len(watched_calls) > MAX_WATCHED:
            del watched_calls[next(iter(watched_calls))]
        seen = int(after) if after.isdecimal() else 0
        known["events"] = [event for event in watched.events if event["n"] > seen]
    if call := watched.call:
        cost = call.notes.get("cost", {})
        known |= {"busy": call.busy, "usd": cost.get("known_usd")}
        known |= {"usd_complete": cost.get("usd") is not None}
        known |= {"report": "report" in call.notes}
    return known


def report(query: dict[str, str]) -> str:
    """What hooks/report.py has written about ?call=CA…"""
    with lock:
        watched = watched_calls.get(query.get("call", ""), Watched())
    path = watched.call.notes.get("report") if watched.call else None
    gone = "This call's report is not known here any more: look into the folder REPORTS."
    return Path(path).read_text("utf-8") if path else gone


PAGES = {
    "/": Path(__file__).with_name("_browser_phone.html"),
    "/browser-phone/events": events,
    "/browser-phone/report": report,
}

if os.environ.get("TWILIO_AUTH_TOKEN"):  # then the bridge serves no page, and nobody asks
    del any_event
