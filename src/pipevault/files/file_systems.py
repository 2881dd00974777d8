"""Telling of a file system whether only this machine can write to it, so that its locks hold."""

from __future__ import annotations

import ctypes
import functools
import sys

# linux/magic.h and the file systems' own headers; the names are those of statfs(2).
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0x2FC12FC1,  # ZFS
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs
        0x61756673,  # aufs
        0x73717368,  # SquashFS
        0xE0F5E1E2,  # EROFS
        0x9660,  # ISO 9660
        0x3153464A,  # JFS
        0x52654973,  # ReiserFS
        0x2011BAB0,  # exFAT
        0x4D44,  # FAT
    }
)
_STATFS_BYTES = 512
"""More than any ``struct statfs``; the type is its first word."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # once: each of these objects makes a class


def is_local(descriptor: int) -> bool:
    """Return whether an open file lies on a file system of this machine's own. ``False`` for network and cluster file
    systems, for FUSE, and for what is not known: others may write there, and locks may be granted to everyone.
    """
    if sys.platform != "linux":
        return False
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc().fstatfs(descriptor, buffer):
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF in _LOCAL
