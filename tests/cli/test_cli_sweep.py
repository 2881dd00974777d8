"""``pipevault sweep`` with a painter in place of a model: what it prints, writes and refuses."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipevault
from helpers import browser
from helpers.command_runner import Run
from helpers.sweeps import Painter, sweep_result
from pipevault.cli import sweep
from pipevault.cli.pipelines import parse_seeds
from pipevault.demo import DIGIT_WORDS
from pipevault.errors import BadSeedError, SettingsError
from pipevault.evidence import quality


class GuidedPainter(Painter):
    """Takes the demo's arguments; paints seed 3 white, so that it stands out."""

    def __call__(self, prompt: Any = "", guidance_scale: float = 1.0, **arguments: Any) -> Any:  # type: ignore[override]
        output = super().__call__(prompt, **arguments)
        generators = arguments["generator"] if isinstance(arguments["generator"], list) else [arguments["generator"]]
        white = pipevault.sample_seed(3, 0)
        for index, generator in enumerate(generators):
            if generator.initial_seed() == white:
                output.images[index] = Image.new("RGB", output.images[index].size, "white")
        return output


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model was opened with."""
    seen: dict[str, Any] = {}

    def open_pipeline(model: str, **options: Any) -> Any:
        seen.update(model=model, **options)
        seen["pipe"] = GuidedPainter()
        return seen["pipe"]

    monkeypatch.setattr(sweep, "open_pipeline", open_pipeline)
    monkeypatch.setattr(quality, "lpips_metric", lambda: "the package lpips is not installed")
    return seen


@pytest.fixture
def swept(run: Run, tmp_path: Path) -> Any:
    """Sweeps two prompts with the seeds 0 to 7 into a folder; further arguments go to the command."""

    def swept(*arguments: str | Path, out: str = "out", prompts: tuple[str, ...] = ("one", "two")) -> Any:
        named = [part for prompt in prompts for part in ("--prompts", prompt)]
        return run("sweep", "demo", "--mode", "off", "--out", tmp_path / out, *named, *arguments)

    return swept


class TestSeeds:
    @pytest.mark.parametrize(
        ("text", "seeds"),
        [
            ("0..3", (0, 1, 2, 3)),
            ("0,5,9", (0, 5, 9)),
            ("0..3,10", (0, 1, 2, 3, 10)),
            (" 7 , 2 .. 3 ", (7, 2, 3)),
            ("4..4", (4,)),
            (str(2**64 - 1), (2**64 - 1,)),
        ],
    )
    def test_what_is_understood(self, text: str, seeds: tuple[int, ...]) -> None:
        assert parse_seeds(text, most=256) == seeds

    @pytest.mark.parametrize(
        ("text", "error", "words"),
        [
            *(
                (text, BadSeedError, f"Invalid seeds {text!r}: expected seeds such as 0..31")
                for text in ("", "  ", "1,,2", "seven", "1.5", "1..", "0..3..5", "0-3", "9" * 10_000)
            ),
            ("9..3", BadSeedError, "Write 3..9"),
            ("0..256", SettingsError, "more than 256 seeds"),
            (f"0..{2**64 - 1}", SettingsError, "more than 256 seeds"),
            ("0..200,300..400", SettingsError, "more than 256 seeds"),
        ],
    )
    def test_what_is_none(self, text: str, error: type[SettingsError], words: str) -> None:
        with pytest.raises(error, match=re.escape(words)) as caught:
            parse_seeds(text, most=256)
        assert isinstance(caught.value, BadSeedError) == (error is BadSeedError)


class TestOutput:
    def test_json_and_files(self, swept: Any, tmp_path: Path) -> None:
        result = swept("--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["drift"] is None
        written = json.loads((tmp_path / "out" / "sweep.json").read_text())
        assert document["sweep"] == written
        assert written["prompts"] == ["one", "two"]
        assert written["seeds"] == list(range(8))
        assert written["call"]["guidance_scale"] == 3.0
        assert sorted(map(Path, document["files"].values())) == sorted(
            path for path in (tmp_path / "out").rglob("*") if path.is_file()
        )
        assert {path.stem for path in (tmp_path / "out" / "plots").iterdir()} == {"shares", *written["scores"]}
        with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
            assert sheet.width > 8 * 64

    def test_text_shows_shares_and_names_what_is_not_available(self, swept: Any, tmp_path: Path) -> None:
        text = swept().stdout
        assert re.search(r"^Contrast +[\d.]+ % +[\d.]+ % +[\d.]+ % +[\d.]+ +3$", text, re.MULTILINE), text
        assert "not available: no CLIP model was named: give --clip-model" in text
        assert "not available: the package lpips is not installed" in text
        assert re.search(r"^outlier seeds .*\b3\b", text, re.MULTILINE)
        assert str(tmp_path / "out" / "report.html") in text

    def test_one_of_a_kind_is_named_so(self, swept: Any) -> None:
        assert re.search(
            r"^pictures +1 prompt by 1 seed$", swept("--seeds", "0", prompts=("one",)).stdout, re.MULTILINE
        )

    def test_the_report_is_one_page_that_needs_no_other_file(self, swept: Any, tmp_path: Path) -> None:
        swept()
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert set(re.findall(r'src="([a-z]+:[a-z]+/[a-z+]+)', page)) == {"data:image/png", "data:image/svg+xml"}
        assert "<script" not in page
        assert "machine" in page
        assert "features [" not in page
        assert "href=" not in page
        assert "Seed 3</h3>" in page
        assert "modified z" in page
        sheet = base64.b64encode((tmp_path / "out" / "contact-sheet.png").read_bytes()).decode()
        assert sheet in page
        plot = base64.b64encode((tmp_path / "out" / "plots" / "contrast.svg").read_bytes()).decode()
        assert plot in page

    def test_prompts_are_text_and_no_markup(self, swept: Any, tmp_path: Path) -> None:
        swept(prompts=("<b>one</b> $x$", "two"))
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert "<b>one" not in page
        assert "&lt;b&gt;one" in page

    @pytest.mark.browser
    def test_the_report_in_a_browser(self, swept: Any, tmp_path: Path) -> None:
        swept()
        assert swept("--baseline", tmp_path / "out" / "sweep.json", "--steps", "2", out="again").exit_code == 0
        found = json.loads((tmp_path / "again" / "sweep.json").read_text())
        outliers = len(found["found"]["outlier_seeds"])
        assert outliers > 0
        # Shares, contact sheet, two pictures of each outlier seed, and a plot of each score.
        expected = 1 + 1 + 2 * outliers + len(found["scores"])
        browser.check_page(tmp_path / "again" / "report.html", pictures=expected)

    def test_the_same_sweep_gives_the_same_pictures_and_plots(self, swept: Any, tmp_path: Path) -> None:
        swept()
        swept(out="again")
        for path in [tmp_path / "out" / "contact-sheet.png", *(tmp_path / "out" / "plots").iterdir()]:
            again = tmp_path / "again" / path.relative_to(tmp_path / "out")
            assert path.read_bytes() == again.read_bytes(), path.name

    def test_the_demo_draws_the_ten_digits_ten_at_once(self, run: Run, tmp_path: Path, opened: dict[str, Any]) -> None:
        result = run("sweep", "demo", "--mode", "off", "--seeds", "0,1", "--out", tmp_path / "out", "--json")
        document = json.loads(result.stdout)["sweep"]
        assert document["prompts"] == [f"a handwritten {word}" for word in DIGIT_WORDS]
        assert document["batch_size"] == 10
        assert [len(call) for call in opened["pipe"].calls] == [10, 10]
        assert "digit_confidence" in document["scores"]

    def test_options_reach_the_model_and_the_call(self, run: Run, tmp_path: Path, opened: dict[str, Any]) -> None:
        result = run(
            *("sweep", "./model", "--mode", "off", "--prompt", "x", "--seeds", "0", "--out", tmp_path / "o", "--json"),
            *("--size", "6x4", "--steps", "5", "--guidance-scale", "2", "--dtype", "bfloat16", "--device", "cpu"),
        )
        document = json.loads(result.stdout)["sweep"]
        assert (opened["model"], opened["dtype"], opened["device"]) == ("./model", "bfloat16", "cpu")
        call = {name: value for name, value in document["call"].items() if value not in (None, {})}
        assert call == {"steps": 5, "guidance_scale": 2.0, "height": 4, "width": 6}
        assert document["batch_size"] == 1

    def test_a_folder_is_named_by_its_last_name_and_never_taken_for_the_demo(self, tmp_path: Path) -> None:
        (tmp_path / "demo").mkdir()
        assert sweep.model_label(str(tmp_path / "demo")) == "demo/"
        assert sweep.model_label("demo") == "demo"
        assert sweep.model_label("org/name") == "org/name"

    def test_prompts_from_a_file(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_bytes("\ufeffein Füchslein\r\n\r\n  a fox \n".encode())
        result = run(
            *("sweep", "demo", "--mode", "off", "--prompts-file", tmp_path / "prompts.txt", "--seeds", "0"),
            *("--out", tmp_path / "out", "--json"),
        )
        assert json.loads(result.stdout)["sweep"]["prompts"] == ["ein Füchslein", "a fox"]


class TestBaseline:
    def test_the_same_again_has_no_drift(self, swept: Any, tmp_path: Path) -> None:
        swept()
        result = swept("--baseline", tmp_path / "out" / "sweep.json", "--fail-on-drift")
        assert result.exit_code == 0, result.output
        assert "All 16 pictures that both sweeps have are the same, bit by bit." in result.stdout

    def test_drift_is_told_and_fails_only_if_asked_to(self, swept: Any, tmp_path: Path) -> None:
        swept()
        baseline = ("--baseline", tmp_path / "out" / "sweep.json", "--seeds", "1..9", "--size", "9x9")
        result = swept(*baseline, "--json", out="new")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["drift"]
        assert (found["compared"], len(found["changed"])) == (14, 14)
        assert found["context"][0] == "seeds: 0, 1, 2, 3, 4, 5, 6, 7 then, 1, 2, 3, 4, … now"
        assert set(found["shifts"]["contrast"]) == {"mean", "standard_error", "p_value", "pairs"}
        failing = swept(*baseline, "--fail-on-drift", out="third")
        assert failing.exit_code == 1
        assert "14 of 14 pictures are not those of" in failing.stderr
        assert "14 of the 14 pictures that both sweeps have differ." in failing.stdout
        page = (tmp_path / "third" / "report.html").read_text("utf-8")
        assert "Against the baseline" in page
        assert "call height: none then, 9 now" in page

    def test_a_baseline_of_another_model_is_refused_before_anything_is_opened(
        self, swept: Any, tmp_path: Path, opened: dict[str, Any]
    ) -> None:
        (tmp_path / "old.json").write_text(sweep_result(model="other").to_json())
        result = swept("--baseline", tmp_path / "old.json")
        assert (result.exit_code, "a sweep of other, not of demo" in result.stderr) == (2, True)
        assert opened == {}

    def test_a_baseline_of_a_newer_format(self, swept: Any, tmp_path: Path) -> None:
        (tmp_path / "old.json").write_text('{"pipevault_sweep": 99}')
        result = swept("--baseline", tmp_path / "old.json")
        assert (result.exit_code, "Upgrade pipevault" in result.stderr) == (2, True)

    def test_a_baseline_that_is_not_there(self, swept: Any, tmp_path: Path) -> None:
        assert swept("--baseline", tmp_path / "none.json").exit_code == 2

    def test_fail_on_drift_without_a_baseline(self, swept: Any) -> None:
        result = swept("--fail-on-drift")
        assert (result.exit_code, "give --baseline" in result.stderr) == (2, True)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["--seeds", ""], 2, "expected seeds such as"),
            (["--seeds", "5..1"], 2, "runs downwards"),
            (["--seeds", "-1..3"], 2, "seed -1 is out of range"),
            (["--seeds", "-3..-5"], 2, "runs downwards"),
            (["--seeds", str(2**64)], 2, "out of range"),
            (["--seeds", "0,0"], 2, "twice"),
            (["--seeds", "0..999"], 2, "256"),
            (["--size", "big"], 2, "Invalid size"),
            (["--batch-size", "0"], 2, "batch-size"),
            (["--prompts", "one"], 2, "'one' is given twice"),
            (["--prompts", " "], 2, "Give a text to draw"),
            (["--prompts-file", "x.txt"], 2, "not both"),
            (["--clip-model", "./none"], 2, "cannot be opened as a CLIP model"),
            (["--level", "divine"], 2, "divine"),
        ],
    )
    def test_options(self, swept: Any, arguments: list[str], code: int, words: str) -> None:
        result = swept(*arguments)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr

    @pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
    def test_prompts_files(self, run: Run, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "prompts.txt"
        if content is not None:
            file.write_bytes(content)
        result = run("sweep", "demo", "--mode", "off", "--prompts-file", file, "--out", tmp_path / "out")
        assert (result.exit_code, str(file) in result.stderr) == (2, True)
        assert (f"{file} does not exist." in result.stderr) == (content is None)

    def test_a_model_that_needs_prompts(self, run: Run, tmp_path: Path) -> None:
        result = run("sweep", "./model", "--mode", "off", "--out", tmp_path / "out")
        assert (result.exit_code, "--prompts" in result.stderr) == (2, True)

    def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_opened(
        self, swept: Any, tmp_path: Path, opened: dict[str, Any]
    ) -> None:
        (tmp_path / "file").write_text("x")
        result = swept(out="file")
        assert (result.exit_code, "--out" in result.stderr, opened) == (4, True, {})

    @pytest.mark.parametrize("module", ["matplotlib", "jinja2", "skimage", "scipy"])
    def test_a_missing_extra_is_told_before_anything_is_opened(
        self, swept: Any, monkeypatch: pytest.MonkeyPatch, module: str, opened: dict[str, Any]
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        result = swept()
        assert (result.exit_code, "pipevault[report]" in result.stderr, opened) == (4, True, {})
