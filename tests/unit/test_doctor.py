"""`mm1 doctor`: what it says of machines that lack things, or have things that do not work.

The machine's commands are real executables in a folder that is all of PATH; libraries are hidden or broken in the
Python processes that import them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mm1.cli import main
from megatron_mm1.config.presets import preset
from megatron_mm1.doctor import gpu, libraries, machine, surroundings
from megatron_mm1.doctor.finding import Finding, ProbeError, Settings, State, output_of, run_probes
from megatron_mm1.doctor.report import PROBES, as_text
from megatron_mm1.doctor.verdict import Purpose, judge
from megatron_mm1.planning.parameters import count_parameters

H100 = "NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0"
A100 = "NVIDIA A100-SXM4-80GB, 81920, 580.65.06, 8.0"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(run_dir=tmp_path / "runs", corpus=tmp_path / "corpus", timeout_seconds=60)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for executables, which alone are on PATH."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_gpus_are_counted_and_described(commands: Path, settings: Settings) -> None:
    command(commands, "nvidia-smi", f"echo '{H100}'; echo '{H100}'")
    finding = only(gpu.probe_gpus(settings))
    assert finding.state is State.OK
    assert finding.found == "2 x NVIDIA H100 80GB HBM3 (79 GiB, compute capability 9.0), driver 580.65.06"
    assert [item["memory_bytes"] for item in finding.facts["gpus"]] == [81559 * 2**20] * 2


@pytest.mark.parametrize(
    ("script", "state", "says"),
    [
        (None, State.MISSING, "no nvidia-smi"),
        ("exit 0", State.MISSING, "none that the driver sees"),
        (f"echo '{H100}'; echo '{A100}'", State.LIMITED, "compute capability 8.0"),
        ("echo 'NVIDIA-SMI has failed: no driver' >&2; exit 9", State.FAILED, "exit code 9: NVIDIA-SMI has failed"),
        ("echo 'GPU is lost'", State.FAILED, "nvidia-smi said 'GPU is lost'"),
        ("kill -SEGV $$", State.FAILED, "ended by SIGSEGV"),
    ],
    ids=["absent", "no GPU", "two kinds", "fails", "talks nonsense", "crashes"],
)
def test_a_driver_that_does_not_work(
    commands: Path, settings: Settings, script: str | None, state: State, says: str
) -> None:
    if script is not None:
        command(commands, "nvidia-smi", script)
    finding = only(gpu.probe_gpus(settings))
    assert finding.state is state and says in finding.found and finding.costs


def test_a_hanging_driver_is_a_line_and_its_processes_end(commands: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command(commands, "nvidia-smi", f"echo $$ > {pids}; /bin/sleep 600 & echo $! >> {pids}; wait")
    hasty = Settings(run_dir=tmp_path, corpus=tmp_path, timeout_seconds=1)
    start = time.monotonic()
    findings = run_probes({"GPU": gpu.probe_gpus, "memory": machine.probe_memory}, hasty)
    assert time.monotonic() - start < 10
    assert [finding.state for finding in findings] == [State.FAILED, State.OK]
    assert findings[0].found == "nvidia-smi did not answer within 1 s"
    for pid in map(int, pids.read_text().split()):
        assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether it runs, a moment later at most; a zombie that nobody has asked for yet does not."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.1)
    return True


def test_a_probe_that_raises_or_hangs_is_its_own_line(settings: Settings) -> None:
    def raises(settings: Settings) -> list[Finding]:
        raise RuntimeError("boom")

    def hangs(settings: Settings) -> list[Finding]:
        time.sleep(30)
        return []

    hasty = Settings(run_dir=settings.run_dir, corpus=settings.corpus, timeout_seconds=0.2)
    findings = run_probes({"one": raises, "two": hangs, "memory": machine.probe_memory}, hasty)
    assert [(f.name, f.state) for f in findings] == [("one", "failed"), ("two", "failed"), ("memory", "ok")]
    assert [f.found for f in findings[:2]] == ["RuntimeError: boom", "no answer within 1 s"]


@pytest.fixture
def python_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python processes started from here import from first."""
    folder = tmp_path / "python"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    return folder


STUB_TORCH = """
import types
__version__ = "2.11.0"
cuda = types.SimpleNamespace(is_available=lambda: False)
distributed = types.SimpleNamespace(
    is_available=lambda: True, is_nccl_available=lambda: False, is_gloo_available=lambda: True
)
version = types.SimpleNamespace(cuda=None)
"""
APEX = "fused_weight_gradient_mlp_cuda"


def hide(folder: Path, module: str) -> None:
    """Makes a module look as if it were not installed."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None:"
        f" None if name == {module!r} else find(name, path, target))\n"
    )


@pytest.mark.parametrize("hidden", ["nvidia.dali", "nvidia"])
def test_a_missing_library_says_how_to_add_it(python_path: Path, settings: Settings, hidden: str) -> None:
    hide(python_path, hidden)
    finding = only(libraries.probe_dali(settings))
    assert (finding.state, finding.found) == (State.MISSING, "not installed")
    assert "images cannot be read" in finding.costs and "pip install nvidia-dali-cuda130" in finding.fix


def test_without_torch_nothing_that_needs_it_works(python_path: Path, settings: Settings) -> None:
    hide(python_path, "torch")
    found = {finding.name: finding for finding in libraries.probe_torch(settings)}
    assert found["PyTorch"].state is State.MISSING
    assert found["megatron-core"].found == "ModuleNotFoundError: No module named 'torch'"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise OSError('libcuda.so.1: cannot open shared object file')", "OSError: libcuda.so.1: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its import was ended by SIGSEGV"),
        ("import time; time.sleep(60)", "its import did not end within 2 s"),
        ("import os; os._exit(0)", "its import ended the process with exit code 0"),
    ],
    ids=["raises", "crashes", "hangs", "ends"],
)
def test_a_broken_library_is_a_line_and_the_next_is_imported(python_path: Path, body: str, says: str) -> None:
    (python_path / "torch.py").write_text(STUB_TORCH)
    (python_path / f"{APEX}.py").write_text(f"print('not an answer')\n{body}")
    hide(python_path, "transformer_engine")
    torch, apex, engine = libraries.ask(["torch", APEX, "transformer_engine"], timeout_seconds=2)
    assert torch["facts"]["version"] == "2.11.0"
    assert apex["installed"] and apex["problem"].startswith(says)
    assert engine == {"installed": False}


def test_the_first_library_that_hangs_takes_one_limit_alone(python_path: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (python_path / "torch.py").write_text(
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    start = time.monotonic()
    answers = libraries.ask(["torch", APEX, "megatron.core"], timeout_seconds=2)
    assert time.monotonic() - start < 4
    assert [answer["problem"] for answer in answers] == ["its import did not end within 2 s", *["needs torch"] * 2]
    assert not alive(int(pid.read_text()))


def test_parts_that_a_build_of_torch_lacks(python_path: Path, settings: Settings) -> None:
    (python_path / "torch.py").write_text(STUB_TORCH)
    found = {finding.name: finding for finding in libraries.probe_torch(settings)}
    assert found["PyTorch"].found == "2.11.0, built for the CPU; CUDA devices: 0"
    assert (found["NCCL"].state, found["cuDNN"].state, found["gloo"].state) == ("missing", "missing", "ok")
    assert found["megatron-core"].state is State.FAILED  # it needs more of torch than that


def test_another_cudnn_than_torchs_is_no_fault_of_torch(python_path: Path, settings: Settings) -> None:
    (python_path / "torch.py").write_text(
        STUB_TORCH
        + "version.cuda = '13.0'\n"
        + "def found():\n    raise RuntimeError('built for 9.19 but found 9.14. PyTorch has its own.')\n"
        + "backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=found))\n"
    )
    found = {finding.name: finding for finding in libraries.probe_torch(settings)}
    assert (found["PyTorch"].state, found["cuDNN"].state) == ("ok", "failed")
    assert found["cuDNN"].found == "built for 9.19 but found 9.14"


def test_a_full_disk_fails_and_nothing_is_written(small_disk: Path) -> None:
    settings = Settings(run_dir=small_disk / "runs" / "mine", corpus=small_disk, timeout_seconds=60)
    finding = only(machine.probe_disk(settings))
    assert finding.state is State.FAILED and "0.0 GiB free, a run needs 1.0" in finding.found
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_it_is_tried(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RUN_BYTES", 0)
    finding = only(machine.probe_disk(Settings(run_dir=small_disk, corpus=small_disk, timeout_seconds=60)))
    assert finding.state is State.FAILED and "No space left on device" in finding.found
    assert list(small_disk.iterdir()) == []


def test_a_disk_is_measured_and_left_as_it_was(settings: Settings, tmp_path: Path) -> None:
    finding = only(machine.probe_disk(settings))
    assert finding.works and finding.facts["write_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_networks(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    for name, state, speed in (("lo", "unknown", ""), ("eth0", "up", "25000"), ("eth1", "down", "")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(state)
        (tmp_path / "net" / name / "speed").write_text(speed)
    ethernet = only(machine.probe_network(settings, root=tmp_path))
    assert (ethernet.state, ethernet.found) == (State.LIMITED, "eth0 (25 Gb/s)")
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    both = only(machine.probe_network(settings, root=tmp_path))
    assert (both.state, both.found) == (State.OK, "mlx5_0 port 1 (400 Gb/sec (4X NDR)); eth0 (25 Gb/s)")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "bond0")
    assert only(machine.probe_network(settings, root=tmp_path)).state is State.FAILED


def test_slurm(commands: Path, settings: Settings) -> None:
    assert only(surroundings.probe_slurm(settings)).found == "no sbatch, srun, sinfo, scontrol"
    for name in surroundings.SLURM_COMMANDS:
        command(commands, name, "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1")
    finding = only(surroundings.probe_slurm(settings))
    assert finding.state is State.FAILED and "Unable to contact slurm controller" in finding.found
    command(commands, "sinfo", '[ "$1" = --version ] && echo slurm 22.05.8 || echo "gpu* 2 gpu:8"')
    assert only(surroundings.probe_slurm(settings)).found == "slurm 22.05.8: gpu* 2 nodes, gpu:8"


def test_container_engines(commands: Path, settings: Settings) -> None:
    assert only(surroundings.probe_containers(settings)).state is State.MISSING
    command(commands, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    finding = only(surroundings.probe_containers(settings))
    assert finding.state is State.FAILED and "Cannot connect" in finding.found
    command(commands, "apptainer", "echo apptainer version 1.4.2")
    command(commands, "srun", "echo '  --container-image=[USER@][REGISTRY#]IMAGE'")
    finding = only(surroundings.probe_containers(settings))
    assert finding.state is State.OK
    assert finding.found.startswith("apptainer 1.4.2; pyxis (srun --container-image); docker failed")


def test_the_demo_corpus(commands: Path, settings: Settings) -> None:
    finding = only(surroundings.probe_demo_corpus(settings))
    assert finding.state is State.MISSING and finding.fix.startswith("apt-get install npm apt dpkg")
    settings.corpus.mkdir()
    (settings.corpus / "corpus.json").write_text("{}")
    assert only(surroundings.probe_demo_corpus(settings)).works


def findings(*absent: str, **facts: object) -> list[Finding]:
    """A machine on which everything works but what is named."""
    names = [*PROBES, "gloo", "NCCL", "megatron-core", "Transformer Engine", "apex"]
    return [
        Finding(name=name, state=State.MISSING if name in absent else State.OK, found="", facts=facts if i == 0 else {})
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("purpose", "absent", "devices", "fit"),
    [
        ("quickstart", (), 0, True),
        ("quickstart", ("GPU", "Slurm", "apex", "Transformer Engine", "containers", "NCCL"), 0, True),
        ("quickstart", ("DALI",), 0, False),
        ("quickstart", ("demo corpus",), 0, False),
        ("train", ("demo corpus",), 0, True),
        ("train", ("disk",), 0, False),
        ("gpu", ("demo corpus", "apex"), 8, True),
        ("gpu", (), 0, False),
        ("gpu", ("Transformer Engine",), 8, False),
    ],
)
def test_what_a_machine_is_fit_for(purpose: str, absent: tuple[str, ...], devices: int, fit: bool) -> None:
    verdict = judge(findings(*absent, devices=devices), Purpose(purpose))
    assert (verdict.reasons == ()) is fit
    if not fit and absent:
        assert verdict.reasons[0].startswith(f"{absent[0]}: ")


def test_layers_and_presets_of_a_gpu_machine() -> None:
    gpus = [{"memory_bytes": 80 * 10**9}] * 8
    verdict = judge(findings(devices=8, gpus=gpus, fp8=True), Purpose.GPU)
    assert not any(verdict.backends.values())
    assert verdict.memory_bytes == 640 * 10**9
    # bf16 weight, float32 gradient and master weight, two float32 moments
    assert verdict.presets["mm1-3b"] == 18 * count_parameters(preset("mm1-3b").model).total
    text = as_text(findings(devices=8), verdict)
    assert "mm1-3b-moe" in text and "does not fit" in text
    without = judge(findings("Transformer Engine", devices=8, gpus=gpus), Purpose.TRAIN)
    assert without.backends["CUDA, local layers"] == ""
    assert without.backends["CUDA, FP8"] == "no Transformer Engine"


def test_a_command_that_fails_without_a_word(commands: Path) -> None:
    command(commands, "quiet", "exit 3")
    with pytest.raises(ProbeError, match="exit code 3: nothing"):
        output_of(["quiet"], timeout_seconds=10)


def test_the_command_from_outside(tmp_path: Path) -> None:
    """One whole look at this machine, which can train: everything but the corpus is there."""
    from importlib.metadata import version

    options = ["--for", "train", "--corpus", str(tmp_path), "--run-dir", "runs", "--timeout", "200"]
    command = [sys.executable, "-m", "megatron_mm1", "doctor", "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    content = json.loads(result.stdout)
    assert (result.returncode, content["verdict"]["reasons"]) == (0, [])
    found = {finding["name"]: finding["found"] for finding in content["findings"]}
    assert {*PROBES, "gloo", "NCCL", "Transformer Engine", "apex"} <= set(found)
    assert found["PyTorch"].startswith(version("torch"))
    assert found["DALI"] == version("nvidia-dali-cuda130")
    assert found["megatron-core"].startswith(version("megatron-core"))


def test_the_exit_code_and_the_reason(
    tmp_path: Path, commands: Path, python_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(python_path, "torch")
    assert main(["doctor", "--corpus", str(tmp_path / "none"), "--run-dir", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "This machine cannot run the quickstart:\n  PyTorch: not installed\n" in output
    assert "  demo corpus: not at" in output
