"""What the host of the hooks promises: which files are loaded, how events reach them, tools and pages."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Optional

import pytest
from conftest import HOOKS, PretendCall, log_lines, longest_pause_of_the_loop, until
from websockets.asyncio.server import serve

LoadFiles = Callable[..., Any]
Errors = Callable[[], list[str]]


@pytest.fixture
def load(hooks_host: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[LoadFiles]:
    """load(greeter="def call_started(call): …") writes a hook file and loads all that there are, or those of HOOKS."""
    caplog.set_level(logging.INFO)
    hosts = []

    def write_and_load(hooks: str | None = None, **files: str) -> Any:
        for name, code in files.items():
            (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        hosts.append(hooks_host.load(tmp_path, hooks))
        return hosts[-1]

    yield write_and_load
    for host in hosts:
        host.close(1)


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Errors:
    """The error lines so far."""
    return lambda: log_lines(caplog, logging.ERROR)


def emit(host: Any, call: PretendCall, event: str, **facts: Any) -> None:
    host.emit(event, call, time.monotonic(), facts)


async def finish(host: Any) -> None:
    await asyncio.to_thread(host.close, 5)


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────

SAYS_ITS_NAME = "def call_started(call): call.did.append(__name__.removeprefix('_hook_'))"


async def who_answers(host: Any) -> list[str]:
    emit(host, call := PretendCall(), "call_started")
    await finish(host)
    return sorted(call.did)


async def test_every_file_is_loaded_but_those_whose_name_begins_with_an_underscore(load: LoadFiles) -> None:
    host = load(a=SAYS_ITS_NAME, b=SAYS_ITS_NAME, _c=SAYS_ITS_NAME, __init__=SAYS_ITS_NAME)
    assert await who_answers(host) == ["a", "b"]


async def test_hooks_names_the_files_and_their_order(load: LoadFiles) -> None:
    files = dict.fromkeys("abcd", SAYS_ITS_NAME) | {"log": SAYS_ITS_NAME}
    host = load(" c , a,log,,b", **files)
    assert list(host.files) == ["c", "a", "log", "b"]
    assert await who_answers(host) == ["a", "b", "c", "log"]


async def test_an_empty_hooks_loads_nothing(load: LoadFiles) -> None:
    assert await who_answers(load("", a=SAYS_ITS_NAME)) == []


async def test_a_file_that_hooks_names_twice_is_loaded_once(load: LoadFiles) -> None:
    assert await who_answers(load("a,a", a=SAYS_ITS_NAME)) == ["a"]


@pytest.mark.parametrize("name", ["cots", "_private", "cost.py", "../cost"])
def test_a_name_that_is_not_there_is_an_error_that_tells_which_there_are(load: LoadFiles, name: str) -> None:
    with pytest.raises(ValueError, match="choose from cost, log") as wrong:
        load(f"cost,{name}", cost="", log="", _private="")
    assert "HOOKS" in str(wrong.value) and repr(name) in str(wrong.value)


@pytest.mark.parametrize(
    "fault",
    [
        "def call_started(call)",
        "import a_package_that_is_not_there",
        "1 / 0",
        "import sys; sys.exit('set something')",
        "def tool(): 'A tool.'\nTOOLS = tool",
        "TOOLS = None",
        "PAGES = ['/']",
    ],
)
async def test_a_file_that_does_not_import_is_named_in_the_log_and_left_out(
    load: LoadFiles, errors: Errors, fault: str
) -> None:
    host = load(a=SAYS_ITS_NAME, broken=SAYS_ITS_NAME + "\n" + fault, c=SAYS_ITS_NAME)
    assert await who_answers(host) == ["a", "c"]
    assert len(errors()) == 1 and "hooks/broken.py" in errors()[0] and "left out" in errors()[0]


async def test_the_names_of_files_shadow_nothing(load: LoadFiles, errors: Errors) -> None:
    before = {name: sys.modules[name] for name in ("logging", "time", "json")}
    uses_them = "import json, logging, time\ndef call_started(call): call.did.append(json.dumps(time.time() > 0))"
    host = load(logging=uses_them, time=uses_them, json=uses_them, zz=uses_them)
    assert await who_answers(host) == ["true"] * 4
    assert {name: sys.modules[name] for name in before} == before and not errors()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("call_start", "call_started"),
        ("on_call_started", "call_started"),
        ("caller_sayd", "caller_said"),
        ("callerSaid", "caller_said"),
        ("model_speaks", "model_spoke"),
        ("handle_caller_said", "caller_said"),
        ("model_interupted", "model_interrupted"),
        ("key_press", "key_pressed"),
        ("tools_used", "tool_used"),
    ],
)
def test_a_misspelt_event_is_an_error_line_with_the_nearest_right_name(
    load: LoadFiles, errors: Errors, written: str, meant: str
) -> None:
    load(mine=f"async def {written}(call): pass")
    assert errors() == [f"hooks/mine.py: {written} is not an event: did you mean {meant}?"]


def test_functions_that_are_no_events_are_nobodys_business(load: LoadFiles, errors: Errors) -> None:
    helpers = [
        "def mask(number): pass",
        "def tell(call): pass",
        "def _caller_sayd(call): pass",
        "class key_press: pass",
    ]
    host = load(
        mine="\n".join(helpers),
        tools="def call_ender(call):\n    'A tool.'\nTOOLS = [call_ender]",
        pages="def call_ends(query): return ''\nPAGES = {'/ends': call_ends}",
    )
    assert not errors() and not any(host.handled.values())


@pytest.mark.parametrize(
    ("handler", "wrong", "right"),
    [
        ("def caller_said(call, txt)", "txt", "text"),
        ("def caller_said(cal, text)", "cal", "call"),
        ("async def model_said(call, heard)", "heard", "heard_ms"),
        ("def key_pressed(call, *, digit)", "digit", ""),
    ],
)
async def test_a_wrong_argument_is_an_error_line_with_the_nearest_right_name_and_the_function_is_not_called(
    load: LoadFiles, errors: Errors, handler: str, wrong: str, right: str
) -> None:
    host = load(mine=f"{handler}: call.did.append('wrong')\n{SAYS_ITS_NAME}")
    event = handler.partition("def ")[2].partition("(")[0]
    (line,) = errors()
    assert f"hooks/mine.py: {event} has no argument {wrong}: did you mean {right}" in line and "not called" in line
    emit(host, call := PretendCall(), event, text="", heard_ms=1, key="1")
    emit(host, call, "call_started")
    await finish(host)
    assert call.did == ["mine"] and not host.listens(event)


async def test_arguments_are_given_just_by_name(load: LoadFiles, errors: Errors) -> None:
    host = load(
        one="def model_said(heard_ms, call): call.did.append(heard_ms)",
        other="def model_said(at, text, call, *, times=2): call.did.append((text * times, at))",
        every="def model_said(call, **facts): call.did.append((sorted(facts), facts['text']))",
        no="did = []\ndef model_said(): did.append('told')",
    )
    call: Any = PretendCall()
    host.emit("model_said", call, 7.5, {"text": "はい", "heard_ms": 80})
    await finish(host)
    assert sorted(call.did, key=str) == [("はいはい", 7.5), (["at", "heard_ms", "text"], "はい"), 80]
    assert sys.modules["_hook_no"].did == ["told"] and not errors()


async def test_one_function_may_have_the_names_of_several_events(load: LoadFiles) -> None:
    host = load(
        a="def told(call, at): call.did.append(at)\ncall_started = call_ended = told\ncaller_spoke = lambda call: 1"
    )
    call: Any = PretendCall()
    for at, event in enumerate(("call_started", "caller_spoke", "call_ended")):
        host.emit(event, call, at, {"reason": ""})
    await finish(host)
    assert call.did == [0, 2] and host.listens("caller_spoke")


def test_an_event_that_no_file_handles_is_listened_to_by_nobody(load: LoadFiles, hooks_host: ModuleType) -> None:
    host = load(a="def caller_audio(call, mulaw): pass", b="from linecache import clearcache as model_audio")
    assert [event for event in hooks_host.EVENTS if host.listens(event)] == ["caller_audio"]


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────

CANCELLED = "raise __import__('asyncio').CancelledError"  # as of a task that is awaited and was cancelled elsewhere


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("fault", ["1 / 0", "raise SystemExit", CANCELLED, "next(iter(()))", "call.nothing"])
async def test_what_a_hook_raises_is_logged_with_file_and_event_and_the_next_event_is_delivered(
    load: LoadFiles, errors: Errors, kind: str, fault: str
) -> None:
    host = load(broken=f"{kind} caller_spoke(call): {fault}\n{kind} key_pressed(call, key): call.did.append(key)")
    call = PretendCall()
    emit(host, call, "caller_spoke")
    emit(host, call, "key_pressed", key="5")
    await finish(host)
    assert call.did == ["5"]
    assert errors() == ["hooks/broken.py: caller_spoke failed; the call goes on"]


async def test_a_hook_that_blocks_delays_only_itself(load: LoadFiles) -> None:
    slow = "import time\ndef caller_spoke(call, at): time.sleep(0.5); call.did.append(time.monotonic() - at)"
    host = load(quick=slow.replace("0.5", "0"), slow=slow)
    call: Any = PretendCall()
    began = time.monotonic()
    emit(host, call, "caller_spoke")
    assert time.monotonic() - began < 0.05
    assert await longest_pause_of_the_loop(lambda: len(call.did) == 2) < 0.25
    assert call.did[0] < 0.25 and call.did[1] >= 0.5


async def test_over_a_thousand_waiting_events_new_ones_are_dropped_counted_and_logged(
    load: LoadFiles, errors: Errors
) -> None:
    host = load(
        slow="import threading\ngo, did = threading.Event(), []\ndef key_pressed(key): go.wait(5); did.append(key)",
        quick="did = []\ndef key_pressed(key): did.append(key)",
    )
    slow, quick = sys.modules["_hook_slow"], sys.modules["_hook_quick"]
    emit(host, PretendCall(), "key_pressed", key=0)
    await until(lambda: host.files["slow"].waiting.empty())  # it is being handled
    for number in range(1, 1051):
        emit(host, PretendCall(), "key_pressed", key=number)
        if number % 100 == 0:
            await asyncio.sleep(0.01)
    assert errors() == ["hooks/slow.py is too slow: 1000 events wait, new ones are dropped"]
    slow.go.set()
    await until(lambda: len(slow.did) == 1001)
    emit(host, PretendCall(), "key_pressed", key="after")
    await finish(host)
    assert slow.did == [*range(1001), "after"] and quick.did == [*range(1051), "after"]
    assert errors()[1:] == ["hooks/slow.py: 50 events were dropped"] and host.dropped == 50


async def test_events_that_were_dropped_last_of_all_are_counted_at_the_end(load: LoadFiles, errors: Errors) -> None:
    host = load(slow="import threading\ngo = threading.Event()\ndef key_pressed(key): go.wait(5)")
    for number in range(1010):
        emit(host, PretendCall(), "key_pressed", key=number)
    sys.modules["_hook_slow"].go.set()
    await finish(host)
    assert "events were dropped" in errors()[-1]


async def test_events_come_one_at_a_time_and_in_order_also_when_plain_and_async_handlers_mix(load: LoadFiles) -> None:
    host = load(
        mixed="""
import asyncio, random, time
inside, most = 0, 0

def enter():
    global inside, most
    inside += 1
    most = max(most, inside)

def leave(call, key):
    global inside
    inside -= 1
    call.did.append(key)

def key_pressed(call, key):
    enter()
    time.sleep(random.random() / 500)
    leave(call, key)

async def caller_said(call, text):
    enter()
    await asyncio.sleep(random.random() / 500)
    leave(call, text)
"""
    )
    call: Any = PretendCall()
    for number in range(100):
        if number % 3:
            emit(host, call, "key_pressed", key=number)
        else:
            emit(host, call, "caller_said", text=number)
    await finish(host)
    assert call.did == list(range(100)) and sys.modules["_hook_mixed"].most == 1


async def test_async_handlers_run_on_the_loop_and_plain_ones_in_a_thread_of_their_file(load: LoadFiles) -> None:
    where = """
import threading
async def call_started(call): call.notes[__name__] = [threading.get_ident()]
def caller_spoke(call): call.notes[__name__].append(threading.get_ident())
call_ended = caller_spoke
"""
    host, call = load(a=where, b=where), PretendCall()
    for event in ("call_started", "caller_spoke", "call_ended"):
        emit(host, call, event, reason="")
    await finish(host)
    (loop_a, a, still_a), (loop_b, b, _) = call.notes["_hook_a"], call.notes["_hook_b"]
    assert loop_a == loop_b == threading.get_ident()
    assert a == still_a and len({a, b, loop_a}) == 3


async def test_close_waits_for_what_is_still_to_be_written(load: LoadFiles, tmp_path: Path, errors: Errors) -> None:
    write = "import pathlib, time\ndef call_ended(reason):\n  time.sleep(0.1)\n  "
    host = load(**{name: f"{write}pathlib.Path({str(tmp_path / name)!r}).write_text(reason)" for name in "abc"})
    emit(host, PretendCall(), "call_ended", reason="hung up")
    began = time.monotonic()
    host.close(5)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["hung up"] * 3
    assert time.monotonic() - began < 1 and not errors()


async def test_close_does_not_wait_longer_than_its_limit(load: LoadFiles, errors: Errors) -> None:
    stuck = "import threading\ngo = threading.Event()\ndef call_ended(): go.wait(5)"
    host = load(a=stuck, b=stuck, c=stuck, d=SAYS_ITS_NAME)
    emit(host, PretendCall(), "call_ended", reason="")
    began = time.monotonic()
    host.close(0.3)
    assert 0.25 < time.monotonic() - began < 0.6
    assert [line.partition(" has not")[0] for line in errors()] == ["hooks/a.py", "hooks/b.py", "hooks/c.py"]
    for name in "abc":
        sys.modules[f"_hook_{name}"].go.set()


STUCK = """
import asyncio, importlib.util, sys, types
from pathlib import Path
spec = importlib.util.spec_from_file_location("hooks_host", sys.argv[1])
hooks_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks_host)

async def main():
    hooks_host.TOOL_TIMEOUT_S = 0.1
    host = hooks_host.load(Path(sys.argv[2]), None)
    host.emit("call_started", None, 0.0, {})
    print(await host.run_tool(None, "wait", "{}"))
    await asyncio.to_thread(host.close, 0.1)

asyncio.run(main())
"""


def test_hooks_and_tools_that_never_come_back_do_not_hold_up_the_programs_end(tmp_path: Path) -> None:
    code = "import time\ndef wait(): 'Waits.'; time.sleep(60)\ndef call_started(): wait()\nTOOLS = [wait]"
    (tmp_path / "stuck.py").write_text(code)
    program = [sys.executable, "-c", STUCK, str(HOOKS / "__init__.py"), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and "did not answer" in done.stdout
    assert "hooks/stuck.py has not come to its end" in done.stderr


# ── Tools ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (dict, {"type": "object"}),
        (dict[str, int], {"type": "object"}),
        (list, {"type": "array", "items": {"type": "string"}}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (list[list[bool]], {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}),
        (Literal["晴れ", "雨"], {"type": "string", "enum": ["晴れ", "雨"]}),
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
        (list[Literal["a"]], {"type": "array", "items": {"type": "string", "enum": ["a"]}}),
        (str | None, {"type": "string"}),
        (Optional[int], {"type": "integer"}),  # noqa: UP045
        (Annotated[str, "A city."], {"type": "string", "description": "A city."}),
        (Annotated[Literal["a"] | None, 1, "x", "y"], {"type": "string", "enum": ["a"], "description": "x y"}),
    ],
    ids=str,
)
def test_a_type_hint_becomes_a_json_schema(hooks_host: ModuleType, hint: Any, schema: dict[str, Any]) -> None:
    assert hooks_host.json_schema(hint) == schema


def test_a_function_becomes_a_tool_whose_call_is_hidden(load: LoadFiles) -> None:
    code = '''
from __future__ import annotations
from typing import Annotated, Literal

def book_table(call, name, people: Annotated[int, "How many."], *, room: Literal["A", "B"] | None = None) -> str:
    """Book a table.

    Ask for the name first.
    """

TOOLS = [book_table]
'''
    properties = {
        "name": {"type": "string"},  # which has no hint
        "people": {"type": "integer", "description": "How many."},
        "room": {"type": "string", "enum": ["A", "B"]},
    }
    assert load(tools=code).tools == [
        {
            "type": "function",
            "name": "book_table",
            "description": "Book a table.\n\nAsk for the name first.",
            "parameters": {"type": "object", "properties": properties, "required": ["name", "people"]},
        }
    ]


@pytest.mark.parametrize(
    ("tool", "why"),
    [
        ("def tool(x): pass", "docstring"),
        ("def tool(*x): 'It.'", "x"),
        ("def tool(**x): 'It.'", "x"),
        ("def tool(x, /): 'It.'", "x"),
        ("def tool(x: bytes): 'It.'", "bytes"),
        ("def tool(x: int | str): 'It.'", "int | str"),
        ("def tool(x: 'Nothing'): 'It.'", "Nothing"),
        ("def 道具(): 'It.'\ntool = 道具", "no such name"),
        ("tool = 'hang_up'", ""),
        ("def good(): 'It.'\ntool = good", "another tool of this name"),
    ],
)
async def test_a_function_that_cannot_be_a_tool_is_left_out_with_an_error_line_and_the_others_work(
    load: LoadFiles, errors: Errors, tool: str, why: str
) -> None:
    host = load(tools=f"{tool}\nwrong = tool\ndef good(): 'Good.'; return 'good'\nTOOLS = [good, wrong]")
    assert [one["name"] for one in host.tools] == ["good"]
    (line,) = errors()
    assert "hooks/tools.py" in line and "left out" in line and why in line
    assert await host.run_tool(PretendCall(), "good", "{}") == "good"


TAKES = """
from typing import Literal

def take(text: str, number: int = 1, share: float = 0.5, yes: bool = True, unit: Literal["c", "f"] | None = None,
         days: list[Literal[1, 2]] = [], more: dict = {}):
    "Takes arguments."
    return [text, number, share, yes, unit, days, more]

TOOLS = [take]
"""


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"text": "x"}, ["x", 1, 0.5, True, None, [], {}]),
        ({"text": "x", "share": 2, "days": [2], "more": {"a": 1}}, ["x", 1, 2, True, None, [2], {"a": 1}]),
        ({"text": "x", "number": None, "unit": None}, ["x", 1, 0.5, True, None, [], {}]),  # null: not given
        ({"text": "", "yes": False, "unit": "f", "number": -3}, ["", -3, 0.5, False, "f", [], {}]),
    ],
)
async def test_a_tool_gets_the_models_arguments(load: LoadFiles, arguments: dict[str, Any], result: list[Any]) -> None:
    text = await load(tools=TAKES).run_tool(PretendCall(), "take", json.dumps(arguments))
    assert json.loads(text) == result


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("", "missing: text"),
        ("{}", "missing: text"),
        ('{"text": null}', "text must be of type string"),
        ('{"text": 5}', "text must be of type string"),
        ('{"text": "x", "number": "5"}', "number must be of type integer"),
        ('{"text": "x", "number": 1.5}', "number must be of type integer"),
        ('{"text": "x", "number": true}', "number must be of type integer"),
        ('{"text": "x", "share": "0"}', "share must be of type number"),
        ('{"text": "x", "yes": 1}', "yes must be of type boolean"),
        ('{"text": "x", "unit": "k"}', "unit must be one of ['c', 'f']"),
        ('{"text": "x", "days": 1}', "days must be of type array"),
        ('{"text": "x", "days": [1, 3]}', "must be one of [1, 2]"),
        ('{"text": "x", "days": ["1"]}', "must be of type integer"),
        ('{"text": "x", "more": []}', "more must be of type object"),
        ('{"text": "x", "txet": "y"}', "no argument txet; there are: text, number"),
        ('{"text": "x", "call": {}}', "no argument call"),
    ],
)
async def test_arguments_that_do_not_fit_are_told_to_the_model_and_the_tool_is_not_run(
    load: LoadFiles, arguments: str, why: str
) -> None:
    told = await load(tools=TAKES).run_tool(PretendCall(), "take", arguments)
    assert told.startswith("Error: ") and why in told


async def test_an_unknown_tool_is_told_to_the_model(load: LoadFiles) -> None:
    assert await load(tools=TAKES).run_tool(PretendCall(), "taek", "{}") == "Error: there is no tool named taek."


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise ValueError('満席です')", "Error: ValueError: 満席です"),
        ("{}['key']", "Error: KeyError: 'key'"),
        ("raise TimeoutError('the server is slow')", "Error: TimeoutError: the server is slow"),  # its own limit
        ("raise SystemExit('no')", "SystemExit"),
        (CANCELLED, "CancelledError"),
        ("next(iter(()))", "StopIteration"),
        ("return {(1, 2): 3}", "Error: TypeError"),  # this has no JSON
        ("x = []; x.append(x); return x", "Error: ValueError"),  # nor has this
    ],
)
async def test_what_a_tool_raises_is_told_to_the_model(
    load: LoadFiles, errors: Errors, kind: str, fault: str, told: str
) -> None:
    host = load(tools=f"{kind} tool():\n    'It.'\n    {fault}\nTOOLS = [tool]")
    async with asyncio.timeout(2):
        text = await host.run_tool(PretendCall(), "tool", "{}")
    assert text.startswith("Error: ") and told in text
    assert errors() == ["tool tool failed"]


@pytest.mark.parametrize(
    "code", ["def tool():\n  'It.'\n  time.sleep(1)", "async def tool():\n  'It.'\n  await asyncio.sleep(5)"]
)
async def test_a_tool_that_takes_too_long_is_told_to_the_model(
    load: LoadFiles, errors: Errors, hooks_host: ModuleType, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    assert hooks_host.TOOL_TIMEOUT_S == 20
    monkeypatch.setattr(hooks_host, "TOOL_TIMEOUT_S", 0.1)
    host = load(tools=f"import asyncio, time\n{code}\nTOOLS = [tool]")
    began = time.monotonic()
    assert await host.run_tool(PretendCall(), "tool", "{}") == "Error: tool did not answer within 0.1 seconds."
    assert time.monotonic() - began < 0.6
    assert errors() == ["tool tool took longer than 0.1 s"]


async def test_plain_tools_run_in_threads_side_by_side_and_async_ones_on_the_loop(load: LoadFiles) -> None:
    host = load(
        tools="""
import threading, time

def slow(call):
    "Blocks."
    time.sleep(0.3)
    call.did.append(threading.get_ident())

async def on_the_loop(call):
    "Does not."
    call.notes["ran in"] = threading.get_ident()

TOOLS = [slow, on_the_loop]
"""
    )
    call: Any = PretendCall()
    began = time.monotonic()
    running = [asyncio.create_task(host.run_tool(call, "slow", "{}")) for _ in range(5)]
    assert await longest_pause_of_the_loop(lambda: all(task.done() for task in running)) < 0.25
    assert time.monotonic() - began < 1
    assert len({*call.did, threading.get_ident()}) == 6
    await host.run_tool(call, "on_the_loop", "{}")
    assert call.notes["ran in"] == threading.get_ident()


async def test_a_tool_may_be_wrapped_by_a_decorator(load: LoadFiles) -> None:
    host = load(
        tools="""
import functools

def polite(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

@polite
async def greet(call, name: str):
    "Greets."
    return f"{name}様"

TOOLS = [greet]
"""
    )
    assert host.tools[0]["parameters"]["required"] == ["name"]
    assert await host.run_tool(PretendCall(), "greet", '{"name": "田中"}') == "田中様"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("'晴れ'", "晴れ"),
        ("''", ""),
        ("{'天気': '晴れ', 'max': 9.5}", '{"天気": "晴れ", "max": 9.5}'),
        ("['雨', None, True]", '["雨", null, true]'),
        ("None", "null"),
        ("5", "5"),
        ("__import__('datetime').date(2026, 11, 23)", '"2026-11-23"'),
    ],
)
async def test_what_a_tool_returns_becomes_text_or_json_with_japanese_as_it_is(
    load: LoadFiles, result: str, text: str
) -> None:
    host = load(tools=f"def tool():\n    'It.'\n    return {result}\nTOOLS = [tool]")
    assert await host.run_tool(PretendCall(), "tool", "{}") == text


@pytest.mark.parametrize(
    "outcome", ["return 'あ' * 50_000", "return ['あ' * 50_000]", "raise ValueError('あ' * 50_000)"]
)
async def test_a_long_result_is_cut_and_so_is_a_long_fault(
    load: LoadFiles, hooks_host: ModuleType, outcome: str
) -> None:
    host = load(tools=f"def tool():\n    'It.'\n    {outcome}\nTOOLS = [tool]")
    text = await host.run_tool(PretendCall(), "tool", "{}")
    assert len(text) == hooks_host.MAX_RESULT == 16_000 and text.endswith("ああ")


async def test_a_tool_of_a_call_that_has_ended_is_cancelled(load: LoadFiles, errors: Errors) -> None:
    host = load(
        tools="""
import asyncio
async def wait(call):
    "Waits."
    try:
        await asyncio.sleep(5)
    finally:
        call.did.append("stopped")
TOOLS = [wait]
"""
    )
    running = asyncio.create_task(host.run_tool(call := PretendCall(), "wait", "{}"))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert call.did == ["stopped"] and not errors()


# ── Pages ───────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def browser(host: Any) -> AsyncIterator[Callable[..., Any]]:
    """Serves the pages of a host; get(path) returns status, content type, body and content length."""

    async def answer(connection: Any, request: Any) -> Any:
        return await host.pages[request.path.partition("?")[0]](connection, request)

    async def no_stream(connection: Any) -> None:
        raise AssertionError("only pages were asked for")

    async with serve(no_stream, "127.0.0.1", 0, process_request=answer) as server:
        port = next(iter(server.sockets)).getsockname()[1]

        async def get(path: str, method: str = "GET") -> tuple[int, str, bytes, str]:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            return int(status.split()[1]), headers["Content-Type"], body, headers["Content-Length"]

        yield get


async def test_a_page_is_a_file(load: LoadFiles, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>こんにちは", encoding="utf-8")
    (tmp_path / "data.json").write_text("{}")
    code = f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n"
    code += "PAGES = {'/': folder / 'page.html', '/data': folder / 'data.json', '/gone': folder / 'gone.html'}"
    async with browser(load(page=code)) as get:
        assert (await get("/"))[:3] == (200, "text/html; charset=utf-8", "<p>こんにちは".encode())
        assert (await get("/data"))[:3] == (200, "application/json", b"{}")
        assert (await get("/", "HEAD"))[2:] == (b"", str(len("<p>こんにちは".encode())))
        (tmp_path / "page.html").write_text("changed")
        assert (await get("/"))[2] == b"changed"  # without a new start
        assert (await get("/gone"))[0] == 500


@pytest.mark.parametrize(
    ("returns", "kind", "body"),
    [
        ("'<p>' + query['name']", "text/html; charset=utf-8", "<p>鈴木 &"),
        ("query['name'].encode()", "text/html; charset=utf-8", "鈴木 &"),
        ("query", "application/json", '{"name": "鈴木 &", "empty": ""}'),
        ("[1, None]", "application/json", "[1, null]"),
    ],
)
async def test_a_page_is_what_a_function_of_the_query_returns(
    load: LoadFiles, returns: str, kind: str, body: str
) -> None:
    host = load(page=f"def page(query): return {returns}\nPAGES = {{'/page': page}}")
    async with browser(host) as get:
        answer = await get("/page?name=%E9%88%B4%E6%9C%A8+%26&empty=")
    assert answer[:3] == (200, kind, body.encode())


@pytest.mark.parametrize("fault", ["1 / 0", "query['name']", "object()", "__import__('sys').exit()", "next(iter(()))"])
async def test_a_page_that_fails_is_answered_with_500_and_the_log_says_why(
    load: LoadFiles, errors: Errors, fault: str
) -> None:
    host = load(page=f"def page(query): return {fault}\nPAGES = {{'/page': page}}")
    async with browser(host) as get:
        status, kind, body, _ = await get("/page?secret=1")
    assert (status, kind) == (500, "text/plain") and b"log" in body and b"Error" not in body
    assert len(errors()) == 1 and "/page" in errors()[0]


@pytest.mark.parametrize("page", ["page = 'page.html'", "page = None", "async def page(query): return ''"])
def test_a_page_that_is_neither_path_nor_plain_function_is_left_out_with_an_error_line_and_the_others_work(
    load: LoadFiles, errors: Errors, page: str
) -> None:
    host = load(pages=f"{page}\ndef good(query): return 'good'\nPAGES = {{'/page': page, '/good': good}}")
    assert list(host.pages) == ["/good"]
    (line,) = errors()
    assert "hooks/pages.py: page /page is left out" in line and "pathlib.Path" in line


async def test_a_page_that_takes_too_long_is_answered_with_500_and_holds_up_nothing(
    load: LoadFiles, hooks_host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_host, "PAGE_TIMEOUT_S", 0.1)
    host = load(page="import time\ndef slow(query): time.sleep(0.5)\nPAGES = {'/slow': slow}")
    async with browser(host) as get:
        asked = asyncio.create_task(get("/slow"))
        assert await longest_pause_of_the_loop(asked.done) < 0.25
        assert asked.result()[0] == 500


async def test_a_file_may_start_a_server_in_place_of_openai(load: LoadFiles) -> None:
    host = load(a="", offline="async def serve(): return 'ws://127.0.0.1:1'\nSTAND_IN = serve", z="")
    assert await host.stand_in() == "ws://127.0.0.1:1"
    assert load("a,z").stand_in is None
