"""The shape of a model, read from a Hugging Face `config.json`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from afd_ray.config_reading import shown

SUPPORTED_MODEL_TYPES = ("step3_text", "step3_vl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
E4M3 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""A `quantization_config`, the only one that can be read; keys beside these say nothing that the files do not."""
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
"""Of any other count or width: what is above is a mistake, and would be told of only by running out of memory."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a Step-3 text model (arXiv:2507.19427, Table 1); names follow its released configuration."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    share_q_dim: int
    """Width of the low-rank query."""
    moe_layers: frozenset[int]
    """Indices of the layers with experts; the others are dense."""
    moe_num_experts: int
    moe_top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    intermediate_size: int
    """Width of a dense layer's FFN."""
    vocab_size: int
    max_position_embedding: int
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    norm_expert_weight: bool = False
    dtype: torch.dtype = torch.bfloat16
    """Of weights, where they are not in e4m3, and of what is computed."""
    scaled: bool = False
    """Whether weights in the files may be e4m3, with a scale for each block of 128 x 128."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_width(self) -> int:
        """Values cached a token and layer: one key head and one value head."""
        return 2 * self.head_dim

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """From the parsed `config.json`; raises ValueError naming the key, its value and what is allowed."""
        text = _text_part(raw)
        _refuse_unsupported(text)
        layers = _integer(text, "num_hidden_layers", MAX_LAYERS)
        experts, vocab_size = _integer(text, "moe_num_experts"), _integer(text, "vocab_size")
        return cls(
            num_hidden_layers=layers,
            hidden_size=_integer(text, "hidden_size"),
            num_attention_heads=_integer(text, "num_attention_heads"),
            head_dim=_head_dim(text),
            share_q_dim=_integer(text, "share_q_dim"),
            moe_layers=_moe_layers(text.get("moe_layers_enum"), layers),
            moe_num_experts=experts,
            moe_top_k=_integer(text, "moe_top_k", experts, " (moe_num_experts)"),
            moe_intermediate_size=_integer(text, "moe_intermediate_size"),
            share_expert_dim=_integer(text, "share_expert_dim"),
            intermediate_size=_integer(text, "intermediate_size"),
            vocab_size=vocab_size,
            max_position_embedding=_max_position(text),
            rope_theta=_above_zero(text, "rope_theta", 500000.0),
            rms_norm_eps=_above_zero(text, "rms_norm_eps", 1e-5),
            norm_expert_weight=_truth(text, "norm_expert_weight"),
            dtype=_dtype(_first(("torch_dtype", "dtype"), text, raw)),
            scaled=_scaled(_first(("quantization_config",), text, raw)),
            bos_token_id=_token_id("bos_token_id", _first(("bos_token_id",), text, raw), vocab_size),
            eos_token_ids=_token_ids("eos_token_id", _first(("eos_token_id",), text, raw), vocab_size),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """From `DIR/config.json`; raises ValueError in one line when it cannot be read."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{directory}: no config.json there") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: must hold a JSON object")
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """As a `config.json` of `model_type` step3_text."""
        described = {
            "architectures": ["Step3TextForCausalLM"],
            "model_type": "step3_text",
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_attention_groups": 1,
            "head_dim": self.head_dim,
            "share_q_dim": self.share_q_dim,
            "moe_layers_enum": ",".join(str(layer) for layer in sorted(self.moe_layers)),
            "moe_num_experts": self.moe_num_experts,
            "moe_top_k": self.moe_top_k,
            "moe_intermediate_size": self.moe_intermediate_size,
            "share_expert_dim": self.share_expert_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embedding": self.max_position_embedding,
            "max_seq_len": self.max_position_embedding,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.rms_norm_eps,
            "norm_expert_weight": self.norm_expert_weight,
            "tie_word_embeddings": False,
            "torch_dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else (self.eos_token_ids or (None,))[0],
        }
        return described | ({"quantization_config": E4M3} if self.scaled else {})


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(SUPPORTED_MODEL_TYPES)}, got {shown(model_type)}")
    text = raw.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"text_config must be an object, got {shown(text)}")
    if model_type == "step3_text":
        return raw
    if text is None:
        raise ValueError("text_config is missing from a step3_vl configuration")
    return text


def _refuse_unsupported(text: dict[str, Any]) -> None:
    groups = text.get("num_attention_groups", 1)
    if groups != 1:
        raise ValueError(f"num_attention_groups must be 1 (MFA shares one key and value head), got {groups}")
    if text.get("rope_scaling") is not None:
        raise ValueError(f"rope_scaling must be null, got {text['rope_scaling']}")
    if text.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings must be false: Step-3 has a head of its own")
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {shown(text['hidden_act'])}")


def _integer(text: dict[str, Any], key: str, highest: int = MAX_SIZE, whose: str = "") -> int:
    """`whose` says what sets the highest value."""
    value = text.get(key)
    if not _is_integer(value) or not 1 <= value <= highest:
        raise ValueError(f"{key} must be an integer from 1 to {highest}{whose}, got {shown(value)}")
    return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _head_dim(text: dict[str, Any]) -> int:
    width = _integer(text, "head_dim")
    if width % 2:
        raise ValueError(f"head_dim must be even (RoPE turns pairs of values), got {width}")
    return width


def _max_position(text: dict[str, Any]) -> int:
    for key in ("max_position_embedding", "max_seq_len"):
        if text.get(key) is not None:
            return _integer(text, key)
    return 65536


def _above_zero(text: dict[str, Any], key: str, default: float) -> float:
    value = text.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} must be a number above 0, got {shown(value)}")
    return float(value)


def _truth(text: dict[str, Any], key: str) -> bool:
    value = text.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {shown(value)}")
    return value


def _first(keys: tuple[str, ...], *sources: dict[str, Any]) -> object:
    """The first value that is there and not null."""
    return next((source[key] for source in sources for key in keys if source.get(key) is not None), None)


def _moe_layers(enum: object, layers: int) -> frozenset[int]:
    if enum is None:
        return frozenset(range(1, layers))
    items = enum.split(",") if isinstance(enum, str) else enum
    if not isinstance(items, list | tuple):
        raise ValueError(f"moe_layers_enum must be a comma-separated string, got {shown(enum)}")
    try:
        indices = frozenset(int(str(item)) for item in items if str(item).strip())
    except ValueError:
        raise ValueError(f"moe_layers_enum must be a comma-separated string of integers, got {shown(enum)}") from None
    if any(not 0 <= index < layers for index in indices):
        raise ValueError(f"moe_layers_enum names a layer outside 0..{layers - 1}: {shown(enum)}")
    return indices


def _dtype(name: object) -> torch.dtype:
    if name is None:
        return torch.bfloat16
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {shown(name)}")
    return dtype


def _scaled(quantization: object) -> bool:
    if not quantization:
        return False
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config must be an object, got {shown(quantization)}")
    for key, wanted in E4M3.items():
        given = quantization.get(key, wanted if key in ("fmt", "activation_scheme") else None)
        if given != wanted:
            raise ValueError(f"quantization_config.{key} must be {wanted} (DeepSeek-V3's layout of e4m3), got {shown(given)}")
    return True


def _token_id(key: str, value: object, vocab_size: int) -> int | None:
    if value is None:
        return None
    (token,) = _token_ids(key, [value], vocab_size)
    return token


def _token_ids(key: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not _is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"{key} must be an integer from 0 to {vocab_size - 1} (vocab_size), got {shown(token)}")
    return tuple(ids)
