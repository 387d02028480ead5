"""Token ids to text as they arrive: whole characters only, cut at the first stop string."""

import codecs
from collections.abc import Sequence

from afd_ray.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one request.

    `feed` returns the text that a token lets out. Half a UTF-8 character, and text that may be the start of a stop string, are held back
    until it is clear what they are. After a stop string is complete (`stopped`), nothing more comes out. The result does not depend on how the text was
    split into tokens: the stop string that is complete first, cuts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped: str | None = None
        """The stop string that ended the text."""
        self.characters = 0
        """Length of the text so far, including what is held back or was cut away."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._starts = frozenset(text[:length] for text in stop for length in range(1, len(text)))
        self._longest_start = max((len(text) - 1 for text in stop), default=0)
        self._held = ""

    def feed(self, token_id: int) -> str:
        return self._advance(self._decoder.decode(self._tokenizer.text_bytes(token_id)))

    def flush(self) -> str:
        """What was still held back, at the end of the request."""
        text = self._advance(self._decoder.decode(b"", True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        self.characters += len(text)
        self._held += text
        cut = self._first_stop()
        if cut is not None:
            out, self._held = self._held[:cut], ""
            return out
        keep = self._undecided()
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out

    def _first_stop(self) -> int | None:
        """Where the stop string that is complete first begins."""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if not found:
            return None
        _, start, self.stopped = min(found)
        return start

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for length in range(min(self._longest_start, len(self._held)), 0, -1):
            if self._held[-length:] in self._starts:
                return length
        return 0
