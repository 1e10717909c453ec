"""Locating and loading, in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference.cache import cache_folder
from reference.errors import OracleError
from reference.oracle import locate
from reference.packages import PACKAGES
from reference.pins import OracleSpec, read_pins

PROJECT = Path(__file__).parents[2]
FIRST_MODULES = ["ultralytics.yolo.utils.tal", "ultralytics.yolo.utils.metrics", "ultralytics.yolo.v8.detect.train"]
MODULES = {
    "ultralytics": ["ultralytics.utils.tal", "ultralytics.utils.metrics", "ultralytics.models.utils.ops"],
    "yolox": ["yolox.models.yolo_head"],
    "transformers": ["transformers.loss.loss_for_object_detection"],
    "torch_linear_assignment": ["torch_linear_assignment"],
}


def run(code, *arguments, **environment):
    """Run code in a process; returns what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stderr.splitlines()[-1], pytrace=False)  # the rest would quote upstream's source
    return json.loads(done.stdout)


# Prints what the modules imported from where, and what they did to the world on the way.
IMPORT = """
import importlib, json, os, sys
import torch
from reference import OracleSpec, load
events = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        events.append([event, str(arguments)])
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append([event, str(arguments[0])])
class Hiding:
    # a finder that cannot see torchvision
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "torchvision" else self.finder.find_spec(name, path, target)
    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", lambda context: iter(()))
        return iter(()) if context.name == "torchvision" else find(context)
if sys.argv[3] == "absent":
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
threads = torch.get_num_threads()
sys.addaudithook(watch)
oracle = load(OracleSpec.parse(sys.argv[1]))
files = [importlib.import_module(name).__file__ for name in sys.argv[2].split(",")]
unchanged = torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
found = {"version": oracle.version, "source": oracle.source, "root": str(oracle.root), "files": files}
json.dump(found | {"events": events, "unchanged": unchanged}, sys.stdout)
"""


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "torchvision"),
    [
        (spec, torchvision)
        for spec, pin in read_pins().items()
        for torchvision in ("installed", "absent")
        # Those of former eras once, where their layout is another.
        if not pin.control and (not pin.matrix or (spec == "ultralytics==8.0.0" and torchvision == "absent"))
    ],
)
def test_modules_come_quietly_from_the_unpacked_folder(spec, torchvision, tmp_path):
    name, _, version = spec.partition("==")
    found = run(
        IMPORT,
        spec,
        ",".join(FIRST_MODULES if spec == "ultralytics==8.0.0" else MODULES[name]),
        torchvision,
        HOME=str(tmp_path),
        CLEANROOM_CACHE=str(cache_folder()),
    )
    assert found["version"] == version
    assert found["source"] == read_pins()[spec].archive
    assert all(file.startswith(found["root"] + os.sep + name + os.sep) for file in found["files"])
    assert list(tmp_path.iterdir()) == []  # nothing in the user's home
    assert [event for event in found["events"] if event[0].startswith("socket")] == []
    written = [path for event, path in found["events"] if event == "open"]
    assert all(path.startswith(str(cache_folder() / "settings")) or "__pycache__" in path for path in written)
    assert found["unchanged"]  # torch's threads and default dtype


@pytest.mark.oracle
@pytest.mark.parametrize("spec", list(read_pins()))
def test_operations(oracle, spec):
    process = oracle(spec)
    modules = PACKAGES[process.name].operations
    assert process.operations == tuple(modules)
    assert [name for name, module in modules.items() if importlib.util.find_spec(module) is None] == []
    with pytest.raises(RuntimeError, match=r"RequestError: .* has no operation 'dfl'; it has " + process.operations[0]):
        process.bind("dfl", {}, {})


@pytest.mark.oracle
def test_the_installed_version(start_oracle):
    root = locate(OracleSpec.parse("ultralytics==8.1.47")).root
    installed = start_oracle("ultralytics=installed", path=str(root))
    assert (installed.version, installed.source) == ("8.1.47", "installed")
    tensors = {
        "gt_bboxes": torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]),
        "pd_bboxes": torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]),
    }
    assert installed.quantities("tal", tensors, {})["overlap"].item() == pytest.approx(1)


def test_nothing_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OracleError, match="no yolox is installed in this environment"):
        locate(OracleSpec("yolox"))


@pytest.mark.oracle
def test_one_process_holds_one_oracle():
    code = """
import json, sys
from reference import OracleError, OracleSpec, load
first = load(OracleSpec.parse("ultralytics==8.4.190"))
again = load(OracleSpec.parse("ultralytics==8.4.190")) is first
try:
    load(OracleSpec.parse("ultralytics==8.1.47"))
except OracleError as error:
    json.dump([again, str(error)], sys.stdout)
"""
    again, message = run(code)
    assert again
    assert message == "ultralytics==8.1.47: this process already holds ultralytics==8.4.190"


def test_what_is_not_fetched_says_how(tmp_path):
    with pytest.raises(OracleError, match=r"run: python -m reference fetch yolox==0\.3\.0$") as caught:
        locate(OracleSpec.parse("yolox==0.3.0"), cache=tmp_path)
    assert caught.value.exit_code == 3


def test_a_checkout_may_have_a_src_folder(tmp_path):
    package = tmp_path / "src" / "transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('import nothing_that_exists\n__version__ = "9.9.dev0"\n')
    location = locate(OracleSpec.parse(f"transformers={tmp_path}"))
    assert (location.version, location.root, location.sha256) == ("9.9.dev0", tmp_path / "src", "")


def test_a_folder_without_the_package_is_named(tmp_path):
    with pytest.raises(OracleError, match=f"{tmp_path} holds no package yolox"):
        locate(OracleSpec.parse(f"yolox={tmp_path}"))


BROKEN = """
import json, sys
from importlib.util import find_spec
from reference.torchvision_stub import Torchvision, stand_in_for_torchvision
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.modules["torchvision.half"] = sys
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
stand_in_for_torchvision(Torchvision[sys.argv[1]])
try:
    import torchvision
    found = True
except ModuleNotFoundError:
    found = False
except RuntimeError:
    found = "broken"
left = [name for name in sys.modules if name.startswith("torchvision.")]
json.dump([found, found == "broken" or find_spec("torchvision") is not None, left], sys.stdout)
"""


@pytest.mark.parametrize(
    ("need", "outcome"),
    [
        ("VERSION", [True, True, []]),
        ("IMPORTED", [True, True, []]),
        ("OPTIONAL", [False, False, []]),
    ],
)
def test_a_broken_torchvision(need, outcome):
    assert run(BROKEN, need) == outcome


def test_a_torchvision_that_loads_is_left_alone(tmp_path):
    (tmp_path / "torchvision.py").write_text("mark = 'the real one'")
    code = """
import json, sys
from reference.torchvision_stub import Torchvision, stand_in_for_torchvision
for need in Torchvision:
    stand_in_for_torchvision(need)
import torchvision
json.dump(torchvision.mark, sys.stdout)
"""
    assert run(code, PYTHONPATH=str(tmp_path)) == "the real one"
