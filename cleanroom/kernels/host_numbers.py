"""Numbers that the host knows, as a tensor on the device, without a copy that would make the host wait."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime

_A_LAUNCH = tl.constexpr(16)
_NUMBERS = tuple(f"n{place}" for place in range(_A_LAUNCH.value))


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Put integers into an (n,) int64 tensor on the device.

    They travel as arguments of launches, 16 each: a copy from pageable memory waits for the stream, one from pinned
    memory reads, when a captured graph is replayed, whatever lies there by then.
    """
    found = runtime.empty((len(numbers),), torch.int64, device)
    for first in range(0, len(numbers), _A_LAUNCH.value):
        some = [int(number) for number in numbers[first : first + _A_LAUNCH.value]]
        padded = some + [0] * (_A_LAUNCH.value - len(some))
        runtime.launch(_write, (1,), found, first, len(numbers), *padded, num_warps=1)
    return found


@triton.jit(do_not_specialize=("first", "count", *_NUMBERS))
def _write(found, first, count, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15):
    at = tl.arange(0, _A_LAUNCH)
    number = tl.where(at == 0, n0, tl.where(at == 1, n1, tl.where(at == 2, n2, tl.where(at == 3, n3, 0))))
    number += tl.where(at == 4, n4, tl.where(at == 5, n5, tl.where(at == 6, n6, tl.where(at == 7, n7, 0))))
    number += tl.where(at == 8, n8, tl.where(at == 9, n9, tl.where(at == 10, n10, tl.where(at == 11, n11, 0))))
    number += tl.where(at == 12, n12, tl.where(at == 13, n13, tl.where(at == 14, n14, tl.where(at == 15, n15, 0))))
    tl.store(found + first + at, number.to(tl.int64), mask=first + at < count)
