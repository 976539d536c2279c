"""The recipe of a training run: one section a concern. Imports no torch.

Field descriptions are the help text (`sterna train --settings`) and the docs table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sterna.data.config import DataConfig
from sterna.parallel.config import ParallelConfig
from sterna.train.adapter_config import AdapterConfig
from sterna.train.distill.config import DistillSection
from sterna.train.longseq.config import LongseqSection
from sterna.train.offload.config import OffloadSection

Kind = Literal["sft", "pretrain", "distill", "reward", "dpo", "kto"]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which weights are trained."""

    path: str = Field(
        default="",
        description="folder, .gguf file or hub name to continue from; empty = default model",
    )
    config: Path | None = Field(
        default=None, description="config.json of a model to make from scratch; excludes path"
    )
    tokenizer: str = Field(
        default="", description="folder or .gguf with the tokenizer; empty = the model's"
    )
    backend: Literal["auto", "native", "hf"] = Field(
        default="auto",
        description="native decoder, transformers' own model, or native where it is known",
    )
    weights: str = Field(
        default="auto",
        description="of an adapter's frozen base: as stored, bf16, or rounded at load to fp6, "
        "int4-g32, ... (`sterna quantize`)",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="weights and activations; bfloat16 keeps float32 master weights",
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N"
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        description="noise on the embeddings (arXiv 2310.05914); 5 is usual, 0 = none",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.path and self.config is not None:
            raise ValueError("model.path and model.config are both set; give one of them")
        return self


class OptimSection(Section):
    """AdamW (arXiv 1711.05101) and what it keeps."""

    lr: float = Field(default=2e-5, gt=0, description="peak learning rate")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled; norms and biases have none"
    )
    grad_clip: float = Field(
        default=1.0, ge=0, description="largest global gradient norm; 0 = no limit"
    )
    states: Literal["float32", "bfloat16", "8bit"] = Field(
        default="float32", description="how moments are kept: 8, 4 or about 2 bytes a weight"
    )
    master: bool = Field(
        default=True,
        description="float32 master of bfloat16 weights; false = stochastic rounding, 4 bytes "
        "a weight less",
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="average of the weights, used by eval and export; 0 = none",
    )


class LossSection(Section):
    """What is added to the cross entropy in training; evals are without."""

    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the target's weight spread over all tokens (arXiv 1512.00567)",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="times log-sum-exp of the logits squared (arXiv 2204.02311); 1e-4 is usual",
    )


class ScheduleSection(Section):
    """The learning rate over the steps."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="wsd = warm up, stay, decay at the end (arXiv 2404.06395)"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps from 0 to the peak")
    decay_steps: int | None = Field(
        default=None, gt=0, description="wsd: steps of the final decay; None = a tenth of all"
    )
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="final share of the peak")
    total_steps: int | None = Field(
        default=None, gt=0, description="horizon of the schedule; None = run.steps"
    )


class RunSection(Section):
    """How long, how much at a time, and where to."""

    output: Path = Field(default=Path("runs/train"), description="folder of the run")
    steps: int = Field(default=100, gt=0, description="optimizer steps")
    rows_per_step: int = Field(
        default=8, gt=0, description="packed rows of one step, over all ranks"
    )
    micro_rows: int = Field(
        default=1, gt=0, description="rows a rank runs at once; the rest accumulates"
    )
    seed: int = Field(default=0, ge=0, description="of weights, data order and noise")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 = all usable CPUs")


class CheckpointSection(Section):
    """When the run is saved and what is kept."""

    every: int = Field(
        default=100, ge=0, description="steps between checkpoints; 0 = only at the end"
    )
    keep_last: int = Field(default=2, gt=0, description="newest checkpoints kept")
    keep_best: bool = Field(default=True, description="also keep that of the lowest eval loss")
    is_async: bool = Field(
        default=True,
        description="write in the background from a copy in memory (needs that memory)",
    )


class LogSection(Section):
    """What is written while it runs."""

    every: int = Field(default=1, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool | None = Field(
        default=None, description="write TensorBoard events; unset = if it is installed"
    )
    mlflow: bool = Field(default=False, description="log to MLflow")
    wandb: bool = Field(default=False, description="log to Weights & Biases")
    project: str = Field(default="sterna", description="MLflow experiment or W&B project")
    peak_tflops: float = Field(
        default=0.0, ge=0, description="of the device, for MFU; 0 = measured by a short matmul"
    )
    report: bool = Field(default=True, description="write report.html at the end")
    sample_prompts: tuple[str, ...] = Field(
        default=(), description="prompts answered in the report"
    )
    sample_tokens: int = Field(default=64, gt=0, description="longest answer in the report")


class EvalSection(Section):
    """Loss on text the run does not train on."""

    every: int = Field(default=0, ge=0, description="steps between evals; 0 = only at the end")
    data: DataConfig | None = Field(
        default=None,
        description="files of their own; None = what data.held_out keeps out of training",
    )
    max_rows: int = Field(default=64, gt=0, description="packed rows of one eval")
    patience: int = Field(
        default=0, ge=0, description="evals without a better loss before it stops; 0 = go on"
    )
    min_delta: float = Field(default=0.0, ge=0, description="how much lower counts as better")


class Recipe(Section):
    """Everything a run is made of; `sterna train` reads it from TOML files."""

    kind: Kind = Field(
        default="sft",
        description="sft (chats), pretrain (texts), distill; of answers compared: reward, dpo, kto",
    )
    model: ModelSection = ModelSection()
    data: DataConfig
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    run: RunSection = RunSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()
    adapter: AdapterConfig | None = Field(
        default=None, description="train a low-rank adapter, not the weights"
    )
    distill: DistillSection = Field(
        default_factory=lambda: DistillSection.model_validate({}),
        description="of kind distill; see its keys",
    )
    longseq: LongseqSection = Field(
        default_factory=lambda: LongseqSection.model_validate({}), description="see its keys"
    )
    offload: OffloadSection = Field(
        default_factory=lambda: OffloadSection.model_validate({}), description="see its keys"
    )
    parallel: ParallelConfig = Field(
        default_factory=lambda: ParallelConfig.model_validate({}), description="see its keys"
    )

    @model_validator(mode="after")
    def _loss_is_used(self) -> Recipe:
        if self.kind == "distill" and self.loss != LossSection():
            raise ValueError("[loss] is of sft and pretrain; kind = distill has a loss of its own")
        return self
