"""Figures of the paper, drawn from saved tables."""
