"""What is around the trainer: Slurm, container engines, and what the demo corpus is built from."""

import shutil

from megatron_mm1.doctor.finding import Finding, ProbeError, Settings, State, output_of

SLURM_COMMANDS = ("sbatch", "srun", "sinfo", "scontrol")
ENGINES = {
    # Those that need a service are asked for it; the others for their version alone.
    "docker": ("docker", "version", "--format", "{{.Server.Version}}"),
    "podman": ("podman", "version", "--format", "{{.Client.Version}}"),
    "enroot": ("enroot", "version"),
    "apptainer": ("apptainer", "--version"),
    "singularity": ("singularity", "--version"),
    "ch-run": ("ch-run", "--version"),
}
PYXIS_OPTION = "--container-image"
"""srun has it where pyxis is installed."""
CORPUS_TOOLS = {"npm": "npm", "apt-get": "apt", "dpkg": "dpkg"}


def probe_slurm(settings: Settings) -> list[Finding]:
    """The commands, and whether a cluster answers them."""
    name, costs = "Slurm", "jobs on several machines are started by hand, with torchrun on each"
    absent = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if absent:
        fix = "a cluster's login node; apt-get install slurm-client gives the commands alone"
        return [Finding(name=name, state=State.MISSING, found=f"no {', '.join(absent)}", costs=costs, fix=fix)]
    try:
        version = output_of(["sinfo", "--version"], timeout_seconds=settings.timeout_seconds).strip()
        nodes = output_of(["sinfo", "--noheader", "--format=%P %D %G"], timeout_seconds=settings.timeout_seconds)
    except ProbeError as error:
        fix = "scontrol ping; SLURM_CONF must name the cluster's slurm.conf"
        found = f"no cluster answers: {error}"
        return [Finding(name=name, state=State.FAILED, found=found, costs=costs, fix=fix)]
    partitions = "; ".join("{} {} nodes, {}".format(*line.split(maxsplit=2)) for line in nodes.splitlines() if line)
    return [Finding(name=name, state=State.OK, found=f"{version}: {partitions or 'no partition'}")]


def probe_containers(settings: Settings) -> list[Finding]:
    """Container engines that answer."""
    name, costs = "containers", "the image cannot be built or run here"
    working, broken = [], []
    for engine, command in ENGINES.items():
        if shutil.which(engine) is None:
            continue
        try:
            working.append(f"{engine} {_last_word(command, settings)}")
        except ProbeError as error:
            broken.append(str(error))
    if _has_pyxis(settings):
        working.append(f"pyxis (srun {PYXIS_OPTION})")
    found = "; ".join(working + broken)
    if working:
        return [Finding(name=name, state=State.OK, found=found)]
    if broken:
        fix = "start its service, or join its group: usermod -aG docker $USER"
        return [Finding(name=name, state=State.FAILED, found=found, costs=costs, fix=fix)]
    fix = "apt-get install podman buildah, or what the cluster offers (module avail)"
    return [Finding(name=name, state=State.MISSING, found=f"none of {', '.join(ENGINES)}", costs=costs, fix=fix)]


def _has_pyxis(settings: Settings) -> bool:
    try:
        return PYXIS_OPTION in output_of(["srun", "--help"], timeout_seconds=settings.timeout_seconds)
    except (FileNotFoundError, ProbeError):  # srun without a cluster, which is the other probe's to tell
        return False


def _last_word(command: tuple[str, ...], settings: Settings) -> str:
    limit = settings.timeout_seconds / len(ENGINES)  # all of them within the limit of one
    words = output_of(command, timeout_seconds=limit).split()
    if not words:
        raise ProbeError(f"{command[0]} printed no version")
    return words[-1]


def probe_demo_corpus(settings: Settings) -> list[Finding]:
    """Whether the corpus that the quickstart trains on is there, or can be built."""
    if (settings.corpus / "corpus.json").is_file():
        return [Finding(name="demo corpus", state=State.OK, found=f"{settings.corpus}")]
    absent = {tool: package for tool, package in CORPUS_TOOLS.items() if shutil.which(tool) is None}
    if not absent:
        return [Finding(name="demo corpus", state=State.OK, found="not built yet; mm1 data demo can")]
    return [
        Finding(
            name="demo corpus",
            state=State.MISSING,
            found=f"not at {settings.corpus}, and {', '.join(absent)} to build it missing",
            costs="no quickstart; training on other data needs none of it",
            fix=f"apt-get install {' '.join(absent.values())}, or copy the folder from a machine that has it",
        )
    ]
