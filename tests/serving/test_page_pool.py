from __future__ import annotations

import pytest

from paddock.serving.page_pool import SCRATCH_PAGE, PagePool


def test_every_page_but_scratch_is_handed_out_once() -> None:
    pool = PagePool(num_pages=9, page_size=4)
    pages = pool.take(5) + pool.take(3)
    assert sorted(pages) == list(range(1, 9))
    assert SCRATCH_PAGE not in pages
    assert pool.num_free == 0
    assert pool.usage == 1
    assert not pool.can_take(1)
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 are free"):
        pool.take(1)


def test_freed_pages_come_back_in_a_fixed_order() -> None:
    pool = PagePool(num_pages=9, page_size=4)
    pages = pool.take(3)
    pool.free(reversed(pages))
    assert pool.take(3) == pages


@pytest.mark.parametrize("page", [SCRATCH_PAGE, 3])
def test_a_page_not_in_use_cannot_be_freed(page: int) -> None:
    pool = PagePool(num_pages=9, page_size=4)
    with pytest.raises(RuntimeError, match=f"page {page} is not in use"):
        pool.free([page])


def test_a_leak_is_named() -> None:
    pool = PagePool(num_pages=5, page_size=4)
    pool.check_whole()
    (page,) = pool.take(1)
    with pytest.raises(RuntimeError, match=rf"leaked 1 pages, among them \[{page}\]"):
        pool.check_whole()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(num_pages=5, page_size=4).pages_for(tokens) == pages
