"""Numbers and names as people read them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reports import text


@pytest.mark.parametrize("bad", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\ud800", "\ufffe", "\u202e", "\u2066"])
def test_what_cannot_be_printed_is_taken_out(bad: str) -> None:
    assert text.clean(f"a{bad}b\tc\r\nd\re") == "ab\tc\nd\ne"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (text.duration(842), "842 ns"),
        (text.duration(1.92e6), "1.92 ms"),
        (text.duration(4.17e9), "4.17 s"),
        (text.size(0), "0 B"),
        (text.size(51_000_000), "51.0 MB"),
        (text.rate(90e6, 30e6), "3.00 GB/s"),
        (text.ratio(68.31), "68.3×"),
        (text.ratio(0.763), "0.76×"),
        (text.ratio(math.inf), "∞×"),
        (text.share(0.0125), "1.25%"),
        (text.share(0.05), "5%"),
        (text.share(1e-6), "<0.01%"),
        (text.share(0), "0%"),
        (text.share(10), "1,000%"),
        (text.count(1600), "1,600"),
        (text.anything(True), "yes"),
        (text.anything(0.05), "0.05"),
    ],
)
def test_numbers(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize("nothing", [None, math.nan, np.float64("nan")])
def test_no_value_is_a_dash(nothing: object) -> None:
    for say in (text.count, text.duration, text.size, text.ratio, text.share, text.anything):
        assert say(nothing) == text.NOTHING
    assert text.rate(nothing, 1.0) == text.NOTHING
