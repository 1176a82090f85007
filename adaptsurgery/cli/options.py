"""The options that commands which write an adapter have in common."""

from __future__ import annotations

import click

# The layouts by name, spelled out so that --help need not load them; a test compares.
LAYOUTS = ("peft", "lycoris", "kohya", "diffusers", "comfyui")
TARGETS = ("peft", "lycoris", "kohya")


class Extractable(click.Choice[str]):
    """The algorithms that ``extract`` offers, looked up when they are asked for and no sooner."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from adaptsurgery_formats.traits import named

        return (*named(lambda row: row.extracts), "auto")


OUT = click.option(
    "-o", "--output", "out", required=True, metavar="OUT", help="A folder for peft, else a file."
)
TO = click.option("--to", type=click.Choice(TARGETS), help="The layout to write; the first's.")
BASE = click.option(
    "--base",
    metavar="BASE",
    help="The model that the adapter is for, as the list of its modules: a safetensors file, a "
    "folder, a Hub name, or sd15, sd2, sdxl, flux. Needed where no bundled list has the names.",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
NO_HASHES = click.option(
    "--no-hashes", is_flag=True, help="Leave out kohya's sshs hashes (a second reading)."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Do everything but write.")
ALLOW_NONFINITE = click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Write NaN and infinity that are computed; they are told.",
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
