"""The grids of experiments/frontier.py: which methods, with which settings, and the runs they are.

A grid is a dict of methods. A method is a list of commands as one types them, or in FILE.json:

    {"IPO":  ["dpo.py --loss ipo --beta 0.03", "dpo.py --loss ipo --beta 0.1"],
     "mine": ["dpo.py --loss mine.py:loss --beta 0.1"]}
"""
from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import conditioning
import dpo
import expert_iteration
import ppo
import reinforce
import sft
import vargrad
from common import fail, tasks
from common.files import read_json_object
from common.pairs import read_pairs
from common.rewards import is_own, user_function
from common.settings import ROUNDING_ONLY, defaults_of, label, parse, require, run_folder
from common.user_code import own_loss
from experiments.sweep import PlannedRun

SCRIPTS = {"sft.py": sft, "dpo.py": dpo, "reinforce.py": reinforce, "ppo.py": ppo,
           "vargrad.py": vargrad, "expert_iteration.py": expert_iteration,
           "conditioning.py": conditioning}
# flags that are the same for all runs of a sweep, and so in no command of a grid
SHARED = {"dataset", "preset", "sft", "init", "dtype", "device", "seed", "pairs_seed", "out",
          "resume", "help"}


@dataclass(frozen=True)
class Method:
    """One method of a grid: its settings, each of which is run with every seed.

    They are commands as one types them. Behind --lr and --prompts, x4 is four times what the task
    says: of the learning rate, of the prompts that pairs are sampled for.
    """
    commands: list[str]
    quick: int = 1  # how many of them, from the first on, --quick runs


# The paper's grid (section 6.1): beta of DPO, alpha of Unlikelihood, target KL of PPO; extended to
# smaller KLs, where the optimum lives. DPO's learning rate moves the KL as much as its beta does,
# and so it is in the grid, too.
RATES = [f"dpo.py --beta {beta} --lr x{times}" for beta in (0.1, 1.0) for times in (0.25, 4)]
# PPO's beta adapts to the target; it starts near the value that gives this KL in the end.
TARGETS = [f"--target-kl {kl} --beta {0.4 / kl**0.7:.3f}" for kl in (3, 1, 2, 6, 9, 12)]
PAPER = {
    "Preferred-FT": Method(["sft.py --on chosen"]),
    "Unlikelihood": Method([f"dpo.py --loss unlikelihood --alpha {alpha}"
                            for alpha in (0.5, 0.05, 0.1, 1.0)]),
    "DPO": Method([f"dpo.py --beta {beta}" for beta in (0.1, 1.0, 0.05, 0.3, 5.0, 0.5)] + RATES,
                  quick=2),
    "PPO": Method([f"ppo.py {target}" for target in TARGETS]),
    "PPO-GT": Method([f"ppo.py --reward gold {target}" for target in TARGETS]),
}

# Why the others fall short of PPO-GT, one difference at a time: more pairs; labels without noise;
# the same pairs through a reward model, so that the responses are the policy's own.
WHY = {
    "DPO": Method(["dpo.py --beta 0.5"]),
    "DPO, 10x pairs": Method(["dpo.py --beta 0.5 --prompts x10 --evaluate-every 250"], quick=0),
    "DPO, noise-free labels": Method(["dpo.py --labels argmax --beta 0.5"]),
    "PPO": Method(["ppo.py --beta 0.15"]),
    "PPO, 10x pairs": Method(["ppo.py --beta 0.15 --prompts x10"], quick=0),
    "PPO-GT": Method(["ppo.py --reward gold --beta 0.15"]),
}

# What each part of PPO buys, on the gold reward: from REINFORCE without a baseline on, one part
# after the other.
GOLD = "--reward gold"
ABLATION = {
    "REINFORCE, no baseline": Method([f"reinforce.py {GOLD} --baseline none --beta 0.15"], quick=0),
    "REINFORCE, leave-one-out": Method([f"reinforce.py {GOLD} --beta 0.15"]),
    "REINFORCE, value network": Method([f"ppo.py {GOLD} --epochs 1 --beta 0.15"], quick=0),
    "PPO": Method([f"ppo.py {GOLD} --beta 0.15"]),
    "PPO, no clipping": Method([f"ppo.py {GOLD} --clip 1e6 --value-clip 1e6 --beta 0.15"], quick=0),
    "PPO, lam 0.95": Method([f"ppo.py {GOLD} --lam 0.95 --beta 0.15"], quick=0),
    "PPO, 4 epochs": Method([f"ppo.py {GOLD} --epochs 4 --beta 0.15"], quick=0),
    "PPO, lam 0.9, value network first": Method([f"ppo.py {GOLD} --lam 0.9 --value-warmup 8 "
                                                 "--beta 0.15"], quick=0),
    "VarGrad": Method([f"vargrad.py {GOLD} --beta 0.15"], quick=0),
}
# Each method with the settings that were best for it on other prompts (results/reviews/tuning), at
# fixed betas; PPO also as it is by default. With the gold reward, three or six times the usual
# responses.
CRITIC = "--lam 0.9 --value-warmup 8"
LONG = "--batch-size 512 --evaluate-every 20"
BEST = {
    "DPO": Method([f"dpo.py --beta {beta}" for beta in (0.5, 0.3, 1.0, 0.1)]
                  + ["dpo.py --beta 1.0 --epochs 3 --evaluate-every 75"]),
    "PPO": Method([f"ppo.py {CRITIC} --beta {beta}" for beta in (0.3, 0.6, 0.15)]),
    "PPO, lam 1": Method(["ppo.py --beta 0.3"]),
    "PPO-GT": Method([f"ppo.py {GOLD} {CRITIC} --steps 150 --lr 3e-4 --beta 0.18 {LONG}"]),
    "VarGrad-GT": Method([f"vargrad.py {GOLD} --steps 160 --beta 0.18 {LONG}",
                          f"vargrad.py {GOLD} --steps 80 --beta 0.04 {LONG}"]),
}
GRIDS = {"paper": PAPER, "why": WHY, "ablation": ABLATION, "best": BEST}


def methods_of(grid: str) -> dict[str, Method]:
    """A grid of this file, or of FILE.json: {"IPO": ["dpo.py --loss ipo --beta 0.1", ...], ...}."""
    if grid in GRIDS:
        return GRIDS[grid]
    methods = read_json_object(grid)
    for name, commands in methods.items():
        if not (isinstance(commands, list) and commands
                and all(isinstance(command, str) for command in commands)):
            fail(f"--grid {grid}, {name}: expected a list of commands")
        for command in commands:
            try:
                shlex.split(command)
            except ValueError as error:
                fail(f"--grid {grid}, {name}, {command!r}: {error}")
    require(bool(methods), f"--grid {grid}: no method in it")
    return {name: Method(commands) for name, commands in methods.items()}


# ---- what is run ---------------------------------------------------------------------------------

def plan(config: Any) -> list[PlannedRun]:
    """Every run of a sweep. It can be stopped anywhere: the first seed comes first, of that what
    --quick runs, and then a setting of each method in turn. A seed draws everything anew that
    follows the SFT policy: pairs, labels, the reward model, the run.

    Args:
        config: of experiments/frontier.py.
    """
    methods = methods_of(config.grid)
    order = [(name, command) for name, method in methods.items()
             for command in method.commands[:method.quick]]
    if not config.quick:
        left = [[(name, command) for command in method.commands[method.quick:]]
                for name, method in methods.items()]
        for turn in zip_longest(*left):
            order += [one for one in turn if one]
    seeds = 1 if config.quick else config.seeds
    runs = []
    for seed in range(seeds):
        for name, command in order:
            try:
                run = plan_run(config, name, methods[name], command, seed)
                if run.config.out in {other.config.out for other in runs}:
                    fail("another command has the same settings")
            except SystemExit as mistake:
                said = str(mistake).removeprefix("error: ")
                fail(f"--grid {config.grid}, {name}, {command!r}: {said}")
            runs.append(run)
    return runs


def plan_run(config: Any, name: str, method: Method, command: str, seed: int) -> PlannedRun:
    """The run of one command of a method; its script's own parser refuses what it cannot take."""
    script, flags = split(command)
    if script not in SCRIPTS:
        fail(f"{script!r}: expected one of {', '.join(SCRIPTS)}")
    if shared := SHARED & flags.keys():
        fail(f"--{min(shared)}: is the same for all runs, and given to the sweep")

    preset = tasks.load_preset(config.dataset, config.preset)
    values = {"dataset": config.dataset, "preset": config.preset, "dtype": config.dtype,
              "device": config.device, "evaluate_every": preset.evaluate_every[Path(script).stem],
              "seed": seed, **flags}
    if "pairs" not in flags and flags.get("reward", "model") == "model":  # it learns from pairs
        values["pairs_seed"] = seed
    if config.sft:  # what Preferred-FT starts from, and the reference of all the others
        values["init" if script == "sft.py" else "sft"] = config.sft
    Script = SCRIPTS[script].Config
    on = {"on": "chosen"} if script == "sft.py" else {}
    lr = defaults_of(Script, dataset=config.dataset, preset=config.preset, **on)["lr"]
    for flag, usual in ("lr", lr), ("prompts", preset.pair_prompts):
        if times := re.fullmatch(r"x(\d+\.?\d*)", flags.get(flag, "")):
            values[flag] = type(usual)(float(times[1]) * usual)
    run = parse(Script, "", [word for flag, value in values.items()
                             for word in ("--" + flag.replace("_", "-"), str(value)) if word])
    run.resume = True
    # the user's own files, which no parser reads
    if getattr(run, "loss", "dpo") not in dpo.LOSSES:
        own_loss(run.loss)
    if is_own(getattr(run, "reward", "model")):
        user_function(run.reward, "--reward")
    if getattr(run, "pairs", ""):
        read_pairs(run.pairs)

    # a folder that is named by all settings: when a grid is changed, it does not meet older runs
    named = [flag for flag in flags if flag not in ("on", *ROUNDING_ONLY)]
    slug = re.sub(r"\W+", "-", name.lower())
    folder = Path(run_folder(run, slug, always=(*named, "seed"), never=("init",)))
    run.out = str(Path(config.out) / folder.name)
    # a setting is called by its beta, and by what the method's commands do not have in common
    others = [split(other)[1] for other in method.commands]
    own = [flag for flag in named
           if flag == "beta" or any(other.get(flag) != flags[flag] for other in others)]
    return PlannedRun(name, shown(run, own), seed, run)


def split(command: str) -> tuple[str, dict[str, str]]:
    """The script of a command, and flag -> what is typed behind it, "" if nothing is."""
    script, *words = shlex.split(command.removeprefix("python ")) or [""]
    flags, flag = {}, ""  # "": a word before any flag, which no parser takes
    for word in words:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            flag = flag.replace("-", "_")
            flags[flag] = value
        else:
            flags[flag] = f"{flags.get(flag, '')} {word}".strip()
    return script, flags


def shown(run: Any, names: list[str]) -> str:
    """These settings of a run as tables show them: "beta 0.1, lr 0.0008"."""
    parts = []
    for name in names:
        value = getattr(run, name)
        if name == "beta" and "target_kl" in names:
            continue  # only where it starts
        value = value if isinstance(value, str) else f"{value:g}"
        parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts) or "default"


def drawn_run(folder: str) -> PlannedRun:
    """A finished run as if it were one of the sweep. Its method is called like its folder, without
    what tells it from runs of the same method with another strength or seed."""
    if not (Path(folder) / "model.pt").exists():
        fail(f"--draw {folder}: no finished run there (no model.pt)")
    saved = read_json_object(Path(folder) / "config.json", "script", "built_from")
    if saved["script"] not in SCRIPTS:
        fail(f"--draw {folder}: a run of {saved['script']}, expected one of {', '.join(SCRIPTS)}")
    Script = SCRIPTS[saved["script"]].Config
    run = Script(**{field.name: saved[field.name] for field in fields(Script)
                    if field.name in saved} | {"out": folder})
    method, strengths = Path(folder).resolve().name, []
    for name in ("target_kl", "beta", "alpha", "seed"):
        part = re.escape("-" + label(name, getattr(run, name, "")))
        method, found = re.subn(rf"{part}(?=-|$)", "", method, count=1)
        strengths += [name] if found and name != "seed" else []
    return PlannedRun(method, shown(run, strengths), run.seed, run, saved["built_from"])
