"""Graftwork: research papers on language models as plugins of one trainer.

Importing this package costs pluggy and nothing more; torch and transformers come in with the
first job that needs them.
"""

from graftwork.errors import PluginError, UserError
from graftwork.hookspecs import (
    Adapter,
    AreaChart,
    Benchmark,
    Combiner,
    ForwardPass,
    GradientTransform,
    HeatMap,
    LineChart,
    LossTerm,
    Measurement,
    PairBatch,
    PairLoss,
    Sample,
    SelfPlay,
    TrainingAlgorithm,
    WeightTransform,
    hookimpl,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AreaChart",
    "Benchmark",
    "Combiner",
    "ForwardPass",
    "GradientTransform",
    "HeatMap",
    "LineChart",
    "LossTerm",
    "Measurement",
    "PairBatch",
    "PairLoss",
    "PluginError",
    "Sample",
    "SelfPlay",
    "TrainingAlgorithm",
    "UserError",
    "WeightTransform",
    "hookimpl",
]
