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

    With more shards than kv heads, each kv head is repeated (`kv_repeat` times) so that every shard holds the ones that
    its own query heads use and no other; the vocabulary is padded to a multiple of its shards. Attention that is split
    by sequences has fewer shards of heads than the projections, and its cache fewer repeated heads (`cache_repeat`).
    """

    config: LlamaConfig
    kv_repeat: int = 1
    cache_repeat: int = 1
    vocab_multiple: int = 1

    @classmethod
    def of(cls, config: LlamaConfig, layout: Layout | None = None) -> Dims:
        """Raises ValueError when the query heads do not divide over the layout's shards."""
        if layout is None:
            return cls(config)
        rules = layout.rules
        repeat = _repeat(config, layout, rules.q_heads, rules.kv_heads)
        if config.num_heads % (config.num_kv_heads * repeat):
            shards = layout.num_shards("q_heads")
            works = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0 and _fits(config, n)]
            raise ValueError(
                f"q_heads of size {config.num_heads} (kv_heads {config.num_kv_heads}) does not divide over {shards} "
                f"shards; numbers of shards that do: {', '.join(map(str, works))}"
            )
        in_attention = [
            tuple(axis for axis in axes if axis not in rules.batch) for axes in (rules.q_heads, rules.kv_heads)
        ]
        return cls(config, repeat, _repeat(config, layout, *in_attention), layout.num_shards("vocab"))

    @property
    def kv_heads(self) -> int:
        """Kv heads of the projections, repeated ones included."""
        return self.config.num_kv_heads * self.kv_repeat

    @property
    def group(self) -> int:
        """Query heads per (repeated) kv head."""
        return self.config.num_heads // self.kv_heads

    @property
    def cache_heads(self) -> int:
        """Kv heads of the page pools."""
        return self.config.num_kv_heads * self.cache_repeat

    @property
    def vocab(self) -> int:
        return -(-self.config.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _repeat(config: LlamaConfig, layout: Layout, q_axes: tuple[str, ...], kv_axes: tuple[str, ...]) -> int:
    """How often each kv head is held: once for each split of its query heads, or for each shard beyond their number."""
    distinct = layout.size_of(kv_axes)
    return layout.size_of(q_axes) // distinct * (distinct // math.gcd(config.num_kv_heads, distinct))


def _fits(config: LlamaConfig, shards: int) -> bool:
    repeat = shards // math.gcd(config.num_kv_heads, shards)
    return config.num_heads % (config.num_kv_heads * repeat) == 0


def param_specs(config: LlamaConfig, layout: Layout | None = None, dtype: Any = None) -> dict[str, ArraySpec]:
    """Every array of the model by its flat name ("embed", "layers.0.qkv", ...).

    K and V are the repeated kv heads and the padded vocabulary of `Dims.of(config, layout)`; K is named by `q_heads`,
    since the query heads say where it is split. `dtype` defaults to the checkpoint's. Every layer stands alone here,
    whatever its pipeline stage: see `stages`.
    """
    dims, dtype = Dims.of(config, layout), jnp.dtype(dtype or config.dtype)
    D, F, h, K, G, V = config.embed_dim, config.mlp_dim, config.head_dim, dims.kv_heads, dims.group, dims.vocab
    layer: dict[str, tuple[tuple[int, ...], LogicalAxes]] = {
        "attention_norm": ((D,), ("embed",)),
        "qkv": ((D, K, G + 2, h), ("embed", "q_heads", None, "head_dim")),
        "out": ((K, G, h, D), ("q_heads", None, "head_dim", "embed")),
        "mlp_norm": ((D,), ("embed",)),
        "gate_up": ((D, F, 2), ("embed", "mlp", None)),
        "down": ((F, D), ("mlp", "embed")),
    }
    if config.attention_bias:
        layer["qkv_bias"] = ((K, G + 2, h), ("q_heads", None, "head_dim"))
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
