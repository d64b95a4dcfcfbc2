"""Interventions on real models, against the slow way: the materialised matrix edited by hand, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import edited, logits, relative_error, zeroed_edges
from tiny_hosts import NAMES, build, inputs, padded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssm_interp as si
from ssm_interp.hooks.rows.engine import run_each

EXACT = 1e-10
LENGTH = 8


def exact_model(name: str) -> si.Attachment:
    """In float64 with the library's recurrence: nothing but the norms rounds to float32, alike on both sides."""
    return si.attach(build(name, dtype=torch.float64), own_operator=True)


def heads_of(ssm: si.Attachment, layer: int) -> int:
    return ssm.layers[layer].heads


def mask_of(targets: list[int], sources: list[int], batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, 1, LENGTH, LENGTH, dtype=torch.bool)
    for target, source in itertools.product(targets, sources):
        mask[:, :, target, source] = True
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_a_knockout_zeroes_entries_of_the_matrix(name: str) -> None:
    ssm = exact_model(name)
    layer = max(ssm.layers)
    case = inputs(2, LENGTH)
    native = logits(ssm.model, case)
    for sources, targets in ([[1, 2], [-1]], [[0], [3, 5]], [[4, 5, 6], [4, 5, 6]], [[7], [7]]):
        with zeroed_edges(ssm, layer, mask_of([t % LENGTH for t in targets], sources)):
            known = logits(ssm.model, case)
        found = edited(ssm, case, si.Knockout(sources=sources, targets=targets, layers=layer))
        assert relative_error(found, known) <= 1e-7, (sources, targets)
        first = min(t % LENGTH for t in targets)
        assert torch.equal(found[:, :first], native[:, :first])
        assert relative_error(found, native) > 1e-4


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba", "falcon_h1"])
def test_knockouts_in_each_row_and_on_features(name: str) -> None:
    ssm = exact_model(name)
    layer, heads = max(ssm.layers), heads_of(ssm, max(ssm.layers))
    case = inputs(2, LENGTH)
    some = list(range(0, heads, 3))
    by_row = si.Knockout(sources=[[1, 2], [0]], targets=[[7], [5, 6]], layers=layer, features=some)
    mask = torch.cat([mask_of([7], [1, 2], 1), mask_of([5, 6], [0], 1)])
    chosen = torch.zeros(heads, dtype=torch.bool)
    chosen[some] = True
    ssm.layers[layer].hook_attn.add_hook(lambda attn, hook: torch.where(mask & chosen[:, None, None], 0.0, attn))
    known = logits(ssm.model, case)
    ssm.layers[layer].hook_attn.remove_hooks()
    assert relative_error(edited(ssm, case, by_row), known) <= 1e-7


def test_pairs_partition_a_head() -> None:
    """Knocking out all (head, state) pairs of a head, in two halves or at once, knocks out the head."""
    for name in ("mamba", "mamba2"):
        ssm = exact_model(name)
        points, case = ssm.layers[1], inputs(2, LENGTH)
        pairs = [(3, n) for n in range(points.state_size)]
        options = {"sources": [1, 2], "targets": [5, 6], "layers": 1}
        whole = edited(ssm, case, si.Knockout(features=3, **options))
        at_once = edited(ssm, case, si.Knockout(features=pairs, **options))
        halves = edited(
            ssm, case, si.Knockout(features=pairs[::2], **options), si.Knockout(features=pairs[1::2], **options)
        )
        assert relative_error(at_once, whole) <= EXACT
        assert relative_error(halves, whole) <= EXACT
        assert relative_error(edited(ssm, case, si.Knockout(features=pairs[::2], **options)), whole) > 1e-6


def test_overlapping_knockouts_remove_an_edge_once() -> None:
    ssm = exact_model("mamba2")
    case = inputs(2, LENGTH)
    one = si.Knockout(sources=[1, 2, 3], targets=[5, 6, 7])
    parts = [si.Knockout(sources=[1, 2], targets=[5, 6, 7]), si.Knockout(sources=[2, 3], targets=[5, 6, 7])]
    mixed = [si.Knockout(sources=[1, 2, 3], targets=[5, 6, 7], features=[0, 1]), one]
    known = edited(ssm, case, one)
    assert relative_error(edited(ssm, case, *parts), known) <= EXACT
    assert relative_error(edited(ssm, case, *mixed), known) <= EXACT
    assert relative_error(edited(ssm, case, one, one), known) <= EXACT


def test_listed_edges_are_not_widened_to_a_product() -> None:
    ssm = exact_model("mamba")
    case = inputs(2, LENGTH)
    mask = mask_of([5], [1]) | mask_of([7], [2])
    with zeroed_edges(ssm, 2, mask):
        known = logits(ssm.model, case)
    assert relative_error(edited(ssm, case, si.Knockout(edges=[(5, 1), (-1, 2)], layers=2)), known) <= 1e-7


def test_absent_edges_change_nothing(host) -> None:  # noqa: ANN001
    native = logits(host, inputs(2, LENGTH))
    with si.attach(host) as ssm:
        for nothing in (
            si.Knockout(sources=[[], []], targets=-1),
            si.Knockout(sources=[3], targets=[[], []]),
        ):
            assert relative_error(edited(ssm, inputs(2, LENGTH), nothing), native) <= 5e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_gives_what_its_rows_give_alone(name: str, side: str) -> None:
    lengths = [8, 5]
    case = padded(lengths, side=side)
    with si.attach(build(name)) as ssm:
        shift = [0, 3 if side == "left" else 0]
        sources = [[shift[row] + s for s in (1, 2)] for row in range(2)]
        targets = [[shift[row] + length - 1] for row, length in enumerate(lengths)]
        found = edited(ssm, case, si.Knockout(sources=sources, targets=targets))
        for row in range(2):
            alone = {"input_ids": case["input_ids"][row, case["attention_mask"][row].bool()][None]}
            known = edited(ssm, alone, si.Knockout(sources=[1, 2], targets=-1))
            assert relative_error(found[row, case["attention_mask"][row].bool()], known[0]) <= 1e-5


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba"])
def test_patching_a_state(name: str) -> None:
    """A state patched with that of another prompt: what follows sees the other prompt's recurrence."""
    ssm = exact_model(name)
    layer = max(ssm.layers)
    case, other = inputs(2, LENGTH), inputs(2, LENGTH, seed=5)
    with torch.no_grad():
        clean = ssm.run(case, read=["x", "dt", "B", "C", "state", "y"], layers=layer)
        donor = ssm.run(other, read="state", layers=layer)["state", layer][:, 3]
        with ssm.edit(si.PatchState(position=3, state=donor, layers=layer)):
            patched = ssm.run(case, read=["state", "y"], layers=layer)
        with ssm.edit(si.PatchState(position=3, state=clean["state", layer][:, 3], layers=layer)):
            assert relative_error(ssm.run(case).logits, clean.logits) <= EXACT
    known = clean["state", layer].clone()
    known[:, 3] = donor
    A = -ssm.mixers[layer].A_log.detach().double().exp().reshape(heads_of(ssm, layer), -1)
    B = clean["B", layer].repeat_interleave(heads_of(ssm, layer) // clean["B", layer].shape[2], dim=2)
    C = clean["C", layer].repeat_interleave(heads_of(ssm, layer) // clean["C", layer].shape[2], dim=2)
    for t in range(4, LENGTH):
        dt = clean["dt", layer][:, t]
        write = torch.einsum("bh,bhp,bhn->bhpn", dt, clean["x", layer][:, t], B[:, t])
        known[:, t] = (dt[..., None] * A).exp()[:, :, None] * known[:, t - 1] + write
    assert relative_error(patched["state", layer], known) <= 1e-7
    y = torch.einsum("bthpn,bthn->bthp", known, C)
    assert relative_error(patched["y", layer], y) <= 1e-7
    assert relative_error(patched["y", layer][:, :3], clean["y", layer][:, :3]) <= EXACT


def test_wiping_the_state_is_knocking_out_all_edges_across() -> None:
    for name in ("mamba", "mamba2"):
        ssm = exact_model(name)
        case = inputs(2, LENGTH)
        wiped = edited(ssm, case, si.PatchState(position=3, state=0.0, features=[0, 2], layers=1))
        across = si.Knockout(sources=range(4), targets=range(3, LENGTH), features=[0, 2], layers=1)
        assert relative_error(wiped, edited(ssm, case, across)) <= EXACT
        inside = si.Knockout(sources=[1, 5], targets=[6, 7], layers=1)
        both = edited(ssm, case, si.PatchState(position=3, state=0.0, features=[0, 2], layers=1), inside)
        assert relative_error(both, edited(ssm, case, across, inside)) <= EXACT


def test_patches_of_single_rows() -> None:
    ssm = exact_model("mamba2")
    case = inputs(2, LENGTH)
    states = torch.randn(2, *(getattr(ssm.layers[0], name) for name in ("heads", "head_dim", "state_size")))
    by_row = edited(ssm, case, si.PatchState(position=[[2], [-3]], state=states, layers=0))
    for row, position in enumerate((2, 5)):
        alone = edited(ssm, case, si.PatchState(position=position, state=states[row], layers=0))
        assert relative_error(by_row[row], alone[row]) <= EXACT
    with pytest.raises(si.InterventionError, match="PatchState.position names the positions of 3 rows, but the batch"):
        edited(ssm, case, si.PatchState(position=[[2], [3], [4]], state=0.0))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("rows", [False, True])
def test_a_patch_at_several_positions_is_one_at_each_in_every_row(name: str, rows: bool) -> None:
    ssm = exact_model(name)
    case = inputs(2, LENGTH)  # as many rows as positions: a flat list is none per row
    shape = [getattr(ssm.layers[0], name) for name in ("heads", "head_dim", "state_size")]
    state = torch.randn(*[2] * rows, *shape)
    several = edited(ssm, case, si.PatchState(position=[-3, 2], state=state, layers=1))
    each = [si.PatchState(position=position, state=state, layers=1) for position in (2, 5)]
    assert relative_error(several, edited(ssm, case, *each)) <= EXACT
    nested = si.PatchState(position=[[2, 5], [2, -3]], state=state, layers=1)
    assert relative_error(several, edited(ssm, case, nested)) <= EXACT
    assert relative_error(several, edited(ssm, case, each[0])) > 1e-6
    apart = edited(ssm, case, si.PatchState(position=[[2], []], state=state, layers=1))
    assert relative_error(apart[1], edited(ssm, case)[1]) <= EXACT


def test_a_state_edit_by_a_hook_propagates() -> None:
    ssm = exact_model("mamba")
    case = inputs(2, LENGTH)

    def wipe(state: Tensor, hook: si.HookPoint) -> Tensor:
        return torch.cat([state[:, :3], 0 * state[:, 3:4], state[:, 4:]], dim=1)

    ssm.layers[1].hook_state.add_hook(wipe)
    found = logits(ssm.model, case)
    ssm.layers[1].hook_state.remove_hooks()
    assert relative_error(found, edited(ssm, case, si.PatchState(position=3, state=0.0, layers=1))) <= EXACT


def test_set_delta_zero_skips_a_position(host) -> None:  # noqa: ANN001
    """dt = 0 neither writes nor decays: the same as doing both by the hooks on dt."""
    with si.attach(host) as ssm:
        layer = max(ssm.layers)
        found = edited(ssm, inputs(2, LENGTH), si.SetDelta(value=0.0, positions=[2, 3], layers=layer))

        def silence(dt: Tensor, hook: si.HookPoint) -> Tensor:
            return torch.where(torch.isin(torch.arange(LENGTH), torch.tensor([2, 3]))[:, None], 0.0, dt)

        ssm.layers[layer].hook_dt.add_hook(silence)
        assert relative_error(logits(host, inputs(2, LENGTH)), found) <= 1e-6


def test_scaling_features() -> None:
    for name in ("mamba", "mamba2"):
        ssm = exact_model(name)
        case = inputs(2, LENGTH)
        silent = edited(ssm, case, si.ScaleFeatures(factor=0.0, features=[1, 4], positions=[5, 6], layers=1))
        knocked = edited(ssm, case, si.Knockout(sources=range(LENGTH), targets=[5, 6], features=[1, 4], layers=1))
        assert relative_error(silent, knocked) <= EXACT
        pairs = [(1, n) for n in range(ssm.layers[1].state_size)]
        by_pairs = edited(ssm, case, si.ScaleFeatures(factor=1.5, features=pairs, layers=1))
        by_head = edited(ssm, case, si.ScaleFeatures(factor=1.5, features=1, layers=1))
        assert relative_error(by_pairs, by_head) <= EXACT
        assert relative_error(by_head, logits(ssm.model, case)) > 1e-5


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba"])
def test_editing_attention_entries(name: str) -> None:
    ssm = exact_model(name)
    case = inputs(2, LENGTH)
    edges = [(6, 2), (-1, 0)]
    options = {"edges": edges, "layers": max(ssm.layers)}
    knocked = edited(ssm, case, si.Knockout(**options))
    assert relative_error(edited(ssm, case, si.EditAttention(value=0.0, **options)), knocked) <= 1e-9
    assert relative_error(edited(ssm, case, si.EditAttention(value=0.0, mode="scale", **options)), knocked) <= 1e-9
    native = logits(ssm.model, case)
    assert relative_error(edited(ssm, case, si.EditAttention(value=1.0, mode="scale", **options)), native) <= EXACT
    added = edited(ssm, case, si.EditAttention(value=0.7, mode="add", **options))
    mask = mask_of([6], [2]) | mask_of([7], [0])
    ssm.layers[max(ssm.layers)].hook_attn.add_hook(lambda attn, hook: torch.where(mask, attn + 0.7, attn))
    assert relative_error(added, logits(ssm.model, case)) <= 1e-9


def test_the_order_of_edits_does_not_matter() -> None:
    for name in ("mamba", "mamba2"):
        ssm = exact_model(name)
        case = inputs(2, LENGTH)
        edits = [
            si.Knockout(sources=[1, 2], targets=[6, 7]),
            si.PatchState(position=4, state=0.3, features=[0, 1]),
            si.SetDelta(value=0.2, positions=[5]),
            si.ScaleFeatures(factor=0.5, features=[2, 3]),
            si.EditAttention(edges=[(7, 6)], value=0.4),
        ]
        known = edited(ssm, case, *edits)
        for order in itertools.islice(itertools.permutations(edits), 0, 120, 17):
            assert relative_error(edited(ssm, case, *order), known) <= EXACT
        with ssm.edit(*edits[:2]), ssm.edit(*edits[2:]):
            assert relative_error(logits(ssm.model, case), known) <= EXACT


def test_conflicting_edits_are_refused() -> None:
    model = build("mamba")
    clash = [si.SetDelta(value=0.0, positions=[2, 3]), si.SetDelta(value=0.5, positions=3)]
    with si.attach(model) as ssm, pytest.raises(si.InterventionError, match="two SetDelta set the same step"):
        edited(ssm, inputs(2, LENGTH), *clash)
    patches = [si.PatchState(position=3, state=0.0), si.PatchState(position=3, state=1.0, features=[1])]
    with si.attach(model) as ssm:
        with pytest.raises(si.InterventionError, match="two PatchState replace the same state"):
            edited(ssm, inputs(2, LENGTH), *patches)
        apart = [si.PatchState(position=3, state=0.0, features=[0]), patches[1], si.SetDelta(value=0.0, positions=2)]
        assert edited(ssm, inputs(2, LENGTH), *apart).isfinite().all()


def test_bad_positions_and_features() -> None:
    model = build("mamba")
    native = logits(model, inputs(2, LENGTH))
    ssm = si.attach(model)
    late = {
        "names position 8, but the prompt has 8 positions": si.Knockout(sources=[8], targets=-1),
        "names position -9": si.Knockout(sources=[0], targets=-9),
        "names the positions of 3 rows, but the batch has 2": si.Knockout(sources=[[0], [1], [2]], targets=-1),
        r"PatchState.state is \[1, 2, 3\], but the state here is \[h p n\] = \[64, 1, 4\]": si.PatchState(
            position=0, state=torch.zeros(1, 2, 3)
        ),
        "the edge 2 <- 5: a position cannot read a later one": si.EditAttention(edges=[(2, 5)], value=1.0),
    }
    for message, intervention in late.items():
        with pytest.raises(si.InterventionError, match=message):
            edited(ssm, inputs(2, LENGTH), intervention)
    with pytest.raises(si.InterventionError, match="names position 0 of row 1, which is padding"):
        edited(ssm, padded([8, 5]), si.Knockout(sources=[0], targets=-1))
    early = {
        r"no such layer \[4\]; this model has \[0, 1, 2, 3\]": si.Knockout(sources=0, layers=[3, 4]),
        "layer 0 has no feature 64": si.Knockout(sources=0, features=[64]),
        r"layer 0 has no feature \(0, 4\)": si.Knockout(sources=0, features=[(0, 4)]),
    }
    for message, intervention in early.items():
        with pytest.raises(si.InterventionError, match=message), ssm.edit(intervention):
            pass
    assert torch.equal(logits(model, inputs(2, LENGTH)), native)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba"])
def test_a_knockout_takes_what_an_edited_write_wrote(name: str) -> None:
    ssm = exact_model(name)
    case = inputs(2, LENGTH)
    for point in ssm.layers.values():
        point.hook_write.add_hook(_scaled_at(1, 0.0))
    silent = logits(ssm.model, case)
    for point in ssm.layers.values():
        point.hook_write.remove_hooks()
        point.hook_write.add_hook(_scaled_at(1, 3.0))
    assert relative_error(logits(ssm.model, case), silent) > 1e-4
    assert relative_error(edited(ssm, case, si.Knockout(sources=1)), silent) <= EXACT
    halves = [si.Knockout(sources=1, targets=[1, 2, 3, 4]), si.Knockout(sources=1, targets=[4, 5, 6, 7])]
    assert relative_error(edited(ssm, case, *halves), silent) <= EXACT


def _scaled_at(position: int, factor: float):  # noqa: ANN202
    def hook(tensor: Tensor, hook: si.HookPoint) -> Tensor:
        scale = torch.ones(tensor.shape[1], dtype=tensor.dtype)
        if tensor.shape[1] > position:  # not in a decode step
            scale[position] = factor
        return tensor * scale[:, None, None, None]

    return hook


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.is_contiguous():  # an expanded view takes no memory
                self.numel = max(self.numel, tensor.numel())
        return found


def test_no_knockout_makes_a_tensor_of_targets_times_sources() -> None:
    length = 4096
    model = build("mamba2", num_hidden_layers=1)
    ids = inputs(1, length)
    half = length // 2
    with si.attach(model) as ssm, torch.no_grad():
        for knockouts in (
            [],
            [si.Knockout(sources=[3, 4], targets=-1)],
            [si.Knockout(sources=range(half), targets=range(half, length), through=("ssm", "conv"))],
            [si.Knockout(sources=[3], targets=-1), si.Knockout(sources=range(half), targets=[-1, -2], features=[0, 1])],
            [si.Knockout(edges=[(-1, 3), (-5, 3), (-5, 70)])],
            [si.Knockout(sources=[3, 4])],
            [si.PatchState(position=half, state=0.0), si.Knockout(sources=range(half), targets=-1)],
        ):
            with ssm.edit(*knockouts), _Largest() as largest:
                ssm.model(**ids, logits_to_keep=1)
            assert largest.numel < length**2 / 4, knockouts


@pytest.mark.parametrize("through", ["ssm", "conv", "attention"])
def test_edges_that_do_not_exist_are_refused_and_those_that_partly_do_are_counted(through: str) -> None:
    with si.attach(build("bamba")) as ssm:
        for swapped in (
            si.Knockout(sources=-1, targets=[4, 5], through=through),
            si.Knockout(edges=[(4, 6), (1, 2)], through=through),
        ):
            with pytest.raises(si.InterventionError, match="none of the edges of Knockout.*swapped"):
                edited(ssm, inputs(2, LENGTH), swapped)
        known = edited(ssm, inputs(2, LENGTH), si.Knockout(edges=[(7, 6)], through=through))
        with pytest.warns(UserWarning, match="1 of the 2 edges of Knockout.* do not exist"):
            found = edited(ssm, inputs(2, LENGTH), si.Knockout(edges=[(7, 6), (1, 2)], through=through))
        assert torch.equal(found, known)
        with pytest.raises(si.InterventionError, match="none of the edges"):
            list(run_each(ssm, inputs(2, LENGTH)["input_ids"], [si.Knockout(sources=-1, targets=2, through=through)]))
