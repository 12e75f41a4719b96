"""Rewards: the gold one, a learned one (explicit, or implicit in a policy), or a function of yours.
One interface for all:

    reward(prompts, responses, samples=None) -> (B,) fp32 on the CPU; texts go in, higher is better
    reward.name     what it is, in words, for the tables that report it
    reward.id       what tells it from another reward: what was scored with it is tied to it by this
    reward.model    the ScalarModel behind a learned one; a value network can start from it

`samples` are the responses as they were sampled. A model scores these very tokens, as a text can be
written with others.
"""
from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import math
import numbers
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from common import fail, short, tasks
from common.files import read_json_object, read_jsonl, sha256
from common.processes import RANK, WORLD, share
from common.run import check_same_task, load_run
from common.sharding import whole
from common.tokenizer import Tokenizer
from common.training import autocast, device, fingerprint, pad, similar_lengths
from common.user_code import blamed, described, load_function
from model import GPT, Samples, ScalarModel, summed_logprobs


@dataclass
class Reward:
    name: str
    id: str
    score: Callable[[list[str], list[str], Samples | None], torch.Tensor]
    model: ScalarModel | None = None

    def __call__(self,
                 prompts: list[str],
                 responses: list[str],
                 samples: Samples | None = None) -> torch.Tensor:
        return self.score(prompts, responses, samples)


# ---- gold: what a task says is right ("gold" is the word of Gao et al. 2022; others say true, or o

def exact_reward(dataset: str) -> Reward:
    """The reward that the task defines as a function of the text, prompt and response."""
    task = tasks.load(dataset)
    function = task.gold_reward

    def score(prompts: list[str], responses: list[str], _: Samples | None = None) -> torch.Tensor:
        return torch.tensor(
            [function(prompt + response) for prompt, response in zip(prompts, responses)])

    return Reward(task.gold_name, function_id(function, dataset), score)


def function_id(function: Callable[[str], float], dataset: str) -> str:
    """16 hex digits of a reward function: of its code, without comments, and of what it gives on
    texts of the task.

    The code alone would miss a change in a function or a table that it uses.
    """
    folder = tasks.prepared(dataset)
    prompts = tasks.prompts(dataset, "test")[:200]
    # another prompt's, so no
    texts = [row["text"] for row in read_jsonl(folder / "test.jsonl", {"text": str})[1:201]]
    # reference is its own response
    values = [function(prompt + " " + text) for prompt, text in zip(prompts, texts)]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]  # the docstring
        code = ast.dump(tree)
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        code = ""  # of a function that was made, not written
    return hashlib.sha256((code + json.dumps(values)).encode()).hexdigest()[:16]


def gold_model(folder: Path) -> Reward:
    """A trained gold reward: P(positive) of a classifier, or sigmoid(score) of a reward model of
    human comparisons."""
    model, _ = load_run(folder, ScalarModel)
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    settings = read_json_object(folder / "config.json")
    pairwise = settings.get("on", "") == "pairs" or settings.get("script", "") == "reward_model.py"

    def score(prompts: list[str], responses: list[str], _: Samples | None = None) -> torch.Tensor:
        if pairwise:
            return torch.sigmoid(pair_scores(model, tokenizer, prompts, responses))
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        return torch.sigmoid(classifier_logits(model, tokenizer, texts))

    learned_from = "pairs" if pairwise else "labels"
    return Reward(f"the model in {folder}, trained on {learned_from}",
                  fingerprint(model.state_dict()), score)


# ---- learned -------------------------------------------------------------------------------------

def learned_reward(folder: str | Path, task: dict, block_size: int, dtype: str = "auto") -> Reward:
    """The score of a reward model's finished run.

    Args:
        task: the dataset and tokenizer that it must have been trained with.
        block_size: of the policy; the model must have room for what that writes.
    """
    model, meta = load_run(folder, ScalarModel)
    check_same_task(folder, meta, task)
    if model.config.block_size < block_size:
        fail(f"--reward {folder}: its block size is {model.config.block_size}, that of the policy "
             f"{block_size}")
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.tiktoken")

    def score(prompts: list[str],
              responses: list[str],
              samples: Samples | None = None) -> torch.Tensor:
        if samples is None:
            return pair_scores(model, tokenizer, prompts, responses, cut=True)
        return all_scores(model, samples.tokens, samples.lengths, dtype)

    return Reward(f"the reward model in {folder}", fingerprint(model.state_dict()), score, model)


def implicit_reward(folder: str | Path, ref: GPT, policy_id: str, task: dict,
                    dtype: str = "auto") -> Reward:
    """beta log pi(y|x)/pi_ref(y|x) of a finished run's policy (Rafailov et al. 2023, Eq. 5; what
    is missing there depends on the prompt alone).

    Args:
        ref, policy_id: the SFT policy and the fingerprint of its weights; the run must have been
            trained from it, as pi over another reference is another reward.
    """
    policy, meta = load_run(folder)
    check_same_task(folder, meta, task)
    settings = read_json_object(Path(folder) / "config.json", "beta", "built_from")
    if settings["built_from"].get("policy") != policy_id:
        fail(f"--reward {folder}: was trained from another SFT policy, and its reward is relative "
             "to that")
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.tiktoken")

    def score(prompts: list[str],
              responses: list[str],
              samples: Samples | None = None) -> torch.Tensor:
        if samples is None:
            samples = encoded(tokenizer, prompts, responses, policy.config.block_size)
        inputs = samples.tokens, samples.prompt_lengths, samples.lengths
        ratio = summed_logprobs(policy, *inputs, dtype) - summed_logprobs(ref, *inputs, dtype)
        return settings["beta"] * ratio

    return Reward(f"the implicit reward of the policy in {folder}",
                  fingerprint(policy.state_dict()), score)


def encoded(tokenizer: Tokenizer, prompts: list[str], responses: list[str],
            block_size: int) -> Samples:
    """Texts as ids: <bos> prompt response <eos>. What fills the block was sampled and cut there,
    without <eos>."""
    prompt_ids = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch(prompts)]
    rows = [(prompt + ids + [tokenizer.eos])[:block_size]
            for prompt, ids in zip(prompt_ids, tokenizer.encode_batch(responses))]
    tokens, lengths = pad(rows, tokenizer.pad)
    return Samples(tokens, torch.tensor([len(ids) for ids in prompt_ids]), lengths, None)


def pair_scores(model: ScalarModel, tokenizer: Tokenizer, prompts: list[str],
                responses: list[str], cut: bool = False) -> torch.Tensor:
    """A pairwise reward model's score of each response, (B,), encoded as in training: <bos> prompt
    response <eos>. With `cut`, one that fills the block was sampled and cut there, without <eos>.
    """
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses))
    rows = [[tokenizer.bos] + prompt + response + [tokenizer.eos] for prompt, response in encoded]
    if cut:
        rows = [row[:model.config.block_size] for row in rows]
    tokens, lengths = pad(rows, tokenizer.pad)
    if int(lengths.max()) > model.config.block_size:
        fail(f"a prompt and response have {int(lengths.max())} tokens, the block size of the "
             f"reward model is {model.config.block_size}")
    return all_scores(model, tokens, lengths)


@torch.no_grad()
def all_scores(model: ScalarModel,
               tokens: torch.Tensor,
               lengths: torch.Tensor,
               dtype: str = "auto") -> torch.Tensor:
    """The score of every row, (N,), without gradient. Equal rows (a response is in several pairs)
    are scored once."""
    different, where = torch.unique(torch.cat([tokens, lengths[:, None]], 1),
                                    dim=0,
                                    return_inverse=True)
    tokens, lengths = different[:, :-1], different[:, -1]
    scores = torch.zeros(len(tokens))
    with whole(model), autocast(dtype):
        for rows in similar_lengths(torch.arange(len(tokens))[RANK::WORLD], lengths, 256):
            longest = int(lengths[rows].max())
            scores[rows] = model.score(tokens[rows, :longest].to(device()),
                                       lengths[rows].to(device())).cpu()
    share(scores)
    return scores[where]


@torch.no_grad()
def classifier_logits(model: ScalarModel,
                      tokenizer: Tokenizer,
                      texts: list[str],
                      dtype: str = "auto") -> torch.Tensor:
    """log-odds of "positive", (B,). A text longer than the block is cut into windows, whose
    log-odds are averaged by length."""
    size = model.config.block_size - 1  # <bos> takes a place
    windows, owner = [], []  # owner[j]: the text that window j is of
    for i, ids in enumerate(tokenizer.encode_batch(texts)):
        for start in range(0, max(len(ids), 1), size):
            windows.append([tokenizer.bos] + ids[start:start + size])
            owner.append(i)
    lengths = torch.tensor([len(window) for window in windows])
    logits = torch.zeros(len(windows))
    for rows in lengths.argsort(stable=True).split(256):
        tokens, _ = pad([windows[i] for i in rows.tolist()], tokenizer.pad)
        with autocast(dtype):
            logits[rows] = model.score(tokens.to(device()), lengths[rows].to(device())).cpu()
    weights = lengths.float()
    owners = torch.tensor(owner)
    total = torch.zeros(len(texts)).index_add(0, owners, logits * weights)
    return total / torch.zeros(len(texts)).index_add(0, owners, weights)


# ---- yours ---------------------------------------------------------------------------------------

def user_function(name: str, flag: str) -> Callable[..., torch.Tensor]:
    """FILE.py:function, to be called with lists of texts; (B,) fp32 numbers come back.

    Whatever goes wrong in it stops with one line that names the user's own file and line: while it
    is loaded, and while it is called. It gets copies of the lists, so it may do with them what it
    likes.
    """
    others = "model, gold, the folder of a reward model's run, or " if flag == "--reward" else ""
    function, path = load_function(name, flag, others)

    def checked(*texts: list[str]) -> torch.Tensor:
        if RANK == 0:
            numbers = called(*texts)
        else:
            numbers = torch.zeros(len(texts[-1]))
        share(numbers)  # the first process asks for all: what is asked may be slow, or draw lots
        return numbers

    def called(*texts: list[str]) -> torch.Tensor:
        count = len(texts[-1])
        try:
            returned = function(*(list(column) for column in texts))
            returned = returned.tolist() if hasattr(returned, "tolist") else returned
            values = list(itertools.islice(returned, count + 1))  # a generator may have no end
            found = len(returned) if isinstance(returned, (list, tuple)) else len(values)
        except KeyboardInterrupt:
            raise
        # SystemExit, too: the end of the user's function is not the end of the run
        except BaseException as error:
            fail(f"{flag} {name}: {described(error)} ({blamed(error, path, function)})")
        place = blamed(None, path, function)
        if len(values) != count:
            many = f"more than {count}" if found == count + 1 and not isinstance(
                returned, (list, tuple)) else found
            fail(f"{flag} {name}: returned {many} numbers for {count} responses ({place})")
        for i, value in enumerate(values):
            if not is_finite_number(value):
                fail(f"{flag} {name}: returned {short(repr(value), 40)} for response {i} "
                     f"({texts[-1][i][:40]!r}), expected a finite number ({place})")
        return torch.tensor([float(value) for value in values])

    return checked


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number that fp32 can hold; True is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(float(value)) and bool(torch.tensor(float(value)).isfinite())
    except OverflowError:
        return False


def own_reward(name: str) -> Reward:
    """--reward FILE.py:function as a reward; another content of the file is another reward."""
    function = user_function(name, "--reward")
    return Reward(name,
                  sha256(name.rpartition(":")[0])[:16],
                  lambda prompts, responses, _: function(prompts, responses))


def is_own(name: str) -> bool:
    """Whether --reward names a function of the user's, rather than model, gold or a folder."""
    return name not in ("model", "gold") and not (name and Path(name).is_dir())
