"""Seeding every layer of randomness, and giving it back as it was.

The layers are Python's ``random``, NumPy's global generator, and torch's generator of the CPU and of each GPU. torch
takes the low 32 bits of a seed for the CPU and NumPy takes no more, so seeds below 2**32 differ in every layer, and
larger ones that agree modulo 2**32 do not.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipevault.determinism.layers import gpu_modules, kept
from pipevault.determinism.turns import DEFAULT_TIMEOUT_S
from pipevault.errors import BadSeedError

MAX_SEED = 2**64 - 1
_NUMPY_SEEDS = 2**32


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an ``int`` from 0 to :data:`MAX_SEED`; raise :class:`BadSeedError` for anything else."""
    if not is_integer(seed):
        raise BadSeedError(f"A seed is an integer, not {seed!r} ({type(seed).__name__}). Pass 0 to 2**64 - 1.", seed)
    if not 0 <= seed <= MAX_SEED:
        raise BadSeedError(f"The seed {int(seed)} is out of range. Pass 0 to 2**64 - 1, or -1 for a fresh one.", seed)
    return int(seed)


def is_integer(value: Any) -> bool:
    """Return whether it is an integer of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def effective_seed(seed: int | None) -> int:
    """Return the seed that is used and recorded: ``None`` and ``-1`` become a fresh one of 63 bits. Raises
    :class:`BadSeedError` for anything else: other negatives, 2**64 and more, bool, float, text.
    """
    return secrets.randbits(63) if is_fresh(seed) else check_seed(seed)


def is_fresh(seed: Any) -> bool:
    """Return whether it asks for a seed that is not known yet: ``None`` and ``-1`` do."""
    return seed is None or (is_integer(seed) and bool(seed == -1))


def seed_everything(seed: int | None) -> int:
    """Seed every layer of this process, GPUs when they start, and return the effective seed. ``DataLoader`` workers
    follow: torch derives their seeds.
    """
    root = effective_seed(seed)
    random.seed(root)
    np.random.seed(root % _NUMPY_SEEDS)
    torch.manual_seed(root)
    return root


def seed_layers(seed: int) -> None:
    """Seed as :func:`seed_everything` does, without ``torch.manual_seed``: for every kind of GPU that has not started,
    built or not, that formats a stack trace, which takes longer than all the rest.
    """
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    torch.default_generator.manual_seed(seed)
    for module in gpu_modules().values():
        module.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def isolated_rng(seed: int | None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[int]:
    """Seed every layer inside, yield the effective seed, and restore each layer's state on exit.

    No generation of another thread draws from the layers meanwhile, and this one waits for those that do, at most
    ``timeout_s`` (:class:`~pipevault.errors.TurnTimeoutError`). A GPU that starts inside had no state to restore: it
    gets the seed that torch was given before.
    """
    root = effective_seed(seed)
    with kept(timeout_s=timeout_s):
        seed_layers(root)
        yield root
