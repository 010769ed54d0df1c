"""The benchmarks that the plugin offers, by name."""

from __future__ import annotations

from graftwork import Benchmark

from graftwork_d3.fidelity import FIDELITY
from graftwork_d3.tune import TUNE

BENCHMARKS: dict[str, Benchmark] = {"fidelity": FIDELITY, "tune": TUNE}
