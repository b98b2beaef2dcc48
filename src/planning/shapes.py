"""Models that can be built: widths, depths and heads that go together as in the runs a law comes from.

Depth follows width as in those runs: the median number of blocks at each width, linear in logarithms between widths,
the same width per block beyond them. Around it are tried the usual depths of the next widths to both sides, and one
block more or less from `DEPTH_FREEDOM` blocks on. No more: a law of N and D alone knows nothing of shapes, and a search
that were free in depth would end at the shallowest one, which costs fewest FLOPs a parameter. Widths are multiples that
matrix products like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ModelShape, architecture, count_params, make_shape
from xlstm_scaling.planning.errors import PlanningError

#: usual depth from which on one block more or less is tried [blocks]
DEPTH_FREEDOM = 8
#: step of widths up to a width [both in units]: multiples of 128 from 512 on, coarser where models are large
WIDTH_STEPS = ((128, 8), (512, 64), (4096, 128), (8192, 256), (16384, 512), (40960, 1024))
MAX_HEAD_DIM = 512
#: preferred head dims (of the values), the first that divides the width: powers of two keep the kernels' tiles full
HEAD_DIMS = {"xlstm": (256, 128, 64, 32, 16, 8, 4), "transformer": (128, 64, 32, 16, 8, 4)}
#: below this width the largest head dim of the list is not taken (the paper's grid: 64 -> 128, 128 -> 256)
WIDE = {"xlstm": 1024, "transformer": 1152}
#: the paper's grid: usual blocks at a width (arXiv 2510.02228, tables of hyperparameters; conf/study/paper.yaml)
PAPER_DEPTHS = {512: 13.0, 640: 13.0, 768: 15.0, 1024: 24.0, 1536: 27.0, 2304: 27.0, 4096: 32.0}
PAPER_VOCAB_SIZE = 50304


@dataclass(frozen=True)
class ShapeFamily:
    """How the shapes of one architecture go together: ``depths`` width -> usual blocks, ``heads`` width -> heads;
    ``options``: what else its shapes are free in (``make_shape``)."""

    arch: str
    vocab_size: int = PAPER_VOCAB_SIZE
    chunk_size: int = 64
    depths: Mapping[int, float] = field(default_factory=lambda: dict(PAPER_DEPTHS))
    heads: Mapping[int, int] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)

    def usual_blocks(self, embedding_dim: int) -> float:
        """Depth that goes with a width, not rounded."""
        widths = np.array(sorted(self.depths), dtype=np.float64)
        blocks = np.array([self.depths[int(width)] for width in widths])
        inside = float(np.clip(embedding_dim, widths[0], widths[-1]))
        usual = float(np.exp(np.interp(np.log(inside), np.log(widths), np.log(blocks))))
        return usual * embedding_dim / inside  # beyond the runs: the same width per block

    def num_heads(self, embedding_dim: int) -> int:
        """Heads that go with a width: as in the runs, else by the preferred head dims."""
        if embedding_dim in self.heads:
            return self.heads[embedding_dim]
        counts = set(self.heads.values())
        if len(self.heads) > 1 and len(counts) == 1:  # the study's rule: so many heads at every width
            count = counts.pop()
            if embedding_dim % count == 0 and embedding_dim // count <= MAX_HEAD_DIM:
                return count
        kind = next(iter(architecture(self.arch).kinds()))  # of the first block
        options = HEAD_DIMS.get(kind, HEAD_DIMS["transformer"])
        options = options[embedding_dim < WIDE.get(kind, WIDE["transformer"]) :]
        return next((embedding_dim // dim for dim in options if embedding_dim % dim == 0), 1)

    def shape(self, embedding_dim: int, num_blocks: int) -> ModelShape:
        """A model of the family. Raises ValueError where its heads do not divide the width."""
        heads = self.num_heads(embedding_dim)
        return make_shape(self.arch, embedding_dim, num_blocks, heads, self.vocab_size, self.chunk_size, **self.options)


def family_of_runs(arch: str, runs: pd.DataFrame | None, vocab_size: int | None = None) -> ShapeFamily:
    """The family of the shapes that were trained; the paper's where the runs name no shapes."""
    names = ["embedding_dim", "num_blocks", "num_heads", "vocab_size"]
    if runs is None or not set(names) <= set(runs.columns):
        return ShapeFamily(arch, vocab_size or PAPER_VOCAB_SIZE)
    mine = runs[(runs["arch"] == arch) & runs[names].notna().all(axis=1)]
    if mine.empty:
        return ShapeFamily(arch, vocab_size or PAPER_VOCAB_SIZE)
    swept = mine[mine["experiment_set"].eq("isoflop")] if mine["experiment_set"].eq("isoflop").any() else mine
    chunk, every = (
        mine[name].dropna() if name in mine else pd.Series(dtype=float) for name in ("chunk_size", "attention_every")
    )
    return ShapeFamily(
        arch,
        vocab_size or int(mine["vocab_size"].mode().iloc[0]),
        int(chunk.mode().iloc[0]) if len(chunk) else 64,
        {int(width): float(blocks) for width, blocks in mine.groupby("embedding_dim")["num_blocks"].median().items()},
        {int(width): int(heads.mode().iloc[0]) for width, heads in swept.groupby("embedding_dim")["num_heads"]},
        {"attention_every": int(every.mode().iloc[0])} if len(every) else {},
    )


def widths(least: int) -> list[int]:
    """Widths that are tried, ascending."""
    found, width = [], least
    for end, step in WIDTH_STEPS:
        width = -(-width // step) * step
        while width < end:
            found.append(width)
            width += step
    return found


def buildable_shapes(family: ShapeFamily, min_params: float, max_params: float) -> list[ModelShape]:
    """Every shape of the family with so many parameters, by width and depth.

    Raises PlanningError where there is none.
    """
    found: list[ModelShape] = []
    tried = sorted({*widths(max(8, min(family.depths) // 4)), *family.heads})
    usual = [max(1, round(family.usual_blocks(width))) for width in tried]
    for i, width in enumerate(tried):
        free = usual[i] >= DEPTH_FREEDOM
        near = usual[max(i - 1, 0) : i + 2]
        low, high = min(*near, usual[i] - free), max(*near, usual[i] + free)
        if width >= min(family.depths):  # never shallower than what was trained
            low = min(max(low, int(min(family.depths.values()))), usual[i])
        blocks = range(low, high + 1)
        try:
            shapes = [family.shape(width, count) for count in blocks]
        except ValueError:  # heads that do not divide this width
            continue
        sizes = [count_params(shape) for shape in shapes]
        if sizes[0] > max_params and width > 64:
            break
        found += [shape for shape, size in zip(shapes, sizes) if min_params <= size <= max_params]
    if not found:
        raise PlanningError(f"no {family.arch} of {min_params:.3g} to {max_params:.3g} parameters can be built")
    return found
