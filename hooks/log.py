"""Shows what happens in every call: on a terminal for people, elsewhere as JSON lines for programs.

    17:09:04 a1b2c3 call       +81******5678 → +81*****0000
    17:09:05 a1b2c3 model ◂    はい、鈴木です。  (after 0.27 s)
    17:09:09 a1b2c3 caller ▸   明日の東京の天気は？

    fly logs | grep CA0123…
    {"ts": "2026-11-27T08:09:05.120Z", "call": "CA0123…", "event": "caller_said", "text": "はい"}

The bridge writes all log lines to standard error; this file gives them their form. As text, there
is a line for each utterance, with the wait for it (latency.py) and what was not heard behind ✂. As
JSON, there are all events but model_words, and other lines as {"ts", "level", "logger",
"message"} with their numbers, and perhaps a "traceback"; what a hook prints comes as such a line.

    LOG_FORMAT=text     or json; not set: text when standard error is a terminal
    LOG_NUMBERS=full    telephone numbers in full; otherwise only their last four digits
    NO_COLOR=1          no colours on a terminal

Nothing is stored, and secrets are blotted out.
"""

import io
import json
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("call")

LOG_FORMAT = os.environ.get("LOG_FORMAT") or ("text" if sys.stderr.isatty() else "json")
if LOG_FORMAT not in ("text", "json"):
    sys.exit(f"LOG_FORMAT is {LOG_FORMAT!r}: give text or json")
LOG_NUMBERS = os.environ.get("LOG_NUMBERS", "")
if LOG_NUMBERS not in ("", "full"):
    sys.exit(f"LOG_NUMBERS is {LOG_NUMBERS!r}: give full, or leave it out to have numbers masked")

# +81312345678, 03-1234-5678, but not 0.0312345678
# (Each pattern begins with a plain character, because a line is searched for these much faster.)
NUMBER = re.compile(
    r"(?:\+(?<![\w.]\+)[1-9](?:[ -]?\d){6,14}|0(?<![\w.]0)(?:-?\d){9,10})(?!\d)", re.ASCII
)
# The token of a stream, and what the environment calls a secret, as it is and as JSON has it.
SECRETS = {r"\.(?<=\b\d{10}\.)[0-9a-f]{16}\.[0-9a-f]{64}\b"}
for name, value in os.environ.items():
    if re.search("_(KEY|TOKEN|SECRET|PASSWORD)$", name):
        for secret in value.split(","):
            if len(secret) >= 8:  # a shorter one may be a plain word
                SECRETS |= {re.escape(secret), re.escape(json.dumps(secret)[1:-1])}
SECRET = re.compile("|".join(sorted(SECRETS, key=len, reverse=True)))  # one may begin another


# One handler for each event, because each piece of the model's words would wake `any_event` as
# well, some 200 times a minute and for nothing: model_said has the same words.


def write(call: Any, at: float, event: str, **facts: Any) -> None:
    happened = time.time() - (time.monotonic() - at)
    log.info(event, extra={"call": call.sid, "event": event, "facts": facts, "happened": happened})


def call_started(call: Any, at: float) -> None:
    call.notes["log"] = {"began": at, "sent_ms": {}}
    caller, called = mask(call.caller), mask(call.called)
    write(call, at, "call_started", stream_sid=call.stream_sid, caller=caller, called=called)


def caller_said(call: Any, at: float, item: str, text: str) -> None:
    write(call, at, "caller_said", item=item, text=text)


def model_interrupted(call: Any, at: float, item: str, heard_ms: int, sent_ms: int) -> None:
    call.notes["log"]["sent_ms"][item] = sent_ms
    if LOG_FORMAT == "json":
        write(call, at, "model_interrupted", item=item, heard_ms=heard_ms, sent_ms=sent_ms)


def model_said(call: Any, at: float, item: str, text: str, heard_ms: int | None) -> None:
    facts: dict[str, Any] = {"item": item, "text": text, "heard_ms": heard_ms}
    waits_ms = call.notes["latency"].waits_ms if "latency" in call.notes else {}
    for fact, known in (("sent_ms", call.notes["log"]["sent_ms"]), ("wait_ms", waits_ms)):
        if item in known:
            facts[fact] = round(known[item])
    write(call, at, "model_said", **facts)


def tool_used(call: Any, at: float, name: str, arguments: str, result: str, seconds: float) -> None:
    facts = {"name": name, "arguments": arguments, "result": result}
    write(call, at, "tool_used", **facts, seconds=round(seconds, 3))


def key_pressed(call: Any, at: float, key: str) -> None:
    write(call, at, "key_pressed", key=key)


def call_ended(call: Any, at: float, reason: str) -> None:
    write(call, at, "call_ended", reason=reason, seconds=round(at - call.notes["log"]["began"], 1))


if LOG_FORMAT == "json":  # people need no line for these, or have one of the bridge's

    def model_asked(call: Any, at: float) -> None:
        write(call, at, "model_asked")

    def caller_started_speaking(call: Any, at: float, item: str) -> None:
        write(call, at, "caller_started_speaking", item=item)

    def caller_stopped_speaking(call: Any, at: float, item: str) -> None:
        write(call, at, "caller_stopped_speaking", item=item)

    def model_started_speaking(call: Any, at: float, item: str) -> None:
        write(call, at, "model_started_speaking", item=item)

    def model_failed(call: Any, at: float, error: str) -> None:
        write(call, at, "model_failed", error=error)

    def model_used(call: Any, at: float, usage: Any, model: str, kind: str) -> None:
        write(call, at, "model_used", usage=usage, model=model, kind=kind)


def mask(number: str) -> str:
    """All digits but the last four become stars."""
    return number if LOG_NUMBERS == "full" else re.sub(r"\d(?=(\D*\d){4})", "*", number)


def clean(text: str) -> str:
    """Text without secrets and whole telephone numbers."""
    text = NUMBER.sub(lambda number: mask(number[0]), SECRET.sub("***", text))
    return text.encode("utf-8", "replace").decode()  # JSON allows half an emoji, UTF-8 does not


TO_JSON = json.JSONEncoder(ensure_ascii=False, default=str)


class Json(logging.Formatter):
    USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        about = vars(record)
        created = about.get("happened", record.created)
        ts = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
        line = {"ts": ts.replace("+00:00", "Z")}
        if "facts" in about:
            line |= {"call": about["call"], "event": about["event"], **about["facts"]}
        else:
            line |= {"level": record.levelname, "logger": record.name}
            line |= {"message": record.getMessage()}
            line |= {name: about[name] for name in about if name not in self.USUAL}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return clean(TO_JSON.encode(line))


# The events that text shows: what stands before their words, and its colour.
COLUMNS = {
    "call_started": ("call", "1"),
    "caller_said": ("caller ▸", "36"),
    "model_said": ("model ◂", "32"),
    "tool_used": ("tool", "35"),
    "key_pressed": ("key", "36"),
    "call_ended": ("call", "1"),
}
MAX_TEXT = 160  # characters of a tool's result
DIM, STRUCK, RED, YELLOW = "2", "2;9", "31", "33"
COLOUR = sys.stderr.isatty() and "NO_COLOR" not in os.environ
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if COLOUR and colour and text else text


def plain(text: str) -> str:
    """What comes from outside must not steer the terminal."""
    return CONTROL.sub("�", clean(text))


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


class Text(logging.Formatter):
    """Time, the end of the call's id, who, what."""

    INDENT = "\n" + " " * 27

    def format(self, record: logging.LogRecord) -> str:
        facts, sid = getattr(record, "facts", None), getattr(record, "call", "")
        if facts:
            column, colour = COLUMNS[record.msg]
            body = self.words(record.msg, facts)
        else:
            column, colour = record.name.split(".")[0], DIM
            body = plain(record.getMessage())
        if record.levelno >= logging.WARNING:
            colour = RED if record.levelno >= logging.ERROR else YELLOW
            body = paint(f"{record.levelname} {body}", colour)
        if record.exc_info:
            body += "\n" + plain(self.formatException(record.exc_info))
        happened = time.localtime(getattr(record, "happened", record.created))
        clock = time.strftime("%H:%M:%S", happened)
        short = paint(f"{sid[-6:]:6}", str(32 + sum(sid.encode()) % 5))  # a colour for each call
        start = f"{paint(clock, DIM)} {short} {paint(f'{column:10}', colour)} "
        return start + body.replace("\n", self.INDENT)

    def words(self, event: str, facts: dict[str, Any]) -> str:
        remarks = []
        match event:
            case "call_started":
                text = one_line(f"{facts['caller']} → {facts['called']}")
            case "caller_said":
                text = one_line(facts["text"]) or paint("(no words)", DIM)
            case "model_said":
                text = one_line(facts["text"])
                if "wait_ms" in facts:
                    remarks.append(f"after {facts['wait_ms'] / 1000:.2f} s")
                if (heard_ms := facts["heard_ms"]) == 0:
                    remarks.append("not heard")
                    text = paint(f"✂ {text}", STRUCK)
                elif sent_ms := facts.get("sent_ms"):
                    remarks.append(f"heard {heard_ms / 1000:.1f} of {sent_ms / 1000:.1f} s")
                    # Where in the words that is, nobody knows better.
                    cut = round(len(text) * heard_ms / sent_ms)
                    text = text[:cut] + paint(f" ✂ {text[cut:]}", STRUCK)
                elif heard_ms is not None:  # the call has ended meanwhile
                    remarks.append(f"heard {heard_ms / 1000:.1f} s")
            case "tool_used":
                text = one_line(f"{facts['name']}({facts['arguments']}) → {facts['result']}")
                text = text[:MAX_TEXT] + "…" * (len(text) > MAX_TEXT)
                remarks.append(f"{facts['seconds']:.2f} s")
            case "call_ended":
                text = f"ended: {one_line(facts['reason'])}"
                remarks.append(f"{int(facts['seconds']) // 60}:{int(facts['seconds']) % 60:02}")
            case _:
                text = one_line(facts["key"])
        return text + paint(f"  ({', '.join(remarks)})" if remarks else "", DIM)


class Printed(io.RawIOBase):
    """Standard output as log lines: what a hook prints must not tear the JSON."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        for line in bytes(data).decode().splitlines():
            logging.getLogger("print").info("%s", line)
        return len(data)


for handler in logging.getLogger().handlers:
    handler.setFormatter(Text() if LOG_FORMAT == "text" else Json())
if LOG_FORMAT == "json":
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(Printed()), "utf-8", "replace", line_buffering=True
    )
