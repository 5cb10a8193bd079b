# SPDX-License-Identifier: Apache-2.0
"""A small DLRM on the CPU, trained three ways side by side, and where the time of a step goes.

    python examples/dlrm_cpu.py [--data train.txt] [--batch N] [--dim N] [--steps N] [--dtype float64]

The model is that of Naumov et al. 2019: a bottom MLP for 13 numbers, 26 embedding bags for as many
categories, their pairwise products, and a top MLP that predicts a click. It is trained with
torch.optim.SparseAdam, with nb_sparse_adam.torch.SparseAdam in its place, and with
nb_sparse_adam.torch.EmbeddingBag, which updates its table in the backward pass.

Without --data it generates data with the number of categories of the Criteo Kaggle set, whose ids have a long
tail (Zipf). With --data it reads the head of a file in Criteo's format: lines of a label, 13 integers and 26
hexadecimal categories, separated by tabs, any of which but the label may be missing.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

import nb_sparse_adam.torch

NUMBERS, CATEGORIES = 13, 26
# Categories of the Criteo Kaggle display advertising challenge, field by field.
CRITEO = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
    5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
WAYS = ("torch.optim.SparseAdam", "drop-in", "fused")
PARTS = ("forward", "backward", "sparse update", "dense update")


# --- data -------------------------------------------------------------------------------------------------


def generate(samples, lookups, max_rows, seed=0):
    """Table sizes, and numbers (samples, 13), ids (26, samples, lookups) and labels (samples, 1)."""
    rng = np.random.default_rng(seed)
    rows = [min(count, max_rows) for count in CRITEO]
    numbers = np.log1p(rng.exponential(3, (samples, NUMBERS))).astype(np.float32)
    # The ranks of a Zipf distribution, scattered over the table; the label depends on numbers and ranks.
    ranks = rng.zipf(1.2, (CATEGORIES, samples, lookups)).astype(np.uint64)
    ids = (ranks * np.uint64(2654435761) % np.array(rows, np.uint64)[:, None, None]).astype(np.int64)
    field = np.arange(CATEGORIES)[:, None, None]
    effect = np.sin(ids % 1009 * 1.7 + field).sum((0, 2)) / np.sqrt(lookups)
    logits = 0.7 * effect + numbers @ rng.normal(0, 0.3, NUMBERS) - 1
    labels = rng.random(samples) < 1 / (1 + np.exp(-logits))
    return rows, numbers, ids, labels[:, None].astype(np.float32)


def read_criteo(path, samples, max_rows):
    """Read the first lines of a file in Criteo's format; the same four things."""
    frame = pl.read_csv(
        path,
        separator="\t",
        has_header=False,
        quote_char=None,
        n_rows=samples,
        glob=False,  # the name of a file is no pattern
        schema=dict.fromkeys(["label", *map(str, range(NUMBERS))], pl.Int64)
        | dict.fromkeys([f"category {i}" for i in range(CATEGORIES)], pl.String),
    )
    numbers = frame[:, 1 : 1 + NUMBERS].fill_null(0).to_numpy().clip(min=0)
    # Numbered as they come; beyond max_rows several share a row.
    codes = [column.fill_null("").rank("dense").to_numpy() - 1 for column in frame[:, 1 + NUMBERS :]]
    rows = [min(int(code.max()) + 1, max_rows) for code in codes]
    ids = np.stack([code.astype(np.int64) % count for code, count in zip(codes, rows, strict=True)])
    labels = frame["label"].to_numpy()[:, None]
    return rows, np.log1p(numbers).astype(np.float32), ids[:, :, None], labels.astype(np.float32)


def batches_of(data, batch, dtype):
    """Cut the samples into batches of tensors; what is left of them is dropped."""
    numbers, ids, labels = data
    return [
        (
            torch.from_numpy(numbers[at : at + batch]).to(dtype),
            torch.from_numpy(np.ascontiguousarray(ids[:, at : at + batch])),
            torch.from_numpy(labels[at : at + batch]).to(dtype),
        )
        for at in range(0, len(labels) - batch + 1, batch)
    ]


# --- model ------------------------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers with ReLU in between."""
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DLRM(nn.Module):
    """`make_bag(rows, dim)` makes an embedding bag."""

    def __init__(self, rows, dim, hidden, make_bag):
        super().__init__()
        self.bottom = mlp(NUMBERS, *hidden, dim)
        self.bags = nn.ModuleList(make_bag(count, dim) for count in rows)
        vectors = 1 + len(rows)
        first, second = torch.tril_indices(vectors, vectors, -1)
        self.pairs = first * vectors + second
        self.top = mlp(dim + len(self.pairs), *hidden[::-1], 1)

    def forward(self, numbers, ids):
        """Logits (batch, 1) of numbers (batch, 13) and ids (26, batch, ids in a bag)."""
        bottom = self.bottom(numbers)
        vectors = torch.stack([bottom, *(bag(i) for bag, i in zip(self.bags, ids, strict=True))], 1)
        products = (vectors @ vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([bottom, products], 1))


class Trainer:
    """The model, trained in one of the three ways; all of them begin with the same parameters."""

    def __init__(self, way, rows, dim, hidden, lr, dtype):
        torch.manual_seed(0)
        self.fused = way == "fused"

        def make_bag(count, dim):
            if self.fused:
                return nb_sparse_adam.torch.EmbeddingBag(count, dim, mode="sum", optimizer={"lr": lr})
            return nn.EmbeddingBag(count, dim, mode="sum", sparse=True)

        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model = DLRM(rows, dim, hidden, make_bag)
        finally:
            torch.set_default_dtype(default)
        for bag in self.model.bags:
            bag.weight.data.mul_(dim**-0.5)
        self.dense = torch.optim.AdamW([*self.model.bottom.parameters(), *self.model.top.parameters()], lr)
        self.sparse = None
        if not self.fused:
            optimizer = torch.optim.SparseAdam if way == WAYS[0] else nb_sparse_adam.torch.SparseAdam
            self.sparse = optimizer(self.model.bags.parameters(), lr)

    def step(self, numbers, ids, labels):
        """Take a step; return the loss, and the seconds that its parts took."""
        clock = [time.perf_counter()]

        def lap():
            clock.append(time.perf_counter())

        loss = nn.functional.binary_cross_entropy_with_logits(self.model(numbers, ids), labels)
        lap()
        if self.fused:
            # A fused bag has no gradient. Without `accumulate` its update is a part of loss.backward(); with
            # it, it comes at the end of the block, and can be timed by itself.
            with nb_sparse_adam.torch.accumulate(self.model):
                loss.backward()
                lap()
        else:
            loss.backward()
            lap()
            self.sparse.step()
            self.sparse.zero_grad()
        lap()
        self.dense.step()
        self.dense.zero_grad()
        lap()
        return loss.item(), np.diff(clock)


def compare(rows, batches, dim, hidden, lr, dtype, warm=3):
    """Train all three, taking turns: losses (3, steps), and seconds (3, steps after the first few, 4)."""
    trainers = [Trainer(way, rows, dim, hidden, lr, dtype) for way in WAYS]
    losses, seconds = [[] for _ in WAYS], [[] for _ in WAYS]
    for number, batch in enumerate(batches):
        for way, trainer in enumerate(trainers):
            loss, parts = trainer.step(*batch)
            losses[way].append(loss)
            if number >= warm:
                seconds[way].append(parts)
    return np.array(losses), np.array(seconds)


# --- command line -----------------------------------------------------------------------------------------


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a file in Criteo's format (default: generated data)")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=32, help="of the embeddings")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64], help="widths of the bottom MLP")
    parser.add_argument(
        "--lookups", type=int, default=10, help="ids in a bag of generated data; Criteo's have one"
    )
    parser.add_argument("--max-rows", type=int, default=500_000, help="of a table; more ids share rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: there is no file {args.data}")
    return parser, args


def main(argv=None):
    """Train, print, and return the losses and seconds of `compare`."""
    parser, args = arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.data is None:
        rows, *data = generate(args.batch * args.steps, args.lookups, args.max_rows)
    else:
        try:
            rows, *data = read_criteo(args.data, args.batch * args.steps, args.max_rows)
        except (pl.exceptions.PolarsError, OSError) as error:
            parser.error(
                f"--data: {args.data}: expected a label, 13 integers and 26 categories a line, {error}"
            )
    batches = batches_of(data, args.batch, dtype)
    if len(batches) < 4:
        parser.error(
            f"got {len(batches)} batches of {args.batch}, expected at least 4: pass a smaller --batch"
        )
    print(
        f"{len(rows)} tables of {sum(rows):,} rows in all, dim {args.dim}, {args.dtype}; batches of "
        f"{args.batch}, {data[1].shape[2]} ids in a bag; {len(batches)} steps on {args.threads} threads"
    )
    losses, seconds = compare(rows, batches, args.dim, args.hidden, args.lr, dtype)

    print(f"\n{'median ms':<24}" + "".join(f"{part:>15}" for part in (*PARTS, "whole step")))
    whole = np.median(seconds.sum(2), 1)
    for way, name in enumerate(WAYS):
        times = [*np.median(seconds[way], 0), whole[way]]
        print(f"{name:<24}" + "".join(f"{1e3 * each:>15.2f}" for each in times))
    for way in (1, 2):
        print(f"{WAYS[way]}: {whole[0] / whole[way]:.2f} times as fast as {WAYS[0]}, the whole step")

    print(f"\nloss, mean of the last {min(10, len(batches))} steps")
    for way, name in enumerate(WAYS):
        far = np.max(np.abs(losses[way] / losses[0] - 1))
        print(f"{name:<24}{losses[way, -10:].mean():.6f}   at most {far:.0e} from torch's in any step")
    return losses, seconds


if __name__ == "__main__":
    main()
