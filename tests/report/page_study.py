"""A study's folder as the stages leave it, from synthetic tables: for the tests of the page."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from xlstm_scaling.figures.study import draw_all
from xlstm_scaling.figures.tables import Tables
from xlstm_scaling.fitting.tables import COLUMNS
from xlstm_scaling.report.findings import findings, write_findings
from xlstm_scaling.report.page.write import write_page
from xlstm_scaling.study.files import write_table
from xlstm_scaling.study.paths import StudyPaths

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "figures"))
from figure_tables import make_tables  # noqa: E402

CAPTIONS = REPOSITORY / "workflow" / "report"
CONFIG = {
    "study": {"name": "planted", "title": "A planted study"},
    "fitting": {"confidence": 0.95},
    "figures": {"formats": ["svg", "png"], "dpi": 50, "base_context": None},
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr", "line"}


def make_study(results: Path, name: str = "planted", figures=("loss_vs_flops", "isoflop_curves")) -> StudyPaths:
    """Tables, findings and figures of a synthetic study."""
    tables = make_tables() | {"fits/envelope": pd.DataFrame({"status": ["ok"]})}
    tables["runs"] = tables["runs"].assign(epochs=0.5)
    laws = tables["fits/power_laws"]  # differences of exponents rest on as many minima as the exponents
    tables["fits/power_laws"] = laws.assign(num_points=laws["num_points"].fillna(laws["num_points"].min()))
    paths = StudyPaths(results, name, "tokens")
    for table, frame in tables.items():
        (paths.study / table).parent.mkdir(parents=True, exist_ok=True)
        write_table(frame, paths.study / table)
    assert {f"fits/{table}" for table in COLUMNS} <= tables.keys()
    read = Tables(paths.study)
    found = findings({key: read[key] for key in tables})
    write_findings(found, paths.study / "findings", "Planted", 0.95)
    write_table(optima(), paths.study / "optimal")
    (paths.study / "plan").mkdir()
    (paths.study / "plan" / "plan.json").write_text("{}")
    (paths.fits / "config.yaml").write_text("fitting:\n  confidence: 0.95\n")
    if figures:
        draw_all(paths.study, paths.figures, CONFIG, figures, progress=False)
    return paths


def optima() -> pd.DataFrame:
    """Two sizes near the budgets, one far beyond."""
    sizes, beyond = [1e6, 1e7, 1e11], [2.0, 40.0, 1e9]
    rows = {"arch": "xlstm", "context_length": 512, "num_params": sizes, "num_flops": [3e12, 4e14, 2e22]}
    rows |= {"num_flops_lo": [2e12, 3e14, 1e22], "num_flops_hi": [5e12, 6e14, 9e22], "num_tokens": [2e6, 4e7, 1e12]}
    rows |= {"num_tokens_lo": [1e6, 3e7, 9e11], "num_tokens_hi": [3e6, 5e7, 2e12], "tokens_per_param": [2.0, 4.0, 10.0]}
    return pd.DataFrame(rows | {"beyond_budgets": beyond, "num_budgets": 3})


def make_ledger() -> pd.DataFrame:
    """One claim a verdict, and more of the first."""
    verdicts = ["reproduced"] * 6 + ["within interval", "not reproduced", "authors' error", "not answerable"]
    rows = []
    for number, verdict in enumerate(verdicts):
        value = float("nan") if verdict == "not answerable" else 0.5 + number / 100
        rows.append(
            {
                **{"id": f"claim-{number}", "topic": "isoflop" if number % 2 else "surface", "unit": "1"},
                **{"statement": f"number {number} of a planted paper", "relation": "equals", "published": 0.5},
                **{"value": value, "low": value - 0.01, "high": value + 0.01, "value_without_duplicates": float("nan")},
                **{"right_value": 0.7 if verdict == "authors' error" else float("nan"), "deviation": value - 0.5},
                **{"tolerance": 0.01, "tolerance_reason": "two digits", "verdict": verdict, "n_runs": 3},
                **{"why": "" if verdict == "reproduced" else f"because of {verdict}", "source": "table 1"},
                **{"independent": number != 2, "command": "xlstm-scaling claims"},
            }
        )
    return pd.DataFrame(rows)


def page_of(paths: StudyPaths, published: bool = False, inference: bool = True, config=CONFIG) -> "Page":
    """Write the page and read it."""
    return Page(write_page(paths, config, CAPTIONS, published, inference).read_text())


class Page(HTMLParser):
    """A page: ids, links, pictures, words, and whether every element that is opened is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.links, self.sources = text, [], [], []
        self.images, self.numbers, self.problems, self._open, self._words = [], [], [], [], []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.sources.append(found["src"])
        if tag == "img":
            self.images.append(found)
        if "data-value" in found:
            self.numbers.append(found)
        self.problems += [f"{key} on <{tag}>" for key in found if key.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-3:]}")
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self._words.append(data)

    @property
    def words(self) -> str:
        """The text, with single spaces."""
        return " ".join(" ".join(self._words).split())
