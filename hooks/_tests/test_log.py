"""hooks/log.py: the form of the log, for people and for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from conftest import Event, LoadHook, PretendCall, refused

Logged = Callable[..., Any]


@pytest.fixture
def logged(hook: LoadHook, monkeypatch: pytest.MonkeyPatch) -> Logged:
    """What stands on standard error after some events of a call, and what else is done."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.handle = lambda record: lines.append(handler.format(record))  # type: ignore

    async def log(*events: Any, call: PretendCall | None = None, **settings: str) -> list[str]:
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # log.py may replace it
        loaded = hook("log", **settings)
        lines.clear()  # the host has logged what is loaded
        loaded.tell(call or PretendCall(), *[event for event in events if not callable(event)])
        await loaded.finish()
        for act in filter(callable, events):
            act()
        return lines

    return log


async def as_json(logged: Logged, *events: Any, **settings: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in await logged(*events, LOG_FORMAT="json", **settings)]


def failure() -> None:
    try:
        raise ValueError("壊れた")
    except ValueError:
        logging.getLogger("bridge").exception(
            "%s failed", "it", extra={"call": "CA1", "seconds": 0.5}
        )


STARTED, LONG_AGO = "call_started", time.monotonic() - 60
SAID: Event = ("model_said", {"item": "m", "text": "12345678", "heard_ms": None})
CUT: list[Event] = [
    ("model_interrupted", {"item": "m", "heard_ms": 1500, "sent_ms": 6000}),
    ("model_said", {"item": "m", "text": "一二三四五六七八", "heard_ms": 1500}),
]


async def test_json_events(logged: Logged) -> None:
    """All events but the pieces of what the model says, with their call and all that they tell."""
    facts = {"name": "clock", "arguments": "{}", "result": "一行目\n二行目 \ud83d", "seconds": 0.5}
    used = ("tool_used", facts | {"seconds": 0.500049})
    words = ("model_words", {"item": "m", "text": "は"})
    ended = ("call_ended", LONG_AGO + 42, {"reason": "caller hung up"})
    lines = await as_json(logged, (STARTED, LONG_AGO, {}), words, used, *CUT, ended)
    assert [line["event"] for line in lines] == [
        "call_started", "tool_used", "model_interrupted", "model_said", "call_ended"
    ]  # fmt: skip
    assert {line["call"] for line in lines} == {"CA1"}
    assert facts | {"result": "一行目\n二行目 ?"} == {name: lines[1][name] for name in facts}
    assert (lines[3]["heard_ms"], lines[3]["sent_ms"], lines[4]["seconds"]) == (1500, 6000, 42.0)


async def test_time_of_an_event(logged: Logged) -> None:
    """It is the event's own, in UTC, not that of its logging."""
    (line,) = await as_json(logged, (STARTED, LONG_AGO, {}))
    assert line["ts"].endswith("Z") and len(line["ts"]) == len("2026-11-23T07:46:05.120Z")
    happened = time.time() - (time.monotonic() - LONG_AGO)
    assert abs(happened - datetime.fromisoformat(line["ts"]).timestamp()) < 1


async def test_json_lines_of_others(logged: Logged) -> None:
    """Their call and their numbers stay fields; a traceback is one string; print is a line."""
    line, printed = await as_json(logged, failure, lambda: print("order", 12))
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "bridge", "it failed")
    assert (line["call"], line["seconds"]) == ("CA1", 0.5)
    assert line["traceback"].startswith("Traceback") and line["traceback"].endswith("壊れた")
    assert (printed["logger"], printed["message"]) == ("print", "order 12")


async def test_text(logged: Logged) -> None:
    """One line for each utterance, what was not heard behind ✂, and nothing that is only timing."""
    call = PretendCall("CA" + "0" * 26 + "a1b2c3")
    events: list[Event] = [
        (STARTED, LONG_AGO, {}),
        ("caller_started_speaking", {"item": "c"}),
        ("caller_said", {"item": "c", "text": "天気は\n？"}),
        ("caller_said", {"item": "d", "text": ""}),
        ("tool_used", {"name": "clock", "arguments": "{}", "result": "9" * 200, "seconds": 0.51}),
        ("key_pressed", {"key": "5"}),
        *CUT,
        ("model_failed", {"error": "404"}),  # the bridge logs it as a warning
        ("model_used", {"usage": {}, "model": "", "kind": "response"}),
        ("call_ended", LONG_AGO + 62, {"reason": "caller hung up"}),
    ]
    lines = await logged(*events, call=call, LOG_FORMAT="text")
    assert all(line[8:16] == " a1b2c3 " for line in lines)
    assert lines[0][:8] == time.strftime(
        "%H:%M:%S", time.localtime(time.time() - time.monotonic() + LONG_AGO)
    )
    assert [line[16:] for line in lines] == [
        "call       +********5678 → +*******0000",
        "caller ▸   天気は ？",
        "caller ▸   (no words)",
        f"tool       clock({{}}) → {'9' * 148}…  (0.51 s)",
        "key        5",
        "model ◂    一二 ✂ 三四五六七八  (heard 1.5 of 6.0 s)",
        "call       ended: caller hung up  (1:02)",
    ]


async def test_cut_without_a_place(logged: Logged) -> None:
    """Words that nobody heard are struck whole; where the call's end cut some, nobody knows."""
    unheard: Event = ("model_said", {"item": "n", "text": "五六", "heard_ms": 0})
    ended: Event = ("model_said", {"item": "o", "text": "七八", "heard_ms": 900})
    lines = await logged(STARTED, unheard, ended, LOG_FORMAT="text")
    assert [line[27:] for line in lines[1:]] == ["✂ 五六  (not heard)", "七八  (heard 0.9 s)"]


@pytest.mark.parametrize("form", ["json", "text"])
async def test_model_words(hook: LoadHook, form: str) -> None:
    """Each piece of the model's words would wake the file for nothing."""
    handling = hook("log", LOG_FORMAT=form).host.handling
    told = {event for event, handlers in handling.items() if handlers}
    silent = {"model_words", "caller_audio", "model_audio", "any_event"}
    assert not told & silent and (form == "text" or told | silent == set(handling))


async def test_wait_beside_the_words(logged: Logged) -> None:
    """With latency.py, an answer has the wait for it."""
    call = PretendCall()
    call.notes["latency"] = type("Latency", (), {"waits_ms": {"m": 271.4}})
    lines = await logged(STARTED, SAID, call=call, LOG_FORMAT="text")
    assert lines[-1].endswith("12345678  (after 0.27 s)")


async def test_text_lines_of_others(logged: Logged) -> None:
    """A level from WARNING on, a real traceback, and no line that pretends to be another."""

    def forged() -> None:
        logging.getLogger("bridge").info("x\n12:00:00 \x1b[31mred\u202e")

    lines = await logged(failure, forged, LOG_FORMAT="text")
    first, *traceback = lines[0].splitlines()
    assert first[9:] == "CA1    bridge     ERROR it failed" and len(traceback) == 4
    assert traceback[-1].strip() == "ValueError: 壊れた"
    assert lines[1].splitlines()[1] == " " * 27 + "12:00:00 �[31mred�"


@pytest.mark.parametrize("terminal", [True, False])
async def test_format_and_colour(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """A terminal gets coloured text, everything else JSON."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    (line,) = await logged(STARTED)
    assert ("\x1b[1mcall" in line) == terminal == (line[0] != "{")


NUMBERS = [
    ("番号は090-1234-5678か03-1234-0000です", "番号は***-****-5678か**-****-0000です"),
    ("+81 90 1234 5678", "+** ** **** 5678"),
    ("gpt-realtime 2026-11-23 0.0123456789 item_0123456789", None),
    ("sk-very-secret and 0123456789abcdef or fedcba9876543210", "*** and *** or ***"),
    (f"token 1790000000.{'b2' * 8}.{'a1' * 32}", "token 1790000000***"),
    ('secret "quoted\\', "secret ***"),
    ("sk-very-secret-too", "***"),
    (f"n+81312345678 and n.{'b2' * 8}.{'a1' * 32}", None),
]


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(("text", "shown"), NUMBERS)
async def test_masking(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, form: str, text: str, shown: str | None
) -> None:
    """Of telephone numbers the last four digits are shown, of secrets nothing."""
    monkeypatch.setenv("SOME_PASSWORD", '"quoted\\')
    secrets = {
        "OPENAI_API_KEY": "sk-very-secret",
        "OTHER_KEY": "sk-very-secret-too",
        "TWILIO_AUTH_TOKEN": "0123456789abcdef,fedcba9876543210",
    }
    said = ("caller_said", {"item": "c", "text": text})
    lines = await logged(
        STARTED, said, lambda: logging.getLogger("x").error(text), LOG_FORMAT=form, **secrets
    )
    shown = json.dumps(shown or text, ensure_ascii=False) if form == "json" else shown or text
    assert len(lines) == 3 and all(shown in line for line in lines[1:])


async def test_masking_of_callers(logged: Logged) -> None:
    """A SIP caller's number is masked, an anonymous caller is not, LOG_NUMBERS=full shows all."""
    call = PretendCall(caller="sip:81312345678@example.com", called="anonymous")
    (line,) = await as_json(logged, STARTED, call=call)
    assert (line["caller"], line["called"]) == ("sip:*******5678@example.com", "anonymous")


async def test_numbers_in_full(logged: Logged) -> None:
    (line,) = await as_json(logged, STARTED, LOG_NUMBERS="full")
    assert line["caller"] == "+819012345678"


@pytest.mark.parametrize("setting", [{"LOG_FORMAT": "xml"}, {"LOG_NUMBERS": "yes"}])
def test_wrong_setting(hook: LoadHook, setting: dict[str, str]) -> None:
    refused(hook, "log", **setting)
