"""Without OPENAI_API_KEY: an offline model on this computer takes OpenAI's place, free of charge.

The caller hears a greeting, and after each turn their own words again. So anybody hears at once
that both directions work, and tries barge-in, keys, hooks and tools without a key.

It recognizes no words (a turn is transcribed as, for example, 「（2.4秒の音声）」) and follows no
instructions. It does call tools: the key 1 calls the first one, the key 0 lists them, and a hook's
`call.tell_model` that names a tool calls that one. Arguments are the defaults and examples of the
tool's schema. The voice is a machine's, made beforehand: see _offline_speech.json.

No settings, and nothing is stored. The bridge starts OFFLINE_MODEL when no key is set. The parts:

    check          Is a client's event well-formed, to the last key?
    Vad            When does the caller speak?
    Session        OpenAI's side of the protocol, without I/O: `receive` takes, `send` gives.
    OFFLINE_MODEL  A WebSocket server on 127.0.0.1. Each connection has a Session of its own.

https://platform.openai.com/docs/api-reference/realtime-client-events and …/realtime-server-events
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import re
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

log = logging.getLogger("offline")
Object = dict[str, Any]  # of JSON

# ── What a client may send ────────────────────────────────────────────────────────────────────
#
# A rule is a type (`object` is anything), a set of values, a Range, [rule] for a list, a tuple of
# rules of which one must fit, or a dict for an object with these keys and no others.
# "!" marks the required keys. OpenAI takes more than what stands here: what no telephone needs is
# left out (other audio formats, text output, manual turns), and so is what the bridge never sends.


class ByType(dict[str, Object]):
    """The rule for an object whose `type` says which other keys it has."""


@dataclass(frozen=True)
class Range:
    """The rule for a number; for an integer if the bounds are."""

    low: float
    high: float


FORMAT = ByType({"audio/pcmu": {}})
NOISE = {"type!": {"near_field", "far_field"}, "strength": Range(0.0, 1.0)}
TRANSCRIPTION = {"model": str, "language": str, "languages": [str], "keywords": [str]}
TRANSCRIPTION |= {"prompt": str, "delay": str}
TURNS: Object = {"create_response": bool, "interrupt_response": bool}
SEMANTIC_VAD = TURNS | {"eagerness": {"low", "medium", "high", "auto"}}
SERVER_VAD = TURNS | {"threshold": Range(0.0, 1.0), "idle_timeout_ms": (Range(5000, 30_000), None)}
SERVER_VAD |= {"prefix_padding_ms": Range(0, 60_000), "silence_duration_ms": Range(0, 60_000)}
VOICES = {"alloy", "ash", "ballad", "coral", "echo", "sage", "shimmer", "verse", "marin", "cedar"}
INPUT = {
    "format": FORMAT,
    "noise_reduction": (NOISE, None),
    "transcription": (TRANSCRIPTION, None),
    "turn_detection": (ByType({"server_vad": SERVER_VAD, "semantic_vad": SEMANTIC_VAD}), None),
}
OUTPUT = {"format": FORMAT, "voice": (VOICES, {"id!": str})}
IN_BOTH = {  # a session and a response
    "instructions": str,
    "output_modalities": [{"audio"}],  # nobody would hear the other one, text
    "reasoning": {"effort": {"minimal", "low", "medium", "high", "xhigh"}},
    "tools": [ByType({"function": {"name!": str, "description": str, "parameters": dict}})],
    "tool_choice": ({"none", "auto", "required"}, ByType({"function": {"name!": str}})),
    "parallel_tool_calls": bool,
    "max_output_tokens": ({"inf"}, Range(1, 4096)),
}
RESPONSE = IN_BOTH | {"audio": {"output": OUTPUT}, "conversation": {"auto"}, "metadata": object}
SESSION = IN_BOTH | {"model": str, "truncation": object, "tracing": object, "include": object}
SESSION["audio"] = {"input": INPUT, "output": OUTPUT | {"speed": Range(0.25, 1.5)}}
CONTENT: dict[str, Object] = {  # of a message, by its role
    "system": {"input_text": {"text!": str}},
    "user": {"input_text": {"text!": str}, "input_audio": {"audio!": str, "transcript": object}},
    "assistant": {"output_text": {"text!": str}},
}
ANY_ITEM = {"id": str, "object": {"realtime.item"}}
ANY_ITEM["status"] = {"completed", "incomplete", "in_progress"}
CALL = ANY_ITEM | {"name!": str, "arguments!": str, "call_id": str}
MESSAGE = ANY_ITEM | {"role!": set(CONTENT), "content!": list}
OUTPUT_OF_CALL = ANY_ITEM | {"call_id!": str, "output!": str}
ITEM = {"message": MESSAGE, "function_call": CALL, "function_call_output": OUTPUT_OF_CALL}
COUNT = Range(0, 1 << 31)
EVENTS: Object = {
    "session.update": {"session!": ByType(realtime=SESSION)},
    "input_audio_buffer.append": {"audio!": str},
    "conversation.item.create": {"item!": ByType(ITEM)},
    "conversation.item.truncate": {"item_id!": str, "content_index!": {0}, "audio_end_ms!": COUNT},
    "response.create": {"response": RESPONSE},
    "response.cancel": {"response_id": str},
}
TYPE_NAMES = {str: "a string", bool: "a boolean", dict: "an object", list: "an array"}


class Refused(Exception):
    """Becomes an `error` event. Nothing of what caused it applies, and the session stays open."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def check(value: Any, rule: Any, path: str = "") -> None:
    """Raises Refused unless the value keeps the rule. The path is where the value stands."""

    def inside(name: str) -> str:
        return f"{path}.{name}" if path else name

    def expect(fits: bool, what: str) -> None:
        if not fits:
            raise Refused("invalid_type", f"Invalid type for '{path}': expected {what}.", path)

    match rule:
        case ByType() if isinstance(value, dict) and "type" in value:
            check(value["type"], set(rule), inside("type"))
            check(value, {"type": str, **rule[value["type"]]}, path)
        case ByType():
            check(value, {"type!": str}, path)
        case dict():
            expect(isinstance(value, dict), "an object")
            rules = {name.rstrip("!"): inner for name, inner in rule.items()}
            for name in (name for name in rules if f"{name}!" in rule and name not in value):
                text = f"Missing required parameter: '{inside(name)}'."
                raise Refused("missing_required_parameter", text, inside(name))
            for name, inner in value.items():
                if name not in rules:
                    text = f"Unknown parameter: '{inside(name)}'."
                    raise Refused("unknown_parameter", text, inside(name))
                check(inner, rules[name], inside(name))
        case list():
            expect(isinstance(value, list), "an array")
            for index, inner in enumerate(value):
                check(inner, rule[0], f"{path}[{index}]")
        case tuple():
            refusals = []
            for one in rule:
                try:
                    return check(value, one, path)
                except Refused as refusal:
                    refusals.append(refusal)
            # The alternative that was meant is the one whose check came furthest.
            raise max(refusals, key=lambda refusal: len(refusal.param or ""))
        case set():
            if not isinstance(value, (str, int)) or value not in rule:
                supported = ", ".join(f"'{one}'" for one in sorted(rule))
                text = f"Invalid value: '{value}'. Supported values are: {supported}."
                raise Refused("invalid_value", text, path)
        case Range():
            whole = isinstance(rule.low, int)
            number = isinstance(value, int if whole else (int, float))
            expect(number and not isinstance(value, bool), "an integer" if whole else "a number")
            if not rule.low <= value <= rule.high:
                text = f"Expected a value from {rule.low} to {rule.high}, but got {value} instead."
                raise Refused("invalid_value", f"Invalid '{path}': {text}", path)
        case None:
            expect(value is None, "null")
        case type():
            expect(isinstance(value, rule), TYPE_NAMES.get(rule, ""))
    return None


# ── When the caller speaks ────────────────────────────────────────────────────────────────────


# How loud each byte of G.711 mu-law is, from 0 to 254: the root of its amplitude.
LOUDNESS = bytes(
    round(1.42 * math.sqrt((((~code & 15) << 3) + 132 << (~code >> 4 & 7)) - 132))
    for code in range(256)
)
FRAME = 160  # bytes: 20 ms


class Vad:
    """Finds speech by loudness: what is well above the quietest moment of the last two seconds.

    Speech has a gap every second or so, and steady noise has none. So after two seconds at most
    a noise is the floor that speech must rise above, however loud it is.
    """

    ONSET = 3  # loud frames in a row that are speech, and not a click
    QUIETEST = 5.0  # the lowest floor, some -60 dB

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=100)  # loudness of the frames of two seconds
        self.speaking = False
        self.run = 0  # frames in a row that contradict `speaking`

    def changes(self, frame: bytes, threshold: float, silence_ms: int) -> bool:
        """Whether the caller's speech begins, or has ended, with this frame."""
        loudness = sum(frame.translate(LOUDNESS)) / FRAME
        self.recent.append(loudness)
        # In roots of amplitude 40 dB are a factor of 10. So a threshold of 0.5 means 10 dB.
        limit = max(min(self.recent), self.QUIETEST) * 10 ** (threshold / 2)
        loud = loudness > limit * (0.8 if self.speaking else 1)
        self.run = 0 if loud == self.speaking else self.run + 1
        if self.run < (max(silence_ms // 20, 1) if self.speaking else self.ONSET):
            return False
        self.speaking, self.run = not self.speaking, 0
        return True


# ── What the model says ───────────────────────────────────────────────────────────────────────

LINES = {  # what is said to a hook's text: the first line whose words are in it
    "idle_goodbye": "(返事|黙|silen|answer).*(別れ|goodbye)",
    "goodbye": "別れ|goodbye",
    "key": "キー|ボタン|key|dtmf",
    "idle": "黙|無言|静|silen|quiet|idle",
    "noted": "",
}
KEYS = re.compile(r"(?:キー|ボタン|key|dtmf)\D*?([\d*#]+)", re.IGNORECASE)  # in a hook's text
EXAMPLE = re.compile(r"(?:such as|e\.g\.|例えば|[:：])\s*[\"「]?([^\s\"」、。,;]+)")
Line = tuple[str, bytes]  # its words, and its sound in mu-law


@cache
def speech() -> dict[str, Line]:
    """The lines that are spoken, by name."""
    file = Path(__file__).with_name("_offline_speech.json")
    lines = json.loads(file.read_text(encoding="utf-8"))["lines"]
    return {name: (line["text"], base64.b64decode(line["mulaw"])) for name, line in lines.items()}


def seconds_of(mulaw: bytes) -> str:
    """What stands for words where none are recognized."""
    return f"（{len(mulaw) / 8000:.1f}秒の音声）"


def example(schema: Object) -> Any:
    """A value that a JSON schema allows."""
    match schema:
        case {"default": value} | {"const": value}:
            return value
        case {"examples": [value, *_]} | {"enum": [value, *_]}:
            return value
        case {"anyOf": [inner, *_]} | {"oneOf": [inner, *_]}:
            return example(inner)
        case {"type": "string"}:
            shown = EXAMPLE.search(schema.get("description", ""))
            return shown[1] if shown else "test"
        case {"type": "integer" | "number"}:
            return schema.get("minimum", schema.get("maximum", 1))
        case {"type": "boolean"}:
            return True
        case {"type": "array"}:
            return [example(schema.get("items", {}))] * schema.get("minItems", 1)
        case {"type": "object"}:
            properties = schema.get("properties", {})
            return {name: example(properties[name]) for name in schema.get("required", [])}
    return None


def choose(items: list[Object], turn: bytes, settings: Object) -> list[Line] | Object:
    """The lines, or the tool, that answer the last thing that the model has not said itself."""
    lines = speech()
    tools = settings["tools"] if settings["tool_choice"] != "none" else []
    names = "、".join(f"{number} {tool['name']}" for number, tool in enumerate(tools, 1))
    menu = (f"{lines['menu'][0]}（{names}）", lines["menu"][1])
    others = [item for item in items if item.get("role") != "assistant" and "name" not in item]
    last = others[-1] if others else {}
    if "output" in last:
        return [lines["result"]]
    content = last.get("content", [{}])[0]
    if content.get("type") == "input_audio":
        return [lines["preamble"], (seconds_of(turn), turn)]
    text = content.get("text", "")
    keys = KEYS.search(text)
    if keys and tools and keys[1] in ("0", "*"):
        return [menu]
    for number, tool in enumerate(tools, 1):
        # "name(…) → …" is what the bridge tells of a call that has been made.
        named = re.search(rf"\b{tool['name']}\b(?!\()", text, re.ASCII)
        if named or keys and keys[1] == str(number):
            return dict(tool)
    if not text or len(items) == 1:
        return [lines["greeting"], menu] if tools else [lines["greeting"]]
    return [next(lines[name] for name in LINES if re.search(LINES[name], text, re.IGNORECASE))]


# ── OpenAI's side of the protocol ─────────────────────────────────────────────────────────────

PIECES_MS = (100, 200, 400, 300)  # the size of an audio delta varies
SPEED = 4  # times faster than it is spoken
TURN_DEFAULTS: Object = {
    # OpenAI documents 500 ms of silence, and sessions that were looked at had 200.
    "server_vad": {"threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 200},
    "semantic_vad": {"eagerness": "auto"},
}
PCM = {"type": "audio/pcm", "rate": 24000}
DEFAULTS: Object = {
    "type": "realtime",
    "instructions": "",
    "tools": [],
    "tool_choice": "auto",
    "audio": {
        "input": {"format": PCM, "transcription": None, "turn_detection": None},
        "output": {"format": PCM, "voice": "marin"},
    },
}
NO_TOKENS = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


class Session:
    """One session, as the server sees it."""

    def __init__(self, send: Callable[[str], object], model: str = "gpt-realtime-2.1") -> None:
        self.send = send
        self.config = DEFAULTS | {"id": new_id("sess"), "model": model}
        self.items: list[Object] = []  # the conversation
        self.said: dict[
            str, int
        ] = {}  # bytes of mu-law that an item of the model's holds, by its id
        self.response: Object = {}  # in progress; empty when there is none
        self.speaking: asyncio.Task[None] | None = None  # what fills it
        self.vad = Vad()
        self.position = 0  # bytes of the caller's audio so far
        self.rest = b""  # of the next frame
        self.buffer = (
            bytearray()
        )  # the caller's turn or, between two turns, what may be its padding
        self.speech_id = ""  # the item that the caller's speech will be
        self.turn = b""  # the audio of the caller's last turn

    def emit(self, kind: str, **content: Any) -> None:
        self.send(json.dumps({"type": kind, "event_id": new_id("event"), **content}))

    def receive(self, message: str | bytes) -> None:
        """One message of the client's."""
        event_id = None
        try:
            if isinstance(message, bytes):
                raise Refused("invalid_event", "Expected a text WebSocket message, not binary")
            event = json.loads(message)
            event_id = event.pop("event_id", None) if isinstance(event, dict) else None
            check(event, ByType(EVENTS))
            self.handle(event)
        except (Refused, ValueError, RecursionError) as exc:
            if not isinstance(exc, Refused):
                exc = Refused("invalid_json", f"The message is not valid JSON: {exc}")
            about = {"code": exc.code, "message": exc.message, "param": exc.param}
            about |= {"type": "invalid_request_error", "event_id": event_id}
            self.emit("error", error=about)

    def handle(self, event: Object) -> None:
        """One event whose shape has been checked. Refuses what does not go with the state."""
        match event["type"]:
            case "session.update":
                self.update(event["session"])
            case "input_audio_buffer.append":
                self.append(event["audio"])
            case "conversation.item.create":
                self.create_item(event["item"])
            case "conversation.item.truncate":
                self.truncate(event["item_id"], event["audio_end_ms"])
            case "response.create":
                self.create_response(event.get("response", {}))
            case "response.cancel":
                active = self.response.get("id")
                if not active or event.get("response_id", active) != active:
                    raise Refused("response_cancel_not_active", "no active response found")
                self.end_response("cancelled", "client_cancelled")

    def update(self, given: Object) -> None:
        """The fields that are given change: all of them or none."""
        sides = given.get("audio", {})
        audio = {name: old | sides.get(name, {}) for name, old in self.config["audio"].items()}
        config = self.config | given | {"audio": audio}
        turns = audio["input"]["turn_detection"]
        transcription = audio["input"]["transcription"] or {}
        streaming = transcription.get("model") in ("gpt-live-transcribe", "gpt-realtime-whisper")
        where = "session.audio.input"
        if config["model"] != self.config["model"]:
            raise Refused("invalid_value", "The model cannot be changed.", "session.model")
        if "reasoning" in given and not config["model"].startswith("gpt-realtime-2"):
            raise Refused("unknown_parameter", "The model does not reason.", "session.reasoning")
        if turns and streaming:
            text = "Turn detection is not supported for this transcription model"
            raise Refused("invalid_value", text, f"{where}.turn_detection")
        if "language" in transcription and "languages" in transcription:
            text = "Give either 'language' or 'languages'."
            raise Refused("invalid_value", text, f"{where}.transcription.languages")
        if turns:
            defaults = {"create_response": True, "interrupt_response": True}
            audio["input"]["turn_detection"] = defaults | TURN_DEFAULTS[turns["type"]] | turns
        self.config = config
        self.emit("session.updated", session=config)

    # ── The caller's turns ──

    def append(self, audio: str) -> None:
        try:
            mulaw = self.rest + base64.b64decode(audio, validate=True)
        except ValueError:
            raise Refused("invalid_value", "Expected base64-encoded audio.", "audio") from None
        for start in range(0, len(mulaw) - FRAME + 1, FRAME):
            self.hear(mulaw[start : start + FRAME])
        self.rest = mulaw[len(mulaw) // FRAME * FRAME :]

    def hear(self, frame: bytes) -> None:
        """20 ms of the caller's voice: their turn may begin or end with it."""
        turns = self.config["audio"]["input"]["turn_detection"]
        if not turns:
            return
        # semantic_vad has no such settings. Here the same Vad takes its place.
        settings = TURN_DEFAULTS["server_vad"] | {"silence_duration_ms": 500} | turns
        self.position += FRAME
        self.buffer += frame
        changes = self.vad.changes(frame, settings["threshold"], settings["silence_duration_ms"])
        if not self.vad.speaking and not changes:
            del self.buffer[: -(settings["prefix_padding_ms"] * 8 + Vad.ONSET * FRAME)]
        elif changes and self.vad.speaking:
            self.speech_id = new_id("item")
            began = {"audio_start_ms": (self.position - len(self.buffer)) // 8}
            self.emit("input_audio_buffer.speech_started", **began, item_id=self.speech_id)
            if self.response and turns["interrupt_response"]:
                self.end_response("cancelled", "turn_detected")
        elif changes:
            ended = {"audio_end_ms": self.position // 8}
            self.emit("input_audio_buffer.speech_stopped", **ended, item_id=self.speech_id)
            self.commit()
            # With interrupt_response false a response may still be in progress. Then OpenAI
            # creates none for this turn, and says nothing about it.
            if turns["create_response"] and not self.response:
                self.create_response({})

    def commit(self) -> None:
        """The caller's turn becomes an item of the conversation."""
        self.turn = bytes(self.buffer)
        self.buffer.clear()
        previous = self.items[-1]["id"] if self.items else None
        about: Object = {"item_id": self.speech_id}
        self.emit("input_audio_buffer.committed", **about, previous_item_id=previous)
        content: Object = {"type": "input_audio", "transcript": None}
        self.add({"id": self.speech_id, "type": "message", "role": "user", "content": [content]})
        if self.config["audio"]["input"]["transcription"]:
            content["transcript"] = about["transcript"] = seconds_of(self.turn)
            about |= {"content_index": 0, "usage": {"type": "duration", "seconds": 0.0}}
            self.emit("conversation.item.input_audio_transcription.completed", **about)

    # ── The conversation ──

    def add(self, item: Object) -> None:
        """A complete item becomes the last one of the conversation."""
        item |= {"object": "realtime.item", "status": "completed"}
        previous = self.items[-1]["id"] if self.items else None
        self.items.append(item)
        self.emit("conversation.item.added", previous_item_id=previous, item=item)
        self.emit("conversation.item.done", previous_item_id=previous, item=item)

    def create_item(self, given: Object) -> None:
        if given["type"] == "message":
            check(given["content"], [ByType(CONTENT[given["role"]])], "item.content")
        calls = [item["call_id"] for item in self.items if item["type"] == "function_call"]
        if given["type"] == "function_call_output" and given["call_id"] not in calls:
            text = f"Tool call ID '{given['call_id']}' not found in conversation."
            raise Refused("invalid_tool_call_id", text, "item.call_id")
        self.add({"id": new_id("item"), "call_id": new_id("call")} | given)

    def truncate(self, item_id: str, audio_end_ms: int) -> None:
        """The caller has heard this much. The transcript goes: nobody knows where in it that is."""
        ids = [item["id"] for item in self.items]
        said = self.said.get(item_id, 0)
        if item_id not in ids:
            text = f"The item with id '{item_id}' does not exist."
            raise Refused("item_truncate_invalid_item_id", text, "item_id")
        if audio_end_ms * 8 > said:
            text = f"Audio content of {said // 8}ms is already shorter than {audio_end_ms}ms"
            raise Refused("invalid_value", text, "audio_end_ms")
        self.said[item_id] = audio_end_ms * 8
        self.items[ids.index(item_id)]["content"][0]["transcript"] = ""
        place = {"item_id": item_id, "content_index": 0, "audio_end_ms": audio_end_ms}
        self.emit("conversation.item.truncated", **place)

    # ── Responses ──

    def create_response(self, given: Object) -> None:
        if self.response:
            text = f"Conversation already has an active response: {self.response['id']}."
            raise Refused("conversation_already_has_active_response", text)
        self.response = {"id": new_id("resp"), "object": "realtime.response", "output": []}
        self.response |= {"status": "in_progress", "status_details": None, "usage": None}
        self.response |= {"metadata": given.get("metadata")}
        self.emit("response.created", response=self.response)
        # A response with instructions of its own is the greeting, and answers nothing.
        items = [] if "instructions" in given else self.items
        chosen = choose(items, self.turn, self.config | given)
        self.speaking = asyncio.create_task(self.speak(self.response, chosen))

    async def speak(self, response: Object, chosen: list[Line] | Object) -> None:
        """Fill the response, in pieces, until all is said or somebody ends it."""
        if self.response is not response:  # it has been cancelled at once
            return
        if isinstance(chosen, dict):
            arguments = json.dumps(example(chosen.get("parameters", {})) or {}, ensure_ascii=False)
            item = self.begin_item("function_call", name=chosen["name"], arguments=arguments)
            self.end_item(item)
            chosen = []
        for words, mulaw in chosen:
            item = self.begin_item("message", role="assistant", content=[])
            item["content"] = [{"type": "output_audio", "transcript": ""}]
            place = self.place(item)
            sizes, sent = cycle(PIECES_MS), 0
            while sent < len(mulaw):
                piece = mulaw[sent : sent + next(sizes) * 8]
                before, sent = len(words) * sent // len(mulaw), sent + len(piece)
                # The transcript keeps step with the sound.
                if new := words[before : len(words) * sent // len(mulaw)]:
                    item["content"][0]["transcript"] += new
                    self.emit("response.output_audio_transcript.delta", **place, delta=new)
                self.said[item["id"]] = sent
                delta = base64.b64encode(piece).decode()
                self.emit("response.output_audio.delta", **place, delta=delta)
                await asyncio.sleep(len(piece) / 8000 / SPEED)
                if self.response is not response:  # interrupted, cancelled, or nobody listens
                    return
            self.end_item(item)
        self.end_response()

    def begin_item(self, kind: str, **content: Any) -> Object:
        """An item of the response in progress."""
        item = {"id": new_id("item"), "object": "realtime.item", "type": kind, **content}
        item |= {"status": "in_progress", "call_id": new_id("call")}
        self.response["output"].append(item)
        self.emit("response.output_item.added", **self.place(item), item=item)
        self.items.append(item)
        return item

    def place(self, item: Object) -> Object:
        """Where an item stands in the response in progress."""
        index = self.response["output"].index(item)
        place = {"response_id": self.response["id"], "output_index": index}
        return place | {"item_id": item["id"], "content_index": 0}

    def end_item(self, item: Object, status: str = "completed") -> None:
        item["status"] = status
        place = self.place(item)
        if item["type"] == "message":
            self.emit("response.output_audio.done", **place)
            words = item["content"][0]["transcript"]
            self.emit("response.output_audio_transcript.done", **place, transcript=words)
        self.emit("response.output_item.done", **place, item=item)

    def end_response(self, status: str = "completed", reason: str = "") -> None:
        response = self.response
        for item in response["output"]:
            if item["status"] == "in_progress":
                self.end_item(item, "incomplete")
        self.response = {}
        response |= {"status": status, "usage": NO_TOKENS}
        response["status_details"] = {"type": status, "reason": reason} if reason else None
        self.emit("response.done", response=response)


# ── The server ────────────────────────────────────────────────────────────────────────────────

servers: list[Server] = []  # kept for as long as the process lives


async def converse(connection: ServerConnection) -> None:
    """One connection, from session.created to its close."""
    assert connection.request
    model = parse_qs(urlsplit(connection.request.path).query).get("model", [""])[0]
    # `broadcast` writes without waiting. What piles up when a client does not read is bounded by
    # its own turn's length.
    session = Session(lambda event: broadcast([connection], event), model)
    session.emit("session.created", session=session.config)
    with suppress(ConnectionClosed):
        async for message in connection:
            session.receive(message)
    session.response = {}


async def start_server() -> str:
    """Only programs of this computer reach the server. Web pages, which send an Origin, do not."""
    speech()  # read now what the first caller needs
    size = 20 << 20  # bytes of one event: 15 MiB of audio in base64
    server = await serve(converse, "127.0.0.1", 0, origins=[None], compression=None, max_size=size)
    servers.append(server)
    log.warning("OPENAI_API_KEY is not set: an offline model answers and repeats what is said")
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/realtime"


OFFLINE_MODEL = start_server
