"""Hypothesis profiles ("ci", and "thorough" by HYPOTHESIS_PROFILE), one thread, no network, the slow ones.

What is tested is this tree, whatever is installed: here by pytest's ``pythonpath``, in processes
that tests start by PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
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

# Beside those that are marked where they stand: what takes more than about two seconds of a processor.
# A file, or functions of a file.
SLOW = {
    "algorithms/test_extract_loha.py": (
        "test_true_products_are_found_again",
        "test_true_products_of_few_rows_are_found_again",
        "test_under_noise_what_is_left_is_no_more_than_the_noise",
        "test_the_lift_leaves_basins_that_alternation_stays_in",
        "test_never_farther_than_the_lora_of_its_rank",
    ),
    "checkpoint/test_headers_bounded.py": (
        "test_a_header_that_is_none_costs_little_more_than_its_bytes",
    ),
    "checkpoint/test_safetensors.py": (
        "test_a_damaged_header_is_refused_or_read_as_the_library_reads_it",
    ),
    "cli/test_cli_quickstart.py": ("test_as_a_user_runs_it",),
    "graph/test_random.py": (),
    "jobs/extract/test_extract_run.py": (
        "test_a_kill_between_adapter_and_report_leaves_the_report_to_the_next_run",
        "test_the_same_bytes_whatever_the_workers_and_parts",
    ),
    "jobs/merging/test_acceptance.py": (),
    "jobs/merging/test_kills.py": (),
    "jobs/merging/test_run.py": (
        "test_a_kill_leaves_the_old_output_and_the_rerun_completes",
        "test_a_kill_right_after_the_rename_is_mended",
    ),
    "systems/test_portable.py": ("test_the_commands_write_the_same",),
    "test_readme.py": (),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).resolve().parent
    for item in items:
        functions = SLOW.get(item.path.relative_to(tests).as_posix())
        if functions is not None and (not functions or item.name.split("[")[0] in functions):
            item.add_marker(pytest.mark.slow)
