"""``xlstm-scaling certify``: the kernels of this device against float64; the worst errors; a certificate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xlstm_scaling.kernels.arguments import add_compile_arguments

#: columns of errors and their names in the certificate
ERRORS = {"error": "error", "limit": "limit", "PyTorch": "reference_error"}


def add_certify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling certify``."""
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="write the certificate here (JSON)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = cuda where there is one (default)")
    add("--backend", nargs="+", metavar="NAME", help="only these: torch, cpu, cpp, triton (default: the device's)")
    add("--op", nargs="+", metavar="NAME", help="only these operations, e.g. mlstm rms_norm")
    dtypes = "float32, bfloat16, float16 (default: float32 bfloat16)"
    add("--dtype", nargs="+", metavar="NAME", default=["float32", "bfloat16"], help=dtypes)
    add("--quick", action="store_true", help="fewer shapes; still every output and gradient of every kernel")
    add("--report-only", action="store_true", help="exit with 0 although a kernel fails: the certificate refuses it")
    add("--threads", type=int, metavar="N", help="threads of PyTorch on the CPU (default: 1; all beside a GPU)")
    add("--quiet", action="store_true", help="no progress bar")
    ahead = parser.add_argument_group("compile ahead of time, without a GPU")
    text = "compile the Triton kernels instead; registers, spills, shared memory, matrix units; --out: .csv or .json"
    ahead.add_argument("--compile", action="store_true", help=text)
    add_compile_arguments(ahead)


def run_certify(args: argparse.Namespace) -> int:
    """Certify; 1 where a kernel fails."""
    if args.compile:
        from xlstm_scaling.kernels.compile_command import run_compile

        return run_compile(args)
    import torch

    from xlstm_scaling.kernels.certification.run import certify
    from xlstm_scaling.study.files import write_json_atomic

    device = args.device
    if device == "auto":
        for_cpu = args.backend and {"cpu", "cpp"}.issuperset(args.backend)
        device = "cuda" if torch.cuda.is_available() and not for_cpu else "cpu"
    if args.threads is not None or device == "cpu":
        torch.set_num_threads(args.threads or 1)
    level = "quick" if args.quick else "full"
    certificate = certify(device, args.op, args.backend, args.dtype, level, progress=not args.quiet)
    print(summary(certificate))
    if args.out is not None:
        write_json_atomic(args.out, certificate)
        print(f"certificate: {args.out}")
    failures = failed_lines(certificate)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures and not args.report_only else 0


def summary(certificate: dict) -> str:
    """The worst tensor of every kernel as a table, and what else is to be known."""
    import pandas as pd

    from xlstm_scaling.kernels.certification.certificate import device_name

    rows = []
    ill: list[str] = []
    for entry in certificate["kernels"]:
        worst = entry["worst"]
        rows.append(
            {
                "kernel": f"{entry['op']} {entry['form']} ({entry['backend']})",
                "dtype": entry["dtype"],
                "cases": len(entry["cases"]),
                "passed": "yes" if entry["passed"] else "NO",
                "worst": worst["tensor"] if worst else "-",
                **{title: _text(worst[key]) if worst else "-" for title, key in ERRORS.items()},
                "in case": worst["case"] if worst else "-",
            }
        )
        for case, checks in entry["cases"].items():
            names = [name for name, check in checks.items() if check.get("ill_conditioned")]
            if names:
                ill.append(f"{rows[-1]['kernel']} {entry['dtype']}, {case}: {', '.join(names)}")
    lines = [pd.DataFrame(rows).to_string(index=False, justify="left")]
    lines += [f"ill-conditioned, as PyTorch itself misses the threshold: {line}" for line in ill]
    lines += [f"not available: {line}" for line in certificate["unavailable"]]
    if certificate["interpreted"]:
        lines.append("interpreted: this certifies no GPU")
    device = device_name(certificate["device"])
    passed = sum(entry["passed"] for entry in certificate["kernels"])
    lines.append(
        f"{passed} of {len(certificate['kernels'])} passed on {device}, {certificate['level']}, "
        f"{certificate['duration_s']:.0f} s; errors are RMS-relative, against float64"
    )
    return "\n".join(lines)


def _text(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.1e}"


def failed_lines(certificate: dict) -> list[str]:
    """One line a failure: kernel, dtype, tensor, case."""
    return [
        f"FAILED {entry['op']} {entry['form']} ({entry['backend']}) in {entry['dtype']}: {failure}"
        for entry in certificate["kernels"]
        for failure in entry["failures"]
    ]
