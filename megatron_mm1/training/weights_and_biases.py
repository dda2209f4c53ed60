"""Figures in Weights & Biases. Whatever fails there ends the logging to it and never the run."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm1.config import MM1Config
from megatron_mm1.config.serialization import to_dict


class WandbRun:
    """A run in Weights & Biases; one that cannot begin online is kept on disk, from where `wandb sync` sends it.

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
        self._run: Any = None
        try:
            import wandb
        except ImportError:
            say(" Weights & Biases is not installed, and gets no figures (pip install wandb)")
            return
        try:
            self._run = self._begin(wandb.init, config)
        except Exception as error:  # of the network, the account, the disk, or the library itself
            self._say(f" Weights & Biases: {_first_line(error)}")
            self._keep_on_disk(wandb.init, config)
        if self._run is not None:
            self.id = self._run.id

    def _begin(self, init: Callable[..., Any], config: MM1Config, **options: Any) -> Any:
        run = init(
            project=config.logging.wandb_project,
            name=config.name,
            id=self.id,
            resume="allow",
            dir=config.run_dir,
            config=to_dict(config),
            **options,
        )
        # A resumed run repeats steps that it had logged; theirs are told apart by the iteration, not by wandb's count.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run

    def _keep_on_disk(self, init: Callable[..., Any], config: MM1Config) -> None:
        try:
            self._run = self._begin(init, config, mode="offline")
        except Exception as error:
            self._say(f" nor offline: {_first_line(error)}; it gets no figures of this process")
        else:
            self._say(f" its figures stay in {config.run_dir}/wandb until `wandb sync` sends them")

    def log(self, points: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(points))
        except Exception as error:
            self._say(f" Weights & Biases: {_first_line(error)}; it gets no more figures of this process")
            self._run = None

    def finish(self) -> None:
        """End it; figures on their way are sent."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._say(f" Weights & Biases: {_first_line(error)}; its last figures may be missing there")
        self._run = None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
