"""Token ids to text while they are being produced."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

LONGEST_UNFINISHED_CHARACTER = 3  # bytes of a UTF-8 character that still lacks one


class Detokenizer:
    """The text of one output, piece by piece, in time proportional to the new tokens.

    A character split over tokens appears with its last byte; U+FFFD stands only for bytes that are invalid whatever
    follows. All pieces joined are `decode(prompt + output)` less its first `len(decode(prompt))` characters: the output
    continues the prompt, so a SentencePiece output "▁world" reads " world" after a prompt with text and "world" after
    none. A character that the prompt's last tokens began belongs to the output, which completes it or has its U+FFFD.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        """Raises ValueError for a prompt id outside the vocabulary, as far as the prompt's end is looked at."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(prompt_ids):
            tail = self._bytes([token]) + tail
            if len(tail) >= LONGEST_UNFINISHED_CHARACTER:
                break
        # Cut at the wrong place it decodes to rubbish, which is thrown away; what it leaves pending is right.
        self._decoder.decode(tail)
        self._strips_space = tokenizer.strips_leading_space and not tail

    def add(self, ids: Sequence[int]) -> str:
        """Text that these tokens make certain, "" if none. Raises ValueError for ids outside the vocabulary."""
        return self._continue(self._decoder.decode(self._bytes(ids)))

    def finish(self) -> str:
        """The rest: U+FFFD if the output ends inside a character, else ""."""
        return self._continue(self._decoder.decode(b"", final=True))

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return self._tokenizer.ids_to_bytes(ids, skip_special_tokens=self._skip_special_tokens)

    def _continue(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
