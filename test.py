"""Score a trained model on every sentence of a split, at the photos' own sizes.

    python test.py --config config/refcoco/cris_r50.yaml --opts TEST.test_split testA \\
        TEST.test_lmdb datasets/lmdb/refcoco/testA.lmdb
    python test.py --config config/refcoco/cris_r50.yaml --opts TEST.splits "[val, testA, testB]"

Runs on one device. The scores go to <output_folder>/<exp_name>/test_<dataset>_<split>.json, a line
a sentence to the .jsonl beside it, and a page to look at to report/index.html there.
"""

from loguru import logger

from engine.build import restore_trained
from engine.report.pages import INDEX
from engine.tester import REPORT, find_records, print_table, score_split, write_split
from utils.arguments import config_parser, parse_with_opts
from utils.config import load_config
from utils.distributed import start
from utils.errors import UserError, run_entry_point
from utils.files import check_writable
from utils.logger import setup_logging


def main() -> None:
    """Parse, restore the model, score each split, print the table."""
    args = parse_with_opts(config_parser(__doc__))
    cfg = load_config(args.config, args.opts)
    setup_logging(None, is_main=True)
    for notice in cfg.notices:
        logger.info(notice)
    ranks = start(alone=True)
    model, weights, _ = restore_trained(cfg, ranks.device, None, "TEST.weights")
    files, results, failure = find_records(cfg, weights), [], None
    check_writable(cfg.run_folder)
    try:
        for lmdb in files:
            dataset, scored = score_split(cfg, model, ranks, lmdb, weights)
            results += [result for result, _ in scored]
            try:
                write_split(cfg, dataset, scored)
            except (OSError, UserError) as error:
                failure = error
    finally:  # the scores may have taken an hour: they are printed whatever happens
        if results:
            print_table(results)
    if failure is not None:
        raise failure
    logger.info(f"scores and predictions are in {cfg.run_folder}")
    if cfg.TEST.report:
        logger.info(f"open {cfg.run_folder / REPORT / INDEX} in a browser to look at them")


if __name__ == "__main__":
    run_entry_point(main)
