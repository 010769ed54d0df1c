"""The log-probabilities of the answers' tokens, which is most of what a step of these methods computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from graftwork_kernels import announce
from graftwork_kernels.selected_log_probs import selected_log_probs

if TYPE_CHECKING:
    from graftwork.log_probs import TokenLogProbs
    from graftwork.run import Run


def token_log_probs(run: Run) -> TokenLogProbs:
    """Return the kernels' function, and say once which of its paths the run takes."""
    here = torch.cuda.is_available() and not run.job.train.get("use_cpu")
    # A run that is only checked has nobody to tell.
    if run.console.enabled:
        announce(run.console.say, "cuda" if here else "cpu")
    return selected_log_probs
