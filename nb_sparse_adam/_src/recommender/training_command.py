# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam train``: its options, what it prints, and what it leaves."""

from __future__ import annotations

import argparse
import inspect
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.files import write_whole
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.recommender import report
from nb_sparse_adam._src.recommender.arguments import READING, add_reading, refuse_what_needs_files
from nb_sparse_adam._src.recommender.columns import FORMATS
from nb_sparse_adam._src.recommender.factorization import MatrixFactorization
from nb_sparse_adam._src.recommender.following import Best
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, generate, hold_out
from nb_sparse_adam._src.recommender.options import LOSS_NAMES
from nb_sparse_adam._src.recommender.page import read_titles, recommendations_page
from nb_sparse_adam._src.recommender.progress import Progress, describe
from nb_sparse_adam._src.recommender.ranking import Quality, evaluate, popularity_quality
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam._src.recommender.saved import Saved, read_model, write_model
from nb_sparse_adam._src.recommender.signals import Signals
from nb_sparse_adam._src.recommender.training import Unfinished
from nb_sparse_adam.errors import CheckpointError
from nb_sparse_adam.recommender import DOMAINS, BPRModel, BPROptions, EpochRecord

INTERRUPTED, TERMINATED = 130, 143  # what a shell reports for a command that Ctrl-C, or SIGTERM, ended
_OF_A_RESUMED = ("epochs", "top", "eval_every", "threads")  # options that may be others

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
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--test", metavar="FILE", help="interactions to predict (default: a hold-out)")
    held_out.add_argument(
        "--test-fraction",
        type=_fraction,
        default=0.2,
        metavar="X",
        help="part of every user's items to hold out (default: 0.2)",
    )

    data.add_argument(
        "--validation",
        type=_fraction,
        metavar="X",
        help="part of every user's other items to hold out too: evaluations are of these, so that options "
        "can be chosen without a look at the test",
    )

    model = train.add_argument_group("model and training")
    for option in fields(BPROptions):
        _add_option(model, option.name, option.default)

    model.add_argument(
        "--patience",
        type=_number(lambda x: isinstance(x, int) and x >= 1, "an integer of at least 1"),
        metavar="N",
        help="stop when so many evaluations of the validation have brought no better recall, and go back to "
        "the best one (needs --validation)",
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


def _add_option(group: argparse._ArgumentGroup, name: str, default: Any) -> None:
    flag, text = f"--{name.replace('_', '-')}", _HELP[name]
    passes, domain = DOMAINS[name]
    if name == "in_batch":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
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
        metavar = "X" if isinstance(default, float) or name == "reg" else "N"
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


class _Run(NamedTuple):
    """What is trained, and on what."""

    model: BPRModel  # its split is what evaluations during training are of
    split: Split  # with all that is not test, for the last evaluation
    data: dict[str, Any]  # for people


class _EnoughError(Exception):
    """The validation gets no better."""


def _train(arguments: argparse.Namespace) -> int:
    _check_together(arguments)
    out = arguments.out or arguments.resume or Path("nb-sparse-adam-run")
    folder = report.prepare_output(out)
    _refuse_run(arguments, folder)
    titles = None if arguments.titles is None else read_titles(arguments.titles)
    run = _new_run(arguments) if arguments.resume is None else _resumed(arguments)
    model, top = run.model, run.model.options.top
    popularity = popularity_quality(run.split, top)
    print(f"popularity ranking: {describe(popularity, top)}", flush=True)

    interrupted, signals = False, Signals()
    best = Best(model.optimizer) if arguments.patience is not None else None
    with signals, Progress(model, not arguments.no_progress) as progress:

        def on_batch(interactions: int, loss: float) -> None:
            progress.on_batch(interactions, loss)
            signals.check()

        def on_epoch(record: EpochRecord) -> None:
            progress.on_epoch(record)
            if best is not None and record.quality is not None:
                evaluations = len([one for one in model.history if one.quality is not None])
                if best.is_over(evaluations, record.quality.recall, arguments.patience):
                    raise _EnoughError

        try:
            model.fit(on_batch, on_epoch)
        except KeyboardInterrupt:
            interrupted = True
        except _EnoughError:
            pass
    history = model.history
    if interrupted:
        print(
            f"interrupted after {len(history)} of {model.options.epochs} epochs: saving what there is; "
            f"--resume {folder} goes on",
            flush=True,
        )
    elif best is not None and best.epoch:
        best.restore()
        evaluated = [record for record in history if record.quality is not None]
        history = history[: evaluated[best.epoch - 1].epoch]
        if len(history) < len(model.history):
            print(f"the best evaluation was after epoch {len(history)}: back to it", flush=True)
    try:
        report.save_model(folder, model)
        saved = _saved(run, history)
        write_model(folder, saved)
        shown = recommendations_page(MatrixFactorization._of(saved), run.data["description"], titles)
        write_whole(folder / "recommendations.html", shown)
        last = model.history[-1].quality if model.history else None
        known = (
            not interrupted and best is None and arguments.validation is None and not run.data["validation"]
        )
        quality = last if known and last else evaluate(model.user_table, model.item_table, run.split, top)
        report.save_metrics(folder, model, quality, popularity, run.data, interrupted)
    except KeyboardInterrupt:
        print(f"interrupted again: what was saved is whole, but not complete, in {folder}", file=sys.stderr)
        return INTERRUPTED
    _summarize(quality, popularity, top)
    print(f"saved in {folder.resolve()}:")
    for name, content in report.FILES.items():
        print(f"  {name:24} {content}")
    if interrupted:
        return TERMINATED if signals.arrived == signal.SIGTERM else INTERRUPTED
    return 0


def _check_together(arguments: argparse.Namespace) -> None:
    """Refuse options that mean nothing beside others."""
    error = arguments.parser.error
    if not arguments.interactions:
        refuse_what_needs_files(arguments)
    if arguments.patience is not None and arguments.validation is None:
        error("--patience needs --validation X: it is that which tells when to stop")
    if arguments.resume is None:
        return
    if arguments.interactions or arguments.validation is not None:
        error("--resume goes on with the interactions of the run: leave out INTERACTIONS and --validation")
    for option in fields(BPROptions):
        value = getattr(arguments, option.name)
        value = tuple(value) if isinstance(value, list) else value
        if option.name not in _OF_A_RESUMED and value != option.default:
            error(f"--{option.name.replace('_', '-')} is the run's own with --resume: leave it out")


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


def _new_run(arguments: argparse.Namespace) -> _Run:
    values = {option.name: getattr(arguments, option.name) for option in fields(BPROptions)}
    options = BPROptions(**{**values, "betas": tuple(arguments.betas)})
    split, data = _load(arguments, options)
    inner = split
    if arguments.validation is not None:
        pairs = Interactions(split.train, split.user_ids, split.item_ids)
        inner = hold_out(pairs, arguments.validation, options.seed)
        print(f"{len(inner.test):,} of these are for validation: {inner.description}")
    model = BPRModel(inner, options)
    data |= {"trained_on": model.interactions, "validation": len(inner.test) if inner is not split else 0}
    if model.interactions < len(inner.train):
        print(
            f"{len(inner.train) - model.interactions:,} interactions are not trained on: "
            "their users have every item"
        )
    return _Run(model, split, data)


def _resumed(arguments: argparse.Namespace) -> _Run:
    saved = read_model(arguments.resume)
    if saved.trained is None or saved.test is None or saved.held_out is None:
        raise CheckpointError(f"{arguments.resume}: is no run of train, with its interactions: train anew")
    names = {option.name: option.default for option in fields(BPROptions)}
    values = {**saved.params, "top": saved.more["top"], "eval_every": saved.more["eval_every"]}
    for name in _OF_A_RESUMED:
        if getattr(arguments, name) != names[name]:
            values[name] = getattr(arguments, name)
    options, ids = BPROptions(**values), (saved.user_ids, saved.item_ids)
    train, held = saved.trained, saved.held_out
    split = Split(train.union(held), saved.test, *ids, "resumed")
    inner = Split(train, held, *ids, "resumed") if len(held) else split
    model = BPRModel(inner, options, saved.optimizer)
    model.history, model.unfinished = saved.history, Unfinished(*saved.more["unfinished"])
    print(f"{arguments.resume}: going on after epoch {len(model.history)} of {options.epochs}", flush=True)
    return _Run(model, split, saved.more["data"])


def _saved(run: _Run, history: list[EpochRecord]) -> Saved:
    model = run.model
    names = inspect.signature(MatrixFactorization).parameters
    options = {name: value for name, value in asdict(model.options).items() if name in names}
    nothing = run.split.train.select(np.zeros(len(run.split.train), dtype=np.bool_))
    unfinished = model.unfinished if len(history) == len(model.history) else Unfinished(0, 0.0)
    more = {
        "top": model.options.top,
        "eval_every": model.options.eval_every,
        "unfinished": list(unfinished),
        "data": run.data,
    }
    return Saved(
        model.optimizer, options, history, len(history), run.split.user_ids, run.split.item_ids,
        trained=model.split.train, held_out=model.split.test if model.split is not run.split else nothing,
        test=run.split.test, more=more,
    )  # fmt: skip


def _load(arguments: argparse.Namespace, options: BPROptions) -> tuple[Split, dict[str, Any]]:
    repeated = 0
    reading = {name: getattr(arguments, name) for name in READING}
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
