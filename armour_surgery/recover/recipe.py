"""Recipes: everything that a training run depends on, in a strict schema.

A key that does not exist, a value of another type and a combination that cannot work are refused before anything is
loaded. `recipe_files.py` reads and writes them.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AugmentPart",
    "DataPart",
    "EmaPart",
    "JudgePart",
    "LossPart",
    "ModelPart",
    "OptimizerPart",
    "Recipe",
    "RunPart",
    "SchedulePart",
    "known_keys",
]

# DeiT's rule: the learning rate in a recipe is for 512 images a step.
LR_BATCH = 512


class _Part(BaseModel):
    # Strict: the word "0.1" is no number, and a misspelled key is no key that can be left out.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelPart(_Part):
    """What is trained. `mode` and `init` convert MODEL first, unless it is converted already.

    `start: scratch` takes random weights, and `args` for the builder of a timm model. `trainable: converted` leaves
    everything as it is but converted attentions and narrowed MLPs, `attention` these MLPs too.
    """

    start: Literal["weights", "scratch"] = "weights"
    args: dict[str, Any] = {}
    mode: str | None = None
    init: str = "wq"
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    trainable: Literal["all", "converted", "attention"] = "all"
    freeze_norm: bool = False


class DataPart(_Part):
    """Which images, in which batches.

    `batch_size` is global: over all processes and accumulated steps. `micro_batch` is what one process holds at once.
    `holdout` is the number of training images (from 1) or their share (below 1) that are kept out to judge by; 0 judges
    on the validation images. `images_per_epoch` makes an epoch of that many images, whatever the data has.
    """

    source: str | None = None
    batch_size: int = Field(default=128, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)
    images_per_epoch: int | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0)
    repeats: int = Field(default=1, ge=1)
    train_split: str | None = None
    val_split: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = None


class AugmentPart(_Part):
    """What happens to training images."""

    crop: Literal["random-resized", "pad", "none"] = "random-resized"
    scale: list[float] = Field(default=[0.08, 1.0], min_length=2, max_length=2)
    ratio: list[float] = Field(default=[0.75, 4 / 3], min_length=2, max_length=2)
    padding: int = Field(default=4, ge=0)
    hflip: float = Field(default=0.5, ge=0, le=1)
    auto: str | None = None
    color_jitter: float = Field(default=0.0, ge=0)
    erase: float = Field(default=0.0, ge=0, le=1)
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mix_prob: float = Field(default=1.0, ge=0, le=1)
    mix_switch: float = Field(default=0.5, ge=0, le=1)


class LossPart(_Part):
    """A weighted sum. A weight of 0 leaves a term out, and with `labels` 0 no labels are needed.

    `labels` weighs the cross-entropy with the labels. `logits` weighs what the student's head (`main`, or the
    distillation `token`'s) learns from the teacher's logits: its first choice (`hard`) or all of them (`soft`, at a
    `temperature`, summed and divided by images times classes as `deit` does or by images, `batchmean`). `features`,
    `attention` and `blocks` weigh relative squared distances to the teacher's final features, to the outputs of what
    was converted (attentions and MLPs), and to block outputs. With `local` no gradient leaves a block by its input:
    each learns, token by token, to give what the teacher's gives from what it gets, which allows rates a hundred times
    larger than end to end.
    """

    labels: float = Field(default=1.0, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    logits: float = Field(default=0.0, ge=0)
    logits_kind: Literal["hard", "soft"] = "soft"
    logits_head: Literal["main", "token"] = "main"
    temperature: float = Field(default=1.0, gt=0)
    reduction: Literal["deit", "batchmean"] = "batchmean"
    features: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)
    blocks: float = Field(default=0.0, ge=0)
    local: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at a teacher."""
        return bool(self.logits or self.features or self.attention or self.blocks)


class OptimizerPart(_Part):
    """One of timm's optimizers. With `lr_rule: deit` the rate is for 512 images a step and grows with the batch."""

    name: str = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    lr_rule: Literal["deit", "none"] = "none"
    weight_decay: float = Field(default=0.05, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"


class SchedulePart(_Part):
    """One of timm's schedules, stepped once an epoch (as DeiT does) or at every update.

    `warmup_lr` and `min_lr` are not scaled with the batch. `max_steps` ends a run early, on the same schedule.
    """

    name: Literal["cosine", "constant", "poly", "tanh"] = "cosine"
    epochs: int = Field(default=1, ge=1)
    per: Literal["epoch", "update"] = "update"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=1e-5, ge=0)
    max_steps: int | None = Field(default=None, ge=1)


class EmaPart(_Part):
    """A moving average of the weights, evaluated beside them. No `decay`, no average."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    warmup: bool = False


class JudgePart(_Part):
    """When the model is evaluated, in epochs, and which weights are the result.

    `best` keeps those that held-out images judge best, the ones that training started from among them.
    """

    every: int = Field(default=1, ge=1)
    keep: Literal["last", "best"] = "last"
    metric: Literal["auto", "top1", "cosine", "agreement"] = "auto"
    images: int | None = Field(default=None, ge=1)


class RunPart(_Part):
    """How it is computed. `checkpoint_every` counts steps; there is always a checkpoint after an epoch."""

    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)


class Recipe(_Part):
    """A whole run. `teacher` is a MODEL; without one it is the model that the student was converted from."""

    description: str = ""
    written_for: str = ""
    seed: int = Field(default=0, ge=0)
    teacher: str | None = None
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    augment: AugmentPart = AugmentPart()
    loss: LossPart = LossPart()
    optimizer: OptimizerPart = OptimizerPart()
    schedule: SchedulePart = SchedulePart()
    ema: EmaPart = EmaPart()
    judge: JudgePart = JudgePart()
    run: RunPart = RunPart()

    @property
    def effective_lr(self) -> float:
        """The peak learning rate: `lr * batch_size / 512` under DeiT's rule, else `lr`."""
        scale = self.data.batch_size / LR_BATCH if self.optimizer.lr_rule == "deit" else 1.0
        return self.optimizer.lr * scale

    @property
    def labelled(self) -> bool:
        """Whether training reads labels."""
        return self.loss.labels > 0

    @property
    def metric(self) -> str:
        """What held-out images are judged by: top-1 with labels, the cosine of features without."""
        if self.judge.metric != "auto":
            return self.judge.metric
        return "top1" if self.labelled else "cosine"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """Refuse what cannot work together; the text says what to change. Of several problems the first is told."""
        self._check_terms()
        self._check_lengths()
        self._check_what_terms_read()
        self._check_model()
        self._check_teacher()
        self._check_scale()
        return self

    def _check_terms(self) -> None:
        loss = self.loss
        if not (loss.labels or loss.needs_teacher):
            raise ValueError(
                "loss: every weight is 0, so there is nothing to learn from; set loss.labels=1, or loss.features=1 for "
                "images without labels"
            )
        if loss.local and not loss.blocks:
            raise ValueError(
                "loss.local=true is about loss.blocks, and that is 0; set loss.blocks=1, or loss.local=false"
            )

    def _check_lengths(self) -> None:
        data, schedule = self.data, self.schedule
        if data.micro_batch and data.batch_size % data.micro_batch:
            raise ValueError(
                f"data.batch_size={data.batch_size} is not a multiple of data.micro_batch={data.micro_batch}; "
                "change one"
            )
        if schedule.warmup_epochs > schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={schedule.warmup_epochs:g} is longer than schedule.epochs={schedule.epochs}; "
                "shorten the warm-up"
            )

    def _check_what_terms_read(self) -> None:
        """Labels and teacher outputs have to be there for whatever trains or judges by them."""
        loss, metric = self.loss, self.judge.metric
        if loss.logits_head == "token" and not loss.logits:
            raise ValueError(
                "loss.logits_head=token with loss.logits=0: the distillation token would learn nothing; set "
                "loss.logits=0.5, or loss.logits_head=main"
            )
        if loss.smoothing and not loss.labels:
            raise ValueError("loss.smoothing needs labels; set loss.labels, or loss.smoothing=0")
        if metric == "top1" and not loss.labels:
            raise ValueError("judge.metric=top1 needs labels; set loss.labels, or judge.metric=cosine")
        if metric in ("cosine", "agreement") and not loss.needs_teacher:
            raise ValueError(
                f"judge.metric={metric} compares with a teacher, and no weight in loss asks for one; set "
                "judge.metric=top1"
            )

    def _check_model(self) -> None:
        model = self.model
        if model.init != "wq" and model.mode is None:
            raise ValueError("model.init without model.mode: there is nothing to convert; set model.mode=auto")
        if model.args and model.start != "scratch":
            raise ValueError("model.args builds a model anew, so it has no weights; set model.start=scratch")
        if model.start == "scratch" and model.trainable != "all":
            raise ValueError(
                f"model.start=scratch with model.trainable={model.trainable} leaves random weights as they are; set "
                "model.trainable=all"
            )

    def _check_teacher(self) -> None:
        loss = self.loss
        if self.teacher and not loss.needs_teacher:
            raise ValueError(
                "teacher is named, and no weight in loss asks for one; set loss.logits=0.5, or remove teacher"
            )
        if self.run.grad_checkpointing and (loss.attention or loss.blocks):
            raise ValueError(
                "run.grad_checkpointing computes blocks twice, and loss.attention or loss.blocks would compare the "
                "second time; set loss.attention=0 and loss.blocks=0, or leave it out"
            )

    def _check_scale(self) -> None:
        smallest, largest = self.augment.scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"augment.scale={self.augment.scale} must rise from above 0 to at most 1")


def known_keys() -> list[str]:
    """Every key there is, as `--set` names it."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, _Part):
            keys += [f"{name}.{key}" for key in part.model_fields]
        else:
            keys.append(name)
    return keys
