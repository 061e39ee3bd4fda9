"""How the tokens of one request are drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

MAX_STOP_STRINGS = 64
MAX_N = 128
MAX_TEMPERATURE = 1000.0
INT32_MAX = 2**31 - 1
# Below this a temperature is taken for 0, as in vLLM: float32 logits divided by it would overflow.
GREEDY_BELOW = 1e-5


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """vLLM's names and meanings. temperature 0 is greedy; top_k 0 or -1, top_p 1 and min_p 0 are off.

    Penalties: presence and frequency count generated tokens (OpenAI), repetition counts the prompt's too (CTRL,
    Keskar et al. 2019). max_tokens None: up to the context's end. Raises ValueError that names the argument.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._check_number("temperature", 0, MAX_TEMPERATURE)
        self._check_number("top_p", 0, 1, open_low=True)
        self._check_number("min_p", 0, 1)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_number("repetition_penalty", 0.01, 100)
        self._check_int("n", 1, MAX_N)
        self._check_int("top_k", -1, INT32_MAX)
        self._check_int("min_tokens", 0, INT32_MAX)
        for name, low in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                self._check_int(name, low, INT32_MAX)
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError("stop must hold non-empty strings")
        if stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        object.__setattr__(self, "stop", stop)
        stop_ids = tuple(self.stop_token_ids or ())
        if not all(isinstance(token, int) and token >= 0 for token in stop_ids):
            raise ValueError("stop_token_ids must hold token ids of at least 0")
        object.__setattr__(self, "stop_token_ids", stop_ids)
        if self.logit_bias is not None:
            self._check_logit_bias()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def _check_logit_bias(self) -> None:
        bias: dict[int, float] = {}
        for token, value in dict(self.logit_bias or {}).items():
            try:
                bias[int(token)] = float(value)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"logit_bias: {token!r}: {value!r} is not a token id with a number") from None
            if not -100 <= bias[int(token)] <= 100:
                raise ValueError(f"logit_bias of token {token} must be in [-100, 100], got {value}")
        object.__setattr__(self, "logit_bias", bias)

    def _check_number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or value > high or value < low or (open_low and value == low):
            raise ValueError(f"{name} must be a number in {'(' if open_low else '['}{low}, {high}], got {value!r}")

    def _check_int(self, name: str, low: int, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
