"""Sequences that take a token at each step, all of them together: a step notes its tokens and touches none of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sequence import Sequence

# After so many steps all get their tokens, lest it takes long when they must.
MOST_STEPS = 128


class Landing:
    """`seqs` all run, have all that was read until now, and none has its last token. `Sequence.tokens_read` looks
    here until `dissolve`."""

    def __init__(self, seqs: ListOf[Sequence]):
        self.seqs = seqs
        self._steps: list[np.ndarray] = []
        self._num_given = [0] * len(seqs)  # of `_steps`, to each
        stops = frozenset[int]().union(*{seq.stop_token_ids for seq in seqs})
        self._stops = np.array(sorted(stops)) if stops else None
        # So many steps leave each a token short of its last.
        self._left = min([seq.max_tokens - len(seq.given) for seq in seqs]) - 1
        for seq in seqs:
            seq.landing = self

    def take(self, tokens: np.ndarray) -> bool:
        """Note a token of each [B], unless one may be a sequence's last."""
        if not self._left or (self._stops is not None and (tokens[:, None] == self._stops).any()):
            return False
        self._left -= 1
        self._steps.append(tokens)
        if len(self._steps) == MOST_STEPS:
            self._give_all()
        return True

    def give(self, seq: Sequence) -> None:
        """Give one of them the tokens that it does not have yet."""
        place, steps = self._places[seq], self._steps
        for step in range(self._num_given[place], len(steps)):
            seq.given.append(steps[step].item(place))
        self._num_given[place] = len(steps)

    @functools.cached_property
    def _places(self) -> dict[Sequence, int]:
        return {seq: place for place, seq in enumerate(self.seqs)}

    def dissolve(self) -> None:
        self._give_all()
        for seq in self.seqs:
            seq.landing = None

    def _give_all(self) -> None:
        if self._steps:
            columns = np.stack(self._steps, axis=1, dtype=np.int32)
            # As bytes, four a token, which an array takes as they lie.
            for seq, given, tokens in zip(self.seqs, self._num_given, columns.view(np.uint8), strict=True):
                seq.given.frombytes(tokens[4 * given :])
        self._steps, self._num_given = [], [0] * len(self.seqs)
