"""From a schedule to the array that goes up: what a step needs, gathered once, then laid into a bucket."""

from __future__ import annotations

import dataclasses

import numpy as np

from .schedule import Schedule
from .sequence import Sequence
from .step_input import FLAGS, FLOATS, INTS, PackedLayout, needs_full, row_constants

TOKEN_FIELDS = ("token_ids", "token_slot", "token_position", "token_counts")
CHUNK_FIELDS = ("chunk_slot", "chunk_start", "chunk_length", "chunk_kv_len", "chunk_is_first")
_SLOT, _POSITION = INTS.index("slot"), INTS.index("position")


@dataclasses.dataclass(frozen=True)
class Group:
    """What a schedule's sequences were when it was made: later ticks of a pipeline need it when they have moved on.

    `sampling` and `num_tokens` are the schedule's, made once for all the steps that repeat it. Every `*_place` is
    (partition, row in the partition's share). Tokens, chunks and samples as in `StepInput`.
    """

    schedule: Schedule
    sampling: tuple[Sequence, ...]
    num_tokens: int
    full: bool
    page_updates: np.ndarray  # [U 3]
    decode_place: np.ndarray  # [2 B]
    decodes: np.ndarray  # slot, position: [2 B]
    token_place: np.ndarray  # [2 T]
    tokens: np.ndarray  # id, slot, position, count: [4 T]
    chunk_place: np.ndarray  # [2 C]
    chunks: np.ndarray  # slot, start, length, kv_len, is_first: [5 C]
    samples: np.ndarray  # which chunks sample: [C'] indices of `chunks`
    row_ints: np.ndarray  # of the decodes, then of the chunks that sample: [INTS B+C']
    row_floats: np.ndarray  # [FLOATS B+C']
    flags: np.ndarray  # [FLAGS]


class Packer:
    """Keeps every slot's sampling constants, so that a decoding row costs an index and no Python."""

    def __init__(self, page_size: int, num_slots: int, num_partitions: int = 1):
        self.page_size, self._slots_each = page_size, num_slots // num_partitions
        self._ints = np.zeros((len(INTS), num_slots), np.int32)
        self._floats = np.zeros((len(FLOATS), num_slots), np.int32)
        self._flags = np.zeros((len(FLAGS), num_slots), np.int32)
        self._full = np.zeros(num_slots, bool)

    def group(self, schedule: Schedule) -> Group:
        chunks, size = schedule.chunks, self.page_size
        slots, positions = decode_rows = schedule.decode_rows
        columns, table, updates = [], [], []
        offsets: dict[int, int] = {}
        for chunk in chunks:
            seq, start, stop = chunk.seq, chunk.start, chunk.start + chunk.length
            if chunk.is_first:
                self._remember(seq)
            offset = offsets.get(seq.partition, 0)
            offsets[seq.partition] = offset + chunk.length
            table.append((seq.slot, offset, chunk.length, stop, chunk.is_first, seq.partition))
            part = np.empty((6, chunk.length), np.int32)
            part[0], part[1] = seq.token_ids(start, stop), seq.slot
            part[2] = np.arange(start, stop)
            part[3] = part[2] >= seq.num_prompt
            part[4], part[5] = seq.partition, np.arange(offset, offset + chunk.length)
            columns.append(part)
            updates += [(seq.slot, i, seq.pages[i]) for i in range(start // size, (stop - 1) // size + 1)]
        tokens = np.concatenate(columns, axis=1) if columns else np.empty((6, 0), np.int32)
        chunk_table = np.array(table, np.int32).reshape(-1, 6).T
        samples = np.array([i for i, chunk in enumerate(chunks) if chunk.samples], np.int64)

        sampling = np.concatenate([slots, chunk_table[0, samples]])
        row_ints = self._ints[:, sampling]
        row_ints[_SLOT] = sampling
        row_ints[_POSITION] = np.concatenate([positions + 1, chunk_table[3, samples]])
        return Group(
            schedule=schedule,
            sampling=schedule.sampling,
            num_tokens=schedule.num_tokens,
            full=bool(self._full[slots].any() or self._full[chunk_table[0]].any()),
            page_updates=np.concatenate([schedule.entered, np.array(updates, np.int32).reshape(-1, 3)]),
            decode_place=_places(slots // self._slots_each),
            decodes=decode_rows,
            token_place=tokens[4:],
            tokens=tokens[:4],
            chunk_place=_places(chunk_table[5]),
            chunks=chunk_table[:5],
            samples=samples,
            row_ints=row_ints,
            row_floats=self._floats[:, sampling],
            flags=self._flags[:, sampling].max(axis=1, initial=0),
        )

    def _remember(self, seq: Sequence) -> None:
        ints, floats, flags = row_constants(seq)
        self._ints[:, seq.slot], self._floats[:, seq.slot], self._flags[:, seq.slot] = ints, floats, flags
        self._full[seq.slot] = needs_full(seq.params)


def _places(partitions: np.ndarray) -> np.ndarray:
    """(partition, row in its share) of rows that come partition by partition."""
    owner = partitions.astype(np.int64)
    if not owner.any():
        return np.stack([owner, np.arange(len(owner))])
    first = np.searchsorted(owner, owner)
    return np.stack([owner, np.arange(len(owner)) - first])


def growth(layout: PackedLayout, decode_rows: np.ndarray) -> np.ndarray:
    """What the packed array [X] of the next step has more than this one's, where the same rows decode and no more."""
    added = np.zeros(layout.size, np.int32)
    views = layout.views(added)
    views["decode_position"][decode_rows] = 1
    views["row_ints"][_POSITION, decode_rows] = 1
    return added


def enter_pages(layout: PackedLayout, packed: np.ndarray, entered: np.ndarray) -> None:
    """Let `packed` [X] have the page updates `entered` [U 3] and no others."""
    part = layout.slices["page_updates"]
    packed[part] = layout.empty[part]
    packed[part].reshape(-1, 3)[: len(entered)] = entered


def lay_out(
    layout: PackedLayout, group: Group, num_partitions: int, packed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Write `group` into `packed` [X] in the bucket's layout; returns the rows of its decodes and of its chunks."""
    packed[:] = layout.empty
    views, bucket = layout.views(packed), layout.bucket

    def rows_of(place: np.ndarray, size: int) -> np.ndarray:
        return place[0] * (size // num_partitions) + place[1]

    views["page_updates"][: len(group.page_updates)] = group.page_updates
    decode_rows = rows_of(group.decode_place, bucket.decodes)
    views["decode_slot"][decode_rows], views["decode_position"][decode_rows] = group.decodes
    chunk_rows = rows_of(group.chunk_place, bucket.chunks)
    rows = decode_rows
    if len(chunk_rows):
        token_rows = rows_of(group.token_place, bucket.chunk_tokens)
        for name, column in zip(TOKEN_FIELDS, group.tokens, strict=True):
            views[name][token_rows] = column
        for name, column in zip(CHUNK_FIELDS, group.chunks, strict=True):
            views[name][chunk_rows] = column
        rows = np.concatenate([decode_rows, bucket.decodes + chunk_rows[group.samples]])
    views["row_ints"][:, rows] = group.row_ints
    views["row_floats"][:, rows] = group.row_floats
    views["flags"][:] = group.flags
    return decode_rows, chunk_rows
