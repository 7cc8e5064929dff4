"""What exporters make of PyTorch models: small, random weights, both of torch's exporters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Axes = Mapping[str, Mapping[int, str]]


def trace(path: Path, model: nn.Module, given: Sequence[Any], *, axes: Axes, outputs: Sequence[str]) -> None:
    """The older exporter: a trace; `axes` names every input, with its free axes."""
    torch.manual_seed(0)
    _randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), tuple(given), str(path), dynamo=False, opset_version=17,
            input_names=list(axes), output_names=list(outputs), dynamic_axes={k: dict(v) for k, v in axes.items() if v},
        )  # fmt: skip


def dynamo(path: Path, model: nn.Module, given: Sequence[Any], *, axes: Axes, outputs: Sequence[str]) -> None:
    """The newer exporter."""
    _randomize(model)
    dims = {name: torch.export.Dim(name, max=128) for free in axes.values() for name in free.values()}
    shapes = tuple({axis: dims[name] for axis, name in free.items()} for free in axes.values())
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(), tuple(given), str(path), dynamo=True, verbose=False, dynamic_shapes=shapes,
                input_names=list(axes), output_names=list(outputs), external_data=False,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def _randomize(model: nn.Module) -> None:
    """Weights and statistics that are not the initial ones."""
    torch.manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.data.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.data.uniform_(0.5, 1.5)


class First(nn.Module):
    """The first output alone, of a model that is called by keyword."""

    def __init__(self, model: nn.Module, *names: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(**dict(zip(self.names, given, strict=True)), **self.fixed)[0]
        return found


BATCH: Mapping[int, str] = {0: "batch"}
TOKENS: Mapping[int, str] = {0: "batch", 1: "tokens"}
IMAGE: Mapping[int, str] = {0: "batch", 2: "height", 3: "width"}


# -- several inputs, by the newer exporter ----------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return nn.functional.cosine_similarity(self.tower(left), self.tower(right))


class Wide(nn.Module):
    """A picture and a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36 + 5, 3)

    def forward(self, image: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.tower(image)
        return self.head(torch.cat([features, row], dim=1)), features.mean(1)


class Ratings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.head = nn.Embedding(20, 8), nn.Embedding(30, 8), nn.Linear(16, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.users(user), self.items(item)], dim=-1)).squeeze(-1)


class Tagger(nn.Module):
    """Ids and a boolean mask through an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 6)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.head(x + y.transpose(1, 2).flatten(2))


def siamese(path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    dynamo(path, Siamese(), (x, x), axes={"left": BATCH, "right": BATCH}, outputs=["similarity"])


def image_and_table(path: Path) -> None:
    given = (torch.randn(2, 1, 8, 8), torch.randn(2, 5))
    dynamo(path, Wide(), given, axes={"image": BATCH, "row": BATCH}, outputs=["logits", "mean"])


def ratings(path: Path) -> None:
    given = (torch.tensor([1, 2]), torch.tensor([3, 4]))
    dynamo(path, Ratings(), given, axes={"user": BATCH, "item": BATCH}, outputs=["rating"])


def tagger(path: Path) -> None:
    given = (torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.bool))
    dynamo(path, Tagger(), given, axes={"ids": TOKENS, "mask": TOKENS}, outputs=["logits"])


def half_mlp(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).half()
    dynamo(path, model, (torch.randn(2, 8).half(),), axes={"x": BATCH}, outputs=["y"])


# -- recurrent networks ----------------------------------------------------------------------------


def lstm_time_first(path: Path) -> None:
    free = {0: "time", 1: "batch"}
    trace(path, nn.LSTM(6, 8), (torch.randn(5, 2, 6),), axes={"x": free}, outputs=["y", "h", "c"])


def gru_with_state(path: Path) -> None:
    """Batch first, and the state comes from outside: its batch is the second axis."""
    given = (torch.randn(2, 5, 6), torch.randn(1, 2, 8))
    trace(path, nn.GRU(6, 8, batch_first=True), given, axes={"x": {0: "batch", 1: "time"}, "h": {1: "batch"}},
          outputs=["y", "state"])  # fmt: skip


def rnn_both_ways(path: Path) -> None:
    model = First(nn.RNN(6, 8, num_layers=2, bidirectional=True), "input")
    trace(path, model, (torch.randn(5, 2, 6),), axes={"x": {}}, outputs=["y"])


# -- pictures ---------------------------------------------------------------------------------------


def any_size(path: Path) -> None:
    """A fully convolutional network: rows and columns are free."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    trace(path, model, (torch.randn(1, 3, 32, 32),), axes={"image": IMAGE}, outputs=["mask"])


def upsampling(path: Path) -> None:
    """Down by 4 and up again: sizes must be multiples of 4 for the sum to fit."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.out = nn.Conv2d(3, 3, 4, stride=4), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x + nn.functional.interpolate(self.down(x), scale_factor=4.0))

    trace(path, Net(), (torch.randn(1, 3, 32, 32),), axes={"image": IMAGE}, outputs=["mask"])


def resnet_fixed(path: Path) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    trace(path, ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), (torch.randn(4, 3, 32, 32),), axes={"input": {}},
          outputs=["logits"])  # fmt: skip


def segmentation(path: Path) -> None:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(x)["out"]
            return found

    trace(path, Out(), (torch.randn(1, 3, 64, 64),), axes={"image": IMAGE}, outputs=["mask"])


def proposals(path: Path) -> None:
    """A detector's second half: features and boxes in, scores by box out; the boxes are counted by a free axis."""
    from torchvision.ops import roi_align

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8 * 9, 4)

        def forward(self, features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
            return self.score(roi_align(features, boxes, output_size=(3, 3)).flatten(1))

    boxes = torch.tensor([[0.0, 1, 1, 6, 6], [0, 0, 0, 4, 4]])
    axes = {"features": {2: "height", 3: "width"}, "boxes": {0: "boxes"}}
    trace(path, Head(), (torch.randn(1, 8, 16, 16), boxes), axes=axes, outputs=["scores"])


def timm_convnext(path: Path) -> None:
    import timm

    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    trace(path, model, (torch.randn(2, 3, 64, 64),), axes={"x": BATCH}, outputs=["logits"])


def timm_mobilenet(path: Path) -> None:
    import timm

    dynamo(path, timm.create_model("mobilenetv3_small_050", num_classes=5), (torch.randn(2, 3, 64, 64),),
           axes={"x": BATCH}, outputs=["logits"])  # fmt: skip


# -- transformers -----------------------------------------------------------------------------------

IDS = (torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0)), torch.ones(2, 7, dtype=torch.long))


def bert(path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    model = First(transformers.BertForSequenceClassification(config), "input_ids", "attention_mask", "token_type_ids")
    free = dict.fromkeys(model.names, TOKENS)
    trace(path, model, (*IDS, torch.zeros_like(IDS[0])), axes=free, outputs=["logits"])


def distilbert(path: Path) -> None:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64
    )
    model = First(transformers.DistilBertModel(config), "input_ids", "attention_mask")
    trace(path, model, IDS, axes=dict.fromkeys(model.names, TOKENS), outputs=["hidden"])


def _gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def gpt2(path: Path) -> None:
    model = First(_gpt2(), "input_ids", "attention_mask", use_cache=False)
    trace(path, model, IDS, axes=dict.fromkeys(model.names, TOKENS), outputs=["logits"])


def gpt2_with_past(path: Path) -> None:
    """Ids, the mask over past and present, and the cache: `past + tokens` is the mask's second axis."""
    from transformers.cache_utils import DynamicCache

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _gpt2()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
            cache = DynamicCache()
            cache.update(keys, values, 0)
            found = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            layer = found.past_key_values.layers[0]
            return found.logits, layer.keys, layer.values

    past = torch.randn(2, 2, 5, 8)
    free = {0: "batch", 2: "past"}
    axes = {"ids": TOKENS, "mask": {0: "batch", 1: "past + tokens"}, "past_keys": free, "past_values": free}
    given = (IDS[0][:, :3], torch.ones(2, 8, dtype=torch.long), past, past)
    trace(path, Step(), given, axes=axes, outputs=["logits", "keys", "values"])


def t5_encoder(path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = First(transformers.T5EncoderModel(config), "input_ids", "attention_mask")
    trace(path, model, IDS, axes=dict.fromkeys(model.names, TOKENS), outputs=["hidden"])


def vit(path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = First(transformers.ViTForImageClassification(config), "pixel_values")
    trace(path, model, (torch.randn(2, 3, 32, 32),), axes={"pixel_values": BATCH}, outputs=["logits"])


def whisper_encoder(path: Path) -> None:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20,
    )  # fmt: skip
    model = First(WhisperEncoder(config), "input_features")
    free = {0: "batch", 2: "frames"}  # called free; its positions are 20
    trace(path, model, (torch.randn(2, 8, 40),), axes={"features": free}, outputs=["hidden"])
