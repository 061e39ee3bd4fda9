"""Layouts from the literature, by name: `--layout pope-2d-weight-stationary --mesh x=2,y=4`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from .mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Rules for mesh axes of these names; `source` is where they come from and what they cost."""

    name: str
    axes: tuple[str, ...]
    rules: str
    source: str

    def mesh_for(self, num_devices: int) -> MeshConfig:
        """The most even mesh of `num_devices` over the preset's axes, larger sizes last."""
        sizes: list[int] = []
        for left in range(len(self.axes), 1, -1):
            size = max(n for n in range(1, num_devices + 1) if num_devices % n == 0 and n**left <= num_devices)
            sizes.append(size)
            num_devices //= size
        return MeshConfig(tuple(zip(self.axes, [*sizes, num_devices], strict=True)))

    def check(self, mesh: MeshConfig) -> None:
        """Raises ValueError unless `mesh` has the preset's axes, and at most `data` besides."""
        names = set(mesh.without_data.sizes)
        if names != set(self.axes):
            raise ValueError(f"layout {self.name} is for mesh axes {', '.join(self.axes)}, but the mesh is {mesh}")


PRESETS: dict[str, Preset] = {}


def _preset(*axes: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(rules: Callable[[], str]) -> Callable[[], str]:
        name = rules.__name__.removeprefix("_").replace("_", "-")
        PRESETS[name] = Preset(name, axes, rules(), inspect.getdoc(rules) or "")
        return rules

    return register


@_preset("tensor")
def _tensor() -> str:
    """Megatron-LM's tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): heads, mlp and vocabulary split, two
    all-reduces a layer."""
    return "q_heads=tensor,mlp=tensor,vocab=tensor"


@_preset("tensor")
def _sequence_parallel() -> str:
    """Tensor parallelism with the residual stream and its norms split by tokens (Korthikanti et al. 2022, arXiv
    2205.05198): each all-reduce becomes a reduce-scatter after the block and an all-gather before the next."""
    return "q_heads=tensor,mlp=tensor,vocab=tensor,tokens=tensor"


@_preset("x")
def _pope_1d_weight_stationary() -> str:
    """One-dimensional weight-stationary (Pope et al. 2022, arXiv 2211.05102, section 3.2.1): weights split along mlp
    and heads over all devices; attention over heads."""
    return "q_heads=x,mlp=x,vocab=x"


@_preset("x", "y")
def _pope_2d_weight_stationary() -> str:
    """Two-dimensional weight-stationary (Pope et al. 2022, section 3.2.2): weights split along embed over x and along
    mlp and heads over y, so that what is sent grows as 1/sqrt(devices); attention over heads, on each x alike."""
    return "embed=x,q_heads=y,mlp=y,vocab=y"


@_preset("x", "y")
def _pope_2d_weight_stationary_batch_attention() -> str:
    """Two-dimensional weight-stationary with attention over the batch (Pope et al. 2022, section 3.3): projections
    split as there, then an all-to-all gives each device whole heads of its own sequences, so that the cache is split
    over all devices however few kv heads there are."""
    return "embed=x,q_heads=y,mlp=y,vocab=y,batch=x+y,tokens="


@_preset("x")
def _pope_1d_batch_attention() -> str:
    """One-dimensional weight-stationary with attention over the batch (Pope et al. 2022, sections 3.2.1 and 3.3)."""
    return "q_heads=x,mlp=x,vocab=x,batch=x,tokens="


@_preset("x", "y")
def _pope_x_weight_gathered() -> str:
    """X-weight-gathered (Pope et al. 2022, section 3.2.3): tokens split over x, mlp and heads over y; weights lie split
    over both and are gathered over x when they are used."""
    return "embed=x,q_heads=y,mlp=y,vocab=y,batch=x"


@_preset("x")
def _pope_xyz_weight_gathered() -> str:
    """XYZ-weight-gathered (Pope et al. 2022, section 3.2.3): tokens split over all devices, each of which gathers every
    weight when it is used. For large batches and prefill."""
    return "embed=x,vocab=,batch=x"


@_preset("pipe", "tensor")
def _llama3() -> str:
    """Tensor parallelism in a host, pipeline stages across hosts, micro-batches in flight (Llama Team 2024, arXiv
    2407.21783, section 6.1)."""
    return "layers=pipe,q_heads=tensor,mlp=tensor,vocab=pipe+tensor"
