"""The parent's side of workers: requests with a time limit; a crash or a hang becomes an answer."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.worker import WorkerSettings, serve

if TYPE_CHECKING:
    from harness.plan import Plan

START_LIMIT = 180.0
"""Seconds a worker may take to import PyTorch and an oracle on a loaded machine."""


class WorkerLost(RuntimeError):  # noqa: N818 - an event, not a mistake
    """A worker that crashed or ran out of time, with the stage it was in."""

    def __init__(self, verdict: str, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.verdict, self.stage, self.reason = verdict, stage, reason


class WorkerFailed(RuntimeError):  # noqa: N818 - reads as what happened, beside WorkerLost
    """A worker that cannot start or serve a request: the set-up is at fault, not a candidate."""


class Worker:
    """One worker process, started when first needed and again after it was lost."""

    def __init__(self, settings: WorkerSettings, time_limit: float) -> None:
        self._settings, self._limit = settings, time_limit
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Any = None
        self.provenance: dict[str, Any] = {}

    def request(self, kind: str, *payload: Any, time_limit: float | None = None) -> Any:
        """The worker's answer; raises WorkerLost on a crash or past the limit, WorkerFailed on a refusal."""
        self._start()
        try:
            self._connection.send((kind, payload))
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerLost("crash", kind, self._death()) from None
        return self._answer(time_limit or self._limit, kind)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._settings), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.provenance = self._answer(START_LIMIT, "start")
        except WorkerLost as lost:
            raise WorkerFailed(f"worker of {self._settings.oracle} did not start: {lost.reason}") from lost

    def _answer(self, limit: float, stage: str) -> Any:
        end = time.monotonic() + limit
        while True:
            try:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    self._kill()
                    raise WorkerLost("timeout", stage, f"no answer in {limit:g} s")
                kind, value = self._connection.recv()
            except (EOFError, ConnectionResetError, BrokenPipeError):
                raise WorkerLost("crash", stage, self._death()) from None
            if kind == "stage":
                stage = value
            elif kind == "failed":
                raise WorkerFailed(value)
            else:
                return value

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None

    def _death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self._process = None
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"


class Staff:
    """The workers of a parity run: one that has finished serves the next operation of its oracle.

    Starting one costs as much as judging a hundred cases. A candidate that a user plugs in gets fresh workers for
    every operation: what it does to its process must not reach another's results.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._idle: list[tuple[str, Worker]] = []
        self._lock = threading.Lock()

    @contextmanager
    def worker(self, oracle: str) -> Iterator[Worker]:
        """A worker of `oracle` for one operation, with one thread: cases are small, two would wait for each other."""
        with self._lock:
            fitting = [worker for own, worker in self._idle if own == oracle]
            for own, worker in self._idle:
                if own != oracle:  # operations come ordered by oracle: it has nothing left to do
                    worker.close()
            self._idle = [(oracle, worker) for worker in fitting[1:]]
        chosen = fitting[0] if fitting else Worker(self._plan.worker(oracle, 1), self._plan.time_limit)
        try:
            yield chosen
        finally:
            if any(self._plan.candidates.values()):
                chosen.close()
            else:
                with self._lock:
                    self._idle.append((oracle, chosen))

    def close(self) -> None:
        """End those that are idle."""
        with self._lock:
            for _, worker in self._idle:
                worker.close()
            self._idle = []
