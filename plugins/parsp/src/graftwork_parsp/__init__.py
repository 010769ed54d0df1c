"""PaRSP: continual learning in sparse regions of neurons, in the null space of earlier tasks' inputs.

Importing this package makes ``PARSP`` a method of PEFT: ``get_peft_model(model, ParspConfig(...))``,
``save_pretrained`` and ``PeftModel.from_pretrained`` then work as with any other method.
"""

from graftwork_parsp.config import ParspConfig
from graftwork_parsp.model import ParspModel, begin_region, fold, layers_of
from graftwork_parsp.moments import collect
from graftwork_parsp.neurons import find_mlps
from graftwork_parsp.nullspace import Basis, top_directions
from graftwork_parsp.regions import map_regions, normalised
from graftwork_parsp.relevance import relevance

__all__ = [
    "Basis",
    "ParspConfig",
    "ParspModel",
    "begin_region",
    "collect",
    "find_mlps",
    "fold",
    "layers_of",
    "map_regions",
    "normalised",
    "relevance",
    "top_directions",
]
