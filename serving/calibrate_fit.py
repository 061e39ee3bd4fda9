"""From times of steps to a profile: what a layer and what a step cost, told apart by steps that differ in one thing.

The difference between two depths of a model is layers; what the layers of two widths differ in is their products, and
what they have in common is everything else; longer sequences add attention alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from paddock.model import LlamaConfig
from paddock.sharding import MeshConfig
from paddock.sharding.accelerators import Accelerator
from paddock.sharding.memory import PlannedLayout

from .roofline import StepTimes
from .speed_profile import Curve, SpeedProfile
from .weights import Weights

# ("decode", rows, context) or ("chunk", tokens, start) -> seconds
Times = Mapping[tuple[str, int, int], float]
# Attention that adds less to a step cannot be told from noise, and counts as so much.
LEAST_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Depths:
    """One width of a model, measured with two numbers of layers."""

    shallow: LlamaConfig
    deep: LlamaConfig
    shallow_times: Times
    deep_times: Times

    def layer(self, point: tuple[str, int, int]) -> float:
        return (self.deep_times[point] - self.shallow_times[point]) / (self.deep.num_layers - self.shallow.num_layers)

    def once(self, point: tuple[str, int, int]) -> float:
        """What a step takes beside its layers."""
        return self.shallow_times[point] - self.shallow.num_layers * self.layer(point)


def fit_device(
    name: str, dtype: str, narrow: Depths, wide: Depths, base: int, long: Mapping[int, int], starts: Mapping[int, int]
) -> SpeedProfile:
    """The profile of a device alone. Both widths have steps at `base` tokens a sequence, and chunks from 0; the narrow
    deep model has steps at `long[rows]` tokens too, and chunks at `starts[tokens]`.

    Raises ValueError where steps do not take longer for being wider: the times are noise.
    """
    narrow_weights, wide_weights = (per_layer(depths.deep, dtype) for depths in (narrow, wide))
    decode_attention, weights, head, step, layer = {}, {}, {}, {}, {}
    for rows, context in long.items():
        point = ("decode", rows, base)
        grown = _grown(narrow, ("decode", rows, context), point)
        decode_attention[rows] = rows * (context - base) * kv_bytes(narrow.deep, dtype) / grown
        attention = [rows * base * kv_bytes(each.deep, dtype) / decode_attention[rows] for each in (narrow, wide)]
        slope, layer[rows] = line(
            (narrow_weights.layers, narrow.layer(point) - attention[0]),
            (wide_weights.layers, wide.layer(point) - attention[1]),
        )
        weights[rows] = 1 / slope
        slope, step[rows] = line((narrow_weights.head, narrow.once(point)), (wide_weights.head, wide.once(point)))
        head[rows] = 1 / slope
    prefill_attention, matrix = {}, {}
    for tokens, start in starts.items():
        point = ("chunk", tokens, 0)
        grown = _grown(narrow, ("chunk", tokens, start), point)
        prefill_attention[tokens] = tokens * start * pair_operations(narrow.deep) / grown
        pairs = tokens * (tokens + 1) / 2
        attention = [pairs * pair_operations(each.deep) / prefill_attention[tokens] for each in (narrow, wide)]
        slope, layer[tokens] = line(
            (2 * tokens * narrow_weights.layer_products, narrow.layer(point) - attention[0]),
            (2 * tokens * wide_weights.layer_products, wide.layer(point) - attention[1]),
        )
        matrix[tokens] = 1 / slope
    return SpeedProfile(
        accelerator=name,
        weights=curve(weights),
        matrix={dtype: curve(matrix)},
        decode_attention=curve(decode_attention),
        prefill_attention=curve(prefill_attention),
        layer=curve(layer, extends=True),
        head=curve(head),
        step=curve(step),
    )


def fit_tensor(profile: SpeedProfile, dtype: str, devices: int, depths: Depths) -> SpeedProfile:
    """`profile` with what its steps take longer than it predicts when `devices` split each layer between them."""
    reduce, vocab = {}, {}
    still = dataclasses.replace(
        profile, host=None, all_reduce={devices: Curve((1,), (0.0,))}, vocab={devices: Curve((1,), (0.0,))}
    )
    known = {(each.num_layers, point): _predicted(still, dtype, each, f"tensor={devices}", point)
             for each in (depths.shallow, depths.deep) for point in depths.deep_times}  # fmt: skip
    for point in depths.deep_times:
        shallow, deep = (known[each.num_layers, point] for each in (depths.shallow, depths.deep))
        layers = depths.deep.num_layers - depths.shallow.num_layers
        more = depths.layer(point) - (deep - shallow) / layers
        num_bytes = point[1] * depths.deep.embed_dim * itemsize(depths.deep, dtype)
        reduce[num_bytes] = max(more / 2, 0.0)
        if point[0] == "decode":
            rest = depths.shallow_times[point] - shallow - depths.shallow.num_layers * 2 * reduce[num_bytes]
            vocab[point[1]] = max(rest, 0.0)
    return dataclasses.replace(
        profile,
        all_reduce={**profile.all_reduce, devices: curve(reduce, extends=True)},
        vocab={**profile.vocab, devices: curve(vocab, extends=True)},
    )


def fit_stages(profile: SpeedProfile, dtype: str, devices: int, model: LlamaConfig, ticks: Times) -> SpeedProfile:
    """`profile` with what a tick takes longer than it predicts over `devices` stages."""
    still = dataclasses.replace(profile, host=None, hop={devices: Curve((1,), (0.0,))})
    hop = {}
    for point, seconds in ticks.items():
        more = seconds - _predicted(still, dtype, model, f"pipe={devices}", point)
        hop[point[1] * model.embed_dim * itemsize(model, dtype)] = max(more, 0.0)
    return dataclasses.replace(profile, hop={**profile.hop, devices: curve(hop, extends=True)})


def step_times(profile: SpeedProfile, dtype: str, model: LlamaConfig, mesh: str) -> StepTimes:
    """Predictions by `profile` for devices of one island, of which no datasheet says anything."""
    parsed = MeshConfig.parse(mesh)
    layout = PlannedLayout.of(parsed)
    card = Accelerator(profile.accelerator, 0, 1.0, math.inf, {}, "", math.inf, parsed.num_devices, "measured")
    weights = Weights.of(model, layout, dtype, None)
    return StepTimes(model, layout, parsed, weights, dtype, dtype, card, profile)


def per_layer(model: LlamaConfig, dtype: str) -> Weights:
    return Weights.of(dataclasses.replace(model, num_layers=1), PlannedLayout.of(""), dtype, None)


def kv_bytes(model: LlamaConfig, dtype: str) -> float:
    """Keys and values of a token in one layer."""
    return 2 * model.num_kv_heads * model.head_dim * itemsize(model, dtype)


def pair_operations(model: LlamaConfig) -> float:
    """Of a layer for one token and one that it sees: scores and weighted values."""
    return 4 * model.num_heads * model.head_dim


def itemsize(model: LlamaConfig, dtype: str) -> int:
    import jax.numpy as jnp

    return jnp.dtype(dtype).itemsize


def line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Slope and height at 0 of the line through two points, neither below 0: through the origin, when the line would
    meet it below. Raises ValueError where the second, further right, is not higher."""
    (x1, y1), (x2, y2) = first, second
    slope = (y2 - y1) / (x2 - x1)
    if slope <= 0:
        raise ValueError(f"a wider model's layers take {y2:.3g} s, a narrower one's {y1:.3g} s: is the machine busy?")
    height = y1 - slope * x1
    if height >= 0:
        return slope, height
    return (x1 * y1 + x2 * y2) / (x1 * x1 + x2 * x2), 0.0


def curve(points: Mapping[int, float], *, extends: bool = False) -> Curve:
    return Curve(tuple(sorted(points)), tuple(points[x] for x in sorted(points)), extends)


def _grown(depths: Depths, long: tuple[str, int, int], short: tuple[str, int, int]) -> float:
    """By how much a layer grows for what it attends to."""
    more = depths.deep_times[long] - depths.deep_times[short]
    return max(more, LEAST_SHARE * depths.deep_times[short]) / depths.deep.num_layers


def _predicted(profile: SpeedProfile, dtype: str, model: LlamaConfig, mesh: str, point: tuple[str, int, int]) -> float:
    """Seconds of a step, or of a tick."""
    times = step_times(profile, dtype, model, mesh)
    kind, count, context = point
    if kind == "chunk":
        return times.chunk(count, count * (count + 1) / 2 + count * context).total
    return times.tick(count, context).total
