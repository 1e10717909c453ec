"""Decoding of YOLOX's raw maps: specification simota.md, sections 3.1 and 5."""

import pytest
import torch

from cases.yolox_head import WAVE_FRAME, maps, wave_rows
from cleanroom.yolox_boxes import make_grid, yolox_decode

STRIDES = (8, 16)
EXPECTED = {
    5: (6.596867, 4.015342, 7.303548, 12.538396, 0.331485, -0.272011, -0.477010),
    6: (12.513697, 5.177839, 10.242013, 12.992684, 0.012388, -0.478317, -0.268286),
    19: (21.356558, 23.158329, 14.543722, 9.719543, -0.171240, 0.406837, 0.388897),
}


def worked(dtype=torch.float32, images=1):
    return list(maps(wave_rows(images).to(dtype), WAVE_FRAME).values())


def test_worked_example():
    found = yolox_decode(worked(), STRIDES)
    for anchor, row in EXPECTED.items():
        assert found.outputs[0, anchor].tolist() == pytest.approx(row, abs=2e-6)


def test_cells_in_order():
    found = yolox_decode([torch.zeros(1, 6, 3, 4)], (8,))
    assert found.x_shifts[0].tolist() == [0, 1, 2, 3] * 3
    assert found.y_shifts[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.strides[0].tolist() == [8] * 12
    assert found.outputs[0, :, :2].tolist() == [[8 * x, 8 * y] for y in range(3) for x in range(4)]
    assert (found.outputs[..., 2:4] == 8).all()


def test_gradient():
    given = [raw.requires_grad_() for raw in worked(torch.float64, 2)]
    assert torch.autograd.gradcheck(lambda *raw: yolox_decode(raw, STRIDES).outputs, given)
    found = yolox_decode(given, STRIDES).outputs
    first, second = torch.autograd.grad(found.sum(), given)
    assert (first[:, :2] == 8).all()
    assert torch.equal(second[:, 2:4], found[:, 16:, 2:4].mT.reshape(2, 2, 2, 2))  # d w / d t2 is w
    assert (second[:, 4:] == 1).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_and_grid_are_left_alone(layout):
    given = [raw.to(memory_format=layout) for raw in worked()]
    before = [raw.clone() for raw in given]
    first = yolox_decode(given, STRIDES)
    assert all(map(torch.equal, given, before))
    for part in first:
        part.add_(1)  # what a caller does with the result is his
    assert yolox_decode(given, STRIDES).x_shifts[0, :5].tolist() == [0, 1, 2, 3, 0]


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = yolox_decode(worked(dtype), STRIDES)
        assert {part.dtype for part in found} == {dtype}
    # Columns beyond 256 are not distinct in bfloat16, as upstream's.
    wide = yolox_decode([torch.zeros(1, 6, 1, 300, dtype=torch.bfloat16)], (8,))
    assert wide.x_shifts.unique().numel() == 279


def test_no_clamp():
    raw = torch.zeros(1, 5, 1, 1, dtype=torch.float16)
    raw[0, 2] = 11
    assert yolox_decode([raw], (8,)).outputs[0, 0, 2].isinf()


def test_errors():
    with pytest.raises(ValueError, match="strides"):
        yolox_decode(worked(), (8,))
    with pytest.raises(ValueError, match="maps"):
        yolox_decode([torch.zeros(1, 6, 2, 2), torch.zeros(2, 6, 1, 1)], STRIDES)
    with pytest.raises(ValueError, match="maps"):
        yolox_decode([torch.zeros(0, 6, 2, 2)], (8,))
    with pytest.raises(TypeError, match="maps"):
        yolox_decode([torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 1, 1).half()], STRIDES)


def test_compiles_to_the_same():
    given = worked()
    compiled = torch.compile(yolox_decode, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(given, STRIDES), yolox_decode(given, STRIDES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_that_is_written_into_is_nobody_elses(dtype):
    maps = [torch.zeros(1, 6, 2, 3, dtype=dtype)]
    for _ in range(2):
        found = make_grid(maps, [8])
        assert [part.tolist() for part in found] == [[0, 1, 2] * 2, [0] * 3 + [1] * 3, [8] * 6]
        for part in found:
            part.fill_(-1)
