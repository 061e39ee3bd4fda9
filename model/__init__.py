"""What a Llama computes."""

from .activations import Normed
from .config import LlamaConfig, RopeConfig
from .deferring_products import DeferringProducts
from .llama import LayerStack, Llama, forward
from .normed_products import NormedProducts
from .params import Dims, param_specs
from .products import Products
from .reduction import Reduction, reduction_axes
from .stages import Stages, placements, slot_specs, stack_stages

__all__ = [
    "DeferringProducts",
    "Dims",
    "LayerStack",
    "Llama",
    "LlamaConfig",
    "Normed",
    "NormedProducts",
    "Products",
    "Reduction",
    "RopeConfig",
    "Stages",
    "forward",
    "param_specs",
    "placements",
    "reduction_axes",
    "slot_specs",
    "stack_stages",
]
