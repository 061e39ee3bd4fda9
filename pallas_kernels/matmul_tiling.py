"""How a product is cut into work for a Hopper GPU: a small model of its time, no table of shapes."""

from __future__ import annotations

import dataclasses

SMS = 132  # H100 SXM and H200
DEPTH = 64  # of K a step: 128 bytes, the widest swizzle; narrower ones measured a third slower
ROWS = 64  # a warpgroup's
COLUMNS = (64, 128, 192, 256)
SPLITS = (1, 2, 4, 8)
SHARES = (1, 2, 4)
TOGETHER = 2**25  # bytes of x that tiles share while they are multiplied: they stay in L2 meanwhile
SMEM = 231_000  # bytes that a thread block may use, less its barriers and their alignment
# Measured on an H100, in microseconds: bytes of HBM, of HBM through one multiprocessor, of L2 into one
# multiprocessor; float operations of one multiprocessor; bytes of parts written and read again.
HBM, HBM_EACH, INGEST, FLOPS, WRITE, READ = 3.08e6, 4.5e4, 1.2e5, 5.6e6, 1.6e6, 6.0e6
# Of HBM through one while others still end the kernel before, or begin the one after.
HBM_AMONG_OTHERS = 4.0e4
# From a load's start to its data; beginning and ending a tile; a kernel more.
LATENCY, TILE, KERNEL = 1.05, 3.0, 1.0
# Columns of a product that ends a block come in pieces of so many, half a row of the widest swizzle, or a multiple; and
# pieces by so many, a tile of the accumulator that their squares are summed in.
PIECE, PIECES = 32, 8
# Sums on their way to another block of the cluster; to be measured.
EXCHANGE = 1.0


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A thread block multiplies `rows` x `columns` over a `split`th of K, `stages` steps of it in flight.

    With `pair`, two blocks share the weights that they load: one takes the upper rows, one the lower. More rows than
    that are tiles of their own. Where blocks `share` a tile each takes as much of K, and they add up through each
    other's memory. The last `narrow[0]` tiles of a row of them have `narrow[1]` columns: 28,672 columns
    are 64 tiles of 256 and 64 of 192, so that 64 pairs have as much to do and the other two nothing.
    """

    rows: int
    columns: int
    split: int
    stages: int
    pair: bool = False
    narrow: tuple[int, int] = (0, 0)
    share: int = 1

    @property
    def blocks(self) -> int:
        """Those of a cluster that multiply other rows."""
        return 2 if self.pair else 1

    @property
    def cluster(self) -> int:
        return self.blocks * self.share

    @property
    def warpgroups(self) -> int:
        return self.rows // ROWS

    def row_tiles(self, m: int) -> int:
        return -(-m // (self.rows * self.blocks))

    def bands(self, n: int) -> list[tuple[int, int, int]]:
        """(first column, columns of a tile, tiles) of what n columns are cut into."""
        count, columns = self.narrow
        wide = (n - count * columns) // self.columns
        return [(0, self.columns, wide), (wide * self.columns, columns, count)][: 2 if count else 1]


def choose_tiling(m: int, k: int, n: int, *, swiglu: bool = False, summed: bool = False) -> Tiling:
    """The fastest tiling for x [m, k] times w [k, n], by `microseconds`; `summed`: what follows adds parts up anyway.

    Raises ValueError naming what does not divide, and for no rows.
    """
    if m < 1:
        raise ValueError(f"matmul_mosaic takes 1 row and more: got {m}")
    if k % DEPTH:
        raise ValueError(f"matmul_mosaic needs w's rows to be a multiple of {DEPTH}: got {k}")
    if n % COLUMNS[0]:
        raise ValueError(f"matmul_mosaic needs w's columns to be a multiple of {COLUMNS[0]}: got {n}")
    tilings = _tilings(m, swiglu)
    fitting = [t for t in tilings if n % t.columns == 0 and k % (DEPTH * t.split) == 0]
    narrowed = [t for tiling in tilings if tiling.split == 1 for t in _narrowed(tiling, k, n)]
    return min([*fitting, *narrowed], key=lambda tiling: microseconds(tiling, m, k, n, summed=summed))


def choose_ending(m: int, k: int, n: int) -> Tiling:
    """As `choose_tiling`, for `matmul_add_mosaic`: no parts are left to anybody, and a thread block has one tile.

    Raises ValueError, also for more rows than one tile has.
    """
    choose_tiling(m, k, n)
    if m > 4 * ROWS:
        raise ValueError(f"matmul_add_mosaic takes {4 * ROWS} rows at most: got {m}")
    found = []
    for rows, pair in _shapes(m):
        for columns in COLUMNS:
            for share in SHARES if not pair else SHARES[:1]:
                pieces, units = n // columns * share, n // columns * share * (2 if pair else 1)
                if rows * columns > 2**15 or n % columns or k % (DEPTH * share) or units > SMS:
                    continue
                if columns % (share * PIECE) or pieces % PIECES:
                    continue
                stages = min(12, (SMEM - ending_bytes(rows, columns, share)) // (2 * DEPTH * (rows + columns)))
                if stages > 2:
                    found.append(Tiling(rows, columns, 1, stages, pair, share=share))
    if not found:
        raise ValueError(f"matmul_add_mosaic has no tiles for {m} rows and w [{k}, {n}]")
    return min(found, key=lambda tiling: microseconds(tiling, m, k, n, summed=True))


def microseconds(tiling: Tiling, m: int, k: int, n: int, *, summed: bool = False) -> float:
    """What the product would take: the slower of memory and the busiest multiprocessor, and what splitting adds."""
    steps, busiest, total, most = k // DEPTH // (tiling.split * tiling.share), 0.0, 0.0, 0
    for _, columns, tiles in tiling.bands(n):
        units = tiles * tiling.split * tiling.cluster * tiling.row_tiles(m)
        most, waves = max(most, units), -(-units // SMS)
        loaded = 2 * DEPTH * (min(tiling.rows, padded(m)) + columns)
        compute = 2 * tiling.rows * columns * DEPTH / FLOPS
        busiest += waves * steps * max(compute, loaded / INGEST, LATENCY / (tiling.stages - 2))
        total += waves * TILE
    total += max(2 * k * n / min(HBM, min(most, SMS) * (HBM_AMONG_OTHERS if summed else HBM_EACH)), busiest)
    if tiling.share > 1:
        total += EXCHANGE
    if tiling.split > 1:
        parts = 4 * tiling.split * padded(m) * n
        total += parts / WRITE + parts / READ + (0 if summed else KERNEL)
    return total


def check_tiling(tiling: Tiling, m: int, k: int, n: int) -> None:
    """Raise ValueError for a tiling that x [m, k] times w [k, n] cannot be cut by."""
    if sum(columns * tiles for _, columns, tiles in tiling.bands(n)) != n or k % (DEPTH * tiling.split):
        raise ValueError(f"{tiling} does not divide w [{k}, {n}]")
    if k % (DEPTH * tiling.share) or (tiling.share > 1 and tiling.row_tiles(m) > 1):
        raise ValueError(f"{tiling} shares K, and for that {m} rows must be one tile, and {k} a multiple of its steps")
    if tiling.split > 1 and (tiling.row_tiles(m) > 1 or tiling.narrow[0]):
        raise ValueError(f"{tiling} splits K, and for that {m} rows must be one tile and all tiles as wide")
    if tiling.narrow[0] and k // DEPTH % tiling.stages:
        raise ValueError(f"{tiling} has narrow tiles, and for that {k // DEPTH} steps must be a multiple of its stages")


def check_ending(tiling: Tiling, m: int, k: int, n: int) -> None:
    """`check_tiling` for `matmul_add_mosaic`."""
    check_tiling(tiling, m, k, n)
    pieces = n // tiling.columns * tiling.share
    if tiling.split > 1 or tiling.narrow[0] or tiling.row_tiles(m) > 1 or tiling.rows * tiling.blocks > square_rows(m):
        raise ValueError(
            f"{tiling} does not end a block of {m} rows: it must be one tile, as low as they allow, and whole"
        )
    if pieces % PIECES or tiling.columns % (tiling.share * PIECE) or pieces * tiling.blocks > SMS:
        raise ValueError(f"{tiling} does not end a block of {n} columns: {pieces} pieces of them")


def padded(m: int) -> int:
    """Rows in units that a copy may address."""
    return -(-m // 8) * 8


def _tilings(m: int, swiglu: bool) -> list[Tiling]:
    """Every tiling for m rows that fits registers (128 sums a thread at most) and shared memory."""
    found = []
    for rows, pair in _shapes(m):
        for columns in COLUMNS:
            for split in SPLITS:
                if rows * columns > 2**15 or (split > 1 and (swiglu or m > 4 * ROWS)):
                    continue
                output = output_bytes(m, rows, columns, parts=split > 1, swiglu=swiglu)
                stages = min(12, (SMEM - output) // (2 * DEPTH * (rows + columns)))
                if stages > 2:
                    found.append(Tiling(rows, columns, split, stages, pair))
    return found


def square_rows(m: int) -> int:
    """Rows of the `squares` of `ScaledRows`: all that a tile may have that m rows fit into."""
    return max(rows * (2 if pair else 1) for rows, pair in _shapes(m))


def _shapes(m: int) -> list[tuple[int, bool]]:
    """(rows of a tile, whether two blocks share their weights) for m rows."""
    if m > 4 * ROWS:
        return [(2 * ROWS, True)]
    if m > 2 * ROWS:
        return [(192 if m <= 192 else 256, False), (128, True)]
    return [(ROWS if m <= ROWS else 2 * ROWS, False)]


def _narrowed(tiling: Tiling, k: int, n: int) -> list[Tiling]:
    """With tiles of fewer columns at the end of a row of them, which must begin in the first slot of the ring."""
    if k // DEPTH % tiling.stages:
        return []
    found = []
    for columns in (c for c in COLUMNS if c < tiling.columns):
        for count in range(1, n // columns):
            rest = n - count * columns
            if rest > 0 and rest % tiling.columns == 0:
                found.append(dataclasses.replace(tiling, narrow=(count, columns)))
    return found


def output_bytes(m: int, rows: int, columns: int, *, parts: bool, swiglu: bool) -> int:
    """Shared memory through which a tile of the result leaves; next to none for float32 parts of whole warpgroups."""
    if parts:
        return 4 * rows * (columns if m % ROWS and rows == ROWS else 4)
    return 2 * rows * columns // (2 if swiglu else 1)


def ending_bytes(rows: int, columns: int, share: int) -> int:
    """Shared memory of what `matmul_add_mosaic` does with a tile: two bfloat16 copies of a block's piece of it, and the
    float32 parts of that from all that share."""
    piece = rows * columns // share
    return 4 * piece + (4 * piece * share if share > 1 else 0)
