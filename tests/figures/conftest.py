"""Tables of a small synthetic study, in memory and as a results folder."""

import pytest
from figure_tables import make_tables, write_tables

from xlstm_scaling.figures import Tables


@pytest.fixture(scope="session")
def frames():
    return make_tables()


@pytest.fixture(scope="session")
def tables(frames):
    return Tables(frames=frames)


@pytest.fixture(scope="session")
def three():
    return Tables(frames=make_tables(("xlstm", "transformer", "mamba")))


@pytest.fixture(scope="session")
def results(frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "study"
    write_tables(frames, folder)
    return folder


@pytest.fixture
def broken(frames):
    """The same study with some cells that could not be fitted; values stay where a fit would leave them."""
    bad = dict(frames)
    cells = frames["fits/isoflop"].copy()
    lost = (cells["arch"] == "xlstm") & (cells["isoflop_tag"] == 1e12) & (cells["context_length"] == 512)
    cells.loc[lost, ["status", "detail"]] = ["outside_range", "minimum at 2.1M is outside"]
    bad["fits/isoflop"] = cells
    slopes = frames["fits/overtraining"].copy()
    slopes.loc[0, ["status", "detail"]] = ["too_few_runs", "2 runs, 3 needed"]
    bad["fits/overtraining"] = slopes
    return Tables(frames=bad)
