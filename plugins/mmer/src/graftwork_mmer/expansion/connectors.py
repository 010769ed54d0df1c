"""From an image or a waveform to 16 soft tokens."""

from __future__ import annotations

import torch
from torch import nn

from graftwork_mmer.expansion.data import SIDE, SLOT, Kind

PATCH = SIDE // 4


class GlyphConnector(nn.Module):
    """16 patches of 7 x 7 pixels, a hidden layer, soft tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(PATCH * PATCH, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return B x 16 x width of images, B x 28 x 28."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        return self.net(patches.flatten(3).flatten(1, 2))


class WaveConnector(nn.Module):
    """Filters over slots of 32 samples, their energy, soft tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 32, SLOT, SLOT)
        self.net = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """Return B x 16 x width of waveforms, B x 512."""
        return self.net(self.filters(waves.unsqueeze(1)).square().transpose(1, 2))


CONNECTORS: dict[Kind, type[GlyphConnector] | type[WaveConnector]] = {
    "glyph": GlyphConnector,
    "wave": WaveConnector,
}
