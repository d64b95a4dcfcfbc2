"""Results at a prompt: names and shapes, in a few lines."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tiny_flow import world
from tiny_hosts import build, inputs

import ssm_interp as si
from ssm_interp import features, flow, plots, prompts, recipes
from ssm_interp.features import (
    attention_views,
    check_edges,
    decompose,
    edge_attribution,
    find_circuit,
    log_probability,
    logit_attribution,
    record_mixers,
    spectrum,
)
from ssm_interp.flow import leak, sweep, token_map
from ssm_interp.prompts import encode, pad, tokenize

LARGE = re.compile(r"Tensor|Float\[|Int\[|Bool\[|ndarray|DataFrame|Attachment|Terms|NDArray|Numbers")


def classes() -> Iterator[type]:
    """The dataclasses and named tuples of the floors."""
    for floor in (features, flow, plots, prompts, recipes):
        for module in pkgutil.iter_modules(floor.__path__, f"{floor.__name__}."):
            for _, found in inspect.getmembers(import_module(module.name), inspect.isclass):
                if found.__module__ != module.name or found.__name__.startswith("_"):
                    continue
                if dataclasses.is_dataclass(found) or hasattr(found, "_fields"):
                    yield found


def test_no_class_that_holds_tensors_tables_or_models_has_the_repr_that_prints_them() -> None:
    found = {one for one in classes() if any(LARGE.search(str(kind)) for kind in one.__annotations__.values())}
    assert {"Decomposition", "FlowResult", "TokenMap", "Batch", "Answers"} <= {one.__name__ for one in found}
    for one in found:
        path = inspect.getfile(inspect.unwrap(one.__repr__))
        assert "ssm_interp" in path, f"{one.__name__} has the repr of {path}"


def results() -> Iterator[tuple[str, Any]]:
    with si.attach(build("mamba2")) as ssm:
        given = inputs(2, 6)
        yield "decompose", decompose(ssm, given, targets=[-1, -2])
        yield "record_mixers", record_mixers(ssm, given)
        yield "attention_views", attention_views(ssm, given, reduction=None)
        yield "logit_attribution", logit_attribution(ssm, given, 3)
        attribution = edge_attribution(ssm, given, log_probability(3))
        yield "edge_attribution", attribution
        yield "check_edges", check_edges(ssm, given, log_probability(3), attribution, top=3, random=3)
        yield "spectrum", spectrum(ssm, given)
    tiny = world("mamba2", count=4)
    with si.attach(tiny.model, own_operator=True) as ssm:
        rows = [tokenize(prompt, tiny.tokenizer) for prompt in tiny.prompts]
        yield "tokenize", rows[0]
        yield "encode", encode(tiny.prompts[0].text, tiny.tokenizer)
        batch = pad(rows)
        yield "pad", batch
        yield "find_circuit", find_circuit(ssm, batch, roles={"all": batch.positions("all")}, tolerance=0.0)
        yield "sweep", sweep(ssm, tiny.tokenizer, tiny.prompts, windows=2)
        yield "leak", leak(ssm, tiny.tokenizer, tiny.prompts, windows=2)
        yield "token_map", token_map(ssm, tiny.tokenizer, tiny.prompts[0], window=2)
        variants = [flow.CLEAN] * 2
        yield "answers", next(flow.full_forwards(ssm, batch, variants))


def test_reprs_of_results_are_short() -> None:
    shown = {name: repr(one) for name, one in results()}
    for name, text in shown.items():
        assert len(text) < 4000 and "tensor(" not in text and "array(" not in text and "(backbone)" not in text, name
        assert "\n" not in text, name
    first = "{0: Decomposition(layer=0, by='source', targets=(5, 4), groups=('all',), parts={'ssm': Tensor [2, 2, 1, "
    assert shown["decompose"].startswith(first)
    assert shown["leak"].startswith("LeakReport(frame=DataFrame of ")
    assert shown["answers"] == "Answers(variants=[0], rows=[0, 1, 2, 3], logits=Tensor [1, 4, 37])"
