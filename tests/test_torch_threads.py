# SPDX-License-Identifier: Apache-2.0
"""torch's threads, DataLoader's workers and Python's threads beside ours."""

import subprocess
import sys
import threading

import pytest
from needs import need

torch = need("torch")

from nb_sparse_adam.torch import EmbeddingBag, SparseAdam  # noqa: E402

pytestmark = pytest.mark.jit


def run(program, tmp_path):
    """Run a program in a process of its own, where no thread has been started yet; return what it prints."""
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN_WITH_WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from nb_sparse_adam.torch import EmbeddingBag, SparseAdam

ROWS, DIM, BATCH = 5000, 16, 2048  # steps that are large enough for two threads

class Clicks(Dataset):
    def __len__(self):
        return 4 * BATCH

    def __getitem__(self, at):
        generator = torch.Generator().manual_seed(at)
        ids = torch.randint(ROWS, (4,), generator=generator)
        return ids, (ids < ROWS // 2).float().mean()

def own_step(_):
    # A worker may even train a model of its own.
    bag = EmbeddingBag(ROWS, DIM, mode="sum")
    bag(torch.arange(ROWS).reshape(-1, 4)).sum().backward()
    assert bag.optimizer.state[bag.weight]["step"] == 1

def train(context, workers):
    torch.manual_seed(0)
    fused = EmbeddingBag(ROWS, DIM, mode="sum")
    bag = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=True)
    tops = [torch.nn.Linear(DIM, 1), torch.nn.Linear(DIM, 1)]
    optimizer = SparseAdam(bag.parameters())
    dense = torch.optim.AdamW([param for top in tops for param in top.parameters()])
    for epoch in range(2):  # each epoch starts workers anew, after steps were taken in this process
        loader = DataLoader(
            Clicks(), BATCH, num_workers=workers, multiprocessing_context=context if workers else None,
            worker_init_fn=own_step if workers else None,
        )
        for ids, share in loader:
            dense.zero_grad()
            bag.weight.grad = None
            for layer, top in zip((fused, bag), tops):
                (top(layer(ids)).squeeze(1) - share).pow(2).mean().backward()
            optimizer.step()
            dense.step()
    return fused.weight.detach().clone(), bag.weight.detach().clone()

if __name__ == "__main__":
    alone, beside = train(CONTEXT, 0), train(CONTEXT, WORKERS)
    for kind, one, other in zip(("fused", "drop-in"), alone, beside):
        assert torch.equal(one, other), kind
    print("done")
"""


# A worker that is spawned imports torch anew, and has nothing of the others: one is enough.
@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)], ids=["fork", "spawn"])
def test_workers_of_a_dataloader_after_steps_in_the_parent(context, workers, tmp_path):
    program = TRAIN_WITH_WORKERS.replace("CONTEXT", repr(context)).replace("WORKERS", str(workers))
    assert run(program, tmp_path) == "done\n"


SENT = """
import torch
from torch import multiprocessing
from nb_sparse_adam.torch import EmbeddingBag, SparseAdam

def train(layer, optimizer, param):
    layer(torch.arange(10)[None]).sum().backward()
    assert layer.optimizer.state[layer.weight]["step"] == 2
    param.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 4), (50, 4), check_invariants=True)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2

if __name__ == "__main__":
    layer = EmbeddingBag(50, 4)
    layer(torch.arange(10)[None]).sum().backward()
    layer.share_memory()
    param = torch.nn.Parameter(torch.zeros(50, 4))
    optimizer = SparseAdam([param])
    param.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 4), (50, 4), check_invariants=True)
    optimizer.step()
    param.grad = None  # torch cannot send a sparse one
    before = layer.weight.detach().clone()
    process = multiprocessing.get_context("spawn").Process(target=train, args=(layer, optimizer, param))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not torch.equal(layer.weight, before)  # the table is shared
    print("done")
"""


def test_a_layer_with_its_state_is_sent_to_a_process(tmp_path):
    assert run(SENT, tmp_path) == "done\n"


STEP = """
import os
os.environ["NUMBA_NUM_THREADS"] = "2"
import numba, torch
from nb_sparse_adam.torch import EmbeddingBag, SparseAdam

torch.set_num_threads(THREADS)
bag = torch.nn.EmbeddingBag(5000, 64, sparse=True)
optimizer = SparseAdam(bag.parameters())
fused = EmbeddingBag(5000, 64)
ids = torch.randint(5000, (4096, 20))
for _ in range(3):
    optimizer.zero_grad()
    bag(ids).sum().backward()
    optimizer.step()
    fused(ids).sum().backward()
try:
    print(numba.threading_layer())
except ValueError:
    print("no thread was started")
assert numba.get_num_threads() == 2
"""


@pytest.mark.parametrize(("threads", "started"), [(1, False), (2, True)])
def test_torchs_number_of_threads_is_heard(threads, started, tmp_path):
    said = run(STEP.replace("THREADS", str(threads)), tmp_path)
    assert (said == "no thread was started\n") is not started


def trained(steps, seed, layer=None):
    torch.manual_seed(seed)
    layer = EmbeddingBag(500, 16) if layer is None else layer
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(500, (256, 4), generator=generator)
        layer(ids).pow(2).sum().backward()
    return layer


def in_threads(*calls):
    results, failures = [None] * len(calls), []

    def work(at, call):
        try:
            results[at] = call()
        except Exception as error:  # noqa: BLE001 (raised below)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(at, call)) for at, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return results


def test_two_threads_with_a_model_each():
    expected = [trained(50, seed).weight for seed in (1, 2)]
    torch.manual_seed(0)
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers.append(EmbeddingBag(500, 16))
    in_threads(*(lambda at=at: trained(50, at + 1, layers[at]) for at in range(2)))
    for layer, weight in zip(layers, expected, strict=True):
        assert torch.equal(layer.weight, weight)


def test_two_threads_with_one_model():
    layer = trained(1, 0)
    in_threads(lambda: trained(50, 1, layer), lambda: trained(50, 2, layer))
    assert layer.optimizer.state[layer.weight]["step"] == 101
    assert layer.weight.isfinite().all()


def test_two_threads_with_one_optimizer():
    param = torch.nn.Parameter(torch.zeros(500, 16))
    optimizer = SparseAdam([param])
    param.grad = torch.sparse_coo_tensor(
        torch.arange(500)[None], torch.ones(500, 16), (500, 16), check_invariants=True
    )
    optimizer.step()
    in_threads(*(lambda: [optimizer.step() for _ in range(50)] for _ in range(2)))
    assert optimizer.state[param]["step"] == 101
