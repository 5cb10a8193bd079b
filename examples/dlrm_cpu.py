# SPDX-License-Identifier: Apache-2.0
"""A small DLRM on the CPU, trained three ways side by side, and where the time of a step goes.

    python examples/dlrm_cpu.py [--data FILE] [--batch N] [--dim N] [--steps N] [--dtype float64]

The model is that of Naumov et al. 2019: a bottom MLP for numbers, an embedding bag for each category (26 of
them in Criteo's data), their pairwise products, and a top MLP that predicts a click. It is trained with
torch.optim.SparseAdam, with nb_sparse_adam.torch.SparseAdam in its place, and with
nb_sparse_adam.torch.EmbeddingBag, which updates its table in the backward pass. What comes last in the data
is held out, and the area under the ROC curve (AUC) of the trained models on it is printed.

Without --data it generates data with the number of categories of the Criteo Kaggle set, whose ids have a long
tail (Zipf). With --data it reads the head of a file of one of two kinds, compressed or not; one that is small
is gone through more than once:

- Criteo's: lines of a label, 13 integers and 26 hexadecimal categories, separated by tabs, any of which but
  the label may be missing.
- Avazu's: comma-separated, with a header. Columns are found by their names, in any order, and others ignored.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

import nb_sparse_adam.torch

NUMBERS, CATEGORIES = 13, 26  # of Criteo's data
# Categories of the Criteo Kaggle display advertising challenge, field by field.
CRITEO = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
    5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
# Categories of the Avazu click-through rate challenge, beside "click" and "hour" (YYMMDDHH).
AVAZU = (
    "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model", "device_type", "device_conn_type", "C14", "C15", "C16", "C17",
    "C18", "C19", "C20", "C21",
)  # fmt: skip
WARM = 3  # steps that are not timed
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


def read(path, samples, max_rows):
    """Read the first samples of a file of Criteo's or Avazu's; the same four things."""
    # The name of a file is no pattern.
    columns = pl.read_csv(path, n_rows=0, infer_schema=False, quote_char=None, glob=False).columns
    reader = read_avazu if "click" in columns else read_criteo
    numbers, categories, labels = reader(path, samples)
    # Numbered by their order; beyond max_rows several share a row.
    codes = [column.fill_null("").rank("dense").to_numpy() - 1 for column in categories]
    rows = [min(int(code.max(initial=0)) + 1, max_rows) for code in codes]
    ids = np.stack([code.astype(np.int64) % count for code, count in zip(codes, rows, strict=True)])
    return rows, numbers.astype(np.float32), ids[:, :, None], labels.to_numpy()[:, None].astype(np.float32)


def read_criteo(path, samples):
    """Numbers (samples, 13), a frame of 26 columns, and a column of labels."""
    frame = pl.read_csv(
        path,
        separator="\t",
        has_header=False,
        quote_char=None,
        n_rows=samples,
        glob=False,
        schema=dict.fromkeys(["label", *map(str, range(NUMBERS))], pl.Int64)
        | dict.fromkeys([f"category {i}" for i in range(CATEGORIES)], pl.String),
    )
    numbers = frame[:, 1 : 1 + NUMBERS].fill_null(0).to_numpy().clip(min=0)
    return np.log1p(numbers), frame[:, 1 + NUMBERS :], frame["label"]


def read_avazu(path, samples):
    """Numbers (samples, 2), where on a clock the hour is, a frame of 21 columns, and a column of labels."""
    frame = pl.read_csv(
        path,
        n_rows=samples,
        glob=False,
        columns=["click", "hour", *AVAZU],
        schema_overrides=dict.fromkeys(AVAZU, pl.String) | {"click": pl.Int64, "hour": pl.Int64},
    )
    angle = frame["hour"].fill_null(0).to_numpy() % 100 * (2 * np.pi / 24)
    return np.stack([np.sin(angle), np.cos(angle)], 1), frame.select(AVAZU), frame["click"]


def batches_of(data, batch, steps, dtype):
    """So many batches of tensors: in the order of the samples, then shuffled, again and again."""
    numbers, ids, labels = data
    rng, order = np.random.default_rng(1), np.arange(len(labels))
    while len(order) < batch * steps:
        order = np.concatenate([order, rng.permutation(len(labels))])
    return [
        tensors([numbers[some], ids[:, some], labels[some]], dtype)
        for some in order[: batch * steps].reshape(steps, batch)
    ]


def tensors(data, dtype):
    """Numbers, ids and labels as tensors."""
    numbers, ids, labels = data
    return (
        torch.from_numpy(numbers).to(dtype),
        torch.from_numpy(np.ascontiguousarray(ids)),
        torch.from_numpy(labels).to(dtype),
    )


# --- model ------------------------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers with ReLU in between."""
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DLRM(nn.Module):
    """`make_bag(rows, dim)` makes an embedding bag; `numbers` is how many of them a sample has."""

    def __init__(self, numbers, rows, dim, hidden, make_bag):
        super().__init__()
        self.bottom = mlp(numbers, *hidden, dim)
        self.bags = nn.ModuleList(make_bag(count, dim) for count in rows)
        vectors = 1 + len(rows)
        first, second = torch.tril_indices(vectors, vectors, -1)
        self.pairs = first * vectors + second
        self.top = mlp(dim + len(self.pairs), *hidden[::-1], 1)

    def forward(self, numbers, ids):
        """Logits (batch, 1) of numbers (batch, numbers) and ids (tables, batch, ids in a bag)."""
        bottom = self.bottom(numbers)
        vectors = torch.stack([bottom, *(bag(i) for bag, i in zip(self.bags, ids, strict=True))], 1)
        products = (vectors @ vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([bottom, products], 1))


class Trainer:
    """The model, trained in one of the three ways; all of them begin with the same parameters."""

    def __init__(self, way, numbers, rows, dim, hidden, lr, dtype):
        torch.manual_seed(0)
        self.fused = way == "fused"

        def make_bag(count, dim):
            if self.fused:
                return nb_sparse_adam.torch.EmbeddingBag(count, dim, mode="sum", optimizer={"lr": lr})
            return nn.EmbeddingBag(count, dim, mode="sum", sparse=True)

        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.model = DLRM(numbers, rows, dim, hidden, make_bag)
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

    @torch.no_grad()
    def scores(self, numbers, ids, at_once=4096):
        """Logits (samples,) of samples that it does not learn from."""
        cuts = range(0, len(numbers), at_once)
        parts = [self.model(numbers[at : at + at_once], ids[:, at : at + at_once]) for at in cuts]
        return torch.cat(parts)[:, 0].numpy()


def compare(trainers, batches):
    """Train all three, taking turns: losses (3, steps), and seconds (3, steps after the first few, 4)."""
    losses, seconds = [[] for _ in WAYS], [[] for _ in WAYS]
    for number, batch in enumerate(batches):
        for way, trainer in enumerate(trainers):
            loss, parts = trainer.step(*batch)
            losses[way].append(loss)
            if number >= WARM:
                seconds[way].append(parts)
    return np.array(losses), np.array(seconds)


def area_under_curve(labels, scores):
    """How probably a random click has a larger score than a random sample without; NaN without either.

    By the sum of the ranks of clicks (Mann and Whitney 1947); equal scores share their mean rank.
    """
    clicks = labels > 0
    n, others = np.count_nonzero(clicks), np.count_nonzero(~clicks)
    ranks = pl.Series(scores).rank("average").to_numpy()
    return (ranks[clicks].sum() - n * (n + 1) / 2) / (n * others) if n and others else np.nan


# --- command line -----------------------------------------------------------------------------------------


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a file of Criteo's or Avazu's (default: generated data)")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=32, help="of the embeddings")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64], help="widths of the bottom MLP")
    parser.add_argument(
        "--lookups", type=int, default=10, help="ids in a bag of generated data; others have one"
    )
    parser.add_argument("--max-rows", type=int, default=500_000, help="of a table; more ids share rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hold-out", type=float, default=0.1, help="share of the samples, the last ones")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: there is no file {args.data}")
    if args.steps <= WARM:
        parser.error(f"--steps is {args.steps}, expected at least {WARM + 1}: the first {WARM} are not timed")
    if not 0 <= args.hold_out < 1:
        parser.error(f"--hold-out is {args.hold_out}, expected 0 <= share < 1")
    return parser, args


def main(argv=None):
    """Train, print, and return the losses and seconds of `compare`."""
    parser, args = arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    held_out = math.ceil(args.batch * args.steps * args.hold_out / (1 - args.hold_out))
    samples = args.batch * args.steps + held_out
    if args.data is None:
        rows, *data = generate(samples, args.lookups, args.max_rows)
    else:
        try:
            rows, *data = read(args.data, samples, args.max_rows)
        except (pl.exceptions.PolarsError, OSError) as error:
            parser.error(
                f"--data: {args.data}: expected a label, 13 integers and 26 categories a line, or a header "
                f"with the columns of Avazu's data, {error}"
            )
    numbers, ids, labels = data
    if len(labels) < samples:
        held_out = math.ceil(len(labels) * args.hold_out)
    learnt = len(labels) - held_out
    if learnt < 1:
        parser.error(f"--data: {args.data} holds {len(labels)} samples, expected at least 2")
    batch = min(args.batch, learnt)
    batches = batches_of((numbers[:learnt], ids[:, :learnt], labels[:learnt]), batch, args.steps, dtype)
    print(
        f"{len(rows)} tables of {sum(rows):,} rows in all, dim {args.dim}, {args.dtype}; {learnt:,} samples, "
        f"{held_out:,} held out; batches of {batch}, {ids.shape[2]} ids in a bag; {args.steps} steps, "
        f"{args.steps * batch / learnt:.3g} passes, on {args.threads} threads"
    )
    trainers = [Trainer(way, numbers.shape[1], rows, args.dim, args.hidden, args.lr, dtype) for way in WAYS]
    losses, seconds = compare(trainers, batches)

    print(f"\n{'median ms':<24}" + "".join(f"{part:>15}" for part in (*PARTS, "whole step")))
    whole = np.median(seconds.sum(2), 1)
    for way, name in enumerate(WAYS):
        times = [*np.median(seconds[way], 0), whole[way]]
        print(f"{name:<24}" + "".join(f"{1e3 * each:>15.2f}" for each in times))
    for way in (1, 2):
        print(f"{WAYS[way]}: {whole[0] / whole[way]:.2f} times as fast as {WAYS[0]}, the whole step")

    print(f"\nloss, mean of the last {min(10, args.steps)} steps")
    for way, name in enumerate(WAYS):
        far = np.max(np.abs(losses[way] / losses[0] - 1))
        print(f"{name:<24}{losses[way, -10:].mean():.6f}   at most {far:.0e} from torch's in any step")

    if held_out:
        print(f"\nAUC on the {held_out:,} samples held out, {labels[learnt:].sum():,.0f} of them clicks")
        some = tensors([numbers[learnt:], ids[:, learnt:], labels[learnt:]], dtype)
        for name, trainer in zip(WAYS, trainers, strict=True):
            print(f"{name:<24}{area_under_curve(labels[learnt:, 0], trainer.scores(*some[:2])):.4f}")
    return losses, seconds


if __name__ == "__main__":
    main()
