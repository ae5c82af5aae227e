"""Writes down what both sides say, and the keys, in the order of speaking: a file for each call.

    TRANSCRIPTS=/data/transcripts    the folder of the files. Not set: nothing is written
    TRANSCRIPT_FORMAT=md             md: Markdown to read; jsonl: a JSON object a line, for programs
    LOG_NUMBERS=full                 whole telephone numbers; otherwise only their last four digits

A file is <UTC time>-<call sid>.md or .jsonl, for its owner only (0600), and grows during the call.
call.notes["transcript"] has its path.

Words come late: the caller's when they are transcribed, often after the answer has begun; the
model's when it is known how much of them was heard. So a line waits for its words, and those behind
it wait for their turn. Words find their line by `item`, which all events of one turn share.
"""

import json
import logging
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger("transcript")

TITLE = "通話の記録"
SIDES = {"caller": "発信者", "model": "AI", "key": "キー"}
NO_WORDS, BROKEN_OFF = "（発話なし）", "（話の途中で途切れました）"
ENDED = "通話終了"
# What the bridge says of an end; what is not here stands as it is.
ENDINGS = {
    "caller hung up": "発信者が切断",
    "hung up": "AI が終了",
    "transferred": "転送",
    "model lost": "AI との接続が切断",
    "time limit": "制限時間",
    "shutdown": "システムの停止",
    "twilio lost": "電話回線の切断",
}

FORMAT = os.environ.get("TRANSCRIPT_FORMAT") or "md"
if FORMAT not in ("md", "jsonl"):
    sys.exit(f"TRANSCRIPT_FORMAT is {FORMAT!r}: give md or jsonl")
if FOLDER := os.environ.get("TRANSCRIPTS", "").strip():
    try:  # now, because the first call must not be the first to find out
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as error:
        sys.exit(f"TRANSCRIPTS is {FOLDER!r}: {error.strerror}: give a folder to write to")


@dataclass
class Line:
    side: str  # a key of SIDES
    at: float  # s, when the speaking began
    text: str | None = None  # None: not known yet
    heard_ms: int | None = None  # None: all of it
    finished: bool = False  # the caller was heard to stop


@dataclass
class Transcript:
    path: Path
    began: float  # s
    lines: dict[str, Line] = field(default_factory=dict)  # by item, those that are not written yet


def any_event(call: Any, at: float, event: str, facts: dict[str, Any]) -> None:
    if event == "call_started":
        begin(call, at)
    transcript: Transcript = call.notes["transcript_lines"]
    lines, item = transcript.lines, facts.get("item", "")
    match event:
        case "caller_started_speaking":
            lines[item] = Line("caller", at)
        case "caller_stopped_speaking" if item in lines:
            lines[item].finished = True
        case "caller_said":
            lines.setdefault(item, Line("caller", at)).text = facts["text"]
            write_known(transcript)
        case "model_started_speaking":
            lines[item] = Line("model", at)
        case "model_said" if item in lines:
            lines[item].text, lines[item].heard_ms = facts["text"], facts["heard_ms"]
            for line in lines.values():
                if line.side == "model" and line.text is None:
                    line.at = at  # it was sent ahead, and is heard from here on
            write_known(transcript)
        case "key_pressed":
            last = next(reversed(lines.values()), None)
            if last and last.side == "key":
                last.text = f"{last.text}{facts['key']}"  # a number, key by key
            else:
                lines[f"key {at}"] = Line("key", at, facts["key"])
        case "call_ended":
            for line in lines.values():
                line.text = line.text or ""
            write_known(transcript)
            end(call, at - transcript.began, facts["reason"])


def begin(call: Any, at: float) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(FOLDER, f"{stamp}-{call.sid}.{FORMAT}").resolve()
    call.notes["transcript"] = str(path)
    call.notes["transcript_lines"] = Transcript(path, at)
    path.touch(mode=0o600)
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    caller, called = masked(call.caller), masked(call.called)
    record = {"call": call.sid, "began": began, "caller": caller, "called": called}
    append(path, record, f"# {TITLE} {began}\n\n{caller} → {called} ({call.sid})\n")


def write_known(transcript: Transcript) -> None:
    """Write the lines in the order of speaking, up to the first that still waits for its words."""
    for item, line in sorted(transcript.lines.items(), key=lambda entry: entry[1].at):
        if line.text is None:
            return
        del transcript.lines[item]
        if line.heard_ms != 0:  # 0: cut off before its first sound
            write(transcript, line)


def write(transcript: Transcript, line: Line) -> None:
    at_s, text = line.at - transcript.began, " ".join((line.text or "").split())
    record = {"at_s": round(at_s, 1), "side": line.side, "text": text, "heard_ms": line.heard_ms}
    if not text and line.side == "caller" and not line.finished:
        text, record["broken_off"] = BROKEN_OFF, True
    cut = f" *（{line.heard_ms / 1000:.1f} 秒まで再生）*" if line.heard_ms else ""
    words = f"**{SIDES[line.side]}** {text or NO_WORDS}{cut}"
    append(transcript.path, record, f"- {clock(at_s)} {words}")


def end(call: Any, seconds: float, reason: str) -> None:
    path = call.notes.pop("transcript_lines").path
    ending = f"**{ENDED}** {ENDINGS.get(reason, reason)}"
    append(path, {"at_s": round(seconds, 1), "ended": reason}, f"- {clock(seconds)} {ending}")
    log.info(path.as_uri(), extra={"call": call.sid})


def append(path: Path, record: dict[str, Any], markdown: str) -> None:
    line = json.dumps(record, ensure_ascii=False) if FORMAT == "jsonl" else markdown
    with path.open("a", encoding="utf-8", errors="replace") as file:  # for half an emoji
        file.write(line + "\n")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def masked(number: str) -> str:
    full = os.environ.get("LOG_NUMBERS") == "full"
    return number if full else re.sub(r"\d(?=(\D*\d){4})", "*", number)


if not FOLDER:  # then the bridge need not tell this file anything
    del any_event
