"""Hypothesis profiles ("ci", and "thorough" by HYPOTHESIS_PROFILE), one thread, no network.

What is tested is this tree, whatever is installed: here by pytest's ``pythonpath``, in processes
that tests start by PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

_ROOT = Path(__file__).resolve().parent.parent
_GIVEN = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT), str(_ROOT / "formats"), *([_GIVEN] if _GIVEN else [])]
)

# A shell's background job ignores Ctrl-C, and so do its children. A signal that is handled here
# has its default in the processes that tests start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", max_examples=20, deadline=None, suppress_health_check=_QUIET, derandomize=True
)
settings.register_profile("thorough", max_examples=400, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
