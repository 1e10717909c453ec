"""Cases keep every bit on disk, have one name for one content, and come only from intact files."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cases.case import DTYPES, Case, CaseError

ROOT = Path(__file__).parents[2]


def make(dtype: torch.dtype = torch.float32, **changes) -> Case:
    parts = {
        "operation": "tal",
        "tensors": {
            "pd_scores": torch.tensor([[0.1, torch.nan, -0.0, torch.inf]]).to(dtype),
            "gt_labels": torch.tensor([3, -1]),
            "no_rows": torch.zeros(2, 0, 4).to(dtype),
            "one": torch.tensor(7.0).to(dtype),
        },
        "settings": {"topk": 10, "topk2": None, "stride": [8, 16], "eps": 1e-9},
        "origin": "test",
        "tags": frozenset({"late", "tie"}),
    }
    return Case(**(parts | changes))


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return torch.empty_like(tensor).copy_(tensor).reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_saved_case_comes_back_bit_for_bit(tmp_path, dtype):
    case = make(dtype)
    case.save(tmp_path / "case.safetensors")
    back = Case.load(tmp_path / "case.safetensors")
    assert set(back.tensors) == set(case.tensors)
    for name, tensor in case.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert as_bytes(back.tensors[name]) == as_bytes(tensor)
    assert (back.operation, back.settings, back.origin, back.tags) == (
        case.operation,
        case.settings,
        case.origin,
        case.tags,
    )
    assert back.digest == case.digest
    assert back.dtype == str(dtype).removeprefix("torch.")
    assert [file.name for file in tmp_path.iterdir()] == ["case.safetensors"]


def test_views_that_share_memory_or_have_odd_strides_can_be_saved():
    base = torch.arange(12.0).reshape(3, 4)
    case = make(tensors={"a": base.T, "b": base[:, 1], "c": base[:1].expand(5, 4)})
    back = Case.from_bytes(case.to_bytes())
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in case.tensors.items())


def test_the_same_case_always_gives_the_same_bytes():
    assert make().to_bytes() == make().to_bytes()


def test_the_digest_is_the_same_in_every_process():
    code = (
        "import torch; from cases.case import Case;"
        "print(Case('tal', {'b': torch.ones(2, dtype=torch.bfloat16), 'a': torch.arange(3)},"
        " {'x': 1, 'a': [2.5]}, 'o', frozenset('xyz')).digest)"
    )
    # Another process with other string hashes; the value is stored, since files of other releases are named by it.
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == "ce20deaa61493ac9"


def test_the_digest_covers_every_part_of_the_content():
    case = make()
    tensors = case.tensors
    scores = tensors["pd_scores"]
    flipped = scores.clone()
    flipped[0, 2] = 0.0  # from -0.0: another bit, an equal number
    others = [
        make(operation="simota"),
        make(settings=case.settings | {"topk": 9}),
        make(settings={k: v for k, v in case.settings.items() if k != "eps"}),
        make(tensors=tensors | {"pd_scores": flipped}),
        make(tensors=tensors | {"pd_scores": scores.reshape(2, 2)}),
        make(tensors=tensors | {"gt_labels": tensors["gt_labels"].int()}),
        make(tensors=tensors | {"gt_labels": tensors["gt_labels"].view(torch.float64)}),
        make(tensors=tensors | {"extra": torch.zeros(0)}),
        make(tensors={name + "_": tensor for name, tensor in tensors.items()}),
    ]
    assert len({case.digest, *(other.digest for other in others)}) == len(others) + 1
    assert make(origin="elsewhere", tags=frozenset()).digest == case.digest
    assert make(tensors=dict(reversed(tensors.items()))).digest == case.digest
    assert make(tensors=tensors | {"pd_scores": scores.T.contiguous().T}).digest == case.digest


def test_the_dtype_of_a_mixed_case_is_the_half_one():
    mixed = {"boxes": torch.zeros(4), "scores": torch.zeros(4, dtype=torch.bfloat16), "labels": torch.arange(3)}
    assert make(tensors=mixed).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": {"a": [1.0]}}, "'a' is a list"),
        ({"tensors": {"a": torch.zeros(2, dtype=torch.complex64)}}, "unsupported dtype"),
        ({"tensors": {"a": torch.arange(2)}}, "at least one floating"),
        ({"settings": {"stride": (8, 16)}}, "change when written"),
        ({"settings": {"eps": float("nan")}}, "not JSON"),
        ({"settings": {"eps": torch.ones(1)}}, "not JSON"),
        ({"settings": {1: 2}}, "change when written"),
    ],
)
def test_what_cannot_be_stored_is_refused_when_built(changes, reason):
    with pytest.raises(CaseError, match=reason) as caught:
        make(**changes)
    assert caught.value.file is None


def with_record(record) -> bytes:
    """A safetensors file whose case record is `record` (text, or a dictionary of changes to a good one)."""
    good = make().to_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    if isinstance(record, dict):
        record = json.dumps(json.loads(header["__metadata__"]["case"]) | record)
    header["__metadata__"]["case"] = record
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + good[8 + length :]


def with_header(change) -> bytes:
    """A safetensors file whose header `change` has changed, its record with it if it likes."""
    good = make().to_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + good[8 + length :]


def tensor(name, **changes) -> bytes:
    return with_header(lambda header: header[name].update(changes))


def twice(key) -> bytes:
    """The record with a key that stands in it twice, the second time as a list."""
    content = make().to_bytes()
    length = int.from_bytes(content[:8], "little")
    record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["case"])
    return with_record(json.dumps(record)[:-1] + f', "{key}": []}}')


GOOD = make().to_bytes()
HOSTILE = {
    "shape is negative": (tensor("one", shape=[-1, -4]), "not a safetensors file"),
    "shape is huge": (tensor("one", shape=[2**40, 2**40]), "not a safetensors file"),
    "shape is more than the bytes": (tensor("one", shape=[2]), "not a safetensors file"),
    "shape is fractional": (tensor("one", shape=[1.5]), "not a safetensors file"),
    "offsets overlap": (tensor("one", data_offsets=[0, 4]), "not a safetensors file"),
    "offsets go backwards": (tensor("one", data_offsets=[8, 4]), "not a safetensors file"),
    "offsets leave the file": (tensor("one", data_offsets=[2**50, 2**50 + 4]), "not a safetensors file"),
    "dtype is unknown": (tensor("one", dtype="F128"), "not a safetensors file"),
    "dtype is not stored": (tensor("gt_labels", dtype="U64"), "unsupported dtype|not a safetensors file"),
    "metadata are a list": (with_header(lambda header: header.update(__metadata__=["case"])), "not a safetensors file"),
    "header is no text": (struct.pack("<Q", 4) + b"\xff\xfe\x00\x01", "not a safetensors file"),
    "settings twice": (twice("settings"), "no dict 'settings'"),
    "operation is another": (with_record({"operation": "simota"}), "digest"),
    "settings nested deeply": (with_record('{"settings": ' + '{"a":' * 50_000 + "1" + "}" * 50_001), "not JSON"),
    "setting is NaN": (with_record({"settings": {"eps": float("nan")}}), "not JSON"),
    "number of many digits": (with_record('{"settings": {"topk": ' + "1" * 5000 + "}}"), "not JSON"),
    "empty": (b"", "not a safetensors file"),
    "text": (b"hello, this is no case at all", "not a safetensors file"),
    "truncated": (GOOD[:-3], "not a safetensors file"),
    "trailing bytes": (GOOD + b"\0" * 8, "not a safetensors file"),
    "huge header": (struct.pack("<Q", 2**62) + GOOD[8:], "not a safetensors file"),
    "flipped byte": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "digest"),
    "record is no JSON": (with_record("{"), "not JSON"),
    "record nested too deeply": (with_record("[" * 100_000), "not JSON"),
    "record is a list": (with_record("[]"), "not of format"),
    "newer format": (with_record({"format": 99}), "not of format"),
    "no operation": (with_record({"operation": None}), "no str 'operation'"),
    "settings are a list": (with_record({"settings": []}), "no dict 'settings'"),
    "tag is a number": (with_record({"tags": [1]}), "tag that is no string"),
    "other settings": (with_record({"settings": {"topk": 1}}), "digest"),
    "infinite setting": (with_record({"settings": {"topk": float("inf")}}), "not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused_with_its_name_and_the_reason(tmp_path, name):
    content, reason = HOSTILE[name]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CaseError, match=reason) as caught:
        Case.load(file)
    assert caught.value.file == str(file)
    assert str(file) in str(caught.value)


def test_a_name_with_markup_and_lines_stays_on_one_line(tmp_path):
    file = tmp_path / "<b>a\nb<i>.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CaseError) as caught:
        Case.load(file)
    assert caught.value.file == str(file)
    assert "\n" not in str(caught.value)


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for file in (tmp_path / "pipe.safetensors", Path(os.devnull)):
        with pytest.raises(CaseError, match="is not a regular file"):
            Case.load(file)


def test_files_that_are_no_cases_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    for name in ("weights.safetensors", "other.safetensors"):
        with pytest.raises(CaseError, match="not a case"):
            Case.load(tmp_path / name)
    with pytest.raises(CaseError, match="cannot be read"):
        Case.load(tmp_path / "missing.safetensors")
    with pytest.raises(CaseError, match="is not a regular file"):
        Case.load(tmp_path)


def test_a_case_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(CaseError, match="cannot be written"):
        make().save(target)
    with pytest.raises(CaseError, match="cannot be written"):
        make().save(tmp_path / "no folder" / "case.safetensors")
    assert list(tmp_path.iterdir()) == [target]
