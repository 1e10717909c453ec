"""Times two implementations in interleaved pairs, and finds the memory that one call takes."""

import ctypes
import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from harness.statistics import MINIMUM_PAIRS

Provider = Literal["oracle", "candidate"]
Call = Callable[[], Any]

# Warm-ups beyond the first may take this share of the budget.
WARMUP_SHARE = 0.25
STRETCH = 5.0
"""A slow row may take so many times its budget to reach the pairs below which nothing is found out."""


@dataclass(frozen=True)
class Sample:
    """One timed call: its pair, whose it is, its time, and whether it ran first in its pair."""

    pair: int
    provider: Provider
    nanoseconds: int
    first: bool


@dataclass(frozen=True)
class Measured:
    """Raw samples in the order they ran, the CPU threads they had, and a note where pairs are too few."""

    samples: tuple[Sample, ...]
    threads: int
    note: str

    @property
    def pairs(self) -> int:
        """Number of pairs timed."""
        return len(self.samples) // 2

    def nanoseconds(self, provider: Provider) -> list[int]:
        """Times of one provider in pair order, in nanoseconds."""
        return [sample.nanoseconds for sample in self.samples if sample.provider == provider]


class PeakBytes(NamedTuple):
    """Peak of one call above what was allocated at its start, in bytes.

    `requested` is what the call asked for; `allocated` includes the rounding of the CUDA allocator. The CPU
    allocator reports requests only, so there they are equal.
    """

    allocated: int
    requested: int


class CudaCounts(NamedTuple):
    """Kernels (or graphs) that the host launched in one call, and the times it waited for the device."""

    launches: int
    synchronisations: int


def measure(
    oracle: Call,
    candidate: Call,
    *,
    device: torch.device | str,
    budget_seconds: float,
    min_pairs: int = MINIMUM_PAIRS,
    max_pairs: int = 200,
    warmups: int = 3,
    seed: int,
) -> Measured:
    """Time both calls in this process, in pairs whose order `seed` draws.

    The first call of each is discarded, and up to `warmups` are while they fit in WARMUP_SHARE of the budget.
    Pairs follow until `max_pairs`, or until the next would end past `budget_seconds`, warm-ups counted in; while
    they are fewer than `min_pairs`, past STRETCH times that. There is always at least one. Fewer than `min_pairs` is
    no error: the result's note says so.

    CPU: the host clock around the call. CUDA: events around the call, after the L2 cache has been flushed;
    a call that waits for the device has its host time between the events as well. No garbage is collected
    inside a sample; the output of a call is freed after its clock is read and before the next call.

    Raises ValueError naming the argument for a device that is absent or not supported, or limits out of
    range; what a call raises comes through unchanged.
    """
    if not budget_seconds >= 0:
        raise ValueError(f"budget_seconds: {budget_seconds} is not a number of at least 0")
    if not 1 <= min_pairs <= max_pairs:
        raise ValueError(f"min_pairs: {min_pairs} is not between 1 and max_pairs = {max_pairs}")
    if warmups < 1:
        raise ValueError(f"warmups: {warmups} is less than 1, and first calls are never timed")
    timer = _timer(_present(device))
    calls: dict[Provider, Call] = {"oracle": oracle, "candidate": candidate}
    samples: list[Sample] = []
    begin = time.perf_counter()

    def room_for(next_seconds: float, share: float = 1.0) -> bool:
        return time.perf_counter() - begin + next_seconds <= share * budget_seconds

    with _garbage_held():
        for done in range(warmups):
            if done and not room_for((time.perf_counter() - begin) / done, WARMUP_SHARE):
                break
            for call in calls.values():
                timer(call)
        first_pair = time.perf_counter()
        for pair, order in zip(range(max_pairs), _orders(seed), strict=False):
            share = 1.0 if pair >= min_pairs else STRETCH
            if pair and not room_for((time.perf_counter() - first_pair) / pair, share):
                break
            samples += [Sample(pair, name, timer(calls[name]), name == order[0]) for name in order]

    pairs = len(samples) // 2
    note = ""
    if pairs < min_pairs:
        note = f"{pairs} of at least {min_pairs} pairs fitted in {STRETCH * budget_seconds:g} s"
    return Measured(tuple(samples), torch.get_num_threads(), note)


@cache
def keep_freed_memory() -> bool:
    """Tell the C library to keep what this process frees, for good; whether it was understood (glibc only).

    By default glibc gives large blocks back to the system and asks for new pages at the next call, or does not:
    that depends on the order of earlier calls, and a fresh page costs as much as filling it several times over. One
    and the same upstream call took 60 to 210 ms in runs on one machine, and takes 18 ms with memory that is kept.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, _LARGEST_BLOCK) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def peak_bytes(call: Call, *, device: torch.device | str) -> PeakBytes:
    """Peak memory of one call above what existed before it: temporaries and outputs count, inputs do not.

    Call it after `measure`, so that one-off caches exist, and never inside it: the profiler slows the call.

    CPU: the running maximum over the profiler's allocation events, which PyTorch's CPU allocator emits in the
    calling thread. It cannot see other Python threads, NumPy, SciPy, or scratch inside C++ containers.
    CUDA: the caching allocator's own peaks, from every thread.

    Raises ValueError naming `device` where it is absent or not supported; what the call raises comes through.
    """
    device = _present(device)
    gc.collect()
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def tensor_bytes(outputs: Any) -> int:
    """Bytes of the elements of all tensors in nested mappings, lists, tuples and named tuples.

    Elements and not storages: an expanded view counts in full and a slice of a large tensor only as the
    slice, so that equal outputs count the same however they were made. Anything else counts nothing.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, Mapping):
        return sum(map(tensor_bytes, outputs.values()))
    if isinstance(outputs, list | tuple):
        return sum(map(tensor_bytes, outputs))
    return 0


def cuda_counts(call: Call, *, device: torch.device | str) -> CudaCounts:
    """Count kernel launches and host synchronisations of one call, from the profiler's CUDA runtime events.

    Warm the call up first, or its compilation and first-use set-up count too. Raises ValueError naming
    `device` without a GPU, and RuntimeError where the profiler cannot see launches at all.
    """
    device = _present(device, needed="cuda")
    with torch.cuda.device(device):
        probe = torch.zeros(1, device=device)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            probe.add_(1)
            torch.cuda.synchronize()
            with record_function(_COUNTED_CALL):
                output = call()
            del output
    # Only the host's side: the device's timeline repeats the region's name for the kernels inside it.
    events = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CPU
    ]
    return _counts_of_region(events)


def graph_replay_ns(call: Call, *, device: torch.device | str, replays: int) -> list[int]:
    """Time `replays` replays of the call captured as a CUDA graph, in nanoseconds, L2 flushed before each.

    Raises ValueError naming `device` without a GPU; PyTorch's RuntimeError where the call cannot be captured
    (it synchronises, or allocates by value) comes through.
    """
    device = _present(device, needed="cuda")
    with torch.cuda.device(device):
        # Capture needs a warm call on a stream other than the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        timer = _timer(device)
        timer(graph.replay)  # the first replay uploads the graph
        return [timer(graph.replay) for _ in range(replays)]


@cache
def copy_rate(device: torch.device | str) -> float:
    """Bytes read and written a second by a copy far larger than the caches: what a kernel bound by memory may reach.

    The best of a few, in this process and on this device; raises ValueError naming `device` without a GPU.
    """
    device = _present(device, needed="cuda")
    with torch.cuda.device(device):
        source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        timer = _timer(device)
        best = min(timer(lambda: target.copy_(source)) for _ in range(_COPIES))
    return 2 * _COPIED_BYTES / (best * 1e-9)


def _present(device: torch.device | str, needed: str | None = None) -> torch.device:
    device = torch.device(device)
    if device.type not in ((needed,) if needed else ("cpu", "cuda")):
        raise ValueError(f"device: {device} is not supported here, {needed or 'cpu or cuda'} is")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} is asked for and PyTorch sees no GPU")
    return device


def _timer(device: torch.device) -> Callable[[Call], int]:
    """Return a function that runs a call once and gives its nanoseconds; the call's output is freed after."""
    return _cuda_timer(device) if device.type == "cuda" else _time_on_cpu


def _time_on_cpu(call: Call) -> int:
    gc.collect(0)
    start = time.perf_counter_ns()
    output = call()
    elapsed = time.perf_counter_ns() - start
    del output
    return elapsed


def _cuda_timer(device: torch.device) -> Callable[[Call], int]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    # Twice the cache, so that no line of the inputs or of the other implementation survives the write.
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def time_on_cuda(call: Call) -> int:
        gc.collect(0)
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            output = call()
            end.record()
            end.synchronize()
            del output
            return round(start.elapsed_time(end) * 1e6)

    return time_on_cuda


def _orders(seed: int) -> Iterator[tuple[Provider, Provider]]:
    """Endless random orders; pairs 2i and 2i + 1 have one of each, so that few pairs are balanced too."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample([("oracle", "candidate"), ("candidate", "oracle")], 2)


@contextmanager
def _garbage_held() -> Iterator[None]:
    """Keep the garbage collector from running on its own; the timers collect the young before each sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_peak(call: Call) -> PeakBytes:
    # Else it writes lines to stderr for every profile. Set here: one of the oracles sets it when imported.
    os.environ["KINETO_LOG_LEVEL"] = "99"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = call()
        # Freed while the profiler looks: it remembers blocks by address, and one freed behind its back would
        # give a wrong size to whatever a later profile frees there.
        del output
    changes = sorted(
        (
            (event.start_ns(), event.nbytes())
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
        ),
        key=lambda change: change[0],
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return PeakBytes(peak, peak)


def _cuda_peak(call: Call, device: torch.device) -> PeakBytes:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    output = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    del output

    def growth(kind: str) -> int:
        return after[f"{kind}.all.peak"] - before[f"{kind}.all.current"]

    return PeakBytes(growth("allocated_bytes"), growth("requested_bytes"))


# Of malloc.h; the largest value that mallopt can be given.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_BLOCK = -1, -3, 2**31 - 1
_COPIED_BYTES, _COPIES = 1 << 30, 10
_COUNTED_CALL = "harness.meter: counted call"
_LAUNCHES = frozenset(
    {
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cudaLaunchCooperativeKernel",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cuLaunchCooperativeKernel",
        "cudaGraphLaunch",
    }
)
# PyTorch's blocking copies are an asynchronous copy and one of these, so copies need no row of their own.
_SYNCHRONISATIONS = frozenset(
    {
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cuStreamSynchronize",
        "cuCtxSynchronize",
        "cuEventSynchronize",
    }
)


def _counts_of_region(events: Iterable[tuple[str, int, int]]) -> CudaCounts:
    """Count over (name, start, end) events inside the counted region.

    The profiler's own synchronisations lie outside it, and so does the probe launch, without which a zero
    would mean only that nothing was seen.
    """
    events = list(events)
    start, end = next((start, end) for name, start, end in events if name == _COUNTED_CALL)
    if not any(name in _LAUNCHES and when < start for name, when, _ in events):
        raise RuntimeError("the profiler shows no CUDA launch, so none can be counted (is CUPTI usable?)")
    inside = [name for name, when, _ in events if start <= when <= end]
    return CudaCounts(
        launches=sum(name in _LAUNCHES for name in inside),
        synchronisations=sum(name in _SYNCHRONISATIONS for name in inside),
    )
