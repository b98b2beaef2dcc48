"""Both architectures."""

import pytest


@pytest.fixture(params=("xlstm", "transformer"))
def arch(request):
    return request.param
