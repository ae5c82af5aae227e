"""What a call costs, in US dollars, from the tokens and seconds that the API reports. One log line when it has ended:

    CA… cost $0.1898 (18.98 cents): gpt-realtime audio in $0.0681 (2,127 tokens), gpt-realtime audio out $0.1206
    (1,884 tokens), whisper-1 $0.0012 (0.20 minutes); Twilio's $0.0250 (2 min) come on top

A model without a price in PRICES, or a usage that lacks its details, is said to be unknown and never guessed.

    BUDGET_PER_CALL_USD    what OpenAI may cost for a call; then the model says goodbye and the call is ended
    BUDGET_PER_DAY_USD     the same for all calls of a day (the computer's: TZ=Asia/Tokyo makes it Japan's); a call that
                           comes later hears its greeting and the goodbye. A restart begins the day anew
Not set: no budget. What is unknown, and Twilio's minutes, count towards none.

Nothing is stored. Other hook files find the cost so far in call.notes["cost"]: "usd" (None: some of it is unknown),
"known_usd" (without what is unknown), "parts" {(model, kind): (tokens or minutes, usd)} and "unknown" [what and why].
"""

import logging
import math
import os
import re
import time
from typing import Any, NamedTuple

log = logging.getLogger("cost")


class Price(NamedTuple):
    """US dollars: per million tokens, and per minute of transcribed audio. None: not sold like that."""

    text_in: float | None = None
    text_cached: float | None = None
    text_out: float | None = None
    audio_in: float | None = None
    audio_cached: float | None = None
    audio_out: float | None = None
    minute: float | None = None


# Read on 2026-11-22 from https://developers.openai.com/api/docs/models/<model>; those marked * at second hand, from
# tables that cite https://developers.openai.com/api/docs/pricing.
PRICES = {
    "gpt-realtime-2.1": Price(4.00, 0.40, 24.00, 32.00, 0.40, 64.00),
    "gpt-realtime-2.1-mini": Price(0.60, 0.06, 2.40, 10.00, 0.30, 20.00),
    "gpt-realtime-2": Price(4.00, 0.40, 24.00, 32.00, 0.40, 64.00),
    "gpt-realtime-1.5": Price(4.00, 0.40, 16.00, 32.00, 0.40, 64.00),
    "gpt-realtime": Price(4.00, 0.40, 16.00, 32.00, 0.40, 64.00),  # *
    "gpt-realtime-mini": Price(0.60, 0.06, 2.40, 10.00, 0.30, 20.00),  # *
    "gpt-transcribe": Price(minute=0.0045),
    "gpt-live-transcribe": Price(minute=0.017),
    "gpt-realtime-whisper": Price(minute=0.017),
    "gpt-4o-transcribe": Price(text_in=2.50, text_out=10.00, audio_in=6.00),  # *
    "gpt-4o-mini-transcribe": Price(text_in=1.25, text_out=5.00, audio_in=3.00),  # *
    "whisper-1": Price(minute=0.006),  # *
}
# A call to a US number, and its media stream, in May 2026; today's: https://www.twilio.com/en-us/voice/pricing/us
TWILIO_PER_MINUTE = 0.0085 + 0.0040
GOODBYE = "この通話の時間は終わりです。そのことを丁寧に伝え、お別れの挨拶をしてください。ほかの話はしないでください。"


def budget(name: str) -> float:
    text = os.environ.get(name) or "inf"
    try:
        dollars = float(text)
    except ValueError:
        dollars = math.nan
    if dollars > 0:  # nan is not
        return dollars
    log.error("%s is %r: give dollars above 0, such as 0.50. There is no such budget now", name, text)
    return math.inf


BUDGET_PER_CALL, BUDGET_PER_DAY = budget("BUDGET_PER_CALL_USD"), budget("BUDGET_PER_DAY_USD")
spent: dict[str, float] = {}  # today's date -> dollars


def call_started(call: Any, at: float) -> None:
    call.notes["cost"] = {"usd": 0.0, "known_usd": 0.0, "parts": {}, "unknown": [], "began": at, "ending": False}


def model_used(call: Any, usage: Any, model: str) -> None:
    cost = call.notes["cost"]
    try:
        parts = split(usage, model)
    except (AttributeError, LookupError, TypeError, ValueError):
        parts, why = {}, f"{model} ({'usage without details' if snapshot_of(model) in PRICES else 'no price for it'})"
        cost["usd"] = None
        if why not in cost["unknown"]:
            cost["unknown"] = [*cost["unknown"], why]
            log.warning("%s cost unknown, and not counted: %s", call.sid, why)
    today = time.strftime("%Y-%m-%d")
    if today not in spent:
        spent.clear()
    for kind, (amount, usd) in parts.items():
        amount_before, usd_before = cost["parts"].get((model, kind), (0, 0.0))
        cost["parts"] = cost["parts"] | {(model, kind): (amount_before + amount, usd_before + usd)}
        cost["known_usd"] += usd
        spent[today] = spent.get(today, 0.0) + usd
    if not cost["unknown"]:
        cost["usd"] = cost["known_usd"]
    if cost["known_usd"] >= BUDGET_PER_CALL or spent.get(today, 0.0) >= BUDGET_PER_DAY:
        of_transcription = isinstance(usage, dict) and "type" in usage  # the usage of an answer has no type
        if not cost["ending"]:
            cost["ending"] = True
            log.warning("%s the budget is spent: the model says goodbye", call.sid)
            call.tell_model(GOODBYE)
            call.hang_up()
        elif not of_transcription:  # a caller who talks into the goodbye calls it off: the next answer is the last
            call.hang_up()


def call_ended(call: Any, at: float) -> None:
    cost = call.notes["cost"]
    shown = [] if cost["parts"] else ["nothing"]
    for (model, kind), (amount, usd) in cost["parts"].items():
        what = f" ${usd:.4f} ({amount:.2f} minutes)" if kind == "minute" else f" {kind} ${usd:.4f} ({amount:,} tokens)"
        shown.append(model + what.replace("_", " "))
    total = f"${cost['known_usd']:.4f} ({cost['known_usd'] * 100:.2f} cents)"
    if cost["unknown"]:
        total = f"at least {total}"
        shown.append(f"unknown: {', '.join(cost['unknown'])}")
    minutes = max(1, math.ceil((at - cost["began"]) / 60))  # Twilio bills every minute begun
    twilio = f"${minutes * TWILIO_PER_MINUTE:.4f} ({minutes} min)"
    log.info("%s cost %s: %s; Twilio's %s come on top", call.sid, total, ", ".join(shown), twilio)


def snapshot_of(model: Any) -> str:
    """The name in PRICES: gpt-realtime-2025-08-28 costs what gpt-realtime does, but gpt-realtime-3 may not."""
    return re.sub(r"-\d{4}-\d\d-\d\d$", "", str(model))


def split(usage: Any, model: str) -> dict[str, tuple[float, float]]:
    """What one usage costs, by kind of Price: (tokens or minutes, dollars). Raises an error when that is not known."""
    price = PRICES[snapshot_of(model)]
    if usage.get("type") == "duration":
        amounts = {"minute": usage["seconds"] / 60}
    else:
        given, made = usage["input_token_details"], usage.get("output_token_details")
        cached = given.get("cached_tokens_details") or {}
        text_cached, audio_cached = cached.get("text_tokens") or 0, cached.get("audio_tokens") or 0
        if given["text_tokens"] + given["audio_tokens"] != usage["input_tokens"]:
            raise ValueError("some of it is neither text nor audio")
        if text_cached + audio_cached != (given.get("cached_tokens") or 0):
            raise ValueError("it is not said whether text or audio was cached")
        # A transcription is text, and its usage has no details of the output.
        audio_out = 0 if made is None and usage.get("type") == "tokens" else made["audio_tokens"]
        amounts = {
            "text_in": given["text_tokens"] - text_cached,  # what is cached is contained in the input
            "text_cached": text_cached,
            "text_out": usage["output_tokens"] - audio_out,  # with the reasoning
            "audio_in": given["audio_tokens"] - audio_cached,
            "audio_cached": audio_cached,
            "audio_out": audio_out,
        }
    parts = {}
    for kind, amount in amounts.items():
        if not 0 <= amount < math.inf:
            raise ValueError(f"{amount} of {kind}")
        if amount:
            parts[kind] = (amount, amount * getattr(price, kind) / (1 if kind == "minute" else 1_000_000))
    return parts
