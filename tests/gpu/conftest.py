"""Counts what ran: on a machine with a GPU a skipped test fails the run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return  # a worker of pytest-xdist: the process that reports counts
    skipped = _of_this_folder(reporter.stats.get("skipped", []))
    session.exitstatus = exit_status(int(exitstatus), skipped=len(skipped), has_device=torch.cuda.is_available())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = {outcome: _of_this_folder(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "skipped")}
    if any(stats.values()):
        terminalreporter.section("GPU tests")
        terminalreporter.write_line("\n".join(summary(stats["passed"], stats["skipped"])))


def exit_status(status: int, *, skipped: int, has_device: bool) -> int:
    """The run's exit status: a test that was skipped where there is a GPU counts as one that failed."""
    return int(pytest.ExitCode.TESTS_FAILED) if status == 0 and skipped and has_device else status


def summary(passed: Sequence[pytest.TestReport], skipped: Sequence[pytest.TestReport]) -> list[str]:
    """Lines that say how many passed, how many did not run, and why."""
    reasons = Counter(_reason(report) for report in skipped)
    lines = [f"{len(passed)} passed, {len(skipped)} did not run"]
    return [*lines, *(f"  {count} x {reason}" for reason, count in reasons.most_common())]


def _of_this_folder(reports: Sequence[pytest.TestReport]) -> list[pytest.TestReport]:
    folder = f"{FOLDER.parent.name}/{FOLDER.name}/"
    return [report for report in reports if report.nodeid.startswith(folder)]


def _reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
