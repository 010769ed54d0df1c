"""Patches of layers: who touches what, and which two cannot be together."""

from __future__ import annotations

import pytest
from graftwork import UserError
from graftwork.generate import touching_layers
from graftwork.generate.patches import named
from graftwork.testing.models import tiny_model
from peft import LoraConfig, get_peft_model


def test_two_patches_of_one_layer_are_refused_by_name() -> None:
    model = tiny_model()
    problem = "'a' leaves out layers 1 to 3 and 'b' steers layer 2: both touch layer 2"
    with (
        touching_layers(model, "a", "leaves out", [1, 2, 3]),
        pytest.raises(UserError, match=problem),
        touching_layers(model, "b", "steers", [2]),
    ):
        pass


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_both_must_compose(first: bool, second: bool) -> None:
    model = tiny_model()
    with touching_layers(model, "a", "steers", [1], composes=first):
        with (
            pytest.raises(UserError, match="both touch layer 1"),
            touching_layers(model, "b", "steers", [1], composes=second),
        ):
            pass
        with touching_layers(model, "c", "steers", [0], composes=second):
            pass


def test_two_that_compose_and_what_is_over_are_no_conflict() -> None:
    model = tiny_model()
    with touching_layers(model, "a", "steers", [1], composes=True):
        with touching_layers(model, "b", "steers", [1], composes=True):
            pass
        with touching_layers(tiny_model(), "c", "leaves out", [1]):
            pass
    with pytest.raises(RuntimeError), touching_layers(model, "d", "leaves out", [1]):
        raise RuntimeError
    with touching_layers(model, "e", "leaves out", [1]):
        pass


def test_an_adapter_is_the_same_model() -> None:
    model = tiny_model()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with (
        touching_layers(model, "a", "leaves out", [1]),
        pytest.raises(UserError, match="both touch"),
        touching_layers(adapted, "b", "steers", [1]),
    ):
        pass


@pytest.mark.parametrize(
    ("layers", "words"),
    [([], "no layer"), ([4], "layer 4"), ([3, 2, 4], "layers 2 to 4"), ([1, 5], "layers 1, 5")],
)
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert named(layers) == words
