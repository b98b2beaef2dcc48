"""Labels and the rules of selection, at their limits."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.published.selection import BUDGETS, OUTSIDE, add_labels, nearest_label, select

BASE = {
    "arch": "xlstm", "context_length": 8192, "experiment_set": "isoflop", "isoflop_tag": 3e19, "tag": "t", "name": "n",
    "num_params": 1e9, "num_tokens": 1e10, "num_flops": 3e19, "val_loss": 2.9, "global_batch_size_sequences": 128,
    "tokens_per_param": 10.0,
}  # fmt: skip


def reasons(**changes):
    row = pd.DataFrame([BASE | changes])
    selected = select(row)
    assert selected["selected"].tolist() == selected["exclusion"].isna().tolist()
    return selected["exclusion"].fillna("").tolist()[0]


def test_nearest_label():
    values = [6.59e18, 6.61e18, 5.41e18, 9.5e18, np.nan, 8e18, 3.29e21, 1e25]
    expected = [6e18, np.nan, 6e18, 1e19, np.nan, np.nan, 3e21, np.nan]
    np.testing.assert_array_equal(nearest_label(values, BUDGETS, 0.1), expected)


def test_labels_of_their_sets_only():
    rows = pd.DataFrame(
        [
            BASE | {"num_flops": 1.05e20},
            BASE | {"num_flops": 1.05e20, "experiment_set": "other"},
            BASE | {"experiment_set": "tokenparam", "tokens_per_param": 25.9},
            BASE | {"experiment_set": "tokenparam", "tokens_per_param": 26.1},
            BASE | {"experiment_set": "tokenparam", "tokens_per_param": 51.1},
            BASE
            | {
                "experiment_set": "tokenparam",
                "tokens_per_param": 51.1,
                "name": "dclm_mLSTMv1_160M_ctx8192_lr0.003_steps8000_nh6_gbs128",
            },
        ]
    )
    labelled = add_labels(rows)
    np.testing.assert_array_equal(labelled["isoflop_tag"], [1e20, np.nan, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(labelled["ratio_tag"], [np.nan, np.nan, 22.0, np.nan, 44.0, np.nan])


LLAMA = {"arch": "transformer"}
SHORT, LONG = {"context_length": 2048}, {"context_length": 16384}
RATIO = {"experiment_set": "tokenparam"}
SPIKE_2048, SPIKE_8192 = {"num_params": 1_223_934_208}, {"num_params": 406_635_520, "val_loss": 3.1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"val_loss": np.nan}, "complete"),
        ({"num_flops": np.nan}, "complete"),
        ({"val_loss": 4.0}, "loss_below_4.0"),
        ({"global_batch_size_sequences": 200}, "batch_below_200_under_3e20"),
        ({"global_batch_size_sequences": 256, "num_flops": 6e20, "isoflop_tag": 6e20}, ""),
        ({"num_flops": 6e20, "isoflop_tag": 6e20, "val_loss": 3.01}, "loss_to_3.0_at_6e20"),
        ({"num_flops": 6e20, "isoflop_tag": 6e20, "val_loss": 3.0}, ""),
        ({"num_flops": 3e21, "isoflop_tag": 3e21}, "budgets_to_6e20"),
        ({"isoflop_tag": np.nan}, "budgets_to_6e20"),
        (SHORT | {"val_loss": 4.5}, "loss_below_4.5"),
        (LONG | {"val_loss": 4.49}, ""),
        (LONG | LLAMA | {"val_loss": 4.5}, "loss_below_4.5"),
        (SHORT | LLAMA | {"val_loss": 4.6}, ""),
        (SHORT | LLAMA | SPIKE_2048, "without_spike_at_2048"),
        (SHORT | LLAMA | SPIKE_2048 | {"isoflop_tag": 1e20}, ""),
        (SHORT | SPIKE_2048, ""),
        (LLAMA | {"val_loss": 3.5}, "loss_below_3.5"),
        (LLAMA | SPIKE_8192, "without_spike_at_3e19"),
        (LLAMA | SPIKE_8192 | {"val_loss": 3.0}, ""),
        (LLAMA | SPIKE_8192 | {"num_flops": 2.75e19}, ""),
        (LLAMA | {"num_flops": 1e20, "val_loss": 3.21}, "without_spike_at_1e20"),
        (LLAMA | {"num_flops": 1e20, "val_loss": 3.6}, "loss_below_3.5,without_spike_at_1e20"),
        (LLAMA | {"num_flops": 1.4e20, "val_loss": 3.21}, ""),
        (RATIO | {"tag": "scl_mlstm_160Mv2"}, ""),
        (RATIO | {"tag": "scl_mlstm_160M"}, "published_tags"),
        (RATIO | {"tag": "dclm_mLSTMv1_7B_longrun_pretraining_final"}, ""),
        (RATIO | LLAMA | {"tag": "scl_llama_830M"}, "published_tags"),
        (RATIO | LLAMA | {"tag": "scl_llama_830Mv2", "val_loss": np.nan}, "complete"),
        ({"experiment_set": "other"}, OUTSIDE),
    ],
)
def test_rules(changes, expected):
    assert reasons(**changes) == expected
