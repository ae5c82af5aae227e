"""Without OPENAI_API_KEY: a stand-in for OpenAI's Realtime server, on this computer. It sends nothing anywhere.

The caller hears a greeting, and after each turn their own words again: so anybody hears at once that both directions
work, and tries barge-in, keys and hooks without a key and without cost. It recognizes no words: a turn is transcribed
as, for example, 「（2.4秒の音声）」. It calls no tools and follows no instructions. Its voice is a machine's, made
beforehand: _offline_speech.json has the commands, too.

No settings, and nothing is stored. The bridge starts STAND_IN when no key is set. Each part works without the next:

    check           is a client's event well-formed, to the last key?
    PretendSession  the server's side of the GA protocol, without I/O: messages in by `receive`, events out by `send`
    Vad             when does the caller speak?
    Parrot          the PretendSession that listens and speaks
    STAND_IN        a WebSocket server on 127.0.0.1; each connection talks with a Parrot of its own

https://platform.openai.com/docs/api-reference/realtime-client-events and …/realtime-server-events
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

log = logging.getLogger("offline")
Object = dict[str, Any]  # of JSON

# ── What a client may send ──────────────────────────────────────────────────────────────────────────────────────
#
# A rule is a type (`object` is anything), a set of values, a Range, [rule] for a list, a tuple of rules of which one
# must fit, or a dict for an object with these keys and no others; "!" marks the required ones.


class ByType(dict[str, Object]):
    """The rule for an object whose `type` says which other keys it has."""


@dataclass(frozen=True)
class Range:
    """The rule for a number; for an integer if the bounds are."""

    low: float
    high: float


FORMAT = ByType({"audio/pcm": {"rate": {24000}}, "audio/pcmu": {}})  # the third, audio/pcma, is not spoken here
NOISE = {"type!": {"near_field", "far_field"}, "strength": Range(0.0, 1.0)}
TRANSCRIPTION = {"model": str, "language": str, "languages": [str], "keywords": [str], "prompt": str, "delay": str}
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
    "output_modalities": [{"audio"}],  # the other one, text, nobody would hear
    "reasoning": {"effort": {"minimal", "low", "medium", "high", "xhigh"}},
    "tools": [ByType({"function": {"name!": str, "description": str, "parameters": dict}})],
    "tool_choice": ({"none", "auto", "required"}, ByType({"function": {"name!": str}})),
    "parallel_tool_calls": bool,
    "max_output_tokens": ({"inf"}, Range(1, 4096)),
    "prompt": object,
}
RESPONSE = IN_BOTH | {"audio": {"output": OUTPUT}, "conversation": {"auto", "none"}, "input": list, "metadata": object}
SESSION = IN_BOTH | {"model": str, "truncation": object, "tracing": object, "include": object}
SESSION["audio"] = {"input": INPUT, "output": OUTPUT | {"speed": Range(0.25, 1.5)}}
CONTENT: dict[str, Object] = {  # of a message, by its role
    "system": {"input_text": {"text!": str}},
    "user": {"input_text": {"text!": str}, "input_audio": {"audio!": str, "transcript": object}},
    "assistant": {"output_text": {"text!": str}, "output_audio": {"audio": str, "transcript": object}},
}
ANY_ITEM = {"id": str, "object": {"realtime.item"}, "status": {"completed", "incomplete", "in_progress"}}
MESSAGE = ANY_ITEM | {"role!": set(CONTENT), "content!": list}
FUNCTION_CALL = ANY_ITEM | {"name!": str, "arguments!": str, "call_id": str}
FUNCTION_CALL_OUTPUT = ANY_ITEM | {"call_id!": str, "output!": str}
ITEM = ByType({"message": MESSAGE, "function_call": FUNCTION_CALL, "function_call_output": FUNCTION_CALL_OUTPUT})
COUNT = Range(0, 1 << 31)
EVENTS: Object = {
    "session.update": {"session!": ByType(realtime=SESSION)},
    "input_audio_buffer.append": {"audio!": str},
    "input_audio_buffer.commit": {},
    "input_audio_buffer.clear": {},
    "conversation.item.create": {"item!": ITEM, "previous_item_id": (str, None)},
    "conversation.item.retrieve": {"item_id!": str},
    "conversation.item.delete": {"item_id!": str},
    "conversation.item.truncate": {"item_id!": str, "content_index!": COUNT, "audio_end_ms!": COUNT},
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
    """Raises Refused, with the path of the fault (session.audio.input.format.rate), unless the value keeps the rule."""

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
                    raise Refused("unknown_parameter", f"Unknown parameter: '{inside(name)}'.", inside(name))
                check(inner, rules[name], inside(name))
        case list():
            expect(isinstance(value, list), "an array")
            for index, inner in enumerate(value):
                check(inner, rule[0], f"{path}[{index}]")
        case tuple():
            faults = []
            for one in rule:
                try:
                    return check(value, one, path)
                except Refused as fault:
                    faults.append(fault)
            raise max(faults, key=lambda fault: len(fault.param or ""))  # the first of those that got deepest into it
        case set():
            if not isinstance(value, (str, int)) or value not in rule:
                supported = ", ".join(f"'{one}'" for one in sorted(rule))
                raise Refused("invalid_value", f"Invalid value: '{value}'. Supported values are: {supported}.", path)
        case Range():
            whole = isinstance(rule.low, int)
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            expect(is_number, "an integer" if whole else "a number")
            if not rule.low <= value <= rule.high:
                text = f"Expected a value from {rule.low} to {rule.high}, but got {value} instead."
                raise Refused("invalid_value", f"Invalid '{path}': {text}", path)
        case None:
            expect(value is None, "null")
        case type():
            expect(isinstance(value, rule), TYPE_NAMES.get(rule, ""))
    return None


# ── The server's side of the protocol ───────────────────────────────────────────────────────────────────────────

PCM = {"type": "audio/pcm", "rate": 24000}
DEFAULTS: Object = {
    "type": "realtime",
    "object": "realtime.session",
    "instructions": "",
    "output_modalities": ["audio"],
}
DEFAULTS |= {"tools": [], "tool_choice": "auto", "max_output_tokens": "inf", "truncation": "auto", "tracing": None}
DEFAULTS["audio"] = {  # on a telephone, noise
    "input": {"format": PCM, "noise_reduction": None, "transcription": None, "turn_detection": {"type": "server_vad"}},
    "output": {"format": PCM, "voice": "marin", "speed": 1.0},
}
# The documentation says that silence_duration_ms is 500 unless it is set; sessions that were looked at had 200.
TURN_DEFAULTS: Object = {
    "server_vad": {"threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 200, "idle_timeout_ms": None},
    "semantic_vad": {"eagerness": "auto"},
}
STREAMING_TRANSCRIBERS = {"gpt-live-transcribe", "gpt-realtime-whisper"}  # they refuse sessions that detect turns
SESSION_S = 3600  # the longest that a session lasts
MAX_APPEND = 15 << 20  # bytes of audio in one event


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


@dataclass(eq=False)
class Item:
    data: Object  # as the protocol shows it
    audio: int = 0  # bytes of mu-law that it holds, 8 to the ms


@dataclass(eq=False)
class Response:
    id: str
    given: Object  # the `response` of response.create
    tokens: tuple[int, int]  # of its input: text, audio
    began: int  # position
    items: list[Item] = field(default_factory=list)

    @property
    def in_conversation(self) -> bool:
        return bool(self.given.get("conversation") != "none")


class PretendSession:
    """One session, as the server sees it. What is said in it is a subclass's business: override `hear` and `answer`.

    Inside, audio is mu-law at 8 kHz, whatever the session's formats, and a position is a number of bytes of it since
    the session began: time is what the client has sent, not what a clock says.
    """

    def __init__(self, send: Callable[[Object], object], model: str = "gpt-realtime-2.1") -> None:
        self.send = send
        self.config = copy.deepcopy(DEFAULTS) | {"id": new_id("sess"), "model": model}
        self.config["expires_at"] = int(time.time()) + SESSION_S
        self.set_turn_defaults(self.config)
        self.items: list[Item] = []  # the conversation
        self.responses: dict[str, Response] = {}  # in progress, by id
        self.buffer = bytearray()  # the caller's audio that is not yet in the conversation
        self.buffer_began = 0  # its position
        self.speech_id = ""  # the item that the caller's speech will be, while they speak
        self.turn = b""  # the audio of the caller's last turn
        self.cached = (0, 0)  # tokens of the last response's input: text, audio
        self.has_spoken = False
        self.quiet_from = 0  # position from which idle_timeout_ms counts

    def hear(self, mulaw: bytes) -> None:
        """The caller's next sound, which is in `buffer` already: whoever detects turns does it now."""

    def answer(self, response: Response) -> None:
        """A response has been created: fill it, now or later, and end it."""

    def emit(self, kind: str, **content: Any) -> None:
        self.send({"type": kind, "event_id": new_id("event"), **copy.deepcopy(content)})

    def open(self) -> None:
        self.emit("session.created", session=self.config)

    def receive(self, message: str | bytes) -> None:
        """One message of the client's."""
        event_id = None
        try:
            if isinstance(message, bytes):
                raise Refused("invalid_event", "Expected a text WebSocket message; binary frames are not supported")
            try:
                event = json.loads(message)
            except (ValueError, RecursionError) as fault:
                raise Refused("invalid_json", f"The message is not valid JSON: {fault}") from None
            if not isinstance(event, dict):
                raise Refused("invalid_event", "Expected a JSON object")
            event_id = event.pop("event_id", None)
            check(event, ByType(EVENTS))
            self.handle(event)
        except Refused as fault:
            self.error(fault, event_id)

    def error(self, fault: Refused, event_id: Any = None) -> None:
        about = {"code": fault.code, "message": fault.message, "param": fault.param, "event_id": event_id}
        self.emit("error", error={"type": "invalid_request_error", **about})

    def handle(self, event: Object) -> None:
        """One event whose shape has been checked. Refuses what does not go with the state of things."""
        match event["type"]:
            case "session.update":
                self.update(event["session"])
                self.emit("session.updated", session=self.config)

            case "input_audio_buffer.append":
                mulaw = self.decode(event["audio"])
                self.buffer += mulaw
                self.hear(mulaw)
            case "input_audio_buffer.commit":
                if (ms := len(self.buffer) / 8) < 100:
                    text = (
                        f"Error committing input audio buffer: buffer too small: {ms:.2f}ms of audio, less than 100ms."
                    )
                    raise Refused("input_audio_buffer_commit_empty", text)
                self.commit(self.position())
            case "input_audio_buffer.clear":
                self.forget_before(self.position())
                self.emit("input_audio_buffer.cleared")

            case "conversation.item.create":
                self.create_item(event["item"], event.get("previous_item_id"))
            case "conversation.item.retrieve":
                item = self.find(event["item_id"], "item_retrieve_invalid_item_id")
                self.emit("conversation.item.retrieved", item=item.data)
            case "conversation.item.delete":
                self.items.remove(self.find(event["item_id"], "item_delete_invalid_item_id"))
                self.emit("conversation.item.deleted", item_id=event["item_id"])
            case "conversation.item.truncate":
                item = self.find(event["item_id"], "item_truncate_invalid_item_id")
                self.truncate(item, event["content_index"], event["audio_end_ms"])

            case "response.create":
                self.create_response(event.get("response", {}))
            case "response.cancel":
                response = self.responses.get(event["response_id"]) if "response_id" in event else self.active()
                if response is None:
                    raise Refused("response_cancel_not_active", "Cancellation failed: no active response found")
                self.end_response(response, "cancelled", reason="client_cancelled")

    # ── The session ──

    def update(self, given: Object) -> None:
        """The fields that are given change: all of them or none."""

        def merged(old: Object, new: Object) -> Object:
            nested = ("audio", "input", "output")
            return old | {name: merged(old[name], value) if name in nested else value for name, value in new.items()}

        config = merged(self.config, given)
        self.set_turn_defaults(config)
        audio, transcription = config["audio"], config["audio"]["input"]["transcription"] or {}
        if config["model"] != self.config["model"]:
            raise Refused("invalid_value", "The model of a session cannot be changed.", "session.model")
        if self.has_spoken and audio["output"]["voice"] != self.config["audio"]["output"]["voice"]:
            text = "Cannot update a conversation's voice if assistant audio is present."
            raise Refused("cannot_update_voice", text, "session.audio.output.voice")
        if "reasoning" in given and not config["model"].startswith("gpt-realtime-2"):
            raise Refused("unknown_parameter", f"{config['model']} does not reason.", "session.reasoning")
        if audio["input"]["turn_detection"] and transcription.get("model") in STREAMING_TRANSCRIBERS:
            text = "Turn detection is not supported for this transcription model"
            raise Refused("invalid_value", text, "session.audio.input.turn_detection")
        if "language" in transcription and "languages" in transcription:
            text = "Give either 'language' or 'languages'."
            raise Refused("invalid_value", text, "session.audio.input.transcription.languages")
        self.config = config

    @staticmethod
    def set_turn_defaults(config: Object) -> None:
        if turns := config["audio"]["input"]["turn_detection"]:
            defaults = {"create_response": True, "interrupt_response": True, **TURN_DEFAULTS[turns["type"]]}
            config["audio"]["input"]["turn_detection"] = defaults | turns

    # ── The caller's audio ──

    def decode(self, audio: str) -> bytes:
        try:
            data = base64.b64decode(audio, validate=True)
        except ValueError:
            raise Refused("invalid_value", "Invalid 'audio'. Expected base64-encoded audio bytes.", "audio") from None
        if len(data) > MAX_APPEND:
            raise Refused("invalid_value", f"Invalid 'audio'. At most {MAX_APPEND} bytes at a time.", "audio")
        return data if self.config["audio"]["input"]["format"]["type"] == "audio/pcmu" else mulaw_of_pcm(data)

    def position(self) -> int:
        """The end of what the caller has sent."""
        return self.buffer_began + len(self.buffer)

    def forget_before(self, position: int) -> bytes:
        """Take from the buffer what comes before a position."""
        count = min(max(position - self.buffer_began, 0), len(self.buffer))
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        self.buffer_began += count
        return taken

    def speech_started(self, start: int) -> None:
        """The caller speaks since this position, prefix padding included. What is being said to them stops."""
        self.forget_before(start)
        self.speech_id = new_id("item")
        self.emit("input_audio_buffer.speech_started", audio_start_ms=start // 8, item_id=self.speech_id)
        if (active := self.active()) and self.config["audio"]["input"]["turn_detection"]["interrupt_response"]:
            self.end_response(active, "cancelled", reason="turn_detected")

    def speech_stopped(self, end: int) -> None:
        """The caller's turn ends at this position, the silence that showed it included. It is answered."""
        self.speech_id = self.speech_id or new_id("item")
        self.emit("input_audio_buffer.speech_stopped", audio_end_ms=end // 8, item_id=self.speech_id)
        self.commit(end)
        if self.config["audio"]["input"]["turn_detection"]["create_response"] and not self.active():
            self.create_response({})

    def commit(self, end: int) -> None:
        """The buffered audio up to this position becomes an item of the conversation."""
        item_id, self.speech_id = self.speech_id or new_id("item"), ""
        self.turn = self.forget_before(end)
        content: Object = {"type": "input_audio", "transcript": None}
        message = {"id": item_id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
        previous = self.items[-1].data["id"] if self.items else None
        self.emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=previous)
        self.items.append(Item({**message, "content": [content]}, len(self.turn)))
        self.announce("added", self.items[-1])
        self.announce("done", self.items[-1])
        if self.config["audio"]["input"]["transcription"]:
            seconds = len(self.turn) / 8000
            content["transcript"] = f"（{seconds:.1f}秒の音声）"  # nobody recognizes words here
            what = {"item_id": item_id, "content_index": 0, "transcript": content["transcript"]}
            usage = {"type": "duration", "seconds": seconds}
            self.emit("conversation.item.input_audio_transcription.completed", **what, usage=usage)

    # ── The conversation ──

    def announce(self, what: str, item: Item) -> None:
        """conversation.item.added or .done, with the item that comes before it."""
        index = self.items.index(item)
        previous = self.items[index - 1].data["id"] if index else None
        self.emit(f"conversation.item.{what}", previous_item_id=previous, item=item.data)

    def find(self, item_id: str, code: str) -> Item:
        for item in self.items:
            if item.data["id"] == item_id:
                return item
        raise Refused(code, f"The item with id '{item_id}' does not exist.", "item_id")

    def create_item(self, given: Object, after: str | None) -> None:
        ids = [item.data["id"] for item in self.items]
        if given["type"] == "message":
            check(given["content"], [ByType(CONTENT[given["role"]])], "item.content")
        calls = [item.data["call_id"] for item in self.items if item.data["type"] == "function_call"]
        if given["type"] == "function_call_output" and given["call_id"] not in calls:
            text = f"Tool call ID '{given['call_id']}' not found in conversation."
            raise Refused("invalid_tool_call_id", text, "item.call_id")
        if given.get("id") in ids:
            raise Refused("invalid_value", f"An item with id '{given['id']}' exists already.", "item.id")
        if after not in (None, "root", *ids):
            text = f"The previous item with id '{after}' does not exist."
            raise Refused("item_create_invalid_previous_item_id", text, "previous_item_id")
        made = {"id": new_id("item"), "object": "realtime.item", "status": "completed"}
        made |= {"call_id": new_id("call")} if given["type"] == "function_call" else {}
        item = Item(made | given)
        self.items.insert(len(ids) if after is None else 0 if after == "root" else ids.index(after) + 1, item)
        self.announce("added", item)
        self.announce("done", item)

    def truncate(self, item: Item, content_index: int, audio_end_ms: int) -> None:
        """The caller has heard this much of an item. Its transcript goes: nobody knows where in it that is."""
        content = item.data.get("content", [])
        if item.data.get("role") != "assistant" or content_index >= len(content) or not item.audio:
            raise Refused("invalid_value", "Only model output audio messages can be truncated", "item_id")
        if audio_end_ms * 8 > item.audio:
            text = f"Audio content of {item.audio // 8}ms is already shorter than {audio_end_ms}ms"
            raise Refused("invalid_value", text, "audio_end_ms")
        item.audio = audio_end_ms * 8
        content[content_index]["transcript"] = ""
        where = {"item_id": item.data["id"], "content_index": content_index}
        self.emit("conversation.item.truncated", **where, audio_end_ms=audio_end_ms)

    # ── Responses ──

    def active(self) -> Response | None:
        """The response in progress that writes to the conversation: there is one at most."""
        return next((response for response in self.responses.values() if response.in_conversation), None)

    def create_response(self, given: Object) -> None:
        text_tokens, audio_tokens = weigh(self.items)
        tokens = (text_tokens + len(self.config["instructions"]), audio_tokens)
        response = Response(new_id("resp"), given, tokens, self.position())
        if (active := self.active()) and response.in_conversation:
            text = f"Conversation already has an active response in progress: {active.id}. Wait until the response is"
            raise Refused("conversation_already_has_active_response", f"{text} finished before creating a new one.")
        self.responses[response.id] = response
        self.emit("response.created", response=self.show(response, "in_progress"))
        self.answer(response)

    def show(self, response: Response, status: str, **more: Any) -> Object:
        shown: Object = {"object": "realtime.response", "id": response.id, "status": status, "status_details": None}
        shown["conversation_id"] = self.config["id"].replace("sess", "conv") if response.in_conversation else None
        shown["output"] = [item.data for item in response.items]
        shown["audio"] = {"output": {name: self.config["audio"]["output"][name] for name in ("format", "voice")}}
        return shown | {"metadata": response.given.get("metadata"), "usage": None, **more}

    def begin_item(self, response: Response, data: Object | None = None) -> Item:
        """An item of a response: a spoken message, or what `data` says, such as a function_call."""
        data = data or {"type": "message", "role": "assistant", "content": []}
        item = Item({"id": new_id("item"), "object": "realtime.item", "status": "in_progress", **data})
        response.items.append(item)
        place = place_of(item, response)
        self.emit("response.output_item.added", **place, item=item.data)
        if response.in_conversation:
            self.items.append(item)
            self.announce("added", item)
        if item.data["type"] == "message":
            item.data["content"] = [{"type": "output_audio", "transcript": ""}]
            part = {"type": "audio", "transcript": ""}
            self.emit("response.content_part.added", **place, item_id=item.data["id"], content_index=0, part=part)
        return item

    def say(self, response: Response, item: Item, mulaw: bytes, words: str) -> None:
        """The next piece of a message: what it sounds like, and what it means."""
        self.has_spoken = True
        item.audio += len(mulaw)
        item.data["content"][0]["transcript"] += words
        place = place_of(item, response) | {"item_id": item.data["id"], "content_index": 0}
        if words:
            self.emit("response.output_audio_transcript.delta", **place, delta=words)
        pcmu = self.config["audio"]["output"]["format"]["type"] == "audio/pcmu"
        audio = base64.b64encode(mulaw if pcmu else pcm_of_mulaw(mulaw)).decode()
        self.emit("response.output_audio.delta", **place, delta=audio)

    def end_item(self, response: Response, item: Item, status: str = "completed") -> None:
        item.data["status"] = status
        place = place_of(item, response)
        if item.data["type"] == "message":
            in_item = {**place, "item_id": item.data["id"], "content_index": 0}
            words = item.data["content"][0]["transcript"]
            self.emit("response.output_audio.done", **in_item)
            self.emit("response.output_audio_transcript.done", **in_item, transcript=words)
            self.emit("response.content_part.done", **in_item, part={"type": "audio", "transcript": words})
        self.emit("response.output_item.done", **place, item=item.data)
        if item in self.items:  # and the client has not deleted it
            self.announce("done", item)

    def end_response(self, response: Response, status: str = "completed", **details: Any) -> None:
        """With status completed, cancelled, failed or incomplete; `details` say why: reason=…, or error={…}."""
        for item in response.items:
            if item.data["status"] == "in_progress":
                self.end_item(response, item, "incomplete")
        del self.responses[response.id]
        said = sum(item.audio for item in response.items)
        self.quiet_from = max(self.position(), response.began + said)  # when it will have been heard
        why = {"type": status, **details} if details else None
        shown = self.show(response, status, status_details=why, usage=self.usage(response))
        self.emit("response.done", response=shown)
        limit = {"name": "tokens", "limit": 40_000, "remaining": 40_000 - sum(response.tokens), "reset_seconds": 0.0}
        self.emit("rate_limits.updated", rate_limits=[limit])

    def usage(self, response: Response) -> Object:
        """As if what the last response had read were cached, in whole blocks of 64 tokens."""
        text, audio = response.tokens
        said_text, said_audio = weigh(response.items)
        cached_text, cached_audio = min(text, self.cached[0]) // 64 * 64, min(audio, self.cached[1]) // 64 * 64
        self.cached = response.tokens
        read: Object = {"text_tokens": text, "audio_tokens": audio, "image_tokens": 0}
        read["cached_tokens"] = cached_text + cached_audio
        read["cached_tokens_details"] = {"text_tokens": cached_text, "audio_tokens": cached_audio, "image_tokens": 0}
        counts = {"input_tokens": text + audio, "output_tokens": said_text + said_audio}
        written = {"text_tokens": said_text, "audio_tokens": said_audio}
        details = {"input_token_details": read, "output_token_details": written}
        return {"total_tokens": sum(counts.values()), **counts, **details}


def place_of(item: Item, response: Response) -> Object:
    return {"response_id": response.id, "output_index": response.items.index(item)}


def weigh(items: list[Item]) -> tuple[int, int]:
    """Tokens of text and of audio, roughly: one a character, one for 100 ms of the caller or 50 ms of the model."""
    text = audio = 0
    for item in items:
        for part in item.data.get("content", [item.data]):
            text += len(part.get("text") or part.get("transcript") or part.get("output") or "")
        audio += item.audio // (800 if item.data.get("role") == "user" else 400)
    return text, audio


# ── G.711 mu-law ────────────────────────────────────────────────────────────────────────────────────────────────
#
# Tables for bytes.translate: there is no loop over samples, so that a frame costs a few microseconds.


def linear(code: int) -> int:
    """The 16-bit sample that a mu-law byte stands for."""
    code = ~code & 0xFF
    magnitude = (((code & 15) << 3) + 132 << (code >> 4 & 7)) - 132
    return -magnitude if code & 0x80 else magnitude


SAMPLES = [linear(code) for code in range(256)]
HIGH = bytes(sample >> 8 & 0xFF for sample in SAMPLES)
LOW = bytes(sample & 0xFF for sample in SAMPLES)
LOUDNESS = bytes(round(1.42 * math.sqrt(abs(sample))) for sample in SAMPLES)  # 0 to 254


def nearest_code(sample: int) -> int:
    return min(range(256), key=lambda code: abs(SAMPLES[code] - sample))


CODES = bytes(nearest_code(sample) for sample in (*range(128, 1 << 15, 256), *range(128 - (1 << 15), 0, 256)))


def pcm_of_mulaw(mulaw: bytes) -> bytes:
    """audio/pcm has 16 bits, little-endian, at 24 kHz: each sample three times."""
    pcm = bytearray(6 * len(mulaw))
    for at in (0, 2, 4):
        pcm[at::6], pcm[at + 1 :: 6] = mulaw.translate(LOW), mulaw.translate(HIGH)
    return bytes(pcm)


def mulaw_of_pcm(pcm: bytes) -> bytes:
    """Of the high bytes only: coarse, and good enough to hear oneself."""
    return pcm[1::6].translate(CODES)


# ── When the caller speaks ──────────────────────────────────────────────────────────────────────────────────────


class Vad:
    """Finds speech by loudness: what is well above the quietest moment of the last two seconds.

    Speech has a gap every second or so, and steady noise has none. So after two seconds at most a noise is the floor
    that speech must rise above, however loud it is.
    """

    FRAME = 160  # bytes: 20 ms
    ONSET = 3  # loud frames in a row that are speech, and not a click
    QUIETEST = 5.0  # loudness of a floor; some -60 dB: what is above it by less than the threshold is hiss

    def __init__(self) -> None:
        self.position = 0  # bytes judged
        self.part = b""  # of the next frame
        self.recent: deque[float] = deque(maxlen=100)  # loudness of the frames of two seconds
        self.speaking = False
        self.run = 0  # frames in a row that contradict `speaking`

    def hear(self, mulaw: bytes, threshold: float, silence_ms: int) -> Iterator[tuple[bool, int]]:
        """Yields (True, the position where speech began) and (False, where the silence after it was long enough)."""
        mulaw = self.part + mulaw
        whole = len(mulaw) - len(mulaw) % self.FRAME
        self.part = mulaw[whole:]
        for start in range(0, whole, self.FRAME):
            loudness = sum(mulaw[start : start + self.FRAME].translate(LOUDNESS)) / self.FRAME
            self.position += self.FRAME
            self.recent.append(loudness)
            floor = max(min(self.recent), self.QUIETEST)
            # Loudness is the root of the amplitude: 40 dB are a factor of 10. So a threshold of 0.5 means 10 dB.
            loud = loudness > floor * 10 ** (threshold / 2) * (0.8 if self.speaking else 1)
            self.run = 0 if loud == self.speaking else self.run + 1
            if not self.speaking and self.run == self.ONSET:
                self.speaking, self.run = True, 0
                yield True, self.position - self.ONSET * self.FRAME
            elif self.speaking and self.run * 20 >= max(silence_ms, 20):
                self.speaking, self.run = False, 0
                yield False, self.position


# ── What the stand-in says ──────────────────────────────────────────────────────────────────────────────────────

PIECES_MS = (100, 200, 400, 300)  # the size of an audio delta varies
SPEED = 4  # times faster than it is spoken
ANSWERS = {  # what is said to a text that is not the caller's, by words in it
    "goodbye": "別れ|goodbye",
    "key": "キー|ボタン|key|dtmf",
    "idle": "黙|無言|静|silen|quiet|idle",
    "noted": "",
}


@cache
def speech() -> dict[str, tuple[str, bytes]]:
    """The spoken lines by name: what they say, and their sound in mu-law."""
    file = Path(__file__).with_name("_offline_speech.json")
    lines = json.loads(file.read_text(encoding="utf-8"))["lines"]
    return {name: (line["text"], base64.b64decode(line["mulaw"])) for name, line in lines.items()}


class Parrot(PretendSession):
    """Greets, then says again whatever the caller says."""

    def __init__(self, send: Callable[[Object], object], model: str = "gpt-realtime-2.1") -> None:
        super().__init__(send, model)
        self.vad = Vad()
        self.tasks: set[asyncio.Task[None]] = set()

    def hear(self, mulaw: bytes) -> None:
        turns = self.config["audio"]["input"]["turn_detection"]
        settings = {**TURN_DEFAULTS["server_vad"], "silence_duration_ms": 500, **(turns or {})}  # semantic_vad has none
        padding = settings["prefix_padding_ms"] * 8
        for speaks, position in self.vad.hear(mulaw, settings["threshold"], settings["silence_duration_ms"]):
            if turns and speaks:
                self.speech_started(max(self.buffer_began, position - padding))
            elif turns:
                self.speech_stopped(position)
        if turns and not self.vad.speaking:
            self.ask_if_idle(settings["idle_timeout_ms"])
            self.forget_before(self.vad.position - padding - Vad.ONSET * Vad.FRAME)

    def ask_if_idle(self, timeout_ms: int | None) -> None:
        if not timeout_ms or self.responses or self.position() < self.quiet_from + timeout_ms * 8:
            return
        self.speech_id = new_id("item")
        times = {"audio_start_ms": self.buffer_began // 8, "audio_end_ms": self.position() // 8}
        self.emit("input_audio_buffer.timeout_triggered", **times, item_id=self.speech_id)
        self.commit(self.position())
        self.turn = b""  # there is nothing in it to say again
        self.create_response({})

    def answer(self, response: Response) -> None:
        task = asyncio.get_running_loop().create_task(self.speak(response, self.lines_for(response)))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def lines_for(self, response: Response) -> list[tuple[str, bytes]]:
        """What to answer to the last thing that was not said by the model itself."""
        lines = speech()
        last = next((item.data for item in reversed(self.items) if item.data.get("role") != "assistant"), None)
        if last is None or "instructions" in response.given:
            return [lines["greeting"]]
        content = (last.get("content") or [{}])[0]
        if content.get("type") != "input_audio":
            text = content.get("text", "")
            return [next(lines[name] for name, words in ANSWERS.items() if re.search(words, text, re.IGNORECASE))]
        if not self.turn:
            return [lines["idle"]]
        return [lines["preamble"], (f"（{len(self.turn) / 8000:.1f}秒の音声）", self.turn)]

    async def speak(self, response: Response, lines: list[tuple[str, bytes]]) -> None:
        """Send each line as an item of its own, in pieces, until all is said or somebody ends the response."""
        for words, mulaw in lines:
            item = self.begin_item(response)
            sizes, sent, told = cycle(PIECES_MS), 0, 0
            while sent < len(mulaw):
                piece = mulaw[sent : sent + next(sizes) * 8]
                sent += len(piece)
                said = words[: len(words) * sent // len(mulaw)]  # the transcript keeps step with the sound
                self.say(response, item, piece, said[told:])
                told = len(said)
                await asyncio.sleep(len(piece) / 8000 / SPEED)
                if response.id not in self.responses:
                    return  # interrupted, cancelled, or the connection is closed
            self.end_item(response, item)
        self.end_response(response)


# ── The server ──────────────────────────────────────────────────────────────────────────────────────────────────

PATH = "/v1/realtime"
servers: list[Server] = []  # kept for as long as the process lives


async def converse(connection: ServerConnection) -> None:
    """One connection, from session.created to its close."""
    assert connection.request is not None
    model = parse_qs(urlsplit(connection.request.path).query).get("model", [""])[0]
    # `broadcast` writes without waiting. What piles up when a client does not read is bounded by its own turn's length.
    session = Parrot(lambda event: broadcast([connection], json.dumps(event)), model)
    why, code = None, 4000
    if "OpenAI-Beta" in connection.request.headers:
        why = Refused("beta_api_shape_disabled", "The beta's events are not spoken any more: leave out OpenAI-Beta.")
    elif not model:
        why = Refused("missing_model", "The URL names no model.", "model")
    else:
        session.open()
        try:
            async with asyncio.timeout(SESSION_S):
                with suppress(ConnectionClosed):
                    async for message in connection:
                        session.receive(message)
        except TimeoutError:
            why, code = Refused("session_expired", "Your session hit the maximum duration of 60 minutes."), 1001
        session.responses.clear()
    if why:
        session.error(why)
        await connection.close(code, why.message if code == 1001 else f"invalid_request_error.{why.code}")


async def start_stand_in() -> str:
    """Start the server, for programs of this computer only: web pages, which send an Origin, are refused."""
    speech()
    server = await serve(
        converse,
        "127.0.0.1",
        0,
        process_request=lambda c, request: (
            None if urlsplit(request.path).path == PATH else c.respond(404, "nothing here\n")
        ),
        origins=[None],
        compression=None,
        max_size=21 << 20,  # bytes: MAX_APPEND in base64
    )
    servers.append(server)
    log.warning("OPENAI_API_KEY is not set: a stand-in on this computer answers, and repeats what the caller says")
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}{PATH}"


STAND_IN = start_stand_in
