"""Kernels that are launched while the one before them ends: programmatic dependent launch, where JAX has it and the
kernel is no part of a command buffer."""

from __future__ import annotations

from jax.experimental.pallas import mosaic_gpu as plgpu


def await_kernel_before(interpret: bool) -> None:
    """In a kernel, before memory is read or written that others have to do with: wait until they are through.

    A kernel that says so is launched early, which alone is 1 to 2 us less each (H100). Some threads of a block may say
    it for all, if the others do nothing before those let them. The interpreter knows no such thing.
    """
    if not interpret:
        plgpu.griddepcontrol_wait()


def launch_kernel_after(interpret: bool) -> None:
    """In a kernel, as soon as it runs: the next one's blocks may start wherever there is room for them.

    What they do before `await_kernel_before` can rely on nothing but what no step changes, such as weights: of the
    kernels before, any may still be running.
    """
    if not interpret:
        plgpu.griddepcontrol_launch_dependents()
