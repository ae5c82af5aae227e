"""hooks/latency.py: what counts as a wait."""

from __future__ import annotations

import pytest
from conftest import LoadHook, PretendCall, conversation


def turn(at: float, ms: int) -> list[str]:
    """A caller who speaks for a second, and an answer that comes so late and is heard for 1 s."""
    answered = at + 1 + ms / 1000
    return [
        f"{at} caller_started_speaking item=c{at}",
        f"{at + 1} caller_stopped_speaking item=c{at}",
        f"{answered} model_started_speaking item=m{at}",
        f"{answered + 1} model_said item=m{at} text=はい heard_ms=None",
    ]


async def rows(hook: LoadHook, *steps: str) -> list[tuple[str, int]]:
    latency, call = hook("latency"), PretendCall()
    await latency.tell_all(call, *conversation(*steps))
    return [(name, round(ms)) for name, ms in call.notes["latency"].rows]


async def test_line_and_table(hook: LoadHook) -> None:
    """The line at the end of a call, and the article's table, which is had at any time."""
    latency, call = hook("latency"), PretendCall()
    steps = ["0.1 model_asked", "0.373 model_started_speaking item=m0"]
    steps += ["1 model_said item=m0 text=はい heard_ms=None"]
    for n, ms in enumerate((359, 389, 420, 421, 1598), 1):
        steps += turn(n * 10, ms)
    await latency.tell_all(call, *conversation(*steps))
    (line,) = latency.records
    assert line.getMessage() == "greeting 273 ms, 5 turns: median 420 ms, worst 1,598 ms (turn 5)"
    numbers = (line.call, line.greeting_ms, line.turns, line.median_ms, line.worst_ms)
    assert numbers == ("CA1", 273, 5, 420, 1598)
    table = call.notes["latency"].table().splitlines()
    assert table[0] == "Greeting (from response.create)    273 ms"
    assert table[5:] == [
        "Turn 5                           1,598 ms",
        "Median of the turns                420 ms",
        "Worst (Turn 5)                   1,598 ms",
    ]
    assert round(call.notes["latency"].waits_ms["m10"]) == 359


SPEAK, STOP, SOUND = "caller_started_speaking", "caller_stopped_speaking", "model_started_speaking"
TOOL = "tool_used name=get_weather arguments={} result=晴れ seconds=0.95"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["-0.4 model_asked", "0.2 model_asked", f"0.5 {SOUND} item=m"],
         [("Greeting (from response.create)", 900)]),
        (["0.1 model_asked", f"0.2 {SPEAK} item=c", f"1 {STOP} item=c", f"1.3 {SOUND} item=m"],
         [("Turn 1", 300)]),
        ([f"1 {SPEAK} item=c", f"2 {STOP} item=c", *turn(2.3, 250),
          *turn(6, 0)[:2], f"7.3 {SPEAK} item=e", f"7.4 {SOUND} item=n"], [("Turn 1", 250)]),
        ([*turn(1, 300), "20 model_asked", f"21 {SOUND} item=n"], [("Turn 1", 300)]),
        ([*turn(1, 1400)[:2], f"3.2 {TOOL}", "3.2 model_asked", f"3.4 {SOUND} item=m"],
         [("Tool get_weather", 950), ("Turn 1", 1400)]),
        ([*turn(1, 300), f"3.5 {TOOL}", f"3.8 {SOUND} item=n"],
         [("Turn 1", 300), ("Tool get_weather", 950)]),
        ([*turn(1, 400)[:3], f"3 {SPEAK} item=d", "3 model_said item=m1 text=は heard_ms=600",
          f"4 {STOP} item=d", f"4.2 {SOUND} item=n"], [("Turn 1", 400), ("Turn 2", 200)]),
        ([*turn(1, 400)[:3], f"2.6 {SPEAK} item=d", f"3 {STOP} item=d", turn(1, 400)[3],
          "28 model_asked", f"29 {SOUND} item=n"], [("Turn 1", 400)]),
    ],
    ids=["asked again", "caller first", "pause", "nobody waited", "tool before", "tool after",
         "barge-in", "backchannel"],
)  # fmt: skip
async def test_rows(hook: LoadHook, steps: list[str], expected: list[tuple[str, int]]) -> None:
    """A row is the wait of a caller who has finished speaking, or the time of a tool."""
    assert await rows(hook, *steps) == expected


async def test_two_calls(hook: LoadHook) -> None:
    """The waits of two calls are kept apart."""
    latency, one, other = hook("latency"), PretendCall("CA1"), PretendCall("CA2")
    steps = [(one, step) for step in conversation(*turn(1, 400))]
    steps += [(other, step) for step in conversation(*turn(1.05, 100))]
    for call, step in sorted(steps, key=lambda step: step[1][1]):
        latency.tell(call, step)
    await latency.finish()
    assert {line.call: line.median_ms for line in latency.records} == {"CA1": 400, "CA2": 100}
