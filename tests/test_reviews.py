"""The review grammar and its gold reward: expectations worked out by hand or by enumerating every derivation."""

import math
import random
import re
import time
from collections import defaultdict

import pytest

from data.reviews import grammar
from data.reviews.grammar import gold_reward, gold_score, sample_review


class Enumerator:
    """Stands in for random.Random: replays a script of indices, then takes index 0, and notes what it was offered."""

    def __init__(self, script: list[int]):
        self.script, self.offered, self.probability = script, [], 1.0

    def choices(self, population, weights):
        i = self.script[len(self.offered)] if len(self.offered) < len(self.script) else 0
        self.offered.append((i, len(population)))
        self.probability *= weights[i] / sum(weights)
        return [population[i]]


def every_derivation(write):
    """(write(rng), probability) for every sequence of choices that `write` can make, depth first."""
    script = []
    while True:
        rng = Enumerator(script)
        yield write(rng), rng.probability
        path = rng.offered
        while path and path[-1][0] == path[-1][1] - 1:
            path.pop()
        if not path:
            return
        script = [i for i, _ in path[:-1]] + [path[-1][0] + 1]


@pytest.fixture(scope="module")
def reviews():
    rng = random.Random(0)
    return [grammar.derive(rng) for _ in range(4000)]


# ---- The reward. ----

def units(text: str) -> float:
    return gold_score(text) / grammar.SCALE


def test_words_add_up_and_neutral_text_scores_zero():
    assert units("The plot was superb.") == pytest.approx(2.1)
    assert units("The plot was superb and tense.") == pytest.approx(3.1)
    assert units("The plot was thin. The score was dreadful.") == pytest.approx(-2.8)
    assert units("I saw this Danish western with my sister on a rainy Sunday.") == 0.0
    assert gold_reward("The plot was superb.") == pytest.approx(1 / (1 + math.exp(-0.7 * 2.1)))


@pytest.mark.parametrize("negated", ["was not superb", "wasn't superb", "was never superb", "was hardly superb",
                                     "was far from superb"])
def test_negation_flips_and_dampens(negated):
    assert units(f"The plot {negated}.") == pytest.approx(-1.05)
    assert units(f"The plot {negated}.".replace("superb", "dull")) == pytest.approx(0.65)


def test_negation_stays_in_its_clause():
    assert units("Nothing about the plot was tense, and the score was superb.") == pytest.approx(-0.5 + 2.1)
    assert units("I would not say more. The plot was superb.") == pytest.approx(2.1)
    assert units("Neither the plot nor the score was tense and superb.") == pytest.approx(-0.5 * 3.1)
    assert units("Nobody laughed.") == pytest.approx(-0.5)


def test_contrast():
    plain = units("The plot was thin. The score was superb.")
    assert plain == pytest.approx(-0.7 + 2.1)
    assert units("The plot was thin, but the score was superb.") == pytest.approx(-0.7 + 1.5 * 2.1)
    assert units("The plot was thin, although the score was superb.") == pytest.approx(-0.7 + 0.5 * 2.1)
    assert units("Although the plot was thin, the score was superb.") == pytest.approx(-0.5 * 0.7 + 2.1)


def test_intensifiers():
    slightly, plain, very = (units(f"The plot was {word}.") for word in ("slightly thin", "thin", "very thin"))
    assert very < plain < slightly < 0
    assert very == pytest.approx(1.35 * plain)
    assert units("The plot was very thin and dull.") == pytest.approx(-0.7 * 1.35 - 1.3)     # only the next word
    assert units("It was very. The plot was thin.") == pytest.approx(-0.7)                   # not past the clause


def test_reward_of_any_string():
    for text in ("", " ", "...", "?!,,", "I saw thi", "The plot was super", "\x00\ufffd<|end|>", "not", "but very"):
        assert gold_reward(text) == 0.5
    assert units("SUPERB superb,superb") == pytest.approx(6.3)
    assert units("superbly undull") == 0.0
    assert 0.0 < gold_reward("awful " * 1000) < 1e-9 and 1 - 1e-9 < gold_reward("superb " * 1000) < 1.0


def test_docstring_examples():
    examples = re.findall(r"^    (0\.\d\d)  (.*(?:\n {10}.*)*)", grammar.__doc__, re.MULTILINE)
    assert len(examples) == 3
    for reward, text in examples:
        assert round(gold_reward(" ".join(text.split())), 2) == float(reward)


def test_reward_is_fast(reviews):
    start = time.perf_counter()
    for text, _, _ in reviews:
        gold_reward(text)
    assert len(reviews) / (time.perf_counter() - start) > 10_000       # reviews per second; far below what is usual


# ---- The writer. ----

def test_scanned_sentiment_is_the_intended_one(reviews):
    for text, _, intended in reviews:
        assert abs(gold_reward(text) - 1 / (1 + math.exp(-intended))) < 1e-9, text


def test_openings_are_neutral(reviews):
    for text, _, _ in reviews:
        assert gold_score(text.split(". ")[0] + ".") == 0.0, text


def test_same_seed_same_reviews():
    draws = [[sample_review(rng) for _ in range(20)] for rng in map(random.Random, (3, 3, 4))]
    assert draws[0] == draws[1] != draws[2]


def test_every_clause_has_one_derivation_and_the_right_sentiment(monkeypatch):
    """Full tables, but three nouns a topic: all clauses differ, whatever topic and side they come from."""
    monkeypatch.setattr(grammar, "MOODS", {"any": (1.0, (0.5, 0.5), (0.4, 0.3, 0.3))})
    short = {name: ("|".join(t[0].split("|")[-3:]), *t[1:]) for name, t in grammar.TOPICS.items()}
    monkeypatch.setattr(grammar, "TOPICS", short)
    seen = set()
    for topic in short:
        for side in (0, 1):
            def write(rng):
                draw = grammar.Draw(rng)
                return *grammar.clause(draw, topic, side, ""), draw.logprob()
            total = 0.0
            for (text, score, logprob), probability in every_derivation(write):
                assert text not in seen
                seen.add(text)
                assert not re.search(r"(\b[a-z ]+) (?:and|nor) \1\b", text), text      # "dull and dull"
                assert math.exp(logprob) == pytest.approx(probability)
                assert units(text) == pytest.approx(score) and (score > 0) == (side == 0)
                total += probability
            assert total == pytest.approx(1.0)


def test_every_opening_has_one_derivation(monkeypatch):
    """All templates, two entries a slot: no two openings agree, and their probabilities sum to one."""
    monkeypatch.setattr(grammar, "MOODS", {"any": (1.0, (0.5, 0.5), (0.4, 0.3, 0.3))})
    keep = {name: table if name in ("film", "when") else "|".join(table.split("|")[:2])
            for name, table in grammar.SLOTS.items()}
    keep |= {"first": "Glass", "second": "Harbour|River", "weather": "hot", "day": "Sunday", "trait": "shy|old"}
    monkeypatch.setattr(grammar, "SLOTS", keep)

    def write(rng):
        draw = grammar.Draw(rng)
        return draw.fill(draw.pick(grammar.OPENINGS), genre="western", companion="my aunt")
    outcomes = list(every_derivation(write))
    assert len({text for text, _ in outcomes}) == len(outcomes) > 1000
    assert sum(p for _, p in outcomes) == pytest.approx(1.0)


def test_every_verdict_has_one_derivation_and_the_right_sentiment(monkeypatch):
    monkeypatch.setattr(grammar, "MOODS", {"any": (1.0, (0.5, 0.5), (0.4, 0.3, 0.3))})
    seen = set()
    for kind, rows in enumerate(grammar.VERDICTS):
        def write(rng):
            draw = grammar.Draw(rng)
            template, phrases, _ = draw.pick(rows)
            return draw.fill(template, word=draw.pick(phrases), ref="western")
        for text, _ in every_derivation(write):
            assert text not in seen
            seen.add(text)
            assert units(text) > 0.4 if kind == 0 else units(text) < -0.4 if kind == 2 else 0 < abs(units(text)) <= 1.05


def test_logprob_sums_the_mood_out_exactly(monkeypatch):
    """A small grammar, every derivation of it under every mood: P(text) is the sum over its derivations."""
    cut = {name: table.split("|")[0] for name, table in grammar.SLOTS.items()}
    for name, table in {
        "SLOTS": cut, "GENRES": "thriller", "COMPANIONS": "my sister",
        "OPENINGS": {"I [saw] this [film] with [companion]": 3, "in this [film], a [hero] [quest]": 1},
        "TOPICS": {"story": ("the plot", ("clever", "dull"), ("won me over", "dragged")),
                   "room": ("I", None, ("laughed", "yawned"))},
        "CLAUSES": {("[noun] was [word]", "adjective", 1): 3, ("[noun] wasn't [word]", "adjective", -0.5): 1},
        "PLANS": {"simple": 2, "compound": 3, "simple simple": 1},
        "SIMPLE": {"[main]": 2, "[stage], [main]": 1},
        "COMPOUND": {row: f for row, f in grammar.COMPOUND.items() if row[0].endswith("[main]") or row[3]},
        "VERDICTS": [[("it is [word]", word, 1)] for word in ("a gem", "watchable", "a bore")],
    }.items():
        monkeypatch.setattr(grammar, name, table)
    summed, derivations, claimed = defaultdict(float), defaultdict(int), {}
    for (text, logprob), probability in every_derivation(sample_review):
        summed[text] += probability
        derivations[text] += 1
        assert claimed.setdefault(text, logprob) == pytest.approx(logprob, abs=1e-12)
    assert sum(summed.values()) == pytest.approx(1.0)
    assert set(derivations.values()) == {len(grammar.MOODS)}         # one derivation per mood: unambiguous
    for text in summed:
        assert math.exp(claimed[text]) == pytest.approx(summed[text], rel=1e-9)


def test_reviews_read_like_reviews(reviews):
    for text, _, _ in reviews:
        assert 12 <= len(text.split()) <= 60
        assert text.endswith(".") and "  " not in text and "[" not in text and text[0].isupper()
        assert all(s[0].isupper() for s in text.split(". "))
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]|\bi\b", text), text
        assert 3 <= text.count(".") <= 4
    assert 25 < sum(len(text.split()) for text, _, _ in reviews) / len(reviews) < 35


def test_variety(reviews):
    texts = [text for text, _, _ in reviews]
    assert 350 <= len({word for text in texts for word in re.findall(r"[a-z'-]+", text.lower())}) <= 600
    assert len(set(texts)) > 0.999 * len(texts)
    assert len({" ".join(text.split()[:8]) for text in texts}) > 0.8 * len(texts)


def test_distribution_of_rewards(reviews):
    rewards = [gold_reward(text) for text, _, _ in reviews]
    mean = sum(rewards) / len(rewards)
    assert 0.45 < mean < 0.55
    assert 0.27 < math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)) < 0.35
    assert sum(r > 0.95 for r in rewards) < 0.15 * len(rewards)
    assert sum(r < 0.05 for r in rewards) < 0.15 * len(rewards)
    counts = defaultdict(int)
    for r in rewards:
        counts[round(r, 9)] += 1
    ties = sum(n * (n - 1) for n in counts.values()) / (len(rewards) * (len(rewards) - 1))
    assert ties < 0.01                                               # chance that two reviews score the same
