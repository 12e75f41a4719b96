"""experiments/rewardbench.py: pairs against their definition, scores against batches and paddings, errors against a closed form,
RewardBench's own table, LLMBar's form."""
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.reviews
import dpo
import reward_model
from common import pipeline, rewards, tasks
from common.pairs import read_pairs
from common.run import load_run
from common.settings import parse
from common.tokenizer import Tokenizer
from common.training import generator, pad
from conftest import smaller, tiny_gpt
from data.reviews.grammar import gold_reward, sample_review
from data.reviews.probes import GAP, Text, anything, draw_pairs, longer, negations, relabelled, shorter, swaps
from experiments import rewardbench
from experiments.rewardbench import EXPLICIT, ONE_PASS, Config, bootstrap, fitted, measure, read_judged, score
from experiments.sweep import PlannedRun
from model import GPTConfig, ScalarModel, summed_logprobs

# the lecture's table of RewardBench: score, chat, chat hard, safety, reasoning, prior sets
TABLE = {"Cohere": (85.69, 94.7, 65.1, 90.3, 98.2, 74.6), "FsfairX": (83.62, 99.4, 65.1, 87.8, 86.4, 74.9),
         "Eurus-RM-7b": (81.55, 98, 65.6, 81.2, 86.3, 71.7), "Starling-RM-34B": (81.44, 96.9, 57.2, 88.2, 88.5, 71.4),
         "stablelm-2-12b-chat": (77.42, 96.6, 55.5, 82.6, 89.4, 48.4), "Mixtral-8x7B": (74.74, 95, 64, 73.4, 78.7, 50.3),
         "SOLAR": (73.99, 81.6, 68.6, 85.5, 72.5, 49.5), "zephyr-7b-beta": (71.77, 95.3, 62.7, 61, 77.9, 52.2),
         "Qwen1.5-14B-Chat": (69.76, 57.3, 70.2, 76.3, 89.6, 41.2), "Qwen1.5-7B-Chat": (68.75, 53.6, 69.1, 74.8, 90.4, 42.9)}


@pytest.mark.parametrize("model", TABLE)
def test_the_score_is_that_of_the_lectures_table(model):
    """Within the rounding of its columns, 0.05 each."""
    published, *sections = TABLE[model]
    assert score(*sections) == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("model, value", [("Cohere", 85.69), ("FsfairX", 83.59), ("Eurus-RM-7b", 81.54),
                                          ("Qwen1.5-14B-Chat", 69.78), ("Qwen1.5-7B-Chat", 68.74)])
def test_five_rows_by_hand(model, value):
    assert round(score(*TABLE[model][1:]), 2) == value


# ---- the pairs -------------------------------------------------------------------------------------------------------

def texts_of(seed, count=6):
    """Responses with random lengths and gold rewards."""
    draw = random.Random(seed)
    return [Text(f"{seed} {i}", [5] * draw.randint(5, 20), draw.random()) for i in range(count)]


@pytest.mark.parametrize("accept", [anything, shorter, longer])
def test_a_pair_is_better_by_the_gap_and_as_long_as_it_should_be(accept):
    written = {f"prompt {i}": texts_of(i) for i in range(20)}
    by_text = {(prompt, text.text): text for prompt, texts in written.items() for text in texts}
    possible = {prompt: sum(a.reward - b.reward >= GAP and accept(a, b) for a in texts for b in texts)
                for prompt, texts in written.items()}
    everything = draw_pairs(written, 10**6, generator(0), accept)
    assert len(everything) == sum(possible.values()) == len({(row["chosen"], row["rejected"]) for row in everything})
    for row in everything:
        chosen, rejected = by_text[row["prompt"], row["chosen"]], by_text[row["prompt"], row["rejected"]]
        assert chosen.reward - rejected.reward == row["gap"] >= GAP
        sizes = len(row["chosen_ids"]), len(row["rejected_ids"])
        assert sizes == (len(chosen.ids), len(rejected.ids))
        assert accept is anything or (sizes[0] < sizes[1]) == (accept is shorter)
        assert accept is anything or min(sizes) <= 0.8 * max(sizes)

    # every prompt gives one before any gives two
    few = draw_pairs(written, sum(n > 0 for n in possible.values()), generator(0), accept)
    assert [row["prompt"] for row in few] == [prompt for prompt, n in possible.items() if n]


def test_an_edit_changes_one_word_and_can_be_undone():
    draw, seen = random.Random(0), set()
    for _ in range(300):
        text = sample_review(draw)[0]
        for other in negations(text):
            assert text in negations(other) or " never " in text or " hardly " in text or "far from" in text or " not " in text
            seen.add(len(other.split()) - len(text.split()))
        for other in swaps(text):
            changed = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
            assert len(changed) == 1 and text in swaps(other)
    assert seen == {-2, -1, 0, 1}  # "far from", "not", "wasn't", "would not"
    assert negations("The plot was dull.") == ["The plot wasn't dull."]
    assert negations("The jokes weren't funny.") == ["The jokes were funny."]
    assert negations("I would not recommend it to anyone.") == ["I would recommend it to anyone."]
    assert "The plot was dull." in swaps("The plot was funny.") and swaps("I saw it.") == []


def test_edits_turn_the_gold_reward():
    """From one side of a half to the other, where the text has one opinion."""
    for text in ("The plot was dull.", "The cast was superb.", "I would recommend this film to anyone."):
        for other in (*negations(text), *swaps(text)):
            assert (gold_reward(text) - 0.5) * (gold_reward(other) - 0.5) < 0, other


def test_another_labeller_turns_pairs_as_often_as_bradley_terry_says():
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}", "chosen_ids": [1], "rejected_ids": [2], "gap": 0.4}
            for i in range(20_000)]
    labelled = relabelled(rows, 2.0, generator(0))
    turned = [row["gap"] < 0 for row in labelled]
    assert np.mean(turned) == pytest.approx(1 / (1 + np.exp(0.8)), abs=0.01)
    for i, (row, was_turned) in enumerate(zip(labelled, turned)):
        first, second = (f"b{i}", f"a{i}") if was_turned else (f"a{i}", f"b{i}")
        assert (row["chosen"], row["rejected"]) == (first, second)
        assert row["chosen_ids"] == ([2] if was_turned else [1])


# ---- who is right ----------------------------------------------------------------------------------------------------

def test_the_bootstrap_has_the_error_of_a_mean_over_prompts():
    """One pair a prompt: sqrt(p (1 - p) / n). Ten equal pairs a prompt are no more news than one."""
    right = (np.arange(400) % 4 != 0).astype(float)
    mean, error = bootstrap(right, [f"{i}" for i in range(400)])
    assert mean == 0.75 and error == pytest.approx((0.75 * 0.25 / 400)**0.5, rel=0.1)
    assert bootstrap(right.repeat(10), [f"{i}" for i in range(400) for _ in range(10)])[1] == pytest.approx(error, rel=0.1)
    assert bootstrap(right - right, [f"{i}" for i in range(400)]) == (0, 0)


def test_ties_count_half_and_differences_are_pair_by_pair():
    pairs = {"one": [{"prompt": "p"}, {"prompt": "q"}], "two": [{"prompt": "r"}]}
    thinks = {"reward model": torch.tensor([[1.0, 0, 5], [0, 1, 5]]),  # right, wrong, a tie
              "reward model, one pass": torch.tensor([[1.0, 1, 1], [0, 0, 0]]),
              "the longer one": torch.tensor([[3.0, 3, 2], [3, 2, 9]])}
    rows = measure(pairs, thinks, seed=7)
    found = {(row["pairs"], row["column"]): (row["accuracy"], row["less"], row["less_one_pass"]) for row in rows}
    assert found == {("one", "reward model"): (0.5, 0, -0.5), ("two", "reward model"): (0.5, 0, -0.5),
                     ("one", "reward model, one pass"): (1, 0.5, 0), ("two", "reward model, one pass"): (1, 0.5, 0),
                     ("one", "the longer one"): (0.75, 0.25, -0.25), ("two", "the longer one"): (0, -0.5, -1)}
    assert {(row["seed"], row["pairs"], row["count"], row["prompts"]) for row in rows} == {(7, "one", 2, 2), (7, "two", 1, 1)}


def ragged(count=37):
    """Prompts and responses of all lengths up to 12 tokens together."""
    draw = torch.Generator().manual_seed(0)
    prompt_lengths = torch.randint(1, 6, (count,), generator=draw)
    lengths = prompt_lengths + torch.randint(1, 7, (count,), generator=draw)
    rows = [torch.randint(1, 11, (int(n),), generator=draw) for n in lengths]
    return pad(rows, 0)[0], prompt_lengths, lengths


@pytest.mark.parametrize("of", ["explicit", "implicit"])
def test_a_score_does_not_depend_on_the_rows_beside_it(of):
    """One row at a time, 32 at a time or all; with little padding, much, or with noise in place of pads."""
    tokens, prompt_lengths, lengths = ragged()
    policy, ref = tiny_gpt(11, 12, seed=0), tiny_gpt(11, 12, seed=1)
    torch.manual_seed(0)
    scalar = ScalarModel(GPTConfig(11, 12, 2, 2, 8)).eval()
    scalar.gpt = tiny_gpt(11, 12, seed=2)

    def scored(rows, inputs):
        one, starts, ends = (x[rows] for x in inputs)
        if of == "explicit":
            return rewards.all_scores(scalar, one, ends)
        return summed_logprobs(policy, one, starts, ends) - summed_logprobs(ref, one, starts, ends)

    everything = torch.arange(len(tokens))
    alone = torch.cat([scored(row, (tokens, prompt_lengths, lengths)) for row in everything.split(1)])
    noise = torch.randint(11, tokens.shape, generator=torch.Generator().manual_seed(1))
    padded = torch.arange(tokens.shape[1]) >= lengths[:, None]
    for inputs in ((tokens, prompt_lengths, lengths), (torch.where(padded, noise, tokens), prompt_lengths, lengths),
                   (torch.cat([tokens, torch.zeros(len(tokens), 30, dtype=torch.long)], 1), prompt_lengths, lengths)):
        for size in (1, 32, len(tokens)):
            together = torch.cat([scored(rows, inputs) for rows in everything.split(size)])
            torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert alone.std() > 0.1


# ---- a run as a reward -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(sft_run, pairs_file, small_reviews_folder, tmp_path_factory):
    """Run folders of a DPO policy and of a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    shared = dict(sft=str(sft_run), pairs=str(pairs_file), lr=1e-2, warmup=1, epochs=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "prepared", lambda dataset: small_reviews_folder)
        patch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK))
        return (dpo.train(dpo.Config(**shared, beta=0.5, out=str(folder / "dpo"))),
                reward_model.train(reward_model.Config(**shared, out=str(folder / "reward-model"))))


@pytest.fixture
def dpo_run(trained):
    return trained[0]


def started(sft_run):
    return pipeline.load(sft_run, "reviews", "cpu")


def test_dpos_reward_is_beta_log_pi_over_pi_ref(dpo_run, sft_run, small_reviews, pairs_file):
    """Of texts, and of the same texts as ids: 0.5 log pi/pi_ref, row by row."""
    start = started(sft_run)
    reward = pipeline.reward_of_run(dpo_run, start)
    rows = read_pairs(pairs_file)[:5]
    prompts, responses = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    policy, encode = load_run(dpo_run)[0], start.tokenizer.encode
    values = []
    for prompt, response in zip(prompts, responses):
        ids = [start.tokenizer.bos] + encode(prompt)
        row = torch.tensor([ids + encode(response) + [start.tokenizer.eos]])
        sizes = torch.tensor([len(ids)]), torch.tensor([row.shape[1]])
        values.append(0.5 * (summed_logprobs(policy, row, *sizes) - summed_logprobs(start.ref, row, *sizes)))
    expected = torch.cat(values)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(reward(prompts, responses), expected, rtol=1e-4, atol=1e-4)
    samples = rewards.encoded(start.tokenizer, prompts, responses, policy.config.block_size)
    torch.testing.assert_close(reward([], [], samples), expected, rtol=1e-4, atol=1e-4)
    assert reward.model is None and "implicit" in reward.name


def test_another_reference_is_another_reward(dpo_run, sft_run, small_reviews):
    start = started(sft_run)
    start.policy_id = "another"
    with pytest.raises(SystemExit, match="another SFT policy"):
        pipeline.reward_of_run(dpo_run, start)
    with pytest.raises(SystemExit, match="holds a GPT, expected a ScalarModel"):  # SFT has no reward: it is the reference
        pipeline.reward_of_run(sft_run, start)


def test_every_column_is_asked_about_every_kind_of_pair(trained, sft_run, small_reviews, tmp_path, monkeypatch):
    """The gold reward is always right, but about another's labels; the columns are the rewards of runs, text by text; a reward
    is no better than itself."""
    start = started(sft_run)
    start.gold = pipeline.gold_reward(start)
    start.bank = pipeline.sample_bank(start)
    policy, model = (SimpleNamespace(out=str(folder)) for folder in trained)
    monkeypatch.setattr(rewardbench, "explicit_models", lambda seed: {EXPLICIT: model, ONE_PASS: model})
    monkeypatch.setattr(rewardbench, "DRAWN", 16)
    done = [PlannedRun(name, "", 0, policy) for name in ("DPO, beta 0.3", "DPO, beta 0.1")]
    asked, ask = {}, rewardbench.opinions

    def kept(*given):
        asked["rows"], asked["thinks"] = given[1], ask(*given)
        return asked["thinks"]
    monkeypatch.setattr(rewardbench, "opinions", kept)
    text = rewardbench.report(Config(pairs=9, out=str(tmp_path)), start, done)

    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    kinds = {row["pairs"] for row in rows}
    assert {"in distribution", "easy", "negation", "another word", "of DPO", "other prompts", "another labeller"} <= kinds
    for row in rows:
        assert row["count"] <= 9 and 0 <= row["accuracy"] <= 1
        assert row["column"] != "gold" or row["accuracy"] == 1 or row["pairs"] == "another labeller"
        assert row["column"] not in (EXPLICIT, ONE_PASS) or row["less"] == row["less_one_pass"] == 0
    assert f"{100 * rows[0]['accuracy']:.1f}" in text and (tmp_path / "figure.png").stat().st_size > 0

    reward = pipeline.reward_of_run(trained[0], start)  # 0.5 log pi/pi_ref
    for i, row in enumerate(asked["rows"]):
        gold = [gold_reward(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        assert gold[0] - gold[1] == pytest.approx(row["gap"], abs=1e-6)
        if "chosen_ids" not in row:  # as the tokenizer has it
            own = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
            torch.testing.assert_close(0.5 * asked["thinks"]["DPO, beta 0.3"][:, i], own, rtol=1e-4, atol=1e-4)
    best = [json.loads(line) for line in (tmp_path / "policies.jsonl").read_text().splitlines()]
    assert [row["run"] for row in best] == [EXPLICIT, ONE_PASS, "DPO, beta 0.3", "DPO, beta 0.1", "gold"]
    assert all(best[-1]["best_at_1"] >= row["best_at_1"] for row in best if "best_at_1" in row)


# ---- LLMBar's form ---------------------------------------------------------------------------------------------------

JUDGED = [{"input": "Name a colour.", "output_1": "Blue.", "output_2": "Seven and a half.", "label": 1},
          {"input": "Is ice cold? " * 100, "output_1": "Never.", "output_2": "It is. " * 100, "label": 2}]


def test_pairs_in_llmbars_form(tmp_path):
    (tmp_path / "made-up.json").write_text(json.dumps(JUDGED))
    rows = read_judged(tmp_path / "made-up.json")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("Blue.", "Seven and a half."),
                                                                  (JUDGED[1]["output_2"], "Never.")]


@pytest.mark.parametrize("change, says", [
    ({"label": 3}, "pair 2: field 'label' is 3, expected 1 or 2"), ({"output_1": None}, "pair 2: field 'output_1'"),
    ({"input": 5}, "pair 2: field 'input'")])
def test_what_is_wrong_with_a_pair_is_said(change, says, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([JUDGED[0], JUDGED[1] | change]))
    with pytest.raises(SystemExit, match=says):
        read_judged(tmp_path / "bad.json")


def test_what_is_too_long_loses_the_start_of_the_prompt_and_the_end_of_the_response(sft_run):
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    encode = tokenizer.encode
    for prompt, response in ((row["input"], row[side]) for row in JUDGED for side in ("output_1", "output_2")):
        for size in (10, 40, 112):
            ids, response_ids = fitted(tokenizer, prompt, response, size)
            assert len(ids) + len(response_ids) <= size and len(response_ids) >= 1
            assert ids[0] == tokenizer.bos and ids[1:] == encode(prompt)[-len(ids[1:]):]
            whole = encode(response) + [tokenizer.eos]
            assert response_ids == whole[:len(response_ids)]
            fits = 1 + len(encode(prompt)) + len(whole) <= size
            assert fits == (ids[1:] == encode(prompt) and response_ids == whole)
    ids, response_ids = fitted(tokenizer, "", "Blue.", 40)
    assert (ids, response_ids) == ([tokenizer.bos], encode("Blue.") + [tokenizer.eos])


def test_a_run_is_asked_about_a_folder_of_files(dpo_run, sft_run, small_reviews, tmp_path, capsys):
    """A run has the SFT policy beside it, or names it in its config.json."""
    config = parse(Config, rewardbench.__doc__, ["--data", str(tmp_path), "--run", str(dpo_run)])
    with pytest.raises(SystemExit, match="no .json file in it"):
        rewardbench.main(config)
    (tmp_path / "first.json").write_text(json.dumps(JUDGED))
    (tmp_path / "second.json").write_text(json.dumps(
        [one | {"output_1": one["output_2"], "output_2": one["output_1"]} for one in JUDGED]))
    rewardbench.main(config)
    said = capsys.readouterr().out.splitlines()
    shares = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in said[1:]}
    assert "implicit reward" in said[0] and shares["first"] == pytest.approx(100 - shares["second"])
    assert shares["all"] == pytest.approx(50) and "+- 25.0%" in said[-1]
    assert "of    2 pairs; 1 of 4 responses were cut" in said[1]


@pytest.mark.skipif(not os.environ.get("PREFERENCE_DATA"), reason="PREFERENCE_DATA is not set")
def test_llmbar_as_it_was_published():
    folder = Path(os.environ["PREFERENCE_DATA"]) / "llmbar"
    counts = {path.stem: len(read_judged(path)) for path in folder.glob("*.json")}
    assert counts == {"natural": 100, "neighbor": 134, "gptinst": 92, "gptout": 47, "manual": 46}
    assert 100 * 0.5 / sum(counts.values())**0.5 == pytest.approx(2.4, abs=0.05)  # of a coin


@pytest.mark.parametrize("flags, says", [(["--data", "a.json"], "one needs the other"), (["--run", "runs/x"], "one needs the other"),
                                         (["--quick", "--seeds", "2"], "not with --quick"), (["--pairs", "0"], "--pairs")])
def test_what_cannot_be_run_is_said(flags, says):
    with pytest.raises(SystemExit) as stop:
        parse(Config, rewardbench.__doc__, flags)
    assert says in str(stop.value)
