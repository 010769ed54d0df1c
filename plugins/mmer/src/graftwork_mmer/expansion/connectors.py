"""From an image or a waveform to four soft tokens."""

from __future__ import annotations

import torch
from torch import nn

from graftwork_mmer.expansion.data import SIDE, SLOT, SLOTS, Kind

PATCH = SIDE // 4
TOKENS = 4


class GlyphConnector(nn.Module):
    """16 patches of 7 x 7 pixels, a hidden layer over each, soft tokens of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(PATCH * PATCH, 32), nn.GELU(), nn.Flatten())
        self.tokens = nn.Sequential(
            nn.Linear(16 * 32, 2 * width), nn.GELU(), nn.Linear(2 * width, TOKENS * width)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return B x 4 x width of images, B x 28 x 28."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        return self.tokens(self.patches(patches.flatten(3).flatten(1, 2))).unflatten(1, (TOKENS, -1))


class WaveConnector(nn.Module):
    """Filters over slots of 32 samples, their energy, soft tokens of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 32, SLOT, SLOT)
        self.slots = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Flatten())
        self.tokens = nn.Sequential(
            nn.Linear(SLOTS * 32, 2 * width), nn.GELU(), nn.Linear(2 * width, TOKENS * width)
        )

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """Return B x 4 x width of waveforms, B x 512."""
        energy = self.filters(waves.unsqueeze(1)).square().transpose(1, 2)
        return self.tokens(self.slots(energy)).unflatten(1, (TOKENS, -1))


CONNECTORS: dict[Kind, type[GlyphConnector] | type[WaveConnector]] = {
    "glyph": GlyphConnector,
    "wave": WaveConnector,
}
