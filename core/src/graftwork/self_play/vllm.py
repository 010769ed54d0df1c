"""Answers written by a vLLM server, through TRL's own client.

The server gets the weights of the player that is to write: over NCCL, so both sides need a CUDA GPU. LoRA is
merged for that, one layer at a time, and the base weights are put back bit for bit.

Written against trl 1.16, whose client speaks to ``vllm serve``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch

from graftwork.errors import UserError, first_line
from graftwork.evaluate.encoding import encode_prompt
from graftwork.generate.stopping import end_tokens

if TYPE_CHECKING:
    from graftwork.hookspecs import Adapter
    from graftwork.run import Run
    from graftwork.self_play.items import Item
    from graftwork.self_play.options import WritingOptions

START = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\''
# What plugins bring to text generation in this process, which a server does not know.
GENERATION_HOOKS = ("combiner", "logits_processors", "generation_context", "before_forward")
# Fields of a LoRA config under which what a layer adds depends on more than its input, or lies outside of layers.
NOT_MERGED = ("alora_invocation_tokens", "arrow_config", "target_parameters", "trainable_token_indices")
# An answer's seed is one of so many and leaves room to count up from; the server takes 63 bits.
SEEDS = 2**62


def check(options: WritingOptions, run: Run, adapter: Adapter | None) -> None:
    """Refuse what a server cannot be asked for, before weights are read.

    Raises:
        UserError: no address, vLLM, GPU or server; a server that takes no weights; several processes; an
            adapter that is no LoRA; a plugin that changes how text is written.
    """
    address = urlparse(options.server)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(
            f"writing.server = '{options.server}' is no address; write for example http://localhost:8000"
        )
    for hook in GENERATION_HOOKS:
        if names := run.plugins.implements(hook):
            raise UserError(
                f"plugin '{names[0]}' changes how text is written (hook {hook}), which a vLLM server knows nothing "
                f"of; set writing.backend to transformers"
            )
    if adapter is not None:
        _check_lora(adapter.config)
    if run.world_size > 1:
        raise UserError(
            f"writing.backend: vllm takes the weights from one process, and this run has {run.world_size}; start "
            f"one, or set writing.backend to transformers"
        )
    _client(options.server)


def writer(options: WritingOptions, tokenizer: Any) -> RoundWriter:
    """Return what writes one round on the server of ``options``; see :class:`RoundWriter`."""
    return RoundWriter(VllmWriter(options.server, workers=options.batch_size), tokenizer, options)


class VllmWriter:
    """A vLLM server that writes with the weights it was given last.

    ``client`` is TRL's for ``url``, one for the whole process, where none is given. ``workers`` prompts are
    on their way at a time.
    """

    def __init__(self, url: str, *, workers: int = 16, client: Any = None) -> None:
        self.url = url
        self.workers = workers
        self.client = client if client is not None else _client(url)

    def update(self, model: torch.nn.Module) -> None:
        """Give the server the weights of ``model``, with its active LoRA adapters merged.

        ``model`` is the same afterwards, bit for bit.

        Raises:
            UserError: weights that are quantised, shared between processes or not on a CUDA GPU; an adapter that
                is no plain LoRA or DoRA, or sits on tied weights; the server fails.
        """
        groups = list(parameter_groups(model))
        device = groups[0].tensors[0][1].device
        with self._sentences("took no weights"):
            if getattr(self.client, "communicator", None) is None:
                self.client.init_communicator(device=device)
            with self.client.weight_update():
                for group in groups:
                    with _merged(group.layer):
                        announced = [
                            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                            for name, tensor in group.tensors
                        ]
                        self.client.update_named_params(
                            announced, iter([(name, tensor.data) for name, tensor in group.tensors])
                        )
                        if device.type == "cuda":
                            # What is being sent must not change back before it has left.
                            torch.cuda.synchronize(device)
            # What the server remembers of prompts was computed with the weights before.
            self.client.reset_prefix_cache()

    def write(
        self,
        prompt_ids: Sequence[list[int]],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        ends: Sequence[int] = (),
        progress: Callable[[int], Any] | None = None,
    ) -> list[tuple[list[int], str]]:
        """Return ``n`` answers to each prompt, those of a prompt side by side, as tokens and how they ended.

        That is ``end`` for an answer that stopped at one of the tokens ``ends`` (which it then holds, last), else
        ``length``. Every answer has a seed of its own, counted up from ``seed``. ``temperature=0`` is greedy.

        Raises:
            UserError: several greedy answers to a prompt, which would be the same; the server fails.
        """
        if temperature == 0 and n > 1:
            raise UserError(
                f"{n} greedy answers to one prompt are the same; raise writing.temperature, or ask for one"
            )

        def ask(index: int) -> list[list[int]]:
            found = self.client.generate(
                [prompt_ids[index]],
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                # TRL's default asks for log-probabilities, which nobody here reads.
                logprobs=None,
                # Of one request the server counts the seed up by itself, answer by answer.
                generation_kwargs={"seed": seed % SEEDS + index * n, "stop_token_ids": list(ends)},
            )["completion_ids"]
            if progress is not None:
                progress(n)
            return found

        with self._sentences("wrote no answers"), ThreadPoolExecutor(self.workers) as pool:
            answers = [tokens for many in pool.map(ask, range(len(prompt_ids))) for tokens in many]
        return [(tokens, "end" if tokens and tokens[-1] in ends else "length") for tokens in answers]

    @contextlib.contextmanager
    def _sentences(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # TRL raises bare exceptions with the server's reply in them.
            raise UserError(f"the vLLM server at {self.url} {what}: {first_line(error)}") from error


@dataclass
class RoundWriter:
    """Writes the answers of one player (see :class:`graftwork.self_play.writing.Writer`).

    The server gets the player's weights before its first answer.
    """

    server: VllmWriter
    tokenizer: Any
    options: WritingOptions
    ready: bool = False

    def __call__(
        self, model: Any, items: Sequence[Item], seed: int, progress: Callable[[int], Any]
    ) -> list[tuple[list[int], str]]:
        """Return tokens (the end token included where one was written) and text of each answer."""
        from graftwork.self_play.writing import asked

        if not self.ready:
            self.server.update(model)
            self.ready = True
        options = self.options
        answers = self.server.write(
            [encode_prompt(self.tokenizer, asked(item.prompt, options.template).main) for item in items],
            n=1,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=seed,
            ends=sorted(end_tokens(model, self.tokenizer)),
            progress=progress,
        )
        return [
            (tokens, str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip())
            for tokens, _ in answers
        ]


# ---------------------------------------------------------------------- weights as the server names them


@dataclass
class Group:
    """Parameters that are sent together, by the base model's names; with the LoRA layer to be merged meanwhile."""

    layer: Any = None
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)


def parameter_groups(model: torch.nn.Module) -> Iterator[Group]:
    """Yield the parameters of ``model`` as its base has them: those without an adapter first, then layer by layer.

    Tied weights come once. Of modules that train whole beside an adapter (``modules_to_save``) the active copy
    is the one sent.

    Raises:
        UserError: see :meth:`VllmWriter.update`.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    base: Any = model
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            _check_lora(model.peft_config[name])
        base = model.get_base_model()
    layers: dict[str, Any] = {}
    copies: dict[str, list[str]] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[f"{name}."] = module
        elif isinstance(module, ModulesToSaveWrapper):
            copies[f"{name}."] = list(module.active_adapters) if not module.disable_adapters else []
    names = Counter(id(one) for _, one in base.named_parameters(remove_duplicate=False))
    rest, merged = Group(), {prefix: Group(layer) for prefix, layer in layers.items()}
    for name, parameter in base.named_parameters():
        _check_whole(name, parameter)
        prefix = next((one for one in layers if name.startswith(one)), None)
        wrapper = next((one for one in copies if name.startswith(one)), None)
        if prefix is not None:
            inner = name.removeprefix(prefix)
            if not inner.startswith("base_layer."):
                continue
            _check_layer(prefix[:-1], layers[prefix], parameter, names[id(parameter)])
            merged[prefix].tensors.append((prefix + inner.removeprefix("base_layer."), parameter))
        elif wrapper is not None:
            inner = name.removeprefix(wrapper)
            kept = [f"modules_to_save.{one}." for one in copies[wrapper]] or ["original_module."]
            if inner.startswith(kept[0]):
                rest.tensors.append((wrapper + inner.removeprefix(kept[0]), parameter))
        else:
            rest.tensors.append((name, parameter))
    yield from (group for group in (rest, *merged.values()) if group.tensors)


@contextlib.contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """Merge the active adapters of a LoRA layer into its base for as long; unmerging alone would round."""
    if layer is None or layer.disable_adapters:
        yield
        return
    base = layer.get_base_layer()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    try:
        layer.merge()
        yield
    finally:
        layer.unmerge()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.copy_(before[name])


def _check_lora(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UserError(
            f"writing.backend: vllm needs full weights or LoRA, which can be merged exactly, and the adapter is "
            f"{kind}; set writing.backend to transformers"
        )
    for name in NOT_MERGED:
        if getattr(config, name, None):
            raise UserError(
                f"writing.backend: vllm cannot be given a LoRA with '{name}', which does not merge into layers; set "
                f"writing.backend to transformers"
            )


def _check_layer(name: str, layer: Any, parameter: torch.Tensor, uses: int) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    variants = (
        [layer.lora_variant.get(one) for one in layer.active_adapters]
        if isinstance(layer, LoraLayer)
        else [0]
    )
    if any(
        one is not None and not isinstance(one, DoraLinearVariant | DoraEmbeddingVariant) for one in variants
    ):
        raise UserError(
            f"the adapter on '{name}' is a kind of LoRA that is not known to merge exactly, as a vLLM server needs; "
            f"set writing.backend to transformers"
        )
    if not parameter.is_floating_point():
        raise UserError(
            f"the weight of '{name}' is quantised ({parameter.dtype}), and an adapter does not merge into it exactly; "
            f"set writing.backend to transformers"
        )
    if uses > 1:
        raise UserError(
            f"the adapter on '{name}' sits on a weight that another layer shares, which a vLLM server has once; leave "
            f"it out of target_modules, or set writing.backend to transformers"
        )


def _check_whole(name: str, parameter: Any) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
        raise UserError(
            f"the weight '{name}' is divided among processes, and a vLLM server needs it whole; use DeepSpeed's ZeRO "
            f"stage 2 at most, or set writing.backend to transformers"
        )


# ---------------------------------------------------------------------- the server


@functools.cache
def _client(url: str) -> Any:
    """Return TRL's client of a server that is up and takes weights.

    Raises:
        UserError: what is missing, and how to get it.
    """
    from trl.generation.vllm_client import VLLMClient

    # Asked for by ourselves: TRL would look for the distribution, whatever its version, and only then import it.
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("requests") is None:
        raise UserError(
            "writing.backend: vllm needs vLLM, which is not installed; `pip install 'graftwork[vllm]'` brings it, on "
            "Linux with a CUDA GPU"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "writing.backend: vllm needs a CUDA GPU to hand the weights over from; set it to transformers"
        )
    try:
        client = VLLMClient(base_url=url)
        if client.get_server_info()["weight_transfer_config"] is None:
            raise RuntimeError("it takes no weights")
    except ConnectionError:
        raise UserError(f"no vLLM server answers at {url}; start one on another GPU: {START}") from None
    except Exception as error:
        raise UserError(
            f"the vLLM server at {url} cannot be used ({first_line(error)}); start it so: {START}"
        ) from error
    return client
