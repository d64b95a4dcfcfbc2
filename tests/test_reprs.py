"""Every class that holds tensors, tables or models has a repr that prints none of them."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module

from ssm_interp import attribution, circuits, features, flow, jobs, plots, prompts, recipes

LARGE = re.compile(r"Tensor|Float\[|Int\[|Bool\[|ndarray|DataFrame|Attachment|Terms|NDArray|Numbers")


def classes() -> Iterator[type]:
    """The dataclasses and named tuples of the floors."""
    for floor in (attribution, circuits, features, flow, jobs, plots, prompts, recipes):
        for module in pkgutil.iter_modules(floor.__path__, f"{floor.__name__}."):
            for _, found in inspect.getmembers(import_module(module.name), inspect.isclass):
                if found.__module__ != module.name or found.__name__.startswith("_"):
                    continue
                if dataclasses.is_dataclass(found) or hasattr(found, "_fields"):
                    yield found


def test_no_class_that_holds_tensors_tables_or_models_has_the_repr_that_prints_them() -> None:
    found = {one for one in classes() if any(LARGE.search(str(kind)) for kind in one.__annotations__.values())}
    assert {"Decomposition", "FlowResult", "TokenMap", "Batch"} <= {one.__name__ for one in found}
    for one in found:
        path = inspect.getfile(inspect.unwrap(one.__repr__))
        assert "ssm_interp" in path, f"{one.__name__} has the repr of {path}"
