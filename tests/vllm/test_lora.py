"""LoRA adapters, which change KV: each shares with itself alone."""

from __future__ import annotations

import pytest
from tiny_lora import RANK, make_tiny_lora
from vllm.lora.request import LoRARequest
from vllm_engines import engine, transfer_config

OPTIONS = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
FULL_CHUNKS = 2 + 4 + 1


@pytest.fixture
def adapters(tmp_path):
    """None, which is the model itself, and two adapters."""
    made = [make_tiny_lora(tmp_path / f"adapter-{number}", number) for number in (1, 2)]
    return [None, *(LoRARequest(path.name, number, str(path)) for number, path in enumerate(made, 1))]


def test_an_adapter_shares_with_itself_alone(model, bucket, prompts, adapters):
    with engine(model, **OPTIONS) as plain:
        expected = [plain.generate(prompts, lora=lora) for lora in adapters]
    for answers in zip(*expected, strict=True):
        assert len(set(answers)) == len(adapters)
    with engine(model, transfer_config(bucket), **OPTIONS) as one:
        for lora, answers in zip(adapters, expected, strict=True):
            assert one.generate(prompts, lora=lora) == answers
            assert one.loaded_chunks == 0
            one.forget()
    with engine(model, transfer_config(bucket), **OPTIONS) as two:
        for number, (lora, answers) in enumerate(zip(adapters, expected, strict=True), 1):
            assert two.generate(prompts, lora=lora) == answers
            assert two.loaded_chunks == number * FULL_CHUNKS
