"""Records each call as a stereo WAV: the caller left, the model right, as the caller heard it.

The model's voice comes in bursts and is queued by Twilio. It is recorded when it plays, with
silence where nothing played, and it stops where the caller spoke over it. Tones that hooks play
are not in it. A crash leaves a file that plays up to the last second.

    RECORDINGS    the folder of the recordings. Not set: nothing is recorded, and costs nothing

A file is <UTC time>-<call sid>.wav, for its owner only (0600): 8 kHz, 16 bit, 1.9 MB a minute.
call.notes["recording"] has its path. Tell callers that they are recorded, for example in GREETING:
in many places the law demands it.
"""

import logging
import os
import sys
import tempfile
import time
import wave
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("recorder")

RATE = 8000  # samples, and bytes of mu-law, a second
SILENCE = b"\xff"  # in mu-law
JITTER = RATE // 5  # 200 ms: the caller's audio may be that late without any of it missing
PATIENCE = 3 * RATE  # the file waits so long for audio that the network holds up
MAX_QUEUED = 600 * RATE  # of the model's audio: Twilio queues no more than 10 minutes, either

if FOLDER := os.environ.get("RECORDINGS", "").strip():
    try:  # now, because the first call must not be the first to find out
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as error:
        sys.exit(f"RECORDINGS is {FOLDER!r}: {error.strerror}: give a folder to write to")


def sample(code: int) -> int:
    """The 16-bit sample of one byte of mu-law (ITU-T G.711)."""
    code = ~code & 0xFF
    magnitude = (((code & 0x0F) << 3) + 132 << (code >> 4 & 0x07)) - 132
    return -magnitude if code & 0x80 else magnitude


SAMPLES = [sample(code) for code in range(256)]


class Recording:
    """One call's file. Positions are samples since the call began."""

    def __init__(self, path: Path, began: float, sid: str) -> None:
        path.touch(mode=0o600)
        self.wav = wave.Wave_write(str(path))
        self.wav.setparams((2, 2, RATE, 0, "NONE", ""))
        self.path, self.sid = path, sid
        self.broken = False  # the disk is full, or gone
        self.began = began  # monotonic time
        self.written = 0  # up to here both sides are in the file
        self.left, self.right = bytearray(), bytearray()  # mu-law from there on
        self.caller_end = 0  # up to here the caller's audio has come
        # Since then the caller's audio comes late, as it may at first; None: it is in time.
        self.late_since: int | None = -RATE
        self.dropped = 0  # bytes of the model's, beyond MAX_QUEUED

    def add_caller(self, mulaw: bytes, at: float) -> None:
        """Each chunk belongs behind the one before. If they are late for 1 s, some are missing."""
        now = self.advance(at)
        if now - self.caller_end <= JITTER:
            self.late_since = None
        elif self.late_since is None:
            self.late_since = now
        elif now - self.late_since > RATE:
            mulaw = SILENCE * (now - self.caller_end) + mulaw
        # What is too late for the file is left out: silence stands there.
        self.left += mulaw[max(0, self.written - self.caller_end) :]
        self.caller_end += len(mulaw)

    def add_model(self, mulaw: bytes, at: float) -> None:
        """Twilio plays it now, or behind what it has still to play."""
        now = self.advance(at)
        self.right += SILENCE * (now - self.written - len(self.right))
        fitting = mulaw[: MAX_QUEUED - len(self.right)]
        self.right += fitting
        self.dropped += len(mulaw) - len(fitting)

    def stop_model(self, at: float) -> None:
        """Twilio throws away what it has not played."""
        now = self.advance(at)
        del self.right[now - self.written :]

    def advance(self, at: float) -> int:
        """Write once a second what is certain: the model up to now, the caller as far as known."""
        now = max(self.written, round((at - self.began) * RATE))
        certain = min(now, max(self.caller_end, now - PATIENCE))
        if certain - self.written >= RATE:
            self.write(certain)
        return now

    def write(self, end: int) -> None:
        count = end - self.written
        stereo = array("h", bytes(4 * count))
        for channel, side in enumerate((self.left, self.right)):
            mulaw = side[:count].ljust(count, SILENCE)
            stereo[channel::2] = array("h", [SAMPLES[code] for code in mulaw])
            del side[:count]
        self.written = end
        if not self.broken:
            try:
                # It writes the sizes in the header as well: a crash leaves a file that plays.
                self.wav.writeframes(stereo)
            except OSError as error:
                self.broken = True
                text = "the recording ends early: %s: make room in %s"
                log.error(text, error, self.path.parent, extra={"call": self.sid})

    def finish(self, at: float) -> None:
        self.stop_model(at)
        self.write(max(self.advance(at), self.caller_end))
        with suppress(OSError):  # a full disk: `write` has logged it
            self.wav.close()


def call_started(call: Any, at: float) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(FOLDER, f"{stamp}-{call.sid}.wav").resolve()
    call.notes["recorder"] = Recording(path, at, call.sid)
    call.notes["recording"] = str(path)


def caller_audio(call: Any, at: float, mulaw: bytes) -> None:
    if recording := call.notes.get("recorder"):
        recording.add_caller(mulaw, at)


def model_audio(call: Any, at: float, mulaw: bytes) -> None:
    if recording := call.notes.get("recorder"):
        recording.add_model(mulaw, at)


def model_interrupted(call: Any, at: float) -> None:
    if recording := call.notes.get("recorder"):
        recording.stop_model(at)


def call_ended(call: Any, at: float) -> None:
    if recording := call.notes.pop("recorder", None):
        recording.finish(at)
        length = {"call": call.sid, "seconds": round(recording.written / RATE, 1)}
        if lost_s := recording.dropped / RATE:
            log.warning("%.1f s of the model are missing", lost_s, extra={"call": call.sid})
        log.info("%s", recording.path.as_uri(), extra=length)


if not FOLDER:  # then the bridge need not even decode the audio
    del call_started, caller_audio, model_audio, model_interrupted, call_ended
