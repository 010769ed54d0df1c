"""Evaluate in the middle of training without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode without gradients, and every module back into its own mode afterwards.

    Not ``inference_mode``: a tensor that a layer caches inside it could not be used in training again.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
