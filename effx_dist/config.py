"""The settings of the three techniques: `EffxConfig` = `InfoBatchConfig` + `CautiousConfig` +
`ExcpConfig`.

The same block stands in a DeepSpeed JSON, under the key "effx", and in a run's TOML or YAML. A
section that is absent (or null) is off; one that is present is on unless it says `enabled: false`.
Every section is frozen and checks itself: unknown keys, wrong types and values out of range are
refused with `ConfigError`, which lists every problem at once. Nothing is converted: neither a string
nor a boolean is a number; an integer may stand for a float. No torch is imported here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from effx_dist.config_files import read
from effx_dist.errors import ConfigError

BLOCK = "effx"

ProfileName = Literal["balanced", "small", "safe", "excp", "lossless"]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]


def _remedy(text: str) -> Any:
    """Attach to a field what a refusal of its value should advise."""
    return Field(json_schema_extra={"remedy": text})


class _Section(BaseModel):
    """What all sections share: frozen, keyword-only, every refusal a `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    KEY: ClassVar[str]

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic derives from the fields

        def __init__(self, **values: object) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _config_error(_problems(type(self), error)) from None

        # Sections inside a block are then validated with it: all problems come out at once.
        __init__.__pydantic_base_init__ = True


class InfoBatchConfig(_Section):
    """Technique 1: leave out some samples that the model already knows (InfoBatch, ICLR 2024)."""

    KEY: ClassVar[str] = f"{BLOCK}.infobatch"

    enabled: StrictBool = True
    """Whether samples are pruned. Default true: a section that is written down is meant to act."""

    num_epochs: Annotated[StrictInt, Field(ge=1)]
    """Passes over the data in the whole run, >= 1. No default: only the run knows it, and the last
    `max(1, round((1 - delta) * num_epochs))` of them use all the data (none if delta is 1). With 1
    nothing is ever pruned."""

    prune_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    """Fraction of the low-loss samples (those below the threshold) that is dropped, in [0, 1);
    those kept weigh 1 / (1 - prune_ratio). It is not the fraction saved, which is about 0.3 to 0.37
    at 0.5. Default 0.5, as published; 0 switches pruning off."""

    delta: Annotated[Number, Field(gt=0, le=1)] = 0.875
    """Fraction of the epochs after which pruning ends, in (0, 1]; the rest use all the data with
    weight 1, which removes what bias is left. Default 0.875, as published; 1 prunes to the end."""

    threshold: Literal["mean"] | Annotated[Number, Field(gt=0, lt=1)] = "mean"
    """What separates low-loss samples: "mean" of the scores, or a number in (0, 1) for that
    quantile of the scores (0.8: the lowest 80 % are candidates), which a few very large losses do
    not move. Default "mean", as published."""

    score: Literal["loss", "relative"] = "loss"
    """"loss": a sample's last loss. "relative": that loss minus the mean loss of the same stretch
    of training; take it where the loss falls a lot within one epoch, as when pre-training a
    language model from scratch. Default "loss", as published."""

    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    """Seed of which samples are dropped and in what order the rest come, 0 <= seed < 2**63. The
    same on every rank. Default 0: a run that says nothing is repeatable."""

    drop_last: StrictBool = True
    """What does not fill a global batch: true drops it, chosen uniformly at random each epoch;
    false pads it with samples of weight 0. Default true: every batch then has the same size."""

    full_epochs: Literal["rounded", "official"] = "rounded"
    """How many of the last epochs use all the data: "rounded", `max(1, round((1 - delta) *
    num_epochs))`; "official", as the authors' code counts, whose number is another in 84 of the 199
    runs of 2 to 200 epochs (100 epochs: 13 instead of 12). Default "rounded"."""

    max_weight: Annotated[Number, Field(ge=1)] | None = None
    """Largest weight of a kept low-loss sample (no unit, >= 1). Below 1 / (1 - prune_ratio) it makes
    batches of less unequal weight, and is biased: those samples then count max_weight * (1 -
    prune_ratio) of what they count in all the data. Default null: no cap, as published."""

    strict: StrictBool = True
    """Whether it is an error when what was planned was not trained (true), or a warning (false).
    Default true: nothing else tells that a framework dropped half of the data."""


class CautiousConfig(_Section):
    """Technique 2: skip what of an update points against the gradient (arXiv 2411.16085)."""

    KEY: ClassVar[str] = f"{BLOCK}.cautious"

    enabled: StrictBool = True
    """Whether updates are masked. Default true: a section that is written down is meant to act."""

    cautious_weight_decay: StrictBool = False
    """Decay a value only where update and parameter agree in sign (arXiv 2510.12402). Elementwise,
    so it costs no communication. Default false: plain decoupled weight decay, as in
    torch.optim.AdamW."""

    implementation: Annotated[
        Literal["auto", "triton", "compiled", "eager"],
        _remedy('"auto" takes the fastest for the device'),
    ] = "auto"
    """What computes a step. "triton": kernels for CUDA and ROCm devices; "compiled": C++ for the CPU,
    built on first use; "eager": plain torch operations, the reference; "auto": the first of these
    that is there for the device. Default "auto": all give the same values."""


class ExcpConfig(_Section):
    """Technique 3: checkpoints as quantised residuals of the previous one (ExCP, ICML 2024)."""

    KEY: ClassVar[str] = f"{BLOCK}.excp"

    enabled: StrictBool = True
    """Whether checkpoints are compressed. Default true: a section that is written down is meant to
    act."""

    profile: ProfileName = "balanced"
    """What is traded for size: "balanced" stores about 1/70 of the raw bytes, "small" 1/110, "safe"
    1/40, "excp" is the published algorithm, "lossless" is bit-exact at about 1/1.2 (float32) or
    1/1.7 (bfloat16). Default "balanced": half the loss gap of the published algorithm at the same
    size."""

    base_every: Annotated[StrictInt, Field(ge=1)] = 50
    """Saves from one base (stored without a residual) to the next, >= 1. Default 50: a base is far
    larger than a residual, and a shorter chain would spend most of the bytes on bases."""

    base_every_size: Annotated[Number, Field(gt=0)] | None = None
    """Start a new base as soon as the saves since the last one take up this many times its bytes (no
    unit, > 0), whatever base_every says. Default null: base_every alone decides."""

    seeded_base: StrictBool = False
    """Whether the weights as they are before the first step become a base that is not stored: only
    their hash is, and a load must start from a model initialised the same way. Default false: what
    initialises a model (library versions, device) may change while a run lasts."""

    async_mode: Literal["sync", "thread", "process"] = "thread"
    """Where a save is encoded and written: "sync" inside the call, "thread" in a background thread,
    "process" in a process of its own. Default "thread": the heavy parts run outside the interpreter
    lock, and it needs neither a second interpreter nor shared memory, so it works under every
    launcher. "process" takes the rest off the lock too; worth it where the training loop is bound
    by Python."""

    policy: Literal["wait", "skip"] = "wait"
    """What a save does while the previous one is in flight: "wait" for it, or "skip" this one
    (counted and logged). Default "wait": no checkpoint that was asked for is missing."""

    max_pending: Annotated[StrictInt, Field(ge=1, le=1)] = 1
    """Saves in flight at a time. Default 1, and no more in this version: each holds a copy of the
    state."""

    encoder_threads: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    """Cores that the encoding of a save may keep busy on each rank, >= 1. Default 1: training keeps the
    others."""

    save_on_sigterm: StrictBool = False
    """Whether the first SIGTERM is remembered instead of ending the process, so that a training loop can
    ask for `checkpointer.should_stop` and save once more (preemption). Default false: signals
    belong to whoever wrote the loop."""

    keep_latest_k: Annotated[StrictInt, Field(ge=0)] = 5
    """Number of newest checkpoints kept, 0 = keep all. Bases that they need are kept as well.
    Default 5: enough to step back over a loss spike."""

    keep_every_n: Annotated[StrictInt, Field(ge=0)] = 0
    """Also keep every checkpoint whose step is a multiple of this number of steps, 0 = none.
    Default 0: bytes then stay bounded by keep_latest_k."""

    max_error: Annotated[Number, Field(gt=0)] | None = None
    """Largest relative root-mean-square error (no unit, > 0) that a lossy save may leave in a
    weight tensor; a tensor beyond it is stored losslessly in that save. Default null: the profile
    alone decides."""

    manifest_sha256: StrictBool = False
    """Whether each manifest's SHA-256 is written beside it, as `sha256sum` writes it, for those who
    sign checkpoints. Default false: the xxh3 checksums find damage."""


class EffxConfig(_Section):
    """The whole block. A section that is None is off."""

    KEY: ClassVar[str] = BLOCK

    infobatch: InfoBatchConfig | None = None
    """Sample pruning. Default null: off."""

    cautious: CautiousConfig | None = None
    """Cautious optimizer steps. Default null: off."""

    excp: ExcpConfig | None = None
    """Compressed checkpoints. Default null: off."""

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read the "effx" block of a .json, .toml, .yaml or .yml file, or the whole file if none.

        Raises:
            ConfigError: The file, which the message names, cannot be read or parsed (with the line
                where the parser gives it), holds a key twice, or says something that is refused.
        """
        path = Path(path)
        return cls._from_mapping(read(path), f"{path}: ")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Take the "effx" block of a mapping, or the whole mapping if it has none.

        Raises:
            ConfigError: Something in the block is refused; every problem is listed.
        """
        return cls._from_mapping(values, "")

    @property
    def on(self) -> Self:
        """The block with None in the place of every section that is not enabled."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        found = {name: s if s is not None and s.enabled else None for name, s in sections.items()}
        return self.model_copy(update=found)

    def to_dict(self) -> dict[str, Any]:
        """Return the block in plain dicts, defaults spelled out; `from_dict` undoes it.

        Nulls are left out, since absent means the same and TOML has no word for them.
        """
        return self.model_dump(exclude_none=True)

    @classmethod
    def _from_mapping(cls, values: object, source: str) -> Self:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}must hold keys and values, not a {type(values).__name__}")
        has_block = BLOCK in values
        block = values[BLOCK] if has_block else values
        if not isinstance(block, Mapping):
            raise ConfigError(f"{source}{BLOCK} = {_shown(block)}: must be a table of sections")
        try:
            return cls.model_validate(dict(block))
        except ValidationError as error:
            problems = _problems(cls, error, also_known=() if has_block else (BLOCK,))
        if not has_block and not cls.model_fields.keys() >= block.keys():
            source = f'{source}(read whole, as it has no "{BLOCK}" key) '
        raise _config_error(problems, source) from None


def _config_error(problems: list[str], source: str = "") -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{source}{problems[0]}")
    heading = f"{source}{len(problems)} problems in the settings"
    return ConfigError("\n  ".join([heading, *problems]))


def _problems(
    section: type[_Section], error: ValidationError, also_known: tuple[str, ...] = ()
) -> list[str]:
    """Turn pydantic's errors into one line a key: dotted key, value, bound, remedy."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        owner, place = section, list(item["loc"])
        while len(place) > 1 and (inner := _section_of(owner, place[0])) is not None:
            owner, place = inner, place[1:]
        name, key = place[0], f"{owner.KEY}.{place[0]}"  # the rest only names a union's branch
        if item["type"] == "missing":
            lines[key] = f"{key}: is required; it must be {_allowed(owner, str(name))}"
        elif name in owner.model_fields:
            value, allowed = item["input"], _allowed(owner, str(name))
            lines[key] = f"{key} = {_shown(value)}: must be {allowed}{_quoted_number(value)}"
        else:
            lines[key] = f"{key}: unknown key; {_nearest(owner, str(name), also_known)}"
    return list(lines.values())


def _section_of(owner: type[_Section], name: int | str) -> type[_Section] | None:
    field = owner.model_fields.get(str(name))
    options: Iterable[Any] = () if field is None else get_args(field.annotation)
    return next((o for o in options if isinstance(o, type) and issubclass(o, _Section)), None)


def _nearest(owner: type[_Section], name: str, also_known: tuple[str, ...]) -> str:
    """Name the known key that is most like `name`; where none is, say which keys there are."""
    known = [*owner.model_fields, *(also_known if owner is EffxConfig else ())]
    normal = name.strip().lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(normal, known, n=1, cutoff=0.6)
    if not near:
        return f"the keys here are {', '.join(known)}"
    return f"did you mean {BLOCK if near[0] == BLOCK else f'{owner.KEY}.{near[0]}'}?"


_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@cache
def _allowed(owner: type[_Section], name: str) -> str:
    schema = owner.model_json_schema()["properties"][name]
    advice = f"; {schema['remedy']}" if "remedy" in schema else ""
    return _bound(schema) + advice


def _bound(schema: Mapping[str, Any]) -> str:
    """Say in words what a field's JSON schema allows: bounds are written once, at the field."""
    if "anyOf" in schema:
        return " or ".join(_bound(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return "a table of keys"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        return " or ".join(json.dumps(choice) for choice in choices)
    bounds = [f"{sign} {schema[word]}" for word, sign in _SIGNS.items() if word in schema]
    kind = _KINDS.get(schema["type"], schema["type"])
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _quoted_number(value: object) -> str:
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return "; write numbers without quotes, and in YAML 1.0e-3, as it reads 1e-3 as text"


def _shown(value: object) -> str:
    """Spell a value as it stands in the file, cut short; as Python does where JSON has no word for it."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
