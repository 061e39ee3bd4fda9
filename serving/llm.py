"""The Python API: a model, and prompts through it."""

from __future__ import annotations

import operator
import queue
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from tqdm import tqdm

from .engine_config import EngineConfig
from .front import Front
from .outputs import RequestOutput
from .request import Request, RequestStream
from .sampling_params import SamplingParams

Prompt: TypeAlias = str | Mapping[str, Any]
Messages: TypeAlias = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to generate; keyword arguments are the fields of `EngineConfig`.

    `with LLM(...) as llm:` frees the devices at the end, as `llm.close()` does. Raises ValueError naming the option or
    the checkpoint's file when the model cannot be had.
    """

    def __init__(self, model: str = "", *, progress: bool = False, **options: Any):
        known = EngineConfig.__dataclass_fields__
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"LLM has no option {unknown[0]!r}; there are {', '.join(known)}")
        self.engine = Front(EngineConfig(model=model, **options), progress=progress)
        self.tokenizer = self.engine.tokenizer
        # An LLM that is dropped without close() must not hold the devices.
        self._finalizer = weakref.finalize(self, self.engine.shutdown)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One finished output per prompt, in the prompts' order; they run in an order of the engine's.

        A prompt is a string or `{"prompt_token_ids": [...]}`; one SamplingParams serves all, or there is one for each
        prompt. Raises ValueError naming the argument; if a step fails, RequestFailed. Either ends the other requests.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(listed, sampling_params)
        requests = [Request(_token_ids_or_text(prompt), one) for prompt, one in zip(listed, params, strict=True)]
        events: queue.SimpleQueue[RequestStream] = queue.SimpleQueue()
        results: list[RequestOutput | None] = [None] * len(listed)
        submitted = self.engine.submit_all(requests, output_kind="final", patient=True, on_event=events.put)
        streams = {stream: index for index, stream in enumerate(submitted)}
        try:
            with tqdm(total=len(listed), desc="Generating", unit="request", disable=not use_tqdm) as bar:
                while streams:
                    stream = events.get()
                    output = stream.get(timeout=0) if stream in streams else None
                    if output is not None:
                        results[streams.pop(stream)] = output
                        bar.update()
        finally:
            for stream in streams:
                stream.abort()
        return [output for output in results if output is not None]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation (a list of messages) or a list of them."""
        several: Any = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [{"prompt_token_ids": self._render(one, **template_arguments)} for one in several]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """What is new, as it is made. Leaving the loop early ends the request. Raises ValueError as `generate` does."""
        stream = self.engine.submit(_token_ids_or_text(prompt), sampling_params or self.engine.default_params)

        def outputs() -> Iterator[RequestOutput]:
            try:
                yield from stream
            finally:
                stream.abort()

        generator = outputs()
        # One that is never begun has nothing to leave.
        weakref.finalize(generator, stream.abort).atexit = False
        return generator

    def close(self) -> None:
        """Stop, and give the device memory back. Harmless the second time."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self, messages: Messages, **arguments: Any) -> list[int]:
        if self.engine.chat_template is None:
            raise ValueError("chat needs a tokenizer and a chat template, and this model has none")
        return self.engine.tokenize(self.engine.chat_template.render(messages, **arguments))

    def _params_for(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.engine.default_params
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"sampling_params holds {len(params)} entries for {len(prompts)} prompts")
        return list(params)


def _token_ids_or_text(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
        raise ValueError(f'a prompt is a string or {{"prompt_token_ids": [...]}}, not {prompt!r}')
    try:
        return [operator.index(token) for token in prompt["prompt_token_ids"]]
    except TypeError as error:
        raise ValueError(f"prompt_token_ids must be a list of integers: {error}") from error
