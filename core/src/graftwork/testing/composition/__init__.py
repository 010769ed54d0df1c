"""Which plugins can be used together: tried on a tiny model, told in a table.

``trainer plugins matrix`` does so for all that are installed, or for yours against all.
"""

from graftwork.testing.composition.compose import Composer, Outcome
from graftwork.testing.composition.matrix import Matrix, make_matrix

__all__ = ["Composer", "Matrix", "Outcome", "make_matrix"]
