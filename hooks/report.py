"""Writes a page for each call: who spoke when, what was said and heard, barge-ins, waits and cost.

One HTML file that needs no network; on a screen, on a phone, on paper. With hooks/recorder.py it
plays the recording from wherever one clicks; the page links to it, so keep both where they are.
With hooks/cost.py it names the cost. Waits count from where the model noticed that the caller had
stopped. How the page looks is in _report.html.

    REPORTS            the folder of the pages. Not set: none is written
    REPORT_LANGUAGE    ja (the default) or en: of the page's own words
    LOG_NUMBERS        full: whole telephone numbers; otherwise only their last four digits

A file is <UTC time>-<call sid>.html, for its owner only (0600), and holds what was said. Its times
are those of this computer's time zone (TZ=Asia/Tokyo). call.notes["report"] has its path.
"""

import logging
import os
import re
import secrets
import sys
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
IN_CONVERSATION = ("caller", "model", "tool", "key", "error")  # the others are bars only
PAGE = Template(Path(__file__).with_name("_report.html").read_text("utf-8"))

WORDS = {  # of the page: Japanese, English
    "language": ("ja", "en"),
    "title": ("通話の記録", "Call report"),
    "conversation": ("会話", "Conversation"),
    "caller": ("発信者", "Caller"),
    "model": ("AI", "AI"),
    "tool": ("ツール", "Tool"),
    "key": ("キー", "Key"),
    "error": ("エラー", "Error"),
    "length": ("通話時間", "Length"),
    "ending": ("終了", "Ended"),
    "median_wait": ("応答まで（中央値）", "Median wait"),
    "longest_wait": ("応答まで（最長）", "Longest wait"),
    "barge_ins": ("割り込み", "Barge-ins"),
    "barge_in": ("割り込み", "Barge-in"),
    "tools": ("ツール", "Tool calls"),
    "cost": ("料金（OpenAI）", "OpenAI cost"),
    "wait": ("応答まで", "Wait"),
    "wait_from": ("（発話終了の検出から）", ", from where the model noticed the turn's end"),
    "heard": ("再生", "Heard"),
    "seconds": ("秒", "s"),
    "cut_short": ("途中で終了", "Cut short"),
    "no_words": ("（発話なし）", "(no words)"),
    "broken_off": ("（話の途中で途切れました）", "(broken off in mid-speech)"),
}
# What the bridge says of an end, in Japanese; what is not here stands as it is.
ENDINGS = {
    "caller hung up": "発信者が切断",
    "hung up": "AI が終了",
    "transferred": "転送",
    "model lost": "AI との接続が切断",
    "time limit": "制限時間",
    "shutdown": "システムの停止",
    "twilio lost": "電話回線の切断",
}
LANGUAGE = os.environ.get("REPORT_LANGUAGE") or "ja"
if LANGUAGE not in ("ja", "en"):
    sys.exit(f"REPORT_LANGUAGE is {LANGUAGE!r}: give ja or en")
SAY = {name: words[LANGUAGE == "en"] for name, words in WORDS.items()}

if FOLDER := os.environ.get("REPORTS", "").strip():
    try:  # now, because the first call must not be the first to find out
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as error:
        sys.exit(f"REPORTS is {FOLDER!r}: {error.strerror}: give a folder to write to")


@dataclass
class Entry:
    """One bar of the time line and, if it is of IN_CONVERSATION, one paragraph."""

    kind: str  # the CSS class
    begin: float  # time.monotonic()
    end: float = inf  # until it is known
    text: str = ""
    unheard: str = ""  # the rest of the text, which a barge-in cut off
    missing: str = ""  # what stands in place of words that there are not
    sent_ms: int = 0  # how long it was, when a barge-in has cut it
    remarks: list[str] = field(default_factory=list)


@dataclass
class Story:
    """What has happened in a call."""

    began: float  # time.monotonic(), as all times here
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    stamp: str = field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    entries: list[Entry] = field(default_factory=list)
    items: dict[str, Entry] = field(default_factory=dict)  # the entries of both sides, by item
    waiting_since: float | None = None  # the caller has come, or spoken, and has no answer yet

    def add(self, entry: Entry, item: str = "") -> Entry:
        self.entries.append(entry)
        if item:
            self.items[item] = entry
        return entry

    def sounding(self) -> list[Entry]:
        """What the model is saying, or has sent ahead."""
        return [
            entry for entry in self.items.values() if entry.kind == "model" and entry.end == inf
        ]

    def settle(self, said: Entry, at: float, text: str, heard_ms: int | None) -> None:
        """It has been heard to its end, or cut."""
        said.text, said.end = text, at
        if heard_ms is not None:
            said.end = min(said.begin + heard_ms / 1000, at)
            share = heard_ms / said.sent_ms if said.sent_ms else 1.0  # nobody knows it better
            split = round(len(text) * share)
            said.text, said.unheard = text[:split], text[split:]
            heard = f"{SAY['heard']} {heard_ms / 1000:.1f}"
            if said.sent_ms:
                heard += f" / {said.sent_ms / 1000:.1f}"
            said.remarks += [SAY["barge_in" if said.sent_ms else "cut_short"]]
            said.remarks += [f"{heard} {SAY['seconds']}"]
        if heard_ms == 0:
            self.entries.remove(said)  # cut off before its first sound
        for later in self.sounding():
            later.begin = at  # it was sent ahead, and is heard from here on


def any_event(call: Any, at: float, event: str, facts: dict[str, Any]) -> None:
    if event == "call_started":
        call.notes["report_story"] = Story(at, waiting_since=at)
    story: Story = call.notes["report_story"]
    item = facts.get("item", "")
    entry = story.items.get(item)
    match event:
        case "caller_started_speaking":
            story.waiting_since = None
            story.add(Entry("caller", at), item)
        case "caller_stopped_speaking" if entry:
            entry.end = at
            if not story.sounding():  # else nobody waits: it is heard out, or has been cut
                story.waiting_since = at
        case "caller_said" if entry:
            entry.text = facts["text"]
            if not entry.text:
                entry.missing = SAY["broken_off" if entry.end == inf else "no_words"]
            entry.end = min(entry.end, at)  # the call, or the session, has ended meanwhile
        case "model_started_speaking":
            entry = story.add(Entry("model", at), item)
            if story.waiting_since is not None:
                wait = f"{at - story.waiting_since:.2f} {SAY['seconds']}"
                story.add(Entry("wait", story.waiting_since, at, wait))
                entry.remarks.append(f"{SAY['wait']} {wait}")
            story.waiting_since = None
        case "model_interrupted":
            story.add(Entry("barge-in", at, at))
            if entry:
                entry.sent_ms = facts["sent_ms"]
        case "model_said" if entry:
            story.settle(entry, at, facts["text"], facts["heard_ms"])
        case "tool_used":
            text = f"{facts['name']}({facts['arguments']}) → {facts['result']}"
            took = f"{facts['seconds']:.2f} {SAY['seconds']}"
            story.add(Entry("tool", at - facts["seconds"], at, text, remarks=[took]))
        case "key_pressed":
            if not story.entries or story.entries[-1].kind != "key":  # else a number, key by key
                story.add(Entry("key", at))
            story.entries[-1].text += facts["key"]
            story.entries[-1].end = at
        case "model_failed":
            story.add(Entry("error", at, at, facts["error"]))
        case "call_ended":
            time.sleep(max(0.0, at + 0.5 - time.monotonic()))  # until cost.py has counted all
            path = Path(FOLDER, f"{story.stamp}-{call.sid}.html").resolve()
            path.touch(mode=0o600)
            html = page(call, call.notes.pop("report_story"), at, facts["reason"])
            path.write_text(html, "utf-8", errors="replace")  # JSON may hold half a character
            call.notes["report"] = str(path)
            log.info("%s", path.as_uri(), extra={"call": call.sid})


# What the caller, the model and the tools say is a stranger's, and goes through `escape`. Should
# some slip through all the same, the page's Content-Security-Policy runs no script but its own, and
# loads only the recording.


def page(call: Any, story: Story, ended: float, reason: str) -> str:
    length = ended - story.began
    entries = sorted(story.entries, key=lambda entry: entry.begin)
    for entry in entries:  # from here on in seconds since the call began
        entry.begin = max(0.0, entry.begin - story.began)
        entry.end = min(entry.end, ended) - story.began
    waits = [entry.end - entry.begin for entry in entries if entry.kind == "wait"]
    recording = ""
    if path := call.notes.get("recording"):
        address = quote(Path(os.path.relpath(path, Path(FOLDER).resolve())).as_posix())
        recording = f'<audio controls preload="metadata" src="{address}"></audio>'
    return PAGE.substitute(
        {f"say_{name}": words for name, words in SAY.items()},
        nonce=secrets.token_urlsafe(),
        date=story.date,
        about=escape(f"{masked(call.caller)} → {masked(call.called)} · {call.sid}"),
        length=clock(length),
        ending=escape(ENDINGS.get(reason, reason) if LANGUAGE == "ja" else reason),
        median_wait=f"{median(waits):.2f} {SAY['seconds']}" if waits else "–",
        longest_wait=f"{max(waits):.2f} {SAY['seconds']}" if waits else "–",
        barge_ins=sum(entry.kind == "barge-in" for entry in entries),
        tools=sum(entry.kind == "tool" for entry in entries),
        cost=dollars(call.notes.get("cost", {})),
        recording=recording,
        row_s=ROW_S,
        rows="".join(row(entries, n * ROW_S, length) for n in range(int(length // ROW_S) + 1)),
        turns="".join(paragraph(entry) for entry in entries if entry.kind in IN_CONVERSATION),
    )


def row(entries: list[Entry], begin: float, length: float) -> str:
    """One row of the time line, as SVG: across in percent, so that it fits screens and paper."""
    bars = ""
    for entry in [Entry("ground", 0.0, length), *entries]:
        left = max(entry.begin, begin)
        right = min(max(entry.end, entry.begin + 0.1), begin + ROW_S)  # a moment is 0.1 s wide
        if left < right:
            place = f'x="{(left - begin) / ROW_S:.2%}" width="{(right - left) / ROW_S:.2%}"'
            title = f"<title>{escape(entry.text[:200])}</title>"
            bars += f'<rect class="{entry.kind}" {place}>{title}</rect>'
    return f'<div class="row"><time>{clock(begin)}</time><svg data-at="{begin}">{bars}</svg></div>'


def paragraph(entry: Entry) -> str:
    words = escape(entry.text)
    if entry.unheard:
        words += f"<s>{escape(entry.unheard)}</s>"
    if entry.missing:
        words = f"<em>{entry.missing}</em>"
    return (
        f'<li class="{entry.kind}" data-at="{entry.begin:.2f}" data-until="{entry.end:.2f}">'
        f"<time>{clock(entry.begin)}</time>"
        f"<h3>{SAY[entry.kind]} <small>{' · '.join(entry.remarks)}</small></h3>"
        f"<p>{words}</p></li>"
    )


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def masked(number: str) -> str:
    full = os.environ.get("LOG_NUMBERS") == "full"
    return number if full else re.sub(r"\d(?=(\D*\d){4})", "*", number)


def dollars(cost: dict[str, Any]) -> str:
    if cost.get("usd") is not None:
        return f"${cost['usd']:.4f}"
    return f"≥ ${cost['known_usd']:.4f}" if "known_usd" in cost else "–"


if not FOLDER:  # then the bridge need not tell this file anything
    del any_event
