import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from xlstm_scaling import cli
from xlstm_scaling.corpus import CorpusError, TokenDataset, build, part_processes, parts, pieces
from xlstm_scaling.corpus.build import available_workers, build_part, build_tokens
from xlstm_scaling.corpus.parts import Part
from xlstm_scaling.corpus.pieces import list_pieces
from xlstm_scaling.corpus.settings import CorpusSettings

from .conftest import make_texts, write_txt


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(folder):
    """Parts on the disk with their inode: which files were not made again."""
    return {path.name: path.stat().st_ino for path in (folder / "parts").glob("*.part")}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A corpus with blanks, repeats within and across pieces, and its settings."""
    texts = make_texts(60)
    texts[5:5] = [" ", texts[4], "\n"]
    folder = write_txt(tmp_path_factory.mktemp("text"), [*texts, *texts[:9], texts[0]])
    return {"name": "many", "path": str(folder), "validation_fraction": 0.2, "shard_tokens": 1000}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, many, tokenizer_cfg):
    """The tokens made in one piece. Do not modify."""
    folder = tmp_path_factory.mktemp("reference")
    assert len(list_pieces(CorpusSettings.of(many))) == 1
    build_tokens(many, tokenizer_cfg, folder, progress=False, workers=1)
    return folder


def test_the_bytes_know_nothing_of_pieces_and_workers(tmp_path, many, tokenizer_cfg, reference, small_pieces):
    cut = list_pieces(CorpusSettings.of(many))
    assert len(cut) > 5
    assert all(piece.size <= 4000 for piece in cut)
    for workers in (1, 2, 3):
        build_tokens(many, tokenizer_cfg, tmp_path / str(workers), progress=False, workers=workers)
        assert contents(tmp_path / str(workers)) == contents(reference)


@pytest.mark.parametrize("limit", [1, 1500])
def test_a_limited_validation_split(tmp_path, many, tokenizer_cfg, small_pieces, monkeypatch, limit):
    cfg = {**many, "max_validation_tokens": limit}
    cut = build_tokens(cfg, tokenizer_cfg, tmp_path / "pieces", progress=False, workers=1)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 20)
    whole = build_tokens(cfg, tokenizer_cfg, tmp_path / "whole", progress=False, workers=1)
    assert cut == whole
    assert cut["splits"]["validation"]["num_tokens"] <= max(limit, 1500)


@pytest.mark.parametrize("trained", [True, False])
def test_scattered_jobs_then_the_merge(tmp_path, many, tokenizer_cfg, reference, small_pieces, monkeypatch, trained):
    tokenizer = tokenizer_cfg if trained else {"name": "bpe", "file": str(reference / "tokenizer.json")}
    counts = [build_part(many, tokenizer, tmp_path, f"{i}/3", progress=False, workers=1) for i in (3, 1)]
    before = kept(tmp_path)
    assert len(before) == sum(counts) < len(list_pieces(CorpusSettings.of(many)))
    assert not (tmp_path / "meta.json").exists()

    def finish(maker, piece, make=parts.PartMaker.make):
        assert piece.number % 3 == 1
        return make(maker, piece)

    monkeypatch.setattr(parts.PartMaker, "make", finish)
    monkeypatch.setattr(build, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    meta = build_tokens(many, tokenizer, tmp_path, progress=False, workers=1)
    expected = contents(reference)
    if trained:
        assert contents(tmp_path) == expected
    assert {**contents(tmp_path), "meta.json": None} == {**expected, "meta.json": None}
    assert meta["digest"] in expected["meta.json"].decode()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "header"])
def test_a_damaged_or_foreign_part_is_made_again(tmp_path, many, tokenizer_cfg, reference, small_pieces, damage):
    build_part(many, tokenizer_cfg, tmp_path, "1/1", progress=False, workers=1)
    before = kept(tmp_path)
    victim, other = sorted((tmp_path / "parts").glob("*.part"))[1:3]
    content = bytearray(victim.read_bytes())
    if damage == "foreign":
        content = other.read_bytes()
    elif damage == "header":
        content[-40:-32] = b"\xff" * 8
    elif damage == "flip":
        content[100] ^= 1
    else:
        content = content[: len(content) // 2] if damage == "cut" else b""
    victim.write_bytes(content)
    build_part(many, tokenizer_cfg, tmp_path, "1/1", progress=False, workers=1)
    after = kept(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {victim.name}
    build_tokens(many, tokenizer_cfg, tmp_path, progress=False, workers=1)
    assert contents(tmp_path) == contents(reference)


def test_a_damaged_tokenizer_is_trained_again(tmp_path, many, tokenizer_cfg, reference):
    build_part(many, tokenizer_cfg, tmp_path, "1/2", progress=False, workers=1)
    (file,) = (tmp_path / "parts").glob("tokenizer-*.json")
    file.write_text(file.read_text().replace("\\u0120", "\\u0121", 1))
    build_tokens(many, tokenizer_cfg, tmp_path, progress=False, workers=1)
    assert contents(tmp_path) == contents(reference)


def test_other_text_and_other_settings_need_other_parts(tmp_path, many, tokenizer_cfg, small_pieces):
    text = shutil.copytree(many["path"], tmp_path / "text")
    cfg = {**many, "path": str(text)}
    tokenizer = {"file": str(tmp_path / "tokenizer.json")}
    build_tokens(cfg, tokenizer_cfg, tmp_path / "first", progress=False, workers=1)
    shutil.copy(tmp_path / "first" / "tokenizer.json", tmp_path)
    build_part(cfg, tokenizer, tmp_path / "a", "1/1", progress=False, workers=1)
    before = kept(tmp_path / "a")
    (text / "0001.txt").write_text("something else")
    build_part(cfg, tokenizer, tmp_path / "a", "1/1", progress=False, workers=1)
    assert len(kept(tmp_path / "a").keys() - before.keys()) == 1  # of one piece
    for changed in ({"split_seed": 7}, {"document_separator": "Document"}):
        before = kept(tmp_path / "a")
        build_part({**cfg, **changed}, tokenizer, tmp_path / "a", "1/1", progress=False, workers=1)
        assert len(kept(tmp_path / "a").keys() - before.keys()) == len(list_pieces(CorpusSettings.of(cfg)))
    build_tokens(cfg, tokenizer, tmp_path / "a", progress=False, workers=1)
    build_tokens(cfg, tokenizer, tmp_path / "b", progress=False, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


KILLED = """
import sys, time
from xlstm_scaling.corpus import parts, pieces
from xlstm_scaling.corpus.build import build_tokens
pieces.PIECE_BYTES = 4000
make = parts.PartMaker.make
def slow(maker, piece):
    part = make(maker, piece)
    time.sleep(0.2)
    return part
parts.PartMaker.make = slow
build_tokens({corpus!r}, {tokenizer!r}, sys.argv[1], progress=False, workers=1)
"""


def test_a_killed_job_goes_on_where_it_was(tmp_path, many, tokenizer_cfg, reference, small_pieces):
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(corpus=many, tokenizer=tokenizer_cfg), str(tmp_path / "tokens")]
    )
    deadline = time.monotonic() + 60
    while len(kept(tmp_path / "tokens")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = kept(tmp_path / "tokens")
    assert 2 <= len(before) < len(list_pieces(CorpusSettings.of(many)))
    (tmp_path / "tokens" / "parts" / "00009.host-1.tmp").write_bytes(b"half")
    build_part(many, tokenizer_cfg, tmp_path / "tokens", "1/1", progress=False, workers=1)
    assert before.items() <= kept(tmp_path / "tokens").items()
    build_tokens(many, tokenizer_cfg, tmp_path / "tokens", progress=False, workers=1)
    assert contents(tmp_path / "tokens") == contents(reference)


def test_text_that_changes_while_a_part_is_made(tmp_path, many, small_pieces, reference, monkeypatch):
    text = shutil.copytree(many["path"], tmp_path / "text")
    read = parts.read_documents

    def change_then_read(corpus, root, files):
        yield from read(corpus, root, files)
        if any(path.name == "0030.txt" for path in files):
            (text / "0030.txt").touch()

    monkeypatch.setattr(parts, "read_documents", change_then_read)
    cfg, tokenizer = {**many, "path": str(text)}, {"file": str(reference / "tokenizer.json")}
    with pytest.raises(CorpusError, match=r"0030\.txt changed while it was read"):
        build_tokens(cfg, tokenizer, tmp_path / "tokens", progress=False, workers=1)
    assert 0 < len(kept(tmp_path / "tokens")) < len(list_pieces(CorpusSettings.of(cfg)))


def test_a_worker_that_is_killed_or_fails_is_explained(tmp_path, many, tokenizer_cfg, small_pieces, monkeypatch):
    start = part_processes._Worker.__init__

    def started_dead(worker, *args):
        start(worker, *args)
        os.kill(worker._process.pid, signal.SIGKILL)

    monkeypatch.setattr(part_processes._Worker, "__init__", started_dead)
    with pytest.raises(CorpusError, match=r"was killed.*fewer --workers"):
        build_tokens(many, tokenizer_cfg, tmp_path / "tokens", progress=False, workers=2)
    monkeypatch.undo()

    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    text = shutil.copytree(many["path"], tmp_path / "text")
    (text / "0003.txt").write_bytes(b"\xff")
    shutil.copytree(tmp_path / "tokens", tmp_path / "other")
    cfg, tokenizer = {**many, "path": str(text)}, {"file": str(tmp_path / "tokenizer.json")}
    build_tokens(many, tokenizer_cfg, tmp_path / "tokens", progress=False, workers=1)
    shutil.copy(tmp_path / "tokens" / "tokenizer.json", tmp_path)
    with pytest.raises(CorpusError, match=r"0003\.txt is not valid UTF-8"):
        build_tokens(cfg, tokenizer, tmp_path / "other", progress=False, workers=2)


def test_selected_runs_of_documents(tmp_path, many, tokenizer_cfg):
    build_part(many, tokenizer_cfg, tmp_path, "1/1", progress=False, workers=1)
    (path,) = (tmp_path / "parts").glob("*.part")
    header = path.read_bytes()
    part = Part.open(path, header[header.rindex(b'"key": "') + 8 :][:64].decode(), verify=True)
    lengths = part.lengths.astype(int)
    documents = np.split(part.tokens, np.cumsum(lengths)[:-1])
    rng = np.random.default_rng(0)
    for chosen in (rng.random(lengths.size) < p for p in (0.0, 0.3, 1.0)):
        chosen &= lengths > 0
        runs = list(part.select(chosen))
        expected = [documents[i] for i in np.flatnonzero(chosen)]
        assert [n for _, counts in runs for n in counts] == [document.size for document in expected]
        np.testing.assert_array_equal(
            np.concatenate([[], *(tokens for tokens, _ in runs)]), np.concatenate([[], *expected])
        )


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_bad_shares_are_explained(tmp_path, many, tokenizer_cfg, part):
    with pytest.raises(CorpusError, match="A part is I/N with I from 1 to N, such as 3/8"):
        build_part(many, tokenizer_cfg, tmp_path, part, progress=False)


def test_workers(tmp_path, many, tokenizer_cfg, monkeypatch):
    with pytest.raises(CorpusError, match="number of workers must be a positive integer, not 0"):
        build_tokens(many, tokenizer_cfg, tmp_path, progress=False, workers=0)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cpus = available_workers()
    assert cpus >= 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert available_workers() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cpus + 5))
    assert available_workers() == cpus


def test_the_command_line(tmp_path, many, small_pieces, reference):
    overrides = ["study=smoke", "corpus=folder", f"corpus.path={many['path']}", "corpus.validation_fraction=0.2"]
    overrides += ["tokenizer.vocab_size=300", "--results", str(tmp_path), "--quiet", "--workers", "1"]
    assert cli.run_command(["tokens", *overrides, "--part", "2/2"]) == 0
    (folder,) = (tmp_path / "tokens").iterdir()
    assert kept(folder)
    assert not (folder / "meta.json").exists()
    assert cli.run_command(["tokens", *overrides, "--part", "3/2"]) == 1
    assert cli.run_command(["tokens", *overrides]) == 0
    assert TokenDataset.open(folder).digest == TokenDataset.open(reference).digest
    assert not (folder / "parts").exists()


def test_a_full_disk_is_explained_and_keeps_the_parts(tmp_path, many, tokenizer_cfg, small_pieces, monkeypatch):
    calls = iter(range(100))

    def replace(path, target, rename=os.replace):
        if path.name.endswith(".tmp") and str(target).endswith(".part") and next(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(path, target)

    monkeypatch.setattr(parts.Path, "replace", replace)
    with pytest.raises(CorpusError, match=rf"disk is full: .* parts of the tokens in {tmp_path}"):
        build_tokens(many, tokenizer_cfg, tmp_path, progress=False, workers=1)
    assert len(kept(tmp_path)) == 2
    assert not list((tmp_path / "parts").glob("*.tmp"))
