"""Weights and configuration to and from Hugging Face's LLaMA.

Both use the half-rotation layout and maps stored as [outputs, inputs], so conversion renames and copies nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.parameters import parameter_specs

_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
_REDUNDANT_SUFFIX = "rotary_emb.inv_freq"  # a table that exports of 2023 still carry


@dataclass(frozen=True)
class HuggingFaceModel:
    """What ``model.safetensors`` and ``config.json`` of an exported model hold."""

    weights: dict[str, Tensor]
    config: dict[str, Any]


def huggingface_name(name: str) -> str:
    """Hugging Face's name of our parameter ``name``."""
    if name in _NAMES:
        return _NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{_LAYER_NAMES[rest]}"


def to_huggingface(
    weights: Mapping[str, Tensor], config: ModelConfig, *, max_position_embeddings: int
) -> HuggingFaceModel:
    """The whole model's ``weights`` (a state dict) under Hugging Face's names; tensors are shared, not copied.

    ``max_position_embeddings`` is the longest sequence the model was trained on, which Hugging Face wants recorded.
    Raises InputError for the one shape that only we allow, a hidden size the heads do not divide.
    """
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads "
            f"{config.num_attention_heads}: Hugging Face's LLaMA refuses such a model, so it cannot be exported"
        )
    renamed = {huggingface_name(name): weights[name] for name in parameter_specs(config)}
    dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
    return HuggingFaceModel(renamed, _huggingface_config(config, max_position_embeddings, dtype))


def from_huggingface(
    weights: Mapping[str, Tensor], huggingface_config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Our state dict (tensors shared, not copied) and configuration of a Hugging Face LLaMA.

    Raises InputError for a model that is not a plain LLaMA, and for weights that are missing, left over or misshapen.
    """
    config = _config_from_huggingface(huggingface_config)
    remaining = {name: weight for name, weight in weights.items() if not name.endswith(_REDUNDANT_SUFFIX)}
    if not config.untie_embeddings_and_output_weights:
        remaining.pop("lm_head.weight", None)
    renamed = {}
    for spec in parameter_specs(config).values():
        name = huggingface_name(spec.name)
        weight = remaining.pop(name, None)
        if weight is None:
            raise InputError(f"the Hugging Face model has no weight {name}: its files are incomplete")
        if tuple(weight.shape) != spec.shape:
            raise InputError(f"{name} is {tuple(weight.shape)} but config.json implies {spec.shape}: they do not match")
        renamed[spec.name] = weight
    if remaining:
        raise InputError(
            f"the Hugging Face model has weights a plain LLaMA does not: {', '.join(sorted(remaining)[:3])}"
        )
    return renamed, config


def _huggingface_config(config: ModelConfig, max_position_embeddings: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": config.init_method_std,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,  # read by transformers 4; version 5 reads the next
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def _config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    required = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise InputError(
                f"config.json has {key} = {config[key]!r}: only LLaMA models with {value!r} can be imported"
            )
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary_type = rotary.get("rope_type", rotary.get("type", "default"))
    if rotary_type != "default":
        raise InputError(f"config.json scales rotary positions ({rotary_type!r}): only unscaled ones can be imported")
    ours = ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        num_query_groups=config.get("num_key_value_heads"),
        kv_channels=config.get("head_dim"),
        rotary_base=rotary.get("rope_theta", config.get("rope_theta", 10000.0)),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),  # Hugging Face's default
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        init_method_std=config.get("initializer_range", 0.02),
        vocab_size=config["vocab_size"],
    )
    ours.validate()
    return ours
