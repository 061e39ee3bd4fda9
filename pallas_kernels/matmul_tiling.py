"""How a product of few rows is cut into work for a Hopper GPU: a small model of its time, no table of shapes."""

from __future__ import annotations

import dataclasses

SMS = 132  # H100 SXM and H200
DEPTH = 64  # of K a step: 128 bytes, the widest swizzle
ROWS = 64  # a warpgroup's
COLUMNS = (256, 224, 192, 160, 128, 96, 64)
SPLITS = (1, 2, 4, 8)
MAX_ROWS = 256
SMEM = 220 * 1024  # bytes of a thread block, less what barriers and alignment take
# Per microsecond: bytes of HBM, of L2 and of one multiprocessor's way in; float operations of one multiprocessor.
HBM, L2, INGEST, FLOPS = 3.0e6, 5.0e6, 6.0e4, 5.2e6
TILE_US, PART_US = 1.0, 2.0  # a tile's epilogue; a second kernel


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A thread block multiplies `rows` x `columns` over a `split`th of K, `stages` steps of it in flight.

    With `pair`, two blocks share the weights that they load: one takes the upper rows, one the lower.
    """

    rows: int
    columns: int
    split: int
    stages: int
    pair: bool = False

    @property
    def warpgroups(self) -> int:
        return self.rows // ROWS


def choose_tiling(m: int, k: int, n: int, *, swiglu: bool = False, sms: int = SMS) -> Tiling:
    """The fastest tiling for x [m, k] times w [k, n], by the model of `microseconds`.

    Raises ValueError naming what does not divide, and for more than 256 rows.
    """
    if not 1 <= m <= MAX_ROWS:
        raise ValueError(f"matmul_mosaic takes 1 to {MAX_ROWS} rows: got {m}")
    if k % DEPTH:
        raise ValueError(f"matmul_mosaic needs w's rows to be a multiple of {DEPTH}: got {k}")
    options = [tiling for tiling in _tilings(m) if not n % tiling.columns and not k % (DEPTH * tiling.split)]
    if swiglu:
        options = [tiling for tiling in options if tiling.split == 1]
    if not options:
        raise ValueError(f"matmul_mosaic needs w's columns to be a multiple of {COLUMNS[-1]}: got {n}")
    return min(options, key=lambda tiling: microseconds(tiling, m, k, n, sms))


def microseconds(tiling: Tiling, m: int, k: int, n: int, sms: int = SMS) -> float:
    """What the product would take: memory, or the busiest multiprocessor, and what splitting adds."""
    blocks = 2 if tiling.pair else 1
    rows = tiling.rows * blocks
    units = (n // tiling.columns) * tiling.split * blocks
    steps = k // DEPTH // tiling.split
    waves = -(-units // sms)
    step_bytes = 2 * DEPTH * (min(tiling.rows, -(-m // 8) * 8) + tiling.columns)
    step = max(2 * tiling.rows * tiling.columns * DEPTH / FLOPS, step_bytes / INGEST)
    shared = units * steps * 2 * DEPTH * (tiling.rows + tiling.columns / blocks) / L2
    busiest = waves * (steps * step + TILE_US)
    parts = PART_US + 2 * 4 * tiling.split * rows * n / L2 if tiling.split > 1 else 0.0
    return max(2 * k * n / HBM, busiest, shared) + parts


def _tilings(m: int) -> list[Tiling]:
    """All tilings for m rows that fit into shared memory and registers."""
    rows = -(-m // ROWS) * ROWS
    shapes = [(rows, False)] if rows <= 192 else [(256, False), (128, True)]
    found = []
    for tile_rows, pair in shapes:
        for columns in COLUMNS:
            # Float32 sums: at most 128 registers a thread, of the 65,536 there are.
            if columns > 256 or tile_rows * columns > 128 * 256 or (tile_rows > 128 and columns > 128):
                continue
            output = tile_rows * min(columns, 64) * 4
            stages = min(12, (SMEM - output) // (2 * DEPTH * (tile_rows + columns)))
            found += [Tiling(tile_rows, columns, split, stages, pair) for split in SPLITS if stages >= 3]
    return found
