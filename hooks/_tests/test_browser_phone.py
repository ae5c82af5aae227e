"""hooks/browser_phone.py: its page in a real browser, whose microphone is fed from a file; what it is told."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HOOKS, Event, LoadHook, PretendCall, until
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SID = "CA" + "0" * 31 + "1"


def voice(seconds: float, pitch: float = 140.0, rate: int = 8000) -> list[float]:
    """Something that noise suppression takes for a voice: gliding harmonics, four syllables a second."""
    phase, samples = 0.0, []
    for n in range(int(seconds * rate)):
        t = n / rate
        phase += 2 * math.pi * pitch * (1 + 0.25 * math.sin(2 * math.pi * 0.9 * t)) / rate
        loud = max(0.0, math.sin(2 * math.pi * 4 * t)) ** 0.5
        samples.append(0.25 * loud * sum(math.sin(k * phase) / k for k in range(1, 16)))
    return samples


def mulaw(samples: list[float]) -> bytes:
    encoded = bytearray()
    for sample in samples:
        magnitude = min(32635, round(abs(sample) * 32767)) + 132
        exponent = magnitude.bit_length() - 8
        encoded.append(~((0x80 if sample < 0 else 0) | exponent << 4 | magnitude >> exponent + 3 & 15) & 255)
    return bytes(encoded)


def linear(encoded: bytes) -> list[float]:
    samples = []
    for byte in encoded:
        bits = ~byte & 255
        magnitude = (((bits & 15 | 16) * 2 + 1) << (bits >> 4 & 7) + 2) - 132
        samples.append((-magnitude if bits & 0x80 else magnitude) / 32768)
    return samples


def loudness(encoded: bytes) -> float:
    samples = linear(encoded)
    return math.sqrt(sum(sample * sample for sample in samples) / max(1, len(samples)))


class PretendModel:
    """OpenAI's side, small: says the greeting, then says back what it hears. A pause of 400 ms ends a turn."""

    def __init__(self, greeting: bytes) -> None:
        self.greeting = greeting
        self.said: list[bytes] = []  # each answer, as sent
        self.heard = b""  # all that the caller's side sent
        self.truncated: list[int] = []
        self.events: list[dict[str, Any]] = []

    async def __call__(self, connection: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.converse(connection)

    async def converse(self, connection: Any) -> None:
        async def tell(kind: str, **content: Any) -> None:
            await connection.send(json.dumps({"type": kind, **content}))

        async def speak(audio: bytes, text: str) -> None:
            await asyncio.sleep(0.3)  # as a model takes its time
            self.said.append(audio)
            about = {"response_id": f"resp{len(self.said)}", "item_id": f"item{len(self.said)}", "content_index": 0}
            await tell("response.created", response={"id": about["response_id"]})
            for start in range(0, len(audio), 2400):
                await tell(
                    "response.output_audio.delta", **about, delta=base64.b64encode(audio[start : start + 2400]).decode()
                )
            await tell("response.output_audio_transcript.done", **about, transcript=text)
            await tell("response.output_item.done", item={"id": about["item_id"], "type": "message"})
            await tell("response.done", response={"id": about["response_id"], "status": "completed"})

        turn, loud_ms, quiet_ms, speaking = b"", 0, 0, False
        await tell("session.created", session={})
        async for message in connection:  # until the bridge closes
            event = json.loads(message)
            match event["type"]:
                case "session.update":
                    await tell("session.updated", session=event["session"])
                case "response.create":
                    await speak(self.greeting, "もしもし、こちらはテストです。ゆっくりお話しください。")
                case "conversation.item.truncate":
                    self.truncated.append(event["audio_end_ms"])
                case "input_audio_buffer.append":
                    frame = base64.b64decode(event["audio"])
                    self.heard += frame
                    loud = loudness(frame) > 0.02
                    loud_ms, quiet_ms = (loud_ms + 20, 0) if loud else (0, quiet_ms + 20)
                    turn = turn + frame if speaking else (turn + frame)[-2400:]
                    if not speaking and loud_ms >= 60:
                        speaking = True
                        await tell("input_audio_buffer.speech_started", item_id="u")
                    elif speaking and quiet_ms >= 400:
                        speaking = False
                        await tell("input_audio_buffer.speech_stopped", item_id="u")
                        await tell("input_audio_buffer.committed", item_id="u")
                        kind = "conversation.item.input_audio_transcription.completed"
                        await tell(kind, item_id="u", transcript="すみません、ちょっといいですか。")
                        await speak(turn, "はい、どうぞ。<b>お話しください</b>。")
                        turn = b""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.asynccontextmanager
async def telephone(model: PretendModel, **settings: str) -> AsyncIterator[str]:
    """bridge.py as a process of its own, with the browser phone and the pretend model. Gives its address."""
    async with serve(model, "127.0.0.1", 0) as openai:
        port = free_port()
        env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {
            "OPENAI_API_KEY": "x",
            "OPENAI_REALTIME_URL": f"ws://127.0.0.1:{openai.sockets[0].getsockname()[1]}/v1/realtime",
            "HOOKS": "browser_phone",
            "DRAIN_SECONDS": "0",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(HOOKS.parent / "bridge.py"), env=env | {"PORT": str(port)} | settings
        )
        address = f"http://localhost:{port}"
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    await get(f"{address}/health")
                    break
                await asyncio.sleep(0.05)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 8)
            except TimeoutError:
                process.kill()


async def get(url: str) -> Any:
    def read() -> Any:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)

    return await asyncio.to_thread(read)


class Page:
    """One tab, driven over the DevTools protocol."""

    def __init__(self, devtools: Any) -> None:
        self.devtools = devtools
        self.count = 0
        self.complaints: list[str] = []  # exceptions and errors on the page's console

    async def do(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        number = self.count
        await self.devtools.send(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(10):
            while True:
                answer = json.loads(await self.devtools.recv())
                if answer.get("method") == "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(answer["params"]["exceptionDetails"]))
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return answer["result"]

    async def value(self, expression: str) -> Any:
        answer = await self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 10) -> Any:
        end = time.monotonic() + seconds
        while not (value := await self.value(expression)):
            if time.monotonic() > end:
                raise AssertionError(f"{expression}: not within {seconds} s. The page: {await self.text('body')}")
            await asyncio.sleep(0.05)
        return value

    async def text(self, selector: str) -> str:
        return str(await self.value(f"document.querySelector({selector!r}).innerText"))

    async def click(self, selector: str) -> None:
        at = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        place = f"document.querySelector({selector!r})"
        await self.value(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = await self.value(f"{at}({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            await self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    async def heard(self) -> bytes:
        """What the caller has heard, in mu-law."""
        return bytes(await self.value("phone.heard.flatMap(piece => [...piece])"))


def devtools_of(profile: Path) -> str:
    """The address of the first tab, as soon as the browser has written its port down."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                return str(next(t for t in json.load(answer) if t["type"] == "page")["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError("the browser has not started within 20 s")


@contextlib.asynccontextmanager
async def browser(
    url: str, says: list[float] | None = None, language: str = "en-US", *more: str
) -> AsyncIterator[Page]:
    """A browser on the page, whose microphone plays these samples (48 kHz) once and is silent then."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        options += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={folder}/profile", f"--lang={language}", f"--accept-lang={language}", *more]
        if says is not None:
            with wave.open(f"{folder}/says.wav", "wb") as file:
                file.setparams((1, 2, 48000, 0, "NONE", ""))
                file.writeframes(array.array("h", (round(32000 * max(-1, min(1, s))) for s in says)).tobytes())
            options += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
            options += [f"--use-file-for-fake-audio-capture={folder}/says.wav%noloop"]
        silent = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *options, "about:blank", stdout=silent, stderr=silent, start_new_session=True
        )
        try:
            tab = await asyncio.to_thread(devtools_of, Path(folder, "profile"))
            async with connect(tab, max_size=None, proxy=None) as devtools:
                page = Page(devtools)
                await page.do("Page.enable")
                await page.do("Runtime.enable")
                await page.do("Page.navigate", url=url)
                await page.until("window.phone && document.readyState === 'complete'")
                yield page
                assert page.complaints == []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group, made above
            await process.wait()


def silence(seconds: float) -> list[float]:
    return [0.0] * int(48000 * seconds)


# ── In the browser ───────────────────────────────────────────────────────────────────────────────────────────


@in_a_browser
async def test_a_call_from_the_browser_hears_greeting_and_answer_to_the_byte() -> None:
    model = PretendModel(mulaw(voice(1.2, 210)))
    question = voice(1.5, 130, 48000)
    says = silence(3) + question + silence(1)
    async with telephone(model) as address, browser(address, says) as page:
        await page.click("#call")
        await page.until("phone.state === 'talking'")
        await page.until("phone.events.filter(e => e.event === 'model_said').length === 2", 15)
        assert await page.heard() == b"".join(model.said)
        assert "もしもし、こちらはテストです。" in await page.text(".turn.model .words")
        assert await page.text(".turn.caller .words") == "すみません、ちょっといいですか。"
        assert "<b>お話しください</b>" in await page.text("#log")  # text, not markup
        assert re.search("answered 0.3. s after the turn's end was noticed", await page.text("#log"))
        assert "answered" not in await page.text(".turn.model")  # the greeting answers nobody
        assert "Answer after the turn's end was noticed: last 0.3" in await page.text("#latency")
        assert "about 0.5 s after its last word" in await page.value("document.getElementById('latency').title")


@in_a_browser
async def test_what_the_browser_phone_sends_is_the_microphones_voice() -> None:
    model = PretendModel(b"\xff" * 800)
    question = voice(2, 130, 48000)
    async with telephone(model) as address, browser(address, silence(2) + question + silence(1)) as page:
        await page.click("#call")
        await page.until("phone.events.some(e => e.event === 'caller_said')", 15)

        def envelope(samples: list[float], step: int) -> list[float]:
            return [sum(abs(s) for s in samples[n : n + step]) / step for n in range(0, len(samples) - step + 1, step)]

        sent, wanted = envelope(linear(model.heard), 160), envelope(question, 960)
        best = max(correlation(sent[n : n + len(wanted)], wanted) for n in range(len(sent) - len(wanted)))
        assert best > 0.8


def correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return product / size if size else 0.0


@in_a_browser
async def test_who_speaks_over_the_model_in_the_browser_hears_it_stop() -> None:
    model = PretendModel(mulaw(voice(12, 210)))
    says = silence(3) + voice(1, 130, 48000) + silence(1)
    async with telephone(model) as address, browser(address, says) as page:
        await page.click("#call")
        await page.until("document.querySelector('.turn .cut')", 15)
        await page.until("phone.events.filter(e => e.event === 'model_said').length === 2", 15)
        greeting, answer = model.said
        heard = await page.heard()
        before = heard[: -len(answer)]
        assert heard.endswith(answer) and greeting.startswith(before)
        assert abs(len(before) // 8 - model.truncated[0]) < 100  # ms
        assert 1500 < model.truncated[0] < 6000
        assert "interrupted:" in await page.text(".turn.model") and await page.text(".turn.model del")


TURNS = """
(() => {
  const talk = {callerTurns: [], modelTurns: [], pausedAt: null, latencies: []}, seen = [];
  const happened = (event, facts) => {
    HAPPENED[event](talk, facts);
    seen.push([...document.querySelectorAll(".words")].at(-1).innerText);
  };
  happened("model_spoke", {at_ms: 0});
  happened("model_said", {at_ms: 3000, text: "こんにちは。", heard_ms: null});
  happened("caller_spoke", {at_ms: 4000});
  happened("caller_paused", {at_ms: 6000});
  happened("caller_said", {at_ms: 7000, text: "はい。"});
  return seen;
})()
"""


@in_a_browser
async def test_a_turn_whose_words_are_not_known_yet_says_that_it_is_being_spoken() -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        assert await page.value(TURNS) == ["speaking…", "こんにちは。", "speaking…", "", "はい。"]


HANGS_UP = """
(() => {
  const talk = {callerTurns: [], modelTurns: [], pausedAt: null, latencies: []};
  HAPPENED.model_spoke(talk, {at_ms: 0});
  HAPPENED.model_said(talk, {at_ms: 3000, text: "こんにちは。", heard_ms: 3000});
  HAPPENED.model_said(talk, {at_ms: 3000, text: "何も。", heard_ms: 0});
})()
"""


@in_a_browser
async def test_of_an_answer_that_the_caller_hangs_up_on_nothing_is_struck_out_that_may_have_been_heard() -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        await page.value(HANGS_UP)
        assert await page.text(".turn.model .cut") == "cut short: 3.00 s heard"
        assert await page.value("[...document.querySelectorAll('del')].map(d => d.lastChild.data)") == ["何も。"]


@in_a_browser
async def test_keys_and_hanging_up_in_the_browser_reach_the_bridge() -> None:
    model = PretendModel(mulaw(voice(12, 210)))
    async with telephone(model) as address, browser(address, silence(1)) as page:
        await page.type("3")  # before a call keys do nothing
        await page.click("#call")
        await page.until("phone.state === 'talking'")
        await page.click("#keypad button:nth-child(5)")
        await page.type("#")
        keys = "phone.events.filter(e => e.event === 'key_pressed').map(e => e.key).join('')"
        await page.until(f"{keys} === '5#'")
        assert (await get(f"{address}/health"))["calls"] == 1
        await page.click("#hang-up")
        await page.until("phone.state === 'ended'")
        await page.until("phone.events.at(-1).event === 'call_ended'")
        assert "you hung up" in await page.text("#log")
        assert (await get(f"{address}/health"))["calls"] == 0
        await page.click("#call")  # and again
        await page.until("phone.state === 'talking' && phone.heard.length")


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
async def test_the_keypad_is_a_telephones(width: int) -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        await page.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tops = await page.value("[...document.querySelectorAll('#keypad button')].map(key => key.offsetTop)")
        assert tops == [tops[row] for row in (0, 3, 6, 9) for _ in range(3)] and len(set(tops)) == 4
        edges = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        assert len(set(await page.value(edges))) == 1  # nothing sticks out


SPY = """
window.sent = [];
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (text) { sent.push([performance.now(), text]); send.call(this, text); };
"""


@in_a_browser
async def test_the_browser_phone_speaks_to_the_stream_as_twilio_does() -> None:
    model = PretendModel(mulaw(voice(0.5, 210)))
    async with telephone(model) as address, browser(address, silence(1)) as page:
        await page.value(SPY)
        await page.click("#call")
        await page.until("phone.events.some(e => e.event === 'model_said')")
        await page.type("7")
        await page.click("#hang-up")
        await page.until("phone.state === 'ended'")
        sent = [(ms, json.loads(text)) for ms, text in await page.value("sent")]
    messages = [message for _, message in sent]
    connected, start, *rest = messages
    stream_sid, call_sid, account_sid = (start["start"][name] for name in ("streamSid", "callSid", "accountSid"))
    assert connected == {"event": "connected", "protocol": "Call", "version": "1.0.0"}
    assert [len(sid) for sid in (stream_sid, call_sid, account_sid)] == [34] * 3
    assert start["start"]["mediaFormat"] == {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
    assert set(start["start"]["customParameters"]) >= {"token", "from", "to"}
    assert all(message["streamSid"] == stream_sid for message in messages[1:])
    assert [message["sequenceNumber"] for message in messages[1:]] == [str(n + 1) for n in range(len(messages) - 1)]
    media = [message["media"] for message in rest if message["event"] == "media"]
    assert [frame["chunk"] for frame in media] == [str(n + 1) for n in range(len(media))]
    assert [frame["timestamp"] for frame in media] == [str(n * 20) for n in range(len(media))]
    assert {len(base64.b64decode(frame["payload"])) for frame in media} == {160}
    times = [ms for ms, message in sent if message["event"] == "media"]
    assert (times[-1] - times[0]) / (len(times) - 1) == pytest.approx(20, rel=0.1)  # ms
    positions = [int(message["mark"]["name"].rpartition(":")[2]) for message in rest if message["event"] == "mark"]
    assert positions == sorted(positions) and positions[-1] == len(model.greeting)
    (key,) = [message["dtmf"] for message in rest if message["event"] == "dtmf"]
    assert key == {"track": "inbound_track", "digit": "7"}
    assert rest[-1]["event"] == "stop" and rest[-1]["stop"] == {"accountSid": account_sid, "callSid": call_sid}


@in_a_browser
async def test_without_a_key_the_page_says_what_the_stand_in_cannot_do() -> None:
    nobody = {"OPENAI_API_KEY": "", "OPENAI_REALTIME_URL": "", "HOOKS": "browser_phone,offline"}
    async with telephone(PretendModel(b""), **nobody) as address, browser(address) as page:
        await page.until("document.querySelector('.notice')")
        assert "does not recognize words: the log shows only how long you spoke" in await page.text("#notices")
        await page.click("#languages button:first-child")
        assert "言葉は認識しない" in await page.text("#notices")


EXTRA = '{"event": "clear", "streamSid": "MZ", "extra": 1}'


@in_a_browser
async def test_the_browser_phone_warns_where_twilio_would() -> None:
    async with telephone(PretendModel(b"\xff" * 800)) as address, browser(address, silence(1)) as page:
        for wrong in ('{"event": "clear"}', '{"event": "clear", "streamSid": "MZ1"}', "{", EXTRA):
            await page.value("document.getElementById('log').textContent = ''")
            await page.value(f"fromBridge({{streamSid: 'MZ', line: null}}, {wrong!r})")
            assert "31951" in await page.text("#log")


@in_a_browser
async def test_what_the_bridge_tells_stands_on_the_page_as_it_is_and_only_why_a_call_ended_is_translated() -> None:
    tool = {"name": "call", "arguments": "constructor", "result": "lost", "seconds": 0.5}  # the page knows such words
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        await page.value(f"HAPPENED.tool_used({{}}, {json.dumps(tool)})")
        assert await page.text("#log") == "Tool call constructor → lost (0.50 s)"
        await page.value("HAPPENED.call_ended({}, {reason: 'time limit'})")
        assert await page.text("#log p:last-child") == "The call has ended: its time was up."
        await page.click("#languages button:first-child")
        assert await page.text("#log p:last-child") == "通話が終了しました（制限時間に達しました）。"


@in_a_browser
async def test_without_a_microphone_the_browser_phone_says_so_and_listens() -> None:
    model = PretendModel(mulaw(voice(0.5, 210)))
    async with telephone(model) as address, browser(address, None, "ja") as page:  # it has none
        await page.click("#call")
        await page.until("phone.events.some(e => e.event === 'model_said')")
        assert "マイクが見つかりません" in await page.text("#notices")
        assert await page.heard() == model.greeting
        assert len(model.heard) > 2000 and set(model.heard) == {0xFF}  # silence, frame by frame


@in_a_browser
async def test_a_refused_microphone_is_said_plainly_in_either_language() -> None:
    refuses = ("--use-fake-device-for-media-stream", "--deny-permission-prompts")
    async with telephone(PretendModel(b"\xff" * 800)) as address, browser(address, None, "en-US", *refuses) as page:
        await page.click("#call")
        await page.until("phone.state === 'talking'")
        assert "The microphone was refused" in await page.text("#notices")
        await page.click("#languages button:first-child")
        assert "マイクが許可されませんでした" in await page.text("#notices")
        assert await page.value("document.documentElement.lang") == "ja"


@in_a_browser
async def test_the_browser_phone_says_what_to_unset_when_calls_must_be_signed() -> None:
    settings = {"TWILIO_AUTH_TOKEN": "secret", "PUBLIC_BASE_URL": "https://example.com"}
    async with telephone(PretendModel(b""), **settings) as address, browser(address, silence(1)) as page:
        await page.click("#call")
        await page.until("phone.state === 'ended'")
        assert "Unset TWILIO_AUTH_TOKEN" in await page.text("#notices")


@in_a_browser
async def test_when_the_model_is_lost_the_browser_shows_what_twilio_would_say() -> None:
    class Gone(PretendModel):
        async def converse(self, connection: Any) -> None:
            await connection.close(3000, "invalid_api_key")

    async with telephone(Gone(b"")) as address, browser(address, silence(1)) as page:
        await page.click("#call")
        await page.until("phone.state === 'ended'", 15)
        assert "Announcement: 申し訳ございません" in await page.text("#log")


IN_THE_LINE = """
(() => {
  const posted = [];
  class Processor { port = {postMessage: message => posted.push(message)} }
  const source = document.getElementById("line").textContent + "; return [Resampler, Line, encode, DECODED]";
  const [Resampler, Line, encode, DECODED] =
    Function("AudioWorkletProcessor", "registerProcessor", "sampleRate", source)(Processor, () => {}, 48000);
  %s
})()
"""

RESAMPLE = """
  const gain = (from, to, hz) => {  // in dB, of a tone
    const resampler = new Resampler(from, to);
    const out = [];
    for (let n = 0; n < from / 2; n++) {
      resampler.take(Math.sin(2 * Math.PI * hz * n / from));
      while (resampler.ready) out.push(resampler.give());
    }
    const steady = out.slice(out.length / 4, -out.length / 4);
    return 10 * Math.log10(2 * steady.reduce((sum, x) => sum + x * x, 0) / steady.length + 1e-12);
  };
  const images = (to, hz) => {  // in dB: all that comes out beside the tone
    const resampler = new Resampler(8000, to);
    const out = [];
    for (let n = 0; n < 4000; n++) {
      resampler.take(Math.sin(2 * Math.PI * hz * n / 8000));
      while (resampler.ready) out.push(resampler.give());
    }
    const steady = out.slice(out.length / 4, out.length / 4 + to / 10);
    let [re, im, all] = [0, 0, 0];
    steady.forEach((x, n) => {
      re += x * Math.cos(2 * Math.PI * hz * n / to), im += x * Math.sin(2 * Math.PI * hz * n / to), all += x * x;
    });
    return 10 * Math.log10(2 * Math.abs(all - 2 * (re * re + im * im) / steady.length) / steady.length + 1e-12);
  };
  const rates = [44100, 48000, 96000, 16000];
  return {
    passed: rates.flatMap(rate => [300, 1000, 3400].map(hz => gain(rate, 8000, hz))),
    kept: rates.flatMap(rate => [300, 1000, 3400].map(hz => gain(8000, rate, hz))),
    aliased: rates.flatMap(rate => [4050, 4600, 5000, 7000, 7900].map(hz => gain(rate, 8000, hz))),
    images: rates.flatMap(rate => [300, 1000, 3400].map(hz => images(rate, hz))),
    lengths: rates.map(rate => { const r = new Resampler(rate, 8000); let n = 0;
      for (let i = 0; i < rate; i++) { r.take(0); while (r.ready) { r.give(); n++; } } return n; }),
    codec: Array.from({length: 256}, (_, byte) => encode(DECODED[byte])),
  };
"""


@in_a_browser
async def test_the_browser_phone_resamples_without_aliasing() -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        found = await page.value(IN_THE_LINE % RESAMPLE)
    assert all(abs(gain) < 1 for gain in found["passed"] + found["kept"]), found
    assert max(found["aliased"] + found["images"]) < -60, found
    assert found["lengths"] == [8000] * 4
    codes = [0xFF if byte == 0x7F else byte for byte in range(256)]  # there are two zeros
    assert found["codec"] == codes and [round(x * 32768) for x in linear(b"\x00\x80\xff")] == [-32124, 32124, 0]


PLAY = """
  const line = new Line();
  const run = () => { const out = new Float32Array(128); line.process([[]], [[out]]); return out; };
  const send = data => line.port.onmessage({data});
  const tone = n => Uint8Array.from({length: n}, (_, i) => encode(.5 * Math.sin(2 * Math.PI * i * 500 / 8000)));
  send(tone(96)); send({mark: "a"}); send(tone(96)); send({mark: "b"}); send(tone(400)); send({mark: "c"});
  send({mark: "d"});
  let out = [];
  for (let n = 0; n < 13; n++) out.push(...run());  // 278 samples of the line; the last one is loud
  const first = posted.filter(m => m.mark || m.played).map(m => [m.mark ?? "", m.played.length]);
  posted.length = 0;
  send("clear");
  const cleared = posted.splice(0).map(m => m.mark ?? m.cleared);
  for (let n = 0; n < 8; n++) out.push(...run());
  const steps = out.map((x, n) => Math.abs(x - (out[n - 1] ?? 0)));
  return {first, cleared, step: Math.max(...steps), silent: Math.max(...out.slice(-300).map(Math.abs)),
          left: posted.filter(m => m.played?.length).length};
"""


@in_a_browser
async def test_marks_come_back_when_played_and_all_at_once_when_cleared_without_a_click() -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        found = await page.value(IN_THE_LINE % PLAY)
    assert [mark for mark, _ in found["first"] if mark] == ["a", "b"]
    up_to_b = found["first"][: [mark for mark, _ in found["first"]].index("b") + 1]
    assert sum(played for _, played in up_to_b) == 192
    assert found["cleared"][:2] == ["c", "d"] and found["cleared"][2] == 400 - (278 - 192)
    assert found["step"] < 0.05  # of full scale from one sample to the next; the tone's own is 0.03
    assert found["silent"] < 0.001 and found["left"] <= 1


@in_a_browser
async def test_whatever_can_be_pressed_has_a_name_in_both_languages() -> None:
    async with telephone(PretendModel(b"")) as address, browser(address) as page:
        for language in (1, 2):
            await page.click(f"#languages button:nth-child({language})")
            tree = (await page.do("Accessibility.getFullAXTree"))["nodes"]
            named = {node["name"]["value"] for node in tree if node.get("role", {}).get("value") == "button"}
            assert named >= ({"かける", "切る", "シャープ"} if language == 1 else {"Call", "Hang up", "hash", "5"})
            needed = {"button", "textbox", "meter", "log", "timer", "group", "region"}
            for node in tree:
                if node.get("role", {}).get("value") in needed and not node["ignored"]:
                    assert node["name"]["value"], node
        assert await page.value(
            "(t => Object.keys(t.en).every(k => t.ja[k]) && Object.keys(t.ja).every(k => t.en[k]))(WORDS)"
        )


def test_the_japanese_of_the_page_has_full_width_punctuation_and_one_word_for_one_thing() -> None:
    page = (HOOKS / "_browser_phone.html").read_text("utf-8")
    texts = re.findall('"(.*?)"', page[page.index("  ja: {") : page.index("let language")])
    assert len(texts) > 50
    assert [text for text in texts if re.search("[:;()!?]|ブラウザ(?!ー)|コンピュータ(?!ー)|さえぎ|道具", text)] == []


# ── What the bridge tells the page ──────────────────────────────────────────────────────────────────────────────


async def test_the_page_gets_the_events_of_its_call_once_and_in_order(hook: LoadHook) -> None:
    phone = hook("browser_phone")
    events = phone.module.events
    events({"call": SID})  # a page that is about to call
    said = {"text": "はい", "heard_ms": None}
    spoke: Event = ("model_spoke", 5.5, {})
    await phone.tell_all(PretendCall(SID), ("call_started", 5.0, {}), spoke, ("model_said", 7.25, said))
    assert events({"call": SID, "after": "1"})["events"] == [
        {"n": 2, "event": "model_spoke", "at_ms": 500},
        {"n": 3, "event": "model_said", "at_ms": 2250, **said},
    ]
    assert events({"call": SID, "after": "3"})["events"] == []


async def test_of_calls_that_no_page_asks_about_nothing_is_kept(hook: LoadHook) -> None:
    phone = hook("browser_phone")
    await phone.tell_all(PretendCall(SID), ("call_started", 5.0, {}), ("caller_said", 6.0, {"text": "秘密"}))
    assert phone.module.watched_calls == {}
    assert phone.module.events({"call": SID})["events"] == []
    phone.module.events({"call": "CA" + "x" * 32})
    assert list(phone.module.watched_calls) == [SID]


async def test_the_page_forgets_old_events_and_old_calls(hook: LoadHook) -> None:
    phone = hook("browser_phone")
    events = phone.module.events
    events({"call": SID})
    await phone.tell_all(PretendCall(SID), *[("caller_spoke", float(n), {}) for n in range(600)])
    assert [event["n"] for event in events({"call": SID})["events"]] == list(range(101, 601))
    for n in range(30):
        events({"call": f"CA{n:032x}"})
    assert list(phone.module.watched_calls) == [f"CA{n:032x}" for n in range(10, 30)]


async def test_a_while_after_its_end_nothing_is_left_of_a_call_though_no_page_asks_again(hook: LoadHook) -> None:
    phone = hook("browser_phone")
    assert phone.module.FORGET_S == 300
    phone.module.FORGET_S = 0.5
    phone.module.events({"call": SID})
    await phone.tell_all(PretendCall(SID), ("caller_said", {"text": "秘密"}), ("call_ended", {"reason": "hung up"}))
    assert [event["event"] for event in phone.module.events({"call": SID})["events"]] == ["caller_said", "call_ended"]
    await until(lambda: not phone.module.watched_calls)


@pytest.mark.parametrize(
    ("settings", "model", "stand_in"),
    [
        ({}, "gpt-realtime-2.1", True),
        ({"OPENAI_API_KEY": "x", "OPENAI_REALTIME_MODEL": "other"}, "other", False),
        ({"OPENAI_REALTIME_URL": "ws://localhost:1/v1?model=local"}, "local", False),
    ],
)
def test_the_page_knows_who_answers(hook: LoadHook, settings: dict[str, str], model: str, stand_in: bool) -> None:
    answer = hook("browser_phone", **settings).module.events({})
    assert (answer["model"], answer["stand_in"]) == (model, stand_in)
