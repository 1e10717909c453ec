"""A process that has imported what every mutant needs, and forks one child a request.

PyTorch, an oracle and pytest take seconds to import, a fork milliseconds. Nothing of `cleanroom` is imported before
the fork: each child imports its own. Each request has a supervisor, which says how its child ended.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from pathlib import Path
from typing import Any

from harness.mutation.sources import PROJECT

START_LIMIT = 180.0
MEMORY = 8 * 2**30
"""Bytes of data that a child may have: what asks for more is refused there, instead of taking the machine down."""


class ZygoteFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A zygote that did not start, or a child that ended as no mutant should end it."""


class Died(RuntimeError):  # noqa: N818 - an event, not a mistake
    """A child that ended without an answer: `by` is "timeout" or "crash", `stage` what it was about."""

    def __init__(self, by: str, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}" if stage else reason)
        self.by, self.stage = by, stage


class Zygote:
    """The parent's side: `ask` may be called from several threads at once."""

    def __init__(self, prepare: str, *arguments: str, folder: Path, name: str) -> None:
        self._address = str(folder / f"{name}.socket")
        self._errors = (folder / "errors.txt").open("ab")
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        stores = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        stores |= {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"), "PYTHONDONTWRITEBYTECODE": "1"}
        # A session of its own: Ctrl-C is for the parent. The pipe to its standard input ends it with the parent.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.mutation.zygote", self._address, prepare, *arguments],
            cwd=PROJECT, env={**os.environ, **quiet, **stores}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        self._name = " ".join((prepare, *arguments[:1]))
        self._asking: set[Connection] = set()

    def ask(self, task: str, limit: float, **request: Any) -> Any:
        """What `task`, "MODULE:FUNCTION", returns in a child of its own; raises Died where it does not."""
        with self._connect() as connection:
            self._asking.add(connection)
            try:
                connection.send((task, limit, request))
                kind, *answer = connection.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise ZygoteFailed(f"{self._name}: the supervisor of {task} is gone") from error
            finally:
                self._asking.discard(connection)
        if kind == "done":
            return answer[0]
        if kind == "failed":
            raise ZygoteFailed(f"{self._name}: {task}: {answer[0]}")
        raise Died(*answer)

    def close(self) -> None:
        """End the process and whatever it is asked; who asks in another thread gets ZygoteFailed."""
        for connection in tuple(self._asking):
            # A supervisor whose client is gone ends its child.
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _connect(self) -> Connection:
        end = time.monotonic() + START_LIMIT
        while True:
            try:
                return Client(self._address, "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise ZygoteFailed(f"{self._name} did not start: {self._last_error()}") from None
                time.sleep(0.05)

    def _last_error(self) -> str:
        lines = Path(self._errors.name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}"


def stage(connection: Connection, text: str, cpu_seconds: float) -> None:
    """Said by a child before it enters something: it is killed where that takes more processor time.

    Processor time, so that a busy machine makes no mutant look slow.
    """
    connection.send(("stage", text))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _main(address: str, prepare: str, *arguments: str) -> None:
    Path(address).unlink(missing_ok=True)
    _function(prepare)(*arguments)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Listener(address, "AF_UNIX") as listener:
        listening = listener._listener._socket
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection = listener.accept()
            if os.fork() == 0:
                _supervise(connection)
            connection.close()


def _supervise(connection: Connection) -> None:
    """Fork the child, watch it, and answer; whatever happens, this process ends here."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        task, limit, request = connection.recv()
        ours, theirs = Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            _run(task, request, theirs)
        os.setpgid(child, child)
        theirs.close()
        connection.send(_outcome(child, ours, connection, limit))
    finally:
        os._exit(0)


def _outcome(child: int, pipe: Connection, client: Connection, limit: float) -> tuple:
    end, said = time.monotonic() + limit, ""
    while True:
        ready = wait([pipe, client], max(0.0, end - time.monotonic()))
        if pipe not in ready:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "died", "timeout", said, f"no answer in {limit:g} s"
        try:
            message = pipe.recv()
        except EOFError:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -signal.SIGPROF:
                return "died", "timeout", said, "more processor time than allowed"
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return "died", "crash", said, reason
        if message[0] != "stage":
            os.waitpid(child, 0)
            return message
        said = message[1]


def _run(task: str, request: dict[str, Any], connection: Connection) -> None:
    try:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - open as long as the process lives
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        answer = "done", _function(task)(connection, **request)
    except Exception as error:  # said to the parent, which ends the run with it
        answer = "failed", f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.send(answer)
    os._exit(0)


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


if __name__ == "__main__":
    _main(*sys.argv[1:])
