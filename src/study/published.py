"""A study of published runs (``runs=published``): which files it is made from, and their inference measurements."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from xlstm_scaling.study.config import ConfigError, is_published
from xlstm_scaling.study.paths import StudyPaths

log = logging.getLogger(__name__)

#: names of files with inference measurements, the first that is there is read
INFERENCE_FILES = ("inference.csv", "inference_results_df_dict.pkl")
RUN_SUFFIXES = (".pkl", ".pickle", ".csv", ".parquet")
#: architecture here -> what the measurements call it; others are left out
MODEL_TYPES = {"xlstm": "xlstm", "llama2": "transformer"}
HOW = (
    "name the folder of the published files: `make paper PAPER=/path/to/folder`, or `--config runs=published "
    "paper=/path/to/folder`, or set XLSTM_SCALING_PAPER; `make paper DOWNLOAD=true` (`--config runs=published "
    "download=true`) fetches the authors' run logs instead (docs/published.md)"
)


class PublishedError(ValueError):
    """Published files that cannot be used; the message says which and what to do."""


def published_folder(config: DictConfig, paths: StudyPaths) -> Path:
    """The folder of the published files; ConfigError says how to name one where there is none."""
    if config.runs.download:
        return paths.downloads
    if config.runs.folder is None:
        raise ConfigError(f"no published runs to read: {HOW}")
    folder = Path(config.runs.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder} of published runs: {HOW}")
    if not run_files(folder):
        raise ConfigError(f"{folder} holds neither a run log (.pkl) nor a table of runs (.csv, .parquet): {HOW}")
    return folder


def run_files(folder: Path) -> list[Path]:
    """The files of a folder, and of ``logs`` inside it, that may hold training runs."""
    files = [file for place in (folder, folder / "logs") if place.is_dir() for file in sorted(place.iterdir())]
    wanted = [file for file in files if file.suffix.lower() in RUN_SUFFIXES and not file.name.startswith(".")]
    return [file for file in wanted if file.is_file() and not file.name.startswith("inference")]


def inference_file(config: DictConfig, paths: StudyPaths) -> Path | None:
    """The published inference measurements; None where the folder has none."""
    folder = published_folder(config, paths)
    if config.runs.download:
        return folder / INFERENCE_FILES[-1]
    for place in (folder, folder / "logs"):
        for name in INFERENCE_FILES:
            if (place / name).is_file():
                return place / name
    return None


def has_inference(config: DictConfig, paths: StudyPaths) -> bool:
    """Whether the study has inference measurements: made here, or published ones."""
    return not is_published(config) or inference_file(config, paths) is not None


def read_published(path: Path) -> pd.DataFrame:
    """The authors' pickle (times in ms, negative where memory ran out), or a CSV of it in SI units: as that CSV."""
    return _read_pickle(path) if path.suffix == ".pkl" else pd.read_csv(path)


def measurements_table(source: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """Published inference measurements as the table ``measurements`` (docs/tables.md).

    Args:
        source: the table of `read_published`.
        settings: ``runs.inference``: device and dtype, which the files do not name.

    Models without a shape (Llama 3) are left out. A prefill of no tokens is one step from the start token; it keeps
    its step time and has no time to first token. ``ttft_raw_s`` is a second version of the times to first token, NaN
    where the source has none.

    Raises:
        PublishedError: columns are missing, or no measurement is left.
    """
    from xlstm_scaling.inference.records import finish_table

    needed = ["model_type", "model_tag", "batch_size", "prefill_length_tokens", "ttft_s", "step_time_s", "num_params"]
    needed += ["embedding_dim", "num_blocks", "num_heads", "ffn_dim", "vocab_size", "qk_dim_factor", "chunk_size"]
    if lacking := [name for name in needed if name not in source]:
        raise PublishedError(f"inference measurements lack the columns {', '.join(lacking)}")
    known = source["model_type"].isin(list(MODEL_TYPES)) & source["embedding_dim"].notna()
    if left_out := sorted(set(source.loc[~known, "model_type"])):
        log.warning("measurements of %s are left out: they name no shape", ", ".join(left_out))
    source = source[known].reset_index(drop=True)
    if source.empty:
        raise PublishedError(f"no inference measurement of {', '.join(MODEL_TYPES)} with its shape")
    arch = source["model_type"].map(MODEL_TYPES)
    head_dim = source["embedding_dim"] / source["num_heads"]
    ttft = source["ttft_s"].where(source["ttft_s"] > 0)
    step = source["step_time_s"].where(source["step_time_s"] > 0)
    memory = [name for name in source if name.startswith("memory_reserved")]
    peak = source[memory].max(axis=1) if memory else pd.Series(float("nan"), index=source.index)
    table = pd.DataFrame(
        {
            "arch": arch,
            "model": source["model_tag"],
            **{name: source[name] for name in ("num_params", "embedding_dim", "num_blocks", "num_heads")},
            "head_dim_qk": (head_dim * source["qk_dim_factor"].fillna(1.0)).round(),
            "head_dim_v": head_dim.round(),
            **{name: source[name] for name in ("ffn_dim", "vocab_size", "chunk_size", "batch_size")},
            "trained": False,
            "prefill_length": source["prefill_length_tokens"],
            "ttft_s": ttft.where(source["prefill_length_tokens"] > 0),
            "step_time_s": step,
            "decode_tokens_per_s": source["batch_size"] / step,
            "peak_memory_bytes": peak.where(peak > 0),
            "repeats": 1,
            "dtype": settings["dtype"],
            "num_threads": 0,
            "device": settings["device"],
            "status": (ttft.notna() | step.notna()).map({True: "ok", False: "out_of_memory"}),
            "detail": "",
        }
    )
    raw = source["ttft_raw_pickle_s"] if "ttft_raw_pickle_s" in source else pd.Series(float("nan"), index=source.index)
    raw = raw.where((raw > 0) & (source["prefill_length_tokens"] > 0))
    return finish_table(table.to_dict("records")).assign(ttft_raw_s=raw.to_numpy(dtype="float64"))


def _read_pickle(path: Path) -> pd.DataFrame:
    """The authors' pickle with the column names of the CSV: {model: DataFrame with columns (group, name)}."""
    from xlstm_scaling.published.reader import load_pickle

    names = {"model_type": "model_type", "model_tag": "model_tag", "batchsize": "batch_size"}
    names |= {"prefill": "prefill_length_tokens", "ttft": "ttft_s", "steptime": "step_time_s"}
    content = load_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(part, pd.DataFrame) for part in content.values()):
        raise PublishedError(f"{path} holds no tables of inference measurements")
    parts = []
    for part in content.values():
        part = part.set_axis([column[-1] if isinstance(column, tuple) else column for column in part], axis=1)
        parts.append(part.rename(columns=names))
    table = pd.concat(parts, ignore_index=True)
    for name in ("ttft_s", "step_time_s"):
        if name in table:
            table[name] = table[name] / 1000.0
    return table.rename(columns=lambda name: name.replace("memory_reserved_gl", "memory_reserved_gen"))
