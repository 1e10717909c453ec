"""What this room knows of each upstream package: how to import it, and which operations it answers.

`pins.toml` says which releases. A new operation is one file in the package's folder here, and its row below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from reference.torchvision_stub import Torchvision


@dataclass(frozen=True)
class Package:
    """`shells`: packages whose `__init__` isn't run, with the submodules whose names each exposes; with none
    the package is imported as it is.

    `operations`: operation -> module with `bind(tensors, settings)` and `quantities(tensors, settings)`.
    `unused`: modules that it imports and no adapter's call reaches (`reference/absent.py`); `skipped`: such ones
    that would bring trainers and data loaders along, and are not run even where they are. `at_home`: it keeps its
    settings in the user's home whatever it is told, and is given another.
    """

    shells: Mapping[str, tuple[str, ...]]
    operations: Mapping[str, str]
    torchvision: Torchvision
    unused: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    at_home: bool = False


def _modules(package: str, *operations: str) -> dict[str, str]:
    return {operation: f"reference.{package}.{operation}" for operation in operations}


PACKAGES = {
    "ultralytics": Package(
        shells={"ultralytics": (), "ultralytics.models": ()},
        operations=_modules(
            "ultralytics",
            *("tal", "rotated_tal", "hungarian"),
            *("make_anchors", "dist2bbox", "bbox2dist", "dfl_decode", "bbox_iou", "probiou"),
            *("dfl_loss", "bbox_loss", "class_bce", "varifocal_loss", "focal_loss"),
            *("v8_detection_loss", "v10_detection_loss", "rtdetr_loss"),
        ),
        torchvision=Torchvision.VERSION,
        unused=("pkg_resources", "thop", "git", "IPython", "sentry_sdk"),
    ),
    "yolox": Package(
        # `visualize`, imported last and only if asked, is for checkouts newer than the release.
        shells={"yolox": (), "yolox.models": (), "yolox.utils": ("boxes", "compat", "visualize")},
        operations=_modules(
            "yolox", "simota", "yolox_decode", "bboxes_iou", "iou_loss", "yolox_bce", "yolox_l1", "yolox_loss"
        ),
        torchvision=Torchvision.IMPORTED,
    ),
    "transformers": Package(
        shells={"transformers": (), "transformers.loss": ()},
        operations=_modules(
            "transformers",
            *("hungarian", "generalized_box_iou"),
            *("set_class_loss", "cardinality_error", "set_box_loss", "set_mask_loss", "set_loss"),
        ),
        torchvision=Torchvision.OPTIONAL,
    ),
    # No detector, but the solver that others reach for: SciPy on the CPU, Triton on CUDA.
    "torch_linear_assignment": Package(
        shells={},
        operations=_modules("torch_linear_assignment", "linear_sum_assignment"),
        torchvision=Torchvision.OPTIONAL,
    ),
}

#: Folders of a release that hold what `cleanroom` has a counterpart of, or could have been written after.
AUDITED = {
    "ultralytics": ("ultralytics/utils", "ultralytics/models/utils", "ultralytics/nn", "ultralytics/yolo"),
    "yolox": ("yolox",),
    "transformers": ("transformers/loss", "transformers/models/detr", "transformers/models/yolos"),
    "torch_linear_assignment": ("torch_linear_assignment",),
}

#: Packages of the first releases of ultralytics, which kept everything beneath `ultralytics.yolo`.
_FIRST = ("ultralytics", "ultralytics.yolo", "ultralytics.yolo.v8", "ultralytics.yolo.v8.detect")
_FIRST += ("ultralytics.vit", "ultralytics.vit.utils")
#: What their detection criterion imports, which until 8.0.100 stood beside its trainer.
_TRAINING = ("hydra", "ultralytics.nn", "ultralytics.nn.tasks")
_TRAINING += ("ultralytics.yolo.engine", "ultralytics.yolo.engine.trainer")
_LOADERS = ("ultralytics.yolo.data", "ultralytics.yolo.data.dataloaders", "ultralytics.yolo.data.dataloaders.v5loader")
_ULTRALYTICS_YOLO = replace(
    PACKAGES["ultralytics"],
    shells=dict.fromkeys(_FIRST, ()),
    skipped=_TRAINING + _LOADERS,
    at_home=True,
)


def package_at(name: str, root: Path) -> Package:
    """The package of that name as its release in `root` is laid out."""
    former = name == "ultralytics" and not (root / name / "utils").is_dir()
    return _ULTRALYTICS_YOLO if former else PACKAGES[name]
