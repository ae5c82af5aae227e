"""hooks/keys.py: what the caller presses is told to the model as one entry."""

from __future__ import annotations

import asyncio

import pytest
from conftest import Event, LoadHook, PretendCall, until


def presses(pressed: str) -> list[Event]:
    return [("key_pressed", {"key": key}) for key in pressed]


async def test_keys_are_told_to_the_model_together_at_the_hash_key(hook: LoadHook) -> None:
    keys, call = hook("keys"), PretendCall()
    keys.tell(call, "call_started", *presses("12*40#"))
    await until(lambda: call.did)
    assert len(call.did) == 1 and "12*40" in call.did[0] and "#" not in call.did[0]


async def test_keys_are_told_to_the_model_after_a_pause(hook: LoadHook) -> None:
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.3"), PretendCall()
    keys.tell(call, "call_started", *presses("12"))
    await asyncio.sleep(0.2)
    keys.tell(call, *presses("3"))
    await asyncio.sleep(0.2)
    assert call.did == []
    await until(lambda: call.did, 1)
    assert "123" in call.did[0]


async def test_a_hash_key_alone_is_told_too(hook: LoadHook) -> None:
    keys, call = hook("keys"), PretendCall()
    keys.tell(call, "call_started", *presses("#"))
    await until(lambda: call.did)
    assert "#" in call.did[0]


async def test_each_entry_begins_with_no_keys_and_none_has_more_than_32(hook: LoadHook) -> None:
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.05"), PretendCall()
    keys.tell(call, "call_started", *presses("7" * 40))
    await until(lambda: len(call.did) == 2)
    assert [text.count("7") for text in call.did] == [32, 8]


async def test_keys_of_two_calls_are_kept_apart(hook: LoadHook) -> None:
    keys, one, other = hook("keys"), PretendCall("CA1"), PretendCall("CA2")
    keys.tell(one, "call_started", *presses("1"))
    keys.tell(other, "call_started", *presses("2#"))
    keys.tell(one, *presses("3#"))
    await until(lambda: one.did and other.did)
    assert "13" in one.did[0] and "：2（" in other.did[0]


async def test_keys_of_a_call_that_has_ended_are_told_to_nobody(hook: LoadHook) -> None:
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.05"), PretendCall()
    keys.tell(call, "call_started", *presses("12"), ("call_ended", {"reason": "caller hung up"}))
    await keys.finish()
    await asyncio.sleep(0.1)
    assert call.did == [] and call.notes == {} and not keys.warnings


@pytest.mark.parametrize("setting", ["0", "-2", "nan", "two"])
def test_a_wrong_keys_pause_is_one_error_line_and_2_seconds(hook: LoadHook, setting: str) -> None:
    keys = hook("keys", KEYS_PAUSE_SECONDS=setting)
    assert ["KEYS_PAUSE_SECONDS" in line for line in keys.errors] == [True]
    assert keys.module.PAUSE_S == 2
