"""Real labels: COCO JSON or a YOLO folder of text files, as boxes on the square canvas of a trainer."""

import json
import math
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cases.frame import TRAINING_SIZE

#: Normalised YOLO coordinates may pass 1 by this much: exporters round.
_NORMALISED_SLACK = 1e-3
#: More than any set has (V3Det: 13,204 classes; xView: 4,967 boxes in an image). Cases are classes and boxes by
#: anchors: a label file must not decide how much memory is taken.
MOST_CLASSES, MOST_BOXES = 20_000, 20_000


class LabelError(ValueError):
    """A label file that is not what it should be; the message names the file, the record and the reason."""

    def __init__(self, file: str | os.PathLike[str], record: str, reason: str):
        self.file, self.record, self.reason = str(file), record, reason
        super().__init__(": ".join(part for part in (self.file, record, reason) if part))


@dataclass(frozen=True)
class LabelImage:
    """Labels of an image of `width` x `height` pixels: `boxes` (n, 4) float64 xyxy, `classes` (n,) int64, which
    are below the `num_classes` of its set.
    """

    name: str
    width: int
    height: int
    boxes: Tensor
    classes: Tensor
    num_classes: int


@dataclass(frozen=True)
class LabelSet:
    """Labelled images on one square canvas. `source` is a name without its folder, `skipped` counts the
    annotations left out as trainers leave them out: crowds, and boxes with a side of zero.
    """

    source: str
    images: tuple[LabelImage, ...]
    class_names: tuple[str, ...]
    skipped: int

    def batches(self, size: int) -> list[tuple[LabelImage, ...]]:
        """The images in their order, `size` at a time; the last batch may be smaller."""
        return [self.images[first : first + size] for first in range(0, len(self.images), size)]


def read_labels(path: str | os.PathLike[str], canvas: int = TRAINING_SIZE) -> LabelSet:
    """Read a COCO JSON file or a YOLO folder, letterboxed (scaled, centred) to `canvas` x `canvas` pixels.

    YOLO files don't say how large their images are; they are taken as `canvas` x `canvas`. Raises LabelError
    with the file, the record and the reason for anything malformed.
    """
    path = Path(path)
    if not path.exists():
        raise LabelError(path, "", "no such file or folder")
    labels = _read_yolo(path, canvas) if path.is_dir() else _read_coco(path, canvas)
    if not labels.images:
        raise LabelError(path, "", "the set is empty: no images")
    if len(labels.class_names) > MOST_CLASSES:
        raise LabelError(path, "", f"{len(labels.class_names)} classes are more than {MOST_CLASSES}")
    for image in labels.images:
        if len(image.boxes) > MOST_BOXES:
            raise LabelError(path, image.name, f"{len(image.boxes)} boxes in an image are more than {MOST_BOXES}")
    if not any(len(image.boxes) for image in labels.images):
        raise LabelError(path, "", "the set is empty: no image has a box")
    return labels


def _read_coco(path: Path, canvas: int) -> LabelSet:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise LabelError(path, "", f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise LabelError(path, "", "not COCO: the top level is no object")
    categories = _by_id(path, content, "categories")
    # Category ids have gaps (COCO: 1 to 90 for 80 classes); class indices are their ranks.
    try:
        ordered = sorted(categories)
    except TypeError:
        raise LabelError(path, "categories", "ids mix numbers and strings") from None
    index = {identifier: rank for rank, identifier in enumerate(ordered)}
    images = _by_id(path, content, "images")
    sizes, names = {}, {}
    for identifier, (record, image) in images.items():
        sizes[identifier] = tuple(_side(path, record, image, key) for key in ("width", "height"))
        names[identifier] = str(image.get("file_name", identifier))
    rows: dict[Hashable, list[tuple[list[float], int]]] = {identifier: [] for identifier in images}
    skipped = 0
    for position, annotation in enumerate(_records(path, content, "annotations")):
        record = f"annotations[{position}]"
        image = _known(path, record, annotation, "image_id", images)
        category = _known(path, record, annotation, "category_id", categories)
        x, y, width, height = _coco_box(path, record, annotation)
        if annotation.get("iscrowd", 0) or width == 0 or height == 0:
            skipped += 1
            continue
        box = _letterboxed([x, y, x + width, y + height], *sizes[image], canvas)
        rows[image].append((box, index[category]))
    return LabelSet(
        source=path.name,
        images=tuple(_image(names[key], canvas, rows[key], len(categories)) for key in images),
        class_names=tuple(str(categories[identifier][1].get("name", identifier)) for identifier in ordered),
        skipped=skipped,
    )


def _read_yolo(path: Path, canvas: int) -> LabelSet:
    folder = path / "labels" if (path / "labels").is_dir() else path
    # Annotation tools leave their class list beside the labels.
    files = sorted(file for file in folder.rglob("*.txt") if file.name != "classes.txt")
    if not files:
        raise LabelError(path, "", "the set is empty: no labels/*.txt (for COCO, name the JSON file)")
    labelled: dict[str, list[tuple[list[float], int]]] = {}
    skipped = 0
    for file in files:
        rows = labelled.setdefault(file.relative_to(folder).with_suffix("").as_posix(), [])
        for number, line in enumerate(_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            label, (cx, cy, width, height) = _yolo_row(file, f"line {number}", line.split())
            if width == 0 or height == 0:
                skipped += 1
                continue
            corners = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            rows.append(([corner * canvas for corner in corners], label))
    # The folder doesn't say how many classes there are: as many as its largest index asks for.
    classes = 1 + max((label for rows in labelled.values() for _, label in rows), default=0)
    return LabelSet(
        source=path.name,
        images=tuple(_image(name, canvas, rows, classes) for name, rows in labelled.items()),
        class_names=tuple(map(str, range(classes))),
        skipped=skipped,
    )


def _yolo_row(file: Path, record: str, fields: list[str]) -> tuple[int, list[float]]:
    if len(fields) != 5:
        raise LabelError(file, record, f"{len(fields)} fields where 5 belong (class cx cy w h)")
    # `isdecimal` and not `int`: the latter reads "1_0" and "+1".
    if not (fields[0].isascii() and fields[0].isdecimal()) or len(fields[0]) > 6:
        raise LabelError(file, record, f"unknown category {fields[0][:40]!r}: not a class index")
    values = []
    for name, field in zip(("cx", "cy", "w", "h"), fields[1:], strict=True):
        try:
            value = float(field)
        except ValueError:
            raise LabelError(file, record, f"{name} is not a number: {field[:40]!r}") from None
        if not math.isfinite(value):
            raise LabelError(file, record, f"{name} is not finite: {field}")
        if value < 0 and name in ("w", "h"):
            raise LabelError(file, record, f"{name} is negative: {field}")
        if not 0 <= value <= 1 + _NORMALISED_SLACK:
            raise LabelError(file, record, f"{name} is not normalised to the image (0 to 1): {field}")
        values.append(value)
    return int(fields[0]), values


def _coco_box(path: Path, record: str, annotation: dict[str, Any]) -> list[float]:
    box = _required(path, record, annotation, "bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise LabelError(path, record, "bbox is not a list of 4 numbers (x, y, width, height)")
    values = [_number(path, record, f"bbox[{axis}]", value) for axis, value in enumerate(box)]
    if values[2] < 0 or values[3] < 0:
        raise LabelError(path, record, f"bbox has a negative size: {values[2]} x {values[3]}")
    return values


def _letterboxed(box: list[float], width: float, height: float, canvas: int) -> list[float]:
    """A box of an image scaled to fit the canvas and centred on it."""
    scale = min(canvas / width, canvas / height)
    left, top = (canvas - width * scale) / 2, (canvas - height * scale) / 2
    return [value * scale + offset for value, offset in zip(box, (left, top, left, top), strict=True)]


def _image(name: str, canvas: int, rows: list[tuple[list[float], int]], num_classes: int) -> LabelImage:
    boxes = torch.tensor([box for box, _ in rows], dtype=torch.float64).reshape(-1, 4)
    classes = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return LabelImage(name, canvas, canvas, boxes, classes, num_classes)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            # A pipe or a device may never end.
            raise LabelError(path, "", "is not a regular file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LabelError(path, "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabelError(path, "", f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _records(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    records = _required(path, "", content, key)
    if not isinstance(records, list):
        raise LabelError(path, key, "is not a list")
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise LabelError(path, f"{key}[{position}]", "is not an object")
    return records


def _by_id(path: Path, content: dict[str, Any], key: str) -> dict[Hashable, tuple[str, dict[str, Any]]]:
    """The records of `key` with their name in messages, by their id."""
    found: dict[Hashable, tuple[str, dict[str, Any]]] = {}
    for position, record in enumerate(_records(path, content, key)):
        name = f"{key}[{position}]"
        identifier = _identifier(path, name, "id", _required(path, name, record, "id"))
        if identifier in found:
            raise LabelError(path, name, f"duplicate id {identifier!r}, first in {found[identifier][0]}")
        found[identifier] = (name, record)
    return found


def _known(path: Path, record: str, annotation: dict[str, Any], key: str, known: dict) -> Hashable:
    identifier = _identifier(path, record, key, _required(path, record, annotation, key))
    if identifier not in known:
        raise LabelError(path, record, f"unknown {key} {identifier!r}")
    return identifier


def _identifier(path: Path, record: str, key: str, value: Any) -> Hashable:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise LabelError(path, record, f"{key} is neither an integer nor a string")
    return value


def _required(path: Path, record: str, content: dict[str, Any], key: str) -> Any:
    if key not in content:
        raise LabelError(path, record, f"missing key {key!r}")
    return content[key]


def _side(path: Path, record: str, image: dict[str, Any], key: str) -> float:
    value = _number(path, record, key, _required(path, record, image, key))
    if value <= 0:
        raise LabelError(path, record, f"{key} is not positive: {value}")
    return value


def _number(path: Path, record: str, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise LabelError(path, record, f"{key} is not a number: {str(value)[:40]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise LabelError(path, record, f"{key} is not finite: {number}")
    return number
