"""Speed of the kernels against what else there is: python benchmarks/kernels.py [--device auto|cpu|cuda] [--quick]

On a GPU: the peak of matrix products and the bandwidth of memory first; then the mLSTM against mlstm_kernels' two
Triton kernels and against FlashAttention (torch's SDPA), the step against the bandwidth, linear cross entropy, norms
and gates against PyTorch, each with its roofline. Times are medians of events on the GPU, implementations in turn, with
a cold L2 cache and with the launches queued beforehand. On a CPU: the mLSTM against mlstm_kernels' two native ones.

Whatever is wrong at a small size is not measured. mlstm_kernels may be missing (pip install mlstm_kernels einops). The
package need not be installed. The last line is JSON; benchmarks/README.md explains it.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_package():
    """Make ``xlstm_scaling`` importable from the checkout where it is not installed."""
    if importlib.util.find_spec("xlstm_scaling") is None:
        spec = importlib.util.spec_from_file_location(
            "xlstm_scaling", ROOT / "src" / "__init__.py", submodule_search_locations=[str(ROOT / "src")]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["xlstm_scaling"] = module
        spec.loader.exec_module(module)


find_package()

import torch  # noqa: E402

from xlstm_scaling.accounting.hardware import DEVICES, Device, find_device  # noqa: E402
from xlstm_scaling.kernels import problems, roofline, select  # noqa: E402
from xlstm_scaling.kernels.cpp import tiles  # noqa: E402
from xlstm_scaling.kernels.problems import Problem, gradient_like  # noqa: E402

#: relative root mean square error against the float32 reference above which an implementation is wrong
TOLERANCES = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}
PEER_TOLERANCE = 5  # times ours: mlstm_kernels round more of what lies between to 16 bits
WARM_UPS = 3
HEAD_DIM = 128  # of the attention that the mLSTM is compared with, at the same width
PASSES = ("forward", "forward + backward")


# implementations: (problem, inputs) -> outputs that have gradients


def ours(backend):
    return lambda problem, x: graded(problem, problem.forward(x, backend))


def graded(problem, outputs):
    names = {"mlstm": ("h",), "linear_cross_entropy": ("loss",)}.get(problem.op, tuple(outputs))
    return [outputs[name] for name in names]


def plain(form):
    return lambda problem, x: graded(problem, problem.forward(x, "torch", form))


def peer(name, **options):
    """A chunkwise kernel of mlstm_kernels."""

    def call(problem, x):
        from mlstm_kernels.torch.chunkwise import registry

        return [registry[name](x["q"], x["k"], x["v"], x["i"], x["f"], eps=1e-6, **options)]

    return call


def native_peer(name):
    """One in PyTorch: gates in the dtype of q, and so its products."""

    def call(problem, x):
        dtype = x["q"].dtype
        gates = {gate: x[gate].to(dtype) for gate in ("i", "f")}
        return peer(name, autocast_kernel_dtype=dtype)(problem, x | gates)

    return call


def peers(device):
    """mlstm_kernels' implementations for a device by name, empty where it is not installed."""
    if importlib.util.find_spec("mlstm_kernels") is None:
        return {}
    if device == "cpu":
        return {name: native_peer(name) for name in ("native_custbw", "native_autograd")}
    return {
        "triton_xl_chunk (128)": peer("triton_xl_chunk", chunk_size=128, autocast_kernel_dtype=torch.bfloat16),
        "triton_xl_chunk (256)": peer("triton_xl_chunk", chunk_size=256, autocast_kernel_dtype=torch.bfloat16),
        "triton_limit_chunk (64)": peer("triton_limit_chunk", chunk_size=64, autocast_kernel_dtype=torch.bfloat16),
    }


def attention(problem, x):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if x["q"].is_cuda else nullcontext():
        return [torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)]


def attention_inputs(problem, device):
    """q, k, v of an attention layer of the width of an mLSTM problem."""
    s = problem.size
    heads = s["H"] * s["d_v"] // HEAD_DIM
    shape = (s["B"], heads, s["T"], HEAD_DIM)
    return {name: torch.randn(shape, dtype=problem.dtype, device=device).requires_grad_() for name in "qkv"}


# time and memory


@dataclass
class Measured:
    """Seconds of one implementation in one pass, one entry a round; seconds that the host needs to launch it."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self):
        return statistics.median(self.seconds)


class GPUClock:
    """Times by events. Before each run the L2 cache is overwritten, and the GPU sleeps until all is launched, so that
    no time of the host's is measured."""

    device = "cuda"

    def __init__(self):
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
        self.cycles_per_s = 1.98e9
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1000)
        torch.cuda.synchronize()
        first.record()
        torch.cuda._sleep(20_000_000)
        last.record()
        torch.cuda.synchronize()
        self.cycles_per_s = 20_000_000 / (first.elapsed_time(last) / 1e3)

    def warm(self, function):
        """Seconds that the host needs for a launch."""
        for _ in range(WARM_UPS):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return host

    def time(self, function, host):
        """(seconds on the GPU, seconds of the host)."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(min(0.05, 1.5 * host + 2e-4) * self.cycles_per_s))
        first.record()
        start = time.perf_counter()
        function()
        launched = time.perf_counter() - start
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3, launched

    def peak_bytes(self, function):
        """Memory that a call takes beside its inputs and results of before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class CPUClock:
    """Wall time."""

    device = "cpu"

    def warm(self, function):
        for _ in range(WARM_UPS):
            function()
        return 0.0

    def time(self, function, host):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start, 0.0

    def peak_bytes(self, function):
        return None


def runner(call, problem, inputs, backward):
    """A call of an implementation, with its backward or without."""
    wanted = [x for x in inputs.values() if x.requires_grad]
    if not backward:
        return lambda: call(problem, inputs)
    outputs = call(problem, inputs)
    gradients = [gradient_like(y) for y in outputs]

    def run():
        return torch.autograd.grad(call(problem, inputs), wanted, gradients)

    return run


def measure(functions, clock, seconds):
    """Times of several functions in turn, for about so many seconds; by name, an error's text where one fails."""
    results, hosts = {}, {}
    for name, function in functions.items():
        try:
            hosts[name] = clock.warm(function)
            results[name] = Measured(peak_bytes=clock.peak_bytes(function))
        except Exception as error:
            results[name] = one_line(error)
    names = list(hosts)
    started, rounds = time.perf_counter(), 0
    while names and rounds < 200 and (rounds < 5 or time.perf_counter() - started < seconds):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            taken, host = clock.time(functions[name], hosts[name])
            results[name].seconds.append(taken)
            results[name].host.append(host)
        rounds += 1
    return results


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


# correctness at a small size


def small(problem):
    """The same operation and widths at a size that the reference computes at once."""
    sizes = {"B": 2, "T": 512, "M": 512, "H": 2, "V": 4096}
    sizes |= {"H": problem.size["H"]} if problem.form == "step" else {}
    shape = tuple((name, min(size, sizes.get(name, size))) for name, size in problem.sizes)
    return Problem(problem.op, problem.form, problem.dtype, shape, problem.backward)


def run_all(call, problem, inputs):
    """Outputs and gradients, in order."""
    outputs = call(problem, inputs)
    wanted = [x for x in inputs.values() if x.requires_grad]
    if not wanted:
        return [y.detach() for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [gradient_like(y) for y in outputs])]


def constant_normaliser(problem, x):
    """The parallel form of the mLSTM whose normaliser has no gradient, as in mlstm_kernels' hand-written backward."""
    from xlstm_scaling.kernels.mlstm.parallel import causal_mask

    q, k, v, i, f = (x[name] for name in "qkvif")
    b = torch.nn.functional.logsigmoid(f).cumsum(-1)
    log_weights = b[..., :, None] - b[..., None, :] + i[..., None, :]
    log_weights = log_weights.masked_fill(causal_mask(q.shape[2], q.device), -torch.inf)
    m = torch.maximum(log_weights.amax(-1), b).detach()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) * torch.exp(log_weights - m[..., None])
    normaliser = torch.maximum(scores.sum(-1).abs(), torch.exp(-m)) + 1e-6
    return [scores @ v / normaliser.detach()[..., None]]


def difference(found, expected):
    """The largest relative root mean square difference of results in order; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.float(), b.float()
        error = ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12)).item()
        worst = max(worst, error if bool(torch.isfinite(a).all()) else math.inf)
    return worst


def check(call, problem, device, reference_form, is_peer):
    """(what is wrong with an implementation at a small size or None, a note on its gradients or None)."""
    problem = small(problem)
    inputs = problem.make_inputs(device)
    wide = {}
    for name, x in inputs.items():
        wide[name] = (x.detach().float() if x.is_floating_point() else x).clone().requires_grad_(x.requires_grad)
    tolerance = TOLERANCES[problem.dtype] * (PEER_TOLERANCE if is_peer else 1)
    try:
        expected = run_all(plain(reference_form), problem, wide)
        found = run_all(call, problem, inputs)
        error = difference(found, expected)
        if error <= tolerance:
            return None, None
        if is_peer:  # its gates' gradients are sums of what was rounded: told, no reason to leave it out
            constant = run_all(constant_normaliser, problem, wide)
            if difference(found[:4], constant[:4]) <= tolerance:
                gates = difference(found[4:], constant[4:])
                rounded = f", those of the gates are {gates:.2g} off besides" if gates > tolerance else ""
                return None, f"gradients leave out the normaliser's (they are {error:.2g} off){rounded}"
    except Exception as problem_with_it:
        return one_line(problem_with_it), None
    return f"wrong: differs from the reference by {error:.2g}", None


# rows


REFERENCES = {("mlstm", "chunkwise"): "chunkwise", ("mlstm", "step"): "step"}


def compare(problem, contenders, clock, seconds, peaks, datasheet):
    """Rows of one problem: each pass, each implementation, with its roofline."""
    reference_form = REFERENCES.get((problem.op, problem.form), "reference")
    usable, notes, rows = {}, {}, []
    for name, call in contenders.items():
        reason, note = check(call, problem, clock.device, reference_form, name in peers(clock.device))
        if reason is None:
            usable[name], notes[name] = call, note
        else:
            rows.append({"problem": problem.name, "implementation": name, "error": reason})
    inputs = problem.make_inputs(clock.device)
    for backward in (False, True) if problem.backward else (False,):
        functions = {name: runner(call, problem, inputs, backward) for name, call in list(usable.items())}
        rows += judged(problem, measure(functions, clock, seconds), backward, peaks, datasheet)
    for row in rows:
        if note := notes.get(row["implementation"]):
            row["note"] = note
    return rows


def judged(problem, results, backward, peaks, datasheet):
    """Rows of measured times with FLOP/s, bandwidth, and floors."""
    work = roofline.work(problem, backward)
    rows = []
    for name, result in results.items():
        row = {"problem": problem.name, "pass": PASSES[backward], "implementation": name}
        if isinstance(result, str):
            rows.append(row | {"error": result})
            continue
        row |= {"ms": 1e3 * result.median, "host_ms": 1e3 * statistics.median(result.host),
                "rounds": len(result.seconds), "flops_per_s": work.flops / result.median,
                "bytes_per_s": work.num_bytes / result.median, "peak_bytes": result.peak_bytes}  # fmt: skip
        if peaks is not None:
            row["flops_of_peak"] = row["flops_per_s"] / peaks.bf16_flops_per_s
            row["bandwidth_of_peak"] = row["bytes_per_s"] / peaks.bytes_per_s
            row["floor_ms_measured_peaks"] = 1e3 * roofline.floor_s(problem, peaks, backward)[0]
        for device in datasheet:
            row[f"floor_ms_{device.name}"] = 1e3 * roofline.floor_s(problem, device, backward)[0]
        rows.append(row)
    return rows


def print_rows(rows):
    """One line a row: milliseconds, TFLOP/s, TB/s, share of the peaks, floor."""
    for row in rows:
        if "error" in row:
            print(f"  {row['implementation']:26s} {row.get('pass', ''):19s} {row['error']}", flush=True)
            continue
        text = f"  {row['implementation']:26s} {row['pass']:19s} {row['ms']:10.3f} ms"
        text += f" {row['flops_per_s'] / 1e9:10.1f} GFLOP/s"
        if "bytes_per_s" in row:
            text += f" {row['bytes_per_s'] / 1e9:8.1f} GB/s"
        if "flops_of_peak" in row:
            text += f"  {row['flops_of_peak']:5.1%} / {row['bandwidth_of_peak']:5.1%} of peak"
            text += f"  floor {row['floor_ms_measured_peaks']:.3f} ms"
        if row["peak_bytes"] is not None:
            text += f"  {row['peak_bytes'] / 2**20:8.0f} MiB"
        print(text + (f"  {row['note']}" if "note" in row else ""), flush=True)


def time_of(rows, name, which):
    return next((r["ms"] for r in rows if r["implementation"] == name and r.get("pass") == which and "ms" in r), None)


def geometric_mean(values):
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def target(value, threshold, at_least=True, text=""):
    """One of the issue's targets; not measured is not passed."""
    passed = value is not None and (value >= threshold if at_least else value <= threshold)
    return {"value": value, "threshold": threshold, "pass": passed, "what": text}


# the GPU


def measured_peaks(clock):
    """bf16 matrix products and copies of this GPU, as a device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    result = measure({"product": lambda: a @ b}, clock, 0.5)["product"]
    flops = 2 * 8192**3 / result.median
    source = torch.empty(2 * 2**30, dtype=torch.int8, device="cuda").random_()
    sink = torch.empty_like(source)
    result = measure({"copy": lambda: sink.copy_(source)}, clock, 0.5)["copy"]
    return Device("measured", flops, flops / 2, flops / 16, 2 * source.numel() / result.median)


def gpu_contenders():
    return {"ours": ours("triton"), **peers("cuda")}


def best_peer(rows, which):
    times = [
        r["ms"] for r in rows if r.get("pass") == which and "ms" in r and r["implementation"].startswith("triton_")
    ]
    return min(times, default=None)


def gpu_mlstm(shapes, clock, seconds, peaks, datasheet, out):
    """mLSTM against mlstm_kernels and attention."""
    ratios = {which: {} for which in PASSES}
    memory, attention_ratios = {}, {which: {} for which in PASSES}
    for problem in shapes:
        if out.late(problem.name):
            continue
        print(problem.name, flush=True)
        rows = compare(problem, gpu_contenders(), clock, seconds, peaks, datasheet)
        x = attention_inputs(problem, clock.device)
        for backward, which in enumerate(PASSES):
            name = f"SDPA, heads of {HEAD_DIM}"
            try:
                function = runner(attention, problem, x, bool(backward))
                result = measure({name: function}, clock, seconds / 2)[name]
            except Exception as error:
                result = one_line(error)
            row = {"problem": problem.name, "implementation": name, "pass": which}
            if isinstance(result, str):
                rows.append(row | {"error": result})
                continue
            s = problem.size
            flops = roofline.attention_flops(s["B"], s["T"], s["H"] * s["d_v"] // HEAD_DIM, HEAD_DIM, bool(backward))
            row |= {
                "ms": 1e3 * result.median,
                "host_ms": 1e3 * statistics.median(result.host),
                "flops_per_s": flops / result.median,
                "peak_bytes": result.peak_bytes,
            }
            rows.append(row)
        del x
        print_rows(rows)
        for which in PASSES:
            mine, theirs = time_of(rows, "ours", which), best_peer(rows, which)
            if mine and theirs:
                ratios[which][problem.name] = theirs / mine
            if mine and (other := time_of(rows, f"SDPA, heads of {HEAD_DIM}", which)):
                attention_ratios[which][problem.name] = other / mine
        peak = {
            r["implementation"]: r["peak_bytes"] for r in rows if r.get("pass") == PASSES[1] and r.get("peak_bytes")
        }
        others = [value for name, value in peak.items() if name.startswith("triton_")]
        if "ours" in peak and others:
            memory[problem.name] = peak["ours"] / min(others)
        shown = [f"{which} {ratios[which][problem.name]:.2f}x" for which in PASSES if problem.name in ratios[which]]
        shown += [f"{which} {attention_ratios[which][problem.name]:.2f}x SDPA" for which in PASSES
                  if problem.name in attention_ratios[which]]  # fmt: skip
        print(f"  best peer / ours: {', '.join(shown) or 'nothing to compare'}", flush=True)
        out.rows += rows
    out.summary["mlstm_speedup_over_best_peer"] = ratios
    out.summary["mlstm_speedup_over_sdpa"] = attention_ratios
    out.summary["mlstm_peak_memory_of_best_peer"] = memory
    for which in PASSES:
        values = ratios[which].values() if len(ratios[which]) == len(shapes) else []
        key = which.replace(" + ", "_")
        out.targets[f"mlstm_{key}_slowest_shape"] = target(min(values, default=None), 1.0, text="best peer / ours")
        out.targets[f"mlstm_{key}_geometric_mean"] = target(geometric_mean(values), 1.2, text="best peer / ours")
    worst = max(memory.values()) if len(memory) == len(shapes) else None
    out.targets["mlstm_peak_memory"] = target(worst, 1.0, at_least=False, text="ours / least of the peers, worst shape")


def gpu_step(steps, clock, seconds, peaks, datasheet, out):
    """The step kernel against the bandwidth of memory."""
    shares = {}
    for problem in steps:
        if out.late(problem.name):
            continue
        print(problem.name, flush=True)
        rows = compare(problem, {"ours": ours("triton"), "torch": plain("step")}, clock, seconds, peaks, datasheet)
        print_rows(rows)
        if problem.size["B"] >= 32:
            found = [r["bandwidth_of_peak"] for r in rows if r["implementation"] == "ours" and "ms" in r]
            shares |= dict(zip([problem.name], found))
        out.rows += rows
    large = [problem for problem in steps if problem.size["B"] >= 32]
    worst = min(shares.values()) if large and len(shares) == len(large) else None
    out.targets["step_bandwidth"] = target(worst, 0.7, text="share of measured bandwidth, batches of 32 and more")


def gpu_others(cases, clock, seconds, peaks, datasheet, out):
    """Linear cross entropy, norms, gates: against plain PyTorch, and what else of ours there is."""
    gains = {}
    for problem in cases:
        if out.late(problem.name):
            continue
        print(problem.name, flush=True)
        contenders = {"ours": ours("triton"), "torch": plain("reference")}
        if problem.op == "linear_cross_entropy":
            contenders["torch, chunked (ours)"] = plain("chunked")
        rows = compare(problem, contenders, clock, seconds, peaks, datasheet)
        print_rows(rows)
        mine, theirs = (time_of(rows, name, PASSES[1]) for name in ("ours", "torch"))
        if mine and theirs:
            gains[problem.name] = theirs / mine
        out.rows += rows
    out.summary["speedup_over_torch"] = gains


# the CPU


def cpu_mlstm(lengths, dtypes, clock, seconds, out):
    """mLSTM against mlstm_kernels' native ones, forward + backward, two threads."""
    fastest = select("mlstm", "cpu", "chunkwise").backend
    contenders = {"ours": ours(fastest), "ours, backend torch": plain("chunkwise"), **peers("cpu")}
    if fastest != "cpu":
        contenders["ours, backend cpu"] = ours("cpu")
    out.summary["cpu_backend"] = fastest
    out.summary["cpu_matrix_units"] = tiles.in_use("mlstm") if fastest == "cpp" else "off"
    for T in lengths:
        for dtype in dtypes:
            problem = problems.mlstm(8, 2, T, 64, 128, dtype)
            print(problem.name, flush=True)
            rows = compare(problem, contenders, clock, seconds * T / 512, None, [])
            print_rows(rows)
            others = [time_of(rows, name, PASSES[1]) for name in peers("cpu")]
            mine, best = time_of(rows, "ours", PASSES[1]), min((ms for ms in others if ms), default=None)
            ratio = best / mine if mine and best else None
            print(
                f"  better of the two native / ours, forward + backward: {f'{ratio:.2f}x' if ratio else 'not measured'}"
            )
            name = f"cpu_mlstm_T{T}_{str(dtype).removeprefix('torch.')}"
            out.targets[name] = target(ratio, 2.0, text="better of native_custbw and native_autograd / ours")
            out.rows += rows


# the whole


@dataclass
class Output:
    """What the JSON line holds."""

    deadline: float
    rows: list = field(default_factory=list)
    targets: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    skipped: list = field(default_factory=list)

    def late(self, name):
        """Whether there is no time left for a row; then it is noted."""
        if time.perf_counter() < self.deadline:
            return False
        print(f"{name}: skipped, no time left (--minutes)", flush=True)
        self.skipped.append(name)
        return True


def versions():
    names = ("torch", "triton", "mlstm_kernels", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu_problems(quick):
    """(mLSTM, step, other) problems of the GPU benchmark."""
    mlstm = problems.speed_problems()
    steps = problems.step_problems()
    others = [problems.cross_entropy(8192, d) for d in (768, 2048)]
    others += [
        problems.rms_norm(16384, 2048),
        problems.head_norm_gate(2, 8192, 8, 256),
        problems.gated_silu(16384, 5504),
    ]
    if quick:
        mlstm, steps, others = [mlstm[2], mlstm[3]], [steps[2]], [others[0], *others[2:]]
    return mlstm, steps, others


def warm_up_one(index, name, quick):
    """Compile what one implementation needs for one problem, by running it; errors are told when it is measured."""
    mlstm, steps, others = gpu_problems(quick)
    problem = [*mlstm, *steps, *others][index]
    contenders = {"ours": ours("triton"), **peers("cuda")}
    for case in (problem, small(problem)):
        run_all(contenders[name], case, case.make_inputs("cuda"))
    torch.cuda.synchronize()


def warm_up(quick, processes):
    """Compile side by side, into the caches on disk."""
    mlstm, steps, others = gpu_problems(quick)
    work = [(index, name) for index in range(len(mlstm)) for name in ["ours", *peers("cuda")]]
    work += [(len(mlstm) + index, "ours") for index in range(len(steps) + len(others))]

    def one(item):
        command = [sys.executable, __file__, "--warm-up", str(item[0]), item[1], *(["--quick"] if quick else [])]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        failed = sum(code != 0 for code in pool.map(one, work))
    print(f"compiled in {time.perf_counter() - start:.0f} s ({failed} of {len(work)} warm-ups failed)", flush=True)


def gpu(args, out):
    properties = torch.cuda.get_device_properties(0)
    if args.compile:
        warm_up(args.quick, args.processes)
    clock = GPUClock()
    peaks = measured_peaks(clock)
    datasheet = {d.name: d for d in (DEVICES["H100"], DEVICES["H200"], find_device(properties.name)) if d is not None}
    out.summary |= {"peak_bf16_flops_per_s": peaks.bf16_flops_per_s, "peak_bytes_per_s": peaks.bytes_per_s}
    print(f"{properties.name}: bf16 products {peaks.bf16_flops_per_s / 1e12:.0f} TFLOP/s, "
          f"copies {peaks.bytes_per_s / 1e12:.2f} TB/s", flush=True)  # fmt: skip
    if not peers("cuda"):
        print("mlstm_kernels is not installed: nothing to compare the mLSTM with but attention", flush=True)
    mlstm, steps, others = gpu_problems(args.quick)
    seconds = 0.3 if args.quick else 0.8
    gpu_mlstm(mlstm, clock, seconds, peaks, datasheet.values(), out)
    gpu_step(steps, clock, seconds / 2, peaks, datasheet.values(), out)
    gpu_others(others, clock, seconds / 2, peaks, datasheet.values(), out)
    return properties.name


def cpu(args, out):
    torch.set_num_threads(args.threads)
    if not peers("cpu"):
        print("mlstm_kernels is not installed: nothing to compare with but our own", flush=True)
    lengths, dtypes = (512,), (torch.float32,)
    if not args.quick:
        lengths, dtypes = (512, 4096), (torch.float32, torch.bfloat16)
    cpu_mlstm(lengths, dtypes, CPUClock(), 1.0 if args.quick else 4.0, out)
    return f"{platform.machine()} CPU, {args.threads} threads"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU benchmark (default: 2)")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no new row after this time (default: 6.5)")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="compilations side by side")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not compile side by side first")
    parser.add_argument("--warm-up", nargs=2, metavar=("PROBLEM", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.warm_up:
        warm_up_one(int(args.warm_up[0]), args.warm_up[1], args.quick)
        return 0
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    start = time.perf_counter()
    out = Output(deadline=start + 60 * args.minutes)
    name = gpu(args, out) if device == "cuda" else cpu(args, out)
    for key, value in out.targets.items():
        shown = "not measured" if value["value"] is None else f"{value['value']:.3g}"
        print(f"{'pass' if value['pass'] else 'FAIL'}  {key}: {shown} (target {value['threshold']}; {value['what']})")
    print(json.dumps({
        "device": name, "versions": versions(), "quick": args.quick, "minutes": (time.perf_counter() - start) / 60,
        "targets": out.targets, "summary": out.summary, "skipped": out.skipped, "rows": out.rows,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
