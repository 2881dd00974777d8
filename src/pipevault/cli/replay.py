"""``pipevault replay``: draw saved outputs again and compare them bit by bit with their records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import exits, render
from pipevault.cli.exits import Exit
from pipevault.cli.options import command, path_option, vault_options
from pipevault.cli.progress import StepProgress
from pipevault.errors import DifferentOutputError, PipevaultError, SettingsError
from pipevault.opening import DEMO_MODEL, open_pipeline

if TYPE_CHECKING:
    from pipevault.evidence.replay import Replay
    from pipevault.runtime.record import RunRecord

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@command("replay", short_help="Draw saved outputs again, compare bit by bit.")
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
@path_option("--save", metavar="FILE", help="Where the new output of a single FILE goes.")
@vault_options
def replay(files: tuple[Path, ...], inputs: tuple[str, ...], save: Path | None, as_json: bool, **asked: Any) -> None:
    """Build the pipeline of each FILE's run record from the vault, generate again, compare bit by bit.

    FILE is an output that pipevault saved (PNG, JPEG, WebP, MP4), or a record (.json). Succeeds only if every result
    of every file came out again: noise, latents, pixels and, where the record has an audit, each part's outputs.
    Else the first thing that differs is named: machine, version, weights, noise, or the step and part. Each file has
    a line that says why; the exit code is that of the first that failed: 1 if it is not equal, 3 if its record was
    changed or cannot be read, 4 on another machine.

    --save writes the picture that FILE holds. Where it holds no single one, each picture or clip of the call gets a
    name of its own: again-0.png, again-1.png, ... The names are printed.

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
        results = list(_replayed(files, asked.pop("model"), progress, {**asked, "inputs": pictures}))
    if save is not None and not isinstance(first := results[0][1], PipevaultError):
        render.note(f"Saved {', '.join(map(str, _save(first, save)))}")
    code, word = exits.first_of(_failure(result) for _, result in results)
    if as_json:
        render.print_json({"code": word, "files": [{"file": file, **_document(result)} for file, result in results]})
    else:
        rows = [(str(file), *_cells(result)) for file, result in results]
        render.show(render.table(("FILE", "RESULT", "DETAIL"), rows))
    click.get_current_context().exit(code)


def _replayed(
    files: Sequence[Path], model: str | None, progress: StepProgress, options: Mapping[str, Any]
) -> Iterator[tuple[Path, Replay | PipevaultError]]:
    """Replay one file after the other with the same ``options``; each recorded pipeline is opened once."""
    from pipevault import read_record
    from pipevault import replay as replay_record
    from pipevault.cache.outcome import Clock

    pipes: dict[tuple[Any, ...], Any] = {}
    for file in files:
        progress.subject = file.name
        try:
            opening = _opening(read_record(file), model, on_other_machine=options["allow_other_machine"])
            opened = tuple(opening.values())
            if opened not in pipes:
                with Clock(progress).step("open"):
                    pipes[opened] = open_pipeline(**opening, local_only=model is None)
            yield file, replay_record(file, pipes[opened], progress=progress, **options)
        except PipevaultError as error:
            yield file, error


def _opening(record: RunRecord, model: str | None, *, on_other_machine: bool) -> dict[str, Any]:
    """Return the arguments of :func:`open_pipeline` that construct the recorded pipeline."""
    load = record.pipeline.get("load", {})
    model = model or _recorded_model(record)
    dtypes = {dtype for dtype in load.get("dtype", {}).values() if dtype}
    if len(dtypes) > 1:
        raise SettingsError(
            f"The recorded pipeline had parts of several dtypes ({', '.join(sorted(dtypes))}). Construct it "
            "yourself and call pipevault.replay(file, pipe)."
        )
    device = None if on_other_machine else load.get("device", "cpu").partition(":")[0]
    dtype = next(iter(dtypes), None)
    return {"model": model, "dtype": dtype, "device": device, "pipeline_class": record.pipeline["class"]}


def _recorded_model(record: RunRecord) -> str:
    model = record.pipeline["model"]
    if not model:
        raise SettingsError("The record does not name its model. Give it: --model.")
    if model == DEMO_MODEL or (_REPOSITORY.fullmatch(model) and not Path(model).exists()):
        return str(model)
    raise SettingsError(
        f"The record names the folder {model}, and what a stranger names is not opened. If it is the model, say so: "
        f"--model {model}."
    )


def _save(replay: Replay, path: Path) -> list[Path]:
    """Write the picture that the replayed file holds, all of the output where it is not one; return the paths."""
    from pipevault import save
    from pipevault.calls.outputs import samples
    from pipevault.evidence.record_files.embed import IMAGE_SUFFIXES

    number = replay.record.sample
    if number is not None and path.suffix.lower() in IMAGE_SUFFIXES:
        for one in samples(replay.output, replay.again.results["undigested"]):
            if one.is_image and one.position.index == number:
                return save(one.leaf, path)
    return save(replay.output, path)


def _pictures(inputs: Sequence[str]) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    pictures: dict[str, Any] = {}
    for text in inputs:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or name in pictures:
            raise SettingsError(f"Invalid input {text!r}: expected NAME=FILE, each name once, for example image=a.png.")
        try:
            with Image.open(file) as image:
                image.load()
                pictures[name] = image
        except FileNotFoundError as error:
            raise SettingsError(f"{file} does not exist. Give {name} the path of an image.") from error
        except (OSError, UnidentifiedImageError) as error:
            raise SettingsError(f"{file} cannot be read as an image: {error}.") from error
    return pictures


def _failure(result: Replay | PipevaultError) -> exits.Failure:
    if isinstance(result, PipevaultError):
        return exits.kind_of(result)
    return (Exit.DONE, None) if result.equal else exits.KINDS[DifferentOutputError]


def _document(result: Replay | PipevaultError) -> dict[str, Any]:
    if isinstance(result, PipevaultError):
        return exits.error_document(result)
    return {"code": _failure(result)[1], **result.to_json()}


def _cells(result: Replay | PipevaultError) -> tuple[str, str]:
    if isinstance(result, PipevaultError):
        return "not replayed", exits.text_of(result)
    details = [str(divergence) for divergence in result.divergences]
    if measured := result.distance:
        details.append(
            f"{measured.differing_share:.2%} of the pixels differ, by {measured.max_abs:.0f} at most"
            f" and {measured.mean_abs:.3g} in the mean"
        )
    return "equal" if result.equal else "different", "; ".join(details)
