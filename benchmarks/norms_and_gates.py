"""RMS norm, head norm with gate and gated SiLU, forward and backward, each implementation beside its peers.

python benchmarks/norms_and_gates.py [--device cuda] [--threads 1 2] [--dtypes bfloat16 float32]

Peers take turns within one run, so that other load on the machine meets all of them; times are the shortest of all
rounds. ``autograd``: the formulas in PyTorch (the reference); ``functional``: with F.rms_norm or F.layer_norm in the
dtype of the activations; ``fused``: what models use on this device; ``speedup``: autograd's time by fused's;
``GB/s``: what must be read and written at least. The last line is JSON.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F

from xlstm_scaling.kernels import get_kernel, select
from xlstm_scaling.study.machine import keep_freed_memory

EPS = 1e-6
#: operation and sizes: rms_norm (tokens, d, with residual), head_norm_gate (B, T, H, d_v), gated_silu (tokens, F)
PROBLEMS = {
    "cpu": [
        *[("rms_norm", size) for size in ((2048, 64, 0), (2048, 112, 0), (4096, 128, 1), (4096, 256, 1))],
        *[("head_norm_gate", size) for size in ((8, 256, 1, 64), (8, 256, 2, 56), (16, 256, 1, 256), (16, 256, 4, 64))],
        *[("gated_silu", size) for size in ((2048, 192), (2048, 320), (4096, 704))],
    ],
    "cuda": [
        *[("rms_norm", size) for size in ((32768, 768, 1), (32768, 2048, 1), (32768, 4096, 0), (32768, 4096, 1))],
        *[("head_norm_gate", size) for size in ((8, 8192, 4, 192), (4, 8192, 4, 512), (4, 8192, 8, 512))],
        *[("gated_silu", size) for size in ((32768, 2048), (32768, 10944))],
    ],
}


def functional_rms_norm(x, weight, residual=None):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight.to(x.dtype), EPS)
    return y if residual is None else (y, total)


def functional_head_norm_gate(h, gate, weight):
    normed = F.layer_norm(h, h.shape[-1:], eps=EPS).flatten(-2)
    return torch.sigmoid(gate) * (normed * weight.to(h.dtype))


FUNCTIONAL = {"rms_norm": functional_rms_norm, "head_norm_gate": functional_head_norm_gate}


def make_inputs(op, size, dtype, device):
    """(inputs, gradients of the outputs, bytes that one pass over everything moves, forward and backward)."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    if op == "rms_norm":
        M, d, with_residual = size
        inputs = [normal(M, d), normal(d, dtype=torch.float32), *([normal(M, d)] if with_residual else [])]
        gradients, passes = [normal(M, d)] * (1 + with_residual), 9 if with_residual else 5
    elif op == "head_norm_gate":
        B, T, H, d = size
        inputs = [normal(B, H, T, d).transpose(1, 2), normal(B, T, H * d), normal(H * d, dtype=torch.float32)]
        gradients, passes = [normal(B, T, H * d)], 8
    else:
        M, width = size
        inputs, gradients, passes = [normal(M, 2 * width)], [normal(M, width)], 8
    moved = passes * gradients[0].numel() * gradients[0].element_size()
    return [x.requires_grad_() for x in inputs], gradients, moved


def measure(op, size, dtype, device, rounds):
    inputs, gradients, moved = make_inputs(op, size, dtype, device)
    peers = {
        "autograd": get_kernel(op, "reference"),
        "fused": select(op, device).function,
    }
    if op in FUNCTIONAL:
        peers["functional"] = FUNCTIONAL[op]

    def once(function):
        """Seconds of forward and of backward."""
        start = clock(device)
        outputs = function(*inputs)
        middle = clock(device)
        torch.autograd.grad(outputs, inputs, gradients)
        return middle - start, clock(device) - middle

    times = {name: [] for name in peers}
    for number in range(rounds + 3):
        for name, function in peers.items():
            pair = once(function)
            if number >= 3:
                times[name].append(pair)
    best = {name: [min(part) for part in zip(*pairs)] for name, pairs in times.items()}
    row = {"op": op, "size": list(size), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    row |= {f"{name}_us": [round(1e6 * t, 1) for t in pair] for name, pair in best.items()}
    row["speedup"] = round(sum(best["autograd"]) / sum(best["fused"]), 2)
    row["gigabytes_per_s"] = round(moved / sum(best["fused"]) / 1e9, 1)
    return row


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    parser.add_argument("--ops", nargs="+", default=None, help="rms_norm, head_norm_gate, gated_silu (default: all)")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each peer (default: 40)")
    args = parser.parse_args()
    keep_freed_memory()  # as training does
    rows = []
    heading = f"{'operation':14} {'size':13} {'dtype':9} threads"
    print(heading + "".join(f"{name:>13}" for name in ("autograd", "functional", "fused [us]")) + "  speedup   GB/s")
    for threads in args.threads if args.device == "cpu" else args.threads[:1]:
        torch.set_num_threads(threads)
        for op, size in PROBLEMS[args.device]:
            if args.ops and op not in args.ops:
                continue
            for dtype in args.dtypes:
                row = measure(op, size, getattr(torch, dtype), args.device, args.rounds)
                rows.append(row)
                line = f"{op:14} {'x'.join(map(str, size)):13} {dtype:9} {threads:7}"
                for name in ("autograd", "functional", "fused"):
                    line += "+".join(f"{t:.0f}" for t in row.get(f"{name}_us", [])).rjust(13)
                print(f"{line} {row['speedup']:8.2f} {row['gigabytes_per_s']:6.1f}", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
