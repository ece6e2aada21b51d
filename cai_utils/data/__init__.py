"""Rows from files and published data sets."""
