"""xLSTM of mLSTM blocks, as in xLSTM-7B (Beck et al., 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.kernels import select
from xlstm_scaling.kernels.cross_entropy import soft_cap
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState, state_dtype
from xlstm_scaling.models.language_model import Block, LanguageModel, Operation
from xlstm_scaling.models.layers import (
    NORM_EPS,
    GatedFeedForward,
    HeadNormGate,
    Linear,
    RMSNorm,
    small_init_,
    wang_init_,
)

GATE_CAP = 15.0
FORGET_BIAS = (3.0, 6.0)  # linspace over the heads
INPUT_BIAS = -10.0
#: which mLSTM, where the options say nothing
KERNEL_FORM, KERNEL_BACKEND = "chunkwise", "auto"


class MLSTMLayer(nn.Module):
    """q, k, v and output gate by one product, input and forget gates by another; cell; norm, gate, out-projection."""

    def __init__(
        self,
        shape: ModelShape,
        kernel_form: str,
        kernel_backend: str,
        kernel_chunk_size: int | None,
        input_gate_bias: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.d_qk, self.d_v = shape.num_heads, shape.head_dim_qk, shape.head_dim_v
        self.splits = [self.heads * self.d_qk, self.heads * self.d_qk, self.heads * self.d_v]
        d, width = shape.embedding_dim, self.heads * self.d_v
        self.qkv = Linear(d, sum(self.splits))
        self.output_gate = Linear(d, width)
        self.gates = Linear(d, 2 * self.heads, bias=True)
        self.norm = HeadNormGate(self.heads, self.d_v, norm_eps)
        self.out = Linear(width, d)
        self.input_gate_bias = input_gate_bias
        self.form, self.backend = kernel_form, kernel_backend
        self.cell_options = {}
        if kernel_form == "chunkwise" and kernel_chunk_size is not None:
            self.cell_options["chunk_size"] = kernel_chunk_size
        select("mlstm", "cpu", kernel_form, "auto" if kernel_backend == "triton" else kernel_backend)  # it exists

    def forward(self, x: Tensor, document_starts: Tensor | None, state: MLSTMState | None) -> tuple[Tensor, MLSTMState]:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(x).split(self.splits, dim=-1))
        # gates in fp32: they are exponentiated
        dtype = state_dtype(x.dtype)
        gates = F.linear(x.to(dtype), self.gates.weight, self.gates.bias)
        i, f = soft_cap(gates, GATE_CAP).view(B, T, 2, self.heads).permute(2, 0, 3, 1)  # (B, H, T) each
        if document_starts is not None:
            f = f.masked_fill(document_starts[:, None, :], RESET_FORGET)
        if T == 1 and state is not None:
            # the Triton step has no gradient
            device = "cpu" if torch.is_grad_enabled() else x.device.type
            step = select("mlstm", device, "step", double=dtype == torch.float64).function
            h, state = step(q[:, :, 0], k[:, :, 0], v[:, :, 0], i[:, :, 0], f[:, :, 0], state)
            h = h[:, None]  # (B, 1, H, d_v)
        else:
            cell = torch.compiler.disable(self.cell) if torch.compiler.is_compiling() else self.cell
            h, state = cell(q, k, v, i, f, state)
            h = h.transpose(1, 2)
        return self.out(self.norm(h, self.output_gate(x))), state

    def cell(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None
    ) -> tuple[Tensor, MLSTMState]:
        """The mLSTM over T tokens: q, k, v (B, H, T, d), i, f (B, H, T) -> h (B, H, T, d_v), last state."""
        kernel = select("mlstm", q.device.type, self.form, self.backend, i.dtype == torch.float64).function
        return kernel(q, k, v, i, f, state, **self.cell_options)

    def reset_parameters(self, num_blocks: int, generator: torch.Generator | None) -> None:
        d = self.qkv.in_features
        small_init_(self.qkv.weight, d, generator)
        nn.init.zeros_(self.output_gate.weight)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[: self.heads] = self.input_gate_bias
            self.gates.bias[self.heads :] = torch.linspace(*FORGET_BIAS, self.heads)
        wang_init_(self.out.weight, d, num_blocks, 1.0, generator)


class XLSTMBlock(Block):
    """x += mLSTM(norm(x)); x += FFN(norm(x))."""

    @classmethod
    def operations(
        cls, kernel_form: str = KERNEL_FORM, kernel_backend: str = KERNEL_BACKEND, **options: Any
    ) -> list[Operation]:
        others = ("rms_norm", "head_norm_gate", "gated_silu")
        return [("mlstm", kernel_form, kernel_backend), *((op, None, "auto") for op in others)]

    def __init__(
        self,
        shape: ModelShape,
        kernel_form: str = KERNEL_FORM,
        kernel_backend: str = KERNEL_BACKEND,
        kernel_chunk_size: int | None = None,
        input_gate_bias: float = INPUT_BIAS,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.mlstm_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.mlstm = MLSTMLayer(shape, kernel_form, kernel_backend, kernel_chunk_size, input_gate_bias, norm_eps)
        self.ffn_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.ffn = GatedFeedForward(shape.embedding_dim, shape.ffn_dim)

    def forward(
        self, x: Tensor, document_starts: Tensor | None = None, state: MLSTMState | None = None
    ) -> tuple[Tensor, MLSTMState | None]:
        y, new_state = self.mlstm(self.mlstm_norm(x), document_starts, state)
        normed, x = self.ffn_norm.add(y, x)
        return x + self.ffn(normed), None if state is None else new_state

    def init_state(self, batch_size: int, max_length: int, dtype: torch.dtype) -> MLSTMState:
        layer, device = self.mlstm, self.mlstm_norm.weight.device
        kwargs = {"dtype": state_dtype(dtype), "device": device}
        return MLSTMState(
            torch.zeros(batch_size, layer.heads, layer.d_qk, layer.d_v, **kwargs),
            torch.zeros(batch_size, layer.heads, layer.d_qk, **kwargs),
            torch.zeros(batch_size, layer.heads, **kwargs),
        )

    def take_rows(self, state: MLSTMState, rows: slice, padding: int) -> MLSTMState:
        return MLSTMState(*(x[rows] for x in state))

    def put_rows(self, state: MLSTMState, rows: slice, part: MLSTMState, padding: int) -> None:
        for whole, x in zip(state, part):
            whole[rows] = x

    def reset_parameters(self, num_blocks: int, generator: torch.Generator | None) -> None:
        self.mlstm.reset_parameters(num_blocks, generator)
        d = self.ffn.gate_up.in_features
        small_init_(self.ffn.gate_up.weight, d, generator)
        wang_init_(self.ffn.down.weight, d, num_blocks, 1.0, generator)


class XLSTM(LanguageModel):
    """The xLSTM language model; options: ``kernel_form``, ``kernel_backend``, ``kernel_chunk_size``,
    ``input_gate_bias``."""

    kinds: ClassVar = {"xlstm": XLSTMBlock}
