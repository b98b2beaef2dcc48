import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.corpus import CorpusError, TokenDataset, shard_writer
from xlstm_scaling.corpus.shard_writer import TokensWriter
from xlstm_scaling.corpus.shards import token_dtype

META = {"eod_id": 0, "tokenizer": {"sha256": hashlib.sha256(b"{}").hexdigest()}}


def write(folder, documents, shard_tokens, vocab_size=1000):
    """A tokens folder of given documents (lists of ids) in the train split."""
    with TokensWriter(folder, vocab_size, shard_tokens) as writer:
        for tokens in documents:
            writer.append("train", np.array(tokens), num_bytes=3 * len(tokens))
        return writer.commit(b"{}", META)


@given(st.lists(st.lists(st.integers(1, 999), max_size=9), min_size=1, max_size=20), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_and_document_starts_across_shard_borders(tmp_path_factory, documents, shard_tokens, data):
    documents = [[*document, 0] for document in documents]
    folder = tmp_path_factory.mktemp("tokens")
    write(folder, documents, shard_tokens)
    split = TokenDataset.open(folder, verify="digest").split("train")
    flat = np.concatenate(documents)
    begins = np.array([i == 0 for document in documents for i in range(len(document))])
    assert (split.num_tokens, split.num_bytes) == (flat.size, 3 * flat.size)
    assert split.num_documents == len(documents)

    length = data.draw(st.integers(1, flat.size))
    starts = np.array(data.draw(st.lists(st.integers(0, flat.size - length), max_size=5)), dtype=np.int64)
    windows = [slice(start, start + length) for start in starts]
    tokens, marks = split.gather(starts, length), split.document_starts(starts, length)
    assert (tokens.dtype, marks.dtype) == (np.int64, bool)
    np.testing.assert_array_equal(tokens, np.array([flat[w] for w in windows]).reshape(-1, length))
    np.testing.assert_array_equal(marks, np.array([begins[w] for w in windows]).reshape(-1, length))


def test_the_dtype_holds_the_vocabulary(tmp_path):
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("uint16", "uint32")
    for vocab_size in (2**16, 100_000):
        write(tmp_path, [[vocab_size - 1, 5, 0]], 2, vocab_size)
        dataset = TokenDataset.open(tmp_path, verify="digest")
        assert dataset.split("train").gather(np.array([0]), 3).tolist() == [[vocab_size - 1, 5, 0]]
        assert dataset.meta["dtype"] == token_dtype(vocab_size)


def test_a_window_outside_the_split(tokens_folder):
    split = TokenDataset.open(tokens_folder).split("train")
    for start in (-1, split.num_tokens - 3):
        with pytest.raises(IndexError, match="leaves the split 'train'"):
            split.gather(np.array([start]), 4)
    with pytest.raises(KeyError, match="no split 'test'"):
        TokenDataset.open(tokens_folder).split("test")


def test_the_digest_knows_the_tokens_and_not_the_shards(tmp_path):
    documents = [[1, 2, 0], [3, 0]]
    digest = write(tmp_path / "a", documents, 2)["digest"]
    assert write(tmp_path / "b", documents, 100)["digest"] == digest
    assert write(tmp_path / "b", [[1, 2, 0], [4, 0]], 2)["digest"] != digest
    assert write(tmp_path / "b", [[1, 2, 0, 3, 0]], 2)["digest"] != digest  # same stream, another document border
    assert write(tmp_path / "b", documents, 2, vocab_size=1001)["digest"] != digest


def test_rewriting_removes_the_shards_of_before(tmp_path):
    write(tmp_path, [[1, 2, 3, 0]], 1)
    (tmp_path / "train-00007.bin.tmp").write_bytes(b"left by a killed process")
    write(tmp_path, [[1, 2, 3, 0]], 3)
    expected = ["meta.json", "tokenizer.json", "train-00000.bin", "train-00001.bin", "train.documents.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


@pytest.mark.parametrize("name", ["train-00001.bin", "validation-00000.bin", "train.documents.bin", "tokenizer.json"])
def test_damage_is_detected(tokens_folder, tmp_path, name):
    folder = shutil.copytree(tokens_folder, tmp_path / "tokens")
    content = (folder / name).read_bytes()

    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorpusError, match=rf"{name} was altered.*Rerun the tokens stage"):
        TokenDataset.open(folder, verify="size")  # it is newer than meta.json
    written = (folder / "meta.json").stat().st_mtime_ns
    os.utime(folder / name, ns=(written, written))
    TokenDataset.open(folder, verify="size")
    with pytest.raises(CorpusError, match=rf"{name} was altered.*Rerun the tokens stage"):
        TokenDataset.open(folder, verify="digest")
    (folder / name).write_bytes(content[:-1])
    verify = "digest" if name == "tokenizer.json" else "size"  # tokenizer.json has no size in meta.json
    with pytest.raises(CorpusError, match=rf"{name} .*altered.*Rerun the tokens stage"):
        TokenDataset.open(folder, verify=verify)
    (folder / name).unlink()
    with pytest.raises(CorpusError, match=rf"{name} is missing.*Rerun the tokens stage"):
        TokenDataset.open(folder)


def test_a_touched_file_is_read_and_found_intact(tokens_folder, tmp_path):
    folder = shutil.copytree(tokens_folder, tmp_path / "tokens")
    (folder / "train-00000.bin").touch()
    TokenDataset.open(folder, verify="size")


def replaced(path):
    """The same bytes in another file, as a rerun writes them."""
    copy = shutil.copy2(path, path.with_name("copy"))
    copy.replace(path)


@pytest.mark.parametrize("name", ["train-00001.bin", "validation.documents.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize(("change", "word"), [(Path.touch, "changed"), (replaced, "changed"), (Path.unlink, "removed")])
def test_files_that_change_while_they_are_in_use(tokens_folder, tmp_path, name, change, word):
    folder = shutil.copytree(tokens_folder, tmp_path / "tokens")
    dataset = TokenDataset.open(folder)
    dataset.check_unchanged()
    change(folder / name)
    with pytest.raises(CorpusError, match=rf"{name} was {word} while it was in use.*Rerun the tokens stage"):
        dataset.check_unchanged()


def test_damaged_meta_is_detected(tokens_folder, tmp_path):
    with pytest.raises(CorpusError, match=r"no complete tokens .*no meta\.json.*Rerun"):
        TokenDataset.open(tmp_path)
    with pytest.raises(ValueError, match="verify must be"):
        TokenDataset.open(tokens_folder, verify="no")
    folder = shutil.copytree(tokens_folder, tmp_path / "tokens")
    meta = json.loads((folder / "meta.json").read_text())
    for change, message in [
        ({"vocab_size": 301}, "was altered: its digest"),
        ({"format_version": 99}, "format 99, this code reads 1"),
        ({"splits": None}, "is damaged"),
    ]:
        (folder / "meta.json").write_text(json.dumps({**meta, **change}))
        with pytest.raises(CorpusError, match=message):
            TokenDataset.open(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(CorpusError, match=r"meta\.json is damaged"):
        TokenDataset.open(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_full_disk_at_fsync_leaves_the_old_tokens(tmp_path, monkeypatch, call):
    write(tmp_path, [[1, 2, 3, 0]], 2)
    before = contents(tmp_path)
    calls = iter(range(1, 100))

    def fsync(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_writer.os, "fsync", fsync)
    with pytest.raises(CorpusError, match=rf"disk is full: .* at least [1-9][\d,]* bytes in {tmp_path}"):
        write(tmp_path, [[4, 5, 6, 7, 8, 0]], 2)
    assert contents(tmp_path) == before


def test_a_disk_that_is_really_full(tmp_path):
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs here: {done.stderr.decode().strip()}")
    try:
        with pytest.raises(CorpusError, match=rf"disk is full: .* bytes in {tmp_path}"):
            write(tmp_path, [[1] * 1000 for _ in range(100)], 10_000)
        assert contents(tmp_path) == {}
        with pytest.raises(CorpusError, match=r"need about 1,000,000 bytes in .* only 65,536 are free"):
            shard_writer.check_space(tmp_path, 1_000_000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_errors_of_the_disk_are_not_hidden(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shard_writer.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, [[1, 0]], 2)
    assert contents(tmp_path) == {}
