"""What users of the package may catch or silence. Knows nothing else of it."""

from __future__ import annotations

from omni_cache.dynamo import Unwrapped

NO_GRADIENTS = (
    "gradients are enabled, and a reused residual has none; call the model under torch.no_grad() "
    "or torch.inference_mode()"
)


class UncachedWarning(UserWarning):
    """A model runs without a cache; the message says why."""


def unwrapped(error: Exception) -> Exception:
    """An error of the same class and message that reaches the caller of a compiled model as it is.

    Dynamo turns what a backend raises into its own ``BackendCompilerFailed``, a RuntimeError,
    unless it is of the class of errors whose tracebacks it shortens.
    """
    kind = type(error)
    passing = type(kind.__name__, (Unwrapped, kind), {"__module__": kind.__module__})
    seen: Exception = passing(str(error), first_useful_frame=None)
    return seen
