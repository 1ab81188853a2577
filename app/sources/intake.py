"""What a model takes in: its task, head, processor and image size, as plain values. No torch."""

from __future__ import annotations

from dataclasses import dataclass

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Intake:
    """How rows of a table become what one model is called with.

    Attributes:
        task: the hub's name of it; one of the values of `app.sources.spec.TASKS`.
        processor: folder or hub name of its tokenizer or image processor; "" where it has none.
        classes: outputs of the head, None where nobody knows.
        class_names: of a pretrained head, by class id; empty where they have none.
        max_tokens: the longest text that the model takes.
        image_shape: channels, height, width.
        mean, std: by which pixels of 0–1 are normalised where there is no processor.
        keyword: the argument that takes images; "" calls the model with the tensor alone.
        is_autoregressive: the output at a position is judged by the next position's token.
    """

    task: str
    processor: str = ""
    revision: str | None = None
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    max_tokens: int = 512
    image_shape: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    keyword: str = ""
    is_autoregressive: bool = False
