"""Parts made side by side, by processes of `corpus.worker`."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

from .errors import CorpusError
from .parts import Part, PartMaker
from .pieces import Piece
from .settings import TokenizerSettings


def make_parts(
    maker: PartMaker,
    tokenizer_cfg: TokenizerSettings,
    pieces: Sequence[Piece],
    workers: int,
    done: Callable[[Piece, Part], None],
) -> list[Part]:
    """The parts of some pieces, in order: those on the disk as they are, the others made by `workers` processes.

    done: called with every part, in the order of completion. Raises CorpusError; parts that are done stay.
    """
    maker.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[int, Part] = {}
    missing = []
    for piece in pieces:
        if (part := maker.find(piece)) is None:
            missing.append(piece)
        else:
            parts[piece.number] = part
            done(piece, part)
    made = _made_here if min(workers, len(missing)) <= 1 else _made_by_processes
    for piece, part in made(maker, tokenizer_cfg, missing, workers):
        parts[piece.number] = part
        done(piece, part)
    return [parts[piece.number] for piece in pieces]


def _made_here(
    maker: PartMaker, tokenizer_cfg: TokenizerSettings, pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Part]]:
    for piece in pieces:
        yield piece, maker.make(piece)


def _made_by_processes(
    maker: PartMaker, tokenizer_cfg: TokenizerSettings, pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Part]]:
    count = min(workers, len(pieces))
    processes = [_Worker(maker, tokenizer_cfg) for _ in range(count)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in processes:
        idle.put(worker)

    def make(piece: Piece) -> Part:
        worker = idle.get()
        try:
            return worker.make(piece)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)  # each thread waits for a process
    try:
        # the largest first: no long piece is left for the end
        tasks = {pool.submit(make, piece): piece for piece in sorted(pieces, key=lambda piece: -piece.size)}
        for task in as_completed(tasks):
            yield tasks[task], task.result()
    finally:
        for worker in processes:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in processes:
            worker.close()


class _Worker:
    """A process of `corpus.worker`: unlike those of `multiprocessing` it inherits no threads and no main module."""

    def __init__(self, maker: PartMaker, tokenizer_cfg: TokenizerSettings) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._first: tuple | None = (maker.corpus, maker.tokenizer.content, tokenizer_cfg, maker.folder)

    def make(self, piece: Piece) -> Part:
        """The part of a piece. Raises what the process raised, and CorpusError if it is gone."""
        try:
            for message in filter(None, (self._first, piece)):
                pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            self._first = None
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CorpusError(
                "A process that made tokens was killed, for want of memory perhaps; rerun the tokens stage with fewer"
                " --workers (parts that are done are kept)."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Release a process that was killed and that no thread waits for."""
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # a message that it did not live to read
            self._process.stdin.close()
