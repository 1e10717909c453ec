"""Where archives and unpacked oracles lie, and the lock that keeps two fetches apart."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reference.pins import Pin


def cache_folder() -> Path:
    """Return CLEANROOM_CACHE, or `cleanroom` in the user's cache directory. It need not exist."""
    chosen = os.environ.get("CLEANROOM_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanroom"


def archive_file(cache: Path, pin: Pin) -> Path:
    """Return where the pin's archive is kept; one put there by hand is used instead of the network."""
    return cache / "archives" / pin.archive


def oracle_folder(cache: Path, pin: Pin) -> Path:
    """Return where the pin's archive is unpacked: whole if it exists. Another hash is another folder."""
    return cache / "oracles" / f"{pin.name}-{pin.version}-{pin.sha256[:12]}"


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Hold the cache's lock; the system releases it however the process ends."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
