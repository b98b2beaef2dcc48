"""A study's results as one HTML page: ``report.html`` in the study's folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from xlstm_scaling.figures.registry import CATEGORIES, FIGURES, ON_DEMAND
from xlstm_scaling.figures.style import flops, si
from xlstm_scaling.figures.tables import FigureError, Tables
from xlstm_scaling.planning import PlanningError
from xlstm_scaling.planning.maps import study_laws, swept_budget
from xlstm_scaling.report.comparison import VERDICTS, comparable
from xlstm_scaling.report.page import answer, captions, failures, ledger, origin, pictures, tables
from xlstm_scaling.study.code import code_version, describe_code
from xlstm_scaling.study.files import write_text_atomic
from xlstm_scaling.study.paths import StudyPaths

log = logging.getLogger(__name__)

#: pages that may lie beside the report
EXPLORER, WORKFLOW_REPORT = "explorer.html", "workflow-report.html"
#: optima further than this beyond the largest budget are no advice
MAX_BEYOND_BUDGETS = 1e3
#: (id, title) of the sections, in order
SECTIONS = (
    ("question", "The question"),
    ("answer", "The answer"),
    ("train", "What to train"),
    ("claims", "Claims of the paper"),
    ("figures", "Figures"),
    ("tables", "Tables"),
    ("lost", "What failed, diverged or was skipped"),
    ("scope", "What this scale cannot tell"),
    ("comparison", "Beside other studies"),
    ("cite", "How to cite"),
    ("provenance", "Where every number comes from"),
)


def write_page(
    paths: StudyPaths, config: Mapping[str, Any], caption_folder: Path, published: bool, inference: bool
) -> Path:
    """``report.html`` of the study from what is in its folder; what is missing is said on the page.

    Args:
        config: the resolved configuration, as plain values.
        caption_folder: ``workflow/report``.
        published: whether the runs are published ones; inference: whether there should be tables of inference.

    Raises:
        FileNotFoundError: there is neither a plan nor a table of runs: nothing to report.
        FigureError: a table is not as this version of the code writes it.
    """
    if not any((paths.study / name).is_file() for name in ("runs.parquet", "plan/plan.json")):
        stage = "ingest" if published else "plan"
        raise FileNotFoundError(f"nothing to report in {paths.study}: run the study, or at least its stage `{stage}`")
    path = paths.study / "report.html"
    try:
        text = render(page_context(paths, config, caption_folder, published, inference))
    except (AttributeError, KeyError) as error:  # a column, most often
        message = f"a table in {paths.study} is not as this version writes it ({error}): run the workflow again"
        raise FigureError(message) from error
    write_text_atomic(path, text)
    log.info("%s: %.1f MB", path, len(text.encode()) / 1e6)
    return path


def render(context: Mapping[str, Any]) -> str:
    """The page from what `page_context` gathers."""
    package = files(__package__)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xlstm_scaling.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si, "flops": flops, "anchor": origin.anchor, "finite": math.isfinite}
    assets = {name: Markup((package / name).read_text()) for name in ("page.css", "page.js")}
    template = environment.get_template("page.html.j2")
    return template.render(**context, css=assets["page.css"], js=assets["page.js"])


def page_context(
    paths: StudyPaths, config: Mapping[str, Any], caption_folder: Path, published: bool, inference: bool
) -> dict[str, Any]:
    """All that the template shows, from the files of the study."""
    data = Tables(paths.study)
    confidence = config["fitting"]["confidence"]
    filling = {"study": paths.name, "fitting": {"confidence": confidence}, "figures": config.get("figures") or {}}
    named = dict(captions.caption_texts(caption_folder / "workflow.rst", filling))
    about = {lead: captions.to_html(text) for lead, text in named.items() if lead}
    runs, findings = _table(data, "runs"), _table(data, "findings")
    shown = [name for name, spec in FIGURES.items() if spec.category != ON_DEMAND and _drawn(paths, name)]
    figures = [pictures.picture(name, paths.study, caption_folder, filling, data) for name in shown]
    entries = origin.origins(paths, shown)
    missing = failures.missing_stages(paths, published, inference)
    lost = failures.lost_runs(paths, runs)
    cards = answer.cards(data, confidence)
    name = config["study"]["name"]
    return {
        "study": paths.name,
        "title": config["study"]["title"] or paths.name,
        "published": published,
        "confidence": confidence,
        "sections": [section for section in SECTIONS if section[0] != "claims" or published],
        "about": about,
        "runs": _runs_line(runs, published),
        "cards": cards,
        "findings": _by_topic(findings),
        "scope": [] if findings is None else list(findings[findings.topic == "scope"].itertuples()),
        "choice": [] if findings is None else list(findings[findings.topic == "choice"].itertuples()),
        "optimal": _optimal(data),
        "recommend": _recommend(paths, data),
        "ledger": ledger.ledger(pd.read_parquet(paths.claims / "claims.parquet"))
        if (paths.claims / "claims.parquet").is_file()
        else None,
        "categories": [(c, [f for f in figures if f.category == c]) for c in CATEGORIES if c != ON_DEMAND],
        "previews": tables.previews(data),
        "missing": missing,
        "lost": lost,
        "lost_rows": list(failures.lost_rows(data)),
        "skipped_steps": failures.skipped_steps(runs),
        "comparison": _comparison(paths, data, captions.caption(caption_folder / "comparison.rst", filling)),
        "origins": entries,
        "origin_names": {entry.name for entry in entries},
        "known_files": origin.known_files(paths),
        "settings": origin.settings_files(entries, paths),
        "partial": bool(missing or any(run.state != "diverged" for run in lost)),
        "explorer": EXPLORER if (paths.study / EXPLORER).is_file() else "",
        "workflow_report": WORKFLOW_REPORT,
        "code": describe_code(code_version()),
        "version": code_version()["version"],
        "commit": code_version()["commit"],
        "command_line": f"xlstm-scaling provenance NAME study={name}{' runs=published' if published else ''}",
    }


def _table(data: Tables, name: str) -> pd.DataFrame | None:
    return data[name] if name in data else None  # noqa: SIM401 -- a table that is missing raises no KeyError


def _drawn(paths: StudyPaths, name: str) -> bool:
    return any((paths.figures / f"{name}.{kind}").is_file() for kind in ("png", "svg"))


def _runs_line(runs: pd.DataFrame | None, published: bool) -> dict[str, str]:
    """What was trained, or read, for the top of the page."""
    if runs is None:
        return {}
    ok = runs[runs["status"] == "ok"]
    facts = {("published runs" if published else "training runs"): f"{len(ok):,}"}
    if len(ok):
        for label, column, form in (
            ("parameters N", "num_params", si),
            ("tokens D", "num_tokens", si),
            ("FLOPs H", "num_flops", flops),
        ):
            facts[label] = f"{form(float(ok[column].min()))} – {form(float(ok[column].max()))}"
        facts["contexts"] = ", ".join(f"{c:,}" for c in sorted(ok["context_length"].unique()))
        facts["corpus"] = ", ".join(sorted(ok["corpus"].dropna().astype(str).unique())) if "corpus" in ok else ""
    return {label: value for label, value in facts.items() if value}


def _by_topic(findings: pd.DataFrame | None) -> list[tuple[str, list[Any]]]:
    if findings is None:
        return []
    return [(str(topic), list(rows.itertuples())) for topic, rows in findings.groupby("topic", sort=False)]


def _optimal(data: Tables) -> list[Any]:
    """Optima near what was measured, of the context with the most budgets."""
    if "optimal" not in data or data["optimal"].empty:
        return []
    table = data["optimal"]
    contexts = table.groupby("context_length").num_budgets.sum().sort_index()
    table = table[table.context_length == contexts.idxmax()]
    near = table[(table.beyond_budgets <= MAX_BEYOND_BUDGETS) & (table.beyond_budgets >= 1 / MAX_BEYOND_BUDGETS)]
    return [row._replace(arch=answer.name_of(row.arch)) for row in near.itertuples(index=False)]


def _recommend(paths: StudyPaths, data: Tables) -> dict[str, Any]:
    """The command that asks this study's laws for the best model at ten times its largest budget."""
    try:
        laws = study_laws(data, 0.95)
        budget = 10 * swept_budget(laws, data["fits/isoflop"])
        context = int(next(iter(laws.archs.values())).base_context)
    except (PlanningError, ValueError, KeyError):
        return {}
    place = f"results/{paths.name}/fits"
    return {"command": f"xlstm-scaling recommend --flops {budget:.0e} --context-length {context} --laws {place}"}


def _comparison(paths: StudyPaths, data: Tables, caption: captions.Caption) -> dict[str, Any]:
    """The table of `compare`, a row a quantity and architecture, and its figure; {} where there is none."""
    stem = paths.study / "comparison" / "comparison"
    if not stem.with_suffix(".parquet").is_file():
        return {}
    table = pd.read_parquet(stem.with_suffix(".parquet"))
    studies = list(dict.fromkeys(table["study"]))
    rows = []
    for (quantity, arch), group in table.groupby(["quantity", "arch"], sort=False):
        cells = {row.study: row for row in group.itertuples()}
        verdicts = [row.verdict for row in group.itertuples() if VERDICTS[row.verdict]]
        rows.append(
            {
                "quantity": quantity,
                "arch": answer.name_of(arch),
                "cells": cells,
                "verdict": verdicts[0] if verdicts else "",
            }
        )
    judged = table[table["verdict"].isin(["agree", "differ"])]
    ranks = [
        (quantity, answer.name_of(arch), [(row.study, row.ranking) for row in group.itertuples()])
        for (quantity, arch), group in table[table["ranking"] != ""].groupby(["quantity", "arch"], sort=False)
    ]
    drawn = [f"comparison/comparison{kind}" for kind in (".svg", ".png") if stem.with_suffix(kind).is_file()]
    return {
        "studies": studies,
        "rows": rows,
        "agree": int((judged["verdict"] == "agree").sum()),
        "judged": len(judged),
        "differing": [row for row in rows if row["verdict"] == "differ"],
        "words": VERDICTS,
        "ranks": ranks,
        "picture": pictures.embedded(stem) if drawn else None,
        "file": drawn[0] if drawn else "",
        "caption": caption.first + caption.more,
        "stale": _stale(table, paths.name, data),
    }


def _stale(table: pd.DataFrame, study: str, data: Tables) -> bool:
    """Whether this study's fits are no longer those that were compared."""
    mine = table[table["study"] == study]
    if mine.empty:
        return False
    now = {(row["quantity"], row["arch"]): row["value"] for row in comparable(data)}
    return {(row.quantity, row.arch): row.value for row in mine.itertuples()} != now
