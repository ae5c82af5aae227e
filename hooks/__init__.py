"""The host of the hooks: finds the files in this folder, tells them what happens in a call, and runs their tools.

A hook file is plain Python that imports nothing from the bridge. A function named after an event (EVENTS, below) is
called at that event, with just the arguments that it names:

    def caller_said(call, text):
        print(call.sid, text)

Hooks observe, off the audio path: `emit` never waits and never raises. Each file has a thread of its own and gets its
events there one at a time and in order, so a slow file delays only itself; its `async def` functions run on the loop,
awaited from that thread. A file may also offer, by explicit lists:

    TOOLS = [function, …]               what the model may call; strangers on the telephone can make it do so
    PAGES = {"/path": file or function} for the browser of this computer only; a function gets the query as a dict
    STAND_IN = async function           starts a server to use in place of OpenAI and returns its URL (offline.py)
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import inspect
import json
import logging
import mimetypes
import queue
import re
import sys
import threading
import time
import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

log = logging.getLogger("hooks")

EVENTS: dict[str, tuple[str, ...]] = {
    "call_started": ("call", "at"),
    "model_asked": ("call", "at"),
    "caller_spoke": ("call", "at"),
    "caller_paused": ("call", "at"),
    "caller_said": ("call", "at", "text"),
    "model_spoke": ("call", "at"),
    "model_said": ("call", "at", "text", "heard_ms"),
    "model_interrupted": ("call", "at", "heard_ms", "sent_ms"),
    "model_used": ("call", "at", "usage", "model"),
    "model_failed": ("call", "at", "error"),
    "tool_used": ("call", "at", "name", "arguments", "result", "seconds"),
    "key_pressed": ("call", "at", "key"),
    "caller_audio": ("call", "at", "mulaw"),
    "model_audio": ("call", "at", "mulaw"),
    "call_ended": ("call", "at", "reason"),
}
MAX_WAITING = 1000  # events of one file
TOOL_TIMEOUT_S = 20.0
PAGE_TIMEOUT_S = 9.0  # less than websockets' limit for a request
MAX_RESULT = 16_000  # characters of a tool's result; more would only cost tokens


def load(folder: Path, names: str | None) -> Host:
    """Load every file of the folder whose name does not begin with `_`, or those named, in that order.

    Raises ValueError for a name that is not there. A file that does not import is logged and left out.
    """
    there = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    named = [name.strip() for name in (names or "").split(",") if name.strip()]
    # Unless some are named, all: log.py first, for it shapes what the others log while they load.
    chosen = sorted(there, key="log".__ne__) if names is None else named
    for name in chosen:
        if name not in there:
            raise ValueError(f"HOOKS names {name!r}, but there is no hooks/{name}.py: choose from {', '.join(there)}")
    host = Host()
    for name in dict.fromkeys(chosen):
        host.add(name, folder / f"{name}.py")
    log.info("hooks: %s; tools: %s", ", ".join(host.files) or "none", ", ".join(host.functions) or "none")
    return host


class Host:
    """The loaded files. The bridge calls `emit`, `listens`, `run_tool` and `close`, and reads `tools` and `pages`."""

    def __init__(self) -> None:
        self.files: dict[str, HookFile] = {}
        self.handled: dict[str, list[HookFile]] = {event: [] for event in EVENTS}
        self.functions: dict[str, Callable[..., Any]] = {}  # tools by name
        self.tools: list[dict[str, Any]] = []  # their schemas, as session.update wants them
        self.pages: dict[str, Callable[..., Any]] = {}  # path -> function of (connection, request)
        self.stand_in: Callable[[], Awaitable[str]] | None = None

    def add(self, name: str, path: Path) -> None:
        private_name = f"_hook_{name}"  # so that hooks/logging.py or hooks/time.py shadows nothing
        spec = importlib.util.spec_from_file_location(private_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[private_name] = module
        try:
            spec.loader.exec_module(module)
            tools = list(getattr(module, "TOOLS", []))
            pages = dict(getattr(module, "PAGES", {}))
        except (Exception, SystemExit):
            log.exception("hooks/%s.py does not import and is left out", name)
            return
        file = self.files[name] = HookFile(name)
        not_events = {id(thing) for thing in (getattr(module, "STAND_IN", None), *tools, *pages.values())}
        for event, function in vars(module).copy().items():
            if inspect.isfunction(function) and function.__module__ == private_name and id(function) not in not_events:
                file.listen(event, function)
        for event in file.handlers:
            self.handled[event].append(file)
        for function in tools:
            try:
                schema = tool_schema(function)
                if schema["name"] in self.functions:
                    raise TypeError("there is another tool of this name")
            except Exception as fault:
                log.error("hooks/%s.py: tool %s is left out: %s", name, getattr(function, "__name__", function), fault)
            else:
                self.tools.append(schema)
                self.functions[schema["name"]] = function
        for route, page in pages.items():
            if isinstance(page, Path) or (callable(page) and not inspect.iscoroutinefunction(page)):
                self.pages[route] = serve_page(page)
            else:
                log.error("hooks/%s.py: page %s is left out: give a pathlib.Path or a plain function", name, route)
        self.stand_in = getattr(module, "STAND_IN", None) or self.stand_in

    def listens(self, event: str) -> bool:
        return bool(self.handled[event])

    @property
    def dropped(self) -> int:
        """Events that files were too slow for, since the start."""
        return sum(file.dropped_in_all for file in self.files.values())

    def emit(self, event: str, call: Any, at: float, facts: Mapping[str, Any]) -> None:
        """Tell each file that handles this event; from the loop's thread. `at` is time.monotonic() of the event."""
        for file in self.handled[event]:
            file.tell(event, {"call": call, "at": at, **facts})

    async def run_tool(self, call: Any, name: str, arguments: str) -> str:
        """What the tool returns, as text; a failure is told in words, so that the model can tell the caller."""
        function = self.functions.get(name)
        if function is None:
            return f"Error: there is no tool named {name}."
        limit = asyncio.timeout(TOOL_TIMEOUT_S)
        try:
            async with limit:
                given = check_arguments(function, json.loads(arguments or "{}"))
                if "call" in inspect.signature(function).parameters:
                    given["call"] = call
                if inspect.iscoroutinefunction(function):
                    result = function(**given)
                else:
                    result = await in_thread(lambda: function(**given))
                if inspect.iscoroutine(result):
                    result = await result
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, SystemExit, asyncio.CancelledError) as fault:
            task = asyncio.current_task()
            if isinstance(fault, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the call has ended; otherwise something that the tool waited for was cancelled
            if limit.expired():
                log.error("tool %s took longer than %g s", name, TOOL_TIMEOUT_S)
                text = f"Error: {name} did not answer within {TOOL_TIMEOUT_S:g} seconds."
            else:
                log.exception("tool %s failed", name)
                text = f"Error: {type(fault).__name__}: {fault}"
        return text[:MAX_RESULT]

    def close(self, timeout_s: float) -> None:
        """Wait until every file has dealt with its events, but not longer than this."""
        deadline = time.monotonic() + timeout_s
        for file in self.files.values():
            file.waiting.put(None)
        for file in self.files.values():
            if file.thread is not None:
                file.thread.join(max(0.0, deadline - time.monotonic()))
                if file.thread.is_alive():
                    log.error("hooks/%s.py has not come to its end in %g s and is left", file.name, timeout_s)
            file.count_dropped()


class HookFile:
    """One file: its handlers, the events that wait for it, and the thread that works them off."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handlers: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}  # event -> function, its arguments
        self.waiting: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self.dropped = 0  # since the last that was taken
        self.dropped_in_all = 0
        self.thread: threading.Thread | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def listen(self, event: str, function: Callable[..., Any]) -> None:
        """Take a function as handler of the event it is named after; say so if it looks like a misspelt one."""
        if event not in EVENTS:
            if not event.startswith("_") and (nearest := difflib.get_close_matches(event, EVENTS, 1, 0.75)):
                log.error("hooks/%s.py: %s is not an event: did you mean %s?", self.name, event, nearest[0])
            return
        wanted: list[str] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                wanted = list(EVENTS[event])
            elif parameter.name in EVENTS[event]:
                wanted.append(parameter.name)
            elif parameter.default is parameter.empty:
                nearest = difflib.get_close_matches(parameter.name, EVENTS[event], 1, 0) or list(EVENTS[event])
                text = "hooks/%s.py: %s has no argument %s: did you mean %s? It has %s. It is not called"
                log.error(text, self.name, event, parameter.name, nearest[0], ", ".join(EVENTS[event]))
                return
        self.handlers[event] = (function, tuple(wanted))

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        if self.thread is None:
            self.loop = asyncio.get_running_loop()
            self.thread = threading.Thread(target=self.work, name=f"hooks/{self.name}", daemon=True)
            self.thread.start()
        if self.waiting.qsize() >= MAX_WAITING:
            self.dropped += 1
            self.dropped_in_all += 1
            if self.dropped == 1:
                log.error("hooks/%s.py is too slow: %d events wait, new ones are dropped", self.name, MAX_WAITING)
            return
        self.count_dropped()
        self.waiting.put((event, facts))

    def count_dropped(self) -> None:
        if self.dropped:
            log.error("hooks/%s.py: %d events were dropped", self.name, self.dropped)
            self.dropped = 0

    def work(self) -> None:
        while (told := self.waiting.get()) is not None:
            event, facts = told
            function, wanted = self.handlers[event]
            try:
                result = function(**{name: facts[name] for name in wanted})
                if inspect.iscoroutine(result):
                    assert self.loop is not None
                    asyncio.run_coroutine_threadsafe(without_exit(result), self.loop).result()
            except BaseException:  # whatever it is, the next event must find this thread alive
                log.exception("hooks/%s.py: %s failed; the call goes on", self.name, event)


# ── Tools: a function's name, docstring, hints and defaults are its schema ───────────────────────────────────────

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
PYTHON_TYPES: dict[str, Any] = {name: kind for kind, name in JSON_TYPES.items()} | {"number": (int, float)}


def json_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint: str int float bool dict list[…] Literal[…] X | None, Annotated with a text."""
    if hint is inspect.Parameter.empty:
        return {"type": "string"}
    if typing.get_origin(hint) is typing.Annotated:
        inner, *texts = typing.get_args(hint)
        return json_schema(inner) | {"description": " ".join(text for text in texts if isinstance(text, str))}
    if typing.get_origin(hint) is Literal:
        values = list(typing.get_args(hint))
        return {"type": JSON_TYPES[type(values[0])], "enum": values}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(inner) == 1:
            return json_schema(inner[0])
    origin = typing.get_origin(hint) or hint
    if origin not in JSON_TYPES:
        raise TypeError(f"the type {hint} has no JSON schema here; use str, int, float, bool, list, dict or Literal")
    schema: dict[str, Any] = {"type": JSON_TYPES[origin]}
    if origin is list:
        schema["items"] = json_schema(*typing.get_args(hint)[:1] or [str])
    return schema


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as session.update's `tools` wants it. Raises TypeError for what cannot be described."""
    if not (text := inspect.getdoc(function)):
        raise TypeError("it has no docstring: the model knows from it what the tool is for")
    if not re.fullmatch(r"\w{1,64}", function.__name__, re.ASCII):
        raise TypeError("OpenAI takes no such name: up to 64 letters without accents, digits and _")
    hints = typing.get_type_hints(function, include_extras=True)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "call":
            continue  # the call itself, which the model neither sees nor gives
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"parameter {parameter} cannot be given by name")
        properties[parameter.name] = json_schema(hints.get(parameter.name, parameter.empty))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "name": function.__name__, "description": text, "parameters": parameters}


def check_arguments(function: Callable[..., Any], given: Any) -> dict[str, Any]:
    """The model's arguments, if they fit. Raises TypeError, in words that help the model to try again."""
    schema = tool_schema(function)["parameters"]
    if not isinstance(given, dict):
        raise TypeError("the arguments must be a JSON object")
    if missing := [name for name in schema["required"] if name not in given]:
        raise TypeError(f"missing: {', '.join(missing)}")
    for name, value in given.items():
        if name not in schema["properties"]:
            raise TypeError(f"there is no argument {name}; there are: {', '.join(schema['properties']) or 'none'}")
        if value is not None or name in schema["required"]:
            check_value(name, value, schema["properties"][name])
    return {name: value for name, value in given.items() if value is not None}  # for null the default stands


def check_value(name: str, value: Any, schema: dict[str, Any]) -> None:
    kind = schema["type"]
    if not isinstance(value, PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise TypeError(f"{name} must be of type {kind}")
    if value not in schema.get("enum", [value]):
        raise TypeError(f"{name} must be one of {schema['enum']}")
    for item in value if kind == "array" else []:
        check_value(f"each of {name}", item, schema["items"])


async def without_exit(work: Awaitable[Any]) -> None:
    """Await it. What calls sys.exit() has failed like anything that raises: it must not end the loop and all calls."""
    try:
        await work
    except SystemExit as fault:
        raise RuntimeError(repr(fault)) from fault


async def in_thread(work: Callable[[], Any]) -> Any:
    """Run something that may block in a thread of its own; one that never comes back does not hold up the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(act: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            act(value)

    def run() -> None:
        try:
            done = (future.set_result, work())
        except (StopIteration, SystemExit) as fault:  # a future cannot carry the one, the other would end the loop
            done = (future.set_exception, RuntimeError(repr(fault)))
        except BaseException as fault:
            done = (future.set_exception, fault)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *done)

    threading.Thread(target=run, daemon=True).start()
    return await future


# ── Pages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def serve_page(page: Path | Callable[[dict[str, str]], Any]) -> Callable[..., Awaitable[Any]]:
    """A page for process_request: a file, or what a function of the query returns (text is HTML, other things JSON)."""

    async def answer(connection: Any, request: Any) -> Any:
        status, content_type, body = 200, "text/html; charset=utf-8", b""
        try:
            if isinstance(page, Path):
                body = await in_thread(page.read_bytes)
                content_type = mimetypes.guess_type(page.name)[0] or "application/octet-stream"
                content_type += "; charset=utf-8" if content_type.startswith("text/") else ""
            else:
                query = dict(parse_qsl(request.path.partition("?")[2], keep_blank_values=True))
                async with asyncio.timeout(PAGE_TIMEOUT_S):
                    made = await in_thread(lambda: page(query))
                if not isinstance(made, (str, bytes)):
                    made, content_type = json.dumps(made, ensure_ascii=False), "application/json"
                body = made.encode() if isinstance(made, str) else made
        except Exception:
            log.exception("the page %s failed", request.path)
            status, content_type, body = 500, "text/plain", b"this page failed; the log says why\n"
        response = connection.respond(status, "")
        for name, value in (("Content-Type", content_type), ("Content-Length", str(len(body)))):
            del response.headers[name]
            response.headers[name] = value
        response.headers["Cache-Control"] = "no-store"
        response.body = b"" if request.method == "HEAD" else body
        return response

    return answer
