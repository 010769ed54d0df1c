"""Write fine-tunes of a model, made by adding noise to every weight.

python fine_tunes.py MODEL FOLDER COUNT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from graftwork.models import load_model, load_tokenizer


def main(ref: str, folder: str, count: str) -> None:
    for number in range(int(count)):
        model = load_model(ref)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.002 * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(Path(folder) / f"e{number}")
        load_tokenizer(ref).save_pretrained(Path(folder) / f"e{number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
