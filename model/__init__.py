"""What a Llama computes."""

from .config import LlamaConfig, RopeConfig
from .llama import Llama, forward
from .params import Dims, param_specs

__all__ = ["Dims", "Llama", "LlamaConfig", "RopeConfig", "forward", "param_specs"]
