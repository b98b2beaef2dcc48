"""Kernels are compared with float64 before they train anything: every output and every gradient, on this device.

``operation`` says what a case is; ``mlstm``, ``cross_entropy`` and ``elementwise`` hold the cases, ``comparison`` the
rule that decides; ``run`` goes through all kernels; ``certificate`` is the file that training asks for, ``command`` the
command line. Nothing is imported here, so that reading a certificate does not import torch.
"""
