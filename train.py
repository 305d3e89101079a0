"""Train CRIS.

    python train.py --config config/refcoco/cris_r50.yaml
    python train.py --config config/refshapes/cris_tiny.yaml --opts TRAIN.epochs 5
    torchrun --nproc_per_node=8 train.py --config config/refcoco/cris_r50.yaml

One process trains on the GPU, or the CPU where there is none; with several visible GPUs the first
form starts one rank on each. Everything is written to <output_folder>/<exp_name>.
"""

import argparse
from pathlib import Path

from utils.errors import run as run_main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file below config/")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="override config values, last on the line: --opts TRAIN.epochs 5 TRAIN.workers 4",
    )
    return parser.parse_args()


def main() -> None:
    """Parse, start the ranks, train, stop."""
    args = parse_arguments()
    from utils import distributed
    from utils.config import load_config

    cfg = load_config(args.config, args.opts)
    if distributed.wants_launch():
        distributed.launch()
        return
    ranks = distributed.start()
    try:
        train(cfg, ranks)
    finally:
        distributed.stop()


def train(cfg, ranks) -> None:
    """Build everything that the config names, and fit."""
    import torch
    from loguru import logger

    from engine import trainer
    from engine.build import build_model, evaluation_data, training_data
    from engine.evaluator import resolve_protocols
    from engine.optim import build_optimizer, build_schedule, parameter_groups
    from utils.checkpoint import read_checkpoint
    from utils.config import save_config, to_dict
    from utils.distributed import wrap
    from utils.logger import Tracker, setup_logging
    from utils.seed import seed_everything

    folder = Path(cfg.TRAIN.output_folder) / cfg.TRAIN.exp_name
    seed_everything(cfg.TRAIN.manual_seed + ranks.rank)
