"""Snakemake's command line in forks of one process that has imported it: importing is most of a dry run's time.

Each line of standard input is a call as JSON: words, cwd, env and the file for its output; the answer is a line with
its exit status. A call is Snakemake's own ``main`` in a process of its own. Nothing of this project is imported ahead.
"""

import json
import os
import sys

import hydra
import pandas
import pyarrow.compute
import scipy.optimize
import snakemake.api
import snakemake.cli
import snakemake.report

_IMPORTED = (hydra, pandas, pyarrow.compute, scipy.optimize, snakemake.api, snakemake.report)


def call(request: dict) -> None:
    """Become ``python -m snakemake words`` in its folder and environment; does not return."""
    stream = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, stream), (2, stream)):
        os.dup2(source, target)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [snakemake.cli.__file__, *request["words"]]
    status = 1
    try:
        snakemake.cli.main(request["words"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Answer calls until standard input ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            call(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
