"""A random LoRA adapter on disk for the tiny Llama, as PEFT writes one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
# By projection, of tests/tiny_llama.py: how many features come out of it.
_OUTPUTS = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
_INPUTS, _LAYERS = 128, 4
_SPREAD = 0.3


def make_tiny_lora(folder: Path, seed: int) -> Path:
    """Write an adapter to `folder` that changes every layer's keys and values."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(_LAYERS):
        for name, outputs in _OUTPUTS.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for matrix, shape in (("lora_A", (RANK, _INPUTS)), ("lora_B", (outputs, RANK))):
                weights[f"{place}.{matrix}.weight"] = _SPREAD * torch.randn(shape, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(_OUTPUTS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
