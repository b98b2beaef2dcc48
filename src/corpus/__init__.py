"""Text to tokens: sources, tokenizer, memory-mapped shards, and the batches a run draws from them.

Imports nothing else of ours and no torch. `corpus.build` runs the stage; `corpus.tokenizer` encodes and decodes.
"""

from .batches import BatchSchedule, ValidationWindows, get_batch, get_windows
from .errors import CorpusError
from .shards import TokenDataset, TokenSplit
from .sources import Document, iter_documents, source_files

__all__ = [
    "BatchSchedule",
    "CorpusError",
    "Document",
    "TokenDataset",
    "TokenSplit",
    "ValidationWindows",
    "get_batch",
    "get_windows",
    "iter_documents",
    "source_files",
]
