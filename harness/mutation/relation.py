"""Relations as what finds mutants: no oracle is asked, the answers to two cases must fit each other."""

from __future__ import annotations

from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.mutation import overlay
from harness.mutation.parity import Bench, load, where
from harness.mutation.zygote import stage

CASES = 6
"""Cases of an operation and path on which relations are tried: each asks the candidate some twenty times."""
LEAST_SECONDS, MOST_TIMES = 30.0, 2000


def kill(
    connection: Connection, oracle: str, rows: list[dict[str, Any]], subject: str, module: str, file: str, folder: str
) -> dict[str, Any] | None:
    """What finds the mutant `module`, whose text is in `file`: {by, row, detail}, or None where all relations hold."""
    overlay.lay(Path(subject), module, Path(file))
    stage(connection, "import", 60.0)
    import_module(module)
    bench = Bench(oracle)
    for row in rows:
        at = where(oracle, row)
        stage(connection, at, LEAST_SECONDS + MOST_TIMES * row["seconds"])
        for name, detail in _broken(bench, folder, row).items():
            return {"by": "relation", "row": row, "relation": name, "detail": f"{at}: {name}: {detail}"[:300]}
    return None


def holds(connection: Connection, oracle: str, row: dict[str, Any], relation: str, subject: str, folder: str) -> bool:
    """Whether the unmutated library keeps a relation on a case."""
    overlay.lay(Path(subject))
    stage(connection, where(oracle, row), 600.0)
    return relation not in _broken(Bench(oracle), folder, row)


def _broken(bench: Bench, folder: str, row: dict[str, Any]) -> dict[str, str]:
    from harness.relations import BROKEN, NAMES

    found = bench.relate(row["operation"], load(folder, row).to_bytes(), row["candidate"], NAMES)
    return {one["relation"]: one["detail"] for one in found if one["verdict"] == BROKEN}
