"""What all pictures share: colours and markers, words, and files that come out the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.legend import Legend

from ssm_interp.errors import PlotError

INK, FAINT = "#222222", "#DDDDDD"
# Blue supports the answer and red opposes it, in every map and circuit: what is written is blue where it is positive,
# what a knockout changes is blue where it is a loss. Sizes, which have no sign, are blues.
WRITTEN, CHANGED, SIZES = "RdBu", "RdBu_r", "Blues"
SUPPORTS, OPPOSES, NEITHER = "#2166AC", "#B2182B", "#777777"  # of the same scale
MONO = "DejaVu Sans Mono"
ARROW = "\N{RIGHTWARDS ARROW}"
MOST_LABELS = 64  # more tokens than these on one axis could not be read


class Style(NamedTuple):
    """How a line is told apart: by colour with any colour vision, by marker and dash in grey print."""

    colour: str
    marker: str
    dash: Any


# Okabe and Ito's colours, and two of Tol's.
STYLES: Mapping[str, Style] = {
    "subject": Style("#0072B2", "o", "-"),
    "relation": Style("#D55E00", "s", "--"),
    "first": Style("#009E73", "^", ":"),
    "last": Style("#CC79A7", "D", "-."),
    "context": Style("#E69F00", "v", (0, (5, 1))),
    "all": Style("#000000", "X", "-"),
    "relation_minus_last": Style("#A0522D", "P", (0, (3, 1, 1, 1))),
    "subject_first": Style("#56B4E9", "<", (0, (1, 1))),
    "subject_last": Style("#332288", ">", (0, (4, 2))),
}


MOST_GROUPS = len(STYLES)


def source_styles(sources: Iterable[str]) -> dict[str, Style]:
    """A style per source: a role's own; token positions run through a colour ramp in their order."""
    sources = list(sources)
    others, roles = [source for source in sources if source not in STYLES], list(STYLES.values())
    ramp = colormaps["viridis"]
    spare = {
        other: Style(to_hex(ramp(0.9 * rank / max(1, len(others) - 1))), roles[rank % len(roles)].marker, "-")
        for rank, other in enumerate(others)
    }
    return {source: STYLES.get(source) or spare[source] for source in sources}


def model_styles(models: Iterable[str]) -> dict[str, Style]:
    """A style per model, in their order.

    Raises:
        PlotError: more models than there are styles.
    """
    models, styles = list(models), list(STYLES.values())
    if len(models) > len(styles):
        raise PlotError(f"{len(models)} models cannot be told apart in one picture; draw at most {len(styles)}")
    return dict(zip(models, styles, strict=False))


def group_styles(groups: Iterable[str]) -> dict[str, Style]:
    """A style per feature group, in their order; that of all features is the role's of all tokens, black.

    Raises:
        PlotError: more groups than there are styles.
    """
    groups = list(groups)
    spare = iter([style for name, style in STYLES.items() if name != "all"])
    if len(groups) > MOST_GROUPS:
        raise PlotError(f"{len(groups)} feature groups cannot be told apart in one picture; draw at most {MOST_GROUPS}")
    return {group: STYLES["all"] if group == "all" else next(spare, STYLES["all"]) for group in groups}


class Picture(Figure):
    """A figure whose SVG keeps text as text, and whose files are the same each time they are written."""

    def savefig(self, fname: Any, **options: Any) -> None:
        kind = options.get("format") or (Path(fname).suffix[1:] if isinstance(fname, str | Path) else "")
        if kind.lower() == "svg":
            options["metadata"] = {"Date": None} | (options.get("metadata") or {})
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ssm_interp"}):
            super().savefig(fname, **options)


def picture(width: float, height: float) -> Picture:
    """An empty figure of this size in inches."""
    return Picture(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def plain(axes: Axes) -> None:
    """Take away what is not data: the frame's upper right half, dark ticks."""
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def headline(artist: Axes | Figure, text: str, size: float = 10.0) -> None:
    """A title over a panel, or over all of them, in as many lines as it takes."""
    inches = artist.figure.figure.get_figwidth()
    if isinstance(artist, Axes):
        inches *= 1.25 * artist.get_position().width  # it may stand out on both sides
    lines = (fill(line, max(20, int(120 / size * inches))) for line in printable(text).splitlines())
    write: Callable[..., object] = artist.suptitle if isinstance(artist, Figure) else artist.set_title
    write("\n".join(lines), fontsize=size, color=INK, parse_math=False)


def legend(artist: Axes | Figure | SubFigure, handles: Sequence[Any], names: Iterable[str], **options: Any) -> Legend:
    """A legend whose names are what they are: no formulas, and none left out for its first letter."""
    box = artist.legend(handles, [""] * len(handles), **({"frameon": False, "fontsize": 9} | options))
    for text, name in zip(box.get_texts(), names, strict=True):
        text.set(text=printable(name), parse_math=False)
    box.get_title().set_multialignment("center")
    return box


def short(name: str, most: int = 36) -> str:
    """A name that fits over a panel; of a longer one its end, which says most."""
    name = printable(name)
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def signed(value: float, _: object = None) -> str:
    """A tick label: +1, −1, 0."""
    return f"{value:+.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def sign_colour(change: float) -> str:
    """The colour of what changes a metric so when it is removed."""
    return SUPPORTS if change < 0 else OPPOSES if change > 0 else NEITHER


def readable(source: str) -> str:
    """A role or a token position in words."""
    return f"token {source}" if source.isdigit() else printable(source).replace("_", " ")


def token_label(token: str) -> str:
    """A token as a tick label: spaces as middle dots, line breaks and characters that the font lacks as escapes.

    Example:
        >>> token_label(" is"), token_label("\\n")
        ('·is', '\\\\n')
    """
    shown = printable(token.replace(" ", "·"), MONO, breaks=False)
    return shown if len(shown) <= 18 else shown[:17] + "…"


def printable(text: str, font: str | None = None, *, breaks: bool = True) -> str:
    """A text whose characters the font lacks are written as escapes; line breaks are kept, or escaped too."""
    known = _glyphs(findfont(FontProperties(family=font)))
    kept = "\n" if breaks else ""
    return "".join(c if c in kept or ord(c) in known else c.encode("unicode_escape").decode() for c in text)


@cache
def _glyphs(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())
