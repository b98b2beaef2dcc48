import pytest
from explorer_study import write_study

from xlstm_scaling.explorer.data import study_data


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A study whose laws are known."""
    return write_study(tmp_path_factory.mktemp("results") / "planted")


@pytest.fixture(scope="session")
def data(folder):
    return study_data(folder, "A study <of> planted laws")
