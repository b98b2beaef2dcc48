"""Sources together: duplicates, provenance, what is missing or skipped; the download; the command."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from xlstm_scaling.accounting import make_shape, training_flops
from xlstm_scaling.cli import run_command
from xlstm_scaling.fitting.envelope import fit_envelope
from xlstm_scaling.published.checks import check_accounting
from xlstm_scaling.published.errors import IngestError
from xlstm_scaling.published.ingest import ingest
from xlstm_scaling.published.logs import LogError
from xlstm_scaling.published.pickle_objects import PickleError
from xlstm_scaling.published.tables import TableMapping
from xlstm_scaling.published.upstream import DownloadError, Upstream, blob_id
from xlstm_scaling.study.config import ConfigError, conf_dir
from xlstm_scaling.study.runs import TableError, read_runs, validate_runs

XLSTM_8192 = "isoflop_mlstm_ctx8192_wandb_data.pkl"
XLSTM_16384 = "isoflop_mlstm_ctx16384_wandb_data.pkl"
MAPPING = TableMapping(
    columns={"num_params": "N", "num_tokens": "D", "val_loss": "loss"},
    constants={"arch": "transformer", "context_length": 2048},
)


@pytest.fixture
def write_csv(tmp_path):
    def write(text, name="theirs.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_log_becomes_a_validated_table(make_run, write_log):
    path = write_log(
        {"t": [make_run("a", "one"), make_run("b", "two", logged=False), make_run("c", "3", losses=(9.0,))]}
    )
    told = []
    result = ingest([path], tell=told.append)
    runs = validate_runs(result.runs).set_index("run_id")
    assert runs["status"].to_dict() == {"one": "ok", "two": "failed", "3": "diverged"}
    assert set(runs["source"]) == {"published"} and set(runs["dataset"]) == {"isoflop_mlstm_ctx16384"}
    assert pd.isna(runs.loc["two", "num_params"]) and runs["num_params"].dtype == "Int64"
    blob = blob_id(path.read_bytes())
    assert runs.loc["one", "provenance"] == f"{path.name} (blob {blob[:10]}, differs from b434f40163)"
    summary = result.summary()
    assert summary["status"] == {"ok": 1, "failed": 1, "diverged": 1}
    assert summary["sources"][0]["is_upstream"] is False
    assert len(result.missing) == 9 and path.name not in result.missing
    assert any("byte for byte" in line for line in told) and any("missing logs" in line for line in told)
    assert json.loads(json.dumps(summary)) == summary


def test_the_published_file_itself_is_recognised(make_run, write_log):
    path = write_log({"t": [make_run()]})
    content = yaml.safe_load(yaml.safe_dump(Upstream.load().content))
    content["logs"][path.name]["blob"] = blob_id(path.read_bytes())
    result = ingest([path], upstream=Upstream(content))
    assert result.sources[0].is_upstream is True
    assert result.runs["provenance"][0].endswith("as published)")


def test_a_run_under_two_tags_counts_once(make_run, write_log):
    """Same id, or all but id and tag the same; as often as it was there it weighs."""
    runs = [make_run("a", "one"), make_run("b", "two", losses=(5.0, 2.5))]
    renamed = make_run("b", "two-again", losses=(5.0, 2.5))
    rerun = make_run("b", "rerun", losses=(5.0, 2.75))
    result = ingest([write_log({"old": runs, "new": [runs[0], renamed, rerun]}, XLSTM_8192)])
    assert result.runs["run_id"].tolist() == ["one", "two", "rerun"]
    assert result.runs["notebook_multiplicity"].tolist() == [2, 2, 1]
    assert result.num_duplicates == result.sources[0].num_duplicates == 2
    assert set(result.curves["run_id"]) == {"one", "two", "rerun"}
    assert len(result.curves) == 6


def paper_table(**changes):
    shape = make_shape("xlstm", 64, 2, 2, 256)
    row = {
        "arch": "xlstm", "experiment_set": "isoflop", "context_length": 128, "isoflop_tag": "extra", "name": "a",
        "run_id": "", "run_tag": "t", "num_params": 100, "num_tokens": 4 * 128 * 100, "val_loss": 3.0004,
        "num_flops": training_flops(shape, 128, 4, 100), **{k: v for k, v in shape.as_dict().items() if k != "arch"},
        "global_batch_size_sequences": 4, "num_train_steps": 100, "learning_rate": 0.1, "in_paper_640": True,
        "dataset": "isoflop_mlstm_ctx16384", "provenance": "a figure", "val_loss_abs_err": 1e-3,
        "notebook_multiplicity": 2,
    }  # fmt: skip
    return pd.DataFrame([row | changes])


def test_a_run_of_a_log_and_of_a_table_is_one(make_run, write_log, tmp_path):
    log = write_log({"t": [make_run("a", "one", losses=(5.0, 3.0))]})
    num_params = ingest([log]).runs["num_params"][0]
    table = tmp_path / "runs.csv"
    paper_table(num_params=num_params).to_csv(table, index=False)
    result = ingest([table, log])
    row = result.runs.iloc[0]
    assert len(result.runs) == 1 and result.num_duplicates == 1 and not result.conflicts
    assert (row["run_id"], row["val_loss"], row["val_loss_abs_err"]) == ("one", 3.0, 0.0)
    assert (row["notebook_multiplicity"], row["in_paper_640"], row["learning_rate"]) == (2, True, 0.003)
    paper_table(num_params=num_params, val_loss=3.0011).to_csv(table, index=False)
    assert len(ingest([table, log]).runs) == 2
    paper_table(num_params=num_params, val_loss=3.0011, run_id="one").to_csv(table, index=False)
    disagreeing = ingest([table, log])
    assert len(disagreeing.runs) == 1 and "run one: val_loss 3.0 and 3.0011" in disagreeing.conflicts[0]


def test_n_and_flops_are_checked_against_the_shape(tmp_path):
    table = tmp_path / "runs.csv"
    paper_table(num_params=100, num_flops=1e12, run_id="odd").to_csv(table, index=False)
    result = ingest([table])
    assert [text.split(":")[0] for text in result.mismatches] == ["odd", "odd"]
    assert "N = 100, its shape has" in result.mismatches[0] and "FLOPs" in result.mismatches[1]
    assert check_accounting(result.runs) == result.mismatches


def test_a_table_without_shapes(write_csv):
    result = ingest([write_csv("N,D,loss\n100000000,2000000000,3.5\n1e8,2e9,3.25\n1e8,2e9,\n")], MAPPING)
    runs = validate_runs(result.runs)
    assert runs["num_flops"].tolist() == [6 * 1e8 * 2e9] * 3
    assert set(runs["flops_convention"]) == {"6nd"}
    assert runs["tokens_per_param"].tolist() == [20.0] * 3
    assert runs["run_id"].is_unique and runs["run_id"].str.startswith("transformer-c2048-100M-").all()
    assert runs["status"].tolist() == ["ok", "ok", "failed"]
    assert runs["selected"].tolist() == [True, True, False]
    assert runs["embedding_dim"].isna().all() and not result.missing
    again = ingest([write_csv("N,D,loss\n100000000,2000000000,3.5\n1e8,2e9,3.25\n1e8,2e9,\n")], MAPPING)
    assert again.runs["run_id"].tolist() == runs["run_id"].tolist()


def test_folders(make_run, write_log, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    log = write_log({"t": [make_run()]}, folder=folder / "logs")
    shutil.copy(log, folder / "mine.pkl")
    (folder / "README.md").write_text("x")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    (folder / "inference_results_df_dict.pkl").write_bytes(b"x")
    outside = tmp_path / "outside.csv"
    outside.write_text("x")
    (folder / "link.csv").symlink_to(outside)
    result = ingest([folder])
    assert [source.name for source in result.sources] == [log.name]
    assert set(result.skipped) == {"README.md", "mine.pkl", "other.csv", "inference_results_df_dict.pkl", "link.csv"}
    assert "inference measurements" in result.skipped["inference_results_df_dict.pkl"]
    assert "nothing gives" in result.skipped["other.csv"] and "none of the paper's logs" in result.skipped["mine.pkl"]
    named = ingest([folder / "mine.pkl"], experiment_set="other")
    assert named.runs["exclusion"].isna().all() and named.runs["selected"].all()
    with pytest.raises(IngestError, match="--experiment-set"):
        ingest([folder / "mine.pkl"])


def test_a_hostile_file_stops_the_ingest(write_log, tmp_path):
    """Also inside of a folder: it is no file to step over in silence."""
    path = tmp_path / "data" / XLSTM_16384
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")
    with pytest.raises(PickleError, match=rf"{XLSTM_16384}: posix\.system is refused"):
        ingest([path.parent])
    write_log({"t": 3}, folder=path.parent)
    with pytest.raises(LogError, match="list of runs"):
        ingest([path.parent])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (None, None, FileNotFoundError, "check the path"),
        ("runs.xlsx", "x", IngestError, "unknown kind; .pkl, .pickle, .csv, .parquet"),
        ("runs.csv", "N,D,loss\n", ValueError, "no rows"),
        (
            "runs.csv",
            "N,D,loss,run_id\n1,2,3,x\n5,6,7,x\n",
            IngestError,
            "run id x stands for two runs, of num_params 1 and 5",
        ),
        ("inference_results.pkl", "x", IngestError, "holds inference measurements"),
    ],
)
def test_bad_input(tmp_path, name, content, error, message):
    path = tmp_path / (name or "absent.pkl")
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        ingest([path], MAPPING)


def test_an_empty_folder(tmp_path):
    with pytest.raises(IngestError, match="the folders are empty"):
        ingest([tmp_path])


def test_trained_runs_are_held_to_the_whole_schema(make_run, write_log):
    runs = ingest([write_log({"t": [make_run("a", "one"), make_run("b", "two", losses=(4.0, 2.5))]})]).runs
    for column in ("embedding_dim", "num_tokens", "learning_rate"):
        lacking = runs.astype({"embedding_dim": "Int64", "num_tokens": "Int64"})
        lacking.loc[0, column] = pd.NA
        lacking.loc[0, "status"] = "failed"
        assert len(validate_runs(lacking)) == 2
        with pytest.raises(TableError, match=f"trained here but without {column}"):
            validate_runs(lacking.assign(source="trained"))
    lacking = runs.astype({"num_tokens": "Int64"})
    lacking.loc[0, "num_tokens"] = pd.NA
    with pytest.raises(TableError, match="with status ok but without num_tokens: one"):
        validate_runs(lacking)


# where the logs come from


def test_git_blob_ids():
    """`git hash-object` of the empty file, and of the example in the book Pro Git."""
    assert blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert blob_id(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_settings_of_the_paper():
    upstream = Upstream.load()
    assert len(upstream.logs) == 10
    url = upstream.url(XLSTM_8192)
    assert url.startswith("https://") and url.endswith(f"604bb3062d3a7681bb33e467108cb0a6f81267fc/data/{XLSTM_8192}")
    assert [name for name in upstream.logs if upstream.settings(name).merge_restarts] == [
        "tokenparam_llama_wandb_data.pkl",
        "tokenparam_mlstm_wandb_data.pkl",
    ]
    assert upstream.settings("mine.pkl") is None and upstream.settings("mine.pkl", "tokenparam").merge_restarts
    for template, message in (("ftp://{path}", "must begin"), ("https://{host}/", "host"), ("https://{", "template")):
        with pytest.raises(ConfigError, match=message):
            upstream.url(XLSTM_8192, template)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"logs": None}, "lacks logs"), ({"other": {"x.pkl": {"blob": "12"}}}, "blob of x.pkl is no git id")],
)
def test_bad_settings(tmp_path, change, message):
    content = Upstream.load().content | change
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(ConfigError, match=message):
        Upstream.load(path)
    with pytest.raises(ConfigError, match="no settings"):
        Upstream.load(tmp_path / "absent.yaml")


def test_download(make_run, write_log, tmp_path):
    """From a folder, by a URL of files: what is fetched is checked and kept, then found without fetching."""
    source = write_log({"t": [make_run()]}, folder=tmp_path / "mirror")
    template = f"file://{tmp_path}/mirror/{{name}}"
    folder = tmp_path / "cache"
    with pytest.raises(DownloadError, match="published is b434f40163"):
        Upstream.load().fetch(source.name, folder, template)
    assert not (folder / source.name).exists()
    content = yaml.safe_load(yaml.safe_dump(Upstream.load().content))
    content["logs"][source.name]["blob"] = blob_id(source.read_bytes())
    upstream = Upstream(content)
    path = upstream.fetch(source.name, folder, template)
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert upstream.fetch(source.name, folder, template) == path
    path.write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="fetch it by hand"):
        upstream.fetch(source.name, folder, template)
    with pytest.raises(ConfigError, match="none of the published files"):
        upstream.fetch("x.pkl", folder, template)


# the command


def test_command(make_run, write_log, tmp_path, capsys):
    runs = [
        make_run(f"r{n}", f"id{n}", steps=200, dim=64 * (1 + n % 2), losses=(4.0, 3.5, 3.25, 3.0 + n / 10))
        for n in range(4)
    ]
    log = write_log({"t": [*runs, make_run("lost", "lost", logged=False)]})
    out, curves = tmp_path / "out" / "runs.parquet", tmp_path / "out" / "curves.parquet"
    assert run_command(["ingest", str(log), "--out", str(out), "--curves", str(curves), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_runs"] == summary["num_written"] == 5 and summary["num_curve_points"] == 16
    assert summary == json.loads(out.with_suffix(".provenance.json").read_text())
    table = read_runs(out)
    assert table["run_id"].tolist() == ["id0", "id1", "id2", "id3", "lost"]
    pd.testing.assert_frame_equal(read_runs(out.with_suffix(".csv")), table, check_dtype=False)
    points = pd.read_parquet(curves).rename(columns={"train_loss": "loss"})
    config = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text())
    envelope = fit_envelope(points, config | {"num_resamples": 5}, table)
    assert set(envelope["variable"]) == {"num_params", "num_tokens", "loss"}


def test_command_writes_the_selected_runs(make_run, write_log, tmp_path, capsys):
    """Of a set with rules; by hand: one of the two is above 4.5 nat/token."""
    log = write_log(
        {"t": [make_run("a", "one", context=16384), make_run("b", "two", context=16384, losses=(6.0, 5.0))]}
    )
    out = tmp_path / "runs.parquet"
    curves = tmp_path / "curves.csv"
    assert run_command(["ingest", str(log), "--out", str(out), "--curves", str(curves), "--selected", "--quiet"]) == 0
    assert read_runs(out)["run_id"].tolist() == ["one"]
    assert set(pd.read_csv(curves)["run_id"]) == {"one"}
    printed = capsys.readouterr().out
    assert "2 runs (1 ok, 1 diverged), 1 selected" in printed and "excluded by: loss_below_4.5 1" in printed


def test_command_maps_tables(write_csv, tmp_path, capsys):
    path, out = write_csv("Model Size,Training Tokens,loss\n70,1400,3.5\n"), tmp_path / "runs.parquet"
    columns = ["--columns", "num_params=Model Size", "num_tokens=Training Tokens", "val_loss=loss"]
    rest = ["--units", "num_params=million", "num_tokens=million", "--set", "arch=transformer", "context_length=2048"]
    assert run_command(["ingest", str(path), "--out", str(out), *columns, *rest]) == 0
    row = read_runs(out).iloc[0]
    assert (row["num_params"], row["num_tokens"], row["num_flops"]) == (70_000_000, 1_400_000_000, 5.88e17)
    chinchilla = write_csv("Model Size,Training FLOP,loss\n5e8,3e19,3.0\n", "svg.csv")
    mapping = conf_dir() / "published" / "chinchilla.yaml"
    assert run_command(["ingest", str(chinchilla), "--mapping", str(mapping), "--out", str(out)]) == 0
    assert read_runs(out)[["num_tokens", "corpus"]].to_numpy().tolist() == [[10**10, "massivetext"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pkl", "--out", "x.parquet"], "no file or folder absent.pkl"),
        (["--out", "x.parquet"], "nothing to read"),
        (["absent.pkl", "--out", "x.json"], "ends in .parquet or .csv"),
        (["absent.csv", "--out", "x.parquet", "--columns", "N=x"], "N is no column of the table of runs"),
        (["absent.csv", "--out", "x.parquet", "--columns", "N"], "write NAME=VALUE"),
    ],
)
def test_command_says_what_to_do(arguments, message, capsys):
    assert run_command(["ingest", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        run_command(["ingest", "--help"])
    assert "xlstm-scaling ingest fits.csv --columns" in capsys.readouterr().out
