"""The hooks of changing weights and of measuring."""

from __future__ import annotations

from graftwork import Benchmark, HeatMap, LineChart, Measurement, WeightTransform, hookimpl
from pydantic import BaseModel, ConfigDict, Field

from graftwork_frozen import saw


class Options(BaseModel):
    """Options of frozen-weights."""

    model_config = ConfigDict(extra="forbid")

    factor: float = Field(2.0, gt=0, description="of the weights of every down projection")


class SizeOptions(BaseModel):
    """Options of the benchmark."""

    model_config = ConfigDict(extra="forbid")

    items: int = Field(3, ge=1, description="how many items it makes")


class Weights:
    """Multiplies weights, and measures them."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def weight_transforms(self, run):
        saw("weight_transforms")
        return [
            WeightTransform(
                "frozen",
                self.transform,
                needs="activations",
                prepare=lambda whole: saw("prepare") or {},
                begin=lambda outer: saw("begin"),
                figures={"energy": "largest energy of an input"},
            )
        ]

    def transform(self, block):
        name = "mlp.down_proj"
        block.get(name).weight.data.mul_(self.options.factor)
        block.record(name, energy=float(block.energy(name)[name].max()))
        saw("transform", block.index)

    @hookimpl
    def benchmarks(self, run):
        saw("benchmarks")
        size = Benchmark(
            summary="size of the first down projection",
            metrics={"size": "mean absolute weight", "items": "how many"},
            measure=measure,
            options=SizeOptions,
        )
        return {"size": size}


def measure(evaluation):
    """Return the size of the weights as every item."""
    count = evaluation.options.items
    weight = evaluation.model.model.layers[0].mlp.down_proj.weight
    saw("measure", count)
    return Measurement(
        items={"size": [float(weight.abs().mean())] * count},
        values={"items": float(count)},
        charts=[
            LineChart("Frozen line", "A line.", "x", "y", {"line": [(0.0, 0.0), (1.0, 1.0)]}),
            HeatMap("Frozen map", "A cell.", "x", "y", ["a"], {"row": [1.0]}),
        ],
        rows=[{"item": number} for number in range(count)],
        files={"frozen.json": {"count": count}},
        notes=["frozen measured"],
    )
