"""Without OPENAI_API_KEY: a stand-in for OpenAI's Realtime server, on this computer. It sends nothing anywhere.

The caller hears a greeting, and after each turn their own words again: so anybody hears at once that both directions
work, and tries barge-in, keys and hooks without a key and without cost. It recognizes no words: a turn is transcribed
as, for example, 「(2.4秒の音声)」. It calls no tools and follows no instructions. Its voice is a machine's, made
beforehand: _offline_speech.json has the commands, too.

No settings, and nothing is stored. The bridge starts STAND_IN when no key is set. Each part works without the next:

    check           is a client's event well-formed, to the last key?
    PretendSession  the server's side of the GA protocol, without I/O: messages in by `receive`, events out by `send`
    Vad             when does the caller speak?
    Parrot          the PretendSession that listens and speaks
    STAND_IN        a WebSocket server on 127.0.0.1; each connection talks with a Parrot of its own

Of the protocol there is what a telephone needs: speech in mu-law, turns that the server detects, one answer at a time.
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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

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


FORMAT = ByType({"audio/pcmu": {}})  # mu-law at 8 kHz; the others, audio/pcm and audio/pcma, no telephone speaks
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
RESPONSE = IN_BOTH | {"audio": {"output": OUTPUT}, "conversation": {"auto"}, "input": list, "metadata": object}
SESSION = IN_BOTH | {"model": str, "truncation": object, "tracing": object, "include": object}
SESSION["audio"] = {"input": INPUT, "output": OUTPUT | {"speed": Range(0.25, 1.5)}}
CONTENT: dict[str, Object] = {  # of a message, by its role
    "system": {"input_text": {"text!": str}},
    "user": {"input_text": {"text!": str}, "input_audio": {"audio!": str, "transcript": object}},
    "assistant": {"output_text": {"text!": str}, "output_audio": {"audio": str, "transcript": object}},
}
ANY_ITEM = {"id": str, "object": {"realtime.item"}, "status": {"completed", "incomplete", "in_progress"}}
MESSAGE = ANY_ITEM | {"role!": set(CONTENT), "content!": list}
FUNCTION_CALL_OUTPUT = ANY_ITEM | {"call_id!": str, "output!": str}
ITEM = ByType({"message": MESSAGE, "function_call_output": FUNCTION_CALL_OUTPUT})
COUNT = Range(0, 1 << 31)
EVENTS: Object = {  # those of the protocol that the bridge has a use for
    "session.update": {"session!": ByType(realtime=SESSION)},
    "input_audio_buffer.append": {"audio!": str},
    "conversation.item.create": {"item!": ITEM},
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

TURN_DEFAULTS: Object = {"create_response": True, "interrupt_response": True, "threshold": 0.5}
TURN_DEFAULTS |= {"prefix_padding_ms": 300, "silence_duration_ms": 500}
DEFAULTS: Object = {
    "type": "realtime",
    "object": "realtime.session",
    "instructions": "",
    "audio": {
        "input": {"format": {"type": "audio/pcmu"}, "transcription": None, "turn_detection": {"type": "server_vad"}},
        "output": {"format": {"type": "audio/pcmu"}, "voice": "marin", "speed": 1.0},
    },
}


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


@dataclass(eq=False)
class Item:
    data: Object  # as the protocol shows it
    audio: int = 0  # bytes of mu-law that it holds, 8 to the ms


@dataclass(eq=False)
class Response:
    given: Object  # the `response` of response.create
    tokens: tuple[int, int]  # of its input: text, audio
    id: str = field(default_factory=lambda: new_id("resp"))
    items: list[Item] = field(default_factory=list)


class PretendSession:
    """One session, as the server sees it. What is said in it is a subclass's business: override `hear` and `answer`.

    A position is a number of bytes of the caller's audio since the session began, 8 to the ms: time is what the client
    has sent, not what a clock says.
    """

    def __init__(self, send: Callable[[Object], object]) -> None:
        self.send = send
        self.config = merged(DEFAULTS, {"id": new_id("sess")})
        self.items: list[Item] = []  # the conversation
        self.response: Response | None = None  # the one in progress
        self.buffer = bytearray()  # the caller's audio that is not yet in the conversation
        self.buffer_began = 0  # its position
        self.speech_id = ""  # the item that the caller's speech will be, while they speak
        self.turn = b""  # the audio of the caller's last turn

    def hear(self, mulaw: bytes) -> None:
        """The caller's next sound, which is in `buffer` already: whoever detects turns does it now."""

    def answer(self, response: Response) -> None:
        """A response has been created: fill it, now or later, and end it."""

    def emit(self, kind: str, **content: Any) -> None:
        self.send({"type": kind, "event_id": new_id("event"), **copy.deepcopy(content)})

    def receive(self, message: str | bytes) -> None:
        """One message of the client's."""
        event = json.loads(message)
        event_id = event.pop("event_id", None)
        try:
            check(event, ByType(EVENTS))
            self.handle(event)
        except Refused as fault:
            about = {"code": fault.code, "message": fault.message, "param": fault.param, "event_id": event_id}
            self.emit("error", error={"type": "invalid_request_error", **about})

    def handle(self, event: Object) -> None:
        """One event whose shape has been checked. Refuses what does not go with the state of things."""
        match event["type"]:
            case "session.update":
                self.config = merged(self.config, event["session"])
                self.emit("session.updated", session=self.config)
            case "input_audio_buffer.append":
                try:
                    mulaw = base64.b64decode(event["audio"], validate=True)
                except ValueError:
                    text = "Invalid 'audio'. Expected base64-encoded audio bytes."
                    raise Refused("invalid_value", text, "audio") from None
                self.buffer += mulaw
                self.hear(mulaw)
            case "conversation.item.create":
                if event["item"]["type"] == "message":
                    check(event["item"]["content"], [ByType(CONTENT[event["item"]["role"]])], "item.content")
                self.add(event["item"])
            case "conversation.item.truncate":
                self.truncate(event["item_id"], event["audio_end_ms"])
            case "response.create":
                if self.response:
                    text = f"Conversation already has an active response in progress: {self.response.id}."
                    raise Refused("conversation_already_has_active_response", text)
                self.create_response(event.get("response", {}))
            case "response.cancel":
                if self.response is None or event.get("response_id", self.response.id) != self.response.id:
                    raise Refused("response_cancel_not_active", "Cancellation failed: no active response found")
                self.end_response(self.response, "cancelled", "client_cancelled")

    # ── The caller's turns ──

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
        if self.response and self.config["audio"]["input"]["turn_detection"]["interrupt_response"]:
            self.end_response(self.response, "cancelled", "turn_detected")

    def speech_stopped(self, end: int) -> None:
        """The caller's turn ends at this position, with the silence that showed it: an item, then an answer."""
        settings, item_id = self.config["audio"]["input"], self.speech_id
        self.emit("input_audio_buffer.speech_stopped", audio_end_ms=end // 8, item_id=item_id)
        previous = self.items[-1].data["id"] if self.items else None
        self.emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=previous)
        self.turn = self.forget_before(end)
        content = {"type": "input_audio", "transcript": None}
        self.add({"id": item_id, "type": "message", "role": "user", "content": [content]}, len(self.turn))
        if settings["transcription"]:
            seconds = len(self.turn) / 8000
            said = {"transcript": f"({seconds:.1f}秒の音声)", "usage": {"type": "duration", "seconds": seconds}}
            kind = "conversation.item.input_audio_transcription.completed"
            self.emit(kind, item_id=item_id, content_index=0, **said)
        if settings["turn_detection"]["create_response"] and not self.response:
            self.create_response({})

    # ── The conversation ──

    def announce(self, what: str, item: Item) -> None:
        """conversation.item.added or .done, with the item that comes before it."""
        index = self.items.index(item)
        previous = self.items[index - 1].data["id"] if index else None
        self.emit(f"conversation.item.{what}", previous_item_id=previous, item=item.data)

    def add(self, data: Object, audio: int = 0) -> None:
        """Put a whole item at the end of the conversation."""
        item = Item({"id": new_id("item"), "object": "realtime.item", "status": "completed", **data}, audio)
        self.items.append(item)
        self.announce("added", item)
        self.announce("done", item)

    def truncate(self, item_id: str, audio_end_ms: int) -> None:
        """The caller has heard this much of an item. Its transcript goes: nobody knows where in it that is."""
        item = next((item for item in self.items if item.data["id"] == item_id), None)
        if item is None:
            raise Refused("item_truncate_invalid_item_id", f"There is no item with the id '{item_id}'.", "item_id")
        if audio_end_ms * 8 > item.audio:
            text = f"Audio content of {item.audio // 8}ms is already shorter than {audio_end_ms}ms"
            raise Refused("invalid_value", text, "audio_end_ms")
        item.audio = audio_end_ms * 8
        item.data["content"][0]["transcript"] = ""
        self.emit("conversation.item.truncated", item_id=item_id, content_index=0, audio_end_ms=audio_end_ms)

    # ── Responses ──

    def create_response(self, given: Object) -> None:
        text, audio = weigh(self.items)
        self.response = Response(given, (text + len(self.config["instructions"]), audio))
        self.emit("response.created", response=show(self.response, "in_progress"))
        self.answer(self.response)

    def begin_item(self, response: Response) -> Item:
        """A spoken message, which is to be filled by `say` and ended by `end_item`."""
        data = {"id": new_id("item"), "object": "realtime.item", "type": "message", "role": "assistant"}
        item = Item({**data, "status": "in_progress", "content": []})
        response.items.append(item)
        self.items.append(item)
        place, part = place_of(item, response), {"type": "audio", "transcript": ""}
        self.emit("response.output_item.added", **place, item=item.data)
        self.announce("added", item)
        self.emit("response.content_part.added", **place, item_id=item.data["id"], content_index=0, part=part)
        item.data["content"] = [{"type": "output_audio", "transcript": ""}]
        return item

    def say(self, response: Response, item: Item, mulaw: bytes, words: str) -> None:
        """The next piece of a message: what it sounds like, and what it means."""
        item.audio += len(mulaw)
        item.data["content"][0]["transcript"] += words
        place = place_of(item, response) | {"item_id": item.data["id"], "content_index": 0}
        if words:
            self.emit("response.output_audio_transcript.delta", **place, delta=words)
        self.emit("response.output_audio.delta", **place, delta=base64.b64encode(mulaw).decode())

    def end_item(self, response: Response, item: Item, status: str = "completed") -> None:
        item.data["status"] = status
        place, words = place_of(item, response), item.data["content"][0]["transcript"]
        in_item = {**place, "item_id": item.data["id"], "content_index": 0}
        self.emit("response.output_audio.done", **in_item)
        self.emit("response.output_audio_transcript.done", **in_item, transcript=words)
        self.emit("response.content_part.done", **in_item, part={"type": "audio", "transcript": words})
        self.emit("response.output_item.done", **place, item=item.data)
        self.announce("done", item)

    def end_response(self, response: Response, status: str = "completed", reason: str | None = None) -> None:
        """It is completed; or cancelled, for a reason."""
        for item in response.items:
            if item.data["status"] == "in_progress":
                self.end_item(response, item, "incomplete")
        self.response = None
        why = {"type": status, "reason": reason} if reason else None
        self.emit("response.done", response=show(response, status) | {"status_details": why, "usage": usage(response)})


def merged(config: Object, given: Object) -> Object:
    """A session's settings after an update: what is given replaces what was, but inside `audio` it is added."""
    new = config | given
    for side in ("input", "output"):
        new["audio"] = {**new["audio"], side: config["audio"][side] | given.get("audio", {}).get(side, {})}
    if turns := new["audio"]["input"]["turn_detection"]:
        new["audio"]["input"]["turn_detection"] = TURN_DEFAULTS | turns
    return new


def show(response: Response, status: str) -> Object:
    shown: Object = {"object": "realtime.response", "id": response.id, "status": status, "status_details": None}
    return shown | {"output": [item.data for item in response.items], "usage": None}


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


def usage(response: Response) -> Object:
    text, audio = response.tokens
    said_text, said_audio = weigh(response.items)
    return {
        "total_tokens": text + audio + said_text + said_audio,
        "input_tokens": text + audio,
        "output_tokens": said_text + said_audio,
        "input_token_details": {"text_tokens": text, "audio_tokens": audio, "cached_tokens": 0},
        "output_token_details": {"text_tokens": said_text, "audio_tokens": said_audio},
    }


# ── When the caller speaks ──────────────────────────────────────────────────────────────────────────────────────


def linear(code: int) -> int:
    """The 16-bit sample that a mu-law byte stands for (G.711)."""
    code = ~code & 0xFF
    magnitude = (((code & 15) << 3) + 132 << (code >> 4 & 7)) - 132
    return -magnitude if code & 0x80 else magnitude


# Of each mu-law byte, 0 to 254. A table for bytes.translate: without a loop over samples a frame costs microseconds.
LOUDNESS = bytes(round(1.42 * math.sqrt(abs(linear(code)))) for code in range(256))


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

    def __init__(self, send: Callable[[Object], object]) -> None:
        super().__init__(send)
        self.vad = Vad()
        self.tasks: set[asyncio.Task[None]] = set()

    def hear(self, mulaw: bytes) -> None:
        turns = self.config["audio"]["input"]["turn_detection"]
        settings = TURN_DEFAULTS | (turns or {})
        padding = settings["prefix_padding_ms"] * 8
        for speaks, position in self.vad.hear(mulaw, settings["threshold"], settings["silence_duration_ms"]):
            if turns and speaks:
                self.speech_started(max(self.buffer_began, position - padding))
            elif turns:
                self.speech_stopped(position)
        if not self.vad.speaking:
            self.forget_before(self.vad.position - padding - Vad.ONSET * Vad.FRAME)

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
        return [lines["preamble"], (f"({len(self.turn) / 8000:.1f}秒の音声)", self.turn)]

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
                if response is not self.response:
                    return  # interrupted, cancelled, or the connection is closed
            self.end_item(response, item)
        self.end_response(response)


# ── The server ──────────────────────────────────────────────────────────────────────────────────────────────────

servers: list[Server] = []  # kept for as long as the process lives


async def converse(connection: ServerConnection) -> None:
    """One connection, from session.created to its close."""
    # `broadcast` writes without waiting. What piles up when a client does not read is bounded by its own turn's length.
    session = Parrot(lambda event: broadcast([connection], json.dumps(event, ensure_ascii=False)))
    session.emit("session.created", session=session.config)
    with suppress(ConnectionClosed):
        async for message in connection:
            session.receive(message)
    session.response = None


async def start_stand_in() -> str:
    """Start the server, for programs of this computer only: web pages, which send an Origin, are refused."""
    speech()
    servers.append(await serve(converse, "127.0.0.1", 0, origins=[None], compression=None))
    log.warning("OPENAI_API_KEY is not set: a stand-in on this computer answers, and repeats what the caller says")
    return f"ws://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}/v1/realtime"


STAND_IN = start_stand_in
