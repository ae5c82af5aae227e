"""hooks/log.py: what is in the log of a call, what is not, and that nobody waits for it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import ModuleType
from typing import Any

import pytest
from conftest import HOOKS, Event, Loaded, LoadHook, PretendCall

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def logging_is_given_back() -> Iterator[None]:
    yield
    close_log()


def close_log() -> None:
    """Let log.py write what it has, and take it out of logging again."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__name__ == "Lines"]:
        handler.close()
        root.removeHandler(handler)


async def lines_of(
    log: Loaded, capfd: Capture, *events: Event, call: PretendCall | None = None
) -> list[dict[str, Any]]:
    """The JSON lines that come of these events and of the log lines before."""
    await log.tell_all(call or PretendCall(), *events)
    close_log()
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


async def test_a_call_can_be_read_from_the_log_afterwards(hook: LoadHook, capfd: Capture) -> None:
    said: Event = ("model_said", {"text": "はい、鈴木です。", "heard_ms": None})
    lines = await lines_of(hook("log"), capfd, "call_started", said, ("call_ended", {"reason": "caller hung up"}))
    lines = [line for line in lines if "event" in line]
    assert [line["event"] for line in lines] == ["call_started", "model_said", "call_ended"]
    assert {line["call"] for line in lines} == {"CA1"}
    assert lines[1]["text"] == "はい、鈴木です。" and lines[1]["heard_ms"] is None
    assert lines[2]["reason"] == "caller hung up"


async def test_every_event_but_the_audio_is_in_the_log(hook: LoadHook, hooks_host: ModuleType, capfd: Capture) -> None:
    silent = {"caller_audio", "model_audio"}
    log = hook("log")
    facts = {name: dict.fromkeys(wanted[2:], "x") for name, wanted in hooks_host.EVENTS.items()}
    lines = await lines_of(log, capfd, *facts.items())
    assert [line["event"] for line in lines if "event" in line] == [name for name in facts if name not in silent]
    for line in lines:
        assert "event" not in line or line["event"] == "call_started" or facts[line["event"]].items() <= line.items()
    assert not log.host.listens("caller_audio") and not log.host.listens("model_audio")


async def test_the_log_shows_japanese_as_it_is_and_each_event_on_one_line(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log")
    await log.tell_all(PretendCall(), ("caller_said", {"text": "一行目\n二行目 \ud83d"}))
    close_log()
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if "caller_said" in line and r"一行目\n二行目 ?" in line]


async def test_the_time_in_the_log_is_that_of_the_event_in_utc(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log")
    line = (await lines_of(log, capfd, ("caller_spoke", time.monotonic() - 60, {})))[-1]
    assert line["ts"].endswith("Z") and len(line["ts"]) == len("2026-11-23T07:46:05.120Z")
    assert abs(time.time() - 60 - datetime.fromisoformat(line["ts"]).timestamp()) < 2


async def test_the_log_shows_the_last_four_digits_of_telephone_numbers(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log")
    logging.getLogger("bridge").error("call from +819012345678")
    words: Event = ("caller_said", {"text": "番号は090-1234-5678か03-1234-0000です"})
    started, said = (line for line in await lines_of(log, capfd, "call_started", words) if "event" in line)
    assert (started["caller"], started["called"]) == ("+********5678", "+*******0000")
    assert said["text"] == "番号は***-****-5678か**-****-0000です"


async def test_a_sip_callers_number_is_masked_and_an_anonymous_caller_is_not(hook: LoadHook, capfd: Capture) -> None:
    call = PretendCall(caller="sip:81312345678@example.com", called="anonymous")
    line = (await lines_of(hook("log"), capfd, "call_started", call=call))[-1]
    assert (line["caller"], line["called"]) == ("sip:*******5678@example.com", "anonymous")


async def test_the_log_leaves_numbers_alone_that_are_no_telephone_numbers(hook: LoadHook, capfd: Capture) -> None:
    facts = {"usage": {"total_tokens": 1234567}, "model": "gpt-realtime-2.1 2026-11-23 0.0123456789 item_0123456789"}
    line = (await lines_of(hook("log"), capfd, ("model_used", facts)))[-1]
    assert facts.items() <= line.items()


async def test_the_log_shows_numbers_in_full_if_asked_to(hook: LoadHook, capfd: Capture) -> None:
    lines = await lines_of(hook("log", LOG_NUMBERS="full"), capfd, "call_started")
    assert lines[-1]["caller"] == "+819012345678"


async def test_a_wrong_log_numbers_is_one_error_line_and_masks(hook: LoadHook, capfd: Capture) -> None:
    lines = await lines_of(hook("log", LOG_NUMBERS="yes"), capfd, "call_started")
    assert ["LOG_NUMBERS" in line["message"] for line in lines if line.get("level") == "ERROR"] == [True]
    assert lines[-1]["caller"] == "+********5678"


async def test_no_secret_is_ever_in_the_log(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log", OPENAI_API_KEY="sk-very-secret", TWILIO_AUTH_TOKEN="0123456789abcdef")
    token = f"1790000000.{'a1' * 32}"
    logging.getLogger("websockets").error("> Authorization: Bearer sk-very-secret, token %s", token)
    lines = await lines_of(log, capfd, ("model_failed", {"error": "key sk-very-secret, 0123456789abcdef"}))
    text = json.dumps(lines)
    assert "sk-very" not in text and "0123456789abcdef" not in text and "a1a1" not in text
    assert lines[-1]["error"] == "key ***, ***"


async def test_log_lines_become_json_with_the_traceback_as_one_string(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log")
    try:
        raise ValueError("壊れた")
    except ValueError:
        logging.getLogger("bridge").exception("%s failed", "it")
    line = (await lines_of(log, capfd))[-1]
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "bridge", "it failed")
    assert line["traceback"].startswith("Traceback") and line["traceback"].endswith("ValueError: 壊れた")


async def test_a_log_line_that_cannot_be_made_harms_nobody(hook: LoadHook, capfd: Capture) -> None:
    log = hook("log")
    logging.getLogger("bridge").error("%d", "no number")
    logging.getLogger("bridge").error("after")
    assert [line["message"] for line in await lines_of(log, capfd)][-1] == "after"


FULL_PIPE = """
import asyncio, importlib.util, logging, os, sys, time, types
from pathlib import Path
spec = importlib.util.spec_from_file_location("hooks_host", Path(sys.argv[1]) / "__init__.py")
hooks_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks_host)
logging.basicConfig(level=logging.INFO)
host = hooks_host.load(Path(sys.argv[1]), "log")
call = types.SimpleNamespace(sid="CA1", stream_sid="MZ1", caller="", called="")

async def main():
    longest = 0.0
    for number in range(3000):
        began = time.monotonic()
        logging.getLogger("bridge").info("%d %s", number, "x" * 200)
        if number % 100 == 0:
            host.emit("caller_said", call, began, {"text": "もしもし"})
        longest = max(longest, time.monotonic() - began)
        await asyncio.sleep(0)
    print(f"{longest:.3f}", file=sys.stderr, flush=True)
    if sys.argv[2] == "read":
        sys.stdin.readline()  # the test reads now
        while logging.getLogger().handlers[0].waiting.qsize():
            time.sleep(0.01)
        logging.getLogger("bridge").info("last words")
        await asyncio.to_thread(host.close, 5)

asyncio.run(main())
"""


@contextmanager
def full_pipe(then: str) -> Iterator[subprocess.Popen[bytes]]:
    program = [sys.executable, "-c", FULL_PIPE, str(HOOKS), then]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        limit = threading.Timer(10, process.kill)
        limit.start()
        yield process
        limit.cancel()


def slowest(process: subprocess.Popen[bytes]) -> float:
    """What the program says on stderr when it has logged everything: its longest step, in seconds."""
    assert process.stderr is not None
    for line in iter(process.stderr.readline, b""):
        if line[:1].isdigit():
            return float(line)
    raise AssertionError("the program said nothing")


def test_a_reader_who_stops_reading_the_log_blocks_no_call_and_the_dropped_lines_are_counted() -> None:
    with full_pipe("read") as process:
        longest = slowest(process)
        lines = [json.loads(line) for line in process.communicate(b"\n", timeout=5)[0].splitlines()]
    assert longest < 0.25
    messages = [line.get("message", "") for line in lines]
    dropped = sum(int(message.split()[0]) for message in messages if "were dropped: standard output" in message)
    assert dropped > 500 and dropped + sum(message.endswith("xxx") for message in messages) == 3000
    assert "last words" in messages
    assert sum("event" in line for line in lines) == 30  # events wait, in a thread of their own, and none is lost


def test_the_program_ends_though_nobody_reads_the_log() -> None:
    with full_pipe("leave") as process:
        slowest(process)
        assert process.wait(timeout=5) == 0
