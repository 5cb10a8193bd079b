# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam train``: its options, what it prints, and what it leaves."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.engine.compilations import LOGGER
from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.recommender import report
from nb_sparse_adam._src.recommender.columns import FORMATS
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, generate, hold_out
from nb_sparse_adam._src.recommender.options import LOSS_NAMES
from nb_sparse_adam._src.recommender.ranking import Quality, popularity_quality
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.recommender import DOMAINS, BPRModel, BPROptions, EpochRecord

_READING = ("user_column", "item_column", "separator", "header", "min_rating", "rating_column")


INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

_HELP = {
    "dim": "length of the vectors",
    "epochs": "passes over the training interactions",
    "batch_size": "interactions in a batch",
    "lr": "learning rate",
    "reg": "weight of the squared norms in the loss",
    "loss": "bpr (Rendle et al. 2009) or softmax (of the item and its negatives, corrected by log Q)",
    "temperature": "what softmax divides scores by",
    "negatives": "items sampled for each interaction, that its user has no training interaction with; with "
    "--in-batch, at most so many others of the batch",
    "popularity": "sample negatives in proportion to their training interactions to this power; 0: uniformly",
    "in_batch": "softmax over the items of a part of the batch, none sampled",
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


def add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a recommender on interactions",
        description="Train a matrix-factorization recommender with the BPR loss (Rendle et al. 2009), "
        "compare it with a popularity ranking on held-out items, and save its vectors.",
    )
    data = train.add_argument_group("data")
    data.add_argument(
        "interactions",
        nargs="*",
        metavar="INTERACTIONS",
        help="files of interactions, all of which are used: delimited text (user, item, further columns "
        "ignored; with or without a header), JSON lines, LightGCN adjacency lines (user item item ...) or "
        "Parquet; text may be packed with gzip or Zstandard, and - is standard input; without a file, about "
        "a million interactions are generated",
    )
    data.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="of the files; auto takes lines separated by spaces for adjacency lines if they differ in "
        "length and no first field comes twice, else for delimited text (default: auto)",
    )
    _add_reading(data)
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--test", metavar="FILE", help="interactions to predict (default: a hold-out)")
    held_out.add_argument(
        "--test-fraction",
        type=_fraction,
        default=0.2,
        metavar="X",
        help="part of every user's items to hold out (default: 0.2)",
    )

    model = train.add_argument_group("model and training")
    for option in fields(BPROptions):
        _add_option(model, option.name, option.default)

    output = train.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("nb-sparse-adam-run"),
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    output.add_argument(
        "--no-progress", action="store_true", help="no progress bar (nor where stderr is no terminal)"
    )
    train.set_defaults(run=_train, parser=train)


def _add_reading(data: argparse._ArgumentGroup) -> None:
    for what, text in (
        ("user", "(default: by its name in the header, else the first)"),
        ("item", "(default: by its name in the header, else the second)"),
        ("rating", "for --min-rating (default: by its name in the header)"),
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
        type=_number(math.isfinite, "a finite number"),
        metavar="X",
        help="leave out interactions with a rating below it (default: take all)",
    )


def _add_option(group: argparse._ArgumentGroup, name: str, default: Any) -> None:
    flag, text = f"--{name.replace('_', '-')}", _HELP[name]
    passes, domain = DOMAINS[name]
    if isinstance(default, bool):
        group.add_argument(flag, action="store_true", help=f"{text} (default: off)")
        return
    text += "" if default is None else " (default: %(default)s)"
    if name in _CHOICES:
        group.add_argument(flag, choices=_CHOICES[name], default=default, help=text)
    elif name == "betas":
        one = _number(lambda x: passes((x, 0.0)), "a number from 0 to below 1")
        text = text.replace("%(default)s", " ".join(map(str, default)))
        group.add_argument(flag, type=one, nargs=2, default=default, metavar=("BETA1", "BETA2"), help=text)
    else:
        metavar = "N" if default is None or isinstance(default, int) else "X"
        group.add_argument(flag, type=_number(passes, domain), default=default, metavar=metavar, help=text)


def _number(passes: Callable[[Any], bool], domain: str) -> Callable[[str], Any]:
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


_fraction = _number(lambda x: 0 < x < 1, "a number between 0 and 1, both excluded")


def _train(arguments: argparse.Namespace) -> int:
    if not arguments.interactions:
        given = {"test": arguments.test, "format": None if arguments.format == "auto" else arguments.format}
        given |= {name: getattr(arguments, name) for name in _READING}
        for name, value in given.items():
            if value is not None:
                arguments.parser.error(
                    f"--{name.replace('_', '-')} needs INTERACTIONS: without, data are generated and held out"
                )
    values = {option.name: getattr(arguments, option.name) for option in fields(BPROptions)}
    options = BPROptions(**{**values, "betas": tuple(arguments.betas)})
    folder = report.prepare_output(arguments.out)
    split, data = _load(arguments, options)
    popularity = popularity_quality(split, options.top)
    model = BPRModel(split, options)
    data["trained_on"] = model.interactions
    if model.interactions < len(split.train):
        print(
            f"{len(split.train) - model.interactions:,} interactions are not trained on: "
            "their users have every item"
        )
    print(f"popularity ranking: {_describe(popularity, options.top)}", flush=True)

    interrupted = False
    with _Progress(model, not arguments.no_progress) as progress:
        try:
            model.fit(progress.on_batch, progress.on_epoch)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print(
            f"interrupted after {len(model.history)} of {options.epochs} epochs: saving what there is",
            flush=True,
        )
    try:
        report.save_model(folder, model)
        quality = None if interrupted else model.history[-1].quality
        quality = quality or model.evaluate()
        report.save_metrics(folder, model, quality, popularity, data, interrupted)
    except KeyboardInterrupt:
        print(f"interrupted again: what was saved is whole, but not complete, in {folder}", file=sys.stderr)
        return INTERRUPTED
    _summarize(quality, popularity, options.top)
    print(f"saved in {folder.resolve()}:")
    for name, content in report.FILES.items():
        print(f"  {name:24} {content}")
    return INTERRUPTED if interrupted else 0


def _load(arguments: argparse.Namespace, options: BPROptions) -> tuple[Split, dict[str, Any]]:
    repeated = 0
    reading = {name: getattr(arguments, name) for name in _READING}
    if arguments.test is not None:
        split = read_split(arguments.interactions, arguments.test, arguments.format, **reading)
        description = split.description
    else:
        interactions: Interactions
        if not arguments.interactions:
            print("no INTERACTIONS given: generating a data set", flush=True)
            interactions = generate(seed=options.seed)
        else:
            interactions = read_interactions(arguments.interactions, arguments.format, **reading)
        pairs, description, repeated = interactions.pairs, interactions.description, interactions.repeated
        print(f"{description}: {len(pairs):,} interactions, {pairs.n_users:,} users, {pairs.n_items:,} items")
        split = hold_out(interactions, arguments.test_fraction, options.seed)
    print(split.description)
    if repeated:
        print(f"{repeated:,} repeated (user, item) pairs were used once")
    for note in split.notes:
        print(note)
    print(f"{len(split.train):,} interactions to train on, {len(split.test):,} to predict", flush=True)
    data = {
        "description": description,
        "generated": not arguments.interactions,
        "users": split.train.n_users,
        "items": split.train.n_items,
        "train_interactions": len(split.train),
        "test_interactions": len(split.test),
    }
    return split, data


class _Progress:
    """A bar on a terminal; a line on stdout for each evaluation, and on stderr when steps are compiled."""

    def __init__(self, model: BPRModel, wanted: bool) -> None:
        self._options, self._bar = model.options, None
        self._handler, self._level = _Handler(self._say), LOGGER.level
        if wanted and sys.stderr.isatty():
            self._bar = require("tqdm", "train", "the progress bar (see --no-progress)").tqdm(
                total=model.interactions * model.options.epochs,
                unit=" interactions",
                unit_scale=True,
                desc=f"epoch 1/{model.options.epochs}",
                dynamic_ncols=True,
            )

    def __enter__(self) -> _Progress:
        LOGGER.addHandler(self._handler)
        LOGGER.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        LOGGER.setLevel(self._level)
        LOGGER.removeHandler(self._handler)
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str, file: Any) -> None:
        if self._bar is None:
            print(line, file=file, flush=True)
        else:
            self._bar.write(line, file=file)

    def on_batch(self, interactions: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(interactions)

    def on_epoch(self, record: EpochRecord) -> None:
        if self._bar is not None:
            self._bar.set_description(
                f"epoch {min(record.epoch + 1, self._options.epochs)}/{self._options.epochs}"
            )
        if record.quality is None:
            return
        line = (
            f"epoch {record.epoch:3}  loss {record.loss:.4f}  {_describe(record.quality, self._options.top)}"
            f"  {record.interactions / record.seconds:,.0f} interactions/s"
        )
        self._say(line, sys.stdout)


class _Handler(logging.Handler):
    """Says what the library logs on stderr."""

    def __init__(self, say: Callable[[str, Any], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it in a line."""
        self._say(record.getMessage(), sys.stderr)


def _describe(quality: Quality, top: int) -> str:
    if not quality.users:
        return f"recall@{top} unknown: no user has both training and held-out items"
    return f"recall@{top} {quality.recall:.4f}  ndcg@{top} {quality.ndcg:.4f}"


def _summarize(quality: Quality, popularity: Quality, top: int) -> None:
    """Print model and baseline one below the other, and what one is to the other."""
    print(f"\n{'':12}{f'recall@{top}':>12}{f'ndcg@{top}':>12}")
    for name, one in (("popularity", popularity), ("this model", quality)):
        print(f"{name:12}{one.recall:12.4f}{one.ndcg:12.4f}")
    if popularity.recall > 0:
        print(
            f"{'ratio':12}{quality.recall / popularity.recall:11.2f}x{quality.ndcg / popularity.ndcg:11.2f}x"
        )
    print()
