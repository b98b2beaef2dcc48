"""Figures of a study: tables in, one matplotlib figure a function, one style."""

from .registry import CATEGORIES, FIGURES, FigureSpec
from .study import captions, draw_all, figure_outputs
from .tables import FigureError, Tables

__all__ = ["CATEGORIES", "FIGURES", "FigureError", "FigureSpec", "Tables", "captions", "draw_all", "figure_outputs"]
