"""COIECD: choose between a context and what a model remembers, token by token, while it writes."""

from graftwork_coiecd.processor import CoiecdLogitsProcessor
from graftwork_coiecd.scores import CONFORMING, LOWER, UPPER, Coiecd, band, bounds, entropy

__all__ = [
    "CONFORMING",
    "LOWER",
    "UPPER",
    "Coiecd",
    "CoiecdLogitsProcessor",
    "band",
    "bounds",
    "entropy",
]
