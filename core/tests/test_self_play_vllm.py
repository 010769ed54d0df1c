"""Answers from a vLLM server: a stand-in with the signatures of TRL's client keeps what it is given.

No GPU is needed, so nothing here shows that a real server answers.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from graftwork import UserError
from graftwork.hookspecs import Adapter
from graftwork.self_play import vllm
from graftwork.self_play.items import Item
from graftwork.self_play.options import WritingOptions
from graftwork.self_play.vllm import VllmWriter, check, parameter_groups, writer
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from trl.generation.vllm_client import VLLMClient

END = 2
URL = "http://localhost:8000"


@dataclass
class Server:
    """Holds a model of the same architecture and writes with it, as a server would."""

    model: Any = field(default_factory=lambda: tiny_model(seed=9))
    communicator: Any = None
    calls: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def init_communicator(self, device: Any = 0) -> None:
        self.communicator = object()
        self.calls.append(f"init {device}")

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        self.calls.append("start")
        yield
        self.calls.append("finish")

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named_params, strict=True):
            assert name == sent
            assert (getattr(torch, dtype), shape) == (tensor.dtype, list(tensor.shape))
            self.received.append(name)
            own[name].data.copy_(tensor)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: Any, **settings: Any) -> dict[str, Any]:
        inspect.signature(VLLMClient.generate).bind(self, prompts, **settings)
        with self.lock:
            self.requests.append({"prompts": prompts, **settings})
            n, answers = settings["n"], []
            extra = settings["generation_kwargs"]
            for ids in prompts:
                for child in range(n):
                    torch.manual_seed(extra["seed"] + child)
                    out = self.model.generate(
                        torch.tensor([ids]),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                        do_sample=settings["temperature"] > 0,
                        temperature=settings["temperature"] or 1.0,
                        top_p=settings["top_p"],
                        top_k=0,
                        max_new_tokens=settings["max_tokens"],
                        eos_token_id=extra["stop_token_ids"] or None,
                        pad_token_id=0,
                    )
                    answers.append(out[0, len(ids) :].tolist())
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": None, "logprob_token_ids": None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters(remove_duplicate=False)}


def adapted(seed: int = 0, base: Any = None, **fields: Any) -> Any:
    """Return a model with LoRA that does something, in another process' dropout and all."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **fields})
    model = peft.get_peft_model(base or tiny_model(), config)
    for name, one in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(one, std=0.3 if one.ndim > 1 else 0.01)
    return model


def write(server: Server, prompts: list[list[int]], **settings: Any) -> list[tuple[list[int], str]]:
    chosen = {
        "n": 1,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 1,
        "ends": [END],
        **settings,
    }
    return VllmWriter(URL, client=server).write(prompts, **chosen)


# ---------------------------------------------------------------------- the real client


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("__init__", {"base_url": URL}),
        ("get_server_info", {}),
        ("init_communicator", {"device": torch.device("cuda:0")}),
        ("weight_update", {}),
        ("update_named_params", {"metadata": [("a", "float32", [1])], "named_params": iter([])}),
        ("reset_prefix_cache", {}),
        (
            "generate",
            {
                "prompts": [[1]],
                "n": 1,
                "temperature": 1.0,
                "top_p": 1.0,
                "max_tokens": 8,
                "logprobs": None,
                "generation_kwargs": {},
            },
        ),
    ],
)
def test_trl_has_the_client_we_call(method: str, arguments: dict[str, Any]) -> None:
    signature = inspect.signature(getattr(VLLMClient, method))
    signature.bind(None, **arguments)
    if method != "__init__" and hasattr(Server, method) and method != "generate":
        assert list(inspect.signature(getattr(Server, method)).parameters) == list(signature.parameters)
    defaults = {name: one.default for name, one in signature.parameters.items()}
    if method == "generate":
        # What we leave to the client must leave the distribution alone.
        assert (defaults["top_k"], defaults["min_p"], defaults["repetition_penalty"]) == (0, 0.0, 1.0)


def test_the_real_client_sends_one_request_with_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own code between us and the wire, from the arguments to the tokens."""
    sent = []

    def post(url: str, json: dict[str, Any]) -> dict[str, Any]:
        sent.append((url, json))
        choice = {"prompt_token_ids": json["prompt"][0], "token_ids": [5, END], "logprobs": None}
        return {"choices": [choice] * json["n"]}

    client = VLLMClient.__new__(VLLMClient)
    client.base_url, client.model = URL, "tiny"
    monkeypatch.setattr(client, "_post", post, raising=False)
    found = VllmWriter(URL, client=client).write(
        [[7, 8]], n=2, max_new_tokens=8, temperature=0.5, top_p=0.9, seed=3, ends=[END]
    )
    assert found == [([5, END], "end")] * 2
    ((url, body),) = sent
    assert url == f"{URL}/v1/completions"
    wanted = {"prompt": [[7, 8]], "n": 2, "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    wanted |= {"min_p": 0.0, "repetition_penalty": 1.0, "seed": 3, "stop_token_ids": [END], "logprobs": None}
    assert wanted.items() <= body.items()


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [False, True])
def test_full_weights_arrive_as_they_are(tied: bool) -> None:
    model = tiny_model(seed=1, tie_word_embeddings=tied)
    before, server = weights(model), Server(tiny_model(seed=9, tie_word_embeddings=tied))
    VllmWriter(URL, client=server).update(model)
    assert torch.equal(logits(server.model), logits(model))
    assert len(server.received) == len(set(server.received))
    assert ("lm_head.weight" in server.received) is not tied
    assert all(torch.equal(before[name], one) for name, one in weights(model).items())
    assert server.calls == ["init cpu", "start", "finish", "reset"]
    VllmWriter(URL, client=server).update(model)
    assert server.calls.count("init cpu") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
    ],
)
def test_lora_arrives_merged_and_leaves_no_trace(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    before, server = weights(model), Server()
    shown = logits(model)
    VllmWriter(URL, client=server).update(model)
    assert not torch.allclose(shown, logits(tiny_model()), atol=1e-2)
    torch.testing.assert_close(logits(server.model), shown, rtol=1e-4, atol=1e-4)
    # Every parameter of the base arrived, once and under its own name.
    assert sorted(server.received) == sorted(name for name, _ in tiny_model().named_parameters())
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), shown)


def test_unmerging_alone_would_have_left_a_trace() -> None:
    model = adapted()
    before = weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert any(not torch.equal(before[name], one) for name, one in weights(model).items())


def test_the_active_adapters_are_those_that_arrive() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, one in model.named_parameters():
        if "other" in name:
            torch.nn.init.normal_(one, std=0.3)
    seen = {}
    for active in ("default", "other"):
        model.set_adapter(active)
        server = Server()
        VllmWriter(URL, client=server).update(model)
        torch.testing.assert_close(logits(server.model), logits(model), rtol=1e-4, atol=1e-4)
        seen[active] = logits(server.model)
    assert not torch.allclose(seen["default"], seen["other"], atol=1e-2)
    with model.disable_adapter():
        VllmWriter(URL, client=server).update(model)
    assert torch.equal(logits(server.model), logits(tiny_model()))


def test_a_failing_server_leaves_the_weights_alone() -> None:
    model, server = adapted(), Server()
    before = weights(model)
    given = server.update_named_params

    def fail(metadata: Any, named_params: Any) -> None:
        if "up_proj" in metadata[0][0]:
            raise Exception("Request failed: 500, out of memory\nTraceback")
        given(metadata, named_params)

    server.update_named_params = fail  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        VllmWriter(URL, client=server).update(model)
    assert (
        str(caught.value) == f"the vLLM server at {URL} took no weights: Request failed: 500, out of memory"
    )
    assert all(torch.equal(before[name], one) for name, one in weights(model).items())
    assert not any(getattr(one, "merged", False) for one in model.modules())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: peft.get_peft_model(tiny_model(), peft.IA3Config()),
            "LoRA, which can be merged exactly, and the adapter is IA3",
        ),
        (lambda: adapted(trainable_token_indices=[3, 4]), "'trainable_token_indices'"),
        (lambda: adapted(alora_invocation_tokens=[3], task_type="CAUSAL_LM"), "'alora_invocation_tokens'"),
        (
            lambda: adapted(base=tiny_model(tie_word_embeddings=True), target_modules=["embed_tokens"]),
            "a weight that another layer shares",
        ),
    ],
)
def test_what_does_not_merge_exactly_is_refused(model: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        list(parameter_groups(model()))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_and_divided_weights_are_refused() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"up_proj' is quantised \(torch.int8\)"):
        list(parameter_groups(model))
    divided = tiny_model()
    divided.lm_head.weight.ds_id = 3
    with pytest.raises(UserError, match=r"lm_head.weight' is divided among processes"):
        list(parameter_groups(divided))


# ---------------------------------------------------------------------- answers

PROMPTS = [[10, 11, 12], [40], [60, 61, 62, 63, 64]]


def test_answers_come_in_the_order_of_the_prompts_with_how_they_ended() -> None:
    server = Server()
    greedy = write(server, PROMPTS, temperature=0.0)
    for ids, (tokens, _) in zip(PROMPTS, greedy, strict=True):
        out = server.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        assert out[0, len(ids) :].tolist() == tokens
    # An end token that the model is sure to write, and none.
    first = greedy[0][0][0]
    assert write(server, PROMPTS[:1], temperature=0.0, ends=[first, END]) == [([first], "end")]
    server.model.generation_config.eos_token_id = None
    (found,) = write(server, PROMPTS[:1], temperature=0.0, ends=[])
    assert (len(found[0]), found[1]) == (8, "length")


def test_every_answer_has_a_seed_of_its_own_and_the_same_seeds_give_the_same_answers() -> None:
    server = Server()
    many = write(server, [PROMPTS[0]] * 3, n=2, seed=7)
    assert sorted(one["generation_kwargs"]["seed"] for one in server.requests) == [7, 9, 11]
    assert len({tuple(tokens) for tokens, _ in many}) == 6
    assert write(server, [PROMPTS[0]] * 3, n=2, seed=7) == many
    # One prompt less changes no other answer.
    assert write(server, [PROMPTS[0]] * 2, n=2, seed=7) == many[:4]
    write(server, PROMPTS[:1], seed=2**63 - 1)
    assert 0 <= server.requests[-1]["generation_kwargs"]["seed"] < 2**62


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(UserError, match="2 greedy answers to one prompt are the same"):
        write(Server(), PROMPTS, n=2, temperature=0.0)


def test_a_server_that_refuses_a_prompt_is_quoted() -> None:
    server = Server()

    def generate(*_: Any, **__: Any) -> None:
        raise Exception("Request failed: 400, the prompt is too long.\nmore")

    server.generate = generate  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"wrote no answers: Request failed: 400, the prompt is too long$"):
        write(server, PROMPTS)


def test_a_round_is_written_with_the_weights_of_its_player(monkeypatch: pytest.MonkeyPatch) -> None:
    server, tokenizer = Server(), tiny_tokenizer()
    monkeypatch.setattr(vllm, "_client", lambda url: server)
    options = WritingOptions(backend="vllm", max_new_tokens=5, temperature=0.0)
    items = [
        Item(0, "How many?", "two", [], []),
        Item(1, [{"role": "user", "content": "Where?"}], "here", [], []),
    ]
    player, seen = adapted().eval(), []
    write_items = writer(options, tokenizer)
    first = write_items(player, items, 3, seen.append)
    assert server.calls.count("start") == 1
    assert write_items(player, items, 3, seen.append) == first
    # The same player once more: its weights are there already. The next round begins with its player's own.
    assert server.calls.count("start") == 1
    writer(options, tokenizer)(tiny_model(seed=4), items, 3, seen.append)
    assert server.calls.count("start") == 2
    assert sum(seen) == 6
    chat = tokenizer.apply_chat_template(items[1].prompt, add_generation_prompt=True)["input_ids"]
    for ids, (tokens, text) in zip([tokenizer("How many?")["input_ids"], chat], first, strict=True):
        asked = torch.tensor([ids])
        out = player.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
        assert out[0, len(ids) :].tolist() == tokens
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    write_items = writer(WritingOptions(backend="vllm", template="Q: {prompt}\nA:"), tokenizer)
    write_items(player, items[:1], 3, seen.append)
    assert server.requests[-1]["prompts"] == [tokenizer("Q: How many?\nA:")["input_ids"]]


# ---------------------------------------------------------------------- what is refused before weights are read


def run(world_size: int = 1, **hooks: list[str]) -> Any:
    plugins = SimpleNamespace(implements=lambda hook: hooks.get(hook, []))
    return SimpleNamespace(world_size=world_size, plugins=plugins)


def refused(options: dict[str, Any], chosen: Any = None, adapter: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        check(WritingOptions(backend="vllm", **options), chosen or run(), adapter and Adapter(adapter))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def serve(monkeypatch: pytest.MonkeyPatch, info: Any = None, error: Exception | None = None) -> None:
    """Put a client in TRL's place whose server answers ``info``, or that raises ``error`` when it is made."""

    class Client:
        def __init__(self, base_url: str) -> None:
            if error is not None:
                raise error

        def get_server_info(self) -> Any:
            if isinstance(info, Exception):
                raise info
            return info

    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Client)
    vllm._client.cache_clear()


def test_vllm_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    vllm._client.cache_clear()
    assert "`pip install 'graftwork[vllm]'` brings it" in refused({})


def test_a_gpu_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    vllm._client.cache_clear()
    assert "needs a CUDA GPU" in refused({})


@pytest.mark.usefixtures("installed")
def test_servers_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config"
    serve(monkeypatch, error=ConnectionError("refused"))
    assert refused({}).startswith(f"no vLLM server answers at {URL}; start one on another GPU: {start}")
    serve(monkeypatch, info=RuntimeError("no development endpoints.\nRestart"))
    assert f"cannot be used (no development endpoints); start it so: {start}" in refused({})
    serve(monkeypatch, info={"weight_transfer_config": None})
    assert "cannot be used (it takes no weights)" in refused({})
    serve(monkeypatch, info={"weight_transfer_config": {"backend": "nccl"}})
    check(WritingOptions(backend="vllm"), run(), Adapter(peft.LoraConfig()))


@pytest.mark.usefixtures("installed")
def test_runs_that_no_server_can_write_for(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, info={"weight_transfer_config": {"backend": "nccl"}})
    for server in ("localhost:8000", "", "ftp://a", "http://"):
        assert f"writing.server = '{server}' is no address" in refused({"server": server})
    assert "and this run has 2; start one" in refused({}, run(2))
    assert "plugin 'd3' changes how text is written (hook before_forward)" in refused(
        {}, run(before_forward=["d3"])
    )
    assert "the adapter is IA3" in refused({}, adapter=peft.IA3Config())
    assert "'arrow_config'" in refused({}, adapter=peft.LoraConfig(arrow_config=peft.ArrowConfig()))


def test_the_hooks_that_a_server_does_not_know_are_all_of_generation() -> None:
    from graftwork.generate.decoding import Decoding

    asked: list[str] = []
    spy = SimpleNamespace(
        call_one=lambda hook, **_: asked.append(hook),
        call=lambda hook, **_: asked.append(hook) or [],
        implements=lambda hook: asked.append(hook) or [],
    )
    Decoding.from_plugins(SimpleNamespace(plugins=spy), None)  # type: ignore[arg-type]
    assert set(asked) == set(vllm.GENERATION_HOOKS)


def test_the_extra_is_there() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(json.dumps(one).startswith('"trl[vllm]') for one in project["optional-dependencies"]["vllm"])


# ---------------------------------------------------------------------- a whole run

CODE = """
from torch.nn.functional import softplus
from graftwork import PairLoss, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions

class Duel:
    Options = SelfPlayOptions

    def __init__(self, options):
        self.options = options

    @hookimpl
    def self_play(self, run):
        def loss(batch):
            margin = batch.chosen - batch.rejected - (batch.reference_chosen - batch.reference_rejected)[:, 0]
            return PairLoss(softplus(-0.1 * margin))
        return SelfPlay(self.options, loss)
"""


def test_a_run_plays_with_a_server_as_it_does_without(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers are the same wherever they are written, so both runs train on the same pairs."""
    (tmp_path / "site").mkdir()
    install_plugin(tmp_path / "site", "served", "served_duel:Duel", CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    server = Server()
    monkeypatch.setattr(vllm, "_client", lambda url: server)
    seen = {}
    for backend in ("transformers", "vllm"):
        writing = {"backend": backend, "max_new_tokens": 6, "temperature": 0.0, "batch_size": 4}
        recipe = tiny_recipe(
            checkpoint,
            "exact:table,train=6,test=2,entries=2",
            plugins={"served": {"iterations": 2, "writing": writing}},
            train={"max_steps": 2, "max_length": 128},
            evaluate={"max_new_tokens": 4},
            adapter={"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
        )
        run_tiny(recipe, tmp_path / backend)
        tables = [
            pq.read_table(tmp_path / backend / "rounds" / f"iteration-{k}" / "pairs.parquet").to_pydict()
            for k in (1, 2)
        ]
        seen[backend] = [table["rejected_ids"] for table in tables], losses(tmp_path / backend)
    assert len(server.requests) == 12
    # Two rounds, two players: each was given its weights.
    assert server.calls.count("start") == 2
    assert seen["vllm"] == seen["transformers"]
