"""The body of each HTTP route."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from .api_errors import ApiError
from .protocol import Body, GenerationBody, is_list_of
from .sampling_params import SamplingParams

# Prompts times n: what one request may put into the queue.
MAX_SEQUENCES = 1024


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` becomes a list of prompts, each a string or token ids."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> list[str] | list[list[int]]:
        prompts = prompt if isinstance(prompt, list) and prompt and not is_list_of(prompt, int) else [prompt]
        if not is_list_of(prompts, str) and not all(is_list_of(item, int) for item in prompts):
            raise ValueError("must be a string, a list of strings, token ids, or a list of lists of token ids")
        if len(prompts) > MAX_SEQUENCES:
            raise ValueError(f"holds {len(prompts)} prompts; at most {MAX_SEQUENCES} are allowed")
        if not all(prompts):
            raise ValueError("is empty")
        return prompts

    @property
    def only_scores(self) -> bool:
        """The prompt's log-probabilities are wanted and no new token."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Raises ApiError (400)."""
        overrides: dict[str, Any] = {}
        if self.echo and self.logprobs is not None:
            if self.prompt_logprobs is not None and self.prompt_logprobs != self.logprobs:
                raise ApiError(400, "prompt_logprobs differs from logprobs under echo", param="prompt_logprobs")
            overrides["prompt_logprobs"] = self.logprobs
        if self.only_scores:
            # The engine samples at least one token; the response leaves it out.
            overrides |= {"max_tokens": 1, "min_tokens": 0, "stop": None}
        params = self.sampling_params(defaults, **overrides)
        if len(self.prompt) * params.n > MAX_SEQUENCES:
            wanted = f"n {params.n} with {len(self.prompt)} prompts makes {params.n * len(self.prompt)} outputs"
            raise ApiError(400, f"{wanted}; at most {MAX_SEQUENCES} are allowed", param="n")
        return params


class ChatMessage(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, message: Any) -> Any:
        # A message that came out of a response and goes back in as history carries tool_calls: null and the like.
        if isinstance(message, dict):
            return {key: value for key, value in message.items() if value is not None and value != []}
        return message

    @pydantic.field_validator("content")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(parts) or not is_list_of(texts, str):
            raise ValueError("must be a string or a list of parts of type 'text'")
        return content

    @property
    def as_dict(self) -> dict[str, Any]:
        # "developer" is OpenAI's newer word for the same thing; templates know "system".
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = pydantic.Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Raises ApiError (400)."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) == 2:
            raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
        try:
            return self.sampling_params(
                defaults,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                max_tokens=given.pop() if given else None,
            )
        except ApiError as error:
            error.param = self.name_of(error.param)
            raise

    def name_of(self, argument: str | None) -> str | None:
        renamed = {"logprobs": "top_logprobs", "max_tokens": "max_completion_tokens", "prompt": "messages"}
        name = renamed.get(argument or "")
        return name if name is not None and getattr(self, name) is not None else argument


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @pydantic.model_validator(mode="after")
    def _check_either(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
