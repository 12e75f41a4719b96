"""A museum of silent bugs: each is planted in a copy of the code, trained for half a minute, and
measured by the code without it.

    python experiments/bugs.py                 # all of them, 3 seeds: an hour of one core
    python experiments/bugs.py --only mean     # one of them, and what it is compared with
    python experiments/bugs.py --seeds 1       # a third of the time, and no errors

A bug is a change of a few lines that anybody could make, and mostly somebody did: its row of
tests/README.md says where. None of them stops with an error. The question is what it costs, and
which logged number would have given it away.

The code is copied, the change is made in the copy, and a plain command is run there. It starts from
the same SFT policy, pairs and reward model as the run without the bug, and the finished policy is
measured here: a script with a bug may report wrongly, too. What it reports is in the rows as well.

A run that is in results.jsonl is not run again, unless the bug or the SFT policy has changed.

Reads   the SFT policy, pairs, bank and reward model of `reviews` (made if they are missing)
Writes  runs/reviews/bugs/ : a folder for each bug (the code with the bug, its runs and their logs),
        results.jsonl, table.md
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import difflib
import hashlib
import re
import shutil
import subprocess
import textwrap
from typing import NamedTuple

import evaluate
import reward_model
from common import ROOT, fail, pipeline, tasks
from common.files import (atomic_write, check_writable, read_json_object, read_jsonl,
                          write_jsonl)
from common.run import load_run, read_log
from common.settings import (parse, require, require_numbers, runs_folder, runs_of,
                             settings)
from common.statistics import mean_se
from common.training import Device, use_device
from experiments.frontier import number, plus_minus

DATASET = "reviews"
SFT = "runs/reviews/sft"  # in the copy
SHORT = "--batch-size 64 --micro-batch-size 32 --steps 20 --warmup 4"
COMMANDS = {  # what is run with a bug and without
    "DPO": "dpo.py --epochs 0.5",
    "PPO, gold reward": f"ppo.py --reward gold {SHORT}",
    "PPO, reward model": f"ppo.py --reward runs/reviews/reward-model {SHORT}",
    "REINFORCE, gold reward": f"reinforce.py --reward gold {SHORT}",
}
WHERE = {  # what of a log a sign is read from
    "first": "at the first step",
    "least": "at its lowest",
    "late": "over the last fifth of the steps",
    "end": "at the end",
    "reported": "of its own evaluation, less what is measured here",
}


@settings
class Config:
    only: str = ""  # Name of the one bug to plant; all of them if it is not given.
    seeds: int = 3  # Runs with each bug, and without.
    sft: str = ""  # Run folder of the SFT policy, if not runs/reviews/sft.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    out: str = ""  # Folder for runs and rows, if not bugs beside the SFT policy.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="seeds")
        names = [bug.name for bug in BUGS]
        require(not self.only or self.only in names,
                f"--only {self.only}: no such bug (known: {', '.join(names)})")
        base = runs_of(self.sft) if self.sft else runs_folder(DATASET, "cpu")
        self.out = self.out or str(base / "bugs")


# ---- the bugs ------------------------------------------------------------------------------------

class Bug(NamedTuple):
    name: str
    row: int  # of tests/README.md, which names the test that catches it; 0 = none of its rows
    seen: str  # one of the places where it was found
    what: str  # what is wrong
    expected: str  # what theory says that it does, written down before it was run
    method: str  # the command that it is tried with, one of COMMANDS
    file: str  # that is changed
    old: str  # the text that is replaced; it occurs once in the file
    new: str
    sign: tuple[str, str]  # the logged number that gives it away: one of WHERE, name
    caught: str  # a test that fails: "dpo: NAME" is test_NAME of tests/test_dpo.py


GITHUB = "https://github.com/"
LOGPROBS = "logprobs = chosen - logits.exp().sum(1).log()  # (N,)"
MASK = """\
    mask = response_mask(prompt_lengths, lengths)
    # (N,) each: all response tokens"""
LOSSES = "config, chosen_logprobs, rejected_logprobs, *ref_logprobs[:, rows],"
PENALTY = "    rewards = -beta * (logprobs - ref_logprobs) * mask"
WHITEN = ("advantages = whiten(advantages, mask)  "
          "# after the returns, which are in units of the reward")
SCORE = """\
            scores[rows] = model.score(tokens[rows, :longest].to(device()),
                                       lengths[rows].to(device())).cpu()"""

BUGS = [
    # ---- DPO
    Bug("mean", 4, "huggingface/trl/issues/789",
        "The log-probability of a response is a mean over its tokens, where DPO needs the sum.",
        "Divides beta by the length, some 38 tokens: beta 0.1 acts like 0.003, the loss hardly "
        "leaves ln 2, and the KL explodes.",
        "DPO", "model.py", "    " + LOGPROBS,
        f"    {LOGPROBS}\n    logprobs = logprobs / mask.sum(1)[rows]", ("late", "loss"),
        "model: logprobs_by_hand"),
    Bug("eos-lost", 1, "Goekdeniz-Guelmez/mlx-lm-lora/issues/80",
        "The mask is not shifted with the targets: the last token of a response, <eos>, is lost.",
        "Where a response ends is not learned, and no more: hardly a cost. The KL that is reported "
        "lacks <eos> under the reference alone, and is too low.",
        "DPO", "model.py", MASK, MASK.replace("lengths)", "lengths - 1)"), ("reported", "kl"),
        "model: logprobs_by_hand"),
    Bug("prompt-tokens", 2, "OpenRLHF/OpenRLHF/pull/237",
        "The prompt's tokens count as the response's.",
        "Nothing: both responses have the same prompt, and its log-probability cancels in the "
        "margin. It would not in SFT, in IPO's or any other loss of one response alone.",
        "DPO", "model.py", MASK,
        "    prompt_lengths = torch.ones_like(prompt_lengths)  # all but <bos>\n" + MASK,
        ("reported", "kl"),
        "model: prompt_tokens_have_no_loss"),
    Bug("reference-follows", 19, "huggingface/trl/issues/1104",
        "The reference is trained along: it is the policy itself.",
        "The margin is 0 and the loss ln 2 for ever, so every pair weighs 1/2 at every step, and "
        "nothing holds the policy: the KL explodes.",
        "DPO", "dpo.py", LOSSES,
        "config, chosen_logprobs, rejected_logprobs, chosen_logprobs.detach(),\n"
        "                rejected_logprobs.detach(),", ("late", "loss"),
        "dpo: micro_batches_change_nothing_and_accuracy_is_a_mean_over_pairs"),
    Bug("swapped", 0, "",
        "Chosen and rejected are the wrong way round in training.",
        "The policy learns the opposite, as well as it would have learned the right thing: loss "
        "and accuracy look the same, and only what is not swapped can tell.",
        "DPO", "dpo.py", LOSSES,
        "config, rejected_logprobs, chosen_logprobs, *ref_logprobs[:, rows].flip(0),",
        ("end", "held_out_accuracy"),
        "dpo: first_step_is_the_definition"),
    Bug("dropout", 18, "huggingface/trl/pull/639",
        "Dropout is on in the policy while it trains, and off in the reference.",
        "At the first step policy and reference are equal, and the loss is not ln 2: noise in the "
        "margin, so some learning is lost.",
        "DPO", "model.py", 'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
        'x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))\n'
        "        return F.dropout(x, 0.1, self.training)", ("first", "loss"),
        "dpo: first_step_is_the_definition"),
    Bug("beta-twice", 0, "AI-Hypercomputer/maxtext/issues/1530",
        "The implicit rewards have their beta already, and the loss multiplies by it again.",
        "beta 0.1 acts like 0.01: as with the mean, a loss next to ln 2 and a KL that explodes.",
        "DPO", "dpo.py", "margin = chosen_rewards - rejected_rewards\n",
        "margin = beta * (chosen_rewards - rejected_rewards)\n", ("late", "loss"),
        "dpo: implicit_rewards_and_loss_by_hand"),
    Bug("bf16", 6, "jingyaogong/minimind/pull/814",
        "The softmax is computed in bfloat16.",
        "A log-probability has two or three digits left, a response's is off by some hundredths "
        "of a nat, and beta times that is little beside a margin: hardly a cost.",
        "DPO", "model.py", LOGPROBS,
        "logprobs = (chosen.bfloat16() - logits.bfloat16().exp().sum(1).log()).float()",
        ("first", "chosen_logprobs"), "model: logprobs_by_hand"),

    # ---- PPO: sampling and scoring
    Bug("top-p", 22, "huggingface/trl/issues/235",
        "Responses are sampled with top-p 0.9, and scored as if they were not.",
        "KL is sampled where the policy is likeliest, and paid back for tokens that become less "
        "likely than under the reference: it is too low, below 0 at first. What is evaluated with "
        "top-p looks better than the policy is.",
        "PPO, gold reward", "model.py", "            cumulative = probs.cumsum(1)",
        "            ordered = probs.sort(1, descending=True)[0]\n"
        "            count = (ordered.cumsum(1) < 0.9).sum(1, keepdim=True)\n"
        "            probs = probs * (probs >= ordered.gather(1, count))\n"
        "            cumulative = probs.cumsum(1)", ("first", "entropy"),
        "model: frequencies_follow_the_softmax"),
    Bug("temperature", 22, "huggingface/trl/issues/925",
        "Responses are sampled at temperature 1.5, and scored as if it were 1.",
        "The sampled tokens are those that the policy would rarely choose. Training makes bad ones "
        "less likely than under the reference, so the log-ratio of the samples falls below 0, as "
        "no KL can; and what is learned is how to mend texts that are never written at 1.",
        "PPO, gold reward", "model.py", "probs = torch.softmax(logits / temperature, 1)",
        "probs = torch.softmax(logits / (1.5 * temperature), 1)", ("first", "entropy"),
        "model: frequencies_follow_the_softmax"),
    Bug("stale", 36, "CarperAI/trlx/issues/107",
        "The old log-probabilities are never renewed: the ratio is to the reference, not to the "
        "policy that sampled.",
        "Tokens are clipped for good once they are 20% likelier than under the reference: the "
        "policy stays near it, and the ratio is far from 1.",
        "PPO, gold reward", "ppo.py", "policy_loss(logprobs, old_logprobs[part, :R],",
        "policy_loss(logprobs, ref_logprobs[part, :R],", ("late", "clip_fraction"),
        "ppo: a_batch_starts_at_ratio_1_and_the_run_at_the_reference"),
    Bug("shared-weights", 19, "huggingface/trl/issues/1104",
        "Policy and reference are one object: a copy was forgotten.",
        "The KL is 0 to the last digit in log and evaluation, nothing is paid for it, and the "
        "true KL grows without limit.",
        "PPO, gold reward", "ppo.py", "policy = copy.deepcopy(ref).requires_grad_(True)",
        "policy = ref.requires_grad_(True)", ("late", "kl"),
        "ppo: the_reference_is_not_trained_and_the_value_network_not_kept"),

    # ---- PPO: rewards
    Bug("kl-sign", 23, "OpenRLHF/OpenRLHF/pull/1309",
        "The KL penalty has the wrong sign.",
        "Being far from the reference is a reward: the KL explodes, and whoever is paid for "
        "unlikely tokens writes rubbish.",
        "PPO, gold reward", "ppo.py", PENALTY, PENALTY.replace("-beta", "beta"), ("late", "kl"),
        "ppo: the_score_comes_with_the_last_token_and_the_kl_with_every_one"),
    Bug("k3-as-reward", 41, "huggingface/trl/issues/4967",
        "The KL's estimate k3 stands in the reward, where the log-ratio belongs.",
        "Its mean is the KL, its gradient by way of the samples is not: that of KL(pi || pi_ref) "
        "less that of KL(pi_ref || pi), which cancel next to the reference. A larger KL, as with "
        "a smaller beta.",
        "PPO, gold reward", "ppo.py", PENALTY,
        "    log_ratio = ref_logprobs - logprobs\n"
        "    rewards = -beta * (log_ratio.exp() - 1 - log_ratio) * mask", ("late", "kl"),
        "ppo: the_score_comes_with_the_last_token_and_the_kl_with_every_one"),
    Bug("raw-scores", 26, "huggingface/trl/issues/691",
        "Scores are not normalised.",
        "Gold rewards have a standard deviation of some 0.3 on the reference: beta 0.1 acts like "
        "0.3 to 0.4, so the KL is smaller, at about the same share of the optimum.",
        "PPO, gold reward", "ppo.py",
        'scores = ((raw_scores - state["score_mean"]) / state["score_std"]).float().to(device())',
        "scores = raw_scores.float().to(device())", ("first", "scores"),
        "ppo: shift_and_scale_of_a_reward_change_nothing"),
    Bug("score-behind", 29, "huggingface/trl/issues/1893",
        "The score lies one place behind <eos>, on a pad, and the mask removes it.",
        "Only the longest response of a batch keeps its score. Of the others the KL is left, so "
        "the policy learns next to nothing.",
        "PPO, gold reward", "ppo.py", "last = mask.sum(1) - 1  # (B,)",
        "last = mask.sum(1).clamp(max=mask.shape[1] - 1)  # (B,)", ("first", "value_loss"),
        "ppo: the_score_comes_with_the_last_token_and_the_kl_with_every_one"),
    Bug("whitened-rewards", 26, "vwxyzjn/lm-human-preference-details/issues/8",
        "Rewards are whitened before the returns, their mean included.",
        "Every token gets a constant, so a response earns by its length; and the KL is weighed by "
        "a scale of its own.",
        "PPO, gold reward", "ppo.py", "compute_gae(rewards, old_values, mask, 1.0, config.lam)",
        "compute_gae(whiten(rewards, mask), old_values, mask, 1.0,\n"
        "                                          config.lam)", ("late", "value_loss"),
        "ppo: the_second_update_is_the_definition"),

    # ---- PPO: values and advantages
    Bug("whitened-returns", 0, "",
        "Advantages are whitened before the returns are made of them.",
        "The value network learns V + (G - V) / std in place of G: as the fixed point is the same, "
        "a slower or a faster value network, and little else.",
        "PPO, gold reward", "ppo.py", "        " + WHITEN,
        "        advantages = whiten(advantages, mask)\n"
        "        returns = (advantages + old_values) * mask", ("late", "value_loss"),
        "ppo: the_second_update_is_the_definition"),
    Bug("value-at-token", 32, "verl-project/verl/issues/1758",
        "The value of a token is read at the token: it has seen what it is to judge.",
        "What a token has changed is in its value already, so it is taken off its advantage. With "
        "a perfect value network nothing is learned.",
        "PPO, gold reward", "ppo.py", "places = prompt_lengths[:, None] - 1 + torch.arange(",
        "places = prompt_lengths[:, None] + torch.arange(", ("late", "explained_variance"),
        "ppo: a_value_has_seen_all_before_its_token_and_nothing_else"),
    Bug("one-step", 31, "natolambert/rlhf-book/pull/216",
        "An advantage is the reward of this step less the value, not what comes after.",
        "Only the last token hears of the score. All others are blamed for a good outlook.",
        "PPO, gold reward", "ppo.py", WHITEN, "advantages = whiten(rewards - old_values, mask)",
        ("late", "scores"),
        "ppo: the_second_update_is_the_definition"),
    Bug("mean-of-means", 24, "huggingface/transformers/pull/34191",
        "Each micro-batch has a mean of its own, and these are added up.",
        "A token of a short response weighs more than one of a long one, and the gradient is as "
        "many times too large as there are micro-batches, which Adam does not see: hardly a cost.",
        "PPO, gold reward", "ppo.py",
        "((policy_losses.sum() + value_losses.sum()) / response_tokens).backward()",
        "(policy_losses[seen].mean() + value_losses[seen].mean()).backward()",
        ("first", "grad_norm"),
        "ppo: micro_batches_change_nothing"),

    # ---- the reward model in use
    Bug("score-at-pad", 15, "huggingface/trl/issues/2778",
        "The reward model's score is read at the last place of the batch: for most rows at a pad.",
        "It was never trained there: noise, or worse, something that depends on the length.",
        "PPO, reward model", "common/rewards.py", SCORE,
        SCORE.replace("lengths[rows].to(device())",
                      "torch.full_like(lengths[rows], longest).to(device())"),
        ("first", "raw_scores"),
        "ppo: the_second_update_is_the_definition"),
    Bug("eos-unseen", 16, "huggingface/trl/pull/5813",
        "The reward model has seen <eos> in training, and sees none in use.",
        "It is read one place early, where it was never trained; the text is all there, so a part "
        "of the score is.",
        "PPO, reward model", "common/rewards.py", SCORE,
        SCORE.replace("lengths[rows].to", "(lengths[rows] - 1).to"), ("first", "raw_scores"),
        "reward_model: separable_pairs_are_learned_and_scores_are_normalised"),

    # ---- REINFORCE
    Bug("own-baseline", 0, "",
        "The mean that a response is compared with has the response itself in it.",
        "Not independent of the response, and all the same only a factor of (n - 1) / n on every "
        "advantage, 3/4 for 4 samples. Adam does not see it: no cost.",
        "REINFORCE, gold reward", "reinforce.py",
        "mean_of_others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)",
        "mean_of_others = groups.mean(1, keepdim=True)", ("first", "advantage_std"),
        "reinforce: leave_one_out_by_hand"),
]


# ---- planting ------------------------------------------------------------------------------------

def planted(bug: Bug) -> str:
    """The text of the bug's file, with the bug in it."""
    text = (ROOT / bug.file).read_text("utf-8")
    if (count := text.count(bug.old)) != 1:
        fail(f"{bug.name}: the text that it changes occurs {count} times in {bug.file}, expected "
             f"once: {bug.old.strip().splitlines()[0]}")
    return text.replace(bug.old, bug.new)


def diff(bug: Bug) -> str:
    """The change, as lines that begin with "-", "+" or " "."""
    old, new = (textwrap.dedent(text).strip("\n").splitlines() for text in (bug.old, bug.new))
    return "\n".join([*difflib.unified_diff(old, new, n=9, lineterm="")][3:])


def copy_code(folder: Path, start: pipeline.Start, bug: Bug | None) -> None:
    """The code, with the bug in it, and what its runs start from. A copy, so that a bug damages
    nothing: reference log-probabilities that are kept for later runs, for example."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for pattern in ("*.py", "common/*.py", "data/*.py", "data/*/*.py"):
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if bug:
        (folder / bug.file).write_text(planted(bug), "utf-8")
    shutil.copytree(tasks.prepared(DATASET), folder / "data" / DATASET / "prepared",
                    dirs_exist_ok=True)
    shutil.copytree(start.sft, folder / SFT)
    for name in ("pairs-bt", "bank", "reward-model"):
        shutil.copytree(start.folder / name, (folder / SFT).with_name(name))


# ---- one run -------------------------------------------------------------------------------------

def readings(log: list[dict], reported: dict) -> dict[str, dict[str, float]]:
    """What a sign can be: every logged number at each of WHERE.

    Args:
        log: the rows of log.jsonl, of which the last holds what was measured at the end.
        reported: the row of the policy in evaluation.json.
    """
    steps = [row for row in log if "grad_norm" in row]
    last = steps[-max(1, len(steps) // 5):]
    return {
        "first": steps[0],
        "least": {name: min(row[name] for row in steps) for name in steps[0]},
        "late": {name: sum(row[name] for row in last) / len(last) for name in steps[0]},
        "end": log[-1],
        "reported": {name: reported[name] for name in ("reward", "kl")},
    }


def key(bug: Bug | None, method: str, seed: int, start: pipeline.Start) -> dict:
    """What a row is of; one with the same key is not measured again."""
    change = repr((COMMANDS[method], bug and (bug.file, bug.old, bug.new)))
    return {"bug": bug.name if bug else "", "method": method, "seed": seed,
            "policy": start.policy_id, "change": hashlib.sha256(change.encode()).hexdigest()[:12]}


def finished_rows(path: Path, start: pipeline.Start) -> list[dict]:
    """The rows that are there, without those of another SFT policy or of a bug that has changed."""
    if not path.exists():
        return []
    rows = read_jsonl(path, {"bug": str, "method": str, "seed": int, "signs": dict})
    bugs = {"": None, **{bug.name: bug for bug in BUGS}}
    return [{name: row[name] for name in row if name != "line"} for row in rows
            if row["bug"] in bugs and row["method"] in COMMANDS and row.items() >= key(
                bugs[row["bug"]], row["method"], row["seed"], start).items()]


def measure(folder: Path, method: str, seed: int, start: pipeline.Start, device: str) -> dict:
    """Run the command in a folder with code, and measure the policy that it makes with ours."""
    out = folder / f"seed{seed}"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    script, *flags = COMMANDS[method].split()
    words = [sys.executable, script, *flags, "--sft", SFT, "--seed", str(seed), "--device", device,
             "--out", out.name]
    if subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        fail(f"python {COMMANDS[method]}: failed in {folder}")
    table = read_json_object(out / "evaluation.json", "table")["table"].values()
    reported = next(row for row in table if row["kind"] == "policy")

    policy, _ = load_run(out)
    sampled = evaluate.sample_policy(policy, start.ref, start.tokenizer, start.bank.prompts,
                                     start.gold)
    row = evaluate.summary(start.bank, {"policy": sampled})["policy"]
    return {**row, "signs": readings(read_log(out / "log.jsonl"), reported)}


# ---- the table -----------------------------------------------------------------------------------

def over_seeds(values: list[float], form: str) -> str:
    """Mean and standard error; a single run has no error."""
    return number(*mean_se(values), form) if values else ""


def sign_of(row: dict, where: str, name: str) -> float:
    """The number that gives a bug away, in one run."""
    value = row["signs"][where][name]
    return value - row[name] if where == "reported" else value


def share(rows: list[dict]) -> str:
    """The share of the optimum; empty next to the reference, where it would be noise."""
    values = [row["share"] for row in rows]
    if None in values:
        return ""
    mean, error = mean_se(values)
    bound = "" if all(row["share_known"] for row in rows) else "≤ "
    return f"{bound}{mean:.0%}{plus_minus(100 * error, '.0f')}"


def markdown(rows: list[dict]) -> str:
    """The table: for each command a line without a bug, then one for each bug."""
    text = ("| bug | gold reward | KL | KL it reports | of the optimum | number that gives it away "
            "| without | with |\n" + "|---" * 8 + "|\n")
    for method, command in COMMANDS.items():
        of_method = [row for row in rows if row["method"] == method]
        clean = [row for row in of_method if not row["bug"]]
        for bug in [None, *(bug for bug in BUGS if bug.method == method)]:
            own = [row for row in of_method if row["bug"] == (bug.name if bug else "")]
            if not own:
                continue
            title = f"[{bug.name}](#{bug.name})" if bug else f"**none**: `python {command}`"
            cells = [title, over_seeds([row["reward"] for row in own], ".3f"),
                     over_seeds([row["kl"] for row in own], ".2f"),
                     over_seeds([row["signs"]["reported"]["kl"] for row in own], ".2f"),
                     share(own)]
            if bug:
                # the first step depends on the seed as much as on the bug: the same seeds, then
                seeds = [row["seed"] for row in own]
                beside = [row for row in clean if bug.sign[0] != "first" or row["seed"] in seeds]
                form = ".4f" if bug.sign[1] == "loss" else ".3f"
                cells += [f"`{bug.sign[1]}` {WHERE[bug.sign[0]]}",
                          *(over_seeds([sign_of(row, *bug.sign) for row in some], form)
                            for some in (beside, own))]
            else:
                cells += ["", "", ""]
            text += "| " + " | ".join(cells) + " |\n"
    return text


def exhibit(bug: Bug) -> str:
    """A bug in words and as a diff."""
    module, test = bug.caught.split(": ")
    source = f"Row {bug.row} of tests/README.md" if bug.row else "No row of tests/README.md"
    if bug.seen:
        source += f"; [{bug.seen}]({GITHUB}{bug.seen})"
    what, expected = (textwrap.fill(text, 126, break_long_words=False, break_on_hyphens=False)
                      for text in (f"{bug.what} {source}.", f"Expected: {bug.expected}"))
    where = (f"`{bug.file}`, with `python {COMMANDS[bug.method]}`;\n"
             f"fails in tests/test_{module}.py: `{test}`")
    return f"### {bug.name}\n\n{what}\n\n{where}\n\n```diff\n{diff(bug)}\n```\n\n{expected}\n"


def main(config: Config) -> None:
    """Build what is missing, run what has no row yet, and write rows and table."""
    use_device(config.device)
    folder = Path(config.out)
    check_writable(folder)
    bugs = [bug for bug in BUGS if config.only in ("", bug.name)]
    for bug in bugs:
        planted(bug)  # one that does not fit the code any more stops before anything is built

    # ---- 1) what all runs start from -------------------------------------------------------------
    start = pipeline.load(pipeline.sft_policy(config.sft, DATASET, "cpu"), DATASET, "cpu")
    start.gold = pipeline.gold_reward(start)
    pipeline.sampled_pairs(start, tasks.load(DATASET).labels)
    start.bank = pipeline.sample_bank(start)
    pipeline.stage(reward_model.Config(sft=config.sft, resume=True))

    # ---- 2) the runs: those without a bug first, then seed by seed -------------------------------
    path = folder / "results.jsonl"
    rows = finished_rows(path, start)
    methods = [method for method in COMMANDS if any(bug.method == method for bug in bugs)]
    planned = [(None, method, seed) for method in methods for seed in range(config.seeds)]
    planned += [(bug, bug.method, seed) for seed in range(config.seeds) for bug in bugs]
    copied = set()
    for bug, method, seed in planned:
        wanted = key(bug, method, seed, start)
        if any(row.items() >= wanted.items() for row in rows):
            continue
        code = folder / (bug.name if bug else "none-" + re.sub(r"\W+", "-", method.lower()))
        if code not in copied:
            print("\n" + (exhibit(bug) if bug else f"### none: python {COMMANDS[method]}"))
            copy_code(code, start, bug)
            copied.add(code)
        print(f"{bug.name if bug else 'none'}, seed {seed}:", flush=True)
        rows.append({**wanted, **measure(code, method, seed, start, config.device)})
        write_jsonl(path, rows)  # a stop loses one run
        atomic_write(folder / "table.md", markdown(rows).encode())

    # ---- 3) the table of what was asked for ------------------------------------------------------
    names = ["", *(bug.name for bug in bugs)]
    shown = [row for row in rows if row["method"] in methods and row["bug"] in names
             and row["seed"] < config.seeds]
    print(f"\n{markdown(shown)}\nrows and table  ->  {folder}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
