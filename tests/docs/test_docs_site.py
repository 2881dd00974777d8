"""The documentation: it builds without a warning, every link leads somewhere, nothing is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


class _Page(HTMLParser):
    """The anchors of a built page, its links, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])


def links(text: str) -> Iterator[str]:
    """Yield the links of a page in Markdown that stay in the project."""
    for target in _LINK.findall(_CODE.sub("", text)):
        if not urlsplit(target).scheme:
            yield target


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def headings(text: str) -> set[str]:
    return {
        slug(heading) for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    }


def broken(page: Path) -> list[str]:
    found = []
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text("utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_in_markdown_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#another) [c](gone.md) [d](https://example.org) `[e](code.md)`\n")
    assert broken(page) == ["#another", "gone.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if find_spec(name) is None]:
        pytest.skip(f"the extra `docs` is not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


def test_every_link_of_the_built_site_resolves_and_nothing_is_fetched(site: Path) -> None:
    pages = {path: _Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 25
    lost = []
    for path, page in pages.items():
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                lost += [target] if target in page.loaded else []
                continue
            if path.name == "404.html":
                continue  # its links begin at the root of a server
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            known = pages[file].anchors if file in pages else set()
            if not file.exists() or (parts.fragment and file in pages and unquote(parts.fragment) not in known):
                lost.append(f"{path.relative_to(site)}: {target}")
    assert lost == []


def test_the_reference_has_every_public_name(site: Path) -> None:
    import pipevault

    page = _Page((site / "reference" / "api" / "index.html").read_text("utf-8"))
    assert {f"pipevault.{name}" for name in pipevault.__all__ if name != "errors"} <= page.anchors
    errors = _Page((site / "reference" / "errors" / "index.html").read_text("utf-8"))
    named = {
        name for name, value in vars(pipevault.errors).items() if isinstance(value, type) and name.endswith("Error")
    }
    assert {f"pipevault.errors.{name}" for name in named} <= errors.anchors


def test_roles_of_docstrings_are_links_or_code(site: Path) -> None:
    pages = [path.read_text("utf-8") for path in (site / "reference").rglob("*.html")]
    assert [text for page in pages for text in re.findall(r":(?:class|func|meth|attr|data|mod):<", page)] == []
