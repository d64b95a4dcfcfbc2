"""One prompt's source tokens over the layer windows, as a heat map."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ssm_interp.errors import PlotError
from ssm_interp.plots.cells import centred, colour_bar, extent, layer_cells, nothing, say_nothing
from ssm_interp.plots.panels import LAYER, layer_label
from ssm_interp.plots.style import ARROW, CHANGED, headline, picture, readable, short
from ssm_interp.results import Result

LABEL = "Change of the answer's probability"
MEANING = "(blue: the token supports the answer, red: it opposes it)"
LEAST = 0.01  # of the answer's clean probability: colours end no nearer to 0, so that noise is not drawn in full
MOST_ACROSS = 3
ONE_OF_EACH = ("model", "prompt_id", "target", "feature_group")
NEEDED = (*ONE_OF_EACH, "source", "layer", "window_start", "window_size", "n_edges", "p_base", "p")


@dataclass(frozen=True, eq=False, repr=False)
class TokenMap(Result):
    """What knocking each single token of a prompt out does to the answer, in each layer window.

    Attributes:
        values: p - p_base, `[token, window]`; NaN where there are no edges to knock out, drawn hatched.
        tokens: a readable token per row.
        layers: the layer that each window is drawn at (its first one, if aligned left).
        subject: rows that are the subject's.
        title: what was asked of which model.
        answer: what was asked for (a target, or the first token of one), in the title.
        p_base: its probability in the clean run, in the title.
        layer_label: what the layer axis says.

    Raises:
        PlotError: no rows or columns; another number of tokens or layers; a subject outside the prompt; infinities.

    Example:
        >>> map = TokenMap(np.array([[-0.2, -0.1], [0.0, 0.1]]), ["The", " Nile"], [0, 1], subject=[1], p_base=0.8)
        >>> map.caption
        'p = 0.8'
    """

    values: Float[np.ndarray, "token window"]
    tokens: Sequence[str]
    layers: Sequence[int]
    subject: Collection[int] = ()
    title: str = ""
    answer: str = ""
    p_base: float | None = None
    layer_label: str = LAYER

    def __post_init__(self) -> None:
        shape = list(self.values.shape)
        if 0 in shape:
            raise PlotError(f"a token map needs values [token, window] with at least one of each, got {shape}")
        for name, count in (("tokens", shape[0]), ("layers", shape[1])):
            if len(getattr(self, name)) != count:
                given = len(getattr(self, name))
                raise PlotError(f"the values are {shape} [token, window], but there are {given} {name}; give {count}")
        if outside := [row for row in self.subject if not 0 <= row < shape[0]]:
            raise PlotError(f"the subject has row {outside[0]}, but the values are {shape} [token, window]")
        if np.isinf(self.values).any():
            raise PlotError("the values of a token map are changes of a probability, or NaN; some are infinite")

    @classmethod
    def of(
        cls, rows: pd.DataFrame, tokens: Sequence[str], *, subject: Collection[int] = (), answer: str = ""
    ) -> TokenMap:
        """From the rows of a sweep whose sources were the positions of a prompt.

        Args:
            rows: of `FlowResult.frame`: of one model, prompt, target, feature group and window size.
            tokens: of that prompt; position i is `tokens[i]`.
            subject, answer: as above.

        Raises:
            PlotError: no rows, missing columns; rows of several models, prompts, ...; a source that is no position in
                this prompt.

        Example:
            >>> result = sweep(ssm, tokenizer, [prompt], sources=range(len(encoding.tokens)))     # doctest: +SKIP
            >>> heatmap_figure(TokenMap.of(result.frame, encoding.tokens, answer="Paris"))          # doctest: +SKIP
        """
        _check_rows(rows)
        positions = rows["source"].astype(str)
        if bad := [name for name in positions.unique() if not name.isdigit()]:
            raise PlotError(f"a token map needs token positions as sources, got {bad[0]!r}; `flow_figure` draws roles")
        kept = rows.assign(source=positions.astype(int), change=rows["p"] - rows["p_base"])
        kept = kept[(kept["source"] < len(tokens)) | (kept["n_edges"] > 0)]
        if len(kept) and (most := int(kept["source"].max())) >= len(tokens):
            raise PlotError(f"the rows knock out position {most}, but there are only {len(tokens)} tokens")
        layers = sorted(kept["layer"].unique().tolist())
        change = kept["change"].where(kept["n_edges"] > 0)
        table = kept.assign(change=change).pivot(index="source", columns="layer", values="change")
        values = table.reindex(index=range(len(tokens)), columns=layers).to_numpy(float)
        first = rows.iloc[0]
        title = f"{short(str(first['model']), 32)}: token {ARROW} {readable(first['target'])}"
        axis = layer_label(rows.assign(window=rows["window_size"].max()))
        return cls(values, tokens, layers, subject, title, answer, float(first["p_base"]), axis)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per source token and window: source (a position), source_token, layer, change (p - p_base)."""
        source, window = np.indices(self.values.shape).reshape(2, -1)
        return pd.DataFrame(
            {
                "source": source,
                "source_token": np.array(self.tokens, dtype=object)[source],
                "layer": np.array(self.layers)[window],
                "change": self.values.ravel(),
            }
        )

    def plot(self, **options: Any) -> Figure:
        """The map as a picture; options of `heatmap_figure`."""
        return heatmap_figure(self, **options)

    def page(self, **options: Any) -> str:
        """The map as an interactive page of HTML; options of `heatmap_page`."""
        from ssm_interp.plots.html import heatmap_page

        return heatmap_page(self, **options)

    @property
    def caption(self) -> str:
        """The answer and its probability in the clean run."""
        parts = [f"answer: {short(self.answer.strip(), 48)}"] if self.answer else []
        return ", ".join([*parts, *([f"p = {self.p_base:.3g}"] if self.p_base is not None else [])])

    @property
    def largest(self) -> float:
        """The largest change of either sign; 0 if there is none."""
        return float(np.nanmax(np.abs(self.values), initial=0.0))

    @property
    def scale(self) -> float:
        """What its values are changes of: the answer's clean probability; 1 where that is not known."""
        return self.p_base or 1.0

    @property
    def note(self) -> str:
        """What the map says where no value is above rounding."""
        return nothing(self.largest, self.scale, "the answer's probability")


def _check_rows(rows: pd.DataFrame) -> None:
    if missing := [column for column in NEEDED if column not in rows.columns]:
        raise PlotError(f"a token map needs rows with the columns {list(NEEDED)}; these are missing: {missing}")
    if rows.empty:
        raise PlotError("a token map needs at least one row; there are none")
    for column in ONE_OF_EACH:
        if len(several := rows[column].unique()) > 1:
            shown = ", ".join(repr(str(value)) for value in several[:3])
            raise PlotError(f"a token map shows one {column}, but these rows have {len(several)}: {shown}; choose one")
    if rows.duplicated(["source", "layer"]).any():
        raise PlotError("a token map shows one window size, but these rows have several at one layer; choose one")


def colour_limit(maps: Sequence[TokenMap], limit: float | None) -> float:
    """Where the colours end on both sides of 0: as given, or the largest change of all maps (at least 1 % of p_base).

    Raises:
        PlotError: no maps; a limit that is not positive.
    """
    if not maps:
        raise PlotError("there are no token maps to draw")
    if limit is not None and not limit > 0:
        raise PlotError(f"the limit of the colours must be positive, such as 0.3, got {limit}")
    return limit or max(max(token_map.largest, LEAST * token_map.scale) for token_map in maps)


def heatmap_figure(*maps: TokenMap, limit: float | None = None, ax: Axes | None = None) -> Figure:
    """Token x window heat maps: a row per source token, a column per layer window, p - p_base in colour.

    Blue is a loss of the answer's probability, red a gain, white no change. Several maps (prompts, models) become
    panels with the same colours. The subject's tokens are set in bold. A map in which no token changes the probability
    by more than a millionth of itself says so.

    Args:
        maps: what to draw.
        limit: the change at which the colours end, such as 0.3; None: the largest there is, or 1 % of p_base.
        ax: draw into these axes, without a colour bar; only one map.

    Raises:
        PlotError: no maps; several for one `ax`; a limit that is not positive.

    Example:
        >>> heatmap_figure(first, second, limit=0.3).savefig("tokens.png", dpi=200)     # doctest: +SKIP
    """
    norm = centred(colour_limit(maps, limit))
    if ax is not None:
        if len(maps) > 1:
            raise PlotError(f"one axes holds one token map, got {len(maps)}; leave `ax` out, or call once for each")
        _map(ax, maps[0], norm)
        return ax.figure.figure
    across = min(len(maps), MOST_ACROSS)
    lanes = [maps[start : start + across] for start in range(0, len(maps), across)]
    heights = [max(_height(token_map) for token_map in lane) for lane in lanes]
    widths = [max(_width(token_map) for token_map in maps[column::across]) for column in range(across)]
    figure = picture(sum(widths) + 1.3, sum(heights))
    grid = figure.subplots(len(lanes), across, squeeze=False, height_ratios=heights, width_ratios=widths)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    drawn = list(grid.flat[: len(maps)])
    for index, (axes, token_map) in enumerate(zip(drawn, maps, strict=True)):
        image = _map(axes, token_map, norm)
        if index % across:
            axes.set_ylabel("")
    beyond = max(token_map.largest for token_map in maps) > float(norm.vmax or 0)
    colour_bar(image, drawn, LABEL, meaning=MEANING, extend="both" if beyond else "neither")
    return figure


def _height(token_map: TokenMap) -> float:
    return 1.2 + extent(len(token_map.tokens))


def _width(token_map: TokenMap) -> float:
    return 1.5 + extent(len(token_map.layers), each=0.2, least=2.8, most=9.0)


def _map(axes: Axes, token_map: TokenMap, norm: Normalize) -> ScalarMappable:
    image = layer_cells(
        axes, token_map.values, token_map.tokens, token_map.layers, subject=token_map.subject, cmap=CHANGED, norm=norm
    )
    axes.set_xlabel(token_map.layer_label, fontsize=9)
    if token_map.note:
        say_nothing(axes, token_map.note)
    headline(axes, "\n".join(line for line in (token_map.title, token_map.caption) if line))
    return image
