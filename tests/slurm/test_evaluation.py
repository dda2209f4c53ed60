"""Few-shot evaluation as Slurm runs it."""

import json

import pytest

pytestmark = pytest.mark.slurm


def test_few_shot_evaluation_as_an_array(submitter, undisturbed):
    """A job for each task; what is interrupted goes on when it is submitted again, and a job without a task says so."""
    submitter.settings("PROCESSES_PER_NODE=2\n")
    # Eight demonstrations do not fit the 128 positions of this model.
    arguments = (str(undisturbed.folder), "--limit", "12", "--tensor-model-parallel-size", "1", "--shots", "0", "2")
    tasks = dict(TASKS="demo_captions demo_questions", OUTPUT="few_shot")
    job = submitter("eval_fewshot_array.sh", "--array=1", arguments=arguments, **tasks)
    submitter.wait(job)
    folder = submitter.folder / "few_shot" / "demo_questions"
    results = (folder / "results.json").read_bytes()
    assert list(json.loads(results)["tasks"]["demo_questions"]["shots"]) == ["0", "2"]
    assert (folder / "report.html").exists()
    [finished] = (folder / "finished").glob("*-0.jsonl")
    lines = finished.read_text().splitlines(keepends=True)
    finished.write_text("".join(lines[:1]))
    submitter.wait(submitter("eval_fewshot_array.sh", "--array=1", arguments=arguments, **tasks))
    assert (folder / "results.json").read_bytes() == results
    job = submitter("eval_fewshot_array.sh", "--array=2", arguments=arguments, **tasks)
    submitter.wait(job, "FAILED")
    assert "no task 2 among 2 (demo_captions demo_questions): sbatch --array=0-1" in submitter.output(job)
