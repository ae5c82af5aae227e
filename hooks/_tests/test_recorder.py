"""hooks/recorder.py: what stands in the WAV of a call, and when."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import wave
from pathlib import Path
from typing import Any

import pytest
from conftest import LoadHook, PretendCall, TimedEvent, refused, until

STARTED: TimedEvent = ("call_started", 0.0, {})
MULAW = ["-r", "8000", "-e", "mu-law", "-b", "8", "-c", "1"]  # as sox wants to be told
TONE, NOISE = (
    b"\x10",
    b"\x90",
)  # two loud mu-law values, one of each sign: they decode to -15996 and 15996

Sides = tuple[list[int], list[int]]


def caller(
    seconds: float, at: float = 0.0, byte: bytes = TONE, late: float = 0.0
) -> list[TimedEvent]:
    """20 ms frames from `at` on, each as it comes."""
    return [
        ("caller_audio", at + 0.02 * i + late, {"mulaw": byte * 160})
        for i in range(round(seconds * 50))
    ]


def model(seconds: float, at: float) -> TimedEvent:
    return ("model_audio", at, {"mulaw": NOISE * round(seconds * 8000)})


async def record(hook: LoadHook, folder: Path, *events: TimedEvent, seconds: float) -> Sides:
    """The samples of both sides: left, right."""
    recorder, call = hook("recorder", RECORDINGS=folder), PretendCall()
    in_order = sorted(events, key=lambda event: event[1])
    await recorder.tell_all(
        call, STARTED, *in_order, ("call_ended", seconds, {"reason": "caller hung up"})
    )
    return sides(call.notes["recording"])


def sides(path: str) -> Sides:
    with wave.open(path) as wav:
        assert os.path.getsize(path) == 44 + 4 * wav.getnframes()  # the header tells the truth
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (2, 2, 8000)
        samples = memoryview(wav.readframes(wav.getnframes())).cast("h")
    return samples[0::2].tolist(), samples[1::2].tolist()


def sounding(samples: list[int]) -> list[Any]:
    """Where it is not silent: [(from, to) …] in seconds."""
    spans: list[Any] = []
    began = None
    for i, sample in enumerate([*samples, 0]):
        if sample and began is None:
            began = i
        elif not sample and began is not None:
            spans.append((began / 8000, i / 8000))
            began = None
    return spans


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two voices as a telephone carries them: mu-law, 8 kHz."""
    if not (shutil.which("espeak-ng") and shutil.which("sox")):
        pytest.skip("needs espeak-ng and sox")
    folder = tmp_path_factory.mktemp("voices")
    made: list[bytes] = []
    for name, words in (
        ("caller", "もしもし、聞こえますか"),
        ("model", "はい、よく聞こえております"),
    ):
        file = str(folder / f"{name}.wav")
        subprocess.run(["espeak-ng", "-v", "ja", "-w", file, words], check=True)
        ulaw = ["sox", file, "-t", "raw", *MULAW, "-"]
        made.append(subprocess.run(ulaw, check=True, capture_output=True).stdout)
    return made


def as_sox_decodes(mulaw: bytes) -> list[int]:
    sox = ["sox", "-t", "raw", *MULAW, "-", "-t", "raw", "-e", "signed", "-b", "16", "-"]
    return (
        memoryview(subprocess.run(sox, input=mulaw, check=True, capture_output=True).stdout)
        .cast("h")
        .tolist()
    )


async def test_the_caller_is_left_and_the_model_right_sample_for_sample_as_sox_decodes_them(
    hook: LoadHook, voices: list[bytes], tmp_path: Path
) -> None:
    his, hers = voices
    frames = [
        ("caller_audio", 0.5 + i / 8000, {"mulaw": his[i : i + 160]})
        for i in range(0, len(his), 160)
    ]
    burst = [
        ("model_audio", 3 + i / 80000, {"mulaw": hers[i : i + 1584]})
        for i in range(0, len(hers), 1584)
    ]
    left, right = await record(hook, tmp_path, *frames, *burst, seconds=8)
    assert len(left) == len(right) == 8 * 8000
    assert left[4000 : 4000 + len(his)] == as_sox_decodes(his) and not any(left[:4000])
    assert right[24000 : 24000 + len(hers)] == as_sox_decodes(hers) and not any(right[:24000])


async def test_a_burst_of_the_model_is_recorded_when_it_plays_one_piece_behind_the_other(
    hook: LoadHook, tmp_path: Path
) -> None:
    _, right = await record(
        hook, tmp_path, model(1, at=2), model(1, at=2.1), model(1, at=5), seconds=7
    )
    assert sounding(right) == [(2, 4), (5, 6)]


async def test_a_barge_in_cuts_the_model_where_the_caller_stopped_hearing_it(
    hook: LoadHook, tmp_path: Path
) -> None:
    cut = ("model_interrupted", 3.25, {"heard_ms": 1250, "sent_ms": 10_000})
    events = [*caller(6), model(5, at=2), model(5, at=2.2), cut, model(1, at=4)]
    _, right = await record(hook, tmp_path, *events, seconds=6)
    assert sounding(right) == [pytest.approx((2, 3.25), abs=0.04), pytest.approx((4, 5), abs=0.04)]


async def test_what_the_model_has_still_to_say_when_the_caller_hangs_up_is_not_recorded(
    hook: LoadHook, tmp_path: Path
) -> None:
    ahead = [
        ("caller_audio", 0.0, {"mulaw": TONE * 160})
    ] * 160  # the caller's are, though their clock runs ahead
    left, right = await record(hook, tmp_path, *ahead, model(60, at=1), seconds=3)
    assert sounding(left) == [(0, 3.2)] and sounding(right) == [(1, 3)]


async def test_audio_of_the_caller_that_the_network_held_up_is_recorded_where_it_was_said(
    hook: LoadHook, tmp_path: Path
) -> None:
    held_up = [
        ("caller_audio", 3.5 + 0.001 * i, {"mulaw": NOISE * 160}) for i in range(75)
    ]  # of 2.0 to 3.5 s
    left, _ = await record(
        hook, tmp_path, *caller(2), *held_up, *caller(2, at=3.6, byte=TONE), seconds=5.5
    )
    assert [left[8000 * 2 - 1], left[8000 * 2], left[28000 - 1], left[28000]] == [
        -15996,
        15996,
        15996,
        -15996,
    ]


async def test_audio_of_the_caller_that_is_missing_for_good_leaves_silence(
    hook: LoadHook, tmp_path: Path
) -> None:
    left, _ = await record(hook, tmp_path, *caller(2), *caller(6, at=4.5), seconds=10.5)
    assert sounding(left)[-1][1] == pytest.approx(10.5, abs=0.04)
    assert sum(end - begin for begin, end in sounding(left)) == pytest.approx(8, abs=0.04)


async def test_the_caller_stays_in_place_when_they_were_held_up_longer_than_the_file_waits(
    hook: LoadHook, tmp_path: Path
) -> None:
    held_up = [("caller_audio", 10.0, {"mulaw": NOISE * 160})] * 400  # of 2 to 10 s, at once
    left, _ = await record(
        hook, tmp_path, *caller(2), model(1, at=9.5), *held_up, *caller(2, at=10.02), seconds=12
    )
    assert sounding(left)[-1][1] == pytest.approx(12, abs=0.04)
    assert [left[8000 * 10 - 400], left[8000 * 11], len(left)] == [15996, -15996, 12 * 8000]


async def test_a_recording_that_a_crash_leaves_behind_plays_up_to_the_last_second(
    hook: LoadHook, tmp_path: Path
) -> None:
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    await recorder.tell_all(call, STARTED, *caller(5.5), model(1, at=5.6))  # and no call_ended
    left, right = sides(call.notes["recording"])
    assert 4.5 * 8000 <= len(left) == len(right) and sounding(left)[0][1] >= 4.5


async def test_the_file_does_not_wait_for_ever_for_a_caller_of_whom_nothing_comes(
    hook: LoadHook, tmp_path: Path
) -> None:
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    await recorder.tell_all(call, STARTED, model(1, at=1), model(1, at=20))  # and no call_ended
    left, right = sides(call.notes["recording"])
    assert len(left) >= 16 * 8000 and sounding(right) == [(1, 2)]


async def test_an_hour_of_talk_is_not_kept_in_memory_and_a_flood_is_cut_off(
    hook: LoadHook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, call, other = (
        hook("recorder", RECORDINGS=tmp_path),
        PretendCall("CA1"),
        PretendCall("CA2"),
    )
    minutes = [
        ("caller_audio", 60.0 * i, {"mulaw": TONE * 480_000}) for i in range(12)
    ]  # each a minute
    recorder.tell(call, STARTED, *minutes)
    await recorder.tell_all(other, STARTED, *[model(400, at=1)] * 2)
    assert len(call.notes["recorder"].left) <= 61 * 8000
    assert (
        len(other.notes["recorder"].right) <= 600 * 8000
        and other.notes["recorder"].dropped > 199 * 8000
    )


async def test_privacy(hook: LoadHook, tmp_path: Path) -> None:
    """A file is for its owner only, its name sorts by time, and the log has a link to it."""
    recorder, call = hook("recorder", RECORDINGS=tmp_path / "new"), PretendCall()
    await recorder.tell_all(call, STARTED, ("call_ended", 1, {"reason": ""}))
    (file,) = (tmp_path / "new").iterdir()
    (record,) = recorder.records
    assert (record.getMessage(), record.call, record.seconds) == (file.as_uri(), "CA1", 1.0)
    assert str(file) == call.notes["recording"] and "recorder" not in call.notes
    assert re.fullmatch(r"\d{8}T\d{6}Z-CA1\.wav", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_a_full_disk_ends_the_recording_with_one_line_and_not_the_call(
    hook: LoadHook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    recorder.tell(call, STARTED)
    await until(lambda: "recording" in call.notes)

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    call.notes["recorder"].wav.writeframes = full
    await recorder.tell_all(call, *caller(5), ("call_ended", 5, {"reason": ""}))
    assert caplog.text.count("No space left") == 1 and "failed" not in caplog.text


def test_no_folder(hook: LoadHook) -> None:
    """Nothing is recorded, and the bridge need not even decode the audio."""
    host = hook("recorder").host
    assert not host.listens("caller_audio") and not host.listens("model_audio")


def test_wrong_folder(hook: LoadHook, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(hook, "recorder", RECORDINGS=tmp_path / "file")
