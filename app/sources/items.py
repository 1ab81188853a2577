"""Turns rows into what a model is called with: tokens, pixels, class ids. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from app.sources.intake import Intake
from app.sources.libraries import first_line, load_library
from app.sources.spec import DatasetSpec
from app.sources.user_code import refuse_answer

IGNORED = -100  # cross-entropy's own convention for positions that do not count
MASKED_SHARE = 0.15  # of BERT (Devlin et al. 2019), here always by the mask token


@dataclass(frozen=True)
class Items(Dataset[Any]):
    """A map-style set of encoded rows; `rows` stay as they were read until they are asked for."""

    rows: Any
    columns: Mapping[str, str]
    class_ids: Mapping[Any, int]
    encode: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        values = {role: row[column] for role, column in self.columns.items()}
        if "label" in values:
            values["label"] = self.find_class(values["label"])
        if "labels" in values:
            values["labels"] = [self.find_class(label) for label in values["labels"]]
        return self.encode(values)

    def find_class(self, label: Any) -> int:
        if label not in self.class_ids:
            known = ", ".join(map(str, list(self.class_ids)[:10]))
            raise refuse_answer(
                f"The label {label!r:.60} is not among the training set's: {known}.", "dataset"
            )
        return self.class_ids[label]


def make_encoder(intake: Intake, spec: DatasetSpec) -> TextEncoder | ImageEncoder:
    """The model's own tokenizer or image processing, with the options of `spec`.

    Raises:
        InvalidDocument: it brings none.
    """
    if intake.task == "image-classification":
        return ImageEncoder(intake, spec.image_size, _load_image_processor(intake))
    return TextEncoder(intake, _load_tokenizer(intake), spec.max_length or intake.max_tokens)


def _load_tokenizer(intake: Intake) -> Any:
    transformers = load_library("transformers")
    try:
        if not intake.processor:
            raise OSError("it was made from a configuration alone")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            intake.processor, revision=intake.revision, trust_remote_code=False
        )
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")[:200]
        raise refuse_answer(
            f"The model {intake.processor or 'of random weights'} brings no tokenizer that loads: "
            f"{line}. Put its tokenizer.json beside its config.json.",
            "dataset.uri",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise refuse_answer(f"The tokenizer of {intake.processor} has no token to pad with.")
    return tokenizer


def _load_image_processor(intake: Intake) -> Any:
    """The model's own, None where it brings none: then its size and mean are all there is."""
    if not intake.processor:
        return None
    transformers = load_library("transformers")
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            intake.processor, revision=intake.revision, trust_remote_code=False, backend="pil"
        )
    except OSError:  # no preprocessor_config.json
        return None
    except Exception as error:
        raise refuse_answer(
            f"The image processor of {intake.processor} does not load: {first_line(error)}.",
            "dataset.uri",
        ) from error


@dataclass(frozen=True)
class TextEncoder:
    """Texts → token ids; batches padded to their longest, padding left out of the labels."""

    intake: Intake
    tokenizer: Any
    max_length: int

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        words = row.get("tokens")
        encoded = self.tokenizer(
            row["text"] if words is None else words,
            row.get("text_pair"),
            truncation=True,
            max_length=self.max_length,
            is_split_into_words=words is not None,
            return_special_tokens_mask=self.intake.task == "fill-mask",
        )
        item = dict(encoded)
        match self.intake.task:
            case "text-classification":
                item["labels"] = row["label"]
            case "text-generation":
                item["labels"] = list(item["input_ids"])
            case "text2text-generation":
                target = self.tokenizer(
                    text_target=row["target"], truncation=True, max_length=self.max_length
                )
                item["labels"] = list(target["input_ids"])
            case "fill-mask":
                self._mask(item)
            case "token-classification":
                assert words is not None, "its columns were chosen"
                item["labels"] = self._spread(encoded.word_ids(), len(words), row["labels"])
        return item

    def _mask(self, item: dict[str, Any]) -> None:
        """Hide some tokens, at least one; the generators are seeded for each item."""
        ids = torch.tensor(item["input_ids"])
        special = torch.tensor(item.pop("special_tokens_mask"), dtype=torch.bool)
        drawn = torch.rand(len(ids)).masked_fill(special, 2.0)
        hidden = (drawn < MASKED_SHARE) | ((drawn == drawn.min()) & ~special)
        item["labels"] = ids.masked_fill(~hidden, IGNORED).tolist()
        item["input_ids"] = ids.masked_fill(hidden, self.tokenizer.mask_token_id).tolist()

    def _spread(self, places: list[int | None], words: int, labels: list[int]) -> list[int]:
        """Each word's label on its first token."""
        if words != len(labels):
            raise refuse_answer(
                f"A row has {words} tokens and {len(labels)} labels; it needs one each.",
                "dataset.columns.labels",
            )
        return [
            IGNORED if place is None or (i and place == places[i - 1]) else labels[place]
            for i, place in enumerate(places)
        ]

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [item["labels"] for item in items]
        rest = [{k: v for k, v in item.items() if k != "labels"} for item in items]
        batch = dict(self.tokenizer.pad(rest, return_tensors="pt"))
        if isinstance(labels[0], int):
            return {**batch, "labels": torch.tensor(labels)}
        width = batch["input_ids"].shape[1]
        if self.intake.task == "text2text-generation":
            width = max(map(len, labels))
        padded = torch.full((len(items), width), IGNORED)
        on_left = self.tokenizer.padding_side == "left" and width == batch["input_ids"].shape[1]
        for row, own in zip(padded, labels, strict=True):
            row[width - len(own) if on_left else 0 :][: len(own)] = torch.tensor(own)
        return {**batch, "labels": padded}


@dataclass(frozen=True)
class ImageEncoder:
    """Images → normalised pixels, by the model's processor or by its size, mean and deviation."""

    intake: Intake
    image_size: int | None
    processor: Any

    def __call__(self, row: Mapping[str, Any]) -> Any:
        pixels = self._read(row["image"])
        if not self.intake.keyword:
            return pixels, row["label"]
        return {self.intake.keyword: pixels, "labels": row["label"]}

    def _read(self, given: Any) -> torch.Tensor:
        channels, height, width = self.intake.image_shape
        mode = "L" if channels == 1 else "RGB"
        image_module = load_library("PIL.Image")
        try:
            if isinstance(given, str):
                with image_module.open(given) as opened:
                    image = opened.convert(mode)
            else:
                image = given.convert(mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise refuse_answer(
                f"{given!s:.200} cannot be read as an image; mend or remove it.", "dataset.uri"
            ) from error
        side = self.image_size
        if self.processor is not None:
            size = {"size": {"height": side, "width": side}} if side else {}
            if side and "shortest_edge" in (self.processor.size or {}):
                size = {"size": {"shortest_edge": side}}
            return self.processor(image, return_tensors="pt", **size)["pixel_values"][0]
        image = image.resize((side or width, side or height), image_module.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
        mean, std = (
            torch.tensor(x[:channels])[:, None, None] for x in (self.intake.mean, self.intake.std)
        )
        return (pixels - mean) / std

    collate = None
