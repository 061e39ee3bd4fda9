"""From a config to an engine that is ready: load, compile, allocate."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax

from paddock.checkpoints import WeightsCache, load

from .bucket import BucketTable
from .chat_template import ChatTemplate
from .compiler import Compiler, CompileReport
from .engine import Engine, Limits
from .engine_config import EngineConfig
from .executor import Executor
from .exporter import Exporter, choose_processes
from .page_pool import PagePool
from .platform import cache_dir, prepare
from .program_cache import ProgramCache
from .programs import Programs
from .resolve import Resolved, resolve
from .scheduler import Scheduler
from .tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("paddock")


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine with what belongs to it. `startup_seconds`: how long each phase took; `compiling`: its longest."""

    resolved: Resolved
    engine: Engine
    executor: Executor
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    startup_seconds: dict[str, float]
    compiling: CompileReport


def build(
    config: EngineConfig,
    *,
    replica: int = 0,
    progress: bool = False,
    buckets: BucketTable | None = None,
    make: type[Compiler] = Compiler,
) -> Built:
    """The engine of one replica. `buckets`, instead of the engine's own, and `make` are for those who run few steps.

    Raises ValueError (CheckpointError among them) naming what cannot be had.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        logger.info("%s: %.1f s", name, seconds[name])

    with phase("resolve"):
        prepare(config)
        resolved = resolve(config, replica=replica)
        if buckets is not None:
            resolved = dataclasses.replace(resolved, buckets=buckets)
        tokenizer, chat_template = _text_side(config, resolved)
    if config.cache_weights and jax.process_count() > 1:
        raise ValueError("cache_weights is for one process; over several give each an Orbax folder (paddock convert)")
    exporter = _exporter(config, resolved.programs, replica)
    with exporter or nullcontext():
        compiler = make(_program_cache(config, resolved.programs), exporter, progress=progress)
        compiler.foresee(resolved.programs.jobs())
        with phase("load"):
            params = load(
                resolved.folder or Path(),
                resolved.model,
                resolved.plan.layout,
                resolved.dtype,
                config.load_format,
                seed=config.seed,
                progress=progress,
                cache=WeightsCache(cache_dir(config) / "weights") if config.cache_weights else None,
            )
        with phase("compile"):
            executor, report = Executor(resolved.programs, params, compiler), compiler.report
    made = report.num_lowered, report.num_compiled
    logger.info("%d programs found on disk, %d lowered, of which %d compiled", report.num_found, *made)
    scheduler = Scheduler(
        [PagePool(resolved.num_pages, resolved.page_size) for _ in range(resolved.plan.num_partitions)],
        max_num_seqs=resolved.plan.num_slots,
        max_num_batched_tokens=resolved.plan.max_chunk_tokens,
        max_chunks=resolved.buckets.max_chunks,
        num_stages=resolved.plan.stages.count,
        chunk_sizes=resolved.buckets.chunk_tokens,
    )
    limits = Limits(
        vocab_size=resolved.model.vocab_size,
        max_model_len=resolved.max_model_len,
        max_logprobs=resolved.plan.num_logprobs,
        eos_token_ids=frozenset(resolved.generation.eos_token_ids),
        seed=config.seed,
    )
    return Built(resolved, Engine(executor, scheduler, limits), executor, tokenizer, chat_template, seconds, report)


def _program_cache(config: EngineConfig, programs: Programs) -> ProgramCache | None:
    """None over several processes: one of them alone may compile, or find, what is the others' too. None on a CPU: what
    its compiler has written once in a while loads and then lacks functions (JAX 0.10.2); JAX's own cache serves there.
    """
    if jax.process_count() > 1 or programs.plan.layout.mesh.devices.flat[0].platform == "cpu":
        return None
    return ProgramCache(cache_dir(config) / "programs", list(programs.plan.layout.mesh.devices.flat), programs.facts())


def _exporter(config: EngineConfig, programs: Programs, replica: int) -> Exporter | None:
    """The first replica starts alone, the others at a time. Raises ValueError for processes that lower beside others
    that run the engine together."""
    if jax.process_count() > 1:
        if config.lowering_processes:
            raise ValueError("lowering_processes is for one process: an engine over several lowers in each of them")
        return None
    others = config.layout_text.mesh_config(jax.device_count()).num_replicas - 1 if replica else 1
    platform = programs.plan.layout.mesh.devices.flat[0].platform
    count = choose_processes(config.lowering_processes, platform, sharing=others)
    return Exporter(programs, count) if count else None


def _text_side(config: EngineConfig, resolved: Resolved) -> tuple[Tokenizer | None, ChatTemplate | None]:
    folder = Path(config.tokenizer) if config.tokenizer else resolved.folder
    if config.skip_tokenizer_init or folder is None:
        return None, None
    tokenizer = load_tokenizer(folder)
    return tokenizer, ChatTemplate.load(folder, tokenizer, config.chat_template)
