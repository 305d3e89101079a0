"""The schema, the files in config/, `--opts`, and the one-line errors."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, tracked, user_error

from model.segmenter import build_segmenter
from utils.config import (
    KEYS,
    NO_EFFECT,
    Config,
    TestConfig,
    TrainConfig,
    base_yaml,
    check_batch,
    load_config,
    save_config,
)
from utils.errors import UserError

CONFIG_DIR = ROOT / "config"
BASE = CONFIG_DIR / "base.yaml"
R50 = CONFIG_DIR / "refcoco" / "cris_r50.yaml"
TINY = CONFIG_DIR / "refshapes" / "cris_tiny.yaml"
LEAK = "datasets/lmdb/refcoco+/testB.lmdb"
SHIPPED = tracked("config/*/*.yaml")

RN50_ARCH = str(load_config(CONFIG_DIR / "refshapes/cris_r50.yaml").TRAIN.clip_arch.model_dump())
FROM_SCRATCH = ["TRAIN.clip_pretrain", "null", "TRAIN.clip_arch", RN50_ARCH]

# An official file, every published key included, in fewer lines.
OFFICIAL = """\
DATA: {dataset: refcocog_g, train_lmdb: datasets/lmdb/refcocog_g/train.lmdb, train_split: train,
  val_lmdb: datasets/lmdb/refcocog_g/val.lmdb, val_split: val,
  mask_root: datasets/masks/refcocog_g}
TRAIN: {clip_pretrain: pretrain/RN101.pt, input_size: 416, word_len: 22, word_dim: 512,
  vis_dim: 512, fpn_in: [512, 1024, 512], fpn_out: [256, 512, 1024], sync_bn: True,
  num_layers: 3, num_head: 8, dim_ffn: 2048, dropout: 0.1, intermediate: False,
  workers: 32, workers_val: 16, epochs: 50, milestones: [35], start_epoch: 0, batch_size: 64,
  batch_size_val: 64, base_lr: 0.0001, lr_decay: 0.1, lr_multi: 0.1, weight_decay: 0.,
  max_norm: 0., manual_seed: 0, print_freq: 100, exp_name: CRIS_R101,
  output_folder: exp/refcocog_g, save_freq: 1, weight: , resume: , evaluate: True}
Distributed: {dist_url: "tcp://localhost:3681", dist_backend: 'nccl',
  multiprocessing_distributed: True, world_size: 1, rank: 0}
TEST: {test_split: val-test, test_lmdb: datasets/lmdb/refcocog_g/val.lmdb, visualize: False}
"""

# The switches that CRIS does not have, at the value that leaves it as published.
SWITCHES = {
    "TRAIN": {"backbone_start": "published", "schedule": "milestones", "target": "nearest"}
    | {"accumulation_steps": 1, "batch_by": "refs", "warmup_steps": 0}
    | {"freeze_token_embedding": False},
    "TEST": {"protocol": "published", "threshold": None, "swap_sentences": False},
}


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def yaml_leaves(node: dict, prefix: str = "") -> dict[str, object]:
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves |= yaml_leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


class TestShippedFiles:
    def test_base_is_written_from_the_schema(self):
        written, due = (text.splitlines() for text in (BASE.read_text("utf-8"), base_yaml()))
        assert written == due, "python -m utils.config writes config/base.yaml anew"

    def test_base_has_every_default_and_explains_every_key_above_or_beside_it(self):
        assert load_config(BASE) == Config()
        written = yaml_leaves(yaml.safe_load(BASE.read_text("utf-8")))
        assert written.keys() == yaml_leaves(Config().model_dump()).keys()
        lines = BASE.read_text("utf-8").splitlines()
        for above, line in itertools.pairwise(lines):
            if re.match(r"  \w+:", line):
                assert "  # " in line or above.startswith("  # "), f"no comment says what {line} is"

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells what is shipped")
    def test_every_shipped_file_is_looked_at_and_no_other(self):
        assert len(SHIPPED) > 12
        assert R50 in SHIPPED
        (mine := CONFIG_DIR / "refcoco/test_of_a_file_beside.yaml").touch()
        try:
            assert mine not in tracked("config/*/*.yaml")
        finally:
            mine.unlink()

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
    def test_thin_file_lists_only_what_differs(self, path):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        base = yaml_leaves(load_config(path.parent / tree.pop("_base_")).model_dump())
        same = {key for key, value in yaml_leaves(tree).items() if base.get(key, ...) == value}
        assert not same

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
    def test_each_file_raises_no_doubt_and_is_saved_and_read_back_equal(self, path, tmp_path):
        assert load_config(path).notices == ()
        config = load_config(path, ["exp_name", "5", "threshold", "0.4", "base_lr", "1e-7"])
        save_config(config, tmp_path / "run" / "config.yaml")
        assert load_config(tmp_path / "run" / "config.yaml") == config
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]

    @pytest.mark.parametrize("name", ["cris_tiny", "cris_small", "cris_r50"])
    def test_refshapes_trains_from_scratch_and_scores_three_splits(self, name):
        config = load_config(CONFIG_DIR / "refshapes" / f"{name}.yaml")
        assert config.TRAIN.clip_pretrain is None
        assert config.TRAIN.clip_arch is not None
        assert config.TRAIN.exp_name == name
        assert (config.DATA.dataset, config.TEST.protocol) == ("refshapes", "both")
        assert config.TEST.splits == ("val", "testA", "testB")
        assert check_batch(config.TRAIN, 2) == config.TRAIN.batch_size // 2


def official(dataset: str, model: str) -> dict:
    """The content of one of the eight official files."""
    tree = yaml.safe_load(OFFICIAL.replace("refcocog_g", dataset))
    if model == "r50":
        names = {"clip_pretrain": "pretrain/RN50.pt", "exp_name": "CRIS_R50"}
        tree["TRAIN"] |= names | {"word_dim": 1024, "fpn_in": [512, 1024, 1024]}
    if not dataset.startswith("refcocog"):
        tree["TRAIN"]["word_len"] = 17
    if dataset == "refcoco+":  # validates on testB, and R101 tests on it too
        tree["DATA"] |= {"val_lmdb": LEAK, "val_split": "testB"}
        if model == "r101":
            tree["TEST"] |= {"test_lmdb": LEAK, "test_split": "testB"}
    return tree


class TestOfficialFiles:
    @pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "refcocog_u", "refcocog_g"])
    @pytest.mark.parametrize("model", ["r50", "r101"])
    def test_each_official_file_loads_unchanged(self, dataset, model, tmp_path):
        config = load_config(write(tmp_path, yaml.safe_dump(official(dataset, model))))
        ours = load_config(CONFIG_DIR / dataset / f"cris_{model}.yaml")
        assert config.TRAIN == ours.TRAIN
        for section, switches in SWITCHES.items():
            assert switches.items() <= ours.model_dump()[section].items()
        if dataset != "refcoco+":
            assert config.model_dump() == ours.model_dump()
            return
        assert ours.DATA.val_lmdb == ours.TEST.test_lmdb == "datasets/lmdb/refcoco+/val.lmdb"
        assert (ours.DATA.val_split, ours.TEST.test_split) == ("val", "val")
        assert (config.DATA.val_lmdb, config.DATA.val_split) == (LEAK, "testB")
        tested = (LEAK, "testB") if model == "r101" else (ours.TEST.test_lmdb, "val")
        assert (config.TEST.test_lmdb, config.TEST.test_split) == tested

    def test_each_reason_why_keys_do_nothing_is_given_once(self, tmp_path):
        config = load_config(write(tmp_path, OFFICIAL), ["TRAIN.evaluate", "False", "rank", "1"])
        assert len(config.notices) == len(set(NO_EFFECT.values()))
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml").notices == ()
        for key, reason in NO_EFFECT.items():
            assert sum(key in line and reason in line for line in config.notices) == 1

    def test_one_split_asked_for_takes_the_place_of_a_files_list(self):
        assert load_config(TINY).TEST.splits == ("val", "testA", "testB")
        assert load_config(TINY, ["TEST.test_split", "testA"]).TEST.splits == ()
        both = ["TEST.test_split", "testA", "TEST.splits", "[val]"]
        assert load_config(TINY, both).TEST.splits == ("val",)

    def test_base_files_chain(self, tmp_path):
        write(tmp_path, "TRAIN: {epochs: 60, word_len: 5}\nTEST: {splits: [val]}\n", "a.yaml")
        write(tmp_path, "_base_: a.yaml\nTRAIN: {epochs: 70}\n", "b.yaml")
        config = load_config(write(tmp_path, "_base_: b.yaml\nTRAIN: {word_len: 6}\n"))
        assert (config.TRAIN.epochs, config.TRAIN.word_len) == (70, 6)
        assert config.TEST.splits == ("val",)

    def test_missing_keys_empty_sections_and_empty_paths_take_the_defaults(self, tmp_path):
        text = "_base_:\nDATA:\nTRAIN: {weight: '', resume: ''}\nTEST:\n  visualize: true\n"
        path = write(tmp_path, text)
        assert load_config(path) == Config(TEST=TestConfig(visualize=True))


class TestValuesThatMayBeMistakes:
    def test_the_small_gpu_config_is_the_published_recipe_but_for_what_saves_memory(self):
        small = load_config(R50.with_name("cris_r50_small_gpu.yaml"))
        ours, published = (config.model_dump()["TRAIN"] for config in (small, load_config(R50)))
        assert {key for key, value in ours.items() if value != published[key]} == {
            *("accumulation_steps", "precision", "recompute_backbone", "recompute_decoder"),
            *("batch_size_val", "exp_name"),
        }
        assert small.TRAIN.batch_size == 64
        assert check_batch(small.TRAIN, world_size=1) >= 8

    @pytest.mark.parametrize(
        ("opts", "line"),
        [
            ("epochs 20 milestones [9,20]", "milestones [20] are never reached in 20 epochs"),
            ("target area", "target area goes with TEST.protocol aligned, not published"),
            ("protocol aligned", "target nearest goes with TEST.protocol published, not aligned"),
            ("target area protocol both", None),
        ],
    )
    def test_values_that_rarely_go_together_are_named(self, opts, line):
        assert load_config(R50, opts.split()).notices == ((f"TRAIN.{line}",) if line else ())

    def test_widths_follow_any_clip_when_they_are_left_out(self):
        names = [*FROM_SCRATCH, "transformer_width", "640", "transformer_heads", "10"]
        config = load_config(BASE, names)
        assert (config.TRAIN.vis_dim, config.TRAIN.fpn_out) == (None, None)
        with torch.device("meta"):
            model = build_segmenter(config)
        neck = model.neck
        assert neck.aggr[0].out_channels == 640
        assert (neck.f3_v_proj[0].out_channels, neck.f1_v_proj[0].out_channels) == (320, 1280)
        line = user_error(load_config, BASE, [*names, "fpn_out", "[256, 512, 1024]"])
        assert "fpn_out[1] 512 does not fit the CLIP: use 640" in line


class TestOpts:
    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("batch_size", {"16": 16}),
            ("TRAIN.base_lr", {"1e-4": 1e-4}),
            ("TRAIN.max_norm", {"1": 1.0}),
            ("TRAIN.milestones", {"(35,)": (35,), "[20, 30]": (20, 30), "[]": ()}),
            ("TRAIN.fpn_in", {"None": None}),
            ("TRAIN.word_dim", {"null": None}),
            ("TRAIN.resume", {"None": None, "": None, "exp/last_model.pth": "exp/last_model.pth"}),
            ("TRAIN.weight", {"'a b.pth'": "a b.pth", "x'": "x'", "'": "'"}),
            ("TRAIN.exp_name", {t: t for t in ("5", "007", "off", "2024-01-01", "a: b #c")}),
            ("TRAIN.sync_bn", {"false": False, "False": False}),
            ("TEST.visualize_limit", {"3": 3}),
            ("TEST.splits", {"[val, testA]": ("val", "testA"), "('val',)": ("val",)}),
            ("TEST.splits", {"testA": ("testA",)}),
            ("TEST.weights", {"~/best.pth": str(Path.home() / "best.pth")}),
            ("TRAIN.output_folder", {"~/exp": str(Path.home() / "exp")}),
            ("protocol", {"aligned": "aligned"}),
            ("DATA.train_lmdb", {"a.lmdb": ("a.lmdb",), "[a, b c.lmdb]": ("a", "b c.lmdb")}),
        ],
    )
    def test_value_is_read_by_the_type_of_its_key(self, key, expected):
        leaf = key.rpartition(".")[2]
        for text, value in expected.items():
            config = load_config(R50, [key, text])
            section = next(s for s in vars(config).values() if hasattr(s, leaf))
            assert getattr(section, leaf) == value
            assert type(getattr(section, leaf)) is type(value)

    def test_later_wins_and_values_need_not_be_text(self):
        opts = ["epochs", "2", "milestones", (2, 4), "word_dim", None, "TRAIN.epochs", 3]
        train = load_config(R50, opts).TRAIN
        assert (train.epochs, train.milestones, train.word_dim) == (3, (2, 4), None)

    def test_every_short_name_but_one_stands_for_one_key(self):
        names = Counter(key.rpartition(".")[2] for key in (*KEYS, *NO_EFFECT))
        assert [name for name, count in names.items() if count > 1] == ["precision"]

    def test_one_field_of_clip_arch_changes_the_one_in_the_file(self):
        arch, file = (
            load_config(TINY, opts).TRAIN.clip_arch
            for opts in (["TRAIN.clip_arch.vision_layers", "[2, 2, 2, 2]"], [])
        )
        assert arch == file.model_copy(update={"vision_layers": (2, 2, 2, 2)})
        assert load_config(TINY, ["vision_layers", "(2, 2, 2, 2)"]).TRAIN.clip_arch == arch

    def test_null_removes_all_of_clip_arch(self):
        opts = ["TRAIN.clip_arch", "null"]
        assert load_config(TINY, opts).TRAIN.clip_arch is None
        line = user_error(load_config, TINY, [*opts, "TRAIN.clip_arch.embed_dim", "96"])
        assert line.endswith("TRAIN.clip_arch.image_resolution is missing")


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("TRAIN: {bach_size: 4}", "key TRAIN.bach_size; did you mean TRAIN.batch_size?"),
            ("TRIAN: {batch_size: 4}", "unknown key TRIAN; did you mean TRAIN?"),
            ("TEST: {batch_size: 4}", "key TEST.batch_size; did you mean TRAIN.batch_size?"),
            ("TRAIN: {lr: 0.1}", "unknown key TRAIN.lr; did you mean TRAIN.base_lr?"),
            ("TRAIN: {optimiser: SGD}", "TRAIN.optimiser; it is Adam, built by build_optimizer in"),
            ("TRAIN: {gpus: 2}", "key TRAIN.gpus; training takes all GPUs that CUDA_VISIBLE_DEV"),
            ("DATA: {root: a}", "DATA.root; DATA.train_lmdb, DATA.val_lmdb and TEST.test_lmdb"),
            ("TRAIN: {zzz: 4}", "unknown key TRAIN.zzz; config/base.yaml lists the valid ones"),
            ("TRAIN: {clip_arch: {depth: 4}}", "unknown key TRAIN.clip_arch.depth"),
            ("TRAIN: {clip_arch: RN50}", "TRAIN.clip_arch must be a mapping of its keys, not"),
            ("TRAIN: 4", "TRAIN must be a mapping of its keys, not 4"),
            ("TRAIN: {on: 1}", "unknown key TRAIN.True; config/base.yaml lists the valid ones"),
            ("1: 2", "unknown key 1; config/base.yaml lists the valid ones"),
            ("TRAIN: {batch_size: 64.0}", "TRAIN.batch_size must be a valid integer, not 64.0"),
            ("TRAIN: {batch_size: true}", "TRAIN.batch_size must be a valid integer, not True"),
            ("TRAIN: {batch_size: }", "TRAIN.batch_size must be a valid integer, not null"),
            ("TRAIN: {batch_size: 0}", "batch_size must be greater than or equal to 1, not 0"),
            ("TRAIN: {base_lr: fast}", "TRAIN.base_lr must be a valid number, not 'fast'"),
            ("TRAIN: {base_lr: true}", "TRAIN.base_lr must be a valid number, not True"),
            ("TRAIN: {base_lr: .nan}", "TRAIN.base_lr must be a finite number, not nan"),
            ("TRAIN: {max_norm: -1}", "max_norm must be greater than or equal to 0, not -1"),
            ("TRAIN: {dropout: 1}", "TRAIN.dropout must be less than 1, not 1"),
            ("TRAIN: {sync_bn: 1}", "TRAIN.sync_bn must be a valid boolean, not 1"),
            ("TRAIN: {exp_name: no}", "TRAIN.exp_name must be a valid string, not False"),
            ("TRAIN: {precision: fp8}", "must be 'auto', 'fp16', 'bf16' or 'fp32', not 'fp8'"),
            ("TRAIN: {wandb: off}", "must be 'disabled', 'offline' or 'online', not False"),
            ("TRAIN: {input_size: 400}", "input_size must be a multiple of 32, not 40"),
            ("TRAIN: {word_len: 1}", "TRAIN.word_len must be greater than or equal to 2"),
            ("TRAIN: {fpn_in: [1, 2]}", "TRAIN.fpn_in[2] is missing"),
            ("TRAIN: {fpn_in: [1, 2, x]}", "TRAIN.fpn_in[2] must be a valid integer, not 'x'"),
            ("TRAIN: {milestones: 35}", "TRAIN.milestones must be a list, not 35"),
            ("TRAIN: {start_epoch: 50}", "TRAIN.start_epoch must be below TRAIN.epochs, 50"),
            ("TRAIN: {vis_dim: 510}", "TRAIN.vis_dim must be a multiple of 4, not 510"),
            ("TRAIN: {weight: a, resume: b}", "to continue) are both set: make one of them null"),
            ("TRAIN: {compile: true, recompute_backbone: true}", "choose one"),
            ("TRAIN: {compile: true, recompute_decoder: true}", "choose one"),
            ("TRAIN: {compile: true, batch_by: images}", "set TRAIN.batch_by to refs"),
            ("TRAIN: {save_every: 5 hours}", "save_every must be a number of steps, or of minutes"),
            ("TRAIN: {save_every: 0}", "TRAIN.save_every must be a number of steps, or of"),
            ("TRAIN:\n  epochs: 5\nTRAIN:\n", ":3: not valid YAML: TRAIN is there twice"),
            ("TRAIN:\n  epochs: 5\n  epochs: 6\n", ":3: not valid YAML: epochs is there twice"),
            ("TEST: {threshold: 1.5}", "TEST.threshold must be less than 1, not 1.5"),
            ("TRAIN:\n  - a\n :", ":3: not valid YAML: "),
            ("TRAIN: {exp_name: 2024-13-99}", ": not valid YAML: "),
            ("\x00", "not valid YAML: "),
            ("", "expected the sections DATA, TRAIN and TEST, got None"),
            ("- TRAIN", "expected the sections DATA, TRAIN and TEST, got ['TRAIN']"),
            ("{[a]: 1}", ":1: not valid YAML: found unhashable key"),
            ('_base_: "a\\0b"', "not valid YAML: embedded null byte"),
            ("_base_: nope.yaml", "nope.yaml: No such file or directory"),
            ("_base_: other.yaml", "its _base_ leads back to it"),
        ],
    )
    def test_a_bad_file_is_one_line_that_names_it(self, text, message, tmp_path):
        write(tmp_path, "_base_: x.yaml\n", "other.yaml")
        path = write(tmp_path, text)
        line = user_error(load_config, path)
        assert message in line
        assert str(tmp_path) in line

    def test_a_fault_names_the_file_that_holds_it_or_all_that_may(self, tmp_path):
        path = write(tmp_path, "_base_: base.yaml\nTRAIN: {epochs: 5}\n")
        base = tmp_path / "base.yaml"
        for text, where in (
            ("TRAIN: {epoch: 4}", f"{base}: unknown key TRAIN.epoch"),
            ("TRAIN: {word_len: 1}", f"{base}: TRAIN.word_len must be"),
            ("TRAIN: {start_epoch: 7}", f"{base} + {path}: TRAIN.start_epoch must be below"),
        ):
            base.write_text(text)
            assert user_error(load_config, path).startswith(where)

    @pytest.mark.parametrize("name", ["absent.yaml", "folder"])
    def test_a_file_that_cannot_be_read(self, name, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(UserError, match=f"config file .*{name}: "):
            load_config(tmp_path / name)

    @pytest.mark.parametrize(
        ("opts", "message"),
        [
            (["TRAIN.epochs", "1", "x"], "--opts takes KEY VALUE pairs; x has no value"),
            (["epocs", "3"], "--opts: unknown key epocs; did you mean TRAIN.epochs?"),
            (["train.epochs", "3"], "unknown key train.epochs; did you mean TRAIN.epochs?"),
            (["precision", "fp16"], "may be TRAIN.precision or TEST.precision; name the section"),
            (["epochs", "1e2"], "--opts: TRAIN.epochs must be a valid integer, not 100.0"),
            (["epochs", "x: : y"], "TRAIN.epochs must be a valid integer, not 'x: : y'"),
            (["wandb", "off"], "must be 'disabled', 'offline' or 'online', not 'off'"),
            (["TRAIN", "null"], "--opts: TRAIN must be a mapping of its keys, not null"),
            (["clip_arch", RN50_ARCH], "TRAIN.clip_pretrain and TRAIN.clip_arch are both set"),
            ([*FROM_SCRATCH, "fpn_in", "[512, 1024, 512]"], "use [512, 1024, 1024] or null"),
            ([*FROM_SCRATCH, "word_dim", "512"], "word_dim 512 does not fit the CLIP: use 1024"),
            ([*FROM_SCRATCH, "context_length", "16"], "word_len 17 exceeds CLIP's context_length"),
            ([*FROM_SCRATCH, "transformer_heads", "4"], "512 must be 64 times transformer_heads 4"),
            ([*FROM_SCRATCH, "vision_width", "63"], "vision_width must be a multiple of 2"),
            ([*FROM_SCRATCH, "vis_dim", "256"], "vis_dim 256 does not fit the CLIP: use 512"),
            (["train_lmdb", "[]"], "DATA.train_lmdb must name one LMDB or several, each once"),
            (["train_lmdb", "[a.lmdb, a.lmdb]"], "each once, not ['a.lmdb', 'a.lmdb']"),
            (["train_lmdb", "[a.lmdb, [b]]"], "DATA.train_lmdb[1] must be a valid string"),
            (["exclude_lmdb", "a.lmdb"], "DATA.exclude_lmdb must be a list, not 'a.lmdb'"),
        ],
    )
    def test_bad_opts_are_one_line(self, opts, message):
        assert message in user_error(load_config, R50, opts)

    def test_yaml_float_without_a_point_is_a_number(self, tmp_path):
        path = write(tmp_path, "TRAIN:\n  base_lr: 1e-4\n  weight_decay: 0\n  exp_name: 5\n")
        train = load_config(path).TRAIN
        assert (train.base_lr, train.weight_decay, train.exp_name) == (1e-4, 0.0, "5")
        assert type(train.weight_decay) is float


class TestChecks:
    def test_batch_is_shared_by_ranks_and_accumulation(self):
        assert check_batch(TrainConfig(), 1) == 64
        assert check_batch(TrainConfig(accumulation_steps=2, sync_bn=False), 4) == 8
        assert check_batch(TrainConfig(batch_size=2), 2) == 1

    @pytest.mark.parametrize(
        ("batch_size", "ranks", "accumulation", "sync_bn", "smallest"),
        [
            *[(10, 4, 1, True, 4), (10, 2, 3, True, 6), (3, 4, 1, True, 4), (3, 4, 1, False, 8)],
            *[(1, 1, 1, True, 2), (4, 1, 4, True, 8), (4, 4, 1, False, 8)],
        ],
    )
    def test_batch_that_cannot_be_shared_names_ones_that_can(
        self, batch_size, ranks, accumulation, sync_bn, smallest
    ):
        train = TrainConfig(batch_size=batch_size, accumulation_steps=accumulation, sync_bn=sync_bn)
        message = rf"{batch_size} must be a multiple of {ranks} x {accumulation} .* {smallest}$"
        with pytest.raises(UserError, match=message):
            check_batch(train, ranks)
        for value in (smallest, smallest + ranks * accumulation):
            check_batch(train.model_copy(update={"batch_size": value}), ranks)
