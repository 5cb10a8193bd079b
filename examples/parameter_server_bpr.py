# SPDX-License-Identifier: Apache-2.0
"""A recommender on a parameter server: as good as in one process, also if a shard dies.

    python examples/parameter_server_bpr.py [--data FILE] [--workers N] [--shards N] [--chaos] [--out FOLDER]

What `nb-sparse-adam train --loss bpr` trains, with its defaults: matrix factorization with the BPR loss
(Rendle et al. 2009). The score of item i for user u is ⟨x_u, y_i⟩, and what a user has should score higher
than what was sampled for it. The vectors are rows of two tables, "user" and "item", which are dealt out to
shards; workers are processes, too. All run on this machine, in a Ray that is started for it, unless one is
running.

Each epoch's batches are those of `nb_sparse_adam.recommender.epoch_batches`, and each worker takes every
N-th of them. For each it has the vectors, computes gradients, and pushes them while it pulls the vectors of
its next batch: a round trip a step. With ``--consistency sync`` a worker takes every N-th interaction of each
batch instead, and a step is the sum over the workers: that of the whole batch.

First the same is done in this process, by `EmbeddingTable`, with the same number of steps, and with as many
seeds as ``--seeds`` says, so that it can be said what noise is. After each epoch all items are ranked for
each user: recall@20 of a fifth of each user's items, which was held out.

``--chaos`` ends a shard by ``kill -9`` in the middle of the training. It is started again, does again what
its log says (``--durability log``), and workers, whose calls wait for it, go on. With ``--durability
snapshot`` it has lost the pushes since its last snapshot, and the recall shows it.

``--data`` takes what `nb-sparse-adam train` does, as MovieLens' ``ratings.csv``; without it data are
generated. ``--out`` is a folder for ``recall.png`` and ``results.json``. Ctrl-C ends it, and keeps what it
has so far.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray

from nb_sparse_adam import EmbeddingTable, RowGradient
from nb_sparse_adam.errors import SparseAdamError
from nb_sparse_adam.parameter_server import ParameterServer, TableSpec
from nb_sparse_adam.recommender import (
    BPRModel,
    BPROptions,
    epoch_batches,
    generate,
    hold_out,
    read_interactions,
)

SNAPSHOT_EVERY = 15  # seconds
LOOK_EVERY = 0.1  # seconds between two looks at the server's numbers
USERS, ITEMS, MEAN = 1000, 800, 50  # of generated data


# --- the model --------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What one worker does in a step."""

    ids: dict  # "user": (m,); "item": (m + m * negatives,), the users' own items first
    size: int  # interactions of the step, of all workers


def batches(split, options, epoch, turn=0, workers=1, shared=False):
    """Batches of an epoch that a worker takes; or its part of each, if they are shared."""
    for number, batch in enumerate(epoch_batches(split, options, epoch)):
        if shared:
            own = slice(turn, None, workers)
        elif number % workers == turn:
            own = slice(None)
        else:
            continue
        items = np.concatenate([batch.positives[own], batch.negatives[own].ravel()])
        yield Batch({"user": batch.users[own].copy(), "item": items}, len(batch.users))


def gradients(vectors, batch, options):
    """Gradients of the mean BPR loss of a step, as a table takes them.

    With s(u, i) = ⟨x_u, y_i⟩, over n interactions (u, i) with m negatives j each:
    1/(n·m) Σ −ln σ(s(u, i) − s(u, j)) + reg/2 · (‖x_u‖² + ‖y_i‖² + ‖y_j‖²).
    """
    users, items = vectors["user"], vectors["item"]
    own, others = items[: len(users)], items[len(users) :]
    others = others.reshape(len(users), options.negatives, -1)
    apart = own[:, None] - others
    x = np.einsum("nd,nmd->nm", users, apart)
    slopes = (np.tanh(x / 2) - 1) / (2 * batch.size * options.negatives)  # −σ(−x), by the number of triples
    decay = options.reg / batch.size
    of_users = np.einsum("nm,nmd->nd", slopes, apart) + decay * users
    of_own = slopes.sum(1, keepdims=True) * users + decay * own
    of_others = decay / options.negatives * others - slopes[:, :, None] * users[:, None]
    of_items = np.concatenate([of_own, of_others.reshape(-1, items.shape[1])])
    return {"user": (batch.ids["user"], of_users), "item": (batch.ids["item"], of_items)}


def of_tables(options):
    """What each table is made of."""
    adam = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "step_counts": options.step_counts}
    shared = {"initializer": f"normal(0, {options.init_std})", **adam}
    return {name: {"seed": 2 * options.seed + k, **shared} for k, name in enumerate(("user", "item"))}


class Judge:
    """Ranks all items for all users, as `nb-sparse-adam train` does."""

    def __init__(self, split, options):
        self._model = BPRModel(split, options)

    def recall(self, export):
        """Recall@20; ``export`` gives ids and vectors of a table."""
        for name, table in (("user", self._model.user_table), ("item", self._model.item_table)):
            ids, vectors = export(name)
            table[...] = 0  # an id that nobody has met yet
            table[ids] = vectors
        return self._model.evaluate().recall


# --- in this process --------------------------------------------------------------------------------------


def in_process(split, options, judge):
    """Train in this process; yield the recall after each epoch."""
    tables = {
        name: EmbeddingTable(options.dim, name=name, num_threads=1, **given)
        for name, given in of_tables(options).items()
    }
    for epoch in range(1, options.epochs + 1):
        for batch in batches(split, options, epoch):
            vectors = {name: table.lookup(batch.ids[name]) for name, table in tables.items()}
            steps = gradients(vectors, batch, options)
            EmbeddingTable.update_together(
                {table: RowGradient(*steps[name]) for name, table in tables.items()}
            )
        yield judge.recall(lambda name: tables[name].export())


# --- on the server ----------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Worker:
    """A process that trains on its part of the batches."""

    def __init__(self, server, rank, workers, shared, split, options):
        # Without ranks, a server takes whoever comes; with "sync" it has to know whose part is missing.
        self._client = ParameterServer.attach(server).client(rank if shared else None)
        self._workers, self._shared, self._split, self._options = workers, shared, split, options

    def epoch(self, epoch, turn):
        """Train on an epoch, on batch ``turn`` and every N-th after it; return how many steps it took."""
        own = batches(self._split, self._options, epoch, turn, self._workers, self._shared)
        batch, steps = next(own, None), 0
        vectors = self._client.pull(batch.ids) if batch else None
        while batch:
            found, following = gradients(vectors, batch, self._options), next(own, None)
            if following:
                vectors = self._client.push_pull(found, following.ids)
            else:
                self._client.push(found)
            batch, steps = following, steps + 1
        return steps


class Watch:
    """Looks at the server while workers train: says how far they are, and ends a shard if asked to."""

    def __init__(self, server, judge, steps, args):
        self._server, self._judge, self._steps, self._args = server, judge, steps, args
        self._said = time.monotonic()
        self._quarter = self._said_steps = 0
        self._pids = {each["pid"] for each in server.stats()["shards"]}
        self.kill = None

    @property
    def restarts(self):
        """How often a shard has been seen in another process than before."""
        return len(self._pids) - self._args.shards

    def look(self):
        """Look once."""
        stats = self._server.stats()  # waits for a shard that is being started again
        self._pids |= {each["pid"] for each in stats["shards"]}
        steps = max(each["pushes"] for each in stats["shards"])
        quarter = 4 * steps // self._steps
        if quarter > self._quarter:
            now = time.monotonic()
            speed = (steps - self._said_steps) / (now - self._said)
            self._quarter, self._said, self._said_steps = quarter, now, steps
            say(
                f"epoch {steps / self._steps:5.2f} of {self._args.epochs}: {speed:.0f} steps/s, shards "
                f"started again: {self.restarts}"
            )
        middle = self._steps * (2 * ((self._args.epochs + 1) // 2) - 1)  # twice the steps till then
        if self._args.chaos and self.kill is None and 2 * steps >= middle:
            self._end_a_shard(stats["shards"][-1], steps / self._steps)

    def _end_a_shard(self, shard, epoch):
        before = self._judge.recall(self._server.export)
        os.kill(shard["pid"], signal.SIGKILL)
        began = time.monotonic()
        after = self._judge.recall(self._server.export)  # waits for it, too
        seconds = time.monotonic() - began
        self.kill = {
            "epoch": epoch, "shard": shard["shard"], "seconds": seconds, "before": before, "after": after
        }  # fmt: skip
        say(f"epoch {epoch:5.2f}: {of_kill(self.kill)}")


def on_server(split, options, judge, steps, args, folder, run):
    """Train on a parameter server; write to ``run`` what happens."""
    shared = args.consistency == "sync"
    server, workers = None, []
    try:
        server = ParameterServer.create(
            f"bpr-{os.getpid()}",
            {name: TableSpec(options.dim, **given) for name, given in of_tables(options).items()},
            shards=args.shards,
            checkpoint_dir=folder,
            durability=args.durability,
            snapshot_interval=SNAPSHOT_EVERY,
            consistency=args.consistency,
            workers=args.workers if shared else None,
        )
        split = ray.put(split)
        workers = [
            Worker.remote(server.name, rank, args.workers, shared, split, options)
            for rank in range(args.workers)
        ]
        ray.get([worker.__ray_ready__.remote() for worker in workers])
        watch = Watch(server, judge, steps, args)
        for epoch in range(1, options.epochs + 1):
            began = time.monotonic()
            # Whose turn it is goes on from epoch to epoch: else one worker would get ahead by a step in each.
            busy = [
                worker.epoch.remote(epoch, (rank - (epoch - 1) * steps) % args.workers)
                for rank, worker in enumerate(workers)
            ]
            waiting = busy
            while waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_EVERY)
                watch.look()
            made = ray.get(busy)
            run["steps"] += made[0] if shared else sum(made)
            run["seconds"] += time.monotonic() - began
            run["server"].append(judge.recall(server.export))
            run["kill"], run["restarts"] = watch.kill, watch.restarts
            print(line(run), flush=True)
        shards = server.stats()["shards"]
        for name in ("pushes", "duplicates", "lost_pushes"):
            run[name] = [each[name] for each in shards]
    finally:
        for worker in workers:
            ray.kill(worker)
        if server is not None:
            server.shutdown()
        ray.shutdown()


# --- what is shown ----------------------------------------------------------------------------------------


def say(text):
    """Say how far it is, on one line of a terminal."""
    print(text.ljust(90), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def of_kill(kill):
    """Say what the end of a shard did."""
    return (
        f"kill -9 of shard {kill['shard']}: recall {kill['before']:.4f} just before, {kill['after']:.4f} "
        f"when it was back, {kill['seconds']:.1f} s later"
    )


def mean_and_sd(run):
    """Of the recall in process, over the seeds, after each epoch."""
    recalls = np.array(run["in process"])
    return recalls.mean(0), recalls.std(0, ddof=1)


def line(run):
    """An epoch's numbers."""
    epoch, recall = len(run["server"]), run["server"][-1]
    mean, sd = (each[epoch - 1] for each in mean_and_sd(run))
    return f"{epoch:>5}{mean:>13.4f} ± {sd:.4f}{recall:>10.4f}{recall - mean:>+12.4f}"


def summary(run):
    """What came out."""
    mean, sd = (each[-1] for each in mean_and_sd(run))
    last = run["server"][-1]
    lines = [
        f"recall@20 in process: {mean:.4f} ± {sd:.4f}, mean and standard deviation of "
        f"{len(run['in process'])} seeds; with the server's, {run['in process'][0][-1]:.4f}",
        f"recall@20 on the server: {last:.4f}, {last - mean:+.4f}, which is {abs(last - mean) / sd:.1f} "
        "standard deviations",
        f"{run['steps']:,} steps in {run['seconds']:.1f} s, {run['steps'] / run['seconds']:.0f}/s; applied "
        f"by shards: {', '.join(f'{each:,}' for each in run['pushes'])}; sent again and not applied again: "
        f"{sum(run['duplicates'])}; lost: {sum(run['lost_pushes'])}",
    ]
    if run["kill"]:
        lines.append(f"after {run['kill']['epoch']:.2f} epochs, {of_kill(run['kill'])}")
    return "\n".join(lines)


def draw(path, run):
    """Plot recall by epoch, and the difference to the mean in process."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no {path}: drawing it needs matplotlib ({error}); pip install matplotlib")
        return
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    curves, apart = figure.subplots(1, 2)
    mean, sd = mean_and_sd(run)
    epochs, blue, kill = np.arange(1, len(mean) + 1), "#3b6ea5", run["kill"]
    for axes, less in ((curves, np.zeros_like(mean)), (apart, mean)):
        label = f"in process, mean ± sd of {len(run['in process'])} seeds"
        axes.fill_between(epochs, mean - sd - less, mean + sd - less, color=blue, alpha=0.2, linewidth=0)
        axes.plot(epochs, mean - less, color=blue, label=label)
        done = len(run["server"])
        axes.plot(
            epochs[:done],
            run["server"] - less[:done],
            color="#c0392b",
            marker="o",
            markersize=3,
            label=run["label"],
        )
        axes.set(xlabel="epoch", xlim=(0, len(mean) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if kill:
            axes.axvline(kill["epoch"], color="0.35", ls="--", label=f"kill -9 of shard {kill['shard']}")
    of_seed = {0: "in process, the server's seed", 1: "in process, other seeds"}
    for seed, recalls in enumerate(run["in process"]):
        label = of_seed.get(seed)
        apart.plot(epochs, recalls - mean, color=blue, linewidth=0.8, ls=":" if seed else "--", label=label)
    if kill:
        curves.plot(kill["epoch"], kill["before"], "k_", markersize=12, label="just before it")
        curves.plot(kill["epoch"], kill["after"], "kx", markersize=6, label="when the shard is back")
    curves.set(ylabel="recall@20")
    curves.legend(fontsize=8, loc="lower right")
    apart.set(ylabel="recall@20 less the mean in process")
    apart.legend(*(each[-2:] for each in apart.get_legend_handles_labels()), fontsize=8)
    figure.savefig(path)
    print(path)


# --- command line -----------------------------------------------------------------------------------------


def consistency(text):
    """Read --consistency."""
    if text in ("async", "sync"):
        return text
    if text.isdecimal():
        return "bounded", int(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected async, sync, or by how many steps one may be ahead")


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FILE", help="interactions (default: generated)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="runs in process; the server has the first seed")
    parser.add_argument(
        "--consistency",
        type=consistency,
        default="async",
        metavar="{async,sync,K}",
        help="K: no worker is more than K steps ahead",
    )
    parser.add_argument("--durability", choices=("log", "snapshot"), default="log")
    parser.add_argument("--chaos", action="store_true", help="end a shard by kill -9 on the way")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the plot and the results")
    args = parser.parse_args(argv)
    for name, least in (("workers", 1), ("shards", 1), ("epochs", 1), ("seeds", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least {least}")
    return parser, args


def main(argv=None):
    """Train in process and on a server, and print; return what was measured."""
    parser, args = arguments(argv)
    try:
        found = read_interactions(args.data) if args.data else generate(USERS, ITEMS, MEAN)
        split = hold_out(found)
        of_seeds = [
            BPROptions(loss="bpr", dim=args.dim, epochs=args.epochs, seed=seed, threads=1)
            for seed in range(args.seeds)
        ]
        judge = Judge(split, of_seeds[0])
    except SparseAdamError as error:
        parser.error(str(error))
    steps = sum(1 for _ in batches(split, of_seeds[0], 1))
    print(
        f"{len(split.train):,} interactions of {split.train.n_users:,} users with {split.train.n_items:,} "
        f"items, {len(split.test):,} held out; {steps} steps an epoch"
    )
    how = (
        args.consistency if isinstance(args.consistency, str) else "bounded by {1}".format(*args.consistency)
    )
    run = {
        "label": f"on the server: workers {args.workers}, shards {args.shards}, {how}",
        "in process": [], "server": [], "steps": 0, "seconds": 0.0, "kill": None, "restarts": 0,
    }  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    try:
        for options in of_seeds:
            recalls = []
            for recall in in_process(split, options, judge):
                recalls.append(recall)
                say(f"in process, seed {options.seed}: epoch {len(recalls)}, recall {recall:.4f}")
            run["in process"].append(recalls)
        print(f"{'epoch':>5}{'in process':>22}{'server':>10}{'difference':>12}")
        with tempfile.TemporaryDirectory(dir=args.out, prefix="server-") as folder:
            on_server(split, of_seeds[0], judge, steps, args, folder, run)
        print(summary(run))
    except KeyboardInterrupt:
        print(f"ended after {len(run['server'])} of {args.epochs} epochs on the server")
    if args.out and run["server"]:
        (args.out / "results.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
        draw(args.out / "recall.png", run)
    return run


if __name__ == "__main__":
    main()
