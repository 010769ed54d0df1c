"""The pass through a model, layer by layer: read, transform, measure, write, go on with what the layer now gives.

At any moment one layer is in memory, with the hidden states of the calibration and evaluation texts before it (in
memory or on disk). After each layer its file, the hidden states behind it and the progress are on disk, so that a
run that was cut off goes on with the next layer and gives the same bytes.

Several processes share the texts and change every layer alike; the main one writes.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftwork import memory
from graftwork.console import Console
from graftwork.distributed import barrier, from_main, from_rank, gather_objects, rank_and_world
from graftwork.errors import PluginError, UserError
from graftwork.hookspecs import WeightTransform
from graftwork.transform import figures
from graftwork.transform.activations import Stream
from graftwork.transform.beside import Beside, Stored
from graftwork.transform.block import Block
from graftwork.transform.format import (
    Format,
    Layout,
    check_change,
    combine,
    describe_layer,
    layer_tensors,
    layout_of,
)
from graftwork.transform.modules import CompressedLinear
from graftwork.transform.outer import Outer, OuterWeights, set_tied
from graftwork.transform.progress import LayerRecord, Progress
from graftwork.transform.source import Source, fill
from graftwork.transform.structure import find_layers, first_tensor, leave, linears
from graftwork.transform.whole import Whole
from graftwork.transform.writer import Writer


@dataclass
class Outcome:
    """What a pass through the model found.

    Attributes:
        layers: one record per layer.
        nll: mean negative log-likelihood per token of every evaluation window, after the change.
        dense_nll: the same of the unchanged model; empty where it was not asked for.
        calibration_nll: the mean over the calibration windows, after the change, where asked for.
        notes: sentences for the user.
        config: of the changed model.
        quantization: the config's ``quantization_config``; None for a plain checkpoint.
    """

    layers: list[LayerRecord]
    nll: list[float]
    dense_nll: list[float]
    calibration_nll: float | None
    notes: list[str]
    config: Any
    quantization: dict[str, Any] | None = None


@dataclass
class Texts:
    """Token ids (windows x window) for calibration and evaluation; evaluation texts of one window size in a row."""

    calibration: torch.Tensor | None = None
    evaluation: torch.Tensor | None = None


class Engine:
    """Pass a model through an ordered list of transforms.

    Args:
        source: where the weights come from.
        transforms: (plugin, transform) in order.
        texts: token ids.
        batch_size: windows that go through a layer together.
        in_memory: whether hidden states are in memory between layers.
        work: folder for files, hidden states and progress; None keeps nothing.
        format: of what is written.
        seed: of the run.
        tokenizer: loads the model's, for a ``prepare``.
        dense: whether the unchanged model is evaluated, too.
        score_calibration: whether the calibration windows are scored after the change.
    """

    def __init__(
        self,
        source: Source,
        transforms: Sequence[tuple[str, WeightTransform]],
        texts: Texts,
        *,
        batch_size: int = 4,
        in_memory: bool = True,
        work: Path | None = None,
        format: Format = "auto",
        seed: int = 0,
        tokenizer: Callable[[], Any] = lambda: None,
        dense: bool = True,
        score_calibration: bool = False,
        console: Console | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source, self.transforms, self.texts = source, list(transforms), texts
        self.work, self.seed, self.tokenizer = work, seed, tokenizer
        self.format: Format = format
        self.score_calibration = score_calibration
        self.console = console or Console(enabled=False)
        self.device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
        self.batch_size = batch_size
        self.model = source.skeleton()
        self.layers_name, self.layers = find_layers(self.model)
        self.main = rank_and_world()[0] == 0
        self.writer = Writer(work, len(self.layers)) if work is not None else None
        self.beside = Beside(work, len(self.layers)) if work is not None else None
        self.progress = Progress()
        self.prepared: dict[str, Mapping[str, torch.Tensor]] = {}
        self.outer = OuterWeights(self.model, source, self.device)
        self._kept: dict[str, torch.Tensor] = {}
        hidden = work / "hidden" if work is not None else None

        def stream(name: str, windows: torch.Tensor | None) -> Stream | None:
            if windows is None:
                return None
            return Stream(name, windows, batch_size, folder=hidden, in_memory=in_memory, device=self.device)

        any_dense = any(transform.dense for _, transform in self.transforms)
        # Where the whole model alone looks at them, they need not go through the layers again.
        early = all(one.needs == "none" for _, one in self.transforms)
        early = early and any(one.prepare is not None for _, one in self.transforms)
        passed = None if early and not score_calibration else texts.calibration
        self.calibration = stream("calibration", passed)
        self.dense_calibration = stream("dense-calibration", passed) if any_dense else None
        self.evaluation = stream("evaluation", texts.evaluation)
        self.dense_evaluation = stream("dense-evaluation", texts.evaluation) if dense else None

    # ------------------------------------------------------------ the pass

    def run(self) -> Outcome:
        """Pass the model through the transforms and return what was found; files are in ``work``.

        Raises:
            UserError: anything wrong with the input.
            PluginError: a plugin failed.
        """
        done = self._resumed()
        self._prepare()
        self._begin(done)
        with self.console.bar(len(self.layers), "transform", "layer") as bar:
            bar.update(done)
            for index in range(done, len(self.layers)):
                started = time.perf_counter()
                self._layer(index, bar.set_postfix_str)
                self.progress.records[-1].seconds = time.perf_counter() - started
                self._commit()
                memory.give_back()
                bar.update(1)
        return self._finish()

    def _layer(self, index: int, tell: Callable[[str], Any]) -> None:
        name = f"{self.layers_name}.{index}"
        module = copy.deepcopy(self.layers[index])
        fill(module, name, self.source, self.device)
        module.requires_grad_(False)

        def run(hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
            return first_tensor(module(hidden, **kwargs))

        tell("unchanged")
        if self.dense_evaluation is not None:
            self.dense_evaluation.compute(run)
        if self.dense_calibration is not None:
            self.dense_calibration.compute(run, keep=True)
        block = Block(
            index,
            len(self.layers),
            name,
            module,
            self.model,
            inputs=self.calibration,
            dense=self.dense_calibration,
            console=self.console,
        )
        record = LayerRecord(name, parameters=sum(one.weight.numel() for one in linears(module).values()))
        reference = self._reference(block, record)
        for plugin, transform in self.transforms:
            tell(transform.name)
            self._transform(block, plugin, transform)
        record.linears = block.records
        self.progress.notes += block.notes
        self._same_kv(block)
        tell("passed on")
        last = index + 1 == len(self.layers)
        with figures.watching(module) as seen:
            if self.calibration is not None:
                # What comes out of the last layer is wanted for the score alone.
                self.calibration.compute(run, limit=1 if last and not self.score_calibration else None)
            if self.evaluation is not None:
                self.evaluation.compute(run)
        self._compare(record, block, reference, figures.mean(seen.values()))
        record.bits = self._written(index, name, module)
        self._store(index + 1, block.stored)
        self.progress.records.append(record)
        for stream in self._streams():
            stream.step()

    def _transform(self, block: Block, plugin: str, transform: WeightTransform) -> None:
        block.seed = self.seed * 1_000_003 + block.index
        block.prepared = self.prepared.get(plugin, {})
        torch.manual_seed(block.seed)
        _guarded(plugin, f"weight_transforms ({transform.name})", partial(transform.block, block))
        block.module.requires_grad_(False)
        memory.give_back()

    def _written(self, index: int, name: str, module: torch.nn.Module) -> int:
        """Write a layer's file; return the bits of all that is stored of its linears."""
        self.progress.descriptions.append(describe_layer(name, module))
        own = {
            child
            for child, one in module.named_modules()
            if isinstance(one, CompressedLinear | torch.nn.Linear)
        }
        tensors = layer_tensors(name, module, self._layout_with(index))
        self._same_everywhere(name, tensors)
        self._write(index + 1, tensors)
        return sum(
            8 * tensor.numel() * tensor.element_size()
            for key, tensor in tensors.items()
            if key.removeprefix(f"{name}.").rpartition(".")[0] in own
        )

    def _write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.writer is not None and self.main:
            self.writer.write(number, tensors)

    def _store(self, number: int, stored: Stored) -> None:
        """Write what lies beside the model; as it is made alike in all processes, one is enough."""
        if self.beside is not None and self.main:
            self.beside.write(number, stored)

    def _same_everywhere(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse to go on where processes have changed what ``name`` stands for differently.

        Raises:
            UserError: with the name.
        """
        if rank_and_world()[1] == 1:
            return
        found = hashlib.sha256()
        for key in sorted(tensors):
            found.update(key.encode())
            raw = tensors[key].detach().to("cpu").contiguous().flatten().view(torch.uint8)
            found.update(raw.numpy().data)
        digests = gather_objects(found.hexdigest())
        other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
        if other is not None:
            raise UserError(
                f"'{name}' was changed differently in the processes 0 and {other}: a plugin of this run draws "
                f"numbers or measures time in a way of its own; run it in one process"
            )

    def _layout_with(self, index: int) -> Layout:
        """Return how layer ``index`` is stored; what was written before it must be readable with it."""
        layout = layout_of(combine(self.progress.descriptions, self.progress.kv, self.format))
        if index:
            check_change(
                layout_of(combine(self.progress.descriptions[:-1], self.progress.kv, self.format)), layout
            )
        return layout

    # ------------------------------------------------------------ before the first layer and after the last

    @property
    def config(self) -> Any:
        return self.model.config

    def _streams(self) -> list[Stream]:
        streams = (self.calibration, self.dense_calibration, self.evaluation, self.dense_evaluation)
        return [stream for stream in streams if stream is not None]

    def _prepare(self) -> None:
        """Let transforms that need the whole model learn from it, or read what they learned before the cut."""
        for number, (plugin, transform) in enumerate(self.transforms):
            if transform.prepare is None:
                continue
            path = self.work / f"prepared-{number}.safetensors" if self.work is not None else None
            if path is not None and from_main(path.is_file()):
                self.prepared[plugin] = load_file(path)
                continue
            windows = self.texts.calibration
            if windows is None and transform.needs != "none":
                raise UserError(f"plugin '{plugin}' learns from calibration texts; set transform.calibration")
            whole = Whole(
                self.source.whole().to(self.device),
                self.tokenizer(),
                windows if windows is not None else torch.empty((0, 0), dtype=torch.long),
                self.batch_size,
                self.seed,
                self.console,
            )
            torch.manual_seed(self.seed)
            hook = f"weight_transforms ({transform.name})"
            found = dict(_guarded(plugin, hook, partial(transform.prepare, whole)))
            names = from_main(list(found))
            mine = found if self.main else dict.fromkeys(names)
            tensors = {key: from_rank(_plain(mine[key]), 0) for key in names}
            if path is not None and self.main:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(".part")
                save_file(tensors, aside)
                aside.replace(path)
            self.prepared[plugin] = tensors

    def _begin(self, done: int) -> None:
        """Embed all texts, or go on before layer ``done``; write embedding, final norm and head."""
        outer = self.outer
        outer.load(outer.before)
        for stream in (self.dense_calibration, self.dense_evaluation):
            if stream is not None:
                stream.start(self.model, done)
        begins = [(plugin, one.name, one.begin) for plugin, one in self.transforms if one.begin is not None]
        if begins:
            outer.load(outer.after)
            seen = Outer(self.model, self.console)
            for plugin, name, begin in begins:
                _guarded(plugin, f"weight_transforms ({name})", partial(begin, seen))
            self._store(0, seen.stored)
            self.progress.notes += [note for note in seen.notes if note not in self.progress.notes]
        for stream in (self.calibration, self.evaluation):
            if stream is not None:
                stream.start(self.model, done)
        if not begins:
            # What is written comes from the source then; two copies of an embedding would be the peak of a run.
            outer.drop()
        for number, names in ((0, outer.before), (len(self.layers) + 1, outer.after)):
            if self.writer is not None and from_main(bool(done) and self.writer.has(number)):
                continue
            tensors = outer.tensors(names, bool(begins))
            self._same_everywhere(names[0], tensors)
            self._write(number, tensors)
            if self.writer is None:
                self._kept |= tensors
        outer.drop()

    def _finish(self) -> Outcome:
        dense_nll: list[float] = []
        if self.dense_evaluation is not None:
            changed = self.config.get_text_config().tie_word_embeddings
            set_tied(self.config, self.source.config.get_text_config().tie_word_embeddings)
            self.outer.load(self.outer.for_logits())
            dense_nll = self._nll(self.dense_evaluation)
            self.outer.drop()
            set_tied(self.config, changed)
        stored = self._kept
        if self.writer is not None:
            stored = {**self.writer.read(0), **self.writer.read(len(self.layers) + 1)}
        self.outer.load(self.outer.for_logits(), stored)
        nll = self._nll(self.evaluation) if self.evaluation is not None else []
        calibration = []
        if self.score_calibration and self.calibration is not None:
            calibration = self._nll(self.calibration)
        self.outer.drop()
        return Outcome(
            self.progress.records,
            nll,
            dense_nll,
            math.fsum(calibration) / len(calibration) if calibration else None,
            self.progress.notes,
            self.config,
            combine(self.progress.descriptions, self.progress.kv, self.format),
        )

    def _nll(self, stream: Stream) -> list[float]:
        """Return the mean negative log-likelihood per predicted token of every window."""
        mine: dict[int, list[float]] = {}
        with self.console.bar(len(stream.own), f"score {stream.name}", "batch") as bar:
            for number in stream.own:
                hidden, ids = stream.now.get(number).to(self.device), stream.ids[number].to(self.device)
                # Window by window: logits are the largest tensors of all.
                mine[number] = [
                    torch.nn.functional.cross_entropy(
                        leave(self.model, row[None])[0, :-1].float(), window[1:]
                    ).item()
                    for row, window in zip(hidden, ids, strict=True)
                ]
                bar.update(1)
        found = {number: values for share in gather_objects(mine) for number, values in share.items()}
        return [value for number in range(len(stream)) for value in found[number]]

    # ------------------------------------------------------------ figures

    def _reference(self, block: Block, record: LayerRecord) -> torch.Tensor | None:
        """Measure a layer before it is changed; return its output for the first batch there is."""
        # A merge is no compression: how even the weights are says nothing about it.
        if any(one.merging is None for _, one in self.transforms):
            before = figures.weights_flatness(block.module)
            record.weights_flatness = (before, before)
        stream = self.calibration or self.evaluation
        if stream is None:
            return None
        hidden, kwargs = stream.anywhere(stream.now, 0), stream.arguments(0)
        with torch.no_grad(), figures.watching(block.module) as seen:
            output = block.run(self._restored(hidden), kwargs)
        inputs = figures.mean(seen.values())
        record.inputs_flatness = (inputs, inputs)
        return output

    def _compare(
        self, record: LayerRecord, block: Block, reference: torch.Tensor | None, inputs: float
    ) -> None:
        """Measure the layer after it was changed, when it has been run."""
        if record.weights_flatness is not None:
            record.weights_flatness = (record.weights_flatness[0], figures.weights_flatness(block.module))
        stream = self.calibration or self.evaluation
        if reference is None or stream is None or stream.following is None:
            return
        if record.inputs_flatness is not None:
            record.inputs_flatness = (record.inputs_flatness[0], inputs)
        output = self._restored(stream.anywhere(stream.following, 0))
        record.error = figures.relative_error(reference, output)

    def _restored(self, hidden: torch.Tensor) -> torch.Tensor:
        for _, transform in reversed(self.transforms):
            if transform.restore is not None:
                hidden = transform.restore(hidden)
        return hidden

    def _same_kv(self, block: Block) -> None:
        if block.index and block.kv != self.progress.kv:
            raise UserError(
                f"'{block.name}' rounds its keys and values otherwise than the layers before it; one KV scheme "
                f"serves all layers"
            )
        self.progress.kv = block.kv

    # ------------------------------------------------------------ progress

    def _commit(self) -> None:
        if self.work is None:
            return
        # All hidden states must be there before the progress says so, and stay until then.
        barrier()
        if self.main:
            self.progress.save(self.work)
            for stream in self._streams():
                stream.clean()

    def _resumed(self) -> int:
        """Return how many layers are done."""
        if self.work is None:
            return 0
        found = Progress.load(self.work)
        if found is None:
            if self.main and (self.work / "hidden").is_dir():
                shutil.rmtree(self.work / "hidden")
            barrier()
            return 0
        self.progress = found
        return found.layers


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.detach().to("cpu").contiguous() if tensor is not None else None


def _guarded(plugin: str, hook: str, call: Callable[[], Any]) -> Any:
    """Call a plugin; what it raises carries its name."""
    try:
        return call()
    except (UserError, PluginError):
        raise
    except Exception as error:
        raise PluginError(plugin, hook, error) from error
