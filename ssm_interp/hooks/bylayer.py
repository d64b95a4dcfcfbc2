"""What each layer of a kind has, by the layer's index."""

from __future__ import annotations

from typing import Any, TypeVar

from ssm_interp.arguments import as_index
from ssm_interp.errors import MissingError
from ssm_interp.reprs import describe

Value = TypeVar("Value")


class ByLayer(dict[int, Value]):
    """A dict by layer that says, when asked for another layer, which ones there are.

    Attributes:
        kind: what the layers are, as "SSM".
    """

    kind = "SSM"

    @classmethod
    def of(cls, kind: str, values: dict[int, Value]) -> ByLayer[Value]:
        by_layer = cls(values)
        by_layer.kind = kind
        return by_layer

    def __getitem__(self, layer: Any) -> Value:
        if (index := as_index(layer)) is not None and index in self:
            return super().__getitem__(index)
        there = f"the {self.kind} layers of this model are {list(self)}"
        if not self:
            there = "the model has none, or was detached"
        raise MissingError(f"there is no {self.kind} layer {describe(layer)}; {there}")

    def __repr__(self) -> str:
        return f"{self.kind} layers {list(self)}: {', '.join({type(value).__name__: None for value in self.values()})}"
