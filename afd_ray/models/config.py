"""The shape of a model, read from a Hugging Face `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SUPPORTED_MODEL_TYPES = ("step3_text", "step3_vl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        """From the parsed `config.json`; raises ValueError naming the key that is missing or unsupported."""
        text = _text_part(raw)
        _refuse_unsupported(text)
        layers = _integer(text, "num_hidden_layers")
        eos = text.get("eos_token_id", raw.get("eos_token_id"))
        return cls(
            num_hidden_layers=layers,
            hidden_size=_integer(text, "hidden_size"),
            num_attention_heads=_integer(text, "num_attention_heads"),
            head_dim=_integer(text, "head_dim"),
            share_q_dim=_integer(text, "share_q_dim"),
            moe_layers=_moe_layers(text.get("moe_layers_enum"), layers),
            moe_num_experts=_integer(text, "moe_num_experts"),
            moe_top_k=_integer(text, "moe_top_k"),
            moe_intermediate_size=_integer(text, "moe_intermediate_size"),
            share_expert_dim=_integer(text, "share_expert_dim"),
            intermediate_size=_integer(text, "intermediate_size"),
            vocab_size=_integer(text, "vocab_size"),
            max_position_embedding=int(text.get("max_position_embedding") or text.get("max_seq_len") or 65536),
            rope_theta=float(text.get("rope_theta", 500000.0)),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
            norm_expert_weight=bool(text.get("norm_expert_weight", False)),
            dtype=_dtype(text.get("torch_dtype") or text.get("dtype") or raw.get("torch_dtype") or raw.get("dtype")),
            bos_token_id=text.get("bos_token_id", raw.get("bos_token_id")),
            eos_token_ids=_id_tuple(eos),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """From `DIR/config.json`; raises ValueError in one line when it cannot be read."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{directory}: no config.json there") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: must hold a JSON object")
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """As a `config.json` of `model_type` step3_text."""
        return {
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


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(SUPPORTED_MODEL_TYPES)}, got {model_type!r}")
    if model_type == "step3_text":
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
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
    if text.get("quantization_config"):
        raise ValueError("quantization_config is not supported yet: use a float32 or bfloat16 checkpoint")


def _integer(text: dict[str, Any], key: str) -> int:
    value = text.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _moe_layers(enum: object, layers: int) -> frozenset[int]:
    if enum is None:
        return frozenset(range(1, layers))
    items = enum.split(",") if isinstance(enum, str) else enum
    if not isinstance(items, list | tuple):
        raise ValueError(f"moe_layers_enum must be a comma-separated string, got {enum!r}")
    try:
        indices = frozenset(int(item) for item in items if str(item).strip())
    except ValueError:
        raise ValueError(f"moe_layers_enum must be a comma-separated string of integers, got {enum!r}") from None
    if any(not 0 <= index < layers for index in indices):
        raise ValueError(f"moe_layers_enum names a layer outside 0..{layers - 1}: {enum!r}")
    return indices


def _dtype(name: object) -> torch.dtype:
    if name is None:
        return torch.bfloat16
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return dtype


def _id_tuple(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(str(value)),)
