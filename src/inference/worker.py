"""A process for each model: its memory and its allocator's state are its own, and its death is a result.

The processes are forked from one that has imported torch and nothing else has happened in (``multiprocessing``'s fork
server), or started afresh where there is none.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from xlstm_scaling.inference.cells import BenchmarkModel, Cell, ModelRun

log = logging.getLogger(__name__)

#: modules whose functions make and measure models; each process would take a second to import them
PRELOADED = [__name__, "xlstm_scaling.inference.benchmark", "xlstm_scaling.training.trainer"]
#: a pass, or warm-up, that lasts so many times ``max_cell_s`` is ended with its process
PATIENCE = 3.0
#: but at most so long: the system's clock of a wait is limited [s]
LONGEST_S = 7 * 86400.0
#: how long a process that has said its last word may take to end [s]
EXIT_S = 10.0


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


# in the process


def _prepare_process(num_threads: int) -> None:
    """Threads; the first to go where memory runs out; gone when the process that asked is."""
    torch.set_num_threads(num_threads)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    parent = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process


def _work(pipe: Connection, num_threads: int, function: Callable, arguments: tuple) -> None:
    _prepare_process(num_threads)
    try:
        pipe.send(("end", function(pipe.send, *arguments)))
    except BaseException as error:
        log.debug("%s", traceback.format_exc())
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _measure_cells(
    send: Callable[[tuple[str, Any]], None],
    entry: BenchmarkModel,
    config: Mapping[str, Any],
    device: str,
    cells: list[Cell],
    rounds: int,
) -> None:
    begin, changed = (lambda cell: send(("begin", cell.key))), (lambda cell: send(("changed", cell)))
    run = ModelRun(entry, config, device, cells, rounds, begin, changed)
    run.run()


# in the parent


class WorkerError(RuntimeError):
    """A process that did not end as it should; ``killed`` by the system, as when memory runs out; or ``late``."""

    def __init__(self, message: str, killed: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.killed, self.late = killed, late


def call(
    function: Callable,
    *arguments: Any,
    num_threads: int = 1,
    event: Callable[[str, Any], None] = lambda kind, value: None,
    limit_s: Callable[[], float | None] = lambda: None,
) -> Any:
    """``function(send, *arguments)`` in a process of its own -> what it returns.

    Args:
        function: of a module; ``send((kind, value))`` gives the parent an ``event``.
        arguments: anything that can be pickled.
        num_threads: of torch.
        event: called for each.
        limit_s: how long the next event may take [s]; None = any time.

    Raises:
        WorkerError: the process raised an error, was killed, or was ended because an event took too long.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, num_threads, function, arguments), daemon=True)
    process.start()
    theirs.close()
    ended = False
    try:
        while True:
            limit = limit_s()
            if not ours.poll(limit):
                raise WorkerError(f"ended after {limit:.3g} s without a result", late=True)
            try:
                kind, value = ours.recv()
            except EOFError:
                raise _death(process) from None
            ended = kind in ("end", "error")
            if kind == "end":
                return value
            if kind == "error":
                raise WorkerError(value)
            event(kind, value)
    finally:
        process.join(EXIT_S if ended else 0)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _death(process: BaseProcess) -> WorkerError:
    process.join()
    code = process.exitcode
    if code == -getattr(signal, "SIGKILL", 9):
        return WorkerError("its process was killed by the system (SIGKILL), as when memory runs out", killed=True)
    if code is not None and code < 0:
        return WorkerError(f"its process was killed by {signal.Signals(-code).name}")
    return WorkerError(f"its process ended with status {code}")


def measure_model(
    entry: BenchmarkModel,
    config: Mapping[str, Any],
    device: str,
    cells: list[Cell],
    rounds: int,
    begin: Callable[[Cell], None],
    changed: Callable[[Cell], None],
) -> None:
    """Measure ``rounds`` of the cells of one model in a process of its own, and in another one after each that dies.

    The cell that a process dies at is ``out_of_memory`` where the system killed it, ``skipped`` where it took longer
    than `PATIENCE` times ``max_cell_s``, else ``failed``; all of them are, where it dies before the first.

    Args:
        entry: the model.
        config: group ``inference``, its dtype resolved.
        device: cpu or cuda.
        cells: by batch size, then prefill length; those that are complete stay as they are.
        rounds: how many every cell is to have in the end.
        begin, changed: get each cell before it is worked on, and whenever something of it was measured.
    """
    place = {cell.key: index for index, cell in enumerate(cells)}
    patience_s = min(PATIENCE * float(config["max_cell_s"]), LONGEST_S)
    while any(not cell.complete(rounds) for cell in cells):
        working: list[Cell] = []

        def event(kind: str, value: Any, working: list[Cell] = working) -> None:
            if kind == "begin":
                working[:] = [cells[place[value]]]
                begin(working[0])
            else:
                cells[place[value.key]] = value
                changed(value)
                working.clear()

        try:
            call(
                _measure_cells, entry, config, device, cells, rounds,
                num_threads=int(config["num_threads"]), event=event,
                limit_s=lambda working=working: patience_s if working else None,
            )  # fmt: skip
        except WorkerError as error:
            status = "out_of_memory" if error.killed else "skipped" if error.late else "failed"
            lost = working or [cell for cell in cells if not cell.complete(rounds)]
            where = f"batch {lost[0].batch_size}, prefill {lost[0].prefill_length}" if working else "all that is left"
            log.warning("%s, %s: %s: %s", entry.name, where, status.replace("_", " "), error)
            for cell in lost:
                cell.give_up(status, f"max_cell_s = {config['max_cell_s']:g}: {error}" if error.late else str(error))
                changed(cell)
