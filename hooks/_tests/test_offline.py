"""hooks/offline.py: as strict as OpenAI's server, hears turns, repeats them, and calls tools."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

SPEC = importlib.util.spec_from_file_location("_offline", Path(__file__).parents[1] / "offline.py")
assert SPEC and SPEC.loader
offline: Any = importlib.util.module_from_spec(SPEC)
sys.modules["_offline"] = offline
SPEC.loader.exec_module(offline)
SPEECH = {name: sound for name, (_, sound) in offline.speech().items()}

TOOLS = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}},
    {"type": "function", "name": "end_call"},
]
TURNS = {"type": "server_vad", "prefix_padding_ms": 300, "silence_duration_ms": 500}
PHONE_SESSION: dict[str, Any] = {
    "type": "realtime",
    "output_modalities": ["audio"],
    "instructions": "x",
    "reasoning": {"effort": "low"},
    "tools": TOOLS,
    "tool_choice": "auto",
    "audio": {
        "input": {
            "format": {"type": "audio/pcmu"},
            "noise_reduction": {"type": "near_field"},
            "transcription": {"model": "gpt-transcribe", "languages": ["ja"]},
            "turn_detection": TURNS,
        },
        "output": {"format": {"type": "audio/pcmu"}, "voice": "marin", "speed": 1},
    },
}


class Dialogue:
    """A session and all that it has sent."""

    def __init__(self, model: str = "gpt-realtime-2.1", session: Any = PHONE_SESSION) -> None:
        self.sent: list[dict[str, Any]] = []
        self.server = offline.Session(lambda text: self.sent.append(json.loads(text)), model)
        if session:
            assert self.tell("session.update", session=session)[0]["type"] == "session.updated"

    def tell(self, kind: str, **content: Any) -> list[dict[str, Any]]:
        """One client event; returns what it caused at once."""
        before = len(self.sent)
        self.server.receive(json.dumps({"type": kind, **content}))
        return self.sent[before:]

    def text(self, text: str, role: str = "system") -> None:
        item = {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}
        self.tell("conversation.item.create", item=item)

    def hear(self, mulaw: bytes, size: int = 160) -> None:
        for start in range(0, len(mulaw), size):
            audio = base64.b64encode(mulaw[start : start + size]).decode()
            self.tell("input_audio_buffer.append", audio=audio)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.sent if event["type"] == kind]

    def sounds(self) -> list[bytes]:
        """What each item of the model's sounded like."""
        sounds: dict[str, bytes] = {}
        for event in self.of("response.output_audio.delta"):
            sounds.setdefault(event["item_id"], b"")
            sounds[event["item_id"]] += base64.b64decode(event["delta"])
        return list(sounds.values())

    async def until(self, kind: str, count: int = 1) -> dict[str, Any]:
        async with asyncio.timeout(3):
            while len(self.of(kind)) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return self.of(kind)[count - 1]

    async def answer(self) -> list[bytes]:
        """What the model says or calls when it is asked to."""
        count, before = len(self.of("response.done")), len(self.sounds())
        self.tell("response.create")
        await self.until("response.done", count + 1)
        return self.sounds()[before:]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "SPEED", 2000)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(offline, "SPEED", 4)


def silence(ms: int) -> bytes:
    return b"\xff" * (ms * 8)


def linear(code: int) -> int:
    code = ~code & 0xFF
    magnitude = (((code & 15) << 3) + 132 << (code >> 4 & 7)) - 132
    return -magnitude if code & 0x80 else magnitude


SAMPLES = [linear(code) for code in range(256)]
NEAREST = [
    min(range(256), key=lambda code: abs(SAMPLES[code] - (high << 6))) for high in range(-512, 512)
]


def noisy(mulaw: bytes, amplitude: int, gain: float = 1.0) -> bytes:
    """The same sound with hiss in it, from a fixed seed."""
    chance = random.Random(8000)
    mixed = (int(SAMPLES[code] * gain + chance.gauss(0, amplitude)) for code in mulaw)
    return bytes(NEAREST[(min(max(sample, -32768), 32767) >> 6) + 512] for sample in mixed)


# ── What a client may send ────────────────────────────────────────────────────────────────────


def session(**fields: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **fields}}


def listening(**fields: Any) -> dict[str, Any]:
    return session(audio={"input": fields})


def item(**fields: Any) -> dict[str, Any]:
    return {"type": "conversation.item.create", "item": fields}


def truncate(ms: float) -> dict[str, Any]:
    place = {"item_id": "x", "content_index": 0, "audio_end_ms": ms}
    return {"type": "conversation.item.truncate", **place}


IN = "session.audio.input"
TO_ASSISTANT = {"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}
WRONG: list[tuple[Any, str, str | None]] = [
    ("{", "invalid_json", None),
    ("[" * 100_000, "invalid_json", None),
    (b"{}", "invalid_event", None),
    ("[]", "invalid_type", ""),
    ({}, "missing_required_parameter", "type"),
    ({"type": "response.make"}, "invalid_value", "type"),
    ({"type": "output_audio_buffer.clear"}, "invalid_value", "type"),
    ({"type": "response.create", "instructions": "x"}, "unknown_parameter", "instructions"),
    (
        {"type": "response.create", "response": {"temperature": 1}},
        *("unknown_parameter", "response.temperature"),
    ),
    (
        {"type": "session.update", "session": {"voice": "marin"}},
        *("missing_required_parameter", "session.type"),
    ),
    (session(type="transcription"), "invalid_value", "session.type"),
    (session(temperature=0.8), "unknown_parameter", "session.temperature"),
    (session(model="gpt-realtime"), "invalid_value", "session.model"),
    (session(prompt={"id": "p"}), "unknown_parameter", "session.prompt"),
    (session(instructions=None), "invalid_type", "session.instructions"),
    (session(output_modalities=["text"]), "invalid_value", "session.output_modalities[0]"),
    (
        session(audio={"output": {"voice": "suzuki"}}),
        *("invalid_value", "session.audio.output.voice"),
    ),
    (session(audio={"output": {"speed": 2.0}}), "invalid_value", "session.audio.output.speed"),
    (
        session(tools=[{"type": "function"}]),
        *("missing_required_parameter", "session.tools[0].name"),
    ),
    (session(max_output_tokens=5000), "invalid_value", "session.max_output_tokens"),
    (
        listening(format={"type": "audio/pcmu", "rate": 8000}),
        *("unknown_parameter", f"{IN}.format.rate"),
    ),
    (listening(format={"type": "g711_ulaw"}), "invalid_value", f"{IN}.format.type"),
    (
        listening(turn_detection={"type": "server_vad", "idle_timeout_ms": 1000}),
        *("invalid_value", f"{IN}.turn_detection.idle_timeout_ms"),
    ),
    (
        listening(turn_detection={"type": "semantic_vad", "threshold": 0.5}),
        *("unknown_parameter", f"{IN}.turn_detection.threshold"),
    ),
    (
        listening(transcription={"model": "gpt-live-transcribe"}),
        *("invalid_value", f"{IN}.turn_detection"),
    ),
    (
        listening(transcription={"language": "ja", "languages": ["ja"]}),
        *("invalid_value", f"{IN}.transcription.languages"),
    ),
    ({"type": "input_audio_buffer.append", "audio": "あ"}, "invalid_value", "audio"),
    ({"type": "response.cancel"}, "response_cancel_not_active", None),
    ({"type": "response.cancel", "response_id": "resp_9"}, "response_cancel_not_active", None),
    (truncate(1.5), "invalid_type", "audio_end_ms"),
    (truncate(1), "item_truncate_invalid_item_id", "item_id"),
    (
        item(type="function_call_output", call_id="c", output="1"),
        *("invalid_tool_call_id", "item.call_id"),
    ),
    (item(type="function_call_output", call_id="c", output={}), "invalid_type", "item.output"),
    (item(type="message", **TO_ASSISTANT), "invalid_value", "item.content[0].type"),
]


@pytest.mark.parametrize(("event", "code", "param"), WRONG)
def test_refusals(event: Any, code: str, param: str | None) -> None:
    """What OpenAI's server refuses is refused with the same code, and names the same place."""
    dialogue = Dialogue()
    before = len(dialogue.sent)
    message = event if isinstance(event, (str, bytes)) else json.dumps(event | {"event_id": "e1"})
    dialogue.server.receive(message)
    (error,) = dialogue.sent[before:]
    assert (error["error"]["code"], error["error"]["param"]) == (code, param)
    assert error["error"]["event_id"] == ("e1" if isinstance(event, dict) else None)


def test_refused_update() -> None:
    """Nothing of an update with one wrong key applies."""
    dialogue = Dialogue(session=None)
    dialogue.tell("session.update", session=PHONE_SESSION | {"color": "red"})
    assert dialogue.server.config["audio"]["input"]["format"]["type"] == "audio/pcm"


def test_update() -> None:
    """An update changes what it names, and the defaults of turn detection are filled in."""
    dialogue = Dialogue()
    update = listening(turn_detection={"type": "server_vad", "threshold": 0.7})["session"]
    (updated,) = dialogue.tell("session.update", session=update)
    audio = updated["session"]["audio"]
    assert audio["output"] == PHONE_SESSION["audio"]["output"]
    assert audio["input"]["transcription"]["model"] == "gpt-transcribe"
    turns = audio["input"]["turn_detection"]
    assert (turns["threshold"], turns["prefix_padding_ms"]) == (0.7, 300)
    assert turns["create_response"] is turns["interrupt_response"] is True


def test_model_without_reasoning() -> None:
    dialogue = Dialogue("gpt-realtime-1.5", session=None)
    (error,) = dialogue.tell("session.update", session=session(reasoning={})["session"])
    assert error["error"]["param"] == "session.reasoning"


async def test_one_response_at_a_time() -> None:
    """A second response is refused while one is in progress, and allowed after its end."""
    dialogue = Dialogue()
    (created,) = dialogue.tell("response.create")
    (error,) = dialogue.tell("response.create")
    assert error["error"]["code"] == "conversation_already_has_active_response"
    assert created["response"]["id"] in error["error"]["message"]
    done = dialogue.tell("response.cancel", response_id=created["response"]["id"])[-1]["response"]
    assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert dialogue.tell("response.create")[0]["type"] == "response.created"
    await dialogue.until("response.done", 2)
    assert dialogue.sounds() == [SPEECH["greeting"], SPEECH["menu"]]  # of the second one only


async def test_order_of_a_response() -> None:
    """A response comes in the protocol's order, with ids that are not used twice."""
    dialogue = Dialogue(session=PHONE_SESSION | {"tools": []})
    dialogue.tell("response.create")
    await dialogue.until("response.done")
    kinds = [event["type"].removeprefix("response.") for event in dialogue.sent[1:]]
    deltas = ["output_audio_transcript.delta", "output_audio.delta"]
    assert kinds[:2] == ["created", "output_item.added"]
    ends = ["output_audio.done", "output_audio_transcript.done", "output_item.done", "done"]
    assert kinds[-4:] == ends
    assert set(kinds[2:-4]) == set(deltas)
    assert len({event["event_id"] for event in dialogue.sent}) == len(dialogue.sent)
    words = "".join(e["delta"] for e in dialogue.of("response.output_audio_transcript.delta"))
    assert words == offline.speech()["greeting"][0]
    assert dialogue.sounds() == [SPEECH["greeting"]]
    assert dialogue.of("response.done")[0]["response"]["usage"]["total_tokens"] == 0


async def test_truncation() -> None:
    """An item is truncated within its audio and never beyond, and loses its transcript."""
    dialogue = Dialogue()
    await dialogue.answer()
    said = dialogue.of("response.output_item.done")[0]["item"]["id"]
    ms = len(SPEECH["greeting"]) // 8
    answers = []
    for end in (ms + 1, ms, 400, 401):
        place = {"item_id": said, "content_index": 0, "audio_end_ms": end}
        answers.append(dialogue.tell("conversation.item.truncate", **place)[0])
    cut = "conversation.item.truncated"
    assert [answer["type"] for answer in answers] == ["error", cut, cut, "error"]
    expected = f"Audio content of {ms}ms is already shorter than {ms + 1}ms"
    assert answers[0]["error"]["message"] == expected
    assert dialogue.server.items[0]["content"][0]["transcript"] == ""


# ── When the caller speaks ────────────────────────────────────────────────────────────────────


def edges(mulaw: bytes) -> list[tuple[bool, int]]:
    """(True, ms) where speech began, (False, ms) where the silence after it had lasted 500 ms."""
    vad, found = offline.Vad(), []
    for start in range(0, len(mulaw) - 159, 160):
        if vad.changes(mulaw[start : start + 160], 0.5, 500):
            found.append((vad.speaking, start // 8 + 20 - 60 * vad.speaking))
    return found


@pytest.mark.parametrize("name", ["greeting", "preamble", "key", "idle", "noted"])
@pytest.mark.parametrize(("hiss", "gain"), [(0, 1.0), (100, 1.0), (30, 0.3)])
def test_speech_in_noise(name: str, hiss: int, gain: float) -> None:
    """Speech is found where it is, in quiet and in hiss."""
    loud = [index for index, code in enumerate(SPEECH[name]) if abs(SAMPLES[code]) > 500]
    heard = silence(1000) + SPEECH[name] + silence(1000)
    (started, start_ms), (stopped, stop_ms) = edges(noisy(heard, hiss, gain) if hiss else heard)
    assert (started, stopped) == (True, False)
    assert abs(start_ms - 1000 - loud[0] // 8) <= 60
    assert abs(stop_ms - 500 - 1000 - loud[-1] // 8) <= 60


@pytest.mark.parametrize("hiss", [30, 300, 3000])
def test_steady_noise(hiss: int) -> None:
    """Steady noise is no speech, and one that begins later is got used to."""
    assert edges(noisy(silence(3000), hiss)) == []
    begun = edges(noisy(silence(1000), 5) + noisy(silence(4000), hiss))
    assert [speaks for speaks, _ in begun] in ([], [True, False])
    assert all(ms <= 3600 for _, ms in begun)


def test_click() -> None:
    assert edges(silence(500) + SPEECH["key"][1600 : 1600 + 320] + silence(1000)) == []


@pytest.mark.parametrize("size", [80, 160, 500, 40_000])
async def test_times_of_a_turn(size: int) -> None:
    """Times count the audio and not the clock, and each event of a turn names the same item."""
    dialogue = Dialogue()
    dialogue.hear(silence(1000) + SPEECH["idle"] + silence(1000), size)
    (started,) = dialogue.of("input_audio_buffer.speech_started")
    (stopped,) = dialogue.of("input_audio_buffer.speech_stopped")
    # The line begins with 100 ms of silence and ends with 200 ms of it; the padding is 300 ms.
    assert abs(started["audio_start_ms"] - (1100 - 300)) <= 60
    assert abs(stopped["audio_end_ms"] - (1000 + 2980 - 200 + 500)) <= 60
    (committed,) = dialogue.of("input_audio_buffer.committed")
    (said,) = dialogue.of("conversation.item.input_audio_transcription.completed")
    assert len({event["item_id"] for event in (started, stopped, committed, said)}) == 1
    seconds = (stopped["audio_end_ms"] - started["audio_start_ms"]) / 1000
    assert said["transcript"] == f"（{seconds:.1f}秒の音声）"


# ── What the model says ───────────────────────────────────────────────────────────────────────


async def test_echo_of_the_caller() -> None:
    """The caller hears exactly what they said, after a preamble."""
    heard = noisy(silence(1000) + SPEECH["key"] + silence(1000), 20)
    dialogue = Dialogue()
    dialogue.hear(heard)
    done = (await dialogue.until("response.done"))["response"]
    start = dialogue.of("input_audio_buffer.speech_started")[0]["audio_start_ms"] * 8
    end = dialogue.of("input_audio_buffer.speech_stopped")[0]["audio_end_ms"] * 8
    assert dialogue.sounds() == [SPEECH["preamble"], heard[start:end]]
    words = [item["content"][0]["transcript"] for item in done["output"]]
    assert words[0] == "こう聞こえました。"
    assert words[1] == f"（{(end - start) / 8000:.1f}秒の音声）"


@pytest.mark.parametrize(
    ("turns", "ends", "created"),
    [
        ({}, "cancelled", 2),  # the caller interrupts and is answered
        ({"create_response": False}, "cancelled", 1),
        ({"interrupt_response": False}, None, 1),  # the response goes on; no second one is created
        ({"interrupt_response": False, "create_response": False}, None, 1),
    ],
)
async def test_speech_into_a_response(
    slow: None, turns: dict[str, bool], ends: str | None, created: int
) -> None:
    """What becomes of a response that the caller speaks into, and of their turn."""
    dialogue = Dialogue()
    dialogue.tell("session.update", session=listening(turn_detection=TURNS | turns)["session"])
    dialogue.tell("response.create")
    await dialogue.until("response.output_audio.delta", 2)
    dialogue.hear(silence(200) + SPEECH["key"] + silence(1000))
    assert len(dialogue.of("input_audio_buffer.committed")) == 1
    done = [event["response"] for event in dialogue.of("response.done")]
    assert [response["status"] for response in done] == ([ends] if ends else [])
    assert len(dialogue.of("response.created")) == created
    assert dialogue.of("error") == []
    if ends:
        assert done[0]["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
        await asyncio.sleep(0.15)  # longer than the pause between two pieces
        cut = [e for e in dialogue.sent if e.get("response_id") == done[0]["id"]]
        assert dialogue.sent.index(cut[-1]) < dialogue.sent.index(dialogue.of("response.done")[0])


async def test_speech_after_a_response_was_made() -> None:
    """Without interrupt_response a short word into what still plays is answered all the same."""
    dialogue = Dialogue()
    turns = TURNS | {"interrupt_response": False}
    dialogue.tell("session.update", session=listening(turn_detection=turns)["session"])
    await dialogue.answer()
    dialogue.hear(silence(200) + SPEECH["key"] + silence(1000))
    await dialogue.until("response.done", 2)
    assert dialogue.sounds()[-2] == SPEECH["preamble"]


PRESSED = "発信者が電話機のキーを押しました：{}（声ではなく、キーでのお返事です。）"
ASKED = "発信者の返事がないので、この電話を切ります。短く丁寧に別れの挨拶をしてください。"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PRESSED.format("5"), "key"),
        (PRESSED.format("0"), "menu"),
        (PRESSED.format("*"), "menu"),
        (PRESSED.format("1"), {"weather": {}}),
        ("The caller pressed key 2.", {"end_call": {}}),
        ("end_call を使ってください。", {"end_call": {}}),
        ("The caller has been silent for 10 s.", "idle"),
        (ASKED, "idle_goodbye"),
        ("お別れの挨拶をしてください。", "goodbye"),
        ("会議は三時です。", "noted"),
        ("weather({}) → 晴れ", "noted"),
        ("weathervane を見ました。", "noted"),
    ],
)
async def test_text_of_a_hook(text: str, expected: Any) -> None:
    """A hook's text is answered with a fitting line, or with the call of the tool that it means."""
    dialogue = Dialogue()
    dialogue.text("別のこと")
    dialogue.text(text)
    sounds = await dialogue.answer()
    output = dialogue.of("response.done")[0]["response"]["output"]
    if isinstance(expected, dict):
        assert {item["name"]: json.loads(item["arguments"]) for item in output} == expected
        call_id = output[0]["call_id"]
        result = {"type": "function_call_output", "call_id": call_id, "output": "晴れ"}
        dialogue.tell("conversation.item.create", item=result)
        assert await dialogue.answer() == [SPEECH["result"]]
    else:
        assert sounds == [SPEECH[expected]]


async def test_menu() -> None:
    """The greeting lists the tools by number, unless there are none or tool_choice is none."""
    dialogue = Dialogue()
    assert await dialogue.answer() == [SPEECH["greeting"], SPEECH["menu"]]
    output = dialogue.of("response.done")[0]["response"]["output"]
    assert "（1 weather、2 end_call）" in output[1]["content"][0]["transcript"]
    assert await Dialogue(session=PHONE_SESSION | {"tools": []}).answer() == [SPEECH["greeting"]]
    silent = Dialogue()
    silent.text("x")
    silent.text(PRESSED.format("1"))
    silent.tell("response.create", response={"tool_choice": "none"})
    await silent.until("response.done")
    assert silent.sounds() == [SPEECH["key"]]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "default": "today", "enum": ["tomorrow"]}, "today"),
        ({"type": "string", "examples": ["東京"], "enum": ["大阪"]}, "東京"),
        ({"enum": ["sales", "support"]}, "sales"),
        ({"type": "string"}, "test"),
        ({"type": "string", "description": "A city, such as 広島県府中市"}, "広島県府中市"),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"type": "integer"}, 1),
        ({"type": "integer", "minimum": 5}, 5),
        ({"type": "boolean"}, True),
        ({"type": "array", "items": {"type": "integer"}}, [1]),
        (
            {"type": "object", "properties": {"a": {"const": 2}, "b": {}}, "required": ["a"]},
            {"a": 2},
        ),
    ],
)
def test_arguments(schema: Any, value: Any) -> None:
    """Arguments fit the tool's schema: its defaults, examples and choices come first."""
    assert offline.example(schema) == value


# ── The server ────────────────────────────────────────────────────────────────────────────────


async def test_server(caplog: pytest.LogCaptureFixture) -> None:
    """The server says what it is, and answers programs of this computer only."""
    url = await offline.OFFLINE_MODEL()
    assert url.startswith("ws://127.0.0.1:") and "OPENAI_API_KEY is not set" in caplog.text
    with pytest.raises(InvalidStatus):  # a web page that found the port
        await connect(url + "?model=m", origin=Origin("http://example.com"), proxy=None)
    half_an_emoji = item(
        type="message", role="system", content=[{"type": "input_text", "text": "\ud83d"}]
    )
    async with asyncio.timeout(3), connect(url + "?model=m", proxy=None) as openai:
        created = json.loads(await openai.recv())
        assert (created["type"], created["session"]["model"]) == ("session.created", "m")
        await openai.send(json.dumps(half_an_emoji))
        added = json.loads(await openai.recv())
    assert added["item"]["content"] == half_an_emoji["item"]["content"]
    offline.servers.pop().close()


async def test_speed(slow: None) -> None:
    """Audio comes in pieces of 100 to 400 ms, some four times faster than it is spoken."""
    dialogue = Dialogue()
    dialogue.tell("response.create")
    await asyncio.sleep(0.5)
    dialogue.tell("response.cancel")
    deltas = [base64.b64decode(e["delta"]) for e in dialogue.of("response.output_audio.delta")]
    assert all(100 <= len(delta) / 8 <= 400 for delta in deltas)
    assert 1 < sum(map(len, deltas)) / 8000 / 0.5 < 7


def test_size_of_the_voice() -> None:
    file = Path(__file__).parents[1] / "_offline_speech.json"
    assert file.stat().st_size < 320 << 10
