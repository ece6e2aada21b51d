"""The embedded lab: a small world of known truth, and the language models that grew up in it."""
