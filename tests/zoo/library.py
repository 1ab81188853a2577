"""Transformers' architectures, small, from their configurations: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip


def words() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 40, (2, 8))}


def dialogue() -> dict[str, Any]:
    return {**words(), "decoder_input_ids": torch.randint(3, 40, (2, 5))}


def labelled() -> dict[str, Any]:
    ids = torch.randint(3, 40, (2, 8))
    return {"input_ids": ids, "labels": ids}


def picture(size: int = 16, channels: int = 3) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800)}


def both() -> dict[str, Any]:
    return {**words(), **picture()()}


def spectrum() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 8, 20),
        "decoder_input_ids": torch.randint(3, 40, (2, 5)),
    }


CONVOLUTIONS = {
    "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# name → (model class, options of its configuration, example)
LIBRARY: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "bert": ("BertForSequenceClassification", {**TEXT, "num_labels": 3}, words),
    "roberta": ("RobertaForTokenClassification", TEXT, words),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        words,
    ),
    "albert": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 8}, words),
    "electra": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 8}, words),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
        words,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        labelled,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT, words),
    "llama": ("LlamaForCausalLM", DECODER, labelled),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "query_pre_attn_scalar": 8}, words),
    "qwen3": ("Qwen3ForCausalLM", DECODER, words),
    "falcon": ("FalconForCausalLM", {**TEXT, "alibi": False}, words),
    "bloom": (
        "BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}, words,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2},
        words,
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        words,
    ),
    "rwkv": (
        "RwkvForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
        words,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        dialogue,
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ, dialogue),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ, dialogue),
    "longformer": (
        "LongformerForSequenceClassification", {**TEXT, "attention_window": 4}, words,
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        words,
    ),
    "vit": ("ViTForImageClassification", VISION, picture()),
    "deit": ("DeiTForImageClassification", VISION, picture()),
    "beit": ("BeitForImageClassification", {**VISION, "drop_path_rate": 0.1}, picture()),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4},
        picture(),
    ),
    "swin-v2": (
        "Swinv2Model",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4},
        picture(),
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
        picture(),
    ),
    "regnet": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        picture(),
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        picture(),
    ),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}, picture(32)),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
         "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
        picture(),
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", {**TEXT, **CONVOLUTIONS}, sound),
    "hubert": ("HubertModel", {**TEXT, **CONVOLUTIONS}, sound),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        spectrum,
    ),
    "clip": (
        "CLIPModel",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION,
         "projection_dim": 8},
        both,
    ),
    "siglip": ("SiglipModel", {"text_config": TEXT, "vision_config": VISION}, both),
    "perceiver": (
        "PerceiverForSequenceClassification",
        {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1,
         "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
         "num_cross_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 8},
        lambda: {"inputs": words()["input_ids"]},
    ),
}  # fmt: skip


def build_library_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    class_name, options, example = LIBRARY[name]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**options)), example()
