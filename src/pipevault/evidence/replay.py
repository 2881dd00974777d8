"""Replay: a recorded generation is done again and compared bit by bit with its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipevault import errors
from pipevault.cache.keys import execution_device, pipeline_factors
from pipevault.cache.loaded import LoadedState, loaded_state
from pipevault.cache.outcome import Progress
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.cache.rehearsal import policies
from pipevault.cache.turn import turn
from pipevault.calls.describe import pixels_sha256
from pipevault.calls.outputs import samples
from pipevault.determinism.layers import kept, put
from pipevault.determinism.levels import parse_level
from pipevault.digest import Digest
from pipevault.evidence.metrics import Distance, distance
from pipevault.evidence.record_files import image_files
from pipevault.evidence.record_files.embed import read_record
from pipevault.evidence.recorded_call import (
    check_limits,
    recorded_arguments,
    recorded_method,
    recorded_noise,
    recorded_streams,
)
from pipevault.fingerprint.machine import machine_factors
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.key import Difference, leaf_differences
from pipevault.pipeline import Pipeline
from pipevault.runtime.record import RunRecord
from pipevault.runtime.recorded_weights import RecordedWeights
from pipevault.runtime.records import record_of
from pipevault.runtime.run_record import versions

LOSSLESS_SUFFIXES = (".png",)
_COMPILE_HINT = "Nothing is compiled for a replay unless it is asked for: compile=True (--compile)."
_LISTED = 3


@dataclass(frozen=True)
class Divergence:
    """A difference. ``what`` is ``file``, ``seeds``, ``version``, ``entry``, ``noise``, ``step``, ``latents``,
    ``values``, ``output`` (the record has no digest of it) or ``pixels``.
    """

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True)
class Replay:
    """The result of a replay. ``divergences`` stand in the order of a generation, so that the first is nearest to the
    cause.

    ``distance`` is that of the new picture from the one in the file, where another machine was allowed.
    """

    record: RunRecord
    again: RunRecord
    divergences: tuple[Divergence, ...]
    output: Any
    distance: Distance | None = None

    @property
    def equal(self) -> bool:
        """True if every recorded result came out again, bit by bit."""
        damaged = any(one.what in ("file", "seeds") for one in self.divergences)
        is_known = not self.record.results["undigested"]
        return self.record.results == self.again.results and is_known and not damaged

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "divergences": list(map(asdict, self.divergences)),
            "expected": self.record.results,
            "actual": self.again.results,
            "distance": None if self.distance is None else self.distance.to_json(),
        }


def replay(
    source: str | Path | RunRecord,
    pipe: Pipeline,
    *,
    dir: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    allow_other_machine: bool = False,
    compile: bool = False,
    progress: Progress | None = None,
) -> Replay:
    """Generate again what the record of ``source`` tells of, with ``pipe``, and compare.

    ``pipe`` is the recorded pipeline, newly constructed: it is loaded from the vault, and stays loaded. One that is
    loaded already is used as it is, and left as it was. ``inputs`` gives the arguments that a record holds by digest
    only, such as images. With ``allow_other_machine`` other machines, versions and entries are accepted, and the
    distance between the pictures is measured. Nothing is compiled unless ``compile``, and then with this user's own
    settings: nothing in a record reaches a compiler.

    Raises the :class:`~pipevault.errors.RecordError` that fits; :class:`OtherMachineError`;
    :class:`ChangedWeightsError`; :class:`UnknownRecordKeyError` if the vault does not hold what the call needs;
    :class:`DifferentKeyError` if versions or settings give another key; :class:`BadCallError` for inputs that are
    missing, or are others; :class:`SettingsError` for another pipeline or level.
    """
    record = source if isinstance(source, RunRecord) else read_record(source)
    check_limits(record)
    _check_pipeline(record, pipe)
    path = None if isinstance(source, RunRecord) else Path(source)
    picture = image_files.picture(path) if path is not None and path.suffix.lower() in LOSSLESS_SUFFIXES else None
    arguments = recorded_arguments(record, pipe, dict(inputs or {}))
    streams, noise = recorded_streams(record), recorded_noise(record)
    if not allow_other_machine:
        _check_machine(record, pipe)
    found: list[Divergence] = []
    if differences := leaf_differences(versions(), record.versions):
        found.append(Divergence("version", _listed(differences)))
    _check_weights(record, pipe)
    with ExitStack() as stack:
        loaded = loaded_state(pipe)
        if loaded is not None and loaded.outcome.status != "off":
            _check_level(record, loaded)
            stack.enter_context(turn(pipe, f"a replay of {type(pipe).__name__}"))
            stack.enter_context(policies(loaded.states(pipe), "compile" if compile else "error"))
        else:
            loaded = None
            cache = _cache(record, dir, progress, compile=compile)
            if not allow_other_machine:
                found += list(_divergent_graphs(record, pipe, cache, found))
            _load(record, pipe, cache)
        if streams:
            stack.enter_context(kept())
            _put(streams)
        output = _draw(record, pipe, {**arguments, **noise})
    again = record_of(output)
    if loaded is not None and not allow_other_machine:
        for part in sorted({*record.graphs, *again.graphs}):
            if record.graphs.get(part) != again.graphs.get(part):
                found.append(Divergence("entry", f"other graphs of {part} ran than those of the record"))
    if record.seeds["samples"] != again.seeds["samples"]:
        found.append(Divergence("seeds", "the seeds of the samples are not those of the record"))
    found += _divergent_results(record.results, again.results)
    if picture is not None and (damage := _divergent_file(record, picture)):
        found.insert(0, damage)
    drawn = _new_picture(output, again.results["undigested"], record.sample or 0) if allow_other_machine else None
    measured = distance(picture, drawn.convert(picture.mode)) if picture is not None and drawn is not None else None
    return Replay(record, again, tuple(found), output, measured)


def _load(record: RunRecord, pipe: Pipeline, cache: PipelineCache) -> None:
    try:
        cache.load(pipe, parts=_load_field(record, "parts"))
    except errors.MissError as error:
        # What a load advises freezes the default call, and not the recorded one.
        what = f"The vault has no graphs for {type(pipe).__name__} as it is here: {error.reason.rstrip('.')}."
        raise errors.UnknownRecordKeyError(f"{what} {_COMPILE_HINT}", "") from error


def _draw(record: RunRecord, pipe: Pipeline, arguments: Mapping[str, Any]) -> Any:
    try:
        return getattr(pipe, recorded_method(record, pipe))(**arguments)
    except errors.UnfrozenCallError as error:
        raise errors.UnknownRecordKeyError(
            f"A graph that the recorded call needs is not here. {error} {_COMPILE_HINT}", ""
        ) from error
    except errors.PipevaultError:
        raise
    except Exception as error:  # whatever a pipeline raises for arguments that it was never called with
        raise errors.BadCallError(
            f"The recorded call cannot be made: {type(error).__name__}: {error}. The record was edited, or the "
            "pipeline is another one."
        ) from error


def _put(streams: Mapping[str, Any]) -> None:
    try:
        put(streams)
    except (RuntimeError, ValueError, LookupError, StopIteration) as error:  # no state, or of a GPU that is not here
        raise errors.BadRecordError(
            f"The random streams of the record cannot be set here: {error}.", "seeds.streams"
        ) from error


def _check_level(record: RunRecord, loaded: LoadedState) -> None:
    if parse_level(record.level["asked"]) != parse_level(loaded.level):
        raise errors.SettingsError(
            f"The record is of level {record.level['asked']}, and the pipeline was loaded at {loaded.level}. Load it "
            "at the recorded level, or construct it again."
        )


def _check_pipeline(record: RunRecord, pipe: Pipeline) -> None:
    if type(pipe).__name__ != record.pipeline["class"]:
        raise errors.SettingsError(
            f"The record is of a {record.pipeline['class']}, and this is a {type(pipe).__name__}. Open the recorded "
            f"model: {record.pipeline['model'] or 'its name is not in the record'}."
        )
    if "load" not in record.pipeline or record.outcome == "off":
        raise errors.SettingsError("The record does not tell how its pipeline was loaded, so it cannot be replayed.")


def _check_machine(record: RunRecord, pipe: Pipeline) -> None:
    here = machine_factors(execution_device(pipe, graph_parts.find_parts(pipe)))
    if differences := leaf_differences(here, record.machine, "machine"):
        raise errors.OtherMachineError(
            f"The record is of another machine type, whose bits cannot be promised here: {_listed(differences)}. "
            "Replay it there, or measure the distance with --allow-other-machine.",
            tuple(map(str, differences)),
        )


def _check_weights(record: RunRecord, pipe: Pipeline) -> None:
    here = RecordedWeights().digests(graph_parts.find_parts(pipe)) if record.weights else {}
    changed = tuple(name for name, digest in record.weights.items() if here.get(name) != digest)
    if changed:
        raise errors.ChangedWeightsError(
            f"The weights of {', '.join(changed)} are not those of the record. Open the model as it was then "
            f"({record.pipeline['model'] or 'not named in the record'}), LoRAs fused as they were.",
            changed,
        )


def _cache(record: RunRecord, dir: str | Path | None, progress: Progress | None, *, compile: bool) -> PipelineCache:
    """Open this user's vault, with the build options under which it has the recorded graphs."""
    options: dict[str, Any] = {
        "mode": "compile" if compile else "require",
        "backend": _load_field(record, "backend"),
        "weights": _load_field(record, "weights"),
        "regions": record.pipeline["load"].get("regions"),
        "level": record.level["asked"],
        "progress": progress,
    }
    own = PipelineCache(dir, **options)
    build = None if compile else _build_options(record, own)
    return own if build is None else own.with_build(build)


def _build_options(record: RunRecord, cache: PipelineCache) -> BuildOptions | None:
    """Return the build options of a recorded graph from the vault; the record has but their digest."""
    wanted = _load_field(record, "build")
    for part, graphs in record.graphs.items():
        for key in graphs:
            manifest = cache.find_entry(_digest(key, f"graphs.{part}"))
            with suppress(
                KeyError, TypeError, AttributeError, errors.SettingsError
            ):  # another backend's, or an older one's
                build = BuildOptions.from_json(manifest.key.factors["backend"] if manifest is not None else {})
                if build.digest == wanted:
                    return build
    return None


def _load_field(record: RunRecord, name: str) -> Any:
    if name not in record.pipeline["load"]:
        raise errors.BadRecordError(
            f"The record does not tell with which {name} its pipeline was loaded.", f"pipeline.load.{name}"
        )
    return record.pipeline["load"][name]


def _divergent_graphs(
    record: RunRecord, pipe: Pipeline, cache: PipelineCache, versions_differ: Sequence[Divergence]
) -> Iterator[Divergence]:
    """Yield the graphs that were frozen again; raise where a recorded graph cannot be the one that runs."""
    known = "".join(f" Also, {one}." for one in versions_differ)
    if not record.graphs and record.outcome != "partial":
        raise errors.UnknownRecordKeyError(
            f"The record names no graph, as an older pipevault wrote it.{known} Measure the distance with "
            "--allow-other-machine.",
            record.key or "",
        )
    _check_settings(record, pipe, cache)
    for part, graphs in record.graphs.items():
        here = cache.part_key(pipe, part)
        for key, package in graphs.items():
            recorded = cache.find_entry(_digest(key, f"graphs.{part}"))
            if recorded is None:
                raise errors.UnknownRecordKeyError(
                    f"The vault {cache.settings.dir} does not hold the graph {key[:12]} of {part} that the record "
                    f"names.{known} Give the vault that does (--dir), or measure the distance with "
                    "--allow-other-machine.",
                    key,
                )
            own = {group: recorded.key.factors.get(group) for group in here.factors if group != "signature"}
            if differences := leaf_differences({g: here.factors[g] for g in own}, own):
                first = "version" if differences[0].factor.startswith("toolchain.") else "settings"
                raise errors.DifferentKeyError(
                    f"{part} has another identity than the recorded one, so it would run other graphs; {first}: "
                    f"{_listed(differences)}. Install and set what the record names, or measure the distance with "
                    "--allow-other-machine.",
                    tuple(map(str, differences)),
                )
            if package not in {ref.digest.hex for ref in recorded.artifacts}:
                yield Divergence("entry", f"{key[:12]} of {part} was frozen again since the record was made")


def _digest(key: str, field: str) -> Digest:
    try:
        return Digest(key)
    except ValueError as error:
        raise errors.BadRecordError(f"Invalid key of a graph in the record: {error}", field) from error


def _check_settings(record: RunRecord, pipe: Pipeline, cache: PipelineCache) -> None:
    """Check scheduler and settings, which draw other pictures with the same graphs, against the plan of the record."""
    plan = cache.find_entry(Digest(record.key)) if record.key else None
    if plan is None or plan.key.kind != "plan":
        return
    names = sorted(plan.key.factors["architecture"])
    here = pipeline_factors(pipe, graph_parts.find_parts(pipe, names))
    if differences := leaf_differences(here, plan.key.factors["pipeline"], "pipeline"):
        raise errors.DifferentKeyError(
            f"The pipeline is set up otherwise than the recorded one; settings: {_listed(differences)}. Set what the "
            "record names, or measure the distance with --allow-other-machine.",
            tuple(map(str, differences)),
        )


def _divergent_results(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Iterator[Divergence]:
    if expected["noise"] != actual["noise"]:
        yield Divergence("noise", "other random numbers were drawn")
    steps = zip(expected.get("steps", ()), actual.get("steps", ()), strict=False)
    if first := next((pair for pair in steps if pair[0] != pair[1]), None):
        then, now = first
        other = "" if then["part"] == now["part"] else f", where {now['part']} ran now"
        yield Divergence("step", f"call {then['step']} of {then['part']} returned other bits{other}")
    elif (count := len(actual.get("steps", ()))) != (recorded := len(expected.get("steps", ()))):
        yield Divergence("step", f"{count} calls of parts, {recorded} recorded")
    if expected["latents"] != actual["latents"]:
        yield Divergence("latents", "the decoder was given other latents")
    if expected["values"] != actual["values"]:
        yield Divergence("values", "the text or the numbers of the output are others")
    if expected["undigested"]:
        yield Divergence("output", f"the record has no digest of {', '.join(expected['undigested'])[:80]}")
    then, now = expected["pixels"], actual["pixels"]
    if then != now:
        differing = [str(i) for i, pair in enumerate(zip(then, now, strict=False)) if pair[0] != pair[1]]
        counts = "" if len(then) == len(now) else f"; {len(now)} samples, {len(then)} recorded"
        yield Divergence("pixels", f"samples {', '.join(differing) or 'none'} of {len(then)} differ{counts}")


def _divergent_file(record: RunRecord, picture: Image.Image) -> Divergence | None:
    recorded = record.results["pixels"]
    index = record.sample or 0
    if index >= len(recorded):
        return Divergence("file", f"sample {index} was recorded, and there are {len(recorded)}")
    if pixels_sha256(picture) != recorded[index]:
        return Divergence("file", "the picture in the file is not the one that its record tells of")
    return None


def _new_picture(output: Any, undigested: Mapping[str, str], index: int) -> Image.Image | None:
    """Return the picture whose digest has this ``index`` in the record; ``None`` if that is an array."""
    drawn = next((one.value for one in samples(output, undigested) if one.position.index == index), None)
    return drawn if isinstance(drawn, Image.Image) else None


def _listed(differences: tuple[Difference, ...]) -> str:
    listed = "; ".join(f"{d.factor} {d.theirs!r} then, {d.ours!r} here" for d in differences[:_LISTED])
    more = len(differences) - _LISTED
    return f"{listed}; and {more} more" if more > 0 else listed
