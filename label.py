"""Your own preferences, on the terminal: which of two responses is the better one, and what the
answers are worth.

    python label.py                            # one key an answer; stop with q, go on with the
                                               # same command
    python label.py --report                   # what the answers are worth; about a minute
    printf 'l\\nr\\n' | python label.py         # answers from a pipe, one on each line

A question is a pair of responses of the SFT policy to a training prompt: those that the built-in
labels were drawn for, so your answers and theirs can be compared pair by pair. One pair of each
prompt is asked about, in random order, left and right at random. Random, and not the most uncertain
pairs: agreement on a random sample is an unbiased estimate of agreement on all pairs, and answers
to pairs of different prompts are independent, so its standard error is a simple one.

Agreement is how often your answer has the higher gold reward; ties and skips do not count. What the
answers are worth is measured where you have answered nothing. A reward model is trained on them,
and measured by how many held-out pairs it puts in the gold reward's order. DPO is trained on them,
and measured by gold reward and KL on the test prompts.

What fifty more would buy cannot be seen in your answers. It is simulated: labellers who answer by
the Bradley-Terry model, P(left) = sigmoid(scale (r_left - r_right)), with the scale at which they
agree with the gold reward as often as you do, answer as many questions as you, and fifty more.

Reads   the SFT policy and its pairs (both made if they are missing)
Writes  runs/<dataset>/labels-<name>/ : labels.jsonl  every answer, in order, kept at each key
                                        pairs.jsonl   those of left and right, for dpo.py --pairs
                                        N-pairs/      what was trained on N of them
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import io
import math
import os
import re
import select
import shutil
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Callable

try:
    import termios
    import tty
except ImportError:  # Windows, where a key wants Enter behind it
    termios = None

import torch
from tqdm import tqdm

import dpo
import reward_model
from common import fail, pipeline, tasks
from common.files import (check_writable, delete, lock, read_json_object, read_jsonl, sha256,
                          write_json, write_jsonl)
from common.pairs import encode_pairs, pair_tensors, read_pairs, split
from common.rewards import all_scores
from common.run import compare_settings, finished, load_run
from common.settings import parse, require, run_folder, settings, typed
from common.statistics import mean_se
from common.training import Device, Dtype, generator, half_ties, use_device
from model import ScalarModel

SEED = 5000  # of the order of the questions, and of the simulated labellers
MORE = 50  # answers after which the agreement is shown, and that more would be
SIMULATED = 5  # labellers, each with as many pairs as you and with MORE more
ANSWERS = {"l": "left", "r": "right", "t": "tie", "s": "skip"}
KEYS = "l left   r right   t tie   s skip   u undo   n numbers   q quit"

# With the scripts' own batches of 32, fifty pairs would be two steps, and the warm-up has 15.
SHORT = dict(epochs=4, batch_size=8, warmup=5)


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.
    name: str = "me"  # Who answers: everybody has a folder.
    report: bool = False  # Ask nothing: train on the answers, and say what they are worth.
    sft: str = ""  # Run folder of the SFT policy, if not runs/<dataset>/sft.
    out: str = ""  # Folder of the answers, if not labels-<name> beside the SFT policy.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[\w.-]{1,50}", self.name)),
                f"--name {self.name}: expected letters, digits, dots and dashes, at most 50")
        self.out = self.out or run_folder(self, f"labels-{self.name}", never=("name", "report"))


# ---- questions and answers -----------------------------------------------------------------------

def mirrored(row: dict) -> dict:
    """A row of a pairs file with the other response chosen."""
    return row | {a + more: row[b + more]
                  for a, b in (("chosen", "rejected"), ("rejected", "chosen"))
                  for more in ("", "_reward", "_ids")}


def questions(rows: list[dict]) -> list[dict]:
    """One pair of each prompt among the rows of a pairs file, in random order. The chosen response
    of a question is the left one: which that is is drawn, as the file's order tells who was
    preferred."""
    order = torch.randperm(len(rows), generator=generator(SEED, "order")).tolist()
    of_prompt: dict[str, dict] = {}
    for i in order:
        of_prompt.setdefault(rows[i]["prompt"], rows[i])
    swapped = torch.rand(len(of_prompt), generator=generator(SEED, "sides")) < 0.5
    plain = [{name: value for name, value in row.items() if name != "line"}
             for row in of_prompt.values()]
    return [mirrored(row) if swap else row for row, swap in zip(plain, swapped.tolist())]


def pair_rows(asked: list[dict], answers: list[str]) -> list[dict]:
    """The answers as rows of a pairs file, with the sampled ids. Ties and skips make no pair: the
    losses here have no place for them."""
    return [question if answer == "left" else mirrored(question)
            for question, answer in zip(asked, answers) if answer in ("left", "right")]


def read_answers(path: Path, asked: list[dict]) -> list[str]:
    """The answers so far: the first to the first question, and so on. Stops with file and line
    where a row is no answer to its question."""
    if not path.exists():
        return []
    answers: list[str] = []
    for row in read_jsonl(path, {"prompt": str, "left": str, "right": str, "answer": str}):
        where, number = f"{path}, line {row['line']}", len(answers) + 1
        if row["answer"] not in ANSWERS.values():
            fail(f"{where}: answer {row['answer'][:40]!r}, expected one of "
                 f"{', '.join(ANSWERS.values())}")
        question = asked[len(answers)] if number <= len(asked) else None
        if question is None or (row["prompt"], row["left"], row["right"]) != (
                question["prompt"], question["chosen"], question["rejected"]):
            fail(f"{where}: is not question {number}: a line was edited, moved or removed")
        answers.append(row["answer"])
    return answers


def save(folder: Path, asked: list[dict], answers: list[str]) -> None:
    """Both files, each whole or not at all: a kill between any two keys loses nothing."""
    labels = [{"prompt": question["prompt"], "left": question["chosen"],
               "right": question["rejected"], "answer": answer}
              for question, answer in zip(asked, answers)]
    for path, rows in ((folder / "labels.jsonl", labels),
                       (folder / "pairs.jsonl", pair_rows(asked, answers))):
        if rows:
            write_jsonl(path, rows)
        else:  # no JSON-lines file is empty
            delete([path])


# ---- how often they are right --------------------------------------------------------------------

def agreement(rows: list[dict]) -> tuple[float, float]:
    """How often the chosen response has the higher gold reward, k / n, equal ones counting half;
    and its standard error, sqrt(p (1 - p) / (n + 2)) at p = (k + 1) / (n + 2), which is not zero
    where all answers agree (Agresti and Coull 1998)."""
    n = len(rows)
    right = half_ties(torch.tensor([row["chosen_reward"] for row in rows]),
                      torch.tensor([row["rejected_reward"] for row in rows])).sum().item()
    p = (right + 1) / (n + 2)
    return right / n, math.sqrt(p * (1 - p) / (n + 2))


def scale_of(asked: list[dict], agreement: float) -> float:
    """The scale at which a Bradley-Terry labeller is expected to agree so often with the gold
    reward: mean sigmoid(scale |r_left - r_right|) = agreement, by bisection; +-1000 where there is
    none."""
    gaps = torch.tensor([abs(question["chosen_reward"] - question["rejected_reward"])
                         for question in asked], dtype=torch.float64)
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if torch.sigmoid(middle * gaps).mean() < agreement:
            low = middle
        else:
            high = middle
    return high


def simulated_pairs(asked: list[dict], scale: float, count: int, seed: int) -> list[dict]:
    """What a Bradley-Terry labeller of this scale answers to `count` of the questions. Fewer of
    the same seed are the first of them."""
    draw = generator(SEED, "labeller", seed)
    order = torch.randperm(len(asked), generator=draw)[:count].tolist()
    gaps = torch.tensor([asked[i]["chosen_reward"] - asked[i]["rejected_reward"] for i in order])
    left = torch.rand(len(asked), generator=draw)[:count] < torch.sigmoid(scale * gaps)
    answers = ["left" if is_left else "right" for is_left in left.tolist()]
    return pair_rows([asked[i] for i in order], answers)


def show_agreement(asked: list[dict], answers: list[str]) -> None:
    """What can be said at once."""
    rows = pair_rows(asked, answers)
    ties, skips = answers.count("tie"), answers.count("skip")
    print(f"\n{len(answers)} answers: {len(rows)} pairs, {ties} ties, {skips} skipped")
    if not rows:
        return
    right, error = agreement(rows)
    wrong = [row for row in rows if row["chosen_reward"] < row["rejected_reward"]]
    print(f"agree with the gold reward   {right:.0%} +- {error:.0%}   (a coin: 50%)")
    for name, some in (("agree", [row for row in rows if row not in wrong]), ("do not", wrong)):
        if some:
            gap = sum(abs(row["chosen_reward"] - row["rejected_reward"]) for row in some)
            print(f"gold rewards differ by       {gap / len(some):.2f} where you {name}")
    left, n = answers.count("left"), len(rows)
    print(f"you chose the left one       {left / n:.0%} +- {0.5 / math.sqrt(n):.0%}   "
          "(a coin: 50%)")


# ---- what they are worth -------------------------------------------------------------------------

def runs_on(config: Config, path: Path, folder: Path,
            seed: int = 0) -> tuple[reward_model.Config, dpo.Config]:
    """The two runs on a file of few pairs."""
    shared = dict(dataset=config.dataset, preset=config.preset, pairs=str(path), sft=config.sft,
                  dtype=config.dtype, device=config.device, seed=seed, resume=True, **SHORT)
    return (reward_model.Config(**shared, lr=1e-3, out=str(folder / "reward-model")),
            dpo.Config(**shared, lr=2e-4, beta=0.5, out=str(folder / "dpo")))


def trained(config: Config, start: pipeline.Start, held: list[dict], rows: list[dict],
            folder: Path, seed: int = 0) -> dict:
    """Train a reward model and DPO on pairs with their own scripts, in silence, and measure both.

    Args:
        held: pairs of prompts that nobody was asked about.
    Returns:
        pairs; accuracy of the reward model by the gold order of `held`, each prompt alike; DPO's
        row of its evaluation (reward, kl, share, ...); sft, the SFT policy's row.
    """
    path = folder / "pairs.jsonl"
    write_jsonl(path, rows)
    scorer, policy = runs_on(config, path, folder, seed)
    for module, run in ((reward_model, scorer), (dpo, policy)):
        if not finished(run):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                module.train(run)
    # a file of log-probabilities for every set of pairs: nobody will need it again
    delete((start.folder / "ref-logprobs").glob(f"*-{sha256(path)[:16]}-*"))

    model, _ = load_run(scorer.out, ScalarModel)
    pairs = pair_tensors(encode_pairs(held, start.tokenizer, model.config.block_size, path),
                         start.tokenizer.pad)
    chosen, rejected = all_scores(model, pairs.tokens.flatten(0, 1), pairs.lengths.flatten(),
                                  config.dtype).view(2, -1)
    gold = torch.tensor([row["chosen_reward"] - row["rejected_reward"] for row in held])
    right = half_ties((chosen - rejected) * gold.sign(), torch.zeros(len(held))).tolist()
    of_prompt: dict[str, list[float]] = {}
    for row, is_right in zip(held, right):
        of_prompt.setdefault(row["prompt"], []).append(is_right)
    accuracy, error = mean_se([sum(own) / len(own) for own in of_prompt.values()])

    table = read_json_object(Path(policy.out) / "evaluation.json", "table")["table"]
    kinds = {row["kind"]: row for row in table.values()}
    return {"pairs": len(rows), "accuracy": accuracy, "accuracy_se": error, **kinds["policy"],
            "sft": kinds["reference"]}


def worth(config: Config, start: pipeline.Start, asked: list[dict], held: list[dict],
          rows: list[dict]) -> dict:
    """What the pairs of a person are worth, and those of simulated labellers who agree with the
    gold reward as often: as many, and MORE more. Kept in N-pairs/worth.json, as long as the answers
    stay the same."""
    folder = Path(config.out) / f"{len(rows)}-pairs"
    made_from = folder / "pairs.jsonl"
    if made_from.exists() and sha256(made_from) != sha256(Path(config.out) / "pairs.jsonl"):
        shutil.rmtree(folder)  # of other answers, before they were taken back
    if (folder / "worth.json").exists():
        return read_json_object(folder / "worth.json", "you", "scale", "simulated")
    print("training on them and on simulated answers: about a minute", flush=True)
    scale = scale_of(asked, agreement(rows)[0])
    counts = sorted({len(rows), min(len(rows) + MORE, len(asked))})
    with tqdm(total=1 + SIMULATED * len(counts), desc="reward models and DPO", unit=" sets") as bar:
        found = {"you": trained(config, start, held, rows, folder), "scale": scale,
                 "simulated": [[] for _ in counts]}
        bar.update()
        for seed in range(SIMULATED):
            for count, runs in zip(counts, found["simulated"]):
                answered = simulated_pairs(asked, scale, count, seed)
                runs.append(trained(config, start, held, answered,
                                    folder / "simulated" / f"{count}-seed{seed}", seed))
                bar.update()
    shutil.rmtree(folder / "simulated")
    write_json(folder / "worth.json", found)
    return found


def show_worth(found: dict, right: float, scale: float) -> None:
    """The table, and in words what fifty more would buy."""
    you, sft, simulated = found["you"], found["you"]["sft"], found["simulated"]
    print(f"\n{'':10}{'pairs':>6}{'reward model':>15}{'DPO: gold reward':>20}{'KL':>7}"
          f"{'of optimum':>12}")
    print(f"{'SFT':10}{0:6}{'':15}{sft['reward']:11.3f} +- {sft['reward_se']:.3f}{0:7.2f}")
    for name, runs in [("you", [you]), *(("simulated", runs) for runs in simulated)]:
        accuracy, accuracy_error = mean_of(runs, "accuracy")
        reward, reward_error = mean_of(runs, "reward")
        share = ""
        if all(run["share"] is not None for run in runs):
            at_most = "" if all(run["share_known"] for run in runs) else "<= "
            share = f"{at_most}{mean_of(runs, 'share')[0]:.0%}"
        print(f"{name:10}{runs[0]['pairs']:6}{accuracy:8.0%} +- {accuracy_error:3.0%}"
              f"{reward:11.3f} +- {reward_error:.3f}{mean_of(runs, 'kl')[0]:7.2f}{share:>12}")
    print(f"""reward model: how often it is right about the gold order of held-out pairs
simulated: mean of {len(simulated[0])} labellers who are right {right:.0%} of the time, as you are
           (Bradley-Terry, scale {found['scale']:.1f}; the built-in labels: {scale:g})
+-: over prompts for you and SFT, between labellers for the simulated

""", end="")
    gain = you["reward"] - sft["reward"]
    error = math.hypot(you["reward_se"], sft["reward_se"])
    print(f"your {you['pairs']} pairs buy DPO {gain:+.3f} +- {error:.3f} gold reward"
          + verdict(gain, error))
    if len(simulated) == 2:  # of the same seeds, so their differences are compared
        before, after = simulated
        print(f"{after[0]['pairs'] - before[0]['pairs']} more would buy:")
        for name, key, unit in (("DPO", "reward", "gold reward"),
                                ("reward model", "accuracy", "accuracy")):
            gain, error = mean_se([new[key] - old[key] for old, new in zip(before, after)])
            print(f"  {name:12}  {gain:+.3f} +- {error:.3f} {unit}" + verdict(gain, error))


def mean_of(runs: list[dict], key: str) -> tuple[float, float]:
    """Over runs, with the error between them; one run has its error over prompts."""
    if len(runs) == 1:
        return runs[0][key], runs[0].get(f"{key}_se", math.nan)
    return mean_se([run[key] for run in runs])


def verdict(value: float, error: float) -> str:
    """Three standard errors, as few seeds know their own error badly."""
    return "" if abs(value) > 3 * error else ": not to be told from nothing"


# ---- the terminal --------------------------------------------------------------------------------

def read_key() -> str:
    """The next key, in lower case: from a terminal without Enter, otherwise a line. "" at the end
    of the input; a space for a key that means nothing."""
    sys.stdout.flush()
    if termios is None or sys.stdin is None or not sys.stdin.isatty():
        try:
            line = sys.stdin.readline() if sys.stdin else ""
        except UnicodeDecodeError:
            line = "?"  # no text, and so no answer
        return line.strip().lower() or " " * bool(line)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)  # each key at once, unseen; Ctrl-C still stops
        key = os.read(terminal, 1)
        if key == b"\x1b" and select.select([terminal], [], [], 0.05)[0]:  # an arrow, F1, Delete
            return {b"[D": "l", b"[C": "r"}.get(os.read(terminal, 16), " ")
        # Ctrl-D is an end; one that was typed ahead is read as NUL
        return key.decode("latin-1").lower().strip("\x04\0")
    except OSError:  # the terminal is gone
        return ""
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def show(number: int, count: int, question: dict) -> None:
    """A question, on 20 to 100 columns. What a model wrote may have control characters, which a
    terminal would obey."""
    width = max(20, min(shutil.get_terminal_size().columns, 100))
    print(f"\n{f'---- {number} of {count} ':-<{width - 1}}")
    for name, text in (("", question["prompt"]), ("left", f"... {question['chosen'].strip()}"),
                       ("right", f"... {question['rejected'].strip()}")):
        clean = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        for i, line in enumerate(clean.split("\n")):
            print(textwrap.fill(line, width - 1, initial_indent=f"{name if i == 0 else '':8}",
                                subsequent_indent=8 * " "))
        print()
    print(KEYS, end=" > ")


def main(config: Config) -> None:
    """Ask until the person stops, or report."""
    use_device(config.device)
    check_writable(config.out)
    pipeline.require_gold(config.dataset)
    start = pipeline.load(
        pipeline.sft_policy(config.sft, config.dataset, config.preset, config.dtype),
        config.dataset, config.preset, config.dtype)
    start.gold = pipeline.gold_reward(start)
    task = tasks.load(config.dataset)
    path = pipeline.sampled_pairs(start, task.labels)
    rows = read_pairs(path)
    pipeline.use_pairs(start, rows, path)
    train_rows, held_rows = split(start.pairs, draw=False)
    asked = questions([rows[i] for i in train_rows.tolist()])
    held = [rows[i] for i in held_rows.tolist()
            if rows[i]["chosen_reward"] != rows[i]["rejected_reward"]]
    require(bool(held), f"{path}: no pair is held out, there are too few")

    folder = Path(config.out)
    built_from = {"policy": start.policy_id, "pairs": start.pairs_id}
    compare_settings(folder, {"dataset": config.dataset}, built_from, "give another --name")
    if folder.exists():
        lock(folder)  # before it is read: nobody else may add to it from now on
    answers = read_answers(folder / "labels.jsonl", asked)
    if config.report and not pair_rows(asked, answers):
        fail(f"{folder}: nothing to report, no pair has been answered there")
    write_json(folder / "config.json", {"dataset": config.dataset, "built_from": built_from})
    lock(folder)
    save(folder, asked, answers)

    def numbers() -> None:
        pairs = pair_rows(asked, answers)
        show_agreement(asked, answers)
        if len(pairs) < SHORT["batch_size"]:
            print(f"what they are worth: from {SHORT['batch_size']} pairs on")
        else:
            show_worth(worth(config, start, asked, held, pairs), agreement(pairs)[0],
                       task.label_scale if task.labels == "bt" else math.inf)

    if config.report:
        numbers()
        return
    print("\nWhich response is better? You decide what that means.\n"
          f"The gold reward, which you are compared with: {start.gold.name}.")
    try:
        ask(folder, asked, answers, numbers)
    finally:
        print(f"\n{len(answers)} answers  ->  {folder / 'labels.jsonl'}   (the same command goes "
              "on)")
        if pair_rows(asked, answers):
            print(typed(runs_on(config, folder / "pairs.jsonl", folder)[1]))


def ask(folder: Path, asked: list[dict], answers: list[str],
        numbers: Callable[[], None]) -> None:
    """Question after question; `answers` grows with each, and is on disk before the next is
    asked."""
    while len(answers) < len(asked):
        show(len(answers) + 1, len(asked), asked[len(answers)])
        key = read_key()
        while sys.stdin and sys.stdin.isatty() and key and key not in "lrtsunq":
            key = read_key()
        if key in ANSWERS:
            print(ANSWERS[key])
            answers.append(ANSWERS[key])
            save(folder, asked, answers)
            if len(answers) % MORE == 0:
                show_agreement(asked, answers)
                print("n says what they are worth (about a minute)")
        elif key == "u":
            print("undo" if answers else "nothing to undo")
            if answers:
                answers.pop()
                save(folder, asked, answers)
        elif key == "n":
            print("numbers")
            numbers()
        elif key in ("", "q"):
            print("quit")
            return
        elif key != " ":
            fail(f"{key[:40]!r} is no answer, expected one of {KEYS}")
    print("\nno more questions")


if __name__ == "__main__":
    main(parse(Config, __doc__))
