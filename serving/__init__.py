"""From requests to steps to tokens. The public names load on first use, so that `import paddock.serving` is light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine_config import EngineConfig
    from .front import Front
    from .llm import LLM
    from .outputs import CompletionOutput, Logprob, RequestOutput
    from .planner import plan
    from .sampling_params import SamplingParams

_HOMES = {
    "CompletionOutput": "outputs",
    "EngineConfig": "engine_config",
    "Front": "front",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "plan": "planner",
}

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "Front", "Logprob", "RequestOutput", "SamplingParams", "plan"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
