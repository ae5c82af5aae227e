"""bridge.py's tests, and at the end a program that calls it (`python test_bridge.py --help`).

First the state machines of a call as tables: no sockets, no sleeps, a clock that is turned. Then
sockets: `Twilio` is one caller, `OpenAI` the model's server, a `Session` one connection to it. They
are strict: a test fails when the bridge breaks a protocol, whatever it is about. `a_bridge` is
`bridge.run` between them in this process, `a_process` the same as a program.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import logging
import math
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

import pytest
from twilio.request_validator import RequestValidator
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import apply_mask
from websockets.http11 import Response

import bridge
from hooks import offline

HERE = Path(__file__).parent
CALLER, CALLED = "+819012345678", "+15005550006"
BASE, VOICE = "https://phone.example", "/twilio/voice"
SIGNED = {"twilio_auth_token": "12345, second", "public_base_url": BASE}
IN_PROGRESS = {"CallStatus": "in-progress"}
Object = dict[str, Any]
SID, STREAM = "CA" + "0" * 32, "MZ" + "0" * 32
LOUD, SILENCE, ROOM, HUM = b"\x90", b"\xff", b"\xf7", b"\xdf"  # mu-law: loud, none, faint, 32

# ── The clock, and both other sides ─────────────────────────────────────────────────────────────


class Turned(selectors.SelectSelector):
    """Instead of waiting for something to happen, it turns the clock to when it will."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing is left that could happen"
            self.now += max(0.0, timeout)
        return ready


def b64(mulaw: bytes) -> str:
    return base64.b64encode(mulaw).decode()


class FakeWire:
    """A connection that takes and gives JSON; the fence around a message is the bridge's own."""

    attempt, shut = bridge.Wire.attempt, bridge.Wire.shut
    most_unreadable = bridge.MAX_UNREADABLE
    handle: Callable[[str], object]
    take: Callable[[str], None]
    close_code, close_reason = 0, ""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.unreadable, self.waiting = scene, 0, list[str]()
        scene.wires.append(self)
        self.transport, self.paused, self.loop = self, False, scene.loop
        self.closed = self.loop.create_future()

    def put(self, *texts: bytes) -> None:
        for text in texts:
            self.take(text.decode())

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        waiting, self.waiting = self.waiting, []
        for text in waiting:
            self.loop.call_soon(self.feed, text)

    def feed(self, message: Object | str) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        if self.paused:
            self.waiting.append(text)
        elif not self.closed.done():
            self.attempt(text.encode(errors="surrogatepass"))

    async def read(self) -> None:
        await self.closed

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if not self.closed.done():
            self.close_code, self.close_reason = code, reason
            self.closed.set_result(None)


class FakeOpenAI(FakeWire):
    """Accepts the session. `mute`: says nothing at all. `hears`: notices a turn in what is sent."""

    def __init__(self, scene: Scene, *, mute: bool, hears: bool) -> None:
        super().__init__(scene)
        self.mute, self.hears, self.sound = mute, hears, b""

    def take(self, text: str) -> None:
        message, note, loop = json.loads(text), self.scene.note, asyncio.get_running_loop()
        if self.closed.done():
            return
        match kind := message["type"]:
            case "input_audio_buffer.append":
                self.sound += base64.b64decode(message["audio"])
                if self.hears and self.sound.count(LOUD) > 4000:
                    self.hears = False
                    for what in ("speech_started", "speech_stopped", "committed"):
                        event = {"type": f"input_audio_buffer.{what}", "item_id": f"u{id(self)}"}
                        loop.call_soon(self.feed, event)
            case "session.update":
                note("setup" if "audio" in message["session"] else "probe")
                session = {"audio": self.scene.bridge.session["audio"]} | message["session"]
                if not self.mute:
                    loop.call_soon(self.feed, {"type": "session.updated", "session": session})
            case "response.create":
                note("ask" + " without tools" * ("tool_choice" in message["response"]))
            case "response.cancel":
                note(f"cancel {message['response_id']}")
            case "conversation.item.truncate":
                note(f"truncate {message['item_id']} {message['audio_end_ms']}")
            case "conversation.item.create" if "call_id" in (item := message["item"]):
                output = re.sub("(?s)^Error.*", "Error", item["output"])
                note(f"output {item['call_id']} {output}".strip())
            case "conversation.item.create":
                note(f"{item['role']} {item['content'][0]['text']}")
            case _:
                raise AssertionError(f"the bridge sent {kind}")


class FakeTwilio(FakeWire):
    """Plays what it is given in order, and returns each mark when all before it was played."""

    def __init__(self, scene: Scene, *, marks: bool) -> None:
        super().__init__(scene)
        self.marks, self.ends_at, self.out = marks, 0.0, dict[str, asyncio.TimerHandle]()
        self.given, self.timestamp_ms = b"", 0

    def take(self, text: str) -> None:
        message, loop = json.loads(text), asyncio.get_running_loop()
        assert message["streamSid"] == STREAM
        match message["event"]:
            case "media":
                sound = base64.b64decode(message["media"]["payload"])
                self.given += sound
                self.ends_at = max(self.ends_at, loop.time()) + len(sound) / 8000
                self.scene.note(f"media {len(sound) // 8}")
            case "mark":
                name = message["mark"]["name"]
                self.out[name] = loop.call_at(self.ends_at, self.play_mark, name)
            case "clear":
                self.ends_at = loop.time()
                self.scene.note("clear")
                for name, timer in list(self.out.items()):
                    timer.cancel()
                    loop.call_soon(self.play_mark, name)

    def play_mark(self, name: str) -> None:
        if self.out.pop(name, None) and self.marks:
            self.feed({"event": "mark", "streamSid": STREAM, "mark": {"name": name}})

    def frame(self, mulaw: bytes, skip_ms: int = 0) -> None:
        at = self.timestamp_ms + skip_ms
        self.timestamp_ms = at + len(mulaw) // 8
        media = {"track": "inbound", "chunk": "1", "timestamp": str(at), "payload": b64(mulaw)}
        self.feed({"event": "media", "sequenceNumber": "1", "media": media, "streamSid": STREAM})


class Spy(bridge.Hooks):
    """In place of hook files: keeps what they would be told, and has tools of its own."""

    def __init__(self, note: Callable[[str], object] = str) -> None:
        super().__init__(Path("/nowhere"), "")
        self.note, self.told, self.calls = note, list[tuple[str, Object]](), list[Any]()
        self.pages = {"/page": lambda: "secret"}
        names = ("add", "slow", "endless", "note", "quits", "closes", "cancels", "bye")
        schema = {"parameters": {"properties": {}}}
        self.functions = {name: (functools.partial(self.tool, name), schema) for name in names}

    async def tool(self, name: str, call: Any) -> Any:
        match name:
            case "slow" | "endless":
                await asyncio.sleep(6 if name == "slow" else 1000)
            case "quits" | "closes":
                raise KeyboardInterrupt if name == "quits" else GeneratorExit
            case "cancels":
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
            case "bye":
                call.hang_up()
        return {"add": "3", "slow": "at last", "bye": "done"}.get(name)

    def emit(self, event: str, call: Any, at: float, facts: Object) -> None:
        self.told.append((event, facts))
        self.calls += [call] * (event == "call_started")
        hidden = ("error", "mulaw", "seconds", "model")
        shown = [value for key, value in facts.items() if key not in hidden]
        self.note(" ".join([event, *map(str, shown)]).strip())

    def facts(self, event: str) -> list[Object]:
        return [facts for name, facts in self.told if name == event]

    async def ended(self, count: int = 1, within_s: float = 6) -> str:
        """The reason of the last call_ended."""
        await until(lambda: len(self.facts("call_ended")) >= count, within_s, "call_ended")
        return str(self.facts("call_ended")[-1]["reason"])


class Office(bridge.Bridge):
    """The bridge, but what it connects to is the scene's."""

    scene: Scene

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[FakeOpenAI]:
        scene = self.scene
        plan = scene.plans.pop(0) if scene.plans[1:] else scene.plans[0]
        scene.dials += 1
        scene.note("dial")
        if plan == "hang":
            await asyncio.Future()
        elif plan == "reset":
            raise ConnectionResetError("reset by peer")
        elif plan.startswith("http"):
            _, status, *body = plan.split()
            raise InvalidStatus(Response(int(status), "", Headers(), " ".join(body).encode()))
        scene.openai = FakeOpenAI(scene, mute="mute" in plan, hears="hears" in plan)
        yield scene.openai

    def ended(self, *what: Any) -> None:
        super().ended(*what)
        verbs = re.findall("<(Say|Dial|Hangup)", self.past[SID].twiml)
        self.scene.note(" ".join(["end", *verbs[:1]]))


class Scene:
    """One call, what is done to it, and what it does: `trace` has the time and a line for each."""

    openai: FakeOpenAI
    twilio: FakeTwilio
    call: bridge.Call

    def __init__(self, *, opening: str = "greeted", plan: str = "", **more: Any) -> None:
        self.marks, self.caller = more.pop("marks", True), more.pop("caller", "+819012345678")
        self.trace, self.wires = list[tuple[float, str]](), list[FakeWire]()
        self.opening, self.dials, self.plans = opening, 0, plan.split(", ")
        self.hooks = Spy(self.note)
        if more.pop("listens", False):
            self.hooks.handling |= {"caller_audio": [None], "model_audio": [None]}  # type: ignore
        more = {"greeting": "どうぞ。", "openai_realtime_url": "ws://localhost", **more}
        settings = bridge.Settings(public_base_url="https://bridge.test", **more)
        self.bridge = Office(settings, self.hooks)
        self.bridge.scene = self
        self.zero, self.loop = 0.0, asyncio.get_running_loop()

    def note(self, line: str) -> None:
        self.trace.append((self.loop.time() - self.zero, line))

    def event(self, kind: str, **content: Any) -> None:
        self.openai.feed({"type": kind, "event_id": "e", **content})

    async def open(self) -> None:
        """Up to the script's time 0: dialled only, the stream open, or the greeting heard."""
        self.zero, request = self.loop.time(), SimpleNamespace(headers={}, path="/twilio/voice")
        form = {"CallSid": SID, "From": self.caller, "To": "+81311112222"}
        self.bridge.begin(form, request)  # type: ignore[arg-type]
        self.call = self.bridge.calls[SID]
        await asyncio.sleep(0.25)
        if self.opening != "dialled":
            self.start()
        if self.opening == "greeted":
            self.do("says", "g g 1000 どうぞ。")
            await asyncio.sleep(1.75)
        if self.opening != "open":
            self.trace.clear()
        self.zero = self.loop.time()

    def start(self) -> None:
        self.twilio = FakeTwilio(self, marks=self.marks)
        self.call.open_stream(self.twilio, STREAM)  # type: ignore[arg-type]

    async def run(self, script: str, until: float) -> None:
        await self.open()
        steps = [(step.strip() + "  ").split(" ", 2) for step in script.split(";") if step.strip()]
        for at, verb, rest in sorted(steps, key=lambda step: float(step[0])):
            await asyncio.sleep(self.zero + float(at) - self.loop.time())
            self.do(verb, rest.strip())
        await asyncio.sleep(self.zero + until - self.loop.time())

    async def hang_up(self) -> None:
        """The end that each call comes to: started and ended are told once."""
        if hasattr(self, "twilio"):
            self.twilio.feed({"event": "stop", "streamSid": STREAM})
        self.call.end("caller hung up")
        await asyncio.wait_for(self.call.life, 3)
        told = [event for event, _ in self.hooks.told]
        ends = [n for n, event in enumerate(told) if event in ("call_started", "call_ended")]
        assert ends == ([0, len(told) - 1] if told else []) and not self.bridge.calls

    def do(self, verb: str, rest: str) -> None:
        (name, _, more), response = rest.partition(" "), dict[str, Any]()
        match verb:
            case "":  # only time passes
                pass
            case "start":
                self.start()
            case "stop":
                self.twilio.feed({"event": "stop", "streamSid": STREAM})
            case "lost":
                self.call.end("twilio lost")
            case "over":  # an answer of 5 s, and after 1 s so many ms of the caller's voice over it
                ms, hush, stop_s = (rest + " 2000 0.5").split()[:3]
                end_s = 1 + int(ms) / 1000
                steps = f"1.2 begins u; {end_s} hush {hush}; {end_s + float(stop_s)} stops u"
                self.do("says", "r a 5000 あいうえおかきくけこ")
                for step in f"0 hush 1000; 1 voice {ms}; {steps}".split("; "):
                    at_s, *what = step.split()
                    self.loop.call_later(float(at_s), self.do, *what)
            case "bye":  # an answer of 3 s, and a hang-up
                self.do("says", "r a 2000" if more else "r a 3000")
                self.do(name or "hang_up", more)
            case "key":
                self.twilio.feed({"event": "dtmf", "dtmf": {"digit": name}})
            case "voice" | "hush" | "hum":  # ms of the caller's audio, as time passes
                sound = {"voice": LOUD, "hum": HUM}.get(verb, SILENCE)
                for at_ms in range(0, int(name), 20):
                    self.loop.call_later(at_ms / 1000, self.twilio.frame, sound * 160)
            case "gap":  # ms that Twilio leaves out
                self.twilio.frame(SILENCE * 160, int(name))
            case "begins" | "stops" | "commits":
                self.event(f"input_audio_buffer.{BUFFER[verb]}", item_id=name)
            case "words" | "nowords":
                kind = "completed" if verb == "words" else "failed"
                facts = {"transcript": more, "usage": 1, "error": {"code": "c"}}
                kind = f"conversation.item.input_audio_transcription.{kind}"
                self.event(kind, item_id=name, **facts)
            case "turn":  # a whole one, whose words come at once
                for each in ("begins", "stops", "commits", "words"):
                    self.do(each, f"{name} {more or '今日は晴れますか'}")
            case "created":
                self.event("response.created", response={"id": name, "status": "in_progress"})
            case "sound":  # response, item, ms, words
                item, ms, text = (more + " ").split(" ")[:3]
                where = {"response_id": name, "item_id": item, "content_index": 0}
                kind = "response.output_audio"
                if text:
                    self.event(f"{kind}_transcript.delta", delta=text, **where)
                for at in range(0, int(ms), 200):
                    delta = b64(HUM * 8 * min(200, int(ms) - at))
                    self.event(f"{kind}.delta", delta=delta, **where)
                if text:
                    self.event(f"{kind}_transcript.done", transcript=text, **where)
            case "life":  # an event of the response that is no sound
                self.event("response.content_part.added", response_id=name, item_id="x", part={})
            case "done":
                status, _, why = more.partition(" ")
                response = {"id": name, "status": status or "completed", "output": [], "usage": 2}
                error = {"error": {"code": why, "type": "x", "message": "m"}}
                response["status_details"] = error if status == "failed" else {"reason": why}
                self.event("response.done", response=response)
            case "calls":  # tools, each as name:call_id, or name:call_id:status ("-": none)
                output = []
                for tool, call_id, *status in (one.split(":") for one in more.split(" ")):
                    item = {"type": "function_call", "name": tool, "call_id": call_id}
                    item |= {"arguments": "{}", "status": (status or ["completed"])[0]}
                    output.append({key: value for key, value in item.items() if value != "-"})
                response = {"id": name, "output": output, "status": "completed"}
                self.event("response.done", response=response)
            case "starts" | "says" | "tools":
                for step in WHOLE[verb].format(name, rest).split("; "):
                    self.do(*step.split(" ", 1))
            case "error":
                error = {"code": name, "type": name, "message": "m", "event_id": more or None}
                self.event("error", error=error)
            case "closes":
                self.loop.create_task(self.openai.close(int(name), more))
            case "mute" | "hears":
                self.openai.mute, self.plans = verb == "mute", [verb.replace("hears", "")]
            case "hang_up" | "transfer" | "tell_model" | "interrupt":
                getattr(self.call, verb)(*filter(None, [rest]))
            case "play":
                self.call.play(ROOM * 8 * int(name))
            case "busy":
                self.note(f"busy {self.call.busy}")
            case "shutdown":
                self.call.end_when_heard("shutdown", bridge.say(bridge.RESTARTING), final=True)
            case _:
                raise AssertionError(f"no such step: {verb}")


WHOLE = {"starts": "created {0}; sound {1}", "says": "created {0}; sound {1}; done {0}"}
WHOLE |= {"tools": "created r; calls r {1}"}  # a response that only calls them
BUFFER = {"begins": "speech_started", "stops": "speech_stopped", "commits": "committed"}
OFF = math.inf  # BARGE_IN_MS
WATCHED = "ask cancel truncate clear setup probe output end"


def turned(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it in a loop whose clock is turned; what is raised in a callback fails the test."""
    clock, wrong = Turned(), list[Object]()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    loop.set_exception_handler(lambda _, context: wrong.append(context))
    with mock.patch.object(bridge, "monotonic", loop.time):
        try:
            result = loop.run_until_complete(work)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.1))
            loop.close()
    assert not wrong
    return result


def play(script: str, expected: str = "", watch: str = WATCHED, **options: Any) -> Scene:
    """Play `time verb …; …` and compare what the watched lines of the trace are, and when.

    Times are in seconds since the greeting was heard, and right within 0.26 s. What is not
    expected must not come, up to a second after the last step or expectation.
    """
    within = options.pop("within", 0.26)
    expected = re.sub(r"(\S+) cut (\w+ \d+)", r"\1 clear; \1 truncate \2", expected)
    expected = re.sub(r"(\S+) renew", r"\1 setup; \1 ask", expected)
    expected = re.sub("([A-Z]+_[A-Z]+) ?", lambda name: getattr(bridge, name[1]), expected)
    wanted = [step.lstrip().partition(" ")[::2] for step in expected.split(";") if step.strip()]
    steps = [step.split()[0] for step in f"{script};{expected}".split(";") if step.strip()]

    async def go() -> tuple[Scene, list[tuple[float, str]]]:
        scene = Scene(**options)
        await scene.run(script, max(map(float, steps)) + 1)
        seen = [(at, line) for at, line in scene.trace if line.split()[0] in watch.split()]
        await scene.hang_up()
        return scene, seen

    scene, seen = turned(go())
    right = [line for _, line in seen] == [line for _, line in wanted]
    for (at, _), (wanted_at, _) in zip(seen, wanted, strict=False):
        right = right and abs(at - float(wanted_at)) <= within
    shown = "; ".join(f"{round(at, 2):g} {line}" for at, line in seen)
    assert right, f"\n  seen: {shown}\nwanted: {expected}"
    assert not any(wire.unreadable for wire in scene.wires), "a message raised"
    assert "" not in [*scene.call.history, *(facts.get("item") for _, facts in scene.hooks.told)]
    return scene


def table(rows: str) -> Any:
    """Rows of `name | script | what is expected | options`; deeper lines go on with a row."""
    params = []
    for row in filter(None, map(str.strip, re.sub(r"\n {8,}", " ", rows).split("\n"))):
        name, script, expected, options = (*map(str.strip, row.split("|")), "", "")[:4]
        more = eval(f"dict({options})", globals())
        params.append(pytest.param(script, expected, more, id=name))
    return pytest.mark.parametrize(("script", "expected", "options"), params)


def plays(text: str) -> Any:
    """A test that plays each row; in its first line is the fact, and options of all rows."""
    head, _, rows = re.sub(r"\n {8,}", " ", text).partition("\n")
    fact, _, options = head.partition(" | ")

    def test(script: str, expected: str, options: Object) -> None:
        play(script, expected, **common | options)

    common, test.__doc__ = eval(f"dict({options})", globals()), fact
    return table(rows)(test)


# ── Playback ────────────────────────────────────────────────────────────────────────────────────


def playback(script: str) -> list[str]:
    """Play `time verb …` on a Playback, in ms and seconds; `verb = value` steps are looked at."""
    line, seen, items = bridge.Playback(), list[str](), dict[str, bridge.Item]()
    for step in map(str.strip, script.split(";")):
        at, verb, *rest = step.partition(" =")[0].split(" ")
        now, value = 100 + float(at), ""
        match verb:
            case "add":
                name, _, response = rest[0].partition("/")
                item = items.setdefault(name, bridge.Item(name, response))
                line.add(line.items.setdefault(name, item), int(rest[1]) * 8, now)
                continue
            case "mark":
                line.mark_returned(int(rest[0]) * 8, now)
                continue
            case "heard":
                value = str(round(line.sent / 8 - line.left_s(now) * 1000))
            case "left":
                value = f"{round(line.left_s(now), 3):g}"
            case _:  # cut, settle
                known = line.cut(now) if verb == "cut" else line.settle(now, "".join(rest))
                value = " ".join(f"{item.id}:{item.heard_ms}" for item in known)
        seen.append(f"{step.partition(' =')[0]} = {value}".strip())
    return seen


@table("""
    nothing sent | 0 heard = 0; 0 left = 0; 0 cut =; 0 settle =
    the clock between two marks | 0 add a 1000; 0.25 heard = 250; 0.25 left = 0.75
    no mark, no more than was sent | 0 add a 400; 0.5 heard = 400; 0.5 left = 0
    a mark, and one of nobody | 0 add a 200; 0 add a 200; 0.2 mark 200; 0.2 mark 9; 0.3 heard = 300
    a mark that is late | 0 add a 400; 0 add a 400; 0.5 mark 400; 0.6 heard = 500; 0.6 cut = a:500
    one mark for all before it | 0 add a 200; 0 add a 200; 0.4 mark 400; 0.4 heard = 400
    a mark twice | 0 add a 200; 0 add a 200; 0.2 mark 200; 0.3 mark 200; 0.3 heard = 300
    sound after a pause | 0 add a 200; 0.2 mark 200; 1 add a 200; 1.1 left = 0.1
    a stall at Twilio | 0 add a 200; 0 add a 200; 0.7 mark 200; 0.8 left = 0.1
    cut when all was heard | 0 add a 400; 0.4 mark 400; 0.4 cut =
    cut while the last mark is on its way | 0 add a 400; 0.45 cut =
    cut twice | 0 add a 400; 0.1 cut = a:100; 0.2 cut =; 0.2 settle = a:100
    flushed marks | 0 add a 200; 0 add a 200; 0.1 cut = a:100; 0.1 mark 200; 0.1 mark 400; 0.1 add b
        400; 0.2 heard = 500; 0.2 left = 0.3
    the next after a cut | 0 add a 1000; 0.5 cut = a:500; 0.5 settle = a:500; 1 add b 400; 1.1 cut =
        b:100
    settled by its mark | 0 add a 200; 0.1 settle =; 0.2 mark 200; 0.2 settle = a:None; 0.3 settle =
    not while more of it comes | 0 add a/r 200; 0.2 mark 200; 0.2 settle r =; 0.3 settle s = a:None
    settled by the clock after 2 s | 0 add a 200; 2.1 settle =; 2.3 settle = a:None; 2.3 heard = 200
    the clock after the last of all | 0 add a 200; 1 add b 2000; 3 settle =; 5.1 settle = a:None
        b:None
""")
def test_playback(script: str, expected: str, options: Object) -> None:
    """What the caller has heard, by a clock that marks set right: never beyond what was sent."""
    assert playback(script) == [step.strip() for step in script.split(";") if " =" in step]


def test_heard_text() -> None:
    """Of a cut item the share of its words that was heard, of all that OpenAI made."""
    for made_ms, heard_ms, heard in (1000, None, 10), (1000, 500, 5), (2000, 500, 2), (0, 0, 0):
        item = bridge.Item("a", made=made_ms * 8, text="あいうえおかきくけこ", heard_ms=heard_ms)
        assert item.heard_text == item.text[:heard]


# ── The caller's audio ──────────────────────────────────────────────────────────────────────────


@table("""
    in order | 0 20 40 | 0 0 0
    the first timestamp is where it begins | 500 520 | 0 0
    30 ms of jitter | 0 50 | 0 0
    40 ms are a gap | 0 60 | 0 40
    jitter that adds up | 0 50 90 | 0 0 50
    twice the same | 0 0 40 | 0 0 0
    backwards | 100 0 140 | 0 0 0
    none | 0 -1 40 | 0 0 0
""")
def test_gaps(script: str, expected: str, options: Object) -> None:
    """Time that Twilio's timestamps leave out is missing from 40 ms on: filled with silence."""
    audio, gaps = bridge.CallerAudio(), list[int]()
    for at in script.split():
        payload, gap_ms = audio.take(b64(HUM * 160).encode(), int(at), 0.0)
        gaps.append(gap_ms)
        assert payload == audio.kept[-1] == b64(SILENCE * 8 * gap_ms + HUM * 160).encode()
    assert gaps == [int(gap) for gap in expected.split()]


def test_kept_audio() -> None:
    """A second while nobody speaks; a turn as a whole, at most a minute; then what comes after."""
    audio = bridge.CallerAudio()

    def kept(count: int, needed: bool = False) -> tuple[int, int, int]:
        for _ in range(count):
            audio.take(b64(SILENCE * 160).encode(), audio.position_ms, 0.0)
        audio.trim(needed)
        return len(audio.kept), audio.turn, audio.dropped

    assert kept(150) == (50, 0, 0)
    audio.turn = kept(1000, needed=True)[0]
    assert kept(100) == (1150, 1050, 0)  # the turn is over, but neither known in words nor answered
    audio.forget_turn()
    assert kept(0) == (50, 0, 0)
    assert kept(3050, needed=True) == (3000, 0, 100)
    audio.turn = 500
    assert kept(250, needed=True) == (3000, 250, 350)
    audio.forget_turn()
    assert kept(0, needed=True) == (2750, 0, 0)


@table("""
    silence | f30 | 0
    hum in a silent call | f30 n4 | 80
    hum all the time | n50 | 0
    hum, and after a while it is the noise | f30 n400 | 0
    a voice above the hum | n50 v4 | 80
    one silent frame is not the noise | n50 f1 n5 | 0
    faint is no voice in silence either | f50 r50 | 0
    a stop inside a word | f50 v2 f10 v2 | 280
    a pause is no voice | f50 v2 f10 | 40
    a longer pause ends it | f50 v2 f11 | 0
    a long voice | f50 v20 | 400
    an empty frame | f50 v2 e1 v2 | 80
""")
def test_voice(script: str, expected: str, options: Object) -> None:
    """So many ms of voice without a pause of over 200 ms; voice is 6 dB above the call's noise."""
    sound = {"f": SILENCE * 160, "r": ROOM * 160, "n": HUM * 160, "v": LOUD * 160, "e": b""}
    audio = bridge.CallerAudio()
    for step in script.split():
        for _ in range(int(step[1:])):
            audio.take(b64(sound[step[0]]).encode(), audio.position_ms, 0.0)
    audio.listen(len(audio.kept), 1, 0.0)
    assert audio.voice_ms == float(expected)


def test_gap_in_a_voice() -> None:
    """A gap is a pause."""
    audio = bridge.CallerAudio()
    for at, loud in [(n * 20, n >= 50) for n in range(60)] + [(1500, True), (1520, True)]:
        audio.take(b64((LOUD if loud else SILENCE) * 160).encode(), at, at / 1000)
        audio.listen(1, 1, at / 1000)
    assert (audio.voice_ms, audio.voice_at) == (20, 1.52)


# ── session.update ──────────────────────────────────────────────────────────────────────────────

PATCHES: list[tuple[Any, Any, Any]] = [  # examples of RFC 7396, and then of our own
    ({"a": "b"}, {"a": None}, {}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ({"v": {"type": "s", "x": 1}}, {"v": {"type": "t"}}, {"v": {"type": "t"}}),
    ({"v": {"type": "s"}}, {"v": {"type": "s", "y": 2}}, {"v": {"type": "s", "y": 2}}),
    ({"v": {"type": "s", "x": 1}}, {"v": {"x": 2}}, {"v": {"type": "s", "x": 2}}),
]


def test_merge_patch() -> None:
    """RFC 7396, but an object whose `type` changes is replaced."""
    for target, patch, result in PATCHES:
        assert bridge.merge_patch(target, patch) == result, (target, patch)


def session(model: str = "gpt-realtime-2.1", tools: Any = (), **more: Any) -> Object:
    return bridge.session_update(bridge.Settings(**more), model, list(tools))[0]


def test_session_update() -> None:
    """The GA form, for a telephone, as a whole: OpenAI refuses one with an unknown key."""
    tool = {"type": "function", "name": "f"}
    vad = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300}
    vad |= {"silence_duration_ms": 500, "create_response": True, "interrupt_response": False}
    pcmu, words = {"type": "audio/pcmu"}, {"model": "gpt-transcribe"}
    wanted = {"type": "realtime", "output_modalities": ["audio"], "instructions": "Be brief."}
    wanted |= {"reasoning": {"effort": "low"}, "tools": [tool], "tool_choice": "auto"}
    hears = {"format": pcmu, "turn_detection": vad, "transcription": words}
    wanted |= {"audio": {"input": hears, "output": {"format": pcmu, "voice": "marin"}}}
    assert session(instructions="Be brief.", tools=[tool]) == wanted
    names = "gpt-realtime-2.1 gpt-realtime-2 gpt-realtime-2-mini gpt-realtime gpt-realtime-20"
    assert ["reasoning" in session(name) for name in names.split()] == [True] * 3 + [False] * 2
    assert "transcription" not in session(transcription_model="")["audio"]["input"]
    other = session(session=turns({"type": "semantic_vad"}))["audio"]["input"]["turn_detection"]
    assert other == {"type": "semantic_vad", "create_response": True, "interrupt_response": False}


def turns(patch: Any) -> Object:
    return {"audio": {"input": {"turn_detection": patch}}}


@table("""
    the default | 400 | False 400 | patch={}
    at once | 0 | True 0 | patch={}
    never | inf | False inf | patch={}
    its own true | 400 | True 0 | patch=turns({"interrupt_response": True})
    its own false | 400 | False inf | patch=turns({"interrupt_response": False})
    another turn detection | 400 | False 400 | patch=turns({"type": "semantic_vad"})
""")
def test_interrupt_response(script: str, expected: str, options: Object) -> None:
    """Above 0 the bridge interrupts. SESSION's own word wins: false is off, true is 0."""
    settings = bridge.Settings(barge_in_ms=float(script), session=options["patch"])
    made, ms = bridge.session_update(settings, "", [])
    interrupts = made["audio"]["input"]["turn_detection"]["interrupt_response"]
    assert f"{interrupts} {ms:g}" == expected


# ── Nobody is left in silence ───────────────────────────────────────────────────────────────────

test_silence = plays("""What does not come: asked for at 1.5 s, at 4 s, in a new session; apology.
    turn without a response | 0 turn u | 1.5 ask; 4 ask; 6.5 renew; 9 end Say
    turn without words | 0 begins u; 0 stops u | 1.5 ask; 4 ask; 6.5 renew; 9 end Say
    response.created, then nothing | 0 turn u; 1 created r | 7.2 cancel r; 7.2 ask; 9.8 ask;
        12.5 renew; 15 end Say
    a second of sound, then nothing | 0 starts r a 1000 はれです | 6.2 cancel r; 6.2 ask; 8.8 ask;
        11.5 renew; 14 end Say
    a sign of life each 5 s | 0 created r; 5 life r; 10 life r; 15 life r; 20 sound r a 1000;
        20 done r; 25
    life without end | 0 turn u; 0.5 created r; 5 life r; 10 life r; 15 life r; 20 life r | 20 end
        Say
    text only | 0 turn u; 1 created r; 1 life r; 1 done r; 2.4 says s b 500
    failed | 0 turn u; 1 created r; 1 done r failed server_error; 2 | 2.5 ask
    cancelled although nobody spoke | 0 turn u; 1 created r; 1 done r cancelled x; 2 | 2.5 ask
    failed in mid-sentence | 0 starts r a 1000 はれです; 1 done r failed server_error; 9
    answers without sound for ever | 0 turn u; 1 created r; 1 done r; 3 created s; 3 done s;
        6 created t; 6 done t; 9 created v; 9 done v | 2.5 ask; 5 ask; 7.8 renew; 10.5 end Say
    three texts of hooks at once | 0 tell_model x; 0 tell_model y; 0 tell_model z; 0.3 says r a 9; 9
        | 0 ask
    rate limit in place of a response | 0 turn u; 0.1 error rate_limit_exceeded; 2 | 1.5 ask
    rate limit for what was asked | 0 turn u; 1.6 error rate_limit_exceeded; 5 | 1.5 ask; 4 ask
    owed while it speaks | 0 created r; 0.5 sound r a 100; 1 tell_model x; 1.2 sound r a 100;
        1.5 done r; 1.6 says s b 9; 9 | 1.5 ask
    after an answer the ladder begins anew | 0 turn u; 4.1 says r a 9; 10 created s; 10 done s;
        11.6 says t b 1; 30 | 1.5 ask; 4 ask; 11.5 ask
    committed only | 0 begins u; 1 commits u; 2.6 says r a 500; 5 | 2.5 ask
    a caller who asks whether somebody is there | 0 turn u; 4.2 turn v もしもし; 8.4 turn w
        もしもし; 12.6 turn x もしもし; 16.8 turn y もしもし; 20 | 1.5 ask; 4 ask; 6 renew; 10 end
        Say
    a turn that only its sound tells | 0 hush 500; 0.5 voice 600; 1.1 hush 500; 0.6 begins u;
        1.6 stops u; 9 | 3.2 ask; 5.8 ask; 8.5 setup; 11 ask; 13.5 end Say
    a turn that each session hears | 0 voice 600; 0.6 hush 1000 | 2 ask; 4.5 ask; 7.2 setup;
        8.8 ask; 11.2 end Say | plan="hears"
    asked for while the caller speaks | 0 begins u; 0.5 tell_model x; 5 stops u; 6 | 6.5 ask
""")

test_greeting = plays("""8 s from the stream to the first sound, or the apology. | opening="open"
    heard | 0.5 says g g 1000; 30 | 0 renew
    made before the stream | 0 says g g 1000; 2 start; 30 | | opening="dialled"
    never made | | 0 renew; 2.5 ask; 5.2 renew; 7.8 end Say
    server without any event | | 0 setup; 8 end Say | plan="mute"
    line that takes no dial | | 8 end Say | plan="hang"
    a sound at 7.9 s | 7 created g; 7.9 sound g g 500; 8 done g; 20 | 0 renew; 2.5 ask; 5.2 renew
    life without a sound | 1 created g; 5 life g; 7 life g | 0 renew; 8 end Say
    dials that are reset | | 8 end Say | plan="reset"
    up late | 3 says g g 900; 9 | 2 renew | plan="reset, reset, http 500, http 429, ", within=1
    401 | | 0 end Say | plan="http 401"
    an error before it is ready | 0 error server_error | 0 setup; 0.3 setup; 8 end Say | plan="mute"
    429 that is no rate limit | | 0 end Say | plan="http 429 insufficient_quota"
    no greeting | 30 | 0 setup | greeting=""
    8 s count from the stream | 6 start; 13 says g g 500; 20 | 8.5 ask; 11.2 renew |
        opening="dialled"
""")


def test_last_cause() -> None:
    """`model_failed` says why there is no session, and each cause once."""
    scene = play("9", "8 end Say", opening="open", plan="http 503")
    errors = [facts["error"] for event, facts in scene.hooks.told if event == "model_failed"]
    assert len(errors) <= 3 and "503" in errors[-1] and errors[-1].endswith("hears an apology")


test_tools = plays("""Outputs are sent, one response is asked for; a tool ends how it likes.
    one | 0 tools add:c; 0.1 says s a 500; 9 | 0 output c 3; 0 ask
    two, asked once | 0 tools add:c slow:d; 6.1 says s a 9 | 0 output c 3; 6 output d at last; 6 ask
    that wants no answer | 0 tools note:c; 20 | 0 output c
    one of two wants none | 0 tools note:c add:d; 0.5 says s a 9 | 0 output c; 0 output d 3; 0 ask
    without status | 0 tools add:c:-; 0.1 says s a 9 | 0 output c 3; 0 ask
    without a name | 0 tools -:c; 0.1 says s a 9 | 0 output c Error; 0 ask
    incomplete | 0 turn u; 1 created r; 1 calls r add:c:incomplete; 2 | 2.5 ask
    that raises KeyboardInterrupt | 0 tools quits:c; 0.1 says s a 9 | 0 output c Error; 0 ask
    that raises GeneratorExit | 0 tools closes:c; 0.1 says s a 9 | 0 output c Error; 0 ask
    that cancels itself | 0 turn u; 0 tools cancels:c; 0.1 says s a 9 | 0 output c Error; 0 ask
    of 20 s | 0 tools endless:c; 20.1 says s a 9 | 20 output c Error; 20 ask
    others meanwhile | 0 tools slow:c; 1 tools note:d; 7 | 1 output d; 6 output c at last; 6 ask
    while the caller speaks | 0 tools slow:c; 5 begins u; 8 stops u; 9 says s a 9 | 6 output c at
        last
    of a response that was cut | 0 starts r a 3000; 1 interrupt; 1.1 calls r add:c; 3 | 1 cancel r;
        1 cut a 1000; 1.1 output c The caller spoke over this, so it was not done.
""")


def test_tool_limits() -> None:
    """At most 16 tools of a response; after 8 rounds without a sound the model has to speak."""
    calls = " ".join(f"add:c{n}" for n in range(20))
    outputs = "; ".join(f"0 output c{n} 3" for n in range(16))
    play(f"0 tools {calls}; 0.1 says s a 9", outputs + "; 0 ask")
    rounds = "; ".join(f"{n} created r{n}; {n} calls r{n} add:c{n}" for n in range(9))
    asks = [f"{n} output c{n} 3; {n} ask" + " without tools" * (n == 7) for n in range(8)]
    play(rounds, "; ".join([*asks, "9.5 ask without tools"]))
    with_sound = rounds.replace("6 calls", "6 sound r6 a 100; 6 calls")
    play(with_sound, "; ".join(asks).replace(" without tools", "") + "; 8 output c8 3; 8 ask")


test_session = plays("""A silent session is asked, and replaced after 8 s; a lost one at once.
    deaf after an answer | 0 mute; 0 hush 500; 0.5 voice 1000; 1.5 hush 9000; 16 | 3.7 probe;
        12 setup; 19.8 end Say | within=0.5
    deaf, and the next one is not | 0 mute; 0 hush 500; 0.5 voice 1000; 1.5 hush 9000; 11 hears |
        3.7 probe; 12 setup; 12.2 ask | within=0.5
    alive | 0 hush 500; 0.5 voice 1000; 1.5 hush 9000; 20 | 3.7 probe | within=0.5
    a caller who is silent | 0 mute; 0 hush 9000; 20
    a caller in a hum | 0 mute; 0 hum 3000; 3 hush 6000; 20
    deaf when asked | 0 tell_model x; 0.1 mute | 0 ask; 2.5 ask; 5 setup; 13 end Say | within=0.5
    lost while nobody speaks | 0 closes 1006; 30 | 0.25 setup
    lost while it speaks | 0 starts r a 1000; 0.5 closes 1006; 0.9 says s b 500; 9 | 0.75 renew
    lost before it answers | 0 turn u はれ; 0.5 closes 1006; 1 says s b 500; 9 | 0.75 renew
    lost in its first 2 s, again | 0 closes 1006; 1 closes 1006; 2 closes 1006; 30 | 0.2 setup;
        1.2 setup; 2.5 setup | within=0.6
    lost for good | 0 turn u; 0 mute; 0.5 closes 1006 | 0.75 setup; 8.5 end Say | within=0.5
    lost within the hang-up | 0 says r a 3000; 0 hang_up; 1 closes 1006; 4 | 1.25 setup; 3 end
        Hangup
    quota | 0 turn u; 1 error insufficient_quota | 1 end Say
    credit | 0 turn u; 1 error credit_balance_exhausted | 1 end Say
    quota in a response | 0 turn u; 1 created r; 1 done r failed insufficient_quota | 1 end Say
    close 4004 | 0 closes 4004 no model | 0 end Say
    close 3000 | 0 closes 3000 invalid_request_error | 0 end Say
""")


@table("""
    both sides | 0 turn u はれですか; 0 says r a 500 はれです; 2 closes 1006; 3 |
        どうぞ。/はれですか/はれです
    the share that was heard | 0 turn u はい; 0.1 starts r a 1000 あいうえお; 0.5 interrupt;
        2 closes 1006; 3 | どうぞ。/はい/あい
    all of what still plays | 0 turn u はい; 0 starts r a 1000 あいうえお; 0.5 closes 1006; 0.9 says
        s b 9 | どうぞ。/はい/あいうえお
    words that came late | 0 begins u; 0 stops u; 0 commits u; 0 says r a 500 あお; 1 words u はい;
        2 closes 1006; 3 | どうぞ。/はい/あお
    words of an answer that come late | 0 turn u はい; 0 starts r a 500; 0.1 turn v うん; 0.2 sound
        r a 100 あお; 0.3 done r; 3 closes 1006; 4 | どうぞ。/はい/あお/うん
    words before their place | 0 begins u; 0 stops u; 0 words u はい; 0.1 commits u; 0.1 says r a
        500 あ; 2 closes 1006; 3 | どうぞ。/はい/あ
    a hook's text | 0 tell_model x; 0 says r a 500 あ; 2 closes 1006; 3 | どうぞ。/x/あ
    not heard at all | 0 starts r a 1000 あ; 0 interrupt; 2 closes 1006; 3 | どうぞ。
""")
def test_history(script: str, expected: str, options: Object) -> None:
    """A new session is told what both sides have said, in order, of a cut answer what was heard."""
    scene = play(script, "", "nothing")
    first = next(n for n, (_, line) in enumerate(scene.trace) if line == "setup")
    roles = ("user", "assistant", "system")
    told = [line.split(" ", 1)[1] for _, line in scene.trace[first:] if line.split()[0] in roles]
    assert "/".join(told) == expected


test_told = plays("""It is told what it cannot know. | watch="assistant system user ask output"
    what a tool found | 0 tools slow:c; 1 closes 1006; 7 says s a 9 | 1.2 assistant どうぞ。;
        6 system slow({}) → at last; 6 ask
    what it found in between | 0 tools slow:c; 5.9 closes 1006; 7 says s a 9 | 6.2 assistant
        どうぞ。; 6.2 system slow({}) → at last; 6.2 ask
    heard in part after a loss | 0 says r a 2000 あいうえおかきくけこ; 0.75 closes 1006;
        1.2 interrupt; 4 | 1 assistant どうぞ。; 1 assistant あいうえおかきくけこ; 1.2 system
        HEARD_ONLY あいうえおか
    heard whole after a loss | 0 says r a 2000 あい; 0.75 closes 1006; 3 interrupt; 4 | 1 assistant
        どうぞ。; 1 assistant あい
    called off, once | 0 bye; 1 begins u; 1.3 stops u; 2 words u あの; 2.1 says s b 500; 4 turn v
        えと; 4.1 says t c 9 | 2 system CALLED_OFF; 2 ask
""")


def test_history_bound() -> None:
    """A new session is told the last 200 texts."""
    script = "; ".join(f"{n} says r{n} a{n} 9 {n}" for n in range(250)) + "; 250 closes 1006"
    scene = play(script, "", "nothing")
    setup = next(n for n, (_, line) in enumerate(scene.trace) if line == "setup")
    texts = [line for _, line in scene.trace[setup:] if line.startswith("assistant")]
    assert len(texts) == 200 and texts[0] == "assistant 50"


@table("""
    a turn that is spoken | 0 voice 3000; 0.1 begins u; 3 closes 1006; 3 voice 400; 5 | 3400
    a turn that is not answered | 0 voice 600; 0.1 begins u; 0.6 stops u; 0.7 closes 1006; 2 | 600
    a turn that is known in words | 0 voice 600; 0.1 begins u; 0.6 stops u; 0.7 words u はい;
        0.8 closes 1006; 2 | 0
    a turn that was answered | 0 voice 600; 0.1 begins u; 0.6 stops u; 0.7 says r a 100; 1 closes
        1006; 2 | 0
    the last second of a silent caller | 0 hush 3000; 3 closes 1006; 4 | 1000
    jump of the timestamps | 0 hush 100; 0.2 gap 500; 1 | 620 | within=0
    jitter of 30 ms | 0 hush 100; 0.2 gap 30; 1 | 120 | within=0
    40 s | 0 hush 100; 0.2 gap 40000; 1 | 30120 | within=0
    stall in a turn | 0 hush 100; 0 begins u; 1.2 stops u; 1.3 says s b 9; 9 | 1000 | within=250
    stall in silence | 0 hush 100; 9 | 100 | within=0
    late after a stall | 0 hush 100; 0 begins u; 1.1 hush 100; 1.2 stops u; 1.3 says s b 9; 2 | 1100
        | within=250
""")
def test_what_the_model_hears(script: str, expected: str, options: Object) -> None:
    """A new session hears the turn that is not answered yet; gaps are filled, a long one 30 s."""
    scene = play(script, "", "nothing")
    assert abs(len(scene.openai.sound) / 8 - float(expected)) <= options.get("within", 40)
    assert scene.dials == 1 + ("closes" in script)


# ── Turns and barge-in ──────────────────────────────────────────────────────────────────────────

test_barge_in = plays("""BARGE_IN_MS of voice cut the model where it was heard. | within=0.15
    nothing more of it is heard | 0 starts r a 200; 0.1 interrupt; 0.2 sound r a 200; 0.4 says s b
        60 | 0 media 200; 0.4 media 60 | watch="media"
    of 400 ms | 0 over 500; 2.2 says s b 1; 9 | 1.38 cut a 1380
    はい | 0 over 300; 9
    はい, hush, はい | 0 over 300 1700 0.5; 3 voice 300; 3.3 hush 500; 3.1 begins v; 3.8 stops v; 9
    cough | 0 over 100; 9
    a stop in a word | 0 over 200 160 1; 1.36 voice 500; 2.5 says s b 1; 9 | 1.38 cut a 1380
    two words with a pause | 0 over 200 300 1; 1.5 voice 200; 1.7 hush 900; 9
    at 0, the first sound | 0 over 100; 2 says s b 1; 9 | 1.2 cut a 1200 | barge_in_ms=0
    at 1000 ms | 0 over 1200; 3 says s b 1; 9 | 1.98 cut a 1980 | barge_in_ms=1000
    off | 0 over 2000; 4 says s b 1; 9 | | barge_in_ms=OFF
    off, asked afterwards | 0 over 600; 2.5 says s b 1; 9 | 2.1 ask | barge_in_ms=OFF,
        session=turns({"create_response": False})
    too quiet for the measure | 0 says r a 5000; 0 hush 4000; 1.2 begins u; 2.6 stops u; 3 says s b
        1; 9 | 2.32 cut a 2320
    too quiet, and short | 0 says r a 5000; 0 hush 4000; 1.2 begins u; 2 stops u; 9
    without any frame | 0 says r a 5000; 1 begins u; 2.6 stops u; 3 says s b 1; 9 | 2.25 cut a 2250
    key | 0 says r a 5000; 1 key 5; 9
    interrupt() | 0 says r a 5000; 1 interrupt; 9 | 1 cut a 1000
    in a pause | 0 starts r a 500; 1 interrupt; 1.1 sound r a 5; 2 | 1 cancel r; 1.1 truncate a 500
    interrupt() before its sound | 0 created r; 1 interrupt; 1.1 sound r a 100; 1.2 done r cancelled
        x; 9 | 1 cancel r; 1.1 truncate a 0
    what is still made | 0 starts r a 2000; 1 interrupt; 1.1 sound r a 500; 1.1 sound r b 500;
        1.2 done r cancelled c; 9 | 1 cancel r; 1 cut a 1000; 1.1 truncate b 0
    two items | 0 starts r a 1000; 0 sound r b 1000; 0 done r; 1.5 interrupt; 9 | 1.5 cut b 500
    in the first of two | 0 starts r a 1000; 0 sound r b 1000; 0 done r; 0.5 interrupt; 9 | 0.5 cut
        a 500; 0.5 truncate b 0
    again, and the next answer | 0 says r a 5000; 1 interrupt; 1.5 interrupt; 2 says s b 3000;
        3 interrupt; 9 | 1 cut a 1000; 3 cut b 1000
    a response while the caller speaks | 0 begins u; 0.5 created r; 0.6 sound r a 500; 1 stops u;
        1.1 says s b 9; 5 | 0.5 cancel r; 0.6 truncate a 0
    a response before its sound | 0 turn u; 0.5 created r; 1 begins v; 1.5 done r cancelled x;
        2 stops v; 2.1 says s b 9; 5 | 1 cancel r
    OpenAI cancels | 0 starts r a 2000; 1 begins u; 1.1 done r cancelled x; 2 stops u; 2.1 says s b
        9; 5 | 1 cut a 1000 | barge_in_ms=0
    heard, then lost | 0 says r a 3000 あいう; 1 closes 1006; 2 interrupt; 5 | 1.25 setup; 2 clear
""")

test_backchannel = plays("""A short word over the model is not answered; one at its end is.
    its response | 0 over 300; 1.9 created s; 2 sound s b 500; 2.1 done s; 9 | 1.9 cancel s;
        2 truncate b 0
    its response, late | 0 over 300; 4.7 created s; 4.7 done s cancelled x; 9 | 4.7 cancel s
    only one response | 0 over 300; 1.9 created s; 2 done s cancelled x; 2.5 says t c 9; 9 |
        1.9 cancel s
    one that is asked for | 0 over 300; 2 tell_model x; 2.2 says s b 500; 9 | 2 ask
    a response 3 s after it | 0 over 300; 5.2 says s b 500; 9
    its response never ends | 0 over 300; 1.9 created s; 20 | 1.9 cancel s; 8 cancel s
    and then a turn | 0 over 300; 5.5 begins v; 6 stops v; 6.1 says s b 500; 9
    owed before it | 0 tell_model x; 0.1 says r a 100; 1 tell_model y; 1.1 created s; 1.2 sound s b
        900; 1.3 begins u; 1.4 stops u; 2 done s; 9 | 0 ask; 1 ask
    ended before the last second | 0 says r a 1500; 0.2 begins u; 0.9 stops u; 5
    ended in the last second | 0 says r a 1300; 0.2 begins u; 0.9 stops u; 2 | 2.4 ask
    the last second is not while more is made | 0 starts r a 1100; 0.2 voice 200; 0.4 begins u;
        0.9 stops u; 0.95 sound r a 900; 1 done r; 9
    a caller who talks on | 0 turn u; 0 created r; 1 turn v; 1 done r; 1 created r; 2 turn w;
        2 done r; 2 | 0 ask; 1 cancel r; 1 ask; 2 cancel r; 2 ask |
        session=turns({"create_response": False})
""")

ECHO = """{0} says r{0} a{0} 2000 はれです; {0} hush 500; {0}.5 voice 1000; {0}.7 begins u{0};
    {1}.5 hush 500; {2} stops u{0}; {2}.5 words u{0} {3}"""  # its own sound comes back


@table("""
    no words | - - - - - | 0 3 6 12
    the model's own | はれです はれです れで れで はれです | 0 3 6 12
    the caller's | - - ちょっと待って - - | 0 3 6 9 12
    the caller's before | - もしもし - - - | 0 3 6 9 12
""")
@pytest.mark.parametrize("barge_in_ms", [400, 0])
def test_echo(script: str, expected: str, options: Object, barge_in_ms: float) -> None:
    """After three answers cut in a row without words of the caller's, one is heard whole."""
    turns = [ECHO.format(n, n + 1, n + 2, script.split()[n // 3]) for n in range(0, 15, 3)]
    scene = play("; ".join(turns).replace("-", ""), "", "nothing", barge_in_ms=barge_in_ms)
    cut = [line.split()[1][1:] for _, line in scene.trace if line.startswith("truncate a")]
    assert " ".join(cut) == expected


test_words = plays("""Once for each turn, by item; "" without words. | watch="caller_said"
    none in 10 s | 0 begins u; 0 stops u; 0 says r a 1; 12 | 10.2 caller_said u
    failed | 0 begins u; 0 stops u; 0 says r a 1; 1 nowords u; 12 | 1 caller_said u
    twice | 0 turn u はい; 1 words u いいえ; 12 | 0 caller_said u はい
    late | 0 begins u; 0 stops u; 0 says r a 1; 11 words u はい; 13 | 10.2 caller_said u
    early | 0 begins u; 0.5 words u はい; 1 stops u; 1 says r a 1; 13 | 0.5 caller_said u はい
    of nobody | 0 words x はい; 1 nowords y; 5
    empty | 0 begins u; 0 stops u; 0 words u; 0 says r a 1; 5 | 0 caller_said u
    in the wrong order | 0 begins u; 1 stops u; 1 says r a 1; 2 begins v; 3 stops v; 3 says s b 1;
        3.5 words v は; 4 words u あ; 15 | 3.5 caller_said v は; 4 caller_said u あ
    without transcription | 0 begins u; 1 stops u; 1.1 says r a 1; 15 | 1 caller_said u  |
        transcription_model=""
    hung up while speaking | 0 begins u; 1 stop; 3 | 1 caller_said u
    hung up just after | 0 begins u; 1 stops u; 1.1 stop; 1.7 words u はい; 3 | 1.7 caller_said u
        はい
    hung up, too late | 0 begins u; 1 stops u; 1.1 stop; 2.2 words u はい; 3 | 1.9 caller_said u
    lost session while they speak | 0 begins u; 1 closes 1006; 5 | 1 caller_said u
""")

test_events = plays("""The story of a call. | watch=" ".join(bridge.EVENTS)
    a turn and its answer | 0 begins u; 1 stops u; 1.2 words u はい; 1.3 created r; 1.4 sound r a
        500 あい; 1.5 done r; 3 | 0 caller_started_speaking u; 1 caller_stopped_speaking u;
        1.2 model_used 1 transcription; 1.2 caller_said u はい; 1.4 model_words a あい;
        1.4 model_started_speaking a; 1.5 model_used 2 response; 1.9 model_said a あい None
    barge-in | 0 says r a 2000 あいうえ; 1 interrupt; 3 | 0 model_words a あいうえ;
        0 model_started_speaking a; 0 model_used 2 response; 1 model_interrupted a 1000 2000;
        1 model_said a あいうえ 1000
    a tool | 0 tools add:c; 0; 0.1 says s b 200 ぬ; 1 | 0 model_used None response; 0 tool_used add
        {} 3; 0 model_asked; 0.1 model_words b ぬ; 0.1 model_started_speaking b; 0.1 model_used 2
        response; 0.3 model_said b ぬ None
    keys | 0 key 1; 0 key #; 0 key *; 0 key A; 0 key 12; 1 | 0 key_pressed 1; 0 key_pressed #;
        0 key_pressed *
    hung up in the middle of an answer | 0 starts r a 2000 あい; 1 stop; 3 | 0 model_words a あい;
        0 model_started_speaking a; 1.8 model_used None response; 1.8 model_said a あい 1000;
        1.8 call_ended caller hung up
    hung up, usage in time | 0 starts r a 2000 あい; 1 stop; 1.3 done r; 3 | 0 model_words a あい;
        0 model_started_speaking a; 1.3 model_used 2 response; 1.3 model_said a あい 1000;
        1.3 call_ended caller hung up
    words that never come | 0 begins u; 1 stops u; 1.1 says r a 1; 1.2 stop; 3 |
        0 caller_started_speaking u; 1 caller_stopped_speaking u; 1.1 model_started_speaking a;
        1.1 model_used 2 response; 1.1 model_said a  None; 2 model_used None transcription;
        2 caller_said u; 2 call_ended caller hung up
    marks that never come | 0 says r a 1000; 4 | 0 model_started_speaking a; 0 model_used 2
        response; 3.2 model_said g どうぞ。 None; 3.2 model_said a  None | marks=False
    what was made before the stream | 0 says g g 500; 1 start; 1.1 | 1 call_started; 1 model_asked;
        1 model_started_speaking g; 1 model_used 2 response; 1.5 model_said g  None |
        opening="dialled"
    errors, of which two are crossings | 0 error response_cancel_not_active; 0 error
        conversation_already_has_active_response; 1 error item_truncate_invalid_item_id |
        1 model_failed
    an end of a turn that is lost | 0 hush 500; 0.5 voice 1000; 1.5 hush 12000; 0.7 begins u |
        0.7 caller_started_speaking u; 10.5 caller_stopped_speaking u
""")


def test_audio_events() -> None:
    """Sound is decoded for hooks only when a file listens."""
    sound = [("model_audio", {"mulaw": HUM * 320}), ("caller_audio", {"mulaw": LOUD * 160})]
    for listens in False, True:
        scene = play("0 voice 20; 0 says r a 40", "", "nothing", listens=listens)
        told = [told for told in scene.hooks.told if told[0].endswith("_audio")]
        assert told[-2:] == sound * listens


# ── The end of a call ───────────────────────────────────────────────────────────────────────────

test_ending = plays("""A call ends when all is heard, unless the caller goes on talking.
    hang_up() | 0 bye; 9 | 3 end Hangup
    hang_up() without marks | 0 bye; 9 | 5.2 end Hangup | marks=False
    by a tool, goodbye said | 0 starts r a 900; 0 calls r bye:c; 9 | 0 output c done; 0.9 end Hangup
    by a tool without a word | 0 tools bye:c; 0.5 says s a 900; 9 | 0 output c done; 0 ask; 1.4 end
        Hangup
    a long sentence calls it off | 0 bye; 0 hush 1000; 1 voice 1500; 1.2 begins u; 2.5 stops u;
        3.1 says s b 100; 10 | 1.4 cut a 1380
    cough | 0 bye; 0 hush 1000; 1 voice 150; 1.2 hush 900; 1.1 begins u; 1.7 stops u; 1.8 words u ;
        9 | 3 end Hangup
    はい | 0 bye; 0 hush 1000; 1 voice 300; 1.3 hush 900; 1.1 begins u; 1.8 stops u; 2.1 words u
        はい。; 9 | 3 end Hangup
    its response is not wanted | 0 bye; 1 begins u; 1.3 stops u; 1.4 created s; 1.5 done s cancelled
        x; 2 words u はい; 9 | 1.4 cancel s; 3 end Hangup
    words | 0 bye; 1 begins u; 1.3 stops u; 2 words u あの、もう一つ; 2.1 says s b 500; 11 | 2 ask;
        11.6 end Hangup
    half a second of voice | 0 bye; 0 hush 1000; 1 voice 600; 1.6 hush 600; 1.2 begins u; 2.1 stops
        u; 2.3 words u ; 9 | 1.4 cut a 1380; 2.3 end Hangup
    はい in its last second | 0 says r a 1000; 0 hang_up; 0.9 begins u; 1.2 stops u; 1.4 words u
        はい; 9 | 1.4 end Hangup
    a long leave | 0 bye; 0 hush 1000; 1 voice 1000; 2 hush 500; 1.2 begins u; 2.5 stops u; 3 words
        u それでは失礼いたします; 9 | 1.4 cut a 1380; 3 end Hangup
    they go on and on | 0 bye; 1 turn u 待って; 1.5 says s b 500; 5 turn v まだです; 5.5 says t c
        500; 30 | 1 ask
    then take leave | 0 bye; 1 turn u 待って; 1.5 says s b 500; 5 turn v さようなら; 5.5 says t c
        500; 30 | 1 ask; 14 end Hangup
    final, spoken over | 0 bye hang_up final; 0 hush 1000; 1 voice 1500; 1.2 begins u; 2.5 stops u;
        2.8 words u 待って; 9 | 1.4 cut a 1380; 1.4 end Hangup
    final after hang_up() | 0 bye; 1 turn u 待って; 1.1 says s b 500; 2 hang_up final; 9 | 1 ask;
        3.5 end Hangup
    deadline | 0 hang_up; 0 tell_model x; 0.2 created r; 5 life r; 10 life r; 14 life r | 0 end
        Hangup
    a goodbye that never ends | 0 created r; 0 hang_up; 5 life r; 10 life r; 14 life r | 15.2 end
        Hangup
    transfer | 0 bye transfer +81312345678; 9 | 2 end Dial
    transfer, talked over | 0 bye transfer +81312345678; 0 hush 500; .5 voice 1500; .7 begins u;
        2 stops u; 2.1 words u 待って; 9 | 0.9 cut a 880; 0.9 end Dial
    transfer after hang_up() | 0 bye; 1 transfer +81312345678; 9 | 3 end Dial
    final after transfer | 0 bye transfer +81312345678; 1 hang_up final; 9 | 2 end Dial
    apology after transfer | 0 bye transfer +81312345678; 1 closes 4004; 9 | 2 end Dial
    shutdown | 0 says r a 2000; 0 shutdown; 9 | 2 end Say
    MAX_CALL_SECONDS | 0 says r a 2000; 9 | 2 end Say | max_call_seconds=3
    apology when the last words are heard | 0 says r a 2000; 0.5 closes 4004; 9 | 2 end Say
    `stop` | 1 stop; 3 | 1 end
    lost stream | 1 lost; 3 | 1 end
    no stream | 12 | 10 end Say | opening="dialled"
    after the end nothing | 0 hang_up; 1 tell_model x; 1 interrupt; 1 transfer +81312345678; 1 play
        500; 5 | 0 end Hangup
""")


def test_closing_words() -> None:
    """They take leave, or agree; the others do not, however long they are."""
    words = "はい あはい では失礼します ありがとうございました よろしくお願いいたします ok goodbye"
    assert all(map(bridge.CLOSING.fullmatch, words.split()))
    assert not any(map(bridge.CLOSING.fullmatch, ("もう一つ", "はいあの", "じゃあ" * 5000 + "x")))


@pytest.mark.parametrize("caller", ["+819012345678", "anonymous", "sip:a@b", "client:jenny", ""])
def test_dial(caller: str) -> None:
    """A transfer dials for 20 s, and shows the called number when the caller has none."""
    scene = play("0 transfer +81312345678; 1", "0 end Dial", caller=caller)
    shown = "" if caller.startswith("+") else ' callerId="+81311112222"'
    dial = '<Dial action="https://bridge.test/twilio/next" method="POST" timeout="20"'
    assert f"{dial}{shown}>+81312345678</Dial>" in scene.bridge.past[SID].twiml


def test_wrong_number() -> None:
    """What is no E.164 number is refused at once, in words that help the model."""
    for number in "", "0312345678", "+0312345678", "+81 3 1234 5678", "+12345", "+" + "1" * 16:
        with pytest.raises(ValueError, match="E.164"):
            bridge.Call.transfer(mock.Mock(), number)


test_notices = plays("""It waits for silence; words stop it. | watch="media clear truncate end"
    in silence | 0 play 500; 9 | 0 media 500
    after the model's words | 0 says r a 400; 0 play 500; 9 | 0 media 200; 0 media 200; 0.5 media
        500
    stopped by the model's words | 0 play 2000; 1 says r a 300; 9 | 0 media 2000; 1 clear; 1 media
        200; 1 media 100
    stopped by the caller | 0 play 2000; 0 play 300; 1 begins u; 2 stops u; 2.1 says r a 100; 9 |
        0 media 2000; 1 clear; 2.1 media 100
    stopped by interrupt() | 0 play 2000; 0 play 300; 1 interrupt; 9 | 0 media 2000; 1 clear
    not stopped by a turn's end | 0 begins u; 0 play 500; 1 stops u; 1.1 says r a 100; 9 | 0 media
        500; 1.1 media 100 | within=9
    at most a minute | 0 play 70000; 9 | 0 media 60000
    before a hang-up | 0 play 2000; 0 hang_up; 9 | 0 media 2000; 2 end Hangup
""")

test_busy = plays("""Busy: the model is heard, owes its voice, or a tool runs. | watch="busy"
    before the greeting | 0 busy; 1 says g g 500; 1.2 busy; 2 busy | 0 busy True; 1.2 busy True;
        2 busy False | opening="open"
    a turn | 0 busy; 1 turn u; 1.1 busy; 2 says r a 500; 2.2 busy; 3 busy | 0 busy False; 1.1 busy
        True; 2.2 busy True; 3 busy False
    a tool | 0 tools slow:c; 3 busy; 6.5 says s b 1; 7 busy | 3 busy True; 7 busy False
    a notice | 0 play 2000; 1 busy; 3 busy | 1 busy False; 3 busy False
""")

# ── Messages that are not what the protocol says ────────────────────────────────────────────────

CONVERSATION = """
0 says g g 400 どうぞ。; 1 hush 300; 1.3 voice 300; 1.4 begins u; 1.9 stops u; 1.9 commits u
2 words u 3と4を足して; 2.1 created r; 2.2 calls r add:c1; 2.3 says s a 3000 7です; 3 key 5
3 voice 600; 3.1 begins v; 4 stops v; 4 commits v; 4.1 words v 待って; 4.2 created t
4.3 sound t b 900 はい; 4.4 error rate_limit_exceeded; 4.5 done t incomplete max_output_tokens
6 tell_model x; 6.1 says w d 500 あ
7 created y; 7 sound y e 400 では; 7.1 calls y bye:c2; 7.3 begins z; 7.5 stops z; 7.6 nowords z
""".strip().replace("\n", "; ")
KINDS = ["stop", "mark", "media", "dtmf", "start", "error", "session.updated", "response.created"]
VALUES: list[Any] = [None, True, 0, -1, 10**30, 1e308, "", "\ud83d", "あ" * 999, [], [[]], {}]
PLACES = r'"[^"]*"|\d[\d.]*|null', r"{[^{}]*}|\[[^][]*\]"


def mutated(text: str, chance: random.Random) -> list[str]:
    """One message, changed in one way: dropped, repeated, cut short, a name or a value another."""
    if (how := chance.randrange(8)) < 3:
        return [[], [text] * 2, [text[: chance.randrange(len(text))]]][how]
    place = chance.choice(list(re.finditer(chance.choice(PLACES), text)) or [re.match("", text)])
    is_name, value = text[place.end() :][:1] == ":", json.dumps(chance.choice([*VALUES, *KINDS]))
    return [text[: place.start()] + ('"other"' if is_name else value) + text[place.end() :]]


async def mutated_call(chance: random.Random) -> None:
    """The conversation with some of its messages mutated."""
    barge_in_ms, marks = chance.choice((400, 0, OFF)), chance.random() < 0.9
    scene, whole = Scene(opening="open", marks=marks, barge_in_ms=barge_in_ms), FakeWire.feed

    def feed(wire: FakeWire, message: Object | str) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        for each in mutated(text, chance) if chance.random() < 0.06 else [text]:
            whole(wire, each)

    with mock.patch.object(FakeWire, "feed", feed):
        await scene.run(chance.choice((CONVERSATION, CONVERSATION.partition("; 7 ")[0])), 9)
    call = scene.call
    await asyncio.sleep(60)
    owed = call.owed is not None or call.active or call.tools or call.notices
    assert call.over.done() or not owed, scene.trace[-20:]
    if not (call.over.done() or call.speaking):  # and it is still of use
        before = len(scene.twilio.given)
        scene.do("turn", "last はい")
        scene.do("says", "end end 500")
        assert len(scene.twilio.given) == before + 4000, scene.trace[-20:]
    await scene.hang_up()
    told = scene.hooks.told
    began = {facts["item"] for event, facts in told if event == "caller_started_speaking"}
    assert began <= {facts["item"] for event, facts in told if event == "caller_said"}


@pytest.mark.parametrize("seed", [random.randrange(10**6), *range(9)])
def test_mutated_messages(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes: nothing but the fence's own line, and the call goes on or ends, told once."""
    caplog.set_level(logging.CRITICAL)
    chance = random.Random(seed)
    for n in range(40):
        print(f"call {n}")
        turned(mutated_call(chance))


def new_id(kind: str) -> str:
    return kind + os.urandom(16).hex()


def sound(ms: float, seed: int = 0) -> bytes:
    """So much mu-law audio, another for each seed: any loss, repetition or change shows."""
    return random.Random(seed).randbytes(int(ms * 8))


def free_port() -> int:
    """One below those that the system gives out by itself, so that nobody else gets it now."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


async def until(true: Callable[[], Any], within_s: float = 6.0, what: str = "") -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.003)


# ── The pretend Twilio ──────────────────────────────────────────────────────────────────────────


class Twilio:
    """One caller. The player returns a mark when what came before it has been heard."""

    def __init__(self, port: int, settings: Any = bridge.Settings) -> None:
        self.port, self.base = port, settings.public_base_url  # port 0: at the base itself
        self.host = {} if port else {"Host": urlsplit(self.base).netloc}
        self.token = settings.twilio_auth_token.partition(",")[0]
        self.sid, self.stream_sid = new_id("CA"), new_id("MZ")
        self.stream_url, self.parameters = self.base + "/twilio/stream", dict[str, str]()
        self.timestamp_ms = 0  # of the caller's next frame
        self.sent, self.ends_at = b"", 0.0  # by the bridge; when it will have been played
        self.marks: dict[str, asyncio.TimerHandle] = {}  # not returned yet
        self.cuts = list[float]()  # ms that were not heard, at each `clear`
        self.faults = list[Any]()  # against Twilio's protocol
        self.hear: Callable[[bytes], object] = lambda mulaw: None  # for the load program

    def signature(self, url: str, form: Any = ()) -> dict[str, str]:
        made = RequestValidator(self.token).compute_signature(url, dict(form))
        return {"X-Twilio-Signature": made} if self.token else {}

    async def post(self, path: str = VOICE, **more: str) -> str:
        """A webhook as Twilio sends it. Returns the TwiML, and keeps what it says of a stream."""
        form = {"CallSid": self.sid, "From": CALLER, "To": CALLED, "CallStatus": "ringing"} | more
        form = {name: value for name, value in form.items() if value}
        headers = self.signature(self.base + path, form) | self.host
        path, where = urlsplit(self.base).path * (not self.port) + path, self.port or self.base
        status, _, text = await ask(where, request("POST", path, urlencode(form), **headers))
        assert status == 200, (status, text)
        if (stream := ElementTree.fromstring(text).find("Connect/Stream")) is not None:
            self.stream_url = stream.attrib["url"]
            self.parameters = {p.attrib["name"]: p.attrib["value"] for p in stream}
        return text

    async def next(self, **more: str) -> str:
        return await self.post("/twilio/next", **IN_PROGRESS | more)

    async def opens(self, signature: Any = None, **changed: Any) -> Twilio:
        """The stream: handshake, `connected`, `start`, of which a test may change something."""
        at_base = self.stream_url.replace("wss", "wss" if self.base[4:5] == "s" else "ws", 1)
        url = f"ws://127.0.0.1:{self.port}/twilio/stream" if self.port else at_base
        headers = signature or self.signature(self.stream_url)
        self.socket = await connect(url, additional_headers=headers, compression=None, proxy=None)
        self.reader = asyncio.create_task(self.read())
        await self.sends("connected", protocol="Call", version="1.0.0")
        start = {"streamSid": self.stream_sid, "callSid": self.sid, "tracks": ["inbound"]}
        start |= {"customParameters": self.parameters} | changed
        if "nothing" not in changed:
            await self.sends("start", sequenceNumber="1", streamSid=self.stream_sid, start=start)
        return self

    async def sends(self, event: str, **content: Any) -> None:
        await self.socket.send(json.dumps({"event": event, **content}, separators=(",", ":")))

    def media(self, mulaw: bytes) -> str:
        at, self.timestamp_ms = str(self.timestamp_ms), self.timestamp_ms + len(mulaw) // 8
        media = {"timestamp": at, "payload": b64(mulaw)}
        return json.dumps({"event": "media", "media": media}, separators=(",", ":"))

    async def talks(self, next_frame: Callable[[], bytes]) -> None:
        """20 ms of sound every 20 ms."""
        due = time.monotonic() + random.random() / 50
        while True:
            await self.socket.send(self.media(next_frame()))
            due += 0.02
            await asyncio.sleep(due - time.monotonic())

    async def hangs_up(self) -> None:
        await self.sends("stop", streamSid=self.stream_sid, stop={"callSid": self.sid})
        await self.socket.close()

    async def closed(self, within_s: float = 6.0) -> int:
        await asyncio.wait_for(self.socket.wait_closed(), within_s)
        return self.socket.close_code or 0

    async def read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in self.socket:
                self.takes(json.loads(text))

    def takes(self, message: Any) -> None:
        now = time.monotonic()
        more: Any = {}
        match message:
            case {"event": "media", "streamSid": sid, "media": {"payload": p, **more}, **rest}:
                mulaw = base64.b64decode(p, validate=True)
                self.hear(mulaw)
                self.sent += mulaw
                self.ends_at = max(self.ends_at, now) + len(mulaw) / 8000
            case {"event": "mark", "streamSid": sid, "mark": {"name": str(name), **more}, **rest}:
                wait_s = max(0.0, self.ends_at - now)
                self.marks[name] = asyncio.get_running_loop().call_later(wait_s, self.returns, name)
            case {"event": "clear", "streamSid": sid, **rest}:
                self.cuts.append(max(0.0, self.ends_at - now) * 1000)
                self.ends_at = now
                for name, timer in list(self.marks.items()):
                    timer.cancel()
                    self.returns(name)
            case _:
                sid, rest = "", message
        if sid != self.stream_sid or rest or more:
            self.faults.append(message)

    def returns(self, name: str) -> None:
        del self.marks[name]
        mark = self.sends("mark", streamSid=self.stream_sid, mark={"name": name})
        asyncio.ensure_future(mark).add_done_callback(lambda task: task.exception())  # noqa: RUF006


# ── The pretend OpenAI ──────────────────────────────────────────────────────────────────────────


class Session:
    """One session: refuses what the real one refuses, and does what a test tells it."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket, self.config, self.errors = socket, dict[str, Any](), list[str]()
        self.received, self.heard = list[Any](), b""  # all but audio; the caller's audio
        self.active, self.audio = "", dict[str, int]()  # the response; bytes of each item
        self.hear: Callable[[bytes], object] = lambda mulaw: None  # for the load program

    async def run(self) -> None:
        await self.sends("session.created", session={"type": "realtime"})
        with contextlib.suppress(ConnectionClosed):
            async for text in self.socket:
                await self.takes(json.loads(text))

    async def sends(self, kind: str, **content: Any) -> None:
        event = {"type": kind, "event_id": new_id("event_"), **content}
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(json.dumps(event, ensure_ascii=False))

    async def takes(self, event: dict[str, Any]) -> None:
        event_id = event.pop("event_id", None)
        try:
            offline.check(event, offline.ByType(offline.EVENTS))
            if event["type"] == "input_audio_buffer.append":
                assert self.config, "audio before the session was set up"
                self.hear(mulaw := base64.b64decode(event["audio"], validate=True))
                self.heard += mulaw
                return
            self.received.append(event)
            match event:
                case {"type": "session.update", "session": config}:
                    self.config = self.config | config
                    await self.sends("session.updated", session=self.config)
                case {"type": "response.create"}:
                    assert not self.active, "conversation_already_has_active_response"
                    await self.begins()
                case {"type": "response.cancel"}:
                    assert self.active == event["response_id"], "response_cancel_not_active"
                    await self.ends("cancelled")
                case {"type": "conversation.item.truncate", "item_id": item, "audio_end_ms": ms}:
                    assert ms <= self.audio[item] // 8, "already shorter"
        except (offline.Refused, AssertionError, KeyError) as wrong:
            self.errors.append(f"{event['type']}: {wrong!r}")
            error = {"type": "invalid_request_error", "code": "refused", "message": str(wrong)}
            await self.sends("error", error=error | {"event_id": event_id})

    async def begins(self) -> None:
        if not self.active:
            self.active = new_id("resp_")
            await self.sends("response.created", response={"id": self.active, "output": []})

    async def ends(self, status: str = "completed", *output: Any) -> None:
        response = {"id": self.active, "status": status, "output": output, "usage": {"tokens": 3}}
        self.active = ""
        await self.sends("response.done", response=response | {"status_details": None})

    async def speaks(self, mulaw: bytes, item: str = "", ms: int = 200, text: str = "") -> str:
        """A part of an answer, faster than it is spoken; with its words a whole one."""
        await self.begins()
        item = item or new_id("item_")
        at = {"response_id": self.active, "item_id": item, "output_index": 0, "content_index": 0}
        for start in range(0, len(mulaw), ms * 8):
            piece = mulaw[start : start + ms * 8]
            self.audio[item] = self.audio.get(item, 0) + len(piece)
            await self.sends("response.output_audio.delta", **at, delta=b64(piece))
        if text:
            await self.sends("response.output_audio_transcript.done", **at, transcript=text)
            await self.ends()
        return item

    async def is_heard_by(self, twilio: Twilio) -> None:
        await self.speaks(sound(40), text="はい。")
        await until(lambda: twilio.sent.endswith(sound(40)))

    async def calls_tool(self, name: str) -> None:
        await self.begins()
        call = {"type": "function_call", "call_id": "call_1", "name": name, "arguments": "{}"}
        await self.ends("completed", call | {"id": "item_call", "status": "completed"})

    async def hears(self) -> str:
        """The caller begins to speak."""
        item = new_id("item_")
        await self.sends("input_audio_buffer.speech_started", audio_start_ms=0, item_id=item)
        if self.active and self.config["audio"]["input"]["turn_detection"]["interrupt_response"]:
            await self.ends("cancelled")
        return item

    async def heard_out(self, item: str, text: str = "") -> None:
        """The caller's turn is over; with `text` its words are known."""
        await self.sends("input_audio_buffer.speech_stopped", audio_end_ms=0, item_id=item)
        await self.sends("input_audio_buffer.committed", item_id=item, previous_item_id=None)
        if text:
            kind = "conversation.item.input_audio_transcription.completed"
            await self.sends(kind, item_id=item, content_index=0, transcript=text, usage={})

    def got(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.received if event["type"] == kind]

    async def gets(self, kind: str, count: int = 1) -> str:
        """The last of so many events, as JSON."""
        await until(lambda: len(self.got(kind)) >= count, what=f"{kind}: {self.received}")
        return json.dumps(self.got(kind)[count - 1], ensure_ascii=False)


class OpenAI:
    """The server that the bridge connects to."""

    def __init__(self) -> None:
        self.sessions = list[Session]()
        self.refusals = list[Any]()  # of the next handshakes: HTTP status, or half a frame
        self.asked = list[str]()  # the paths of all handshakes

    def process_request(self, socket: ServerConnection, about: Any) -> Any:
        self.asked.append(about.path)
        status = self.refusals[0] if self.refusals else None
        return socket.respond(self.refusals.pop(0), "no") if isinstance(status, int) else None

    async def handle(self, socket: ServerConnection) -> None:
        if self.refusals:
            socket.transport.write(self.refusals.pop(0))
            return socket.transport.abort()
        self.sessions.append(Session(socket))
        await self.sessions[-1].run()

    async def session(self, count: int = 1) -> Session:
        """The session of this number, set up."""
        await until(lambda: len(self.sessions) >= count, what="a session")
        await until(lambda: self.sessions[count - 1].config, what="session.update")
        return self.sessions[count - 1]

    @contextlib.asynccontextmanager
    async def serves(self, port: int = 0) -> AsyncIterator[str]:
        """Its URL."""
        options: Any = {"process_request": self.process_request, "compression": None}
        async with serve(self.handle, "127.0.0.1", port, close_timeout=1, **options) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            yield f"ws://127.0.0.1:{port}/v1/realtime"
            for session in self.sessions:  # else they would wait for the other side's close
                session.socket.transport.abort()


# ── The bridge between them ─────────────────────────────────────────────────────────────────────


class Line:
    """A running bridge, its pretend OpenAI, and what its hooks are told."""

    def __init__(self, port: int, openai: OpenAI, settings: Any = bridge.Settings) -> None:
        self.port, self.openai, self.settings, self.hooks = port, openai, settings, Spy()

    def caller(self) -> Twilio:
        return Twilio(self.port, self.settings)

    async def call(self) -> tuple[Twilio, Session]:
        """A call that is up."""
        count, twilio = len(self.openai.sessions) + 1, self.caller()
        await twilio.post()
        await twilio.opens()
        return twilio, await self.openai.session(count)

    async def ready(self, alive: Callable[[], object]) -> None:
        """It listens."""
        while alive():
            with contextlib.suppress(OSError):
                assert (await ask(self.port, request("GET", "/health")))[0] == 200
                return
            await asyncio.sleep(0.005)
        raise AssertionError("the bridge did not start")


@contextlib.asynccontextmanager
async def a_bridge(module: Any = bridge, **settings: Any) -> AsyncIterator[Line]:
    """`bridge.run`. At its end nobody may have broken a protocol, and it ends without a fault."""
    openai, signals = OpenAI(), dict[int, Any]()
    quick = mock.patch.multiple(module, STOP_S=0.1, WORDS_AT_END_S=0.1)  # nothing is waited for
    async with asyncio.timeout(15), openai.serves() as url:
        port = free_port()
        given = {"openai_realtime_url": url, "openai_api_key": "sk-secret", "host": "127.0.0.1"}
        chosen = module.Settings(**{"port": port, "greeting": "", **given, **settings})
        line = Line(port, openai, chosen)
        with quick, mock.patch.object(signal, "signal", signals.__setitem__):
            running = asyncio.create_task(module.run(chosen, line.hooks))
            await line.ready(lambda: not running.done())
            try:
                yield line
            finally:
                for _ in range(2):  # the second ends the calls now
                    signals[signal.SIGTERM](signal.SIGTERM, None)
                await running
        assert [error for session in openai.sessions for error in session.errors] == []


@contextlib.asynccontextmanager
async def a_call(*module: Any, **settings: Any) -> Any:
    """A call that is up."""
    async with a_bridge(*module, **settings) as line:
        yield line, *await line.call()


def request(method: str, path: str, body: str | bytes = b"", **headers: str) -> bytes:
    """An HTTP request, byte for byte. A header's value "" leaves it out."""
    body = body.encode() if isinstance(body, str) else body
    given = {"Host": "localhost"} | ({"Content-Length": str(len(body))} if body else {})
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in given.items() if value]
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


async def ask(port: int | str, *segments: bytes) -> tuple[int, dict[str, str], str]:
    """The status, headers and body of the response, of which nothing may follow."""
    url, tls = urlsplit(str(port)), str(port).startswith("https")
    where = (url.hostname, url.port or (443 if tls else 80)) if url.netloc else ("127.0.0.1", port)
    reader, writer = await asyncio.open_connection(*where, ssl=tls or None)
    try:
        for segment in segments:
            writer.write(segment)
            await asyncio.sleep(0)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
        return int(head[9:12]), headers, "" if head[9] == "1" else (await reader.read()).decode()
    except asyncio.IncompleteReadError as exc:
        raise AssertionError(f"no HTTP response, but {exc.partial!r}") from None
    finally:
        writer.close()


def form(sid: str = "CA" + "5" * 32, **more: str) -> str:
    return urlencode({"CallSid": sid, "From": CALLER, "To": CALLED} | more)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


# ── The webhook, its form, and who may send it ──────────────────────────────────────────────────


async def test_twiml() -> None:
    """The webhook gets a stream with a token, and where to ask what is next; by GET as well."""
    async with a_bridge(public_base_url=BASE) as line:
        for sent in (request("POST", VOICE, form()), request("GET", f"{VOICE}?{form()}")):
            status, headers, text = await ask(line.port, sent)
            assert (status, headers["Content-Type"]) == (200, "text/xml; charset=utf-8")
            (stream,), redirect = ElementTree.fromstring(text)
            assert stream.attrib == {"url": "wss://phone.example/twilio/stream"}
            parameters = {p.attrib["name"]: p.attrib["value"] for p in stream}
            assert len(parameters.pop("token")) > 70
            assert list(parameters.values()) == [CALLER, CALLED]
            assert (redirect.tag, redirect.attrib) == ("Redirect", {"method": "POST"})
            assert redirect.text == f"{BASE}/twilio/next"
    async with a_bridge() as line:
        text = (await ask(line.port, request("POST", VOICE, form(), Host="[::1]:9")))[2]
        assert '"wss://[::1]:9/twilio/stream"' in text, "the name by which the request came"
        twilio = line.caller()  # whatever a caller is named, the TwiML is well-formed and short
        await twilio.post(From="\"<a&b>'", To="x\x00\n\u2028y" + "z" * 900)
        _, caller, called = twilio.parameters.values()
        assert caller == "\"<a&b>'" and called.startswith("x") and len(called) <= 500


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
UPGRADE |= {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
PAIRS = {"CallSid": "CA" + "5" * 32, "From": CALLER, "Empty": ""}
REQUESTS = list[tuple[dict[str, str], bytes, int]]()  # settings, a request, its status
for path_body, headers, status in [  # without an auth token
    ("GET /; GET /health; GET /health?x body; POST {v} {f}", {}, 200),
    ("PUT {v} {f}; HEAD {v}; DELETE /health", {}, 405),
    ("POST /nowhere a=b; GET /nowhere", {}, 404),
    ("GET /twilio/stream", {}, 426),
    ("GET /twilio/stream", {"Connection": "upgrade", "Upgrade": "websocket"}, 400),
    ("GET /health", {"X": "a\0"}, 400),
    ("GET /health", {"X": "a\rb"}, 400),
    ("GET /; POST {v} {f}", {"X": "y" * 20_000}, 431),
    ("POST {v}; POST {v} From=x; POST {v} CallSid=CA5", {}, 400),
    ("POST {v}", {"Content_Length": "99999999"}, 413),
    ("POST {v}", {"Content_Length": "9" * 5000}, 413),
    ("POST {v}", {"Content_Length": "-1"}, 400),
    ("POST {v} a=b", {"content_length": "4"}, 400),  # a second one
    ("POST {v} a=b", {"content_length": "0"}, 400),
    ("POST {v}; POST {v} a=b", {"Transfer_Encoding": "chunked"}, 411),
]:
    for line in path_body.format(v=VOICE, f=form()).split("; "):
        method, path, body = (line + " ").split(" ", 2)
        REQUESTS.append(({}, request(method, path, body.strip(), **headers), status))
for one in "A" * 32, "5" * 32 + "\n", "٣" * 32:
    REQUESTS.append(({}, request("POST", VOICE, form("CA" + one)), 400))
for sent, status in [
    (b"POST /twilio/voice HTTP/1.0\r\nHost: localhost\r\n\r\n", 400),
    (b"POST /twilio/voice HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
    (b"what is this\r\n\r\n", 400),
    (request("POST", VOICE, (form() + "&x=").ljust(65536, "y")), 200),
    (request("POST", VOICE, b"y" * 65537), 413),
    (request("POST", VOICE, form()) + request("PUT", "/") + b"junk" * 999, 200),
    (request("POST", VOICE, form() + "&a=b" * 197), 200),
    (request("POST", VOICE, form() + "&a=b" * 198), 403),  # more than 200 pairs
    (request("POST", VOICE, form().encode() + b"&Name=%ff\xfe"), 200),
]:
    REQUESTS.append(({}, sent, status))
MINE = "Host: 127.0.0.1:8080; Host: [::1]:8080; Host: LOCALHOST; Origin: http://localhost; "
MINE += "Sec-Fetch-Site: same-origin; X: y"
NOT_MINE = "Host: ; Host: phone.example; Host: localhost.example; Host: 127.0.0.1.example; "
NOT_MINE += "Host: 1270.0.0.1; X-Forwarded-For: 192.0.2.1; x-forwarded-proto: https; Via: 1.1 x; "
NOT_MINE += "Forwarded: for=192.0.2.1; Fly-Client-IP: 192.0.2.1; CF-Ray: 1; X-Real-IP: 192.0.2.1; "
NOT_MINE += "X-Envoy-External-Address: 192.0.2.1; X-Amzn-Trace-Id: Root=1; Origin: null; "
NOT_MINE += "Origin: http://else.example; Sec-Fetch-Site: cross-site"
for header in f"{MINE}; {NOT_MINE}".split("; "):
    one, status = dict([header.split(": ")]), 200 if header in MINE.split("; ") else 403
    REQUESTS.append(({}, request("POST", VOICE, form(), **one), status))
    REQUESTS.append(({}, request("GET", "/page", **one), status))
    sent = request("GET", "/twilio/stream", **UPGRADE | one)
    REQUESTS.append(({}, sent, 101 if status == 200 else 403))
for base, path, url, token, status in [  # PUBLIC_BASE_URL, path of the request, what Twilio signs
    (BASE, VOICE, BASE + VOICE, "12345", 200),
    (BASE, VOICE, BASE + VOICE, "second", 200),  # while one is being rotated
    (BASE, VOICE, BASE + ":443" + VOICE, "12345", 200),
    (BASE + ":443", VOICE, BASE + VOICE, "12345", 200),
    (BASE + ":8443", VOICE, BASE + ":8443" + VOICE, "12345", 200),
    (BASE + "/t", VOICE, BASE + "/t" + VOICE, "12345", 200),  # a proxy strips the path
    (BASE + "/phone", "/phone" + VOICE, BASE + "/phone" + VOICE, "12345", 200),  # … keeps it
    (BASE, VOICE + "?a=b", BASE + VOICE + "?a=b", "12345", 200),
    ("", VOICE, "https://localhost" + VOICE, "12345", 200),  # this computer itself
    (BASE, VOICE + "?a=b", BASE + VOICE, "12345", 403),
    (BASE, VOICE, "http://phone.example" + VOICE, "12345", 403),
    (BASE, VOICE, BASE + "/twilio/next", "12345", 403),
    (BASE, VOICE, BASE + VOICE, "other", 403),
]:
    made = RequestValidator(token).compute_signature(url, PAIRS)
    sent = request("POST", path, urlencode(PAIRS), X_Twilio_Signature=made)
    REQUESTS.append((SIGNED | {"public_base_url": base}, sent, status))
signature = {"X_Twilio_Signature": RequestValidator("12345").compute_signature(BASE + VOICE, PAIRS)}
for body, headers in [
    (urlencode(PAIRS), {}),
    (urlencode(PAIRS), signature | {"x-twilio-signature": signature["X_Twilio_Signature"]}),
    (urlencode(PAIRS) + "&x=y", signature),
    (urlencode(PAIRS).replace("5", "6"), signature),
]:
    REQUESTS.append((SIGNED, request("POST", VOICE, body, **headers), 403))


@pytest.mark.parametrize("settings", {str(row[0]): row[0] for row in REQUESTS}.values())
async def test_requests(settings: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Each request gets its HTTP response; nobody else than Twilio or this computer is let in."""
    wrong = list[Any]()
    async with a_bridge(**settings) as line:
        for given, sent, status in REQUESTS:
            if given == settings:
                caplog.clear()
                got, headers, body = await ask(line.port, sent)
                logged = [text for text in warnings(caplog) if text.startswith("403")]
                right = (got, len(logged), "Allow" in headers) == (status, got == 403, got == 405)
                right &= "HTTP/1.1" not in body and "12345" not in caplog.text
                wrong += [] if right else [(sent[:200], status, got, body, logged)]
        assert len(line.openai.asked) <= 1, "a call was begun for a stranger"
    assert wrong == []


async def test_other_machine() -> None:
    """On Fly.io what belongs to a call of another machine is sent there, once."""
    async with a_bridge(fly_machine_id="aaa", public_base_url=BASE, twilio_auth_token="x") as line:
        twilio = line.caller()
        assert f"{BASE}/twilio/next/aaa" in await twilio.post()
        assert twilio.stream_url.endswith("/twilio/stream/aaa")
        for path in ("/twilio/next/bbb", "/twilio/stream/bbb"):
            headers = (await ask(line.port, request("GET", path)))[1]
            assert headers["fly-replay"] == "prefer_instance=bbb"
            sent = request("GET", path, fly_replay_src="instance=bbb")  # that one is gone
            assert (await ask(line.port, sent))[0] == 403


async def test_other_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an auth token another computer gets 403 and no page."""
    monkeypatch.setattr(bridge.TwilioConnection, "remote_address", ("192.0.2.7", 1))
    for settings in ({}, {"twilio_auth_token": "12345"}):
        async with a_bridge(**settings) as line:
            line.hooks.pages["/"] = lambda: "secret"
            made = RequestValidator("12345").compute_signature("https://localhost" + VOICE, PAIRS)
            sent = request("POST", VOICE, urlencode(PAIRS), X_Twilio_Signature=made)
            assert (await ask(line.port, sent))[0] == 403
            assert "secret" not in (await ask(line.port, request("GET", "/")))[2]
            assert (await ask(line.port, request("GET", "/health")))[0] == 200


async def test_form_in_segments() -> None:
    """A form may come byte by byte; one that waits for 100-continue is told once to go on."""
    async with a_bridge() as line:
        sent = request("POST", VOICE, form(), Content_Type="application/x-www-form-urlencoded")
        for size in (1, 7):
            segments = [sent[at : at + size] for at in range(0, len(sent), size)]
            assert "<Stream" in (await ask(line.port, *segments))[2]
        head, _, body = request("POST", VOICE, form(), Expect="100-continue").partition(b"\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        for byte in body:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        rest = await reader.read()
        assert rest.startswith(b"HTTP/1.1 200") and b"100 Continue" not in rest
        writer.close()


async def test_20_mib(caplog: pytest.LogCaptureFixture) -> None:
    """A client that reads only when all is written gets 413, and nothing else."""
    async with a_bridge() as line:
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        writer.write(request("POST", VOICE, b"y" * (20 << 20)))
        await writer.drain()
        got = await reader.read()
        writer.close()
    assert got.startswith(b"HTTP/1.1 413") and got.count(b"HTTP/1.1") + len(warnings(caplog)) == 1


async def test_incomplete_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not complete in 5 s gets 408, also when it comes byte by byte."""
    assert bridge.REQUEST_S == 5
    monkeypatch.setattr(bridge, "REQUEST_S", 0.15)
    async with a_bridge() as line:
        sent = request("POST", VOICE, form())
        assert (await ask(line.port, sent[:-1]))[0] == 408
        reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
        got = asyncio.ensure_future(reader.readline())
        for byte in sent:
            if not got.done():
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)
        assert (await got).startswith(b"HTTP/1.1 408")


async def test_costly_requests() -> None:
    """Neither an odd header nor a form of thousands of pairs holds anybody up."""
    async with a_bridge(**SIGNED) as line:
        began = time.monotonic()
        for odd in (b"A:%9000s\n" % b"", b"A: x%9000s\x01" % b"", b"A" * 9000 + b"("):
            assert (await ask(line.port, request("GET", "/")[:-2] + odd + b"\r\n\r\n"))[0] == 400
        body = "&".join(f"a{n:x}=" for n in range(9000))
        for headers in ({}, {"X_Twilio_Signature": "x"}) * 5:
            assert (await ask(line.port, request("POST", VOICE, body, **headers)))[0] in (400, 403)
        assert time.monotonic() - began < 0.3
        with mock.patch.object(bridge, "parse_qs", side_effect=AssertionError("parsed")):
            assert (await ask(line.port, request("POST", VOICE, body)))[0] == 403


async def test_silent_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections without a request are bounded: the oldest goes, and a webhook is heard."""
    assert bridge.MAX_SILENT <= 300
    monkeypatch.setattr(bridge, "MAX_SILENT", 20)
    async with a_bridge() as line:
        idle = [await asyncio.open_connection("127.0.0.1", line.port) for _ in range(30)]
        assert await asyncio.wait_for(idle[0][0].read(), 1) == b""
        assert (await ask(line.port, request("GET", "/health")))[0] == 200
        assert sum(reader.at_eof() for reader, _ in idle) <= 11
        for _, writer in idle[:-1]:
            writer.close()
        await until(lambda: len(bridge.TwilioConnection.silent) == 1)  # those that left are gone
        idle[-1][1].close()


async def test_outside_text_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What comes from outside cannot steer a terminal, and makes no false line."""
    async with a_bridge() as line:
        await ask(line.port, request("POST", VOICE, form(), Origin="http://\x80\x9b[31mx\t"))
        await ask(line.port, request("POST", VOICE, form("CA\nERROR"), Host="\x9b[31m"))
        await line.caller().opens(callSid="CA\nERROR\x1b[31m")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]|\nERROR", caplog.text)


async def test_webhook(caplog: pytest.LogCaptureFixture) -> None:
    """A status callback connects nothing; a webhook that comes twice is one call; others wait."""
    async with a_bridge(max_calls=1) as line:
        for status in ("completed", "busy", "failed", "no-answer", "canceled"):
            assert list(ElementTree.fromstring(await line.caller().post(CallStatus=status))) == []
        assert not line.openai.asked and "status callback" in caplog.text
        twilio = line.caller()
        await twilio.post()
        first = twilio.parameters
        await twilio.post()
        assert twilio.parameters["token"] != first["token"]
        twilio.parameters = first  # either token is good
        await twilio.opens()
        session, text = await line.openai.session(), await line.caller().post()
        assert "混み合って" in text and "おかけ直し" in text and "<Stream" not in text
        await session.is_heard_by(twilio)  # nobody in a call is disturbed
        assert "<Stream" in await twilio.post() and len(line.openai.asked) == 1
    assert any(re.search(r"MAX_CALLS.*\b1\b", text) for text in warnings(caplog))


async def test_signed_call() -> None:
    """A whole call is signed, the handshake as wss; the webhook replayed later connects nothing."""
    for base in (BASE, BASE + "/phone"):
        async with a_bridge(**SIGNED | {"public_base_url": base}) as line:
            twilio, _ = await line.call()
            assert twilio.stream_url == f"wss{base[5:]}/twilio/stream"
            for url in (base + "/twilio/stream", "wss://else.example/twilio/stream"):
                with pytest.raises(InvalidStatus, match="403"):
                    await line.caller().opens(twilio.signature(url))
            path = f"{VOICE}?{form()}"
            sent = request("GET", path, **twilio.signature(base + path))
            assert (await ask(line.port, sent))[0] == 200
            asked = len(line.openai.asked)
            await twilio.hangs_up()
            await line.hooks.ended()
            assert "<Stream" not in await twilio.post() and len(line.openai.asked) <= asked + 1


def test_answers() -> None:
    """Whether OpenAI responds to a turn by itself, and how late it may notice the end of one."""
    for turns, expected in (None, (1.5, 4000)), ({"create_response": False}, (0.0, 500)):
        settings = bridge.Settings(session={"audio": {"input": {"turn_detection": turns}}})
        office = bridge.Bridge(settings, Spy())
        assert (office.answers_s, office.vad_ms) == expected


# ── The stream: its token, its `start`, its messages ────────────────────────────────────────────

TOKEN = {"token": "9999999999.0123456789abcdef." + "0" * 64}
STARTS = [{"customParameters": given} for given in (None, {}, [], {"token": ["x"]}, TOKEN)]
STARTS += [{"streamSid": sid} for sid in ("", None, 0, [], {}, "MZ1", "MZ" + "g" * 32)]  # type: ignore
STARTS += [{"callSid": sid} for sid in ("", None, [], "CA" + "7" * 32, "CA" + "7" * 32 + "\n")]  # type: ignore


async def test_start(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A stream without a whole `start` in 5 s is closed; other calls are not touched."""
    assert bridge.START_S == 5
    async with a_call() as (line, other, session):
        for changed in STARTS:
            stranger = line.caller()
            await stranger.post()
            caplog.clear()
            await stranger.opens(**changed)
            assert await stranger.closed(1) == 1008 and len(warnings(caplog)) in (1, 2), changed
            assert "おかけ直し" in await stranger.next(), "it was the bridge that closed it"
        monkeypatch.setattr(bridge, "START_S", 0.1)
        asked = len(line.openai.asked)
        assert await (await line.caller().opens(nothing=True)).closed(1) == 1008
        assert len(line.openai.asked) == asked and len(line.hooks.calls) == 1
        await session.is_heard_by(other)


async def test_token() -> None:
    """A token is good once, for its own call, for a minute; a call has one stream at a time."""
    async with a_bridge() as line:
        first, other, late = line.caller(), line.caller(), line.caller()
        for twilio in (first, other, late):
            await twilio.post()
        assert await (await other.opens(customParameters=first.parameters)).closed() == 1008
        used = {"callSid": first.sid, "customParameters": first.parameters}
        await first.opens()
        await until(lambda: line.hooks.calls)
        assert await (await line.caller().opens(**used)).closed() == 1008
        await first.post()
        again = used | {"customParameters": first.parameters}
        assert await (await line.caller().opens(**again)).closed() == 1008
        assert first.socket.close_code is None and len(line.hooks.calls) == 1
        now = time.time()
        with mock.patch.object(time, "time", lambda: now + 62):
            assert await (await late.opens()).closed() == 1008
        await first.post()  # redirected to the webhook: another stream when this one has ended
        await first.hangs_up()
        await line.hooks.ended()
        assert await (await line.caller().opens(**used)).closed() == 1008
        await first.opens()
        await until(lambda: len(line.hooks.calls) == 2)


JUNK = ["{", "", "[]", "7", '"x"', "null", "{}", '{"event":7}', '{"event":"start"}', "[" * 9000]
AUDIO = '{"event":"media","media":{"track":"inbound","chunk":"1","timestamp":"1","payload":"%s"}}'
JUNK += ['{"event":"mark","mark":{"name":["x"]}}', AUDIO % "????", AUDIO % "QUJ"]


@pytest.mark.parametrize("who", ["a stranger", "twilio", "openai"])
async def test_junk(who: str, caplog: pytest.LogCaptureFixture) -> None:
    """An unreadable message costs one line without a traceback; the 50th the connection."""
    async with a_call() as (line, twilio, session):
        if who == "a stranger":
            twilio = await line.caller().opens(nothing=True)
        wire = session.socket if who == "openai" else twilio.socket
        for text in (b'{"event":"\xff"}', *(text.encode() for text in JUNK)):
            await wire.send(text, text=True)
        if who != "a stranger":
            await session.is_heard_by(twilio)
            assert 8 <= len(warnings(caplog)) <= 14
        for _ in range(60):
            with contextlib.suppress(ConnectionClosed):
                await wire.send("{")
        await asyncio.wait_for(wire.wait_closed(), 1)
        assert who != "openai" or await line.openai.session(2)
    assert len(warnings(caplog)) <= 54 and "Traceback" not in caplog.text


# ── /twilio/next ────────────────────────────────────────────────────────────────────────────────

NO_ANSWER, COMPLETED = {"DialCallStatus": "no-answer", **IN_PROGRESS}, {"CallStatus": "completed"}
NEXT = [  # how the call ended, what is asked one after the other, the verbs of the last TwiML
    ("hang_up", [IN_PROGRESS] * 2, "Hangup"),
    ("caller", [COMPLETED], "Hangup"),
    ("lost", [IN_PROGRESS], "Connect Redirect"),
    ("lost", [{"CallStatus": ""}], "Connect Redirect"),
    ("open", [IN_PROGRESS], "Connect Redirect"),
    ("model", [IN_PROGRESS], "Say Hangup"),
    ("transfer", [IN_PROGRESS], "Dial"),
    ("transfer", [IN_PROGRESS, {"DialCallStatus": "completed", **COMPLETED}], "Hangup"),
    ("transfer", [IN_PROGRESS, {"DialCallStatus": "completed", **IN_PROGRESS}], "Hangup"),
    ("transfer", [IN_PROGRESS, NO_ANSWER], "Connect Redirect"),
    ("transfer", [IN_PROGRESS, NO_ANSWER | COMPLETED], "Hangup"),
    ("unclaimed", [IN_PROGRESS], "Say Hangup"),
    ("unknown", [IN_PROGRESS], "Connect Redirect"),
    ("unknown", [COMPLETED], "Hangup"),
]


@pytest.mark.parametrize(("ending", "asked", "verbs"), NEXT)
async def test_next(ending: str, asked: list[dict[str, str]], verbs: str) -> None:
    """What Twilio does when the stream, or the <Dial> of a transfer, has ended."""
    async with a_bridge() as line:
        twilio, response = line.caller(), ElementTree.Element("")
        if ending == "unclaimed":
            await twilio.post()
        elif ending != "unknown":
            twilio, session = await line.call()
            await session.speaks(sound(40), text="こんにちは。")
            await until(lambda: line.hooks.facts("model_said"))
            call = line.hooks.calls[0]
            call.notes = None  # a fault of a hook
            acts: dict[str, Callable[[], Any]] = {
                "hang_up": call.hang_up,
                "caller": twilio.hangs_up,
                "lost": twilio.socket.transport.abort,
                "model": lambda: session.socket.close(4004),
                "transfer": lambda: call.transfer("+81312345678"),
                "open": lambda: asyncio.sleep(1.05),  # the bridge has not seen its end yet
            }
            await (acts[ending]() or asyncio.sleep(0))
            if ending != "open":
                await line.hooks.ended()
        for one in asked:
            response = ElementTree.fromstring(await twilio.post("/twilio/next", **one))
        assert " ".join(verb.tag for verb in response) == verbs
        if verbs == "Dial":
            action = twilio.stream_url.replace("wss", "https").replace("stream", "next")
            expected = {"action": action, "method": "POST", "timeout": "20"}
            assert response[0].attrib == expected and response[0].text == "+81312345678"
        if verbs.startswith("Connect"):
            await twilio.opens()
            session = await line.openai.session(1 if ending == "unknown" else 2)
            create = await session.gets("response.create")
            assert ("no-answer" if ending == "transfer" else "cut off and is back") in create
            if ending != "unknown":  # with its memory
                assert "こんにちは。" in await session.gets("conversation.item.create")


async def test_many_streams_of_one_call() -> None:
    """A call is connected again three times; a later call of its CallSid inherits no <Dial>."""
    async with a_call() as (line, twilio, _):
        for count in (1, 2, 3, 4):
            twilio.socket.transport.abort()
            assert await line.hooks.ended(count) == "twilio lost"
            assert ("<Stream" in await twilio.next()) == (count < 4)
            if count < 4:
                await twilio.opens()
                await until(lambda count=count: len(line.hooks.calls) == count + 1)
        for count in (5, 6):
            await twilio.post(From="anonymous")
            await twilio.opens()
            await until(lambda count=count: len(line.hooks.calls) == count)
            if count == 5:
                line.hooks.calls[-1].transfer("+81312345678")
                await twilio.closed()
                assert f'callerId="{CALLED}"' in await twilio.next(), "Twilio cannot show another"
        twilio.socket.transport.abort()
        await line.hooks.ended(6)
        assert "<Dial" not in await twilio.next()


# ── Health and pages ────────────────────────────────────────────────────────────────────────────

HTML = "text/html; charset=utf-8"
PAGES: list[Any] = [  # a page, its status, kind, and a part of it
    (HERE / "bridge.py", 200, "text/x-python", "import asyncio"),
    (lambda query: f"<p>{query['a']}</p>", 200, HTML, "<p>b c</p>"),
    (lambda: "はい".encode(), 200, HTML, "はい"),
    (lambda query: {"はい": [1]}, 200, "application/json", '{"はい": [1]}'),
    (lambda query: query["missing"], 500, "text/plain", "log"),
    (HERE / "nothing.html", 500, "text/plain", "log"),
    (None, 200, "application/json", '"status": "ok", "calls": 1'),
]


async def test_pages() -> None:
    """A file, or what a function of the query returns: text, bytes or JSON. Nothing but GET."""
    async with a_call() as (line, *_):
        for page, status, kind, part in PAGES:
            line.hooks.pages["/page"] = page
            path = "/page?a=b+c" if page else "/health"
            got, headers, text = await ask(line.port, request("GET", path))
            assert got == status and headers["Content-Type"].startswith(kind) and part in text
            assert (await ask(line.port, request("HEAD", path)))[::2] == (405, "")
            assert (await ask(line.port, request("POST", path, "a=b")))[0] == 405


# ── One whole call, and what can be lost of it ──────────────────────────────────────────────────


@pytest.mark.parametrize("wire", ["fast", "plain"])
async def test_whole_call(wire: str) -> None:
    """All sound comes whole, and hooks are told the story; without section 8 as well."""
    text, section, _ = (HERE / "bridge.py").read_text().partition("# ── 8 The fast wire")
    module: Any = bridge
    if wire == "plain":
        module = sys.modules["plain_bridge"] = types.ModuleType("plain_bridge")
        exec(compile(text, "plain_bridge.py", "exec"), vars(module))
        assert section and module.CONNECTIONS["twilio"] is module.TwilioConnection
    async with a_call(module, greeting="もしもし。", barge_in_ms=0.0) as (line, twilio, session):
        assert "もしもし。" in await session.gets("response.create")
        await session.speaks(sound(100, 1), text="もしもし。")
        await until(lambda: line.hooks.facts("model_said"))
        item = await session.hears()
        for at in range(0, 3200, 160):
            await twilio.socket.send(twilio.media(sound(400, 2)[at : at + 160]))
        await session.heard_out(item, "天気は？")
        await session.calls_tool("weather")  # there is none: the model is told so
        await session.gets("response.create", 2)
        long = await session.speaks(sound(3000, 3), text="晴れです。")
        await until(lambda: len(twilio.sent) > 8 * 3000)
        await asyncio.sleep(0.2)
        item = await session.hears()
        truncated = json.loads(await session.gets("conversation.item.truncate"))
        await until(lambda: twilio.cuts)
        assert truncated["item_id"] == long and len(twilio.cuts) == 1
        assert abs(truncated["audio_end_ms"] - (3000 - twilio.cuts[0])) < 40
        await session.heard_out(item, "どうも。")
        await session.speaks(sound(60, 4), text="いいえ。")
        await until(lambda: len(line.hooks.facts("model_said")) == 3)
        await twilio.hangs_up()
        assert await line.hooks.ended() == "caller hung up"
        await asyncio.wait_for(session.socket.wait_closed(), 1)
        assert session.heard == sound(400, 2) and twilio.faults == []
        assert twilio.sent == sound(100, 1) + sound(3000, 3) + sound(60, 4)
        story = [event for event, _ in line.hooks.told if not event.endswith("_used")]
        short = " ".join(event[0] + event.split("_")[1][:3] for event in story)
        first = "csta mask msta msai csta csto csai mask msta csta mint msai csto csai"
        assert short == first + " msta msai cend"


LOSSES: list[Any] = [  # how a session is lost, what comes then, and whether that is for good
    (lambda socket: socket.transport.abort(), [], False),
    (lambda socket: socket.close(1011), [], False),
    (lambda socket: socket.close(), [503], False),
    (lambda socket: socket.close(), [b"\x81\x7e\x01"], False),  # 101, and half a frame
    (lambda socket: socket.close(), [401], True),
    (lambda socket: socket.close(4004, "no such model"), [], True),
]


@pytest.mark.parametrize(("lose", "refusals", "for_good"), LOSSES)
async def test_losses(lose: Any, refusals: list[Any], for_good: bool) -> None:
    """A session that is lost is replaced and told what was said; or the caller hears an apology."""
    async with a_call() as (line, twilio, session):
        await session.speaks(sound(40), text="こんにちは。")
        await until(lambda: line.hooks.facts("model_said"))
        line.openai.refusals += refusals
        await (lose(session.socket) or asyncio.sleep(0))
        if for_good:
            assert await line.hooks.ended() == "model lost" and "不具合" in await twilio.next()
        else:
            session = await line.openai.session(2)
            assert "こんにちは。" in await session.gets("conversation.item.create")
            await session.speaks(sound(40, 2), text="はい。")
            await until(lambda: twilio.sent == sound(40) + sound(40, 2))
        assert line.hooks.facts("model_failed")


# ── The fast wire, and bounds ───────────────────────────────────────────────────────────────────


def frame(head: int, payload: bytes, masked: bool = True, length: int = -1) -> bytes:
    """A WebSocket frame, right or wrong."""
    length = len(payload) if length < 0 else length
    size = bytes([length]) if length < 126 else b"\x7e" + (length & 65535).to_bytes(2, "big")
    size = size if length < 65536 else b"\x7f" + length.to_bytes(8, "big")
    data = b"\x81\x82\x83\x84" + apply_mask(payload, b"\x81\x82\x83\x84") if masked else payload
    return bytes([head, size[0] | 128 * masked]) + size[1:] + data


async def test_cut_frames() -> None:
    """Messages arrive whole wherever the bytes are cut, from either side; a ping is no message."""
    async with a_call() as (line, twilio, session):
        await session.begins()
        at = {"response_id": session.active, "item_id": "i", "delta": "/v8="}
        delta = json.dumps({"type": "response.output_audio.delta", **at}).encode()
        at_twilio, at_openai = line.hooks.calls[0].twilio, line.hooks.calls[0].openai
        for wire, text in ((at_twilio, twilio.media(sound(20)).encode()), (at_openai, delta)):
            texts = (text, b'{"type":"x","event":"x"}')
            data = b"".join(frame(0x81, text, wire is at_twilio) for text in texts)
            data += frame(0x89, b"", wire is at_twilio)
            for cut in range(1, len(data)):
                wire.data_received(data[:cut])
                wire.data_received(data[cut:])
            for byte in data:
                wire.data_received(bytes([byte]))
            piece = sound(20) if wire is at_twilio else b"\xfe\xff"
            came = (lambda: session.heard) if wire is at_twilio else (lambda: twilio.sent)
            await until(lambda: came() == piece * len(data))  # noqa: B023
        inner = frame(0x81, twilio.media(sound(20, 9)).encode())
        around = frame(0x81, b"x" * len(inner))[: -len(inner)]  # so `inner` is no message
        for wire, data in ((at_twilio, around), (at_twilio, inner), (at_openai, inner)):
            wire.data_received(data)
        assert at_twilio.unreadable == 1 and sound(20, 9) not in session.heard
        assert at_openai.state is not bridge.State.OPEN  # OpenAI does not mask


async def test_handshake_in_pieces() -> None:
    """OpenAI's answer to the handshake may come byte by byte, as all that follows."""
    fast = bridge.CONNECTIONS["openai"]
    whole = fast.data_received

    def bytewise(wire: Any, data: bytes) -> None:
        for at in range(max(1, len(data))):
            whole(wire, data[at : at + 1])

    with mock.patch.object(fast, "data_received", bytewise):
        async with a_call() as (_, twilio, session):
            await session.is_heard_by(twilio)


async def test_other_forms_of_messages() -> None:
    """Fragments, other JSON, long and very long messages are what they say."""
    async with a_call() as (line, twilio, session):
        text = json.dumps(json.loads(twilio.media(sound(20, 1))), indent=1)
        await twilio.socket.send(text)
        data, then = text.encode(), twilio.media(sound(20, 2)).encode()  # fragments, then another
        parts = frame(0x01, data[:9]) + frame(0x80, data[9:])
        twilio.socket.transport.write(parts + frame(0x81, then))
        await twilio.socket.send(text.replace("/", "\\/"))
        await twilio.socket.send(twilio.media(sound(5000, 2)))
        await twilio.socket.send(twilio.media(sound(20, 3)))
        heard = sound(20, 1) * 2 + sound(20, 2) + sound(20, 1) + sound(5000, 2) + sound(20, 3)
        await until(lambda: session.heard == heard)
        item = await session.speaks(sound(100, 4))
        await session.speaks(sound(60_000, 5), item, 60_000)  # a message of 640 KB
        await session.speaks(sound(100, 6), item)
        await until(lambda: twilio.sent == sound(100, 4) + sound(60_000, 5) + sound(100, 6))
        await asyncio.wait_for(await session.socket.ping(b""), 1)
        wire, before = line.hooks.calls[0].openai, len(session.received)
        sizes = [125, 126, 65535, 65536, *[130] * 1100]
        with mock.patch.object(wire.transport, "write", wraps=wire.transport.write) as write:
            for size in sizes:
                text = '{"type":"session.update","session":{"type":"realtime","instructions":"'
                wire.put((text + "x" * (size - len(text) - 3) + '"}}').encode())
        await session.gets("session.update", 1 + len(sizes))
        dump = [json.dumps(event, separators=(",", ":")) for event in session.received[before:]]
        assert [len(text) for text in dump] == sizes
        assert len({call.args[0][4:8] for call in write.mock_calls[4:]}) > 1000, "masks differ"


WRONG = [frame(0x81, b"{}", masked=False), frame(0xC1, b"{}"), frame(0x09, b"a ping in parts")]
WRONG += [frame(0x89, b"p" * 200), frame(0x83, b"?"), frame(0x80, b"the end of nothing")]
WRONG += [frame(0x88, b"\x03"), frame(0x81, b"", length=1 << 40)]
WRONG += [frame(0x01, b"x" * 60_000) + frame(0x80, b"x" * 60_000)]


async def test_wrong_frames() -> None:
    """A frame that breaks the rules closes its own call and no other."""
    async with a_call() as (line, twilio, session):
        for count, data in enumerate(WRONG, 1):
            other, _ = await line.call()
            other.socket.transport.write(data)
            assert await other.closed() in (1002, 1006, 1009), data[:20]
            await line.hooks.ended(count)
        await session.is_heard_by(twilio)
        ours = line.hooks.calls[0].twilio
        ours.protocol.fail(1011)  # as when a ping gets no pong
        ours.send_data()
        ours.put(b"{}")  # it is dropped, and does not raise


def stops_reading(end: Any, ours: Any) -> Any:
    """This side of a connection reads no more, and its buffers are small. Returns its transport."""
    both = (end.socket.transport, socket.SO_RCVBUF), (ours.transport, socket.SO_SNDBUF)
    for wire, option in both:
        wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)
    end.socket.transport.pause_reading()
    return end.socket.transport


@pytest.mark.parametrize("who", ["caller", "model", "pongs"])
async def test_unread_bytes(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other side does not read is bounded, pongs as well."""
    assert bridge.MAX_UNSENT <= 8 << 20
    monkeypatch.setattr(bridge, "MAX_UNSENT", 100_000)
    async with a_call() as (line, twilio, session):
        call, is_model = line.hooks.calls[0], who == "model"
        wire = stops_reading(*((session, call.openai) if is_model else (twilio, call.twilio)))
        for _ in range(99):
            if who == "caller":
                await session.speaks(sound(8000), "item", 2000)
            elif who == "model":
                await twilio.socket.send(twilio.media(sound(4000)))
            else:
                wire.write(frame(0x89, b"p" * 100) * 400)
            await asyncio.sleep(0)
        await until(lambda: len(line.openai.sessions) == 2 or line.hooks.facts("call_ended"))
        assert bool(line.hooks.facts("call_ended")) == (not is_model)
        wire.abort()


async def test_stop_beside_an_unread_stream() -> None:
    """The second signal ends the process within 3 s, whatever the other side does."""
    async with a_call() as (line, twilio, _):
        await until(lambda: line.hooks.calls)
        ours = line.hooks.calls[0].twilio
        wire = stops_reading(twilio, ours)
        while ours.transport.get_write_buffer_size() <= 64 << 10:  # where websockets begins to wait
            ours.put(b"x" * 8000)
            await asyncio.sleep(0)
        began = time.monotonic()
        asyncio.get_running_loop().call_later(3.2, wire.abort)
    assert time.monotonic() - began < 3


# ── Settings ────────────────────────────────────────────────────────────────────────────────────

SETTINGS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"PORT": "9000", "MAX_CALLS": " 3 "}, {"port": 9000, "max_calls": 3, "hooks": None}),
    ({"PORT": "", "VOICE": "", "HOOKS": ""}, {"port": 8080, "voice": "marin", "hooks": ""}),
    ({"FLY_APP_NAME": "my-app"}, {"public_base_url": "https://my-app.fly.dev"}),
    ({"FLY_APP_NAME": "my-app", "PUBLIC_BASE_URL": BASE + "/"}, {"public_base_url": BASE}),
    ({"PUBLIC_BASE_URL": BASE + ":84/phone/"}, {"public_base_url": BASE + ":84/phone"}),
    ({}, {"max_calls": 100, "max_call_seconds": 3600, "drain_seconds": 240, "barge_in_ms": 400}),
    ({"SESSION": '{"audio": {}}'}, {"session": {"audio": {}}, "barge_in_ms": 400}),
    ({"BARGE_IN_MS": "off", "GREETING": ""}, {"barge_in_ms": OFF, "greeting": ""}),
    ({"BARGE_IN_MS": "0"}, {"barge_in_ms": 0, "transcription_model": "gpt-transcribe"}),
    ({"TRANSCRIPTION_MODEL": ""}, {"transcription_model": ""}),
]
WRONG_SETTINGS = """
PORT 70000 0 http off
OPENAI_API_KEY “sk-secret” sk-secret\x7f
MAX_CALLS -1 1.5
MAX_CALL_SECONDS nan 0 0.0 off
DRAIN_SECONDS soon inf
BARGE_IN_MS -1 on nan
SESSION [1] { {"audio":null} {"audio":{"input":[1]}} {"audio":{"output":"loud"}}
SESSION {"audio":{"input":{"format":{"type":"audio/pcm"}}}}
OPENAI_REALTIME_MODEL gpt-live-1.1
PUBLIC_BASE_URL http://a.example a.example https://a.example/?x=y https://sk-secret@a.example
PUBLIC_BASE_URL https://a.example:99999 https://a.example/twilio/voice https://a.example/health
PUBLIC_BASE_URL https://a.example/x/twilio/stream/ https://
OPENAI_REALTIME_URL https://api.openai.com/v1 wss://a.example:99999/v1 wss://sk-secret@a.example
OPENAI_REALTIME_URL wss://u:sk-secret@a.example/v1 wss://a.example/v1#x wss://[::1/v1
OPENAI_REALTIME_URL wss://a.example?model=gpt-live-1 http://a.example?api_key=sk-secret
"""


def test_settings() -> None:
    """A setting is read from the variable of its name; an empty one is its default or a choice."""
    for env, settings in SETTINGS:
        assert settings.items() <= vars(bridge.read_settings(env)).items()


@pytest.mark.parametrize("wrong", WRONG_SETTINGS.strip().split("\n"))
def test_wrong_setting(wrong: str) -> None:
    """One line: the variable, the value's fault, the fix; secrets are never shown."""
    name, *values = wrong.split()
    for value in values:
        with pytest.raises(ValueError) as raised:
            bridge.read_settings({name: value})
        line = str(raised.value)
        assert line.startswith(name) and "\n" not in line and "sk-secret" not in line
        assert re.search("give|speaks", line)


# ── The process ─────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def a_process(folder: Path, start: bool = True, shown: bool = False, **env: str) -> Any:
    """The bridge of this folder as a program. What it writes is `log`, as far as it is read."""
    openai = OpenAI()
    async with openai.serves() as url:
        line: Any = Line(free_port(), openai)
        given = {"PORT": str(line.port), "OPENAI_REALTIME_URL": url, "HOST": "127.0.0.1"} | env
        ours = {one.name.upper() for one in fields(bridge.Settings)} | {"FLY_APP_NAME"}
        ours |= {"PYTHONUNBUFFERED"}  # else a line is written in two pieces
        given |= {name: value for name, value in os.environ.items() if name not in ours}
        options: Any = {"env": given, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options = {"env": given} if shown else options
        command = (sys.executable, folder / "bridge.py")
        line.process = await asyncio.create_subprocess_exec(*command, **options)
        line.signal, line.log, line.output = line.process.send_signal, "", line.process.stdout
        try:
            if start:
                await line.ready(lambda: line.process.returncode is None)
            yield line
        finally:
            if line.process.returncode is None:
                line.process.kill()
            await line.process.communicate()


async def says(line: Any, text: str, within_s: float = 5) -> None:
    """Read its output as far as this."""
    async with asyncio.timeout(within_s):
        while text not in line.log and (more := await line.output.read(4096)):
            line.log += more.decode()
    assert text in line.log, line.log[-999:]
    assert CALLER not in line.log and "sk-secret" not in line.log


def alone(folder: Path, **hooks: str) -> Path:
    """bridge.py with these hook files, and nothing else beside it."""
    (folder / "bridge.py").write_bytes((HERE / "bridge.py").read_bytes())
    (folder / "hooks").mkdir()
    for name, code in hooks.items():
        (folder / "hooks" / f"{name}.py").write_text(code)
    return folder


FAILING: list[tuple[dict[str, str], str, int, str]] = [  # variables, a hook file, status, the line
    ({"PORT": "http"}, "", 2, "PORT is 'http': give a number"),
    ({"HOOKS": "log"}, "", 2, "HOOKS names 'log'"),
    ({}, "import sys\nsys.exit(\"BUDGET is 'x': give 1\")", 2, "BUDGET is 'x': give 1"),
    ({"OPENAI_API_KEY": "", "OPENAI_REALTIME_URL": ""}, "", 2, "OPENAI_API_KEY is not set"),
    ({"HOST": "192.0.2.1"}, "", 1, "is PORT free"),
]


async def test_failing_starts(tmp_path: Path) -> None:
    """A wrong setting, also one of a hook, ends with 2 and one line; a wrong address with 1."""

    async def fails(env: dict[str, str], hook: str, status: int, part: str) -> None:
        (folder := tmp_path / str(hash(part))).mkdir()
        given = {"OPENAI_API_KEY": "sk-secret"} | env
        async with a_process(alone(folder, mine=hook), start=False, **given) as line:
            await says(line, part)
            assert await line.process.wait() == status
            assert len([one for one in line.log.splitlines() if " INFO " not in one]) == 1, line.log

    await asyncio.gather(*(fails(*row) for row in FAILING))


TELLS = "import time\ndef call_started(): print('begun', flush=True)\n"
TELLS += "def call_ended(reason): time.sleep(0.2); print('ended:', reason, flush=True)\n"


async def test_first_signal(tmp_path: Path) -> None:
    """New calls are refused; running ones go on and are ended politely after DRAIN_SECONDS."""
    folder = alone(tmp_path, mine=TELLS)
    (folder / ".env").write_text("# comment\nexport DRAIN_SECONDS='0.6' # s\nPORT=1\n")
    async with a_process(folder, OPENAI_API_KEY="sk-secret") as line:
        twilio, session = await line.call()
        await session.gets("response.create")
        line.signal(signal.SIGTERM)
        await says(line, "stopping")
        assert "システムの更新" in await line.caller().post()
        status, _, text = await ask(line.port, request("GET", "/health"))
        assert status == 503 and json.loads(text)["status"] == "draining"
        await session.speaks(sound(700), text="はい。")
        assert await twilio.closed() == 1000 and twilio.sent and not twilio.marks
        await asyncio.sleep(0.4)  # as long as Twilio may take
        assert "おかけ直し" in await twilio.next()
        assert await asyncio.wait_for(line.process.wait(), 2) == 0
        await says(line, "ended: shutdown")


@pytest.mark.parametrize(("signals", "hook_s", "within_s"), [(2, "0.2", 3), (3, "60", 0.4)])
async def test_more_signals(signals: int, hook_s: str, within_s: float, tmp_path: Path) -> None:
    """The second ends the calls and tells the hooks; the third ends at once, whatever waits."""
    async with a_process(alone(tmp_path, mine=TELLS.replace("0.2", hook_s))) as line:
        twilio, _ = await line.call()
        line.idle = await asyncio.open_connection("127.0.0.1", line.port)  # as browsers do
        await says(line, "begun")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT)[:signals]:
            await asyncio.sleep(0.3)
            assert line.process.returncode is None
            line.signal(number)
        assert (await asyncio.wait_for(line.process.wait(), within_s) == 0) == (signals == 2)
        await says(line, "ended: shutdown" if signals == 2 else "stopping")


async def test_unread_standard_error(tmp_path: Path) -> None:
    """Nobody reads the log: calls go on, what is dropped is counted, and a signal still ends it."""
    chatty = "import logging\ndef call_ended(_):\n for n in range(4000): logging.error('x' * 99)\n"
    async with a_process(alone(tmp_path, chatty=chatty + "call_ended('')")) as line:
        twilio, session = await line.call()
        await session.is_heard_by(twilio)
        reading = asyncio.create_task(says(line, "log lines"))
        while not reading.done():
            await ask(line.port, request("POST", VOICE, form(), Host="else.example"))
        await reading
        assert int(re.findall(r"(\d+) log lines", line.log)[0]) > 50
        await twilio.hangs_up()
        line.signal(signal.SIGTERM)
        await until(lambda: line.process.returncode == 0)


# ── As a program: a call to watch, one tool, or many calls ──────────────────────────────────────


async def rehearse(wrong: list[str], url: str) -> None:
    """One call of some 10 s: what a person would hear, in figures."""
    nod, sentence = offline.speech()["key"][1][800:2600], offline.speech()["noted"][1]
    words = bytearray()  # that the caller still says

    def next_frame() -> bytes:
        frame = bytes(words[:160]).ljust(160, SILENCE)
        del words[:160]
        return frame

    env = {"LOG_FORMAT": "text", "OPENAI_REALTIME_URL": "", "HOOKS": "log,latency,offline"}
    here = a_process(HERE, shown=True, **env)
    async with contextlib.nullcontext() if url else here as line:
        token = os.environ.get("TWILIO_AUTH_TOKEN", "")
        there = SimpleNamespace(public_base_url=url, twilio_auth_token=token)
        call = Twilio(0, there) if url else line.caller()
        await call.post()
        await call.opens()
        microphone = asyncio.create_task(call.talks(next_frame))
        await until(lambda: call.sent, 9, "the greeting")
        left_alone, silent_ms = 0, 0.0
        for pause_s, mulaw in ((1.2, nod), (0.8, sentence), (1.0, nod)):
            await asyncio.sleep(pause_s)
            cuts, spoke_at = len(call.cuts), time.monotonic()
            words.extend(mulaw)
            if mulaw is nod:
                await asyncio.sleep(len(mulaw) / 8000 + 0.7)
                left_alone += len(call.cuts) == cuts and bool(call.marks)
            else:
                await until(lambda: len(call.cuts) > cuts, 3, "the model falls silent")  # noqa: B023
                silent_ms = (time.monotonic() - spoke_at) * 1000
                await until(lambda: call.marks and not words, 9, "a response")
        await until(lambda: not call.marks, 60, "the last words")
        await asyncio.sleep(0.2)
        microphone.cancel()
        await call.hangs_up()
        if line:
            line.signal(signal.SIGTERM)
            wrong += ["bridge.py ended with a fault"] * bool(await line.process.wait())
    print(f"\nsilent {silent_ms:.0f} ms after the caller's first sound; ", end="")
    print(f"backchannels left alone: {left_alone} of 2")
    wrong += ["the model did not fall silent in time"] * (silent_ms > 900)
    wrong += ["a backchannel stopped the model"] * (left_alone < 2)
    wrong += [f"against Twilio's protocol: {fault}" for fault in call.faults]


class Ear:
    """One end of a call under load: makes blocks of 20 ms, and measures those that come."""

    def __init__(self, end: Any) -> None:
        self.end, self.sent, self.came, self.odd = end, 0, list[float](), 0
        end.hear = self.hear

    def blocks(self, count: int = 1) -> bytes:
        """Each has its number and when it was sent."""
        numbers, self.sent = range(self.sent, self.sent + count), self.sent + count
        return b"".join(b"%08d%024d" % (n, time.monotonic_ns()) * 5 for n in numbers)

    def hear(self, mulaw: bytes) -> None:
        for block in (mulaw[at : at + 160] for at in range(0, len(mulaw), 160)):
            self.odd += block != block[:32] * 5 or int(block[:8]) != len(self.came)
            self.came.append((time.monotonic_ns() - int(block[8:32])) / 1e6)

    async def speaks(self) -> None:
        """Answers of 3.9 s, sent four times as fast as they are spoken."""
        while True:
            item = ""
            for _ in range(13):
                item = await self.end.speaks(self.blocks(15), item, 300)
                await asyncio.sleep(0.075)
            await self.end.ends()
            await asyncio.sleep(3.5)


async def measure(count: int, seconds: float, wrong: list[str]) -> None:
    """Many calls at once: what is lost, how late it comes, what it costs."""
    async with a_process(HERE, MAX_CALLS=str(count), HOOKS="") as line:
        callers, models = list[Ear](), list[Ear]()
        for _ in range(count):
            twilio, session = await line.call()
            await until(lambda: session.active)  # noqa: B023 - the greeting's response
            callers.append(Ear(twilio))
            models.append(Ear(session))

        def cpu_ms() -> float:  # where the system says so
            stat = Path(f"/proc/{line.process.pid}/stat")
            text = stat.read_text() if stat.exists() else ")" + " 0" * 20
            return sum(map(int, text.rpartition(")")[2].split()[11:13])) * 10.0

        before_ms, began = cpu_ms(), time.monotonic()
        talking = [asyncio.create_task(ear.end.talks(ear.blocks)) for ear in callers]
        talking += [asyncio.create_task(ear.speaks()) for ear in models]
        await asyncio.sleep(seconds)
        used_ms = (cpu_ms() - before_ms) / (time.monotonic() - began) / count
        for task in talking:
            task.cancel()
        await asyncio.sleep(0.3)
        print(f"{count} calls for {seconds:g} s: {used_ms:.1f} ms of CPU a second for each")
        for way, sent, came in (("to the model", callers, models), ("to callers", models, callers)):
            delays = sorted(ms for ear in came for ms in ear.came)
            lost, odd = sum(ear.sent for ear in sent) - len(delays), sum(ear.odd for ear in came)
            p50, p99 = delays[len(delays) // 2], delays[len(delays) * 99 // 100]
            print(f"  {way}: {len(delays):,} frames, delay p50 {p50:.2f} ms, p99 {p99:.2f} ms")
            wrong += [f"{way}: {lost} lost, {odd} out of order or changed"] * bool(lost or odd)
        await asyncio.gather(*(ear.end.hangs_up() for ear in callers))


def try_tool(name: str, arguments: str) -> str | None:
    """Run one tool of hooks/ alone, and print what it does with the call."""
    os.environ.setdefault("LOG_FORMAT", "text")
    logging.basicConfig()
    call: Any = mock.MagicMock(sid=new_id("CA"), caller=CALLER, called=CALLED, notes={})
    hooks = bridge.Hooks(HERE / "hooks", os.environ.get("HOOKS"))
    result = asyncio.run(hooks.run_tool(call, name, arguments))
    print(*(f"call.{str(one).removeprefix('call.')}" for one in call.method_calls), sep="\n")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Without arguments: one call, offline.")
    parser.add_argument("--tool", nargs="+", metavar=("NAME", "JSON"), help="run a tool of hooks/")
    parser.add_argument("--url", default="", help="call this bridge, as TWILIO_AUTH_TOKEN signs")
    parser.add_argument("--load", "--calls", type=int, metavar="N", help="calls at once, 1 to 300")
    parser.add_argument("--seconds", type=float, metavar="S", default=20, help="for so long (20)")
    asked, wrong = parser.parse_args(), list[str]()
    if asked.load is not None and not (1 <= asked.load <= 300 and 1 <= asked.seconds <= 3600):
        parser.error("--load takes a number from 1 to 300, --seconds one from 1 to 3600")
    if asked.tool:
        print(try_tool(asked.tool[0], "".join(asked.tool[1:]) or "{}"))
        return 0
    url = asked.url.rstrip("/")
    work = measure(asked.load, asked.seconds, wrong) if asked.load else rehearse(wrong, url)
    try:
        asyncio.run(work)
    except (AssertionError, OSError, ConnectionClosed, InvalidStatus) as exc:
        wrong.append(str(exc) or repr(exc))
    print("\n".join(f"wrong: {one}" for one in wrong) or "all of it was right")
    return bool(wrong)


@pytest.fixture(scope="module", autouse=True)
def rehearsal() -> Any:
    """`python test_bridge.py` runs beside the tests."""
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, __file__], **options) as process:
        yield process
        process.kill()


def test_program(rehearsal: Any) -> None:
    """Many calls can be measured, a tool tried, and a call watched."""
    tool = ("--tool", "current_time", '{"place": "London"}')
    for arguments in tool, ("--load", "3", "--seconds", "1"):
        part = "London" if arguments == tool else "all of it was right"
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert part in done.stdout and done.returncode == 0, done
    text, _ = rehearsal.communicate(timeout=20)
    assert "backchannels left alone: 2 of 2\nall of it was right" in text, text


if __name__ == "__main__":
    sys.exit(main())
