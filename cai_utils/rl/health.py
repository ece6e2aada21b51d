"""Whether an RL run looks healthy."""

from __future__ import annotations

COLUMNS = {
    "score": "objective/scores", "KL (nats)": "objective/kl",
    "entropy per token": "policy/entropy_avg", "length": "val/response_length",
    "not ended": "val/missing_eos_rate", "value explains": "val/explained_variance",
    "clipped": "policy/clipfrac_avg", "loss": "loss",
}  # fmt: skip


def report_health(history) -> None:
    """Print how a trainer's history begins and ends, in fifths of the run: those of the measures
    above that it has."""
    fifth = max(1, len(history) // 5)
    for label, column in COLUMNS.items():
        if column in history:
            first, last = history[column].head(fifth).mean(), history[column].tail(fifth).mean()
            print(f"{label}: {first:.3f} -> {last:.3f}")
