"""Files of a transformers folder, read without transformers: configuration, safetensors, tokenizer."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_scaling.interop.errors import InteropError, refuse

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
#: these widen to fp32 exactly
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALL = "it is installed with: pip install 'xlstm-scaling[hf]'"


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InteropError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise InteropError(f"{path} does not hold a JSON object: fetch it again")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder. FileNotFoundError where there is none."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a folder of transformers: it has no {CONFIG}")
    return _load_json(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one, or the shards of its index. FileNotFoundError names what is missing."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        hint = ""
        if (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
            hint = "; it has pytorch_model.bin, which is not read: save the model with safetensors"
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    weight_map = _load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InteropError(f"{folder / INDEX} has no weight_map: fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise InteropError(f"{folder / INDEX} names {name!r}, which is not a file of the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} shards are missing in {folder}, e.g. {missing[0]}")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in the dtype they are stored in. InteropError names a file or a tensor of no use."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InteropError(f"reading weights needs safetensors; {INSTALL}") from None

    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise InteropError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise refuse(f"dtype of {name}", str(tensor.dtype), "weights are float32, bfloat16 or float16 here")
    # tables of positions that old releases of Llama stored; they follow from the configuration
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def copy_tokenizer(source: Path, target: Path) -> str | None:
    """Copy the tokenizer's files, where there is one; returns its end-of-sequence token."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    for name in TOKENIZER_FILES[1:]:
        if (Path(target) / name).is_file():
            token = _load_json(Path(target) / name).get("eos_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` on success and is removed on failure.

    InteropError where there is something at ``path`` already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InteropError(f"{path} exists and is not empty: remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
