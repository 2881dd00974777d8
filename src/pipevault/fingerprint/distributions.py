"""Installed distributions, and which modules belong to them, wherever they lie: site-packages, ``--target``, conda.

A distribution is known by the ``dist-info`` folder next to its packages, which pip, uv and conda write. Nothing is
imported. The folder is listed once in a process, and the distributions in it are read only for a package whose name
is none of theirs (``PIL`` of pillow, ``sklearn`` of scikit-learn).
"""

from __future__ import annotations

import functools
import os
import re
import sys
from types import ModuleType

_SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})


def folder_of(module_name: str) -> str | None:
    """Return the folder of the installed distribution to which the module belongs; ``None`` for all other code.

    Code in a checkout that is installed as editable belongs to none: its version does not tell one state of the code
    from the next. So does a file that was not installed, though it may lie in ``site-packages``.
    """
    root = module_name.partition(".")[0]
    module, package = sys.modules.get(module_name), sys.modules.get(root)
    file = getattr(module or package, "__file__", None)
    if root == "__main__" or not isinstance(file, str) or not os.path.isabs(file):
        return None
    folder = _folder_around(package, file) or _folder_by_name(module_name, file)
    if folder is not None and _is_installed(folder, root):
        return folder
    true_name = getattr(module, "__name__", module_name)  # requests.packages.urllib3 is urllib3
    return folder_of(true_name) if true_name.partition(".")[0] != root else None


def _folder_around(package: ModuleType | None, file: str) -> str | None:
    """The folder that holds the top-level ``package``, if ``file`` lies in that package or is it."""
    top = getattr(package, "__file__", None)
    if not isinstance(top, str) or not os.path.isabs(top):
        return None  # a package without a file of its own: its parts may lie in several folders
    folder, name = os.path.split(top)
    if file == top and not name.startswith("__init__."):
        return folder
    return os.path.dirname(folder) if file.startswith(folder + os.sep) else None


def _folder_by_name(module_name: str, file: str) -> str | None:
    """The folder that ``file`` would be imported from under its full name; ``None`` if it does not fit the name."""
    names = module_name.split(".")
    path = os.path.dirname(file) if os.path.basename(file).startswith("__init__.") else file
    for name in reversed(names):
        path, last = os.path.split(path)
        if last.partition(".")[0] != name:
            return None
    return path


@functools.cache
def _is_installed(folder: str, root: str) -> bool:
    distributions = _distributions(folder)
    own = distributions.get(_normalized(root))
    if own is not None and not _is_editable(own):
        return True
    return bool(distributions) and root in _top_level_names(folder)


@functools.cache
def _distributions(folder: str) -> dict[str, str]:
    """Folders with the facts of the distributions in ``folder``, by normalized name.

    An ``egg-info`` folder counts where packages are installed only; elsewhere it stands next to code in a checkout.
    """
    endings = (".dist-info", ".egg-info") if os.path.basename(folder) in _SITE_FOLDERS else (".dist-info",)
    try:
        names = os.listdir(folder)
    except OSError:  # a zip file, or a folder that is gone
        return {}
    return {
        _normalized(name.rpartition(".")[0].partition("-")[0]): os.path.join(folder, name)
        for name in names
        if name.endswith(endings)
    }


@functools.cache
def _top_level_names(folder: str) -> frozenset[str]:
    return frozenset(
        name for facts in _distributions(folder).values() if not _is_editable(facts) for name in _names_in(facts)
    )


def _names_in(facts: str) -> set[str]:
    """Names that the distribution with these facts can be imported by, from its list of files or of names."""
    for name, pattern in (
        ("top_level.txt", rb"(?m)^([^/\s]+)\s*$"),
        ("RECORD", rb"(?m)^([^/,.\n]+)(?=/|\.(?:py|pyd|so|[^/,\n]+\.so),)"),
        ("installed-files.txt", rb"(?m)^\.\./([^/,.\n]+)"),
    ):
        try:
            with open(os.path.join(facts, name), "rb") as file:
                found = re.findall(pattern, file.read())
        except OSError:
            continue
        if found:
            return {top.decode("utf-8", "replace") for top in found}
    return set()


def _is_editable(facts: str) -> bool:
    """Return True if the distribution points at a checkout (PEP 610)."""
    try:
        with open(os.path.join(facts, "direct_url.json"), encoding="utf-8") as file:
            return re.search(r'"editable"\s*:\s*true', file.read()) is not None
    except (OSError, UnicodeDecodeError):
        return False  # installed from an index


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
