"""What a method learns about a task's data besides training on it: batches in a fixed order, moments, losses.

A method that keeps statistics of its tasks (covariances of layer inputs, importance of parameters, relevance
of neurons) collects them in ``task_begin`` or ``task_end``. These helpers make every such pass alike: items in
the order of the data set, each process its share, no shuffling, no dropout, no trace left on the model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from graftwork.distributed import rank_and_world, sum_over_ranks
from graftwork.errors import UserError
from graftwork.evaluate.encoding import pad_token
from graftwork.evaluate.modes import evaluating
from graftwork.self_play.scoring import pad_batch

if TYPE_CHECKING:
    from transformers import Trainer

    from graftwork.console import Console

Batch = Mapping[str, torch.Tensor]


def task_batches(
    trainer: Trainer,
    *,
    items: int | None = None,
    batch_size: int = 8,
    console: Console | None = None,
    label: str = "statistics",
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the trainer's own tokenised training data in its fixed order, collated and on its device.

    Of pairs of answers it is the chosen ones, as :func:`trained_rows` has them. The first ``items`` items (all
    where None) are dealt over the processes, so that no item counts twice. ``console`` shows a bar named
    ``label``.
    """
    dataset = trained_rows(trainer)
    collate = dataset.collate if isinstance(dataset, ChosenAnswers) else trainer.data_collator
    total = len(dataset) if items is None else min(items, len(dataset))
    rank, world = rank_and_world()
    mine = range(rank, total, world)
    bar = console.bar(len(mine), label) if console else None
    try:
        for start in range(0, len(mine), batch_size):
            rows = [dataset[index] for index in mine[start : start + batch_size]]
            batch = collate(rows)
            yield {
                key: value.to(trainer.args.device)
                for key, value in batch.items()
                if isinstance(value, torch.Tensor)
            }
            if bar is not None:
                bar.update(len(rows))
    finally:
        if bar is not None:
            bar.close()


class ChosenAnswers:
    """The chosen answers of a data set of pairs as items of their own: ``input_ids``, and ``labels`` on the answer."""

    def __init__(self, pairs: Any, pad: int) -> None:
        self.pairs = pairs
        self.pad = pad

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.pairs[index]
        prompt, answer = row["prompt_ids"], row["chosen_ids"]
        return {"input_ids": [*prompt, *answer], "labels": [*[-100] * len(prompt), *answer]}

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (b x l), filled up on the right."""
        begins = [row["labels"].count(-100) for row in rows]
        answers = [
            (row["input_ids"][:begin], row["input_ids"][begin:])
            for row, begin in zip(rows, begins, strict=True)
        ]
        batch = pad_batch(answers, self.pad)
        answered = batch.pop("completion_mask").bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~answered, -100)}


def trained_rows(trainer: Trainer) -> Any:
    """Return the items that ``trainer`` learns to write, by number: its data set, or of pairs the chosen answers."""
    dataset = cast(Any, trainer.train_dataset)
    columns = getattr(dataset, "column_names", None) or ()
    if "chosen_ids" not in columns:
        return dataset
    return ChosenAnswers(dataset, pad_token(trainer.processing_class))


def attended(batch: Batch) -> torch.Tensor:
    """Return which tokens of ``input_ids`` (b x l) are no padding, as booleans."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def answer_losses(model: nn.Module, batch: Batch, reduction: Literal["mean", "sum"] = "mean") -> torch.Tensor:
    """Return each item's own negative log-likelihood (b), in fp32, over its answer tokens (labels not -100).

    ``mean`` is per answer token of the item, ``sum`` the log-probability of the whole answer. Items are
    independent of each other, so the gradient of the sum is every item's own gradient. An item without
    answer tokens has loss 0.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    encoder_decoder = bool(getattr(cast(Any, model).config, "is_encoder_decoder", False))
    labels = batch["labels"]
    if encoder_decoder:
        logits = model(**inputs, labels=labels).logits
    else:
        logits, labels = model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    per_item = losses.view_as(labels).sum(1)
    if reduction == "sum":
        return per_item
    return per_item / (labels != -100).sum(1).clamp_min(1)


@dataclass
class Moment:
    """The uncentred second moment of one layer's input: ``matrix`` = sum of x x^T (d x d), over ``tokens``."""

    matrix: torch.Tensor
    tokens: int

    @property
    def mean(self) -> torch.Tensor:
        """Return (1/n) sum x x^T."""
        return self.matrix / max(self.tokens, 1)


def second_moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    also: Iterable[nn.Module] = (),
    add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object] | None = None,
) -> dict[str, Moment]:
    """Return the second moment of the input of each of ``modules`` over ``batches``, by the same names.

    The first pass is whole. Later ones end where the last of ``modules``, and of ``also``, which the caller's own
    pre-forward hooks read, has got its input: nothing behind it is computed. So the model must not be sharded.

    Padding tokens do not count; the processes' shares are added up. The products are taken and summed in
    ``dtype`` on the module's device; ``add`` may do so instead: given a sum (d x d), inputs (n x d) and which of
    them count (n), it adds theirs to the sum in place. The model is put into eval mode for the pass, without
    gradients. In an encoder-decoder the tokens are those of the prompt in the encoder, and wherever the decoder
    reads what the encoder made; elsewhere in the decoder they are those of the answer.

    Raises:
        UserError: a moment is not finite; the name of the layer is in the sentence.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys(modules, 0)
    reads = _Reads(model)

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Some models lay batch and tokens into one dimension before they reach a layer.
            x_ND = args[0].detach().flatten(0, -2)
            mask_N = reads.mask(module, args[0]).flatten()
            tokens[name] += int(mask_N.sum())
            if name not in sums:
                width = x_ND.shape[1]
                sums[name] = torch.zeros(width, width, dtype=dtype, device=x_ND.device)
            (add or _add_products)(sums[name], x_ND, mask_N)

        return hook

    handles = [module.register_forward_pre_hook(see(name)) for name, module in modules.items()]
    # Last, so that on every module the hooks that read have run when the pass ends.
    ending = _Ending([*modules.values(), *also])
    try:
        with evaluating(model):
            for batch in batches:
                reads.begin(batch)
                with ending.watch():
                    model(**_without_logits(model, batch))
    finally:
        for handle in [*handles, *reads.handles, *ending.handles]:
            handle.remove()
    if not reads.tokens and rank_and_world()[1] == 1:
        raise UserError("there is no data to take second moments of; the task has no training items")
    device = next(model.parameters()).device
    counts = sum_over_ranks(torch.tensor([*tokens.values()], device=device)).tolist()
    found = {}
    for count, (name, module) in zip(counts, modules.items(), strict=True):
        width = int(cast(Any, module).in_features) if name not in sums else len(sums[name])
        own = sums.pop(name) if name in sums else torch.zeros(width, width, dtype=dtype, device=device)
        matrix = sum_over_ranks(own)
        if not torch.isfinite(matrix).all():
            raise UserError(
                f"the inputs of layer '{name}' are not finite numbers on this task's data; lower "
                f"'learning_rate', or load the model with dtype float32"
            )
        found[name] = Moment(matrix, count)
    return found


def _add_products(sum_DD: torch.Tensor, x_ND: torch.Tensor, mask_N: torch.Tensor) -> None:
    x_ND = x_ND[mask_N].to(sum_DD.dtype)
    sum_DD.addmm_(x_ND.T, x_ND)


class _Enough(Exception):
    """All that a pass is for has been seen."""


class _Ending:
    """Ends a forward pass as soon as every one of ``modules`` was called as often as in a whole pass before.

    How often that is comes from the first pass that called them all, which is not cut short. Where passes differ in
    which modules they call, as with experts, they end early only after all of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.calls = dict.fromkeys(modules, 0)
        self.whole: dict[nn.Module, int] | None = None
        self.handles = [module.register_forward_pre_hook(self._called) for module in self.calls]

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        self.calls = dict.fromkeys(self.calls, 0)
        with contextlib.suppress(_Enough):
            yield
            if self.whole is None and all(self.calls.values()):
                self.whole = self.calls

    def _called(self, module: nn.Module, args: Any) -> None:
        self.calls[module] += 1
        if self.calls == self.whole:
            raise _Enough


class _Reads:
    """Which tokens of the batch at hand the input of a module stands for."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        self.tokens = 0
        self.handles: list[Any] = []
        self.encoder: set[nn.Module] | None = None
        if getattr(base.config, "is_encoder_decoder", False):
            encoder = base.get_encoder()
            self.encoder = set(encoder.modules())
            self.handles.append(encoder.register_forward_hook(self._encoded))

    def begin(self, batch: Batch) -> None:
        self.source = attended(batch)
        self.tokens += int(self.source.sum())
        if self.encoder is not None:
            self.answer = batch["labels"] != -100

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self.states: torch.Tensor = output[0]

    def mask(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # Prompts and answers can be of one length, so only the tensor itself tells what cross-attention reads.
        of_prompt = self.encoder is None or module in self.encoder or x.data_ptr() == self.states.data_ptr()
        return self.source if of_prompt else self.answer


def _without_logits(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the inputs of a forward pass whose logits nobody reads, so that as few as possible are made."""
    inputs: dict[str, Any] = {
        key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch
    }
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base.config, "is_encoder_decoder", False):
        return {**inputs, "labels": batch["labels"]}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs["logits_to_keep"] = 1
    return {**inputs, "use_cache": False}
