"""Quantized sections to pages and back on a GPU, beside a plain pinned copy of the pages' bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.pinned_sections import PinnedSections, medians
from kvstore.codecs.registry import tensor_codec
from kvstore.codecs.tensor_families import SINK_TOKENS
from kvstore.kernels.copiers import page_copier
from kvstore.kernels.torch_copier import TorchPageCopier

CODECS = ("int8", "int4:64", "fp8")
QUANTIZED_SHAPES = ("llama-8b", "llama-70b, 1 of 8 ranks")


class QuantizedBench:
    """The chunks of one prefix in pages, and in host memory what a codec makes of them."""

    def __init__(self, pinned: PinnedSections, name: str) -> None:
        form = pinned.form
        self.pinned = pinned
        self.name = name
        self.codec = tensor_codec(name, form)
        self.lossless_tokens = [SINK_TOKENS, *[0] * (pinned.chunks - 1)]
        self.copier = page_copier(form, [torch.device("cuda", 0)], self.codec)
        if isinstance(self.copier, TorchPageCopier):
            raise SystemExit("Triton does not work here: see the warning above")
        generator = torch.Generator("cuda").manual_seed(0)
        for planes in pinned.planes:
            for plane in planes:
                plane.normal_(generator=generator)
        self.quantize()
        # As a reader has them: no longer than they are.
        self.quantized = [
            [
                section[: self.codec.stored_bytes(first)]
                for section, first in zip(of_layer, self.lossless_tokens, strict=True)
            ]
            for of_layer in pinned.sections
        ]
        self.check()

    def check(self) -> None:
        """A section is what the codec makes of its host form, and fills pages as the codec decodes it."""
        pinned, plain = self.pinned, TorchPageCopier(self.pinned.form)
        planes, ids = pinned.planes[0], [pinned.ids[0]]
        host, out, back = (memoryview(bytearray(pinned.form.section_bytes)) for _ in range(3))
        plain.gather(planes, ids, [host])
        length = self.codec.encode(host, out, self.lossless_tokens[0])
        if out[:length] != self.quantized[0][0]:
            raise SystemExit(f"{self.name}: pages were not quantized as the codec does")
        self.dequantize()
        plain.gather(planes, ids, [host])
        self.codec.decode(self.quantized[0][0], back)
        if host != back:
            raise SystemExit(f"{self.name}: pages were not filled as the codec decodes")

    def measure(self, rounds: int) -> dict[str, Any]:
        """GB/s of pages' bytes, each way in turn; medians over the rounds."""
        ways: dict[str, Callable[[], None]] = {
            "pinned_to_gpu": partial(self.pinned.copy_flat, "host_to_pages"),
            "dequantize": self.dequantize,
            # Brings back what the first of these copied: sections stay what they are.
            "pinned_to_host": partial(self.pinned.copy_flat, "pages_to_host"),
            "quantize": self.quantize,
            "quantize_by_chunk": self.quantize_by_chunk,
        }
        page_gb = self.pinned.layer_gb * self.pinned.form.layers
        gbps = {name: page_gb / took_s for name, took_s in medians(ways, rounds).items()}
        return {
            "codec": self.name,
            "gbps": {name: round(value, 1) for name, value in gbps.items()},
            "dequantize_vs_pinned": round(gbps["dequantize"] / gbps["pinned_to_gpu"], 3),
            "quantize_vs_pinned": round(gbps["quantize"] / gbps["pinned_to_host"], 3),
        }

    def dequantize(self) -> None:
        """One call a layer, waited for at the end."""
        pinned = self.pinned
        for copy in [
            self.copier.begin_scatter(sections, planes, pinned.ids)
            for sections, planes in zip(self.quantized, pinned.planes, strict=True)
        ]:
            copy.wait()

    def quantize(self) -> None:
        """One call for all chunks and layers."""
        pinned = self.pinned
        self.copier.quantize_layers(pinned.planes, pinned.ids, pinned.sections, self.lossless_tokens)

    def quantize_by_chunk(self) -> None:
        """One call a chunk, for all of its layers, as a save does."""
        for chunk, ids in enumerate(self.pinned.ids):
            sections = [[of_layer[chunk]] for of_layer in self.pinned.sections]
            first = [self.lossless_tokens[chunk]]
            self.copier.quantize_layers(self.pinned.planes, [ids], sections, first)
