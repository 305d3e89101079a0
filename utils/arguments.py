"""Command lines of the programs, above all of those that read a config."""

import argparse
from collections.abc import Sequence


def model_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser of `--config` and `--weights`; `parse_with_opts` adds the rest."""
    parser = config_parser(description, epilog)
    text = "checkpoint (default: TEST.weights, or the run's best)"
    parser.add_argument("--weights", metavar="FILE", help=text)
    return parser


def config_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of `--config`; `parse_with_opts` adds the rest."""
    parser = text_parser(description, epilog)
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's YAML file")
    return parser


def text_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help shows these texts line by line, as they are written."""
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=plain)


def check_at_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, **lowest: int
) -> None:
    """End the program with a usage error where an option's number is below its lowest."""
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number from {low}")


def parse_with_opts(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read a command line that ends with `--opts KEY VALUE ...`, if with any."""
    rest = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE"}
    text = "override config values; last on the line, such as --opts TEST.threshold 0.5"
    parser.add_argument("--opts", **rest, help=text)
    args = parser.parse_args(argv)
    late = next((word for word in args.opts if word.startswith("--")), None)
    if late is not None:
        parser.error(f"{late} must stand before --opts, which takes all that follows it")
    return args
