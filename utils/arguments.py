"""The command line that train.py and test.py share."""

import argparse


def parse_config_arguments(description: str, **switches: str) -> argparse.Namespace:
    """Read `--config FILE [--switch ...] [--opts KEY VALUE ...]`.

    Args:
        description: shown by `--help`; the program's docstring.
        switches: further options without a value, by name, with their help.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file below config/")
    options = {f"--{name.replace('_', '-')}": text for name, text in switches.items()}
    for option, text in options.items():
        parser.add_argument(option, action="store_true", help=text)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="override config values; last on the line, such as --opts TRAIN.epochs 5",
    )
    args = parser.parse_args()
    late = next((word for word in args.opts if word in ("--config", *options)), None)
    if late is not None:
        parser.error(f"{late} must stand before --opts, which takes all that follows it")
    return args
