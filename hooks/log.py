"""Writes what happens to standard output, one JSON object a line, so that a call can be followed afterwards.

    fly logs | grep CA0123…
    {"ts": "2026-11-23T07:46:05.120Z", "call": "CA0123…", "event": "caller_said", "text": "もしもし"}

Every event of every call but the audio itself, with the words of both sides: take `caller_said`, `model_said` and
`tool_used` out of EVENTS if they must not be in a log. The log lines of Python's logging (the bridge's, the hooks', the
libraries') come as JSON lines, too: {"ts", "level", "logger", "message"} and "traceback" when there is one.

    LOG_NUMBERS=full    telephone numbers in full; otherwise only their last four digits are shown

Nothing is stored here, and secrets are blotted out. No call waits for whoever reads standard output: events wait in
this file's thread, and log lines that find the queue full are dropped and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("log")

EVENTS = ["call_started", "model_asked", "caller_spoke", "caller_paused", "caller_said", "model_spoke", "model_said"]
EVENTS += ["model_interrupted", "model_used", "model_failed", "tool_used", "key_pressed", "call_ended"]

LOG_NUMBERS = os.environ.get("LOG_NUMBERS", "")
NUMBER = re.compile(r"(?<![\w.])(\+[1-9]([ -]?\d){6,14}|0(-?\d){9,10})(?!\d)", re.ASCII)  # +81312345678, 03-1234-5678
SECRETS = [r"\b\d{10}\.[0-9a-f]{64}\b"]  # the token of a stream; and whatever the environment calls a secret:
SECRETS += [re.escape(text) for name, text in os.environ.items() if re.search("_(KEY|TOKEN|SECRET|PASSWORD)$", name)]
SECRET = re.compile("|".join(text for text in SECRETS if len(text) >= 8))  # a shorter one would blot out plain words
STDOUT = 1  # its descriptor: sys.stdout has a lock that a writer who is stuck would hold until the very end
MAX_WAITING = 1000  # lines


def mask(text: str) -> str:
    """All digits but the last four become stars."""
    return text if LOG_NUMBERS == "full" else re.sub(r"\d(?=(\D*\d){4})", "*", text)


def as_line(seconds: float, fields: Mapping[str, Any]) -> bytes:
    """One line of JSON; the time is seconds since 1970."""
    clean: dict[str, Any] = {"ts": datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"}
    for name, value in fields.items():
        if isinstance(value, str):
            value = NUMBER.sub(lambda number: mask(number[0]), SECRET.sub("***", value))
        clean[name] = round(value, 3) if isinstance(value, float) else value
    text = json.dumps(clean, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace") + b"\n"  # half an emoji, which JSON allows, has no UTF-8


class Lines(logging.Handler):
    """Takes lines from any thread; one thread writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self.dropped = 0
        self.thread = threading.Thread(target=self.write, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """A log line, often from the thread that carries all calls: it must neither wait nor raise."""
        try:
            fields = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
            if record.exc_info:
                fields["traceback"] = logging.Formatter().formatException(record.exc_info)
            self.waiting.put_nowait(as_line(record.created, fields))
        except queue.Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def write(self) -> None:
        told = 0
        while (line := self.waiting.get()) is not None:
            if (dropped := self.dropped) > told:
                text = f"{dropped - told} log lines were dropped: standard output was not read"
                line += as_line(time.time(), {"level": "ERROR", "logger": "log", "message": text})
                told = dropped
            with suppress(OSError):  # standard output is closed, or its disk is full: the calls go on
                while line:
                    line = line[os.write(STDOUT, line) :]  # a pipe may take a part

    def close(self) -> None:
        """At the program's exit: let the last lines out, but do not wait for ever for somebody to read them."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=1)
            self.thread.join(1)
        super().close()


lines = Lines()
logging.getLogger().handlers = [lines]
if LOG_NUMBERS not in ("", "full"):
    log.error("LOG_NUMBERS is %r, so numbers are masked: set it to full, or not at all", LOG_NUMBERS)


def handler(event: str) -> Callable[..., None]:
    """A function for an event. The host knows it by its name, and **facts asks for all that the event has to tell."""

    def write(call: Any, at: float, **facts: Any) -> None:
        if event == "call_started":
            facts = {"stream": call.stream_sid, "caller": mask(call.caller), "called": mask(call.called)}
        happened = time.time() - (time.monotonic() - at)
        lines.waiting.put(as_line(happened, {"call": call.sid, "event": event, **facts}))

    write.__name__ = event
    return write


for event in EVENTS:
    globals()[event] = handler(event)
