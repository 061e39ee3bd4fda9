"""tiktoken-format `tokenizer.model`: Llama 3."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import tiktoken

from .tokenizer import Tokenizer
from .tokenizer_config import AddedToken, AddedTokens, TokenizerConfig

# How Llama 3 cuts a text before byte-pair merging (published with its weights).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regular expression overflows its stack on a megabyte of blanks; Llama 3 was tokenized with runs of white
# space, and of anything else, cut at this many characters.
MAX_RUN = 25_000
LONG_RUN = re.compile(rf"\s{{{MAX_RUN}}}(?=\s)|\S{{{MAX_RUN}}}(?=\S)")
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_SPECIAL_COUNT = 256


class TiktokenTokenizer(Tokenizer):
    """Llama 3's `tokenizer.model`: lines of a base64 token and its rank; the special tokens follow the last rank.

    Their names are those of `added_tokens_decoder` in tokenizer_config.json, else Llama 3.1's.
    """

    def __init__(self, path: Path, config: TokenizerConfig, data: bytes) -> None:
        self._tokens = _read_ranks(path, data)
        count = len(self._tokens)
        self._added = config.added or llama3_special_tokens(count)
        if min(self._added) != count:
            raise ValueError(f"{path} ends at rank {count - 1}, but the first added token has id {min(self._added)}")
        self._splitter = AddedTokens(self._added)
        self._id_of_added = {added.content: token for token, added in self._added.items()}
        ranks = {piece: rank for rank, piece in enumerate(self._tokens)}
        self._backend = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        named = {"bos_token": LLAMA3_SPECIAL[0], "eos_token": LLAMA3_SPECIAL[1]}
        self._finish_setup(
            config,
            vocab_size=1 + max(self._added),
            special_ids=[token for token, added in self._added.items() if added.special],
            strips_leading_space=False,
            defaults={name: text for name, text in named.items() if text in self._id_of_added},
        )

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            start = 0
            for run in LONG_RUN.finditer(part):
                ids += self._backend.encode_ordinary(part[start : run.end()])
                start = run.end()
            ids += self._backend.encode_ordinary(part[start:])
        return ids

    def _find(self, piece: str) -> int | None:
        return self._id_of_added.get(piece)

    def _id_to_piece(self, token: int) -> str:
        return self._id_to_bytes(token).decode("utf-8", "replace")

    def _id_to_bytes(self, token: int) -> bytes:
        if token < len(self._tokens):
            return self._tokens[token]
        return self._added[token].content.encode() if token in self._added else b""


def llama3_special_tokens(first: int) -> dict[int, AddedToken]:
    """Llama 3.1's 256 special tokens from id `first` on; those without a purpose are reserved and numbered."""
    tokens: dict[int, AddedToken] = {}
    reserved = 0
    for offset in range(LLAMA3_SPECIAL_COUNT):
        name = LLAMA3_SPECIAL.get(offset)
        if name is None:
            name = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
        tokens[first + offset] = AddedToken(name, special=True)
    return tokens


def _read_ranks(path: Path, data: bytes) -> list[bytes]:
    """The tokens of a tiktoken file in the order of their ranks. Raises ValueError naming file and line."""
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            encoded, rank = line.split()
            if int(rank) != len(tokens):
                raise ValueError(f"rank {int(rank)} follows {len(tokens) - 1}")
            tokens.append(base64.b64decode(encoded, validate=True))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a base64 token and its rank: {error}") from error
    # The library aborts the thread on a byte that it cannot spell.
    if len(missing := {bytes([byte]) for byte in range(256)}.difference(tokens)):
        raise ValueError(f"{path} lacks {len(missing)} of the 256 single bytes: it is damaged or cut short")
    return tokens
