"""Frostline: decide, apply, prove and profit from freezing layers of PyTorch models."""

__version__ = "0.1.0"
