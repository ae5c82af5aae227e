"""What the tests of several hook files need: the host, a pretend call, a loaded hook file."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HOOKS = Path(__file__).parents[1]
sys.path.insert(0, str(HOOKS.parent))
from bridge import Hooks  # noqa: E402

# Of all hook files: taken out of the environment, so that a test has just those that it names.
SETTINGS = """LOG_FORMAT LOG_NUMBERS NO_COLOR IDLE_SECONDS KEYS_PAUSE_SECONDS TRANSFER_NUMBERS
    TRANSCRIPTS TRANSCRIPT_FORMAT RECORDINGS REPORTS REPORT_LANGUAGE BUDGET_PER_CALL_USD
    BUDGET_PER_DAY_USD WEATHER_URL TWILIO_AUTH_TOKEN OPENAI_API_KEY OPENAI_REALTIME_URL
    OPENAI_REALTIME_MODEL"""

TimedEvent = tuple[str, float, dict[str, Any]]
Event = str | tuple[str, dict[str, Any]] | TimedEvent


class PretendCall:
    """What a hook sees of a call. `did` is what the call was asked to do, such as "hang_up"."""

    def __init__(
        self, sid: str = "CA1", caller: str = "+819012345678", called: str = "+81312340000"
    ) -> None:
        self.sid, self.stream_sid, self.caller, self.called = sid, "MZ" + sid[2:], caller, called
        self.notes: dict[str, Any] = {}
        self.did: list[str] = []
        self.played = b""
        self.busy = False  # the model is being heard, or about to speak, or a tool runs

    def tell_model(self, text: str) -> None:
        self.did.append(text)

    def hang_up(self, final: bool = False) -> None:
        self.did.append("hang_up final" if final else "hang_up")

    def transfer(self, number: str) -> None:
        self.did.append(f"transfer {number}")

    def interrupt(self) -> None:
        self.did.append("interrupt")

    def play(self, mulaw: bytes) -> None:
        self.did.append(f"play {len(mulaw)}")
        self.played += mulaw


class Loaded:
    """One hook file, as the host has loaded it."""

    def __init__(self, host: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
        self.host, self.name, self.caplog = host, name, caplog
        self.module: Any = sys.modules[f"_hook_{name}"]

    def tell(self, call: PretendCall, *events: Event) -> None:
        """Events as (name, at, facts). Without `at` it is now; a name alone has no facts."""
        for event in events:
            name, *rest = (event,) if isinstance(event, str) else event
            facts = rest.pop() if rest else {}
            self.host.emit(name, call, rest[0] if rest else time.monotonic(), facts)

    async def finish(self) -> None:
        """Wait until the file has dealt with what it was told. Afterwards it is told nothing."""
        await asyncio.to_thread(self.host.close, 5)

    async def tell_all(self, call: PretendCall, *events: Event) -> None:
        self.tell(call, *events)
        await self.finish()

    @property
    def records(self) -> list[Any]:
        """What the file itself has logged. It has raised nothing."""
        assert not [record.getMessage() for record in self.caplog.records if record.exc_info]
        return [record for record in self.caplog.records if record.name == self.name]

    @property
    def log(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    @property
    def errors(self) -> list[str]:
        """The error lines of all, the host included."""
        return log_lines(self.caplog, logging.ERROR)

    @property
    def warnings(self) -> list[str]:
        """The lines of all that are warnings or worse."""
        return log_lines(self.caplog, logging.WARNING)


class Watched:
    """A hook file that looks at a call every now and then: here by a clock that the test turns."""

    def __init__(self, module: Any, states: dict[Any, Any], step_s: float) -> None:
        self.module, self.states, self.step_s, self.now = module, states, step_s, 0.0
        self.look, module.look = module.look, lambda *_: None  # the file's own thread does nothing

    def tell(self, call: PretendCall, *events: Event) -> None:
        for event in events:
            name, facts = (event, {}) if isinstance(event, str) else (event[0], event[-1])
            handler, known = getattr(self.module, name), {"call": call, "at": self.now, **facts}
            handler(**{it: known[it] for it in inspect.signature(handler).parameters})

    def wait(self, call: PretendCall, seconds: float) -> list[str]:
        """What the call is asked to do within this time."""
        before = len(call.did)
        for _ in range(round(seconds / self.step_s)):
            self.now += self.step_s
            self.look(call, self.states[call], self.now)
        return call.did[before:]


def log_lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


LoadHook = Callable[..., Loaded]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[LoadHook]:
    """hook("cost", SETTING="…") loads hooks/cost.py with these settings and no others."""
    caplog.set_level(logging.INFO)
    for setting in SETTINGS.split():
        monkeypatch.delenv(setting, raising=False)
    hosts: list[Any] = []

    def load(name: str, **settings: Any) -> Loaded:
        for setting, value in settings.items():
            monkeypatch.setenv(setting, str(value))
        hosts.append(Hooks(HOOKS, name))
        return Loaded(hosts[-1], name, caplog)

    yield load
    for host in hosts:
        host.close(1)


def refused(hook: LoadHook, name: str, **settings: Any) -> str:
    """The line with which a wrong setting of a hook file stops the start."""
    with pytest.raises(SystemExit) as stopped:
        hook(name, **settings)
    line = str(stopped.value)
    assert "\n" not in line and any(f"{setting} is " in line for setting in settings)
    assert ": give " in line
    return line


def conversation(*steps: str) -> list[TimedEvent]:
    """Events from lines such as "1.5 caller_said item=a text=はい", between a start and an end."""
    events: list[TimedEvent] = [("call_started", 0.0, {})]
    at = 0.0
    for step in steps:
        seconds, event, *pairs = step.split(" ")
        at = float(seconds)
        facts: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
        for name, value in facts.items():
            if value == "None":
                facts[name] = None
            elif name.endswith(("_ms", "seconds")):
                facts[name] = float(value) if "." in value else int(value)
        events.append((event, at, facts))
    return [*events, ("call_ended", at + 1, {"reason": "caller hung up"})]


async def until(true: Callable[[], Any], within_s: float = 2.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.005)


async def longest_pause_of_the_loop(done: Callable[[], Any], within_s: float = 5.0) -> float:
    """How long the loop was held up at most, in seconds, while something came to pass elsewhere."""
    longest, deadline = 0.0, time.monotonic() + within_s
    while not done():
        began = time.monotonic()
        assert began < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.002)
        longest = max(longest, time.monotonic() - began - 0.002)
    return longest
