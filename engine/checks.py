"""Check that config, records and checkpoint belong together.

If not, no training starts, unless `DATA.allow_mismatch` is true. Scoring and prediction say so and
go on: it is ordinary to score a model on another data set.
"""

from collections.abc import Mapping

from loguru import logger

from utils.config import Config
from utils.errors import UserError
from utils.records import RecordReader

# What a model was trained with and has to be scored and continued with.
CHECKPOINT_KEYS = ("DATA.dataset", "TRAIN.input_size", "TRAIN.word_len", "TRAIN.num_head")


def check_records(cfg: Config, lmdb: str, split: str) -> None:
    """Refuse an LMDB whose `__meta__` names another data set or split than the config.

    A run on several data sets has a name of its own; its records are checked by split alone.

    Raises:
        UserError: they differ; or the LMDB cannot be read.
    """
    meta = RecordReader(lmdb).meta
    dataset = cfg.DATA.dataset if len(cfg.DATA.train_lmdb) == 1 else meta["dataset"]
    held, expected = (meta["dataset"], meta["split"]), (dataset, split)
    if held != expected:
        _refuse(cfg, f"{lmdb} holds {' '.join(held)}, the config says {' '.join(expected)}")


def check_checkpoint(cfg: Config, state: Mapping, path: str, is_training: bool) -> None:
    """Compare a checkpoint's data set, input size and sentence length with the config's.

    Args:
        state: what the checkpoint holds; the release's does not say what it was trained with,
            and passes, as does one that was trained on several data sets.
        path: of the checkpoint.
        is_training: refuse what differs; else say so.
    Raises:
        UserError: they differ.
    """
    trained, wanted = state.get("config"), cfg.model_dump()
    if not isinstance(trained, Mapping):
        return
    is_of_several = len(trained.get("DATA", {}).get("train_lmdb") or ()) > 1
    faults = []
    for key in CHECKPOINT_KEYS[1:] if is_of_several else CHECKPOINT_KEYS:
        section, name = key.split(".")
        was, now = trained.get(section, {}).get(name), wanted[section][name]
        if was not in (None, now):
            faults.append(f"{key} {was}, the config says {now}")
    told = f"{path} was trained with {'; '.join(faults)}"
    if faults and is_training:
        _refuse(cfg, told)
    elif faults:
        logger.warning(told)


def _refuse(cfg: Config, fault: str) -> None:
    if not cfg.DATA.allow_mismatch:
        raise UserError(f"{fault}; if that is meant, add DATA.allow_mismatch True")
    logger.warning(f"{fault}; DATA.allow_mismatch lets it pass")
