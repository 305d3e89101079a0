"""The command line that train.py and test.py share."""

import argparse


def parse_config_arguments(description: str) -> argparse.Namespace:
    """Read `--config FILE [--opts KEY VALUE ...]`.

    Args:
        description: shown by `--help`; the program's docstring.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file below config/")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="override config values; last on the line, such as --opts TRAIN.epochs 5",
    )
    return parser.parse_args()
