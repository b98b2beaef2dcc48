"""Training by several processes of this machine: forked from one that has imported torch, joined by gloo."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

TIMEOUT_S = 120
#: what every process would import by itself
FORKED_WITH = ("torch.distributed.fsdp", "torch.distributed.checkpoint")


def _work(rank, world, port, function, arguments, results):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        results.put((rank, function(*arguments), None))
    except Exception as error:
        results.put((rank, None, error))
    results.close()
    results.join_thread()


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(world, function, *arguments):
    """What ``function(*arguments)`` returns, or raises, in each of ``world`` processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xlstm_scaling.training.run", "torch._inductor", *FORKED_WITH])
    results, port = context.Queue(), _free_port()
    children = [
        context.Process(target=_work, args=(rank, world, port, function, arguments, results)) for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        said = sorted((results.get(timeout=TIMEOUT_S) for _ in children), key=lambda item: item[0])
    finally:
        for child in children:
            child.join(timeout=20)
            if child.is_alive():
                child.kill()
    return [error if error is not None else value for _, value, error in said]


def train_runs(runs):
    """The results of some runs, one after the other: (spec, tokens folder, folder, execution) each."""
    from xlstm_scaling.training.run import train

    return [
        train(spec, Path(tokens_folder), Path(folder), execution) for spec, tokens_folder, folder, execution in runs
    ]


def train_shared(trunk, tokens_folder, folder, execution):
    """What some runs share."""
    from xlstm_scaling.training.trunk import train_trunk

    return train_trunk(trunk, Path(tokens_folder), Path(folder), execution)


def train_stopped(spec, tokens_folder, folder, execution, step, rank):
    """A run of which one process gets SIGTERM at a step."""
    from xlstm_scaling.training.run import train
    from xlstm_scaling.training.trainer import Trainer

    update = Trainer.update

    def stopping(self, batch):
        if self.step == step and self.parallel.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    Trainer.update = stopping
    return train(spec, Path(tokens_folder), Path(folder), execution)


def initial_weights(spec, shard):
    """Every weight before the first step, whole, as numpy arrays; and the numbers this process holds of them."""
    from xlstm_scaling.training.parallel import Parallel, whole
    from xlstm_scaling.training.trainer import build_run_model

    model = build_run_model(spec, "cpu", Parallel.start("cpu", shard))
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {name: whole(value).detach().numpy() for name, value in model.state_dict().items()}, held


def refused(spec, tokens_folder, folder, execution, seeds=None):
    """What a run says that does not start; ``seeds``: each process has a plan with another one."""
    from dataclasses import replace

    from xlstm_scaling.training.run import Run

    try:
        seed = seeds[int(os.environ["RANK"])] if seeds else spec.seed
        Run(replace(spec, seed=seed), Path(tokens_folder), Path(folder), execution)
    except ValueError as error:
        return str(error)
