"""A stream of random numbers for each sample of a batch, so that any sample can be drawn again alone.

The seed of a sample is derived from the root seed and the sample's index with NumPy's ``SeedSequence``, whose output
NumPy promises to keep (NEP 19)::

    sample_seed(root, index) = SeedSequence(entropy=root, spawn_key=(index,)).generate_state(1, uint64)[0] >> 1

torch's CPU generator takes the low 32 bits of a seed, so of 1000 samples two have the same noise with probability 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipevault.determinism.seeds import check_seed, is_fresh, is_integer
from pipevault.errors import BadSeedError, GeneratorCountError, GeneratorDeviceError


def sample_seed(seed: int, index: int) -> int:
    """Return the seed, below 2**63, of the sample at ``index`` (from 0) of the batch with the root ``seed``.

    Raises :class:`BadSeedError`, also for ``None`` and ``-1``: their samples could never be drawn again.
    """
    if is_fresh(seed):
        raise BadSeedError(
            f"Samples need a seed that is known, not {seed!r}. Take one from effective_seed({seed!r}) and keep it.",
            seed,
        )
    root = check_seed(seed)
    if not _is_count(index):
        raise BadSeedError(f"The index of a sample is 0 or more, not {index!r}. Count samples from 0.", index)
    sequence = np.random.SeedSequence(entropy=root, spawn_key=(int(index),))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators(seed: int, n: int = 1, *, first: int = 0) -> list[torch.Generator]:
    """Return CPU generators for ``n`` samples, from the sample at index ``first`` on.

    They go to any diffusers pipeline as ``generator=``. Sample 3 of a batch, alone: ``generators(seed, 1, first=3)``.
    Raises :class:`BadSeedError` and, where ``n`` is not a count, :class:`GeneratorCountError`.
    """
    if not _is_count(n):
        raise GeneratorCountError(f"The number of generators is 0 or more, not {n!r}. Pass the size of the batch.")
    sample_seed(seed, first)  # a bad seed is an error where no sample is wanted too
    return [torch.Generator("cpu").manual_seed(sample_seed(seed, first + offset)) for offset in range(n)]


def _is_count(value: Any) -> bool:
    return is_integer(value) and bool(value >= 0)


def check_generators(given: Sequence[torch.Generator], n: int) -> None:
    """Raise :class:`GeneratorCountError` unless there is one generator for each of ``n`` samples.

    diffusers' ``randn_tensor`` takes a list of one for all samples and fails late on any other count.
    """
    if len(given) != n:
        raise GeneratorCountError(
            f"{len(given)} generators were given for {n} samples. "
            f"Pass one for each sample, such as pipevault.generators(seed, {n}), or a single one."
        )


def check_device(generator: torch.Generator, device: torch.device) -> None:
    """Raise :class:`GeneratorDeviceError` unless ``generator`` can draw for ``device``: one of the CPU always can."""
    own = generator.device
    if own.type == "cpu" or device.type == "meta":
        return
    indices = {own.index, device.index} - {None}
    if own.type != device.type or len(indices) > 1:
        raise GeneratorDeviceError(
            f"A generator on {own} cannot draw noise for {device}. "
            'Pass a CPU generator, which gives the same noise on every device: torch.Generator("cpu") or '
            "pipevault.generators(seed, n)."
        )
