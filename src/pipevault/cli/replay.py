"""``pipevault replay``: draw saved outputs again and compare them bit by bit with their records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import dir_option, json_option
from pipevault.cli.progress import StepProgress
from pipevault.errors import PipevaultError, SettingsError
from pipevault.opening import DEMO_MODEL, open_pipeline

if TYPE_CHECKING:
    from pipevault.evidence.replay import Replay
    from pipevault.runtime.record import RunRecord

MAX_EXIT_CODE = 100

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FileResult:
    """What became of one file; exactly one of ``replay`` and ``error`` is given."""

    file: Path
    replay: Replay | None = None
    error: PipevaultError | None = None

    @property
    def is_equal(self) -> bool:
        return self.replay is not None and self.replay.equal


@click.command("replay", short_help="Draw saved outputs again, compare bit by bit.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The recorded model, where it lies elsewhere now.")
@click.option(
    "--input",
    "inputs",
    metavar="NAME=FILE",
    multiple=True,
    help="An image that the call was given; a record holds only its digest.",
)
@click.option("--allow-other-machine", is_flag=True, help="Measure the distance instead, also where bits must differ.")
@click.option("--compile", is_flag=True, help="Compile what the vault lacks, with your own settings.")
@click.option(
    "--save", metavar="FILE", type=click.Path(path_type=Path), help="Where the new output of a single FILE goes."
)
@dir_option
@json_option
def replay(
    files: tuple[Path, ...],
    model: str | None,
    inputs: tuple[str, ...],
    allow_other_machine: bool,
    compile: bool,
    save: Path | None,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Build the pipeline of each FILE's run record from the vault, generate again, compare bit by bit.

    FILE is an output that pipevault saved (PNG, JPEG, WebP, MP4), or a record (.json). Succeeds only if every result
    of every file came out again: noise, latents, pixels and, where the record has an audit, each part's outputs.
    Else the first thing that differs is named: machine, version, weights, noise, or the step and part. The exit code
    is the number of files that did not come out equal, at most 100; each has a line that says why.

    A record is data from a stranger: nothing is compiled unless --compile is given, nothing is fetched, and a model in
    a folder is opened only if you name it.

    \b
    Examples:
      pipevault replay digits-0.png
      pipevault replay out/*.png --dir /mnt/shared/vault
      pipevault replay photo.png --input image=source.png --model ./my-model
      pipevault replay digits-0.png --allow-other-machine --json
    """
    if save is not None and len(files) > 1:
        raise SettingsError(f"--save takes the output of one file, and {len(files)} are given.")
    pictures = _pictures(inputs)
    with StepProgress() as progress:
        session = _Session(model, dir, pictures, progress, allow_other_machine=allow_other_machine, compile=compile)
        results = [session.replay(file) for file in files]
    if save is not None and results[0].replay is not None:
        from pipevault import save as save_output

        save_output(results[0].replay.output, save)
    if as_json:
        render.print_json({"files": [_document(result) for result in results]})
    else:
        render.show(render.table(("FILE", "RESULT", "DETAIL"), map(_row, results)))
    click.get_current_context().exit(min(sum(not result.is_equal for result in results), MAX_EXIT_CODE))


class _Session:
    """Replays one file after the other, and opens each recorded pipeline once."""

    def __init__(
        self,
        model: str | None,
        dir: Path | None,
        inputs: dict[str, Any],
        progress: StepProgress,
        *,
        allow_other_machine: bool,
        compile: bool,
    ) -> None:
        self._model = model
        self._dir = dir
        self._inputs = inputs
        self._allow_other_machine = allow_other_machine
        self._compile = compile
        self._progress = progress
        self._pipes: dict[tuple[Any, ...], Any] = {}

    def replay(self, file: Path) -> FileResult:
        from pipevault import read_record
        from pipevault import replay as replay_record

        self._progress.subject = file.name
        try:
            pipe = self._pipeline(read_record(file))
            result = replay_record(
                file,
                pipe,
                dir=self._dir,
                inputs=self._inputs,
                allow_other_machine=self._allow_other_machine,
                compile=self._compile,
                progress=self._progress,
            )
        except PipevaultError as error:
            return FileResult(file, error=error)
        return FileResult(file, replay=result)

    def _pipeline(self, record: RunRecord) -> Any:
        load = record.pipeline.get("load", {})
        model = self._model or _recorded_model(record)
        dtypes = {dtype for dtype in load.get("dtype", {}).values() if dtype}
        if len(dtypes) > 1:
            raise SettingsError(
                f"The recorded pipeline had parts of several dtypes ({', '.join(sorted(dtypes))}). Construct it "
                "yourself and call pipevault.replay(file, pipe)."
            )
        device = None if self._allow_other_machine else load.get("device", "cpu").partition(":")[0]
        opened = (model, next(iter(dtypes), None), device, record.pipeline["class"])
        if opened not in self._pipes:
            with self._progress.step("open"):
                self._pipes[opened] = open_pipeline(
                    model,
                    dtype=opened[1],
                    device=device,
                    pipeline_class=opened[3],
                    local_only=self._model is None,
                )
        return self._pipes[opened]


def _recorded_model(record: RunRecord) -> str:
    """The demo, or a repository that the hub's local cache has. :class:`SettingsError` for a folder."""
    model = record.pipeline["model"]
    if not model:
        raise SettingsError("The record does not name its model. Give it: --model.")
    if model == DEMO_MODEL or (_REPOSITORY.fullmatch(model) and not Path(model).exists()):
        return str(model)
    raise SettingsError(
        f"The record names the folder {model}, and what a stranger names is not opened. If it is the model, say so: "
        f"--model {model}."
    )


def _pictures(inputs: Sequence[str]) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    pictures: dict[str, Any] = {}
    for text in inputs:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or name in pictures:
            raise SettingsError(
                f"{text!r} is no input, or a second one of its name. Give NAME=FILE, such as image=a.png."
            )
        try:
            with Image.open(file) as image:
                image.load()
                pictures[name] = image
        except (OSError, UnidentifiedImageError) as error:
            raise SettingsError(f"{file} cannot be read as an image: {error}.") from error
    return pictures


def _document(result: FileResult) -> dict[str, Any]:
    if result.replay is None:
        return {"file": str(result.file), "error": type(result.error).__name__, "reason": str(result.error)}
    return {"file": str(result.file), **result.replay.to_json()}


def _row(result: FileResult) -> tuple[str, str, str]:
    if result.replay is None:
        return (str(result.file), "not replayed", " ".join(str(result.error).split()))
    details = [str(divergence) for divergence in result.replay.divergences]
    if measured := result.replay.distance:
        details.append(
            f"{measured.differing_share:.2%} of the pixels differ, by {measured.max_abs:.0f} at most"
            f" and {measured.mean_abs:.3g} in the mean"
        )
    return (str(result.file), "equal" if result.replay.equal else "different", "; ".join(details))
