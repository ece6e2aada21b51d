"""How near an absolute harmfulness model comes to ratings (paper, section 4.5)."""

from __future__ import annotations

import numpy as np

from cai_utils.evaluation import stats
from cai_utils.harmfulness import check


def evaluate(scorer, rows, seed=0):
    """How near a score model comes to rows {"messages", "score"}: {"error": mean absolute error,
    "ci_low", "ci_high" (bootstrapped over rows), "correlation": Pearson's, "n"}."""
    rows = check(rows)
    predicted = scorer.score([r["messages"] for r in rows])
    truth = np.array([r["score"] for r in rows], float)
    error, low, high, n = stats.bootstrap_mean(np.abs(predicted - truth), seed=seed)
    vary = predicted.std() > 0 and truth.std() > 0
    correlation = float(np.corrcoef(predicted, truth)[0, 1]) if vary else float("nan")
    return {"error": error, "ci_low": low, "ci_high": high, "correlation": correlation, "n": n}
