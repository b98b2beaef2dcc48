"""Training against Hugging Face's models on a CPU: python benchmarks/training.py [--dtype float32] [--quick]

d = 256, 6 blocks, V = 4,096, T = 512, 8 sequences a step (6.9 M parameters), the optimiser's step included. Four
models, each in a process of its own, train in turn, a few steps at a time, on the same batches with the same AdamW and
schedule: ours through the trainer of a study's runs, the peers as their users write it (fused AdamW, clipped gradients;
under bf16 autocast where the dtype is bfloat16). Reported: tokens/s (medians over turns), the ratio to the peer of each
architecture, by the clock and by the time of the CPU (which other load on the machine disturbs less), the mean loss of
the last 20 steps, and where a step of ours goes beside the peak of matrix products here. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from xlstm_scaling import stages
from xlstm_scaling.corpus import TokenDataset
from xlstm_scaling.study.config import compose
from xlstm_scaling.study.machine import keep_freed_memory, resolve_compute_dtype
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import Planner
from xlstm_scaling.training.execution import Execution, measure_peak_flops
from xlstm_scaling.training.schedule import learning_rate
from xlstm_scaling.training.trainer import Trainer

D, BLOCKS, VOCAB, T, BATCH, HEADS = 256, 6, 4096, 512, 8, 4
LAST = 20  # steps that the final loss is averaged over


class Ours:
    """One of our models in the trainer of a study's runs."""

    def __init__(self, spec, dataset, threads):
        self.trainer = Trainer(spec, dataset, Execution(threads=threads))

    def step(self, batch):
        return self.trainer.update(batch)[1]


class Peer:
    """A model of `transformers` with the training step that its users write."""

    def __init__(self, model, spec):
        self.model, self.spec, self.done = model.train(), spec, 0
        o = spec.optimizer
        linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
        decay = [p for p in model.parameters() if id(p) in linear]
        rest = [p for p in model.parameters() if id(p) not in linear]
        groups = [{"params": decay, "weight_decay": o["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=spec.learning_rate, betas=(o["beta1"], o["beta2"]), eps=o["eps"], fused=True
        )

    def step(self, batch):
        spec = self.spec
        rate = learning_rate(
            self.done, spec.num_train_steps, spec.learning_rate, spec.warmup_steps, spec.cooldown_steps,
            spec.final_fraction,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets, _ = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.compute_dtype == "bfloat16"):
            logits = self.model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), spec.optimizer["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()


def peer_model(arch, ffn_dim):
    """A model of `transformers` of the same dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM, xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    if arch == "transformer":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=D, intermediate_size=ffn_dim, num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=T, rope_theta=5e5,
            attn_implementation="sdpa",
        )  # fmt: skip
        return LlamaForCausalLM(config)
    config = xLSTMConfig(
        vocab_size=VOCAB, hidden_size=D, embedding_dim=D, num_hidden_layers=BLOCKS, num_blocks=BLOCKS,
        num_heads=HEADS, mode="train", chunk_size=64,
    )  # fmt: skip
    return xLSTMForCausalLM(config)


def profile(step, batches):
    """Share of a step's time by what it does, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        for batch in batches:
            step(batch)
    seconds = {}
    for event in prof.key_averages():
        name = event.key
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            kind = "matrix products"
        elif "scaled_dot_product" in name or "flash_attention" in name:
            kind = "attention"
        elif "mlstm" in name.lower():
            kind = "mLSTM"
        elif "cross_entropy" in name.lower():
            kind = "cross entropy"
        elif "norm" in name.lower() and "clip" not in name and "foreach" not in name:
            kind = "norms"
        elif "silu" in name.lower():
            kind = "gated SiLU"
        elif "adamw" in name.lower() or "foreach" in name or "zero_grad" in name:
            kind = "optimiser"
        elif name in ("aten::to", "aten::copy_", "aten::cat", "aten::contiguous", "aten::clone", "aten::_to_copy"):
            kind = "copies"
        else:
            kind = "other"
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: round(value / total, 3) for kind, value in sorted(seconds.items(), key=lambda item: -item[1])}


def make(name, spec, dataset, threads):
    arch = name.removeprefix("hf_")
    return Ours(spec, dataset, threads) if name == arch else Peer(peer_model(arch, spec.shape["ffn_dim"]), spec)


def worker(pipe, name, spec, tokens, threads):
    """Train ``name``: answers (first, last) with the losses of these steps, their seconds by the clock and of CPUs."""
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = False
    dataset = TokenDataset.open(tokens)
    if not name.startswith("hf_"):
        keep_freed_memory()  # as a study's runs do
    model, batches = make(name, spec, dataset, threads), Trainer(spec, dataset, Execution(threads=threads))
    pipe.send("ready")
    del batches.model, batches.optimizer
    while (task := pipe.recv()) is not None:
        if task == "profile":
            pipe.send(profile(model.step, [batches.batch(spec.num_train_steps - 1)] * 2))
            continue
        todo = [batches.batch(step) for step in range(*task)]
        began, busy = time.perf_counter(), time.process_time()
        losses = [model.step(batch) for batch in todo]
        pipe.send((losses, time.perf_counter() - began, time.process_time() - busy))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--per-turn", type=int, default=4, help="steps that a model takes before it is the next's turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="24 steps: speeds, no loss to speak of")
    parser.add_argument("--results", type=Path, help="where the tokens are kept (default: a temporary folder)")
    args = parser.parse_args()
    steps = 24 if args.quick else args.steps
    torch.set_num_threads(args.threads)
    dtype = resolve_compute_dtype(args.dtype)
    config = compose(["study=smoke", f"tokenizer.vocab_size={VOCAB}", f"training.compute_dtype={dtype}"])
    context, workers, pipes = get_context("spawn"), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = StudyPaths.of(config, args.results or folder)
        stages.tokens(config, paths, progress=False)
        planner, specs = Planner(config), {}
        for arch in ("xlstm", "transformer"):
            spec = planner.run(planner.shape(arch, D, BLOCKS, HEADS), T, BATCH, steps, 2e-3)
            specs[arch] = replace(spec, warmup_steps=max(1, steps // 10), cooldown_steps=steps // 10)
            for name in (arch, f"hf_{arch}"):
                pipes[name], theirs = context.Pipe()
                task = (theirs, name, specs[arch], paths.tokens, args.threads)
                workers[name] = context.Process(target=worker, args=task, daemon=True)
                workers[name].start()
                theirs.close()
                pipes[name].recv()
        speeds, busy, losses = ({name: [] for name in pipes} for _ in range(3))
        for first in range(0, steps, args.per_turn):
            last = min(first + args.per_turn, steps)
            for name, pipe in pipes.items():
                pipe.send((first, last))
                found, seconds, cpu_s = pipe.recv()
                losses[name] += found
                busy[name].append(cpu_s / (last - first))
                speeds[name].append((last - first) * BATCH * T / seconds)
            if first // args.per_turn % 5 == 1:
                now = ", ".join(f"{name} {np.median(s[1:]):,.0f} tokens/s" for name, s in speeds.items())
                print(f"step {last}: {now}", flush=True)
        shares = {}
        for arch in specs:
            pipes[arch].send("profile")
            shares[arch] = pipes[arch].recv()
        for name, pipe in pipes.items():
            pipe.send(None)
            workers[name].join()
    peak = measure_peak_flops(getattr(torch, dtype), size=2048, seconds=1.0)
    speed = {name: float(np.median(s[1:])) for name, s in speeds.items()}
    mfu = {arch: speed[arch] / BATCH / T * spec.flops_per_step / peak for arch, spec in specs.items()}
    final = {name: float(np.mean(values[-LAST:])) for name, values in losses.items()}
    ratio = {arch: speed[arch] / speed[f"hf_{arch}"] for arch in specs}
    cpu_s = {name: float(np.median(values[1:])) for name, values in busy.items()}
    target = 2.5 if dtype == "bfloat16" else 1.3
    summary = {
        "dtype": dtype, "threads": args.threads, "steps": steps, "params": {a: s.num_params for a, s in specs.items()},
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "ratio": {arch: round(value, 3) for arch, value in ratio.items()},
        "cpu_s_per_step": {name: round(value, 3) for name, value in cpu_s.items()},
        "ratio_cpu_time": {arch: round(cpu_s[f"hf_{arch}"] / cpu_s[arch], 3) for arch in specs},
        "target": target, "pass": {arch: value >= target for arch, value in ratio.items()},
        "loss_last_20": {name: round(value, 4) for name, value in final.items()},
        "peak_flops": peak, "mfu": {arch: round(value, 3) for arch, value in mfu.items()}, "time_shares": shares,
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
