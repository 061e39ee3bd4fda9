"""The process that lowers steps: `python -m paddock.serving.export_worker FD` reads an `ExportJob` from standard input
and writes its `Exported` steps, one after the other, to the file FD; both pickled, from one user's process to another.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
from typing import Any

import jax

from paddock.sharding import Layout, MeshConfig

from .exporter import ExportJob
from .lifeline import end_with_parent
from .programs import Programs
from .step_plan import StepPlan


def main(channel: int) -> int:
    job: ExportJob = pickle.load(sys.stdin.buffer)
    end_with_parent()
    with os.fdopen(channel, "wb") as answers:
        try:
            programs = programs_of(job)
            for bucket in job.buckets:
                # Its derivative is a closure, which no step has a use for.
                answer: Any = dataclasses.replace(programs.export(bucket, job.platform), _get_vjp=None)
                pickle.dump(answer, answers)
                answers.flush()
        except Exception as error:
            pickle.dump(RuntimeError(f"a step could not be lowered: {type(error).__name__}: {error}"), answers)
    return 0


def programs_of(job: ExportJob) -> Programs:
    """The programs over CPU devices, as many as there are: what is lowered names no device."""
    for name, value in job.settings.items():
        # A plugin, of an accelerator that is not here, may have brought settings of its own.
        if jax.config.values.get(name, value) != value:
            jax.config.update(name, value)
    layout = Layout(MeshConfig(job.axes).build(), job.rules)
    return Programs(StepPlan(layout=layout, **job.plan), **job.programs)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
