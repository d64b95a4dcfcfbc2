"""Hooks that somebody left on: what is measured under them says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from tiny_flow import World, world
from tiny_hosts import build, inputs

import ssm_interp as si
from ssm_interp.attribution import attention_views, check_edges, decompose, edge_attribution, logit_attribution
from ssm_interp.circuits import find_circuit
from ssm_interp.features import spectrum
from ssm_interp.flow import leak, sweep, token_map
from ssm_interp.hooks import HookedWarning, log_probability, warn_hooked
from ssm_interp.prompts import pad, tokenize


@pytest.fixture(scope="module")
def scene() -> World:
    return world("mamba2", count=4)


def test_a_sweep_names_the_hooks_that_change_which_prompts_it_keeps(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        options = {"sources": ["subject"], "windows": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            free = sweep(ssm, scene.tokenizer, scene.prompts, **options)
        with ssm.layers[2].hook_y.add_hook(lambda y, hook: 0.5 * y), ssm.layers[0].hook_B.register_forward_hook(_same):
            with pytest.warns(HookedWarning) as caught:
                hooked = sweep(ssm, scene.tokenizer, scene.prompts, answered_only=False, **options)
            with pytest.warns(HookedWarning):
                token_map(ssm, scene.tokenizer, scene.prompts[0], window=2)
            with pytest.warns(HookedWarning):
                leak(ssm, scene.tokenizer, scene.prompts, answered_only=False, **options)
        again = sweep(ssm, scene.tokenizer, scene.prompts, **options)
    (one,) = caught
    assert str(one.message) == (
        "the sweep runs under the hooks on hook_B of layer 0, hook_y of layer 2, its clean run too; ssm.reset_hooks() "
        "removes all hooks"
    )
    assert not hooked.frame["p_base"].equals(free.frame["p_base"])
    assert again.frame.equals(free.frame)


def _same(module: Any, args: Any, tensor: Any) -> None:
    return None


VERBS: dict[str, Callable[[si.Attachment, Any], object]] = {
    "attribution": lambda ssm, given: edge_attribution(ssm, given, log_probability(3)),
    "decomposition": decompose,
    "logits": lambda ssm, given: logit_attribution(ssm, given, 3, 4),
    "views": attention_views,
    "spectrum": spectrum,
}


@pytest.mark.parametrize("verb", VERBS)
def test_attributions_say_so_too(verb: str) -> None:
    with si.attach(build("mamba2")) as ssm:
        VERBS[verb](ssm, inputs(2, 6))
        with (
            ssm.layers[1].hook_y.add_hook(lambda y, hook: None),
            pytest.warns(HookedWarning, match="hook_y of layer 1"),
        ):
            VERBS[verb](ssm, inputs(2, 6))


def test_a_circuit_and_a_check_say_so_too(scene: World) -> None:
    batch = pad([tokenize(prompt, scene.tokenizer) for prompt in scene.prompts])
    columns = {"all": batch.positions("all")}
    with si.attach(scene.model, own_operator=True) as ssm:
        found = edge_attribution(ssm, batch, log_probability(batch.answer_ids))
        with ssm.layers[1].hook_y.add_hook(lambda y, hook: None):
            with pytest.warns(HookedWarning, match="the circuit search runs"):
                find_circuit(ssm, batch, roles=columns, tolerance=1e9, layers=[0])
            with pytest.warns(HookedWarning, match="the check runs"):
                check_edges(ssm, batch, log_probability(batch.answer_ids), found, top=1, random=0)


def test_of_many_points_some_are_named(scene: World) -> None:
    with si.attach(scene.model) as ssm:
        for points in ssm.layers.values():
            points.hook_x.add_hook(lambda x, hook: None)
        with pytest.warns(HookedWarning, match="layer 0, hook_x of layer 1, hook_x of layer 2 and 1 more hook points"):
            warn_hooked(ssm, "it")
