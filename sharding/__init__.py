"""Which device holds what: meshes, rules from logical to mesh axes, and the layouts they make."""

from .layout import ArraySpec, Layout
from .mesh import MeshConfig
from .rules import LogicalAxes, ShardingRules

__all__ = ["ArraySpec", "Layout", "LogicalAxes", "MeshConfig", "ShardingRules"]
