"""A small synthetic study with planted laws, the project's settings, and the paper's runs where they are at hand."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from xlstm_scaling.fitting import LossSurface

ROOT = Path(__file__).resolve().parents[2]
PLANTED = {
    "xlstm": LossSurface(A=40.0, B=60.0, E=2.0, alpha=0.35, beta=0.33),
    "transformer": LossSurface(A=45.0, B=70.0, E=2.0, alpha=0.34, beta=0.32),
}


@pytest.fixture(scope="session")
def planted():
    """The surfaces behind the synthetic runs."""
    return PLANTED


@pytest.fixture(scope="session")
def make_runs():
    """The maker of synthetic runs."""
    return _make_runs


@pytest.fixture(scope="session")
def default_config():
    """The default settings, with fewer resamples."""
    return yaml.safe_load((ROOT / "conf" / "fitting" / "default.yaml").read_text()) | {"num_resamples": 100}


@pytest.fixture
def config(default_config):
    """The default settings, with fewer resamples; a test may change its copy."""
    return copy.deepcopy(default_config)


def _make_runs(noise=0.0, seed=0, contexts=(256, 512), budgets=(1e11, 3e11, 1e12), sizes=7, archs=tuple(PLANTED)):
    """Runs of a laptop-sized study with H = 6 N D; the token/param runs are at context 512."""
    generator = np.random.default_rng(seed)
    rows = []

    def add(arch, context, experiment_set, isoflop_tag, ratio_tag, num_params, num_tokens):
        loss = float(PLANTED[arch].predict(num_params, num_tokens)) * np.exp(noise * generator.standard_normal())
        row = {"run_id": f"{arch}-{context}-{len(rows):03d}", "status": "ok", "experiment_set": experiment_set}
        row |= {"isoflop_tag": isoflop_tag, "ratio_tag": ratio_tag, "arch": arch, "context_length": context}
        row |= {"num_params": num_params, "num_tokens": num_tokens, "num_flops": 6 * num_params * num_tokens}
        rows.append(row | {"val_loss": loss})

    for arch in archs:
        for context in contexts:
            for budget in budgets:
                optimum, _ = PLANTED[arch].compute_optimal(budget)
                for factor in np.geomspace(0.25, 4.0, sizes):
                    num_params = float(optimum * factor)
                    add(arch, context, "isoflop", f"{budget:.0e}", np.nan, num_params, budget / 6 / num_params)
        for ratio in (20.0, 60.0, 200.0):
            for num_params in (3e4, 1e5, 3e5):
                add(arch, 512, "tokenparam", None, ratio, num_params, ratio * num_params)
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def paper_runs(paper):
    """The paper's 640 runs as the table of runs; ratio tags near the paper's six (the runs of 22 reach 25.8)."""
    runs = pd.read_csv(paper / "runs.csv")
    runs = runs[runs["in_paper_640"]].copy()
    runs["arch"] = runs["arch"].replace("llama", "transformer")
    runs["status"] = "ok"
    runs["ratio_tag"] = np.nan
    for ratio in (22.0, 44.0, 110.0, 220.0, 550.0, 1100.0):
        near = (runs["tokens_per_param"] / ratio - 1).abs() < (0.2 if ratio == 22.0 else 0.1)
        runs.loc[near & (runs["experiment_set"] == "tokenparam"), "ratio_tag"] = ratio
    return runs


@pytest.fixture(scope="session")
def paper_numbers(paper):
    return json.loads((paper / "paper_numbers.json").read_text())
