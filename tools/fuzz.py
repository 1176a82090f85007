"""Random inputs of every kind through the library and the command, by fixed seeds.

    python tools/fuzz.py                            # every kind, a minute: what .ci/run does
    python tools/fuzz.py headers --count 20000      # one kind
    python tools/fuzz.py all --count 11000 --seed 1000000 --keep found/
    python tools/fuzz.py --replay found/x.json      # one finding again

What each input must end in stands in ``fuzzing/trial.py``; the exit code is 1 where one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT), str(ROOT / "formats")]
os.environ["HF_HUB_OFFLINE"] = "1"

from fuzzing.inputs import Input  # noqa: E402
from fuzzing.kinds import KINDS  # noqa: E402
from fuzzing.workers import Tally, apart, input_of, run, shrunk  # noqa: E402

# Inputs of each kind in a quick run, by what one costs.
QUICK = {
    "headers": 2000, "adapters": 600, "folders": 300, "bases": 400, "programs": 60, "pickles": 400,
    "plans": 300, "commands": 250, "numbers": 250,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", nargs="?", default="all", choices=("all", *KINDS))
    parser.add_argument("--count", type=int, help="inputs of each kind (default: a quick run's)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep", type=Path, help="a folder for an input of each fault")
    parser.add_argument("--replay", type=Path, help="try one kept input again")
    asked = parser.parse_args()
    if asked.replay:
        return replay(asked.replay)
    faults = 0
    for kind in KINDS if asked.kind == "all" else (asked.kind,):
        tally = run(kind, asked.seed, asked.count or QUICK[kind], asked.jobs)
        tell(kind, tally)
        faults += sum(tally.faults.values())
        if asked.keep:
            keep(kind, tally, asked.keep)
    return 1 if faults else 0


def tell(kind: str, tally: Tally) -> None:
    """How many inputs ended how, and what should not have been."""
    count = sum(tally.outcomes.values())
    rate = count / max(tally.seconds, 1e-9)
    print(
        f"{kind:<9} {count:>7,} inputs, {rate:,.0f} a second: {sum(tally.faults.values())} faults"
    )
    codes = " ".join(
        f"{code.removeprefix('refused: ')} {n}" for code, n in tally.outcomes.most_common()
    )
    print(f"  {codes}")
    for fault, n in tally.faults.most_common():
        print(f"  FAULT {n:>5} × {fault}  (seed {tally.findings[fault]})")
    sys.stdout.flush()


def keep(kind: str, tally: Tally, folder: Path) -> None:
    """One input of each fault, made smaller, as a file to be replayed."""
    folder.mkdir(parents=True, exist_ok=True)
    for fault, seed in tally.findings.items():
        name = re.sub(r"[^a-z0-9]+", "-", fault.lower()).strip("-")[:60]
        small = shrunk(input_of(kind, seed), fault)
        data = {"fault": fault, **json.loads(small.to_json())}
        (folder / f"{kind}-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def replay(path: Path) -> int:
    """A kept input's outcome."""
    outcome = apart(Input.from_json(json.loads(path.read_text("utf-8"))))
    print(outcome.ended, *outcome.faults, sep="\n  ")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
