"""hooks/browser_phone.py: its page in a real browser on a real bridge with the offline model.

One call has a microphone that is fed from a file. What a page shows of events is tested by the
events alone.
"""

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
import pytest_asyncio
from conftest import HOOKS, LoadHook, PretendCall, until
from websockets.asyncio.client import connect

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
HTML = (HOOKS / "_browser_phone.html").read_text("utf-8")
LINES = json.loads((HOOKS / "_offline_speech.json").read_text("utf-8"))["lines"]
SID = "CA" + "0" * 31 + "1"


def in_a_browser(test: Any) -> Any:
    """These tests share one bridge and, unless they need a microphone, one tab."""
    skip = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
    return skip(pytest.mark.asyncio(loop_scope="module")(test))


def voice(seconds: float, pitch: float = 130.0, rate: int = 48000) -> list[float]:
    """What noise suppression takes for a voice: gliding harmonics, four syllables a second."""
    phase, samples = 0.0, []
    for n in range(int(seconds * rate)):
        t = n / rate
        phase += 2 * math.pi * pitch * (1 + 0.25 * math.sin(2 * math.pi * 0.9 * t)) / rate
        loud = max(0.0, math.sin(2 * math.pi * 4 * t)) ** 0.5
        samples.append(0.25 * loud * sum(math.sin(k * phase) / k for k in range(1, 16)))
    return samples


def silence(seconds: float) -> list[float]:
    return [0.0] * int(48000 * seconds)


@contextlib.asynccontextmanager
async def telephone(**settings: str) -> AsyncIterator[str]:
    """bridge.py as a process of its own, with the offline model. Gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"HOOKS": "browser_phone,offline,clock,keys,cost,report", "DRAIN_SECONDS": "0"}
    env |= {"PORT": str(port), "OPENAI_API_KEY": "", "LOG_FORMAT": "text"} | settings
    bridge = str(HOOKS.parent / "bridge.py")
    process = await asyncio.create_subprocess_exec(sys.executable, bridge, env=env)
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


async def get(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read(), "utf-8")

    return await asyncio.to_thread(read)


class Page:
    """One tab, driven over the DevTools protocol."""

    def __init__(self, devtools: Any) -> None:
        self.devtools = devtools
        self.count = 0
        self.complaints: list[str] = []  # exceptions on the page

    async def do(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        await self.devtools.send(json.dumps(message))
        async with asyncio.timeout(10):
            while True:
                answer = json.loads(await self.devtools.recv())
                if answer.get("method") == "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(answer["params"]["exceptionDetails"]))
                if answer.get("id") == message["id"]:
                    assert "error" not in answer, answer
                    return answer["result"]

    async def value(self, expression: str) -> Any:
        how = {"awaitPromise": True, "returnByValue": True}
        answer = await self.do("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 10) -> Any:
        end = time.monotonic() + seconds
        while not (value := await self.value(expression)):
            if time.monotonic() > end:
                shown = await self.text("body")
                raise AssertionError(f"{expression}: not within {seconds} s. The page: {shown}")
            await asyncio.sleep(0.05)
        return value

    async def event(self, kind: str, count: int = 1, seconds: float = 10) -> Any:
        """The bridge's n-th event of this kind, as the page got it."""
        found = f"phone.events.filter(e => e.event === {kind!r})"
        return await self.until(f"{found}[{count - 1}]", seconds)

    async def open(self, url: str) -> None:
        await self.do("Page.navigate", url=url)
        await self.until("window.phone && document.readyState === 'complete'")

    async def text(self, selector: str) -> str:
        return str(await self.value(f"document.querySelector({selector!r}).innerText"))

    async def click(self, selector: str) -> None:
        place = f"document.querySelector({selector!r})"
        await self.value(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        at = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        x, y = await self.value(f"{at}({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await self.do("Input.dispatchMouseEvent", type=kind, **where)

    async def type(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = key if kind == "keyDown" else ""
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, text=text)


def devtools_of(profile: Path) -> str:
    """The address of the first tab, as soon as the browser has written its port down."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                tabs = (tab for tab in json.load(answer) if tab["type"] == "page")
                return str(next(tabs)["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError("the browser has not started within 20 s")


OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --remote-debugging-port=0
    --lang=en-US --accept-lang=en-US --window-size=1280,900"""


@contextlib.asynccontextmanager
async def browser(url: str, says: list[float] | None = None, *more: str) -> AsyncIterator[Page]:
    """A tab on the page. Its microphone plays these samples (48 kHz) once and is silent then."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = [*OPTIONS.split(), f"--user-data-dir={folder}/profile", *more]
        if says is not None:
            with wave.open(f"{folder}/says.wav", "wb") as file:
                file.setparams((1, 2, 48000, 0, "NONE", ""))
                samples = (round(32000 * max(-1, min(1, sample))) for sample in says)
                file.writeframes(array.array("h", samples).tobytes())
            options += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
            options += [f"--use-file-for-fake-audio-capture={folder}/says.wav%noloop"]
        silent = {name: asyncio.subprocess.DEVNULL for name in ("stdout", "stderr")}
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *options, "about:blank", **silent, start_new_session=True
        )
        try:
            tab = await asyncio.to_thread(devtools_of, Path(folder, "profile"))
            async with connect(tab, max_size=None, proxy=None) as devtools:
                page = Page(devtools)
                await page.do("Page.enable")
                await page.do("Runtime.enable")
                await page.open(url)
                yield page
                assert page.complaints == []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own group, made above
            await process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with telephone(REPORTS=str(tmp_path_factory.mktemp("reports"))) as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab(address: str) -> AsyncIterator[Page]:
    """A browser without a microphone."""
    async with browser(address) as page:
        yield page


@pytest_asyncio.fixture(loop_scope="module")
async def page(tab: Page, address: str) -> Page:
    await tab.open(address)
    return tab


# ── A call ────────────────────────────────────────────────────────────────────────────────────

SPY = """
window.sent = [];
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (text) {
  sent.push([performance.now(), text]);
  send.call(this, text);
};
"""


@in_a_browser
async def test_call(address: str) -> None:
    """The caller interrupts the greeting, hears their own words, tries a tool, and hangs up."""
    says = silence(3) + voice(1.5) + silence(1)
    async with browser(address, says) as page:
        await page.value(SPY)
        await page.type("3")  # before a call keys do nothing
        await page.click("#call")
        await page.until("!!document.querySelector('.turn.model .ahead')")  # not heard yet
        await page.event("model_interrupted")
        await page.event("caller_said")
        await page.event("model_said", 3, 15)
        heard = bytes(await page.value("phone.heard.flatMap(piece => [...piece])"))
        greeting, preamble = (base64.b64decode(LINES[n]["mulaw"]) for n in ("greeting", "preamble"))
        cut, _, echo = heard.partition(preamble)
        cut_ms = (await page.event("model_interrupted"))["heard_ms"]
        assert greeting.startswith(cut) and abs(len(cut) / 8 - cut_ms) < 100 and cut_ms > 1000
        assert "interrupted:" in await page.text(".turn.model")
        assert await page.text(".turn.model del")
        menu = "[...document.querySelectorAll('.turn.model .words')][1].firstElementChild?.tagName"
        assert await page.value(menu) == "DEL"  # nothing of it was heard
        assert re.search(r"\(\d\.\d s of speech\)", await page.text(".turn.caller .words"))
        assert re.search("answered .* your pause was noticed", await page.text("#log"))
        assert re.search("Answers after: last [<0-9. ]+ s", await page.text("#latency"))
        await page.until("document.getElementById('status').innerText === 'Your turn to speak'")

        await page.type("1")
        await page.type("#")
        await page.event("tool_used")
        assert "Tool current_time" in await page.text("#log")
        await page.click("#hang-up")
        await page.until("phone.state === 'ended'")
        link = await page.until("document.querySelector('.note a')?.href")
        assert "you hung up" in await page.text("#log")
        assert "The model cost $0.00." in await page.text("#log")
        assert SID[:2] in await get(link) and "<html" in await get(link)
        assert json.loads(await get(f"{address}/health"))["calls"] == 0
        as_twilio(await page.value("sent"), echo)
        await page.click("#call")  # and again
        await page.until("phone.state === 'talking' && phone.heard.length")


def as_twilio(sent: list[tuple[float, str]], echo: bytes) -> None:
    """What went into the stream has Twilio's form; the echo of the caller is among it."""
    connected, start, *rest = messages = [json.loads(text) for _, text in sent]
    names = ("streamSid", "callSid", "accountSid")
    stream_sid, call_sid, account_sid = (start["start"][name] for name in names)
    assert connected == {"event": "connected", "protocol": "Call", "version": "1.0.0"}
    for sid, kind in ((stream_sid, "MZ"), (call_sid, "CA"), (account_sid, "AC")):
        assert re.fullmatch(kind + "[0-9a-f]{32}", sid)
    media_format = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
    assert start["start"]["mediaFormat"] == media_format
    assert "token" in start["start"]["customParameters"]
    assert all(message["streamSid"] == stream_sid for message in messages[1:])
    numbers = [message["sequenceNumber"] for message in messages[1:]]
    assert numbers == [str(n + 1) for n in range(len(messages) - 1)]
    media = [message["media"] for message in rest if message["event"] == "media"]
    assert [frame["chunk"] for frame in media] == [str(n + 1) for n in range(len(media))]
    assert [frame["timestamp"] for frame in media] == [str(n * 20) for n in range(len(media))]
    frames = [base64.b64decode(frame["payload"]) for frame in media]
    assert {len(frame) for frame in frames} == {160}
    assert echo in b"".join(frames)
    times = [ms for ms, text in sent if json.loads(text)["event"] == "media"]
    assert (times[-1] - times[0]) / (len(times) - 1) == pytest.approx(20, rel=0.1)  # ms
    keys = [message["dtmf"] for message in rest if message["event"] == "dtmf"]
    assert keys[0] == {"track": "inbound_track", "digit": "1"}
    assert rest[-1]["stop"] == {"accountSid": account_sid, "callSid": call_sid}


@in_a_browser
async def test_no_microphone(page: Page) -> None:
    """Without a microphone the page says so, and the caller listens."""
    await page.click("#call")
    await page.until("phone.heard.length > 50")
    assert "No microphone was found" in await page.text("#notices")
    assert "does not" not in await page.text("#status")
    await page.click("#hang-up")


@in_a_browser
async def test_refused_microphone(address: str) -> None:
    refuses = ("--use-fake-device-for-media-stream", "--deny-permission-prompts")
    async with browser(address, None, *refuses) as page:
        await page.click("#call")
        await page.until("phone.state === 'talking'")
        assert "The microphone was refused" in await page.text("#notices")
        await page.click("#languages button:first-child")
        assert "マイクが許可されませんでした" in await page.text("#notices")
        assert await page.value("document.documentElement.lang") == "ja"


@in_a_browser
async def test_refused_call(page: Page) -> None:
    """When the bridge takes signed calls only, the page says what to unset."""
    await page.value("window.fetch = async () => new Response('', {status: 403}), 0")
    await page.click("#call")
    await page.until("phone.state === 'ended'")
    assert "Unset TWILIO_AUTH_TOKEN" in await page.text("#notices")


# ── What the page shows ───────────────────────────────────────────────────────────────────────

STORY = """
(() => {
  const call = {arrivals: [[0, 0], [4000, 8000]], sent: 16000, heard: 4000};
  const talk = {call, turns: new Map(), latencies: [], connected: false, callerTurn: null,
                sounding: new Set(), answered: false, busy: true, pausedAt: null};
  const seen = [], shown = () => [...document.querySelectorAll(".words")].at(-1).textContent;
  const happened = (event, item, at_ms, facts) => {
    HAPPENED[event](talk, {item, at_ms, ...facts});
    seen.push([activity(talk), shown()]);
  };
  seen.push([activity(talk), ""]);
  happened("model_started_speaking", "m1", 0);
  happened("model_words", "m1", 1, {text: "こんにちは。"});
  seen.push(["", document.querySelector(".ahead").textContent]);
  happened("caller_started_speaking", "c1", 500);
  happened("caller_stopped_speaking", "c1", 800);
  happened("model_said", "m1", 1000, {text: "こんにちは。", heard_ms: null});
  talk.busy = false;
  seen.push([activity(talk), ""]);
  talk.busy = true;
  happened("caller_started_speaking", "c2", 2000);
  happened("caller_stopped_speaking", "c2", 3000);
  happened("caller_said", "c2", 3500, {text: "二つ目"});
  happened("model_used", undefined, 3600, {kind: "response"});
  happened("caller_said", "c1", 3700, {text: ""});
  HAPPENED.tool_used(talk, {name: "call", arguments: "constructor", result: "lost", seconds: .5});
  happened("model_started_speaking", "m2", 3010);
  happened("model_interrupted", "m2", 5000, {heard_ms: 1000, sent_ms: 2000});
  happened("model_said", "m2", 5000, {text: "あいうえ", heard_ms: 1000});
  happened("model_said", "m3", 6000, {text: "<b>何も。</b>", heard_ms: 0});
  HAPPENED.call_ended(talk, {reason: "time limit", at_ms: 6000});
  return seen;
})()
"""


@in_a_browser
async def test_story(page: Page) -> None:
    """Words stand with their turn whatever order they come in; what was not heard is marked."""
    assert await page.value("phone.offline = false, " + STORY) == [
        ["connecting", ""],
        ["answering", "speaking…"],
        ["answering", "こんにちは。"],
        ["", "にちは。"],  # 4000 of 16000 bytes have been played
        ["listening", "speaking…"],
        ["answering", ""],
        ["thinking", ""],
        ["waiting", ""],
        ["listening", "speaking…"],
        ["thinking", ""],
        ["thinking", "二つ目"],
        ["lookingUp", "二つ目"],
        ["lookingUp", "二つ目"],
        ["answering", "speaking…"],
        ["answering", "speaking…"],
        ["thinking", "あい" + "not heard:" + "うえ"],
        ["thinking", "not heard:<b>何も。</b>"],
    ]
    log = await page.text("#log")
    order = ("こんにちは。", "(no words)", "the model spoke on", "二つ目", "Tool call", "あい")
    assert [log.index(text) for text in order] == sorted(log.index(text) for text in order)
    assert "answered as soon as your pause was noticed" in log
    assert "interrupted: 1.00 s of 2.00 s heard" in log
    assert "The call ended after 0:06: its time was up." in log
    code = "document.querySelector('.note code').textContent"
    assert await page.value(code) == "constructor → lost"
    await page.click("#languages button:first-child")
    assert "通話が終了しました（0:06、制限時間に達しました）。" in await page.text("#log")


@in_a_browser
async def test_languages(page: Page) -> None:
    """Both languages have each word; what the offline model says follows the page's language."""
    keys = "Object.values(WORDS).map(words => Object.keys(words).sort().join())"
    assert len(set(await page.value(keys))) == 1
    greeting = LINES["greeting"]["text"]
    said = [
        greeting,
        greeting[:14],
        "（2.4秒の音声）",
        LINES["menu"]["text"] + "（1 a、2 b）",
        "ほか",
    ]
    shown = f"{json.dumps(said)}.map(inLanguage)"
    english = [
        "Hello. This is the offline trial. It says back what you say. Please speak.",
        "Hello. This is the o",
        "(2.4 s of speech)",
        "Number keys try the tools. (1 a, 2 b)",
        "ほか",
    ]
    assert await page.value(shown) == english
    assert "recognizes no words" in await page.text("#notices")
    await page.click("#languages button:first-child")
    assert "言葉は認識しません" in await page.text("#notices")
    assert await page.value(shown) == said


@in_a_browser
async def test_names_for_screen_readers(page: Page) -> None:
    """Whatever can be pressed or read has a name in both languages."""
    for number, names in (
        (1, {"かける", "切る", "シャープ"}),
        (2, {"Call", "Hang up", "hash", "5"}),
    ):
        await page.click(f"#languages button:nth-child({number})")
        nodes = (await page.do("Accessibility.getFullAXTree"))["nodes"]
        roles = [(node.get("role", {}).get("value"), node) for node in nodes if not node["ignored"]]
        assert {node["name"]["value"] for role, node in roles if role == "button"} >= names
        for role, node in roles:
            if role in {"button", "textbox", "meter", "log", "timer", "group", "region"}:
                assert node["name"]["value"], node


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
async def test_widths(page: Page, width: int) -> None:
    """At 390 px the conversation is what one sees; keypad and number fold away."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    await page.do("Emulation.setDeviceMetricsOverride", **size)
    top, bottom = await page.value(
        "(({top, bottom}) => [top, bottom])(document.getElementById('conversation')"
        ".getBoundingClientRect())"
    )
    edge = "document.documentElement"
    assert await page.value(f"{edge}.scrollWidth === {edge}.clientWidth")  # nothing sticks out
    if width == 390:
        assert bottom - top > 844 / 2 and bottom <= 844
        assert await page.value("document.getElementById('keypad').offsetHeight === 0")
        await page.click("#more")
    tops = await page.value(
        "[...document.querySelectorAll('#keypad button')].map(k => k.offsetTop)"
    )
    assert tops == [tops[row] for row in (0, 3, 6, 9) for _ in range(3)] and len(set(tops)) == 4
    await page.do("Emulation.clearDeviceMetricsOverride")


@in_a_browser
async def test_warnings_of_twilio(page: Page) -> None:
    extra = '{"event": "clear", "streamSid": "MZ", "extra": 1}'
    for wrong in ('{"event": "clear"}', '{"event": "clear", "streamSid": "MZ1"}', "{", extra):
        await page.value("document.getElementById('log').textContent = ''")
        await page.value(f"fromBridge({{streamSid: 'MZ', line: null}}, {wrong!r})")
        assert "31951" in await page.text("#log")


# ── The line ──────────────────────────────────────────────────────────────────────────────────

IN_THE_LINE = """
(() => {
  const posted = [];
  class Processor { port = {postMessage: message => posted.push(message)} }
  const parts = "; return [Resampler, Line, encode, DECODED]";
  const source = document.getElementById("line").textContent + parts;
  const [Resampler, Line, encode, DECODED] =
    Function("AudioWorkletProcessor", "registerProcessor", "sampleRate", source)(
      Processor, () => {}, 48000);
  %s
})()
"""

RESAMPLE = """
  const resampled = (from, to, count, tone) => {
    const resampler = new Resampler(from, to), out = [];
    for (let n = 0; n < count; n++) {
      resampler.take(tone(n));
      while (resampler.ready) out.push(resampler.give());
    }
    return out;
  };
  const sine = (hz, rate) => n => Math.sin(2 * Math.PI * hz * n / rate);
  const dB = power => 10 * Math.log10(2 * power + 1e-12);
  const gain = (from, to, hz) => {
    const out = resampled(from, to, from / 2, sine(hz, from));
    const steady = out.slice(out.length / 4, -out.length / 4);
    return dB(steady.reduce((sum, x) => sum + x * x, 0) / steady.length);
  };
  const images = (to, hz) => { // all that comes out beside the tone
    const out = resampled(8000, to, 4000, sine(hz, 8000));
    const steady = out.slice(out.length / 4, out.length / 4 + to / 10);
    let [re, im, all] = [0, 0, 0];
    steady.forEach((x, n) => {
      const angle = 2 * Math.PI * hz * n / to;
      re += x * Math.cos(angle), im += x * Math.sin(angle), all += x * x;
    });
    return dB(Math.abs(all - 2 * (re * re + im * im) / steady.length) / steady.length);
  };
  const rates = [44100, 48000, 96000, 16000];
  const each = (tones, f) => rates.flatMap(rate => tones.map(hz => f(rate, hz)));
  return {
    passed: each([300, 1000, 3400], (rate, hz) => gain(rate, 8000, hz)),
    kept: each([300, 1000, 3400], (rate, hz) => gain(8000, rate, hz)),
    aliased: each([4050, 4600, 5000, 7000, 7900], (rate, hz) => gain(rate, 8000, hz)),
    images: each([300, 1000, 3400], images),
    lengths: rates.map(rate => resampled(rate, 8000, rate, () => 0).length),
    codec: Array.from({length: 256}, (_, byte) => encode(DECODED[byte])),
  };
"""


@in_a_browser
async def test_resampling(page: Page) -> None:
    """Voices pass in both directions, and nothing of what a telephone cannot carry comes back."""
    found = await page.value(IN_THE_LINE % RESAMPLE)
    assert all(abs(gain) < 1 for gain in found["passed"] + found["kept"]), found
    assert max(found["aliased"] + found["images"]) < -60, found
    assert found["lengths"] == [8000] * 4
    assert found["codec"] == [0xFF if byte == 0x7F else byte for byte in range(256)]  # two zeros


PLAY = """
  const line = new Line();
  const run = () => { const out = new Float32Array(128); line.process([[]], [[out]]); return out; };
  const send = data => line.port.onmessage({data});
  const sine = i => encode(.5 * Math.sin(2 * Math.PI * i * 500 / 8000));
  const tone = n => Uint8Array.from({length: n}, (_, i) => sine(i));
  for (const data of [tone(96), {mark: "a"}, tone(96), {mark: "b"}, tone(400), {mark: "c"}])
    send(data);
  let out = [];
  for (let n = 0; n < 13; n++) out.push(...run()); // 278 samples of the line; the last is loud
  const first = posted.splice(0).filter(m => m.mark || m.played);
  send("clear");
  const cleared = posted.splice(0).map(m => m.mark ?? m.cleared);
  for (let n = 0; n < 8; n++) out.push(...run());
  const steps = out.map((x, n) => Math.abs(x - (out[n - 1] ?? 0)));
  return {first: first.map(m => [m.mark ?? "", m.played.length]), cleared,
          step: Math.max(...steps), silent: Math.max(...out.slice(-300).map(Math.abs)),
          left: posted.filter(m => m.played?.length).length};
"""


@in_a_browser
async def test_marks_and_clear(page: Page) -> None:
    """Marks come back when played, and all at once when cleared, without a click."""
    found = await page.value(IN_THE_LINE % PLAY)
    marks = [mark for mark, _ in found["first"]]
    assert [mark for mark in marks if mark] == ["a", "b"]
    assert sum(played for _, played in found["first"][: marks.index("b") + 1]) == 192
    assert found["cleared"] == ["c", 400 - (278 - 192)]
    assert found["step"] < 0.05  # of full scale from one sample to the next; the tone's is 0.03
    assert found["silent"] < 0.001 and found["left"] <= 1


# ── The page's text and colours ───────────────────────────────────────────────────────────────


def test_japanese() -> None:
    """The Japanese has full-width punctuation, and one word for one thing."""
    texts = re.findall('"(.*?)"', HTML[HTML.index("  ja: {") : HTML.index("const OFFLINE_WORDS")])
    assert len(texts) > 50
    wrong = "[:;()!?]|ブラウザ(?!ー)|コンピュータ(?!ー)|モデル|さえぎ|道具"
    assert [text for text in texts if re.search(wrong, text)] == []
    assert all(f'"{line["text"]}"' in HTML for line in LINES.values())


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


PAIRS = """text:page text:card quiet:page quiet:card text:caller-tint text:model-tint
    quiet:model-tint quiet:note-tint caller:note-tint caller:card model:card caller:caller-tint
    model:model-tint on-colour:go on-colour:stop text:key warn-text:warn-tint cut:card"""


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("pair", PAIRS.split())
def test_contrast(theme: int, pair: str) -> None:
    """Text has the contrast of WCAG AA, 4.5, in the light theme and in the dark one."""
    themes = re.findall(r":root \{(.*?)\}", HTML, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", css)) for css in themes)
    colours = light | (dark if theme else {})
    low, high = sorted(luminance(colours[name]) for name in pair.split(":"))
    assert (high + 0.05) / (low + 0.05) >= 4.5


# ── What the bridge tells the page ────────────────────────────────────────────────────────────


async def test_events_of_a_call(hook: LoadHook) -> None:
    """A page gets the events of its call once and in order, with cost and report as they come."""
    phone, call = hook("browser_phone"), PretendCall(SID)
    events = phone.module.events
    events({"call": SID})  # a page that is about to call
    said = {"item": "i", "text": "はい", "heard_ms": None}
    call.notes["cost"] = {"usd": None, "known_usd": 0.5}
    started = ("model_started_speaking", 5.5, {"item": "i"})
    await phone.tell_all(call, ("call_started", 5.0, {}), started, ("model_said", 7.25, said))
    known = events({"call": SID, "after": "1"})
    assert known["events"] == [
        {"n": 2, "event": "model_started_speaking", "at_ms": 500, "item": "i"},
        {"n": 3, "event": "model_said", "at_ms": 2250, **said},
    ]
    assert (known["busy"], known["usd"], known["usd_complete"]) == (False, 0.5, False)
    assert known["report"] is False
    assert events({"call": SID, "after": "3"})["events"] == []


async def test_report(hook: LoadHook, tmp_path: Path) -> None:
    """The page serves the report of a call that it watches, and no other file."""
    phone, call = hook("browser_phone"), PretendCall(SID)
    report = phone.module.report
    phone.module.events({"call": SID})
    await phone.tell_all(call, "call_started")
    assert "look into" in report({"call": SID}) and "look into" in report({"call": "/etc/passwd"})
    call.notes["report"] = str(tmp_path / "r.html")
    (tmp_path / "r.html").write_text("<html>")
    assert report({"call": SID}) == "<html>" and phone.module.events({"call": SID})["report"]


async def test_other_calls(hook: LoadHook) -> None:
    """Of calls that no page asks about nothing is kept."""
    phone = hook("browser_phone")
    await phone.tell_all(PretendCall(SID), "call_started", ("caller_said", {"text": "秘密"}))
    assert phone.module.watched_calls == {}
    assert phone.module.events({"call": SID})["events"] == []
    phone.module.events({"call": "CA" + "x" * 32})
    assert list(phone.module.watched_calls) == [SID]


def test_signed_calls_only(hook: LoadHook) -> None:
    """With TWILIO_AUTH_TOKEN no page is served: then the file is told nothing at all."""
    assert not any(hook("browser_phone", TWILIO_AUTH_TOKEN="x" * 32).host.handling.values())


async def test_limits(hook: LoadHook) -> None:
    """Old events and old calls are forgotten, and a while after its end a call is, too."""
    phone = hook("browser_phone")
    events, phone.module.FORGET_S = phone.module.events, 0.3
    for n in range(30):
        events({"call": f"CA{n:032x}"})
    assert list(phone.module.watched_calls) == [f"CA{n:032x}" for n in range(10, 30)]
    events({"call": SID})
    many = [("model_words", float(n), {"item": "i", "text": "x" * 3000}) for n in range(1, 901)]
    await phone.tell_all(PretendCall(SID), *many, ("call_ended", {"reason": "hung up"}))
    kept = events({"call": SID})["events"]
    assert len(kept) == 901 and len(kept[0]["text"]) == 2000
    await until(lambda: SID not in phone.module.watched_calls)


async def test_connected_again(hook: LoadHook) -> None:
    """A call whose stream was lost and that goes on is not forgotten."""
    phone, ended = hook("browser_phone"), ("call_ended", {"reason": "twilio lost"})
    phone.module.FORGET_S = 0.1
    phone.module.events({"call": SID})
    phone.tell(PretendCall(SID), "call_started", ended)
    await phone.tell_all(PretendCall(SID), "call_started")
    await asyncio.sleep(0.2)
    assert len(phone.module.events({"call": SID})["events"]) == 3


@pytest.mark.parametrize(
    ("settings", "model", "offline"),
    [
        ({}, "gpt-realtime-2.1", True),
        ({"OPENAI_API_KEY": "x", "OPENAI_REALTIME_MODEL": "other"}, "other", False),
        ({"OPENAI_REALTIME_URL": "ws://localhost:1/v1?model=local"}, "local", False),
    ],
)
def test_who_answers(hook: LoadHook, settings: dict[str, str], model: str, offline: bool) -> None:
    answer = hook("browser_phone", **settings).module.events({})
    assert (answer["model"], answer["offline"]) == (model, offline)
