"""Tensors whose memory ends, or begins, where a page begins that nobody may touch."""

import ctypes
import mmap

import torch

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0
_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(tensor, *, before=False):
    """A contiguous copy of a tensor on the CPU; an access behind its last byte (`before`: before its first) crashes."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.clone()
    pages = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, pages + _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(ctypes.c_void_p(start if before else start + pages), _PAGE, _NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if before else pages - size
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)
