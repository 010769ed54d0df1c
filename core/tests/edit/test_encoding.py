"""Tokens: one tokenisation with offsets, whatever a tokenizer merges; padding on either side changes no score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork.edit.encoding import batches, encode, encode_request, joined, pad, rows_of
from graftwork.edit.errors import RequestError
from graftwork.edit.requests import Request
from graftwork.edit.scoring import score
from graftwork.testing.editing import REQUESTS, editable_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def merging_tokenizer() -> Any:
    """Return a tokenizer that puts <bos> first and merges across words: ``s R`` is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<bos>", *alphabet, "Ly", "on", "Lyon", "sĠ", "sĠR"]
    merges = [("L", "y"), ("o", "n"), ("Ly", "on"), ("s", "Ġ"), ("sĠ", "R")]
    core = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")


def text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids))


def test_the_boundary_is_that_of_the_joint_text() -> None:
    tokenizer = merging_tokenizer()
    row = encode(tokenizer, "Lyon is", subject=(0, 4), target="Rome")
    # "s R" is one token, and it reaches into the target: two separate tokenisations would count another prompt.
    assert text(tokenizer, row.target) == "s Rome"
    assert len(tokenizer("Lyon is")["input_ids"]) != row.start
    assert row.anchor == row.first == 1
    assert text(tokenizer, [row.ids[row.anchor]]) == "Lyon"
    assert row.last == row.start - 1


def test_the_anchor_is_the_last_token_of_the_subject(tokenizer: Any) -> None:
    row = encode_request(tokenizer, Request("1", "In {} one speaks", "Köln ß", "ja"), prefix="Hm. ")
    raw = "Hm. In Köln ß one speaks ja".encode()
    end = raw.index(b" one")
    assert row.anchor == end - 1
    assert row.first == raw.index(b"K")
    assert row.start == raw.index(b" ja")
    assert text(tokenizer, row.target) == " ja"


def test_rows_are_the_bare_prompt_then_prefixes_then_variants(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, REQUESTS[0], ["Ah. ", "Oh. "], variants=1)
    assert [text(tokenizer, row.ids) for row in rows] == [
        "Lyon is in Rome",
        "Ah. Lyon is in Rome",
        "Oh. Lyon is in Rome",
        "Bonn is in Rome",
    ]
    assert [text(tokenizer, row.ids[: row.anchor + 1])[-4:] for row in rows] == ["Lyon"] * 3 + ["Bonn"]
    assert all(not row.target for row in rows_of(tokenizer, REQUESTS[0], target=False))


def test_one_space_joins() -> None:
    assert joined("a", "b") == joined("a ", "b") == joined("a", " b") == "a b"


def test_what_cannot_be_encoded_is_named(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="nothing stands before the target"):
        encode(tokenizer, "", target="Rome")
    with pytest.raises(RequestError, match="'r': no token of the subject"):
        encode(tokenizer, "Lyon is", subject=(2, 2), target="Rome", where="request 'r'")

    class Slow:
        is_fast = False

    with pytest.raises(RequestError, match="needs a fast tokenizer"):
        encode(Slow(), "a", target="b")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_padding_on_either_side_gives_the_same_scores(kind: str, tokenizer: Any) -> None:
    model = editable_model(kind)
    rows = [row for one in REQUESTS for row in rows_of(tokenizer, one, ["A longer start than that. "])]
    right = score(model, tokenizer, rows, side="right")
    left = score(model, tokenizer, rows, side="left")
    alone = [one for row in rows for one in score(model, tokenizer, [row])]
    for a, b, c, row in zip(right, left, alone, rows, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.log_probs, c.log_probs, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        wanted = [float(whole[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))]
        assert a.log_probs.tolist() == pytest.approx(wanted, abs=1e-4)
        assert a.mean == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
        assert a.likeliest.tolist() == whole[row.start - 1 : -1].argmax(-1).tolist()
        assert a.strict == float(a.hits.all())


def test_batches_keep_to_their_budget(tokenizer: Any, model: Any) -> None:
    rows = [encode(tokenizer, "a" * size, target="b") for size in (3, 9, 2, 40, 1, 1)]
    parts = list(batches(rows, 24))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) * max(len(row.ids) for row in part) <= 24 or len(part) == 1 for part in parts)
    batch = pad(rows, tokenizer, model, "left")
    for number, row in enumerate(rows):
        start = int(batch.shift[number])
        assert batch.inputs["input_ids"][number, start:].tolist() == list(row.ids)
        assert batch.inputs["position_ids"][number, start:].tolist() == list(range(len(row.ids)))
