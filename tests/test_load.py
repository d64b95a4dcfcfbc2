"""Loading by embedded name, local folder and hub id."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from support import logits
from tiny_hosts import NAMES, build, inputs
from transformers import LlamaForCausalLM, Mamba2ForCausalLM, MambaForCausalLM

import ssm_interp as si
from ssm_interp.models import EMBEDDED, load_outline, load_tokenizer


def test_embedded_models_are_ordinary_ones() -> None:
    for name, cls in zip(EMBEDDED, (MambaForCausalLM, Mamba2ForCausalLM, LlamaForCausalLM), strict=True):
        model, tokenizer = si.load(name)
        assert type(model) is cls
        assert not model.training
        assert model.dtype == torch.float32
        assert model.config.num_hidden_layers >= 8
        assert len(tokenizer(" Ouagadougou")["input_ids"]) > 1
        assert si.load(name, dtype=torch.float64)[0].dtype == torch.float64


def test_a_local_folder(tmp_path: Path) -> None:
    model = build("mamba2")
    model.save_pretrained(tmp_path)
    si.load("tiny-mamba2")[1].save_pretrained(tmp_path)
    loaded, tokenizer = si.load(tmp_path)
    assert torch.equal(logits(loaded, inputs()), logits(model, inputs()))
    assert tokenizer.decode(tokenizer("Bern")["input_ids"]) == "Bern"


@pytest.mark.parametrize("name", NAMES)
def test_an_outline_is_the_model_without_its_weights(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    outline = load_outline(tmp_path)
    assert {tensor.device.type for tensor in outline.parameters()} == {"meta"}
    assert {key: tensor.shape for key, tensor in outline.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    with si.attach(model) as ssm, si.attach(outline) as found:
        assert {layer: (points.heads, points.state_size) for layer, points in found.layers.items()} == {
            layer: (points.heads, points.state_size) for layer, points in ssm.layers.items()
        }


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(si.LoadError, match="there is no model 'tiny-mamba3'; did you mean the embedded 'tiny-mamba"):
        si.load("tiny-mamba3")
    with pytest.raises(si.LoadError, match="cannot load 'nothing-of-that-name': it is none of the embedded models"):
        si.load("nothing-of-that-name")
    with pytest.raises(si.LoadError, match="is not a folder that holds a model"):
        si.load(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(si.LoadError, match="is not a folder that holds a model"):
        si.load(tmp_path / "file")
    with pytest.raises(si.LoadError, match="as a local folder it gives"):
        si.load(tmp_path)


def like_a_model(folder: Path, config: str = "{}") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-mmaba", "there is no folder 'my-mmaba'; did you mean 'my-mamba'?"),
        ("my-mamb", "there is no folder 'my-mamb'; did you mean 'my-mamba'?"),
        ("models/other-mmaba", "'models/other-mmaba' is not a folder that holds a model; did you mean 'models/other"),
        ("./my-mmaba", "'./my-mmaba' is not a folder that holds a model; did you mean 'my-mamba'?"),
        ("tiny-mmaba1", "there is no model 'tiny-mmaba1'; did you mean the embedded 'tiny-mamba1'?"),
        ("tiny_induction_mamba2", "did you mean the embedded 'tiny-induction-mamba2'?"),
        ("state-spaces/mamba-130m", "the same weights in transformers' layout are 'state-spaces/mamba-130m-hf'"),
        ("state-spaces/mamba-2.8b", "the same weights in transformers' layout are 'state-spaces/mamba-2.8b-hf'"),
        ("state-spaces/mamba-2.8b-slimpj", "in the layout of the package mamba_ssm, .* has no converted ones"),
        ("state-spaces/mamba2-1.3b", "mamba_ssm, .* no converted ones; 'AntonV/mamba2-1.3b-hf' has the same weights"),
        ("state-spaces/mamba2attn-2.7b", "in the layout of the package mamba_ssm, .* has no converted ones"),
        ("in-its-own-layout", "is in the layout of the package mamba_ssm .* has d_model and n_layer"),
    ],
)
def test_what_cannot_be_a_hub_id_is_said_without_asking_the_hub(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("my-mamba", "models/other-mamba"):
        like_a_model(tmp_path / folder)
    like_a_model(tmp_path / "in-its-own-layout", '{"d_model": 768, "n_layer": 24, "ssm_cfg": {}}')
    begin = time.perf_counter()
    for loader in (si.load, load_tokenizer, load_outline):
        with pytest.raises(si.LoadError, match=message):
            loader(name)
    assert time.perf_counter() - begin < 1  # the hub, which nobody reaches here, takes half a minute to give up


@pytest.mark.parametrize("name", ["gpt2-medium", "state-spaces/mamba-130m-hf", "someone/my-mamba", "my-mamba-chat"])
def test_a_hub_id_is_asked_for_though_a_folder_or_another_id_is_like_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2-medium-tuned", "my-mamba", "state-spaces"):
        like_a_model(tmp_path / folder)
    with pytest.raises(si.LoadError, match=f"cannot load '{name}': .* as a hub id it gives"):
        si.load(name)


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny-mamba1")
    assert tokenizer("Bern is")["input_ids"] == si.load("tiny-mamba1")[1]("Bern is")["input_ids"]
    with pytest.raises(si.LoadError, match="is not a folder that holds a model"):
        load_tokenizer(tmp_path / "missing")
