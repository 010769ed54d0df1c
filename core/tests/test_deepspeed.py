"""What is read of ``train.deepspeed``, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftwork import UserError
from graftwork.train.deepspeed import read_config, zero_stage


def test_the_stage_is_read_from_a_file_or_a_mapping(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}}
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(config))
    assert read_config({"deepspeed": str(path)}) == read_config({"deepspeed": config}) == config
    assert zero_stage({"deepspeed": str(path)}) == 2
    assert zero_stage({"deepspeed": {}}) == zero_stage({}) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read: No such file"), ("{", "is not valid JSON"), ("[]", "holds no JSON object")],
)
def test_a_bad_file_is_told(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_config({"deepspeed": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
