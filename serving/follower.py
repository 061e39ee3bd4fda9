"""What runs in every process but the first: the same engine, moved by the turns that process 0 tells."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax

from paddock.model import Dims

from .broadcast import Follower, Leader
from .build import Built, build
from .engine_config import EngineConfig
from .errors import EngineDead
from .kv_cache import page_bytes
from .platform import prepare
from .processes import Processes
from .resolve import Resolved, resolve
from .turn import Lockstep, Turn

logger = logging.getLogger("paddock")

# Options that are each process's own.
OWN = frozenset({"coordinator_address", "num_processes", "process_id", "broadcast_port", "compile_cache_dir"})


def follow(config: EngineConfig, *, on_ready: Callable[[], None] = lambda: None, progress: bool = False) -> None:
    """Take part in process 0's engine until it ends; `on_ready` is called when its first step may come.

    Ends this program with exit code 1 if process 0 just vanishes.

    Raises ValueError as `build` does, and for options unlike process 0's; OutOfStep or EngineDead when the engine
    cannot go on, which ends the other processes too. After an error the program should end by `os._exit`: what JAX does
    at exit waits for processes that are gone.
    """
    processes = Processes.of(config)
    if processes is None or not processes.index:
        raise ValueError("only processes with a process_id above 0 follow")
    link = Follower(processes, config.heartbeat_timeout_seconds, _exit)
    try:
        link.join(shared_options(config))
        built = build_together(config, link, progress=progress)
        logger.info("process %d of %d follows process 0", processes.index, processes.count)
        lockstep = Lockstep(built.engine)
        on_ready()
        while (message := link.receive())["kind"] == "turn":
            lockstep.take(Turn.from_dict(message))
            result = lockstep.run()
            if result.error:
                raise EngineDead(f"a step failed: {result.error}")
    except BaseException as error:
        link.fail(f"{type(error).__name__}: {error}")
        raise
    jax.block_until_ready(built.executor.state)
    link.bye()
    logger.info("process 0 has ended; so does process %d", processes.index)
    built.engine.close()
    built.executor.release()
    processes.leave()


def build_together(config: EngineConfig, link: Leader | Follower, *, progress: bool = False) -> Built:
    """`build` in each of several processes, with as many pages as fit everywhere. Raises ValueError, in all of them, if
    they came to different engines: another checkpoint on one host, say."""
    prepare(config)
    if config.kv_cache_memory_bytes is None:
        resolved = resolve(config)
        plan = resolved.plan
        per_page = page_bytes(Dims.of(resolved.model, plan.layout), plan.layout, plan.page_size, resolved.dtype)
        num_bytes = min(link.exchange(resolved.num_pages * per_page))
        config = dataclasses.replace(config, kv_cache_memory_bytes=num_bytes)
    built = build(config, progress=progress)
    first, *others = link.exchange(_facts(built.resolved))
    for index, facts in enumerate(others, 1):
        for name, value in facts.items():
            if value != first[name]:
                raise ValueError(
                    f"the processes disagree about {name}: it is {first[name]} in process 0, {value} in {index}"
                )
    return built


def shared_options(config: EngineConfig) -> dict[str, Any]:
    """What must be the same in all processes."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in OWN}
    return {**options, "the version of JAX": jax.__version__}


def _facts(resolved: Resolved) -> dict[str, str]:
    """What an engine depends on and options alone do not say."""
    plan = {field.name: getattr(resolved.plan, field.name) for field in dataclasses.fields(resolved.plan)}
    layout = plan.pop("layout")
    facts = {
        **plan,
        "mesh": dict(layout.mesh.shape),
        "rules": layout.rules,
        "dtype": resolved.dtype,
        "num_pages": resolved.num_pages,
        "max_model_len": resolved.max_model_len,
        "end-of-sequence tokens": sorted(resolved.generation.eos_token_ids),
    }
    return {name: repr(value) for name, value in facts.items()}


def _exit(message: str) -> None:
    """Process 0 is gone, and the main thread may hang in a step of which a part will never run."""
    logger.critical("%s; this process ends, too", message)
    sys.stderr.flush()
    os._exit(1)
