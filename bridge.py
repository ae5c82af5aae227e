#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "twilio>=9.13,<10"]
# ///
# SPDX-License-Identifier: MIT
"""Talk with OpenAI's Realtime model by telephone: the whole bridge in one file.

    caller ── telephone ── Twilio ══ WebSocket ══ bridge.py ══ WebSocket ══ OpenAI Realtime
                             │  POST /twilio/voice  │
                             └──────────────────────┘

    1 Settings        what an operator changes: environment variables
    2 The call        Twilio's messages, OpenAI's events, barge-in, what the model owes, the end
    3 Playback        what the caller has heard of the model: a line of bytes and a clock
    4 Caller audio    what the model has heard of the caller, and how much of that is voice
    5 Hooks           files in hooks/ that are told what happens in a call; tools
    6 The way in      the webhook, its signature and its form; the stream and its token
    7 Start and stop  settings, the log, one port, signals
    8 The fast wire   the same for less CPU; skip it at a first reading

Both sides speak G.711 mu-law at 8 kHz in base64, so sound passes through as it came: 8 bytes are
1 ms. Nothing inside a call waits: a message of either side is handled to its end where it arrives,
and what it causes is written at once. Only `Call.keep_session`, tools and hooks run beside that.

    python bridge.py          the README has the settings and the first call

Twilio's messages: https://www.twilio.com/docs/voice/media-streams/websocket-messages
OpenAI's events:   https://platform.openai.com/docs/api-reference/realtime
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
import logging.handlers
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
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import monotonic  # all times are in seconds of this clock
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from xml.sax.saxutils import escape, quoteattr

from twilio.request_validator import RequestValidator  # type: ignore[import-untyped]
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection, broadcast
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import apply_mask  # type: ignore[attr-defined]
from websockets.http11 import Request, Response
from websockets.protocol import State

log = logging.getLogger("bridge")
Object = dict[str, Any]  # of JSON

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:
    """Each is read from the environment variable of its name in capitals. These are defaults."""

    openai_api_key: str = ""  # without it the offline model answers (hooks/offline.py)
    twilio_auth_token: str = ""  # checks signatures; without it only this computer may call
    public_base_url: str = ""  # such as https://my-app.fly.dev
    port: int = 8080
    host: str = ""  # all interfaces
    openai_realtime_url: str = "wss://api.openai.com/v1/realtime"  # or the same protocol elsewhere
    openai_realtime_model: str = "gpt-realtime-2.1"  # unless the URL names one
    instructions: str = (
        "# 役割\nあなたは電話に出るAIアシスタントの鈴木です。\n# 話し方\nいつも日本語の"
        "「です・ます」で話します。一度に話すのは短い文を一つか二つまでです。箇条書きや"
        "記号は使いません。電話番号などの数字は一桁ずつ読み上げ、復唱して確かめます。\n"
        "# 決してしないこと\n事実、数字、出典を作り上げません。使えるツールがあれば調べ、"
        "わからないことは「わかりかねます」と正直に言います。\n# 聞き取れないとき\n"
        "短く聞き返します。雑音、沈黙、周りの人どうしの会話には答えません。"
    )
    greeting: str = "お電話ありがとうございます。AIアシスタントの鈴木です。どうぞお話しください。"
    voice: str = "marin"  # marin and cedar are the ones that OpenAI recommends
    transcription_model: str = "gpt-transcribe"  # of the caller's words; empty: none
    session: Mapping[str, Any] = field(default_factory=dict)  # patches session.update (RFC 7396)
    barge_in_ms: float = 400.0  # of voice interrupt the model; "off" (inf): nothing does
    max_calls: int = 100  # further callers hear a busy message
    max_call_seconds: float = 3600.0  # an OpenAI session ends after 60 minutes, too
    drain_seconds: float = 240.0  # how long SIGTERM waits for calls to end by themselves
    hooks: str | None = None  # comma-separated names; None: every file in hooks/
    fly_machine_id: str = ""  # set by Fly.io itself


# What Twilio says to a caller to whom the model cannot speak.
AGAIN = "恐れ入りますが、しばらくしてからおかけ直しください。"
BUSY = "ただいまお電話が混み合っております。" + AGAIN
RESTARTING = "ただいまシステムの更新を行っております。" + AGAIN
APOLOGY = "申し訳ございません。システムの不具合により、お電話を続けることができません。" + AGAIN
TIME_IS_UP = "恐れ入りますが、お時間となりましたので、これで失礼いたします。"
# What the model is told.
GREET = "Begin the call: say exactly this, and no more: "
LINE_IS_BACK = "The line was cut off and is back. Apologize for that in a few words, and "
GO_ON, SAY_AGAIN = "go on where you were.", "ask the caller to say once more what it is about."
NOT_REACHED = "Nobody was reached ({}): the caller is back with you. Say whom they did not reach."
HEARD_ONLY = "The caller spoke over your last words. They heard only this of them: "
CALLED_OFF = "The caller goes on talking, so the call was not ended. Listen, and respond."

# ── 2 The call ──────────────────────────────────────────────────────────────────────────────────
#
#   webhook ── Call ─┬─ keep_session: connect to OpenAI, set up, read; again when it is lost
#                    ├─ `start` ── open_stream ── from_twilio, from_openai: one message at a time
#                    └─ live: until `end` ── both sides are closed ── call_ended
#
# The state says what is true now. `go_on` looks at it after each message and four times a second,
# and does what is due. So a message that does not come needs no code of its own.

TICK_S, UNCLAIMED_S = 0.25, 10.0  # a call whose stream does not come in time is forgotten
ANSWERS_S, ASK_AGAIN_S, FAILED_S = 1.5, 2.5, 1.0  # see `look_after_model`; a rate limit passes
GREETING_S, SILENCE_S = 8.0, 20.0  # a caller waits no longer for what is owed
DEAD_S, DEAF_S = 6.0, 8.0  # without any event of a response, of a session
SESSION_S, LASTED_S = 8.0, 2.0  # without a session; one that is lost sooner was none
UNWANTED_S = 3.0  # OpenAI may begin its response to a backchannel so late
LAST_WORDS_S, VAD_SILENCE_S = 1.0, 0.5
TURN_LOST_S = 9.0  # the longest that OpenAI's semantic VAD waits for is 8 s
MAX_ECHOES, ECHO_MS = 3, 2000  # answers in a row that were cut so soon, without words
CALLS_OFF_MS, CALLED_OFF_S = 700.0, 8.0  # voice calls a hang-up off; so much silence does not
WORDS_S, WORDS_AT_END_S = 10.0, 0.8  # a turn's words are waited for
GOODBYE_S = 15.0  # and what is queued: a goodbye is waited for
MAX_QUEUED_S, MAX_HISTORY = 300.0, 200  # speech at Twilio; texts that a new session is told
MAX_TOOLS, MAX_TOOL_ROUNDS = 16, 8  # of one response; in a row without a sound
HARMLESS = {"response_cancel_not_active", "conversation_already_has_active_response"}  # crossings
FINAL = {"insufficient_quota", "credit_balance_exhausted", "invalid_api_key"}  # codes or types
CLOSING = re.compile(  # words that agree or take leave: they call no hang-up off
    "(はい|ええ|うん|いえ|いいえ|あっ?|では|じゃあ?|それでは|どうも|結構です|大丈夫です|わかりました"
    "|承知しました|ありがとう(ございま(す|した))?|お願い(し|いたし)ます|よろしく|すみません"
    "|失礼(し|いたし)ま(す|した)|さよ(う)?なら|おやすみなさい|お疲れ様です|バイバイ"
    "|yes|ok|thank(you|s)|(good)?bye)+",
    re.IGNORECASE,
)


@dataclass(slots=True)
class Answer:
    """The response in progress: from OpenAI's response.created to its response.done."""

    id: str
    created_at: float
    life_at: float  # when its last event came
    sounded: bool = False
    cut: bool = False  # the caller spoke over it, or nobody wants it: no more of it is heard


@dataclass(slots=True)
class Ending:
    """The call is to end as soon as the caller has heard what the model says."""

    reason: str  # for call_ended
    twiml: str  # what /twilio/next responds with
    final: bool  # no caller calls it off by talking
    deadline: float
    called_off_by: str = ""  # the item of the turn that did
    quiet_since: float = math.inf


class Call:
    """One call: what Twilio has, what OpenAI has, and what is owed to the caller."""

    def __init__(self, bridge: Bridge, sid: str, caller: str, called: str, next_url: str) -> None:
        self.bridge, self.loop, self.began_at = bridge, asyncio.get_running_loop(), monotonic()
        self.sid, self.stream_sid = sid, ""  # Twilio's "CA…" and "MZ…" (once the stream is open)
        self.caller, self.called = caller, called  # "+81…", but also "anonymous" or a SIP address
        self.notes: Object = {}  # for hooks and tools; the bridge does not look at it
        self.next_url, self.reconnects = next_url, 0  # where Twilio asks what is next
        self.log = logging.LoggerAdapter(log, {"call": sid})
        self.twilio: TwilioConnection | None = None  # until the stream opens
        self.over: asyncio.Future[str] = self.loop.create_future()  # why the call has ended
        self.ending: Ending | None = None

        self.openai: OpenAIConnection | None = None  # the latest; may be closed
        self.session, self.lost_at = 0, self.began_at  # how many; since when there is none
        self.ready_at = math.inf  # when session.update was accepted: audio is sent; inf: not yet
        self.server_answers = True  # create_response: OpenAI responds to a turn by itself
        self.cause = self.failed = ""  # why a session was lost last; why nothing comes any more
        self.history: dict[str, tuple[str, str]] = {}  # item -> role, text; for a new session

        self.playback, self.audio = Playback(), CallerAudio()
        self.notices: deque[bytes] = deque(maxlen=8)  # of `play`, until the model is silent
        self.turns: dict[str, float] = {}  # item -> when the caller stopped; until its words come
        self.speaking, self.speaking_at = "", 0.0  # the item of the turn that the caller speaks
        self.undecided = False  # … over the model, and not yet enough to interrupt it
        self.last_second = False  # … at its last words: even a short word is an answer
        self.unwanted_until = 0.0  # a response that begins until then may be to a backchannel
        self.echoes, self.last_words = 0, ""  # answers cut at once, in a row; the model's words

        # What the model owes the caller: None, or the `response` of the response.create that asks
        # for it. The sound of a response created since then clears it, or its tool calls do.
        self.owed: Object | None = None
        self.owed_at = self.quiet_until = 0.0  # since when; nothing is asked for before
        self.attempts = self.tool_rounds = 0  # to have it; responses that only called tools
        self.asked_at = math.inf  # the oldest request that no event has followed
        self.active: Answer | None = None
        self.tools: asyncio.Task[None] | None = None  # that the last response called
        self.timer = self.loop.call_later(TICK_S, self.tick)
        self.life = asyncio.create_task(self.live())

    # ── Twilio's messages ──

    MEDIA = re.compile(  # the form of nearly all of them; others are parsed as JSON
        r'\{"event":"media",[^{]*"media":\{[^}]*?"timestamp":"(\d{1,12})","payload":"([\w+/]+=*)"',
        re.ASCII,
    )

    def from_twilio(self, text: str) -> None:
        """One message of Twilio's. Its numbers are strings."""
        if media := self.MEDIA.match(text):
            self.from_caller(media[2], int(media[1]))
            return
        message = json.loads(text)
        match message["event"]:
            case "media":
                payload, timestamp = message["media"]["payload"], message["media"]["timestamp"]
                base64.b64decode(payload, validate=True)
                known = re.fullmatch(r"\d{1,12}", str(timestamp), re.ASCII)
                self.from_caller(payload, int(timestamp) if known else -1)  # never lose audio
            case "mark":
                self.playback.mark_returned(int(message["mark"]["name"]), monotonic())
            case "dtmf":
                if (key := message["dtmf"]["digit"]) in list("0123456789*#"):
                    self.emit("key_pressed", key=key)
            case "stop":
                self.end("caller hung up")
        self.go_on()

    def from_caller(self, payload: str, timestamp_ms: int) -> None:
        """The caller's voice, usually 20 ms of it. Timestamps count from the stream's beginning."""
        ms = size_of(payload) / 8
        if gap_ms := self.audio.take(timestamp_ms, ms, monotonic()):
            self.fill(gap_ms)
        self.to_model(payload)

    def fill(self, gap_ms: float) -> None:
        """Silence for a gap. Of a long one 30 s are enough, because no sentence hangs on more."""
        self.log.info("%.0f ms of the caller's audio are missing: filled with silence", gap_ms)
        self.to_model(base64.b64encode(b"\xff" * round(min(gap_ms, 30_000) * 8)).decode())

    def to_model(self, payload: str) -> None:
        ready = self.ready_at < math.inf
        self.audio.keep(payload, bool(self.speaking) or not ready)
        if ready and self.openai:
            self.openai.put('{"type":"input_audio_buffer.append","audio":"' + payload + '"}')
        if self.audio.voice:
            self.audio.voice.add(base64.b64decode(payload))
            self.judge_voice()
        if self.bridge.hooks.handling["caller_audio"]:
            self.emit("caller_audio", mulaw=base64.b64decode(payload))

    # ── OpenAI's events ──
    #
    # A turn of the caller's: speech_started, speech_stopped, committed; its words come later.
    # A response: response.created; for each of its items words and sound, both faster than they
    # are spoken; response.done.

    def from_openai(self, text: str) -> None:
        """One event of OpenAI's. The many that are not named here need nothing."""
        event, now = json.loads(text), monotonic()
        self.asked_at, self.audio.unnoticed = math.inf, False  # OpenAI is alive
        match event["type"]:
            case "session.updated":
                self.session_updated(event["session"]["audio"])
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
                self.used(event.get("usage"), self.bridge.transcriber, "transcription")
                self.caller_said(event["item_id"], event["transcript"].strip())
            case "conversation.item.input_audio_transcription.failed":
                self.fault(f"no words for a turn ({event.get('error')}): the call goes on")
                self.caller_said(event["item_id"], "")
            case "response.created":
                self.response_created("" + event["response"]["id"], now)
            case str(kind) if kind.startswith("response.") and (answer := self.active):
                if answer.id == (event.get("response_id") or event["response"]["id"]):
                    answer.life_at = now  # events of a response that is over mean nothing
                    self.on_response(kind, answer, event)
        self.go_on()

    def response_created(self, response_id: str, now: float) -> None:
        """Nobody wants a response that begins while the caller speaks, or to a backchannel."""
        unwanted = self.owed is None and now < self.unwanted_until
        self.active, self.unwanted_until = Answer(response_id, now, now), 0.0
        if unwanted or (self.speaking and not self.model_heard(now)):
            self.cancel(self.active)

    def on_response(self, kind: str, answer: Answer, event: Object) -> None:
        match kind:
            case "response.output_audio.delta":
                self.from_model(answer, self.item_of(answer, event), event["delta"])
            case "response.output_audio_transcript.delta":
                item = self.item_of(answer, event)
                item.text += event["delta"]
                if not answer.cut:
                    self.emit("model_words", item=item.id, text=event["delta"])
            case "response.output_audio_transcript.done":
                self.item_of(answer, event).text = "" + event["transcript"]
            case "response.done":
                self.response_done(answer, event["response"])

    def item_of(self, answer: Answer, event: Object) -> Item:
        item = Item("" + event["item_id"], answer.id, self.session, event.get("content_index", 0))
        self.remember(item.id, "assistant", "")
        return self.playback.items.setdefault(item.id, item)

    def from_model(self, answer: Answer, item: Item, delta: str) -> None:
        """A piece of the model's voice."""
        size, now = len(base64.b64decode(delta, validate=True)), monotonic()
        item.made += size
        if answer.cut and not item.ends and item.heard_ms is None:  # it began after the cut
            self.truncate(item, 0)
        if answer.cut or not size or self.over.done():
            return
        if self.playback.left_s(now) + size / 8000 > MAX_QUEUED_S:
            self.fault(f"speech beyond {MAX_QUEUED_S:g} s is dropped: its response is cancelled")
            self.cancel(answer)
            return
        self.stop_notices(now)
        if not item.ends:
            self.emit("model_started_speaking", item=item.id)
        answer.sounded, self.tool_rounds = True, 0
        if answer.created_at >= self.owed_at:
            self.owed = None
        self.to_twilio(item, delta, size, now)
        if self.bridge.hooks.handling["model_audio"]:
            self.emit("model_audio", mulaw=base64.b64decode(delta))

    def to_twilio(self, item: Item, payload: str, size: int, now: float) -> None:
        """`media`, and the `mark` that Twilio returns when the caller has heard it."""
        if self.twilio:
            mark, sid = self.playback.add(item, size, now), f'"streamSid":"{self.stream_sid}"'
            self.twilio.put(f'{{"event":"media",{sid},"media":{{"payload":"{payload}"}}}}')
            self.twilio.put(f'{{"event":"mark",{sid},"mark":{{"name":"{mark}"}}}}')

    # ── Turns and barge-in ──
    #
    # A caller who speaks over the model is listened to for BARGE_IN_MS of voice first. 「はい」 or
    # a cough leaves the model alone, and OpenAI's response to it is not wanted. Longer speech
    # interrupts: `clear` empties Twilio's queue, each item is truncated in the model's memory at
    # what was heard of it, and what still comes of the response is dropped.

    def model_heard(self, now: float) -> bool:
        """The caller hears the model, or will in a moment again."""
        making = self.active and self.active.sounded and not self.active.cut
        return bool(making) or (self.playback.left_s(now) > 0 and "" not in self.playback.items)

    def caller_started(self, item_id: str, now: float) -> None:
        self.speaking, self.speaking_at, self.turns[item_id] = item_id, now, math.inf
        self.emit("caller_started_speaking", item=item_id)
        self.stop_notices(now)
        at_once = self.bridge.barge_in_ms == 0 and self.echoes < MAX_ECHOES
        self.undecided = self.model_heard(now) and not at_once
        self.last_second = not self.active and self.playback.left_s(now) < LAST_WORDS_S
        if not self.undecided:
            self.barge_in(now)
        if self.undecided or self.ending:
            self.audio.voice = Voice(self.audio.last_second())
            self.judge_voice()

    def judge_voice(self) -> None:
        """The caller speaks: interrupt the model, or call a hang-up off, when that is enough."""
        if (voice := self.audio.voice) and self.speaking:
            now, limit_ms = monotonic(), self.bridge.barge_in_ms
            # OpenAI hears a caller who is too quiet for the measure.
            enough = voice.ms >= limit_ms or now - self.speaking_at >= limit_ms / 1000 + 0.7
            if self.undecided and enough and self.echoes < MAX_ECHOES:
                self.barge_in(now)
            if voice.ms >= CALLS_OFF_MS:
                self.call_off(self.speaking)

    def barge_in(self, now: float) -> None:
        self.undecided = False
        if self.active and self.bridge.barge_in_ms == 0:
            self.active.cut = True  # OpenAI cancels it by itself
        if cut := self.stop_model(now):
            self.echoes = self.echoes + 1 if (cut[0].heard_ms or 0) < ECHO_MS else 0

    def stop_model(self, now: float) -> list[Item]:
        """All that the model says stops: at Twilio and in its memory. Returns what was cut."""
        if self.active and not self.active.cut:
            self.cancel(self.active)
        self.notices.clear()
        cut = [item for item in self.clear(now) if item.id]
        for item in cut:
            self.truncate(item, item.heard_ms or 0)
        for item in cut[:1]:
            self.last_words, sent_ms = item.text, (item.ends - item.begins) // 8
            self.emit("model_interrupted", item=item.id, heard_ms=item.heard_ms, sent_ms=sent_ms)
        return cut

    def clear(self, now: float) -> list[Item]:
        if self.twilio and self.playback.marks:
            self.twilio.put(f'{{"event":"clear","streamSid":"{self.stream_sid}"}}')
        return self.playback.cut(now)

    def stop_notices(self, now: float) -> None:
        """Somebody speaks: a sound of `play` stops."""
        self.notices.clear()
        if "" in self.playback.items:
            self.clear(now)

    def cancel(self, answer: Answer) -> None:
        answer.cut = True
        self.to_openai("response.cancel", response_id=answer.id)

    def truncate(self, item: Item, heard_ms: int) -> None:
        item.heard_ms = heard_ms
        if item.session == self.session:
            where = {"item_id": item.id, "content_index": item.content_index}
            self.to_openai("conversation.item.truncate", **where, audio_end_ms=heard_ms)
        elif self.ready_at < math.inf:  # this session was told all of it
            self.add_text("system", HEARD_ONLY + item.heard_text)

    def caller_stopped(self, item_id: str, now: float) -> None:
        self.speaking, self.turns[item_id] = "", now
        self.audio.turn = len(self.audio.kept)
        self.emit("caller_stopped_speaking", item=item_id)
        making = self.active and not self.active.cut  # more of its words may come
        # speech_stopped comes half a second after the caller's last sound.
        late = not making and self.playback.left_s(now) < LAST_WORDS_S - VAD_SILENCE_S
        heard_out = self.bridge.barge_in_ms == math.inf  # "off": what was said meanwhile counts
        backchannel = self.undecided and not (self.last_second or late or heard_out)
        self.undecided, self.audio.voice = False, None
        if backchannel or (self.ending and not self.ending.called_off_by):
            self.unwanted_until = now + UNWANTED_S
        else:
            self.owe(pause_s=ANSWERS_S if self.server_answers else 0.0)
        if not self.bridge.transcriber:
            self.caller_said(item_id, "")

    def caller_said(self, item_id: str, words: str) -> None:
        """A turn's words have come, or "" when there are none: once for each turn."""
        if self.turns.pop(item_id, None) is None:
            return
        self.remember(item_id, "user", words)
        if words and not self.speaking and not self.turns:
            self.audio.forget_turn()
        bare = re.sub(r"\W", "", words)
        if bare and bare not in re.sub(r"\W", "", self.last_words):  # else it may be an echo
            self.echoes = 0
        self.emit("caller_said", item=item_id, text=words)
        if bare and not CLOSING.fullmatch(bare):
            self.call_off(item_id)
        elif bare and self.ending and self.ending.called_off_by == item_id:
            self.ending.called_off_by = ""  # they took leave as well

    # ── What the model owes the caller ──
    #
    #     owed ─ 1.5 s ─ ask ─ 2.5 s ─ ask ─ 2.5 s ─ new session, ask ─ 2.5 s ─ apology
    #
    # A response that fails, is refused, empty or never comes, and a session that is lost or deaf
    # are one case, because something is still owed.

    def owe(self, create: Object | None = None, pause_s: float = 0.0, again: bool = False) -> None:
        """The model owes the caller its voice from now on; `again`: it still does."""
        if not again or self.owed is None:
            self.owed, self.owed_at = create or {}, monotonic()
        self.quiet_until = monotonic() + pause_s

    def go_on(self) -> None:
        """Do what is due, by what is true now."""
        now = monotonic()
        if self.over.done() or not self.stream_sid:
            return
        self.settle(now)
        if self.notices and not self.model_heard(now) and not self.playback.left_s(now):
            mulaw, item = self.notices.popleft(), Item("")
            self.playback.items[""] = item
            self.to_twilio(item, base64.b64encode(mulaw).decode(), len(mulaw), now)
        if not self.failed:
            self.look_after_model(now)
        if self.ending:
            self.look_after_ending(self.ending, now)

    def settle(self, now: float) -> None:
        """Tell what is known now of how much the caller has heard."""
        for item in self.playback.settle(now, self.active.id if self.active else None):
            if item.id and item.ends:
                self.remember(item.id, "assistant", item.heard_text)
                if item.heard_ms is None:
                    self.last_words, self.echoes = item.text, 0
                facts = {"item": item.id, "text": item.text, "heard_ms": item.heard_ms}
                self.emit("model_said", **facts)

    def look_after_model(self, now: float) -> None:
        if (answer := self.active) and now - answer.life_at > DEAD_S:
            wanted = not answer.cut
            self.cancel(answer)
            self.active = None
            self.fault(f"a response gave no sign of life for {DEAD_S:g} s: cancelled")
            if wanted:
                self.owe(again=True)
        if self.ready_at < math.inf and now - self.asked_at > DEAF_S:
            self.replace_session(f"OpenAI has not reacted for {DEAF_S:g} s")
        limit_s = SILENCE_S if self.history else GREETING_S
        if self.ready_at == math.inf and now - self.lost_at > SESSION_S:
            self.give_up(f"no session for {SESSION_S:g} s ({self.cause or 'no answer'})")
        elif self.owed is None or self.speaking or self.tools:
            return
        elif now - self.owed_at > limit_s and not (self.active and self.active.sounded):
            self.give_up(f"no sound for {limit_s:g} s")
        elif self.ready_at < math.inf and not self.active and now >= self.quiet_until:
            if self.attempts == 2:
                self.attempts = 3
                self.replace_session("the model was asked twice and said nothing")
            elif self.attempts < 4:
                self.ask()
            else:
                self.give_up("the model says nothing, in a new session as well")

    def ask(self) -> None:
        """Ask the model to speak: response.create."""
        now, create, self.attempts = monotonic(), self.owed or {}, self.attempts + 1
        self.asked_at, self.quiet_until = min(self.asked_at, now), now + ASK_AGAIN_S
        if self.tool_rounds >= MAX_TOOL_ROUNDS:
            create = create | {"tool_choice": "none"}
        self.to_openai("response.create", event_id="ask", response=create)
        self.emit("model_asked")

    def response_done(self, answer: Answer, response: Object) -> None:
        """A response is over: completed, cancelled, failed or incomplete."""
        status, details = response.get("status", "completed"), response.get("status_details") or {}
        error = details.get("error") or {}
        why = f"{error.get('code') or details.get('reason') or status}"
        calls = [item for item in response.get("output") or [] if item["type"] == "function_call"]
        calls = [call for call in calls if call.get("status", "completed") == "completed"]
        self.active = None
        self.used(response.get("usage"), self.bridge.model, "response")
        if is_final(error):
            self.give_up(f"{why}: {error.get('message')}")
        elif status == "completed" and calls:
            self.owed, self.attempts = None, 0
            self.tool_rounds += not answer.sounded
            self.tools = asyncio.create_task(self.use_tools(calls[:MAX_TOOLS], answer))
        elif answer.sounded and (status == "completed" or answer.cut):
            self.attempts = 0
            self.audio.forget_turn()
        elif not answer.sounded and not answer.cut:
            self.fault(f"a response brought no sound ({why}): the model is asked again")
            self.owe(again=True, pause_s=ANSWERS_S)
        elif status in ("failed", "incomplete"):
            self.fault(f"a response broke off ({why}): the call goes on")

    async def use_tools(self, calls: list[Object], answer: Answer) -> None:
        """Run what the model called, side by side; then let it speak, once."""
        wanted = await asyncio.gather(*(self.use_tool(call, answer.cut) for call in calls))
        self.tools = None  # run_tool never raises
        if any(wanted) and not (self.ending and answer.sounded):  # one goodbye is enough
            self.owe()
        self.go_on()

    async def use_tool(self, call: Object, cut: bool) -> bool:
        """Run one tool. Returns whether the model is to speak about the result."""
        session, began_at, call_id = self.session, monotonic(), call.get("call_id")
        name, arguments = str(call["name"]), str(call.get("arguments") or "{}")
        result: str | None = "The caller spoke over this, so it was not done."
        if not cut:  # 「はい」 must not book anything
            result = await self.bridge.hooks.run_tool(self, name, arguments)
        text = result or ""
        known = f"{name}({arguments}) → {text}"
        if session == self.session and self.ready_at < math.inf:
            item = {"type": "function_call_output", "call_id": call_id, "output": text}
            self.to_openai("conversation.item.create", item=item)
            self.remember(f"tool {call_id}", "system", known)
        else:  # the session that called it is gone: the next one is told in words
            self.tell(known)
        facts = {"name": name, "arguments": arguments, "result": text}
        self.emit("tool_used", **facts, seconds=monotonic() - began_at)
        return result is not None and not cut

    # ── The session with the model ──
    #
    # It is connected at the webhook, so that the greeting is being made when the stream opens. A
    # new session knows nothing: it is told what both sides have said, of a cut item only what was
    # heard. Then it gets the caller's audio that the old one had not answered.

    async def keep_session(self) -> None:
        """Have a session as long as the call lasts, or until `look_after_model` gives it up."""
        pause_s = 0.25
        while not self.failed:
            final, openai = False, None
            try:
                async with self.bridge.connect() as openai:
                    self.openai, self.session = openai, self.session + 1
                    openai.handle = self.from_openai
                    self.to_openai("session.update", session=self.bridge.session)
                    await openai.read()
                cause = f"closed with {openai.close_code} {openai.close_reason}".strip()
                final = 3000 <= (openai.close_code or 0) < 5000  # OpenAI itself refuses
            except InvalidStatus as refusal:
                status, body = refusal.response.status_code, bytes(refusal.response.body or b"")
                cause = f"HTTP {status}: is OPENAI_API_KEY right, and paid for?"
                final = status < 500 and status not in (408, 425, 429)  # those pass
                final = final or any(code.encode() in body for code in FINAL)
            except Exception as exc:  # reset, a broken handshake, a name that is not found …
                cause = str(exc) or type(exc).__name__
            if (now := monotonic()) - self.ready_at > LASTED_S:
                self.lost_at, pause_s, self.cause = now, 0.25, ""
            self.forget_session()
            if final:
                self.give_up(cause)
            elif cause != self.cause and not self.failed:
                self.fault(f"no session with OpenAI ({cause}): connecting again")
            self.cause = cause
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def session_updated(self, audio: Object) -> None:
        """OpenAI accepts our session.update, and says what it made of it."""
        if self.ready_at < math.inf or not self.openai:
            return
        if any(audio[way]["format"]["type"] != "audio/pcmu" for way in ("input", "output")):
            self.give_up("OpenAI grants another format than audio/pcmu: that would be noise")
            return
        turns = audio["input"].get("turn_detection") or {}
        self.server_answers, self.ready_at = turns.get("create_response", True), monotonic()
        for role, text in self.history.values():
            if text:
                self.add_text(role, text)
        if self.owed is not None and not self.audio.turn:
            self.ask()
        self.quiet_until = monotonic() + ASK_AGAIN_S  # it may hear a turn in what follows
        if self.audio.dropped:
            self.log.warning("the new session misses %d ms of audio", self.audio.dropped * 20)
        for payload in self.audio.kept:
            self.to_openai("input_audio_buffer.append", audio=payload)
        if not self.stream_sid:  # what it says waits unread until the caller is there
            self.openai.transport.pause_reading()

    def replace_session(self, why: str) -> None:
        """The session is of no use: `keep_session` connects again when it is closed."""
        self.fault(f"{why}: a new session")
        if self.owed is None:
            self.owe()
            self.owed_at -= DEAF_S  # the caller has waited
        self.ready_at = self.asked_at = math.inf
        self.lost_at = monotonic()
        self.bridge.close(self.openai)

    def forget_session(self) -> None:
        """What was in progress in the session is over. The texts and the caller's audio stay."""
        self.ready_at = self.asked_at = math.inf
        if self.active and not self.active.cut:
            self.owe(again=True)
        self.active = None
        for item in self.playback.items.values():  # what Twilio has of them is heard
            self.remember(item.id, "assistant", item.heard_text)
        if item_id := self.speaking:  # the new session hears that turn from its beginning
            self.speaking, self.undecided = "", False
            self.caller_said(item_id, "")

    def on_error(self, error: Object) -> None:
        """Most errors are recoverable, and the session stays open: the call goes on."""
        text, heard = f"{error.get('code')}: {error.get('message')}", self.bridge.session["audio"]
        if is_final(error):
            self.give_up(text)
        elif self.ready_at < math.inf:
            if error.get("code") not in HARMLESS:
                self.fault(f"{text}: the call goes on")
            if error.get("event_id") == "ask":
                self.quiet_until = monotonic() + FAILED_S
        elif "transcription" in str(error) and heard["input"].pop("transcription", None):
            self.fault(f"{text}: from now on without transcription")
            self.bridge.transcriber = ""
            self.to_openai("session.update", session=self.bridge.session)
        else:
            self.give_up(f"OpenAI refuses the session: {text} ({error.get('param')})")

    def fault(self, error: str) -> None:
        """Something of the model's side failed; `error` also says what the bridge does about it."""
        self.log.warning("%s", error)
        self.emit("model_failed", error=error)

    def give_up(self, why: str) -> None:
        """No model can be reached: the caller hears an apology, not silence."""
        if not self.failed and not self.over.done():
            self.failed = why
            self.fault(f"{why}: the caller hears an apology")
            self.forget_session()
            self.bridge.close(self.openai)
            self.end_when_heard("model lost", say(APOLOGY), final=True)

    def to_openai(self, kind: str, **content: Any) -> None:
        if self.openai:
            self.openai.put(json.dumps({"type": kind, **content}, ensure_ascii=False))

    def add_text(self, role: str, text: str) -> None:
        content = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
        item = {"type": "message", "role": role, "content": [content]}
        self.to_openai("conversation.item.create", item=item)

    def tell(self, text: str) -> None:
        """Tell the model what nobody has said: this session, and each later one."""
        self.remember(f"told {secrets.token_hex(8)}", "system", text)
        if self.ready_at < math.inf:
            self.add_text("system", text)

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
        self.soon(self.owe)

    def interrupt(self) -> None:
        """Stop what the model says, exactly as a caller's barge-in does."""
        self.soon(lambda: self.stop_model(monotonic()))

    def play(self, mulaw: bytes) -> None:
        """Let the caller hear at most a minute of G.711 mu-law, 8 kHz, when the model is silent.

        A barge-in or the model's next words stop it.
        """
        self.soon(lambda: self.notices.append(bytes(mulaw[: 60 * 8000])))

    def hang_up(self, final: bool = False) -> None:
        """End the call when the caller has heard what the model says.

        A caller who goes on talking calls it off, unless it is `final`; the model is told so.
        """
        self.soon(lambda: self.end_when_heard("hung up", HANG_UP, final))

    def transfer(self, number: str) -> None:
        """Connect the caller with another telephone when they have heard what the model says.

        Raises ValueError for what is no number in E.164 form, such as +81312345678.
        """
        if not E164.fullmatch(number):
            raise ValueError("that is no telephone number: give one such as +81312345678 (E.164)")
        # Twilio shows the caller's own number to the other side, unless that is none.
        shown = "" if E164.fullmatch(self.caller) else f" callerId={quoteattr(self.called)}"
        action = f'action={quoteattr(self.next_url)} method="POST" timeout="20"'
        after = twiml(f"<Dial {action}{shown}>{number}</Dial>")
        self.soon(lambda: self.end_when_heard("transferred", after, final=True))

    def soon(self, act: Callable[[], object]) -> None:
        """Do it on the loop, unless the call is over by then."""
        with contextlib.suppress(RuntimeError):  # the bridge has ended
            self.loop.call_soon_threadsafe(self.at_once, act)

    def at_once(self, act: Callable[[], object]) -> None:
        if not self.over.done():
            act()
            self.go_on()

    def emit(self, event: str, **facts: Any) -> None:
        if self.stream_sid:  # before, call_started has not been told
            self.bridge.hooks.emit(event, self, monotonic(), facts)

    def used(self, usage: Object | None, model: str, kind: str) -> None:
        self.emit("model_used", usage=usage, model=model, kind=kind)

    # ── The end ──
    #
    #     hang_up, transfer, limits, give_up, shutdown ── end_when_heard ── heard ──┐
    #     `stop`, a lost stream ────────────────────────────────────────────────────┴─ end ── live

    def end_when_heard(self, reason: str, twiml: str, final: bool = False) -> None:
        """End the call when the caller has heard what is being said, or a limit passes."""
        now, ending = monotonic(), self.ending
        if ending and (ending.final or (final and reason != "transferred")):
            ending.final, ending.called_off_by = True, ""
        else:
            deadline = now + self.playback.left_s(now) + GOODBYE_S
            self.ending = Ending(reason, twiml, final, deadline)

    def call_off(self, item_id: str) -> None:
        """The caller goes on talking: the call does not end yet, and the model is told so."""
        ending = self.ending
        if ending and not ending.final and not ending.called_off_by:
            ending.called_off_by, ending.quiet_since = item_id, math.inf
            self.log.info("%s is called off: the caller goes on talking", ending.reason)
            self.tell(CALLED_OFF)
            if not self.speaking:
                self.owe()
        elif ending and ending.called_off_by not in ("", item_id):  # they go on and on
            self.ending = None

    def look_after_ending(self, ending: Ending, now: float) -> None:
        if ending.called_off_by:
            since = math.inf if self.busy or self.speaking else min(ending.quiet_since, now)
            ending.quiet_since, due = since, now - since > CALLED_OFF_S
        else:  # words that come in a moment may call it off
            talks = self.speaking or any(now - at < ANSWERS_S for at in self.turns.values())
            waits = self.busy or self.notices or self.playback.marks or (talks and not ending.final)
            due = now > ending.deadline or not waits
        if due:
            self.end(ending.reason, ending.twiml)

    def end(self, reason: str, twiml: str = "") -> None:
        """End the call now. Without TwiML it is not the bridge that ends it."""
        if not self.over.done():
            self.bridge.ended(self, twiml)
            self.over.set_result(reason)

    def tick(self) -> None:
        """Four times a second: all that time alone brings about."""
        now = monotonic()
        self.timer = self.loop.call_later(TICK_S, self.tick)
        if not self.stream_sid:
            if now - self.began_at > UNCLAIMED_S:
                self.end("no stream came")
            return
        if now - self.began_at > self.bridge.settings.max_call_seconds:
            self.end_when_heard("time limit", say(TIME_IS_UP), final=True)
        if self.speaking and (gap_s := now - self.audio.frame_at) > STALL_S:
            self.fill(self.audio.take(self.audio.position_ms + gap_s * 1000, 0, now))
        for item_id, stopped_at in list(self.turns.items()):
            if now - stopped_at > WORDS_S:
                self.caller_said(item_id, "")
        # A session that is deaf sends no event, not even that the caller speaks. So a caller who
        # was loud, and has been silent for a while since the last event, is a reason to ask.
        quiet_s, ready = self.audio.listen(now), self.ready_at < math.inf
        if ready and self.audio.unnoticed and quiet_s > 2 and self.asked_at == math.inf:
            self.asked_at = now
            self.to_openai("session.update", session={"type": "realtime"})  # changes nothing
        if self.speaking and min(quiet_s, now - self.speaking_at) > TURN_LOST_S:
            self.caller_stopped(self.speaking, now)  # its speech_stopped was lost
        self.judge_voice()
        self.go_on()

    def open_stream(self, twilio: TwilioConnection, stream_sid: str) -> None:
        """Twilio's `start`: the caller is there, and hears what the model says from now on."""
        now = monotonic()
        self.twilio, self.stream_sid, twilio.handle = twilio, stream_sid, self.from_twilio
        self.audio.frame_at = self.owed_at = now
        self.emit("call_started")
        if self.openai and self.ready_at < math.inf:
            self.openai.transport.resume_reading()
            if self.owed is not None:  # and asked for already
                self.asked_at, self.quiet_until = now, now + ASK_AGAIN_S
                self.emit("model_asked")
        self.go_on()

    async def live(self) -> None:
        """The call from the webhook until both sides are closed."""
        session, reason = asyncio.create_task(self.keep_session()), "shutdown"
        try:
            reason = await self.over
            await self.finish()
        finally:
            self.timer.cancel()
            tasks = [task for task in (session, self.tools) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.bridge.calls.get(self.sid) is self:
                del self.bridge.calls[self.sid]
            self.emit("call_ended", reason=reason)

    async def finish(self) -> None:
        """Wait a moment for the words and the usage that OpenAI still owes, and settle the rest."""
        self.playback.cut(monotonic())
        self.bridge.close(self.twilio)
        until = monotonic() + WORDS_AT_END_S
        while self.stream_sid and self.ready_at < math.inf and monotonic() < until:
            if not self.active and all(at == math.inf for at in self.turns.values()):
                break
            await asyncio.sleep(0.02)
        if self.active:
            self.used(None, self.bridge.model, "response")
            self.active = None
        self.settle(monotonic())
        for item_id in list(self.turns):
            if self.bridge.transcriber:
                self.used(None, self.bridge.transcriber, "transcription")
            self.caller_said(item_id, "")


def is_final(error: Object) -> bool:
    """Trying again cannot help. Used-up credit is told by the code or by the type."""
    return bool(FINAL & {str(error.get("code")), str(error.get("type"))})


def session_update(settings: Settings, model: str, tools: list[Object]) -> tuple[Object, float]:
    """The `session` of session.update in its GA form, and the ms of voice that interrupt.

    OpenAI refuses a session with an unknown key as a whole. With BARGE_IN_MS above 0 it is the
    bridge that interrupts. SESSION's own interrupt_response wins: false is "off", true is 0.
    """
    pcmu = {"type": "audio/pcmu"}  # 8 kHz by definition: a `rate` key is an unknown parameter
    # Documented and observed defaults differ (silence_duration_ms: 500, 200): all are written out.
    vad = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300}
    audio: Object = {"format": pcmu, "turn_detection": vad | {"silence_duration_ms": 500}}
    if settings.transcription_model:
        audio["transcription"] = {"model": settings.transcription_model}
    session: Object = {
        "type": "realtime",
        "output_modalities": ["audio"],  # or a model may reply with text that nobody hears
        "instructions": settings.instructions,
        "audio": {"input": audio, "output": {"format": pcmu, "voice": settings.voice}},
    }
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


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396; but an object whose `type` the patch changes is replaced."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    if patch.get("type", merged.get("type")) != merged.get("type"):
        merged = {}
    merged |= {key: merge_patch(merged.get(key), value) for key, value in patch.items()}
    return {key: value for key, value in merged.items() if value is not None}


# ── 3 Playback ──────────────────────────────────────────────────────────────────────────────────
#
# OpenAI sends speech several times faster than it is spoken, and Twilio queues it and plays it in
# order and without a pause. So one line of bytes and one clock tell what the caller has heard.
# Positions are bytes of sound since the call began:
#
#       item A                    item B
#     ├─────────────────────────┼──────────────────────────┤
#             ↑ heard                                      ↑ sent: will be played at `ends_at`
#
# A mark follows each piece and is named by its position. Twilio returns it when all before it has
# been played, which sets the clock right. After `clear` Twilio returns the flushed marks as well;
# they are no longer in `marks`, so their return means nothing.

MARK_PATIENCE_S = 2.0  # a mark that is later than this will not come: the clock counts


@dataclass(slots=True)
class Item:
    """A conversation item that the model speaks. A response may hold several."""

    id: str  # OpenAI's; "" is a sound from outside the model (`Call.play`)
    response_id: str = ""
    session: int = 0  # a later session does not know it
    content_index: int = 0
    begins: int = 0  # position of its first byte
    ends: int = 0  # position behind the last byte that Twilio was given; 0: nothing so far
    made: int = 0  # bytes that OpenAI sent, those included that nobody will hear
    text: str = ""  # its words so far
    heard_ms: int | None = None  # where a barge-in cut it

    @property
    def heard_text(self) -> str:
        """Of an item that was cut, the share of its words that was heard."""
        heard = 1.0 if self.heard_ms is None else self.heard_ms * 8 / max(1, self.made)
        return self.text[: round(len(self.text) * heard)]


class Playback:
    """What Twilio was given, and how much of it the caller has heard. No I/O."""

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

    def left_s(self, now: float) -> float:
        """How long the caller goes on hearing what Twilio has."""
        return max(0.0, self.ends_at - now) if self.marks else 0.0

    def heard(self, now: float) -> int:
        """The position that the caller has heard up to: never beyond a mark that is still out."""
        return min(self.sent - int(self.left_s(now) * 8000), *self.marks, self.sent)

    def cut(self, now: float) -> list[Item]:
        """Twilio's queue is cleared. Returns the items that were not heard to their end."""
        heard = self.heard(now)
        self.marks.clear()
        self.ends_at = now
        cut = [item for item in self.items.values() if item.ends > heard]
        for item in cut:
            item.heard_ms = max(0, heard - item.begins) // 8
        return cut

    def settle(self, now: float, active: str | None) -> list[Item]:
        """Takes out, and returns, the items of which it is known now how much was heard.

        `active` is the response in progress, whose items are not complete yet.
        """
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
# The model hears by the call's clock: 20 ms of sound for each 20 ms. Twilio sometimes leaves a gap:
# timestamps jump, or nothing comes for a while. Then the model would wait for ever for the end of a
# sentence, so gaps are filled with silence. `position_ms` counts both, so that sound which comes
# late is not padded twice.
#
# What a new session would need is kept: all since the caller began to speak, until that turn is
# known in words or answered; else the last second.
#
# Voice is what is twice as loud as the noise of this call. A mu-law byte is nearly a logarithm, so
# a mean of them is a loudness. 16 steps are 6 dB, and from -48 dBFS down the steps are even, so the
# same 16 are the floor of a silent call. The noise is the quietest fifth of the last second.

GAP_MS, STALL_S = 40.0, 0.75  # less is jitter: of timestamps, and without a frame
PREROLL, KEPT = 50, 3000  # payloads of 20 ms: kept while nobody speaks; at most
FRAME = 160  # bytes, 20 ms
LOUDNESS = bytes(127 - (byte & 127) for byte in range(256))  # of each mu-law byte; 0 is silence
LOUDER = 16  # steps above the noise
PAUSE_MS = 200.0  # inside a word: the stop in 「ちょっと」 is 150 ms; a longer pause ends the voice


def size_of(payload: str) -> int:
    """The number of bytes in base64 text, without decoding it."""
    return len(payload) * 3 // 4 - payload[-2:].count("=")


def loudness(mulaw: bytes) -> float:
    return sum(mulaw.translate(LOUDNESS)) / max(1, len(mulaw))


class Voice:
    """How many ms of voice there are without a pause, up to now. `before` tells the noise."""

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


class CallerAudio:
    """The caller's audio on its way to the model. No I/O; payloads are base64 as they came."""

    def __init__(self) -> None:
        self.position_ms = -1.0  # how far the model has heard, by Twilio's timestamps
        self.frame_at = 0.0  # when the last frame came
        self.kept: deque[str] = deque()  # payloads, usually 20 ms each
        self.turn = self.dropped = 0  # those of a turn that ended; those that were too many
        self.voice: Voice | None = None  # only while it matters how much voice there is
        self.noise, self.voice_at = 127.0, -math.inf  # the quietest of late; when it was louder
        self.unnoticed = False  # … and OpenAI has sent no event since

    def take(self, timestamp_ms: float, ms: float, now: float) -> float:
        """A frame of so many ms has come. Returns how many are missing before it."""
        self.frame_at = now
        if self.position_ms < 0:
            self.position_ms = timestamp_ms
        gap_ms = timestamp_ms - self.position_ms
        gap_ms = gap_ms if gap_ms >= GAP_MS else 0.0
        self.position_ms += gap_ms + ms
        return gap_ms

    def keep(self, payload: str, needed: bool) -> None:
        """`needed`: the caller speaks, or no session hears it."""
        self.kept.append(payload)
        while len(self.kept) > (KEPT if needed or self.turn else PREROLL):
            self.kept.popleft()
            self.dropped += needed
            self.turn = max(0, self.turn - 1)

    def forget_turn(self) -> None:
        """The caller's last turn is known in words, or answered."""
        for _ in range(min(self.turn, len(self.kept))):
            self.kept.popleft()
        self.turn = self.dropped = 0

    def last_second(self) -> bytes:
        return b"".join(map(base64.b64decode, list(self.kept)[-PREROLL:]))

    def listen(self, now: float) -> float:
        """How long the caller has been quiet, in seconds: a rough look at every fifth frame."""
        for payload in list(self.kept)[-10::5]:
            level = loudness(base64.b64decode(payload))
            self.noise = min(self.noise + 0.1, level)
            if level > self.noise + LOUDER:
                self.voice_at, self.unnoticed = now, True
        return now - self.voice_at


# ── 5 Hooks ─────────────────────────────────────────────────────────────────────────────────────
#
# A hook file is plain Python that imports nothing from here. A function named after an event is
# called at that event, with just the arguments that it names:
#
#     def caller_said(call, text):
#         print(call.sid, text)
#
# Hooks observe, off the audio path: `emit` never waits and never raises. Each file gets its events
# one at a time and in order, in a thread of its own; its `async def` run on the loop. By explicit
# lists a file may offer TOOLS, which the model may call, and PAGES, for a browser of this computer.

EVENTS = {  # -> arguments besides `call` and `at` (time.monotonic() at the event)
    "call_started": "",  # Twilio's stream is open and verified
    "model_asked": "",  # the bridge itself asked the model to speak
    "caller_started_speaking": "item",  # OpenAI heard the caller begin
    "caller_stopped_speaking": "item",  # … and stop
    "caller_said": "item text",  # their words; "" when there are none; once for each turn
    "model_started_speaking": "item",  # the first sound of an item goes to Twilio
    "model_words": "item text",  # a piece of its words as they are made: ahead of what is heard
    "model_said": "item text heard_ms",  # … once that is settled; heard_ms None: all was played
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
MAX_WAITING = 1000  # events of one file
TOOL_S, MAX_RESULT = 20.0, 16_000  # a tool's time; characters of its result


class HookFile(threading.Thread):
    """One file: its handlers, and the thread that calls them."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"hooks/{name}.py", daemon=True)
        self.handlers: dict[str, tuple[Callable[..., Any], list[str]]] = {}  # function, arguments
        self.waiting: queue.SimpleQueue[tuple[str, Object] | None] = queue.SimpleQueue()
        self.loop: asyncio.AbstractEventLoop | None = None  # None: not started
        self.dropped = 0

    def add_handler(self, event: str, function: Callable[..., Any]) -> None:
        """Take a function as the handler of the event it is named after, or say what is wrong."""
        if event not in EVENTS:
            near = difflib.get_close_matches(event, EVENTS, 1, 0.75)
            if near and not event.startswith("_"):
                log.error("%s: %s is no event: did you mean %s?", self.name, event, near[0])
            return
        known, wanted = ["call", "at", *EVENTS[event].split()], []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                wanted = known
            elif name in known:
                wanted.append(name)
            elif parameter.default is parameter.empty:
                near = difflib.get_close_matches(name, known, 1, 0)
                text = "%s: %s has no argument %s: did you mean %s? It has %s. It is not called"
                log.error(text, self.name, event, name, near[0], ", ".join(known))
                return
        self.handlers[event] = (function, wanted)

    def tell(self, event: str, facts: Object) -> None:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
            self.start()
        if self.waiting.qsize() < MAX_WAITING or event == "call_ended":
            self.waiting.put((event, facts))
            return
        self.dropped += 1
        if self.dropped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
            log.error("%s is too slow: %d of its events were dropped", self.name, self.dropped)

    def run(self) -> None:
        while (told := self.waiting.get()) and self.loop:
            event, facts = told
            function, wanted = self.handlers[event]
            try:
                result = function(**{name: facts[name] for name in wanted})
                if inspect.iscoroutine(result):
                    asyncio.run_coroutine_threadsafe(contained(result), self.loop).result()
            except BaseException:  # whatever it is, the next event must find this thread alive
                extra = {"call": facts["call"].sid}
                log.exception("%s: %s failed; the call goes on", self.name, event, extra=extra)


async def contained(work: Any) -> Any:
    """Await what is not ours: what ends a program in it must not end the loop and all calls."""
    try:
        return await work
    except BaseException as exc:
        task = asyncio.current_task()
        if isinstance(exc, Exception) or (task and task.cancelling()):  # or it is we who cancel it
            raise
        raise RuntimeError(repr(exc)) from exc


class Hooks:
    """The hook files of a folder, loaded by path under private names: they shadow no module.

    `names`: those to load, in that order; None: all whose names do not begin with `_`. Raises
    ValueError for a name that is not there, and for a file that exits while it loads because a
    setting of its own is wrong. A file that raises anything else is logged and left out.
    """

    def __init__(self, folder: Path, names: str | None) -> None:
        self.files: dict[str, HookFile] = {}
        self.handling: dict[str, list[HookFile]] = {event: [] for event in EVENTS}
        self.functions: dict[str, Callable[..., Any]] = {}  # tools by name
        self.tools: list[Object] = []  # as session.update wants them
        self.pages: dict[str, Any] = {}  # path -> Path, or function of the query
        self.offline: Callable[[], Any] | None = None  # starts the offline model, returns its URL
        self.threads = ThreadPoolExecutor(256, "tool")
        there = sorted(path.stem for path in folder.glob("[!_]*.py"))
        named = [name.strip() for name in (names or "").split(",") if name.strip()]
        # log.py comes first, because it shapes what the others log while they load.
        for name in sorted(there, key="log".__ne__) if names is None else dict.fromkeys(named):
            if name not in there:
                choice = ", ".join(there) or "none"
                raise ValueError(f"HOOKS names {name!r}, but hooks/ has only: {choice}")
            try:
                self.load(name, folder / f"{name}.py")
            except SystemExit as wrong:
                raise ValueError(f"hooks/{name}.py: {wrong}") from None
            except Exception:
                log.exception("hooks/%s.py does not load and is left out", name)
        log.info("hooks: %s", ", ".join(self.files) or "none")

    def load(self, name: str, path: Path) -> None:
        spec = importlib.util.spec_from_file_location(f"_hook_{name}", path)
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tools = {tool.__name__: tool for tool in getattr(module, "TOOLS", [])}
        pages, offline = getattr(module, "PAGES", {}), getattr(module, "OFFLINE_MODEL", None)
        schemas = [tool_schema(tool) for tool in tools.values()]
        if twice := tools.keys() & self.functions.keys():
            raise TypeError(f"another file has a tool of the name {twice.pop()}")
        for route, page in pages.items():
            if not isinstance(page, Path) and len(inspect.signature(page).parameters) > 1:
                raise TypeError(f"page {route}: give a pathlib.Path or a function of the query")
        file = self.files[name] = HookFile(name)
        for event, function in list(vars(module).items()):
            ours = inspect.isfunction(function) and function.__module__ == spec.name
            if ours and function not in (offline, *tools.values(), *pages.values()):
                file.add_handler(event, function)
        for event in file.handlers:
            self.handling[event].append(file)
        self.tools += schemas
        self.functions |= tools
        self.pages |= pages
        self.offline = offline or self.offline

    def emit(self, event: str, call: Any, at: float, facts: Object) -> None:
        """Tell each file that handles this event. From the loop's thread."""
        for file in self.handling[event]:
            file.tell(event, {"call": call, "at": at, **facts})
        if not event.endswith("_audio"):
            for file in self.handling["any_event"]:
                file.tell("any_event", {"call": call, "at": at, "event": event, "facts": facts})

    async def in_thread(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run what may block."""
        loop = asyncio.get_running_loop()
        return await contained(
            loop.run_in_executor(self.threads, functools.partial(work, *arguments, **named))
        )

    async def run_tool(self, call: Any, name: str, arguments: str) -> str | None:
        """What a tool returns, as text; None: no response is wanted. A failure is told in words."""
        try:
            function = self.functions[name]
            async with asyncio.timeout(TOOL_S):
                given = json.loads(arguments)
                given = {key: value for key, value in given.items() if value is not None}
                check_arguments(tool_schema(function)["parameters"], given)
                if "call" in inspect.signature(function).parameters:
                    given["call"] = call
                if inspect.iscoroutinefunction(function):
                    result = await contained(function(**given))
                else:
                    result = await self.in_thread(function, **given)
                if result is None or isinstance(result, str):
                    return result and result[:MAX_RESULT]
                return json.dumps(result, ensure_ascii=False, default=str)[:MAX_RESULT]
        except KeyError:
            return f"Error: there is no tool named {name}."
        except TimeoutError:
            log.error("tool %s took longer than %g s", name, TOOL_S, extra={"call": call.sid})
            return f"Error: {name} did not answer within {TOOL_S:g} seconds."
        except Exception as exc:
            log.exception("tool %s failed", name, extra={"call": call.sid})
            return f"Error: {type(exc).__name__}: {exc}"[:MAX_RESULT]

    def close(self, limit_s: float) -> None:
        """Wait until the files have handled their events, but no longer than this."""
        deadline = monotonic() + limit_s
        started = [file for file in self.files.values() if file.loop]
        for file in started:
            file.waiting.put(None)
        for file in started:
            file.join(max(0.0, deadline - monotonic()))
            if file.is_alive():
                log.error("%s has not come to its end in %g s and is left", file.name, limit_s)


JSON_TYPES: Object = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}
JSON_TYPES["number"] = (float, int)


def json_schema(hint: Any) -> Object:
    """The JSON schema of a type hint: str int float bool dict list[…] Literal[…] X | None."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return json_schema(inner[0]) | {"description": " ".join(map(str, inner[1:]))}
    if origin is typing.Literal:
        return json_schema(type(inner[0])) | {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return json_schema(next(member for member in inner if member is not type(None)))
    for kind, python in JSON_TYPES.items():
        if (origin or hint) is (python[0] if kind == "number" else python):
            items = {"items": json_schema(inner[0] if inner else str)} if kind == "array" else {}
            return {"type": kind} | items
    raise TypeError(f"{hint} has no JSON schema: use str, int, float, bool, list, dict, Literal")


def tool_schema(tool: Callable[..., Any]) -> Object:
    """A function as session.update's `tools` wants it. Raises TypeError for what has no schema."""
    text, hints = inspect.getdoc(tool), typing.get_type_hints(tool, include_extras=True)
    if not text or not re.fullmatch(r"\w{1,64}", tool.__name__, re.ASCII):
        raise TypeError(f"tool {tool.__name__}: give it a name of a-z 0-9 _ and a docstring")
    properties, required = {}, []
    for name, parameter in inspect.signature(tool).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {tool.__name__}: {parameter} cannot be given by name")
        if name != "call":  # the call itself: the model neither sees nor gives it
            properties[name] = json_schema(hints.get(name, str))
            required += [name] if parameter.default is parameter.empty else []
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "name": tool.__name__, "description": text, "parameters": schema}


def check_arguments(schema: Object, given: Object) -> None:
    """Raises TypeError, in words that help the model to try again, for what does not fit."""
    known = schema["properties"]
    if missing := [name for name in schema["required"] if name not in given]:
        raise TypeError(f"missing: {', '.join(missing)}")
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"there is no argument {name}; there are: {', '.join(known) or 'none'}")
        kind, choice = known[name]["type"], known[name].get("enum", [value])
        is_kind = isinstance(value, JSON_TYPES[kind]) and isinstance(value, bool) == (
            kind == "boolean"
        )
        if not is_kind or value not in choice:
            raise TypeError(f"{name} must be {kind}, such as {choice}")


# ── 6 The way in ────────────────────────────────────────────────────────────────────────────────
#
# Twilio signs the webhook and the stream's handshake with the account's auth token over the public
# URL. The handshake's signature is the same for every call, so the stream also has to bring back a
# token from the TwiML: it is good once, for one CallSid, for a minute, and nothing is done for a
# stream before. Whoever saw a webhook could send it again, so the same one begins no second call.
# Without an auth token only this computer itself may call.

START_S, TOKEN_S = 5.0, 60  # a stream's `start` comes so soon; a token is good so long
MAX_RECONNECTS = 3  # of one call
MAX_PAST, MAX_SEEN = 500, 10_000  # calls that have ended; tokens and webhooks
OVER = ("completed", "busy", "failed", "no-answer", "canceled")  # CallStatus
E164 = re.compile(r"\+[1-9]\d{6,14}", re.ASCII)
LOOPBACK = re.compile(
    r"(.*\.)?localhost|127(\.\d{1,3}){3}|\[?::(1|ffff:127(\.\d{1,3}){3})\]?", re.IGNORECASE
)
FORWARDED = re.compile(
    "forwarded|via|x-(forwarded|original|envoy|amzn?|real)-.*|.*-(client|connecting)-ip"
    "|(cf|cdn|ngrok)-.*",
    re.IGNORECASE,
)
ROUTES = {  # path -> methods
    "/": "GET, HEAD",
    "/health": "GET, HEAD",
    "/twilio/voice": "POST, GET",
    "/twilio/stream": "GET",
    "/twilio/next": "POST, GET",
}


def twiml(*verbs: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><Response>{"".join(verbs)}</Response>'


HANG_UP = twiml("<Hangup/>")


def say(text: str) -> str:
    return twiml(f'<Say language="ja-JP">{escape(text)}</Say><Hangup/>')


def is_sid(kind: str, sid: object) -> bool:
    return isinstance(sid, str) and bool(re.fullmatch(kind + "[0-9a-f]{32}", sid))


def header(request: Request, name: str) -> str:
    """A header's value; "" when it is missing, or sent twice (nobody honest does that)."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else ""


class Form(dict[str, list[str]]):
    """A webhook's pairs. Raises ValueError for more than 200 of them."""

    getlist = dict.__getitem__  # what the twilio package asks a form for

    def __init__(self, text: str) -> None:
        for name, value in parse_qsl(text, keep_blank_values=True, max_num_fields=200):
            self.setdefault(name, []).append(value)

    def first(self, name: str) -> str:
        """As much of it as a <Parameter> (500 characters) and a log can take."""
        return "".join(filter(str.isprintable, self.get(name, [""])[0]))[:200]


@dataclass(slots=True)
class Past:
    """A call that has ended, for what comes after it."""

    history: dict[str, tuple[str, str]]
    twiml: str  # what /twilio/next responds with; "": it is not the bridge that ended the call
    reconnects: int
    ended_at: float = field(default_factory=monotonic)
    asked: bool = False  # what is next


class Bridge:
    """What the calls of this process share: the settings, the hooks, and how many there are."""

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings, self.hooks = settings, hooks
        url = urlsplit(settings.openai_realtime_url)
        query = {"model": settings.openai_realtime_model} | dict(parse_qsl(url.query))
        self.url, self.model = url._replace(query=urlencode(query)).geturl(), query["model"]
        self.tls = ssl.create_default_context() if url.scheme == "wss" else None
        self.session, self.barge_in_ms = session_update(settings, self.model, hooks.tools)
        heard = self.session["audio"]["input"]
        self.transcriber = str((heard.get("transcription") or {}).get("model", ""))
        self.calls: dict[str, Call] = {}  # by CallSid, from the webhook to the last close
        self.past: dict[str, Past] = {}  # by CallSid
        self.seen: dict[str, None] = {}  # tokens and webhooks that were used
        self.silent: dict[TwilioConnection, asyncio.TimerHandle] = {}  # without a request so far
        self.closing: set[asyncio.Task[None]] = set()
        self.draining = False  # SIGTERM has come
        tokens = [token.strip() for token in settings.twilio_auth_token.split(",") if token.strip()]
        self.validators = [RequestValidator(token) for token in tokens]
        self.secret = (tokens[0] if tokens else secrets.token_hex()).encode()

    def connect(self) -> Any:
        key = self.settings.openai_api_key
        return connect(
            self.url,
            create_connection=CONNECTIONS["openai"],
            additional_headers={"Authorization": f"Bearer {key}"} if key else {},
            ssl=self.tls,
            compression=None,  # mu-law does not compress
            proxy=None,
            close_timeout=1,  # s
            ping_interval=5,  # s; a line that is dead without a word is found in 10 s
            ping_timeout=5,
            max_size=16 << 20,  # bytes
        )

    def close(self, connection: Wire | None, code: int = 1000) -> None:
        """Close it; what still comes of it means nothing."""
        if connection:
            connection.handle = lambda text: None
            task = asyncio.create_task(connection.close(code))
            self.closing.add(task)
            task.add_done_callback(self.closing.discard)

    # ── Requests ──

    def process_request(self, connection: ServerConnection, request: Request) -> Any:
        """Every request comes here. None lets the stream's upgrade go on."""
        response = self.route(typing.cast(TwilioConnection, connection), request)
        if request.method == "HEAD" and isinstance(response, Response):
            response.body = b""
        return response

    def route(self, connection: TwilioConnection, request: Request) -> Any:
        path, _, query = request.path.partition("?")
        path = path.removeprefix(urlsplit(self.settings.public_base_url).path)
        path = re.sub("^/twilio/stream/[0-9a-z]+$", "/twilio/stream", path)
        page, methods = self.hooks.pages.get(path), ROUTES.get(path, "GET, HEAD")
        if connection.refusal:
            return connection.respond(*connection.refusal)
        if machine := self.other_machine(request):
            response = connection.respond(200, f"machine {machine} has this call\n")
            response.headers["fly-replay"] = f"prefer_instance={machine}"
            return response
        if path not in ROUTES and page is None:
            return connection.respond(404, "Nothing is here. The webhook is POST /twilio/voice\n")
        if request.method not in methods.split(", "):
            response = connection.respond(405, f"{path} takes {methods}\n")
            response.headers["Allow"] = methods
            return response
        if path == "/health":
            talking = sum(bool(call.stream_sid) for call in self.calls.values())
            health = {"status": "draining" if self.draining else "ok", "calls": talking}
            health |= {"waiting": len(self.calls) - talking, "max_calls": self.settings.max_calls}
            status = 503 if self.draining else 200
            return reply(connection, json.dumps(health), "application/json", status)
        if not path.startswith("/twilio/"):
            if page and not self.validators and not self.not_local(connection, request):
                return self.page(connection, page, query)
            text = "This is a telephone. Its pages are for its owner.\n"
            return connection.respond(200 if path == "/" else 403, text)
        try:
            if why := self.not_allowed(connection, request):
                log.warning("403 for %s %s from %s: %s", request.method, path, connection.peer, why)
                return connection.respond(403, "This was not verified. The log says what to set.\n")
            if path == "/twilio/stream":
                return None
            form = Form(query if request.method == "GET" else connection.form)
            if not is_sid("CA", form.first("CallSid")):
                raise ValueError("CallSid must be CA and 32 of 0-9 a-f")
        except ValueError as exc:
            return connection.respond(400, f"That is no form of Twilio's: {exc}\n")
        xml = self.voice(form, request) if path == "/twilio/voice" else self.next(form, request)
        return reply(connection, xml, "text/xml; charset=utf-8")

    async def page(self, connection: ServerConnection, page: Any, query: str) -> Response:
        """A hook's page: a file, or what a function of the query returns (text: HTML, else JSON)."""
        try:
            if isinstance(page, Path):
                kind = mimetypes.guess_type(page.name)[0] or "application/octet-stream"
                return reply(connection, await self.hooks.in_thread(page.read_bytes), kind)
            given = [dict(parse_qsl(query))][: len(inspect.signature(page).parameters)]
            made = await self.hooks.in_thread(page, *given)
            if isinstance(made, (str, bytes)):
                return reply(connection, made, "text/html; charset=utf-8")
            return reply(connection, json.dumps(made, ensure_ascii=False), "application/json")
        except Exception:
            log.exception("a page failed")
            return connection.respond(500, "This page failed. The log says why.\n")

    def other_machine(self, request: Request) -> str:
        """On Fly.io, the machine that has this call, if it is another: the proxy sends it there."""
        named = re.fullmatch(r".*/twilio/(?:stream/|next\?machine=)([0-9a-z]+)", request.path)
        elsewhere = named and self.settings.fly_machine_id not in ("", named[1])
        return named[1] if named and elsewhere and not header(request, "fly-replay-src") else ""

    def not_local(self, connection: TwilioConnection, request: Request) -> str:
        """Why a request does not come from this computer itself; "" when it does."""
        if not LOOPBACK.fullmatch(connection.peer):
            return "it comes from another computer"
        if forwarded := [name for name in request.headers if FORWARDED.fullmatch(name)]:
            return f"it came through a proxy or tunnel ({forwarded[0]})"
        # A page of another site can make a browser here send requests, under a name of its own that
        # points here as well: its Origin or Host tells.
        for name in (
            header(request, "Host"),
            header(request, "Origin").partition("://")[2] or "localhost",
        ):
            if not LOOPBACK.fullmatch(re.sub(r":\d*$", "", name)):
                return f"its Host or Origin is not this computer ({name[:100]!r})"
        return "another site sent it" if header(request, "Sec-Fetch-Site") == "cross-site" else ""

    def not_allowed(self, connection: TwilioConnection, request: Request) -> str:
        """Why a request to /twilio/* is not let in; "" when it is. What costs time comes last."""
        origin, elsewhere = header(request, "Origin"), self.not_local(connection, request)
        signature = header(request, "X-Twilio-Signature")
        if origin and origin.partition("://")[2] != header(request, "Host"):
            return f"a page of another site sent it ({origin[:100]!r})"
        if not self.validators:
            return elsewhere and f"{elsewhere}: set TWILIO_AUTH_TOKEN, and PUBLIC_BASE_URL"
        if elsewhere and not self.settings.public_base_url:
            return "PUBLIC_BASE_URL is not set: set it to the https address that Twilio calls"
        if not signature:
            return "it has no X-Twilio-Signature: while TWILIO_AUTH_TOKEN is set, only Twilio calls"
        urls, form = self.signed_urls(request), Form(connection.form)
        for url in urls:
            for validator in self.validators:
                wanted = validator.compute_signature(url, form)
                if hmac.compare_digest(wanted.encode(), signature.encode()):
                    return ""
        return (
            f"its signature is not that of {urls[0].partition('?')[0]!r}: TWILIO_AUTH_TOKEN must be "
            "the account's primary token, and PUBLIC_BASE_URL the address on the number's page"
        )

    def base(self, request: Request) -> str:
        """Where Twilio reaches this server: a stranger's header proves nothing."""
        return self.settings.public_base_url or "https://" + header(request, "Host")

    def signed_urls(self, request: Request) -> list[str]:
        """What Twilio may have signed: the URL with and without its port, wss for a stream."""
        url = urlsplit(self.base(request))
        path = request.path if request.path.startswith(url.path + "/") else url.path + request.path
        scheme = "wss" if "/twilio/stream" in path else "https"
        name = url.netloc.removesuffix(f":{url.port}")
        names = dict.fromkeys((url.netloc, name, f"{name}:443"))
        schemes = (
            [scheme]
            if self.settings.public_base_url
            else [scheme, "ws" if scheme == "wss" else "http"]
        )
        return [f"{scheme}://{netloc}{path}" for scheme in schemes for netloc in names]

    # ── TwiML ──

    def voice(self, form: Form, request: Request) -> str:
        """The webhook of a new call. Twilio may deliver it twice."""
        sid, key = form.first("CallSid"), "webhook " + header(request, "X-Twilio-Signature")
        if form.first("CallStatus") in OVER:
            log.warning(
                "a call that is over: /twilio/voice is no status callback", extra={"call": sid}
            )
            return twiml()
        if sid not in self.calls:
            if self.validators and key in self.seen:  # the same webhook again, after its call
                return self.next(form, request)
            if refusal := self.no_room():
                return refusal
            greeting = self.settings.greeting
            self.begin(
                sid, form.first("From"), form.first("To"), request, greeting and GREET + greeting
            )
        keep_latest(self.seen, key, None, MAX_SEEN)
        return self.stream(form, request)

    def begin(self, sid: str, caller: str, called: str, request: Request, opening: str) -> Call:
        """A call, whose model is connected now. `opening` tells it how to begin."""
        self.past.pop(sid, None)
        call = self.calls[sid] = Call(self, sid, caller, called, self.next_url(request))
        if opening:
            call.owe({"instructions": f"{self.settings.instructions}\n\n{opening}"})
        return call

    def next_url(self, request: Request) -> str:
        machine = self.settings.fly_machine_id
        return f"{self.base(request)}/twilio/next" + (machine and f"?machine={machine}")

    def stream(self, form: Form, request: Request) -> str:
        machine, sid = self.settings.fly_machine_id, form.first("CallSid")
        url = "wss" + self.base(request)[5:] + "/twilio/stream" + (machine and f"/{machine}")
        # Twilio drops a query, but brings these back with `start`.
        given = {"token": self.token(sid), "from": form.first("From"), "to": form.first("To")}
        return twiml(
            f"<Connect><Stream url={quoteattr(url)}>",
            *(f'<Parameter name="{name}" value={quoteattr(it)}/>' for name, it in given.items()),
            f'</Stream></Connect><Redirect method="POST">{escape(self.next_url(request))}</Redirect>',
        )

    def next(self, form: Form, request: Request) -> str:
        """What Twilio does when a stream, or the <Dial> of a transfer, has ended."""
        sid, dialled = form.first("CallSid"), form.first("DialCallStatus")
        if (call := self.calls.get(sid)) and not call.over.done():
            if not call.stream_sid:  # it never came
                call.end("no stream came", say(APOLOGY))
            call.end("twilio lost")
        past = self.past.get(sid)
        if past:
            past.asked = True
            if past.twiml and not (dialled and "<Dial" in past.twiml):
                return past.twiml
            if past.reconnects >= MAX_RECONNECTS:
                return say(APOLOGY)
        if dialled == "completed" or form.first("CallStatus") in OVER:
            return HANG_UP
        if refusal := self.no_room():
            return refusal
        opening = LINE_IS_BACK + (GO_ON if past else SAY_AGAIN)
        if dialled:
            opening = NOT_REACHED.format(dialled)
        call = self.begin(sid, form.first("From"), form.first("To"), request, opening)
        if past:
            call.history, call.reconnects = past.history, past.reconnects + 1
        call.log.info("connected again: the stream was lost, or nobody answered a transfer")
        return self.stream(form, request)

    def no_room(self) -> str:
        """What a further caller hears instead; "" when there is room."""
        if self.draining or len(self.calls) < self.settings.max_calls:
            return say(RESTARTING) if self.draining else ""
        log.warning("a caller hears that all lines are busy: MAX_CALLS is %d", len(self.calls))
        return say(BUSY)

    def ended(self, call: Call, twiml: str) -> None:
        keep_latest(self.past, call.sid, Past(call.history, twiml, call.reconnects), MAX_PAST)

    # ── The stream ──

    def token(self, sid: str, about: str = "") -> str:
        """An expiry, a nonce, and their HMAC with the CallSid."""
        about = about or f"{int(time.time()) + TOKEN_S}.{secrets.token_hex(8)}"
        return f"{about}." + hmac.digest(self.secret, f"{sid} {about}".encode(), "sha256").hex()

    def use_token(self, token: str, sid: str) -> bool:
        """Made here (or on another machine of ours) for this CallSid, not expired, not used."""
        parts = re.fullmatch(r"((\d{1,12})\.[0-9a-f]{16})\.[0-9a-f]{64}", token, re.ASCII)
        if not parts or not hmac.compare_digest(self.token(sid, parts[1]), token):
            return False
        new = token not in self.seen and int(parts[2]) >= time.time()
        keep_latest(self.seen, token, None, MAX_SEEN)
        return new

    async def take_stream(self, connection: ServerConnection) -> None:
        """A stream whose handshake was let in: its `start`, then the call, until it ends."""
        twilio = typing.cast(TwilioConnection, connection)
        try:
            async with asyncio.timeout(START_S) as patience:
                twilio.handle = lambda text: self.first_message(twilio, patience, text)
                await twilio.read()
        except TimeoutError:
            log.warning("a stream from %s sent no start in %g s: closed", twilio.peer, START_S)
            await twilio.close(1008)  # policy violation
        if call := twilio.call:
            normal = twilio.close_code in (1000, 1001, 1005)  # closed, going away, without a word
            call.end("caller hung up" if normal else "twilio lost")
            await asyncio.wait([call.life])

    def first_message(self, twilio: TwilioConnection, patience: asyncio.Timeout, text: str) -> None:
        """`connected`, then `start`, which must bring the token."""
        message = json.loads(text)
        if message["event"] == "start":
            patience.reschedule(None)
            try:
                why = self.claim(twilio, message["start"])
            except (LookupError, TypeError, AttributeError) as exc:
                why = f"it is no start of Twilio's ({exc!r:.60})"
            if why:
                log.warning("a stream from %s was refused: %s", twilio.peer, why)
                self.close(twilio, 1008)

    def claim(self, twilio: TwilioConnection, start: Object) -> str:
        """Join a stream to its call. Returns why not."""
        sid, stream_sid, given = start["callSid"], start["streamSid"], start["customParameters"]
        if not (is_sid("CA", sid) and is_sid("MZ", stream_sid)):
            return "its identifiers are none of Twilio's"
        if not self.use_token(given["token"], sid):
            return "it brought no valid token for its call"
        call = self.calls.get(sid)
        if call is None or call.over.done():  # redirected to the webhook; or another machine had it
            if refusal := self.no_room():
                keep_latest(self.past, sid, Past({}, refusal, 0), MAX_PAST)
                return "there is no room"
            assert twilio.request
            history = self.past[sid].history if sid in self.past else {}
            greeting = self.settings.greeting
            call = self.begin(
                sid,
                str(given.get("from")),
                str(given.get("to")),
                twilio.request,
                greeting and GREET + greeting,
            )
            call.history = history
        elif call.stream_sid:
            return "its call has a stream already"
        twilio.call = call
        call.open_stream(twilio, stream_sid)
        return ""


def keep_latest(memory: dict[str, Any], key: str, value: Any, most: int) -> None:
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]


def reply(
    connection: ServerConnection, body: str | bytes, kind: str, status: int = 200
) -> Response:
    response = connection.respond(status, "")
    response.body = body.encode() if isinstance(body, str) else body
    for name in ("Content-Type", "Content-Length"):
        del response.headers[name]  # assigning adds a second one
    response.headers["Content-Type"] = kind
    response.headers["Content-Length"] = str(len(response.body))
    response.headers["Cache-Control"] = "no-store"
    return response


# ── Connections ──

MAX_UNSENT = 4 << 20  # bytes that the other side has not read: some 6 minutes of speech
MAX_UNREADABLE = 50  # messages
MAX_HEAD, MAX_FORM = 16 << 10, 64 << 10  # bytes of a request's head and body
REQUEST_S, MAX_SILENT = 5.0, 200  # a request is complete so soon; connections without one
# RFC 9112: each line in one way only, so that no head makes the pattern try others.
HEAD = re.compile(
    rb"[A-Z]+ [!-~]+ HTTP/1\.[01](\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*)*"
)


class Wire(Connection):
    """A connection as a call uses it: what comes goes to `handle`, and `put` never waits."""

    handle: Callable[[str], object]
    unreadable = 0

    async def read(self) -> None:
        """Hand on each message, until the connection is closed."""
        with contextlib.suppress(ConnectionClosed):
            async for text in self:
                self.attempt(typing.cast(str, text))

    def attempt(self, text: str) -> None:
        try:
            self.handle(text)
        except Exception as exc:  # not what the protocol says, or a fault of ours: the call goes on
            self.unreadable += 1
            log.warning("%s: a message could not be handled: %.200r", type(self).__name__, exc)
            if self.unreadable == MAX_UNREADABLE:
                log.error("%s: %d of them: closed", type(self).__name__, MAX_UNREADABLE)
                self.transport.close()

    def put(self, text: str) -> None:
        broadcast([self], text)  # writes at once; does nothing on a closed connection
        self.check_unsent()

    def check_unsent(self) -> None:
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            log.error("%s has stopped reading: closed", type(self).__name__)
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.check_unsent()  # pongs may pile up as well


class OpenAIConnection(Wire, ClientConnection):
    """OpenAI's side."""


class TwilioConnection(Wire, ServerConnection):
    """Twilio's side: an HTTP request, or the media stream that it becomes.

    websockets parses only requests without a body, and a webhook's POST has one. So bytes are kept
    until head and body are complete; then websockets gets the head without what announces the body.
    For a request that it would drop without a word it gets another one, which `route` refuses.
    """

    call: Call | None = None
    form, refusal = "", None  # the body; status and text

    def __init__(self, *arguments: Any, silent: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.silent, self.head, self.length = silent, b"", 0
        self.unread: bytearray | None = bytearray()  # None: websockets has the request

    @property
    def peer(self) -> str:
        """The address at the other end; behind a proxy or tunnel that of the proxy."""
        return str((self.remote_address or ("?",))[0])

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        refusal = (408, f"no request in {REQUEST_S:g} s\n")
        self.silent[self] = self.loop.call_later(REQUEST_S, self.hand_on, refusal)
        if len(self.silent) > MAX_SILENT:
            next(iter(self.silent)).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.unread is None:
            super().data_received(data)
            return
        self.unread += data
        if not self.head:
            head, blank, body = self.unread.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD:
                self.hand_on((431, f"a head may have {MAX_HEAD} bytes\n"))
            elif blank:
                self.unread = body
                self.read_head(bytes(head))
        if self.head and self.unread is not None and len(self.unread) >= self.length:
            self.form = self.unread[: self.length].decode("utf-8", "replace")
            self.hand_on()

    def read_head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        given = [
            (name.lower(), value.strip())
            for name, _, value in (line.partition(b":") for line in lines[1:])
        ]
        lengths = {value for name, value in given if name == b"content-length"} or {b"0"}
        length = lengths.pop()
        if not HEAD.fullmatch(head):
            self.hand_on((400, "that is no well-formed request\n"))
        elif any(name == b"transfer-encoding" for name, _ in given):
            self.hand_on((411, "send a Content-Length instead of a Transfer-Encoding\n"))
        elif lengths or not re.fullmatch(rb"\d{1,18}", length):
            self.hand_on((400, "Content-Length is not one number\n"))
        elif int(length) > MAX_FORM:
            self.hand_on((413, f"a form may have {MAX_FORM} bytes\n"))
        else:
            kept = [line for line in lines if not line.lower().startswith(b"content-length:")]
            self.head, self.length = b"\r\n".join([*kept, b"", b""]), int(length)
            if (b"expect", b"100-continue") in given:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hand_on(self, refusal: tuple[int, str] | None = None) -> None:
        """websockets gets the request, or one to refuse."""
        self.refusal, self.unread = refusal, None
        self.shown()
        super().data_received(b"GET / HTTP/1.1\r\n\r\n" if refusal else self.head)

    def shown(self) -> None:
        if timer := self.silent.pop(self, None):
            timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self.shown()
        super().connection_lost(exc)


CONNECTIONS: Object = {"twilio": TwilioConnection, "openai": OpenAIConnection}  # see section 8

# ── 7 Start and stop ────────────────────────────────────────────────────────────────────────────

MAY_BE_EMPTY = {"greeting", "transcription_model", "hooks"}  # there an empty value is a choice
RANGES = {"port": (1, 65535), "max_calls": (1, 100_000), "barge_in_ms": (0, 10_000)}
RANGES |= {"max_call_seconds": (1, 86_400), "drain_seconds": (0, 86_400)}
HOST = r"[^/:?#@\s]+(:([1-9]\d{0,3}|[1-5]\d{4}|6[0-5]{2}[0-3]\d))?"
RULES = {  # -> what it must look like, and how to give it
    "public_base_url": (
        rf"https://{HOST}(?!.*/(twilio|health)(/|$))(/[^?#\s]*)?",
        "an https address such as https://my-app.fly.dev, without a route of ours",
    ),
    "openai_realtime_url": (
        rf"wss?://{HOST}([/?](?!.*model=gpt-live)[^#\s]*)?",
        "an address such as wss://api.openai.com/v1/realtime, without a key or user in it",
    ),
    "openai_realtime_model": (
        "(?!gpt-live).*",
        "one such as gpt-realtime-2.1: GPT-Live speaks another protocol",
    ),
    "openai_api_key": (
        "[!-~]*",
        "one from https://platform.openai.com/api-keys, copied as a whole",
    ),
}
SECRET = {"openai_api_key", "openai_realtime_url", "twilio_auth_token"}
DRAIN_GOODBYE_S, STOP_S, NEXT_S = 30.0, 1.5, 2.0  # the last words; the last closes; /twilio/next


def read_dotenv(path: Path) -> None:
    """NAME=value lines, with quotes and # comments; what the environment has already wins."""
    line = re.compile(r"""\s*(?:export\s+)?(\w+)\s*=\s*("[^"]*"|'[^']*'|[^#]*?)\s*(?:\s#.*)?""")
    for text in path.read_text("utf-8-sig").splitlines() if path.is_file() else []:
        if found := line.fullmatch(text):
            value = found[2]
            os.environ.setdefault(found[1], value[1:-1] if value[:1] in ("'", '"') else value)


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings. Raises ValueError: one line with the variable, the value's fault, the fix."""
    chosen: Object = {}
    for setting in fields(Settings):
        key, name = setting.name, setting.name.upper()
        text = env.get(name, "").strip()
        if not text and not (name in env and key in MAY_BE_EMPTY):
            continue
        shown, chosen[key] = "wrong" if key in SECRET else repr(text), text
        if key == "session":
            try:
                chosen[key] = json.loads(text)
            except ValueError as exc:
                raise ValueError(
                    f"{name} is no JSON ({exc}): give an object such as {{}}"
                ) from None
            if not isinstance(chosen[key], dict):
                raise ValueError(f"{name} is {shown}: give a JSON object such as {{}}")
        elif key in RANGES:
            low, high = RANGES[key]
            try:
                kind = int if isinstance(setting.default, int) else float
                chosen[key] = math.inf if text == "off" else kind(text)
            except ValueError:
                chosen[key] = math.nan
            if not (low <= chosen[key] <= high or (key == "barge_in_ms" and text == "off")):
                raise ValueError(f"{name} is {shown}: give a number from {low} to {high}")
        elif key in RULES and not re.fullmatch(RULES[key][0], text):
            raise ValueError(f"{name} is {shown}: give {RULES[key][1]}")
    if env.get("FLY_APP_NAME"):
        chosen.setdefault("public_base_url", f"https://{env['FLY_APP_NAME']}.fly.dev")
    settings = replace(
        Settings(**chosen), public_base_url=chosen.get("public_base_url", "").rstrip("/")
    )
    try:
        audio = session_update(settings, "", [])[0]["audio"]
        formats = [audio[way]["format"] for way in ("input", "output")]
    except (LookupError, TypeError, AttributeError):
        formats = []
    if formats != [{"type": "audio/pcmu"}] * 2:
        raise ValueError("SESSION changes the audio's format: a telephone speaks audio/pcmu only")
    return settings


class LogQueue(logging.handlers.QueueHandler):
    """Hands log lines to a thread that writes them: no call waits for who reads standard error."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                record.msg = f"{record.msg}\n({self.dropped} log lines before this were dropped)"
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


async def drain(bridge: Bridge, signals: list[int]) -> None:
    """Let the calls end by themselves, then end them; a second signal ends them now."""

    async def wait(limit_s: float, waits: Callable[[], object], patience: int = 1) -> None:
        until = monotonic() + limit_s
        while waits() and monotonic() < until and len(signals) <= patience:
            await asyncio.sleep(0.05)  # noqa: ASYNC110 - there is no one event to wait for

    def each(act: Callable[[Call], None], which: Callable[[Call], object] = bool) -> None:
        for call in filter(which, list(bridge.calls.values())):
            act(call)

    end = functools.partial(Call.end, reason="shutdown", twiml=say(RESTARTING))
    each(end, lambda call: not call.stream_sid)
    await wait(bridge.settings.drain_seconds, lambda: bridge.calls)
    each(lambda call: call.end_when_heard("shutdown", say(RESTARTING), final=True))
    await wait(DRAIN_GOODBYE_S, lambda: bridge.calls)
    each(end)
    await wait(STOP_S, lambda: bridge.calls, patience=2)
    unasked = [
        past for past in bridge.past.values() if past.twiml and monotonic() - past.ended_at < NEXT_S
    ]
    await wait(NEXT_S, lambda: not all(past.asked for past in unasked))


async def run(settings: Settings, hooks: Hooks) -> int:
    if not settings.openai_api_key and settings.openai_realtime_url == Settings.openai_realtime_url:
        if hooks.offline is None:
            text = (
                "get one at https://platform.openai.com/api-keys, or copy hooks/offline.py as well"
            )
            print(f"bridge.py: OPENAI_API_KEY is not set: {text}", file=sys.stderr)
            return 2
        url = await hooks.offline()
        settings = replace(settings, openai_realtime_url=url, openai_realtime_model="offline-model")
    bridge, signals, loop = Bridge(settings, hooks), list[int](), asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 2:
            os._exit(1)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)  # not the loop's own way: Windows has none
    try:
        server = await serve(
            bridge.take_stream,
            settings.host or None,
            settings.port,
            process_request=bridge.process_request,
            create_connection=typing.cast(
                Any, functools.partial(CONNECTIONS["twilio"], silent=bridge.silent)
            ),
            compression=None,  # Twilio never offers it
            max_size=64 << 10,  # bytes; a media message has some 400
            open_timeout=2 * REQUEST_S,
            close_timeout=1,
        )
    except (OSError, UnicodeError) as exc:
        where = f"HOST {settings.host!r}, PORT {settings.port}"
        print(f"bridge.py: cannot listen at {where} ({exc}): give free ones", file=sys.stderr)
        return 1
    async with server:
        base = settings.public_base_url or f"http://localhost:{settings.port}"
        log.info("listening on port %d; the webhook is POST %s/twilio/voice", settings.port, base)
        if "/" in hooks.pages and not bridge.validators:
            log.info("to talk to it from this computer, open\n\n    %s/\n", base)
        gc.freeze()  # what the start has made stays, and a call's objects die by their references:
        gc.set_threshold(20_000, 20, 20)  # looking for cycles less often saves a tenth of the CPU
        await stop.wait()
        bridge.draining = True
        text = "stopping: %d calls may go on for up to %g s; a second signal ends them now"
        log.info(text, len(bridge.calls), settings.drain_seconds)
        await drain(bridge, signals)
    await asyncio.to_thread(hooks.close, 10.0 if len(signals) < 2 else 0.5)
    return 0


def main() -> int:
    if sys.argv[1:]:
        print(__doc__)
        return 0 if sys.argv[1:] == ["--help"] else 2
    here = Path(__file__).resolve().parent
    read_dotenv(here / ".env")
    handler = LogQueue(queue.Queue(1000))
    text = "%(asctime)s %(levelname)s %(name)s %(call)s %(message)s"
    handler.setFormatter(logging.Formatter(text, defaults={"call": "-"}))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("websockets").setLevel(logging.ERROR)
    writer = logging.handlers.QueueListener(handler.queue, logging.StreamHandler())
    writer.start()
    try:
        settings = read_settings(os.environ)
        status = asyncio.run(run(settings, Hooks(here / "hooks", settings.hooks)))
    except ValueError as exc:
        print(f"bridge.py: {exc}", file=sys.stderr)
        status = 2
    stopping = threading.Thread(target=writer.stop, daemon=True)
    stopping.start()
    stopping.join(1.0)  # what nobody reads is left
    return status


# ── 8 The fast wire ─────────────────────────────────────────────────────────────────────────────
#
# A `Wire` costs a task's wake-up, a queue and a frame object for each 20 ms of sound. Here whole
# text messages are cut out of the bytes as they come, and written the same way. All else is still
# websockets': handshake, ping, close, fragments, long messages. Without this section everything
# works, a third dearer.
#
#   a frame (RFC 6455, 5.2): 0x81 = final, text │ 0x80 if masked, + length or 126 │ … │ mask │ text


class FastWire(Wire):
    masks = False  # a client masks what it sends, a server does not
    cutting: bool | None = None  # None: `read` has not begun; False: websockets reads from here on
    kept = b""  # bytes that were not dealt with
    keys = b""  # random bytes: a mask takes 4

    async def read(self) -> None:
        self.cutting = True
        self.data_received(b"")
        await super().read()

    def data_received(self, data: bytes) -> None:
        data, self.kept = self.kept + data, b""
        if self.cutting is None and self.state is State.OPEN:
            self.kept = data
            return
        at, end = 0, len(data)
        while self.cutting and end - at >= 2:
            length, text_at = data[at + 1] & 127, at + 2
            if length == 126 and end - at >= 4:
                length, text_at = data[at + 2] << 8 | data[at + 3], at + 4
            elif length == 126:
                break
            if masked := data[at + 1] & 128:
                text_at += 4
            stop, head = text_at + length, data[at]
            odd = length == 127 or bool(masked) is self.masks or self.state is not State.OPEN
            if odd or (head != 0x81 and head < 0x88):  # long, wrong, closing, or a fragment
                self.cutting = False
                break
            if stop > end:
                break
            if head == 0x81:
                text = data[text_at:stop]
                key = data[text_at - 4 : text_at]
                self.attempt((apply_mask(text, key) if masked else text).decode())
            else:
                super().data_received(data[at:stop])
            at = stop
        if self.cutting:
            self.kept = data[at:]
        elif at < end:
            super().data_received(data[at:])

    def put(self, text: str) -> None:
        data = text.encode()
        size, masked = len(data), 128 if self.masks else 0
        if self.state is not State.OPEN or size > 0xFFFF:
            super().put(text)
            return
        head = (
            bytes((0x81, masked | size))
            if size < 126
            else bytes((0x81, masked | 126)) + size.to_bytes(2, "big")
        )
        if self.masks:
            if not self.keys:
                self.keys = os.urandom(4096)
            key, self.keys = self.keys[:4], self.keys[4:]
            data = key + apply_mask(data, key)
        self.transport.write(head + data)
        self.check_unsent()


class FastTwilio(FastWire, TwilioConnection):
    pass


class FastOpenAI(FastWire, OpenAIConnection):
    masks, unread = True, b""

    def data_received(self, data: bytes) -> None:
        """OpenAI's first frame may come with the end of the handshake."""
        if self.state is State.CONNECTING:
            head, blank, rest = (self.unread + data).partition(b"\r\n\r\n")
            self.unread = head
            if not blank:
                return
            super().data_received(head + blank)
            data = rest
        super().data_received(data)


CONNECTIONS |= {"twilio": FastTwilio, "openai": FastOpenAI}

if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())  # a thread of a hook that never returns does not hold up the exit
