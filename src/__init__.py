"""Scaling laws of xLSTM and Transformer language models, from text to figures."""

__version__ = "0.1.0"
