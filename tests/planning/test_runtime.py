"""Which runtime a question is answered with, and that a study's model is asked for the right thing."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.accounting import weight_bytes
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.fitting.runtime_tables import MODEL_COLUMNS
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.recommend import recommend
from xlstm_scaling.planning.runtime import FittedRuntime, Load, Roofline, load_runtime
from xlstm_scaling.planning.shapes import ShapeFamily

RATE, OVERHEAD = 2e12, 1e-4


def model_table(*devices: str) -> pd.DataFrame:
    """A device that only reads weights, at `RATE` [B/s], and has an overhead of `OVERHEAD` [s]."""
    rows = [
        {"arch": arch, "quantity": quantity, "device": device, "dtype": "bfloat16", "prefill_logits": "last"}
        | {"norm_p": 4.0, "weight_bytes_per_s": RATE, "overhead_s": OVERHEAD, "mape_held_out": 0.05, "status": "ok"}
        | {"num_params_min": 1e8, "num_params_max": 1e9, "batch_size_min": 1, "batch_size_max": 8}
        | {"prefill_length_min": 128, "prefill_length_max": 4096}
        for device in devices
        for arch in ("xlstm", "transformer")
        for quantity in ("ttft", "step_time")
    ]
    return pd.DataFrame(rows).reindex(columns=list(MODEL_COLUMNS))


def folder_of(path, *devices: str):
    path.mkdir()
    model_table(*devices).to_parquet(path / "runtime_model.parquet")
    return path


@pytest.mark.parametrize("arch", ["xlstm", "transformer"])
def test_times_are_those_of_the_studys_model(tmp_path, arch):
    runtime = load_runtime(folder_of(tmp_path / "inference", "NVIDIA H100"), None)
    shapes = [ShapeFamily(arch).shape(width, 24) for width in (1024, 2048)]
    ttft, step = runtime.times(shapes, Load(2048, 8, 4))
    expected = np.array([weight_bytes(shape) / RATE + OVERHEAD for shape in shapes])
    np.testing.assert_allclose(ttft, expected, rtol=0.01)
    np.testing.assert_allclose(step, expected, rtol=0.01)


def test_the_folder_beside_the_laws_counts_if_the_device_is_its_own(tmp_path):
    beside = folder_of(tmp_path / "inference", "the authors' H100")
    assert isinstance(load_runtime(None, None, beside), FittedRuntime)
    assert isinstance(load_runtime(None, "h100", beside), FittedRuntime)
    other = load_runtime(None, "a100", beside)
    assert isinstance(other, Roofline) and other.sheet is DEVICES["A100"] and other.assumed
    assert load_runtime(None, None, tmp_path / "nothing") is None
    assert isinstance(load_runtime(beside, "a100"), FittedRuntime)  # given by name: the user knows


def test_several_devices_have_to_be_told_apart(tmp_path):
    both = folder_of(tmp_path / "inference", "H100", "A100")
    assert load_runtime(both, "a100").device == "A100"
    with pytest.raises(PlanningError, match="--device"):
        load_runtime(both, None)


def test_limits_and_extrapolation_by_a_fitted_model(laws, tmp_path):
    runtime = load_runtime(folder_of(tmp_path / "inference", "H100"), None)
    limit = 1.5e-3
    answer = recommend(Question(8192, flops=1e22, max_step_time_s=limit), laws, runtime)
    for part in answer["architectures"].values():
        assert part["choice"]["step_time_s"] <= limit < part["without_limits"]["step_time_s"]
        found = {entry["quantity"] for entry in part["choice"]["extrapolation"] if entry["of"] == "runtime"}
        assert "prefill_length" in found
    assert answer["sources"]["runtime_assumed"] is False
    assert any("by less than the runtime model's error" in note for note in answer["notes"])
