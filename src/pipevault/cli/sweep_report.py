"""What the report of a sweep shows: the sweep's figures as text, plots and pictures for its template."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from pipevault.report.contact_sheet import contact_sheet
from pipevault.report.page import render_page
from pipevault.report.plots import prompt_labels, share_bars, strip_plot

if TYPE_CHECKING:
    from PIL import Image

    from pipevault.evidence.sweep.drift import Drift
    from pipevault.evidence.sweep.run import Sweep

_PICTURES_OF_A_SEED = 24
_LISTED = 20
_SHARES_MEAN = (
    "Shares of each score's variance that are due to the prompt alone, to the seed alone (over all prompts alike), and "
    "to the remainder: what a seed does to one prompt and not to another."
)


class SweepReport:
    """``plots`` are SVG texts by name: ``shares`` and each score. :class:`MissingExtraError` where the extra is not
    installed.
    """

    def __init__(self, sweep: Sweep, drift: Drift | None = None) -> None:
        self._result, self._thumbnails, self._drift = sweep.result, sweep.thumbnails, drift
        self._outliers = sweep.result.outlier_seeds()
        self._effects = sweep.result.seed_effects()

    @cached_property
    def sheet(self) -> Image.Image:
        result = self._result
        return contact_sheet(self._thumbnails, result.prompts, result.seeds, outliers=tuple(self._outliers))

    def contact_sheet_png(self) -> bytes:
        buffer = io.BytesIO()
        self.sheet.save(buffer, format="PNG")
        return buffer.getvalue()

    @cached_property
    def plots(self) -> dict[str, str]:
        result = self._result
        shares = {score_title(name): asdict(share) for name, share in result.variance_shares().items()}
        plots = {"shares": share_bars(shares)}
        for name, table in result.scores.items():
            plots[name] = strip_plot(
                table,
                result.prompts,
                result.seeds,
                title=score_title(name),
                unit=_score(name).unit,
                outliers=[result.seeds[column] for column in self._effects[name].outliers],
            )
        return plots

    def page(self) -> str:
        """One HTML page that needs no other file."""
        from pipevault.evidence.sweep.variance import chance_shares

        result = self._result
        numbered = list(enumerate(result.prompts, 1)) if prompt_labels(result.prompts) != list(result.prompts) else []
        return render_page(
            "sweep.html.j2",
            {
                "title": f"Seed sweep of {result.model}",
                "summary": f"{len(result.prompts)} prompts by {len(result.seeds)} seeds, level "
                f"{result.level['achieved']}, {result.created_at}.",
                "notes": result.notes,
                "moved": _SHARES_MEAN,
                "shares_plot": self.plots["shares"],
                "scores": [self._score_row(name) for name in result.scores],
                "chance": _share_texts(chance_shares(len(result.prompts), len(result.seeds))),
                "not_available": [
                    {"title": score_title(name), "reason": reason} for name, reason in result.not_available.items()
                ],
                "prompts": result.prompts,
                "seeds": result.seeds,
                "sheet": self.sheet,
                "numbered_prompts": numbered,
                "outliers": [self._outlier(seed, names) for seed, names in self._outliers.items()],
                "judged": [
                    f"{score_title(name)}: {effects.reason}."
                    for name, effects in self._effects.items()
                    if effects.reason
                ],
                "drift": self._drift_content(),
                "plots": [
                    {"title": score_title(name), "svg": svg} for name, svg in self.plots.items() if name != "shares"
                ],
                "seed_rows": [
                    {"seed": seed, "means": [_mean(row[column] for row in table) for table in result.scores.values()]}
                    for column, seed in enumerate(result.seeds)
                ],
                "facts": [{"name": name, "value": value} for name, value in self._facts()],
            },
        )

    def _score_row(self, name: str) -> dict[str, Any]:
        values = [value for row in self._result.scores[name] for value in row]
        shares, score = self._result.variance_shares()[name], _score(name)
        return {
            "title": score.title,
            "constant": shares.constant,
            "shares": _share_texts(shares),
            "mean": _mean(values),
            "deviation": pstdev(values),
            "still": 0 < pstdev(values) < score.resolution,
            "lowest": min(values),
            "highest": max(values),
            "unit": score.unit,
            "range": score.range_text,
            "meaning": score.meaning,
            "source": score.source,
        }

    def _outlier(self, seed: int, names: Sequence[str]) -> dict[str, Any]:
        column = self._result.seeds.index(seed)
        labels = prompt_labels(self._result.prompts)
        pictures = [
            {"prompt": label, "image": row[column]} for label, row in zip(labels, self._thumbnails, strict=True)
        ]
        return {
            "seed": seed,
            "reasons": [self._outlier_reason(name, column) for name in names],
            "pictures": pictures[:_PICTURES_OF_A_SEED],
        }

    def _outlier_reason(self, name: str, column: int) -> str:
        effects, score = self._effects[name], _score(name)
        return (
            f"{score.title}: {effects.effects[column]:+.3g} ({score.unit}) from the median seed, "
            f"modified z {effects.z[column]:+.1f}"
        )

    def _drift_content(self) -> dict[str, Any] | None:
        if self._drift is None:
            return None
        return {
            "summary": drift_summary(self._drift),
            "shifts": [{"title": score_title(name), **shift.to_json()} for name, shift in self._drift.shifts.items()],
            "lists": [{"title": title, "entries": entries} for title, entries in drift_lists(self._drift)],
        }

    def _facts(self) -> list[tuple[str, str]]:
        result = self._result
        call = {name: value for name, value in result.call.items() if value not in (None, {}, [])}
        machine = {name: value for name, value in result.machine.items() if name != "features"}
        return [
            ("pipeline", result.pipeline),
            ("call", _listed(call) or "the pipeline's defaults"),
            ("batch size", str(result.batch_size)),
            ("seeds", ", ".join(map(str, result.seeds))),
            ("key", result.key or "none"),
            ("outcome", result.outcome),
            ("level", f"asked {result.level['asked']}, achieved {result.level['achieved']}"),
            ("weights", _listed(result.weights) or "not recorded"),
            ("versions", _listed(result.versions)),
            ("machine", _listed(machine)),
        ]


def score_title(name: str) -> str:
    title: str = _score(name).title
    return title


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def drift_summary(drift: Drift) -> str:
    if not drift.drifted:
        return f"All {drift.compared} pictures that both sweeps have are the same, bit by bit."
    return f"{len(drift.changed)} of the {drift.compared} pictures that both sweeps have differ."


def drift_lists(drift: Drift) -> list[tuple[str, list[str]]]:
    """Titles and entries, those that have any, the long ones cut with a count of the rest."""
    lists = [
        ("What was different about the sweep", list(drift.context)),
        ("Seeds that became outliers", _in_one(map(str, drift.new_outliers))),
        ("Seeds that are outliers no more", _in_one(map(str, drift.gone_outliers))),
        *(
            (f"Missing {name}", _in_one(entries) if name.startswith("seeds") else list(entries))
            for name, entries in drift.missing.items()
        ),
        ("Changed pictures", [f"{prompt}, seed {seed}".lstrip(", ") for prompt, seed in drift.changed]),
    ]
    return [(title, _cut(entries)) for title, entries in lists if entries]


def _in_one(entries: Iterable[str]) -> list[str]:
    joined = ", ".join(entries)
    return [joined] if joined else []


def _cut(entries: list[str]) -> list[str]:
    rest = len(entries) - _LISTED
    return entries if rest <= 0 else [*entries[:_LISTED], f"and {rest} more"]


def _score(name: str) -> Any:
    from pipevault.evidence.sweep.quality import SCORES

    return SCORES[name]


def _share_texts(shares: Any) -> list[str]:
    return [percent(share) for share in (shares.prompt, shares.seed, shares.remainder)]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _listed(mapping: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items())
