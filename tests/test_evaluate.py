"""evaluate.py: the optimal curve and best-of-n against enumeration, shares, win rates, errors, and who owns which number."""
import contextlib
import copy
import dataclasses
import inspect
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data.reviews
import dpo
import evaluate
import sft
from common import pipeline, tasks
from common.files import sha256
from common.rewards import classifier_logits, exact_reward
from conftest import draw_progress, log_of, tiny_gpt
from data.reviews.grammar import gold_reward
from common.tokenizer import Tokenizer, train_bpe
from evaluate import (Bank, PolicySamples, best_of_n_kl, best_of_n_weights, beta_at, effective_sample_size, kl_efficiency,
                      kl_needed, optimal_curve, optimal_kl, optimal_reward, optimal_weights, regret, sample_policy, share_of_optimum, summary, win_rate)
import common.run as run_module
from common.run import load_run
from common.statistics import mean_se
from model import GPTConfig, ScalarModel
from toy import RESPONSES


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# ---- the optimum -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_optimum_of_an_enumerated_distribution(beta):
    """If the bank is every outcome of a uniform pi_ref once, the weights are pi* itself, and the KL is its KL."""
    rewards = uniform(3, 7)
    weights, kl = optimal_weights(rewards, beta), optimal_kl(rewards, beta)
    for r, w, k in zip(rewards.tolist(), weights.tolist(), kl.tolist()):
        z = sum(math.exp(x / beta) / 7 for x in r)
        pi = [math.exp(x / beta) / 7 / z for x in r]
        assert w == pytest.approx(pi, rel=1e-12)
        assert k == pytest.approx(sum(p * math.log(p * 7) for p in pi), abs=1e-12)


def test_optimum_of_a_known_distribution_from_samples():
    """A bank of 400,000 samples of a skewed pi_ref: reward and KL of pi* come out within a thousandth of the exact ones."""
    ref, r, beta = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).double(), torch.tensor([0.1, 0.9, 0.4, 0.6, 1.0]).double(), 0.4
    drawn = torch.multinomial(ref, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    pi = ref * torch.exp(r / beta)
    pi /= pi.sum()
    assert (optimal_weights(r[drawn], beta) * r[drawn]).sum().item() == pytest.approx((pi * r).sum().item(), abs=1e-3)
    assert optimal_kl(r[drawn], beta).item() == pytest.approx((pi * (pi / ref).log()).sum().item(), abs=3e-3)


def test_nothing_beats_the_optimum_at_its_kl():
    """500 random distributions, near and far: none has more reward than the optimum whose KL is the same."""
    rewards, draw = uniform(1, 16), torch.Generator().manual_seed(1)
    curve, compared = optimal_curve(rewards), 0
    for scale in torch.logspace(-2, 1, 500):
        direction = torch.randn(16, generator=draw, dtype=torch.double) + 2 * (rewards[0] - 0.5) / 0.29
        q = torch.softmax(scale * direction, 0)
        kl = (q * (q * 16).log()).sum().item()
        if kl < curve[-1]["kl"]:
            best = optimal_weights(rewards, beta_at(rewards, kl, curve))
            assert (q * rewards[0]).sum() <= (best * rewards).sum() + 1e-9
            compared += 1
    assert compared > 200


def test_the_curve_rises_until_the_bank_ends():
    curve = optimal_curve(uniform(20, 64), points=40)
    for name, sign in (("beta", -1), ("kl", 1), ("reward", 1), ("ess", -1)):
        assert all(sign * a[name] < sign * b[name] for a, b in zip(curve, curve[1:])), name
    assert curve[0]["kl"] < 1e-3 and curve[0]["ess"] == pytest.approx(64, rel=1e-3)
    assert evaluate.MIN_ESS <= curve[-1]["ess"] and curve[-1]["kl"] < math.log(64)


def test_beta_at_inverts_the_kl():
    rewards = uniform(20, 64)
    curve = optimal_curve(rewards)
    for beta in (20.0, 1.0, 0.2, 0.12):
        assert beta_at(rewards, optimal_kl(rewards, beta).mean().item(), curve) == pytest.approx(beta, rel=1e-6)
    assert beta_at(rewards, 99.0, curve) == pytest.approx(curve[-1]["beta"])  # no further than the curve
    assert beta_at(rewards, -0.1, curve) == pytest.approx(curve[0]["beta"])


def test_effective_sample_size():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert effective_sample_size(weights).tolist() == [4, 1, 2]


# ---- best of n -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_best_of_n_by_enumerating_all_subsets(n):
    rewards = uniform(3, 6)
    for row, found in zip(rewards.tolist(), best_of_n_weights(rewards, n).tolist()):
        subsets = list(itertools.combinations(range(6), n))
        winners = [max(subset, key=row.__getitem__) for subset in subsets]
        assert found == pytest.approx([winners.count(i) / len(subsets) for i in range(6)])


def test_best_of_n_of_uniform_rewards():
    """The mean of the largest of n uniform numbers is n / (n + 1)."""
    rewards = uniform(4000, 16)
    for n in (1, 2, 4, 8):
        mean, error = mean_se((best_of_n_weights(rewards, n) * rewards).sum(1))
        assert abs(mean - n / (n + 1)) < 4 * error


def exact_best_of_n_kl(p, n):
    """Outcomes in the order of their rewards: P(best = k) = F(k)^n - F(k-1)^n."""
    cumulative = torch.cat([torch.zeros(1).double(), p.cumsum(0)])
    best = cumulative.pow(n).diff()
    return (best * (best / p).log()).sum().item()


def test_best_of_n_kl_is_a_bound_that_many_outcomes_reach():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(1.3863 - 0.75, abs=1e-4)
    for n in (2, 4, 16):
        for seed in range(20):
            p = uniform(5, seed=seed)
            assert exact_best_of_n_kl(p / p.sum(), n) < best_of_n_kl(n)
        gaps = [best_of_n_kl(n) - exact_best_of_n_kl(torch.full((k,), 1 / k).double(), n) for k in (10, 100, 1000, 10_000)]
        assert 0 < gaps[3] < gaps[2] < gaps[1] < gaps[0] and gaps[3] < 2e-3


# ---- shares, win rates, errors ---------------------------------------------------------------------------------------

def test_share_of_the_optimum():
    """1 for every optimum on the curve, 0 for pi_ref, a half for half the gain."""
    rewards = uniform(20, 64)
    curve, ref = optimal_curve(rewards), uniform(20, 64).mean().item()
    for point in curve:
        assert share_of_optimum(curve, point["reward"], point["kl"], ref) == (pytest.approx(1), True)
        assert share_of_optimum(curve, (point["reward"] + ref) / 2, point["kl"], ref) == (pytest.approx(0.5), True)
        assert share_of_optimum(curve, ref, point["kl"], ref) == (0, True)
    between = optimal_weights(rewards, 0.33)  # not a point of the curve
    assert share_of_optimum(curve, (between * rewards).sum(1).mean().item(), optimal_kl(rewards, 0.33).mean().item(),
                            ref)[0] == pytest.approx(1, abs=0.01)
    assert share_of_optimum(curve, curve[-1]["reward"], curve[-1]["kl"] + 1, ref) == (pytest.approx(1), False)


def test_the_curve_is_interpolated():
    curve = [{"kl": 0.0, "reward": 0.5}, {"kl": 1.0, "reward": 0.7}, {"kl": 3.0, "reward": 0.8}]
    for kl, reward, known in ((-1, 0.5, True), (0, 0.5, True), (0.5, 0.6, True), (1, 0.7, True), (2.5, 0.775, True),
                              (3, 0.8, True), (3.1, 0.8, False)):
        assert optimal_reward(curve, kl) == (pytest.approx(reward), known)


def test_the_kl_that_a_reward_needs():
    """The inverse of the optimal reward at a KL; nothing is known beyond the end, nor below the reference. The optimum's own
    efficiency is 1, and half of it where twice the KL was spent."""
    rewards = uniform(20, 64)
    curve = optimal_curve(rewards)
    for kl in (0.01, 0.3, 1.0, 2.0):
        reward = optimal_reward(curve, kl)[0]
        assert kl_needed(curve, reward) == pytest.approx(kl)
        assert kl_efficiency(curve, reward, kl) == pytest.approx(1) and kl_efficiency(curve, reward, 2 * kl) == pytest.approx(0.5)
    beyond, below = curve[-1]["reward"] + 1e-6, rewards.mean().item()
    assert kl_needed(curve, curve[-1]["reward"]) == pytest.approx(curve[-1]["kl"])
    assert kl_needed(curve, beyond) is kl_needed(curve, below) is kl_efficiency(curve, 0.9, 0.0) is None


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_the_regret_is_beta_times_the_kl_to_the_optimum(beta):
    """J(pi*) - J(pi) = beta KL(pi || pi*), exactly, on the seven responses of toy.py: reference and policy draw each of them
    as often as a list says, so that the bank and the samples are the distributions themselves."""
    r = uniform(3, len(RESPONSES), seed=7)
    times, ours = torch.tensor([5, 1, 2, 9, 1, 4, 2]), torch.tensor([1, 6, 2, 3, 2, 7, 3])  # of 24 each
    ref, pi = (counts.double() / 24 for counts in (times, ours))
    optimum = ref * torch.exp(r / beta)
    optimum /= optimum.sum(1, keepdim=True)
    to_optimum = (pi * (pi / optimum).log()).sum(1)

    def drawn(values, counts):
        return values.expand(3, -1).repeat_interleave(counts, dim=1)
    bank_rewards, lengths = drawn(r, times), torch.ones(3, 24)
    samples = PolicySamples(drawn(r, ours), drawn((pi / ref).log(), ours), lengths, [])
    found = regret(bank_rewards, samples.rewards.mean(1), samples.kl.mean(1), beta)
    assert torch.allclose(found, beta * to_optimum, atol=1e-12)
    assert regret(bank_rewards, (optimum * r).sum(1), optimal_kl(bank_rewards, beta), beta).abs().max() < 1e-12  # pi*'s own
    row = summary(Bank([""] * 3, bank_rewards, lengths, []), {"ours": samples}, beta)["ours"]
    assert (row["regret"], row["beta"]) == (pytest.approx((beta * to_optimum).mean().item()), beta)
    assert row["kl_to_optimum"] == pytest.approx(to_optimum.mean().item())
    assert row["regret_se"] == pytest.approx(mean_se(beta * to_optimum)[1])


def test_win_rate_counts_all_comparisons_and_half_of_the_ties():
    a, b = (torch.randint(4, shape, generator=torch.Generator().manual_seed(2)).float() for shape in ((5, 3), (5, 7)))
    by_hand = [(x > y) + 0.5 * (x == y) for i in range(5) for x in a[i].tolist() for y in b[i].tolist()]
    assert win_rate(a, b) == pytest.approx(sum(by_hand) / (5 * 3 * 7))
    assert win_rate(a, b) + win_rate(b, a) == pytest.approx(1)  # swapping the two sides swaps the result
    assert win_rate(a, a) == 0.5


def test_mean_and_standard_error():
    assert mean_se(torch.tensor([1.0, 2.0, 3.0, 4.0])) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    means, errors = zip(*(mean_se(uniform(100, seed=seed)) for seed in range(400)))
    spread = torch.tensor(means).std().item()  # of the mean of 100 uniform numbers: 1 / sqrt(12) / 10
    assert sum(errors) / 400 == pytest.approx(1 / math.sqrt(1200), rel=0.02) == pytest.approx(spread, rel=0.15)


def test_the_table():
    """Each quantity from the right tensor, errors over prompts, SFT's share 0 and the optima's 1."""
    M, N = 30, 64
    bank = Bank([""] * M, uniform(M, N, seed=3).float(), torch.arange(M)[:, None].expand(M, N), [[""] * N] * M)
    rewards, kl, lengths = (uniform(M, 1, seed=s).float().expand(M, 4) for s in (4, 5, 6))  # the four samples are copies
    table = summary(bank, {"ours": PolicySamples(0.4 + 0.6 * rewards, kl, lengths, [])}, end_beta=0.2)
    assert list(table) == ["SFT", "ours", "best of 2", "best of 4", "best of 16", "optimum at the KL of ours",
                           "limit of this run in theory"]
    ours = table["ours"]
    for name, tensor in (("reward", 0.4 + 0.6 * rewards), ("kl", kl), ("length", lengths)):
        assert ours[name] == pytest.approx(tensor.mean().item(), rel=1e-5)
        assert ours[name + "_se"] == pytest.approx(tensor[:, 0].std().item() / math.sqrt(M), rel=1e-5)  # 30 values, not 120
    assert ours["win_rate_over_sft"] == pytest.approx(win_rate(0.4 + 0.6 * rewards, bank.rewards))
    assert table["SFT"]["reward"] == pytest.approx(bank.rewards.mean().item())
    assert table["SFT"]["kl"] == 0 and table["SFT"]["share"] is None  # nothing to gain where nothing has moved
    assert table["SFT"]["length"] == (M - 1) / 2
    for name in list(table)[5:]:
        assert table[name]["share"] == pytest.approx(1, abs=0.01) and table[name]["share_known"]
    assert table["optimum at the KL of ours"]["kl"] == pytest.approx(ours["kl"], abs=1e-5)
    assert ours["share"] == pytest.approx((ours["reward"] - table["SFT"]["reward"])
                                          / (table["optimum at the KL of ours"]["reward"] - table["SFT"]["reward"]), rel=0.01)
    assert ours["kl_efficiency"] == kl_efficiency(optimal_curve(bank.rewards), ours["reward"], ours["kl"]) > 0
    assert not any("kl_efficiency" in row or "regret" in row for name, row in table.items() if name != "ours")
    assert ours["regret"] == pytest.approx(regret(bank.rewards, 0.4 + 0.6 * rewards[:, 0], kl[:, 0], 0.2).mean().item(), rel=1e-5)
    assert "regret" not in summary(bank, {"ours": PolicySamples(rewards, kl, lengths, [])})["ours"]  # of which beta?


def test_the_printed_table_is_narrow_and_says_how_far_the_limit_is(capsys):
    M, N = 30, 64
    bank = Bank([""] * M, uniform(M, N, seed=3).float(), torch.full((M, N), 40), [[""] * N] * M)
    policy = PolicySamples(0.5 + 0.5 * uniform(M, 4), uniform(M, 4), torch.full((M, 4), 40), [])
    rows = summary(bank, {"DPO beta 0.1": policy}, 0.2)
    evaluate.print_table(rows, "exact")
    *lines, regret_line, gold = capsys.readouterr().out.strip("\n").splitlines()
    assert max(map(len, lines)) <= 112 and gold == "gold reward: exact"
    row = rows["DPO beta 0.1"]
    assert f"{row['kl_efficiency']:.0%}" in lines[2].split() and lines[0].split()[-5:] == ["efficiency", "length", "wins", "vs", "SFT"]
    assert regret_line.startswith(f"DPO beta 0.1 is {row['kl_to_optimum']:.2f} +- {row['regret_se'] / 0.2:.2f} nats from its limit")


# ---- gold rewards, samples -------------------------------------------------------------------------------------------

def test_a_long_text_is_scored_window_by_window():
    """Windows of 7 tokens and <bos> for a block of 8, averaged with their lengths, <bos> counted, as weights."""
    tokenizer = train_bpe([], 259)  # bytes
    torch.manual_seed(0)
    model = ScalarModel(GPTConfig(259, 8, 1, 2, 8)).eval()
    model.gpt.load_state_dict(tiny_gpt(259, 8, 1, 2, 8).state_dict())
    texts = ["short", "seven!!", "a text of more than two windows", "", "exactly 14 byt"]

    def by_hand(text):
        ids = tokenizer.encode(text)
        cut = [ids[i:i + 7] for i in range(0, len(ids), 7)] or [[]]
        scores = [model(torch.tensor([[tokenizer.bos] + window]))[0, -1].item() for window in cut]
        return sum(score * (len(window) + 1) for score, window in zip(scores, cut)) / sum(len(window) + 1 for window in cut)

    assert classifier_logits(model, tokenizer, texts).tolist() == pytest.approx([by_hand(text) for text in texts], abs=1e-5)


def test_the_gold_reward_of_reviews_reads_prompt_and_response(small_reviews):
    gold = exact_reward("reviews")
    found = gold(["The plot was", "The plot wasn't"], [" superb.", " superb."]).tolist()
    assert found == pytest.approx([gold_reward("The plot was superb."), gold_reward("The plot wasn't superb.")])


def test_samples_and_rewards_stay_with_their_prompts(sft_run):
    """The reward here tells which prompt and response it was given; the reference has no distance from itself."""
    ref, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    prompts = ["This film", "I saw", "Set in Lisbon, this western", "My aunt", "After dinner I watched"] * 100
    gold = lambda p, r: torch.tensor([100 * len(a) + len(b) % 100 for a, b in zip(p, r)]).double()  # noqa: E731
    policy = sample_policy(ref, ref, tokenizer, prompts, gold, samples=3)
    for i, prompt in enumerate(prompts):
        assert policy.rewards[i].tolist() == [100 * len(prompt) + len(text) % 100 for text in policy.responses[i]]
    assert policy.kl.shape == policy.lengths.shape == (500, 3) and policy.kl.abs().max() < 1e-3
    texts = [text for texts in policy.responses for text in texts]
    lengths = torch.tensor([len(tokenizer.encode(text)) for text in texts])
    assert torch.corrcoef(torch.stack([lengths, policy.lengths.flatten()]).double())[0, 1] > 0.99  # tokens, row by row
    assert len(set(texts[:300])) > 250  # and not the same response again and again


@pytest.fixture
def start(sft_run, small_reviews, tmp_path):
    """What a run on the small task starts from, with a folder of its own."""
    begun = pipeline.load(sft_run, "reviews", "cpu")
    begun.folder, begun.gold = tmp_path, exact_reward("reviews")
    return begun


def test_a_bank_is_of_one_policy_and_one_gold_reward(start):
    """It is sampled once and read back as it was; another policy or gold reward stops, with what differs."""
    first, again = pipeline.sample_bank(start), pipeline.sample_bank(start)
    assert first.responses == again.responses and torch.equal(first.rewards, again.rewards) and first.rewards.shape == (8, 16)
    for prompt, responses, rewards in zip(first.prompts, first.responses, first.rewards.tolist()):
        assert rewards == pytest.approx([gold_reward(prompt + response) for response in responses], abs=1e-6)
    for name, change in (("policy", dict(policy_id="other")), ("gold", dict(gold=dataclasses.replace(start.gold, id="other")))):
        with pytest.raises(SystemExit, match=f"{name} was '.*', now 'other': delete"):
            pipeline.sample_bank(dataclasses.replace(start, **change))
    assert pipeline.sample_bank(start, samples=4).rewards.shape == (8, 4)  # beside the other


@pytest.mark.parametrize("damage, said", [
    (lambda row: row["rewards"].pop(), "line 3: expected 16 responses"),
    (lambda row: row["rewards"].__setitem__(5, float("nan")), "line 3: a reward or length is no finite number"),
    (lambda row: row["rewards"].__setitem__(5, "much"), "line 3: a reward or length is no finite number"),
    (None, "has 3 of 8 prompts")])
def test_a_damaged_bank_stops_by_name(damage, said, start, tmp_path):
    pipeline.sample_bank(start)
    path = tmp_path / "bank/bank.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if damage:
        damage(rows[2])
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows if damage else rows[:3])))
    with pytest.raises(SystemExit, match=said):
        pipeline.sample_bank(start)
    (tmp_path / "bank/config.json").unlink()
    with pytest.raises(SystemExit, match="without a config.json"):
        pipeline.sample_bank(start)


def test_the_id_of_a_gold_reward_is_of_its_code_and_of_what_it_says(small_reviews, monkeypatch):
    """Another text of the same function, or another table that it reads: another reward. A comment changes nothing."""
    def with_reward(function):
        monkeypatch.setattr(data.reviews, "TASK", dataclasses.replace(data.reviews.TASK, gold_reward=function))
        return exact_reward("reviews").id
    liked = {"superb"}

    def plain(text):
        return float(any(word in text for word in liked))
    before = with_reward(plain)
    assert before == with_reward(plain)

    def documented(text):
        """The same, with something to read."""
        return float(any(word in text for word in liked))  # and a comment
    documented.__name__ = "plain"
    source = inspect.getsource(documented).replace("documented", "plain")
    monkeypatch.setattr(inspect, "getsource", lambda function: source)
    assert with_reward(documented) == before
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "prepared", lambda dataset: small_reviews)
    liked.add("film")
    assert with_reward(plain) != before
    liked.remove("film")

    def negated(text):
        return 1.0 - float(any(word in text for word in liked)) if "zyx" in text else float(any(w in text for w in liked))
    assert with_reward(negated) != before  # though it says the same of every text of the task


# ---- along training --------------------------------------------------------------------------------------------------

def test_a_measurement_is_the_tables_row_of_the_same_samples(start, tmp_path, monkeypatch):
    """Reward, KL and length with their errors, as `summary` has them; measuring twice gives the same, and the reference
    itself has a KL of 0 within rounding."""
    policy, draw, sampled = copy.deepcopy(start.ref), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    sample = evaluate.sample_policy
    start.bank = pipeline.sample_bank(start)
    monkeypatch.setattr(evaluate, "sample_policy", lambda *a, **k: sampled.append(sample(*a, **k)) or sampled[-1])
    run = SimpleNamespace(rows=[], paused=contextlib.nullcontext)
    run.log = lambda **row: run.rows.append(row)
    for model in (policy, policy, start.ref):
        evaluate.log_evaluation(run, 7, model, start)
    found, again, of_ref = run.rows
    row = summary(start.bank, {"ours": sampled[0]})["ours"]
    names = ("reward", "reward_se", "kl", "kl_se", "length", "length_se")
    assert found == again == {"step": 7} | {f"eval_{name}": row[name] for name in names}
    assert abs(of_ref["eval_kl"]) < 1e-5 < 0.1 < found["eval_kl"]


def test_the_committed_curve_has_the_betas_of_the_curve():
    """Where the curve ends depends on its betas, and so does what the README says of the largest KL."""
    path = Path(__file__).resolve().parents[1] / "results" / "reviews" / "bank" / "curve.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    committed = [row["beta"] for row in rows if row["curve"] == "optimum"]
    rewards = torch.rand(20, 4096, generator=torch.Generator().manual_seed(0))
    betas = [point["beta"] for point in evaluate.optimal_curve(rewards)]
    assert len(committed) > 40 and betas[:len(committed)] == pytest.approx(committed, rel=1e-9)


@pytest.mark.parametrize("scored", [True, False])
def test_the_figure_on_the_way_has_the_evaluations_so_far(scored, tmp_path):
    """Reward against KL under the optimum, or the KL over the steps where there is no reward; figure.png is a whole file."""
    rows = [{"step": step, "loss": 1.0} for step in range(3)]
    rows[1:1] = [{"step": 1, "eval_kl": 0.5, "eval_reward": 0.6, "eval_length": 9.0}]
    rows += [{"step": 3, "eval_kl": 1.5, "eval_reward": 0.7, "eval_length": 9.0}]
    bank = evaluate.Bank(["a"], torch.rand(1, 32) if scored else None, torch.ones(1, 32), [[]])
    lines, figure = [], evaluate.figure

    @contextlib.contextmanager
    def kept(path):
        with figure(path) as (drawn, axis):
            yield drawn, axis
            lines.extend(axis.get_lines())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "figure", kept)
        draw_progress(SimpleNamespace(folder=tmp_path, rows=rows), bank)
    x, y = lines[0].get_data()
    assert (list(x), list(y)) == (([0.5, 1.5], [0.6, 0.7]) if scored else ([1, 3], [0.5, 1.5]))
    assert len(lines) == (2 if scored else 1) and (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


STEPS = 6  # of the runs below


@pytest.fixture(params=["dpo", "sft"])
def short_run(request, sft_run, pairs_file, small_reviews, tmp_path, monkeypatch):
    """run(name, **settings) trains 6 steps, far from the policy it starts from, and returns the run folder."""
    sample = evaluate.sample_policy
    monkeypatch.setattr(evaluate, "sample_policy", lambda *args, **_: sample(*args))  # 4 responses a prompt are enough here
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    settings = dict(pairs=str(pairs_file), batch_size=12, warmup=1, lr=1e-2)
    settings |= (dict(sft=str(sft_run)) if request.param == "dpo" else
                 dict(on="chosen", init=str(sft_run), block_size=112, steps=STEPS))

    def run(name, **more):
        module = {"dpo": dpo, "sft": sft}[request.param]
        return module.train(module.Config(**settings, **more, out=str(tmp_path / name)))
    return run


def evaluations(folder):
    return {row["step"]: row for row in log_of(folder) if "eval_reward" in row}


def test_evaluating_on_the_way_changes_no_weight(short_run):
    """At steps 0, 2, 4 and at the end, in the log; all other rows and the weights are bit by bit those of a run that is not
    evaluated. The first KL, to the policy that the run starts from, is 0 within rounding, the last is not."""
    without, with_it = short_run("without"), short_run("with", evaluate_every=2)
    found = evaluations(with_it)
    assert list(found) == [0, 2, 4, STEPS] and not evaluations(without)
    assert abs(found[0]["eval_kl"]) < 1e-5 < 0.2 < found[STEPS]["eval_kl"]
    evaluation = json.loads((with_it / "evaluation.json").read_text()) if (with_it / "evaluation.json").exists() else None
    if evaluation:  # of Preferred-FT there is none
        for name, means in evaluation["per_prompt"].items():
            assert sum(means) / len(means) == pytest.approx(evaluation["table"][evaluation["name"]][name], abs=1e-5)
        assert list(evaluation["per_prompt"]) == ["reward", "kl"] and len(means) == 8
    rest = lambda folder: [{k: v for k, v in row.items() if k != "seconds"}  # noqa: E731
                           for row in log_of(folder) if "eval_reward" not in row]
    assert rest(with_it) == rest(without) and sha256(with_it / "model.pt") == sha256(without / "model.pt")


def test_evaluating_takes_none_of_the_seconds_of_training(short_run, monkeypatch):
    """On a clock on which an evaluation takes 100 s and a step 1 s, training takes 6 s. And a number of steps that does not
    divide the run does not keep it from being evaluated at its end."""
    now, sample, finite = 1000.0, evaluate.sample_policy, run_module.Run.check_finite

    def passes(seconds, function):
        def slow(*args, **keywords):
            nonlocal now
            now += seconds
            return function(*args, **keywords)
        return slow
    monkeypatch.setattr(evaluate, "sample_policy", passes(100.0, sample))
    monkeypatch.setattr(run_module.Run, "check_finite", passes(1.0, finite))
    monkeypatch.setattr(time, "time", lambda: now)
    folder = short_run("run", evaluate_every=4)
    assert list(evaluations(folder)) == [0, 4, STEPS]
    assert log_of(folder)[-1]["seconds"] == STEPS and now >= 1000 + 3 * 100 + STEPS


def test_the_reference_stays_the_policy_that_was_started_from_also_after_a_resume(short_run, monkeypatch):
    """Stopped at step 4, where it was evaluated, and resumed from the checkpoint: every evaluation is there once, with the
    numbers of a run that was left alone. The policy of step 4 as reference would have a KL of 0 there."""
    class Stopped(Exception):
        pass

    def save_until_4(path, state):
        save(path, state)
        if state["step"] == 4:
            raise Stopped
    alone, save = short_run("alone", evaluate_every=2), run_module.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", save_until_4)
        with pytest.raises(Stopped):
            short_run("resumed", evaluate_every=2, checkpoint_every=0.0)
    resumed = short_run("resumed", evaluate_every=2, resume=True)
    assert evaluations(resumed) == evaluations(alone) and evaluations(resumed)[4]["eval_kl"] > 0.1
    assert [row["step"] for row in log_of(resumed)] == [row["step"] for row in log_of(alone)]
    assert sha256(resumed / "model.pt") == sha256(alone / "model.pt")
