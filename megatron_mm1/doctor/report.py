"""`mm1 doctor`: the findings and the verdict, as a table or as JSON."""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from megatron_mm1.arguments import FAILED
from megatron_mm1.doctor import gpu, libraries, machine, surroundings
from megatron_mm1.doctor.finding import Finding, Probe, Settings, State, run_probes
from megatron_mm1.doctor.verdict import Purpose, Verdict, judge

PROBES: Mapping[str, Probe] = {
    "GPU": gpu.probe_gpus,
    "PyTorch": libraries.probe_torch,
    "DALI": libraries.probe_dali,
    "CPU cores": machine.probe_processors,
    "memory": machine.probe_memory,
    "/dev/shm": machine.probe_shared_memory,
    "disk": machine.probe_disk,
    "open files": machine.probe_open_files,
    "network": machine.probe_network,
    "Slurm": surroundings.probe_slurm,
    "containers": surroundings.probe_containers,
    "demo corpus": surroundings.probe_demo_corpus,
}
MARKS = {State.OK: "ok", State.LIMITED: "limited", State.MISSING: "missing", State.FAILED: "FAILED"}
WIDTH = 118


def doctor_main(args: argparse.Namespace) -> int:
    """Looks, prints and returns the exit code: 0 where the machine is fit for `args.purpose`."""
    settings = Settings(run_dir=args.run_dir, corpus=args.corpus, timeout_seconds=args.timeout)
    findings = run_probes(PROBES, settings)
    verdict = judge(findings, Purpose(args.purpose))
    print(as_json(findings, verdict) if args.json else as_text(findings, verdict))
    return FAILED if verdict.reasons else 0


def as_json(findings: Sequence[Finding], verdict: Verdict) -> str:
    content = {"findings": [asdict(finding) for finding in findings], "verdict": asdict(verdict)}
    return json.dumps(content, indent=2)


def as_text(findings: Sequence[Finding], verdict: Verdict) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [line for finding in findings for line in _finding_lines(finding, width)]
    lines += ["", "layers that run here:"]
    lines += [f"  {name}: {f'no ({problem})' if problem else 'yes'}" for name, problem in verdict.backends.items()]
    lines += ["", *_preset_lines(verdict), ""]
    if verdict.reasons:
        lines += [f"This machine cannot run {verdict.purpose.what}:", *(f"  {reason}" for reason in verdict.reasons)]
    else:
        lines.append(f"This machine can run {verdict.purpose.what}.")
    return "\n".join(lines)


def _finding_lines(finding: Finding, width: int) -> list[str]:
    indent = " " * (width + 10)
    notes = [f"costs: {finding.costs}"] if finding.costs else []
    notes += [f"fix: {finding.fix}"] if finding.fix else []
    head = f"{finding.name:{width}}  {MARKS[finding.state]:7} {finding.found}"
    return [
        line
        for number, text in enumerate([head, *notes])
        for line in textwrap.wrap(text, WIDTH, initial_indent=indent if number else "", subsequent_indent=indent)
    ]


def _preset_lines(verdict: Verdict) -> list[str]:
    """Which presets the memory holds. Activations come on top, so what only just fits will not train."""
    there = verdict.memory_bytes
    lines = [f"presets, by what weights, gradients and optimizer states take of the {_gigabytes(there)} here:"]
    for name, needed in verdict.presets.items():
        share = f"{needed / there:.0%}" if 0 < needed <= there else "does not fit"
        lines.append(f"  {name:14} {_gigabytes(needed):>9}  {share}")
    return lines


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB" if number < 1e11 else f"{number / 1e9:.0f} GB"
