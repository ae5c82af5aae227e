#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "twilio>=9.13,<10"]
# ///
# SPDX-License-Identifier: MIT
"""Talk with OpenAI's Realtime model by telephone: the whole bridge in one file.

    caller ── telephone ── Twilio ══ WebSocket ══ bridge.py ══ WebSocket ══ OpenAI Realtime
                             └── POST /twilio/voice ──┘

Start it with `python bridge.py`; the README has the rest. In a call Twilio posts to the webhook.
The bridge connects to OpenAI, and answers with TwiML. So Twilio opens the stream (its WebSocket),
and sound passes both ways until the call ends. Then Twilio asks /twilio/next what to do. Both sides
speak G.711 mu-law at 8 kHz (8 bytes are 1 ms) in base64, so sound passes through as it came.
Sections: 1 settings, 2 the call, 3 playback (what the caller has heard), 4 caller audio, 5 hooks,
6 the way in (webhooks, connections), 7 start and stop, 8 the fast wire (it is there only for speed)
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
from collections import deque, namedtuple
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from http import HTTPStatus
from logging.handlers import QueueHandler
from pathlib import Path
from time import monotonic  # every `now` and `…_at` is in its seconds
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit
from xml.sax.saxutils import escape, quoteattr

from twilio.request_validator import RequestValidator
from websockets import ClientConnection, ConnectionClosed, Headers, Request, Response, State
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection, broadcast
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import apply_mask
from websockets.server import ServerProtocol

log = logging.getLogger("bridge")
Object = dict[str, Any]  # a JSON object


# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Settings:  # defaults; each is read from the environment variable of its name in capitals
    openai_api_key: str = ""  # without it the offline model answers (hooks/offline.py)
    twilio_auth_token: str = ""  # checks signatures; without it only this computer may call
    public_base_url: str = ""  # such as https://my-app.fly.dev
    port: int = 8080
    host: str = ""  # empty: all interfaces
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
    barge_in_ms: float = 400.0  # of voice interrupt; 0: OpenAI interrupts; "off" (inf): no voice
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
#   webhook ── Call ─┬─ keep_session: connect to OpenAI, set up, read; again when it is lost
#                    ├─ `start` ── open_stream ── from_twilio, from_openai: one message at a time
#                    └─ live: until `end` ── both sides are closed ── call_ended
# The state says what is true now. `go_on` looks at it four times a second and after each message
# (but sound), and does what is due. So a message that fails to come needs hardly any code.

ANSWERS_S, ASK_AGAIN_S = 1.5, 2.5  # before the bridge asks (OpenAI may respond first); asks again
SESSION_S, CALLED_OFF_S, WORDS_AT_END_S = 8.0, 8.0, 0.8  # the longest wait for each
HARMLESS = {"response_cancel_not_active", "conversation_already_has_active_response"}  # crossed
# A new session mends neither a FINAL error (code or type) nor REFUSALS (HTTP status, close code).
FINAL = {"insufficient_quota", "credit_balance_exhausted", "invalid_api_key"}
REFUSALS = {*range(300, 500), *range(3000, 5000)} - {408, 425, 429}
# The form of nearly all of Twilio's media messages, because to match costs less than to parse.
MEDIA = re.compile(
    rb'{"event":"media"[^{]*{"track":"inbound","chunk":"\d+","timestamp":"(\d{1,9})",'
    rb'"payload":"([a-zA-Z0-9+/]+={0,2})"'
)
APPEND = b'{"type":"input_audio_buffer.append","audio":"%b"}'  # of each frame, so without json
CLOSING = re.compile(  # words that agree or take leave do not call a hang-up off
    "(?i)(?>はい|ええ|うん|いいえ|いえ|それでは|では|じゃあ|どうも|結構です|大丈夫です|ok|yes"
    "|わかりました|承知しました|ありがとう(?>ございま(?>す|した))?|お願い(?>し|いたし)ます"
    "|よろしく|すみません|失礼(?>し|いたし)ま(?>す|した)|さよう?なら|おやすみなさい|thanks"
    "|(?>good)?bye|あ)++"
)


def to_beat_s() -> float:
    """The s until the next quarter of a second. The ticks of all calls come then, because one
    wake-up that serves several costs less: 3 % of the bridge's CPU."""
    return 0.25 - monotonic() % 0.25


class Call:  # what Twilio has, what OpenAI has, and what is owed to the caller
    def __init__(self, bridge: Bridge, sid: str, caller: str, called: str, next_url: str) -> None:
        self.bridge, self.loop, self.began_at = bridge, asyncio.get_running_loop(), monotonic()
        self.sid, self.stream_sid = sid, ""  # Twilio's "CA…" and "MZ…" (once the stream is open)
        self.caller, self.called = caller, called  # "+81…", "anonymous", a SIP address …
        self.next_url, self.reconnects = next_url, 0  # where Twilio asks what is next; how often
        self.notes, self.log = Object(), logging.LoggerAdapter(log, {"call": sid})  # notes of hooks
        self.twilio: Any = None  # the TwilioConnection, once the stream is open
        self.openai: Any = None  # the latest OpenAIConnection; may be closed
        self.session, self.ready_at = 0, 0.0  # its number; when it was accepted (0: none is)
        self.lost_at, self.cause, self.failed = self.began_at, "", False  # why; for good
        self.playback, self.audio = Playback(), CallerAudio()  # sections 3 and 4
        self.notices = deque[bytes](maxlen=8)  # mu-law of `play`, while the model is not silent
        self.history = dict[str, Item]()  # both sides' items in order, for a new session
        self.turns = dict[str, float]()  # words to come -> when the caller stopped (inf: not yet)
        self.speaking, self.speaking_at = "", 0.0  # the turn that is being spoken; since when
        self.unwanted_until, self.echoes = 0.0, 0  # no response is wanted; cuts by voice in a row
        # The response in progress ("": none), when it was created, and when its last event came.
        self.active, self.created_at, self.life_at = "", 0.0, 0.0
        self.sounded = self.cut = False  # its sound has begun; no more of it goes to Twilio
        # What the model owes the caller: the `response` of the response.create that asks for it.
        # The sound of a response created since `owed_at` clears it; so do tool calls.
        self.owed: Object | None = None
        self.owed_at = self.quiet_until = 0.0  # since when it is owed; no request is sent sooner
        # When the oldest request without an event since was sent (0: none), and that last event.
        self.asked_at = self.event_at = 0.0
        self.attempts = self.tool_rounds = 0  # requests, rounds of tools without a sound
        self.tools: asyncio.Future[Any] | None = None  # all `uses` that the model waits for
        self.uses: list[asyncio.Future[bool]] = []
        self.ending = self.after = self.called_off_by = ""  # why it is to end; TwiML; by a turn
        self.final, self.end_by = False, 0.0  # no voice calls it off; when it comes in any case
        self.over: asyncio.Future[str] = self.loop.create_future()  # why the call has ended
        self.timer = self.loop.call_later(10, self.end, "no stream came")  # s
        self.life = asyncio.create_task(self.live())

    # ── Twilio's messages: https://www.twilio.com/docs/voice/media-streams/websocket-messages ──
    def from_twilio(self, text: bytes) -> None:
        if media := MEDIA.match(text):
            timestamp, payload = media.groups()
            if len(payload) % 4 == 0:
                return self.from_caller(payload, int(timestamp))
        message = json.loads(text.decode())
        match message["event"]:
            case "media":
                sound = message["media"]
                payload, at = sound["payload"].encode(), str(sound["timestamp"])
                base64.b64decode(payload, validate=True)
                self.from_caller(payload, int(at) if re.fullmatch(r"(?a)\d{1,12}", at) else -1)
            case "mark":
                self.playback.mark_returned(int(message["mark"]["name"]), monotonic())
            case "dtmf" if (key := message["dtmf"]["digit"]) in list("0123456789*#"):
                self.emit("key_pressed", key=key)
            case "stop":
                self.end("caller hung up")
        self.go_on()

    def from_caller(self, payload: bytes, timestamp_ms: float) -> None:  # usually 20 ms of sound
        now = monotonic()
        payload, gap_ms = self.audio.take(payload, timestamp_ms, now)
        if gap_ms:
            self.log.info("%d ms of the caller's audio are missing: filled with silence", gap_ms)
        if self.ready_at:
            self.openai.put(APPEND % payload)
        if self.voice_counts(now):
            self.audio.listen(last=1, step=1, now=now)
            # A voice too quiet for our measure counts by OpenAI's, less its silence.
            spoken_ms = (now - self.speaking_at) * 1000 - self.bridge.vad_ms - 200
            enough = max(self.audio.voice_ms, spoken_ms) >= self.bridge.barge_in_ms
            if enough and self.echoes < 3 and self.left_s(now):
                self.stop_sound(now)
            if self.audio.voice_ms >= 700:
                self.call_off(self.speaking)
        if self.bridge.hooks.handling["caller_audio"]:
            self.emit("caller_audio", mulaw=base64.b64decode(payload))

    # ── OpenAI's events: https://platform.openai.com/docs/api-reference/realtime ──
    # A turn of the caller's: speech_started, speech_stopped, committed; its words come later. A
    # response: created; words and sound of its items, faster than they are spoken; done.
    def from_openai(self, text: bytes) -> None:
        event, now = json.loads(text.decode()), monotonic()
        kind, item_id = event["type"], "" + (event.get("item_id") or "")  # raises if no text
        self.asked_at, self.event_at = 0.0, now  # OpenAI is alive
        if kind.startswith("response.") and kind != "response.created":
            if (event.get("response_id") or event["response"]["id"]) != self.active:
                return  # that response is over
            self.life_at = now
            if kind.startswith("response.output_audio"):
                self.from_model(kind, item_id, event, now)
                return
        match kind:
            case "session.updated" if not self.ready_at:
                self.ready_at = now
                for item in self.history.values():
                    self.add_text(item)
                if self.audio.dropped:
                    self.log.warning("%d ms of audio are lost", self.audio.dropped * 20)
                for payload in self.audio.kept:
                    self.openai.put(APPEND % payload)
                # OpenAI may find a turn in the audio that is kept, and respond to it by itself.
                self.quiet_until = now + ASK_AGAIN_S if self.audio.turn else 0.0
                if not self.stream_sid:
                    self.openai.transport.pause_reading()  # the greeting waits for the caller
            case "error" if (error := event["error"]).get("code") not in HARMLESS:
                refused = not self.ready_at and error.get("type") != "server_error"
                self.fault(f"OpenAI reports {error}", refused)
                if not self.ready_at:
                    self.openai.shut()  # `keep_session` connects again
            case "response.created":
                unwanted = self.owed is None and now < self.unwanted_until  # to 「はい」
                self.active, self.created_at, self.life_at = "" + event["response"]["id"], now, now
                self.sounded, self.cut, self.unwanted_until = False, False, 0.0
                if unwanted or (self.speaking and not self.left_s(now)):  # they talk on
                    self.cut = True
                    self.to_openai("response.cancel", response_id=self.active)
            case "response.done":
                self.response_done(event["response"], ANSWERS_S)
            case "input_audio_buffer.speech_started":
                self.caller_said(self.speaking, "")  # one whose end was lost
                if not self.speaking:  # OpenAI notices a voice 60 to 300 ms after it has begun
                    self.audio.voice_ms = 0.0
                    if self.left_s(now):
                        self.audio.listen(last=50, step=1, now=now)
                self.speaking, self.speaking_at, self.turns[item_id] = item_id, now, math.inf
                self.emit("caller_started_speaking", item=item_id)
                if not self.left_s(now) or (self.bridge.barge_in_ms == 0 and self.echoes < 3):
                    self.stop_sound(now)
            case "input_audio_buffer.speech_stopped" | "input_audio_buffer.committed":
                if item_id == self.speaking or item_id not in self.history:  # either may be lost
                    self.caller_stopped(item_id, now)
            case "conversation.item.input_audio_transcription.completed":
                self.used("transcription", event.get("usage"))
                self.caller_said(item_id, event["transcript"].strip())
            case "conversation.item.input_audio_transcription.failed":
                self.fault(f"no words for a turn: {event.get('error')}")
                self.caller_said(item_id, "")
        self.go_on()

    def from_model(self, kind: str, item_id: str, event: Object, now: float) -> None:
        item = self.playback.items.setdefault(item_id, Item(item_id, self.active, self.session))
        if kind == "response.output_audio_transcript.delta":
            item.text = (item.text + event["delta"])[:20_000]
            if not self.cut:
                self.emit("model_words", item=item_id, text=event["delta"])
        elif kind == "response.output_audio_transcript.done":
            item.text = event["transcript"][:20_000]
        if kind != "response.output_audio.delta":
            return
        mulaw = base64.b64decode(event["delta"], validate=True)
        item.made += len(mulaw)
        if self.cut and item.heard_ms is None:  # it begins, or goes on, after the cut
            item.heard_ms = (item.ends - item.begins) // 8
            self.truncate(item)
        elif mulaw and not (self.cut or self.over.done()):
            if self.playback.items.pop("", None):  # once: what follows is the model's own
                self.stop_sound(now, by="model")
            if not item.ends:
                self.history[item_id] = item
                self.emit("model_started_speaking", item=item_id)
            self.sounded, self.tool_rounds = True, 0
            if self.created_at >= self.owed_at:
                self.owed, self.attempts = None, 0
            self.to_twilio(item, event["delta"], len(mulaw), now)
            if self.bridge.hooks.handling["model_audio"]:
                self.emit("model_audio", mulaw=mulaw)

    def to_twilio(self, item: Item, payload: str, size: int, now: float) -> None:
        name, sid = self.playback.add(item, size, now), f'"streamSid":"{self.stream_sid}"'
        media = f'{{"event":"media",{sid},"media":{{"payload":"{payload}"}}}}'
        mark = f'{{"event":"mark",{sid},"mark":{{"name":"{name}"}}}}'
        self.twilio.put(media.encode(), mark.encode())

    # ── Turns and barge-in ──
    # A caller who speaks over the model interrupts it after BARGE_IN_MS of voice. 「はい」 or a
    # cough is shorter: the model speaks on, and OpenAI's response to it is cancelled. To interrupt:
    # the response is cancelled, what still comes of it is dropped, `clear` empties Twilio's queue,
    # and each item is truncated in the model's memory at what was heard of it. The model's echo
    # would interrupt for ever, so after three cuts in a row no voice does, until the caller says
    # other words than the model's, or an item is heard out.
    def left_s(self, now: float) -> float:  # until the model's words end; inf: more may come
        if self.active and self.sounded and not self.cut:
            return math.inf
        return 0.0 if "" in self.playback.items else self.playback.left_s(now)

    def voice_counts(self, now: float) -> bool:  # it may interrupt, or call an ending off
        return self.speaking != "" and (self.ending != "" or self.left_s(now) > 0)

    def stop_sound(self, now: float, by: str = "voice") -> None:  # or "hook"; "model": a notice
        if self.active and not self.cut and by != "model":
            self.cut = True
            if by == "hook" or self.bridge.barge_in_ms:  # at 0 OpenAI cancels it by itself
                self.to_openai("response.cancel", response_id=self.active)
        self.notices.clear()
        if self.playback.marks:
            self.twilio.put(f'{{"event":"clear","streamSid":"{self.stream_sid}"}}'.encode())
        cut = [item for item in self.playback.cut(now) if item.id]
        for item in cut:
            self.truncate(item)
        for item in cut[:1]:
            self.echoes, sent_ms = self.echoes + (by == "voice"), (item.ends - item.begins) // 8
            self.emit("model_interrupted", item=item.id, heard_ms=item.heard_ms, sent_ms=sent_ms)

    def truncate(self, item: Item) -> None:  # in the model's memory, at what was heard
        if item.session == self.session:
            where = {"item_id": item.id, "content_index": 0, "audio_end_ms": item.heard_ms}
            self.to_openai("conversation.item.truncate", **where)
        else:  # this session was told all of it
            self.add_text(Item("", role="system", text=HEARD_ONLY + item.heard_text))

    def caller_stopped(self, item_id: str, now: float) -> None:
        last_sound_at = max(self.speaking_at, now - self.bridge.vad_ms / 1000)
        self.speaking, self.audio.turn = "", len(self.audio.kept)
        if item_id in self.turns or item_id not in self.history:  # else its words are here already
            self.turns[item_id] = now
        self.history.setdefault(item_id, Item(item_id, role="user"))  # the words come later
        self.emit("caller_stopped_speaking", item=item_id)
        # What is said in the model's last second is an answer, however short. With "off" every
        # turn is one. During an ending no turn is, unless it has called that off.
        short = self.left_s(last_sound_at) >= 1 and self.bridge.barge_in_ms < math.inf
        if short or (self.ending and not self.called_off_by):
            self.unwanted_until = now + 3  # s: OpenAI responds sooner
        else:
            self.owe(pause_s=self.bridge.answers_s)

    def caller_said(self, item_id: str, words: str) -> None:  # once for each turn; "": none
        if self.turns.pop(item_id, None) is None:
            return
        self.history.setdefault(item_id, Item(item_id, role="user")).text = words
        self.emit("caller_said", item=item_id, text=words)
        if words and not self.turns:
            self.audio.forget_turn()
        latest = "".join(it.text for it in [*self.history.values()][-4:] if it.role == "assistant")
        if (bare := re.sub(r"\W", "", words)) not in re.sub(r"\W", "", latest):  # no echo
            self.echoes = 0
            if not CLOSING.fullmatch(bare):
                self.call_off(item_id)
            elif self.called_off_by == item_id:  # their voice did, but only to take leave
                self.called_off_by, self.owed = "", None

    # ── What the model owes the caller ──
    #     owed ─ 1.5 s ─ ask ─ 2.5 s ─ ask ─ 2.5 s ─ new session, ask ─ 2.5 s ─ apology
    # A response that fails, is refused, is empty or never comes, and a session that is lost or deaf
    # are one case: it is owed `again`. `attempts` counts requests; a new session's is the 4th.
    def owe(self, create: Object | None = None, pause_s: float = 0.0, again: bool = False) -> None:
        if not again or self.owed is None:
            self.owed, self.owed_at = create or {}, monotonic()
        later = self.quiet_until if again or self.asked_at else 0.0  # after a request, no sooner
        self.quiet_until = max(monotonic() + pause_s, later)

    def go_on(self) -> None:
        now = monotonic()
        if self.active and (now - self.life_at > 6 or not self.ready_at):  # s
            self.to_openai("response.cancel", response_id=self.active)
            self.response_done({"status": "lost", "status_details": "no sign of life"})
        for item in self.playback.settle(now, self.active):  # Twilio is done with it
            if item.id and item.ends:
                if item.heard_ms is None and not self.left_s(now):
                    self.echoes = 0
                self.emit("model_said", item=item.id, text=item.text, heard_ms=item.heard_ms)
        if self.tools and self.tools.done() and not self.over.done():  # all have returned
            wanted, self.tools = any(self.tools.result()), None
            if wanted and not (self.ending and self.sounded):  # one goodbye is enough
                self.owe()
        speaks = self.speaking or self.tools or (self.active and self.sounded)
        waits = self.owed is not None and not speaks  # the caller does
        late = waits and now - self.owed_at > (20 if self.history else 8)  # s; greeting: 8
        due = waits and self.ready_at and not self.active and now >= self.quiet_until
        if self.failed or self.over.done():
            pass  # nothing more is asked for
        elif not self.ready_at and now - self.lost_at > SESSION_S:
            self.fault(f"no session for {SESSION_S:g} s ({self.cause or 'no answer'})", final=True)
        elif late or (due and self.attempts > 3):
            self.fault("the model says nothing", final=True)
        elif (self.asked_at and now - self.asked_at > SESSION_S) or (due and self.attempts == 2):
            self.fault("the model was asked and says nothing: a new session")
            self.owe(again=True)
            self.ready_at, self.asked_at, self.lost_at, self.attempts = 0.0, 0.0, now, 3
            self.openai.shut()  # `keep_session` connects again
        elif due:
            self.attempts, self.asked_at = self.attempts + 1, self.asked_at or now
            self.quiet_until = now + ASK_AGAIN_S
            more = {"tool_choice": "none"} if self.tool_rounds >= 8 else {}
            self.to_openai("response.create", response=(self.owed or {}) | more)
            self.emit("model_asked")
        if self.notices and not (self.playback.left_s(now) or self.left_s(now)):
            mulaw, item = self.notices.popleft(), self.playback.items.setdefault("", Item(""))
            self.to_twilio(item, base64.b64encode(mulaw).decode(), len(mulaw), now)
        if self.ending and self.stream_sid:
            # The words of a turn come a moment after it, and may call the ending off.
            talks = not self.final and any(now - at < ANSWERS_S for at in self.turns.values())
            heard = not (self.busy or self.notices or self.playback.marks or talks)
            if self.called_off_by and (self.busy or self.speaking):
                self.end_by = now + CALLED_OFF_S
            if now > self.end_by or (heard and not self.called_off_by):
                self.end(self.ending, self.after)

    def response_done(self, response: Object, pause_s: float = 0.0) -> None:  # or lost
        status, calls = response.get("status", "completed"), response.get("output") or []
        calls = [call for call in calls if call["type"] == "function_call"]
        calls = [call for call in calls if call.get("status", "completed") == "completed"]
        self.active, sounded = "", self.sounded and status != "lost"
        if self.cut:  # the caller talked on: that is no failure of the model's
            self.attempts = 0
        self.used("response", response.get("usage"))
        if status == "completed" and calls and self.tool_rounds < 8:
            self.owed, self.attempts, self.tool_rounds = None, 0, self.tool_rounds + 1
            uses = [asyncio.ensure_future(self.use_tool(call, self.cut)) for call in calls[:16]]
            self.uses = [*(self.uses if self.tools else []), *uses]  # side by side
            self.tools = asyncio.gather(*self.uses, return_exceptions=True)
            self.tools.add_done_callback(lambda _: self.go_on())
        elif sounded and (self.cut or status == "completed"):
            self.audio.forget_turn()
        elif not (self.cut or self.failed or self.over.done()):
            self.fault(f"a response is {status} ({response.get('status_details')})")
            if not sounded:
                self.owe(again=True, pause_s=pause_s)

    async def use_tool(self, call: Object, cut: bool) -> bool:  # does the model speak of it?
        session, began_at, call_id = self.session, monotonic(), call.get("call_id")
        name, arguments = str(call.get("name")), str(call.get("arguments") or "{}")
        # A response to a backchannel is cut as well: 「はい」 must not book anything.
        result = NOT_DONE if cut else await self.bridge.hooks.run_tool(self, name, arguments)
        text = result or ""
        told = Item(f"tool {call_id}", role="system", text=f"{name}({arguments}) → {text}")
        self.history[told.id] = told
        if session == self.session:
            item = {"type": "function_call_output", "call_id": call_id, "output": text}
            self.to_openai("conversation.item.create", item=item)
        else:  # the session that called it is gone: the next one is told in words
            self.add_text(told)
        took_s = monotonic() - began_at
        self.emit("tool_used", name=name, arguments=arguments, result=text, seconds=took_s)
        return result is not None and not cut

    # ── The session with the model ──
    # A new one is told what both sides have said, of the model's items only what was heard. Then
    # it gets the caller's audio that the old one had not answered.
    async def keep_session(self) -> None:
        pause_s = 0.25
        while not self.failed:
            try:
                async with self.bridge.connect() as self.openai:
                    self.session, self.openai.handle = self.session + 1, self.from_openai
                    self.to_openai("session.update", session=self.bridge.session)
                    await self.openai.read()
                code, why = self.openai.close_code or 0, self.openai.close_reason or ""
                cause = f"closed with {code} {why}".strip()
            except Exception as exc:  # refused, reset, a broken handshake, an unknown name …
                cause, refusal = str(exc) or type(exc).__name__, getattr(exc, "response", None)
                code, why = (refusal.status_code, str(refusal.body)) if refusal else (0, "")
            if self.ready_at and monotonic() - self.ready_at > 2:  # s; else it never worked
                self.lost_at, pause_s, self.cause = monotonic(), 0.25, ""
            self.ready_at = self.asked_at = 0.0
            self.caller_said(self.speaking, "")  # the next session gets all of that turn
            self.speaking = ""
            final = code in REFUSALS or any(word in why for word in FINAL)
            if (final or cause != self.cause) and not self.failed:
                self.fault(f"no session with OpenAI: {cause}", final)
            self.cause = cause
            self.go_on()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def fault(self, error: str, final: bool = False) -> None:  # on the model's side
        final = final or any(word in error for word in FINAL)
        error = clean(error) + (": the caller hears an apology" if final else ": the call goes on")
        self.log.warning("%s", error)
        self.emit("model_failed", error=error)
        if final and not self.failed:
            self.failed, self.ready_at = True, 0.0
            if self.openai:
                self.openai.shut()
            self.end_when_heard("model lost", say(APOLOGY), final=True)

    def to_openai(self, kind: str, **content: Any) -> None:
        if self.ready_at or kind == "session.update":
            text = json.dumps({"type": kind, **content}, ensure_ascii=False)
            self.openai.put(text.encode(errors="replace"))  # half an emoji has no UTF-8

    def add_text(self, item: Item) -> None:
        if text := item.heard_text:
            kind = "output_text" if item.role == "assistant" else "input_text"
            message = {"role": item.role, "content": [{"type": kind, "text": text}]}
            self.to_openai("conversation.item.create", item={"type": "message", **message})

    # ── For hooks and tools; from any thread ──
    @property
    def busy(self) -> bool:
        """The model is heard, is about to speak, or a tool runs."""
        more_comes = not self.failed and (self.owed is not None or self.active or self.tools)
        return bool(more_comes or (self.playback.marks and "" not in self.playback.items))

    def tell_model(self, text: str) -> None:
        """Tell the model something that the caller has not said, and let it speak about that."""
        item = Item(f"told {secrets.token_hex(8)}", role="system", text=text)
        self.soon(lambda: self.add_text(self.history.setdefault(item.id, item)))
        self.soon(self.owe)

    def interrupt(self) -> None:
        """Stop what the model says, exactly as a caller's barge-in does."""
        self.soon(lambda: self.stop_sound(monotonic(), by="hook"))

    def play(self, mulaw: bytes) -> None:
        """Play G.711 mu-law, 8 kHz, a minute at most, when the model is silent. It stops when the
        model or the caller speaks."""
        self.soon(lambda: self.notices.append(bytes(mulaw[: 60 * 8000])))

    def hang_up(self, final: bool = False) -> None:
        """End the call when the caller has heard what the model says. A caller who talks on calls
        it off, unless it is `final`; the model is told so."""
        self.soon(lambda: self.end_when_heard("hung up", HANG_UP, final))

    def transfer(self, number: str) -> None:
        """Dial another telephone for the caller when they have heard what the model says. Raises
        ValueError for what is no number in E.164 form, such as +81312345678."""
        if not E164.fullmatch(number):
            raise ValueError("that is no telephone number: give one such as +81312345678 (E.164)")
        # Without callerId Twilio shows the caller's own number, which not every caller has.
        shown = "" if E164.fullmatch(self.caller) else f" callerId={quoteattr(self.called)}"
        action = f'action={quoteattr(self.next_url)} method="POST" timeout="20"{shown}'
        dial = f"<Response><Dial {action}>{number}</Dial></Response>"
        self.soon(lambda: self.end_when_heard("transferred", dial, final=True))

    def soon(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the bridge has ended
            self.loop.call_soon_threadsafe(lambda: self.over.done() or act())
            self.loop.call_soon_threadsafe(self.go_on)

    def emit(self, event: str, **facts: Any) -> None:
        if self.stream_sid:  # before, call_started has not been told
            self.bridge.hooks.emit(event, self, monotonic(), facts)

    def used(self, kind: str, usage: Object | None) -> None:
        if model := self.bridge.model if kind == "response" else self.bridge.transcriber:
            self.emit("model_used", usage=usage, model=model, kind=kind)

    # ── The end ──
    #     hang_up, transfer, limit, fault, shutdown ── end_when_heard ── heard ──┐
    #     `stop`, a lost stream, no stream ───────────────────────────────────────┴─ end ── live
    # `live` closes the stream. Then Twilio asks /twilio/next, and gets the ending's TwiML.
    def end_when_heard(self, reason: str, twiml: str, final: bool = False) -> None:
        if not (self.ending and self.final):  # the first that is final stands
            self.end_by = monotonic() + self.playback.left_s(monotonic()) + 15  # a goodbye
            self.ending, self.after, self.final, self.called_off_by = reason, twiml, final, ""

    def call_off(self, item_id: str) -> None:  # because the caller talks on
        if self.called_off_by not in ("", item_id):  # in a second turn: the ending is dropped
            self.ending = self.called_off_by = ""
        elif self.ending and not self.final and not self.called_off_by:
            self.called_off_by, self.end_by = item_id, monotonic() + CALLED_OFF_S
            self.tell_model(CALLED_OFF)

    def end(self, reason: str, twiml: str = "") -> None:  # now; without TwiML, others ended it
        if not self.over.done():
            twiml = twiml or ("" if self.stream_sid else say(APOLOGY))
            self.bridge.ended(self.sid, Past(twiml, self.history, self.notes, self.reconnects))
            self.over.set_result(reason)

    def tick(self) -> None:  # four times a second: all that time alone brings about
        now, audio = monotonic(), self.audio
        self.timer = self.loop.call_later(to_beat_s(), self.tick)
        if now - self.began_at > self.bridge.settings.max_call_seconds:
            self.end_when_heard("time limit", say(TIME_IS_UP), final=True)
        if self.speaking and (gap_s := now - audio.frame_at) > STALL_S:
            self.from_caller(b"", audio.position_ms + gap_s * 1000)  # silence
        words_s = 10 if self.bridge.transcriber else 0  # the longest wait for a turn's words
        for item_id in [key for key, at in self.turns.items() if now - at > words_s]:
            self.caller_said(item_id, "")
        while len(self.history) > 200:
            del self.history[next(iter(self.history))]
        audio.trim(needed=self.speaking != "" or not self.ready_at)
        if not self.voice_counts(now):  # else each frame was listened to
            audio.listen(last=10, step=5, now=now)
        # A deaf session sends no event, not even speech_started. So after a loud voice, 2 s of
        # quiet and no event, the bridge sends what every live session responds to.
        if self.ready_at and not self.asked_at and self.event_at < audio.voice_at < now - 2:
            self.asked_at = now
            self.to_openai("session.update", session={"type": "realtime"})  # no change
        if self.speaking and max(audio.voice_at, self.speaking_at) < now - 9:  # its end was lost
            self.caller_stopped(self.speaking, now)
        self.go_on()

    def open_stream(self, twilio: TwilioConnection, stream_sid: str) -> None:
        now = monotonic()
        self.twilio, self.stream_sid, twilio.handle = twilio, stream_sid, self.from_twilio
        self.audio.frame_at = self.owed_at = now  # from now on the caller waits
        self.quiet_until, self.asked_at = now + ASK_AGAIN_S, 0.0
        self.emit("call_started")
        if self.cause:  # nobody was told before
            self.emit("model_failed", error=clean(self.cause))
        if self.attempts:  # the greeting is asked for already
            self.emit("model_asked")
        if self.ready_at:
            self.openai.transport.resume_reading()
        self.timer.cancel()
        self.tick()

    async def live(self) -> None:
        session, reason = asyncio.create_task(self.keep_session()), "shutdown"
        try:
            reason = await self.over
            self.playback.cut(monotonic())
            if self.twilio:
                self.twilio.shut()
            for _ in range(round(WORDS_AT_END_S / 0.05)):  # for words and usage
                if self.ready_at and (self.active or self.turns.keys() - {self.speaking}):
                    await asyncio.sleep(0.05)
            self.ready_at = 0.0  # what has not come is missing
            self.go_on()
            for item_id in list(self.turns):
                self.used("transcription", None)
                self.caller_said(item_id, "")
        finally:
            self.timer.cancel()
            for task in filter(None, (session, self.tools)):
                task.cancel()
            await asyncio.wait([session])
            if self.bridge.calls.get(self.sid) is self:
                del self.bridge.calls[self.sid]
            self.emit("call_ended", reason=reason)


def session_update(settings: Settings, model: str, tools: list[Object]) -> tuple[Object, float]:
    """The `session` of session.update, which OpenAI refuses when it does not know a key, and the ms
    of voice that interrupt. SESSION's own interrupt_response wins: false is "off", true is 0."""
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
    session |= {"tools": tools, "tool_choice": "auto"} if tools else {}
    session, barge_in_ms = merge_patch(session, settings.session), settings.barge_in_ms
    if turns := session["audio"]["input"].get("turn_detection"):
        barge_in_ms = {True: 0.0, False: math.inf}.get(turns.get("interrupt_response"), barge_in_ms)
        ours = {"create_response": True, "interrupt_response": barge_in_ms == 0}
        session["audio"]["input"]["turn_detection"] = ours | turns
    return session, barge_in_ms


def clean(text: str) -> str:  # makes what others wrote fit for a log
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)[:500]


def merge_patch(target: Any, patch: Any) -> Any:  # RFC 7396, but a new `type` replaces all
    if not isinstance(patch, Mapping):
        return patch
    old = target if isinstance(target, Mapping) else {}
    merged = dict(old) if patch.get("type", old.get("type")) == old.get("type") else {}
    merged |= {key: merge_patch(merged.get(key), value) for key, value in patch.items()}
    return {key: value for key, value in merged.items() if value is not None}


# ── 3 Playback ──────────────────────────────────────────────────────────────────────────────────
# OpenAI sends speech several times faster than it is spoken. Twilio queues it, and plays it in
# order and without a pause. So one line of bytes and one clock tell what the caller has heard:
#     ├── item A ───────────────┼── item B ─────────────────┤
#             ↑ heard                                       ↑ sent: will be played at `ends_at`
# A mark follows each piece, named by its position (bytes since the call began). When all before it
# was played, Twilio returns it, and so sets the clock right. A mark that `clear` flushed does not.


@dataclass(slots=True)
class Item:  # of the conversation: a turn of the caller's, what the model says, or was told
    id: str  # OpenAI's, "tool …" or "told …"; "" is a sound from outside the model (`Call.play`)
    response_id: str = ""  # the model speaks it in this response, which may have several
    session: int = 0  # a later session does not know it
    role: str = "assistant"  # or user, system
    text: str = ""  # its words so far
    begins: int = 0  # position of its first byte
    ends: int = 0  # position behind the last byte that Twilio was given; 0: nothing so far
    made: int = 0  # bytes that OpenAI sent, those included that nobody will hear
    heard_ms: int | None = None  # where it was cut; None: it was not

    @property
    def heard_text(self) -> str:  # of an item that was cut, the share of its words that was heard
        heard = 1.0 if self.heard_ms is None else self.heard_ms * 8 / max(1, self.made)
        return self.text[: round(len(self.text) * heard)]


class Playback:  # what Twilio was given, and how much of it the caller has heard; no I/O
    def __init__(self) -> None:
        self.sent, self.ends_at = 0, 0.0  # bytes; when the last of them will have been played
        self.marks = 0  # bytes sent after the latest mark that Twilio has returned
        self.items: dict[str, Item] = {}  # by id, in order, until it is known what was heard

    def add(self, item: Item, size: int, now: float) -> int:  # its mark's position and name
        item.begins = item.begins if item.ends else self.sent
        self.sent, self.marks = self.sent + size, self.marks + size
        item.ends, self.ends_at = self.sent, max(self.ends_at, now) + size / 8000
        return self.sent

    def mark_returned(self, position: int, now: float) -> None:
        if self.sent - self.marks < position <= self.sent:
            self.marks = self.sent - position
            self.ends_at = now + self.marks / 8000

    def left_s(self, now: float) -> float:  # until all that Twilio has is played
        return max(0.0, self.ends_at - now)

    def cut(self, now: float) -> list[Item]:  # at `clear`: the items that were not heard to the end
        heard, self.ends_at, self.marks = self.sent - int(self.left_s(now) * 8000), now, 0
        cut = [item for item in self.items.values() if item.ends > heard]
        for item in cut:
            item.heard_ms = max(0, heard - item.begins) // 8
        return cut

    def settle(self, now: float, active: str) -> list[Item]:  # takes out those whose fate is known
        if now > self.ends_at + 2:  # the marks will not come any more: the clock counts
            self.marks = 0
        played, items = self.sent - self.marks, self.items.values()
        known = [item for item in items if item.heard_ms is not None or item.ends <= played]
        # More items of the `active` response, or more of this one, may come.
        return [self.items.pop(item.id) for item in known if item.response_id != (active or None)]


# ── 4 Caller audio ──────────────────────────────────────────────────────────────────────────────
# OpenAI's VAD knows no clock but the audio: where Twilio leaves a gap, a sentence would never end.
# So silence fills it. A new session gets what is `kept`: from a second before the caller spoke,
# until that turn is known in words or answered.
#
# Voice is twice as loud as the noise (the call's quietest sound of late; it rises 2 dB a second).
# A mu-law byte is nearly a logarithm (16 steps: 6 dB), so a mean of bytes is a loudness.
STALL_S = 0.75  # without a frame: a gap that is not over
LOUDNESS = bytes(127 - (byte & 127) for byte in range(256))  # of each mu-law byte; 0 is silence


class CallerAudio:  # the caller's audio on its way to the model; no I/O
    def __init__(self) -> None:
        self.position_ms, self.frame_at = -1.0, 0.0  # taken so far (-1: none); when a frame came
        self.kept: list[bytes] = []  # payloads, base64 as they came, usually 20 ms each
        self.turn = self.dropped = 0  # how many are of turns that ended; were too many
        self.voice_ms = self.pause_ms = 0.0  # of voice up to now; since the last of it
        self.noise, self.voice_at = 127.0, -math.inf  # loudness; when the last louder frame came

    def take(self, payload: bytes, timestamp_ms: float, now: float) -> tuple[bytes, int]:
        """Returns what to append, and the ms of it that fill a gap."""
        size, gap_ms, self.frame_at = len(payload) * 3 // 4 - payload.count(b"=", -2), 0, now
        if self.position_ms < 0:
            self.position_ms = timestamp_ms
        if timestamp_ms - self.position_ms >= 40:  # less is jitter
            gap_ms = round(min(timestamp_ms - self.position_ms, 30_000))  # more than ends any turn
            mulaw = b"\xff" * (gap_ms * 8) + base64.b64decode(payload)
            payload, self.position_ms = base64.b64encode(mulaw), timestamp_ms
        self.position_ms += size / 8
        self.kept.append(payload)
        return payload, gap_ms

    def trim(self, needed: bool) -> None:
        if (over := len(self.kept) - (3000 if needed or self.turn else 50)) > 0:  # 60 s, 1 s
            del self.kept[:over]
            self.turn, self.dropped = max(0, self.turn - over), self.dropped + over * needed

    def listen(self, last: int, step: int, now: float) -> None:  # to every `step`th of them
        for payload in self.kept[-last::step]:
            mulaw = base64.b64decode(payload)
            ms = len(mulaw) / 8
            level = sum(mulaw.translate(LOUDNESS)) / (len(mulaw) or 1)
            louder = level > self.noise + 16  # in a silent call: all above -48 dBFS
            self.noise += min(0.1, (level - self.noise) / 4)  # one silent frame is not the noise
            self.pause_ms += 0.0 if louder else ms
            if self.pause_ms > 200:  # the stop inside of 「ちょっと」 is shorter
                self.voice_ms = 0.0
            if louder:
                self.voice_ms += ms + (self.pause_ms if self.voice_ms else 0.0)
                self.pause_ms, self.voice_at = 0.0, now

    def forget_turn(self) -> None:  # it is known in words, or answered
        del self.kept[: self.turn]
        self.turn = self.dropped = 0


# ── 5 Hooks ─────────────────────────────────────────────────────────────────────────────────────
# When an event comes, each hook file's function of its name is called, with the arguments that it
# names: the event's (below), `call`, `at` (time.monotonic()). The README says when each one comes.
SIGNATURES = """
call_started() model_asked() caller_started_speaking(item) caller_stopped_speaking(item)
caller_said(item text) model_started_speaking(item) model_words(item text) call_ended(reason)
model_said(item text heard_ms) model_interrupted(item heard_ms sent_ms) any_event(event facts)
model_used(usage model kind) model_failed(error) tool_used(name arguments result seconds)
key_pressed(key) caller_audio(mulaw) model_audio(mulaw)"""
EVENTS = dict(re.findall(r"(\w+)\((.*?)\)", SIGNATURES))  # name -> its arguments, by spaces
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
MAX_WAITING, TOOL_S, MAX_RESULT = 1000, 20.0, 16_000  # events or log lines; s; characters
POOL = ThreadPoolExecutor(256, "tool")  # for plain functions that may block


class Hooks:  # a folder's files: all, or those of `names`. A file's SystemExit stops the start
    def __init__(self, folder: Path, names: str | None) -> None:
        self.handling: dict[str, list[Any]] = {event: [] for event in EVENTS}
        self.functions, self.pages, self.files = Object(), Object(), Object()
        self.dropped = 0
        there = sorted(path.stem for path in folder.glob("[!_]*.py"))  # log shapes what others log
        chosen = sorted(there, key="log".__ne__) if names is None else re.findall(r"[^\s,]+", names)
        if missing := set(chosen) - set(there):
            sys.exit(f"HOOKS names {missing.pop()!r}: give some of {', '.join(there)}")
        for name in dict.fromkeys(chosen):
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
        self.pages |= getattr(module, "PAGES", {})
        self.functions |= tools
        events = self.files[name] = queue.SimpleQueue[Any]()  # (event, job, call, loop)
        threading.Thread(target=self.handle, args=[name, events], daemon=True).start()
        for event, function in inspect.getmembers(module, inspect.isfunction):
            # A name close to an event's is that event, or a misspelling of it.
            if event[0] != "_" and (near := difflib.get_close_matches(event, EVENTS, 1, 0.75)):
                names = list(inspect.signature(function).parameters)
                known = [near[0], "call", "at", *EVENTS[near[0]].split()]
                if odd := [word for word in (event, *names) if word not in known]:
                    right = difflib.get_close_matches(odd[0], known, 1, 0)[0]
                    log.error("%s: %s: write %s for %s", path, event, right, odd[0])
                else:
                    self.handling[event].append((events, function, names))

    def emit(self, event: str, call: Any, at: float, facts: Object) -> None:
        known = {"call": call, "at": at, "event": event, "facts": facts, **facts}
        more = [] if event.endswith("_audio") else self.handling["any_event"]
        for events, function, names in self.handling[event] + more:
            if events.qsize() < MAX_WAITING or event == "call_ended":
                job = functools.partial(function, **{name: known[name] for name in names})
                events.put((event, job, call, asyncio.get_running_loop()))
                continue
            self.dropped += 1
            if self.dropped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …
                log.error("%s is slow: %d events were dropped", function.__module__, self.dropped)

    def handle(self, name: str, events: Any) -> None:  # one at a time, in the file's own thread
        while True:
            event, job, call, loop = events.get()
            try:
                if inspect.iscoroutinefunction(job):
                    asyncio.run_coroutine_threadsafe(outcome(job), loop).result()
                else:
                    job()
            except BaseException:
                log.exception("%s: %s failed", name, event, extra={"call": call.sid})
            if events.empty():
                time.sleep(0.1)  # to wake it for each event costs 5 % of the CPU

    def close(self, limit_s: float) -> None:  # waits for events that are still to be handled
        until, handled = monotonic() + limit_s, threading.Semaphore(0)
        for events in self.files.values():
            events.put(("close", handled.release, None, None))
        for _ in self.files:
            handled.acquire(timeout=max(0.0, until - monotonic()))

    async def run_tool(self, call: Any, name: str, arguments: str) -> str | None:
        """What a tool returns, as text; None: no response is wanted. A failure is told in words."""
        try:
            (tool, _), made = self.functions[name], json.loads(arguments)
            given = {key: value for key, value in made.items() if value is not None}
            if "call" in inspect.signature(tool).parameters:
                given["call"] = call
            task = asyncio.ensure_future(outcome(functools.partial(tool, **given)))
            task.add_done_callback(asyncio.Task.exception)  # nobody else may ask for it
            await asyncio.wait([task], timeout=TOOL_S)
            if task.cancel() or task.cancelled():  # not done, and not waited for; or by itself
                raise TimeoutError(f"{name} has returned nothing in {TOOL_S:g} s")
            out = task.result()
            text = out if isinstance(out, str) else json.dumps(out, ensure_ascii=False, default=str)
        except Exception as exc:
            log.error("tool %s: %s", name, exc, exc_info=exc.__cause__, extra={"call": call.sid})
            out = text = f"Error: {exc}"
        return None if out is None else text[:MAX_RESULT]


async def outcome(work: Callable[[], Any]) -> Any:
    """What a function of others returns: a plain one in a thread, an async one on the loop."""
    try:
        if inspect.iscoroutinefunction(work):
            return await work()
        made = (work() for _ in [1])  # no future carries a StopIteration; this does
        return (await asyncio.get_running_loop().run_in_executor(POOL, list, made))[0]
    except BaseException as exc:  # a SystemExit would end the loop, and with it all calls
        raise RuntimeError(repr(exc)) from exc


def json_schema(hint: Any) -> Object:
    """Of bool int float list[…] Literal[…] Annotated[…, "what it is"] X | None. Else: a string."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return json_schema(type(inner[0])) | {"enum": list(inner)}
    if inner and kind not in JSON_TYPES:  # Annotated, or X | None
        return json_schema(inner[0]) | ({"description": inner[1]} if kind is Annotated else {})
    items = {"items": json_schema((*inner, str)[0])} if kind is list else {}
    return {"type": JSON_TYPES.get(kind, "string")} | items


def tool_schema(tool: Any) -> Object:  # as session.update has it
    given, text = inspect.signature(tool, eval_str=True).parameters, inspect.getdoc(tool)
    if not text or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool.__name__):  # OpenAI refuses all
        raise ValueError(f"tool {tool.__name__!r}: give it a docstring, and a name of A-Za-z0-9_-")
    properties = {key: json_schema(given[key].annotation) for key in given if key != "call"}
    required = [key for key in properties if given[key].default is inspect.Parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "name": tool.__name__, "description": text, "parameters": schema}


# ── 6 The way in ────────────────────────────────────────────────────────────────────────────────
# Twilio signs webhooks and handshakes over the public URL. A handshake's signature is the same for
# every call. So the stream also brings back the TwiML's token, good once and for one CallSid.
# Whoever saw a webhook could send it again, so the same one begins no second call.

START_S, TOKEN_S, MAX_RECONNECTS = 5.0, 60, 3  # until `start`; a token is good; for one call
METHODS = {"/": "GET", "/health": "GET", "/twilio/stream": "GET"}
METHODS |= {"/twilio/voice": "GET, POST", "/twilio/next": "GET, POST"}
NAMED = re.compile("(/twilio/(?:stream|next))/([0-9a-z]+)")  # with the machine of the call (Fly)
FORM = {"CallSid": "", "CallStatus": "in-progress", "DialCallStatus": "", "From": "", "To": ""}
CALL_SID, STREAM_SID = re.compile("CA[0-9a-f]{32}"), re.compile("MZ[0-9a-f]{32}")
E164 = re.compile(r"\+[1-9]\d{6,14}", re.ASCII)
LOOPBACK = re.compile(r"(?i)\[?((.*\.)?localhost|(::ffff:)?127(\.\d+){3}|::1)\]?(:\d*)?")
FORWARDED = re.compile("(x-(forwarded|original|envoy|amzn?)|cf|cdn|ngrok)-.*|forwarded|via|.*-ip")
HANG_UP = "<Response><Hangup/></Response>"
# A call that has ended. No TwiML: it is not the bridge that ended it. dialled: how its <Dial> did.
Past = namedtuple("Past", "twiml history notes reconnects dialled", defaults=[""])


def say(text: str) -> str:
    return f'<Response><Say language="ja-JP">{escape(text)}</Say><Hangup/></Response>'


def reply(status: int, content: Any = "", kind: str = "text/plain", **more: str) -> Response:
    if not isinstance(content, str | bytes):
        content, kind = json.dumps(content, ensure_ascii=False), "application/json"
    body = content.encode() if isinstance(content, str) else content
    more |= {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
    more |= {"Date": formatdate(usegmt=True), "Connection": "close"}
    return Response(status, HTTPStatus(status).phrase, Headers(more), body)


class Bridge:  # what the calls of this process share
    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings, self.hooks, url = settings, hooks, urlsplit(settings.openai_realtime_url)
        query = {"model": settings.openai_realtime_model} | dict(parse_qsl(url.query))
        self.url, self.model = url._replace(query=urlencode(query)).geturl(), query["model"]
        self.tls = ssl.create_default_context() if url.scheme == "wss" else None
        self.session, self.barge_in_ms = session_update(settings, self.model, hooks.tools)
        audio = self.session["audio"]["input"]
        self.transcriber = str((audio.get("transcription") or {}).get("model", ""))
        vad = audio.get("turn_detection", {"create_response": True}) or {"create_response": False}
        self.answers_s = ANSWERS_S if vad.get("create_response", True) else 0.0  # by itself
        self.vad_ms: float = vad.get("silence_duration_ms", 4000.0)  # semantic VAD may wait so long
        self.calls, self.past = dict[str, Call](), dict[str, Past]()  # by CallSid
        self.seen = deque[str](maxlen=10_000)  # tokens, and signatures of webhooks
        self.draining, self.next_by = False, 0.0  # until when Twilio may ask /twilio/next
        tokens = re.findall(r"[^\s,]+", settings.twilio_auth_token)
        self.validators = [RequestValidator(token) for token in tokens]
        self.secret = (tokens or [secrets.token_hex()])[0].encode()  # the same on every machine

    def connect(self) -> Any:
        key = self.settings.openai_api_key
        how: Object = {"additional_headers": {"Authorization": f"Bearer {key}"} if key else {}}
        how |= {"close_timeout": 1, "max_size": 2 << 20}
        how |= {"ssl": self.tls, "proxy": None, "compression": None}
        return connect(self.url, create_connection=CONNECTIONS["openai"], **how)

    async def process_request(self, twilio: Any, request: Request) -> Response | None:
        """Every request comes here. None lets the stream's upgrade go on."""
        prefix, here = urlsplit(self.settings.public_base_url).path, self.settings.fly_machine_id
        target = re.sub(f"^{re.escape(prefix)}(?=/)", "", request.path)  # proxies keep or strip it
        path, _, query = target.partition("?")
        path, machine = named.groups() if (named := NAMED.fullmatch(path)) else (path, here)
        page: Any = None if self.validators else self.hooks.pages.get(path)
        methods = METHODS.get(path, "GET" if page else "")
        if twilio.refusal or not methods:
            return reply(twilio.refusal or 404, "The webhook is POST /twilio/voice\n")
        if request.method not in methods.split(", "):
            return reply(405, Allow=methods)
        if here and machine != here and "fly-replay-src" not in request.headers:
            return reply(200, **{"fly-replay": f"prefer_instance={machine}"})
        if path == "/health":
            status, word = (503, "draining") if self.draining else (200, "ok")
            calls = [call for call in self.calls.values() if call.stream_sid]
            return reply(status, {"status": word, "calls": len(calls)})
        if path == "/" and not page:
            return reply(200, "This is somebody's telephone.\n")
        try:
            form = self.verified(twilio, target)
        except (ValueError, LookupError) as exc:
            log.warning("403 for %s from %s: %r", path, twilio.peer, str(exc))
            return reply(403, "This was not verified. The log says what to set.\n")
        if page:  # a hook's: a file, or what a function of the query returns (text is HTML)
            work, kind = getattr(page, "read_bytes", page), mimetypes.guess_type(str(page))[0]
            given = [dict(parse_qsl(query))][: len(inspect.signature(work).parameters)]
            made = await outcome(functools.partial(work, *given))
            return reply(200, made, kind or "text/html; charset=utf-8")
        if path == "/twilio/stream":
            return None
        if not CALL_SID.fullmatch(form["CallSid"]):
            return reply(400, "CallSid must be CA and 32 of 0-9 a-f\n")
        return reply(200, self.what_next(form, request, path), "text/xml; charset=utf-8")

    def verified(self, twilio: Any, target: str) -> dict[str, str]:  # the form; raises why not
        get, base = twilio.request.headers.get, urlsplit(self.address(twilio.request))
        host, origin, signature = get("Host", ""), get("Origin"), get("X-Twilio-Signature", "")
        # A browser on this computer may be sent here by a page of another site.
        if get("Sec-Fetch-Site") == "cross-site" or (origin or host).split("://")[-1] != host:
            raise ValueError(f"a page of another site sent it ({str(origin)[:99]})")
        strange = [it for it in (twilio.peer, host) if not LOOPBACK.fullmatch(it)]
        strange += filter(FORWARDED.fullmatch, twilio.request.headers)
        if strange and not (self.validators and self.settings.public_base_url):
            raise ValueError(f"set TWILIO_AUTH_TOKEN and PUBLIC_BASE_URL (seen: {strange[0][:99]})")
        pairs = twilio.form or target.partition("?")[2]
        form = parse_qs(pairs, True, max_num_fields=200) if signature or not self.validators else {}
        # All values of a repeated name are signed. RequestValidator tries the URL with its port and
        # without, but believes that wss has port 80.
        signed = {name: name.join(sorted(set(form[name]))) for name in form if twilio.form}
        scheme = "wss" if target.startswith("/twilio/stream") else "https"
        url = f"{scheme}://{base.netloc}{'' if base.port else ':443'}{base.path}{target}"
        valid = [it.validate(url, signed, signature) for it in self.validators]
        if valid and not any(valid):
            raise ValueError(f"not signed by TWILIO_AUTH_TOKEN for PUBLIC_BASE_URL {base.netloc}")
        # As much of each as a <Parameter> (500 characters) and a log can take.
        return FORM | {name: clean(values[-1])[:200] for name, values in form.items()}

    def address(self, request: Request, route: str = "") -> str:  # where Twilio reaches us
        base = self.settings.public_base_url or "https://" + request.headers.get("Host", "")
        return base + (route and f"/twilio/{route}/{self.settings.fly_machine_id}".rstrip("/"))

    def what_next(self, form: dict[str, str], request: Request, path: str) -> str:  # TwiML
        sid, status, dialled = form["CallSid"], form["CallStatus"], form["DialCallStatus"]
        signature = request.headers.get("X-Twilio-Signature") or secrets.token_hex()
        call, is_over = self.calls.get(sid), dialled == "completed" or status != "in-progress"
        # The stream or a <Dial> has ended, or Twilio sends the webhook of an ended call again.
        if goes_on := path == "/twilio/next" or (not call and signature in self.seen):
            if call and monotonic() - call.audio.frame_at > 1:  # s; its sound has stopped
                call.end("twilio lost")
            past = self.past.get(sid) or Past("", {}, {}, 0)  # or this process was restarted
            if past.twiml and not (dialled and "<Dial" in past.twiml):  # else that <Dial> has ended
                return str(past.twiml)
            if is_over or past.reconnects >= MAX_RECONNECTS:
                return HANG_UP if is_over else say(APOLOGY)
            self.ended(sid, Past("", past.history, past.notes, past.reconnects + 1, dialled))
        elif status in ("completed", "busy", "failed", "no-answer", "canceled"):
            log.warning("/twilio/voice is no status callback", extra={"call": sid})
            return "<Response/>"
        if self.draining or len(self.calls.keys() - {sid}) >= self.settings.max_calls:
            why = "stopping" if self.draining else f"MAX_CALLS: {self.settings.max_calls}"
            log.warning("a caller is turned away (%s)", why)
            return say(RESTARTING if self.draining else BUSY)
        if not goes_on and not call:
            self.past.pop(sid, None)  # an earlier call's history and notes do not reach this one
            self.begin(form, request)
        self.seen.append(signature)
        url = quoteattr(self.address(request, "stream").replace("https", "wss", 1))
        # Twilio drops the query of the stream's URL, but brings these back with `start`.
        given = {"token": self.token(sid), "From": form["From"], "To": form["To"]}
        each = [f'<Parameter name="{name}" value={quoteattr(given[name])}/>' for name in given]
        then = f'<Redirect method="POST">{escape(self.address(request, "next"))}</Redirect>'
        stream = f"<Stream url={url}>{''.join(each)}</Stream>"
        return f"<Response><Connect>{stream}</Connect>{then}</Response>"

    def begin(self, form: Mapping[str, str], request: Request) -> Call:  # connects the model now
        sid, next_url = form["CallSid"], self.address(request, "next")
        call = self.calls[sid] = Call(self, sid, form["From"], form["To"], next_url)
        opening = self.settings.greeting and GREET + self.settings.greeting
        if past := self.past.pop(sid, None):  # the caller is back
            _, call.history, notes, call.reconnects, dialled = past
            call.notes = dict(notes or {})
            back = LINE_IS_BACK + (GO_ON if call.history else SAY_AGAIN)
            opening = NOT_REACHED.format(dialled) if dialled else back
        if opening:
            call.owe({"instructions": f"{self.settings.instructions}\n\n{opening}"})
        return call

    def ended(self, sid: str, past: Past) -> None:
        self.past[sid], self.next_by = past, monotonic() + NEXT_S
        if len(self.past) > 500:
            del self.past[next(iter(self.past))]

    def token(self, sid: str, about: str = "") -> str:  # an expiry, a nonce, and their HMAC
        about = about or f"{int(time.time()) + TOKEN_S}.{secrets.token_hex(8)}"
        return f"{about}." + hmac.digest(self.secret, f"{sid} {about}".encode(), "sha256").hex()

    async def take_stream(self, twilio: Any) -> None:  # whose handshake was let in
        late = twilio.loop.call_later(START_S, lambda: twilio.call or twilio.shut(1008, "no start"))
        twilio.handle = functools.partial(self.first_message, twilio)
        await twilio.read()
        late.cancel()
        if call := twilio.call:  # 1000, 1001, 1005: closed, going away, without a word
            call.end("caller hung up" if twilio.close_code in (1000, 1001, 1005) else "twilio lost")
            await asyncio.wait([call.life])

    def first_message(self, twilio: Any, text: bytes) -> None:  # if it raises, the stream closes
        if (message := json.loads(text))["event"] != "start":  # it is `connected`
            return
        start, given = message["start"], message["start"]["customParameters"]
        sid, stream, token = start["callSid"], start["streamSid"], given["token"]
        about, call = token.rpartition(".")[0], self.calls.get(sid)  # about: "expiry.nonce"
        real = STREAM_SID.fullmatch(stream) and hmac.compare_digest(self.token(sid, about), token)
        if not real or token in self.seen or int(about.partition(".")[0]) < time.time():
            raise ValueError("a stream without a valid token of its call")
        self.seen.append(token)
        call = None if call and call.over.done() else call  # Twilio connects again
        if call.stream_sid if call else self.draining:
            raise ValueError("a second stream of a call, or a new one while the bridge stops")
        twilio.call = call = call or self.begin(FORM | given | {"CallSid": sid}, twilio.request)
        twilio.most_unreadable = MAX_UNREADABLE
        call.open_stream(twilio, stream)


# ── Connections ──

MAX_UNSENT, MAX_UNREADABLE = 4 << 20, 50  # bytes (some 6 minutes of speech); messages
REQUEST_S, MAX_SILENT = 5.0, 200  # until a request is complete; connections without one
MAX_HEAD, MAX_FORM = 16 << 10, 64 << 10  # bytes of a request's head and body
LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*+(\d++)[ \t]*+(?=\r\n|\Z)")


class Wire(Connection):
    """A connection as a call uses it: what comes goes to `handle`, and `put` never waits."""

    handle: Any = None  # a function of a message's text
    unreadable, most_unreadable = 0, MAX_UNREADABLE
    masks = False  # what it sends, because only a client does

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = 16 << 10  # bytes of a read; asyncio's 256 KiB take 1 MB more in all
        transport.set_write_buffer_limits(MAX_UNSENT, 0)

    def pause_writing(self) -> None:  # MAX_UNSENT is reached
        super().pause_writing()
        if self.state is not State.CONNECTING:  # else it is a page, and websockets waits
            log.error("%s has stopped reading: closed", type(self).__name__)
            self.transport.abort()

    async def read(self) -> None:
        self.data_received(b"")  # hands on what waited for `handle`
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.attempt(await self.recv(decode=False))

    def attempt(self, message: bytes) -> None:
        try:
            self.handle(message)
        except Exception as exc:  # the message is wrong, or our code: the call goes on
            self.unreadable += 1
            about = type(self).__name__, self.unreadable, type(exc).__name__, str(exc)
            log.warning("%s: bad message %d: %s %.200r", *about)
            if self.unreadable >= self.most_unreadable:
                self.shut(1008, "too many of them")  # policy violation

    def shut(self, code: int = 1000, why: str = "") -> None:  # in 1 s at most
        if why:
            log.warning("%s is closed: %s", type(self).__name__, why)
        self.handle = str  # what still comes means nothing
        self.closing = asyncio.create_task(self.close(code))

    def put(self, *texts: bytes) -> None:
        for text in texts:
            broadcast([self], text.decode())  # writes at once; does nothing on a closed connection


class OpenAIConnection(Wire, ClientConnection):
    masks = True


class TwilioConnection(Wire, ServerConnection):
    # websockets takes only requests without a body. So a form is kept here, and websockets gets the
    # head without its Content-Length. What it would drop without a word is refused.
    silent: dict[TwilioConnection, asyncio.TimerHandle] = {}  # all without a request, oldest first
    call: Call | None = None
    form, refusal, peer = "", 0, ""  # the body; an HTTP status; an IP address
    unread, needed = b"", 0  # head and body so far; how many bytes they have when whole
    most_unreadable = 1  # before `start`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.peer = str((self.remote_address or "?")[0])
        self.silent[self] = self.loop.call_later(REQUEST_S, self.hand_on, 408)
        if len(self.silent) > MAX_SILENT:
            self.silent.pop(oldest := next(iter(self.silent))).cancel()
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if timer := self.silent.pop(self, None):
            timer.cancel()  # it would keep all of this in memory
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self not in self.silent:  # nobody may say more before our response
            return None if self.state is State.CONNECTING else super().data_received(data)
        self.unread += data
        head, blank, body = self.unread.partition(b"\r\n\r\n")
        if len(self.unread) < self.needed or not (blank or len(head) > MAX_HEAD):
            return None  # more is to come
        size = int(found[0][:9]) if (found := LENGTH.findall(head)) else 0
        plain, probe, lower = LENGTH.sub(b"", head) + blank, ServerProtocol(), head.lower()
        probe.receive_data(plain)  # would it drop it? It does when a length is no number
        wrong = {431: len(head) > MAX_HEAD, 411: b"\r\ntransfer-encoding:" in lower}
        wrong |= {413: size > MAX_FORM, 400: len(found) > 1 or not probe.events_received()}
        refusal = next(filter(wrong.get, wrong), 0)  # the first that is true
        if refusal or len(body) >= size:
            self.form = body[:size].decode("utf-8", "replace")
            return self.hand_on(refusal, plain)
        self.needed = len(head + blank) + size
        if b"\r\nexpect: 100-continue" in lower:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hand_on(self, refusal: int, head: bytes = b"") -> None:  # to websockets
        self.silent.pop(self).cancel()
        self.refusal = refusal
        super().data_received(b"GET / HTTP/1.1\r\n\r\n" if refusal else head)


CONNECTIONS: Object = {"twilio": TwilioConnection, "openai": OpenAIConnection}  # see section 8

# ── 7 Start and stop ────────────────────────────────────────────────────────────────────────────
PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
HOST = rf"[^/:?#@\s]+(:{PORT})?"
RULES = {  # of a setting, or of a type -> a pattern of what is right, and what to give
    "openai_api_key": ("[!-~]*", "the key alone"),
    "public_base_url": (rf"https://{HOST}(?!.*/(twilio|health)(/|$))(/[^?#\s]*)?", "https://HOST"),
    "openai_realtime_url": (rf"wss?://{HOST}([/?](?!.*model=gpt-live)[^#\s]*)?", "wss://HOST/PATH"),
    "openai_realtime_model": ("(?!gpt-live).*", "another: GPT-Live speaks another protocol"),
    "host": (r"(?![\d.]+$)\S+|((25[0-5]|2[0-4]\d|1?\d?\d)(\.(?!$)|$)){4}", "an address of ours"),
    "max_call_seconds": (r"0*[1-9]\d{0,4}(\.\d+)?", "a number from 1 to 99999"),
    "float": (r"\d{1,5}(\.\d+)?|off", "a number from 0 to 99999, or off"),
    "int": (PORT, "a number from 1 to 65535"),
}
DRAIN_GOODBYE_S, STOP_S, NEXT_S = 30.0, 2.4, 2.0  # the last words; the last closes; /twilio/next


def read_settings(env: Mapping[str, str]) -> Settings:  # ValueError: the variable, the fix
    app = env.get("FLY_APP_NAME")
    chosen: Object = {"session": "{}", "public_base_url": f"https://{app}.fly.dev" if app else ""}
    for setting in fields(Settings):
        key, name, kind = setting.name, setting.name.upper(), type(setting.default)
        text, rule = env.get(name, "").strip(), RULES.get(key) or RULES.get(kind.__name__)
        if text and rule and not re.fullmatch(rule[0], text):
            shown = "wrong" if re.search("url|key", key) else repr(text)  # it may hold a secret
            raise ValueError(f"{name} is {shown}: give {rule[1]}")
        if text and kind in (int, float):
            chosen[key] = kind(text.replace("off", "inf"))
        elif text or (name in env and key in ("greeting", "transcription_model", "hooks")):
            chosen[key] = text.rstrip("/") if key == "public_base_url" else text
        elif name not in env and (near := difflib.get_close_matches(name, env, 1, 0.88)):
            log.warning("%s is no setting: is %s meant?", near[0], name)
    try:
        chosen["session"] = json.loads(chosen["session"])
        audio = session_update(settings := Settings(**chosen), "", [])[0]["audio"]
        if any(audio[way]["format"]["type"] != "audio/pcmu" for way in ("input", "output")):
            raise ValueError("a telephone speaks audio/pcmu only")
    except Exception as exc:
        raise ValueError(f"SESSION is wrong ({exc}): give a JSON object such as {{}}") from None
    return settings


class LogQueue(QueueHandler):  # to a thread, because no call may wait for who reads the log
    dropped = 0

    def prepare(self, record: logging.LogRecord) -> str:
        return self.format(record)

    def enqueue(self, text: Any) -> None:
        if self.dropped and self.queue.empty():
            lost, self.dropped = self.dropped, 0
            log.warning("%d log lines were dropped: nobody read them", lost)
        if self.queue.qsize() < MAX_WAITING:
            self.queue.put(text)
        else:
            self.dropped += 1

    def write(self) -> None:  # the thread; None is the end
        texts = list[str | None]()
        while None not in texts:
            texts = [self.queue.get()]
            time.sleep(0.01)  # hooks log several lines at once
            texts += [self.queue.get() for _ in range(self.queue.qsize())]
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("".join(f"{text}\n" for text in texts if text))


async def run(settings: Settings, hooks: Hooks) -> None:
    if settings.openai_realtime_url == Settings.openai_realtime_url and not settings.openai_api_key:
        offline: Any = getattr(sys.modules.get("_hook_offline"), "OFFLINE_MODEL", None)
        if not offline:
            raise ValueError("OPENAI_API_KEY is not set: give one, or copy the hooks folder too")
        url = await offline()
        settings = replace(settings, openai_realtime_url=url, openai_realtime_model="offline-model")
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        limits: Any = importlib.import_module("resource")
        limits.setrlimit(limits.RLIMIT_NOFILE, limits.getrlimit(limits.RLIMIT_NOFILE)[1:] * 2)
    asyncio.sslproto.SSLProtocol.max_size = 8 << 10  # bytes that TLS sets aside; was 256 KiB
    bridge, stops = Bridge(settings, hooks), list[float]()
    for number in (signal.SIGTERM, signal.SIGINT):  # the third ends the process at once
        signal.signal(number, lambda *_: os._exit(1) if stops[1:] else stops.append(monotonic()))
    way: Object = {"process_request": bridge.process_request, "compression": None}
    way |= {"create_connection": CONNECTIONS["twilio"], "close_timeout": 1, "max_size": 64 << 10}
    server = await serve(bridge.take_stream, settings.host or None, settings.port, **way)
    base = settings.public_base_url or f"http://localhost:{settings.port}"
    hint = f"open {base}/ to talk to it; " if "/" in hooks.pages and not bridge.validators else ""
    log.info("%sthe webhook is POST %s/twilio/voice", hint, base)
    if not (bridge.validators and settings.public_base_url):
        log.info("only this computer may call: TWILIO_AUTH_TOKEN or PUBLIC_BASE_URL is not set")
    sys.setswitchinterval(0.0005)  # s; was 5 ms: so long may a hook that computes hold us up
    gc.freeze()  # what the start has made stays, and a call's objects die by their references:
    gc.set_threshold(20_000, 20, 20)  # looking for cycles less often saves a tenth of the CPU
    while not stops:  # noqa: ASYNC110 - a signal's handler wakes no loop
        await asyncio.sleep(to_beat_s())
    log.info("stopping when %d calls have ended; a second signal ends them", len(bridge.calls))
    bridge.draining, goodbye_at, now = True, stops[0] + settings.drain_seconds, stops[0]
    end_at = goodbye_at + DRAIN_GOODBYE_S
    # Twilio asks /twilio/next about a call that has ended just now. A second signal does not wait.
    while now < end_at + STOP_S and (bridge.calls or (now < bridge.next_by and not stops[1:])):
        now, end_at = monotonic(), min([end_at, *stops[1:]])
        for call in list(bridge.calls.values()):
            if not call.stream_sid or now >= end_at:
                call.end("shutdown", say(RESTARTING))
            elif now >= goodbye_at:
                call.end_when_heard("shutdown", say(RESTARTING), final=True)
        await asyncio.sleep(0.05)
    server.close()  # without waiting for connections on which no request has come
    await asyncio.to_thread(hooks.close, 0.5 if stops[1:] else 6.0)


def main() -> int:
    here, status, handler = Path(__file__).parent, 0, LogQueue(queue.SimpleQueue())
    text = "%(asctime)s %(levelname)s %(name)s %(call)s %(message)s"
    handler.setFormatter(logging.Formatter(text, defaults={"call": "-"}))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    (writer := threading.Thread(target=handler.write, daemon=True)).start()
    logging.getLogger("websockets").setLevel(logging.ERROR)
    line = r"""(?m)^ *(?:export +)?(\w+) *= *(?:"([^"\n]*)"|'([^'\n]*)'|(.*?)) *(?:(?<= )#.*)?$"""
    try:
        env = (here / ".env").read_text("utf-8-sig") if (here / ".env").is_file() else ""
        for name, *value in re.findall(line, env):
            os.environ.setdefault(name, "".join(value))  # what the environment has already wins
        settings = read_settings(os.environ)
        work = run(settings, Hooks(here / "hooks", settings.hooks))
        asyncio.new_event_loop().run_until_complete(work)  # not asyncio.run: it waits for all tasks
    except (OSError, ValueError, SystemExit) as exc:
        status, why = (1, "cannot start (is PORT free?): ") if isinstance(exc, OSError) else (2, "")
        log.error("%s%s", why, exc)
    handler.queue.put(None)
    writer.join(1)  # s; what nobody reads is left
    return status


# ── 8 The fast wire ─────────────────────────────────────────────────────────────────────────────
# A `Wire` costs a task's wake-up, a queue and a frame object for each 20 ms of sound. Here whole
# text messages are cut out of the bytes as they come, and written the same way. websockets gets the
# rest: handshake, pings, closes; and, because the order must stay, all that comes from the first
# fragment or message of 64 KiB on. Without this section everything works, but costs half more.
# A frame (RFC 6455, 5.2; the first byte of a whole text is 0x81, a ping's 0x89, a pong's 0x8A):
#   0x81 │ length, or 126; + 0x80 if masked │ if 126: 2 bytes of length │ if masked: 4 of it │ text

MASKS: list[bytes] = []  # unpredictable; the system is asked for a thousand at once


class FastWire(Wire):
    kept, cutting, OPEN = b"", True, State.OPEN  # kept: bytes that wait for `handle` or more bytes

    def data_received(self, data: bytes) -> None:
        if not self.cutting:  # websockets has taken over
            return super().data_received(data)
        if not self.handle:  # a client's handshake goes by lines, because frames may follow it
            parts = iter(data.splitlines(keepends=True) if self.masks else [data])
            while self.state is State.CONNECTING and (part := next(parts, b"")):
                super().data_received(part)
            self.kept += b"".join(parts)
            return
        size = len(data) > 3 and data[2] << 8 | data[3]  # nearly always this is one message:
        if len(data) == 8 + size and data[:2] == b"\x81\xfe" and not (self.masks or self.kept):
            return self.attempt(apply_mask(data[8:], data[4:8]))
        mask_bit, mask_size = (0, 0) if self.masks else (0x80, 4)  # of the other side's frames
        at, end = 0, len(data := self.kept + data)
        while end - at > 1:
            kind, size, begin = data[at], data[at + 1] ^ mask_bit, at + 2 + mask_size
            if size > 126 or kind not in (0x81, 0x89, 0x8A):  # 127: 64 KiB or more
                self.cutting = False
                return super().data_received(data[at:])
            if size == 126 and end - at > 3:
                size, begin = data[at + 2] << 8 | data[at + 3], begin + 2
            if (stop := begin + size) > end:  # the rest of the frame is to come
                break
            if kind == 0x81:
                text = data[begin:stop]
                self.attempt(apply_mask(text, data[begin - 4 : begin]) if mask_bit else text)
            else:
                super().data_received(data[at:stop])
            at = stop
        self.kept = data[at:]

    def put(self, *texts: bytes) -> None:
        frames = b""
        for text in texts:
            data = text.ljust(126)  # JSON may end in spaces: so each length has two bytes
            if (size := len(data)) > 0xFFFF or self.protocol.state is not self.OPEN:
                return super().put(*texts)
            if self.masks:
                if not MASKS:
                    MASKS.extend(re.findall(b"(?s)....", os.urandom(4096)))
                mask = MASKS.pop()
                frames += b"\x81\xfe" + size.to_bytes(2) + mask + apply_mask(data, mask)
            else:
                frames += b"\x81\x7e" + size.to_bytes(2) + data
        self.transport.write(frames)


CONNECTIONS |= {name: type(name, (FastWire, it), {}) for name, it in CONNECTIONS.items()}

if __name__ == "__main__":
    os._exit(main())  # a thread of a hook that never returns does not hold up the exit
