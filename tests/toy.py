"""Two small worlds in which every response can be enumerated, for the tests of reinforce.py and ppo.py: a policy that is a
table, and words of at most 8 letters on which the scripts themselves run.
"""
import itertools
import random
import shutil

import pytest
import torch

import clone
from common import tasks
from common.files import write_jsonl
from common.rewards import user_function
from common.run import load_run
from common.tokenizer import Tokenizer, train_bpe
from conftest import every_response

# ---- everything enumerated: a policy is a table, a response one or two of the tokens 0, 1, 2 (which ends it) -----------

RESPONSES = list(every_response(vocab=3, length=2, eos=2))  # 7
TOKEN = torch.tensor([response + [0] * (2 - len(response)) for response in RESPONSES])
THERE = torch.tensor([[True, len(response) == 2] for response in RESPONSES])
STATE = torch.tensor([[0, 1 + response[0] if len(response) == 2 else 0] for response in RESPONSES])  # the row of the table


def logprobs_of(table: torch.Tensor) -> torch.Tensor:
    """log pi of every token of every response, (7, 2), from logits (3, 3): after nothing, after 0, after 1."""
    return table.log_softmax(1)[STATE, TOKEN] * THERE


@pytest.fixture(params=[0, 1])
def tables(request):
    """Logits of a policy and of the reference, and the reward of every response."""
    draw = torch.Generator().manual_seed(request.param)
    return *torch.randn(2, 3, 3, generator=draw, dtype=torch.double), torch.randn(7, generator=draw, dtype=torch.double)


def exact_kl(table: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) by the chain rule: that of the first token, and those of the second, as often as it is drawn there."""
    p, q = table.softmax(1), ref.softmax(1)
    rows = (p * (p / q).log()).sum(1)
    return rows[0] + p[0, 0] * rows[1] + p[0, 1] * rows[2]


def gradient(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, table, retain_graph=True)[0]


# ---- a task of words ------------------------------------------------------------------------------------------------------

PROMPTS = ["a", "b", "cd"]
REWARDS = """
def letters(prompts, responses):
    return [r.count(p[-1]) - 0.5 * len(r) for p, r in zip(prompts, responses)]

def ten_more(prompts, responses):
    return [x + 10 for x in letters(prompts, responses)]

def three_times(prompts, responses):
    return [3 * x + 10 for x in letters(prompts, responses)]
"""


def words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcd", (4, 3, 2, 1), k=rng.randint(2, 8))) for _ in range(count)]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A copy of the repository whose documents are words, and a folder of runs: a policy of at most 8 tokens, prompt and all,
    one of at most 4, and a reward model."""
    root, work = clone.make(tmp_path_factory.mktemp("clone")), tmp_path_factory.mktemp("work")
    shutil.rmtree(root / "data/reviews/prepared")

    def write(folder):
        train_bpe([], 259).save(folder / "tokenizer.tiktoken")  # bytes
        for name, field, texts in (("train", "text", words(600, 1)), ("test", "text", words(40, 2)),
                                   ("prompts_train", "prompt", PROMPTS * 40), ("prompts_test", "prompt", PROMPTS)):
            write_jsonl(folder / f"{name}.jsonl", [{field: text} for text in texts])
        return {}
    tasks.publish(root / "data/reviews/prepared", "reviews", write)
    pairs = itertools.combinations(sorted({word[:5] for word in words(12, 3)}), 2)
    write_jsonl(work / "pairs.jsonl", [{"prompt": "a", "chosen": a, "rejected": b} for a, b in pairs])
    (work / "rewards.py").write_text(REWARDS)
    small = "--n-layer 1 --n-embd 32 --n-head 2 --steps 300 --warmup 10 --lr 2e-2"
    for script, argv in (("sft", f"{small} --block-size 8 --out runs/sft"), ("sft", f"{small} --block-size 4 --out short/sft"),
                         ("reward_model", "--sft runs/sft --pairs pairs.jsonl --epochs 5 --out runs/reward-model")):
        assert clone.run_here(root, work, script, *argv.split()) == 0
    return root, work


def rows_of(samples) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every row, without padding."""
    return [(row[:p], row[p:n]) for row, p, n in
            zip(samples.tokens.tolist(), samples.prompt_lengths.tolist(), samples.lengths.tolist())]


@torch.no_grad()
def worlds(work, *networks) -> list[tuple[torch.Tensor, ...]]:
    """Of each prompt: log pi of every response by each network of at most 4 tokens, and its reward. A prompt of one letter has
    1 + 258 * 259 responses, one of two letters 259."""
    tokenizer, reward = Tokenizer.load(work / "short/sft/tokenizer.tiktoken"), user_function(f"{work / 'rewards.py'}:letters", "--reward")
    not_eos, found = [v for v in range(259) if v != tokenizer.eos], []

    def logprobs(model, prompt):
        first = model(torch.tensor([prompt]))[0, -1].double().log_softmax(0)
        if len(prompt) == 3:
            return first
        second = model(torch.tensor([prompt + [v] for v in not_eos]))[:, -1].double().log_softmax(1)
        return torch.cat([first[[tokenizer.eos]], (first[not_eos, None] + second).flatten()])
    for prompt in PROMPTS:
        rows = [[v] for v in range(259)] if len(prompt) == 2 else [
            [tokenizer.eos], *([v, w] for v in not_eos for w in range(259))]
        texts = [tokenizer.decode(ids) for ids in rows]
        found.append((*(logprobs(network, [tokenizer.bos, *tokenizer.encode(prompt)]) for network in networks),
                      reward([prompt] * len(texts), texts).double()))
        assert all(x.exp().sum().item() == pytest.approx(1, abs=1e-5) for x in found[-1][:-1])
    return found


def share_of_what_can_be_gained(log: list[dict], folder, work) -> float:
    """Of a finished run at --beta 0.5 from short/sft: (E[r] - beta KL of its policy, less that of the reference) over what the
    best policy, pi_ref exp(r / beta) / Z, has more than the reference."""
    high, low = (choose(log, key=lambda row: row["raw_scores"]) for choose in (max, min))
    std = (high["raw_scores"] - low["raw_scores"]) / (high["scores"] - low["scores"])  # scores = (raw - mean) / std
    beta, world = 0.5 * std, worlds(work, load_run(work / "short/sft")[0], load_run(folder)[0])
    best = sum(beta * torch.logsumexp(ref + r / beta, 0) for ref, _, r in world) / 3
    start, end = (sum((w[i].exp() * (w[2] - beta * (w[i] - w[0]))).sum() for w in world) / 3 for i in (0, 1))
    assert best - start > 0.3
    return ((end - start) / (best - start)).item()


# ---- seven responses that are one action each: their chances, and rewards of which two pairs are equal -------------------

PROBS = torch.tensor([0.05, 0.3, 0.1, 0.2, 0.05, 0.25, 0.05], dtype=torch.double)
REWARD = torch.tensor([2.0, 0.5, 1.5, 0.5, 3.0, -1.0, 1.5], dtype=torch.double)  # two pairs of equal ones


def best_of_n(probs, n, reward=REWARD):
    """In closed form: F(r)^n - F(below r)^n for all responses of reward r, shared as the reference shares it."""
    target = torch.zeros_like(probs)
    for r in reward.unique():
        equal = reward == r
        up_to, below = probs[reward <= r].sum(), probs[reward < r].sum()
        target[equal] = probs[equal] / probs[equal].sum() * (up_to ** n - below ** n)
    return target
