"""Ties fingerprints, the vault and frozen graphs together."""

from pipevault.cache.outcome import Explanation, Outcome, PartOutcome, Step
from pipevault.manager.cache import PipelineCache
from pipevault.manager.construct import from_pretrained
from pipevault.runtime.pipeline import outcome, unload

__all__ = ["Explanation", "Outcome", "PartOutcome", "PipelineCache", "Step", "from_pretrained", "outcome", "unload"]
