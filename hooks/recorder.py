"""Records each call as a stereo WAV: the caller left, the model right, as the caller heard it.

The model's voice comes in bursts and is queued by Twilio. It is recorded when it plays, with silence where nothing
played, and it stops where the caller spoke over it. A crash leaves a file that plays up to the last second.

    RECORDINGS   folder for the recordings; unset: nothing is recorded, and listening costs nothing

Files: <UTC time>-<call sid>.wav, readable by this user only; 8 kHz, 16 bit, 1.9 MB a minute. Tell callers that they are
recorded, for example in GREETING: in many places the law asks for it.
"""

import logging
import os
import re
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

FOLDER = os.environ.get("RECORDINGS", "").strip()
if FOLDER:
    try:
        Path(FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=FOLDER).close()
    except OSError as fault:
        log.error("RECORDINGS: %s. Name a folder that can be written to. Nothing is recorded", fault)
        FOLDER = ""


def sample(code: int) -> int:
    """The 16-bit sample of one byte of mu-law (ITU-T G.711)."""
    code = ~code & 0xFF
    magnitude = (((code & 0x0F) << 3) + 132 << (code >> 4 & 0x07)) - 132
    return -magnitude if code & 0x80 else magnitude


SAMPLES = [sample(code) for code in range(256)]


class Recording:
    """One call's file. Positions are samples since the call began."""

    def __init__(self, path: Path, began: float) -> None:
        path.touch(mode=0o600)
        self.wav = wave.Wave_write(str(path))
        self.wav.setparams((2, 2, RATE, 0, "NONE", ""))
        self.path = path
        self.broken = False  # the disk is full, or gone
        self.began = began  # monotonic time
        self.written = 0  # up to here both sides are in the file
        self.left, self.right = bytearray(), bytearray()  # mu-law from there on
        self.caller_end = 0  # up to here the caller's audio has come
        self.late_since: int | None = -RATE  # since then it comes late, as it may at first; None: it is in time
        self.dropped = 0  # bytes of the model's, beyond MAX_QUEUED

    def hear_caller(self, mulaw: bytes, at: float) -> None:
        """Each piece belongs behind the one before. But where they come late for a second on end, some are missing."""
        now = self.advance(at)
        if now - self.caller_end <= JITTER:
            self.late_since = None
        elif self.late_since is None:
            self.late_since = now
        elif now - self.late_since > RATE:
            mulaw = SILENCE * (now - self.caller_end) + mulaw
        self.left += mulaw[max(0, self.written - self.caller_end) :]  # too late for the file: silence stands there
        self.caller_end += len(mulaw)

    def play_model(self, mulaw: bytes, at: float) -> None:
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
        """Write, once a second, what is certain: the model's side up to now, the caller's as far as it has come."""
        now = max(self.written, round((at - self.began) * RATE))
        certain = min(now, max(self.caller_end, now - PATIENCE))
        if certain - self.written >= RATE:
            self.write(certain)
        return now

    def write(self, end: int) -> None:
        count = end - self.written
        stereo = array("h", bytes(4 * count))
        for channel, side in enumerate((self.left, self.right)):
            stereo[channel::2] = array("h", [SAMPLES[code] for code in side[:count].ljust(count, SILENCE)])
            del side[:count]
        self.written = end
        if not self.broken:
            try:
                self.wav.writeframes(stereo)  # and the sizes in the header: a crash leaves a file that plays
            except OSError as fault:
                self.broken = True
                log.error("%s ends early: %s", self.path, fault)

    def finish(self, at: float) -> None:
        self.stop_model(at)
        self.write(max(self.advance(at), self.caller_end))
        with suppress(OSError):  # a full disk: `write` has told it
            self.wav.close()
        if self.dropped:
            log.warning("%s: %.1f s of the model are missing", self.path, self.dropped / RATE)
        log.info("%s: %.1f s", self.path, self.written / RATE)


if FOLDER:  # otherwise there are no handlers, and the bridge does not even decode the audio

    def call_started(call: Any, at: float) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{re.sub('[^A-Za-z0-9]', '', call.sid)}.wav"
        call.notes["recorder"] = recording = Recording(Path(FOLDER, name).absolute(), at)
        call.notes["recording"] = str(recording.path)

    def caller_audio(call: Any, at: float, mulaw: bytes) -> None:
        if recording := call.notes.get("recorder"):
            recording.hear_caller(mulaw, at)

    def model_audio(call: Any, at: float, mulaw: bytes) -> None:
        if recording := call.notes.get("recorder"):
            recording.play_model(mulaw, at)

    def model_interrupted(call: Any, at: float) -> None:
        if recording := call.notes.get("recorder"):
            recording.stop_model(at)

    def call_ended(call: Any, at: float) -> None:
        if recording := call.notes.pop("recorder", None):
            recording.finish(at)
