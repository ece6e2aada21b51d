"""A run of a notebook: its parameters, folders, results and their provenance."""

from cai_utils.experiment.run import Run, start

__all__ = ["Run", "start"]
