"""The table of accelerators, and the price of messages inside and between their islands."""

from __future__ import annotations

import dataclasses

import pytest

from paddock.sharding.accelerators import Accelerator, accelerator, accelerators

CARD = Accelerator(
    name="card",
    datasheet_bytes=100,
    usable=0.5,
    memory_bandwidth=10.0,
    matrix_rates={"bfloat16": 7.0},
    link="wire",
    link_bandwidth=8.0,
    island=4,
    source="made up",
    nic_bandwidth=2.0,
)


def test_every_card_has_its_figures_and_where_they_come_from():
    assert set(accelerators()) == {
        *("a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "gb200", "mi300x", "mi325x"),
        *("l40s", "rtx-4090", "tpu-v5e", "tpu-v5p", "tpu-v6e"),
    }
    for card in accelerators().values():
        assert len(card.source) > 20, card.name
        assert 16e9 <= card.datasheet_bytes <= 256e9, card.name
        # Machine balance, in operations of bfloat16 per byte: all of today's lie here, so that a lost digit shows.
        assert 100 < card.matrix_rate("bfloat16") / card.memory_bandwidth < 600, card.name
        assert card.link_bandwidth < card.memory_bandwidth, card.name
        assert card.nic_bandwidth is None or card.nic_bandwidth < card.link_bandwidth, card.name


def test_the_driver_counts_where_it_is_known():
    card = accelerator("h100-80gb")
    assert (card.datasheet_bytes, card.driver_bytes, card.memory_bytes) == (80 * 10**9, 84_942_979_072, 84_942_979_072)
    assert accelerator("mi300x").memory_bytes == 192 * 10**9


def test_what_is_not_known_raises():
    with pytest.raises(ValueError, match=r"'h1000' is unknown; there are a100-40gb, .*tpu-v6e"):
        accelerator("h1000")
    with pytest.raises(ValueError, match="card has no matrix rate for int4; there are bfloat16"):
        CARD.matrix_rate("int4")
    with pytest.raises(ValueError, match="no known bandwidth between its islands of 4"):
        dataclasses.replace(CARD, nic_bandwidth=None).between_islands()


def test_an_all_reduce_is_priced_level_by_level():
    assert CARD.all_reduce_seconds(80.0, 4, 1) == pytest.approx(2 * 3 / 4 * 80 / 8)
    # Two islands of four: a quarter of the bytes crosses over each device's own network link.
    assert CARD.all_reduce_seconds(80.0, 8, 2) == pytest.approx(2 * 3 / 4 * 80 / 8 + 2 * 1 / 2 * 20 / 2)
    assert CARD.send_seconds(16.0, across=False) == 2.0
    assert CARD.send_seconds(16.0, across=True) == 8.0
