"""What the demonstration model must beat: a character trigram and xz, in bits per byte of a held-out text."""

from __future__ import annotations

import lzma
import math
from collections import Counter, defaultdict


def trigram(train: str, test: str, alphabet: int = 256) -> float:
    """Interpolated byte trigram with Witten-Bell weights (Bell, Cleary & Witten 1990): nothing to tune.

    P(c|ab) = (n(abc) + t(ab) P(c|b)) / (n(ab) + t(ab)) with t the number of distinct successors seen, down to the
    uniform distribution over `alphabet` bytes.
    """
    data, held_out = train.encode(), test.encode()
    successors: list[dict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
    for order, table in enumerate(successors):
        for end in range(order, len(data)):
            table[data[end - order : end]][data[end]] += 1
    bits = 0.0
    for end, byte in enumerate(held_out):
        probability = 1 / alphabet
        for order, table in enumerate(successors):
            seen = table.get(held_out[end - order : end]) if end >= order else None
            if seen:
                total, distinct = seen.total(), len(seen)
                probability = (seen[byte] + distinct * probability) / (total + distinct)
        bits -= math.log2(probability)
    return bits / len(held_out)


def xz(train: str, test: str) -> tuple[float, float]:
    """(after `train`, alone): the bits per byte that xz -9e adds for `test` after the training text, and by itself."""
    data, held_out = train.encode(), test.encode()
    prefix, both, alone = (
        len(lzma.compress(part, preset=9 | lzma.PRESET_EXTREME)) for part in (data, data + held_out, held_out)
    )
    return 8 * (both - prefix) / len(held_out), 8 * alone / len(held_out)
