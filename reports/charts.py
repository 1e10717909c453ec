"""Charts as static SVG: no script, no fonts, colours from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from reports import text
from reports.frames import GROUP
from reports.tables import measured, quotient, title, workload

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    from reports.frames import Run

WIDTH, STEP, LABELS = 700, 28, 210
PROVIDERS = ("upstream", "candidate")
COLOURS = ("var(--upstream)", "var(--candidate)")
SHAPES = ("diamond", "circle")
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif"


@dataclass(frozen=True)
class Quantity:
    """What a chart shows: its columns, its units, how to say a value and the factor between the two."""

    name: str
    heading: str
    upstream: str
    candidate: str
    units: Sequence[tuple[float, str]]
    say: Callable[[float | None], str]
    factor: Callable[[Mapping[str, Any]], float | None]


TIME = Quantity(
    name="time",
    heading="Median time of one call (log scale)",
    upstream="oracle_ns",
    candidate="candidate_ns",
    units=text.TIMES,
    say=text.duration,
    factor=lambda row: row["speedup"],
)
MEMORY = Quantity(
    name="memory",
    heading="Peak memory of one call (log scale)",
    upstream="peak_bytes_oracle",
    candidate="peak_bytes_candidate",
    units=text.SIZES,
    say=text.size,
    factor=lambda row: quotient(row["peak_bytes_oracle"], row["peak_bytes_candidate"]),
)


def draw(run: Run, quantity: Quantity) -> str | None:
    """A quantity of both over the workloads as SVG, or None where it was not measured."""
    frame = measured(run)
    if frame is None:
        return None
    values = frame[[quantity.upstream, quantity.candidate]].to_numpy().ravel()
    values = [float(value) for value in values if _drawable(value)]
    if not values:
        return None
    import altair as alt
    import vl_convert

    axis = _axis(values, quantity)
    groups = list(frame.groupby(list(GROUP), sort=False))
    panels = [
        _panel(
            text.clean(title(*key)),  # a control character makes vl-convert abort the whole process
            _points(rows, quantity, frame["direction"].nunique()),
            axis,
            key == groups[-1][0],
        )
        for key, rows in groups
    ]
    chart = (
        alt.vconcat(*panels, spacing=18)
        .resolve_scale(color="shared", shape="shared")
        .configure(background="transparent", font=FONT, padding=4)
        .configure_view(stroke=None)
        .configure_legend(
            orient="top",
            title=None,
            labelColor="var(--ink)",
            labelFontSize=13,
            symbolSize=90,
            columnPadding=24,
        )
    )
    return _accessible(vl_convert.vegalite_to_svg(chart.to_dict()), quantity.name, _spoken(frame, quantity))


def _drawable(value: float) -> bool:
    return 0 < value < math.inf


def _axis(values: list[float], quantity: Quantity) -> dict[str, Any]:
    """Scale and ticks shared by all panels: decades, or 1-2-5 where they are few; room for the ratios."""
    low, high = min(values), max(values)
    span = max(math.log10(high / low), 0.5)
    domain = [low / 10 ** (0.05 * span), high * 10 ** (0.14 * span)]
    steps = (1, 2, 5) if span < 2.5 else (1,)
    decades = range(math.floor(math.log10(domain[0])), math.ceil(math.log10(domain[1])) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    label = ""
    for factor, unit in quantity.units:  # the largest unit that fits is asked about first
        plain = f"format(datum.value / {factor}, '~g') + ' {unit}'"
        label = f"datum.value >= {factor} ? {plain} : ({label})" if label else plain
    inside = [tick for tick in ticks if domain[0] <= tick <= domain[1]]
    return {"domain": domain, "ticks": inside, "label": label, "heading": quantity.heading}


def _points(rows: pd.DataFrame, quantity: Quantity, directions: int) -> list[dict[str, Any]]:
    """One record a workload; a value that a log scale cannot show is left out."""
    records = []
    for row in rows.to_dict("records"):
        upstream, candidate = (
            row[column] if _drawable(row[column]) else None for column in (quantity.upstream, quantity.candidate)
        )
        known = [value for value in (upstream, candidate) if value is not None]
        records.append(
            {
                "workload": text.clean(workload(row, directions)),
                "upstream": upstream,
                "candidate": candidate,
                "end": max(known, default=None),
                "said": text.ratio(quantity.factor(row)) if len(known) == 2 else "",
            }
        )
    return records


def _panel(heading: str, points: list[dict[str, Any]], axis: dict[str, Any], last: bool) -> alt.LayerChart:
    """A row a workload: both values on one line, joined, with their ratio behind the larger one."""
    import altair as alt

    y = alt.Y(
        "workload:N",
        sort=None,
        title=None,
        axis=alt.Axis(
            **{
                "domain": False,
                "ticks": False,
                "labelPadding": 10,
                "labelLimit": LABELS,
                "labelFontSize": 13,
            },
            **{"minExtent": LABELS, "maxExtent": LABELS, "labelColor": "var(--ink)"},
        ),
    )
    scale = alt.Scale(type="log", domain=axis["domain"], nice=False)
    x_axis = alt.Axis(
        **{
            "values": axis["ticks"],
            "labelExpr": axis["label"],
            "labels": last,
            "domain": False,
            "ticks": False,
        },
        **{"gridColor": "var(--line)", "labelColor": "var(--muted)", "labelFontSize": 12, "labelPadding": 8},
        **{
            "titleColor": "var(--muted)",
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 10,
        },
    )
    x_title = axis["heading"] if last else None
    folded = [
        {"workload": point["workload"], "provider": provider, "value": point[provider]}
        for point in points
        for provider in PROVIDERS
        if point[provider] is not None
    ]
    joined = alt.Chart(alt.Data(values=[p for p in points if p["said"]])).encode(y=y)
    line = joined.mark_rule(stroke="var(--muted)", strokeWidth=2, opacity=0.45, aria=False).encode(
        x=alt.X("upstream:Q", scale=scale, axis=x_axis, title=x_title), x2="candidate:Q"
    )
    marks = (
        alt.Chart(alt.Data(values=folded))
        .mark_point(filled=True, size=110, opacity=1)
        .encode(
            y=y,
            x=alt.X("value:Q", scale=scale, axis=x_axis, title=x_title),
            color=alt.Color("provider:N", scale=alt.Scale(domain=list(PROVIDERS), range=list(COLOURS))),
            shape=alt.Shape("provider:N", scale=alt.Scale(domain=list(PROVIDERS), range=list(SHAPES))),
        )
    )
    said = joined.mark_text(align="left", dx=12, fontSize=12.5, fontWeight=600, fill="var(--ink)").encode(
        x=alt.X("end:Q", scale=scale, axis=x_axis, title=x_title), text="said:N"
    )
    head = alt.Title(
        heading,
        anchor="start",
        frame="bounds",
        color="var(--ink)",
        fontSize=13,
        fontWeight=600,
        limit=WIDTH + LABELS,
    )
    return alt.layer(line, marks, said, title=head).properties(width=WIDTH, height=alt.Step(STEP))


def _spoken(frame: pd.DataFrame, quantity: Quantity) -> str:
    """The chart in words, for who cannot see it."""
    rows = "; ".join(
        f"{row['operation']} {row['candidate']}, {row['oracle']}, {row['workload']}: "
        f"{quantity.say(row[quantity.upstream])} against {quantity.say(row[quantity.candidate])}"
        for row in frame.to_dict("records")
    )
    return f"{quantity.heading}, upstream against candidate. {rows}"


def _accessible(svg: str, name: str, spoken: str) -> str:
    """The drawing as a named image, without namespaces and the styles that the page's policy refuses."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib.pop("style", None)
        for attribute in [key for key in element.attrib if key.startswith(("aria-", "role", "class"))]:
            del element.attrib[attribute]  # an image has no parts to read out
    identity = f"chart-{name}-title"
    root.attrib.update({"role": "img", "aria-labelledby": identity})
    heading = ElementTree.Element("title", id=identity)
    heading.text = text.clean(spoken)
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")
