"""RTN and GPTQ on whole models: exact limits, whose inputs count, what is stored is what runs, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from graftwork import UserError
from graftwork.plugins import construct
from graftwork.transform.block import Block
from graftwork.transform.feedback import round_with_feedback
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork_compression_baselines.surroundings import readers, shared
from safetensors.torch import load_file

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
ALL = [*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_sixteen_bits_are_the_plain_model_bit_for_bit(name, rough, job, stream, logits, tmp_path):
    model = rough()
    outcome = stream(model, (name, {"scheme": "W16A16"}))
    assert outcome.nll == outcome.dense_nll
    assert outcome.quantization is None
    loaded, result, _ = job(model, {name: {"scheme": "W16A16KV16"}})
    assert result["metrics"]["delta_nll"] == 0
    assert torch.equal(logits(loaded), logits(model))
    before = load_file(tmp_path / "model/model.safetensors")
    after = {}
    for file in (tmp_path / "run-0/model").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "options", [{}, {"group": 8, "symmetric": False}, {"clip": "mse", "convention": "half-range"}]
)
def test_rtn_rounds_every_weight_to_nearest(options, rough, layers):
    model = rough()
    scheme = WeightScheme(bits=3, **options)
    for old, new in zip(
        model.model.layers, layers(model, ("rtn", {"scheme": "W3A8", **options})), strict=True
    ):
        for name in ALL:
            linear = new.get_submodule(name)
            expected = quantize_weight(old.get_submodule(name).weight, scheme)
            assert torch.equal(linear.codes().codes, expected.codes)
            assert torch.equal(linear.dense_weight(), expected.dequantized())
            convention = options.get("convention", "largest-level")
            assert linear.activations == ActivationScheme(bits=8, convention=convention)


def test_gptq_is_rtn_where_inputs_have_nothing_in_common(rough, layers, monkeypatch):
    model = rough()
    nearest = layers(model, ("rtn", {"scheme": "W4A16"}))

    def identity(block, names):
        return {name: torch.eye(block.get(name).weight.shape[1], dtype=torch.float64) for name in names}

    monkeypatch.setattr(Block, "second_moments", identity)
    for old, new in zip(nearest, layers(model, ("gptq", {"scheme": "W4A16"})), strict=True):
        for name in ALL:
            assert torch.equal(old.get_submodule(name).codes().codes, new.get_submodule(name).codes().codes)


def test_gptq_at_once_uses_the_inputs_of_the_unchanged_layer(rough, layers, inputs):
    model = rough(dtype=torch.float64)
    first = layers(model, ("gptq", {"scheme": "W3A16", "sequential": False, "order": "importance"}))[0]
    for name, x in inputs(model, 0, ALL).items():
        weight = model.model.layers[0].get_submodule(name).weight
        expected = round_with_feedback(weight, x.T @ x, WeightScheme(bits=3), order="importance")
        assert torch.equal(first.get_submodule(name).codes().codes, expected.codes), name


def test_gptq_in_sequence_sees_what_was_rounded_before(rough, layers, inputs):
    model = rough(dtype=torch.float64)
    rounded = layers(model, ("gptq", {"scheme": "W3A16"}))
    # By hand: the groups one after another, each from the inputs that the rounded ones before it give.
    for index in range(2):
        layer = model.model.layers[index]
        for group in (QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]):
            seen = inputs(model, index, group)
            for name in group:
                linear = layer.get_submodule(name)
                x = seen[name]
                expected = round_with_feedback(linear.weight, x.T @ x, WeightScheme(bits=3))
                assert torch.equal(rounded[index].get_submodule(name).codes().codes, expected.codes), name
            for name in group:
                linear = layer.get_submodule(name)
                linear.weight.data = rounded[index].get_submodule(name).dense_weight().clone()


def test_gptq_outputs_are_nearer_than_those_of_rtn(rough, stream):
    for seed in range(3):
        model = rough(seed=seed)
        found = {}
        for name in ("rtn", "gptq"):
            records = stream(model, (name, {"scheme": "W3A16"})).layers
            found[name] = records[0].error
        assert found["gptq"] < 0.8 * found["rtn"]


def test_linears_are_grouped_by_what_they_read(rough, stream):
    groups, rotated = [], []

    def look(block):
        groups.append(readers(block, ALL))
        rotated.append([len(set(shared(block, group).values())) for group in groups[-1]])

    from graftwork.hookspecs import WeightTransform
    from graftwork.transform.engine import Engine, Texts
    from graftwork.transform.source import ModelSource

    ids = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    turn = construct("hadamard", {"place": "online"}).weight_transforms(run=SimpleNamespace(seed=0))
    for before in ([], turn):
        named = [("one", one) for one in (*before, WeightTransform("look", look))]
        Engine(ModelSource(rough()), named, Texts(ids)).run()
    expected = [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    assert all(
        [sorted(group) for group in found] == [sorted(group) for group in expected] for found in groups
    )
    # Rotated alike, they still share what is measured.
    assert rotated == [[1, 1, 1, 1]] * 4


def test_too_few_tokens_are_refused_or_rounded_to_nearest(rough, layers, stream, ids):
    model, few = rough(), ids[:3, :16]
    with pytest.raises(
        UserError, match=r"'model.layers.0.self_attn.\w_proj' are not positive definite with damp=0"
    ):
        stream(model, ("gptq", {"scheme": "W4A16", "damp": 0}), ids=few)
    options = {"scheme": "W4A16", "damp": 0, "on_singular": "nearest"}
    outcome = stream(model, ("gptq", options), ids=few)
    assert any(
        "model.layers.0.self_attn.q_proj" in note and "rounded to nearest" in note for note in outcome.notes
    )
    found = layers(model, ("gptq", options), ids=few)[0]
    nearest = quantize_weight(model.model.layers[0].self_attn.q_proj.weight, WeightScheme(bits=4))
    assert torch.equal(found.self_attn.q_proj.codes().codes, nearest.codes)


@pytest.mark.parametrize(
    "plugins",
    [
        {"rtn": {"scheme": "W4A16"}},
        {"gptq": {"scheme": "W4A16", "group": 8, "symmetric": False}},
        {"smoothquant": {}, "gptq": {"scheme": "W4A8", "convention": "half-range"}},
        {"hadamard": {}, "gptq": {"scheme": "W4A4KV4", "rotate_keys": True}},
        {"hadamard": {"place": "online"}, "rtn": {"scheme": "W2A4"}},
        {"svd": {"whiten": "cholesky"}, "gptq": {"scheme": "W4A8"}},
        {"awq": {"scheme": "W3A16", "group": 8}},
        {"lqer": {"scheme": "W3A16", "rank": 4}},
    ],
    ids=lambda plugins: "+".join(plugins),
)
def test_what_is_stored_is_what_was_measured(plugins, rough, job):
    loaded, result, windows = job(rough(), plugins)
    with torch.no_grad():
        scores = loaded(input_ids=windows).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert result["metrics"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert abs(result["metrics"]["delta_nll"]) > 1e-5


def test_an_order_that_cannot_work_is_refused(rough):
    def check(*names, **job):
        plugins = {name: construct(name, {}) for name in names}
        run = SimpleNamespace(
            job=SimpleNamespace(**{"transform": object(), **job}), plugins=SimpleNamespace(objects=plugins)
        )
        for one in plugins.values():
            one.check(run=run)

    check("smoothquant", "awq")
    check("hadamard", "smoothquant", "svd", "gptq")
    with pytest.raises(UserError, match="undoes the scales of 'smoothquant'"):
        check("smoothquant", "hadamard")
    with pytest.raises(UserError, match="plugin 'rtn' changes weights with `trainer transform`"):
        check("rtn", transform=None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rtn", {"rotate_keys": True}, "W4A16 does not round keys"),
        ("rtn", {"scheme": "W9A16"}, "9 bits are not to be had"),
        ("rtn", {"damp": 0.1}, "damp"),
        ("gptq", {"damp": -1}, "greater than or equal to 0"),
        ("awq", {"scheme": "W16A16"}, "W16A16 rounds no weights"),
        ("awq", {"scheme": "W4A4", "quantizer": "none"}, "leaves rounding to another plugin"),
        ("lqer", {"scheme": "W16A16"}, "nothing to correct"),
        ("lqer", {"factor_bits": 12}, "2 to 8 bits, or 16"),
        ("hadamard", {"block": 1}, "block"),
        ("svd", {"ratio": 0}, "greater than 0"),
        ("smoothquant", {"alpha": 2}, "less than or equal to 1"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        construct(name, options)


def test_bad_models_are_refused_by_name(rough, stream):
    with pytest.raises(
        UserError, match=r"group size 7 does not divide the 32 inputs of 'model.layers.0.self_attn"
    ):
        stream(rough(), ("gptq", {"group": 7}))
    model = rough()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"weight 'model.layers.1.mlp.up_proj' holds 1 values"):
        stream(model, ("rtn", {}))
