"""How fast text becomes tokens: python benchmarks/tokens.py [FOLDER ...] [--megabytes 250]

Text: distinct .py, .pyi, .md, .rst and .txt files below the folders (default: Python's standard library and the
installed packages), as .jsonl shards. For each tokenizer (one trained here with 1,024 tokens; `--tokenizer FILE`, or
one trained here with 32,768): the whole stage with 1 and with 2 workers, which must give the same digest, and on a
sample, in turn, the encoding of ours and `encode_batch` of the tokenizers library on one thread. MB are 1e6 bytes of
UTF-8, a core's second is a second of process time, of all processes. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from xlstm_scaling.corpus.build import build_tokens
from xlstm_scaling.corpus.tokenizer import load_tokenizer, train_tokenizer

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SHARD_BYTES = 8_000_000
SAMPLE_BYTES = 16_000_000
TRAINING_BYTES = 40_000_000
TARGET_TOKENS = 4e12  # DCLM-BASELINE


def distinct_texts(folders: list[Path], max_bytes: float) -> Iterator[tuple[str, int]]:
    """Texts and their bytes of UTF-8, every one once."""
    seen, total = set(), 0
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or not content.strip():
                continue
            seen.add(digest)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            yield text, len(content)
            total += len(content)
            if total >= max_bytes:
                return


def write_shards(folder: Path, texts: Iterator[tuple[str, int]]) -> dict:
    """The texts as `.jsonl` shards of about SHARD_BYTES."""
    documents = size = shards = 0
    file, left = None, 0
    for text, num_bytes in texts:
        if left <= 0:
            if file is not None:
                file.close()
            file = (folder / f"{shards:04d}.jsonl").open("w")
            shards, left = shards + 1, SHARD_BYTES
        file.write(json.dumps({"text": text}) + "\n")
        left -= num_bytes
        size += num_bytes
        documents += 1
    if file is None:
        sys.exit("no text in these folders: name others")
    file.close()
    return {"megabytes": round(size / 1e6, 1), "documents": documents, "shards": shards}


def sample(folder: Path, max_bytes: int) -> list[str]:
    """Documents spread over all shards."""
    shards = sorted(folder.glob("*.jsonl"))
    texts = []
    for shard in shards:
        left = max_bytes / len(shards)
        for line in shard.open():
            text = json.loads(line)["text"]
            if left <= 0:
                break
            texts.append(text)
            left -= len(text)
    return texts


def cpu_s() -> float:
    """Process time of this process and of those it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    """Result, process time [s], wall time [s]."""
    wall, cpu = time.perf_counter(), cpu_s()
    result = function()
    return result, cpu_s() - cpu, time.perf_counter() - wall


def measure_stage(text: Path, tokenizer: dict, workers: int) -> dict:
    """The whole stage: reading, hashing, encoding, merging."""
    corpus = {"name": "text", "path": str(text), "validation_fraction": 0.01}
    out = Path(tempfile.mkdtemp(dir=text.parent))
    meta, cpu, wall = timed(lambda: build_tokens(corpus, tokenizer, out, workers=workers))
    shutil.rmtree(out)
    size = sum(split["num_bytes"] for split in meta["splits"].values())
    tokens = sum(split["num_tokens"] for split in meta["splits"].values())
    return {
        "workers": workers,
        "digest": meta["digest"],
        "num_tokens": tokens,
        "bytes_per_token": round(size / tokens, 3),
        "cpu_s": round(cpu, 1),
        "wall_s": round(wall, 1),
        "mb_per_core_s": round(size / cpu / 1e6, 2),
        "mb_per_s": round(size / wall / 1e6, 2),
        "core_hours_4t_tokens": round(TARGET_TOKENS / (tokens / cpu) / 3600),
    }


def measure_encoding(texts: list[str], tokenizer: dict) -> dict:
    """Encoding alone, one thread, in turn: the library's encode_batch, ours from nothing, ours once more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = sum(len(text.encode()) for text in texts)
    library, ours = Tokenizer.from_file(tokenizer["file"]), load_tokenizer(tokenizer)
    library.encode_special_tokens = True
    batches = [texts[i : i + 100] for i in range(0, len(texts), 100)]

    def peer() -> int:
        return sum(
            len(encoding.ids) + 1
            for batch in batches
            for encoding in library.encode_batch(batch, add_special_tokens=False)
        )

    def mine() -> int:
        return sum(tokens.size for tokens in ours.encode(texts))

    counts, rates = [], {}
    for name, function in (("encode_batch", peer), ("ours", mine), ("ours_words_known", mine)):
        count, cpu, _ = timed(function)
        counts.append(count)
        rates[f"{name}_mb_per_core_s"] = round(size / cpu / 1e6, 2)
    del os.environ["TOKENIZERS_PARALLELISM"]
    return {
        "sample_mb": round(size / 1e6, 1),
        **rates,
        "ratio": round(rates["ours_mb_per_core_s"] / rates["encode_batch_mb_per_core_s"], 2),
        "same_number_of_tokens": len(set(counts)) == 1,
    }


def main(folders: list[Path], megabytes: float, tokenizer_file: Path | None, workers: list[int]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        found = write_shards(text, distinct_texts(folders, megabytes * 1e6))
        print(found, flush=True)
        files = {}
        for size in (1024, 32768) if tokenizer_file is None else (1024,):
            learn = partial(train_tokenizer, sample(text, TRAINING_BYTES), {"vocab_size": size})
            tokenizer, cpu, wall = timed(learn)
            print(f"training {size:,} tokens: {cpu:.0f} s of process time, {wall:.0f} s", flush=True)
            files[f"bpe_{size}"] = Path(scratch) / f"{size}.json"
            files[f"bpe_{size}"].write_bytes(tokenizer.content)
        if tokenizer_file is not None:
            files[tokenizer_file.stem] = tokenizer_file
        texts, rows = sample(text, SAMPLE_BYTES), {}
        for name, file in files.items():
            settings = {"name": name, "file": str(file)}
            encoding = measure_encoding(texts, settings)
            print(name, encoding, flush=True)
            stages = []
            for count in workers:
                stages.append(measure_stage(text, settings, count))
                print(name, stages[-1], flush=True)
            rows[name] = {
                "encoding": encoding,
                "stage": stages,
                "same_digest": len({row["digest"] for row in stages}) == 1,
            }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "tokenizers": tokenizers.__version__,
        "text": found,
        "worker_peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "results": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = sysconfig.get_paths()
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(here["purelib"]), Path(here["stdlib"])])
    parser.add_argument("--megabytes", type=float, default=250, help="stop after this much text (default: 250)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to measure instead of one of 32,768 tokens")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(json.dumps(main(args.folders, args.megabytes, args.tokenizer, args.workers)))
