"""Answers and perplexity of tiny models: against one-at-a-time references, and leaving no trace."""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork.data.labels import normalise
from graftwork.data.tasks import Task
from graftwork.errors import UserError
from graftwork.evaluate.answers import generate_answers, score_task
from graftwork.evaluate.perplexity import perplexity
from graftwork.generate import Decoding
from graftwork.testing.models import CONFIGS, tiny_checkpoint, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LogitsProcessor

PROMPTS = ["a", "what is this", "x" * 30, "Option: yes, no \nAnswer:", "日本"]
TOKENIZER = tiny_tokenizer()


class Says(LogitsProcessor):
    """Write ``text`` and then the end token, whatever the model thinks; ``widths`` of prompts as seen."""

    def __init__(self, text: str) -> None:
        self.ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
        self.start: int | None = None
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None or input_ids.shape[1] <= self.start:
            self.start = input_ids.shape[1]
        position = input_ids.shape[1] - self.start
        self.steps += 1
        wanted = torch.full_like(scores, -math.inf)
        wanted[:, self.ids[min(position, len(self.ids) - 1)]] = 0
        return wanted


def task(gold: list[str], labels: list[str] | None = None, prompts: list[Any] | None = None) -> Task:
    rows = [
        {"prompt": (prompts or PROMPTS)[i % len(PROMPTS)], "completion": f" {text}"}
        for i, text in enumerate(gold)
    ]
    dataset = Dataset.from_list(rows)
    return Task("t", dataset, dataset, labels or [])


# ---------------------------------------------------------------------- tokenizer and models


@given(st.text())
def test_tokenizer_is_lossless(text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_load_by_auto_classes(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / kind, kind)
    loader = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == kind
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == 2
    chat = [{"role": "user", "content": "Hi"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<user>Hi\n<assistant>"
    )
    reference, ids = tiny_model(kind), torch.tensor([tokenizer("hello")["input_ids"]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", CONFIGS)
def test_batches_answer_as_one_prompt_at_a_time(kind: str) -> None:
    model = tiny_model(kind)
    batched = generate_answers(model, TOKENIZER, PROMPTS, batch_size=3, max_new_tokens=6)
    alone = [generate_answers(model, TOKENIZER, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert batched == alone
    plain = []
    for prompt in PROMPTS:
        batch = TOKENIZER(prompt, return_tensors="pt")
        # An encoder-decoder writes its start token and the answer, a decoder the prompt and the answer.
        before = 1 if kind == "t5" else batch["input_ids"].shape[1]
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, before:]
        plain.append(
            (TOKENIZER.decode(ids, skip_special_tokens=True).strip().split("\n") or [""])[0].rstrip()
        )
    assert batched == plain


def test_stops_at_a_line_break_after_text() -> None:
    for text, answer in (("yes\nno", "yes"), ("\n \n yes \nno", "yes"), ("yes", "yes"), ("\n\n", "")):
        says = Says(text)
        assert (
            generate_answers(
                tiny_model(), TOKENIZER, ["a", "bcd"], max_new_tokens=20, decoding=Decoding(processors=[says])
            )
            == [answer] * 2
        )
    says = Says("yes\nno and much more")
    generate_answers(tiny_model(), TOKENIZER, ["a"], max_new_tokens=20, decoding=Decoding(processors=[says]))
    assert says.steps == 4
    whole = generate_answers(
        tiny_model(),
        TOKENIZER,
        ["a"],
        max_new_tokens=20,
        first_line=False,
        decoding=Decoding(processors=[Says("yes\nno")]),
    )
    assert whole == ["yes\nno"]


def test_chats_go_through_the_template() -> None:
    model = tiny_model()
    chat = [{"role": "user", "content": "Hi"}]
    begun = [*chat, {"role": "assistant", "content": "Oh"}]
    as_text = ["<user>Hi\n<assistant>", "<user>Hi\n<assistant>Oh"]
    assert generate_answers(model, TOKENIZER, [chat, begun]) == generate_answers(model, TOKENIZER, as_text)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        generate_answers(model, bare, [chat])


def test_what_cannot_be_answered() -> None:
    with pytest.raises(UserError, match="a prompt of 2000 tokens and 8 new ones do not fit"):
        generate_answers(tiny_model(), TOKENIZER, ["x" * 2000])
    with pytest.raises(UserError, match="a prompt is empty"):
        generate_answers(tiny_model(), TOKENIZER, [""])
    assert generate_answers(tiny_model(), TOKENIZER, []) == []


def test_greedy_whatever_the_checkpoint_says() -> None:
    model = tiny_model()
    expected = generate_answers(model, TOKENIZER, PROMPTS)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3)
    assert generate_answers(model, TOKENIZER, PROMPTS) == expected


def test_tokenizer_without_pad_token() -> None:
    other = tiny_tokenizer()
    other.pad_token = None
    assert generate_answers(tiny_model(), other, PROMPTS) == generate_answers(
        tiny_model(), TOKENIZER, PROMPTS
    )
    assert other.pad_token_id is None


def test_leaves_no_trace_on_a_model_in_training(tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, task_type="CAUSAL_LM", lora_dropout=0.5))
    expected = generate_answers(model.eval(), TOKENIZER, PROMPTS)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    side = TOKENIZER.padding_side
    assert generate_answers(model, TOKENIZER, PROMPTS) == expected
    (tmp_path / "a.txt").write_text("hello world " * 9)
    perplexity(model, TOKENIZER, tmp_path / "a.txt", window=16)
    assert [module.training for module in model.modules()] == modes
    assert TOKENIZER.padding_side == side
    assert model.config.use_cache is False
    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ZeroDivisionError):
        generate_answers(model, TOKENIZER, PROMPTS, progress=lambda n: 1 // 0)
    assert [module.training for module in model.modules()] == modes


def test_what_a_layer_caches_while_scoring_can_be_trained_on() -> None:
    model = tiny_model()
    cached: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: cached.append(args[0]))
    generate_answers(model, TOKENIZER, ["a"], max_new_tokens=1)
    hook.remove()
    weight = torch.ones_like(cached[0], requires_grad=True)
    (weight * cached[0]).sum().backward()


def test_contexts_surround_every_batch_and_progress_adds_up() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        entered.append(f"+{name}")
        yield
        entered.append(f"-{name}")

    done: list[int] = []
    generate_answers(
        tiny_model(),
        TOKENIZER,
        PROMPTS,
        batch_size=3,
        decoding=Decoding(contexts=lambda: [context("a"), context("b")]),
        progress=done.append,
    )
    assert entered == ["+a", "+b", "-b", "-a"] * 2
    assert done == [3, 2]


# ---------------------------------------------------------------------- scores


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text.upper()}! ") == normalise(text.upper())


def test_labels_are_compared_normalised() -> None:
    scored = task(["Very good", "bad", "very good"], ["Very good", "bad"])
    score = score_task(
        tiny_model(),
        TOKENIZER,
        scored,
        max_new_tokens=16,
        decoding=Decoding(processors=[Says(" very  GOOD!")]),
    )
    assert score.correct == [True, False, True]
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.invalid == 0
    score = score_task(
        tiny_model(), TOKENIZER, scored, max_new_tokens=16, decoding=Decoding(processors=[Says("good")])
    )
    assert (score.accuracy, score.invalid, score.answers) == (0, 1, ["good"] * 3)


def test_an_empty_answer_is_wrong_and_invalid() -> None:
    score = score_task(
        tiny_model(), TOKENIZER, task(["a"], ["a", "b"]), decoding=Decoding(processors=[Says("")])
    )
    assert (score.accuracy, score.invalid) == (0, 1)


def test_answers_without_labels_must_be_exact() -> None:
    scored = task(["3.5", "35", "-5"])
    assert score_task(
        tiny_model(), TOKENIZER, scored, decoding=Decoding(processors=[Says("3.5")])
    ).correct == [
        True,
        False,
        False,
    ]
    assert (
        score_task(tiny_model(), TOKENIZER, scored, decoding=Decoding(processors=[Says("5")])).correct
        == [False] * 3
    )
    lines = task(["if x:\n    return 1"])
    score = score_task(
        tiny_model(),
        TOKENIZER,
        lines,
        max_new_tokens=30,
        decoding=Decoding(processors=[Says("if x:\n  return 1")]),
    )
    assert score.correct == [True]


def test_tasks_that_cannot_be_scored() -> None:
    text = Dataset.from_list([{"text": "a"}])
    for scored in (Task("t", text, text), Task("t", text)):
        with pytest.raises(UserError, match="task 't': test items need a prompt and an answer"):
            score_task(tiny_model(), TOKENIZER, scored)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    calls: list[int] = []
    score = score_task(
        tiny_model(), TOKENIZER, task(list("abcde"), list("abcde")), batch_size=2, progress=calls.append
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps([score.answers, score.correct, len(calls)]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_items_and_all_get_the_whole(tmp_path: Path, world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, args=(world, port, str(tmp_path)), nprocs=world, start_method="fork"
    )
    alone = score_task(tiny_model(), TOKENIZER, task(list("abcde"), list("abcde")))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(answers == alone.answers and correct == alone.correct for answers, correct, _ in results)
    assert len({calls for _, _, calls in results}) == 1


# ---------------------------------------------------------------------- perplexity


def test_perplexity_agrees_with_the_models_own_loss(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    (tmp_path / "a.txt").write_text(text)
    model, ids = tiny_model(), TOKENIZER(text, return_tensors="pt")["input_ids"][0]
    found = perplexity(model, TOKENIZER, tmp_path / "a.txt", window=32)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in ids[:128].split(32)]
    assert found["tokens"] == 4 * 31
    assert found["nll"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    seen: list[int] = []
    fewer = perplexity(
        model, TOKENIZER, tmp_path / "a.txt", window=32, max_windows=3, batch_size=2, progress=seen.append
    )
    assert seen == [2, 1]
    assert fewer["nll"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)


def test_perplexity_of_documents_and_of_a_broken_model(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("one two\n\nthree")
    model = tiny_model()
    both = [perplexity(model, TOKENIZER, tmp_path / name, window=7) for name in ("a.jsonl", "b.txt")]
    assert both[0] == both[1]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, TOKENIZER, tmp_path / "b.txt", window=7)["perplexity"] == math.inf


def test_texts_that_have_no_perplexity(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "a.txt"

    def complaint(window: int = 32, at: Path = path) -> str:
        with pytest.raises(UserError) as caught:
            perplexity(model, TOKENIZER, at, window=window)
        return str(caught.value)

    assert "does not exist" in complaint()
    path.write_text("short")
    assert "has 5 tokens, fewer than one window of 32" in complaint()
    path.write_text("")
    assert "has 0 tokens" in complaint()
    path.write_bytes(b"\xff")
    assert "cannot be read as UTF-8" in complaint()
    assert "does not fit the model's window of 1024" in complaint(window=2000)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert "are of the form 'completion', not 'text'" in complaint(at=tmp_path / "a.jsonl")
