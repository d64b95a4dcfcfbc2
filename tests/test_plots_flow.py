"""Line figures: that they show the numbers, keep lines and panels apart, and survive awkward names."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn import png, summary
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ssm_interp.plots import MOST_GROUPS, STATISTICS, STYLES, depth_figure, features_figure, flow_figure, stream_figure
from ssm_interp.prompts import ROLES


def lines(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}


def bands(axes: Axes) -> dict[str, Any]:
    return {to_hex(band.get_facecolor()[0]).upper(): band.get_paths()[0].get_extents() for band in axes.collections}


def shown(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize("statistic", list(STATISTICS))
def test_a_panel_per_model_and_a_line_per_source_with_the_numbers(statistic: Any) -> None:
    frame, column = summary(["one", "two"], ["subject", "last"]), STATISTICS[statistic]
    figure = flow_figure(frame, x_labels={"one": "First layer", "two": "Centre layer"}, statistic=statistic)
    png(figure)
    assert [axes.get_title() for axes in figure.axes] == ["one   (12 prompts)", "two   (12 prompts)"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["First layer", "Centre layer"]
    assert figure.get_supylabel() == column.label.replace("the metric", "kl")
    assert figure.axes[0].get_ylabel() == "source → last"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["subject", "last"]
    assert figure.legends[0].get_title().get_text().endswith(f"(line: {column.line}, band: its 95 % interval)")
    scale = 100 if statistic == "accuracy" else 1
    for axes, model in zip(figure.axes, ["one", "two"], strict=True):
        assert any(np.all(np.asarray(line.get_ydata()) == column.unchanged) for line in axes.get_lines())
        for source in ("subject", "last"):
            rows = frame[(frame["model"] == model) & (frame["source"] == source)]
            np.testing.assert_allclose(lines(axes)[source].get_xdata(), rows["layer"])
            np.testing.assert_allclose(lines(axes)[source].get_ydata(), scale * rows[column.value])
            corners = bands(axes)[STYLES[source].colour]
            bounds = [scale * rows[column.low].min(), scale * rows[column.high].max()]
            np.testing.assert_allclose([corners.y0, corners.y1], bounds)


def test_a_row_per_target() -> None:
    figure = flow_figure(summary(["one", "two"], list(ROLES), ["last", "subject_last"]))
    png(figure)
    sides = [figure.axes[index].get_ylabel() for index in range(4)]
    assert sides == ["source → last", "", "source → subject last", ""]


def test_what_varies_beside_the_model_goes_down() -> None:
    frame = summary(["one", "two"], ["last"], groups=("fast", "slow"), sizes=(3, 1))
    figure = flow_figure(frame)
    png(figure)
    assert [axes.get_ylabel().split("\n") for axes in figure.axes[::2]] == [
        ["source → last", f"features: {group}", f"windows of {size}"]
        for size in ("1 layer", "3 layers")
        for group in ("fast", "slow")
    ]
    rows = frame[(frame["model"] == "two") & (frame["feature_group"] == "slow") & (frame["window_size"] == 3)]
    np.testing.assert_allclose(lines(figure.axes[-1])["last"].get_ydata(), rows["mean"])


def test_what_varies_first_in_one_model_goes_across_under_its_name() -> None:
    figure = flow_figure(summary(["one"], ["last"], ["last", "first"], groups=("fast", "slow")))
    png(figure)
    assert figure.get_suptitle() == "one   (12 prompts)"
    assert [axes.get_title() for axes in figure.axes] == ["features: fast", "features: slow", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["source → last", "source → first"]


@pytest.mark.parametrize(("count", "shape"), [(4, (1, 4)), (5, (2, 3)), (6, (2, 3)), (8, (2, 4)), (9, (3, 3))])
def test_a_long_row_of_panels_is_broken(count: int, shape: tuple[int, int]) -> None:
    figure = flow_figure(summary(["one"], ["last"], sizes=range(1, count + 1), layers=count))
    png(figure)
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    titles = [axes.get_title() for axes in shown(figure)]
    assert titles == ["windows of 1 layer", *(f"windows of {size} layers" for size in range(2, count + 1))]
    assert len({axes.get_ylim() for axes in shown(figure)}) == len({axes.get_xlim() for axes in shown(figure)}) == 1
    lowest = shown(figure)[-shape[1] :]
    words = [title.removeprefix("windows of ") for title in titles[-shape[1] :]]
    labels = ["Layer" if word == "1 layer" else f"Layer (first of the window, {word})" for word in words]
    assert [axes.get_xlabel() for axes in lowest] == labels
    assert all(axes.xaxis.get_major_ticks()[0].label1.get_visible() for axes in lowest)


def test_models_may_differ_in_their_one_window_size() -> None:
    frame = pd.concat([summary(["one"], ["last"], sizes=[1]), summary(["two"], ["last"], sizes=[2])])
    assert [axes.get_title() for axes in flow_figure(frame).axes] == ["one   (12 prompts)", "two   (12 prompts)"]


def test_windows_cut_off_at_the_ends_stay_in_their_line() -> None:
    frame = summary(["one"], ["last"], layers=5).assign(window_size=[2, 3, 3, 3, 2])
    (axes,) = flow_figure(frame).axes
    assert list(lines(axes)["last"].get_xdata()) == [0, 1, 2, 3, 4]
    both = pd.concat([frame, summary(["one"], ["last"], layers=5)])
    small, large = flow_figure(both).axes
    assert (small.get_title(), large.get_title()) == ("windows of 1 layer", "windows of 3 layers")
    np.testing.assert_allclose(lines(large)["last"].get_ydata(), frame["mean"])


@pytest.mark.parametrize("draw", [flow_figure, depth_figure])
def test_lines_are_drawn_in_the_order_of_the_layers(draw: Any) -> None:
    frame = summary(["last"], ["last"]).sample(frac=1, random_state=1)
    x = lines(draw(frame).axes[0])["last"].get_xdata()
    np.testing.assert_allclose(x, [0, 1, 2, 3] if draw is flow_figure else [0, 100 / 3, 200 / 3, 100])


@pytest.mark.parametrize("layers", [1, 2, 64])
@pytest.mark.parametrize("draw", [flow_figure, depth_figure])
def test_one_window_one_prompt_and_an_odd_name(draw: Any, layers: int) -> None:
    frame = summary(["a$b_c/" * 9], ["unheard_of"], layers=layers).assign(n=1, low=np.nan, high=np.nan)
    figure = draw(frame)
    png(figure)
    name = figure.axes[0].get_title() if draw is flow_figure else figure.legends[0].get_texts()[0].get_text()
    assert name.startswith("…")
    assert name.endswith("(1 prompt)")
    assert figure.legends[0].get_title().get_text().endswith("(line: mean over prompts)")


def test_token_positions_as_sources_are_told_apart() -> None:
    figure = flow_figure(summary(["one"], [str(position) for position in range(12)]))
    png(figure)
    assert len({line.get_color() for line in lines(figure.axes[0]).values()}) == 12
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["token 0", "token 1"]


def test_a_panel_in_axes_of_ones_own() -> None:
    figure, frame = Figure(), summary(["one"], ["subject", "last"])
    left, right = figure.subplots(1, 2)
    assert flow_figure(frame, ax=right, x_labels={"one": "Here"}) is figure
    png(figure)
    assert (len(lines(left)), set(lines(right))) == (0, {"subject", "last"})
    assert (right.get_xlabel(), right.get_ylabel().splitlines()[1]) == ("Here", "source → last")
    with pytest.raises(ValueError, match="one panel, but this summary fills 4: it differs in feature_group and more"):
        flow_figure(summary(["one"], ["last"], ["last", "first"], groups=("a", "b")), ax=left)


@pytest.mark.parametrize("count", [2, 8])
def test_models_over_depth(count: int) -> None:
    names = [f"state-spaces/mamba_{index}" for index in range(count)]
    frame = pd.concat(
        [summary([name], ["subject", "last"], layers=5 + 4 * index, sizes=[3]) for index, name in enumerate(names)]
    )
    figure = depth_figure(frame)
    png(figure)
    assert [axes.get_title() for axes in figure.axes] == ["source: subject", "source: last"]
    assert figure.axes[0].get_ylabel() == "source → last"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{name}  (12 prompts)" for name in names]
    looks = [(line.get_color(), line.get_marker()) for line in lines(figure.axes[1]).values()]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == count
    for index, name in enumerate(names):
        rows = frame[(frame["model"] == name) & (frame["source"] == "last")]
        np.testing.assert_allclose(lines(figure.axes[1])[name].get_xdata(), np.linspace(0, 100, 3 + 4 * index))
        np.testing.assert_allclose(lines(figure.axes[1])[name].get_ydata(), rows["mean"])


def test_depth_has_rows_for_the_rest_and_knows_layer_numbers() -> None:
    frame = summary(["one", "two"], ["subject", "last"], ["last", "first"], groups=("a", "b"))
    figure = depth_figure(frame.assign(layer=frame["layer"].map({0: 1, 1: 2, 2: 4, 3: 9})), statistic="accuracy")
    png(figure)
    sides = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert sides == [f"source → {target}\nfeatures: {group}" for target in ("last", "first") for group in "ab"]
    np.testing.assert_allclose(lines(figure.axes[0])["one"].get_xdata(), [0, 12.5, 37.5, 100])


def flat(sources: list[str], values: list[list[float]]) -> pd.DataFrame:
    """A summary with these means, per source and layer, and intervals of no width."""
    frame, numbers = summary(["one"], sources, layers=len(values[0])), np.ravel(values)
    return frame.assign(mean=numbers, low=numbers, high=numbers)


def stripes(axes: Axes) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_label() == "_hidden"]


def test_a_line_that_others_hide_stands_out_on_both_sides() -> None:
    figure = flow_figure(flat(["subject", "relation", "last"], [[0, 0, 0, -80], [0, 0.1, -40, 0], [0, 0, 0, -40]]))
    png(figure)
    drawn = [(line.get_color(), *line.get_xydata()[:2, 0], line.get_linewidth()) for line in stripes(figure.axes[0])]
    widest, two = sorted({width for *_, width in drawn}, reverse=True)
    assert drawn == [
        (STYLES["subject"].colour, 1, 2, two),  # under the last one alone
        (STYLES["subject"].colour, 0, 1, widest),
        (STYLES["relation"].colour, 0, 1, two),
    ]
    assert two > lines(figure.axes[0])["last"].get_linewidth()
    assert figure.legends[0].get_title().get_text().endswith("\nstripes: lines on top of each other")
    apart = flow_figure(flat(["subject", "last"], [[0, -40], [-40, 0]]))  # they cross, and are both seen
    assert not stripes(apart.axes[0])
    assert "stripes" not in apart.legends[0].get_title().get_text()


def test_noise_does_not_fill_its_axes_and_rows_have_one_scale() -> None:
    quiet = flat(["subject"], [[0.001, -0.002]])
    low, high = flow_figure(quiet).axes[0].get_ylim()
    assert low <= -5 and high >= 5
    loud = flat(["subject"], [[0, -80]])
    both = pd.concat([loud, quiet.assign(feature_group="bottom third"), loud.assign(target="first")])
    for draw in (flow_figure, features_figure, depth_figure):
        figure = draw(pd.concat([both, both.assign(model="two")]))
        png(figure)
        assert len({axes.get_ylim() for axes in shown(figure)}) == 1


def test_centred_windows_say_so_on_the_layer_axis() -> None:
    centred = summary(["one"], ["last"], layers=5).assign(window_size=[2, 3, 3, 3, 2], window_start=[0, 0, 1, 2, 3])
    assert flow_figure(centred).axes[0].get_xlabel() == "Layer (centre of the window, 3 layers)"
    depth = depth_figure(centred).axes[0].get_xlabel()
    assert depth == "Layer depth in %\n(0: the model's first window, 100: its last)"


@pytest.mark.parametrize("draw", [flow_figure, depth_figure])
def test_a_summary_that_cannot_be_drawn_is_refused(draw: Any) -> None:
    frame = summary(["one"], ["last"])
    with pytest.raises(ValueError, match=r"these are missing: \['feature_group', 'low', 'high'\]"):
        draw(frame.drop(columns=["low", "high", "feature_group"]))
    with pytest.raises(ValueError, match="the summary is empty"):
        draw(frame.head(0))


def test_more_models_than_styles_are_refused() -> None:
    with pytest.raises(ValueError, match="10 models cannot be told apart in one picture; draw at most 9"):
        depth_figure(summary([f"m{index}" for index in range(10)], ["last"]))


def test_feature_groups_share_axes_a_panel_per_model() -> None:
    groups = ("all", "top third", "all but middle third by half-life")
    frame = summary(["one", "two"], ["subject_last"], groups=groups)
    figure = features_figure(frame, x_labels={"one": "First layer"}, statistic="median")
    png(figure)
    assert [axes.get_title() for axes in figure.axes] == ["one   (12 prompts)", "two   (12 prompts)"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["First layer", "Layer"]
    assert figure.axes[0].get_ylabel() == "subject last → last"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(groups)
    for axes, model in zip(figure.axes, ["one", "two"], strict=True):
        for group in groups:
            rows = frame[(frame["model"] == model) & (frame["feature_group"] == group)]
            np.testing.assert_allclose(lines(axes)[group].get_ydata(), rows["median"])
    assert lines(figure.axes[0])["all"].get_color() == STYLES["all"].colour
    colours = [line.get_color() for line in lines(figure.axes[0]).values()]
    assert len(set(colours)) == len(groups)


def test_sources_and_targets_of_feature_groups_go_down() -> None:
    figure = features_figure(summary(["one"], ["subject", "first"], ["last", "relation"], groups=("a", "b")))
    png(figure)
    sides = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert sides == [f"source → {target}" for target in ("last", "relation")]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["source: subject", "source: first"]
    several = summary(["one", "two"], ["subject", "first"], groups=("a", "b"))
    sides = [axes.get_ylabel() for axes in features_figure(several).axes if axes.get_ylabel()]
    assert sides == ["subject → last", "first → last"]
    with pytest.raises(ValueError, match=f"{MOST_GROUPS + 1} feature groups cannot be told apart in one picture"):
        features_figure(summary(["one"], ["last"], groups=tuple(map(str, range(MOST_GROUPS + 1)))))


def test_streams_have_a_row_per_model_and_feature_group() -> None:
    parts = [
        summary(["one", "two"], ["subject"], groups=["all", "top third"]).assign(through=t) for t in ("ssm", "conv")
    ]
    figure = stream_figure(pd.concat(parts))
    png(figure)
    assert figure.get_suptitle() == "2 models   (12 prompts)"
    assert len(figure.axes) == 4  # a line of its own for each stream in every panel
    assert {len(lines(axes)) for axes in figure.axes} == {2}
    assert "features: top third" in figure.axes[1].get_ylabel()
