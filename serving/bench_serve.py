"""`paddock bench serve`: a running server under a stream of arrivals, over HTTP as its users see it."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .bench_report import Timing, report, summary
from .bench_workload import Job, Workload, parse_lengths, poisson_arrivals, random_prompt, read_trace

TIMEOUT_SECONDS = 600.0
DEFAULT_NUM_PROMPTS = 100


class Server:
    """The HTTP side. Raises ValueError for a URL that is none or a server that does not answer."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"--base-url must be http://HOST:PORT, got {base_url!r}")
        self._connect = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._address, self._path = (url.hostname, url.port), url.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        try:
            with self._request("GET", "/v1/models") as response:
                (self.card,) = json.loads(response.read())["data"]
        except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as error:
            raise ValueError(f"{base_url} does not answer as an OpenAI-compatible server: {error!r}") from error

    def complete(self, prompt: list[int], output_len: int) -> Timing:
        """One streamed completion of exactly `output_len` tokens. Raises RuntimeError if the server refuses it."""
        body = {
            "model": self.card["id"],
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.monotonic()
        times, tokens = [], 0
        with self._request("POST", "/v1/completions", json.dumps(body)) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"]:
                    times.append(time.monotonic())
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        if not times or not tokens:
            raise RuntimeError("the stream ended without a token")
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Timing(len(prompt), tokens, times[0] - start, times[-1] - start, gaps)

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect(*self._address, timeout=TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, self._path + path, body, self._headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
                yield response


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for bad options or when no request succeeded."""
    server = Server(args.base_url, args.api_key or os.environ.get("PADDOCK_API_KEY"))
    jobs = _jobs(args)
    fitting = [job for job in jobs if job.input_len + job.output_len <= server.card.get("max_model_len", sys.maxsize)]
    if len(fitting) < len(jobs):
        print(f"{len(jobs) - len(fitting)} requests are longer than the server's context and left out", file=sys.stderr)
    vocab_size = server.card.get("vocab_size")
    if vocab_size is None:
        raise ValueError(f"{args.base_url} does not say its vocab_size in /v1/models, so no prompt can be drawn")
    result = measure(server, fitting, vocab_size, args.seed, args.max_concurrency)
    head = {"benchmark": "serve", "model": server.card["id"], "base_url": args.base_url}
    report(f"Serving {server.card['id']}", {**head, "left_out": len(jobs) - len(fitting), **result})
    return 0


def measure(
    server: Server, jobs: Sequence[Job], vocab_size: int, seed: int, max_concurrency: int | None = None
) -> dict[str, Any]:
    """Send each job at its arrival time; a latency counts from when it was sent."""
    draw = random.Random(seed)
    prompts = [random_prompt(job, vocab_size, draw) for job in jobs]
    timings: list[Timing] = []
    errors: list[str] = []
    turns = threading.Semaphore(max_concurrency or len(jobs) or 1)

    def one(job: Job, prompt: list[int]) -> None:
        try:
            timings.append(server.complete(prompt, job.output_len))
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            errors.append(str(error))
        finally:
            turns.release()

    start = time.monotonic()
    threads = []
    for job, prompt in zip(jobs, prompts, strict=True):
        time.sleep(max(0.0, start + job.arrival - time.monotonic()))
        turns.acquire()
        threads.append(threading.Thread(target=one, args=(job, prompt)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if errors:
        print(f"{len(errors)} requests failed; the first: {errors[0]}", file=sys.stderr)
    return {"failed": len(errors), **summary(timings, time.monotonic() - start)}


def _jobs(args: argparse.Namespace) -> list[Job]:
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ValueError(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
    if args.trace:
        return read_trace(Path(args.trace), args.speed, args.num_prompts)
    lengths = parse_lengths(args.input_len, "--input-len"), parse_lengths(args.output_len, "--output-len")
    workload = Workload(DEFAULT_NUM_PROMPTS if args.num_prompts is None else args.num_prompts, *lengths)
    return poisson_arrivals(workload.jobs(args.seed), args.request_rate, args.seed)
