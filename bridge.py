#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "twilio>=9.13,<10"]
# ///
"""Talk with OpenAI's Realtime model by telephone. The whole bridge, in the order in which a call happens.

    caller ── telephone ── Twilio ══ WebSocket ══ bridge.py ══ WebSocket ══ OpenAI Realtime
                             │   POST /twilio/voice   │
                             └────────────────────────┘

    1 Settings    what a copier changes; each is an environment variable
    2 Answer      Twilio asks what to do with a call: prove that it is Twilio, dial the model, answer TwiML
    3 The call    all that is known of one call, and its life from the webhook to the last close
    4 The model   dial, set the session up, greet; dial again when it is lost
    5 Listen      caller to model: Twilio's messages, holes in the audio, keys
    6 Speak       model to caller: OpenAI's events
    7 Playback    what the caller has heard; barge-in
    8 Answering   who asks the model to speak, and when; tools; text from hooks
    9 The end     hearing the last words out, and what Twilio does afterwards
   10 The wire    below all that: bytes to messages and back, one class per side; the webhook's form
   11 Serve       one port, health, signals, the main program

The relay itself is 5 to 7, some 300 lines; 10 may be skipped at a first reading.

Both sides speak G.711 mu-law at 8 kHz in base64 (Twilio: audio/x-mulaw, OpenAI: audio/pcmu), so that audio passes
through as it came. Nothing in a call's relay waits: each message is handled to its end where it arrives, and what it
causes is written at once. So no two things inside a call happen at the same time; what is left to think about are
messages of ours and of OpenAI's that cross on the wire (section 8).

    python bridge.py          the README has the settings, the first call, and what to do when something is wrong

Twilio's messages: https://www.twilio.com/docs/voice/media-streams/websocket-messages
OpenAI's events:   https://platform.openai.com/docs/api-reference/realtime
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import base64
import errno
import functools
import gc
import hmac
import importlib.util
import io
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import signal
import ssl
import sys
import time
import webbrowser
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit
from xml.sax.saxutils import escape, quoteattr

from twilio.request_validator import (  # type: ignore[import-untyped]
    RequestValidator,
    get_signature_algorithm,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import CTRL_OPCODES, Frame, apply_mask  # type: ignore[attr-defined]
from websockets.http11 import Request, Response
from websockets.protocol import State

log = logging.getLogger("bridge")

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:
    """Each is read from the environment variable of its name in capitals; these are the defaults."""

    openai_api_key: str = ""  # sent as "Authorization: Bearer …"
    twilio_auth_token: str = ""  # checks Twilio's signatures; without it only this computer itself may call
    public_base_url: str = ""  # e.g. https://my-app.fly.dev; unset: from FLY_APP_NAME, or the local request's own host
    fly_machine_id: str = ""  # set by Fly.io itself
    port: int = 8080
    host: str = ""  # all interfaces
    openai_realtime_url: str = "wss://api.openai.com/v1/realtime"  # or any server of the same protocol
    openai_realtime_model: str = "gpt-realtime-2.1"  # added to the URL's query unless that names one
    instructions: str = (
        "あなたは電話に出るAIアシスタントの鈴木です。いつも日本語の話し言葉で、一度に話すのは短い文を一つか二つまでにします。"
        "箇条書きや記号は使いません。事実や数字、出典を決して作り上げません。使えるツールがあれば調べ、"
        "調べてもわからないことは「わかりません」と正直に言います。聞き取れなければ聞き返します。"
    )
    greeting: str = "こんにちは、AIアシスタントの鈴木です。どうぞお話しください。"  # empty: the caller speaks first
    voice: str = "marin"  # marin and cedar are the ones that OpenAI recommends
    transcription_model: str = "gpt-transcribe"  # of the caller's words, for the hooks; empty: none
    session: Mapping[str, Any] = field(default_factory=dict)  # merge patch (RFC 7396) over session.update's session
    max_calls: int = 100  # further callers hear a busy message
    max_call_seconds: float = 3600.0  # an OpenAI session ends after 60 minutes, too
    drain_seconds: float = 240.0  # how long SIGTERM waits for calls to end by themselves
    hooks: str | None = None  # comma-separated names; None: every file in hooks/

    @property
    def model(self) -> str:
        """The URL's own model, if it names one."""
        return dict(parse_qsl(urlsplit(self.openai_realtime_url).query)).get("model", self.openai_realtime_model)


MAY_BE_EMPTY = {"greeting", "transcription_model", "hooks"}  # an empty value is a choice there, and "unset" elsewhere
RANGES = {
    "port": (1, 65535),
    "max_calls": (1, 100_000),
    "max_call_seconds": (0.1, 86_400),  # so short for tests only
    "drain_seconds": (0, 86_400),
}


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings in an environment. Raises ValueError: one line that names variable, fault and mend."""
    chosen: dict[str, Any] = {}
    for setting in fields(Settings):
        name = setting.name.upper()
        value = env.get(name)
        if value is None or not (value.strip() or setting.name in MAY_BE_EMPTY):
            continue
        if setting.name in RANGES:
            chosen[setting.name] = read_number(name, value, int if isinstance(setting.default, int) else float)
        elif setting.name == "session":
            chosen[setting.name] = read_object(name, value)
        else:
            chosen[setting.name] = value.strip()
    if not chosen.get("public_base_url") and env.get("FLY_APP_NAME"):
        chosen["public_base_url"] = f"https://{env['FLY_APP_NAME']}.fly.dev"
    settings = Settings(**chosen)
    if wrong := why_wrong(settings):
        raise ValueError(wrong)
    return replace(settings, public_base_url=settings.public_base_url.rstrip("/"))


def read_number(name: str, value: str, kind: type[int] | type[float]) -> float:
    low, high = RANGES[name.lower()]
    try:
        number = kind(value)
    except ValueError:
        wanted = "whole number" if kind is int else "number"
        raise ValueError(f"{name} is {value!r}, which is no {wanted}: give one from {low} to {high}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {value!r}, out of range: give a number from {low} to {high}")
    return number


def read_object(name: str, value: str) -> dict[str, Any]:
    try:
        content = json.loads(value)
    except ValueError as fault:
        raise ValueError(f"{name} is not JSON ({fault}): give an object such as {{}}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is JSON but not an object: give one such as {{}}")
    return content


def why_wrong(settings: Settings) -> str:
    """What the start would fail on later, or a call; "" when all is well."""
    base, url = settings.public_base_url, settings.openai_realtime_url
    if base and not (re.fullmatch(r"https://[^/:?#@\s]+(:\d{1,5})?(/[^?#\s]*)?", base) and may_have_port(base)):
        return f"PUBLIC_BASE_URL is {no_password(base)!r}: give an https address such as https://my-app.fly.dev"
    if not (re.fullmatch(r"wss?://[^/?#\s]+([/?][^#\s]*)?", url) and may_have_port(url)):
        return f"OPENAI_REALTIME_URL is {no_password(url)!r}: give an address such as wss://api.openai.com/v1/realtime"
    if not re.fullmatch("[!-~]*", settings.openai_api_key):  # and an error of the dial would quote it
        return "OPENAI_API_KEY has a character that no key has: copy it again from https://platform.openai.com/api-keys"
    audio = session_update(settings, []).get("audio")
    for way in ("input", "output"):
        part = audio.get(way) if isinstance(audio, dict) else None
        if not isinstance(part, dict) or part.get("format") != {"type": "audio/pcmu"}:
            return f"SESSION changes audio.{way}.format, but a telephone speaks audio/pcmu only: take that out"
    return ""


def may_have_port(url: str) -> bool:
    """Its port, if it names one, is possible: urlsplit finds out only when it is asked."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def no_password(url: str) -> str:
    return re.sub(r"//.*@", "//…@", url)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects are merged key by key, null removes a key, anything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def session_update(settings: Settings, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The `session` object of session.update, GA form: anything unknown in it, and the server refuses all of it."""
    pcmu = {"type": "audio/pcmu"}  # 8 kHz by definition: a `rate` key is an unknown parameter
    session: dict[str, Any] = {
        "type": "realtime",
        "output_modalities": ["audio"],  # or a model may answer with text that nobody hears
        "instructions": settings.instructions,
        "audio": {
            "input": {
                "format": pcmu,
                # Documented and observed defaults differ (silence_duration_ms: 500, 200), so all are written out.
                "turn_detection": {
                    "type": "server_vad",
                    "threshold": 0.5,
                    "prefix_padding_ms": 300,
                    "silence_duration_ms": 500,
                    "create_response": True,
                    "interrupt_response": True,
                },
            },
            "output": {"format": pcmu, "voice": settings.voice},
        },
    }
    if settings.transcription_model:
        session["audio"]["input"]["transcription"] = {"model": settings.transcription_model}
    if re.match(r"gpt-realtime-2(\.\d+)?(-|$)", settings.model):  # the models that reason; others refuse the key
        session["reasoning"] = {"effort": "low"}
    if tools:
        session |= {"tools": tools, "tool_choice": "auto"}
    return dict(merge_patch(session, settings.session))


# ── 2 Answer ────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Who may call. Twilio signs the webhook and the stream's handshake with the account's auth token over the public URL.
# The handshake's signature is the same for every call, so the stream also has to bring back a token from the TwiML,
# which is good for one stream of one CallSid for a minute. Until that has been seen, nothing is dialled for a stream.

TOKEN_S = 60  # of a token's life: Twilio opens the stream 0.5 to 1 s after the webhook
START_TIMEOUT_S = 5.0  # a stream without a valid `start` by then is closed
REMEMBERED = 10_000  # tokens that were used, and calls whose /twilio/next may still come
ROUTES = {  # path -> methods
    "/": "GET, HEAD",
    "/health": "GET, HEAD",
    "/twilio/voice": "POST, GET",
    "/twilio/stream": "GET",
    "/twilio/next": "POST, GET",
}
FORWARDING = re.compile(r"forwarded|via|x-forwarded-.*|x-real-ip|.*-(client|connecting)-ip", re.IGNORECASE)

# What Twilio itself says to a caller whom the model cannot talk to.
BUSY = "ただいま電話が混み合っております。恐れ入りますが、しばらくしてからおかけ直しください。"
RESTARTING = "ただいまシステムの更新を行っております。恐れ入りますが、しばらくしてからおかけ直しください。"
APOLOGY = (
    "申し訳ございません。システムの不具合でお話しすることができません。恐れ入りますが、のちほどおかけ直しください。"
)
TIME_IS_UP = "お話の途中で恐れ入りますが、お時間となりましたので、これで失礼いたします。お電話ありがとうございました。"
TRANSFER_IS_OVER = "通話が終了しました。おつなぎできなかった場合は、恐れ入りますが、のちほどおかけ直しください。"


def twiml(*verbs: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><Response>{"".join(verbs)}</Response>'


def say_and_hang_up(text: str, first: str = "") -> str:
    return twiml(first, f'<Say language="ja-JP">{escape(text)}</Say>', "<Hangup/>")


HANG_UP = twiml("<Hangup/>")


def header(request: Request, name: str) -> str:
    """A header's value; "" when it is missing, or sent twice (nobody honest does that)."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else ""


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Form(dict[str, list[str]]):
    """A webhook's pairs, as the twilio package's validator wants them: a name may come twice."""

    def getlist(self, name: str) -> list[str]:
        return self[name]

    def first(self, name: str) -> str:
        """Its first value: 200 characters at most (a <Parameter> may have 500), none that breaks XML or a log."""
        return "".join(filter(str.isprintable, self.get(name, [""])[0]))[:200]


class Bridge:
    """What the calls of this process share: the settings, the hooks, and how many calls there are."""

    def __init__(self, settings: Settings, hooks: Any) -> None:
        self.settings = settings
        self.hooks = hooks
        self.calls: dict[str, Call] = {}  # by CallSid: from the webhook to the last close
        self.next_twiml: dict[str, str] = {}  # by CallSid: what /twilio/next answers
        self.not_yet_asked: set[str] = set()  # CallSids of streams that were closed while draining
        self.used_tokens: dict[str, None] = {}  # a set in the order of use: the oldest is forgotten first
        self.draining = False  # SIGTERM has come
        self.peak_calls = 0
        self.frames_from_callers = 0  # usually 20 ms each
        self.late_frames = 0  # that came more than 100 ms after the one before
        self.pieces_to_callers = 0  # of at most 200 ms
        self.loop_delays_ms: deque[float] = deque(maxlen=600)  # of the last minute; see `measure_loop_delay`
        self.wanted_session = session_update(settings, hooks.tools)  # what each session.update asks for
        self.validator = RequestValidator(settings.twilio_auth_token)
        self.secret = (settings.twilio_auth_token or secrets.token_hex()).encode()  # the same on each machine
        address = urlsplit(settings.openai_realtime_url)
        query = urlencode({**dict(parse_qsl(address.query)), "model": settings.model})
        self.openai_url = address._replace(query=query).geturl()
        self.openai_headers = {"Authorization": f"Bearer {settings.openai_api_key}"} if settings.openai_api_key else {}
        # One for all calls: it holds the certificates of the world's authorities.
        self.tls = ssl.create_default_context() if address.scheme == "wss" else None

    def answer_request(self, connection: ServerConnection, request: Request) -> Any:
        """Every HTTP request comes here (websockets' process_request). None lets the stream's upgrade go on."""
        assert isinstance(connection, TwilioLeg)
        response = self.route(connection, request)
        if request.method == "HEAD" and isinstance(response, Response):
            response.body = b""  # its Content-Length stays: that is what HEAD asks for
        return response

    def route(self, connection: TwilioLeg, request: Request) -> Any:
        path, _, query = request.path.partition("?")
        path = re.sub("^/twilio/stream/[0-9a-z]+$", "/twilio/stream", path)  # on Fly.io a machine's id follows
        if connection.refusal:
            return connection.respond(*connection.refusal)
        if machine := self.other_machine(request):
            response = connection.respond(200, f"machine {machine} has this call\n")
            response.headers["fly-replay"] = f"prefer_instance={machine}"
            return response
        page = self.hooks.pages.get(path)
        if path not in ROUTES and page is None:
            return connection.respond(404, "Nothing is here. Twilio's webhook is POST /twilio/voice\n")
        allowed = ROUTES.get(path, "GET, HEAD")
        if request.method not in allowed.split(", "):
            response = connection.respond(405, f"{path} takes {allowed}\n")
            response.headers["Allow"] = allowed
            return response
        if path == "/health":
            return self.reply(connection, json.dumps(health(self)), "application/json", 503 if self.draining else 200)
        if not path.startswith("/twilio/"):
            if page is not None and not self.why_not_local(connection, request):
                return page(connection, request)
            return connection.respond(
                200 if path == "/" else 403, "This is a telephone; its pages are for its owner.\n"
            )
        form = Form(parse_qs(connection.form_body.decode("utf-8", "replace"), keep_blank_values=True))
        if why := self.why_refused(connection, request, form):
            log.warning("403 for %s %s from %s: %s", request.method, path, connection.peer, why)
            return connection.respond(403, "This request could not be verified. The bridge's log says what to set.\n")
        if path == "/twilio/stream":
            return None
        if request.method == "GET":  # its pairs stand in the URL; what was signed is the URL as a whole
            form = Form(parse_qs(query, keep_blank_values=True))
        xml = self.answer_call(form, self.base_url(request)) if path == "/twilio/voice" else self.after_call(form)
        return self.reply(connection, xml, "text/xml; charset=utf-8")

    @staticmethod
    def reply(connection: TwilioLeg, text: str, content_type: str, status: int = 200) -> Response:
        response = connection.respond(status, text)
        del response.headers["Content-Type"]  # assigning would add a second one
        response.headers["Content-Type"] = content_type
        return response

    def other_machine(self, request: Request) -> str:
        """On Fly.io, the machine that answered this call's webhook, if that is another: it has dialled the model.

        The proxy then sends the request there, or back (with fly-replay-src) when that machine is gone.
        https://fly.io/docs/networking/dynamic-request-routing/
        """
        named = re.fullmatch(r"/twilio/(?:stream/|next\?machine=)([0-9a-z]+)", request.path)
        ours = self.settings.fly_machine_id
        return named[1] if named and ours and named[1] != ours and not header(request, "fly-replay-src") else ""

    def base_url(self, request: Request) -> str:
        """Where Twilio reaches this server: from configuration, for what a proxy puts into headers proves nothing."""
        return self.settings.public_base_url or f"https://{header(request, 'Host')}"

    def why_not_local(self, connection: TwilioLeg, request: Request) -> str:
        """Why a request does not come from this computer itself; "" when it does."""
        if not is_loopback(connection.peer):
            return "it comes from another computer"
        if forwarded := [name for name in request.headers if FORWARDING.fullmatch(name)]:
            return f"it came through a proxy or tunnel ({forwarded[0]})"
        # A page of another site can make a browser here send requests: from where it is, or under a name of its own
        # that was made to point here (DNS rebinding). Browsers send an Origin, but for a page's own GET: there the Host
        # tells.
        origin = re.sub(r"^\w+://|:\d*$", "", header(request, "Origin"))
        host = re.sub(r":\d*$", "", header(request, "Host"))
        own_get = request.method == "GET" and "." in host
        if (origin and not is_loopback(origin)) or (own_get and not is_loopback(host)):
            return f"its Host or Origin is not this computer ({(origin or host)[:100]})"
        return "a page of another site sent it" if header(request, "Sec-Fetch-Site") == "cross-site" else ""

    def why_refused(self, connection: TwilioLeg, request: Request, form: Form) -> str:
        """Why a request to /twilio/* is not let in; "" when it is."""
        origin, elsewhere = header(request, "Origin"), self.why_not_local(connection, request)
        if origin and origin.partition("://")[2] != header(request, "Host"):
            return f"a page of another site sent it ({origin[:100]})"
        if not self.settings.twilio_auth_token:
            return elsewhere and f"{elsewhere}, and TWILIO_AUTH_TOKEN is not set: set it, and PUBLIC_BASE_URL"
        if elsewhere and not self.settings.public_base_url:
            return "PUBLIC_BASE_URL is not set: set it to the https address that Twilio calls"
        signature = header(request, "X-Twilio-Signature")
        if not signature:
            return "it has no X-Twilio-Signature, and while TWILIO_AUTH_TOKEN is set, only Twilio may call"
        algorithm = get_signature_algorithm(header(request, "X-Twilio-Webhooks-Signature-Settings"))
        if not re.fullmatch("HMAC_SHA(1|256)", algorithm):
            return f"it is signed with {algorithm[:40]!r}, which is not known here: update the twilio package"
        for url in self.signed_urls(request):
            expected = self.validator.compute_signature(url, form, algorithm)
            if hmac.compare_digest(expected.encode(), signature.encode()):
                return ""
        return (
            f"its signature is not that of {self.signed_urls(request)[0].partition('?')[0]}: TWILIO_AUTH_TOKEN must "
            "be the account's primary token, and PUBLIC_BASE_URL the address on the number's page, to the letter"
        )

    def signed_urls(self, request: Request) -> list[str]:
        """What Twilio may have signed: the URL that it was given, with and without its port.

        The package's own validate() would look for a stream's (wss) signature at port 80.
        """
        url = urlsplit(self.base_url(request) + request.path)
        schemes = ["wss", "ws"] if "/twilio/stream" in url.path else ["https", "http"]
        name = url.netloc.rpartition(":")[0] if url.port else url.netloc
        return [
            url._replace(scheme=scheme, netloc=netloc).geturl()
            for scheme in (schemes[:1] if self.settings.public_base_url else schemes)
            for netloc in (url.netloc, name, f"{name}:443")
        ]

    def answer_call(self, form: Form, base: str) -> str:
        """TwiML for a new call: open the stream, and afterwards ask /twilio/next. The model is dialled now."""
        sid = form.first("CallSid")
        call = self.calls.get(sid)  # Twilio may deliver a webhook twice
        if call is None and (refusal := self.why_no_room()):
            return refusal
        if call is None and sid:
            call = self.begin(sid, form.first("From"), form.first("To"))
        token = call.token if call else self.new_token(sid)
        machine = self.settings.fly_machine_id
        stream = "wss://" + base.partition("://")[2] + "/twilio/stream" + (machine and f"/{machine}")
        after = f"{base}/twilio/next" + (machine and f"?machine={machine}")
        parameters = {"token": token, "from": form.first("From"), "to": form.first("To")}  # Twilio drops a query
        return twiml(
            f"<Connect><Stream url={quoteattr(stream)}>",
            *(f"<Parameter name={quoteattr(name)} value={quoteattr(value)}/>" for name, value in parameters.items()),
            f'</Stream></Connect><Redirect method="POST">{escape(after)}</Redirect>',
        )

    def after_call(self, form: Form) -> str:
        """TwiML for when the bridge has closed the stream."""
        self.not_yet_asked.discard(form.first("CallSid"))
        return self.next_twiml.get(form.first("CallSid"), HANG_UP)

    def why_no_room(self) -> str:
        """What a further caller hears instead; "" when there is room."""
        if self.draining:
            return say_and_hang_up(RESTARTING)
        if len(self.calls) < self.settings.max_calls:
            return ""
        log.warning("full: %d calls, and MAX_CALLS is %d", len(self.calls), self.settings.max_calls)
        return say_and_hang_up(BUSY)

    def new_token(self, sid: str) -> str:
        return self.token(sid, int(time.time()) + TOKEN_S)

    def token(self, sid: str, expiry: int) -> str:
        return f"{expiry}." + hmac.digest(self.secret, f"stream {sid} {expiry}".encode(), "sha256").hex()

    def use_token(self, token: str, sid: str) -> bool:
        """Made by this bridge (or another machine of it) for this CallSid, not expired, and not used before."""
        expiry = re.match(r"(\d{1,12})\.", token)
        if not expiry or token in self.used_tokens or int(expiry[1]) < time.time():
            return False
        if not hmac.compare_digest(self.token(sid, int(expiry[1])).encode(), token.encode()):
            return False  # which also refuses another spelling of the expiry: it would be a second use
        keep_latest(self.used_tokens, token, None)
        return True

    def begin(self, sid: str, caller: str, called: str) -> Call:
        call = self.calls[sid] = Call(self, sid, caller, called)
        call.later("unclaimed", call.UNCLAIMED_S, call.end, "no stream came")  # until `open_stream`
        call.life = asyncio.create_task(call.live())
        return call

    async def take_stream(self, twilio: ServerConnection) -> None:
        """A stream whose handshake was let in (websockets' handler): wait for its `start`, then for the call's end."""
        assert isinstance(twilio, TwilioLeg)
        started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()  # -> the Call, or None if refused
        closed: asyncio.Future[Any] = asyncio.ensure_future(twilio.wait_closed())
        twilio.deliver_to(functools.partial(self.start_stream, twilio, started))
        await asyncio.wait([started, closed], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if started.done() and (call := started.result()):
            await asyncio.wait([call.life, closed], return_when=asyncio.FIRST_COMPLETED)
            normal = twilio.close_code in (1000, 1001, 1005)  # closed, going away, closed without a word
            call.end("caller hung up" if normal else "twilio lost")
            await asyncio.wait([call.life])
        else:
            if not started.done():
                why = "before its start" if closed.done() else f"for it sent no start in {START_TIMEOUT_S:g} s"
                log.warning("a stream from %s was closed %s", twilio.peer, why)
            started.cancel()
            await twilio.close_soon(1008)  # policy violation

    def start_stream(self, twilio: TwilioLeg, started: asyncio.Future[Any], message: bytes) -> None:
        """Twilio's first messages: `connected`, then `start`, which must bring the token."""
        event = json.loads(message)
        if started.done() or event["event"] != "start":
            return
        sid, stream_sid = event["start"]["callSid"], event["start"]["streamSid"]
        given = event["start"].get("customParameters") or {}
        call = self.calls.get(sid)
        if not self.use_token(str(given.get("token")), sid) or (call and call.stream_open):
            log.warning("a stream was refused: it brought no valid token for call %.40s", sid)
            started.set_result(None)
        elif call is None and (refusal := self.why_no_room()):
            self.set_next(sid, refusal)
            started.set_result(None)
        else:  # without a call, another machine answered the webhook, or the model was lost already: dial from here
            call = call or self.begin(sid, given.get("from", ""), given.get("to", ""))
            started.set_result(call)
            call.open_stream(twilio, stream_sid)
            self.peak_calls = max(self.peak_calls, self.talking)

    @property
    def talking(self) -> int:
        """The number of calls with an open stream."""
        return sum(1 for call in self.calls.values() if call.stream_open)

    def set_next(self, sid: str, next_twiml: str) -> None:
        """The bridge ends this call: Twilio will ask what comes next (see `after_call`)."""
        keep_latest(self.next_twiml, sid, next_twiml)
        if self.draining:  # else nobody waits for it
            self.not_yet_asked.add(sid)


def keep_latest(memory: dict[str, Any], key: str, value: Any) -> None:
    """Remember the latest ones only."""
    memory[key] = value
    if len(memory) > REMEMBERED:
        del memory[next(iter(memory))]


# ── 3 The call ──────────────────────────────────────────────────────────────────────────────────────────────────
#
#     webhook ── begin ─┬─ live ──────────────────────────────────── over ── both sides are closed ── call_ended
#                       ├─ keep_session: dial, set up; dial again when it is lost
#                       └─ `start` ── open_stream ── from_twilio, from_openai: one message at a time


def dump(message: Mapping[str, Any]) -> bytes:
    """JSON; what UTF-8 cannot hold (half an emoji, which a tool may return) becomes a question mark."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def size_of(payload: bytes) -> int:
    """The number of bytes in base64 text, without decoding it."""
    return len(payload) * 3 // 4 - payload[-2:].count(b"=")


class ModelLost(Exception):
    """The model cannot be reached, and dialling again would not help."""


@dataclass(slots=True)
class Item:
    """Something the model says: one audio item of a response. A response may hold several."""

    id: str
    content_index: int
    response_id: str
    session_number: int  # of the session that it belongs to: a later one does not know it
    begins: int  # position of its first byte in the call's playback; see section 7
    ends: int  # position behind the last byte that Twilio was given
    made: int = 0  # bytes that OpenAI sent, those included that were dropped at a barge-in
    text: str = ""  # its transcript so far
    complete: bool = False  # OpenAI will send no more of it
    heard_ms: int | None = None  # where a barge-in cut it


@dataclass(slots=True)
class Ending:
    """The bridge means to end the call as soon as what was said last has been heard."""

    reason: str  # for call_ended
    next_twiml: str  # what /twilio/next answers
    can_be_called_off: bool  # by a caller who goes on talking


class Call:
    """One call: what Twilio has, and what OpenAI has. Begun at the webhook, or at a `start` on another machine."""

    UNCLAIMED_S = 10.0  # a model that was dialled at the webhook and that no stream came for is hung up

    def __init__(self, bridge: Bridge, sid: str, caller: str, called: str) -> None:
        self.bridge = bridge
        self.loop = asyncio.get_running_loop()
        self.sid = sid  # "CA…"
        self.caller = caller  # "+81…", but also "anonymous" or a SIP address
        self.called = called  # the number that they dialled
        self.notes: dict[str, Any] = {}  # for hooks and tools; the bridge does not look at it
        self.token = bridge.new_token(sid)  # what the stream must bring
        self.life: asyncio.Task[None] | None = None  # the task of `live`
        self.over: asyncio.Future[str] = self.loop.create_future()  # the reason, once the call is to end
        self.dialling: asyncio.Task[None] | None = None  # the task of `keep_session`
        self.tools: set[asyncio.Task[None]] = set()  # the tasks of tools that run
        self.timers: dict[str, asyncio.TimerHandle] = {}  # whatever is to happen later, and not after the end

        self.twilio: TwilioLeg | None = None  # None until the stream opens
        self.stream_sid = ""  # "MZ…"; every message to Twilio carries it
        self.early_events: list[tuple[str, float, dict[str, Any]]] = []  # for hooks, from before the stream
        self.early_speech: list[bytes] = []  # what OpenAI sent of the greeting before the stream

        self.openai: OpenAILeg | None = None  # None until the first is connected; may be closed
        self.session_number = 0  # 1 for the first session that was connected, one more for each after it
        # OpenAI's answer to our session.update: "" when it is granted, else why it is refused.
        self.verdict: asyncio.Future[str] | None = None
        self.ready = False  # from the granted session.update until the session is lost: audio is sent only then
        self.transcribe = True  # False once OpenAI has refused that part of the session
        self.server_interrupts = True  # OpenAI cancels a response when the caller speaks over it; False: we have to
        self.history: dict[str, tuple[str, str]] = {}  # item id -> (role, text), in the order of the conversation

        self.ears: deque[bytes] = deque()  # the caller's audio (base64) that a new session would need; see section 5
        self.ears_ms = 0.0  # its length
        self.turn_ms = 0.0  # how much of it, from its beginning, are finished turns: neither transcribed nor answered
        self.turn_item_id = ""  # OpenAI's name for the last of them
        self.ears_dropped_ms = 0.0  # what never reached the model because no session was ready for 30 s
        self.call_ms = -1.0  # how far the model has heard, by Twilio's timestamps; -1: no frame has come
        self.frame_at = 0.0  # when the last frame came, or a hole was last filled (loop time, s)
        self.caller_speaking = False  # between speech_started and speech_stopped
        self.caller_was_speaking = False  # the caller was speaking when the session was lost

        self.items: dict[str, Item] = {}  # what the model says and has not been settled, by item id, in order
        self.marks: deque[tuple[str, int]] = deque()  # marks that Twilio has not returned: (name, position)
        self.early_text: defaultdict[str, str] = defaultdict(str)  # words of items whose sound has not begun
        self.sent = 0  # bytes of speech given to Twilio since the call began, 8 to the ms
        self.played = 0  # how many of them Twilio says it has played
        self.played_at = 0.0  # when it said so (loop time, s)

        self.response_id = ""  # the response in progress
        self.interrupted: set[str] = set()  # responses whose remaining audio is dropped, until their response.done
        # Who asks the model to speak, and when, is section 8. The response.create …
        self.create_wanted = b""  # … to be sent as soon as no response is in progress and the caller is silent
        self.create_sent = b""  # … that OpenAI has not yet answered with response.created
        self.create_answered = self.CREATE_RESPONSE  # … that the last response came from: sent again if that fails
        self.wanted_at = 0.0  # when create_wanted was set (loop time, s)
        self.paused_at = 0.0  # when the caller last stopped speaking (loop time, s)
        self.holding = False  # nothing is asked for: OpenAI is about to answer by itself, or a failure is waited out
        self.turn_unanswered = False  # the caller has finished a turn, and no answer to it has sounded
        self.spoke = False  # the response in progress has sounded
        self.greeted = not bridge.settings.greeting  # the greeting has sounded, or there is none
        self.failures = 0  # responses that failed in a row
        self.function_calls: list[dict[str, Any]] = []  # of the response in progress
        self.given_up = False  # the model cannot be reached: nothing more comes
        self.ending: Ending | None = None  # how the call is to end, once the last words are heard

    @property
    def stream_open(self) -> bool:
        return bool(self.stream_sid)

    def emit(self, event: str, at: float | None = None, **facts: Any) -> None:
        """Tell the hooks. What happens before the stream is open is told after call_started, with its own time."""
        at = time.monotonic() if at is None else at
        if self.stream_open:
            self.bridge.hooks.emit(event, self, at, facts)
        else:
            self.early_events.append((event, at, facts))

    def log(self, level: int, text: str, *values: Any) -> None:
        log.log(level, "%s " + text, self.sid, *values)

    async def live(self) -> None:
        """The call from the webhook to the last close. When one side ends, or `end` is called, the other is closed."""
        self.dialling = asyncio.create_task(self.keep_session())
        limit_s, goodbye = self.bridge.settings.max_call_seconds, say_and_hang_up(TIME_IS_UP)
        self.later("limit", limit_s, self.end_when_heard, "time limit", goodbye)
        try:
            reason = await self.over
        finally:
            heard = self.heard()  # now, for the closing takes a while
            await self.close_both_sides()
        self.played = self.sent  # no mark comes any more, so `settle` need not wait
        for item in list(self.items.values()):  # what was still being said
            item.complete = True
            if item.ends > heard:
                item.heard_ms = max(0, heard - item.begins) // 8
            self.settle(item)
        if self.ears_dropped_ms:
            self.log(logging.WARNING, "%.0f ms of the caller's audio never reached the model", self.ears_dropped_ms)
        if self.stream_open:
            self.emit("call_ended", reason=reason)
        else:
            self.log(logging.WARNING, "ended before its stream was open: %s", reason)

    async def close_both_sides(self) -> None:
        self.ready = False
        for timer in self.timers.values():
            timer.cancel()
        tasks = [task for task in (self.dialling, *self.tools) if task is not None]
        for task in tasks:
            task.cancel()
        legs = [leg for leg in (self.twilio, self.openai) if leg is not None]
        for leg in legs:
            leg.ignore()  # what still comes while it closes would begin things anew
        await asyncio.gather(*(leg.close_soon() for leg in legs), *tasks, return_exceptions=True)
        del self.bridge.calls[self.sid]

    def open_stream(self, twilio: TwilioLeg, stream_sid: str) -> None:
        """Twilio's `start`: the caller is there. What the model has said until now goes out."""
        self.twilio, self.stream_sid = twilio, stream_sid
        self.frame_at = self.loop.time()
        self.never_mind("unclaimed")
        twilio.deliver_to(self.from_twilio)
        self.emit("call_started")
        for event, at, facts in self.early_events:
            self.emit(event, at, **facts)
        early_speech, self.early_events, self.early_speech = self.early_speech, [], []
        for message in early_speech:
            assert self.openai is not None
            self.openai.attempt(self.from_openai, message)
        self.end_if_heard()

    def later(self, name: str, delay_s: float, act: Callable[..., object], *arguments: Any) -> None:
        """Do something later, unless the call is over by then. A timer replaces an earlier one of its name."""
        self.never_mind(name)
        if not self.over.done():
            self.timers[name] = self.loop.call_later(delay_s, act, *arguments)

    def never_mind(self, name: str) -> None:
        if timer := self.timers.pop(name, None):
            timer.cancel()

    # ── 4 The model ─────────────────────────────────────────────────────────────────────────────────────────────
    #
    # A session is dialled at the webhook, set up, and asked for the greeting, which is being spoken when the stream
    # opens. A lost session is dialled again: a new one knows nothing, so it is told what both sides have said, of an
    # interrupted answer only what was heard; then it gets the caller's audio that the old one had not answered.

    SESSION_TIMEOUT_S = 8.0  # a caller waits no longer than this for a session; then they hear an apology
    DIAL_PAUSE_S = 0.5  # between attempts
    LOST_AGAIN_S = 10.0  # a session that is lost so soon after another will not last either
    HISTORY = 200  # texts that a new session is told: some 20 minutes of talk
    FINAL_ERRORS = {"insufficient_quota", "account_deactivated", "billing_hard_limit_reached"}  # of the account
    FINAL_CLOSES = range(3000, 5000)  # 3000 invalid_api_key, 4004 model_not_found …: the application itself refuses

    async def keep_session(self) -> None:
        """Have a session with the model as long as the call lasts, or give the call up."""
        lost_at = -math.inf
        try:
            while True:
                async with asyncio.timeout(self.SESSION_TIMEOUT_S):
                    openai = await self.get_session()
                await openai.wait_closed()
                if self.given_up:
                    return
                closed = f"{openai.close_code} {openai.close_reason}".strip()
                why = f"the session was lost ({closed})"
                if openai.close_code in self.FINAL_CLOSES:
                    raise ModelLost(why)
                if self.loop.time() - lost_at < self.LOST_AGAIN_S:
                    raise ModelLost(f"{why}, and the one before it {self.LOST_AGAIN_S:g} s ago or less")
                lost_at = self.loop.time()
                self.forget_session()
                self.early_speech = []  # what was not heard was not said
                self.emit("model_failed", error=f"{why}: dialling again")
        except TimeoutError:
            self.give_up(f"no session within {self.SESSION_TIMEOUT_S:g} s")
        except ModelLost as fault:
            self.give_up(str(fault))
        except Exception as fault:  # whatever it is, the caller must not be left in silence
            log.exception("dialling OpenAI failed")
            self.give_up(f"the dial failed ({fault!r})")

    async def get_session(self) -> OpenAILeg:
        """Dial until OpenAI has accepted our session.update. Raises ModelLost when trying again cannot help."""
        while True:
            openai = await self.dial()
            if openai and await self.set_up(openai):
                return openai
            await asyncio.sleep(self.DIAL_PAUSE_S)

    async def dial(self) -> OpenAILeg | None:
        """One attempt; None when it failed and another may succeed."""
        try:
            openai = await connect(
                self.bridge.openai_url,
                additional_headers=self.bridge.openai_headers,
                ssl=self.bridge.tls,
                create_connection=OpenAILeg,
                compression=None,  # mu-law does not compress, and trying costs three times the CPU
                proxy=None,
                open_timeout=5,  # s, as all these
                close_timeout=1,
                ping_interval=5,  # a line that is dead without a word is found in 10 s
                ping_timeout=5,
                max_size=16 << 20,  # bytes; one audio delta is some 10 KB
            )
        except (OSError, InvalidHandshake) as fault:
            status = fault.response.status_code if isinstance(fault, InvalidStatus) else 0
            if 400 <= status < 500 and status not in (408, 425, 429):  # timeout, too early, too many: they pass
                hint = ": is OPENAI_API_KEY right?" if status in (401, 403) else ""
                raise ModelLost(f"OpenAI answered HTTP {status} to the dial{hint}") from None
            self.log(logging.WARNING, "dialling OpenAI failed, trying again: %s", str(fault) or type(fault).__name__)
            return None
        assert isinstance(openai, OpenAILeg)
        return openai

    async def set_up(self, openai: OpenAILeg) -> bool:
        """Send session.update, and wait for what OpenAI says to it."""
        verdict = self.verdict = self.loop.create_future()
        self.openai, self.session_number = openai, self.session_number + 1
        openai.deliver_to(self.from_openai)
        self.update_session()
        closed = asyncio.ensure_future(openai.wait_closed())
        try:
            await asyncio.wait([verdict, closed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
        if verdict.done():
            if verdict.result():
                raise ModelLost(verdict.result())
            return True
        if openai.close_code in self.FINAL_CLOSES:
            raise ModelLost(f"OpenAI closed with {openai.close_code} {openai.close_reason}")
        self.log(logging.WARNING, "OpenAI closed (%s) before the session was set up", openai.close_code)
        return False

    def update_session(self) -> None:
        less = {} if self.transcribe else {"audio": {"input": {"transcription": None}}}
        self.to_openai("session.update", session=merge_patch(self.bridge.wanted_session, less))

    def session_granted(self, session: Mapping[str, Any]) -> None:
        """OpenAI says what it made of our session.update. Audio in another format would be noise to the caller."""
        if self.verdict is None or self.verdict.done():
            return
        audio = session.get("audio") or {}
        for way in ("input", "output"):
            given = ((audio.get(way) or {}).get("format") or {}).get("type", "audio/pcmu")
            if given != "audio/pcmu":
                self.verdict.set_result(f"OpenAI grants {given} as {way} format instead of audio/pcmu")
                return
        turn_detection = (audio.get("input") or {}).get("turn_detection") or {}
        self.server_interrupts = turn_detection.get("interrupt_response", True)
        self.verdict.set_result("")
        for role, text in self.history.values():  # of a session before this one
            if text:
                self.add_text(role, text)
        self.ready = True
        if not self.greeted:
            who, words = self.bridge.settings.instructions, self.bridge.settings.greeting
            greeting = {"instructions": f"{who}\n\nBegin the call: say exactly this, no more: {words}"}
            self.ask(dump({"type": "response.create", "event_id": self.ASK_ID, "response": greeting}))
        elif self.turn_unanswered and not (self.caller_was_speaking or self.turn_ms):  # else it hears the turn's end
            self.ask(self.CREATE_RESPONSE)
        for payload in self.ears:  # the create came before it on the wire: the greeting is first
            self.send_audio(payload)
        self.ask_if_free()

    def session_refused(self, error: Mapping[str, Any]) -> None:
        """An error before the session was granted answers our session.update: nothing of that applies."""
        assert self.verdict is not None
        text = f"{error.get('code')}: {error.get('message')} ({error.get('param')})"
        if self.transcribe and "transcription" in text:
            self.transcribe = False
            self.emit("model_failed", error=f"{text}: trying without transcription")
            self.update_session()
        else:
            self.verdict.set_result(f"OpenAI refuses the session: {text}")

    def forget_session(self) -> None:
        """What was in progress in the session is over. Texts and `ears` stay, for a later one."""
        self.ready = self.holding = False
        self.turn_unanswered = self.turn_unanswered or bool(self.response_id or self.create_sent)
        self.caller_was_speaking, self.caller_speaking = self.caller_speaking, False
        self.response_id, self.create_sent, self.function_calls = "", b"", []
        self.interrupted.clear()
        self.early_text.clear()
        for item in list(self.items.values()):  # what Twilio has of them is still played: it counts as heard
            item.complete = True
            self.remember(item.id, "assistant", item.text)
            self.settle(item)

    def give_up(self, why: str) -> None:
        """The model cannot be reached. What it has said is heard out; then the caller hears an apology, not silence."""
        self.log(logging.ERROR, "%s: the caller hears an apology", why)
        self.emit("model_failed", error=f"{why}: the caller hears an apology")
        self.given_up = True
        self.forget_session()
        if self.openai is not None:
            self.openai.ignore()
        self.end_when_heard("model lost", say_and_hang_up(APOLOGY))

    def remember(self, item_id: str, role: str, text: str) -> None:
        """Who said what, for a session after this one."""
        if len(self.history) >= self.HISTORY and item_id not in self.history:
            del self.history[next(iter(self.history))]
        self.history[item_id] = (role, text)

    def to_openai(self, kind: str, **content: Any) -> None:
        if self.openai is not None:
            self.openai.send_now(dump({"type": kind, **content}))

    # ── 5 Listen ────────────────────────────────────────────────────────────────────────────────────────────────
    #
    # The model hears by the call's clock: 20 ms of audio for each 20 ms. Twilio sometimes leaves a hole (its timestamps
    # jump, or nothing comes for a while). Then the model's ears would stand still, and it would wait for ever for the
    # end of a sentence. So holes are filled with silence: at a jump as much as is missing; when nothing comes while the
    # caller is speaking, as time passes. `call_ms` counts both, so that audio which comes late is not padded twice.
    #
    # `ears` keeps the audio that a new session would need: all since the caller began to speak, until that turn has
    # become text or has been answered; else the last second (a word's beginning, before OpenAI has noticed it); while
    # no session is ready, everything. Never more than 30 s.

    HOLE_MS = 40.0  # timestamps that are off by less are jitter
    NO_FRAMES_S = 0.75  # network jitter is shorter
    LATE_S = 0.1  # a frame that comes so long after the one before it counts as late: frames come every 20 ms
    PREROLL_MS = 1000.0  # of `ears`, while nobody speaks
    HELD_MS = 30_000.0  # … and at most
    # The form of Twilio's media messages; one of another form is parsed as JSON.
    MEDIA = re.compile(rb'\{"event":"media",[^{]*"media":\{[^}]*?"timestamp":"(\d+)","payload":"([A-Za-z0-9+/=]+)"')

    def from_twilio(self, message: bytes) -> None:
        """One message of Twilio's. Its numbers are strings."""
        if media := self.MEDIA.match(message):  # nearly all messages are of this form; the others are parsed
            self.hear(media[2], int(media[1]))
            return
        event = json.loads(message)
        match event["event"]:
            case "media":
                # Checked, because it is put into JSON as it is.
                payload = base64.b64encode(base64.b64decode(event["media"]["payload"], validate=True))
                self.hear(payload, int(event["media"]["timestamp"]))
            case "mark":
                self.mark_returned(event["mark"]["name"])
            case "dtmf":
                self.emit("key_pressed", key=event["dtmf"]["digit"])
            case "stop":
                self.end("caller hung up")
            case "connected" | "start":
                pass  # came before: see Bridge.start_stream
            case unknown:
                self.log(logging.INFO, "Twilio sent an event that is not known here: %.60r", unknown)

    def hear(self, payload: bytes, timestamp_ms: int) -> None:
        """The caller's voice, usually 20 ms of it; the timestamp counts from the beginning of the stream."""
        now = self.loop.time()
        self.bridge.frames_from_callers += 1
        self.bridge.late_frames += now - self.frame_at > self.LATE_S
        self.frame_at = now
        ms = size_of(payload) / 8
        if ms <= 0:
            return
        if self.call_ms < 0:  # the first frame
            self.call_ms = timestamp_ms
        elif timestamp_ms - self.call_ms >= self.HOLE_MS:
            self.hear_silence(timestamp_ms - self.call_ms)
            self.call_ms = timestamp_ms
        self.call_ms += ms
        self.take_in(payload, ms)

    def hear_silence(self, missing_ms: float) -> None:
        """Fill a hole. A longer one than HELD_MS is cut: no sentence hangs on it any more."""
        missing_ms = min(missing_ms, self.HELD_MS)
        self.log(logging.INFO, "%.0f ms of the caller's audio are missing: filled with silence", missing_ms)
        while missing_ms > 0:
            silence = b"\xff" * math.ceil(min(missing_ms, 1000) * 8)  # by the second: `ears` forgets whole pieces
            self.take_in(base64.b64encode(silence), len(silence) / 8)
            missing_ms -= len(silence) / 8

    def take_in(self, payload: bytes, ms: float) -> None:
        self.ears.append(payload)
        self.ears_ms += ms
        keep_ms = self.PREROLL_MS if self.ready and not (self.caller_speaking or self.turn_ms) else self.HELD_MS
        while self.ears_ms > keep_ms:
            oldest_ms = self.forget_oldest()
            if not self.ready:
                self.ears_dropped_ms += oldest_ms
        if self.ready:
            self.send_audio(payload)
        if self.bridge.hooks.listens("caller_audio"):
            self.emit("caller_audio", mulaw=base64.b64decode(payload))

    def forget_oldest(self) -> float:
        oldest_ms = size_of(self.ears.popleft()) / 8
        self.ears_ms -= oldest_ms
        self.turn_ms = max(0.0, self.turn_ms - oldest_ms)
        return oldest_ms

    def forget_turn(self) -> None:
        """The caller's last turn is known in words, or answered: a new session does not need its sound."""
        while self.turn_ms and self.ears:
            self.forget_oldest()

    def send_audio(self, payload: bytes) -> None:
        assert self.openai is not None
        self.openai.send_now(b'{"type":"input_audio_buffer.append","audio":"%b"}' % payload)

    def watch_for_holes(self) -> None:
        """Runs while the caller speaks: when no frames come, time passes for the model all the same."""
        if not self.caller_speaking:
            return
        missing_s = self.loop.time() - self.frame_at
        if missing_s >= self.NO_FRAMES_S:
            self.frame_at = self.loop.time()
            self.call_ms += missing_s * 1000
            self.hear_silence(missing_s * 1000)
        self.later("holes", self.frame_at + self.NO_FRAMES_S - self.loop.time(), self.watch_for_holes)

    # ── 6 Speak ─────────────────────────────────────────────────────────────────────────────────────────────────
    #
    # A turn of the caller's: speech_started, speech_stopped, committed; their words come later, as ….completed.
    # An answer of the model's: response.created; for each of its items words (…transcript.delta) and sound
    # (…audio.delta), both faster than they are spoken, and output_item.done; at last response.done.

    def from_openai(self, message: bytes) -> None:
        """One event of OpenAI's. The many that are not named here need nothing."""
        event = json.loads(message)
        if not self.stream_open and event["type"].startswith("response."):
            self.early_speech.append(message)
            return
        match event["type"]:
            case "session.updated":
                self.session_granted(event.get("session") or {})

            case "input_audio_buffer.speech_started":
                self.caller_speaking = True
                self.emit("caller_spoke")
                self.barge_in()
                self.watch_for_holes()
            case "input_audio_buffer.speech_stopped":
                self.caller_speaking = False
                self.paused_at = self.loop.time()
                self.turn_unanswered = True
                self.turn_ms = self.ears_ms  # needed until its text has come
                self.emit("caller_paused")
                self.hold(self.ANSWER_COMES_S)  # OpenAI begins its answer now
            case "input_audio_buffer.committed":
                self.turn_item_id = event["item_id"]
                self.remember(event["item_id"], "user", "")  # its place; the words come later, perhaps after the answer
            case "conversation.item.input_audio_transcription.completed":
                text = event.get("transcript", "").strip()
                self.remember(event["item_id"], "user", text)
                if event["item_id"] == self.turn_item_id:
                    self.forget_turn()
                if text:
                    self.emit("caller_said", text=text)
                if event.get("usage"):
                    transcription = self.bridge.wanted_session["audio"]["input"].get("transcription") or {}
                    self.emit("model_used", usage=event["usage"], model=transcription.get("model", ""))
            case "conversation.item.input_audio_transcription.failed":
                why = (event.get("error") or {}).get("message")
                self.emit("model_failed", error=f"transcription: {why}: the call goes on")

            case "response.created":
                self.response_created(event["response"]["id"])
            case "response.output_audio.delta" | "response.audio.delta":  # the second is the beta's name
                response_id, content_index = event.get("response_id", self.response_id), event.get("content_index", 0)
                self.play(response_id, event["item_id"], content_index, event["delta"])
            case "response.output_audio_transcript.delta" | "response.audio_transcript.delta":
                if item := self.items.get(event["item_id"]):
                    item.text += event["delta"]
                else:  # its sound has not begun
                    self.early_text[event["item_id"]] += event["delta"]
            case "response.output_audio_transcript.done" | "response.audio_transcript.done":
                if item := self.items.get(event["item_id"]):
                    item.text = event["transcript"]
            case "response.output_item.done":
                self.item_done(event["item"])
            case "response.done":
                self.response_done(event["response"])

            case "error":
                self.on_error(event["error"])

    # ── 7 Playback ──────────────────────────────────────────────────────────────────────────────────────────────
    #
    # OpenAI sends an answer several times faster than it is spoken, and Twilio queues it. What the caller has heard is
    # known from marks: Twilio returns each when it has played all that was sent before it. Every piece of 200 ms or
    # less is followed by one, named by its item and its position.
    #
    # Positions are bytes of speech since the call began, 8 to the ms:
    #
    #       item A                    item B
    #     ├─────────────────────────┼──────────────────────────┤
    #             ↑ played    ↑ next mark                      ↑ sent
    #               (a mark)
    #
    # Between two marks the clock tells, but never beyond the next mark that is still out. Then, when the caller speaks
    # over it: `clear` empties Twilio's queue, each item is truncated in OpenAI's conversation at what was heard of it,
    # so that the model knows what it has not said, and what still comes of that response is dropped. Twilio returns
    # the marks of a cleared queue as well; they are forgotten, so that their return means nothing.

    MARK_CHARS = 2112  # of base64: 1584 bytes, 198 ms. A multiple of 4, so that each piece is base64 of its own

    def play(self, response_id: str, item_id: str, content_index: int, delta: str) -> None:
        """A piece of the model's voice."""
        item = self.items.get(item_id)
        if item is None:
            item = Item(item_id, content_index, response_id, self.session_number, begins=self.sent, ends=self.sent)
            item.text = self.early_text.pop(item_id, "")
            self.items[item_id] = item
            self.remember(item_id, "assistant", "")
        item.made += size_of(delta.encode())
        if response_id in self.interrupted:
            if item.heard_ms is None:  # it began after the barge-in, or had been heard as far as it had come
                self.truncate(item, self.sent)
            return
        if not self.marks:  # Twilio's queue is empty: this is heard now
            self.played_at = self.loop.time()
        if not self.spoke:
            self.spoke = self.greeted = True
            self.turn_unanswered = False
            self.emit("model_spoke")
        messages = []
        for start in range(0, len(delta), self.MARK_CHARS):
            payload = delta[start : start + self.MARK_CHARS]
            self.sent = item.ends = self.sent + size_of(payload.encode())
            mark = f"{item_id}:{self.sent}"
            self.marks.append((mark, self.sent))
            self.bridge.pieces_to_callers += 1
            messages.append(self.twilio_message("media", media={"payload": payload}))
            messages.append(self.twilio_message("mark", mark={"name": mark}))
        self.to_twilio(*messages)
        if self.bridge.hooks.listens("model_audio"):
            self.emit("model_audio", mulaw=base64.b64decode(delta))

    def twilio_message(self, event: str, **content: Any) -> bytes:
        return dump({"event": event, "streamSid": self.stream_sid, **content})

    def to_twilio(self, *messages: bytes) -> None:
        if self.twilio is not None:
            self.twilio.send_now(*messages)

    def mark_returned(self, name: str) -> None:
        """Twilio has played everything up to this mark; unless it is one of those that `clear` returned."""
        if all(name != mark for mark, _ in self.marks):
            return
        mark = ""
        while mark != name:
            mark, self.played = self.marks.popleft()
        self.played_at = self.loop.time()
        for item in list(self.items.values()):
            self.settle(item)
        self.end_if_heard()

    def heard(self) -> int:
        """The position that the caller has heard up to."""
        if not self.marks:
            return self.sent
        return min(self.played + int((self.loop.time() - self.played_at) * 8000), self.marks[0][1])

    def barge_in(self) -> None:
        """The caller has begun to speak. Whatever is being said to them stops, here and in the model's memory."""
        if self.response_id and self.response_id not in self.interrupted:
            self.interrupted.add(self.response_id)
            if not self.server_interrupts:
                self.to_openai("response.cancel", response_id=self.response_id)
        if self.ending and self.ending.can_be_called_off:
            self.log(logging.INFO, "%s is called off: the caller goes on talking", self.ending.reason)
            self.ending = None
            self.never_mind("goodbye")
        if not self.marks:
            return  # nothing is playing
        heard = self.heard()
        self.to_twilio(self.twilio_message("clear"))
        self.marks.clear()
        self.played = self.sent  # nothing is out any more, so `settle` need not wait
        unheard = [item for item in self.items.values() if item.ends > heard]
        for item in unheard:
            self.truncate(item, heard)
        if unheard:
            begins = unheard[0].begins
            self.emit("model_interrupted", heard_ms=(heard - begins) // 8, sent_ms=(self.sent - begins) // 8)
        for item in list(self.items.values()):
            self.settle(item)
        self.end_if_heard()

    def truncate(self, item: Item, heard: int) -> None:
        item.heard_ms = (min(max(heard, item.begins), item.ends) - item.begins) // 8
        if item.session_number == self.session_number:
            cut_at = {"content_index": item.content_index, "audio_end_ms": item.heard_ms}
            self.to_openai("conversation.item.truncate", item_id=item.id, **cut_at)

    def settle(self, item: Item) -> None:
        """Once an item is complete, and heard to its end or cut, it is known what was said."""
        if not item.complete or (item.heard_ms is None and self.played < item.ends):
            return
        del self.items[item.id]
        heard_text = item.text
        if item.heard_ms is not None and item.made:  # its share of the text, for a session after this one
            heard_text = item.text[: round(len(item.text) * item.heard_ms * 8 / item.made)]
        self.remember(item.id, "assistant", heard_text)
        self.emit("model_said", text=item.text, heard_ms=item.heard_ms)

    # ── 8 Answering ─────────────────────────────────────────────────────────────────────────────────────────────
    #
    # When the caller has spoken, OpenAI answers by itself. The bridge asks for an answer (response.create) only for the
    # greeting, after tools, for hooks, and when a response has failed or its session was lost. Only one response may be
    # in progress, and the caller is not talked over: so an ask waits (create_wanted), is sent (create_sent), and is
    # answered by response.created. An ask that still waits when OpenAI answers a later turn by itself is dropped: that
    # answer has seen all that the ask was for.

    ASK_ID = "ask"  # event_id of each response.create: an error that names it refuses that
    CREATE_RESPONSE = dump({"type": "response.create", "event_id": ASK_ID})
    ALREADY_ACTIVE = "conversation_already_has_active_response"
    ANSWER_COMES_S = 1.0  # within it, usually at once, OpenAI begins its answer to a turn: an ask would collide with it
    RETRY_PAUSES_S = (1.0, 2.0)  # before an answer that failed is asked for again; a rate limit passes in seconds

    def ask(self, create: bytes) -> None:
        self.create_wanted, self.wanted_at = create, self.loop.time()
        self.ask_if_free()

    def ask_if_free(self) -> None:
        others_turn = self.response_id or self.create_sent or self.caller_speaking or self.holding
        if self.create_wanted and self.ready and not others_turn:
            self.create_sent, self.create_wanted = self.create_wanted, b""
            assert self.openai is not None
            self.openai.send_now(self.create_sent)
            self.emit("model_asked")

    def hold(self, seconds: float) -> None:
        """Ask for nothing during this time, unless a response begins within it."""
        self.holding = True
        self.later("hold", seconds, self.go_on)

    def go_on(self) -> None:
        self.holding = False
        self.ask_if_free()
        self.end_if_heard()

    def response_created(self, response_id: str) -> None:
        self.response_id = response_id
        if not self.create_sent and self.wanted_at < self.paused_at:
            self.create_wanted = b""
        self.create_answered, self.create_sent = self.create_sent or self.CREATE_RESPONSE, b""
        self.spoke = self.holding = False
        if self.caller_speaking:  # it would talk over the caller, whose turn will be answered anyhow
            self.interrupted.add(response_id)
            self.to_openai("response.cancel", response_id=response_id)

    def on_error(self, error: Mapping[str, Any]) -> None:
        """Most errors are recoverable, and the session stays open: the call goes on."""
        code, names_ask = error.get("code"), error.get("event_id") == self.ASK_ID
        text = f"{code}: {error.get('message')}"
        if self.verdict is not None and not self.verdict.done():
            self.session_refused(error)
        elif code in self.FINAL_ERRORS:
            self.give_up(text)
        elif names_ask and self.create_sent and code != self.ALREADY_ACTIVE:
            self.create_answered, self.create_sent = self.create_sent, b""
            self.response_failed(error)
        else:
            self.emit("model_failed", error=f"{text}: the call goes on")
            if names_ask or (self.create_sent and code == self.ALREADY_ACTIVE):
                self.asked_too_late()

    def asked_too_late(self) -> None:
        """OpenAI was beginning an answer by itself: it takes a greeting's place; all else is asked for after it."""
        refused = self.create_sent or self.create_answered
        self.create_sent, self.create_answered = b"", self.CREATE_RESPONSE
        if not self.response_id:
            self.hold(self.ANSWER_COMES_S)
        if refused == self.CREATE_RESPONSE:
            self.ask(refused)

    def item_done(self, item: Mapping[str, Any]) -> None:
        if item.get("type") == "function_call" and item.get("status") == "completed":
            self.function_calls.append(dict(item))
        elif said := self.items.get(item.get("id", "")):
            said.complete = True
            self.settle(said)

    def response_done(self, response: Mapping[str, Any]) -> None:
        """A response has come to its end: completed, cancelled, failed or incomplete."""
        if response["id"] == self.response_id:
            self.response_id = ""
        self.interrupted.discard(response["id"])
        self.early_text.clear()
        function_calls, self.function_calls = self.function_calls, []
        for item in list(self.items.values()):
            if item.response_id == response["id"]:
                item.complete = True
                self.settle(item)
        if response.get("usage"):
            self.emit("model_used", usage=response["usage"], model=self.bridge.settings.model)
        details = response.get("status_details") or {}
        match response.get("status"):
            case "completed":
                self.failures = 0
                self.forget_turn()
                if function_calls:
                    task = asyncio.create_task(self.use_tools(function_calls, self.spoke))
                    self.tools.add(task)
                    task.add_done_callback(self.tools_done)
            case "failed":
                self.response_failed(details.get("error") or {})
            case "cancelled":  # turn_detected: by a barge-in; client_cancelled: by us
                pass
            case "incomplete":  # max_output_tokens or content_filter: what there is of it is played
                self.emit("model_failed", error=f"an answer is incomplete ({details.get('reason')}): the call goes on")
        self.ask_if_free()
        self.end_if_heard()

    def response_failed(self, error: Mapping[str, Any]) -> None:
        """Most often a rate limit. The caller would hear silence: ask again after a pause, at most twice."""
        text = f"an answer failed ({error.get('code')}: {error.get('message')})"
        self.failures += 1
        if error.get("code") in self.FINAL_ERRORS or self.failures > len(self.RETRY_PAUSES_S):
            self.give_up(text)
        else:
            pause_s = self.RETRY_PAUSES_S[self.failures - 1]
            self.emit("model_failed", error=f"{text}: asking again in {pause_s:g} s")
            self.hold(pause_s)
            self.ask(self.create_answered)

    async def use_tools(self, function_calls: list[dict[str, Any]], spoke: bool) -> None:
        """Run what the model called, side by side; then let it speak, once. `spoke`: it has, in the same answer."""
        await asyncio.gather(*(self.use_tool(function_call) for function_call in function_calls))
        if not (self.ending and spoke):  # it has said goodbye already
            self.ask(self.CREATE_RESPONSE)

    def tools_done(self, task: asyncio.Task[None]) -> None:
        self.tools.discard(task)
        self.end_if_heard()

    async def use_tool(self, function_call: Mapping[str, Any]) -> None:
        session_number, began = self.session_number, time.monotonic()
        name, arguments = function_call["name"], function_call.get("arguments") or "{}"
        result = await self.bridge.hooks.run_tool(self, name, arguments)
        if session_number == self.session_number and self.ready:
            output = {"type": "function_call_output", "call_id": function_call["call_id"], "output": result}
            self.to_openai("conversation.item.create", item=output)
        else:  # the session that asked is gone; the next one is told in words
            self.tell(f"{name}({arguments}) → {result}")
        seconds = time.monotonic() - began
        self.emit("tool_used", name=name, arguments=arguments, result=result, seconds=seconds)

    def add_text(self, role: str, text: str) -> None:
        content = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
        self.to_openai("conversation.item.create", item={"type": "message", "role": role, "content": [content]})

    def tell(self, text: str) -> None:
        """Tell the model something that nobody has said: this session at once, and each later one."""
        self.remember(f"told {secrets.token_hex(8)}", "system", text)
        if self.ready:
            self.add_text("system", text)

    def tell_model(self, text: str) -> None:
        """Tell the model something that the caller has not said, and let it answer. From any thread."""

        def tell_and_ask() -> None:
            self.tell(text)
            self.ask(self.CREATE_RESPONSE)

        self.loop.call_soon_threadsafe(tell_and_ask)

    # ── 9 The end ───────────────────────────────────────────────────────────────────────────────────────────────
    #
    #     hang_up, transfer ─┐ (a caller who goes on talking calls these two off)
    #     time limit ────────┼─ end_when_heard ── the last words are heard, or a limit passes ──┐
    #     give_up, shutdown ─┘                                                                  ├─ end ── live closes
    #     `stop`, a lost stream ────────────────────────────────────────────────────────────────┘

    MAX_GOODBYE_S = 60.0  # of what is queued is heard out
    GOODBYE_SLACK_S = 15.0  # for words that the model has yet to say

    def hang_up(self) -> None:
        """End the call once the goodbye has been heard; a caller who goes on talking calls it off. From any thread."""
        self.loop.call_soon_threadsafe(self.end_when_heard, "hung up", HANG_UP, True)

    def transfer(self, number: str) -> None:
        """Connect the caller with another telephone, like hang_up; ValueError for what is none. From any thread."""
        if not re.fullmatch(r"\+[1-9]\d{6,14}", number):
            raise ValueError(f"{number!r} is not a telephone number: give one such as +81312345678 (E.164)")
        after = say_and_hang_up(TRANSFER_IS_OVER, f"<Dial>{number}</Dial>")
        self.loop.call_soon_threadsafe(self.end_when_heard, "transferred", after, True)

    def end_when_heard(self, reason: str, next_twiml: str, can_be_called_off: bool = False) -> None:
        """Let what is being said be heard to its end, within a limit; then Twilio asks /twilio/next.

        A limit or a loss that meets a hang_up or transfer leaves it as it is, but it can no longer be called off.
        """
        if self.ending is None or (self.ending.can_be_called_off and can_be_called_off):
            self.ending = Ending(reason, next_twiml, can_be_called_off)
            queued_s = (self.sent - self.heard()) / 8000
            limit_s = min(queued_s, self.MAX_GOODBYE_S) + self.GOODBYE_SLACK_S
            self.later("goodbye", limit_s, self.end, reason, next_twiml)
        elif not can_be_called_off:
            self.ending.can_be_called_off = False
        self.end_if_heard()

    @property
    def busy(self) -> bool:
        """The model is being heard, or is about to speak, or a tool runs."""
        more_comes = self.response_id or self.create_sent or self.create_wanted or self.holding or self.tools
        return bool(self.marks or self.early_speech or (more_comes and not self.given_up))

    def end_if_heard(self) -> None:
        if self.ending and not self.busy:
            self.end(self.ending.reason, self.ending.next_twiml)

    def end(self, reason: str, next_twiml: str = "") -> None:
        """End the call now: `live` closes both sides. Without TwiML it is not the bridge that ends it."""
        if self.over.done():
            return
        if next_twiml:
            self.bridge.set_next(self.sid, next_twiml)
        self.over.set_result(reason)


# ── 10 The wire ─────────────────────────────────────────────────────────────────────────────────────────────────
#
# The plain way to relay is `async for message in one: await other.send(message)`. It costs a task wake-up, a queue, a
# lock and a frame object for each 20 ms of audio. Here whole text messages are cut out of the bytes as they arrive and
# handled at once, and frames are written without waiting. Everything else (handshake, ping, close, messages in several
# frames or over 64 KiB) goes to websockets as it comes.
#
#   a frame (RFC 6455): 0x81 = final, text │ 0x80 if masked, + length or 126 │ 2 bytes length │ 4 bytes mask │ text
#
# What a slow reader leaves unread stands in the transport's buffer, whose size is checked at each write.

MAX_UNSENT = 2 << 20  # bytes: some 3 minutes of speech


class Leg(Connection):
    """One side of a call: each text message goes to `deliver` as it comes; `send_now` writes without waiting."""

    side = ""  # "twilio" or "openai"
    masks_ours = False  # a client masks what it sends, a server does not

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.deliver: Callable[[bytes], object] | None = None
        self.early: list[bytes] = []  # messages from the instant between handshake and handler
        self.parts: list[bytes] = []  # of a message that comes in several frames; max_size bounds their sum
        self.cutting = False  # we cut the frames ourselves: from the handshake on, until something odd comes
        self.cut_off = b""  # bytes not yet dealt with: a frame's beginning, or what came before our 101
        self.masks = b""  # random bytes, 4 for each frame that we mask; drawn 1024 at a time
        self.stalled = False  # the peer has stopped reading, and MAX_UNSENT was reached

    def deliver_to(self, act: Callable[[bytes], object]) -> None:
        """From now on each message goes to `act`; those that have come already go first."""
        self.deliver = act
        early, self.early = self.early, []
        for message in early:
            self.handle(message)
        if self.cut_off:
            self.data_received(b"")

    def ignore(self) -> None:
        self.deliver = lambda message: None

    def data_received(self, data: bytes) -> None:
        """Bytes have come: deliver the whole text messages in them."""
        data, self.cut_off = self.cut_off + data, b""
        at, end = 0, len(data)
        while self.cutting and end - at >= 2:
            head, length, text_at = data[at], data[at + 1] & 127, at + 2
            if length == 126:
                if end - at < 4:
                    break
                length, text_at = data[at + 2] << 8 | data[at + 3], at + 4
            if masked := data[at + 1] & 128:
                text_at += 4
            stop = text_at + length
            if length == 127 or (masked == 0) is not self.masks_ours or self.state >= State.CLOSING:
                self.cutting = False  # a long frame, a wrong one, or the end: from here on the plain way
            elif stop > end:
                break
            else:
                if head == 0x81:
                    text = data[text_at:stop]
                    self.handle(apply_mask(text, data[text_at - 4 : text_at]) if masked else text)
                else:
                    super().data_received(data[at:stop])
                at = stop
        if self.cutting:
            self.cut_off = data[at:]
        else:
            super().data_received(data[at:])

    def process_event(self, event: Any) -> None:
        """The plain way: websockets has a frame; or a handshake or a ping's answer, which are its own business."""
        if not isinstance(event, Frame) or event.opcode in CTRL_OPCODES:
            super().process_event(event)
            return
        self.parts.append(bytes(event.data))
        if event.fin:
            message, self.parts = b"".join(self.parts), []
            self.handle(message)

    def handle(self, message: bytes) -> None:
        if self.deliver is None:
            self.early.append(message)
        else:
            self.attempt(self.deliver, message)

    def attempt(self, act: Callable[[bytes], object], message: bytes) -> None:
        try:
            act(message)
        except Exception:  # the message is not what the protocol says, or we are wrong: the call goes on without it
            kind = re.search(rb'"(event|type)":\s*"[\w.]+"', message)  # no more of it: it may hold a number, or a token
            named = kind[0].decode() if kind else "of no type"
            log.exception("a message of %s could not be handled: %d bytes, %s", self.side, len(message), named)

    def send_now(self, *messages: bytes) -> None:
        """Send text frames, for both sides refuse binary ones: `await self.send(message)` without its wait."""
        if self.state is not State.OPEN or self.stalled:
            return
        frames: list[bytes] = []
        for message in messages:
            length = len(message)
            if length < 126:
                size = bytes((length,))
            elif length < 65536:
                size = b"\x7e" + length.to_bytes(2, "big")
            else:
                size = b"\x7f" + length.to_bytes(8, "big")
            if self.masks_ours:
                self.masks = self.masks[4:] or secrets.token_bytes(1024)
                mask = self.masks[:4]
                frames += (b"\x81", bytes((size[0] | 128,)), size[1:], mask, apply_mask(message, mask))
            else:
                frames += (b"\x81", size, message)
        self.transport.write(b"".join(frames))
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.stalled = True
            log.error("%s has stopped reading: %d bytes unsent; its side is ended", self.side, MAX_UNSENT)
            self.transport.abort()

    async def close_soon(self, code: int = 1000) -> None:
        """Close politely; a peer that does not answer within a second is cut off."""
        try:
            async with asyncio.timeout(1):
                await self.close(code)
        except TimeoutError:
            self.transport.abort()


HEAD_LIMIT = 16 << 10  # bytes of a handshake's or request's head


class OpenAILeg(Leg, ClientConnection):
    side = "openai"
    masks_ours = True
    unread: bytes | None = b""  # what has come of OpenAI's answer to our handshake; None once it has been handed on

    def data_received(self, data: bytes) -> None:
        if self.unread is None:
            super().data_received(data)
            return
        self.unread += data
        head, blank_line, rest = self.unread.partition(b"\r\n\r\n")
        if blank_line or len(head) > HEAD_LIMIT:
            self.unread = None
            super().data_received(head + blank_line)
            self.cutting = self.state is State.OPEN  # or it is a refusal, whose rest is text for websockets
            super().data_received(rest)


FORM_LIMIT = 64 << 10  # bytes of a webhook's body; Twilio's are about 1 KB
FORM_TIMEOUT_S = 5.0  # from a request's first byte; one that is not complete by then is answered 408
# A stranger chooses the line: if the pattern could match it in several ways, trying them all would take for ever.
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")


class TwilioLeg(Leg, ServerConnection):
    """Twilio's side: any HTTP request to the port, or the media stream.

    websockets parses only requests without a body, and a webhook's POST always has one. So the bytes of a request are
    kept until its head and body are complete; websockets gets the head without the headers that announce the body.
    `Bridge.route` then finds the body in `form_body`, or in `refusal` why the request is refused.
    """

    side = "twilio"
    unread: bytes | None = b""  # what has come of the request and was not read; None once it has been handed on
    head = b""  # of the request, as websockets may see it, once it is complete
    form_length = 0  # bytes of the body that the head announces
    form_body = b""
    refusal: tuple[int, str] | None = None
    deadline: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> str:
        """The address at the other end; on Fly.io and behind tunnels that of the proxy."""
        return str((self.remote_address or ("?",))[0])

    def data_received(self, data: bytes) -> None:
        if self.unread is None:
            if self.state is not State.CONNECTING:
                super().data_received(data)
            elif len(self.cut_off) < HEAD_LIMIT:  # what follows a request waits until that is answered with 101
                self.cut_off += data
            return
        if self.deadline is None:
            late = 408, "the request did not come to its end"
            self.deadline = self.loop.call_later(FORM_TIMEOUT_S, self.refuse, *late)
        self.unread += data
        if not self.head:
            self.read_head(*self.unread.partition(b"\r\n\r\n"))
        if self.head and len(self.unread) >= self.form_length:
            self.form_body = self.unread[: self.form_length]
            self.hand_on(self.head, self.unread[self.form_length :])

    def read_head(self, head: bytes, blank_line: bytes, rest: bytes) -> None:
        """Refuse what websockets would drop without a word, and note how long the body is."""
        if len(head) > HEAD_LIMIT:
            self.refuse(431, f"the head of a request may have {HEAD_LIMIT} bytes")
            return
        if not blank_line:
            return
        request_line, *lines = head.split(b"\r\n")
        headers = [HEADER_LINE.fullmatch(line) for line in lines]
        if not re.fullmatch(rb"[A-Z]+ [!-~]+ HTTP/1\.[01]", request_line) or None in headers:
            self.refuse(400, "that is not a well-formed HTTP request")
            return

        def values(name: bytes) -> set[bytes]:
            return {header[2].strip().lower() for header in headers if header and header[1].lower() == name}

        lengths = values(b"content-length") or {b"0"}
        if values(b"transfer-encoding"):
            self.refuse(411, "send a Content-Length instead of a Transfer-Encoding")
        elif len(lengths) > 1 or not all(re.fullmatch(rb"\d{1,18}", length) for length in lengths):
            self.refuse(400, "Content-Length is not one number")
        elif (length := int(lengths.pop())) > FORM_LIMIT:
            self.refuse(413, f"the body may have {FORM_LIMIT} bytes")
        else:
            kept = [h[0] for h in headers if h and h[1].lower() != b"content-length"]
            self.head = b"\r\n".join([request_line, *kept, b"", b""])
            self.form_length, self.unread = length, rest
            if values(b"expect") == {b"100-continue"} and request_line.endswith(b"1.1"):
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hand_on(self, head: bytes, rest: bytes = b"") -> None:
        self.unread = None
        if self.deadline is not None:
            self.deadline.cancel()
        super().data_received(head)
        self.cutting, self.cut_off = True, rest

    def refuse(self, status: int, why: str) -> None:
        """websockets could not parse this request: it gets another one, which `Bridge.route` refuses."""
        self.refusal = status, why
        self.hand_on(b"GET / HTTP/1.1\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        super().connection_lost(exc)


# ── 11 Serve ────────────────────────────────────────────────────────────────────────────────────────────────────


class NoHooks:
    """What stands in for hooks/ when there is none: bridge.py alone is a whole telephone."""

    tools: list[dict[str, Any]] = []
    pages: dict[str, Any] = {}
    stand_in = None
    dropped = 0

    def emit(self, event: str, call: Call, at: float, facts: Mapping[str, Any]) -> None:
        pass

    def listens(self, event: str) -> bool:
        return False

    async def run_tool(self, call: Call, name: str, arguments: str) -> str:
        return f"Error: there is no tool named {name}."

    def close(self, timeout_s: float) -> None:
        pass


def load_hooks(names: str | None) -> Any:
    """The hooks/ folder beside this file, if it is ours. Raises ValueError for a name in HOOKS that is not there."""
    path = Path(__file__).with_name("hooks") / "__init__.py"
    spec = importlib.util.spec_from_file_location("bridge_hooks", path)
    if path.exists() and spec and spec.loader:
        module = importlib.util.module_from_spec(spec)
        sys.modules["bridge_hooks"] = module
        spec.loader.exec_module(module)
        if hasattr(module, "load"):
            return module.load(path.parent, names)
    if names:
        raise ValueError(
            f"HOOKS is {names!r}, but there is no hooks folder beside bridge.py: unset it, or copy the folder"
        )
    return NoHooks()


def without_openai(settings: Settings) -> bool:
    """Nobody has said where a model is: a stand-in on this computer answers (hooks/offline.py)."""
    return not settings.openai_api_key and settings.openai_realtime_url == Settings.openai_realtime_url


def open_line(bridge: Bridge, host: str | None, port: int) -> Any:
    """The one port: webhooks, streams and pages. Use with `async with`."""
    return serve(
        bridge.take_stream,
        host or None,
        port,
        process_request=bridge.answer_request,
        create_connection=TwilioLeg,
        compression=None,  # Twilio never offers it
        max_size=64 << 10,  # bytes; a media message has some 400
        close_timeout=1,
    )


def health(bridge: Bridge) -> dict[str, Any]:
    delays_ms = sorted(bridge.loop_delays_ms)
    return {
        "status": "draining" if bridge.draining else "ok",
        "calls": bridge.talking,
        "waiting": len(bridge.calls) - bridge.talking,  # answered, and the stream not yet open
        "peak_calls": bridge.peak_calls,
        "max_calls": bridge.settings.max_calls,
        "frames_from_callers": bridge.frames_from_callers,
        "pieces_to_callers": bridge.pieces_to_callers,
        "late_frames": bridge.late_frames,
        "dropped_hook_events": bridge.hooks.dropped,
        "loop_delay_p99_ms": round(delays_ms[len(delays_ms) * 99 // 100], 1) if delays_ms else None,
    }


async def measure_loop_delay(bridge: Bridge) -> None:
    """Ten times a second, how late this loop is: the first sign that there are more calls than it can carry."""
    while True:
        due = time.monotonic() + 0.1
        await asyncio.sleep(0.1)
        bridge.loop_delays_ms.append((time.monotonic() - due) * 1000)


BATCH_ABOVE_CALLS, BATCH_S = 100, 0.0005  # with fewer calls, one look seldom finds several frames


async def batch_reads(bridge: Bridge) -> None:
    """With many calls, look at the sockets every half millisecond only: then one look finds several frames.

    At 200 calls that saves a fifth of the CPU, and delays a frame by some 2 ms; hooks' threads run meanwhile.
    """
    while True:
        if len(bridge.calls) > BATCH_ABOVE_CALLS:
            time.sleep(BATCH_S)  # noqa: ASYNC251 - it is the loop itself that is to rest
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.1)


# With DRAIN_SECONDS they make 272 s: fly.toml lets a machine have 300.
DRAIN_GOODBYE_S = 30.0  # for the words that are being said when DRAIN_SECONDS are over
NEXT_S = 2.0  # for Twilio to ask /twilio/next


async def drain(bridge: Bridge) -> None:
    """Let the calls end by themselves, then end them; and go on answering until Twilio has asked /twilio/next."""

    async def wait_for(done: Callable[[], bool], limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while not done() and time.monotonic() < until:  # noqa: ASYNC110 - there is no one event to wait for
            await asyncio.sleep(0.05)

    await wait_for(lambda: not bridge.calls, bridge.settings.drain_seconds)
    for call in list(bridge.calls.values()):
        call.end_when_heard("shutdown", say_and_hang_up(RESTARTING))
    await wait_for(lambda: not bridge.calls, DRAIN_GOODBYE_S)
    await wait_for(lambda: not bridge.not_yet_asked, NEXT_S)


async def run(settings: Settings, hooks: Any) -> int:
    loop = asyncio.get_running_loop()
    if without_openai(settings):
        url = await hooks.stand_in()
        settings = replace(settings, openai_realtime_url=url, openai_realtime_model="stand-in")  # which costs nothing
    bridge = Bridge(settings, hooks)
    port = settings.port
    stop = asyncio.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            print("bridge.py: second signal: ending at once", file=sys.stderr, flush=True)
            os._exit(1)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)  # not the loop's own way: Windows has none
    try:
        server = await open_line(bridge, settings.host, settings.port)
    except (OSError, UnicodeError) as fault:
        if getattr(fault, "errno", 0) == errno.EADDRINUSE:
            wrong = f"PORT {port} is taken: set PORT to a free one"
        else:
            wrong = f"cannot listen at HOST {settings.host!r}, PORT {port} ({fault}): give an address of this computer"
        print(f"bridge.py: {wrong}", file=sys.stderr)
        return 1
    async with server:
        log.info("listening on port %d; Twilio's webhook is POST %s/twilio/voice", port, settings.public_base_url)
        if "/" in hooks.pages and not settings.twilio_auth_token:
            page = f"http://localhost:{port}/"
            log.info("to talk to it from this computer, open %s in a browser", page)
            if "--open" in sys.argv:
                webbrowser.open(page)
        elif "--open" in sys.argv:
            log.warning("--open: the browser phone needs the hooks folder, and TWILIO_AUTH_TOKEN unset")
        # asyncio sets 256 KiB aside for each TLS connection; 32 KiB are 3 s of speech, and a third of the memory.
        asyncio.sslproto.SSLProtocol.max_size = 32 << 10
        # What the start has made stays, and nearly all that a call makes dies by its reference count: the garbage
        # collector may look less often, which saves a tenth of the CPU.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        background = [loop.create_task(measure_loop_delay(bridge)), loop.create_task(batch_reads(bridge))]
        await stop.wait()
        bridge.draining = True
        if bridge.calls:
            text = (
                "stopping: no new calls; %d in progress may go on for up to %g s. A second signal (Ctrl-C) ends at once"
            )
            log.info(text, len(bridge.calls), settings.drain_seconds)
        else:
            log.info("stopping")
        await drain(bridge)
        for task in background:
            task.cancel()
    await asyncio.to_thread(hooks.close, 10.0)
    return 0


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a hook prints is seen at once, in a log, too
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("websockets").setLevel(logging.ERROR)
    try:
        if "--help" in sys.argv:
            print(__doc__)
            return 0
        if unknown := [argument for argument in sys.argv[1:] if argument != "--open"]:
            usage = "give none, or --open for the browser phone; settings are environment variables, see README.md"
            raise ValueError(f"the argument {unknown[0]!r} is not known: {usage}")
        settings = read_settings(os.environ)
        hooks = load_hooks(settings.hooks)
        if without_openai(settings) and hooks.stand_in is None:
            mend = (
                "set it to a key from https://platform.openai.com/api-keys, or copy the hooks folder (offline.py), too"
            )
            raise ValueError(f"OPENAI_API_KEY is not set: {mend}")
    except ValueError as fault:
        print(f"bridge.py: {fault}", file=sys.stderr)
        return 2
    return asyncio.run(run(settings, hooks))


if __name__ == "__main__":
    sys.exit(main())
