"""torchrun, which tells a run that was asked to stop and has saved from one that failed.

    python -m xlstm_scaling.training.torchrun OPTIONS OF TORCHRUN -m -- xlstm_scaling.cli train …

Torchrun itself ends with status 1 whatever its processes end with. Here a status is 85 (`errors.EXIT_PREEMPTED`) where
its processes ended with it, or where torchrun itself got SIGTERM and has handed it to them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from xlstm_scaling.study.errors import EXIT_PREEMPTED


def were_stopped(exit_codes: Iterable[int]) -> bool:
    """Whether processes with these exit codes were asked to stop: one says so, and no other failed by itself.

    Torchrun ends those with SIGTERM that are still there when the first one has ended.
    """
    codes = set(exit_codes)
    return EXIT_PREEMPTED in codes and codes <= {EXIT_PREEMPTED, -signal.SIGTERM}


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; what its processes raised, if they failed, is in their output and raised again."""
    try:
        torchrun(None if argv is None else list(argv))
    except ChildFailedError as error:
        if not were_stopped(failure.exitcode for failure in error.failures.values()):
            raise
        return EXIT_PREEMPTED
    except SignalException as error:
        if error.sigval != signal.SIGTERM:
            raise
        return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
