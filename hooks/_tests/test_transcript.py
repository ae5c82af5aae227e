"""hooks/transcript.py: who said what, in order, in the log and in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import LoadHook, PretendCall, conversation

CALL = [
    "0.5 model_spoke", "3 model_said text=鈴木です。 heard_ms=None",
    "4 caller_spoke", "5 caller_paused", "5.4 model_spoke", "6 caller_said text=天気は？",  # after the answer began
    "7 caller_spoke", "7 model_said text=どの地域の天気を heard_ms=1600", "8 caller_paused",  # a barge-in
    "8.2 caller_said text=東京です。", "8.5 model_spoke", "10 model_said text=晴れです。 heard_ms=None",
]  # fmt: skip


async def test_late_words_stand_where_they_were_spoken(hook: LoadHook) -> None:
    transcript = hook("transcript")
    await transcript.tell_all(PretendCall(), *conversation(*CALL))
    assert transcript.log == [
        "CA1 model: 鈴木です。",
        "CA1 caller: 天気は？",
        "CA1 model: どの地域の天気を [cut off: 1600 ms heard]",
        "CA1 caller: 東京です。",
        "CA1 model: 晴れです。",
    ]


async def test_a_line_is_logged_as_soon_as_it_and_all_before_it_are_known(hook: LoadHook) -> None:
    transcript, call = hook("transcript"), PretendCall()
    steps = ["1 caller_spoke", "2 caller_paused", "2.3 model_spoke", "4 model_said text=はい heard_ms=None"]
    await transcript.tell_all(call, *conversation(*steps)[:-1])
    assert transcript.log == []  # the caller's words are still to come
    transcript.module.caller_said(call, 5.0, "もしもし")
    assert transcript.log == ["CA1 caller: もしもし", "CA1 model: はい"]


async def test_an_empty_transcription_does_not_take_the_words_of_the_next_turn(hook: LoadHook) -> None:
    transcript, call = hook("transcript"), PretendCall()
    steps = ["1 caller_spoke", "2 caller_paused", "3 caller_spoke", "4 caller_paused"]
    steps += ["4.4 model_used model=gpt-transcribe"]  # the first was a cough
    steps += ["4.5 caller_said text=もしもし", "4.5 model_used model=gpt-transcribe"]
    steps += ["5 caller_spoke", "6 caller_paused", "6.5 model_used model=gpt-transcribe"]  # a cough as well
    steps += ["7 caller_spoke", "8 caller_paused", "8.1 model_used model=gpt-realtime", "8.5 caller_said text=東京"]
    events = conversation(*steps)
    for event, _, facts in events:
        if event == "model_used":
            transcribed = facts["model"] == "gpt-transcribe"
            facts["usage"] = {"type": "duration", "seconds": 1} if transcribed else {"input_tokens": 10}
    await transcript.tell_all(call, *events)
    words = [line.removeprefix("CA1 caller: ") for line in transcript.log]
    assert words == ["(no words)", "もしもし", "(no words)", "東京"]


async def test_the_usage_of_words_that_came_says_nothing_of_the_next_turn(hook: LoadHook) -> None:
    transcript, call = hook("transcript"), PretendCall()
    steps = ["1 caller_spoke", "2 caller_paused", "3 caller_spoke", "4 caller_paused", "4.5 caller_said text=もしもし"]
    usage = {"usage": {"type": "duration", "seconds": 1}, "model": "gpt-transcribe"}
    events = [*conversation(*steps)[:-1], ("model_used", 4.6, usage)]
    await transcript.tell_all(call, *events, *conversation("4.7 caller_said text=はい")[1:])
    assert transcript.log == ["CA1 caller: もしもし", "CA1 caller: はい"]


async def test_what_has_no_words_at_the_end_of_the_call_is_said_to_have_none(hook: LoadHook) -> None:
    transcript = hook("transcript")
    steps = ["1 caller_spoke", "2 caller_paused", "2.4 model_spoke", "3 model_said text=一行\n二行 heard_ms=500"]
    await transcript.tell_all(PretendCall(), *conversation(*steps))
    assert transcript.log == ["CA1 caller: (no words)", "CA1 model: 一行 二行 [cut off: 500 ms heard]"]


async def test_a_transcription_that_never_comes_neither_holds_up_the_log_nor_shifts_the_words(hook: LoadHook) -> None:
    transcript = hook("transcript")
    steps = ["1 caller_spoke", "2 caller_paused", "2.5 model_spoke", "4 model_said text=はい heard_ms=None"]
    steps += ["40 caller_spoke", "41 caller_paused", "42 caller_said text=東京"]
    await transcript.tell_all(PretendCall(), *conversation(*steps))
    assert transcript.log == ["CA1 caller: (no words)", "CA1 model: はい", "CA1 caller: 東京"]


async def test_a_second_item_of_an_answer_begins_where_the_first_has_ended(hook: LoadHook, tmp_path: Path) -> None:
    transcript = hook("transcript", TRANSCRIPTS=tmp_path, TRANSCRIPT_FORMAT="jsonl")
    steps = ["1 model_spoke", "2 model_said text=一つ目 heard_ms=None", "3 caller_spoke"]
    steps += ["3 model_said text=二つ目 heard_ms=800", "4 caller_paused", "5 caller_said text=あの"]
    steps += ["5.1 model_said text=聞こえず heard_ms=0"]  # was cut off before its first sound
    await transcript.tell_all(PretendCall(), *conversation(*steps))
    assert transcript.log == ["CA1 model: 一つ目", "CA1 model: 二つ目 [cut off: 800 ms heard]", "CA1 caller: あの"]
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["at_s"] for line in file.read_text().splitlines()[1:]] == [1.0, 2.0, 3.0]


async def test_a_turn_that_a_lost_session_left_open_is_one_turn(hook: LoadHook) -> None:
    transcript = hook("transcript")
    steps = ["1 caller_spoke", "2 caller_spoke", "3 caller_paused", "3.5 caller_said text=もしもし"]
    await transcript.tell_all(PretendCall(), *conversation(*steps))
    assert transcript.log == ["CA1 caller: もしもし"]


async def test_nothing_is_written_unless_a_folder_is_named(
    hook: LoadHook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await hook("transcript").tell_all(PretendCall(), *conversation(*CALL))
    assert list(tmp_path.rglob("*")) == []


async def test_a_transcript_is_written_as_markdown_for_its_owner_only_with_the_number_masked(
    hook: LoadHook, tmp_path: Path
) -> None:
    await hook("transcript", TRANSCRIPTS=tmp_path / "t").tell_all(PretendCall("CA1/../x"), *conversation(*CALL))
    (file,) = (tmp_path / "t").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-CA1x\.md", file.name)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    text = file.read_text()
    assert "+********5678 → " in text and "12345678" not in text
    assert text.splitlines()[4:7] == [
        "- 0:00 **AI** 鈴木です。",
        "- 0:04 **発信者** 天気は？",
        "- 0:05 **AI** どの地域の天気を *（1.6 秒まで再生）*",
    ]


async def test_a_transcript_is_written_as_json_lines_on_request(hook: LoadHook, tmp_path: Path) -> None:
    settings = {"TRANSCRIPTS": tmp_path, "TRANSCRIPT_FORMAT": "jsonl"}
    await hook("transcript", **settings).tell_all(PretendCall(), *conversation(*CALL))
    (file,) = tmp_path.glob("*.jsonl")
    first, *lines = map(json.loads, file.read_text().splitlines())
    assert (first["call"], first["caller"]) == ("CA1", "+********5678")
    assert lines[2] == {"at_s": 5.4, "side": "model", "text": "どの地域の天気を", "heard_ms": 1600}
    assert [line["side"] for line in lines] == ["model", "caller", "model", "caller", "model"]


async def test_a_wrong_transcript_format_is_one_clear_error_and_no_file(hook: LoadHook, tmp_path: Path) -> None:
    wrong_format = hook("transcript", TRANSCRIPTS=tmp_path / "t", TRANSCRIPT_FORMAT="pdf")
    assert len(wrong_format.log) == 1 and "md or jsonl" in wrong_format.log[0]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("folder", ["file", "/proc"])  # the second is there, and nobody can write to it
async def test_a_folder_that_takes_no_transcripts_is_one_error_at_the_start_and_the_words_are_logged_all_the_same(
    hook: LoadHook, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").write_text("")
    transcript = hook("transcript", TRANSCRIPTS=f" {tmp_path / folder} ")
    (error,) = transcript.errors
    assert "TRANSCRIPTS" in error and "Name a folder that can be written to" in error
    await transcript.tell_all(PretendCall(), *conversation(*CALL))
    assert len(transcript.log) == 1 + 5
