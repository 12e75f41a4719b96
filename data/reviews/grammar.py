"""A grammar that writes short film reviews, and an exact gold reward read from the text alone.

A review is a neutral opening (who, when, what the film is about), one or two sentences of opinion on the acting,
the story, the craft or how the room reacted, and a verdict that mostly names the opening's genre again.

The writer's mood, from rave to hated, is drawn first and never written down: it only tilts each opinion and the
verdict. No two derivations give the same text, so log P(text) = log sum_mood P(mood) prod_choices P(choice | mood),
in nats, exactly. Minus its mean over samples is the entropy of the reviews: the floor for the held-out loss of any
language model of them.

The reward is P(positive) = sigmoid(SCALE * sum of clause sentiments). A clause ends at punctuation, "but" or
"although". In it a sentiment word adds its weight, an intensifier scales the next sentiment word, a negator flips
and dampens what follows; "but" makes its clause count more, "although" less. The reward is defined for any string,
never sees the mood, and equals what the writer intended: it judges exactly what a policy learned from preferences.
A policy can also exploit it, by piling up praise.

    0.80  I saw this western with my aunt. The plot was thin, but the score gave me chills. It is a decent western for a
          sick day.
    0.17  My boss chose this musical for a train ride. The dialogue wasn't clever. I yawned. I would not recommend it.
    0.50  I saw this western with my aunt.
"""

import math
import random
import re

# ---- The reward: what each sentiment word, intensifier, negator and clause border does. ----
SCALE = 0.7                 # logits per unit of sentiment; keeps most rewards between 0.05 and 0.95
NEGATED = -0.5              # "not superb" is milder than "dreadful"
BUT, ALTHOUGH = 1.5, 0.5    # weight of the clause each word opens; any other clause weighs 1

SENTIMENT = {word: weight for weight, table in {
    2.1: "superb|brilliant|stunning|gorgeous|triumph|adored|loved|gem|treasure|dazzled|applauded",
    1.6: "gripping|magnetic|haunting|chills|shone|delight|breath|cheered|joy|stole",
    1.3: "moving|witty|inventive|memorable|admired|recommend|convincing|clever|elegant|lovely|rewarded|worth|deserves",
    1.0: "tense|funny|satisfying|graceful|charming|touching|original|attention|lifted|won|enjoyed|laughed|guessing",
    0.7: "likeable|lively|delicate|polished|believable|fresh|tidy|liked|smiled|grinned|laugh|smile|treat",
    0.3: "decent|watchable|passable", -0.3: "average|uneven|ordinary",
    -0.7: "thin|stiff|dated|sighed|indifferent|tested|disliked|skip|bland|mumbled|winced|letdown",
    -1.0: "predictable|confusing|silly|murky|clumsy|distracting|muddled|spoiled|nerves|yawned|regret|flat|groaned",
    -1.3: "wooden|contrived|cheap|sloppy|dragged|apart|nowhere|bore|chore|shrill|dull|annoying|avoid|dozed|sleep",
    -1.6: "tedious|grating|lifeless|tiresome|ugly|shoddy|garish|bored|resented|waste|headache|ruined|mess",
    -2.1: "dreadful|awful|hated|despised|disaster",
}.items() for word in table.split("|")}
INTENSIFIER = {"truly": 1.3, "absolutely": 1.5, "simply": 1.2, "very": 1.35, "really": 1.25, "remarkably": 1.45,
               "quite": 0.85, "painfully": 1.55, "rather": 0.8, "slightly": 0.4, "little": 0.45, "fairly": 0.75}
NEGATOR = "not|never|no|hardly|far from|nothing|neither|nobody|wasn't|weren't|isn't|didn't|don't|can't|won't|wouldn't"
EFFECT = ({word: ("sentiment", weight) for word, weight in SENTIMENT.items()}
          | {word: ("intensifier", factor) for word, factor in INTENSIFIER.items()}
          | {word: ("negator", NEGATED) for word in NEGATOR.split("|")}
          | {mark: ("border", 1.0) for mark in ".,;:!?"} | {"but": ("border", BUT), "although": ("border", ALTHOUGH)})
TOKEN = re.compile(r"\bfar from\b|[a-z]+(?:'[a-z]+)?|[.,;:!?]")


def gold_score(text: str) -> float:
    """The sentiment of any string, in logits: one pass over its words, left to right."""
    total, clause_weight, polarity, boost = 0.0, 1.0, 1.0, 1.0
    for token in TOKEN.findall(text.lower()):
        kind, value = EFFECT.get(token, ("none", 0.0))
        if kind == "sentiment":
            total += clause_weight * polarity * boost * value
            boost = 1.0
        elif kind == "intensifier":
            boost = value
        elif kind == "negator":
            polarity = value
        elif kind == "border":
            clause_weight, polarity, boost = value, 1.0, 1.0
    return SCALE * total


def gold_reward(text: str) -> float:
    """P(positive) of any string, strictly between 0 and 1; 0.5 where no sentiment is found."""
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, gold_score(text)))))     # beyond 30 a float is soon 0 or 1


# ---- The tables. In a template, [slot] stands for one entry of SLOTS[slot] or for a text already known. ----
MOODS = {       # P(mood), P(opinion for, against), P(verdict warm, lukewarm, cold)
    "rave": (0.2, (0.95, 0.05), (0.90, 0.08, 0.02)), "liked": (0.2, (0.74, 0.26), (0.65, 0.30, 0.05)),
    "mixed": (0.2, (0.48, 0.52), (0.20, 0.60, 0.20)), "disliked": (0.2, (0.24, 0.76), (0.05, 0.30, 0.65)),
    "hated": (0.2, (0.04, 0.96), (0.02, 0.08, 0.90))}
OPENINGS = {    # template: relative frequency; none carries sentiment
    "I [saw] this [film] with [companion]": 8,              "I [saw] this [film] with [companion] [when]": 12,
    "[when], [companion] and I [saw] a [film]": 14,         "[companion] [chose] this [film] for [occasion]": 12,
    "[companion] and I [saw] [title], a [film]": 10,        "set [place], this [film] follows a [hero] who [quest]": 8,
    "[title] is a [film] about a [hero] who [quest]": 6,    "[title] is a [film] about a [hero] [place]": 6,
    "this [film] is about a [hero] who [quest]": 8,         "a [hero] [quest] in [title], a [film]": 6,
    "in this [film], a [hero] [quest]": 8}
GENRES = "thriller|western|comedy|drama|mystery|musical|romance|ghost story|heist film|war film|road movie|satire"
COMPANIONS = "my sister|my brother|my mother|my father|my wife|my son|my boss|my film club|my aunt|my students"
SLOTS = {
    "film": "[genre]|[style] [genre]|[nation] [genre]|[style] [nation] [genre]",
    "style": "quiet|recent|old|short|long|small|modern|early|low-budget|black-and-white|two-hour|independent",
    "nation": "Danish|French|Italian|Korean|Mexican|British|Polish|Irish|Indian|Japanese|Spanish|Turkish",
    "saw": "watched|saw|rented|streamed", "chose": "picked|chose|suggested|brought home",
    "when": "on a [weather] [day]|last [day]|over the holidays|late at night|after work|after dinner|on my birthday",
    "weather": "rainy|cold|hot|grey|slow|windy|snowy", "day": "Sunday|Monday|Saturday|Friday|Tuesday",
    "occasion": "our film night|a long flight|a train ride|the holidays|a night in|a sick day|a [weather] [day]",
    "place": "in a fishing village|in postwar Berlin|in a desert town|in Lisbon|at a lighthouse|at a boarding school|"
             "in a busy hospital|on a space station|in a travelling circus|on a remote island|aboard a night train",
    "hero": "[trait] [job]", "trait": "young|retired|widowed|shy|stubborn|lonely|wealthy|ambitious|restless|homesick",
    "job": "teacher|detective|nurse|sailor|baker|lawyer|painter|farmer|soldier|pianist|taxi driver|judge|chef|thief",
    "quest": "returns home|searches for a missing brother|inherits an old house|plans one last robbery|"
             "adopts a stray dog|finds a secret letter|loses a bet|solves a murder|learns to swim|opens a restaurant",
    "title": "The [first] [second]", "first": "Glass|Winter|Silver|Paper|Hidden|Last|Copper|Seventh|Midnight|Crooked",
    "second": "Harbour|Orchard|Bridge|Garden|Letter|Station|River|Mirror|Witness|Passenger",
    "negator": "n't| not| never| hardly| far from", "audience": "anyone|my parents|patient viewers|your friends",
    "again": "twice|again|on a big screen|in good company", "price": "the ticket|your evening|the popcorn",
    "prize": "a wide audience|a second viewing|an award", "part": "every minute|buying a ticket|my choice",
    "stage": "in the second half|towards the end|in the quieter scenes|in the crowd scenes|early on|from the start"}
# What the body talks about: nouns (one in -s takes "were"), then adjectives and verbs, each as (for, against).
PLOT = (("gripping|clever|original|moving|tense|witty|satisfying|inventive|memorable|touching|brilliant|funny|fresh",
         "predictable|tedious|confusing|dull|clumsy|thin|silly|contrived|muddled|tiresome|awful|dreadful|bland"),
        ("kept me guessing|held my attention|made me laugh|rewarded my patience|won me over|dazzled me",
         "dragged|put me to sleep|fell apart|went nowhere|bored me|tested my patience|fell flat"))
TOPICS = {
    "acting": ("the acting|the male lead|the female lead|the cast|the villain|the narrator|the minor characters",
               ("convincing|magnetic|charming|superb|believable|funny|touching|brilliant|graceful|likeable|lively",
                "wooden|stiff|bland|annoying|lifeless|dreadful|shrill|dull|awful|clumsy|tiresome"),
               ("stole every scene|shone|won me over|made me smile|held my attention|dazzled me",
                "got on my nerves|fell flat|mumbled|left me indifferent|bored me")),
    "story": ("the plot|the script|the dialogue|the premise|the humour|the pacing|the jokes|the flashbacks", *PLOT),
    "part": ("the ending|the final act|the opening scene|the first hour|the big finale|the last ten minutes", *PLOT),
    "craft": ("the score|the camera work|the editing|the lighting|the music|the costumes|the sets|the visual effects",
              ("gorgeous|elegant|stunning|lovely|inventive|haunting|polished|delicate|superb|memorable|tidy",
               "ugly|murky|clumsy|distracting|cheap|shoddy|garish|dated|sloppy|grating|awful"),
              ("gave me chills|dazzled me|lifted every scene|took my breath away|won me over",
               "gave me a headache|ruined the mood|spoiled several scenes|left me indifferent|got on my nerves")),
    "room": ("I|the audience|half the room|everyone around me|the row behind me", None,
             ("laughed out loud|cheered|applauded|smiled|grinned", "yawned|groaned|sighed|winced|dozed off"))}
FEELINGS = ("loved|adored|admired|enjoyed|liked", "hated|despised|resented|disliked")
DEGREES = ("very|really|remarkably|fairly|quite", "very|really|painfully|rather|slightly|a little")
EXTREME, EXTREME_DEGREES = 2.0, "truly|absolutely|simply"       # from that weight on, "very" sounds wrong
CLAUSES = {     # (template, what [word] is, factor on its sentiment): relative frequency
    ("[noun] [be] [word]", "adjective", 1): 22, ("[noun] [be] [word]", "degree", 1): 22,
    ("[noun] [be] [word]", "pair", 1): 8, ("[noun] [word]", "verb", 1): 20, ("I [word] [noun]", "feeling", 1): 9,
    ("I found [noun] [word]", "degree", 1): 6, ("both [noun] and [noun2] were [word]", "adjective", 1): 5,
    ("[noun] [be][negator] [word]", "adjective", NEGATED): 18, ("I didn't find [noun] [word]", "adjective", NEGATED): 4,
    ("nothing about [noun] was [word]", "adjective", NEGATED): 4,
    ("neither [noun] nor [noun2] [be] [word]", "adjective", NEGATED): 5}
ROOM_CLAUSES = {("[noun] [word]", "verb", 1): 7, ("nobody [word]", "verb", NEGATED): 3}
SIMPLE = {"[main]": 6, "[main] [stage]": 2, "[stage], [main]": 2}
COMPOUND = {    # (template, weights of main and other clause, whether they take the same side): relative frequency
    ("[main], and [other]", 1, 1, True): 30, ("[other], but [main]", BUT, 1, False): 35,
    ("although [other], [main]", 1, ALTHOUGH, False): 20, ("[main], although [other]", 1, ALTHOUGH, False): 15}
PLANS = {"simple": 18, "compound": 36, "simple simple": 36, "simple compound": 5, "compound simple": 5}
LUKEWARM = "decent|watchable|passable|fairly decent|uneven|average|ordinary|rather average|rather uneven"
VERDICTS = [    # warm, lukewarm and cold rows of (template, phrases for [word], factor on their sentiment)
    [("I would [word] this [ref] to [audience]", "recommend|really recommend", 1),
     ("it is a [ref] [word] seeing [again]", "worth|truly worth|really worth", 1),
     ("this [ref] [word] [prize]", "deserves|truly deserves|really deserves", 1),
     ("all in all, this [ref] is a [word]", "gem|treat|delight|triumph|joy|treasure", 1)],
    [("it is a [word] [ref] for [occasion]", LUKEWARM, 1), ("all in all, this [ref] is [word]", LUKEWARM, 1),
     ("all in all, this [ref] is not a [word]", "triumph|disaster|gem|mess", NEGATED)],
    [("I would not [word] this [ref] to [audience]", "recommend", NEGATED), ("I [word] [part]", "regret", 1),
     ("this [ref] is hardly [word] [price]", "worth", NEGATED), ("it is a [ref] to [word]", "avoid|skip", 1),
     ("all in all, this [ref] is a [word]", "mess|bore|chore|letdown|waste of an evening|disaster", 1)]]


# ---- The writer: draws words and returns text, with its intended sentiment where it has one. ----
class Draw:
    """The random choices of one derivation, with log P(mood, choices so far) in nats for every mood."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        prior = [mood[0] for mood in MOODS.values()]
        self.mood = rng.choices(range(len(prior)), prior)[0]
        self.log_moods = [math.log(p) for p in prior]

    def by_mood(self, rows: list) -> int:
        """An index, in proportion to rows[mood][index]."""
        i = self.rng.choices(range(len(rows[0])), rows[self.mood])[0]
        self.log_moods = [log_p + math.log(row[i] / sum(row)) for log_p, row in zip(self.log_moods, rows)]
        return i

    def pick(self, options, but: str = ""):
        """Whatever the mood: a key of a dict, in proportion to its value; or one of 'a|b|c' or of a list, not `but`."""
        options = options.split("|") if isinstance(options, str) else options
        options = options if isinstance(options, dict) else {entry: 1 for entry in options if entry != but}
        return list(options)[self.by_mood([list(options.values())] * len(MOODS))]

    def fill(self, template: str, **known: str) -> str:
        """The template with its slots filled in, left to right."""
        return re.sub(r"\[(\w+)\]", lambda m: known.get(m[1]) or self.fill(self.pick(SLOTS[m[1]]), **known), template)

    def logprob(self) -> float:
        """log P(choices) in nats, the mood summed out."""
        return math.log(sum(math.exp(log_p) for log_p in self.log_moods))


def sentence(text: str) -> str:
    """Written out: "an" before a vowel, a capital, a full stop."""
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return text[0].upper() + text[1:] + "."


def sentiment(phrase: str) -> float:
    """The weight of a phrase: its sentiment words, scaled by the intensifier it may have."""
    parts = phrase.split()
    return math.prod(INTENSIFIER.get(w, 1.0) for w in parts) * sum(SENTIMENT.get(w, 0.0) for w in parts)


def clause(draw: Draw, topic: str, side: int, companion: str) -> tuple[str, float]:
    """One opinion for (side 0) or against (side 1), as text without a capital, and its sentiment."""
    nouns, adjectives, verbs = TOPICS[topic]
    nouns = "I|" + companion if topic == "room" and companion else nouns
    template, kind, factor = draw.pick(ROOM_CLAUSES if topic == "room" else CLAUSES)
    side = side if factor > 0 else 1 - side                     # "not dull" speaks for
    options = (verbs if kind == "verb" else FEELINGS if kind == "feeling" else adjectives)[side]
    word = draw.pick(options)
    if kind == "degree":
        word = draw.pick(EXTREME_DEGREES if abs(SENTIMENT[word]) > EXTREME else DEGREES[side]) + " " + word
    elif kind == "pair":
        word += " and " + draw.pick(options, but=word)
    known, noun = {"word": word}, ""
    for slot in re.findall(r"\[(noun2?)\]", template):
        noun = known[slot] = draw.pick(nouns, but=noun)
    return draw.fill(template, be="were" if noun.endswith("s") else "was", **known), factor * sentiment(word)


def derive(rng: random.Random) -> tuple[str, float, float]:
    """One review, the log-probability of its text in nats, and its intended sentiment in logits."""
    draw = Draw(rng)
    _, opinion, verdict = zip(*MOODS.values())
    genre, opening = draw.pick(GENRES), draw.pick(OPENINGS)
    companion = draw.pick(COMPANIONS) if "[companion]" in opening else ""
    sentences, total = [draw.fill(opening, genre=genre, companion=companion)], 0.0
    topics = list(TOPICS)                                       # each is talked about at most once
    for kind in draw.pick(PLANS).split():
        side = draw.by_mood(opinion)
        topics.remove(topic := draw.pick(topics))
        main, score = clause(draw, topic, side, companion)
        if kind == "simple":        # no stage for a part of the film: "the ending dragged early on"
            sentences.append(draw.fill("[main]" if topic == "part" else draw.pick(SIMPLE), main=main))
        else:
            template, main_weight, other_weight, same = draw.pick(COMPOUND)
            topics.remove(topic := draw.pick(topics))
            other, other_score = clause(draw, topic, side if same else 1 - side, companion)
            sentences.append(draw.fill(template, main=main, other=other))
            score = main_weight * score + other_weight * other_score
        total += score
    template, phrases, factor = draw.pick(VERDICTS[draw.by_mood(verdict)])
    word, ref = draw.pick(phrases), draw.pick({genre: 4, "film": 1}) if "[ref]" in template else ""
    sentences.append(draw.fill(template, word=word, ref=ref))
    return " ".join(map(sentence, sentences)), draw.logprob(), SCALE * (total + factor * sentiment(word))


def sample_review(rng: random.Random) -> tuple[str, float]:
    """One review and the exact log-probability of its text, in nats."""
    return derive(rng)[:2]
