# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam train``: its options, what it prints, and what it leaves."""

from __future__ import annotations

import argparse
import inspect
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.files import write_whole
from nb_sparse_adam._src.recommender import report
from nb_sparse_adam._src.recommender.arguments import (
    add_options,
    add_reading,
    count,
    fraction,
    fraction_or_latest,
    given_options,
    read_options,
    refuse_what_needs_files,
)
from nb_sparse_adam._src.recommender.columns import FORMATS
from nb_sparse_adam._src.recommender.factorization import MatrixFactorization
from nb_sparse_adam._src.recommender.given import Given, validation_split
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, generate, hold_out
from nb_sparse_adam._src.recommender.page import recommendations_page, titles_of
from nb_sparse_adam._src.recommender.progress import Progress, describe
from nb_sparse_adam._src.recommender.ranking import Quality, evaluate, popularity_quality
from nb_sparse_adam._src.recommender.reading import read_given, read_given_split, what_of_repeated
from nb_sparse_adam._src.recommender.saved import Saved, read_model, write_model
from nb_sparse_adam._src.recommender.search import Search, describe_trial, searched, table
from nb_sparse_adam._src.recommender.signals import Signals
from nb_sparse_adam._src.recommender.training import Unfinished
from nb_sparse_adam.errors import CheckpointError, OptionError
from nb_sparse_adam.recommender import BPRModel, BPROptions

INTERRUPTED, TERMINATED = 130, 143  # what a shell reports for a command that Ctrl-C, or SIGTERM, ended
_OF_A_RESUMED = ("epochs", "top", "eval_every", "threads")  # options that may be others
_PATIENCE, _VALIDATION = 3, 0.1  # of a search, if they are not given


def add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a recommender on interactions",
        description="Train a matrix-factorization recommender with a softmax over items or the BPR loss "
        "(Rendle et al. 2009), compare it with a popularity ranking on held-out items, and save its vectors.",
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
    add_reading(data)
    data.add_argument(
        "--sample-weights",
        action="store_true",
        help="ratings (stars, times played) are the weights of interactions in the loss: greater than 0, and "
        "those of repeated pairs are added (default: all interactions count the same)",
    )
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--test", metavar="FILE", help="interactions to predict (default: a hold-out)")
    held_out.add_argument(
        "--test-fraction",
        type=fraction,
        default=0.2,
        metavar="X",
        help="part of every user's items to hold out (default: 0.2)",
    )

    data.add_argument(
        "--validation",
        type=fraction_or_latest,
        metavar="X|latest",
        help="part of every user's other items to hold out too, at random, or the latest tenth of them: "
        "evaluations are of these, so that options can be chosen without a look at the test",
    )
    data.add_argument(
        "--time-column",
        metavar="COLUMN",
        help="name of the column of times, or its number from 1, for --validation latest: numbers, or dates "
        "of ISO 8601 (default: by its name in the header)",
    )

    model = train.add_argument_group("model and training")
    add_options(model)
    model.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="stop when so many evaluations of the validation have brought no better recall, and go back to "
        "the best one (needs --validation)",
    )
    model.add_argument(
        "--search",
        type=count,
        metavar="N",
        help="try N settings of the options that are not given, the first by default, the others at random; "
        "the one with the best recall on the validation is the run (with --validation 0.1 and --patience 3 "
        "if they are not given)",
    )

    output = train.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: nb-sparse-adam-run, or with --resume its RUN)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    output.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with a run, to its number of epochs or another, with its interactions and options, and "
        "the bits of training that never stopped",
    )
    output.add_argument(
        "--titles",
        metavar="FILE",
        help="CSV with the ids of items and their titles, for recommendations.html",
    )
    output.add_argument(
        "--no-progress", action="store_true", help="no progress bar (nor where stderr is no terminal)"
    )
    train.set_defaults(run=_train, parser=train)


class _Data(NamedTuple):
    """What is trained on and evaluated."""

    inner: Split  # what evaluations during training are of
    split: Split  # with all that is not test, for the last evaluation
    description: dict[str, Any]  # for people


class _Run(NamedTuple):
    """What is trained, and on what."""

    model: BPRModel
    data: _Data


def _train(arguments: argparse.Namespace) -> int:
    given = given_options(arguments)
    _check_together(arguments, given)
    out = arguments.out or arguments.resume or Path("nb-sparse-adam-run")
    folder = report.prepare_output(out)
    _refuse_run(arguments, folder)
    if arguments.resume is not None:
        run = _resumed(arguments, given)
    else:
        options = BPROptions(**given)
        data = _load(arguments, options)
        run = _Run(BPRModel(data.inner, options), data)
        _describe(run)
    titles = None
    if arguments.titles is not None:  # now: after the training would be late to refuse it
        titles = titles_of(arguments.titles, run.data.split.item_ids)
    top = run.model.options.top
    popularity = popularity_quality(run.data.split, top)
    print(f"popularity ranking: {describe(popularity, top)}", flush=True)

    signals = Signals()
    run, search, interrupted = _trained(run, arguments, given, signals)
    if search is not None and search.best is None:
        if not interrupted:
            raise OptionError("--search: every trial has diverged, or there is nothing to evaluate")
        print("interrupted before a trial was done: there is nothing to save", flush=True)
        return _status(signals)
    model = run.model
    if interrupted:
        done = f"{model.n_epochs} of {model.options.epochs} epochs"
        if search is not None:
            done = f"{len(search.trials)} of {arguments.search} trials"
        print(
            f"interrupted after {done}: saving what there is"
            + ("" if search is not None else f"; --resume {folder} goes on"),
            flush=True,
        )
    elif model.n_epochs < len(model.history):
        print(f"the best evaluation was after epoch {model.n_epochs}: back to it", flush=True)
    try:
        report.save_model(folder, model)
        saved = _saved(run)
        write_model(folder, saved)
        source = run.data.description["description"]
        page = recommendations_page(MatrixFactorization._of(saved), source, titles)
        write_whole(folder / "recommendations.html", page)
        report.save_search(folder, None if search is None else table(search.trials))
        quality = _last_quality(run, interrupted)
        report.save_metrics(folder, model, quality, popularity, run.data.description, interrupted)
    except KeyboardInterrupt:
        print(f"interrupted again: what was saved is whole, but not complete, in {folder}", file=sys.stderr)
        return INTERRUPTED
    _summarize(quality, popularity, top)
    print(f"saved in {folder.resolve()}:")
    for name, content in report.FILES.items():
        if (folder / name).exists():
            print(f"  {name:24} {content}")
    return _status(signals) if interrupted else 0


def _status(signals: Signals) -> int:
    return TERMINATED if signals.arrived == signal.SIGTERM else INTERRUPTED


def _trained(
    run: _Run, arguments: argparse.Namespace, given: Mapping[str, Any], signals: Signals
) -> tuple[_Run, Search | None, bool]:
    """Train, or search; return the run, the search, if any, and whether it was interrupted."""
    bar = not arguments.no_progress and sys.stderr.isatty()
    search = Search(run.data.inner, given, arguments.patience) if arguments.search is not None else None
    interrupted = False
    with signals:
        try:
            if search is not None:
                _search(search, arguments.search, bar, signals)
            else:
                with Progress(run.model, bar=bar, lines="evaluations") as progress:

                    def on_batch(interactions: int, loss: float) -> None:
                        progress.on_batch(interactions, loss)
                        signals.check()

                    run.model.fit(on_batch, progress.on_epoch, arguments.patience)
        except KeyboardInterrupt:
            interrupted = True
    if search is not None and search.best is not None:
        run = run._replace(model=search.best)
    return run, search, interrupted


def _search(search: Search, trials: int, bar: bool, signals: Signals) -> None:
    """Try settings, and print a line on each."""
    names = searched(search.given)
    for _ in range(trials):
        trial = search.next(bar, signals.check)
        print(describe_trial(trial, trials, names), flush=True)


def _last_quality(run: _Run, interrupted: bool) -> Quality:
    """Return the quality of the tables as they are on the test, measured if it was not yet."""
    model = run.model
    if run.data.inner is run.data.split and not interrupted and model.n_epochs == len(model.history):
        last = model.history[-1].quality if model.history else None
        if last is not None:
            return last
    return evaluate(model.user_table, model.item_table, run.data.split, model.options.top)


def _check_together(arguments: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing beside others."""
    error = arguments.parser.error
    if not arguments.interactions:
        refuse_what_needs_files(arguments)
    if arguments.search is not None:
        if arguments.resume is not None:
            error("--search begins anew: leave out --resume")
        arguments.patience = arguments.patience or _PATIENCE
        arguments.validation = arguments.validation or _VALIDATION
    if arguments.patience is not None and arguments.validation is None:
        error("--patience needs --validation X: it is that which tells when to stop")
    if arguments.time_column is not None and arguments.validation != "latest":
        error("--time-column needs --validation latest: times are used for nothing else")
    if arguments.resume is None:
        return
    if arguments.interactions or arguments.validation is not None:
        error("--resume goes on with the interactions of the run: leave out INTERACTIONS and --validation")
    for name in given:
        if name not in _OF_A_RESUMED:
            error(f"--{name.replace('_', '-')} is the run's own with --resume: leave it out")


def _refuse_run(arguments: argparse.Namespace, folder: Path) -> None:
    """Refuse to write over a run that is not the one to go on with."""
    if arguments.overwrite or (
        arguments.resume is not None and arguments.resume.resolve() == folder.resolve()
    ):
        return
    for name in ("metrics.json", "manifest.json"):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder}: holds a run already; --overwrite replaces it, --resume {folder} goes on "
                f"with it, and --out DIR chooses another folder"
            )


def _describe(run: _Run) -> None:
    """Say what is trained on, and note it."""
    inner, split, description = run.data
    if inner is not split:
        print(f"{len(inner.test):,} of these are for validation: {inner.description}")
    description["trained_on"] = run.model.interactions
    description["validation"] = len(inner.test) if inner is not split else 0
    if run.model.interactions < len(inner.train):
        print(
            f"{len(inner.train) - run.model.interactions:,} interactions are not trained on: "
            "their users have every item"
        )


def _resumed(arguments: argparse.Namespace, given: Mapping[str, Any]) -> _Run:
    saved = read_model(arguments.resume)
    if saved.trained is None or saved.test is None or saved.held_out is None:
        raise CheckpointError(f"{arguments.resume}: is no run of train, with its interactions: train anew")
    values = {**saved.params, "top": saved.more["top"], "eval_every": saved.more["eval_every"], **given}
    options, ids = BPROptions(**values), (saved.user_ids, saved.item_ids)
    train, held = saved.trained, saved.held_out
    split = Split(train.union(held), saved.test, *ids, "resumed")
    inner = Split(train, held, *ids, "resumed") if len(held) else split
    model = BPRModel(inner, options, saved.optimizer)
    model.history, model.n_epochs = saved.history, saved.epochs
    model.unfinished = Unfinished(*saved.more["unfinished"])
    print(f"{arguments.resume}: going on after epoch {model.n_epochs} of {options.epochs}", flush=True)
    return _Run(model, _Data(inner, split, saved.more["data"]))


def _saved(run: _Run) -> Saved:
    model, (inner, split, description) = run
    names = inspect.signature(MatrixFactorization).parameters
    options = {name: value for name, value in asdict(model.options).items() if name in names}
    nothing = split.train.select(np.zeros(len(split.train), dtype=np.bool_))
    more = {
        "top": model.options.top,
        "eval_every": model.options.eval_every,
        "unfinished": list(model.unfinished),
        "data": description,
    }
    return Saved(
        model.optimizer, options, model.history, model.n_epochs, split.user_ids, split.item_ids,
        trained=inner.train, held_out=inner.test if inner is not split else nothing, test=split.test,
        more=more,
    )  # fmt: skip


def _load(arguments: argparse.Namespace, options: BPROptions) -> _Data:
    repeated, times = 0, None
    if arguments.test is not None:
        split, times = read_given_split(arguments.interactions, arguments.test, read_options(arguments))
        description = split.description
    else:
        interactions: Interactions
        if not arguments.interactions:
            print("no INTERACTIONS given: generating a data set", flush=True)
            interactions = generate(seed=options.seed)
        else:
            interactions, times = read_given(arguments.interactions, read_options(arguments))
        pairs, description, repeated = interactions.pairs, interactions.description, interactions.repeated
        print(f"{description}: {len(pairs):,} interactions, {pairs.n_users:,} users, {pairs.n_items:,} items")
        split = hold_out(interactions, arguments.test_fraction, options.seed)
        times = None if times is None else times[split.train.contains(pairs)]
    print(split.description)
    if repeated:
        print(f"{repeated:,} repeated (user, item) pairs {what_of_repeated(split.train)}")
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
    inner = split
    if arguments.validation is not None:
        rest = Interactions(split.train, split.user_ids, split.item_ids)
        inner = validation_split(Given(rest, times), arguments.validation, options.seed)
    return _Data(inner, split, data)


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
