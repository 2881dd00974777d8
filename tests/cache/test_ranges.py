"""One graph for a range of sizes, as loads ask for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.errors import BadCallError, MissError
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile


class Mixer(nn.Module):
    """Convolves at two sizes, so that heights and widths must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(1, 4, 3, padding=1)
        self.outside = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(torch.tanh(self.inside(latents)), 2)
        if latents.shape[-1] % 2 or latents.shape[-2] % 2:
            raise ValueError("odd sizes")
        return latents - 0.1 * nn.functional.interpolate(self.outside(x), scale_factor=2.0) * torch.cos(step)


class Stubborn(nn.Module):
    """Its code depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return latents - 0.1 * torch.tanh(self.mix(latents)) * torch.cos(step) * float(latents.shape[1] == 12)


class Lengths(nn.Module):
    """Takes the lengths of what it is given as numbers, as transformers of packed sequences do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        [own] = torch.split(latents, lengths, dim=1)
        return own - 0.1 * torch.tanh(self.mix(own)) * torch.cos(step)


class LengthsPipeline(PlainPipeline):
    """Calls its part at six lengths in one run, the last of them 1."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = Lengths().eval()

    def __call__(self, prompt: str = "", height: int = 16, generator: torch.Generator | None = None) -> torch.Tensor:  # type: ignore[override]
        latents = torch.randn(1, height, 8, generator=generator)
        drawn = []
        with torch.no_grad():
            for number, length in enumerate((height, height - 1, 12, 9, 5, 1)):
                part = latents[:, :length]
                drawn.append(self.transformer(part, torch.tensor(float(number)), [length]))
        return torch.cat(drawn, dim=1)


class SizedPipeline(PlainPipeline):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer = Mixer().eval()

    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        batch_size = len(prompt) if isinstance(prompt, list) else 1
        latents = torch.randn(batch_size, 1, height, width, generator=generator)
        with torch.no_grad():
            for step in range(num_inference_steps):
                latents = self.transformer(latents, torch.tensor(float(step)))
        return latents


class StubbornPipeline(PlainPipeline):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer = Stubborn().eval()


def cache(root: Path, mode: str = "require", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, build_config=FAST_BUILD, **options)


RANGE: dict[str, Any] = {"height": (8, 16), "width": (8, 32), "batch_size": (2, 4)}
SIZES = [(8, 8, 2), (16, 32, 4), (8, 32, 3), (12, 10, 2), (16, 16, 4)]


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranges") / "vault"
    pipe = cache(root, "compile").load(SizedPipeline(), **RANGE)
    assert pipevault.outcome(pipe).status == "miss"
    assert pipevault.outcome(pipe).problems == ()
    return root


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)


def graphs_in(root: Path) -> list[str]:
    found = (m for m in Vault.open(root).manifests() if m.key.kind == "graph")
    return sorted(str(manifest.info["signature_text"]) for manifest in found)


def test_one_graph_serves_the_whole_range(vault: Path, no_compiling: None) -> None:
    assert graphs_in(vault) == [
        "float32[batch,1,height,width], float32[] where batch 2-4, height 8-16, width 8-32",
    ]
    pipe, plain = cache(vault).load(SizedPipeline(), **RANGE), SizedPipeline()
    assert pipevault.outcome(pipe).status == "hit"
    for height, width, batch in SIZES:
        arguments: dict[str, Any] = {"height": height, "width": width, "prompt": ["a"] * batch}
        torch.testing.assert_close(draw(pipe, **arguments), draw(plain, **arguments), atol=1e-5, rtol=1e-5)
    assert pipevault.outcome(pipe).parts["transformer"].graphs == 1


def test_a_load_without_a_shape_finds_the_range(vault: Path, no_compiling: None) -> None:
    pipe = cache(vault).load(SizedPipeline())
    draw(pipe, height=10, width=14, prompt=["a", "b"])
    assert pipevault.outcome(pipe).parts["transformer"].status == "frozen"


def test_every_process_gives_the_same_bits(vault: Path, no_compiling: None) -> None:
    arguments: dict[str, Any] = {"height": 12, "width": 20, "prompt": ["a", "b", "c"]}
    pipe = cache(vault).load(SizedPipeline())
    first = draw(pipe, **arguments)
    assert torch.equal(first, draw(pipe, **arguments))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from cache.test_ranges import SizedPipeline, cache, draw\n"
        f"drawn = draw(cache(Path(sys.argv[2])).load(SizedPipeline()), **{arguments!r})\n"
        "print(drawn.numpy().tobytes().hex())"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, tests, str(vault)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == first.numpy().tobytes().hex()


def test_sizes_beyond_the_range_are_frozen_as_they_come_and_then_preferred(vault: Path, tmp_path: Path) -> None:
    root = shutil.copytree(vault, tmp_path / "vault")
    pipe = cache(root, "compile").load(SizedPipeline())
    draw(pipe, height=18, width=8, prompt=["a", "b"])
    assert "float32[2,1,18,8], float32[]" in graphs_in(root)
    cache(root, "compile").load(pipe, height=12, width=12, batch_size=2)
    draw(pipe, height=12, width=12, prompt=["a", "b"])
    assert len(graphs_in(root)) == 2, "a size in the range needs no graph of its own"


def test_an_exact_graph_is_preferred_and_then_the_tightest_range() -> None:
    from graphs.test_range_signatures import signature_of
    from pipevault.graphs.ranges import Symbol
    from pipevault.graphs.table import ShelfItem, Table

    base = signature_of((4, 4))
    wide = base.with_sizes(["height", 4], [Symbol("height", 2, 64)], [])
    tight = base.with_sizes(["height", 4], [Symbol("height", 2, 8)], [])
    table, module = Table(None), nn.Module()
    for key, signature in (("wide", wide), ("tight", tight), ("exact", base)):
        table.add(ShelfItem(signature, key))

    def found(height: int) -> str:
        slot, _ = table.find(module, [torch.empty(height, 4)], {})
        return slot.kept.key if slot else ""

    assert [found(4), found(3), found(9), found(65)] == ["exact", "tight", "wide", ""]
    table.remove(next(slot for slot in table if slot.kept.key == "tight"))
    assert [found(4), found(3)] == ["exact", "wide"]


def test_what_a_model_refuses_is_told_and_frozen_size_by_size(tmp_path: Path) -> None:
    pipe, plain = StubbornPipeline(), StubbornPipeline()
    cache(tmp_path / "vault", "compile").load(pipe, height=(8, 12))
    result = pipevault.outcome(pipe)
    assert any("transformer has no graph for a range of sizes" in text for text in result.problems), result
    assert graphs_in(tmp_path / "vault") == ["float32[1,12,8], float32[]", "float32[1,8,8], float32[]"]
    for height in (8, 12, 10):
        torch.testing.assert_close(draw(pipe, height=height), draw(plain, height=height), atol=1e-5, rtol=1e-5)
    again = cache(tmp_path / "vault").load(StubbornPipeline(), height=(8, 12))
    assert pipevault.outcome(again).status == "hit"


def test_many_sizes_in_one_run_make_a_range_of_themselves(tmp_path: Path) -> None:
    def drawn(pipe: Any, height: int) -> torch.Tensor:
        output: torch.Tensor = pipe(height=height, generator=torch.Generator().manual_seed(1))
        return output

    pipe, plain = LengthsPipeline(), LengthsPipeline()
    cache(tmp_path / "vault", "compile").load(pipe, batch_size=1)
    assert graphs_in(tmp_path / "vault") == [
        "float32[1,1,8], float32[], list(1)",
        "float32[1,length,8], float32[], list(int) where length 5-16",
    ]
    for height in (16, 13, 12):
        torch.testing.assert_close(drawn(pipe, height), drawn(plain, height), atol=1e-5, rtol=1e-5)
    assert len(graphs_in(tmp_path / "vault")) == 2
    assert pipevault.outcome(pipe).problems == ()
    again = cache(tmp_path / "vault").load(LengthsPipeline())
    assert torch.equal(drawn(again, 15), drawn(pipe, 15))


def test_one_sample_is_apart_from_several(tmp_path: Path) -> None:
    pipe, plain = SizedPipeline(), SizedPipeline()
    cache(tmp_path / "vault", "compile").load(pipe, height=(8, 16), batch_size=(1, 4))
    assert graphs_in(tmp_path / "vault") == [
        "float32[1,1,height,8], float32[] where height 8-16",
        "float32[batch,1,height,8], float32[] where batch 2-4, height 8-16",
    ]
    for height, batch in ((8, 1), (12, 1), (16, 3), (10, 2)):
        arguments: dict[str, Any] = {"height": height, "prompt": ["a"] * batch}
        torch.testing.assert_close(draw(pipe, **arguments), draw(plain, **arguments), atol=1e-5, rtol=1e-5)
    assert len(graphs_in(tmp_path / "vault")) == 2


@pytest.mark.parametrize("kind", ["number", "cache"])
def test_what_depends_on_the_size_in_another_way_has_no_range(tmp_path: Path, kind: str) -> None:
    class Odd(Stubborn):
        table: torch.Tensor

        def forward(self, latents: torch.Tensor, step: torch.Tensor) -> Any:
            drawn = latents - 0.1 * torch.tanh(self.mix(latents)) * torch.cos(step)
            if kind == "number":
                return {"x": drawn, "rest": latents.shape[1] % 4}
            if getattr(self, "table", None) is None or self.table.shape[0] != latents.shape[1]:
                self.table = torch.arange(float(latents.shape[1])) / latents.shape[1]
            return {"x": drawn + self.table[: latents.shape[1], None], "rest": 0}

    class Pipeline(PlainPipeline):
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.transformer = Odd().eval()

        def __call__(self, prompt: str = "", height: int = 8, generator: torch.Generator | None = None) -> torch.Tensor:  # type: ignore[override]
            with torch.no_grad():
                found = self.transformer(torch.randn(1, height, 8, generator=generator), torch.tensor(1.0))
            drawn: torch.Tensor = found["x"] + found["rest"]
            return drawn

    def drawn(pipe: Any, height: int) -> torch.Tensor:
        output: torch.Tensor = pipe(height=height, generator=torch.Generator().manual_seed(1))
        return output

    pipe = cache(tmp_path / "vault", "compile").load(Pipeline(), height=(8, 16))
    assert any("no graph for a range" in text for text in pipevault.outcome(pipe).problems)
    for height in (10, 16, 8):
        torch.testing.assert_close(drawn(pipe, height), drawn(Pipeline(), height), atol=1e-5, rtol=1e-5)


def test_dynamic_makes_ranges_of_the_default_sizes(tmp_path: Path) -> None:
    pipe = cache(tmp_path / "vault", "compile").load(SizedPipeline(), dynamic=True, batch_size=(2, 4))
    assert graphs_in(tmp_path / "vault") == [
        "float32[batch,1,height,width], float32[] where batch 2-4, height 4-16, width 4-16",
    ]
    key = cache(tmp_path / "vault").key(SizedPipeline(), dynamic=True, batch_size=(2, 4))
    assert pipevault.outcome(pipe).key == key.digest
    assert key.factors["call"]["height"] == [4, 16]


def test_a_miss_of_a_range_in_mode_require(vault: Path) -> None:
    with pytest.raises(MissError, match="mode='compile'"):
        cache(vault).load(SizedPipeline(), height=(8, 64), batch_size=2)
    assert cache(vault).explain(SizedPipeline(), **RANGE).status == "hit"
    assert cache(vault).explain(SizedPipeline(), height=(8, 12)).status == "miss"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": (16, 8)}, r"height=\(16, 8\) is the wrong way round. Give \(8, 16\)"),
        ({"width": (8,)}, "is not a range"),
        ({"width": (8, 16, 24)}, "is not a range"),
        ({"batch_size": (0, 4)}, "batch_size must be a whole number above 0, not 0"),
        ({"height": (8, "16")}, "height must be a whole number above 0, not '16'"),
        ({"shapes": [{"height": (16, 8)}]}, "the wrong way round"),
    ],
)
def test_a_range_that_is_none(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCallError, match=message):
        cache(tmp_path / "vault").load(SizedPipeline(), **arguments)


def test_the_ends_of_a_range_must_be_divisible(tmp_path: Path) -> None:
    from helpers.pipelines import stable_diffusion

    pipe = stable_diffusion(tmp_path / "tokenizer")
    with pytest.raises(BadCallError, match="height=12 does not suit StableDiffusionPipeline"):
        cache(tmp_path / "vault").load(pipe, height=(12, 16))
