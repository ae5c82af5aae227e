"""The host of the hooks: which files are loaded, how events reach them, and tools."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import until  # which also finds bridge.py

import bridge
from test_bridge import a_bridge


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


class Host:
    """Hook files in a folder of their own, and what they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.call: Any = types.SimpleNamespace(sid="CA" + "1" * 32, did=[], notes={})

    def load(self, names: str | None = None, **files: str) -> Any:
        for name, code in files.items():
            (self.folder / f"{name}.py").write_text(code)
        self.hooks = bridge.Hooks(self.folder, names)
        return self.hooks

    async def told(self, *events: str, **facts: Any) -> list[Any]:
        """What was done at these events."""
        self.call.did.clear()
        for event in events or ["call_started"]:
            self.hooks.emit(event, self.call, 7.5, facts)
        await asyncio.to_thread(self.hooks.close, 3)
        return list(self.call.did)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


NAMED = "def call_started(call): call.did.append(__name__.removeprefix('_hook_'))\n"


async def test_files(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """All files are loaded but those with a _, or those of HOOKS in its order; none shadows."""
    code = "import json, logging, time\nassert time.time and logging.getLogger\n" + NAMED
    host.load(**dict.fromkeys(["b", "a", "_c", "logging", "time"], code))
    assert sorted(await host.told()) == ["a", "b", "logging", "time"]
    assert list(host.load(" b , a,,b").files) == ["b", "a"]
    host.load("")
    assert await host.told() == [] and not warnings(caplog)
    for name in ("cots", "_c", "a.py", "../a"):
        with pytest.raises((ValueError, SystemExit), match="HOOKS.*a, b") as wrong:
            host.load(f"a,{name}")
        assert repr(name) in str(wrong.value)
    with pytest.raises(
        (ValueError, SystemExit), match="BUDGET is 'x': give"
    ):  # it must not fail open
        host.load("cost", cost="import sys\nsys.exit(\"BUDGET is 'x': give a number\")")


BROKEN = ["def call_started(call)", "import no_such_package", "1 / 0", "TOOLS = None", "PAGES = 7"]
BROKEN += ["TOOLS = [7]", "def f(): 'Doc.'\nTOOLS = [f]\nPAGES = 7", "def f(): 0\nTOOLS = [f]"]
BROKEN += [f"def {name}(): 'Doc.'\nTOOLS = [{name}]" for name in ("天気", "f" * 65)]


@pytest.mark.parametrize("code", BROKEN)
async def test_broken_file(host: Host, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file that does not load is named in the log and left out as a whole."""
    hooks = host.load(a=NAMED, broken=NAMED + code, c=NAMED)
    assert sorted(await host.told()) == ["a", "c"] and hooks.tools == [] and hooks.pages == {}
    (line,) = warnings(caplog)
    assert "hooks/broken.py" in line


MISSPELT = {  # a function, and what was meant
    "call_start(call)": "call_started",
    "on_call_started(call)": "call_started",
    "caller_sayd(call)": "caller_said",
    "model_interupted(call)": "model_interrupted",
    "any_events(call)": "any_event",
    "caller_said(call, txt)": "text",
    "caller_said(cal, text)": "call",
    "model_said(call, *, heard)": "heard_ms",
    "mask(number)": "",
    "_caller_sayd(call)": "",
    "caller_said()": "",
}


async def test_misspelt(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt event or argument is an error line with the nearest right name."""
    for function, meant in MISSPELT.items():
        caplog.clear()
        host.load(mine=f"{NAMED}async def {function}: raise AssertionError('called')")
        lines = warnings(caplog)
        assert len(lines) == bool(meant), function
        assert not meant or re.search(rf"mine.py: .*\b{meant}\b", lines[0])
        events = ["call_started"] if not meant else ["call_started", "caller_said", "model_said"]
        assert await host.told(*events, item="", text="", heard_ms=1) == ["mine"]


async def test_arguments(host: Host) -> None:
    """A handler gets just what it names; any_event gets all but the two of audio."""
    host.load(
        one="def model_said(heard_ms, call): call.did.append(heard_ms)",
        two="async def model_said(at, text, call): call.did.append((text, at))",
        all="def any_event(call, at, event, facts): call.did.append((event, facts['text']))",
    )
    did = await host.told("model_said", "caller_audio", text="はい", heard_ms=8, item="", mulaw=b"")
    assert sorted(did, key=str) == [("model_said", "はい"), ("はい", 7.5), 8]


RAISED = ["1 / 0", "raise SystemExit", "raise KeyboardInterrupt", "raise GeneratorExit", "call.x"]
RAISED += ["raise __import__('asyncio').CancelledError", "next(iter(()))"]


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("code", RAISED)
async def test_raised(host: Host, kind: str, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with file, event and call, and the next event is delivered."""
    host.load(bad=f"{kind} call_started(call): {code}\n{kind} call_ended(call): call.did.append(1)")
    assert await host.told("call_started", "call_ended", reason="") == [1]
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert re.search(r"bad\b.*call_started.* failed", record.getMessage())
    assert record.exc_info and vars(record)["call"] == host.call.sid


async def test_blocked_hook(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """It delays only itself. Over 1,000 waiting events are dropped, but never call_ended."""
    slow = "import threading\ngo = threading.Event()\ndef key_pressed(call, key): go.wait(9)\n"
    hooks = host.load(
        slow=slow + "def call_ended(call): call.did.append('end')",
        quick="async def key_pressed(call, key): call.did.append(key)",
    )
    for key in range(1100):
        hooks.emit("key_pressed", host.call, 0.0, {"key": key})
        if key % 100 == 99:
            await until(lambda key=key: host.call.did == list(range(key + 1)))
    dropped = [text for text in warnings(caplog) if "slow" in text and "dropped" in text]
    assert dropped and re.search(r"\b64\b", dropped[-1])  # 1, 2, 4, 8, … of the 99
    hooks.emit("call_ended", host.call, 0.0, {"reason": ""})
    began = time.monotonic()
    await asyncio.to_thread(hooks.close, 0.2)  # waits no longer
    assert time.monotonic() - began < 0.5
    sys.modules["_hook_slow"].go.set()
    await until(lambda: host.call.did[-1] == "end")


async def test_computing_hook() -> None:
    """Beside a hook that computes, each step of the loop is held up for less than 4 ms."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            pass

    async with a_bridge():
        threading.Thread(target=compute).start()
        try:
            for _ in range(9):  # the machine itself may be late
                began = time.monotonic()
                for _ in range(20):
                    await asyncio.sleep(0.001)
                if (took_s := time.monotonic() - began) < 20 * 0.004:
                    break
            assert took_s < 20 * 0.004
        finally:
            done.set()


async def test_order_and_threads(host: Host) -> None:
    """One event at a time, plain ones in a thread of their own, async ones on the loop."""
    code = (
        "import threading, time\ndef note(call, x): call.did.append((x, threading.get_ident()))\n"
    )
    code += "def key_pressed(call, key): time.sleep(0.002); note(call, 'plain')\n"
    host.load(mixed=code + "async def caller_said(call, text): note(call, 'async')")
    did = await host.told(*["key_pressed", "caller_said"] * 20, key="1", item="", text="")
    assert [name for name, _ in did] == ["plain", "async"] * 20
    (plain,), (loop,) = {one for _, one in did[::2]}, {one for _, one in did[1::2]}
    assert loop == threading.get_ident() != plain


SCHEMAS: list[tuple[Any, dict[str, Any]]] = [
    (str, {"type": "string"}),
    (int | None, {"type": "integer"}),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (list, {"type": "array", "items": {"type": "string"}}),
    (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
    (Literal["晴れ", "雨"], {"type": "string", "enum": ["晴れ", "雨"]}),
    (Annotated[float | None, "How warm"], {"type": "number", "description": "How warm"}),
]
TOOL = '''
import asyncio, threading
from typing import Annotated, Literal
def book(call, name, people: Annotated[int, "How many."] = 2, *, room: Literal["A", "B"] = "A"):
    """Book a table.

    Ask for the name first."""
    return [name, people, room, threading.current_thread().name, call.sid]
async def silent(): "Says nothing."
def fails(): "Fails."; raise SystemExit("no")
def odd(): "Odd."; raise BaseException("odd")
async def cancels(): "Cancels itself."; asyncio.current_task().cancel(); await asyncio.sleep(0)
async def leaves(): "Cancels itself at its end."; asyncio.current_task().cancel()
async def hangs(): "Hangs."; await asyncio.sleep(60)
def empty(): "Looks for nothing."; return next(iter([]))
def text(warm: float = 1.0, dry: bool = True): "Some text."; return f"{warm} {dry}" + "x" * 99_999
TOOLS = [book, silent, fails, odd, cancels, leaves, hangs, empty, text]
'''
TOOL_CALLS = [  # name, arguments, a part of what the model is told
    ("book", '{"name": "山", "people": 3, "room": "B"}', '["山", 3, "B", "tool_'),
    ("book", '{"name": "山", "people": null}', '["山", 2, "A", "tool_'),
    ("book", '{"name": "x"}', "CA" + "1" * 32),
    ("book", "{}", "'name'"),
    ("book", '{"name": "x", "size": 1}', "size"),
    ("book", "[1]", "Error"),
    ("book", "{", "Error"),
    ("text", '{"warm": 3}', "3 True"),
    ("fails", "{}", "Error"),
    ("odd", "{}", "Error: BaseException('odd')"),
    ("cancels", "{}", "Error: CancelledError()"),
    ("leaves", "{}", "leaves has returned nothing"),
    ("hangs", "{}", "0.1 s"),
    ("empty", "{}", "StopIteration"),
    ("nothing", "{}", "Error: 'nothing'"),
]


async def test_tools(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, docstring and hints become a schema without the call; a failure is told in words."""
    assert bridge.TOOL_S == 20
    monkeypatch.setattr(bridge, "TOOL_S", 0.1)
    for hint, schema in SCHEMAS:
        assert bridge.json_schema(hint) == schema
    hooks = host.load(mine=TOOL)
    book = {"type": "function", "name": "book"}
    book["description"] = "Book a table.\n\nAsk for the name first."
    properties = {"name": {"type": "string"}, "room": {"type": "string", "enum": ["A", "B"]}}
    properties["people"] = {"type": "integer", "description": "How many."}
    parameters = {"type": "object", "required": ["name"], "properties": properties}
    assert hooks.tools[0] == book | {"parameters": parameters}
    for name, arguments, part in TOOL_CALLS:
        result = await hooks.run_tool(host.call, name, arguments)
        assert part in result and len(result) <= 20_000, (name, arguments, result)
    assert await hooks.run_tool(host.call, "silent", "{}") is None
