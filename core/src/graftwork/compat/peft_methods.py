"""The one place that opens PEFT's closed list of methods (huggingface/peft#2273).

``PeftType`` is an enum, and PEFT's public ``register_peft_method`` refuses names that are not in it.
Adding a member in place and then registering publicly serves everything PEFT does with a method: saving,
loading, merging, several adapters, and transformers' ``load_adapter``. A plain string key instead of a
member would break the last of these.

Tested with peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import UserError

PROVIDER_KEY = "graftwork_plugin"


def register(*, name: str, config_cls: type, model_cls: type, prefix: str) -> Any:
    """Make ``name`` (upper case) a method of PEFT and return its ``PeftType`` member.

    Registering the same classes again does nothing. ``prefix`` starts the names of the method's
    parameters, as in PEFT's own methods.

    Raises:
        ValueError: another class is registered under that name.
        RuntimeError: this version of PEFT is built in a way that the seam does not know.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    member = _member(PeftType, name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return member
    if known is not None:
        raise ValueError(f"PEFT method {name} is already registered by {known.__module__}.{known.__name__}")
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    return member


def _member(enumeration: Any, name: str) -> Any:
    if name in enumeration.__members__:
        return enumeration[name]
    try:
        member = str.__new__(enumeration, name)
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(enumeration.__members__)
        enumeration._member_map_[name] = member
        enumeration._value2member_map_[name] = member
        enumeration._member_names_.append(name)
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            "peft.PeftType is no longer a string enum that can be extended; see this module"
        ) from error
    if enumeration(name) is not member or enumeration[name] is not member:
        raise RuntimeError("peft.PeftType does not find a member that was added to it; see this module")
    return member


def check_known(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter whose method PEFT does not know, and say which plugin brings it.

    ``config`` is the content of ``adapter_config.json`` in ``folder``. An adapter names its plugin under
    the key ``graftwork_plugin``.

    Raises:
        UserError: the method is unknown to PEFT as it is now.
    """
    from peft import PeftType

    kind = str(config.get("peft_type"))
    if kind in PeftType.__members__:
        return
    plugin = config.get(PROVIDER_KEY)
    cure = (
        f"add `--plugin {plugin}` (`pip install graftwork-{plugin}` brings it)"
        if isinstance(plugin, str) and plugin.replace("-", "").replace("_", "").isalnum()
        else "name the plugin that brings it with --plugin"
    )
    raise UserError(f"adapter '{folder}' is of the method {kind}, which PEFT does not have by itself; {cure}")
