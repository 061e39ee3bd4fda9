"""The one array that goes up to the device for a step: how the host packs it and how the step unpacks it."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .bucket import Bucket
from .sampling_params import SamplingParams
from .sequence import Sequence

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = ("slot", "position", "top_k", "has_bias", "seed_high", "seed_low")
FLAGS = ("random", "filters", "penalties", "bias", "logprobs")


class Rows(NamedTuple):
    """What the sampler is told of each row; all [R].

    `position` is the sampled token's index in its sequence. Rows that sample nothing have slot == max_num_seqs.
    """

    slot: jax.Array
    position: jax.Array
    top_k: jax.Array
    has_bias: jax.Array
    seed_high: jax.Array
    seed_low: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array


class StepInput(NamedTuple):
    """One unpacked step over B decoding rows, T chunk tokens and C chunks; padding has slot == max_num_seqs.

    Each of these is made of equal shares, one for each partition of the engine.
    page_updates [U 3]: (slot, index in the page table, page). decode_slot, decode_position [B]. token_ids, token_slot,
    token_position, token_counts [T]: `token_counts` is 1 where a chunk's token was generated rather than prompted.
    chunk_slot, chunk_start (first row in its partition's share of T), chunk_length, chunk_kv_len, chunk_is_first [C].
    flags: see FLAGS.
    """

    flags: jax.Array
    page_updates: jax.Array
    decode_slot: jax.Array
    decode_position: jax.Array
    token_ids: jax.Array
    token_slot: jax.Array
    token_position: jax.Array
    token_counts: jax.Array
    chunk_slot: jax.Array
    chunk_start: jax.Array
    chunk_length: jax.Array
    chunk_kv_len: jax.Array
    chunk_is_first: jax.Array
    rows: Rows


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Where each field lies in the packed int32 array of a bucket."""

    bucket: Bucket
    page_size: int
    num_slots: int

    @functools.cached_property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each part, in order."""
        b, t, c, r = self.bucket.decodes, self.bucket.chunk_tokens, self.bucket.chunks, self.bucket.rows
        # A decoding row enters at most one new page; a chunk's tokens lie in at most length/page_size + 2.
        updates = b + t // self.page_size + 2 * c
        return {
            "flags": (len(FLAGS),),
            "page_updates": (updates, 3),
            "decode_slot": (b,),
            "decode_position": (b,),
            "token_ids": (t,),
            "token_slot": (t,),
            "token_position": (t,),
            "token_counts": (t,),
            "chunk_slot": (c,),
            "chunk_start": (c,),
            "chunk_length": (c,),
            "chunk_kv_len": (c,),
            "chunk_is_first": (c,),
            "row_ints": (len(INTS), r),
            "row_floats": (len(FLOATS), r),
        }

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        sizes = [int(np.prod(shape)) for shape in self.fields.values()]
        ends = np.cumsum(sizes).tolist()
        return {name: slice(end - size, end) for name, end, size in zip(self.fields, ends, sizes, strict=True)}

    @property
    def size(self) -> int:
        return max(part.stop for part in self.slices.values())

    @functools.cached_property
    def empty(self) -> np.ndarray:
        """A step of nobody: what `pack.lay_out` writes into."""
        packed = np.zeros(self.size, np.int32)
        views = self.views(packed)
        for name in ("decode_slot", "token_slot", "chunk_slot"):
            views[name][:] = self.num_slots
        views["page_updates"][:, 0] = self.num_slots
        views["row_ints"][INTS.index("slot")] = self.num_slots
        return packed

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        return {name: packed[self.slices[name]].reshape(shape) for name, shape in self.fields.items()}

    def unpack(self, packed: jax.Array) -> StepInput:
        """Inside the jitted step: slices and bitcasts alone."""
        parts = {name: packed[self.slices[name]].reshape(shape) for name, shape in self.fields.items()}
        ints = dict(zip(INTS, parts.pop("row_ints"), strict=True))
        floats = dict(zip(FLOATS, jax.lax.bitcast_convert_type(parts.pop("row_floats"), jnp.float32), strict=True))
        return StepInput(**parts, rows=Rows(**ints, **floats))


def needs_full(params: SamplingParams) -> bool:
    """Whether a sequence needs the sampler's slow half."""
    return (
        _has_filters(params)
        or _has_penalties(params)
        or bool(params.logit_bias)
        or params.min_tokens > 0
        or params.logprobs is not None
    )


def _has_filters(params: SamplingParams) -> bool:
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _has_bias(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or params.min_tokens > 0


def row_constants(seq: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What never changes of a sequence's row: INTS (slot and position still 0), FLOATS and FLAGS, as int32 bits."""
    p = seq.params
    ints = [0, 0, max(p.top_k, 0), _has_bias(p), seq.seed >> 32 & 0xFFFFFFFF, seq.seed & 0xFFFFFFFF]
    floats = np.array([getattr(p, name) for name in FLOATS], np.float32)
    floats[FLOATS.index("temperature")] *= not p.is_greedy
    flags = [not p.is_greedy, _has_filters(p), _has_penalties(p), _has_bias(p), p.logprobs is not None]
    return np.array(ints, np.uint32).view(np.int32), floats.view(np.int32), np.array(flags, np.int32)
