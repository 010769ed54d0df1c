"""Encoder-decoders: their items as tokens, their training, answers, statistics, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork import UserError
from graftwork.data.seq2seq import encode, right_padding
from graftwork.evaluate.answers import generate_answers
from graftwork.evaluate.perplexity import perplexity
from graftwork.models import load_model, load_tokenizer
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork.train.algorithms import algorithm, build_arguments
from graftwork.train.statistics import answer_losses, second_moments
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn import functional as F

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
END = 2


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("t5") / "model", "t5")


def items(*pairs: tuple[str, str]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])


def a_trainer(folder: Path, dataset: Dataset, model: Any = None, **fields: Any) -> Any:
    chosen = algorithm("seq2seq")
    fields = {"save_strategy": "no", "lr_scheduler_type": "constant", **fields}
    return chosen.trainer(
        model=model or tiny_model("t5", dropout_rate=0.0),
        args=build_arguments(chosen.config, fields, output_dir=str(folder), seed=0),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )


# ---------------------------------------------------------------------- items


def test_an_answer_loses_its_first_blank_and_ends_with_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    rows = encode(items(("who? ", " me"), ("x", "  y"), ("z", "")), tokenizer)
    assert rows.column_names == ["input_ids", "attention_mask", "labels"]
    spelled = {text: tokenizer(text)["input_ids"] for text in ("who? ", "me", " y")}
    assert rows[0]["input_ids"] == spelled["who? "]
    assert rows[0]["attention_mask"] == [1] * len("who? ")
    assert [row["labels"] for row in rows] == [[*spelled["me"], END], [*spelled[" y"], END], [END]]


def test_an_end_token_of_the_tokenizer_s_own_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", END)]
    )
    row = encode(items(("ab", " c")), tokenizer)[0]
    assert row["input_ids"][2:] == [END]
    assert row["labels"][1:] == [END]


def test_answers_are_padded_on_the_right_whatever_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert right_padding(tokenizer) is tokenizer
    tokenizer.padding_side = "left"
    assert right_padding(tokenizer).padding_side == "right"
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Dataset.from_list([{"text": "a"}]), "the columns text; give them 'prompt' and 'completion'"),
        (
            Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]),
            "the items are chats",
        ),
        (items(("a" * 9, "b")), "an item of 9 tokens does not fit the model's window of 8"),
    ],
)
def test_items_that_cannot_be_learned_are_refused(dataset: Dataset, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode(dataset, tiny_tokenizer(), window=8)


# ---------------------------------------------------------------------- training


def test_the_loss_is_that_of_the_formula(tmp_path: Path) -> None:
    """Mean over the batch's answer tokens of -log p(token | prompt, earlier tokens), item by item."""
    trainer = a_trainer(tmp_path, items(("abc", " d"), ("e", " fgh")))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    given = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        for position, token in enumerate(row["labels"]):
            decoder = torch.tensor([[0, *row["labels"][:position]]])
            source = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logits = trainer.model(input_ids=source, decoder_input_ids=decoder).logits[0, -1]
            total -= torch.log_softmax(logits.double(), -1)[token].item()
            count += 1
    assert given == pytest.approx(total / count, rel=1e-5)
    with torch.no_grad():
        per_item = answer_losses(trainer.model, batch, "sum")
    assert per_item.sum().item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulating_is_the_mean_of_its_micro_batches(smoothing: float, tmp_path: Path) -> None:
    """Answers of one length: one batch of four, or two of two accumulated, give the same gradient."""
    dataset = items(*[(f"{n}?", f" {n}!") for n in range(4)])
    weights = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = a_trainer(
            tmp_path / str(size),
            dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append(trainer.model.decoder.block[0].layer[2].DenseReluDense.wi.weight.detach())
    start = tiny_model("t5").decoder.block[0].layer[2].DenseReluDense.wi.weight
    assert not torch.allclose(weights[0], start, atol=1e-4)
    torch.testing.assert_close(weights[0] - start, weights[1] - start, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["shared", "stacked", None])
def test_a_stream_trains_scores_and_loads_again(
    policy: str | None, t5: Path, stream: Path, tmp_path: Path
) -> None:
    adapter = {**LORA, "policy": policy} if policy else None
    recipe = tiny_recipe(t5, stream, algorithm="seq2seq", adapter=adapter)
    result = run_tiny(recipe, tmp_path / "run")
    assert all(value is not None for row in result["scores"] for value in row)
    by_task = {
        task: [loss for name, _, loss in losses(tmp_path / "run") if name == task] for task in result["order"]
    }
    assert all(values[-1] < 0.9 * values[0] for values in by_task.values())
    model = load_model(str(tmp_path / "run"))
    ids, answer = torch.arange(3, 40)[None], torch.tensor([[0, 5, 6]])
    moved = model.eval()(input_ids=ids, decoder_input_ids=answer).logits
    start = tiny_model("t5")(input_ids=ids, decoder_input_ids=answer).logits
    assert not torch.allclose(moved, start, atol=1e-3)
    if policy:
        config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_2_SEQ_LM"
        plain = PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "run/adapter").eval()
        torch.testing.assert_close(plain(input_ids=ids, decoder_input_ids=answer).logits, moved)


def test_full_weights_learn_the_answers(t5: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        t5,
        stream,
        algorithm="seq2seq",
        data_options={"order": ["fruit"]},
        train={"max_steps": 120, "learning_rate": 7e-3, "lr_scheduler_type": "constant"},
    )
    result = run_tiny(recipe, tmp_path / "run")
    # Two labels: half is what answering one of them always scores; a random model answers none.
    assert result["scores"][0] == [0.0]
    assert result["scores"][1][0] >= 0.5
    assert result["invalid"][1][0] < 0.5


def test_a_run_that_stopped_inside_a_task_goes_on_to_the_same_bits(
    t5: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.train.progress import Progress

    recipe = tiny_recipe(
        t5,
        stream,
        algorithm="seq2seq",
        adapter={**LORA, "policy": "stacked"},
        data_options={"order": ["fruit", "metal"]},
        train={"save_strategy": "steps", "save_steps": 2},
    )
    run_tiny(recipe, tmp_path / "a")
    original = Progress.on_step_end
    count = iter(range(100))

    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if next(count) == 8:  # in the second task
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "b")
    run_tiny(recipe, tmp_path / "b", resume=True)
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    for file in (tmp_path / "a/adapter").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b/adapter" / file.name).read_bytes()


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("t5", {}, "algorithm 'sft' trains causal language models, and the model is an encoder-decoder (t5)"),
        ("t5", {"algorithm": "dpo"}, "use algorithm: seq2seq"),
        ("llama", {"algorithm": "seq2seq"}, "and the model is a causal language model (llama)"),
        ("t5", {"algorithm": "seq2seq", "data_options": {"prompt": "chat"}}, "set data.prompt to plain"),
        ("t5", {"algorithm": "seq2seq", "train": {"max_length": 9}}, "Seq2SeqTrainingArguments has no field"),
        (
            "t5",
            {"algorithm": "seq2seq", "evaluate": {"general": {"text": "words.txt"}}},
            "perplexity on a text is that of a causal language model, and t5 is an encoder-decoder",
        ),
    ],
)
def test_the_wrong_pairing_is_refused_before_weights_are_read(
    kind: str,
    changes: dict[str, Any],
    said: str,
    checkpoint: Path,
    t5: Path,
    stream: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unread(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("graftwork.train.stream.load_chosen", unread)
    recipe = tiny_recipe(t5 if kind == "t5" else checkpoint, stream, **changes)
    with pytest.raises(UserError) as caught:
        run_tiny(recipe, tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_perplexity_is_refused(t5: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("word " * 200)
    with pytest.raises(UserError, match="score it on tasks instead"):
        perplexity(tiny_model("t5"), load_tokenizer(str(t5)), tmp_path / "words.txt", window=16)


# ---------------------------------------------------------------------- answers


def test_answers_are_those_of_a_greedy_loop_and_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model("t5", initializer_factor=3.0), tiny_tokenizer()
    prompts = ["a", "what is it now?", "bcd"]
    expected = []
    for prompt in prompts:
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        written = [0]
        while len(written) < 7 and written[-1] != END:
            with torch.no_grad():
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    for size in (1, 3):
        answers = generate_answers(
            model, tokenizer, prompts, max_new_tokens=6, batch_size=size, first_line=False
        )
        assert answers == expected


def test_an_adapter_s_wrapper_generates_as_well() -> None:
    model, tokenizer = tiny_model("t5"), tiny_tokenizer()
    plain = generate_answers(model, tokenizer, ["abc"], max_new_tokens=5, first_line=False)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
    )
    assert generate_answers(adapted, tokenizer, ["abc"], max_new_tokens=5, first_line=False) == plain


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("adapted", [False, True])
def test_second_moments_take_prompts_in_the_encoder_and_answers_in_the_decoder(adapted: bool) -> None:
    """Against a sum over items one by one, without any padding.

    The padded batch has prompts and answers of the same width, so shapes cannot tell them apart.
    """
    model: Any = tiny_model("t5", dtype=torch.float64)
    base = model
    if adapted:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
        ).double()
    first, cross = base.encoder.block[1].layer, base.decoder.block[1].layer
    modules = {
        "encoder q": first[0].SelfAttention.q,
        "encoder wo": first[1].DenseReluDense.wo,
        "self q": cross[0].SelfAttention.q,
        "cross q": cross[1].EncDecAttention.q,
        "cross k": cross[1].EncDecAttention.k,
        "decoder wi": cross[2].DenseReluDense.wi,
    }
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 2), (3, 5), (1, 1)]
    pairs = [
        tuple(torch.randint(3, 250, (count,), generator=generator) for count in both) for both in lengths
    ]
    ids = torch.zeros(3, 5, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (source, answer) in enumerate(pairs):
        ids[row, : len(source)], mask[row, : len(source)], labels[row, : len(answer)] = source, 1, answer
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = second_moments(model, modules, [batch], dtype=torch.float64)
    tokens = {
        name: sum(s if name in ("encoder q", "encoder wo", "cross k") else a for s, a in lengths)
        for name in modules
    }
    for name, module in modules.items():
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].detach()))
        for source, answer in pairs:
            decoder = torch.cat([torch.zeros(1, dtype=torch.long), answer[:-1]])
            with torch.no_grad():
                model.eval()(input_ids=source[None], decoder_input_ids=decoder[None])
        handle.remove()
        x_ND = torch.cat(seen)
        assert found[name].tokens == len(x_ND) == tokens[name], name
        torch.testing.assert_close(found[name].matrix, x_ND.T @ x_ND, rtol=1e-9, atol=1e-9, msg=name)


def test_the_smoothed_loss_is_that_of_the_formula(tmp_path: Path) -> None:
    """(1 - e) -log p(token) + e mean over the vocabulary of -log p."""
    trainer = a_trainer(tmp_path, items(("abc", " d"), ("e", " fgh")), label_smoothing_factor=0.2)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    given = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()
    with torch.no_grad():
        logits = trainer.model(
            **{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        ).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    assert given == pytest.approx(expected.item(), rel=1e-5)
