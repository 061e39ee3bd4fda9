"""Hugging Face's tensors and ours: one table, used for reading and for writing."""

from __future__ import annotations

import dataclasses
import re

from paddock.model import Dims

# Buffers that old versions of transformers wrote; they are computed from the config.
_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

Slices = tuple[slice, ...]

# Checkpoints keep matrices as [out, in], ours are [in, out]: our axes, as axes of the arrays that `param_parts` makes.
_ORDER = {"qkv": (3, 0, 1, 2), "out": (1, 2, 3, 0), "gate_up": (2, 0, 1), "down": (1, 0)}


def order_of(name: str, rank: int) -> tuple[int, ...]:
    """The transposition that turns array `name`, as its parts make it, into ours."""
    return _ORDER.get(name.rpartition(".")[2], tuple(range(rank)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A Hugging Face tensor and the block that it fills of one of our arrays, before `order_of`.

    The tensor's `shape`, reshaped to `view` (no copy: neither is transposed yet) and with each row of axis 0
    taken `repeat` times, is the block that begins at `start` on `axis` and at 0 on the other axes. What no part of an
    array fills (the padding of the vocabulary) is zero.
    """

    tensor: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    axis: int = 0
    start: int = 0
    repeat: int = 1

    @property
    def block(self) -> Slices:
        """The block as slices of our array."""
        ends = [self.view[0] * self.repeat, *self.view[1:]]
        begins = [self.start if axis == self.axis else 0 for axis in range(len(self.view))]
        return tuple(slice(begin, begin + end) for begin, end in zip(begins, ends, strict=True))

    def overlap(self, wanted: Slices) -> tuple[Slices, Slices] | None:
        """Where the part of our array in `wanted` meets this block, as (slices of `wanted`, slices of the block)."""
        inside, outside = [], []
        for ask, have in zip(wanted, self.block, strict=True):
            begin, end = max(ask.start, have.start), min(ask.stop, have.stop)
            if begin >= end:
                return None
            inside.append(slice(begin - ask.start, end - ask.start))
            outside.append(slice(begin - have.start, end - have.start))
        return tuple(inside), tuple(outside)


def param_parts(dims: Dims) -> dict[str, tuple[Part, ...]]:
    """For every array of `param_specs`, in its order: the tensors that it is made of, [out, in] as they are."""
    config = dims.config
    D, F, h, H, V = config.embed_dim, config.mlp_dim, config.head_dim, config.num_heads, config.vocab_size
    K, G = dims.kv_heads, dims.group
    key_shape = (config.num_kv_heads, 1, h)  # before repeating

    def qkv(kind: str, tail: tuple[int, ...]) -> tuple[Part, ...]:
        keys = (config.num_kv_heads * h, *tail)
        return (
            Part(f"self_attn.q_proj.{kind}", (H * h, *tail), (K, G, h, *tail), axis=1),
            Part(f"self_attn.k_proj.{kind}", keys, (*key_shape, *tail), axis=1, start=G, repeat=dims.kv_repeat),
            Part(f"self_attn.v_proj.{kind}", keys, (*key_shape, *tail), axis=1, start=G + 1, repeat=dims.kv_repeat),
        )

    def gate_up(kind: str, tail: tuple[int, ...]) -> tuple[Part, ...]:
        both = enumerate(("gate", "up"))
        return tuple(Part(f"mlp.{name}_proj.{kind}", (F, *tail), (F, 1, *tail), axis=1, start=i) for i, name in both)

    layer: dict[str, tuple[Part, ...]] = {
        "attention_norm": (Part("input_layernorm.weight", (D,), (D,)),),
        "qkv": qkv("weight", (D,)),
        "out": (Part("self_attn.o_proj.weight", (D, H * h), (D, K, G, h)),),
        "mlp_norm": (Part("post_attention_layernorm.weight", (D,), (D,)),),
        "gate_up": gate_up("weight", (D,)),
        "down": (Part("mlp.down_proj.weight", (D, F), (D, F)),),
    }
    if config.attention_bias:
        layer |= {"qkv_bias": qkv("bias", ()), "out_bias": (Part("self_attn.o_proj.bias", (D,), (D,)),)}
    if config.mlp_bias:
        layer |= {"gate_up_bias": gate_up("bias", ()), "down_bias": (Part("mlp.down_proj.bias", (D,), (D,)),)}

    table: dict[str, tuple[Part, ...]] = {
        "embed": (Part("model.embed_tokens.weight", (V, D), (V, D)),),
        "norm": (Part("model.norm.weight", (D,), (D,)),),
    }
    if not config.tie_embeddings:
        table["head"] = (Part("lm_head.weight", (V, D), (V, D)),)
    for index in range(config.num_layers):
        for name, parts in layer.items():
            table[f"layers.{index}.{name}"] = tuple(
                dataclasses.replace(part, tensor=f"model.layers.{index}.{part.tensor}") for part in parts
            )
    return table


def is_ignored(tensor: str, *, tie_embeddings: bool) -> bool:
    """Whether a file may hold `tensor` although the model does not use it: RoPE buffers, the head of a tied model."""
    return bool(_BUFFER.fullmatch(tensor)) or (tie_embeddings and tensor == "lm_head.weight")
