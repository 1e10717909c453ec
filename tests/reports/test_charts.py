"""Charts: drawn from the frames, labelled, in the page's own colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from reports import charts, frames, text


def _texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter("text") if element.text]


@pytest.mark.parametrize("quantity", [charts.TIME, charts.MEMORY], ids=lambda quantity: quantity.name)
def test_every_workload_and_factor_is_labelled(run_folder: Path, quantity: charts.Quantity, hostile_name: str) -> None:
    run = frames.read(run_folder)
    texts = _texts(charts.draw(run, quantity))
    rows = run.measurements.to_dict("records")
    assert [said for said in texts if said.endswith("×")] == [text.ratio(quantity.factor(row)) for row in rows]
    for workload in run.measurements["workload"]:
        assert texts.count(workload) == (run.measurements["workload"] == workload).sum()
    assert {"upstream", "candidate", quantity.heading} <= set(texts)
    assert f"hungarian: {hostile_name} against ultralytics==8.4.190 on cpu" in texts


@pytest.fixture(scope="module")
def times(written: Path) -> ElementTree.Element:
    return ElementTree.fromstring(charts.draw(frames.read(written), charts.TIME))


def test_a_chart_has_a_name_that_says_its_numbers(times: ElementTree.Element) -> None:
    title = times.find("title")
    assert times.get("role") == "img"
    assert times.get("aria-labelledby") == title.get("id")
    assert title.text.startswith("Median time of one call")
    assert "tal torch, ultralytics==8.4.190, coco-b1: 6.14 ms against 1.92 ms" in title.text


def test_series_differ_in_shape_and_take_their_colours_from_the_page(times: ElementTree.Element) -> None:
    drawn = {(path.get("fill"), path.get("d")) for path in times.iter("path") if path.get("fill")}
    shapes = {colour: {d for fill, d in drawn if fill == colour} for colour in charts.COLOURS}
    assert all(shapes.values())
    assert not set.intersection(*shapes.values())


def test_points_stand_in_the_order_of_the_numbers(written: Path, times: ElementTree.Element) -> None:
    """The position of every point is its number on the axis: sorting by either gives one order."""
    run = frames.read(written)
    fill = "var(--candidate)"
    legend_and_points = [p for p in times.iter("path") if p.get("fill") == fill and p.get("transform")]
    drawn = [float(p.get("transform").split("(")[1].split(",")[0]) for p in legend_and_points]
    values = run.measurements["candidate_ns"].tolist()
    drawn = drawn[: len(values)]  # the legend comes last
    assert pd.Series(drawn).rank().tolist() == pd.Series(values).rank().tolist()


def test_a_value_that_a_log_scale_cannot_show_is_left_out(run_folder: Path) -> None:
    file = run_folder / "measurements.parquet"
    frame = pd.read_parquet(file)
    frame.loc[0, "peak_bytes_candidate"] = 0
    frame.loc[1, "oracle_ns"] = float("nan")
    frame = frame.astype({"peak_bytes_oracle": float})
    frame.loc[2, ["oracle_ns", "peak_bytes_oracle"]] = float("inf")
    frame.to_parquet(file)
    run = frames.read(run_folder)
    for quantity in (charts.TIME, charts.MEMORY):
        texts = _texts(charts.draw(run, quantity))
        assert sum(said.endswith("×") for said in texts) == len(frame) - 2
        assert "coco-b1" in texts


def test_no_measurement_no_chart(make_run: Callable[..., Path]) -> None:
    assert charts.draw(frames.read(make_run(bench=False)), charts.TIME) is None
