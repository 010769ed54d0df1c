"""Compress a model with llm-compressor, in its own environment; prints one line of JSON with time and memory.

    python quantize.py MODEL WINDOWS METHOD OUTPUT

MODEL is a folder, WINDOWS a safetensors file with ``input_ids`` (windows x tokens), METHOD one of those below. It is
called by the benchmark beside it and knows nothing of us.
"""

from __future__ import annotations

import json
import resource
import sys
import time

STARTED = time.perf_counter()

BATCH = 1


def recipe(method: str):
    """Return llm-compressor's own modifiers for a method, with the settings that the benchmark gives both sides."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    four = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    eight = {"scheme": "W8A8", "targets": "Linear", "ignore": ["lm_head"]}
    return {
        "rtn": lambda: [QuantizationModifier(**four)],
        "gptq": lambda: [GPTQModifier(**four, dampening_frac=0.01, block_size=128)],
        "smoothquant+gptq": lambda: [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**eight)],
        "awq": lambda: [AWQModifier(duo_scaling=True), QuantizationModifier(**four)],
    }[method]()


def main(model_folder: str, windows: str, method: str, output: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from loguru import logger
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logger.remove()
    logging.disable_progress_bar()
    rows = load_file(windows)["input_ids"].tolist()
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe(method),
        batch_size=BATCH,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        # Weights alone are rounded to nearest without looking at data.
        pipeline="datafree" if method == "rtn" else "sequential",
    )
    compressed = time.perf_counter() - began
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    found = {
        "compress_seconds": compressed,
        "seconds": time.perf_counter() - STARTED,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
