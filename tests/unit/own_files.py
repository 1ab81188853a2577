"""Tiny models, tables and images, as people have them, made on the spot. They know no test."""

import atexit
import csv
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # both read when the libraries are imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="frostline-hf-")

import numpy as np
from PIL import Image

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

GOOD, BAD = ("lovely", "fine", "great"), ("awful", "poor", "grim")
OTHERS = ("the", "film", "was", "and", "very", "plot")

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32},
    "t5": {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32,
           "decoder_start_token_id": 0},
    "vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "image_size": 16, "patch_size": 8},
}  # fmt: skip


def write_model(folder: Path, kind: str, architecture: str | None = None, **more: Any) -> Path:
    """A folder as save_pretrained() leaves it, its weights too where an architecture is named."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**CONFIGS[kind], **more})
    if architecture:
        getattr(transformers, architecture)(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    if kind != "vit":
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHERS)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)


def make_reviews(size: int = 40) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(size):
        kind = GOOD if number % 2 else BAD
        words = [*generator.choice(OTHERS, 3), *generator.choice(kind, 2)]
        rows.append({"review": " ".join(words), "verdict": "good" if number % 2 else "bad"})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_images(folder: Path, classes: tuple[str, ...] = ("dark", "light"), size: int = 8) -> Path:
    generator = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(size):
            pixels = generator.integers(0, 60, (20, 24, 3)) + 190 * level // max(
                1, len(classes) - 1
            )
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder
