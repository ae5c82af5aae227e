"""How long the caller waits for each answer. At the end of a call the log has one line:

    greeting 273 ms, 5 turns: median 420 ms, worst 598 ms (turn 5)

A turn is measured from where the model heard the caller stop (OpenAI's speech_stopped) to the first
sound of the answer that goes to Twilio. What the caller feels is longer by the silence that OpenAI
waits for before it calls it a stop (silence_duration_ms), and by the telephone network.

No turn: a pause after which the caller went on talking, and what the caller says while the model is
being heard and goes on. A tool has its own row; if the model said nothing before it used the tool,
the turn contains it.

No settings, and nothing is stored. Other hook files and tools find the waits of a running call in
call.notes["latency"]: `.waits_ms[item]`, and as a text with a line for each row, `.table()`.
"""

import logging
import statistics
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("latency")

GREETING = "Greeting (from response.create)"


@dataclass
class Latency:
    """The waits of one call."""

    waiting_since: float | None = None  # time.monotonic(), where the present wait began
    silent: bool = True  # neither side has said anything yet
    sounding: set[str] = field(default_factory=set)  # items of the model that are being heard
    waits_ms: dict[str, float] = field(default_factory=dict)  # the model's item -> the wait for it
    turns: dict[str, float] = field(default_factory=dict)  # "Turn 1" -> ms
    rows: list[tuple[str, float]] = field(default_factory=list)  # all, in the order of the call, ms

    def table(self) -> str:
        """The rows so far, then the median and the worst of the turns; "" when there is nothing."""
        rows = list(self.rows)
        if turns := dict(self.turns):
            worst = max(turns, key=turns.__getitem__)
            rows.append(("Median of the turns", statistics.median(turns.values())))
            rows.append((f"Worst ({worst})", turns[worst]))
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}} {ms:>6,.0f} ms" for name, ms in rows)


def call_started(call: Any) -> None:
    call.notes["latency"] = Latency()


def model_asked(call: Any, at: float) -> None:
    """While nobody has spoken, this asks for the greeting. Asked again, the wait goes on."""
    latency: Latency = call.notes["latency"]
    if latency.silent and latency.waiting_since is None:
        latency.waiting_since = at


def caller_started_speaking(call: Any) -> None:
    latency: Latency = call.notes["latency"]
    latency.silent = False
    latency.waiting_since = None  # who speaks does not wait, and the next answer is to these words


def caller_stopped_speaking(call: Any, at: float) -> None:
    latency: Latency = call.notes["latency"]
    if not latency.sounding:
        latency.waiting_since = at


def model_started_speaking(call: Any, at: float, item: str) -> None:
    latency: Latency = call.notes["latency"]
    latency.sounding.add(item)
    if latency.waiting_since is not None:  # None: it goes on after a tool, or speaks unasked
        ms = latency.waits_ms[item] = (at - latency.waiting_since) * 1000
        name = GREETING
        if not latency.silent:
            name = f"Turn {len(latency.turns) + 1}"
            latency.turns[name] = ms
        latency.rows.append((name, ms))
    latency.silent = False
    latency.waiting_since = None


def model_said(call: Any, item: str) -> None:
    call.notes["latency"].sounding.discard(item)


def tool_used(call: Any, name: str, seconds: float) -> None:
    call.notes["latency"].rows.append((f"Tool {name}", seconds * 1000))


def call_ended(call: Any) -> None:
    latency: Latency = call.notes["latency"]
    parts, numbers = [], {"call": call.sid}
    for name, ms in latency.rows[:1]:
        if name == GREETING:
            parts.append(f"greeting {ms:,.0f} ms")
            numbers["greeting_ms"] = round(ms)
    if turns := latency.turns:
        worst = max(turns, key=turns.__getitem__)
        median_ms, worst_ms = statistics.median(turns.values()), turns[worst]
        parts.append(
            f"{len(turns)} turn{'s' if len(turns) > 1 else ''}: median {median_ms:,.0f} ms"
        )
        parts.append(f"worst {worst_ms:,.0f} ms ({worst.lower()})")
        numbers |= {"turns": len(turns), "median_ms": round(median_ms), "worst_ms": round(worst_ms)}
    if parts:
        log.info(", ".join(parts), extra=numbers)
