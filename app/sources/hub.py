"""Builds models of Transformers, timm and torchvision. Knows no weights files and no data."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from app.sources.example import EXAMPLE_BATCH, ExampleMaker, find_option, list_parts
from app.sources.fetch import ask_hub, fetch_weights, in_words
from app.sources.intake import IMAGENET_MEAN, IMAGENET_STD, Intake
from app.sources.libraries import load_library
from app.sources.spec import ModelSpec
from app.sources.user_code import refuse_answer

_HEADS = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "feature-extraction": "AutoModel",
}
_TASK_ENDINGS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
}
_WITH_CLASSES = ("image-classification", "text-classification", "token-classification")


def build_without_weights(model: nn.Module) -> nn.Module:
    """Give a model that was built on the meta device fake tensors on the CPU, which need no memory.

    Tied tensors stay tied; flags stay as they are.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[torch.Tensor, torch.Tensor] = {}  # tensors hash by identity

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            with mode:
                empty = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            is_parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = replace(tensor)  # type: ignore[assignment]
    return model


def build_on_meta(build: Callable[[], Any]) -> Any:
    """Build on the meta device, or, where a constructor computes with values, the parameters there.

    torchvision's RegNets read their widths from a tensor.
    """
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # what the meta device says when it is asked for a value
        pass

    def move(_module: nn.Module, _name: str, given: nn.Parameter) -> nn.Parameter:
        # One that is there already is tied, and stays the same.
        return given if given.is_meta else nn.Parameter(given.to("meta"), given.requires_grad)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        return build()
    finally:
        hook.remove()


class _RealNumbers(TorchFunctionMode):
    """A single whole number keeps its value: codecs hold their strides and paddings in buffers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor and type(args[0] if args else None) is int:
            return func(*args, **{**(kwargs or {}), "device": "cpu"})
        return func(*args, **(kwargs or {}))


def is_weightless(model: nn.Module) -> bool:
    """Whether the model was built for its structure alone."""
    return any(
        isinstance(parameter, FakeTensor) or parameter.is_meta for parameter in model.parameters()
    )


# ------------------------------------------------------------------------------------------- hf:


def build_transformers_model(
    name: str, spec: ModelSpec, *, weightless: bool
) -> tuple[nn.Module, ExampleMaker, Intake, tuple[str, ...]]:
    """Build an ``hf:`` model by its configuration, with its pretrained weights where wanted.

    Args:
        name: ORG/NAME, an absolute folder, or, with `random_init`, a model type like ``bert``.
        weightless: build the structure alone, on fake tensors; weights are not even looked for.

    Returns:
        The model, what makes example batches for it, what it takes in, and notes.

    Raises:
        InvalidDocument: missing, gated, unreachable, needs remote code, has no such head.
    """
    transformers = load_library("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with in_words(name, spec.revision):
        if not (Path(name).is_dir() or (spec.random_init and name in transformers.CONFIG_MAPPING)):
            ask_hub()
        config = _read_config(transformers, name, spec)
    task = spec.task or _guess_task(config)
    auto = getattr(transformers, _HEADS[task])
    if type(config) not in auto._model_mapping:
        raise refuse_answer(
            f"{name} is a {config.model_type} model, which has no head for {task!r}; "
            f"choose another 'task'{_list_tasks(transformers, config)}.",
            "task",
        )
    for part in list_parts(config):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # of keys and values: it serves generation, which nothing does
    notes: tuple[str, ...] = ()
    with in_words(name, spec.revision):
        if weightless:
            with torch.device("meta"), _RealNumbers():
                # The default for experts, a grouped product, runs under fake tensors in bf16 only.
                config._experts_implementation = "batched_mm"
                model = build_without_weights(auto.from_config(config, trust_remote_code=False))
        elif spec.random_init or spec.weights is not None:
            model = auto.from_config(config, trust_remote_code=False)
        else:
            model, notes = _load_pretrained(auto, name, spec, config)
    intake = _describe_intake(config, task, model, name, spec)
    make = ExampleMaker(model, config, intake.image_shape, both_towers=task == "feature-extraction")
    return model, make, intake, notes


def _read_config(transformers: Any, name: str, spec: ModelSpec) -> Any:
    """The configuration, made anew with `kwargs`, so that what is derived is derived from them."""
    mapping = transformers.CONFIG_MAPPING
    is_type = spec.random_init and name in mapping
    source = {"revision": spec.revision, "trust_remote_code": False}
    config = mapping[name]() if is_type else transformers.AutoConfig.from_pretrained(name, **source)
    unknown = [key for key in spec.kwargs if not hasattr(config, key)]
    if unknown:
        raise refuse_answer(
            f"{unknown[0]!r} is not an option of {type(config).__name__}.", "kwargs"
        )
    if spec.kwargs and is_type:
        config = mapping[name](**spec.kwargs)
    elif spec.kwargs:
        document, _ = transformers.PretrainedConfig.get_config_dict(name, **source)
        document = _fit_layer_types({**document, **spec.kwargs}, type(config), spec.kwargs)
        config = type(config).from_dict(document)
    if config.architectures is None:
        config.architectures = []  # iterated over where several classes serve one configuration
    if spec.num_classes is not None and spec.num_classes != config.num_labels:
        config.num_labels = spec.num_classes
    return config


def _fit_layer_types(
    document: dict[str, Any], kind: type, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """One type for each layer, where kwargs change how many there are and not what they are.

    Fewer layers keep the first types; for more, the configuration's class says them anew.
    """
    key = getattr(kind, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    given, count = document.get("layer_types"), document.get(key)
    if "layer_types" in kwargs or not isinstance(given, list) or not isinstance(count, int):
        return document
    if len(given) < count:
        return {name: value for name, value in document.items() if name != "layer_types"}
    return {**document, "layer_types": given[:count]}


def _guess_task(config: Any) -> str:
    for architecture in config.architectures or ():
        for ending, task in _TASK_ENDINGS.items():
            if architecture.endswith(ending):
                return task
    return "feature-extraction"


def _list_tasks(transformers: Any, config: Any) -> str:
    offered = [
        task
        for task, head in _HEADS.items()
        if type(config) in getattr(transformers, head)._model_mapping
    ]
    return f" of {', '.join(offered)}" if offered else ""


def _load_pretrained(
    auto: Any, name: str, spec: ModelSpec, config: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    fetch_weights(name, spec.revision, allow_pickle=spec.allow_pickle)
    model, report = auto.from_pretrained(
        name,
        config=config,
        revision=spec.revision,
        trust_remote_code=False,
        use_safetensors=None if spec.allow_pickle else True,
        weights_only=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    misshaped = sorted(str(key[0]) for key in report["mismatched_keys"])
    missing = sorted(map(str, report["missing_keys"]))
    expected = dict(model.named_parameters())
    if expected and len(set(missing) & set(expected)) == len(expected):
        raise refuse_answer(f"No tensor of the weights of {name} fits {type(model).__name__}.")
    if misshaped and spec.num_classes is None and not spec.kwargs:
        raise refuse_answer(
            f"The weights of {name} have another shape: {', '.join(misshaped[:5])}."
        )
    new = [*missing, *misshaped]
    return model, (f"New, not in the weights: {', '.join(new[:10])}.",) if new else ()


def _describe_intake(config: Any, task: str, model: Any, name: str, spec: ModelSpec) -> Intake:
    labels = config.id2label or {}
    names = tuple(str(labels.get(i, "")) for i in range(config.num_labels or 0))
    known = task in _WITH_CLASSES and not all(n == f"LABEL_{i}" for i, n in enumerate(names))
    channels = find_option(config, "num_channels", default=3)
    size = find_option(config, "image_size", default=224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    longest = find_option(config, "max_position_embeddings", default=512)
    # RoBERTa and its like count positions from the padding's id on.
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        longest -= 2
    return Intake(
        task=task,
        processor=name if "/" in name or not spec.random_init else "",
        revision=spec.revision,
        classes=config.num_labels if task in _WITH_CLASSES else None,
        class_names=names if known else (),
        max_tokens=min(512, longest),
        image_shape=(channels, height, width),
        keyword=_name_main_input(model, "pixel_values"),
        is_autoregressive=task == "text-generation",
    )


def _name_main_input(model: Any, default: str) -> str:
    """The argument of what it is about; OneFormer names several."""
    name = getattr(model, "main_input_name", default)
    return name if isinstance(name, str) else name[0]


# ------------------------------------------------------------------------------ timm, torchvision


def build_vision_model(
    scheme: str, name: str, spec: ModelSpec, *, weightless: bool
) -> tuple[nn.Module, Any, Intake]:
    """Build a ``timm:`` or ``torchvision:`` model.

    Raises:
        InvalidDocument: the library is absent, knows no such model, or cannot get its weights.
    """
    library = load_library(scheme)
    models = library if scheme == "timm" else importlib.import_module("torchvision.models")
    names = set(models.list_models())
    if name.partition(".")[0] not in names:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0))
        raise refuse_answer(f"{scheme} has no model {name!r}; the nearest are {near}.")
    wants_weights = not (weightless or spec.random_init or spec.weights is not None)
    options = dict(spec.kwargs)
    if spec.num_classes is not None:
        options["num_classes"] = spec.num_classes
    if scheme == "timm" and wants_weights:
        ask_hub()

    def build() -> Any:
        if scheme == "timm":
            return models.create_model(name, pretrained=wants_weights, **options)
        return _build_torchvision(models, name, options, wants_weights)

    with in_words(f"{scheme}:{name}", None):
        model = build_on_meta(build) if weightless else build()
    if weightless:
        build_without_weights(model)
    shape, mean, std = (3, 224, 224), IMAGENET_MEAN, IMAGENET_STD
    if scheme == "timm":
        given = model.pretrained_cfg
        shape = tuple(given.get("input_size", shape))
        mean, std = tuple(given.get("mean", mean)), tuple(given.get("std", std))
    intake = Intake(
        "image-classification", classes=_head_size(model), image_shape=shape, mean=mean, std=std
    )
    return model, torch.zeros(EXAMPLE_BATCH, *shape), intake


def _build_torchvision(models: Any, name: str, options: dict[str, Any], wants_weights: bool) -> Any:
    """torchvision refuses weights with another number of classes: load all but the head.

    Detection and segmentation models would fetch those of their backbone, asked for or not.
    """
    options = {"weights": None, **options}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options.setdefault("weights_backbone", None)
    model = models.get_model(name, **options)
    if not wants_weights:
        return model
    weights = models.get_model_weights(name).DEFAULT
    own = model.state_dict()
    given = weights.get_state_dict(progress=False, check_hash=True)
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return model


def _head_size(model: nn.Module) -> int | None:
    """Outputs of the last linear layer."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return getattr(model, "num_classes", linears[-1].out_features if linears else None)
