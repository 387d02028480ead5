"""The demo model's size, and its weights as a Hugging Face directory."""

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from afd_ray.demo.tokenizer import BOS, END, VOCAB_SIZE, write_tokenizer
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import Step3Model

CONFIG: Final = ModelConfig(
    num_hidden_layers=4,
    hidden_size=160,
    num_attention_heads=4,
    head_dim=64,
    share_q_dim=96,
    moe_layers=frozenset({1, 2, 3}),
    moe_num_experts=8,
    moe_top_k=2,
    moe_intermediate_size=96,
    share_expert_dim=96,
    intermediate_size=320,
    vocab_size=VOCAB_SIZE,
    max_position_embedding=2048,
    rope_theta=10000.0,
    dtype=torch.float32,
    bos_token_id=BOS,
    eos_token_ids=(END,),
)


def checkpoint_key(parameter: str) -> str:
    """The checkpoint's name of a parameter of `Step3Model`."""
    half, name = parameter.split(".", 1)
    if name.startswith("lm_head."):
        return name
    if half == "ffn" and ".moe." in name:
        name += ".weight"
    return f"model.{name}"


def save(model: Step3Model, directory: Path) -> None:
    """Write configuration, tokenizer and weights; creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    write_tokenizer(directory)
    tensors = {checkpoint_key(name): value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> Step3Model:
    """The reference model of a directory that `save` wrote."""
    model = Step3Model(ModelConfig.from_directory(directory))
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name: tensors[checkpoint_key(name)] for name in model.state_dict()})
    return model.eval()
