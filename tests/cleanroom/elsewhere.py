"""A device that is not the CPU, on a machine that has none: real values behind tensors that say they lie elsewhere."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("meta")
"""The one device that every build of PyTorch can name."""
READS = frozenset({"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"})
"""What makes the host wait for a value."""
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "copy_"})
"""What takes tensors of the CPU beside its own on every device."""


class _Away(Tensor):
    """A tensor on `ELSEWHERE` whose values lie in `values`, on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=ELSEWHERE,
        )

    def __init__(self, values):
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("a device's tensor is used outside of its scene")


class _Constants(TorchFunctionMode):
    """Lists that become tensors there: below this, PyTorch would drop their values on the way to `ELSEWHERE`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.tolist and isinstance(args[0], _Away):
            return args[0].cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            several = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in several)
            return func(args[0], index, *args[2:])
        if func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return func(*args, **kwargs)
        device = torch.device(kwargs.pop("device", None) or (args[0].device if func == Tensor.new_tensor else "cpu"))
        if func == Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, **kwargs}
        found = func(*args, **kwargs)
        return _Away(found) if device == ELSEWHERE and not isinstance(found, _Away) else found


class Device(TorchDispatchMode):
    """While entered, tensors can be put there, and an operation on tensors of two devices raises.

    `waits` counts how often a value was read back.
    """

    def __init__(self):
        super().__init__()
        self.waits = 0
        self._constants = _Constants()

    def __enter__(self):
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._constants.__exit__(*raised)

    def put(self, tensor):
        """A copy of a tensor there."""
        return _Away(tensor.detach().clone())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = any(isinstance(leaf, _Away) for leaf in leaves)
        self._check(func, leaves, away)
        target = kwargs.get("device")
        fetched = target is not None and torch.device(target) != ELSEWHERE
        self.waits += away and (fetched or func.overloadpacket.__name__ in READS)
        if target is not None:
            away = torch.device(target) == ELSEWHERE
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map_only(_Away, lambda leaf: leaf.values, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)
        if not away:
            return found
        wrapped = tree_map_only(Tensor, _Away, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    @staticmethod
    def _check(func, leaves, away):
        assert not any(leaf.is_meta and not isinstance(leaf, _Away) for leaf in leaves), f"{func}: values were lost"
        if not away or func.overloadpacket.__name__ in INDEXED:
            return
        strangers = [leaf for leaf in leaves if not isinstance(leaf, _Away) and leaf.ndim]
        if strangers:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in strangers)
            raise RuntimeError(f"{func}: tensors of the CPU {shapes} beside tensors of the device")


def fetched(tensor):
    """The values of a tensor from there, or None of anything else."""
    return tensor.values if isinstance(tensor, _Away) else None
