"""Where what the page says comes from: file, digest, settings, what it was made from, and the runs behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.study.files import digest, file_sha256, read_json
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.provenance import provenance

#: what is told of the runs behind a table, in this order
FACTS = {
    "code": "code (version, commit, sources)",
    "certificate": "certificate of the kernels",
    "tokens": "tokens",
    "behaviour_version": "version of the training's behaviour",
    "torch_version": "torch",
    "device_name": "device",
    "host": "host",
}


@dataclass(frozen=True)
class Origin:
    """One figure or table. Files are relative to the study's folder; ``sources`` are names of others."""

    name: str
    kind: str
    file: str
    sha256: str
    stage: str
    csv: str = ""
    settings: str = ""
    sources: tuple[str, ...] = ()
    runs: dict[str, dict[str, int]] = field(default_factory=dict)
    num_runs: int = 0
    disagreeing: tuple[str, ...] = ()
    published: tuple[tuple[str, str], ...] = ()

    @property
    def anchor(self) -> str:
        """The id of its entry on the page."""
        return anchor(self.name)


def anchor(name: str) -> str:
    """The id of the entry of a table or figure."""
    return "from-" + re.sub(r"[^A-Za-z0-9_]+", "-", name)


def origins(paths: StudyPaths, figures: Iterable[str]) -> list[Origin]:
    """Every table and figure of the report that is there, tables first, each once."""
    found: dict[str, Origin] = {}
    for node in provenance("report", paths)["from"]:
        _walk(node, paths, found)
    for name in figures:
        if name not in found:
            stem = paths.figures / name
            file = next(path for path in (stem.with_suffix(".svg"), stem.with_suffix(".png")) if path.is_file())
            found[name] = Origin(
                name, "figure", _relative(file, paths), file_sha256(file), "figures", sources=FIGURES[name].tables
            )
            for table in FIGURES[name].tables:
                if table not in found and (paths.study / f"{table}.parquet").is_file():
                    _walk(provenance(table, paths), paths, found)
    extra = {"claims/claims": "claims", "comparison/comparison": "compare"}
    for name, stage in extra.items():
        file = paths.study / f"{name}.parquet"
        if file.is_file():
            sources = tuple(sorted(table for table in found if table.startswith("fits/"))) if stage == "claims" else ()
            csv = f"{name}.csv" if file.with_suffix(".csv").is_file() else ""
            found[name] = Origin(name, "table", _relative(file, paths), file_sha256(file), stage, csv, sources=sources)
    return sorted(found.values(), key=lambda origin: (origin.kind != "table", origin.name))


def _walk(node: Mapping[str, Any], paths: StudyPaths, found: dict[str, Origin]) -> None:
    if "see" in node or node.get("missing") or node["name"] in found:
        return
    name, file = node["name"], Path(node["file"])
    runs = node.get("runs") or {}
    csv = file.with_suffix(".csv")
    found[name] = Origin(
        name=name,
        kind="figure" if node["stage"] == "figures" else "table",
        file=_relative(file, paths),
        sha256=node["sha256"],
        stage=node["stage"],
        csv=_relative(csv, paths) if csv.is_file() else "",
        settings=_relative(Path(node["settings"]), paths) if "settings" in node else "",
        sources=tuple(source["name"] for source in node.get("from", [])),
        runs={label: runs[key] for key, label in FACTS.items() if runs.get(key)},
        num_runs=runs.get("count", 0),
        disagreeing=(*runs.get("differing", []), *runs.get("missing", [])),
        published=_published(paths) if "published" in node else (),
    )
    for source in node.get("from", []):
        _walk(source, paths, found)


def _published(paths: StudyPaths) -> tuple[tuple[str, str], ...]:
    """(name, git blob) of the files that published runs were read from."""
    read = read_json(paths.study / "runs.provenance.json")
    return tuple((source["name"], source.get("blob") or "") for source in read.get("sources", []))


def _relative(path: Path, paths: StudyPaths) -> str:
    return path.relative_to(paths.study).as_posix()


def known_files(paths: StudyPaths) -> dict[str, str]:
    """Digest -> path relative to the study's folder, of certificates and of tokens."""
    found = {}
    for path in sorted((paths.results / "certificates").glob("*.json")):
        found[digest(read_json(path))] = f"../certificates/{path.name}"
    for path in sorted((paths.results / "tokens").glob("*/meta.json")):
        found[str(read_json(path).get("digest"))] = f"../tokens/{path.parent.name}/meta.json"
    return found


def settings_files(entries: Iterable[Origin], paths: StudyPaths) -> dict[str, str]:
    """File -> content of every settings file that the entries name."""
    names = sorted({entry.settings for entry in entries if entry.settings})
    return {name: (paths.study / name).read_text() for name in names}
