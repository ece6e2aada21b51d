"""Measurements on what the stages made: tables with intervals."""
