"""Figures in Weights & Biases. Whatever fails there ends the logging to it and never the run."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict

FINISH_SECONDS = 60.0
"""How long the end of a run waits for figures on their way, where `WANDB_FINISH_TIMEOUT` does not say: wandb itself
waits without end, and a job that holds its machines must not."""

_ONLINE = ("online", "run", "shared")
"""wandb's modes in which it wants an account."""


class WandbRun:
    """A run in Weights & Biases; one that cannot begin online is kept on disk, from where `wandb sync` sends it.

    It neither asks for an account, on a terminal or elsewhere, nor waits for one.

    Args:
        config: the project, the folder and the run's name are read; all of it is shown there.
        run_id: the run to go on with; None: a new one.
        say: prints a line; what went wrong is said once.

    Attributes:
        id: of the run. A failure leaves the one that was given, so that a later start can go on with it.
    """

    def __init__(self, config: MM1Config, *, run_id: str | None, say: Callable[[str], None]) -> None:
        self.id = run_id
        self._say = say
        self._folder = f"{config.run_dir}/wandb"
        self._run: Any = None
        try:
            import wandb
        except ImportError:
            say(" Weights & Biases is not installed, and gets no figures (pip install wandb)")
            return
        try:
            _check_login(wandb)
            self._run = _begin(wandb, config, run_id=run_id)
        except Exception as error:  # of the network, the account, the disk, or the library itself
            self._say(f" Weights & Biases: {_first_line(error)}")
            self._keep_on_disk(wandb, config)
        if self._run is not None:
            self.id = self._run.id
            self._attempt(_plot_by_iteration)

    def _keep_on_disk(self, wandb: Any, config: MM1Config) -> None:
        try:
            self._run = _begin(wandb, config, run_id=self.id, mode="offline")
        except Exception as error:
            self._say(f" nor offline: {_first_line(error)}; it gets no figures of this process")
        else:
            self._say(f" its figures stay in {self._folder} until `wandb sync` sends them")

    def log(self, points: Mapping[str, Any]) -> None:
        self._attempt(lambda run: run.log(dict(points)))

    def _attempt(self, act: Callable[[Any], object]) -> None:
        """Do it to the run, if there is still one; what fails is not tried again."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._say(f" Weights & Biases: {_first_line(error)}; it gets no more figures of this process")
            self._run = None

    def finish(self) -> None:
        """End it; figures on their way are sent, if that takes no longer than FINISH_SECONDS."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._say(
                f" Weights & Biases: {_first_line(error)} Its last figures may be missing there; "
                f"`wandb sync` sends what is in {self._folder}"
            )
        self._run = None


def _check_login(wandb: Any) -> None:
    """`wandb.init` would ask a terminal's user for an account, and wait until somebody answers."""
    if wandb.setup().settings.mode in _ONLINE and not wandb.login(prompt=False, verify=False):
        raise wandb.errors.UsageError("nobody is logged in (wandb login)")


def _begin(wandb: Any, config: MM1Config, *, run_id: str | None, **options: Any) -> Any:
    seconds = wandb.setup().settings.finish_timeout or FINISH_SECONDS
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.name,
        id=run_id,
        resume="allow",
        dir=config.run_dir,
        config=to_dict(config),
        settings=wandb.Settings(finish_timeout=seconds, finish_timeout_raises=True),
        **options,
    )


def _plot_by_iteration(run: Any) -> None:
    """A resumed run repeats steps that it had logged; theirs are told apart by the iteration, not by wandb's count."""
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
