"""hooks/cost.py: what a call has cost, and what happens when a budget is spent."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Event, LoadHook, PretendCall


def answer(
    text_in: int = 0,
    audio_in: int = 0,
    text_out: int = 0,
    audio_out: int = 0,
    text_cached: int = 0,
    audio_cached: int = 0,
) -> dict[str, Any]:
    """A response's usage, as the API reports it: what was cached is part of the input."""
    cached = {"text_tokens": text_cached, "audio_tokens": audio_cached, "image_tokens": 0}
    given: dict[str, Any] = {"text_tokens": text_in, "audio_tokens": audio_in, "image_tokens": 0}
    given |= {"cached_tokens": text_cached + audio_cached, "cached_tokens_details": cached}
    total = {"input_tokens": text_in + audio_in, "output_tokens": text_out + audio_out}
    made = {"text_tokens": text_out, "audio_tokens": audio_out}
    return {**total, "input_token_details": given, "output_token_details": made}


def used(*usages: tuple[str, Any], seconds: float = 100) -> list[Event]:
    """A call of so many seconds in which these models were used."""
    told: list[Event] = [("model_used", 1.0, {"usage": usage, "model": model}) for model, usage in usages]
    return [("call_started", 0.0, {}), *told, ("call_ended", seconds, {"reason": "caller hung up"})]


def usd(call: PretendCall, *kind: str) -> float:
    amount: float = call.notes["cost"]["parts"][kind][1]
    return round(amount, 4)


async def test_the_articles_cost_table_comes_out_of_its_token_counts(hook: LoadHook) -> None:
    cost, call = hook("cost"), PretendCall()
    first = answer(text_in=2000, audio_in=1127, text_out=100, audio_out=884)
    second = answer(text_in=1100, audio_in=1000, text_out=100, audio_out=1000)
    whisper = {"type": "duration", "seconds": 6}
    usages = [("gpt-realtime", first), ("whisper-1", whisper), ("gpt-realtime", second), ("whisper-1", whisper)]
    await cost.tell_all(call, *used(*usages))
    assert usd(call, "gpt-realtime", "audio_in") == 0.0681
    assert usd(call, "gpt-realtime", "audio_out") == 0.1206
    assert round(usd(call, "gpt-realtime", "text_in") + usd(call, "gpt-realtime", "text_out"), 4) == 0.0156
    assert usd(call, "whisper-1", "minute") == 0.0012
    assert round(call.notes["cost"]["usd"], 2) == 0.21
    (line,) = cost.log
    assert line.startswith("CA1 cost $0.2054 (20.54 cents): gpt-realtime text in $0.0124 (3,100 tokens), ")
    assert line.endswith("whisper-1 $0.0012 (0.20 minutes); Twilio's $0.0250 (2 min) come on top")


async def test_a_cached_token_is_not_billed_twice(hook: LoadHook) -> None:
    call = PretendCall()
    usage = answer(text_in=1000, audio_in=1000, text_cached=600, audio_cached=800)
    await hook("cost").tell_all(call, *used(("gpt-realtime-2.1-mini", usage)))
    parts = call.notes["cost"]["parts"]
    assert {kind: amount for (_, kind), (amount, _) in parts.items()} == {
        "text_in": 400, "text_cached": 600, "audio_in": 200, "audio_cached": 800
    }  # fmt: skip
    assert round(call.notes["cost"]["usd"] * 1e6) == 400 * 0.6 + 600 * 0.06 + 200 * 10 + 800 * 0.3


async def test_a_transcription_is_billed_by_the_minute_or_by_the_token(hook: LoadHook) -> None:
    call = PretendCall()
    tokens = {"type": "tokens", "input_tokens": 110, "output_tokens": 20, "total_tokens": 130}
    tokens["input_token_details"] = {"audio_tokens": 100, "text_tokens": 10}
    minute = {"type": "duration", "seconds": 60.0}
    await hook("cost").tell_all(call, *used(("gpt-transcribe", minute), ("gpt-4o-transcribe", tokens)))
    assert usd(call, "gpt-transcribe", "minute") == 0.0045
    assert round(call.notes["cost"]["usd"] * 1e6) == 4500 + 100 * 6 + 10 * 2.5 + 20 * 10


@pytest.mark.parametrize(
    "model, usd_of_1000_audio_in",
    [
        ("gpt-realtime-2025-08-28", 0.032), ("gpt-realtime-mini", 0.010), ("gpt-realtime-mini-2025-12-15", 0.010),
        ("gpt-realtime-2.1", 0.032), ("gpt-realtime-2.1-mini", 0.010),
        ("gpt-realtime-3", None), ("gpt-realtime-2.1-max", None), ("my-azure-deployment", None), ("", None),
    ],
)  # fmt: skip
async def test_a_dated_model_costs_what_its_name_does_and_an_unknown_one_is_not_guessed(
    hook: LoadHook, model: str, usd_of_1000_audio_in: float | None
) -> None:
    call = PretendCall()
    await hook("cost").tell_all(call, *used((model, answer(audio_in=1000))))
    assert call.notes["cost"]["usd"] == usd_of_1000_audio_in


async def test_what_is_unknown_is_said_beside_the_part_that_is_known(hook: LoadHook) -> None:
    cost, call = hook("cost"), PretendCall()
    minute = {"type": "duration", "seconds": 60}
    await cost.tell_all(
        call, *used(("whisper-1", minute), ("gpt-realtime-3", answer(audio_in=9)), ("whisper-1", minute))
    )
    assert call.notes["cost"]["usd"] is None
    assert "cost at least $0.0120" in cost.log[-1]
    assert "unknown: gpt-realtime-3 (no price for it)" in cost.log[-1]


@pytest.mark.parametrize(
    "usage",
    [
        None, {}, [], 7, {"type": "duration"}, {"type": "duration", "seconds": "six"},
        {"type": "duration", "seconds": float("nan")}, {"total_tokens": 9, "input_tokens": 9, "output_tokens": 0},
        {**answer(audio_in=9), "input_token_details": None}, {**answer(audio_out=9), "output_token_details": None},
        {**answer(audio_in=9), "input_tokens": 600},  # with images
        {**answer(audio_in=9), "input_token_details": {"text_tokens": 0, "audio_tokens": 9, "cached_tokens": 8}},
        answer(audio_in=9, audio_cached=10),
    ],
)  # fmt: skip
async def test_a_usage_that_lacks_details_is_unknown_and_raises_nothing(hook: LoadHook, usage: Any) -> None:
    cost, call = hook("cost"), PretendCall()
    model = "whisper-1" if isinstance(usage, dict) and usage.get("type") == "duration" else "gpt-realtime"
    await cost.tell_all(call, *used((model, usage)))
    assert call.notes["cost"]["usd"] is None and call.notes["cost"]["known_usd"] == 0
    assert f"unknown: {model} (usage without details)" in cost.log[-1]


@pytest.mark.parametrize("seconds, minutes", [(0, 1), (0.5, 1), (60, 1), (60.1, 2), (160, 3)])
async def test_twilio_bills_every_minute_that_has_begun(hook: LoadHook, seconds: float, minutes: int) -> None:
    cost = hook("cost")
    await cost.tell_all(PretendCall(), *used(seconds=seconds))
    assert f"Twilio's ${0.0125 * minutes:.4f} ({minutes} min) come on top" in cost.log[-1]


async def test_a_spent_budget_ends_the_call_politely(hook: LoadHook) -> None:
    cost, call = hook("cost", BUDGET_PER_CALL_USD="0.05"), PretendCall()
    await cost.tell_all(call, *used(("gpt-realtime", answer(audio_in=1000)))[:-1])
    assert call.did == []
    cost.module.model_used(call, answer(audio_in=1000), "gpt-realtime")
    told, then = call.did
    assert "丁寧" in told and then == "hang_up"


async def test_goodbye_is_asked_for_once_but_a_caller_cannot_talk_the_end_away(hook: LoadHook) -> None:
    cost, call = hook("cost", BUDGET_PER_CALL_USD="0.03"), PretendCall()
    caller_talks_into_it = ("whisper-1", {"type": "duration", "seconds": 1})
    after = [caller_talks_into_it, ("gpt-realtime", answer(audio_out=10)), caller_talks_into_it]
    await cost.tell_all(call, *used(("gpt-realtime", answer(audio_in=1000)), *after))
    assert call.did[1:] == ["hang_up", "hang_up"]  # at once, and at the answer that follows


async def test_a_budget_per_day_counts_all_calls_and_begins_anew_the_next_day(
    hook: LoadHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, first, second, third = (
        hook("cost", BUDGET_PER_DAY_USD="0.05"),
        PretendCall("CA1"),
        PretendCall("CA2"),
        PretendCall("CA3"),
    )
    usage = ("gpt-realtime", answer(audio_in=1000))
    cost.tell(first, *used(usage))
    await cost.tell_all(second, *used(usage))
    assert (first.did, second.did[1:]) == ([], ["hang_up"])
    monkeypatch.setattr(cost.module.time, "strftime", lambda *_: "2100-01-01")
    cost.module.call_started(third, 0.0)
    cost.module.model_used(third, *usage[::-1])
    assert third.did == []
    assert list(cost.module.spent) == ["2100-01-01"]


@pytest.mark.parametrize("wrong", ["abc", "0", "-1", "nan"])
async def test_a_wrong_budget_is_one_clear_error_and_no_budget(hook: LoadHook, wrong: str) -> None:
    cost, call = hook("cost", BUDGET_PER_CALL_USD=wrong), PretendCall()
    assert len(cost.log) == 1 and "BUDGET_PER_CALL_USD" in cost.log[0]
    await cost.tell_all(call, *used(("gpt-realtime", answer(audio_in=1000))))
    assert call.did == []
