"""Where a number comes from: from a figure, a table or a sentence of the report back to the runs, and from a run back
to its plan, its text, its kernels' certificate, the code that trained it and the machine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.fitting.tables import COLUMNS
from xlstm_scaling.study.code import describe_code
from xlstm_scaling.study.files import digest, file_sha256, read_json
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.run_spec import spec_of

#: table -> the tables that it was made from; ``RUNS`` are the folders of runs themselves
RUNS = "(runs)"
SOURCES: dict[str, tuple[str, ...]] = {
    "runs": ("plan/plan", RUNS),
    "curves": ("plan/plan", RUNS),
    **{f"fits/{name}": ("runs", "curves") for name in COLUMNS},
    "inference/measurements": (RUNS,),
    "inference/runtime_model": ("inference/measurements",),
    "inference/runtime_predictions": ("inference/measurements",),
    "evaluation/length": (RUNS,),
    "optimal": ("fits/isoflop", "fits/isoflop_resamples"),
    "claims/claims": ("runs", "curves", *(f"fits/{name}" for name in COLUMNS)),
}
#: what a run says of itself, in the order in which it is told
FACTS = ("behaviour_version", "finished", "host", "user", "job", "device_name", "devices", "threads", "torch_version")


#: folder -> what its other tables were made from
FOLDERS = {"fits": ("runs", "curves"), "inference": ("inference/measurements",), "evaluation": (RUNS,)}


def sources_of(table: str) -> tuple[str, ...]:
    """The tables that one was made from; () where it was made from none of this study, or is not known."""
    return SOURCES.get(table) or FOLDERS.get(table.partition("/")[0], ())


class UnknownName(ValueError):
    """Nothing of this name; the message lists what there is."""


def provenance(name: str, paths: StudyPaths) -> dict[str, Any]:
    """The chain of a run (its id, or a part that one run has), a table (``fits/isoflop``, or a file), a figure, or the
    ``report``. Raises UnknownName."""
    wanted = _relative(name, paths)
    runs = _runs_named(wanted, paths)
    if wanted in FIGURES or (wanted.startswith("figures/") and Path(wanted).name in FIGURES):
        return _figure(Path(wanted).name, paths, {})
    if wanted == "report":
        made = [path.stem for path in sorted(paths.figures.glob("*.svg")) if path.stem in FIGURES]
        done: dict[str, dict] = {}
        parts = [_table("findings", paths, done), _table("optimal", paths, done)]
        parts += [_figure(figure, paths, done) for figure in made]
        return _file(paths.study / "report.html", "report", "report") | {"from": parts}
    for table in (wanted, *(f"{folder}/{wanted}" for folder in (*FOLDERS, "plan", "claims"))):
        if table in SOURCES or table in ("plan/plan", "findings") or (paths.study / f"{table}.parquet").is_file():
            return _table(table, paths, {})
    if len(runs) == 1:
        return run_record(runs[0], paths)
    if runs:
        raise UnknownName(f"{len(runs)} runs match {name!r}, e.g. {', '.join(run.name for run in runs[:5])}")
    raise UnknownName(
        f"nothing is called {name!r}: name a run, a figure ({', '.join(FIGURES)}), a table "
        f"({', '.join([*SOURCES, 'plan/plan', 'findings'])}) or report"
    )


def _relative(name: str, paths: StudyPaths) -> str:
    """A file of the study as the name of its table or figure."""
    path = Path(name)
    if path.suffix in (".parquet", ".csv", ".svg", ".png", ".html", ".json", ".md"):
        path = path.with_suffix("")
    for folder in (paths.study, paths.runs):
        if path.is_absolute() or path.parts[: len(folder.parts)] == folder.parts:
            try:
                return path.resolve().relative_to(folder.resolve()).as_posix().removesuffix("/result")
            except ValueError:
                continue
    return path.as_posix()


def _runs_named(name: str, paths: StudyPaths) -> list[Path]:
    if not paths.runs.is_dir() or "/" in name:
        return []
    folders = [folder for folder in sorted(paths.runs.iterdir()) if name in folder.name]
    return [folder for folder in folders if folder.name == name] or folders


def _file(path: Path, name: str, stage: str) -> dict[str, Any]:
    """A file that a stage made: place, digest, time."""
    found: dict[str, Any] = {"name": name, "stage": stage, "file": str(path)}
    if not path.is_file():
        return found | {"missing": True}
    found["sha256"] = file_sha256(path)
    found["written"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
    settings = path.parent / "config.yaml"
    return found | ({"settings": str(settings)} if settings.is_file() else {})


def _figure(name: str, paths: StudyPaths, done: dict[str, dict]) -> dict[str, Any]:
    tables = [_table(table, paths, done) for table in FIGURES[name].tables]
    return _file(paths.figures / f"{name}.svg", name, "figures") | {"from": tables}


def _table(name: str, paths: StudyPaths, done: dict[str, dict]) -> dict[str, Any]:
    """A table and what it was made from; what was told before is named only."""
    if name in done:
        return {"name": name, "see": "above"}
    done[name] = node = _file(paths.study / f"{name}.parquet", name, _stage(name))
    path = Path(node["file"])
    if name == "findings" and path.is_file():
        said = pd.read_parquet(path)["source"].dropna().unique()
        sources: tuple[str, ...] = tuple(source for source in said if sources_of(source))
    else:
        sources = sources_of(name)
    if name in ("runs", "curves") and (paths.study / "runs.provenance.json").is_file():
        read = read_json(paths.study / "runs.provenance.json")
        return node | {"published": {"file": str(paths.study / "runs.provenance.json"), "read": read.get("files", [])}}
    node["from"] = [_table(source, paths, done) for source in sources if source != RUNS]
    if RUNS in sources:
        node["runs"] = _summary(path, paths)
    return node


def _stage(name: str) -> str:
    folder = name.partition("/")[0]
    return {"fits": "fit", "evaluation": "evaluate", "curves": "runs", "optimal": "findings"}.get(folder, folder)


def _summary(table: Path, paths: StudyPaths) -> dict[str, Any]:
    """What the runs behind a table have in common, and whether the table still says what they say."""
    if not table.is_file():
        return {}
    rows = pd.read_parquet(table)
    if "run_id" in rows:
        names = list(dict.fromkeys(rows["run_id"]))
    else:
        return {"note": "trained models by architecture and size: see the column `model`"}
    counts: dict[str, Counter] = {}
    differing, missing = [], []
    losses = dict(zip(rows["run_id"], rows["val_loss"])) if "status" in rows and "val_loss" in rows else {}
    for name in names:
        path = paths.runs / name / "result.json"
        if not path.is_file():
            missing.append(name)
            continue
        result = read_json(path)
        if table.stem == "runs" and not _equal(losses.get(name), result["val_loss"]):
            differing.append(name)
        about = {key: result.get(key) for key in FACTS if key not in ("finished", "job")}
        about |= {"code": describe_code(result.get("code")), "certificate": result.get("kernel_certificate")}
        about["tokens"] = result.get("tokens_digest")
        for key, value in about.items():
            counts.setdefault(key, Counter())["not recorded" if value is None else str(value)] += 1
    found: dict[str, Any] = {"count": len(names)} | {key: dict(values) for key, values in counts.items()}
    if table.stem == "runs":
        found["differing"] = differing
    return found | {"missing": missing}


def _equal(one: float | None, other: float | None) -> bool:
    return one == other or (pd.isna(one) and pd.isna(other))


def run_record(folder: Path, paths: StudyPaths) -> dict[str, Any]:
    """A run: what it says of itself, and whether plan, tokens and certificate are still there, unchanged."""
    record: dict[str, Any] = {"name": folder.name, "folder": str(folder)}
    plan = folder / "spec.json"
    if plan.is_file():
        spec = spec_of(read_json(plan))
        if spec is None:
            raise ValueError(f"{plan} is of code with other settings: this version cannot say what it determines")
        agrees = spec.run_id == folder.name
        record["plan"] = {"file": str(plan), "agrees_with_name": agrees, "seed": spec.seed, "tokens": spec.tokens_id}
        record["tokens"] = _tokens(paths.results / "tokens" / spec.tokens_id)
    record["studies"] = _studies_of(folder.name, paths.results)
    log = paths.results / "logs" / "runs" / f"{folder.name}.log"
    record["log"] = str(log) if log.is_file() else None
    if not (folder / "result.json").is_file():
        return record | {"result": None}
    result = read_json(folder / "result.json")
    numbers = {key: result[key] for key in ("status", "val_loss", "train_loss", "tokens_per_s", "mfu")}
    record["result"] = _file(folder / "result.json", "result", "train") | numbers
    record["curve"] = str(folder / "history.jsonl")
    record["weights"] = str(folder / "final.ckpt")
    record["code"] = result.get("code")
    record |= {key: result.get(key) for key in FACTS}
    record["certificate"] = _certificate(result.get("kernel_certificate"), paths.results)
    if "tokens" in record:
        record["tokens"]["same"] = record["tokens"].get("digest") == result["tokens_digest"]
    return record


def _tokens(folder: Path) -> dict[str, Any]:
    if not (folder / "meta.json").is_file():
        return {"folder": str(folder), "missing": True}
    meta = read_json(folder / "meta.json")
    about = {"corpus": meta["corpus"]["name"], "tokenizer": meta["tokenizer"]["name"], "digest": meta["digest"]}
    return {"folder": str(folder)} | about | {"text": meta["spec"]["corpus"]}


def _certificate(wanted: str | None, results: Path) -> dict[str, Any] | None:
    """The certificate with this digest, wherever it is kept now."""
    if wanted is None:
        return None
    for path in sorted((Path(results) / "certificates").glob("*.json")):
        if digest(read_json(path)) == wanted:
            return {"digest": wanted, "file": str(path)}
    return {"digest": wanted, "file": None}


def _studies_of(run_id: str, results: Path) -> list[str]:
    """Studies of this results folder that planned the run."""
    names = []
    for table in sorted(Path(results).glob("*/plan/plan.parquet")):
        if run_id in set(pd.read_parquet(table, columns=["run_id"])["run_id"]):
            names.append(table.parents[1].name)
    return names


def lines(node: Mapping[str, Any], depth: int = 0) -> list[str]:
    """The chain for people: a node a line, what it was made from below it."""
    pad = "  " * depth
    if "folder" in node:
        return _run_lines(node)
    if "see" in node:
        return [f"{pad}{node['name']} (above)"]
    about = "missing" if node.get("missing") else f"sha256 {node.get('sha256', '')[:12]}, written {node.get('written')}"
    told = [f"{pad}{node['name']}: {node['file']} ({about}; stage {node['stage']})"]
    if "settings" in node:
        told.append(f"{pad}  settings: {node['settings']}")
    if "published" in node:
        told.append(f"{pad}  published runs, read as {node['published']['file']} says")
    if "runs" in node:
        told += [f"{pad}  {text}" for text in _summary_lines(node["runs"])]
    for source in node.get("from", []):
        told += lines(source, depth + 1)
    return told


def _summary_lines(runs: Mapping[str, Any]) -> list[str]:
    if "count" not in runs:
        return [runs["note"]] if "note" in runs else []
    told = [f"{runs['count']} runs (xlstm-scaling provenance RUN says more of each)"]
    for key, values in runs.items():
        if isinstance(values, Mapping):
            told.append(f"  {key}: " + ", ".join(f"{value} ({count})" for value, count in values.items()))
    if "differing" in runs:
        wrong = runs["differing"]
        agree = (
            f"losses differ from result.json: {', '.join(wrong)}" if wrong else "every loss is that of its result.json"
        )
        told.append(f"  {agree}")
    if runs["missing"]:
        told.append(f"  no result any more: {', '.join(runs['missing'])}")
    return told


def _run_lines(record: Mapping[str, Any]) -> list[str]:
    result, told = record["result"], [record["name"]]
    if result is None:
        told.append("  no result yet")
    else:
        told.append(f"  result: {result['file']} (sha256 {result['sha256'][:12]}): {result['status']}, ")
        told[-1] += f"validation loss {result['val_loss']} nat/token"
        told.append(f"  code: {describe_code(record['code'])}")
        told += [f"  {key.replace('_', ' ')}: {record[key]}" for key in FACTS if record.get(key) is not None]
        certificate = record["certificate"]
        where = "none" if certificate is None else certificate["file"] or "not here any more"
        told.append(f"  certificate of its kernels: {where}")
        told += [f"  curve: {record['curve']}", f"  weights: {record['weights']}"]
    if "plan" in record:
        agrees = "agrees with the folder's name" if record["plan"]["agrees_with_name"] else "is NOT that of this folder"
        told.append(f"  plan: {record['plan']['file']} ({agrees})")
        tokens = record["tokens"]
        same = {True: "the tokens it was trained on", False: "NOT the tokens it was trained on"}.get(
            tokens.get("same"), ""
        )
        told.append(f"  tokens: {tokens['folder']} ({tokens.get('corpus', 'missing')}{'; ' if same else ''}{same})")
    told.append(f"  studies here that planned it: {', '.join(record['studies']) or 'none'}")
    return told + ([f"  log: {record['log']}"] if record["log"] else [])
