"""Answers to claims about the envelope of the training curves (approach 1 of Hoffmann et al. 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.fitting.pareto import convex_frontier
from xlstm_scaling.fitting.power_law import fit_lines
from xlstm_scaling.fitting.resampling import bootstrap_counts

from .evidence import BASE_CONTEXT, Evidence, answer, fitted_row
from .ledger import NAN, Answer, NotAnswerable


@answer
def envelope_law(
    evidence: Evidence, arch: str, of: str, what: str, context: int = BASE_CONTEXT, loss: str = "val_loss"
) -> Answer:
    """Exponent or coefficient of N or D along the lower envelope of training curves, as a power of FLOPs."""
    curves = evidence.curve_points(loss)
    if not ((curves["arch"] == arch) & (curves["context_length"] == context)).any():
        raise NotAnswerable(f"training curves of {arch} at context {context}")
    row = fitted_row(evidence.envelope(loss), "an envelope", arch=arch, context_length=context, variable=of)
    note = str(row["detail"])
    if what == "coefficient":
        return Answer(10 ** float(row["log10_coefficient"]), n_runs=int(row["num_points"]), note=note)
    return Answer(float(row["exponent"]), row["exponent_lo"], row["exponent_hi"], int(row["num_points"]), note)


@answer
def hull_law(evidence: Evidence, arch: str, of: str, context: int = BASE_CONTEXT, loss: str = "val_loss") -> Answer:
    """Exponent of N or D at the points of the training curves on their lower convex hull in (ln H, ln loss).

    Whole curves are resampled.
    """
    curves = evidence.curve_points(loss)
    curves = curves[(curves["arch"] == arch) & (curves["context_length"] == context)]
    names = list(curves["run_id"].unique())
    if len(names) < 3:
        raise NotAnswerable(f"training curves of {arch} at context {context}")
    y = np.log(curves[{"num_params": "num_params", "num_tokens": "tokens"}[of]].to_numpy(dtype=np.float64))
    flops, height = (curves[name].to_numpy(dtype=np.float64) for name in ("flops", loss))
    place = {pair: i for i, pair in enumerate(zip(np.log(flops).tolist(), np.log(height).tolist()))}
    owner = curves["run_id"].map({name: i for i, name in enumerate(names)}).to_numpy()

    def exponent(drawn: NDArray[np.bool_]) -> tuple[float, int]:
        x, low = convex_frontier(flops[drawn], height[drawn])
        if len(x) < 3:
            return NAN, len(x)
        at = [place[pair] for pair in zip(x.tolist(), low.tolist())]
        return float(fit_lines(x, y[at][None, :])[0, 1]), len(x)

    value, points = exponent(np.ones(len(curves), dtype=bool))
    generator = evidence.generator("hull", arch, context)
    counts = bootstrap_counts(len(names), min(evidence.num_resamples, 200), generator)
    samples = np.array([exponent((row > 0)[owner])[0] for row in counts])
    note = f"{points} points of the {loss} curves of {len(names)} runs lie on the hull."
    return Answer(value, *evidence.interval(samples), len(names), note)
