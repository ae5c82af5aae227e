"""Writes a page for each call: who spoke when, what was said and heard, barge-ins, waits, tools and cost.

One HTML file that needs no network; on a screen, on a phone, on paper. With hooks/recorder.py it plays the recording,
from wherever one clicks; the page links to it, so keep both where they are. With hooks/cost.py it names the cost. How
long the caller waited counts from where the model noticed that they had paused.

    REPORTS       folder for the pages; unset: none is written
    LOG_NUMBERS   full: telephone numbers are written out; otherwise their last four digits

Files: <UTC time>-<call sid>.html, readable by this user only. They hold what was said.
"""

import logging
import os
import re
import secrets
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
WORDS_WITHIN_S = 10.0  # a turn whose transcript has not come by then had no words: a cough, a noise
MAX_TEXT = 4000  # characters that are shown of one text
COST_WITHIN_S = 0.5  # cost.py counts in a thread of its own, perhaps a moment behind this one


FOLDER = os.environ.get("REPORTS", "").strip()
if FOLDER:
    try:
        Path(FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(FOLDER, os.W_OK):
            raise PermissionError(f"{FOLDER} is not writable")
    except OSError as fault:
        log.error("REPORTS: %s. Name a folder that can be written to. No report is written", fault)
        FOLDER = ""


@dataclass
class Entry:
    """One line of the transcript, and one bar of the time line. Times are seconds since the call began."""

    kind: str  # a key of KINDS, and the CSS class
    begin: float
    end: float
    text: str = ""
    unheard: str = ""  # the rest of the text, which a barge-in cut off
    unheard_until: float = 0.0  # when it would have come to its end
    wait: float | None = None  # how long the caller had waited for it
    note: str = ""


@dataclass
class Story:
    """What has happened in a call. Times are seconds since it began."""

    began: float  # time.monotonic()
    date: time.struct_time = field(default_factory=time.gmtime)
    entries: list[Entry] = field(default_factory=list)
    sounds: list[tuple[float, float | None]] = field(default_factory=list)  # answers under way: begin, and the wait
    said_until: float = 0.0  # the end of the model's last entry
    waiting_since: float | None = 0.0  # the caller has come, or has spoken, and nobody has answered yet
    barge_ins: list[float] = field(default_factory=list)
    sent_ms: int = 0  # how long the answer was that has just been cut


def story_of(call: Any, at: float) -> tuple[Story, float]:
    story: Story = call.notes["report"]
    return story, max(0.0, at - story.began)


if FOLDER:

    def call_started(call: Any, at: float) -> None:
        call.notes["report"] = Story(at)

    def caller_spoke(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        story.waiting_since = None
        story.entries.append(Entry("caller", now, inf))

    def caller_paused(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        story.waiting_since = now
        for entry in story.entries:
            entry.end = min(entry.end, now)

    def caller_said(call: Any, at: float, text: str) -> None:
        """Comes after the turn, sometimes after the answer: the words belong to the oldest turn that has none."""
        story, now = story_of(call, at)
        for entry in story.entries:
            if entry.kind == "caller" and not entry.text and now - WORDS_WITHIN_S <= entry.end <= now:
                entry.text = text
                return
        story.entries.append(Entry("caller", now, now, text))

    def model_spoke(call: Any, at: float) -> None:
        story, now = story_of(call, at)
        story.sounds.append((now, None if story.waiting_since is None else now - story.waiting_since))
        story.waiting_since = None

    def model_interrupted(call: Any, at: float, sent_ms: int) -> None:
        story, now = story_of(call, at)
        story.barge_ins.append(now)
        story.sent_ms = sent_ms

    def model_said(call: Any, at: float, text: str, heard_ms: int | None) -> None:
        """Comes when it has been heard to its end, or cut. It began at the first sound since the one before it."""
        story, now = story_of(call, at)
        begin, wait = story.sounds[0] if story.sounds else (story.said_until, None)
        entry = Entry("model", begin, now, text, wait=wait)
        if heard_ms is not None:
            sent_ms, story.sent_ms = max(heard_ms, story.sent_ms), 0
            split = round(len(text) * heard_ms / sent_ms) if sent_ms else 0  # the nearest that anybody knows
            entry.text, entry.unheard = text[:split], text[split:]
            entry.begin = begin if heard_ms else now
            entry.end = min(entry.begin + heard_ms / 1000, now)
            entry.unheard_until = entry.begin + sent_ms / 1000
            entry.note = f"中断 Cut: {heard_ms / 1000:.1f} / {sent_ms / 1000:.1f} s heard"
        story.entries.append(entry)
        story.said_until = now
        story.sounds = [sound for sound in story.sounds if sound[0] > now]

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
        time.sleep(max(0.0, min(COST_WITHIN_S, at + COST_WITHIN_S - time.monotonic())))
        story, now = story_of(call, at)
        del call.notes["report"]
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', story.date)}-{re.sub('[^A-Za-z0-9]', '', call.sid)[:64]}.html"
        page = render(call, story, now, reason).encode(errors="replace")  # JSON may hold half a surrogate pair
        with open(Path(FOLDER, name), "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(page)
        log.info("%s", Path(FOLDER, name))


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────
#
# What the caller, the model and the tools say goes through `shown`: it is a stranger's, and stays text. Should some
# slip through all the same, the page's Content-Security-Policy runs no script but its own and loads only the sound.

KINDS = {  # name, and place in the time line: y and height in px
    "caller": ("発信者 Caller", (6, 18)),
    "model": ("モデル Model", (32, 18)),
    "tool": ("ツール Tool", (56, 7)),
    "key": ("キー Key", (24, 8)),
    "fault": ("障害 Fault", (24, 8)),
}


def shown(text: str) -> str:
    return escape(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def masked(number: str) -> str:
    full = os.environ.get("LOG_NUMBERS") == "full"
    return number if full else re.sub(r"[0-9](?=([^0-9]*[0-9]){4})", "•", number)


def render(call: Any, story: Story, call_end: float, reason: str) -> str:
    entries = sorted(story.entries, key=lambda entry: entry.begin)
    for entry in entries:
        entry.end = min(entry.end, call_end)
    waits = [entry.wait for entry in entries if entry.wait is not None]
    cost = call.notes.get("cost", {}).get("usd")
    facts = {
        "長さ Length": clock(call_end),
        "応答まで Median wait": f"{median(waits):.2f} s" if waits else "–",
        "最長 Longest wait": f"{max(waits):.2f} s" if waits else "–",
        "割り込み Barge-ins": len(story.barge_ins),
        "ツール Tool calls": sum(entry.kind == "tool" for entry in entries),
        "費用 Cost": "–" if cost is None else f"${cost:.4f}",
    }
    rows = (row(story, entries, number * ROW_S, call_end) for number in range(int(call_end // ROW_S) + 1))
    return PAGE.substitute(
        nonce=secrets.token_urlsafe(),
        date=time.strftime("%Y-%m-%d %H:%M:%S UTC", story.date),
        about=shown(f"{masked(call.caller) or '?'} → {masked(call.called) or '?'} · {reason} · {call.sid}"),
        facts="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()),
        sound=sound(call.notes.get("recording")),
        row_s=ROW_S,
        rows="".join(rows),
        turns="".join(turn(entry, max(waits, default=0)) for entry in entries),
    )


def sound(recording: str | None) -> str:
    if not recording:
        return ""
    try:
        address = quote(Path(os.path.relpath(recording, FOLDER)).as_posix())
    except ValueError:  # it is on another drive
        address = Path(recording).as_uri()
    return f'<audio controls preload="metadata" src="{escape(address)}"></audio>'


def row(story: Story, entries: list[Entry], begin: float, call_end: float) -> str:
    """One row of the time line, as SVG: across in percent, so that it fits every screen and paper; down in pixels."""

    def bar(kind: str, since: float, until: float, y: int, height: int, title: str = "") -> str:
        if not (begin <= since < begin + ROW_S or since < begin < until):
            return ""
        left, right = max(since, begin), min(until, begin + ROW_S)
        x, width = (left - begin) / ROW_S * 100, max(0.3, (right - left) / ROW_S * 100)
        place = f'x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{height}"'
        return f'<rect class="{kind}" {place}><title>{shown(title)}</title></rect>'

    bars = [bar("ground", begin + second, begin + second, 2, 62) for second in range(0, int(ROW_S), 5)]
    bars += [bar("ground", begin, call_end, *KINDS[side][1]) for side in ("caller", "model")]
    for entry in entries:
        if entry.unheard_until > entry.end:
            bars.append(bar("unheard", entry.end, entry.unheard_until, *KINDS["model"][1], entry.note))
        bars.append(bar(entry.kind, entry.begin, entry.end, *KINDS[entry.kind][1], entry.text[:200]))
        if entry.wait is not None:
            bars.append(bar("wait", entry.begin - entry.wait, entry.begin, 26, 4, f"{entry.wait:.2f} s"))
    bars += [bar("barge-in", at, at, 0, 54, "割り込み Barge-in") for at in story.barge_ins]
    return f'<div class="row"><time>{clock(begin)}</time><svg height="66" data-at="{begin}">{"".join(bars)}</svg></div>'


def turn(entry: Entry, longest_wait: float) -> str:
    unheard = f"<s>{shown(entry.unheard)}</s>" if entry.unheard else ""
    wait = ""
    if entry.wait is not None:
        width = f"{entry.wait / (longest_wait or 1) * 8:.2f}rem"
        wait = f'<small>応答まで <i class="wait" style="width:{width}"></i> {entry.wait:.2f} s</small>'
    return (
        f'<li class="{entry.kind}" data-at="{entry.begin:.2f}" data-until="{entry.end:.2f}">'
        f"<time>{clock(entry.begin)}</time><div><h3>{KINDS[entry.kind][0]}{wait}<small>"
        f'{shown(entry.note)}</small></h3><p dir="auto">{shown(entry.text)}{unheard}</p></div></li>'
    )


PAGE = Template("""<!DOCTYPE html>
<html lang="ja">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-$nonce'; media-src 'self' file:">
<title>通話の記録 $date</title>
<style>
:root {
  --paper: #fff; --ink: #1c2024; --faint: #626c75; --ground: #edf0f3; --wait: #8a949d; --now: #fff7d6;
  --caller: #2563c9; --model: #d9730d; --tool: #7c4dce; --key: #2f8f5b; --fault: #c4162a;
  color-scheme: light dark; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --ink: #e6e9ec; --faint: #9aa4ad; --ground: #24292e; --wait: #7d8790; --now: #33301d;
  --caller: #6aa5ff; --model: #f5a04c; --tool: #b594f5; --key: #5cc48d; --fault: #ff6b76;
} }
* { box-sizing: border-box; margin: 0; padding: 0; }
body {
  background: var(--paper); color: var(--ink); margin: auto; max-width: 96rem; padding: 1.5rem clamp(1rem, 4vw, 3rem);
  font: 1rem/1.6 system-ui, "Hiragino Sans", "Yu Gothic UI", Meiryo, "Noto Sans JP", "Noto Sans CJK JP", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.3; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
header p, dt, small, time { color: var(--faint); font-size: .8rem; font-weight: normal; }
time, dd, small { font-variant-numeric: tabular-nums; }
header p, li p { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem 1.5rem; margin: 1.2rem 0; }
dd { font-size: 1.35rem; line-height: 1.3; }

audio { display: block; width: 100%; position: sticky; top: .5rem; z-index: 1; }
main { display: grid; gap: 0 3rem; }
@media screen and (min-width: 64rem) {
  main { grid-template-columns: 1fr 1fr; align-items: start; }
  section:first-child { position: sticky; top: 4rem; max-height: calc(100vh - 4rem); overflow: auto; }
}
audio ~ main [data-at] { cursor: pointer; }

.caller { --side: var(--caller); } .model { --side: var(--model); } .tool { --side: var(--tool); }
.key { --side: var(--key); } .fault, .barge-in { --side: var(--fault); }
.wait { --side: var(--wait); } .ground { --side: var(--ground); }
.unheard { --side: color-mix(in srgb, var(--model) 35%, var(--paper)); }
rect { fill: var(--side); rx: 2px; }
i { background: var(--side); display: inline-block; height: .6rem; border-radius: 2px; }
h3 { color: var(--side); display: flex; flex-wrap: wrap; gap: 0 1em; font-size: 1rem; align-items: baseline; }

figcaption { display: flex; flex-wrap: wrap; gap: 0 1.2em; font-size: .8rem; margin-bottom: .5rem; }
figcaption i { width: .9rem; margin-right: .3rem; }
figcaption .barge-in { width: .25rem; height: .9rem; vertical-align: middle; }
.row, li { display: grid; grid-template-columns: 2.6rem 1fr; break-inside: avoid; }
.row { position: relative; margin-bottom: .3rem; }
svg { width: 100%; display: block; }
#head { position: absolute; width: 2px; height: 66px; background: var(--ink); }

ol { list-style: none; }
li { padding: .35rem .4rem; border-radius: 6px; }
li.now { background: var(--now); }
li time { line-height: 2; }
li p { white-space: pre-wrap; }
li.tool p, li.fault p { font-size: .85rem; }
s { color: var(--faint); text-decoration-thickness: 1px; }
@media print { body { padding: 0; } audio { display: none; } h2 { break-after: avoid; } }
</style>

<header>
<h1>通話の記録 <small lang="en">Call report</small></h1>
<p>$date · $about</p>
<dl>$facts</dl>
</header>
$sound
<main>
<section>
<h2>時間の流れ <small lang="en">Time line</small></h2>
<figure>
<figcaption>
<span><i class="caller"></i>発信者 Caller</span> <span><i class="model"></i>モデル Model</span>
<span><i class="unheard"></i>聞かれなかった分 Not heard</span> <span><i class="barge-in"></i>割り込み Barge-in</span>
<span><i class="wait"></i>応答まで Wait</span> <span><i class="tool"></i>ツール Tool</span>
</figcaption>
$rows
</figure>
</section>
<section>
<h2>会話 <small lang="en">Transcript</small></h2>
<ol>$turns</ol>
</section>
</main>

<script nonce="$nonce">
const audio = document.querySelector("audio"), rows = document.querySelectorAll("svg")
if (audio) {
  const head = document.createElement("div")
  head.id = "head"
  document.addEventListener("click", event => {
    const place = event.target.closest("[data-at]")
    if (!place) return
    const box = place.getBoundingClientRect(), share = (event.clientX - box.left) / box.width
    audio.currentTime = Number(place.dataset.at) + (place.matches("svg") ? share * $row_s : 0)
    audio.play()
  })
  audio.addEventListener("timeupdate", () => {
    const now = audio.currentTime
    rows[Math.floor(now / $row_s)]?.after(head)
    head.style.left = `calc(2.6rem + (100% - 2.6rem) * $${now % $row_s / $row_s})`
    for (const turn of document.querySelectorAll("li"))
      turn.classList.toggle("now", turn.dataset.at <= now && now < turn.dataset.until)
  })
}
</script>
</html>
""")
