"""Edges x features that overlap, as disjoint pieces, so that an edge removed twice is removed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Some edges (or sources), on some features.

    Attributes:
        edges: bool, over positions: `[b t s]` for edges, `[b t]` for sources.
        features: bool, `[h 1]` for whole heads or `[h n]` for (head, state) pairs.
    """

    edges: Tensor
    features: Tensor

    def without(self, other: Piece) -> list[Piece]:
        """What is left of this piece when another is taken away: at most two pieces."""
        rest = Piece(self.edges & ~other.edges, self.features)
        shared = Piece(self.edges & other.edges, self.features & ~other.features)
        return [piece for piece in (rest, shared) if piece.edges.any() and piece.features.any()]

    def as_features(self) -> Tensor | None:
        """The features as `scan.removed` takes them: None for all, `[h]` or `[h n]`."""
        if self.features.all():
            return None
        return self.features[:, 0] if self.features.shape[1] == 1 else self.features


def disjoint(pieces: Iterable[Piece], taken: Iterable[Piece] = ()) -> list[Piece]:
    """The same edges x features, each once, less those that are taken already."""
    away, found = list(taken), []
    for piece in pieces:
        left = [piece] if piece.edges.any() and piece.features.any() else []
        for other in away:
            left = [part for whole in left for part in whole.without(other)]
        found += left
        away.append(piece)
    return found
