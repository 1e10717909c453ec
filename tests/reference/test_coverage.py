"""What upstream has of public assigners, losses, codecs and overlaps: nothing that the list does not know."""

from collections import ChainMap

import pytest

from harness import oracles
from harness.matrix.coverage import FILE, coverage
from harness.matrix.run import names_of
from harness.matrix.session import MatrixSettings
from harness.pool import Worker

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def found():
    """The public names of the default pins, ultralytics' left out: those are asked for end to end."""
    names = {}
    for oracle in oracles.pins():
        if oracles.package(oracle) != "ultralytics":
            worker = Worker(MatrixSettings(oracle, {}, 1), 60.0)
            names[oracle] = names_of(oracle, worker)
            worker.close()
    return names


def test_every_public_name_is_listed(found):
    assert {oracle: names for oracle, version in found.items() if (names := coverage().unlisted(version))} == {}


def test_every_module_of_the_list_is_read(found):
    assert dict(ChainMap(*(version["unread"] for version in found.values()))) == {}
    for oracle, version in found.items():
        present = {name.rpartition(".")[0] for name in version["names"]}
        assert len(present) >= {"yolox": 3, "transformers": 10}.get(oracles.package(oracle), 1)


def test_what_is_taken_off_the_list_is_named(found, tmp_path):
    shorter = tmp_path / "coverage.toml"
    lines = FILE.read_text().splitlines(keepends=True)
    shorter.write_text("".join(line for line in lines if not line.startswith(("NestedTensor", "get_l1_target"))))
    known = coverage(shorter)
    name = "transformers.loss.loss_for_object_detection.NestedTensor"
    assert known.unlisted(found["transformers==5.23.0"]) == [name]
    assert known.unlisted(found["yolox==0.3.0"]) == ["yolox.models.yolo_head.get_l1_target"]


def test_what_is_listed_in_vain_is_stale(found, tmp_path):
    longer = tmp_path / "coverage.toml"
    longer.write_text(FILE.read_text() + '\n[names."yolox.models.network_blocks"]\nSiLU = { absent = "a layer" }\n')
    known = coverage(longer)
    assert known.stale(found.values(), ["yolox"]) == ["yolox.models.network_blocks.SiLU"]
    assert coverage().stale(found.values(), ["yolox", "torch_linear_assignment"]) == []
