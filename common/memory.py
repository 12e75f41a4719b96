"""The responses that a policy has written: kept, so that they can be learned from more than once."""
from __future__ import annotations

import torch
import torch.nn as nn

from model import Samples


class Memory(nn.Module):
    """Every response that was drawn, with all that its loss needs. A module, so that a checkpoint
    holds it and a run that is stopped goes on with the same data."""

    def __init__(self, rows: int, positions: int):
        super().__init__()
        for name, values in {
                "tokens": torch.zeros(rows, positions, dtype=torch.int32),
                "prompt_lengths": torch.zeros(rows, dtype=torch.int32),
                "lengths": torch.zeros(rows, dtype=torch.int32),
                "scores": torch.zeros(rows),
                "ref_logprobs": torch.zeros(rows),  # log pi_ref(y|x): it never changes
        }.items():
            self.register_buffer(name, values)

    def write(self, start: int, samples: Samples, scores: torch.Tensor,
              ref_logprobs: torch.Tensor | float = 0.0) -> None:
        """Keep a batch in the rows from `start` on."""
        end = start + len(scores)
        self.tokens[start:end, :samples.tokens.shape[1]] = samples.tokens
        self.prompt_lengths[start:end] = samples.prompt_lengths
        self.lengths[start:end] = samples.lengths
        self.scores[start:end] = scores
        self.ref_logprobs[start:end] = ref_logprobs

    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (b, T), prompt lengths and lengths (b,) of some rows, as response_logprobs takes
        them."""
        lengths = self.lengths[rows].long()
        tokens = self.tokens[rows, :int(lengths.max())].long()
        return tokens, self.prompt_lengths[rows].long(), lengths
