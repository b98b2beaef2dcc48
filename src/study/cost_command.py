"""The command ``xlstm-scaling cost``: what a study will cost, by stage and by experiment set."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from xlstm_scaling.accounting.hardware import ASSUMED_UTILISATION, DEVICES, find_device
from xlstm_scaling.study.amounts import duration_text, size_text

if TYPE_CHECKING:  # pandas would be imported for every command
    from xlstm_scaling.study.cost import Cost, Row

DESCRIPTION = "what a study will cost: FLOPs, device hours, wall time, storage and energy by stage and experiment set"


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. study=paper")
    parser.add_argument("--config", nargs="+", default=[], metavar="OVERRIDE", help="the same, as with snakemake")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where finished runs say how fast they were"
    )
    known = ", ".join(DEVICES).lower()
    parser.add_argument("--device", help=f"{known} (default: what the study's hardware assumes of a run)")
    parser.add_argument("--count", type=int, help="devices at once (default: those of one run)")
    text = f"share of the device's peak where no run has finished on one (default: {ASSUMED_UTILISATION:g})"
    parser.add_argument("--utilisation", type=float, default=ASSUMED_UTILISATION, help=text)
    parser.add_argument("--power-w", type=float, help="of a device [W] (default: its board's maximum)")
    parser.add_argument("--price-per-hour", type=float, default=math.nan, help="of a device, in any currency")
    parser.add_argument("--cores", type=int, default=64, help="CPU cores that tokenize (default: 64)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_cost(args: argparse.Namespace) -> int:
    """Print the cost. ValueError for options that make no sense."""
    from xlstm_scaling.study.config import compose, is_published
    from xlstm_scaling.study.cost import Rates, study_cost

    device = None
    if args.device is not None:
        device = find_device(args.device)
        if device is None:
            raise ValueError(f"--device {args.device} is not known; known: {', '.join(DEVICES).lower()}")
    if not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation is a share of the peak, above 0 and at most 1, not {args.utilisation:g}")
    config = compose([*args.overrides, *args.config])
    if is_published(config):
        raise ValueError("published runs cost nothing: give the study alone, e.g. study=paper")
    count = args.count or config.hardware.devices_per_run * config.hardware.nodes_per_run
    if min(count, args.cores) < 1:
        raise ValueError("--count and --cores must be at least 1")
    power = args.power_w if args.power_w is not None else device.power_w if device is not None else math.nan
    cost = study_cost(
        config, args.results, Rates(device, count, args.utilisation, power, args.price_per_hour, args.cores)
    )
    if args.json:
        about = {"study": config.study.name, "device": None if device is None else device.name, "count": count}
        print(json.dumps(about | cost.as_dict()))
        return 0
    name = device.name if device is not None else config.hardware.device
    print(f"{config.study.name}: {config.study.title}, on {count} x {name}\n")
    print("\n".join(table_lines(cost)))
    return 0


def table_lines(cost: Cost) -> list[str]:
    """The table, and what it rests on."""
    priced = any(row.price and math.isfinite(row.price) for row in cost.rows)
    columns = ["stage", "set", "runs", "FLOPs", "device hours", "core hours", "wall time", "storage", "energy"]
    columns += ["price"] if priced else []
    rows = [columns, *(_cells(row, priced) for row in (*cost.rows, cost.total))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(-1, "-" * len(lines[0]))
    longest = cost.longest_run
    took = duration_text(longest["time_s"])
    lines += ["", f"longest run: {longest['run']}, {took} on {longest['devices']} device(s)"]
    lines.append(f"checkpoints of runs at work: up to {size_text(cost.peak_checkpoint_bytes)} more")
    if cost.finished_runs:
        lines.append(f"{cost.finished_runs} of {cost.total.runs} runs have finished here; they are counted")
    lines += [f"warning: {text}" for text in cost.warnings]
    return lines + ["", "assumed or measured:"] + [f"  {text}" for text in cost.assumptions]


def _cells(row: Row, priced: bool) -> list[str]:
    cells = [row.stage, row.experiment_set, str(row.runs or ""), f"{row.flops:.3g}" if row.flops else ""]
    cells += [f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}" for hours in (row.device_hours, row.core_hours)]
    cells += [duration_text(row.wall_time_s), size_text(row.storage_bytes)]
    cells.append(f"{row.energy_j / 3.6e6:,.4g} kWh" if math.isfinite(row.energy_j) else "? (--power-w)")
    return cells + ([f"{row.price:,.2f}"] if priced else [])


def _line(cells: list[str], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
    return "  ".join(left + [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]).rstrip()
