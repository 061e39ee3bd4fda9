"""Bytes on disk to sharded arrays and back: Hugging Face folders, Orbax folders, random weights, the Hub."""

from .dummy import init_dummy_params
from .errors import CheckpointError
from .generation_config import GenerationConfig
from .hub import bundled_model, resolve_model
from .load import LOAD_FORMATS, convert, detect_format, load
from .orbax_folder import load_orbax, save_orbax
from .safetensors_folder import load_params, save_safetensors
from .weights_cache import WeightsCache

__all__ = [
    "LOAD_FORMATS",
    "CheckpointError",
    "GenerationConfig",
    "WeightsCache",
    "bundled_model",
    "convert",
    "detect_format",
    "init_dummy_params",
    "load",
    "load_orbax",
    "load_params",
    "resolve_model",
    "save_orbax",
    "save_safetensors",
]
