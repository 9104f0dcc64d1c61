"""What a model's weights are right now: a fingerprint that names them, and a watch for changes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
import xxhash
from transformers import PreTrainedModel

from kvstore.errors import MisconfiguredError, UnsupportedModelError

_PIECE_BYTES = 64 << 20
_REMEDY = "pass weights_revision=... that names these exact weights"
# Names, not types: peft is not imported here, and may not be installed.
_ADAPTER_LAYERS = frozenset({"BaseTunerLayer", "AuxiliaryTrainingWrapper"})

_PLAIN_TYPES = frozenset({bool, int, float, str})
# The first has a check of its own, the second is a note of the longest input so far.
_CHANGING_ATTRIBUTES = frozenset({"training", "max_seq_len_cached"})

AdapterState = tuple[tuple[str, bool, tuple[str, ...]], ...]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Names the weights by their content: every parameter and buffer, its name, shape, dtype and bytes.

    Reads every byte once, in pieces, on whatever device it is. Raises UnsupportedModelError where
    the tensors in memory are not the whole truth.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized, and keeps state outside of its tensors; {_REMEDY}"
        )
    refuse_hooks(model)
    whole = xxhash.xxh3_128()
    for name, tensor in sorted(_tensors(model)):
        if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise UnsupportedModelError(f"{name} is {kind}, so its bytes are not at hand; {_REMEDY}")
        if isinstance(tensor, torch.nn.Parameter) and not tensor.numel():
            raise UnsupportedModelError(f"{name} is empty, so its bytes are elsewhere; {_REMEDY}")
        about = json.dumps([name, list(tensor.shape), str(tensor.dtype)])
        whole.update(about.encode() + b"\n" + _bytes_digest(tensor))
    return f"xxh3-128:{whole.hexdigest()}"


def adapter_state(model: PreTrainedModel) -> AdapterState:
    """The model's PEFT layers that would change its output now: module name, merged, adapters in use."""
    found = []
    for name, module in model.named_modules():
        if any(base.__name__ in _ADAPTER_LAYERS for base in type(module).__mro__):
            merged = bool(getattr(module, "merged", False))
            active = () if getattr(module, "disable_adapters", False) else tuple(module.active_adapters)
            found.append((name, merged, active))
    return tuple(found)


class WeightsWatch:
    """Notices that a model does not compute what it did when the watch was made.

    Costs about a microsecond a tensor and a few a module: it looks at addresses and version
    counters, not at bytes, and at modules' hooks and plain attributes. Writes through `tensor.data`
    or from outside of torch leave no trace there; after those, attach again.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        for name, tensor in _tensors(model):
            if tensor.is_inference():
                raise MisconfiguredError(
                    f"{name} was made under torch.inference_mode(), where torch keeps no version of tensors,"
                    " so a change of weights would go unseen; load the model outside of it"
                )
        self._model = model
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether any tensor, hook, number or text of a module, or the attention code is another now."""
        return self._look() != self._seen

    def _look(self) -> list[object]:
        model = self._model
        tensors: list[object] = [
            (name, id(tensor), _address(tensor), tensor._version, tensor.dtype, tensor.device)  # noqa: SLF001 no public name
            for name, tensor in _tensors(model)
        ]
        return [*tensors, adapter_state(model), attention_implementation(model), _code_state(model)]


def refuse_hooks(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if hooks may change what the weights compute."""
    for name, module in model.named_modules():
        if _hooks(module):
            raise UnsupportedModelError(
                f"{name or type(module).__name__} has forward hooks, and what they do to the KV cannot be "
                f"told; remove them, or {_REMEDY} and what the hooks do"
            )


def attention_implementation(model: PreTrainedModel) -> str:
    """Which attention code runs: `sdpa`, `eager`, a flash kernel's name, ..."""
    return str(getattr(model.config, "_attn_implementation", None))


def _code_state(model: PreTrainedModel) -> list[object]:
    """What else the forward pass depends on: hooks, replaced methods, and numbers and texts of modules."""
    found: list[object] = []
    for module in model.modules():
        own = vars(module)
        found.append((*_hooks(module), id(own.get("forward"))))
        found += [
            (name, value)
            for name, value in own.items()
            if type(value) in _PLAIN_TYPES and name not in _CHANGING_ATTRIBUTES
        ]
    return found


def _hooks(module: torch.nn.Module) -> list[int]:
    """Handles of the hooks that may change what a module computes; transformers' own only take notes."""
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}  # noqa: SLF001 no public name
    return [
        handle
        for handle, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("transformers.")
    ]


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _address(tensor: torch.Tensor) -> int:
    # Tensor subclasses may have no storage of their own; the object's id stands for them.
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else 0


def _bytes_digest(tensor: torch.Tensor) -> bytes:
    digest = xxhash.xxh3_128()
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, _PIECE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].view(torch.uint8).cpu().numpy().data)
    return digest.digest()
