"""A grammar that writes forum posts with a reference summary, and an exact gold reward for any summary of a post.

A post states five facts: who it is about ("my sister Anna"), what they did, what followed, the problem, and the question.
The first two come before what followed; the problem and the question mostly come last, sometimes first. One to six asides
stand anywhere, and in two posts of five one of them names a bystander. A fact or an aside is an entry of a table: a short
form, as summaries have it, and long forms, as posts have it. The reference summaries are those of people in a hurry: they
leave out up to three facts, keep an aside, copy a long form, and say what nobody asked for.

The reward reads both texts for the forms in the tables, whole words in any case, and nothing else:

    kept      facts (of five) that the summary states and the post, too; each once, however often and in whatever form
    invented  facts, asides, persons and names that the summary states and the post does not; each once
    words     of the summary
    reward    max(0, kept - invented) / 5 * min(1, 22 / words)^2

Repeating a fact, listing the tables, guessing two answers, saying nothing, or gluing words together gains nothing; a copy
of the whole post earns 0.14 on average, of its first 22 words 0.35. What a policy can exploit: the words between the facts
are counted, but not read. "Never my sister Anna took my car" keeps two facts, no order or grammar is asked for, and what
no table has ("a goat ate it") is no invention.

    1.00  My sister Anna took my car, we stopped talking and rent is due. Should I apologize?
    0.60  My sister took my car. It was raining. We stopped talking. Should I apologize?
    0.20  My sister Tom took my car. Should I apologize?

(of a post with the five facts of the first line and the rain, and no Tom)
"""

import random
import re

# ---- The facts. One entry a line: the short form, used in summaries, then long forms, used in posts. ----
DID = """
took my car | took my car without asking | drove off in my car at night
broke my phone | dropped my phone on purpose | threw my phone into a river
read my diary | went through my diary | found my diary and read every page
sold my bike | sold my bike to a stranger | put my bike online and kept the cash
lied about a loan | lied to me about a loan | took a loan and hid it from me
ate all my food | ate all the food in my fridge | emptied my fridge in one night
lost my dog | let my dog run away | left the gate open so my dog got out
forgot my birthday | did not remember my birthday | planned nothing at all for my birthday
told my secret | told everyone my secret | shared my secret at dinner
ruined my party | showed up drunk at my party | came to my party and made a scene
stole my idea | used my idea and took the credit | sold my idea to another company
burned the kitchen | left the stove on and burned the kitchen | set a towel on fire in the kitchen
cut my hair | cut off my hair as a joke | took scissors to my hair
kissed my ex | was seen kissing my ex | went out with my ex twice
missed my wedding | did not come to my wedding | missed my wedding for a ball game
quit our band | left our band before a big show | walked out on our band
painted my room | painted my room bright pink | put black paint all over my room
tore my dress | wore my new dress and tore it | cut a hole in my new dress
copied my exam | copied my answers in the exam | cheated by looking at my exam
spent our savings | spent all our savings on a boat | lost our savings in a card game
moved into my flat | moved in with two suitcases | has been sleeping on my couch since May
blocked me | blocked me on every app | removed me from the group chat
got a snake | brought home a snake | bought a snake and let it loose
sent rude texts | sent me ten rude texts | wrote me some very rude texts
"""
FOLLOWED = """
we stopped talking | we did not speak for a month | there has been silence between us
I yelled | I lost my temper and yelled | I started yelling in public
I moved out | I packed a bag and left | I went to live in a hotel
my mother cried | my mother burst into tears | it made my mother cry
we got fired | the company fired us both | both of us lost our jobs
the police came | the police came to our door | somebody called the police on us
I got sick | I felt sick for days | I got so sick that I stayed in bed
the neighbors complained | the neighbors wrote a complaint | all the neighbors came to complain
I failed a test | I failed an important test | I could not study and failed my test
we went to court | we ended up in court | a judge had to hear us
the trip was canceled | we had to cancel the trip | our trip fell through
I threw a plate | I threw a plate at the wall | a plate flew across the room
my father blamed me | my father said it was all my fault | my father put the blame on me
I cried at work | I broke down crying at work | I sat in tears at my desk
we lost the lease | our lease was ended early | we got kicked out of our lease
I got a bill | a huge bill came in the mail | I had to pay a huge bill
my grades dropped | my grades went down fast | my teachers saw my grades fall
a video spread | somebody filmed it and the video spread | a video of it was all over the internet
I started drinking | I began to drink every night | I went back to drinking
a window broke | a window got broken in the fight | one of us smashed a window
I took revenge | I took my revenge the next day | I planned my revenge and did it
friends took sides | our friends had to pick sides | half of our friends picked a side
I lost sleep | I could not sleep for two weeks | I lay awake night after night
I ran away | I ran away to the coast | I got on a bus and ran off
"""
PROBLEM = """
rent is due | the rent is due on Friday | I have to pay the rent this week
we share a room | we sleep in the same room | we only have one room for the two of us
we work together | we sit in the same office | we see each other at work every day
a baby is coming | there is a baby on the way | a baby will be born in June
grandma is ill | my grandmother has weeks to live | my grandmother is in the hospital
I have no job | I am out of work | nobody will hire me
the wedding is near | the wedding is in two weeks | we are both invited to the same wedding
I owe money | I still owe a lot of money | I borrowed money that I can not pay back
my visa ends | my visa runs out in March | I must leave the country without a visa
I need surgery | I have to get surgery soon | the doctors want to operate on me
we own a house | both our names are on the house | we bought the house together
the kids are scared | the children hear every word | our children are scared
exams are close | exams start on Monday | I have to study for final exams
there is no heating | the heating is off and it is cold | we have no heating for the winter
my allergy is bad | I have a bad allergy | my allergy gets worse each day
I live far away | my place is four hours away | I live on the other side of the country
I feel guilty | I feel guilty all the time | the guilt is eating me up
we share an account | all the cash is in one account | our pay goes into the same account
nobody believes me | nobody in town believes my story | people think I made it up
I have no proof | there is no proof of anything | I can not prove a thing
Christmas is near | everyone meets at Christmas | we must sit at one table at Christmas
I am still in love | I still have strong feelings | my heart has not moved on
the roof leaks | water comes through the roof | the roof has a big hole
I promised to help | I gave my word to help | I made a promise to help out
"""
QUESTION = """
should I apologize | should I say sorry first | do I need to say that I am sorry
should I forgive | is it time to forgive and forget | can I ever forgive this
should I sue | should I talk to a lawyer | is it worth getting a lawyer
should I move | would it be better to move to a new city | should I look for a new place to live
should I wait | should I just wait and see | is it better to give it time
should I tell my parents | do my parents have to know | should I let my parents know
should I quit | should I hand in my notice | is it wise to leave my job
should I write a letter | would a long letter help | should I put it all in a letter
how do I say no | how can I say no politely | what is a nice way to say no
how do I get paid | how can I make sure I get paid | what can I do to get paid
am I wrong | am I the bad guy here | was it wrong of me to be upset
should I get therapy | do I need a therapist | would therapy help us
should I change the locks | is it too much to change the locks | should I buy a new lock for the door
should I lie | is a small lie okay | can I just make up a lie
should I call | should I pick up the phone and call | is it time to make the call
should I cut contact | should I cut all contact | is it okay to never meet again
should I bake a cake | would a cake fix things | should I bring a cake to make peace
how do I stay calm | how can I keep calm | what helps to stay calm
who should pay | who has to pay for all this | is it fair that I pay for everything
should I report it | should I make an official report | do I have to report this
how do I trust again | how can I learn to trust again | can trust ever come back
should I ask for help | who could I ask for help | is it weak to ask for help
should I let it go | is it best to let it go | can I just let it go
should I stay | is it stupid to stay | do I have a reason to stay
"""
ASIDES = """
my English is bad | English is not my first language so please be kind
I am on my phone | I am typing this on an old phone
it was raining | it rained for three days and my shoes got wet
I had pizza | I had a cold pizza in the oven
my cat slept | my cat slept on the chair and saw nothing
I like football | there was a football game on the radio
I drank tea | I was drinking my second cup of tea
I was reading | I was reading a book about ships
the bus was late | the bus was late again and very full
my knee hurts | my knee still hurts from running
I like to cook | I like to cook soup on Sundays
I have a garden | I grow tomatoes and beans in a small garden
I play the piano | I play the piano when nobody is at home
my socks are green | I bought green socks in the market
I turned thirty | I turned thirty in the spring
I study history | I study history in a small college
coffee is bad here | the coffee here is bad but cheap
I missed a movie | I wanted to see a movie that evening
I own two hats | I own two hats and like the red one
the lamp is new | the lamp on my desk is new
I like the sea | we grew up close to the sea
I watch birds | I watch birds in the morning
my laptop is slow | my laptop is slow and makes a noise
the soup was good | the soup at that place was good
"""
BYSTANDERS_TEXT = """
[name] agrees | [name] from work says that I think too much
[name] laughed | my friend [name] laughed when I told the story
[name] has a boat | [name] from next door has a boat by the way
[name] was there | a guest called [name] was there and ate cake
"""
RELATIONS = {"f": "sister|aunt|wife|girlfriend|boss|neighbor|roommate|cousin|coworker|landlord|teacher|coach",
             "m": "brother|uncle|husband|boyfriend|boss|neighbor|roommate|cousin|coworker|landlord|teacher|coach"}
NAMES = {"f": "Anna|Emma|Julia|Laura|Nina|Sara|Maria|Lucy|Kate|Ella|Rosa|Clara",
         "m": "Tom|Paul|David|Simon|Peter|Leo|Jack|Adam|Oscar|Felix|Ben|Karl"}


def table(text: str) -> list[list[str]]:
    """Entries, each a list of its forms, the short one first."""
    return [[form.strip() for form in line.split("|")] for line in text.strip().splitlines()]


TABLES = {"did": table(DID), "followed": table(FOLLOWED), "problem": table(PROBLEM), "question": table(QUESTION),
          "aside": table(ASIDES)}
BYSTANDERS = table(BYSTANDERS_TEXT)

# ---- The reward. ----
FACTS, BUDGET = ("who", "did", "followed", "problem", "question"), 22  # BUDGET: words that a summary may have at no cost
MEANING = {form.lower(): (kind, entry[0]) for kind, entries in TABLES.items() for entry in entries for form in entry}
NAME, RELATION = ("|".join(group.values()).lower() for group in (NAMES, RELATIONS))
# longer forms first: a short form that begins a long one must not hide it
PHRASE = re.compile(rf"\b(?:{'|'.join(sorted(MEANING, key=len, reverse=True))}|my (?:{RELATION}) (?:{NAME})|{NAME})\b")


def read_facts(text: str) -> set[tuple[str, str]]:
    """What a text states: (kind, short form) of facts and asides, ("who", "my sister anna"), ("name", "tom")."""
    forms = PHRASE.findall(" ".join(text.lower().split()))
    return {MEANING.get(form, ("who" if " " in form else "name", form)) for form in forms}


def gold_reward(text: str) -> float:
    """The reward, 0 to 1, of all that follows the first "TL;DR:", as a summary of all before it."""
    post, _, summary = text.partition("TL;DR:")
    stated, told = read_facts(post), read_facts(summary)
    names = {("name", form.split()[-1]) for kind, form in stated if kind == "who"}  # Anna is my sister Anna
    kept = sum(kind in FACTS for kind, _ in stated & told)
    invented = len(told - stated - names)
    words = len(re.findall(r"\w+", summary))  # not split(): "rent is due,am I wrong" is six words, with or without a space
    return max(0, kept - invented) / len(FACTS) * min(1.0, BUDGET / max(1, words)) ** 2


# ---- The writer. [slot] stands for a text already known. ----
SUBREDDITS = "advice|family|relationships|work|legal|life"
TITLES = "I need advice|What would you do?|This is driving me crazy|A strange story|Please help me decide|"\
         "Need help with my [relation]"
WHO_DID = "my [relation] [name] [did]|[when] my [relation] [name] [did]|this is about my [relation] [name]; [when] [name] [did]"
WHEN = "last week|yesterday|in the summer|two months ago|on Monday|last year"
THEN = "after that [followed]|then [followed]|because of that [followed]|in the end [followed]|so [followed]"
PROBLEM_FIRST = "my problem is that [problem]|I should say that [problem]"
PROBLEM_LAST = "the problem is that [problem]|what makes it hard is that [problem]|and now [problem]|also [problem]"
OPENERS = "long story short|so basically|to keep it short for you all|in short"
CLOSERS = "please help me|I do not know what to do anymore|thanks for reading all of this|any advice is welcome"
LEFT_OUT = {0: 30, 1: 30, 2: 25, 3: 15}  # facts that a reference summary leaves out: relative frequency


def pick(rng: random.Random, options: str | list):
    return rng.choice(options.split("|") if isinstance(options, str) else options)


def fill(template: str, **known: str) -> str:
    return re.sub(r"\[(\w+)\]", lambda slot: known[slot[1]], template)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def sample_post(rng: random.Random) -> tuple[str, str]:
    """A prompt, from "SUBREDDIT:" to "TL;DR:", and its reference summary, with the leading space of a response."""
    gender, other_gender = pick(rng, "f|m"), pick(rng, "f|m")
    relation, name = pick(rng, RELATIONS[gender]), pick(rng, NAMES[gender])
    entries = {kind: pick(rng, TABLES[kind]) for kind in FACTS[1:]}
    long = {kind: pick(rng, entry[1:]) for kind, entry in entries.items()}
    asides = rng.sample(TABLES["aside"], rng.randint(1, 6))
    if rng.random() < 0.4:
        bystander = pick(rng, [n for n in NAMES[other_gender].split("|") if n != name])
        asides[0] = [fill(form, name=bystander) for form in pick(rng, BYSTANDERS)]

    # the post
    problem_first, question_first = rng.random() < 0.2, rng.random() < 0.2
    known = {**long, "relation": relation, "name": name, "when": pick(rng, WHEN)}
    story = fill(pick(rng, WHO_DID), **known).split("; ") + [fill(pick(rng, THEN), **known)]
    problem = fill(pick(rng, PROBLEM_FIRST if problem_first else PROBLEM_LAST), **known)
    story = [problem] + story if problem_first else story + [problem]
    story = [long["question"] + "?"] + story if question_first else story + [long["question"] + "?"]
    for aside in asides:
        story.insert(rng.randint(0, len(story)), pick(rng, aside[1:]))
    prompt = (f"SUBREDDIT: r/{pick(rng, SUBREDDITS)}\n\nTITLE: {fill(pick(rng, TITLES), relation=relation)}\n\n"
              f"POST: {' '.join(map(sentence, story))}\n\nTL;DR:")

    # its summary
    out = set(rng.sample(FACTS, rng.choices(list(LEFT_OUT), LEFT_OUT.values())[0]))
    short = {kind: pick(rng, entry[1:]) if rng.random() < 0.1 else entry[0] for kind, entry in entries.items()}
    person = f"my {relation}" if "who" in out else f"my {relation} {name}"
    clauses = [f"I have trouble with {person}" if "did" in out else f"{person} {short['did']}"]
    clauses += [short[kind] for kind in ("followed", "problem") if kind not in out]
    if rng.random() < 0.3:
        clauses.insert(rng.randint(1, len(clauses)), pick(rng, asides)[0])
    if rng.random() < 0.25:
        clauses[0] = f"{pick(rng, OPENERS)}, {clauses[0]}"
    if len(clauses) > 1 and rng.random() < 0.5:
        clauses = [", ".join(clauses[:-1]) + " and " + clauses[-1]]
    if "question" not in out:
        clauses.append(short["question"] + "?")
    if rng.random() < 0.25:
        clauses.append(pick(rng, CLOSERS))
    return prompt, " " + " ".join(map(sentence, clauses))
