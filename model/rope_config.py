"""Which rotary embedding a checkpoint uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .fields import Fields

# RoPE kind -> what its object in the file may hold, beside the kind and what every kind shares.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# The last says how the checkpoint was made, not what it computes.
_ROPE_SHARED = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")

# The fields of `RopeConfig` that a kind cannot do without.
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position"),
    "yarn": ("factor", "original_max_position", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, yarn or llama3; the fields a kind does not use are None.

    `original_max_position` (tokens) is the context of pre-training; dynamic grows its wavelengths beyond it.
    yarn: `attention_factor` None means that it follows from `factor`, `mscale` and `mscale_all_dim`.
    """

    kind: str
    theta: float
    factor: float | None = None
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        _checked_kind(self.kind)
        self.require(*NEEDED[self.kind])
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            small, large = getattr(self, low), getattr(self, high)
            if small is not None and large is not None and not 0 < small < large:
                raise ValueError(f"{low} {small} must be above 0 and below {high} {large}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, default_theta: float, max_position: int) -> RopeConfig:
        """Reads the RoPE fields of a whole config.json in either spelling; raises ValueError naming the field."""
        top = Fields(raw)
        inner = top.mapping(top.either("rope_parameters", "rope_scaling"))
        said = inner.get(Fields(inner).either("rope_type", "type"))
        if said is None and inner.keys() <= set(_ROPE_SHARED):
            said = "default"
        kind = _checked_kind(said)
        if unknown := sorted(inner.keys() - {*_ROPE_SHARED, *ROPE_KINDS[kind]}):
            raise ValueError(f"{unknown[0]} {inner[unknown[0]]!r} is not supported with rope_type {kind!r}")

        # These may stand beside the RoPE object as well as in it.
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            if raw.get(name) is not None and inner.setdefault(name, raw[name]) != raw[name]:
                raise ValueError(f"{name} is both {raw[name]!r} and, for RoPE, {inner[name]!r}")
        fields = Fields(inner)
        fields.check_supported({"partial_rotary_factor": (1,)})
        values: dict[str, Any] = {} if kind == "default" else {"factor": fields.number("factor", at_least=1.0)}
        if kind == "dynamic":
            values["original_max_position"] = max_position  # such a file keeps the original length there
        elif kind == "yarn":
            values |= {
                "original_max_position": fields.integer("original_max_position_embeddings", max_position),
                "beta_fast": fields.number("beta_fast", 32.0),
                "beta_slow": fields.number("beta_slow", 1.0),
                "truncate": fields.boolean("truncate", True),
            }
            values |= {name: fields.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        elif kind == "llama3":
            values["original_max_position"] = fields.integer("original_max_position_embeddings")
            values |= {name: fields.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        return cls(kind, fields.number("rope_theta", default_theta), **values)

    def require(self, *names: str) -> tuple[float, ...]:
        """The values of fields that this kind cannot do without; raises ValueError for one that is None."""
        values = [getattr(self, name) for name in names]
        if None in values:
            raise ValueError(f"{names[values.index(None)]} is missing, which rope_type {self.kind!r} needs")
        return tuple(map(float, values))

    def to_hf_dict(self) -> dict[str, Any] | None:
        """The `rope_scaling` object of a config.json; None for the default kind."""
        if self.kind == "default":
            return None
        named = dataclasses.asdict(self) | {"original_max_position_embeddings": self.original_max_position}
        kept = {name: named[name] for name in ROPE_KINDS[self.kind] if named[name] is not None}
        return {"rope_type": self.kind, **kept}


def _checked_kind(kind: Any) -> str:
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    return kind
