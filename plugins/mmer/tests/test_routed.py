"""Routing: one route is the dense model, caches and padding change nothing, both modes agree, nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.models import load_model
from graftwork.testing.experts import merge_tiny, open_tiny, tiny_experts
from graftwork_kernels import dispatch
from graftwork_mmer import Artefact, KeptDeltas, MaskedDeltas, MmerMethod, MmerOptions, RoutedModel
from graftwork_mmer.routed.layer import MaskedDelta
from graftwork_mmer.routed.plan import Key, text_key

Family = tuple[Path, dict[str, str]]
IDS = torch.tensor([[5, 9, 30, 41, 7, 88, 60], [4, 61, 62, 63, 64, 65, 66]])


def method(**options: Any) -> MmerMethod:
    return MmerMethod(MmerOptions.model_validate({"keep": 0.6, **options}))


def routed(family: Family, *, kept: bool = False, embeddings: str = "keep", **options: Any) -> RoutedModel:
    base, refs = family
    experts = open_tiny(base, refs, embeddings=embeddings)
    deltas = KeptDeltas(experts) if kept else MaskedDeltas(Artefact.of(method(), experts))
    return RoutedModel(load_model(str(base)), deltas, **options)


@pytest.fixture(scope="module")
def dense(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain checkpoint for expert b, written by the transform."""
    folder = tmp_path_factory.mktemp("dense")
    merge_tiny(*family, method(), folder, expand="b")
    return load_model(str(folder / "model")).eval()


def test_all_on_one_route_is_the_dense_model(family: Family, dense: Any) -> None:
    model = routed(family)
    with torch.no_grad():
        expected = dense(IDS).logits
    found = model(IDS, route_ids=torch.full_like(IDS, 2)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    as_text = model(IDS, present=[["b"], ["b"]]).logits
    assert torch.equal(as_text, found)
    assert not torch.allclose(model(IDS, present=[["a"], ["b"]]).logits[0], expected[0], atol=1e-3)


def test_no_media_on_the_base_route_is_the_base(family: Family) -> None:
    model = routed(family, text_route="base")
    with torch.no_grad():
        expected = load_model(str(family[0])).eval()(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS, present=[["a"], ["b", "c"]]).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_tokens_of_a_batch_take_their_own_routes(kind: str, tmp_path: Path) -> None:
    """The first token of each row depends on its own route alone: it sees nothing else."""
    family = tiny_experts(tmp_path, ["a", "b"], kind=kind)
    model = routed(family)
    routes = torch.tensor([[1, 1, 0, 2, 2, 0, 0], [2, 0, 0, 0, 0, 1, 1]])
    mixed = model(IDS, route_ids=routes, present=[["a", "b"], ["a", "b"]]).logits
    for row, expert in enumerate(("a", "b")):
        alone = model(IDS[row : row + 1], route_ids=torch.full((1, 7), row + 1), present=[["a", "b"]]).logits
        torch.testing.assert_close(mixed[row, 0], alone[0, 0], rtol=0, atol=1e-5)
        whole = model(IDS[row : row + 1], route_ids=routes[row : row + 1], present=[["a", "b"]]).logits
        torch.testing.assert_close(mixed[row], whole[0], rtol=0, atol=1e-5)
        other = model(IDS[row : row + 1], present=[[expert]]).logits
        assert not torch.allclose(mixed[row, -1], other[0, -1], atol=1e-4)


@pytest.mark.parametrize("text_route", ["union", "merged", "base", "mean"])
def test_a_cache_changes_nothing(family: Family, text_route: Any) -> None:
    model = routed(family, text_route=text_route)
    routes = torch.tensor([[1, 1, 0, 2, 2, 0, 0], [2, 0, 3, 3, 0, 1, 1]])
    whole = model(IDS, route_ids=routes).logits
    present = [["a", "b"], ["a", "b", "c"]]
    first = model(IDS[:, :4], route_ids=routes[:, :4], present=present, use_cache=True)
    parts = [first.logits]
    for place in range(4, 7):
        step = model(
            IDS[:, place : place + 1],
            route_ids=routes[:, place : place + 1],
            present=present,
            past_key_values=first.past_key_values,
        )
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_generation_follows_the_text_route(family: Family, options: dict[str, Any]) -> None:
    model = routed(family)
    routes = torch.tensor([[1, 1, 0, 2, 2, 0, 0], [2, 0, 3, 3, 0, 1, 1]])
    found = model.generate(
        IDS, route_ids=routes, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **options
    )
    assert found.shape == (2, 12)
    if options.get("num_beams"):
        return
    padded = torch.nn.functional.pad(routes, (0, 5))
    logits = model(found, route_ids=padded).logits.clone()
    logits[..., 2] = -torch.inf  # The end may not come.
    assert torch.equal(logits[:, 6:-1].argmax(-1), found[:, 7:])


def test_a_padded_batch_is_its_rows(family: Family) -> None:
    model = routed(family)
    short, long = IDS[:1, :4], IDS[1:]
    batch = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    routes = torch.tensor([[0, 0, 0, 1, 1, 0, 2], [2, 0, 3, 3, 0, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    both = model(batch, route_ids=routes, attention_mask=mask, position_ids=positions).logits
    alone = model(short, route_ids=routes[:1, 3:]).logits
    torch.testing.assert_close(both[0, 3:], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1:], model(long, route_ids=routes[1:]).logits, rtol=0, atol=1e-5)


def test_both_modes_agree(half_family: Family) -> None:
    fused, dense = routed(half_family), routed(half_family, materialize=True)
    routes = torch.tensor([[1, 1, 0, 2, 2, 0, 0], [2, 0, 3, 3, 0, 1, 1]])
    for _ in range(2):
        assert torch.equal(fused(IDS, route_ids=routes).logits, dense(IDS, route_ids=routes).logits)
    one, other = (dict(model.model.named_modules())["model.layers.0.mlp.up_proj"] for model in (fused, dense))
    assert isinstance(one, MaskedDelta)
    assert isinstance(other, MaskedDelta)
    for key in (Key("expert", (1,)), Key("union", (0, 1)), Key("mean", (0, 2)), Key("merged")):
        assert torch.equal(one.weights(key)["weight"], other.weights(key)["weight"])
    assert not one._dense
    assert len(other._dense) >= 4


def test_the_kernel_computes_what_dense_weights_do(tmp_path: Path) -> None:
    """Its linears have biases, which have differences of their own."""
    if not dispatch.INTERPRETED:
        pytest.skip("Triton does not interpret here")
    model = routed(tiny_experts(tmp_path, ["a", "b"], kind="qwen2"))
    routes = torch.tensor([[1, 1, 0, 2, 2, 0, 0], [2, 0, 0, 2, 0, 1, 1]])
    linear = model.model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(linear, MaskedDelta)
    # A mean is no mask: its weights are formed, by the kernel of a masked merge where there is one expert.
    for policy, is_mask in (("union", True), ("mean", False)):
        model.text_route = policy
        expected = model(IDS, route_ids=routes).logits
        with dispatch.interpreting():
            found = model(IDS, route_ids=routes).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert linear._last is not None
        assert (linear._last[1] is not None) == is_mask


def test_embeddings_and_head_follow_the_text(family: Family, tmp_path: Path) -> None:
    model = routed(family, embeddings="merge")
    merge_tiny(*family, method(), tmp_path, expand="b", embeddings="merge")
    with torch.no_grad():
        expected = load_model(str(tmp_path / "model")).eval()(IDS).logits
    found = model(IDS, present=[["b"], ["b"]]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    table = load_model(str(tmp_path / "model")).get_input_embeddings()(IDS)
    torch.testing.assert_close(model.embed(IDS, [["b"], ["b"]]), table, rtol=0, atol=1e-6)


def test_whole_experts_can_be_routed_to_as_well(family: Family) -> None:
    model = routed(family, kept=True)
    with torch.no_grad():
        expected = load_model(family[1]["c"]).eval()
        inputs = model.embed(IDS, [["c"], ["c"]])
        # Embeddings and head are the base's, so hidden states are compared before the head.
        own = expected.model(inputs_embeds=inputs).last_hidden_state
    found = model(inputs_embeds=inputs, route_ids=torch.full_like(IDS, 3), output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], own, rtol=0, atol=1e-5)


def test_text_policies() -> None:
    assert text_key("union", {1}) == text_key("mean", {1}) == Key("expert", (1,))
    assert text_key("union", ()) == Key("base")
    assert text_key("merged", ()) == Key("merged")
    assert text_key("mean", {2, 0}) == Key("mean", (0, 2))


def test_the_union_is_the_or_of_the_masks(family: Family) -> None:
    experts = open_tiny(*family)
    artefact = Artefact.of(method(), experts)
    deltas = MaskedDeltas(artefact)
    name = "model.layers.1.mlp.down_proj.weight"
    a, c = artefact.kept("a", name), artefact.kept("c", name)
    union = deltas.delta(name, Key("union", (0, 2)))
    assert union is not None
    assert torch.equal(union, torch.where(a != 0, a, c))
    mean = deltas.delta(name, Key("mean", (0, 2)))
    torch.testing.assert_close(mean, (a + c) / 2)
    assert torch.equal(deltas.delta(name, Key("expert", (0,))), a)


def test_merged_models_are_frozen(family: Family) -> None:
    model = routed(family)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    with pytest.raises(RuntimeError, match="frozen"):
        model.model.get_submodule("model.layers.0.mlp.up_proj").requires_grad_(True)
    linear: Any = model.model.get_submodule("model.layers.0.mlp.up_proj")
    linear.inner.weight.requires_grad = True
    with pytest.raises(RuntimeError, match="asks for gradients"):
        model(IDS)
    linear.inner.weight.requires_grad = False
    deltas = model._shared.deltas
    assert isinstance(deltas, MaskedDeltas)
    deltas.merged["model.norm.weight"].requires_grad = True
    with pytest.raises(RuntimeError, match=r"merged difference of 'model.norm.weight' is frozen"):
        model(IDS, present=[["a"], ["a"]])
    with pytest.raises(RuntimeError):
        deltas.words["model.norm.weight"][0].requires_grad = True


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        (torch.zeros(2, 6, dtype=torch.long), "one id per token"),
        (torch.full((2, 7), 4), "from 0 .text. to 3"),
        (torch.full((2, 7), -1), "from 0 .text. to 3"),
        (torch.zeros(2, 7), "whole numbers"),
    ],
)
def test_wrong_routes(family: Family, routes: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        routed(family)(IDS, route_ids=routes)


def test_wrong_models_and_names(family: Family, tmp_path: Path) -> None:
    model = routed(family)
    with pytest.raises(UserError, match=r"there is no route 'd'.*a, b, c"):
        model(IDS, present=[["d"], ["a"]])
    deltas = MaskedDeltas(Artefact.of(method(), open_tiny(*family)))
    with pytest.raises(UserError, match="for another base"):
        RoutedModel(load_model(str(family[0])), deltas, base_sha256="0" * 64)
    wide, _ = tiny_experts(tmp_path, [], intermediate_size=64)
    with pytest.raises(UserError, match="for another model"):
        RoutedModel(load_model(str(wide)), deltas)
