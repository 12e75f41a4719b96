"""What finished policies say to your prompt, side by side; what the optimum would say; the scores
of your texts; a policy in Hugging Face's format.

    python sample.py RUN [RUN ...] --prompt "This film" --temperature 0.7 --n 4
    python sample.py RUN [RUN ...] < prompts.txt          # one on each line; or type them
    python sample.py RUN --prompt "This film" --optimum 0.1
    python sample.py REWARD_MODEL --score texts.jsonl     # JSON lines to stdout
    python sample.py RUN --export FOLDER

All policies get the same random numbers, one for each token of each response: with equal weights
they would say the same, so what differs comes from the policies. The numbers depend on --seed and
the prompt alone.

Beside each response stand its gold reward r, where the task has one, and log pi(y|x) -
log pi_ref(y|x) in nats. Its mean over a policy's own samples at temperature 1 is the KL; the
policies here are scored at temperature 1 whatever --temperature they were sampled at. A text that
ends in [cut] met the end of the block before its <eos>.

--optimum BETA shows what the best policy for  E[r] - BETA KL  would say at temperature 1:

    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)       (Rafailov et al. 2023, Eq. 4)

drawn with these weights from N responses of pi_ref: those of the bank where it has the prompt,
fresh ones otherwise. r is the gold reward as it is; pairs that were labelled with a scale (5 for
`reviews`) lead DPO with --beta B to the optimum of BETA = B / scale.

--score reads rows {"prompt", "response"}, the response with its leading space as the literal
continuation, and adds the "score" of a reward model. Scores are comparable within a prompt.

Reads   finished runs; the bank beside the SFT run where it is there
Writes  nothing, but for --export
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Iterator, NamedTuple, get_args

import torch

import evaluate
from common import fail, gpt2, pipeline, tasks
from common.files import read_json_object, read_jsonl
from common.rewards import pair_scores
from common.run import check_same_task, load_run
from common.settings import Parser, require, require_numbers, stop_like_ctrl_c
from common.tokenizer import Tokenizer
from common.training import Device, generator, use_device
from model import GPT, Samples, ScalarModel, generate, summed_logprobs

DEFAULTS = {"temperature": 1.0, "n": 4, "seed": 0}


class Response(NamedTuple):
    """A response to a prompt, and what is shown beside it."""
    text: str
    reward: float | None  # gold reward, where the task has one
    log_ratio: float  # log pi(y|x) - log pi_ref(y|x), nats
    cut: bool = False  # it met the end of the block before its <eos>


# ---- what a policy says, and what the optimum would say ------------------------------------------

def sample(model: GPT, tokenizer: Tokenizer, prompt: str, count: int, max_length: int, seed: int,
           temperature: float = 1.0) -> Samples:
    """`count` responses to a prompt. The random numbers are those of (seed, prompt): the same for
    every model, as long as max_length is the same."""
    ids = [tokenizer.bos] + tokenizer.encode(prompt)
    return generate(model, [ids] * count, max_length, tokenizer.eos, tokenizer.pad,
                    generator(seed, "sample", prompt), temperature)


def gold_rewards(start: pipeline.Start, prompt: str, texts: list[str]) -> list[float | None]:
    """The gold reward of each response to a prompt; None where the task has none."""
    if start.gold is None:
        return [None] * len(texts)
    return start.gold([prompt] * len(texts), texts).tolist()


def responses_of(policy: GPT, start: pipeline.Start, prompt: str,
                 samples: Samples) -> list[Response]:
    """A policy's samples with their gold rewards and log-ratios; these are of temperature 1 and
    fp32."""
    rows = samples.tokens, samples.prompt_lengths, samples.lengths
    log_ratios = (summed_logprobs(policy, *rows, "float32") -
                  summed_logprobs(start.ref, *rows, "float32")).tolist()
    ids = samples.response_ids()
    texts = [start.tokenizer.decode(row) for row in ids]
    cut = [row[-1] != start.tokenizer.eos for row in ids]
    return list(map(Response, texts, gold_rewards(start, prompt, texts), log_ratios, cut))


def reference_responses(start: pipeline.Start, bank: evaluate.Bank | None, prompt: str,
                        seed: int) -> tuple[str, list[str], torch.Tensor]:
    """N responses of pi_ref to a prompt: whether they are the bank's or fresh ones, their texts and
    their gold rewards (N,)."""
    if bank and prompt in bank.prompts:
        i = bank.prompts.index(prompt)
        return "responses of the bank", bank.responses[i], bank.rewards[i]
    N = tasks.load_preset(start.dataset, start.preset).bank_samples
    samples = sample(start.ref, start.tokenizer, prompt, N, start.ref.config.block_size, seed)
    texts = [start.tokenizer.decode(row) for row in samples.response_ids()]
    return "fresh responses", texts, torch.tensor(gold_rewards(start, prompt, texts))


def optimum(rewards: torch.Tensor, beta: float, count: int,
            draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Draw from pi* among N responses of pi_ref to a prompt, with replacement. rewards: (N,).

    Returns:
        numbers of the responses drawn, (count,); log pi*(y|x) - log pi_ref(y|x) of these, (count,)
        nats, which is r / beta - log Z = log(N w); the effective sample size.
    """
    weights = evaluate.optimal_weights(rewards[None], beta)  # (1, N), Eq. 4
    ess = evaluate.effective_sample_size(weights).item()
    picks = torch.multinomial(weights[0], count, replacement=True, generator=draw)
    return picks, (len(rewards) * weights[0, picks]).log(), ess


# ---- on the screen -------------------------------------------------------------------------------

def show(responses: dict[str, list[Response]], gold: bool) -> None:
    """The first response of each policy, then the second of each, ...: what the same random numbers
    became stands together. Numbers on the left, the text on the right."""
    width = max(map(len, responses))
    columns = shutil.get_terminal_size((100, 24)).columns
    print(f"   {' gold  ' if gold else ''}log-ratio")
    for i, row in enumerate(zip(*responses.values()), 1):
        number = f"{i:2} "
        for name, response in zip(responses, row):
            reward = f"{response.reward:5.2f}  " if gold else ""
            start = f"{number}{reward}{response.log_ratio:+9.2f}  {name:{width}}  "
            number = "   "
            text = response.text + (" [cut]" if response.cut else "")
            lines = textwrap.wrap(on_one_line(text), max(40, columns - len(start)),
                                  break_on_hyphens=False) or ["(empty)"]
            print(start + f"\n{'':{len(start)}}".join(lines))


def on_one_line(text: str) -> str:
    """A text without line breaks, and without what would move the cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def prompts_of(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Where each prompt stands, and the prompt: --prompt, or else the lines of stdin."""
    if given.prompt is not None:
        yield "--prompt", given.prompt
        return
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    lines = typed_lines() if at_terminal else sys.stdin or ()  # it may be closed
    empty = True
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield f"stdin, line {number}", line.rstrip("\r\n")
    except UnicodeDecodeError:
        fail("stdin: not UTF-8")
    if empty and not at_terminal:
        fail("stdin: no prompt there; give one a line, or --prompt TEXT")


def typed_lines() -> Iterator[str]:
    """What is typed into a terminal, until Ctrl-D."""
    try:
        import readline  # noqa: F401  input() then has arrow keys, and the prompts before
    except ImportError:  # Windows
        pass
    while True:
        try:
            yield input("prompt> ")
        except EOFError:
            print()
            return


# ---- what can be asked for -----------------------------------------------------------------------

def policies_of(runs: list[str], sft: str | None) -> tuple[pipeline.Start, list[GPT]]:
    """The reference and the policies, all of one task. An SFT policy has no reference of its own:
    it takes that of the runs beside it, or else itself."""
    loaded = [load_run(run) for run in runs]
    configs = [read_json_object(Path(run) / "config.json", "dataset", "preset") for run in runs]
    references = {
        evaluate.reference_of(run, config) for run, config in zip(runs, configs)
        if config.get("script") != "sft.py" or config.get("on") == "chosen"
    }
    if len({path.resolve() for path in references}) > 1 and not sft:
        fail(f"these runs have different references ({', '.join(map(str, sorted(references)))}): "
             "name one of them with --sft")
    reference = Path(sft) if sft else min(references, default=Path(runs[0]))
    start = pipeline.load(reference, configs[0]["dataset"], configs[0]["preset"])
    for run, (_, meta) in zip(runs, loaded):
        check_same_task(run, meta, start.task)
    return start, [policy for policy, _ in loaded]


def talk(given: argparse.Namespace) -> None:
    """Every policy's responses to every prompt, response by response."""
    start, policies = policies_of(given.run, given.sft)
    tokenizer = start.tokenizer
    max_length = min(model.config.block_size for model in [start.ref, *policies])

    def check(where: str, prompt: str) -> None:
        try:
            size = 1 + len(tokenizer.encode(prompt.encode().decode()))
        except UnicodeEncodeError:
            fail(f"{where}: not UTF-8")
        require(size < max_length, f"{where}: no room for a response: prompt {size} tokens, block "
                f"size {max_length}")

    if given.prompt is not None:  # before a gold reward is trained that is missing
        check("--prompt", given.prompt)
    if not tasks.is_own(start.dataset):
        start.gold = pipeline.gold_reward(start)
    require(not given.optimum or start.gold is not None, "--optimum: the task has no gold reward")
    bank = None
    if given.optimum and (start.folder / "bank" / "bank.jsonl").exists():
        bank = pipeline.sample_bank(start)

    names = [Path(run).name for run in given.run]
    names = given.run if len(set(names)) < len(names) else names
    print(f"pi_ref: {start.sft}" + (f"; gold reward: {start.gold.name}" if start.gold else ""))
    for where, prompt in prompts_of(given):
        check(where, prompt)
        responses = {}
        for name, policy in zip(names, policies):
            samples = sample(policy, tokenizer, prompt, given.n, max_length, given.seed,
                             given.temperature)
            responses[name] = responses_of(policy, start, prompt, samples)
        note = ""
        if given.optimum:
            kind, texts, rewards = reference_responses(start, bank, prompt, given.seed)
            picks, ratios, ess = optimum(rewards, given.optimum, given.n,
                                         generator(given.seed, "optimum", prompt))
            note = (f"optimum at beta {given.optimum:g}: drawn from {len(texts)} {kind}, "
                    f"effective sample size {ess:.1f}")
            if ess < evaluate.MIN_ESS:
                note += f"; not shown, as it needs {evaluate.MIN_ESS:g}: take a larger BETA"
            else:
                responses[f"optimum {given.optimum:g}"] = [
                    Response(texts[i], rewards[i].item(), ratio)
                    for i, ratio in zip(picks.tolist(), ratios.tolist())
                ]
        print(f"\n{prompt or '(the empty prompt)'}")
        show(responses, start.gold is not None)
        if note:
            print(note)


def score(run: str, path: str) -> None:
    """Print the rows of a file of texts, each with the score of a reward model."""
    model, meta = load_run(run, ScalarModel)
    tokenizer = Tokenizer.load(Path(run) / "tokenizer.tiktoken")
    check_same_task(run, meta, {"tokenizer": tokenizer.fingerprint})
    if read_json_object(Path(run) / "config.json").get("script") == "classifier.py":
        fail(f"{run}: a classifier of texts, expected a reward model")
    rows = read_jsonl(path, {"prompt": str, "response": str})
    for row in rows:
        size = 2 + sum(len(tokenizer.encode(row[name])) for name in ("prompt", "response"))
        if size > model.config.block_size:
            fail(f"{path}, line {row['line']}: prompt and response have {size} tokens, the block "
                 f"size of the reward model is {model.config.block_size}")
    scores = pair_scores(model, tokenizer, [row["prompt"] for row in rows],
                         [row["response"] for row in rows])
    for row, value in zip(rows, scores.tolist()):
        del row["line"]
        print(json.dumps({**row, "score": round(value, 4)}, ensure_ascii=False))


def export(run: str, folder: str) -> None:
    """A policy and its tokenizer as a folder for transformers."""
    model, meta = load_run(run)
    tokenizer = Tokenizer.load(Path(run) / "tokenizer.tiktoken")
    check_same_task(run, meta, {"tokenizer": tokenizer.fingerprint})
    gpt2.export(model, tokenizer, folder)
    print(f"{folder}: for transformers' AutoModelForCausalLM and AutoTokenizer, and for "
          f"sft.py --init {folder}")


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("run", nargs="+", help="folders of finished runs: sft, dpo, ...")
    parser.add_argument("--prompt", help="the prompt, of which a response is the literal "
                        "continuation; without it, a prompt a line from stdin")
    parser.add_argument("--temperature", type=float, help="divides the logits; 0 takes the most "
                        f"likely token [{DEFAULTS['temperature']}]")
    parser.add_argument("--n", type=int, help=f"responses of each policy [{DEFAULTS['n']}; 1 at "
                        "temperature 0]")
    parser.add_argument("--seed", type=int, help="names the random numbers "
                        f"[{DEFAULTS['seed']}]")
    parser.add_argument("--sft", help="run folder of the reference [the one that the runs were "
                        "trained from]")
    parser.add_argument("--optimum", type=float, metavar="BETA", help="also show what the best "
                        "policy for the gold reward at this beta would say")
    parser.add_argument("--score", metavar="FILE.jsonl", help="score its rows {prompt, response} "
                        "with the reward model RUN")
    parser.add_argument("--export", metavar="FOLDER", help="write the policy RUN to a new "
                        "folder in Hugging Face's format")
    parser.add_argument("--device", choices=get_args(Device), default="auto",
                        help="where it is computed; auto = CUDA where there is one, else the CPU")
    given = parser.parse_args(words)

    for alone in ("score", "export"):
        if getattr(given, alone) is None:
            continue
        for name in sorted({*vars(given)} - {"run", "device", alone}):
            require(getattr(given, name) is None, f"--{name}: not with --{alone}")
        require(len(given.run) == 1, f"--{alone}: takes one run, got {len(given.run)}")
    require(not given.n or given.n == 1 or given.temperature != 0,
            f"--n {given.n}: at temperature 0 all responses are the same")
    if given.n is None and given.temperature == 0:
        given.n = 1
    for name, default in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, default)
    require_numbers(given, "n" if given.optimum is None else "n optimum", "seed temperature")
    require(given.temperature == 0 or given.temperature >= 0.01,
            f"--temperature {given.temperature}: must be 0 or at least 0.01")

    use_device(given.device)
    if given.score is not None:
        score(given.run[0], given.score)
    elif given.export is not None:
        export(given.run[0], given.export)
    else:
        talk(given)


if __name__ == "__main__":
    stop_like_ctrl_c()
    main(sys.argv[1:])
