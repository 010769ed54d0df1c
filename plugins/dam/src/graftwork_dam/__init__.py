"""DAM: low rank and quantization together, with a diagonal between the factors so that they round better."""

import graftwork.transform.loading  # noqa: F401

from graftwork_dam.adhesive import candidates, latent_error, normalised, power_split, smooth_split
from graftwork_dam.choose import Choice, Problem, choose
from graftwork_dam.errors import (
    Gaps,
    dot_norm,
    factor_errors,
    gaps,
    low_rank_first_bound,
    rounded_first_bound,
    tensor_norm,
)
from graftwork_dam.factor import Factors, choose_rank, factorise
from graftwork_dam.forward import Rounding, adhered_output, product_output, relative_loss
from graftwork_dam.layer import Layer
from graftwork_dam.learn import Learned, learn
from graftwork_dam.rounder import Rounder

__all__ = [
    "Choice",
    "Factors",
    "Gaps",
    "Layer",
    "Learned",
    "Problem",
    "Rounder",
    "Rounding",
    "adhered_output",
    "candidates",
    "choose",
    "choose_rank",
    "dot_norm",
    "factor_errors",
    "factorise",
    "gaps",
    "latent_error",
    "learn",
    "low_rank_first_bound",
    "normalised",
    "power_split",
    "product_output",
    "relative_loss",
    "rounded_first_bound",
    "smooth_split",
    "tensor_norm",
]
