"""Sequences that take a token at each step, all of them together: a step notes its tokens and touches none of them."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sequence import Sequence

# After so many steps all get their tokens, lest it takes long when they must.
MOST_STEPS = 64


class Landing:
    """`seqs` all run, and none has its last token. `Sequence.output_token_ids` looks here until `dissolve`."""

    def __init__(self, seqs: ListOf[Sequence]):
        self.seqs = seqs
        self._steps: list[ListOf[int]] = []
        self._places = {seq: place for place, seq in enumerate(seqs)}
        self._num_given = [0] * len(seqs)  # of `_steps`, to each
        self._stops = frozenset[int]().union(*[seq.stop_token_ids for seq in seqs])
        # So many steps leave each a token short of its last.
        self._left = min(seq.max_tokens - len(seq.output_token_ids) for seq in seqs) - 1
        for seq in seqs:
            seq.landing = self

    def take(self, tokens: ListOf[int]) -> bool:
        """Note a token of each, unless one may be a sequence's last."""
        if not self._left or not self._stops.isdisjoint(tokens):
            return False
        self._left -= 1
        self._steps.append(tokens)
        if len(self._steps) == MOST_STEPS:
            self._give_all()
        return True

    def give(self, seq: Sequence) -> None:
        """Give one of them the tokens that it does not have yet."""
        place = self._places[seq]
        seq.given_token_ids += [tokens[place] for tokens in self._steps[self._num_given[place] :]]
        self._num_given[place] = len(self._steps)

    def dissolve(self) -> None:
        self._give_all()
        for seq in self.seqs:
            seq.landing = None

    def _give_all(self) -> None:
        if self._steps:
            for seq, given, tokens in zip(self.seqs, self._num_given, zip(*self._steps, strict=True), strict=True):
                seq.given_token_ids += tokens[given:]
        self._steps, self._num_given = [], [0] * len(self.seqs)
