# SPDX-License-Identifier: Apache-2.0
"""What the parts of a recipe may say, each as data that pydantic has checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

if TYPE_CHECKING:
    from lissom.pruning import Options, Reconstruction
    from lissom.pruning.allocate_model import Allocation


class Strict(BaseModel):
    """Data that cannot be changed, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Strict):
    """Calibration text: `samples` windows of `seq_len` tokens drawn with `seed` from a file."""

    source: str
    field: str = "text"
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=0)

    @field_validator("source")
    @classmethod
    def _is_local(cls, source: str) -> str:
        if source.startswith("hf:"):
            raise ValueError(
                f"hub data set {source!r} is not read, lissom never opens the network: "
                "download it and name a .txt or .jsonl file"
            )
        return source


def _read_pattern(value: Any) -> str | float | dict[str, str]:
    """One pattern as it was written, or the text of each entry of a map."""
    from lissom.pruning.selection import PatternMap, read_pattern

    try:
        found = read_pattern(value)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if isinstance(found, PatternMap):
        return found.to_dict()
    return value if isinstance(value, float) else str(value).strip()


PatternSpec = Annotated[str | float | dict[str, str], BeforeValidator(_read_pattern)]


class ReconstructSpec(Strict):
    """Train each block's kept weights a little after it is solved: `lissom.pruning.Reconstruction`."""

    passes: int = 4
    learning_rate: float = 5e-4
    sequences: int = 1

    @field_validator("*")
    @classmethod
    def _is_setting(cls, value: Any, info: ValidationInfo) -> Any:
        from lissom.pruning import Reconstruction

        Reconstruction(**{str(info.field_name): value})
        return value


class AllocateSpec(Strict):
    """Choose the pattern of each layer within a budget first: `lissom.pruning.allocate_model.Allocation`."""

    method: str = "budget"
    share: float | None = None
    budget_bytes: float | None = None
    budget_seconds: float | None = None
    options: list[str] = ["dense", "2:4"]
    bound: float = 0.08
    threshold: float = 5.0

    @model_validator(mode="after")
    def _is_allocation(self) -> AllocateSpec:
        assert self.allocation
        return self

    @property
    def allocation(self) -> Allocation:
        """What `allocate_model` takes."""
        from lissom.pruning.allocate_model import Allocation

        return Allocation(**self.model_dump())

    @property
    def patterns(self) -> list[str]:
        """What a layer may become; shares by outliers can be any."""
        return self.options if self.method == "budget" else [f"{100 * (1 - (self.share or 0)):g}%"]


class PruneStep(Strict):
    """Set weights to zero, block by block: `lissom.pruning.prune_model`."""

    pattern: PatternSpec | None = None
    allocate: AllocateSpec | None = None
    method: str = "alps"
    refit: bool | str = True
    variant: str | None = None
    blocksize: int = 128
    scope: str | None = None
    act_order: bool = False
    damp: float | None = Field(default=None, gt=0, le=1)
    blend: float | None = Field(default=None, ge=0, le=1)
    permute: bool | None = None
    reconstruct: ReconstructSpec | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    strict: bool = True
    preserve_mask: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_pattern(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("allocate") is None:
            return {"pattern": "2:4"} | values if isinstance(values, dict) else values
        if values.get("pattern") is not None:
            raise ValueError("'allocate' chooses the pattern of each layer: leave 'pattern' out")
        return values

    @field_validator("method")
    @classmethod
    def _is_method(cls, method: str) -> str:
        from lissom.pruning.solver import find_method

        find_method(method)
        return method

    @field_validator("refit", "variant", "blocksize", "scope", "act_order")
    @classmethod
    def _is_option(cls, value: Any, info: ValidationInfo) -> Any:
        from lissom.pruning import Options

        Options(**{str(info.field_name): value})
        return value

    @model_validator(mode="after")
    def _options_suit_the_method(self) -> PruneStep:
        from lissom.pruning.solver import check_options

        check_options(self.method, self.options)
        return self

    @property
    def options(self) -> Options:
        """What `prune_model` takes as `options`."""
        from lissom.pruning import Options

        return Options(
            refit=self.refit,
            variant=self.variant,
            blocksize=self.blocksize,
            scope=self.scope,
            act_order=self.act_order,
        )

    @property
    def reconstruction(self) -> Reconstruction | None:
        """What it takes as `reconstruct`."""
        from lissom.pruning import Reconstruction

        return Reconstruction(**self.reconstruct.model_dump()) if self.reconstruct else None

    @property
    def data_reader(self) -> str | None:
        """What cannot do without calibration text; None when nothing needs it."""
        if self.method != "magnitude":
            return f"method {self.method!r}"
        return next((name for name in ("allocate", "reconstruct", "blend") if getattr(self, name)), None)

    def unpackable(self) -> str | None:
        """The pattern, or entry of the map, that the packed form cannot hold; None when all fit or stay dense."""
        from lissom.pruning.selection import unpackable

        if self.pattern is not None:
            return unpackable(self.pattern)
        options = self.allocate.patterns if self.allocate else []
        return next(filter(None, map(unpackable, options)), None)


class EvalStep(Strict):
    """Perplexity of a text and, with lm-eval installed, benchmark tasks."""

    perplexity: str | None = None
    windows: int = Field(default=8, ge=1)
    seq_len: int = Field(default=1024, ge=2)
    stride: int | None = Field(default=None, ge=1)
    tasks: list[str] = []
    limit: int | None = Field(default=None, ge=1)


class Evaluation(EvalStep):
    """What is measured before and after the steps."""

    speed: bool = True
    kernels: bool = True


class GenerateStep(Strict):
    """Continue a prompt."""

    prompt: str
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)
    chat: bool = False


class Sparse24Bench(Strict):
    """Time the 2:4 linear against the strongest dense kernels."""

    kind: Literal["sparse24"] = "sparse24"
    quick: bool = False
    dtypes: list[Literal["float32", "bfloat16", "float16"]] = ["bfloat16", "float32"]
    rows: list[int] | None = None
    isa: Literal["avx2", "avx512", "avx512x"] | None = None


class TuneBench(Strict):
    """Time both kernels of the 2:4 linear by rows of x: the line that an unknown CPU needs in the table."""

    kind: Literal["tune"]


class PredictBench(Strict):
    """What the model of the CUDA kernels says of a GPU, on paper: `lissom.benchmark.predict`."""

    kind: Literal["predict"] = "predict"
    gpu: Literal["a100", "h100", "b200", "rtx50"] = "a100"
    dtypes: list[Literal["bfloat16", "float16", "int8"]] = ["bfloat16"]
    rows: list[Annotated[int, Field(ge=1)]] | None = None
    shapes: list[str] | None = None

    @field_validator("shapes")
    @classmethod
    def _are_sizes(cls, shapes: list[str] | None) -> list[str] | None:
        for shape in shapes or []:
            n, _, k = shape.partition("x")
            if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0 and int(k) % 4 == 0):
                raise ValueError(f"a shape is NxK, K a multiple of 4, such as 4096x14336; got {shape!r}")
        return shapes


class GenerationBench(Strict):
    """Time a whole model, dense against packed: prefill and decode."""

    kind: Literal["generation"] = "generation"
    packed: str | None = None
    shape: str | None = None
    prompt: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=16, ge=2)
    rounds: int = Field(default=5, ge=1)
    compiled: bool = False
    memory: bool = False


class InfoStep(Strict):
    """Versions, CPU, kernels in use."""


class InspectStep(Strict):
    """Blocks, linears, and what pruning could touch."""

    pattern: PatternSpec = "2:4"
    include: list[str] | None = None
    exclude: list[str] | None = None


class ReportStep(Strict):
    """Write lissom-report.html again from a folder's lissom-report.json."""

    source: str
