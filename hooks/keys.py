"""Lets the caller answer with the telephone's keys.

A key interrupts the model, as in every telephone menu. What is pressed is told to the model as one
entry, because the network reports keys one by one and the model would answer to each. An entry ends
with `#`, or when no further key has come for a while. `*` is a key like others.

    KEYS_PAUSE_SECONDS=3    without another key that end an entry

Nothing is stored.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

MAX_KEYS = 32  # of one entry: nobody types more, and a stuck key is not collected for ever

try:
    PAUSE_S = float(os.environ.get("KEYS_PAUSE_SECONDS") or 3)
    if not 0 < PAUSE_S <= 60:
        raise ValueError
except ValueError:
    wrong = os.environ["KEYS_PAUSE_SECONDS"]
    sys.exit(f"KEYS_PAUSE_SECONDS is {wrong!r}: give seconds, more than 0 and up to 60")


class Entry:
    """The keys of one entry, as far as they have come."""

    def __init__(self) -> None:
        self.keys = ""
        self.pause: asyncio.TimerHandle | None = None  # what ends the entry if no key comes


# `async def` handlers run on the loop, where a timer is one line. There they must never block.


async def call_started(call: Any) -> None:
    call.notes["keys"] = Entry()


async def key_pressed(call: Any, key: str) -> None:
    call.interrupt()
    entry = call.notes["keys"]
    if entry.pause:
        entry.pause.cancel()
    entry.keys += key
    if key == "#" or len(entry.keys) >= MAX_KEYS:
        tell(call)
    else:
        entry.pause = asyncio.get_running_loop().call_later(PAUSE_S, tell, call)


def tell(call: Any) -> None:
    entry = call.notes["keys"]
    keys, entry.keys = entry.keys, ""
    pressed = keys.removesuffix("#") or keys  # the # that ends an entry is not part of it
    call.tell_model(
        f"発信者が電話機のキーを押しました：{pressed}"
        "（声ではなく、キーでのお返事です。これに応じて続けてください。）"
    )


async def call_ended(call: Any) -> None:
    entry = call.notes.pop("keys")
    if entry.pause:
        entry.pause.cancel()
