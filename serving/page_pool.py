"""Which pages of the KV cache are free."""

from __future__ import annotations

from collections.abc import Iterable

# Padding rows and tokens write here; it is never handed out.
SCRATCH_PAGE = 0


class PagePool:
    """A free list over pages 1..num_pages-1 of `page_size` tokens each.

    Freed pages are handed out again last in, first out: warm pages first, and the same order on every process.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"a page pool needs at least 2 pages, one of them scratch; got {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._is_free = bytearray([0] + [1] * (num_pages - 1))

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of usable pages in use, 0 to 1."""
        return 1 - self.num_free / self.num_usable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_take(self, count: int) -> bool:
        return count <= len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages; raises RuntimeError when there are not so many (ask `can_take` first)."""
        if not self.can_take(count):
            raise RuntimeError(f"{count} pages asked for, {self.num_free} are free")
        first = len(self._free) - count
        pages = self._free[first:]
        del self._free[first:]
        pages.reverse()
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back; raises RuntimeError on one that is free already or was never handed out."""
        for page in pages:
            if page == SCRATCH_PAGE or self._is_free[page]:
                raise RuntimeError(f"page {page} is not in use and cannot be freed")
            self._is_free[page] = 1
            self._free.append(page)

    def check_whole(self) -> None:
        """With no sequence alive every page must be free exactly once; raises RuntimeError naming what leaked."""
        if len(self._free) != self.num_usable or len(set(self._free)) != self.num_usable:
            lost = sorted(set(range(1, self.num_pages)) - set(self._free))
            raise RuntimeError(f"page pool leaked {len(lost)} pages, among them {lost[:8]}")
