"""The operations that the models train on, each with a readable reference beside the fast form."""

from xlstm_scaling.kernels.registry import Kernel, get_kernel, kernels, register, select

__all__ = ["Kernel", "get_kernel", "kernels", "register", "select"]
