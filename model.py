"""The GPT that every file here trains: GPT-2's architecture, log-probabilities of responses,
sampling, a scalar head.

    log pi(y|x) = sum_t log pi(y_t | x, y_<t)

Architecture (Radford et al. 2019): learned positions, LayerNorm before each block, tanh GELU,
output head tied to the token embedding. No dropout: the methods here compare a policy with its
reference, and dropout would make two equal models differ (DPO's first loss would not be ln 2, PPO's
first ratio not 1).

Padding is always on the right, and lengths say where a row ends. Causal attention then needs no
mask and no position
ids: no real token can see a pad. Shapes: B rows, T positions, C channels, V vocabulary, R response
positions.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import fail
from common.processes import RANK, WORLD, share
from common.sharding import whole
from common.training import autocast, device, similar_lengths


# ---- the network ---------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # positions: prompt and response together
    n_layer: int
    n_head: int
    n_embd: int


class Cache:
    """Keys and values of the positions seen so far, for B rows. One tensor, so that rows can be
    dropped at once."""

    def __init__(self, config: GPTConfig, rows: int, positions: int, dtype: torch.dtype,
                 device: torch.device):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, rows, config.n_head, positions, head_size)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions filled


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        # queries, keys and values of all heads
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, kv: torch.Tensor | None, start: int) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, heads, T, C / heads)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if kv is not None:  # keep these keys and values, and attend to all that are kept
            kv[0, :, :, start:start + T] = k
            kv[1, :, :, start:start + T] = v
            k = kv[0, :, :, :start + T]
            v = kv[1, :, :, :start + T]
        # with a cache T is 1, which sees everything before it, or start is 0, which is the ordinary
        # causal case
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, heads, T, C / heads)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)). Names follow the GPT-2
    checkpoint."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self,
                x: torch.Tensor,
                kv: torch.Tensor | None = None,
                start: int = 0) -> torch.Tensor:
        """x (B, T, C) at positions start..start+T; kv (2, B, heads, positions, C / heads) is this
        layer's cache."""
        x = x + self.attn(self.ln_1(x), kv, start)
        x = x + self.mlp(self.ln_2(x))
        return x


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
                # the two layers of a block that write into the residual stream, scaled for the 2
                # n_layer additions
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Last hidden states (B, T, C) of tokens (B, T). With a cache, tokens are the positions
        that follow it."""
        T = tokens.shape[1]
        start = cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} positions do not fit into block_size {self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[start:start + T]  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache.kv[i] if cache else None, start)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for the token after each position of tokens (B, T)."""
        return F.linear(self.hidden(tokens), self.wte.weight)


class ScalarModel(nn.Module):
    """A GPT with one number a position in place of the head: a reward model, a value function, a
    classifier."""

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

    @classmethod
    def from_policy(cls, policy: GPT, block_size: int, seed: int) -> ScalarModel:
        """One that starts from a policy's weights; the head, and positions beyond the policy's,
        start at random."""
        torch.manual_seed(seed)
        sizes = policy.config
        model = cls(
            GPTConfig(sizes.vocab_size, block_size, sizes.n_layer, sizes.n_head, sizes.n_embd))
        state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        positions = model.gpt.wpe.weight.detach().clone()
        shared = min(block_size, sizes.block_size)
        positions[:shared] = state["wpe.weight"][:shared]
        model.gpt.load_state_dict({**state, "wpe.weight": positions})
        return model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scalars (B, T), fp32: the one at position t has seen tokens[:, :t + 1]."""
        return self.normalised(self.head(self.gpt.hidden(tokens)))

    def score(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The scalar at the last real token of each row, (B,)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        last = self.gpt.hidden(tokens)[rows, lengths - 1]  # (B, C)
        return self.normalised(self.head(last))

    def normalised(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw.squeeze(-1).float() - self.mean) / self.std


# ---- log-probabilities ---------------------------------------------------------------------------

def response_mask(prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """True where response position r of a row exists, (B, R): r < lengths - prompt_lengths. R is
    the longest response."""
    sizes = lengths - prompt_lengths
    return torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]


def response_logprobs(model: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor,
                      lengths: torch.Tensor) -> torch.Tensor:
    """Log-probability, in nats and fp32, of every response token given all that comes before it.

    The head runs on the hidden states that predict a response token, and on no other: position t
    predicts token t + 1, so the first response token is read at the last prompt token. Nothing is
    computed from pads, nor from the prompt's own tokens.

    Args:
        tokens: (B, T) prompt then response, right-padded.
        prompt_lengths, lengths: (B,) tokens of the prompt; of prompt and response (with EOS, where
            it has one).
    Returns:
        (B, R) log-probabilities, 0 where a row has no token; its sum over a row is log pi(response
        | prompt).
    """
    mask = response_mask(prompt_lengths, lengths)
    # (N,) each: all response tokens of the batch, one after the other
    rows, r = mask.nonzero(as_tuple=True)
    place = prompt_lengths[rows] + r  # where in its row the token stands
    hidden = model.hidden(tokens[:, :int(lengths.max())])
    logits = F.linear(hidden[rows, place - 1], model.wte.weight)  # (N, V)
    if logits.dtype == torch.bfloat16:  # under autocast: too coarse for a softmax
        logits = logits.float()

    # log p(token) = logit - log sum exp(logits). The softmax does not see a shift, and without it
    # exp could overflow.
    logits = logits - logits.amax(1, keepdim=True).detach()
    chosen = logits.gather(1, tokens[rows, place][:, None]).squeeze(1)
    logprobs = chosen - logits.exp().sum(1).log()  # (N,)
    return logprobs.new_zeros(mask.shape).index_put((rows, r), logprobs)


ROOM = 2**33  # bytes that the logits of a batch, or the cache of a sample, may take


def at_once(most: int, bytes_of_a_row: int) -> int:
    """Rows to run together without gradient: as many as pay, fewer where a row takes much."""
    return max(1, min(most, ROOM // bytes_of_a_row))


@torch.no_grad()
def summed_logprobs(model: GPT,
                    tokens: torch.Tensor,
                    prompt_lengths: torch.Tensor,
                    lengths: torch.Tensor,
                    dtype: str = "auto",
                    batch_size: int = 256) -> torch.Tensor:
    """log pi(response | prompt) of many rows, (N,) fp32 on the CPU, without gradient; similar
    lengths run together."""
    total = torch.zeros(len(tokens))
    longest = int((lengths - prompt_lengths).max())
    # two copies of the logits
    batch_size = at_once(batch_size, 2 * 4 * model.config.vocab_size * longest)
    with whole(model), autocast(dtype):
        for rows in similar_lengths(torch.arange(len(tokens))[RANK::WORLD], lengths, batch_size):
            logprobs = response_logprobs(model, tokens[rows].to(device()),
                                         prompt_lengths[rows].to(device()),
                                         lengths[rows].to(device()))
            total[rows] = logprobs.sum(1).cpu()
    share(total)
    return total


# ---- sampling ------------------------------------------------------------------------------------

class Samples(NamedTuple):
    tokens: torch.Tensor  # (B, T) prompt, response and EOS (if it came), right-padded
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor  # (B,) prompt and response, EOS counted
    logprobs: torch.Tensor | None  # (B, R) as response_logprobs gives them

    def response_ids(self) -> list[list[int]]:
        """The ids of every response, with its EOS where it came."""
        bounds = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [row[prompt:end] for row, prompt, end in bounds]


@torch.no_grad()
def generate(model: GPT,
             prompts: list[list[int]],
             max_length: int,
             eos: int,
             pad: int,
             generator: torch.Generator,
             temperature: float = 1.0,
             return_logprobs: bool = False,
             chunk: int = 1024) -> Samples:
    """Sample a response to every prompt, from exactly the softmax that response_logprobs scores: no
    top-k, no top-p.

    A row ends at its EOS or at max_length. Row i draws its own uniform numbers, so what it gets
    does not depend on the rows beside it (up to rounding).

    Args:
        prompts: ids of each prompt, at least one id each.
        max_length: positions of prompt and response together, at most block_size; longer than every
            prompt.
        generator: the private random stream (on the CPU); nothing else is drawn from.
        temperature: divides the logits; 0 takes the most likely token.
        chunk: rows at a time; fewer where their cache would be larger than ROOM.
    Raises:
        ValueError if a prompt is empty or leaves no room for a response.
    """
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(
            len, prompts)) == 0 or longest >= max_length or max_length > model.config.block_size:
        raise ValueError(
            f"prompts need 1 to max_length - 1 ids each and max_length at most block_size: "
            f"longest {longest}, max_length {max_length}, block_size {model.config.block_size}")
    B = len(prompts)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    # one number a position: it picks the token there
    uniform = torch.rand(B, max_length, generator=generator)
    tokens = torch.full((B, max_length), pad)
    for i, prompt in enumerate(prompts):
        tokens[i, :len(prompt)] = torch.as_tensor(prompt)

    written = torch.zeros_like(tokens)
    lengths = torch.zeros(B, dtype=torch.long)
    logprobs = torch.zeros(B, max_length)
    sizes = model.config
    chunk = at_once(chunk, 2 * 4 * sizes.n_layer * sizes.n_embd * max_length)  # keys and values
    with whole(model):
        for rows in chunks_of_similar_length(prompt_lengths, chunk):
            rows = rows[RANK::WORLD]  # of several processes each samples its share ...
            if len(rows):
                written[rows], lengths[rows], logprobs[rows] = decode(
                    model, tokens[rows], prompt_lengths[rows], uniform[rows], eos, pad,
                    temperature, return_logprobs)
    share(written, lengths, logprobs)  # ... and gets those of the others

    tokens = written[:, :int(lengths.max())]
    if not return_logprobs:
        return Samples(tokens, prompt_lengths, lengths, None)
    mask = response_mask(prompt_lengths, lengths)  # (B, R)
    # the position of each response token
    places = prompt_lengths[:, None] + torch.arange(mask.shape[1])
    logprobs = logprobs.gather(1, places.clamp(max=max_length - 1)) * mask
    return Samples(tokens, prompt_lengths, lengths, logprobs)


def chunks_of_similar_length(prompt_lengths: torch.Tensor, chunk: int) -> tuple[torch.Tensor, ...]:
    """Rows to sample together, shortest prompts first. In a chunk of more than 64 rows the prompts
    differ by less than 16 tokens, or long ones would make short ones wait (a third of the time on
    `posts`)."""
    order = prompt_lengths.argsort(stable=True)
    starts = [0]
    for i, length in enumerate(prompt_lengths[order].tolist()):
        rows = i - starts[-1]
        shortest = int(prompt_lengths[order[starts[-1]]])
        if rows == chunk or (rows >= 64 and length - shortest >= 16):
            starts.append(i)
    return order.tensor_split(starts[1:])


def decode(model: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor, uniform: torch.Tensor,
           eos: int, pad: int, temperature: float,
           with_logprobs: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample all rows of a chunk in lock-step: position by position, each row seeing its own prompt
    and what it wrote.

    A row that is still inside its prompt takes the prompt's next token where the others take a
    sampled one.

    Args:
        tokens: (B, T) the prompts, padded to the longest that a row may get.
        uniform: (B, T) numbers in [0, 1).
    Returns:
        tokens (B, T) with the responses; lengths (B,); log-probabilities (B, T), each at its
        token's position. On the CPU.
    """
    device = model.wte.weight.device
    B, T = tokens.shape
    tokens, prompt_lengths, uniform = tokens.to(device), prompt_lengths.to(device), uniform.to(
        device)
    lengths = torch.full((B,), T, device=device)
    logprobs = torch.zeros(B, T, device=device)
    under_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if under_autocast else model.wte.weight.dtype
    cache = Cache(model.config, B, T, dtype, device)
    alive = torch.arange(B, device=device)  # alive[i]: which row of the chunk is row i of the cache
    done = torch.zeros(B, dtype=torch.bool, device=device)  # of the rows in the cache: EOS has come
    position = int(prompt_lengths.min())
    new = tokens[:, :position]  # what the model has not seen yet
    while position < T:
        # 1) logits of the next token of every row
        logits = F.linear(model.hidden(new, cache)[:, -1], model.wte.weight).float()  # (rows, V)

        # 2) one uniform number picks a token: the first whose cumulative probability exceeds it
        if temperature == 0:
            token = logits.argmax(1)
        else:
            probs = torch.softmax(logits / temperature, 1)
            cumulative = probs.cumsum(1)
            threshold = uniform[alive, position, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
            token.clamp_(max=logits.shape[1] - 1)  # u * total may round up to the total itself
            if with_logprobs:
                logprobs[alive, position] = probs.gather(1, token[:, None]).squeeze(1).log()

        # 3) still inside the prompt? then its own token; after the end? then a pad
        in_prompt = position < prompt_lengths[alive]
        token = torch.where(in_prompt, tokens[alive, position], token).masked_fill(done, pad)
        tokens[alive, position] = token
        position += 1

        # 4) ended?
        ended = (token == eos) & ~in_prompt & ~done
        lengths[alive[ended]] = position
        done |= ended
        finished = int(done.sum())
        if finished == len(done):
            break
        # rows that have ended leave, some at a time: moving the cache costs, too
        if finished > 0.1 * len(done):
            keep = (~done).nonzero().squeeze(1)
            alive, token, done = alive[keep], token[keep], done[keep]
            cache.kv = cache.kv[:, :, keep]
        new = token[:, None]
    return tokens.cpu(), lengths.cpu(), logprobs.cpu()
