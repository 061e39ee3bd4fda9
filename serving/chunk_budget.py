"""How many prompt tokens a step takes: as many as fill a program that there is."""

from __future__ import annotations

from collections.abc import Sequence

# Up to so many tokens a GPU's step waits for the weights, not for its products: prompts are not cut any smaller to fit.
WEIGHT_BOUND = 256
# Prompts that fill so much of a bucket run in it; fewer tokens fill the next smaller one, and the rest waits a step.
# Beside decoding rows, whose steps come anyway, only padding counts; alone the rest costs a step of its own.
WELL_FILLED, WELL_FILLED_BESIDE = 0.75, 0.95


def chunk_budget(left: int, whole: int, *, most: int, sizes: Sequence[int], num_stages: int, beside: bool) -> int:
    """Prompt tokens to take in this step, `most` or fewer, of `left` ones in prompts that have `whole` together.

    `sizes` are those that steps are compiled for, ascending; `beside`: there are decoding rows in the step, too.
    """
    budget = most
    if num_stages > 1:  # equal pieces, one for each stage
        budget = min(budget, max(-(-whole // num_stages), WEIGHT_BOUND))
    wanted = min(left, budget)
    smaller = max((size for size in sizes if size <= wanted), default=0)
    larger = min((size for size in sizes if size > wanted), default=0)
    # What does not fit into this step fills the next one; where all of it fits, padding would be for nothing.
    enough = larger * (WELL_FILLED_BESIDE if beside and left <= budget else WELL_FILLED)
    return smaller if smaller and larger > WEIGHT_BOUND and wanted < enough else budget
