"""RL against a preference model (paper, section 4.2)."""
