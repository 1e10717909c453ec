"""report.html in headless Chromium: opens from disk, breaks no rule of its own policy, sorts and filters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--dump-dom"),
)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path], tuple[str, list[str]]]:
    """Opens a file and gives the document after its script ran, and what it wrote to the console."""
    if os.environ.get("CLEANROOM_NO_BROWSER") == "1":
        pytest.skip("CLEANROOM_NO_BROWSER=1: no browser on this machine")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail(
            "no Chromium found: install one (Debian: apt-get install -y chromium) or set CLEANROOM_NO_BROWSER=1"
        )

    def open_file(file: Path) -> tuple[str, list[str]]:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
        done = subprocess.run(command, check=True, capture_output=True, timeout=120)
        log = done.stderr.decode(errors="replace")
        return done.stdout.decode(), [line for line in log.splitlines() if ":CONSOLE" in line]

    return open_file


def test_opens_without_a_complaint_and_names_are_inert(written: Path, browse: Callable, parse: Callable) -> None:
    source, console = browse(written / "report.html")
    assert console == []
    page = parse(source)
    assert page.text.startswith("Cleanroom: failed ")
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert {name["type"] for name in page.all("input")} == {"search"}  # the script ran
    assert len(page.all("button")) == sum(attributes.get("scope") == "col" for attributes in page.all("th"))


def test_the_policy_holds_in_the_browser(written: Path, tmp_path: Path, browse: Callable) -> None:
    """Markup that got past the escaping would still not run, and the console would tell."""
    file = tmp_path / "broken.html"
    broken = (
        (written / "report.html")
        .read_text(encoding="utf-8")
        .replace("<main>", "<main><script>document.title='owned'</script>")
    )
    file.write_text(broken, encoding="utf-8")
    source, console = browse(file)
    assert "<title>Cleanroom: failed</title>" in source
    assert any("Content Security Policy" in line for line in console)


def test_sorts_and_filters(written: Path, tmp_path: Path, browse: Callable, parse: Callable) -> None:
    file = tmp_path / "sorted.html"
    source = (written / "report.html").read_text(encoding="utf-8")
    act = """
    const headings = [...document.querySelectorAll("#table-speed thead button")];
    const heading = headings.find((button) => button.textContent === "Upstream");
    heading.click();
    heading.click();
    const input = document.querySelector("input[type=search]");
    input.value = "YOLOX crowd";
    input.dispatchEvent(new Event("input"));
    """
    source = re.sub(r"<meta http-equiv=.*?>", "", source).replace("</body>", f"<script>{act}</script></body>")
    file.write_text(source, encoding="utf-8")
    shown, console = browse(file)
    assert console == []
    page = parse(shown)
    assert [row["Workload"][0] for row in page.tables["speed"]][:4] == [
        "dense-b4",
        "crowd-b16",
        "coco-b16",
        "coco-b1",
    ]
    (body,) = re.findall(r'(?s)<table id="table-speed">.*?</table>', shown)
    visible = re.findall(r"(?s)<tr>(.*?)</tr>", body.partition("</thead>")[2])
    assert len(visible) == 1
    assert "too-few-pairs" in visible[0]
    assert 'aria-sort="descending"' in body
