"""The configuration of a run: a typed schema, YAML files over it, `--opts` over those.

Lowest to highest: the defaults below, the files that `_base_` names (each relative to the file that
names it), the file given with --config, and `--opts KEY VALUE ...`. A key stands here alone, with
its type, limits, default and meaning (the comment): `python -m utils.config` writes all of them to
`config/base.yaml`, and `make format` does so too. Configs of the release, which have no `_base_`
and some keys that mean nothing here (`NO_EFFECT`), load as they are.
"""

import ast
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from utils.errors import UserError
from utils.files import write_text

BASE_KEY = "_base_"
QUOTED = r"^(['\"])(.*)\1$"
AUTO = "auto"  # of TRAIN.resume: the newest whole checkpoint of the run, if there is one
BASE_YAML = Path(__file__).parents[1] / "config/base.yaml"
BASE_HEAD = """\
# Every key, what it does, and its default: RefCOCO with CLIP RN50 as published, plus the switches
# that CRIS does not have, set to what CRIS does. Written from utils/config.py by
# `python -m utils.config`. A file that says `_base_: ../base.yaml` lists only what differs from
# here; `--opts KEY VALUE ...` on the command line goes over both. In paths, ~ is your home folder.
"""

# What other projects call a key, or a sentence where there is none.
GUESSES = {
    "lr": "TRAIN.base_lr",
    "learning_rate": "TRAIN.base_lr",
    "seed": "TRAIN.manual_seed",
    "image_size": "TRAIN.input_size",
    "max_length": "TRAIN.word_len",
    "checkpoint": "TEST.weights",
    "amp": "TRAIN.precision",
    "backbone": "TRAIN.clip_pretrain, the CLIP archive, decides it",
    "optimizer": "it is Adam, built by build_optimizer in engine/optim.py",
    **dict.fromkeys(
        ("gpus", "device"),
        "training takes all GPUs that CUDA_VISIBLE_DEVICES lets it see, or else the CPU",
    ),
    **dict.fromkeys(
        ("root", "data_root", "data_dir"),
        "DATA.train_lmdb, DATA.val_lmdb and TEST.test_lmdb name the records",
    ),
}

# Keys of the release that are accepted everywhere and do nothing: why.
NO_EFFECT = {
    "DATA.mask_root": "masks are stored in the LMDB",
    "TRAIN.evaluate": "validation follows every TRAIN.val_freq epochs",
    "TRAIN.save_freq": "the last and the best checkpoint are written as training goes",
    "TRAIN.intermediate": "the decoder returns its last layer only",
} | {
    f"Distributed.{name}": "ranks and addresses come from torchrun, the backend from the device"
    for name in ("dist_url", "dist_backend", "multiprocessing_distributed", "world_size", "rank")
}


def _as_number(value: Any) -> Any:
    with suppress(ValueError):  # YAML 1.1 takes 1e-4 for text
        return float(value) if type(value) in (int, str) else value
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _distinct(files: tuple[str, ...]) -> tuple[str, ...]:
    if not files or len(set(files)) < len(files):
        raise ValueError("must name one LMDB or several, each once")
    return files


def _interval(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*( steps| minutes)?", text):
        raise ValueError("must be a number of steps, or of minutes such as '10 minutes'")
    return text


# The release's test configs call val so.
Split = Annotated[str, AfterValidator(lambda name: "val" if name == "val-test" else name)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the person's folder
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_as_list), AfterValidator(_distinct)]
Integer = Annotated[int, Field(strict=True)]
Size = Annotated[Integer, Field(ge=1)]
Count = Annotated[Integer, Field(ge=0)]
Pixels = Annotated[Size, Field(multiple_of=32)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_as_number)]
Rate = Annotated[Number, Field(gt=0)]
Amount = Annotated[Number, Field(ge=0)]
Interval = Annotated[str, AfterValidator(_interval)]


class _Group(BaseModel):
    """Keys that stand together; YAML reads some names, such as 5, as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class ClipArch(_Group):
    """Sizes of a CLIP ResNet that is built without an archive; all of them are needed."""

    embed_dim: Size
    image_resolution: Pixels
    vision_layers: tuple[Size, Size, Size, Size]
    vision_width: Annotated[Size, Field(multiple_of=2)]
    context_length: Size
    vocab_size: Size
    transformer_width: Size
    transformer_heads: Size
    transformer_layers: Size


class DataConfig(_Group):
    """Where the records for training and validation lie."""

    dataset: str = "refcoco"  # name of the data set, for file names and tables
    # Records to train on (made by tools/folder2lmdb.py), or a list of several data sets' records.
    train_lmdb: FilePaths = ("datasets/lmdb/refcoco/train.lmdb",)
    train_split: str = "train"  # name of their split
    # With several train_lmdb: leave out the refs on images (by id, or else by name) of these, so
    # that no val or test image is trained on. A single train_lmdb is read whole, as published.
    exclude_lmdb: tuple[FilePath, ...] = ()
    val_lmdb: FilePath = "datasets/lmdb/refcoco/val.lmdb"  # records to validate on
    val_split: str = "val"  # name of their split
    # Folder for the training photos and masks at input_size, made once and read from then on:
    # 0.69 MB a photo and its mask at 416. null: decode JPEGs each time.
    cache: FilePath | None = None
    # Train though config, records and checkpoint are of different data sets, splits or input sizes.
    # Scoring says so and goes on by itself.
    allow_mismatch: StrictBool = False


class TrainConfig(_Group):
    """The model, the recipe, and where the run is written."""

    # --- model ---
    # OpenAI's CLIP archive (or a plain state dict) to start from; null: from scratch by clip_arch.
    clip_pretrain: FilePath | None = "pretrain/RN50.pt"
    # Sizes of a CLIP without an archive, a mapping as in config/refshapes/cris_tiny.yaml.
    clip_arch: ClipArch | None = None
    input_size: Pixels = 416  # side of the square that images are letterboxed into; 32 divides it
    # Tokens a sentence, start and end included; longer ones are cut, shorter ones padded.
    word_len: Annotated[Integer, Field(ge=2)] = 17
    # The next four follow from CLIP where they are null; numbers must agree with it.
    word_dim: Size | None = None  # width of CLIP's sentence vector
    # Width of neck output and decoder, that of CLIP's text transformer; num_head divides it.
    vis_dim: Annotated[Size, Field(multiple_of=4)] | None = None
    fpn_in: tuple[Size, Size, Size] | None = None  # channels of the three backbone maps
    # Widths inside the neck at stride 8, 16 and 32: the second is vis_dim. null: half of it, once
    # and twice, which for RN50 and RN101 are the published 256, 512 and 1024.
    fpn_out: tuple[Size, Size, Size] | None = None
    sync_bn: StrictBool = True  # batch norm over the samples of all ranks
    num_layers: Size = 3  # of the decoder
    num_head: Size = 8  # attention heads in each of its layers
    dim_ffn: Size = 2048  # hidden width of its feed-forward part
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1  # in it, attention weights included

    # --- loading ---
    workers: Count = 32  # loader processes of a machine, for all its ranks; at most one a core
    workers_val: Count = 16  # the same for validation

    # --- recipe ---
    epochs: Size = 50  # passes over the refs; each visit of a ref draws one of its sentences
    # How the rates fall: at milestones (published), or along half a cosine to 0 over all epochs.
    schedule: Literal["milestones", "cosine"] = "milestones"
    milestones: tuple[Size, ...] = (35,)  # epochs after which rates are multiplied by lr_decay
    start_epoch: Count = 0  # epoch to count from; a resumed checkpoint brings its own
    batch_size: Size = 64  # refs an optimiser step; ranks x accumulation_steps divides it
    batch_size_val: Size = 64  # sentences a validation step, over all ranks
    accumulation_steps: Size = 1  # passes whose gradients add up to an optimiser step
    # What stands side by side in a batch: refs at random (published), or all refs of an image,
    # which is then encoded once for them: cheaper, and every sentence meets its distractors.
    batch_by: Literal["refs", "images"] = "refs"
    base_lr: Rate = 1e-4  # Adam's rate for the head
    lr_decay: Rate = 0.1  # what the rates are multiplied by at each milestone
    lr_multi: Amount = 0.1  # the backbone's rate over the head's, from epoch 2
    # The backbone's rate in epoch 1: published (base_lr, as in the release), or lr_multi times it.
    backbone_start: Literal["published", "lr_multi"] = "published"
    freeze_token_embedding: StrictBool = False  # keep CLIP's as it is; published: trained
    warmup_steps: Count = 0  # over which both rates rise linearly from 0; 0: none, as published
    weight_decay: Amount = 0.0  # Adam's L2 penalty
    max_norm: Amount = 0.0  # largest norm of the gradient, loss scaling undone; 0: no clipping
    # auto (fp16 on CUDA, fp32 on the CPU), fp16 (with loss scaling), bf16 or fp32.
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    # Gradient checkpointing: keep only what enters each block of CLIP's two encoders, and compute
    # the rest again in the backward pass: less memory, more time, same numbers (docs/memory.md).
    recompute_backbone: StrictBool = False
    recompute_decoder: StrictBool = False  # the same for the layers of the decoder
    # Compile the training pass with torch.compile: minutes at the first step, faster steps then;
    # other last bits, other dropout. Needs a C++ compiler on the CPU; not with recompute_*.
    compile: StrictBool = False
    # Two runs give the same bits on a GPU too, by slower algorithms (docs/memory.md).
    deterministic: StrictBool = False
    # How masks shrink to the logits' size: nearest (published), or area for TEST.protocol aligned.
    target: Literal["nearest", "area"] = "nearest"
    val_freq: Size = 1  # epochs from one validation and checkpoint to the next; the last has both
    # Sentences of a ref that validation scores: all, as the test does, or the first (CRIS's own).
    val_sentences: Literal["all", "first"] = "all"
    val_pictures: Count = 4  # sentences drawn after each validation, each on another photo
    # Checkpoints within an epoch: every so many steps (500) or minutes (10 minutes); null: none.
    # Beside last_model.pth the newest keep_checkpoints are kept as step_<step>.pth.
    save_every: Interval | None = None
    keep_checkpoints: Size = 2  # no effect without save_every
    manual_seed: Count = 0  # of weights, order of refs, choice of sentences and dropout

    # --- run ---
    print_freq: Size = 100  # steps between two lines in the log
    exp_name: str = "CRIS_R50"  # the run is written to <output_folder>/<exp_name>
    output_folder: FilePath = "exp/refcoco"  # folder of runs
    weight: FilePath | None = None  # checkpoint whose weights to start a new training from
    # Checkpoint (last_model.pth of a run) to continue exactly where it stopped; auto: the newest
    # whole one in the run's folder, or a new training where there is none. One of another run's
    # folder is refused where there are checkpoints already.
    resume: FilePath | None = None
    # Write to the run's folder even if another process is training there, an earlier training has
    # left its checkpoints (one that begins there removes them), or it has scores of other records.
    force: StrictBool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # or offline, online: W&B

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight is not None and self.resume not in (None, AUTO):
            raise UserError(
                "TRAIN.weight (to start from) and TRAIN.resume (to continue) are both set: make "
                "one of them null"
            )
        if self.start_epoch >= self.epochs:
            raise UserError(f"TRAIN.start_epoch must be below TRAIN.epochs, {self.epochs}")
        if self.compile and (self.recompute_backbone or self.recompute_decoder):
            raise UserError("TRAIN.compile and TRAIN.recompute_* are both true: choose one")
        if self.compile and self.batch_by == "images":
            raise UserError("TRAIN.compile needs batches of one shape: set TRAIN.batch_by to refs")
        if self.clip_arch is not None:
            if self.clip_pretrain is not None:
                raise UserError(
                    "TRAIN.clip_pretrain and TRAIN.clip_arch are both set: make one of them null"
                )
            check_clip_dims(self, self.clip_arch)
        return self


class TestConfig(_Group):
    """Say what test.py scores, and how."""

    test_split: Split = "val"  # to score; val-test, CRIS's name for val, is read as val
    test_lmdb: FilePath = "datasets/lmdb/refcoco/val.lmdb"  # its records
    # Several splits in one run, such as [val, testA, testB], each from <split>.lmdb in the folder
    # of test_lmdb; []: only test_split. TEST.test_split in --opts takes the place of the list.
    splits: Annotated[tuple[Split, ...], BeforeValidator(_as_list)] = ()
    weights: FilePath | None = None  # checkpoint to score; null: best_model.pth of the run
    # How logits become a mask: published (corners aligned, threshold 0.35), aligned (pixel centres
    # aligned, threshold 0.5; goes with TRAIN.target area), or both, one table each.
    protocol: Literal["published", "aligned", "both"] = "published"
    # Probability above which a pixel is foreground; null: the protocol's.
    threshold: Annotated[Number, Field(gt=0, lt=1)] | None = None
    # Where some sentences are true of nothing (gRefCOCO): a prediction of fewer foreground pixels,
    # at the photo's size, says "nothing" and is emptied; 1: only one without any pixel.
    no_target_pixels: Size = 50
    # What the model computes in: fp32; tf32, bf16, fp16: faster on a GPU, slightly other masks.
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    visualize: StrictBool = False  # write photos with ground truth, prediction and IoU
    visualize_limit: Count | None = None  # at most so many a split; null: all
    # Write report/index.html in the run's folder: numbers, charts, and every sentence to look at.
    report: StrictBool = False
    report_limit: Size | None = None  # sentences a split to look at, worst to best; null: all
    report_photo_size: Size = 384  # longest side of the report's photos in pixels
    swap_sentences: StrictBool = False  # give each ref the sentences of another one of its image

    __test__ = False  # pytest: no test class


class Config(_Group):
    """A resolved configuration."""

    DATA: DataConfig = DataConfig()
    TRAIN: TrainConfig = TrainConfig()
    TEST: TestConfig = TestConfig()
    _ignored: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines about keys without effect and values that rarely go together."""
        train, protocol, lines = self.TRAIN, self.TEST.protocol, list(self._ignored)
        late = [epoch for epoch in train.milestones if epoch >= train.epochs]
        if late and train.schedule == "milestones":
            lines.append(f"TRAIN.milestones {late} are never reached in {train.epochs} epochs")
        fitting = {"nearest": "published", "area": "aligned"}[train.target]
        if protocol not in (fitting, "both"):
            lines.append(
                f"TRAIN.target {train.target} goes with TEST.protocol {fitting}, not {protocol}"
            )
        return tuple(lines)

    @property
    def run_folder(self) -> Path:
        """Where the run is written: `<output_folder>/<exp_name>`."""
        return Path(self.TRAIN.output_folder) / self.TRAIN.exp_name


def load_config(path: str | Path, opts: Iterable[str] = ()) -> Config:
    """Read a YAML file, the files below it by `_base_`, and `--opts` over both.

    Args:
        path: a thin file of ours, a saved config, or one of the release.
        opts: flat KEY, VALUE, KEY, VALUE ...; a key may leave out its section; values are Python
            literals, YAML, or else text; the last one wins.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type or value, or values
            that contradict each other.
    """
    opts = [str(opt) for opt in opts]
    if len(opts) % 2:
        raise UserError(f"--opts takes KEY VALUE pairs; {opts[-1]} has no value")
    files, values, sources = _read_files(Path(path)), {}, {}
    for name, tree in files.items():
        _merge(values, tree, name, sources)
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        key = _full_key(key)
        tree = _parse_opt(text, KEYS.get(key))
        for name in reversed(key.split(".")):
            tree = {name: tree}
        _merge(values, tree, "--opts", sources)
        if key == "TEST.test_split":  # the one split asked for, whatever list the file has
            _merge(values, {"TEST": {"splits": []}}, "--opts", sources)
    ignored = _remove_without_effect(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        key, text = _first_fault(error)
        several = " + ".join([*files, "--opts"] if opts else files)
        raise UserError(f"{sources.get(key, several)}: {text}") from None
    config._ignored = tuple(ignored)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write every key as YAML, whole or not at all; `load_config(path)` gives an equal config."""
    write_text(path, yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def base_yaml() -> str:
    """Return the text of `config/base.yaml`: the comments, keys and defaults of the sections."""
    text = BASE_HEAD
    for section, values in Config().model_dump(mode="json").items():
        text += f"\n{section}:\n"
        source = inspect.getsource(Config.model_fields[section].annotation)
        for line in source.splitlines()[3:]:
            if field := re.match(r"    (\w+): .*? = .*?(  # .*)?$", line):
                key, meaning = field.groups(default="")
                value = yaml.safe_dump([values[key]], default_flow_style=True, width=200)[1:-2]
                text += f"  {key}: {value}{meaning}\n"
            elif line and not line.startswith("    # "):
                break
            else:
                text += f"{line[2:]}\n"
        text = text.rstrip() + "\n"
    return text


def check_batch(train: TrainConfig, world_size: int) -> int:
    """Return the samples a rank and forward pass: batch_size / (ranks x accumulation_steps).

    Raises:
        UserError: it does not divide, or a batch norm would see a single sample.
    """
    shares = world_size * train.accumulation_steps
    smallest = shares * (1 if train.sync_bn and world_size > 1 else 2)
    if train.batch_size % shares or train.batch_size < smallest:
        raise UserError(
            f"TRAIN.batch_size {train.batch_size} must be a multiple of {world_size} x "
            f"{train.accumulation_steps} (ranks x TRAIN.accumulation_steps) and, for batch norm, "
            f"at least {smallest}"
        )
    return train.batch_size // shares


def check_clip_dims(train: TrainConfig, arch: ClipArch) -> None:
    """Refuse widths and lengths that do not fit the CLIP.

    Args:
        arch: `TRAIN.clip_arch`, or an archive's sizes (`model.clip.ClipSizes`).
    """
    width = arch.transformer_width
    if width != 64 * arch.transformer_heads:
        raise UserError(
            f"the CLIP's transformer_width {width} must be 64 times "
            f"transformer_heads {arch.transformer_heads}"
        )
    for name, given, fitting in (
        ("fpn_in", train.fpn_in, (8 * arch.vision_width, 16 * arch.vision_width, arch.embed_dim)),
        ("word_dim", train.word_dim, arch.embed_dim),
        ("vis_dim", train.vis_dim, width),
        ("fpn_out[1]", train.fpn_out and train.fpn_out[1], width),
    ):
        if given not in (None, fitting):
            raise UserError(
                f"TRAIN.{name} {_show(given)} does not fit the CLIP: use {_show(fitting)} or null"
            )
    if train.word_len > arch.context_length:
        raise UserError(
            f"TRAIN.word_len {train.word_len} exceeds CLIP's context_length {arch.context_length}"
        )


def _keys(group: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return every dotted key below `group`, groups included, with its type."""
    keys: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        keys[prefix + name] = field.annotation
        for arm in (field.annotation, *get_args(field.annotation)):
            if isinstance(arm, type) and issubclass(arm, BaseModel):
                keys |= _keys(arm, f"{prefix}{name}.")
    return keys


KEYS = _keys(Config)


def _read_files(path: Path, above: tuple[Path, ...] = ()) -> dict[str, dict]:
    """Return, by name, the content of the files below `path` and of `path`, lowest first."""
    tree, own = _read_yaml(path), path.resolve()
    if own in above:
        raise UserError(f"{path}: its {BASE_KEY} leads back to it")
    base = tree.pop(BASE_KEY, None)
    below = path.parent / os.path.expanduser(str(base))
    return (_read_files(below, (*above, own)) if base else {}) | {str(path): tree}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                fault = f"{key.value} is there twice"
                raise yaml.MarkedYAMLError(problem=fault, problem_mark=key.start_mark)
            seen.append(key.value)
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
    return {name: {} if keys is None else keys for name, keys in tree.items()}


def _full_key(key: str) -> str:
    """Return the dotted key that `key` ends, or `key` itself when there is none."""
    known = (*KEYS, *NO_EFFECT)
    matches = [key] if key in known else [name for name in known if name.endswith(f".{key}")]
    if len(matches) > 1:
        raise UserError(f"--opts: {key} may be {' or '.join(matches)}; name the section")
    if not matches:
        raise UserError(f"--opts: unknown key {key}; {_suggestion(key)}")
    return matches[0]


def _parse_opt(text: str, hint: Any) -> Any:
    """Return what `text` spells for a key of type `hint`: text, Python literal, or YAML."""
    if hint in (str, FilePath | None) or get_origin(hint) is Literal:
        # What Python or YAML makes of 007, off or 2024-01-01 is no help for a name.
        return None if text in ("None", "null", "~", "") else re.sub(QUOTED, r"\2", text)
    for read in (ast.literal_eval, yaml.safe_load):
        with suppress(ValueError, SyntaxError, TypeError, yaml.YAMLError):
            return read(text)
    return text


def _merge(values: dict, tree: Mapping, source: str, sources: dict, prefix: str = "") -> None:
    """Write the keys of `tree` over those of `values`, and note where each comes from."""
    for key, value in tree.items():
        name = str(key)  # YAML reads on, 1 and 2024-01-01 as something else
        sources[prefix + name] = source
        if isinstance(value, Mapping):
            if not isinstance(values.get(name), dict):
                values[name] = {}
            _merge(values[name], value, source, sources, f"{prefix}{name}.")
        else:
            values[name] = None if value == "" else value  # as in --opts


def _remove_without_effect(values: dict[str, Any]) -> list[str]:
    """Remove the keys of `NO_EFFECT`; return one line for each reason why some do nothing."""
    found: dict[str, list[str]] = {}
    for key, reason in NO_EFFECT.items():
        section, name = key.split(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            del values[section][name]
            found.setdefault(reason, []).append(key)
    if not values.get("Distributed", True):
        del values["Distributed"]
    return [f"no effect here: {', '.join(names)} ({why})" for why, names in found.items()]


def _suggestion(key: str) -> str:
    name = key.rpartition(".")[2]
    names = {known.rpartition(".")[2]: known for known in KEYS} | GUESSES
    near = [name] if name in names else get_close_matches(name, names, 1)
    if not near:
        return "config/base.yaml lists the valid ones"
    answer = names[near[0]]
    return answer if " " in answer else f"did you mean {answer}?"


def _first_fault(error: ValidationError) -> tuple[str, str]:
    """Return the key at fault, "" for several, and a line that names it and what is wrong."""
    faults = error.errors(include_url=False)
    fault = max(faults, key=lambda fault: fault["type"] == "extra_forbidden")
    text, value = fault["msg"].removeprefix("Value error, "), _show(fault["input"])
    if isinstance(fault.get("ctx", {}).get("error"), UserError):
        return "", text
    key = ".".join(part for part in fault["loc"] if isinstance(part, str))
    if fault["type"] == "extra_forbidden":
        return key, f"unknown key {key}; {_suggestion(key)}"
    entry = key + "".join(f"[{part}]" for part in fault["loc"] if isinstance(part, int))
    if fault["type"] == "missing":
        return key, f"{entry} is missing"
    text = re.sub(r"^\w+ should", "must", text).replace("a valid tuple", "a list")
    text = re.sub("a valid dictionary or .*", "a mapping of its keys", text)
    return key, f"{entry} {text}, not {value}"


def _show(value: Any) -> str:
    """Return `value` as a YAML file would have it."""
    return "null" if value is None else repr(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    BASE_YAML.write_text(base_yaml(), encoding="utf-8")
