"""bmctl's own networks: small enough to train on a CPU, plain enough to prune, quantize and export.

N: samples. C: input channels. H, W: pixels. K: classes. T: tokens. D: width. A: heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class StochasticDepth(nn.Module):
    """Leaves whole samples' residual branches out in training, and makes up for it in those that stay.

    Args:
        p: Probability that a sample's branch is left out.

    Source: Huang et al. 2016, https://arxiv.org/abs/1603.09382
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added; a 1x1 convolution fits the input where shapes differ.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, inside: int, outside: int, *, stride: int, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.drop = StochasticDepth(stochastic_depth) if stochastic_depth else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.norm1(self.conv1(x_NCHW)))
        return self.relu(self.drop(self.norm2(self.conv2(inner))) + self.shortcut(x_NCHW))


class ResCNN(nn.Module):
    """A stem and three residual blocks of `width`, 2 and 4 times `width` channels, halving the resolution twice.

    Args:
        num_classes: K.
        channels: C.
        width: Channels of the first block.
        dropout: Probability by which features are left out before the head.
        stochastic_depth: Of the last block's branch; a third and two thirds of it for the blocks before.
    """

    MIN_SIZE = 8
    """Pixels of height and width."""

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        width: int = 32,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            Block(width, width, stride=1, stochastic_depth=stochastic_depth / 3),
            Block(width, 2 * width, stride=2, stochastic_depth=stochastic_depth * 2 / 3),
            Block(2 * width, 4 * width, stride=2, stochastic_depth=stochastic_depth),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.pool(self.blocks(self.stem(x_NCHW))).flatten(1)))


class MLP(nn.Module):
    """Linear layers with ReLU between them; no batch statistics.

    Args:
        num_inputs: C * H * W, or F.
        num_classes: K.
        hidden: Width of each hidden layer.
        dropout: Probability by which outputs of hidden layers are left out.
    """

    def __init__(
        self, *, num_inputs: int, num_classes: int, hidden: Sequence[int] = (512, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = (num_inputs, *hidden)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            relu: nn.Module = nn.ReLU(inplace=True)
            # In one place with the ReLU: layers keep their numbers, and weights their names.
            layers += [nn.Linear(inside, outside), nn.Sequential(relu, nn.Dropout(dropout)) if dropout else relu]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] or vectors [N, F]."""
        return self.layers(x)


class Duelling(nn.Module):
    """An MLP whose values are that of the state and, around it, what each action adds.

    Args:
        num_inputs: F.
        num_actions: K.
        hidden: Width of each hidden layer.

    Source: Wang et al. 2015, https://arxiv.org/abs/1511.06581
    """

    def __init__(self, *, num_inputs: int, num_actions: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        widths = (num_inputs, *hidden)
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.state = nn.Linear(widths[-1], 1)
        self.actions = nn.Linear(widths[-1], num_actions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors [N, F] to values [N, K]."""
        features = self.layers(x)
        added = self.actions(features)
        return self.state(features) + added - added.mean(dim=1, keepdim=True)


class Attention(nn.Module):
    """Every token looks at all tokens of its text; d = D / A at first, less once it is pruned.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        # The names that timm has for these: pruning knows heads by them.
        self.num_heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x_NTD: torch.Tensor, bias_N11T: torch.Tensor) -> torch.Tensor:
        qkv_NT3Ad = self.qkv(x_NTD).unflatten(-1, (3, self.num_heads, self.head_dim))
        q_NATd, k_NATd, v_NATd = qkv_NT3Ad.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_NATd = nn.functional.scaled_dot_product_attention(
            q_NATd, k_NATd, v_NATd, attn_mask=bias_N11T, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(mixed_NATd.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward half, each normalised first and added to its input.

    Source: Xiong et al. 2020, https://arxiv.org/abs/2002.04745
    """

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float, stochastic_depth: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drop = StochasticDepth(stochastic_depth) if stochastic_depth else nn.Identity()

    def forward(self, x_NTD: torch.Tensor, bias_N11T: torch.Tensor) -> torch.Tensor:
        x_NTD = x_NTD + self.drop(self.dropout(self.attention(self.norm1(x_NTD), bias_N11T)))
        inner = self.gelu(self.inner(self.norm2(x_NTD)))
        return x_NTD + self.drop(self.dropout(self.outer(inner)))


class Encoder(nn.Module):
    """A transformer encoder with learnt positions; the mean over a text's tokens is classified.

    Args:
        num_classes: K.
        vocab_size: Number of token ids.
        max_tokens: Largest T.
        width: D.
        depth: Number of layers.
        heads: A, of which `width` is a multiple.
        hidden: Width inside a layer's feed-forward half.
        dropout: Probability by which embeddings, attention and outputs of layers' halves are left out.
        stochastic_depth: Of the last layer; less before it, in even steps from 0.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        vocab_size: int,
        max_tokens: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 512,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_tokens, width)
        for table in (self.tokens, self.positions):  # of norm 1 and more each, they would drown what layers add
            nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.layers = nn.ModuleList(
            EncoderLayer(
                width,
                heads=heads,
                hidden=hidden,
                dropout=dropout,
                stochastic_depth=stochastic_depth * number / depth,
            )
            for number in range(1, depth + 1)
        )
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        """Logits [N, K].

        Args:
            ids_NT: int64 token ids.
            mask_NT: int64, 0 where a text is padded, else 1.
        """
        places_T = torch.arange(ids_NT.shape[1], device=ids_NT.device)
        x_NTD = self.dropout(self.norm(self.tokens(ids_NT) + self.positions(places_T)))
        # Finite, and within fp16: a text of padding alone gives numbers too.
        bias_N11T = (mask_NT == 0).to(x_NTD.dtype)[:, None, None, :] * -1e4
        for layer in self.layers:
            x_NTD = layer(x_NTD, bias_N11T)
        kept_NT1 = (mask_NT != 0).to(x_NTD.dtype)[:, :, None]
        mean_ND = (self.last_norm(x_NTD) * kept_NT1).sum(1) / kept_NT1.sum(1).clamp(min=1)
        return self.head(self.dropout(mean_ND))


class ImageLogits(nn.Module):
    """An image classifier of transformers that gives its logits alone.

    Args:
        model: Takes `pixel_values` and gives an output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x_NCHW).logits


class TextLogits(nn.Module):
    """A text classifier of transformers that gives its logits alone.

    Args:
        model: Takes `input_ids` and `attention_mask` and gives an output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids_NT, attention_mask=mask_NT).logits
