"""Cases of the SimOTA assigner: drawn scenes, labelled images, and inputs that upstream rejects."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.frame import Frame
from cases.labels import LabelImage
from cases.predictions import anchor_predictions, spoil
from cases.scenes import PADDING_CONTENTS, Scene, common_tags, draw_scene, inside, padded, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 2

#: Pixels.
_LEAST_SIDE = 0.1

#: Half side of the centre square in strides, of the release that the articles describe.
_RADIUS = 2.5


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, labels=("fractional", "fraction-below-zero"), empty_batch=True)
    extra, content = pick.choice((0, 0, 1, 2)), pick.choice(PADDING_CONTENTS)
    return perhaps(pick, FLAWS, build(scene, dtype, f"drawn:simota/{STRATEGY_VERSION}", extra, content))


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` with predictions of training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(scene: Scene, dtype: str, origin: str, extra: int = 0, content: str = "zeros") -> Case:
    """The case of `scene` in `dtype`, with `extra` padded rows at the end of every image."""
    boxes, labels, valid = padded(scene, max(scene.counts, default=0) + extra, content=content)
    predictions = anchor_predictions(
        scene.prediction, scene.seed, scene.frame, scene.boxes, scene.class_indices, scene.num_classes
    )
    # Decoded sizes are exponentials: small, never zero. Boxes of no area would only try 0/0 (spec 4.9).
    predicted = centre_form(predictions.boxes)
    predicted[..., 2:] = np.maximum(predicted[..., 2:], _LEAST_SIDE)
    columns, rows, strides = scene.frame.cells.T
    arrays = {
        "gt_boxes": centre_form(boxes),
        "gt_classes": labels,
        "pred_boxes": predicted,
        "cls_logits": predictions.logits,
        "obj_logits": predictions.objectness,
        "strides": strides[None].copy(),
        "x_shifts": columns[None].copy(),
        "y_shifts": rows[None].copy(),
    }
    tensors = {name: torch.from_numpy(array).to(DTYPES[dtype]) for name, array in arrays.items()}
    tensors["num_gt"] = torch.tensor(scene.counts, dtype=torch.int64)
    tags = common_tags(scene, dtype)
    if not valid.all():
        tags |= {"padding", f"padding-{content}"}
    for image in scene.boxes:
        tags |= _region_tags(scene.frame, image)
    # A NaN logit of a candidate is rejected, so only the flaw below makes one; infinite ones have an answer.
    places = ("pred_boxes",) if scene.prediction == "nan-one-place" else ("pred_boxes", "cls_logits", "obj_logits")
    if spoil(scene.prediction, scene.seed, predictions.aims, {name: tensors[name] for name in places}):
        tags.add("non-finite")
    return Case("simota", tensors, {"num_classes": scene.num_classes}, origin, frozenset(tags))


def candidates(frame: Frame, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Anchors inside each of `boxes` (n, 4) xyxy, and in its centre square, (n, A) bool both; spec 4.2."""
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    square = (np.abs(frame.points - centres) < _RADIUS * frame.cells[:, 2:]).all(axis=2)
    return inside(frame.points, boxes), square


def _region_tags(frame: Frame, boxes: np.ndarray) -> set[str]:
    tags = set()
    in_box, in_square = candidates(frame, boxes)
    free = in_box & in_square
    count = (in_box | in_square).any(axis=0).sum()
    if len(boxes) and not count:
        # Upstream fails in its top-k; an empty foreground is a sound alternative.
        tags |= {"no-candidate", "invalid"}
    if 0 < count < 10:
        tags.add("k-exceeds-candidates")
    if (free.sum(axis=0) > 1).any():
        tags.add("conflict")
    if count and not free.any(axis=1).all():
        tags.add("penalised-only")
    return tags


def _label_beyond_classes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    return _label(tensors, settings["num_classes"])


def _label_below_zero(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    return _label(tensors, -1)


def _label(tensors: dict[str, Tensor], label: int) -> bool:
    images = tensors["num_gt"].nonzero()
    if not len(images):
        return False
    tensors["gt_classes"][images[0, 0], 0] = label
    return True


def _nan_logits(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    # At every anchor, so that a candidate is among them.
    tensors["cls_logits"][...] = torch.nan
    return bool(tensors["num_gt"].any())


def _far_outside(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["gt_boxes"][..., :2] += 10_000
    return bool(tensors["num_gt"].any())


FLAWS = (
    Flaw("label-beyond-classes", "no one-hot code for the class", _label_beyond_classes),
    Flaw("label-below-zero", "no one-hot code for the class", _label_below_zero),
    Flaw("nan-logits", "a probability that is not in [0, 1]", _nan_logits),
    Flaw("no-candidate", "nothing to select from", _far_outside),
)
