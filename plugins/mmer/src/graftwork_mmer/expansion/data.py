"""Generated questions about a number that is written, drawn or sounded.

A number from 1 to 8 is a digit of text, a 28 x 28 image of the digit, or a waveform of so many beeps. Questions are
"which number?" (``=``), "are they the same?" (``?``) and "is the first one larger?" (``>``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["text", "glyph", "wave"]
HIGHEST = 8
SIDE, CELL = 28, 3
SLOTS, SLOT = 16, 32
# Five rows of three cells for each digit.
_FONT = {
    1: "010110010010111",
    2: "111001111100111",
    3: "111001111001111",
    4: "101101111001001",
    5: "111100111001111",
    6: "111100111101111",
    7: "111001001001001",
    8: "111101111101111",
}


@dataclass(frozen=True)
class Question:
    """Numbers with the kinds that they are shown in, the sign that asks, the answer and what it may be."""

    numbers: tuple[int, ...]
    kinds: tuple[Kind, ...]
    sign: str
    answer: str

    @property
    def candidates(self) -> Sequence[str]:
        return [str(number) for number in range(1, HIGHEST + 1)] if self.sign == "=" else ["y", "n"]


def draw_question(kinds: Sequence[Kind], sign: str, draw: torch.Generator) -> Question:
    """Return a question of these kinds (one for ``=``, two for ``?`` and ``>``); half of all answers are yes."""
    first = _number(draw)
    if sign == "=":
        return Question((first,), tuple(kinds), sign, str(first))
    yes = bool(torch.rand((), generator=draw) < 0.5)
    second = first
    if sign == "?":
        while not yes and second == first:
            second = _number(draw)
    else:
        while second == first:
            second = _number(draw)
        if yes != (first > second):
            first, second = second, first
    return Question((first, second), tuple(kinds), sign, "y" if yes else "n")


def glyph(number: int, draw: torch.Generator) -> torch.Tensor:
    """Return a 28 x 28 image of a digit: moved by up to 3 pixels, of any strength, in noise."""
    cells = torch.tensor([float(cell) for cell in _FONT[number]]).view(5, 3)
    drawn = cells.repeat_interleave(CELL + 1, 0).repeat_interleave(CELL + 1, 1)
    image = 0.2 * torch.randn(SIDE, SIDE, generator=draw)
    down, right = torch.randint(0, 7, (2,), generator=draw).tolist()
    top, left = down + 1, right + 5
    strength = 0.7 + 0.6 * torch.rand((), generator=draw)
    image[top : top + drawn.shape[0], left : left + drawn.shape[1]] += strength * drawn
    return image


def wave(number: int, draw: torch.Generator) -> torch.Tensor:
    """Return a waveform of 512 samples: so many beeps of one pitch, in any of 16 slots, in noise."""
    slots = torch.randperm(SLOTS, generator=draw)[:number]
    pitch = 3 + 5 * torch.rand((), generator=draw)
    phase = 6.28 * torch.rand(SLOTS, 1, generator=draw)
    time = torch.arange(SLOT) / SLOT
    beeps = torch.sin(6.2832 * pitch * time + phase)
    sounding = torch.zeros(SLOTS, 1)
    sounding[slots] = 1
    return (beeps * sounding).flatten() + 0.1 * torch.randn(SLOTS * SLOT, generator=draw)


RENDER = {"glyph": glyph, "wave": wave}


def _number(draw: torch.Generator) -> int:
    return int(torch.randint(1, HIGHEST + 1, (), generator=draw))
