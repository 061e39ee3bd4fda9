"""The text that Prometheus scrapes: names, labels and values after a known sequence of events."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paddock.serving.metrics import MOST_NOTES, Metrics, MetricsPage
from paddock.serving.outputs import RequestTimes

LABELS = {"model_name": "demo", "engine": "0"}


def scrape(*engines: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(MetricsPage(engines).render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return scrape(metrics)[name, tuple(sorted((LABELS | labels).items()))]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("demo")


def step(metrics: Metrics, **changes: object) -> None:
    known = dict(bucket="8", seconds=0.004, num_tokens=3, preemptions=0)
    metrics.on_step(**(known | changes))  # type: ignore[arg-type]


def test_fresh_metrics_expose_every_name_at_zero(metrics):
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:admission_rejections_total",
        "paddock:step_compilations_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_inference_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "vllm:request_prompt_tokens_count",
        "vllm:request_generation_tokens_count",
        "vllm:iteration_tokens_total_count",
    ):
        assert value(metrics, name) == 0, name
    for reason in ("stop", "length", "abort"):
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 0


def test_a_step_is_in_the_histogram_of_its_bucket(metrics):
    step(metrics, preemptions=2)
    step(metrics, bucket="16", seconds=0.5, num_tokens=10)
    assert value(metrics, "vllm:num_preemptions_total") == 2
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 13
    assert value(metrics, "paddock:step_seconds_count", bucket="8") == 1
    assert value(metrics, "paddock:step_seconds_sum", bucket="16") == 0.5


def test_as_many_steps_are_counted_as_were_noted(metrics):
    for _ in range(2 * MOST_NOTES + 3):
        step(metrics)
    assert value(metrics, "paddock:step_seconds_count", bucket="8") == 2 * MOST_NOTES + 3
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 3 * (2 * MOST_NOTES + 3)


def test_gauges_are_what_they_are_when_somebody_looks():
    load = [5, 1, 0.25]
    metrics = Metrics("demo", load=lambda: tuple(load))
    assert value(metrics, "vllm:num_requests_running") == 5
    assert value(metrics, "vllm:num_requests_waiting") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    load[0] = 0
    assert value(metrics, "vllm:num_requests_running") == 0


def test_histogram_buckets_are_cumulative_with_inclusive_ends(metrics):
    for seconds in (0.005, 0.0051, 0.02, 1000.0):
        metrics.on_first_token(seconds)
    name = "vllm:time_to_first_token_seconds_bucket"
    assert value(metrics, name, le="0.005") == 1
    assert value(metrics, name, le="0.02") == 3
    assert value(metrics, name, le="640.0") == 3
    assert value(metrics, name, le="+Inf") == 4


def test_tokens_and_compilations_are_counted(metrics):
    metrics.on_prompt(7)
    metrics.on_tokens(1, {})
    metrics.on_tokens(2, {0.01: 1})
    metrics.on_compile()
    metrics.on_compile(3)
    metrics.on_rejected()
    assert value(metrics, "vllm:prompt_tokens_total") == 7
    assert value(metrics, "vllm:generation_tokens_total") == 3
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 1
    assert value(metrics, "paddock:step_compilations_total") == 4
    assert value(metrics, "vllm:admission_rejections_total") == 1


def test_a_finished_request_is_split_into_its_phases(metrics):
    times = RequestTimes(arrival=10.0, scheduled=11.0, first_token=13.0, last_token=17.0)
    metrics.on_finish(times, 18.0, 5, 6, "length")
    expected = {
        "e2e_request_latency": 8.0,
        "request_queue_time": 1.0,
        "request_prefill_time": 2.0,
        "request_decode_time": 4.0,
        "request_inference_time": 6.0,
    }
    for name, seconds in expected.items():
        assert value(metrics, f"vllm:{name}_seconds_sum") == seconds, name
    assert value(metrics, "vllm:request_prompt_tokens_sum") == 5
    assert value(metrics, "vllm:request_generation_tokens_sum") == 6
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1


def test_a_request_aborted_while_waiting_has_only_an_end(metrics):
    metrics.on_finish(RequestTimes(arrival=1.0), 3.0, 5, 0, "abort")
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 2.0
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1


def test_memory_and_cache_config(metrics):
    metrics.set_memory("weights", 123)
    metrics.set_cache_config(block_size=16, num_gpu_blocks=40)
    assert value(metrics, "paddock:hbm_bytes", kind="weights") == 123
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="40") == 1


def test_two_engines_do_not_share_their_counts(metrics):
    metrics.on_prompt(1)
    assert value(Metrics("demo"), "vllm:prompt_tokens_total") == 0


def test_a_page_of_two_engines_names_each_metric_once_and_labels_its_samples(metrics):
    other = Metrics("demo", "1")
    metrics.on_prompt(3)
    other.on_prompt(4)
    other.on_first_token(0.2)
    step(other, bucket="64")
    found = scrape(metrics, other)
    labels = lambda engine, **more: tuple(sorted((LABELS | {"engine": engine} | more).items()))
    assert [found["vllm:prompt_tokens_total", labels(engine)] for engine in "01"] == [3, 4]
    assert [found["vllm:time_to_first_token_seconds_count", labels(engine)] for engine in "01"] == [0, 1]
    assert found["paddock:step_seconds_count", labels("1", bucket="64")] == 1
    assert ("paddock:step_seconds_count", labels("0", bucket="64")) not in found
    heads = [line for line in MetricsPage([metrics, other]).render().decode().splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)) > 20
