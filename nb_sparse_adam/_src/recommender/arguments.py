# SPDX-License-Identifier: Apache-2.0
"""Options of the command line: how files of interactions are to be read, and how a model is trained."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.recommender.columns import ReadOptions
from nb_sparse_adam._src.recommender.options import DOMAINS, LOSS_NAMES, BPROptions

_HELP = {
    "dim": "length of the vectors",
    "epochs": "passes over the training interactions",
    "batch_size": "interactions in a batch",
    "lr": "learning rate",
    "reg": "weight of the squared norms in the loss (default: 0.15 for softmax, 0.03 for bpr)",
    "loss": "softmax (of the item and its negatives, corrected by log Q) or bpr (Rendle et al. 2009)",
    "temperature": "what softmax divides scores by",
    "negatives": "items sampled for each interaction, that its user has no training interaction with; with "
    "--in-batch, at most so many others of the batch (default: 63 then, else 20 for softmax, 5 for bpr)",
    "popularity": "sample negatives in proportion to their training interactions to this power; 0: uniformly",
    "in_batch": "softmax over the items of a part of the batch, none sampled (default: with softmax, unless "
    "--popularity is given)",
    "init_std": "standard deviation of the initial vectors",
    "seed": "of the hold-out, the initial vectors, the order, the samples (and the data, if generated)",
    "top": "k of recall@k and NDCG@k",
    "eval_every": "epochs between evaluations; 0: after the last epoch only",
    "step_counts": "what Adam's step counts count: active steps of an element, of a row, or all steps",
    "eps_hat": "add eps before the bias correction of the second moment, as torch does",
    "betas": "Adam's decay rates",
    "eps": "Adam's epsilon",
    "threads": "threads to use (default: as many, of those that numba would use, as are fastest at the time)",
}

_CHOICES: dict[str, tuple[str, ...]] = {"step_counts": STEP_COUNTS, "loss": LOSS_NAMES}

_FLAGS = ("in_batch", "eps_hat")

_READING = ("user_column", "item_column", "separator", "header", "min_rating", "rating_column")
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
        type=number(math.isfinite, "a finite number"),
        metavar="X",
        help="leave out interactions with a rating below it (default: take all)",
    )


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the arguments that `add_reading` has added say, as `read_interactions` takes it."""
    return {name: getattr(arguments, name) for name in _READING}


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return what the arguments of `train` say about its files."""
    return ReadOptions(
        arguments.format, **reading_of(arguments), sample_weights=arguments.sample_weights,
        times=arguments.validation == "latest", time_column=arguments.time_column,
    )  # fmt: skip


def refuse_what_needs_files(arguments: argparse.Namespace) -> None:
    """Exit if there is an argument that says something about files, where there are none."""
    given = {"test": arguments.test, "format": None if arguments.format == "auto" else arguments.format}
    given |= reading_of(arguments)
    given["sample_weights"], given["time_column"] = arguments.sample_weights or None, arguments.time_column
    if arguments.resume is None and arguments.validation == "latest":
        given["validation latest"] = True
    for name, value in given.items():
        if value is not None:
            arguments.parser.error(
                f"--{name.replace('_', '-')} needs INTERACTIONS: without, data are generated and held out"
            )


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add an argument to a group for each of `BPROptions`; None is what was not given."""
    for option in fields(BPROptions):
        name = option.name
        default: Any = option.default
        flag, text = f"--{name.replace('_', '-')}", _HELP[name]
        passes, domain = DOMAINS[name]
        if name in _FLAGS:
            text += "" if default is None else f" (default: {'on' if default else 'off'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif name in _CHOICES:
            group.add_argument(flag, choices=_CHOICES[name], help=f"{text} (default: {default})")
        elif name == "betas":
            one, shown = number(_betas, "a number from 0 to below 1"), " ".join(map(str, default))
            text += f" (default: {shown})"
            group.add_argument(flag, type=one, nargs=2, metavar=("BETA1", "BETA2"), help=text)
        else:
            text += "" if default is None else f" (default: {default})"
            metavar = "X" if isinstance(default, float) or name == "reg" else "N"
            group.add_argument(flag, type=number(passes, domain), metavar=metavar, help=text)


def _betas(x: Any) -> bool:
    return DOMAINS["betas"][0]((x, 0.0))


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the options that `add_options` has added."""
    values = {option.name: getattr(arguments, option.name) for option in fields(BPROptions)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def number(passes: Callable[[Any], bool], domain: str) -> Callable[[str], Any]:
    """Return a converter for argparse that takes the numbers that pass."""

    def convert(text: str) -> Any:
        value: Any = math.nan
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                continue
        if not passes(value):
            raise argparse.ArgumentTypeError(f"expected {domain}, got {text!r}")
        return value

    return convert


_BETWEEN = "a number between 0 and 1, both excluded"
fraction = number(lambda x: 0 < x < 1, _BETWEEN)
count = number(lambda x: isinstance(x, int) and x >= 1, "an integer of at least 1")


def fraction_or_latest(text: str) -> Any:
    """Convert for argparse: a fraction, or the word."""
    return text if text == "latest" else number(lambda x: 0 < x < 1, f"latest, or {_BETWEEN}")(text)
