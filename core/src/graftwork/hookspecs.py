"""Every hook of Graftwork on one page: what a plugin gets, what it may return, how results combine.

A plugin is a class; the core constructs it with its validated options and registers the object::

    from graftwork import LossTerm, hookimpl

    class Plugin:
        Options = MyOptions                    # a pydantic model: defaults, bounds, help

        def __init__(self, options): ...

        @hookimpl
        def loss_terms(self, run, model):
            return [LossTerm("penalty", lambda model, batch: ...)]

It is found through an entry point in the group ``graftwork.plugins`` and imported only when it is
named with ``--plugin``. A hook is optional; the ones that a plugin does not implement cost nothing.

Several processes that each hold the whole model (DDP) need nothing of a plugin but losses that are means over all of
them. What divides the model among processes needs its word: a class attribute
``sharding = frozenset({"zero2", "zero3", "fsdp2"})`` names what it trains equally under, and a run with anything else
is refused (see :mod:`graftwork.train.sharding`).

Order of the calls in a training run::

    check -> self_play -> task_stream -> [weights are loaded] -> adapter_config -> check_adapter ->
    load_state (when resuming) ->
    per task:  training_data -> task_begin -> loss_terms, transform_gradients, learning_rate_factors
               -> load_state (when resuming inside the task)
               -> (batch_begin, training)* -> task_end -> evaluation -> save_state
    -> charts

and in a transform::

    check -> weight_transforms -> prepare -> begin -> per layer: block of every transform
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftConfig
    from pydantic import BaseModel
    from transformers import LogitsProcessor, PreTrainedModel, Trainer, TrainingArguments

    from graftwork.data.layouts import Layout
    from graftwork.data.tasks import Task
    from graftwork.evaluate.benchmarks import Evaluation
    from graftwork.log_probs import TokenLogProbs
    from graftwork.merge.transform import Merging
    from graftwork.run import Run
    from graftwork.self_play.options import SelfPlayOptions
    from graftwork.transform.block import Block
    from graftwork.transform.outer import Outer
    from graftwork.transform.whole import Whole

HOOKS_VERSION = "1.0"
"""Of this page: the hooks, their arguments, and the classes that they return.

A minor step may add hooks, arguments, fields with defaults, and deprecations. Whatever would break a plugin is a major
step: what goes, what is called otherwise, what means something else. It is deprecated for a minor step first.
"""

PROJECT = "graftwork"
ENTRY_POINT_GROUP = "graftwork.plugins"
EXCLUSIVE = {
    "adapter_config": "a whole-model adapter",
    "training_algorithm": "a training algorithm",
    "self_play": "a way of self-play",
    "combiner": "a combiner of two prompts",
}
"""Hooks of which a run has only one, and what they bring."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookDeprecation(DeprecationWarning):
    """Why a hook or an argument goes and what to use instead, in half a sentence.

    For pluggy's ``hookspec(warn_on_impl=...)`` and ``hookspec(warn_on_impl_args={argument: ...})``. Whoever uses a
    plugin that has it is told so with the names of the plugin and its package, and the run goes on.
    """


@dataclass(frozen=True)
class LossTerm:
    """One term that is added to the trainer's own loss and logged as ``loss/<name>``.

    ``fn(model, batch)`` returns a scalar tensor. ``per`` says how often it is evaluated:

    - ``"batch"``: on every micro-batch; the optimizer sees the mean over the accumulated ones.
    - ``"step"``: once per optimizer step, for penalties that depend on parameters only.

    Either way the gradient that reaches the optimizer is that of ``weight * term``, whatever the
    number of accumulation steps or processes. Over processes it is the mean of what they return, so a term that
    is a mean over tokens, of which each has another number, is made with
    :func:`graftwork.distributed.mean_over_ranks`.
    """

    name: str
    fn: Callable[[torch.nn.Module, Mapping[str, Any]], torch.Tensor]
    weight: float = 1.0
    per: Literal["batch", "step"] = "batch"


@dataclass(frozen=True)
class GradientTransform:
    """Constraints that no parametrisation can express.

    ``before_step(model)`` edits ``.grad`` in place after the last micro-batch's gradients were
    accumulated and reduced over processes, and before clipping. ``after_step(model)`` runs after
    the optimizer has moved the parameters.
    """

    name: str
    before_step: Callable[[torch.nn.Module], None] | None = None
    after_step: Callable[[torch.nn.Module], None] | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT configuration and what a stream of tasks does with it.

    ``policy``:

    - ``"shared"``: one adapter is trained through all tasks.
    - ``"stacked"``: every task adds a fresh adapter; the earlier ones stay active and frozen.
    - ``"separate"``: every task trains its own adapter on the untouched base model.
    """

    config: PeftConfig
    policy: Literal["shared", "stacked", "separate"] = "shared"


@dataclass(frozen=True)
class TrainingAlgorithm:
    """A TRL or transformers trainer class and the config class whose fields ``train:`` takes."""

    trainer: type[Trainer]
    config: type[TrainingArguments]


@dataclass(frozen=True)
class PairBatch:
    """What a loss on pairs of answers sees of a batch of B pairs.

    Attributes:
        chosen: B, log-probability of the target answer under the model being trained: the float32 sum over the
            answer's tokens, with gradient.
        rejected: B, the same of the answer that a player wrote; empty where nothing is written.
        reference_chosen: B x J, the same under the J players of this iteration, the newest first; constants.
        reference_rejected: B x J.
        chosen_tokens, rejected_tokens: B, how many tokens were summed.
        iteration: from 1.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    iteration: int = 1


@dataclass(frozen=True)
class PairLoss:
    """The loss of every pair (``rows``, B), of which the trainer takes the mean, and what is to be logged.

    ``metrics``: a value per pair (B) or one for the batch; their means are logged. Names are ``group/line``:
    the report draws a chart per group.
    """

    rows: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """An answer that a player wrote to the prompt of training item ``item``.

    ``tokens`` are its new tokens, the end token included where it ``ended`` by itself. ``target`` is the
    item's own answer. ``score`` is what :attr:`SelfPlay.score` gave it.
    """

    item: int
    prompt: Any
    target: str
    text: str
    tokens: Sequence[int]
    ended: bool
    score: float | None = None


@dataclass(frozen=True)
class SelfPlay:
    """A method that learns in iterations from what the model itself writes.

    In every iteration the newest checkpoint writes ``samples`` answers to each prompt (none where 0: the
    targets alone are learned), the answers are scored and paired, the last ``players`` checkpoints give the
    log-probabilities of each pair, and the model is trained on the pairs of the last ``rounds`` checkpoints.

    Attributes:
        options: the part of the plugin's options that the core carries out.
        loss: of a batch of pairs.
        score: answers to numbers, such as a reward; called with all answers to some prompts.
        choose: from the target's tokens and the samples of one prompt to pairs (chosen, rejected) of tokens;
            where None, the target is paired with every sample.
        inspect: from the players' log-probabilities of the chosen and the rejected answers (N x J each) to
            sentences for the user; called once before each iteration's training.
        token_log_probs: of tokens from hidden states and the head's weight, in training and scoring, such as
            ``graftwork_kernels.selected_log_probs``; where None, TRL's head or the logits.
    """

    options: SelfPlayOptions
    loss: Callable[[PairBatch], PairLoss]
    players: int = 1
    rounds: int = 1
    samples: int = 1
    score: Callable[[Sequence[Sample]], Sequence[float]] | None = None
    choose: (
        Callable[[Sequence[int], Sequence[Sample]], Sequence[tuple[Sequence[int], Sequence[int]]]] | None
    ) = None
    inspect: Callable[[torch.Tensor, torch.Tensor], Sequence[str]] | None = None
    token_log_probs: TokenLogProbs | None = None


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of a decode loop that is about to run.

    ``step`` is 0 for the prompt and counts the tokens that were generated before. ``predicts`` is whether a
    token is chosen from its last position (a prompt read in chunks predicts with the last one only).
    ``main_rows`` and ``contrast_rows`` are the rows of the batch that read the main and the contrast prompt;
    without a combiner all are main rows.
    """

    step: int
    prefill: bool
    predicts: bool
    main_rows: slice
    contrast_rows: slice


@dataclass(frozen=True)
class Combiner:
    """Choose tokens from two streams, such as a prompt with and without its context.

    ``fn(main, contrast)`` takes the raw float32 logits of both (B x V) and returns scores B x V, without
    changing either; rows do not know of each other. Scores are on the scale of ``main``: a combiner at its
    neutral setting returns ``main`` itself, so that processors that follow see what they would see without it.
    What is -inf in ``main`` stays -inf.

    ``amateur``: a smaller model of the same vocabulary whose logits are the contrast; it reads the main
    prompt. ``explain(main, contrast)`` names sets of tokens (name: bool B x V) for the trace.
    """

    name: str
    fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    amateur: PreTrainedModel | None = None
    explain: Callable[[torch.Tensor, torch.Tensor], Mapping[str, torch.Tensor]] | None = None


@dataclass(frozen=True)
class AreaChart:
    """What a method has used up, for the report: stacked areas over the layers, one band per task.

    ``parts[task][layer]`` is what that task added to ``layer``, as a share (0 to 1) of what the layer has;
    the bands of one layer sum to at most 1 and the rest is ``rest``, what is still free.
    """

    title: str
    caption: str
    layers: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    rest: str = "free"


@dataclass(frozen=True)
class LineChart:
    """Lines for the report: ``series`` maps a name to its points ``(x, y)``."""

    title: str
    caption: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class HeatMap:
    """A number per row and column for the report: ``rows`` maps a row's name to a value per column.

    ``x`` names the columns' axis, ``y`` says what the numbers are. None leaves a cell empty.
    """

    title: str
    caption: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Measurement:
    """What a benchmark found out about one model with the plugins of its run.

    Attributes:
        items: a metric's value for every item, in an order that depends on the data alone, so that two arms
            are compared item by item; None where an item does not count. The metric is the mean.
        values: metrics that are not means over items.
        charts: for the report.
        rows: one record per item (question, answer, ...), written to ``items.jsonl``.
        files: further JSON files by name, written beside it, such as a setting that was chosen.
        notes: sentences for the reader.
    """

    items: Mapping[str, Sequence[float | None]]
    values: Mapping[str, float | None] = field(default_factory=dict)
    charts: Sequence[LineChart | HeatMap] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """A measurement of a model, reached as ``trainer evaluate --benchmark`` and as ``benchmark:`` in recipes.

    ``metrics`` says in a few words what each metric is (name: words with the unit); every name in the
    measurement must be there. ``options``: a pydantic model for the keys beside ``name``.
    """

    summary: str
    metrics: Mapping[str, str]
    measure: Callable[[Evaluation], Measurement]
    options: type[BaseModel] | None = None


@dataclass(frozen=True)
class WeightTransform:
    """A change of a model's weights, made one decoder layer at a time by ``trainer transform``.

    The transforms of all plugins see a layer one after another, in ``--plugin`` order; then the next layer
    gets the activations that the changed one lets through.

    Attributes:
        name: for messages and the report.
        block: changes one layer (``block.module``) in place.
        needs: how much of the model must be alive. ``"none"``: the weights of one layer; ``"activations"``: also
            what calibration texts give that layer as inputs; ``"end_to_end"``: the whole model, for ``prepare``.
        dense: whether the layer's inputs and outputs in the unchanged model are kept, too.
        stored: whether it works on the weights as they are stored, so that no other may come before it.
        factors: whether it puts factors in the place of linears; a weight is factored once.
        scales: whether it scales what goes into ``o`` or ``down``, which a rotation before it would forbid.
        rotates: whether it turns what goes into the layers' linears into other bases, as only one may.
        rounds: whether it leaves rounded weights, which no other can change: it comes last.
        begin: changes embedding, final norm and head, before the first layer.
        prepare: called once with the whole model; what it returns is kept and is ``block.prepared`` later. Where
            ``needs`` is ``"none"`` it may be called without calibration texts.
        restore: from hidden states between layers to those of the unchanged model, where ``begin`` moved the
            residual stream into another basis.
        figures: what ``block.record`` is given, in words; the means become metrics of these names.
        merging: the merge that this is, where it combines the models of ``transform.experts``; such a transform is
            made by :func:`graftwork.merge.transform.merge_transform` and comes first.
        about: what is said in ``beside/manifest.json`` of what was stored beside the model; called at the end.
    """

    name: str
    block: Callable[[Block], None]
    needs: Literal["none", "activations", "end_to_end"] = "activations"
    dense: bool = False
    stored: bool = False
    factors: bool = False
    scales: bool = False
    rotates: bool = False
    rounds: bool = False
    begin: Callable[[Outer], None] | None = None
    prepare: Callable[[Whole], Mapping[str, torch.Tensor]] | None = None
    restore: Callable[[torch.Tensor], torch.Tensor] | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    merging: Merging | None = None
    about: Callable[[], Mapping[str, Any]] | None = None


class GraftworkHooks:
    """The hook specifications. ``run`` is a :class:`graftwork.run.Run` everywhere."""

    # ---------------------------------------------------------------- before anything is loaded

    @hookspec
    def check(self, run: Run) -> None:
        """Refuse a run that cannot work, by raising :class:`graftwork.UserError`.

        Called before data and weights are read. ``run.job`` is fully resolved.
        """

    # ---------------------------------------------------------------- adapter injection: exactly one

    @hookspec
    def adapter_config(self, run: Run, model: PreTrainedModel) -> PeftConfig | Adapter | None:
        """Return the adapter to inject. Two plugins that both return one are refused.

        ``model`` may live on the meta device (dry run): read shapes, not values.
        """

    @hookspec
    def check_adapter(self, run: Run, adapter: Adapter | None) -> None:
        """Refuse the adapter that this run has, whoever brings it, by raising :class:`graftwork.UserError`.

        None: full weights. Called once it is chosen, before weights are read.
        """

    # ---------------------------------------------------------------- training

    @hookspec
    def training_algorithm(self, run: Run) -> TrainingAlgorithm | None:
        """Return the trainer to use instead of the recipe's ``algorithm``. One plugin at most."""

    @hookspec
    def self_play(self, run: Run) -> SelfPlay | None:
        """Return a way to learn in iterations from what the model itself writes. One plugin at most.

        It brings its own loss on pairs and thereby the trainer; a training algorithm beside it is refused.
        """

    @hookspec
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm] | None:
        """Return terms to add to the loss. Terms of all plugins are summed. Called once per task."""

    @hookspec
    def transform_gradients(self, run: Run, model: torch.nn.Module) -> Sequence[GradientTransform] | None:
        """Return gradient transforms, applied in ``--plugin`` order. Called once per task."""

    @hookspec
    def learning_rate_factors(self, run: Run, model: torch.nn.Module) -> Mapping[str, float] | None:
        """Return ``{parameter name: factor}`` for parameters that learn faster or slower.

        Factors of several plugins multiply. Called once per task.
        """

    @hookspec
    def batch_begin(self, run: Run, model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
        """See every training micro-batch, on its device, just before its forward pass."""

    # ---------------------------------------------------------------- task stream

    @hookspec
    def task_stream(self, run: Run, tasks: Sequence[Task]) -> Sequence[Task] | None:
        """Return the stream to train on instead of ``tasks``, or None; same number, names and test items.

        Called once, after the data was read; applied in ``--plugin`` order. This is where a method sees
        all tasks at once, as no method that learns them one after another may.
        """

    @hookspec
    def training_data(self, run: Run, task: Task, dataset: Dataset) -> Dataset | None:
        """Return another data set to train ``task`` on (columns as given), or None.

        Called before the data is tokenised; applied in ``--plugin`` order.
        """

    @hookspec
    def task_begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        """Prepare for a task: the optimizer does not exist yet, so parameters may be added or frozen."""

    @hookspec
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        """Collect statistics, freeze; called once after a task's last step and before its evaluation."""

    @hookspec
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor] | None:
        """Return what the plugin must remember besides model parameters, as tensors.

        Written as safetensors into every checkpoint, under the plugin's own name.
        """

    @hookspec
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what :meth:`save_state` returned. Every plugin gets only its own state."""

    @hookspec
    def charts(self, run: Run) -> Sequence[AreaChart] | None:
        """Return what the report shows of the method itself. Called once, after the last task."""

    # ---------------------------------------------------------------- generation

    @hookspec
    def logits_processors(self, run: Run, model: PreTrainedModel) -> Sequence[LogitsProcessor] | None:
        """Return logits processors, passed to ``generate`` in ``--plugin`` order."""

    @hookspec
    def generation_context(self, run: Run, model: PreTrainedModel) -> AbstractContextManager[Any] | None:
        """Return a context manager that is entered around every ``generate`` call."""

    @hookspec
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner | None:
        """Return how the logits of a main and a contrast prompt become scores. One plugin at most.

        A plugin that has this hook always returns one: two that have it are refused before weights are read.
        Prompts then come in pairs (a context apart from its question), and both are decoded in one loop.
        """

    @hookspec
    def before_forward(self, run: Run, coming: ForwardPass) -> None:
        """Prepare for a forward pass while text is generated; called before each, in ``--plugin`` order."""

    @hookspec
    def generation_notes(self, run: Run) -> Sequence[str] | None:
        """Return what the method did while text was generated, in sentences for the user.

        Called once, after the last text; shown by ``trainer generate`` and kept with a benchmark's result.
        """

    # ---------------------------------------------------------------- evaluation

    @hookspec
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark] | None:
        """Return ``{name: benchmark}``; a user names one as ``<plugin>:<name>``.

        The plugin need not take part in the run: its benchmarks then measure the model without it.
        """

    # ---------------------------------------------------------------- changing weights

    @hookspec
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform] | None:
        """Return changes of a model's weights. Those of all plugins are made layer by layer, in order."""

    # ---------------------------------------------------------------- data

    @hookspec
    def data_sources(self, run: Run) -> Mapping[str, Layout] | None:
        """Return ``{name: layout}``; a recipe then names data as ``<name>:<path>``.

        A layout takes the path, which need not exist, and returns ``{task name: reader}``; a reader takes
        nothing and returns a :class:`graftwork.data.layouts.RawTask`. A name that is in use already is refused.
        """
