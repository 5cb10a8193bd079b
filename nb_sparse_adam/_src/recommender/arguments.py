# SPDX-License-Identifier: Apache-2.0
"""The options of the command line that say how files of interactions are to be read."""

from __future__ import annotations

import argparse
import math

from nb_sparse_adam._src.recommender.columns import ReadOptions

READING = ("user_column", "item_column", "separator", "header", "min_rating", "rating_column")
"""Names of the arguments, which are those of `read_interactions`, too."""


def add_reading(data: argparse._ArgumentGroup) -> None:
    """Add an argument to a group for each option of `read_interactions`, without the format."""
    for what, text in (
        ("user", "(default: by its name in the header, else the first)"),
        ("item", "(default: by its name in the header, else the second)"),
        ("rating", "for what needs ratings (default: by its name in the header)"),
    ):
        data.add_argument(
            f"--{what}-column",
            metavar="COLUMN",
            help=f"name of the column of {what}s, or its number from 1 {text}",
        )
    data.add_argument(
        "--separator",
        metavar="S",
        help="between columns: comma, tab, semicolon, space, pipe, or characters (default: found out)",
    )
    data.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        help="the first line names the columns, or is an interaction (default: found out, and asked for "
        "where it cannot be told)",
    )
    data.add_argument(
        "--min-rating",
        type=_finite,
        metavar="X",
        help="leave out interactions with a rating below it (default: take all)",
    )


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return what the arguments of `train` say about its files."""
    reading = {name: getattr(arguments, name) for name in READING}
    return ReadOptions(
        arguments.format, **reading, sample_weights=arguments.sample_weights,
        times=arguments.validation == "latest", time_column=arguments.time_column,
    )  # fmt: skip


def refuse_what_needs_files(arguments: argparse.Namespace) -> None:
    """Exit if there is an argument that says something about files, where there are none."""
    given = {"test": arguments.test, "format": None if arguments.format == "auto" else arguments.format}
    given |= {name: getattr(arguments, name) for name in READING}
    given["sample_weights"], given["time_column"] = arguments.sample_weights or None, arguments.time_column
    if arguments.resume is None and arguments.validation == "latest":
        given["validation latest"] = True
    for name, value in given.items():
        if value is not None:
            arguments.parser.error(
                f"--{name.replace('_', '-')} needs INTERACTIONS: without, data are generated and held out"
            )


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value
