"""Which replica a prompt goes to, by hand-made loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from paddock.serving.routing import PREFIX_TOKENS, SMALL_BATCH, ReplicaLoad, home_of, route

IDLE = ReplicaLoad(0, 256)


def prompts(count: int, length: int = 40) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 128_256, (count, length)).tolist()


def prompt_at_home(replica: int, num_replicas: int) -> list[int]:
    return next(prompt for prompt in prompts(100) if home_of(prompt, num_replicas) == replica)


def test_the_home_is_the_same_in_every_process() -> None:
    """Python's own hash of bytes differs from one start to the next."""
    code = "from paddock.serving.routing import home_of; print(home_of([1, 2, 3], 1 << 40))"
    environ = os.environ | {"PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert int(done.stdout) == home_of([1, 2, 3], 1 << 40) == 409973726422, done.stderr


def test_only_the_first_tokens_count() -> None:
    prefix = prompts(1, PREFIX_TOKENS)[0]
    homes = {home_of(prefix + tail, 1 << 40) for tail in prompts(20)}
    assert homes == {home_of(prefix, 1 << 40)}
    assert len({home_of([*prefix[:-1], last], 1 << 40) for last in range(20)}) == 20


def test_idle_replicas_share_prompts_by_their_homes() -> None:
    many = prompts(1000)
    chosen = [route(prompt, [IDLE] * 4) for prompt in many]
    assert chosen == [home_of(prompt, 4) for prompt in many]
    assert all(200 < count < 300 for count in Counter(chosen).values())
    assert len(Counter(chosen)) == 4


@pytest.mark.parametrize(
    ("home", "others", "moves"),
    [
        (ReplicaLoad(SMALL_BATCH - 1, 256), 0, False),
        (ReplicaLoad(SMALL_BATCH, 256), 0, True),
        (ReplicaLoad(44, 256), 34, False),  # the mean is 36.5, and 1.25 times that 45.6
        (ReplicaLoad(47, 256), 34, True),
        (ReplicaLoad(3, 4), 4, False),
        (ReplicaLoad(4, 4), 4, False),  # full, but so are the others, and none has fewer
        (ReplicaLoad(4, 4), 3, True),
        (ReplicaLoad(2, 256, cache_usage=0.89), 1, False),
        (ReplicaLoad(2, 256, cache_usage=0.9), 1, True),
        (ReplicaLoad(1, 256, stalled=True), 5, True),
    ],
)
def test_an_overloaded_home_gives_its_prompt_away(home: ReplicaLoad, others: int, moves: bool) -> None:
    loads = [home, *[ReplicaLoad(others, home.num_slots)] * 3]
    assert route(prompt_at_home(0, 4), loads) == int(moves)


def test_the_least_loaded_takes_what_others_cannot() -> None:
    full, prompt = ReplicaLoad(256, 256), prompt_at_home(0, 4)
    assert route(prompt, [full, ReplicaLoad(9, 256), ReplicaLoad(7, 256), ReplicaLoad(8, 256)]) == 2
    assert route(prompt, [full, ReplicaLoad(7, 256), ReplicaLoad(7, 256), ReplicaLoad(8, 256)]) == 1
    assert route(prompt, [full, ReplicaLoad(0, 256, cache_usage=1.0), full, ReplicaLoad(200, 256)]) == 3
    assert route(prompt, [ReplicaLoad(n, 4) for n in (9, 8, 7, 7)]) == 2, "all are full"


def test_the_dead_get_nothing_and_nobody_else_moves() -> None:
    many = prompts(300)
    for prompt in many:
        chosen = route(prompt, [IDLE, None, IDLE, ReplicaLoad(1, 256)])
        assert chosen == (0 if home_of(prompt, 4) == 1 else home_of(prompt, 4))
        assert route(prompt, [None, None, ReplicaLoad(256, 256), None]) == 2
    assert route(many[0], [None, None]) is None


def test_a_burst_fills_every_replica_equally() -> None:
    """More prompts than may run at once, all of them with the same beginning."""
    prefix, counts = prompts(1, PREFIX_TOKENS)[0], [0] * 4
    for _ in range(4000):
        index = route(prefix, [ReplicaLoad(count, 256) for count in counts])
        assert index is not None
        counts[index] += 1
    assert max(counts) - min(counts) <= 1
