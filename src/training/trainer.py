"""The model and its optimiser while they train: updates, validation, and the state that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_scaling.corpus import BatchSchedule, TokenDataset, ValidationWindows, get_batch, get_windows
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.plan import RunSpec
from xlstm_scaling.training.checkpoint import CheckpointError, load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.guard import GuardRule, LossGuard
from xlstm_scaling.training.schedule import learning_rate

#: tokens that a validation step reads at once
VALIDATION_TOKENS = 8192


def build_run_model(spec: RunSpec, device: str = "cpu") -> LanguageModel:
    """The model of a run, initialised from its seed."""
    dtype = getattr(torch, spec.compute_dtype)
    return build_model(spec.model_shape, compute_dtype=dtype, seed=spec.seed, **spec.model_options).to(device)


def load_trained(run_folder: Path) -> LanguageModel:
    """The model of a finished run with its trained weights.

    Raises FileNotFoundError or CheckpointError with the file's name.
    """
    spec = RunSpec(**read_json(Path(run_folder) / "spec.json"))
    model = build_run_model(spec)
    try:
        content = load_file(Path(run_folder) / "final.ckpt")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {Path(run_folder) / 'result.json'} and train the run again") from None
    model.load_state_dict(content["model"])
    return model.eval()


class Trainer:
    """One run's model, optimiser, data and guard; ``step`` updates are done."""

    def __init__(self, spec: RunSpec, dataset: TokenDataset, execution: Execution) -> None:
        self.spec, self.execution = spec, execution
        self.train_split, self.validation_split = dataset.split("train"), dataset.split("validation")
        if spec.shape["vocab_size"] < dataset.vocab_size:
            raise ValueError(
                f"the tokens have a vocabulary of {dataset.vocab_size}, the model of {spec.shape['vocab_size']}"
            )
        self.batches = BatchSchedule(self.train_split.num_tokens, spec.context_length, spec.batch_sequences, spec.seed)
        self.windows = ValidationWindows(
            self.validation_split.num_tokens, spec.context_length, spec.validation["max_tokens"]
        )
        self.model = build_run_model(spec, execution.device)
        o = spec.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.decay_groups(o["weight_decay"]),
            lr=spec.learning_rate,
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            fused=True,
        )
        self.guard = LossGuard(GuardRule(**spec.guard))
        self.step = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: all that the next update depends on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.restore(state["guard"])
        self.step = state["step"]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs, targets and document starts (B, T) of an update, on the host."""
        tensors = tuple(torch.from_numpy(array) for array in get_batch(self.train_split, self.batches, step))
        return tensors if self.execution.device == "cpu" else tuple(tensor.pin_memory() for tensor in tensors)

    def update(self, batch: tuple[Tensor, ...]) -> tuple[float, float, float, bool]:
        """One optimiser step -> learning rate, loss [nat/token], gradient norm, whether it was made.

        Raises Diverged.
        """
        spec = self.spec
        rate = learning_rate(
            self.step, spec.num_train_steps, spec.learning_rate, spec.warmup_steps, spec.cooldown_steps,
            spec.final_fraction, spec.decay,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets, starts = (self._to_device(tensor) for tensor in batch)
        micro = self.execution.micro_batch_sequences or spec.batch_sequences
        total = torch.zeros((), dtype=torch.float64, device=self.execution.device)
        for rows in range(0, spec.batch_sequences, micro):
            part = slice(rows, rows + micro)
            share = inputs[part].shape[0] / spec.batch_sequences
            loss = self.model.loss(inputs[part], targets[part], starts[part]) * share
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), spec.optimizer["grad_clip"], foreach=True)
        loss, norm = torch.stack((total, norm.double())).tolist()  # the step's one wait for the device
        accepted = self.guard.accept(self.step, loss, norm)
        if accepted:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return rate, loss, norm, accepted

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.execution.device, non_blocking=True)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows [nat/token]."""
        total, count = 0.0, 0
        for starts in self.windows.batches(max(1, VALIDATION_TOKENS // self.spec.context_length)):
            windows: tuple[np.ndarray, ...] = get_windows(self.validation_split, starts, self.spec.context_length)
            inputs, targets, document_starts = (self._to_device(torch.from_numpy(array)) for array in windows)
            total += self.model.loss(inputs, targets, document_starts).item() * targets.numel()
            count += targets.numel()
        return total / count
