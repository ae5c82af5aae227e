"""Lets the model end the call, transfer the caller to a person, and keep silent.

The call ends when the caller has heard what the model says before. A caller who goes on talking
cancels this, and the bridge tells the model so. The caller is transferred when they have heard what
the model says before. Nothing that they say cancels that. When nobody answers there, the bridge
connects the call with the model again and tells it so.

    TRANSFER_NUMBERS=受付=+81312345678,営業=+81398765432    to whom; unset: to nobody

The model sees the names and never a number, so no caller can talk it into dialling one. Nothing is
stored.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, Literal

setting = os.environ.get("TRANSFER_NUMBERS", "").strip()
NUMBERS: dict[str, str] = {}  # by name
for position, entry in enumerate(setting.split(",") if setting else (), 1):
    parts = re.fullmatch(r"\s*([^=+]*[^=+\s])\s*=\s*(\+[1-9]\d{6,14})\s*", entry, re.ASCII)
    if not parts or parts[1] in NUMBERS:
        # The entry itself is not shown, because it is somebody's number.
        error = "repeats a name" if parts else "is not a name, = and a number"
        example = "受付=+81…,営業=+81… (E.164: + and digits only)"
        sys.exit(f"TRANSFER_NUMBERS is wrong, entry {position} {error}: give {example}")
    NUMBERS[parts[1]] = parts[2]

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(NUMBERS)]  # an enum in the tool's schema


def hang_up(call: Any) -> str:
    """End this telephone call. Use it when the caller has said goodbye or wants to end the call,
    never before. Say goodbye first, in the same answer, and then call this: the line is closed when
    the goodbye has been heard."""
    call.hang_up()
    return (
        "The call ends when the caller has heard you. If you have not said goodbye, say it now, in "
        "one sentence. If the caller goes on talking, the call goes on and you are told so."
    )


def transfer_call(call: Any, to: Name) -> str:
    """Connect the caller with a person or department of this list. Use it when the caller asks for
    it or agrees to it. Say first, in the same answer, whom you are connecting them with, and then
    call this: you leave the call then."""
    call.transfer(NUMBERS[to])
    return (
        f"The caller is connected with {to} when they have heard you; nothing stops this any more. "
        "If you have not told them, tell them now, in one sentence. If nobody answers there, you "
        "get the caller back and are told so."
    )


def wait_for_caller() -> None:
    """Say nothing and go on listening. Use it only when what you heard was certainly not said to
    you: silence, noise, music, a television, or the caller talking with somebody beside them. Never
    use it when the caller may have spoken to you: if you could not make out the words, politely ask
    them to say it once more."""
    # None wants no answer. Otherwise a sound would always get one, because the bridge asks again
    # when an answer brings neither sound nor tool call.


TOOLS = [hang_up, transfer_call, wait_for_caller] if NUMBERS else [hang_up, wait_for_caller]
