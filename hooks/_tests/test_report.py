"""hooks/report.py: what stands in the page of a call."""

from __future__ import annotations

import asyncio
import re
import stat
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import LoadHook, PretendCall, TimedEvent, refused

LONG_AGO = -10_000.0  # monotonic time of call_started, so that nothing is waited for


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text without style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words, self.quiet = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.quiet = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.quiet = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self.quiet else data + "\n"

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, Any]]:
        same = [attributes for name, attributes in self.tags if name == tag]
        return [attributes for attributes in same if kind in (None, attributes.get("class"))]


async def report(
    hook: LoadHook,
    folder: Path,
    *events: TimedEvent,
    seconds: float = 10,
    call: PretendCall | None = None,
    began: float = LONG_AGO,
    **settings: str,
) -> Page:
    """The page of a call; the times of the events are seconds since it began."""
    call = call or PretendCall()
    told = [("call_started", 0, {}), *events, ("call_ended", seconds, {"reason": "caller hung up"})]
    loaded = hook("report", REPORTS=folder, **settings)
    await loaded.tell_all(call, *((event, began + at, facts) for event, at, facts in told))
    (record,) = loaded.records
    (file,) = folder.glob("*.html")
    assert (record.getMessage(), record.call, call.notes["report"]) == (
        file.as_uri(),
        "CA1",
        str(file),
    )
    return Page(file.read_text())


def spoke(at: float, until: float, text: str, item: str = "") -> list[TimedEvent]:
    """A turn of the caller; the words come a moment after it."""
    item = item or f"c{at}"
    turn: list[TimedEvent] = [("caller_started_speaking", at, {"item": item})]
    turn.append(("caller_stopped_speaking", until, {"item": item}))
    return [*turn, ("caller_said", until + 0.6, {"item": item, "text": text})]


def said(
    at: float, until: float, text: str, heard_ms: int | None = None, sent_ms: int = 0
) -> list[TimedEvent]:
    """An answer; with `sent_ms`, a barge-in cuts it."""
    item = f"m{at}"
    cut = {"item": item, "heard_ms": heard_ms, "sent_ms": sent_ms}
    return [
        ("model_started_speaking", at, {"item": item}),
        *([("model_interrupted", until, cut)] if sent_ms else []),
        ("model_said", until + 0.2, {"item": item, "text": text, "heard_ms": heard_ms}),
    ]


def across(rect: dict[str, str]) -> Any:
    """Where a bar stands in its row, in seconds: from, to."""
    begin, width = (float(rect[name].rstrip("%")) * 0.3 for name in ("x", "width"))
    return pytest.approx((begin, begin + width), abs=0.02)


def conversation(page: Page) -> str:
    return page.words[page.words.index("会話") :]


async def test_turns(hook: LoadHook, tmp_path: Path) -> None:
    """Each turn is a bar and a paragraph, each wait for an answer a bar."""
    talk = [*said(0, 2, "こんにちは。"), *spoke(3, 5, "天気は？"), *said(5.8, 8, "晴れです。")]
    page = await report(hook, tmp_path, *talk)
    assert [across(bar) for bar in page.all("rect", "caller")] == [(3, 5)]
    assert [across(bar) for bar in page.all("rect", "model")] == [(0, 2.2), (5.8, 8.2)]
    assert [across(bar) for bar in page.all("rect", "wait")][1:] == [(5, 5.8)]
    assert "応答まで 0.80 秒" in page.words and len(page.all("li")) == 3
    assert re.findall("こんに|天気|晴れ", conversation(page)) == ["こんに", "天気", "晴れ"]


async def test_order_of_words(hook: LoadHook, tmp_path: Path) -> None:
    """Words find their turn whenever they come; a turn without words takes none of another's."""
    a, b, c = spoke(1, 2, "", "a"), spoke(3, 4, "予約", "b"), spoke(5, 6, "取消", "c")
    d: list[TimedEvent] = [("caller_started_speaking", 8, {"item": "d"})]
    d.append(("caller_said", 9, {"item": "d", "text": ""}))
    page = await report(hook, tmp_path, *a[:2], *b[:2], *c[:2], c[2], b[2], a[2], *d)
    words = re.findall("発話なし|予約|取消|話の途中", conversation(page))
    assert words == ["発話なし", "予約", "取消", "話の途中"]
    assert [across(bar) for bar in page.all("rect", "caller")] == [(1, 2), (3, 4), (5, 6), (8, 9)]


async def test_barge_in(hook: LoadHook, tmp_path: Path) -> None:
    """What was not heard ends at the cut, and stands struck out in the text."""
    page = await report(
        hook, tmp_path, *said(1, 3, "一二三四五六七八", 2000, 8000), *said(4, 6, "はい")
    )
    assert [across(bar) for bar in page.all("rect", "model")] == [(1, 3), (4, 6.2)]
    assert len(page.all("rect", "barge-in")) == 1 and len(page.all("rect")) == 5  # ground and wait
    assert "一二\n三四五六七八\n" in page.words and len(page.all("s")) == 1
    assert "割り込み · 再生 2.0 / 8.0 秒" in page.words


async def test_hang_up_during_an_answer(hook: LoadHook, tmp_path: Path) -> None:
    """It is no barge-in."""
    page = await report(hook, tmp_path, *said(1, 3, "こんにちは。", 2000))
    assert "途中で終了 · 再生 2.0 秒" in page.words and not page.all("rect", "barge-in")


async def test_item_sent_ahead(hook: LoadHook, tmp_path: Path) -> None:
    """The second item of an answer begins where the first has been heard."""
    first, second = said(1, 4, "一つ目"), said(1.2, 6, "二つ目")
    page = await report(hook, tmp_path, first[0], second[0], first[1], second[1])
    assert [across(bar) for bar in page.all("rect", "model")] == [(1, 4.2), (4.2, 6.2)]


async def test_backchannel(hook: LoadHook, tmp_path: Path) -> None:
    """Nobody waits for an answer to what is said while the model is being heard and goes on."""
    first, second = said(1, 6, "長い話"), said(20, 22, "もしもし？")
    page = await report(
        hook, tmp_path, first[0], *spoke(2, 3, "はい"), first[1], *second, seconds=25
    )
    assert [across(bar) for bar in page.all("rect", "wait")] == [(0, 1)]


async def test_local_time(hook: LoadHook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as here:
        here.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        page = await report(hook, tmp_path)
    time.tzset()
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d JST", page.words)


async def test_other_lines(hook: LoadHook, tmp_path: Path) -> None:
    """Tools stand where they began, keys are joined, and the page says how and when it ended."""
    slow = (
        "tool_used",
        6,
        {"name": "weather", "arguments": "{}", "result": "晴れ", "seconds": 5.0},
    )
    keys: list[TimedEvent] = [
        ("key_pressed", 9 + n / 10, {"key": key}) for n, key in enumerate("12#")
    ]
    page = await report(
        hook,
        tmp_path,
        *said(2, 4, "お待ちください。"),
        slow,
        *said(7, 9, "晴れ。"),
        *keys,
        seconds=75,
    )
    assert [line["data-at"] for line in page.all("li")] == ["1.00", "2.00", "7.00", "9.00"]
    assert "12#" in page.words and "発信者が切断" in page.words and "1:15" in page.words


@pytest.mark.parametrize(
    ("language", "other"), [("ja", "[A-Z][a-z]+"), ("en", "[ぁ-んァ-ヶ一-龠]")]
)
async def test_language(hook: LoadHook, tmp_path: Path, language: str, other: str) -> None:
    """All of the page's own words are of one language."""
    talk = [*said(1, 3, "12", 2000, 8000), *spoke(4, 5, ""), ("key_pressed", 6, {"key": "5"})]
    error = ("model_failed", 7, {"error": "404"})
    page = await report(hook, tmp_path, *talk, error, REPORT_LANGUAGE=language)
    assert page.all("html")[0]["lang"] == language
    assert re.findall(other, page.words.replace("OpenAI", "")) == []


async def test_hostile_words(hook: LoadHook, tmp_path: Path) -> None:
    """A stranger cannot put anything but text into a report."""
    evil = (
        "</p></title><script>alert(1)</script><img src=x onerror='alert(1)'>\"'$row_s\ud83d\u202e"
    )
    call = PretendCall(caller="<b>sip:x@y</b>")
    told = [
        *spoke(1, 2, evil),
        *said(2.5, 3, evil * 2, 500, 900),
        ("tool_used", 4, {"name": evil, "arguments": evil, "result": evil, "seconds": 1.0}),
        ("key_pressed", 4, {"key": evil}),
        ("model_failed", 4, {"error": evil}),
    ]
    page = await report(hook, tmp_path, *told, call=call)
    assert len(page.all("script")) == 1 and not page.all("img") and not page.all("b")
    assert page.words.count("<img src=x onerror='alert(1)'>\"'$row_s") >= 8


async def test_no_network(hook: LoadHook, tmp_path: Path) -> None:
    page = await report(hook, tmp_path, *said(0, 2, "はい。"))
    assert not [tag for tag in page.tags if {"src", "href", "srcset"} & set(tag[1])]
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert f"'nonce-{page.all('script')[0]['nonce']}'" in policy


async def test_cost_and_recording(hook: LoadHook, tmp_path: Path) -> None:
    """The page names the cost, and plays the recording from beside it."""
    call = PretendCall()
    call.notes["cost"] = {"usd": None, "known_usd": 0.01234}
    call.notes["recording"] = str(tmp_path / "rec" / "日 本#.wav")
    page = await report(hook, tmp_path, call=call)
    assert "≥ $0.0123" in page.words
    assert page.all("audio")[0]["src"] == "rec/%E6%97%A5%20%E6%9C%AC%23.wav"


async def test_late_cost(hook: LoadHook, tmp_path: Path) -> None:
    """The report waits a moment for the cost of the last answer."""
    call = PretendCall()
    asyncio.get_running_loop().call_later(0.2, call.notes.update, {"cost": {"usd": 0.5}})
    page = await report(hook, tmp_path, call=call, began=time.monotonic() - 10)
    assert "$0.5000" in page.words


async def test_privacy(hook: LoadHook, tmp_path: Path) -> None:
    """The page is for its owner only, and numbers are masked."""
    page = await report(hook, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert re.fullmatch(r"\d{8}T\d{6}Z-CA1\.html", file.name)
    assert "+********5678" in page.words and "12345678" not in page.words


async def test_long_call(hook: LoadHook, tmp_path: Path) -> None:
    """An hour has a row for each half minute."""
    page = await report(hook, tmp_path, *spoke(3590, 3603, "長い"), seconds=3605)
    assert len(page.all("svg")) == 121
    assert [across(bar) for bar in page.all("rect", "caller")] == [(20, 30), (0, 3)]


def test_no_folder(hook: LoadHook) -> None:
    """Nothing is written unless a folder is named: then the file is told nothing at all."""
    assert not any(hook("report").host.handling.values())


@pytest.mark.parametrize("setting", [{"REPORTS": "/proc/no"}, {"REPORT_LANGUAGE": "fr"}])
def test_wrong_setting(hook: LoadHook, setting: dict[str, str]) -> None:
    refused(hook, "report", **setting)
