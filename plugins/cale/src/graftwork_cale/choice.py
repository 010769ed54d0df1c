"""From options to enhanced layers of a model."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

from graftwork import ForwardPass, UserError

from graftwork_cale.config import read_config
from graftwork_cale.enhance import LayerEnhancement
from graftwork_cale.layers import layers_of
from graftwork_cale.options import CaleOptions


class Enhanced:
    """One enhancement, or one per layer, entered and told together."""

    def __init__(self, parts: list[LayerEnhancement]) -> None:
        self.parts = parts
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Enhanced:
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._stack.close()

    def before_forward(self, coming: ForwardPass) -> None:
        """Tell every part about the next pass."""
        for part in self.parts:
            part.before_forward(coming)


def resolve(options: CaleOptions, model: Any) -> Enhanced:
    """Return the enhancement that ``options`` describe for ``model``; none where the config says ``off``.

    Raises:
        UserError: a config of another model, a strength without a layer, a layer that the model lacks.
    """
    layer, strength, variant, positions = options.layer, options.strength, options.variant, options.positions
    if options.config is not None:
        chosen = read_config(options.config)
        chosen.check_model(model, options.config)
        layer = chosen.layer if layer is None else layer
        strength = chosen.strength if strength is None else strength
        variant, positions = variant or chosen.variant, positions or chosen.positions
        if layer is None:
            if strength != 1:
                raise UserError(
                    f"'{options.config}' chose no layer (it says off), so strength {strength:g} needs one; set "
                    f"plugins.cale.layer"
                )
            return Enhanced([])
    assert layer is not None
    assert strength is not None
    numbers = range(1, len(layers_of(model))) if layer == "every" else [layer]
    return Enhanced(
        [
            LayerEnhancement(
                model,
                number,
                strength,
                variant or "amplify",
                positions or "predicting",
                streams=options.streams,
                # Where core does not tell, it scores answers on top of a cache; prompts are read at once.
                continued="answer",
            )
            for number in numbers
        ]
    )
