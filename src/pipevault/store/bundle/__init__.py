"""Bundles: entries with everything they need in one file, to carry them to another vault.

A bundle is a vault inside a zip file: ``vault.json``, then the artifacts, manifests and signatures under the names that
they have in a vault, sorted. Nothing is compressed: what a compressor writes depends on its version, and equal entries
make equal files; compress the file as a whole where it is sent. :mod:`~pipevault.store.bundle.zip_file` is the file.
"""

from __future__ import annotations

from pipevault.store.bundle.export import ExportReport, export_bundle
from pipevault.store.bundle.importing import bundle_keys, import_bundle

__all__ = ["ExportReport", "bundle_keys", "export_bundle", "import_bundle"]
