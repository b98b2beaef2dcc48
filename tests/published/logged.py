"""Pickles as the authors' tools made them: pandas 2 and numpy 2, protocol 4."""

import pickle
from unittest import mock

import pandas as pd

MODULE = "mlstm_scaling_laws.common.wandb_run_data"
#: pandas 3 calls the module of all of them `pandas`
PANDAS_2 = {
    pd.DataFrame: "pandas.core.frame",
    pd.Index: "pandas.core.indexes.base",
    pd.RangeIndex: "pandas.core.indexes.range",
    pd.MultiIndex: "pandas.core.indexes.multi",
}


def dumps(value):
    """The pickle of a value under the class names of pandas 2."""
    patches = [mock.patch.object(cls, "__module__", module) for cls, module in PANDAS_2.items()]
    for patch in patches:
        patch.start()
    try:
        return pickle.dumps(value, protocol=4)
    finally:
        for patch in patches:
            patch.stop()


def objects(frame):
    """The frame with names of columns as objects, as pandas 2 made them."""
    frame.columns = pd.Index(list(frame.columns), dtype=object)
    return frame


def series(key, steps, values):
    """A logged series: `_step` and the key's values."""
    columns = {"_step": pd.Series(steps, dtype="int64"), key: pd.Series(values, dtype="float64")}
    return objects(pd.DataFrame(columns))
