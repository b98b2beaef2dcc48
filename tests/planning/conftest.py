import pytest
from planted_laws import CONFIG, make_tables

from xlstm_scaling.planning.laws import laws_of_tables


@pytest.fixture(scope="session")
def laws():
    """The laws of the planted tables."""
    return laws_of_tables(make_tables(), CONFIG)
