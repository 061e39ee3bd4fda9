"""What a calibration times: models of two depths and two widths, and how many rows and tokens."""

from __future__ import annotations

import dataclasses

from paddock.model import LlamaConfig
from paddock.model.shapes import SHAPES

# ("decode", rows, tokens of each) or ("chunk", tokens, tokens before them)
Point = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Ruler:
    """What is timed: `narrow` and `wide` models, each with two numbers of layers; `rows` that decode after `base`
    tokens each, and again where they hold `tokens` tokens together; chunks of `chunks` tokens, alone and after three
    times as many. `host` is a model of next to no work, so that its steps take what the host takes."""

    narrow: LlamaConfig
    wide: LlamaConfig
    narrow_layers: tuple[int, int]
    wide_layers: tuple[int, int]
    dtype: str
    rows: tuple[int, ...]
    base: int
    tokens: int
    chunks: tuple[int, ...]
    host: LlamaConfig
    host_layers: tuple[int, int]
    copy_bytes: int

    @property
    def context(self) -> int:
        return max(4 * self.chunks[-1], 2 * self.base)

    @property
    def long(self) -> dict[int, int]:
        """Tokens of each sequence, by rows, where they hold many."""
        return {rows: max(2 * self.base, min(self.context, self.tokens // rows)) for rows in self.rows}

    @property
    def starts(self) -> dict[int, int]:
        """What comes before a chunk, by its tokens."""
        return {tokens: 3 * tokens for tokens in self.chunks}

    @property
    def short_points(self) -> list[Point]:
        return [("decode", rows, self.base) for rows in self.rows] + [("chunk", tokens, 0) for tokens in self.chunks]

    @property
    def long_points(self) -> list[Point]:
        return [("decode", *item) for item in self.long.items()] + [("chunk", *item) for item in self.starts.items()]


def _small(embed: int, mlp: int, vocab: int, heads: int = 4, kv_heads: int = 2) -> LlamaConfig:
    return dataclasses.replace(
        SHAPES["llama-3.1-8b"],
        embed_dim=embed,
        mlp_dim=mlp,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=embed // heads,
    )


GPU = Ruler(
    narrow=SHAPES["llama-3.1-8b"],
    wide=SHAPES["llama-3.1-70b"],
    narrow_layers=(2, 8),
    wide_layers=(2, 6),
    dtype="bfloat16",
    rows=(2, 8, 32, 64, 128, 256),
    base=256,
    tokens=2**18,
    chunks=(512, 2048, 4096),
    host=_small(256, 512, 1024, 2, 1),
    host_layers=(4, 24),
    copy_bytes=2**30,
)
CPU = Ruler(
    narrow=_small(64, 128, 256),
    wide=_small(768, 2048, 8192),
    narrow_layers=(1, 2),
    wide_layers=(1, 3),
    dtype="float32",
    rows=(1, 4),
    base=64,
    tokens=2**11,
    chunks=(32, 128),
    host=_small(32, 64, 256),
    host_layers=(1, 2),
    copy_bytes=2**26,
)
