"""Transform tiny models, in memory or as a whole job with a checkpoint that is loaded again."""

from types import SimpleNamespace

import pytest
import torch
from graftwork.console import Console
from graftwork.hookspecs import WeightTransform
from graftwork.models import load_config, load_model, load_tokenizer
from graftwork.plugins import construct
from graftwork.recipe import expand
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.transform.calibration import read_windows
from graftwork.transform.engine import Engine, Texts
from graftwork.transform.job import run_transform
from graftwork.transform.options import TransformOptions
from graftwork.transform.source import ModelSource
from graftwork.yaml_lines import Document

IDS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(3))
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 259,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _roughen(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                parameter[:2] += 8
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "embed" not in name and "lm_head" not in name:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture
def ids():
    return IDS


@pytest.fixture
def rough():
    """Make a tiny model whose norms differ from one, with outlier channels: scales and rotations have work."""

    def make(kind="llama", *, seed=0, dtype=torch.float32, **changes):
        return _roughen(tiny_model(kind, seed=seed, **changes), seed).to(dtype)

    return make


@pytest.fixture
def other():
    """The same for a family that is not among the tiny ones."""

    def make(config_class, dtype=torch.float32, **changes):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        return _roughen(AutoModelForCausalLM.from_config(config_class(**{**SMALL, **changes}))).to(dtype)

    return make


def _stream(model, *plugins, ids=IDS, seed=0, look=None):
    named = []
    for name, options in plugins:
        transforms = construct(name, options).weight_transforms(run=SimpleNamespace(seed=seed))
        named += [(name, transform) for transform in transforms]
    if look is not None:
        named.append(("look", WeightTransform("look", look, needs="none")))
    return Engine(ModelSource(model), named, Texts(ids[:-2], ids[-2:]), batch_size=2, seed=seed).run()


@pytest.fixture
def stream():
    """Pass a model through plugins, (name, options) each; ``look`` sees every layer at the end."""
    return _stream


@pytest.fixture
def layers():
    """The same; returns the layers as the plugins left them."""

    def run(model, *plugins, **options):
        found = []
        _stream(model, *plugins, look=lambda block: found.append(block.module), **options)
        return found

    return run


@pytest.fixture
def inputs():
    """Return what linears of a layer of a plain model read from the calibration windows (tokens x inputs)."""

    def read(model, layer, names, ids=IDS):
        seen = {}
        owner = model.model.layers[layer]

        def hook(name):
            return lambda module, args: seen.__setitem__(name, args[0].flatten(0, -2).double())

        handles = [owner.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        with torch.no_grad():
            model(input_ids=ids[:-2])
        for handle in handles:
            handle.remove()
        return seen

    return read


@pytest.fixture
def logits():
    def run(model):
        with torch.no_grad():
            return model(input_ids=IDS).logits.double()

    return run


@pytest.fixture
def job(tmp_path):
    """Run a transform job; return the model that its folder holds, the result, and the evaluation windows."""

    def run(model, plugins, **settings):
        folder = tmp_path / "model"
        if not folder.exists():
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        section = {
            "calibration": "random",
            "samples": 4,
            "window": 24,
            "evaluation": ["random"],
            "evaluation_window": 24,
            "evaluation_windows": 2,
            "batch_size": 2,
            **settings,
        }
        tree = {"model": str(folder), "plugins": plugins, "transform": section}
        recipe = expand(Document(tree, {}, "test"))
        output = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        result = run_transform(recipe.jobs[0], output, console=Console(enabled=False))
        options = TransformOptions.model_validate(section)
        windows = read_windows(
            options, load_tokenizer(str(folder)), load_config(str(folder)), recipe.jobs[0].job.seed
        )
        return load_model(str(output / "model")), result, windows.evaluation[0]

    return run
