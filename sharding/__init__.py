"""Which device holds what: meshes, rules from logical to mesh axes, and the layouts they make."""

from .collectives import Collective, Total, read_collectives, summarize
from .layout import ArraySpec, Layout
from .layout_text import LayoutText
from .mesh import MeshConfig
from .presets import PRESETS, Preset
from .rules import Axes, LogicalAxes, ShardingRules

__all__ = [
    "PRESETS",
    "ArraySpec",
    "Axes",
    "Collective",
    "Layout",
    "LayoutText",
    "LogicalAxes",
    "MeshConfig",
    "Preset",
    "ShardingRules",
    "Total",
    "read_collectives",
    "summarize",
]
