"""hooks/keys.py: what the caller presses interrupts the model, which is told it as one entry."""

from __future__ import annotations

import asyncio

import pytest
from conftest import Event, LoadHook, PretendCall, refused, until


def presses(pressed: str) -> list[Event]:
    return [("key_pressed", {"key": key}) for key in pressed]


def told(call: PretendCall) -> list[str]:
    return [what for what in call.did if what != "interrupt"]


async def test_hash_key(hook: LoadHook) -> None:
    """Keys are told to the model together, at the hash key."""
    keys, call = hook("keys"), PretendCall()
    keys.tell(call, "call_started", *presses("12*40#"))
    await until(lambda: told(call))
    assert len(told(call)) == 1 and "12*40" in told(call)[0] and "#" not in told(call)[0]


async def test_interruption(hook: LoadHook) -> None:
    """A key interrupts the model at once, long before the entry is complete."""
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="60"), PretendCall()
    await keys.tell_all(call, "call_started", *presses("1"))
    assert call.did == ["interrupt"]


async def test_pause(hook: LoadHook) -> None:
    """Keys are told to the model after a pause."""
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.3"), PretendCall()
    keys.tell(call, "call_started", *presses("12"))
    await asyncio.sleep(0.2)
    keys.tell(call, *presses("3"))
    await asyncio.sleep(0.2)
    assert told(call) == []
    await until(lambda: told(call), 1)
    assert "123" in told(call)[0]


async def test_hash_key_alone(hook: LoadHook) -> None:
    """A hash key alone is told as well."""
    keys, call = hook("keys"), PretendCall()
    keys.tell(call, "call_started", *presses("#"))
    await until(lambda: told(call))
    assert "#" in told(call)[0]


async def test_many_keys(hook: LoadHook) -> None:
    """No entry has more than 32 keys, and the next begins with none."""
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.05"), PretendCall()
    keys.tell(call, "call_started", *presses("7" * 40))
    await until(lambda: len(told(call)) == 2)
    assert [text.count("7") for text in told(call)] == [32, 8]


async def test_end(hook: LoadHook) -> None:
    """Keys of a call that has ended are told to nobody."""
    keys, call = hook("keys", KEYS_PAUSE_SECONDS="0.05"), PretendCall()
    keys.tell(call, "call_started", *presses("12"), ("call_ended", {"reason": "caller hung up"}))
    await keys.finish()
    await asyncio.sleep(0.1)
    assert told(call) == [] and call.notes == {} and not keys.warnings


@pytest.mark.parametrize("setting", ["0", "-2", "nan", "two", "61"])
def test_wrong_pause(hook: LoadHook, setting: str) -> None:
    """A wrong KEYS_PAUSE_SECONDS stops the start."""
    assert "up to 60" in refused(hook, "keys", KEYS_PAUSE_SECONDS=setting)
