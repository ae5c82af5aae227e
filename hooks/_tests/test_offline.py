"""hooks/offline.py: the server in place of OpenAI is as strict as the real one, hears, and answers with a voice."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import HOOKS, Loaded, LoadHook, longest_pause_of_the_loop
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

PHONE_SESSION: dict[str, Any] = {
    "type": "realtime",
    "audio": {
        "input": {
            "format": {"type": "audio/pcmu"},
            "transcription": {"model": "gpt-transcribe"},
            "turn_detection": {"type": "server_vad", "prefix_padding_ms": 300, "silence_duration_ms": 500},
        },
        "output": {"format": {"type": "audio/pcmu"}},
    },
}


class Dialogue:
    """A session and all that it has sent."""

    def __init__(self, kind: Any, session: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.server = kind(self.sent.append)
        if session:
            self.tell("session.update", session=session)

    def tell(self, kind: str, **content: Any) -> list[dict[str, Any]]:
        """One client event; returns what it caused at once."""
        before = len(self.sent)
        self.server.receive(json.dumps({"type": kind, **content}))
        return self.sent[before:]

    def hear(self, mulaw: bytes, size: int = 160) -> None:
        for start in range(0, len(mulaw), size):
            audio = base64.b64encode(mulaw[start : start + size]).decode()
            self.tell("input_audio_buffer.append", audio=audio)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.sent if event["type"] == kind]

    def sound(self, output_index: int) -> bytes:
        deltas = [e["delta"] for e in self.of("response.output_audio.delta") if e["output_index"] == output_index]
        return b"".join(base64.b64decode(delta) for delta in deltas)

    async def until(self, kind: str, count: int = 1) -> None:
        async with asyncio.timeout(3):
            while len(self.of(kind)) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def silence(ms: int) -> bytes:
    return b"\xff" * (ms * 8)


class StandIn:
    """hooks/offline.py, its voice and its ear."""

    def __init__(self, loaded: Loaded) -> None:
        self.host, self.module = loaded.host, loaded.module

    def dialogue(self, kind: str = "Parrot", session: Any = PHONE_SESSION) -> Dialogue:
        return Dialogue(getattr(self.module, kind), session)

    def spoken(self, name: str) -> bytes:
        return bytes(self.module.speech()[name][1])

    def with_noise(self, mulaw: bytes, amplitude: int, gain: float = 1.0) -> bytes:
        """The same sound with hiss in it, from a fixed seed."""
        chance, samples = random.Random(8000), self.module.SAMPLES
        nearest = [self.module.nearest_code(high << 6) for high in range(-512, 512)]
        mixed = (int(samples[code] * gain + chance.gauss(0, amplitude)) for code in mulaw)
        return bytes(nearest[(min(max(sample, -32768), 32767) >> 6) + 512] for sample in mixed)

    def edges(self, mulaw: bytes, threshold: float = 0.5) -> list[tuple[bool, int]]:
        """(True, ms) where speech began, (False, ms) where the silence after it had lasted 500 ms."""
        return [(speaks, position // 8) for speaks, position in self.module.Vad().hear(mulaw, threshold, 500)]

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """The address of the running server."""
        yield await self.host.stand_in()
        self.module.servers[0].close()


@pytest.fixture
def offline(hook: LoadHook) -> StandIn:
    return StandIn(hook("offline"))


@pytest.fixture
def quick(offline: StandIn) -> None:
    """The stand-in sends its speech a thousand times faster than it is spoken."""
    offline.module.SPEED = 1000


def in_session(**fields: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **fields}}


def in_input(**fields: Any) -> dict[str, Any]:
    return in_session(audio={"input": fields})


WRONG: list[tuple[Any, str, str | None]] = [
    ("{", "invalid_json", None),
    (b"{}", "invalid_event", None),
    ("[]", "invalid_event", None),
    ({}, "missing_required_parameter", "type"),
    ({"type": "response.make"}, "invalid_value", "type"),
    ({"type": "output_audio_buffer.clear"}, "invalid_value", "type"),
    ({"type": "response.create", "instructions": "x"}, "unknown_parameter", "instructions"),
    ({"type": "response.create", "response": {"temperature": 1}}, "unknown_parameter", "response.temperature"),
    ({"type": "session.update", "session": {"voice": "marin"}}, "missing_required_parameter", "session.type"),
    ({"type": "session.update", "session": {"type": "transcription"}}, "invalid_value", "session.type"),
    (in_session(temperature=0.8), "unknown_parameter", "session.temperature"),
    (in_session(model="gpt-realtime"), "invalid_value", "session.model"),
    (in_session(instructions=None), "invalid_type", "session.instructions"),
    (in_session(audio={"output": {"voice": "suzuki"}}), "invalid_value", "session.audio.output.voice"),
    (in_session(audio={"output": {"speed": 2.0}}), "invalid_value", "session.audio.output.speed"),
    (in_session(tools=[{"type": "function"}]), "missing_required_parameter", "session.tools[0].name"),
    (in_session(max_output_tokens=5000), "invalid_value", "session.max_output_tokens"),
    (
        in_input(format={"type": "audio/pcmu", "rate": 8000}),
        "unknown_parameter",
        "session.audio.input.format.rate",
    ),
    (in_input(format={"type": "g711_ulaw"}), "invalid_value", "session.audio.input.format.type"),
    (
        in_input(turn_detection={"type": "server_vad", "idle_timeout_ms": 1000}),
        "invalid_value",
        "session.audio.input.turn_detection.idle_timeout_ms",
    ),
    (
        in_input(turn_detection={"type": "semantic_vad", "threshold": 0.5}),
        "unknown_parameter",
        "session.audio.input.turn_detection.threshold",
    ),
    (
        in_input(transcription={"model": "gpt-live-transcribe"}),
        "invalid_value",
        "session.audio.input.turn_detection",
    ),
    ({"type": "input_audio_buffer.append", "audio": "あ"}, "invalid_value", "audio"),
    ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", None),
    ({"type": "response.cancel"}, "response_cancel_not_active", None),
    ({"type": "response.cancel", "response_id": "resp_9"}, "response_cancel_not_active", None),
    ({"type": "conversation.item.delete", "item_id": "x"}, "item_delete_invalid_item_id", "item_id"),
    ({"type": "conversation.item.retrieve", "item_id": "x"}, "item_retrieve_invalid_item_id", "item_id"),
    (
        {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1.5},
        "invalid_type",
        "audio_end_ms",
    ),
    (
        {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1},
        "item_truncate_invalid_item_id",
        "item_id",
    ),
    (
        {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "c", "output": "1"}},
        "invalid_tool_call_id",
        "item.call_id",
    ),
    (
        {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "c", "output": {}}},
        "invalid_type",
        "item.output",
    ),
    (
        {
            "type": "conversation.item.create",
            "item": {"type": "message", "role": "assistant", "content": [{"type": "input_text", "text": "x"}]},
        },
        "invalid_value",
        "item.content[0].type",
    ),
]


@pytest.mark.parametrize(("event", "code", "param"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_the_stand_in_refuses_what_the_real_server_refuses(
    offline: StandIn, event: Any, code: str, param: str | None
) -> None:
    dialogue = offline.dialogue()
    before = len(dialogue.sent)
    dialogue.server.receive(event if isinstance(event, (str, bytes)) else json.dumps(event))
    (answer,) = dialogue.sent[before:]
    assert answer["type"] == "error"
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)


def test_every_session_update_of_the_bridges_own_form_is_accepted(offline: StandIn) -> None:
    tools = [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    voice = {"format": {"type": "audio/pcmu"}, "voice": "marin", "speed": 1}
    full: Any = PHONE_SESSION | {
        "tools": tools,
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "instructions": "x",
    }
    full |= {"output_modalities": ["audio"], "audio": {"input": PHONE_SESSION["audio"]["input"], "output": voice}}
    dialogue = offline.dialogue(session=None)
    (updated,) = dialogue.tell("session.update", session=full, event_id="cfg-1")
    assert updated["type"] == "session.updated"
    assert updated["session"]["audio"]["output"] == voice
    assert updated["session"]["audio"]["input"]["turn_detection"]["create_response"] is True


def test_of_an_update_with_one_unknown_key_nothing_applies_and_the_error_names_the_event(offline: StandIn) -> None:
    dialogue = offline.dialogue(session=None)
    (error,) = dialogue.tell("session.update", session=PHONE_SESSION | {"color": "red"}, event_id="cfg-1")
    assert error["error"]["event_id"] == "cfg-1"
    assert error["error"]["type"] == "invalid_request_error"
    assert dialogue.server.config["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}


def test_a_model_that_does_not_reason_refuses_reasoning(offline: StandIn) -> None:
    sent: list[dict[str, Any]] = []
    server = offline.module.PretendSession(sent.append, "gpt-realtime-1.5")
    server.receive(json.dumps(in_session(reasoning={"effort": "low"})))
    assert sent[0]["error"]["param"] == "session.reasoning"


def test_a_second_response_is_refused_while_one_is_in_progress_and_allowed_afterwards(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession")
    (created,) = dialogue.tell("response.create")
    (error,) = dialogue.tell("response.create")
    assert error["error"]["code"] == "conversation_already_has_active_response"
    assert created["response"]["id"] in error["error"]["message"]
    aside = dialogue.tell("response.create", response={"conversation": "none"})
    assert aside[0]["type"] == "response.created"
    done = dialogue.tell("response.cancel", response_id=created["response"]["id"])[0]
    assert done["response"]["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert dialogue.tell("response.create")[0]["type"] == "response.created"


def test_an_item_is_truncated_within_its_audio_and_never_beyond(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession")
    dialogue.tell("response.create")
    (response,) = dialogue.server.responses.values()
    item = dialogue.server.begin_item(response)
    dialogue.server.say(response, item, silence(1000), "はい")
    place = {"item_id": item.data["id"], "content_index": 0}
    (error,) = dialogue.tell("conversation.item.truncate", **place, audio_end_ms=1001)
    assert error["error"]["code"] == "invalid_value"
    assert error["error"]["message"] == "Audio content of 1000ms is already shorter than 1001ms"
    (cut,) = dialogue.tell("conversation.item.truncate", **place, audio_end_ms=1000)
    assert (cut["type"], cut["audio_end_ms"]) == ("conversation.item.truncated", 1000)
    dialogue.tell("conversation.item.truncate", **place, audio_end_ms=400)
    assert dialogue.tell("conversation.item.truncate", **place, audio_end_ms=401)[0]["type"] == "error"
    (shown,) = dialogue.tell("conversation.item.retrieve", item_id=item.data["id"])
    assert shown["item"]["content"][0]["transcript"] == ""


def test_a_response_comes_in_the_order_of_the_protocol(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession")
    before = len(dialogue.sent)
    dialogue.tell("response.create")
    (response,) = dialogue.server.responses.values()
    item = dialogue.server.begin_item(response)
    dialogue.server.say(response, item, silence(200), "はい")
    dialogue.server.end_item(response, item)
    dialogue.server.end_response(response)
    assert [event["type"] for event in dialogue.sent[before:]] == [
        *("response.created", "response.output_item.added", "conversation.item.added", "response.content_part.added"),
        *("response.output_audio_transcript.delta", "response.output_audio.delta"),
        *("response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done"),
        *("response.output_item.done", "conversation.item.done", "response.done", "rate_limits.updated"),
    ]
    ids = [event["event_id"] for event in dialogue.sent]
    assert len(set(ids)) == len(ids)


def test_a_scripted_server_can_call_a_function_and_takes_its_output(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession")
    dialogue.tell("response.create")
    (response,) = dialogue.server.responses.values()
    call = {"type": "function_call", "name": "weather", "call_id": "call_1", "arguments": "{}"}
    dialogue.server.end_item(response, dialogue.server.begin_item(response, call))
    dialogue.server.end_response(response)
    done = dialogue.of("response.done")[0]["response"]
    assert [item["name"] for item in done["output"]] == ["weather"]
    assert done["output"][0]["status"] == "completed"
    output = {"type": "function_call_output", "call_id": "call_1", "output": "晴れ"}
    added = dialogue.tell("conversation.item.create", item=output)
    assert [event["type"] for event in added] == ["conversation.item.added", "conversation.item.done"]
    assert added[0]["previous_item_id"] == done["output"][0]["id"]


def test_items_form_a_chain_that_inserting_and_deleting_repairs(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession")
    for name, after in (("a", None), ("c", None), ("b", "a"), ("first", "root")):
        text = {"id": name, "type": "message", "role": "system", "content": [{"type": "input_text", "text": name}]}
        dialogue.tell("conversation.item.create", item=text, previous_item_id=after)
    assert [item.data["id"] for item in dialogue.server.items] == ["first", "a", "b", "c"]
    assert [event["previous_item_id"] for event in dialogue.of("conversation.item.added")] == [None, "a", "a", None]
    dialogue.tell("conversation.item.delete", item_id="c")
    dialogue.hear(silence(200))
    committed = dialogue.tell("input_audio_buffer.commit")[0]
    assert committed["previous_item_id"] == "b"


def test_usage_counts_both_voices_and_caches_part_of_what_was_read_before(offline: StandIn) -> None:
    dialogue = offline.dialogue("PretendSession", PHONE_SESSION | {"instructions": "あ" * 100})
    for _ in range(2):
        dialogue.hear(silence(1000))
        dialogue.tell("input_audio_buffer.commit")
        dialogue.tell("response.create")
        (response,) = dialogue.server.responses.values()
        item = dialogue.server.begin_item(response)
        dialogue.server.say(response, item, silence(2000), "はい")
        dialogue.server.end_response(response)
    first, second = (event["response"]["usage"] for event in dialogue.of("response.done"))
    assert first["output_token_details"] == {"text_tokens": 2, "audio_tokens": 40}  # 2 s, a token for 50 ms
    assert first["input_token_details"]["audio_tokens"] == 10  # 1 s, a token for 100 ms
    assert first["input_token_details"]["cached_tokens"] == 0
    assert second["input_token_details"]["cached_tokens_details"]["text_tokens"] == 64
    assert second["total_tokens"] == second["input_tokens"] + second["output_tokens"]


@pytest.mark.parametrize("name", ["greeting", "preamble", "key", "idle", "goodbye", "noted"])
@pytest.mark.parametrize(("hiss", "gain"), [(0, 1.0), (100, 1.0), (30, 0.3)])
def test_speech_is_found_where_it_is_in_quiet_and_in_hiss(offline: StandIn, name: str, hiss: int, gain: float) -> None:
    speech, quiet = offline.spoken(name), offline.module.SAMPLES
    loud = [index for index, code in enumerate(speech) if abs(quiet[code]) > 500]
    begins, ends = 1000 + loud[0] // 8, 1000 + loud[-1] // 8
    heard = silence(1000) + speech + silence(1000)
    (started, start_ms), (stopped, stop_ms) = offline.edges(offline.with_noise(heard, hiss, gain) if hiss else heard)
    assert (started, stopped) == (True, False)
    assert abs(start_ms - begins) <= 60
    assert abs(stop_ms - 500 - ends) <= 60


@pytest.mark.parametrize("hiss", [30, 300, 3000])
def test_steady_noise_is_no_speech_and_noise_that_begins_later_is_got_used_to(offline: StandIn, hiss: int) -> None:
    assert offline.edges(offline.with_noise(silence(4000), hiss)) == []
    begun = offline.edges(offline.with_noise(silence(1000), 5) + offline.with_noise(silence(4000), hiss))
    assert [speaks for speaks, _ in begun] in ([], [True, False])
    assert all(ms <= 3600 for _, ms in begun)


def test_a_click_is_no_speech(offline: StandIn) -> None:
    assert offline.edges(silence(500) + offline.spoken("key")[1600 : 1600 + 320] + silence(1000)) == []


@pytest.mark.parametrize("size", [80, 160, 500, 40_000])
async def test_times_count_the_audio_and_not_the_clock_whatever_size_it_comes_in(offline: StandIn, size: int) -> None:
    dialogue = offline.dialogue()
    dialogue.hear(silence(1000) + offline.spoken("idle") + silence(1000), size)
    (started,), (stopped,) = (
        dialogue.of("input_audio_buffer.speech_started"),
        dialogue.of("input_audio_buffer.speech_stopped"),
    )
    assert abs(started["audio_start_ms"] - (1100 - 300)) <= 60  # the line begins with 100 ms of silence; padding 300
    assert abs(stopped["audio_end_ms"] - (1000 + 2980 - 200 + 500)) <= 60  # and ends with 200 ms of it
    (committed,) = dialogue.of("input_audio_buffer.committed")
    assert started["item_id"] == stopped["item_id"] == committed["item_id"]
    (said,) = dialogue.of("conversation.item.input_audio_transcription.completed")
    seconds = (stopped["audio_end_ms"] - started["audio_start_ms"]) / 1000
    assert (said["transcript"], said["usage"]) == (
        f"（{seconds:.1f}秒の音声）",
        {"type": "duration", "seconds": seconds},
    )


async def test_the_parrot_gives_back_exactly_what_the_caller_said_after_a_preamble(
    offline: StandIn, quick: None
) -> None:
    heard = offline.with_noise(silence(1000) + offline.spoken("idle") + silence(1000), 20)
    dialogue = offline.dialogue()
    dialogue.hear(heard)
    await dialogue.until("response.done")
    start, end = (dialogue.of(f"input_audio_buffer.speech_{what}")[0] for what in ("started", "stopped"))
    assert dialogue.sound(0) == offline.spoken("preamble")
    assert dialogue.sound(1) == heard[start["audio_start_ms"] * 8 : end["audio_end_ms"] * 8]
    done = dialogue.of("response.done")[0]["response"]
    assert done["status"] == "completed"
    assert [item["content"][0]["transcript"] for item in done["output"]] == ["こう聞こえました。", "（3.5秒の音声）"]


async def test_the_caller_interrupts_the_stand_in_and_is_answered_afterwards(offline: StandIn, quick: None) -> None:
    offline.module.SPEED = 4
    dialogue = offline.dialogue()
    dialogue.tell("response.create", response={"instructions": "Say hello"})
    await dialogue.until("response.output_audio.delta", 2)
    dialogue.hear(silence(200) + offline.spoken("key"))
    (done,) = dialogue.of("response.done")
    assert done["response"]["status"] == "cancelled"
    assert done["response"]["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert done["response"]["output"][0]["status"] == "incomplete"
    assert offline.module.speech()["greeting"][0].startswith(done["response"]["output"][0]["content"][0]["transcript"])
    offline.module.SPEED = 1000
    dialogue.hear(silence(1000))
    await dialogue.until("response.done", 2)
    assert dialogue.of("response.done")[1]["response"]["status"] == "completed"
    await asyncio.sleep(0.15)  # longer than the pause between two pieces of the greeting
    cut = done["response"]["id"]
    deltas = [i for i, e in enumerate(dialogue.sent) if e["type"].endswith("delta") and e["response_id"] == cut]
    assert max(deltas) < dialogue.sent.index(done)


async def test_without_interrupt_response_the_stand_in_goes_on_talking(offline: StandIn, quick: None) -> None:
    offline.module.SPEED = 4
    turns = {"type": "server_vad", "interrupt_response": False, "create_response": False}
    dialogue = offline.dialogue()
    dialogue.tell("session.update", session=in_input(turn_detection=turns)["session"])
    dialogue.tell("response.create")
    dialogue.hear(silence(200) + offline.spoken("key") + silence(1000))
    assert dialogue.of("input_audio_buffer.committed")
    assert not dialogue.of("response.done")
    assert len(dialogue.of("response.created")) == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("発信者がキー5を押しました。", "key"),
        ("The caller has been silent for 10 s.", "idle"),
        ("返事がないので電話を切ります。別れの挨拶をしてください。", "goodbye"),
        ("会議は三時です。", "noted"),
    ],
)
async def test_a_text_from_the_bridge_is_answered_with_a_fitting_line(
    offline: StandIn, quick: None, text: str, name: str
) -> None:
    dialogue = offline.dialogue()
    item = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": text}]}
    dialogue.tell("conversation.item.create", item=item)
    dialogue.tell("response.create")
    await dialogue.until("response.done")
    assert dialogue.sound(0) == offline.spoken(name)


async def test_an_idle_caller_is_asked_after_the_time_set_and_only_once_the_answer_has_been_heard(
    offline: StandIn, quick: None
) -> None:
    turns = {"type": "server_vad", "idle_timeout_ms": 5000}
    dialogue = offline.dialogue()
    dialogue.tell("session.update", session=in_input(turn_detection=turns)["session"])
    dialogue.tell("response.create")
    await dialogue.until("response.done")
    greeting_ms = len(offline.spoken("greeting")) // 8
    dialogue.hear(silence(greeting_ms + 4900))
    assert not dialogue.of("input_audio_buffer.timeout_triggered")
    dialogue.hear(silence(200))
    assert len(dialogue.of("input_audio_buffer.timeout_triggered")) == 1
    await dialogue.until("response.done", 2)
    assert dialogue.sound(0) == offline.spoken("greeting") + offline.spoken("idle")


async def test_a_session_that_nobody_configures_speaks_24_khz_pcm_which_is_noise_on_a_telephone(
    offline: StandIn, quick: None
) -> None:
    dialogue = offline.dialogue(session=None)
    dialogue.tell("response.create")
    await dialogue.until("response.done")
    greeting = offline.spoken("greeting")
    pcm = dialogue.sound(0)
    assert len(pcm) == 6 * len(greeting)
    samples = [int.from_bytes(pcm[at : at + 2], "little", signed=True) for at in range(0, 60_000, 6)]
    assert samples == [offline.module.SAMPLES[code] for code in greeting[:10_000]]


async def test_audio_comes_in_pieces_of_100_to_400_ms_some_four_times_faster_than_it_is_spoken(
    offline: StandIn,
) -> None:
    dialogue = offline.dialogue()
    dialogue.tell("response.create", response={"instructions": "Say hello"})
    began = time.monotonic()
    await asyncio.sleep(0.5)
    took = time.monotonic() - began
    dialogue.tell("response.cancel")
    assert 2 < len(dialogue.sound(0)) / 8000 / took < 7
    sizes = [len(base64.b64decode(event["delta"])) / 8 for event in dialogue.of("response.output_audio.delta")]
    assert all(100 <= ms <= 400 for ms in sizes)


async def test_the_stand_in_says_what_it_is_and_answers_loopback_programs_only(
    offline: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    async with offline.served() as url:
        assert url.startswith("ws://127.0.0.1:") and url.endswith("/v1/realtime")
        assert [socket.getsockname()[0] for socket in offline.module.servers[0].sockets] == ["127.0.0.1"]
        assert "OPENAI_API_KEY is not set" in caplog.text
        with pytest.raises(InvalidStatus):  # a web page that found the port
            await connect(url + "?model=m", origin=Origin("http://example.com"), proxy=None)
        with pytest.raises(InvalidStatus):
            await connect(url.replace("/v1/realtime", "/"), proxy=None)


@pytest.mark.parametrize(
    ("query", "headers", "code"),
    [("", {}, "missing_model"), ("?model=m", {"OpenAI-Beta": "realtime=v1"}, "beta_api_shape_disabled")],
)
async def test_a_wrong_dial_is_accepted_told_and_closed_with_4000(
    offline: StandIn, query: str, headers: Any, code: str
) -> None:
    async with (
        asyncio.timeout(3),
        offline.served() as url,
        connect(url + query, additional_headers=headers, proxy=None) as openai,
    ):
        assert json.loads(await openai.recv())["error"]["code"] == code
        with pytest.raises(ConnectionClosed):
            await openai.recv()
        assert (openai.close_code, openai.close_reason) == (4000, f"invalid_request_error.{code}")


async def test_half_an_emoji_which_json_allows_does_not_end_the_session(offline: StandIn) -> None:
    item = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "半分 \ud83d"}]}
    async with asyncio.timeout(3), offline.served() as url, connect(url + "?model=m", proxy=None) as openai:
        await openai.recv()  # session.created
        await openai.send(json.dumps({"type": "conversation.item.create", "item": item}))
        added = json.loads(await openai.recv())
    assert added["item"]["content"] == item["content"]


async def talk(url: str, said: bytes) -> tuple[bytes, bytes]:
    """What one caller said between the times that the server gives, and what came back as the second item."""
    start = end = 0
    echo = b""
    async with asyncio.timeout(10), connect(url, proxy=None, compression=None) as openai:
        await openai.send(json.dumps({"type": "session.update", "session": PHONE_SESSION}))
        for at in range(0, len(said), 160):
            audio = base64.b64encode(said[at : at + 160]).decode()
            await openai.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
            await asyncio.sleep(0.005)
        async for message in openai:
            match event := json.loads(message):
                case {"type": "input_audio_buffer.speech_started"}:
                    start = event["audio_start_ms"] * 8
                case {"type": "input_audio_buffer.speech_stopped"}:
                    end = event["audio_end_ms"] * 8
                case {"type": "response.output_audio.delta", "output_index": 1}:
                    echo += base64.b64decode(event["delta"])
                case {"type": "response.done"}:
                    break
    return said[start:end], echo


async def test_twenty_callers_at_once_hear_each_their_own_voice_and_the_loop_is_not_held_up(offline: StandIn) -> None:
    offline.module.SPEED = 40
    voices = [offline.with_noise(offline.spoken("key"), 2 + number) for number in range(20)]

    async with offline.served() as url:
        url += "?model=gpt-realtime-2.1"
        calls = asyncio.gather(*(talk(url, silence(400) + voice + silence(700)) for voice in voices))
        held_up_s = await longest_pause_of_the_loop(calls.done, 10)
    assert all(said == echo for said, echo in calls.result())
    assert len({echo for _, echo in calls.result()}) == 20
    assert held_up_s < 0.5  # 20 callers, four times faster than they speak


def test_the_stand_ins_voice_is_small() -> None:
    assert (HOOKS / "_offline_speech.json").stat().st_size < 200 << 10
