"""Train CRIS.

    python train.py --config config/refcoco/cris_r50.yaml
    python train.py --config config/refshapes/cris_tiny.yaml --opts TRAIN.epochs 5
    torchrun --nproc_per_node=8 train.py --config config/refcoco/cris_r50.yaml
    python train.py --dry-run --config config/refcoco/cris_r50.yaml

One process trains on the GPU, or on the CPU where there is none; with several visible GPUs the
first form starts one rank on each. Everything is written to <output_folder>/<exp_name>.
"""

import sys

from engine import resume
from engine.banner import announce
from engine.build import compile_model, settle_memory
from engine.dry_run import dry_run
from engine.evaluator import validation_protocol
from engine.loaders import build_loaders
from engine.optim import build_optimizer, parameter_groups
from engine.run import Run
from engine.trainer import build_scaler, fit, resolve_precision
from utils import distributed
from utils.arguments import config_parser, parse_with_opts
from utils.config import Config, check_batch, load_config
from utils.errors import run_entry_point
from utils.lock import check_locks
from utils.logger import Tracker, setup_logging
from utils.seed import deterministic, seed_everything


def main() -> None:
    """Parse, start the ranks, train, stop."""
    parser = config_parser(__doc__)
    text = "take one step, score one validation batch, say what memory that took, write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    args = parse_with_opts(parser)
    cfg = load_config(args.config, args.opts)
    check_locks()
    if distributed.wants_launch():
        distributed.launch()
        return
    ranks = distributed.start()
    try:
        train(cfg, ranks, args.dry_run)
    finally:
        # After a failure the others may wait for this rank: it leaves at once, torchrun ends them.
        if not isinstance(sys.exception(), Exception):
            distributed.stop()


def train(cfg: Config, ranks: distributed.Ranks, is_dry: bool = False) -> None:
    """Build everything that the config names, and fit while holding the run's folder.

    Args:
        is_dry: take one step and score one batch instead, and write nothing.
    """
    if is_dry:
        cfg = cfg.model_copy(update={"DATA": cfg.DATA.model_copy(update={"cache": None})})
    writes = ranks.is_main and not is_dry
    options, device = cfg.TRAIN, ranks.device
    micro_batch, folder = check_batch(options, ranks.world_size), cfg.run_folder
    setup_logging(None, ranks.is_main)
    seed_everything(options.manual_seed)
    settle_memory(cfg, device)
    with resume.hold_run_folder(cfg, ranks, is_dry) as source:
        model, state = resume.load_start(cfg, device, source)
        train_loader, val_loader = build_loaders(cfg, micro_batch, ranks)
        optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
        if options.compile:
            compile_model(model, device)
        if state is not None:
            resume.restore_optimizer(optimizer, state, source)
        dtype = resolve_precision(options.precision, device)
        # From here on ranks draw different dropout.
        seed_everything(options.manual_seed + ranks.rank)

        accumulation = options.accumulation_steps
        # A checkpoint that was moved away takes up the records and pictures of its run again.
        is_own = resume.is_own_checkpoint(cfg, source)
        keeps = is_own or (source is not None and not options.force)
        last = state if keeps else None
        tracked = (folder if writes else None, options.wandb, options.exp_name, cfg.model_dump())
        # Nothing is written before everything that can be missing has been found.
        with Tracker(*tracked, last) as tracker, deterministic(options.deterministic):
            setup_logging(None if is_dry else folder, ranks.is_main)
            if writes:
                resume.prepare_folder(cfg, keeps)
            run = Run(
                cfg=cfg,
                ranks=ranks,
                folder=folder,
                model=distributed.wrap(model, ranks, options.sync_bn, accumulation == 1),
                optimizer=optimizer,
                scaler=build_scaler(dtype, device),
                dtype=dtype,
                train_loader=train_loader,
                val_loader=val_loader,
                protocols=validation_protocol(cfg.TEST),
                tracker=tracker,
                epoch=options.start_epoch,
            )
            if state is not None:
                resume.resume(run, state, source)
            announce(run, source)
            (dry_run if is_dry else fit)(run)


if __name__ == "__main__":
    run_entry_point(main)
