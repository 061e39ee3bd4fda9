"""What groups of sequences in flight are worth to a pipeline: tokens a second with one group, and with one a stage.

    python benchmarks/pipeline.py --mesh pipe=2
    python benchmarks/pipeline.py --mesh pipe=2 --model "" --load-format auto --max-model-len 512 --groups-of 1 2

Groups are of the same size in both runs (Llama Team 2024, figure 24, compares micro-batches so). A token of a group
takes as many ticks as there are stages either way; with one group all stages but one have nothing to do meanwhile.
The last line is JSON.
"""

from __future__ import annotations

import random
import statistics

from offline import as_program, check_seats, make_parser, open_llm, report, timed_batch

from paddock.serving import LLM
from paddock.serving.bench_workload import Job


def tokens_per_second(llm: LLM, groups: int, job: Job, size: int, reps: int, draw: random.Random) -> float:
    """Of `groups` groups of `size` sequences, after their first tokens."""
    scheduler = llm.engine.replicas[0].engine.scheduler
    usual, scheduler.num_groups = scheduler.num_groups, groups
    try:
        jobs, firsts = ([Job(job.input_len, n)] * (groups * size) for n in (job.output_len, 1))
        timed_batch(llm, jobs, draw)
        first = statistics.median(timed_batch(llm, firsts, draw) for _ in range(reps))
        total = statistics.median(timed_batch(llm, jobs, draw) for _ in range(reps))
    finally:
        scheduler.num_groups = usual
    return len(jobs) * (job.output_len - 1) / (total - first)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--groups-of", type=int, nargs="+", default=[1, 32, 64], help="sequences of a group")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    args = parser.parse_args(argv)
    draw, job, rows = random.Random(0), Job(args.input_len, args.output_len), []
    with open_llm(args) as llm:
        stages = llm.engine.replicas[0].executor.plan.stages.count
        if stages < 2:
            parser.error(f"the mesh {args.mesh or 'of one device'} has no pipeline stages")
        if len(llm.engine.replicas) > 1:
            parser.error("replicas would share out the sequences of a group: the mesh may have no axis data")
        check_seats(llm, stages * max(args.groups_of), job)
        for size in args.groups_of:
            one, all_ = (tokens_per_second(llm, count, job, size, args.reps, draw) for count in (1, stages))
            rows.append({"group": size, "one_group_tok_s": one, "a_group_a_stage_tok_s": all_, "ratio": all_ / one})
        head = {"benchmark": "pipeline", "model": llm.engine.model_name, "stages": stages}
    report(head, rows)


if __name__ == "__main__":
    as_program(main)
