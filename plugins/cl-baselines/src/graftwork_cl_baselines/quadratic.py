"""Quadratic penalties around past parameters, and the importance that weighs them (EWC's mathematics)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from graftwork.distributed import sum_over_ranks
from graftwork.evaluate.modes import evaluating
from graftwork.train.statistics import Batch, answer_losses

Tensors = dict[str, torch.Tensor]


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fisher(model: torch.nn.Module, batches: Iterable[Batch]) -> Tensors:
    """Return the diagonal of the empirical Fisher information of every parameter that trains, by name.

    ``F_i = (1/N) sum_n (d log p(y_n | x_n) / d theta_i)^2`` (Kirkpatrick et al. 2017, with the labels of the
    data), log p summed over the answer's tokens. ``batches`` hold one item each: the square of a batch's
    summed gradient is another thing. Sums run over all processes. fp32, or higher where parameters are.
    """
    parameters = trained_parameters(model)
    sums = {name: torch.zeros_like(_wide(value)) for name, value in parameters.items()}
    count = 0
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss = answer_losses(model, batch, "sum").sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            count += len(batch["input_ids"])
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.to(sums[name].dtype).square()
    device = next(iter(sums.values())).device
    total = sum_over_ranks(torch.tensor(count, device=device))
    return {name: sum_over_ranks(value) / total for name, value in sums.items()}


class Quadratic:
    """``(1/2) sum_t sum_i F_ti (theta_i - theta*_ti)^2`` over any number of past tasks, in the space of one.

    A sum of squares around several points is one square around their weighted mean and a constant:
    ``P_i = sum_t F_ti``, ``m_i = sum_t F_ti theta*_ti / P_i`` and
    ``rest = sum_ti F_ti (theta*_ti - m_i)^2``, so that the sum is ``sum_i P_i (theta_i - m_i)^2 + rest``.
    This is exact, and unlike the expanded square ``P theta^2 - 2 (P m) theta + ...`` it does not cancel (ours).
    """

    def __init__(self) -> None:
        self.weights: Tensors = {}
        self.centres: Tensors = {}
        self.rest = torch.zeros((), dtype=torch.float64)

    def __bool__(self) -> bool:
        return bool(self.weights)

    def add(self, importance: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor]) -> None:
        """Add the task with importances F_t at the parameters theta*_t (separate mode)."""
        for name, extra in importance.items():
            point = _wide(at[name].detach()).clone()
            if name not in self.weights:
                self.weights[name], self.centres[name] = extra.clone(), point
                continue
            old, distance = self.weights[name].to(extra.device), point - self.centres[name].to(extra.device)
            total = old + extra
            share = torch.where(total > 0, extra / total, 0.0)
            self.rest += (old * share * distance.square()).sum(dtype=torch.float64).cpu()
            self.centres[name] = self.centres[name].to(extra.device) + share * distance
            self.weights[name] = total

    def replace(
        self, importance: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor], keep: float
    ) -> None:
        """Let the importance decay by ``keep`` (gamma), add F_t, and move the centre to theta*_t (online mode)."""
        for name, extra in importance.items():
            old = self.weights.get(name)
            self.weights[name] = extra.clone() if old is None else keep * old.to(extra.device) + extra
            self.centres[name] = _wide(at[name].detach()).clone()

    def penalty(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the penalty (scalar) at ``parameters``; names that have no past do not count."""
        total: torch.Tensor | float = 0.0
        for name, parameter in parameters.items():
            if name in self.weights:
                weight, centre = self._beside(name, parameter)
                total = total + (weight * (_wide(parameter) - centre).square()).sum()
        return 0.5 * (total + self.rest.to(next(iter(parameters.values())).device, torch.float32))

    def _beside(self, name: str, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and centre where the parameter lives: a loaded state comes to the CPU first."""
        if self.weights[name].device != parameter.device:
            self.weights[name] = self.weights[name].to(parameter.device)
            self.centres[name] = self.centres[name].to(parameter.device)
        return self.weights[name], self.centres[name]

    def state(self) -> Tensors:
        """Return everything as tensors; its size does not grow with the number of tasks."""
        parts = (("weight", self.weights), ("centre", self.centres))
        named = {f"{part}.{name}": value for part, values in parts for name, value in values.items()}
        return {**named, "rest": self.rest} if named else {}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Quadratic:
        """Return the object whose :meth:`state` was ``state``."""
        made = cls()
        for key, value in state.items():
            part, _, name = key.partition(".")
            if part == "rest":
                made.rest = value
            else:
                (made.weights if part == "weight" else made.centres)[name] = value
        return made


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in fp32, or in its own precision where that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
