"""A process that makes parts: python -m xlstm_scaling.corpus.worker, started by `part_processes.make_parts`.

Reads pickles from its standard input, first the arguments of a PartMaker, then pieces; answers each piece on its
standard output with the part or the exception. Ends with its input, so with its parent.
"""

import contextlib
import os
import pickle
import sys

from .parts import PartMaker
from .tokenizer import parse_tokenizer


def main() -> None:
    """Make parts until the input ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    tasks = sys.stdin.buffer
    corpus, content, settings, folder = pickle.load(tasks)
    maker = PartMaker(corpus, parse_tokenizer(content, settings, "the tokenizer"), folder)
    while True:
        try:
            piece = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer = maker.make(piece)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the parent says what happened
        main()
