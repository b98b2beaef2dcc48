"""Decoding on a CPU: a step is one call of ``kernels/cpp/decode.cpp`` for the whole model."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from xlstm_scaling.inference.decoder import Decoder
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.kernels.mlstm.state import EPS
from xlstm_scaling.models import LanguageModel
from xlstm_scaling.models.language_model import Block
from xlstm_scaling.models.transformer import TransformerBlock
from xlstm_scaling.models.xlstm import GATE_CAP, XLSTMBlock

LIBRARY = "decode"
#: dtypes of activations, and so of the matrices; the C++ computes in fp32
DTYPES = (torch.float32, torch.bfloat16)
#: channels of an attention head (MAX_HEAD of decode.cpp)
MAX_HEAD = 1024
_OUT_OF_VOCABULARY, _CACHE_FULL = 2, 3


class _Block(ctypes.Structure):
    """``Block`` of decode.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("mixing_norm", "qkv", "output_gate", "out", "gates", "gate_bias", "head_norm", "ffn_norm"),
            *("gate_up", "down", "memory", "keys", "values"),
        )
    ]


class _Model(ctypes.Structure):
    """``Model`` of decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("low", "blocks", "B", "d", "F", "V", "room", "threads")),
        *((name, ctypes.c_int64) for name in ("cell_H", "cell_d_qk", "cell_d_v", "heads", "head_dim")),
        *((name, ctypes.c_double) for name in ("norm_eps", "cell_eps", "gate_cap", "logit_cap")),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head", "frequency", "block", "scratch")),
    ]


class CppDecoder(Decoder):
    """One call a step, on as many threads as torch has when the decoder is made.

    Matrices are read in fp32, or in bf16 where the model computes in bf16: half the memory traffic, widened in
    registers. Sums, activations and the mLSTM's state are fp32 in both; a cache has the dtype of the matrices. A model
    whose matrices are fp32 but which computes in bf16 is copied to bf16 (`timing.prepare` avoids that).
    """

    @staticmethod
    def refusal(model: LanguageModel, quiet: bool = False) -> str | None:
        """Why it cannot serve a model, or None. Without ``quiet``, the compiler's message is in it."""
        if unknown := {type(block) for block in model.blocks} - {XLSTMBlock, TransformerBlock}:
            return f"there is no C++ for {', '.join(sorted(kind.__name__ for kind in unknown))}"
        if model.head.weight.device.type != "cpu":
            return f"the model is on {model.head.weight.device}"
        if model.compute_dtype not in DTYPES or model.norm.weight.dtype != torch.float32:
            return f"it computes in {model.compute_dtype} with norms in {model.norm.weight.dtype}, not in fp32 or bf16"
        attention = _first(model, TransformerBlock)
        if attention is not None and attention.attention.head_dim > MAX_HEAD:
            return f"heads have {attention.attention.head_dim} channels, more than {MAX_HEAD}"
        if quiet:
            return None if build.usable(LIBRARY) else "there is no C++ library"
        try:
            build.library(LIBRARY)
        except build.BuildError as error:
            return str(error)
        return None

    def __init__(self, model: LanguageModel, batch_size: int, max_length: int, prompt_length: int = 0) -> None:
        super().__init__(model, batch_size, max_length)
        shape, library = model.shape, build.library(LIBRARY)
        self._kept: list[Tensor] = []  # what C++ has addresses of
        self._blocks = (_Block * shape.num_blocks)(*map(self._block, model.blocks, self.state))
        heads: dict[str, int] = {}
        frequency = None
        if (block := _first(model, TransformerBlock)) is not None:
            attention = block.attention
            heads |= {"heads": attention.heads, "head_dim": attention.head_dim}
            pairs = torch.arange(0, attention.head_dim, 2, dtype=torch.float32)
            frequency = attention.theta ** (-pairs / attention.head_dim)  # as in rotary_angles
        if (block := _first(model, XLSTMBlock)) is not None:
            heads |= {"cell_H": block.mlstm.heads, "cell_d_qk": block.mlstm.d_qk, "cell_d_v": block.mlstm.d_v}
        self._model = _Model(
            low=model.compute_dtype == torch.bfloat16,
            blocks=shape.num_blocks,
            B=batch_size,
            d=shape.embedding_dim,
            F=shape.ffn_dim,
            V=shape.vocab_size,
            room=max_length,
            threads=torch.get_num_threads(),
            norm_eps=model.norm.eps,
            cell_eps=EPS,
            gate_cap=GATE_CAP,
            logit_cap=model.logit_cap or 0.0,
            embedding=self._address(model.embedding.weight),
            norm=self._address(model.norm.weight),
            head=self._matrix(model.head.weight),
            frequency=None if frequency is None else self._address(frequency),
            block=ctypes.addressof(self._blocks),
            **heads,
        )
        library.decode_scratch.restype = ctypes.c_int64
        with torch.inference_mode(False):
            scratch = torch.empty(library.decode_scratch(ctypes.byref(self._model)) + 16)
            self._logits = torch.empty(batch_size, shape.vocab_size)
        self._model.scratch = (self._address(scratch) + 63) // 64 * 64
        self._function = library.decode_step
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]
        self._padding: Tensor | None = None

    def _address(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        tensor = tensor.detach().to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, weight: Tensor) -> int:
        return self._address(weight, self.model.compute_dtype)

    def _block(self, block: torch.nn.Module, memory: object) -> _Block:
        shared = {
            "ffn_norm": self._address(block.ffn_norm.weight),
            "gate_up": self._matrix(block.ffn.gate_up.weight),
            "down": self._matrix(block.ffn.down.weight),
        }
        if isinstance(block, TransformerBlock):
            return _Block(
                mixing_norm=self._address(block.attention_norm.weight),
                qkv=self._matrix(block.attention.qkv.weight),
                out=self._matrix(block.attention.out.weight),
                keys=memory.k.data_ptr(),
                values=memory.v.data_ptr(),
                **shared,
            )
        layer = block.mlstm
        return _Block(
            mixing_norm=self._address(block.mlstm_norm.weight),
            qkv=self._matrix(layer.qkv.weight),
            output_gate=self._matrix(layer.output_gate.weight),
            out=self._matrix(layer.out.weight),
            gates=self._address(layer.gates.weight),
            gate_bias=self._address(layer.gates.bias),
            head_norm=self._address(layer.norm.weight),
            memory=memory.C.data_ptr(),
            keys=memory.n.data_ptr(),
            values=memory.m.data_ptr(),
            **shared,
        )

    def _taken(self) -> None:
        self._padding = self.padding

    def step(self, tokens: Tensor) -> Tensor:
        self._run(tokens, None)
        return self._logits

    def greedy(self, tokens: Tensor) -> Tensor:
        best = torch.empty(self.batch_size, dtype=torch.int64)
        self._run(tokens, best)
        return best

    def _run(self, tokens: Tensor, best: Tensor | None) -> None:
        if tokens.shape != (self.batch_size,) or tokens.dtype != torch.int64:
            raise ValueError(f"a step takes ({self.batch_size},) int64, got {tuple(tokens.shape)} {tokens.dtype}")
        self._check_room()
        tokens = tokens.contiguous()  # bound to a name: alive during the call
        padding = None if self._padding is None else self._padding.data_ptr()
        status = self._function(
            ctypes.addressof(self._model),
            tokens.data_ptr(),
            self.length,
            padding,
            self._logits.data_ptr(),
            None if best is None else best.data_ptr(),
        )
        if status == _OUT_OF_VOCABULARY:
            raise ValueError(f"tokens must lie in [0, {self.model.shape.vocab_size}), got {tokens.tolist()}")
        if status:
            raise RuntimeError(f"decode_step refused ({status}): {self.length} tokens, padding {self._padding}")
        for cache in self.caches:
            cache.length += 1


def _first(model: LanguageModel, kind: type[Block]) -> Block | None:
    """The first block of a kind."""
    return next((block for block in model.blocks if isinstance(block, kind)), None)
