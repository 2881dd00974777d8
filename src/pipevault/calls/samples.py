"""The number of samples that a call of a diffusion pipeline draws, and the arguments that go with each of them.

Arguments are known by their names (:mod:`pipevault.calls.sample_roles`) and never by the length of a value: three
timesteps and three prompts are no pair. Recorded calls are counted too, in which a tensor is a mapping with its
``kind`` and ``shape``. torch is never imported here, for records are read without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from pipevault.calls import sample_roles as roles
from pipevault.calls.sample_roles import ArgumentKind, Form, class_names, role_of
from pipevault.errors import BadCallError, UnplacedArgumentError
from pipevault.pipeline import Pipeline


@dataclass(frozen=True)
class Samples:
    """The samples of one call: ``prompts`` prompts, labels or images, each drawn ``repeats`` times."""

    prompts: int
    repeats: int
    tiled: bool = False
    """True where all prompts are drawn once before any is drawn again."""
    defaults: tuple[str, ...] = ()
    """Names of counts above 1 that the pipeline's signature gives and the call does not."""

    @property
    def count(self) -> int:
        return self.prompts * self.repeats

    def prompt_of(self, index: int) -> int:
        """Return the index of the prompt that the sample ``index`` is drawn from."""
        return index % self.prompts if self.tiled else index // self.repeats


def samples_of(
    arguments: Mapping[str, Any],
    accepted: Mapping[str, inspect.Parameter] | None = None,
    *,
    pipeline: str | type = "",
) -> Samples:
    """Return how many samples a call with these ``arguments`` draws. ``accepted`` are the parameters of the method, for
    counts that the call leaves to their defaults; ``pipeline`` is the class of the pipeline or its name.
    :class:`BadCallError` for a count that is not a whole number above 0.
    """
    classes = class_names(pipeline)
    by_default = {
        name: parameter.default
        for name, parameter in (accepted or {}).items()
        if name not in arguments and _is_whole(parameter.default)
    }
    given = {**by_default, **arguments}
    prompts = given_prompts(arguments, pipeline=pipeline)
    if prompts is None:
        prompts = math.prod(_counts((ArgumentKind.BATCH_SIZE,), given, pipeline).values())
    repeats = repeats_of(given, pipeline=pipeline)
    if not roles.REPEATED_BY_EMBEDDINGS.isdisjoint(classes):
        repeats *= max(1, (_entries(arguments.get("image_embeddings"), Form()) or 1) // prompts)
    defaults = _counts((ArgumentKind.REPEATS, ArgumentKind.BATCH_SIZE), by_default, pipeline)
    several = tuple(name for name, count in defaults.items() if count > 1)
    return Samples(prompts, repeats, not roles.TILED.isdisjoint(classes), several)


def given_prompts(arguments: Mapping[str, Any], *, pipeline: str | type = "") -> int | None:
    """Return how many prompts, labels or images ``arguments`` list; ``None`` if they list none, but may hold one."""
    classes = class_names(pipeline)
    if not roles.ONE_PROMPT.isdisjoint(classes):
        return None
    names = next((roles.COUNTED_OF_CLASS[cls] for cls in classes if cls in roles.COUNTED_OF_CLASS), roles.COUNTED)
    for name in names:
        if (entries := _entries(arguments.get(name), role_of(name, pipeline).form)) is not None:
            return entries
    return None


def repeats_of(arguments: Mapping[str, Any], *, pipeline: str | type = "") -> int:
    """Return how often each prompt is drawn. :class:`BadCallError` for a count that is not a whole number above 0."""
    counts = _counts((ArgumentKind.REPEATS, ArgumentKind.ENSEMBLE), arguments, pipeline)
    if "UniDiffuserPipeline" not in class_names(pipeline):
        return math.prod(counts.values())
    images, texts = counts.get("num_images_per_prompt", 1), counts.get("num_prompts_per_image", 1)
    if arguments.get("prompt") is not None or arguments.get("prompt_embeds") is not None:
        return images
    return texts if arguments.get("image") is not None else min(images, texts)


def split(
    arguments: Mapping[str, Any], samples: Samples, *, nets: int, pipeline: str | type = ""
) -> list[dict[str, Any]]:
    """Return the arguments of each sample's own call. Lists stay lists, with a single entry, and counts become 1.

    ``nets`` is what :func:`count_nets` returns for the pipeline. Raises :class:`UnplacedArgumentError` for an argument
    whose parts cannot be placed, and :class:`BadCallError` for another number of entries than of prompts or samples.
    """
    if samples.count == 1:
        return [dict(arguments)]
    splitter = _Splitter(samples, pipeline, nets)
    choose = {name: splitter.chooser(name, value) for name, value in arguments.items()}
    defaults = dict.fromkeys(samples.defaults, 1)
    return [{**defaults, **{name: chosen(index) for name, chosen in choose.items()}} for index in range(samples.count)]


def count_nets(pipe: Pipeline) -> int:
    """Return how many ControlNets or adapters ``pipe`` holds; 1 without any."""
    for holder, members in (("controlnet", "nets"), ("adapter", "adapters")):
        held = getattr(pipe, holder, None)
        if isinstance(held, (list, tuple)):
            return len(held)
        if (several := getattr(held, members, None)) is not None:
            return len(several)
    return 1


def recorded_samples(call: Mapping[str, Any], *, pipeline: str = "") -> Samples:
    """Return the samples of a recorded call, as far as it tells: a record can come from anywhere."""
    try:
        return samples_of(call, pipeline=pipeline)
    except BadCallError:
        return Samples(given_prompts(call, pipeline=pipeline) or 1, 1)


def prompt_of_sample(call: Mapping[str, Any], name: str, index: int, count: int, *, pipeline: str = "") -> str:
    """Return the prompt ``name`` of the sample ``index`` of ``count`` in a recorded call; empty if there is none."""
    prompt = call.get(name)
    if isinstance(prompt, list) and prompt:
        samples = recorded_samples(call, pipeline=pipeline)
        if (samples.prompts, samples.count) != (len(prompt), count):
            samples = Samples(len(prompt), max(1, count // len(prompt)))
        prompt = prompt[min(samples.prompt_of(index), len(prompt) - 1)]
    return prompt if isinstance(prompt, str) else ""


def _counts(kinds: tuple[ArgumentKind, ...], given: Mapping[str, Any], pipeline: str | type) -> dict[str, int]:
    counts = {}
    for name, value in given.items():
        if role_of(name, pipeline).kind in kinds:
            count = 1 if value is None else value
            if not _is_whole(count) or count < 1:
                raise BadCallError(f"{name} must be a whole number above 0, not {value!r}.")
            counts[name] = int(count)
    return counts


def _is_whole(value: Any) -> bool:
    """Return whether it is an integer of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class _Splitter:
    def __init__(self, samples: Samples, pipeline: str | type, nets: int) -> None:
        self.samples = samples
        self.pipeline = pipeline
        self.classes = class_names(pipeline)
        self.nets = nets

    def chooser(self, name: str, value: Any) -> Callable[[int], Any]:
        """Return what gives the value of the argument ``name`` for the sample of an index."""
        role = role_of(name, self.pipeline)
        if role.kind in (ArgumentKind.REPEATS, ArgumentKind.BATCH_SIZE):
            return lambda index: 1
        if role.kind is ArgumentKind.ENSEMBLE and value not in (None, 1):
            raise self._unplaced(name, "its draws make one result together")
        if role.kind is ArgumentKind.UNPLACED and _may_hold_entries(value):
            raise self._unplaced(name)
        if role.kind is ArgumentKind.GENERATOR and isinstance(value, (list, tuple)):
            self._check(name, len(value), self.samples.count, "sample")
            return lambda index: value[index]
        if role.kind is ArgumentKind.CONTROL:
            return self._control(name, value, role.form)
        if role.kind in (ArgumentKind.SAMPLE, ArgumentKind.PROMPT, ArgumentKind.CONDITION):
            return self._entry(name, value, role.form, role.kind)
        return lambda index: _fresh(value)

    def _entry(self, name: str, value: Any, form: Form, kind: ArgumentKind) -> Callable[[int], Any]:
        if isinstance(value, (list, tuple)) and any(_is_batch(entry, form) and _leading(entry) != 1 for entry in value):
            raise self._unplaced(name, "it is a list of batches")  # its entries cannot be told from the list alone
        entries = _entries(value, form)
        place: Callable[[int], int]
        if kind is ArgumentKind.SAMPLE:
            wanted, word, place = self.samples.count, "sample", int
        else:
            wanted, word, place = self.samples.prompts, "prompt", self.samples.prompt_of
            if entries is None and form.one_prompt and wanted > 1 and isinstance(value, (list, tuple)):
                raise self._unplaced(name, f"one list is given for {wanted} prompts")
            entries = None if entries == 1 else entries  # it is for all
            if entries is not None and kind is ArgumentKind.CONDITION and self.samples.repeats > 1:
                raise self._unplaced(name, "pipelines differ in how they repeat several of them")
        if entries is None:
            return lambda index: _fresh(value)
        self._check(name, entries, wanted, word)
        return lambda index: _fresh(value[place(index) : place(index) + 1])

    def _control(self, name: str, value: Any, form: Form) -> Callable[[int], Any]:
        kind = ArgumentKind.PROMPT if roles.ADAPTERS.isdisjoint(self.classes) else ArgumentKind.CONDITION
        for_each_mode = not roles.ONE_FOR_EACH_MODE.isdisjoint(self.classes)
        if not isinstance(value, (list, tuple)) or _entries(value, form) is None:
            return self._entry(name, value, form, kind)
        nested = any(isinstance(entry, (list, tuple)) for entry in value)
        if nested and not roles.NETS_WITHIN_PROMPTS.isdisjoint(self.classes):
            return self._entry(name, value, roles.PICTURES, ArgumentKind.PROMPT)
        if not for_each_mode and self.nets <= 1:
            return self._entry(name, value, form, kind)
        if for_each_mode and nested:
            raise self._unplaced(name, "its lists are for control modes")
        of_nets = [self._entry(name, of_net, form, kind) for of_net in value]
        return lambda index: type(value)(choose(index) for choose in of_nets)

    def _check(self, name: str, entries: int, wanted: int, word: str) -> None:
        if entries != wanted:
            given = "1 entry" if entries == 1 else f"{entries} entries"
            plural = word if wanted == 1 else f"{word}s"
            raise BadCallError(f"{name} has {given} for {wanted} {plural}. Give one for each {word}.")

    def _unplaced(self, name: str, why: str = "what each of its entries is for is not known") -> UnplacedArgumentError:
        return UnplacedArgumentError(
            f"{name} of {self.classes[0] or 'this pipeline'} cannot be divided among {self.samples.count} samples: "
            f"{why}. Draw each sample in a call of its own, with what belongs to it.",
            name,
        )


def _entries(value: Any, form: Form) -> int | None:
    """Number of entries of ``value``; ``None`` for what is a single entry or none at all."""
    sequence = isinstance(value, (list, tuple))
    shape = _shape(value)
    if not sequence and not shape:
        return None
    if form.item is not None:
        if _dimensions(value, form.leaf) <= form.item:
            return None
        if sequence:
            return sum((_leading(entry) if _is_batch(entry, form) else 1) for entry in value) or None
    return _leading(value) or None


def _is_batch(entry: Any, form: Form) -> bool:
    """True where an entry of a list is a batch, which pipelines concatenate with the others."""
    if form.item is None:
        shape = _shape(entry)  # embeddings of one prompt have two dimensions at most
        return shape is not None and len(shape) > 2
    return _shape(entry) is not None and _dimensions(entry, form.leaf) > form.item


def _leading(value: Any) -> int:
    shape = _shape(value)
    return len(value) if shape is None else shape[0]


def _dimensions(value: Any, leaf: int) -> int:
    shape = _shape(value)
    if shape is not None:
        return len(shape)
    if isinstance(value, (list, tuple)):
        return 1 + max((_dimensions(entry, leaf) for entry in value), default=leaf)
    return leaf


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape of a tensor or an array, also of a recorded one; ``None`` for all else."""
    shape = getattr(value, "shape", None)
    if isinstance(value, Mapping):
        shape = value.get("shape") if value.get("kind") in ("tensor", "array") else None
    if not isinstance(shape, (list, tuple)) or not all(_is_whole(size) and size >= 0 for size in shape):
        return None
    return tuple(shape)


def _may_hold_entries(value: Any) -> bool:
    if isinstance(value, Mapping) and _shape(value) is None:
        return any(_may_hold_entries(entry) for entry in value.values())
    return isinstance(value, (list, tuple, set, frozenset)) or bool(_shape(value))


def _fresh(value: Any) -> Any:
    """``value`` with lists and dictionaries of its own: pipelines write into those that they are given."""
    if type(value) is list:
        return [_fresh(entry) for entry in value]
    if type(value) is dict:
        return {name: _fresh(entry) for name, entry in value.items()}
    return value
