"""The model and its optimiser while they train: updates, validation, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_scaling.corpus import BatchSchedule, TokenDataset, ValidationWindows, get_batch, get_windows
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.run_spec import RunSpec, spec_of
from xlstm_scaling.training.checkpoint import CheckpointError, load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.guard import GuardRule, LossGuard
from xlstm_scaling.training.parallel import Parallel, whole
from xlstm_scaling.training.schedule import learning_rate
from xlstm_scaling.training.sharded import read_tensors, set_whole, whole_state

#: tokens that a validation step reads at once
VALIDATION_TOKENS = 8192


def build_run_model(spec: RunSpec, device: str = "cpu", parallel: Parallel | None = None) -> LanguageModel:
    """The model of a run, initialised from its seed, on a device or laid over those of all processes."""
    dtype = getattr(torch, spec.compute_dtype)
    if parallel is None or parallel.world == 1:
        return build_model(spec.model_shape, compute_dtype=dtype, seed=spec.seed, **spec.model_options).to(device)
    with torch.device("meta"):
        model = build_model(spec.model_shape, compute_dtype=dtype, **spec.model_options)
    return parallel.materialise(model, spec.seed)


def load_trained(run_folder: Path) -> LanguageModel:
    """The model of a finished run with its trained weights.

    Raises FileNotFoundError or CheckpointError with the file's name, the latter also for a run of other code.
    """
    spec = spec_of(read_json(Path(run_folder) / "spec.json"))
    if spec is None:
        raise CheckpointError(f"{Path(run_folder) / 'spec.json'} is of code with other settings: train the run again")
    model = build_run_model(spec)
    try:
        content = load_file(Path(run_folder) / "final.ckpt")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {Path(run_folder) / 'result.json'} and train the run again") from None
    model.load_state_dict(content["model"])
    return model.eval()


class Trainer:
    """One run's model, optimiser, data and guard; ``step`` updates are done.

    Several processes make one update together: ``votes`` says whether this one wants to stop and to save, ``agreed``
    after an update whether any does.
    """

    def __init__(
        self, spec: RunSpec, dataset: TokenDataset, execution: Execution, parallel: Parallel | None = None
    ) -> None:
        self.spec, self.execution, self.parallel = spec, execution, parallel or Parallel()
        self.votes: Callable[[], tuple[bool, bool]] = lambda: (False, False)
        self.agreed = (False, False)
        self.train_split, self.validation_split = dataset.split("train"), dataset.split("validation")
        if spec.shape["vocab_size"] < dataset.vocab_size:
            raise ValueError(
                f"the tokens have a vocabulary of {dataset.vocab_size}, the model of {spec.shape['vocab_size']}"
            )
        self.batches = BatchSchedule(self.train_split.num_tokens, spec.context_length, spec.batch_sequences, spec.seed)
        self.windows = ValidationWindows(
            self.validation_split.num_tokens, spec.context_length, spec.validation["max_tokens"]
        )
        self.model = build_run_model(spec, execution.device, self.parallel)
        self.model.activation_checkpointing = execution.activation_checkpointing
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
        """What a checkpoint holds: all that the next update depends on. Of several processes, 0 has it whole."""
        return {
            "step": self.step,
            "model": whole_state(self.model.state_dict(), self.parallel),
            "optimizer": whole_state(self.optimizer.state_dict(), self.parallel),
            "guard": self.guard.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, or from the folder of shards that it names; made by any number of processes."""
        if "tensors" in state:
            read_tensors(state["tensors"], self.model, self.optimizer, self.parallel)
        elif self.parallel.world > 1:
            set_whole(state["model"], state["optimizer"], self.model, self.optimizer)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.guard.restore(state["guard"])
        self.step = state["step"]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs, targets and document starts (B, T) of an update, this process's rows of them, on the host."""
        self.parallel.use_device()  # of the thread that prepares batches
        rows = self.parallel.rows(self.spec.batch_sequences)
        tensors = tuple(torch.from_numpy(array) for array in get_batch(self.train_split, self.batches, step, rows))
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
        parts = list(self.parallel.parts(spec.batch_sequences, micro))
        for index, (part, rows) in enumerate(parts):
            self.parallel.reduce_gradients(self.model, index == len(parts) - 1)
            share = rows / spec.batch_sequences
            loss = self.model.loss(inputs[part], targets[part], starts[part]) * share
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), spec.optimizer["grad_clip"], foreach=True)
        loss, norm = self._agree(total, whole(norm).double())
        accepted = self.guard.accept(self.step, loss, norm)
        if accepted:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return rate, loss, norm, accepted

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """Loss and gradient norm of the global batch, and ``agreed``: the step's one wait for the device."""
        if self.parallel.world == 1:
            loss, norm = torch.stack((loss, norm)).tolist()
            return loss, norm
        votes = torch.tensor(self.votes(), dtype=torch.float64, device=loss.device)
        values = torch.cat((torch.stack((loss, norm / self.parallel.world)), votes))
        loss, norm, stop, save = self.parallel.sum(values).tolist()
        self.agreed = stop > 0, save > 0
        return loss, norm

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.execution.device, non_blocking=True)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows [nat/token]."""
        own, at_once = self.windows.starts[self.parallel.rows(len(self.windows))], VALIDATION_TOKENS
        total, count = 0.0, 0
        for part, rows in self.parallel.parts(len(self.windows), max(1, at_once // self.spec.context_length)):
            windows: tuple[np.ndarray, ...] = get_windows(self.validation_split, own[part], self.spec.context_length)
            inputs, targets, document_starts = (self._to_device(torch.from_numpy(array)) for array in windows)
            tokens = rows * self.spec.context_length
            total += self.model.loss(inputs, targets, document_starts).item() * tokens
            count += tokens
        self.parallel.release(self.model)
        if self.parallel.world > 1:
            sums = torch.tensor((total, count), dtype=torch.float64, device=self.execution.device)
            total, count = self.parallel.sum(sums).tolist()
        return total / count
