"""The page of a run as the trainer leaves it: the figures that `mm1 report` looks for are those that are logged."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm1.report.page import run_page
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of

pytestmark = pytest.mark.demo


def test_a_run_s_page_shows_all_that_it_logged(pool, demo_corpus: Path, tmp_path: Path) -> None:
    config = config_of("mm1-tiny-moe")
    training = replace(config.training, train_iters=2, eval_interval=2, eval_iters=1)
    logging = replace(config.logging, log_interval=1)
    config = replace(config, training=training, logging=logging, run_dir=str(tmp_path))
    pool(1).run(jobs.train_as_users_do, config)
    page = run_page(tmp_path, output=tmp_path / "report.html")
    titles = ("Loss", "Loss by source", "Gradient norm", "Throughput", "Learning rate", "Load of the busiest expert")
    assert all(f"<figcaption>{title}</figcaption>" in page for title in titles)
    assert all(f"<td>{source.name}</td>" in page for source in config.data.validation)
    assert "No " not in page
