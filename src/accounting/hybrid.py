"""Accounting of the hybrid: mLSTM blocks with one attention block in k, in every group of k blocks the last.

The blocks are those of the xLSTM and of the Transformer; all have the xLSTM's feed-forward. The last group may be
shorter, down to two blocks; a block left over is an mLSTM. An attention block has the width of the mLSTM's heads in
heads of at most `ATTENTION_HEAD_DIM` channels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from xlstm_scaling.accounting.architecture import Architecture, BlockCounts
from xlstm_scaling.accounting.shapes import ModelShape
from xlstm_scaling.accounting.transformer import Transformer
from xlstm_scaling.accounting.xlstm import XLSTM

MLSTM, ATTENTION = XLSTM(), Transformer()
#: one attention block in so many, where nobody says
ATTENTION_EVERY = 4
ATTENTION_HEAD_DIM = 128


def is_attention(index: int, num_blocks: int, every: int) -> bool:
    """Whether block ``index`` (from 0) of ``num_blocks`` is an attention block, with one in ``every``."""
    last_of_group = min((index // every + 1) * every, num_blocks) - 1
    return index == last_of_group and last_of_group % every > 0


def attention_head_dim(head_dim_v: int) -> int:
    """Channels of an attention head: the most that divide the mLSTM's, even (they are rotated in pairs), at most
    `ATTENTION_HEAD_DIM`."""
    options = range(min(head_dim_v, ATTENTION_HEAD_DIM), 1, -1)
    return next(dim for dim in options if dim % 2 == 0 and head_dim_v % dim == 0)


class Hybrid(Architecture):
    """mLSTM blocks with one attention block in ``attention_every``."""

    name, label = "hybrid", "Hybrid"

    def shape(
        self, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64,
        attention_every: int = ATTENTION_EVERY,
    ) -> ModelShape:  # fmt: skip
        if not isinstance(attention_every, int) or attention_every < 2:
            raise ValueError(f"hybrid: attention_every must be at least 2, got {attention_every}: 1 is a Transformer")
        mlstm = MLSTM.shape(embedding_dim, num_blocks, num_heads, vocab_size, chunk_size)
        return replace(mlstm, arch=self.name, attention_every=attention_every)

    def block_shapes(self, shape: ModelShape) -> tuple[ModelShape, ...]:
        return _block_shapes(shape)

    def kinds(self) -> dict[str, BlockCounts]:
        return {kind.name: kind for kind in (MLSTM, ATTENTION)}


@lru_cache(maxsize=4096)
def _block_shapes(shape: ModelShape) -> tuple[ModelShape, ...]:
    dim = attention_head_dim(shape.head_dim_v)
    mlstm = replace(shape, arch=MLSTM.name, attention_every=None)
    attention = replace(
        mlstm,
        arch=ATTENTION.name,
        num_heads=shape.num_heads * shape.head_dim_v // dim,
        head_dim_qk=dim,
        head_dim_v=dim,
        chunk_size=None,
    )
    every = shape.attention_every or ATTENTION_EVERY
    kinds = (is_attention(index, shape.num_blocks, every) for index in range(shape.num_blocks))
    return tuple(attention if attends else mlstm for attends in kinds)
