"""Attached and idle the model is the model; detached it is again what it was."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from random_terms import as_users_run_it
from support import checkpointing, decode, edited, logits, relative_error
from test_softmax import transformer
from tiny_hosts import build, inputs, padded
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ssm_interp as si

READS = ["conv", "x", "dt", "B", "C", "write", "state", "attn", "y"]


def test_idle_logits_are_bit_identical(host: PreTrainedModel) -> None:
    cases = [inputs(2, 9), inputs(1, 1), padded([9, 4]), padded([9, 4], side="right")]
    native = [logits(host, case) for case in cases]
    ids = inputs(2, 8)["input_ids"]
    decoded = decode(host, ids, 5)
    generated = host.generate(ids, max_new_tokens=4, do_sample=False)
    with si.attach(host):
        assert all(torch.equal(logits(host, case), known) for case, known in zip(cases, native, strict=True))
        assert torch.equal(decode(host, ids, 5), decoded)
        assert torch.equal(host.generate(ids, max_new_tokens=4, do_sample=False), generated)


def test_idle_training_forward_is_bit_identical(host: PreTrainedModel) -> None:
    host.train()
    torch.manual_seed(1)
    native = host(**inputs(2, 9)).logits
    with si.attach(host):
        torch.manual_seed(1)
        assert torch.equal(host(**inputs(2, 9)).logits, native)


@pytest.mark.parametrize("side", ["left", "right"])
def test_exposed_logits_equal_native_ones(host: PreTrainedModel, side: str) -> None:
    cases = [inputs(2, 13), padded([9, 4], side=side)]
    native = [logits(host, case) for case in cases]
    decoded = decode(host, inputs(2, 8)["input_ids"], 5)
    with si.attach(host) as ssm, ssm.expose("write", "state", "attn"):
        for case, known in zip(cases, native, strict=True):
            assert relative_error(logits(host, case), known) <= 1e-5
        assert relative_error(decode(host, inputs(2, 8)["input_ids"], 5), decoded) <= 1e-5


def test_own_operator_gives_the_same_logits(host: PreTrainedModel) -> None:
    case = padded([9, 4])
    native = logits(host, case)
    ids = inputs(2, 8)["input_ids"]
    decoded = decode(host, ids, 5)
    with si.attach(host, own_operator=True):
        assert relative_error(logits(host, case), native) <= 1e-5
        assert relative_error(decode(host, ids, 5), decoded) <= 1e-5


def test_matrix_times_x_is_what_the_operator_gives(host: PreTrainedModel) -> None:
    with torch.no_grad(), si.attach(host) as ssm:
        run = ssm.run(padded([9, 5]), read=["x", "attn", "y", "state", "C"])
        for layer in ssm.layers:
            product = torch.einsum("bhts,bshp->bthp", run["attn", layer], run["x", layer])
            assert relative_error(product, run["y", layer]) <= 1e-5
            state, C = run["state", layer], run["C", layer]
            C = C.repeat_interleave(state.shape[2] // C.shape[2], dim=2)
            assert relative_error(torch.einsum("bthpn,bthn->bthp", state, C), run["y", layer]) <= 1e-5


def test_detaching_restores_everything(host: PreTrainedModel) -> None:
    classes = [type(module) for module in host.modules()]
    keys, hooks = list(host.state_dict()), [len(module._forward_hooks) for module in host.modules()]
    native = logits(host, inputs())
    ssm = si.attach(host)
    assert list(host.state_dict()) == keys
    assert all(isinstance(module, cls) for module, cls in zip(_without_points(host), classes, strict=True))
    ssm.layers[min(ssm.layers)].hook_y.add_hook(lambda y, hook: y * 2)
    ssm.detach()
    assert [type(module) for module in host.modules()] == classes
    assert all("forward" not in module.__dict__ for module in host.modules())
    assert list(host.state_dict()) == keys
    assert [len(module._forward_hooks) for module in host.modules()] == hooks
    assert torch.equal(logits(host, inputs()), native)
    with pytest.raises(si.HookError, match="was detached"):
        ssm.run(inputs())


def _without_points(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not isinstance(module, si.HookPoint | si.HookPoints)]


def test_an_exception_inside_with_restores(host: PreTrainedModel) -> None:
    native = logits(host, inputs())
    with pytest.raises(RuntimeError, match="stop"), si.attach(host) as ssm, ssm.edit(si.Knockout(sources=0)):
        raise RuntimeError("stop")
    assert torch.equal(logits(host, inputs()), native)
    si.attach(host).detach()


def test_a_deepcopy_is_attached_and_independent() -> None:
    model = build("mamba2")
    native = logits(model, inputs())
    with si.attach(model) as ssm:
        twin = copy.deepcopy(model)
        twin_ssm = si.attached(twin)
        knockout = si.Knockout(sources=[1], targets=-1)
        changed = edited(ssm, inputs(), knockout)
        assert not torch.equal(changed, native)
        with ssm.edit(knockout):
            assert torch.equal(logits(twin, inputs()), native)
        twin_ssm.layers[0].hook_y.add_hook(lambda y, hook: 0 * y)
        assert torch.equal(logits(model, inputs()), native)
        twin_ssm.detach()
        assert torch.equal(edited(ssm, inputs(), knockout), changed)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba"])
def test_save_pretrained_of_an_attached_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    native = logits(model, inputs())
    with si.attach(model):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, inputs()), native)


def test_threads_have_their_own_edits() -> None:
    model = build("mamba")
    with si.attach(model) as ssm:
        knockouts = [si.Knockout(sources=[source], targets=-1) for source in range(4)]
        alone = [edited(ssm, inputs(), knockout) for knockout in knockouts]
        together: dict[int, list[torch.Tensor]] = {number: [] for number in range(4)}
        barrier = threading.Barrier(4)

        def work(number: int) -> None:
            with ssm.edit(knockouts[number]):
                barrier.wait()
                for _ in range(5):
                    together[number].append(logits(model, inputs()))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(4):
            assert len(together[number]) == 5
            assert all(torch.equal(found, alone[number]) for found in together[number])
        assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba"])
@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing_recomputes_under_the_same_edits(name: str, inside: bool) -> None:
    model = build(name, training=True)
    with si.attach(model) as ssm:
        gradients = []
        for again in (False, True):
            model.zero_grad()
            if again:
                checkpointing(model)
            with ssm.edit(si.Knockout(sources=[1, 2], targets=-1)):
                loss = model(**inputs(), use_cache=False).logits[:, -1].logsumexp(-1).sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert relative_error(gradients[1], gradients[0]) <= 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks(when: str) -> None:
    model = build("mamba2")
    native = logits(model, inputs())
    mixer = model.backbone.layers[1].mixer

    def accelerate() -> None:
        add_hook_to_module(mixer, AlignDevicesHook(execution_device="cpu"))

    if when == "before":
        accelerate()
    with si.attach(model) as ssm:
        if when == "after":
            accelerate()
        assert torch.equal(logits(model, inputs()), native)
        only = si.Knockout(sources=[1], targets=-1, layers=1)
        assert not torch.equal(edited(ssm, inputs(), only), native)
    assert torch.equal(logits(model, inputs()), native)
    remove_hook_from_module(mixer)
    assert torch.equal(logits(model, inputs()), native)


def test_layers_of_a_hybrid_are_those_of_the_model() -> None:
    with si.attach(build("bamba")) as ssm:
        assert list(ssm.layers) == [0, 2, 3]
        assert "SSM layers [0, 2, 3]" in repr(ssm)


def test_bfloat16() -> None:
    model = build("mamba2", dtype=torch.bfloat16)
    native = logits(model, inputs())
    with si.attach(model) as ssm:
        assert torch.equal(logits(model, inputs()), native)
        assert not torch.equal(edited(ssm, inputs(), si.Knockout(sources=[1], targets=-1)), native)


def test_bad_models() -> None:
    with pytest.raises(si.UnsupportedModelError, match="Sequential has no SSM layers.*no attention layers"):
        si.attach(nn.Sequential(nn.Linear(2, 2)))

    class OtherMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(2))

    with pytest.raises(si.UnsupportedModelError, match="OtherMixer.*transformers >= 5.15, this is transformers 5"):
        si.attach(nn.Sequential(OtherMixer()))


def test_bad_attaching() -> None:
    model = build("mamba")
    with si.attach(model) as ssm:
        with pytest.raises(si.HookError, match="already attached"):
            si.attach(model)
        with ssm.edit(si.Knockout(sources=0)), pytest.raises(si.HookError, match="inside `with ssm.edit"):
            ssm.detach()
    with pytest.raises(si.HookError, match="has no hook points"):
        si.attached(model)
    mixer = model.backbone.layers[2].mixer
    mixer.forward = lambda *args, **kwargs: None
    with pytest.raises(si.HookError, match="MambaMixer of layer 2 was replaced"):
        si.attach(model)
    del mixer.forward
    mixer.ssm = nn.Identity()
    with pytest.raises(si.HookError, match="already has an attribute `ssm`"):
        si.attach(model)
    del mixer.ssm
    for module in model.modules():
        assert not isinstance(module, si.HookPoints)
    mixer.A_log.data = mixer.A_log.data.to(torch.float8_e4m3fn)
    with pytest.raises(si.UnsupportedModelError, match="float8_e4m3fn; supported are torch.float32"):
        si.attach(model)


def test_several_mixers_of_one_layer_are_refused() -> None:
    pair = nn.ModuleList([build("mamba"), build("mamba2")])
    with pytest.raises(si.HookError, match="several SSM mixers of layer 0, which edits could not tell apart"):
        si.attach(pair)
    si.attach(pair[0]).detach()


@pytest.mark.parametrize("name", ["mamba2", "llama"])
def test_a_block_that_is_two_layers_is_refused(name: str) -> None:
    model = build(name) if name == "mamba2" else transformer(name)
    layers = model.backbone.layers if name == "mamba2" else model.model.layers
    layers[2] = layers[1]
    with pytest.raises(si.HookError, match="uses one block as its layers 1 and 2, which edits could not tell apart"):
        si.attach(model)


def test_an_attachment_whose_model_was_detached_says_so() -> None:
    model = build("mamba")
    ssm = si.attach(model)
    si.attached(model).detach()
    with pytest.raises(si.HookError, match="was detached"), ssm.edit(si.Knockout(sources=0)):
        pass
    si.attach(model)
    with pytest.raises(si.HookError, match="was detached"):
        ssm.run(inputs(), read="attn")


def gradient_of(model: PreTrainedModel, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(), use_cache=False).logits[:, -1].logsumexp(-1).sum()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # the run without gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_each_checkpointed_forward_keeps_its_own_edits(reentrant: bool) -> None:
    """Runs under other edits, without edits and without gradients between them, backward in another order, outside."""
    model = build("mamba2", training=True)
    edits = [si.Knockout(sources=[1]), si.SetDelta(value=0.4)]
    with si.attach(model) as ssm:
        expected = [gradient_of(model, loss_of(model))]
        for edit in edits:
            with ssm.edit(edit):
                expected.append(gradient_of(model, loss_of(model)))
        checkpointing(model, {"use_reentrant": reentrant})
        model.enable_input_require_grads()
        losses = [loss_of(model)]
        for edit in edits:
            with ssm.edit(edit):
                losses.append(loss_of(model))
        with torch.no_grad(), ssm.edit(si.ScaleFeatures(factor=0.0)):
            loss_of(model)
        for loss, known in reversed(list(zip(losses, expected, strict=True))):
            with ssm.edit(si.ScaleFeatures(factor=0.0)):  # what is at work in the backward pass does not matter
                assert relative_error(gradient_of(model, loss), known) <= 1e-5
        assert relative_error(expected[1], expected[0]) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_checkpoint_around_the_model_repeats_the_edited_forward(reentrant: bool, training: bool) -> None:
    model = build("mamba", training=training)
    with si.attach(model) as ssm:
        with ssm.edit(si.Knockout(sources=[1, 2], targets=-1)):
            known = gradient_of(model, loss_of(model))
        embedded = model.get_input_embeddings()(inputs()["input_ids"])

        def run(values: torch.Tensor) -> torch.Tensor:
            return model(inputs_embeds=values, use_cache=False).logits

        with ssm.edit(si.Knockout(sources=[1, 2], targets=-1)):
            logits = torch.utils.checkpoint.checkpoint(run, embedded, use_reentrant=reentrant)
        assert relative_error(gradient_of(model, logits[:, -1].logsumexp(-1).sum()), known) <= 1e-5


def test_training_steps_keep_no_edit_alive() -> None:
    model = build("mamba2", training=True)
    checkpointing(model)
    alive = weakref.WeakSet()
    with si.attach(model) as ssm:
        for step in range(3):
            patch = si.PatchState(position=1, state=float(step))
            alive.add(patch)
            with ssm.edit(patch):
                loss = loss_of(model)
            loss.backward()
            del patch, loss
        gc.collect()
        assert not len(alive)


def test_autocast() -> None:
    for name in ("mamba", "mamba2"):
        model = build(name)
        edits = [si.EditAttention(edges=[(5, 3)], value=0.0), si.Knockout(edges=[(5, 3)])]
        with si.attach(model) as ssm, torch.autocast("cpu", torch.bfloat16):
            found = [edited(ssm, inputs(), edit) for edit in edits]
        assert relative_error(found[0].float(), found[1].float()) <= 2e-2


def test_exposures_count() -> None:
    with si.attach(build("mamba")) as ssm:
        point = ssm.layers[0].hook_attn
        outer, inner = ssm.expose("attn"), ssm.expose("attn", layers=torch.tensor([0]))
        outer.close()
        assert point.exposed
        inner.close()
        inner.close()
        assert not point.exposed


def test_bad_runs() -> None:
    with si.attach(build("mamba2")) as ssm:
        with pytest.raises(si.HookError, match="no hook point 'atn'; did you mean 'attn'"):
            ssm.run(inputs(), read=["atn"])
        with pytest.raises(si.HookError, match="no SSM layer 9"):
            ssm.run(inputs(), read="attn", layers=9)
        with pytest.raises(si.HookError, match="the gate never reaches the operator"):
            ssm.run(inputs(), read="z")
        with pytest.raises(si.HookError, match="inputs must be ids .*, got str"):
            ssm.run("text")
        with pytest.raises(si.HookError, match="attach takes a model, got tuple"):
            si.attach((ssm.model, None))
        with as_users_run_it(), pytest.raises(si.HookError, match="own_operator is True or False, got 'yes'"):
            si.attach(ssm.model, own_operator="yes")
        with pytest.raises(si.HookError, match="no hook point 'A'. There are conv, x, dt"):
            ssm.run(inputs(), read=["A"])
        assert (
            repr(ssm.run(inputs(2, 5), read="y", layers=1)) == "Run(logits [2, 5, 64]; read y of layer 1: [2, 5, 8, 8])"
        )
        with pytest.raises(si.HookError, match="input_ids is empty"):
            ssm.run(torch.zeros(1, 0, dtype=torch.long))
        with pytest.raises(KeyError, match="was not read"):
            ssm.run(inputs(), read="x")["dt", 0]
