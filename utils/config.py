"""The configuration of a run: a typed schema, YAML files over it, `--opts` over those.

Lowest to highest: the defaults below, the file that `_base_` names (one level, relative to the
file that names it), the file given with --config, and `--opts KEY VALUE ...`. `config/base.yaml`
explains every key; a test keeps its values equal to the defaults here. Official CRIS files, which
have no `_base_` and some keys that mean nothing here (`NO_EFFECT`), load as they are.
"""

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from datetime import date
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from utils.errors import UserError
from utils.files import atomic_path

BASE_KEY = "_base_"
AUTO = "auto"  # of TRAIN.resume: the newest whole checkpoint of the run, if there is one
SPLIT_ALIASES = {"val-test": "val"}  # the official test configs' name for val

# Published keys that are accepted everywhere and do nothing: why.
NO_EFFECT = {
    "DATA.mask_root": "masks are stored in the LMDB",
    "TRAIN.evaluate": "validation follows every TRAIN.val_freq epochs",
    "TRAIN.save_freq": "the last and the best checkpoint are written as training goes",
    "TRAIN.intermediate": "the decoder returns its last layer only",
} | dict.fromkeys(
    (
        "Distributed.dist_url",
        "Distributed.dist_backend",
        "Distributed.multiprocessing_distributed",
        "Distributed.world_size",
        "Distributed.rank",
    ),
    "ranks and addresses come from torchrun, the backend from the device",
)


class _Rule(NamedTuple):
    """A condition on one value; `text` completes "<key> must ..."."""

    holds: Callable[[Any], bool]
    text: str


Size = Annotated[int, _Rule(lambda n: n >= 1, "be at least 1")]
Count = Annotated[int, _Rule(lambda n: n >= 0, "be at least 0")]
Pixels = Annotated[int, _Rule(lambda n: n > 0 and n % 32 == 0, "be a positive multiple of 32")]
Rate = Annotated[float, _Rule(lambda x: 0 < x < math.inf, "be above 0 and finite")]
Interval = Annotated[
    str,
    _Rule(
        lambda text: re.fullmatch(r"[1-9]\d*( steps| minutes)?", text) is not None,
        "be a number of steps, or of minutes such as '10 minutes'",
    ),
]
Amount = Annotated[float, _Rule(lambda x: 0 <= x < math.inf, "be at least 0 and finite")]


@dataclass(frozen=True, kw_only=True)
class ClipArch:
    """Sizes of a CLIP ResNet that is built without an archive; all of them are needed."""

    embed_dim: Size
    image_resolution: Pixels
    vision_layers: tuple[Size, Size, Size, Size]
    vision_width: Annotated[int, _Rule(lambda n: n > 0 and n % 2 == 0, "be positive and even")]
    context_length: Size
    vocab_size: Size
    transformer_width: Size
    transformer_heads: Size
    transformer_layers: Size

    def __post_init__(self) -> None:
        if self.transformer_width != 64 * self.transformer_heads:
            raise UserError(
                f"TRAIN.clip_arch.transformer_width {self.transformer_width} must be 64 times "
                f"transformer_heads {self.transformer_heads}, as in every CLIP"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the records for training and validation lie."""

    dataset: str = "refcoco"
    train_lmdb: str | tuple[str, ...] = "datasets/lmdb/refcoco/train.lmdb"
    train_split: str = "train"
    exclude_lmdb: tuple[str, ...] = ()
    val_lmdb: str = "datasets/lmdb/refcoco/val.lmdb"
    val_split: str = "val"
    cache: str | None = None
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        files = self.train_files
        if not files:
            raise UserError("DATA.train_lmdb is an empty list; name one LMDB or several")
        twice = next((file for file in files if files.count(file) > 1), None)
        if twice is not None:
            raise UserError(f"DATA.train_lmdb names {twice} twice")

    @property
    def train_files(self) -> tuple[str, ...]:
        """`train_lmdb` as a list, which may have a single entry."""
        return (self.train_lmdb,) if isinstance(self.train_lmdb, str) else self.train_lmdb


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The model, the recipe, and where the run is written."""

    clip_pretrain: str | None = "pretrain/RN50.pt"
    clip_arch: ClipArch | None = None
    input_size: Pixels = 416
    word_len: Annotated[int, _Rule(lambda n: n >= 2, "be at least 2 (start and end)")] = 17
    word_dim: Size | None = None
    vis_dim: Annotated[int, _Rule(lambda n: n > 0 and n % 4 == 0, "be a multiple of 4")] | None = (
        None
    )
    fpn_in: tuple[Size, Size, Size] | None = None
    fpn_out: tuple[Size, Size, Size] | None = None
    sync_bn: bool = True
    num_layers: Size = 3
    num_head: Size = 8
    dim_ffn: Size = 2048
    dropout: Annotated[float, _Rule(lambda x: 0 <= x < 1, "be in [0, 1)")] = 0.1
    workers: Count = 32
    workers_val: Count = 16
    epochs: Size = 50
    milestones: Annotated[
        tuple[Size, ...], _Rule(lambda m: all(a < b for a, b in pairwise(m)), "increase")
    ] = (35,)
    start_epoch: Count = 0
    batch_size: Size = 64
    batch_size_val: Size = 64
    accumulation_steps: Size = 1
    batch_by: Literal["refs", "images"] = "refs"
    schedule: Literal["milestones", "cosine"] = "milestones"
    base_lr: Rate = 1e-4
    lr_decay: Rate = 0.1
    lr_multi: Amount = 0.1
    backbone_start: Literal["published", "lr_multi"] = "published"
    freeze_token_embedding: bool = False
    warmup_steps: Count = 0
    weight_decay: Amount = 0.0
    max_norm: Amount = 0.0
    recompute_backbone: bool = False
    recompute_decoder: bool = False
    compile: bool = False
    deterministic: bool = False
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    target: Literal["nearest", "area"] = "nearest"
    val_freq: Size = 1
    val_sentences: Literal["all", "first"] = "all"
    val_pictures: Count = 4
    save_every: Interval | None = None
    keep_checkpoints: Size = 2
    manual_seed: Count = 0
    print_freq: Size = 100
    exp_name: str = "CRIS_R50"
    output_folder: str = "exp/refcoco"
    weight: str | None = None
    resume: str | None = None
    force: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"

    @property
    def save_steps(self) -> int | None:
        """Steps from one checkpoint to the next, if `save_every` is in steps."""
        text = self.save_every or "minutes"
        return None if "minutes" in text else int(text.split()[0])

    @property
    def save_minutes(self) -> int | None:
        """Minutes from one checkpoint to the next, if `save_every` is in minutes."""
        text = self.save_every or ""
        return int(text.split()[0]) if "minutes" in text else None

    def __post_init__(self) -> None:
        if self.vis_dim is not None:
            _check_heads(self.vis_dim, self.num_head)
        if None not in (self.fpn_out, self.vis_dim) and self.fpn_out[1] != self.vis_dim:
            raise UserError(
                f"TRAIN.fpn_out[1] {self.fpn_out[1]} is the width that the neck hands to the "
                f"decoder and must equal TRAIN.vis_dim {self.vis_dim}"
            )
        if self.weight is not None and self.resume not in (None, AUTO):
            raise UserError(
                f"TRAIN.weight {self.weight} and TRAIN.resume {self.resume} are both set: weight "
                "starts a new training, resume continues one; make one of them null"
            )
        if self.start_epoch >= self.epochs:
            raise UserError(
                f"TRAIN.start_epoch {self.start_epoch} must be below TRAIN.epochs {self.epochs}"
            )
        self._check_compile()
        if self.clip_arch is not None:
            if self.clip_pretrain is not None:
                raise UserError(
                    f"TRAIN.clip_pretrain {self.clip_pretrain} and TRAIN.clip_arch are both set; "
                    "make clip_pretrain null to train from scratch, or clip_arch null"
                )
            check_clip_dims(self, self.clip_arch)

    def _check_compile(self) -> None:
        if not self.compile:
            return
        if self.recompute_backbone or self.recompute_decoder:
            raise UserError(
                "TRAIN.compile and TRAIN.recompute_backbone or recompute_decoder are both set: "
                "compiling the two together takes minutes even for a tiny model; choose one"
            )
        if self.batch_by == "images":
            raise UserError(
                "TRAIN.compile needs batches of one shape, and with TRAIN.batch_by images each has "
                "its own number of photos; set batch_by to refs"
            )


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """What test.py scores, and how."""

    __test__ = False  # pytest: no test class

    test_split: str = "val"
    test_lmdb: str = "datasets/lmdb/refcoco/val.lmdb"
    splits: tuple[str, ...] = ()
    weights: str | None = None
    protocol: Literal["published", "aligned", "both"] = "published"
    threshold: Annotated[float, _Rule(lambda x: 0 < x < 1, "be in (0, 1)")] | None = None
    visualize: bool = False
    visualize_limit: Count | None = None
    report: bool = True
    report_limit: Size | None = None
    report_photo_size: Size = 384
    swap_sentences: bool = False

    def __post_init__(self) -> None:
        splits = tuple(SPLIT_ALIASES.get(split, split) for split in self.splits)
        object.__setattr__(self, "splits", splits)
        split = SPLIT_ALIASES.get(self.test_split, self.test_split)
        object.__setattr__(self, "test_split", split)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A resolved configuration. `notices` are lines for the log and no part of its value."""

    DATA: DataConfig = field(default_factory=DataConfig)
    TRAIN: TrainConfig = field(default_factory=TrainConfig)
    TEST: TestConfig = field(default_factory=TestConfig)
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def run_folder(self) -> Path:
        """Where the run is written: `<output_folder>/<exp_name>`."""
        return Path(self.TRAIN.output_folder) / self.TRAIN.exp_name


def load_config(path: str | Path, opts: Iterable[str] = ()) -> Config:
    """Read a YAML file, the file that its `_base_` names, and `--opts` over both.

    Args:
        path: a thin file of ours, a saved config, or an official one.
        opts: flat KEY, VALUE, KEY, VALUE ...; a key may leave out its section; values are Python
            literals, YAML, or else text; the last one wins.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type or value, or values
            that contradict each other.
    """
    opts = [str(opt) for opt in opts]
    if len(opts) % 2:
        raise UserError(f"--opts takes KEY VALUE pairs; {opts[-1]} has no value")
    values: dict[str, Any] = {}
    for source, tree in _read_files(Path(path)):
        for section, content in tree.items():
            _assign(values, str(section), {} if content is None else content, source)
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        key = _full_key(key)
        _assign(values, key, _parse_opt(text, SCHEMA.get(key)), "--opts")
        if key == "TEST.test_split":  # the one split asked for, whatever list the file has
            values["TEST.splits"] = ()
    try:
        config = _build(Config, values)
    except UserError as error:
        raise UserError(f"{path}{' with --opts' if opts else ''}: {error}") from None
    return replace(config, notices=(*_without_effect(values), *_doubtful(config)))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain dicts, tuples, strings and numbers by section, as checkpoints carry them."""
    return {s.name: asdict(getattr(config, s.name)) for s in fields(config) if s.compare}


def save_config(config: Config, path: str | Path) -> None:
    """Write every key as YAML, whole or not at all; `load_config(path)` gives an equal config."""
    with atomic_path(path) as partial:
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        partial.write_text(text, encoding="utf-8")


def check_batch(train: TrainConfig, world_size: int) -> int:
    """Samples per rank and forward pass: batch_size / (ranks x accumulation_steps).

    Raises:
        UserError: it does not divide, or a batch norm would see a single sample, which has no
            variance.
    """
    shares = world_size * train.accumulation_steps
    micro_batch, rest = divmod(train.batch_size, shares)
    smallest = 1 if train.sync_bn and world_size > 1 else 2
    if not rest and micro_batch >= smallest:
        return micro_batch
    fault = "does not divide by" if rest else "leaves batch norm a single sample on"
    nearest = sorted({max(n, smallest) * shares for n in (micro_batch, micro_batch + 1)})
    raise UserError(
        f"TRAIN.batch_size {train.batch_size} {fault} {world_size} x {train.accumulation_steps} "
        f"(ranks x TRAIN.accumulation_steps); nearest that works: {' or '.join(map(str, nearest))}"
    )


def check_clip_dims(train: TrainConfig, arch: ClipArch) -> None:
    """Refuse widths and lengths that do not fit the CLIP.

    `TRAIN.clip_arch` is checked on loading; call this with an archive's sizes once it is read
    (`model.clip_archive.ClipSizes` has the attributes of a `ClipArch`).
    """
    fits = {
        "fpn_in": (8 * arch.vision_width, 16 * arch.vision_width, arch.embed_dim),
        "word_dim": arch.embed_dim,
    }
    for name, value in fits.items():
        given = getattr(train, name)
        if given not in (None, value):
            raise UserError(
                f"TRAIN.{name} {_show(given)} does not fit the CLIP: use {_show(value)} or null"
            )
    width = arch.transformer_width
    for name, given in (
        ("vis_dim", train.vis_dim),
        ("fpn_out[1]", train.fpn_out and train.fpn_out[1]),
    ):
        if given not in (None, width):
            raise UserError(
                f"TRAIN.{name} {given} must equal the width of CLIP's text transformer, {width} "
                "(or be null): the decoder attends to its tokens as they are"
            )
    _check_heads(width, train.num_head)
    if train.word_len > arch.context_length:
        raise UserError(
            f"TRAIN.word_len {train.word_len} exceeds CLIP's context_length {arch.context_length}"
        )


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise UserError(f"TRAIN.vis_dim {width} does not divide by TRAIN.num_head {num_heads}")


def _schema(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key below `cls`, groups included, with its type."""
    keys: dict[str, Any] = {}
    for item in fields(cls):
        if item.compare:
            keys[prefix + item.name] = item.type
            if nested := _nested(item.type):
                keys |= _schema(nested, f"{prefix}{item.name}.")
    return keys


def _nested(hint: Any) -> type | None:
    """The dataclass that `hint` is or may be, if any."""
    return next((arm for arm in (hint, *get_args(hint)) if is_dataclass(arm)), None)


SCHEMA = _schema(Config)


def _read_files(path: Path) -> list[tuple[str, Mapping]]:
    """(name, content without `_base_`) of the base file, if there is one, and of `path`."""
    tree = _read_yaml(path)
    if BASE_KEY not in tree:
        return [(str(path), tree)]
    base_path = path.parent / str(tree.pop(BASE_KEY))
    if not base_path.is_file():
        raise UserError(f"{path}: its {BASE_KEY} {base_path} does not exist")
    base = _read_yaml(base_path)
    if BASE_KEY in base:
        raise UserError(f"{base_path}: it is the {BASE_KEY} of {path} and may not name another")
    return [(str(base_path), base), (str(path), tree)]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"{key.value} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_bytes(), _UniqueKeys)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected the sections DATA, TRAIN and TEST, got {tree!r:.60}")
    return tree


def _full_key(key: str) -> str:
    """The dotted key that `key` ends, or `key` itself when there is none."""
    known = (*SCHEMA, *NO_EFFECT)
    matches = [key] if key in known else [name for name in known if name.endswith(f".{key}")]
    if len(matches) > 1:
        raise UserError(f"--opts: {key} may be {' or '.join(matches)}; name the section")
    return matches[0] if matches else key


def _parse_opt(text: str, hint: Any) -> Any:
    """The value that `text` spells for a key of type `hint`: Python literal, YAML, or text."""
    takes_text = hint in (str, str | None) or get_origin(hint) is Literal
    with suppress(ValueError, SyntaxError, TypeError):
        value = ast.literal_eval(text)
        if not takes_text or value is None or isinstance(value, str):
            return value
    if takes_text:  # what YAML makes of 007, off or 2024-01-01 is no help for a name
        return None if text in ("null", "~", "") else text
    with suppress(yaml.YAMLError, ValueError):
        return yaml.safe_load(text)
    return text


def _assign(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Check one key's value, or those of a mapping below it, into the flat `values`."""
    is_group = any(known.startswith(f"{key}.") for known in (*SCHEMA, *NO_EFFECT))
    if is_group and isinstance(value, Mapping):
        for name, item in value.items():
            _assign(values, f"{key}.{name}", item, source)
    elif key in NO_EFFECT:
        values[key] = value
    elif key in SCHEMA:
        values[key] = _convert(value, SCHEMA[key], f"{source}: {key}")
        for below in [known for known in values if known.startswith(f"{key}.")]:
            del values[below]  # null for a whole group
    else:
        raise UserError(f"{source}: unknown key {key}; {_suggestion(key)}")


def _suggestion(key: str) -> str:
    names = {known.rpartition(".")[2]: known for known in SCHEMA}
    near = get_close_matches(key.rpartition(".")[2], names, 1)
    return f"did you mean {names[near[0]]}?" if near else "config/base.yaml lists the valid ones"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a UserError that starts with `where`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(value, args[0], where)
        for rule in args[1:]:
            if not rule.holds(value):
                raise UserError(f"{where} must {rule.text}, not {_show(value)}")
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        is_list = isinstance(value, list | tuple)
        arm = next((arm for arm in args if is_list and get_origin(arm) is tuple), args[0])
        return _convert(value, arm, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(value) == len(hints):
            pairs = enumerate(zip(value, hints, strict=True))
            return tuple(_convert(item, kind, f"{where}[{i}]") for i, (item, kind) in pairs)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    if hint is float and type(value) in (int, float, str):
        with suppress(ValueError):
            return float(value)  # YAML 1.1 takes 1e-4 for text
    if hint is str and isinstance(value, int | float | date) and not isinstance(value, bool):
        return str(value)
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    kind = kinds.get(hint, "a mapping of its keys")
    if origin is Literal:
        kind = "one of " + ", ".join(args)
    elif origin is tuple:
        kind = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    raise UserError(f"{where} must be {kind}, not {_show(value)}")


def _show(value: Any) -> str:
    """`value` as a YAML file would have it."""
    return "null" if value is None else repr(list(value) if isinstance(value, tuple) else value)


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of `cls` from the flat `values`, with defaults for what is not there."""
    arguments, missing = {}, []
    for item in fields(cls):
        key, nested = prefix + item.name, _nested(item.type)
        if nested and any(known.startswith(f"{key}.") for known in values):
            arguments[item.name] = _build(nested, values, f"{key}.")
        elif key in values:
            arguments[item.name] = values[key]
        elif item.default is MISSING and item.default_factory is MISSING:
            missing.append(item.name)
    if missing:
        raise UserError(f"{prefix.rstrip('.')} lacks {', '.join(missing)}")
    return cls(**arguments)


def _without_effect(values: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for each reason why some of the given keys do nothing."""
    keys: dict[str, list[str]] = {}
    for key in values:
        if key in NO_EFFECT:
            keys.setdefault(NO_EFFECT[key], []).append(key)
    return tuple(f"no effect here: {', '.join(names)} ({why})" for why, names in keys.items())


def _doubtful(config: Config) -> tuple[str, ...]:
    """One line for each pair of values that may be together, and rarely are meant to be."""
    train, test, lines = config.TRAIN, config.TEST, []
    beyond = [epoch for epoch in train.milestones if epoch >= train.epochs]
    if beyond and train.schedule == "milestones":
        lines.append(
            f"TRAIN.milestones {_show(beyond)} are never reached in TRAIN.epochs {train.epochs}"
        )
    fitting = {"nearest": "published", "area": "aligned"}[train.target]
    if test.protocol not in (fitting, "both"):
        lines.append(
            f"TRAIN.target {train.target} goes with TEST.protocol {fitting}, "
            f"and this is {test.protocol}: scores suffer"
        )
    return tuple(lines)
