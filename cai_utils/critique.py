"""Critique -> revision chains (section 3.1 of the paper), and direct revisions (section 3.5).

A base LM reads a chain as one text: the transcript, "CritiqueRequest:", "Critique:",
"RevisionRequest:", "Revision:". A chat model gets the same requests as user turns. A paragraph of a
message, a response or a critique that begins like one of these sections, or like a turn, stands
behind a backslash (`dialogue.Marks`); the constitution's words stand as they are.
"""

from __future__ import annotations

from cai_utils import dialogue
from cai_utils.constitution import draw
from cai_utils.lm.fitting import generate_fitting, report_left_out
from cai_utils.seeds import stable_int

# Where a base LM would go on with the next part of the transcript.
STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nRevisionRequest:")

SECTIONS = dialogue.Marks([r"(?:Human|Assistant|(?:Critique|Revision)(?: ?Request)?):"])


def critique_text(prompt: list[dict], response: str, critique_request: str) -> str:
    """What a base LM is shown to write a critique: the transcript, then the request.

    Ends in "Critique:"; the completion comes back with a leading space.
    """
    return (
        dialogue.transcript(dialogue.with_response(prompt, response), marks=SECTIONS)
        + f"\n\nCritiqueRequest: {critique_request}\n\nCritique:"
    )


def revision_text(
    prompt: list[dict], response: str, critique_request: str, critique: str, revision_request: str
) -> str:
    """What a base LM is shown to revise `response` after its `critique`. Ends in "Revision:"."""
    return (
        critique_text(prompt, response, critique_request)
        + f" {SECTIONS.hide(critique)}\n\nRevisionRequest: {revision_request}\n\nRevision:"
    )


def direct_revision_text(prompt: list[dict], response: str, revision_request: str) -> str:
    """What a base LM is shown to revise `response` without a critique (section 3.5)."""
    return (
        dialogue.transcript(dialogue.with_response(prompt, response), marks=SECTIONS)
        + f"\n\nRevisionRequest: {revision_request}\n\nRevision:"
    )


def revise(
    sampler, rows, constitution, *, n_revisions=4, critiqued=True, n_principles=None,
    few_shot=False, seed=0, temperature=1.0, max_new_tokens=128, stop=(), initial=None,
    critic=None, progress=None,
) -> list[dict]:
    """Chains of `n_revisions` revisions, one per prompt (section 3.1; direct: section 3.5).

    Each step draws one principle per row, independently of all other rows and steps
    (`constitution.draw`, from the first `n_principles`); the model critiques its last response and
    revises it, and the next step starts from the revision. With `critiqued=False` the model is only
    asked for the revision. All rows take a step together.

    rows: {"prompt": messages ending with the user's, "id", ...}; other fields are kept.
    sampler: `sampling.Sampler`, or anything with its `generate` and `tokenizer`.
    initial: the first response of each row; sampled when None.
    critic: a sampler that writes critiques and revisions in place of `sampler`, each in the form of
    its own tokenizer; the first responses stay `sampler`'s.
    few_shot: puts the constitution's `few_shot["critique"]` before every request, without the
    critiques if `critiqued` is False.

    Returns rows with `responses` (n_revisions + 1 texts, the initial one first), `critiques`
    (n_revisions texts, or None where direct), `principles` (their ids) and `empty`: the number of
    empty revisions, in whose place the response before is kept (ARCHITECTURE.md, Rows). Rows whose
    requests with `max_new_tokens` exceed the model's context are left out, and a line says so.

    ValueError for a prompt that does not end with a user message, a wrong number of `initial`
    responses, an empty constitution, `few_shot` without examples, or when no row fits.
    """
    rows = list(rows)
    examples = examples_of(constitution, few_shot, n_principles if n_revisions else None)
    _check(rows, initial)
    if not rows:
        return []
    writer = sampler if critic is None else critic
    as_text = dialogue.uses_transcript(getattr(writer, "tokenizer", None))
    prefix = _few_shot_prefix(examples, critiqued, as_text)

    kept = list(range(len(rows)))  # indices of the rows that fit so far, which key their draws

    def sample(inputs, *key, by=writer):
        ends = STOPS if dialogue.uses_transcript(getattr(by, "tokenizer", None)) else ()
        completions = generate_fitting(
            by, inputs, kept, n=1, temperature=temperature, max_new_tokens=max_new_tokens,
            stop=tuple(dict.fromkeys((*stop, *ends))), seed=stable_int("revise", seed, *key),
            progress=progress)
        return [c and c[0].text.strip() for c in completions]

    def drop(found, *lists):  # without the rows that have None in `found`
        there = [k for k, text in enumerate(found) if text is not None]
        kept[:] = [kept[k] for k in there]
        return [[values[k] for k in there] for values in (found, *lists)]

    last = ([t.strip() for t in initial] if initial is not None
            else sample([row["prompt"] for row in rows], "initial", by=sampler))
    chains = [
        {"id": str(i), **row, "responses": [text], "critiques": [], "principles": [], "empty": 0}
        for i, (row, text) in enumerate(zip(rows, last, strict=True))
    ]
    _, chains = drop(last, chains)
    for step in range(n_revisions):
        prompts, last = [c["prompt"] for c in chains], [c["responses"][-1] for c in chains]
        drawn = [draw(constitution.critiques, seed, i, step, n_principles) for i in kept]
        critiques = [None] * len(kept)
        if critiqued:
            inputs = [_behind(prefix, _critique_input(*item, as_text), writer)
                      for item in zip(prompts, last, drawn, strict=True)]
            critiques, chains, drawn, prompts, last = drop(
                sample(inputs, step, "critique"), chains, drawn, prompts, last)
        inputs = [_behind(prefix, _revision_input(*item, as_text), writer)
                  for item in zip(prompts, last, drawn, critiques, strict=True)]
        revisions, chains, drawn, critiques = drop(
            sample(inputs, step, "revision"), chains, drawn, critiques)
        done = zip(chains, drawn, critiques, revisions, strict=True)
        for chain, principle, critique, revision in done:
            chain["empty"] += not revision
            chain["responses"].append(revision or chain["responses"][-1])
            chain["critiques"].append(critique)
            chain["principles"].append(principle["id"])
    report_left_out("chains", rows, kept)
    return chains


def _check(rows, initial):
    for i, row in enumerate(rows):
        if not row.get("prompt") or row["prompt"][-1].get("role") != "user":
            raise ValueError(f"row {i}: 'prompt' has to be messages that end with a user message")
    if initial is not None and len(initial) != len(rows):
        raise ValueError(f"initial has {len(initial)} responses for {len(rows)} rows")


def examples_of(constitution, few_shot=False, n_principles=None) -> list[dict]:
    """The examples before each request, [] without `few_shot`: ValueError where the constitution
    has none, or not the principles to critique by, so that it is found before other work."""
    examples = constitution.few_shot.get("critique", []) if few_shot else []
    if few_shot and not examples:
        raise ValueError(
            f"constitution {constitution.name!r} has no few_shot critiques: add some to its file "
            "or pass few_shot=False"
        )
    draw(constitution.critiques, 0, 0, 0, n_principles)
    return examples


def _critique_input(prompt, response, principle, as_text):
    """The input that asks for a critique: a text for a base LM, messages for a chat model."""
    if as_text:
        return critique_text(prompt, response, principle["critique_request"])
    return [
        *dialogue.with_response(prompt, response),
        {"role": "user", "content": principle["critique_request"]},
    ]


def _revision_input(prompt, response, principle, critique, as_text):
    """The input that asks for a revision; direct where `critique` is None."""
    request = principle["revision_request"]
    if as_text and critique is None:
        return direct_revision_text(prompt, response, request)
    if as_text:
        return revision_text(prompt, response, principle["critique_request"], critique, request)
    if critique is None:
        messages = dialogue.with_response(prompt, response)
    else:
        messages = dialogue.with_response(
            _critique_input(prompt, response, principle, as_text), critique
        )
    return [*messages, {"role": "user", "content": request}]


def _behind(prefix, asked, sampler):
    """A request behind the examples; its own system message stands before them."""
    if isinstance(asked, str):
        return dialogue.sealed(prefix + asked, getattr(sampler, "tokenizer", None))
    if asked[0]["role"] == "system":
        return [asked[0], *prefix, *asked[1:]]
    return prefix + asked


def _few_shot_prefix(examples, critiqued, as_text):
    """The few-shot prefix in the form of the inputs: one text, or a list of messages."""
    prefix = "" if as_text else []
    for e in examples:
        prompt = e["prompt"]
        if not as_text and prompt[0]["role"] == "system":  # of the example, not of what follows
            text = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
            prompt = [{**prompt[1], "content": text}, *prompt[2:]]
        request = _revision_input(
            prompt, e["response"], e, e["critique"] if critiqued else None, as_text
        )
        if as_text:
            prefix += f"{request} {SECTIONS.hide(e['revision'])}"
        else:
            prefix += dialogue.with_response(request, e["revision"])
    return prefix
