"""hooks/idle.py: who is asked whether they are still there, and who is said goodbye to."""

from __future__ import annotations

import pytest
from conftest import Event, LoadHook, PretendCall, Watched, refused, until

END = "hang_up final"
TRANSCRIBED: Event = ("model_used", {"usage": {}, "model": "", "kind": "transcription"})


def starts(item: str) -> Event:
    return ("caller_started_speaking", {"item": item})


def says(item: str, text: str) -> Event:
    return ("caller_said", {"item": item, "text": text})


def turn(item: str, text: str = "") -> list[Event]:
    """A turn of the caller's in which OpenAI has looked for words."""
    return [starts(item), TRANSCRIBED, says(item, text)]


def answer(item: str) -> Event:
    return ("model_started_speaking", {"item": item})


@pytest.fixture
def idle(hook: LoadHook) -> Watched:
    """The file with its 25 s, looking every 2.5 s."""
    module = hook("idle").module
    return Watched(module, module.idles, 2.5)


@pytest.fixture
def call(idle: Watched) -> PretendCall:
    call = PretendCall()
    idle.tell(call, "call_started")
    return call


def test_silence(idle: Watched, call: PretendCall) -> None:
    """A silent caller is asked twice, and then the call ends politely and for good."""
    assert idle.wait(call, 22.5) == []
    (first,) = idle.wait(call, 25)
    (second,) = idle.wait(call, 25)
    goodbye, end = idle.wait(call, 100)
    assert "黙って" in first and "もう一度" in second and "失礼いたします" in goodbye and end == END


def test_busy(idle: Watched, call: PretendCall) -> None:
    """Who listens to a long answer is neither asked nor hung up on; the time runs from its end."""
    call.busy = True
    idle.tell(call, answer("m"))
    assert idle.wait(call, 600) == []
    call.busy = False
    assert idle.wait(call, 22.5) == []
    assert "黙って" in idle.wait(call, 2.5)[0]


def test_cough_into_a_long_answer(idle: Watched, call: PretendCall) -> None:
    """A cough that the model is not stopped by ends no answer, however long it still is."""
    idle.tell(call, *turn("a", "昔話をお願いします"))
    call.busy = True
    idle.tell(call, answer("m"), *turn("cough"))
    assert idle.wait(call, 600) == []


def test_late_words_of_a_long_answer(idle: Watched, call: PretendCall) -> None:
    """The answer begins before the words of the turn have come; then it may be as long as it is."""
    idle.tell(call, starts("a"))
    call.busy = True
    idle.tell(call, answer("m"), TRANSCRIBED, says("a", "昔話をお願いします"))
    assert idle.wait(call, 600) == []


def test_caller_speaks(idle: Watched, call: PretendCall) -> None:
    """Nobody is asked while they speak. The words of an earlier turn do not end this one."""
    idle.tell(call, starts("a"), starts("b"), says("a", "あの"))
    assert idle.wait(call, 75) == []
    idle.tell(call, says("b", "もしもし"))
    assert idle.wait(call, 22.5) == []
    assert "黙って" in idle.wait(call, 2.5)[0]


@pytest.mark.parametrize("sign", [turn("a", "はい"), [("key_pressed", {"key": "1"})]], ids=str)
def test_sign_of_life(idle: Watched, call: PretendCall, sign: list[Event]) -> None:
    """After a word or a key the asking begins anew."""
    first, _ = idle.wait(call, 50)
    idle.tell(call, *sign)
    assert idle.wait(call, 25) == [first]


def test_blip_after_each_question(idle: Watched, call: PretendCall) -> None:
    """A sound without words does not begin the asking anew."""
    for blip in ("b1", "b2"):
        assert len(idle.wait(call, 25)) == 1
        idle.tell(call, *turn(blip))
    assert idle.wait(call, 25)[-1] == END


@pytest.mark.parametrize("answered", [[answer("m")], []], ids=["answered", "not answered"])
def test_noise(idle: Watched, call: PretendCall, answered: list[Event]) -> None:
    """The call is busy all the time, because of noise alone: it ends after 4 times."""
    for number in range(19):
        call.busy = False
        idle.tell(call, starts(f"blip{number}"))
        call.busy = True
        idle.tell(call, *turn(f"blip{number}")[1:], *answered)
        assert idle.wait(call, 5) == []
    assert idle.wait(call, 5)[-1] == END


def test_noise_that_interrupts(idle: Watched, call: PretendCall) -> None:
    """A noise that begins while the model speaks, and is answered, counts as noise as well."""
    call.busy = True
    idle.tell(call, answer("greeting"), *turn("blip"), answer("m"))
    assert idle.wait(call, 100)[-1] == END


def test_endless_sound(idle: Watched, call: PretendCall) -> None:
    """Hold music that never stops ends the call after four times IDLE_SECONDS."""
    idle.tell(call, starts("music"))
    assert idle.wait(call, 97.5) == []
    goodbye, end = idle.wait(call, 2.5)
    assert "失礼いたします" in goodbye and end == END


@pytest.mark.parametrize("before", [[], turn("a", "もしもし")], ids=["never", "no more"])
def test_no_transcription(idle: Watched, call: PretendCall, before: list[Event]) -> None:
    """Where nobody looks for words, who talks is not hung up on; silence is still silence."""
    idle.tell(call, *before)
    for number in range(12):
        idle.tell(call, starts(f"a{number}"), says(f"a{number}", ""))
        assert idle.wait(call, 20) == []
    assert len(idle.wait(call, 75)) == 4


async def test_thread(hook: LoadHook) -> None:
    """The file looks by itself, and no more after the call, of which nothing is left."""
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started")
    await until(lambda: END in call.did)
    assert [record.call for record in idle.records] == [call.sid]
    await idle.tell_all(call, *turn("a", "はい"), ("call_ended", {"reason": "caller hung up"}))
    assert idle.module.idles == call.notes == {} and not idle.warnings


def test_0_seconds(hook: LoadHook) -> None:
    """IDLE_SECONDS=0 asks nobody: then the file is told nothing at all."""
    assert not any(hook("idle", IDLE_SECONDS="0").host.handling.values())


@pytest.mark.parametrize("setting", ["-1", "soon", "nan", "4000"])
def test_wrong_seconds(hook: LoadHook, setting: str) -> None:
    """A wrong IDLE_SECONDS stops the start."""
    assert "0 to 3600" in refused(hook, "idle", IDLE_SECONDS=setting)
