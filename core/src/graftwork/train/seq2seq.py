"""transformers' Seq2SeqTrainer for items with a prompt and a completion, which it tokenises itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer

from graftwork.data.seq2seq import encode, right_padding

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Seq2SeqTrainingArguments


class PromptSeq2SeqTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer on prompts and completions; see :func:`graftwork.data.seq2seq.encode`."""

    def __init__(
        self,
        model: Any,
        args: Seq2SeqTrainingArguments,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        **others: Any,
    ) -> None:
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(
            model=model,
            args=args,
            # A smoothed loss is taken outside of the model, which then makes no decoder inputs of its labels.
            data_collator=DataCollatorForSeq2Seq(
                right_padding(processing_class), model=model if args.label_smoothing_factor else None
            ),
            train_dataset=encode(train_dataset, processing_class, window),
            processing_class=processing_class,
            **others,
        )
        # Encoder-decoders take any keyword and ignore the number of tokens in the batch: their loss is the mean
        # over the micro-batch. Trusting the signature would multiply gradients by the accumulation steps.
        self.model_accepts_loss_kwargs = False
