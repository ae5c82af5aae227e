"""Records each call as a stereo WAV: the caller left, the model right, as the caller heard it.

The model's voice comes in bursts and is queued by Twilio. It is recorded when it plays, with silence where nothing
played, and it stops where the caller spoke over it. A crash leaves a file that plays up to the last second.

    RECORDINGS   folder for the recordings; unset: nothing is recorded, and listening costs nothing

Files: <UTC time>-<call sid>.wav, readable by this user only. 8 kHz, 16 bit, 1.9 MB a minute. Mu-law in a WAV would be
half of that, and browsers play it, but not everything reads it: Python's own `wave` does not. Tell callers that they
are recorded, for example in GREETING: in many places the law asks for it.
"""

import logging
import os
import re
import sys
import time
import wave
from pathlib import Path
from typing import Any

log = logging.getLogger("recorder")

RATE = 8000  # samples, and bytes of mu-law, a second
SILENCE = b"\xff"  # in mu-law
JITTER = RATE // 5  # 200 ms: the caller's audio may be that late without any of it missing
PATIENCE = 3 * RATE  # the file waits so long for audio that the network holds up
MAX_QUEUED = 600 * RATE  # of audio in memory: Twilio queues no more than 10 minutes of the model's, either


def linear(code: int) -> int:
    """The 16-bit sample of one byte of mu-law (ITU-T G.711)."""
    code = ~code & 0xFF
    magnitude = (((code & 0x0F) << 3) + 132 << (code >> 4 & 0x07)) - 132
    return -magnitude if code & 0x80 else magnitude


# A sample's two bytes, each by a table of its own, so that a second of audio is converted at one stroke.
SAMPLES = [linear(code).to_bytes(2, sys.byteorder, signed=True) for code in range(256)]  # `wave` wants it native
FIRST_BYTES, SECOND_BYTES = (bytes(sample[i] for sample in SAMPLES) for i in (0, 1))


FOLDER = os.environ.get("RECORDINGS", "").strip()
if FOLDER:
    try:
        Path(FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(FOLDER, os.W_OK):
            raise PermissionError(f"{FOLDER} is not writable")
    except OSError as fault:
        log.error("RECORDINGS: %s. Name a folder that can be written to. Nothing is recorded", fault)
        FOLDER = ""


class Recording:
    """One call's file. Positions are samples since the call began; `left` and `right` begin where the file ends."""

    def __init__(self, path: Path, began: float) -> None:
        self.path = path
        self.file = open(path, "xb", 0, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
        self.wav = wave.open(self.file, "wb")  # noqa: SIM115
        self.wav.setparams((2, 2, RATE, 0, "NONE", ""))
        self.wav.writeframes(b"")  # the header
        self.broken = False  # the disk is full, or gone
        self.began = began  # monotonic time
        self.written = 0  # up to here both sides are in the file
        self.left, self.right = bytearray(), bytearray()  # mu-law that is not
        self.caller_end = 0  # up to here the caller's audio has come
        self.late_since: int | None = None  # from here on it has been later than JITTER
        self.dropped = 0  # bytes of either side, beyond MAX_QUEUED

    def hear_caller(self, mulaw: bytes, at: float) -> None:
        """The caller's audio is complete, so each piece belongs behind the one before, whenever it comes.

        Only where some is missing all the same does it belong later. Audio that the network held up is late, too, but
        it catches up; so what has been late for a second has a hole before it.
        """
        now = self.advance(at)
        if self.caller_end and now - self.caller_end <= JITTER:
            self.late_since = None
        elif self.late_since is None:
            self.late_since = now
        if not self.caller_end or (self.late_since is not None and now - self.late_since > RATE):
            self.caller_end = max(self.caller_end, self.written)
            self.queue_caller(SILENCE * (now - self.caller_end))
        self.queue_caller(mulaw)

    def queue_caller(self, mulaw: bytes) -> None:
        too_late = min(len(mulaw), max(0, self.written - self.caller_end))  # PATIENCE was over: silence stands there
        queued = self.queue(self.left, mulaw[too_late:])
        self.caller_end += too_late + queued

    def play_model(self, mulaw: bytes, at: float) -> None:
        """Twilio plays it now, or behind what it has still to play."""
        now = self.advance(at)
        self.right += SILENCE * (now - self.written - len(self.right))
        self.queue(self.right, mulaw)

    def stop_model(self, at: float) -> None:
        """Twilio throws away what it has not played."""
        del self.right[self.position(at) - self.written :]

    def queue(self, side: bytearray, mulaw: bytes) -> int:
        fitting = mulaw[: MAX_QUEUED - len(side)]
        side += fitting
        self.dropped += len(mulaw) - len(fitting)
        return len(fitting)

    def position(self, at: float) -> int:
        return max(self.written, round((at - self.began) * RATE))

    def advance(self, at: float) -> int:
        """Write, once a second, what is certain: the model's side up to now, the caller's as far as it has come."""
        now = self.position(at)
        certain = min(now, max(self.caller_end, now - PATIENCE))
        if certain - self.written >= RATE:
            self.write(certain)
        return now

    def write(self, end: int) -> None:
        while self.written < end:
            count = min(RATE, end - self.written)
            stereo = bytearray(4 * count)
            for i, side in enumerate((self.left, self.right)):
                mulaw = side[:count].ljust(count, SILENCE)
                del side[:count]
                stereo[2 * i :: 4] = mulaw.translate(FIRST_BYTES)
                stereo[2 * i + 1 :: 4] = mulaw.translate(SECOND_BYTES)
            self.written += count
            if not self.broken:
                try:
                    self.wav.writeframes(stereo)  # and the sizes in the header: a crash leaves a file that plays
                except OSError as fault:
                    self.broken = True
                    log.error("%s ends early: %s", self.path, fault)

    def finish(self, at: float) -> None:
        self.stop_model(at)
        self.write(max(self.position(at), self.caller_end))
        self.wav.close()
        self.file.close()
        if self.dropped:
            log.warning("%s: %.1f s did not fit into memory", self.path, self.dropped / RATE)
        log.info("%s: %.1f s", self.path, self.written / RATE)


if FOLDER:  # otherwise there are no handlers, and the bridge does not even decode the audio

    def call_started(call: Any, at: float) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{re.sub('[^A-Za-z0-9]', '', call.sid)[:64]}.wav"
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
