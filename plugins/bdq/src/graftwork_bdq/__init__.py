"""BDQ: diagonals and rotations that make weights and activations easy to round, and the loss they are trained with.

Importing this package lets transformers' ``from_pretrained`` load what BDQ has written, rotations included.
"""

import graftwork.transform.loading  # noqa: F401

from graftwork_bdq.diagonal import energy_sigma, smooth_sigma
from graftwork_bdq.flatness import concentration, flatness, flattest, row_update
from graftwork_bdq.layer import LayerTransform, transformed
from graftwork_bdq.loss import RceLoss, recursive_cross_entropy
from graftwork_bdq.options import BdqOptions

__all__ = [
    "BdqOptions",
    "LayerTransform",
    "RceLoss",
    "concentration",
    "energy_sigma",
    "flatness",
    "flattest",
    "recursive_cross_entropy",
    "row_update",
    "smooth_sigma",
    "transformed",
]
