"""Run the contract of tests/families on every family and write the table: families by parts frozen, or why not.

scripts/breadth.py                       all families; tests/families/RESULTS.md and scripts/results/breadth.json
scripts/breadth.py sdxl wan --dir DIR    some families, vaults and reports kept in DIR
scripts/breadth.py --reports DIR         the table from reports that were kept
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "families" / "RESULTS.md"
RESULTS = ROOT / "scripts" / "results" / "breadth.json"
_TIMEOUT_S = 1800.0

_RUN = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from families.contract import check_family
from families.build import FAMILIES
report = check_family(FAMILIES[{name!r}], Path({vault!r}), compile_variations={compiled!r})
print("REPORT " + json.dumps(report.to_json()))
"""


def run_family(name: str, folder: Path, compiled: tuple[str, ...]) -> dict[str, Any]:
    """The report of one family, run in a process of its own."""
    code = _RUN.format(tests=str(ROOT / "tests"), name=name, vault=str(folder / name), compiled=compiled)
    started_s = time.perf_counter()
    try:
        finished = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "failures": [f"it took longer than {_TIMEOUT_S:g} s"], "parts": {}}
    lines = [line for line in finished.stdout.splitlines() if line.startswith("REPORT ")]
    if not lines:
        last = [line for line in finished.stderr.splitlines() if line.strip()][-1:] or ["it printed nothing"]
        return {"name": name, "failures": [last[0][:500]], "parts": {}, "stderr": finished.stderr[-3000:]}
    report: dict[str, Any] = json.loads(lines[-1].removeprefix("REPORT "))
    report["seconds"] = round(time.perf_counter() - started_s, 1)
    return report


def table(reports: list[dict[str, Any]]) -> str:
    """The reports as Markdown."""
    lines = [
        "| family | denoiser | frozen | eager, and why | load s | hit s | distance "
        "| by graph | by eager | none | broken |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for report in reports:
        parts = report["parts"]
        frozen = ", ".join(name for name, status in parts.items() if status == "frozen")
        eager = "; ".join(f"{name}: {why.splitlines()[0][:120]}" for name, why in report.get("eager_parts", {}).items())
        variations = report.get("variations", {})
        by = {
            kind: ", ".join(n for n, k in variations.items() if k == kind)
            for kind in ("graph", "eager", "unrepeatable")
        }
        lines.append(
            f"| {report['name']} | {report.get('denoiser', '')} | {frozen} | {eager} | {report.get('load_s', '')} "
            f"| {report.get('hit_s', '')} | {report.get('largest', float('nan')):.1e} | {by['graph']} | {by['eager']} "
            f"| {by['unrepeatable']} "
            f"| {'; '.join(report['failures'])} |"
        )
    return "\n".join(lines)


def summary(reports: list[dict[str, Any]]) -> str:
    right = sum(not report["failures"] for report in reports)
    denoisers = sum(report.get("denoiser") == "frozen" for report in reports)
    whole = sum(bool(report["parts"]) and "eager" not in report["parts"].values() for report in reports)
    return (
        f"{len(reports)} families: the contract holds for {right}, the denoiser is frozen in {denoisers}, every called "
        f"part in {whole}."
    )


def kept_reports(folders: list[Path], names: list[str]) -> list[dict[str, Any]]:
    """The reports of ``names`` that earlier runs kept, in the order of the families; a later folder wins."""
    found = {path.stem: json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))}
    return [found[name] for name in names if name in found]


def write(reports: list[dict[str, Any]], target: Path) -> None:
    """Write the table, and the reports as JSON."""
    import diffusers
    import torch
    import transformers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    target.write_text(
        f"# Families\n\nTiny pipelines with random weights, {versions}, one CPU thread; written by "
        f"`scripts/breadth.py`. Variations under `by graph` were served by the graphs of the first call; those under "
        f"`by eager` have another signature and ran eagerly, as on_unfrozen asked; under `none` the eager "
        f"pipeline itself gives other pixels each time.\n\n{summary(reports)}\n\n"
        f"{table(reports)}\n"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(reports, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; default: all")
    parser.add_argument("--dir", type=Path, help="where vaults are kept; default: a temporary folder")
    parser.add_argument("--compile", nargs="*", default=(), help="variations to freeze instead of running them eagerly")
    parser.add_argument("--table", type=Path, help=f"default: {TABLE.relative_to(ROOT)} if all families run")
    parser.add_argument("--reports", type=Path, nargs="+", help="folders of kept reports; nothing is run")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from families.build import FAMILIES

    if unknown := [name for name in arguments.names if name not in FAMILIES]:
        parser.error(f"unknown families: {', '.join(unknown)}. Known: {', '.join(FAMILIES)}")
    names = arguments.names or list(FAMILIES)
    if arguments.reports:
        reports = kept_reports(arguments.reports, names)
        write(reports, arguments.table or TABLE)
        print(f"{table(reports)}\n\n{summary(reports)}")
        return int(any(report["failures"] for report in reports))
    with tempfile.TemporaryDirectory() as temporary:
        reports = []
        for name in names:
            report = run_family(name, arguments.dir or Path(temporary), tuple(arguments.compile))
            reports.append(report)
            print(f"{name}: {'; '.join(report['failures']) or 'ok'} ({report.get('seconds', '?')} s)", flush=True)
            if report.get("stderr"):
                print(report["stderr"], flush=True)
            if arguments.dir:
                (arguments.dir / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"\n{table(reports)}\n\n{summary(reports)}")
    target = arguments.table or (None if arguments.names else TABLE)
    if target is not None:
        write(reports, target)
    return int(any(report["failures"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
