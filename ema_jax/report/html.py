"""Reports as one self-contained HTML page: inline CSS, SVG and one script, nothing fetched.

The script is the only one that the page's content security policy lets run, by its hash. Without it
everything is there, only still. Pure functions of their inputs: the same results give the same
bytes.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ema_jax.errors import UserError
from ema_jax.report import (
    doses,
    drawing,
    effects,
    figures,
    front,
    headline,
    labels,
    method,
    replication,
    sensitivity,
    shares,
    sweep,
    tables,
)
from ema_jax.report.captions import CAPTIONS
from ema_jax.runtime.files import write_text

SCHEMA = 1


@dataclass(frozen=True)
class Chart:
    """An inlined figure with its caption; empty markup where there was nothing to draw.

    Its files are `folder/name.svg|png|pdf`, from the page's place.
    """

    svg: str
    caption: str
    name: str
    folder: str = "../figures"


def write_report(
    workdir: Path,
    results: Mapping[str, Any],
    trajectories: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes `workdir/report/index.html` and `workdir/figures/*.svg|png` for one study.

    Args:
        workdir: the study's folder.
        results: `results.json`, schema 1; a part that is absent leaves out its section.
        trajectories: `{"arm", "seed", "points": [{"step", "refusal": {domain: rate},
            "invalid_rate", "shares": {domain: {share: x}}}]}` per run.
        samples: rows with `prompt` and `response` (also `arm`, `domain`, `verdict`), shown escaped;
            None keeps all model text out of the report.

    Raises:
        UserError: `results` is of another schema.
    """
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"results: schema {results.get('schema')!r}, this report reads schema {SCHEMA}; "
            "run the analyse stage again"
        )
    arm = next(iter(headline.plain_arms(results)), "")
    page = {
        "title": front.title(results),
        "results": results,
        "unlearned": any(name != "base" for name in results["arms"]),
        "limits": front.badges(results),
        "context": _context(results),
        "figures": front.numbers(results),
        "verdicts": front.verdicts(results.get("claims") or {}),
        "method": method.paragraph(results),
        "glossary": method.GLOSSARY,
        "headline": headline.headline(results),
        "facts": _facts(results),
        "charts": _charts(Path(workdir) / "figures", results, trajectories, arm),
        "tables": {
            "shares": shares.counts(results),
            "oracle": shares.oracle(results),
            "validity": results.get("validity") and shares.validity(results),
            "refusal": tables.refusal(results),
            "target": results.get("on_target") and effects.target(results),
            "runs": tables.runs(results),
            "arms": tables.arms(results),
            "doses": doses.table(results),
            "ema": results.get("ema") and effects.ema(results),
            "containment": results.get("containment") and effects.containment(results),
            "comparisons": results.get("comparisons") and tables.comparisons(results),
            "forecast": results.get("forecast", {}).get("score") and tables.forecast(results, arm),
            "categories": results.get("forecast", {}).get("categories")
            and tables.categories(results),
            "susceptibility": results.get("forecast", {}).get("susceptibility")
            and tables.susceptibility(results),
            "utility": results.get("utility") and tables.utility(results),
            "agreement": results.get("agreement") and tables.agreement(results),
            "sensitivity": results.get("sensitivity") and sensitivity.sensitivity(results),
            "labels": results.get("labels") and labels.errors(results),
            "corrected": results.get("corrected") and labels.corrected(results),
            "settings": method.study_settings(results),
            "arm_settings": method.arm_settings(results),
            "provenance": results.get("provenance") and tables.provenance(results),
        },
        "forecast_sentence": headline.forecast_sentence(results),
        "samples": None if samples is None else _grouped(samples),
    }
    render("report.html.jinja", Path(workdir) / "report" / "index.html", page)


def write_replication_report(workdir: Path, replication_results: Mapping[str, Any]) -> None:
    """Writes `workdir/report/index.html` over a replication, linking to its cells' reports.

    Args:
        workdir: the replication's folder, with the cells' studies under `cells/CELL`.
        replication_results: `replication.json`: `cells`, `claims` (R1 to R5) and flat `rows`.
    """
    chart = _chart(
        Path(workdir) / "figures",
        "replication",
        partial(replication.figure, replication_results),
        "Mean and worst off-target drop per family, arm and target",
        "Drop in refusal off target, in points: one mark per target and arm, filled for the "
        "mean over the other domains, hollow for the worst of them. Further right is more spill.",
    )
    rows = replication_results.get("rows", [])
    cells = [str(cell["cell"]) for cell in replication_results.get("cells", [])]
    links = {cell: f"../cells/{quote(cell)}/report/index.html" for cell in cells}
    page = {
        "title": "Refusal unlearning replicated over models and targets",
        "context": [f"{len(cells)} studies", f"{len(rows)} arms"] if cells else [],
        "verdicts": front.verdicts(replication_results.get("claims", {})),
        "cells": cells,
        "chart": chart,
        "tables": replication.tables(rows, links),
        "warnings": replication_results.get("warnings", []),
    }
    render("replication.html.jinja", Path(workdir) / "report" / "index.html", page)


def write_sweep_report(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `workdir/report/index.html` over a sweep.

    Args:
        workdir: the sweep's folder, with the studies of its points under `points/POINT`.
        rows: flat, one per point of the grid and arm.
    """
    points = dict.fromkeys(str(row["point"]) for row in rows if "point" in row)
    links = {}
    for point in points:
        # A point has its figures; its page only if somebody asked for it.
        for name in ("results.json", "report/index.html"):
            if (Path(workdir) / "points" / point / name).exists():
                links[point] = f"../{quote(f'points/{point}/{name}')}"
    caption = (
        "Means over seeds, in brackets Student's 95 % interval over them where there are two or "
        "more; refusal rates in per cent, drops and rises in points."
    )
    same = _same(rows)
    chart = _chart(
        Path(workdir) / "figures",
        "sweep",
        partial(sweep.figure, rows),
        "Target refusal and mean off-target drop of every point and arm",
        "A mark per point of the grid and arm, means over seeds. Further left the target refuses "
        "less, further up the other domains lose more: bottom left is containment.",
    )
    shown = [{k: x for k, x in row.items() if k not in same} for row in rows]
    page = {
        "title": "A sweep of refusal unlearning",
        "context": [
            *([f"{len(points)} points", f"{len(rows)} rows"] if points else []),
            *(f"{key.replace('_', ' ')} {value}" for key, value in same.items()),
        ],
        "chart": chart,
        "summary": tables.records(shown, caption, links),
    }
    render("sweep.html.jinja", Path(workdir) / "report" / "index.html", page)


def _same(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that all rows share, and that need no column: those that stand before the arm."""
    settings = list(rows[0])[: list(rows[0]).index("arm")] if rows and "arm" in rows[0] else []
    values = {key: {str(row.get(key)) for row in rows} for key in settings if key != "point"}
    return {key: rows[0][key] for key, found in values.items() if len(found) == 1}


def render(template: str, path: Path, page: Mapping[str, Any]) -> None:
    """Writes a page from its template, with the style, script and contents that all pages have."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        Markup((folder / f"page.{kind}.jinja").read_text(encoding="utf-8"))
        for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": style, "script": script, "script_hash": f"sha256-{digest}"}
    text = environment.get_template(template).render({**page, **own})
    write_text(path, _with_contents(text))


_SECTION = re.compile(r'<section id="([a-z]+)"[^>]*>\n<h2>(.*?)</h2>')


def _with_contents(text: str) -> str:
    """The page with a list of its sections where the template wants one."""
    items = "".join(
        f'<li><a href="#{id}">{title}</a></li>\n' for id, title in _SECTION.findall(text)
    )
    return text.replace("<!-- contents -->", f"<ol>\n{items}</ol>", 1)


def _chart(folder: Path, name: str, draw: Callable, alt: str, caption: str) -> Chart:
    return Chart(drawing.save(draw, folder, name, alt), caption, name)


def _charts(
    folder: Path,
    results: Mapping[str, Any],
    trajectories: Sequence[Mapping[str, Any]],
    arm: str,
) -> dict[str, Chart]:
    """Every figure that the results have numbers for."""
    draws: dict[str, Callable] = {
        "shares": partial(shares.figure, results),
        "refusal": partial(figures.refusal, results),
        "trajectory": partial(figures.trajectory, results, trajectories),
    }
    if results.get("ema"):
        draws["ema"] = partial(figures.ema, results)
    if results.get("entanglement"):
        draws["entanglement_centred"] = partial(figures.entanglement, results, True)
        draws["entanglement"] = partial(figures.entanglement, results, False)
        draws["entanglement_map"] = partial(figures.entanglement_map, results)
    maps = {
        "erasure": figures.erasure_map,
        "angle": figures.angle_map,
        "patching": figures.patching_map,
        "sweep": figures.sweep_map,
    }
    for name, draw in maps.items():
        if results.get("angle_degrees" if name == "angle" else name):
            draws[name] = partial(draw, results)
    if results.get("forecast", {}).get("score") and results.get("ema"):
        draws["forecast"] = partial(figures.forecast, results, arm)
    target = drawing.label(results["target"]).lower()
    return {
        name: _chart(folder, name, draw, *(text.format(target=target) for text in CAPTIONS[name]))
        for name, draw in draws.items()
    }


def _context(results: Mapping[str, Any]) -> list[str]:
    """Where the figures come from, in short."""
    provenance = results.get("provenance", {})
    prompts = provenance.get("settings", {}).get("prompts", {}).get("source")
    judge = results.get("judge")
    found = [
        f"model {results['model']['id']}",
        f"target {drawing.label(results['target']).lower()}",
        prompts and f"prompts {prompts}",
        judge and f"judge {judge}",
        provenance.get("date"),
    ]
    return [text for text in found if text]


def _grouped(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Samples by arm and domain: a study has thousands, and a line each would fill the page."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        names = [sample.get("arm"), sample.get("domain") and drawing.label(sample["domain"])]
        groups.setdefault(" · ".join(filter(None, names)) or "samples", []).append(sample)
    return groups


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the study's facts; missing ones are left out."""
    model, base = results["model"], results["arms"].get("base", {}).get("refusal", {})
    totals = [r["total"] for r in base.values() if r.get("total") is not None]
    parameters = model.get("parameters")
    size = None
    if totals:
        low, high = min(totals), max(totals)
        size = str(low) if low == high else f"{low} to {high}"
    provenance = results.get("provenance", {})
    facts = [
        ("Model", model["id"]),
        ("Revision", model.get("revision")),
        ("Family", model.get("family")),
        ("Layers × width", f"{model.get('num_layers')} × {model.get('hidden_size')}"),
        ("Parameters", parameters and f"{parameters:,}"),
        ("Target", drawing.label(results["target"])),
        ("Arms", ", ".join(results["arms"])),
        ("Seeds", ", ".join(str(s) for s in provenance.get("seeds", []))),
        ("Judge", results.get("judge") or provenance.get("judge")),
        ("Evaluation prompts per domain", size),
    ]
    return [(name, str(value)) for name, value in facts if value]
