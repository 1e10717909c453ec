"""Pairs of operation and oracle, several at a time, each on a worker that holds the oracle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

from harness.parity import Interrupted
from harness.pool import Staff, WorkerFailed


def in_parallel(
    plan: Any, pairs: Iterable[tuple[str, str]], one: Callable[[Any, Staff, Callable[[], bool]], None]
) -> list[str]:
    """`one(pair, staff, stopped)` for each (operation, oracle); returns why some were lost.

    `plan` says how many at a time, and how a worker is started. Ctrl-C stops all after their case.
    """
    stop, staff = threading.Event(), Staff(plan)
    with closing(staff), ThreadPoolExecutor(plan.workers) as pool:
        futures = {pool.submit(one, pair, staff, stop.is_set): pair for pair in pairs}
        try:
            pending = set(futures)
            while pending:
                _, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    lost = []
    for future, pair in futures.items():
        error = future.exception()
        if isinstance(error, WorkerFailed):
            lost.append(f"{' on '.join(pair)}: {error}")
        elif error is not None and not isinstance(error, Interrupted):
            raise error
    return lost
