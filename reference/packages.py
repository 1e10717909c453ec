"""What this room knows of each upstream package: how to import it, and which operations it answers.

`pins.toml` says which releases. A new operation is one file in the package's folder here, and its row below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from reference.torchvision_stub import Torchvision


@dataclass(frozen=True)
class Package:
    """`shells`: packages whose `__init__` isn't run, with the submodules whose names each exposes.

    `operations`: operation -> module with `bind(tensors, settings)` and `quantities(tensors, settings)`.
    """

    shells: Mapping[str, tuple[str, ...]]
    operations: Mapping[str, str]
    torchvision: Torchvision


PACKAGES = {
    "ultralytics": Package(
        shells={"ultralytics": (), "ultralytics.models": ()},
        operations={"tal": "reference.ultralytics.tal", "hungarian": "reference.ultralytics.hungarian"},
        torchvision=Torchvision.VERSION,
    ),
    "yolox": Package(
        # `visualize`, imported last and only if asked, is for checkouts newer than the release.
        shells={"yolox": (), "yolox.models": (), "yolox.utils": ("boxes", "compat", "visualize")},
        operations={"simota": "reference.yolox.simota"},
        torchvision=Torchvision.IMPORTED,
    ),
    "transformers": Package(
        shells={"transformers": (), "transformers.loss": ()},
        operations={"hungarian": "reference.transformers.hungarian"},
        torchvision=Torchvision.OPTIONAL,
    ),
}
