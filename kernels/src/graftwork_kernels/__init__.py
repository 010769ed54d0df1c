"""Triton kernels for language models, each with a PyTorch reference and a functional form that picks the path."""

from graftwork_kernels.dispatch import announce, path_of

__all__ = ["announce", "path_of"]
