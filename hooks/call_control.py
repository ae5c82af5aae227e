"""Lets the model end the call, and connect the caller with a person.

Both happen when the caller has heard what the model says before; a caller who goes on talking keeps the call.

    TRANSFER_NUMBERS=受付=+81312345678,営業=+81398765432    whom the caller may be connected with; unset: with nobody

The model sees the names and never a number, so no caller can talk it into dialling one. Nothing is stored.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Literal

log = logging.getLogger("call_control")


def read_numbers(setting: str) -> dict[str, str]:
    """Names and their numbers, in the order given. Raises ValueError, in words that show no number."""
    numbers: dict[str, str] = {}
    for position, entry in enumerate(setting.split(","), 1):
        parts = re.fullmatch(r"\s*([^=+]*[^=+\s])\s*=\s*(\+[1-9]\d{6,14})\s*", entry, re.ASCII)
        if not parts or parts[1] in numbers:
            fault = f"repeats the name {parts[1]}" if parts else "is not a name, = and a number with its country"
            raise ValueError(f"entry {position} {fault}")
        numbers[parts[1]] = parts[2]
    return numbers


NUMBERS: dict[str, str] = {}
if setting := os.environ.get("TRANSFER_NUMBERS", "").strip():
    try:
        NUMBERS = read_numbers(setting)
    except ValueError as fault:
        log.error(
            "TRANSFER_NUMBERS: %s, so nobody is transferred: write 受付=+81…,営業=+81… (E.164, digits only)", fault
        )

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(NUMBERS)]  # an enum in the tool's schema: the host refuses anything else


def hang_up(call: Any) -> str:
    """End this telephone call. Use it when the caller has said goodbye or wants to end the call, never before.
    Say goodbye first, in the same answer, and then call this: the line is closed when the goodbye has been heard."""
    call.hang_up()
    return "The call ends when the caller has heard you. If you have not said goodbye, say it now, in one sentence."


def transfer_call(call: Any, to: Name) -> str:
    """Connect the caller with a person or department of this list. Use it when the caller asks for it or agrees to it.
    Say first, in the same answer, whom you are connecting them with, and then call this: you leave the call then."""
    call.transfer(NUMBERS[to])
    return f"The caller is connected with {to} when they have heard you. If you have not told them, tell them now."


TOOLS = [hang_up, transfer_call] if NUMBERS else [hang_up]
