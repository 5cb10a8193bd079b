# SPDX-License-Identifier: Apache-2.0
"""The command line: ``nb-sparse-adam train``, ``bench``, ``warm-up`` and ``info``."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numba

from nb_sparse_adam._src import info
from nb_sparse_adam._src.engine.compilations import LOGGER
from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.recommender import report
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, generate, hold_out
from nb_sparse_adam._src.recommender.options import LOSS_NAMES
from nb_sparse_adam._src.recommender.ranking import Quality, popularity_quality
from nb_sparse_adam._src.recommender.reading import FORMATS, read_interactions, read_split
from nb_sparse_adam._src.warming import DTYPES, GRADIENTS, warm_up
from nb_sparse_adam.errors import NonFiniteGradientError, OptionError, SparseAdamError
from nb_sparse_adam.recommender import DOMAINS, BPRModel, BPROptions, EpochRecord

__all__ = ["main"]

_BENCH_FOLDER = "nb-sparse-adam-bench"
_INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the name of the program; those of the process if None.

    Returns
    -------
    int
        Exit code: 0; 1 for an error; 130 after Ctrl-C. Wrong arguments exit with 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    with _any_text(sys.stdout):
        return _run(arguments)


@contextmanager
def _any_text(stream: Any) -> Iterator[None]:
    """Make a stream escape characters that its encoding lacks: such a name must not end the run."""
    if getattr(stream, "errors", None) != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


def _run(arguments: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = arguments.parser
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted before there were results: nothing was saved", file=sys.stderr)
        return _INTERRUPTED
    except OptionError as error:
        parser.error(str(error))
    except NonFiniteGradientError as error:
        message = f"the training diverged ({error}); try a smaller --lr or --init-std"
    except MemoryError as error:
        hint = "; a smaller --dim takes less" if arguments.command == "train" else ""
        message = f"there is not enough memory: {error}{hint}"
    except BrokenPipeError:  # who reads what is printed, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SparseAdamError, OSError) as error:
        message = str(error)
    except ValueError as error:
        if "threading layer" not in str(error).lower():
            raise
        message = f"{error}; unset NUMBA_THREADING_LAYER, or install the layer that it names"
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nb-sparse-adam", description="Sparse Adam in Numba, on CPUs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_bench(commands)
    _add_warm_up(commands)
    text = "show versions, threads, the kernel cache, and which extras work"
    info_parser = commands.add_parser("info", help=text)
    info_parser.set_defaults(run=_info, parser=info_parser)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a recommender on interactions",
        description="Train a matrix-factorization recommender with the BPR loss (Rendle et al. 2009) or "
        "a sampled softmax, compare it with a popularity ranking on held-out items, and save its vectors.",
    )
    data = train.add_argument_group("data")
    data.add_argument(
        "interactions",
        nargs="?",
        metavar="INTERACTIONS",
        help="delimited text (user, item, further columns ignored; with or without a header), LightGCN "
        "adjacency lines (user item item ...) or Parquet; without it, about a million interactions are "
        "generated",
    )
    data.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="of the files; auto takes lines separated by spaces for adjacency lines if they differ in "
        "length and no first field comes twice, else for delimited text (default: auto)",
    )
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


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed on this machine, beside other libraries",
        description="Time steps beside kernels that only move the same bytes, and beside other libraries, "
        "taking turns in one run; print a table, and write bench.json, and bench.png if matplotlib is there. "
        "Without --quick it takes about ten minutes and up to 8 GB of memory (19 for one of the lines).",
    )
    bench.add_argument(
        "--peers",
        metavar="NAMES",
        help="torch, fbgemm and paddle, separated by commas, or none (default: those that are installed)",
    )
    bench.add_argument(
        "--quick",
        action="store_true",
        help="small tables and few repeats: to see that it works, in about a minute",
    )
    bench.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only the lines whose names in bench.json begin so, for example bag or rows-64; a wrong name is "
        "answered with all of them",
    )
    bench.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: as many as numba would use)"
    )
    bench.add_argument(
        "--json",
        metavar="FILE",
        help="write what bench.json holds into this file instead of a folder; - for stdout: the table then "
        "goes to stderr",
    )
    bench.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for bench.json and bench.png (default: {_BENCH_FOLDER}, none with --json)",
    )
    bench.set_defaults(run=_bench, parser=bench)


def _add_warm_up(commands: Any) -> None:
    warm = commands.add_parser(
        "warm-up",
        help="compile kernels ahead of the first step",
        description="Compile what steps need and keep it on disk, so that no first step waits for it: when "
        "an image is built, or before a server starts. It is kept in the folder that `nb-sparse-adam info` "
        "names; NUMBA_CACHE_DIR names another one. Code is for the type of processor that compiles it: on "
        "another type it is compiled again. A dtype with a count takes some 5 seconds, the first 10 more.",
    )
    for flag, allowed, default, text in (
        ("--dtype", DTYPES, DTYPES[:1], "of the tables"),
        ("--step-counts", STEP_COUNTS, STEP_COUNTS, "what steps count"),
        ("--gradients", GRADIENTS, GRADIENTS, "forms of gradients (csr is all of scipy.sparse)"),
    ):
        warm.add_argument(
            flag,
            nargs="+",
            choices=allowed,
            default=default,
            metavar="NAME",
            help=f"{text}: some of {', '.join(allowed)} (default: {' '.join(default)})",
        )
    warm.set_defaults(run=_warm_up, parser=warm)


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


def _info(_: argparse.Namespace) -> int:
    for line in info.report_lines():
        print(line)
    return 0


def _warm_up(arguments: argparse.Namespace) -> int:
    if numba.config.DISABLE_JIT:
        print("NUMBA_DISABLE_JIT is set: there is nothing to compile")
        return 0
    folder = info.cache_folder()
    if folder is None:
        print(
            "error: no folder can be written to, so that what is compiled here would be of no use to other "
            "processes: set NUMBA_CACHE_DIR to a folder that can",
            file=sys.stderr,
        )
        return 1
    lost = 0
    for dtype in arguments.dtype:
        for counts in arguments.step_counts:
            done = warm_up(dtype, counts, arguments.gradients)
            what = f"{done.compiled} kernels compiled" if done.compiled else "all found on disk"
            print(f"{dtype}, {counts} counts: {what}, {done.seconds:.1f} s", flush=True)
            lost += done.compiled - done.kept
    if lost:
        print(f"error: {lost} kernels were compiled, but not written to {folder}", file=sys.stderr)
        return 1
    print(f"kept in {folder}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.interactions is None and (arguments.test is not None or arguments.format != "auto"):
        arguments.parser.error("--test and --format need INTERACTIONS: generated data come with a hold-out")
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
        return _INTERRUPTED
    _summarize(quality, popularity, options.top)
    print(f"saved in {folder.resolve()}:")
    for name, content in report.FILES.items():
        print(f"  {name:24} {content}")
    return _INTERRUPTED if interrupted else 0


def _bench(arguments: argparse.Namespace) -> int:
    from nb_sparse_adam._src.bench.command import bench  # the other commands need none of it

    out = arguments.out
    if out is None and arguments.json is None:
        out = Path(_BENCH_FOLDER)
    complete = bench(
        peers=arguments.peers,
        threads=arguments.threads,
        quick=arguments.quick,
        only=arguments.only,
        out=out,
        json_file=arguments.json,
    )
    return 0 if complete else _INTERRUPTED


def _load(arguments: argparse.Namespace, options: BPROptions) -> tuple[Split, dict[str, Any]]:
    repeated = 0
    if arguments.test is not None:
        split = read_split(arguments.interactions, arguments.test, arguments.format)
        description = split.description
    else:
        interactions: Interactions
        if arguments.interactions is None:
            print("no INTERACTIONS given: generating a data set", flush=True)
            interactions = generate(seed=options.seed)
        else:
            interactions = read_interactions(arguments.interactions, arguments.format)
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
        "generated": arguments.interactions is None,
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


if __name__ == "__main__":
    sys.exit(main())
