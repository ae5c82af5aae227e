#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "twilio>=9.13,<10"]
# ///
# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-untyped, attr-defined"
"""Talk with OpenAI's Realtime model by telephone: the whole bridge in one file.

    caller ── telephone ── Twilio ══ WebSocket ══ bridge.py ══ WebSocket ══ OpenAI Realtime
                             └── POST /twilio/voice ──┘

1 Settings · 2 The call · 3 Playback · 4 Caller audio · 5 Hooks · 6 The way in · 7 Start and stop ·
8 The fast wire: the same for less CPU, skip it at a first reading

Start it with `python bridge.py`; the README has the settings and the first call. Both sides speak
G.711 mu-law at 8 kHz in base64, so sound passes through as it came: 8 bytes are 1 ms. Nothing in a
call waits: a message of either side is handled to its end where it arrives, and what it causes is
written at once. Beside that run only `Call.keep_session`, `Call.live`, tools and hooks.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import difflib
import functools
import gc
import hmac
import importlib.util
import inspect
import json
import logging
import math
import mimetypes
import os
import queue
import re
import secrets
import signal
import ssl
import sys
import threading
import time
import types
import typing
from asyncio import sslproto
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from time import monotonic  # `now` and `…_at` are in seconds of it
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from xml.sax.saxutils import escape, quoteattr

from twilio.request_validator import RequestValidator, get_signature_algorithm
from websockets import ClientConnection, ConnectionClosed, Request, Response, State
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection, broadcast
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import apply_mask
from websockets.server import ServerProtocol

log = logging.getLogger("bridge")
Object = dict[str, Any]  # of JSON

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:  # defaults; each is read from the environment variable of its name in capitals
    openai_api_key: str = ""  # without it the offline model answers (hooks/offline.py)
    twilio_auth_token: str = ""  # checks signatures; without it only this computer may call
    public_base_url: str = ""  # such as https://my-app.fly.dev
    port: int = 8080
    host: str = ""  # all interfaces
    openai_realtime_url: str = "wss://api.openai.com/v1/realtime"  # or the same protocol elsewhere
    openai_realtime_model: str = "gpt-realtime-2.1"  # unless the URL names one
    instructions: str = (
        "# 役割\nあなたは電話に出るAIアシスタントの鈴木です。\n# 話し方\nいつも日本語の"
        "「です・ます」で話します。一度に話すのは短い文を一つか二つまでです。箇条書きや記号は"
        "使いません。電話番号などの数字は一桁ずつ読み上げ、復唱して確かめます。\n# 決してしないこと"
        "\n事実、数字、出典を作り上げません。使えるツールがあれば調べ、わからないことは"
        "「わかりかねます」と正直に言います。\n# 聞き取れないとき\n短く聞き返します。雑音、沈黙、"
        "周りの人どうしの会話には答えません。"
    )
    greeting: str = "お電話ありがとうございます。AIアシスタントの鈴木です。どうぞお話しください。"
    voice: str = "marin"  # marin and cedar are the ones that OpenAI recommends
    transcription_model: str = "gpt-transcribe"  # of the caller's words; empty: none
    session: Mapping[str, Any] = field(default_factory=dict)  # patches session.update (RFC 7396)
    barge_in_ms: float = 400.0  # of voice interrupt; 0: OpenAI does it; "off" (inf): nothing
    max_calls: int = 100  # further callers hear a busy message
    max_call_seconds: float = 3600.0  # an OpenAI session ends after 60 minutes, too
    drain_seconds: float = 240.0  # how long a stop waits for calls to end by themselves
    hooks: str | None = None  # comma-separated names; None: every file in hooks/
    fly_machine_id: str = ""  # set by Fly.io itself


# What Twilio says to a caller to whom the model cannot speak, and what the model is told.
AGAIN = "恐れ入りますが、しばらくしてからおかけ直しください。"
BUSY = "ただいまお電話が混み合っております。" + AGAIN
RESTARTING = "ただいまシステムの更新を行っております。" + AGAIN
APOLOGY = "申し訳ございません。システムの不具合により、お電話を続けることができません。" + AGAIN
TIME_IS_UP = "恐れ入りますが、お時間となりましたので、これで失礼いたします。"
GREET = "Begin the call: say exactly this, and no more: "
LINE_IS_BACK = "The line was cut off and is back. Apologize for that in a few words, and "
GO_ON, SAY_AGAIN = "go on where you were.", "ask the caller to say once more what it is about."
NOT_REACHED = "Nobody was reached ({}): the caller is back with you. Say whom they did not reach."
HEARD_ONLY = "The caller spoke over your last words. They heard only this of them: "
NOT_DONE = "The caller spoke over this, so it was not done."
CALLED_OFF = "The caller goes on talking, so the call was not ended. Listen, and respond."

# ── 2 The call ──────────────────────────────────────────────────────────────────────────────────
#
#   webhook ── Call ─┬─ keep_session: connect to OpenAI, set up, read; again when it is lost
#                    ├─ `start` ── open_stream ── from_twilio, from_openai: one message at a time
#                    └─ live: until `end` ── both sides are closed ── call_ended
#
# The state says what is true now. `go_on` looks at it four times a second and after each message
# (but Twilio's media), and does what is due. So hardly a message that fails to come needs code.

TICK_S, UNCLAIMED_S = 0.25, 10.0  # a call without a stream ends after so long
ANSWERS_S, ASK_AGAIN_S, FAILED_S = 1.5, 2.5, 1.0  # before a request: first, next, after an error
GREETING_S, SILENCE_S = 8.0, 20.0  # a caller waits no longer for what is owed
DEAD_S, DEAF_S = 6.0, 8.0  # without an event of a response; of a session that was asked
SESSION_S, LASTED_S = 8.0, 2.0  # without a session; one that is lost sooner was none
UNWANTED_S, TURN_LOST_S = 3.0, 9.0  # OpenAI responds, and its semantic VAD decides, sooner
LAST_WORDS_S = 1.0
# The echo of the model interrupts it at once, again and again. After so many such cuts in a row no
# voice does, until the caller says other words than the model's or an item is heard to its end.
MAX_ECHOES, ECHO_MS = 3, 2000
CALLS_OFF_MS, CALLED_OFF_S = 700.0, 8.0  # voice calls a hang-up off; then silence ends the call
WORDS_S, WORDS_AT_END_S, GOODBYE_S = 10.0, 0.8, 15.0  # the longest wait for each
MAX_QUEUED_S, MAX_HISTORY = 300.0, 200  # speech at Twilio; texts that a new session is told
MAX_TEXT = 20_000  # characters of one of them
MAX_TOOLS, MAX_TOOL_ROUNDS = 16, 8  # of one response; in a row without a sound
HARMLESS = {"response_cancel_not_active", "conversation_already_has_active_response"}  # crossed
# What a new session does not mend: an error's code or type; an HTTP status, OpenAI's close code.
FINAL = {"insufficient_quota", "credit_balance_exhausted", "invalid_api_key"}
REFUSALS = {*range(300, 500), *range(3000, 5000)} - {408, 425, 429}
# The form of nearly all of Twilio's media messages, because to match costs less than to parse.
MEDIA = re.compile(
    r'(?a){"event":"media"[^{]*{.*?timestamp":"(\d{1,12})","payload":"([a-zA-Z0-9+/]+={0,2})"'
)
# Words that agree or take leave: they call no hang-up off. Each is read in one way only (?>…)++.
CLOSING = re.compile(
    "(?i)(?>はい|ええ|うん|いいえ|いえ|じゃあ|じゃ|それでは|では|どうも|結構です|大丈夫です"
    "|わかりました|承知しました|ありがとう(?>ございます|ございました)?|お願い(?>し|いたし)ます"
    "|よろしく|すみません|失礼(?>し|いたし)ま(?>す|した)|さよう?なら|おやすみなさい|お疲れ様です"
    "|バイバイ|あっ|あ|yes|ok|thank(?>you|s)|(?>good)?bye)++"
)


@dataclass(slots=True)
class Answer:  # the response in progress: from OpenAI's response.created to its response.done
    id: str
    created_at: float
    life_at: float  # when its last event came
    sounded: bool = False
    cut: bool = False  # it was interrupted, or is unwanted: no more of it goes to Twilio


@dataclass(slots=True)
class Ending:  # the call is to end as soon as the caller has heard what the model says
    reason: str  # for call_ended
    twiml: str  # what /twilio/next responds with
    final: bool  # no caller calls it off by talking
    deadline: float  # when it ends in any case
    called_off_by: str = ""  # the item of the turn that called it off


class Call:  # what Twilio has, what OpenAI has, and what is owed to the caller
    def __init__(self, bridge: Bridge, sid: str, caller: str, called: str, next_url: str) -> None:
        self.bridge, self.loop, self.began_at = bridge, asyncio.get_running_loop(), monotonic()
        self.sid, self.stream_sid = sid, ""  # Twilio's "CA…" and "MZ…" (once the stream is open)
        self.caller, self.called = caller, called  # "+81…", but also "anonymous" or a SIP address
        self.notes: Object = {}  # for hooks and tools; the bridge does not look at it
        self.next_url, self.reconnects = next_url, 0  # where Twilio asks what is next; how often
        self.log = logging.LoggerAdapter(log, {"call": sid})
        self.twilio: TwilioConnection | None = None  # once the stream is open
        self.openai: OpenAIConnection | None = None  # the latest; may be closed
        self.session, self.lost_at = 0, self.began_at  # its number; since when none is ready
        self.ready_at = 0.0  # when OpenAI accepted session.update; 0: it has not
        self.cause = self.failed = ""  # why the last session was lost; why the call is given up
        self.history: dict[str, tuple[str, str]] = {}  # item -> role, text; for a new session
        self.playback, self.audio = Playback(), CallerAudio()
        self.notices: deque[bytes] = deque(maxlen=8)  # sounds of `play`, until the model is silent
        self.turns: dict[str, float] = {}  # item -> when the caller stopped (inf: not yet)
        self.speaking, self.speaking_at = "", 0.0  # the turn that is being spoken; since when
        self.undecided = False  # … over the model, and not yet enough to interrupt it
        self.unwanted_until = 0.0  # a response that begins until then may be to a backchannel
        self.echoes, self.last_words = 0, ""  # see MAX_ECHOES; of the last item that was heard
        # What the model owes the caller: None, or the `response` of the response.create that asks
        # for it. The sound of a response created since then clears it; so do tool calls.
        self.owed: Object | None = None
        self.owed_at = self.quiet_until = 0.0  # since when; the bridge asks no sooner
        self.attempts = self.tool_rounds = 0  # to have it; silent rounds of tools in a row
        self.asked_at = 0.0  # the oldest request that no event has followed; 0: none
        self.active: Answer | None = None
        self.tools: asyncio.Task[None] | None = None  # that the last response called
        self.ending: Ending | None = None
        self.over: asyncio.Future[str] = self.loop.create_future()  # why the call has ended
        self.timer = self.loop.call_later(TICK_S, self.tick)
        self.life = asyncio.create_task(self.live())

    # ── Twilio's messages: https://www.twilio.com/docs/voice/media-streams/websocket-messages ──

    def from_twilio(self, text: str) -> None:
        if (media := MEDIA.match(text)) and len(media[2]) % 4 == 0:
            self.from_caller(media[2], int(media[1]))
            return
        message = json.loads(text)
        match message["event"]:
            case "media":  # whatever the timestamp is, no audio is lost
                payload, at = message["media"]["payload"], str(message["media"]["timestamp"])
                base64.b64decode(payload, validate=True)
                self.from_caller(payload, int(at) if re.fullmatch(r"(?a)\d{1,12}", at) else -1)
            case "mark":
                self.playback.mark_returned(int(message["mark"]["name"]), monotonic())
            case "dtmf" if (key := message["dtmf"]["digit"]) in list("0123456789*#"):
                self.emit("key_pressed", key=key)
            case "stop":
                self.end("caller hung up")
        self.go_on()

    def from_caller(self, payload: str, timestamp_ms: float) -> None:  # usually 20 ms of sound
        now, audio = monotonic(), self.audio
        size = len(payload) * 3 // 4 - payload[-2:].count("=")  # of base64, without decoding it
        if gap_ms := audio.take(timestamp_ms, size / 8, now):
            self.log.info("%.0f ms of the caller's audio are missing: filled with silence", gap_ms)
            # 30 s are enough, because they end any sentence.
            mulaw = b"\xff" * round(min(gap_ms, 30_000) * 8) + base64.b64decode(payload)
            payload = base64.b64encode(mulaw).decode()
        audio.keep(payload, not self.ready_at or self.speaking != "")
        if self.ready_at and self.openai:
            self.openai.put('{"type":"input_audio_buffer.append","audio":"' + payload + '"}')
        if voice := audio.voice:  # enough of it interrupts the model, or calls a hang-up off
            voice.add(base64.b64decode(payload))
            # A caller too quiet for our measure counts by OpenAI's, less the silence in that.
            spoken_ms = max(voice.ms, (now - self.speaking_at) * 1000 - self.bridge.vad_ms - 200)
            if self.undecided and spoken_ms >= self.bridge.barge_in_ms and self.echoes < MAX_ECHOES:
                self.stop_model(now)
            if voice.ms >= CALLS_OFF_MS:
                self.call_off(self.speaking)
        if self.bridge.hooks.handling["caller_audio"]:
            self.emit("caller_audio", mulaw=base64.b64decode(payload))

    # ── OpenAI's events: https://platform.openai.com/docs/api-reference/realtime ──
    # A turn of the caller's: speech_started, speech_stopped, committed; its words come later.
    # A response: response.created; for each of its items words and sound, both faster than they
    # are spoken; response.done. Other events need nothing. `"" +` refuses an id that is no text.

    def from_openai(self, text: str) -> None:
        event, now = json.loads(text), monotonic()
        self.asked_at, self.audio.unnoticed = 0.0, False  # OpenAI is alive
        match event["type"]:
            case "response.created":
                unwanted = self.owed is None and now < self.unwanted_until  # to a backchannel
                self.active, self.unwanted_until = Answer("" + event["response"]["id"], now, now), 0
                if unwanted or (self.speaking and not self.model_heard(now)):  # they talk on
                    self.cancel(self.active)
            case str(kind) if kind.startswith("response."):
                of = event.get("response_id") or event["response"]["id"]
                if (answer := self.active) and answer.id == of:  # else it is over
                    answer.life_at = now
                    if kind == "response.done":
                        self.response_done(answer, event["response"])
                    elif kind.startswith("response.output_audio"):
                        self.from_model(kind, answer, event, now)
            case "session.updated" if not self.ready_at:
                self.session_updated(event["session"]["audio"], now)
            case "error":
                self.on_error(event["error"])
            case "input_audio_buffer.speech_started":
                self.caller_started("" + event["item_id"], now)
            case "input_audio_buffer.speech_stopped":
                self.caller_stopped("" + event["item_id"], now)
            case "input_audio_buffer.committed":
                if event["item_id"] == self.speaking:  # its speech_stopped was lost
                    self.caller_stopped(self.speaking, now)
                self.remember(event["item_id"], "user", "")  # its place; the words come later
            case "input_audio_buffer.timeout_triggered":
                self.owe(pause_s=ANSWERS_S)  # idle_timeout_ms has passed: OpenAI speaks by itself
            case "conversation.item.input_audio_transcription.completed":
                self.used("transcription", event.get("usage"))
                self.caller_said(event["item_id"], event["transcript"].strip())
            case "conversation.item.input_audio_transcription.failed":
                self.fault(f"no words for a turn ({event.get('error')}): the call goes on")
                self.caller_said(event["item_id"], "")
        if not event["type"].endswith("delta"):  # which make nothing due
            self.go_on()

    def from_model(self, kind: str, answer: Answer, event: Object, now: float) -> None:
        if not (item := self.playback.items.get("" + event["item_id"])):
            item = Item(event["item_id"], answer.id, self.session)
            self.playback.items[item.id] = item
            self.remember(item.id, "assistant", "")
        if kind != "response.output_audio.delta":
            if kind == "response.output_audio_transcript.done":
                item.text = event["transcript"][:MAX_TEXT]
            elif kind == "response.output_audio_transcript.delta":
                item.text = (item.text + event["delta"])[:MAX_TEXT]
                if not answer.cut:
                    self.emit("model_words", item=item.id, text=event["delta"])
            return
        mulaw = base64.b64decode(event["delta"], validate=True)
        size = len(mulaw)
        item.made += size
        if answer.cut:
            if not item.ends and item.heard_ms is None:  # it began after the cut
                self.truncate(item)
        elif self.playback.left_s(now) + size / 8000 > MAX_QUEUED_S:
            self.fault(f"speech beyond {MAX_QUEUED_S:g} s is dropped: its response is cancelled")
            self.cancel(answer)
        elif size and not self.over.done():
            self.notices.clear()
            if "" in self.playback.items:  # a sound of `play`
                self.clear(now)
            if not item.ends:
                self.emit("model_started_speaking", item=item.id)
            answer.sounded, self.tool_rounds = True, 0
            if answer.created_at >= self.owed_at:
                self.owed = None
            self.to_twilio(item, event["delta"], size, now)
            if self.bridge.hooks.handling["model_audio"]:
                self.emit("model_audio", mulaw=mulaw)

    def to_twilio(self, item: Item, payload: str, size: int, now: float) -> None:
        if self.twilio:
            mark, sid = self.playback.add(item, size, now), f'"streamSid":"{self.stream_sid}"'
            media = f'{{"event":"media",{sid},"media":{{"payload":"{payload}"}}}}'
            self.twilio.put(media, f'{{"event":"mark",{sid},"mark":{{"name":"{mark}"}}}}')

    # ── Turns and barge-in ──
    # A caller who speaks over the model interrupts it after BARGE_IN_MS of voice. 「はい」 or a
    # cough is shorter: the model speaks on, and OpenAI's response to it is cancelled. To interrupt
    # is this: `clear` empties Twilio's queue, each item is truncated in the model's memory at what
    # was heard of it, the response is cancelled, and what still comes of it is dropped.

    def model_heard(self, now: float) -> bool:  # or will be in a moment
        making = self.active and self.active.sounded and not self.active.cut
        return bool(making) or (self.playback.left_s(now) > 0 and "" not in self.playback.items)

    def caller_started(self, item_id: str, now: float) -> None:
        if self.speaking:  # its end was lost
            self.caller_said(self.speaking, "")
        else:
            self.speaking_at = now
        self.speaking, self.turns[item_id] = item_id, math.inf
        self.emit("caller_started_speaking", item=item_id)
        at_once = self.bridge.barge_in_ms == 0 and self.echoes < MAX_ECHOES
        self.undecided = self.model_heard(now) and not at_once
        if not self.undecided:
            self.stop_model(now)
        if self.undecided or self.ending:
            self.audio.voice = Voice(self.audio.last_second())

    def stop_model(self, now: float, by_voice: bool = True) -> None:
        self.undecided = False
        if by_voice and self.active and self.bridge.barge_in_ms == 0:
            self.active.cut = True  # OpenAI cancels it by itself
        elif self.active and not self.active.cut:
            self.cancel(self.active)
        cut = self.clear(now)
        for item in cut:
            self.truncate(item)
        for item in cut[:1]:
            self.last_words, sent_ms = item.text, (item.ends - item.begins) // 8
            self.emit("model_interrupted", item=item.id, heard_ms=item.heard_ms, sent_ms=sent_ms)
            if by_voice:
                self.echoes = self.echoes + 1 if (item.heard_ms or 0) < ECHO_MS else 0

    def clear(self, now: float) -> list[Item]:  # returns the items that were not heard to their end
        self.notices.clear()
        if self.twilio and self.playback.marks:
            self.twilio.put(f'{{"event":"clear","streamSid":"{self.stream_sid}"}}')
        return [item for item in self.playback.cut(now) if item.id]

    def cancel(self, answer: Answer) -> None:
        answer.cut = True
        self.to_openai("response.cancel", response_id=answer.id)

    def truncate(self, item: Item) -> None:
        item.heard_ms = ms = item.heard_ms or 0
        if item.session == self.session:
            where = {"item_id": item.id, "content_index": 0}
            self.to_openai("conversation.item.truncate", **where, audio_end_ms=ms)
        else:  # this session was told all of it
            self.add_text("system", HEARD_ONLY + item.heard_text)

    def caller_stopped(self, item_id: str, now: float) -> None:
        last_sound_at = max(self.speaking_at, now - self.bridge.vad_ms / 1000)
        self.speaking, self.turns[item_id], self.audio.turn = "", now, len(self.audio.kept)
        self.emit("caller_stopped_speaking", item=item_id)
        # What is said at the model's last words is an answer, however short. With "off" every
        # turn is one. During an ending no turn is, unless it has called that off.
        at_last_words = self.playback.left_s(last_sound_at) < LAST_WORDS_S
        at_last_words = at_last_words and not (self.active and not self.active.cut)
        backchannel = self.undecided and not at_last_words and self.bridge.barge_in_ms < math.inf
        self.undecided, self.audio.voice = False, None
        if backchannel or (self.ending and not self.ending.called_off_by):
            self.unwanted_until = now + UNWANTED_S
        else:
            vad = self.bridge.session["audio"]["input"].get("turn_detection") or {}
            self.owe(pause_s=ANSWERS_S if vad.get("create_response", True) else 0.0)
        if not self.bridge.transcriber:
            self.caller_said(item_id, "")

    def caller_said(self, item_id: str, words: str) -> None:  # once for each turn; "": none
        if self.turns.pop(item_id, None) is None:
            return
        self.remember(item_id, "user", words)
        self.emit("caller_said", item=item_id, text=words)
        if words and not self.speaking and not self.turns:
            self.audio.forget_turn()
        if bare := re.sub(r"\W", "", words):
            echo = bare in re.sub(r"\W", "", self.last_words)  # of the model, perhaps
            self.echoes = self.echoes if echo else 0
            if not CLOSING.fullmatch(bare) and not (echo and len(bare) > 3):
                self.call_off(item_id)
            elif self.ending and self.ending.called_off_by == item_id:  # their voice did, in vain
                self.ending.called_off_by, self.owed = "", None
                self.unwanted_until = monotonic() + UNWANTED_S
                if self.active and not self.active.sounded:
                    self.cancel(self.active)

    # ── What the model owes the caller ──
    #     owed ─ 1.5 s ─ ask ─ 2.5 s ─ ask ─ 2.5 s ─ new session, ask ─ 2.5 s ─ apology
    # A response that fails, is refused, empty or never comes, and a session that is lost or deaf
    # are one case, because something is still owed.

    def owe(self, create: Object | None = None, pause_s: float = 0.0, again: bool = False) -> None:
        """The model owes the caller its voice from now on; `again`: it still does."""
        if not again or self.owed is None:
            self.owed, self.owed_at = create or {}, monotonic()
        asked_until = self.quiet_until if self.asked_at else 0.0  # a request is on its way
        self.quiet_until = max(monotonic() + pause_s, asked_until)

    def go_on(self) -> None:
        now = monotonic()
        for item in self.playback.settle(now, self.active.id if self.active else None):
            if item.id and item.ends:
                self.remember(item.id, "assistant", item.heard_text)
                if item.heard_ms is None:
                    self.last_words = item.text
                    self.echoes = self.echoes if self.model_heard(now) else 0  # more may be cut
                self.emit("model_said", item=item.id, text=item.text, heard_ms=item.heard_ms)
        if not self.failed and not self.over.done():
            self.look_after_model(now)
        if self.notices and not (self.playback.left_s(now) or self.model_heard(now)):
            mulaw, item = self.notices.popleft(), self.playback.items.setdefault("", Item(""))
            self.to_twilio(item, base64.b64encode(mulaw).decode(), len(mulaw), now)
        if (ending := self.ending) and self.stream_sid:
            # Words that come in a moment may call it off.
            talks = self.speaking or any(now - at < ANSWERS_S for at in self.turns.values())
            waits = self.busy or self.notices or self.playback.marks or (talks and not ending.final)
            if ending.called_off_by and (self.busy or self.speaking):
                ending.deadline = now + CALLED_OFF_S
            if now > ending.deadline or not (waits or ending.called_off_by):
                self.end(ending.reason, ending.twiml)

    def look_after_model(self, now: float) -> None:
        if (answer := self.active) and now - answer.life_at > DEAD_S:
            self.fault(f"a response gave no sign of life for {DEAD_S:g} s: cancelled")
            if not answer.cut:
                self.owe(again=True)
            self.cancel(answer)
            self.active = None
        sounds = self.active and self.active.sounded
        waits = self.owed is not None and not (sounds or self.speaking or self.tools)
        limit_s = SILENCE_S if self.history else GREETING_S
        due = waits and self.ready_at and not self.active and now >= self.quiet_until
        if not self.ready_at and now - self.lost_at > SESSION_S:
            self.give_up(f"no session for {SESSION_S:g} s ({self.cause or 'no answer'})")
        elif waits and now - self.owed_at > limit_s:
            self.give_up(f"no sound for {limit_s:g} s")
        elif due and self.attempts > 3:
            self.give_up("the model says nothing, in a new session as well")
        elif (self.asked_at and now - self.asked_at > DEAF_S) or (due and self.attempts == 2):
            self.fault("the model was asked and says nothing: a new session")
            if self.owed is None:
                self.owed, self.owed_at = {}, self.asked_at
            self.attempts += bool(due)
            self.ready_at, self.asked_at, self.lost_at = 0.0, 0.0, now
            if self.openai:
                self.openai.shut()  # `keep_session` connects again
                self.cause = "closed with 1000"  # by us, which is told already
        elif due:
            self.attempts, self.asked_at = self.attempts + 1, self.asked_at or now
            self.quiet_until = now + ASK_AGAIN_S
            more = {"tool_choice": "none"} if self.tool_rounds >= MAX_TOOL_ROUNDS else {}
            self.to_openai("response.create", event_id="ask", response=(self.owed or {}) | more)
            self.emit("model_asked")

    def response_done(self, answer: Answer, response: Object) -> None:
        status, details = response.get("status", "completed"), response.get("status_details") or {}
        error = details.get("error") or {}
        why = error.get("code") or details.get("reason") or status
        calls = [item for item in response.get("output") or [] if item["type"] == "function_call"]
        calls = [call for call in calls if call.get("status", "completed") == "completed"]
        self.active = None
        self.used("response", response.get("usage"))
        if FINAL & set(map(str, error.values())):
            self.give_up(f"{why}: {error.get('message')}")
        elif status == "completed" and calls and self.tool_rounds < MAX_TOOL_ROUNDS:
            self.owed, self.attempts = None, 0
            self.tool_rounds += not answer.sounded
            self.tools = asyncio.create_task(self.use_tools(calls[:MAX_TOOLS], answer))
        elif answer.sounded and (status == "completed" or answer.cut):
            self.attempts = 0
            self.audio.forget_turn()
        elif not answer.sounded and not answer.cut:
            self.fault(f"a response brought no sound ({why}): the model is asked again")
            self.owe(again=True, pause_s=max(ANSWERS_S, self.quiet_until - monotonic()))
        elif status in ("failed", "incomplete"):
            self.fault(f"a response broke off ({why}): the call goes on")

    async def use_tools(self, calls: list[Object], answer: Answer) -> None:  # side by side
        uses = [self.use_tool(call, answer.cut) for call in calls]
        wanted = await asyncio.gather(*uses, return_exceptions=True)
        self.tools = None
        if any(wanted) and not (self.ending and answer.sounded):  # one goodbye is enough
            self.owe()
        self.go_on()

    async def use_tool(self, call: Object, cut: bool) -> bool:  # is the model to speak about it?
        session, began_at, call_id = self.session, monotonic(), call.get("call_id")
        name, arguments = str(call.get("name")), str(call.get("arguments") or "{}")
        # A response to a backchannel is cut as well: 「はい」 must not book anything.
        result = NOT_DONE if cut else await self.bridge.hooks.run_tool(self, name, arguments)
        text, seconds = result or "", monotonic() - began_at
        self.remember(f"tool {call_id}", "system", known := f"{name}({arguments}) → {text}")
        if session == self.session:
            item = {"type": "function_call_output", "call_id": call_id, "output": text}
            self.to_openai("conversation.item.create", item=item)
        else:  # the session that called it is gone: the next one is told in words
            self.add_text("system", known)
        self.emit("tool_used", name=name, arguments=arguments, result=text, seconds=seconds)
        return result is not None and not cut

    # ── The session with the model ──
    # It is connected at the webhook, so that the greeting is being made when the stream opens. A
    # new session knows nothing: it is told what both sides have said, and of the model's items only
    # what was heard. Then it gets the caller's audio that the old one had not answered.

    async def keep_session(self) -> None:
        pause_s = 0.25
        while not self.failed:
            try:
                async with self.bridge.connect() as openai:
                    self.openai, self.session = openai, self.session + 1
                    openai.handle = self.from_openai
                    self.to_openai("session.update", session=self.bridge.session)
                    await openai.read()
                code, why = openai.close_code or 0, openai.close_reason or ""
                cause = f"closed with {code} {why}".strip()
            except Exception as exc:  # refused, reset, a broken handshake, an unknown name …
                cause, refusal = str(exc) or type(exc).__name__, getattr(exc, "response", None)
                code, why = (refusal.status_code, str(refusal.body)) if refusal else (0, "")
            if self.ready_at and (now := monotonic()) - self.ready_at > LASTED_S:
                self.lost_at, pause_s, self.cause = now, 0.25, ""
            # What was in progress is over. The texts and the caller's audio stay.
            self.ready_at = self.asked_at = 0.0
            if self.active and not self.active.cut:
                self.owe(again=True)
            self.active = None
            for item in self.playback.items.values():  # what Twilio has of them is heard
                self.remember(item.id, "assistant", item.heard_text)
            self.caller_said(self.speaking, "")  # the next session gets all of that turn
            self.speaking, self.undecided, self.audio.voice = "", False, None
            if code in REFUSALS or any(word in why for word in FINAL):
                self.give_up(f"{cause} (are OPENAI_API_KEY and the model right, and paid for?)")
            elif cause != self.cause and not self.failed:
                self.fault(f"no session with OpenAI ({cause}): connecting again")
            self.cause = cause
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def session_updated(self, audio: Object, now: float) -> None:  # what OpenAI made of it
        if any(audio[way]["format"]["type"] != "audio/pcmu" for way in ("input", "output")):
            self.give_up("OpenAI accepted another format than audio/pcmu: that would be noise")
            return
        self.ready_at = now
        for role, text in self.history.values():
            if text:
                self.add_text(role, text)
        if self.audio.dropped:
            self.log.warning("the new session misses %d ms of audio", self.audio.dropped * 20)
        for payload in self.audio.kept:
            self.to_openai("input_audio_buffer.append", audio=payload)
        self.quiet_until = now + ASK_AGAIN_S if self.audio.turn else 0.0  # it may find that turn
        if self.openai and not self.stream_sid:  # what it says waits unread for the caller
            self.openai.transport.pause_reading()

    def on_error(self, error: Object) -> None:  # most are recoverable, and the session stays open
        text, audio = f"{error.get('code')}: {error.get('message')}", self.bridge.session["audio"]
        optional = not self.ready_at and "transcription" in str(error)
        if optional and audio["input"].pop("transcription", None):
            self.fault(f"{text}: from now on without transcription")
            self.bridge.transcriber = ""
            self.to_openai("session.update", session=self.bridge.session)
        elif not self.ready_at and error.get("type") == "server_error":
            self.fault(f"{text}: connecting again")
            if self.openai:
                self.openai.shut()
        elif not self.ready_at or FINAL & set(map(str, error.values())):
            self.give_up(f"OpenAI refuses: {text} ({error.get('param')})")
        elif error.get("code") not in HARMLESS:
            self.fault(f"{text}: the call goes on")
        if error.get("event_id") == "ask":
            self.quiet_until = monotonic() + FAILED_S

    def fault(self, error: str) -> None:  # it also says what the bridge does about it
        self.log.warning("%s", error := clean(error))
        self.emit("model_failed", error=error)

    def give_up(self, why: str) -> None:  # the caller hears an apology, not silence
        if not self.failed and not self.over.done():
            self.failed, self.ready_at = why, 0.0
            self.fault(f"{why}: the caller hears an apology")
            if self.openai:
                self.openai.shut()
            self.end_when_heard("model lost", say(APOLOGY), final=True)

    def to_openai(self, kind: str, **content: Any) -> None:
        if self.openai and (self.ready_at or kind == "session.update"):
            text = json.dumps({"type": kind, **content}, ensure_ascii=False)
            self.openai.put(text.encode(errors="replace").decode())  # half an emoji has no UTF-8

    def add_text(self, role: str, text: str) -> None:
        content = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
        item = {"type": "message", "role": role, "content": [content]}
        self.to_openai("conversation.item.create", item=item)

    def remember(self, item_id: str, role: str, text: str) -> None:
        """Who said what, in the order of the conversation. "" only takes the place."""
        if item_id and (text or item_id not in self.history):
            self.history[item_id] = (role, text)
            if len(self.history) > MAX_HISTORY:
                del self.history[next(iter(self.history))]

    # ── For hooks and tools; from any thread ──

    @property
    def busy(self) -> bool:
        """The model is heard, is about to speak, or a tool runs."""
        more_comes = not self.failed and (self.owed is not None or self.active or self.tools)
        return bool(more_comes or (self.playback.marks and "" not in self.playback.items))

    def tell_model(self, text: str) -> None:
        """Tell the model something that the caller has not said, and let it speak about that."""
        self.soon(lambda: self.tell(text))

    def interrupt(self) -> None:
        """Stop what the model says, exactly as a caller's barge-in does."""
        self.soon(lambda: self.stop_model(monotonic(), by_voice=False))

    def play(self, mulaw: bytes) -> None:
        """Play G.711 mu-law, 8 kHz, a minute at most, when the model is silent. Its next words, or
        the caller's, stop it."""
        self.soon(lambda: self.notices.append(bytes(mulaw[: 60 * 8000])))

    def hang_up(self, final: bool = False) -> None:
        """End the call when the caller has heard what the model says. A caller who goes on talking
        calls it off, unless it is `final`; the model is told so."""
        self.soon(lambda: self.end_when_heard("hung up", HANG_UP, final))

    def transfer(self, number: str) -> None:
        """Connect the caller with another telephone when they have heard what the model says.
        Raises ValueError for what is no number in E.164 form, such as +81312345678."""
        if not E164.fullmatch(number):
            raise ValueError("that is no telephone number: give one such as +81312345678 (E.164)")
        # Without callerId Twilio shows the caller's own number, which not every caller has.
        shown = "" if E164.fullmatch(self.caller) else f" callerId={quoteattr(self.called)}"
        action = f'action={quoteattr(self.next_url)} method="POST" timeout="20"'
        after = twiml(f"<Dial {action}{shown}>{number}</Dial>")
        self.soon(lambda: self.end_when_heard("transferred", after, final=True))

    def soon(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the bridge has ended
            self.loop.call_soon_threadsafe(lambda: self.over.done() or act())
            self.loop.call_soon_threadsafe(self.go_on)

    def tell(self, text: str) -> None:
        self.remember(f"told {secrets.token_hex(8)}", "system", text)
        self.add_text("system", text)
        self.owe()

    def emit(self, event: str, **facts: Any) -> None:
        if self.stream_sid:  # before, call_started has not been told
            self.bridge.hooks.emit(event, self, monotonic(), facts)

    def used(self, kind: str, usage: Object | None) -> None:
        if model := self.bridge.model if kind == "response" else self.bridge.transcriber:
            self.emit("model_used", usage=usage, model=model, kind=kind)

    # ── The end ──
    #     hang_up, transfer, limit, give_up, shutdown ── end_when_heard ── heard ──┐
    #     `stop`, a lost stream, no stream ────────────────────────────────────────┴─ end ── live
    # `live` closes the stream. Then Twilio asks /twilio/next, and gets the ending's TwiML.

    def end_when_heard(self, reason: str, twiml: str, final: bool = False) -> None:
        now, ending = monotonic(), self.ending
        if ending and (ending.final or (final and reason != "transferred")):  # final from now on
            ending.final, ending.called_off_by = True, ""
        else:
            self.ending = Ending(reason, twiml, final, now + self.playback.left_s(now) + GOODBYE_S)

    def call_off(self, item_id: str) -> None:  # the caller goes on talking: no end yet
        ending = self.ending
        if ending and not ending.final and not ending.called_off_by:
            ending.called_off_by, ending.deadline = item_id, monotonic() + CALLED_OFF_S
            self.log.info("the end (%s) is called off: the caller goes on talking", ending.reason)
            self.tell(CALLED_OFF)
        elif ending and ending.called_off_by not in ("", item_id):  # they go on and on
            self.ending = None

    def end(self, reason: str, twiml: str = "") -> None:
        """End the call now. Without TwiML others ended it: if Twilio asks, it goes on."""
        if not self.over.done():
            twiml = twiml or ("" if self.stream_sid else say(APOLOGY))
            self.bridge.ended(self.sid, Past(twiml, self.history, self.notes, self.reconnects))
            self.over.set_result(reason)

    def tick(self) -> None:  # four times a second: all that time alone brings about
        now, audio = monotonic(), self.audio
        self.timer = self.loop.call_later(TICK_S, self.tick)
        if not self.stream_sid:
            if now - self.began_at > UNCLAIMED_S:
                self.end("no stream came")
            return
        if now - self.began_at > self.bridge.settings.max_call_seconds:
            self.end_when_heard("time limit", say(TIME_IS_UP), final=True)
        if self.speaking and (gap_s := now - audio.frame_at) > STALL_S:
            self.from_caller("", audio.position_ms + gap_s * 1000)  # silence
        for item_id, stopped_at in list(self.turns.items()):
            if now - stopped_at > WORDS_S:
                self.caller_said(item_id, "")
        # A deaf session sends no event, not even speech_started. So after a loud voice, 2 s of
        # quiet and no event, the bridge sends what every live session responds to.
        quiet_s = audio.listen(now)
        if self.ready_at and audio.unnoticed and quiet_s > 2 and not self.asked_at:
            self.asked_at = now
            self.to_openai("session.update", session={"type": "realtime"})  # no change
        if self.speaking and min(quiet_s, now - self.speaking_at) > TURN_LOST_S:
            self.caller_stopped(self.speaking, now)  # its speech_stopped was lost
        self.go_on()

    def open_stream(self, twilio: TwilioConnection, stream_sid: str) -> None:
        now = monotonic()
        self.twilio, self.stream_sid, twilio.handle = twilio, stream_sid, self.from_twilio
        self.audio.frame_at = self.owed_at = now  # from now on the caller waits
        self.emit("call_started")
        if why := self.failed or self.cause:  # told now, for nobody was told before
            self.emit("model_failed", error=clean(why))
        if self.openai:
            self.openai.transport.resume_reading()
        if self.attempts:  # the greeting is asked for already
            self.asked_at, self.quiet_until = now, now + ASK_AGAIN_S
            self.emit("model_asked")
        self.go_on()

    async def live(self) -> None:
        session, reason = asyncio.create_task(self.keep_session()), "shutdown"
        try:
            reason = await self.over
            self.playback.cut(monotonic())
            if self.twilio:
                self.twilio.shut()
            until = monotonic() + WORDS_AT_END_S  # OpenAI may still owe words and usage
            while self.ready_at and monotonic() < until:
                if not self.active and all(at == math.inf for at in self.turns.values()):
                    break
                await asyncio.sleep(0.02)
            if self.active:
                self.used("response", None)
                self.active = None
            self.go_on()
            for item_id in list(self.turns):
                self.used("transcription", None)
                self.caller_said(item_id, "")
        finally:
            self.timer.cancel()
            tasks = [task for task in (session, self.tools) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.bridge.calls.get(self.sid) is self:
                del self.bridge.calls[self.sid]
            self.emit("call_ended", reason=reason)


def session_update(settings: Settings, model: str, tools: list[Object]) -> tuple[Object, float]:
    """The `session` of session.update, and the ms of voice that interrupt. OpenAI refuses a session
    with an unknown key as a whole. With BARGE_IN_MS above 0 it is the bridge that interrupts, but
    SESSION's own interrupt_response wins: false is "off", true is 0."""
    pcmu = {"type": "audio/pcmu"}  # 8 kHz by definition: a `rate` key is an unknown parameter
    # Documented and observed defaults differ (silence_duration_ms: 500, 200): all are written out.
    vad = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300}
    audio: Object = {"format": pcmu, "turn_detection": vad | {"silence_duration_ms": 500}}
    if settings.transcription_model:
        audio["transcription"] = {"model": settings.transcription_model}
    session: Object = {"type": "realtime", "instructions": settings.instructions}
    session["audio"] = {"input": audio, "output": {"format": pcmu, "voice": settings.voice}}
    session["output_modalities"] = ["audio"]  # or a model may reply with text that nobody hears
    if re.match(r"gpt-realtime-2(\.\d+)?(-|$)", model):  # those that reason
        session["reasoning"] = {"effort": "low"}
    if tools:
        session |= {"tools": tools, "tool_choice": "auto"}
    session, barge_in_ms = merge_patch(session, settings.session), settings.barge_in_ms
    if turns := session["audio"]["input"].get("turn_detection"):
        if (own := turns.get("interrupt_response")) is not None:
            barge_in_ms = 0.0 if own else math.inf
        ours = {"create_response": True, "interrupt_response": barge_in_ms == 0}
        session["audio"]["input"]["turn_detection"] = ours | turns
    return session, barge_in_ms


def clean(text: str) -> str:
    """What a stranger or the other side wrote, as a log can take it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)[:500]


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396; but an object whose `type` the patch changes is replaced."""
    if not isinstance(patch, Mapping):
        return patch
    old = target if isinstance(target, Mapping) else {}
    merged = dict(old) if patch.get("type", old.get("type")) == old.get("type") else {}
    merged |= {key: merge_patch(merged.get(key), value) for key, value in patch.items()}
    return {key: value for key, value in merged.items() if value is not None}


# ── 3 Playback ──────────────────────────────────────────────────────────────────────────────────
#
# OpenAI sends speech several times faster than it is spoken. Twilio queues it, and plays it in
# order and without a pause. So one line of bytes and one clock tell what the caller has heard:
#
#     ├── item A ───────────────┼── item B ─────────────────┤
#             ↑ heard                                       ↑ sent: will be played at `ends_at`
#
# A mark follows each piece and is named by its position, which is bytes since the call began.
# Twilio returns it when all before it has been played, which sets the clock right. Those that
# `clear` flushes come back as well; they are no longer in `marks`, so they mean nothing.

MARK_PATIENCE_S = 2.0  # a mark that is later than this will not come: the clock counts


@dataclass(slots=True)
class Item:  # a conversation item that the model speaks; a response may hold several
    id: str  # OpenAI's; "" is a sound from outside the model (`Call.play`)
    response_id: str = ""
    session: int = 0  # a later session does not know it
    begins: int = 0  # position of its first byte
    ends: int = 0  # position behind the last byte that Twilio was given; 0: nothing so far
    made: int = 0  # bytes that OpenAI sent, those included that nobody will hear
    text: str = ""  # its words so far
    heard_ms: int | None = None  # where a barge-in cut it

    @property
    def heard_text(self) -> str:  # of an item that was cut, the share of its words that was heard
        heard = 1.0 if self.heard_ms is None else self.heard_ms * 8 / max(1, self.made)
        return self.text[: round(len(self.text) * heard)]


class Playback:  # what Twilio was given, and how much of it the caller has heard; no I/O
    def __init__(self) -> None:
        self.sent, self.ends_at = 0, 0.0  # bytes; when the last of them will have been played
        self.marks: deque[int] = deque()  # positions of the marks that Twilio has not returned
        self.items: dict[str, Item] = {}  # by id, in order, until it is known what was heard

    def add(self, item: Item, size: int, now: float) -> int:
        """Twilio is given `size` bytes of an item. Returns the position that names the mark."""
        item.begins = item.begins if item.ends else self.sent
        self.ends_at = max(self.ends_at, now) + size / 8000
        self.sent = item.ends = self.sent + size
        self.marks.append(self.sent)
        return self.sent

    def mark_returned(self, position: int, now: float) -> None:
        if position in self.marks:
            while self.marks and self.marks[0] <= position:
                self.marks.popleft()
            self.ends_at = now + (self.sent - position) / 8000

    def left_s(self, now: float) -> float:  # how long the caller goes on hearing what Twilio has
        return max(0.0, self.ends_at - now) if self.marks else 0.0

    def heard(self, now: float) -> int:  # up to this position, but never beyond a mark that is out
        return min(self.sent - int(self.left_s(now) * 8000), *self.marks, self.sent)

    def cut(self, now: float) -> list[Item]:
        """Twilio's queue is cleared. Returns the items that were not heard to their end."""
        heard, self.ends_at = self.heard(now), now
        self.marks.clear()
        cut = [item for item in self.items.values() if item.ends > heard]
        for item in cut:
            item.heard_ms = max(0, heard - item.begins) // 8
        return cut

    def settle(self, now: float, active: str | None) -> list[Item]:
        """Takes out the items of which it is known now how much was heard, but not those of the
        `active` response, because more of them may come."""
        if now > self.ends_at + MARK_PATIENCE_S:
            self.marks.clear()
        out = self.marks[0] if self.marks else self.sent + 1
        known = [item for item in self.items.values() if item.response_id != active]
        known = [item for item in known if item.heard_ms is not None or item.ends < out]
        for item in known:
            del self.items[item.id]
        return known


# ── 4 Caller audio ──────────────────────────────────────────────────────────────────────────────
#
# OpenAI's VAD knows no clock but the audio: 20 ms of it for each 20 ms. Twilio sometimes leaves a
# gap: timestamps jump, or nothing comes for a while. Then the VAD would wait for ever for the end
# of a sentence, so gaps are filled with silence. `position_ms` counts audio and silence, so that
# audio which comes late is not padded twice. A new session gets what is kept: all from a second
# before the caller began to speak, until that turn is known in words or answered; else a second.
#
# Voice is what is twice as loud as the noise of this call. A mu-law byte is nearly a logarithm, so
# a mean of them is a loudness. 16 steps are 6 dB, and from -48 dBFS down the steps are even, so the
# same 16 are the floor of a silent call. The noise is the quietest fifth of the last second.

GAP_MS, STALL_S = 40.0, 0.75  # less is jitter: of timestamps, and without a frame
PREROLL, KEPT, FRAME = 50, 3000, 160  # payloads while nobody speaks, and at most; bytes of 20 ms
LOUDNESS = bytes(127 - (byte & 127) for byte in range(256))  # of each mu-law byte; 0 is silence
LOUDER = 16  # steps above the noise
PAUSE_MS = 200.0  # inside a word: the stop in 「ちょっと」 is 150 ms; a longer pause ends the voice


def loudness(mulaw: bytes) -> float:
    return sum(mulaw.translate(LOUDNESS)) / max(1, len(mulaw))


class Voice:  # how many ms of voice there are without a pause, up to now; `before` tells the noise
    def __init__(self, before: bytes) -> None:
        levels = sorted(loudness(before[at : at + FRAME]) for at in range(0, len(before), FRAME))
        self.limit = LOUDER + (levels[len(levels) // 5] if levels else 0)
        self.ms = self.pause_ms = 0.0
        self.add(before)  # OpenAI notices a voice 60 to 300 ms after it has begun

    def add(self, mulaw: bytes) -> None:
        for at in range(0, len(mulaw), FRAME):
            frame = mulaw[at : at + FRAME]
            if loudness(frame) > self.limit:
                self.ms, self.pause_ms = self.ms + self.pause_ms + len(frame) / 8, 0.0
            elif self.ms:
                self.pause_ms += len(frame) / 8
                if self.pause_ms > PAUSE_MS:
                    self.ms = self.pause_ms = 0.0


class CallerAudio:  # the caller's audio on its way to the model; no I/O
    def __init__(self) -> None:
        self.position_ms = -1.0  # how much was appended, by Twilio's timestamps
        self.frame_at = 0.0  # when the last frame came
        self.kept: deque[str] = deque()  # payloads, base64 as they came, usually 20 ms each
        self.turn = self.dropped = 0  # those of a turn that ended; those that were too many
        self.voice: Voice | None = None  # only while it matters how much voice there is
        self.noise, self.voice_at = 127.0, -math.inf  # the quietest of late; the last louder frame
        self.unnoticed = False  # … and OpenAI has sent no event since

    def take(self, timestamp_ms: float, ms: float, now: float) -> float:
        """A frame of so many ms has come. Returns how many are missing before it."""
        position_ms = self.position_ms if self.position_ms >= 0 else timestamp_ms
        gap_ms = timestamp_ms - position_ms if timestamp_ms - position_ms >= GAP_MS else 0.0
        self.position_ms, self.frame_at = position_ms + gap_ms + ms, now
        return gap_ms

    def keep(self, payload: str, needed: bool) -> None:
        """`needed`: the caller speaks, or no session gets it."""
        self.kept.append(payload)
        while len(self.kept) > (KEPT if needed or self.turn else PREROLL):
            self.kept.popleft()
            self.dropped += needed
            self.turn = max(0, self.turn - 1)

    def forget_turn(self) -> None:  # it is known in words, or answered
        for _ in range(self.turn):
            self.kept.popleft()
        self.turn = self.dropped = 0

    def last_second(self) -> bytes:
        return b"".join(map(base64.b64decode, list(self.kept)[-PREROLL:]))

    def listen(self, now: float) -> float:
        """How long the caller has been quiet, in seconds: a rough look at two of ten frames."""
        for payload in list(self.kept)[-10::5]:
            level = loudness(base64.b64decode(payload))
            self.noise = min(self.noise + 0.1, level)
            if level > self.noise + LOUDER:
                self.voice_at, self.unnoticed = now, True
        return now - self.voice_at


# ── 5 Hooks ─────────────────────────────────────────────────────────────────────────────────────

# A hook file's function named after an event is called then, with the arguments that it names.
EVENTS = {  # -> arguments besides `call` and `at` (time.monotonic() at the event)
    "call_started": "",  # Twilio's stream is open and verified
    "model_asked": "",  # the bridge itself asked the model to speak
    "caller_started_speaking": "item",  # OpenAI's VAD noticed the caller begin
    "caller_stopped_speaking": "item",  # … and stop
    "caller_said": "item text",  # their words; "" when there are none; once for each turn
    "model_started_speaking": "item",  # the first sound of an item goes to Twilio
    "model_words": "item text",  # a piece of its words as they are made: ahead of what is heard
    "model_said": "item text heard_ms",  # all its words, once it is known what was heard; None: all
    "model_interrupted": "item heard_ms sent_ms",  # barge-in: how much of the item was heard
    "model_used": "usage model kind",  # tokens as OpenAI reports them; None: it never did
    "model_failed": "error",  # a fault of the model's side, and what the bridge does about it
    "tool_used": "name arguments result seconds",  # the model called a tool
    "key_pressed": "key",  # 0-9 * #
    "caller_audio": "mulaw",  # bytes of G.711 mu-law
    "model_audio": "mulaw",
    "call_ended": "reason",  # once for each call_started, and last
    "any_event": "event facts",  # all of the above but the two of audio
}
KIND: Any = {"string": str, "boolean": bool, "integer": int, "number": int | float}  # JSON's
KIND |= {"array": list, "object": dict}
to_json = functools.partial(json.dumps, ensure_ascii=False, default=str)
MAX_WAITING, TOOL_S, MAX_RESULT = 1000, 20.0, 16_000  # hooks' events, or log lines; s; characters


def run_handlers(waiting: queue.SimpleQueue[Any]) -> None:
    """The thread of a hook file: whatever a handler raises, the next event finds it alive."""
    for function, names, known, loop in iter(waiting.get, None):
        try:
            if inspect.iscoroutine(work := function(**{name: known[name] for name in names})):
                asyncio.run_coroutine_threadsafe(contained(work), loop).result()
        except BaseException:
            extra = {"call": known["call"].sid}
            log.exception("%s.%s failed", function.__module__, function.__name__, extra=extra)


async def contained(work: Any) -> Any:
    """Await what is not ours: these two would end the event loop, and with it all calls."""
    try:
        return await work
    except (KeyboardInterrupt, SystemExit) as exc:
        raise RuntimeError(repr(exc)) from exc


class Hooks:
    """The hook files of a folder: all, or those of `names`. A SystemExit stops the start."""

    def __init__(self, folder: Path, names: str | None) -> None:
        self.handling: dict[str, list[Any]] = {event: [] for event in EVENTS}
        self.functions, self.pages, self.files = Object(), Object(), Object()
        self.offline: Any = None  # starts the offline model, returns its URL
        self.dropped, self.pool = 0, ThreadPoolExecutor(256, "tool")
        there = sorted(path.stem for path in folder.glob("[!_]*.py"))
        there.sort(key="log".__ne__)  # log.py comes first: it shapes what the others log
        chosen = dict.fromkeys(there if names is None else re.findall(r"[^\s,]+", names))
        if missing := chosen.keys() - there:
            sys.exit(f"HOOKS names {missing.pop()!r}: give some of {', '.join(there)}")
        for name in chosen:
            try:
                self.load(name, folder / f"{name}.py")
            except Exception:
                log.exception("hooks/%s.py does not load and is left out", name)
        self.tools = [schema for _, schema in self.functions.values()]  # for session.update
        log.info("hooks: %s", ", ".join(self.files) or "none")

    def load(self, name: str, path: Path) -> None:
        spec: Any = importlib.util.spec_from_file_location(f"_hook_{name}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tools = {tool.__name__: (tool, tool_schema(tool)) for tool in getattr(module, "TOOLS", [])}
        pages = dict(getattr(module, "PAGES", {}))
        for route, page in pages.items():
            if not isinstance(page, Path) and len(inspect.signature(page).parameters) > 1:
                raise TypeError(f"page {route}: give a Path, or a function of the query")
        self.functions, self.pages = self.functions | tools, self.pages | pages
        self.offline = getattr(module, "OFFLINE_MODEL", self.offline)
        waiting = queue.SimpleQueue[Any]()
        thread = threading.Thread(target=run_handlers, args=[waiting], name=name, daemon=True)
        self.files[name] = thread, waiting
        thread.start()
        for event, function in inspect.getmembers(module, inspect.isfunction):
            if event[0] != "_" and (near := difflib.get_close_matches(event, EVENTS, 1, 0.75)):
                # A name close to an event's is that event, or a misspelling of it.
                names = list(inspect.signature(function).parameters)
                known = [near[0], "call", "at", *EVENTS[near[0]].split()]
                if odd := [word for word in (event, *names) if word not in known]:
                    near = difflib.get_close_matches(odd[0], known, 1, 0)
                    log.error("%s: %s: write %s for %s", path, event, near[0], odd[0])
                else:
                    self.handling[event].append((waiting, function, names))

    def emit(self, event: str, call: Any, at: float, facts: Object) -> None:
        known = {"call": call, "at": at, "event": event, "facts": facts, **facts}
        more = [] if event.endswith("_audio") else self.handling["any_event"]
        for waiting, function, names in self.handling[event] + more:
            if waiting.qsize() < MAX_WAITING or event == "call_ended":
                waiting.put((function, names, known, asyncio.get_running_loop()))
                continue
            self.dropped += 1
            if self.dropped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
                log.error("%s is slow: %d events were dropped", function.__module__, self.dropped)

    async def in_thread(self, work: Callable[..., Any], *given: Any) -> Any:
        def run() -> Any:
            try:
                return work(*given)
            except StopIteration as exc:  # which no future can carry
                raise RuntimeError(repr(exc)) from exc

        return await contained(asyncio.get_running_loop().run_in_executor(self.pool, run))

    async def run_tool(self, call: Any, name: str, arguments: str) -> str | None:
        """What a tool returns, as text; None: no response is wanted. A failure is told in words."""
        if name not in self.functions:
            return f"Error: there is no tool named {name}."
        task = asyncio.ensure_future(contained(self.use(call, name, arguments)))
        done, _ = await asyncio.wait([task], timeout=TOOL_S)
        try:
            if not done:  # nobody waits for one that does not let itself be cancelled
                task.cancel()
                raise TimeoutError(f"{name} took longer than {TOOL_S:g} s")
            return None if (result := task.result()) is None else result[:MAX_RESULT]
        except BaseException as exc:  # such as CancelledError, if it cancels itself
            log.error(
                "tool %s failed", name, exc_info=exc if done else None, extra={"call": call.sid}
            )
            return f"Error: {exc!r}"[:MAX_RESULT]

    async def use(self, call: Any, name: str, arguments: str) -> str | None:
        tool, schema = self.functions[name]
        given = {key: value for key, value in json.loads(arguments).items() if value is not None}
        known = schema["parameters"]["properties"]
        for key in given.keys() & known:  # Python itself names what is missing or unknown
            value, want = given[key], known[key]
            if not isinstance(value, KIND[want["type"]]) or value not in want.get("enum", [value]):
                raise TypeError(f"{key} must fit {want}")
        if "call" in inspect.signature(tool).parameters:
            given["call"] = call
        job = functools.partial(tool, **given)
        result = await (job() if inspect.iscoroutinefunction(tool) else self.in_thread(job))
        return result if result is None or isinstance(result, str) else to_json(result)

    def close(self, limit_s: float) -> None:
        """Wait until the files have handled their events, but no longer than this."""
        until = monotonic() + limit_s
        for thread, waiting in self.files.values():
            waiting.put(None)
            thread.join(max(0.0, until - monotonic()))


def json_schema(hint: Any) -> Object:
    """Of bool int float list[…] Literal[…] Annotated[…, "what it is"] X | None; else a string."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Literal:
        return json_schema(type(inner[0])) | {"enum": list(inner)}
    if kind in (typing.Annotated, typing.Union, types.UnionType):
        text = {"description": inner[1]} if kind is typing.Annotated else {}
        return json_schema(inner[0]) | text
    items = {"items": json_schema((*inner, str)[0])} if kind is list else {}
    return {"type": next((name for name in KIND if issubclass(kind, KIND[name])), "string")} | items


def tool_schema(tool: Any) -> Object:
    """A function as session.update has it. OpenAI refuses a session with an odd one as a whole."""
    if not re.fullmatch(r"(?a)\w{1,64}", tool.__name__) or not inspect.getdoc(tool):
        raise TypeError(f"tool {tool.__name__}: give it a name of a-z 0-9 _ and a docstring")
    given = inspect.signature(tool, eval_str=True).parameters
    properties = {key: json_schema(given[key].annotation) for key in given if key != "call"}
    required = [key for key in properties if given[key].default is inspect.Parameter.empty]
    text = {"type": "function", "name": tool.__name__, "description": inspect.getdoc(tool) or ""}
    return text | {"parameters": {"type": "object", "properties": properties, "required": required}}


# ── 6 The way in ────────────────────────────────────────────────────────────────────────────────
#
# Twilio signs the webhook and the stream's handshake with the account's auth token over the public
# URL. The handshake's signature is the same for every call, so the stream also has to bring back a
# token from the TwiML: it is good once, for one CallSid, for a minute, and nothing is done for a
# stream before. Whoever saw a webhook could send it again, so the same one begins no second call.
# Without an auth token only this computer itself may call.

START_S, TOKEN_S = 5.0, 60  # a stream's `start` comes so soon; a token is good so long
MAX_RECONNECTS, MAX_PAST, MAX_SEEN = 3, 500, 10_000  # of a call; past calls; tokens and webhooks
OVER = ("completed", "busy", "failed", "no-answer", "canceled")  # CallStatus
ROUTES = ("/", "/health", "/twilio/voice", "/twilio/stream", "/twilio/next")
HTML, JSON, XML = "text/html; charset=utf-8", "application/json", "text/xml; charset=utf-8"
CALL_SID, STREAM_SID = re.compile("CA[0-9a-f]{32}"), re.compile("MZ[0-9a-f]{32}")
NAMED = re.compile("(/twilio/(?:stream|next))/([0-9a-z]+)")  # with the machine of the call (Fly)
E164 = re.compile(r"\+[1-9]\d{6,14}", re.ASCII)
LOOPBACK = re.compile(r"(?i)\[?((.*\.)?localhost|(::ffff:)?127(\.\d+){3}|::1)\]?(:\d*)?")
# What proxies and tunnels add; Cloudflare, ngrok, Envoy and AWS among them.
FORWARDED = re.compile(
    "(?i)(x-(forwarded|original|envoy|amzn?)|cf|cdn|ngrok)-.*|forwarded|via|.*-ip"
)


def twiml(*verbs: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><Response>{"".join(verbs)}</Response>'


def say(text: str) -> str:
    return twiml(f'<Say language="ja-JP">{escape(text)}</Say><Hangup/>')


HANG_UP = twiml("<Hangup/>")


def reply(twilio: Any, status: int, text: Any, kind: str = "text/plain", **more: str) -> Response:
    body = text if isinstance(text, bytes) else text.encode()
    more |= {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
    response: Response = twilio.respond(status, "")
    response.body = b"" if twilio.request.method == "HEAD" else body
    for name, value in more.items():
        response.headers.pop(name, None)  # assigning adds a second one
        response.headers[name] = value
    return response


@dataclass(slots=True)
class Past:  # a call that has ended, for what comes after it
    twiml: str  # what /twilio/next responds with; "": it is not the bridge that ended the call
    history: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: Object = field(default_factory=dict)
    reconnects: int = 0
    ended_at: float = field(default_factory=monotonic)
    asked: bool = False  # Twilio has asked what is next
    opening: str = LINE_IS_BACK + GO_ON  # how the model begins when the caller is back


class Bridge:
    """What the calls of this process share: the settings, the hooks, and how many there are."""

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings, self.hooks, url = settings, hooks, urlsplit(settings.openai_realtime_url)
        query = {"model": settings.openai_realtime_model} | dict(parse_qsl(url.query))
        self.url, self.model = url._replace(query=urlencode(query)).geturl(), query["model"]
        self.tls = ssl.create_default_context() if url.scheme == "wss" else None
        self.session, self.barge_in_ms = session_update(settings, self.model, hooks.tools)
        transcription = self.session["audio"]["input"].get("transcription") or {}
        self.transcriber = str(transcription.get("model", ""))
        turns = self.session["audio"]["input"].get("turn_detection") or {}
        semantic = (
            turns.get("type") == "semantic_vad"
        )  # it may wait so long for the rest of a sentence
        self.vad_ms = 4000.0 if semantic else turns.get("silence_duration_ms", 500)
        self.calls: dict[str, Call] = {}  # by CallSid, from the webhook to the last close
        self.past: dict[str, Past] = {}  # by CallSid
        self.seen = deque[str](maxlen=MAX_SEEN)  # tokens, and signatures of webhooks
        self.silent: dict[TwilioConnection, asyncio.TimerHandle] = {}  # without a request so far
        self.draining, self.refused = False, (0, 0)  # SIGTERM has come; requests of strangers
        tokens = [token.strip() for token in settings.twilio_auth_token.split(",") if token.strip()]
        self.validators = [RequestValidator(token) for token in tokens]
        self.secret = (tokens[0] if tokens else secrets.token_hex()).encode()  # every machine's

    def connect(self) -> Any:
        key = self.settings.openai_api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        how: Object = {"ssl": self.tls, "additional_headers": headers, "compression": None}
        # A line that is dead without a word is found in 10 s; a message has 16 MiB at most.
        how |= {"ping_interval": 5, "ping_timeout": 5, "close_timeout": 1, "max_size": 16 << 20}
        return connect(self.url, create_connection=CONNECTIONS["openai"], proxy=None, **how)

    # ── Requests ──

    async def process_request(self, twilio: Any, request: Request) -> Response | None:
        """Every request comes here. None lets the stream's upgrade go on."""
        prefix = re.escape(urlsplit(self.settings.public_base_url).path)
        target = re.sub(f"^{prefix}(?=/)", "", request.path)  # a proxy may strip it, or keep it
        path, _, query = target.partition("?")
        here, named = self.settings.fly_machine_id, NAMED.fullmatch(path)
        path, machine = named.groups() if named else (path, here)
        page, is_twilio = self.hooks.pages.get(path), path.startswith("/twilio/")
        methods = "GET, POST" if is_twilio else "GET, HEAD"
        if twilio.refusal:
            return reply(twilio, twilio.refusal, HTTPStatus(twilio.refusal).phrase)
        if path not in ROUTES and page is None:
            return reply(twilio, 404, "Nothing is here. The webhook is POST /twilio/voice\n")
        if here and machine != here and "fly-replay-src" not in request.headers:
            return reply(twilio, 200, "", **{"fly-replay": f"prefer_instance={machine}"})
        if request.method not in methods.split(", "):
            return reply(twilio, 405, f"{path} takes {methods}\n", Allow=methods)
        if path == "/health":
            calls = sum(bool(call.stream_sid) for call in self.calls.values())
            health = {"status": "draining" if self.draining else "ok", "calls": calls}
            health |= {"waiting": len(self.calls) - calls, "max_calls": self.settings.max_calls}
            return reply(twilio, 503 if self.draining else 200, json.dumps(health), JSON)
        if not is_twilio and (self.validators or page is None):
            return reply(twilio, 200 if path == "/" else 403, "This is somebody's telephone.\n")
        try:
            form = self.verified(twilio, request, target)
        except (ValueError, LookupError) as exc:
            second = int(monotonic())
            self.refused = (second, self.refused[1] + 1 if second == self.refused[0] else 1)
            if self.refused[1] <= 100:  # a flood is not to fill the log
                log.warning("403 for %s from %s: %r", path, twilio.peer, str(exc))
            return reply(twilio, 403, "This was not verified. The log says what to set.\n")
        if not is_twilio:
            return await self.page(twilio, page, query)
        if path == "/twilio/stream":
            return None
        if not CALL_SID.fullmatch(form.get("CallSid", "")):
            return reply(twilio, 400, "CallSid must be CA and 32 of 0-9 a-f\n")
        next_step = self.voice if path == "/twilio/voice" else self.next
        return reply(twilio, 200, next_step(form, request), XML)

    async def page(self, twilio: Any, page: Any, query: str) -> Response:
        """A hook's page: a file, or what a function of the query returns (text: HTML, or JSON)."""
        try:
            work, kind = page, HTML
            if isinstance(page, Path):
                work, kind = page.read_bytes, mimetypes.guess_type(page.name)[0] or "text/plain"
            given = [dict(parse_qsl(query))][: len(inspect.signature(work).parameters)]
            made = await self.hooks.in_thread(work, *given)
            if isinstance(made, (str, bytes)):
                return reply(twilio, 200, made, kind)
            return reply(twilio, 200, json.dumps(made, ensure_ascii=False), JSON)
        except Exception:
            log.exception("a page failed")
            return reply(twilio, 500, "This page failed. The log says why.\n")

    def verified(self, twilio: Any, request: Request, target: str) -> dict[str, str]:
        """The form of a request that is let in. An exception says why it is not."""
        get, base = request.headers.get, urlsplit(self.address(request))
        host, origin, signature = get("Host", ""), get("Origin"), get("X-Twilio-Signature", "")
        # A browser on this computer may be sent here by a page of another site: three headers tell.
        strange = [it for it in (twilio.peer, host) if not LOOPBACK.fullmatch(it)]
        strange += [it for it in request.headers if FORWARDED.fullmatch(it)]
        strange += ["another site"] if get("Sec-Fetch-Site") == "cross-site" else []
        if origin and origin.partition("://")[2] != host:
            raise ValueError(f"a page of another site sent it ({origin[:100]})")
        if strange and not (self.validators and self.settings.public_base_url):
            raise ValueError(f"set TWILIO_AUTH_TOKEN and PUBLIC_BASE_URL (seen: {strange[0][:99]})")
        if self.validators and not signature:
            raise ValueError("TWILIO_AUTH_TOKEN is set, and it has no X-Twilio-Signature")
        query = target.partition("?")[2]
        pairs = parse_qsl(twilio.form or query, keep_blank_values=True, max_num_fields=200)
        if self.validators:  # what is signed: the URL, with its port or without, and sorted pairs
            signed = target + "".join(map("".join, sorted(set(pairs)) if twilio.form else ()))
            scheme, host = "wss" if "/stream" in target else "https", base.netloc.split(":")[0]
            how = get_signature_algorithm(get("X-Twilio-Webhooks-Signature-Settings"))
            hosts = {base.netloc, host, f"{host}:443"}
            urls = [f"{scheme}://{it}{base.path}{signed}" for it in hosts]
            valid = [it.compute_signature(url, {}, how) for it in self.validators for url in urls]
            if not any(hmac.compare_digest(it.encode(), signature.encode()) for it in valid):
                raise ValueError(f"TWILIO_AUTH_TOKEN or PUBLIC_BASE_URL ({base.netloc}) is another")
        # As much of each as a <Parameter> (500 characters) and a log can take.
        return {name: clean(it)[:200] for name, it in pairs}

    # ── TwiML ──

    def address(self, request: Request, route: str = "") -> str:
        """Where Twilio reaches us: PUBLIC_BASE_URL, or else the Host of this request."""
        base, here = self.settings.public_base_url, self.settings.fly_machine_id
        base = base or "https://" + request.headers.get("Host", "")
        return base + (route and f"/twilio/{route}" + (here and f"/{here}"))

    def voice(self, form: dict[str, str], request: Request) -> str:
        """The webhook of a new call. Twilio may deliver it twice."""
        sid, signature = form["CallSid"], request.headers.get("X-Twilio-Signature", "")
        if form.get("CallStatus") in OVER:
            log.warning("/twilio/voice is no status callback", extra={"call": sid})
            return twiml()
        if sid in self.calls:
            return self.stream(form, request)
        if signature and signature in self.seen:  # the same webhook again, after its call
            return self.next(form, request)
        if refusal := self.no_room():
            return refusal
        self.past.pop(sid, None)  # an earlier call's history and notes do not reach this one
        self.begin(form, request)
        return self.stream(form, request)

    def next(self, form: dict[str, str], request: Request) -> str:
        """What Twilio does when a stream, or the <Dial> of a transfer, has ended."""
        sid, dialled = form["CallSid"], form.get("DialCallStatus")
        call, past = self.calls.get(sid), self.past.get(sid)
        if call and not call.over.done() and monotonic() - call.audio.frame_at > 1:
            call.end("twilio lost")
            past = self.past[sid]
        if past:
            past.asked = True
            if past.twiml and not (dialled and "<Dial" in past.twiml):
                return past.twiml
            if past.reconnects >= MAX_RECONNECTS:
                return say(APOLOGY)
        if dialled == "completed" or form.get("CallStatus", "in-progress") != "in-progress":
            return HANG_UP
        if refusal := self.no_room():
            return refusal
        if not past and not call:  # this process has been restarted
            self.ended(sid, past := Past("", opening=LINE_IS_BACK + SAY_AGAIN))
        if past:
            past.reconnects += 1
            past.opening = NOT_REACHED.format(clean(dialled)) if dialled else past.opening
        return self.stream(form, request)  # its `start` begins the call

    def no_room(self) -> str:
        """What a further caller hears instead; "" when there is room."""
        if self.draining or len(self.calls) < self.settings.max_calls:
            return say(RESTARTING) if self.draining else ""
        log.warning("a caller is turned away: MAX_CALLS (%d) are there", len(self.calls))
        return say(BUSY)

    def begin(self, form: Mapping[str, str], request: Request) -> Call:
        """A call, whose model is connected now."""
        sid, caller, called = form["CallSid"], form.get("From", ""), form.get("To", "")
        greeting, past = self.settings.greeting, self.past.pop(sid, None)
        call = self.calls[sid] = Call(self, sid, caller, called, self.address(request, "next"))
        if past:
            call.history, call.notes = past.history, dict(past.notes)
            call.reconnects = past.reconnects
        if opening := (past.opening if past else "") or (greeting and GREET + greeting):
            call.owe({"instructions": f"{self.settings.instructions}\n\n{opening}"})
        return call

    def stream(self, form: Mapping[str, str], request: Request) -> str:
        self.seen.append(request.headers.get("X-Twilio-Signature", ""))
        url = self.address(request, "stream").replace("https", "wss", 1)
        # Twilio drops a query, but brings these back with `start`.
        given = {"token": self.token(form["CallSid"])}
        given |= {name: form.get(name, "") for name in ("From", "To")}
        more = [f'<Parameter name="{it}" value={quoteattr(given[it])}/>' for it in given]
        after = f'<Redirect method="POST">{escape(self.address(request, "next"))}</Redirect>'
        return twiml(f"<Connect><Stream url={quoteattr(url)}>", *more, "</Stream></Connect>", after)

    def ended(self, sid: str, past: Past) -> None:
        self.past[sid] = past
        if len(self.past) > MAX_PAST:
            del self.past[next(iter(self.past))]

    # ── The stream ──

    def token(self, sid: str, about: str = "") -> str:
        """An expiry, a nonce, and their HMAC with the CallSid."""
        about = about or f"{int(time.time()) + TOKEN_S}.{secrets.token_hex(8)}"
        return f"{about}." + hmac.digest(self.secret, f"{sid} {about}".encode(), "sha256").hex()

    async def take_stream(self, twilio: Any) -> None:
        """A stream whose handshake was let in: its `start`, then the call, until it ends."""
        timer = twilio.loop.call_later(START_S, twilio.shut, 1008, f"no start in {START_S:g} s")
        twilio.handle = functools.partial(self.first_message, twilio, timer)
        await twilio.read()
        timer.cancel()
        if call := twilio.call:
            normal = twilio.close_code in (1000, 1001, 1005)  # closed, going away, without a word
            call.end("caller hung up" if normal else "twilio lost")
            await asyncio.wait([call.life])

    def first_message(self, twilio: TwilioConnection, timer: Any, text: str) -> None:
        """`connected`, then `start`. What raises here closes the stream."""
        if (message := json.loads(text))["event"] != "start":
            return
        start = message["start"]
        sid, given, token = start["callSid"], start["customParameters"], ""
        if CALL_SID.fullmatch(sid) and STREAM_SID.fullmatch(start["streamSid"]):
            token = given["token"]
        about = token.rpartition(".")[0]
        real = hmac.compare_digest(self.token(sid, about).encode(), token.encode())
        if not real or token in self.seen or int(about.partition(".")[0]) < time.time():
            if CALL_SID.fullmatch(sid) and sid not in self.calls:  # for /twilio/next
                self.ended(sid, Past(twiml=say(APOLOGY)))
            raise ValueError("a stream without a valid token of its call")
        self.seen.append(token)
        call = self.calls.get(sid)
        if call and not call.over.done() and call.stream_sid:
            raise ValueError("a second stream of a call")
        if not call or call.over.done():  # connected again; or another machine had the webhook
            if refusal := self.no_room():
                self.ended(sid, Past(refusal))
                raise ValueError("a stream for which there is no room")
            call = self.begin({**given, "CallSid": sid}, typing.cast(Request, twilio.request))
        timer.cancel()
        twilio.call, twilio.most_unreadable = call, MAX_UNREADABLE
        call.open_stream(twilio, start["streamSid"])


# ── Connections ──

MAX_UNSENT, MAX_UNREADABLE = 4 << 20, 50  # bytes: some 6 minutes of speech; messages
REQUEST_S, MAX_SILENT = 5.0, 200  # a request is complete so soon; connections without one
MAX_HEAD, MAX_FORM = 16 << 10, 64 << 10  # bytes of a request's head and body
LENGTH = re.compile(rb"(?i)\r\ncontent-length:([^\r\n]*)")


class Wire(Connection):
    """A connection as a call uses it: what comes goes to `handle`, and `put` never waits."""

    handle: Callable[[str], object]
    closing: asyncio.Task[None]
    unreadable, most_unreadable = 0, MAX_UNREADABLE

    def connection_made(self, transport: Any) -> None:
        # asyncio takes 256 KiB of memory from the system for each read and gives them back, which
        # costs ten times as much as to read 20 ms of sound.
        transport.max_size = 16 << 10  # bytes
        super().connection_made(transport)

    async def read(self) -> None:
        """Hand on each message, until the connection is closed."""
        with contextlib.suppress(ConnectionClosed):
            async for message in self:
                self.attempt(message)

    def attempt(self, message: str | bytes) -> None:
        try:
            self.handle(message if isinstance(message, str) else message.decode())
        except Exception as exc:  # not what the protocol says, or a fault of ours: the call goes on
            self.unreadable += 1
            side, kind, text = type(self).__name__, type(exc).__name__, clean(str(exc))
            log.warning("%s: bad message %d: %s %.200s", side, self.unreadable, kind, text)
            if self.unreadable >= self.most_unreadable:
                self.shut(1008, "too many of them")  # policy violation

    def shut(self, code: int = 1000, why: str = "") -> None:
        """Close it; what still comes of it means nothing."""
        if why:
            log.warning("%s is closed: %s", type(self).__name__, why)
        self.loop.call_later(1.5, self.transport.abort)  # close() waits for one that does not read
        self.handle = lambda text: None
        self.closing = asyncio.create_task(self.close(code))

    def put(self, *texts: str) -> None:
        for text in texts:
            broadcast([self], text)  # writes at once; does nothing on a closed connection
        self.check_unsent()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.check_unsent()  # pongs may pile up as well

    def check_unsent(self) -> None:
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            log.error("%s has stopped reading: closed", type(self).__name__)
            self.transport.abort()


class OpenAIConnection(Wire, ClientConnection):
    pass


class TwilioConnection(Wire, ServerConnection):
    # A webhook's POST has a body, and websockets takes only requests without one. So both are kept
    # here, and websockets gets the head without its Content-Length. What it would drop without a
    # word becomes a request that `process_request` refuses.
    call: Call | None = None
    form, refusal, peer = "", 0, ""  # the body; an HTTP status; an IP address
    most_unreadable = 1  # before `start`

    def __init__(self, *arguments: Any, silent: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.silent, self.unread, self.needed = silent, bytearray(), 0  # bytes of head and body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.peer = str((self.remote_address or "?")[0])
        self.silent[self] = self.loop.call_later(REQUEST_S, self.hand_on, 408)
        if len(self.silent) > MAX_SILENT:
            oldest = next(iter(self.silent))
            self.silent.pop(oldest).cancel()
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self not in self.silent:  # websockets has the request
            if self.state is not State.CONNECTING:  # nobody may say more before our response
                super().data_received(data)
            return
        self.unread += data
        if len(self.unread) < self.needed:  # the head was read, and its body is still to come
            return
        head, blank, body = self.unread.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            self.hand_on(431)
            return
        if not blank:
            return
        lengths = [it.strip(b" \t") for it in LENGTH.findall(head)] or [b"0"]
        if b"\r\ntransfer-encoding:" in head.lower():
            self.hand_on(411)
        elif len(lengths) > 1 or not lengths[0].isdigit():
            self.hand_on(400)
        elif (size := int(lengths[0][:9])) > MAX_FORM:
            self.hand_on(413)
        elif len(body) >= size:
            self.form, probe = body[:size].decode("utf-8", "replace"), ServerProtocol()
            probe.receive_data(plain := bytes(LENGTH.sub(b"", head) + blank))  # would it drop it?
            self.hand_on(0 if probe.events_received() else 400, plain)
        else:
            self.needed = len(head + blank) + size
            if not body and b"\r\nexpect: 100-continue" in head.lower():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hand_on(self, refusal: int, head: bytes = b"") -> None:
        """websockets gets the request, or one to refuse."""
        self.silent.pop(self).cancel()
        self.refusal = refusal
        super().data_received(b"GET / HTTP/1.1\r\n\r\n" if refusal else head)

    def connection_lost(self, exc: Exception | None) -> None:
        if timer := self.silent.pop(self, None):
            timer.cancel()
        super().connection_lost(exc)


CONNECTIONS: Object = {"twilio": TwilioConnection, "openai": OpenAIConnection}  # see section 8

# ── 7 Start and stop ────────────────────────────────────────────────────────────────────────────

MAY_BE_EMPTY = {"greeting", "transcription_model", "hooks"}  # there an empty value is a choice
PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
HOST = rf"[^/:?#@\s]+(:{PORT})?"
RULES = {  # -> a pattern of what is right, and what to give
    "openai_api_key": ("[!-~]*", "one of https://platform.openai.com/api-keys"),
    "public_base_url": (rf"https://{HOST}(?!.*/(twilio|health)(/|$))(/[^?#\s]*)?", "https://HOST"),
    "openai_realtime_url": (rf"wss?://{HOST}([/?](?!.*model=gpt-live)[^#\s]*)?", "wss://HOST/PATH"),
    "openai_realtime_model": ("(?!gpt-live).*", "another: GPT-Live speaks another protocol"),
    "host": (r"(?![\d.]+$)\S+|((25[0-5]|2[0-4]\d|1?\d?\d)(\.(?!$)|$)){4}", "an address of ours"),
    "port": (PORT, "a number from 1 to 65535"),
    "barge_in_ms": (r"\d{1,4}(\.\d+)?|off", "a number from 0 to 9999, or off"),
    "max_calls": (r"[1-9]\d{0,4}", "a number from 1 to 99999"),
    "max_call_seconds": (r"[1-9]\d{0,4}(\.\d+)?", "a number from 1 to 99999"),
    "drain_seconds": (r"\d{1,5}(\.\d+)?", "a number from 0 to 99999"),
}
DRAIN_GOODBYE_S, STOP_S, NEXT_S = 30.0, 2.4, 2.0  # the last words; the last closes; /twilio/next


def read_dotenv(path: Path) -> None:
    """NAME=value lines, with quotes and # comments; what the environment has already wins."""
    line = r"""(?m)^ *(?:export +)?(\w+) *= *(?:"([^"\n]*)"|'([^'\n]*)'|(.*?)) *(?:(?<= )#.*)?$"""
    for name, *value in re.findall(line, path.read_text("utf-8-sig") if path.is_file() else ""):
        os.environ.setdefault(name, "".join(value))


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings. Raises ValueError: one line with the variable, the value's fault, the fix."""
    chosen: Object = {"session": "{}"}
    if env.get("FLY_APP_NAME"):
        chosen["public_base_url"] = f"https://{env['FLY_APP_NAME']}.fly.dev"
    for setting in fields(Settings):
        key, name = setting.name, setting.name.upper()
        text, (pattern, give) = env.get(name, "").strip(), RULES.get(key, ("(?s).*", ""))
        if not re.fullmatch(pattern, text) and text:
            shown = "wrong" if key.startswith("openai") or "@" in text else repr(text)
            raise ValueError(f"{name} is {shown}: give {give}")
        if isinstance(setting.default, int | float) and text:
            chosen[key] = type(setting.default)(text.replace("off", "inf"))
        elif text or (key in MAY_BE_EMPTY and name in env):
            chosen[key] = text.rstrip("/") if key == "public_base_url" else text
        elif name not in env and (near := difflib.get_close_matches(name, env, 1, 0.88)):
            log.warning("%s is no setting: is %s meant?", near[0], name)
    try:
        chosen["session"] = json.loads(chosen["session"])
        audio = session_update(Settings(**chosen), "", [])[0]["audio"]
        if {audio[way]["format"]["type"] for way in ("input", "output")} != {"audio/pcmu"}:
            raise ValueError("a telephone speaks audio/pcmu only")
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ValueError(f"SESSION is wrong ({exc}): give a JSON object such as {{}}") from None
    return Settings(**chosen)


class LogWriter(logging.Handler):
    """Hands log lines to a thread, so that no call waits for who reads standard error."""

    waiting, dropped = queue.SimpleQueue[Any](), 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.waiting.qsize() < MAX_WAITING:
            self.waiting.put(record)
        else:
            self.dropped += 1

    def write(self) -> None:
        for record in iter(self.waiting.get, None):
            try:
                os.write(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))
            except Exception:
                self.handleError(record)
            if self.dropped and self.waiting.empty():
                log.warning("%d log lines were dropped: nobody read them", self.dropped)
                self.dropped = 0


async def drain(bridge: Bridge, signals: list[int]) -> None:
    """Let the calls end by themselves, then end them; a second signal ends them now."""

    async def wait(limit_s: float, waits: Callable[[], object], most_signals: int = 1) -> None:
        until = monotonic() + limit_s
        while waits() and monotonic() < until and len(signals) <= most_signals:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # there is no one event to wait for

    def unasked() -> bool:  # Twilio is still to ask what is next
        ended = [past for past in bridge.past.values() if monotonic() - past.ended_at < NEXT_S]
        return any(past.twiml and not past.asked for past in ended)

    end = functools.partial(Call.end, reason="shutdown", twiml=say(RESTARTING))
    for call in [call for call in bridge.calls.values() if not call.stream_sid]:
        end(call)
    await wait(bridge.settings.drain_seconds, lambda: bridge.calls)
    for call in bridge.calls.values():
        call.end_when_heard("shutdown", say(RESTARTING), final=True)
    await wait(DRAIN_GOODBYE_S, lambda: bridge.calls)
    for call in list(bridge.calls.values()):
        end(call)
    await wait(STOP_S, lambda: bridge.calls, most_signals=2)
    await wait(NEXT_S, unasked)


async def run(settings: Settings, hooks: Hooks) -> None:
    if settings.openai_realtime_url == Settings.openai_realtime_url and not settings.openai_api_key:
        if not hooks.offline:
            raise ValueError("OPENAI_API_KEY is not set: give one, or copy the hooks folder too")
        url = await hooks.offline()
        settings = replace(settings, openai_realtime_url=url, openai_realtime_model="offline-model")
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        resource: Any = importlib.import_module("resource")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sslproto.SSLProtocol.max_size = 32 << 10  # bytes that a TLS connection sets aside; was 256 KiB
    bridge, signals, stop = Bridge(settings, hooks), list[int](), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 2:
            os._exit(1)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)  # not the loop's own way: Windows has none
    way: Object = {"process_request": bridge.process_request, "compression": None}
    way["create_connection"] = functools.partial(CONNECTIONS["twilio"], silent=bridge.silent)
    way |= {"open_timeout": 2 * REQUEST_S, "close_timeout": 1, "max_size": 64 << 10}  # s, s, bytes
    async with serve(bridge.take_stream, settings.host or None, settings.port, **way):
        base = settings.public_base_url or f"http://localhost:{settings.port}"
        log.info("listening on port %d; the webhook is POST %s/twilio/voice", settings.port, base)
        if bridge.validators and not settings.public_base_url:
            log.warning("PUBLIC_BASE_URL is not set: signatures are checked for the Host they name")
        if "/" in hooks.pages and not bridge.validators:
            log.info("to talk to it from this computer, open\n\n    %s/\n", base)
        gc.freeze()  # what the start has made stays, and a call's objects die by their references:
        gc.set_threshold(20_000, 20, 20)  # looking for cycles less often saves a tenth of the CPU
        await stop.wait()
        bridge.draining = True
        log.info("stopping when %d calls have ended; a second signal ends them", len(bridge.calls))
        await drain(bridge, signals)
    await asyncio.to_thread(hooks.close, 6.0 if len(signals) < 2 else 0.5)


def main() -> int:
    writer, here = LogWriter(), Path(__file__).parent
    status, fault = 0, ""
    text = "%(asctime)s %(levelname)s %(name)s %(call)s %(message)s"
    writer.setFormatter(logging.Formatter(text, defaults={"call": "-"}))
    logging.basicConfig(level=logging.INFO, handlers=[writer])
    logging.getLogger("websockets").setLevel(logging.ERROR)
    thread = threading.Thread(target=writer.write, name="log", daemon=True)
    thread.start()
    try:
        read_dotenv(here / ".env")
        settings = read_settings(os.environ)
        work = run(settings, Hooks(here / "hooks", settings.hooks))
        asyncio.new_event_loop().run_until_complete(work)  # not asyncio.run: it waits for all tasks
    except OSError as exc:
        status, fault = 1, f"cannot start ({exc}): is PORT free, and HOST an address of ours?"
    except (ValueError, SystemExit) as exc:
        status, fault = 2, str(exc)
    writer.waiting.put(None)
    thread.join(1.0)  # what nobody reads is left
    if status:
        print(f"bridge.py: {fault}", file=sys.stderr, flush=True)
    return status


# ── 8 The fast wire ─────────────────────────────────────────────────────────────────────────────
#
# A `Wire` costs a task's wake-up, a queue and a frame object for each 20 ms of sound. Here whole
# text messages are cut out of the bytes as they come, and written the same way. websockets handles
# the handshake, pings, pongs and closes, and from a fragment or a message of 64 KiB on all that
# comes, so that the order stays. Without this section everything works, a third dearer.
#
#   a frame (RFC 6455, 5.2): 0x81 = final, text │ 0x80 if masked, + length or 126 │ … │ mask │ text


def masks() -> Iterator[bytes]:
    """Unpredictable keys of 4 bytes; the system is asked once for a thousand."""
    while True:
        pool = os.urandom(4096)
        yield from (pool[at : at + 4] for at in range(0, 4096, 4))


MASKS = masks()


class FastWire(Wire):
    cutting: bool | None = None  # None: `read` has not begun; False: websockets reads from here on
    kept = b""  # bytes that wait for `read`, or for the rest of their frame
    ours, theirs, head = 0, 0x80, b"\x81\x7e"  # the mask bit: a client masks, a server does not

    async def read(self) -> None:
        self.cutting = True
        self.data_received(b"")
        await super().read()

    def data_received(self, data: bytes) -> None:
        data, self.kept, at, theirs = self.kept + data, b"", 0, self.theirs
        if self.cutting is None and self.state is State.OPEN:
            self.kept = data
            return
        end = len(data)
        while self.cutting and end - at > 1:
            kind, size, begin = data[at], data[at + 1] ^ theirs, at + 2
            if kind not in (0x81, 0x89, 0x8A) or size > 126:
                self.cutting = False
                break
            if size == 126:
                if end - at < 4:
                    break
                size, begin = data[at + 2] << 8 | data[at + 3], at + 4
            begin += theirs >> 5  # a mask has 4 bytes
            if (stop := begin + size) > end:
                break
            if kind == 0x81:
                text = data[begin:stop]
                self.attempt(apply_mask(text, data[begin - 4 : begin]) if theirs else text)
            else:
                super().data_received(data[at:stop])
            at = stop
        if self.cutting:
            self.kept = data[at:]
        else:
            super().data_received(data[at:])

    def put(self, *texts: str) -> None:
        frames = b""
        for text in texts:
            data = text.encode()
            size = len(data)
            if not self.cutting or size > 0xFFFF:
                super().put(*texts)
                return
            short = size < 126
            head = bytes((0x81, self.ours | size)) if short else self.head + size.to_bytes(2, "big")
            if self.ours:
                head += (key := next(MASKS))
                data = apply_mask(data, key)
            frames += head + data
        self.transport.write(frames)
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.check_unsent()

    def connection_lost(self, exc: Exception | None) -> None:
        self.cutting = False
        super().connection_lost(exc)


class FastTwilio(FastWire, TwilioConnection):
    pass


class FastOpenAI(FastWire, OpenAIConnection):
    ours, theirs, head = 0x80, 0, b"\x81\xfe"

    def data_received(self, data: bytes) -> None:
        """OpenAI's first frame may come together with the end of the handshake."""
        if self.cutting is None and self.state is State.CONNECTING:
            head, blank, data = (self.kept + data).partition(b"\r\n\r\n")
            self.kept = b"" if blank else head
            if not blank and len(head) < MAX_HEAD:
                return
            super().data_received(head + blank)
        super().data_received(data)


CONNECTIONS |= {"twilio": FastTwilio, "openai": FastOpenAI}

if __name__ == "__main__":
    os._exit(main())  # a thread of a hook that never returns does not hold up the exit
