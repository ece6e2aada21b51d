"""A language model to sample from, score with and train."""
