"""The hooks of BDQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from graftwork import LossTerm, UserError, WeightTransform, hookimpl
from graftwork.transform.kv import check_kv
from graftwork.transform.scheme import KVScheme
from graftwork_kernels import announce

from graftwork_bdq.block import train_block
from graftwork_bdq.layer import LayerTransform
from graftwork_bdq.options import BdqOptions
from graftwork_bdq.rounding import FIGURES, round_layer
from graftwork_bdq.statistics import of_block
from graftwork_bdq.term import RceTerm
from graftwork_bdq.token import learn_tokens

if TYPE_CHECKING:
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.whole import Whole
    from transformers import PreTrainedModel, Trainer


class Bdq:
    """Scales and rotations before few-bit rounding; in training, the recursive cross-entropy."""

    Options = BdqOptions

    def __init__(self, options: BdqOptions) -> None:
        self.options = options
        self.term: RceTerm | None = None

    @property
    def kv(self) -> KVScheme:
        """How the cache is rounded; where inputs are turned by Hadamard matrices, keys are, too."""
        return self.options.kv.model_copy(update={"rotate_keys": self.options.hadamard})

    # ------------------------------------------------------------ compression

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        options = self.options
        feeds_back = options.quantizer == "gptq" and options.weights.rounds
        looks = options.start != "identity" or options.learn == "block" or feeds_back
        return [
            WeightTransform(
                "bdq",
                self.transform,
                needs="end_to_end" if options.learn == "token" else "activations" if looks else "none",
                dense=options.learn == "block",
                rotates=True,
                rounds=options.quantizer != "none",
                prepare=self.prepare if options.learn == "token" else None,
                figures=FIGURES,
            )
        ]

    def prepare(self, whole: Whole) -> Mapping[str, torch.Tensor]:
        """Learn end to end."""
        check_kv(whole.model, self.kv)
        announce(whole.console.say, whole.model.device)
        return learn_tokens(whole, self.options, self.kv)

    def transform(self, block: Block) -> None:
        """Start or load scales and rotations of one block, learn, fold, round."""
        options = self.options
        check_kv(block.model, self.kv)
        layer = self.start(block)
        for name in layer.places:
            place = layer.place(name)
            block.record(place.place.linears[0], scale_spread=place.diagonal().std(unbiased=False).item())
        if options.learn == "block":
            announce(block.console.say, next(block.module.parameters()).device)
            before, after, raised = train_block(block, layer, self.kv)
            block.record(
                "", block_loss_before=before, block_loss_after=after, block_loss_raised=float(raised)
            )
        layer.fold()
        block.set_kv(self.kv)
        round_layer(block, layer)

    def start(self, block: Block) -> LayerTransform:
        """Return the block's scales and rotations: learned before, or from its statistics."""
        options, module, config = self.options, block.module, block.config
        if options.learn != "token":
            return LayerTransform(module, config, options, of_block(block, options), block.seed)
        learned = {
            name.removeprefix(f"{block.name}."): value
            for name, value in block.prepared.items()
            if name.startswith(f"{block.name}.")
        }
        # Where scales start does not matter: they are read.
        blank = options.model_copy(update={"init": "identity"})
        layer = LayerTransform(
            module, config, blank, {}, int(learned.pop("seed")), rounds=options.quantizer == "rtn"
        )
        layer.load(learned)
        if not block.index:
            first, last = (block.prepared[f"loss.{when}"].item() for when in ("first", "last"))
            block.note(f"learning on tokens: {options.token_loss} {first:.4f} before, {last:.4f} after")
        return layer

    # ------------------------------------------------------------ training

    @hookimpl
    def check(self, run: Run) -> None:
        trains = run.job.transform is None and run.job.benchmark is None
        if trains and not self.options.loss_term:
            raise UserError(
                "plugin 'bdq' changes weights with `trainer transform`; in training it only brings its loss, set "
                "plugins.bdq.loss_term=true"
            )
        if self.options.loss_term and not trains:
            raise UserError("plugins.bdq.loss_term is for training; leave it out")
        if trains and (run.job.train.get("deepspeed") or run.job.train.get("fsdp")):
            raise UserError(
                "plugins.bdq.loss_term reads the whole output embedding, which DeepSpeed and FSDP split; train with "
                "plain data parallelism"
            )

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> None:
        if self.options.loss_term:
            RceTerm.check(model)

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        if not self.options.loss_term:
            return []
        self.term = RceTerm(model, self.options.delta, self.options.sign)
        return [LossTerm("rce", self.term)]

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        if self.term is not None:
            self.term.close()
            self.term = None
