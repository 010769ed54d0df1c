"""Graftwork kernels."""
