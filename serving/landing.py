"""Sequences that take a token at each step, all of them together: a step notes its tokens and touches none of them."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sequence import Sequence

# Tokens of so many steps are handed out at once, lest a step that must do so takes long.
MOST_STEPS = 64


class Landing:
    """`seqs` all run, and none has its last token. `Sequence.output_token_ids` looks here until `dissolve`."""

    def __init__(self, seqs: ListOf[Sequence]):
        self.seqs = seqs
        self._steps: list[ListOf[int]] = []
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
            self.settle()
        return True

    def settle(self) -> None:
        """Hand the tokens out."""
        steps, self._steps = self._steps, []
        if steps:
            for seq, tokens in zip(self.seqs, zip(*steps, strict=True), strict=True):
                seq.settled_token_ids += tokens

    def dissolve(self) -> None:
        self.settle()
        for seq in self.seqs:
            seq.landing = None
