#!/usr/bin/env python
"""Print what it costs to give a sample the same bits at every batch size, in each way that there is.

The demo's UNet, with classifier-free guidance (two rows a sample), on one thread. ``one at a time`` is what level
``invariant`` does: the graph for one sample, called for each. The others are graphs for the whole batch: plain,
compiled in Inductor's batch-invariant mode, and with every convolution and every matrix product done row by row in the
graph. Takes ten minutes on two cores, nearly all of it compiling. The exit code is 1 if a way that level ``invariant``
relies on did not keep the bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipevault.opening import DEMO_MODEL, open_pipeline

BATCH_SIZES = (1, 2, 4, 8)
ROWS_PER_SAMPLE = 2
ROUNDS = 15
MODES = ("plain", "batch_invariant", "row by row")
FAST_WRAPPER = {"aot_inductor.compile_wrapper_opt_level": "O0"}

Graph = Callable[..., torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Denoiser(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: torch.Tensor, step: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.unet(latents, step, embeds, return_dict=False)[0]
        return predicted


def inputs(pipe: Any, samples: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    config, rows = pipe.unet.config, samples * ROWS_PER_SAMPLE
    side, tokens = config.sample_size, pipe.tokenizer.model_max_length
    latents = torch.randn(rows, config.in_channels, side, side, generator=generator)
    return latents, torch.tensor(500), torch.randn(rows, tokens, config.cross_attention_dim, generator=generator)


def of_sample(whole: Inputs, index: int) -> Inputs:
    rows = slice(index * ROWS_PER_SAMPLE, (index + 1) * ROWS_PER_SAMPLE)
    return whole[0][rows], whole[1], whole[2][rows]


def build(pipe: Any, example: Inputs, mode: str, folder: Path) -> tuple[Graph, float]:
    """A loaded graph, and the seconds that it took to make."""
    started_s = time.perf_counter()
    with torch.no_grad():
        program = torch.export.export(Denoiser(pipe.unet).eval(), example, strict=False)
        if mode == "row by row":
            do_row_by_row(program.graph_module)
        config = {**FAST_WRAPPER, **({"batch_invariant": True} if mode == "batch_invariant" else {})}
        file = folder / f"{mode.replace(' ', '-')}-{len(example[0])}.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=config)
        graph: Graph = torch._inductor.aoti_load_package(str(file))
    return graph, time.perf_counter() - started_s


def do_row_by_row(module: torch.fx.GraphModule) -> None:
    """Replace every convolution and linear layer by one for each row of its input."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            continue
        rows = node.args[0].meta["val"].shape[0]
        with graph.inserting_before(node):
            parts = [graph.call_function(torch.ops.aten.slice.Tensor, (node.args[0], 0, i, i + 1)) for i in range(rows)]
            for index, part in enumerate(parts):
                part.meta["val"] = node.args[0].meta["val"][index : index + 1]
            made = [graph.call_function(node.target, (part, *node.args[1:]), node.kwargs) for part in parts]
            for index, one in enumerate(made):
                one.meta["val"] = node.meta["val"][index : index + 1]
            joined = graph.call_function(torch.ops.aten.cat.default, (made, 0))
            joined.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(joined)
        graph.erase_node(node)
    module.recompile()


def one_at_a_time(graph: Graph, each: Sequence[Inputs]) -> list[torch.Tensor]:
    return [graph(*one) for one in each]


def milliseconds(action: Callable[[], Any]) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - started_s))
    return statistics.median(times)


def rows_of_table(pipe: Any, folder: Path) -> Iterator[dict[str, Any]]:
    alone: dict[str, Graph] = {}
    for samples in BATCH_SIZES:
        whole = inputs(pipe, samples)
        each = [of_sample(whole, index) for index in range(samples)]
        for mode in MODES:
            graph, compile_s = build(pipe, whole, mode, folder)
            alone.setdefault(mode, graph)
            together = graph(*whole)
            expected = torch.cat(one_at_a_time(alone[mode], each))
            yield {
                "way": f"{mode}, whole batch",
                "batch": samples,
                "same bits as alone": bool(torch.equal(together, expected)),
                "ms": round(milliseconds(partial(graph, *whole)), 2),
                "compile_s": round(compile_s, 1),
            }
        yield {
            "way": "one at a time",
            "batch": samples,
            "same bits as alone": bool(torch.equal(alone["plain"](*each[0]), alone["plain"](*of_sample(whole, 0)))),
            "ms": round(milliseconds(partial(one_at_a_time, alone["plain"], each)), 2),
            "compile_s": 0.0,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pipe = open_pipeline(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(rows_of_table(pipe, Path(folder)))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return 0 if all(row["same bits as alone"] for row in rows if row["way"] == "one at a time") else 1


if __name__ == "__main__":
    sys.exit(main())
