"""Log-probabilities of answers against the model's own logits, however they are made, and what is never made."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import log_probs
from graftwork.compat.fused_head import has_fused_head
from graftwork.testing.models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

KINDS = ["llama", "gpt2", "qwen2", "mistral"]


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The definition, in place of the arithmetic that a caller brings."""
    table = F.log_softmax(F.linear(hidden, weight, bias), -1, dtype=torch.float32)
    return table.gather(1, labels[:, None]).squeeze(1)


def answer_log_probs(model: Any, batch: Any, answers: torch.Tensor) -> torch.Tensor:
    return log_probs.answer_log_probs(model, batch, answers, token_log_probs=plain)


def how(model: Any) -> str:
    return log_probs.how(model, token_log_probs=plain)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


# Rows of prompt and answer: how long the prompt is, and the answer.
ROWS = [(4, 5), (2, 3), (1, 7), (3, 0)]


def pairs(
    rows: list[tuple[int, int]], *, left: bool, width: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch padded on one side with tokens that mean something, and the mask of the answers."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 250, (prompt + answer,), generator=generator) for prompt, answer in rows]
    width = max(width, *map(len, tokens))
    ids = torch.full((len(rows), width), 7)
    seen, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, ((prompt, _), own) in enumerate(zip(rows, tokens, strict=True)):
        start = width - len(own) if left else 0
        ids[row, start : start + len(own)] = own
        seen[row, start : start + len(own)] = 1
        answers[row, start + prompt : start + len(own)] = 1
    return {"input_ids": ids, "attention_mask": seen}, answers


def expected_sums(model: Any, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Return the sums from the model's own logits, a row at a time and without padding, in float64."""
    batch, _ = pairs(rows, left=False)
    sums = []
    for row, (prompt, answer) in enumerate(rows):
        ids = batch["input_ids"][row : row + 1, : prompt + answer]
        logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :].double()
        table = logits.log_softmax(-1)
        sums.append(
            sum((table[t - 1, ids[0, t]] for t in range(max(prompt, 1), prompt + answer)), logits.sum() * 0)
        )
    return torch.stack(sums)


def gradients(model: Any, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (sums * torch.arange(1, len(sums) + 1)).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_like_the_logits(model: Any, *, left: bool, atol: float = 2e-5, way: str = "hidden") -> None:
    """Assert sums and gradients against the logits, in the first call of a model and in the second."""
    expected = expected_sums(model, ROWS)
    wanted = gradients(model, expected)
    batch, answers = pairs(ROWS, left=left, width=11)
    for _ in range(2):
        found = answer_log_probs(model, batch, answers)
        assert how(model) == way
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=atol)
        made = gradients(model, found)
        assert made.keys() == wanted.keys()
        for name, gradient in made.items():
            torch.testing.assert_close(
                gradient, wanted[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_models_full_weights(kind: str, tied: bool, left: bool) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert_like_the_logits(model, left=left)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_lora(kind: str, left: bool) -> None:
    model = get_peft_model(tiny_model(kind), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert_like_the_logits(model.eval(), left=left)


def test_an_adapter_that_prepends_tokens() -> None:
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert_like_the_logits(model.eval(), left=False)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ],
    ids=["lora on the head", "a copy of the head"],
)
def test_a_head_of_an_adapters_own_is_asked_for_its_logits(config: LoraConfig) -> None:
    assert_like_the_logits(get_peft_model(tiny_model(), config).eval(), left=True, way="logits")


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing(adapter: bool) -> None:
    model: Any = tiny_model()
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    batch, answers = pairs(ROWS, left=False)
    wanted = gradients(model.train(), answer_log_probs(model, batch, answers))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for name, gradient in gradients(model, answer_log_probs(model, batch, answers)).items():
        torch.testing.assert_close(gradient, wanted[name])


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4).filter(
        lambda rows: all(sum(row) for row in rows)
    ),
    more=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=30, deadline=None)
def test_padding_does_not_count(rows: list[tuple[int, int]], more: int, kind: str) -> None:
    """Prompts may be empty: then the answer's first token has nothing before it, on either side."""
    model = tiny_model(kind)
    width = max(map(sum, rows)) + more
    with torch.no_grad():
        expected = expected_sums(model, rows)
        for left in (False, True):
            found = answer_log_probs(model, *pairs(rows, left=left, width=width))
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_a_batch_without_padding_needs_no_mask_and_answers_may_be_anywhere() -> None:
    model = tiny_model()
    ids = pairs([(4, 5), (6, 3)], left=False)[0]["input_ids"]
    marked = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        table = model(input_ids=ids).logits.double().log_softmax(-1)
        found = answer_log_probs(model, {"input_ids": ids}, marked)
    for row, places in enumerate([(2, 3, 8), (1,)]):
        expected = sum(table[row, t - 1, ids[row, t]].item() for t in places)
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


def test_no_answers_at_all_are_zeros_with_a_graph() -> None:
    model = tiny_model()
    found = answer_log_probs(model, *pairs([(3, 0), (5, 0)], left=True))
    assert torch.equal(found, torch.zeros(2))
    made = gradients(model, found)
    assert made
    assert not any(gradient.any() for gradient in made.values())


@contextlib.contextmanager
def rows_of_the_head(head: Any) -> Iterator[list[int]]:
    counted: list[int] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        counted.append(hidden[..., 0].numel())
        return nn.Linear.forward(head, hidden)

    head.forward = forward
    yield counted
    del head.forward


def test_the_head_computes_one_row_each_the_first_time_and_then_none() -> None:
    model = tiny_model()
    batch, answers = pairs(ROWS, left=False)
    with rows_of_the_head(model.get_output_embeddings()) as counted:
        for _ in range(3):
            answer_log_probs(model, batch, answers).sum().backward()
    assert counted == [len(ROWS), 0, 0]


def test_no_logits_of_the_batch_are_made() -> None:
    model = tiny_model(vocab_size=5000)
    batch, answers = pairs([(4, 60)] * 8, left=False)

    def chosen(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: Any) -> torch.Tensor:
        assert hidden.shape == (8 * 60, weight.shape[1])
        return (hidden * weight[labels]).sum(1)

    for _ in range(2):
        with Largest() as seen:
            sums = log_probs.answer_log_probs(model, batch, answers, token_log_probs=chosen)
            sums.sum().backward()
    assert seen.elements <= model.get_output_embeddings().weight.numel()
    with Largest() as seen:
        log_probs.answer_log_probs(model, batch, answers)
    assert seen.elements >= 8 * 60 * 5000


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_no_hook_stays_behind() -> None:
    model = tiny_model()
    batch, answers = pairs(ROWS, left=False)
    before = hooks(model)
    answer_log_probs(model, batch, answers)
    assert hooks(model) == before

    def fail(*args: Any) -> Any:
        assert hooks(model) > before
        raise ValueError("stop")

    for other in (model, tiny_model()):
        model = other
        with pytest.raises(ValueError, match="stop"):
            log_probs.answer_log_probs(model, batch, answers, token_log_probs=fail)
        assert hooks(model) == before


def small(kind: str, **changes: Any) -> Any:
    """Return a small random model of an architecture that changes its logits after the head."""
    settings = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, pad_token_id=0, **settings)).eval()
    with torch.no_grad():
        # Logits large enough that a cap shows.
        model.get_output_embeddings().weight.mul_(20)
    return model


CHANGED = [
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "changes"), CHANGED, ids=[kind for kind, _ in CHANGED])
def test_models_that_change_their_logits(kind: str, changes: dict[str, float], fused: bool) -> None:
    model = small(kind, **changes)
    if fused:
        add_fused_lm_head(model)
    assert_like_the_logits(model, left=False, atol=1e-3, way="fused" if fused else "logits")


@pytest.mark.parametrize(
    ("kind", "changes"), [("gemma2", {"final_logit_softcapping": None}), ("cohere", {"logit_scale": 1.0})]
)
def test_the_same_models_where_they_change_nothing(kind: str, changes: dict[str, Any]) -> None:
    assert_like_the_logits(small(kind, **changes), left=True, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_change_that_nobody_knows_is_seen_in_the_first_call(fused: bool) -> None:
    class Masked(type(tiny_model())):
        """A model that never says some of its tokens."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            mask = torch.arange(output.logits.shape[-1]) > 250
            output.logits = output.logits.masked_fill(mask, torch.finfo(torch.float32).min)
            return output

    model = tiny_model()
    model.__class__ = Masked
    if fused:
        add_fused_lm_head(model)
    assert how(model) == "hidden"
    assert_like_the_logits(model, left=False, way="logits")


def test_a_model_that_does_not_call_its_head() -> None:
    class Direct(type(tiny_model())):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.model(*args, **kwargs)
            output["logits"] = output.last_hidden_state @ self.lm_head.weight.T
            return output

    model = tiny_model()
    model.__class__ = Direct
    assert_like_the_logits(model, left=False, way="logits")


def test_weights_that_are_no_numbers_give_no_numbers() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    batch, answers = pairs(ROWS[:3], left=False)
    for _ in range(2):
        assert answer_log_probs(model, batch, answers).isnan().all()
        assert how(model) == "hidden"


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_all_ways_agree(monkeypatch: pytest.MonkeyPatch, left: bool, adapter: bool) -> None:
    model: Any = tiny_model("gpt2")
    add_fused_lm_head(model)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    batch, answers = pairs(ROWS, left=left)
    sums, made = {}, {}
    for way in ("hidden", "fused", "logits"):
        monkeypatch.setattr(log_probs, "how", lambda model, way=way, **_: way)
        sums[way] = answer_log_probs(model, batch, answers)
        made[way] = gradients(model, sums[way])
    for way in ("fused", "logits"):
        torch.testing.assert_close(sums[way], sums["hidden"])
        for name, gradient in made[way].items():
            torch.testing.assert_close(gradient, made["hidden"][name], rtol=1e-4, atol=1e-5)


def test_which_way_is_taken() -> None:
    model = tiny_model()
    assert not has_fused_head(model)
    assert (how(model), log_probs.how(model)) == ("hidden", "logits")
    head = model.get_output_embeddings()
    # What DeepSpeed puts on a weight that it has spread.
    head.weight.ds_id = 0
    assert how(model) == "logits"
    add_fused_lm_head(model)
    assert has_fused_head(model)
    assert how(model) == "fused"
    del head.weight.ds_id
    assert (how(model), log_probs.how(model)) == ("hidden", "fused")
    model.config.output_logit_soft_cap = 30.0
    assert (how(model), log_probs.how(model)) == ("logits", "logits")


def test_a_head_in_eight_bits_is_asked_for_its_logits() -> None:
    model = tiny_model()
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert how(model) == "logits"


PROCESSES = """
import torch
from accelerate import Accelerator
from graftwork.compat.fused_head import has_fused_head
from graftwork import log_probs
from graftwork.testing.models import tiny_model
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

def plain(hidden, weight, labels, bias):
    table = F.log_softmax(F.linear(hidden, weight, bias), -1, dtype=torch.float32)
    return table.gather(1, labels[:, None]).squeeze(1)

def answer_log_probs(model, batch, answers):
    return log_probs.answer_log_probs(model, batch, answers, token_log_probs=plain)

ids = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(0))
answers = torch.ones_like(ids)
answers[:, :4] = 0

def gradients(model, rows):
    # Weighted, so that a row that went to the wrong place would show.
    sums = answer_log_probs(model, {"input_ids": ids[rows]}, answers[rows])
    (sums * torch.arange(1, 5)[rows]).sum().backward()
    return [parameter.grad for parameter in model.parameters()]

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
alone = gradients(tiny_model(), slice(0, 4))
for unused in (False, True):
    model = DistributedDataParallel(tiny_model(), find_unused_parameters=unused)
    for _ in range(3):
        model.zero_grad()
        found = gradients(model, slice(2 * rank, 2 * rank + 2))
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(2 * one, other, rtol=1e-4, atol=1e-5)

# The trainer's mixed precision: Accelerate puts a forward of its own in front of the model's.
base = tiny_model()
add_fused_lm_head(base)
model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(base)
assert type(model) is DistributedDataParallel and has_fused_head(base)
assert log_probs.how(model, token_log_probs=plain) == "hidden"
with torch.no_grad():
    found = answer_log_probs(model, {"input_ids": ids}, answers)
    logits = model(input_ids=ids, use_cache=False).logits
    precise = answer_log_probs(tiny_model(), {"input_ids": ids}, answers)
own = logits[:, 3:-1].log_softmax(-1).gather(2, ids[:, 4:, None]).sum((1, 2))
assert found.dtype == torch.float32
torch.testing.assert_close(found, own)
assert (found - precise).abs().max() > 1e-4
torch.distributed.destroy_process_group()
"""


def test_two_processes_and_their_mixed_precision(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, *launch, *meet, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
