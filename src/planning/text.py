"""The answer as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xlstm_scaling.accounting import label

LIMIT_NAMES = {"ttft_s": "time to first token", "step_time_s": "step time", "serving_bytes": "serving memory"}
QUANTITIES = {
    "num_params": "parameters", "num_tokens": "training tokens", "tokens_per_param": "tokens per parameter",
    "num_flops": "training FLOPs", "context_length": "context", "batch_size": "batch", "prefill_length": "prompt",
}  # fmt: skip
INK = 37


def as_text(answer: Mapping[str, Any]) -> str:
    """The mapping of `recommend.recommend` as lines."""
    return "\n".join(_lines(answer))


def _lines(answer: Mapping[str, Any]) -> Iterator[str]:
    question = answer["question"]
    yield f"context {question['context_length']:,}; {answer['objective']}"
    if answer["target"] and question["loss"] is None:
        yield f"loss to reach: {answer['target']['loss']:.4f} nat/token"
    yield ""
    archs = answer["architectures"]
    yield _row("", *(label(arch) for arch in archs))
    for quantity, cells in _table(archs):
        if set(cells) - {"-", "unknown"}:
            yield _row(quantity, *cells)
    yield ""
    yield from _verdict(answer)
    for arch, part in archs.items():
        yield from _trouble(arch, part)
    for arch, part in archs.items():
        for entry in (part["choice"] or {}).get("extrapolation", []):
            low, high = (_si(end) for end in entry["seen"])
            yield (
                f"extrapolation: {label(arch)}, {QUANTITIES[entry['quantity']]} {_si(entry['value'])}, "
                f"{entry['factor']:.3g} times {entry['side']} the {low} to {high} of the {entry['of']}"
            )
    for note in answer["notes"]:
        yield f"note: {note}"
    yield f"laws: {answer['sources']['laws']}; intervals {answer['sources']['confidence']:.0%}"
    if answer["sources"]["runtime"]:
        yield f"times: {answer['sources']['runtime']}"


def _row(quantity: str, *cells: str) -> str:
    return f"{quantity:26s}" + "".join(f"{cell:>{INK}s}" for cell in cells)


def _table(archs: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    parts = list(archs.values())
    models = [part["choice"] for part in parts]
    yield "N* by the surface", [_span(part["optimum"]["num_params"], _si) for part in parts]
    yield "N* by IsoFLOP power law", [_span((part["isoflop_optimum"] or {}).get("num_params"), _si) for part in parts]
    yield "D* by the surface", [_span(part["optimum"]["num_tokens"], _si) for part in parts]
    yield "D* by IsoFLOP power law", [_span((part["isoflop_optimum"] or {}).get("num_tokens"), _si) for part in parts]
    yield "the model", [_shape(model) for model in models]
    yield "  parameters", [_of(model, lambda m: _si(m["num_params"])) for model in models]
    yield "  tokens", [_of(model, lambda m: _span(m["num_tokens"], _si)) for model in models]
    yield "  tokens per parameter", [_of(model, lambda m: f"{m['tokens_per_param']:.3g}") for model in models]
    yield "  loss [nat/token]", [_of(model, lambda m: _span(m["loss"], "{:.3f}".format)) for model in models]
    yield "  by other forms", [_of(model, _forms) for model in models]
    yield "  training FLOPs", [_of(model, lambda m: _span(m["training_flops"], _flops)) for model in models]
    if any(model and model["serving_flops"] for model in models):
        yield "  serving FLOPs", [_of(model, lambda m: _flops(m["serving_flops"])) for model in models]
        yield "  total FLOPs", [_of(model, lambda m: _span(m["total_flops"], _flops)) for model in models]
    yield "  training time", [_of(model, _training) for model in models]
    yield "  training memory a device", [_of(model, _training_memory) for model in models]
    yield "  time to first token", [_of(model, lambda m: _seconds(m["ttft_s"])) for model in models]
    yield "  step time", [_of(model, lambda m: _seconds(m["step_time_s"])) for model in models]
    yield "  serving memory", [_of(model, lambda m: _bytes(m["serving_memory_bytes"]["total"])) for model in models]
    yield "  cost of the limits", [_cost(part["cost_of_limits"]) for part in parts]


def _of(model: Mapping[str, Any] | None, text: Any) -> str:
    return "-" if model is None else text(model)


def _verdict(answer: Mapping[str, Any]) -> Iterator[str]:
    if answer["status"] == "infeasible":
        yield "infeasible: no model answers this question"
        return
    if answer["best"] is None:
        yield "no best one: the budgets differ"
        return
    verdict = f"best: {label(answer['best'])}"
    comparison = answer["comparison"]
    if comparison:
        pairs, share = comparison["paired_resamples"], comparison["probability_best"]
        gap = comparison["advantage"]
        if comparison["of"] == "loss":
            verdict += f", by {_span(gap, '{:.4f}'.format)} nat/token over {label(comparison['second'])}"
        else:
            verdict += f"; {label(comparison['second'])} needs {_span(gap, '{:.3g}'.format)} times its FLOPs"
        if share is not None:
            verdict += f"; the better one in {share:.1%} of {pairs:,} paired resamples"
    yield verdict
    cost = (answer["limits"] or {}).get("cost")
    if cost:
        target = answer["target"] or {}
        loss = cost["loss"] + (target.get("loss", 0) - (target.get("loss_without_limits") or target.get("loss", 0)))
        if loss < 5e-5 and cost["flops_ratio"] < 1.0005:
            yield "the limits cost nothing"
        else:
            without = f"{label(cost['best_without'])} is as good with 1/{cost['flops_ratio']:.3g} of the FLOPs"
            yield f"the limits cost {loss:.4f} nat/token; without them {without}"


def _trouble(arch: str, part: Mapping[str, Any]) -> Iterator[str]:
    if part["status"] == "ok":
        return
    found = part["infeasible"]
    if part["detail"]:
        yield f"{label(arch)}: {part['detail']}"
    if part["status"] != "infeasible":
        return
    together = " together" if 1 < len(found["binding"]) == len(found["nearest"]) else ""
    names = " and ".join(LIMIT_NAMES[limit] for limit in found["binding"])
    yield f"{label(arch)}: no model keeps the limit of {names}{together}"
    for limit, entry in found["nearest"].items():
        if entry["needed"] is not None:
            needed = f"{_limited(limit, entry['needed'])} ({_si(entry['num_params'])} parameters)"
            yield f"  {LIMIT_NAMES[limit]} of {_limited(limit, entry['limit'])}: {needed} would do, all else kept"
    if all(entry["needed"] is None for entry in found["nearest"].values()):
        jointly = found["jointly"]
        values = ", ".join(f"{LIMIT_NAMES[limit]} {_limited(limit, v)}" for limit, v in jointly["values"].items())
        wider = f"all limits {jointly['factor']:.3g} times wider, {_si(jointly['num_params'])} parameters"
        yield f"  nearest: {wider}: {values}"


def _limited(limit: str, value: float) -> str:
    return _bytes(value) if limit == "serving_bytes" else _seconds(value)


def _cost(cost: Mapping[str, Any] | None) -> str:
    if not cost:
        return "-"
    return f"{cost['loss']:.4f} nat, {cost['flops_ratio']:.3g} x FLOPs"


def _shape(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "none"
    shape = model["shape"]
    heads = f"{shape['num_heads']} heads of {shape['head_dim_qk']}/{shape['head_dim_v']}"
    return f"{shape['num_blocks']} x {shape['embedding_dim']}, {heads}"


def _forms(model: Mapping[str, Any]) -> str:
    ends = model["loss_other_forms"]
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _training(model: Mapping[str, Any]) -> str:
    training = model["training"]
    if training["time_s"] is None:
        return "unknown"
    return f"{_seconds(training['time_s'])} on {training['count']} x {training['device']}"


def _training_memory(model: Mapping[str, Any]) -> str:
    memory = model["training"]["memory"]
    if memory["device_bytes"] is None:
        return "unknown" if memory["limit_bytes"] is None else "does not fit"
    again = ", checkpointed" if memory["layout"]["activation_checkpointing"] else ""
    return f"{_bytes(memory['device_bytes'])}{again}"


def _span(value: Mapping[str, float] | None, form: Any) -> str:
    if not value or value["value"] is None:
        return "-"
    low, high = value["lo"], value["hi"]
    if low is None or form(low) == form(value["value"]) == form(high if high is not None else low):
        return form(value["value"])
    if high is None:
        return f"{form(value['value'])} [{form(low)}, no end]"
    return f"{form(value['value'])} [{form(low)}, {form(high)}]"


def _si(value: float) -> str:
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g}{suffix}" if value < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def _flops(value: float) -> str:
    return f"{value:.3g}".replace("e+", "e")


def _bytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "unknown"
    for scale, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"
