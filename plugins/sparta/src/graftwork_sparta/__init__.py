"""SpaRTA: two low-rank branches of different rank per layer, kept orthogonal, weighed by a prompt router.

Importing this package makes ``SPARTA`` a method of PEFT: ``get_peft_model(model, SpartaConfig(...))``,
``save_pretrained`` and ``PeftModel.from_pretrained`` then work as with any other method.
"""

from graftwork_sparta.config import SpartaConfig
from graftwork_sparta.export import export_branch, merge_static
from graftwork_sparta.losses import branch_overlap, component_overlap
from graftwork_sparta.model import SpartaModel, freeze_new, gate_values, grow, prompt_context

__all__ = [
    "SpartaConfig",
    "SpartaModel",
    "branch_overlap",
    "component_overlap",
    "export_branch",
    "freeze_new",
    "gate_values",
    "grow",
    "merge_static",
    "prompt_context",
]
