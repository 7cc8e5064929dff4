"""Low-rank adaptation: only thin layers are trained, and in the end they are gone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.specs import causal_spec
from torch import nn

from bmctl import models
from bmctl.cli import main
from bmctl.errors import DependencyError, RecipeError
from bmctl.methods import METHODS, MethodContext

SPECS = {
    "decoder": causal_spec("bmctl:decoder", args={"width": 32, "depth": 2, "heads": 4, "kv_heads": 2}),
    "gpt2": causal_spec("transformers:gpt2", args={"n_embd": 32, "n_layer": 1, "n_head": 4}),
}
LORA = METHODS["lora"]
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
CONTEXT = MethodContext(example={}, calibration=lambda: iter(()), calibration_record={})


def config(**fields: Any) -> Any:
    return LORA.Config.model_validate({"rank": 2, "recover": {"teacher": "none"}, **fields})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, torch.ones_like(IDS))


@pytest.mark.parametrize("name", SPECS)
def test_thin_layers_are_trained_and_merged(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(models.resolve(SPECS[name]))
    names, before, state = (
        list(model.state_dict()),
        logits(model),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    asked = config()
    meta = LORA.apply(model, asked, CONTEXT)
    assert meta["layers"] and not any("head" in layer for layer in meta["layers"]), "the head is the embeddings' table"
    assert torch.equal(logits(model), before), "at first they give nothing"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(meta["layers"]) and all("lora_" in each for each in trained)
    again = models.build(models.resolve(SPECS[name]))
    LORA.restore(again, asked, json.loads(json.dumps(meta)))
    again.load_state_dict(model.state_dict(), strict=True)

    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, torch.ones_like(IDS))[..., 3].sum().neg().backward()
        optimizer.step()
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    finished = LORA.finish(model, asked, meta)
    assert list(model.state_dict()) == names
    assert torch.allclose(logits(model), after, atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed <= {f"{layer}.weight" for layer in meta["layers"]} and changed
    plain = models.build(models.resolve(SPECS[name]))
    LORA.restore(plain, asked, finished)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(plain), logits(model))


def test_layers_are_chosen_by_name() -> None:
    model = models.build(SPECS["decoder"])
    meta = LORA.apply(model, config(include=["*.query", "*.key"], ignore=["layers.1.*"]), CONTEXT)
    assert meta["layers"] == ["layers.0.attention.query", "layers.0.attention.key"]
    with pytest.raises(RecipeError, match=r"lora\.include: '\*\.quarry' matches none"):
        LORA.apply(models.build(SPECS["decoder"]), config(include=["*.quarry"]), CONTEXT)


def test_without_training_it_is_refused() -> None:
    with pytest.raises(ValueError, match="give nothing until they are trained"):
        LORA.Config()


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match="needs peft, which is not installed"):
        LORA.apply(models.build(SPECS["decoder"]), config(), CONTEXT)


def test_a_model_is_adapted_to_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bmctl run`: the adapted package is as large as the first, of the same tensors, and better on the text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text in which numbers go up.\n" for i in range(300)))
    (tmp_path / "r.yaml").write_text(
        """
name: adapted
model: {name: "bmctl:decoder", args: {width: 16, depth: 1, heads: 2}}
data: {source: {kind: corpus, path: text.txt, piece: 64, val: 0.1, test: 0.1}, input: {tokenizer: {vocab_size: 300}}}
task: {kind: lm}
train: {max_steps: 4, batch_size: 16, precision: fp32}
launch: {threads: 1}
compress:
  - {method: lora, rank: 4, recover: {teacher: none, fit: {epochs: 1, batch_size: 16, optimizer: {lr: 0.05}}}}
"""
    )
    assert main(["run", "--recipe", "./r.yaml", "--to", "compress", "--quiet"]) == 0
    first, second = (
        json.loads((tmp_path / "runs/adapted/packages" / name / "manifest.json").read_text())
        for name in ("00-train", "01-lora")
    )
    assert second["history"][0]["meta"]["merged"] is True
    assert second["metrics"]["num_params"] == first["metrics"]["num_params"]
    assert second["metrics"]["val"]["value"] < first["metrics"]["val"]["value"] - 0.02
