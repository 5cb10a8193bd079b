# SPDX-License-Identifier: Apache-2.0
"""The parameter server on the command line: ``serve`` and ``stats``."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.arguments import count, number
from nb_sparse_adam._src.recommender.signals import Signals
from nb_sparse_adam.errors import OptionError, ServerError, SparseAdamError

if TYPE_CHECKING:  # the other commands need none of it
    from nb_sparse_adam._src.parameter_server.server import ParameterServer
    from nb_sparse_adam._src.parameter_server.spec import Config, TableSpec

_INTERRUPTED = 130
_LOOK = 5.0  # seconds between two looks whether the server is still there

_FIELDS = {  # argument -> what it is in `Config`
    "shards": "shards",
    "durability": "durability",
    "consistency": "consistency",
    "workers": "workers",
    "snapshot_interval": "interval",
    "step_timeout": "step_timeout",
    "cpus_per_shard": "cpus_per_shard",
}

_seconds = number(lambda x: 0 < x < math.inf, "seconds, more than 0")


def add_server(commands: Any) -> None:
    """Add the commands to argparse's subparsers."""
    _add_serve(commands)
    _add_stats(commands)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a parameter server",
        description="Make a parameter server, or go on with the one in --checkpoint-dir, on a cluster of Ray "
        "or, if there is none, on this machine. Runs until Ctrl-C or SIGTERM (after which it exits with 0): "
        "all shards write a snapshot then. With a server that is there, options need not be given again; one "
        "that differs from what it was made with is refused.",
    )
    serve.add_argument("name", metavar="NAME", help="by which clients find it")
    serve.add_argument(
        "--tables",
        metavar="FILE",
        help="TOML with a table for each embedding table, whose keys are dim and options of EmbeddingTable "
        "(needed for a new server)",
    )
    serve.add_argument(
        "--checkpoint-dir", required=True, metavar="DIR", help="its folder, which all machines can reach"
    )
    _add_address(serve, "the one of this machine; if there is none, one is started, which ends with this")
    serve.add_argument("--shards", type=count, metavar="N", help="processes (default: 1)")
    serve.add_argument(
        "--durability",
        choices=("snapshot", "log"),
        help="whether pushes since the last snapshot are lost when a shard dies, or are in a log before they "
        "are acknowledged (default: snapshot)",
    )
    serve.add_argument(
        "--consistency",
        type=_consistency,
        metavar="async|sync|bounded:K",
        help="pushes are applied as they come; or a step is the sum over all workers; or no worker is more "
        "than K steps ahead (default: async)",
    )
    serve.add_argument("--workers", type=count, metavar="N", help="how many, with sync (and bounded:K)")
    serve.add_argument(
        "--snapshot-interval", type=_seconds, metavar="S", help="seconds between snapshots (default: 60)"
    )
    serve.add_argument(
        "--step-timeout", type=_seconds, metavar="S", help="seconds in which all workers push (default: 60)"
    )
    serve.add_argument(
        "--cpus-per-shard",
        type=number(lambda x: 0 <= x < math.inf, "a number of at least 0"),
        metavar="C",
        help="what Ray sets aside for a shard, and how many threads it uses, at least 1 (default: 0)",
    )
    serve.add_argument(
        "--detach",
        action="store_true",
        help="return when the server is there, and leave it running; needs --address (or RAY_ADDRESS) of a "
        "cluster, for what this command starts ends with it",
    )
    serve.add_argument(
        "--report", type=_seconds, metavar="S", help="print a line of numbers every S seconds (default: none)"
    )
    serve.set_defaults(run=_serve, parser=serve)


def _add_stats(commands: Any) -> None:
    stats = commands.add_parser(
        "stats",
        help="numbers about a parameter server that is running",
        description="Print what each shard of a running server holds, has done and how long it took. Starts "
        "nothing: a server whose processes are gone is an error.",
    )
    stats.add_argument("name", metavar="NAME", help="of the server")
    _add_address(stats, "one that runs on this machine")
    stats.add_argument("--json", action="store_true", help="what ParameterServer.stats() returns, on a line")
    stats.add_argument("--watch", type=_seconds, metavar="S", help="again every S seconds, until Ctrl-C")
    stats.set_defaults(run=_stats, parser=stats)


def _add_address(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--address", metavar="HOST:PORT", help=f"of a cluster of Ray (default: RAY_ADDRESS, or {default})"
    )


def _consistency(text: str) -> str | int:
    """Convert for argparse; an integer is how many steps a worker may be ahead."""
    kind, _, ahead = text.partition(":")
    if text in ("async", "sync"):
        return text
    if kind == "bounded" and ahead.isdecimal():
        return int(ahead)
    raise argparse.ArgumentTypeError(f"expected async, sync or bounded:K, K an integer, got {text!r}")


def _words(consistency: str | int) -> str:
    return consistency if isinstance(consistency, str) else f"bounded:{consistency}"


# --- serve ------------------------------------------------------------------------------------------------


def read_tables(path: str) -> dict[str, TableSpec]:
    """Read the tables of a server from a file of TOML.

    Raises
    ------
    OptionError
        If it cannot be read, or says what a table cannot have.
    """
    from nb_sparse_adam._src.parameter_server.spec import TableSpec

    tomli = require("tomli", "ray", "reading a file of tables")
    try:
        given = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--tables {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of text that is no UTF-8, or no TOML
        raise OptionError(f"--tables {path}: is no TOML: {error}") from error
    if not given:
        raise OptionError(f"--tables {path}: has no tables, expected [NAME] and dim = ... for each")
    tables = {}
    for name, spec in given.items():
        try:
            tables[name] = TableSpec.from_json(spec)
        except SparseAdamError as error:
            raise OptionError(f"--tables {path}: table {name!r}: {error}") from error
    return tables


def _serve(arguments: argparse.Namespace) -> int:
    from nb_sparse_adam._src.parameter_server.folders import is_folder, read_config
    from nb_sparse_adam._src.parameter_server.server import ParameterServer, connect

    name, folder = arguments.name, Path(arguments.checkpoint_dir).absolute()
    address = arguments.address or os.environ.get("RAY_ADDRESS") or None
    if arguments.detach and address in (None, "local"):
        raise OptionError(
            "--detach needs --address (or RAY_ADDRESS) of a cluster, for example auto after `ray start "
            "--head`: one that this command starts ends with it"
        )
    tables = None if arguments.tables is None else read_tables(arguments.tables)
    given = {flag: getattr(arguments, flag) for flag in _FIELDS if getattr(arguments, flag) is not None}
    is_there = is_folder(folder)
    if is_there:
        _refuse_others(read_config(folder), folder, tables, given)
    else:
        if tables is None:
            raise OptionError(f"--tables is needed: {folder} holds no server yet")
        given = _checked(name, tables, given)
    ray = connect(address, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler would end this process at once
    with Signals() as signals:  # one that comes while the server starts ends it when it has started
        if is_there:
            _refuse_elsewhere(ray, name, folder)
            server = ParameterServer.attach(name, checkpoint_dir=folder)
        else:
            assert tables is not None
            server = ParameterServer.create(name, tables, checkpoint_dir=folder, **given)
        print(_told(ray, server, folder, is_there), flush=True)
        if arguments.detach:
            return 0
        _stay(ray, server, signals, arguments.report)
        server.shutdown()
        print(f"{name!r} is shut down; what it had is in {folder}", flush=True)
    return 0 if signals.arrived == signal.SIGTERM else _INTERRUPTED


def _checked(name: str, tables: dict[str, TableSpec], given: dict[str, Any]) -> dict[str, Any]:
    """Check what is wanted before Ray is started; return it as `ParameterServer.create` takes it."""
    from nb_sparse_adam._src.parameter_server.server import ParameterServer
    from nb_sparse_adam._src.parameter_server.spec import check_config

    if isinstance(given.get("consistency"), int):
        given = {**given, "consistency": ("bounded", given["consistency"])}
    signature = inspect.signature(ParameterServer.create)
    options = {flag: given.get(flag, signature.parameters[flag].default) for flag in _FIELDS}
    check_config(
        name, tables, options["shards"], options["durability"], options["snapshot_interval"],
        options["consistency"], options["workers"], options["step_timeout"], options["cpus_per_shard"],
    )  # fmt: skip
    return given


def _refuse_others(
    made: Config, folder: Path, tables: dict[str, TableSpec] | None, given: dict[str, Any]
) -> None:
    """Refuse options that differ from what a server was made with."""
    remedy = "leave it out, or use another --checkpoint-dir"
    for flag, wanted in given.items():
        before = getattr(made, _FIELDS[flag])
        if wanted != before:
            if flag == "consistency":
                wanted, before = _words(wanted), _words(before)
            option = f"--{flag.replace('_', '-')}"
            raise OptionError(f"{option} is {wanted}, but the server in {folder} has {before}; {remedy}")
    if tables is None:
        return
    if tables.keys() != made.tables.keys():
        raise OptionError(
            f"--tables has {', '.join(tables)}, but the server in {folder} has {', '.join(made.tables)}; "
            + remedy
        )
    for name, spec in tables.items():
        wanted, before = spec.to_json(), made.tables[name].to_json()
        for option in {**wanted, **before}:
            if wanted.get(option) != before.get(option):
                raise OptionError(
                    f"--tables: table {name!r}: {option} is {wanted.get(option, 'not given')}, but in the "
                    f"server in {folder} it is {before.get(option, 'not given')}; {remedy}"
                )


def _refuse_elsewhere(ray: Any, name: str, folder: Path) -> None:
    """Refuse a server of that name that has another folder."""
    from nb_sparse_adam._src.parameter_server.server import folder_of

    found = folder_of(ray, name)
    if found is not None and found.resolve() != folder.resolve():
        raise ServerError(
            f"the server {name!r} that runs on this cluster has the folder {found}, expected {folder}; stop "
            "it first, or use another name"
        )


def _told(ray: Any, server: ParameterServer, folder: Path, is_there: bool) -> str:
    config = server._config
    address = ray.get_runtime_context().gcs_address
    token = ", with RAY_AUTH_MODE=token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return (
        f"{'going on with' if is_there else 'serving'} {server.name!r}: tables {', '.join(config.tables)}; "
        f"shards {config.shards}; {config.durability}, {_words(config.consistency)}; folder {folder}; "
        f"ParameterServer.attach({server.name!r}, address={address!r}){token}"
    )


def _stay(ray: Any, server: ParameterServer, signals: Signals, report: float | None) -> None:
    """Wait for a signal, and see to it that the server is still there."""
    now = time.monotonic()
    look, tell = now + _LOOK, math.inf if report is None else now + report
    while signals.arrived is None:
        time.sleep(max(min(look, tell, time.monotonic() + 0.2) - time.monotonic(), 0.0))
        now = time.monotonic()
        if now >= look:
            look = now + _LOOK
            try:
                type(server)._running(ray, server.name)
            except ServerError:
                with suppress(ServerError):  # the shards that are left may end with this process
                    server.snapshot()
                raise
        if now >= tell:
            assert report is not None
            tell = now + report
            print(_line(server.stats()), flush=True)


# --- stats ------------------------------------------------------------------------------------------------


def _stats(arguments: argparse.Namespace) -> int:
    from nb_sparse_adam._src.parameter_server.server import ParameterServer, connect

    address = arguments.address or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":
        raise OptionError("--address is local, which would start a cluster; expected that of one that runs")
    ray = connect(address, logging_level=logging.ERROR)
    try:
        while True:
            stats = ParameterServer._running(ray, arguments.name).stats()
            print(json.dumps(stats) if arguments.json else table(stats), flush=True)
            if arguments.watch is None:
                return 0
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        return _INTERRUPTED


_COLUMNS = ("rows", "bytes", "pushes", "pulls", "duplicates", "refused", "lost_pushes", "unsaved_changes")
_HEADS = ("shard", "pid", *_COLUMNS[:6], "lost", "unsaved", "staleness", "pull ms", "push ms")


def table(stats: dict[str, Any]) -> str:
    """Show what `ParameterServer.stats` returned: a line for each shard, and one for all."""
    lines: list[tuple[str, ...]] = [_HEADS]
    for shard in stats["shards"]:
        numbers = [f"{shard[name]:,}" for name in _COLUMNS]
        latencies = [_pair(shard["staleness"], 0), _pair(shard["pull_ms"], 2), _pair(shard["push_ms"], 2)]
        lines.append((str(shard["shard"]), str(shard["pid"]), *numbers, *latencies))
    sums = [f"{sum(shard[name] for shard in stats['shards']):,}" for name in _COLUMNS]
    lines.append(("all", "", *sums, "", "", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
    failures = [
        f"shard {shard['shard']}: the last snapshot failed: {shard['snapshot_error']}"
        for shard in stats["shards"]
        if shard["snapshot_error"]
    ]
    imbalance = (
        f"{stats['name']}: imbalance {stats['imbalance']:.2f} (rows of the largest shard over the mean)"
    )
    note = "staleness, pull ms and push ms: p50/p99 of the last 4,096"
    return "\n".join([*shown, f"{imbalance}; {note}", *failures])


def _pair(percentiles: dict[str, float], digits: int) -> str:
    if not percentiles:
        return "-"
    return f"{percentiles['p50']:.{digits}f}/{percentiles['p99']:.{digits}f}"


def _line(stats: dict[str, Any]) -> str:
    pulls = sum(shard["pulls"] for shard in stats["shards"])
    return (
        f"{time.strftime('%H:%M:%S')} rows {stats['rows']:,}, bytes {stats['bytes']:,}, pushes "
        f"{stats['pushes']:,}, pulls {pulls:,}, imbalance {stats['imbalance']:.2f}"
    )
