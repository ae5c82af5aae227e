"""hooks/transcript.py: who said what, in the order of speaking."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import LoadHook, PretendCall, conversation, refused

CALL = [
    "0.5 model_started_speaking item=m1", "3 model_said item=m1 text=鈴木です。 heard_ms=None",
    "4 caller_started_speaking item=c1", "5 caller_stopped_speaking item=c1",
    "5.4 model_started_speaking item=m2", "6 caller_said item=c1 text=天気は？",
    "7 caller_started_speaking item=c2", "7 model_said item=m2 text=どの地域の天気を heard_ms=1600",
    "8 caller_stopped_speaking item=c2", "8.2 caller_said item=c2 text=東京です。",
    "8.5 model_started_speaking item=m3", "10 model_said item=m3 text=晴れです。 heard_ms=None",
]  # fmt: skip


async def lines(hook: LoadHook, folder: Path, *steps: str) -> list[dict[str, Any]]:
    """The lines of a call's file, as JSON, without the first."""
    transcript = hook("transcript", TRANSCRIPTS=folder, TRANSCRIPT_FORMAT="jsonl")
    await transcript.tell_all(PretendCall(), *conversation(*steps))
    (file,) = folder.iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def spoke(item: str, at: float) -> list[str]:
    return [
        f"{at} caller_started_speaking item={item}",
        f"{at + 1} caller_stopped_speaking item={item}",
    ]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (CALL, ["鈴木です。", "天気は？", "どの地域の天気を", "東京です。", "晴れです。"]),
        # The words of two turns come in the other order; those of the first never come.
        ([*spoke("a", 1), *spoke("b", 3), "4.5 caller_said item=b text=取消",
          "5 caller_said item=a text=予約"], ["予約", "取消"]),
        ([*spoke("a", 1), *spoke("b", 3), "4.5 caller_said item=b text=取消",
          "11 caller_said item=a text="], ["", "取消"]),
        # An answer's second item is sent ahead; what the caller says meanwhile comes before it.
        (["1 model_started_speaking item=m1", "1.2 model_started_speaking item=m2", *spoke("c", 2),
          "3.5 caller_said item=c text=はい", "4 model_said item=m1 text=一つ目 heard_ms=None",
          "6 model_said item=m2 text=二つ目 heard_ms=None"], ["一つ目", "はい", "二つ目"]),
        (["1 model_started_speaking item=m1", "2 model_said item=m1 text=聞こえず heard_ms=0"], []),
        (["1 key_pressed key=1", "1.5 key_pressed key=2", *spoke("c", 2),
          "3.5 caller_said item=c text=はい", "4 key_pressed key=#"], ["12", "はい", "#"]),
    ],
    ids=["in turn", "words out of order", "words missing", "two items", "not heard", "keys"],
)  # fmt: skip
async def test_order(hook: LoadHook, tmp_path: Path, steps: list[str], words: list[str]) -> None:
    """Each line has its own words, and stands where it was spoken."""
    *told, end = await lines(hook, tmp_path, *steps)
    assert [line["text"] for line in told] == words
    assert end["ended"] == "caller hung up"


async def test_growth(hook: LoadHook, tmp_path: Path) -> None:
    """A line is written as soon as it and all before it are known."""
    transcript, call = hook("transcript", TRANSCRIPTS=tmp_path), PretendCall()
    waiting = [
        *spoke("c", 1),
        "2.3 model_started_speaking item=m",
        "4 model_said item=m text=ええ heard_ms=None",
    ]
    transcript.tell(call, *conversation(*waiting)[:-1])
    await transcript.finish()
    (file,) = tmp_path.iterdir()
    assert "ええ" not in file.read_text()
    transcript.module.any_event(call, 5.0, "caller_said", {"item": "c", "text": "もしもし"})
    assert re.findall("もしもし|ええ", file.read_text()) == ["もしもし", "ええ"]


async def test_broken_off(hook: LoadHook, tmp_path: Path) -> None:
    """A caller who hangs up in mid-speech is told from one who said nothing."""
    steps = [*spoke("a", 1), "3 caller_said item=a text=", "4 caller_started_speaking item=b"]
    steps += ["5 caller_said item=b text="]
    *told, _ = await lines(hook, tmp_path, *steps)
    assert [line.get("broken_off", False) for line in told] == [False, True]


async def test_markdown(hook: LoadHook, tmp_path: Path) -> None:
    """A file for its owner only, with the numbers masked and a link to it in the log."""
    transcript, call = hook("transcript", TRANSCRIPTS=tmp_path / "t"), PretendCall()
    await transcript.tell_all(call, *conversation(*CALL, "10.5 caller_started_speaking item=c3"))
    (file,) = (tmp_path / "t").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-CA1\.md", file.name)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    (record,) = transcript.records
    assert (record.getMessage(), record.call, call.notes["transcript"]) == (
        file.as_uri(),
        "CA1",
        str(file),
    )
    title, _, numbers, _, *told = file.read_text().splitlines()
    assert title.startswith("# 通話の記録 20")
    assert numbers == "+********5678 → +*******0000 (CA1)"
    assert told == [
        "- 0:00 **AI** 鈴木です。",
        "- 0:04 **発信者** 天気は？",
        "- 0:05 **AI** どの地域の天気を *（1.6 秒まで再生）*",
        "- 0:07 **発信者** 東京です。",
        "- 0:08 **AI** 晴れです。",
        "- 0:10 **発信者** （話の途中で途切れました）",
        "- 0:11 **通話終了** 発信者が切断",
    ]


def test_no_folder(hook: LoadHook) -> None:
    """Nothing is written unless a folder is named: then the file is told nothing at all."""
    assert not any(hook("transcript").host.handling.values())


@pytest.mark.parametrize("setting", [{"TRANSCRIPT_FORMAT": "txt"}, {"TRANSCRIPTS": "/proc/no"}])
def test_wrong_setting(hook: LoadHook, setting: dict[str, str]) -> None:
    refused(hook, "transcript", **setting)
