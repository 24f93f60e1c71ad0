"""Runs the stages one after the other; writes each result when it is done, and a page of all at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from dpoeng.bench.evidence.stages import STAGES, Place
from dpoeng.bench.measuring.records import stamp

_RESULTS, _PAGE = "evidence.jsonl", "evidence.md"


def run_stage(name: str, device: str, small: bool) -> dict[str, Any]:
    """Runs a stage in a separate process; returns its result, or how it ended."""
    _, limit = STAGES[name]
    command = [sys.executable, "-m", "dpoeng.bench.evidence", "--stage", name, "--device", device]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"stage": name, "ok": False, "ended": f"not done after {limit} s", "took_s": limit}
    took = round(time.perf_counter() - began, 1)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {"stage": name, "ok": False, "ended": f"status {done.returncode}", "stderr": words[-12:], "took_s": took}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"stage": name, **result, "took_s": took}


def page_of(record: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Renders the results as Markdown: one line per stage, then all details."""
    small = ", with tiny sizes: figures mean nothing" if record["settings"]["small"] else ""
    lines = [f"# Evidence from {record['device']}{small}", ""]
    if record["settings"]["device"].startswith("cpu"):
        lines += ["No GPU's kernel ran: plain PyTorch stands for each. This only shows that the stages run.", ""]
    lines += ["| stage | as expected | seconds, with the start of a process |", "|---|---|---|"]
    lines += [f"| {r['stage']} | {_verdict(r)} | {r.get('took_s', '')} |" for r in results]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit = str(record["commit"])
    if commit.endswith("+"):
        commit = f"{commit[:-1]} with uncommitted changes"
    lines += ["", f"Commit {commit}, {record['date']}; {versions}.", ""]
    for result in results:
        details = {name: value for name, value in result.items() if name not in ("stage", "took_s", "ran")}
        lines += [f"## {result['stage']}", "", "```json", json.dumps(_rounded(details), indent=1), "```", ""]
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    if not result.get("ran", True):
        return "not run"
    return "yes" if result["ok"] else "NO"


def _rounded(value: Any) -> Any:
    """The page's figures have four digits; evidence.jsonl has all."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="A folder for evidence.jsonl and evidence.md.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--small", is_flag=True, help="Tiny sizes, to try the script on a CPU.")
@click.option("--stage", type=click.Choice(sorted(STAGES)), help="One stage in this process, as JSON.")
def main(output: Path | None, device: str, small: bool, stage: str | None) -> None:
    """Measures in ten minutes what needs a GPU; writes each result when it is done."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if stage is not None:
        click.echo(json.dumps(STAGES[stage][0](Place(torch.device(device), small))))
        return
    if output is None:
        raise click.UsageError("name a folder with --output")
    if torch.device(device).type == "cpu" and not small:
        click.echo("no GPU here: tiny sizes, which only show that the script runs")
        small = True
    output.mkdir(parents=True, exist_ok=True)
    file, page = output / _RESULTS, output / _PAGE
    for path in (file, page):
        if path.exists():
            raise click.UsageError(f"{path} already exists: name a new folder")
    record = stamp("gpu-evidence", torch.device(device), {"small": small, "device": device})
    results: list[dict[str, Any]] = []
    with file.open("x", encoding="utf-8") as stream:
        for line in (record, *(run_stage(name, device, small) for name in STAGES)):
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            if "stage" in line:
                results.append(line)
                page.write_text(page_of(record, results), encoding="utf-8")
                words = {"yes": "ok", "NO": "NOT as expected", "not run": "not run: needs a GPU"}
                click.echo(f"{line['stage']}: {words[_verdict(line)]}")
    failed = [result["stage"] for result in results if not result["ok"]]
    click.echo(f"results in {page}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
