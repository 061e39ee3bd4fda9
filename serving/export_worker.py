"""The process that lowers steps: `python -m paddock.serving.export_worker` reads an `ExportJob` from standard input and
writes its `Exported` steps, one after the other, to standard output; both pickled, from one user's process to another.
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
from .programs import Programs
from .step_plan import StepPlan


def main() -> int:
    # Libraries print; the answers have a channel of their own.
    with os.fdopen(os.dup(1), "wb") as channel:
        os.dup2(2, 1)
        job: ExportJob = pickle.load(sys.stdin.buffer)
        programs = programs_of(job)
        try:
            for bucket in job.buckets:
                # Its derivative is a closure, which no step has a use for.
                answer: Any = dataclasses.replace(programs.export(bucket, job.platform), _get_vjp=None)
                pickle.dump(answer, channel)
                channel.flush()
        except Exception as error:
            pickle.dump(RuntimeError(f"{type(error).__name__}: {error}"), channel)
    return 0


def programs_of(job: ExportJob) -> Programs:
    """The programs over CPU devices, as many as there are: what is lowered names no device."""
    for name, value in job.settings.items():
        jax.config.update(name, value)
    layout = Layout(MeshConfig(job.axes).build(), job.rules)
    return Programs(StepPlan(layout=layout, **job.plan), **job.programs)


if __name__ == "__main__":
    sys.exit(main())
