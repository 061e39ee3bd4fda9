"""Prometheus metrics under vLLM's names, so that existing dashboards work.

The step loop counts into plain Python lists under one lock, a third of the time that prometheus_client's own histograms
take (0.5 against 1.7 us a token, and a step has hundreds); prometheus_client makes the text when someone scrapes. What
comes with each step is noted, and counted many steps at once or before somebody looks: caches are cold after each wait
for the device, and counting one step then takes ten times as long as it does after another.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .outputs import RequestTimes

MetricFamily = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

LABELS = ("model_name", "engine")
SHORT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
LONG_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKENS = tuple(float(2**power) for power in range(0, 18))
FINISH_REASONS = ("stop", "length", "abort")
# Notes that are counted at once.
MOST_NOTES = 256


class Histogram:
    """Counts of values per bucket; `bounds` are inclusive upper ends, in the unit of the values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def samples(self) -> list[tuple[str, float]]:
        """(upper end, number of values up to it) pairs, as the exposition format wants them."""
        total, pairs = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            pairs.append((floatToGoString(bound), float(total)))
        return pairs


class Metrics:
    """What one engine did; every method may be called from any thread. Times are in seconds.

    engine: the index of its replica, a label of every metric. load: the values of GAUGES when somebody looks.
    """

    def __init__(
        self, model_name: str, engine: str = "0", load: Callable[[], tuple[float, ...]] = lambda: (0, 0, 0.0)
    ) -> None:
        self._labels = (model_name, engine)
        self._lock = threading.Lock()
        # Methods of ours and their arguments, to be called under the lock; to append needs none.
        self._notes: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._load = load
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}
        self._steps: dict[str, Histogram] = {}
        self._memory: dict[str, int] = {}
        self._cache_config: dict[str, str] = {}
        self._itl = self._histograms["vllm:inter_token_latency_seconds"]
        self._iteration = self._histograms["vllm:iteration_tokens_total"]

    def on_step(self, *, bucket: str, seconds: float, num_tokens: int, preemptions: int) -> None:
        """After a step: its executable, duration and tokens, the sequences it preempted."""
        self._notes.append((self._count_step, (bucket, seconds, num_tokens, preemptions)))
        if len(self._notes) >= MOST_NOTES:
            with self._lock:
                self._count_notes()

    def on_compile(self, count: int = 1) -> None:
        """A step executable was built."""
        self._count("paddock:step_compilations", count)

    def on_prompt(self, num_tokens: int) -> None:
        """Prompt tokens were computed."""
        self._count("vllm:prompt_tokens", num_tokens)

    def on_tokens(self, num_tokens: int, gaps: Mapping[float, int]) -> None:
        """Tokens came out of the step that `on_step` told of; `gaps`: how many of them how many seconds after the one
        before. Noted alone: `on_step` counts."""
        self._notes.append((self._count_tokens, (num_tokens, gaps)))

    def on_first_token(self, seconds: float) -> None:
        """A sequence's first token came, `seconds` after its arrival."""
        self._observe("vllm:time_to_first_token_seconds", seconds)

    def on_finish(
        self, times: RequestTimes, finished: float, prompt_tokens: int, generation_tokens: int, reason: str
    ) -> None:
        """A request ended for `reason` (stop, length or abort) at the monotonic time `finished`."""
        with self._lock:
            self._finished[reason] = self._finished.get(reason, 0) + 1
            for name, start, end in (
                ("vllm:e2e_request_latency_seconds", times.arrival, finished),
                ("vllm:request_queue_time_seconds", times.arrival, times.scheduled),
                ("vllm:request_prefill_time_seconds", times.scheduled, times.first_token),
                ("vllm:request_decode_time_seconds", times.first_token, times.last_token),
                ("vllm:request_inference_time_seconds", times.scheduled, times.last_token),
            ):
                if start is not None and end is not None:
                    self._histograms[name].observe(end - start)
            self._histograms["vllm:request_prompt_tokens"].observe(prompt_tokens)
            self._histograms["vllm:request_generation_tokens"].observe(generation_tokens)

    def on_rejected(self) -> None:
        """A request was refused because the queue was full."""
        self._count("vllm:admission_rejections", 1)

    def set_memory(self, kind: str, num_bytes: int) -> None:
        """Bytes of device memory held by `kind`: weights, kv_cache, ..."""
        with self._lock:
            self._memory[kind] = num_bytes

    def set_cache_config(self, **labels: object) -> None:
        """What the cache looks like (block_size, num_gpu_blocks, ...): labels of a gauge that is always 1."""
        with self._lock:
            self._cache_config = {name: str(value) for name, value in labels.items()}

    def families(self) -> list[MetricFamily]:
        """Everything as it is now, always in the same order."""
        with self._lock:
            self._count_notes()
            return list(self._families())

    def _families(self) -> Iterator[MetricFamily]:
        for (name, text), value in zip(GAUGES.items(), self._load(), strict=True):
            yield self._one(GaugeMetricFamily(name, text, labels=LABELS), value)
        for name, text in COUNTERS.items():
            yield self._one(CounterMetricFamily(name, text, labels=LABELS), self._counters[name])
        success = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=(*LABELS, "finished_reason"))
        for reason, count in self._finished.items():
            success.add_metric((*self._labels, reason), count)
        yield success
        for name, (_, text) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=LABELS)
            histogram = self._histograms[name]
            family.add_metric(self._labels, histogram.samples(), histogram.sum)
            yield family
        steps = HistogramMetricFamily("paddock:step_seconds", "Duration of a step.", labels=(*LABELS, "bucket"))
        for bucket, histogram in self._steps.items():
            steps.add_metric((*self._labels, bucket), histogram.samples(), histogram.sum)
        yield steps
        memory = GaugeMetricFamily("paddock:hbm_bytes", "Device memory by use.", labels=(*LABELS, "kind"))
        for kind, num_bytes in self._memory.items():
            memory.add_metric((*self._labels, kind), num_bytes)
        yield memory
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache's shape.", labels=(*LABELS, *self._cache_config)
        )
        config.add_metric((*self._labels, *self._cache_config.values()), 1)
        yield config

    def _one(self, family: CounterMetricFamily | GaugeMetricFamily, value: float) -> MetricFamily:
        family.add_metric(self._labels, value)
        return family

    def _count_notes(self) -> None:
        while self._notes:
            method, arguments = self._notes.popleft()
            method(*arguments)

    def _count_step(self, bucket: str, seconds: float, num_tokens: int, preemptions: int) -> None:
        steps = self._steps.get(bucket)
        if steps is None:
            steps = self._steps[bucket] = Histogram(SHORT_SECONDS)
        steps.observe(seconds)
        self._iteration.observe(num_tokens)
        self._counters["vllm:num_preemptions"] += preemptions

    def _count_tokens(self, num_tokens: int, gaps: Mapping[float, int]) -> None:
        self._counters["vllm:generation_tokens"] += num_tokens
        for seconds, count in gaps.items():
            self._itl.observe(seconds, count)

    def _count(self, name: str, count: int) -> None:
        with self._lock:
            self._counters[name] += count

    def _observe(self, name: str, value: float) -> None:
        with self._lock:
            self._histograms[name].observe(value)


class MetricsPage(Collector):
    """The metrics of several engines on one page: a family for each name, with every engine's samples in it."""

    def __init__(self, engines: Sequence[Metrics]) -> None:
        self.engines = tuple(engines)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The text exposition format, for `/metrics`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[MetricFamily]:
        for first, *others in zip(*(engine.families() for engine in self.engines), strict=True):
            for other in others:
                first.samples += other.samples
            yield first

    def describe(self) -> Iterator[MetricFamily]:
        return iter(())  # nothing to check for duplicates: the registry holds this collector alone


GAUGES = {
    "vllm:num_requests_running": "Sequences in the running batch.",
    "vllm:num_requests_waiting": "Sequences waiting to be scheduled.",
    "vllm:kv_cache_usage_perc": "Share of KV cache pages in use; 1 is all of them.",
}
# Exposed with `_total` at the end.
COUNTERS = {
    "vllm:num_preemptions": "Sequences put back to waiting because pages ran out.",
    "vllm:prompt_tokens": "Prompt tokens computed.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:admission_rejections": "Requests refused because the queue was full.",
    "paddock:step_compilations": "Step executables built; flat after warm-up.",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": (LONG_SECONDS, "From arrival to the first token."),
    "vllm:inter_token_latency_seconds": (SHORT_SECONDS, "Between two tokens of a sequence."),
    "vllm:e2e_request_latency_seconds": (LONG_SECONDS, "From arrival to the end."),
    "vllm:request_queue_time_seconds": (LONG_SECONDS, "From arrival to the first step."),
    "vllm:request_inference_time_seconds": (LONG_SECONDS, "From the first step to the last token."),
    "vllm:request_prefill_time_seconds": (LONG_SECONDS, "From the first step to the first token."),
    "vllm:request_decode_time_seconds": (LONG_SECONDS, "From the first token to the last."),
    "vllm:request_prompt_tokens": (TOKENS, "Prompt tokens of a request."),
    "vllm:request_generation_tokens": (TOKENS, "Generated tokens of a request."),
    "vllm:iteration_tokens_total": (TOKENS, "Tokens computed in a step."),
}
