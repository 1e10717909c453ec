"""What a YOLO criterion is called with, for a scene: the head's class and box channels, and the trainer's batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.boxes import Picker, centre_form
from cases.case import DTYPES
from cases.predictions import anchor_predictions
from cases.scenes import Scene

#: The gains of the package (box, cls, dfl), all equal, and each term alone: a fault of one gradient then stands alone.
GAINS = ((7.5, 0.5, 1.5), (7.5, 0.5, 1.5), (1.0, 1.0, 1.0), (7.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 1.5))
REG_MAX = (16, 16, 16, 8, 4, 2, 1, 1)

#: How wide the distributions of box distances are, in bins, and how noisy their logits.
_WIDTH, _NOISE = 0.8, 0.3
_SATURATED_WIDTH = 0.15
_LEAST_HALF = -14.0
#: Logits far beyond what a network answers, still finite in half.
_EXTREME = 1e4


@dataclass(frozen=True)
class Rows:
    """How the trainer's batch is laid out: dtypes of indices and classes, and whether they are columns (n, 1)."""

    index: torch.dtype = torch.float32
    cls: torch.dtype = torch.float32
    column: bool = False

    @classmethod
    def drawn(cls, pick: Picker) -> "Rows":
        """Any layout that upstream takes."""
        kinds = (torch.float32, torch.float32, torch.int64)
        return cls(pick.choice(kinds), pick.choice(kinds), pick.choice((False, False, True)))


@dataclass(frozen=True)
class Head:
    """Box channels (B, 4R, A), class logits (B, C, A), and `aims` (B, A), the row that each anchor follows, or -1."""

    boxes: Tensor
    scores: Tensor
    aims: np.ndarray


def head(scene: Scene, seed: int, reg_max: int, dtype: str, *, extreme: bool = False) -> Head:
    """Predictions of the scene's kind as a head's channels; `extreme` puts logits of ±1e4 at a few places."""
    frame = scene.frame
    found = anchor_predictions(scene.prediction, seed, frame, scene.boxes, scene.class_indices, scene.num_classes)
    if scene.prediction == "saturated":
        # Where all logits are -30 upstream's class term is what is left of a cancellation, in float64 too.
        found.logits[:, :1] = found.logits[:, :1].clip(-2, 2)
    if dtype == "float16":
        # Below, a probability is 0 in half, and metrics of 0 tie: who wins an anchor is then any row's luck, and an
        # anchor won with a metric of 0 is told as background.
        found.logits.clip(_LEAST_HALF, None, out=found.logits)
    points, strides = frame.points, frame.cells[:, 2:]
    near, far = (points - found.boxes[..., :2]) / strides, (found.boxes[..., 2:] - points) / strides
    boxes = _channels(scene, seed, np.concatenate([near, far], axis=-1), reg_max)
    channels = {"boxes": boxes, "scores": found.logits.transpose(0, 2, 1)}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array)).to(DTYPES[dtype]) for name, array in channels.items()
    }
    if extreme:
        rng = np.random.default_rng([seed, 3])
        for tensor in tensors.values():
            places = torch.from_numpy(rng.integers(0, max(1, tensor.numel()), 3))
            if tensor.numel():
                tensor.view(-1)[places] = torch.from_numpy(rng.choice([-_EXTREME, _EXTREME], 3)).to(tensor.dtype)
    return Head(**tensors, aims=found.aims)


def _channels(scene: Scene, seed: int, distances: np.ndarray, reg_max: int) -> np.ndarray:
    """(B, 4R, A) of distances (B, A, 4) in cells: themselves for one bin, else logits of a distribution around each."""
    if reg_max == 1:
        return distances.transpose(0, 2, 1)
    images, anchors, _ = distances.shape
    if scene.prediction == "uniform":
        # A fresh head has no preference.
        return np.zeros((images, 4 * reg_max, anchors))
    rng = np.random.default_rng([seed, 2])
    distances = distances.transpose(0, 2, 1)[:, :, None].clip(0, reg_max - 1)
    width = _SATURATED_WIDTH if scene.prediction == "saturated" else _WIDTH
    noise = rng.standard_normal((images, 4, reg_max, anchors), dtype=np.float32)
    if scene.prediction == "tied":
        count = anchors // 2 * 2
        noise[..., 1:count:2] = noise[..., 0:count:2]
    logits = -0.5 * ((np.arange(reg_max)[:, None] - distances) / width) ** 2 + _NOISE * noise
    return logits.reshape(images, 4 * reg_max, anchors)


def batch(scene: Scene, dtype: str, rows: Rows) -> dict[str, Tensor]:
    """The trainer's labels: `batch_idx` and `cls` (n,), `bboxes` (n, 4) normalised centre form, image after image.

    Upstream takes targets of float32 only. Those of a float64 case are float32 numbers in float64.
    """
    size = np.array([scene.frame.width, scene.frame.height] * 2, dtype=np.float64)
    wide = torch.float64 if dtype == "float64" else torch.float32
    boxes = torch.from_numpy(np.concatenate([centre_form(image) / size for image in scene.boxes])).float()
    index = np.repeat(np.arange(len(scene.counts)), scene.counts)
    shape = (-1, 1) if rows.column else (-1,)
    return {
        "batch_idx": torch.from_numpy(index).to(rows.index).view(shape),
        "cls": torch.from_numpy(np.concatenate(scene.labels)).to(rows.cls).view(shape),
        "bboxes": boxes.to(wide),
    }


def settings(scene: Scene, reg_max: int, gains: tuple[float, ...], **others: Any) -> dict[str, Any]:
    """The settings that every detection criterion has."""
    frame = scene.frame
    return {
        "levels": [[frame.height // stride, frame.width // stride] for stride in frame.strides],
        "strides": list(frame.strides),
        "num_classes": scene.num_classes,
        "reg_max": reg_max,
        "gains": dict(zip(("box", "cls", "dfl"), gains, strict=True)),
        **others,
    }


def class_weights(pick: Picker, classes: int) -> list[float]:
    """One weight a class, 0 among them."""
    return [pick.choice((1.0, 0.5, 2.0, 0.0, 0.3)) for _ in range(classes)]


def autocast(pick: Picker, dtype: str) -> str | None:
    """The dtype whose autocast a case runs under: mostly none, and none in float64."""
    if dtype in ("float16", "bfloat16"):
        return pick.choice((None, None, None, dtype))
    return pick.choice((None,) * 8 + ("bfloat16", "float16")) if dtype == "float32" else None
