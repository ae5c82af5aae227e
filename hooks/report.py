"""Writes a page for each call: who spoke when, what was said and heard, barge-ins, waits, tools and cost.

One HTML file that needs no network; on a screen, on a phone, on paper. With hooks/recorder.py it plays the recording
from wherever one clicks; the page links to it, so keep both where they are. With hooks/cost.py it names the cost. How
long the caller waited counts from where the model noticed that they had paused. How it looks is in _report.html.

    REPORTS       folder for the pages; unset: none is written
    LOG_NUMBERS   full: telephone numbers are written out; otherwise their last four digits

Files: <UTC time>-<call sid>.html, readable by this user only. They hold what was said.
"""

import logging
import os
import re
import secrets
import tempfile
import time
from dataclasses import dataclass, field
from html import escape
from math import inf
from pathlib import Path
from statistics import median
from string import Template
from typing import Any
from urllib.parse import quote

log = logging.getLogger("report")

ROW_S = 30.0  # seconds of the call in one row of the time line
WORDS_WITHIN_S = 10.0  # a turn whose words have not come by then had none: a cough, a noise
KINDS = {
    "caller": "発信者 Caller",
    "model": "モデル Model",
    "tool": "ツール Tool",
    "key": "キー Key",
    "fault": "障害 Fault",
}
PAGE = Template(Path(__file__).with_name("_report.html").read_text("utf-8"))

FOLDER = os.environ.get("REPORTS", "").strip()
if FOLDER:
    try:
        Path(FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as fault:
        log.error("REPORTS: %s. Name a folder that can be written to. No report is written", fault)
        FOLDER = ""


@dataclass
class Entry:
    """One bar of the time line, and one paragraph of the transcript. Times are time.monotonic()."""

    kind: str  # a key of KINDS
    begin: float
    end: float = inf  # until it is known
    text: str = ""
    unheard: str = ""  # the rest of the text, which a barge-in cut off
    unheard_s: float = 0.0  # how long that would have been
    wait_s: float | None = None  # how long the caller had waited for it


@dataclass
class Story:
    """What has happened in a call."""

    began: float
    date: time.struct_time = field(default_factory=time.gmtime)
    entries: list[Entry] = field(default_factory=list)
    said_until: float = 0.0  # the end of what the model said last
    sent_ms: int = 0  # how long the answer was that a barge-in has just cut

    def under_way(self, kind: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.kind == kind and entry.end == inf), None)


if FOLDER:

    def call_started(call: Any, at: float) -> None:
        call.notes["report"] = Story(at, said_until=at)

    def caller_spoke(call: Any, at: float) -> None:
        if not call.notes["report"].under_way("caller"):  # else a new session hears the same turn again
            call.notes["report"].entries.append(Entry("caller", at))

    def caller_paused(call: Any, at: float) -> None:
        if turn := call.notes["report"].under_way("caller"):
            turn.end = at

    def caller_said(call: Any, at: float, text: str) -> None:
        """Comes after the turn, sometimes after the answer: the words belong to the oldest turn that has none."""
        for entry in call.notes["report"].entries:
            if entry.kind == "caller" and not entry.text and at - entry.end <= WORDS_WITHIN_S:
                entry.text = text
                return
        call.notes["report"].entries.append(Entry("caller", at, at, text))

    def model_spoke(call: Any, at: float) -> None:
        call.notes["report"].entries.append(Entry("model", at))

    def model_interrupted(call: Any, sent_ms: int) -> None:
        call.notes["report"].sent_ms = sent_ms

    def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
        """Comes when it has been heard to its end, or cut. What is to be heard next may have been sent by then."""
        story: Story = call.notes["report"]
        answer = story.under_way("model")
        if answer is None:
            if heard_ms == 0:
                return  # cut before its first sound
            answer = Entry("model", story.said_until)  # the rest of what was said last
            story.entries.append(answer)
        answer.begin = max(answer.begin, story.said_until)
        answer.end = story.said_until = at
        answer.text = text
        if heard_ms is not None:
            answer.end = min(answer.begin + heard_ms / 1000, at)
            answer.unheard_s = max(0, story.sent_ms - heard_ms) / 1000
            split = round(len(text) * heard_ms / max(heard_ms, story.sent_ms, 1))  # the nearest that anybody knows
            answer.text, answer.unheard = text[:split], text[split:]
            story.sent_ms = 0

    def tool_used(call: Any, at: float, name: str, arguments: str, result: str, seconds: float) -> None:
        text = f"{name}({arguments}) → {result} ({seconds:.2f} s)"
        call.notes["report"].entries.append(Entry("tool", at - seconds, at, text))

    def key_pressed(call: Any, at: float, key: str) -> None:
        entries = call.notes["report"].entries
        if not entries or entries[-1].kind != "key":  # else a number, key by key
            entries.append(Entry("key", at))
        entries[-1].text += key
        entries[-1].end = at

    def model_failed(call: Any, at: float, error: str) -> None:
        call.notes["report"].entries.append(Entry("fault", at, at, error))

    def call_ended(call: Any, at: float, reason: str) -> None:
        time.sleep(max(0.0, at + 0.5 - time.monotonic()))  # cost.py counts in a thread of its own, perhaps behind this
        story: Story = call.notes.pop("report")
        sid = re.sub("[^A-Za-z0-9]", "", call.sid)
        path = Path(FOLDER, f"{time.strftime('%Y%m%dT%H%M%SZ', story.date)}-{sid}.html")
        path.touch(mode=0o600)
        path.write_text(page(call, story, at, reason), "utf-8", errors="replace")  # JSON may hold half a character
        log.info("%s", path)


# What the caller, the model and the tools say is a stranger's, and goes through `escape`. Should some slip through all
# the same, the page's Content-Security-Policy runs no script but its own, and loads only the recording.


def page(call: Any, story: Story, ended: float, reason: str) -> str:
    length = ended - story.began
    entries = sorted(story.entries, key=lambda entry: entry.begin)
    waits: list[float] = []
    waiting_since: float | None = story.began  # None: an answer has come
    for entry in entries:
        if entry.kind == "caller":
            waiting_since = entry.end
        elif entry.kind == "model" and waiting_since is not None and entry.begin >= waiting_since:
            entry.wait_s = entry.begin - waiting_since
            waits.append(entry.wait_s)
            waiting_since = None
        entry.begin = max(0.0, entry.begin - story.began)
        entry.end = min(entry.end, ended) - story.began
    facts = {
        "長さ Length": clock(length),
        "応答まで Median wait": f"{median(waits):.2f} s" if waits else "–",
        "最長 Longest wait": f"{max(waits):.2f} s" if waits else "–",
        "割り込み Barge-ins": sum(entry.unheard_s > 0 for entry in entries),
        "ツール Tool calls": sum(entry.kind == "tool" for entry in entries),
        "費用 OpenAI cost": dollars(call.notes.get("cost", {})),
    }
    sound = ""
    if recording := call.notes.get("recording"):
        address = quote(Path(os.path.relpath(recording, FOLDER)).as_posix())
        sound = f'<audio controls preload="metadata" src="{address}"></audio>'
    return PAGE.substitute(
        nonce=secrets.token_urlsafe(),
        date=time.strftime("%Y-%m-%d %H:%M:%S UTC", story.date),
        about=escape(f"{masked(call.caller)} → {masked(call.called)} · {reason} · {call.sid}"),
        facts="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()),
        sound=sound,
        row_s=ROW_S,
        rows="".join(row(entries, number * ROW_S, length) for number in range(int(length // ROW_S) + 1)),
        turns="".join(turn(entry) for entry in entries),
    )


def row(entries: list[Entry], begin: float, length: float) -> str:
    """One row of the time line, as SVG: across in percent, so that it fits every screen and paper."""

    def bar(kind: str, since: float, until: float, title: str = "") -> str:
        left, right = max(since, begin), min(max(until, since + 0.1), begin + ROW_S)  # a moment is 0.1 s wide
        if left >= right:
            return ""
        x, width = (left - begin) / ROW_S * 100, (right - left) / ROW_S * 100
        return f'<rect class="{kind}" x="{x:.2f}%" width="{width:.2f}%"><title>{escape(title)}</title></rect>'

    bars = bar("ground", begin, length)
    for entry in entries:
        if entry.wait_s is not None:
            bars += bar("wait", entry.begin - entry.wait_s, entry.begin, f"{entry.wait_s:.2f} s")
        if entry.unheard_s:
            bars += bar("unheard", entry.end, entry.end + entry.unheard_s, entry.unheard[:200])
        bars += bar(entry.kind, entry.begin, entry.end, entry.text[:200])
    for entry in entries:
        if entry.unheard_s:
            bars += bar("barge-in", entry.end, entry.end, "割り込み Barge-in")
    return f'<div class="row"><time>{clock(begin)}</time><svg data-at="{begin}">{bars}</svg></div>'


def turn(entry: Entry) -> str:
    remarks = ""
    if entry.wait_s is not None:
        remarks = f'<small>応答まで <i class="wait" style="--s: {entry.wait_s:.2f}"></i> {entry.wait_s:.2f} s</small>'
    if entry.unheard_s:
        heard_s = entry.end - entry.begin
        remarks += f"<small>中断 Cut: {heard_s:.1f} / {heard_s + entry.unheard_s:.1f} s heard</small>"
    unheard = f"<s>{escape(entry.unheard)}</s>" if entry.unheard else ""
    return (
        f'<li class="{entry.kind}" data-at="{entry.begin:.2f}" data-until="{entry.end:.2f}">'
        f"<time>{clock(entry.begin)}</time><h3>{KINDS[entry.kind]}{remarks}</h3>"
        f"<p>{escape(entry.text)}{unheard}</p></li>"
    )


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def masked(number: str) -> str:
    return number if os.environ.get("LOG_NUMBERS") == "full" else re.sub(r"\d(?=(\D*\d){4})", "•", number)


def dollars(cost: dict[str, Any]) -> str:
    if cost.get("usd") is not None:
        return f"${cost['usd']:.4f}"
    return f"at least ${cost['known_usd']:.4f}" if "known_usd" in cost else "–"
