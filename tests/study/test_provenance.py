"""From the report back to the files: chains are whole, digests are those of the files, runs say what they were."""

import hashlib
import json

import pandas as pd
import pytest

from xlstm_scaling import cli, stages
from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.study.code import code_version, source_digest
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.provenance import RUNS, SOURCES, UnknownName, lines, provenance, sources_of


@pytest.fixture(scope="module")
def study(tiny_config, tiny_tokens):
    """The tiny study's xLSTM runs and tables, trained without a certificate."""
    from xlstm_scaling.study.config import to_dict
    from xlstm_scaling.study.files import write_table
    from xlstm_scaling.study.runs import curves_table, load_results, runs_table

    paths = StudyPaths.of(tiny_config, tiny_tokens)
    stages.plan(tiny_config, paths)
    specs = [run for run in plan_runs(tiny_config) if run.size == "tiny"]
    for spec in specs:
        stages.train(spec, to_dict(tiny_config.hardware), tiny_tokens, progress=False, uncertified=True)
    write_table(runs_table(specs, load_results(specs, paths.runs), "tiny", "text"), paths.study / "runs")
    write_table(curves_table(specs, paths.runs), paths.study / "curves")
    return paths, specs


def test_every_chain_ends_in_runs_or_what_was_planned():
    def ends(table):
        sources = sources_of(table)
        return {table} if not sources else set().union(*map(ends, sources))

    for table in SOURCES:
        assert ends(table) <= {RUNS, "plan/plan"}, table


def test_every_figures_tables_are_known():
    """But for those of studies side by side and of experiments, which have tables of their own."""
    for name, figure in FIGURES.items():
        for table in figure.tables:
            assert sources_of(table) or table == "plan/plan" or figure.category in ("Experiments", "Comparison"), name


def test_a_table_names_its_file_and_what_its_runs_were(study):
    paths, specs = study
    found = provenance("runs", paths)
    assert found["sha256"] == hashlib.sha256((paths.study / "runs.parquet").read_bytes()).hexdigest()
    assert found["runs"]["count"] == len(specs)
    assert found["runs"]["differing"] == found["runs"]["missing"] == []
    assert [source["name"] for source in found["from"]] == ["plan/plan"]
    assert provenance(str(paths.study / "runs.parquet"), paths) == found
    text = "\n".join(lines(found))
    assert "every loss is that of its result.json" in text
    assert code_version()["digest"] in text


def test_a_table_that_says_something_else_than_its_runs_is_noticed(study):
    paths, _ = study
    path = paths.study / "runs.parquet"
    table, before = pd.read_parquet(path), path.read_bytes()
    table.loc[0, "val_loss"] += 1e-9
    table.to_parquet(path)
    try:
        assert provenance("runs", paths)["runs"]["differing"] == [table.run_id[0]]
    finally:
        path.write_bytes(before)


def test_a_figure_leads_to_its_runs(study):
    paths, _ = study
    found = provenance("loss_vs_flops", paths)

    def tables(node):
        return {node["name"]}.union(*map(tables, node.get("from", [])))

    assert tables(found) >= {"loss_vs_flops", "runs", "plan/plan", *FIGURES["loss_vs_flops"].tables}
    assert found["missing"]  # nothing was drawn
    assert provenance("report", paths)["name"] == "report"


def test_a_run_says_what_made_it(study):
    paths, specs = study
    record = provenance(specs[0].run_id, paths)
    result = json.loads((paths.runs / specs[0].run_id / "result.json").read_text())
    assert record["result"]["val_loss"] == result["val_loss"]
    assert record["plan"]["agrees_with_name"]
    assert record["tokens"]["same"]
    assert record["studies"] == ["tiny"]
    assert record["certificate"] is None
    assert record["code"] == code_version()
    assert all(record[key] for key in ("host", "user", "device_name", "finished", "behaviour_version"))
    assert json.loads(json.dumps(record)) == record
    assert "the tokens it was trained on" in "\n".join(lines(record))


def test_nothing_of_that_name(study):
    paths, _ = study
    with pytest.raises(UnknownName, match="loss_vs_flops"):
        provenance("nonsense", paths)
    with pytest.raises(UnknownName, match="runs match"):
        provenance("d16b1", paths)


def test_the_command(study, tiny_overrides, capsys):
    paths, specs = study
    words = ["provenance", specs[0].run_id, *tiny_overrides, "--results", str(paths.results)]
    assert cli.run_command([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == specs[0].run_id
    assert cli.run_command(words) == 0
    assert "certificate of its kernels: none" in capsys.readouterr().out


def test_the_digest_of_the_sources_follows_them(tmp_path, monkeypatch):
    from xlstm_scaling.study import code

    code_folder = code.PACKAGE
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("1")
    first = source_digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = source_digest()
    (tmp_path / "notes.md").write_text("nothing")
    assert source_digest() == second != first
    suffixes = {path.suffix for path in code_folder.rglob("*.?pp")}
    assert suffixes == {".cpp", ".hpp"}
    for suffix in suffixes:
        before = source_digest()
        (tmp_path / f"c{suffix}").write_text("1")
        assert source_digest() != before, suffix
