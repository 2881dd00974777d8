"""The words of the package: how public docstrings begin, words that are not used, and the length of parameter lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipevault

PACKAGE = Path(pipevault.__file__).resolve().parent
MOST_PARAMETERS = 8

WORDS_NOT_YET: tuple[str, ...] = ()
"""Packages whose docstrings and messages are not gone over yet."""
PARAMETERS_NOT_YET: tuple[str, ...] = ()
"""Packages that have longer lists of parameters."""

OPENING = re.compile(r"(Of|What|Whether|That|The same|Where|How|As|Why|Those|So)\b")
"""A docstring begins with a verb or with what the thing is, and not with a clause."""
WORDS = re.compile(r"\b(is no(?! longer)|mend(s|ed|ing)?|anew|told of|(is|are) told|beside|nobody)\b", re.IGNORECASE)
CODE = re.compile(r"``[^`]+``|\"\w+\":")
"""Code and the fields of documents, which go by their own names."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules(*, but: tuple[str, ...] = ()) -> list[Path]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in but]
    assert len(paths) > 50
    return paths


def public(node: Documented) -> Iterator[Documented]:
    """The module and its public classes, functions and methods, also below ``if``; not what functions hold."""
    yield node
    if not isinstance(node, (ast.Module, ast.ClassDef)):
        return
    pending: list[ast.AST] = list(node.body)
    while pending:
        child = pending.pop(0)
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_"):
                yield from public(child)
        else:
            pending += [inner for inner in ast.iter_child_nodes(child) if not isinstance(inner, ast.expr)]


def weak_openings(source: str) -> list[str]:
    """The first line of each public docstring that begins with a clause."""
    docstrings = [ast.get_docstring(node) or "" for node in public(ast.parse(source))]
    return [text.partition("\n")[0] for text in docstrings if OPENING.match(text)]


def unused_words(source: str) -> list[str]:
    """The line of each text, docstrings and parts of f-strings too, that has one of :data:`WORDS`."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    lines = [line for text in texts if isinstance(text, str) and " " in text for line in text.splitlines()]
    return [line.strip() for line in lines if WORDS.search(CODE.sub("", line))]


def long_lists(source: str) -> list[str]:
    """The functions with more than :data:`MOST_PARAMETERS` parameters; ``self`` and ``cls`` do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            names = [argument.arg for argument in every if argument is not None and argument.arg not in ("self", "cls")]
            if len(names) > MOST_PARAMETERS:
                found.append(f"{getattr(node, 'name', 'lambda')} has {len(names)}")
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", modules(but=WORDS_NOT_YET), ids=name_of)
def test_docstrings_begin_with_a_verb_or_with_what_the_thing_is(path: Path) -> None:
    assert weak_openings(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", modules(but=WORDS_NOT_YET), ids=name_of)
def test_words_that_are_not_used(path: Path) -> None:
    assert unused_words(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", modules(but=PARAMETERS_NOT_YET), ids=name_of)
def test_no_list_of_parameters_is_long(path: Path) -> None:
    assert long_lists(path.read_text("utf-8")) == []


def test_a_package_that_is_clean_is_not_excused() -> None:
    """So that the lists above shrink."""
    for names, checks in (WORDS_NOT_YET, (weak_openings, unused_words)), (PARAMETERS_NOT_YET, (long_lists,)):
        for name in names:
            sources = [path.read_text("utf-8") for path in modules() if path.relative_to(PACKAGE).parts[0] == name]
            assert any(check(source) for source in sources for check in checks), (
                f"{name} is clean: take it off the list"
            )


@pytest.mark.parametrize(
    "source",
    [
        '"""What it is."""',
        'class A:\n    """The same."""',
        'class A:\n    def f(self):\n        """Whether it is.\n\n        More.\n        """',
        'if True:\n    async def f():\n        """As it was."""',
        'try:\n    pass\nexcept OSError:\n    def f():\n        """Of a kind."""',
    ],
)
def test_a_weak_opening_is_noticed(source: str) -> None:
    assert len(weak_openings(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""Return what it is."""',
        '"""Office hours."""',
        'def _f():\n    """Whether it is."""',
        'def f():\n    """Do it."""\n    def g():\n        """What else."""',
        "def f(): ...",
    ],
)
def test_other_openings_are_not(source: str) -> None:
    assert weak_openings(source) == []


@pytest.mark.parametrize(
    "source",
    [
        'raise ValueError("it is no size")',
        'f"{x} is no size"',
        'f"{x}" " that nobody" f" {y} has"',
        '"""Right.\n\nIt lies beside it.\n"""',
        'say("Mend it.")',
        '"``code`` is told"',
    ],
)
def test_a_word_is_noticed(source: str) -> None:
    assert len(unused_words(source)) == 1


@pytest.mark.parametrize(
    "source",
    ['"it is no longer read"', '"it is not"', '"recommend it"', '{"beside": 1}', '"``beside`` files"', "b' anew '"],
)
def test_other_words_are_not(source: str) -> None:
    assert unused_words(source) == []


def test_a_long_list_is_noticed() -> None:
    assert long_lists("def f(self, a, b, c, d, /, e, *f, g, **h): ...") == []
    assert long_lists("def f(a, b, c, d, /, e, *f, g, h, **i): ...") == ["f has 9"]
    assert long_lists("lambda a, b, c, d, e, f, g, h, i: 0") == ["lambda has 9"]


def test_no_two_classes_share_a_name() -> None:
    named: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named.setdefault(node.name, []).append(name_of(path))
    assert {name: places for name, places in named.items() if len(places) > 1} == {}
