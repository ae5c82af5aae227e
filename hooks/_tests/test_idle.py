"""hooks/idle.py: who is asked whether they are still there, and who is said goodbye to."""

from __future__ import annotations

import asyncio
import time

import pytest
from conftest import Event, LoadHook, PretendCall, refused, until

END = "hang_up final"
TRANSCRIBED: Event = (
    "model_used",
    {"usage": {}, "model": "gpt-transcribe", "kind": "transcription"},
)


def starts(item: str) -> Event:
    return ("caller_started_speaking", {"item": item})


def stops(item: str) -> Event:
    return ("caller_stopped_speaking", {"item": item})


def says(item: str, text: str) -> Event:
    return ("caller_said", {"item": item, "text": text})


def turn(item: str, text: str = "") -> list[Event]:
    """A turn of the caller's in which OpenAI has looked for words."""
    return [starts(item), stops(item), TRANSCRIBED, says(item, text)]


def answer(item: str) -> Event:
    return ("model_started_speaking", {"item": item})


async def test_silence(hook: LoadHook) -> None:
    """A silent caller is asked twice, and then the call ends politely and for good."""
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    await until(lambda: END in call.did)
    assert time.monotonic() - began >= 3 * 0.05
    await asyncio.sleep(0.2)
    first, second, goodbye, end = call.did
    assert "黙って" in first and "もう一度" in second and "失礼いたします" in goodbye and end == END
    assert [record.call for record in idle.records] == [call.sid]


async def test_not_before_its_time(hook: LoadHook) -> None:
    """A caller is not asked before IDLE_SECONDS are over."""
    idle, call = hook("idle", IDLE_SECONDS="0.2"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    await until(lambda: call.did)
    assert 0.2 <= time.monotonic() - began < 0.4


async def test_busy(hook: LoadHook) -> None:
    """Who listens to a long answer is neither asked nor hung up on; the time runs from its end."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    call.busy = True
    idle.tell(call, "call_started", answer("m"))
    await asyncio.sleep(0.6)
    assert call.did == []
    call.busy, heard_at = False, time.monotonic()
    await until(lambda: call.did)
    assert time.monotonic() - heard_at > 0.08 and "黙って" in call.did[0]


async def test_cough_into_a_long_answer(hook: LoadHook) -> None:
    """A cough that the model is not stopped by ends no answer, however long it still is."""
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started", *turn("a", "昔話をお願いします"))
    await asyncio.sleep(0.02)
    call.busy = True
    idle.tell(call, answer("m"), *turn("cough"))
    await asyncio.sleep(0.4)
    assert call.did == []


async def test_late_words_of_a_long_answer(hook: LoadHook) -> None:
    """The answer begins before the words of the turn have come; then it may be as long as it is."""
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started", starts("a"), stops("a"))
    await asyncio.sleep(0.02)
    call.busy = True
    idle.tell(call, answer("m"), TRANSCRIBED, says("a", "昔話をお願いします"))
    await asyncio.sleep(0.4)
    assert call.did == []


async def test_caller_speaks(hook: LoadHook) -> None:
    """Nobody is asked while they speak."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    idle.tell(call, "call_started", starts("a"))
    await asyncio.sleep(0.3)
    assert call.did == []
    idle.tell(call, stops("a"), says("a", "もしもし"))
    await until(lambda: call.did)
    assert "黙って" in call.did[0]


@pytest.mark.parametrize("sign", [turn("a", "はい"), [("key_pressed", {"key": "1"})]], ids=str)
async def test_sign_of_life(hook: LoadHook, sign: list[Event]) -> None:
    """After a word or a key the asking begins anew."""
    idle, call = hook("idle", IDLE_SECONDS="0.12"), PretendCall()
    idle.tell(call, "call_started")
    await until(lambda: len(call.did) == 2)
    idle.tell(call, *sign)
    await until(lambda: len(call.did) == 3)
    assert call.did[2] == call.did[0] and END not in call.did


async def test_blip_after_each_question(hook: LoadHook) -> None:
    """A sound without words does not begin the asking anew."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    idle.tell(call, "call_started")
    for questions in (1, 2):
        await until(lambda questions=questions: len(call.did) == questions)  # type: ignore[misc]
        idle.tell(call, *turn(f"blip{questions}"))
    await until(lambda: END in call.did)
    assert len(call.did) == 4


async def test_noise_that_is_answered(hook: LoadHook) -> None:
    """The model answers each blip, so the call is busy all the time: it ends after 4 times."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    for number in range(60):
        call.busy = False
        idle.tell(call, starts(f"blip{number}"))
        await asyncio.sleep(0.002)
        call.busy = True
        idle.tell(call, *turn(f"blip{number}")[1:], answer(f"m{number}"))
        await asyncio.sleep(0.02)
        if call.did:
            break
    assert 0.4 <= time.monotonic() - began < 0.7
    assert "失礼いたします" in call.did[0] and call.did[1] == END


async def test_noise_that_the_model_keeps_silent_about(hook: LoadHook) -> None:
    """The model thinks about each blip and says nothing: the call ends as well."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    for number in range(60):
        call.busy = False
        idle.tell(call, starts(f"blip{number}"))
        await asyncio.sleep(0.002)
        call.busy = True
        idle.tell(call, *turn(f"blip{number}")[1:])
        await asyncio.sleep(0.02)
        if call.did:
            break
    assert 0.4 <= time.monotonic() - began < 0.7


async def test_noise_that_interrupts(hook: LoadHook) -> None:
    """A noise that begins while the model speaks, and is answered, counts as noise as well."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    call.busy = True
    idle.tell(call, "call_started", answer("greeting"), *turn("blip"), answer("m"))
    await until(lambda: END in call.did, 1)


async def test_endless_sound(hook: LoadHook) -> None:
    """Hold music that never stops ends the call after four times IDLE_SECONDS."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started", starts("music"))
    await until(lambda: call.did)
    assert 0.4 <= time.monotonic() - began < 0.6
    assert "失礼いたします" in call.did[0] and call.did[1] == END


async def test_talk_without_transcription(hook: LoadHook) -> None:
    """Who talks is not hung up on when nobody looks for their words; silence is still silence."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    idle.tell(call, "call_started")
    for number in range(12):
        idle.tell(call, starts(f"a{number}"), stops(f"a{number}"), says(f"a{number}", ""))
        await asyncio.sleep(0.05)
    assert call.did == []
    await until(lambda: END in call.did)
    assert len(call.did) == 4


async def test_transcription_that_fails(hook: LoadHook) -> None:
    """Transcription worked and then fails: from there on a turn counts without its words."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    idle.tell(call, "call_started", *turn("a0", "もしもし"))
    for number in range(1, 12):
        idle.tell(call, starts(f"a{number}"), stops(f"a{number}"), says(f"a{number}", ""))
        await asyncio.sleep(0.05)
    assert call.did == []


async def test_words_come_late(hook: LoadHook) -> None:
    """The words of an earlier turn do not end the turn that is being spoken."""
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    idle.tell(call, "call_started", starts("a"), stops("a"), starts("b"), says("a", "あの"))
    await asyncio.sleep(0.25)
    assert call.did == []


async def test_end(hook: LoadHook) -> None:
    """Nothing of this file outlives the call."""
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started", ("call_ended", {"reason": "caller hung up"}))
    await idle.finish()
    await asyncio.sleep(0.15)
    assert call.did == [] and not idle.module.idles


async def test_speed(hook: LoadHook) -> None:
    """A hundred silent calls cost next to nothing."""
    idle, calls = hook("idle"), [PretendCall(f"CA{number}") for number in range(100)]
    for call in calls:
        idle.tell(call, "call_started")
    await until(lambda: len(idle.module.idles) == 100)
    used = time.process_time()
    await asyncio.sleep(0.55)
    assert time.process_time() - used < 0.1
    for call in calls:
        idle.tell(call, ("call_ended", {"reason": "caller hung up"}))
    await idle.finish()


def test_0_seconds(hook: LoadHook) -> None:
    """IDLE_SECONDS=0 asks nobody: then the file is told nothing at all."""
    assert not any(hook("idle", IDLE_SECONDS="0").host.handling.values())


@pytest.mark.parametrize("setting", ["-1", "soon", "nan", "4000"])
def test_wrong_seconds(hook: LoadHook, setting: str) -> None:
    """A wrong IDLE_SECONDS stops the start."""
    assert "0 to 3600" in refused(hook, "idle", IDLE_SECONDS=setting)
