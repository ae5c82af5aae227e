"""hooks/recorder.py: what stands in the WAV of a call, and when."""

from __future__ import annotations

import os
import re
import stat
import wave
from pathlib import Path
from typing import Any

import pytest
from conftest import LoadHook, PretendCall, TimedEvent, refused, until

STARTED: TimedEvent = ("call_started", 0.0, {})
TONE, NOISE = b"\x10", b"\x90"  # two loud mu-law values: they decode to -15996 and 15996

Sides = tuple[list[int], list[int]]


def caller(seconds: float, at: float = 0.0, byte: bytes = TONE) -> list[TimedEvent]:
    """20 ms frames from `at` on, each as it comes."""
    frame = {"mulaw": byte * 160}
    return [("caller_audio", at + 0.02 * i, frame) for i in range(round(seconds * 50))]


def at_once(seconds: float, at: float) -> list[TimedEvent]:
    """As many frames as fill these seconds, all at one time."""
    return [("caller_audio", at, {"mulaw": NOISE * 160})] * round(seconds * 50)


def model(seconds: float, at: float) -> TimedEvent:
    return ("model_audio", at, {"mulaw": NOISE * round(seconds * 8000)})


def sides(path: str) -> Sides:
    with wave.open(path) as wav:
        assert os.path.getsize(path) == 44 + 4 * wav.getnframes()  # the header tells the truth
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (2, 2, 8000)
        samples = memoryview(wav.readframes(wav.getnframes())).cast("h")
    return samples[0::2].tolist(), samples[1::2].tolist()


def sounding(samples: list[int]) -> list[Any]:
    """Where a value begins and ends that is not silence: [(from, to) …] in seconds."""
    edges = [i for i, (a, b) in enumerate(zip([0, *samples], [*samples, 0], strict=True)) if a != b]
    spans = [(a / 8000, b / 8000) for a, b in zip(edges, edges[1:], strict=False) if samples[a]]
    return [pytest.approx(span, abs=0.041) for span in spans]


CUT = ("model_interrupted", 3.25, {"item": "m", "heard_ms": 1250, "sent_ms": 10_000})


@pytest.mark.parametrize(
    ("events", "seconds", "left", "right"),
    [
        ([model(1, 2), model(1, 2.1), model(1, 5)], 7, [], [(2, 4), (5, 6)]),
        ([*caller(6), model(5, 2), model(5, 2.2), CUT, model(1, 4)], 6,
         [(0, 6)], [(2, 3.25), (4, 5)]),
        ([*caller(3), model(60, 1)], 3, [(0, 3)], [(1, 3)]),
        ([*at_once(3.2, 0)], 3, [(0, 3.2)], []),
        ([*caller(2), *at_once(1.5, 3.5), *caller(2, 3.6)], 5.5,
         [(0, 2), (2, 3.5), (3.5, 5.5)], []),
        ([*caller(2), *caller(6, 4.5)], 10.5, [(0, 3.02), (5.52, 10.5)], []),
        ([*caller(2), model(1, 9.5), *at_once(8, 10), *caller(2, 10.02)], 12,
         [(0, 2), (6.5, 10), (10, 12)], [(9.5, 10.5)]),
    ],
    ids=["a burst plays when it is its turn", "a barge-in cuts", "the end cuts", "a clock ahead",
         "frames held up", "frames lost", "frames held up for longer than the file waits"],
)  # fmt: skip
async def test_sides(
    hook: LoadHook, tmp_path: Path, events: Any, seconds: float, left: Any, right: Any
) -> None:
    """Each side stands where it was said and heard: the caller left, the model right."""
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    in_order = sorted(events, key=lambda event: event[1])
    await recorder.tell_all(call, STARTED, *in_order, ("call_ended", seconds, {"reason": ""}))
    assert [sounding(side) for side in sides(call.notes["recording"])] == [left, right]


@pytest.mark.parametrize(
    ("code", "sample"), [(0x00, -32124), (0x80, 32124), (0x10, -15996), (0x7F, 0), (0xFF, 0)]
)
def test_mulaw(hook: LoadHook, code: int, sample: int) -> None:
    """The values of ITU-T G.711."""
    assert hook("recorder").module.SAMPLES[code] == sample


@pytest.mark.parametrize(
    ("events", "written_s"),
    [([*caller(5.5), model(1, 5.6)], 4.5), ([model(1, 1), model(1, 20)], 16)],
    ids=["both speak", "nothing comes from the caller"],
)
async def test_crash(hook: LoadHook, tmp_path: Path, events: Any, written_s: float) -> None:
    """What a crash leaves behind plays, up to the last seconds."""
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    await recorder.tell_all(call, STARTED, *events)  # and no call_ended
    left, right = sides(call.notes["recording"])
    assert len(left) == len(right) >= written_s * 8000


async def test_memory(hook: LoadHook, tmp_path: Path) -> None:
    """An hour of talk is not kept in memory, and a flood is cut off."""
    recorder, call, other = hook("recorder", RECORDINGS=tmp_path), PretendCall(), PretendCall("CA2")
    minutes = [("caller_audio", 60.0 * i, {"mulaw": TONE * 480_000}) for i in range(12)]
    recorder.tell(call, STARTED, *minutes)
    await recorder.tell_all(other, STARTED, *[model(400, at=1)] * 2)
    assert len(call.notes["recorder"].left) <= 61 * 8000
    assert len(other.notes["recorder"].right) <= 600 * 8000
    assert other.notes["recorder"].dropped > 199 * 8000


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


async def test_full_disk(hook: LoadHook, tmp_path: Path) -> None:
    """It ends the recording with one line, and not the call."""
    recorder, call = hook("recorder", RECORDINGS=tmp_path), PretendCall()
    recorder.tell(call, STARTED)
    await until(lambda: "recording" in call.notes)

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    call.notes["recorder"].wav.writeframes = full
    await recorder.tell_all(call, *caller(5), ("call_ended", 5, {"reason": ""}))
    error, end = recorder.records
    assert "No space left" in error.getMessage() and error.call == end.call == "CA1"


def test_no_folder(hook: LoadHook) -> None:
    """Nothing is recorded, and the bridge need not even decode the audio."""
    assert not any(hook("recorder").host.handling.values())


def test_wrong_folder(hook: LoadHook, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(hook, "recorder", RECORDINGS=tmp_path / "file")
