"""page_copier gives a copier that works where it is."""

from __future__ import annotations

import pytest
import torch

from kvstore.kernels import copiers
from kvstore.kernels.torch_copier import TorchPageCopier
from kvstore.layout import ChunkForm, DType, KVLayout

LAYOUT = KVLayout(2, 2, 4, DType.FLOAT16, "nhd", page_tokens=2, chunk_tokens=4)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("devices", [[torch.device("cpu")], [GPU, torch.device("cpu")], []])
def test_pages_that_are_not_all_on_gpus_are_copied_by_torch(devices, caplog):
    assert isinstance(copiers.page_copier(FORM, devices), TorchPageCopier)
    assert not caplog.records


def test_where_triton_does_not_work_torch_copies_and_says_so(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(copiers, "_copy_one_chunk", fail)
    assert isinstance(copiers.page_copier(FORM, [GPU]), TorchPageCopier)
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_on_a_gpu_are_copied_by_triton():
    assert type(copiers.page_copier(FORM, [GPU])).__name__ == "TritonPageCopier"
