"""Networks over rows of a table: numbers, and categories as ids.

N: rows. F: columns of numbers. C: columns of categories. D: numbers that a category becomes. K: classes, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from bmctl.models.own.networks import MLP


class Tabular(nn.Module):
    """Rows of a table: an embedding for each column of categories beside the numbers, then linear layers with ReLU.

    Args:
        num_numbers: F.
        category_sizes: Ids of each column of categories.
        num_classes: K.
        hidden: Width of each hidden layer.
        embedding: Numbers that a category becomes.
        dropout: Probability by which outputs of hidden layers are left out.
    """

    first: torch.Tensor

    def __init__(
        self,
        *,
        num_numbers: int,
        category_sizes: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (128, 64),
        embedding: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_numbers, self.num_categories = num_numbers, len(category_sizes)
        if category_sizes:
            # One table for all columns; `first` is where each one's rows begin in it.
            self.register_buffer("first", torch.tensor([0, *accumulate(category_sizes)][:-1]), persistent=False)
            self.embedding = nn.Embedding(sum(category_sizes), embedding)
        num_inputs = num_numbers + embedding * len(category_sizes)
        self.mlp = MLP(num_inputs=num_inputs, num_classes=num_classes, hidden=hidden, dropout=dropout)

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers float [N, F] and categories int64 [N, C]; without numbers the categories come first."""
        if not self.num_numbers:
            return self.mlp(self.embedding(numbers + self.first))
        if categories is None:
            return self.mlp(numbers)
        return self.mlp(torch.cat([numbers, self.embedding(categories + self.first).flatten(1)], dim=1))


class Factors(nn.Module):
    """A factorisation machine: what each category says by itself, and what each two say together.

    Of users and items alone it is matrix factorisation with biases. With `hidden` layers beside it, which see all that
    it sees, it is DeepFM.

    Args:
        num_numbers: F.
        category_sizes: Ids of each column of categories.
        num_classes: K.
        embedding: D.
        hidden: Width of each hidden layer; none leaves them out.
        dropout: Probability by which numbers of an embedding, and outputs of hidden layers, are left out.

    Source: Rendle 2010, https://doi.org/10.1109/ICDM.2010.127; Guo et al. 2017, https://arxiv.org/abs/1703.04247
    """

    first: torch.Tensor

    def __init__(
        self,
        *,
        num_numbers: int,
        category_sizes: Sequence[int],
        num_classes: int,
        embedding: int = 16,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_numbers = num_numbers
        self.register_buffer("first", torch.tensor([0, *accumulate(category_sizes)][:-1]), persistent=False)
        self.alone = nn.Embedding(sum(category_sizes), num_classes)
        self.embedding = nn.Embedding(sum(category_sizes), embedding)
        nn.init.zeros_(self.alone.weight)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.numbers = nn.Linear(num_numbers, num_classes) if num_numbers else None
        self.pairs = nn.Linear(embedding, num_classes)
        nn.init.ones_(self.pairs.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.mlp = None
        if hidden:
            num_inputs = num_numbers + embedding * len(category_sizes)
            self.mlp = MLP(num_inputs=num_inputs, num_classes=num_classes, hidden=hidden, dropout=dropout)

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers float [N, F] and categories int64 [N, C]; without numbers the categories come first."""
        rows_NC = (numbers if categories is None else categories) + self.first
        vectors_NCD = self.dropout(self.embedding(rows_NC))
        total_ND = vectors_NCD.sum(dim=1)
        # The sum over all pairs of columns, at the cost of one pass over the columns.
        pairs_ND = (total_ND * total_ND - (vectors_NCD * vectors_NCD).sum(dim=1)) / 2
        found = self.alone(rows_NC).sum(dim=1) + self.pairs(pairs_ND)
        if self.numbers is not None:
            found = found + self.numbers(numbers)
        if self.mlp is not None:
            flat = vectors_NCD.flatten(1)
            found = found + self.mlp(flat if self.numbers is None else torch.cat([numbers, flat], dim=1))
        return found
