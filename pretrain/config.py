"""The whole configuration of a pretraining run, as dataclasses: what is not here cannot be configured.

A YAML file holds the fields that differ from the defaults; `parent:` names another YAML file to start from, whose
options of an objective or optimiser are not taken over by a file that names another one. Command line overrides are
`key=value` with dots. An unknown field is an error that names the nearest known one.
"""

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.parsing import check_yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the remedy."""


@dataclass
class ImageTowerConfig:
    """A plain vision transformer of timm."""

    timm_model: str = "vit_base_patch16_siglip_gap_224"  # average pooling, no class token
    layer_scale: float | None = None  # initial value where the model has LayerScale; None keeps timm's
    # "": timm's own, which must be the average; avg: average over patches (a class token stays, as an unpooled
    # register); token: the class token, for models that have one.
    pool: str = ""


@dataclass
class TextTowerConfig:
    """open_clip's causal text transformer; its feature is the end-of-text token's."""

    width: int = 512
    heads: int = 8
    layers: int = 12
    context_length: int = 64  # tokens at most, in any phase
    vocab_size: int = 49408  # open_clip's byte-pair encoding


@dataclass
class ModelConfig:
    """Both towers and the joint space."""

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    embed_dim: int = 512
    init_temperature: float = 0.07  # CLIP's; learned
    min_temperature: float = 0.01  # the scale 1/temperature is clamped to 100, as in CLIP
    init: str | None = None  # a checkpoint folder of the same towers to start from; None: random weights


@dataclass
class CaptionConfig:
    """How a training caption is made: one of the sample's captions is drawn, then put into a template."""

    templates: list[str] = field(default_factory=lambda: ["{}"])  # one is drawn per sample
    keyword_probability: float = 0.0  # chance to append some of the row's keywords
    max_keywords: int = 3


@dataclass
class AugmentationConfig:
    """How a training image is made. Cut-outs (with alpha) are placed on a background; photographs are cropped."""

    flip: bool = True
    # Long side of the drawing / image side; above 1 the image shows a part of the drawing.
    cutout_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    rotation: float = 15.0  # degrees either way, cut-outs only
    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])  # area kept, photographs only
    # Pixels: photographs are resized so that their short side is this, then a random square of the phase's image size
    # is cut out (torchvision's Resize and RandomCrop). 0: a crop of crop_scale of the area, its aspect 3/4 to 4/3.
    crop_short_side: int = 0
    colour: float = 0.4  # strength of brightness, contrast and saturation changes
    grey_probability: float = 0.1
    photo_background_probability: float = 0.5  # else a random plain colour; needs data.backgrounds


@dataclass
class DataConfig:
    """Pairs from a CSV or Parquet table with the columns `image` (path) and `caption` or `captions` ("a|b"), or from
    tar shards."""

    table: str = "data/mini/pairs.csv"
    shards: str | None = None  # trains on tar shards instead: "dir/{00000..00099}.tar", a glob, several joined by "::"
    caption_keys: list[str] = field(default_factory=lambda: ["txt"])  # of a shard: txt, or fields of KEY.json
    shuffle_window: int = 65536  # pairs of neighbouring shards that are shuffled together
    root: str | None = None  # what image paths are relative to; None: the table's folder
    train_split: str | None = "train"  # value of the column `split`; None: every row
    withhold: str | None = None  # a file of words, one a line: rows about them are left out (strict open vocabulary)
    unique_by: str | None = None  # a column whose value no two pairs of a batch share (no false negatives)
    backgrounds: str | None = None  # a folder of photographs behind cut-outs
    preload: bool = False  # decode everything once into memory
    # Processes that prepare batches; 0: in the training process; null: as many as the process's share of the CPU cores.
    workers: int | None = 2
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class ObjectiveConfig:
    """What is minimised: a name of pretrain/objectives, and the options that objective declares."""

    name: str = "info_nce"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimConfig:
    """The optimiser, made by timm's factory anew in every phase."""

    name: str = "adamw"  # any name of timm.optim: adamw, adafactor, lamb …
    weight_decay: float = 0.01  # not on biases, norms and other vectors
    betas: list[float] | None = None  # None: the optimiser's own
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    layer_decay: float = 1.0  # learning rate of an image block relative to the next deeper one's, 0–1; 1: all the same
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.optim.create_optimizer_v2


@dataclass
class PhaseConfig:
    """One stretch of the curriculum: fixed image size and text length, its own optimiser and schedule."""

    name: str = "main"
    steps: int = 1000
    image_size: int = 64  # pixels, a multiple of the patch size
    context_length: int = 16  # tokens
    batch_size: int = 256  # pairs of a step, all processes together
    micro_batch_size: int = 0  # pairs encoded at once in a process: less memory, same gradient; 0: all
    lr: float = 1e-3  # peak
    warmup_steps: int = 100  # linear from initial_lr
    initial_lr: float = 0.0
    schedule: str = "linear"  # linear or cosine decay to final_lr
    final_lr: float = 0.0
    token_dropping: str = "none"  # which image tokens are dropped: none, random (FLIP), block or grid
    keep_tokens: int = 0  # image tokens kept when some are dropped
    cropped_positions: bool = False  # RO-ViT's cropped position embedding
    augmentation: AugmentationConfig | None = None  # None: data.augmentation
    objective: ObjectiveConfig | None = None  # None: the run's
    optim: OptimConfig | None = None  # None: the run's


@dataclass
class EvaluationConfig:
    """Zero-shot classification on other splits of the table, at the end of each phase and every `every` steps."""

    splits: list[str] = field(default_factory=lambda: ["val"])
    templates: list[str] = field(default_factory=lambda: ["{}"])
    every: int = 0  # 0: only at the end of a phase


@dataclass
class RunConfig:
    """Where and how the run happens."""

    output: str = "runs/pretrain"
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or xla
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the device has hardware for it
    parallel: str = "auto"  # one, ddp, fsdp (torchrun); spmd, processes (TPU); auto: ddp under torchrun, spmd on TPU
    compile: bool = False  # torch.compile of the towers
    log_every: int = 20  # steps between reads of the metrics
    checkpoint_every: int = 500  # steps between resumable states


@dataclass
class PretrainConfig:
    """Everything."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    phases: list[PhaseConfig] = field(default_factory=lambda: [PhaseConfig()])
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def objective_of(self, phase: PhaseConfig) -> ObjectiveConfig:
        """What this phase minimises."""
        return phase.objective or self.objective

    def optim_of(self, phase: PhaseConfig) -> OptimConfig:
        """What it minimises with."""
        return phase.optim or self.optim


def _check_names(node: Any, schema: type, where: str) -> None:
    """Raise ConfigError for the first key of `node` that `schema` does not have, or a group of fields that is none."""
    if not isinstance(node, dict):
        raise ConfigError(f"{where} is {node!r}: it must be a group of fields ({', '.join(get_type_hints(schema))})")
    known = get_type_hints(schema)
    for key, value in node.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            path = f"{where}.{key}" if where else str(key)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
            raise ConfigError(f"unknown field {path!r}: {hint}")
        kind = known[key]
        path = f"{where}.{key}" if where else key
        if NoneType in get_args(kind):
            if value is None:
                continue
            kind = get_args(kind)[0]
        if is_dataclass(kind):
            _check_names(value, kind, path)
        elif get_args(kind) and is_dataclass(get_args(kind)[0]):
            if not isinstance(value, list):
                raise ConfigError(f"{path} is {value!r}: it must be a list, one item for each of the {path}")
            for index, item in enumerate(value):
                _check_names(item, get_args(kind)[0], f"{path}[{index}]")
                # OmegaConf's own message would not say which item.
                _typed(get_args(kind)[0], item, f"{path}[{index}].")
        elif get_origin(kind) in (list, dict) and not isinstance(value, get_origin(kind)):
            # Nor which field, of a list for a mapping.
            form = "a list, [value, …]" if get_origin(kind) is list else "a mapping, {name: value, …}"
            raise ConfigError(f"{path} is {value!r}: it must be {form}")


def _typed(schema: type, node: dict, where: str = "") -> Any:
    """An object of the schema; ConfigError for a value of the wrong type, its field prefixed by `where`."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or "configuration"
        raise ConfigError(f"{where}{key}: {str(error).splitlines()[0]}") from error


def _read_yaml(path: Path, children: tuple[Path, ...] = ()) -> Any:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"no configuration file {path}{hint}")
    try:
        check_yaml(path.read_text(encoding="utf-8"))  # OmegaConf writes aliases out
        node = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors have many types
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{path} holds no `field: value` lines at its top level: start from one of configs/pretrain")
    parent = node.pop("parent", None)
    if not parent:
        return node
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: parent is {parent!r}: it must be the name of a YAML file")
    if path.resolve() in children:
        raise ConfigError(f"{path} is its own parent, directly or through others: remove the line parent")
    inherited = _read_yaml(path.parent / parent, (*children, path.resolve()))
    _drop_options_of_others(inherited, node)
    try:
        return OmegaConf.merge(inherited, node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} does not fit its parent {parent}: {str(error).splitlines()[0]}") from error


_NAMED_GROUPS = {"objective": ObjectiveConfig, "optim": OptimConfig}


def _drop_options_of_others(inherited: DictConfig, node: DictConfig) -> None:
    """Where an objective or optimiser other than the inherited one is named, the options that are there are not its."""
    parent, child = (OmegaConf.to_container(tree) for tree in (inherited, node))
    for group, schema in _NAMED_GROUPS.items():
        before, own = parent.get(group), child.get(group)
        if not isinstance(before, dict) or not isinstance(own, dict):
            continue  # absent; or malformed, which is said when all is checked
        if own.get("name") not in (None, before.get("name", schema().name)):
            inherited[group].pop("options", None)


def load_config(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Read a YAML file and `key=value` overrides into the schema.

    Raises:
        ConfigError: for a missing file, an unknown field, a value of the wrong type or an impossible value.
    """
    node = _read_yaml(Path(path))
    # Names first: what else is given for an objective or optimiser is for the one that is named.
    names = tuple(f"{group}.name=" for group in _NAMED_GROUPS)
    for override in sorted(overrides or [], key=lambda text: not text.startswith(names)):
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        key, _, value = override.partition("=")
        if override.startswith(names):
            _drop_options_of_others(node, OmegaConf.create({key.partition(".")[0]: {"name": value}}))
        if key.startswith("phases") and "phases" not in node:  # a list index needs the list it counts in
            node.phases = [asdict(phase) for phase in PretrainConfig().phases]
        try:
            # A group replaces the group: {} clears what the file has, back to the defaults.
            OmegaConf.update(node, key, OmegaConf.create(f"value: {value}").value, merge=False)
        except Exception as error:  # OmegaConf's, the YAML parser's, and plain ones for a list index that is not there
            reason = _misplaced_phase(key, node) or str(error).splitlines()[0]
            raise ConfigError(f"override {override!r}: {reason}") from error
    try:
        return config_from_dict(OmegaConf.to_container(node, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def _misplaced_phase(key: str, node: DictConfig) -> str:
    """What to write in place of a `phases…` key whose phase is not there; empty where that is not its fault."""
    found = re.fullmatch(r"phases[.[]([^].]+)]?(.*)", key)
    phases = OmegaConf.to_container(node).get("phases")
    if not found or not isinstance(phases, list):
        return ""
    place, rest = found.groups()
    if place.isdigit() and int(place) < len(phases):
        return ""
    names = [phase.get("name", "main") if isinstance(phase, dict) else "" for phase in phases]
    if not place.isdigit() and place not in names:
        rest = f".{place}{rest}"
    there = ", ".join(f"phases[{i}] is {name}" for i, name in enumerate(names))
    number = names.index(place) if place in names else 0
    return f"phases is a list and counts from 0 ({there}): phases[{number}]{rest}=…"


def config_from_dict(node: dict) -> PretrainConfig:
    """Check a plain dictionary against the schema and return the typed configuration."""
    _check_names(node, PretrainConfig, "")
    config = _typed(PretrainConfig, node)
    validate(config)
    return config


def options_from_dict(schema: type, node: dict, where: str) -> Any:
    """A part of the configuration whose schema is declared elsewhere (an objective's options).

    Raises:
        ConfigError: for a field that `schema` does not have (the nearest is named), or a value of the wrong type.
    """
    _check_names(node, schema, where)
    return _typed(schema, node, f"{where}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = [item or "''" for item in allowed]
        raise ConfigError(f"{name} is {value!r}: {', '.join(listed[:-1])} or {listed[-1]}")


def validate(config: PretrainConfig) -> None:
    """Raise ConfigError for values that cannot work, naming the field."""
    if not config.phases:
        raise ConfigError("phases: at least one is needed")
    for index, phase in enumerate(config.phases):
        where = f"phases[{index}]"
        for name in ("steps", "image_size", "context_length", "batch_size"):
            if getattr(phase, name) < 1:
                raise ConfigError(f"{where}.{name} is {getattr(phase, name)}: it must be at least 1")
        if phase.context_length > config.model.text.context_length:
            raise ConfigError(
                f"{where}.context_length {phase.context_length} exceeds model.text.context_length "
                f"{config.model.text.context_length}"
            )
        for name in ("warmup_steps", "lr", "initial_lr", "final_lr"):
            if getattr(phase, name) < 0:
                raise ConfigError(f"{where}.{name} is {getattr(phase, name)}: it must not be negative")
        short_side = (phase.augmentation or config.data.augmentation).crop_short_side
        if short_side != 0 and short_side < phase.image_size:
            raise ConfigError(
                f"{'data' if phase.augmentation is None else where}.augmentation.crop_short_side is {short_side}: it "
                f"must be 0, or at least {where}.image_size {phase.image_size}"
            )
        _one_of(f"{where}.schedule", phase.schedule, ("linear", "cosine"))
        _one_of(f"{where}.token_dropping", phase.token_dropping, ("none", "random", "block", "grid"))
        if (phase.token_dropping != "none") != (phase.keep_tokens > 0):
            raise ConfigError(
                f"{where}: keep_tokens {phase.keep_tokens} and token_dropping {phase.token_dropping!r} do not go "
                "together: give both, or neither"
            )
    for name in ("log_every", "checkpoint_every"):
        if getattr(config.run, name) < 1:
            raise ConfigError(f"run.{name} is {getattr(config.run, name)}: it must be at least 1 step")
    if (config.data.workers or 0) < 0:
        raise ConfigError(f"data.workers is {config.data.workers}: it must be at least 0, or null for the CPU cores")
    if not config.data.caption.templates or not config.evaluation.templates:
        raise ConfigError('data.caption.templates and evaluation.templates need at least one template; ["{}"] is plain')
    _one_of("model.image.pool", config.model.image.pool, ("", "avg", "token"))
    _one_of("run.device", config.run.device, ("auto", "cpu", "cuda", "xla"))
    _one_of("run.precision", config.run.precision, ("auto", "fp32", "bf16"))
    _one_of("run.parallel", config.run.parallel, ("auto", "one", "ddp", "fsdp", "spmd", "processes"))


def to_yaml(config: PretrainConfig) -> str:
    """The complete configuration as YAML, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def schema_fields() -> list[str]:
    """Dotted names of every field, for documentation and tests."""

    def walk(schema: type, prefix: str) -> list[str]:
        names = []
        for item in fields(schema):
            kind = get_type_hints(schema)[item.name]
            names += walk(kind, f"{prefix}{item.name}.") if is_dataclass(kind) else [prefix + item.name]
        return names

    return walk(PretrainConfig, "")
