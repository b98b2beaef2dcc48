"""``xlstm-scaling recommend``: the best model for a budget, a context and latency limits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DESCRIPTION = "the best model for a budget, a context and latency limits, by a study's laws (docs/choosing.md)"
EPILOG = """exit status: 0 there is a model, 3 no model answers the question (the answer says what binds), 1 an error

examples:
  xlstm-scaling recommend --flops 1e21 --context-length 16384 --device h100 --max-ttft-s 0.5 --batch-size 8
  xlstm-scaling recommend --loss 2.5 --context-length 8192 --device h100 --count 64
  xlstm-scaling recommend --flops 1e21 --tokens-served 1e12 --context-length 8192"""


def add_recommend_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    ask = parser.add_argument_group("what is asked (one of --flops, --loss, --total-flops, or a model)")
    ask.add_argument("--flops", type=float, metavar="C", help="training budget [FLOPs]")
    ask.add_argument("--loss", type=float, metavar="L", help="least budget that reaches this loss [nat/token]")
    ask.add_argument("--total-flops", type=float, metavar="C", help="budget of training and serving together [FLOPs]")
    ask.add_argument("--num-params", type=float, metavar="N", help="a model of this size")
    ask.add_argument("--num-tokens", type=float, metavar="D", help="trained on so many tokens")
    ask.add_argument("--context-length", type=int, required=True, metavar="T", help="of training [tokens]")
    serve = parser.add_argument_group("serving")
    text = "prompt and generated tokens over the model's life: minimise training + inference FLOPs"
    serve.add_argument("--tokens-served", type=float, default=0.0, metavar="Q", help=text)
    serve.add_argument("--prefill-length", type=int, metavar="P", help="prompt [tokens] (default: the context)")
    serve.add_argument("--generate-length", type=int, default=1, metavar="G", help="tokens out a request (default: 1)")
    serve.add_argument("--batch-size", type=int, default=1, metavar="B", help="requests side by side (default: 1)")
    serve.add_argument("--max-ttft-s", type=float, metavar="S", help="limit of the time to first token [s]")
    serve.add_argument("--max-step-time-s", type=float, metavar="S", help="limit of the time of a decode step [s]")
    text = "limit of weights, state and activations (default: with a time limit, 90%% of the device's memory)"
    serve.add_argument("--max-serving-bytes", type=float, metavar="BYTES", help=text)
    where = parser.add_argument_group("devices")
    where.add_argument("--device", metavar="NAME", help="data sheet of training and serving, e.g. h100")
    where.add_argument("--count", type=int, default=1, help="devices that train (default: 1)")
    text = "share of the peak in training (default: that of the study's runs, else 0.4 is assumed)"
    where.add_argument("--utilisation", type=float, metavar="SHARE", help=text)
    text = "tokens of a training step (default: as the study's runs nearest in FLOPs)"
    where.add_argument("--batch-tokens", type=int, metavar="TOKENS", help=text)
    laws = parser.add_argument_group("laws")
    text = "folder of the stage `fit` (default: the newest of results/*/fits)"
    laws.add_argument("--laws", type=Path, metavar="FITS", help=text)
    text = (
        "folder of the stage `inference` (default: the one beside the laws, unless --device names another device; "
        "without one a roofline of the data sheet is assumed)"
    )
    laws.add_argument("--runtime", type=Path, metavar="INFERENCE", help=text)
    laws.add_argument("--subset", choices=["all", "isoflop", "tokenparam"], help="runs of the loss surface")
    laws.add_argument("--form", choices=["gamma_free", "gamma_fixed"], help="form of the loss surface")
    laws.add_argument("--vocab-size", type=int, metavar="V", help="of the models (default: that of the study)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def find_laws(results: Path = Path("results")) -> Path:
    """The fits that were written last. Raises PlanningError where there are none."""
    from xlstm_scaling.planning.errors import PlanningError

    found = sorted(results.glob("*/fits/surface.parquet"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise PlanningError(
            f"no laws in {results}/*/fits: give --laws FOLDER, or make them (`make reproduce` trains a study, "
            "`make paper PAPER=FOLDER` fits published runs)"
        )
    return found[-1].parent


def run_recommend(args: argparse.Namespace) -> int:
    """Answer and print; 3 where no model answers the question."""
    from xlstm_scaling.accounting.hardware import find_device
    from xlstm_scaling.planning.errors import PlanningError
    from xlstm_scaling.planning.laws import load_laws
    from xlstm_scaling.planning.question import Question
    from xlstm_scaling.planning.recommend import EXIT_INFEASIBLE, recommend
    from xlstm_scaling.planning.runtime import load_runtime, named_device, same_device
    from xlstm_scaling.planning.text import as_text
    from xlstm_scaling.planning.training import TrainingSetup

    names = ("flops", "loss", "total_flops", "num_params", "num_tokens", "context_length", "tokens_served")
    names += ("prefill_length", "generate_length", "batch_size", "max_ttft_s", "max_step_time_s", "max_serving_bytes")
    question = Question(**{name: getattr(args, name) for name in names})
    if args.count < 1:
        raise PlanningError(f"--count must be at least 1, not {args.count}")
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise PlanningError(f"--utilisation is a share of the peak, above 0 and at most 1, not {args.utilisation:g}")
    if args.utilisation is not None and args.device is None:
        raise PlanningError("--utilisation is a share of a data sheet's peak: name it by --device")
    for name in ("batch_tokens", "vocab_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise PlanningError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    folder = find_laws() if args.laws is None else args.laws
    laws = load_laws(folder, args.subset, args.form)
    runtime = load_runtime(args.runtime, args.device, Path(laws.source).parent / "inference")
    device = args.device or (runtime.device if runtime is not None else "")
    sheet = find_device(device)
    if args.device is not None and sheet is None and not (runtime and same_device(args.device, runtime.device)):
        named_device(args.device)  # says which there are
    setup = TrainingSetup(sheet, args.count, args.utilisation, args.batch_tokens)
    answer = recommend(question, laws, runtime, setup, args.vocab_size)
    print(json.dumps(answer, indent=1) if args.json else as_text(answer))
    return 0 if answer["status"] == "feasible" else EXIT_INFEASIBLE
