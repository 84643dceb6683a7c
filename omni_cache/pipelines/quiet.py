"""Keeps what libraries say while they are imported and while they load weights off the terminal.

Knows how diffusers and transformers report; nothing of who runs them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide log messages up to warnings, Python's warnings, and progress bars of loading.

    Errors still come through, and everything is as before at the end. All of this is the
    process's, so that other threads are quiet meanwhile, too.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            reporting = [
                each
                for each in (diffusers_logging, transformers_logging)
                if each.is_progress_bar_enabled()
            ]
            for each in reporting:
                each.disable_progress_bar()
            try:
                yield
            finally:
                for each in reporting:
                    each.enable_progress_bar()
    finally:
        logging.disable(disabled)
