"""SentencePiece `tokenizer.model`: Llama 1 and 2."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from .tokenizer import Tokenizer
from .tokenizer_config import AddedToken, AddedTokens, TokenizerConfig

SPACE_MARK = "▁"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model` (Llama 1 and 2), with the tokens that later training added beside it.

    Each stretch of text between special tokens gets the space that SentencePiece puts before a text, as in Llama 2's
    own chat format, where each turn was encoded by itself; with `"legacy": false` in the settings only a text's start
    does, and with `"add_prefix_space": false` none.
    """

    # One more normalizer_spec {add_dummy_prefix: false}: a protobuf reader merges it into the model's own.
    NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, path: Path, config: TokenizerConfig, data: bytes) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.load_from_serialized_proto(data)
            self._bare = sentencepiece.SentencePieceProcessor()
            self._bare.load_from_serialized_proto(data + self.NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{path} is neither a SentencePiece model nor a tiktoken file: {error}") from error
        probe = self._model.encode("a", out_type=str)
        if probe[-1].endswith(SPACE_MARK):
            raise ValueError(f"{path}: SentencePiece models that put spaces behind words are not supported")
        prefixed = probe[0].startswith(SPACE_MARK) and config.values.get("add_prefix_space") is not False
        self._prefixes_start = prefixed
        self._prefixes_every = prefixed and config.values.get("legacy") is not False

        size = self._model.get_piece_size()
        controls = [i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self._added = {i: AddedToken(self._model.id_to_piece(i), special=True) for i in controls} | config.added
        self._splitter = AddedTokens(self._added)
        self._id_of_added = {added.content: token for token, added in self._added.items()}
        model = self._model
        named = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self._finish_setup(
            config,
            vocab_size=max(size, 1 + max(self._added, default=-1)),
            special_ids=[token for token, added in self._added.items() if added.special],
            strips_leading_space=prefixed,
            defaults={name: model.id_to_piece(token) for name, token in named.items() if token >= 0},
        )

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._splitter.split(text, parse_special)):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefixed = self._prefixes_every or (i == 0 and self._prefixes_start)
                ids += (self._model if prefixed else self._bare).encode(part)
        return ids

    def _find(self, piece: str) -> int | None:
        if piece in self._id_of_added:
            return self._id_of_added[piece]
        token = self._model.piece_to_id(piece)  # an unknown piece gives the id of <unk>
        return token if self._model.id_to_piece(token) == piece else None

    def _id_to_piece(self, token: int) -> str:
        if token in self._added:
            return self._added[token].content
        return self._model.id_to_piece(token) if token < self._model.get_piece_size() else ""

    def _id_to_bytes(self, token: int) -> bytes:
        piece = self._id_to_piece(token)
        if token in self._added:
            return piece.encode()
        if token < self._model.get_piece_size() and self._model.is_byte(token):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_MARK, " ").encode()
