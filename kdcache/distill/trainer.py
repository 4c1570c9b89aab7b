"""The loop that teacher and student share: optimiser, schedule, precision, averaging, checkpoints, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core import rng
from kdcache.core.config import TrainConfig
from kdcache.core.errors import KdcacheError, ModelError, TrainingDiverged
from kdcache.core.json_records import counted
from kdcache.core.plugins import describe
from kdcache.core.progress import Progress, log
from kdcache.core.run_dir import RunFolder
from kdcache.data.batch import Batch
from kdcache.data.batch_sampler import RankBatches, cut_batch
from kdcache.data.loader import batch_loader
from kdcache.distill.objective import Objective, objective_parameters
from kdcache.distill.optim import AveragedWeights, build_optimizer, learning_rate_factor
from kdcache.distill.run_state import Description, RunState, Stateful
from kdcache.distill.step_records import StepRecords
from kdcache.distill.training_data import TrainingData, keep_inputs
from kdcache.distill.training_step import TrainingStep, count_hits
from kdcache.models.device import (
    evaluation_mode,
    floating_dtype,
    memory_errors,
    move_to,
    resolve_device,
    seeded,
    synchronize,
)
from kdcache.models.distributed import Processes, accumulating, is_lost, lost_processes, synchronized_batchnorm
from kdcache.models.evaluators import chosen_metric, evaluator_of
from kdcache.models.forward import ForwardPass
from kdcache.models.loading import auto_workers

# Metrics that need a teacher, and no labels.
TEACHER_METRICS = ("agreement", "cosine", "retrieval")
# Below this scale of the loss no float16 gradient overflows because of the scale: it is the network that is not finite.
SMALLEST_SCALE = 2.0**-24

# Called with the number of a step, from 0, and the objective's scalars.
OnStep = Callable[[int, dict[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run left.

    Attributes:
        module: The trained network, with averaged weights where asked, on the device.
        epochs: Metrics of each epoch, as in `metrics.jsonl`.
    """

    module: nn.Module
    epochs: list[dict[str, Any]]

    @property
    def epoch_seconds(self) -> list[float]:
        """Seconds of training in each epoch, evaluation and checkpoints aside."""
        return [entry["seconds"] for entry in self.epochs]


def train(
    module: nn.Module,
    data: TrainingData,
    *,
    objective: Objective,
    config: TrainConfig,
    run: RunFolder | None = None,
    description: dict[str, Any] | Description | None = None,
    on_step: OnStep | None = None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train a network in place.

    Args:
        run: Folder for metrics and checkpoints, which may hold a state to continue from; None keeps nothing.
        description: Plain values put into every checkpoint, so that it can be rebuilt and evaluated alone, and compared
            when a run is resumed; or a function that gives those of a run of so many epochs.
        on_step: Called after each step with its number, from 0, and the objective's scalars of this process's part.
        processes: Processes that train it together, each with its part of every batch; None for this one alone. Only
            the first one may have a `run`.

    Raises:
        TrainingDiverged: a loss or, under fp16, a gradient is not finite; the checkpoints of finished epochs stay.
        ModelError: the network raises an exception of its own in a step.
        CacheBusy: another process trains into the run's folder.
    """
    data.views.probe()
    keep_inputs(data, config)

    def described(epochs: int) -> dict[str, Any]:
        values = description(epochs) if callable(description) else description
        return {**(values or {}), "samples": data.record}

    state = RunState(run, described, config)
    return _Loop(module, data, objective, config, state, on_step, processes or Processes()).run()


class _Loop:
    def __init__(
        self,
        module: nn.Module,
        data: TrainingData,
        objective: Objective,
        config: TrainConfig,
        state: RunState,
        on_step: OnStep | None,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.data, self.objective, self.config, self.state, self.on_step = data, objective, config, state, on_step
        self.device = resolve_device(config.device)
        if config.sync_batchnorm:
            module = synchronized_batchnorm(module, self.device, processes)
        self.module = move_to(module, self.device)
        self.memory_format = torch.channels_last if config.memory_format == "channels-last" else None
        if self.memory_format is not None:
            module.to(memory_format=self.memory_format)
        self.dtype = floating_dtype(module)
        self.batches = data.batches(config.batch_size)
        # Batch normalisation needs two samples at once, unless it is synchronised or the whole batch is smaller.
        roomy = config.batch_size >= 2 * processes.size * config.grad_accumulation and not config.sync_batchnorm
        self.minimum = 2 if roomy else 1
        parts = RankBatches(self.batches, processes.rank, processes.size, minimum=self.minimum)
        self.loader = batch_loader(
            data.views,
            self.batches if processes.alone else parts,
            preprocessor=data.preprocessor,
            workers=self._workers(),
            device=self.device,
            join=data.join,
            merge=data.views_per_sample > 1,
        )
        self.parameters = [*module.parameters(), *objective_parameters(objective)]
        self.optimizer = build_optimizer(self.parameters, config)
        # The schedule must not hold the loop: in a cycle of references the workers of the loader would outlive the run.
        steps = len(self.batches)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step, steps)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.scale = self.scaler.get_scale()
        with memory_errors(config.batch_size, "leave out --ema, or take a smaller model"):
            self.average = AveragedWeights(module, config.ema) if config.ema else None
        self.step = processes.wrap(TrainingStep(module, objective, self.device, config))
        self.learning_rate = 0.0
        self.metric = ""
        if len(data.validation_indices):
            self.metric = chosen_metric(data.views.dataset, config.metric, taught=data.teacher is not None)

    def _workers(self) -> int:
        """Worker processes that load samples."""
        data, config = self.data, self.config
        if config.workers is not None:
            return config.workers
        classes = len(data.views.dataset.classes)
        network = ForwardPass(self.module, data.preprocessor, self.device, classes=classes, amp=config.amp)
        samples = len(self.batches) * config.batch_size // self.processes.size
        return auto_workers(network, data.views, samples, passes=3)

    @property
    def result_module(self) -> nn.Module:
        return self.average.module if self.average is not None else self.module

    @property
    def parts(self) -> dict[str, Stateful | None]:
        """All that an epoch starts from, by its name in a checkpoint."""
        return {
            "state_dict": self.module,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
            "objective": self.objective if isinstance(self.objective, nn.Module) else None,
            "average": self.average,
        }

    def run(self) -> TrainResult:
        with self.state.locked(), lost_processes(self.processes):
            if self.state.restore(self.parts, self.processes):
                self._after_restore()
            epochs, history = self.config.epochs, self.state.history
            if len(history) < epochs:
                self._start(len(history))  # what cannot be joined is known before anything is written
            self.state.begin()
            for epoch in range(len(history), epochs):
                if self._is_out_of_patience():
                    break
                # Each process draws its own dropout; the first one draws what a process alone does.
                own = (self.processes.rank,) if self.processes.rank else ()
                with seeded(rng.generator_seed(self.config.seed, "epoch", epoch, *own), self.device):
                    entry = self._epoch(epoch)
                improved = self._validate(entry, last=epoch + 1 == epochs)
                self.state.add(entry, improved=improved, result=self.result_module, parts=self.parts)
                # A teacher that augments counts views only to draw anew in each epoch.
                log(_line(entry, epochs, hidden=() if self.data.join else ("view",)))
        return TrainResult(module=self.result_module, epochs=self.state.history)

    def _after_restore(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            # The state holds the rate of the next step as of the old number of epochs.
            group["lr"] = rate * learning_rate_factor(self.config, self.schedule.last_epoch, len(self.batches))
        self.scale = self.scaler.get_scale()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        self._start(epoch)
        self.module.train()
        correct = torch.zeros((), device=self.device)
        first_step = epoch * len(self.batches)
        with (
            memory_errors(self.config.batch_size),
            Progress(f"epoch {epoch + 1}/{self.config.epochs}", len(self.batches), "steps") as progress,
        ):
            synchronize(self.device)
            records = StepRecords(self.config, epoch, len(self.batches), self.processes, self.state, progress)
            for step, batch in enumerate(self.loader):
                hits, parts = self._train_on(batch, epoch, step)
                correct += hits
                if self.on_step is not None:
                    self.on_step(first_step + step, parts)
                records.add(batch, parts, self.learning_rate)
            synchronize(self.device)
            seconds = records.seconds
        self.processes.add_up(correct)
        # Buffers, such as the statistics of batch normalisation, are those of the first process.
        self.processes.synchronize(chain(self.module.buffers(), self.result_module.buffers()))
        return {
            "epoch": epoch + 1,
            **({} if self.data.views.recipe.is_plain(1) else {"view": self.batches.view}),
            **records.means(),
            **({"train_accuracy": float(correct) / records.labelled} if records.labelled else {}),
            "learning_rate": self.learning_rate,
            "seconds": seconds,
        }

    def _start(self, epoch: int) -> None:
        if epoch == self.batches.epoch:
            return
        self.batches.epoch = epoch
        if self.data.join is not None:
            self.data.join.start_epoch(epoch)

    def _train_on(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; returns how many samples of the batch were right, and the objective's scalars."""
        batch = batch.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        hits = torch.zeros((), device=self.device)
        means: dict[str, Tensor] = {}
        parts = self._split(batch)
        for at, part in enumerate(parts):
            with accumulating(self.step) if at + 1 < len(parts) else contextlib.nullcontext():
                logits, values = self._backward(part, epoch, step)
            hits += count_hits(logits, part)
            weight = part.counted / batch.counted if batch.counted else 1.0
            for name, value in values.items():
                means[name] = means[name] + weight * value.detach() if at else weight * value.detach()
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        if self._has_stepped(epoch, step):
            self.schedule.step()
            if self.average is not None:
                self.average.update(self.module)
        return hits, means

    def _split(self, batch: Batch) -> list[Batch]:
        """The parts of a batch that are computed one after the other."""
        count = self.config.grad_accumulation
        if count == 1:
            return [batch]
        cuts = [cut_batch(len(batch.labels), at, count, minimum=self.minimum) for at in range(count)]
        return [batch.part(start, stop) for start, stop in cuts if start < stop]

    def _backward(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of a batch, or of a part of one; returns the logits and the objective's scalars."""
        inputs = self.data.preprocessor.per_batch(batch.inputs, self.dtype)
        if self.memory_format is not None and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self.memory_format)
        # Without samples of its own a process only takes part: the statistics of batch normalisation stay as they are.
        idle = not batch.counted and not self.config.sync_batchnorm
        try:
            with evaluation_mode(self.module, gradients=True) if idle else contextlib.nullcontext():
                logits, parts = self.step(inputs, batch, epoch + step / len(self.batches))
            # Gradients are averaged over the processes, and their parts of the batch may differ in size.
            share = batch.counted * self.processes.size / batch.whole_size
            self.scaler.scale(parts["loss"] * share if share != 1 else parts["loss"]).backward()
        except (KdcacheError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # the network is code of the user's: it may raise anything
            if not self.processes.alone and is_lost(problem):
                raise
            raise self._model_error(problem, inputs, epoch, step) from problem
        return logits, parts

    def _has_stepped(self, epoch: int, step: int) -> bool:
        """Update the loss scale of fp16; False where the scaler left out the step, because a gradient overflowed.

        Reading the scale waits for the device, which only fp16 does.
        """
        if not self.scaler.is_enabled():
            return True
        before = self.scale
        self.scaler.update()
        self.scale = self.scaler.get_scale()  # falls after a step that was left out, and only then
        if self.scale < SMALLEST_SCALE:
            raise TrainingDiverged(
                f"the gradient is not finite at epoch {epoch + 1}, step {step + 1} of {len(self.batches)}, however "
                f"small the loss is scaled for fp16: the scale has fallen to {self.scale:g}",
                "a finite gradient",
                "try --amp bf16 or off, or a lower --learning-rate; finished epochs are kept",
            )
        return self.scale >= before

    def _model_error(self, problem: Exception, inputs: Tensor, epoch: int, step: int) -> ModelError:
        alone = len(inputs) == 1
        return ModelError(
            f"{type(self.module).__name__} fails at epoch {epoch + 1}, step {step + 1} of {len(self.batches)}, on a "
            f"batch of shape {tuple(inputs.shape)}: {describe(problem)}",
            "a network that trains on batches of two and more, or on this one" if alone else "a network that trains",
            ("give a --batch-size of 2 or more, which BatchNorm needs; or " if alone else "")
            + "correct the network; --debug shows the whole traceback",
        )

    def _validate(self, entry: dict[str, Any], *, last: bool) -> bool:
        """Whether this epoch's weights are the best so far; without a validation part the last epoch's are."""
        if not len(self.data.validation_indices):
            return last
        dataset = self.data.views.dataset
        found = evaluator_of(dataset)(
            self.result_module,
            dataset,
            preprocess=self.data.preprocessor,
            config=self.config,
            indices=self.data.validation_indices,
            teacher=self.data.teacher if self.metric in TEACHER_METRICS else None,
            processes=self.processes,
        )
        entry |= {f"val_{name}": score for name, score in found.scores.items()}
        score = self._score(entry)
        improved = score > self.state.best
        self.state.best = max(self.state.best, score)
        return improved

    def _score(self, entry: dict[str, Any]) -> float:
        """What an epoch has of the validation metric, larger being better."""
        score = float(entry[f"val_{self.metric}"])
        return -score if self.metric == "nll" else score

    def _is_out_of_patience(self) -> bool:
        history, patience = self.state.history, self.config.patience
        if patience is None or not history or not len(self.data.validation_indices):
            return False
        scores = [self._score(entry) for entry in history]
        waited = len(scores) - 1 - scores.index(max(scores))
        if waited >= patience:
            log(
                f"stopped after epoch {len(scores)} of {self.config.epochs}: {counted(waited, 'epoch')} without a "
                f"better validation {self.metric} (--patience {patience})"
            )
        return waited >= patience


def _line(entry: dict[str, Any], epochs: int, hidden: tuple[str, ...]) -> str:
    scalars = [f"{name} {value:.4g}" for name, value in entry.items() if name not in ("epoch", "seconds", *hidden)]
    return f"epoch {entry['epoch']}/{epochs}: {', '.join(scalars)}, {entry['seconds']:.2f} s"
