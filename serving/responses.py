"""What the HTTP routes send: OpenAI's bodies, made from the engine's outputs.

One builder makes both kinds of answer: a final output gives the choices of a whole response, each delta gives those of
one stream chunk.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from .bodies import ChatBody, CompletionBody
from .outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .front import Front

Json = dict[str, Any]

# OpenAI's stand-in for minus infinity, which JSON cannot say.
LEAST_LOGPROB = -9999.0


class ResponseBuilder:
    """Builds one request's answer. Choice `i * n + j` is output j of prompt i."""

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, engine: Front, params: SamplingParams, body: CompletionBody | ChatBody) -> None:
        self.engine, self.params = engine, params
        self.token_ids_wanted = bool(body.return_token_ids)
        self.prompt_logprobs_wanted = body.prompt_logprobs is not None
        self.include_usage, self.name_of = body.include_usage, body.name_of
        self.id = f"{self.id_prefix}-{body.request_id or uuid.uuid4().hex}"
        self.created = int(time.time())
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._started: set[int] = set()
        self._finished: set[int] = set()
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}

    def choices(self, prompt_index: int, output: RequestOutput, *, streaming: bool) -> list[Json]:
        """The choices that this output adds to; empty if it says nothing new."""
        self._prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs
        choices = []
        for completion in output.outputs:
            index = prompt_index * self.params.n + completion.index
            is_news = completion.token_ids or completion.text or completion.finished
            if not is_news or index in self._finished:
                continue
            choice = self._choice(index, output, completion, streaming=streaming)
            self._completion_tokens += self._num_tokens(completion)
            self._started.add(index)
            if completion.finished:
                self._finished.add(index)
            choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
            if self.token_ids_wanted:
                choice["token_ids"] = completion.token_ids
                choice["prompt_token_ids"] = output.prompt_token_ids
            if self.prompt_logprobs_wanted:
                choice["prompt_logprobs"] = [
                    entry and {str(token): self._logprob_dict(token, item) for token, item in entry.items()}
                    for entry in self._prompt_logprobs[prompt_index]
                ]
            choices.append({"index": index, **choice})
        return choices

    def response(self, choices: list[Json]) -> Json:
        return {**self._envelope(self.kind), "choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._envelope(self.chunk_kind), "choices": choices, **usage}

    def usage_chunk(self) -> Json:
        """The last chunk of a stream with `stream_options.include_usage`."""
        return {**self._envelope(self.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> Json:
        prompt = sum(self._prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
        }

    def _envelope(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.engine.model_name}

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput, *, streaming: bool) -> Json:
        raise NotImplementedError

    def _num_tokens(self, completion: CompletionOutput) -> int:
        return len(completion.token_ids)

    def _logprob_dict(self, token: int, entry: Logprob) -> Json:
        text = self._token_text(token, entry)
        return {"logprob": max(entry.logprob, LEAST_LOGPROB), "rank": entry.rank, "decoded_token": text}

    def _token_text(self, token: int, entry: Logprob | None = None) -> str:
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        raw = self._bytes_of(token)
        return f"token_id:{token}" if raw is None else raw.decode("utf-8", "replace")

    def _bytes_of(self, token: int) -> bytes | None:
        """b"" where the model's vocabulary is padded beyond its tokenizer's, None without one."""
        if (tokenizer := self.engine.tokenizer) is None:
            return None
        return tokenizer.id_to_bytes(token) if token < tokenizer.vocab_size else b""


class CompletionBuilder(ResponseBuilder):
    """/v1/completions, with the legacy log-probabilities: parallel lists."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Front, params: SamplingParams, body: CompletionBody) -> None:
        super().__init__(engine, params, body)
        self.body = body
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput, *, streaming: bool) -> Json:
        echoes = bool(self.body.echo) and index not in self._started
        if self.body.only_scores:
            # The one token that the engine needed is not part of the answer.
            completion.text, completion.token_ids, completion.logprobs = "", [], []
            if completion.finish_reason != "abort":
                completion.finish_reason, completion.stop_reason = "length", None
        text = (self._prompt_text(output) if echoes else "") + completion.text
        logprobs = None
        if self.body.logprobs is not None:
            num_prompt = len(output.prompt_token_ids) if echoes else 0
            tokens = list(completion.token_ids)
            entries: list[TokenLogprobs | None] = list(completion.logprobs or [])
            if echoes:
                tokens = output.prompt_token_ids + tokens
                entries = self._prompt_logprobs[index // self.params.n] + entries
            logprobs = self._legacy_logprobs(index, tokens, entries, num_prompt)
        return {"text": text, "logprobs": logprobs}

    def _num_tokens(self, completion: CompletionOutput) -> int:
        return 0 if self.body.only_scores else len(completion.token_ids)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        if (tokenizer := self.engine.tokenizer) is None:
            return ""
        return tokenizer.decode([token for token in output.prompt_token_ids if token < tokenizer.vocab_size])

    def _legacy_logprobs(
        self, index: int, tokens: list[int], entries: list[TokenLogprobs | None], num_prompt: int
    ) -> Json:
        """The parallel lists for tokens of which the first `num_prompt` are the prompt's."""
        special = self.engine.tokenizer.special_ids if self.engine.tokenizer is not None else frozenset()
        top = self.body.logprobs or 0
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(index, 0)
        for position, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            text = self._token_text(token, entry[token] if entry else None)
            lists["tokens"].append(text)
            lists["text_offset"].append(offset)
            # A token that the text leaves out takes no room in it.
            if token not in special or (position >= num_prompt and not self.params.skip_special_tokens):
                offset += len(text)
            if entry is None:  # the prompt's first token: nothing precedes it
                lists["token_logprobs"].append(None)
                lists["top_logprobs"].append(None)
                continue
            lists["token_logprobs"].append(max(entry[token].logprob, LEAST_LOGPROB))
            best: dict[str, float] = {}
            for other, item in sorted(entry.items(), key=lambda pair: pair[1].rank):
                if item.rank <= top or other == token:
                    # Two tokens may read the same (parts of a character): the likelier one stays.
                    best.setdefault(self._token_text(other, item), max(item.logprob, LEAST_LOGPROB))
            lists["top_logprobs"].append(best)
        self._offsets[index] = offset
        return lists


class ChatBuilder(ResponseBuilder):
    """/v1/chat/completions; a stream's first chunk of a choice names the role."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput, *, streaming: bool) -> Json:
        message = {"content": completion.text}
        if index not in self._started:
            message = {"role": "assistant", **message}
        logprobs = None
        if self.params.logprobs is not None:
            pairs = zip(completion.token_ids, completion.logprobs or [], strict=True)
            logprobs = {"content": [self._chat_logprob(token, entry) for token, entry in pairs], "refusal": None}
        return {"delta" if streaming else "message": message, "logprobs": logprobs}

    def _chat_logprob(self, token: int, entry: TokenLogprobs) -> Json:
        best = sorted(entry.items(), key=lambda pair: pair[1].rank)
        top = [self._candidate(other, item) for other, item in best if item.rank <= (self.params.logprobs or 0)]
        return {**self._candidate(token, entry[token]), "top_logprobs": top}

    def _candidate(self, token: int, entry: Logprob) -> Json:
        raw, text = self._bytes_of(token), self._token_text(token, entry)
        logprob = max(entry.logprob, LEAST_LOGPROB)
        return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}
