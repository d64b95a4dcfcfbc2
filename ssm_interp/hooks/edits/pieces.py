"""Edges x features that overlap, as disjoint pieces, so that an edge removed twice is removed once.

A piece is a product targets x sources x features, and so is each part of what is left when a piece is taken away: no
mask of targets x sources is ever written out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Every edge from some sources to some targets, on some features; those from a later source do not exist.

    Attributes:
        targets: bool `[b t]`.
        sources: bool `[b s]`.
        features: bool, `[h 1]` for whole heads or `[h n]` for (head, state) pairs.
    """

    targets: Tensor
    sources: Tensor
    features: Tensor

    def __bool__(self) -> bool:
        return bool(self.targets.any() and self.sources.any() and self.features.any())

    def without(self, other: Piece) -> list[Piece]:
        """What is left of this piece when another is taken away: at most three pieces."""
        both = self.targets & other.targets
        left = (
            Piece(self.targets & ~other.targets, self.sources, self.features),
            Piece(both, self.sources & ~other.sources, self.features),
            Piece(both, self.sources & other.sources, self.features & ~other.features),
        )
        return [piece for piece in left if piece]

    def as_features(self) -> Tensor | None:
        """The features as `scan.removed` takes them: None for all, `[h]` or `[h n]`."""
        if self.features.all():
            return None
        return self.features[:, 0] if self.features.shape[1] == 1 else self.features


def disjoint(groups: Iterable[Iterable[Piece]], taken: Iterable[Piece] = ()) -> list[Piece]:
    """The same edges x features, each once, less those that are taken already. Pieces of one group do not overlap."""
    away, pieces = list(taken), []
    for group in groups:
        given = [piece for piece in group if piece]
        for piece in given:
            left = [piece]
            for other in away:
                left = [part for whole in left for part in whole.without(other)]
            pieces += left
        away += given
    return pieces
