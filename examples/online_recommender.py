# SPDX-License-Identifier: Apache-2.0
"""A recommender that learns day by day, while users and items come and go.

    python examples/online_recommender.py [--data RATINGS.csv] [--days N] [--out FOLDER]

Three models see the same interactions. Each has an `EmbeddingTable` of users and one of items, whose ids are
those of the data, and learns from each day's interactions once. Then it is asked for the next day's: which
share of them are among the 20 items that it ranks highest for the user (recall@20).

- "forgets": an id gets a row when it is seen for the third time in training (``--admission``), and loses it
  when it has not been seen for 5 days (``--keep``).
- "never forgets": each id gets a row at once, and keeps it.
- "fixed vocabulary": ids of the first 5 days (``--vocabulary``) have rows, and no others ever get one.

A model's score of item i for user u is ⟨x_u, y_i⟩ + b_i; x_u is a row of users, (y_i, b_i) one of items. An
id without a row has zeros, so that a user whom nobody knows gets the items with the largest b, the popular
ones. An item without a row is not ranked: it counts as missed. The loss is a softmax over the items of the
batch, the user's own against all others, with the logarithm of how often they occur that day subtracted from
scores (Yi et al. 2019): else popular items, which are in most batches, would be pushed down.

Without ``--data`` a stream is made up: users of a day and users who stay, each with a few topics; items that
are new, popular for a while, and over. ``--data`` takes a CSV of users, items, ratings and times, as
MovieLens has them (``ratings.csv``); a day is an equal share of the ratings, in the order of time, and a
rating is an interaction, however many stars it has. What a user has seen already may be ranked again.

``--out`` is a folder for ``recall.png`` and for checkpoints: all six tables as they are after a day, every 7
days in full and else as what has changed. The same command after a ``kill -9`` goes on from the last day
that is complete, and ends with the same numbers.
"""

import argparse
import hashlib
import math
import shutil
import warnings
from pathlib import Path

import numpy as np

from nb_sparse_adam import EmbeddingTable, RowGradient, checkpoint
from nb_sparse_adam.errors import SparseAdamError

TOP = 20
BATCH = 512
TESTED = 2000  # interactions of the next day that recall is measured on, if it has more
FULL_EVERY = 7  # days: the checkpoints between two full ones hold what has changed
FILTER_BYTES = 1 << 16  # that count sightings of ids without a row, a table
MODELS = ("forgets", "never forgets", "fixed vocabulary")


# --- a model ----------------------------------------------------------------------------------------------


def new_tables(name, args):
    """Tables of a model: users, and items with a bias after their vector."""
    forgets = {"admission": args.admission, "admission_bytes": FILTER_BYTES} if name == "forgets" else {}
    shared = {"initializer": "normal(0, 0.1)", "lr": args.lr, **forgets}
    users = EmbeddingTable(args.dim, seed=1, name=f"{name}: users", **shared)
    return users, EmbeddingTable(args.dim + 1, seed=2, name=f"{name}: items", **shared)


def with_one(vectors):
    """Vectors of users, and the one that is multiplied by the bias of an item."""
    return np.hstack([vectors, np.ones((len(vectors), 1), vectors.dtype)])


def learn(users, items, day, grows, rng):
    """Train on the interactions of a day; ``grows``: whether ids may get a row."""
    order = rng.permutation(len(day))
    _, which, counts = np.unique(day[:, 1], return_inverse=True, return_counts=True)
    often = np.log(counts[which.ravel()]).astype(np.float32)
    for at in range(0, len(day), BATCH):
        chosen = order[at : at + BATCH]
        user_ids, item_ids = day[chosen].T
        x, y = with_one(users.lookup(user_ids, train=grows)), items.lookup(item_ids, train=grows)
        errors = softmax_errors(x, y, item_ids, often[chosen])
        gradients = {
            users: RowGradient(user_ids, errors @ y[:, :-1]),
            items: RowGradient(item_ids, errors.T @ x),
        }
        EmbeddingTable.update_together(gradients)  # gradients of ids without a row are dropped


def softmax_errors(x, y, item_ids, often):
    """Derivatives of the mean loss of a batch by its scores, (users, items)."""
    scores = x @ y.T - often
    others = item_ids != item_ids[:, None]  # the same item again is no other one
    np.fill_diagonal(others, True)
    scores[~others] = -np.inf
    scores -= scores.max(1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(1, keepdims=True)
    np.fill_diagonal(shares, shares.diagonal() - 1)
    return shares / len(x)


def recall(users, items, asked):
    """Share of interactions whose item is among the best `TOP` for their user."""
    ids, vectors = items.export()
    if not len(ids):
        return 0.0
    order = np.argsort(ids)
    at = order[np.minimum(np.searchsorted(ids, asked[:, 1], sorter=order), len(ids) - 1)]
    scores = with_one(users.lookup(asked[:, 0], train=False)) @ vectors.T
    better = (scores > scores[np.arange(len(asked)), at, None]).sum(1)
    return float(np.mean((ids[at] == asked[:, 1]) & (better < TOP)))


def recall_of_popular(day, asked):
    """The same of the day's most popular items, for everybody."""
    ids, counts = np.unique(day[:, 1], return_counts=True)
    return float(np.isin(asked[:, 1], ids[np.argsort(-counts, kind="stable")[:TOP]]).mean())


def bytes_of(table):
    """Bytes of the rows that there are, and of their places in the index, at most.

    Room that rows have left, and that waits for new ones, is not in it, so that it is the same after a
    restart; it is in what `EmbeddingTable.stats` says.
    """
    return len(table) * (32 + 3 * table.dim * table.dtype.itemsize + 24)


# --- data -------------------------------------------------------------------------------------------------


def generated(days, events, rng, topics=30, before=60):
    """Interactions of each day, (events, 2) int64: ids of a user and an item.

    Of the users who come, four in five are there for a day, the others for ten on average. An item's
    popularity falls to a third in six days on average; they come ``before`` the first day, too.
    """

    def come(each_day):
        when = rng.uniform(-before, days, each_day * (days + before))
        return when, rng.integers(-(2**63), 2**63, len(when))

    came, user_ids = come(max(events // 8, 1))
    stays = np.where(rng.random(len(came)) < 0.2, rng.exponential(10, len(came)), 1)
    active = rng.lognormal(0, 1, len(came))
    tastes = rng.integers(topics, size=(len(came), 3))
    released, item_ids = come(max(events // 40, topics))
    order = np.argsort(rng.integers(topics, size=len(released)))  # items of a topic lie side by side
    ends = np.arange(1, topics + 1) * len(order) // topics
    lasts = rng.exponential(6, len(released))
    popular = rng.lognormal(0, 1.5, len(released))

    for day in range(days):
        there = np.flatnonzero((came < day + 1) & (came + stays >= day))
        users = rng.choice(there, events, p=active[there] / active[there].sum())
        topic = tastes[users, np.searchsorted([0.6, 0.9], rng.random(events))]
        age = np.maximum(day - released, 0)
        weights = np.where(released < day + 1, popular * np.exp(-age / lasts), 0)
        sums = np.concatenate([[0], np.cumsum(weights[order])])
        low, high = sums[np.concatenate([[0], ends[:-1]])[topic]], sums[ends[topic]]
        drawn = np.searchsorted(sums, rng.uniform(low, high), side="right") - 1
        yield np.stack([user_ids[users], item_ids[order[np.minimum(drawn, len(order) - 1)]]], axis=1)


def read_ratings(path, days):
    """Interactions of a CSV of ratings, in the order of time, in equal shares."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        table = np.loadtxt(path, np.int64, delimiter=",", skiprows=1, usecols=(0, 1, 3), ndmin=2)
    return np.array_split(table[np.argsort(table[:, 2], kind="stable"), :2], days)


# --- checkpoints ------------------------------------------------------------------------------------------


def folder_of(out, day):
    """Where the checkpoint of a day is."""
    return out / f"day-{day:04}"


def save(out, day, models, extra):
    """Save all tables as they are after a day."""
    tables = {table.name: table for tables in models.values() for table in tables}
    full = day % FULL_EVERY == 0
    base = None if full else folder_of(out, day - 1)
    checkpoint.save(folder_of(out, day), tables, extra, base=base)
    if full:  # complete now: those before it are not needed any more
        for earlier in out.glob("day-*"):
            if earlier < folder_of(out, day):
                shutil.rmtree(earlier)


def load(out):
    """Tables and ``extra`` of the last day whose checkpoint is complete, or None."""
    complete = [int(file.parent.name[4:]) for file in out.glob("day-*/manifest.json")]
    if not complete:
        return None
    last = max(complete)
    chain = [folder_of(out, day) for day in range(last - last % FULL_EVERY, last + 1)]
    tables, extra = checkpoint.load(chain)
    return {name: (tables[f"{name}: users"], tables[f"{name}: items"]) for name in MODELS}, extra


# --- day by day -------------------------------------------------------------------------------------------


def train_and_measure(models, days, day, args):
    """Let all models learn from a day; what they know of the next one."""
    rng = np.random.default_rng([args.seed, day])
    asked = days[day + 1]
    asked = asked[rng.permutation(len(asked))[:TESTED]]
    result = {"day": day + 1, "popular": recall_of_popular(days[day], asked), "models": {}}
    for name, (users, items) in models.items():
        grows = name != "fixed vocabulary" or day < args.vocabulary
        learn(users, items, days[day], grows, np.random.default_rng([args.seed, day, 1]))
        if name == "forgets":
            # Between days, so that a run that is resumed does the same. A service, which must not pause,
            # would pass eviction=Eviction(older_than_steps=...): each step then looks at some rows.
            kept = days[max(day + 1 - args.keep, 0) : day + 1]
            steps = sum(math.ceil(len(each) / BATCH) for each in kept)
            for table in (users, items):
                table.evict(older_than_steps=steps)
        size = bytes_of(users) + bytes_of(items) + 2 * FILTER_BYTES * (name == "forgets")
        rows = len(users) + len(items)
        result["models"][name] = {"recall": recall(users, items, asked), "rows": rows, "bytes": size}
    return result


def heading():
    """Names of the columns that `line` has."""
    columns = f"{'recall':>10}{'rows':>9}{'MB':>7}"
    return (
        f"{'':16}" + "".join(f"{name:>26}" for name in MODELS) + f"\n{'day':>4}{'popular':>12}{columns * 3}"
    )


def line(result):
    """A day's numbers."""
    shown = f"{result['day']:>4}{result['popular']:>12.4f}"
    for of in result["models"].values():
        shown += f"{of['recall']:>10.4f}{of['rows']:>9,}{of['bytes'] / 1e6:>7.2f}"
    return shown


def draw(path, history):
    """Plot recall by day, and against the size of the tables."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no {path}: drawing it needs matplotlib ({error}); pip install matplotlib")
        return
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    by_day, by_size = figure.subplots(1, 2, sharey=True)
    days = [each["day"] for each in history]
    for name, color, marker in zip(MODELS, ("#c0392b", "#3b6ea5", "#6b8e23"), "os^", strict=True):
        of = [each["models"][name] for each in history]
        recalls, sizes = [each["recall"] for each in of], [each["bytes"] / 1e6 for each in of]
        by_day.plot(days, recalls, color=color, marker=marker, markersize=3.5, label=name)
        by_size.plot(sizes, recalls, color=color, marker=marker, markersize=3.5, linewidth=0.5)
        last = (sizes[-1], recalls[-1])
        by_size.annotate(f"day {days[-1]}", last, (5, 4), textcoords="offset points", fontsize=8)
    popular = [each["popular"] for each in history]
    by_day.plot(days, popular, color="0.35", linestyle="--", label="the day's most popular")
    by_day.set(xlabel="day", ylabel=f"recall@{TOP} of the next day", ylim=(0, None))
    by_day.legend(fontsize=8)
    by_size.set(xlabel="MB of rows, index and filter (users and items)")
    by_size.set_xlim(0, 1.12 * by_size.dataLim.x1)  # room for the last day's name
    figure.savefig(path)
    print(path)


# --- command line -----------------------------------------------------------------------------------------


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", metavar="FILE", help="a CSV of user, item, rating, time (default: generated)"
    )
    parser.add_argument("--days", type=int, default=25)
    parser.add_argument("--events", type=int, default=8_000, help="interactions of a day of generated data")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--admission", type=int, default=3, help="sightings of an id that gets a row")
    parser.add_argument("--keep", type=int, default=5, help="days that a row is kept which nothing touches")
    parser.add_argument("--vocabulary", type=int, default=5, help="days whose ids the fixed vocabulary has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for checkpoints and the plot")
    args = parser.parse_args(argv)
    for name, least in (("days", 2), ("events", 1), ("keep", 1), ("vocabulary", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least {least}")
    return parser, args


def main(argv=None):
    """Train day by day and print; return what was measured after each day."""
    parser, args = arguments(argv)
    if args.data is None:
        days = list(generated(args.days, args.events, np.random.default_rng(args.seed)))
    else:
        try:
            days = read_ratings(args.data, args.days)
        except (OSError, ValueError) as error:
            parser.error(
                f"--data: {args.data}: expected a header, and users, items, ratings and times, {error}"
            )
        if not len(days[-1]):
            parser.error(
                f"--data: {args.data} holds {sum(map(len, days))} ratings, expected one for each day"
            )
    of_run = {name: value for name, value in vars(args).items() if name not in ("out", "data")}
    of_run["interactions"] = hashlib.sha256(np.concatenate(days).tobytes()).hexdigest()

    try:
        models, history = {name: new_tables(name, args) for name in MODELS}, []
        resumed = load(args.out) if args.out else None
    except SparseAdamError as error:
        parser.error(str(error))
    if resumed:
        models, extra = resumed
        if extra["run"] != of_run:
            parser.error(
                f"--out: {args.out} holds a run of {extra['run']}, expected {of_run}, or a new folder"
            )
        history = extra["days"]
        print(f"goes on after day {len(history)} of {args.out}")
    print(heading())
    for result in history:
        print(line(result))
    for day in range(len(history), len(days) - 1):  # the last one is only asked for
        history.append(train_and_measure(models, days, day, args))
        print(line(history[-1]), flush=True)
        if args.out:
            save(args.out, day, models, {"run": of_run, "days": history})
    if args.out:
        draw(args.out / "recall.png", history)
    return history


if __name__ == "__main__":
    main()
