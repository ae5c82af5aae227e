"""hooks/cost.py: what a call has cost, and what happens when a budget is spent."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Event, Loaded, LoadHook, PretendCall, refused

MINUTE = ("whisper-1", {"type": "duration", "seconds": 60})


def answer(
    text_in: int = 0,
    audio_in: int = 0,
    text_out: int = 0,
    audio_out: int = 0,
    text_cached: int = 0,
    audio_cached: int = 0,
) -> dict[str, Any]:
    """A response's usage as the API reports it: what was cached is part of the input."""
    cached = {"text_tokens": text_cached, "audio_tokens": audio_cached, "image_tokens": 0}
    given: dict[str, Any] = {"text_tokens": text_in, "audio_tokens": audio_in, "image_tokens": 0}
    given |= {"cached_tokens": text_cached + audio_cached, "cached_tokens_details": cached}
    total = {"input_tokens": text_in + audio_in, "output_tokens": text_out + audio_out}
    made = {"text_tokens": text_out, "audio_tokens": audio_out}
    return {**total, "input_token_details": given, "output_token_details": made}


def used(*usages: tuple[str, Any], seconds: float = 100) -> list[Event]:
    """A call of so many seconds in which these models were used."""
    told: list[Event] = [("call_started", 0.0, {})]
    for model, usage in usages:
        kind = "transcription" if "whisper" in model or "transcribe" in model else "response"
        told.append(("model_used", 1.0, {"usage": usage, "model": model, "kind": kind}))
    return [*told, ("call_ended", seconds, {"reason": "caller hung up"})]


def usd(call: PretendCall, *part: str) -> float:
    amount: float = call.notes["cost"]["parts"][part][1]
    return round(amount, 4)


@pytest.fixture
def cost(hook: LoadHook) -> Loaded:
    return hook("cost", OPENAI_API_KEY="sk-test", TWILIO_AUTH_TOKEN="test")


async def test_cost_of_a_call(cost: Loaded) -> None:
    """The article's cost table comes out of its token counts."""
    call = PretendCall()
    first = answer(text_in=2000, audio_in=1127, text_out=100, audio_out=884)
    second = answer(text_in=1100, audio_in=1000, text_out=100, audio_out=1000)
    six = ("whisper-1", {"type": "duration", "seconds": 6})
    await cost.tell_all(call, *used(("gpt-realtime", first), six, ("gpt-realtime", second), six))
    assert usd(call, "gpt-realtime", "audio_in") == 0.0681
    assert usd(call, "gpt-realtime", "audio_out") == 0.1206
    texts = usd(call, "gpt-realtime", "text_in") + usd(call, "gpt-realtime", "text_out")
    assert round(texts, 4) == 0.0156
    assert usd(call, "whisper-1", "minute") == 0.0012
    (line,) = cost.records
    text = line.getMessage()
    assert text.startswith("$0.2054: gpt-realtime text in $0.0124 (3,100 tokens), ")
    assert text.endswith("whisper-1 $0.0012 (0.20 minutes); Twilio's $0.0258 (2 min) comes on top")
    assert (line.call, round(line.usd, 4), line.complete, line.twilio_usd) == (
        "CA1",
        0.2054,
        True,
        0.0258,
    )


async def test_cached_tokens(cost: Loaded) -> None:
    """A cached token is not billed twice."""
    call = PretendCall()
    usage = answer(text_in=1000, audio_in=1000, text_cached=600, audio_cached=800)
    await cost.tell_all(call, *used(("gpt-realtime-2.1-mini", usage)))
    parts = call.notes["cost"]["parts"]
    assert {part: amount for (_, part), (amount, _) in parts.items()} == {
        "text_in": 400, "text_cached": 600, "audio_in": 200, "audio_cached": 800
    }  # fmt: skip
    microdollars = 400 * 0.6 + 600 * 0.06 + 200 * 10 + 800 * 0.3
    assert round(call.notes["cost"]["usd"] * 1e6) == microdollars


async def test_transcription(cost: Loaded) -> None:
    """It is billed by the minute or by the token."""
    call = PretendCall()
    tokens = {"type": "tokens", "input_tokens": 110, "output_tokens": 20, "total_tokens": 130}
    tokens["input_token_details"] = {"audio_tokens": 100, "text_tokens": 10}
    minute = ("gpt-transcribe", {"type": "duration", "seconds": 60.0})
    await cost.tell_all(call, *used(minute, ("gpt-4o-transcribe", tokens)))
    assert usd(call, "gpt-transcribe", "minute") == 0.0045
    assert round(call.notes["cost"]["usd"] * 1e6) == 4500 + 100 * 6 + 10 * 2.5 + 20 * 10


@pytest.mark.parametrize(
    "model, usd_of_1000_audio_in",
    [
        ("gpt-realtime-2025-08-28", 0.032), ("gpt-realtime-mini-2025-12-15", 0.010),
        ("gpt-realtime-2.1", 0.032), ("gpt-realtime-2.1-mini", 0.010),
        ("gpt-realtime-3", None), ("gpt-realtime-2.1-max", None), ("deployed", None), ("", None),
    ],
)  # fmt: skip
async def test_price(cost: Loaded, model: str, usd_of_1000_audio_in: float | None) -> None:
    """A dated model costs what its name does, and an unknown one is not guessed."""
    call = PretendCall()
    await cost.tell_all(call, *used((model, answer(audio_in=1000))))
    assert call.notes["cost"]["usd"] == usd_of_1000_audio_in


@pytest.mark.parametrize(
    "usage",
    [
        None, {}, [], 7, {"type": "duration"}, {"type": "duration", "seconds": "six"},
        {"type": "duration", "seconds": float("nan")}, {"input_tokens": 9, "output_tokens": 0},
        {**answer(audio_in=9), "input_token_details": None},
        {**answer(audio_out=9), "output_token_details": None},
        {**answer(audio_in=9), "input_tokens": 600},  # with images
        {**answer(audio_in=9), "input_token_details":
            {"text_tokens": 0, "audio_tokens": 9, "cached_tokens": 8}},
        answer(audio_in=9, audio_cached=10),
    ],
)  # fmt: skip
async def test_unknown_usage(cost: Loaded, usage: Any) -> None:
    """What OpenAI has not reported, or not in detail, makes the sum "at least"."""
    call = PretendCall()
    await cost.tell_all(call, *used(MINUTE, ("gpt-realtime", usage), MINUTE))
    assert call.notes["cost"]["usd"] is None and round(call.notes["cost"]["known_usd"], 4) == 0.012
    (line,) = cost.records
    assert line.getMessage().startswith("at least $0.0120: ") and line.complete is False
    assert "unknown: gpt-realtime (usage " in line.getMessage()


@pytest.mark.parametrize("seconds, minutes", [(0, 1), (0.5, 1), (60, 1), (60.1, 2), (160, 3)])
async def test_twilio_minutes(cost: Loaded, seconds: float, minutes: int) -> None:
    """Twilio bills every minute that has begun."""
    await cost.tell_all(PretendCall(), *used(seconds=seconds))
    assert f"Twilio's ${0.0129 * minutes:.4f} ({minutes} min) comes on top" in cost.log[-1]


async def test_offline_model(hook: LoadHook) -> None:
    """Without a key and without Twilio nothing is billed, and no budget is spent."""
    cost, call = hook("cost", BUDGET_PER_CALL_USD="0.001"), PretendCall()
    await cost.tell_all(call, *used(MINUTE, ("gpt-realtime", answer(audio_in=1000))))
    assert (cost.log, call.did, call.notes["cost"]["usd"]) == ([], [], 0.0)


async def test_browser_phone(hook: LoadHook) -> None:
    """A call that is not Twilio's has no minutes of Twilio's."""
    cost = hook("cost", OPENAI_API_KEY="sk-test")
    await cost.tell_all(PretendCall(), *used(MINUTE))
    assert cost.log == ["$0.0060: whisper-1 $0.0060 (1.00 minutes)"]


async def test_budget_per_call(hook: LoadHook) -> None:
    """It ends the call once, politely and for good, whatever the caller says into the goodbye."""
    cost, call = hook("cost", BUDGET_PER_CALL_USD="0.05", OPENAI_API_KEY="sk-test"), PretendCall()
    usage = ("gpt-realtime", answer(audio_in=1000))
    await cost.tell_all(call, *used(usage)[:-1])
    assert call.did == []
    for model, more in (usage, MINUTE, usage):
        cost.module.model_used(call, more, model, "response")
    told, then = call.did
    assert "丁寧" in told and then == "hang_up final"


async def test_budget_after_a_lost_stream(hook: LoadHook) -> None:
    """A call that comes again goes on with its budget."""
    cost, call = hook("cost", BUDGET_PER_CALL_USD="0.05", OPENAI_API_KEY="sk-test"), PretendCall()
    await cost.tell_all(call, *used(("gpt-realtime", answer(audio_in=1000))) * 2)
    assert call.did[1:] == ["hang_up final"]


async def test_budget_per_day(hook: LoadHook, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts all calls, ends later ones at their beginning, and begins anew the next day."""
    cost = hook("cost", BUDGET_PER_DAY_USD="0.05", OPENAI_API_KEY="sk-test")
    first, second, third, fourth = (PretendCall(f"CA{n}") for n in range(4))
    usage = ("gpt-realtime", answer(audio_in=1000))
    for call in (first, second):
        cost.tell(call, *used(usage))
    await cost.tell_all(third, "call_started")
    assert [call.did[1:] for call in (first, second, third)] == [
        [],
        ["hang_up final"],
        ["hang_up final"],
    ]
    monkeypatch.setattr(cost.module.time, "strftime", lambda *_: "2100-01-01")
    cost.module.call_started(fourth, 0.0)
    cost.module.model_used(fourth, usage[1], usage[0], "response")
    assert fourth.did == []


@pytest.mark.parametrize("wrong", ["abc", "0", "-1", "nan"])
@pytest.mark.parametrize("name", ["BUDGET_PER_CALL_USD", "BUDGET_PER_DAY_USD"])
def test_wrong_budget(hook: LoadHook, name: str, wrong: str) -> None:
    refused(hook, "cost", **{name: wrong})
