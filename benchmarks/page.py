"""Write docs/benchmarks.md and its figure from benchmarks/results: python benchmarks/page.py"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
FIGURE = PAGE.parent / "figures" / "benchmarks.png"
NAMES = {"xlstm": "xLSTM", "transformer": "Transformer", "hybrid": "hybrid"}
HEAD = """# Benchmarks

<!-- written by `python benchmarks/page.py` from benchmarks/results/; edit that script, or record a benchmark -->

Every figure here comes from a file of [benchmarks/results](../benchmarks/results), which holds what a benchmark printed
as JSON, with date, machine, commit and command; [benchmarks/README.md](../benchmarks/README.md) says what is measured.
Ratios are taken in one run, the two sides in turn; times belong to their machine. Record on a machine that does
nothing else:

```bash
python benchmarks/record.py benchmarks/decoding.py --quick
```

Earlier measurements, without such files, are in the [log](log.md) and in the pages of their subjects.
"""

Table = tuple[list[str], list[list[str]]]


def decoding(result: dict) -> list[Table]:
    header = [
        "model",
        "width x blocks x vocabulary",
        "batch",
        "our matrices",
        "step [ms]",
        "Hugging Face's step / ours",
        "share of the bandwidth",
    ]
    rows = []
    for row in result["rows"]:
        ratio = f"{row['ratio_transformers']:.2f}" if "ratio_transformers" in row else "–"
        step = f"{1e3 * row['step_time_s']['decoder']:.3g}"
        rows.append(
            [
                NAMES[row["arch"]],
                row["size"],
                str(row["batch"]),
                row["dtype"],
                step,
                ratio,
                f"{row['roofline_share']:.0%}",
            ]
        )
    flat = [[flat["size"], f"{flat['ratio']:.2f}"] for flat in result["flat"]]
    return [(header, rows), (["xLSTM", "step after 16,384 tokens / after 256"], flat)]


def training(result: dict) -> list[Table]:
    header = ["model", "tokens/s", "Hugging Face's", "ratio", "ratio by CPU time", "share of the products' peak"]
    rows = []
    for arch in result["ratio"]:
        speeds = [f"{result['tokens_per_s'][name]:,}" for name in (arch, f"hf_{arch}")]
        ratios = [f"{result[name][arch]:.2f}" for name in ("ratio", "ratio_cpu_time")]
        rows.append([NAMES[arch], *speeds, *ratios, f"{result['mfu'][arch]:.0%}"])
    return [(header, rows)]


def dag(result: dict) -> list[Table]:
    header = ["study", "runs", "call", "CPU s", "wall s", "peak memory [MB]"]
    rows = []
    for study, found in result.items():
        for call in ("dry_run", "no_op_dry_run", "no_op_rerun"):
            if isinstance(found, dict) and call in found:
                cost = found[call]
                numbers = [f"{cost['cpu_s']:.1f}", f"{cost['wall_s']:.1f}", f"{cost['peak_memory_bytes'] / 1e6:.0f}"]
                rows.append([study, str(found["runs"]), call.replace("_", " "), *numbers])
    return [(header, rows)]


def norms_and_gates(result: dict) -> list[Table]:
    header = ["operation", "size", "dtype", "threads", "autograd / fused", "GB/s"]
    keys = ("op", "size", "dtype", "threads", "speedup", "gigabytes_per_s")
    return [
        (
            header,
            [
                ["x".join(map(str, v)) if isinstance(v, list) else str(v) for v in map(row.get, keys)]
                for row in result["rows"]
            ],
        )
    ]


def anything(result: dict) -> list[Table]:
    """Numbers and words of the JSON's first levels; of lists the rows that are targets."""

    def flat(value: dict, prefix: str = "") -> list[list[str]]:
        rows = []
        for key, item in value.items():
            if isinstance(item, dict) and not prefix.count("."):
                rows += flat(item, f"{prefix}{key}.")
            elif isinstance(item, bool | int | str):
                rows.append([f"`{prefix}{key}`", str(item)])
            elif isinstance(item, float):
                rows.append([f"`{prefix}{key}`", f"{item:.4g}"])
        return rows

    return [(["", ""], flat(result))]


TABLES: dict[str, Callable[[dict], list[Table]]] = {
    "decoding": decoding,
    "training": training,
    "dag": dag,
    "norms_and_gates": norms_and_gates,
}


def ratios(record: dict) -> list[tuple[str, float]]:
    """What a benchmark compares: (label, how many times the peer's speed)."""
    result = record["result"]
    if record["benchmark"] == "decoding":
        rows = [row for row in result["rows"] if "ratio_transformers" in row]
        return [
            (f"{NAMES[r['arch']]} {r['size']}, batch {r['batch']}, {r['dtype']}", r["ratio_transformers"]) for r in rows
        ]
    if record["benchmark"] == "training":
        return [(NAMES[arch], value) for arch, value in result["ratio"].items()]
    if record["benchmark"] == "norms_and_gates":
        return [(f"{r['op']} {'x'.join(map(str, r['size']))} {r['dtype']}", r["speedup"]) for r in result["rows"]]
    if record["benchmark"] == "kernels":
        found = [(name, target["value"]) for name, target in result["targets"].items() if name.startswith("cpu_mlstm")]
        return [(name.removeprefix("cpu_mlstm_").replace("_", ", "), value) for name, value in found if value]
    return []


PEERS = {
    "decoding": "decoding, against Hugging Face",
    "training": "training, against Hugging Face",
    "kernels": "mLSTM on a CPU, against the better of mlstm_kernels' two",
    "norms_and_gates": "norms and gates, against autograd",
}


def load(folder: Path) -> list[dict]:
    """All records, the newest first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: (record["date"], record["benchmark"]), reverse=True)


def described(record: dict) -> str:
    machine = record["machine"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])})", *machine["gpus"]]
    parts += [f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "triton") if machine.get(name)]
    code = (
        f"commit {record['commit'][:10]}{' with changes' if record['changed'] else ''}"
        if record["commit"]
        else "no commit"
    )
    took = f"{record['seconds']:.0f} s; other processes used {record['load_of_others']:.0%} of the CPUs"
    return f"{record['date']}, `{record['command']}`, {code}; {'; '.join(parts)}; {took}."


def page(records: list[dict], figure: str | None) -> str:
    """The page as text; ``figure``: the image's path relative to it."""
    lines = [HEAD]
    if not records:
        lines += ["Nothing is recorded yet.", ""]
    elif figure and any(ratios(record) for record in records):
        lines += [f"![Speed of ours over that of the peers]({figure})", ""]
    for record in records:
        lines += [
            f"## {record['benchmark'].replace('_', ' ').capitalize()}, {record['date']}",
            "",
            described(record),
            "",
        ]
        for header, rows in TABLES.get(record["benchmark"], anything)(record["result"]):
            if rows:
                body = [f"| {' | '.join(row)} |" for row in rows]
                lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *body, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def draw(records: list[dict], path: Path) -> None:
    """Ratios of each benchmark's last day, one panel each; a line at 1: as fast as the peer."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    days: dict[str, str] = {}
    newest: dict[str, dict[str, float]] = {}
    for record in records:
        name = record["benchmark"]
        if ratios(record) and days.setdefault(name, record["date"]) == record["date"]:
            newest[name] = dict(ratios(record)) | newest.get(name, {})
    if not newest:
        return
    heights = [len(found) + 1.5 for found in newest.values()]
    fig = Figure(figsize=(8, 0.26 * sum(heights) + 0.6), layout="constrained")
    axes = fig.subplots(len(newest), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, found) in zip(axes, newest.items(), strict=True):
        labels, values = zip(*found.items(), strict=True)
        places = range(len(values))
        ax.barh(places, values, color="#4c72b0", height=0.6)
        for place, value in zip(places, values, strict=True):
            ax.annotate(f"{value:.2f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(yticks=places, yticklabels=labels, xlim=(0, 1.12 * max(1, *values)))
        ax.invert_yaxis()
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6))
        ax.set_title(f"{PEERS[name]} ({days[name]})", fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("our speed over the peer's", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    args = parser.parse_args()
    records = load(args.results)
    draw(records, args.page.parent / "figures" / FIGURE.name)
    args.page.write_text(page(records, f"figures/{FIGURE.name}"))


if __name__ == "__main__":
    main()
