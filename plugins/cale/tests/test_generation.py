"""Inside generate: with and without a cache, padding, our loop and transformers' own, combiners, adapters."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork import Combiner, ForwardPass, UserError
from graftwork.generate import Decoding, Prompt, decode, watching
from graftwork.testing.models import tiny_tokenizer
from graftwork_cale import LayerEnhancement
from graftwork_cale.positions import Positions
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
KINDS = ["llama", "mistral", "qwen2", "gpt2"]
VARIANTS = ["amplify", "residual", "growth"]
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where is it?"),
    Prompt("a b", "a longer prompt without the context"),
]
MAIN = Combiner("main only", lambda main, contrast: main)
CAD = Combiner("cad", lambda main, contrast: 2 * main - contrast)
Lively = Callable[..., Any]


def run(model: Any, enhancement: LayerEnhancement | None, prompts: Any = PAIRS, **options: Any) -> Any:
    """Decode with core's loop, told about every pass."""
    torch.manual_seed(0)
    combiner = options.pop("combiner", None)
    decoding = Decoding(combiner)
    if enhancement is not None:
        decoding = Decoding(
            combiner, before_forward=[enhancement.before_forward], contexts=lambda: [enhancement]
        )
    return decode(model, prompts, tokenizer=TOKENIZER, decoding=decoding, **{"max_new_tokens": 10, **options})


def by_hand(model: Any, prompt: str, layer: int, strength: float, variant: str, new: int) -> list[int]:
    """Greedy decoding without cache; the hook here knows the prompt's length and nothing else."""
    ids = TOKENIZER(prompt)["input_ids"]
    begin, tokens, kept = len(ids) - 1, [], {}

    def own(module: Any, arguments: Any, out: torch.Tensor) -> torch.Tensor | None:
        kept["h"] = out
        changed = out.clone()
        if variant == "amplify":
            changed[:, begin:] *= strength
        elif variant == "growth":
            changed[:, begin:] += (strength - 1) * (out - arguments[0])[:, begin:]
        return changed

    def last(module: Any, arguments: Any, out: torch.Tensor) -> torch.Tensor | None:
        changed = out.clone()
        if variant == "residual":
            changed[:, begin:] += (strength - 1) * kept["h"][:, begin:]
        return changed

    from graftwork_cale.layers import layers_of

    layers = layers_of(model)
    handles = [layers[layer - 1].register_forward_hook(own), layers[-1].register_forward_hook(last)]
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].argmax()))
    for handle in handles:
        handle.remove()
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loop_is_recomputation_from_scratch(lively: Lively, kind: str, variant: Any) -> None:
    model = lively(kind, dtype=torch.float64)
    expected = [by_hand(model, str(prompt.main), 2, 1.6, variant, 10) for prompt in PAIRS]
    enhancement = LayerEnhancement(model, 2, 1.6, variant)
    plain = run(model, None, min_new_tokens=10)
    assert plain != expected
    # A batch padded on the left, told by the loop.
    assert run(model, enhancement, min_new_tokens=10, eos_token_id=None) == expected
    # The same with a combiner's loop, whose contrast rows are not enhanced.
    for rows in ("joint", "split"):
        assert run(model, enhancement, combiner=MAIN, rows=rows, eos_token_id=None) == expected
    # transformers' own loops, in which nobody tells.
    given = TOKENIZER(
        [str(prompt.main) for prompt in PAIRS], return_tensors="pt", padding=True, padding_side="left"
    )
    wide = given["input_ids"].shape[1]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with enhancement:
            found = model.generate(**given, max_new_tokens=10, do_sample=False, eos_token_id=None, **options)
        assert found[:, wide:].tolist() == expected, options


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_a_prompt_in_chunks_when_the_loop_tells(lively: Lively, chunk: int) -> None:
    model = lively()
    enhancement = LayerEnhancement(model, 2, 1.6)
    whole = run(model, enhancement, PAIRS[:1])
    assert run(model, enhancement, PAIRS[:1], prefill_chunk_size=chunk) == whole
    ids = torch.tensor([TOKENIZER(PAIRS[0].main)["input_ids"]])
    with enhancement, watching(model, [enhancement.before_forward], ids.shape[1]):
        found = model.generate(ids, max_new_tokens=10, do_sample=False, prefill_chunk_size=chunk)
    assert found[:, ids.shape[1] :].tolist() == whole


def test_chunks_that_nobody_tells_of_are_refused(lively: Lively) -> None:
    model, ids = lively(), torch.tensor([TOKENIZER(PAIRS[0].main)["input_ids"]])
    with (
        pytest.raises(UserError, match="4 tokens on top of 4 cached ones are prompt or answer"),
        LayerEnhancement(model, 2, 1.6),
    ):
        model.generate(ids, max_new_tokens=3, prefill_chunk_size=4)
    # With every position enhanced there is nothing to tell apart.
    with LayerEnhancement(model, 2, 1.6, positions="all"):
        model.generate(ids, max_new_tokens=3, prefill_chunk_size=4)


def test_several_tokens_of_an_answer_on_top_of_a_cache(lively: Lively) -> None:
    """Scoring an answer after its prompt was read: the same as one pass over both."""
    model = lively(dtype=torch.float64)
    ids = torch.arange(20, 40)[None]
    with LayerEnhancement(model, 2, 1.6, continued="answer"), torch.no_grad():
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values).logits
    enhancement = LayerEnhancement(model, 2, 1.6)
    with enhancement, torch.no_grad():
        enhancement.before_forward(ForwardPass(8, True, True, slice(0, 1), slice(0, 0)))
        whole = model(ids, use_cache=False).logits
    # The norm works in float32 whatever the model's precision.
    torch.testing.assert_close(
        torch.cat([first.logits[:, -1:], rest], 1), whole[:, 11:], atol=1e-5, rtol=1e-5
    )


def test_a_second_prompt_is_a_new_one(lively: Lively) -> None:
    model = lively()
    for options in ({}, {"use_cache": False}):
        alone, together = [], []
        for text in ("abcdef", "abcdef ghi", "abcdef"):
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            with LayerEnhancement(model, 2, 1.6):
                alone.append(model.generate(ids, max_new_tokens=4, do_sample=False, **options).tolist())
        with LayerEnhancement(model, 2, 1.6):
            for text in ("abcdef", "xyz", "abcdef"):
                ids = torch.tensor([TOKENIZER(text)["input_ids"]])
                together.append(model.generate(ids, max_new_tokens=4, do_sample=False, **options).tolist())
        assert together[0] == together[2] == alone[0] == alone[2]


def test_a_cache_that_holds_the_beginning(lively: Lively) -> None:
    model, ids = lively(), torch.tensor([TOKENIZER(PAIRS[0].main)["input_ids"]])
    enhancement = LayerEnhancement(model, 2, 1.6)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    with enhancement:
        whole = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(
            model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), whole
        )


def test_padding_is_not_touched(lively: Lively) -> None:
    model = lively()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    ids = torch.arange(20, 26).repeat(2, 1) * mask
    for attn in ("sdpa", "eager"):
        model.set_attn_implementation(attn)
        for implementation in ("dynamic", "static"):
            seen: list[torch.Tensor] = []
            for strength in (1.0, 2.0):
                with contextlib.ExitStack() as stack:
                    stack.enter_context(LayerEnhancement(model, 2, strength, positions="all"))
                    # Registered later, so it sees what the enhancement returned.
                    handle = model.model.layers[1].register_forward_hook(
                        lambda m, a, out, seen=seen: seen.append(out.clone())
                    )
                    stack.callback(handle.remove)
                    model.generate(
                        ids,
                        attention_mask=mask,
                        max_new_tokens=1,
                        do_sample=False,
                        **({"cache_implementation": "static"} if implementation == "static" else {}),
                    )
            plain, enhanced = seen
            assert torch.equal(enhanced[mask == 0], plain[mask == 0])
            torch.testing.assert_close(enhanced[mask == 1], 2 * plain[mask == 1])


@pytest.mark.parametrize("past", [0, 2])
def test_padding_is_read_from_masks_of_every_form(past: int) -> None:
    whole = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])[:, 2 - past :]
    width = 4
    causal = torch.ones(width, past + width).tril(past).bool()
    seen = causal & whole[:, None, None, :].bool()
    window = seen & torch.ones(width, past + width).triu(past - 1).bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    # A cache of fixed size has room behind what is there.
    fixed = torch.nn.functional.pad(seen, (0, 5))

    class Cache:
        def get_seq_length(self) -> int:
            return past

    for mask in (
        whole,
        whole.bool(),
        seen,
        added,
        fixed,
        window,
        {"full_attention": seen, "sliding": window},
    ):
        chosen = Positions("all", "main", "refuse").mask(torch.zeros(2, width), mask, Cache())
        assert torch.equal(chosen, whole[:, past:].bool())


def test_right_padding_is_refused(lively: Lively) -> None:
    model, mask = lively(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(UserError, match="pad prompts on the left"), LayerEnhancement(model, 2, 1.5):
        model(torch.ones(2, 3, dtype=torch.long), attention_mask=mask)
    with LayerEnhancement(model, 2, 1.5, positions="all"):
        model(torch.ones(2, 3, dtype=torch.long), attention_mask=mask)


def test_rows_of_several_texts_are_refused(lively: Lively) -> None:
    """This is how continuous batching and packed rows reach a decoder."""
    model, borders = lively(), torch.tensor([0, 3, 6], dtype=torch.int32)
    places = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "cu_seq_lens_q": borders}
    with pytest.raises(UserError, match="rows that hold one text each"), LayerEnhancement(model, 2, 1.5):
        model(torch.arange(20, 26)[None], **places)
    assert not any(module._forward_hooks for module in model.modules())


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 12), new=st.integers(1, 6), data=st.data())
def test_told_passes_cover_the_predicting_positions_once(prompt: int, new: int, data: Any) -> None:
    """However a text is cut into passes, what is enhanced is the prompt's last position and all after it."""
    positions = Positions("predicting", "main", "refuse")
    cuts = data.draw(st.sets(st.integers(1, max(prompt - 1, 1)), max_size=3)) if prompt > 1 else set()
    borders = [0, *sorted(cuts), *range(prompt, prompt + new)]
    covered: list[bool] = []

    class Cache:
        length = 0

        def get_seq_length(self) -> int:
            return self.length

    cache = Cache()
    for begin, end in itertools.pairwise(borders):
        step = end - prompt
        positions.tell(ForwardPass(max(step, 0), step <= 0, step >= 0, slice(0, 1), slice(1, 2)))
        mask = positions.mask(torch.zeros(2, end - begin), None, cache)
        assert not mask[1].any()
        covered += mask[0].tolist()
        cache.length = end
    assert covered == [place >= prompt - 1 for place in range(borders[-1])]
    # Without a cache every pass reads everything again.
    for step in range(new):
        positions.tell(ForwardPass(step, step == 0, True, slice(0, 2), slice(0, 0)))
        mask = positions.mask(torch.zeros(2, prompt + step), None, None)
        assert mask[0].tolist() == [place >= prompt - 1 for place in range(prompt + step)]


@pytest.mark.parametrize("rows", ["joint", "split"])
def test_a_combiner_sees_main_rows_or_both(lively: Lively, rows: str) -> None:
    model = lively(dtype=torch.float64)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fn(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        seen.append((main.clone(), contrast.clone()))
        return 2 * main - contrast

    combiner = Combiner("cad", fn)
    first: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for streams in ("none", "main", "both"):
        seen.clear()
        given = None if streams == "none" else LayerEnhancement(model, 2, 1.6, streams=streams)  # type: ignore[arg-type]
        run(model, given, combiner=combiner, rows=rows, max_new_tokens=3)
        first[streams] = seen[0]
    (m0, c0), (m1, c1), (m2, c2) = (first[name] for name in ("none", "main", "both"))
    assert torch.equal(c1, c0)
    assert torch.equal(m1, m2)
    assert (m1 - m0).abs().max() > 1e-3
    assert (c2 - c0).abs().max() > 1e-3


def test_joint_and_split_and_single_rows_agree(lively: Lively) -> None:
    model = lively()
    enhancement = LayerEnhancement(model, 2, 1.6)
    joint = run(model, enhancement, combiner=CAD)
    assert joint == run(model, enhancement, combiner=CAD, rows="split")
    assert joint == [run(model, enhancement, [one], combiner=CAD)[0] for one in PAIRS]
    assert joint != run(model, None, combiner=CAD)


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("combiner", [None, MAIN], ids=["plain", "paired"])
def test_sampling_streaming_and_short_answers(
    lively: Lively, options: dict[str, Any], combiner: Combiner | None
) -> None:
    model = lively()
    neutral, real = LayerEnhancement(model, 2, 1.0), LayerEnhancement(model, 2, 1.6)
    assert run(model, neutral, combiner=combiner, **options) == run(model, None, combiner=combiner, **options)
    once = run(model, real, combiner=combiner, **options)
    assert once == run(model, real, combiner=combiner, **options)
    one = run(model, real, combiner=combiner, max_new_tokens=1, **options)
    assert [row[:1] for row in once] == one
    first = once[0][0]
    ended = run(model, real, PAIRS[:1], combiner=combiner, eos_token_id=first, **options)
    assert ended == [[first]] or options
    with torch.inference_mode():
        assert run(model, real, combiner=combiner, **options) == once


class Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_every_token_once(lively: Lively) -> None:
    streamer, model = Streamer(), lively()
    tokens = run(model, LayerEnhancement(model, 2, 1.6), PAIRS[:1], streamer=streamer)[0]
    assert streamer.got == [TOKENIZER(PAIRS[0].main)["input_ids"], *([token] for token in tokens)]
    assert streamer.ended == 1


def test_beams_and_assisted_decoding_keep_their_meaning(lively: Lively) -> None:
    model = lively()
    enhancement = LayerEnhancement(model, 2, 1.6, continued="answer")
    ids = torch.tensor([TOKENIZER("abcabcabcabc abcabc")["input_ids"]])
    given = {"max_new_tokens": 8, "do_sample": False}
    with enhancement:
        greedy = model.generate(ids, **given)
        assert torch.equal(model.generate(ids, num_beams=1, **given), greedy)
        beams = model.generate(ids, num_beams=3, **given)
        uncached = model.generate(ids, num_beams=3, use_cache=False, **given)
        assert torch.equal(beams, uncached)
    with enhancement, watching(model, [enhancement.before_forward], ids.shape[1]):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **given), greedy)


def test_an_adapter_under_the_enhancement(lively: Lively) -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    adapted = get_peft_model(lively(), config)
    enhanced = run(adapted, LayerEnhancement(adapted, 2, 1.6))
    assert enhanced != run(adapted, None)
    assert enhanced != run(lively(), LayerEnhancement(lively(), 2, 1.6))
    merged = adapted.merge_and_unload()
    assert run(merged, LayerEnhancement(merged, 2, 1.6)) == enhanced
