"""The embedded lab: a small world with a known ground truth, and the language models that grew up in it."""
