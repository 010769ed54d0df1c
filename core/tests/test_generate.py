"""One decode loop for two streams against transformers' own, and callbacks before each forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import Combiner, ForwardPass, UserError
from graftwork.generate import Decoding, Prompt, Templates, Trace, decode, prompt_from_record, watching
from graftwork.testing.models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where is it?"),
    Prompt("a b", "a longer prompt without the context"),
]
MAIN = Combiner("main only", lambda main, contrast: main)
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}


def guided(scale: float) -> Combiner:
    """Return classifier-free guidance: s (l2 - l1) + l1."""

    def fn(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        with_, without = main.log_softmax(-1), contrast.log_softmax(-1)
        return scale * (with_ - without) + without

    return Combiner("guided", fn)


def run(model: Any, prompts: list[Prompt] = PAIRS, decoding: Decoding | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return decode(model, prompts, tokenizer=TOKENIZER, decoding=decoding, **{"max_new_tokens": 12, **options})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", ["joint", "split"])
def test_a_combiner_that_keeps_the_main_logits_is_plain_generate(
    kind: str, options: dict[str, Any], rows: str
) -> None:
    model = tiny_model(kind)
    assert run(model, decoding=Decoding(MAIN), rows=rows, **options) == run(model, **options)


def test_joint_and_split_rows_give_the_same_tokens() -> None:
    model = tiny_model()
    joint, split = (run(model, decoding=Decoding(guided(2.0)), rows=rows) for rows in ("joint", "split"))
    assert joint == split
    assert joint != run(model)


@pytest.mark.parametrize("prompt", PAIRS[:2])
def test_guidance_is_transformers_own(prompt: Prompt) -> None:
    model = tiny_model()
    ids, negative = (torch.tensor([TOKENIZER(text)["input_ids"]]) for text in (prompt.main, prompt.contrast))
    theirs = model.generate(
        ids, max_new_tokens=12, do_sample=False, guidance_scale=2.5, negative_prompt_ids=negative
    )
    assert run(model, [prompt], Decoding(guided(2.5))) == theirs[:, ids.shape[1] :].tolist()


def test_a_batch_is_its_rows() -> None:
    model = tiny_model()
    decoding = Decoding(guided(2.0))
    assert run(model, decoding=decoding) == [run(model, [one], decoding)[0] for one in PAIRS]


def test_both_streams_against_recomputation_from_scratch() -> None:
    model, prompt, combiner = tiny_model(dtype=torch.float64), PAIRS[0], guided(2.0)
    given: list[torch.Tensor] = []

    def noted(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        given.append(torch.cat([main, contrast]))
        return combiner.fn(main, contrast)

    tokens = run(model, [prompt], Decoding(Combiner("noted", noted)))[0]
    assert len(given) == len(tokens)
    for text, row in ((prompt.main, 0), (prompt.contrast, 1)):
        ids = TOKENIZER(text)["input_ids"]
        logits = model(torch.tensor([ids + tokens[:-1]])).logits[0, len(ids) - 1 :]
        torch.testing.assert_close(
            torch.stack([one[row] for one in given]), logits.float(), atol=1e-5, rtol=1e-5
        )


def test_a_finished_row_does_not_change_the_others() -> None:
    model = tiny_model()

    def second_row_ends(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        scores = main.clone()
        scores[:, 2] = -torch.inf
        scores[1, 2] = 1e9
        return scores

    tokens = run(model, decoding=Decoding(Combiner("ends", second_row_ends)), eos_token_id=2)
    assert tokens[1] == [2]
    assert len(tokens[0]) == len(tokens[2]) == 12
    alone = run(model, [PAIRS[0]], Decoding(MAIN), suppress_tokens=[2])
    assert tokens[0] == alone[0]


def test_an_amateur_reads_the_main_prompt() -> None:
    model, amateur = tiny_model(), tiny_model(seed=1)
    given: list[torch.Tensor] = []

    def fn(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        given.append(contrast)
        return main

    run(model, [Prompt("hello there")], Decoding(Combiner("amateur", fn, amateur)), max_new_tokens=1)
    ids = torch.tensor([TOKENIZER("hello there")["input_ids"]])
    torch.testing.assert_close(given[0], amateur(ids).logits[:, -1])
    with pytest.raises(UserError, match="has 300 tokens"):
        run(model, [Prompt("a")], Decoding(Combiner("amateur", fn, tiny_model(vocab_size=300))))


def test_an_adapter_works_in_both_streams() -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(tiny_model(), config)
    assert run(model, decoding=Decoding(MAIN)) == run(model)
    assert run(model) != run(tiny_model())


class Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(MAIN)], ids=["plain", "paired"])
def test_a_streamer_gets_the_prompt_and_every_token_once(decoding: Decoding) -> None:
    streamer = Streamer()
    tokens = run(tiny_model(), [PAIRS[0]], decoding, streamer=streamer)[0]
    assert streamer.got == [TOKENIZER(PAIRS[0].main)["input_ids"], *([token] for token in tokens)]
    assert streamer.ended == 1


@pytest.mark.parametrize("decoding", ["plain", "joint", "split"])
def test_callbacks_see_every_pass(decoding: str) -> None:
    seen: list[ForwardPass] = []
    combiner = None if decoding == "plain" else MAIN
    rows = "joint" if decoding == "plain" else decoding
    model = tiny_model()
    run(model, PAIRS[:2], Decoding(combiner, before_forward=[seen.append]), rows=rows, max_new_tokens=3)
    assert not model._forward_pre_hooks
    none = slice(0, 0)
    expected = {
        "plain": [(step, slice(0, 2), none) for step in (0, 1, 2)],
        "joint": [(step, slice(0, 2), slice(2, 4)) for step in (0, 1, 2)],
        "split": [
            rows for step in (0, 1, 2) for rows in ((step, slice(0, 2), none), (step, none, slice(0, 2)))
        ],
    }[decoding]
    assert [(one.step, one.main_rows, one.contrast_rows) for one in seen] == expected
    assert all(one.prefill is (one.step == 0) and one.predicts for one in seen)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prefill_chunk_size": 4}, [(0, False), (0, False), (0, True), (1, True), (2, True)]),
        ({"use_cache": False}, [(0, True), (1, True), (2, True)]),
        ({"cache_implementation": "static"}, [(0, True), (1, True), (2, True)]),
        ({"num_beams": 2}, [(0, True), (1, True), (2, True)]),
    ],
    ids=["chunks", "no cache", "static cache", "beams"],
)
def test_callbacks_count_steps_in_every_loop_of_transformers(
    options: dict[str, Any], expected: list[tuple[int, bool]]
) -> None:
    model, seen = tiny_model(), []
    ids = torch.tensor([TOKENIZER("0123456789")["input_ids"]])
    with watching(model, [seen.append], ids.shape[1]):
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)
    assert [(one.step, one.predicts) for one in seen] == expected


def test_the_trace_names_sets_and_probabilities() -> None:
    trace = Trace(top=3)
    combiner = Combiner("halved", lambda a, b: a, explain=lambda a, b: {"likely": a.softmax(-1) > 0.005})
    tokens = run(tiny_model(), decoding=Decoding(combiner), trace=trace, max_new_tokens=4)
    assert [[step.chosen.token for step in row] for row in trace.rows] == tokens
    for step in (step for row in trace.rows for step in row):
        assert len(step.candidates) >= 3
        assert step.chosen == step.candidates[0]
        assert all(("likely" in one.sets) == (one.main > 0.005) for one in step.candidates)


def test_output_objects_and_scores() -> None:
    model, taken = tiny_model(), []

    def fn(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        taken.append(main)
        return main - 1

    from graftwork.generate import PairedLoop

    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    loop = PairedLoop(Combiner("c", fn), ids, torch.ones_like(ids))
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(
        ids, custom_generate=loop, max_new_tokens=3, do_sample=False, pad_token_id=0, **options
    )
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(taken))
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(taken) - 1)
    assert output.past_key_values.get_seq_length() == ids.shape[1] + 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 2}, "num_beams=2 cannot be used"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 cannot be used"),
        ({"use_cache": False}, "use_cache=false cannot be used"),
        ({"prompt_lookup_num_tokens": 3}, "takes several tokens a step"),
        ({"max_new_tokens": 2000}, "prompt 1 has .* do not fit the model's window of 1024"),
    ],
)
def test_what_two_streams_cannot_do_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        run(tiny_model(), decoding=Decoding(MAIN), **options)


def test_a_missing_context_and_an_encoder_are_refused() -> None:
    with pytest.raises(UserError, match="prompt 2 has no context"):
        run(tiny_model(), [PAIRS[0], Prompt("alone")], Decoding(MAIN))
    with pytest.raises(UserError, match="needs a decoder-only model; t5"):
        run(tiny_model("t5"), decoding=Decoding(MAIN))


def test_two_prompts_that_are_the_same_are_told_of() -> None:
    twice = [PAIRS[0], Prompt("hello", "hello")]
    with pytest.warns(
        UserWarning, match="the two prompts of prompt 2 are the same: the contrast of 'guided' is zero"
    ):
        assert run(tiny_model(), twice, Decoding(guided(3.0)))[1] == run(tiny_model(), twice)[1]


def test_truncation_only_when_asked_for() -> None:
    model = tiny_model()
    long = Prompt("x" * 30 + "What now?", "What now?")
    short = Prompt("What now?", "What now?")
    limited = run(model, [long], Decoding(guided(2.0)), max_prompt_tokens=9)
    assert limited == run(model, [short], Decoding(guided(2.0)))


def test_prompts_from_records() -> None:
    templates = Templates("C: {context} Q: {question}", "Q: {question}")
    pair = prompt_from_record({"context": "see {question}", "question": "why?"}, templates, where="line 1")
    assert pair == Prompt("C: see {question} Q: why?", "Q: why?")
    assert prompt_from_record({"question": "why?"}, templates, where="line 1") == Prompt("Q: why?")
    chat = prompt_from_record({"prompt": "a", "contrast_prompt": "b"}, templates, where="line 1", chat=True)
    assert chat == Prompt([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({}, "line 3: needs one of .* has none of them"),
        ({"prompt": "a", "question": "b"}, "has prompt and question"),
        ({"prompt": 3}, "'prompt' is int, where a text is expected"),
        ({"question": "q", "context": "  "}, "line 3: 'context' is empty"),
        ({"messages": "hello"}, "messages are a list"),
    ],
)
def test_bad_records(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        prompt_from_record(record, Templates(), where="line 3")


@pytest.mark.parametrize(
    "texts", [("{question}", "{question}"), ("{context} {question}", "{context} {question}")]
)
def test_bad_templates(texts: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="template with"):
        Templates(*texts)
