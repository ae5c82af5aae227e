"""hooks/call_control.py: the model ends the call, transfers the caller, or keeps silent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Loaded, LoadHook, PretendCall, refused

NUMBERS = "受付=+81312345678, 営業 = +81398765432"


def tools(control: Loaded) -> dict[str, Any]:
    return {tool["name"]: tool for tool in control.host.tools}


async def test_hang_up(hook: LoadHook) -> None:
    """The model can hang up; it is told that the goodbye is heard out, and who may cancel it."""
    control, call = hook("call_control"), PretendCall()
    assert "goodbye first" in tools(control)["hang_up"]["description"]
    result = await control.host.run_tool(call, "hang_up", "{}")
    assert "goodbye" in result and "goes on talking" in result
    assert call.did == ["hang_up"]


async def test_transfer(hook: LoadHook) -> None:
    """The model can transfer to a listed name; it is told what becomes of it, and no number."""
    control, call = hook("call_control", TRANSFER_NUMBERS=NUMBERS), PretendCall()
    result = await control.host.run_tool(call, "transfer_call", '{"to": "営業"}')
    assert call.did == ["transfer +81398765432"]
    assert "営業" in result and "nobody answers" in result and "+81" not in result


def test_names(hook: LoadHook) -> None:
    """The model sees names and no numbers; without any there is no transfer."""
    assert list(tools(hook("call_control"))) == ["hang_up", "wait_for_caller"]
    tool = tools(hook("call_control", TRANSFER_NUMBERS=NUMBERS))["transfer_call"]
    assert tool["parameters"]["properties"]["to"]["enum"] == ["受付", "営業"]
    assert "+81" not in json.dumps(tool)


@pytest.mark.parametrize("to", ["+81398765432", "+15005550006", "社長", "", None])
async def test_unlisted(hook: LoadHook, to: str | None) -> None:
    """Nobody is transferred to what is not listed."""
    control, call = hook("call_control", TRANSFER_NUMBERS=NUMBERS), PretendCall()
    result = await control.host.run_tool(call, "transfer_call", json.dumps({"to": to}))
    assert result.startswith("Error") and call.did == []


async def test_wait_for_caller(hook: LoadHook) -> None:
    """The model can keep silent: the tool does nothing and wants no answer."""
    control, call = hook("call_control"), PretendCall()
    assert "Never" in tools(control)["wait_for_caller"]["description"]
    assert await control.host.run_tool(call, "wait_for_caller", "{}") is None
    assert call.did == []


@pytest.mark.parametrize(
    "setting",
    [
        "受付",
        "受付=0312345678",
        "受付=+813",
        "=+81312345678",
        "受付=+81312345678,",
        "+81312345678=受付",
        "a=+81312345678,a=+819012345678",
        "0312345678=+81312345678,0312345678=+819012345678",
    ],
)
def test_wrong_numbers(hook: LoadHook, setting: str) -> None:
    """Wrong TRANSFER_NUMBERS stop the start, in words that show no number."""
    line = refused(hook, "call_control", TRANSFER_NUMBERS=setting)
    assert "entry " in line and "12345678" not in line
