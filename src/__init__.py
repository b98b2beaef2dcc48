"""Scaling laws of xLSTM and Transformer language models, from text to figures."""

__version__ = "1.0.0"
