"""hooks/clock.py: what time it is, in Japan and elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from conftest import HOOKS, LoadHook, PretendCall

Ask = Callable[..., Any]


@pytest.fixture
def clock(hook: LoadHook) -> Ask:
    """Call the tool as the model does, at a time; text that is JSON comes back read."""
    loaded = hook("clock")

    async def told(at: str, **place: str) -> Any:
        loaded.module.now = lambda: datetime.fromisoformat(at)
        text = await loaded.host.run_tool(PretendCall(), "current_time", json.dumps(place))
        return json.loads(text) if text.startswith("{") else text

    return told


async def test_japan(clock: Ask) -> None:
    """The time is Japan's unless another is asked for."""
    told = await clock("2026-11-23T16:05+00:00")
    assert (told["place"], told["date"], told["time"]) == (
        "日本",
        "2026年（令和8年）11月24日（火曜日）",
        "1時5分",
    )
    assert told == await clock("2026-11-23T16:05+00:00", place="東京")


@pytest.mark.parametrize(
    ("place", "time_there", "compared"),
    [
        ("ニューヨーク", "12時5分", "日本より13時間遅れている"),
        ("new york", "12時5分", "日本より13時間遅れている"),
        ("Europe/London", "17時5分", "日本より8時間遅れている"),
        ("インド", "21時35分", "日本より3時間30分遅れている"),
        ("Auckland", "4時5分", "日本より3時間進んでいる"),
        ("Seoul", "1時5分", "日本と同じ"),
    ],
)
async def test_elsewhere(clock: Ask, place: str, time_there: str, compared: str) -> None:
    """Elsewhere it is another time."""
    told = await clock("2026-07-01T16:05+00:00", place=place)
    assert (told["time"], told["compared_to_japan"]) == (time_there, compared)


@pytest.mark.parametrize("place", ["火星", "Asia", "../../etc/passwd", "x" * 5000, "\0"])
async def test_unknown_place(clock: Ask, place: str) -> None:
    """An unknown time zone is said to be unknown."""
    assert "is not known" in await clock("2026-07-01T16:05+00:00", place=place)


def test_no_time_zone_data() -> None:
    """There is still the time of Japan."""
    code = "import clock; print(clock.current_time()['place'], clock.current_time('London'))"
    environment = {
        **os.environ,
        "PYTHONTZPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
    }
    hide_tzdata = "import sys; sys.modules['tzdata'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", hide_tzdata + code],
        cwd=HOOKS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.stdout.startswith("日本 Only the time of Japan is known"), done.stderr
