"""The adapted projection: the base layer, plus what a few of its neurons have learned.

    y = base(x);   y[..., rows] += x (D + Theta P)^T                                                            (4)

``rows`` are the neurons of all cores so far, D (rows x d, fp32) what earlier tasks left there, Theta (core x d) what
the task at hand trains, P = I - U U^T. The base weight is only read by the base layer, so it may be quantised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from graftwork import UserError
from graftwork_kernels.region_update import fold_rows, region_update_
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork_parsp.config import ParspConfig
from graftwork_parsp.neurons import sizes
from graftwork_parsp.nullspace import Basis
from graftwork_parsp.regions import core_size

_TRAINED = ("parsp_theta", "parsp_theta_A", "parsp_theta_B")
_KEPT = ("parsp_core", "parsp_basis", "parsp_complement", "parsp_rows", "parsp_delta")
_EXACT = ("parsp_basis", "parsp_delta")


class RowDelta(nn.Module, BaseTunerLayer):
    """Changes rows of the base weight: the neurons of an input projection (m x d).

    Per adapter name: ``parsp_theta`` (core x d), or with form "lora" ``parsp_theta_A`` (r x d) and
    ``parsp_theta_B`` (core x r); ``parsp_core`` (indices), ``parsp_basis`` and ``parsp_complement`` (P), ``parsp_rows``
    (indices, a superset of the core, ascending) and ``parsp_delta`` (rows x d). Shapes change with every task; a
    state that is loaded brings its own.

    A fresh adapter has a core of evenly spaced neurons and P = I until :meth:`begin` says better.
    """

    adapter_layer_names = _TRAINED
    other_param_names = (*_KEPT, "configs")

    def __init__(self, base_layer: nn.Module, name: str, config: ParspConfig, key: str = "") -> None:
        super().__init__()
        self.key = key
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.base_layer = base_layer
        self.in_features, self.out_features = sizes(base_layer)
        self.configs: dict[str, ParspConfig] = {}
        for store in _TRAINED:
            setattr(self, store, nn.ParameterDict({}))
        for store in _KEPT:
            setattr(self, store, BufferDict({}, persistent=True))
        # What merging overwrote: adapter, rows, their bytes.
        self._replaced: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.register_load_state_dict_pre_hook(_take_shapes)
        self._active_adapter = name
        self.add(name, config)

    @property
    def neurons(self) -> int:
        """Return m, how many neurons the layer has."""
        return self.out_features

    @property
    def width(self) -> int:
        """Return d, how many numbers a neuron's change has here."""
        return self.in_features

    def _basis_width(self, core: torch.Tensor) -> int:
        return self.width

    def add(self, name: str, config: ParspConfig) -> None:
        """Make adapter ``name``, which changes nothing yet."""
        size = core_size(config.density, self.neurons)
        if size == 0:
            raise ValueError(
                f"PaRSP: density {config.density:g} of {self.neurons} neurons is none; raise it to at least "
                f"{1 / self.neurons:.2g}"
            )
        self.configs[name] = config
        device = self.get_base_layer().weight.device
        # A saved adapter tells its sizes; what is in them comes with its state.
        saved = config.sizes.get(self.key)
        rows, core, columns = saved or (0, size, 0)
        self.parsp_rows[name] = torch.zeros(0, dtype=torch.int32, device=device)
        self.parsp_delta[name] = torch.zeros(0, self.width, device=device)
        spread = torch.arange(core) if saved else torch.arange(core) * self.neurons // core
        basis = Basis(torch.zeros(self._basis_width(spread), columns), columns)
        self.begin(name, spread, basis, torch.Generator().manual_seed(0))
        if saved:
            self.parsp_rows[name] = torch.arange(rows, dtype=torch.int32, device=device)
            self.parsp_delta[name] = torch.zeros(rows, self.width, device=device)
            self._note_sizes(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # ------------------------------------------------------------------ a task

    def begin(self, name: str, core: torch.Tensor, basis: Basis | None, generator: torch.Generator) -> None:
        """Start a region at Theta = 0: neurons ``core`` (n), outside of ``basis`` (nothing where None).

        ``generator`` draws the factor A of form "lora".
        """
        config, device = self.configs[name], self.parsp_delta[name].device
        basis = basis or Basis.empty(self._basis_width(core))
        core, old, learned = (
            core.to(device, torch.int32).sort().values,
            self.parsp_rows[name],
            self.parsp_delta[name],
        )
        if len(old):
            # Neurons of a core that learned nothing are forgotten.
            changed = learned.any(1)
            old, learned = old[changed], learned[changed]
        rows = torch.cat([old, core]).unique() if len(old) else core.clone()
        delta = learned.new_zeros(len(rows), self.width)
        if len(old):
            delta[torch.searchsorted(rows, old)] = learned
        self.parsp_rows[name], self.parsp_delta[name], self.parsp_core[name] = rows, delta, core
        self.parsp_basis[name] = basis.matrix.to(device, delta.dtype)
        self.parsp_complement[name] = torch.tensor(basis.complement, device=device)
        if config.form == "lora":
            rank = config.rank if len(core) else 0
            a = torch.empty(rank, self.width)
            if rank and not a.is_meta:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self._train("parsp_theta_A", name, a.to(device, delta.dtype), len(core))
            self._train("parsp_theta_B", name, delta.new_zeros(len(core), rank), len(core))
        else:
            self._train("parsp_theta", name, delta.new_zeros(len(core), self.width), len(core))
        self._note_sizes(name)

    def _note_sizes(self, name: str) -> None:
        sizes = [len(self.parsp_rows[name]), len(self.parsp_core[name]), self.parsp_basis[name].shape[1]]
        self.configs[name].sizes[self.key] = sizes

    def _train(self, store: str, name: str, value: torch.Tensor, size: int) -> None:
        # A tensor without elements has nothing to train, and some optimizers and wrappers stumble over it.
        trains = size > 0 and name in self.active_adapters
        getattr(self, store)[name] = nn.Parameter(value, requires_grad=trains)

    @torch.no_grad()
    def fold(self, name: str) -> None:
        """End the task: D += Theta P in fp32; Theta, core and basis become empty."""
        self.parsp_delta[name] = self.total(name).detach().clone()
        nothing = self.parsp_core[name][:0]
        self.begin(name, nothing, None, torch.Generator().manual_seed(0))

    def theta(self, name: str) -> torch.Tensor:
        """Return Theta (core x d), at least in fp32."""
        if self.configs[name].form == "lora":
            return _wide(self.parsp_theta_B[name]) @ _wide(self.parsp_theta_A[name])
        return _wide(self.parsp_theta[name])

    def projected(self, name: str) -> torch.Tensor:
        """Return Theta P (core x d), formed in the adapter's own precision also under autocast."""
        with torch.autocast(self.parsp_delta[name].device.type, enabled=False):
            theta = self.theta(name)
            if not self.parsp_basis[name].numel() and not self.parsp_complement[name]:
                return theta
            return self._project(theta, self.parsp_basis[name], bool(self.parsp_complement[name]))

    def _project(self, theta: torch.Tensor, basis: torch.Tensor, complement: bool) -> torch.Tensor:
        return fold_rows(theta, basis, complement)

    def total(self, name: str) -> torch.Tensor:
        """Return D + Theta P (rows x d)."""
        delta, core = self.parsp_delta[name], self.parsp_core[name]
        if not len(core):
            return delta
        places = torch.searchsorted(self.parsp_rows[name], core)
        return delta.index_add(0, places, self.projected(name).to(delta.dtype))

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """Return the change of the whole weight, in the base weight's own orientation."""
        total = self.total(name)
        dense = total.new_zeros(self.neurons, self.width)
        dense = dense.index_copy(0, self.parsp_rows[name].long(), total)
        return dense.T if self._transposed else dense

    @property
    def _transposed(self) -> bool:
        """Return whether a neuron is a column of the base weight's memory."""
        return isinstance(self.get_base_layer(), Conv1D)

    # ------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.configs and len(self.parsp_rows[name]):
                y = self._add_change(y, x, self.total(name), self.parsp_rows[name])
        return y

    def _add_change(
        self, y: torch.Tensor, x: torch.Tensor, total: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        # In place: a linear layer needs its output for nothing, and the rest of it is many times larger.
        return region_update_(y if self._plain else y.clone(), x, total, rows)

    @property
    def _plain(self) -> bool:
        """Whether the base layer is one whose output is surely nobody else's."""
        return type(self.base_layer) in (nn.Linear, Conv1D)

    # ------------------------------------------------------------------ merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of the named (or active) adapters to the base weight: one sum in fp32, one rounding.

        Raises:
            UserError: the base weight is quantised.
            ValueError: with ``safe_merge``, where a merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.configs:
                continue
            weight = self._by_neuron()
            rows = self.parsp_rows[name].long().to(weight.device)
            before = weight[rows].clone()
            total = self.total(name).detach().to(weight.device)
            after = (before.to(total.dtype) + total).to(weight.dtype)
            if safe_merge and not torch.isfinite(after).all():
                raise ValueError(f"merging adapter '{name}' gives weights that are not numbers")
            weight[rows] = after
            self._replaced.append((name, rows, before))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the bytes back that merging replaced."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            _, rows, before = self._replaced.pop()
            weight = self._by_neuron()
            weight[rows.to(weight.device)] = before.to(weight.device)

    def _by_neuron(self) -> torch.Tensor:
        """Return the base weight's own memory with one neuron per row (m x d)."""
        layer = self.get_base_layer()
        if not isinstance(layer, (nn.Linear, Conv1D)) or not layer.weight.is_floating_point():
            raise UserError(
                f"PaRSP: a change cannot be merged into the quantised weight of a {type(layer).__name__}; keep the "
                f"adapter beside it, or merge into the unquantised model"
            )
        return layer.weight.data.T if self._transposed else layer.weight.data

    # ------------------------------------------------------------------ precision and devices

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Casting a model to a half precision must not round D and U: what is protected would leak.
        before = {(store, name): value for store in _EXACT for name, value in getattr(self, store).items()}
        super()._apply(fn, recurse)
        for (store, name), value in before.items():
            now = getattr(self, store)[name]
            if now.dtype in (torch.float16, torch.bfloat16):
                getattr(self, store)[name] = value.to(now.device)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT also casts to the base layer's dtype; ours stay in fp32.
        target = device if device is not None else self.get_base_layer().weight.device
        if target.type == "meta":
            return
        for store in (*_TRAINED, *_KEPT):
            values = getattr(self, store)
            if adapter_name in values and values[adapter_name].device.type != "meta":
                values[adapter_name] = values[adapter_name].to(target)


class ColumnDelta(RowDelta):
    """Changes columns of the base weight: the neurons of an output projection (d x m).

    What is stored per neuron is its column, so shapes are those of :class:`RowDelta`. The null space is that of
    the core's own activations, and P (core x core) acts on the neurons: (W_eff - W)[:, C] = Theta^T P.
    """

    @property
    def neurons(self) -> int:
        return self.in_features

    @property
    def width(self) -> int:
        return self.out_features

    def _basis_width(self, core: torch.Tensor) -> int:
        return len(core)

    def _project(self, theta: torch.Tensor, basis: torch.Tensor, complement: bool) -> torch.Tensor:
        return fold_rows(theta.T, basis, complement).T

    @property
    def _transposed(self) -> bool:
        return not super()._transposed

    def _add_change(
        self, y: torch.Tensor, x: torch.Tensor, total: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        change = (x.index_select(-1, rows).to(total.dtype) @ total).to(y.dtype)
        return y.add_(change) if self._plain else y + change


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _take_shapes(layer: Any, state: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Before a state is loaded: give every tensor the shape of the one that replaces it."""
    for store in (*_TRAINED, *_KEPT):
        values = getattr(layer, store)
        for name in list(values.keys()):
            new = state.get(f"{prefix}{store}.{name}")
            if new is None or new.shape == values[name].shape:
                continue
            if store in _TRAINED:
                # The same parameter: an optimizer may hold it.
                values[name].data = values[name].data.new_zeros(new.shape)
            else:
                values[name] = values[name].new_zeros(new.shape)
    for name in layer.configs:
        layer._note_sizes(name)
