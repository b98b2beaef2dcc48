"""Scaling laws from the table of runs: tables in, tables out."""

from .loss_surface import LossSurface
from .study import fit_all
from .surface_fit import SurfaceStatus, fit_surface
from .tables import COLUMNS, FitError, make_table

__all__ = ["COLUMNS", "FitError", "LossSurface", "SurfaceStatus", "fit_all", "fit_surface", "make_table"]
