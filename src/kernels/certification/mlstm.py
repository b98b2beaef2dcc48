"""The cases of the mLSTM: lengths, widths, gates, hand-overs.

Conditioning. h divides by max(|n·q|, exp(-m)). With independent q and k the product n·q passes through zero; the few
tokens where it does dominate every RMS, and PyTorch in fp32 misses 2e-5 by itself. Where |n·q| crosses exp(-m),
gradients jump. So q and k share a mean direction, which keeps n·q > 0, and the input gates of a case keep its tokens on
one side: ``value`` (|n·q| far above exp(-m)) or ``floor`` (far below). The mean of k is small, as it cancels in dq.
Gradients that are sums over all tokens (di, df, dm0) would be sums of random signs, small beside the rounding of their
terms: the cotangent of h has a part along h, large for ``floor``, where nothing cancels by it. Every tensor keeps its
full rank.

Cases whose gradients come in very different sizes from h and from the last state are split into one with a cotangent of
h and one with cotangents of the states, so that neither hides the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from xlstm_scaling.kernels.certification.comparison import rms
from xlstm_scaling.kernels.certification.operation import Case, Operation, Placed, options, seed
from xlstm_scaling.kernels.mlstm.chunkwise import mlstm_chunkwise
from xlstm_scaling.kernels.mlstm.parallel import mlstm_parallel
from xlstm_scaling.kernels.mlstm.recurrent import mlstm_recurrent, mlstm_step
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState

#: above this length the float64 reference is chunkwise (tests hold it equal to recurrent)
LONG = 512
REFERENCE_CHUNK = 128
#: most tokens of a case for forms whose time or memory grows too fast
MAX_TOKENS = {"recurrent": LONG, "step": LONG, "parallel": 1024}
INPUTS = ("q", "k", "v", "i", "f")
INITIAL = ("C0", "n0", "m0")
STATE = ("C", "n", "m")
OF_H, OF_STATES, OF_ALL = ("h",), STATE, ("h", *STATE)

#: (mean, spread) of gate pre-activations
INPUT_GATES = {"value": (3.0, 0.5), "floor": (-9.0, 1.0)}
FORGET_GATES = {"open": (4.0, 1.0), "long": (8.0, 1.0)}
#: share of a gate at ±15 that its values spread over, inwards
EXTREME_SPREAD = 0.05
#: means and spreads of q and of k, by what h averages over: one token, about fifty, or thousands
QK = {"closed": (0.9, 0.3, 0.9, 0.3), "open": (1.2, 0.2, 0.3, 0.6), "long": (1.2, 0.2, 0.2, 0.6)}
#: part of h in the cotangent of h, in units of its random part
ALONG = {"value": 0.1, "floor": 1.0}
#: the initial state is what this many tokens leave behind, raised by this in the logarithm
PAST, PAST_WEIGHT = 32, 1.5


def _case(
    name: str,
    T: int,
    d_qk: int = 16,
    d_v: int = 24,
    B: int = 2,
    H: int = 2,
    chunk: int | None = None,
    i: str | float = "value",
    f: str | float = "open",
    state: bool = True,
    cotangents: tuple[str, ...] = OF_ALL,
    packed: bool = True,
    pieces: int = 1,
    resets: tuple[int, ...] = (),
    same: bool = False,
    draw: int = 0,
    **flags: bool | str | tuple[str, ...] | None,
) -> Case:
    """``chunk``: None for the kernel's choice, as models train. ``packed``: in memory as the model's inputs are.
    ``pieces``: handed over at random tokens. ``same``: one cotangent for all tokens, without memory of its own.
    ``draw``: another draw of the same problem, where the first happens to be ill-conditioned.
    """
    splits: tuple[int, ...] = ()
    if pieces > 1:
        generator = torch.Generator().manual_seed(seed("splits", name))
        splits = tuple(sorted((torch.randperm(T - 1, generator=generator)[: pieces - 1] + 1).tolist()))
    # e^-9, e^-15 and e^-25 of something are below the least number of fp16, 6e-8
    small = i == "floor" or bool(resets) or any(not isinstance(gate, str) and gate < 0 for gate in (i, f))
    settings = {
        "T": T, "d_qk": d_qk, "d_v": d_v, "B": B, "H": H, "chunk": chunk, "i": i, "f": f, "state": state,
        "cotangents": cotangents, "packed": packed, "splits": splits, "resets": resets, "same": same,
    }  # fmt: skip
    return Case(name, settings, draw=draw, float16=not small, **flags)


def _extreme_cases() -> list[Case]:
    """Both gates at ±15. With the input open and the forget gate closed, h = v: what q, k, i and f do to it cancels.
    A closed forget gate leaves e^-15 of the past: gradients of f and m0 are what is left of a difference."""
    cases = []
    for i, opened in ((15.0, "open"), (-15.0, "closed")):
        for f, forget in ((15.0, "open"), (-15.0, "closed")):
            for cotangents, what in ((OF_H, "h"), (OF_STATES, "states")):
                vanishing: tuple[str, ...] = ("df", "dm0") if f < 0 else ()
                if i > 0 > f and what == "h":
                    vanishing += ("dq", "dk", "di", "dn0")
                name = f"inputs {opened}, forget {forget}, gradient of {what}"
                draw = 1 if f > 0 and what == "states" else 0
                cases.append(
                    _case(name, 131, i=i, f=f, cotangents=cotangents, quick=True, vanishing=vanishing, draw=draw)
                )
    return cases


CASES = (
    _case("odd length", 151, quick=True),
    _case("odd length, no state, gradient of h", 77, state=False, cotangents=OF_H, chunk=32, quick=True, draw=3),
    _case("shorter than a chunk", 13, chunk=64, quick=True, draw=1),
    _case("one token", 1),
    _case("whole chunks", 128, chunk=32),
    _case("a chunk and one token", 65, chunk=64),
    _case("chunks of 16", 83, chunk=16),
    _case("chunks of 128", 200, chunk=128),
    _case("chunks of the kernel's choice", 300, B=1, interpreted=False),
    _case("d_qk above d_v", 90, d_qk=32, d_v=16, chunk=32, quick=True),
    _case("widths of no power of two", 90, d_qk=20, d_v=40, H=1, draw=1),
    _case("narrow heads", 70, d_qk=8, d_v=16, H=1, draw=2),
    _case("contiguous inputs", 100, packed=False, B=1, H=3, draw=1),
    _case("one gradient of h for all tokens", 100, cotangents=OF_H, same=True),
    _case("small inputs, gradient of h", 151, i="floor", cotangents=OF_H, quick=True),
    _case("small inputs, gradient of states", 151, i="floor", cotangents=OF_STATES, draw=4),
    _case("small inputs, no state, gradient of h", 100, i="floor", state=False, cotangents=OF_H),
    _case("resets", 150, resets=(0, 31, 63, 64, 100), chunk=64, quick=True, draw=2),
    _case("handed over once", 150, pieces=2, chunk=64, quick=True, draw=2),
    _case("handed over three times", 173, pieces=4, chunk=32),
    _case("handed over, small inputs, gradient of h", 140, pieces=3, i="floor", cotangents=OF_H),
    *_extreme_cases(),
    _case("65,536 tokens", 65536, d_v=32, B=1, H=1, f="long", quick=True, interpreted=False),
    _case("65,536 tokens, handed over", 65536, d_v=32, B=1, H=1, f="long", pieces=3, interpreted=False),
    _case("heads of 128 and 256", 300, d_qk=128, d_v=256, B=1, device="cuda", interpreted=False, draw=1),
    _case("heads of 256 and 512", 150, d_qk=256, d_v=512, B=1, H=1, device="cuda", interpreted=False, draw=4),
    _case("65,536 tokens, wide heads", 65536, d_qk=64, d_v=128, B=1, H=1, f="long", device="cuda", interpreted=False),
)  # fmt: skip


class MLSTM(Operation):
    """q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T), initial state -> h (B, H, T, d_v), last state."""

    name = "mlstm"
    cases = CASES
    outputs = OF_ALL
    gradients = INPUTS + INITIAL
    low = frozenset({"q", "k", "v", "h"})
    logarithmic = frozenset({"i", "f", "m0"})
    without_gradient = frozenset({("step", "triton")})

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        s = case.settings
        B, H = s["B"], s["H"]
        past = PAST if s["state"] else 0
        T = past + s["T"]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def gate(kind: str | float, table: Mapping[str, tuple[float, float]]) -> Tensor:
            x = normal(B, H, T)
            if isinstance(kind, str):
                mean, spread = table[kind]
                return mean + spread * x
            return kind * (1 - EXTREME_SPREAD * x.abs() / (1 + x.abs()))

        direction = normal(B, H, 1, s["d_qk"]).sign()
        memory = s["f"] if isinstance(s["f"], str) else "open" if s["f"] > 0 else "closed"
        means = QK[memory]
        q, k = (
            direction * (mean + spread * normal(B, H, T, s["d_qk"])) for mean, spread in (means[:2], means[2:])
        )  # fmt: skip
        v = normal(B, H, T, s["d_v"])
        i, f = gate(s["i"], INPUT_GATES), gate(s["f"], FORGET_GATES)
        for t in s["resets"]:
            f[:, :, past + t] = RESET_FORGET
        x = dict(zip(INPUTS, (q, k, v, i, f)))
        if not past:
            return x
        _, state = mlstm_recurrent(*(y[:, :, :past] for y in x.values()))
        state = state._replace(m=state.m + PAST_WEIGHT)
        return {name: y[:, :, past:] for name, y in x.items()} | dict(zip(INITIAL, state))

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        s = case.settings
        head = (s["B"], s["H"])
        shapes = ((*head, s["T"], s["d_v"]), (*head, s["d_qk"], s["d_v"]), (*head, s["d_qk"]), head)
        return dict(zip(self.outputs, shapes))

    def takes(self, form: str, case: Case) -> bool:
        s = case.settings
        if form == "step" and (s["splits"] or not s["state"]):
            return False
        return s["T"] <= MAX_TOKENS.get(form, s["T"])

    def cotangent_names(self, case: Case) -> tuple[str, ...]:
        return case.settings["cotangents"]

    def cotangent(self, case: Case, name: str, output: Tensor, generator: torch.Generator) -> Tensor:
        if name == "h" and case.settings["same"]:
            output = output[:1, :1, -1:]
        random = super().cotangent(case, name, output, generator)
        if name != "h":
            return random
        i = case.settings["i"]
        kind = i if isinstance(i, str) else "value" if i > 0 else "floor"
        return random + ALONG[kind] * output / rms(output)

    def summands(self, name: str, value: Tensor) -> int:
        return math.prod(value.shape[2:]) if name in INITIAL else value.shape[-1]

    def place(self, x: Mapping[str, Tensor], case: Case) -> Placed:
        """q, k, v are slices of one product (B, T, width), the gates of another (B, T, 2, H), as in the model."""
        placed = Placed()
        views: dict[str, Tensor] = {}
        if case.settings["packed"]:
            B, H, T = x["i"].shape
            widths = [H * x[name].shape[-1] for name in "qkv"]
            product = placed.room((B, T, sum(widths)), x["q"]).split(widths, dim=-1)
            views = {name: part.view(B, T, H, -1).transpose(1, 2) for name, part in zip("qkv", product)}
            views |= dict(zip("if", placed.room((B, T, 2, H), x["i"]).permute(2, 0, 3, 1)))
        for name, value in x.items():
            placed.put(name, value, views.get(name))
        return placed

    def place_cotangent(self, case: Case, name: str, value: Tensor) -> Tensor:
        """The model gives the gradient of h as a transposed (B, T, H, d_v)."""
        if name == "h" and case.settings["packed"] and not case.settings["same"]:
            return value.transpose(1, 2).contiguous().transpose(1, 2)
        return super().place_cotangent(case, name, value)

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        s = case.settings
        tokens = [x[name] for name in INPUTS]
        state = MLSTMState(*(x[name] for name in INITIAL)) if s["state"] else None
        pieces = []
        if form == "step":
            state = MLSTMState(*(y.clone() for y in state))  # a step may write its new state over the old one
            for token in zip(*(y.unbind(2) for y in tokens)):
                h, state = function(*token, state)
                pieces.append(h[:, :, None])
        else:
            size = REFERENCE_CHUNK if form == "whole" else s["chunk"]
            chunk = {} if size is None else options(function, chunk_size=size)
            bounds = [0, *(() if form == "whole" else s["splits"]), s["T"]]
            for start, end in itertools.pairwise(bounds):
                h, state = function(*(y[:, :, start:end] for y in tokens), state, **chunk)
                pieces.append(h)
        h = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return dict(zip(self.outputs, (h, *state)))

    def reference(self, case: Case) -> Callable:
        return mlstm_chunkwise if case.settings["T"] > LONG else mlstm_recurrent

    def yardstick(self, form: str) -> Callable:
        own = {"step": mlstm_step, "recurrent": mlstm_recurrent, "parallel": mlstm_parallel}
        return own.get(form, mlstm_chunkwise)
