"""Shortcuts: how far one cue on the surface of the texts tells the answer that is called right.

Where the better answer is mostly the shorter one, a model that picks the shorter one looks as if
it understood. `audit` says, of any questions or comparisons, how right such rules are: one for
each cue (length, sentences, position, first word, frequent words and pairs of words, ...), the
best of them, and a classifier of all words and pairs. `best` gives the answers of the best rule, to
be compared with a model's on the same questions.

**Nothing is scored where it was chosen.** Which way a cue points, and which rule is the best,
comes from a training split. Where there is none, the conversations are dealt into five parts, and
the rules for a part are chosen on the next two. So no two parts choose for each other, which would
tie their errors together and make the intervals too narrow. In labels that mean nothing the best of
200 rules is then as right as chance; of the single rules one in twenty has an interval without it.
The classifier learns from all other parts, and its interval is the wider for it, by the correction
of Nadeau and Bengio (2003, "Inference for the Generalization Error") for training sets that
overlap.

Sets are of two kinds. In most, a rule picks one of several *answers*: the one with more of a cue or
with less; where answers are equal in it, they share the credit. Where all questions have the same
options ("harmful", "harmless") a rule sorts *texts*: each value of its cue goes with an option.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.sparse import hstack
from scipy.special import expit, logsumexp, softmax

from cai_utils import seeds
from cai_utils.evaluation import cues, stats
from cai_utils.evaluation.tables import report

BEST, CLASSIFIER = "best surface rule", "classifier of words and pairs"
COLUMNS = ["rule", "direction", "chosen_on", "estimate", "ci_low", "ci_high", "n"]
PARTS = 5
_STRENGTHS = (0.003, 0.03, 0.3)  # what an item weighs against the squared norm / 2
ALWAYS = ("characters", "words", "sentences", "position")


def audit(rows, train=None, seed=0, classifier=True) -> pd.DataFrame:
    """How right rules of one cue are on questions or comparisons, the best first.

    rows: in the paper's fields of a question, or comparisons (ARCHITECTURE.md, Rows); those whose
    label is exactly 1/2 are left out. train: the same of a training split, from which directions
    and the best rule come, and the classifier learns; None or empty: other rows of the set.

    Columns: rule, direction, chosen_on, estimate (accuracy, equal cues sharing the credit), ci_low,
    ci_high (95 %, bootstrap over conversations; Wilson where all answers are right or wrong and no
    two share one), n (conversations). The first rows are BEST and, with `classifier`, CLASSIFIER.
    No rows where fewer than three conversations have a label; with `train`, where none has.
    ValueError, naming row and field, for a row without texts.
    """
    found = _Audit(rows, train, seed)
    if not len(found.scored):
        return pd.DataFrame(columns=COLUMNS)
    names, directions, credit = found.rules()
    if classifier:
        names.insert(1, CLASSIFIER)
        directions.insert(1, "all at once")
        credit = np.insert(credit, 1, found.classifier(), axis=0)
    estimate, low, high, n = stats.bootstrap_means(
        credit, [item.conversation for item in found.scored])
    table = pd.DataFrame({"rule": names, "direction": directions, "chosen_on": found.chosen_on,
                          "estimate": estimate, "ci_low": low, "ci_high": high, "n": n})
    parts = len(found.learned)
    if classifier and parts > 1:  # its parts learn from each other, which ties their errors
        for end in ("ci_low", "ci_high"):
            middle = table.loc[1, "estimate"]
            wide = middle + (table.loc[1, end] - middle) * np.sqrt(1 + parts / (parts - 1))
            table.loc[1, end] = np.clip(wide, 0, 1)
    first = 1 + classifier
    ranked = table.iloc[first:].sort_values("estimate", ascending=False, kind="stable")
    return pd.concat([table.iloc[:first], ranked], ignore_index=True)


def best(rows, train=None, seed=0) -> list[dict]:
    """What the best rule says of each question, as rows of `multiple_choice.ask`: id, method
    (BEST), correct (0 to 1: a share of 1 where answers are equal). Arguments as for `audit`."""
    found = _Audit(rows, train, seed)
    if not len(found.scored):
        return []
    credit = found.rules()[2][0]
    return [{"id": item.id, "method": BEST, "correct": float(right)}
            for item, right in zip(found.scored, credit, strict=True)]


def top(table, n=10) -> pd.DataFrame:
    """The rows of an `audit` worth keeping: the best rule, the classifier, those ALWAYS asked for,
    and the n that score highest; of several sets, named by column `set`, those of each."""
    if "set" not in table:
        always = table["rule"].isin((BEST, CLASSIFIER, *ALWAYS))
        return table[always | ((~always).cumsum() <= n)].reset_index(drop=True)
    parts = [top(part.drop(columns="set"), n) for _, part in table.groupby("set", sort=False)]
    named = [part.assign(set=name)[["set", *COLUMNS]]
             for name, part in zip(dict.fromkeys(table["set"]), parts, strict=True)]
    return pd.concat(named, ignore_index=True) if named else table


def show(table, n=3) -> None:
    """Print the n first rules of an `audit` beside the best rule and the classifier, with their
    intervals, or that there is none; of several sets, by column `set`, those of each."""
    if not len(table):
        print("no rule is scored: fewer than three conversations have a label")
    for name, part in table.groupby("set", sort=False) if "set" in table else [("", table)]:
        whole = part["rule"].isin((BEST, CLASSIFIER))
        print(f"-- {name}" if name else "-- rules of one cue")
        report(pd.concat([part[whole], part[~whole].head(n)]), ["rule", "direction"])


class _Audit:
    """Items to score, those that choose for them, and the cues of both."""

    def __init__(self, rows, train, seed):
        self.seed = seed
        own, given = cues.read(rows, "rows"), cues.read(train or [], "train")
        self.chosen_on = "training split" if given else "other rows of the set"
        self.folds, self.learned = self._folds(own, given)
        self.scored, items = own if self.folds else [], own + given
        if self.folds:
            labels = cues.labels(items)
            self.form = _Sorting(items, labels) if labels else _Picking(items)

    def _folds(self, own, given):
        """(rows that choose, rows that are scored) for the rules, and for the classifier."""
        if given:
            fold = [(np.arange(len(given)) + len(own), np.arange(len(own)))] if own else []
            return fold, fold
        codes = pd.factorize(pd.Series([item.conversation for item in own], dtype=object))[0]
        n = len({*codes})
        parts = PARTS if n >= PARTS else 3 if n >= 3 else 0
        if not parts:
            return [], []
        part = seeds.stream("shortcuts", self.seed).permutation(n)[codes] % parts
        ahead = (part - np.arange(parts)[:, None]) % parts  # (part that is scored, row)
        places = [np.flatnonzero(one) for one in ahead == 0]
        near = [np.flatnonzero((one > 0) & (one <= parts // 2)) for one in ahead]
        rest = [np.flatnonzero(one > 0) for one in ahead]
        return [*zip(near, places, strict=True)], [*zip(rest, places, strict=True)]

    def rules(self):
        """Names and directions of the rules, the best of them first, and what each is right in,
        (1 + C, N)."""
        names = self.form.names
        credit, words, chosen = np.zeros((1 + len(names), len(self.scored))), [], []
        for fit, score in self.folds:
            accuracy, right, directions = self.form.rules(fit, score)
            credit[1:, score], winner = right, int(np.argmax(accuracy))
            credit[0, score] = right[winner]
            words.append(directions)
            chosen.append(f"{names[winner]}: {directions[winner]}")
        directions = [_most(each) for each in zip(*words, strict=True)]
        return [BEST, *names], [_most(chosen), *directions], credit

    def classifier(self):
        """What the classifier is right in, (N,)."""
        credit = np.zeros(len(self.scored))
        for fit, score in self.learned:
            credit[score] = self.form.classified(fit, score, self.seed)
        return credit


def _most(texts) -> str:
    """The most frequent of the parts' texts, and of how many parts it is."""
    (text, count), *others = Counter(texts).most_common()
    return f"{text} ({count} of {len(texts)} parts)" if others else text


class _Picking:
    """Rules that pick one of an item's answers: that with more of a cue, or with less."""

    def __init__(self, items):
        width = max(len(item.answers) for item in items)
        self.there = np.array([[k < len(item.answers) for k in range(width)] for item in items])
        rows = self.there.nonzero()[0]
        self.texts = [text for item in items for text in item.answers]
        names, values = cues.of_texts(self.texts, [items[i].context for i in rows], rows)
        names.append("position")
        values = np.vstack([values, [place for item in items for place in item.places]])
        full = np.full((len(values), *self.there.shape), np.nan, np.float32)
        full[:, self.there] = values
        self.right = np.zeros(self.there.shape, bool)
        self.right[self.there] = [right for item in items for right in item.right]
        self.conversation = np.array([item.conversation for item in items], object)
        differs = (np.nanmax(full, axis=2) > np.nanmin(full, axis=2)).any(1)
        self.names = [name for name, kept in zip(names, differs, strict=True) if kept]
        # a cue that is the same in all answers of all items is no rule; without any, position is
        self.names = self.names or [names.pop()]
        full = full[differs] if differs.any() else full[-1:]
        self.credit = np.stack([[_picked(sign * values, self.right) for values in full]
                                for sign in (1, -1)])

    def rules(self, fit, score):
        """Accuracy (C,) on the rows `fit`, on which directions are chosen; credit (C, S) on
        `score`; and the directions."""
        found = self.credit[:, :, fit].mean(2)
        more = found[0] >= found[1]
        credit = np.where(more[:, None], *self.credit[:, :, score])
        return found.max(0), credit, [_way(*p) for p in zip(self.names, more, strict=True)]

    @functools.cached_property
    def counts(self):
        return cues.ngrams(self.texts, (1, 2))[1]

    def classified(self, fit, score, seed):
        """Credit (S,) of a logistic regression, without intercept, on differences of counts."""
        at = np.full(self.there.shape, -1)
        at[self.there] = np.arange(len(self.texts))
        counts = cues.shared(self.counts, at[fit][self.there[fit]])
        pairs = [(at[i, a], at[i, b], i) for i in fit for a in np.flatnonzero(self.right[i])
                 for b in np.flatnonzero(self.there[i] & ~self.right[i])]
        better, worse, of = np.array(pairs).T
        apart = counts[better] - counts[worse]

        def losses(rows):
            part = apart[rows]

            def loss(weights):
                margin = part @ weights
                return np.logaddexp(0, -margin).sum(), -(part.T @ expit(-margin))

            return loss

        values = np.full(self.there.shape, np.nan)
        values[self.there] = counts @ _fitted(
            losses, apart.shape[1], self.conversation[of], seed)
        return _picked(values[score], self.right[score])


def _picked(values, right):
    """Credit (N,) for picking the greatest of the values (N, K), nan where there is no answer;
    shared where several are. right (N, K)."""
    picked = values == np.nanmax(values, axis=1, keepdims=True)
    return ((picked & right).sum(1) / picked.sum(1)).astype(np.float32)


def _way(name, more) -> str:
    if name == "position":
        return "the last" if more else "the first"
    if _is_presence(name):
        return "with it" if more else "without it"
    return "more" if more else "less"


def _is_presence(name) -> bool:
    return name.startswith(("word ", "pair ", "first word ")) or name == "words of refusal"


class _Sorting:
    """Rules that sort texts into classes: to each value of a cue, or quarter of its values, the
    class that is most frequent there."""

    BINS = 4

    def __init__(self, items, labels):
        self.labels = labels
        self.texts = [item.context for item in items]
        shown = [cues.answer_in(text) for text in self.texts]
        names, values = cues.of_texts(shown, self.texts, np.arange(len(items)))
        self.y = np.array([labels.index(item.answers[item.right.index(True)]) for item in items])
        self.place = np.array([item.places[item.right.index(True)] for item in items])
        self.conversation = np.array([item.conversation for item in items], object)
        binned = [_binned(row, self.BINS) for row in values]
        binned = [(bins, ["without it", "with it"]) if _is_presence(name) and len(words) == 2
                  else (bins, words) for name, (bins, words) in zip(names, binned, strict=True)]
        kept = [i for i, (_, words) in enumerate(binned) if len(words) > 1]
        self.placed = any(any(item.places) for item in items)  # it is known where options stood
        # without a cue that differs, and without positions: always the most frequent class
        kept = kept or [0] * (not self.placed)
        self.names = [names[i] for i in kept] + ["position"] * self.placed
        self.bins = np.array([binned[i][0] for i in kept], int).reshape(len(kept), len(items))
        self.words = [binned[i][1] for i in kept]

    def rules(self, fit, score):
        """As `_Picking.rules`."""
        one_hot = np.eye(len(self.labels))[self.y[fit]]
        usual = one_hot.sum(0)
        counts = np.stack([(self.bins[:, fit] == b) @ one_hot for b in range(self.BINS)], 1)
        says = np.where(counts.any(2), counts.argmax(2), usual.argmax())  # (C, BINS)
        credit = np.take_along_axis(says, self.bins, 1) == self.y
        directions = [_sorts(*pair, self.labels) for pair in zip(self.words, says, strict=True)]
        if self.placed:
            stands = np.bincount(self.place[fit], minlength=2).argmax()
            credit = np.vstack([credit, self.place == stands])
            directions.append(f"option {stands + 1}")
        credit = credit.astype(float)
        return credit[:, fit].mean(1), credit[:, score], directions

    counts = _Picking.counts

    def classified(self, fit, score, seed):
        """Credit (S,) of a logistic regression on the counts of the whole text."""
        counts = cues.shared(self.counts, fit)
        x = hstack([counts, np.ones((len(self.texts), 1))]).tocsr()
        k, one_hot = len(self.labels), np.eye(len(self.labels))[self.y]

        def losses(rows):
            part, right = x[fit[rows]], one_hot[fit[rows]]

            def loss(weights):
                scores = part @ weights.reshape(-1, k)
                value = logsumexp(scores, axis=1).sum() - (scores * right).sum()
                return value, (part.T @ (softmax(scores, axis=1) - right)).ravel()

            return loss

        weights = _fitted(losses, k * x.shape[1], self.conversation[fit], seed).reshape(-1, k)
        return ((x[score] @ weights).argmax(1) == self.y[score]).astype(float)


def _binned(values, most):
    """Bin (N,) of each value, at most `most` of about equal size, and the words for each bin."""
    known = np.unique(values)
    edges = known[1:] if len(known) <= most else np.unique(
        np.quantile(values, np.arange(1, most) / most, method="higher"))
    edges = edges[edges > known[0]]
    words = [f"below {edges[0]:.3g}"] if len(edges) else [f"{known[0]:.3g}"]
    words += [f"from {edge:.3g}" for edge in edges]
    return np.searchsorted(edges, values, side="right"), words


def _sorts(words, says, labels) -> str:
    """ "below 3: harmless, from 3: harmful", bins of the same class together."""
    classes = [labels[c] for c in says[:len(words)]]
    kept = [i for i in range(len(words)) if i == 0 or classes[i] != classes[i - 1]]
    return ", ".join(f"{words[i]}: {classes[i]}" if len(kept) > 1 else f"always {classes[i]}"
                     for i in kept)


def _fitted(losses, size, groups, seed):
    """Weights (size,) of the least loss, with a penalty on their square as strong as suits a
    held-out quarter of the groups (M,) best. losses: rows -> (weights -> (value, gradient))."""
    if not size:
        return np.zeros(0)

    def fitted(rows, strength):
        loss = losses(rows)

        def penalised(weights):
            value, gradient = loss(weights)
            return strength * value + weights @ weights / 2, strength * gradient + weights

        return minimize(penalised, np.zeros(size), jac=True, method="L-BFGS-B",
                        options={"ftol": 1e-6}).x

    codes, names = pd.factorize(groups)
    held = (seeds.stream("classifier", seed).permutation(len(names)) % 4 == 0)[codes]
    rest, held = np.flatnonzero(~held), np.flatnonzero(held)
    tried = {c: losses(held)(fitted(rest, c))[0] for c in _STRENGTHS} if len(rest) else {}
    return fitted(np.arange(len(groups)), min(tried, key=tried.get, default=_STRENGTHS[0]))
