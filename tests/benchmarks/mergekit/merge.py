"""Merge checkpoints by TIES with mergekit, in its own environment; prints one line of JSON with the time.

    python merge.py BASE DENSITY OUTPUT EXPERT [EXPERT ...]

It is called by the benchmark beside it and knows nothing of us.
"""

from __future__ import annotations

import json
import sys
import time


def main(base: str, density: str, output: str, *experts: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "ties",
            "base_model": base,
            "dtype": "float32",
            "models": [
                {"model": expert, "parameters": {"weight": 1.0, "density": float(density)}}
                for expert in experts
            ],
        }
    )
    began = time.perf_counter()
    run_merge(config, output, MergeOptions(copy_tokenizer=True, write_model_card=False, quiet=True))
    print(json.dumps({"merge_seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
