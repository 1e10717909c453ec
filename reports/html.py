"""report.html: one file that opens offline, with a strict content security policy."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import charts, headline, sections, tables, text
from reports.failures import failures

if TYPE_CHECKING:
    from reports.frames import Run

TEMPLATES = Path(__file__).parent / "templates"
LABELS = {"argv": "Arguments", "cpu": "CPU"}
SHOWN = 100
"""Failing cases that the page lists; junit.xml has all of them."""


def render(run: Run) -> str:
    """The whole page. Everything from the run is escaped; style and script are admitted by their hash."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text.clean(value) if type(value) is str else value,
    )
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    found = failures(run)
    word, tone = headline.state(run)
    drawings = {quantity.name: charts.draw(run, quantity) for quantity in (charts.TIME, charts.MEMORY)}
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        state=word,
        tone=tone,
        sentence=headline.sentence(run),
        notes=" ".join(headline.notes(run)),
        context=list(context(run)),
        facts=list(headline.facts(run)),
        parity=tables.parity(run),
        speed=tables.speed(run),
        memory=tables.memory(run),
        movement=tables.movement(run),
        launches=tables.launches(run),
        charts={name: Markup(svg) for name, svg in drawings.items() if svg},
        failures=found[:SHOWN],
        failing=len(found),
        divergences=tables.divergences(run),
        whole=run.whole,
        sections=sections.sections(run),
        gate=tables.gate(run),
        provenance=list(provenance(run)),
        oracles=run.provenance.get("oracles") or [],
        versions=run.provenance.get("versions") or {},
        settings=json.dumps(run.provenance.get("settings") or {}, indent=2, ensure_ascii=False),
        share=text.share,
        tone_of=tables.tone,
    )


def policy(style: str, script: str) -> str:
    """A content security policy that admits this style, this script and nothing else."""
    admitted = f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    return f"default-src 'none'; {admitted}; base-uri 'none'; form-action 'none'"


def provenance(run: Run) -> Iterator[tuple[str, str]]:
    """Where the numbers come from, as label and text; what the run did not record is left out."""
    recorded = run.provenance
    for key in ("started", "finished"):
        if recorded.get(key):
            yield key.capitalize(), str(recorded[key])
    took = _took(recorded.get("started"), recorded.get("finished"))
    if took:
        yield "Took", took
    for key in ("command", "argv", "profile", "seed", "examples", "device", "cpu", "threads"):
        if recorded.get(key) is not None:
            value = recorded[key]
            label = LABELS.get(key, key.capitalize())
            yield label, shlex.join(map(str, value)) if isinstance(value, list) else str(value)
    if recorded.get("commit"):
        yield (
            "Commit",
            str(recorded["commit"]) + (" with uncommitted changes" if recorded.get("dirty") else ""),
        )
    if run.samples is not None:
        yield "Raw samples", text.count(len(run.samples))


def context(run: Run) -> Iterator[str]:
    """What a reader must know beside the verdict: when, where, on which code."""
    recorded = run.provenance
    if recorded.get("started"):
        yield str(recorded["started"])[:16].replace("T", " ")
    if recorded.get("profile"):
        yield f"profile {recorded['profile']}"
    if recorded.get("device"):
        threads = f", {recorded['threads']} threads" if recorded.get("threads") else ""
        yield f"{recorded['device']}{threads}"
    if (recorded.get("versions") or {}).get("torch"):
        yield f"torch {recorded['versions']['torch']}"
    if recorded.get("commit"):
        yield f"commit {str(recorded['commit'])[:12]}"


def _took(started: Any, finished: Any) -> str:
    try:
        seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    except (TypeError, ValueError):  # not finished, or not a date: both are printed as they stand
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _asset(name: str) -> str:
    return "\n" + (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode()
