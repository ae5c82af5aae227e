"""Writes a page for each call: who spoke when, what was said and heard, barge-ins, waits, tools and cost.

One HTML file that needs no network; on a screen, on a phone, on paper. With hooks/recorder.py it plays the recording
from wherever one clicks; the page links to it, so keep both where they are. With hooks/cost.py it names the cost. How
long the caller waited counts from where the model noticed that they had paused. How it looks: hooks/_report.html.

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
COST_WITHIN_S = 0.5  # cost.py counts in a thread of its own, perhaps a moment behind this one
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
    """One bar of the time line, and one paragraph of the transcript. Times are seconds since the call began."""

    kind: str  # a key of KINDS
    begin: float
    end: float = inf  # until it is known
    text: str = ""
    unheard: str = ""  # the rest of the text, which a barge-in cut off
    unheard_until: float = 0.0  # when it would have come to its end
    wait: float | None = None  # how long the caller had waited for it
    note: str = ""


@dataclass
class Story:
    """What has happened in a call."""

    began: float  # time.monotonic()
    date: time.struct_time = field(default_factory=time.gmtime)
    entries: list[Entry] = field(default_factory=list)
    waiting_since: float | None = 0.0  # the caller has come, or has spoken, and nobody has answered yet
    said_until: float = 0.0  # the end of what the model said last
    sent_s: float = 0.0  # how long the answer was that a barge-in has just cut

    def under_way(self, kind: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.kind == kind and entry.end == inf), None)


def story_of(call: Any, at: float) -> tuple[Story, float]:
    story: Story = call.notes["report"]
    return story, max(0.0, at - story.began)


if FOLDER:

    def call_started(call: Any, at: float) -> None:
        call.notes["report"] = Story(at)

    def caller_spoke(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        story.waiting_since = None
        if not story.under_way("caller"):  # else a new session hears the same turn again
            story.entries.append(Entry("caller", now))

    def caller_paused(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        story.waiting_since = now
        if turn := story.under_way("caller"):
            turn.end = now

    def caller_said(call: Any, at: float, text: str) -> None:
        """Comes after the turn, sometimes after the answer: the words belong to the oldest turn that has none."""
        story, now = story_of(call, at)
        for entry in story.entries:
            if entry.kind == "caller" and not entry.text and now - entry.end <= WORDS_WITHIN_S:
                entry.text = text
                return
        story.entries.append(Entry("caller", now, now, text))

    def model_spoke(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        wait = None if story.waiting_since is None else now - story.waiting_since
        story.waiting_since = None
        story.entries.append(Entry("model", now, wait=wait))

    def model_interrupted(call: Any, at: float, sent_ms: int) -> None:
        story, _ = story_of(call, at)
        story.sent_s = sent_ms / 1000

    def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
        """Comes when it has been heard to its end, or cut. By then, what is to be heard next may have been sent."""
        story, now = story_of(call, at)
        answer = story.under_way("model")
        if answer is None:
            if heard_ms == 0:
                return  # cut before its first sound
            answer = Entry("model", story.said_until)  # the rest of what was said last
            story.entries.append(answer)
        answer.begin = max(answer.begin, story.said_until)
        answer.end = story.said_until = now
        answer.text = text
        if heard_ms is not None:
            heard_s, sent_s = heard_ms / 1000, max(heard_ms / 1000, story.sent_s)
            split = round(len(text) * heard_s / sent_s) if sent_s else 0  # the nearest that anybody knows
            answer.text, answer.unheard = text[:split], text[split:]
            answer.end = min(answer.begin + heard_s, now)
            answer.unheard_until = answer.begin + sent_s
            answer.note = f"中断 Cut: {heard_s:.1f} / {sent_s:.1f} s heard"
            story.sent_s = 0.0

    def tool_used(call: Any, at: float, name: str, arguments: str, result: str, seconds: float) -> None:
        story, now = story_of(call, at)
        text, note = f"{name}({arguments}) → {result}", f"{seconds:.2f} s"
        story.entries.append(Entry("tool", max(0.0, now - seconds), now, text, note=note))

    def key_pressed(call: Any, at: float, key: str) -> None:
        story, now = story_of(call, at)
        if story.entries and story.entries[-1].kind == "key":  # a number, key by key
            story.entries[-1].text += key
            story.entries[-1].end = now
        else:
            story.entries.append(Entry("key", now, now, key))

    def model_failed(call: Any, at: float, error: str) -> None:
        story, now = story_of(call, at)
        story.entries.append(Entry("fault", now, now, error))

    def call_ended(call: Any, at: float, reason: str) -> None:
        time.sleep(max(0.0, at + COST_WITHIN_S - time.monotonic()))
        story, now = story_of(call, at)
        del call.notes["report"]
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', story.date)}-{re.sub('[^A-Za-z0-9]', '', call.sid)}.html"
        path = Path(FOLDER, name)
        path.touch(mode=0o600)
        path.write_text(page(call, story, now, reason), "utf-8", errors="replace")  # JSON may hold half a character
        log.info("%s", path)


# What the caller, the model and the tools say is a stranger's, and goes through `escape`. Should some slip through all
# the same, the page's Content-Security-Policy runs no script but its own, and loads only the recording.


def page(call: Any, story: Story, call_end: float, reason: str) -> str:
    entries = sorted(story.entries, key=lambda entry: entry.begin)
    for entry in entries:
        entry.end = min(entry.end, call_end)
    waits = [entry.wait for entry in entries if entry.wait is not None]
    facts = {
        "長さ Length": clock(call_end),
        "応答まで Median wait": f"{median(waits):.2f} s" if waits else "–",
        "最長 Longest wait": f"{max(waits):.2f} s" if waits else "–",
        "割り込み Barge-ins": sum(entry.unheard_until > entry.end for entry in entries),
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
        rows="".join(row(entries, number * ROW_S, call_end) for number in range(int(call_end // ROW_S) + 1)),
        turns="".join(turn(entry) for entry in entries),
    )


def row(entries: list[Entry], begin: float, call_end: float) -> str:
    """One row of the time line, as SVG: across in percent, so that it fits every screen and paper."""

    def bar(kind: str, since: float, until: float, title: str = "") -> str:
        left, right = max(since, begin), min(max(until, since + 0.1), begin + ROW_S)  # a moment is 0.1 s wide
        if left >= right:
            return ""
        x, width = (left - begin) / ROW_S * 100, (right - left) / ROW_S * 100
        return f'<rect class="{kind}" x="{x:.2f}%" width="{width:.2f}%"><title>{escape(title)}</title></rect>'

    bars = [bar("ground", begin, call_end)]
    for entry in entries:
        if entry.wait is not None:
            bars.append(bar("wait", entry.begin - entry.wait, entry.begin, f"{entry.wait:.2f} s"))
        if entry.unheard:
            bars.append(bar("unheard", entry.end, entry.unheard_until, entry.unheard[:200]))
        bars.append(bar(entry.kind, entry.begin, entry.end, entry.text[:200]))
    bars += [bar("barge-in", entry.end, entry.end, entry.note) for entry in entries if entry.unheard_until > entry.end]
    return f'<div class="row"><time>{clock(begin)}</time><svg data-at="{begin}">{"".join(bars)}</svg></div>'


def turn(entry: Entry) -> str:
    wait = unheard = ""
    if entry.wait is not None:
        wait = f'<small>応答まで <i class="wait" style="--seconds: {entry.wait:.2f}"></i> {entry.wait:.2f} s</small>'
    if entry.unheard:
        unheard = f"<s>{escape(entry.unheard)}</s>"
    return (
        f'<li class="{entry.kind}" data-at="{entry.begin:.2f}" data-until="{entry.end:.2f}">'
        f"<time>{clock(entry.begin)}</time><h3>{KINDS[entry.kind]}{wait}<small>{entry.note}</small></h3>"
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
