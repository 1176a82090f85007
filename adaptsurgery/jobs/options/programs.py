"""What may be asked of rewriting an exported program."""

from __future__ import annotations

from dataclasses import dataclass

from adaptsurgery.jobs.options import (
    SEEDS,
    Named,
    dry_run_option,
    option,
    overwrite_option,
)


@dataclass(frozen=True, eq=False, repr=False)
class RewriteOptions:
    """Of ``rewrite``, beside MODEL.pt2 and OUT.pt2."""

    config: Named | None = option(None, "An adapter_config.json: a new adapter.", metavar="FILE")
    adapter: Named | None = option(
        None, "An adapter in any layout: a file, a folder, a Hub name.", metavar="FILE"
    )
    merge: bool = option(False, "Fold the adapter into the weights.")
    onnx: Named | None = option(
        None, "The ONNX to write, each adapter tensor by its name.", metavar="OUT.onnx"
    )
    name: str = option("default", "The adapter's name.", shown=True)
    mode: str = option(
        "auto",
        "Beside the layer, or folded into its weight on every call.",
        choices=("auto", "factored", "weight"),
    )
    base: Named | None = option(
        None, "Where flat names are looked up, if not in the program.", metavar="BASE"
    )
    seed: int | None = option(
        None, "With --config: of the initial values.", least=SEEDS[0], most=SEEDS[1]
    )
    trust: bool = option(
        False,
        "The program is your own: load it though it runs code (pickles, formulas, imports).",
    )
    overwrite: bool = overwrite_option("Replace the outputs if they are there.")
    dry_run: bool = dry_run_option()
