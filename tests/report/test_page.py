"""The report page: one file without a network, whole and well-formed, that says what the tables say."""

import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page_study import CAPTIONS, CONFIG, Page, make_ledger, make_study, page_of

from xlstm_scaling.figures.tables import FigureError
from xlstm_scaling.report.comparison import compare_studies, write_comparison
from xlstm_scaling.report.page.answer import cards
from xlstm_scaling.report.page.captions import caption, to_html
from xlstm_scaling.report.page.pictures import embedded
from xlstm_scaling.report.page.write import SECTIONS, write_page
from xlstm_scaling.study.files import write_table
from xlstm_scaling.study.paths import StudyPaths

#: the only places of the network that a reader is pointed to
CITED = {"arxiv.org"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("page") / "results")


@pytest.fixture(scope="module")
def page(study):
    return page_of(study)


def test_it_is_well_formed_and_has_every_section(page):
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    assert [name for name in page.ids if name in dict(SECTIONS)] == [name for name, _ in SECTIONS if name != "claims"]
    assert page.tags.count("h1") == 1 and {"main", "nav", "header", "footer"} <= set(page.tags)


def test_nothing_comes_from_a_network(page):
    assert all(source.startswith("data:image/") for source in page.sources)
    outside = {urlsplit(link).netloc for link in page.links if urlsplit(link).scheme}
    assert outside == CITED
    styles = "".join(re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL))
    assert "url(" not in styles and "@import" not in styles
    assert "<link" not in page.text and "<script src" not in page.text


def test_every_anchor_leads_somewhere_and_every_file_is_there(study, page):
    missing = [link for link in page.links if link.startswith("#") and link[1:] not in page.ids]
    assert missing == []
    files = {link for link in page.links if not link.startswith("#") and not urlsplit(link).scheme}
    beside = {"workflow-report.html"}  # made by another rule
    assert [name for name in files - beside if not (study.study / name).is_file()] == []


def test_every_picture_says_what_it_shows(page):
    assert len(page.images) == 2
    for image in page.images:
        assert len(image["alt"]) > 80 and "Shown:" in image["alt"]
        assert int(image["width"]) > 100 < int(image["height"])
    assert re.search(r"Shown: \d+ IsoFLOP runs; N = .* parameters; D = .*; H = 3e11 to 3e12 FLOPs; context 512 tokens",
                     page.words)  # fmt: skip


def test_every_finding_is_on_the_page(study, page):
    for statement in pd.read_parquet(study.study / "findings.parquet").statement:
        assert " ".join(statement.split()) in page.words


def test_numbers_of_the_answer_are_those_of_the_file_they_lead_to(study, page):
    assert len(page.numbers) > 10
    for link in page.numbers:
        name = next(name for name in ("fits/pareto_ratio", "fits/power_laws", "fits/overtraining",
                                      "inference/measurements") if link["title"] == f"from {name}")  # fmt: skip
        assert link["href"] in {f"#{name}" for name in page.ids}
        table = pd.read_csv(study.study / f"{name}.csv")
        if name == "inference/measurements":
            continue  # a ratio of two of its numbers: below
        values = table.select_dtypes("number").to_numpy()
        wanted = [float(link[key]) for key in ("data-value", "data-lo", "data-hi") if key in link]
        assert (np.isclose(values[:, :, None], wanted, rtol=1e-9).any(axis=1).all(axis=1)).any(), link


def test_the_growth_of_the_step_time_is_that_of_the_measurements(study, page):
    table = pd.read_csv(study.inference / "measurements.csv")
    table = table[(table.status == "ok") & (table.batch_size == table.batch_size.min())]
    wanted = set()
    for _, rows in table.groupby("arch"):
        rows = rows[rows.num_params == rows.num_params.max()].set_index("prefill_length").step_time_s.sort_index()
        wanted.add(round(rows.iloc[-1] / rows.iloc[0], 9))
    said = {round(float(link["data-value"]), 9) for link in page.numbers if "inference" in link["title"]}
    assert said == wanted


def test_tables_show_their_first_rows(study, page):
    block = page.text.partition('id="table-fits-power_laws"')[2].partition("</details>")[0]
    columns = re.findall(r'<th scope="col">(.*?)</th>', block)
    table = pd.read_csv(study.fits / "power_laws.csv")
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", block)[1:]]
    assert 0 < len(rows) <= len(table)
    for shown, row in zip(rows, table.to_dict("records")):
        told = dict(zip(columns, shown))
        assert told["arch"] == row["arch"]
        if np.isnan(row["exponent"]):
            assert told["exponent"] == ""
        else:
            assert float(told["exponent"].replace(",", "")) == pytest.approx(row["exponent"], rel=1e-3)


def test_diverged_runs_are_named_and_a_failed_one_shows_its_log(tmp_path):
    paths = make_study(tmp_path, figures=())
    runs = pd.read_parquet(paths.study / "runs.parquet")
    planned = pd.DataFrame({"run_id": [*runs.run_id, "xlstm-lost", "xlstm-waits"]})
    write_table(planned, paths.plan / "plan")
    (paths.runs / "xlstm-lost").mkdir(parents=True)
    (paths.runs / "xlstm-lost" / "failure.json").write_text('{"error": "the disk <b>burnt</b>"}')
    log = paths.results / "logs" / "runs" / "xlstm-lost.log"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(f"line {number}" for number in range(40)) + "\nlast words <script>alert(1)</script>\n")
    (paths.fits / "surface.parquet").unlink()
    page = page_of(paths)
    assert page.problems == []
    for run_id in runs.run_id[runs.status != "ok"]:
        assert f"{run_id} : diverged" in page.words
    assert "xlstm-lost : failed the disk <b>burnt</b>" in page.words
    assert "line 39 last words <script>alert(1)</script>" in page.words and "line 20 " not in page.words
    assert "xlstm-waits : not begun" in page.words
    assert "This study is not complete" in page.words
    assert "Stage fit has not finished" in page.words and "fits/surface.parquet" in page.words


def test_a_study_that_has_only_a_plan_says_so(tmp_path):
    paths = StudyPaths(tmp_path, "planned", "tokens")
    with pytest.raises(FileNotFoundError, match="at least its stage `plan`"):
        page_of(paths)
    paths.plan.mkdir(parents=True)
    (paths.plan / "plan.json").write_text("{}")
    page = page_of(paths)
    assert page.problems == []
    assert "There are no laws yet" in page.words and "Stage runs has not finished" in page.words


def test_names_of_others_cannot_write_markup(tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    paths = make_study(tmp_path, name="planted", figures=())
    runs = pd.read_parquet(paths.study / "runs.parquet")
    runs.loc[runs.status != "ok", "run_id"] = [f"{evil}{number}" for number in range((runs.status != "ok").sum())]
    runs["corpus"] = evil
    write_table(runs, paths.study / "runs")
    findings = pd.read_parquet(paths.study / "findings.parquet")
    findings.loc[0, "statement"] = evil
    write_table(findings, paths.study / "findings")
    config = CONFIG | {"study": {"name": evil, "title": f"</title><script>alert(2)</script>{evil}"}}
    page = page_of(paths, config=config)
    assert page.problems == []
    assert page.images == []
    assert page.text.count("<script>") == 1
    assert evil in page.words


def test_the_same_files_give_the_same_bytes_anywhere(study, page, tmp_path):
    moved = StudyPaths(tmp_path / "elsewhere", "planted", "other")
    shutil.copytree(study.study, moved.study)
    assert page_of(moved).text == page.text == page_of(study).text


def test_the_explorer_is_linked_where_it_is(tmp_path):
    paths = make_study(tmp_path, figures=())
    assert "explorer.html" not in page_of(paths).links
    (paths.study / "explorer.html").write_text("<!doctype html>")
    assert "explorer.html" in page_of(paths).links


def test_claims_are_counted_told_and_explained(tmp_path):
    paths = make_study(tmp_path, name="planted-published", figures=())
    (paths.study / "runs.provenance.json").write_text('{"sources": [{"name": "log.pkl", "blob": "abc"}]}')
    unclaimed = page_of(paths, published=True)
    assert "come with no list of claims" in unclaimed.words
    ledger = make_ledger()
    write_table(ledger, paths.claims / "claims")
    page = page_of(paths, published=True)
    assert page.problems == []
    for verdict, count in ledger.verdict.value_counts().items():
        assert f"{count} {verdict}" in page.words
    for row in ledger.itertuples():
        assert f"claim-{row.id}" in page.ids
    for verdict in ("not reproduced", "not answerable", "authors' error"):
        assert page.words.count(f"because of {verdict}") == 2  # the reason, and the row
    assert "(right: 0.7)" in page.words
    assert "git blob abc" in page.words
    assert "1 claims rest in part on losses that were read off figures" in page.words


def test_two_studies_stand_side_by_side(study, tmp_path):
    paths = StudyPaths(tmp_path, "planted", "tokens")
    shutil.copytree(study.study, paths.study)
    other = tmp_path / "other"
    shutil.copytree(study.study, other)
    laws = pd.read_parquet(other / "fits" / "power_laws.parquet")
    shifted = (laws.arch == "xlstm") & (laws.variable == "num_params") & (laws.predictor == "flops")
    laws.loc[shifted, ["exponent", "exponent_lo", "exponent_hi"]] += 5.0
    write_table(laws, other / "fits" / "power_laws")
    table = compare_studies([other, paths.study])
    write_comparison(table, paths.study / "comparison", ("png",), 40)
    page = page_of(paths)
    assert page.problems == []
    judged = table[table.verdict.isin(["agree", "differ"])]
    agree = int((judged.verdict == "agree").sum())
    assert f"{agree} of {len(judged)} exponents and ratios that have intervals in both agree with other" in page.words
    assert "exponent of N* in H (xLSTM)" in page.words.partition("these differ:")[2].partition(".")[0]
    assert "Made from older fits" not in page.words
    mine = pd.read_parquet(paths.fits / "power_laws.parquet")
    write_table(mine.assign(exponent=mine.exponent + 0.1), paths.fits / "power_laws")
    assert "Made from older fits" in page_of(paths).words


@pytest.mark.parametrize(
    ("ends", "verdict", "tone"),
    [
        ((1.2, 1.9), "xLSTM buys the same loss for fewer FLOPs", "ahead"),
        ((0.5, 0.8), "Transformer buys the same loss for fewer FLOPs", "ahead"),
        ((0.8, 1.2), "No difference is shown", "even"),
    ],
)
def test_a_verdict_is_given_only_where_the_interval_tells(ends, verdict, tone):
    row = {"arch": "xlstm", "other": "transformer", "context_length": 512, "val_loss": 3.0}
    row |= {"flop_ratio": sum(ends) / 2, "flop_ratio_lo": ends[0], "flop_ratio_hi": ends[1]}
    card = cards({"fits/pareto_ratio": pd.DataFrame([row])}, 0.95)[0]
    assert (card.verdict, card.tone) == (verdict, tone)
    assert card.axis[0] < min(ends) < max(ends) < card.axis[1]


@pytest.mark.parametrize(
    ("variable", "difference", "verdict"),
    [
        ("num_params", (0.1, 0.05, 0.2), "xLSTM's grows faster than Transformer's"),
        ("num_params", (-0.1, -0.2, -0.05), "Transformer's grows faster than xLSTM's"),
        ("loss", (-0.01, -0.02, -0.005), "xLSTM's falls faster than Transformer's"),
        ("num_params", (0.1, -0.05, 0.2), "This study does not tell the architectures apart"),
    ],
)
def test_whose_law_is_steeper(variable, difference, verdict):
    shared = {"context_length": 512.0, "isoflop_tag": np.nan, "variable": variable, "predictor": "flops"}
    shared |= {"status": "ok", "num_points": 4}
    values = {"xlstm": (0.5, 0.4, 0.6), "transformer": (0.5, 0.4, 0.6), "xlstm - transformer": difference}
    names = ("exponent", "exponent_lo", "exponent_hi")
    laws = pd.DataFrame([{"arch": arch, **shared, **dict(zip(names, ends))} for arch, ends in values.items()])
    assert cards({"fits/power_laws": laws}, 0.95)[0].verdict == verdict


def test_pictures_lose_nothing(study):
    import base64
    import io

    from PIL import Image

    uri, width, height = embedded(study.figures / "loss_vs_flops")
    packed = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    original = Image.open(study.figures / "loss_vs_flops.png").convert("RGB")
    assert packed.format == "WEBP" and (width, height) == original.size
    assert np.array_equal(np.asarray(packed.convert("RGB")), np.asarray(original))


def test_every_caption_reads_as_a_sentence():
    for path in sorted(CAPTIONS.glob("*.rst")):
        if path.stem == "workflow":
            continue
        told = caption(path, {"study": "x", "fitting": {"confidence": 0.9}})
        page = Page(f"<div>{told.first}{told.more}</div>")
        assert page.problems == [] and "snakemake." not in page.words and "{{" not in page.words
        assert page.words[0].isupper() or page.words[0] in "“L(", path
    assert "<script" not in to_html("<script>x</script> ``a`` *b*")


def test_a_table_of_another_version_is_no_traceback(study, tmp_path):
    stem = shutil.copytree(study.study, tmp_path / study.name) / "fits" / "pareto_ratio"
    write_table(pd.read_parquet(stem.with_suffix(".parquet")).drop(columns=["arch", "other"]), stem)
    with pytest.raises(FigureError, match=r"not as this version writes it \(.*arch.*run the workflow again"):
        write_page(StudyPaths(tmp_path, study.name, "tokens"), CONFIG, CAPTIONS, published=False, inference=True)


def test_the_published_study(paper, tmp_path):
    """A part of the real ledger: what the page says is what the claims say."""
    import yaml

    from xlstm_scaling.published.claims.answers import FUNCTIONS
    from xlstm_scaling.published.claims.evidence import Evidence
    from xlstm_scaling.published.claims.ledger import build_ledger, load_claims
    from xlstm_scaling.published.ingest import ingest
    from xlstm_scaling.study.config import conf_dir

    runs = ingest([paper / "runs.csv"]).runs
    runs = runs[runs["selected"]]
    fitting = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text()) | {"num_resamples": 20}
    claims = [claim for claim in load_claims(conf_dir() / "claims", FUNCTIONS)[0] if claim.topic == "dataset"]
    ledger = build_ledger(claims, Evidence(runs, fitting), FUNCTIONS)
    paths = StudyPaths(tmp_path, "paper-published", "tokens")
    paths.claims.mkdir(parents=True)
    write_table(runs, paths.study / "runs")
    write_table(ledger, paths.claims / "claims")
    (paths.study / "runs.provenance.json").write_text('{"sources": []}')
    page = page_of(paths, published=True, inference=False)
    assert page.problems == []
    assert f"published runs {len(runs)}" in page.words and "not complete" in page.words
    for verdict, count in ledger.verdict.value_counts().items():
        assert f"{count} {verdict}" in page.words
    for row in ledger.itertuples():
        assert " ".join(row.statement.split()) in page.words
