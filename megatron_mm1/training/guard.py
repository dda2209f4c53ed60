"""What a run does about a step that went wrong: `faults.*` of the configuration, applied and written down."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.checkpoint.format import checkpoint_before
from megatron_mm1.config import MM1Config
from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.data.plan import TrainingData
from megatron_mm1.faults.anomalies import Action, Anomaly, AnomalyDetector
from megatron_mm1.faults.journal import Journal
from megatron_mm1.parallel.device import device
from megatron_mm1.training.step import LossStatistics

JOURNAL = "faults.jsonl"
_KEYS_SHOWN = 5


@dataclass(frozen=True)
class Response:
    """What follows from a step that was not applied, the same on every rank.

    Attributes:
        what: was wrong, as a clause.
        checkpoint: to go back to, in a rollback.
    """

    action: Action
    what: str
    checkpoint: Path | None = None


class Guard:
    """Judges every step, and remembers which global batches are passed over; every rank has one.

    Args:
        data: names the samples of a batch.
        say: prints a line.
        norms: gradient norms of the last updates (`CheckpointMetadata.grad_norms`).

    Attributes:
        passed_over: global batches that a rollback leaves out, of this process and of those before it in the run.
    """

    def __init__(
        self, config: MM1Config, data: TrainingData, *, say: Callable[[str], None], norms: Iterable[float] = ()
    ) -> None:
        self.config, self.data, self.say = config, data, say
        self._folder = Path(config.run_dir)
        self._journal = Journal(self._folder / JOURNAL)
        self._anomaly: Anomaly | None = None
        self.passed_over = frozenset(_of_rank_0(self._rollbacks))
        self.go_on(norms)

    def go_on(self, norms: Iterable[float]) -> None:
        """Begin anew behind updates with these gradient norms."""
        faults = self.config.faults
        self._detector = AnomalyDetector(
            nonfinite=faults.nonfinite_policy,
            spike=None if faults.spike_policy == "off" else faults.spike_policy,
            spike_factor=faults.spike_factor,
            spike_window=faults.spike_window,
            max_consecutive_skips=faults.max_consecutive_skips,
            norms=norms,
        )

    @property
    def norms(self) -> tuple[float, ...]:
        """To begin anew with."""
        return self._detector.norms

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of a step is applied; to be called once per step, by every rank."""
        if self.config.faults.spike_policy != "off":
            # Replicas compute the norm each for itself: a last digit must not be what they part over.
            agreed = torch.tensor(grad_norm, dtype=torch.float64, device=device())
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            grad_norm = float(agreed)
        self._anomaly = self._detector.judge(loss, grad_norm)
        return self._anomaly is None

    def respond(self, losses: LossStatistics, *, iteration: int, global_batch: int) -> Response:
        """What follows from the step that was just not accepted; written to the journal and said.

        Args:
            losses: of the step.
            iteration: which it was, from 1.
            global_batch: that it was on.
        """
        anomaly, self._anomaly = self._anomaly, None
        assert anomaly is not None

        def decide_and_record() -> Response:
            response = self._decide(anomaly, iteration)
            self._record(anomaly, response, losses, iteration=iteration, global_batch=global_batch)
            return response

        response: Response = _of_rank_0(decide_and_record)
        if response.action == "rollback":
            self.passed_over |= {global_batch}
        return response

    def _decide(self, anomaly: Anomaly, iteration: int) -> Response:
        faults, what = self.config.faults, anomaly.what
        action: Action = anomaly.action
        if action == "rollback":
            checkpoint = checkpoint_before(self._folder / "checkpoints", iteration - faults.rollback_steps)
            if checkpoint is not None:
                if list(self._rollbacks().values()).count(checkpoint.name) < faults.max_rollbacks:
                    return Response("rollback", what, checkpoint)
                often = f"as often as faults.max_rollbacks {faults.max_rollbacks} allows"
                return Response("stop", f"{what}, and the run has gone back to {checkpoint.name} {often}")
            what += f"; there is no checkpoint {faults.rollback_steps} steps old to go back to"
            action = "skip"
        if action == "skip" and not self._detector.may_skip():
            return Response("stop", f"{what}, after {faults.max_consecutive_skips} steps in a row that were skipped")
        return Response(action, what)

    def _rollbacks(self) -> dict[int, str]:
        """The checkpoint that each global batch led back to, in the whole run."""
        events = self._journal.events()
        return {event["global_batch"]: event["checkpoint"] for event in events if event["action"] == "rollback"}

    def _record(
        self, anomaly: Anomaly, response: Response, losses: LossStatistics, *, iteration: int, global_batch: int
    ) -> None:
        before = BatchSizes.of(self.config.training).sequences_before
        samples = self.data.keys(range(before(global_batch), before(global_batch + 1)))
        totals = zip(self.data.sources.names, losses.loss_sums, strict=False)
        suspects = [name for name, total in totals if not math.isfinite(total)]
        event: dict[str, Any] = {
            "iteration": iteration,
            "action": response.action,
            "what": response.what,
            "loss": anomaly.loss,
            "grad_norm": anomaly.grad_norm,
            "median_grad_norm": anomaly.median,
            "sources_not_finite": suspects,
            "checkpoint": response.checkpoint.name if response.checkpoint else None,
            "global_batch": global_batch,
            "samples": dict(sorted(samples.items(), key=lambda source: source[0] not in suspects)),
        }
        self.say(f" iteration {iteration}: {response.what}: {_in_words(response)}; its {_listed(event['samples'])}")
        try:
            self._journal.append(event)
            self.say(f" (all of them in {self._journal.path})")
        except OSError as error:
            self.say(f" {self._journal.path} cannot be written: {error}")


def _in_words(response: Response) -> str:
    match response:
        case Response("rollback", _, Path(name=name)):
            return f"going back to {name}, and over this batch"
        case Response("stop"):
            return "the run ends"
        case _:
            return "the update is skipped"


def _listed(samples: dict[str, list[str]]) -> str:
    every = chain.from_iterable((f"{name} {key}" for key in keys) for name, keys in samples.items())
    count = sum(map(len, samples.values()))
    return f"{count} samples: {', '.join(islice(every, _KEYS_SHOWN))}{', ..' if count > _KEYS_SHOWN else ''}"


def _of_rank_0(action: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank."""
    found = [action() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
