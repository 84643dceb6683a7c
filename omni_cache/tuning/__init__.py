"""The plan compiler: calibrates a model's loop, searches plans, refines and judges them."""

from omni_cache.tuning.tune import tune

__all__ = ["tune"]
