"""The shapes that one load freezes, from the arguments of :meth:`~pipevault.PipelineCache.load`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from pipevault.calls.call import RANGED, SIZES, CallShape, resolve_shape, shape_factors, size_multiple
from pipevault.errors import BadCallError, SettingsError
from pipevault.pipeline import Pipeline
from pipevault.settings.arguments import field_names
from pipevault.settings.values import refuse_unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

AskedSize: TypeAlias = "int | tuple[int, int] | None"
"""A size, or the smallest and the largest of a range."""
Parts: TypeAlias = "Sequence[str] | Literal['auto'] | None"
"""Names of the parts to freeze, ``auto`` for those that gain by it, ``None`` for all."""


class ShapeFields(TypedDict, total=False):
    """The arguments of a load that stand for the shape of one call."""

    height: AskedSize
    width: AskedSize
    num_frames: AskedSize
    batch_size: AskedSize
    guidance: bool | None
    call: Mapping[str, Any] | Callable[[Any], Any] | None
    dynamic: bool | None


class LoadFields(TypedDict, total=False):
    """The arguments of a load that are about all of its calls."""

    shapes: Sequence[Mapping[str, Any]] | None
    parts: Parts


_DYNAMIC_BATCH = 4
_DEFAULT = CallShape()


@dataclass(frozen=True)
class CallRange:
    """The shapes from ``least`` to ``most``, which differ in sizes or in the number of samples."""

    least: CallShape
    most: CallShape

    @property
    def ranged(self) -> tuple[str, ...]:
        """The names of the sizes that vary."""
        return tuple(name for name in RANGED if getattr(self.least, name) != getattr(self.most, name))

    def between(self) -> Iterator[tuple[frozenset[str], CallShape]]:
        """Yield, for each of several sizes that vary, its name and the shape in which it alone is at its least. One
        sample is apart from several, which begin at two: torch compiles a size of 1 as a constant.
        """
        if len(self.ranged) > 1:
            for name in self.ranged:
                yield frozenset({name}), replace(self.most, **{name: getattr(self.least, name)})
        if self.least.batch_size == 1 and self.most.batch_size > 2:
            yield frozenset({"batch_size"}), replace(self.most, batch_size=2)
            if len(self.ranged) > 1:
                yield frozenset(self.ranged), replace(self.least, batch_size=2)


def call_factors(shape: CallShape | CallRange) -> dict[str, Any]:
    """Return the ``call`` group of the key; what varies in a range is a list of its two ends."""
    if isinstance(shape, CallShape):
        return shape_factors(shape)
    least, most = shape_factors(shape.least), shape_factors(shape.most)
    return {name: value if least[name] == value else [least[name], value] for name, value in most.items()}


@dataclass(frozen=True)
class AskedShape:
    """A shape as it was asked for, before the pipeline's own defaults are known. ``least`` and ``most`` differ in
    ``ranges`` alone, the sizes that were given as two. ``dynamic`` asks for half and twice of each single size, and for
    up to four samples.
    """

    least: CallShape = _DEFAULT
    most: CallShape = _DEFAULT
    ranges: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def size(self) -> dict[str, int]:
        """The sizes that are no ranges: those of calls that give none."""
        sizes = {name: getattr(self.most, name) for name in SIZES if name not in self.ranges}
        return {name: size for name, size in sizes.items() if size is not None}

    def to_json(self) -> dict[str, Any]:
        ranges = {name: [getattr(self.least, name), getattr(self.most, name)] for name in self.ranges}
        return {**self.most.to_json(), **ranges, **({"dynamic": True} if self.dynamic else {})}

    def resolve(self, pipe: Pipeline, per_sample: Callable[[CallShape], CallShape]) -> CallShape | CallRange:
        """Return the shape with the defaults of ``pipe``. Raises :class:`BadCallError` for one that it refuses."""
        ends = [self.least, self.most]
        least, most = (resolve_shape(pipe, per_sample(end)) for end in ends)
        if self.dynamic:
            for name in ("height", "width"):
                size = getattr(most, name)
                if size is not None and getattr(least, name) == size:
                    multiple = size_multiple(pipe)
                    ends[0] = replace(ends[0], **{name: max(size // 2 // multiple, 1) * multiple})
                    ends[1] = replace(ends[1], **{name: 2 * size})
            if "batch_size" not in self.ranges:
                ends[0] = replace(ends[0], batch_size=1)
                ends[1] = replace(ends[1], batch_size=max(_DYNAMIC_BATCH, ends[1].batch_size))
            least, most = (resolve_shape(pipe, per_sample(end)) for end in ends)
        return most if least == most else CallRange(least, most)


def asked_shape(given: Mapping[str, Any]) -> AskedShape:
    """Return the shape ``given``. Raises :class:`SettingsError` for a name that is not in :class:`ShapeFields`, and
    :class:`BadCallError` for a size or a range that is none.
    """
    refuse_unknown("argument of a shape", given, field_names(ShapeFields))
    values = {name: value for name, value in given.items() if name != "dynamic"}
    ranges = tuple(name for name in RANGED if isinstance(values.get(name), (tuple, list)))
    for name in ranges:
        value = values[name]
        if len(value) != 2:
            raise BadCallError(
                f"{name}={value!r} is not a range. Give the smallest and the largest, for example (512, 1024)."
            )
        if all(isinstance(end, int) for end in value) and value[0] > value[1]:
            raise BadCallError(f"{name}={tuple(value)!r} is the wrong way round. Give ({value[1]}, {value[0]}).")
    least, most = (
        CallShape(**{name: value[index] if name in ranges else value for name, value in values.items()})
        for index in (0, 1)
    )
    return AskedShape(least, most, ranges, bool(given.get("dynamic")))


def call_shapes(shapes: Sequence[Mapping[str, Any]] | None, **given: Unpack[ShapeFields]) -> list[AskedShape]:
    """Return each of ``shapes`` over what is ``given``, or that alone; none if nothing was given. Raises
    :class:`SettingsError`.
    """
    common = {name: value for name, value in given.items() if value is not None}
    base = asked_shape(common)
    if shapes is None:
        return [] if base == AskedShape() and "batch_size" not in common else [base]
    shapes = list(shapes)
    if not shapes:
        raise SettingsError("shapes is empty: give at least one mapping such as {'height': 512, 'width': 512}.")
    if wrong := [shape for shape in shapes if not isinstance(shape, Mapping)]:
        raise SettingsError(f"shapes holds {wrong[0]!r}. Give mappings such as {{'height': 512, 'width': 512}}.")
    return [asked_shape({**common, **shape}) for shape in shapes]
