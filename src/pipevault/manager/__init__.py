"""Ties fingerprints, the vault and frozen graphs together."""

from pipevault.manager.cache import PipelineCache, outcome
from pipevault.manager.construct import from_pretrained
from pipevault.manager.outcome import Explanation, Outcome, PartOutcome, Step

__all__ = ["Explanation", "Outcome", "PartOutcome", "PipelineCache", "Step", "from_pretrained", "outcome"]
