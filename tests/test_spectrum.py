"""The decay spectrum, against loops over Python floats; padding, bad input, table, picture."""

from __future__ import annotations

import math
from statistics import fmean, geometric_mean, pstdev
from typing import Any

import pandas as pd
import pytest
import torch
from drawn import png
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from random_terms import LENGTHS, SHAPES, error, random_terms
from test_softmax import transformer
from tiny_flow import word_tokenizer
from tiny_hosts import NAMES, build, inputs, padded, tokens_of

import ssm_interp as si
from ssm_interp.features import STATISTICS, FeatureError, Spectrum, decay_norms, spectrum
from ssm_interp.plots import quantiles, spectrum_figure
from ssm_interp.prompts import Prompt, pad, tokenize
from ssm_interp.scan import TermsError, distance_sums
from ssm_interp.scan.naive import naive_attention

ROWS = [9, 1, 4, 9]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_distance_sums_are_those_of_the_matrix(shape: str, length: int) -> None:
    terms = random_terms(shape, length)
    M = naive_attention(terms).abs()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    weighted, total = distance_sums(terms)
    assert error(weighted, (M * distance).sum((2, 3))) < 1e-12
    assert error(total, M.sum((2, 3))) < 1e-12


def test_distance_sums_do_not_depend_on_the_block_and_refuse_an_odd_one() -> None:
    terms = random_terms("mamba2-g2", 257)
    for one, other in zip(distance_sums(terms, block=8), distance_sums(terms, block=64), strict=True):
        assert error(one, other) < 1e-12
    with pytest.raises(TermsError, match="power of two"):
        distance_sums(terms, block=3)


def by_hand(ssm: si.Attachment, rows: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Every statistic from the definitions, one text at a time."""
    runs = [ssm.run(row, read=["dt", "attn"]) for row in rows]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in STATISTICS}
    for layer, mixer in ssm.mixers.items():
        heads = ssm.layers[layer].heads
        A = (-mixer.A_log.detach().float().exp()).double().reshape(heads, -1).tolist()  # fp32, as the hosts have it
        columns: dict[str, list[float]] = {name: [] for name in STATISTICS}
        for head, rates in enumerate(A):
            steps = [step for run in runs for step in run["dt", layer][0, :, head].tolist()]
            mean = fmean(steps)
            matrices = [run["attn", layer][0, head].abs().tolist() for run in runs]
            edges = [(t - s, m) for M in matrices for t, row in enumerate(M) for s, m in enumerate(row)]
            columns["decay norm"].append(sum(math.exp(a) for a in rates))
            columns["effective decay"].append(fmean(math.exp(a * step) for a in rates for step in steps))
            columns["half-life"].append(geometric_mean(math.log(2) / (-a * mean) for a in rates))
            columns["mean distance"].append(sum(d * m for d, m in edges) / sum(m for _, m in edges))
            columns["mean dt"].append(mean)
            columns["dt variation"].append(pstdev(steps) / mean)
        for name in STATISTICS:
            found[name][layer] = columns[name]
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_statistics_are_those_of_the_definitions_and_padding_never_counts(name: str) -> None:
    with si.attach(build(name, dtype=torch.float64), own_operator=True) as ssm:
        batch = padded(ROWS, side="left")
        expected = by_hand(ssm, [tokens_of(batch, row) for row in range(len(ROWS))])
        for side, size in (("left", 32), ("right", 1)):
            found = spectrum(ssm, padded(ROWS, side=side), batch_size=size)
            assert found.n_tokens == sum(ROWS)
            assert list(found.statistics) == list(STATISTICS)
            for statistic, layers in expected.items():
                assert list(found[statistic]) == list(ssm.layers)
                for layer, values in layers.items():
                    exact = torch.tensor(values, dtype=torch.float64)
                    bound = 1e-6 if statistic == "decay norm" else 1e-12
                    assert error(found[statistic][layer], exact) < bound, (statistic, layer)


def test_single_precision_and_the_hosts_own_operator_agree_with_double(host: Any) -> None:
    batch = inputs(batch=3, length=7)
    with si.attach(host) as ssm:
        found = spectrum(ssm, batch)
    with si.attach(build(host.config.model_type, dtype=torch.float64), own_operator=True) as ssm:
        expected = spectrum(ssm, batch)
    for statistic in STATISTICS:
        for layer, values in expected[statistic].items():
            assert error(found[statistic][layer], values) < 1e-4, (statistic, layer)


def test_one_padded_text_alone() -> None:
    with si.attach(build("mamba")) as ssm:
        batch = padded([4, 9], side="left")
        alone = {name: tensor[:1] for name, tensor in batch.items()}
        found, expected = spectrum(ssm, alone), spectrum(ssm, tokens_of(batch, 0)["input_ids"])
    assert found.n_tokens == 4
    assert torch.equal(found["mean distance"][0], expected["mean distance"][0])


def test_state_dimensions_one_by_one() -> None:
    with si.attach(build("mamba", dtype=torch.float64)) as ssm:
        found = spectrum(ssm, inputs(), statistics=["half-life", "effective decay"])
        points = ssm.layers[0]
    assert list(found.statistics) == ["effective decay", "half-life"]
    half_life, decay = found.by_state["half-life"][0], found.by_state["effective decay"][0]
    assert half_life.shape == decay.shape == (points.heads, points.state_size)
    assert error(half_life.log().mean(1).exp(), found["half-life"][0]) < 1e-12
    assert error(decay.mean(1), found["effective decay"][0]) < 1e-12
    with si.attach(build("mamba2")) as ssm:
        assert spectrum(ssm, inputs()).by_state["half-life"][0].shape == (8, 1)


def test_the_weights_alone() -> None:
    with si.attach(build("bamba")) as ssm:
        found, norms = spectrum(ssm, name="mine"), decay_norms(ssm)
    assert (found.model, found.n_tokens, list(found.statistics)) == ("mine", 0, ["decay norm"])
    assert all(torch.equal(found["decay norm"][layer], norms[layer]) for layer in norms)
    with pytest.raises(FeatureError, match=r"half-life was not measured, only decay norm; give spectrum\(ssm, inputs"):
        found["half-life"]


def test_it_takes_batches_of_prompts_and_what_else_a_tokenizer_gives() -> None:
    tokenizer = word_tokenizer()
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:6]
    prompts = [Prompt(" ".join(words[:count]), words[0], words[5]) for count in (3, 5, 4)]
    batch = pad([tokenize(prompt, tokenizer) for prompt in prompts])
    with si.attach(build("mamba2")) as ssm:
        found = spectrum(ssm, batch)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": None}
        again = spectrum(ssm, given | {"position_ids": batch.attention_mask.cumsum(1)})
    assert found.n_tokens == 12
    pd.testing.assert_frame_equal(found.frame, again.frame)


def test_nothing_is_left_behind() -> None:
    model = build("mamba")
    batch = inputs()
    before = model(**batch).logits
    with si.attach(model) as ssm:
        spectrum(ssm, batch)
        points = [point for layer in ssm.layers.values() for point in layer.points()]
        assert not any(point._forward_hooks for point in points)
        assert torch.equal(model(**batch).logits, before)


def test_a_step_that_is_always_zero_has_no_end_and_no_variation() -> None:
    model = build("mamba2")
    with torch.no_grad():
        model.backbone.layers[1].mixer.dt_bias.fill_(-1e9)  # softplus gives 0
    with si.attach(model) as ssm:
        found = spectrum(ssm, inputs())
        assert found["half-life"][1].isinf().all() and found["mean distance"][1].isnan().all()
        assert found["dt variation"][1].isnan().all() and found["half-life"][0].isfinite().all()
        with pytest.raises(FeatureError, match="the mean distance of layer 1 is not finite for 8 of its 8 features"):
            si.features.feature_groups(ssm, ["top third by mean distance"], statistics=found.statistics)
        png(found.plot())


def measured(*names: str) -> list[Spectrum]:
    found = []
    for name in names:
        with si.attach(build(name)) as ssm:
            found.append(spectrum(ssm, inputs(), name=name))
    return found


def test_the_table_and_its_quantiles() -> None:
    (found,) = measured("nemotron_h")
    frame = found.frame
    assert list(frame.columns) == ["model", "layer", "feature", "statistic", "value"]
    assert len(frame) == len(STATISTICS) * sum(len(values) for values in found["mean dt"].values())
    row = frame[(frame["statistic"] == "mean dt") & (frame["layer"] == 0) & (frame["feature"] == 3)]
    assert row["value"].item() == found["mean dt"][0][3]
    table = found.quantiles([0.0, 0.5, 1.0])
    one = table[(table["statistic"] == "half-life") & (table["layer"] == 0)]
    values = found["half-life"][0].sort().values
    assert one["quantile"].tolist() == [0, 0.5, 1]
    assert one["value"].tolist()[::2] == [values[0], values[-1]]
    assert one["value"].tolist()[1] in values
    assert set(table["model"]) == {"nemotron_h"}
    for q in ([], [0.5, 1.5], [-1.0]):
        with pytest.raises(ValueError, match=r"quantiles are numbers in \[0, 1\], at least one"):
            found.quantiles(q)
    with pytest.raises(ValueError, match=r"these are missing: \['value'\]"):
        quantiles(frame.drop(columns="value"))
    with pytest.raises(ValueError, match="the table is empty"):
        quantiles(frame[:0])


def test_the_picture_has_a_row_per_statistic_and_a_column_per_model() -> None:
    found = measured("mamba", "mamba2")
    frame = pd.concat([one.frame for one in found])
    figure = spectrum_figure(frame)
    png(figure)
    grid = [figure.axes[row * 2 : row * 2 + 2] for row in range(len(STATISTICS))]
    assert [axes.get_title() for axes in grid[0]] == ["mamba   (64 features a layer)", "mamba2   (8 features a layer)"]
    for row, statistic in zip(grid, STATISTICS, strict=True):
        for axes, one in zip(row, found, strict=True):
            table = one.quantiles([0.5])
            expected = table[table["statistic"] == statistic]["value"].tolist()
            assert axes.get_lines()[0].get_ydata().tolist() == expected
            assert axes.get_yscale() == ("log" if statistic in ("decay norm", "half-life", "mean dt") else "linear")
        shared = row[0].get_ylim() == row[1].get_ylim()
        assert shared == (statistic != "decay norm")
    (legend,) = figure.legends
    colours = [axes.get_lines()[0].get_color() for axes in grid[0]]
    assert [line.get_color() for line in legend.findobj(Line2D)] == colours  # a line and two bands of each model
    bands = [to_hex(band.get_facecolor()[:3]).upper() for band in legend.findobj(Rectangle)]
    assert bands == colours * 2
    assert found[0].plot().get_suptitle() == f"measured on {found[0].n_tokens} tokens"


INPUTS: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"statistics": ["half-life"]}, r"half-life depends on what the model reads; give spectrum\(ssm, inputs\)"),
    (inputs(), {"statistics": ["halflife"]}, "no statistic 'halflife': did you mean 'half-life'"),
    (inputs(), {"statistics": []}, "no statistic was asked for"),
    (inputs(), {"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
    ("a text", {}, "inputs must be ids .*, got str"),
    ({"attention_mask": torch.ones(2, 3)}, {}, r"inputs must have input_ids .*; these have \['attention_mask'\]"),
    ({"input_ids": [[1, 2]]}, {}, "got list; with a tokenizer give return_tensors='pt'"),
    (torch.ones(2, 3), {}, r"got torch.float32 \[2, 3\]"),
    (torch.ones(3, dtype=torch.int64), {}, r"got torch.int64 \[3\]"),
    (torch.ones(2, 0, dtype=torch.int64), {}, r"input_ids is empty, \[2, 0\]"),
    (inputs() | {"attention_mask": torch.ones(2, 3)}, {}, r"attention_mask must be .* \(\[2, 9\]\), got \[2, 3\]"),
    (inputs() | {"use_cache": True}, {}, "use_cache must be a tensor with a number per token, .* got bool"),
    (
        inputs() | {"attention_mask": torch.tensor([[1] * 9, [0] * 9])},
        {},
        "with a token in every row; row 1 is all padding",
    ),
    (inputs() | {"attention_mask": torch.tensor([[1] * 9, [1, 0] + [1] * 7])}, {}, "row 1 .* padding between tokens"),
]


@pytest.mark.parametrize(("given", "options", "message"), INPUTS)
def test_bad_input(given: Any, options: dict[str, Any], message: str) -> None:
    with si.attach(build("mamba")) as ssm, pytest.raises(FeatureError, match=message):
        spectrum(ssm, given, **options)


def test_what_has_no_spectrum() -> None:
    with si.attach(transformer("gpt2")) as ssm, pytest.raises(FeatureError, match="GPT2LMHeadModel has no SSM layers"):
        spectrum(ssm)
    with pytest.raises(FeatureError, match="this attachment was detached"):
        spectrum(ssm)
    with (
        si.attach(build("mamba")) as ssm,
        ssm.edit(si.SetDelta(value=1.0)),
        pytest.raises(FeatureError, match="leave the block of"),
    ):
        spectrum(ssm, inputs())
