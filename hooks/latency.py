"""How long the caller waits for each answer. At the end of a call the log has this table, a line for each row:

    Greeting (from response.create)    273 ms
    Turn 1                             359 ms
    Tool get_weather                   950 ms
    Turn 2                           1,389 ms
    Median of the turns                874 ms
    Worst (Turn 2)                   1,389 ms

A turn is measured from where the model heard the caller stop (OpenAI's speech_stopped) to the first sound of the answer
that goes to Twilio. What the caller feels is longer by the silence that OpenAI waits for before it calls it a stop
(silence_duration_ms), and by the telephone network. A tool's time has its own row; if the model said nothing before it
used the tool, the turn contains it. A pause after which the caller went on talking has no answer, so it has no row.

The table of a running call is had as text from `table(call)`, in a tool or hook file of your own:

    from hooks.latency import table

No settings. Nothing is stored: the times are in call.notes["latency"] and go with the call.
"""

import logging
import statistics
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("latency")

GREETING = "Greeting (from response.create)"


@dataclass
class Timing:
    """The times of one call, in seconds of time.monotonic()."""

    waiting_since: float | None = None  # where the wait began that is still going on
    silent: bool = True  # neither side has said anything yet
    turns: dict[str, float] = field(default_factory=dict)  # "Turn 1" -> ms
    rows: list[tuple[str, float]] = field(default_factory=list)  # every row in the order of the call, in ms


def call_started(call: Any) -> None:
    call.notes["latency"] = Timing()


def model_asked(call: Any, at: float) -> None:
    """While nobody has spoken, this asks for the greeting; asked again after a failure, the wait goes on."""
    timing: Timing = call.notes["latency"]
    if timing.silent and timing.waiting_since is None:
        timing.waiting_since = at


def caller_spoke(call: Any) -> None:
    timing: Timing = call.notes["latency"]
    timing.silent = False
    timing.waiting_since = None  # a caller who speaks is not waiting, and the answer to come is to these words


def caller_paused(call: Any, at: float) -> None:
    call.notes["latency"].waiting_since = at


def model_spoke(call: Any, at: float) -> None:
    timing: Timing = call.notes["latency"]
    if timing.waiting_since is not None:  # it is None when the model goes on after a tool, or speaks unasked
        ms = (at - timing.waiting_since) * 1000
        name = GREETING
        if not timing.silent:
            name = f"Turn {len(timing.turns) + 1}"
            timing.turns[name] = ms
        timing.rows.append((name, ms))
    timing.silent = False
    timing.waiting_since = None


def tool_used(call: Any, name: str, seconds: float) -> None:
    call.notes["latency"].rows.append((f"Tool {name}", seconds * 1000))


def call_ended(call: Any) -> None:
    for line in table(call).splitlines():
        log.info("%s %s", call.sid, line)


def table(call: Any) -> str:
    """The rows of a call so far, then the median and the worst of its turns; "" if there is nothing yet."""
    timing: Timing = call.notes["latency"]
    rows = list(timing.rows)
    if turns := dict(timing.turns):
        worst = max(turns, key=turns.__getitem__)
        rows.append(("Median of the turns", statistics.median(turns.values())))
        rows.append((f"Worst ({worst})", turns[worst]))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}} {ms:>6,.0f} ms" for name, ms in rows)
