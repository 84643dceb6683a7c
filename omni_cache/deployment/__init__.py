"""Deployment: a module with its cache as a file that runs without this package."""

from omni_cache.deployment.writing import export

__all__ = ["export"]
