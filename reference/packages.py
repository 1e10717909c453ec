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
    `unused`: modules that it imports and no adapter's call reaches (`reference/absent.py`).
    """

    shells: Mapping[str, tuple[str, ...]]
    operations: Mapping[str, str]
    torchvision: Torchvision
    unused: tuple[str, ...] = ()


def _modules(package: str, *operations: str) -> dict[str, str]:
    return {operation: f"reference.{package}.{operation}" for operation in operations}


PACKAGES = {
    "ultralytics": Package(
        shells={"ultralytics": (), "ultralytics.models": ()},
        operations=_modules(
            "ultralytics",
            *("tal", "hungarian"),
            *("make_anchors", "dist2bbox", "bbox2dist", "dfl_decode", "bbox_iou"),
            *("dfl_loss", "bbox_loss", "class_bce", "varifocal_loss", "focal_loss"),
            *("v8_detection_loss", "v10_detection_loss", "rtdetr_loss"),
        ),
        torchvision=Torchvision.VERSION,
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

#: The first releases of ultralytics kept everything beneath `ultralytics.yolo`.
_ULTRALYTICS_YOLO = replace(
    PACKAGES["ultralytics"],
    shells={"ultralytics": (), "ultralytics.yolo": ()},
    torchvision=Torchvision.IMPORTED,
    unused=("pkg_resources", "thop"),
)


def package_at(name: str, root: Path) -> Package:
    """The package of that name as its release in `root` is laid out."""
    former = name == "ultralytics" and (root / name / "yolo").is_dir()
    return _ULTRALYTICS_YOLO if former else PACKAGES[name]
