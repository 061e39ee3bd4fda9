"""A model folder's tokenizer: text to token ids and back, whichever of three file formats the folder holds."""

from __future__ import annotations

import abc
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .tokenizer_config import TokenizerConfig

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, else `tokenizer.model` (SentencePiece, or Llama 3's tiktoken).

    Raises ValueError naming the folder if it holds neither, and naming the file if one cannot be read.
    """
    folder = Path(folder)
    config = TokenizerConfig.read(folder)
    if (path := folder / "tokenizer.json").is_file():
        # Each format brings its own library; only the one in use is worth its import time.
        from .tokenizer_json import JsonTokenizer

        return JsonTokenizer(path, config)
    if (path := folder / "tokenizer.model").is_file():
        data = path.read_bytes()
        if TIKTOKEN_LINE.match(data):
            from .tokenizer_tiktoken import TiktokenTokenizer

            return TiktokenTokenizer(path, config, data)
        from .tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path, config, data)
    raise ValueError(f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model")


class Tokenizer(abc.ABC):
    """Text to token ids and back; safe to share between threads.

    Text is always the UTF-8 decoding of the tokens' bytes, joined. So every format has one meaning for a character
    split over tokens (it appears with its last byte) and for invalid bytes (U+FFFD, as `bytes.decode` places it), and
    decoding token by token (`Detokenizer`) gives what decoding at once gives. No clean-up of spaces before punctuation.

    vocab_size: one more than the largest id. An id inside that names no token decodes to nothing.
    special_ids: the ids that `skip_special_tokens` leaves out: control, unknown and special added tokens.
    special_tokens: "bos_token", "eos_token", ... to text, as chat templates want them.
    strips_leading_space: the tokenizer puts a space before a text; decoding takes that one away again.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_ids: frozenset[int]
    special_tokens: dict[str, Any]
    strips_leading_space: bool

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        add_special_tokens: put BOS in front where the model's files say so (`add_bos_token`, else the post-processor
            of tokenizer.json, else yes for Llama's own formats), unless the text starts with it already, as a
            rendered chat template may. EOS behind likewise, which hardly any model asks for.
        parse_special: read special tokens spelled out in the text ("<s>") as those tokens, as Hugging Face and vLLM
            do; False takes them literally, for text that must not be able to forge them.
        Raises ValueError if the text is not a string or holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at character {error.start}") from None
        ids = self._encode(text, parse_special)
        if not add_special_tokens:
            return ids
        if self._prefix and ids[:1] != self._prefix[:1]:
            ids = self._prefix + ids
        if self._suffix and ids[-1:] != self._suffix[-1:]:
            ids = ids + self._suffix
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without the space that the tokenizer put in front. Raises ValueError for unknown ids."""
        text = self.ids_to_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def ids_to_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """The tokens' bytes, joined; a leading space stays. Raises ValueError for ids outside the vocabulary."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.id_to_bytes(token) for token in ids if token not in skipped)

    def id_to_bytes(self, token: int) -> bytes:
        """What one token adds to the text, perhaps a part of a character; a special token gives its own spelling."""
        found = self._bytes_of.get(token)
        if found is None:
            token = self._checked(token)
            found = self._bytes_of[token] = self._id_to_bytes(token)
        return found

    def id_to_piece(self, token: int) -> str:
        """The vocabulary's own spelling of one token ("▁world", "Ġworld"). Raises ValueError for unknown ids."""
        return self._id_to_piece(self._checked(token))

    def _finish_setup(
        self,
        config: TokenizerConfig,
        *,
        vocab_size: int,
        special_ids: Iterable[int],
        strips_leading_space: bool,
        defaults: dict[str, str],
        prefix: list[int] | None = None,
        suffix: Sequence[int] = (),
    ) -> None:
        """Set the attributes. `defaults`: names of special tokens that the config may override; `prefix` and `suffix`:
        what encoding adds if the config is silent (None: BOS)."""
        self._bytes_of: dict[int, bytes] = {}
        self.vocab_size = vocab_size
        self.strips_leading_space = strips_leading_space
        self.special_tokens = {**defaults, **config.named_tokens}
        if config.extra_tokens:
            self.special_tokens["additional_special_tokens"] = list(config.extra_tokens)
        self.bos_token_id = self._named_id(config, "bos_token")
        self.eos_token_id = self._named_id(config, "eos_token")
        listed = (self._find(text) for text in config.special_texts)
        self.special_ids = frozenset(special_ids).union(token for token in listed if token is not None)

        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        eos = [] if self.eos_token_id is None else [self.eos_token_id]
        self._prefix = config.choose("add_bos_token", bos, bos if prefix is None else prefix)
        self._suffix = config.choose("add_eos_token", eos, list(suffix))

    def _named_id(self, config: TokenizerConfig, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return None
        token = self._find(text)
        if token is None:
            raise ValueError(f"{config.folder}: {name} {text!r} is not in the vocabulary")
        return token

    def _checked(self, token: int) -> int:
        token = operator.index(token)
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return token

    @abc.abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of the text and nothing added."""

    @abc.abstractmethod
    def _find(self, piece: str) -> int | None:
        """The id of a piece spelled exactly so."""

    @abc.abstractmethod
    def _id_to_piece(self, token: int) -> str: ...

    @abc.abstractmethod
    def _id_to_bytes(self, token: int) -> bytes: ...
