"""What both sides said, in order: in the log line by line, and in a file for each call if TRANSCRIPTS names a folder.

The caller's words come from a transcription that takes its time: often the model answers first. What the model said is
told once it is known how much of it was heard, perhaps after the caller's next turn has begun. So a line gets its place
when the speaking begins, and its words when they come; it is told when every line before it has been told. What the
caller cut off is marked with how much of it they had heard.

    TRANSCRIPTS          a folder, e.g. /data/transcripts. Not set: nothing is written to disk, only to the log
    TRANSCRIPT_FORMAT    md (default): Markdown to read; jsonl: one JSON object a line, for programs
    LOG_NUMBERS          full: telephone numbers in full; otherwise all but the last four digits are masked

The file is <UTC time>-<call sid>.md or .jsonl, for its owner only (0600), and grows during the call.
"""

import json
import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger("transcript")

FORMAT = os.environ.get("TRANSCRIPT_FORMAT") or "md"
FOLDER = Path(os.environ["TRANSCRIPTS"]) if os.environ.get("TRANSCRIPTS") else None
PATIENCE_S = 20.0  # a transcription takes a few seconds at most: a turn older than this will get no words

if FORMAT not in ("md", "jsonl"):
    log.error("TRANSCRIPT_FORMAT is %r: set it to md or jsonl. No transcript is written", FORMAT)
    FOLDER = None
if FOLDER is not None:
    try:
        FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        log.error("TRANSCRIPTS: %s. Name a folder that can be written to. No transcript is written", fault)
        FOLDER = None


@dataclass
class Line:
    side: str  # caller or model
    at: float  # s, when the speaking began
    ended_at: float | None = None  # s, when the caller paused
    text: str | None = None  # None: not known yet; "": there were no words
    heard_ms: int | None = None  # None: heard to the end
    told: bool = False


@dataclass
class Transcript:
    began: float  # s, time.monotonic()
    path: Path | None = None
    lines: list[Line] = field(default_factory=list)
    words_came: bool = False  # of the transcription whose usage comes next

    def first_unknown(self, side: str) -> Line | None:
        return next((line for line in self.lines if line.side == side and line.text is None), None)


def call_started(call: Any, at: float) -> None:
    transcript = call.notes["transcript"] = Transcript(at)
    if FOLDER is None:
        return
    now, sid = time.gmtime(), re.sub(r"[^A-Za-z0-9]", "", call.sid)
    path = FOLDER / f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{sid}.{FORMAT}"
    path.touch(mode=0o600)
    transcript.path = path
    began, caller, called = time.strftime("%Y-%m-%d %H:%M:%SZ", now), masked(call.caller), masked(call.called)
    record = {"call": call.sid, "began": began, "caller": caller, "called": called}
    write(transcript, record, f"# 通話の記録 {began}\n\n{caller} → {called} ({call.sid})\n")


def caller_spoke(call: Any, at: float) -> None:
    transcript: Transcript = call.notes["transcript"]
    turns = [line for line in transcript.lines if line.side == "caller"]
    if not turns or turns[-1].ended_at is not None:  # else a new session hears the same turn again
        transcript.lines.append(Line("caller", at))


def caller_paused(call: Any, at: float) -> None:
    for line in call.notes["transcript"].lines:
        if line.side == "caller" and line.ended_at is None:
            line.ended_at = at


def caller_said(call: Any, at: float, text: str) -> None:
    tell(call, at)  # first of all give up turns that wait too long: these words are not theirs
    transcript: Transcript = call.notes["transcript"]
    if (line := transcript.first_unknown("caller")) is None:
        line = Line("caller", at, at)
        transcript.lines.append(line)
    line.text = text
    transcript.words_came = True
    tell(call, at)


def model_used(call: Any, at: float, usage: Any) -> None:
    """A transcription that found no words, as of a cough, is told by its usage alone."""
    transcript: Transcript = call.notes["transcript"]
    if isinstance(usage, dict) and "type" in usage:  # of a transcription: the usage of an answer has no type
        if not transcript.words_came and (line := transcript.first_unknown("caller")):
            line.text = ""
        transcript.words_came = False
    tell(call, at)


def model_spoke(call: Any, at: float) -> None:
    call.notes["transcript"].lines.append(Line("model", at))


def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
    transcript: Transcript = call.notes["transcript"]
    if (line := transcript.first_unknown("model")) is None:  # one more item of the answer that was told last
        if heard_ms == 0:
            return  # cut off before its first sound
        place = max((place for place, line in enumerate(transcript.lines) if line.side == "model"), default=-1) + 1
        line = Line("model", transcript.lines[place - 1].at if place else at)
        transcript.lines.insert(place, line)
    line.text, line.heard_ms = text, heard_ms
    tell(call, at)


def call_ended(call: Any, at: float) -> None:
    for line in call.notes["transcript"].lines:
        line.text = line.text or ""
    tell(call, at)


def tell(call: Any, at: float) -> None:
    """Log and write what has become known, up to the first line that may still become known."""
    transcript: Transcript = call.notes["transcript"]
    for line in transcript.lines:
        if line.text is None and line.ended_at is not None and at - line.ended_at > PATIENCE_S:
            line.text = ""
        if line.text is None:
            return
        if line.told:
            continue
        line.told = True
        text = " ".join(line.text.split())  # a line break would make two lines of one
        cut = "" if line.heard_ms is None else f" [cut off: {line.heard_ms} ms heard]"
        log.info("%s %s: %s%s", call.sid, line.side, text or "(no words)", cut)
        at_s = max(0.0, line.at - transcript.began)
        record = {"at_s": round(at_s, 1), "side": line.side, "text": text, "heard_ms": line.heard_ms}
        clock, name = f"{int(at_s) // 60}:{int(at_s) % 60:02}", "発信者" if line.side == "caller" else "AI"
        cut = "" if line.heard_ms is None else f" *(ここで遮られた。聞こえたのは {line.heard_ms / 1000:.1f} 秒)*"
        write(transcript, record, f"- {clock} **{name}** {text or '(言葉なし)'}{cut}")


def write(transcript: Transcript, record: dict[str, Any], markdown: str) -> None:
    if transcript.path is not None:
        with transcript.path.open("a", encoding="utf-8") as file:
            file.write((markdown if FORMAT == "md" else json.dumps(record, ensure_ascii=False)) + "\n")


def masked(number: str) -> str:
    return number if os.environ.get("LOG_NUMBERS") == "full" else re.sub(r"\d(?=(\D*\d){4})", "*", number)
