"""The plugin in every loop: transformers' own, and the one of two prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.evaluate.encoding import encode_prompt
from graftwork.generate import Decoding, Prompt, decode, touching_layers
from graftwork.plugins import Plugins, construct, generation_notes
from graftwork.recipe import expand
from graftwork.run import Run
from graftwork.testing.models import tiny_checkpoint
from graftwork.yaml_lines import Document
from graftwork_d3 import DepthSchedule, teacher_forced
from graftwork_d3.flops import cost_of
from peft import LoraConfig, get_peft_model

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
LAYERS = 8
STEEP = {"alpha": 0.9}
PLAN = DepthSchedule.of(LAYERS, alpha=0.9)
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where is it?"),
    Prompt("a b", "a longer prompt without the context"),
]
MAIN = Combiner("main only", lambda main, contrast: main)
GUIDED = Combiner("guided", lambda main, contrast: 2 * main - contrast)
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.fixture
def run(checkpoint: Path) -> Callable[..., Run]:
    """``run(**options)``: a run on the tiny model with the plugin."""

    def call(model: Path = checkpoint, **options: Any) -> Run:
        spec = expand(Document({"model": str(model), "data": "none"}, {}, "test"), plugins=["d3"]).jobs[0]
        return Run(Path(), spec.job, Plugins({"d3": construct("d3", options)}))

    return call


@pytest.fixture
def write(tokenizer: Any, run: Any) -> Callable[..., list[list[int]]]:
    """``write(model, prompts, options, combiner, **generate options)`` returns the new tokens."""

    def call(
        model: Any,
        prompts: list[Prompt] = PAIRS,
        options: dict[str, Any] | None = None,
        combiner: Combiner | None = None,
        **generate: Any,
    ) -> list[list[int]]:
        if options is None:
            decoding = Decoding(combiner)
        else:
            found = Decoding.from_plugins(run(**options), model)
            decoding = Decoding(combiner, before_forward=found.before_forward, contexts=found.contexts)
        torch.manual_seed(0)
        return decode(
            model, prompts, tokenizer=tokenizer, decoding=decoding, **{"max_new_tokens": 12, **generate}
        )

    return call


def greedy(model: Any, tokenizer: Any, prompt: Any, plan: DepthSchedule, count: int) -> list[int]:
    """Return a greedy answer, each token from a one-pass score of the whole text so far: no cache, no loop."""
    ids = encode_prompt(tokenizer, prompt)
    begin = len(ids)
    while len(ids) < begin + count:
        logits = teacher_forced(model, torch.tensor([ids]), begin, plan)[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[begin:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generate", [{}, SAMPLED, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_alpha_1_is_plain_generate(kind: str, generate: dict[str, Any], lively: Any, write: Any) -> None:
    model = lively(kind)
    assert write(model, options={"alpha": 1.0}, **generate) == write(model, **generate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generate", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_greedy_decoding_is_the_one_pass_score(
    kind: str, generate: dict[str, Any], lively: Any, write: Any, tokenizer: Any
) -> None:
    model = lively(kind)
    prompts = PAIRS[:1] if "prefill_chunk_size" in generate else PAIRS
    tokens = write(model, prompts, STEEP, **generate)
    assert tokens == [greedy(model, tokenizer, one.main, PLAN, 12) for one in prompts]
    assert tokens != write(model, prompts)


def test_beams_have_the_scores_of_the_one_pass_score(lively: Any, run: Any, tokenizer: Any) -> None:
    """All beams are at the same depth: the sum of log-probabilities that beam search reports is ours."""
    from contextlib import ExitStack

    from graftwork.generate import watching

    model = lively()
    found = Decoding.from_plugins(run(**STEEP), model)
    ids = torch.tensor([encode_prompt(tokenizer, PAIRS[0].main)])
    with ExitStack() as stack:
        for context in found.contexts():
            stack.enter_context(context)
        stack.enter_context(watching(model, found.before_forward, ids.shape[1]))
        output = model.generate(
            ids, num_beams=3, num_return_sequences=3, max_new_tokens=8, min_new_tokens=8, length_penalty=0.0,
            do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    for text, score in zip(output.sequences, output.sequences_scores, strict=True):
        logits = teacher_forced(model, text[None, :-1], ids.shape[1], PLAN)[0]
        # min_new_tokens bars the end, after log-probabilities were taken.
        new = text[ids.shape[1] :]
        total = logits.log_softmax(-1).gather(-1, new[:, None]).sum()
        assert float(total) == pytest.approx(float(score), abs=1e-3)


@pytest.mark.parametrize("rows", ["joint", "split"])
@pytest.mark.parametrize("generate", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_with_a_combiner_that_keeps_the_main_logits(
    rows: str, generate: dict[str, Any], lively: Any, write: Any
) -> None:
    model = lively()
    paired = write(model, PAIRS, STEEP, MAIN, rows=rows, **generate)
    assert paired == write(model, PAIRS, STEEP, **generate)


@pytest.mark.parametrize("rows", ["joint", "split"])
def test_both_streams_have_the_same_depth(rows: str, lively: Any, write: Any, tokenizer: Any) -> None:
    model = lively()
    (tokens,) = write(model, PAIRS[:1], STEEP, GUIDED, rows=rows, max_new_tokens=8)
    main, contrast = (encode_prompt(tokenizer, text) for text in (PAIRS[0].main, PAIRS[0].contrast))
    for place, token in enumerate(tokens):
        scores = [
            teacher_forced(model, torch.tensor([ids + tokens[:place]]), len(ids), PLAN)[0, -1]
            for ids in (main, contrast)
        ]
        assert int((2 * scores[0] - scores[1]).argmax()) == token
    assert [tokens] != write(model, PAIRS[:1], None, GUIDED, rows=rows, max_new_tokens=8)


def test_an_adapter(lively: Any, write: Any, tokenizer: Any) -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(lively(), config)
    tokens = write(model, options=STEEP)
    assert tokens == [greedy(model, tokenizer, one.main, PLAN, 12) for one in PAIRS]
    assert write(model, PAIRS, STEEP, MAIN) == tokens


def test_a_batch_is_its_rows(lively: Any, write: Any) -> None:
    model = lively()
    assert write(model, PAIRS, STEEP) == [write(model, [one], STEEP)[0] for one in PAIRS]
    assert write(model, PAIRS, STEEP, GUIDED) == [write(model, [one], STEEP, GUIDED)[0] for one in PAIRS]


def test_one_token_and_an_end_at_once(lively: Any, write: Any) -> None:
    """Invariant 10: a prompt of one token, one new token, an end at the first step."""
    model = lively()
    one = [Prompt("a")]
    first = write(model, one, STEEP, max_new_tokens=1)
    assert first == write(model, one, max_new_tokens=1)
    assert write(model, one, STEEP, eos_token_id=first[0][0]) == first
    assert write(model, one, STEEP)[0][0] == first[0][0]
    assert len(write(model, one, STEEP)[0]) == 12


def test_a_seed_gives_the_same_sample(lively: Any, write: Any) -> None:
    model = lively()
    assert write(model, options=STEEP, **SAMPLED) == write(model, options=STEEP, **SAMPLED)


class Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.got.append([])


@pytest.mark.parametrize("combiner", [None, MAIN])
def test_a_streamer_gets_every_token_once(combiner: Any, lively: Any, write: Any, tokenizer: Any) -> None:
    streamer = Streamer()
    (tokens,) = write(lively(), PAIRS[:1], STEEP, combiner, streamer=streamer)
    assert streamer.got == [encode_prompt(tokenizer, PAIRS[0].main), *([one] for one in tokens), []]


def test_under_inference_mode(lively: Any, write: Any) -> None:
    model = lively()
    with torch.inference_mode():
        inside = write(model, options=STEEP)
    assert inside == write(model, options=STEEP)


def test_the_report_counts_every_pass(lively: Any, run: Any, tokenizer: Any) -> None:
    model = lively()
    made = run(**STEEP)
    decoding = Decoding.from_plugins(made, model)
    for _ in range(2):
        decode(
            model,
            PAIRS,
            tokenizer=tokenizer,
            decoding=decoding,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )
    report = made.plugins.objects["d3"].report
    depths = [PLAN.depth(step) for step in range(1, 6)]
    assert report.layers_per_position == depths
    assert report.passes == dict.fromkeys(range(1, 6), 2)
    from graftwork_d3 import cost_of

    shown = report.as_json(cost_of(model))
    assert shown["mean_depth_ratio"] == pytest.approx(sum(depths) / (5 * LAYERS))
    share = cost_of(model).head_share
    assert shown["operations_saved"] == pytest.approx((1 - share) * (1 - shown["mean_depth_ratio"]))
    assert shown["speedup_bound"] == pytest.approx(1 / (1 - shown["operations_saved"]))


def test_what_was_saved_is_said(lively: Any, run: Any, tokenizer: Any) -> None:
    chosen, model = run(**STEEP), lively()
    assert generation_notes(chosen) == []
    decode(
        model,
        PAIRS[:1],
        tokenizer=tokenizer,
        decoding=Decoding.from_plugins(chosen, model),
        max_new_tokens=4,
        min_new_tokens=4,
    )
    # Steps 1 to 3 of floor(8 * 0.9^t): 7, 6 and 5 layers.
    (note,) = generation_notes(chosen)
    assert note.startswith(
        "d3: of 8 layers, 7 at position 1, 6 at position 2, 5 at position 3; on average 75.0 %,"
    )
    saved = cost_of(model).saved(0.75)
    assert f"saves {100 * saved:.1f} % of the arithmetic" in note


def test_no_trace_is_left_after_an_error(lively: Any, run: Any, tokenizer: Any) -> None:
    model = lively()
    decoding = Decoding.from_plugins(run(**STEEP), model)

    def fails(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    broken = Decoding(
        Combiner("fails", fails), before_forward=decoding.before_forward, contexts=decoding.contexts
    )
    with pytest.raises(ZeroDivisionError):
        decode(model, PAIRS, tokenizer=tokenizer, decoding=broken, max_new_tokens=4)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert not model.model._forward_pre_hooks
    with touching_layers(model, "another", "steers", range(LAYERS)):
        pass


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("generate", "problem"),
    [
        ({"use_cache": False}, "d3 needs the cache of keys and values"),
        ({"prompt_lookup_num_tokens": 3}, "one token a row, and this pass reads .*assisted decoding"),
    ],
)
def test_loops_that_cannot_work_are_refused(
    generate: dict[str, Any], problem: str, lively: Any, write: Any
) -> None:
    with pytest.raises(UserError, match=problem):
        write(lively(), [Prompt("abc abc abc abc abc")], STEEP, **generate)


def test_an_assistant_model_is_refused(lively: Any, write: Any) -> None:
    with pytest.raises(UserError, match="assisted decoding"):
        write(lively(), PAIRS[:1], STEEP, assistant_model=lively(layers=2), do_sample=False)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alpha": 0.0}, "'alpha' = 0.0"),
        ({"alpha": 1.5}, "'alpha' = 1.5"),
        ({"alhpa": 0.5}, "alhpa"),
        ({"order": [0, 3]}, "order"),
        ({"levels": 1}, "'levels' = 1"),
        ({"alpha": 0.9, "target_ratio": 0.9}, "alpha = 0.9 and target_ratio = 0.9 both set the depth"),
        ({"target_ratio": 0.3}, r"target_ratio = 0.3 is not between 0.5 \(the minimum of 4 of 8 layers\)"),
        ({"flex_start": 7, "tail": 2}, "flex start 7 and tail 2 do not fit a model of 8 layers"),
        ({"minimum": 2}, "minimum = 2 layers is not between"),
        ({"order": [3, 4, 6]}, "order names layer 6"),
        ({"config": "nowhere.json"}, "'nowhere.json' does not exist; d3:tune writes one"),
        ({"config": "x.json", "alpha": 0.9}, "config brings the whole schedule; remove plugins.d3.alpha"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(
    options: dict[str, Any], problem: str, run: Any
) -> None:
    with pytest.raises(UserError, match=problem):
        made = run(**options)
        made.plugins.call("check", run=made)


def test_an_encoder_is_refused_before_weights_are_read(tmp_path: Path, run: Any) -> None:
    made = run(tiny_checkpoint(tmp_path / "t5", "t5"))
    with pytest.raises(UserError, match="t5 reads an encoder's output too"):
        made.plugins.call("check", run=made)


def test_a_file_with_a_schedule(tmp_path: Path, run: Any, lively: Any, write: Any) -> None:
    path = tmp_path / "d3.json"
    path.write_text(json.dumps({"schedule": PLAN.as_json()}))
    model = lively()
    assert write(model, PAIRS, {"config": str(path)}) == write(model, PAIRS, STEEP)
    path.write_text(json.dumps({"schedule": DepthSchedule.of(6, alpha=0.9).as_json()}))
    made = run(config=str(path))
    with pytest.raises(UserError, match="is for a model of 6 layers, this one has 8"):
        made.plugins.call("check", run=made)
    for text in (
        "{",
        "[]",
        '{"schedule": {"layers": 8}}',
        '{"schedule": {"layers": 8, "order": "x", "levels": 0}}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"is not a d3.json as d3:tune writes it"):
            made.plugins.call("check", run=made)


def test_a_plugin_that_acts_on_a_layer_of_the_block(lively: Any, write: Any) -> None:
    model = lively()
    with (
        touching_layers(model, "steering", "steers", [4], composes=True),
        pytest.raises(UserError, match=r"'steering' steers layer 4 and 'd3' leaves out layers 2 to 5"),
    ):
        write(model, options=STEEP)
