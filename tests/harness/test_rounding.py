"""In float64 the oracle is its own truth: its own error there is known from float32, in proportion."""

import pytest
import torch

from tests.harness.test_numeric import case, found


def cancelling(x, y):
    """Both numbers small beside their parts: what is left has few digits."""
    return {"sum": ((x + 100 * y) - 100 * y).sum(), "each": (x * y + 1000) - 1000}


def without_cancelling(x, y):
    return {"sum": x.sum(), "each": x * y}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_oracle_that_cancels_does_not_make_a_better_candidate_fall(dtype):
    finding, asked = found(without_cancelling, case(dtype), cancelling)
    assert finding.verdict == "match"
    assert asked > 0 or dtype != torch.float64


def test_an_error_beyond_that_rounding_still_falls():
    def wrong(x, y):
        return {"sum": x.sum(), "each": x * y * (1 + 1e-9)}

    finding, _ = found(wrong, case(torch.float64), cancelling)
    assert (finding.verdict, finding.output) == ("mismatch", "each")
