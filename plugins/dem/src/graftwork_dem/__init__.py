"""DEM and KLFT: find where a model keeps a sentence of common sense, and write there."""

from graftwork_dem.attribution import attribute
from graftwork_dem.ckebench import Bench, read
from graftwork_dem.dispersion import Dispersion, dispersion
from graftwork_dem.editor import DemEditor
from graftwork_dem.events import commonsense
from graftwork_dem.facts import facts
from graftwork_dem.lines import Line, line
from graftwork_dem.locate import Located, locate, places
from graftwork_dem.options import LocateOptions
from graftwork_dem.recall import contributions
from graftwork_dem.select import select
from graftwork_dem.settings import DemOptions
from graftwork_dem.trace import Traced, trace

__all__ = [
    "Bench",
    "DemEditor",
    "DemOptions",
    "Dispersion",
    "Line",
    "LocateOptions",
    "Located",
    "Traced",
    "attribute",
    "commonsense",
    "contributions",
    "dispersion",
    "facts",
    "line",
    "locate",
    "places",
    "read",
    "select",
    "trace",
]
