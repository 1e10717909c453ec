"""What a GPU row says besides time: launches, waits for the device, graph replay, and the copy that bounds it."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from harness.meter import Call, copy_rate, cuda_counts, graph_replay_ns

COLUMNS = (
    "launches_oracle",
    "launches_candidate",
    "waits_oracle",
    "waits_candidate",
    "graph_ns",
    "copy_rate",
    "graph_note",
)
"""All are None on the CPU. `graph_ns`: median replay of the candidate; `copy_rate`: bytes read and written a second."""

REPLAYS = 50


def describe(oracle: Call, candidate: Call, device: torch.device | str) -> dict[str, Any]:
    """The columns of one row, after it was timed; what cannot be captured says why, and costs nothing else."""
    if torch.device(device).type != "cuda":
        return dict.fromkeys(COLUMNS)
    theirs, ours = (cuda_counts(call, device=device) for call in (oracle, candidate))
    try:
        replays, note = graph_replay_ns(candidate, device=device, replays=REPLAYS), ""
    except RuntimeError as error:  # a candidate that synchronises cannot be captured, which is a finding
        replays, note = [], f"not captured: {str(error).partition(chr(10))[0]}"
    return {
        "launches_oracle": theirs.launches,
        "launches_candidate": ours.launches,
        "waits_oracle": theirs.synchronisations,
        "waits_candidate": ours.synchronisations,
        "graph_ns": float(median(replays)) if replays else None,
        "copy_rate": copy_rate(device),
        "graph_note": note,
    }
