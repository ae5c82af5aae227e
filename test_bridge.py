"""What the bridge does, read from the wire. The names of the tests, read in order, are its specification.

    PretendTwilio     a caller: the webhook, the stream, and a player that plays in real time
    PretendOpenAI     the model's server; a PretendSession is one connection that the bridge has dialled
    Spy               in place of the hooks: keeps what they would be told, and is the tools
    a_line, a_call    a bridge with a pretend OpenAI, on ports of this computer; and a call on it that is up

The pretenders are as strict as the real ones (hooks/offline.py knows what a client may send, to the last key): a test
fails when the bridge breaks either protocol, whatever the test is about. Nothing between the two sockets is mocked; a
test may shorten one of the bridge's limits. The sections are those of bridge.py, in its order; then come the hooks, the
process and the files around it. Run: pytest

At the end it is a program of its own: `python test_bridge.py` plays a call in the terminal, or many at once.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

import pytest
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import Connect, VoiceResponse
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin
from websockets.utils import accept_key

import bridge
from hooks import offline

HERE = Path(__file__).parent
LIMIT_S = 20  # no test waits longer for anything
TOLERANCE_MS = 80  # between what a caller has heard and what the bridge knows of it, on a busy machine
CALLER, CALLED = "+819012345678", "+15005550006"


def voice(ms: float, seed: int = 0) -> bytes:
    """So much mu-law audio, different for each seed, so that any loss, repetition or change shows."""
    return random.Random(seed).randbytes(int(ms * 8))


def b64(mulaw: bytes) -> str:
    return base64.b64encode(mulaw).decode()


async def until(true: Callable[[], Any], within_s: float = 5.0, why: str = "") -> None:
    """Wait for something to become true; that it does not is a failure."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s: {why or true}"
        await asyncio.sleep(0.005)


# ── The pretend Twilio ──────────────────────────────────────────────────────────────────────────────────────────


class PretendTwilio:
    """One caller, and all that Twilio does for them.

    Its player plays in real time and returns a mark when what came before it has been heard. At `clear` it throws away
    what it has not played, and returns all marks at once.
    """

    numbers = itertools.count(1)

    def __init__(self, port: int, base: str = "", auth_token: str = "") -> None:
        self.port = port
        self.sid = f"CA{next(self.numbers):032x}"
        self.stream_sid = "MZ" + self.sid[2:]
        self.base = base  # PUBLIC_BASE_URL, when requests are to be signed
        self.auth_token = auth_token
        self.timestamp_ms = 0  # of the caller's next frame; a test that moves it on makes a hole
        self.sequence = itertools.count(2)
        self.received: list[dict[str, Any]] = []  # all messages of the bridge
        self.heard = b""  # what was played to the caller
        self.queue: deque[tuple[float, float, bytes]] = deque()  # (begin, end, mulaw) on the loop's clock
        self.marks: list[tuple[asyncio.TimerHandle, str]] = []  # not yet returned
        self.clears = 0
        self.faults: list[str] = []  # what Twilio would warn of, by the number of its warning
        # What the webhook's TwiML says, once it has been answered:
        self.parameters: dict[str, str] = {}
        self.stream_url = (self.base or "https://x").replace("https", "wss") + "/twilio/stream"
        self.after = "/twilio/next"

    def signature(self, url: str, form: dict[str, str]) -> dict[str, str]:
        """The header that proves that it is Twilio; none without an auth token."""
        if not self.auth_token:
            return {}
        return {"X-Twilio-Signature": RequestValidator(self.auth_token).compute_signature(url, form)}

    async def post(self, path: str, **form: str) -> str:
        """A webhook as Twilio sends it; returns the TwiML."""
        form = {"CallSid": self.sid, "From": CALLER, "To": CALLED, "CallStatus": "ringing", **form}
        body = urlencode(form)
        headers = self.signature(self.base + path, form)
        status, _, text = await http(self.port, "POST", path, body, headers)
        assert status == 200, (status, text)
        return text

    async def dials(self) -> PretendTwilio:
        """Call, as far as the webhook's answer."""
        twiml = ElementTree.fromstring(await self.post("/twilio/voice"))
        stream = twiml.find("Connect/Stream")
        assert stream is not None, ElementTree.tostring(twiml)
        self.stream_url = stream.attrib["url"]
        self.after = "/twilio/next" + twiml.findtext("Redirect", "").partition("/twilio/next")[2]
        self.parameters = {p.attrib["name"]: p.attrib["value"] for p in stream.findall("Parameter")}
        return self

    async def connects(self) -> PretendTwilio:
        """The stream's handshake, and `connected`."""
        headers = self.signature(self.stream_url, {})
        url = f"ws://127.0.0.1:{self.port}/twilio/stream{self.stream_url.partition('/twilio/stream')[2]}"
        self.socket = await connect(url, additional_headers=headers, compression=None, close_timeout=1)
        self.reader = asyncio.create_task(self.listen())
        await self.sends({"event": "connected", "protocol": "Call", "version": "1.0.0"})
        return self

    async def starts(self) -> PretendTwilio:
        media_format = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
        start = {
            "accountSid": "AC" + "0" * 32,
            "streamSid": self.stream_sid,
            "callSid": self.sid,
            "tracks": ["inbound"],
            "mediaFormat": media_format,
            "customParameters": self.parameters,
        }
        await self.sends({"event": "start", "sequenceNumber": "1", "streamSid": self.stream_sid, "start": start})
        return self

    async def opens(self) -> PretendTwilio:
        """Open the stream: handshake, `connected`, `start`."""
        await self.connects()
        return await self.starts()

    async def calls(self) -> PretendTwilio:
        """The whole beginning of a call."""
        await self.dials()
        return await self.opens()

    async def sends(self, message: dict[str, Any]) -> None:
        await self.socket.send(json.dumps(message, separators=(",", ":")))

    async def speaks(self, mulaw: bytes, frame_ms: int = 20, pace: bool = False) -> None:
        """The caller's voice, in frames; at once unless `pace`."""
        for start in range(0, len(mulaw), frame_ms * 8):
            frame = mulaw[start : start + frame_ms * 8]
            media = {"track": "inbound", "chunk": "1", "timestamp": str(self.timestamp_ms), "payload": b64(frame)}
            sequence = str(next(self.sequence))
            await self.sends(
                {"event": "media", "sequenceNumber": sequence, "streamSid": self.stream_sid, "media": media}
            )
            self.timestamp_ms += len(frame) // 8
            if pace:
                await asyncio.sleep(frame_ms / 1000)

    async def presses(self, key: str) -> None:
        dtmf = {"track": "inbound_track", "digit": key}
        await self.sends({"event": "dtmf", "streamSid": self.stream_sid, "sequenceNumber": "5", "dtmf": dtmf})

    async def hangs_up(self) -> None:
        """`stop`, and the stream is closed."""
        stop = {"accountSid": "AC" + "0" * 32, "callSid": self.sid}
        await self.sends({"event": "stop", "sequenceNumber": "9", "streamSid": self.stream_sid, "stop": stop})
        await self.socket.close()

    async def listen(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in self.socket:
                self.takes(text)

    def takes(self, text: str | bytes) -> None:
        if not isinstance(text, str):
            self.faults.append("31950: a binary frame")
            return
        message = json.loads(text)
        self.received.append(message)
        match message:
            case {"event": "media", "streamSid": sid, "media": {"payload": payload, **more}, **rest}:
                self.plays(base64.b64decode(payload, validate=True))
            case {"event": "mark", "streamSid": sid, "mark": {"name": name, **more}, **rest}:
                due = max(self.playing_until(), asyncio.get_running_loop().time())
                self.marks.append((asyncio.get_running_loop().call_at(due, self.returns_mark, name), name))
            case {"event": "clear", "streamSid": sid, **rest}:
                more = {}
                self.clears += 1
                self.play_out()
                self.queue.clear()
                for timer, name in list(self.marks):
                    timer.cancel()
                    self.returns_mark(name)
            case _:
                self.faults.append(f"31951: {message}")
                return
        if rest or more or sid != self.stream_sid:
            self.faults.append(f"31951: {message}")

    def plays(self, mulaw: bytes) -> None:
        begins = max(self.playing_until(), asyncio.get_running_loop().time())
        self.queue.append((begins, begins + len(mulaw) / 8000, mulaw))

    def playing_until(self) -> float:
        return self.queue[-1][1] if self.queue else 0.0

    def play_out(self) -> None:
        """Move what has been played by now to `heard`."""
        now = asyncio.get_running_loop().time()
        while self.queue and self.queue[0][0] < now:
            begins, ends, mulaw = self.queue.popleft()
            bytes_played = len(mulaw) if ends <= now else int((now - begins) * 8000)
            self.heard += mulaw[:bytes_played]
            if ends > now:
                self.queue.appendleft((now, ends, mulaw[bytes_played:]))
                break

    def returns_mark(self, name: str) -> None:
        self.marks = [mark for mark in self.marks if mark[1] != name]
        mark = {"event": "mark", "sequenceNumber": "4", "streamSid": self.stream_sid, "mark": {"name": name}}
        task = asyncio.ensure_future(self.sends(mark))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def heard_so_far(self) -> bytes:
        """What the caller has heard."""
        self.play_out()
        return self.heard

    def sent_to_it(self) -> bytes:
        """All audio that has come, heard or not."""
        return b"".join(base64.b64decode(m["media"]["payload"]) for m in self.received if m["event"] == "media")

    async def next(self) -> str:
        """The stream has been closed by the bridge: Twilio asks what comes then."""
        await asyncio.wait_for(self.socket.wait_closed(), 5)
        return await self.post("/twilio/next", CallStatus="in-progress")


# ── The pretend OpenAI ──────────────────────────────────────────────────────────────────────────────────────────


def a_function_call(
    name: str, arguments: str = "{}", call_id: str = "call_1", status: str = "completed"
) -> dict[str, Any]:
    """The item in which the model calls a tool."""
    item = {"id": f"item_{call_id}", "type": "function_call", "status": status, "name": name}
    return {**item, "call_id": call_id, "arguments": arguments}


class PretendSession:
    """One session of the pretend OpenAI: checks what it is sent as the real one does, and does what a test tells it."""

    def __init__(self, server: PretendOpenAI, socket: ServerConnection) -> None:
        self.server = server
        self.socket = socket
        self.headers = socket.request.headers if socket.request else {}
        self.config: dict[str, Any] = {}  # the session that was granted
        self.received: list[dict[str, Any]] = []  # all but audio
        self.seen = 0  # how many of them `gets` has passed
        self.heard = b""  # the caller's audio
        self.errors: list[str] = []  # the codes of all that it has refused
        self.event_id: str | None = None  # of the event that is being handled
        self.response: str | None = None  # the one in progress
        self.audio: dict[str, int] = {}  # item -> bytes of it that were sent
        self.creates = 0  # how often it was asked for a response

    async def run(self) -> None:
        await self.sends("session.created", session={"type": "realtime", "audio": {}})
        with contextlib.suppress(ConnectionClosed):
            async for text in self.socket:
                await self.takes(text)

    async def sends(self, kind: str, **content: Any) -> None:
        event = {"type": kind, "event_id": f"event_{next(self.server.numbers)}", **content}
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(json.dumps(event, ensure_ascii=False))

    async def refuses(self, code: str, message: str, param: str | None = None) -> None:
        self.errors.append(code)
        error = {"type": "invalid_request_error", "code": code, "message": message, "param": param}
        await self.sends("error", error={**error, "event_id": self.event_id})

    async def takes(self, text: str | bytes) -> None:
        if not isinstance(text, str):
            return await self.refuses("invalid_event", "Expected a text WebSocket message")
        event = json.loads(text)
        kind, self.event_id = event["type"], event.pop("event_id", None)
        try:
            offline.check(event, offline.ByType(offline.EVENTS))
        except offline.Refused as fault:
            return await self.refuses(fault.code, fault.message, fault.param)
        if kind == "input_audio_buffer.append":
            if not self.config:
                self.errors.append("audio before the session was set up: noise")
            self.heard += base64.b64decode(event["audio"], validate=True)
            return None
        self.received.append(event)
        match kind:
            case "session.update":
                await self.updates(event["session"])
            case "response.create":
                self.creates += 1
                if self.response:
                    await self.refuses("conversation_already_has_active_response", f"… in progress: {self.response}")
                elif self.server.answers_creates:
                    await self.begins()
            case "response.cancel":
                if not self.response or event.get("response_id", self.response) != self.response:
                    await self.refuses("response_cancel_not_active", "Cancellation failed: no active response found")
                else:
                    await self.ends("cancelled", reason="client_cancelled")
            case "conversation.item.truncate":
                has_ms = self.audio.get(event["item_id"], -1) // 8
                if event["item_id"] not in self.audio or not 0 <= event["audio_end_ms"] <= has_ms:
                    wanted = f"Audio content of {has_ms}ms is already shorter than {event['audio_end_ms']}ms"
                    await self.refuses("invalid_value", wanted, "audio_end_ms")
        return None

    async def updates(self, session: dict[str, Any]) -> None:
        if self.server.refuses_transcription and session["audio"]["input"].get("transcription"):
            return await self.refuses("invalid_value", "no such model", "session.audio.input.transcription.model")
        self.config = json.loads(json.dumps(session))
        for way, audio_format in self.server.grants.items():
            self.config["audio"][way]["format"] = {"type": audio_format}
        await self.sends("session.updated", session=self.config)
        return None

    # What a test makes it do.

    async def begins(self, response: str = "") -> str:
        self.response = response or f"resp_{next(self.server.numbers)}"
        await self.sends("response.created", response={"id": self.response, "status": "in_progress", "output": []})
        return self.response

    async def speaks(self, mulaw: bytes, item: str = "", delta_ms: int = 300, name: str = "output_audio") -> str:
        """Audio of one item of the response in progress, faster than real time, as the real one sends it."""
        item = item or f"item_{next(self.server.numbers)}"
        at = {"response_id": self.response, "item_id": item, "output_index": 0, "content_index": 0}
        for start in range(0, len(mulaw), delta_ms * 8):
            delta = mulaw[start : start + delta_ms * 8]
            self.audio[item] = self.audio.get(item, 0) + len(delta)
            await self.sends(f"response.{name}.delta", **at, delta=b64(delta))
        return item

    async def transcribes(self, item: str, text: str) -> None:
        at = {"response_id": self.response, "item_id": item, "output_index": 0, "content_index": 0}
        await self.sends("response.output_audio_transcript.done", **at, transcript=text)

    async def ends(self, status: str = "completed", output: list[Any] | None = None, **details: Any) -> None:
        response, self.response = self.response, None
        usage = {"total_tokens": 30, "input_tokens": 10, "output_tokens": 20}
        about = {"type": status, **details} if details else None
        done = {"id": response, "status": status, "status_details": about, "output": output or [], "usage": usage}
        await self.sends("response.done", response=done)

    async def says(self, mulaw: bytes, text: str = "はい。", item: str = "") -> str:
        """A whole answer of one item."""
        if not self.response:
            await self.begins()
        item = await self.speaks(mulaw, item)
        await self.transcribes(item, text)
        message = {"id": item, "type": "message", "role": "assistant", "status": "completed"}
        await self.sends("response.output_item.done", response_id=self.response, item=message)
        await self.ends()
        return item

    async def calls_tools(self, *function_calls: dict[str, Any], status: str = "completed") -> None:
        """A whole answer without a sound; or the end of one that has been begun."""
        if not self.response:
            await self.begins()
        for function_call in function_calls:
            await self.sends("response.output_item.done", response_id=self.response, item=function_call)
        await self.ends(status, output=list(function_calls))

    async def fails(self, code: str = "rate_limit_exceeded") -> None:
        """The response in progress ends in an error."""
        await self.ends("failed", error={"code": code, "message": "slow down, or pay"})

    async def hears_speech(self, item: str = "") -> str:
        """The caller begins to speak, which ends the response in progress; returns the item of their turn."""
        item = item or f"item_{next(self.server.numbers)}"
        await self.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id=item)
        detection = self.config["audio"]["input"]["turn_detection"]
        if self.response and detection["interrupt_response"]:
            await self.ends("cancelled", reason="turn_detected")
        return item

    async def hears_silence(self, item: str, text: str = "") -> None:
        """The caller's turn is over; with `text`, its words are known at once."""
        await self.sends("input_audio_buffer.speech_stopped", audio_end_ms=0, item_id=item)
        await self.sends("input_audio_buffer.committed", item_id=item, previous_item_id=None)
        if text:
            usage = {"type": "duration", "seconds": 1.0}
            kind = "conversation.item.input_audio_transcription.completed"
            await self.sends(kind, item_id=item, content_index=0, transcript=text, usage=usage)

    async def gets(self, kind: str, within_s: float = 5.0) -> dict[str, Any]:
        """The next event from the bridge, which must be of this kind: what comes between is a failure."""
        await until(lambda: len(self.received) > self.seen, within_s, f"{kind}; so far {self.received}")
        event = self.received[self.seen]
        self.seen += 1
        assert event["type"] == kind, f"{event} instead of {kind}"
        return event

    async def asked(self) -> None:
        """The greeting has been asked for, and its response has begun."""
        await self.gets("response.create")
        await until(lambda: self.response)

    async def caught_up(self) -> None:
        """Everything that was sent to the bridge has been handled, and what it sent because of it has come."""
        await (await self.socket.ping())
        await asyncio.sleep(0.03)

    def truncates(self) -> list[tuple[str, int]]:
        return [(e["item_id"], e["audio_end_ms"]) for e in self.received if e["type"] == "conversation.item.truncate"]

    def types(self) -> list[str]:
        return [event["type"] for event in self.received]


class PretendOpenAI:
    """The server that the bridge dials. What it refuses and grants is set by a test."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.sessions: list[PretendSession] = []
        self.taken = 0  # how many of them `session` has given to the test
        self.answers_creates = True  # response.create is answered by response.created
        self.grants: dict[str, str] = {}  # "input" or "output" -> another audio format than was asked for
        self.refuses_transcription = False
        self.on_dial: Callable[[PretendSession], Any] | None = None  # instead of a session
        self.expected_errors: set[str] = set()  # codes; any other is a failure of the test
        self.paths: list[str] = []  # what was dialled, query and all

    async def handle(self, socket: ServerConnection) -> None:
        session = PretendSession(self, socket)
        self.sessions.append(session)
        self.paths.append(socket.request.path if socket.request else "")
        if self.on_dial is not None:
            await self.on_dial(session)
        else:
            await session.run()

    def opens_late(self) -> asyncio.Event:
        """From now on a session begins only when this is set."""
        opens = asyncio.Event()

        async def late(session: PretendSession) -> None:
            await opens.wait()
            await session.run()

        self.on_dial = late
        return opens

    async def session(self, within_s: float = 5.0, granted: bool = True) -> PretendSession:
        """The next session that the bridge opens, set up."""
        await until(lambda: len(self.sessions) > self.taken, within_s, "a session")
        session = self.sessions[self.taken]
        self.taken += 1
        if granted:
            await session.gets("session.update")
            await until(lambda: session.config, within_s, "the session to be set up")
        return session


# ── The bridge between them ─────────────────────────────────────────────────────────────────────────────────────


class Spy:
    """In place of the hooks: keeps what they would be told, offers what a test gives it."""

    tools: list[dict[str, Any]] = []  # as the model is told of them

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {}
        self.told: list[tuple[str, float, dict[str, Any]]] = []  # (event, at, facts)
        self.calls: list[Any] = []  # the call of each call_started
        self.results: Callable[..., Any] | None = None  # what a tool does, whatever its name
        self.dropped = 0

    def listens(self, event: str) -> bool:
        return True

    def emit(self, event: str, call: Any, at: float, facts: dict[str, Any]) -> None:
        self.told.append((event, at, facts))
        if event == "call_started":
            self.calls.append(call)

    async def run_tool(self, call: Any, name: str, arguments: str) -> str:
        assert self.results is not None
        return str(await self.results(call, name, arguments))

    def tool_waits(self, result: str = "done") -> asyncio.Event:
        """From now on a tool runs until this is set; then it has this result."""
        done = asyncio.Event()

        async def results(call: Any, name: str, arguments: str) -> str:
            await done.wait()
            return result

        self.results = results
        return done

    def close(self, timeout_s: float) -> None:
        pass

    def events(self, *but: str) -> list[str]:
        """The names of all events but audio and these, in the order in which they were told."""
        return [event for event, _, _ in self.told if event not in {"caller_audio", "model_audio", *but}]

    def facts(self, event: str) -> list[dict[str, Any]]:
        """What was told with each event of this name."""
        return [facts for name, _, facts in self.told if name == event]


@dataclasses.dataclass
class Line:
    """A running bridge, its pretend OpenAI, and what its hooks are told."""

    bridge: bridge.Bridge
    port: int
    openai: PretendOpenAI
    hooks: Spy

    @property
    def call(self) -> Any:
        """The first call that the hooks were told of, as they see it."""
        return self.hooks.calls[0]

    def caller(self, auth_token: str | None = None) -> PretendTwilio:
        """A caller of Twilio's; or of somebody's who has another auth token."""
        settings = self.bridge.settings
        auth_token = settings.twilio_auth_token if auth_token is None else auth_token
        return PretendTwilio(self.port, settings.public_base_url, auth_token)


@contextlib.asynccontextmanager
async def a_line(**settings: Any) -> AsyncIterator[Line]:
    """A bridge on a port of its own. At its end nothing may be left over, and nobody may have broken the protocol."""
    async with asyncio.timeout(LIMIT_S):
        openai, hooks = PretendOpenAI(), Spy()
        async with serve(openai.handle, "127.0.0.1", 0, compression=None, close_timeout=1) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            address = {"openai_realtime_url": f"ws://127.0.0.1:{port}/v1/realtime", "openai_api_key": "sk-secret"}
            the_bridge = bridge.Bridge(bridge.Settings(**{**address, **settings}), hooks)
            async with bridge.open_line(the_bridge, "127.0.0.1", 0) as line:
                yield Line(the_bridge, next(iter(line.sockets)).getsockname()[1], openai, hooks)
                for call in list(the_bridge.calls.values()):
                    if not call.stream_sid:  # a webhook that no stream was opened for
                        call.end("the test is over")
            await until(lambda: not the_bridge.calls, why="all calls to end")
            await until(lambda: all(s.socket.close_code for s in openai.sessions), 2, "all sessions to be closed")
        errors = [error for session in openai.sessions for error in session.errors]
        assert set(errors) <= openai.expected_errors, errors


@contextlib.asynccontextmanager
async def a_call(**settings: Any) -> AsyncIterator[tuple[PretendTwilio, PretendSession, Line]]:
    """A call that is up. It has no greeting, unless a test gives one; that has been asked for and is still unspoken."""
    async with a_line(**{"greeting": "", **settings}) as line:
        twilio = await line.caller().calls()
        openai = await line.openai.session()
        await until(lambda: line.hooks.calls, why="the call to start")
        if line.bridge.settings.greeting:
            await openai.gets("response.create")
        yield twilio, openai, line
        if not twilio.socket.close_code:
            await twilio.hangs_up()
        assert twilio.faults == []


async def http(
    port: int, method: str, path: str, body: str | bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    """A plain HTTP request: status, headers, body."""
    body = body.encode() if isinstance(body, str) else body
    fields = {"Host": f"127.0.0.1:{port}", **(headers or {})}
    if body:
        fields |= {"Content-Length": str(len(body)), "Content-Type": "application/x-www-form-urlencoded"}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return parse_http(await raw(port, head.encode() + b"\r\n" + body))


async def raw(port: int, *segments: bytes, pause_s: float = 0.0) -> bytes:
    """Send bytes as they are, and read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for segment in segments:
        writer.write(segment)
        await writer.drain()
        await asyncio.sleep(pause_s)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def parse_http(answer: bytes) -> tuple[int, dict[str, str], str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body.decode()


def form_request(body: bytes, *headers: str, path: str = "/twilio/voice", method: str = "POST") -> bytes:
    """A request with this body, byte for byte."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


FORM = urlencode({"CallSid": "CA5", "From": CALLER, "To": CALLED, "CallerName": ""}).encode()


# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────────────────────

KEY = {"OPENAI_API_KEY": "sk-secret"}


def test_a_setting_is_read_from_the_environment_variable_of_its_name() -> None:
    env = {"PORT": "80", "MAX_CALLS": "7", "DRAIN_SECONDS": "1.5", "VOICE": " cedar ", "SESSION": '{"tracing":"auto"}'}
    settings = bridge.read_settings({**KEY, **env})
    assert (settings.openai_api_key, settings.port, settings.max_calls) == ("sk-secret", 80, 7)
    assert (settings.drain_seconds, settings.voice, settings.session) == (1.5, "cedar", {"tracing": "auto"})


def test_an_empty_setting_is_its_default_except_where_it_means_none() -> None:
    assert (bridge.Settings().port, bridge.Settings().hooks) == (8080, None)
    names = [field.name for field in dataclasses.fields(bridge.Settings)]
    settings = bridge.read_settings({**{name.upper(): "" for name in names}, **KEY})
    none = {"greeting": "", "transcription_model": "", "hooks": "", "openai_api_key": "sk-secret"}
    assert settings == dataclasses.replace(bridge.Settings(), **none)


def test_the_public_address_is_the_one_given_or_that_of_the_fly_app() -> None:
    fly = {**KEY, "FLY_APP_NAME": "my-app"}
    assert bridge.read_settings(fly).public_base_url == "https://my-app.fly.dev"
    given = bridge.read_settings({**fly, "PUBLIC_BASE_URL": "https://a.example:8443/phone/"})
    assert given.public_base_url == "https://a.example:8443/phone"


def test_the_session_setting_is_merged_into_the_session_that_openai_is_asked_for() -> None:
    patch = json.loads(
        '{"audio":{"input":{"transcription":null,"noise_reduction":{"type":"near_field"}}},"tracing":"auto"}'
    )
    session = bridge.session_update(bridge.Settings(session=patch), [])
    assert "transcription" not in session["audio"]["input"] and session["audio"]["output"]["voice"] == "marin"
    assert session["audio"]["input"]["noise_reduction"] == {"type": "near_field"} and session["tracing"] == "auto"


@pytest.mark.parametrize(
    ("target", "patch", "result"),  # examples of RFC 7396, appendix A
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": "foo"}, {"b": {"c": None}}, {"a": "foo", "b": {}}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ],
)
def test_a_merge_patch_is_that_of_rfc_7396(target: Any, patch: Any, result: Any) -> None:
    assert bridge.merge_patch(target, patch) == result


def run_bridge(env: dict[str, str], folder: Path = HERE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bridge.py"]
    return subprocess.run(command, cwd=folder, env=clean(env), capture_output=True, text=True, timeout=10)


def clean(env: dict[str, str]) -> dict[str, str]:
    """The environment of a bare machine, with these variables."""
    ours = {field.name.upper() for field in dataclasses.fields(bridge.Settings)} | {"FLY_APP_NAME"}
    return {name: value for name, value in os.environ.items() if name not in ours} | env


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "0"),
        ("PORT", "http"),
        ("MAX_CALLS", "-1"),
        ("MAX_CALL_SECONDS", "nan"),
        ("DRAIN_SECONDS", "soon"),
        ("SESSION", "[1]"),
        ("SESSION", "{"),
        ("SESSION", '{"audio":{"input":{"format":{"type":"audio/pcm","rate":24000}}}}'),
        ("SESSION", '{"audio":null}'),
        ("SESSION", '{"audio":[]}'),
        ("SESSION", '{"audio":{"input":[1]}}'),
        ("SESSION", '{"audio":{"output":"loud"}}'),
        ("OPENAI_API_KEY", "sk-secret…"),
        ("OPENAI_API_KEY", "sk-secret sk-secret"),
        ("OPENAI_API_KEY", "sk-secret\nsk-secret"),
        ("PUBLIC_BASE_URL", "http://my-app.fly.dev"),
        ("PUBLIC_BASE_URL", "my-app.fly.dev"),
        ("PUBLIC_BASE_URL", "https://my-app.fly.dev/?x=y"),
        ("PUBLIC_BASE_URL", "https://sk-secret@my-app.fly.dev"),
        ("OPENAI_REALTIME_URL", "wss://api.openai.com/v1/realtime#x"),
        ("PUBLIC_BASE_URL", "https://my-app.fly.dev:99999"),
        ("OPENAI_REALTIME_URL", "https://api.openai.com/v1/realtime"),
        ("OPENAI_REALTIME_URL", "wss://api.openai.com:99999/v1/realtime"),
        ("OPENAI_REALTIME_URL", "wss://[::1/v1/realtime"),
        ("PUBLIC_BASE_URL", "http://user:@sk-secret@my-app.fly.dev"),
        ("OPENAI_REALTIME_URL", "https://user:sk-secret@api.openai.com/v1/realtime"),
        ("HOOKS", "log,lgo"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_status_2_and_one_line_that_names_it(name: str, value: str) -> None:
    done = run_bridge({"OPENAI_API_KEY": "sk-secret", name: value})
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and name in line and "Traceback" not in line and "sk-secret" not in line
    assert re.search("give|take that out|choose|copy it again", line), "what to do about it"


# ── 2 Answer: the webhook, and what comes after the stream ──────────────────────────────────────────────────────


async def test_the_webhook_is_answered_with_the_twiml_that_twilios_own_package_would_build() -> None:
    async with a_line(public_base_url="https://my-app.fly.dev") as line:
        twilio = await line.caller().dials()
        theirs, connect_verb = VoiceResponse(), Connect()
        stream = connect_verb.stream(url="wss://my-app.fly.dev/twilio/stream")
        for name, value in twilio.parameters.items():
            stream.parameter(name=name, value=value)
        theirs.append(connect_verb)
        theirs.redirect("https://my-app.fly.dev/twilio/next", method="POST")
        ours = await twilio.post("/twilio/voice")
        assert ElementTree.canonicalize(ours) == ElementTree.canonicalize(str(theirs))


async def test_without_a_public_address_twilio_is_told_the_name_by_which_the_request_came() -> None:
    async with a_line() as line:
        twiml = (await http(line.port, "POST", "/twilio/voice", FORM, {"Host": "localhost:8080"}))[2]
        assert '<Stream url="wss://localhost:8080/twilio/stream">' in twiml
        assert ">https://localhost:8080/twilio/next</Redirect>" in twiml


async def test_a_webhook_may_come_by_get_too_and_its_answer_is_xml() -> None:
    async with a_line() as line:
        status, headers, body = await http(line.port, "GET", "/twilio/voice?CallSid=CA9&From=%2B81")
        assert (status, headers["Content-Type"]) == (200, "text/xml; charset=utf-8")
        assert "<Connect><Stream" in body
        assert "CA9" in line.bridge.calls
        status, headers, body = await http(line.port, "GET", "/twilio/next?CallSid=CA9")
        assert (status, headers["Content-Type"]) == (200, "text/xml; charset=utf-8") and "<Hangup/>" in body


async def test_a_webhook_that_names_no_call_is_answered_and_nothing_is_dialled_for_it() -> None:
    async with a_line() as line:
        assert "<Stream" in (await http(line.port, "POST", "/twilio/voice", "From=%2B81"))[2]
        assert not line.bridge.calls


async def test_an_early_event_that_is_not_as_documented_costs_the_caller_nothing_else_of_the_greeting() -> None:
    async with a_line(greeting="もしもし") as line:
        twilio = await line.caller().dials()
        openai = await line.openai.session()
        await openai.asked()
        item = await openai.speaks(voice(100, 1))
        await openai.sends("response.output_audio_transcript.done", item_id=item)  # without its transcript
        await openai.speaks(voice(100, 2), item)
        await openai.ends()
        await openai.caught_up()
        await twilio.opens()
        await until(lambda: twilio.heard_so_far() == voice(100, 1) + voice(100, 2))
        assert not line.call.response_id
        await twilio.hangs_up()


async def test_a_webhook_that_is_delivered_twice_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_line() as line:
        twilio = line.caller()
        first = await twilio.post("/twilio/voice")
        monkeypatch.setattr(bridge, "TOKEN_S", 70)  # as if it were 10 s later
        assert await twilio.post("/twilio/voice") == first
        await twilio.calls()
        await line.openai.session()
        await asyncio.sleep(0.05)
        assert len(line.openai.sessions) == 1
        await twilio.hangs_up()


async def test_whatever_the_caller_is_named_the_twiml_is_well_formed() -> None:
    async with a_line() as line:
        form = urlencode({"CallSid": "CA1", "From": "sip:\0\x0b\x1f\ufffe<&\"'>鈴木@x"})
        twiml = (await http(line.port, "POST", "/twilio/voice", form))[2]
        values = [p.attrib["value"] for p in ElementTree.fromstring(twiml).iter("Parameter")]
        assert values[1] == "sip:<&\"'>鈴木@x"


async def test_further_callers_than_max_calls_hear_that_the_line_is_busy_and_disturb_nobody() -> None:
    async with a_call(max_calls=1) as (twilio, openai, line):
        answer = await line.caller().post("/twilio/voice")
        assert "<Say" in answer and "<Hangup/>" in answer and "<Stream" not in answer
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
        assert len(line.openai.sessions) == 1


async def test_at_max_calls_a_second_delivery_is_answered_and_a_stream_from_another_machine_hears_busy() -> None:
    async with a_line(**SIGNED) as other, a_line(**SIGNED, max_calls=1) as line:
        known, elsewhere = await line.caller().dials(), await other.caller().dials()
        assert "<Stream" in await known.post("/twilio/voice")
        elsewhere.port = line.port
        await elsewhere.opens()
        assert "混み合って" in await elsewhere.next()
        assert len(line.bridge.calls) == 1


async def test_while_draining_new_callers_are_asked_to_call_again_and_calls_already_answered_go_on() -> None:
    async with a_line(**SIGNED) as other, a_line(**SIGNED) as line:
        known, elsewhere = await line.caller().dials(), await other.caller().dials()
        line.bridge.draining = True
        assert "システムの更新" in await line.caller().post("/twilio/voice")
        assert "<Stream" in await known.post("/twilio/voice")
        elsewhere.port = line.port
        await elsewhere.opens()
        assert "システムの更新" in await elsewhere.next() and not line.bridge.not_yet_asked
        await known.opens()
        await until(lambda: line.hooks.calls, 2)
        assert (await http(line.port, "GET", "/health"))[0] == 503
        await known.hangs_up()


async def test_when_twilio_asks_what_comes_next_for_an_unknown_call_it_is_to_hang_up() -> None:
    async with a_line() as line:
        assert (await line.caller().post("/twilio/next")).endswith("<Response><Hangup/></Response>")


async def test_unless_draining_nobody_waits_for_twilio_to_ask_what_comes_next() -> None:
    async with a_line(greeting="") as line:
        twilio = await line.caller().calls()
        await until(lambda: line.hooks.calls)
        line.call.hang_up()
        await asyncio.wait_for(twilio.socket.wait_closed(), 2)  # and /twilio/next goes to another machine
        await until(lambda: not line.bridge.calls)
        assert not line.bridge.not_yet_asked


def test_only_the_latest_ended_calls_and_used_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "REMEMBERED", 2)
    memory: dict[str, int] = {}
    for number in range(5):
        bridge.keep_latest(memory, str(number), number)
    assert list(memory) == ["3", "4"]


# ── 2 Answer: who may call, with an auth token ──────────────────────────────────────────────────────────────────

SIGNED = {"twilio_auth_token": "12345", "public_base_url": "https://mycompany.com", "greeting": ""}


def signed(url: str, form: dict[str, Any], token: str = "12345", algorithm: str | None = None) -> dict[str, str]:
    return {"X-Twilio-Signature": RequestValidator(token).compute_signature(url, form, algorithm)}


async def test_a_signed_call_is_let_in_from_the_webhook_to_the_goodbye() -> None:
    async with a_line(**SIGNED) as line:
        twilio = await line.caller().calls()
        await line.openai.session()
        await until(lambda: line.hooks.calls, why="the call to start")
        line.call.hang_up()
        assert "<Hangup/>" in await twilio.next()


@pytest.mark.parametrize("base", ["https://mycompany.com", "https://mycompany.com:443", "https://mycompany.com:8443"])
async def test_a_webhooks_signature_may_be_made_with_or_without_the_port(base: str) -> None:
    async with a_line(**{**SIGNED, "public_base_url": base}) as line:
        form = {"CallSid": "CA1", "Empty": "", "Name": "鈴木 &+"}
        for host in {base.removeprefix("https://"), "mycompany.com", "mycompany.com:443"}:
            headers = signed(f"https://{host}/twilio/voice?x=%20y", form)
            answer = await http(line.port, "POST", "/twilio/voice?x=%20y", urlencode(form), headers)
            assert answer[0] == 200, host


async def test_of_a_webhook_that_comes_by_get_the_query_is_signed() -> None:
    async with a_line(**SIGNED) as line:
        for path in ("/twilio/voice", "/twilio/next"):
            headers = signed(f"https://mycompany.com{path}?CallSid=CA1", {})
            assert (await http(line.port, "GET", f"{path}?CallSid=CA1", headers=headers))[0] == 200
            assert (await http(line.port, "GET", f"{path}?CallSid=CA2", headers=headers))[0] == 403


async def test_a_signature_covers_every_value_of_a_name_that_comes_twice() -> None:
    class Pairs(dict[str, list[str]]):
        getlist = dict.__getitem__

    async with a_line(**SIGNED) as line:
        headers = signed("https://mycompany.com/twilio/voice", Pairs(CallSid=["CA1"], Digit=["2", "1", "2"]))
        answer = await http(line.port, "POST", "/twilio/voice", "CallSid=CA1&Digit=2&Digit=1&Digit=2", headers)
        assert answer[0] == 200


async def test_a_webhook_signed_with_a_shared_key_is_let_in() -> None:
    async with a_line(**SIGNED) as line:
        headers = signed("https://mycompany.com/twilio/voice", {"CallSid": "CA1"}, algorithm="HMAC_SHA256")
        settings = "X-Twilio-Webhooks-Signature-Settings"
        for algorithm, status in (("HMAC_SHA256", 200), ("HMAC_SHA1", 403), ("HMAC_MD5", 403)):
            headers[settings] = f"key=webhooks_sharedkey_1,algorithm={algorithm}"
            assert (await http(line.port, "POST", "/twilio/voice", "CallSid=CA1", headers))[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Twilio-Signature": "ü"},
        signed("https://mycompany.com/twilio/voice", {"CallSid": "CA1"}, token="another"),
        signed("https://mycompany.com/twilio/voice", {"CallSid": "CA2"}),
        signed("https://mycompany.com/twilio/voice/", {"CallSid": "CA1"}),
        signed("http://mycompany.com/twilio/voice", {"CallSid": "CA1"}),
        signed("wss://mycompany.com/twilio/voice", {"CallSid": "CA1"}),
        {**signed("https://mycompany.com/twilio/voice", {"CallSid": "CA1"}), "Origin": "https://evil.example"},
    ],
)
async def test_a_webhook_that_twilio_has_not_signed_gets_403_and_the_log_says_what_to_set(
    headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with a_line(**SIGNED) as line:
        for path in ("/twilio/voice", "/twilio/next"):
            status, _, body = await http(line.port, "POST", path, "CallSid=CA1", headers)
            assert status == 403 and "12345" not in body
        assert not line.bridge.calls
    (record, _) = (r for r in caplog.records if "403" in r.message)
    assert re.search("X-Twilio-Signature|TWILIO_AUTH_TOKEN|evil", record.message) and "12345" not in record.message


async def test_a_request_with_two_signatures_is_refused() -> None:
    async with a_line(**SIGNED) as line:
        good = signed("https://mycompany.com/twilio/next", {})["X-Twilio-Signature"]
        both = [f"X-Twilio-Signature: {value}" for value in (good, "another")]
        assert parse_http(await raw(line.port, form_request(b"", both[0], path="/twilio/next")))[0] == 200
        assert parse_http(await raw(line.port, form_request(b"", *both, path="/twilio/next")))[0] == 403


async def test_a_stream_without_the_right_signature_is_refused_before_it_is_open() -> None:
    async with a_line(**SIGNED) as line:
        for token in ("", "wrong"):
            with pytest.raises(InvalidStatus) as refused:
                await line.caller(auth_token=token).connects()
            assert refused.value.response.status_code == 403


async def test_without_a_public_address_signed_calls_of_this_computer_only_are_let_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_line(twilio_auth_token="12345", greeting="") as line:
        for scheme in ("http", "https"):
            headers = signed(f"{scheme}://127.0.0.1:{line.port}/twilio/next", {})
            assert (await http(line.port, "POST", "/twilio/next", headers=headers))[0] == 200
            headers["X-Forwarded-For"] = "1.2.3.4"
            assert (await http(line.port, "POST", "/twilio/next", headers=headers))[0] == 403
    assert "PUBLIC_BASE_URL is not set" in caplog.text


# ── 2 Answer: who may call, without an auth token ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Fly-Client-IP", "x-forwarded-proto", "Via"])
async def test_without_an_auth_token_what_a_proxy_forwards_is_refused_and_the_log_says_what_to_set(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_line() as line:
        assert (await http(line.port, "POST", "/twilio/voice", FORM, {name: "1.2.3.4"}))[0] == 403
        assert (await http(line.port, "GET", "/health", headers={name: "1.2.3.4"}))[0] == 200
        assert not line.bridge.calls
    assert "TWILIO_AUTH_TOKEN is not set" in caplog.text


async def test_without_an_auth_token_another_computer_may_neither_call_nor_read_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.TwilioLeg, "remote_address", ("203.0.113.5", 1))
    async with a_line() as line:
        for path in ("/", "/log"):
            line.hooks.pages[path] = lambda connection, request: connection.respond(200, "the browser phone")
        assert (await http(line.port, "POST", "/twilio/voice", FORM))[0] == 403
        status, _, body = await http(line.port, "GET", "/")
        assert (status, body) == (200, "This is a telephone; its pages are for its owner.\n")
        assert (await http(line.port, "GET", "/log"))[0] == 403


async def test_a_script_in_a_page_of_another_site_may_not_call_and_one_in_our_own_may() -> None:
    async with a_line() as line:
        rebound = {"Host": "evil.example", "Origin": "http://evil.example"}  # a name that was made to point here
        for headers in ({"Origin": "https://evil.example"}, rebound, {"Origin": "null"}):
            assert (await http(line.port, "POST", "/twilio/voice", FORM, headers))[0] == 403
        own = f"http://127.0.0.1:{line.port}"
        assert (await http(line.port, "POST", "/twilio/voice", FORM, {"Origin": own}))[0] == 200


@pytest.mark.parametrize("settings", [{}, SIGNED])
async def test_a_page_of_another_site_may_not_open_a_stream_and_our_own_may(settings: dict[str, str]) -> None:
    async with a_line(**settings) as line:
        twilio, url = line.caller(), f"ws://127.0.0.1:{line.port}/twilio/stream"
        headers = twilio.signature(twilio.stream_url, {})
        with pytest.raises(InvalidStatus) as refused:
            await connect(url, origin=Origin("https://evil.example"), additional_headers=headers)
        assert refused.value.response.status_code == 403
        own = Origin(f"http://127.0.0.1:{line.port}")
        await (await connect(url, origin=own, additional_headers=headers)).close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:8080"},  # DNS rebinding: a page's own GET brings no Origin
        {"Sec-Fetch-Site": "cross-site"},  # <img src="http://localhost:8080/twilio/voice?…"> in any page
        {"Origin": "http://["},
    ],
)
async def test_a_link_in_a_page_of_another_site_can_neither_call_nor_read_pages(headers: dict[str, str]) -> None:
    async with a_line() as line:
        line.hooks.pages["/log"] = lambda connection, request: connection.respond(200, "secret")
        assert (await http(line.port, "GET", "/twilio/voice?CallSid=CA1", headers=headers))[0] == 403
        assert (await http(line.port, "GET", "/log", headers=headers))[0] == 403
        assert (await http(line.port, "GET", "/health", headers=headers))[0] == 200
        assert not line.bridge.calls


async def test_this_computer_may_read_pages_by_any_of_its_names_and_without_one() -> None:
    async with a_line() as line:
        line.hooks.pages["/log"] = lambda connection, request: connection.respond(200, "mine")
        for host in (f"localhost:{line.port}", "[::1]:8080", "127.0.0.2", "LOCALHOST", "a.localhost:1"):
            assert (await http(line.port, "GET", "/log", headers={"Host": host}))[2] == "mine", host
        assert parse_http(await raw(line.port, b"GET /log HTTP/1.0\r\n\r\n"))[2] == "mine"


async def test_with_an_auth_token_pages_are_still_for_this_computer_only() -> None:
    async with a_line(**SIGNED) as line:
        line.hooks.pages["/log"] = lambda connection, request: connection.respond(200, "mine")
        assert (await http(line.port, "GET", "/log"))[0] == 200
        assert (await http(line.port, "GET", "/log", headers={"X-Forwarded-For": "1.2.3.4"}))[0] == 403


async def test_where_there_is_no_page_the_root_answers_with_a_plain_line_of_text() -> None:
    async with a_line() as line:
        status, headers, body = await http(line.port, "GET", "/")
        assert status == 200 and headers["Content-Type"].startswith("text/plain") and "telephone" in body


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("::ffff:127.0.0.1", True)),
        *(("localhost", True), ("my.localhost", True), ("203.0.113.5", False), ("::ffff:203.0.113.5", False)),
        *(("localhost.evil.example", False), ("0.0.0.0", False), ("", False), ("127.0.0.1.evil.example", False)),
    ],
)
def test_these_names_are_this_computers_and_others_are_not(host: str, loopback: bool) -> None:
    assert bridge.is_loopback(host) is loopback


# ── 2 Answer: the stream and its token ──────────────────────────────────────────────────────────────────────────


async def is_refused(stranger: PretendTwilio) -> None:
    """The stream is opened, and closed again at its `start` (1008: against the rules)."""
    await stranger.opens()
    await asyncio.wait_for(stranger.socket.wait_closed(), 2)
    assert stranger.socket.close_code == 1008


@pytest.mark.parametrize("token", ["", "9999999999.abc", "1.0"])
async def test_a_stream_that_does_not_bring_the_token_of_its_call_is_closed_and_nothing_is_dialled(token: str) -> None:
    async with a_line() as line:
        stranger = line.caller()
        stranger.parameters = {"token": token}
        await is_refused(stranger)
        assert not line.openai.sessions and not line.hooks.told


async def test_a_token_is_good_for_its_own_call_only() -> None:
    async with a_line() as line:
        one, other = await line.caller().dials(), await line.caller().dials()
        one.parameters = other.parameters
        await is_refused(one)


@pytest.mark.parametrize(
    "forge", [str, lambda t: "0" + t, lambda t: "".join(chr(ord(c) + 0xFEE0) for c in t[:10]) + t[10:]]
)
async def test_a_token_is_good_once_in_whatever_way_its_expiry_is_written(
    forge: Callable[[str], str],
) -> None:
    async with a_line(greeting="") as line:
        twilio = await line.caller().calls()
        await line.openai.session()
        await twilio.hangs_up()
        await until(lambda: not line.bridge.calls)
        again = line.caller()
        again.sid, again.parameters = twilio.sid, {"token": forge(twilio.parameters["token"])}
        await is_refused(again)
        assert len(line.openai.sessions) == 1


async def test_a_token_is_good_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bridge.TOKEN_S == 60
    monkeypatch.setattr(bridge, "TOKEN_S", -1)
    async with a_line() as line:
        await is_refused(await line.caller().dials())


async def test_a_stream_that_was_refused_cannot_try_another_token() -> None:
    async with a_line(greeting="") as line:
        twilio, stranger = await line.caller().dials(), line.caller()
        stranger.sid, stranger.parameters = twilio.sid, {"token": "a guess"}
        await stranger.connects()
        await stranger.starts()
        stranger.parameters = twilio.parameters
        await stranger.starts()
        await asyncio.wait_for(stranger.socket.wait_closed(), 2)
        await twilio.opens()
        await until(lambda: line.hooks.calls, 2, "the token to be good still")
        await twilio.hangs_up()


async def test_a_call_has_one_stream_whatever_token_a_second_one_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_call() as (twilio, openai, line):
        monkeypatch.setattr(bridge, "TOKEN_S", 70)
        for token in (twilio.parameters["token"], line.bridge.new_token(twilio.sid)):
            again = line.caller()
            again.sid, again.parameters = twilio.sid, {"token": token}
            await is_refused(again)
        await openai.says(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))


async def test_a_stream_that_sends_no_start_in_5_s_is_closed_and_nothing_is_dialled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert bridge.START_TIMEOUT_S == 5
    monkeypatch.setattr(bridge, "START_TIMEOUT_S", 0.2)
    async with a_line() as line:
        silent = await line.caller().connects()
        await silent.sends({"event": "media", "media": {"payload": "////"}})
        await asyncio.wait_for(silent.socket.wait_closed(), 2)
        assert not line.openai.sessions
    assert "sent no start in 0.2 s" in caplog.text


async def test_a_stream_that_its_other_side_closes_before_the_start_is_not_said_to_have_been_silent_for_5_s(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_line() as line:
        hasty = await line.caller().connects()
        await hasty.socket.close()
        await until(lambda: "was closed before its start" in caplog.text)
        assert not line.openai.sessions


# ── 2 Answer: several machines ──────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_whose_webhook_went_to_another_machine_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "UNCLAIMED_S", 0.2)
    async with a_line(**SIGNED) as one, a_line(**SIGNED) as other:
        twilio = await one.caller().dials()
        twilio.port = other.port
        await twilio.opens()
        openai = await other.openai.session()
        await asyncio.sleep(0.3)
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
        assert (other.hooks.calls[0].caller, other.hooks.calls[0].called) == (CALLER, CALLED)
        await twilio.hangs_up()
        twilio.port = one.port
        assert "<Hangup/>" in await twilio.post("/twilio/next")


async def through_a_proxy(machines: dict[str, int], replays: bool) -> tuple[asyncio.Server, int]:
    """A proxy in front of several machines that sends each request to the next one, as Fly's does: with `replays`, a
    request that is answered with fly-replay is delivered again to the machine that this names."""
    turns = itertools.cycle(machines)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        machine, source = next(turns), b""
        while True:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", machines[machine])
            back_writer.write(head[:-2] + source + b"\r\n" + body)
            answer = await back_reader.readuntil(b"\r\n\r\n")
            replay = re.search(rb"fly-replay: prefer_instance=(\w+)", answer)
            if not (replay and replays):
                break
            machine, source = replay[1].decode(), b"fly-replay-src: instance=" + machine.encode() + b"\r\n"
            back_writer.close()
        writer.write(answer)

        async def pump(one: asyncio.StreamReader, other: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await one.read(65536):
                    other.write(data)
            other.close()

        await asyncio.gather(pump(reader, back_writer), pump(back_reader, writer))

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("on_fly", [True, False])
async def test_webhook_stream_and_next_may_reach_different_machines(on_fly: bool) -> None:
    def machine(name: str) -> Any:
        return a_line(**SIGNED, fly_machine_id=name if on_fly else "")

    async with machine("a1") as one, machine("b2") as other:
        proxy, port = await through_a_proxy({"a1": one.port, "b2": other.port}, replays=on_fly)
        twilio = one.caller()
        twilio.port = port
        await twilio.calls()
        held_by = one if on_fly else other
        openai = await held_by.openai.session()
        await openai.says(voice(200))
        await until(lambda: twilio.heard_so_far() == voice(200))
        assert len(one.openai.sessions) + len(other.openai.sessions) == (1 if on_fly else 2)
        held_by.hooks.calls[0].transfer("+81312345678")
        await asyncio.wait_for(twilio.socket.wait_closed(), 5)
        answer = await twilio.post(twilio.after)
        assert ("<Dial>" in answer) or not on_fly, answer
        proxy.close()


async def test_when_the_machine_that_had_a_call_is_gone_another_one_answers_for_it() -> None:
    async with a_line(**SIGNED, fly_machine_id="b2") as line:
        headers = {"fly-replay-src": "instance=b2", **signed("https://mycompany.com/twilio/next?machine=a1", {})}
        status, answer_headers, body = await http(line.port, "POST", "/twilio/next?machine=a1", b"", headers)
        assert status == 200 and "fly-replay" not in answer_headers and "<Hangup/>" in body


# ── 3 The call: from the webhook to the last close ──────────────────────────────────────────────────────────────


async def test_the_model_is_dialled_at_the_webhook_and_speaks_as_soon_as_the_stream_opens() -> None:
    async with a_line() as line:
        twilio = await line.caller().dials()
        openai = await line.openai.session()
        greeting = await openai.gets("response.create")
        assert line.bridge.settings.greeting in greeting["response"]["instructions"]
        item = await openai.says(voice(400))
        await openai.caught_up()
        await twilio.opens()
        await until(lambda: twilio.heard_so_far() == voice(400))
        assert line.hooks.events()[:4] == ["call_started", "model_asked", "model_spoke", "model_used"]
        assert line.hooks.told[1][1] < line.hooks.told[0][1]  # the time at which it was asked
        assert openai.audio[item] == 3200
        await twilio.hangs_up()


async def test_a_model_that_no_stream_comes_for_in_10_s_is_hung_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert bridge.Call.UNCLAIMED_S == 10
    monkeypatch.setattr(bridge.Call, "UNCLAIMED_S", 0.2)
    async with a_line() as line:
        await line.caller().dials()
        openai = await line.openai.session()
        await until(lambda: openai.socket.close_code, 2)
        assert not line.hooks.told
    assert "ended before its stream was open: no stream came" in caplog.text


async def test_a_call_whose_stream_has_come_goes_on_after_10_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.Call, "UNCLAIMED_S", 0.2)
    async with a_call() as (twilio, _, line):
        await asyncio.sleep(0.3)
        assert not twilio.socket.close_code and not line.call.over.done()


async def test_two_calls_at_once_are_kept_apart() -> None:
    async with a_call() as (one, one_openai, line):
        other = await line.caller().calls()
        other_openai = await line.openai.session()
        await one.speaks(voice(300, 1))
        await other.speaks(voice(300, 2))
        await one_openai.says(voice(200, 3))
        await other_openai.says(voice(200, 4))
        await until(lambda: one.heard_so_far() == voice(200, 3) and other.heard_so_far() == voice(200, 4))
        assert (one_openai.heard, other_openai.heard) == (voice(300, 1), voice(300, 2))
        await other.hangs_up()


@pytest.mark.parametrize(
    ("close", "reason"),
    [
        (b"\x03\xe8", "caller hung up"),  # 1000: closed
        (b"\x03\xe9", "caller hung up"),  # 1001: going away
        (b"", "caller hung up"),
        (b"\x03\xf3", "twilio lost"),  # 1011: a fault
    ],
)
async def test_a_stream_that_is_closed_in_order_is_a_caller_who_hung_up(close: bytes, reason: str) -> None:
    async with a_call() as (twilio, _, line):
        twilio.socket.transport.write(frame(0x88, close))
        await until(lambda: line.hooks.facts("call_ended"))
        assert line.hooks.facts("call_ended") == [{"reason": reason}]


async def test_when_the_caller_hangs_up_or_is_lost_the_model_is_hung_up_within_a_second() -> None:
    for way in ("stop", "close", "abort"):
        async with a_call() as (twilio, openai, line):
            await openai.says(voice(1000))
            if way == "stop":
                await twilio.sends({"event": "stop", "streamSid": twilio.stream_sid, "stop": {}})
            elif way == "close":
                await twilio.socket.close()
            else:
                twilio.socket.transport.abort()
            await until(lambda: openai.socket.close_code, 1)
            await until(lambda: line.hooks.events()[-1] == "call_ended", 1)
        assert line.hooks.events().count("call_ended") == line.hooks.events().count("call_started") == 1
        assert len(asyncio.all_tasks()) == 1, "no task outlives its call"


async def test_a_caller_who_hangs_up_while_the_model_is_being_dialled_leaves_nothing_behind() -> None:
    async with a_line() as line:
        line.openai.on_dial = lambda session: session.socket.wait_closed()
        twilio = await line.caller().calls()
        await until(lambda: line.openai.sessions)
        await twilio.hangs_up()
        await until(lambda: line.openai.sessions[0].socket.close_code, 1)


async def test_a_caller_who_hangs_up_in_the_middle_of_a_sentence_ends_all_that_went_on() -> None:
    async with a_call() as (twilio, openai, line):
        for item in ("u1", "u2", "u3"):  # "yes … no … well": sentences that follow each other quickly
            await openai.hears_speech(item)
            await openai.hears_silence(item)
        await openai.hears_speech("u4")
        await openai.caught_up()
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"))
        told = len(line.hooks.told)
        await asyncio.sleep(0.9)
        assert len(line.hooks.told) == told, "nothing is told after call_ended"
        assert line.call.ears_ms == 0


async def test_of_an_answer_in_progress_what_was_heard_is_told_when_the_caller_hangs_up() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.speaks(voice(400, 1))
        await openai.speaks(voice(400, 2))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"))
        first, second = (facts["heard_ms"] for facts in line.hooks.facts("model_said"))
        assert 0 < first < 300 and second == 0


async def test_how_much_was_heard_of_the_last_words_is_measured_at_the_hanging_up_and_not_after_the_closing() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(2000), "長い返事です。")
        await until(lambda: len(twilio.heard_so_far()) > 1200)
        openai.socket.transport.pause_reading()  # its close takes the whole second
        twilio.socket.transport.abort()
        await until(lambda: line.hooks.facts("call_ended"), 2)
        assert line.hooks.facts("model_said")[0]["heard_ms"] < 198
        openai.socket.transport.abort()


async def test_the_last_words_are_told_also_when_the_caller_hangs_up_while_their_mark_is_on_its_way() -> None:
    async with a_call() as (twilio, openai, line):
        twilio.returns_mark = lambda name: None  # type: ignore[method-assign]
        await openai.says(voice(100), "はい。")
        await until(lambda: len(twilio.sent_to_it()) == 800)
        await asyncio.sleep(0.2)
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"))
        assert line.hooks.facts("model_said") == [{"text": "はい。", "heard_ms": None}]


async def test_what_the_model_sends_while_the_call_is_being_closed_begins_nothing_anew() -> None:
    async with a_call() as (twilio, openai, line):
        line.hooks.tool_waits()
        await openai.begins()
        await openai.caught_up()
        openai.socket.transport.pause_reading()  # it sees our close only later
        await twilio.hangs_up()
        await until(lambda: line.call.over.done())
        await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        await openai.calls_tools(a_function_call("slow"))
        await until(lambda: line.hooks.facts("call_ended"), 2)
        assert not line.hooks.facts("caller_spoke") and not line.call.tools
        openai.socket.transport.abort()


async def test_timers_and_tools_end_with_their_call() -> None:
    async with a_call() as (twilio, openai, line):
        ended = asyncio.Event()

        async def results(*_: Any) -> str:
            try:
                return str(await asyncio.sleep(9))
            finally:
                ended.set()

        line.hooks.results = results
        await openai.calls_tools(a_function_call("slow"))
        await openai.caught_up()
        await twilio.hangs_up()
        await asyncio.wait_for(ended.wait(), 1)
        assert all(timer.cancelled() for timer in line.call.timers.values())


# ── 4 The model: the session and its greeting ───────────────────────────────────────────────────────────────────


async def test_without_a_key_none_is_sent() -> None:
    async with a_line(openai_api_key="") as line:
        await line.caller().dials()
        assert "Authorization" not in (await line.openai.session()).headers


async def test_a_session_that_is_granted_twice_is_greeted_once(caplog: pytest.LogCaptureFixture) -> None:
    async with a_call(greeting="もしもし") as (_, openai, _):
        await openai.sends("session.updated", session=openai.config)
        await openai.ends()
        await openai.caught_up()
        assert openai.creates == 1
    assert "could not be handled" not in caplog.text


async def test_the_session_is_set_up_in_ga_form_for_a_telephone() -> None:
    async with a_line() as line:
        await line.caller().dials()
        openai = await line.openai.session()
        assert line.openai.paths == ["/v1/realtime?model=gpt-realtime-2.1"]
        assert openai.headers["Authorization"] == "Bearer sk-secret" and "OpenAI-Beta" not in openai.headers
        session = openai.received[0]["session"]
        pcmu = {"type": "audio/pcmu"}
        assert session["audio"]["input"].pop("turn_detection")["type"] == "server_vad"
        assert session["audio"] == {
            "input": {"format": pcmu, "transcription": {"model": "gpt-transcribe"}},
            "output": {"format": pcmu, "voice": "marin"},
        }
        assert session["output_modalities"] == ["audio"]
        assert session["reasoning"] == {"effort": "low"}
        assert session["instructions"] == line.bridge.settings.instructions
        assert "tools" not in session


async def test_the_model_is_told_of_the_tools_that_hooks_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "name": "a", "description": "b", "parameters": {"type": "object"}}
    monkeypatch.setattr(Spy, "tools", [tool])
    async with a_line() as line:
        await line.caller().dials()
        session = (await line.openai.session()).received[0]["session"]
        assert (session["tools"], session["tool_choice"]) == ([tool], "auto")


@pytest.mark.parametrize(
    ("url", "dialled"),
    [
        ("wss://api.openai.com/v1/realtime", "wss://api.openai.com/v1/realtime?model=mini"),
        ("ws://localhost:1/v1?x=y", "ws://localhost:1/v1?x=y&model=mini"),
        ("wss://a.example/v1?model=theirs&x=y", "wss://a.example/v1?model=theirs&x=y"),
    ],
)
def test_the_model_is_added_to_the_url_unless_that_names_one(url: str, dialled: str) -> None:
    settings = bridge.Settings(openai_realtime_url=url, openai_realtime_model="mini")
    assert bridge.Bridge(settings, Spy()).openai_url == dialled


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        ("gpt-realtime-2", True),
        ("gpt-realtime-2.1", True),
        ("gpt-realtime-2.1-mini", True),
        ("gpt-realtime", False),
        ("gpt-realtime-mini", False),
        ("gpt-realtime-1.5", False),
        ("gpt-realtime-2025-08-28", False),
    ],
)
def test_reasoning_is_set_only_for_models_that_reason_whether_the_url_or_the_setting_names_them(
    model: str, reasons: bool
) -> None:
    named = bridge.Settings(openai_realtime_model=model)
    in_url = bridge.Settings(openai_realtime_url=f"wss://example.com/v1/realtime?model={model}")
    for settings in (named, in_url):
        assert settings.model == model
        assert ("reasoning" in bridge.session_update(settings, [])) == reasons


def test_without_a_transcription_model_the_callers_words_are_not_transcribed() -> None:
    session = bridge.session_update(bridge.Settings(transcription_model=""), [])
    assert "transcription" not in session["audio"]["input"]


async def test_when_the_transcription_is_refused_the_session_goes_on_without_it() -> None:
    async with a_line(greeting="") as line:
        line.openai.refuses_transcription = True
        line.openai.expected_errors = {"invalid_value"}
        twilio = await line.caller().calls()
        openai = await line.openai.session()
        again = await openai.gets("session.update")
        assert "transcription" not in again["session"]["audio"]["input"]
        await until(lambda: line.hooks.facts("model_failed"))
        assert line.hooks.facts("model_failed")[0]["error"].endswith(": trying without transcription")
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
        await twilio.hangs_up()


async def test_the_greeting_is_asked_for_once_also_when_the_caller_speaks_over_it() -> None:
    async with a_call(greeting="もしもし") as (twilio, openai, _):
        await openai.speaks(voice(600))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        item = await openai.hears_speech()
        await openai.hears_silence(item, "もしもし")
        await openai.says(voice(100, 2))
        await until(lambda: twilio.heard_so_far().endswith(voice(100, 2)))
        assert openai.creates == 1


async def test_the_greeting_comes_before_the_callers_audio_on_the_wire() -> None:
    async with a_line(greeting="もしもし") as line:
        line.openai.answers_creates = False
        opens, order = asyncio.Event(), []

        async def slow(session: PretendSession) -> None:
            await opens.wait()
            takes = session.takes

            async def noted(text: Any) -> None:
                order.append(json.loads(text)["type"])
                await takes(text)

            session.takes = noted  # type: ignore[method-assign]
            await session.run()

        line.openai.on_dial = slow
        twilio = await line.caller().calls()
        await twilio.speaks(voice(60))
        opens.set()
        await until(lambda: len(order) == 5)
        assert order == ["session.update", "response.create"] + ["input_audio_buffer.append"] * 3
        await twilio.hangs_up()


async def test_without_a_greeting_the_caller_speaks_first() -> None:
    async with a_call(greeting="") as (twilio, openai, _):
        await openai.caught_up()
        assert openai.creates == 0
        await openai.hears_silence(await openai.hears_speech(), "もしもし")
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))


# ── 4 The model: when it cannot be had, the caller hears an apology and never silence ───────────────────────────


async def hears_an_apology(line: Line, twilio: PretendTwilio, within_s: float = 5) -> None:
    await asyncio.wait_for(twilio.socket.wait_closed(), within_s)
    answer = await twilio.next()
    assert re.search(r'<Say language="ja-JP">申し訳.*</Say><Hangup/>', answer), answer
    assert line.hooks.facts("call_ended") == [{"reason": "model lost"}]
    assert twilio.faults == []


async def test_a_session_that_openai_refuses_ends_in_an_apology() -> None:
    async with a_line(session={"made_up": 1}) as line:
        line.openai.expected_errors = {"unknown_parameter"}
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
        assert "made_up" in line.hooks.facts("model_failed")[0]["error"]


async def test_a_session_that_is_refused_without_transcription_too_ends_in_an_apology() -> None:
    async with a_line() as line:
        line.openai.expected_errors = {"invalid_value"}

        async def refuses(session: PretendSession) -> None:
            session.updates = lambda _: session.refuses("invalid_value", "no transcription here")  # type: ignore
            await session.run()

        line.openai.on_dial = refuses
        await hears_an_apology(line, await line.caller().calls())
        assert line.openai.sessions[0].types() == ["session.update"] * 2


@pytest.mark.parametrize("way", ["input", "output"])
async def test_a_session_in_another_audio_format_ends_in_an_apology_and_is_never_played_as_noise(way: str) -> None:
    async with a_line() as line:
        line.openai.grants = {way: "audio/pcm"}
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
        assert twilio.received == []
        assert f"audio/pcm as {way} format" in line.hooks.facts("model_failed")[0]["error"]


async def test_a_server_that_comes_up_a_moment_late_is_dialled_until_it_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with a_line(openai_realtime_url=f"ws://127.0.0.1:{port}/v1/realtime", greeting="") as line:
        twilio = await line.caller().calls()
        await asyncio.sleep(0.2)
        async with serve(line.openai.handle, "127.0.0.1", port):
            openai = await line.openai.session()
            await openai.says(voice(100))
            await until(lambda: twilio.heard_so_far() == voice(100))
            await twilio.hangs_up()
            await until(lambda: openai.socket.close_code)


async def test_a_model_that_cannot_be_reached_for_8_s_ends_in_an_apology(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bridge.Call.SESSION_TIMEOUT_S == 8
    monkeypatch.setattr(bridge.Call, "SESSION_TIMEOUT_S", 0.7)
    async with a_line(openai_realtime_url="ws://127.0.0.1:9/v1/realtime") as line:
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
    async with a_line() as line:

        async def silent(session: PretendSession) -> None:
            await session.socket.wait_closed()

        line.openai.on_dial = silent
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)


@pytest.mark.parametrize(("status", "dials"), [(400, 2), (401, 2), (404, 2), (408, 3), (425, 3), (429, 3), (503, 3)])
async def test_a_dial_that_openai_refuses_is_repeated_only_if_the_http_status_says_later(
    status: int, dials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.Call, "DIAL_PAUSE_S", 0.15)
    monkeypatch.setattr(bridge.Call, "SESSION_TIMEOUT_S", 0.5)
    asked: list[str] = []

    def refuse(connection: ServerConnection, request: Any) -> Any:
        asked.append(request.path)
        return connection.respond(status, "no")

    async with serve(lambda socket: socket.wait_closed(), "127.0.0.1", 0, process_request=refuse) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with a_line(openai_realtime_url=f"ws://127.0.0.1:{port}/") as line:
            twilio = await line.caller().calls()
            await hears_an_apology(line, twilio)
            error = line.hooks.facts("model_failed")[0]["error"]
    assert min(len(asked), 3) == dials, "once at the webhook and, unless that is still known, once at the stream"
    assert len(asked) <= 4, "with a pause between"
    assert ("OPENAI_API_KEY" in error) == (status == 401)


@pytest.mark.parametrize(
    ("code", "close_code"), [("invalid_api_key", 3000), ("invalid_model", 4000), ("model_not_found", 4004)]
)
async def test_a_model_that_cannot_be_had_is_not_dialled_again_and_ends_in_an_apology(
    code: str, close_code: int
) -> None:
    async with a_line() as line:

        async def refuse(session: PretendSession) -> None:
            await session.refuses(code, "no")
            await session.socket.close(close_code, f"invalid_request_error.{code}")

        line.openai.on_dial = refuse
        line.openai.expected_errors = {code}
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
        assert len(line.openai.sessions) == 1


async def test_a_model_that_closes_with_a_final_code_before_the_session_is_set_up_is_not_dialled_again() -> None:
    async with a_line() as line:
        line.openai.on_dial = lambda session: session.socket.close(4000, "invalid_model")
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
        assert len(line.openai.sessions) == 1


async def test_a_model_that_closes_with_a_final_code_in_the_middle_of_a_call_is_not_dialled_again() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.socket.close(4004, "model_not_found")
        await hears_an_apology(line, twilio)


async def test_a_dial_that_fails_in_a_way_that_nobody_thought_of_ends_in_an_apology() -> None:
    async with a_line(openai_realtime_url="ws://127.0.0.1:99999/v1/realtime") as line:
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio, 3)


async def test_a_greeting_that_had_only_begun_before_the_stream_does_not_delay_the_apology() -> None:
    async with a_line() as line:
        twilio = await line.caller().dials()
        openai = await line.openai.session()
        await openai.asked()
        await openai.caught_up()
        await openai.socket.close(4004, "model_not_found")
        await asyncio.sleep(0.05)
        await twilio.opens()
        await hears_an_apology(line, twilio)


async def test_what_openai_says_together_with_its_handshake_is_heard() -> None:
    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = re.search("Sec-WebSocket-Key: (.+)\r", (await reader.readuntil(b"\r\n\r\n")).decode())
        assert key
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        head += f"Sec-WebSocket-Accept: {accept_key(key[1])}\r\n\r\n"
        error = bridge.dump({"type": "error", "error": {"code": "insufficient_quota", "message": "pay first"}})
        writer.write(head.encode() + frame(0x81, error, masked=False))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(refuses, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/realtime"
    async with a_line(openai_realtime_url=url) as line:
        await hears_an_apology(line, await line.caller().calls())
        assert "pay first" in line.hooks.facts("model_failed")[0]["error"]
    server.close()


async def test_a_greeting_that_was_spoken_before_the_stream_is_heard_before_the_apology() -> None:
    async with a_line() as line:
        twilio = await line.caller().dials()
        openai = await line.openai.session()
        await openai.gets("response.create")
        await openai.says(voice(200))
        await openai.socket.close(4004, "model_not_found")
        await asyncio.sleep(0.05)
        await twilio.opens()
        await hears_an_apology(line, twilio)
        assert twilio.heard_so_far() == voice(200)


async def test_a_model_that_is_lost_for_good_while_a_tool_runs_is_apologised_for_at_once() -> None:
    async with a_call() as (twilio, openai, line):
        line.hooks.tool_waits()
        await openai.calls_tools(a_function_call("slow"))
        await openai.caught_up()
        await openai.socket.close(4004, "model_not_found")
        await hears_an_apology(line, twilio, 2)


async def test_an_answer_that_was_to_be_asked_for_again_does_not_delay_the_apology() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(1600))
        await openai.begins()
        await openai.fails()
        await openai.caught_up()
        await openai.socket.close(4004, "model_not_found")
        await hears_an_apology(line, twilio, 4)


async def test_after_an_apology_is_due_nothing_more_is_dialled_told_played_or_called_off() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(400))
        await openai.sends("error", error={"code": "insufficient_quota", "message": "", "event_id": None})
        await openai.says(voice(100, 2))
        await openai.hears_speech()
        await openai.caught_up()
        line.call.hang_up()
        line.call.tell_model("何か")
        await twilio.speaks(voice(60, 3))
        await asyncio.sleep(0.05)
        assert openai.types() == ["session.update"] and openai.heard == b""
        await openai.socket.close(1011)
        await hears_an_apology(line, twilio)
        assert twilio.heard_so_far() == voice(400) and len(line.openai.sessions) == 1


# ── 4 The model: when its session is lost in the middle of a call ───────────────────────────────────────────────


async def a_little_talk(twilio: PretendTwilio, openai: PretendSession) -> None:
    """The caller asks, the model answers, and the caller interrupts it half way."""
    await openai.hears_speech("u1")
    await openai.hears_silence("u1", "明日の天気は。")
    await openai.says(voice(1000, 1), "0123456789")
    await until(lambda: len(twilio.heard_so_far()) > 4000)
    await openai.hears_speech("u2")
    await openai.gets("conversation.item.truncate")
    await openai.hears_silence("u2", "東京です。")
    await openai.caught_up()


async def a_turn(twilio: PretendTwilio, openai: PretendSession, mulaw: bytes, text: str = "") -> None:
    """The caller says something; its words come at once if they are given, else not yet."""
    await openai.hears_speech("u1")
    await twilio.speaks(mulaw)
    await until(lambda: openai.heard == mulaw)
    await openai.hears_silence("u1", text)


async def test_words_that_come_after_the_answer_to_them_are_told_to_the_next_session_before_it() -> None:
    async with a_call() as (_, openai, line):
        await openai.hears_silence(await openai.hears_speech("u1"))
        await openai.says(voice(20), "晴れです。")
        kind = "conversation.item.input_audio_transcription.completed"
        await openai.sends(kind, item_id="u1", content_index=0, transcript="天気は。")
        await until(lambda: line.hooks.facts("model_said") and line.hooks.facts("caller_said"))
        openai.socket.transport.abort()
        again = await line.openai.session()
        items = [(await again.gets("conversation.item.create"))["item"] for _ in range(2)]
        assert [item["content"][0]["text"] for item in items] == ["天気は。", "晴れです。"]


async def test_a_session_that_is_dead_without_a_word_is_found_in_10_s_and_dialled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bridge_connect = bridge.connect

    def hurried(*arguments: Any, **options: Any) -> Any:
        assert options["ping_interval"] + options["ping_timeout"] == 10
        return bridge_connect(*arguments, **{**options, "ping_interval": 0.1, "ping_timeout": 0.1})

    monkeypatch.setattr(bridge, "connect", hurried)
    async with a_call() as (_, openai, line):
        openai.socket.transport.pause_reading()
        await line.openai.session(within_s=2)
        openai.socket.transport.abort()


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012])
async def test_a_lost_session_is_dialled_again_with_what_was_said_and_heard(code: int) -> None:
    async with a_call() as (twilio, openai, line):
        await a_little_talk(twilio, openai)
        if code == 1006:
            openai.socket.transport.abort()
        else:
            await openai.socket.close(code)
        again = await line.openai.session(within_s=2)
        assert re.fullmatch(rf".* lost \({code}.*\): dialling again", line.hooks.facts("model_failed")[0]["error"])
        texts = [(await again.gets("conversation.item.create"))["item"] for _ in range(3)]
        assert [item["role"] for item in texts] == ["user", "assistant", "user"]
        assert [item["content"][0]["type"] for item in texts] == ["input_text", "output_text", "input_text"]
        said = [item["content"][0]["text"] for item in texts]
        assert said[0] == "明日の天気は。" and said[2] == "東京です。" and re.fullmatch("01234?5?6?", said[1])
        await again.gets("response.create")  # the caller waits for an answer
        before = len(twilio.heard_so_far())
        await again.says(voice(200, 2))
        await until(lambda: twilio.heard_so_far()[before:] == voice(200, 2))
        assert not twilio.socket.close_code


async def test_a_new_session_is_told_the_last_200_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bridge.Call.HISTORY == 200
    monkeypatch.setattr(bridge.Call, "HISTORY", 2)
    async with a_call() as (_, openai, line):
        for item in ("u1", "u2", "u3"):
            await openai.hears_speech(item)
            await openai.hears_silence(item, item)
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        texts = [(await again.gets("conversation.item.create"))["item"]["content"][0]["text"] for _ in range(2)]
        assert texts == ["u2", "u3"]


async def test_of_an_interrupted_answer_the_next_session_is_told_the_share_that_was_heard_of_all_that_was_made() -> (
    None
):
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        item = await openai.speaks(voice(600, 1))
        await until(lambda: len(twilio.heard_so_far()) > 4000)
        await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        await openai.speaks(voice(1400, 2), item)  # which is dropped
        await openai.transcribes(item, "0123456789")
        await openai.ends("cancelled", reason="turn_detected")
        await until(lambda: line.hooks.facts("model_said"))
        openai.socket.transport.abort()
        again = await line.openai.session()
        told = (await again.gets("conversation.item.create"))["item"]["content"][0]["text"]
        assert told in ("01", "012", "0123"), told  # 250 to 350 ms of 2000


async def test_half_a_character_in_what_was_said_does_not_stop_the_next_session() -> None:
    async with a_call() as (_, openai, line):
        await openai.hears_speech("u1")
        await openai.hears_silence("u1")
        kind = "conversation.item.input_audio_transcription.completed"
        await openai.socket.send(json.dumps({"type": kind, "item_id": "u1", "transcript": "\ud83d"}))
        await openai.caught_up()  # JSON can say it, UTF-8 cannot
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await until(lambda: line.call.ready)


async def test_a_greeting_that_was_never_heard_is_asked_for_again_by_the_next_session() -> None:
    async with a_call(greeting="もしもし") as (_, openai, line):
        openai.socket.transport.abort()
        again = await line.openai.session()
        assert "もしもし" in (await again.gets("response.create"))["response"]["instructions"]


async def test_what_was_heard_of_a_lost_session_is_told_at_once_and_not_at_the_end_of_the_call() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.speaks(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))
        await openai.caught_up()
        openai.socket.transport.abort()
        await until(lambda: line.hooks.facts("model_said"), 2)


async def test_an_answer_that_was_asked_for_and_had_not_begun_is_asked_for_again_by_the_next_session() -> None:
    async with a_call() as (_, openai, line):
        line.openai.answers_creates = False
        line.call.tell_model("何か")
        await openai.gets("conversation.item.create")
        await openai.gets("response.create")
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await again.gets("response.create")


async def test_a_greeting_of_a_session_that_was_lost_before_the_stream_is_heard_from_the_next_one_only() -> None:
    async with a_line() as line:
        twilio = await line.caller().dials()
        openai = await line.openai.session()
        await openai.asked()
        await openai.says(voice(200, 1))
        await openai.socket.close(1011)
        again = await line.openai.session()
        await again.asked()
        await again.says(voice(200, 2))
        await again.caught_up()
        await twilio.opens()
        await until(lambda: len(twilio.heard_so_far()) == 1600 and not twilio.queue)
        assert twilio.sent_to_it() == voice(200, 2)
        await twilio.hangs_up()


async def test_a_greeting_that_was_heard_is_not_asked_for_again_by_the_next_session() -> None:
    async with a_call(greeting="もしもし") as (_, openai, line):
        await openai.says(voice(60), "もしもし")
        await until(lambda: line.hooks.facts("model_said"))
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await again.caught_up()
        assert again.creates == 0


async def test_a_turn_that_the_lost_session_was_about_to_answer_is_answered_by_the_next_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "ANSWER_COMES_S", 9)
    async with a_call() as (_, openai, line):
        await openai.hears_silence(await openai.hears_speech(), "はい")
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await again.gets("response.create", 2)


async def test_what_is_still_playing_of_a_lost_session_can_be_interrupted_and_is_not_truncated_in_the_next() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.speaks(voice(600, 1))
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("response.create")  # half an answer is no answer
        assert twilio.clears == 0, "what is queued goes on playing"
        await again.hears_speech("u1")
        await again.caught_up()
        assert again.truncates() == [] and twilio.clears == 1


async def test_what_the_caller_says_while_the_model_is_being_dialled_again_reaches_the_next_session_once() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.hears_speech("u1")
        await twilio.speaks(voice(400, 1))
        await until(lambda: openai.heard == voice(400, 1))
        opens = line.openai.opens_late()
        openai.socket.transport.abort()
        await until(lambda: not line.call.ready)
        await twilio.speaks(voice(400, 2))
        opens.set()
        again = await line.openai.session()
        await twilio.speaks(voice(400, 3))
        await until(lambda: len(again.heard) >= 8 * 1200)
        assert again.heard == voice(400, 1) + voice(400, 2) + voice(400, 3)  # the whole unfinished sentence
        assert again.types() == ["session.update"]  # it is still the caller's turn


async def test_of_a_caller_who_was_silent_the_next_session_hears_the_last_second_and_nothing_counts_as_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_call() as (twilio, openai, line):
        await twilio.speaks(voice(3000), 100)
        await until(lambda: len(openai.heard) == 24_000)
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: again.heard == voice(3000)[-8000:], 2)
        await twilio.hangs_up()
        await until(lambda: not line.bridge.calls)
    assert "never reached the model" not in caplog.text


async def test_a_turn_that_was_answered_is_not_heard_again_by_the_next_session() -> None:
    async with a_call() as (twilio, openai, line):
        await a_turn(twilio, openai, voice(400, 1), "はい")
        await openai.says(voice(100))
        await twilio.speaks(voice(100, 2))
        await until(lambda: line.hooks.facts("model_said"))
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: again.heard == voice(100, 2))
        assert "response.create" not in again.types()


async def test_the_words_of_one_turn_do_not_make_the_next_session_miss_the_sound_of_the_turn_after_it() -> None:
    async with a_call() as (twilio, openai, line):
        await a_turn(twilio, openai, voice(400, 1))
        await openai.hears_speech("u2")
        await twilio.speaks(voice(400, 2))
        await until(lambda: openai.heard.endswith(voice(400, 2)))
        await openai.hears_silence("u2")
        usage = {"type": "duration", "seconds": 1.0}
        kind = "conversation.item.input_audio_transcription.completed"
        await openai.sends(kind, item_id="u1", content_index=0, transcript="はい", usage=usage)
        await until(lambda: line.hooks.facts("caller_said"))
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: again.heard.endswith(voice(400, 2)))


async def test_a_turn_that_was_answered_but_never_transcribed_is_not_heard_again_either() -> None:
    async with a_call(transcription_model="") as (twilio, openai, line):
        await a_turn(twilio, openai, voice(400, 1))
        await openai.says(voice(60))
        await until(lambda: line.hooks.facts("model_said"))
        await twilio.speaks(voice(60, 2))
        await until(lambda: len(openai.heard) == 460 * 8)
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: again.heard == voice(60, 2), 2)


async def test_a_turn_whose_words_have_come_is_told_to_the_next_session_in_words_only() -> None:
    async with a_call() as (twilio, openai, line):
        await a_turn(twilio, openai, voice(1500, 1), "はい")
        await openai.begins()
        await openai.caught_up()
        await twilio.speaks(voice(500, 2))
        await until(lambda: len(openai.heard) == 2000 * 8)
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await again.gets("response.create")
        await until(lambda: again.heard == voice(500, 2), 2)


async def test_a_turn_whose_words_have_not_come_is_heard_by_the_next_session() -> None:
    async with a_call() as (twilio, openai, line):
        await a_turn(twilio, openai, voice(1500, 1))  # no transcript yet
        await openai.begins()
        await twilio.speaks(voice(100, 2))
        await until(lambda: len(openai.heard) == 1600 * 8)
        await openai.caught_up()
        openai.socket.transport.abort()  # 1011 when an answer begins is the most usual moment
        again = await line.openai.session()
        await until(lambda: again.heard == voice(1500, 1) + voice(100, 2), 2)
        await again.caught_up()
        assert again.types() == ["session.update"], "it hears the turn end, and answers by itself"


async def test_words_that_come_late_for_a_long_turn_do_not_cost_what_the_caller_said_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "HELD_MS", 1000)
    async with a_call() as (twilio, openai, line):
        await a_turn(twilio, openai, voice(1000, 1))
        await openai.caught_up()
        await twilio.speaks(voice(400, 2))
        await until(lambda: len(openai.heard) == 1400 * 8)
        kind = "conversation.item.input_audio_transcription.completed"
        await openai.sends(kind, item_id="u1", content_index=0, transcript="はい")
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: again.heard == voice(400, 2), 2)


async def test_a_caller_who_was_speaking_when_the_session_was_lost_is_not_talked_over_by_the_next() -> None:
    async with a_call() as (_, openai, line):
        await openai.hears_speech("u1")
        await openai.hears_silence("u1", "はい")
        await openai.hears_speech("u2")
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("conversation.item.create")
        await again.caught_up()
        assert again.creates == 0


async def test_a_caller_who_was_speaking_when_the_session_was_lost_does_not_count_as_speaking_in_the_next() -> None:
    async with a_call() as (_, openai, line):
        await openai.hears_speech("u1")
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: line.call.ready)
        line.call.tell_model("何か")
        await again.gets("conversation.item.create")
        await again.gets("response.create")


async def test_a_session_that_is_lost_within_10_s_of_the_one_before_it_ends_in_an_apology() -> None:
    async with a_call() as (twilio, openai, line):
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.says(voice(300))
        await again.caught_up()
        again.socket.transport.abort()
        await hears_an_apology(line, twilio)
        assert twilio.heard_so_far() == voice(300), "what was queued is heard out"


async def test_a_session_that_is_lost_long_after_the_one_before_it_is_dialled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert bridge.Call.LOST_AGAIN_S == 10
    monkeypatch.setattr(bridge.Call, "LOST_AGAIN_S", 0.1)
    async with a_call() as (_, openai, line):
        for _ in range(2):
            openai.socket.transport.abort()
            openai = await line.openai.session()
            await asyncio.sleep(0.15)


# ── 5 Listen ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_callers_voice_reaches_the_model_unchanged() -> None:
    async with a_call() as (twilio, openai, _):
        await twilio.speaks(voice(500, 1), 20)
        await twilio.speaks(voice(503, 2), 37)  # Twilio does not promise frames of 20 ms
        await until(lambda: len(openai.heard) >= 8 * 1003)
        assert openai.heard == voice(500, 1) + voice(503, 2)


async def test_what_the_caller_says_while_the_session_is_being_set_up_is_kept() -> None:
    async with a_line(greeting="") as line:
        opens = line.openai.opens_late()
        twilio = await line.caller().calls()
        await twilio.speaks(voice(1000, 3))
        await asyncio.sleep(0.1)
        opens.set()
        openai = await line.openai.session()
        await twilio.speaks(voice(200, 4))
        await until(lambda: len(openai.heard) >= 8 * 1200)
        assert openai.heard == voice(1000, 3) + voice(200, 4)
        await twilio.hangs_up()


async def test_more_than_30_s_without_a_session_drop_the_oldest_and_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_line(greeting="") as line:
        opens = line.openai.opens_late()
        twilio = await line.caller().calls()
        await twilio.speaks(voice(31_000, 5), 100)
        await asyncio.sleep(0.2)
        opens.set()
        openai = await line.openai.session()
        await until(lambda: len(openai.heard) >= 8 * 30_000)
        assert openai.heard == voice(31_000, 5)[8 * 1000 :]
        await twilio.hangs_up()
    assert "1000 ms of the caller's audio never reached the model" in caplog.text


async def test_a_jump_of_the_timestamps_is_filled_with_silence() -> None:
    async with a_call() as (twilio, openai, _):
        await twilio.speaks(voice(100, 1))
        twilio.timestamp_ms += 1300
        await twilio.speaks(voice(100, 2))
        await until(lambda: len(openai.heard) >= 8 * 1500)
        assert openai.heard == voice(100, 1) + b"\xff" * 8 * 1300 + voice(100, 2)


async def test_each_hole_is_filled_and_a_long_one_is_cut_to_30_s() -> None:
    async with a_call() as (twilio, openai, _):
        twilio.timestamp_ms = 100_000
        await twilio.speaks(voice(20, 2))
        twilio.timestamp_ms += 100
        await twilio.speaks(voice(20, 3))
        twilio.timestamp_ms += 45_000
        await twilio.speaks(voice(20, 4))
        heard = voice(20, 2) + b"\xff" * 800 + voice(20, 3) + b"\xff" * 240_000 + voice(20, 4)
        await until(lambda: len(openai.heard) >= len(heard))
        assert openai.heard == heard


async def test_when_frames_stop_while_the_caller_speaks_silence_lets_the_turn_end() -> None:
    async with a_call() as (twilio, openai, _):
        await twilio.speaks(voice(100, 1))
        await openai.hears_speech("u1")
        await until(lambda: len(openai.heard) >= 8 * (100 + 700), 2)
        await openai.hears_silence("u1")
        await openai.caught_up()
        length = len(openai.heard)
        await asyncio.sleep(0.9)
        assert len(openai.heard) == length, "silence only while the caller is speaking"
        assert set(openai.heard[800:]) == {0xFF}


async def test_a_turn_that_ended_in_a_hole_is_answered_with_its_tools(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "NO_FRAMES_S", 0.1003)
    async with a_call() as (twilio, openai, line):
        line.hooks.results = lambda *_: asyncio.sleep(0, "done")
        await twilio.speaks(voice(20))
        await openai.hears_speech("u1")
        await until(lambda: len(openai.heard) > 8 * 250)
        await openai.hears_silence("u1")
        await openai.calls_tools(a_function_call("a"))
        assert (await openai.gets("conversation.item.create"))["item"]["output"] == "done"


async def test_frames_that_come_late_in_a_burst_are_not_filled_a_second_time() -> None:
    async with a_call() as (twilio, openai, _):
        await twilio.speaks(voice(100, 1))
        await openai.hears_speech("u1")
        await until(lambda: len(openai.heard) > 800, 2)
        silence = len(openai.heard) - 800
        await openai.hears_silence("u1")
        await twilio.speaks(voice(700, 2))  # all that was missing, with continuous timestamps
        twilio.timestamp_ms += 100  # a real hole, but the model's ears are ahead by more than that
        await twilio.speaks(voice(100, 3))
        await until(lambda: len(openai.heard) >= 900 * 8 + silence)
        await openai.caught_up()
        assert openai.heard == voice(100, 1) + b"\xff" * silence + voice(700, 2) + voice(100, 3)


async def test_keys_reach_the_hooks() -> None:
    async with a_call() as (twilio, _, line):
        for key in "1*#":
            await twilio.presses(key)
        await until(lambda: [facts["key"] for facts in line.hooks.facts("key_pressed")] == ["1", "*", "#"])


# ── 6 Speak ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_models_voice_reaches_the_caller_unchanged() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.begins()
        await openai.speaks(voice(333, 1), delta_ms=111)
        await openai.speaks(voice(251, 2), delta_ms=1000, name="audio")  # the beta's name of the delta
        await openai.ends()
        await until(lambda: twilio.heard_so_far() == voice(333, 1) + voice(251, 2))


async def test_most_errors_of_openais_are_told_to_the_hooks_and_the_call_goes_on() -> None:
    async with a_call() as (twilio, openai, line):
        for code in ("response_cancel_not_active", "invalid_value", "conversation_already_has_active_response", None):
            await openai.sends("error", error={"type": "x", "code": code, "message": "something", "event_id": None})
        await openai.begins()
        await openai.ends("incomplete", reason="max_output_tokens")
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
        assert all("the call goes on" in facts["error"] for facts in line.hooks.facts("model_failed"))
        assert len(line.hooks.facts("model_failed")) == 5


# ── 7 Playback and barge-in ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_mark_follows_each_piece_of_at_most_200_ms_of_the_models_voice() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(1000))
        await until(lambda: len(twilio.sent_to_it()) == 8000)
        await openai.caught_up()
        events = [message["event"] for message in twilio.received]
        assert events == ["media", "mark"] * (len(events) // 2)
        sizes = [len(base64.b64decode(m["media"]["payload"])) for m in twilio.received if m["event"] == "media"]
        assert max(sizes) <= 1600
        names = [m["mark"]["name"] for m in twilio.received if m["event"] == "mark"]
        assert len(set(names)) == len(names)


async def test_barge_in_clears_the_playback_and_truncates_at_what_was_heard() -> None:
    async with a_call() as (twilio, openai, line):
        item = await openai.says(voice(2000), "長い返事です。")
        await until(lambda: len(twilio.heard_so_far()) > 5000)
        await openai.hears_speech()
        truncate = await openai.gets("conversation.item.truncate")
        heard_ms = len(twilio.heard_so_far()) / 8
        assert truncate["item_id"] == item and truncate["content_index"] == 0
        assert abs(truncate["audio_end_ms"] - heard_ms) < TOLERANCE_MS
        await openai.caught_up()
        assert twilio.clears == 1 and openai.types() == ["session.update", "conversation.item.truncate"]
        (interrupted,) = line.hooks.facts("model_interrupted")
        assert interrupted == {"heard_ms": truncate["audio_end_ms"], "sent_ms": 2000}
        assert line.hooks.facts("model_said") == [{"text": "長い返事です。", "heard_ms": truncate["audio_end_ms"]}]


async def test_between_two_marks_the_clock_tells_what_was_heard() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(1000))
        await until(lambda: len(twilio.heard_so_far()) > 600)
        await openai.hears_speech()
        truncate = await openai.gets("conversation.item.truncate")
        assert abs(truncate["audio_end_ms"] - len(twilio.heard_so_far()) / 8) < TOLERANCE_MS


async def test_the_clock_never_tells_more_than_the_next_mark_will() -> None:
    async with a_call() as (twilio, openai, _):
        twilio.returns_mark = lambda name: None  # type: ignore[method-assign] # Twilio has not begun to play
        await openai.says(voice(2000))
        await until(lambda: twilio.marks)
        await asyncio.sleep(0.3)
        await openai.hears_speech()
        assert (await openai.gets("conversation.item.truncate"))["audio_end_ms"] == 198


async def test_of_several_items_each_is_truncated_at_what_was_heard_of_it() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        first = await openai.speaks(voice(300, 1))
        second = await openai.speaks(voice(600, 2))
        third = await openai.speaks(voice(500, 3))
        await openai.ends()
        await until(lambda: len(twilio.heard_so_far()) > 500 * 8)
        await openai.hears_speech()
        await openai.caught_up()
        (interrupted,) = line.hooks.facts("model_interrupted")
        assert interrupted["sent_ms"] == 1100, "from the beginning of the item that is being heard"
        (at_second, at_third) = openai.truncates()
        assert at_second[0] == second and abs(at_second[1] - (len(twilio.heard_so_far()) / 8 - 300)) < TOLERANCE_MS
        assert at_third == (third, 0)
        assert first not in dict(openai.truncates())


async def test_a_caller_who_begins_twice_clears_and_truncates_once() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(1000))
        await until(lambda: len(twilio.heard_so_far()) > 400)
        await openai.hears_speech()
        await openai.hears_speech()
        await openai.caught_up()
        assert twilio.clears == 1 and len(openai.truncates()) == 1


async def test_when_nothing_is_playing_a_caller_who_speaks_interrupts_nothing() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(200), "短い返事")
        await until(lambda: line.hooks.facts("model_said") == [{"text": "短い返事", "heard_ms": None}])
        before = len(twilio.received)
        await openai.hears_speech()
        await openai.caught_up()
        assert len(twilio.received) == before and openai.types() == ["session.update"]
        assert not line.hooks.facts("model_interrupted")


async def test_an_answer_that_was_heard_to_its_end_and_whose_last_mark_is_late_is_not_interrupted() -> None:
    async with a_call() as (twilio, openai, line):
        twilio.returns_mark = lambda name: None  # type: ignore[method-assign]
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
        await asyncio.sleep(0.05)
        await openai.hears_speech()
        await until(lambda: line.hooks.facts("model_said"), 2)
        assert line.hooks.facts("model_said")[0]["heard_ms"] is None
        assert not line.hooks.facts("model_interrupted") and openai.truncates() == []


async def test_what_the_model_said_is_told_when_it_has_been_heard_and_not_when_its_answer_has_ended() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        item = await openai.speaks(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))
        await openai.caught_up()
        message = {"id": item, "type": "message", "role": "assistant", "status": "completed"}
        await openai.sends("response.output_item.done", response_id=openai.response, item=message)
        await until(lambda: line.hooks.facts("model_said"), 2)


async def test_what_still_comes_of_an_interrupted_answer_is_dropped() -> None:
    async with a_call() as (twilio, openai, line):
        response = await openai.begins()
        item = await openai.speaks(voice(600, 1))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        await openai.speaks(voice(600, 2), item)
        late = await openai.speaks(voice(600, 3))
        await openai.ends("cancelled", reason="turn_detected")
        await openai.hears_silence("u1")
        assert openai.response != response
        await openai.says(voice(200, 4))
        await until(lambda: twilio.heard_so_far().endswith(voice(200, 4)))
        assert len(twilio.sent_to_it()) == 8 * 800
        assert [item_id for item_id, _ in openai.truncates()] == [item, late]
        assert dict(openai.truncates())[late] == 0
        await until(lambda: line.hooks.facts("model_said")[-1]["heard_ms"] is None)


async def test_an_item_heard_to_its_end_of_which_more_comes_after_a_barge_in_is_truncated_at_what_was_heard() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.begins()
        first = await openai.speaks(voice(100, 1))
        await openai.speaks(voice(400, 2))
        await until(lambda: len(twilio.heard_so_far()) > 1600)
        await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        await openai.speaks(voice(100, 3), first)
        await openai.caught_up()
        assert dict(openai.truncates())[first] == 100


async def test_an_answer_that_has_not_sounded_yet_is_dropped_and_the_one_before_it_is_not_truncated() -> None:
    async with a_call() as (twilio, openai, _):
        before = await openai.says(voice(200, 1))
        await until(lambda: twilio.heard_so_far() == voice(200, 1))
        await openai.caught_up()
        await openai.begins()
        await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        await openai.speaks(voice(200, 2))
        await openai.ends("cancelled", reason="turn_detected")
        await openai.caught_up()
        assert twilio.sent_to_it() == voice(200, 1) and twilio.clears == 0
        assert before not in dict(openai.truncates())


async def test_words_that_come_before_their_sound_belong_to_what_the_model_said() -> None:
    async with a_call() as (twilio, openai, line):
        response = await openai.begins()
        at = {"response_id": response, "item_id": "i", "output_index": 0, "content_index": 0}
        await openai.sends("response.output_audio_transcript.delta", **at, delta="こんに")
        await openai.sends("response.output_audio_transcript.delta", **at, delta="ちは、")
        await openai.speaks(voice(1000), "i")
        await openai.sends("response.output_audio_transcript.delta", **at, delta="鈴木です")
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await openai.hears_speech()
        await until(lambda: line.hooks.facts("model_said"))
        assert line.hooks.facts("model_said")[0]["text"] == "こんにちは、鈴木です"


async def test_the_next_answer_plays_from_its_first_byte_and_is_measured_from_there() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(2000, 1))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        item = await openai.hears_speech()
        await openai.hears_silence(item)
        await until(lambda: twilio.clears)
        before = len(twilio.heard_so_far())
        second = await openai.says(voice(2000, 2))
        await until(lambda: len(twilio.heard_so_far()) > before + 2400)
        await openai.hears_speech()
        await openai.caught_up()
        truncated, at_ms = openai.truncates()[1]
        assert truncated == second and abs(at_ms - (len(twilio.heard_so_far()) - before) / 8) < TOLERANCE_MS
        assert twilio.heard[before:] == voice(2000, 2)[: len(twilio.heard) - before]


async def test_the_beginning_of_an_answer_after_a_barge_in_is_measured_by_the_clock() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(2000, 1))
        await until(lambda: len(twilio.heard_so_far()) > 400)
        await openai.hears_silence(await openai.hears_speech())
        await until(lambda: twilio.clears)
        before = len(twilio.heard_so_far())
        second = await openai.says(voice(1000, 2))
        await until(lambda: len(twilio.heard_so_far()) > before + 960)
        await openai.hears_speech()
        await openai.caught_up()
        assert openai.truncates()[1][0] == second and openai.truncates()[1][1] > 60


async def test_marks_that_clear_returns_are_not_taken_for_speech_that_was_heard() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(2000, 1), "一つ目")
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await openai.hears_speech()
        await until(lambda: not twilio.marks)
        await openai.hears_silence("u")
        item = await openai.says(voice(1000, 2))
        await openai.caught_up()
        await openai.hears_speech()
        await openai.caught_up()
        assert openai.truncates()[1][0] == item and openai.truncates()[1][1] < 200
        assert line.hooks.facts("model_said")[0]["heard_ms"] < 300


async def test_where_openai_interrupts_by_itself_the_bridge_sends_no_cancel() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.begins()
        await openai.speaks(voice(1000))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await openai.hears_speech()
        await openai.caught_up()
        assert "response.cancel" not in openai.types()


async def test_a_server_that_does_not_say_whether_it_interrupts_does() -> None:
    async with a_line(greeting="") as line:

        async def is_terse(session: PretendSession) -> None:
            sends = session.sends

            async def tersely(kind: str, **content: Any) -> None:
                await sends(kind, **({"session": {}} if kind == "session.updated" else content))

            session.sends = tersely  # type: ignore[method-assign]
            await session.run()

        line.openai.on_dial = is_terse
        twilio = await line.caller().calls()
        openai = await line.openai.session()
        await until(lambda: line.hooks.calls, why="the call to start")
        await openai.begins()
        await openai.hears_speech()
        await openai.caught_up()
        assert "response.cancel" not in openai.types()
        await twilio.hangs_up()


NO_INTERRUPT = {"audio": {"input": {"turn_detection": {"interrupt_response": False}}}}


async def test_where_openai_does_not_interrupt_the_bridge_cancels_once_and_by_id() -> None:
    async with a_call(session=NO_INTERRUPT) as (twilio, openai, _):
        response = await openai.begins()
        await openai.speaks(voice(1000))
        await until(lambda: len(twilio.heard_so_far()) > 800)
        await openai.hears_speech("u1")
        assert await openai.gets("response.cancel") == {"type": "response.cancel", "response_id": response}
        await openai.hears_silence("u1")
        await openai.says(voice(400, 2))  # complete: there is nothing to cancel in what still plays
        await until(lambda: len(twilio.marks) > 0)
        await openai.hears_speech("u2")
        await openai.caught_up()
        assert openai.types().count("response.cancel") == 1 and twilio.clears == 2


async def test_a_caller_who_begins_twice_before_the_answer_has_ended_causes_one_cancel() -> None:
    async with a_call(session=NO_INTERRUPT) as (_, openai, _):
        await openai.begins()
        await openai.speaks(voice(400))
        for item in ("u1", "u2"):
            await openai.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id=item)
        await openai.caught_up()
        assert openai.types().count("response.cancel") == 1


# ── 8 Answering: who asks the model to speak, and when ──────────────────────────────────────────────────────────


async def test_what_a_hook_tells_the_model_is_answered_once_the_answer_in_progress_has_ended() -> None:
    async with a_call() as (_, openai, line):
        await openai.begins()
        await openai.caught_up()
        line.call.tell_model("ボタン1が押されました。")
        item = (await openai.gets("conversation.item.create"))["item"]
        assert item["role"] == "system" and item["content"][0]["text"] == "ボタン1が押されました。"
        await openai.caught_up()
        assert openai.creates == 0
        await openai.ends()
        await openai.gets("response.create")


async def test_what_a_hook_tells_before_the_callers_turn_ends_is_left_to_the_answer_to_that_turn() -> None:
    async with a_call() as (_, openai, line):
        item = await openai.hears_speech()
        await openai.caught_up()
        line.call.tell_model("何か")
        await openai.gets("conversation.item.create")
        await openai.hears_silence(item)
        await openai.says(voice(20))
        await asyncio.sleep(1.1)
        assert openai.creates == 0, "that answer has seen it"


async def test_what_a_hook_tells_right_after_the_callers_turn_is_answered_after_the_answer_to_that_turn() -> None:
    async with a_call() as (_, openai, line):
        item = await openai.hears_speech()
        await openai.hears_silence(item)
        await openai.caught_up()
        line.call.tell_model("何か")
        await openai.gets("conversation.item.create")
        await openai.caught_up()
        assert line.call.busy and openai.creates == 0, (
            "OpenAI is about to begin an answer: an ask would collide with it"
        )
        await openai.says(voice(20))
        await openai.gets("response.create")


async def test_a_text_that_a_hook_tells_after_an_answer_was_asked_for_is_answered_by_one_more() -> None:
    async with a_call() as (_, openai, line):
        for text in ("一", "二", "三"):
            line.call.tell_model(text)
        await until(lambda: openai.creates)
        await openai.says(voice(20))
        await until(lambda: openai.creates == 2)
        await openai.says(voice(20))
        await openai.caught_up()
        assert openai.creates == 2


async def test_what_a_hook_tells_while_an_answer_is_asked_for_is_answered_after_it_also_when_a_turn_came_between() -> (
    None
):
    async with a_call() as (_, openai, line):
        line.openai.answers_creates = False
        for text in ("一", "二"):
            line.call.tell_model(text)
        await until(lambda: openai.creates)
        await openai.hears_silence(await openai.hears_speech())
        await openai.begins()  # what was asked for before the second text
        await openai.ends()
        await until(lambda: openai.creates == 2, 2)


async def test_what_a_hook_tells_as_openai_begins_an_answer_by_itself_is_answered_after_that_one() -> None:
    async with a_call() as (_, openai, line):
        line.openai.expected_errors.add("conversation_already_has_active_response")
        line.call.tell_model("何か")
        await openai.begins()
        await openai.gets("conversation.item.create")
        await openai.gets("response.create")
        await openai.says(voice(20))
        assert await openai.gets("response.create") == {"type": "response.create"}
        await openai.says(voice(20))
        await openai.caught_up()
        assert openai.creates == 2


async def test_a_greeting_gives_way_to_an_answer_that_openai_begins_at_the_same_moment() -> None:
    async with a_line(greeting="もしもし") as line:
        line.openai.expected_errors.add("conversation_already_has_active_response")

        async def begins_at_once(session: PretendSession) -> None:
            updates = session.updates

            async def updated(config: dict[str, Any]) -> None:
                await updates(config)
                await session.begins()

            session.updates = updated  # type: ignore[method-assign]
            await session.run()

        line.openai.on_dial = begins_at_once
        await line.caller().calls()
        openai = await line.openai.session()
        await openai.gets("response.create")
        await openai.says(voice(20))
        await openai.caught_up()
        assert openai.creates == 1


async def test_a_greeting_that_is_refused_before_the_answer_in_its_place_begins_gives_way_to_it_just_the_same() -> None:
    async with a_line(greeting="もしもし") as line:
        line.openai.answers_creates = False
        line.openai.expected_errors.add("conversation_already_has_active_response")
        await line.caller().calls()
        openai = await line.openai.session()
        await openai.gets("response.create")
        await openai.refuses("conversation_already_has_active_response", "… in progress")
        await openai.says(voice(20))
        await openai.caught_up()
        assert openai.creates == 1


async def test_an_error_that_does_not_say_which_ask_it_refuses_refuses_the_one_that_is_out_and_else_none() -> None:
    async with a_call() as (_, openai, line):
        line.openai.answers_creates = False
        error = {"code": "conversation_already_has_active_response", "message": "", "event_id": None}
        await openai.sends("error", error=error)
        await openai.caught_up()
        assert openai.creates == 0
        line.call.tell_model("何か")
        await until(lambda: openai.creates == 1)
        await openai.sends("error", error=error)
        await until(lambda: openai.creates == 2, 2)


async def test_an_answer_that_took_the_greetings_place_and_fails_is_asked_for_again_and_not_the_greeting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.2))
    async with a_line(greeting="もしもし") as line:
        line.openai.answers_creates = False
        line.openai.expected_errors.add("conversation_already_has_active_response")
        await line.caller().calls()
        openai = await line.openai.session()
        await openai.gets("response.create")
        await openai.begins()
        await openai.refuses("conversation_already_has_active_response", "… in progress")
        await openai.fails()
        assert await openai.gets("response.create") == {"type": "response.create"}


async def test_what_a_hook_told_while_the_model_was_being_dialled_again_is_answered_by_the_next_session() -> None:
    async with a_call() as (_, openai, line):
        opens = line.openai.opens_late()
        openai.socket.transport.abort()
        await until(lambda: not line.call.ready)
        texts = ["鍵が押された", "もう一度押された"]
        for text in texts:
            line.call.tell_model(text)
        await asyncio.sleep(0)
        opens.set()
        again = await line.openai.session()
        items = [(await again.gets("conversation.item.create"))["item"] for _ in texts]
        assert [item["content"][0]["text"] for item in items] == texts
        await again.gets("response.create")


async def test_an_answer_that_begins_while_the_caller_is_speaking_is_cancelled_and_never_heard() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.hears_speech()
        response = await openai.begins()
        await openai.speaks(voice(100))  # before the cancel has come to it
        assert await openai.gets("response.cancel") == {"type": "response.cancel", "response_id": response}
        await openai.caught_up()
        assert twilio.received == []


async def test_a_refusal_that_comes_before_the_answer_it_names_is_not_answered_with_a_storm_of_asks() -> None:
    async with a_call() as (_, openai, line):
        line.openai.expected_errors.add("conversation_already_has_active_response")
        line.call.tell_model("何か")
        openai.response = "resp_own"  # begun, and its response.created comes a moment after the error
        await until(lambda: openai.creates)
        await asyncio.sleep(0.1)
        await openai.begins("resp_own")
        await openai.ends()
        await until(lambda: openai.response)
        assert openai.creates == 2


async def test_what_a_hook_tells_is_asked_for_again_when_it_was_refused_in_any_way_while_openai_answered() -> None:
    async with a_call() as (_, openai, line):
        line.openai.answers_creates = False
        line.call.tell_model("何か")
        await until(lambda: openai.creates)
        await openai.begins()  # by itself
        error = {"type": "x", "code": "rate_limit_exceeded", "message": "slow down", "event_id": "ask"}
        await openai.sends("error", error=error)
        await openai.ends()
        await until(lambda: openai.creates == 2)


# ── 8 Answering: tools ──────────────────────────────────────────────────────────────────────────────────────────


async def test_without_hooks_a_model_that_calls_a_tool_is_told_that_there_is_none() -> None:
    assert "no tool named a" in await bridge.NoHooks().run_tool(None, "a", "{}")  # type: ignore[arg-type]
    assert {"emit", "listens", "run_tool", "close"} <= set(vars(bridge.NoHooks)), "all that a call asks of hooks"


async def test_several_tools_run_side_by_side_and_then_the_model_is_asked_once() -> None:
    async with a_call() as (_, openai, line):
        both = asyncio.Barrier(2)

        async def results(call: Any, name: str, arguments: str) -> str:
            await both.wait()
            return f"{name} {arguments} for {call.sid}"

        line.hooks.results = results
        await openai.begins()
        one, other = a_function_call("a", '{"x":1}', "c1"), a_function_call("b", "{}", "c2")
        await openai.calls_tools(one, other)
        outputs = [(await openai.gets("conversation.item.create"))["item"] for _ in range(2)]
        assert {(item["type"], item["call_id"]) for item in outputs} == {
            ("function_call_output", "c1"),
            ("function_call_output", "c2"),
        }
        assert sorted(item["output"] for item in outputs)[0] == f'a {{"x":1}} for {line.call.sid}'
        assert await openai.gets("response.create") == {"type": "response.create"}
        await openai.says(voice(20))
        await openai.caught_up()
        assert openai.creates == 1
        assert line.hooks.events().count("model_asked") == 1
        used = {facts["name"]: facts for facts in line.hooks.facts("tool_used")}
        assert set(used) == {"a", "b"} and 0 <= used["a"]["seconds"] < 1
        assert (used["a"]["arguments"], used["a"]["result"]) == ('{"x":1}', f'a {{"x":1}} for {line.call.sid}')


async def test_a_tool_holds_up_neither_audio_nor_barge_in() -> None:
    async with a_call() as (twilio, openai, line):
        done = line.hooks.tool_waits()
        await openai.begins()
        await openai.speaks(voice(1000))
        await openai.calls_tools(a_function_call("slow"))
        await twilio.speaks(voice(100))
        await until(lambda: openai.heard == voice(100))
        await openai.hears_speech("u1")
        await openai.gets("conversation.item.truncate")
        done.set()
        await openai.gets("conversation.item.create")
        await openai.caught_up()
        assert openai.creates == 0, "the caller is in the middle of a sentence"
        await openai.hears_silence("u1")
        await openai.gets("response.create")


async def test_tools_of_a_cancelled_answer_and_incomplete_calls_are_never_run() -> None:
    async with a_call() as (_, openai, line):
        line.hooks.results = lambda *_: asyncio.sleep(0, "done")
        await openai.calls_tools(a_function_call("a"), status="cancelled")
        await openai.calls_tools(a_function_call("a", '{"x', status="incomplete"))
        await openai.caught_up()
        assert openai.types() == ["session.update"] and not line.hooks.facts("tool_used")


async def test_what_a_tool_found_while_the_model_was_being_dialled_again_is_told_to_the_next_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_call() as (_, openai, line):
        done = line.hooks.tool_waits("25度")
        await openai.calls_tools(a_function_call("weather"))
        await openai.caught_up()
        dials = asyncio.Event()

        async def late(*arguments: Any, **options: Any) -> Any:
            await dials.wait()
            return await bridge_connect(*arguments, **options)

        bridge_connect = bridge.connect
        monkeypatch.setattr(bridge, "connect", late)
        openai.socket.transport.abort()
        await until(lambda: not line.call.ready)
        done.set()
        await until(lambda: line.hooks.facts("tool_used"))
        dials.set()
        again = await line.openai.session()
        item = (await again.gets("conversation.item.create"))["item"]
        assert item["role"] == "system" and "25度" in item["content"][0]["text"]
        await again.gets("response.create")


async def test_what_a_tool_found_after_the_model_was_dialled_again_is_told_to_that_session_in_words() -> None:
    async with a_call() as (_, openai, line):
        done = line.hooks.tool_waits("25度")
        await openai.calls_tools(a_function_call("weather"))
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await until(lambda: line.call.ready)
        done.set()
        item = (await again.gets("conversation.item.create"))["item"]
        assert item["role"] == "system" and "25度" in item["content"][0]["text"]


async def test_a_tool_that_a_lost_answer_wanted_is_not_run_for_the_next_session() -> None:
    async with a_call() as (_, openai, line):
        await openai.begins()
        line.hooks.results = lambda *_: asyncio.sleep(0, "paid")
        await openai.sends("response.output_item.done", response_id="r", item=a_function_call("pay"))
        await openai.caught_up()
        openai.socket.transport.abort()
        again = await line.openai.session()
        await again.gets("response.create")
        await again.says(voice(20))
        await again.caught_up()
        assert not line.hooks.facts("tool_used") and "conversation.item.create" not in again.types()[2:]


# ── 8 Answering: when an answer fails ───────────────────────────────────────────────────────────────────────────


async def test_a_greeting_that_fails_twice_is_asked_for_again_in_the_same_words_and_spoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.2))
    async with a_call(greeting="もしもし") as (twilio, openai, _):
        for _ in range(2):
            await openai.fails()
            assert "もしもし" in (await openai.gets("response.create"))["response"]["instructions"]
            await until(lambda: openai.response)
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))


async def test_an_answer_that_openai_refuses_to_begin_counts_as_one_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.2))
    async with a_line(greeting="もしもし") as line:

        async def refuses(session: PretendSession) -> None:
            takes = session.takes

            async def taken(text: Any) -> None:
                event = json.loads(text)
                if event["type"] != "response.create":
                    return await takes(text)
                session.creates += "もしもし" in text
                error = {"type": "server_error", "code": "server_error", "message": "", "event_id": event["event_id"]}
                return await session.sends("error", error=error)

            session.takes = taken  # type: ignore[method-assign]
            await session.run()

        line.openai.on_dial = refuses
        twilio = await line.caller().calls()
        await hears_an_apology(line, twilio)
        assert line.openai.sessions[0].creates == 3


async def test_an_answer_that_fails_is_asked_for_again_twice_and_then_ends_in_an_apology(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.2))
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        for _ in range(2):
            await openai.fails()
            assert await openai.gets("response.create") == {"type": "response.create"}
            await until(lambda: openai.response)
        await openai.fails()
        await hears_an_apology(line, twilio)
        told = [facts["error"].rpartition(": ")[2] for facts in line.hooks.facts("model_failed")]
        assert told == ["asking again in 0.1 s", "asking again in 0.2 s", "the caller hears an apology"]


async def test_an_answer_of_openais_own_that_fails_after_the_greeting_is_asked_for_again_and_not_the_greeting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.2))
    async with a_call(greeting="もしもし") as (_, openai, _):
        await openai.says(voice(20))
        await openai.begins()
        await openai.fails()
        assert await openai.gets("response.create") == {"type": "response.create"}


async def test_only_failures_in_a_row_lead_to_the_apology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.02, 0.02))
    async with a_call() as (twilio, openai, _):
        for _ in range(4):
            await openai.begins()
            await openai.fails()
            await openai.gets("response.create")
            await until(lambda: openai.response)
            await openai.says(voice(20))
        await openai.caught_up()
        assert not twilio.socket.close_code


async def test_a_failed_answer_that_the_caller_overtakes_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.1, 0.1))
    async with a_call() as (_, openai, _):
        await openai.begins()
        await openai.fails()
        await openai.hears_silence(await openai.hears_speech())
        await openai.says(voice(20))
        await asyncio.sleep(0.2)
        assert openai.creates == 0


async def test_hanging_up_waits_for_an_answer_that_failed_and_is_to_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "RETRY_PAUSES_S", (0.2, 0.2))
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.fails()
        await openai.caught_up()
        line.call.hang_up()
        await openai.gets("response.create")
        await openai.says(voice(100))
        await twilio.next()
        assert twilio.heard_so_far() == voice(100)


async def test_a_quota_that_is_used_up_in_the_middle_of_a_call_ends_in_an_apology() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.fails("insufficient_quota")
        await hears_an_apology(line, twilio)


# ── 9 The end ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_hanging_up_waits_until_the_goodbye_has_been_heard(caplog: pytest.LogCaptureFixture) -> None:
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.speaks(voice(500))
        await openai.caught_up()
        line.call.hang_up()
        await openai.speaks(voice(300, 2))
        await openai.ends()
        assert "<Hangup/>" in await twilio.next()
        assert twilio.heard_so_far() == voice(500) + voice(300, 2)
        assert line.hooks.facts("call_ended") == [{"reason": "hung up"}]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_hanging_up_waits_for_an_answer_that_has_not_sounded_yet_and_not_longer() -> None:
    for words in (voice(100), b""):
        async with a_call() as (twilio, openai, line):
            await openai.begins()
            await openai.caught_up()
            line.call.hang_up()
            await openai.speaks(words)
            await openai.ends()
            assert "<Hangup/>" in await twilio.next()
            assert twilio.heard_so_far() == words


async def test_hanging_up_waits_for_the_answer_to_the_callers_turn_as_long_as_it_may_take_to_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "ANSWER_COMES_S", 0.3)
    for words in (voice(100), b""):
        async with a_call() as (twilio, openai, line):
            await openai.hears_silence(await openai.hears_speech())
            await openai.caught_up()
            line.call.hang_up()
            await asyncio.sleep(0.05)
            if words:
                await openai.says(words)
            assert "<Hangup/>" in await twilio.next()
            assert twilio.heard_so_far() == words


async def test_hanging_up_waits_for_an_answer_that_is_wanted_of_a_model_that_is_being_dialled_again() -> None:
    async with a_call() as (twilio, openai, line):
        opens = line.openai.opens_late()
        openai.socket.transport.abort()
        await until(lambda: not line.call.ready)
        line.call.tell_model("何か")
        line.call.hang_up()
        await asyncio.sleep(0.05)
        opens.set()
        again = await line.openai.session()
        await again.says(voice(100))
        await twilio.next()
        assert twilio.heard_so_far() == voice(100)


async def test_hanging_up_waits_for_a_tool_that_is_running() -> None:
    async with a_call() as (twilio, openai, line):
        done = line.hooks.tool_waits()
        await openai.calls_tools(a_function_call("slow"))
        await openai.caught_up()
        line.call.hang_up()
        await asyncio.sleep(0.05)
        assert not twilio.socket.close_code
        done.set()
        await openai.gets("conversation.item.create")


async def test_a_model_that_hangs_up_without_a_word_is_asked_for_a_goodbye() -> None:
    async with a_call() as (twilio, openai, line):

        async def results(call: Any, *_: Any) -> str:
            call.hang_up()
            return "ok"

        line.hooks.results = results
        await openai.calls_tools(a_function_call("hang_up"))
        await openai.gets("conversation.item.create")
        await openai.gets("response.create")
        await openai.says(voice(100))
        assert "<Hangup/>" in await twilio.next()
        assert twilio.heard_so_far() == voice(100)


async def test_a_goodbye_that_was_spoken_before_the_tool_hung_up_is_not_asked_for_again() -> None:
    async with a_call() as (twilio, openai, line):

        async def results(call: Any, *_: Any) -> str:
            await until(lambda: not call.marks)
            call.hang_up()
            await asyncio.sleep(0.05)
            return "ok"

        line.hooks.results = results
        await openai.begins()
        await openai.speaks(voice(100))
        await openai.calls_tools(a_function_call("hang_up"))
        await asyncio.wait_for(twilio.socket.wait_closed(), 2)
        assert openai.creates == 0


async def test_a_model_that_hangs_up_without_a_word_is_asked_for_a_goodbye_whatever_was_said_while_its_tool_ran() -> (
    None
):
    async with a_call() as (_, openai, line):
        done = asyncio.Event()

        async def results(call: Any, *_: Any) -> str:
            await done.wait()
            call.hang_up()
            return str(await asyncio.sleep(0.05, "ok"))

        line.hooks.results = results
        await openai.calls_tools(a_function_call("hang_up"))
        await openai.hears_silence(await openai.hears_speech())
        await openai.says(voice(20))
        await until(lambda: line.hooks.facts("model_said"))
        done.set()
        await openai.gets("conversation.item.create")
        await openai.gets("response.create")


async def test_a_long_goodbye_is_heard_out_and_of_a_very_long_one_the_first_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert bridge.Call.MAX_GOODBYE_S == 60
    monkeypatch.setattr(bridge.Call, "GOODBYE_SLACK_S", 0.2)
    monkeypatch.setattr(bridge.Call, "MAX_GOODBYE_S", 0.8)
    for ms, heard_ms in ((700, 700), (3000, 1000)):
        async with a_call() as (twilio, openai, line):
            await openai.says(voice(ms))
            await openai.caught_up()
            line.call.hang_up()
            await twilio.next()
            assert abs(len(twilio.heard_so_far()) / 8 - heard_ms) < 200


async def test_a_mark_that_never_comes_back_holds_a_goodbye_up_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.Call, "GOODBYE_SLACK_S", 0.1)
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(1000))
        await until(lambda: line.hooks.facts("model_said"))
        twilio.returns_mark = lambda name: None  # type: ignore[method-assign]
        await openai.says(voice(100))
        await until(lambda: twilio.marks)
        line.call.hang_up()
        assert "<Hangup/>" in await asyncio.wait_for(twilio.next(), 0.9)


async def test_a_caller_who_goes_on_talking_calls_the_hanging_up_off() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(500))
        await openai.caught_up()
        line.call.hang_up()
        await openai.hears_speech("u1")
        await openai.gets("conversation.item.truncate")
        await openai.hears_silence("u1")
        await openai.says(voice(100))
        await asyncio.sleep(0.2)
        assert not twilio.socket.close_code


async def test_hanging_up_that_was_called_off_does_not_happen_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.Call, "GOODBYE_SLACK_S", 0.05)
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(200))
        await openai.caught_up()
        line.call.hang_up()
        await openai.hears_speech()
        await asyncio.sleep(0.4)
        assert not twilio.socket.close_code


async def test_a_transfer_dials_the_number_after_the_last_words() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(200))
        await openai.caught_up()
        with pytest.raises(ValueError, match="E.164"):
            line.call.transfer("</Dial><Play>")
        line.call.transfer("+81312345678")
        answer = await twilio.next()
        assert "<Response><Dial>+81312345678</Dial><Say" in answer and "おつなぎできなかった場合" in answer
        assert twilio.heard_so_far() == voice(200)


async def test_a_transfer_that_overtakes_a_hanging_up_is_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.Call, "GOODBYE_SLACK_S", 0.2)
    async with a_call() as (twilio, openai, line):
        await openai.begins()
        await openai.caught_up()
        line.call.hang_up()
        await asyncio.sleep(0.1)
        line.call.transfer("+81312345678")
        assert "<Dial>" in await twilio.next()


async def test_a_model_that_is_lost_after_the_time_is_up_does_not_hold_the_end_up() -> None:
    async with a_call(max_call_seconds=0.3) as (twilio, openai, line):
        await openai.begins()
        await until(lambda: line.call.ending)
        await openai.socket.close(4004)
        assert "<Say" in await asyncio.wait_for(twilio.next(), 2)
        assert line.hooks.facts("call_ended") == [{"reason": "time limit"}]


@pytest.mark.parametrize("what_happens", ["the model is lost", "the time is up", "the bridge is stopped"])
async def test_a_caller_who_is_being_transferred_is_transferred_whatever_happens_while_the_last_words_play(
    what_happens: str,
) -> None:
    async with a_call(max_call_seconds=0.3 if what_happens == "the time is up" else 60) as (twilio, openai, line):
        await openai.says(voice(600))
        await openai.caught_up()
        line.call.transfer("+81312345678")
        await until(lambda: line.call.ending)
        if what_happens == "the model is lost":
            await openai.socket.close(4004)
        elif what_happens == "the bridge is stopped":
            line.call.end_when_heard("shutdown", bridge.say_and_hang_up(bridge.RESTARTING))
        else:
            await until(lambda: not line.call.ending.can_be_called_off)
        await openai.hears_speech()  # which can call it off no longer
        assert "<Dial>" in await twilio.next()
        assert line.hooks.facts("call_ended") == [{"reason": "transferred"}]


async def test_a_goodbye_that_was_heard_is_not_followed_by_an_apology_for_a_model_that_is_lost_then() -> None:
    async with a_call() as (twilio, openai, line):
        await openai.says(voice(300))
        await openai.caught_up()
        line.call.hang_up()
        await until(lambda: line.call.ending)
        await openai.socket.close(4004)
        assert "<Say" not in await twilio.next()


async def test_hanging_up_or_telling_the_model_when_the_call_is_over_does_nothing() -> None:
    async with a_call() as (twilio, _, line):
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"))
        before = dict(line.call.timers)
        line.call.hang_up()
        line.call.tell_model("何か")
        await asyncio.sleep(0.01)
        assert line.hooks.events()[-1] == "call_ended"
        assert line.call.timers == before and line.hooks.facts("call_ended") == [{"reason": "caller hung up"}]


async def test_a_call_ends_politely_after_max_call_seconds() -> None:
    async with a_call(max_call_seconds=0.5) as (twilio, openai, line):
        await openai.says(voice(700))
        answer = await twilio.next()
        assert "<Say" in answer and "<Hangup/>" in answer and twilio.heard_so_far() == voice(700)
        assert line.hooks.facts("call_ended") == [{"reason": "time limit"}]


# ── 10 The wire: messages ───────────────────────────────────────────────────────────────────────────────────────


async def test_messages_arrive_whole_however_the_bytes_are_cut() -> None:
    async with a_call() as (twilio, openai, _):
        write = twilio.socket.transport.write
        sent = bytearray()
        twilio.socket.transport.write = sent.extend  # type: ignore[method-assign]
        await twilio.speaks(voice(200, 1))
        ping = asyncio.ensure_future(twilio.socket.ping(b""))
        await twilio.speaks(voice(200, 2))
        await asyncio.sleep(0)
        twilio.socket.transport.write = write  # type: ignore[method-assign]
        for at in range(0, len(sent), 3):
            write(bytes(sent[at : at + 3]))
            await asyncio.sleep(0)
        await until(lambda: len(openai.heard) == 8 * 400)
        assert openai.heard == voice(200, 1) + voice(200, 2)
        await asyncio.wait_for(await ping, 1)


async def test_a_very_long_message_of_the_models_is_delivered_and_so_is_what_follows_it() -> None:
    async with a_call() as (twilio, openai, _):
        await openai.begins()
        await openai.speaks(voice(100, 1), "a")
        await openai.speaks(voice(120_000, 2), "a", delta_ms=120_000)  # a frame of 1.3 MB
        await openai.speaks(voice(100, 3), "a")
        await until(lambda: len(twilio.received) > 600 and len(twilio.sent_to_it()) == 8 * 120_200)
        assert twilio.sent_to_it() == voice(100, 1) + voice(120_000, 2) + voice(100, 3)


async def test_messages_to_the_model_arrive_whole_at_every_length_and_each_has_a_mask_of_its_own() -> None:
    async with a_call() as (_, openai, line):
        leg, masks, write = line.call.openai, set(), line.call.openai.transport.write

        def see(data: bytes) -> None:
            masks.add(data[{126: 4, 127: 10}.get(data[1] & 127, 2) :][:4])
            write(data)

        leg.transport.write = see
        lengths = [125, 126, 65535, 65536] + [125] * 300  # more than one handful of random bytes
        for length in lengths:
            text = bridge.dump({"type": "response.cancel", "response_id": "x"})
            leg.send_now(text[:-2] + b"x" * (length - len(text)) + text[-2:])
        await until(lambda: len(openai.received) == 1 + len(lengths))
        sent = [len(bridge.dump(event)) for event in openai.received[1:]]
        assert sent == lengths and len(masks) == len(lengths)
        line.openai.expected_errors = {"response_cancel_not_active"}


async def test_a_message_of_twilios_in_another_json_form_or_in_several_frames_is_the_same_message() -> None:
    async with a_call() as (twilio, openai, _):
        media = {"payload": b64(voice(20, 1)), "timestamp": "0", "track": "inbound"}
        text = json.dumps({"streamSid": twilio.stream_sid, "media": media, "event": "media"}, indent=1)
        await twilio.socket.send(text)
        await twilio.socket.send([text.replace('"0"', '"20"')[:50], text.replace('"0"', '"20"')[50:]])
        await twilio.socket.send(text.replace('"0"', '"40"').replace("/", "\\/"))
        await until(lambda: openai.heard == voice(20, 1) * 3)


async def test_an_empty_ping_is_answered_at_once() -> None:
    async with a_call() as (_, openai, _):
        await asyncio.wait_for(await openai.socket.ping(b""), 1)


def frame(head: int, payload: bytes, masked: bool = True, length: int | None = None) -> bytes:
    """A WebSocket frame, right or wrong."""
    length = len(payload) if length is None else length
    size = bytes([length]) if length < 126 else b"\x7e" + (length & 65535).to_bytes(2, "big")
    if length > 65535:
        size = b"\x7f" + length.to_bytes(8, "big")
    mask = b"\x81\x82\x83\x84" if masked else b""
    return (
        bytes([head, size[0] | 128 * masked])
        + size[1:]
        + mask
        + (bridge.apply_mask(payload, mask) if masked else payload)
    )


@pytest.mark.parametrize("cut", [0, 3, 40])
async def test_a_streams_first_messages_may_come_with_its_handshake(cut: int) -> None:
    async with a_line(greeting="") as line:
        twilio = await line.caller().dials()
        key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        head = "GET /twilio/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + key
        start = {"callSid": twilio.sid, "streamSid": "MZ1", "customParameters": twilio.parameters}
        text = json.dumps({"event": "start", "start": start}).encode()
        frames = frame(0x81, b'{"event":"connected"}') + frame(0x81, text)
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(head.encode() + frames[: len(frames) - cut])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frames[len(frames) - cut :])
        await until(lambda: line.hooks.calls and line.call.stream_sid == "MZ1", 2)
        writer.close()


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_openais_answer_to_the_handshake_may_come_in_any_number_of_pieces(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bridge.OpenAILeg.data_received

    def in_pieces(leg: bridge.OpenAILeg, data: bytes) -> None:
        for at in range(0, len(data) or 1, size):
            whole(leg, data[at : at + size])

    monkeypatch.setattr(bridge.OpenAILeg, "data_received", in_pieces)
    async with a_call() as (twilio, openai, _):
        await openai.says(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))


async def test_a_server_whose_answer_to_the_handshake_has_no_end_is_dialled_again_at_once() -> None:
    dials: list[Any] = []

    async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials.append(writer)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nX: " + b"y" * 20_000)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(babbles, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/realtime"
    async with a_line(openai_realtime_url=url) as line:
        await line.caller().dials()
        await until(lambda: len(dials) == 2, 2)
    server.close()


@pytest.mark.parametrize("come", [1, 2, 4, 8, 50])
async def test_a_frame_whose_header_comes_with_the_handshake_is_read_whole(come: int) -> None:
    async with a_line(greeting="") as line:
        text = json.dumps({"type": "session.updated", "session": {"x": "y" * 300}}).encode()
        event = b"\x81\x7e" + len(text).to_bytes(2, "big") + text  # a server's: 4 bytes of header, no mask

        async def in_two_pieces(session: PretendSession) -> None:
            session.socket.transport.write(event[:come])
            await asyncio.sleep(0.1)
            session.socket.transport.write(event[come:])
            await session.socket.recv()
            await session.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
            await session.socket.wait_closed()

        line.openai.on_dial = in_two_pieces
        twilio = await line.caller().calls()
        await until(lambda: "caller_spoke" in line.hooks.events(), 2)
        assert len(line.openai.sessions) == 1
        await twilio.hangs_up()


async def test_what_comes_behind_a_close_is_not_handled_and_nothing_is_sent_behind_one() -> None:
    async with a_call() as (twilio, openai, line):
        leg, sent = line.call.openai, []
        await openai.socket.close()
        await until(lambda: leg.close_code)
        leg.transport.write = sent.append
        leg.send_now(b"{}")
        assert sent == []
        key = json.dumps({"event": "dtmf", "streamSid": twilio.stream_sid, "dtmf": {"digit": "1"}}).encode()
        twilio.socket.transport.write(frame(0x88, b"\x03\xe8") + frame(0x81, key))
        await until(lambda: line.hooks.facts("call_ended"))
        assert not line.hooks.facts("key_pressed")


async def test_a_model_that_has_stopped_reading_is_cut_off_at_the_end_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "MAX_UNSENT", 1 << 30)
    async with a_call() as (twilio, openai, line):
        transport = line.call.openai.transport
        openai.socket.transport.pause_reading()
        while transport.get_write_buffer_size() < 1 << 20:
            await twilio.speaks(voice(100_000), 4000)
            await asyncio.sleep(0)
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"), 3)
        assert not transport.get_write_buffer_size()
        openai.socket.transport.abort()


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (frame(0x81, b"{}", masked=False), 1002),
        (frame(0xC1, b"{}"), 1002),  # the bit of compression
        (frame(0x09, b"ping"), 1002),  # a ping in parts
        (frame(0x89, b"p" * 200), 1002),  # a ping of 200 bytes
        (frame(0x83, b"?"), 1002),
        (frame(0x80, b"the end of nothing"), 1002),
        (frame(0x81, b"", length=1 << 40), 1009),
        (frame(0x01, b"x" * 60_000) + frame(0x80, b"x" * 60_000), 1009),
        (frame(0x88, b"\x03"), 1002),
    ],
)
async def test_a_frame_that_breaks_the_rules_closes_its_own_call_and_no_other(frames: bytes, code: int) -> None:
    async with a_call() as (twilio, openai, line):
        other = await line.caller().calls()
        other_openai = await line.openai.session()
        other.socket.transport.write(frames)
        await asyncio.wait_for(other.socket.wait_closed(), 3)
        assert other.socket.close_code in (code, 1006)
        await until(lambda: other_openai.socket.close_code, 2)
        await openai.says(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))


async def test_a_message_that_is_not_as_documented_is_logged_without_what_it_holds_and_the_call_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_call() as (twilio, openai, _):
        await twilio.socket.send("not json")
        await twilio.sends({"event": "media", "media": {"timestamp": "0", "payload": '"},{"type":"session.close"'}})
        await twilio.sends({"event": "a new one"})
        await openai.sends("response.output_audio.delta", delta="秘密", token="12345", caller=CALLER)
        await openai.sends("a.new.one")
        await openai.says(voice(100))
        await until(lambda: twilio.heard_so_far() == voice(100))
    assert caplog.text.count("could not be handled") == 3 and "response.output_audio.delta" in caplog.text
    assert not re.search(f"秘密|12345|{CALLER[1:]}", caplog.text)


async def test_invalid_utf8_and_bottomless_json_are_logged_and_the_call_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_call() as (twilio, openai, _):
        for payload in (b'{"event":"\xff\xfe"}', b"[" * 50_000, b'{"event":"mark","mark":{"name":["x"]}}', b"", b"7"):
            await twilio.socket.send(payload, text=True)
        await openai.says(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))
    assert caplog.text.count("could not be handled") >= 4


async def test_a_caller_who_stops_reading_is_bounded_in_memory_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    async with a_call() as (twilio, openai, line):
        twilio.reader.cancel()
        twilio.socket.transport.pause_reading()
        await openai.begins()
        item = await openai.speaks(voice(60_000), delta_ms=10_000)
        for _ in range(40):
            await openai.speaks(voice(60_000), item, delta_ms=10_000)
            await asyncio.sleep(0)
        await until(lambda: line.hooks.events()[-1] == "call_ended", 5)
        assert line.hooks.facts("call_ended") == [{"reason": "twilio lost"}]
        twilio.socket.transport.abort()
    assert "twilio has stopped reading" in caplog.text


async def test_a_model_that_stops_reading_is_bounded_in_memory_and_dialled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "MAX_UNSENT", 50_000)
    async with a_call() as (twilio, openai, line):
        openai.socket.transport.pause_reading()
        speaking = asyncio.create_task(twilio.speaks(voice(600_000), 1000))
        await until(lambda: len(line.openai.sessions) == 2, 8)
        speaking.cancel()
        await line.openai.session()
        openai.socket.transport.abort()


# ── 10 The wire: requests ───────────────────────────────────────────────────────────────────────────────────────

HOST = b"Host: localhost\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
STREAM_KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
STRANGERS_STREAM = (
    b"GET /twilio/stream HTTP/1.1\r\nOrigin: http://a.example\r\n" + HOST + UPGRADE + STREAM_KEY + b"\r\n"
)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /twilio/voice HTTP/1.0\r\nContent-Length: 0\r\n\r\n", 200),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (form_request(b"CallSid=CA6&x=" + b"y" * (65536 - 14)), 200),
        (form_request(b"CallSid=CA7", "Content-Length: 11"), 200),
        (form_request(b"CallSid=CA8") + b"POST / HTTP/1.1\r\n\r\n" + b"garbage" * 1000, 200),
        (form_request(b"y" * 65537), 413),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (form_request(b"a=b", "Transfer-Encoding: chunked"), 411),
        (form_request(b"a=b", "Content-Length: 4"), 400),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"POST /twilio/voice HTTP/1.1\r\n" + HOST + b"no colon here\r\n\r\n", 400),
        (b"what is this\r\n\r\n", 400),
        (form_request(b"a=b", method="PUT"), 405),
        (form_request(b"", method="DELETE", path="/health"), 405),
        (form_request(b"a=b", path="/nowhere"), 404),
        (form_request(b"body", method="GET", path="/health"), 200),
        (b"GET /twilio/stream HTTP/1.1\r\n" + HOST + b"\r\n", 426),
        (b"GET /twilio/stream HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"y" * 9_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"PUT /twilio/voice HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\n\r\nCallSid=CA9", 405),
        (STRANGERS_STREAM + b"what is this", 403),
    ],
)
async def test_every_request_gets_an_http_answer(request_bytes: bytes, status: int) -> None:
    async with a_line() as line:
        assert parse_http(await raw(line.port, request_bytes))[0] == status


async def test_head_is_answered_without_a_body_and_405_says_what_is_allowed() -> None:
    async with a_line() as line:
        status, headers, body = await http(line.port, "HEAD", "/health")
        assert (status, body) == (200, "") and int(headers["Content-Length"]) > 0
        status, headers, body = await http(line.port, "HEAD", "/twilio/voice")
        assert (status, headers["Allow"], body) == (405, "POST, GET", "")
        assert not line.bridge.calls


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_form_may_come_in_any_number_of_segments(size: int) -> None:
    async with a_line() as line:
        request = form_request(FORM + b"&Pad=" + b"y" * 4 * size)  # more than a head may have
        segments = [request[i : i + size] for i in range(0, len(request), size)]
        status, _, body = parse_http(await raw(line.port, *segments, pause_s=0.001))
        assert status == 200 and "<Stream" in body and "CA5" in line.bridge.calls


async def test_a_form_that_waits_for_100_continue_is_told_to_go_on() -> None:
    async with a_line() as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(form_request(FORM, "Expect: 100-continue")[: -len(FORM)])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(FORM)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_what_comes_while_a_request_is_being_answered_waits_for_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = bridge.Bridge.answer_request

    async def slowly(the_bridge: bridge.Bridge, *arguments: Any) -> Any:
        await asyncio.sleep(0.1)
        return answer(the_bridge, *arguments)

    monkeypatch.setattr(bridge.Bridge, "answer_request", slowly)
    async with a_line() as line:
        answered = await raw(line.port, STRANGERS_STREAM, b"what is", b" this?", pause_s=0.03)
        assert parse_http(answered)[0] == 403
        stream = STRANGERS_STREAM.replace(b"Origin: http://a.example\r\n", b"")
        answered = await raw(line.port, stream, frame(0x89, b"pi"), frame(0x88, b"\x03\xe8"), pause_s=0.03)
        assert answered.startswith(b"HTTP/1.1 101") and b"\x8a\x02pi" in answered


async def test_what_follows_a_form_is_not_a_part_of_it_and_100_continue_is_said_once() -> None:
    async with a_line() as line:
        await raw(line.port, form_request(b"CallSid=CA8") + b"9&From=x")
        assert list(line.bridge.calls) == ["CA8"]
        request = form_request(FORM, "Expect: 100-continue")
        answer = await raw(
            line.port, request[: -len(FORM)], *(FORM[i : i + 1] for i in range(len(FORM))), pause_s=0.001
        )
        assert answer.count(b"100 Continue") == 1 and b"200 OK" in answer
        older = request.replace(b"HTTP/1.1", b"HTTP/1.0")  # which does not know of it
        assert b"100 Continue" not in await raw(line.port, older[: -len(FORM)], FORM, pause_s=0.02)


async def test_a_head_is_read_once_into_however_many_pieces_its_body_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[bytes] = []

    class Counted:
        def fullmatch(self, line: bytes) -> Any:
            reads.append(line)
            return bridge_line.fullmatch(line)

    bridge_line = bridge.HEADER_LINE
    monkeypatch.setattr(bridge, "HEADER_LINE", Counted())
    async with a_line() as line:
        request = form_request(b"CallSid=CA1&From=" + b"y" * 100)
        head, blank_line, body = request.partition(b"\r\n\r\n")
        answer = await raw(
            line.port, head + blank_line, *(body[n : n + 10] for n in range(0, len(body), 10)), pause_s=0.01
        )
        assert parse_http(answer)[0] == 200 and len(reads) == head.count(b"\r\n")


async def test_a_request_that_comes_byte_by_byte_has_no_more_time_than_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "FORM_TIMEOUT_S", 0.2)
    async with a_line() as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        answer = asyncio.ensure_future(reader.readline())
        for byte in form_request(FORM)[:20]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.03)
            if answer.done():
                break
        assert answer.done() and answer.result().startswith(b"HTTP/1.1 408")
        writer.close()


async def test_the_time_for_a_request_ends_with_it_or_with_its_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "FORM_TIMEOUT_S", 0.2)
    async with a_call() as (twilio, openai, line):
        _, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(form_request(FORM)[:30])
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.3)
        await openai.says(voice(60))
        await until(lambda: twilio.heard_so_far() == voice(60))
    assert "Exception" not in caplog.text


async def test_a_request_that_does_not_come_to_its_end_in_5_s_is_answered_408(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bridge.FORM_TIMEOUT_S == 5
    monkeypatch.setattr(bridge, "FORM_TIMEOUT_S", 0.2)
    async with a_line() as line:
        for request in (form_request(FORM)[:-1], form_request(FORM)[:30]):
            assert parse_http(await raw(line.port, request))[0] == 408


async def test_a_head_that_is_too_long_gets_an_answer_also_when_it_announces_a_body() -> None:
    async with a_line() as line:
        headers = [f"X-{i}: {'y' * 200}" for i in range(100)]
        assert parse_http(await raw(line.port, form_request(FORM, *headers)))[0] == 431


@pytest.mark.parametrize("value", [b"\0", b"a\rb", b"\x7f"])
async def test_a_header_with_a_control_character_is_answered_400(value: bytes) -> None:
    async with a_line() as line:
        assert parse_http(await raw(line.port, b"GET /health HTTP/1.1\r\nX: " + value + b"\r\n\r\n"))[0] == 400


@pytest.mark.parametrize("line", [b"A:" + b" " * 2000 + b"\n", b"A: x" + b" " * 15_000 + b"b", b"A" * 8000 + b"("])
async def test_a_header_that_is_made_to_be_slow_to_read_holds_nobody_up(line: bytes) -> None:
    async with a_line() as running:
        began = time.monotonic()
        answer = await raw(running.port, b"GET /health HTTP/1.1\r\n" + HOST + line + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 ") and time.monotonic() - began < 0.25


# ── 11 Serve ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_health_counts_the_calls() -> None:
    async with a_call() as (_, _, line):
        status, headers, body = await http(line.port, "GET", "/health")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert json.loads(body).items() >= {"status": "ok", "calls": 1, "waiting": 0, "peak_calls": 1}.items()
    assert bridge.health(line.bridge)["calls"] == 0


async def test_with_many_calls_sockets_are_looked_at_less_often_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "BATCH_ABOVE_CALLS", 0)
    async with a_call() as (twilio, openai, line):
        resting = asyncio.create_task(bridge.batch_reads(line.bridge))
        await twilio.speaks(voice(400, 1), pace=True)
        await openai.says(voice(300, 2))
        await until(lambda: openai.heard == voice(400, 1) and twilio.heard_so_far() == voice(300, 2))
        resting.cancel()


async def test_a_drain_lets_calls_go_on_then_ends_them_and_waits_for_twilio_to_ask_what_comes_next() -> None:
    async with a_call(drain_seconds=0.3) as (twilio, openai, line):
        line.bridge.draining = True
        drained = asyncio.create_task(bridge.drain(line.bridge))
        await asyncio.sleep(0.2)
        assert not twilio.socket.close_code
        await openai.says(voice(200))
        await asyncio.wait_for(twilio.socket.wait_closed(), 2)
        await until(lambda: line.hooks.facts("call_ended") == [{"reason": "shutdown"}], 2)
        assert twilio.heard_so_far() == voice(200)
        await asyncio.sleep(0.1)
        assert not drained.done()
        assert "システムの更新" in await twilio.next()
        await asyncio.wait_for(drained, 1)


# ── What the hooks are told ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_events_of_a_call_tell_its_story_in_order() -> None:
    began = time.monotonic()
    async with a_call(greeting="もしもし") as (twilio, openai, line):
        await openai.says(voice(100), "もしもし")
        await until(lambda: line.hooks.facts("model_said"))
        await twilio.speaks(voice(40))
        await openai.hears_speech("u1")
        await openai.hears_silence("u1", "こんにちは")
        await openai.says(voice(100), "はい")
        await until(lambda: len(line.hooks.facts("model_said")) == 2)
        await twilio.hangs_up()
        await until(lambda: line.hooks.facts("call_ended"))
        story = line.hooks.events("model_used")
        assert story == [
            *("call_started", "model_asked", "model_spoke", "model_said", "caller_spoke", "caller_paused"),
            *("caller_said", "model_spoke", "model_said", "call_ended"),
        ]
        assert line.hooks.facts("caller_said") == [{"text": "こんにちは"}]
        assert line.hooks.facts("model_said")[1] == {"text": "はい", "heard_ms": None}
        usages = [(facts["usage"].get("type"), facts["model"]) for facts in line.hooks.facts("model_used")]
        assert usages == [(None, "gpt-realtime-2.1"), ("duration", "gpt-transcribe"), (None, "gpt-realtime-2.1")]
        assert b"".join(facts["mulaw"] for facts in line.hooks.facts("caller_audio")) == voice(40)
        assert b"".join(facts["mulaw"] for facts in line.hooks.facts("model_audio")) == voice(100) * 2
        times = [at for _, at, _ in line.hooks.told[2:]]
        assert times == sorted(times) and began < times[0] and times[-1] < time.monotonic()


async def test_a_call_tells_hooks_who_called_whom_and_has_room_for_their_notes() -> None:
    async with a_call() as (twilio, _, line):
        assert (line.call.sid, line.call.stream_sid) == (twilio.sid, twilio.stream_sid)
        assert (line.call.caller, line.call.called, line.call.notes) == (CALLER, CALLED, {})


async def test_a_hook_may_tell_the_model_hang_up_and_transfer_from_any_thread() -> None:
    async with a_call() as (twilio, openai, line):
        asyncio.get_running_loop().set_debug(True)  # so it refuses what only its own thread may do
        threads: set[int] = set()
        line.hooks.emit = lambda *_: threads.add(threading.get_ident())  # type: ignore[method-assign]
        await asyncio.to_thread(line.call.tell_model, "何か")
        await openai.gets("conversation.item.create")
        await openai.asked()
        await asyncio.to_thread(line.call.hang_up)
        await asyncio.to_thread(line.call.transfer, "+81312345678")
        await openai.says(voice(20))
        assert "<Dial>" in await twilio.next() and threads == {threading.get_ident()}


async def test_audio_is_not_made_for_hooks_that_do_not_listen_to_it() -> None:
    async with a_call() as (twilio, openai, line):
        line.hooks.listens = lambda event: False  # type: ignore[method-assign]
        await twilio.speaks(voice(100))
        await openai.says(voice(100))
        await until(lambda: openai.heard == voice(100) and twilio.heard_so_far() == voice(100))
        assert not {"caller_audio", "model_audio"} & {event for event, _, _ in line.hooks.told}


# ── The process ─────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@dataclasses.dataclass
class Process:
    """The real thing: `python bridge.py`."""

    process: asyncio.subprocess.Process
    port: int
    openai: PretendOpenAI
    log: Path

    def caller(self) -> PretendTwilio:
        return PretendTwilio(self.port)

    async def exits(self, within_s: float = 10) -> int:
        return await asyncio.wait_for(self.process.wait(), within_s)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextlib.asynccontextmanager
async def a_process(log: Path, folder: Path = HERE, **env: str) -> AsyncIterator[Process]:
    openai, port = PretendOpenAI(), free_port()
    async with asyncio.timeout(LIMIT_S), serve(openai.handle, "127.0.0.1", 0, close_timeout=1) as server:
        url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/v1/realtime"
        environment = clean({"PORT": str(port), "OPENAI_REALTIME_URL": url, "OPENAI_API_KEY": "sk-secret", **env})
        with log.open("wb") as output:
            command = (sys.executable, "bridge.py")
            process = await asyncio.create_subprocess_exec(
                *command, cwd=folder, env=environment, stdout=output, stderr=output
            )
        try:
            await until(lambda: b"listening" in log.read_bytes() or process.returncode is not None, 10)
            yield Process(process, port, openai, log)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert "sk-secret" not in log.read_text() and CALLER not in log.read_text()


async def a_whole_call(twilio: PretendTwilio, openai: PretendOpenAI, speech: bytes) -> PretendSession:
    """Greeting, three turns, one of them interrupted, and the caller hangs up."""
    await twilio.calls()
    session = await openai.session()
    await session.asked()
    await session.says(voice(300, 1), "こんにちは、鈴木です。")
    await until(lambda: twilio.heard_so_far() == voice(300, 1))
    await asyncio.sleep(0.05)  # the last mark is on its way
    for turn, (asks, answers) in enumerate(
        (("こんにちは。", "はい。"), ("天気は。", "どちらの。"), ("東京。", "晴れ。"))
    ):
        caller_item = await session.hears_speech()
        await twilio.speaks(speech)
        await session.hears_silence(caller_item, asks)
        await session.says(voice(600, 2 + turn), answers)
        before = len(twilio.heard)
        if turn == 1:
            await until(lambda before=before: len(twilio.heard_so_far()) > before + 2400)  # type: ignore[misc]
        else:
            await until(lambda turn=turn: twilio.heard_so_far().endswith(voice(600, 2 + turn)))  # type: ignore[misc]
            await asyncio.sleep(0.05)  # the last mark is on its way
    await until(lambda: session.heard == speech * 3)
    (truncated,) = session.truncates()
    assert 300 <= truncated[1] < 400 and twilio.clears == 1 and twilio.faults == [] and session.errors == []
    await session.caught_up()
    await twilio.hangs_up()
    await until(lambda: session.socket.close_code, 1)
    return session


async def test_a_whole_call_through_the_real_process_can_be_read_in_its_log(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log") as bridge_process:
        twilio = bridge_process.caller()
        await a_whole_call(twilio, bridge_process.openai, voice(400, 9))
        await until(lambda: any(line.get("event") == "call_ended" for line in bridge_process.log_lines()))
        story = [line for line in bridge_process.log_lines() if line.get("call") == twilio.sid]
        said = [line["text"] for line in story if line["event"] in ("caller_said", "model_said")]
        assert said == [
            "こんにちは、鈴木です。",
            "こんにちは。",
            "はい。",
            "天気は。",
            "どちらの。",
            "東京。",
            "晴れ。",
        ]
        events = [line["event"] for line in story]
        assert events[0] == "call_started" and events[-1] == "call_ended" and "model_interrupted" in events
        assert CALLER[-4:] in bridge_process.log.read_text()
        bridge_process.process.send_signal(signal.SIGTERM)
        assert await bridge_process.exits() == 0


async def test_bridge_py_copied_alone_does_the_same_call(tmp_path: Path) -> None:
    (tmp_path / "bridge.py").write_bytes((HERE / "bridge.py").read_bytes())
    async with a_process(tmp_path / "log", tmp_path) as bridge_process:
        await a_whole_call(bridge_process.caller(), bridge_process.openai, voice(400, 9))
        bridge_process.process.send_signal(signal.SIGINT)
        assert await bridge_process.exits() == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["bridge.py", "log"]


def test_without_a_key_or_the_hooks_that_are_named_the_program_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "bridge.py").write_bytes((HERE / "bridge.py").read_bytes())
    done = run_bridge({"OPENAI_API_KEY": "k", "HOOKS": "log"}, tmp_path)
    assert done.returncode == 2 and "HOOKS" in done.stderr and "no hooks folder" in done.stderr
    for folder, env in ((tmp_path, {}), (HERE, {"HOOKS": ""})):
        done = run_bridge(env, folder)
        assert done.returncode == 2 and "OPENAI_API_KEY" in done.stderr.splitlines()[-1], done.stderr


async def test_what_a_hook_prints_is_seen_at_once_and_the_program_waits_for_what_hooks_still_have_to_do(
    tmp_path: Path,
) -> None:
    (tmp_path / "bridge.py").write_bytes((HERE / "bridge.py").read_bytes())
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "__init__.py").write_bytes((HERE / "hooks" / "__init__.py").read_bytes())
    says = "import time\ndef call_started(): print('begun')\ndef call_ended(): time.sleep(0.5); print('saved')\n"
    (tmp_path / "hooks" / "mine.py").write_text(says)
    async with a_process(tmp_path / "log", tmp_path, PYTHONUNBUFFERED="") as bridge_process:
        twilio = await bridge_process.caller().calls()
        await until(lambda: "begun" in bridge_process.log.read_text())
        await twilio.hangs_up()
        bridge_process.process.send_signal(signal.SIGTERM)
        assert await bridge_process.exits() == 0
        assert "saved" in bridge_process.log.read_text()


async def test_the_browser_phone_is_offered_only_where_no_auth_token_is_set(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log", HOOKS="browser_phone") as bridge_process:
        await until(lambda: "in a browser" in bridge_process.log.read_text())
    deployed = {"TWILIO_AUTH_TOKEN": "12345", "PUBLIC_BASE_URL": "https://my-app.fly.dev"}
    async with a_process(tmp_path / "log", HOOKS="browser_phone", **deployed) as bridge_process:
        assert (await http(bridge_process.port, "GET", "/health"))[0] == 200
        assert "in a browser" not in bridge_process.log.read_text()


async def test_beside_somebody_elses_hooks_folder_none_of_its_files_is_run(tmp_path: Path) -> None:
    (tmp_path / "bridge.py").write_bytes((HERE / "bridge.py").read_bytes())
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "other.py").write_text("raise SystemExit('this is not ours')")
    async with a_process(tmp_path / "log", tmp_path) as bridge_process:
        assert (await http(bridge_process.port, "GET", "/health"))[0] == 200


async def test_the_start_with_no_setting_warns_of_the_stand_in_and_of_nothing_else(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log", OPENAI_API_KEY="", OPENAI_REALTIME_URL="") as bridge_process:
        await until(lambda: "listening" in bridge_process.log.read_text())
    warned = [line["logger"] for line in bridge_process.log_lines() if line.get("level") not in ("INFO", None)]
    assert warned == ["offline"]


async def test_without_a_key_a_stand_in_on_this_computer_answers(tmp_path: Path) -> None:
    async with a_process(
        tmp_path / "log", OPENAI_API_KEY="", OPENAI_REALTIME_URL="", HOOKS="offline"
    ) as bridge_process:
        twilio = await bridge_process.caller().calls()
        await until(lambda: len(twilio.heard_so_far()) > 4000)
        await twilio.hangs_up()
        assert bridge_process.openai.sessions == []


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.create_server(("", 0)) as taken:
        done = run_bridge({"OPENAI_API_KEY": "k", "PORT": str(taken.getsockname()[1]), "HOOKS": ""})
    assert done.returncode == 1 and "set PORT" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "no..name"])  # the first is nobody's (RFC 5737), the second is no name
def test_host_is_the_address_that_is_listened_at_and_a_wrong_one_is_said_in_one_line(host: str) -> None:
    done = run_bridge({"OPENAI_API_KEY": "k", "PORT": str(free_port()), "HOST": host, "HOOKS": ""})
    assert done.returncode == 1 and f"HOST '{host}'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_argument_that_is_not_known_is_said_in_one_line_and_help_is_what_stands_above_the_code() -> None:
    command = [sys.executable, str(HERE / "bridge.py")]
    done = subprocess.run([*command, "--port=9000"], env=clean({}), capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "--port=9000" in done.stderr and "environment" in done.stderr.splitlines()[-1]
    done = subprocess.run([*command, "--help"], env=clean({}), capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and bridge.__doc__ is not None and done.stdout.strip() == bridge.__doc__.strip()


def test_open_opens_the_browser_phone(tmp_path: Path) -> None:
    browser, opened, port = tmp_path / "browser", tmp_path / "opened", free_port()
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "bridge.py", "--open"],
        cwd=HERE,
        env=clean({"PORT": str(port), "BROWSER": f"{browser} %s"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 10
        while not (opened.exists() and opened.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert opened.read_text() == f"http://localhost:{port}/\n" and process.wait(10) == 0


async def test_health_shows_how_busy_the_process_is(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log") as bridge_process:
        twilio = await bridge_process.caller().calls()
        openai = await bridge_process.openai.session()
        await openai.asked()
        await twilio.speaks(voice(200))
        await openai.says(voice(400))
        await until(lambda: len(openai.heard) == 1600 and twilio.heard_so_far() == voice(400))
        health = json.loads((await http(bridge_process.port, "GET", "/health"))[2])
        assert (health["frames_from_callers"], health["pieces_to_callers"]) == (
            10,
            3,
        )  # 300 ms in two pieces, 100 ms in one
        assert health["dropped_hook_events"] == 0 and 0 <= health["loop_delay_p99_ms"] < 100
        await twilio.hangs_up()


async def test_a_process_that_stood_still_for_a_while_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log") as bridge_process:
        twilio = await bridge_process.caller().calls()
        openai = await bridge_process.openai.session()
        await openai.asked()
        speaking = asyncio.create_task(twilio.speaks(voice(1600, 1), pace=True))
        await asyncio.sleep(0.2)
        bridge_process.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1)
        bridge_process.process.send_signal(signal.SIGCONT)
        await speaking
        await openai.says(voice(200, 2))
        await until(lambda: openai.heard == voice(1600, 1) and twilio.heard_so_far() == voice(200, 2))
        await twilio.hangs_up()


async def test_sigterm_refuses_new_calls_lets_running_ones_end_and_exits_with_0(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log") as bridge_process:
        twilio = await bridge_process.caller().calls()
        openai = await bridge_process.openai.session()
        await openai.asked()
        bridge_process.process.send_signal(signal.SIGTERM)
        await until(lambda: "stopping" in bridge_process.log.read_text())
        answer = await bridge_process.caller().post("/twilio/voice")
        assert "おかけ直し" in answer and "<Stream" not in answer
        status, _, body = await http(bridge_process.port, "GET", "/health")
        assert status == 503 and json.loads(body)["status"] == "draining"
        await openai.says(voice(200))
        await until(lambda: twilio.heard_so_far() == voice(200))
        await twilio.hangs_up()
        assert await bridge_process.exits(3) == 0


async def test_calls_that_outlast_drain_seconds_are_ended_politely(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log", DRAIN_SECONDS="0.2") as bridge_process:
        twilio = await bridge_process.caller().calls()
        openai = await bridge_process.openai.session()
        await openai.asked()
        await openai.says(voice(700))
        await openai.caught_up()
        bridge_process.process.send_signal(signal.SIGTERM)
        assert "おかけ直し" in await twilio.next(), "Twilio's question is still answered"
        assert twilio.heard_so_far() == voice(700)
        assert await bridge_process.exits(3) == 0


async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with a_process(tmp_path / "log") as bridge_process:
        await bridge_process.caller().calls()
        bridge_process.process.send_signal(signal.SIGINT)
        await until(lambda: "stopping" in bridge_process.log.read_text())
        bridge_process.process.send_signal(signal.SIGINT)
        await bridge_process.exits(1)


# ── The files around it ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_readmes_table_env_example_and_the_code_name_the_same_settings() -> None:
    readme = (HERE / "README.md").read_text()
    ours = [field.name.upper() for field in dataclasses.fields(bridge.Settings) if field.name != "fly_machine_id"]
    of_hooks = {
        name
        for path in (HERE / "hooks").glob("*.py")
        for name in re.findall(r"""(?:environ\.get\(|environ\[|setting\()["']([A-Z_]+)""", path.read_text())
    }
    tables = readme.split("## Settings")[1].split("## How it works")[0]
    table, hooks_table = (part.split("|---|", 1)[1] for part in tables.split("Settings of single hook"))
    assert settings_named_in(table) == ours
    assert set(settings_named_in(hooks_table)) >= of_hooks - set(ours)
    named = settings_named_in((HERE / ".env.example").read_text())
    assert named == ours + settings_named_in(hooks_table)


def test_the_readmes_table_names_the_defaults_of_the_code() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE))
    ours = {name.upper(): value for name, value in vars(bridge.Settings()).items() if name.upper() in listed}
    assert len(ours) == 9
    assert {name: listed[name] for name in ours} == {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in ours.items()
    }


def settings_named_in(text: str) -> list[str]:
    return re.findall(r"^(?:\| `|# )([A-Z][A-Z_]+)[`=]", text, re.MULTILINE)


def test_the_readmes_table_of_events_is_that_of_the_hooks_and_each_is_emitted() -> None:
    table = (HERE / "README.md").read_text().split("<!-- events -->")[1].split("\n\n")[0]
    listed = {name: tuple(arguments.split(", ")) for name, arguments in re.findall(r"\| `(\w+)\((.*?)\)`", table)}
    host = bridge.load_hooks("")
    assert listed == sys.modules[type(host).__module__].EVENTS
    source = (HERE / "bridge.py").read_text()
    assert [name for name in listed if f'emit("{name}"' not in source] == []


async def test_the_readmes_smallest_hook_and_tool_do_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, tool = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    (tmp_path / "hello.py").write_text(hook)
    (tmp_path / "orders.py").write_text(tool)
    bridge.load_hooks("")
    host = sys.modules["bridge_hooks"].load(tmp_path, None)
    assert host.tools[0]["parameters"]["properties"]["number"]["description"].startswith("as printed")
    assert await host.run_tool(None, "look_up_order", '{"number":"A-1001"}') == "shipped"
    async with a_call() as (_, _, line):
        host.emit("caller_said", line.call, 0.0, {"text": "もしもし"})
        host.close(2)
        assert capsys.readouterr().out == f"{line.call.sid} said もしもし\n"


def shipped(folder: Path) -> list[str]:
    """The names in a folder that belong to the project; a user's own hooks, recordings … are theirs."""
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [path.name for path in folder.iterdir()]
    return sorted({name.split("/")[0] for name in names})


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The program that a command in the README names takes its arguments and settings, in whatever test it is run."""
    words = shlex.split(command)
    match [".venv/bin/python", "test_bridge.py", *words] if command.startswith("--") else words:
        case [".venv/bin/python", "test_bridge.py", *arguments]:
            monkeypatch.setattr(sys, "argv", ["test_bridge.py", *(arguments or ["--calls", "1"])])
            return main() == 0
        case [".venv/bin/python", "bridge.py", *arguments] | ["python", "bridge.py", *arguments]:
            return arguments in ([], ["--open"])
        case ["uv", "run", "bridge.py"]:
            return "uv run bridge.py" in (HERE / ".ci" / "run").read_text()
        case ["ngrok", "http", port] | ["cloudflared", "tunnel", "--url", port]:
            return port.endswith(str(bridge.Settings().port))
        case ["export", *assignments] | ["fly", "secrets", "set", *assignments]:
            return bool(bridge.read_settings(dict(word.split("=", 1) for word in assignments)))
        case ["fly", *rest]:
            return rest in (["launch", "--no-deploy"], ["secrets", "set"], ["deploy"], ["logs"])
        case [assignment] if re.match("[A-Z_]+=", assignment):
            settings = bridge.read_settings(dict([assignment.split("=", 1)]))
            return settings.hooks is None or bool(bridge.load_hooks(settings.hooks))
    return False


def test_each_command_in_the_readme_is_one_that_its_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "run", lambda *arguments: asyncio.sleep(0, 0))
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", "12345")
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    marks = re.findall(r"<!-- (\w+) command -->\n```sh\n", readme)
    assert len(marks) == readme.count("```sh") and all(f"$(command {mark})" in ci for mark in marks)
    programs = r"(?:\S*python|uv|fly|ngrok|cloudflared|export|--calls|--url) "
    commands = re.findall(rf"`((?:{programs}|[A-Z_]+=)[^`\n]*)`", readme)
    assert len(commands) > 15
    assert [command for command in commands if not understood(command.replace("sk-…", "sk-1"), monkeypatch)] == []


def test_the_way_of_a_frame_in_the_readme_is_that_of_the_code() -> None:
    way = (HERE / "README.md").read_text().split("## How it works")[1].split("```")[1]
    code = (HERE / "bridge.py").read_text()
    named = re.findall(r"\b(?:(Leg|Call)\.)?([a-z]+_[a-z_]+|hear|play)\b", re.sub('"[^"]*"', "", way))
    assert len(named) > 8 and [name for _, name in named if f"    def {name}(" not in code] == []


def test_the_readme_has_a_line_on_each_hook_file() -> None:
    readme = (HERE / "README.md").read_text()
    files = [name for name in shipped(HERE / "hooks") if name.endswith(".py") and name[0] != "_"]
    assert [name for name in files if f"| `{name}` |" not in readme] == []


def test_nothing_else_stands_at_the_top_level() -> None:
    ours = {"bridge.py", "hooks", "test_bridge.py", "requirements.txt", "Procfile", "fly.toml", "README.md"}
    assert {name for name in shipped(HERE) if name[0] not in "._"} <= ours


def test_the_script_header_and_requirements_txt_name_the_same_packages() -> None:
    header = re.search(r"# dependencies = (\[.*\])", (HERE / "bridge.py").read_text())
    assert header is not None
    lines = [line for line in (HERE / "requirements.txt").read_text().splitlines() if line[:1] != "#"]
    assert json.loads(header[1]) == [line for line in lines if "pytest" not in line]
    names = {re.split("[<>=]", line)[0] for line in lines}
    assert names == {"websockets", "twilio", "pytest", "pytest-asyncio"}


def test_bridge_py_and_the_hooks_import_only_websockets_twilio_and_the_standard_library() -> None:
    for path in [HERE / "bridge.py", *(HERE / "hooks").glob("*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
        assert imported <= sys.stdlib_module_names | {"websockets", "twilio"}, path


def test_fly_toml_keeps_a_machine_awake_and_gives_a_drain_its_time() -> None:
    fly = tomllib.loads((HERE / "fly.toml").read_text())
    service = fly["http_service"]
    assert fly["primary_region"] == "iad" and service["internal_port"] == bridge.Settings().port
    assert service["force_https"] and service["auto_stop_machines"] == "off" and service["min_machines_running"] == 1
    assert service["concurrency"]["type"] == "connections" and service["checks"][0]["path"] == "/health"
    last_words_s = bridge.DRAIN_GOODBYE_S + bridge.NEXT_S
    assert fly["kill_signal"] == "SIGTERM" and fly["kill_timeout"] >= bridge.Settings().drain_seconds + last_words_s
    limits = service["concurrency"]
    assert limits["soft_limit"] < int(fly["env"]["MAX_CALLS"]) < limits["hard_limit"], "webhooks need room, too"
    assert fly["vm"] == [{"size": "shared-cpu-1x", "memory": "256mb"}]


# ── As a program: one call to watch, or many at once ────────────────────────────────────────────────────────────
#
#     python test_bridge.py                     a pretend call in the terminal, in real time
#     python test_bridge.py --calls 50          50 at once: what is lost, how long it takes, what it costs
#     python test_bridge.py --url https://…     callers only, to a bridge that is deployed
#
# The bridge is a process of its own with all its hooks, as on a server.

TURN_DETECTION_S, THINKING_S = 0.5, 0.3  # a model's, from the caller's last word to the first of the answer
BASELINE_MS = 62.5  # of CPU a second: what Fly.io guarantees a shared-cpu-1x
ON_TERMINAL = sys.stdout.isatty()


def paint(style: str, text: str) -> str:
    """In colour, on a terminal that is to have it (https://no-color.org)."""
    return f"\033[{style}m{text}\033[0m" if ON_TERMINAL and not os.environ.get("NO_COLOR") else text


class WatchedCall(PretendTwilio):
    """A caller with their part, and a model with its own. Each line is printed while it is spoken, and then checked."""

    def __init__(self, port: int, char_s: float, wrong: list[str]) -> None:
        super().__init__(port)
        self.openai: PretendSession
        self.char_s = char_s  # how long a character is spoken
        self.wrong = wrong
        self.began = time.monotonic()
        self.frames = 0  # sent of the caller's; frame n is voice(20, n)
        self.turn = ""  # the item of what the caller says
        self.hung_up = False
        self.made = self.due = b""  # the model's audio, and what of it the caller is to hear
        self.sounded_at = self.last_word_at = 0.0  # when the model's line was first heard, when the caller's ended

    def tell(self, who: str, text: str = "", end: str = "\n") -> None:
        style = {"caller": "36", "model": "33", "wrong": "31"}.get(who, "2")
        at = paint("2", f"{time.monotonic() - self.began:5.1f} s")
        print(f"{at}  {paint(style, f'{who:<8}')}  {text}", end=end, flush=True)

    def check(self, right: bool, fault: str) -> None:
        if not right:
            self.wrong.append(fault)
            self.tell("wrong", fault)

    async def line(self, who: str, text: str) -> None:
        self.tell(who, end="")
        began = time.monotonic()
        for count, char in enumerate(text, 1):
            print(char, end="", flush=True)
            await asyncio.sleep(began + count * self.char_s - time.monotonic())

    async def microphone(self) -> None:
        """20 ms of the caller's sound every 20 ms, from the start to the hanging up."""
        due = time.monotonic()
        while not self.hung_up:
            await self.speaks(voice(20, self.frames))
            self.frames += 1
            due += 0.02
            await asyncio.sleep(due - time.monotonic())

    def plays(self, mulaw: bytes) -> None:
        self.sounded_at = self.sounded_at or time.monotonic()
        super().plays(mulaw)

    async def model_says(self, text: str, heard: str = "") -> None:
        """An answer. With `heard`, the caller begins to speak when that much of it has been heard."""
        mulaw, self.sounded_at, made_at = voice(len(text) * self.char_s * 1000, len(self.made)), 0.0, time.monotonic()
        item = await self.openai.says(mulaw, text)
        self.made += mulaw
        await until(lambda: self.sounded_at, 1, "something of the model's answer to be heard")
        await self.line("model", heard or text)
        bridge_ms = (self.sounded_at - made_at) * 1000
        wait = f"{(self.sounded_at - self.last_word_at) * 1000:.0f} ms, " if self.last_word_at else ""
        print(paint("2", f"  {wait}bridge {bridge_ms:.1f} ms"))
        self.check(bridge_ms < 100, f"the bridge held the answer back for {bridge_ms:.0f} ms")
        if heard:
            await self.barges_in(item, len(mulaw) // 8)
        else:
            self.due += mulaw
            await until(lambda: not self.marks, 1, "the model's last word to be heard, by its mark")
            self.check(self.heard_so_far() == self.due, "the caller did not hear just what the model said")

    async def barges_in(self, item: str, sent_ms: int) -> None:
        """The caller begins to speak: within an instant the model is silent, and is told how much of it was heard."""
        began = time.monotonic()
        self.turn = await self.openai.hears_speech()
        await until(lambda: self.clears, 1, "a clear, when the caller speaks over the model")
        silent_ms = (time.monotonic() - began) * 1000
        heard_ms, self.due = (len(self.heard) - len(self.due)) / 8, self.heard
        truncate = await self.openai.gets("conversation.item.truncate", 1)
        told_ms = truncate["audio_end_ms"]
        told = f"{heard_ms:.0f} ms heard of {sent_ms} ms sent; the model is told {told_ms} ms"
        self.tell("barge-in", paint("2", f"{told}, and silent within {silent_ms:.0f} ms"))
        self.check(abs(told_ms - heard_ms) <= 60, f"the caller had heard {heard_ms:.0f} ms, not {told_ms} ms")
        self.check(truncate["item_id"] == item, f"the truncate is of {truncate['item_id']} instead of {item}")

    async def caller_says(self, text: str, over: bool = False) -> None:
        if not over:
            await asyncio.sleep(THINKING_S)
            self.turn = await self.openai.hears_speech()
        await self.line("caller", text)
        print()
        self.last_word_at = time.monotonic()
        await asyncio.sleep(TURN_DETECTION_S)
        await self.openai.hears_silence(self.turn, text)
        await asyncio.sleep(THINKING_S)

    async def ends(self) -> None:
        """The caller hangs up: all audio must have come through, and both sides must be closed within a second."""
        await self.openai.caught_up()
        caller = b"".join(voice(20, n) for n in range(self.frames))
        for who, came, sent in (("caller", self.openai.heard, caller), ("model", self.sent_to_it(), self.made)):
            self.check(came == sent, f"the {who}'s audio came changed, {len(came) // 8} ms of {len(sent) // 8} ms")
        began = time.monotonic()
        hanging_up = asyncio.create_task(self.hangs_up())
        await until(lambda: self.openai.socket.close_code and hanging_up.done(), 1, "both sides to be closed")
        self.tell("hung up", paint("2", f"both sides are closed after {(time.monotonic() - began) * 1000:.0f} ms"))
        asked = ["session.update", "response.create", "conversation.item.truncate"]
        self.check(self.openai.types() == asked, f"the model was sent {self.openai.types()} instead of {asked}")
        self.check(self.clears == 1, f"{self.clears} clears for one barge-in")
        for fault in self.faults + self.openai.errors:
            self.check(False, f"against the protocol: {fault}")


async def watch(process: Process, seconds: float, wrong: list[str]) -> None:
    """One pretend call of about this length."""
    print("A pretend call through bridge.py, in real time. Nothing leaves this computer, and nothing costs.")
    print("Behind an answer: how long the caller waited for it, and how long it was in the bridge.\n")
    call = WatchedCall(process.port, (seconds - 4) / 134, wrong)
    await call.calls()
    call.openai = await process.openai.session()
    microphone = asyncio.create_task(call.microphone())
    call.tell("answered", paint("2", "the model is there, too"))
    greeting = bridge.Settings().greeting
    create = await call.openai.gets("response.create")
    call.check(greeting in json.dumps(create, ensure_ascii=False), "the model was not asked for the greeting")
    await call.model_says(greeting)
    await call.caller_says("あしたの東京の天気を教えてください。")
    await call.model_says("あしたの東京は晴れて、二十五度くらいまで上がるそうです。")
    await call.caller_says("傘はいりますか。")
    answer = "いいえ、雨の心配はなさそうです。"
    await call.model_says(f"{answer}ただ、夕方からは風が強くなりますので、上着があると安心です。", heard=answer)
    await call.caller_says("わかりました。ありがとうございます。", over=True)
    await call.model_says("お電話ありがとうございました。失礼いたします。")
    call.hung_up = True
    await microphone
    await call.ends()


@dataclasses.dataclass
class Load:
    """What many calls share: where they go, and what is measured."""

    base: str  # of the bridge
    real: bool = False  # it is deployed, and so is its model
    since_ns: float = math.inf  # measured is what is sent after that: what came before has waited for the dialling
    over: bool = False
    callers: list[LoadCaller] = dataclasses.field(default_factory=list)
    models: list[LoadModel] = dataclasses.field(default_factory=list)
    late: Counter[int] = dataclasses.field(default_factory=Counter)  # our own frames, in 10 µs


class Ear:
    """One end of one call. What comes there are blocks of 20 ms that say their call, their number, and when sent."""

    def __init__(self, load: Load, call: int = 0) -> None:
        self.load = load
        self.call = call  # its number; 0 until the first block
        self.unread = b""
        self.counts: Counter[str] = Counter()
        self.next = 0  # number of the block that should come next
        self.delays: Counter[int] = Counter()  # in 10 µs

    @staticmethod
    def block(call: int, number: int) -> bytes:
        """The same 20 bytes eight times over, so that any change shows."""
        return struct.pack(">4sIIQ", b"call", call, number, time.monotonic_ns()) * 8

    def hears(self, mulaw: bytes) -> None:
        now, self.unread = time.monotonic_ns(), self.unread + mulaw
        while len(self.unread) >= 160:
            if self.unread[:160] != self.unread[:20] * 8:  # look for the beginning of the next whole block
                self.counts["bytes changed"] += 1
                self.unread = self.unread[1:]
                continue
            _, call, number, sent_at = struct.unpack(">4sIIQ", self.unread[:20])
            self.unread = self.unread[160:]
            self.call = self.call or call
            if call != self.call or number < self.next:
                self.counts["repeated" if call == self.call else "of another call"] += 1
                continue
            self.counts["lost"] += number - self.next
            self.counts["arrived"] += 1
            self.next = number + 1
            if sent_at >= self.load.since_ns:
                self.delays[(now - sent_at) // 10_000] += 1


class LoadCaller(PretendTwilio):
    """One of many callers: a block every 20 ms, at a phase of their own; or silence, for a model that is real."""

    def __init__(self, load: Load) -> None:
        public = os.environ.get("PUBLIC_BASE_URL", "").rstrip("/") if load.base.startswith("http:") else ""
        token = os.environ.get("TWILIO_AUTH_TOKEN", "") if load.real else ""
        super().__init__(0, base=public or load.base, auth_token=token)
        self.sid = "CA" + os.urandom(16).hex()
        self.stream_sid = "MZ" + self.sid[2:]
        load.callers.append(self)
        self.load, self.number, self.sent = load, len(load.callers), 0
        self.ear = Ear(load, self.number)
        self.called_at = self.answered_at = self.stream_at = self.sound_at = self.playing = 0.0  # monotonic, s
        self.sound_s, self.marks_asked = 0.0, 0

    async def post(self, path: str, **form: str) -> str:
        form = {"CallSid": self.sid, "From": CALLER, "To": CALLED, "CallStatus": "ringing", **form}
        headers = self.signature(self.base + path, form)
        request = urllib.request.Request(self.load.base + path, urlencode(form).encode(), headers)
        try:
            with await asyncio.to_thread(urllib.request.urlopen, request, timeout=15) as answer:
                twiml = str(answer.read().decode())
        except urllib.error.HTTPError as fault:
            raise AssertionError(f"the webhook answers {fault.code} {fault.read(200).decode().strip()}") from None
        assert "<Stream" in twiml, f"the bridge says: {''.join(ElementTree.fromstring(twiml).itertext())}"
        return twiml

    async def connects(self) -> LoadCaller:
        self.answered_at = time.monotonic()
        await asyncio.sleep(0.5)  # as long as Twilio takes
        here, url = urlsplit(self.load.base), urlsplit(self.stream_url)
        if here.scheme == "http":  # its public name leads elsewhere
            url = url._replace(scheme="ws", netloc=here.netloc)
        headers = self.signature(self.stream_url, {})
        self.socket = await connect(url.geturl(), additional_headers=headers, compression=None, proxy=None)
        self.stream_at = time.monotonic()
        self.reader = asyncio.create_task(self.listen())
        await self.sends({"event": "connected", "protocol": "Call", "version": "1.0.0"})
        return self

    async def talks(self) -> None:
        """The whole call, but for the hanging up."""
        self.called_at = time.monotonic()
        await self.calls()
        due = time.monotonic() + random.random() / 50
        while not self.load.over:
            await asyncio.sleep(due - time.monotonic())
            self.load.late[int((time.monotonic() - due) * 1e5)] += 1
            assert not self.reader.done(), f"the bridge ended it after {due - self.stream_at:.1f} s"
            await self.speaks(b"\xff" * 160 if self.load.real else Ear.block(self.number, self.sent))
            self.sent += 1
            due += 0.02

    def takes(self, text: str | bytes) -> None:
        now, loop = time.monotonic(), asyncio.get_running_loop()
        match json.loads(text):
            case {"event": "media", "media": {"payload": payload}}:
                mulaw = base64.b64decode(payload)
                self.sound_at = self.sound_at or now
                self.sound_s += len(mulaw) / 8000
                self.playing = max(self.playing, now) + len(mulaw) / 8000
                if not self.load.real:
                    self.ear.hears(mulaw)
            case {"event": "mark", "mark": {"name": name}}:
                self.marks_asked += 1
                loop.call_later(max(0, self.playing - now), self.returns_mark, name)
            case message:
                self.faults.append(f"nobody spoke over the model, and yet came {message['event']}")


class LoadModel:
    """One of many models: an answer of 3.9 s, sent four times as fast as it is spoken, then the caller's turn."""

    def __init__(self, load: Load, session: PretendSession) -> None:
        load.models.append(self)
        self.load, self.session, self.sent, self.ear = load, session, 0, Ear(load)

    async def run(self) -> None:
        talking = asyncio.create_task(self.talks())
        with contextlib.suppress(ConnectionClosed):
            async for text in self.session.socket:
                event = json.loads(text)
                if event["type"] == "input_audio_buffer.append":
                    self.ear.hears(base64.b64decode(event["audio"]))
                else:
                    await self.session.takes(text)
        talking.cancel()

    async def talks(self) -> None:
        session = self.session
        await until(lambda: session.response and self.ear.call, 60, "the caller, and the greeting to be asked for")
        while not self.load.over:
            item = ""
            for _ in range(13):
                blocks = [Ear.block(self.ear.call, number) for number in range(self.sent, self.sent + 15)]
                if not self.load.over:
                    self.sent += 15
                    item = await session.speaks(b"".join(blocks), item)
                    await asyncio.sleep(0.3 / 4)
            await session.says(b"", "はい、わかりました。", item)
            await asyncio.sleep(3.9 * 3 / 4 + 0.5)  # the caller hears it to its end
            turn = await session.hears_speech()
            await asyncio.sleep(random.uniform(0.5, 2))
            await session.hears_silence(turn, "そうですか。")
            await asyncio.sleep(THINKING_S)
            await session.begins()


def used(pid: int) -> tuple[float, float]:
    """CPU in ms and memory in MB of a process with all its threads; not numbers where the system does not say."""
    try:
        cpu_ns = sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        status = Path(f"/proc/{pid}/status").read_text()
        return cpu_ns / 1e6, int(status.partition("VmRSS:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return math.nan, math.nan


def percentile(counts: Counter[int], part: float) -> float:
    """In ms, of measurements in 10 µs; not a number when there are none."""
    rest = part * counts.total()
    for value in sorted(counts):
        if (rest := rest - counts[value]) <= 0:
            return value / 100
    return math.nan


def row(name: str, *columns: str) -> None:
    print(f"  {name:<18}", *(f"{column:>18}" for column in columns))


def table_of_callers(callers: list[LoadCaller]) -> None:
    """What callers alone can know."""
    row("", "median", "longest")
    for name, times in (
        ("answered after", [caller.answered_at - caller.called_at for caller in callers]),
        ("first sound after", [caller.sound_at - caller.stream_at for caller in callers if caller.sound_at]),
        ("sound in all", [caller.sound_s for caller in callers]),
    ):
        row(name, *(f"{act(times or [math.nan]):.2f} s" for act in (statistics.median, max)))
    row("marks", str(sum(caller.marks_asked for caller in callers)))


def table_of_both_sides(callers: list[LoadCaller], models: list[LoadModel], wrong: list[str]) -> None:
    row("", "caller → model", "model → caller")
    sent = [sum(caller.sent for caller in callers), sum(model.sent for model in models)]
    ears = [[model.ear for model in models], [caller.ear for caller in callers]]
    counts = [sum((ear.counts for ear in way), Counter[str]()) for way in ears]
    for way, all_of_it in zip(counts, sent, strict=True):
        way["lost"] = all_of_it - way["arrived"]  # the last ones, too, which leave no gap
    row("frames of 20 ms", *(f"{number:,}" for number in sent))
    for name in ("lost", "repeated", "of another call", "bytes changed"):
        row(name, *(f"{way[name]:,}" for way in counts))
        wrong += [f"{way[name]:,} {name}" for way in counts if way[name]]
    delays = [sum((ear.delays for ear in way), Counter[int]()) for way in ears]
    for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        row(f"relay delay {name}", *(f"{percentile(way, part):.2f} ms" for way in delays))


async def play(load: Load, calls: int, seconds: float, wrong: list[str], pid: int = 0) -> None:
    """So many calls for so long, from the first webhook to the last close; and the table."""
    _, idle_mb = used(pid)
    talking: list[asyncio.Task[None]] = []
    for _ in range(calls):
        talking.append(asyncio.create_task(LoadCaller(load).talks()))
        await asyncio.sleep(0.02)
    pairs = list(zip(load.callers, talking, strict=True))
    await until(lambda: all(caller.stream_at or task.done() for caller, task in pairs), 60, "all calls to begin")
    load.late.clear()
    load.since_ns, began, ours_s, (before_ms, _) = time.monotonic_ns(), time.monotonic(), time.process_time(), used(pid)
    while (passed := time.monotonic() - began) < seconds and (up := sum(not task.done() for task in talking)):
        frames = sum(caller.sent for caller in load.callers)
        lost = sum(end.ear.counts["lost"] for end in itertools.chain[LoadCaller | LoadModel](load.callers, load.models))
        text = f"{passed:3.0f} s of {seconds:g}: {up} calls, {frames:,} frames sent"
        text += "" if load.real else f", {lost} lost"
        print(f"\r{text}" if ON_TERMINAL else f"{text}\n", end="", flush=True)
        await asyncio.sleep(min(1 if ON_TERMINAL else 5, seconds - passed))
    ours_s, (after_ms, mb), load.over = (time.process_time() - ours_s) / passed, used(pid), True
    for number, end in enumerate(await asyncio.gather(*talking, return_exceptions=True), 1):
        wrong += [f"call {number}: {end or type(end).__name__}"] * bool(end)
    await asyncio.sleep(0.3)  # what is under way arrives

    print("\r\033[K" * ON_TERMINAL, end="")
    callers = [caller for caller in load.callers if caller.stream_at]
    if not callers:
        return
    print(f"{len(callers)} call{'s' * (len(callers) > 1)} for {passed:.0f} s")
    if load.real:
        table_of_callers(callers)
    else:
        table_of_both_sides(callers, load.models, wrong)
    cpu_ms = (after_ms - before_ms) / passed / calls
    if math.isnan(cpu_ms + mb):
        row("CPU, memory", "not measured")
    else:
        row("CPU per call", f"{cpu_ms:.2f} ms a second", f"{cpu_ms / 10:.2f} % of a core")
        row("a full core takes", f"{1000 / cpu_ms:.0f} calls")
        row("a shared-cpu-1x", f"{BASELINE_MS / cpu_ms:.0f} calls", f"at {BASELINE_MS} ms a second")
        row("memory", f"{mb:.1f} MB in all", f"{(mb - idle_mb) / calls:.2f} MB per call")
    late_ms = percentile(load.late, 0.99)
    row("this harness", f"{ours_s:.0%} of a core", f"{late_ms:.2f} ms late (p99)")
    if late_ms > 10:
        print("  This computer was too busy to keep time: the delays are the harness's, more than the bridge's.")

    endings = []
    for caller in callers:
        endings.append(asyncio.create_task(caller.hangs_up()))
        await asyncio.sleep(0.005)
    await asyncio.gather(*endings, return_exceptions=True)
    await asyncio.sleep(0.5)
    if still_open := sum(not model.session.socket.close_code for model in load.models):
        wrong.append(f"{still_open} of the model's sessions are open 0.5 s after the hang-up")
    wrong += {fault for caller in callers for fault in caller.faults}
    wrong += ["a caller heard nothing: is there a greeting, and a model?"] * any(not c.sound_at for c in callers)
    wrong += ["speech came without marks"] * any(caller.sound_at and not caller.marks_asked for caller in callers)
    wrong += {f"OpenAI would refuse: {error}" for model in load.models for error in model.session.errors}


async def run(calls: int, seconds: float, url: str, log: Path) -> int:
    wrong: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: wrong.append(str(fault.get("exception", fault))))
    right = "nothing was lost" if calls else "all of it was right"
    try:
        if url:
            right = "all callers were answered and heard something"
            print("The callers are pretended, the model is the bridge's own: if that is OpenAI's, this costs money.")
            await play(Load(url, real=True), calls or 1, seconds, wrong)
        else:
            env = {"OPENAI_API_KEY": "pretend", "MAX_CALLS": str(calls or 1)}
            env |= {name: value for name, value in os.environ.items() if name == "HOOKS"}
            async with a_process(log, HERE, **env) as process:
                try:
                    if calls:
                        load = Load(f"http://127.0.0.1:{process.port}")
                        process.openai.on_dial = lambda session: LoadModel(load, session).run()
                        await play(load, calls, seconds, wrong, process.process.pid)
                    else:
                        await watch(process, seconds, wrong)
                finally:
                    if died := process.process.returncode is not None:
                        wrong.append(f"bridge.py ended by itself, with exit status {process.process.returncode}")
                if not died:
                    process.process.send_signal(signal.SIGTERM)
                    if status := await process.exits():
                        wrong.append(f"bridge.py ended with exit status {status}")
    except (AssertionError, ConnectionClosed, InvalidStatus, OSError) as fault:
        wrong.append(str(fault) or f"{type(fault).__name__}: bridge.py did not end, or something else not in time")
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    if any(re.search(r"^ERROR|^Traceback|\"level\": ?\"ERROR\"", line) for line in said):
        wrong.append("bridge.py logged an error")
    if wrong and said:
        notable = [line for line in said if not re.search(r"^INFO|\"level\": ?\"INFO\"|\"event\":", line)]
        print("\nWhat bridge.py said:", *(notable or said)[-10:], sep="\n    ")
    print()
    for wrong_thing in wrong[:10]:
        print(paint("31", f"wrong: {wrong_thing:.200}"))
    print(paint("31", f"{len(wrong)} wrong in all") if wrong else paint("32", right))
    return 1 if wrong else 0


def main() -> int:
    global LIMIT_S
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Telephone through bridge.py, in real time, with a pretend Twilio and a pretend OpenAI.

  python test_bridge.py                     one call to watch: its lines, their latency, a barge-in, the end
  python test_bridge.py --calls 50          many at once: what is lost, the delay that the bridge adds, CPU, memory
  python test_bridge.py --url https://…     callers only, to a bridge that is deployed, with the model that it has""",
        epilog="""\
Exit status: 0 if all was right, 1 if something was wrong, 2 for arguments that make no sense, 130 after Ctrl-C.
HOOKS chooses the hooks, as for bridge.py. With --url, calls are signed with TWILIO_AUTH_TOKEN, as Twilio signs them;
the callers are silent, so that the model says its greeting only. A bridge at http://127.0.0.1:… goes by the name in
PUBLIC_BASE_URL if that is set here and there.""",
    )
    parser.add_argument("--calls", type=int, metavar="N", help="so many at once, 1 to 300")
    parser.add_argument("--seconds", type=float, metavar="S", default=20, help="for so long (20)")
    parser.add_argument("--url", default="", help="of a deployed bridge; one call, unless --calls says more")
    asked = parser.parse_args()
    url = asked.url.rstrip("/")
    low = 2 if asked.calls or url else 8
    if asked.calls is not None and not 1 <= asked.calls <= 300:  # this harness has one core, too
        parser.error(f"--calls is {asked.calls}: give a number from 1 to 300")
    if not low <= asked.seconds <= 3000:
        parser.error(f"--seconds is {asked.seconds:g}: give a number from {low} to 3000")
    if url and not re.fullmatch(r"https://[^/?#@\s]+(/[^?#\s]*)?|http://(127\.0\.0\.1|localhost)(:\d+)?", url):
        parser.error(f"--url is {url!r}: give an address such as https://my-app.fly.dev, or http://127.0.0.1:8080")
    if url.startswith("https:") and not os.environ.get("TWILIO_AUTH_TOKEN"):
        parser.error("--url needs TWILIO_AUTH_TOKEN in the environment, the bridge's own: unsigned calls are refused")
    LIMIT_S = asked.seconds + 120
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the bridge is ended as after Ctrl-C
    try:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(run(asked.calls or 0, asked.seconds, url, Path(folder, "log")))
    except KeyboardInterrupt:
        print("\nstopped")
        return 130


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--seconds 8", (bridge.Settings().greeting, "barge-in", "all of it was right")),
        ("--calls 3 --seconds 2", ("3 calls for 2 s", "relay delay p99", "nothing was lost")),
    ],
)
def test_a_call_can_be_watched_and_many_can_be_measured(arguments: str, shown: tuple[str, ...]) -> None:
    command = [sys.executable, str(HERE / "test_bridge.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0 and all(text in done.stdout for text in shown), done.stdout + done.stderr


@pytest.mark.parametrize("arguments", ["--calls 0", "--calls x", "--seconds 1", "--url http://example.com"])
def test_arguments_that_make_no_sense_are_refused_with_a_line_that_says_why(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["test_bridge.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2 and arguments.split()[0] in capsys.readouterr().err.splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
