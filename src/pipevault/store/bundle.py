"""Bundles: entries with everything they need in one file, to carry them to another vault.

A bundle is a zip file whose members are stored as they are, not deflated: what a compressor writes depends on its
version, and equal entries must make equal files on every machine; a reader that unpacks nothing cannot be made to
unpack a bomb. Compress the file as a whole where it is sent.

:mod:`~pipevault.store.bundle_zip` is the container, :mod:`~pipevault.store.bundle_index` its first member,
:mod:`~pipevault.store.bundle_file` writes and reads the file.
"""

from __future__ import annotations

from pipevault.store.bundle_export import ExportReport, export_bundle
from pipevault.store.bundle_import import bundle_keys, import_bundle

__all__ = ["ExportReport", "bundle_keys", "export_bundle", "import_bundle"]
