"""hooks/idle.py: who is asked whether they are still there, and when."""

from __future__ import annotations

import asyncio
import time

import pytest
from conftest import Event, LoadHook, PretendCall, until


async def test_a_silent_caller_is_asked_twice_and_then_the_call_ends_politely(hook: LoadHook) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    await until(lambda: "hang_up" in call.did)
    assert time.monotonic() - began >= 3 * 0.05
    await asyncio.sleep(0.15)
    first, second, goodbye, end = call.did
    assert "黙って" in first and "もう一度" in second and "別れ" in goodbye and end == "hang_up"


async def test_a_caller_is_not_asked_before_the_time(hook: LoadHook) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.2"), PretendCall()
    began = time.monotonic()
    idle.tell(call, "call_started")
    await until(lambda: call.did)
    assert 0.2 <= time.monotonic() - began < 0.4


async def test_time_runs_from_the_end_of_what_was_heard(hook: LoadHook) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.1"), PretendCall()
    call.busy = True  # the model is being heard, or about to speak, or a tool runs
    idle.tell(call, "call_started", ("model_said", {"text": "はい。", "heard_ms": None}))
    await asyncio.sleep(0.25)
    assert call.did == []
    call.busy, heard_at = False, time.monotonic()
    await until(lambda: call.did)
    assert time.monotonic() - heard_at > 0.08


async def test_no_time_runs_while_the_caller_speaks(hook: LoadHook) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started", "caller_spoke")
    await asyncio.sleep(0.15)
    assert call.did == []
    idle.tell(call, "caller_paused")
    await until(lambda: call.did)


@pytest.mark.parametrize("sign", [["caller_spoke", "caller_paused"], [("key_pressed", {"key": "1"})]])
async def test_a_caller_who_speaks_or_presses_a_key_is_asked_anew_from_the_first_question(
    hook: LoadHook, sign: list[Event]
) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.12"), PretendCall()
    idle.tell(call, "call_started")
    await until(lambda: len(call.did) == 2)
    idle.tell(call, *sign)
    await until(lambda: len(call.did) == 3)
    assert call.did[2] == call.did[0] and "hang_up" not in call.did


async def test_nothing_of_idle_outlives_the_call(hook: LoadHook) -> None:
    idle, call = hook("idle", IDLE_SECONDS="0.05"), PretendCall()
    idle.tell(call, "call_started", ("call_ended", {"reason": "caller hung up"}))
    await idle.finish()
    await asyncio.sleep(0.15)
    assert call.did == [] and call.notes == {} and len(asyncio.all_tasks()) == 1


async def test_a_hundred_silent_calls_cost_next_to_nothing(hook: LoadHook) -> None:
    idle, calls = hook("idle"), [PretendCall(f"CA{number}") for number in range(100)]
    for call in calls:
        idle.tell(call, "call_started")
    await until(lambda: all(call.notes for call in calls))
    used = time.process_time()
    await asyncio.sleep(0.55)
    assert time.process_time() - used < 0.1
    for call in calls:
        idle.tell(call, ("call_ended", {"reason": "caller hung up"}))
    await idle.finish()


@pytest.mark.parametrize(("setting", "errors"), [("0", 0), ("-1", 1), ("soon", 1), ("nan", 1)])
async def test_idle_seconds_of_0_or_a_wrong_one_asks_nobody(hook: LoadHook, setting: str, errors: int) -> None:
    idle, call = hook("idle", IDLE_SECONDS=setting), PretendCall()
    idle.tell(call, "call_started", ("call_ended", {"reason": "x"}))
    await idle.finish()
    assert len(idle.errors) == errors
    assert all("IDLE_SECONDS" in text and "0 to 3600" in text for text in idle.errors)
    assert call.did == [] and len(asyncio.all_tasks()) == 1
