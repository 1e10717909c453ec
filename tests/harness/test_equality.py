"""Units in the last place, moved inputs and budgets."""

import pytest
import torch

from harness.equality import FLOOR_ULPS, budget, moved, noise, ulp


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([1.0, 1.5, 3.0, 100.0, 0.1], dtype=dtype)
    up = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(ulp(values, dtype), up.double() - values.double())
    assert ulp(torch.zeros(1), dtype).item() == info.tiny * info.eps


def test_moved_inputs_are_one_ulp_away_and_the_rest_is_untouched():
    tensors = {"boxes": torch.rand(50, 4), "mask": torch.ones(50)}
    seen = set()
    for other in moved(tensors, ("boxes",)):
        steps = (other["boxes"] - tensors["boxes"].double()) / ulp(tensors["boxes"], torch.float32)
        seen |= set(steps.flatten().tolist())
        assert torch.equal(other["mask"], tensors["mask"].double())
    assert seen == {-1.0, 0.0, 1.0}


def test_noise_grows_where_the_function_is_ill_conditioned():
    tensors = {"x": torch.tensor([1.0, 1e6])}
    value, width = noise(lambda t: t["x"] - t["x"].float().round().double(), tensors, ("x",))
    assert torch.equal(value, torch.zeros(2, dtype=torch.float64))
    assert 0 < width[0] < 1e-6 < width[1] < 1


def test_the_budget_is_twice_the_oracles_error_and_a_floor():
    truth = torch.tensor([1.0, 1.0], dtype=torch.float64)
    oracle = torch.tensor([1.0, 1.001])
    allowed = budget(truth, oracle, torch.zeros(2), torch.float32)
    assert allowed[0].item() == pytest.approx(FLOOR_ULPS * 2**-23)
    assert allowed[1].item() == pytest.approx(0.002, rel=1e-3)


def test_an_oracle_that_is_not_finite_widens_nothing():
    truth = torch.tensor([1.0], dtype=torch.float64)
    allowed = budget(truth, torch.tensor([torch.nan]), torch.zeros(1), torch.float32)
    assert allowed.item() == pytest.approx(FLOOR_ULPS * 2**-23)
