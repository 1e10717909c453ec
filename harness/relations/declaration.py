"""What relations need to know of an operation: where images, ground truths, anchors and classes lie in its tensors.

A name in these tables is that of an input, an output, or, for the gradient of an input, the input's own. Names that a
case does not have are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from cases.case import Case

NAMES = (
    "images",
    "alone",
    "ground truths",
    "anchors",
    "levels",
    "classes",
    "padding",
    "scale",
    "repeat",
    "inputs",
    "leak",
    "gradcheck",
    "optimality",
    "monotony",
)
"""Every relation, in the order in which they are tried."""


def _as_they_are(case: Case, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return outputs


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Axis:
    """Something countable that is the same for all images: anchors, queries, classes, elements.

    A tensor of size 1 is broadcast; an output whose size is a multiple of the axis's holds as many neighbours of each.
    """

    along: Mapping[str, int]
    """Name -> its dim."""
    first: Mapping[str, int] = field(default_factory=dict)
    """Name -> where the axis begins in that dim, where other columns stand before it."""
    last: Mapping[str, int] = field(default_factory=dict)
    """Name -> how many other columns stand after it."""
    counted: Mapping[str, int | None] = field(default_factory=dict)
    """Names whose numbers are positions on the axis, below 0 for none -> the column that holds them; None: all."""
    lists: tuple[str, ...] = ()
    """Settings with an entry each, where they are lists."""
    neighbours: Mapping[str, int] = field(default_factory=dict)
    """Names that hold so many for each."""
    real: Callable[[Tensor], Tensor] | None = None
    """Which rows of a tensor that counts mean something; the others stay as they are."""


@dataclass(frozen=True)
class Images:
    """Where the images of a batch lie."""

    along: Mapping[str, int]
    """Name -> its dim."""
    blocks: Mapping[str, str] = field(default_factory=dict)
    """Tensors of rows, image after image -> the setting that counts each image's; "" where `member` does."""
    lists: tuple[str, ...] = ()
    """Settings with an entry an image."""
    member: str = ""
    """Tensor that holds the image of each row."""
    shifted: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose numbers count rows through the batch -> the setting that counts each image's rows."""
    normaliser: str = "given"
    """What divides the sums of a batch: a number that is `given` (or none), `one` that follows from the batch, or for
    `each` term another."""
    means: tuple[str, ...] = ()
    """Outputs that are means over images; other outputs without a dim of images are sums."""
    unsummed: tuple[str, ...] = ()
    """Outputs that are neither."""
    filled: str = ""
    """Setting that counts what each image must have for an image alone to be what it is in the batch; "" for none."""
    alike: tuple[str, ...] = ()
    """Settings whose entries must be equal for an image alone to be what it is in the batch."""


@dataclass(frozen=True)
class Rows:
    """Something countable that each image has in another number, ground truths mostly.

    `count` gives how many of the leading rows of each image may change places.
    """

    count: Callable[[Case], list[int]]
    dense: Mapping[str, int] = field(default_factory=dict)
    """Names of size (images, ..., rows, ...) -> the dim of the rows."""
    blocks: tuple[str, ...] = ()
    """Tensors of rows, image after image."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Names whose numbers are rows of their image, below 0 for none -> the dim of the images."""
    listed: Mapping[str, str] = field(default_factory=dict)
    """Tensors of such numbers, image after image -> the setting that counts each image's."""


@dataclass(frozen=True)
class Levels:
    """Levels of a pyramid: maps named `prefix`0 and on, or blocks along a dim, of the sizes in a setting."""

    prefix: str = ""
    sizes: str = ""
    along: Mapping[str, int] = field(default_factory=dict)
    """Name -> the dim along which levels follow each other, cell after cell."""
    second_stays: bool = False
    """Whether the level in the second place means something: its stride is the least side of a box."""
    scattered: Mapping[str, int] = field(default_factory=dict)
    """Tensors with a row a level, whole -> dim."""


@dataclass(frozen=True)
class Padding:
    """Rows that may be added after the last without meaning anything, and what they may hold."""

    rows: Mapping[str, float]
    """Tensor -> the content of added rows."""
    dims: Mapping[str, tuple[int, ...]]
    """Tensor -> dims that grow."""
    outputs: Mapping[str, int] = field(default_factory=dict)
    """Outputs that grow too -> dim; what is added is not looked at."""
    why: str = ""


@dataclass(frozen=True)
class Scale:
    """What is doubled, and what that does."""

    tensors: Mapping[str, slice]
    """Tensor -> the columns of its last dim that are lengths."""
    settings: tuple[str, ...] = ()
    outputs: Mapping[str, slice] = field(default_factory=dict)
    """Outputs that double (all their columns, or some of their last dim); other outputs stay."""
    fits: Callable[[Case], bool] = _always
    """Whether no constant of the operation has a length in this case."""
    exact: bool = True
    """Whether nothing has an epsilon; else the same is meant in float32, where epsilons vanish."""


@dataclass(frozen=True)
class Margins:
    """What the operation's comparator needs to tell a tie from another answer where order decides ties."""

    quantities: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    """Deciding quantities of tensors, in their dtype, by the specification."""
    era: Mapping[str, Any] = field(default_factory=dict)
    """Settings that an era may replace."""
    restore: Callable[[Case, Mapping[str, Tensor]], Mapping[str, Tensor]] = _as_they_are
    """`dense` outputs as the comparator takes them."""


@dataclass(frozen=True)
class Relations:
    """Which relations an operation keeps, and where the things they move lie."""

    images: Images | None = None
    truths: Rows | Axis | None = None
    anchors: Axis | Rows | None = None
    levels: Levels | None = None
    classes: Axis | None = None
    padding: Padding | None = None
    scale: Scale | None = None
    gradcheck: tuple[str, ...] = ()
    """Inputs whose gradient is the slope of the outputs: nothing in between is held fixed."""
    smooth: Callable[[Case], bool] = _always
    """Whether that is so in a case."""
    optimality: Callable[[Any], bool] | None = None
    monotony: Callable[[Any], bool] | None = None
    dense: Callable[[Case, Mapping[str, Tensor]], Mapping[str, Tensor]] = _as_they_are
    """Outputs in a form in which positions can be moved: an owner for each anchor or query, below 0 for none."""
    certain: Callable[[Case, Mapping[str, Tensor]], Mapping[str, Tensor]] = _as_they_are
    """`dense` without what a tie rule alone decides, for relations that change the order of what is tied."""
    margins: Margins | None = None
    """How an assigner's other answers to another order are judged."""
    cancels: str = ""
    """Dtype in whose units numbers are compared at least, where they are small differences raised to a power."""
    free: tuple[str, ...] = ()
    """Inputs that a relation may move a little, so that nothing ties: predictions and boxes, nothing that counts."""
    whole: tuple[str, ...] = ()
    """Inputs that must be whole numbers for classes to be relabelled."""
    fits: Callable[[Case], bool] = _always
    """Whether a case has the form that these tables describe."""
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Relation -> why the operation does not have it."""

    def dense_only(self, case: Case, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """In the place of `certain`, where ties are judged."""
        return outputs

    def declared(self) -> tuple[str, ...]:
        """The relations that the operation has."""
        return () if self == Relations() else tuple(name for name in NAMES if name not in self.exempt)
