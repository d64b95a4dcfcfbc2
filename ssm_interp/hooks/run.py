"""What one call of an attached model gives, and hook points that are asked for without hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor

from ssm_interp.arguments import as_index
from ssm_interp.errors import HookError, MissingError
from ssm_interp.hooks.points import HookPoint
from ssm_interp.reprs import describe

_exposing = Lock()


@dataclass(frozen=True)
class Run:
    """What `Attachment.run` gives.

    Attributes:
        output: the model's own output.
        reads: the tensors that were read, by (name, layer).

    Example:
        >>> run["attn", 3]           # [b h t s]
        >>> run["attn"]              # {layer: tensor}
    """

    output: Any
    reads: dict[tuple[str, int], Tensor]

    def __repr__(self) -> str:
        read: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for (name, layer), tensor in self.reads.items():
            read.setdefault((name, tuple(tensor.shape)), []).append(layer)
        shapes = ", ".join(f"{name} of {layers_in_words(at)}: {list(shape)}" for (name, shape), at in read.items())
        logits = getattr(self.output, "logits", None)
        gave = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else type(self.output).__name__
        return f"Run({gave}; read {shapes or 'nothing'})"

    @property
    def logits(self) -> Tensor:
        """The model's logits, `[b t v]`.

        Raises:
            HookError: the model gave none.
        """
        logits = getattr(self.output, "logits", None)
        if not isinstance(logits, Tensor):
            raise HookError(
                f"the model returned a {type(self.output).__name__} without logits; they need a language-model head, "
                "and a call without return_dict=False"
            )
        return logits

    def __getitem__(self, key: Any) -> Any:
        match key:
            case str():
                by_layer = {
                    at: tensor for (name, at), tensor in self.reads.items() if name == key.removeprefix("hook_")
                }
                if by_layer:
                    return by_layer
            case (str() as name, layer) if (short := (name.removeprefix("hook_"), as_index(layer))) in self.reads:
                return self.reads[short]
        names = list(dict.fromkeys(name for name, _ in self.reads))
        layers = sorted({layer for _, layer in self.reads})
        raise MissingError(
            f"{describe(key)} was not read; read were {', '.join(names) or 'nothing'} of layers {layers}. Name it in "
            "run(..., read=[...], layers=[...])"
        )


def layers_in_words(layers: Sequence[int]) -> str:
    """Layers as a text names them."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {list(layers)}"


class Exposure:
    """Hook points that fire until `close`, or to the end of a `with` block."""

    def __init__(self, points: list[HookPoint]) -> None:
        self._points = points
        self._count(1)

    def __repr__(self) -> str:
        names = dict.fromkeys(f"hook_{point.name}" for point in self._points)
        return f"Exposure({', '.join(names) or 'closed'})"

    def close(self) -> None:
        """Stop asking for these points; those that another exposure asks for go on firing."""
        self._count(-1)
        self._points = []

    def _count(self, step: int) -> None:
        with _exposing:
            for point in self._points:
                point.exposures += step
                point.asked.now = True

    def __enter__(self) -> Exposure:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
