"""What a device holds and multiplies of a model's weights in a layout, counted from described arrays."""

from __future__ import annotations

import dataclasses
import math

from paddock.model import LlamaConfig, Stages, param_specs
from paddock.model.stages import PREFIX
from paddock.sharding import ArraySpec, Layout

PRODUCTS = ("qkv", "out", "gate_up", "down")
# Bytes of a weight in the matrix products, by what they are quantized to; sums and scales stay as they are.
QUANTIZED = {"int8": 1, "fp8": 1}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes and multiplications on a device: `layers` of all its layer slots, `head` of its piece of the head, `total`
    of everything that it holds. Multiplications are for one row. `dtype`: as which the layers' products read them."""

    dtype: str
    layers: int
    head: int
    total: int
    layer_products: int
    head_products: int

    @classmethod
    def of(cls, model: LlamaConfig, layout: Layout, dtype: str, quantization: str | None) -> Weights:
        """Raises ValueError naming an axis that does not divide."""
        slots = Stages.of(model, layout).num_slots
        layers = head = total = layer_products = head_products = 0
        for name, spec in param_specs(dataclasses.replace(model, num_layers=1), layout, dtype).items():
            count = _elements(layout, spec)
            size = count * spec.dtype.itemsize
            base = name.removeprefix(f"{PREFIX}0.")
            if base in PRODUCTS and quantization:
                size = count * QUANTIZED[quantization] + 4 * count // _contracted(base, spec)
            if name.startswith(PREFIX):
                layers += slots * size
                layer_products += slots * count * (base in PRODUCTS)
            elif name == ("embed" if model.tie_embeddings else "head"):
                head, head_products = size, count
                total += size
            else:
                total += size
        return cls(quantization or dtype, layers, head, total + layers, layer_products, head_products)


def _elements(layout: Layout, spec: ArraySpec) -> int:
    shards = layout.shards(spec)
    if any(size % n for size, n in zip(spec.shape, shards, strict=True)):
        layout.place(spec)  # says which
    return math.prod(spec.shape) // math.prod(shards)


def _contracted(name: str, spec: ArraySpec) -> int:
    """Over how many inputs a product sums: each of its outputs has a scale."""
    return math.prod(spec.shape[:-1]) if name == "out" else spec.shape[0]
