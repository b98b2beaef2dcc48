"""All answer functions by their names, as the files of conf/claims use them."""

from . import dataset, envelope, inference, isoflop, overtraining, pareto, surface  # noqa: F401 - each enters its own
from .evidence import FUNCTIONS

__all__ = ["FUNCTIONS"]
