"""The torch side of the task: its losses, and the model as the graph that is exported.

N: texts. T: tokens. V: size of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class WithCache(nn.Module):
    """A causal model, called by position with ids, mask, places and a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs)


def nats(logits_NTV: torch.Tensor, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each token but the first, float32 [N, T - 1], 0 at padding; and where there is none, bool."""
    is_token_NT = mask_NT[:, 1:] != 0
    wanted_NT = ids_NT[:, 1:].masked_fill(~is_token_NT, -1)
    found = functional.cross_entropy(
        logits_NTV[:, :-1].float().flatten(0, 1), wanted_NT.flatten(), ignore_index=-1, reduction="none"
    )
    return found.view_as(wanted_NT), is_token_NT


def distilled(student_NTV: torch.Tensor, teacher_NTV: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """See `distill_loss`."""
    log_student, log_teacher = (
        functional.log_softmax(each.float().flatten(0, 1) / temperature, dim=-1) for each in (student_NTV, teacher_NTV)
    )
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
