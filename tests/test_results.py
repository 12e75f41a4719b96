"""The numbers of the pages are what the committed rows say.

For each page of results/ there is a function below that yields its sentences and table rows, with every number computed from
the rows. Each must stand in the page, word for word (line breaks aside). What is left of the page when these are taken away
may have no decimal number, no percentage and no ±, unless its paragraph says "no rows kept", it is a setting, or it is listed
in KNOWN with its source. A page elsewhere (README.md, docs/) is guarded in the same way: a function, and a line in CLAIMS.

On README.md and results/README.md the numbers of a row that links to a folder of results/ must stand on that folder's page.
Rows `| ... | [json](PATH#row) |` are checked on every page, wherever it is.
"""
import functools
import io
import json
import math
import re
import statistics
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import dppo
import evaluate
import pebble
import tamer as tamer_script
from common.statistics import mean_se
from experiments import ablation, ceiling, effort, frontier, length, overoptimization as over, rewardbench as rewardbench_script
from experiments import scaling, scores, winrate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(RESULTS.rglob("*.md"))]


# ---- reading ---------------------------------------------------------------------------------------------------------

@functools.cache
def read(path):
    return [json.loads(line) for line in (RESULTS / path).read_text(encoding="utf-8").splitlines()]


def rows(path, **where):
    """The rows of a jsonl below results/ whose values are these; at least one."""
    found = [row for row in read(path) if all(row.get(name) == value for name, value in where.items())]
    assert found, (path, where)
    return found


def row(path, **where):
    found = rows(path, **where)
    assert len(found) == 1, (path, where, len(found))
    return found[0]


def evaluation(run):
    return json.loads((RESULTS / run / "evaluation.json").read_text(encoding="utf-8"))


def last(path):
    return read(path)[-1]


def column(found, name):
    return [one[name] for one in found]


def signed(value, form):
    return f"{value:+{form}}".replace("-", "−")


def pm(values, form, gap=" ± "):
    """0.779 ± 0.006: mean and standard error over the values."""
    mean, error = mean_se(values)
    return f"{mean:{form}}{gap}{error:{form}}"


def cells(*parts):
    """A row of a table; a part may be a list of cells."""
    flat = [one for part in parts for one in ([part] if isinstance(part, str) else part)]
    return "| " + " | ".join(flat) + " |"


def one_line(text):
    return re.sub(r"\s+", " ", text)


# ---- reviews ---------------------------------------------------------------------------------------------------------

def reviews_scale():
    """The optimum of `reviews` as committed."""
    return frontier.Scale(read("reviews/bank/curve.jsonl"))


def methods_of(path):
    return reviews_scale().methods(read(path))


def ends(method_rows):
    return [one for one in method_rows if one["last"]]


def end_of(method, setting):
    return next(end for end in method.ends if end.setting == setting)


def interpolated(method, kl):
    """0.750 ± 0.007: what a mixture of two ends of a method has at a KL."""
    return f"{frontier.mixed_reward(method.between(kl)):.3f} ± {method.error:.3f}"


def share_at(method, kl):
    """The same as a share of the optimum."""
    return reviews_scale().share(frontier.mixed_reward(method.between(kl)), kl)


def points_above(method, end):
    """By how many points of the optimum an end is above what a method has at its KL."""
    best, _ = evaluate.optimal_reward(reviews_scale().optimum, end.kl)
    return 100 * (end.reward - frontier.mixed_reward(method.between(end.kl))) / (best - reviews_scale().reference.reward)


def efficiency(end):
    return 100 * evaluate.kl_efficiency(reviews_scale().optimum, end.reward, end.kl)


def end_cells(method):
    """Reward, KL, share and efficiency of a method with one setting."""
    end, = method.ends
    assert len(end.rows) == 3
    return [f"{end.reward:.3f} ± {method.error:.3f}", pm(column(end.rows, "kl"), ".2f"),
            reviews_scale().share(end.reward, end.kl), f"{efficiency(end):.0f}%"]


def lead(one, other, kl):
    """−0.035 ± 0.009, and how many errors that is."""
    value, error = frontier.difference(one, other, kl)
    return f"{signed(value, '.3f')} ± {error:.3f}", value / error


def kl_to_the_optimum(path, beta):
    """method -> mean and error of KL(policy || pi*) = regret / beta over its runs, whose beta is in standard deviations of the
    score: those of seed 0, whose log has a score in both units. The optimum's J is the largest on its curve. The error is that
    of the seeds, but not below that of the evaluations."""
    log = [one for one in read("reviews/ppo-gt-targetkl3-seed0/log.jsonl") if "raw_scores" in one]
    low, high = (choose(log, key=lambda one: one["raw_scores"]) for choose in (min, max))
    beta *= (high["raw_scores"] - low["raw_scores"]) / (high["scores"] - low["scores"])
    best = max(point["reward"] - beta * point["kl"] for point in reviews_scale().optimum)
    found = {}
    for method in methods_of(path).values():
        runs = method.ends[0].rows
        mean, error = mean_se([(best - one["reward"]) / beta + one["kl"] for one in runs])
        own = statistics.mean((one["reward_se"] / beta) ** 2 + one["kl_se"] ** 2 for one in runs)
        found[method.name] = mean, max(error, math.sqrt(own / len(runs)))
    return found


def agree_of_pairs():
    return json.loads((RESULTS / "reviews/pairs-bt/config.json").read_text())["labels_agree_with_gold"]


def reviews():
    methods, scale = methods_of("reviews/frontier/results.jsonl"), reviews_scale()
    dpo, ppo, ppo_gt, unlikelihood = (methods[name] for name in ("DPO", "PPO", "PPO-GT", "Unlikelihood"))

    # ---- the frontier: both tables (compared with the rows in a test of its own), and how to read them
    for line in (RESULTS / "reviews/frontier/table.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield line
    yield f"if one is within a factor of {frontier.NEAR:g}"
    errors = [one["reward_se"] for method in (dpo, ppo, ppo_gt) for one in ends(method.rows)]
    yield f"A single evaluation has an error of {min(errors):.3f} to {max(errors):.3f} over prompts"
    yield f"Beyond {scale.optimum[-1]['kl']:.2f} nats the optimum is known from below only"
    top = end_of(dpo, "beta 0.1, lr 0.0008")
    yield (f"DPO's {top.reward:.3f} at {top.kl:.2f} nats is \"{scale.share(top.reward, top.kl)}\", but the optimum has that "
           f"reward at {evaluate.kl_needed(scale.optimum, top.reward):.1f} nats, {efficiency(top):.0f}% of what was spent")
    flat = sorted(efficiency(end) for end in ppo_gt.ends)
    yield f"PPO-GT's efficiency is flat, {flat[0]:.0f} to {flat[-1]:.0f}% over its six targets"
    falls = [sorted((efficiency(end) for end in method.ends), reverse=True) for method in (ppo, dpo)]
    assert len(flat) == 6 and efficiency(end_of(dpo, "beta 1, lr 5e-05")) == falls[1][0]
    assert falls[0] == [efficiency(end) for end in ppo.hull[1:]] and falls[1][-1] == efficiency(top)
    yield (f"PPO's falls from {falls[0][0]:.0f}% to {falls[0][-1]:.0f}%, DPO's from {falls[1][0]:.0f}% (β = 1 at a quarter of "
           f"the learning rate) to {falls[1][-1]:.0f}%")

    # ---- DPO against PPO
    yield f"at 1 and 2 nats they are level ({lead(dpo, ppo, 1)[0]} and {lead(dpo, ppo, 2)[0]})"
    assert all(abs(lead(dpo, ppo, kl)[1]) < 1.5 for kl in (1, 2)) and all(lead(dpo, ppo, kl)[1] < -3.8 for kl in (3, 4, 8))
    yield "DPO is below PPO from 3 nats on, by about four errors or more"
    assert all(lead(dpo, ppo_gt, kl)[1] < -5 for kl in (1, 2, 3, 4))
    yield "PPO-GT is above DPO at 1, 2, 3 and 4 nats, by five errors or more"
    preferred, = methods["Preferred-FT"].ends
    far = column(end_of(unlikelihood, "alpha 1").rows, "kl")
    yield (f"Preferred-FT stops at {preferred.reward:.2f}. Unlikelihood less DPO is {lead(unlikelihood, dpo, 0.5)[0]} at 0.5 "
           f"nats and {lead(unlikelihood, dpo, 2)[0]} at 2; at α = 1 it ends {min(far):.0f} to {max(far):.0f} nats away")
    rates = frontier.learning_rates(read("reviews/frontier/results.jsonl"))[0.1]
    yield f"from 5e-5 to 8e-4 it moves the KL from {rates[5e-5]:.1f} to {rates[8e-4]:.0f} nats at β = 0.1"
    yield f"PPO has no run that ends below {min(column(ends(ppo.rows), 'kl')):.2f} nats"
    six = row("reviews/bank/curve.jsonl", curve="best of n", n=6)
    yield f"n = 6 has at most {six['kl']:.2f} nats, and at that KL {scale.share(six['reward'], six['kl'])} of what there is"

    # ---- why
    why, gain = methods_of("reviews/frontier-why/results.jsonl"), {}
    for label, name, usual in (
            ("DPO, β = 0.5, 9,120 pairs", "DPO", None),
            ("the same pairs, labels without noise", "DPO, noise-free labels", dpo),
            ("ten times the pairs", "DPO, 10x pairs", dpo),
            ("PPO, β = 0.15, reward model of 9,120 pairs", "PPO", ppo),
            ("reward model of ten times the pairs", "PPO, 10x pairs", ppo),
            ("PPO-GT, β = 0.15", "PPO-GT", ppo_gt)):
        end, = why[name].ends
        there = f"{usual.name} {share_at(usual, end.kl)}" if usual else "the same runs"
        yield cells(label, end_cells(why[name]), there)
        if usual:
            gain[name] = points_above(usual, end)
    yield (f"ten times as many are worth {gain['DPO, 10x pairs']:.0f} points to DPO and at most "
           f"{gain['PPO, 10x pairs']:.0f} to PPO")
    ten, ten_ppo = why["DPO, 10x pairs"].ends[0], why["PPO, 10x pairs"].ends[0]
    yield f"(which has {share_at(ppo_gt, ten_ppo.kl)} at {ten_ppo.kl:.2f} nats)"
    yield f"costs DPO {gain['DPO, noise-free labels']:.0f} points at the same KL"
    yield (f"{scale.share(ten.reward, ten.kl)} at {ten.kl:.2f} nats, and {scale.share(ten_ppo.reward, ten_ppo.kl)} at "
           f"{ten_ppo.kl:.2f}")

    # ---- ablation
    path = "reviews/frontier-ablation/results.jsonl"
    ablation, regrets, above = methods_of(path), kl_to_the_optimum(path, 0.15), {}
    for label, name in (
            ("REINFORCE, baseline: the mean of the prompt's other responses", "REINFORCE, leave-one-out"),
            ("REINFORCE, baseline: a value network", "REINFORCE, value network"),
            ("PPO: two passes over each batch, clipped", "PPO"),
            ("no clipping", "PPO, no clipping"), ("λ = 0.95", "PPO, lam 0.95"), ("four passes", "PPO, 4 epochs"),
            ("λ = 0.9, the value network learns first", "PPO, lam 0.9, value network first"),
            ("VarGrad: three batches of earlier responses beside each new one", "VarGrad")):
        end, = ablation[name].ends
        mean, error = regrets[name]
        yield cells(label, end_cells(ablation[name]), f"{mean:.2f} ± {error:.2f}", share_at(ppo_gt, end.kl))
        above[name] = points_above(ppo_gt, end)
    below = sorted(-above[name] for name in ("REINFORCE, leave-one-out", "REINFORCE, value network"))
    yield (f"With one pass REINFORCE is {below[0]:.0f} to {below[1]:.0f} points below PPO-GT, which makes two, at the same "
           f"KL; four passes are {above['PPO, 4 epochs']:.1f} above it")
    yield f"λ = 0.95 is {above['PPO, lam 0.95']:.1f} points above λ = 1 at the same KL"

    def nats(name):
        return f"{regrets[name][0]:.2f}"
    assert min(regrets, key=regrets.get) == "PPO, lam 0.95" and abs(regrets["PPO"][0] - regrets["PPO, 4 epochs"][0]) < 0.05
    yield (f"In regret λ = 0.95 is the best of the table ({nats('PPO, lam 0.95')} nats from π\\*, with λ = 1 {nats('PPO')}), "
           f"and four passes are no better than two ({nats('PPO, 4 epochs')}); REINFORCE is "
           f"{nats('REINFORCE, value network')} to {nats('REINFORCE, leave-one-out')} away")

    # ---- other losses: where they end, and what is interpolated at 4 nats
    losses = methods_of("reviews/frontier-losses/results.jsonl")
    plain, smooth, ipo = (losses[name] for name in ("DPO", "DPO, label smoothing 0.2", "IPO"))
    for method in losses.values():
        for end in method.ends:
            assert len(end.rows) == 3
            yield cells(f"{method.name}, {end.setting.replace('beta', 'β =')}", f"{end.reward:.3f} ± {method.error:.3f}",
                        pm(column(end.rows, "kl"), ".2f"), scale.share(end.reward, end.kl), f"{efficiency(end):.0f}%")
    yield (f"At 4 nats, interpolated, DPO has {interpolated(plain, 4)}, with label smoothing {interpolated(smooth, 4)}, "
           f"IPO {interpolated(ipo, 4)}")
    assert all(abs(lead(method, plain, 4)[1]) < 1.6 < 2.8 < lead(ppo, method, 4)[1] for method in (smooth, ipo))
    yield f"PPO on the same pairs has {interpolated(ppo, 4)} there"
    one, other = end_of(smooth, "beta 0.1"), end_of(plain, "beta 0.1")
    yield f"after {pm(column(one.rows, 'kl'), '.2f')} nats in place of {pm(column(other.rows, 'kl'), '.2f')}"
    limit = evaluation("reviews/dpo-beta0.1-seed0")["table"]["limit of this run in theory"]["kl"]
    yield f"the limit in theory is at {limit:.2f}"
    between = interpolated(plain, one.kl)
    yield f"Its {one.reward:.3f} ± {smooth.error:.3f} there is above what lies between DPO's ends ({between})"
    yield f"Below {one.kl:.2f} nats no run with label smoothing ends"
    yield f"({1 - agree_of_pairs():.0%} of them are; label smoothing 0.2)"

    # ---- single runs
    steps = {run: evaluation(f"reviews/{run}") for run in ("dpo-beta0.1-seed0", "dpo-beta0.1-seed1", "dpo-beta0.1-seed2",
                                                           "dpo-beta1-seed0")}
    small = sorted(100 * one["held_out_accuracy"] for run, one in steps.items() if "0.1" in run)
    pairs = json.loads((RESULTS / "reviews/pairs-bt/config.json").read_text())
    agree, held_out = pairs["labels_agree_with_gold"], pairs["pairs"] // 20
    yield f"PPO's reward model share {pairs['pairs'] - held_out:,} labelled pairs"
    yield (f"On {held_out} held-out pairs, whose labels agree with the gold reward {agree:.0%} of the time, DPO's implicit "
           f"reward is right "
           f"about {100 * steps['dpo-beta1-seed0']['held_out_accuracy']:.1f}% of the labels at β = 1 and {small[0]:.1f} to "
           f"{small[-1]:.1f}% at β = 0.1; the explicit reward model of the same pairs is right about "
           f"{100 * last('reviews/reward-model/log.jsonl')['held_out_accuracy']:.1f}% ([reward-model](reward-model), three passes) "
           f"or {100 * last('reviews/reward-model-epochs1-lr0.0005/log.jsonl')['held_out_accuracy']:.1f}% "
           "([one pass](reward-model-epochs1-lr0.0005): PPO on this page has this one)")
    two = json.loads((RESULTS / "processes/dpo-two.json").read_text())
    end = two["table"][two["name"]]
    yield f"Two processes end with {end['reward']:.3f} at {end['kl']:.2f} nats"
    hours = [sum(one["seconds"] for one in ends(rows(f"reviews/{grid}/results.jsonl"))) / 3600
             for grid in ("frontier", "frontier-why", "frontier-ablation")]
    yield (f"they are {hours[0]:.1f} hours of one core for the frontier, {hours[1]:.1f} for `why` and {hours[2]:.1f} for "
           f"`ablation`")


# ---- imdb ------------------------------------------------------------------------------------------------------------

def with_beta(setting):
    """beta 0.5, epochs 3 as pages have it."""
    return setting.replace("beta", "β =").replace("epochs 3", "3 passes")


def reviews_best():
    """Each method at its best: where runs end, the reward models' ceilings, the short runs that chose."""
    methods, scale = methods_of("reviews/frontier-best/results.jsonl"), reviews_scale()
    dpo, ppo = methods["DPO"], methods["PPO"]
    for method in methods.values():
        for end in sorted(method.ends, key=lambda end: end.kl):
            seeds = len(end.rows)
            kl = pm(column(end.rows, "kl"), ".2f") if seeds > 1 else f"{end.kl:.2f}"
            known = evaluate.kl_efficiency(scale.optimum, end.reward, end.kl) is not None  # or beyond the optimum's curve
            yield cells(f"{method.name}, {with_beta(end.setting)}", str(seeds), f"{end.reward:.3f} ± {method.error:.3f}", kl,
                        scale.share(end.reward, end.kl), f"{efficiency(end):.0f}%" if known else "")
    yield "DPO − PPO | " + " | ".join(lead(dpo, ppo, kl)[0] for kl in (1, 2, 3)) + " |"
    yield "DPO | " + " | ".join(f"{interpolated(dpo, kl)} ({share_at(dpo, kl)})" for kl in (1, 2, 3)) + " |"
    yield "PPO | " + " | ".join(f"{interpolated(ppo, kl)} ({share_at(ppo, kl)})" for kl in (1, 2, 3)) + " |"
    plain = methods["PPO, lam 1"].ends[0]
    yield f"it is {points_above(ppo, plain):+.0f} points".replace("-", "−")
    before = methods_of("reviews/frontier/results.jsonl")["PPO"]
    yield f"{share_at(before, 2)} at 2 nats"

    # ---- labels without noise
    clean = methods_of("reviews/frontier-why/results.jsonl")["DPO, noise-free labels"]
    end, = clean.ends
    yield (f"DPO on such labels has {end.reward:.3f} ± {clean.error:.3f} at {end.kl:.2f} nats, "
           f"{scale.share(end.reward, end.kl)} of the optimum")
    run = evaluation("reviews/ppo-labels-argmax-seed0")
    assert run["table"][run["name"]]["reward"] > end.reward + 0.04 and abs(run["table"][run["name"]]["kl"] - end.kl) < 0.1

    # ---- the reward models
    table = ceiling.table(read("reviews/ceiling/results.jsonl"))
    assert table == (RESULTS / "reviews/ceiling/table.md").read_text(encoding="utf-8")
    yield from table.splitlines()

    # ---- the short runs
    for one in read("reviews/tuning/results.jsonl"):
        if one["of"] == "reward model":
            share = f"{one['share_at_2']:.0%}" if "share_at_2" in one else ""
            yield cells(one["setting"], f"{one['accuracy']:.1%}", f"{one['loss']:.3f}", share)
        else:
            drawn = f"{one['responses']:,}" if "responses" in one else ""
            yield cells(one["setting"], drawn, f"{one['reward']:.3f}", f"{one['kl']:.2f}", f"{one['share']:.0%}",
                        f"{one['kl_efficiency']:.0%}")


def reviews_parts():
    """What a baseline and clipping buy: the tables that the command makes of the rows."""
    noise, runs = read("reviews/ablation/variance.jsonl"), read("reviews/ablation/results.jsonl")
    text = ablation.markdown(noise, runs)
    assert text == (RESULTS / "reviews/ablation/table.md").read_text(encoding="utf-8")
    yield from (line for line in text.splitlines() if line.startswith("|"))
    of = {(one["policy"], one["baseline"]): one for one in noise}
    for policy in "SFT", "after 100 updates":
        yield f"{of[policy, 'leave-one-out']['ratio']:.2f} ± {of[policy, 'leave-one-out']['ratio_se']:.2f}"
        yield f"explains {of[policy, 'none']['explained_variance']:.0%}"
    trained = of["after 100 updates", "none"]
    for one in of["SFT", "none, scores + 5"], trained:
        yield f"{one['ratio']:.2f} ± {one['ratio_se']:.2f} times"
    yield f"1 + (mean/std)² = {1 + (trained['return_mean'] / trained['return_std']) ** 2:.1f}"
    yield f"SFT policy's regret is {ablation.of_sft(runs):.2f} nats"


def imdb():
    found = read("imdb/frontier/results.jsonl")

    def at(method, setting, step, shown):
        one = row("imdb/frontier/results.jsonl", method=method, setting=setting, step=step)
        return f"{one['reward']:.3f} ± {one['reward_se']:.3f} at {one['kl']:.2f} ({shown})"

    yield (f"| 1 nat | {at('DPO', 'beta 1', 200, 'β = 1')} | {at('PPO', 'target kl 1', 60, 'target 1')} | "
           f"{at('PPO-GT', 'target kl 1', 60, 'target 1')} |")
    yield (f"| 1.3 nats | {at('DPO', 'beta 1', 300, 'β = 1')} | {at('PPO', 'target kl 1', 40, 'target 1')} | "
           f"{at('PPO-GT', 'target kl 1', 40, 'target 1')} |")
    yield (f"| 3 nats | not measured | {at('PPO', 'target kl 3', 60, 'target 3')} | "
           f"{at('PPO-GT', 'target kl 3', 20, 'target 3')} |")
    yield (f"| 4.4 nats | {at('DPO', 'beta 0.1', 100, 'β = 0.1')} | {at('PPO', 'target kl 3', 20, 'target 3')} | "
           f"not measured |")
    dpo, ppo = (row("imdb/frontier/results.jsonl", method=method, setting=setting, step=step)
                for method, setting, step in (("DPO", "beta 0.1", 100), ("PPO", "target kl 3", 20)))
    assert abs(dpo["reward"] - ppo["reward"]) < ppo["reward_se"]
    level = (dpo["kl"] + ppo["kl"]) / 2
    yield f"At {level:.1f} nats DPO and PPO are level"
    yield f"DPO is above PPO up to about 1.4 nats and level with it at {level:.1f}"
    kls = sorted(one["kl"] for one in found if one["method"] == "DPO")
    gap = max(zip(kls, kls[1:]), key=lambda two: (two[0] < 4, two[1] - two[0]))
    yield f"DPO was never measured between {gap[0]:.1f} nats (β = 1) and {gap[1]:.1f} (the first evaluation at β = 0.1)"
    methods = imdb_scale().methods(found)
    lines = [interpolated(methods[name], 2) for name in ("DPO", "PPO", "PPO-GT")]
    gaps = [lead(methods["DPO"], methods[name], 2) for name in ("PPO", "PPO-GT")]
    assert all(abs(errors) < 1.5 for _, errors in gaps)
    yield f"At 2 nats, interpolated, all three are no further apart than their errors ({', '.join(lines)})"

    def measured(method, kl):  # on the run of target or beta that is best there, between two evaluations
        setting = "beta 1" if method == "DPO" else "target kl 1"
        path = [one for one in rows("imdb/frontier/results.jsonl", method=method, setting=setting) if one["step"]]
        a, b = [(a, b) for a, b in zip(path, path[1:]) if min(a["kl"], b["kl"]) <= kl <= max(a["kl"], b["kl"])][-1]
        return a["reward"] + (b["reward"] - a["reward"]) * (kl - a["kl"]) / (b["kl"] - a["kl"])

    above = {other: statistics.mean(measured("DPO", kl) - measured(other, kl) for kl in kls)
             for other, kls in (("PPO", (1.2, 1.3, 1.4)), ("PPO-GT", (1.1, 1.2, 1.3)))}
    yield f"Up to about 1.4 nats DPO is above PPO-GT by some {above['PPO-GT']:.2f}, and above PPO by some {above['PPO']:.2f}"
    samples = {one["samples"] for one in found if one["method"] == "PPO"}
    pairs = json.loads((RESULTS / "imdb/pairs-argmax/config.json").read_text())
    yield f"PPO drew {samples.pop():,} responses for its updates; the pairs took {pairs['prompts'] * pairs['samples']:,}"
    one = [evaluation(f"imdb/dpo-beta1-seed{seed}")["table"]["DPO beta 1"] for seed in (0, 1)]
    shares, nats = sorted(column(one, "share")), sorted(column(one, "kl"))
    small = evaluation("imdb/dpo-beta0.1-seed0")["table"]
    yield (f"β = 1 takes {100 * shares[0]:.0f} to {100 * shares[1]:.0f}% of the possible gain at {nats[0]:.1f} to "
           f"{nats[1]:.1f} nats. "
           f"β = 0.1 takes nearly all of it, but at {small['DPO beta 0.1']['kl']:.0f} nats, where best of 16 has "
           f"{small['best of 16']['share']:.0%} at less than 2")
    limit = small["optimum, up to where 64 samples show it"]["kl"]
    yield f"So few show the optimum up to {limit:.2f} nats"
    gold = last("imdb/gold/log.jsonl")
    words = ("50_words", "100_words", "200_words", "whole")
    yield cells("ours", [f"{100 * gold['test_accuracy_' + length]:.1f}" for length in words])
    yield f"right {100 * gold['test_accuracy_100_words']:.1f}% at 100 words"
    sft = last("imdb/sft/log.jsonl")
    yield f"6,500 steps of 32 reviews of 96 tokens (2.7 passes): {sft['bits_per_byte']:.3f} bits per byte"
    yield f"1,000 held-out reviews | {sft['seconds'] / 60:.0f} min on one core"
    assert sft["step"] == 6500
    minutes = {f"{last(f'imdb/{run}/log.jsonl')['seconds'] / 60:.0f}" for run in ("dpo-beta0.1-seed0", "dpo-beta1-seed0")}
    yield f"one pass over {pairs['pairs'] * 19 // 20:,} pairs | {minutes.pop()} min on two cores"
    hours = sum(one["seconds"] for one in found if one["last"]) / 3600
    yield f"fp32 weights and bf16 products, {hours:.1f} hours in all"


# ---- posts and tldr --------------------------------------------------------------------------------------------------

def win_rate_tables(task):
    """The lines of winrate/table.md, which a test of its own compares with the rows."""
    for line in (RESULTS / task / "winrate/table.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield line


def posts():
    yield from win_rate_tables("posts")
    found = "posts/winrate/results.jsonl"

    def rate(method, temperature, n=1):
        return f"{100 * row(found, method=method, temperature=temperature, n=n)['win_rate']:.0f}%"

    yield f"Greedy, SFT alone wins {rate('SFT', 0.0)}"
    yield f"at T = 1 they win {rate('DPO', 1.0)} and {rate('PPO', 1.0)} where SFT wins {rate('SFT', 1.0)}"
    best = max(rows(found, method="best of n", temperature=1.0), key=lambda one: one["win_rate"])
    yield (f"rises to {best['win_rate']:.0%} at n = {best['n']} and falls to {rate('best of n', 1.0, 128)} at n = 128, "
           f"while the gold reward's own best of 128 wins {rate('best of n by the gold reward', 1.0, 128)}")
    shown = [one for one in read(found) if one["n"] in (1, 128)]
    gaps = max(abs(one["win_rate"] - one["length_controlled"]) for one in shown)
    yield (f"the mean lengths are {min(column(shown, 'words')):.0f} to {max(column(shown, 'words')):.0f} words, and the "
           f"length-controlled rates are within {math.ceil(100 * gaps)} points")
    sft = last("posts/sft/log.jsonl")
    yield (f"{sft['step']:,} steps, {sft['nats_per_token']:.3f} nats a token on held-out summaries "
           f"({sft['nats_per_document']:.1f} nats a summary)")
    pairs = json.loads((RESULTS / "posts/pairs-bt/config.json").read_text())
    held = [100 * evaluation(f"posts/dpo-beta0.1-seed{seed}")["held_out_accuracy"] for seed in range(3)]
    yield f"{pairs['pairs']:,} noisy pairs teach style"
    table = (RESULTS / "posts/winrate/table.md").read_text(encoding="utf-8")
    yield f"the reference summaries of {re.search(r'the reference summaries .([0-9.]+) words', table)[1]} words"
    yield (f"The labels agree with the gold order in {pairs['labels_agree_with_gold']:.0%}, DPO's implicit reward with "
           f"held-out labels in {min(held):.0f} to {max(held):.0f}%, the [reward model](reward-model) in "
           f"{last('posts/reward-model/log.jsonl')['held_out_accuracy']:.0%}")

    sizes = read("posts/scaling/results.jsonl")
    assert len(sizes) == 29
    for line in scaling.markdown(sizes).split("\n\n")[0].splitlines():
        yield line
    yield (f"the true reward is right about {100 * sizes[0]['ceiling']:.1f}% of them only")
    doubled = {name: f"{100 * slope:.1f} ± {100 * error:.1f}" for name, (slope, error) in scaling.doublings(sizes).items()}
    yield f"Twice the pairs add {doubled['pairs']} points, twice the parameters {doubled['parameters']}"


def tldr():
    yield from win_rate_tables("tldr")
    found = "tldr/winrate/results.jsonl"
    runs = {method: [evaluation(f"tldr/{method}-beta0.1-seed{seed}") for seed in range(3)] for method in ("dpo", "ppo")}
    own = {method: [one["table"][one["name"]] for one in runs[method]] for method in runs}
    assert not any(one["share_known"] for method in own for one in own[method])  # "at most"
    accuracy = [f"{100 * one['held_out_accuracy']:.1f}" for one in runs["dpo"]]
    loss = [f"{one['held_out_loss']:.3f}" for one in runs["dpo"]]
    yield (f"DPO is right about {accuracy[0]}, {accuracy[1]} and {accuracy[2]}% of held-out pairs, at a loss of {loss[0]}, "
           f"{loss[1]} and {loss[2]}, where ln 2 = {math.log(2):.3f} is chance")

    def span(method, name, form, factor=1.0):
        values = sorted(factor * value for value in column(own[method], name))
        return f"{values[0]:{form}} to {values[-1]:{form}}"

    dpo_kl = column(own["dpo"], "kl")
    yield (f"Its runs end {math.floor(min(dpo_kl))} to {math.ceil(max(dpo_kl))} nats from SFT with at most "
           f"{span('dpo', 'share', '.0f', 100)}% of the optimum, PPO's at {span('ppo', 'kl', '.0f')} nats with at most "
           f"{span('ppo', 'share', '.0f', 100)}%")
    yield (f"(ROUGE-L {runs['dpo'][0]['table']['SFT']['reward']:.3f} → {span('dpo', 'reward', '.3f')} for DPO, "
           f"{span('ppo', 'reward', '.3f')} for PPO)")
    greedy = [row(found, texts="test prompts", method=method, temperature=0.0) for method in ("PPO", "DPO")]
    loses = [f"{100 * one['win_rate']:.0f} ± {100 * one['win_rate_se']:.0f}" for one in greedy]
    yield f"Greedy, PPO loses ({loses[0]}), and DPO is level with SFT or a little below it ({loses[1]})"
    yield f"right about {100 * last('tldr/reward-model/log.jsonl')['held_out_accuracy']:.1f}% of held-out ones"
    ppo = row(found, texts="test prompts", method="PPO", temperature=1.0)
    yield (f"PPO's length-controlled rate at T = 1, {100 * ppo['length_controlled']:.0f} ± "
           f"{100 * ppo['length_controlled_se']:.0f}")

    def rate(texts, method, temperature, n=1):
        return f"{100 * row(found, texts=texts, method=method, temperature=temperature, n=n)['win_rate']:.0f}%"

    news = [rate("news articles", method, T) for method in ("DPO", "PPO") for T in (0.0, 0.25)]
    yield f"On articles DPO wins {news[0]} and {news[1]} where PPO wins {news[2]} and {news[3]}"
    gold = "best of n by the gold reward"
    yield (f"The best of four by ROUGE-L itself wins {rate('test prompts', gold, 0.25, 4)} at T = 0.25, and "
           f"{rate('test prompts', gold, 1.0, 4)} at T = 1")
    mascara = rows("tldr/winrate/samples.jsonl", id="92a54cc4b2a2")[0]["PPO"].strip()
    yield f'*"{mascara}"*'

    lines = (RESULTS / "tldr/agreement.txt").read_text().splitlines()
    for label, name in (("another person", "another person, all"), ("the longer one", "the longer one, all"),
                        ("ROUGE-L against the author", "ROUGE-L, all"),
                        ("a reward model of 950 comparisons, on held-out posts", "runs/tldr/reward-model-human, test")):
        line = next(line for line in lines if line.startswith(name + " "))[len(name):]
        agreed, low, high, count = re.search(r"([\d.]+)%\s+([\d.]+)% to ([\d.]+)%\s+([\d,]+)", line).groups()
        yield cells(label, f"{agreed}%", f"{low} to {high}%", count)
    published = lines[-1].removeprefix("people with people in Stiennon et al. (2020): ")
    yield f"People agree with each other in {published} (Stiennon et al. 2020)"

    data = json.loads((RESULTS / "tldr/data.json").read_text())
    splits = ("train", "valid", "test")
    summarised = sum(data["rows"][split] + sum(data["dropped"][split].values()) for split in splits)
    yield (f"{summarised:,} self-posts of Reddit, 2013, with their authors' TL;DR, {data['rows']['pretrain']:,} posts to "
           f"pretrain on")
    yield f"{data['rows']['train']:,} are left to train on, {data['rows']['test']} to test on"
    long = sum(data["dropped"][split]["prompt_too_long"] for split in splits) / summarised
    assert 0.7 < long < 0.8  # "three quarters of the posts go"
    yield f"{last('tldr/pretrained/log.jsonl')['nats_per_token']:.2f} nats a token on summaries of the validation set"
    sft = last("tldr/sft/log.jsonl")
    yield f"{sft['nats_per_token']:.2f} nats a token ({sft['bits_per_byte']:.2f} bits per byte)"


# ---- items and behaviour ---------------------------------------------------------------------------------------------

def bt():
    sizes = [one for one in read("bt/results.jsonl") if "comparisons" in one]
    yield cells("comparisons", [f"{one['comparisons']:,}" for one in sizes])
    yield cells("error of a strength", [f"{one['rms_error']:.3f}" for one in sizes])
    items = [one for one in read("bt/results.jsonl") if "item" in one]
    off = [abs(one["fitted"] - one["true"]) / (1.96 * one["error"]) for one in items]
    assert sum(one < 1 for one in off) == 6 and len(off) == 8 and max(off) < 1.1
    yield "The truth is inside six of the eight 95% intervals and just outside of two"


def dueling():
    path = "dueling/results.jsonl"

    def regret(problem, bandit, step):
        one = row(path, problem=problem, bandit=bandit, step=step)
        return f"{one['regret']:.0f} ± {one['regret_se']:.0f}"

    for problem in ("Bradley-Terry", "no Condorcet winner"):
        for bandit in ("uniform", "interleaved filter", "RUCB", "double Thompson"):
            yield cells(bandit, [regret(problem, bandit, step) for step in (300, 3000, 30000)])
    ends = [row(path, problem="Bradley-Terry", bandit=bandit, step=30000)["regret"] for bandit in ("uniform", "RUCB")]
    yield (f"After 30,000 comparisons the regret of double Thompson sampling is {regret('Bradley-Terry', 'double Thompson', 30000)}, "
           f"RUCB's {ends[1]:.0f}, that of random pairs (uniform) {ends[0]:,.0f}")
    slope = {one["bandit"]: one for one in read(path) if "slope" in one}
    yield (f"From T = 3,000 to 30,000 comparisons RUCB's regret grows as {slope['RUCB']['slope']:.1f} log T, that of double Thompson "
           f"sampling as {slope['double Thompson']['slope']:.1f} log T; in the long run no algorithm does better than "
           f"{slope['RUCB']['bound']:.1f} log T")
    lost = [row(path, problem="no Condorcet winner", bandit=bandit, step=30000)["regret"] for bandit in ("RUCB", "uniform")]
    yield f"RUCB pays {lost[0] / lost[1]:.0%} of what random pairs pay"
    for method in ("balanced", "team-draft", "probabilistic", "optimised"):
        one = row(path, method=method)
        yield cells(method, [f"{one[key]:.3f}" for key in ("a_wins", "b_wins", "ties")],
                    [signed(round(credit, 9), ".2f") if abs(credit) > 1e-9 else "0" for credit in one["credit"].values()])
    yield from clicks()


def clicks():
    """The part of the page about users who click."""
    path = "dueling/clicks/results.jsonl"
    sizes = (10, 30, 100, 300, 1000, 3000, 10000)
    interleaved = ("balanced", "team-draft", "probabilistic", "optimised")
    ab = ("A/B, reciprocal rank", "A/B, first result", "A/B, clicks")

    def own(user, method, name):
        found = column(rows(path, user=user, method=method), name)
        assert len(found) == 10
        return found

    def geometric(values):
        return math.exp(statistics.mean(map(math.log, values)))

    def needed(user, method):
        found = own(user, method, "needed")
        assert all(found) or not any(found)
        return f"{geometric(found):.0f}" if all(found) else "never"

    def times(user, method, other="A/B, reciprocal rank"):
        """How many times as many impressions the other method needs."""
        ratios = [b / a for a, b in zip(own(user, method, "needed"), own(user, other, "needed"))]
        mean, error = mean_se([math.log(ratio) for ratio in ratios])
        return f"{math.exp(mean):.1f} (95% interval {math.exp(mean - 1.96 * error):.1f} to {math.exp(mean + 1.96 * error):.1f})"

    def share(user, method, n):
        return pm([100 * value for value in own(user, method, f"right_{n}")], ".1f", "% ± ")

    for method in (*interleaved, *ab):
        yield cells(method, [share("navigational", method, n) for n in sizes])
    for method in (*interleaved, *ab):
        yield cells(method, [needed(user, method) for user in ("navigational", "informational", "leaves anyway", "never leaves")])
    yield f"team-draft needs {needed('navigational', 'team-draft')} impressions"
    yield f"an A/B test on the reciprocal rank {times('navigational', 'team-draft')} times as many"
    yield f"{times('informational', 'team-draft')} times with the informational user"
    yield f"names the worse ranker in {statistics.mean(100 - 100 * x for x in own('navigational', 'A/B, clicks', 'right_10000')):.0f}%"
    yield f"the factor is {times('leaves anyway', 'team-draft')} where users leave anyway"
    yield f"{times('never leaves', 'team-draft')} where they never leave"
    yield f"{times('leaves anyway', 'team-draft', 'A/B, clicks')} times as many"
    yield f"{share('never leaves', 'A/B, clicks', 10000)} of its experiments are right"

    def size(method):
        return pm(own("random", method, "absolute_score"), ".4f")

    yield (f"the mean score of a pair is {size('balanced')} in size for balanced interleaving, and {size('team-draft')} for "
           f"team-draft, {size('probabilistic')} for probabilistic and {size('optimised')} for optimised")

    for bandit in ("uniform", "interleaved filter", "RUCB", "double Thompson"):
        found = [row(path, bandit=bandit, step=step) for step in (100, 1000, 10000)]
        yield cells(bandit, [f"{one['regret']:.1f} ± {one['regret_se']:.1f}" for one in found])
    preference = next(one["preference"] for one in read(path) if "preference" in one)
    assert min(preference[0][1:]) == preference[0][1] > 0.5  # the best ranker is the Condorcet winner
    yield f"it beats the second best with {preference[0][1]:.3f} and the worst with {preference[0][5]:.3f}"


def preference_rl():
    path = "preference-rl/results.jsonl"

    def angle(way, answers):
        return column(rows(path, experiment="asking", way=way, answers=answers), "degrees")

    def returns(way, answers):
        return column(rows(path, experiment="backflips", way=way, answers=answers), "return")

    for way in ("random", "volume", "information"):
        yield cells(way, [pm(angle(way, answers), ".1f") for answers in (5, 10, 20, 40, 60)])
    for way in ("random", "information"):
        yield cells(way, [pm(returns(way, answers), ".1f") for answers in range(0, 121, 20)])
    yield f"with the true reward the same planner gets {pm(returns('true reward', 0), '.1f')}"
    degrees = [mean_se(angle(way, 60))[0] for way in ("information", "random", "volume")]
    yield (f"Asking for information finds a person's weights to {degrees[0]:.0f}° with 60 answers, random questions to "
           f"{degrees[1]:.0f}°, and volume removal to {degrees[2]:.0f}°")
    assert min(returns("information", 20)) > 60  # of 71.7: it stands
    stands = {answers: sum(value > 60 for value in returns("random", answers)) for answers in (60, 120)}
    assert stands == {60: 9, 120: 9}
    yield ("With questions chosen for information 20 answers are enough, for all ten simulated people; with random "
           "questions it works for 9 of the ten after 60 answers, and for one not even after 120")
    sure = [statistics.mean(column(rows(path, experiment="backflips", way=way, answers=120), "near_certain"))
            for way in ("random", "information")]
    yield f"more than 95% certain in {sure[0]:.0%}, of those to questions chosen for information in {sure[1]:.0%}"
    yield from preference_rl_online()
    yield from preference_rl_stored()
    yield from preference_rl_track()


def preference_rl_online():
    new, held = (read(f"preference-rl/{folder}/results.jsonl") for folder in ("pebble", "pebble-hold5"))
    for method in pebble.METHODS:
        returns = [pm(pebble.values(new, "return", method=method, answers=n), ".1f") for n in (12, 36, 60)]
        places = statistics.mean(pebble.values(new, "seen", method=method, answers=0))
        yield cells(method, returns, f"{places:.0%}")

    def effect(found, name):
        one, other = pebble.EFFECTS[name]
        return mean_se(pebble.mean_return(found, one) - pebble.mean_return(found, other))

    def shown(mean, error):
        return f"{signed(mean, '.1f')} ± {error:.1f}"

    for name in pebble.EFFECTS:
        yield cells(name, shown(*effect(new, name)), shown(*effect(held, name)))
    bug, error = effect(new, "relabelling to the index alone")
    yield f"the bug costs {-bug:.1f} ± {error:.1f}"
    yield f"where they see {statistics.mean(pebble.values(held, 'seen', method='neither', answers=0)):.0%} of the places"

    def errors(found, name):
        mean, error = effect(found, name)
        return mean / error

    for name in ("pre-exploration, with relabelling", "pre-exploration, without"):
        assert errors(new, name) > 5 and abs(errors(held, name)) < 2
    for name in ("relabelling, with pre-exploration", "relabelling, without"):
        assert abs(errors(new, name)) < 2.1 and errors(held, name) > 3
    assert errors(new, "relabelling to the index alone") < -2 and abs(errors(held, "relabelling to the index alone")) < 2
    for found in (new, held):
        assert all(abs(errors(found, name)) < 2 for name in ("pseudo-labels", "crops", "both"))
        for method in ("+ pseudo-labels", "SURF"):
            assert statistics.mean(pebble.values(found, "pseudo_right", method=method, answers=60)) > 0.99


def preference_rl_stored():
    path = "preference-rl/dppo/results.jsonl"

    def right(teacher, model):
        return [100 * value for value in column(rows(path, teacher=teacher, model=model), "accuracy")]

    def returns(way, pairs):
        return column(rows(path, experiment="policy", way=way, pairs=pairs), "return")

    def errors(one, other):
        mean, error = mean_se([a - b for a, b in zip(one, other)])
        return mean / error

    for teacher in dppo.TEACHERS:
        yield cells(teacher, [pm(right(teacher, model), ".1f") for model in dppo.MODELS])
        assert all(len(right(teacher, model)) == 20 for model in dppo.MODELS)
    for teacher in ("adds up", "best moment"):
        loss = statistics.mean(right(teacher, "Markov sum")) - statistics.mean(right(teacher, "+ history"))
        assert 0.5 < loss < 2
    for teacher in dppo.TEACHERS:
        change = statistics.mean(right(teacher, "+ weights")) - statistics.mean(right(teacher, "Markov sum"))
        assert abs(change) < 0.5  # "half a point or less"
    for way in dppo.ways_of(read(path)):
        yield cells(way, [pm(returns(way, pairs), ".1f") for pairs in ("segments", "episodes")])
    yield f"(which have {pm(returns('the stored episodes', 'none'), '.1f')} themselves)"
    gain = [a - b for a, b in zip(returns("DPPO, lambda 0.5", "episodes"), returns("cloning of asked winners", "episodes"))]
    assert mean_se(gain)[0] > 2 * mean_se(gain)[1]
    assert errors(returns("DPPO, lambda 0.5", "episodes"), returns("DPPO, lambda 0", "episodes")) > 2
    yield f"DPPO (λ = 0.5) is above cloning of the winners by {pm(gain, '.1f')}"


def preference_rl_track():
    path = "preference-rl/dppo-track/results.jsonl"

    def returns(way, pairs):
        return column(rows(path, experiment="policy", way=way, pairs=pairs), "return")

    for way in dppo.ways_of(read(path)):
        assert len(returns(way, "segments")) == 20
        yield cells(way, [pm(returns(way, pairs), ".1f") for pairs in ("segments", "episodes")])
    yield f"the stored episodes have {pm(returns('the stored episodes', 'none'), '.1f')}"
    for pairs in ("segments", "episodes"):
        direct = returns("DPPO, lambda 0.5", pairs)
        for way in ("reward, plan from the stored steps", "reward, plan with the physics"):
            gain, error = mean_se([a - b for a, b in zip(direct, returns(way, pairs))])
            assert gain > 2 * error
        gain, error = mean_se([a - b for a, b in zip(direct, returns("cloning of asked winners", pairs))])
        assert abs(gain) < 2 * error or abs(gain) < 0.1
    assert statistics.mean(returns("cloning of all", "segments")) > 98


def human_effort():
    own = read("human-effort/scores/results.jsonl")

    def angles(person, kind, answers, drift=0.5):
        return scores.values(own, kind, person=person, answers=answers, drift=drift)

    for person in scores.PEOPLE:
        for kind in scores.ANSWERS:
            yield cells(person, kind, [pm(angles(person, kind, n), ".1f") for n in (20, 80, 320)])
    yield cells("step", [f"{drift:g}" for drift in scores.DRIFTS])
    for kind in scores.ANSWERS:
        yield cells(kind, [pm(angles("drifting", kind, scores.AFTER, drift), ".1f") for drift in scores.DRIFTS])
    squares = [statistics.mean(value**2 for value in angles("calibrated", kind, 320)) for kind in ("comparisons", "scores")]
    worth = scores.values(own, "worth")
    assert len(worth) == 50
    yield f"worth {pm(worth, '.1f')} comparisons in theory, and {squares[0] / squares[1]:.1f} after 320 answers"
    yield f"after {6 * scores.LOOK * (statistics.mean(worth) - 1) / 0.5**2:.0f} answers in theory"
    assert scores.overtakes(own, person="drifting", drift=0.5) == 320

    found = read("human-effort/effort/results.jsonl")
    for way in effort.WAYS:
        last = max(effort.values(found, "answers", way=way))
        parts = []
        for unit in effort.COSTS:
            for share in (0.75, 0.9):
                answers = effort.needed(found, way, share)
                above = "" if answers < math.inf else "> "
                parts.append(f"{above}{min(answers, last) * effort.cost(way, unit):.0f}")
        yield cells(way, parts, pm(effort.values(found, "return", way=way, answers=last), ".1f"))
    yield f"the true reward's policy has {pm(effort.values(found, 'return', way='true reward'), '.1f')}"


def dagger():
    def costs(folder, method, horizon):
        own = column(rows(f"dagger/{folder}/results.jsonl", method=method, horizon=horizon, labels=30720), "cost")
        assert len(own) == 20
        return own

    def slope(folder, method):
        return next(one for one in rows(f"dagger/{folder}/results.jsonl", method=method) if "slope" in one)

    for label, folder, method, digits in (("cloning", "bridge", "cloning", (4, 3, 3, 3, 2, 2)),
                                          ("DAgger", "bridge", "DAgger", (4, 4, 4, 3, 3, 3)),
                                          ("DAgger, `--schedule first`", "bridge-first", "DAgger", (4, 4, 4, 3, 3, 3)),
                                          ("cloning, shallow water", "bridge", "cloning, shallow", (4, 4, 4, 3, 3, 3))):
        fit = slope(folder, method)
        yield cells(label, [pm(costs(folder, method, T), f".{n}f") for T, n in zip((8, 16, 32, 64, 128, 256), digits)],
                    f"{fit['slope']:.2f} ({fit['slope_low']:.2f} to {fit['slope_high']:.2f})")
    steps = [mean_se(costs("bridge", method, 256))[0] for method in ("cloning", "DAgger")]
    yield (f"Cloning's cost grows as T^{slope('bridge', 'cloning')['slope']:.2f}, DAgger's as "
           f"T^{slope('bridge', 'DAgger')['slope']:.2f}. "
           f"At T = 256 that is {steps[0]:.1f} against {steps[1]:.1f} steps in the water")
    yield f"cloning pays T^{slope('bridge', 'cloning, shallow')['slope']:.2f} too"

    def errs(folder, horizon):
        own = rows(f"dagger/{folder}/results.jsonl", method="DAgger", horizon=horizon, labels=30720)
        return statistics.mean(column(own, "epsilon"))

    yield f"({errs('bridge-first', 8):.4f} at T = 8, {errs('bridge-first', 256):.4f} at T = 256)"
    yield f"the error rate is {errs('bridge', 256):.4f} at T = 256"

    def laps(method, labels):
        return [100 * one["laps"] for one in rows("dagger/track/results.jsonl", method=method, labels=labels)]

    for method in ("cloning", "DAgger"):
        yield cells(method, [pm(laps(method, labels), ".0f", "% ± ") for labels in (740, 1480, 2960, 5920)])
    yield (f"With 2,960 labels DAgger's cars finish {pm(laps('DAgger', 2960), '.0f')}% of their laps on the road, cloning's "
           f"{pm(laps('cloning', 2960), '.0f')}%")


def irl():
    counts = (1, 3, 10, 30, 100)
    worlds = {"as shown": "as shown", "the ice has melted": "ice melted", "a tree has fallen": "tree fallen"}
    methods = ("cloning", "projection", "max-ent", "max-ent, a weight a square")

    def worth(method, n=100, expert="optimal", world="as shown", prior=""):
        own = rows(f"irl/{prior}results.jsonl", expert=expert, world=world, demonstrations=n)
        assert len(own) == 20
        return pm([100 * one[method] for one in own], ".1f")

    for world, label in worlds.items():
        for method in methods:
            yield cells(f"{label}: {method}" if method == "cloning" else method, [worth(method, n, world=world) for n in counts])
    for method in methods:
        yield cells(method, [worth(method, n, expert="noisy") for n in counts])

    def itself(world, expert="optimal"):
        value, = {f"{100 * one['the expert itself']:.1f}" for one in rows("irl/results.jsonl", expert=expert, world=world)}
        return value

    thaw, tree = "the ice has melted", "a tree has fallen"
    shown = [one for one in read("irl/results.jsonl") if "reward" in one]
    assert [one.get("optimal", one.get("optimal_for")) for one in shown] == [True, True, True, False, True, False, 0]
    yield (f"With one demonstration max-ent is at {worth('max-ent', 1)} and cloning at {worth('cloning', 1)}, and cloning needs 30 "
           f"for {worth('cloning', 30)}")
    yield (f"An expert that goes on as before is at {itself(thaw)} when the ice has melted, and at {itself(tree)} with a tree across "
           f"the way. Its copy ends at {worth('cloning', world=thaw)} and {worth('cloning', world=tree)}")
    yield (f"max-ent plans anew, and is at {worth('max-ent', world=thaw)} and {worth('max-ent', world=tree)}, projection at "
           f"{worth('projection', world=thaw)} and {worth('projection', world=tree)}")
    lost = [one["max-ent, a weight a square"] < 0.5
            for one in rows("irl/results.jsonl", expert="optimal", world=thaw, demonstrations=100)]
    assert sum(lost) == 7
    square = "max-ent, a weight a square"
    yield (f"With a weight for each square max-ent is as good in the world that was shown ({worth(square)}), and worse than the copy "
           f"when the ice has melted: {worth(square, world=thaw)}")
    yield "In 7 of the 20 seeds"
    yield (f"With a standard deviation of 1 in place of 3 a weight a square is at {worth(square, world=thaw, prior='prior-1/')} when "
           f"the ice has melted, with 10 at {worth(square, world=thaw, prior='prior-10/')}; four weights are at "
           f"{worth('max-ent', world=thaw, prior='prior-1/')} and {worth('max-ent', world=thaw, prior='prior-10/')}")
    yield (f"The expert itself is at {itself('as shown', 'noisy')}. Its copy ends at {worth('cloning', expert='noisy')} and "
           f"projection at {worth('projection', expert='noisy')}, while max-ent's plan is at {worth('max-ent', expert='noisy')}")
    for expert in ("optimal", "noisy"):
        own = [one for one in rows("irl/results.jsonl", expert=expert, demonstrations=100) if "hut" in one]
        yield cells(f"max-ent, {expert} expert", [pm(column(own, kind), ".2f").replace("-", "−")
                                                  for kind in ("hut", "hole", "mud", "ice")])


def tamer():
    script = tamer_script
    found = read("tamer/results.jsonl")
    assert len(found) == 8 * (16 + 3) and all(len(one["lines"]) == 20 for one in found if one["method"] in script.ALONE)
    table = {name: script.summary(of_method) for name, of_method in script.table(found).items()}
    for name, one in table.items():
        yield cells(name, ["{:.1f} ± {:.1f}".format(*one[point]) for point in ("third", "peak")], f"{one['games']:,}",
                    "{:,.0f} ± {:,.0f}".format(*one["long"]))
    for name, published in script.PUBLISHED.items():
        yield cells(f"*Lecture 8: {name}*", list(published), "")
    third = {name: one["third"][0] for name, one in table.items()}
    yield (f"At game 3 TAMER clears {third['TAMER']:.0f} lines, cross-entropy {third['cross-entropy']:.1f} and policy iteration "
           f"{third['policy iteration']:.1f}")
    longest = {name: one["long"] for name, one in table.items()}
    yield (f"cross-entropy ends at {longest['cross-entropy'][0]:,.0f} ± {longest['cross-entropy'][1]:,.0f} lines, "
           f"{longest['cross-entropy'][0] / 65.89:.0f} times the 65.89 of people")
    yield f"TAMER itself ends at {longest['TAMER'][0]:,.0f} ± {longest['TAMER'][1]:,.0f}"

    errors = {name: script.by_errors(found, condition) for name, condition in script.CONTROLS.items()}
    yield cells("", [f"{share:.0%}" for share in script.WRONG])
    for name, of_shares in errors.items():
        yield cells(name, ["{:.1f} ± {:.1f}".format(*one) for one in of_shares])

    step, ridge = ([f"{mean:.0f}" for mean, _ in errors[name]] for name in ("step", "ridge, penalty 10"))
    yield (f"With 10% of the answers wrong the step clears {step[1]} lines in place of {step[0]}, with 30% {step[2]}")
    yield f"Ridge regression with a penalty of 10 falls from {ridge[0]} to {errors['ridge, penalty 10'][1][0]:.1f} with 10%"
    blind = script.select_rows(found, **script.MAIN | {"wrong": 0.5})
    yield f"{sum(lines[2] > 30 for lines in column(blind, 'lines'))} of {len(blind)} learners clear more than 30 lines even at 50%"

    credit = {}
    for name in ("tetrisz130-2-0.06", "tetrisz135-2-76.5", "tetrisz137-2-462.6", "tetrisz157-2-2167.16"):
        ways = rows(f"tamer/replay/replay-{name}.jsonl")
        log, published = name[6:10], name.split("-2-")[1]
        credit[log] = column(ways, "lines")
        assert all(len(lines) == 30 for lines in credit[log])
        yield cells(log, published, [pm(lines, ",.1f") for lines in credit[log]])
    before, ridge = (f"{statistics.mean(credit['z137'][way]):,.0f}" for way in (0, 2))
    yield (f"From the presses of z137 one learns to clear {before} lines if they go to the placement before, and "
           f"{statistics.mean(credit['z137'][1]):.1f} if they go to the piece that is falling")
    yield f"ridge regression with a penalty of 10 makes {ridge} lines of them"
    yield f"Discount and penalty of policy iteration ({script.DISCOUNT} and {script.PENALTY:.0f})"


def course_feedback():
    """The command's first table is a part of the rows: seeds 0 to 3, twelve generations, games of up to 500 pieces."""
    script = tamer_script
    found = [one | {"lines": one["lines"][:12]} for one in read("tamer/results.jsonl") if one["seed"] < 4]
    with redirect_stdout(io.StringIO()) as printed:
        script.print_tables(found, script.Config())
    lines = printed.getvalue().splitlines()
    head = next(i for i, line in enumerate(lines) if "at game 3" in line)
    yield from (line[:22 + 3 * 16] for line in lines[head:head + 6])
    yield from lines[-5:]
    ends = {name: script.summary(rows)["long"][0] for name, rows in script.table(read("tamer/results.jsonl")).items()}
    yield (f"cross-entropy ends at {ends['cross-entropy']:,.0f} lines in games of up to 20,000 pieces: "
           f"{ends['cross-entropy'] / 65.89:.0f} times people's 65.89. But TAMER itself ends at {ends['TAMER']:,.0f}")
    before, falling = (statistics.mean(one["lines"]) for one in read("tamer/replay/replay-tetrisz137-2-462.6.jsonl")[:2])
    yield f"this one step decides: {before:,.0f} lines, or {falling:.1f}"


def ledger_error(folder, method, labels, name, first=0, end=24):
    own = rows(f"distill/{folder}/results.jsonl", method=method, labels=labels)
    assert len(own) == 3
    return pm([100 * statistics.mean(one[name][first:end]) for one in own], ".2f")


def ledger():
    """The part of the page about texts in which mistakes are carried along."""
    error = ledger_error
    for folder, slips in ("ledger", "1 in 100"), ("ledger-slip0", "none"):
        for labels in (250, 1000, 4000):
            for method in ("cloning", "DAgger"):
                own = (folder, method, labels)
                yield cells(f"{slips}, {labels:,}: {method}", [error(*own, "own", 0, 6), error(*own, "own", 18, 24),
                                                              error(*own, "own"), error(*own, "teachers")])
    yield f"cloning's error grows along its own text to {error('ledger', 'cloning', 4000, 'own', 18, 24)}"
    yield f"DAgger's ends at {error('ledger', 'DAgger', 4000, 'own', 18, 24)}"


def rewardbench():
    """The tables are those that the command writes; the sentences, of cells of them."""
    found, policies = read("rewardbench/results.jsonl"), read("rewardbench/policies.jsonl")
    yield from (line for line in rewardbench_script.markdown(found, policies).splitlines() if line)

    def less(kind, column, name="less"):
        points, error = rewardbench_script.cell(found, kind, column, name)
        return f"{points:+.1f} ± {error:.1f}".replace("-", "−")
    yield f"its error: {less('in distribution', 'DPO, beta 0.3')} points at β = 0.3"
    yield f"its own responses, {less('of DPO', 'DPO, beta 0.1')} at β = 0.1"
    yield (f"in distribution {less('in distribution', 'DPO, beta 0.3', 'less_one_pass')} points, on DPO's responses "
           f"{less('of DPO', 'DPO, beta 0.3', 'less_one_pass')}")
    yield (f"worse on hotter samples ({less('temperature 1.5', 'DPO, beta 0.3', 'less_one_pass')}) and better on negations "
           f"({less('negation', 'DPO, beta 0.3', 'less_one_pass')})")
    longer = [less("longer is better", f"DPO, beta {beta}") for beta in ("1", "0.1", "0.03")]
    yield f"where the longer one is better, {longer[0]}, {longer[1]} and {longer[2]} points at β = 1, 0.1 and 0.03"
    negation = [f"{row('rewardbench/results.jsonl', pairs='negation', column=column, seed=seed)['accuracy']:.1%}"
                for column in ("reward model", "DPO, beta 1") for seed in (0, 1)]
    yield (f"the reward model is right about {negation[0]} of them with one and {negation[1]} with the other, DPO at β = 1 about "
           f"{negation[2]} and {negation[3]}")
    best = {one["run"]: one for one in policies if one["seed"] == 0}
    explicit, implicit, gold = (best[name]["best_at_2"] for name in ("reward model", "DPO, beta 0.3", "gold"))
    one_pass = best["reward model, one pass"]["best_at_2"]
    yield f"{implicit:.3f}, for the reward model's {explicit:.3f}, for that of one pass {one_pass:.3f}, for gold's {gold:.3f}"
    ran = best["PPO on DPO's reward, target 2 nats"]
    held = best["PPO, target 2 nats"]
    beside, own, other = best["PPO on DPO's reward, beta 0.5"], best["DPO, beta 0.3"], exercise("python ppo.py --beta 0.5")[0]
    yield (f"gold reward {beside['reward']:.3f} at {beside['kl']:.2f} nats, {beside['share']:.0%} of the optimum, where DPO itself "
           f"has {own['reward']:.3f} at {own['kl']:.2f} and {own['share']:.0%}. PPO on the reward model with this β has "
           f"{other['reward']:.3f} at {other['kl']:.2f} nats, {other['share']:.0%}")
    yield f"ends at {ran['kl']:.1f} nats, on the reward model at {held['kl']:.1f}"


def distill():
    for label, path, method, form in (
            ("8,000 labelled responses: cloning", "distill/results.jsonl", "cloning", ".2f"),
            ("on-policy (DAgger)", "distill/results.jsonl", "on-policy", ".2f"),
            ("400 labelled responses, 400 steps: cloning", "distill/few-responses/results.jsonl", "cloning", ".1f"),
            ("on-policy (DAgger)", "distill/few-responses/results.jsonl", "on-policy", ".1f")):
        own = rows(path, method=method)
        early, late = [[statistics.mean(one["kl_by_position"][a:b]) for one in own] for a, b in ((0, 10), (20, 30))]
        yield (f"| {label} | {pm(column(own, 'kl'), form)} | {pm(early, '.3f')} | {pm(late, '.3f')} | "
               f"{pm(column(own, 'reward'), '.3f')} |")
    yield f"(the teacher's is {read('distill/results.jsonl')[0]['teacher_reward']:.3f})"
    falls = {}
    for method in ("cloning", "on-policy"):
        paths = column(rows("distill/results.jsonl", method=method), "kl_by_position")
        falls[method] = [statistics.mean(path[i] for path in paths) for i in (0, 19)]
    assert len({tuple(f"{value:.{n}f}" for value, n in zip(two, (1, 2))) for two in falls.values()}) == 1  # "for both methods"
    yield (f"from {falls['cloning'][0]:.1f} nats at the first token to {falls['cloning'][1]:.2f} at the twentieth, for both "
           f"methods")


def overoptimization():
    """The table of the command, and what is read from single curves."""
    path = "overoptimization/results.jsonl"
    text = over.table(read(path))
    assert text == (RESULTS / "overoptimization/table.md").read_text(encoding="utf-8")
    yield from text.splitlines()

    def searched(setting, name="reward", place=-1):
        """A field of best of n at one n, or its one value, seed by seed; the members of an ensemble are averaged."""
        own = [one for one in rows(path, method="best of n") if one["setting"].split(", member")[0] == setting]
        values = [[one[name][place] if isinstance(one[name], list) else one[name] for one in own if one["seed"] == seed]
                  for seed in range(3)]
        return [statistics.mean(of_seed) for of_seed in values]

    accuracies = [pm([100 * x for x in searched(f"2x128, {count}", "gold_accuracy")], ".1f") for count in (300, 1000, 3000, "all")]
    yield "right about the gold order in " + ", ".join(accuracies) + "%"
    small = [pm([100 * x for x in searched(f"1x32, {count}", "gold_accuracy")], ".1f") for count in (300, 1000, 3000)]
    yield "the small ones in " + ", ".join(small) + "%"
    yield "best of 256: " + ", ".join(pm(searched(f"2x128, {count}"), ".3f") for count in (300, 1000, 3000, "all"))
    members = searched("2x128, 1000")
    for name in "mean of 4", "minimum of 4":
        gains = [one - other for one, other in zip(searched(name), members)]
        mean, error = mean_se(gains)
        yield f"{name}: {signed(mean, '.3f')} ± {error:.3f}"

    free = rows(path, method="PPO", setting="1000, beta 1e-06")
    proxies = [[value for value in one["proxy"] if value is not None] for one in free]
    assert all(values[-1] == max(values) for values in proxies)
    yield (f"from {free[0]['reward'][0]:.3f} to {pm([max(one['reward']) for one in free], '.3f')} at its best, and ends at "
           f"{pm([one['reward'][-1] for one in free], '.3f')}, {min(one['distance'][-1]**2 for one in free):.0f} to "
           f"{max(one['distance'][-1]**2 for one in free):.0f} nats away, while the proxy rises to "
           f"{pm([values[-1] for values in proxies], '.1f')}")
    half = [np.interp(one["distance"][-2] / 2, one["distance"][:-1], values) / values[-1] for one, values in zip(free, proxies)]
    yield f"{100 * statistics.mean(half):.0f}% of it is there at half the distance"
    for beta in "0.05", "0.2":
        held = rows(path, method="PPO", setting=f"1000, beta {beta}")
        there = [np.interp(one["distance"][-1], other["distance"], other["reward"]) for one, other in zip(held, free, strict=True)]
        yield (f"{pm([one['reward'][-1] for one in held], '.3f')} at {statistics.mean(one['distance'][-1]**2 for one in held):.1f} "
               f"nats (without a penalty {pm(there, '.3f')} there)")
    searched_for = [row(path, method="best of n", setting="2x128, 1000, member 1", seed=seed) for seed in range(3)]
    levels = [one["reward"][one["n"].index(16)] for one in searched_for]
    needed = [np.interp(level, one["reward"][:3], one["distance"][:3])**2 for level, one in zip(levels, free, strict=True)]
    yield f"best of 16 has {pm(levels, '.3f')} at {evaluate.best_of_n_kl(16):.1f} nats, PPO has that at {pm(needed, '.1f')}"
    ends = {beta: rows(path, method="DPO", setting=f"beta {beta}") for beta in ("0.1", "0.03", "0.01")}
    yield "ends at {} at β = 0.1, {} at 0.03 and {} at 0.01".format(
        *(pm([one["reward"][-1] for one in own], ".3f") for own in ends.values()))
    yield "{:.0f}, {:.0f} and {:.0f} nats away".format(
        *(statistics.mean(one["distance"][-1]**2 for one in own) for own in ends.values()))


# ---- machines --------------------------------------------------------------------------------------------------------

def bench():
    def ours(bench, **where):
        return row("bench/ours.jsonl", bench=bench, **where)["ms_median"]

    def theirs(bench, **where):
        return row("bench/peers.jsonl", bench=bench, **where)["ms_med"]

    for label, peer, mine in (
            ("DPO step, 16 pairs | TRL 1.16 DPOTrainer as it comes (reference run at every step)",
             theirs("trl_dpo"), ours("dpo")),
            ("SFT step, 16 rows, loss on the response | TRL 1.16 SFTTrainer", theirs("trl_sft"), ours("sft")),
            ("reward-model step, 16 pairs | TRL 1.16 RewardTrainer", theirs("trl_rm"), ours("reward_model")),
            ("generate, 16 rows x 48 new tokens | transformers 5.23 generate",
             theirs("hf_generate", batch=16), ours("generate", batch=16)),
            ("generate, 64 rows x 48 new tokens | transformers 5.23 generate",
             theirs("hf_generate", batch=64), ours("generate", batch=64)),
            ("PPO update, 64 responses, 4 passes | TRL 1.12 PPOTrainer, the last with one (another sitting)",
             theirs("trl_ppo"), ours("ppo"))):
        yield f"| {label} | {peer:.0f} | {mine:.0f} | {peer / mine:.1f}x |"
    for label, items in (("Bradley-Terry, 100 items, 100,000 comparisons", 100),
                         ("Bradley-Terry, 1,000 items, 1,000,000 comparisons", 1000)):
        mine = row("bench/bt.jsonl", bench="bt", items=items)["ms_median"]
        for name, shown, peer in ((label, "evalica 0.4.2 (Rust)", "evalica.bradley_terry 0.4.2 (Rust)"),
                                  ("the same", "choix 0.4.1", "choix.ilsr_pairwise 0.4.1")):
            other = row("bench/bt.jsonl", bench=peer, items=items)["ms_median"]
            form, ratio = ".1f" if mine < 10 else ".0f", other / mine
            yield f"| {name} | {shown} | {other:.0f} | {mine:{form}} | {ratio:{'.0f' if ratio > 10 else '.1f'}}x |"
    yield (f"1,000 bootstrap resamples of the smaller one take "
           f"{row('bench/bt.jsonl', bench='bt', items=100)['bootstrap_s']:.1f} s")
    ppo = row("bench/ours.jsonl", bench="ppo")
    yield f"ours ({ppo['peak_share']:.0%}) is matrix products at the machine's peak"
    bridge, track = (row("bench/dagger.jsonl", task=task) for task in ("bridge", "track"))
    peer = row("bench/dagger.jsonl", bench="imitation 1.0.1 SimpleDAggerTrainer, CartPole")["steps_per_s"]
    yield (f"{bridge['labels_per_s'] / 1000:.0f},000 labelled steps a second on `bridge` and "
           f"{round(track['labels_per_s'], -2):,} "
           f"on `track` ({bridge['steps_per_s'] / 1e6:.1f} million and {track['steps_per_s'] / 1000:.0f},000 with the steps "
           f"of the validation), where imitation 1.0.1 makes {round(peer, -2):,} on CartPole")
    fp32, bf16 = (row("bench/dtype.jsonl", dtype=dtype)["ms_median"] for dtype in ("float32", "bfloat16"))
    yield f"an SFT step takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16"
    similar, random, long, even = read("bench/padding.jsonl")
    yield (f"{similar['real_share']:.0%} of the computed positions hold a token, "
           f"{similar['real_tokens_per_s'] / 1000:.0f},000 tokens a "
           f"second; on random batches {random['real_share']:.0%} and {random['real_tokens_per_s'] / 1000:.0f},000")
    yield (f"runs at {long['real_tokens_per_s'] / even['real_tokens_per_s']:.0%} of the speed from as many prompts of one "
           f"length")
    peak = {(one["bench"], one["batch"]): f"{one['peak_share']:.0%}" for one in read("bench/ours.jsonl")}
    yield (f"DPO {peak['dpo', 16]}, SFT {peak['sft', 16]}, reward model {peak['reward_model', 16]}, generate "
           f"{peak['generate', 16]} (16 rows) and {peak['generate', 64]} (64 rows), PPO {peak['ppo', 64]}")
    quiet = [one["other_cpu"] for name in ("ours", "peers") for one in read(f"bench/{name}.jsonl")]
    assert max(quiet) < 0.1
    yield "every line has `other_cpu` below 0.1"


def memory():
    found = read("memory/measured.jsonl")
    for name in ("dpo", "ppo", "scoring", "sampling"):
        own = [one for dtype in ("float32", "bfloat16") for layers in (5, 10)
               for one in rows("memory/measured.jsonl", measure=name, dtype=dtype, layers=layers)]
        yield cells(name, [f"{one['computed'] / 1e6:.0f} / {one['measured'] / 1e6:.0f} = {one['ratio']:.3f}" for one in own])
    low, high = min(column(found, "ratio")), max(column(found, "ratio"))
    yield f"between {100 * (1 - low):.1f}% too low and {100 * (high - 1):.1f}% too high"


def processes():
    one, two = (row("processes/results.jsonl", processes=count)["nats_per_token"] for count in (1, 2))
    yield f"{one:.5f} nats a token by one process and {two:.5f} by two"
    by_one, by_two = (json.loads((RESULTS / f"processes/dpo-{name}.json").read_text()) for name in ("one", "two"))
    assert by_one["table"] == by_two["table"]  # "all numbers of the evaluation are equal"
    yield f"({by_two['held_out_loss']:.7f} and {by_one['held_out_loss']:.7f})"
    alone = evaluation("reviews/dpo-beta0.1-seed0")["table"]["DPO beta 0.1"]
    here = by_two["table"]["DPO beta 0.1"]
    yield f"gives {alone['reward']:.3f} at {alone['kl']:.2f} nats"
    yield f"here {here['reward']:.3f} at {here['kl']:.2f}"
    apart = []
    for name in ("sft", "reward_model", "dpo", "generate", "ppo"):
        sittings = [column(rows("processes/scaling.jsonl", bench=name, processes=count), "ms_median") for count in (1, 2)]
        a, b = map(min, sittings)
        apart += [max(two) / min(two) for two in sittings]
        yield f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |"
    yield f"two sittings of one line are up to {max(apart):.1f} times apart"


# ---- README and docs -------------------------------------------------------------------------------------------------

def win_rate_of(task, method, temperature, n=1):
    own = row(f"{task}/winrate/results.jsonl", method=method, temperature=temperature, n=n)
    return f"{own['win_rate']:.0%}"


def readme():
    run = evaluation("reviews/dpo-beta0.1-seed0")["table"]
    end = run["optimum (largest KL known)"]
    with redirect_stdout(io.StringIO()) as printed:
        evaluate.print_table(run, "")
    yield from printed.getvalue().strip().splitlines()[:-1]
    yield f"higher gold reward in {run['DPO beta 0.1']['win_rate_over_sft']:.0%} of comparisons"
    yield f"its KL is known to be at most {run['best of 16']['kl']:.2f}"
    yield f"beyond {end['kl']:.2f} nats"
    yield f"At 1 nat it writes them e = {math.e:.1f} times"
    pairs = json.loads((RESULTS / "reviews/pairs-bt/config.json").read_text())
    yield f"{1 - pairs['labels_agree_with_gold']:.0%} of the answers are wrong"
    yield (f"wins {win_rate_of('posts', 'best of n', 1.0, 16)} with n = 16 and {win_rate_of('posts', 'best of n', 1.0, 128)} "
           f"with n = 128, where DPO wins {win_rate_of('posts', 'DPO', 1.0)} with one")
    methods, why = methods_of("reviews/frontier/results.jsonl"), methods_of("reviews/frontier-why/results.jsonl")
    dpo = methods["DPO"]
    more, clean = (points_above(dpo, why[name].ends[0]) for name in ("DPO, 10x pairs", "DPO, noise-free labels"))
    yield f"ten times the pairs are worth {more:.0f} points of the optimum to DPO, labels without noise {clean:.0f}"
    best = methods_of("reviews/frontier-best/results.jsonl")
    one, two = (lead(best["PPO"], best["DPO"], kl)[0].removeprefix("+") for kl in (1, 2))
    yield f"each at its best, {one} below it at 1 nat and {two} at 2"
    yield f"PPO has {share_at(best['PPO'], 2)} of the optimum at 2 nats, not {share_at(methods['PPO'], 2)}"
    yield f"at T = 1 their summaries win {win_rate_of('posts', 'DPO', 1.0)} and {win_rate_of('posts', 'PPO', 1.0)}"
    greedy = [row("posts/winrate/results.jsonl", method=method, temperature=0.0, n=1) for method in ("DPO", "PPO")]
    same, = {f"{100 * one['win_rate']:.0f} ± {100 * one['win_rate_se']:.0f}" for one in greedy}
    yield f"greedy {same} both"
    yield f"(SFT: {win_rate_of('posts', 'SFT', 1.0)} and {win_rate_of('posts', 'SFT', 0.0)})"
    free = [one["reward"] for one in rows("overoptimization/results.jsonl", method="PPO", setting="1000, beta 1e-06")]
    yield "gold from {:.3f} to {:.3f} to {:.3f}".format(*(statistics.mean(value(way) for way in free)
                                                       for value in (lambda way: way[0], max, lambda way: way[-1])))
    yield (f"DPO writes {of_length('length', '.1f', 'DPO')} tokens, SFT {of_length('length', '.1f', 'SFT', beta=0)}; "
           f"`--length-alpha` is no early stopping: {of_length('shorter', '.1f', 'length alpha', 1)} tokens shorter")
    hidden = [rewardbench_script.cell(read("rewardbench/results.jsonl"), kind, f"DPO, beta {beta}", "less")
              for kind, beta in (("in distribution", 0.3), ("of DPO", 0.1))]
    yield "in distribution {} ± {:.1f} points; on DPO's own responses {} ± {:.1f} (β = 0.1)".format(
        *(text for points, error in hidden for text in (signed(points, ".1f"), error)))
    slopes = [next(one for one in rows("dagger/bridge/results.jsonl", method=method) if "slope" in one)["slope"]
              for method in ("cloning", "DAgger")]
    yield f"T^{slopes[0]:.2f} and T^{slopes[1]:.2f}"
    wrong = [ledger_error("ledger", method, 4000, "own") for method in ("DAgger", "cloning")]
    yield f"where mistakes are carried along: {wrong[0]}% of numbers wrong, {wrong[1]}% with cloning"
    for world, texts in ("the ice has melted", "{max-ent} against {cloning} of the best when the ice has melted"), (
            "the ice has melted", "with a weight a square {max-ent, a weight a square}"):
        own = rows("irl/results.jsonl", expert="optimal", world=world, demonstrations=100)
        yield re.sub("{(.*?)}", lambda name: pm([100 * one[name.group(1)] for one in own], ".1f"), texts)
    yield "{:.1f} ± {:.1f} lines (a simulated trainer), {:.1f} ± {:.1f} without, which overtakes people's {} later".format(
        *(number for name in ("TAMER", "cross-entropy")
          for number in tamer_script.summary(tamer_script.table(read("tamer/results.jsonl"))[name])["third"]),
        tamer_script.PUBLISHED["TAMER"][0])
    needed, of_ab = (math.exp(statistics.mean(math.log(one["needed"]) for one in rows(
        "dueling/clicks/results.jsonl", user="navigational", method=method))) for method in ("team-draft", "A/B, reciprocal rank"))
    yield f"right after {needed:.0f} impressions; an A/B test needs {of_ab / needed:.1f} times as many"
    own = read("human-effort/scores/results.jsonl")
    squeezed = [pm(scores.values(own, kind, person="hard to please", answers=320, drift=0.5), ".1f")
                for kind in ("comparisons", "scores")]
    yield "if the scale is squeezed: {}° against {}°".format(*squeezed)
    squares = [statistics.mean(value**2 for value in scores.values(own, kind, person="calibrated", answers=320, drift=0.5)) for kind in ("comparisons", "scores")]
    yield f"else a score is worth {squares[0] / squares[1]:.1f}"
    speeds = {name: peer / mine for name, peer, mine in speed_of_peers()}
    yield f"{speeds['reward model']:.1f} to {speeds['DPO']:.1f} times"


def speed_of_peers():
    for name, peer, mine in ("reward model", "trl_rm", "reward_model"), ("DPO", "trl_dpo", "dpo"):
        yield (name, row("bench/peers.jsonl", bench=peer)["ms_med"], row("bench/ours.jsonl", bench=mine)["ms_median"])


def exercise(command):
    """The run of an exercise of the course, and `reward at KL`."""
    own = row("course/results.jsonl", command=command)
    return own, f"{own['reward']:.3f} at {own['kl']:.2f}"


def line_of_table(own):
    """Reward, KL and share as the scripts print them."""
    bound = "" if own["share_known"] else "<= "
    return (f"{own['reward']:.3f} +- {own['reward_se']:.3f} {own['kl']:.2f} +- {own['kl_se']:.2f} "
            f"{bound}{own['share']:.0%}")


def course_rlhf():
    model, one_pass = (last(f"reviews/reward-model{name}/log.jsonl") for name in ("", "-epochs1-lr0.0005"))
    for name, value in model.items():
        if "held_out" in name or "confidence" in name:
            yield f"{name.replace('_', ' ')} {value:.4g}"  # as the script prints it
    a_pass = model["step"] // 3
    learned = statistics.mean(column(read("reviews/reward-model/log.jsonl")[2 * a_pass:3 * a_pass], "accuracy"))
    yield f"In the last of three passes it is right about {learned:.0%} of the labels that it trains on"
    yield (f"has {100 * one_pass['held_out_accuracy']:.1f}% of the held-out labels in place of "
           f"{100 * model['held_out_accuracy']:.1f}%")
    (loo, with_baseline), (none, without) = (exercise("python reinforce.py --reward gold" + flag)
                                             for flag in ("", " --baseline none"))
    yield f"{without} nats for {with_baseline}"
    yield f"`grad_norm` is {none['mean_grad_norm']:.2f} on average, with the baseline {loo['mean_grad_norm']:.2f}"
    half, nearer = exercise("python ppo.py --reward gold --beta 0.5")
    yield f"Nearer: {nearer} nats, {half['share']:.0%} of the optimum"
    yield f"The limit in theory is {half['limit_reward']:.3f} at {half['limit_kl']:.2f} nats"
    ppo, _ = exercise("python ppo.py")
    yield f"PPO on model, beta 0.1 {line_of_table(ppo)}"
    yield f"sampling noise ({ppo['first']['scores']:.2f})"
    yield f"exactly 1 on the first, {ppo['first']['ratio']:.4f} in all"
    assert ppo["last"]["scores"] > 2  # "more than two standard deviations up"
    short, _ = exercise("python ppo.py --reward FILE.py:short")
    yield f"falls from {last_sft_length():.0f} tokens to {short['length']:.0f}"
    yield f"the KL is {short['kl']:.1f} nats and the gold reward {short['reward']:.1f}"
    ppo, reinforce = (exercise(f"python {script}.py --reward gold --lr 5e-3")[0] for script in ("ppo", "reinforce"))
    yield (f"(PPO {ppo['reward']:.3f}, {ppo['kl']:.1f} nats, {ppo['length']:.0f} tokens; "
           f"REINFORCE {reinforce['reward']:.3f}, {reinforce['kl']:.1f} nats, {reinforce['length']:.0f} tokens)")
    yield f"a limit in theory is {ppo['limit_reward']:.3f} at {ppo['limit_kl']:.1f} nats"
    for own in (ppo, reinforce):
        assert 0.3 < own["last"]["entropy"] / own["first"]["entropy"] < 0.4  # "falls to a third"
    yield f"`clip_fraction` is {ppo['largest_clip_fraction']:.1f} on the way"
    paid = row("course/results.jsonl", command="ppo.py --reward gold: rewards = +beta ...")
    yield f"Its gold reward is {paid['reward']:.2f}"
    peeking = row("course/results.jsonl", command="ppo.py --reward gold: the value at the token")
    clean, ends = exercise("python ppo.py --reward gold")
    yield (f"at the end it is {peeking['last']['explained_variance']:.2f}, without the bug "
           f"{clean['last']['explained_variance']:.2f}")
    yield f"The run ends at {peeking['reward']:.3f} and {peeking['kl']:.2f} nats, without the bug at {ends.replace(' at ', ' and ')}"


def last_sft_length():
    return evaluation("reviews/dpo-beta0.1-seed0")["table"]["SFT"]["length"]


def course_dpo():
    smooth, ends = exercise("python dpo.py --label-smoothing 0.2")
    plain, further = exercise("python dpo.py --beta 0.1")
    yield f"{ends} nats, where without smoothing it is {further} (one seed)"
    yield f"the limit in theory ({plain['limit_kl']:.2f} nats)"
    yield f"log(0.8/0.2) = {math.log(4):.2f}"
    near, _ = exercise("python dpo.py --beta 1")
    yield f"({near['kl']:.2f} and {near['limit_kl']:.2f} nats)"
    yield f"({plain['kl']:.2f} and {plain['limit_kl']:.2f})"
    summed, _ = exercise("dpo.py: margin = chosen_rewards + rejected_rewards")
    yield f"The run ends at {summed['reward']:.3f} and {summed['kl']:.2f} nats"
    yield f"{summed['held_out_accuracy']:.2f} of the held-out pairs are right"
    assert summed["last"]["chosen_reward"] > 0 < summed["last"]["rejected_reward"]  # "both creep up together"
    mean = row("course/results.jsonl", command="dpo.py: logprobs.mean(1)")
    yield f"The first `loss`: {mean['first']['loss']:.3f} in place of {math.log(2):.3f}"
    yield f"It ends at {mean['reward']:.3f} and {mean['kl']:.2f} nats"


def course_against():
    half, noisy = exercise("python dpo.py --beta 0.5")
    argmax, clean = exercise("python dpo.py --beta 0.5 --labels argmax")
    yield f"{clean} nats ({argmax['share']:.0%} of the optimum) in place of {noisy} ({half['share']:.0%})"
    for name, own in ("dpo", half), ("ppo", exercise("python ppo.py --beta 0.5")[0]):
        yield f"{name}-beta0.5-seed0 {line_of_table(own)}"
    gold, _ = exercise("python ppo.py --reward gold --beta 0.5")
    yield f"is at {gold['limit_kl']:.2f} nats, that of `python dpo.py --beta 0.5` at {half['limit_kl']:.2f}"
    along, _ = exercise("dpo.py: the reference is the policy of the moment")
    assert along["last"]["loss"] == round(math.log(2), 6) and along["last"]["margin"] == 0
    plain = exercise("python dpo.py --beta 0.1")[1]
    yield f"the run ends at {along['reward']:.3f} and {along['kl']:.2f} nats, where it should be {plain}"
    numbers = row("quiz/results.jsonl", question="The DPO implicit reward is as good as the explicit one.")["numbers"]

    def with_error(name):
        return f"{signed(numbers[name]['mean'], '.3f')} ± {numbers[name]['se']:.3f}"
    yield cells([with_error(f"dpo-beta{beta}-seed0, less the reward model") for beta in ("1", "0.3", "0.1", "0.03")])
    for name in "labels that the reward model gets right", "labels that the gold reward gets right":
        yield with_error(name).removeprefix("+")
    one_pass = 100 * last("reviews/reward-model-epochs1-lr0.0005/log.jsonl")["held_out_accuracy"]
    yield f"After one pass the reward model is right about {one_pass:.1f}%, no more than DPO at β = 1"
    assert one_pass <= 100 * numbers["dpo-beta1-seed0, labels that it gets right"]["mean"]
    bench = {kind: rewardbench_script.cell(read("rewardbench/results.jsonl"), kind, "DPO, beta 0.3", "less")
             for kind in ("in distribution", "of DPO", "temperature 1.5", "another word")}
    yield cells([f"{signed(points, '.1f')} ± {error:.1f}" for points, error in bench.values()])
    cohere, stable = (94.7, 65.1, 90.3, 98.2, 74.6), (96.6, 55.5, 82.6, 89.4, 48.4)
    starling = (96.9, 57.2, 88.2, 88.5, 71.4)
    yield f"(94.7 + 65.1 + 90.3 + 98.2 + 0.5 · 74.6) / 4.5 = {rewardbench_script.score(*cohere):.2f}"
    gap = rewardbench_script.score(*starling) - rewardbench_script.score(*stable)
    without = (sum(starling[:4]) - sum(stable[:4])) / 4
    yield f"Starling leads by {gap:.1f} points with them, {without:.1f} without"
    yield f"DPO's responses are {of_length('length', '.1f', 'DPO')} tokens long, SFT's {of_length('length', '.1f', 'SFT', beta=0)}"
    yield (f"at α = λ a run ends at {of_length('length', '.1f', 'length alpha', 1)} tokens, without a bias at "
           f"{of_length('length', '.1f', 'no bias')}")
    yield f"{of_length('slope_pairs', '.3f', 'DPO')} of λ = {read('length/results.jsonl')[0]['lambda']:g}"


def of_length(name, form, method, ratio=0, beta=0.1, unit=1):
    """Mean and error over the seeds of one setting of experiments/length.py."""
    own = [one for one in rows("length/results.jsonl", method=method, beta=beta)
           if one["alpha"] == pytest.approx(ratio * one["lambda"])]
    mean, error = length.mean_error(own, name)
    return f"{unit * mean:{form}} ± {unit * error:{form.strip('+')}}".replace("-", "−")


def length_page():
    found = read("length/results.jsonl")
    yield from length.table(found).splitlines()
    seeds = len({one["seed"] for one in found})
    yield {2: "two seeds", 3: "three seeds"}[seeds]
    yield f"λ is {found[0]['lambda']:g}"
    longer = [100 * one["longer_chosen"] for one in found if one["method"] == "DPO"]
    assert 54 < min(longer) and max(longer) < 60
    yield f"chosen in {min(longer):.1f} to {max(longer):.1f}% of the pairs"
    yield f"plain DPO writes {of_length('length', '.1f', 'DPO')} tokens, SFT {of_length('length', '.1f', 'SFT', beta=0)}"
    yield (f"at α = λ {of_length('length', '.1f', 'length alpha', 1)} tokens and a gold reward of "
           f"{of_length('reward', '.3f', 'length alpha', 1)}, without a bias {of_length('length', '.1f', 'no bias')} and "
           f"{of_length('reward', '.3f', 'no bias')}")
    yield (f"of λ it has learned {of_length('slope_pairs', '.3f', 'DPO')} in log-odds a token at β = 0.1 and "
           f"{of_length('slope_pairs', '.3f', 'larger beta', beta=1.0)} at β = 1")
    yield (f"{of_length('shorter', '.1f', 'length alpha', 0.5)} tokens shorter at α = λ / 2 and "
           f"{of_length('shorter', '.1f', 'length alpha', 1)} at α = λ")
    yield (f"at {of_length('kl', '.2f', 'larger beta', beta=0.2)} nats β = 0.2 has {of_length('reward', '.3f', 'larger beta', beta=0.2)}, "
           f"at {of_length('kl', '.2f', 'length alpha', 1)} nats α = λ has {of_length('reward', '.3f', 'length alpha', 1)}")
    yield f"at 8 λ it costs gold reward: {of_length('reward', '.3f', 'length alpha', 8)}"
    yield (f"{of_length('length', '.1f', 'balanced pairs')} tokens and {of_length('reward', '.3f', 'balanced pairs')}, from "
           f"{statistics.mean(column(rows('length/results.jsonl', method='balanced pairs'), 'pairs')):,.0f} of the 4,800 pairs")
    yield (f"{of_length('r2_pairs', '.0f', 'DPO', unit=100)}% on pairs, {of_length('r2_own', '.0f', 'DPO', unit=100)}% on its own "
           "responses")
    yield (f"{of_length('r2_pairs', '.0f', 'no bias', unit=100)} and {of_length('r2_own', '.0f', 'no bias', unit=100)}% where the "
           "labels have no bias")
    yield (f"at 8 λ it is {of_length('slope_pairs', '+.3f', 'length alpha', 8)} a token on pairs and "
           f"{of_length('slope_own', '+.3f', 'length alpha', 8)} on its own")

    judged = read("length/alpacaeval.jsonl")
    yield f"{sum(column(judged, 'judgements')):,} judgements of {len(judged)} models"

    def near(some, name):
        published = column(some, "published_length_controlled")
        gaps = [100 * abs(a - b) for a, b in zip(column(some, name), published)]
        ranks = [[sorted(values).index(value) for value in values] for values in (column(some, name), published)]
        return statistics.mean(gaps), statistics.correlation(*ranks)
    others = [one for one in judged if one["model"] != "gpt4_gamed"]
    for text, some in ("all 57", judged), ("without `gpt4_gamed`", others):
        yield cells(text, *(f"{near(some, name)[k]:{form}}" for name in ("win_rate", "length_controlled")
                            for k, form in ((0, ".1f"), (1, ".3f"))))
    gamed = row("length/alpacaeval.jsonl", model="gpt4_gamed")
    yield (f"writes {gamed['length_ratio']:.2f} words for one of the reference's, wins {gamed['win_rate']:.1%}, and gets "
           f"{gamed['length_controlled']:.1%} from us where AlpacaEval 2 gives {gamed['published_length_controlled']:.1%}")
    worst = max(abs(one["length_controlled"] - one["published_length_controlled"]) for one in others)
    yield f"All others are within {100 * worst:.1f} points"
    assert all(one["win_rate"] == pytest.approx(one["published_win_rate"], abs=2e-5) for one in judged)


def test_the_table_of_length_is_what_the_command_makes_of_the_rows():
    assert length.table(read("length/results.jsonl")) == (RESULTS / "length/table.md").read_text(encoding="utf-8")


# ---- the index -------------------------------------------------------------------------------------------------------

def findings(page):
    """(row, its numbers, the pages that it links to) of each row of a table that links to a folder of results/."""
    for line in page.read_text(encoding="utf-8").splitlines():
        links = re.findall(r"\]\(([^)#]+)", line) if line.startswith("|") and "[json]" not in line else []
        folders = {(page.parent / link).resolve() for link in links}
        folders = [folder for folder in folders if RESULTS in folder.parents and (folder / "README.md").exists()]
        if folders:
            text = SETTING.sub("", re.sub(r"\]\([^)]*\)", "]", line))
            pages = [one_line((folder / "README.md").read_text(encoding="utf-8")) for folder in folders]
            yield line, NUMBER.findall(text), pages


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_a_finding_stands_on_the_page_that_it_links_to(page):
    """The numbers of an index are copies: each stands on the page that its row links to, which has tests of its own."""
    for line, numbers, pages in findings(ROOT / page):
        for number in numbers:
            assert any(number in text for text in pages), (number, line)


CLAIMS = {
    "README.md": readme,
    "results/reviews/README.md": reviews,
    "results/reviews/frontier-best/README.md": reviews_best,
    "results/reviews/ablation/README.md": reviews_parts,
    "results/imdb/README.md": imdb,
    "results/posts/README.md": posts,
    "results/tldr/README.md": tldr,
    "results/bt/README.md": bt,
    "results/dueling/README.md": dueling,
    "results/preference-rl/README.md": preference_rl,
    "results/human-effort/README.md": human_effort,
    "results/dagger/README.md": dagger,
    "results/irl/README.md": irl,
    "results/tamer/README.md": tamer,
    "results/distill/README.md": lambda: (*distill(), *ledger()),
    "results/overoptimization/README.md": overoptimization,
    "results/length/README.md": length_page,
    "results/rewardbench/README.md": rewardbench,
    "results/bench/README.md": bench,
    "results/memory/README.md": memory,
    "results/processes/README.md": processes,
}
NUMBER = re.compile(r"[\d,.]*\d(?:\.\d+)?(?:%| ± [\d.]+)|\d+\.\d+")  # a decimal, a percentage, or one with an error
SETTING = re.compile(r"(?:β|α|λ|beta|T|lr) (?:= )?[\d.e-]+(?: (?:and|to|or) [\d.]+(?= \())?"  # β = 0.1, lr 1e-4, T = 0.25
                     r"|(?:torch|TRL|transformers|evalica|choix|imitation) [\d.]+|`[^`]*`")
KNOWN = ("section 6.1", "Python 3.11 or newer",
         "4.2M", "4.3M",  # parameters of the policies of imdb and tldr: their config.json
         "(2.7 passes)",
         "more than 95% certain", "95% bootstrap", "95% interval")  # levels, not results


# ---- the tables that a command wrote -----------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", ["frontier", "frontier-why", "frontier-ablation", "frontier-losses", "frontier-best"])
def test_the_frontiers_tables_are_what_the_command_makes_of_the_rows(grid):
    """Of results.jsonl and of the bank's curve."""
    text = frontier.markdown(read(f"reviews/{grid}/results.jsonl"), reviews_scale())
    assert text == (RESULTS / "reviews" / grid / "table.md").read_text(encoding="utf-8")


def test_the_committed_curve_is_of_the_bank_that_the_runs_were_measured_by():
    """It was computed from a bank that was sampled once more: the same to the last digits."""
    table = evaluation("reviews/dpo-beta0.1-seed0")["table"]
    top, end = table["optimum (largest KL known)"], reviews_scale().optimum[-1]
    assert (end["reward"], end["kl"]) == pytest.approx((top["reward"], top["kl"]), abs=1e-9)
    for n in (2, 4, 16):
        one = row("reviews/bank/curve.jsonl", curve="best of n", n=n)
        assert one["reward"] == pytest.approx(table[f"best of {n}"]["reward"], abs=1e-9)


def imdb_scale():
    """The reference alone: neither the bank of imdb nor its curve is committed."""
    return frontier.Scale([{"curve": "reference", "kl": 0.0, "reward": evaluation("imdb/dpo-beta0.1-seed0")["table"]["SFT"]["reward"]},
                           {"curve": "best of n", "n": 1, "kl": 0.0}, *({"curve": "optimum", "kl": kl, "reward": 1.0} for kl in (0, 1))])


def test_the_table_of_imdb_is_what_the_command_makes_of_the_rows():
    """But for what needs the bank's curve: shares, efficiencies, best of n and the optimum."""
    text = frontier.markdown(read("imdb/frontier/results.jsonl"), imdb_scale())
    text = re.sub(r" \((?:≤ )?-?\d+%(?:; \d+%)?\)|^\| (?:best of n|\*\*optimum\*\*) .*\n", "", text, flags=re.M)
    text = text.replace(", its KL, and in brackets the share of the optimum and the KL efficiency", " and KL")
    assert text == (RESULTS / "imdb/frontier/table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["posts", "tldr"])
def test_the_tables_of_win_rates_are_what_the_command_makes_of_the_rows(task):
    found = read(f"{task}/winrate/results.jsonl")
    names = dict.fromkeys((one["texts"] for one in found), 0.0)
    written = winrate.markdown(found, names, "", "").splitlines()
    assert [line for line in written if line.startswith("|")] == list(win_rate_tables(task))


def test_the_table_of_scaling_is_what_the_command_makes_of_the_rows():
    committed = (RESULTS / "posts/scaling/table.md").read_text(encoding="utf-8")
    assert scaling.markdown(read("posts/scaling/results.jsonl")) == committed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_an_evaluation_are_what_it_says(page):
    """Rows `| name | reward ± se | KL ± se | share | length | wins | [json](PATH#row) |`; PATH is relative to the page."""
    pattern = (r"\| (?:≥ )?([\d.]+) ± ([\d.]+) \| (?:≥ )?([\d.]+) ± ([\d.]+) \| ([^|]*) \|(?: ([\d.]+) \| ([^|]*) \|)?"
               r"[^\n]*\[json\]\(([^)#]+)#([^)]+)\)")
    text = page.read_text(encoding="utf-8")
    found = re.findall(pattern, text)
    assert len(found) == len(re.findall(r"\[json\]\(", text)), "a row with [json] has another form"
    for reward, reward_se, kl, kl_se, share, length, wins, path, name in found:
        own = json.loads((page.parent / path).read_text(encoding="utf-8"))
        one = {**own.get("compared", {}), **own.get("table", {})}[name.replace("%20", " ")]
        assert (reward, reward_se) == (f"{one['reward']:.3f}", f"{one['reward_se']:.3f}"), name
        assert (kl, kl_se) == (f"{one['kl']:.2f}", f"{one['kl_se']:.2f}"), name
        if share.strip():
            assert share.strip() == f"{'' if one['share_known'] else '≤ '}{one['share']:.0%}", name
        if length:
            assert length == f"{one['length']:.1f}", name
        if wins.strip():
            assert wins.strip() == f"{one['win_rate_over_sft']:.0%}", name


# ---- all other numbers -------------------------------------------------------------------------------------------------

COURSE = {"docs/course/3-rlhf.md": course_rlhf, "docs/course/4-dpo.md": course_dpo,
          "docs/course/5-dpo-against-ppo.md": course_against, "docs/course/7-feedback.md": course_feedback}  # its other numbers are printed by the commands above them


@pytest.mark.parametrize("page", [*CLAIMS, *COURSE])
def test_a_page_says_what_its_rows_say(page):
    text = one_line((ROOT / page).read_text(encoding="utf-8"))
    for sentence in (CLAIMS | COURSE)[page]():
        assert one_line(sentence) in text, f"{page} should say: {one_line(sentence)}"


@pytest.mark.parametrize("page", CLAIMS)
def test_no_number_of_a_page_is_unguarded(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"^.*\[json\]\(.*$", "", text, flags=re.M)  # they have a test of their own
    parts = re.split(r"\n\n|\n(?=- |\*\*)", text)
    left = [one_line(part) for part in parts if "no rows kept" not in part]
    for sentence in CLAIMS[page]():
        left = [part.replace(one_line(sentence), "") for part in left]
    for part in left:
        part = re.sub(r"\]\([^)]*\)", "]", part)
        for known in KNOWN:
            part = part.replace(known, "")
        part = SETTING.sub("", part)
        assert not NUMBER.findall(part), f"{page}: {NUMBER.findall(part)} in: {part.strip()}"
