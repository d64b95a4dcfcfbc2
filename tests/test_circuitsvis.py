"""What CircuitsVis is given of our results: read back out of the page that it makes."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from typing import Any

import pytest
import torch
from random_terms import as_users_run_it
from tiny_hosts import build, inputs, padded

import ssm_interp as si
from ssm_interp.attribution import AttentionView, attention_views
from ssm_interp.features import FeatureError
from ssm_interp.hosts.circuitsvis import attention_maps, coloured_tokens

pytestmark = pytest.mark.hosts
TOKENS = [f"t{column}" for column in range(9)]


def shown(page: Any) -> tuple[str, dict[str, Any]]:
    """The view that a page shows, and what it is given."""
    view, given = re.search(r"render\(\s*\"[^\"]+\",\s*(\w+),\s*(\{.*\})\s*\)\s*</script>", page.cdn_src, re.S).groups()
    assert f"CircuitsVis.{view}" in page.local_src
    return view, json.loads(given)


@pytest.fixture(scope="module")
def views() -> dict[Any, AttentionView]:
    with si.attach(build("mamba2")) as ssm, torch.no_grad():
        one = partial(attention_views, ssm, inputs(), layers=1, tokens=[TOKENS, TOKENS[::-1]])
        heads = {block: one(heads=block)[1] for block in (range(4), range(4, 8))}
        return heads | {how: one(reduction=how)[1] for how in (None, "mean")} | {"last": one(targets=-1)[1]}


def test_the_heads_of_a_layer_are_a_map_each(views: dict[Any, AttentionView]) -> None:
    view, given = shown(attention_maps(views[None], row=1))
    values = torch.tensor(given["attention"])
    assert view == "AttentionHeads"
    torch.testing.assert_close(values, views[None].values[1])
    assert given["tokens"] == TOKENS[::-1] and given["attentionHeadNames"] == [f"head {head}" for head in range(8)]
    assert given["maxValue"] == -given["minValue"] == pytest.approx(float(values.abs().max()))
    assert given["maskUpperTri"] and given["positiveColor"] == "#2166AC"


def test_blocks_of_heads_and_one_reduced_map(views: dict[Any, AttentionView]) -> None:
    _, given = shown(attention_maps({"first": views[range(4)], "second": views[range(4, 8)]}))
    assert given["attentionHeadNames"] == ["first", "second"]
    expected = views[None].values[0].abs().unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(torch.tensor(given["attention"]), expected)
    _, given = shown(attention_maps({1: views["mean"]}))
    assert given == shown(attention_maps(views["mean"]))[1]
    assert given["attentionHeadNames"] == ["layer 1"]
    torch.testing.assert_close(torch.tensor(given["attention"])[0], views[None].values[0].mean(0))


def test_tokens_are_coloured_by_numbers_of_either_sign() -> None:
    with si.attach(build("mamba2")) as ssm:
        by_token = si.attribution.logit_attribution(ssm, inputs(), 5).by_position()[0].sum(1)  # layer, source
    view, given = shown(coloured_tokens(by_token.sum(0), TOKENS))
    assert view == "ColoredTokens" and given["tokens"] == TOKENS
    torch.testing.assert_close(torch.tensor(given["values"]), by_token.sum(0))
    assert given["maxValue"] == -given["minValue"] == pytest.approx(float(by_token.sum(0).abs().max()))
    view, given = shown(coloured_tokens({f"layer {layer}": row for layer, row in enumerate(by_token)}, TOKENS))
    assert view == "ColoredTokensMulti" and given["labels"] == [f"layer {layer}" for layer in range(len(by_token))]
    torch.testing.assert_close(torch.tensor(given["values"]), by_token.T)
    assert shown(coloured_tokens(torch.zeros(9), TOKENS))[1]["maxValue"] == 1


def test_what_cannot_be_shown_is_refused(views: dict[Any, AttentionView]) -> None:
    with si.attach(build("mamba")) as ssm, torch.no_grad():
        channels = attention_views(ssm, padded([9, 4]), "unified", reduction=None, layers=0)[0]
        short = attention_views(ssm, torch.ones(1, 5, dtype=torch.long), layers=0)[0]
    many = {str(number): views["mean"] for number in range(65)}
    with as_users_run_it():
        for given, options, message in [
            (many, {}, "65 maps are too many"),
            (views["last"], {}, r"needs all targets, \[t s\] with t = s, got \[1, 9\]"),
            (views["mean"], {"row": 2}, "no row 2; the batch has rows 0 to 1"),
            ({"a": views["mean"], "b": short}, {}, r"one shape \[b t s\], got"),
            ({"a": views[None]}, {}, "must be reduced over heads"),
            ({}, {}, "views must be an AttentionView"),
            (channels.values, {}, "got Tensor"),
        ]:
            with pytest.raises(FeatureError, match=message):
                attention_maps(given, **options)  # type: ignore[arg-type]
        for values, message in [
            ({}, "mapping is empty"),
            (torch.ones(2, 9), r"number per token, \[t\], got \[2, 9\]"),
            (torch.full((9,), torch.nan), "not finite"),
            (torch.ones(8), "8 values '' for 9 tokens"),
        ]:
            with pytest.raises(FeatureError, match=message):
                coloured_tokens(values, TOKENS)


def test_without_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "circuitsvis.tokens", None)
    with pytest.raises(ImportError, match=r"pip install 'ssm-interp\[hosts\]'"):
        coloured_tokens(torch.ones(9), TOKENS)
