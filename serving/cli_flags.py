"""Command-line flags from dataclass fields, spelled as vLLM spells them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from .engine_config import EngineConfig
from .sampling_params import SamplingParams

# Fields of EngineConfig under the headings that --help shows; a field named nowhere goes under the last.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "model",
        (
            "model",
            "revision",
            "served_model_name",
            "tokenizer",
            "skip_tokenizer_init",
            "chat_template",
            "load_format",
            "dtype",
            "hf_overrides",
            "max_model_len",
            "seed",
        ),
    ),
    ("sharding", ("mesh", "rules", "tensor_parallel_size")),
    ("engine", ()),
)
SAMPLING_HELP = {
    "temperature": "0 always takes the likeliest token",
    "top_p": "draw from the likeliest tokens that together have this probability",
    "top_k": "draw from this many of the likeliest tokens; 0 is all",
    "min_p": "leave out tokens less likely than this share of the likeliest",
    "repetition_penalty": "above 1: tokens seen before become less likely",
    "presence_penalty": "above 0: generated tokens become less likely",
    "frequency_penalty": "above 0: the more often a token was generated, the less likely it is",
    "min_tokens": "tokens before which it cannot end",
    "ignore_eos": "go on after the model's end-of-sequence token",
}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of EngineConfig."""
    hints = typing.get_type_hints(EngineConfig)
    groups = {title: parser.add_argument_group(title) for title, _ in GROUPS}
    heading = {name: title for title, names in GROUPS for name in names}
    for field in dataclasses.fields(EngineConfig):
        group = groups[heading.get(field.name, GROUPS[-1][0])]
        _add_flag(group, field.name, hints[field.name], field.default, **field.metadata)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises ValueError naming the field that has a bad value."""
    return EngineConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EngineConfig)})


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the fields of SamplingParams that a person at a terminal may want."""
    hints = typing.get_type_hints(SamplingParams)
    group = parser.add_argument_group("sampling", "by default what the model's generation_config.json says")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given several times")
    for name, text in SAMPLING_HELP.items():
        _add_flag(group, name, hints[name], None, help=text)


def sampling_params(args: argparse.Namespace, defaults: SamplingParams, **overrides: Any) -> SamplingParams:
    """The model's defaults, then `overrides`, then the flags that were given. Raises ValueError."""
    given = {name: getattr(args, name) for name in ("max_tokens", "stop", *SAMPLING_HELP)}
    return dataclasses.replace(
        defaults, **overrides | {name: value for name, value in given.items() if value is not None}
    )


def _add_flag(
    group: Any, name: str, hint: Any, default: Any, *, help: str, short: str | None = None, **rest: Any
) -> None:
    flags = ["--" + name.replace("_", "-")] + ([short] if short else [])
    text = help.replace("%", "%%")
    if default is not None and default is not False and default != "":
        text += " (default: %(default)s)"
    kind = _plain_type(hint)
    if kind is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    if "choices" not in rest:
        rest.setdefault("metavar", {int: "N", float: "X"}.get(kind, name.rsplit("_", 1)[-1].upper()))
    read = _number_or_auto if kind is int and default is None else _json_object if kind is Mapping else kind
    group.add_argument(*flags, dest=name, type=read, default=default, help=text, **rest)


def _number_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _plain_type(hint: Any) -> type:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (member for member in hint.__args__ if member is not type(None))
    return hint
