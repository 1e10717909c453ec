"""`python -m reference fetch [NAME==VERSION ...]` and `python -m reference list`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from reference.cache import cache_folder, oracle_folder
from reference.errors import FetchError, RequestError
from reference.fetch import fetch
from reference.pins import find_pin, read_pins

INTERRUPTED = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(RequestError.exit_code, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 done, 2 interrupted, 3 an archive is missing or wrong, 4 no such pin."""
    parser = _Parser(prog="python -m reference", description="The pinned upstream releases used as oracles.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fetch", help="download, check and unpack pinned archives into the cache")
    command.add_argument("pins", nargs="*", metavar="NAME==VERSION", help="which pins (default: all)")
    commands.add_parser("list", help="print the pins and whether each is fetched")
    request = parser.parse_args(arguments)
    try:
        return _fetch(request.pins) if request.command == "fetch" else _list()
    except RequestError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fetch(keys: Sequence[str]) -> int:
    chosen = [find_pin(key) for key in keys] or list(read_pins().values())
    code = 0
    for pin in chosen:
        try:
            print(f"{pin} {'fetched' if fetch(pin) else 'is there already'}", flush=True)
        except (FetchError, OSError) as error:  # one archive that can't be had doesn't keep the others away
            print(error, file=sys.stderr)
            code = FetchError.exit_code
    return code


def _list() -> int:
    cache = cache_folder()
    print(f"cache: {cache}")
    for pin in read_pins().values():
        print(f"{pin}  {'fetched' if oracle_folder(cache, pin).is_dir() else 'missing'}  {pin.archive}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
