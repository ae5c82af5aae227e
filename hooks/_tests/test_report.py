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
from conftest import LoadHook, PretendCall, TimedEvent

LONG_AGO = -10_000.0  # monotonic time of call_started, so that nothing waits for what comes a moment later


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
        return [attributes for name, attributes in self.tags if name == tag and kind in (None, attributes.get("class"))]


async def report(
    hook: LoadHook,
    folder: Path,
    *events: TimedEvent,
    seconds: float = 10,
    call: PretendCall | None = None,
    began: float = LONG_AGO,
) -> Page:
    """The page of a call; the times of the events are seconds since it began."""
    call = call or PretendCall()
    told = [("call_started", 0, {}), *events, ("call_ended", seconds, {"reason": "caller hung up"})]
    await hook("report", REPORTS=folder).tell_all(call, *((event, began + at, facts) for event, at, facts in told))
    assert "report" not in call.notes
    (file,) = folder.glob("*.html")
    return Page(file.read_text())


def spoke(at: float, until: float, text: str) -> list[TimedEvent]:
    """A turn of the caller; the words come a moment after it."""
    return [("caller_spoke", at, {}), ("caller_paused", until, {}), ("caller_said", until + 0.6, {"text": text})]


def said(at: float, until: float, text: str, heard_ms: int | None = None) -> list[TimedEvent]:
    return [("model_spoke", at, {}), ("model_said", until, {"text": text, "heard_ms": heard_ms})]


def across(rect: dict[str, str]) -> Any:
    """Where a bar stands in its row, in seconds: from, to."""
    begin, width = (float(rect[name].rstrip("%")) * 0.3 for name in ("x", "width"))
    return pytest.approx((begin, begin + width), abs=0.02)


async def test_a_report_shows_turns_as_bars_with_their_words_and_waits(hook: LoadHook, tmp_path: Path) -> None:
    talk = [*said(0, 2, "こんにちは。"), *spoke(3, 5, "天気は？"), *said(5.8, 8, "晴れです。")]
    page = await report(hook, tmp_path, *talk)
    assert [across(bar) for bar in page.all("rect", "caller")] == [(3, 5)]
    assert [across(bar) for bar in page.all("rect", "model")] == [(0, 2), (5.8, 8)]
    assert [across(bar) for bar in page.all("rect", "wait")][1:] == [(5, 5.8)] and "0.80 s" in page.words
    transcript = page.words[page.words.index("Transcript") :]
    assert re.findall("こんに|天気|晴れ", transcript) == ["こんに", "天気", "晴れ"]


async def test_a_report_shows_what_a_barge_in_cut_off(hook: LoadHook, tmp_path: Path) -> None:
    cut = ("model_interrupted", 3, {"heard_ms": 2000, "sent_ms": 8000})
    page = await report(hook, tmp_path, ("model_spoke", 1, {}), cut, *said(9, 3.1, "一二三四五六七八", 2000)[1:])
    assert [across(bar) for bar in page.all("rect", "model")] == [(1, 3)]
    assert [across(bar) for bar in page.all("rect", "unheard")] == [(3, 9)]
    assert len(page.all("rect", "barge-in")) == 1
    assert "一二\n三四五六七八\n" in page.words
    assert "割り込み Barge-in · 再生 Heard: 2.0 / 8.0 s" in page.words


async def test_a_report_calls_only_that_a_barge_in_which_was_one(hook: LoadHook, tmp_path: Path) -> None:
    page = await report(hook, tmp_path, *said(1, 3, "こんにちは。", 2000))  # the caller hangs up
    assert "途中で終了 Cut short · 再生 Heard: 2.0 s" in page.words and not page.all("rect", "barge-in")


async def test_a_report_says_so_when_a_part_of_the_cost_is_not_known(hook: LoadHook, tmp_path: Path) -> None:
    call = PretendCall()
    call.notes["cost"] = {"usd": None, "known_usd": 0.012}
    assert "≥ $0.0120" in (await report(hook, tmp_path, call=call)).words


async def test_a_turn_that_had_no_words_does_not_take_those_of_a_later_one(hook: LoadHook, tmp_path: Path) -> None:
    cough: list[TimedEvent] = [("caller_spoke", 1, {}), ("caller_paused", 2, {})]
    page = await report(hook, tmp_path, *cough, *spoke(15, 17, "もしもし"), seconds=20)
    lines = page.words[page.words.index("Transcript") :].split()
    assert lines[-4:-1] == ["0:15", "発信者", "Caller"] and lines[-1] == "もしもし"


async def test_the_lines_of_a_report_stand_in_the_order_in_which_they_began(hook: LoadHook, tmp_path: Path) -> None:
    slow = ("tool_used", 6, {"name": "weather", "arguments": "{}", "result": "晴れ", "seconds": 5.0})
    page = await report(hook, tmp_path, *said(2, 4, "少々お待ちください。"), slow, *said(7, 9, "晴れです。"))
    assert [line["data-at"] for line in page.all("li")] == ["1.00", "2.00", "7.00"]


async def test_a_stranger_cannot_put_anything_but_text_into_a_report(hook: LoadHook, tmp_path: Path) -> None:
    evil = "</p></title><script>alert(1)</script><img src=x onerror='alert(1)'>\"'$row_s\ud83d\u202e"
    call = PretendCall(sid="CA1<b>", caller="<b>sip:x@y</b>")
    told = [
        *spoke(1, 2, evil),
        ("model_interrupted", 3, {"heard_ms": 500, "sent_ms": 900}),
        *said(2.5, 3, evil * 2, 500),
        ("tool_used", 4, {"name": evil, "arguments": evil, "result": evil, "seconds": 1.0}),
        ("key_pressed", 4, {"key": evil}),
        ("model_failed", 4, {"error": evil}),
    ]
    page = await report(hook, tmp_path, *told, call=call)
    assert len(page.all("script")) == 1 and not page.all("img") and not page.all("b")
    assert page.words.count("<img src=x onerror='alert(1)'>\"'$row_s") >= 8


async def test_a_report_needs_nothing_from_the_network(hook: LoadHook, tmp_path: Path) -> None:
    page = await report(hook, tmp_path, *said(0, 2, "はい。"))
    assert not [tag for tag in page.tags if {"src", "href", "srcset"} & set(tag[1])]
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';") and f"'nonce-{page.all('script')[0]['nonce']}'" in policy


async def test_a_report_names_the_cost_and_plays_the_recording_from_beside_it(hook: LoadHook, tmp_path: Path) -> None:
    call = PretendCall()
    call.notes |= {"cost": {"usd": 0.01234}, "recording": str(tmp_path / "rec" / "日 本#.wav")}
    page = await report(hook, tmp_path, call=call)
    assert "$0.0123" in page.words
    assert page.all("audio")[0]["src"] == "rec/%E6%97%A5%20%E6%9C%AC%23.wav"


async def test_a_report_gets_the_cost_that_comes_a_moment_after_the_end(hook: LoadHook, tmp_path: Path) -> None:
    call = PretendCall()
    asyncio.get_running_loop().call_later(0.2, call.notes.update, {"cost": {"usd": 0.5}})
    page = await report(hook, tmp_path, call=call, began=time.monotonic() - 10)
    assert "$0.5000" in page.words


async def test_a_report_is_private_and_masks_the_numbers(hook: LoadHook, tmp_path: Path) -> None:
    page = await report(hook, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert re.fullmatch(r"\d{8}T\d{6}Z-CA1\.html", file.name)
    assert "5678" in page.words and "12345678" not in page.words


async def test_an_hour_long_call_gets_a_row_for_each_half_minute(hook: LoadHook, tmp_path: Path) -> None:
    page = await report(hook, tmp_path, *spoke(3590, 3603, "長い"), seconds=3605)
    assert len(page.all("svg")) == 121
    assert [across(bar) for bar in page.all("rect", "caller")] == [(20, 30), (0, 3)]


def test_without_a_folder_no_report_is_written(
    hook: LoadHook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for value in ("", str(tmp_path / "file")):
        assert not any(hook("report", REPORTS=value).host.handled.values())
    assert caplog.text.count("REPORTS: ") == 1
