"""What a call costs, in US dollars, from the tokens and seconds that the API reports. The log has it at the call's end:

    CA… cost $0.1898 (18.98 cents): gpt-realtime audio in $0.0681 (2,127 tokens), gpt-realtime audio out $0.1206
    (1,884 tokens), whisper-1 $0.0012 (0.20 minutes); Twilio's $0.0250 (2 min) come on top

A model without a price in PRICES, or a usage without its details, is said to be unknown and never guessed.

    BUDGET_PER_CALL_USD=0.50    when a call has cost this, the model says goodbye and the call ends. Not set: no budget
    BUDGET_PER_DAY_USD=20       the same for all calls since midnight (Japan's with TZ=Asia/Tokyo) or the last restart;
                                a call that comes later hears the greeting and the goodbye. Not set: no budget

Budgets count neither what is unknown nor Twilio's minutes. Nothing is stored; other hook files find the cost so far in
call.notes["cost"]["usd"] (None: some of it is unknown).
"""

import logging
import math
import os
import re
import time
from typing import Any

log = logging.getLogger("cost")

# A call to a US number, and its media stream, in May 2026; today's: https://www.twilio.com/en-us/voice/pricing/us
TWILIO_PER_MINUTE = 0.0085 + 0.0040
GOODBYE = "この通話の時間は終わりです。そのことを丁寧に伝え、お別れの挨拶をしてください。ほかの話はしないでください。"


def tokens(*usd_per_million: float) -> dict[str, float]:
    kinds = ("text_in", "text_out", "audio_in", "audio_out", "text_cached", "audio_cached")  # transcription: 3 of them
    return {kind: usd / 1_000_000 for kind, usd in zip(kinds, usd_per_million, strict=False)}


# Read on 2026-11-22 from https://developers.openai.com/api/docs/models/<model>; those marked * at second hand, from
# tables that cite https://developers.openai.com/api/docs/pricing.
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


def bill(usage: Any, price: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What one usage costs: kind -> (tokens or minutes, dollars). Raises an error when that is not known."""
    if "seconds" in usage:
        amounts = {"minute": usage["seconds"] / 60}
    else:
        given = usage["input_token_details"]
        text, audio = given["text_tokens"], given["audio_tokens"]
        cached = given.get("cached_tokens_details") or {"text_tokens": 0, "audio_tokens": 0}
        text_cached, audio_cached = cached["text_tokens"], cached["audio_tokens"]
        if text + audio != usage["input_tokens"] or text_cached + audio_cached != (given.get("cached_tokens") or 0):
            raise ValueError("some of it is neither text nor audio")
        # The usage of a transcription, which unlike that of an answer has a type, is of text alone.
        audio_out = 0 if "type" in usage else usage["output_token_details"]["audio_tokens"]
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
    return {kind: (amount, amount * price[kind]) for kind, amount in amounts.items() if amount}


def budget(name: str) -> float:
    text = os.environ.get(name) or "inf"
    try:
        if (usd := float(text)) > 0:
            return usd
    except ValueError:
        pass
    log.error("%s is %r, so there is no such budget: set it to dollars above 0, such as 0.50", name, text)
    return math.inf


BUDGET_PER_CALL, BUDGET_PER_DAY = budget("BUDGET_PER_CALL_USD"), budget("BUDGET_PER_DAY_USD")
spent: dict[str, float] = {}  # today's date -> dollars


def call_started(call: Any, at: float) -> None:
    # "parts" has {(model, kind): (tokens or minutes, dollars)}, and "known_usd" is their sum
    call.notes["cost"] = {"usd": 0.0, "known_usd": 0.0, "parts": {}, "unknown": set(), "began": at, "ending": False}


def model_used(call: Any, usage: Any, model: str) -> None:
    cost = call.notes["cost"]
    today = time.strftime("%Y-%m-%d")
    if today not in spent:
        spent.clear()
        spent[today] = 0.0
    name = re.sub(r"-\d{4}-\d\d-\d\d$", "", model)  # gpt-realtime-2025-08-28 costs what gpt-realtime does
    try:
        parts = bill(usage, PRICES[name])
    except (LookupError, TypeError, ValueError):
        parts = {}
        cost["unknown"].add(f"{model} ({'usage without details' if name in PRICES else 'no price for it'})")
    for kind, (amount, usd) in parts.items():
        amount_before, usd_before = cost["parts"].get((model, kind), (0, 0.0))
        cost["parts"][model, kind] = (amount_before + amount, usd_before + usd)
        cost["known_usd"] += usd
        spent[today] += usd
    cost["usd"] = None if cost["unknown"] else cost["known_usd"]
    if cost["known_usd"] >= BUDGET_PER_CALL or spent[today] >= BUDGET_PER_DAY:
        if not cost["ending"]:
            cost["ending"] = True
            log.warning("%s the budget is spent: the model says goodbye", call.sid)
            call.tell_model(GOODBYE)
            call.hang_up()
        elif not (isinstance(usage, dict) and "type" in usage):
            call.hang_up()  # a caller who talks into the goodbye calls it off: the next answer is the last


def call_ended(call: Any, at: float) -> None:
    cost = call.notes["cost"]
    total = f"${cost['known_usd']:.4f} ({cost['known_usd'] * 100:.2f} cents)"
    shown = []
    for (model, kind), (amount, usd) in cost["parts"].items():
        if kind == "minute":
            shown.append(f"{model} ${usd:.4f} ({amount:.2f} minutes)")
        else:
            shown.append(f"{model} {kind.replace('_', ' ')} ${usd:.4f} ({amount:,} tokens)")
    if cost["unknown"]:
        total = f"at least {total}"
        shown.append(f"unknown: {', '.join(sorted(cost['unknown']))}")
    minutes = max(1, math.ceil((at - cost["began"]) / 60))  # Twilio bills every minute begun
    twilio = f"${minutes * TWILIO_PER_MINUTE:.4f} ({minutes} min)"
    log.info("%s cost %s: %s; Twilio's %s come on top", call.sid, total, ", ".join(shown) or "nothing", twilio)
