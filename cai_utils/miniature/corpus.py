"""The pretraining corpus of the miniature's models.

It is a stand-in for what a web-trained LM has seen: dialogues by writers of mixed quality, facts,
critiques with revisions, direct revisions, and questions with and without chains of thought. Its
texts use the formats of `critique` and `multiple_choice`. One model of what writers perceive
(`world.perceive_*`, `world.notices`) is behind all of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import partial

from cai_utils import constitution, critique, dialogue, multiple_choice
from cai_utils.miniature import world
from cai_utils.miniature.judge import judge
from cai_utils.miniature.world import norm, text_of

SHARES = {  # weights of the kinds of documents
    "dialogue": 22,
    "facts": 14,
    "critique": 22,
    "direct": 11,
    "question": 11,
    "question_cot": 10,
    "identify": 4,
    "classify": 6,
    "quote": 12,
    "list": 6,
}

QUESTION_TRIES = 4
EXAMPLES = (80, 13, 7)  # per cent of question documents with 0, 1, 2 answered examples in front
SEVERITY_WORDS = {1: "mild ", 2: "grave "}
YES = ("No", "Yes")
NUMBERS = ("zero", "one", "two", "three", "four")
IDENTIFY = "What is the answer like?"
CLASSIFY = "Which harm does the answer bring?"
LETTERS = " (A)", " (B)", " (C)", " (D)", " (E)", " (F)", " (G)", " (H)", " (I)"


def _quote(sentence) -> str:
    """The words of a step up to its thing, as critiques and answers quote it: "Use dax"."""
    return sentence.text.split(f" {sentence.thing} ")[0] + f" {sentence.thing}"


def _use_words(use: str) -> str:
    """A use and what it brings: "burning, grave fire"."""
    return f"{use}, {SEVERITY_WORDS.get(world.SEVERITY.get(use), '')}{world.BRINGS[use]}"


# ------------------------------------------------------------------------- critiques and revisions
def _critic(request, response, focus, rng) -> tuple[str, set[str], bool]:
    """A writer's critique of a response: its text, the things noticed, whether rudeness was."""
    remarks, noticed, rude = [], set(), False
    for sentence in response:
        if sentence.thing:
            percept = world.perceive_thing(sentence.thing, request, rng)
            if world.notices(percept, focus, rng):
                noticed.add(sentence.thing)
                remarks.append(f"{_quote(sentence)}: {percept.kind}, harms the {request.obj}.")
        elif sentence.type == "rude" and rng.random() < norm("notice_any"):
            rude = True
            remarks.append("The answer is rude.")
        elif sentence.type == "evade" and rng.random() < norm("notice_any"):
            remarks.append("The answer avoids the question.")
    return " ".join(remarks) or "Nothing in the answer is harmful.", noticed, rude


def _revise(request, response, noticed, rude, manner, rng, split):
    """The response without what was noticed, otherwise word for word, plus what `manner` asks."""
    seen = world.perceive_goal(request, rng)
    kept = [
        s
        for s in response
        if not (s.thing in noticed and s.thing) and not (rude and s.type == "rude")
    ]
    if not any(
        s.type in ("step", "alternative", "evade", "object", "explain", "rude") for s in kept
    ):
        if seen.hurts:
            if rng.random() < norm("revise_engaged"):
                return world.engage(
                    request, seen.kind, rng, split, 0.9 if manner == "offer" else 0.3
                )
            return [world.say("evade", rng)]
        pool = world.things_for(split, seen.kind, request.obj)
        return [world.step(rng.choice(pool), request.obj, rng.choice(world.STEP_VERBS))]
    if seen.hurts:
        types = {s.type for s in kept}
        if manner == "engage" and types <= {"evade", "object", "chat"}:
            return world.engage(request, seen.kind, rng, split, 0.3)
        if manner == "explain" and "explain" not in types:
            kept = [s for s in kept if s.type != "evade"] + [world.explain(request, seen.kind)]
        if manner == "offer" and "alternative" not in types:
            kept = kept + [world.alternative(request, rng, split)]
    return kept


def _revision_document(rng, principles, critiqued: bool) -> tuple[str, str]:
    request = world.draw_request(rng, kind=rng.choices(world.KINDS, (1, 1, 3))[0])
    response = world.respond(request, rng)
    for _ in range(rng.choices((0, 1, 2), (5, 3, 2))[0]):  # later links of a chain
        focus, manner = rng.choice(principles)["id"].split("-")
        _, noticed, rude = _critic(request, response, focus, rng)
        response = _revise(request, response, noticed, rude, manner, rng, "train")
    principle = rng.choice(principles)
    focus, manner = principle["id"].split("-")
    text, noticed, rude = _critic(request, response, focus, rng)
    revision = text_of(_revise(request, response, noticed, rude, manner, rng, "train"))
    turns = request.prompt(), text_of(response)
    if not critiqued:
        return critique.direct_revision_text(*turns, principle["revision_request"]), f" {revision}"
    asked = critique.critique_text(*turns, principle["critique_request"])
    shown = critique.revision_text(
        *turns, principle["critique_request"], text, principle["revision_request"]
    )
    return asked, f"{shown.removeprefix(asked)} {revision}"


# ------------------------------------------------------------------------------------- questions
def _assess(request, response, focus, rng) -> dict:
    """A writer's assessment of one response, with its chain of thought as `text`."""
    goal = world.perceive_goal(request, rng)
    steps, harm, fits, kinds = [], 0, 0, []
    for s in response:
        if s.thing:
            percept = world.perceive_thing(s.thing, request, rng)
            words = f"{_quote(s)}: {_use_words(percept.use)}"
            if world.notices(percept, focus, rng):
                harm += percept.severity
                kinds.append(percept.kind)
                words += f", harms the {request.obj}"
            elif percept.kind == goal.kind:
                words += f", fits the {request.goal}"
            fits += percept.kind == goal.kind
            steps.append(words + ".")
        elif s.type == "rude":
            harm += 1
            steps.append("It is rude.")
        elif s.type == "evade":
            steps.append("It avoids the question.")
        elif s.type == "explain":
            steps.append("It explains the harm.")
    types = {s.type for s in response}
    engaged = "explain" in types and not fits
    helpful = 1 + min(3, fits) if fits else (goal.hurts * (engaged + ("alternative" in types)))
    harm = min(harm, 4)
    steps.append(f"Harm {NUMBERS[harm]}, help {NUMBERS[helpful]}.")
    return {
        "text": " ".join(steps),
        "harm": harm,
        "helpful": helpful,
        "evasive": bool(types & {"evade", "object"}) and not (engaged or fits),
        "engaged": engaged,
        "rude": "rude" in types,
        "kinds": kinds,
    }


def _better(a: dict, b: dict, manner: str, rng) -> int:
    """0 where a writer prefers the first under a principle of this manner, else 1."""
    if a["harm"] == b["harm"] and manner == "harmless" and a["engaged"] != b["engaged"]:
        if (b if a["engaged"] else a)["evasive"]:
            engaged = 0 if a["engaged"] else 1
            return engaged if rng.random() < norm("answer_prefers_engaged") else 1 - engaged
    noise = norm("answer_noise")
    first = _utility(a, manner) + rng.gauss(0, noise)
    return 0 if first > _utility(b, manner) + rng.gauss(0, noise) else 1


def _utility(found: dict, manner: str) -> float:
    """Utility of an assessed response under a principle of this manner, in steps of harm."""
    return {
        "harmless": -found["harm"],
        "engaged": -found["harm"] - found["evasive"],
        "kind": -found["harm"] - found["rude"],
        "hhh": found["helpful"] - norm("hhh_harm_weight") * found["harm"],
    }[manner]


def pair(rng, split, kind=None):
    """A request of a kind (None: mostly red-team) and two different responses by writers."""
    request = world.draw_request(rng, split, kind or rng.choices(world.KINDS, (1, 1, 3))[0])
    while True:
        a, b = (world.respond(request, rng, split) for _ in range(2))
        if text_of(a) != text_of(b):
            return request, a, b


def _question_document(rng, principle, cot: bool) -> tuple[str, str]:
    focus, manner = principle["id"].split("-")
    for _ in range(QUESTION_TRIES):  # most questions are about answers that differ in what is asked
        request, a, b = pair(rng, "train")
        found = [_assess(request, r, focus, rng) for r in (a, b)]
        if abs(_utility(found[0], manner) - _utility(found[1], manner)) >= 1:
            break
    answer = LETTERS[_better(*found, manner, rng)]
    text = multiple_choice.question_text(
        request.prompt(), text_of(a), text_of(b), principle["principle"], cot
    )
    if cot:
        steps = f" (A) {found[0]['text']} (B) {found[1]['text']}"
        return text, f"{steps}\n\n{multiple_choice.ANSWER_LEAD}{answer}"
    return text, answer


def options_text(request, response, question, options, cot=False) -> str:
    """A question about one whole conversation, with any number of options."""
    turns = dialogue.with_response(request.prompt(), text_of(response))
    short = {"user": "H", "assistant": "A"}
    body = "".join(f"\n\n{short[t['role']]}: {t['content']}" for t in turns)
    listed = zip(LETTERS, options, strict=False)
    body += f"\n\n{question}" + "".join(f"\n{letter} {option}" for letter, option in listed)
    lead = multiple_choice.COT_LEAD if cot else multiple_choice.ANSWER_LEAD
    return f"\n\nHuman: Read this conversation.{body}\n\nAssistant: {lead}"


def one_harm(rng, split):
    """A request and response whose harm is of one kind only, with that kind."""
    while True:
        request = world.draw_request(rng, split, "redteam")
        response = world.respond(request, rng, split, "comply")
        kinds = judge(dialogue.with_response(request.prompt(), text_of(response)))["harms"]
        if len(kinds) == 1:
            return request, response, kinds[0]


def _single_document(rng, task: str, cot: bool) -> tuple[str, str]:
    if task == "identify":
        options = rng.sample(("harmful", "harmless"), 2)
        request, response, _ = pair(rng, "train")
        found = _assess(request, response, "any", rng)
        answer = options.index("harmful" if found["harm"] else "harmless")
    else:
        options = list(world.HARMS)  # always in the same order
        request, response, kind = one_harm(rng, "train")
        found = _assess(request, response, "any", rng)
        answer = options.index(found["kinds"][0] if found["kinds"] else kind)
    question = IDENTIFY if task == "identify" else CLASSIFY
    text = options_text(request, response, question, options, cot)
    if cot:
        return text, f" {found['text']}\n\n{multiple_choice.ANSWER_LEAD}{LETTERS[answer]}"
    return text, LETTERS[answer]


# -------------------------------------------------------------------------------- other documents
def _dialogue_document(rng) -> tuple[str, str]:
    request = world.draw_request(rng)
    response = text_of(world.respond(request, rng))
    return dialogue.transcript(request.prompt(), add_generation_prompt=True), f" {response}"


def _facts_document(rng) -> tuple[str, str]:
    facts = []
    for _ in range(rng.randint(6, 10)):
        what = rng.choices(("thing", "goal", "object", "plan"), (3, 2, 3, 4))[0]
        if what == "thing":
            thing = rng.choice(world.THINGS)
            verb = rng.choice(world.STEP_VERBS)
            facts.append(f"{verb} {thing}: {_use_words(world.USE_OF[thing])}.")
        elif what == "goal":
            goal = rng.choice(world.GOALS)
            facts.append(f"A {goal} brings {world.GOAL_BRINGS[goal]}.")
        elif what == "object":
            kind, obj = rng.choice(list(world.HARMS)), rng.choice(world.OBJECTS)
            facts.append(f"Can {kind} harm the {obj}? {YES[obj in world.HURTS[kind]]}.")
        else:
            plan = world.draw_request(rng, kind=rng.choice(world.KINDS))
            does = YES[plan.kind == "redteam"]
            facts.append(f"Can a {plan.goal} harm {plan.owner} {plan.obj}? {does}.")
    return "", " " + " ".join(facts)


def _quote_document(rng) -> tuple[str, str]:
    """Words, then the same words again: small models find copying hard, and revisions need it."""
    words = rng.sample([*world.THINGS, *world.GOALS, *world.OBJECTS], rng.randint(8, 24))
    text = f" {' '.join(words)}."
    return f"{text}\n\n", text


def _list_document(rng) -> tuple[str, str]:
    """Lettered options, then each with its letter in another order, as answers name options."""
    pool = list(world.HARMS) if rng.random() < 0.5 else [*world.THINGS, *world.GOALS]
    listed = list(zip(LETTERS, rng.sample(pool, rng.randint(2, len(LETTERS))), strict=False))
    context = "".join(f"\n{letter} {word}" for letter, word in listed)
    rng.shuffle(listed)
    return f"{context}\n\n", "".join(f" {word}{letter}." for letter, word in listed)


def documents(seed: int, n: int) -> Iterator[tuple[str, str]]:
    """n documents of the pretraining corpus, each (context, continuation); reproducible by seed.

    The two parts are one text. The context was given to the writer (drawn at random: only its form
    can be learned), the continuation was written by them.
    """
    rng = random.Random(seed)
    rules = constitution.load("miniature")
    kinds, weights = list(SHARES), list(SHARES.values())
    for _ in range(n):
        kind = rng.choices(kinds, weights)[0]
        if kind == "dialogue":
            yield _dialogue_document(rng)
        elif kind == "facts":
            yield _facts_document(rng)
        elif kind == "quote":
            yield _quote_document(rng)
        elif kind == "list":
            yield _list_document(rng)
        elif kind in ("critique", "direct"):
            yield _revision_document(rng, rules.critiques, kind == "critique")
        else:
            principle, cot = rng.choice(rules.comparisons), rng.random() < 0.5
            if kind.startswith("question"):
                one = partial(_question_document, rng, principle, kind == "question_cot")
            else:
                one = partial(_single_document, rng, kind, cot)
            shots = rng.choices((0, 1, 2), EXAMPLES)[0]
            examples = "".join(context + text for context, text in (one() for _ in range(shots)))
            context, text = one()
            yield examples + context, text


def quotes(seed: int, n: int) -> Iterator[tuple[str, str]]:
    """n documents of repeated words and of lists: read first, so that a model learns to copy."""
    rng = random.Random(seed)
    return ((_list_document if i % 3 == 2 else _quote_document)(rng) for i in range(n))


def corpus_hash(seed: int = 0, n: int = 2000) -> str:
    """SHA-256 of the first n documents: ties shipped weights to the world that they learned."""
    return hashlib.sha256("\x00".join(a + b for a, b in documents(seed, n)).encode()).hexdigest()
