"""Real labels are read as a trainer reads them; what is malformed is refused with file, record and reason."""

import json
import os
from pathlib import Path

import pytest
import torch

from cases import labels as reading
from cases.labels import LabelError, read_labels

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real labels at ../{DATA.parent.name}/{DATA.name}")


def coco() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "wide.jpg", "width": 320, "height": 160},
            {"id": 9, "width": 100, "height": 200},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [10, 20, 30, 40], "iscrowd": 0},
            {"image_id": 9, "category_id": 3, "bbox": [0, 0, 100, 200]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 300, 100], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9], "iscrowd": 0},
        ],
    }


def changed(change) -> str:
    content = coco()
    change(content)
    return json.dumps(content)


def write(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "instances.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@needs_data
def test_the_coco_sample_is_read_whole():
    file = DATA / "coco_val2014_sample" / "instances.json"
    labels = read_labels(file)
    raw = json.loads(file.read_text())
    crowds = sum(a["iscrowd"] for a in raw["annotations"])
    assert len(labels.images) == 100
    assert len(labels.class_names) == 80
    assert sum(len(image.boxes) for image in labels.images) == 830 - labels.skipped
    assert labels.skipped == crowds
    assert labels.source == "instances.json"
    for image in labels.images:
        assert (image.width, image.height, image.num_classes) == (640, 640, 80)
        assert image.boxes.dtype == torch.float64
        assert image.classes.dtype == torch.int64
        assert bool((image.boxes[:, 2:] > image.boxes[:, :2]).all())
        assert bool(((image.boxes > -1) & (image.boxes < 641)).all())
        assert bool(((image.classes >= 0) & (image.classes < 80)).all())
    # The first annotation by hand.
    first = raw["annotations"][0]
    meta = next(image for image in raw["images"] if image["id"] == first["image_id"])
    read = next(image for image in labels.images if image.name == meta["file_name"])
    scale = 640 / max(meta["width"], meta["height"])
    left, top = (640 - meta["width"] * scale) / 2, (640 - meta["height"] * scale) / 2
    x, y, w, h = first["bbox"]
    expected = torch.tensor([x, y, x + w, y + h], dtype=torch.float64) * scale
    expected += torch.tensor([left, top] * 2, dtype=torch.float64)
    assert bool((read.boxes - expected).abs().amax(dim=1).min() < 1e-9)


@needs_data
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_with_keypoints_is_read(split):
    labels = read_labels(DATA / "coco_excerpt" / f"person_keypoints_{split}2017.json")
    assert labels.class_names == ("person",)
    assert sum(len(image.boxes) for image in labels.images) == {"train": 18, "val": 14}[split]


def test_coco_boxes_are_letterboxed_and_classes_contiguous(tmp_path):
    labels = read_labels(write(tmp_path, changed(lambda content: None)))
    wide, tall = labels.images
    assert labels.class_names == ("car", "brush")
    assert labels.skipped == 2  # the crowd, and the box without width
    assert wide.name == "wide.jpg"
    assert wide.boxes.tolist() == [[20, 40 + 160, 80, 120 + 160]]
    assert wide.classes.tolist() == [1]
    assert tall.name == "9"
    assert tall.boxes.tolist() == [[160, 0, 480, 640]]
    assert tall.classes.tolist() == [0]
    assert [len(batch) for batch in labels.batches(1)] == [1, 1]
    assert [len(batch) for batch in labels.batches(16)] == [2]


def annotation(key, value):
    return lambda content: content["annotations"][1].__setitem__(key, value)


MALFORMED = {
    "not JSON": ("{", "", "not JSON"),
    "not text": (b"\xff\xfe\x00", "", "not UTF-8"),
    "nested too deeply": ("[" * 100_000, "", "not JSON"),
    "number of many digits": ("[" + "1" * 5000 + "]", "", "not JSON"),
    "a list": ("[]", "", "top level is no object"),
    "no images key": (changed(lambda c: c.pop("images")), "", "missing key 'images'"),
    "no annotations key": (changed(lambda c: c.pop("annotations")), "", "missing key 'annotations'"),
    "annotations are no list": (changed(lambda c: c.update(annotations={})), "annotations", "not a list"),
    "annotation is no object": (
        changed(lambda c: c["annotations"].insert(1, 5)),
        "annotations[1]",
        "not an object",
    ),
    "no bbox": (changed(lambda c: c["annotations"][1].pop("bbox")), "annotations[1]", "missing key 'bbox'"),
    "no image width": (changed(lambda c: c["images"][1].pop("width")), "images[1]", "missing key 'width'"),
    "image of no width": (changed(lambda c: c["images"][1].update(width=0)), "images[1]", "width is not positive"),
    "three coordinates": (changed(annotation("bbox", [1, 2, 3])), "annotations[1]", "4 numbers"),
    "coordinate is text": (changed(annotation("bbox", [1, "2", 3, 4])), "annotations[1]", "bbox[1] is not a number"),
    "coordinate is true": (changed(annotation("bbox", [1, 2, True, 4])), "annotations[1]", "bbox[2] is not a number"),
    "coordinate is NaN": (
        changed(annotation("bbox", [float("nan"), 2, 3, 4])),
        "annotations[1]",
        "bbox[0] is not finite",
    ),
    "coordinate is too large": (changed(annotation("bbox", [0, 0, 10**400, 4])), "annotations[1]", "not finite"),
    "negative size": (changed(annotation("bbox", [1, 2, 3, -4])), "annotations[1]", "negative size"),
    "unknown category": (changed(annotation("category_id", 4)), "annotations[1]", "unknown category_id 4"),
    "unknown image": (changed(annotation("image_id", 8)), "annotations[1]", "unknown image_id 8"),
    "image id is a list": (changed(annotation("image_id", [7])), "annotations[1]", "neither an integer nor a string"),
    "duplicate image id": (changed(lambda c: c["images"][1].update(id=7)), "images[1]", "duplicate id 7"),
    "duplicate category id": (changed(lambda c: c["categories"][1].update(id=90)), "categories[1]", "duplicate id 90"),
    "ids of two types": (changed(lambda c: c["categories"][1].update(id="x")), "categories", "mix"),
    "no image": (changed(lambda c: c.update(images=[], annotations=[])), "", "no images"),
    "no box": (changed(lambda c: c.update(annotations=[])), "", "no image has a box"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_coco_is_refused_with_file_record_and_reason(tmp_path, name):
    content, record, reason = MALFORMED[name]
    file = write(tmp_path, content)
    with pytest.raises(LabelError) as caught:
        read_labels(file)
    assert caught.value.file == str(file)
    assert caught.value.record == record
    assert reason in caught.value.reason
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < len(str(file)) + 300


def yolo(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = tmp_path / "labels" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_a_yolo_folder_is_read(tmp_path):
    files = {
        "b.txt": "2 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.1 0\n",
        "a.txt": "",
        "sub/c.txt": "0 0.5 0.5 1 1",
        "classes.txt": "car\nperson\nbrush\n",
    }
    labels = read_labels(yolo(tmp_path, files))
    assert [image.name for image in labels.images] == ["a", "b", "sub/c"]
    assert labels.images[1].boxes.tolist() == [[240, 160, 400, 480]]
    assert labels.images[1].classes.tolist() == [2]
    assert labels.images[2].boxes.tolist() == [[0, 0, 640, 640]]
    assert len(labels.images[0].boxes) == 0
    assert labels.skipped == 1
    assert {(image.width, image.height, image.num_classes) for image in labels.images} == {(640, 640, 3)}
    assert read_labels(tmp_path / "labels").images[1].boxes.tolist() == labels.images[1].boxes.tolist()


YOLO_MALFORMED = {
    "four fields": ("1 0.5 0.5 0.1", "4 fields"),
    "six fields": ("1 0.5 0.5 0.1 0.1 0.9", "6 fields"),
    "class is a name": ("car 0.5 0.5 0.1 0.1", "unknown category 'car'"),
    "class is negative": ("-1 0.5 0.5 0.1 0.1", "unknown category '-1'"),
    "class is fractional": ("1.0 0.5 0.5 0.1 0.1", "unknown category '1.0'"),
    "class is enormous": ("9999999 0.5 0.5 0.1 0.1", "unknown category"),
    "text": ("1 0.5 x 0.1 0.1", "cy is not a number"),
    "NaN": ("1 nan 0.5 0.1 0.1", "cx is not finite"),
    "infinite": ("1 0.5 0.5 inf 0.1", "w is not finite"),
    "negative size": ("1 0.5 0.5 0.1 -0.1", "h is negative"),
    "pixels": ("1 320 240 64 64", "not normalised"),
}


@pytest.mark.parametrize("name", YOLO_MALFORMED)
def test_a_malformed_yolo_row_is_refused_with_file_line_and_reason(tmp_path, name):
    row, reason = YOLO_MALFORMED[name]
    folder = yolo(tmp_path, {"a.txt": "0 0.5 0.5 0.1 0.1\n", "b.txt": f"0 0.5 0.5 0.1 0.1\n{row}\n"})
    with pytest.raises(LabelError) as caught:
        read_labels(folder)
    assert caught.value.file == str(folder / "labels" / "b.txt")
    assert caught.value.record == "line 2"
    assert reason in caught.value.reason


def test_empty_and_missing_sets_are_refused(tmp_path):
    (tmp_path / "bare").mkdir()
    for path, reason in (
        (tmp_path / "missing.json", "no such file"),
        (tmp_path / "bare", "no labels/*.txt"),
        (yolo(tmp_path / "empty", {"a.txt": ""}), "no image has a box"),
    ):
        with pytest.raises(LabelError) as caught:
            read_labels(path)
        assert caught.value.file == str(path)
        assert reason in caught.value.reason


def test_sets_that_would_take_all_memory_are_refused(tmp_path, monkeypatch):
    folder = yolo(tmp_path, {"a.txt": "0 0.5 0.5 0.1 0.1\n" * 4 + "2 0.5 0.5 0.1 0.1\n"})
    assert len(read_labels(folder).images[0].boxes) == 5
    for limit, record, reason in (
        ("MOST_CLASSES", "", "3 classes are more than 2"),
        ("MOST_BOXES", "a", "5 boxes in an image are more than 2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(reading, limit, 2)
            with pytest.raises(LabelError) as caught:
                read_labels(folder)
        assert (caught.value.record, caught.value.reason) == (record, reason)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "instances.json")
    with pytest.raises(LabelError, match="is not a regular file"):
        read_labels(tmp_path / "instances.json")
