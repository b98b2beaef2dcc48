"""Kernels in C++ for this CPU: compiled by the machine's own compiler when first used, then taken from a cache."""
