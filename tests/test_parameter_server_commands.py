# SPDX-License-Identifier: Apache-2.0
"""``serve`` and ``stats``: what they understand, refuse and print, without Ray."""

import inspect
import json
import re
import signal
from types import SimpleNamespace

import pytest
from needs import need
from servers import SPECS, batch, opened, payload

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.parameter_server import actor, commands, folders, server
from nb_sparse_adam._src.parameter_server.calls import Calls
from nb_sparse_adam._src.parameter_server.spec import check_config
from nb_sparse_adam._src.table.eviction import Eviction
from nb_sparse_adam.errors import OptionError, ServerError
from nb_sparse_adam.parameter_server import ParameterServer, TableSpec

SPEC = '[user]\ndim = 8\nlr = 1e-1\nseed = 3\n\n[item]\ndim = 4\nlr = 0.1\nstep_counts = "global"\n'


class FakeServer:
    """What `serve` uses of a server, and what it has asked for."""

    asked: list = []  # noqa: RUF012 (emptied by the fixture)
    gone = False

    def __init__(self, config):
        self._config, self.name = config, config.name

    @classmethod
    def create(cls, name, tables, *, checkpoint_dir, **given):
        cls.asked.append(("create", name, given))
        options = {"shards": 1, "durability": "snapshot", "consistency": "async", "workers": None} | given
        config = check_config(
            name, tables, options["shards"], options["durability"], options.get("snapshot_interval", 60.0),
            options["consistency"], options["workers"], options.get("step_timeout", 60.0), 0,
        )  # fmt: skip
        checkpoint_dir.mkdir()
        (checkpoint_dir / "server.json").write_text(json.dumps(config.to_json()))
        return cls(config)

    @classmethod
    def attach(cls, name, *, checkpoint_dir):
        cls.asked.append(("attach", name, {}))
        return cls(folders.read_config(checkpoint_dir))

    @classmethod
    def _running(cls, _, name):
        if cls.gone:
            raise ServerError(f"of 1 shards of server {name!r} on this cluster, [0] are gone")

    def snapshot(self):
        self.asked.append("snapshot")
        raise ServerError("one shard is gone")

    def shutdown(self):
        self.asked.append("shutdown")

    def stats(self):
        signal.raise_signal(signal.SIGTERM)  # the report is when it ends
        shard = {"pulls": 7}
        return {"rows": 1000, "bytes": 2, "pushes": 3, "imbalance": 1.0, "shards": [shard]}


class FakeRay:
    """What is found on a cluster, by name."""

    def __init__(self, **named):
        self.named = named

    def get_actor(self, name, namespace):
        try:
            return self.named[name]
        except KeyError:
            raise ValueError(name) from None

    def get(self, references, timeout):
        return references

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="10.0.0.1:6379")


@pytest.fixture
def fake(monkeypatch):
    """No Ray, and a server that is none; Ray's own handler of SIGTERM is there, as after ``ray.init``."""
    connected = []

    def connect(address, **more):
        connected.append(address)
        return FakeRay()

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "connect", connect)
    FakeServer.asked, FakeServer.gone = [], False
    signature = inspect.signature(ParameterServer.create)
    monkeypatch.setattr(FakeServer.create.__func__, "__signature__", signature, raising=False)
    monkeypatch.setattr(server, "ParameterServer", FakeServer)
    before = signal.getsignal(signal.SIGTERM)
    yield connected
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def spec(tmp_path):
    need("tomli")
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    return path


def serve(tmp_path, *arguments):
    return main(["serve", "ads", "--checkpoint-dir", str(tmp_path / "ads"), *map(str, arguments)])


def refused(capsys, *arguments):
    """Return what is said of arguments that are wrong."""
    with pytest.raises(SystemExit) as caught:
        main([str(each) for each in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


# --- tables -----------------------------------------------------------------------------------------------


def test_tables_are_read(spec):
    assert commands.read_tables(str(spec)) == SPECS
    spec.write_text("[user]\ndim = 4\nbetas = [0.8, 0.9]\n[user.eviction]\nolder_than_steps = 1000\n")
    wanted = TableSpec(4, betas=(0.8, 0.9), eviction=Eviction(older_than_steps=1000))
    assert commands.read_tables(str(spec)) == {"user": wanted}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "has no tables"),
        ("[user", "is no TOML"),
        ("dim = 3", "table 'dim': the spec of a table is int"),
        ("[user]\nlr = 0.1", "table 'user': the spec of a table has ['lr'], expected dim"),
        ("[user]\ndim = 'x'", "table 'user': dim is 'x'"),
        ("[user]\ndim = 4\nlearning = 0.1", "table 'user': TableSpec got 'learning', expected options"),
        ("[user]\ndim = 4\nlr = -1.0", "table 'user': lr is -1.0"),
        ("[user]\ndim = 4\nbetas = 3", "table 'user': betas is 3"),
        ("[user]\ndim = 4\n[user.eviction]\nold = 3", "table 'user': eviction has ['old']"),
        ("[user]\ndim = 4\neviction = 3", "table 'user': eviction"),
    ],
)
def test_errors_name_the_file_the_table_and_the_option(spec, text, word):
    spec.write_text(text)
    with pytest.raises(OptionError) as caught:
        commands.read_tables(str(spec))
    assert str(caught.value).startswith(f"--tables {spec}: ")
    assert word in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    need("tomli")
    with pytest.raises(OptionError, match=r"nothing\.toml: cannot be read: No such file"):
        commands.read_tables(str(tmp_path / "nothing.toml"))
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(OptionError, match=r"latin\.toml: is no TOML: 'utf-8' codec"):
        commands.read_tables(str(tmp_path / "latin.toml"))


# --- serve ------------------------------------------------------------------------------------------------


def test_a_server_is_made_served_and_ended(tmp_path, fake, spec, capsys):
    options = "--shards 3 --durability log --consistency bounded:2 --workers 4 --report 0.01".split()
    assert serve(tmp_path, "--tables", spec, *options) == 0
    given = {"shards": 3, "durability": "log", "consistency": ("bounded", 2), "workers": 4}
    assert FakeServer.asked == [("create", "ads", given), "shutdown"]
    first, report, last = capsys.readouterr().out.splitlines()
    assert first == (
        "serving 'ads': tables user, item; shards 3; log, bounded:2; folder "
        f"{tmp_path / 'ads'}; ParameterServer.attach('ads', address='10.0.0.1:6379')"
    )
    assert report.endswith(" rows 1,000, bytes 2, pushes 3, pulls 7, imbalance 1.00")
    assert last == f"'ads' is shut down; what it had is in {tmp_path / 'ads'}"


def test_a_server_that_is_there_is_gone_on_with(tmp_path, fake, spec, capsys):
    more = ("--report", "0.01")
    assert serve(tmp_path, "--tables", spec, "--shards", 2, *more) == 0
    assert serve(tmp_path, *more) == 0
    assert serve(tmp_path, "--tables", spec, "--shards", 2, "--consistency", "async", *more) == 0
    kinds = [each if each == "shutdown" else each[0] for each in FakeServer.asked]
    assert kinds == ["create", "shutdown", "attach", "shutdown", "attach", "shutdown"]
    assert capsys.readouterr().out.count("going on with 'ads'") == 2


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--shards", "3", "--shards is 3, but the server in .* has 2; leave it out"),
        ("--durability", "log", "--durability is log, but .* has snapshot"),
        ("--consistency", "bounded:1", "--consistency is bounded:1, but .* has async"),
        ("--workers", "2", "--workers is 2, but .* has None"),
        ("--snapshot-interval", "7", "--snapshot-interval is 7, but .* has 60.0"),
        ("--step-timeout", "7", "--step-timeout is 7, but .* has 60.0"),
        ("--cpus-per-shard", "1", "--cpus-per-shard is 1, but .* has 0.0"),
        ("--tables", SPEC.replace("seed = 3", "seed = 4"), "table 'user': seed is 4, but .* it is 3"),
        ("--tables", SPEC.replace("seed = 3", ""), "table 'user': seed is not given, but .* it is 3"),
        ("--tables", SPEC.replace("[item]", "[ad]"), "--tables has user, ad, but .* has user, item"),
    ],
    ids=str.split("shards durability consistency workers interval timeout cpus value no-value tables"),
)
def test_options_that_differ_are_refused_by_name(tmp_path, fake, spec, capsys, option, value, word):
    assert serve(tmp_path, "--tables", spec, "--shards", 2, "--report", "0.01") == 0
    del fake[:]
    if option == "--tables":
        spec.write_text(value)
        value = spec
    folder = tmp_path / "ads"
    said = refused(capsys, "serve", "ads", "--checkpoint-dir", folder, option, value)
    assert re.search(word, said)
    assert fake == []  # Ray has not been started


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--consistency", "bounded"], "expected async, sync or bounded:K"),
        (["--consistency", "bounded:-1"], "got 'bounded:-1'"),
        (["--consistency", "often"], "got 'often'"),
        (["--shards", "0"], "argument --shards: expected an integer of at least 1"),
        (["--durability", "none"], "argument --durability: invalid choice"),
        (["--snapshot-interval", "0"], "argument --snapshot-interval: expected seconds, more than 0"),
        (["--step-timeout", "inf"], "argument --step-timeout"),
        (["--cpus-per-shard", "-1"], "argument --cpus-per-shard"),
        (["--consistency", "sync"], "'sync' without workers"),
        (["--workers", "3"], "workers is 3, expected None"),
        (["--shards", "2000"], "shards is 2000"),
        (["--detach"], "--detach needs --address (or RAY_ADDRESS) of a cluster"),
        (["--detach", "--address", "local"], "--detach needs --address"),
    ],
)
def test_wrong_arguments_of_serve(tmp_path, fake, spec, capsys, arguments, word):
    start = ["serve", "ads", "--checkpoint-dir", tmp_path / "ads", "--tables", spec]
    assert word in refused(capsys, *start, *arguments)
    assert fake == []
    assert not (tmp_path / "ads").exists()


def test_a_new_server_needs_tables_and_a_name(tmp_path, fake, spec, capsys):
    start = ["--checkpoint-dir", tmp_path / "ads"]
    assert "--tables is needed: " in refused(capsys, "serve", "ads", *start)
    assert "name is 'a/b'" in refused(capsys, "serve", "a/b", *start, "--tables", spec)


def test_detached(tmp_path, fake, spec, capsys):
    assert serve(tmp_path, "--tables", spec, "--detach", "--address", "10.0.0.1:6379") == 0
    assert fake == ["10.0.0.1:6379"]
    assert FakeServer.asked == [("create", "ads", {})]
    assert capsys.readouterr().out.startswith("serving 'ads'")


def test_a_server_that_others_have_ended_is_an_error(tmp_path, fake, spec, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_LOOK", 0.01)
    FakeServer.gone = True
    assert serve(tmp_path, "--tables", spec) == 1
    assert FakeServer.asked == [("create", "ads", {}), "snapshot"]
    assert "error: of 1 shards of server 'ads'" in capsys.readouterr().err


def test_a_server_of_that_name_that_has_another_folder_is_refused(tmp_path, fake, spec, capsys, monkeypatch):
    assert serve(tmp_path, "--tables", spec, "--report", "0.01") == 0
    monkeypatch.setattr(server, "folder_of", lambda ray, name: tmp_path / "elsewhere")
    assert serve(tmp_path) == 1
    assert "has the folder " in capsys.readouterr().err


def test_help_has_the_defaults_of_create(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, parameter in inspect.signature(ParameterServer.create).parameters.items():
        if name in commands._FIELDS and parameter.default is not None:
            shown = re.search(
                rf"--{name.replace('_', '-')} .*?\(default: (\S+)\)", text.partition("options:")[2]
            )
            wanted = parameter.default
            assert shown[1] == (wanted if isinstance(wanted, str) else f"{wanted:g}"), name


# --- stats ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path):
    shard = opened(tmp_path / "shard", durability="snapshot")
    shard.push(1, 1, payload(batch(0)), 0)
    shard.push(1, 1, payload(batch(0)), 0)
    one = shard.stats()
    other = {**one, "shard": 1, "push_ms": {}, "rows": 0, "snapshot_error": "the disk is full"}
    return {
        "name": "ads",
        "rows": one["rows"],
        "bytes": 1,
        "pushes": 2,
        "imbalance": 2.0,
        "shards": [one, other],
    }


def test_a_table_of_numbers(numbers):
    head, first, second, total, rest, failure = commands.table(numbers).splitlines()
    assert head.split()[:4] == ["shard", "pid", "rows", "bytes"]
    one = numbers["shards"][0]
    assert first.split()[:3] == ["0", str(one["pid"]), f"{one['rows']:,}"]
    assert first.split()[4:7] == ["1", "0", "1"]  # pushes, pulls, duplicates
    assert re.search(r" 0/0 +- +\d+\.\d\d/\d+\.\d\d$", first)
    assert second.endswith("-")
    assert total.split()[:2] == ["all", f"{one['rows']:,}"]
    assert total.split()[3] == "2"
    assert rest.startswith("ads: imbalance 2.00 ")
    assert failure == "shard 1: the last snapshot failed: the disk is full"
    assert len({len(line) for line in (head, first)}) == 1


def test_stats_are_printed_as_a_table_as_json_and_again(fake, numbers, capsys, monkeypatch):
    times = []

    def sleep(seconds):
        times.append(seconds)
        if len(times) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", sleep)
    running = SimpleNamespace(stats=lambda: numbers)
    monkeypatch.setattr(FakeServer, "_running", classmethod(lambda cls, ray, name: running))
    assert main(["stats", "ads"]) == 0
    assert capsys.readouterr().out == commands.table(numbers) + "\n"
    assert fake == ["auto"]  # which never starts a cluster
    assert main(["stats", "ads", "--json", "--watch", "3"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["rows"] for line in lines] == [numbers["rows"]] * 2
    assert times == [3, 3]


def test_stats_start_nothing(fake, capsys, monkeypatch):
    assert "--address is local" in refused(capsys, "stats", "ads", "--address", "local")
    made = SimpleNamespace(made_of=SimpleNamespace(remote=lambda: ("/folder", config.to_json())))
    config = check_config("ads", SPECS, 3, "log", 60.0, "async", None, 60.0, 0)
    names = {actor.coordinator_name("ads"): made, actor.shard_name("ads", 1): object()}
    monkeypatch.setattr(server, "ParameterServer", ParameterServer)
    for there, word in (({}, "there is no server 'ads' on this cluster"), (names, r"[0, 2] are gone")):
        monkeypatch.setattr(server, "connect", lambda address, there=there, **more: FakeRay(**there))
        assert main(["stats", "ads"]) == 1
        assert word in capsys.readouterr().err


def test_a_cluster_that_cannot_be_reached_is_told_with_a_remedy(monkeypatch):
    def init(**options):
        raise ConnectionError("Failed to connect")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(server, "import_ray", lambda: ray)
    with pytest.raises(
        ServerError, match=r"cluster at 10\.0\.0\.1:1 cannot .*connect\. .*RAY_AUTH_MODE=token"
    ):
        server.connect("10.0.0.1:1")


# --- the processes ----------------------------------------------------------------------------------------


def test_a_process_that_cannot_be_started_is_not_waited_for():
    class RayError(Exception):
        pass

    class ActorError(RayError):
        actor_init_failed = True

    errors = SimpleNamespace(
        RayError=RayError, RayActorError=ActorError, RayTaskError=KeyError, ObjectLostError=KeyError,
        GetTimeoutError=TimeoutError,
    )  # fmt: skip

    def get(references, timeout):
        raise ActorError("The actor died in its creation task\nLogError: record 3 is damaged")

    calls = Calls(SimpleNamespace(get=get, exceptions=errors), "starting 'ads'", [int], float("inf"))
    with pytest.raises(
        ServerError, match=r"^starting 'ads': process 0 cannot be started: LogError: record 3"
    ):
        calls.results()


def test_counters_of_a_process_count_from_its_start(monkeypatch, tmp_path):
    seen = {}

    class Metric:
        def __init__(self, name, text, tag_keys):
            self.name, self.keys = name, tag_keys

        def inc(self, value, tags):
            assert value > 0
            assert set(tags) == set(self.keys)
            seen[self.name] = seen.get(self.name, 0) + value

        def set(self, value, tags):
            assert set(tags) == set(self.keys)
            seen[self.name, tags.get("quantile")] = value

    monkeypatch.setattr(actor, "require", lambda *_: SimpleNamespace(Counter=Metric, Gauge=Metric))
    shard = opened(tmp_path / "shard", durability="snapshot")
    shard.push(1, 1, payload(batch(0)), 0)
    metrics = actor._Metrics("ads", 0, shard.stats())
    metrics.set(shard.stats())
    assert not any(isinstance(name, str) for name in seen)
    shard.push(1, 2, payload(batch(1)), 0)
    shard.push(1, 2, payload(batch(1)), 0)
    stats = shard.stats()
    metrics.set(stats)
    metrics.set(stats)
    assert seen["nb_sparse_adam_pushes_total"] == seen["nb_sparse_adam_duplicates_total"] == 1
    assert seen["nb_sparse_adam_rows", None] == stats["rows"]
    assert seen["nb_sparse_adam_push_seconds", "0.99"] == pytest.approx(stats["push_ms"]["p99"] / 1e3)
    assert ("nb_sparse_adam_pull_seconds", "0.99") not in seen  # there was none
