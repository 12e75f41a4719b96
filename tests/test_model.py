"""model.py: the network, log-probabilities of responses, sampling, scalar models, GPT-2 checkpoints.

Everything is compared with something slower and more obvious: loops with GPT-2's formulas, numbers worked out by hand,
enumeration of all responses, or the definition applied to one unpadded row.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as model_module
from common.training import autocast, generator, pad
from conftest import every_response, naive_logprobs, tiny_gpt
from common.gpt2 import from_pretrained, save_pretrained
from model import GPT, GPTConfig, ScalarModel, generate, response_logprobs, response_mask, summed_logprobs

# rows of different shapes: (prompt, response)
ROWS = [([1, 4, 5], [6, 7, 2]), ([1], [3, 3, 9, 10, 2]), ([1, 8, 2, 0, 6], [2]), ([1, 9], [4, 0, 8, 5, 5, 1, 7, 7, 3, 6])]


def batch_of(rows, pad_id=0):
    """Tokens, prompt lengths and lengths of (prompt, response) rows, as the scripts batch them."""
    tokens, lengths = pad([p + r for p, r in rows], pad_id)
    return tokens, torch.tensor([len(p) for p, _ in rows]), lengths


# ---- the network -----------------------------------------------------------------------------------------------------

def naive_gpt2(model, tokens):
    """Logits (T, V) of one row of ids: GPT-2 written as its formulas, with loops over positions and heads."""
    w = dict(model.named_parameters())

    def layer_norm(x, name):
        centred = x - x.mean()
        return centred / torch.sqrt((centred ** 2).mean() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    T, C, heads = len(tokens), model.config.n_embd, model.config.n_head
    x = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(tokens)]
    for i in range(model.config.n_layer):
        block = f"h.{i}."
        qkv = [linear(layer_norm(v, block + "ln_1"), block + "attn.c_attn") for v in x]
        for t in range(T):
            mixed = []
            for h in range(heads):
                q, k, v = ([row[part * C + h * C // heads: part * C + (h + 1) * C // heads] for row in qkv] for part in range(3))
                scores = torch.stack([q[t] @ k[s] / math.sqrt(C // heads) if s <= t else x[0].new_tensor(-math.inf)
                                      for s in range(T)])
                mixed.append(sum(p * v[s] for s, p in enumerate(torch.exp(scores) / torch.exp(scores).sum())))
            x[t] = x[t] + linear(torch.cat(mixed), block + "attn.c_proj")
        x = [v + linear(gelu(linear(layer_norm(v, block + "ln_2"), block + "mlp.c_fc")), block + "mlp.c_proj") for v in x]
    return torch.stack([w["wte.weight"] @ layer_norm(v, "ln_f") for v in x])


@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_logits_are_those_of_gpt2_written_out_with_loops(n_head):
    model = tiny_gpt(n_head=n_head).double()
    tokens = [1, 4, 4, 10, 0, 7, 3]
    torch.testing.assert_close(model(torch.tensor([tokens]))[0], naive_gpt2(model, tokens), rtol=0, atol=1e-12)


def test_a_later_token_changes_nothing_before_it():
    model = tiny_gpt().double()
    tokens = torch.tensor([[1, 4, 4, 10, 0, 7, 3]])
    for t in range(1, 7):
        changed = tokens.clone()
        changed[0, t:] = 9
        assert torch.equal(model(changed)[0, :t], model(tokens)[0, :t])


def test_gpt2_small_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    weights = dict(GPT(GPTConfig(500, 64, n_layer=8, n_head=4, n_embd=64)).named_parameters())
    for name, expected in {"wte.weight": 0.02, "h.3.attn.c_attn.weight": 0.02, "h.3.mlp.c_fc.weight": 0.02,
                           "h.3.attn.c_proj.weight": 0.02 / 4, "h.3.mlp.c_proj.weight": 0.02 / 4}.items():  # sqrt(2 * 8) = 4
        assert weights[name].std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * weights[name].numel()))
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert (weight == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name


def test_more_positions_than_the_block_has_are_refused():
    with pytest.raises(ValueError, match="13 positions do not fit into block_size 12"):
        tiny_gpt(block_size=12)(torch.zeros(1, 13, dtype=torch.long))


# ---- log-probabilities of responses ----------------------------------------------------------------------------------

def bigram_model():
    """A GPT whose probabilities can be read off: P(next = v) is proportional to c[v] after tokens 0 and 1, to 1 / c[v]
    after 2 and 3, with c = 2, 4, 1/2, 1/4.

    Blocks and positions are zero, and token v is embedded as (log c[v], -log c[v]) / 2. LayerNorm leaves its sign, (1, -1)
    or (-1, 1), so the logit of v is +log c[v] or -log c[v].
    """
    model = GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=2)).double()
    model.ln_f.eps = 0.0
    with torch.no_grad():
        for parameter in (*model.h.parameters(), model.wpe.weight):
            parameter.zero_()
        model.wte.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]) * math.log(2) / 2 * torch.tensor([1.0, -1.0]))
    return model


def test_logprobs_by_hand():
    """Every response token counts, the first and the last (<eos>), and no prompt token; the sum of c is 6.75."""
    model, eos = bigram_model(), 3
    rows = [([0, 2], [1, 0, eos]), ([3], [eos]), ([1, 1, 1], [2, eos])]
    expected = torch.tensor([[(1 / 4) / 6.75, 2 / 6.75, (1 / 4) / 6.75],   # after 2: 1/c[1]; after 1: c[0]; after 0: c[eos]
                             [4 / 6.75, 1, 1],                             # after 3: 1/c[eos]; no further token: log 1 = 0
                             [(1 / 2) / 6.75, 4 / 6.75, 1]]).double().log()
    torch.testing.assert_close(response_logprobs(model, *batch_of(rows)).double(), expected, rtol=0, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    """exp(1000) is infinite in fp32; the softmax of logits does not depend on a shift, so it is taken off first."""
    model = tiny_gpt()
    with torch.no_grad():
        model.ln_f.weight.mul_(500)
    logprobs = response_logprobs(model, *batch_of(ROWS))
    logprobs.sum().backward()
    expected = [naive_logprobs(model, *row).sum().item() for row in ROWS]
    assert logprobs.sum(1).tolist() == pytest.approx(expected, rel=1e-4) and min(expected) < -1000
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_logprobs_are_the_definition_and_zero_beyond_the_end():
    model = tiny_gpt()
    logprobs = response_logprobs(model, *batch_of(ROWS))
    assert logprobs.shape == (4, 10) and logprobs.dtype == torch.float32
    for row, (prompt, response) in zip(logprobs, ROWS):
        torch.testing.assert_close(row[:len(response)], naive_logprobs(model, prompt, response), rtol=1e-5, atol=1e-5)
        assert (row[len(response):] == 0).all()


def test_mask_marks_exactly_the_responses():
    mask = response_mask(*batch_of(ROWS)[1:])
    assert mask.tolist() == [[r < len(response) for r in range(10)] for _, response in ROWS]


def test_gradient_is_that_of_cross_entropy():
    """Same gradient as cross-entropy on -100-masked targets, for any weights on the tokens, hidden states and head alike."""
    model, weights = tiny_gpt().double(), torch.randn(4, 10, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    (response_logprobs(model, *batch_of(ROWS)) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = torch.tensor(0.0).double()
    for (prompt, response), weight in zip(ROWS, weights):
        targets = torch.tensor([-100] * (len(prompt) - 1) + response)
        logits = model(torch.tensor([prompt + response]))[0, :-1]
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        plain = plain - losses[len(prompt) - 1:] @ weight[:len(response)]
    plain.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-10, msg=name)


class Spied(torch.nn.Module):
    """A model whose last hidden states can be looked at, or replaced, on their way to the head."""

    def __init__(self, model, change=lambda hidden: hidden):
        super().__init__()
        self.model, self.wte, self.change = model, model.wte, change

    def hidden(self, tokens):
        self.states = self.change(self.model.hidden(tokens))
        self.states.retain_grad() if self.states.requires_grad else None
        return self.states


def predicting(rows, width):
    """True at the positions whose hidden state predicts a response token: the last of the prompt to the last but one."""
    return torch.tensor([[len(p) - 1 <= t < len(p + r) - 1 for t in range(width)] for p, r in rows])


def test_prompt_tokens_have_no_loss():
    """The gradient enters at the positions that predict a response token, and nowhere else; there it is onehot - softmax."""
    model = tiny_gpt().double()
    spied = Spied(model)
    response_logprobs(spied, *batch_of(ROWS)).sum().backward()
    entered = spied.states.grad
    at = predicting(ROWS, 12)
    assert (entered[~at] == 0).all() and (entered[at].abs().sum(1) > 0).all()
    probs = torch.softmax(spied.states @ model.wte.weight.T, -1)
    for i, (prompt, response) in enumerate(ROWS):
        for r, token in enumerate(response):
            t = len(prompt) + r - 1
            by_hand = model.wte.weight[token] - sum(probs[i, t, v] * model.wte.weight[v] for v in range(11))
            torch.testing.assert_close(entered[i, t], by_hand, rtol=0, atol=1e-12)


def test_nan_at_a_position_without_loss_stays_out():
    """Padding and prompt positions are left out, not multiplied by zero: 0 * nan would be nan."""
    model = tiny_gpt()
    at = predicting(ROWS, 12)[:, :, None]
    spied = Spied(model, lambda hidden: torch.where(at, hidden, math.nan))
    logprobs = response_logprobs(spied, *batch_of(ROWS))
    assert torch.equal(logprobs, response_logprobs(model, *batch_of(ROWS)))
    logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("pad_id", [0, 2, 10])
def test_padding_and_neighbours_change_nothing(pad_id, double):
    """A row alone, padded longer, and beside others, with any id as padding, one that rows contain (2 = <eos>) too."""
    model = tiny_gpt().double() if double else tiny_gpt()
    tokens, prompt_lengths, lengths = batch_of(ROWS, pad_id)
    together = response_logprobs(model, tokens, prompt_lengths, lengths)
    for i, row in enumerate(ROWS):
        tokens, *rest = batch_of([row], pad_id)
        R = len(row[1])
        for wider in (tokens, F.pad(tokens, (0, 5), value=pad_id), F.pad(tokens, (0, 40), value=pad_id)):
            alone = response_logprobs(model, wider, *rest)
            assert alone.shape == (1, R)
            torch.testing.assert_close(alone[0], together[i, :R], rtol=0, atol=1e-12 if double else 2e-6)


def test_summed_logprobs_keep_the_order_of_the_rows():
    """They run sorted by length and in batches, and come back in the order they were given."""
    model, draw = tiny_gpt(), generator(0)
    rows = [ROWS[i] for i in torch.randint(4, (23,), generator=draw).tolist()]
    found = summed_logprobs(model, *batch_of(rows), batch_size=4)
    expected = torch.stack([naive_logprobs(model, *row).sum() for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bf16_logprobs_are_normalised_and_repeatable():
    """Under autocast the softmax is still in fp32: probabilities of all next tokens add up to one. And the same row scored
    twice, with and without gradient, gives the same bits: a first ratio of exactly 1."""
    model = tiny_gpt(size=1.0)
    rows = [([1, 4, 5], [v]) for v in range(11)]
    with autocast("bfloat16"):
        first = response_logprobs(model, *batch_of(rows))
        with torch.no_grad():
            again = response_logprobs(model, *batch_of(rows))
    assert first.dtype == torch.float32
    assert first.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(torch.exp(first - again), torch.ones(11, 1))
    exact = torch.stack([naive_logprobs(model, *row) for row in rows])
    assert (first - exact).abs().max() < 0.1 and not torch.equal(first, exact)  # bf16 was on


# ---- sampling --------------------------------------------------------------------------------------------------------

PROMPTS = [[1], [1, 4], [1, 5, 2, 6, 7], [1, 3, 3], [1, 2], [1, 10, 9, 8, 7, 6, 5]]  # 2 is <eos>: two prompts contain it
EOS, PAD, LENGTH = 2, 0, 12


def slow_generate(model, prompts, max_length, temperature, uniform):
    """Each row by itself, without a cache, from the whole softmax: token = first v with P(<= v) > u. Lists of ids."""
    rows = []
    for i, prompt in enumerate(prompts):
        row = list(prompt)
        while len(row) < max_length:
            logits = model(torch.tensor([row]))[0, -1].double()
            if temperature == 0:
                token = max(range(len(logits)), key=lambda v: logits[v].item())
            else:
                up_to = torch.softmax(logits / temperature, 0).cumsum(0)
                token = next((v for v, p in enumerate(up_to.tolist()) if p > uniform[i, len(row)]), len(logits) - 1)
            row.append(token)
            if token == EOS:
                break
        rows.append(row)
    return rows


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_cached_ragged_sampling_is_slow_sampling(temperature, chunk):
    """Prompts of different lengths, run together with a cache, in chunks of any size, give the tokens of the slow loop."""
    model, prompts = tiny_gpt(), PROMPTS * 4
    samples = generate(model, prompts, LENGTH, EOS, PAD, generator(5), temperature, chunk=chunk)
    uniform = torch.rand(len(prompts), LENGTH, generator=generator(5))
    rows = slow_generate(model, prompts, LENGTH, temperature, uniform)
    assert [row[:n] for row, n in zip(samples.tokens.tolist(), samples.lengths.tolist())] == rows
    assert samples.prompt_lengths.tolist() == list(map(len, prompts))
    if temperature:  # this test has seen what it should: rows that end early, at once and never
        responses = [row[len(p):] for row, p in zip(rows, prompts)]
        assert any(len(r) == 1 for r in responses) and any(r[-1] != EOS for r in responses)


def test_long_prompts_are_sampled_as_slowly_and_cost_little_padding(monkeypatch):
    """Prompts of 1 to 60 tokens: the tokens are the slow loop's, and of the positions computed at most a quarter is waste."""
    model, draw, computed = tiny_gpt(block_size=70), generator(1), []
    prompts = [torch.randint(3, 11, (n,), generator=draw).tolist() for n in range(60, 0, -1) for _ in range(2)]
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: computed.append(tokens.numel()) or hidden(tokens, *rest))
    samples = generate(model, prompts, 70, EOS, PAD, generator(5))
    monkeypatch.undo()
    rows = slow_generate(model, prompts, 70, 1.0, torch.rand(len(prompts), 70, generator=generator(5)))
    assert [row[:n] for row, n in zip(samples.tokens.tolist(), samples.lengths.tolist())] == rows
    assert sum(len(row) - 1 for row in rows) >= 0.75 * sum(computed)  # the last token of a row is never fed back


def test_nothing_but_padding_after_the_one_eos():
    samples = generate(tiny_gpt(), PROMPTS * 10, LENGTH, EOS, pad=3, generator=generator(6))
    assert samples.tokens.shape[1] == samples.lengths.max() == LENGTH
    ended = 0
    for row, start, end in zip(samples.tokens.tolist(), samples.prompt_lengths.tolist(), samples.lengths.tolist()):
        assert row[end:] == [3] * (LENGTH - end)
        assert EOS not in row[start:end - 1]  # at most one, and it is the last
        assert row[end - 1] == EOS or end == LENGTH
        ended += row[end - 1] == EOS
    assert 0 < ended < len(samples.tokens)


def test_max_length_and_prompts_are_checked():
    samples = generate(tiny_gpt(), PROMPTS, 8, EOS, PAD, generator(0))
    assert samples.lengths.max() == 8
    for prompts, length in ((PROMPTS, 7), (PROMPTS, 13), ([[]], 5), ([], 5)):
        with pytest.raises(ValueError, match="block_size 12"):
            generate(tiny_gpt(), prompts, length, EOS, PAD, generator(0))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model = tiny_gpt()
    first = generate(model, PROMPTS, LENGTH, EOS, PAD, generator(7))
    other = generate(model, [[1, 6, 6, 6], *PROMPTS[1:3], [8], [4] * 10, PROMPTS[5]], LENGTH, EOS, PAD, generator(7))
    for i in (1, 2, 5):
        assert first.tokens[i, :first.lengths[i]].tolist() == other.tokens[i, :other.lengths[i]].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_those_of_scoring(temperature):
    """Sampling and scoring are one distribution, temperature included: nothing is cut off, nothing renormalised."""
    model = tiny_gpt()
    samples = generate(model, PROMPTS * 10, LENGTH, EOS, PAD, generator(8), temperature, return_logprobs=True)
    for row, start, end, reported in zip(samples.tokens, samples.prompt_lengths, samples.lengths, samples.logprobs):
        table = torch.log_softmax(model(row[None, :end])[0] / temperature, -1)
        scored = table[start - 1:end - 1].gather(1, row[start:end, None]).squeeze(1)
        torch.testing.assert_close(reported[:end - start], scored, rtol=0, atol=2e-5)
    if temperature == 1:
        torch.testing.assert_close(samples.logprobs, response_logprobs(model, *samples[:3]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square over 30,000 first tokens; 35.6 is the 99.99% point for 10 degrees of freedom."""
    model, n = tiny_gpt(), 30_000
    samples = generate(model, [[1, 4]] * n, 3, EOS, PAD, generator(9), temperature)
    expected = n * torch.softmax(model(torch.tensor([[1, 4]]))[0, -1].double() / temperature, 0)
    counts = samples.tokens[:, 2].bincount(minlength=11)
    assert ((counts - expected) ** 2 / expected).sum() < 35.6 and expected.min() > 5


def test_sampling_draws_from_its_own_stream_only():
    model, state = tiny_gpt(), torch.get_rng_state()
    a, b, c = (generate(model, PROMPTS, LENGTH, EOS, PAD, generator(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not (a.shape == c.shape and torch.equal(a, c))


def test_sampled_kl_is_the_exact_kl():
    """log pi - log pi_ref, summed over the response, on the policy's own samples: its mean is KL(pi || pi_ref), in this
    direction and with this sign, found here by enumerating all 40 responses."""
    policy, ref = (tiny_gpt(vocab_size=4, block_size=4, seed=seed, size=0.4) for seed in (1, 5))
    p, q = (torch.stack([naive_logprobs(m, [1], r).sum() for r in every_response(4, 3, EOS)]).detach().double()
            for m in (policy, ref))
    assert len(p) == 40 and p.exp().sum().item() == pytest.approx(1, abs=1e-5)  # and the responses are all there are
    exact, reverse = (p.exp() * (p - q)).sum().item(), (q.exp() * (q - p)).sum().item()
    samples = generate(policy, [[1]] * 20_000, 4, EOS, PAD, generator(3), return_logprobs=True)
    kl = samples.logprobs.sum(1) - summed_logprobs(ref, *samples[:3])
    error = (kl.std() / math.sqrt(len(kl))).item()
    assert abs(kl.mean().item() - exact) < 4 * error
    assert exact > 20 * error and abs(exact - reverse) > 6 * error  # sign and direction could be told apart


# ---- scalar models ---------------------------------------------------------------------------------------------------

def tiny_scalar():
    model = ScalarModel(GPTConfig(11, 12, 2, 2, 8))
    model.gpt.load_state_dict(tiny_gpt().state_dict())
    return model.eval()


@pytest.mark.parametrize("pad_id", [0, 2, 10])
def test_the_score_is_read_at_the_last_real_token(pad_id):
    model = tiny_scalar()
    tokens, _, lengths = batch_of(ROWS, pad_id)
    found = model.score(tokens, lengths)
    for score, (prompt, response) in zip(found, ROWS):
        row = torch.tensor([prompt + response])
        by_hand = model.gpt.hidden(row)[0, -1] @ model.head.weight[0] + model.head.bias[0]
        torch.testing.assert_close(score, by_hand, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(row)[0, -1], by_hand, rtol=0, atol=1e-5)  # the whole row of scalars ends with it


def test_scores_are_normalised_and_the_file_remembers_it():
    model = tiny_scalar()
    tokens, _, lengths = batch_of(ROWS)
    raw = model.score(tokens, lengths)
    model.mean.fill_(3.0)
    model.std.fill_(0.5)
    copy = tiny_scalar()
    copy.load_state_dict(model.state_dict())
    for network in (model, copy):
        torch.testing.assert_close(network.score(tokens, lengths), (raw - 3.0) / 0.5)
        torch.testing.assert_close(network(tokens)[torch.arange(4), lengths - 1], (raw - 3.0) / 0.5, rtol=0, atol=1e-5)


def test_first_scores_have_variance_one():
    """Head weights from N(0, 1/(C+1)) on LayerNorm's outputs, whose squares sum to C: variance C/(C+1), mean 0."""
    torch.manual_seed(0)
    draws = torch.stack([ScalarModel(GPTConfig(11, 12, 1, 2, 8))(torch.tensor([[1, 4]]))[0, -1] for _ in range(400)]).detach()
    assert abs(draws.mean().item()) < 4 / math.sqrt(400)
    assert draws.var().item() == pytest.approx(8 / 9, abs=4 * math.sqrt(2 / 400))


# ---- GPT-2 checkpoints -----------------------------------------------------------------------------------------------

# a one-block GPT-2 of C = 8 channels, 11 tokens and 12 positions, as transformers writes it: Conv1D weights are (in, out)
STORED = {"wte.weight": (11, 8), "wpe.weight": (12, 8), "ln_f.weight": (8,), "ln_f.bias": (8,),
          "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,), "h.0.ln_2.weight": (8,), "h.0.ln_2.bias": (8,),
          "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,),
          "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,),
          "h.0.mlp.c_fc.weight": (8, 32), "h.0.mlp.c_fc.bias": (32,),
          "h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,)}
TOKENS = torch.tensor([[1, 4, 4, 10, 0, 7, 3], [2, 2, 9, 8, 5, 6, 1]])


def test_a_saved_checkpoint_has_gpt2s_names_and_orientation(tmp_path):
    model = tiny_gpt(n_layer=1)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == {f"transformer.{k}": v for k, v in STORED.items()}
    x, projection = torch.randn(8), model.h[0].attn.c_proj  # square: only the values tell how it lies
    torch.testing.assert_close(x @ stored["transformer.h.0.attn.c_proj.weight"] + stored["transformer.h.0.attn.c_proj.bias"],
                               projection(x), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["activation_function"]) == ("gpt2", "gelu_new")
    assert [config[k] for k in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")] == [11, 12, 1, 2, 8]


@pytest.mark.parametrize("prefix", ["", "transformer."])  # openai-community/gpt2 on the hub has no prefix, newer files do
def test_a_checkpoint_comes_back_as_it_was(tmp_path, prefix):
    model = tiny_gpt(n_layer=3)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    extra = {"h.0.attn.bias": torch.ones(1, 1, 12, 12)}  # the causal mask that old files carry is not a weight
    renamed = {prefix + name.removeprefix("transformer."): value for name, value in stored.items()}
    save_file({**renamed, **extra}, tmp_path / "model.safetensors")
    assert torch.equal(from_pretrained(str(tmp_path))(TOKENS), model(TOKENS))


def test_transformers_computes_the_same_logits_from_the_same_files(tmp_path):
    """Both ways: its random GPT-2 read by us, ours read by it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no second implementation")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=12, n_layer=2, n_head=2, n_embd=8, initializer_range=0.5,
                                     bos_token_id=1, eos_token_id=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_gpt()
    save_pretrained(ours, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(str(tmp_path / "theirs"))(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)
        loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-5)


def test_unusable_checkpoints_stop_with_one_line(tmp_path, monkeypatch):
    def message(name):
        with pytest.raises(SystemExit) as stop:
            from_pretrained(str(name))
        assert "\n" not in str(stop.value)
        return str(stop.value)

    save_pretrained(tiny_gpt(), tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "model_type is 'llama'" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    assert "activation 'gelu'" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    del weights["transformer.h.1.ln_2.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    assert "no weight 'h.1.ln_2.bias' (1 missing)" in message(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "model.safetensors: cannot be read" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "expected the files config.json and model.safetensors" in message(tmp_path)
    assert "--init gpt3: no such folder, and not one of gpt2, gpt2-medium" in message("gpt3")


def test_gpt2_without_network_names_the_file_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "__file__", str(tmp_path / "model.py"))  # where it looks for an earlier download
    with pytest.raises(SystemExit) as stop:
        from_pretrained("gpt2")
    message = str(stop.value)
    assert "\n" not in message and "could not fetch https://huggingface.co/openai-community/gpt2/" in message
    assert "put config.json of the checkpoint into a folder and give that: --init FOLDER" in message
