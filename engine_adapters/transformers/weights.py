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
    """Notices that the weights of a model are not what they were when the watch was made.

    Costs about a microsecond a tensor: it looks at addresses and version counters, not at bytes.
    Writes through `tensor.data` or from outside of torch leave no trace there; after those,
    attach again.
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
        """Whether any parameter, buffer, PEFT layer or the attention implementation is another now."""
        return self._look() != self._seen

    def _look(self) -> list[object]:
        model = self._model
        tensors: list[object] = [
            (name, id(tensor), _address(tensor), tensor._version, tensor.dtype, tensor.device)  # noqa: SLF001 no public name
            for name, tensor in _tensors(model)
        ]
        return [*tensors, adapter_state(model), attention_implementation(model)]


def attention_implementation(model: PreTrainedModel) -> str:
    """Which attention code runs: `sdpa`, `eager`, a flash kernel's name, ..."""
    return str(getattr(model.config, "_attn_implementation", None))


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
