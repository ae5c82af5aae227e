"""What a call costs in US dollars, by the tokens and seconds that the API reports. At the end of a
call the log has one line:

    $0.1898: gpt-realtime audio in $0.0681 (2,127 tokens), gpt-realtime audio out $0.1206
    (1,884 tokens), whisper-1 $0.0012 (0.20 minutes); Twilio's $0.0258 (2 min) comes on top

A model without a price in PRICES, and a usage that OpenAI has not reported, are never guessed: then
it says "at least". A call that the offline model answers costs nothing, and one that does not come
from Twilio (TWILIO_AUTH_TOKEN is not set) has no minutes of Twilio's.

    BUDGET_PER_CALL_USD=0.50    when a call has cost this, the model says goodbye and the call ends
    BUDGET_PER_DAY_USD=20       the same for all calls since midnight (Japan's with TZ=Asia/Tokyo)
                                or the last restart; later calls are greeted and hear the goodbye

Without them there is no budget. They count neither what is unknown nor Twilio's minutes. A call
that is connected again goes on with its cost: its later line contains its earlier one. Nothing is
stored. Other hook files find the cost so far in call.notes["cost"]: "usd", or None if some of it is
unknown, and "known_usd".
"""

import logging
import math
import os
import re
import sys
import time
from typing import Any

log = logging.getLogger("cost")

# A call to a US number, and its media stream: https://www.twilio.com/en-us/voice/pricing/us
TWILIO_PER_MINUTE = 0.0085 + 0.0044
GOODBYE = (
    "この通話の時間は終わりです。そのことを丁寧に伝え、お別れの挨拶をしてください。"
    "ほかの話はしないでください。"
)

# Without either the offline model answers, which nobody bills.
OPENAI_BILLS = any(os.environ.get(name) for name in ("OPENAI_API_KEY", "OPENAI_REALTIME_URL"))
TWILIO_BILLS = bool(os.environ.get("TWILIO_AUTH_TOKEN"))


def tokens(*usd_per_million: float) -> dict[str, float]:
    kinds = (
        "text_in",
        "text_out",
        "audio_in",
        "audio_out",
        "text_cached",
        "audio_cached",
    )  # transcription: 3 of them
    return {kind: usd / 1_000_000 for kind, usd in zip(kinds, usd_per_million, strict=False)}


# Read on 2026-11-22 from https://developers.openai.com/api/docs/models/<model>; those marked * at
# second hand, from tables that cite https://developers.openai.com/api/docs/pricing.
PRICES = {
    "gpt-realtime-2.1": tokens(4.00, 24.00, 32.00, 64.00, 0.40, 0.40),
    "gpt-realtime-2.1-mini": tokens(0.60, 2.40, 10.00, 20.00, 0.06, 0.30),
    "gpt-realtime-2": tokens(4.00, 24.00, 32.00, 64.00, 0.40, 0.40),
    "gpt-realtime-1.5": tokens(4.00, 16.00, 32.00, 64.00, 0.40, 0.40),
    "gpt-realtime": tokens(4.00, 16.00, 32.00, 64.00, 0.40, 0.40),  # *
    "gpt-realtime-mini": tokens(0.60, 2.40, 10.00, 20.00, 0.06, 0.30),  # *
    "gpt-transcribe": {"minute": 0.0045},
    "gpt-live-transcribe": {"minute": 0.017},
    "gpt-realtime-whisper": {"minute": 0.017},
    "gpt-4o-transcribe": tokens(2.50, 10.00, 6.00),  # *
    "gpt-4o-mini-transcribe": tokens(1.25, 5.00, 3.00),  # *
    "whisper-1": {"minute": 0.006},  # *
}


def bill(usage: Any, price: dict[str, float], kind: str) -> dict[str, tuple[float, float]]:
    """What one usage costs: part -> (tokens or minutes, dollars). Raises when that is not known."""
    if "seconds" in usage:
        amounts = {"minute": usage["seconds"] / 60}
    else:
        given = usage["input_token_details"]
        text, audio = given["text_tokens"], given["audio_tokens"]
        cached = given.get("cached_tokens_details") or {"text_tokens": 0, "audio_tokens": 0}
        text_cached, audio_cached = cached["text_tokens"], cached["audio_tokens"]
        if text + audio != usage["input_tokens"]:
            raise ValueError("some of it is neither text nor audio")
        if text_cached + audio_cached != (given.get("cached_tokens") or 0):
            raise ValueError("some of what was cached is neither text nor audio")
        audio_out = 0  # a transcription makes text alone
        if kind != "transcription":
            audio_out = usage["output_token_details"]["audio_tokens"]
        amounts = {
            "text_in": text - text_cached,  # what was cached is contained in the input
            "text_cached": text_cached,
            "text_out": usage["output_tokens"] - audio_out,
            "audio_in": audio - audio_cached,
            "audio_cached": audio_cached,
            "audio_out": audio_out,
        }
    if not all(0 <= amount < math.inf for amount in amounts.values()):
        raise ValueError("less than nothing, or no number")
    return {part: (amount, amount * price[part]) for part, amount in amounts.items() if amount}


def budget(name: str) -> float:
    text = os.environ.get(name) or "inf"
    try:
        usd = float(text)
    except ValueError:
        usd = 0.0
    if not usd > 0:  # nan neither
        sys.exit(f"{name} is {text!r}: give dollars above 0, such as 0.50")
    return usd


BUDGET_PER_CALL, BUDGET_PER_DAY = budget("BUDGET_PER_CALL_USD"), budget("BUDGET_PER_DAY_USD")
spent: dict[str, float] = {}  # today's date -> dollars


def call_started(call: Any, at: float) -> None:
    # "parts" has {(model, part): (tokens or minutes, dollars)}, and "known_usd" is their sum.
    cost: dict[str, Any] = {"usd": 0.0, "known_usd": 0.0, "parts": {}, "unknown": set()}
    # A call whose stream was lost comes again, and goes on with the same budget.
    call.notes.setdefault("cost", cost | {"began": at})["ending"] = False
    end_when_spent(call)


def model_used(call: Any, usage: Any, model: str, kind: str) -> None:
    if not OPENAI_BILLS:
        return
    cost = call.notes["cost"]
    name = re.sub(r"-\d{4}-\d\d-\d\d$", "", model)  # a dated model costs what its name does
    try:
        parts = bill(usage, PRICES[name], kind)
    except (LookupError, TypeError, ValueError):
        parts = {}
        why = "usage without details" if usage else "usage not reported"
        cost["unknown"].add(f"{model} ({why if name in PRICES else 'no price for it'})")
    for part, (amount, usd) in parts.items():
        amount_before, usd_before = cost["parts"].get((model, part), (0, 0.0))
        cost["parts"][model, part] = (amount_before + amount, usd_before + usd)
        cost["known_usd"] += usd
        spent[today()] = spent.get(today(), 0.0) + usd
    cost["usd"] = None if cost["unknown"] else cost["known_usd"]
    end_when_spent(call)


def today() -> str:
    return time.strftime("%Y-%m-%d")


def end_when_spent(call: Any) -> None:
    cost = call.notes["cost"]
    spent_by_call = cost["known_usd"] >= BUDGET_PER_CALL
    if (spent_by_call or spent.get(today(), 0.0) >= BUDGET_PER_DAY) and not cost["ending"]:
        cost["ending"] = True
        name = "BUDGET_PER_CALL_USD" if spent_by_call else "BUDGET_PER_DAY_USD"
        log.warning("%s is spent: the model says goodbye", name, extra={"call": call.sid})
        call.tell_model(GOODBYE)
        call.hang_up(final=True)  # whatever the caller says into the goodbye


def call_ended(call: Any, at: float) -> None:
    cost = call.notes["cost"]
    numbers = {
        "call": call.sid,
        "usd": round(cost["known_usd"], 6),
        "complete": not cost["unknown"],
    }
    shown = []
    for (model, part), (amount, usd) in cost["parts"].items():
        if part == "minute":
            shown.append(f"{model} ${usd:.4f} ({amount:.2f} minutes)")
        else:
            shown.append(f"{model} {part.replace('_', ' ')} ${usd:.4f} ({amount:,} tokens)")
    if cost["unknown"]:
        shown.append(f"unknown: {', '.join(sorted(cost['unknown']))}")
    total = f"{'at least ' if cost['unknown'] else ''}${cost['known_usd']:.4f}"
    text = f"{total}: {', '.join(shown) or 'no usage was reported'}"
    if TWILIO_BILLS:
        minutes = max(1, math.ceil((at - cost["began"]) / 60))  # Twilio bills every minute begun
        numbers["twilio_usd"] = round(minutes * TWILIO_PER_MINUTE, 4)
        text += f"; Twilio's ${minutes * TWILIO_PER_MINUTE:.4f} ({minutes} min) comes on top"
    if OPENAI_BILLS or TWILIO_BILLS:
        log.info(text, extra=numbers)
