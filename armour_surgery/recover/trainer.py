"""The training loop: short, resumable to the step, the same for one process and for many.

    for step: set learning rate and random numbers -> forward and backward of each micro-batch -> step -> average

What a step does follows from its number, the weights, the optimizer's state and the data. A run that was killed goes on
from its checkpoint exactly as it would have gone on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import DataError, DivergedError, InterruptedRunError
from armour_surgery.images.sources import Pictures, Stream
from armour_surgery.recover import checkpoint
from armour_surgery.recover.distillation import Objective
from armour_surgery.recover.distributed import Process, no_sync, shard, wrapped
from armour_surgery.recover.divergence import cause_of_divergence
from armour_surgery.recover.loading import Batch, seeded, training_batches
from armour_surgery.recover.log import RunLog, draw_curves
from armour_surgery.recover.progress import Best, RunProgress
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.signals import noted_signals
from armour_surgery.recover.student import Runner, freeze_norms, freeze_rest, prepare
from armour_surgery.recover.teacher import Teacher
from armour_surgery.recover.timm_parts import average_of, clip_gradients, make_mixer, make_optimizer, make_scheduler
from armour_surgery.recover.workload import check_same_run, count_steps, identity, known_length, make_layout

__all__ = ["Judge", "Outcome", "Task", "Watch", "train"]

# What held-out images say about a runner, by name; more is better.
Judge = Callable[[nn.Module], Mapping[str, float]]
# Called now and then with what is known about the run: step, steps, loss, images_per_s.
Watch = Callable[[Mapping[str, Any]], None]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Task:
    """What a run works on: a student, its teacher, training images in a transform, and who judges it.

    `sites` are the names of converted attention modules, `mlps` of narrowed MLPs, `classes` the size of the head (0
    without one). `out` gets checkpoints and logs. The student is trained in place; the weights that are kept are in
    the outcome.
    """

    student: nn.Module
    recipe: Recipe
    data: Pictures | Stream
    transform: Callable[[Any], Tensor]
    judge: Judge
    out: Path
    teacher: Teacher | None = None
    sites: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    classes: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a run. `kept` says whose `weights` are kept: those at the `start`, of a step, or the `last`.

    `start` and `end` are what held-out images said about the weights at the start (but for random ones) and about
    those that were kept; `average` says that these are the moving average. `broken` counts how often each image that
    could not be read was passed over. `weights`, by the student's names, are the first process's to have.
    """

    steps: int
    epochs: int
    kept: str
    average: bool
    start: dict[str, float]
    end: dict[str, float]
    images: int
    seconds: float
    broken: dict[str, int]
    weights: dict[str, Tensor] = field(repr=False)


def train(task: Task, process: Process, *, resume: bool = False, watch: Watch | None = None) -> Outcome:
    """Run a recipe; see `Task` and `Outcome`. With `resume` go on from the checkpoint in `task.out`.

    Raises:
        UsageError: the recipe asks for what this model or data cannot do.
        DataError, TeacherError: images or teacher do not fit.
        ResumeError: there is no checkpoint to go on from, or it belongs to another run.
        DivergedError: the loss is no number any more; the message says at which step, and why as far as can be seen.
        InterruptedRunError: SIGTERM or Ctrl-C came; there is a checkpoint of the step before.
        TrainingError: a checkpoint could not be written.
    """
    run = _Run(task, process, resume, watch)
    try:
        return run.run()
    finally:
        run.release()


class _Run:
    """The state of one run: what a checkpoint holds, and what follows from the recipe."""

    def __init__(self, task: Task, process: Process, resume: bool, watch: Watch | None) -> None:
        recipe = task.recipe
        self.task, self.recipe, self.process, self.watch = task, recipe, process, watch
        self.layout = make_layout(recipe, process.rank, process.world)
        self.steps_per_epoch = count_steps(task.data, recipe)
        planned = recipe.schedule.epochs * self.steps_per_epoch
        self.end = min(planned, recipe.schedule.max_steps or planned)
        self.checkpoints = task.out / "checkpoints"
        self.step = 0
        self.progress = RunProgress()
        # The weights that held-out images judge best so far; they travel in the checkpoint, so that it is one piece.
        self.best: dict[str, Tensor] = {}
        # Losses stay on the device until somebody looks at them: asking for a number would wait for the GPU every step.
        self.losses: list[Tensor] = []
        self.epoch_losses: list[float] = []

        token = recipe.loss.logits_head == "token"
        prepare(task.student, token=token, grad_checkpointing=recipe.run.grad_checkpointing)
        freeze_rest(task.student, recipe.model.trainable, task.sites, task.mlps)
        self.runner = Runner(task.student, token).to(process.device)
        if recipe.run.channels_last:
            self.runner.to(memory_format=torch.channels_last)
        if task.teacher is not None:
            task.teacher.to(process.device)
        self._train_mode()
        self.average = average_of(self.runner, recipe.ema)
        self.sharded = recipe.run.parallel == "fsdp" and process.world > 1
        if self.sharded:
            shard(self.runner, task.sites, task.mlps)
            if self.average is not None:
                shard(self.average.module, task.sites, task.mlps)
        # After sharding, which puts other parameters into the modules.
        self.optimizer = make_optimizer(task.student, recipe.optimizer, recipe.effective_lr)
        self.set_rates = make_scheduler(self.optimizer, recipe.schedule, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=recipe.run.precision == "fp16")
        self.mixer = make_mixer(recipe.augment, recipe.loss, task.classes)
        if resume:
            self._resume()
        objective = Objective(self.runner, task.teacher, recipe.loss, task.sites, task.mlps)
        self.release = objective.release
        # In place and not by torch.compile(module), whose wrapper would put a prefix before every name.
        if recipe.run.compile:
            self.runner.compile()
        # FSDP sums gradients by hooks of its own.
        self.objective = objective if self.sharded else wrapped(objective, process, unused=not recipe.loss.labels)
        self.log = RunLog(task.out, self.step) if process.first else None

    def run(self) -> Outcome:
        """From the present step to the end."""
        recipe = self.recipe
        batches = training_batches(
            self.task.data,
            self.task.transform,
            self.layout,
            steps_per_epoch=self.steps_per_epoch,
            start=self.step,
            end=self.end,
            seed=recipe.seed,
            repeats=recipe.data.repeats,
            workers=recipe.data.workers,
            pin=self.process.device.type == "cuda",
        )
        # Random weights are as good as chance, which nobody has to measure.
        if self.step == 0 and (recipe.judge.keep == "best" or recipe.model.start == "weights"):
            self.progress.start = self._judged(self.runner)
            if recipe.judge.keep == "best":
                self._keep_if_best(self.progress.start, average=False)
        with noted_signals() as stop:
            began, logged = time.perf_counter(), self.step
            while self.step < self.end:
                self._one_step(batches)
                self.step += 1
                epoch_ends = self.step % self.steps_per_epoch == 0 or self.step == self.end
                cadence = recipe.run.checkpoint_every
                saves = epoch_ends or bool(cadence and self.step % cadence == 0)
                # Among several processes a signal waits for the next look, at which all of them hear of it.
                if self._looks() or saves or (stop and self.process.world == 1):
                    seconds = time.perf_counter() - began
                    self.progress.seconds += seconds
                    stopping = self._look(stop, (self.step - logged) * self.layout.batch / max(seconds, 1e-9))
                    began, logged = time.perf_counter(), self.step
                    if epoch_ends:
                        self._end_epoch()
                    if saves or stopping:
                        self._save()
                    if stopping and self.step < self.end:
                        raise InterruptedRunError(
                            f"stopped by {stop[0] if stop else 'a signal'} after step {self.step} of {self.end}; the "
                            f"checkpoint is in {self.checkpoints}, go on with --resume"
                        )
        return self._finish()

    def _one_step(self, batches: Iterator[Batch]) -> None:
        recipe, layout, device = self.recipe, self.layout, self.process.device
        self.set_rates(self.step)
        total = torch.zeros((), device=device)
        for part in range(layout.accumulate):
            batch = next(batches)
            for name in batch.broken:
                self.progress.broken[name] = self.progress.broken.get(name, 0) + 1
            last = part == layout.accumulate - 1
            with seeded(recipe.seed, self.step, self.process.rank, part), no_sync(self.objective, self.runner, last):
                if device.type == "cuda":
                    # A GPU draws from its own generator, which `seeded` leaves alone.
                    torch.cuda.manual_seed(torch.initial_seed())
                self.images, targets = self._on_device(batch)
                with torch.autocast(device.type, _DTYPES[recipe.run.precision], recipe.run.precision != "fp32"):
                    loss = self.objective(self.images, targets)["loss"] / layout.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.losses.append(total)
        # Where a look costs nothing, it comes before the weights take such a step.
        if device.type == "cpu" and self.process.world == 1 and not math.isfinite(float(total)):
            raise DivergedError(self._cause(self.step + 1))
        # The limit for clipping is meant for true gradients. In other precisions than fp16 the scaler does nothing.
        self.scaler.unscale_(self.optimizer)
        clip_gradients([weight for weight in self.runner.parameters() if weight.grad is not None], recipe.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.runner, self.step + 1 if recipe.ema.warmup else None)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.process.device, non_blocking=True)
        labels = batch.labels.to(self.process.device, non_blocking=True)
        if self.recipe.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        low, high = int(batch.labels.min()), int(batch.labels.max())
        if self.recipe.labelled and not 0 <= low <= high < self.task.classes:
            raise DataError(
                f"labels run from {low} to {high}, and the model's head has {self.task.classes} classes; name other "
                "data, or set loss.labels=0 where there are no labels"
            )
        if self.mixer is None:
            return images, labels
        # Without labels in the loss (-1) the mixed targets are not read, but the mixer has to be able to make them.
        mixed: tuple[Tensor, Tensor] = self.mixer(images, labels.clamp(min=0))
        return mixed

    def _train_mode(self) -> None:
        self.runner.train()
        if self.recipe.model.freeze_norm:
            freeze_norms(self.runner)

    def _looks(self) -> bool:
        """Whether losses are looked at after this step: always on one CPU, where it costs nothing."""
        alone = self.process.world == 1 and self.process.device.type == "cpu"
        return alone or self.step % self.recipe.run.log_every == 0

    def _look(self, stop: list[str], images_per_s: float) -> bool:
        """Log the losses since the last time, check them, and tell whether a signal came to any process."""
        losses = torch.stack(self.losses).float().tolist()
        first = self.step - len(losses) + 1
        self.losses.clear()
        # The signal travels with the losses, so that all processes stop after the same step.
        *summed, stopping = self.process.sum([*losses, float(bool(stop))])
        means = [value / self.process.world for value in summed]
        for step, value in enumerate(means, first):
            if not math.isfinite(value):
                raise DivergedError(self._cause(step))
        lr = self._lr()
        self.epoch_losses += means
        if self.log is not None:
            for step, value in enumerate(means, first):
                if step % self.recipe.run.log_every == 0 or step in (1, self.end):
                    self.log.step({"step": step, "loss": value, "lr": lr, "images_per_s": round(images_per_s, 1)})
        if self.watch is not None and self.process.first:
            self.watch(
                {"step": self.step, "steps": self.end, "loss": means[-1], "lr": lr, "images_per_s": images_per_s}
            )
        return stopping > 0

    def _cause(self, step: int) -> str:
        """What made the loss of this step something other than a number."""
        return cause_of_divergence(
            self.task.student,
            self.images,
            step=step,
            epoch=(step - 1) // self.steps_per_epoch + 1,
            lr=self._lr(),
            precision=self.recipe.run.precision,
        )

    def _lr(self) -> float:
        """The recipe's rate at this step: with layer decay, that of the last layers."""
        lr: float = max(group["lr"] for group in self.optimizer.param_groups)
        return lr

    def _judged(self, runner: nn.Module) -> dict[str, float]:
        # Each process has seen other images, and all have to judge the same model.
        self.process.average_norms(runner)
        scores = dict(self.task.judge(runner))
        self._train_mode()
        return scores

    def _end_epoch(self) -> None:
        """The row of an epoch: its loss, and what held-out images say, where this epoch is judged."""
        recipe, epoch = self.recipe, math.ceil(self.step / self.steps_per_epoch)
        losses = self.epoch_losses
        self.epoch_losses = []
        row: dict[str, Any] = {"epoch": epoch, "step": self.step, "loss": sum(losses) / len(losses)}
        row["lr"] = self._lr()
        if epoch % recipe.judge.every == 0 or self.step == self.end:
            scores = self._judged(self.runner)
            row |= scores
            self.progress.last = scores
            if recipe.judge.keep == "best":
                self._keep_if_best(scores, average=False)
            if self.average is not None:
                scores = self._judged(self.average.module)
                row |= {f"ema_{name}": value for name, value in scores.items()}
                if recipe.judge.keep == "best":
                    self._keep_if_best(scores, average=True)
        if self.log is not None:
            self.log.epoch(row)
        if self.watch is not None and self.process.first:
            self.watch({"epoch": epoch, "epochs": recipe.schedule.epochs, **row, "steps": self.end})

    def _keep_if_best(self, scores: Mapping[str, float], *, average: bool) -> None:
        score, best = scores.get(self.recipe.metric, -math.inf), self.progress.best
        # Of equals the earlier: training on for nothing is no gain.
        if best is not None and score <= best.score:
            return
        self.progress.best = Best(score, self.step, average, dict(scores))
        self.best = self._weights(self.average.module if average else self.runner, "best")

    def _weights(self, runner: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Whole weights in the first process; the others only help to put shards together."""
        weights = checkpoint.weights_of(runner, prefix) if self.process.first or self.sharded else {}
        return weights if self.process.first else {}

    def _save(self) -> None:
        tensors = {**self.best, **self._weights(self.runner, "model")}
        if self.average is not None:
            tensors |= self._weights(self.average.module, "ema")
        if self.process.first or self.sharded:
            tensors |= checkpoint.optimizer_tensors(self.optimizer)
        progress = {
            "step": self.step,
            "epoch_losses": self.epoch_losses,
            "optimizer": checkpoint.optimizer_numbers(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "run": identity(self.recipe),
            "images": known_length(self.task.data),
            **self.progress.to_dict(),
        }
        if self.process.first:
            checkpoint.write(self.checkpoints / checkpoint.LAST, tensors, progress)
        self.process.wait()

    def _resume(self) -> None:
        path = self.checkpoints / checkpoint.LAST
        saved = checkpoint.read(path)
        progress = saved.progress
        check_same_run(progress["run"], progress["images"], self.recipe, self.task.data, path)
        checkpoint.fill(self.runner, saved.part("model"), path)
        if self.average is not None:
            checkpoint.fill(self.average.module, saved.part("ema"), path)
        checkpoint.fill_optimizer(self.optimizer, saved.part("optimizer"), progress["optimizer"])
        if progress["scaler"]:
            self.scaler.load_state_dict(progress["scaler"])
        self.step = progress["step"]
        self.epoch_losses = progress["epoch_losses"]
        self.progress = RunProgress.from_dict(progress)
        self.best = {f"best.{name}": value for name, value in saved.part("best").items()}

    def _finish(self) -> Outcome:
        """Give the student the weights that are kept, draw the curves, and say what came of it."""
        progress, best = self.progress, self.progress.best
        if best is not None:
            weights, end, average = self.best, best.found, best.average
            kept = "start" if best.step == 0 else f"step {best.step}"
        else:
            weights, end, average, kept = self._weights(self.runner, "last"), progress.last, False, "last"
        if self.process.first and self.log is not None:
            self.log.close()
            draw_curves(self.task.out, self.log.epochs, progress.start)
        return Outcome(
            self.step,
            math.ceil(self.step / self.steps_per_epoch),
            kept,
            average,
            progress.start,
            end,
            self.step * self.layout.batch,
            progress.seconds,
            self.process.union(progress.broken),
            # Named as "best.model.blocks.0...": the checkpoint's prefix, and the runner's.
            {name.partition(".model.")[2]: value for name, value in weights.items()},
        )
