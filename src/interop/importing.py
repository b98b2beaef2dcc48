"""A folder of transformers -> a folder with a model of ours."""

from __future__ import annotations

import logging
from pathlib import Path

from xlstm_scaling.interop.configurations import import_configuration
from xlstm_scaling.interop.errors import InteropError, refuse
from xlstm_scaling.interop.huggingface_files import copy_tokenizer, new_folder, read_config, read_weights
from xlstm_scaling.interop.model_folder import ModelDescription, save_model
from xlstm_scaling.interop.weights import pieces, to_ours

log = logging.getLogger(__name__)


def import_huggingface(
    folder: Path, target: Path, logit_cap: float | None = None, compute_dtype: str = "float32"
) -> ModelDescription:
    """Write ``model.json``, ``final.ckpt`` and the tokenizer; ``model_folder.load_model`` reads them.

    Args:
        folder: ``config.json`` with ``model.safetensors`` or shards and their index; needs no transformers.
        target: a new folder.
        logit_cap: soft cap on the logits of a Llama that was trained with one, which its configuration cannot say.
        compute_dtype: of activations. Weights keep the dtype they are stored in and are widened to fp32 in a model.

    Returns:
        The imported model.

    Raises:
        InteropError: what our models cannot represent, by field and value; damaged files; ``target`` is not empty.
        FileNotFoundError: no configuration or no weights.
    """
    config = read_config(folder)
    plan = import_configuration(config)
    options = dict(plan.options)
    if logit_cap is not None:
        if options["logit_cap"] is not None:
            raise refuse("--logit-cap", logit_cap, f"the configuration says output_logit_soft_cap = "
                         f"{options['logit_cap']:g}")  # fmt: skip
        if not logit_cap > 0:
            raise InteropError(f"--logit-cap must be positive, got {logit_cap:g}")
        options["logit_cap"] = logit_cap
    elif config.get("ignored_logit_cap") is not None:
        cap = config["ignored_logit_cap"]
        log.warning(
            "exported without a soft cap on logits of %s, imported without; --logit-cap %s restores it", cap, cap
        )
    weights = to_ours(pieces(plan.shape, plan.weight_mode), read_weights(folder))
    eos = config.get("eos_token_id")
    with new_folder(target) as temporary:
        eos_token = copy_tokenizer(folder, temporary)
        description = ModelDescription(
            shape=plan.shape,
            options=options,
            compute_dtype=compute_dtype,
            context_length=plan.context_length,
            eos_token=eos_token,
            eos_token_id=eos if isinstance(eos, int) else None,
            source={
                "imported_from": Path(folder).resolve().name,
                "architecture": (config.get("architectures") or [config["model_type"]])[0],
                "weights_dtype": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
                "num_params": sum(weight.numel() for weight in weights.values()),
            },
        )
        save_model(temporary, description, weights)
    return description
