"""Constitutional AI (Bai et al. 2022, arXiv 2212.08073) as a small, open laboratory."""

__version__ = "0.1.0"
