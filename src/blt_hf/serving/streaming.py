"""Text from bytes as they come: no character twice, none cut in two, and none of a stop string."""

import codecs

from ..tokenizer.encoding import bytes_of, to_bytes


class TextStream:
    """Decodes the ids of one answer as they are made. An id costs the same however long the text is.

    What may still become another character, or a stop string, is held back until it is known.

    Args:
        tokenizer: names tokens that stand for no byte; special ones are left out of the text.
        stop: texts at whose first appearance the answer ends; they are no part of it.
    Attributes:
        is_stopped: a stop string has come, and nothing more is taken.
    """

    def __init__(self, tokenizer, stop: list[str] | None = None):
        self._tokenizer, self._stop = tokenizer, [to_bytes(text) for text in stop or []]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._special = set(tokenizer.all_special_ids)
        self.is_stopped = False

    def push(self, ids: list[int]) -> str:
        """Takes ids, and gives the text that they complete."""
        if self.is_stopped:
            return ""
        self._held += b"".join(self._bytes(index) for index in ids)
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self._held, self.is_stopped = self._held[: min(found)], True
            return self._give(len(self._held))
        return self._give(len(self._held) - max((self._open_stop(text) for text in self._stop), default=0))

    def close(self) -> str:
        """Returns the rest of the text, when nothing more comes."""
        return self._give(len(self._held)) + self._decoder.decode(b"", final=True)

    def _bytes(self, index: int) -> bytes:
        if index in self._special:
            return b""
        return bytes_of([index]) or to_bytes(self._tokenizer.decode([index]))

    def _open_stop(self, text: bytes) -> int:
        """Counts the bytes at the end of the held text that begin a stop string."""
        longest = min(len(text) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(text[:size])), 0)

    def _give(self, size: int) -> str:
        given, self._held = self._held[:size], self._held[size:]
        return self._decoder.decode(given)


__all__ = ["TextStream"]
