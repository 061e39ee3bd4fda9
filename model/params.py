"""The arrays of a Llama: names, shapes and logical axes, as one table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from paddock.sharding import ArraySpec, Layout, LogicalAxes

from .config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes that depend on the layout as well as on the checkpoint.

    With more shards than kv heads, each kv head is repeated so that every shard holds the ones that its own query
    heads use and no other; the vocabulary is padded to a multiple of its shards.
    """

    config: LlamaConfig
    kv_repeat: int = 1
    vocab_multiple: int = 1

    @classmethod
    def of(cls, config: LlamaConfig, layout: Layout | None = None) -> Dims:
        """Raises ValueError when the query heads do not divide over the layout's shards."""
        if layout is None:
            return cls(config)
        if layout.rules.q_heads != layout.rules.kv_heads:
            raise ValueError(
                f"rules: q_heads={'+'.join(layout.rules.q_heads)} and kv_heads={'+'.join(layout.rules.kv_heads)} "
                "differ; a kv head is kept with its query heads, so both must name the same mesh axes"
            )
        shards = layout.num_shards("kv_heads")
        repeat = shards // math.gcd(config.num_kv_heads, shards)
        if config.num_heads % (config.num_kv_heads * repeat):
            works = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0 and _fits(config, n)]
            raise ValueError(
                f"q_heads of size {config.num_heads} (kv_heads {config.num_kv_heads}) does not divide over {shards} "
                f"shards; numbers of shards that do: {', '.join(map(str, works))}"
            )
        return cls(config, repeat, layout.num_shards("vocab"))

    @property
    def kv_heads(self) -> int:
        return self.config.num_kv_heads * self.kv_repeat

    @property
    def group(self) -> int:
        """Query heads per (repeated) kv head."""
        return self.config.num_heads // self.kv_heads

    @property
    def vocab(self) -> int:
        return -(-self.config.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _fits(config: LlamaConfig, shards: int) -> bool:
    repeat = shards // math.gcd(config.num_kv_heads, shards)
    return config.num_heads % (config.num_kv_heads * repeat) == 0


def param_specs(config: LlamaConfig, layout: Layout | None = None, dtype: Any = None) -> dict[str, ArraySpec]:
    """Every array of the model by its flat name ("embed", "layers.0.qkv", ...).

    K and V are the repeated kv heads and the padded vocabulary of `Dims.of(config, layout)`; `dtype` defaults to the
    checkpoint's.
    """
    dims, dtype = Dims.of(config, layout), jnp.dtype(dtype or config.dtype)
    D, F, h, K, G, V = config.embed_dim, config.mlp_dim, config.head_dim, dims.kv_heads, dims.group, dims.vocab
    layer: dict[str, tuple[tuple[int, ...], LogicalAxes]] = {
        "attention_norm": ((D,), ("embed",)),
        "qkv": ((D, K, G + 2, h), ("embed", "kv_heads", None, "head_dim")),
        "out": ((K, G, h, D), ("kv_heads", None, "head_dim", "embed")),
        "mlp_norm": ((D,), ("embed",)),
        "gate_up": ((D, F, 2), ("embed", "mlp", None)),
        "down": ((F, D), ("mlp", "embed")),
    }
    if config.attention_bias:
        layer["qkv_bias"] = ((K, G + 2, h), ("kv_heads", None, "head_dim"))
        layer["out_bias"] = ((D,), ("embed",))
    if config.mlp_bias:
        layer["gate_up_bias"] = ((F, 2), ("mlp", None))
        layer["down_bias"] = ((D,), ("embed",))
    table: dict[str, tuple[tuple[int, ...], LogicalAxes]] = {
        "embed": ((V, D), ("vocab", "embed")),
        "norm": ((D,), ("embed",)),
    }
    if not config.tie_embeddings:
        table["head"] = ((V, D), ("vocab", "embed"))
    for index in range(config.num_layers):
        table |= {f"layers.{index}.{name}": entry for name, entry in layer.items()}
    return {name: ArraySpec(shape, dtype, axes) for name, (shape, axes) in table.items()}
