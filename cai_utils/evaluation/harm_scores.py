"""How close an absolute harmfulness model comes to ratings (paper 4.5)."""

from __future__ import annotations

import numpy as np

from cai_utils.evaluation import stats
from cai_utils.evaluation.tables import finite
from cai_utils.harmfulness import check


def evaluate(scorer, rows, seed=0):
    """Compare a score model with ratings, rows {"messages", "score"}.

    Returns {"error": mean absolute error, "ci_low", "ci_high" (bootstrapped over rows),
    "correlation": Pearson's, nan where one side does not vary, "n"}.
    """
    rows = check(rows)
    predicted = finite(scorer.score([r["messages"] for r in rows]), "scores of the model")
    truth = np.array([r["score"] for r in rows], float)
    error, low, high, n = stats.bootstrap_mean(np.abs(predicted - truth), seed=seed)
    vary = predicted.std() > 0 and truth.std() > 0
    correlation = float(np.corrcoef(predicted, truth)[0, 1]) if vary else float("nan")
    return {"error": error, "ci_low": low, "ci_high": high, "correlation": correlation, "n": n}
