"""`tokenizer.json`: the format of Hugging Face's tokenizers library."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from .tokenizer import Tokenizer
from .tokenizer_config import TokenizerConfig

SPACE_MARK = "▁"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# transformers gives these classes a BOS whatever the file's post-processor does.
BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by Hugging Face's tokenizers library. Its decoder must be one that Llama models use."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        # Limits of its training time, of no meaning for prompts.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._add_tokens(path, config)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._rules = _DecoderRules(path, self._backend.decoder)
        prefix, suffix = self._around()
        defaults = {"bos_token": self._id_to_piece(prefix[0])} if prefix else {}
        always_bos = str(config.values.get("tokenizer_class")).startswith(BOS_CLASSES)
        self._finish_setup(
            config,
            vocab_size=1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1),
            special_ids=[token for token, entry in added.items() if entry.special],
            strips_leading_space=self._rules.strips_leading_space,
            defaults=defaults,
            prefix=None if always_bos else prefix,
            suffix=suffix,
        )

    def _add_tokens(self, path: Path, config: TokenizerConfig) -> None:
        known = {entry.content: entry for entry in self._backend.get_added_tokens_decoder().values()}
        for token, added in sorted(config.added.items()):
            if added.content not in known:
                flags = {"lstrip": added.lstrip, "rstrip": added.rstrip, "single_word": added.single_word}
                entry = tokenizers.AddedToken(added.content, special=added.special, normalized=False, **flags)
                self._backend.add_tokens([entry])
            if (found := self._find(added.content)) != token:
                raise ValueError(f"{path}: added token {added.content!r} has id {found}, the settings say {token}")
        named = [text for text in config.special_texts if self._find(text) is not None]
        self._backend.add_special_tokens(sorted(text for text in named if text not in known or not known[text].special))

    def _around(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        # A second one, because the switch is state of the tokenizer and threads share it.
        literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        backend = self._backend if parse_special else self._literal
        return backend.encode(text, add_special_tokens=False).ids

    def _find(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def _id_to_piece(self, token: int) -> str:
        return self._backend.id_to_token(token) or ""

    def _id_to_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        return self._rules.to_bytes(self._id_to_piece(token))


class _DecoderRules:
    """How the decoder of a `tokenizer.json` turns a piece into bytes. Raises ValueError for a kind Llama never has."""

    def __init__(self, path: Path, decoder: Any) -> None:
        self.byte_level = self.byte_pieces = self.space_mark = self.strips_leading_space = False
        spec = {} if decoder is None else _state(decoder)
        steps = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    self.byte_level = True
                case {"type": "ByteFallback"}:
                    self.byte_pieces = True
                case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                    self.space_mark = True
                case {"type": "Metaspace", "replacement": "▁"}:
                    self.space_mark = True
                    self.strips_leading_space = step.get("prepend_scheme") != "never"
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    self.strips_leading_space = True
                case {"type": "Fuse"}:
                    pass
                case _:
                    raise ValueError(f"{path}: decoder {step or None} is not supported")

    def to_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in piece)
            except KeyError:
                return piece.encode()
        if self.byte_pieces and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return (piece.replace(SPACE_MARK, " ") if self.space_mark else piece).encode()


def _state(decoder: Any) -> dict[str, Any]:
    # The library's only machine-readable view of a decoder is the one it pickles: JSON text.
    return json.loads(decoder.__getstate__())


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest as the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHARACTER = _byte_level_alphabet()
