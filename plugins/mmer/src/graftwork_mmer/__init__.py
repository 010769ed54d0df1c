"""MMER: merge experts of one base, keep a bit mask per expert that cuts each out again, route tokens to them."""

from graftwork_mmer.artefact import Artefact
from graftwork_mmer.method import MmerMethod
from graftwork_mmer.options import MmerOptions
from graftwork_mmer.routed.deltas import KeptDeltas, MaskedDeltas
from graftwork_mmer.routed.model import RoutedModel
from graftwork_mmer.rules import congruent, nearest

__all__ = [
    "Artefact",
    "KeptDeltas",
    "MaskedDeltas",
    "MmerMethod",
    "MmerOptions",
    "RoutedModel",
    "congruent",
    "nearest",
]
