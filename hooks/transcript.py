"""Writes down what both sides say, in the order of speaking: in the log, and in a file for each call.

    TRANSCRIPTS=/data/transcripts    the folder of the files. Not set: nothing is written to disk, only to the log
    TRANSCRIPT_FORMAT=md             md: Markdown to read; jsonl: one JSON object a line, for programs
    LOG_NUMBERS=full                 telephone numbers in full; otherwise only their last four digits are shown

A file is <UTC time>-<call sid>.md or .jsonl, for its owner only (0600), and grows during the call.

Words come late: the caller's when they are transcribed, often after the answer has begun; the model's when it is known
how much of them was heard. So a line waits for its words, and those behind it wait for their turn.
"""

import json
import logging
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger("transcript")

PATIENCE_S = 20.0  # transcribing takes a few seconds: what is not there by then will not come

FOLDER = os.environ.get("TRANSCRIPTS", "").strip()
FORMAT = os.environ.get("TRANSCRIPT_FORMAT") or "md"
if FORMAT not in ("md", "jsonl"):
    log.error("TRANSCRIPT_FORMAT is %r: set it to md or jsonl. No file is written", FORMAT)
    FOLDER = ""
if FOLDER:
    try:
        Path(FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as fault:
        log.error("TRANSCRIPTS: %s. Name a folder that can be written to. No file is written", fault)
        FOLDER = ""


@dataclass
class Line:
    side: str  # caller or model
    at: float  # s, when the speaking began
    given_up_at: float = math.inf  # s, when to wait for its words no longer
    text: str | None = None  # None: not known yet
    heard_ms: int | None = None  # None: all of it

    def waits(self, at: float) -> bool:
        return self.text is None and at < self.given_up_at


@dataclass
class Transcript:
    began: float  # s
    said_until: float  # s, the end of what the model said last
    path: Path | None = None
    lines: list[Line] = field(default_factory=list)  # that are not written yet, in the order of speaking
    caller_spoke_at: float = 0.0  # s
    words_came: bool = False  # of the transcription whose usage is told next


def call_started(call: Any, at: float) -> None:
    transcript = call.notes["transcript"] = Transcript(at, said_until=at)
    if FOLDER:
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stamp, sid = (re.sub(r"[^A-Za-z0-9]", "", text) for text in (began, call.sid))
        path = Path(FOLDER, f"{stamp}-{sid}.{FORMAT}")
        path.touch(mode=0o600)
        transcript.path = path
        caller, called = masked(call.caller), masked(call.called)
        record = {"call": call.sid, "began": began, "caller": caller, "called": called}
        append(path, record, f"# 通話の記録 {began}\n\n{caller} → {called} ({call.sid})\n")


def caller_spoke(call: Any, at: float) -> None:
    call.notes["transcript"].caller_spoke_at = at


def caller_paused(call: Any, at: float) -> None:
    transcript = call.notes["transcript"]
    transcript.lines.append(Line("caller", transcript.caller_spoke_at, at + PATIENCE_S))


def caller_said(call: Any, at: float, text: str) -> None:
    call.notes["transcript"].words_came = True
    take_words(call, at, "caller", text)


def model_used(call: Any, at: float, usage: Any) -> None:
    """A transcription that found no words, as of a cough, is told by its usage alone."""
    if isinstance(usage, dict) and "type" in usage:  # the usage of an answer has no type
        if not call.notes["transcript"].words_came:
            take_words(call, at, "caller", "")
        call.notes["transcript"].words_came = False


def model_spoke(call: Any, at: float) -> None:
    call.notes["transcript"].lines.append(Line("model", at))


def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
    take_words(call, at, "model", text, heard_ms)
    call.notes["transcript"].said_until = at


def call_ended(call: Any) -> None:
    for line in call.notes["transcript"].lines:
        write(call, line)


def take_words(call: Any, at: float, side: str, text: str, heard_ms: int | None = None) -> None:
    """Give words to the first line of this side that waits for some; then write what need not wait any more."""
    transcript = call.notes["transcript"]
    lines = transcript.lines
    line = next((line for line in lines if line.side == side and line.waits(at)), None)
    if line is None:  # the model's is the second item of an answer; the caller's comes too late for its turn
        line = Line(side, transcript.said_until if side == "model" else at)
        lines.append(line)
    line.text, line.heard_ms = text, heard_ms
    while lines and not lines[0].waits(at):
        write(call, lines.pop(0))


def write(call: Any, line: Line) -> None:
    if line.heard_ms == 0:
        return  # cut off before its first sound
    text = " ".join((line.text or "").split())  # a line break would make two lines of one
    cut = f" [cut off: {line.heard_ms} ms heard]" if line.heard_ms else ""
    log.info("%s %s: %s%s", call.sid, line.side, text or "(no words)", cut)
    transcript = call.notes["transcript"]
    if transcript.path:
        at_s = line.at - transcript.began
        record = {"at_s": round(at_s, 1), "side": line.side, "text": text, "heard_ms": line.heard_ms}
        name = "発信者" if line.side == "caller" else "AI"
        clock = f"{int(at_s) // 60}:{int(at_s) % 60:02}"
        cut = f" *（{line.heard_ms / 1000:.1f} 秒まで再生）*" if line.heard_ms else ""
        append(transcript.path, record, f"- {clock} **{name}** {text or '（言葉なし）'}{cut}")


def append(path: Path, record: dict[str, Any], markdown: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write((json.dumps(record, ensure_ascii=False) if FORMAT == "jsonl" else markdown) + "\n")


def masked(number: str) -> str:
    return number if os.environ.get("LOG_NUMBERS") == "full" else re.sub(r"\d(?=(\D*\d){4})", "*", number)
