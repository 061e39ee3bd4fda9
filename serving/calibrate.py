"""`paddock plan --calibrate`: the speeds of the machine at hand, measured by its own steps and written as a profile.

Whole compiled steps are timed rather than kernels alone: two depths and two widths of a model tell apart what layers,
their products, the head and the rest of a step take, whichever kernels the engine runs (see calibrate_fit.py).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from paddock.model import LlamaConfig
from paddock.sharding import Layout, MeshConfig
from paddock.sharding.accelerators import accelerators

from .calibrate_fit import Depths, fit_device, fit_stages, fit_tensor
from .ruler import CPU, GPU, Point, Ruler
from .speed_profile import Curve, SpeedProfile, read_profile
from .step_replay import Sizes, StepReplay, timed_steps
from .timed_engine import TimedEngine


def ruler() -> Ruler:
    return CPU if jax.default_backend() == "cpu" else GPU


def accelerator_here() -> str:
    """The name in the table of accelerators of the devices that are here, or what they call themselves."""
    kind = jax.devices()[0].device_kind
    return next((card.name for card in accelerators().values() if card.device_kind == kind), kind)


def calibrate(path: Path, note: Callable[[str], None], using: Ruler | None = None) -> SpeedProfile:
    """Measure what the profile `path` lacks, and write it there after each part: first of one device alone, then of
    every power of two of those that are here. A part that fails is noted and left out.

    Raises ValueError for a file of another accelerator, OSError where it cannot be written, RuntimeError when nothing
    could be measured.
    """
    using, name = using or ruler(), accelerator_here()
    profile = read_profile(path) if path.exists() else SpeedProfile(name)
    if profile.accelerator != name:
        raise ValueError(f"{path} is the profile of {profile.accelerator}, but this machine has {name}")
    failure: Exception | None = None
    for what, measure in _parts(profile, using):
        start = time.perf_counter()
        try:
            profile = measure(profile)
        except Exception as error:  # the other parts may well be had
            failure = error
            note(f"{what}: failed, {type(error).__name__}: {error}")
        else:
            path.write_text(f"# {_origin()}\n{profile.to_toml()}", encoding="utf-8")
            note(f"{what}: {time.perf_counter() - start:.1f} s")
    if failure is not None and profile == SpeedProfile(name):
        raise RuntimeError("nothing could be measured") from failure
    return profile


def _parts(profile: SpeedProfile, using: Ruler) -> Iterator[tuple[str, Callable[[SpeedProfile], SpeedProfile]]]:
    """What `profile` lacks, each with the function that adds it."""
    if profile.copy is None:
        yield "copy bandwidth", lambda known: dataclasses.replace(known, copy=copy_bandwidth(using.copy_bytes))
    if profile.layer is None:
        yield "steps of one device", lambda known: _with_device(known, using)
    if profile.host is None:
        yield "host", lambda known: _with_host(known, using)
    devices = 2
    while devices <= jax.device_count():
        if devices not in profile.all_reduce:
            yield f"tensor={devices}", functools.partial(_with_tensor, using=using, devices=devices)
        if devices not in profile.hop:
            yield f"pipe={devices}", functools.partial(_with_stages, using=using, devices=devices)
        devices *= 2


def _with_device(known: SpeedProfile, using: Ruler) -> SpeedProfile:
    narrow = _depths(using, using.narrow, using.narrow_layers, "", long=True)
    wide = _depths(using, using.wide, using.wide_layers, "")
    found = fit_device(known.accelerator, using.dtype, narrow, wide, using.base, using.long, using.starts)
    kept = {name: getattr(known, name) for name in ("copy", "host", "host_layer", "all_reduce", "vocab", "hop")}
    return dataclasses.replace(found, **kept, fitted=(*known.fitted, *_names(narrow, ""), *_names(wide, "")))


def _with_host(known: SpeedProfile, using: Ruler) -> SpeedProfile:
    """An engine's loop over steps that take the device no time."""
    rows = (using.rows[0], using.rows[-1])
    seconds: dict[int, list[float]] = {}
    for layers in using.host_layers:
        model = dataclasses.replace(using.host, num_layers=layers)
        engine = TimedEngine(model, batches=rows, prompts=(using.chunks[-1],), max_model_len=512, dtype=using.dtype)
        try:
            seconds[layers] = [engine.decode(count, 64, steps=64).seconds for count in rows]
        finally:
            engine.close()
    few, many = using.host_layers
    grown = sum(b - a for a, b in zip(seconds[few], seconds[many], strict=True)) / len(rows)
    host_layer = max(grown, 0.0) / (many - few)
    host = Curve(rows, tuple(max(one - few * host_layer, 0.0) for one in seconds[few]))
    return dataclasses.replace(known, host=host, host_layer=host_layer)


def _with_tensor(known: SpeedProfile, using: Ruler, devices: int) -> SpeedProfile:
    depths = _depths(using, using.narrow, using.narrow_layers, f"tensor={devices}")
    found = fit_tensor(known, using.dtype, devices, depths)
    return dataclasses.replace(found, fitted=(*known.fitted, *_names(depths, f"tensor={devices}")))


def _with_stages(known: SpeedProfile, using: Ruler, devices: int) -> SpeedProfile:
    if devices not in known.vocab:
        raise ValueError(f"what a split vocabulary takes over {devices} devices is not known")
    model, mesh = dataclasses.replace(using.narrow, num_layers=using.narrow_layers[0] * devices), f"pipe={devices}"
    ticks = _timed(using, model, mesh, using.short_points)
    found = fit_stages(known, using.dtype, devices, model, ticks)
    return dataclasses.replace(found, fitted=(*known.fitted, *(point_name(model, mesh, point) for point in ticks)))


def _depths(using: Ruler, model: LlamaConfig, layers: tuple[int, int], mesh: str, *, long: bool = False) -> Depths:
    shallow, deep = (dataclasses.replace(model, num_layers=count) for count in layers)
    points = using.short_points
    shallow_times = _timed(using, shallow, mesh, points)
    return Depths(shallow, deep, shallow_times, _timed(using, deep, mesh, points + using.long_points * long))


def _timed(using: Ruler, model: LlamaConfig, mesh: str, points: list[Point]) -> dict[Point, float]:
    tokens = max(max(count * end for kind, count, end in points if kind == "decode"), using.context)
    replay = StepReplay(
        model,
        Layout.build(mesh, devices=jax.devices()[: MeshConfig.parse(mesh).num_devices]),
        using.dtype,
        Sizes(using.rows, using.chunks, using.context, tokens),
    )
    try:
        return timed_steps(replay, points)
    finally:
        replay.close()


def _names(depths: Depths, mesh: str) -> Iterator[str]:
    for model, times in ((depths.shallow, depths.shallow_times), (depths.deep, depths.deep_times)):
        yield from (point_name(model, mesh, point) for point in times)


def point_name(model: LlamaConfig, mesh: str, point: Point) -> str:
    """A step as a profile names it: those that it was fitted to are no test of it."""
    kind, count, context = point
    what = f"{count} rows at {context}" if kind == "decode" else f"{count} tokens after {context}"
    return f"{model.embed_dim}x{model.mlp_dim}x{model.num_layers} on {mesh or 'one device'}: {what}"


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second, read and written together, of the best of five runs of ten copies."""
    source = jnp.zeros(num_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(source).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([copy(source) for _ in range(10)])
        times.append((time.perf_counter() - start) / 10)
    return 2 * source.nbytes / min(times)


def _origin() -> str:
    kind, day = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return f"Measured on {kind} by paddock plan --calibrate, JAX {jax.__version__}, {day}."
