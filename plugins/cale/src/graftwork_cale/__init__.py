"""CaLE: find the layer that says most about the context, and strengthen it inside the forward pass."""

from graftwork_cale.choose import NEUTRAL, Setting, best, by_divergence, candidates
from graftwork_cale.config import CaleConfig, read_config
from graftwork_cale.enhance import LayerEnhancement
from graftwork_cale.fold import fold
from graftwork_cale.measure import Item, Profile, encode_item, measure
from graftwork_cale.search import score_settings

__all__ = [
    "NEUTRAL",
    "CaleConfig",
    "Item",
    "LayerEnhancement",
    "Profile",
    "Setting",
    "best",
    "by_divergence",
    "candidates",
    "encode_item",
    "fold",
    "measure",
    "read_config",
    "score_settings",
]
