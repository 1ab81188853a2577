"""Makes one batch that a Transformers model takes, from its signature. Knows no data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLE_TOKENS = 16
EXAMPLE_BATCH = 2
_SECOND = 16_000  # of sound
_FRAMES = 256  # of sound, where the model leaves open how many; of video its configuration says
_GRID = 8  # patches each way, of pictures that may have any size


class ExampleMaker:
    """Makes one batch by the names of the arguments that a model's forward takes.

    Whole numbers are such as the model may meet, because a trace follows them; what floats is 0.

    Args:
        image_shape: channels, height, width.
        both_towers: give a model of text and pictures both, where it has no token that stands for
            a picture.

    Attributes:
        own: the length of texts and the side of images where nobody wants others; no side where
            images are no squares.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        image_shape: tuple[int, int, int],
        *,
        both_towers: bool,
    ) -> None:
        self._model, self._config = model, config
        self._image_shape, self._both_towers = image_shape, both_towers
        _, height, width = image_shape
        square = {"image_size": height} if height == width else {}
        self.own: Mapping[str, int] = {"sequence_length": EXAMPLE_TOKENS, **square}

    def __call__(self, wanted: Mapping[str, int]) -> dict[str, Any] | None:
        """One batch, with the `sequence_length` and `image_size` that are wanted, if any.

        Returns:
            None where the model wants something whose shape nobody can tell.
        """
        channels, height, width = self._image_shape
        if "image_size" in wanted:
            height = width = wanted["image_size"]
        takes = inspect.signature(self._model.forward).parameters
        length = wanted.get("sequence_length", EXAMPLE_TOKENS)
        given = _Given(self._model, self._config, (channels, height, width), length)
        names = dict.fromkeys(_list_wanted(self._model, self._config, takes, self._both_towers))
        if not names or any(name not in _MAKERS for name in names):
            return None
        return {name: _MAKERS[name](given) for name in names}


def find_option(config: Any, *names: str, default: Any) -> Any:
    """The first of these options that is a number or a pair, of the configuration or its parts."""
    for part in list_parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) or (isinstance(value, list | tuple) and len(value) == 2):
                return value
    return default


def _name_main_inputs(model: Any, takes: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of what it is about; OneFormer names several, some parts name another's."""
    named = getattr(model, "main_input_name", None) or "input_ids"
    names = (named,) if isinstance(named, str) else tuple(named)
    if all(name in takes for name in names):
        return names
    return tuple(name for name in takes if name != "kwargs")[:1]


def _list_wanted(
    model: nn.Module, config: Any, takes: Mapping[str, Any], both_towers: bool
) -> Iterator[str]:
    if _is_packed(takes):  # what tells the batch's size goes first
        yield "grid_thw" if "grid_thw" in takes else "image_grid_thw"
    main = _name_main_inputs(model, takes)
    yield from main
    for name, parameter in takes.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty:
            yield name
    if main == ("query_embeds",):
        yield "encoder_hidden_states"
    companions = set(_COMPANIONS)
    if "image_token_pooling" in takes:  # Molmo wants to be told that there are no pictures
        yield "mm_token_type_ids"
    if hasattr(config, "languages"):
        yield "lang_ids"
    if config.is_encoder_decoder:
        companions |= _DECODERS
    if "future_time_features" not in takes:
        companions -= {"future_values"}  # to be judged by, not to be seen
    if main == ("input_ids",):
        companions -= {"target_sizes"}
        if both_towers and not _stands_for_pictures(config):
            # Speech or text is what an encoder and a decoder take, not both.
            companions |= _TOWERS - ({"input_features"} if config.is_encoder_decoder else set())
    else:
        companions |= {"input_ids", "input_features_mask"}
    yield from (name for name in takes if name in companions)


def _is_packed(takes: Mapping[str, Any]) -> bool:
    """Whether patches of pictures of many sizes come one after another, with a grid of each."""
    return "input_ids" not in takes and ("grid_thw" in takes or "image_grid_thw" in takes)


def _stands_for_pictures(config: Any) -> bool:
    """Whether a token of its text stands for a picture or sound: then text alone will do."""
    names = ("image", "video", "audio", "boi", "vision_start")
    return any(
        hasattr(config, f"{name}_token_{kind}") for name in names for kind in ("id", "index")
    )


def list_parts(config: Any) -> list[Any]:
    """A configuration and those within it, outer ones first."""
    parts = [config]
    for part in parts:
        within = [value for value in vars(part).values() if hasattr(value, "model_type")]
        parts += [value for value in within if all(value is not known for known in parts)]
    return parts


class _Given:
    """What a maker of an argument asks: the model, its configuration, and sizes read from both."""

    def __init__(
        self, model: nn.Module, config: Any, image_shape: tuple[int, int, int], length: int
    ) -> None:
        self.model, self.config = model, config
        self.image_shape, self.length = image_shape, length
        self.takes = inspect.signature(model.forward).parameters

    def has(self, *names: str) -> bool:
        """Whether the configuration, or a part of it, has one of these options."""
        return any(hasattr(part, name) for part in list_parts(self.config) for name in names)

    def find(self, *names: str, default: Any) -> Any:
        return find_option(self.config, *names, default=default)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(EXAMPLE_BATCH, *shape)

    def tokens(self, length: int | None = None) -> Tensor:
        """Words that mean nothing special, and the end of a text where there is one."""
        length = length or self.length
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else None
        size = find_option(text or self.config, "vocab_size", default=0) or 1_000
        special = {
            value
            for part in list_parts(self.config)
            for name, value in vars(part).items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        plain = [i for i in range(min(size, 4 * length + len(special))) if i not in special] or [0]
        row = (
            (plain[1:] + plain)[:length]
            if len(plain) >= length
            else [*islice(cycle(plain), length)]
        )
        end = getattr(text or self.config, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < size:
            row[-1] = end
        return torch.tensor([row] * EXAMPLE_BATCH)

    def first_layer(self) -> nn.Module | None:
        """The first convolution or product."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        return next((module for module in self.model.modules() if isinstance(module, kinds)), None)

    def width_of_first(self) -> int:
        """Numbers that the first convolution or product takes for one place."""
        first = self.first_layer()
        return 1 if first is None else math.prod(first.weight.shape[1:])  # type: ignore[index]


_Maker = Callable[[_Given], Tensor]


def _make_tokens(given: _Given) -> Tensor:
    if given.has("codebook_vocab_size") and given.has("audio_bos_token_id"):
        return given.tokens()[:, :, None].repeat(1, 1, given.config.num_codebooks + 1)
    return given.tokens()


def _make_decoder_tokens(given: _Given) -> Tensor:
    if given.has("delay_pattern"):  # of sound: one for each codebook
        channels = given.config.decoder_config.num_channels
        return given.tokens()[:, :, None].repeat(1, 1, channels)
    return given.tokens()


def _make_pictures(given: _Given) -> Tensor:
    """Single ones, pairs to compare, the frames of a film, or patches one after another."""
    takes = given.takes
    if "spatial_shapes" in takes:
        return given.zeros(_GRID * _GRID, given.width_of_first())
    if "target_sizes" in takes:  # patches side by side, of all pictures
        channels, _, _ = given.image_shape
        side = given.find("patch_size", default=14)
        return torch.zeros(1, channels, side, EXAMPLE_BATCH * _GRID * _GRID * side)
    if _is_packed(takes):
        return _make_patches(given)
    shape = given.image_shape
    if given.has("num_frames"):
        return given.zeros(given.find("num_frames", default=8), *shape)
    if given.config.model_type == "instructblipvideo":
        return given.zeros(4, *shape)
    if given.config.model_type in ("efficientloftr", "lightglue", "superglue"):
        return given.zeros(2, *shape)
    if "prompt_masks" in takes:  # the picture lies below the prompt's
        return given.zeros(shape[0], shape[1] // 2, shape[2])
    if "pixel_position_ids" in takes:
        return given.zeros(_GRID * _GRID, given.width_of_first())
    return given.zeros(*shape)


def _make_patches(given: _Given) -> Tensor:
    """Patches of all pictures after one another; frames where there is no grid of them."""
    first = given.first_layer()
    if isinstance(first, nn.Conv1d):
        return given.zeros(first.in_channels, _SECOND)
    count = EXAMPLE_BATCH * _GRID * _GRID
    if isinstance(first, nn.Conv2d) and given.has("merge_kernel_size"):  # as Kimi reads them
        return torch.zeros(count, *first.weight.shape[1:])
    return torch.zeros(count, given.width_of_first())


def _make_film(given: _Given) -> Tensor:
    frames = given.find("num_frames", "frames_per_clip", default=8)
    return given.zeros(frames, *given.image_shape)


def _make_grid(_: _Given) -> Tensor:
    return torch.tensor([[1, _GRID, _GRID]] * EXAMPLE_BATCH)


def _make_sizes(_: _Given) -> Tensor:
    return torch.tensor([[_GRID, _GRID]] * EXAMPLE_BATCH)


def _make_boxes(given: _Given) -> Tensor:
    corners = torch.tensor([0, 0, 1, 1]).expand(EXAMPLE_BATCH, given.length, 4).clone()
    return corners.float() if given.has("bbox_scale") else corners  # Bros takes them from 0 to 1


def _make_sound(given: _Given) -> Tensor:
    """A second of it; with a channel for what is coded, as a picture of it for what looks at it."""
    if given.has("frequency_stride"):
        return given.zeros(given.config.max_length, given.config.num_mel_bins)
    if given.has("speech_decoder_prenet_units"):  # SpeechT5 alone, what makes vectors left out
        return given.zeros(given.length, given.config.hidden_size)
    step = given.find("samples_per_token", default=1)
    samples = _SECOND // step * step
    is_codec = given.has("codebook_size", "upsampling_ratios", "downsampling_ratios")
    return given.zeros(1, samples) if is_codec else given.zeros(samples)


def _make_sound_features(given: _Given) -> Tensor:
    """Bins of frames; frames of bins where a convolution reads them so."""
    bins = given.find(
        "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "mel_bins",
        "input_feat_size", "num_mels", "feature_projection_input_dim", "input_dim", default=80,
    )  # fmt: skip
    first = given.first_layer()
    is_stacked = given.has("subsampling_factor")  # by the model itself, several frames to one
    if isinstance(first, nn.Linear) and "input_ids" not in given.takes and not is_stacked:
        bins = first.in_features
    if given.has("spec_size"):
        return given.zeros(1, 1024, bins)
    if _bins_lead(given, bins):
        window = given.find("n_window", default=1) * 2
        frames = given.find("max_source_positions", default=_FRAMES) * 2
        return given.zeros(bins, frames // window * window)
    return given.zeros(_FRAMES, bins)


def _bins_lead(given: _Given, bins: int) -> bool:
    """Whether bins come before frames: Speech2Text and vocoders turn features by themselves."""
    if given.has("n_window"):
        return True
    if given.has("input_feat_per_channel") or "noise_sequence" in given.takes:
        return False
    is_part = "input_ids" in given.takes or given.has("projection_dim")
    first = given.first_layer()
    layers = given.model.modules() if is_part else (first,)
    return any(isinstance(m, nn.Conv1d) and m.in_channels == bins for m in layers)


def _make_sound_mask(given: _Given) -> Tensor:
    features = _make_sound_features(given)
    frames = features.shape[2 if _bins_lead(given, features.shape[1]) else 1]
    return torch.ones(EXAMPLE_BATCH, frames, dtype=torch.int64)


def _make_series(given: _Given) -> Tensor:
    config = given.config
    if hasattr(config, "lags_sequence"):
        channels = [config.input_size] if config.input_size > 1 else []
        return given.zeros(_count_past(given), *channels)
    length = given.find("context_length", default=512)
    channels = given.find("num_input_channels", default=None)
    return given.zeros(length) if channels is None else given.zeros(length, channels)


def _count_past(given: _Given) -> int:
    """Steps that a forecast looks back on: its context and the farthest lag before that."""
    return int(given.config.context_length + max(given.config.lags_sequence))


def _make_future(given: _Given) -> Tensor:
    channels = [given.config.input_size] if given.find("input_size", default=1) > 1 else []
    return given.zeros(given.config.prediction_length, *channels)


def _make_latents(given: _Given) -> Tensor:
    return given.zeros(given.find("hidden_size", "latent_dim", default=1), given.length)


def _states(*names: str) -> _Maker:
    """A row of numbers for each token, as wide as the option says."""
    return lambda given: given.zeros(given.length, given.find(*names, default=1))


def _like(name: str) -> _Maker:
    return lambda given: torch.zeros_like(_MAKERS[name](given))


def _ones_like(name: str) -> _Maker:
    return lambda given: torch.ones_like(_MAKERS[name](given))


_MAKERS: dict[str, _Maker] = {
    # text
    "input_ids": _make_tokens,
    "decoder_input_ids": _make_decoder_tokens,
    "qformer_input_ids": _Given.tokens,
    "task_inputs": lambda given: given.tokens(given.find("task_seq_len", default=given.length)),
    "bbox": _make_boxes,
    "inputs_embeds": _states("hidden_size"),
    "query_embeds": _states("hidden_size"),
    "encoder_hidden_states": _states("encoder_hidden_size", "hidden_size"),
    "inputs": _states("d_model"),
    "mm_token_type_ids": lambda given: torch.zeros_like(given.tokens()),
    "lang_ids": lambda _: torch.zeros(EXAMPLE_BATCH, dtype=torch.int64),
    # pictures and films
    "pixel_values": _make_pictures,
    "prompt_pixel_values": _like("pixel_values"),
    "prompt_masks": _like("pixel_values"),
    "image": lambda given: given.zeros(3, 224, 224),
    "pixel_values_videos": _make_film,
    "hidden_states": _make_patches,
    "grid_thw": _make_grid,
    "image_grid_thw": _make_grid,
    "pixel_position_ids": lambda _: torch.cartesian_prod(
        torch.arange(_GRID), torch.arange(_GRID)
    ).repeat(EXAMPLE_BATCH, 1, 1),
    "merge_sizes": lambda _: torch.ones(EXAMPLE_BATCH, dtype=torch.int64),
    "spatial_shapes": _make_sizes,
    "target_sizes": _make_sizes,
    "pixel_attention_mask": lambda _: torch.ones(EXAMPLE_BATCH, _GRID * _GRID, dtype=torch.int64),
    "visual_feats": _states("visual_feat_dim"),
    "visual_pos": _states("visual_pos_dim"),
    # sound
    "input_values": _make_sound,
    "input_features": _make_sound_features,
    "input_features_mask": _make_sound_mask,
    "decoder_input_values": _states("hidden_size"),
    "audio_mel": lambda given: given.zeros(_FRAMES, given.find("input_feat_size", default=80)),
    "audio_mel_mask": lambda _: torch.zeros(EXAMPLE_BATCH, _FRAMES, dtype=torch.bool),
    "latents": _make_latents,
    # series and decisions
    "past_values": _make_series,
    "past_observed_mask": _ones_like("past_values"),
    "past_values_padding": lambda given: torch.zeros_like(_make_series(given), dtype=torch.int64),
    "freq": lambda _: torch.zeros(EXAMPLE_BATCH, 1, dtype=torch.int64),
    "past_time_features": lambda given: given.zeros(
        _count_past(given), given.config.num_time_features
    ),
    "future_values": _make_future,
    "future_time_features": lambda given: given.zeros(
        given.config.prediction_length, given.config.num_time_features
    ),
    "states": _states("state_dim"),
    "actions": _states("act_dim"),
    "rewards": lambda given: given.zeros(given.length, 1),
    "returns_to_go": lambda given: given.zeros(given.length, 1),
    "timesteps": lambda given: torch.arange(given.length).repeat(EXAMPLE_BATCH, 1),
}
# Optional by their signature, and refused without.
_COMPANIONS = frozenset(
    {"bbox", "image", "visual_feats", "visual_pos", "past_observed_mask", "past_time_features",
     "future_values", "future_time_features", "states", "actions", "rewards", "returns_to_go",
     "timesteps", "target_sizes"}
)  # fmt: skip
_DECODERS = frozenset({"decoder_input_ids", "decoder_input_values"})
_TOWERS = frozenset(
    {"pixel_values", "pixel_values_videos", "input_features", "input_values", "spatial_shapes",
     "pixel_attention_mask"}
)  # fmt: skip
