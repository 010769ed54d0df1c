"""Train on pairs of answers with TRL's DPO trainer, a loss of our own and references that were computed before.

Tested with trl 1.16. Public seams: ``compute_loss``, ``log``, the ``data_collator`` argument and
``precompute_ref_log_probs``, which keeps a second model out of memory. Private ones, because the pairs come as
tokens with their references: ``_prepare_dataset`` and ``_precompute_ref_logps``, which return them as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.dpo_trainer import DPOTrainer

from graftwork.compat.trainer import keep_adapter_activity
from graftwork.errors import PluginError, UserError
from graftwork.evaluate.encoding import pad_token
from graftwork.files import write_json_atomic
from graftwork.hookspecs import PairBatch, PairLoss, SelfPlay
from graftwork.log_probs import answer_log_probs
from graftwork.self_play.scoring import pad_batch

if TYPE_CHECKING:
    from graftwork.run import Run

SILENT = (
    "beta",
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "truncation_mode",
    "padding_free",
    "pad_to_multiple_of",
    "remove_unused_columns",
    "use_liger_kernel",
)
"""Fields of DPOConfig that would do nothing here."""


def check_train_fields(train: Mapping[str, Any], owner: str) -> None:
    """Refuse fields of DPOConfig that belong to its own loss, references or batches.

    Raises:
        UserError: which.
    """
    for field in SILENT:
        if field in train:
            raise UserError(
                f"train.{field} is for DPO's own loss or batches, which plugin '{owner}' replaces; remove it, and "
                f"see `trainer plugins show {owner}` for the plugin's options"
            )


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """Rows of tokens to a batch: all targets, then all written answers, filled up on the right.

    ``reference_chosen`` and ``reference_rejected`` are B x J; ``item`` says which training items these are.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        answers = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
        if rows[0]["rejected_ids"]:
            answers += [(row["prompt_ids"], row["rejected_ids"]) for row in rows]
        references = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
            for name in ("reference_chosen", "reference_rejected")
        }
        return {
            **pad_batch(answers, self.pad),
            **references,
            "item": torch.tensor([row["item"] for row in rows]),
        }


class PairTrainer(DPOTrainer):
    """DPO's trainer with the loss of a method of self-play; call :meth:`begin` before training.

    The reference log-probabilities come with the data, so no reference model is in memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, tokenizer = kwargs["args"], kwargs["processing_class"]
        config.remove_unused_columns = False
        # Nothing is computed, see below; it is what tells the trainer that no reference model is needed.
        config.precompute_ref_log_probs = True
        super().__init__(*args, data_collator=PairCollator(pad_token(tokenizer)), **kwargs)
        model: Any = self.model
        if "ref" in getattr(model, "peft_config", {}):
            # A copy of the adapter, made to be the reference.
            with keep_adapter_activity(model):
                model.delete_adapter("ref")
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = 0

    def begin(self, play: SelfPlay, run: Run, owner: str, iteration: int) -> None:
        """Use the loss of ``play``, brought by the plugin ``owner``, in this iteration."""
        self._play, self._run, self._owner, self._iteration = play, run, owner, iteration

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        pairs = len(inputs["item"])
        answers = inputs["completion_mask"]
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        sums = answer_log_probs(
            model,
            asked,
            answers,
            bare=self.accelerator.unwrap_model(model),
            token_log_probs=self._play.token_log_probs,
        )
        tokens = answers[:, 1:].sum(1)
        batch = PairBatch(
            sums[:pairs],
            sums[pairs:],
            inputs["reference_chosen"],
            inputs["reference_rejected"],
            tokens[:pairs],
            tokens[pairs:],
            self._iteration,
        )
        try:
            found = self._play.loss(batch)
        except UserError:
            raise
        except Exception as error:
            raise PluginError(self._owner, "self_play (loss)", error) from error
        loss = found.rows.mean()
        self._stop_at_no_number(loss, batch, found, inputs["item"])
        if model.training:
            self._count(pairs, found.metrics)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._means())
        super().log(logs, *args, **kwargs)

    def _count(self, pairs: int, metrics: Mapping[str, torch.Tensor]) -> None:
        self._rows += pairs
        for name, value in metrics.items():
            total = value.detach().float().mean() * pairs
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total

    def _means(self) -> dict[str, float]:
        if not self._sums:
            return {}
        rows = next(iter(self._sums.values())).new_tensor(float(self._rows))
        totals = torch.stack([rows, *self._sums.values()])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        means = (totals[1:] / totals[0]).tolist()
        found = dict(zip(self._sums, means, strict=True))
        self._sums, self._rows = {}, 0
        return found

    def _stop_at_no_number(
        self, loss: torch.Tensor, batch: PairBatch, found: PairLoss, items: torch.Tensor
    ) -> None:
        if math.isfinite(loss.item()):
            return
        path = self._run.directory / f"no-number-{self._run.rank}.json"
        columns = {
            "item": items,
            "loss": found.rows,
            **{
                field.name: value
                for field in dataclasses.fields(batch)
                if isinstance(value := getattr(batch, field.name), torch.Tensor)
            },
        }
        # As words, since JSON has no NaN.
        rows = {name: [str(one) for one in value.detach().tolist()] for name, value in columns.items()}
        write_json_atomic(path, {"step": self.state.global_step, "iteration": self._iteration, **rows})
        raise UserError(
            f"the loss of iteration {self._iteration} is {loss.item()} after step {self.state.global_step}; the "
            f"batch is in '{path}': lower train.learning_rate, or look at its items"
        )
