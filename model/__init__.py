"""What a Llama computes."""

from .config import LlamaConfig, RopeConfig
from .llama import LayerStack, Llama, forward
from .params import Dims, param_specs
from .reduction import Reduction, reduction_axes
from .stages import Stages, placements, slot_specs, stack_stages

__all__ = [
    "Dims",
    "LayerStack",
    "Llama",
    "LlamaConfig",
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
