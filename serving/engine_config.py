"""Every knob of the engine, in one place; the CLI's flags are generated from these fields."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddock.sharding import LayoutText

# Prompt tokens of a step where nobody says how many. On a GPU, prompts that come together then hold the rest up for few
# steps.
CPU_TOKENS, GPU_TOKENS = 512, 8192
# Mesh axes and the fields that are short for them, slowest-varying first.
_SHORTHANDS = {"data": "data_parallel_size", "pipe": "pipeline_parallel_size", "tensor": "tensor_parallel_size"}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text; `choices`, `short` (a short flag) and `metavar` may follow for the CLI."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the user asked for. None (or "auto") where a number may be left open: resolved once, while the engine
    starts, and logged. Raises ValueError naming the field."""

    model: str = option("", "model folder or Hugging Face Hub id; empty is the bundled demo model")
    revision: str | None = option(None, "branch, tag or commit of a Hub id")
    served_model_name: str | None = option(None, "name in the HTTP API; by default the model as given")
    tokenizer: str | None = option(None, "folder of the tokenizer; by default the model's")
    skip_tokenizer_init: bool = option(False, "work on token ids alone, without any tokenizer")
    chat_template: str | None = option(None, "chat template: a file or the template itself; by default the model's")
    load_format: str = option(
        "auto", "how to read weights; dummy makes random ones", choices=("auto", "safetensors", "orbax", "dummy")
    )
    dtype: str = option(
        "auto",
        "weights and activations; auto: float32 on CPU, else the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    hf_overrides: Mapping | None = option(
        None,
        "fields of config.json to replace, as a JSON object: '{\"num_hidden_layers\": 2}', with dummy weights, cuts a "
        "model short",
    )
    max_model_len: int | None = option(
        None, "longest prompt + output in tokens; auto: the model's, capped by the cache"
    )
    seed: int = option(0, "seed of dummy weights and of requests that bring none")
    mesh: str = option("", "device mesh, as in 'data=2,pipe=2,tensor=2'")
    rules: str = option("", "sharding rules over the defaults, as in 'mlp=tensor,vocab=pipe+tensor'")
    layout: str = option("", "mesh and rules from a .toml file or a preset, as in 'sequence-parallel'")
    tensor_parallel_size: int = option(1, "shorthand for --mesh tensor=N", short="-tp")
    pipeline_parallel_size: int = option(1, "shorthand for --mesh pipe=N", short="-pp")
    data_parallel_size: int = option(1, "shorthand for --mesh data=N: replicas of the engine", short="-dp")
    block_size: int = option(64, "tokens per KV cache page")
    gpu_memory_utilization: float = option(0.9, "share of each accelerator's memory to use")
    kv_cache_memory_bytes: int | None = option(
        None, "bytes of KV cache per device; auto: what is left of the GPU, or 10% of RAM (at most 4 GiB) on CPU"
    )
    max_num_seqs: int | None = option(None, "sequences running at once; auto: 32 on CPU, else 256")
    max_num_batched_tokens: int | None = option(
        None, f"prompt tokens in a step; auto: {CPU_TOKENS} on CPU, else {GPU_TOKENS}"
    )
    max_num_queued_reqs: int | None = option(None, "requests waiting before new ones are refused; auto: no limit")
    max_logprobs: int = option(20, "largest logprobs or prompt_logprobs that a request may ask for")
    decode_attention: str = option("auto", "entry of the DECODE_ATTENTION table")
    prefill_attention: str = option("auto", "entry of the PREFILL_ATTENTION table")
    add_norm: str = option(
        "xla",
        "how a block is added to the residual stream and normed, where layers are whole on a device: xla, an entry of "
        "the ADD_NORM table, or products: in steps of few rows by the products before and after it",
    )
    products: str = option(
        "auto",
        "who computes a layer's matrix products: xla, or an entry of the MATMUL table; mosaic takes those with SwiGLU "
        "of many rows, and some of a large batch, and leaves the others to xla",
    )
    all_reduce: str = option(
        "auto", "xla, or an entry of the ALL_REDUCE table; mosaic sums up to 2 MiB at once and leaves more to xla"
    )
    coordinator_address: str = option(
        "", "host:port of process 0 when one engine runs in several; auto: as Slurm or Open MPI say"
    )
    num_processes: int | None = option(None, "processes that run one engine together; auto: with coordinator_address")
    process_id: int | None = option(None, "which of them this is; 0 serves, the others follow")
    broadcast_port: int | None = option(None, "port of process 0 for the others; auto: the coordinator's + 1")
    heartbeat_timeout_seconds: int = option(10, "silence after which a process counts as dead, which ends the others")
    deterministic: bool = option(
        False,
        "tokens and logprobs bitwise the same alone and in any batch: each step runs the largest program",
    )
    compile_cache_dir: str | None = option(None, "folder of compiled programs; auto: ~/.cache/paddock/compiled")
    lowering_processes: int | None = option(
        None, "processes that trace and lower steps at a cold start, 0: this one; auto: for a GPU up to 4, else 0"
    )
    cache_weights: bool = option(
        False, "keep safetensors as converted in compile_cache_dir, as large as they are, for the next start"
    )

    def __post_init__(self) -> None:
        self._check_types()
        for name in (*_SHORTHANDS.values(), "block_size", "heartbeat_timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            least = 0 if name in ("process_id", "lowering_processes") else 1
            if kind == int | None and value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs must be at least 0, got {self.max_logprobs}")
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {getattr(self, field.name)!r}")
        short = next((name for name in _SHORTHANDS.values() if getattr(self, name) > 1), None)
        if short and (self.mesh or self.layout):
            raise ValueError(f"{short} and {'mesh' if self.mesh else 'layout'} both name a layout; give one of them")

    def _check_types(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if value == "auto" and kind == int | None:
                object.__setattr__(self, name, None)
                continue
            allowed = int | float if kind is float else kind
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                shown = getattr(kind, "__name__", str(kind))
                raise ValueError(f"{name} must be of type {shown}, got {value!r}")

    @functools.cached_property
    def layout_text(self) -> LayoutText:
        """The layout that all the flags about it ask for. Raises ValueError naming what is wrong."""
        from paddock.sharding import LayoutText  # not with this module: it imports JAX, and --help shall be instant

        sizes = [(axis, getattr(self, name)) for axis, name in _SHORTHANDS.items()]
        shorthand = ",".join(f"{axis}={size}" for axis, size in sizes if size > 1)
        return LayoutText.read(self.mesh or shorthand, self.rules, self.layout)
