"""data/pairs.py: what a pair's ids are, which pairs are refused or dropped, and how pairs are labelled."""
import json
import math

import pytest
import torch

import clone
import data.reviews
from common import pipeline, tasks
from common.files import sha256, write_jsonl
from common.pairs import Pair, encode_pairs, label_pairs, read_pairs, sampled_responses, split
from common.pipeline import Start, sampled_pairs
from common.rewards import Reward
from common.training import generator, pad
from conftest import naive_logprobs, smaller, tiny_gpt
from common.tokenizer import Tokenizer, train_bpe
from model import response_logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a good film a good film a goodness", "the bad film the badly made film"] * 3, 290)


def row(prompt, chosen, rejected, line=1):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "line": line}


# ---- encoding --------------------------------------------------------------------------------------------------------

def test_prompt_and_response_are_encoded_separately(tokenizer):
    """The ids are encode(prompt) + encode(response), also where the joined text would be merged across the border."""
    pair, = encode_pairs([row("a good", "ness", " film")], tokenizer, 20, "f")
    assert tokenizer.encode("a goodness") != tokenizer.encode("a good") + tokenizer.encode("ness")  # it would
    assert pair.prompt == [tokenizer.bos] + tokenizer.encode("a good")
    assert pair.chosen == tokenizer.encode("ness") + [tokenizer.eos]
    assert pair.rejected == tokenizer.encode(" film") + [tokenizer.eos]


def test_one_bos_at_the_start_one_eos_at_the_end(tokenizer):
    for prompt in ("", "a good", "<|bos|> <|eos|> a good"):
        pair, = encode_pairs([row(prompt, " film", " bad<|eos|>")], tokenizer, 60, "f")
        for response in (pair.chosen, pair.rejected):
            ids = pair.prompt + response
            assert (ids.count(tokenizer.bos), ids.index(tokenizer.bos)) == (1, 0)
            assert (ids.count(tokenizer.eos), ids.index(tokenizer.eos)) == (1, len(ids) - 1)


def test_a_response_that_fills_the_block_was_cut_and_has_no_eos(tokenizer):
    size = len(tokenizer.encode("a good") + tokenizer.encode(" film film")) + 1
    pair, = encode_pairs([row("a good", " film film", " film")], tokenizer, size, "f")
    assert len(pair.prompt + pair.chosen) == size and tokenizer.eos not in pair.chosen
    assert pair.rejected[-1] == tokenizer.eos
    pair, = encode_pairs([row("a good", " film film", " film")], tokenizer, size + 1, "f")
    assert len(pair.prompt + pair.chosen) == size + 1 and pair.chosen[-1] == tokenizer.eos
    with pytest.raises(SystemExit, match="'chosen' does not fit"):
        encode_pairs([row("a good", " film film", " film")], tokenizer, size - 1, "f")


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_response_that_does_not_fit_stops_with_its_line(tokenizer, field):
    """Nothing is cut: a cut response is not the one that was compared, and two cut responses may be the same."""
    rows = [row("a good", " film", " bad", line=1), {**row("a good", " film", " bad", line=3), field: " film" * 9}]
    with pytest.raises(SystemExit) as stop:
        encode_pairs(rows, tokenizer, 8, "my.jsonl")
    assert str(stop.value).startswith(f"error: my.jsonl, line 3: '{field}' does not fit: prompt 3 and response 9 tokens")
    with pytest.raises(SystemExit, match="line 7: 'chosen' does not fit"):  # a prompt that fills the block by itself
        encode_pairs([row(" film" * 9, " film", " bad", line=7)], tokenizer, 8, "my.jsonl")


def test_identical_pairs_are_dropped_and_counted(tokenizer, capsys):
    rows = [row("a", " film", " bad"), row("a", " film", " film"), row("the", " bad", " bad"), row("a", " bad", " film")]
    pairs = encode_pairs(rows, tokenizer, 20, "f")
    assert [tokenizer.decode(p.chosen) for p in pairs] == [" film", " bad"]
    assert "f: dropped 2 of 4 pairs whose two responses are identical" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="f: no pair with two different responses"):
        encode_pairs(rows[1:3], tokenizer, 20, "f")


def test_eos_counts_and_padding_does_not_although_gpt2_gives_them_one_id(tokenizer):
    """GPT-2 has one special token for pad, bos and eos; lengths tell them apart, ids are never looked at."""
    single = Tokenizer(tokenizer.ranks, (287, 287, 287))
    pair, = encode_pairs([row("a good", " film", " bad bad bad film")], single, 40, "f")
    assert pair.prompt[0] == pair.chosen[-1] == pair.rejected[-1] == single.pad == 287
    tokens, lengths = pad([pair.prompt + pair.chosen, pair.prompt + pair.rejected], single.pad)
    model = tiny_gpt(vocab_size=single.vocab_size, block_size=40)
    found = response_logprobs(model, tokens, torch.tensor([len(pair.prompt)] * 2), lengths)
    for logprobs, response in zip(found, (pair.chosen, pair.rejected)):
        expected = naive_logprobs(model, pair.prompt, response)
        torch.testing.assert_close(logprobs[:len(response)], expected, rtol=0, atol=1e-4)
        assert (logprobs[:len(response)] != 0).all() and (logprobs[len(response):] == 0).all()


def test_read_pairs_keeps_text_line_numbers_and_further_keys(tmp_path):
    rows = [{"prompt": "", "chosen": " naïve 日本", "rejected": " b", "source": {"rater": 3}},
            {"prompt": "p", "chosen": "c", "rejected": "r"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=i == 0) for i, r in enumerate(rows)) + "\n", encoding="utf-8")
    found = read_pairs(path)
    assert [r["line"] for r in found] == [1, 3]
    assert [{k: v for k, v in r.items() if k != "line"} for r in found] == rows
    with pytest.raises(SystemExit, match="none.jsonl: no such pairs file"):
        read_pairs(tmp_path / "none.jsonl")
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": ""}\n')
    with pytest.raises(SystemExit, match="line 1: field 'rejected' is empty"):
        read_pairs(path)


# ---- labels ----------------------------------------------------------------------------------------------------------

def test_bradley_terry_labels_win_as_often_as_the_sigmoid_says():
    """20,000 draws each, within 4 standard errors, whichever of the two samples comes first."""
    n, scale = 20_000, 5.0
    for low, high in ((0.3, 0.7), (0.5, 0.5), (0.1, 0.95), (0.0, 0.05)):
        for rewards, better in (([low, high], 1), ([high, low], 0)):
            pairs = label_pairs(torch.tensor([rewards]).expand(n, 2), "bt", scale, generator(0))
            p = 1 / (1 + math.exp(-scale * (high - low)))
            wins = sum(chosen == better for _, chosen, _ in pairs)
            assert len(pairs) == n and abs(wins / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_labels_of_the_six_pairs_are_drawn_independently():
    """Four equal rewards: all 2^6 outcomes of the six comparisons are equally likely; chi-square with 63 degrees of freedom,
    whose 99.99% point is 114."""
    n = 16_000
    pairs = label_pairs(torch.full((n, 4), 0.3), "bt", 5.0, generator(1))
    first = torch.tensor([chosen < rejected for _, chosen, rejected in pairs]).view(n, 6)
    counts = (first * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 114


def test_argmax_labels_choose_the_better_and_leave_ties_out():
    rewards = torch.rand(50, 4, generator=generator(2))
    rewards[0] = torch.tensor([0.2, 0.9, 0.2, 0.9])
    pairs = label_pairs(rewards, "argmax", 5.0, generator(3))
    assert all(rewards[i, chosen] > rewards[i, rejected] for i, chosen, rejected in pairs)
    assert sorted(p for p in pairs if p[0] == 0) == [(0, 1, 0), (0, 1, 2), (0, 3, 0), (0, 3, 2)]
    assert pairs == label_pairs(rewards, "argmax", 1.0, generator(4))  # nothing is drawn


@pytest.mark.parametrize("labels", ["bt", "argmax"])
def test_four_samples_make_all_six_pairs(labels):
    rewards = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.7, 0.5, 0.3]])
    pairs = label_pairs(rewards, labels, 5.0, generator(5))
    for i in range(2):
        assert sorted(tuple(sorted(p[1:])) for p in pairs if p[0] == i) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


# ---- sampling --------------------------------------------------------------------------------------------------------

def test_sampled_responses_stay_with_their_prompts(tokenizer):
    """Samples of one prompt lie next to each other, texts are what the ids say, and more than one part is joined in order."""
    model = tiny_gpt(vocab_size=tokenizer.vocab_size, block_size=12, n_layer=1, size=0.3)
    prompts = ["a good", "the", "a film the bad film", ""] * 100
    parts, texts = sampled_responses(model, tokenizer, prompts, 3, seed=1)
    again, other = (sampled_responses(model, tokenizer, prompts, 3, seed=seed)[1] for seed in (1, 2))
    rows = [(row[:p], row[p:n]) for part in parts
            for row, p, n in zip(part.tokens.tolist(), part.prompt_lengths.tolist(), part.lengths.tolist())]
    assert len(parts) == 2 and len(rows) == len(texts) == 1200
    for i, ((prompt, response), text) in enumerate(zip(rows, texts)):
        assert prompt == [tokenizer.bos] + tokenizer.encode(prompts[i // 3])
        assert text == tokenizer.decode(response)
    assert len(set(texts[:3])) == 3
    assert texts == again != other


def test_sampled_ids_are_used_as_they_were_sampled(tokenizer):
    """A policy may spell a word with other tokens than BPE would; what it sampled is what is trained on, <eos> or not."""
    letters = [i for c in " bad" for i in tokenizer.encode(c)]
    assert tokenizer.decode(letters) == " bad" and tokenizer.encode(" bad") != letters
    rows = [{**row("a", " bad", " film"), "line": 1, "chosen_ids": letters,
             "rejected_ids": [*tokenizer.encode(" film"), tokenizer.eos]}]
    (pair,) = encode_pairs(rows, tokenizer, 16, "my.jsonl")
    assert pair.chosen == letters and pair.rejected == [*tokenizer.encode(" film"), tokenizer.eos]


@pytest.mark.parametrize("ids", [[1, 2], "abc", [10**6], [True], [-1], [1.0], None])
def test_ids_that_do_not_say_what_the_text_says(tokenizer, ids):
    rows = [{**row("a", " bad", " film"), "line": 4, "rejected_ids": ids}]
    with pytest.raises(SystemExit, match="^error: my.jsonl, line 4: field 'rejected_ids'"):
        encode_pairs(rows, tokenizer, 16, "my.jsonl")


@pytest.fixture
def begin(tmp_path, tokenizer, monkeypatch):
    """begin(pair_prompts): what pairs are sampled from: six prompts, an untrained policy, which samples any bytes at all, and a
    reward that counts letters."""
    def write(folder):
        texts = ("a", "a good", "the", "the bad", "film", "made")
        write_jsonl(folder / "prompts_train.jsonl", [{"prompt": text} for text in texts])
        return {}
    tasks.publish(tmp_path / "prepared", "reviews", write)
    monkeypatch.setattr(tasks, "prepared", lambda dataset: tmp_path / "prepared")

    def start(pair_prompts: int, gold_id: str = "letters", policy_id: str = "policy") -> Start:
        monkeypatch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, pair_prompts=pair_prompts, pair_samples=6))
        model = tiny_gpt(vocab_size=tokenizer.vocab_size, block_size=24, n_layer=1, size=0.3)
        gold = Reward("letters", gold_id, lambda prompts, texts, _: torch.tensor([len(text) / 100 for text in texts]))
        return Start("reviews", "cpu", "auto", tmp_path / "base", tmp_path / "sft", model, policy_id, tokenizer, gold)
    return start


def test_the_pairs_file_gives_back_the_sampled_responses(begin, tokenizer):
    """From the file come exactly the tokens that the policy sampled."""
    path = sampled_pairs(begin(6), "bt")
    rows = read_pairs(path)
    sampled = {tuple(ids) for row in rows for ids in (row["chosen_ids"], row["rejected_ids"])}
    pairs = encode_pairs(rows, tokenizer, 24, path)
    assert len(pairs) == len(rows) > 20 and {tuple(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)} == sampled
    for pair in pairs:
        for ids in (pair.chosen, pair.rejected):  # ended by <eos>, or cut where the block ends
            assert (ids[-1] == tokenizer.eos) != (len(pair.prompt) + len(ids) == 24 and ids[-1] != tokenizer.eos)


@pytest.mark.parametrize("name", ["pad", "bos", "eos"])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_special_ids_inside_a_response_are_refused(name, place, begin, tokenizer):
    """decode() drops them, so the text beside the ids does not give them away; an <eos> may stand at the end."""
    rows = read_pairs(sampled_pairs(begin(6), "bt"))[:3]
    ids = rows[1]["chosen_ids"]
    ids.insert(len(ids) if place == -1 else place, getattr(tokenizer, name))
    if (name, place) == ("eos", -1) and tokenizer.eos not in ids[:-1]:
        assert len(encode_pairs(rows, tokenizer, 25, "p")) == 3
        return
    with pytest.raises(SystemExit, match="^error: p, line 2: field 'chosen_ids': has a pad, <bos> or <eos> in it"):
        encode_pairs(rows, tokenizer, 25, "p")


# ---- held out --------------------------------------------------------------------------------------------------------

def pairs_of(prompts: list[int]) -> list[Pair]:
    return [Pair([1, prompt], [2, i], [3, i]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("prompts", [[i // 6 for i in range(240)], [0] * 40 + list(range(1, 61)), [i % 7 for i in range(100)],
                                     list(range(100)), [0] * 50, [0, 1] * 10, [0], [0, 1]], ids=str)
def test_no_prompt_is_on_both_sides(prompts, draw):
    """About a twentieth is held out, whole prompts; everything is on one side or the other, and something to train on."""
    pairs = pairs_of(prompts)
    train, held = split(pairs, draw)
    assert sorted(train.tolist() + held.tolist()) == list(range(len(pairs))) and len(train)
    assert not {prompts[i] for i in train.tolist()} & {prompts[i] for i in held.tolist()}
    several = len(set(prompts)) > 1 and len(pairs) >= 20
    assert len(held) >= len(pairs) // 20 if several else len(held) == 0


def test_held_out_prompts_of_somebodys_file_are_drawn():
    """A file may be sorted by topic: its end is no sample of it. Sampled pairs keep the last ones, whose order is random."""
    pairs = pairs_of([i // 6 for i in range(1200)])
    assert split(pairs, draw=False)[1].tolist() == list(range(1140, 1200))
    drawn = split(pairs, draw=True)[1]
    assert len(drawn) == 60 and abs(drawn.double().mean() - 600) < 4 * 1200 / 12**0.5 / 10**0.5
    assert torch.equal(drawn, split(pairs, draw=True)[1])  # the same for every run


# ---- what they were made of ------------------------------------------------------------------------------------------

def test_another_policy_gold_reward_or_prompt_stops_by_name(begin, tmp_path):
    """A reward that was edited would label the pairs differently: what is stored is of the old one."""
    path = sampled_pairs(begin(3), "bt")
    before = path.read_bytes()
    assert sampled_pairs(begin(3), "bt") == path
    for change, said in ((dict(gold_id="words"), "gold was 'letters', now 'words'"),
                         (dict(policy_id="other"), "policy was 'policy', now 'other'")):
        with pytest.raises(SystemExit, match=said):
            sampled_pairs(begin(3, **change), "bt")
    meta = json.loads((tmp_path / "prepared/meta.json").read_text())
    meta["sha256"]["prompts_train.jsonl"] = "other"
    (tmp_path / "prepared/meta.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit, match="prompts was '"):
        sampled_pairs(begin(3), "bt")
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage, said", [("rows", "has 2 of "), ("config", "without a config.json"), ("old", "does not say which")])
def test_pairs_that_are_not_all_there_stop_by_name(damage, said, begin):
    """Some rows lost, no settings beside them, or settings of an earlier version, which did not name the gold reward."""
    path = sampled_pairs(begin(3), "bt")
    config = path.parent / "config.json"
    if damage == "rows":
        path.write_text("".join(path.read_text().splitlines(True)[:2]))
    elif damage == "config":
        config.unlink()
    else:
        config.write_text(json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "built_from"}))
    with pytest.raises(SystemExit, match=said):
        sampled_pairs(begin(3), "bt")


# ---- more pairs, or fewer --------------------------------------------------------------------------------------------

def test_the_prompts_of_a_smaller_set_are_the_first_of_a_larger_one(begin, tmp_path):
    """Each number has a folder of its own name and leaves the others' files as they are; the default is one of them."""
    paths, before, prompts = {}, {}, {}
    for count in (4, 0, 2, 6):
        paths[count] = sampled_pairs(begin(3), "bt", count)
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
        before |= {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths[count].parent.iterdir()}
        prompts[count] = list(dict.fromkeys(row["prompt"] for row in read_pairs(paths[count])))
        assert json.loads((paths[count].parent / "config.json").read_text())["prompts"] == (count or 3)
    assert paths == {count: tmp_path / "base" / f"pairs-bt{f'-{count}' if count else ''}" / "pairs.jsonl" for count in paths}
    assert [len(prompts[count]) for count in (2, 0, 4, 6)] == [2, 3, 4, 6]
    assert all(prompts[count] == prompts[6][:count or 3] for count in (2, 0, 4))


def test_more_prompts_than_there_are_stop(begin, tmp_path):
    """Asked for by --prompts; where the task asks for more than there are, all of them are taken."""
    with pytest.raises(SystemExit) as stop:
        sampled_pairs(begin(3), "bt", 7)
    assert str(stop.value) == "error: --prompts 7: data/reviews has 6 training prompts"
    assert not (tmp_path / "base").exists()
    assert len({row["prompt"] for row in read_pairs(sampled_pairs(begin(1600), "bt"))}) == 6


def test_both_scripts_train_on_as_many_prompts_as_they_are_told(root, tmp_path):
    """--prompts 5: the pairs of 5 prompts, six each, in a run folder with the number in its name."""
    assert clone.run_here(root, tmp_path, "sft", *clone.SFT) == 0
    runs = tmp_path / "runs/reviews"
    for script, name in (("dpo", "dpo-beta0.1-seed0-prompts5"), ("reward_model", "reward-model-prompts5")):
        assert clone.run_here(root, tmp_path, script, "--sft", "runs/reviews/sft", "--prompts", "5") == 0
        built_from = json.loads((runs / name / "config.json").read_text())["built_from"]
        assert built_from["pairs"] == sha256(runs / "pairs-bt-5/pairs.jsonl")
        assert "--prompts 61: data/reviews has 60 training prompts" in clone.run_here(
            root, tmp_path, script, "--sft", "runs/reviews/sft", "--prompts", "61")
    assert 0 < len(read_pairs(runs / "pairs-bt-5/pairs.jsonl")) <= 30 and not (runs / "pairs-bt").exists()


def test_another_seed_draws_prompts_responses_and_labels(begin, monkeypatch):
    """Seed 0 is what it was without a seed, in the same folder; 1 is another draw of each of the three, and stays what it is."""
    start = begin(3)
    plain, again, other = (sampled_pairs(start, "bt", seed=seed) for seed in (0, 0, 1))
    monkeypatch.setattr(pipeline, "PAIRS_SEED", 1001)
    start.folder = start.folder.parent / "shifted"
    shifted = sampled_pairs(start, "bt")  # the seed of all the draws is the sum
    assert plain == again and (plain.parent.name, other.parent.name) == ("pairs-bt", "pairs-bt-seed1")
    assert other.read_bytes() == shifted.read_bytes() != plain.read_bytes()
    rows = [read_pairs(path) for path in (plain, other)]
    prompts = [list(dict.fromkeys(row["prompt"] for row in own)) for own in rows]
    assert prompts[0] != prompts[1] and not {row["chosen"] for row in rows[0]} & {row["chosen"] for row in rows[1]}
    assert sampled_pairs(start, "argmax", 2, 1).parent.name == "pairs-argmax-2-seed1"


def test_another_seed_of_the_pairs_is_another_reward_model(root, tmp_path):
    """PPO's, and REINFORCE's, has the seed of its pairs and a folder of its own; that of seed 0 is called as ever."""
    assert clone.run_here(root, tmp_path, "sft", *clone.SFT) == 0
    runs, short = tmp_path / "runs/reviews", ("--steps", "1", "--batch-size", "8", "--warmup", "1", "--bank-samples", "8")
    for script, seed, folder in (("ppo", 1, "reward-model-pairsseed1-seed1"), ("reinforce", 0, "reward-model")):
        flags = ("--sft", "runs/reviews/sft", "--pairs-seed", str(seed), *short)
        assert clone.run_here(root, tmp_path, script, *flags) == 0
        config = json.loads((runs / folder / "config.json").read_text())
        assert (config["seed"], config["pairs_seed"]) == (seed, seed)
        pairs = runs / ("pairs-bt-seed1" if seed else "pairs-bt") / "pairs.jsonl"
        assert config["built_from"]["pairs"] == sha256(pairs)
    assert sorted(path.name for path in runs.glob("reward-model*")) == ["reward-model", "reward-model-pairsseed1-seed1"]
