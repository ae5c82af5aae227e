"""hooks/call_control.py: the model ends the call, or connects the caller with somebody who is listed."""

from __future__ import annotations

import json

import pytest
from conftest import LoadHook, PretendCall

NUMBERS = "受付=+81312345678, 営業 = +81398765432"


async def test_the_model_can_hang_up_and_is_told_that_the_goodbye_is_heard_out(hook: LoadHook) -> None:
    control, call = hook("call_control"), PretendCall()
    assert [tool["name"] for tool in control.host.tools] == ["hang_up"]  # and no transfer, for no number is listed
    assert "goodbye first" in control.host.tools[0]["description"]
    assert "goodbye" in await control.host.run_tool(call, "hang_up", "{}")
    assert call.did == ["hang_up"]


async def test_the_model_can_transfer_the_caller_to_a_listed_name(hook: LoadHook) -> None:
    control, call = hook("call_control", TRANSFER_NUMBERS=NUMBERS), PretendCall()
    result = await control.host.run_tool(call, "transfer_call", '{"to": "営業"}')
    assert call.did == ["transfer +81398765432"] and "営業" in result and "+81" not in result


def test_the_model_sees_names_and_no_numbers(hook: LoadHook) -> None:
    tool = hook("call_control", TRANSFER_NUMBERS=NUMBERS).host.tools[1]
    assert tool["parameters"]["properties"]["to"]["enum"] == ["受付", "営業"]
    assert "+81" not in json.dumps(tool)


@pytest.mark.parametrize("to", ["+81398765432", "+15005550006", "社長", "", None])
async def test_nobody_is_transferred_to_what_is_not_listed(hook: LoadHook, to: str | None) -> None:
    control, call = hook("call_control", TRANSFER_NUMBERS=NUMBERS), PretendCall()
    result = await control.host.run_tool(call, "transfer_call", json.dumps({"to": to}))
    assert result.startswith("Error") and call.did == []


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
    ],
)
def test_malformed_transfer_numbers_are_one_error_line_and_no_transfer(hook: LoadHook, setting: str) -> None:
    control = hook("call_control", TRANSFER_NUMBERS=setting)
    assert [tool["name"] for tool in control.host.tools] == ["hang_up"]
    (wrong,) = control.errors
    assert "TRANSFER_NUMBERS: entry" in wrong and "12345678" not in wrong.partition("write")[0]
