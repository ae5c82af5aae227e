"""Writes what happens to standard output, one JSON object a line, so that a call can be followed afterwards.

    fly logs | grep CA0123…
    {"ts": "2026-11-23T07:46:05.120Z", "call": "CA0123…", "event": "caller_said", "text": "もしもし"}

These are all events but the audio, with the words of both sides: take out of EVENTS what must not be in a log. What the
bridge, the hooks and the libraries log comes as {"ts", "level", "logger", "message"}, perhaps with a "traceback".

    LOG_NUMBERS=full    telephone numbers in full; otherwise only their last four digits are shown

Nothing is stored, and secrets are blotted out. No call waits for whoever reads standard output: events wait in this
file's own thread, and log lines that find the queue full are dropped and counted.
"""

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("log")

EVENTS = ["call_started", "model_asked", "caller_spoke", "caller_paused", "caller_said", "model_spoke", "model_said"]
EVENTS += ["model_interrupted", "model_used", "model_failed", "tool_used", "key_pressed", "call_ended"]

LOG_NUMBERS = os.environ.get("LOG_NUMBERS", "")
NUMBER = re.compile(r"(?<![\w.])(\+[1-9]([ -]?\d){6,14}|0(-?\d){9,10})(?!\d)", re.ASCII)  # +81312345678, 03-1234-5678
SECRETS = [r"\b\d{10}\.[0-9a-f]{64}\b"]  # the token of a stream; and what the environment calls a secret:
for name, text in os.environ.items():
    if re.search("_(KEY|TOKEN|SECRET|PASSWORD)$", name) and len(text) >= 8:  # a shorter one may be a plain word
        SECRETS.append(re.escape(text))
SECRET = re.compile("|".join(SECRETS))


def mask(text: str) -> str:
    """All digits but the last four become stars."""
    return text if LOG_NUMBERS == "full" else re.sub(r"\d(?=(\D*\d){4})", "*", text)


def as_line(seconds: float, fields: dict[str, Any]) -> bytes:
    """One line of JSON; the time is in seconds since 1970."""
    line = {"ts": datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    for name, value in fields.items():
        if isinstance(value, str):
            value = NUMBER.sub(lambda number: mask(number[0]), SECRET.sub("***", value))
        line[name] = value
    text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "replace")  # half an emoji, which JSON allows, has no UTF-8


class Lines(logging.Handler):
    """Takes lines from any thread; a thread of its own writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: queue.Queue[bytes | None] = queue.Queue(maxsize=1000)
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
        reported = 0
        while (line := self.waiting.get()) is not None:
            if (dropped := self.dropped) > reported:
                text = f"{dropped - reported} log lines were dropped: standard output was not read"
                line += as_line(time.time(), {"level": "ERROR", "logger": "log", "message": text})
                reported = dropped
            with suppress(OSError):  # standard output is closed, or its disk is full: the calls go on
                while line:
                    line = line[os.write(1, line) :]  # not sys.stdout: a writer stuck in it would hold its lock

    def close(self) -> None:
        """At exit: let the last lines out, but do not wait for ever for somebody to read them."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=1)
            self.thread.join(1)
        super().close()


lines = Lines()
logging.getLogger().handlers = [lines]
if LOG_NUMBERS not in ("", "full"):
    log.error("LOG_NUMBERS is %r, so numbers are masked: set it to full, or not at all", LOG_NUMBERS)


def handler(event: str) -> Callable[..., None]:
    """A handler for an event. The host goes by its name, and gives it all that there is to tell, as **facts."""

    def handle(call: Any, at: float, **facts: Any) -> None:
        if event == "call_started":
            facts = {"stream": call.stream_sid, "caller": mask(call.caller), "called": mask(call.called)}
        happened = time.time() - (time.monotonic() - at)
        lines.waiting.put(as_line(happened, {"call": call.sid, "event": event, **facts}))

    handle.__name__ = event
    return handle


for event in EVENTS:
    globals()[event] = handler(event)
