"""Scaling laws from the table of runs: tables in, tables out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss_surface import LossSurface
    from .study import fit_all
    from .surface_fit import fit_surface
    from .surface_result import SurfaceStatus
    from .tables import COLUMNS, FitError, make_table

__all__ = ["COLUMNS", "FitError", "LossSurface", "SurfaceStatus", "fit_all", "fit_surface", "make_table"]
_WHERE = {
    "LossSurface": "loss_surface",
    "fit_all": "study",
    "SurfaceStatus": "surface_result",
    "fit_surface": "surface_fit",
}


def __getattr__(name: str) -> Any:
    """Load pandas and scipy only where they are used: the command line reads options of a module in here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE.get(name, 'tables')}", __name__), name)
