# SPDX-License-Identifier: Apache-2.0
"""An epoch of the recommender against the same model in torch, on the same batches in the same run.

    python -m benchmarks.bpr_vs_torch [INTERACTIONS] [--repeats N] [--threads N] [--batch-size N] [--dim N]
                                      [--json FILE]

torch has ``nn.Embedding(sparse=True)`` and ``torch.optim.SparseAdam``, and finds its batches ready as
tensors; ours shuffles and samples them within the time. Both start from the same vectors. Prints medians of
epochs taken in turn, the ratio, and the losses, which agree where both do the same arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import numba

import nb_sparse_adam
from nb_sparse_adam._src.bench.contenders import Contender
from nb_sparse_adam._src.bench.peers import TorchRows, import_peer
from nb_sparse_adam._src.bench.timing import alternate
from nb_sparse_adam._src.recommender.interactions import Split, generate, hold_out
from nb_sparse_adam._src.recommender.reading import read_interactions
from nb_sparse_adam.recommender import BPRModel, BPROptions, epoch_batches

TARGET = 5.0  # what is promised: a fifth of torch's time


class Ours:
    """Our model; each step is an epoch."""

    rest = Contender.rest

    def __init__(self, split: Split, options: BPROptions) -> None:
        self._model, self._epoch = BPRModel(split, options), 0
        self.losses: list[float] = []

    def ready(self) -> None:
        """Go on to the next epoch."""
        self._epoch += 1

    def step(self) -> None:
        """Train one epoch: shuffle, sample, gradients, optimizer."""
        self.losses.append(self._model.run_epoch(self._epoch))

    def warm(self) -> None:
        """Train the first epoch, which compiles the kernels."""
        self.ready()
        self.step()


class Torch:
    """The same in torch; each step is an epoch."""

    rest = TorchRows.rest

    def __init__(self, split: Split, options: BPROptions, threads: int) -> None:
        self._torch = torch = import_peer("torch")
        torch.set_num_threads(threads)
        self._split, self._options, self._epoch = split, options, 0
        start = BPRModel(split, options)  # for its initial vectors
        self._user, self._item = (
            torch.nn.Embedding.from_pretrained(torch.from_numpy(table), freeze=False, sparse=True)
            for table in (start.user_table, start.item_table)
        )
        self._optimizer = torch.optim.SparseAdam(
            [self._user.weight, self._item.weight], lr=options.lr, betas=options.betas, eps=options.eps
        )
        self._batches: list[tuple[Any, ...]] = []
        self.losses: list[float] = []

    def ready(self) -> None:
        """Make tensors of the batches of the next epoch."""
        self._epoch += 1
        self._batches = [
            tuple(
                self._torch.from_numpy(array.astype("int64"))
                for array in (
                    batch.users.repeat(self._options.negatives),
                    batch.positives.repeat(self._options.negatives),
                    batch.negatives.reshape(-1),
                )
            )
            for batch in epoch_batches(self._split, self._options, self._epoch)
        ]

    def step(self) -> None:
        """Train one epoch."""
        total, triples = 0.0, 0
        for users, positives, negatives in self._batches:
            u, i, j = self._user(users), self._item(positives), self._item(negatives)
            difference = (u * i).sum(1) - (u * j).sum(1)
            norms = u.square().sum() + i.square().sum() + j.square().sum()
            loss = self._torch.nn.functional.softplus(
                -difference
            ).mean() + 0.5 * self._options.reg * norms / len(users)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total += loss.item() * len(users)
            triples += len(users)
        self.losses.append(total / triples)

    def warm(self) -> None:
        """Train the first epoch."""
        self.ready()
        self.step()


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print it."""
    defaults = BPROptions()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("interactions", nargs="?", help="a file (default: generated data)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each that are timed")
    parser.add_argument(
        "--threads",
        type=int,
        help="of each contender (default: all for torch; ours then finds out how many pay)",
    )
    parser.add_argument("--batch-size", type=int, default=1024, help="interactions in a batch")
    parser.add_argument("--dim", type=int, default=defaults.dim, help="length of the vectors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians there too")
    args = parser.parse_args(argv)
    threads = args.threads or numba.get_num_threads()
    try:
        torch = import_peer("torch")
    except NotImplementedError as error:
        print(f"{error}\nThis comparison needs it.", file=sys.stderr)
        return 1

    split = hold_out(read_interactions(args.interactions) if args.interactions else generate())
    shared: dict[str, Any] = {"loss": "bpr", "negatives": 1, "lr": 0.005, "reg": 0.01, "init_std": 0.1}
    shared |= {"dim": args.dim, "batch_size": args.batch_size, "threads": args.threads}
    like_torch = BPROptions(step_counts="global", eps_hat=True, **shared)
    contenders = {
        "torch, nn.Embedding(sparse=True), SparseAdam": Torch(split, like_torch, threads),
        "ours, step_counts='global', eps_hat=True": Ours(split, like_torch),
        "ours, step_counts='element'": Ours(split, BPROptions(step_counts="element", **shared)),
    }
    print(
        f"nb_sparse_adam {nb_sparse_adam.__version__}, numba {numba.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {os.cpu_count()} cores, {threads} threads; "
        f"{len(split.train):,} interactions, {split.train.n_users:,} users, {split.train.n_items:,} items, "
        f"dim {args.dim}, batches of {args.batch_size}; median of {args.repeats} epochs, taken in turn",
        flush=True,
    )
    medians = {name: statistics.median(times) for name, times in alternate(contenders, args.repeats).items()}
    baseline = next(iter(medians.values()))
    for name, seconds in medians.items():
        losses = contenders[name].losses
        print(
            f"  {name:<46}{seconds:8.3f} s an epoch  {baseline / seconds:6.1f}x  "
            f"loss {losses[0]:.5f} -> {losses[-1]:.5f}"
        )
    ratio = baseline / max(list(medians.values())[1:])
    print(f"at least {ratio:.1f} times as fast as torch; promised: {TARGET:.0f}")
    if args.json:
        args.json.write_text(
            json.dumps({"seconds": medians, "ratio": ratio}, indent=2) + "\n", encoding="utf-8"
        )
    return 0 if ratio >= TARGET else 2


if __name__ == "__main__":
    sys.exit(main())
