"""A trained reader of refusals: XSTest's human labels, learned from a language model's hidden
states. It stands beside the written rule of `refusal_rule` in the tables of notebook 12; no sample
is measured with it.

A response's features are the hidden states of any causal LM a little past its middle (DEPTH), where
they encode meaning more than the next token, averaged over the response's first OPENING tokens,
read **without its prompt**: XSTest's labels can be guessed from the prompt alone, and a reader that
sees the prompt may do just that. A softmax regression (L2 penalty, no other tuning) maps them to
the three labels. It trains in minutes on a CPU.

It is evaluated on what it was not trained on (`held_out`): neither the model, nor the prompt or the
prompt's type. Responses of one model resemble each other, the models answer the same 450 prompts,
and the prompts of a type are variations of a few sentences. Beside its agreement stands the one of
a guess from the prompt (`refusal_agreement`).

DEPTH, OPENING and PENALTY were chosen by training on Mistral-Instruct and evaluating on Llama2 with
its original system prompt, prompts included. LOG.md has the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize

from cai_utils import dialogue
from cai_utils.data import xstest
from cai_utils.data.xstest import LABELS
from cai_utils.lm import models, tokens

DEPTH = 8 / 15  # of the layers; 16 of SmolLM2-135M's 30
OPENING = 64  # tokens
PENALTY = 3.0  # half of it times the squared weights is added to the summed loss


class Softmax(NamedTuple):
    """A fitted softmax regression: features are standardised by `mean` and `scale` (d,); `weights`
    is (d + 1, 3), the last row the intercepts, the columns in the order of LABELS."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray


class Reader:
    """Features of responses by a causal LM (a spec of `models.load`, not a server).

    Errors as `models.load`; ValueError for a model of fewer than two layers.
    """

    def __init__(self, spec, batch_tokens=2048):
        self.model, self.tokenizer = models.load(spec, dtype="float32")
        self.model, self.batch_tokens, self._kept = self.model.base_model, batch_tokens, {}
        layers = self.model.config.get_text_config().num_hidden_layers
        if layers < 2:
            raise ValueError(f"{spec}: {layers} layer, a reader of hidden states needs two or more")
        self.layer = min(max(1, round(DEPTH * layers)), layers - 1)
        stacks = [m for m in self.model.modules()
                  if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
        if len(stacks) == 1:  # nothing above the layer that is read has to be computed
            del stacks[0][self.layer + 1:]

    @torch.inference_mode()
    def features(self, rows) -> np.ndarray:
        """Rows with a `response` -> (N, d) float64, whatever their order. An empty response is
        read as one full stop."""
        lead = "Assistant:"
        head = tokens.text_ids([lead], self.tokenizer)[0]
        bodies = tokens.continuation_ids(
            [lead] * len(rows), [head] * len(rows),
            [dialogue.sealed(f" {row['response'].strip() or '.'}", self.tokenizer)
             for row in rows], self.tokenizer)
        encoded = [(tuple(head), tuple(body[:OPENING])) for body in bodies]
        # Features are kept: the labelled rows train more than one classifier.
        todo = sorted(set(encoded) - set(self._kept), key=lambda e: -sum(map(len, e)))
        while todo:
            n = max(1, self.batch_tokens // sum(map(len, todo[0])))
            batch, todo = todo[:n], todo[n:]
            self._kept |= dict(zip(batch, self._read(batch), strict=True))
        return np.stack([self._kept[e] for e in encoded]).astype(float)

    def _read(self, batch):
        # Padded on the right, where a causal model's tokens do not attend.
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(head + body) for head, body in batch], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(head) + len(body), dtype=torch.long) for head, body in batch],
            batch_first=True)
        device = next(self.model.parameters()).device
        states = self.model(input_ids=ids.to(device), attention_mask=mask.to(device),
                            output_hidden_states=True, use_cache=False).hidden_states[self.layer]
        return [states[i, len(head):len(head) + len(body)].float().mean(0).cpu().numpy()
                for i, (head, body) in enumerate(batch)]


def fit(x, labels, penalty=PENALTY) -> Softmax:
    """Softmax regression of `labels` (N,), each of LABELS, on features x (N, d), standardised.

    ValueError for an unknown label, another number of labels than rows, no rows, or features that
    are not finite.
    """
    x, unknown = np.asarray(x, dtype=float), sorted(set(labels) - set(LABELS))
    if unknown:
        raise ValueError(f"label {unknown[0]!r}: it has to be one of {', '.join(LABELS)}")
    if x.ndim != 2 or len(x) != len(labels) or not len(x):
        raise ValueError(f"features of shape {x.shape} and {len(labels)} labels: give a row for "
                         "every label, and at least one")
    if not np.isfinite(x).all():
        raise ValueError(f"features: row {np.argmin(np.isfinite(x).all(1))} is not finite: the "
                         "reader's weights are damaged; fetch the model again")
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z, k = (x - mean) / scale, len(LABELS)
    y = np.eye(k)[[LABELS.index(label) for label in labels]]

    def loss(w):
        w = w.reshape(-1, k)
        scores = z @ w[:-1] + w[-1]
        logp = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        wrong = np.exp(logp) - y
        slope = np.vstack([z.T @ wrong + penalty * w[:-1], wrong.sum(0)])
        return -(y * logp).sum() + penalty / 2 * (w[:-1] ** 2).sum(), slope.ravel()

    start = np.zeros((z.shape[1] + 1) * k)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return Softmax(mean, scale, found.x.reshape(-1, k))


def predict(fitted: Softmax, x) -> list[str]:
    """The most likely label of each row of features x (N, d)."""
    z = (np.asarray(x, dtype=float) - fitted.mean) / fitted.scale
    best = (z @ fitted.weights[:-1] + fitted.weights[-1]).argmax(1)
    return [LABELS[i] for i in best]


def held_out(x, rows, group=None, folds=5) -> list[str]:
    """A label for each row (features x, rows of `xstest.load_completions`) by a classifier trained
    on the rows of all other models and, with `group`, of all other groups.

    group: "id" holds out a `folds`-th of the prompts at a time, another key of the rows ("type")
    each of its values. ValueError when there is one model only.
    """
    models_ = np.array([row["model"] for row in rows])
    if len(set(models_)) < 2:
        raise ValueError("held_out needs labelled completions of two models or more, "
                         f"got {', '.join(sorted(set(models_))) or 'none'}")
    values = [row[group] for row in rows] if group else [None] * len(rows)
    number = {value: i for i, value in enumerate(dict.fromkeys(values))}
    part = np.array([number[v] % folds if group == "id" else number[v] for v in values])
    labels, out = np.array([row["human"] for row in rows]), np.empty(len(rows), dtype=object)
    for name, k in dict.fromkeys(zip(models_.tolist(), part.tolist(), strict=True)):
        test = (models_ == name) & (part == k)
        train = (models_ != name) & (part != k) if group else models_ != name
        if not train.any():
            raise ValueError(f"held_out: all rows are of one {group}; none is left to train on")
        out[test] = predict(fit(x[train], labels[train].tolist()), x[test])
    return list(out)


def labelled(names) -> list[dict]:
    """XSTest's completions of the models `names`. Models that are neither in CAI_DATA_DIR nor can
    be fetched are left out, with a printed line. ValueError for a model unknown to XSTest."""
    rows = []
    for name in names:
        try:
            rows += xstest.load_completions(name)
        except FileNotFoundError as error:
            print(f"without XSTest's {name}: {error}")
    return rows


def key(reader):
    """The fingerprint of the model behind `reader` (a spec, or None), for the key of `Run.rows`.
    Errors as `models.resolve`."""
    return None if reader is None else models.fingerprint(models.resolve(reader))


def readings(reader, rows, others) -> list[dict]:
    """How a Reader labels the `rows` of XSTest, held out by model ("reader"), by model and prompt
    ("reader, new prompts") and by model and type ("reader, new types"); and `others`, labelled by
    one that is trained on all of `rows` ("reader"). One dict {read_by: label} for each row, then
    for each of `others`."""
    x, y = reader.features(rows), reader.features(others) if others else []
    ways = {"reader": None, "reader, new prompts": "id", "reader, new types": "type"}
    found = {name: held_out(x, rows, group) for name, group in ways.items()}
    read = predict(fit(x, [row["human"] for row in rows]), y) if others else []
    return [{name: labels[i] for name, labels in found.items()} for i in range(len(rows))] + [
        {"reader": label} for label in read]
