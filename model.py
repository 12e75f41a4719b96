"""The GPT that every file here trains: GPT-2's architecture, sampling, log-probabilities of responses, a scalar head.

Architecture (Radford et al. 2019): learned positions, LayerNorm before each block, tanh GELU, output head tied to the
token embedding. No dropout: the methods here compare a policy with its reference, and dropout would make two equal
models differ (DPO's first loss would not be ln 2, PPO's first ratio not 1).

Padding is always on the right, and lengths say where a row ends. Causal attention then needs no mask and no position
ids: no real token can see a pad. Shapes: B rows, T positions, C channels, V vocabulary, R response positions.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common import fail
from common.files import atomic_write, read_json, write_json
from common.training import autocast, device


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # positions: prompt and response together
    n_layer: int
    n_head: int
    n_embd: int


class Cache:
    """Keys and values of the positions seen so far, for B rows. One tensor, so that rows can be dropped at once."""

    def __init__(self, config: GPTConfig, rows: int, positions: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layer, 2, rows, config.n_head, positions, config.n_embd // config.n_head)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions filled


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)). Names follow the GPT-2 checkpoint."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: torch.Tensor, kv: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """x (B, T, C) at positions start..start+T; kv (2, B, heads, positions, C/heads) is this layer's cache."""
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if kv is not None:
            kv[0, :, :, start:start + T], kv[1, :, :, start:start + T] = k, v
            k, v = kv[0, :, :, :start + T], kv[1, :, :, :start + T]
        # with a cache T is 1, which sees everything before it, or start is 0, which is the ordinary causal case
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            fail(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():  # GPT-2's initialisation
            if parameter.dim() == 2:
                # the two layers a block that write into the residual stream, scaled for the 2 n_layer additions
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Last hidden states (B, T, C) of tokens (B, T). With a cache, tokens are the positions that follow it."""
        start, T = cache.length if cache else 0, tokens.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} positions do not fit into block_size {self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[start:start + T]
        for i, block in enumerate(self.h):
            x = block(x, cache.kv[i] if cache else None, start)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for the token after each position of tokens (B, T)."""
        return F.linear(self.hidden(tokens), self.wte.weight)


class ScalarModel(nn.Module):
    """A GPT with one number a position in place of the head: a reward model, a value function, a classifier."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        # N(0, 1/(C+1)): scores start near 0 with variance about 1 (Ziegler et al. 2019)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))
        nn.init.zeros_(self.head.bias)
        # a reward model's scores on reference samples; (score - mean) / std is what it reports
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scalars (B, T), fp32: the one at position t has seen tokens[:, :t + 1]."""
        return self.normalised(self.head(self.gpt.hidden(tokens)))

    def score(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The scalar at the last real token of each row, (B,)."""
        last = self.gpt.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return self.normalised(self.head(last))

    def normalised(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw.squeeze(-1).float() - self.mean) / self.std


# ---- log-probabilities -----------------------------------------------------------------------------------------------

class _HeadLogProbs(torch.autograd.Function):
    """log softmax(hidden @ head.T / temperature)[targets], in one (N, V) buffer where autograd would fill four.

    With e = exp(logits - max), softmax = e / sum(e) and d log p[y] / d logits = onehot(y) - e / sum(e): the backward pass
    turns the buffer that holds e into the gradient in place.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature):  # (N, C), (V, C), (N,), a float
        logits = F.linear(hidden, head)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if temperature != 1.0:
            logits /= temperature
        chosen, top = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)
        e = logits.sub_(top).exp_()
        total = e.sum(1, keepdim=True)
        ctx.save_for_backward(hidden, head, targets, e, total)
        ctx.temperature = temperature
        return (chosen - top - total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # (N,)
        hidden, head, targets, e, total = ctx.saved_tensors
        gradient = gradient[:, None] / ctx.temperature
        d_logits = e.mul_(-gradient / total).scatter_add_(1, targets[:, None], gradient).to(hidden.dtype)
        return d_logits @ head, d_logits.t() @ hidden, None, None


def response_mask(prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """True where response position r of a row exists, (B, R): r < lengths - prompt_lengths. R is the longest response."""
    size = lengths - prompt_lengths
    return torch.arange(int(size.max()), device=size.device) < size[:, None]


def response_logprobs(model: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                      temperature: float = 1.0) -> torch.Tensor:
    """Log-probability, in nats and fp32, of every response token given all that comes before it.

    The head runs on the hidden states that predict a response token, and on no other: position t predicts token t + 1,
    so the first response token is read at the last prompt token. Nothing is computed from pads, nor from the prompt's
    own tokens.

    Args:
        tokens: (B, T) prompt then response, right-padded.
        prompt_lengths, lengths: (B,) tokens of the prompt; of prompt and response (with EOS, where it has one).
        temperature: the one the response was sampled with.
    Returns:
        (B, R) log-probabilities, 0 where a row has no token; its sum over a row is log pi(response | prompt).
    """
    mask = response_mask(prompt_lengths, lengths)
    rows, r = mask.nonzero(as_tuple=True)
    at = prompt_lengths[rows] + r  # the response token's place in the row
    hidden, head = model.hidden(tokens[:, :int(lengths.max())])[rows, at - 1], model.wte.weight
    if torch.is_autocast_enabled(tokens.device.type):  # matrix products in its dtype, backwards too; the softmax in fp32
        dtype = torch.get_autocast_dtype(tokens.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    flat = _HeadLogProbs.apply(hidden, head, tokens[rows, at], temperature)
    return flat.new_zeros(mask.shape).index_put((rows, r), flat)


@torch.no_grad()
def summed_logprobs(model: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                    dtype: str = "auto", batch_size: int = 256) -> torch.Tensor:
    """log pi(response | prompt) of many rows, (N,) fp32 on the CPU, without gradient; similar lengths run together."""
    total = torch.empty(len(tokens))
    for rows in lengths.argsort(stable=True).split(batch_size):
        with autocast(dtype):
            logprobs = response_logprobs(model, *(x[rows].to(device()) for x in (tokens, prompt_lengths, lengths)))
        total[rows] = logprobs.sum(1).cpu()
    return total


# ---- sampling --------------------------------------------------------------------------------------------------------

class Samples(NamedTuple):
    tokens: torch.Tensor  # (B, T) prompt, response and EOS (if it came), right-padded
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor  # (B,) prompt and response, EOS counted
    logprobs: torch.Tensor | None  # (B, R) as response_logprobs gives them


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_length: int, eos: int, pad: int, generator: torch.Generator,
             temperature: float = 1.0, return_logprobs: bool = False, chunk: int = 1024) -> Samples:
    """Sample a response to every prompt, from exactly the softmax that response_logprobs scores: no top-k, no top-p.

    Prompts of different lengths run together: all rows stand at the same position, and a row that is still inside its
    prompt takes the prompt's next token where the others take a sampled one; so from 64 rows on only prompts whose lengths
    differ by less than 16 tokens run together, or long ones would make short ones wait (a third of the time on `posts`). A
    row ends at its EOS or at max_length. Row i draws its own uniform numbers, so what it gets does not depend on `chunk`,
    nor on the rows beside it (up to rounding).

    Args:
        prompts: ids of each prompt, at least one id each.
        max_length: positions of prompt and response together, at most block_size; longer than every prompt.
        generator: the private random stream (on the CPU); nothing else is drawn from.
        temperature: divides the logits; 0 takes the most likely token.
        chunk: rows at a time; bounds the memory of the cache.
    """
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0 or longest >= max_length or max_length > model.config.block_size:
        raise ValueError(f"prompts need 1 to max_length - 1 ids each and max_length at most block_size: "
                         f"longest {longest}, max_length {max_length}, block_size {model.config.block_size}")
    device, B = model.wte.weight.device, len(prompts)
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    uniform = torch.rand(B, max_length, generator=generator)
    out = torch.full((B, max_length), pad)
    for i, prompt in enumerate(prompts):
        out[i, :len(prompt)] = torch.as_tensor(prompt)
    lengths, logprobs = torch.full((B,), max_length), torch.zeros(B, max_length)
    order, starts = prompt_lengths.argsort(stable=True), [0]
    for i, n in enumerate(prompt_lengths[order].tolist()):
        if i - starts[-1] == chunk or (i - starts[-1] >= 64 and n - prompt_lengths[order[starts[-1]]] >= 16):
            starts.append(i)
    for rows in order.tensor_split(starts[1:]):
        tokens, u = out[rows].to(device), uniform[rows].to(device)
        size, ends = prompt_lengths[rows].to(device), torch.full((len(rows),), max_length, device=device)
        chosen_logprobs = torch.zeros(len(rows), max_length, device=device)
        row = torch.arange(len(rows), device=device)  # which row of this chunk each row of the cache is
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
        cache = Cache(model.config, len(rows), max_length, dtype, device)
        position = int(size.min())
        new = tokens[:, :position]
        while position < max_length:
            logits = F.linear(model.hidden(new, cache)[:, -1], model.wte.weight).float()
            if temperature == 0:
                token = logits.argmax(1)
            else:  # inverse of the cumulative distribution: one uniform number a token
                probs = torch.softmax(logits / temperature, 1)
                total = probs.cumsum(1)
                token = torch.searchsorted(total, u[row, position, None] * total[:, -1:], right=True).squeeze(1)
                token.clamp_(max=logits.shape[1] - 1)  # u * total may round up to the total itself
                if return_logprobs:
                    chosen_logprobs[row, position] = probs.gather(1, token[:, None]).squeeze(1).log()
            in_prompt = position < size[row]
            token = torch.where(in_prompt, tokens[row, position], token).masked_fill(done, pad)
            tokens[row, position] = token
            position += 1
            ended = (token == eos) & ~in_prompt & ~done
            ends[row[ended]] = position
            done |= ended
            if (finished := int(done.sum())) == len(done):
                break
            if finished > 0.1 * len(done):  # rows that have ended leave, a few at a time: moving the cache costs, too
                keep = (~done).nonzero().squeeze(1)
                row, token, done, cache.kv = row[keep], token[keep], done[keep], cache.kv[:, :, keep]
            new = token[:, None]
        out[rows], lengths[rows], logprobs[rows] = tokens.cpu(), ends.cpu(), chosen_logprobs.cpu()
    out, R = out[:, :int(lengths.max())], int((lengths - prompt_lengths).max())
    aligned = None
    if return_logprobs:
        at = prompt_lengths[:, None] + torch.arange(R)
        aligned = logprobs.gather(1, at.clamp(max=max_length - 1)) * response_mask(prompt_lengths, lengths)
    return Samples(out, prompt_lengths, lengths, aligned)
