"""Pages and page-locked host memory on a GPU: our copier beside what else copies pages.

16K tokens of several layers, chunk after chunk in host memory as the store keeps them, pages in random
order. `copier` is `kvstore.kernels.copiers.page_copier`, one call a layer, waited for at the end;
`copier_waited` the same with each call waited for; `pinned` one plain copy of the same bytes, both
sides contiguous; `per_page` a non-blocking copy for each page and plane; `index` copies whole sections
and moves pages on the GPU, with index_copy_ and index_select; `torch_copier` our reference. JSON:
machine, gpu (null without one, and no cases), `cases`: a list of {shape, page_tokens, direction
(host_to_pages, pages_to_host), `gbps`: {name: GB/s}, of_pinned}, medians over the rounds.

`quantized`: the same of sections that a tensor codec makes: a list of {shape, page_tokens, codec, `gbps`
(GB/s of pages' bytes), dequantize_vs_pinned, quantize_vs_pinned}, beside a plain copy of the pages' bytes
in the same rounds. `dequantize` is one call a layer, waited for at the end; `quantize` one call for all
chunks and layers, `quantize_by_chunk` one a chunk, as a save does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.command_line import add_numbers, add_rounds, parser_of
from benchmarks.pinned_sections import SHAPES, PinnedSections, medians
from benchmarks.quantized_copies import CODECS, QUANTIZED_SHAPES, QuantizedBench
from benchmarks.report import machine, print_result, say
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.copiers import page_copier
from kvstore.kernels.torch_copier import TorchPageCopier
from kvstore.layout import ChunkForm

PAGE_TOKENS = (16, 32, 64, 128, 256)
DIRECTIONS = ("host_to_pages", "pages_to_host")
# What costs microseconds a page is measured on these many layers: its rate is the same on more.
SLOW_LAYERS = 2


def main() -> None:
    parser = parser_of(prog="make bench NAME=kernels", description=__doc__)
    add_rounds(parser, 5)
    add_numbers(parser, "--page-tokens", PAGE_TOKENS, "tokens of a page, a case each")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        say("no GPU here: nothing was measured")
        print_result({"machine": machine(), "gpu": None, "cases": [], "quantized": []})
        return
    cases, quantized = [], []
    for shape in SHAPES:
        for page_tokens in arguments.page_tokens:
            with Bench.of(shape, page_tokens) as bench:
                bench.check()
                for row in bench.measure(arguments.rounds):
                    cases.append({"shape": shape, "page_tokens": page_tokens, **row})
                    print_case(cases[-1])
                for name in CODECS if shape in QUANTIZED_SHAPES else ():
                    row = QuantizedBench(bench, name).measure(arguments.rounds)
                    quantized.append({"shape": shape, "page_tokens": page_tokens, **row})
                    print_quantized(quantized[-1])
    gpu = torch.cuda.get_device_name()
    print_result({"machine": machine(), "gpu": gpu, "cases": cases, "quantized": quantized})


class Bench(PinnedSections):
    """Every way to copy sections in host form, for all layers or for some."""

    def __init__(self, form: ChunkForm, host: memoryview) -> None:
        super().__init__(form, host)
        self.slow_layers = min(SLOW_LAYERS, form.layers)
        self.copier = page_copier(form, [torch.device("cuda", 0)])
        self.reference = TorchPageCopier(form)

    def check(self) -> None:
        """Copy to pages and back into zeroed memory: every byte comes back."""
        before = self.flat_host.clone()
        self.run_copier("host_to_pages")
        torch.cuda.synchronize()
        self.flat_host.zero_()
        self.run_copier("pages_to_host")
        if not torch.equal(self.flat_host, before):
            raise SystemExit("bytes were lost on the way to pages and back")

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Each way to copy in turn, in both directions; the first round only warms up."""
        ways = self._ways()
        took_s = medians(
            {
                (direction, name): partial(run, direction)
                for direction in DIRECTIONS
                for name, (run, _layers) in ways.items()
            },
            rounds,
        )
        rows = []
        for direction in DIRECTIONS:
            gbps = {
                name: self.layer_gb * layers / took_s[direction, name]
                for name, (_run, layers) in ways.items()
            }
            shown = {name: round(value, 1) for name, value in gbps.items()}
            of_pinned = round(gbps["copier"] / gbps["pinned"], 3)
            rows.append({"direction": direction, "gbps": shown, "of_pinned": of_pinned})
        return rows

    def _ways(self) -> dict[str, tuple[Callable[[str], None], int]]:
        """By name, what copies, and how many layers it does."""
        total, some = self.form.layers, self.slow_layers
        return {
            "copier": (self.run_copier, total),
            "copier_waited": (self.run_copier_waited, total),
            "pinned": (self.copy_flat, total),
            "per_page": (self.run_per_page, some),
            "index": (self.run_index, total),
            "torch_copier": (self.run_reference, some),
        }

    def run_copier(self, direction: str) -> None:
        begin = (
            (lambda layer: self.copier.begin_scatter(self.sections[layer], self.planes[layer], self.ids))
            if direction == "host_to_pages"
            else (lambda layer: self.copier.begin_gather(self.planes[layer], self.ids, self.sections[layer]))
        )
        for copy in [begin(layer) for layer in range(self.form.layers)]:
            copy.wait()

    def run_copier_waited(self, direction: str) -> None:
        self._run_waited(self.copier, direction, self.form.layers)

    def run_reference(self, direction: str) -> None:
        self._run_waited(self.reference, direction, self.slow_layers)

    def run_per_page(self, direction: str) -> None:
        for layer in range(self.slow_layers):
            for number, plane in enumerate(self.planes[layer]):
                for chunk, ids in enumerate(self.ids):
                    host = self._host_plane(layer, chunk, number)
                    for row, page in enumerate(ids):
                        if direction == "host_to_pages":
                            plane[page].copy_(host[row], non_blocking=True)
                        else:
                            host[row].copy_(plane[page], non_blocking=True)

    def run_index(self, direction: str) -> None:
        to_pages = direction == "host_to_pages"
        for layer, planes in enumerate(self.planes):
            for number, plane in enumerate(planes):
                hosts = [self._host_plane(layer, chunk, number) for chunk in range(self.chunks)]
                if to_pages:
                    staged = plane.new_empty(self.index.shape[0], *plane.shape[1:])
                    for part, host in zip(staged.split(self.form.layout.pages), hosts, strict=True):
                        part.copy_(host, non_blocking=True)
                    plane.index_copy_(0, self.index, staged)
                else:
                    staged = plane.index_select(0, self.index)
                    for part, host in zip(staged.split(self.form.layout.pages), hosts, strict=True):
                        host.copy_(part, non_blocking=True)

    def _run_waited(self, copier: PageCopier, direction: str, layers: int) -> None:
        for layer in range(layers):
            if direction == "host_to_pages":
                copier.scatter(self.sections[layer], self.planes[layer], self.ids)
            else:
                copier.gather(self.planes[layer], self.ids, self.sections[layer])

    def _host_plane(self, layer: int, chunk: int, number: int) -> torch.Tensor:
        """One plane of a section as pages."""
        start = self.starts(layer)[chunk] + sum(self.form.plane_bytes[:number])
        plane = self.planes[layer][number]
        flat = self.flat_host[start : start + self.form.plane_bytes[number]]
        return flat.view(plane.dtype).view(-1, *plane.shape[1:])


def print_case(case: dict[str, Any]) -> None:
    figures = ", ".join(f"{name} {value}" for name, value in case["gbps"].items())
    say(
        f"{case['shape']}, pages of {case['page_tokens']}, {case['direction']}: GB/s {figures};"
        f" {case['of_pinned']} of pinned"
    )


def print_quantized(case: dict[str, Any]) -> None:
    figures = ", ".join(f"{name} {value}" for name, value in case["gbps"].items())
    say(
        f"{case['shape']}, pages of {case['page_tokens']}, {case['codec']}: GB/s {figures};"
        f" dequantize {case['dequantize_vs_pinned']} and quantize {case['quantize_vs_pinned']} of pinned"
    )


if __name__ == "__main__":
    main()
