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
WORDS_WITHIN_S = 3.0  # of the turns that ended so recently, the oldest gets the words that come
KINDS = dict(caller="発信者 Caller", model="モデル Model", tool="ツール Tool", key="キー Key", fault="エラー Fault")
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
    """One bar of the time line and, if its kind is one of KINDS, one paragraph of the transcript."""

    kind: str  # the CSS class
    begin: float  # time.monotonic()
    end: float = inf  # until it is known
    text: str = ""
    unheard: str = ""  # the rest of the text, which a barge-in cut off
    remarks: list[str] = field(default_factory=list)


@dataclass
class Story:
    """What has happened in a call."""

    began: float  # time.monotonic(), as all times here
    date: time.struct_time = field(default_factory=time.gmtime)
    entries: list[Entry] = field(default_factory=list)
    waiting_since: float | None = None  # the caller has come, or has spoken, and nobody has answered yet
    answer: Entry | None = None  # what the model is saying
    said_until: float = 0.0  # the end of what it said last
    sent_ms: int = 0  # how long the answer was that a barge-in has just cut


if FOLDER:

    def call_started(call: Any, at: float) -> None:
        call.notes["report"] = Story(at, waiting_since=at, said_until=at)

    def caller_spoke(call: Any, at: float) -> None:
        call.notes["report"].waiting_since = None
        call.notes["report"].entries.append(Entry("caller", at))

    def caller_paused(call: Any, at: float) -> None:
        call.notes["report"].waiting_since = at
        for entry in call.notes["report"].entries:
            if entry.end == inf:
                entry.end = at

    def caller_said(call: Any, at: float, text: str) -> None:
        """Comes after the turn, sometimes after the answer. A turn that was a cough or a noise gets no words."""
        entries = call.notes["report"].entries
        turns = [entry for entry in entries if entry.kind == "caller" and entry.end <= at and not entry.text]
        recent = [turn for turn in turns if at - turn.end <= WORDS_WITHIN_S]
        if recent:
            recent[0].text = text
        elif turns:
            turns[-1].text = text
        else:
            entries.append(Entry("caller", at, at, text))

    def model_spoke(call: Any, at: float) -> None:
        story: Story = call.notes["report"]
        if story.answer is None:  # else that is still being heard, and this comes next
            story.answer = Entry("model", at)
            if story.waiting_since is not None:
                wait = f"{at - story.waiting_since:.2f} s"
                story.entries.append(Entry("wait", story.waiting_since, at, wait))
                story.answer.remarks = [f"応答まで Wait: {wait}"]
        story.waiting_since = None

    def model_interrupted(call: Any, at: float, heard_ms: int, sent_ms: int) -> None:
        call.notes["report"].sent_ms = sent_ms
        unheard_s = (sent_ms - heard_ms) / 1000
        call.notes["report"].entries += [Entry("unheard", at, at + unheard_s), Entry("barge-in", at, at)]

    def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
        """Comes when it has been heard to its end, or cut."""
        story: Story = call.notes["report"]
        said = story.answer or Entry("model", at if heard_ms == 0 else story.said_until)
        said.text, said.end = text, at
        if heard_ms is not None:
            said.end = min(said.begin + heard_ms / 1000, at)
            split = round(len(text) * heard_ms / max(heard_ms, story.sent_ms, 1))  # the nearest that anybody knows
            said.text, said.unheard = text[:split], text[split:]
            heard = f"再生 Heard: {heard_ms / 1000:.1f}"
            if story.sent_ms:
                said.remarks += ["割り込み Barge-in", f"{heard} / {story.sent_ms / 1000:.1f} s"]
            else:  # the call has ended meanwhile, and nobody tells how long the answer was
                said.remarks += ["途中で終了 Cut short", f"{heard} s"]
            story.sent_ms = 0
        story.entries.append(said)
        story.answer, story.said_until = None, at

    def tool_used(call: Any, at: float, name: str, arguments: str, result: str, seconds: float) -> None:
        text = f"{name}({arguments}) → {result}"
        call.notes["report"].entries.append(Entry("tool", at - seconds, at, text, remarks=[f"{seconds:.2f} s"]))

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
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', story.date)}-{re.sub('[^A-Za-z0-9]', '', call.sid)}.html"
        path = Path(FOLDER, name)
        path.touch(mode=0o600)
        path.write_text(page(call, story, at, reason), "utf-8", errors="replace")  # JSON may hold half a character
        log.info("%s", path)


# What the caller, the model and the tools say is a stranger's, and goes through `escape`. Should some slip through all
# the same, the page's Content-Security-Policy runs no script but its own, and loads only the recording.


def page(call: Any, story: Story, ended: float, reason: str) -> str:
    length = ended - story.began
    entries = sorted(story.entries, key=lambda entry: entry.begin)
    for entry in entries:  # from here on in seconds since the call began
        entry.begin = max(0.0, entry.begin - story.began)
        entry.end = min(entry.end, ended) - story.began
    waits = [entry.end - entry.begin for entry in entries if entry.kind == "wait"]
    recording = ""
    if path := call.notes.get("recording"):
        address = quote(Path(os.path.relpath(path, FOLDER)).as_posix())
        recording = f'<audio controls preload="metadata" src="{address}"></audio>'
    return PAGE.substitute(
        nonce=secrets.token_urlsafe(),
        date=time.strftime("%Y-%m-%d %H:%M:%S UTC", story.date),
        about=escape(f"{masked(call.caller)} → {masked(call.called)} · {reason} · {call.sid}"),
        length=clock(length),
        median_wait=f"{median(waits):.2f} s" if waits else "–",
        longest_wait=f"{max(waits):.2f} s" if waits else "–",
        barge_ins=sum(entry.kind == "barge-in" for entry in entries),
        tools=sum(entry.kind == "tool" for entry in entries),
        cost=dollars(call.notes.get("cost", {})),
        recording=recording,
        row_s=ROW_S,
        rows="".join(row(entries, number * ROW_S, length) for number in range(int(length // ROW_S) + 1)),
        turns="".join(turn(entry) for entry in entries if entry.kind in KINDS),
    )


def row(entries: list[Entry], begin: float, length: float) -> str:
    """One row of the time line, as SVG: across in percent, so that it fits every screen and paper."""
    bars = ""
    for entry in [Entry("ground", 0.0, length), *entries]:
        left = max(entry.begin, begin)
        right = min(max(entry.end, entry.begin + 0.1), begin + ROW_S)  # a moment is 0.1 s wide
        if left < right:
            place = f'x="{(left - begin) / ROW_S:.2%}" width="{(right - left) / ROW_S:.2%}"'
            bars += f'<rect class="{entry.kind}" {place}><title>{escape(entry.text[:200])}</title></rect>'
    return f'<div class="row"><time>{clock(begin)}</time><svg data-at="{begin}">{bars}</svg></div>'


def turn(entry: Entry) -> str:
    """One paragraph of the transcript."""
    unheard = f"<s>{escape(entry.unheard)}</s>" if entry.unheard else ""
    return (
        f'<li class="{entry.kind}" data-at="{entry.begin:.2f}" data-until="{entry.end:.2f}">'
        f"<time>{clock(entry.begin)}</time><h3>{KINDS[entry.kind]} <small>{' · '.join(entry.remarks)}</small></h3>"
        f"<p>{escape(entry.text)}{unheard}</p></li>"
    )


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def masked(number: str) -> str:
    return number if os.environ.get("LOG_NUMBERS") == "full" else re.sub(r"\d(?=(\D*\d){4})", "•", number)


def dollars(cost: dict[str, Any]) -> str:
    if cost.get("usd") is not None:
        return f"${cost['usd']:.4f}"
    return f"≥ ${cost['known_usd']:.4f}" if "known_usd" in cost else "–"
