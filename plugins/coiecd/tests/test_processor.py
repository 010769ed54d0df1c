"""The logits processor alone in ``generate``: the same tokens as the paired loop, for batches with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.generate import Decoding, Prompt, decode
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_coiecd import Coiecd, CoiecdLogitsProcessor
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where?"),
    Prompt("a b", "a longer prompt without the context"),
]
MODELS = ["llama", "qwen2", "mistral", "gpt2"]


def sharp(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model with sharp predictions, whose greedy text differs between methods."""
    model = tiny_model(kind, **{"tie_word_embeddings": False, **changes})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def padded(texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(TOKENIZER(texts, return_tensors="pt", padding=True, padding_side="left"))


def alone(model: Any, pairs: list[Prompt] = PAIRS, processor: Any = None, **options: Any) -> list[list[int]]:
    """Decode with the processor and nothing else of ours."""
    main = padded([pair.main for pair in pairs])
    if processor is None:
        prior = padded([pair.contrast for pair in pairs])
        processor = CoiecdLogitsProcessor(model, prior["input_ids"], prior["attention_mask"])
    torch.manual_seed(0)
    given = {"max_new_tokens": 12, "do_sample": False, **options}
    output = model.generate(
        input_ids=main["input_ids"],
        attention_mask=main["attention_mask"],
        logits_processor=[processor],
        **given,
    )
    return output[:, main["input_ids"].shape[1] :].tolist()


def paired(model: Any, pairs: list[Prompt] = PAIRS, rows: Any = "joint", **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    combiner = Combiner("coiecd", Coiecd().scores)
    given = {"max_new_tokens": 12, "do_sample": False, **options}
    return decode(model, pairs, tokenizer=TOKENIZER, decoding=Decoding(combiner), rows=rows, **given)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_same_tokens_as_the_paired_loop(kind: str, sampled: bool) -> None:
    model, options = sharp(kind), {"do_sample": sampled}
    assert alone(model, **options) == paired(model, rows="split", **options) == paired(model, **options)


def test_it_differs_from_plain_generate() -> None:
    model = sharp()
    assert paired(model) != decode(model, PAIRS, tokenizer=TOKENIZER, max_new_tokens=12, do_sample=False)


def test_a_padded_batch_is_its_rows() -> None:
    model = sharp()
    assert alone(model) == [alone(model, [pair])[0] for pair in PAIRS]


def test_scores_are_those_of_the_paired_loop() -> None:
    model = sharp()
    ids = padded([PAIRS[0].main])["input_ids"]
    prior = padded([PAIRS[0].contrast])["input_ids"]
    seen: list[torch.Tensor] = []

    def noted(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        seen.append(Coiecd().scores(main, contrast))
        return seen[-1]

    decode(model, PAIRS[:1], tokenizer=TOKENIZER, decoding=Decoding(Combiner("c", noted)), max_new_tokens=6)
    output = model.generate(
        ids,
        logits_processor=[CoiecdLogitsProcessor(model, prior)],
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(seen), atol=1e-4, rtol=1e-5)


def test_an_object_serves_call_after_call() -> None:
    model = sharp()
    prior = padded([pair.contrast for pair in PAIRS])
    processor = CoiecdLogitsProcessor(model, prior["input_ids"], prior["attention_mask"])
    first = alone(model, processor=processor)
    assert alone(model, processor=processor) == first
    other = [Prompt(pair.main + " Say it.", pair.contrast) for pair in PAIRS]
    assert alone(model, other, processor=processor) == alone(model, other)


def test_the_cache_grows_by_one_token_a_step() -> None:
    model = sharp()
    prior = padded([PAIRS[0].contrast])["input_ids"]
    processor = CoiecdLogitsProcessor(model, prior)
    alone(model, PAIRS[:1], processor=processor, max_new_tokens=5)
    assert processor.stream.cache.get_seq_length() == prior.shape[1] + 4
    assert not processor.stream.cache.layers[0].keys.requires_grad


def test_options_reach_the_scores() -> None:
    model = sharp()
    prior = padded([pair.contrast for pair in PAIRS])
    arguments = (model, prior["input_ids"], prior["attention_mask"])
    plain = decode(model, PAIRS, tokenizer=TOKENIZER, max_new_tokens=12, do_sample=False)
    neutral = CoiecdLogitsProcessor(*arguments, alpha=1.0, ratio=1.0)
    assert alone(model, processor=neutral) == plain
    without = [Prompt(pair.contrast) for pair in PAIRS]
    prior_only = CoiecdLogitsProcessor(*arguments, alpha=0.0, ratio=1.0)
    expected = decode(model, without, tokenizer=TOKENIZER, max_new_tokens=12, do_sample=False)
    assert alone(model, processor=prior_only) == expected


def test_guidance_of_transformers_is_an_infinite_ratio() -> None:
    model = sharp()
    ids, prior = (padded([text])["input_ids"] for text in (PAIRS[0].main, PAIRS[0].contrast))
    theirs = model.generate(
        ids, max_new_tokens=12, do_sample=False, guidance_scale=1.5, negative_prompt_ids=prior
    )
    processor = CoiecdLogitsProcessor(model, prior, alpha=0.5, ratio=float("inf"))
    assert alone(model, PAIRS[:1], processor=processor) == theirs[:, ids.shape[1] :].tolist()


def test_a_model_with_an_adapter() -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(sharp(), config)
    assert alone(model) == paired(model)
    assert alone(model) != alone(sharp())


def test_it_runs_under_inference_mode() -> None:
    model = sharp()
    with torch.inference_mode():
        assert alone(model) == paired(model)


def test_beams_and_several_sequences_are_refused() -> None:
    model = sharp()
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(UserError, match="COIECD got 6 rows and has 3 prompts without context"):
            alone(model, **options)


def test_exchanged_rows_are_refused() -> None:
    model = sharp()
    prior = padded(["What?", "What?"])["input_ids"]
    processor = CoiecdLogitsProcessor(model, prior)
    ids = padded(["x. What?", "x. What?"])["input_ids"]
    logits = torch.zeros(2, model.config.vocab_size)
    processor(ids, logits)
    ids = torch.cat([ids, torch.tensor([[5], [6]])], dim=-1)
    processor(ids, logits)
    exchanged = torch.cat([ids.flip(0), torch.tensor([[7], [8]])], dim=-1)
    with pytest.raises(UserError, match="as in beam search"):
        processor(exchanged, logits)
    processor.reset()
    processor(exchanged, logits)


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ([[1, 1, 0]], "padded on the right; set tokenizer.padding_side = 'left'"),
        ([[1, 0, 1]], "padded on the right"),
        ([[0, 0, 0]], "is empty; give the question"),
        ([[1, 1]], "of equal shape"),
    ],
)
def test_masks_that_are_refused(mask: list[list[int]], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        CoiecdLogitsProcessor(tiny_model(), torch.tensor([[5, 6, 7]]), torch.tensor(mask))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alpha": -0.1}, "option 'alpha' = -0.1: input should be greater than or equal to 0"),
        ({"alpha": float("nan")}, "option 'alpha' = nan"),
        ({"ratio": 0.9}, "option 'ratio' = 0.9: input should be greater than or equal to 1"),
        ({"ratio": float("nan")}, "option 'ratio' = nan"),
        ({"gamma": 2.0}, "gamma = 2.0 does nothing without constraint: band"),
        ({"constraint": "band", "ratio": 2}, "ratio = 2.0 does nothing without constraint: softmax"),
        ({"lambda": 0.25}, "unknown option 'lambda'"),
    ],
)
def test_bad_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        CoiecdLogitsProcessor(tiny_model(), torch.tensor([[5]]), **options)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UserError, match="needs a decoder-only model; t5"):
        CoiecdLogitsProcessor(tiny_model("t5"), torch.tensor([[5]]))
