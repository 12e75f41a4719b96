"""What a script starts from: prepared data, SFT policy, gold reward, pairs, reward model, bank.
Built where it is missing.

    start = pipeline.start(config)    # with start.ref, .tokenizer, .reward, .pairs and .bank

Each stage that is missing is printed as the command that a user would type, trained, and reused the
next time. What is reused knows what it was made from (weights, data, gold reward), and stops by
name where that has changed. This file is the one place that knows how the scripts build on each
other; it imports them inside its functions.
"""
from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import fail, own_data, rewards, settings, tasks, training
from common.files import read_json_object, read_jsonl, read_lines, sha256, write_json, write_jsonl
from common.pairs import SEED as PAIRS_SEED
from common.pairs import (Pair, PairTensors, encode_pairs, read_pairs, sample_pairs,
                          sampled_responses, split)
from common.rewards import Reward
from common.run import (check_folder, check_same_task, compare_settings, finished, load_run,
                        load_tensors, save_tensors)
from common.settings import runs_of
from common.tokenizer import Tokenizer
from common.training import device, fingerprint, generator, use_device
from model import GPT, summed_logprobs

BANK_SEED = 2000
MIN_COMPARISONS = 10_000  # fewer human comparisons than these make no judge
# tokens: the longest prompt and summary that data/tldr/prepare.py lets pass
COMPARISONS_BLOCK = 640


@dataclass
class Start:
    """What a run starts from."""
    dataset: str
    preset: str
    dtype: str
    folder: Path  # the runs folder: pairs, bank and the runs made of this SFT policy are in it
    sft: Path  # run folder of the SFT policy
    ref: GPT  # the SFT policy, pi_ref; on the device, in eval mode
    policy_id: str  # fingerprint of its weights
    tokenizer: Tokenizer
    gold: Reward | None = None  # the task's; None for a folder of the user's files
    reward: Reward | None = None  # what --reward names
    measured_by: Reward | None = None  # what policies are evaluated with, if not the gold reward
    bank: Any = None  # evaluate.Bank, with the rewards of `measure`
    pairs: list[Pair] = field(default_factory=list)
    pairs_file: Path | None = None
    pairs_id: str = ""  # sha256 of that file
    own_pairs: bool = False  # they are the user's, not sampled here

    @property
    def measure(self) -> Reward | None:
        """What policies are evaluated with; None: with the KL alone."""
        return self.measured_by or self.gold

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the pairs to train on, and of those held out; no prompt is in both."""
        share = own_data.SHARE if tasks.is_own(self.dataset) else 20
        return split(self.pairs, self.own_pairs, share)

    @property
    def task(self) -> dict[str, str]:
        """What another model must have been trained with to fit this policy."""
        return {"dataset": self.dataset, "tokenizer": self.tokenizer.fingerprint}


def start(config: Any, bank: bool = True, reward_is_used: bool = True) -> Start:
    """Everything that a script with this Config starts from, in the order in which mistakes cost
    least.

    The user's own files are read before anything is built: a typing error in them must not cost the
    hours of a stage.

    Args:
        config: has dataset, preset, dtype, device, sft and out; with a field `pairs` the pairs are
            read (or sampled), with a field `reward` there is start.reward.
        bank: whether the policy will be evaluated, for which the gold reward and the bank are
            needed.
        reward_is_used: whether the field `reward` counts; reward conditioning has none.
    """
    use_device(config.device)
    check_folder(config)
    wants_pairs = hasattr(config, "pairs")
    reward_name = getattr(config, "reward", None) if reward_is_used else None
    check_own_files(config)
    own_file = own_pairs_file(config) if wants_pairs else ""
    own = read_pairs(own_file) if own_file else []
    if reward_name is not None and rewards.is_own(reward_name):
        try_reward(reward_name, config.dataset)

    begun = load(sft_policy(config.sft, config.dataset, config.preset, config.dtype),
                 config.dataset, config.preset, config.dtype)
    if own:
        use_pairs(begun, own, Path(own_file))
        begun.own_pairs = True
    if (bank or (wants_pairs and not own)) and not tasks.is_own(config.dataset):
        begun.gold = gold_reward(begun)
    if wants_pairs and not own:
        path = sampled_pairs(begun, config.labels, config.prompts, config.pairs_seed)
        use_pairs(begun, read_pairs(path), path)
    if reward_name is not None:
        begun.reward = reward(config, begun)
    if bank:
        # a function of the user's is what they want to see grow; without a gold reward a learned
        # one is all there is
        if begun.reward and (rewards.is_own(reward_name) or begun.gold is None):
            begun.measured_by = begun.reward
        begun.bank = measured_bank(begun, getattr(config, "bank_samples", 0))
    return begun


def own_pairs_file(config: Any) -> str:
    """The pairs file of the user's that a script's Config asks for: --pairs, or that of a folder
    of their files. "" where pairs are sampled."""
    return config.pairs or tasks.own_pairs(config.dataset)


def check_own_files(config: Any) -> None:
    """What only a task with a gold reward can do stops, for a folder of the user's files."""
    if not tasks.is_own(config.dataset):
        return
    reward_name = getattr(config, "reward", None)
    if reward_name == "gold":
        require_gold(config.dataset)
    if getattr(config, "prompts", 0):
        fail("--prompts: no pairs are sampled for a folder of your own files")
    if getattr(config, "pairs_seed", 0):
        fail("--pairs-seed: no pairs are sampled for a folder of your own files")
    if getattr(config, "labels", "bt") != "bt":
        fail("--labels: pairs of your own are labelled")
    if reward_name == "model":
        tasks.own_pairs(config.dataset)


def require_gold(dataset: str) -> None:
    """Stop where nothing can say what is good; before a stage is trained for that."""
    if tasks.is_own(dataset):
        fail(f"--dataset {dataset}: a folder of your own files has no gold reward")


def load(sft: Path, dataset: str, preset: str, dtype: str = "auto") -> Start:
    """The SFT policy and its tokenizer."""
    ref, meta = load_run(sft)
    tokenizer = Tokenizer.load(sft / "tokenizer.tiktoken")
    check_same_task(sft, meta, {"dataset": dataset, "tokenizer": tokenizer.fingerprint})
    return Start(dataset, preset, dtype, runs_of(sft), sft, ref, fingerprint(ref.state_dict()),
                 tokenizer)


# ---- stages that are runs of a script ------------------------------------------------------------

def stage(config: Any, name: str = "") -> Path:
    """The folder of a finished run of these settings; trained if it is missing, or gone on with if
    it was stopped.

    Args:
        config: a script's Config with resume=True.
        name: of the stage in the task's `minutes`, if not that of the script.
    """
    script = settings.script_of(type(config)).stem
    module = importlib.import_module(script)
    config.device = training.asked_for  # all that this process builds is computed there
    check_folder(config, advice=f"delete {config.out} to make it again")  # nobody gave its --out
    if not finished(config, module.built_from(config)):
        minutes = tasks.load_preset(config.dataset, config.preset).minutes.get(name or script)
        print(f"building what is missing: {settings.typed(config)}" + about(minutes), flush=True)
        module.train(config)
    return Path(config.out)


def about(minutes: float | None) -> str:
    """How long a stage takes, to be said before it does; nothing where nobody knows."""
    if minutes is None:
        return ""
    if minutes < 1:
        return f"   (about {60 * minutes:.0f} seconds)"
    return f"   (about {minutes:g} minutes)"


def sft_policy(sft: str, dataset: str, preset: str, dtype: str = "auto") -> Path:
    """The SFT run that the later stages start from: the folder given, or the default one."""
    if sft:
        return Path(sft)
    module = importlib.import_module("sft")
    return stage(module.Config(dataset=dataset, preset=preset, dtype=dtype, resume=True))


def pretrained(dataset: str, preset: str, dtype: str = "auto") -> Path | None:
    """The run that the task's SFT starts from, where it has too few documents to learn to write
    from them."""
    if "sft pretrain" not in tasks.load_preset(dataset, preset).settings:
        return None
    module = importlib.import_module("sft")
    return stage(
        module.Config(dataset=dataset, preset=preset, on="pretrain", dtype=dtype, resume=True),
        "sft pretrain")


def reward_model(config: Any) -> Path:
    """The reward model of the pairs that a script's Config (sft, prompts, pairs_seed, dtype) asks
    for. Other pairs are another draw of all of it: its own seed is that of the pairs."""
    module = importlib.import_module("reward_model")
    return stage(
        module.Config(dataset=config.dataset,
                      preset=config.preset,
                      prompts=config.prompts,
                      pairs_seed=config.pairs_seed,
                      seed=config.pairs_seed,
                      sft=config.sft,
                      dtype=config.dtype,
                      resume=True))


# ---- rewards -------------------------------------------------------------------------------------

def gold_reward(start: Start) -> Reward:
    """The task's gold reward. Where that is a model it is trained if it is missing: a classifier of
    the labelled documents, or a reward model of the human comparisons where there are enough (an
    exact reward is a stand-in then)."""
    require_gold(start.dataset)
    folder = tasks.prepared(start.dataset)
    shared = dict(dataset=start.dataset, preset=start.preset, sft=str(start.sft), dtype=start.dtype,
                  out=str(start.folder / "gold"), resume=True)
    comparisons = folder / "comparisons_train.jsonl"
    if comparisons.exists() and len(read_lines(comparisons)) > MIN_COMPARISONS:
        module = importlib.import_module("reward_model")
        return rewards.gold_model(
            stage(module.Config(**shared, pairs=str(comparisons), block_size=COMPARISONS_BLOCK)))
    if tasks.load(start.dataset).gold_reward is None:
        module = importlib.import_module("classifier")
        return rewards.gold_model(stage(module.Config(**shared)))
    return rewards.exact_reward(start.dataset)


def reward(config: Any, start: Start) -> Reward:
    """What --reward names: model (trained on the pairs), gold, the folder of a run, or
    FILE.py:function."""
    if start.reward is not None:
        return start.reward
    if config.reward == "gold":
        return start.gold
    if rewards.is_own(config.reward):
        return rewards.own_reward(config.reward)
    folder = reward_model(config) if config.reward == "model" else Path(config.reward)
    return reward_of_run(folder, start, config.dtype)


def reward_of_run(folder: str | Path, start: Start, dtype: str = "auto") -> Reward:
    """A finished run as a reward: the score of a reward model, or the implicit reward of a policy
    that was trained with a beta."""
    settings_file = Path(folder) / "config.json"
    if settings_file.exists() and "beta" in read_json_object(settings_file):
        return rewards.implicit_reward(folder, start.ref, start.policy_id, start.task, dtype)
    return rewards.learned_reward(folder, start.task, start.ref.config.block_size, dtype)


def try_reward(name: str, dataset: str) -> None:
    """Call a function of the user's once, on two prompts of the task: what is wrong with it shows
    before any training."""
    function = rewards.user_function(name, "--reward")
    prompts = tasks.prompts(dataset, "train")[:2]
    function(prompts, [" a response"] * len(prompts))


# ---- pairs ---------------------------------------------------------------------------------------

def use_pairs(start: Start, rows: list[dict], path: Path) -> None:
    """Encode the rows of a pairs file for this policy."""
    start.pairs = encode_pairs(rows, start.tokenizer, start.ref.config.block_size, path)
    start.pairs_file, start.pairs_id = path, sha256(path)


def sampled_pairs(start: Start, labels: str, prompts: int = 0, seed: int = 0) -> Path:
    """The pairs file of a runs folder: sampled from the SFT policy, and labelled by the gold
    reward.

    Args:
        prompts: training prompts to sample for, if not as many as the task says; then the folder's
            name has the number.
        seed: of prompts, responses and labels; any but 0 is in the folder's name.
    """
    task, preset = tasks.load(start.dataset), tasks.load_preset(start.dataset, start.preset)
    count = prompts or preset.pair_prompts
    name = f"pairs-{labels}" + (f"-{prompts}" if prompts else "") + (f"-seed{seed}" if seed else "")
    folder = start.folder / name
    path = folder / "pairs.jsonl"
    made_of = {
        "dataset": start.dataset,
        "labels": labels,
        "prompts": count,
        "samples": preset.pair_samples,
        "scale": task.label_scale,
        "seed": PAIRS_SEED + seed
    }
    built_from = {"policy": start.policy_id, "gold": start.gold.id,
                  "prompts": tasks.data_id(tasks.prepared(start.dataset), "prompts_train.jsonl")}
    if is_made(folder, path, made_of, built_from):
        rows = sum(bool(line.strip()) for line in read_lines(path))
        wanted = read_json_object(folder / "config.json").get("pairs")
        if rows != wanted:
            fail(f"{path}: has {rows} of {wanted} pairs: delete {folder} to make them again")
        return path

    every = tasks.prompts(start.dataset, "train")
    if prompts > len(every):
        fail(f"--prompts {prompts}: data/{start.dataset} has {len(every)} training prompts")
    chosen = torch.randperm(len(every), generator=generator(PAIRS_SEED + seed, 1))[:count].tolist()
    print(f"building what is missing: pairs{about(preset.minutes.get('pairs'))}", flush=True)
    rows, left_out, agree = sample_pairs(start.ref, start.tokenizer, [every[i] for i in chosen],
                                         preset.pair_samples, labels, task.label_scale, start.gold,
                                         PAIRS_SEED + seed)
    if not rows:
        fail(f"{folder}: no two responses to a prompt differ: train the SFT policy for longer")
    write_json(
        folder / "config.json", {
            **made_of, "built_from": built_from, "pairs": len(rows), "left_out": left_out,
            "labels_agree_with_gold": round(agree, 4)
        })
    write_jsonl(path, rows)
    print(f"{len(rows)} pairs ({left_out} left out: identical or empty), labels agree with the "
          f"gold order {agree:.1%}  ->  {path}")
    return path


def reference_logprobs(start: Start, pairs: PairTensors) -> torch.Tensor:
    """log pi_ref(y|x) of every pair's responses, (2, N) on the device: computed once for these
    weights and pairs, and kept for every other beta and seed."""
    name = f"{start.policy_id}-{start.pairs_id[:16]}-{device().type}-{start.dtype}.pt"
    path = start.folder / "ref-logprobs" / name
    shape = pairs.lengths.shape
    try:
        logprobs = load_tensors(path)["logprobs"]
        if logprobs.shape != shape or not logprobs.isfinite().all():
            raise ValueError
    except (ValueError, KeyError, AttributeError):  # none there yet, or damaged
        logprobs = summed_logprobs(start.ref, pairs.tokens.flatten(0, 1),
                                   pairs.prompt_lengths.flatten(), pairs.lengths.flatten(),
                                   start.dtype).view(shape)
        save_tensors(path, {"logprobs": logprobs})
    return logprobs.to(device())


# ---- the bank ------------------------------------------------------------------------------------

def measured_bank(start: Start, samples: int = 0) -> Any:
    """The bank with the rewards of start.measure: its responses are scored where that is not the
    gold reward, whose scores are stored with them."""
    bank = sample_bank(start, samples)
    if start.measured_by:
        M, N = bank.lengths.shape
        texts = [text for responses in bank.responses for text in responses]
        prompts = [prompt for prompt in bank.prompts for _ in range(N)]
        bank.rewards = start.measured_by(prompts, texts).view(M, N)
        bank.gold, bank.column = start.measured_by.name, "reward"
    return bank


def sample_bank(start: Start, samples: int = 0) -> Any:
    """The bank of a runs folder, sampled from the SFT policy if it is missing; bank.jsonl has a row
    a prompt.

    Args:
        samples: responses to each prompt, if not as many as the task says; then the folder's name
            has the number.
    Returns:
        evaluate.Bank
    """
    preset = tasks.load_preset(start.dataset, start.preset)
    M, N = preset.bank_prompts, samples or preset.bank_samples
    folder = start.folder / (f"bank-{samples}" if samples else "bank")
    path = folder / "bank.jsonl"
    made_of = {"dataset": start.dataset, "prompts": M, "responses": N, "seed": BANK_SEED}
    built_from = {"policy": start.policy_id,
                  "prompts": tasks.data_id(tasks.prepared(start.dataset), "prompts_test.jsonl")}
    if start.gold:
        built_from["gold"] = start.gold.id
    if not is_made(folder, path, made_of, built_from):
        prompts = tasks.prompts(start.dataset, "test")[:M]
        print(f"building what is missing: the bank{about(preset.minutes.get('bank'))}", flush=True)
        # the settings first: a bank without them would pass for any other
        write_json(folder / "config.json",
                   {**made_of, "built_from": built_from, "rows": len(prompts)})
        parts, texts = sampled_responses(
            start.ref,
            start.tokenizer,
            prompts,
            N,
            BANK_SEED,
            description=f"bank: {N} responses to {len(prompts)} test prompts")
        gold = None
        if start.gold:
            gold = start.gold([prompt for prompt in prompts for _ in range(N)], texts)
            gold = [[round(r, 6) for r in row] for row in gold.view(-1, N).tolist()]
        lengths = torch.cat([part.lengths - part.prompt_lengths
                             for part in parts]).view(-1, N).tolist()
        write_jsonl(path, ({
            "prompt": prompt, **({"rewards": gold[i]} if gold else {}), "lengths": lengths[i],
            "responses": texts[i * N:(i + 1) * N]
        } for i, prompt in enumerate(prompts)))
    return read_bank(path, N, start.gold)


def read_bank(path: Path, N: int, gold: Reward | None) -> Any:
    """The bank in a file: every row whole, with N finite rewards where there is a gold reward."""
    evaluate = importlib.import_module("evaluate")
    fields = {"prompt": str, "lengths": list, "responses": list}
    rows = read_jsonl(path, fields | ({"rewards": list} if gold else {}))
    advice = f"delete {path.parent} to sample the bank again"
    wanted = read_json_object(path.parent / "config.json").get("rows")
    if len(rows) != wanted:
        fail(f"{path}: has {len(rows)} of {wanted} prompts: {advice}")
    for row in rows:
        row.setdefault("rewards", [0.0] * N)
        numbers = row["rewards"] + row["lengths"]
        if any(not isinstance(x, (int, float)) or not math.isfinite(x) for x in numbers):
            fail(f"{path}, line {row['line']}: a reward or length is no finite number: {advice}")
        if not len(row["rewards"]) == len(row["lengths"]) == len(row["responses"]) == N:
            fail(f"{path}, line {row['line']}: expected {N} responses with their rewards and "
                 f"lengths: {advice}")
    return evaluate.Bank([row["prompt"] for row in rows],
                         torch.tensor([row["rewards"] for row in rows]) if gold else None,
                         torch.tensor([row["lengths"] for row in rows]),
                         [row["responses"] for row in rows], gold.name if gold else "none")


def is_made(folder: Path, path: Path, made_of: dict, built_from: dict) -> bool:
    """Whether a file that was sampled is there; one of other settings, or made from something else,
    stops by name."""
    if path.exists() and not (folder / "config.json").exists():
        fail(f"{path}: without a config.json beside it; what it was made from is not known: "
             f"delete {folder}")
    compare_settings(folder, made_of, built_from, f"delete {folder} to make it again")
    return path.exists()
