"""Mailboxes: memory of each device that its peers write into, and where everything lies in it.

A mailbox has a slot for each sender, twice: calls alternate between the halves, so that one barrier a call is enough.
A sender that is in call e + 2 has everybody's packets of call e + 1, which nobody sends before it is done with call e.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Thread blocks of a call at most. All of them must run at the same time: they wait for those of other devices.
BLOCKS = 128
# Each block counts its calls: that number tells new packets from old ones.
COUNTER_BYTES = 4 * BLOCKS


@dataclasses.dataclass(frozen=True)
class MailboxShape:
    """`devices` that send, and the bytes of packets that a block of a sender may have on their way in one call."""

    devices: int
    block_bytes: int = 32 * 1024

    @property
    def half_bytes(self) -> int:
        """One sender's packets of one call."""
        return BLOCKS * self.block_bytes

    @property
    def num_bytes(self) -> int:
        return COUNTER_BYTES + self.devices * 2 * self.half_bytes

    def max_rows(self, row_bytes: int) -> int:
        """The most rows of so many bytes that a call may have; they travel as twice as many."""
        return BLOCKS * (self.block_bytes // (2 * row_bytes))

    def address_table(self, bases: Sequence[int], rank: int) -> np.ndarray:
        """What device `rank` must know, int32 [devices + 2, 2], of mailboxes at `bases`: in row r the address of its
        own slot in r's mailbox (low word first), then its own mailbox's address, then (rank, 0)."""
        slots = [base + COUNTER_BYTES + rank * 2 * self.half_bytes for base in bases]
        return np.array([*slots, bases[rank], rank], np.int64).view(np.int32).reshape(-1, 2)
