"""Which weight transforms may follow one another; the rest is refused with both names, the hook, and the way out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from graftwork import UserError
from graftwork.hookspecs import WeightTransform
from graftwork.transform.job import check_order

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stored": {"stored": True},
    "factors": {"factors": True},
    "scales": {"scales": True},
    "rotates": {"rotates": True},
    "rounds": {"rounds": True},
}
REFUSED = {
    **{(kind, "stored"): "name 'two' first" for kind in KINDS},
    **{("rounds", kind): "name 'one' last" for kind in KINDS},
    ("stored", "stored"): "use one of them",
    ("rounds", "stored"): "name 'two' first",
    ("rounds", "rounds"): "leave one of them out",
    ("factors", "factors"): "leave one of them out",
    ("rotates", "rotates"): "leave one of them out",
    ("rotates", "scales"): "name 'two' first",
}


@pytest.mark.parametrize("kinds", itertools.product(KINDS, repeat=2), ids="-".join)
def test_every_order_of_two(kinds: tuple[str, str]) -> None:
    pair = [
        (name, WeightTransform(name, lambda block: None, **KINDS[kind]))
        for name, kind in zip(("one", "two"), kinds, strict=True)
    ]
    if kinds not in REFUSED:
        check_order(pair)
        return
    with pytest.raises(UserError) as caught:
        check_order(pair)
    told = str(caught.value)
    assert told.startswith("plugins 'one' and 'two' cannot be combined in this order: ")
    assert "(hook weight_transforms); " in told
    assert REFUSED[kinds] in told


def test_those_in_between_do_not_hide_it() -> None:
    chain = [
        (kind, WeightTransform(kind, lambda block: None, **KINDS[kind])) for kind in ("rotates", "plain")
    ]
    again = ("other", WeightTransform("other", lambda block: None, rotates=True))
    with pytest.raises(UserError, match="'rotates' and 'other'"):
        check_order([*chain, again])
