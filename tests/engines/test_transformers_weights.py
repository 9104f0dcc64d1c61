"""The namespace of a model holds all that its KV depends on, and the watch sees weights change."""

from __future__ import annotations

import pytest
import torch
from attached_models import attached
from tiny_models import llama_config, make_model
from torch import nn

from kvstore.engine_adapters.transformers import weights as weights_module
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.engine_adapters.transformers.model_namespace import model_namespace
from kvstore.engine_adapters.transformers.weights import WeightsWatch, weights_fingerprint
from kvstore.errors import MisconfiguredError, UnsupportedModelError


def small(**changes):
    return make_model(llama_config(**{"num_hidden_layers": 1, **changes}))


def namespace_of(model, revision=None):
    return model_namespace(model, observe_geometry(model).layout(8), revision)


def test_one_bit_of_any_parameter_or_buffer_changes_the_fingerprint():
    model = small()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert any("inv_freq" in name for name in tensors)
    seen = {weights_fingerprint(model)}
    for tensor in tensors.values():
        last = tensor.data.view(torch.uint8).view(-1)[-1:]
        last ^= 1
        seen.add(weights_fingerprint(model))
        last ^= 1
    assert len(seen) == len(tensors) + 1
    assert weights_fingerprint(model) == weights_fingerprint(small()) in seen


def test_the_fingerprint_does_not_depend_on_how_it_is_read(monkeypatch):
    model = small()
    whole = weights_fingerprint(model)
    monkeypatch.setattr(weights_module, "_PIECE_BYTES", 1000)
    assert weights_fingerprint(model) == whole
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert weights_fingerprint(model) == whole


def test_dtype_and_names_are_part_of_the_fingerprint():
    halves = [small().to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    for model in halves:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    swapped = small()
    mlp = swapped.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    models = [small(), swapped, *halves]
    assert len({weights_fingerprint(model) for model in models}) == len(models)


def test_weights_that_are_not_all_in_memory_need_a_revision():
    offloaded = small()
    offloaded.lm_head.to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"lm_head\.weight is on the meta device.*weights_revision"
    ):
        weights_fingerprint(offloaded)
    partitioned = small()
    partitioned.lm_head.weight.data = torch.empty(0)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is empty"):
        weights_fingerprint(partitioned)
    quantized = small()
    quantized.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match=r"quantized.*weights_revision"):
        namespace_of(quantized)
    assert namespace_of(quantized, "r1").weights_revision == "r1"


@pytest.mark.parametrize("revision", ["", "  "])
def test_a_blank_revision_is_refused(revision):
    with pytest.raises(MisconfiguredError, match="weights_revision is blank"):
        namespace_of(small(), revision)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 1024},
        {"attn_implementation": "eager"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_kv_changes_the_namespace_whatever_the_revision(changes):
    assert namespace_of(small(**changes), "r1").digest != namespace_of(small(), "r1").digest


def test_what_the_forward_pass_does_not_read_leaves_the_namespace_alone():
    other = small()
    other.config.pad_token_id, other.config.use_cache = 3, False
    assert namespace_of(other).digest == namespace_of(small()).digest


def test_a_folder_s_place_counts_only_where_weights_are_not_told_by_their_content(tmp_path):
    models = []
    for place in ("a", "b"):
        folder = tmp_path / place / "tiny"
        folder.mkdir(parents=True)
        models.append(small(name_or_path=str(folder)))
    first, second = (namespace_of(model) for model in models)
    assert first.digest == second.digest
    assert first.model == "tiny"
    first, second = (namespace_of(model, "main") for model in models)
    assert first.digest != second.digest


def add_in_place(model):
    with torch.no_grad():
        model.lm_head.weight.add_(1)


def load_state(model):
    model.load_state_dict(model.state_dict())


def replace_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


def replace_parameter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data)


def change_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def change_dtype(model):
    model.to(torch.bfloat16)


def set_eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        load_state,
        replace_data,
        replace_parameter,
        change_buffer,
        change_dtype,
        set_eager,
    ],
)
def test_the_watch_sees_weights_change(change):
    model = small()
    watch = WeightsWatch(model)
    model(torch.tensor([[1, 2, 3]]))
    assert not watch.changed()
    change(model)
    assert watch.changed()


def test_weights_whose_changes_cannot_be_seen_are_refused(objects):
    with torch.inference_mode():
        model = small()
    with (
        pytest.raises(MisconfiguredError, match=r"made under torch.inference_mode\(\)"),
        attached(model, objects),
    ):
        pass
