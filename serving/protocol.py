"""How the bodies of HTTP requests are read: OpenAI's fields with vLLM's extra ones for sampling.

A field is known, known to have no effect here (HARMLESS), known but not supported (UNSUPPORTED, refused unless it holds
its neutral value), or refused as unknown: nothing that would change the answer is dropped.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, TypeVar

import pydantic

from .api_errors import ApiError, bad_value
from .sampling_params import SamplingParams

HARMLESS = frozenset(
    [
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    ]
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
}
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


class Body(pydantic.BaseModel):
    """Strict: a string is no number and 1 is no boolean; null is the same as leaving a field out."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    model: str | None = None


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What completions and chat share. Ranges are checked by SamplingParams, for Python and HTTP alike."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    # Becomes the end of the response's `id`, which every chunk of a stream repeats: hence a limit.
    request_id: str | None = pydantic.Field(default=None, min_length=1, max_length=256)
    return_token_ids: bool | None = None

    def name_of(self, argument: str | None) -> str | None:
        """What this body calls an argument of the engine."""
        return argument

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        if stop is None or isinstance(stop, str) or is_list_of(stop, str):
            return stop
        raise ValueError("must be a string or a list of strings")

    @pydantic.model_validator(mode="after")
    def _check_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not available with stream")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, defaults: SamplingParams, **overrides: Any) -> SamplingParams:
        """The model's defaults, then this request's fields, then `overrides`. Raises ApiError (400)."""
        given = {name: getattr(self, name, None) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None} | overrides
        try:
            return dataclasses.replace(defaults, **given)
        except ValueError as error:
            raise bad_value(error, SAMPLING_FIELDS) from None


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """The request in `data`, checked. Raises ApiError (400) naming the field."""
    body = _load(data)
    for name in [name for name, value in body.items() if value is None or name in HARMLESS]:
        del body[name]
    for name, neutral in UNSUPPORTED.items():
        if name in body and name not in kind.model_fields:
            if body.pop(name) in neutral:
                continue
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _invalid(error) from None


def _load(data: bytes) -> dict[str, Any]:
    # NaN and Infinity, which Python reads, are left to the checks of the fields: they can say which one holds it.
    try:
        # Not json.loads(data), which guesses UTF-16 and UTF-32 and lets halves of surrogate pairs through.
        body = json.loads(data.decode())
        if b"\\u" in data:
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _invalid(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if param is None:  # a check over several fields: its sentence starts with the one at fault
        return ApiError(400, message, param=message.partition(":")[0])
    if first["type"] == "value_error":
        return ApiError(400, f"{param} {message}", param=param)
    shown = repr(first["input"])
    return ApiError(400, f"{param}: {message}, got {shown[:80]}{'...' * (len(shown) > 80)}", param=param)


def is_list_of(value: Any, kind: type) -> bool:
    """A list of `kind` and nothing else; True and False are no integers."""
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
