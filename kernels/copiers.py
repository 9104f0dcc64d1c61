"""`page_copier`: the fastest PageCopier that works here."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable

import torch

from kvstore.codecs.contract import TensorCodec
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.page_checks import PageChecks
from kvstore.kernels.page_lock import page_lock
from kvstore.kernels.torch_copier import TorchPageCopier
from kvstore.layout import ChunkForm

_log = logging.getLogger("kvstore.kernels")


def page_copier(
    form: ChunkForm, devices: Iterable[torch.device], codec: TensorCodec | None = None
) -> PageCopier:
    """A copier for pages on `devices`: in Triton where all are GPUs and it works there, else in torch.

    codec  of the quantized sections that it takes and makes; None: it knows only the host form

    Triton compiles here, which takes a second or two where it has not before, so that the first load
    need not; a compiler that is missing is found out here too.
    """
    gpus = list(dict.fromkeys(devices))
    if not gpus or any(device.type != "cuda" for device in gpus):
        return TorchPageCopier(form, codec)
    try:
        from kvstore.kernels.triton_copier import TritonPageCopier

        copier = TritonPageCopier(form, codec)
        for device in gpus:
            _copy_one_chunk(copier, form, device, codec)
    except Exception as error:
        _log.warning("pages are copied without Triton, which is slower: %r", error)
        return TorchPageCopier(form, codec)
    return copier


def _copy_one_chunk(
    copier: PageCopier, form: ChunkForm, device: torch.device, codec: TensorCodec | None
) -> None:
    checks, ids = PageChecks(form), range(form.layout.pages)
    planes = [
        torch.zeros(form.layout.pages, *shape, dtype=torch.uint8, device=device).to(checks.dtype)
        for shape in checks.page_shapes
    ]
    # As a store's own memory: other kernels serve what is not page-locked.
    section = memoryview(mmap.mmap(-1, form.section_bytes))
    unlock = page_lock(section)
    try:
        copier.scatter([section], planes, [ids])
        copier.gather(planes, [ids], [section])
        if codec is not None:
            ((length,),) = copier.quantize_layers([planes], [ids], [[section]], [0])
            copier.scatter([section[:length]], planes, [ids])
    finally:
        if unlock is not None:
            unlock()
