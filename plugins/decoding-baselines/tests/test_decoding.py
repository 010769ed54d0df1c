"""Every baseline in the decode loop: neutral settings, batches, exceptions, short answers, adapters, other loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.generate import Decoding, Prompt, decode
from graftwork.plugins import Plugins
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer
from graftwork.testing.runs import tiny_recipe
from graftwork_decoding_baselines.cad import cad_scores
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where?"),
    Prompt("a b", "a longer prompt without the context"),
]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
NAMES = ["cad", "adacad", "interpolation", "prior", "contrastive-decoding", "dola"]


@pytest.fixture(scope="module")
def amateur(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("amateur") / "tiny"
    sharp(seed=3, num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def sharp(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model with sharp predictions, whose greedy text differs between methods."""
    model = tiny_model(kind, **{"tie_word_embeddings": False, **changes})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def decoding(name: str, folder: str, model: Any, **options: Any) -> Decoding:
    if name == "contrastive-decoding":
        options = {"amateur": folder, **options}
    recipe = tiny_recipe(folder, "nowhere", plugins={name: options})
    plugins = Plugins.from_options(recipe.jobs[0].job.plugins)
    run = type("Run", (), {"job": recipe.jobs[0].job, "plugins": plugins})()
    plugins.check(run)
    return Decoding.from_plugins(run, model)  # type: ignore[arg-type]


def write(model: Any, prompts: list[Prompt] = PAIRS, by: Decoding | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"max_new_tokens": 10, "do_sample": False, **options}
    return decode(model, prompts, tokenizer=TOKENIZER, decoding=by, **given)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "neutral"),
    [("cad", {"alpha": 0}), ("interpolation", {"weight": 1})],
    ids=["cad", "interpolation"],
)
def test_neutral_settings_are_plain_generate(
    name: str, neutral: dict[str, Any], options: dict[str, Any], amateur: str
) -> None:
    model = sharp()
    assert write(model, by=decoding(name, amateur, model, **neutral), **options) == write(model, **options)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_prior_is_plain_generate_without_the_context(options: dict[str, Any], amateur: str) -> None:
    model, pair = sharp(), PAIRS[0]
    options = {**options, "repetition_penalty": 1.0}  # a penalty looks at the main prompt's tokens
    found = write(model, [pair], decoding("prior", amateur, model), **options)
    assert found == write(model, [Prompt(pair.contrast)], **options)


@pytest.mark.parametrize("name", ["contrastive-decoding", "dola"])
def test_full_plausibility_is_greedy(name: str, amateur: str) -> None:
    model = sharp()
    assert write(model, by=decoding(name, amateur, model, plausibility=1)) == write(model)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_cad_is_guidance_of_transformers(alpha: float, amateur: str) -> None:
    model, pair = sharp(), PAIRS[0]
    ids, negative = (torch.tensor([TOKENIZER(text)["input_ids"]]) for text in (pair.main, pair.contrast))
    theirs = model.generate(
        ids, max_new_tokens=10, do_sample=False, guidance_scale=1 + alpha, negative_prompt_ids=negative
    )
    found = write(model, [pair], decoding("cad", amateur, model, alpha=alpha))
    assert found == theirs[:, ids.shape[1] :].tolist()
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

    logits = model(ids).logits[:, -1]
    scores = Guidance(1 + alpha, model, negative)(ids, logits)
    ours = cad_scores(logits, model(negative).logits[:, -1], alpha)
    torch.testing.assert_close(ours.log_softmax(-1), scores.log_softmax(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_batch_is_its_rows_and_is_not_plain(name: str, kind: str, amateur: str) -> None:
    model = sharp(kind)
    by = decoding(name, amateur, model)
    found = write(model, by=by)
    assert found == [write(model, [pair], by)[0] for pair in PAIRS]
    assert found != write(model)


@pytest.mark.parametrize("name", NAMES)
def test_short_answers_and_seeds(name: str, amateur: str) -> None:
    model = sharp()
    by = decoding(name, amateur, model)
    whole = write(model, by=by)
    assert write(model, by=by, max_new_tokens=1) == [row[:1] for row in whole]
    # The first row ends with its first token.
    first = whole[0][0]
    assert write(model, by=by, eos_token_id=first)[0] == [first]
    assert write(model, by=by, do_sample=True) == write(model, by=by, do_sample=True)


@pytest.mark.parametrize("name", NAMES)
def test_with_an_adapter_and_inference_mode(name: str, amateur: str) -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(sharp(), config)
    by = decoding(name, amateur, model)
    found = write(model, by=by)
    assert found != write(sharp(), by=decoding(name, amateur, sharp()))
    with torch.inference_mode():
        assert write(model, by=by) == found


class Counting:
    def __init__(self) -> None:
        self.got: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.got.append(-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_streamer_gets_every_token_once(name: str, amateur: str) -> None:
    model, streamer = sharp(), Counting()
    tokens = write(model, PAIRS[:1], decoding(name, amateur, model), streamer=streamer)[0]
    assert streamer.got == [*TOKENIZER(PAIRS[0].main)["input_ids"], *tokens, -1]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("cad", {"alpha": -1}, "'alpha' = -1: input should be greater than or equal to 0"),
        ("cad", {"alpha": "nan"}, "'alpha' = 'nan'"),
        ("adacad", {"floor": 0.7}, "'floor' = 0.7: input should be less than"),
        ("interpolation", {"weight": 1.5}, "'weight' = 1.5: input should be less than or equal to 1"),
        ("prior", {"alpha": 1}, "unknown option 'alpha'"),
        ("contrastive-decoding", {"temperature": 0}, "'temperature' = 0: input should be greater than 0"),
        ("dola", {"layers": "middle"}, "'layers"),
        ("dola", {"plausibility": 2}, "'plausibility' = 2"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], problem: str, amateur: str) -> None:
    with pytest.raises(UserError, match=problem):
        decoding(name, amateur, sharp(), **options)


def test_an_amateur_is_needed() -> None:
    with pytest.raises(UserError, match="option 'amateur' is missing"):
        Plugins.from_options({"contrastive-decoding": {}})


def test_an_amateur_of_another_vocabulary_is_refused(tmp_path: Any, amateur: str) -> None:
    other = tiny_checkpoint(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match=r"has 300 tokens and .* has 259; both need the same vocabulary"):
        decoding("contrastive-decoding", amateur, None, amateur=str(other))
    # As many tokens, but others.
    renamed = tiny_checkpoint(tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace('"<eos>"', '"<end>"'))
    config = renamed / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<eos>"', '"<end>"'))
    with pytest.raises(UserError, match="have as many tokens, but not the same"):
        decoding("contrastive-decoding", amateur, None, amateur=str(renamed))


def test_an_encoder_as_amateur_is_refused(tmp_path: Any, amateur: str) -> None:
    other = tiny_checkpoint(tmp_path / "t5", "t5")
    with pytest.raises(UserError, match="is a t5 model; a decoder-only one is needed"):
        decoding("contrastive-decoding", amateur, None, amateur=str(other))
