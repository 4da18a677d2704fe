#!/usr/bin/env python3
"""Tests and figures of hibernate.py: real processes, real sockets, transcripts.

    python3 -m pytest -q test_hibernate.py          the tests
    python3 test_hibernate.py bench --sessions 1000 the figures; bench --help tells the rest
    python3 test_hibernate.py drill --sessions 1000 kills and reloads at random: what is lost
    python3 test_hibernate.py spread                how connections are spread over processes
    python3 test_hibernate.py pressure              connects while all is full, or one is stopped
    python3 test_hibernate.py crowd 300 USER PASS   clients in IDLE, for experiments by hand

The order: 1 harness, 2 without a server (tables, the model of a hand-over), 3 the life of a
session, 4 many sessions, 5 listeners, 6 kills and reloads, 7 resources, 8 IMAP, 9 commands and
configuration, 10 bad input, 11 the benchmark. Every server runs in a directory and on a port of
its own; nothing sleeps.
"""
from __future__ import annotations

import argparse
import ast
import base64
import bisect
import builtins
import collections
import concurrent.futures
import contextlib
import ctypes
import dis
import doctest
import errno
import functools
import hashlib
import imaplib
import importlib.util
import itertools
import json
import mailbox
import multiprocessing
import multiprocessing.connection
import os
import pwd
import py_compile
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

try:
    import pytest
except ImportError:  # the benchmark needs none
    pytest = None

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "hibernate.py"
PATIENCE = 20.0  # seconds before a test gives up; only failures ever wait that long


def folder():
    """Where servers live: in memory, if there is room, since half of the time would be fsync."""
    with contextlib.suppress(OSError):
        free = os.statvfs("/dev/shm")
        if os.access("/dev/shm", os.W_OK) and free.f_bavail * free.f_frsize > 2**30:
            return "/dev/shm"
    return "/tmp"


FOLDER = os.environ.get("TEST_FOLDER") or folder()


@functools.cache
def compiled():
    """The program as Python's bytecode: to compile it anew would be half of a server's start."""
    with tempfile.TemporaryDirectory() as place:
        return Path(py_compile.compile(PROGRAM, f"{place}/program", doraise=True)).read_bytes()


# ------------------------------------------------------------------------------------------------
# 1  Harness
# ------------------------------------------------------------------------------------------------


def eventually(condition, deadline=PATIENCE, what=""):
    """Wait until `condition()` is true and return its value; it is looked at all the time."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {what or condition}")
        select.select((), (), (), 0.02)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def processes(session):
    """{pid: title} of the live processes of one kernel session: a server and all it ever forked."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b") ")[2].split()
                if int(fields[3]) == session and fields[0] not in b"ZX":
                    line = Path("/proc", entry, "cmdline").read_bytes()
                    found[int(entry)] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


class Server:
    """hibernate.py as a process of its own, below a directory of its own.

    `settings` are lines added to a quick-witted configuration. The log must stay free of
    tracebacks and of errors, except for lines that match `allow`.
    """

    live: list[Server] = []
    made: list[Path] = []
    loud = True  # in a test: the log is printed, for pytest to show, and must be free of errors
    brand = "hibernate"
    password = "secret"
    wanted = 0  # the port, if the first line does not tell

    def __init__(self, settings="", users=("alice", "bob"), allow="(?!)", listener="port = 0"):
        self.dir = Path(tempfile.mkdtemp(prefix="hb-", dir=FOLDER))
        self.made.append(self.dir)
        self.users, self.allow, self.process, self.port = users, allow, None, 0
        self.started = []  # kernel sessions: more than one after restart()
        self.log_file = self.dir / "log"
        self.configuration = self.dir / "hibernate.conf"
        self.program = self.dir / "hibernate.pyc"
        self.program.write_bytes(compiled())
        self.configure(settings, listener)
        self.start()

    def configure(self, settings, listener):
        entries = "".join(f"{user}:{{PLAIN}}{self.password}\n" for user in self.users)
        (self.dir / "users").write_text(entries)
        self.configuration.write_text(
            "imap_hibernate_timeout = 50 msecs\nauth_failure_delay = 100 msecs\n"
            f"service imap-login {{\n inet_listener imap {{\n {listener}\n }}\n}}\n{settings}\n"
        )

    def command(self):
        return [sys.executable, str(self.program), "-c", str(self.configuration)]

    def start(self):
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.dir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=log, start_new_session=True,
            )
        Server.live.append(self)
        self.started.append(self.process.pid)
        try:
            self.said = self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def wait_ready(self):
        """The lines of standard output up to `ready`; the first names the port."""
        said, end = b"", time.monotonic() + PATIENCE
        while not said.endswith(b"ready\n"):
            readable = select.select([self.process.stdout], (), (), end - time.monotonic())[0]
            data = os.read(self.process.stdout.fileno(), 4096) if readable else b""
            assert data, f"no 'ready' but {said!r}; the log:\n{self.log()}"
            said += data
        lines = said.decode().splitlines()
        self.port = self.wanted or int(lines[0].rpartition(":")[2])
        return lines

    def log(self):
        return self.log_file.read_text(errors="replace")

    def errors(self):
        lines = self.log().splitlines()
        bad = [x for x in lines if re.search(r"Traceback|\b(ERROR|CRITICAL|Error:)", x)]
        return [x for x in bad if not re.search(self.allow, x)]

    def restart(self):
        """A new master after the old one was killed, on the same port; its children may live."""
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        Server.live.remove(self)
        text = self.configuration.read_text()
        self.configuration.write_text(text.replace("port = 0", f"port = {self.port}"))
        self.start()

    def processes(self):
        found = {}
        for session in self.started:
            found |= processes(session)
        return found

    def titles(self, service=""):
        """Titles as `ps` shows them; `service` picks those of one service."""
        found = sorted(self.processes().values())
        return [x for x in found if re.match(rf"{self.brand}/{service or '.*'}( |$)", x)]

    def pids(self, service):
        pattern = rf"{self.brand}/{service}( |$)"
        return [pid for pid, title in self.processes().items() if re.match(pattern, title)]

    def count(self, service):
        """How many clients the processes of `service` hold, by their titles."""
        numbers = (re.search(r"\[(\d+) ", title) for title in self.titles(service))
        return sum(int(number[1]) for number in numbers if number)

    def asleep(self):
        return self.count("imap-hibernate")

    def run(self, *arguments, input=None):
        """The command line on this server: the finished process, with bytes."""
        return subprocess.run(
            [*self.command(), *arguments], cwd=self.dir, input=input, capture_output=True,
            timeout=PATIENCE,
        )

    def control(self, *arguments):
        """What a command prints with --json, parsed: a list of objects, one a line."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, (done, self.log())
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ask(self, word):
        """What the master and its processes answer, without the start-up of a command line."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(PATIENCE)
            try:
                sock.connect(str(self.dir / "hibernate.run" / "master"))
                sock.send(word)
                text = b"".join(iter(lambda: sock.recv(1 << 20), b""))
            except ConnectionError:  # the master executes itself anew this moment
                return []
        return [json.loads(line) for line in text.splitlines()]

    def who(self, service=""):
        return [row for row in self.ask(b"who") if not service or row["service"] == service]

    def loads(self, service):
        """How many clients each process of `service` has right now; titles are a second late."""
        rows = eventually(lambda: self.ask(b"status"))
        return sorted(row.get("clients", 0) for row in rows if row["service"] == service)

    def held(self, service="imap-hibernate"):
        return sum(self.loads(service))

    def home(self, user):
        return self.dir / "mail" / user

    def owner(self, user):
        """(uid, gid) of the user's mail, None if they are the server's own."""

    def maildir(self, user):
        """The user's Maildir for Python's own `mailbox`, made if it is not there yet."""
        self.home(user).parent.mkdir(exist_ok=True)
        return mailbox.Maildir(self.home(user), create=True)

    def kill(self):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        Server.live.remove(self)

    def stop(self, number=signal.SIGTERM):
        """End the server and hold it to what every end must leave: nothing, and a clean log."""
        self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE)
            eventually(lambda: not self.processes(), 5, f"all gone: {self.processes()}")
        except BaseException:
            self.kill()
            raise
        Server.live.remove(self)
        assert self.process.returncode == 0, (self.process.returncode, self.log())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if self in Server.live:
                self.kill() if kind else self.stop()
            if self.loud:
                print(self.log()[-6000:])
                assert kind or not self.errors(), self.log()
        finally:
            self.process.stdout.close()
            shutil.rmtree(self.dir, ignore_errors=True)


class PatchedServer(Server):
    """One in whose processes a statement was executed first, say to shorten a constant."""

    def __init__(self, settings="", patch="", **options):
        self.patch = patch
        super().__init__(settings, **options)

    def command(self):
        script = (
            f"import sys, time; sys.path.insert(0, {str(self.dir)!r}); import hibernate\n"
            f"{self.patch}\nsys.exit(hibernate.main(sys.argv[1:]))"
        )
        return [sys.executable, "-c", script, "-c", str(self.configuration)]


class Imap:
    """A raw client: it says lines and reads lines, and every wait has an end."""

    def __init__(self, server, user="", greeting=True):
        port = server if isinstance(server, int) else server.port
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.input, self.tags = bytearray(), (f"a{n}" for n in itertools.count(1))
        self.sent = self.heard = 0
        if greeting:
            self.greeting = self.line()
        if user:
            self.cmd(f"LOGIN {user} {server.password}")

    def send(self, data):
        data = data if isinstance(data, bytes) else data.encode()
        self.sent += len(data)
        self.socket.sendall(data)

    def fill(self, end):
        self.socket.settimeout(max(end - time.monotonic(), 0.001))
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the server hung up after {self.input!r}")
        self.input += data
        self.heard += len(data)

    def line(self, deadline=PATIENCE):
        """The next line, literals included, without its CRLF."""
        end, start = time.monotonic() + deadline, 0
        while True:
            while (stop := self.input.find(b"\r\n", start)) < 0:
                self.fill(end)
            literal = re.search(rb"\{(\d+)\}$", self.input[max(start, stop - 12) : stop])
            if not literal:
                line = self.input[:stop].decode("utf-8", "surrogateescape")
                del self.input[: stop + 2]
                return line
            start = stop + 2 + int(literal[1])
            while len(self.input) < start:
                self.fill(end)

    def until(self, pattern, deadline=PATIENCE):
        """All lines up to the first that matches."""
        lines, end = [], time.monotonic() + deadline
        while not lines or not re.search(pattern, lines[-1], re.DOTALL):
            try:
                lines.append(self.line(end - time.monotonic()))
            except (TimeoutError, EOFError) as error:
                raise AssertionError(f"no {pattern!r} but {lines!r}, then {error!r}") from None
        return lines

    def cmd(self, text, expect="OK", literal=None):
        """Say one command; its lines up to the tagged one, in which `expect` must follow."""
        tag = next(self.tags)
        self.send(f"{tag} {text}" + (f" {{{len(literal)}}}\r\n" if literal else "\r\n"))
        if literal:
            self.until(r"^\+ ")
            self.send(literal + b"\r\n")
        lines = self.until(rf"^{tag} ")
        assert re.match(f"{tag} ({expect})", lines[-1]), (text, lines)
        return lines

    def idle(self):
        tag = next(self.tags)
        self.send(f"{tag} IDLE\r\n")
        self.until(r"^\+ ")
        return tag

    def done(self, tag):
        self.send("DONE\r\n")
        lines = self.until(rf"^{tag} ")
        assert lines[-1].startswith(f"{tag} OK"), lines
        return lines

    def ended(self, deadline=PATIENCE):
        """What is still said until the server closes, which it must."""
        end = time.monotonic() + deadline
        try:
            while True:
                self.fill(end)
        except (EOFError, ConnectionResetError):
            return self.input.decode("utf-8", "surrogateescape")

    def silent(self):
        """True if nothing has been said that is not read yet."""
        return not self.input and not select.select([self.socket], (), (), 0)[0]

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def message(subject="hello", body="Well met.\r\n", sender="carol@example.org"):
    return (
        f"From: {sender}\r\nTo: alice@example.org\r\nSubject: {subject}\r\n"
        "Date: Mon, 7 Feb 1994 21:52:25 -0800\r\nMessage-ID: <m@example.org>\r\n"
        f"\r\n{body}"
    ).encode()


def deliver_by_hand(home, data=None, owner=None):
    """A message as any delivery agent leaves it: written to tmp/, renamed into new/."""
    name = f"{time.time_ns()}.P{os.getpid()}.example"
    path = Path(home, "tmp", name)
    path.write_bytes(data or message())
    if owner:
        os.chown(path, *owner)
    path.rename(Path(home, "new", name))
    return name


# ------------------------------------------------------------------------------------------------
# 2  Without a server: the model of a hand-over, the engine's independence
# ------------------------------------------------------------------------------------------------

def fixture(*arguments, **options):
    """pytest.fixture, or nothing where only the benchmark runs."""
    return pytest.fixture(*arguments, **options) if pytest else lambda function: function


def table(names, rows):
    return pytest.mark.parametrize(names, rows) if pytest else lambda function: function


@fixture(autouse=True)
def logs_of_a_failure():
    """pytest shows what is printed here if the test has failed."""
    yield
    for server in Server.live:
        print(server.log()[-4000:])


@fixture(scope="module", autouse=True)
def nothing_is_left_behind():
    """Each server has looked for its own processes, see Server.stop()."""
    yield
    assert not Server.live and not [path for path in Server.made if path.exists()]


@fixture(scope="module")
def hibernate():
    """The file as a module, as a project that copied it would have it."""
    spec = importlib.util.spec_from_file_location("hibernate", PROGRAM)
    module = sys.modules["hibernate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# One attempt of a hand-over as both sides see it: the receiver's phase, the messages not yet read
# by either side, and who has closed the channel. `reset`: closed with a "+" unread, of which Linux
# tells the receiver before it delivers what was sent earlier. `twin`: its death is survived.
Attempt = collections.namedtuple("Attempt", "receiver to_receiver to_sender closed reset twin")
World = collections.namedtuple("World", "sender attempts open faulty twin")


def owners(world):
    held = [a.receiver in ("read", "owner") for a in world.attempts]
    in_flight = [a.receiver in ("copied", "held") and "!" in a.to_receiver for a in world.attempts]
    return (world.sender in ("owner", "asked", "leaving")) + sum(held) + sum(in_flight)


def copies(world):
    received = [a.receiver in ("owner", "copied", "held", "read") for a in world.attempts]
    waiting = [a.receiver == "none" and "record" in a.to_receiver for a in world.attempts]
    return (world.sender in ("owner", "asked", "leaving", "gave")) + sum(received) + sum(waiting)


def sender_steps(world, commit):
    """(kind, world) for all that the sender may do next, dying included."""
    last = world.attempts[-1] if world.attempts else None

    def put(sender, twin=world.twin, **changes):
        rest = world.attempts[:-1] + (last._replace(**changes),) if changes else world.attempts
        return world._replace(sender=sender, twin=twin, attempts=rest)

    hang_up = {"closed": (last.closed + "s"), "reset": bool(last.to_sender)} if last else {}
    if world.sender == "owner" and len(world.attempts) < 2:
        fresh = Attempt("none", ("record",), (), "", False, world.twin)
        yield "step", world._replace(sender="asked", attempts=world.attempts + (fresh,))
    if world.sender == "asked":
        yield "timeout", put("owner", **hang_up)
        if last.to_sender == ("+",):
            yield "step", put("leaving" if commit == "!" else "gave", to_sender=())
        elif last.to_sender or "r" in last.closed:
            yield "step", put("owner", closed=last.closed + "s", to_sender=())
    if world.sender == "leaving":  # marked as gone; "!" comes next, and may fail
        if "r" in last.closed:
            yield "step", put("owner", closed=last.closed + "s")
        else:
            yield "step", put("gave", to_receiver=last.to_receiver + ("!",))
    if world.sender == "gave":
        yield "step", put("gone", closed=last.closed + "s")
    if world.sender not in ("dead", "gone"):
        hang_up = hang_up if last and "s" not in last.closed else {}
        if world.twin and world.sender in ("owner", "asked"):
            yield "survived", put("owner", twin=False, **hang_up)
        else:
            yield "death", put("dead", twin=False, **hang_up)


def receiver_steps(world, number, commit):
    """The same for the receiver of one attempt. What it closes, it never opens again."""
    now = world.attempts[number]

    def put(**changes):
        attempts = list(world.attempts)
        attempts[number] = now._replace(**changes)
        return world._replace(attempts=tuple(attempts))

    over = {"closed": now.closed + "r", "to_receiver": ()}
    if now.receiver == "none":
        yield "step", put(receiver="copied", to_receiver=())  # the twin has it first
        yield "step", put(receiver="gone", to_sender=("-full",), **over)
    if now.receiver == "copied":
        if "s" in now.closed:  # its "+" can't be sent
            yield "step", put(receiver="gone", **over)
        else:
            yield "step", put(receiver="held", to_sender=("+",))
    if now.receiver in ("copied", "held"):
        yield "timeout", put(receiver="gone", **over)._replace(open=False)
    if now.receiver == "held" or (now.receiver == "copied" and not now.twin):
        if now.reset or ("s" in now.closed and not now.to_receiver):
            yield "step", put(receiver="owner" if commit == "end" else "gone", **over)
        elif now.to_receiver:
            yield "step", put(receiver="read", to_receiver=())
    if now.receiver == "read":
        yield "step", put(receiver="owner", **over)
    if now.twin and now.receiver in ("copied", "held", "owner"):
        yield "survived", put(twin=False)  # the survivor has the channel, with what is unread
    elif now.twin and now.receiver == "read":
        yield "death", put(receiver="held", twin=False)  # it can't know that the "!" was read
    elif now.receiver in ("none", "copied", "held", "read", "owner"):
        yield "death", put(receiver="dead", **over)


def violations(commit, twins=False):
    """Walk all interleavings of sender, receivers, their twins, deaths, timeouts and (by not
    moving) stops."""
    start = World("owner", (), True, False, twins)
    seen, todo, found = {start}, [start], set()
    while todo:
        world = todo.pop()
        steps = list(sender_steps(world, commit))
        for number in range(len(world.attempts)):
            steps += receiver_steps(world, number, commit)
        if world.open and owners(world) > 1:
            found.add("two owners")
        if all(kind in ("death", "survived") for kind, _ in steps):  # the rest has happened
            if world.open and copies(world) and not owners(world):
                found.add("no owner, but the connection is open")
            if not world.faulty and not (world.open and owners(world) == 1):
                found.add("lost without a fault")
        for kind, following in steps:
            faulty = world.faulty or kind in ("death", "timeout")
            following = following._replace(faulty=faulty)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return found, len(seen)


@table("twins", [False, True])
def test_the_hand_over_has_one_owner_in_every_interleaving(twins):
    found, worlds = violations("!", twins)
    assert not found and worlds > 100


def test_the_end_of_the_channel_as_the_commit_would_make_two_owners():
    assert "two owners" in violations("end")[0]


def part_lines():
    """{number: line} of the comment rules that open the parts of the file."""
    rows = PROGRAM.read_text().splitlines()
    rules = (re.match(r"# (\d+)  \w", row) for row in rows)
    return {int(rule[1]): line for line, rule in enumerate(rules, 1) if rule}


@contextlib.contextmanager
def service_here(hibernate, monkeypatch, folder, session_class):
    """A service that runs in this process, the address of its listener, and its master's end."""
    monkeypatch.setattr(hibernate, "drop_privileges", lambda settings: None)  # it is for good
    monkeypatch.setattr(hibernate.Title, "set", lambda title, text: None)
    role = hibernate.Role("s", session_class, listener="l")
    config = hibernate.Config(hibernate.Program("t", (role,)))
    config.values |= {"base_dir": str(folder), "hibernate_timeout": 0}
    listener = socket.create_server(("127.0.0.1", 0))
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inbox.bind(f"{folder}/s")
    inbox.listen()
    for sock in (listener, inbox):
        sock.setblocking(False)
    pool = types.SimpleNamespace(
        role=role, inbox=inbox, listeners=[[listener]], settings=config.sections["s"]
    )
    service = hibernate.Service(types.SimpleNamespace(config=config, peers=set()), pool, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = signal.getsignal(signal.SIGTERM)
    service.start(theirs)
    service.update()
    try:
        with listener, inbox, ours, theirs:
            yield service, listener.getsockname(), ours
    finally:
        signal.signal(signal.SIGTERM, before)
        service.loop.close()
        os.close(service.watcher.fd)


def run_for(service, seconds):
    """Run its loop so long, or until it ends by itself."""
    service.loop.later(seconds, lambda: setattr(service.loop, "running", False))
    service.loop.run()
    service.loop.running = True


def test_a_session_that_fails_at_its_end_gives_back_its_place_and_its_socket(
    hibernate, monkeypatch, tmp_path
):
    class Broken(hibernate.Session):
        def closed(self):
            raise OSError("read-only file system")

    here = service_here(hibernate, monkeypatch, tmp_path, Broken)
    with here as (service, address, _), socket.create_connection(address) as client:
        run_for(service, 0.1)
        assert service.count() == 1
        client.shutdown(socket.SHUT_WR)
        run_for(service, 0.1)
        assert service.count() == 0
        client.settimeout(1)
        assert client.recv(1) == b""


def test_a_process_that_ends_since_it_is_idle_accepts_nobody_at_that_very_moment(
    hibernate, monkeypatch, tmp_path
):
    class Greeter(hibernate.Session):
        def opened(self):
            yield b"hello"

    here = service_here(hibernate, monkeypatch, tmp_path, Greeter)
    with here as (service, address, master):
        master.send(b"end-if-idle")  # epoll(7) tells what is ready in the order of its coming
        with socket.create_connection(address) as client:
            run_for(service, 5)
            assert service.count() == 0
            client.setblocking(False)
            with pytest.raises(BlockingIOError):  # it waits in the queue, for a sibling
                client.recv(100)


def test_a_service_that_is_stuck_delays_what_goes_to_no_other(hibernate, monkeypatch, tmp_path):
    class Asker(hibernate.Session):
        def opened(self):
            answer = yield hibernate.Ask(*self.asks.pop(0))
            yield answer.encode()

    Asker.asks = [("stuck", b"?"), ("stuck", b"?"), ("lively", b"?")]
    monkeypatch.setattr(hibernate, "IN_FLIGHT", 2)
    inboxes = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for name, inbox in zip(("stuck", "lively"), inboxes):
        inbox.bind(f"{tmp_path}/{name}")
        inbox.listen()

    def answer(fd, mask):
        with inboxes[1].accept()[0] as channel:
            channel.send(channel.recv(10) + b"!")

    here = service_here(hibernate, monkeypatch, tmp_path, Asker)
    with here as (service, address, _), inboxes[0], inboxes[1], contextlib.ExitStack() as stack:
        service.loop.watch(inboxes[1].fileno(), hibernate.READ, answer)
        for _ in range(3):
            client = stack.enter_context(socket.create_connection(address))
            run_for(service, 0.1)
        client.settimeout(1)
        assert client.recv(10) == b"?!"
        assert service.count() == 3


def test_a_look_that_fails_is_tried_again_ever_more_seldom(hibernate, monkeypatch, tmp_path):
    class Looker(hibernate.Session):
        watch_dirs, looks, user, home = ("new",), 0, "u", str(tmp_path)

        def __init__(self):
            super().__init__()
            self.tag = "t"

        def watch(self):
            return "", (1,)  # as if a full disk kept it from ever knowing the time

        def stirred(self):
            self.__class__.looks += 1
            yield b""

    (tmp_path / "new").mkdir()
    here = service_here(hibernate, monkeypatch, tmp_path, Looker)
    with here as (service, address, _), socket.create_connection(address):
        run_for(service, 1.5)
        assert 2 <= Looker.looks <= 8


def test_the_engine_names_no_protocol_and_nothing_of_the_parts_behind_it():
    """Parts 1 to 7 can be cut out, with the imports and constants above, and used by themselves."""
    parts, found, used, bound = part_lines(), [], {}, {*dir(builtins), "__file__", "__name__"}
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        line = getattr(node, "lineno", 0)
        if line >= parts[8]:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used[node.id] = line
        for text in dict(ast.iter_fields(node)).values():
            text = text.decode("latin-1") if isinstance(text, bytes) else text
            if isinstance(text, str) and line >= parts[1]:
                found += [(line, text)] * bool(re.search("imap|maildir", text, re.IGNORECASE))
        for field in ("name", "asname", "arg", "id"):  # definitions, imports, arguments, variables
            if not isinstance(getattr(node, "ctx", ast.Store()), ast.Load):
                bound.add(getattr(node, field, ""))
    assert not found
    assert not {name: line for name, line in used.items() if name not in bound}


def test_a_part_uses_only_the_parts_above_it():
    text = PROGRAM.read_text()
    parts, defined, codes = [*part_lines().values()], {}, [compile(text, "", "exec")]
    part = lambda line: bisect.bisect(parts, line)  # noqa: E731
    for node in ast.parse(text).body:
        targets = (getattr(target, "id", "") for target in getattr(node, "targets", ()))
        defined |= dict.fromkeys((getattr(node, "name", ""), *targets), node.lineno)
    for code in codes:
        codes += [inner for inner in code.co_consts if hasattr(inner, "co_code")]
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL" and step.argval in defined:
                where = code.co_firstlineno
                assert part(defined[step.argval]) <= part(where), (step.argval, where)


IMPORT = """
import logging, multiprocessing, os, resource, signal, sys, threading
def state():
    return [
        os.getcwd(), os.listdir("."), os.listdir("/proc/self/fd"), os.umask(0o077), {**os.environ},
        sys.argv[:], sys.path[:], sys.stdout, sys.excepthook, threading.enumerate(),
        multiprocessing.active_children(), multiprocessing.get_start_method(allow_none=True),
        [signal.getsignal(number) for number in signal.valid_signals()], signal.set_wakeup_fd(-1),
        logging.root.handlers[:], logging.root.level, resource.getrlimit(resource.RLIMIT_NOFILE),
    ]
state()  # which sets the umask
before = state()
import engine
assert state() == before, (before, state())
assert all(hasattr(engine, name) for name in engine.__all__) and engine.__version__
"""


def test_an_import_under_another_name_starts_nothing_and_changes_nothing(tmp_path):
    shutil.copy(PROGRAM, tmp_path / "engine.py")
    done = subprocess.run(
        [sys.executable, "-BWerror", "-c", IMPORT], cwd=tmp_path, capture_output=True, timeout=9
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done


def test_the_examples_in_docstrings_hold(hibernate):
    assert doctest.testmod(hibernate).failed == 0


def test_the_file_has_its_eleven_parts_and_no_overlong_line():
    assert list(part_lines()) == list(range(1, 12))
    assert max(map(len, PROGRAM.read_text().splitlines())) <= 100


# ------------------------------------------------------------------------------------------------
# 3  The life of a session
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def the_default_port():
    """Port 1143 is the only fixed one; of the suites on this machine one at a time may have it."""
    with socket.socket(socket.AF_UNIX) as lock:
        eventually(lambda: not bind_error(lock, "\0hibernate-test-1143"), 60, "the other suite")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if bind_error(probe, ("127.0.0.1", 1143)):
                pytest.skip("port 1143 is in use on this machine")
        yield


def bind_error(sock, address):
    try:
        sock.bind(address)
    except OSError as error:
        return error.errno
    return 0


class Clone(Server):
    """A fresh clone: the program and its .gitignore, started without any configuration."""

    def configure(self, settings, listener):
        self.outside = Path(tempfile.mkdtemp(prefix="hb-", dir=FOLDER))
        shutil.copy(PROGRAM, self.dir)
        shutil.copy(HERE / ".gitignore", self.dir)
        self.log_file = self.outside / "log"

    def git(self, *arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=self.dir, capture_output=True, check=True, timeout=9,
        )
        return done.stdout

    def command(self):
        return [sys.executable, "hibernate.py"]

    def wait_ready(self):
        said = super().wait_ready()
        self.password = said[2].partition(": ")[2]
        return said

    def __exit__(self, *error):
        try:
            super().__exit__(*error)
        finally:
            shutil.rmtree(self.outside, ignore_errors=True)


def test_a_configuration_that_was_added_is_held_to_what_a_reload_can_do():
    with the_default_port(), Clone() as server, Imap(server, "demo") as client:
        server.allow = "refused: "
        server.configuration.write_text("base_dir = elsewhere\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "refused: hibernate.conf:1: base_dir can't change" in server.log())
        client.cmd("NOOP")
        server.configuration.write_text("verbose_proctitle = no\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.titles("imap") == ["hibernate/imap"])
        client.cmd("NOOP")
        server.configuration.unlink()


def test_without_a_configuration_it_serves_a_demo_user_and_leaves_nothing_git_would_see():
    with the_default_port(), Clone() as server:
        assert server.said[:2] == ["listening imap 127.0.0.1:1143", "user: demo"]
        assert re.fullmatch(r"password: [A-Za-z0-9]{8,}", server.said[2])
        assert server.said[3:] == ["ready"]
        with Imap(server) as client:
            assert client.greeting.startswith("* OK")
            client.cmd(f"LOGIN demo {server.password}")
            assert "* 1 EXISTS" in client.cmd("SELECT INBOX")
            [fetched, _] = client.cmd("FETCH 1 BODY[]")
            assert re.search(r"(?i)subject: .*welcome|welcome", fetched)
        assert server.control("status")
        server.git("init", "-q")
        server.git("add", "-A")
        server.git("commit", "-qm", "clone")
        assert server.git("status", "--porcelain", "--untracked-files=all") == b""
        assert server.git("ls-files").split() == [b".gitignore", b"hibernate.py"]
        assert server.process.poll() is None
        server.stop(signal.SIGINT)
        first = server.password
        server.process.stdout.close()
        server.start()
        assert server.password != first
        with Imap(server, "demo") as client:
            assert "* 1 EXISTS" in client.cmd("SELECT INBOX")


def test_a_second_start_in_the_same_directory_leaves_the_first_its_demo_user():
    with the_default_port(), Clone() as server:
        program = server.dir / "hibernate.py"
        program.write_text(program.read_text().replace("BIND_TIME = 5.0", "BIND_TIME = 0.1"))
        done = subprocess.run(
            server.command(), cwd=server.dir, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (69, b"") and b"is in use" in done.stderr, done
        with Imap(server, "demo") as client:
            client.cmd("SELECT INBOX")


def test_it_is_ready_within_a_second():
    best = min(ready_after() for _ in range(3))
    assert best < 1.0


def ready_after():
    start = time.monotonic()
    with Server():
        return time.monotonic() - start


def test_a_server_without_any_process_in_reserve_is_ready_and_forks_when_a_client_comes():
    names = ("imap-login", "auth", "imap")
    none = "".join(f"service {name} {{\n process_min_avail = 0\n}}\n" for name in names)
    with Server(none) as server, Imap(server, "alice") as client:
        client.cmd("NOOP")


def test_ctrl_c_says_bye_to_all_and_the_next_start_finds_nothing_in_its_way():
    with Server() as server:
        before_login, awake, asleep = Imap(server), Imap(server, "alice"), Imap(server, "bob")
        asleep.cmd("SELECT INBOX")
        asleep.idle()
        eventually(lambda: server.held() >= 1)
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to every process
        for client in (before_login, awake, asleep):
            assert "* BYE" in client.ended()
        server.process.wait(PATIENCE)
        server.stop()
        server.process.stdout.close()
        server.start()
        with Imap(server, "alice") as client:
            client.cmd("NOOP")


def test_sigterm_says_bye_as_well_even_to_a_client_in_the_middle_of_a_literal():
    with Server() as server:
        client = Imap(server, "alice")
        client.send("x APPEND INBOX {100}\r\n")
        client.until(r"^\+ ")
        server.stop()
        assert "* BYE" in client.ended()


def together(function, *rows):
    """[function(*row), …], all at the same time: a command line mostly waits for its start."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda row: function(*row), rows))


def program(*arguments, cwd="/tmp", input=b"", **options):
    """The command line without a server of its own."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)], cwd=cwd, input=input,
        capture_output=True, timeout=PATIENCE, **options,
    )


@fixture(scope="module")
def server():
    """One server for the tests that need no other; each takes a user of its own."""
    users = [f"user{n}" for n in range(200)]
    with Server(users=users) as running:
        running.fresh = iter(users)
        yield running


@fixture()
def user(server):
    return next(server.fresh)


def rests_in(server, user):
    """The services in which `who` sees the user, as a sorted list."""
    return sorted(row["service"] for row in server.who() if row["user"] == user)


def falls_asleep(server, user):
    eventually(lambda: rests_in(server, user) == ["imap-hibernate"], what=f"{user} asleep")


def plain(user, password):
    return base64.b64encode(f"\0{user}\0{password}".encode()).decode()


LOG_INS = [  # what is said, a line at a time; %u user, %n its length, %p password, %a both
    ['x LOGIN "%u" "%p"'], ["x LOGIN {%n}", "%u {6}", "%p"], ["x LOGIN {%n+}\r\n%u {6+}\r\n%p"],
    ["x AUTHENTICATE PLAIN %a"], ["x AUTHENTICATE PLAIN", "%a"],
]  # fmt: skip


@table("lines", LOG_INS)
def test_log_in_by_login_and_by_authenticate_in_each_of_their_forms(server, user, lines):
    both = plain(user, server.password)
    values = {"%u": user, "%n": str(len(user)), "%p": server.password, "%a": both}
    with Imap(server) as client:
        for number, line in enumerate(lines, 1):
            client.send(re.sub("%.", lambda match: values[match[0]], line) + "\r\n")
            client.until("^x OK" if number == len(lines) else r"^\+")
        client.cmd("SELECT INBOX")


def test_a_log_in_and_all_that_follows_may_come_in_one_packet(server, user):
    with Imap(server) as client:
        client.send(f"a LOGIN {user} {server.password}\r\nb SELECT INBOX\r\nc NOOP\r\nd IDLE\r\n")
        lines = client.until(r"^\+ ")
        assert [x[:4] for x in lines if re.match("[abcd] ", x)] == ["a OK", "b OK", "c OK"]


def test_one_byte_at_a_time_says_the_same_as_all_at_once(server, user):
    text = f"a LOGIN {user} {server.password}\r\nb SELECT INBOX\r\nc NOOP\r\nd LOGOUT\r\n"
    answers = []
    for size in (len(text), 1):
        with Imap(server) as client:
            for start in range(0, len(text), size):
                client.send(text[start : start + size])
            answers.append(re.sub(r"\d\d+", "N", client.ended()))
    assert answers[0] == answers[1] and "\r\nd OK" in answers[0]


DELIVERIES = {
    "deliver": lambda server, user: server.run("deliver", user, input=message()),
    "hand": lambda server, user: deliver_by_hand(server.home(user)),
    "mailbox": lambda server, user: server.maildir(user).add(message()),
}


def test_a_session_sleeps_wakes_for_mail_and_for_its_client_and_sleeps_again(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        server.run("deliver", user, input=message("first"))
        count = 1
        eventually(lambda: "* 1 EXISTS" in client.cmd("NOOP"))
        for way in [*DELIVERIES, *DELIVERIES]:
            tag = client.idle()
            falls_asleep(server, user)
            DELIVERIES[way](server, user)
            count += 1
            client.until(rf"^\* {count} EXISTS$", 5)
            falls_asleep(server, user)  # in the same IDLE
            client.done(tag)
            [fetched, _] = client.cmd(f"FETCH {count} BODY.PEEK[HEADER.FIELDS (SUBJECT)]")
            assert "Subject: hello" in fetched
        falls_asleep(server, user)
        assert client.cmd("LOGOUT")[0].startswith("* BYE")


def test_the_worker_has_forgotten_a_sleeper_and_the_titles_say_so():
    titles = [
        "hibernate/auth", "hibernate/imap [0 connections]",
        "hibernate/imap-hibernate [1 connections]", "hibernate/imap-hibernate-twin [1 copies]",
        "hibernate/imap-login [0 pre-login]", "hibernate/master",
    ]  # fmt: skip
    quicker = PatchedServer(patch="hibernate.SWEEP_TIME = 0.2")
    with quicker as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        client.idle()
        eventually(lambda: server.titles() == titles)
        mine = client.socket.getsockname()
        holders = [pid for pid in server.processes() if mine in connections_of(pid)]
        assert sorted(holders) == server.pids("imap-hibernate") + server.pids(TWIN)


def test_a_session_at_rest_outside_idle_sleeps_too(server, user):
    with Imap(server, user) as client:
        for _ in range(3):
            falls_asleep(server, user)
            client.cmd("NOOP")
            client.cmd("SELECT INBOX")
        falls_asleep(server, user)
        deliver_by_hand(server.home(user))
        assert rests_in(server, user) == ["imap-hibernate"] and client.silent()
        assert "* 1 EXISTS" in client.cmd("NOOP")


def test_done_and_idle_in_one_packet_are_answered_asleep(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        client.send("x0 IDLE\r\n")
        client.until(r"^\+ ")
        falls_asleep(server, user)
        for number in range(20):
            client.send(f"DONE\r\nx{number + 1} IDLE\r\n")
            lines = client.until(r"^\+ ")
            assert [line.split()[:2] for line in lines[:-1]] == [[f"x{number}", "OK"]], lines
            assert rests_in(server, user) == ["imap-hibernate"]
        client.send("DONE\r\n")
        assert client.until(r"^x20 ")[-1].startswith("x20 OK")
        assert rests_in(server, user) == ["imap-hibernate"]
        client.send("x21 IDLE\r\n")
        client.until(r"^\+ ")
        deliver_by_hand(server.home(user))
        client.until(r"^\* 1 EXISTS$", 5)
        client.send("done\n")  # in any case, and with a bare LF
        client.until(r"^x21 OK")


def test_who_falls_asleep_just_before_its_keepalive_still_gets_it(hibernate):
    def waits(user):
        return hibernate.seconds_to_beat(5, "127.0.0.1:1", user)

    users = [f"u{n}" for n in range(30)]
    with Server("imap_idle_notify_interval = 5 s", users=users) as server:
        user = next(user for user in users if 1 < waits(user) <= 2)
        eventually(lambda: waits(user) < 0.8)
        [client] = many(server, [user])
        falls_asleep(server, user)
        client.until("Still here", 2.5)  # not five seconds later
        client.close()


def test_a_bug_in_the_keepalive_of_one_sleeper_costs_only_that_one():
    broken = (
        "turn = hibernate.Keeper.take_turn\n"
        "hibernate.Keeper.take_turn = lambda self, fd, *slot: turn(self, fd, *slot) "
        "if self.known(fd).user != 'bob' else 1 / 0"
    )
    settings = "imap_idle_notify_interval = 1 s"
    with PatchedServer(settings, broken, allow="Traceback|Zero|costs one") as server:
        clients = many(server, ["alice"] * 5 + ["bob"] + ["alice"] * 5)
        for client in clients[:5] + clients[6:]:
            client.until("Still here")
            client.until("Still here")
            client.close()
        assert "* BYE Internal error" in clients[5].ended()
        assert server.log().count("Traceback") == 1


def test_a_session_with_a_bug_that_wakes_ends_and_costs_nobody_else_anything():
    broken = (
        "import os; watch = hibernate.ImapSession.watch\n"
        "hibernate.ImapSession.watch = lambda self: "
        "watch(self) if self.user == 'alice' or not os.path.exists('broken') else 1 / 0"
    )
    with PatchedServer(patch=broken, allow="Traceback|Zero|costs one") as server:
        alice, bob = many(server, ["alice", "bob"])
        eventually(lambda: server.held() == 2)
        (server.dir / "broken").touch()
        deliver_by_hand(server.home("bob"))
        assert "* BYE Internal error" in bob.ended()
        deliver_by_hand(server.home("alice"))
        alice.until(r"^\* 1 EXISTS$")
        alice.close()


def test_a_session_with_a_bug_that_falls_asleep_ends_and_costs_nobody_else_anything():
    broken = (
        "freeze = hibernate.ImapSession.freeze\n"
        "hibernate.ImapSession.freeze = lambda self: "
        "freeze(self) if self.user == 'alice' else 1 / 0"
    )
    with PatchedServer(patch=broken, allow="Traceback|Zero|costs one") as server:
        bob = Imap(server, "bob")
        assert "* BYE Internal error" in bob.ended()
        with Imap(server, "alice") as alice:
            eventually(lambda: server.held() == 1)
            alice.cmd("NOOP")


def test_a_bug_in_thawing_refuses_the_session_and_costs_no_room():
    broken = "hibernate.ImapSession.thaw = lambda self, own: 1 / 0"
    with PatchedServer(patch=broken, allow="Traceback|Zero") as server:
        client = Imap(server)
        for _ in range(3):
            client.send(f"a LOGIN alice {server.password}\r\n")
            assert client.until("^a ")[-1].startswith("a NO")
        rows = [row for row in server.ask(b"status") if row["service"] == "imap"]
        assert {row["room"] for row in rows} == {100}
        client.close()


def test_a_long_interval_of_keepalives_costs_no_memory():
    with Server("imap_idle_notify_interval = 30 days") as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        tag = client.idle()
        falls_asleep(server, "alice")
        assert proc_bytes(server.pids("imap-hibernate")[0], "Anonymous") < 100 * 2**20
        client.done(tag)


def test_half_a_line_wakes_a_sleeper_and_the_rest_is_heard(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        for text in ("DONE\r\n", "DONE\r\nx NOOP\r\n"):
            tag = client.idle()
            falls_asleep(server, user)
            for byte in text[:6]:
                client.send(byte)
                if byte != "\n":
                    eventually(lambda: rests_in(server, user) == ["imap"], 5)
            client.send(text[6:])
            client.until(rf"^{tag} OK")
            if text[6:]:
                client.until("^x OK")


def test_a_sleeper_that_leaves_is_forgotten_however_it_leaves(server, user):
    for reset in (False, True):
        client = Imap(server, user)
        client.cmd("SELECT INBOX")
        client.idle()
        falls_asleep(server, user)
        if reset:
            linger = struct.pack("ii", 1, 0)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.close()
        eventually(lambda: rests_in(server, user) == [])


def test_a_half_closed_sleeper_still_has_its_last_commands_executed(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        client.idle()
        falls_asleep(server, user)
        client.send("DONE\r\nx APPEND INBOX {5+}\r\nFrom:\r\ny STATUS INBOX (MESSAGES)\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        said = client.ended()
        assert "\r\nx OK" in said and "MESSAGES 1" in said and "\r\ny OK" in said


# What happens to a mailbox while its session sleeps, and what the session must then be told; in
# IDLE at once, outside with the next command. `other` is a second session of the same user.


def nothing(server, home, other):
    pass


def new_mail(server, home, other):
    deliver_by_hand(home / ".Work")


def flagged_by_a_rename(server, home, other):
    [name] = [x for x in (home / ".Work" / "cur").iterdir() if x.name.startswith("2.")]
    name.rename(name.with_name(name.name.partition(":")[0] + ":2,FS"))


def flagged_by_a_session(server, home, other):
    other.cmd("STORE 2 +FLAGS (\\Answered)")


def given_a_keyword(server, home, other):
    other.cmd("STORE 2 +FLAGS ($Forwarded)")


def expunged_by_a_session(server, home, other):
    other.cmd("STORE 2 +FLAGS (\\Deleted)")
    other.cmd("EXPUNGE")


def removed_by_hand(server, home, other):
    [name] = [x for x in (home / ".Work" / "cur").iterdir() if x.name.startswith("2.")]
    name.unlink()


CHANGES = [
    (nothing, None),
    (new_mail, r"\* 4 EXISTS"),
    (flagged_by_a_rename, r"\* 2 FETCH \(.*\\Flagged"),
    (flagged_by_a_session, r"\* 2 FETCH \(.*\\Answered"),
    (given_a_keyword, r"\* 2 FETCH \(.*\$Forwarded"),
    (expunged_by_a_session, r"\* 2 EXPUNGE"),
    (removed_by_hand, r"\* 2 EXPUNGE"),
]


def three_messages(server, user):
    """A folder .Work with the messages 1., 2. and 3. in cur/; the home that it lies in."""
    server.maildir(user).add_folder("Work")
    for number in (1, 2, 3):
        name = f"{number}.P1.example:2,S"
        Path(server.home(user), ".Work", "cur", name).write_bytes(message(f"number {number}"))
    return server.home(user)


@table("change, heard", CHANGES)
@table("idling", [True, False])
def test_two_cycles_of_sleep_and_a_change_in_one_of_them(server, user, change, heard, idling):
    home = three_messages(server, user)
    with Imap(server, user) as client, Imap(server, user) as other:
        client.cmd("SELECT Work")
        other.cmd("SELECT Work")
        tag = client.idle() if idling else ""
        sleeps = lambda: rests_in(server, user) == ["imap-hibernate"] * 2  # noqa: E731
        eventually(sleeps)
        change(server, home, other)
        if idling and heard:
            assert re.search(heard, "\n".join(client.until(heard, 8)))
        eventually(sleeps)
        if idling:
            said = client.done(tag)
            assert len(said) == 1 or heard, said
        else:
            said = eventually_says(client, heard)
            assert heard or len(said) == 1, said
        eventually(sleeps)
        assert len(client.cmd("NOOP")) == 1  # and nothing twice
        left = {"EXPUNGE": 2, "EXISTS": 4}.get((heard or "").rpartition(" ")[2], 3)
        assert f"* {left} EXISTS" in client.cmd("EXAMINE Work")


def eventually_says(client, pattern):
    """NOOP until `pattern` is among the answers, or once if there is none."""
    said = client.cmd("NOOP")
    end = time.monotonic() + 5
    while pattern and not re.search(pattern, "\n".join(said)) and time.monotonic() < end:
        said += client.cmd("NOOP")
    assert not pattern or re.search(pattern, "\n".join(said)), said
    return said


@table("idling", [True, False])
def test_a_mailbox_that_vanishes_under_a_sleeper_ends_its_session(server, user, idling):
    home = three_messages(server, user)
    with Imap(server, user) as client:
        client.cmd("SELECT Work")
        if idling:
            client.idle()
        falls_asleep(server, user)
        (home / ".Work").rename(home / "trash")
        shutil.rmtree(home / "trash")
        if not idling:
            client.send("x NOOP\r\n")
        assert "* BYE" in client.ended()


@table("timeout", ["0", "50 msecs"])
def test_a_directory_removed_and_made_again_is_watched_again(timeout):
    with Server(f"imap_hibernate_timeout = {timeout}") as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        client.idle()
        new = server.home("alice") / "new"
        for number in range(3):
            new.rename(new.with_name(f"old{number}"))
            new.mkdir(exist_ok=True)
            eventually(lambda: time.time_ns() - new.stat().st_mtime_ns > 10**8)
            assert server.ask(b"status")  # by now the server has looked at it
            deliver_by_hand(server.home("alice"))
            client.until(r"^\* \d EXISTS$", 5)


def test_mail_that_races_with_falling_asleep_is_always_heard():
    with Server("imap_hibernate_timeout = 1 msecs") as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        client.idle()
        for number in range(1, 101):
            select.select((), (), (), number % 10 / 1000)  # this way and that around the freeze
            deliver_by_hand(server.home("alice"))
            client.until(rf"^\* {number} EXISTS$", 5)


def test_input_before_during_and_after_the_hand_over_is_executed_once():
    with Server("imap_hibernate_timeout = 1 msecs") as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        for number in range(84):  # every pair of the two pauses
            select.select((), (), (), number % 12 / 2000)
            half = number % 3
            text = f"t{number} APPEND INBOX {{7+}}\r\nFrom: x\r\n"
            client.send(text[: 5 * half] if half else text)
            if half:
                select.select((), (), (), number % 7 / 2000)
                client.send(text[5 * half :])
            lines = client.until(r"^t\d+ ")
            assert lines[-1].startswith(f"t{number} OK"), lines
        client.cmd("NOOP")
        assert "(MESSAGES 84)" in client.cmd("STATUS INBOX (MESSAGES)")[0]
        tags = "".join(f"p{number} NOOP\r\n" for number in range(500))
        client.send(tags)
        said = [x for x in client.until("^p499 ") if x.startswith("p")]
        assert [x.split()[:2] for x in said] == [[f"p{n}", "OK"] for n in range(500)]


HOSTILE = ["x\ty", "x\0y", 'x"y', "x\x01y", "x\xffy", "x\\y", "x{5}", "x%", "x(", "+", "x" * 5000,
           "user=bob\t", 'x","bob","', "x\ruser=bob", "\u00fc"]  # fmt: skip


@table("tag", HOSTILE)
def test_no_byte_a_client_can_say_changes_who_it_is(server, user, tag):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        before = identity_of(server, user)
        for first in ("", "DONE\r\n"):
            if first:
                client.send("good IDLE\r\n")
                client.until(r"^\+ ")
                falls_asleep(server, user)
            client.send(f"{first}{tag} IDLE\r\n".encode("latin-1"))
            said = client.until(r"^\+ |BAD")[-1]
            if said.startswith("+"):
                falls_asleep(server, user)
                client.send("DONE\r\n")
                client.until("OK")
            falls_asleep(server, user)
            client.cmd("NOOP")
            assert identity_of(server, user) == before


def identity_of(server, user):
    [row] = [row for row in server.who() if row["user"] == user]
    return {key: row[key] for key in ("user", "session", "since", "remote")}


def test_who_counts_a_session_once_wherever_it_is_and_knows_its_beginning(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        first = identity_of(server, user)
        assert abs(first["since"] - time.time()) < 10
        assert first["remote"] == "%s:%d" % client.socket.getsockname()
        for _ in range(3):
            falls_asleep(server, user)
            assert identity_of(server, user) == first
            client.cmd("NOOP")
            assert identity_of(server, user) == first


def test_moving_sessions_are_never_seen_twice():
    with Server("imap_hibernate_timeout = 5 msecs") as server:
        clients = [Imap(server, "alice") for _ in range(20)]
        for _ in range(10):
            for number, client in enumerate(clients):
                client.send(f"n{number} NOOP\r\n")
            # The processes answer one after the other: only the command can tell what is double.
            rows = [row["session"] for row in server.control("who")]
            assert len(set(rows)) == len(rows), collections.Counter(rows)
            for client in clients:
                client.until("^n")
        eventually(lambda: len(server.who("imap-hibernate")) == 20 == len(server.who()))


def test_every_byte_of_a_session_is_counted_across_its_homes(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        for _ in range(2):
            tag = client.idle()
            falls_asleep(server, user)
            client.done(tag)
            client.cmd("NOOP")
            falls_asleep(server, user)
        client.cmd("LOGOUT")
        line = eventually(lambda: re.search(rf".* {user} .*in=(\d+) out=(\d+)", server.log()))
        assert (int(line[1]), int(line[2])) == (client.sent, client.heard)


# ------------------------------------------------------------------------------------------------
# 4  Many sessions, and hand-overs that are refused
# ------------------------------------------------------------------------------------------------


def many(server, users, window=40):
    """A client of each user in IDLE on its INBOX; all that is said before comes in one packet."""
    clients = []
    for start in range(0, len(users), window):
        fresh = [Imap(server, greeting=False) for _ in users[start : start + window]]
        for client, user in zip(fresh, users[start:]):
            client.send(f"a LOGIN {user} {server.password}\r\nb SELECT INBOX\r\nc IDLE\r\n")
        for client in fresh:
            client.until(r"^\+ ")
        clients += fresh
    return clients


def many_descriptors(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"only {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def test_a_thousand_sessions_of_200_users_sleep_in_one_keeper_and_all_hear_their_mail(hibernate):
    many_descriptors(1400)
    users = [f"u{n}" for n in range(200)]
    with Server("imap_hibernate_timeout = 500 msecs", users=users) as server:
        clients = many(server, users * 5)
        eventually(lambda: server.loads("imap-hibernate") == [1000])
        eventually(lambda: server.held("imap") == 0)
        memory_is_bounded(server, hibernate)
        rows = server.who()
        assert len({row["session"] for row in rows}) == 1000 == len(rows)
        assert collections.Counter(row["user"] for row in rows) == dict.fromkeys(users, 5)
        for user in users:
            deliver_by_hand(server.home(user))
        for client in clients:
            client.until(r"^\* 1 EXISTS$")
        eventually(lambda: server.held() == 1000)
        for client in clients:
            client.send("DONE\r\nd NOOP\r\n")
        for client in clients:
            assert client.until("^d ")[-1].startswith("d OK")


def memory_is_bounded(server, hibernate):
    """A budget kept by a test: it would not survive a doubling of what a sleeper costs."""
    [keeper] = server.pids("imap-hibernate")
    before = proc_bytes(keeper, "Anonymous")
    more = many(server, ["u0"] * 400)
    eventually(lambda: server.held() == 1400)
    print("heap bytes a sleeper", (proc_bytes(keeper, "Anonymous") - before) / len(more))
    assert (proc_bytes(keeper, "Anonymous") - before) / len(more) < 150
    assert ctypes.sizeof(hibernate.Slot) <= 328  # shared with the twin
    for client in more:
        client.close()
    eventually(lambda: server.held() == 1000)


def test_keepers_fill_one_after_the_other_and_when_all_are_full_sessions_stay_awake():
    settings = "service imap-hibernate {\n client_limit = 40\n process_limit = 3\n}"
    with Server(settings, allow="process_limit") as server:
        clients = []

        for number, loads in (
            (20, [20]), (40, [40]), (41, [1, 40]), (80, [40, 40]), (100, [20, 40, 40]),
        ):  # fmt: skip
            clients += many(server, ["alice"] * (number - len(clients)))
            eventually(lambda: server.loads("imap-hibernate") == loads, what=f"{loads}")
        assert "process_limit" not in server.log()
        clients += many(server, ["alice"] * 30)
        eventually(lambda: server.loads("imap-hibernate") == [40, 40, 40])
        eventually(lambda: server.held("imap") == 10)
        warnings = eventually(lambda: limit_warnings(server))
        assert re.search(r"imap-hibernate.*process_limit.*\b3\b", warnings[0])
        deliver_by_hand(server.home("alice"))
        for client in clients:
            client.until(r"^\* 1 EXISTS$")
        for client in clients[-20:]:
            client.send("DONE\r\nd NOOP\r\n")
            client.until("^d OK")
        assert len(limit_warnings(server)) <= 1 + len({x[:19] for x in limit_warnings(server)})
        for client in clients[:15]:
            client.close()
        eventually(lambda: server.held() == 115 and server.held("imap") == 0)


def limit_warnings(server):
    return [x for x in server.log().splitlines() if "WARNING" in x and "process_limit" in x]


def test_when_all_log_in_processes_are_full_the_oldest_that_has_not_tried_gives_way():
    limits = "service imap-login {\n client_limit = 10\n process_limit = 1\n}"
    with Server(limits) as server:
        idle = [Imap(server) for _ in range(10)]
        for number in range(5):
            with Imap(server, "alice") as newcomer:
                newcomer.cmd("NOOP")
        gone = [client for client in idle if not client.silent()]
        assert gone == idle[: len(gone)] and 1 <= len(gone) <= 5
        assert all("* BYE Too many connections" in client.ended() for client in gone)
        assert limit_warnings(server)


def test_limits_as_small_as_one_still_make_room_and_let_sleepers_wake():
    one = "{\n client_limit = 1\n process_limit = 1\n}"
    with Server(f"service imap-login {one}\nservice imap {one}") as server:
        sleeper = Imap(server, "alice")
        falls_asleep(server, "alice")
        server.configuration.write_text(
            server.configuration.read_text() + "imap_hibernate_timeout = 0\n")
        assert server.run("reload").returncode == 0
        eventually(lambda: server.held() == 1)
        awake = Imap(server, "bob")
        sleeper.cmd("NOOP")
        idle, newcomer = Imap(server), Imap(server)
        assert "* BYE Too many connections" in idle.ended() and newcomer.silent()
        awake.cmd("NOOP")


def test_with_reuse_port_full_log_in_processes_make_room_as_well():
    two = "process_limit = 2\n process_min_avail = 2"
    limits = f"service imap-login {{\n client_limit = 5\n {two}\n}}"
    with Server(limits, listener="port = 0\n reuse_port = yes") as server:
        idle = [Imap(server) for _ in range(10)]
        with Imap(server, "alice") as newcomer:
            newcomer.cmd("NOOP")
        assert any(not client.silent() for client in idle) and limit_warnings(server)


def test_a_log_in_that_finds_all_workers_full_waits_and_is_done_when_there_is_room():
    limits = "service imap {\n client_limit = 2\n process_limit = 1\n}\nimap_hibernate_timeout = 0"
    with Server(limits) as server:
        first, second = Imap(server, "alice"), Imap(server, "alice")
        third = Imap(server)
        third.send(f"a LOGIN bob {server.password}\r\nb NOOP\r\n")
        eventually(lambda: limit_warnings(server))
        assert third.silent()
        first.close()
        assert third.until("^b ")[-1].startswith("b OK")
        second.cmd("NOOP")


def test_many_log_ins_at_once_while_auth_is_away_are_all_refused_and_go_on():
    with PatchedServer(patch="hibernate.MOVE_TIME = 0.5") as server:
        with false_inbox(server, "auth"):
            clients = [Imap(server) for _ in range(150)]
            inbox = server.dir / "hibernate.run" / "auth"
            inbox.rename(f"{inbox}.gone")
            for client in clients:
                client.send("a LOGIN alice x\r\nb LOGIN alice x\r\nc NOOP\r\n")
            for client in clients:
                lines = client.until("^c OK")
                assert lines[0].startswith("a NO") and lines[1].startswith("b NO")
                client.close()
            Path(f"{inbox}.gone").rename(inbox)


def connected_pair():
    """(client's end, server's end) of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


class Sender:
    """The sender's half of a hand-over, spoken by the test: it may say what no process of the
    server would."""

    def __init__(self, server, hibernate, service="imap"):
        self.hibernate, self.server = hibernate, server
        self.client, self.theirs = connected_pair()
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(PATIENCE)
        self.channel.connect(str(server.dir / "hibernate.run" / service))
        self.key = (server.dir / "hibernate.run" / "key").read_bytes()

    def record(self, age=0, watch=(), own=(), **changes):
        """The bytes of a log-in's record for alice, right unless changed."""
        name = changes.pop("identity", self.hibernate.identity(self.theirs))
        expires, since = int(time.monotonic()) - age + 60, int(time.time())
        home = str(self.server.home("alice"))
        state = self.hibernate.State(expires, "s1", "alice", since, "r:1", home, watch, own)
        text = json.dumps([*state])
        seal = self.hibernate.seal(self.key, name, text)
        fields = {"tag": "", "received": 0, "sent": 0, "pending": "", "answer": "x", "state": text,
                  "seal": seal, **changes}  # fmt: skip
        return self.hibernate.Record(**fields).encode()

    def give(self, record, *descriptors):
        socket.send_fds(self.channel, [record], [x.fileno() for x in descriptors or [self.theirs]])
        return self.channel.recv(200).decode()

    def close(self):
        for sock in (self.client, self.theirs, self.channel):
            sock.close()


@fixture()
def sender(server, hibernate):
    with contextlib.ExitStack() as stack:
        server.maildir("alice")

        def make(service="imap"):
            made = Sender(server, hibernate, service)
            stack.callback(made.close)
            return made

        yield make


def test_a_session_handed_over_starts_with_the_commit_and_not_before(sender):
    right = sender()
    assert right.give(right.record(pending="y NOOP\r\n")) == "+"
    assert not select.select([right.client], (), (), 0.3)[0]
    right.channel.send(b"!")
    right.theirs.close()
    right.client.settimeout(PATIENCE)
    said = b""
    while b"\r\ny OK" not in said:
        said += right.client.recv(4096)
    assert said.startswith(b"x OK")


def test_a_session_whose_commit_meets_a_stop_hears_the_good_bye(hibernate):
    with Server() as server:
        server.maildir("alice")
        senders = [Sender(server, hibernate, service) for service in ("imap", "imap-hibernate")]
        for sender in senders:
            assert sender.give(sender.record(answer="")) == "+"
        witness = Imap(server, "bob")
        server.process.terminate()
        assert "* BYE" in witness.ended()  # by now all processes have been told
        time.sleep(0.1)
        for sender in senders:
            sender.channel.send(b"!")
            sender.theirs.close()
            sender.client.settimeout(PATIENCE)
            assert b"* BYE" in sender.client.recv(4096)
            sender.close()
        assert server.process.wait(PATIENCE) == 0


def test_a_sender_that_gives_up_keeps_an_untouched_session(sender):
    right = sender()
    assert right.give(right.record()) == "+"
    right.channel.close()
    right.client.send(b"still mine")
    assert right.theirs.recv(100) == b"still mine"
    right.theirs.send(b"and yours")
    assert right.client.recv(100) == b"and yours"
    assert not select.select([right.client, right.theirs], (), (), 0.3)[0]


def test_a_flipped_bit_in_a_sealed_record_is_refused_and_logged(server, sender):
    good = sender()
    fields = json.loads(good.record())
    state, seal = fields[-2:]
    name = good.hibernate.identity(good.theirs)
    for at in range(len(state)):
        bad = state[:at] + chr(ord(state[at]) ^ 1) + state[at + 1 :]
        forger = sender() if at % 10 == 0 else good
        if forger is good:
            assert good.hibernate.seal(good.key, name, bad) != seal
        else:
            assert forger.give(forger.record(state=bad)).startswith("-")
    assert sender().give(good.record(seal=seal[:-1] + "A")).startswith("-")
    assert "refused" in server.log()


def test_a_record_of_another_release_is_understood_or_refused_but_never_guessed(hibernate):
    record = hibernate.Record("t", 1, 2, "", "", "[]", "seal")
    fields = json.loads(record.encode())
    newer = json.dumps([*fields, "a field that is added later"]).encode()
    assert hibernate.Record.decode(newer) == record  # what we do not know we leave out
    for bad in (fields[:-1], [fields[0] + 1, *fields[1:]], [True, *fields[1:]], [], None):
        with pytest.raises(ValueError):
            hibernate.Record.decode(json.dumps(bad).encode())


def test_a_swapped_a_late_and_a_malformed_hand_over_are_refused(server, sender):
    other, late = sender(), sender()
    swapped = sender()
    assert swapped.give(swapped.record(), other.theirs) == "-seal"
    assert late.give(late.record(age=61)).startswith("-ticket")
    for record in (b"x", b"[]", b"{}", b"[" * 5000, b"\xff" * 100, b"null",
                   late.record(tag="x\ty"), late.record(received="1"),
                   late.record(pending="\u20ac")):
        bad = sender()
        assert bad.give(record).startswith("-"), record
    two = sender()
    assert two.give(two.record(), two.theirs, other.theirs).startswith("-")
    none = sender()
    none.channel.send(none.record())
    assert none.channel.recv(100).startswith(b"-")
    with open("/dev/null") as file:
        device = sender()
        assert device.give(device.record(), file).startswith("-")
    eventually(lambda: server.log().count("refused") >= 12)


def test_what_is_too_long_to_sleep_is_said_once_for_each_rest_of_its_client():
    with PatchedServer(patch="hibernate.AWAKE_TIME = 0.1") as server:
        with Imap(server, "alice") as client:
            client.cmd(f"CREATE {'x' * 200}")
            client.cmd(f"SELECT {'x' * 200}")
            for count in (1, 2):
                eventually(lambda: server.log().count("stays awake: 'more than") == count)
                select.select((), (), (), 0.4)
                assert server.log().count("stays awake: ") == count
                client.cmd("NOOP")


def test_a_thousand_channels_that_never_speak_are_no_more_than_a_delay():
    many_descriptors(1400)
    with PatchedServer(patch="hibernate.SPEAK_TIME = 1.0") as server:
        awake = Imap(server, "alice")
        silent = []
        for _ in range(1000):
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the backlog is full
                channel.connect(str(server.dir / "hibernate.run" / "imap"))
            silent.append(channel)
        newcomer = Imap(server)
        newcomer.send(f"a LOGIN bob {server.password}\r\nb NOOP\r\n")
        awake.cmd("NOOP")
        assert newcomer.until("^b ", 30)[-1].startswith("b OK")
        for channel in silent:
            channel.close()


@table("service", ["imap", "imap-hibernate"])
def test_a_sender_that_stops_before_its_commit_leaves_no_client_hanging(hibernate, service):
    with PatchedServer(patch="hibernate.COMMIT_TIME = 0.5") as server:
        server.maildir("alice")
        stopped = Sender(server, hibernate, service)
        assert stopped.give(stopped.record(answer="")) == "+"
        stopped.client.settimeout(PATIENCE)
        assert stopped.client.recv(100) == b""  # although the sender still holds the connection
        stopped.close()
        assert "was not committed" in server.log()


def test_what_the_previous_release_has_frozen_is_thawed(hibernate):
    session = hibernate.ImapSession()
    session.times = 5, 6  # it wrote them a second time, at the end
    session.thaw([False, 1, "INBOX", False, 9, 2, [1, 2], 0, 9, 9, 5, 6])
    assert session.view == hibernate.View("", 1, "INBOX", False, 9, 2, [1, 2], 0, 9, 9, 5, 6)
    assert session.freeze() == [False, 1, "INBOX", False, 9, 2, [1, 2], 0, 9, 9]
    with pytest.raises(ValueError, match="not an IMAP session"):
        session.thaw([False, 1, "INBOX", False, 9])


@table("early", [True, False])
def test_mail_that_comes_between_offer_and_commit_is_told(hibernate, early):
    with Server() as server:
        server.maildir("alice")
        home = str(server.home("alice"))
        session, box = hibernate.ImapSession(), hibernate.Index.at(home).by_name("INBOX")
        session.view = view = hibernate.View(home, box.id, box.name, False, box.uidvalidity)
        eventually(lambda: view.look(True) and view.new > 0)
        eventually(lambda: time.time_ns() - max(view.new, view.cur) > 2 * hibernate.YOUNG)
        sender = Sender(server, hibernate, "imap-hibernate")
        watch = ["", view.new, view.cur]
        record = sender.record(tag="t", answer="", watch=watch, own=session.freeze())
        assert sender.give(record) == "+"
        if early:
            deliver_by_hand(home)
            assert server.ask(b"status")  # by now the keeper has heard of it
        sender.channel.send(b"!")
        sender.theirs.close()
        if not early:
            eventually(lambda: server.held() == 1)
            deliver_by_hand(home)
        sender.client.settimeout(PATIENCE)
        assert b"* 1 EXISTS" in sender.client.recv(4096)
        sender.close()
        hibernate.open_index.cache_clear()


def test_a_reconnected_descriptor_is_refused(sender):
    """A hostile holder may connect() a socket elsewhere: the inode stays, the identity must not."""
    hostile = sender()
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        record = hostile.record(identity=hostile.hibernate.identity(hostile.client))
        unspec = struct.pack("H14x", socket.AF_UNSPEC)  # connect() to this dissolves a connection
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.connect(hostile.client.fileno(), unspec, len(unspec)) == 0
        hostile.client.connect(elsewhere.getsockname())
        assert hostile.give(record, hostile.client) == "-seal"


# ------------------------------------------------------------------------------------------------
# 5  Listeners
# ------------------------------------------------------------------------------------------------


def listening(port):
    """The inodes of the sockets that listen on the port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {r[9] for r in rows if r[3] == "0A" and int(r[1].rpartition(":")[2], 16) == port}


FOUR = "service imap-login {\n process_limit = 4\n process_min_avail = 4\n}"


@table("sharing, sockets", [("", 1), ("\n reuse_port = yes", 4)])
def test_a_listener_is_one_socket_for_all_or_with_reuse_port_one_for_each(sharing, sockets):
    with Server(FOUR, listener="port = 0" + sharing) as server:
        assert len(listening(server.port)) == sockets
        clients = [Imap(server) for _ in range(200)]
        eventually(lambda: server.held("imap-login") == len(clients))
        loads = server.loads("imap-login")
        assert len(loads) == 4 and (not sharing or min(loads) > 10), loads


def test_a_second_instance_shares_the_port_with_reuse_port_and_else_is_refused_in_one_line():
    sharing = "reuse_port = yes"
    with Server(FOUR, listener=f"port = 0\n {sharing}") as first, Server() as plain_one:
        port, other = f"port = {first.port}\n", f"port = {plain_one.port}\n"
        attempts = {  # they wait for the port, side by side, while the second is tried
            Refused(port): str(first.port),
            Refused(other + sharing, FOUR): str(plain_one.port),
            Refused(other): str(plain_one.port),
            Refused("port = 0", f"base_dir = {first.dir}/hibernate.run"): "hibernate.run",
        }
        with Server(FOUR, listener=port + sharing) as second:
            assert second.port == first.port and len(listening(first.port)) == 8
            clients = [Imap(first) for _ in range(100)]
            both = (first, second)
            eventually(lambda: sum(x.held("imap-login") for x in both) == len(clients))
            assert min(x.held("imap-login") for x in both) > 10
        for attempt, name in attempts.items():
            code, [line] = attempt.result()
            assert code == 69 and name in line and "in use" in line, line
        for server in (first, plain_one):
            with Imap(server, "alice") as client:
                client.cmd("NOOP")


def test_with_reuse_port_the_share_of_a_full_stopped_or_missing_process_goes_to_its_siblings():
    limits = FOUR.replace("\n}", "\n client_limit = 30\n}")
    sharing = "port = 0\n reuse_port = yes"
    with Server(limits, listener=sharing, allow="SIGKILL") as server:
        eventually(lambda: len(server.titles("imap-login")) == 4)
        clients = [Imap(server) for _ in range(110)]  # by hash: some process gets more than 30
        eventually(lambda: server.held("imap-login") == len(clients))
        assert max(server.loads("imap-login")) <= 30
        for client in clients:
            client.close()
        eventually(lambda: server.held("imap-login") == 0)
        for _ in range(3):
            os.kill(server.pids("imap-login")[0], signal.SIGKILL)
            for client in [Imap(server) for _ in range(20)]:  # all are greeted
                client.close()
        eventually(lambda: len(server.titles("imap-login")) == 4)
        os.kill(stopped := server.pids("imap-login")[0], signal.SIGSTOP)
        for client in [Imap(server) for _ in range(20)]:
            client.close()
        os.kill(stopped, signal.SIGCONT)


def test_a_process_holds_none_of_the_descriptors_of_its_siblings():
    with Server(FOUR) as server:
        pids = eventually(lambda: (found := server.pids("imap-login"))[3:] and found)
        held = {len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}
        assert len(held) == 1 and held.pop() < 20


def test_a_second_instance_takes_the_port_over_from_the_first_under_a_stream_of_connects():
    refused, reset, served = 0, 0, 0
    with Server(FOUR, listener="port = 0\n reuse_port = yes") as first:
        listener = f"port = {first.port}\n reuse_port = yes"
        with Server(FOUR, listener=listener) as second:
            sleeper = Imap(first, "alice")
            while sleeper:
                try:
                    with Imap(second) as client:
                        client.cmd("CAPABILITY")
                        served += 1
                except ConnectionRefusedError:
                    refused += 1
                except (ConnectionError, EOFError, AssertionError):
                    reset += 1
                if served == 100:
                    first.process.send_signal(signal.SIGQUIT)
                if served == 300:
                    sleeper.cmd("NOOP")  # who was connected is still served
                    sleeper.close()
                    sleeper = None
            eventually(lambda: len(listening(second.port)) == 4)
            assert refused == 0 and reset <= 2, (refused, reset)  # in the instant of a close()
        eventually(lambda: first.process.poll() is not None)


class Refused(PatchedServer):
    """A start that must fail; several of them wait side by side."""

    def __init__(self, listener, settings=""):
        super().__init__(settings, "hibernate.BIND_TIME = 1.5", listener=listener)

    def wait_ready(self):
        return []

    def result(self):
        """(exit status, lines of standard error)"""
        code = self.process.wait(PATIENCE)
        assert self.process.stdout.read() == b""
        self.process.stdout.close()
        said = self.log().splitlines()
        Server.live.remove(self)
        shutil.rmtree(self.dir)
        return code, said


# ------------------------------------------------------------------------------------------------
# 6  Nothing is lost: a keeper, its twin or the master killed; reload under load
# ------------------------------------------------------------------------------------------------

TWIN = "imap-hibernate-twin"


def all_hear_their_mail(server, clients, users, count):
    """Each client hears of one new message, says DONE and goes back to sleep in a new IDLE."""
    for user in users:
        deliver_by_hand(server.home(user))
    for client in clients:
        client.until(rf"^\* {count} EXISTS$")
        client.send("DONE\r\nc IDLE\r\n")
    for client in clients:
        client.until(r"^\+ ")
    eventually(lambda: len(server.who("imap-hibernate")) == len(clients))
    rows = eventually(server.who)  # none while a master makes way for the next
    assert len({row["session"] for row in rows}) == len(rows) == len(clients)


def guarded(server, count):
    """A keeper and a twin that has a copy of each of `count` sessions."""
    keeper = f"hibernate/imap-hibernate [{count} connections]"
    twin = f"hibernate/imap-hibernate-twin [{count} copies]"
    return server.titles("imap-hibernate") + server.titles(TWIN) == [keeper, twin]


def test_a_keeper_killed_again_and_again_loses_nobody():
    users = [f"u{n}" for n in range(20)]
    sweeps = "hibernate.SWEEP_TIME = 0.2"
    with PatchedServer(patch=sweeps, users=users, allow="was killed|SIGKILL") as server:
        clients = many(server, users * 6)
        for count in (1, 2, 3):
            eventually(lambda: server.pids(TWIN))  # its seed is the fork: it has all of them
            [keeper] = server.pids("imap-hibernate")
            os.kill(keeper, signal.SIGKILL)
            eventually(lambda: server.pids("imap-hibernate") not in ([], [keeper]))
            all_hear_their_mail(server, clients, users, count)
        clients += many(server, users)
        eventually(lambda: server.held() == len(clients))
        for client in clients[:50]:
            client.close()
        eventually(lambda: server.held() == len(clients) - 50)
        eventually(lambda: guarded(server, len(clients) - 50), what=f"{server.titles()}")


@table("length", [4, 295, 296, 297, 551, 552, 553])
def test_a_sleepers_text_is_the_same_at_each_bound_whatever_was_there_before(hibernate, length):
    slots, tails = (hibernate.Slot * 3)(), (ctypes.c_char * hibernate.TAIL_SIZE * 3)()
    keeper = argparse.Namespace(slots=slots, tails=tails)
    longest = hibernate.TEXT_SIZE + hibernate.TAIL_SIZE
    for lines in (["x" * (longest - 2), "", ""], ["s" * (length - 4), "t", "u"]):
        if len("\n".join(lines)) > longest:
            with pytest.raises(ValueError):
                hibernate.slot_text(*lines)
        else:
            hibernate.Keeper.set_lines(keeper, 1, hibernate.slot_text(*lines))
            assert hibernate.Keeper.lines(keeper, 1) == lines
            assert not any(bytes(slots[at]).strip(bytes(1)) or tails[at].value for at in (0, 2))


def test_a_record_longer_than_a_slot_sleeps_too_and_outlives_its_keeper():
    with Server(allow="was killed|SIGKILL") as server:
        names = ["x" * length for length in range(20, 120, 3)]  # both sides of each bound
        clients = []
        for name in names:
            client = Imap(server, "alice")
            client.cmd(f"CREATE {name}")
            client.cmd(f"SELECT {name}")
            client.idle()
            clients.append(client)
        eventually(lambda: server.held() == len(names))
        for client, tag in zip(clients, itertools.cycle(["t", "t" * 64])):
            client.send(f"DONE\r\n{tag} IDLE\r\n")
            client.until(r"^\+ ")
        eventually(lambda: server.held() == len(names))
        eventually(lambda: server.pids(TWIN))
        [keeper] = server.pids("imap-hibernate")
        os.kill(keeper, signal.SIGKILL)
        for client, name, tag in zip(clients, names, itertools.cycle(["t", "t" * 64])):
            deliver_by_hand(server.home("alice") / f".{name}")
            client.until("^[*] 1 EXISTS")
            client.send("DONE\r\n")
            client.until(f"^{tag} OK")
        assert "stays awake" not in server.log()


@table("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_twin_killed_or_stopped_is_replaced_and_nobody_notices(number):
    patch = "hibernate.SWEEP_TIME = 0.5"
    with PatchedServer(patch=patch, allow="was killed|SIGKILL") as server:
        clients = many(server, ["alice"] * 50)
        [twin] = eventually(lambda: server.pids(TWIN))
        os.kill(twin, number)
        clients += many(server, ["alice"] * 50)
        eventually(lambda: server.held() == 100)
        eventually(lambda: server.pids(TWIN) not in ([], [twin]))
        os.kill(server.pids("imap-hibernate")[0], signal.SIGKILL)
        all_hear_their_mail(server, clients, ["alice"], 1)


def test_who_goes_on_for_a_killed_keeper_goes_on_with_its_log_file_over_a_rotation_too():
    with Server("log_path = the.log", allow="SIGKILL") as server:
        log = server.dir / "the.log"
        clients = many(server, ["alice"] * 5)
        eventually(lambda: server.held() == 5 and server.pids(TWIN))
        [keeper] = server.pids("imap-hibernate")
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: "was killed; its twin goes on with 5" in log.read_text())
        log.rename(f"{log}.1")
        clients += many(server, ["bob"] * 5)
        eventually(lambda: server.held() == 10)
        assert re.search(r"imap-hibernate\[\d+\] INFO .* bob .* is here", log.read_text())
        assert not server.log()


KILLED_IN_COPY = """
import os
copy = hibernate.Keeper.copy
hibernate.Keeper.copy = lambda self, *fds: (
    os.path.exists("killed") and os.kill(os.getpid(), 9), copy(self, *fds))
hibernate.SWEEP_TIME, hibernate.COMMIT_TIME = 100.0, 0.5
"""


def test_a_keeper_killed_before_its_twin_has_the_newcomer_touches_nobody_else(hibernate):
    """What the twin has under the numbers of the newcomer and its channel are sessions that have
    left since the last sweep: they are another's now."""
    awake = "imap_hibernate_timeout = 0"
    with PatchedServer(awake, patch=KILLED_IN_COPY, allow="killed|SIGKILL") as server:
        server.maildir("alice")
        senders = [Sender(server, hibernate, "imap-hibernate") for _ in range(2)]
        for sender in senders:
            sender.give(sender.record(answer=""))
        for sender in senders:
            sender.channel.send(b"!")
        eventually(lambda: server.held() == 2)
        eventually(lambda: server.pids(TWIN))
        for sender in senders:
            sender.theirs.close()
            sender.client.settimeout(PATIENCE)
            sender.client.send(b"x NOOP\r\n")
            assert b"x OK" in sender.client.recv(4096)
        eventually(lambda: server.held("imap") == 2 and not server.held())
        late = []
        for _ in range(3):
            late.append(Sender(server, hibernate, "imap-hibernate"))
            assert server.ask(b"status")  # by now it has accepted
        (server.dir / "killed").touch()
        with contextlib.suppress(ConnectionError):
            assert not late[2].give(late[2].record(answer=""))
        eventually(lambda: "twin goes on" in server.log())
        select.select((), (), (), 1.0)  # COMMIT_TIME
        for sender in senders:
            sender.client.send(b"y NOOP\r\n")
            assert b"y OK" in sender.client.recv(4096)
        for sender in senders + late:
            sender.close()


@contextlib.contextmanager
def false_inbox(server, service):
    """The test in place of all receivers of a service: yields accept(), a channel of a sender."""
    path = server.dir / "hibernate.run" / service
    path.rename(f"{path}.aside")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(PATIENCE)
            yield lambda: listener.accept()[0]
    finally:
        Path(f"{path}.aside").rename(path)


def dies_unread(channel, keeper):
    channel.close()


def dies_after_reading(channel, keeper):
    take(channel)
    channel.close()


def refuses(channel, keeper):
    take(channel)
    channel.send(b"-busy")
    channel.close()


def dies_after_its_yes(channel, keeper):
    """The "+" is on its way when the receiver ends: the commit can't be sent."""
    take(channel)
    os.kill(keeper, signal.SIGSTOP)
    channel.send(b"+")
    channel.close()
    os.kill(keeper, signal.SIGCONT)


def take(channel):
    channel.settimeout(PATIENCE)
    _, fds, _, _ = socket.recv_fds(channel, 1 << 17, 4)
    for fd in fds:
        os.close(fd)


@table("death", [dies_unread, dies_after_reading, refuses, dies_after_its_yes])
def test_a_receiver_that_dies_at_any_step_leaves_the_session_to_its_sender(server, user, death):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        for number in range(2):
            client.idle()
            falls_asleep(server, user)
            [keeper] = [row["pid"] for row in server.who() if row["user"] == user]
            with false_inbox(server, "imap") as accept:
                client.send(f"DONE\r\nx CREATE once{number}\r\n")
                death(accept(), keeper)
            assert client.until("^x ")[-1].startswith("x OK")  # a second time would be a NO


def test_a_sleeper_refused_since_its_client_has_left_is_no_error():
    with Server() as server, Imap(server, "alice") as client:
        falls_asleep(server, "alice")
        with false_inbox(server, "imap") as accept:
            client.send("x NOOP\r\n")
            channel = accept()
            linger = struct.pack("ii", 1, 0)  # close() sends a reset
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
            take(channel)
            channel.send(b"-[Errno 107] Transport endpoint is not connected")
            eventually(lambda: "ended: client closed the connection" in server.log())
            channel.close()


def test_a_receiver_that_dies_with_the_session_ends_it_for_its_client():
    quicker = PatchedServer(patch="hibernate.SWEEP_TIME = 0.2")  # until the twin closes its copy
    with quicker as server, Imap(server, "alice") as client:
        falls_asleep(server, "alice")
        with false_inbox(server, "imap") as accept:
            client.send("x CREATE never\r\n")
            with accept() as channel:
                take(channel)
                channel.send(b"+")
                assert channel.recv(10) == b"!"
        assert client.ended() == ""
        assert not server.who()


def test_reload_under_load_drops_nothing_and_brings_all_into_the_new_generation():
    users = [f"u{n}" for n in range(20)]
    busy = ["reader", "writer", "newcomer"]
    with Server("imap_max_line_length = 64 k", users + busy, allow="refused: ") as server:
        clients = many(server, users * 10)
        eventually(lambda: server.held() == len(clients))
        big = message("big", "0123456789abcdef" * 64 * 1024 * 8 + "\r\n")
        server.maildir("reader").add(big)
        reader, writer = Imap(server, "reader"), Imap(server, "writer")
        reader.cmd("SELECT INBOX")
        reader.send("f FETCH 1 BODY.PEEK[]\r\n")  # and reads nothing of it for now
        tireless = Imap(server, "newcomer")
        writer.send(f"w APPEND INBOX {{{len(big)}}}\r\n")
        writer.until(r"^\+ ")
        writer.send(big[:1000])
        before = set(server.processes()) - {server.process.pid}
        configured = server.configuration.read_text()
        server.configuration.write_text(configured.replace("64 k", "sixty"))
        refused = server.run("reload")
        assert refused.returncode == 78 and b"hibernate.conf:" in refused.stderr, refused
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: re.search(r"refused: .*hibernate\.conf:\d+: ", server.log()))
        assert set(server.processes()) - {server.process.pid} >= before
        server.configuration.write_text(configured)
        assert server.run("reload").returncode == 0
        for _ in range(100):
            with Imap(server, "newcomer") as newcomer:
                newcomer.cmd("SELECT INBOX")
        assert reader.until(r"^f ")[-1].startswith("f OK")
        writer.send(big[1000:] + b"\r\n")
        assert writer.until(r"^w ")[-1].startswith("w OK")
        end = time.monotonic() + 10  # one that always has a command on its way moves on, too
        while before & set(server.processes()):
            for _ in range(100):
                tireless.cmd("NOOP")
            assert time.monotonic() < end, server.processes()
        reader.cmd("NOOP")
        writer.cmd("NOOP")
        reader.close()
        writer.close()
        tireless.close()
        for _ in range(10):  # in a second
            server.process.send_signal(signal.SIGHUP)
            select.select((), (), (), 0.1)
        eventually(lambda: server.held() == len(clients) and len(server.who()) == len(clients))
        all_hear_their_mail(server, clients, users, 1)


def test_a_log_in_that_comes_to_auth_during_a_reload_is_answered():
    with Server() as server, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(PATIENCE)
        asking.connect(str(server.dir / "hibernate.run" / "auth"))
        eventually(lambda: server.held("auth"))
        before = set(server.pids("auth"))
        assert server.run("reload").returncode == 0
        eventually(lambda: set(server.pids("auth")) - before)
        asking.send(json.dumps(["", "", "", "alice", "secret"]).encode())
        assert json.loads(asking.recv(9999))[:2] == ["ok", "alice"]
        eventually(lambda: not before & set(server.pids("auth")))
        assert "request refused" not in server.log()


def test_sleepers_for_whom_a_reload_leaves_no_room_are_awake_afterwards():
    limits = "service imap-hibernate {\n process_limit = 1\n client_limit = 30\n}"
    with Server(f"orphan_timeout = 3 s\n{limits}") as server:
        clients = many(server, ["alice"] * 30)
        eventually(lambda: server.held() == 30)
        configured = server.configuration.read_text()
        server.configuration.write_text(configured.replace("limit = 30", "limit = 10"))
        assert server.run("reload").returncode == 0
        eventually(lambda: (server.held(), server.held("imap")) == (10, 20))
        deliver_by_hand(server.home("alice"))
        for client in clients:
            client.until(r"^\* 1 EXISTS")


def test_a_reload_that_takes_longer_than_orphan_timeout_loses_nobody():
    """Of very many sessions the last must wait for long, which is no sign that nobody comes."""
    slowly = (
        "hold, late = hibernate.Keeper.hold, 0.1 * (hibernate.INHERIT in hibernate.os.environ)\n"
        "hibernate.Keeper.hold = lambda *arguments: (time.sleep(late), hold(*arguments))[1]"
    )
    with PatchedServer("orphan_timeout = 4 s", patch=slowly) as server:
        clients = many(server, ["alice"] * 60)
        eventually(lambda: server.held() == 60)
        old, start = set(server.pids("imap-hibernate")), time.monotonic()
        assert server.run("reload").returncode == 0
        eventually(lambda: not old & set(server.pids("imap-hibernate")))
        assert server.held() == 60 and not server.held("imap")
        assert time.monotonic() - start > 3
        deliver_by_hand(server.home("alice"))
        for client in clients:
            client.until(r"^\* 1 EXISTS")


def test_a_stop_that_comes_in_the_same_instant_as_a_reload_is_not_lost():
    with Server() as server, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(server.dir / "hibernate.run" / "master"))
        assert server.ask(b"status")  # so it has accepted the one before, too
        server.process.send_signal(signal.SIGSTOP)
        sock.send(b"reload")
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        server.process.wait(PATIENCE)
        assert re.search("(?s)reloading.*stopping", server.log())
        server.stop()


def test_a_reload_brings_listeners_in_and_out_and_refuses_a_port_in_use():
    with Server(allow="refused: ") as server, Imap(server, "alice") as client:
        base = server.configuration.read_text()
        opening = "inet_listener imap {"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            more = f"inet_listener more {{\n port = {port}\n }}\n {opening}"
            server.configuration.write_text(base.replace(opening, more))
            refused = server.run("reload")
            assert refused.returncode == 78 and str(port).encode() in refused.stderr, refused
            client.cmd("NOOP")
            assert Imap(server).greeting.startswith("* OK")
        assert server.run("reload").returncode == 0
        eventually(lambda: listening(port))
        assert Imap(port).greeting.startswith("* OK")
        shared = opening + "\n reuse_port = yes"
        server.configuration.write_text(base.replace(opening, shared) + FOUR)
        assert server.run("reload").returncode == 0
        eventually(lambda: len(listening(server.port)) == 4 and not listening(port))
        assert all(Imap(server).greeting.startswith("* OK") for _ in range(40))
        server.configuration.write_text(base.replace(opening, shared) + FOUR.replace("4", "2"))
        assert server.run("reload").returncode == 0
        eventually(lambda: len(listening(server.port)) == 2)
        assert all(Imap(server).greeting.startswith("* OK") for _ in range(40))
        server.configuration.write_text(f"base_dir = elsewhere\n{base}")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: re.search(r"refused: .*:1: base_dir can't change", server.log()))
        server.configuration.write_text(base)
        assert server.run("reload").returncode == 0
        eventually(lambda: len(listening(server.port)) == 1)
        assert all(Imap(server).greeting.startswith("* OK") for _ in range(40))
        client.cmd("NOOP")


@table("name", ["{}/notify", "@{}"])
def test_systemd_is_told_of_ready_reload_and_stop(name, tmp_path, monkeypatch):
    name = name.format(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        with Server(allow="refused: ") as server:
            assert systemd.recv(99) == b"READY=1"
            for text in (server.configuration.read_text(), "nonsense"):
                server.configuration.write_text(text)
                before = time.monotonic_ns() // 1000
                server.process.send_signal(signal.SIGHUP)
                kind, since = systemd.recv(99).split(b"\nMONOTONIC_USEC=")
                assert kind == b"RELOADING=1"
                assert before <= int(since) <= time.monotonic_ns() // 1000
                assert systemd.recv(99) == b"READY=1"  # of the next generation, or refused
            assert "refused: " in server.log()
        assert systemd.recv(99) == b"STOPPING=1"


def test_a_reload_refused_before_the_start_is_done_does_not_tell_systemd_that_it_is(
    tmp_path, monkeypatch
):
    patch = (
        "tick, hibernate.CHECK_TIME = hibernate.Master.tick, 0\n"
        "hibernate.Master.tick = lambda self: (self.settled or self.reload(), tick(self))"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with PatchedServer(patch=patch, allow="refused: ") as server:
            assert "refused: " in server.log()
        told = []
        while b"STOPPING=1" not in told:
            told.append(systemd.recv(99))
        assert told[0].startswith(b"RELOADING=1") and told.count(b"READY=1") == 1


def test_a_reload_makes_anew_what_was_removed_of_base_dir_and_loses_nobody():
    with Server() as server:
        sleeper, awake = Imap(server, "alice"), Imap(server, "bob")
        falls_asleep(server, "alice")
        shutil.rmtree(server.dir / "hibernate.run")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.run("who").returncode == 0)
        for client in (sleeper, awake, Imap(server, "alice")):
            client.cmd("NOOP")
        key = server.dir / "hibernate.run" / "key"
        key.rename(f"{key}.aside")
        key.write_bytes(b"another" * 9)
        assert server.run("reload").returncode == 0
        for client in (sleeper, awake, Imap(server, "alice")):
            client.cmd("NOOP")


def test_a_reload_that_could_not_open_its_log_or_its_directory_is_refused():
    with Server(allow="refused: ") as server, Imap(server, "alice") as client:
        base = server.configuration.read_text()
        server.configuration.write_text(base + "log_path = nowhere/log\n")
        refused = server.run("reload")
        assert refused.returncode == 78 and b"nowhere/log" in refused.stderr, refused
        server.configuration.write_text(base)
        (server.dir / "hibernate.run").rename(server.dir / "aside")
        (server.dir / "hibernate.run").touch()
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: re.search("refused: .*hibernate.run", server.log()))
        (server.dir / "hibernate.run").unlink()
        (server.dir / "aside").rename(server.dir / "hibernate.run")
        client.cmd("NOOP")
        assert server.run("reload").returncode == 0
        client.cmd("NOOP")


def test_a_systemd_that_does_not_listen_holds_up_neither_start_nor_stop(tmp_path, monkeypatch):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while other.sendto(b"x", name):
                    pass
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        with Server() as server:
            server.stop()


def test_a_reload_for_whose_inboxes_there_is_no_room_is_refused():
    patch = (
        "import errno, os, socket\n"
        "class Socket(socket.socket):\n"
        "    def bind(self, name):\n"
        "        if os.path.exists('full') and isinstance(name, str):\n"
        "            raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "        super().bind(name)\n"
        "socket.socket = Socket"
    )
    with PatchedServer(patch=patch, allow="refused: ") as server, Imap(server, "alice") as client:
        (server.dir / "full").touch()
        refused = server.run("reload")
        assert refused.returncode == 78 and b"No space" in refused.stderr, (refused, server.log())
        client.cmd("NOOP")
        (server.dir / "full").unlink()
        assert server.run("reload").returncode == 0
        client.cmd("NOOP")
        assert not list((server.dir / "hibernate.run").glob("trial*"))


def test_a_server_that_is_reloaded_before_it_is_ready_still_says_that_it_is():
    patch = "hibernate.Master.tick = lambda self: self.reload() if self.ready else None"
    patch = f"import os\nif hibernate.INHERIT not in os.environ: {patch}"
    with PatchedServer(patch=patch) as server:
        assert "reloading" in server.log()
        assert server.run("reload").returncode == 0
        assert server.ask(b"status")
        server.stop()
        assert server.process.stdout.read() == b""


def test_a_killed_master_that_is_started_again_finds_all_its_sleepers():
    users = [f"u{n}" for n in range(20)]
    with Server(users=users) as server:
        clients = many(server, users * 6)
        awake = Imap(server, "u0")
        eventually(lambda: server.held() == len(clients) + 1)
        before = set(server.processes())
        os.kill(server.process.pid, signal.SIGKILL)
        server.restart()
        eventually(lambda: not before & set(server.processes()), what=f"{server.processes()}")
        awake.cmd("SELECT INBOX")
        awake.cmd("LOGOUT")
        all_hear_their_mail(server, clients, users, 1)


def test_a_killed_master_that_nobody_starts_again_leaves_bye_and_no_process():
    with Server("orphan_timeout = 1 s") as server:
        sleepers, awake = many(server, ["alice"] * 300), Imap(server, "bob")
        eventually(lambda: server.held() >= 300)
        awake.send("a SELECT INBOX\r\n")
        os.kill(server.process.pid, signal.SIGKILL)
        for client in (*sleepers, awake):
            assert "* BYE" in client.ended()
        eventually(lambda: not server.processes(), what=f"{server.processes()}")
        server.process.wait(PATIENCE)
        Server.live.remove(server)


def test_the_crowd_of_the_readme_tells_what_it_hears():
    with Server() as server:
        arguments = ["crowd", "3", "alice", server.password, "--port", str(server.port)]
        # -S: the tools have to start where pytest is not installed.
        crowd = subprocess.Popen(
            [sys.executable, "-S", __file__, *arguments], stdout=subprocess.PIPE, text=True
        )
        with crowd:
            assert crowd.stdout.readline() == "3 sessions in IDLE\n"
            deliver_by_hand(server.home("alice"))
            assert any("heard: * 1 EXISTS" in line for line in crowd.stdout)
            server.run("kick", "alice")
            assert "heard: the end" in crowd.stdout.read()
        assert crowd.returncode == 0


class Chat(Server):
    """The chat of the README, exactly as it stands there, beside a copy of the file as NAME.py."""

    brand = "chat"

    def __init__(self, name):
        self.name = name
        super().__init__("hibernate_timeout = 100 msecs\n")

    def configure(self, settings, listener):
        self.wanted = free_port()
        [text] = re.findall(r"(?ms)^```python\n(.*?)^```", (HERE / "README.md").read_text())
        (self.dir / "chat.py").write_text(text.replace("from hibernate ", f"from {self.name} "))
        shutil.copy(PROGRAM, self.dir / f"{self.name}.py")
        port = f"service chat {{\n inet_listener chat {{\n port = {self.wanted}\n }}\n}}\n"
        self.configuration.write_text(settings + port)

    def command(self):
        return [sys.executable, "chat.py", str(self.configuration)]


@table("name", ["hibernate", "engine"])
def test_the_chat_of_the_readme_sleeps_wakes_and_survives_a_reload(name):
    people = ["ann", "bob", 'c"\t\u00fc']
    with Chat(name) as server, contextlib.ExitStack() as stack:
        connect = lambda: socket.create_connection(("127.0.0.1", server.port), PATIENCE)  # noqa
        sockets = [stack.enter_context(connect()) for _ in people]
        lines = [sock.makefile("r", encoding="utf-8") for sock in sockets]

        def say(number, text):
            sockets[number].sendall(f"{text}\n".encode())

        def all_hear(text):
            assert [file.readline() for file in lines] == [f"{text}\n"] * len(people)

        def all_asleep():
            eventually(lambda: len(server.who("chat-hibernate")) == len(people))
            return sorted((row["session"], row["user"]) for row in server.who())

        all_hear("Your name?")
        for number, person in enumerate(people):
            say(number, person)
            assert [lines[number].readline() for _ in people[: number + 1]] == [
                f"{other}: has entered\n" for other in people[: number + 1]
            ]
            for file in lines[:number]:
                assert file.readline() == f"{person}: has entered\n"
        first = all_asleep()
        say(0, "")  # is answered asleep
        assert lines[0].readline() == "\n" and len(server.who("chat-hibernate")) == len(people)
        say(1, "hello")
        all_hear("bob: hello")
        assert all_asleep() == first
        before = set(server.processes()) - {server.process.pid}
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: not before & set(server.processes()))
        assert all_asleep() == first
        say(2, "still here")
        all_hear(f"{people[2]}: still here")
        server.stop()
        all_hear("server: Server shutting down.")


def test_what_a_session_cuts_off_its_buffer_may_be_its_answer():
    patch = "def opened(self):\n yield bytearray(b'* OK hello\\r\\n')"
    with PatchedServer(patch=f"{patch}\nhibernate.ImapSession.opened = opened") as server:
        assert Imap(server).greeting == "* OK hello"


@table("half", ["", "import hibernate\n"])
def test_a_program_of_which_only_a_part_is_there_is_no_reason_to_end(half):
    """As a full disk leaves it: it does nothing, and so no mistake."""
    with Chat("hibernate") as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        server.allow = "refused: "
        file = sock.makefile("rw", encoding="utf-8")
        program = (server.dir / "chat.py").read_text()
        (server.dir / "chat.py").write_text(half)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "refused: " in server.log())
        (server.dir / "chat.py").write_text(program)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "reloading" in server.log())
        print("ann", file=file, flush=True)
        assert [file.readline() for _ in "12"] == ["Your name?\n", "ann: has entered\n"]


# ------------------------------------------------------------------------------------------------
# 7  Resources that run out
# ------------------------------------------------------------------------------------------------


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def next_descriptor(pid):
    """The number that the next one would get: with this as its limit there is none."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in itertools.count() if number not in used)


@contextlib.contextmanager
def limited(pid, what, value):
    """A soft limit of another process, for a while: prlimit(2)."""
    soft, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (soft, hard))


def test_a_full_disk_is_a_clear_no_and_leaves_nothing_behind():
    big = message("big", "x" * 300_000 + "\r\n")
    with Server(allow="OSError|OperationalError|logging|File too large") as server:
        client = Imap(server, "alice")
        client.cmd("SELECT INBOX")
        client.cmd("APPEND INBOX", literal=message("first"))
        [worker] = server.pids("imap")
        with limited(worker, resource.RLIMIT_FSIZE, 100_000):
            for _ in range(3):
                client.cmd("APPEND INBOX", "NO \\[OVERQUOTA\\]", literal=big)
            client.cmd("NOOP")
        assert not os.listdir(server.home("alice") / "tmp")
        client.cmd("APPEND INBOX", literal=big)
        assert "* 2 EXISTS" in client.cmd("SELECT INBOX")
        client.cmd("CREATE Work")
        client.cmd("STORE 2 +FLAGS (marked)")
        size = (server.home("alice") / "hibernate.sqlite3").stat().st_size
        refused = 0
        for limit in range(0, 2 * size, 4096):  # it fails at each of the transaction's writes
            with limited(worker, resource.RLIMIT_FSIZE, limit):
                if " OK " in client.cmd("MOVE 2 Work", "NO|OK")[-1]:
                    break
            assert "marked" in "".join(client.cmd("FETCH 2 FLAGS"))
            assert "(MESSAGES 0)" in client.cmd("STATUS Work (MESSAGES)")[0]
            refused += 1
        assert refused > 5
        client.cmd("SELECT Work")
        assert "marked" in "".join(client.cmd("FETCH 1 FLAGS"))
        client.cmd("MOVE 1 INBOX")
        client.cmd("SELECT INBOX")
        with limited(worker, resource.RLIMIT_FSIZE, 0):  # not even the index can be written
            client.cmd("APPEND INBOX", "NO", literal=message("third"))
            client.cmd("STORE 1 +FLAGS (kept)", "NO")
            made = client.cmd("CREATE Made", "OK|NO")[-1]
        assert (" OK " in made) == (server.home("alice") / ".Made").exists()
        client.cmd("STORE 1 +FLAGS (kept)")
        assert "* 2 EXISTS" in client.cmd("SELECT INBOX")


def test_without_descriptors_sessions_stay_where_they_are_and_nobody_spins():
    with Server(allow="Too many open files") as server:
        first = Imap(server, "alice")
        falls_asleep(server, "alice")
        [keeper] = [row["pid"] for row in server.who()]
        with limited(keeper, resource.RLIMIT_NOFILE, next_descriptor(keeper)):
            awake = Imap(server, "bob")
            tag = awake.idle()
            before, start = cpu_of(keeper), time.monotonic()
            select.select((), (), (), 1.0)  # of attempts to fall asleep
            assert cpu_of(keeper) - before < 0.2 * (time.monotonic() - start)
            assert rests_in(server, "bob") == ["imap"]
        first.cmd("NOOP")
        awake.done(tag)
        falls_asleep(server, "bob")
        [login] = server.pids("imap-login")
        with limited(login, resource.RLIMIT_NOFILE, next_descriptor(login)):
            waiting = Imap(server, greeting=False)
            before, start = cpu_of(login), time.monotonic()
            select.select((), (), (), 0.5)
            assert waiting.silent() and cpu_of(login) - before < 0.2 * (time.monotonic() - start)
        assert waiting.line().startswith("* OK")


NO_EPOLL = """
class Full:
    real = hibernate.select.epoll
    def __init__(self):
        self.real = self.real()
    def __getattr__(self, name):
        return getattr(self.real, name)
    def register(self, *arguments):
        raise OSError(28, "no watch is left")
hibernate.select.epoll = Full
"""


def test_a_keeper_that_epoll_refuses_a_sleeper_leaves_it_awake():
    with PatchedServer(patch=NO_EPOLL) as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        tag = client.idle()
        eventually(lambda: "stays awake" in server.log() and "was refused" in server.log())
        client.done(tag)
        client.idle()
        deliver_by_hand(server.home("alice"))
        client.until(r"^\* 1 EXISTS$")


def cpu_of(pid):
    """Seconds of CPU that a process has used."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_a_service_whose_processes_die_at_their_start_is_throttled_and_the_others_live_on():
    allow = "Traceback|FileNotFoundError|SIGKILL|status 1|no new process"
    with PatchedServer(patch="hibernate.THROTTLE = 1, 60", allow=allow) as server:
        sleeper = Imap(server, "alice")
        falls_asleep(server, "alice")
        key = server.dir / "hibernate.run" / "key"
        key.rename(f"{key}.aside")
        os.kill(server.pids("imap")[0], signal.SIGKILL)
        eventually(lambda: "no new process for 1 s" in server.log())
        before, start = cpu_of(server.process.pid), time.monotonic()
        eventually(lambda: "no new process for 2 s" in server.log())
        assert cpu_of(server.process.pid) - before < 0.2 * (time.monotonic() - start)
        assert server.log().count("status 1") == 2
        Path(f"{key}.aside").rename(key)
        assert Imap(server).greeting.startswith("* OK")
        sleeper.cmd("NOOP")


def test_a_log_file_is_followed_and_one_that_can_not_be_opened_costs_nobody_a_session(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    with Server(f"log_path = {logs}/log") as server:
        (logs / "log").rename(logs / "log.1")
        Imap(server, "alice").cmd("LOGOUT")
        eventually(lambda: "alice" in (logs / "log").read_text())
        logs.rename(tmp_path / "aside")
        Imap(server, "bob").cmd("LOGOUT")
        eventually(lambda: "bob" in (tmp_path / "aside" / "log").read_text())
        server.stop()  # the master goes on, too


def test_a_service_that_may_not_see_the_log_file_still_writes_to_it(tmp_path):
    if os.geteuid():
        pytest.skip("only root can give a service a user")
    tmp_path.chmod(0o700)
    settings = f"log_path = {tmp_path}/log\nservice imap-login {{\n user = nobody\n}}"
    with Server(settings) as server:
        server.dir.chmod(0o711)
        Imap(server).cmd("LOGOUT")
        eventually(lambda: "imap-login" in (tmp_path / "log").read_text())


def test_a_fork_that_fails_again_and_again_leaves_no_descriptor_open(tmp_path):
    patch = (
        "import os; fork = os.fork; hibernate.THROTTLE = 0, 0\n"
        "def failing():\n"
        f"    return fork() if not os.path.exists({str(tmp_path / 'full')!r}) else os.open('', 0)\n"
        "os.fork = failing"
    )
    allow = "SIGKILL|fork:|no new process|no twin"
    with PatchedServer(patch=patch, allow=allow) as server, Imap(server, "alice") as client:
        falls_asleep(server, "alice")
        eventually(lambda: server.pids(TWIN))  # until then it has its keeper's title
        [keeper] = server.pids("imap-hibernate")
        parents = server.process.pid, keeper
        before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in parents]
        (tmp_path / "full").touch()
        for pid in server.pids("imap") + server.pids(TWIN):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: server.log().count("imap: fork: ") >= 3)
        eventually(lambda: server.log().count("no twin: ") >= 3)
        (tmp_path / "full").unlink()
        eventually(lambda: server.pids("imap") and server.pids(TWIN))
        after = [len(os.listdir(f"/proc/{pid}/fd")) for pid in parents]
        assert after[0] <= before[0] and after[1] <= before[1], (before, after)
        client.cmd("NOOP")


def test_a_sleeper_that_speaks_while_its_wake_is_refused_for_good_is_told():
    patch = (
        "read = hibernate.Service.read_record\n"
        "def reading(service, message):\n"
        "    record, state = read(service, message)\n"
        "    if service.role.name == 'imap' and not state.expires:\n"
        "        time.sleep(1)\n"
        "        raise ValueError('no')\n"
        "    return record, state\n"
        "hibernate.Service.read_record = reading"
    )
    with PatchedServer(patch=patch, allow="could not be moved|was refused") as server:
        client = Imap(server, "alice")
        client.cmd("SELECT INBOX")
        client.idle()
        falls_asleep(server, "alice")
        deliver_by_hand(server.home("alice"))
        time.sleep(0.3)
        client.send("DONE\r\n")
        assert client.line() == "* BYE Server is too busy, please log in again"


def test_a_process_that_dies_by_a_signal_without_a_name_is_logged_and_replaced():
    with Server(allow="status -40") as server:
        [before] = server.pids("imap")
        os.kill(before, 40)
        eventually(lambda: server.pids("imap") not in ([], [before]))
        assert f"process {before} ended: status -40" in server.log()


def test_a_keeper_that_fails_as_it_starts_is_throttled_too():
    broken = "hibernate.Keeper.spawn_twin, hibernate.THROTTLE = None, (1, 60)"
    allow = "Traceback|TypeError|status 1|no new"
    with PatchedServer(patch=broken, allow=allow) as server, Imap(server, "alice") as client:
        eventually(lambda: "no new process for 2 s" in server.log())
        assert server.log().count("status 1") == 2
        client.cmd("NOOP")


def test_an_overflow_of_the_event_queue_is_noticed():
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Server() as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        client.idle()
        falls_asleep(server, "alice")
        [keeper] = [row["pid"] for row in server.who()]
        os.kill(keeper, signal.SIGSTOP)
        other = Imap(server, "bob")
        other.cmd("NOOP")
        path = server.home("alice") / "new" / "here"
        for _ in range(limit // 2 + 100):  # each is two events
            path.touch()
            path.unlink()
        deliver_by_hand(server.home("alice"))
        os.kill(keeper, signal.SIGCONT)
        client.until(r"^\* 1 EXISTS$")


NO_INOTIFY = """
import ctypes
CLONE_NEWUSER = 0x10000000
assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0  # its limits are its own: user_namespaces(7)
with open("/proc/sys/user/max_inotify_instances", "w") as file:
    file.write("0")
"""


def test_without_inotify_the_slower_way_is_taken_and_said_once():
    patch, libc = "hibernate.Watcher.POLL = 0.5", ctypes.CDLL(None)
    with contextlib.ExitStack() as stack:
        if subprocess.call([sys.executable, "-c", NO_INOTIFY], stderr=subprocess.DEVNULL) == 0:
            patch += NO_INOTIFY
        else:  # without namespaces: all that this user may have
            while (fd := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
                stack.callback(os.close, fd)
        server = stack.enter_context(PatchedServer(patch=patch))
        client = stack.enter_context(Imap(server, "alice"))
        client.cmd("SELECT INBOX")
        client.idle()
        falls_asleep(server, "alice")
        deliver_by_hand(server.home("alice"))
        client.until(r"^\* 1 EXISTS$")
        falls_asleep(server, "alice")
        assert 1 <= server.log().count("inotify: ") <= 2  # once in each process that watches


def test_a_folder_that_has_vanished_is_not_taken_for_a_lack_of_watches():
    patch = "hibernate.ImapSession.watch_dirs = ('new', 'vanished')"
    with PatchedServer(patch=patch) as server, Imap(server, "alice") as client:
        client.cmd("SELECT INBOX")
        client.done(client.idle())
        assert "inotify" not in server.log()


WORDS = [
    b"LOGIN", b"SELECT", b"INBOX", b"FETCH", b"1:*", b"(FLAGS)", b"BODY[]<0.5>", b"SEARCH", b"OR",
    b"NOT", b"((((", b"))", b"{3}", b"{3+}", b"{99999999999}", b"STORE", b"+FLAGS", b"(\\Seen a)",
    b"APPEND", b"IDLE", b"DONE", b"UID", b"COPY", b"LIST", b'""', b"*", b"%", b'"x', b"\x00",
    b"\xff\xfe", b"\r", b"\r\n", b"\n", b"RENAME", b"a/../b", b"STATUS", b"AUTHENTICATE", b"PLAIN",
    b"AGE=", b"&AAA-", b"CHARSET", b"UTF-8", b"HEADER.FIELDS", b"1,2,,3", b"4294967296", b"\t",
    b"ENABLE", b"CONDSTORE", b"MOVE", b"EXPUNGE", b"CREATE", b"DELETE", b"MODSEQ", b"[", b"]",
]


def nonsense(random):
    """Some commands of random words, bytes changed here and there."""
    lines = []
    for number in range(random.randrange(1, 6)):
        words = [b"t%d" % number] + random.choices(WORDS, k=random.randrange(1, 8))
        line = bytearray(b" ".join(words) + b"\r\n")
        for _ in range(random.choice((0, 0, 1, 3))):
            line[random.randrange(len(line))] = random.randrange(256)
        lines.append(bytes(line))
    return b"".join(lines)


def test_mutated_imap_on_both_sides_of_the_log_in_harms_nobody(server, user):
    seconds = float(os.environ.get("FUZZ_SECONDS", "2"))
    chance = random.Random(int(os.environ.get("FUZZ_SEED", "1")))
    witness = Imap(server, next(server.fresh))
    services = ("imap-login", "imap", "auth")
    before = {service: server.pids(service) for service in services}
    held = [descriptors(pid) for pids in before.values() for pid in pids]
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with Imap(server, chance.choice(("", user))) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(3):
                    client.send(nonsense(chance))
                    select.select([client.socket], (), (), chance.choice((0, 0, 0.02)))
        rounds += 1
    witness.cmd("NOOP")
    assert rounds > 20
    assert {service: server.pids(service) for service in services} == before
    eventually(lambda: not [x for x in server.who() if x["user"] == user])

    def given_back():
        now = [descriptors(pid) for pids in before.values() for pid in pids]
        return all(count <= start + 30 for count, start in zip(now, held))  # cached indexes

    eventually(given_back)


def test_the_clock_jumps_and_nobody_notices():
    jumping = (
        "import os; real = time.time; time.time = lambda: "
        "real() + float(os.path.exists('offset') and open('offset').read())"
    )
    with PatchedServer("imap_idle_notify_interval = 1 s", patch=jumping) as server:
        resting, listening = Imap(server, "alice"), Imap(server, "alice")
        resting.cmd("SELECT INBOX")
        listening.cmd("SELECT INBOX")
        listening.idle()
        eventually(lambda: server.held() == 2)
        for seconds in (86400 * 365, -7200):
            (server.dir / "offset.new").write_text(str(seconds))
            (server.dir / "offset.new").rename(server.dir / "offset")
            for _ in range(2):
                listening.until(r"^\* OK Still here")
            Imap(server, "bob").cmd("LOGOUT")  # a log-in's ticket is neither late nor early
        assert server.held() == 2
        resting.cmd("NOOP")
        resting.socket.close()
        listening.socket.close()


# ------------------------------------------------------------------------------------------------
# 8  IMAP: what is said, what must be answered, and what mailbox.Maildir sees afterwards
# ------------------------------------------------------------------------------------------------

MULTIPART = (
    b"From: \"Dora\" <dora@example.org>\r\nTo: a@example.org, b@example.org\r\n"
    b"Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\nDate: Tue, 8 Feb 1994 10:00:00 +0000\r\n"
    b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"xx\"\r\n\r\n"
    b"--xx\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\nfirst part\r\n"
    b"--xx\r\nContent-Type: application/octet-stream; name=\"b.bin\"\r\n"
    b"Content-Transfer-Encoding: base64\r\n\r\nAAEC\r\n--xx--\r\n"
)

# (command, what its answer must match, in any order); a leading "!" says: NO, "?" says: BAD,
# "~": no such line. Each row goes on where the last has ended.
TRANSCRIPT = [
    ("CAPABILITY", [r"^\* CAPABILITY .*\bIMAP4rev1\b.*\bIDLE\b"]),
    ("NOOP", []),
    ("ID NIL", [r"^\* ID "]),
    ('ID ("name" "test" "version" "1")', [r"^\* ID "]),
    ("NAMESPACE", [r'^\* NAMESPACE \(\("" "[./]"\)\) NIL NIL$']),
    ('LIST "" ""', [r'^\* LIST \(.*\\Noselect.*\) "[./]" ""$']),
    ('LIST "" "*"', [r'^\* LIST \(.*\) "[./]" "?INBOX"?$', r'^\* LIST \(.*\) "[./]" "?Work"?$']),
    ('LIST "" "%"', [r"INBOX", r"Work", r"~Deep"]),
    ('LIST "" "W%"', [r"Work", r"~INBOX"]),
    ('LIST "" "inb%"', [r"INBOX", r"~Work"]),
    ('LIST "" "nothing*"', [r"~LIST"]),
    ('LSUB "" "*"', []),
    ("STATUS INBOX (MESSAGES UNSEEN UIDNEXT UIDVALIDITY RECENT)",
     [r"^\* STATUS \"?INBOX\"? \(.*MESSAGES 3\b", r"UNSEEN 2\b", r"UIDNEXT 4\b"]),
    ("FETCH 1 FLAGS", ["?"]),
    ("STORE 1 FLAGS ()", ["?"]),
    ("EXAMINE INBOX", [r"^\* 3 EXISTS$", r"^\w+ OK \[READ-ONLY\]"]),
    ("STORE 1 +FLAGS (\\Flagged)", ["!"]),
    ("SELECT INBOX",
     [r"^\* FLAGS \(.*\\Seen", r"^\* 3 EXISTS$", r"^\* \d RECENT$", r"^\* OK \[UIDVALIDITY \d+\]",
      r"^\* OK \[UIDNEXT 4\]", r"^\* OK \[PERMANENTFLAGS \(.*\\\*\)\]", r"^\w+ OK \[READ-WRITE\]"]),
    ("FETCH 1:* FLAGS", [r"^\* 1 FETCH \(FLAGS \(.*\\Seen", r"^\* 3 FETCH \(FLAGS \("]),
    ("FETCH 1:* (UID RFC822.SIZE)",
     [r"^\* 1 FETCH \(UID 1 RFC822.SIZE \d+\)$", r"^\* 3 FETCH \(UID 3 "]),
    ("FETCH 1 ENVELOPE",
     [r'ENVELOPE \("Mon, 7 Feb 1994 21:52:25 -0800" "one" \(\(NIL NIL "carol" "example.org"\)\) ']),
    ("FETCH 2 BODYSTRUCTURE",
     [r'(?i)BODYSTRUCTURE \(\("TEXT" "PLAIN" \("CHARSET" "us-ascii"\).*"MIXED"']),
    ("FETCH 2 BODY", [r'(?i)BODY \(\("text" "plain".*"octet-stream".*"base64" 4.* "mixed"\)']),
    ("FETCH 2 BODY.PEEK[1]", [r"BODY\[1\] \{10\}\r\nfirst part\)$"]),
    ("FETCH 2 BODY.PEEK[2.MIME]", [r"(?s)BODY\[2.MIME\] \{\d+\}\r\nContent-Type: application"]),
    ("FETCH 2 BODY.PEEK[]<0.6>", [r'BODY\[\]<0> (\{6\}\r\nFrom: |"From: ")\)']),
    ("FETCH 2 BODY.PEEK[HEADER.FIELDS (Date)]", [r"(?s)\}\r\nDate: Tue, 8 Feb.*\r\n\r\n\)$"]),
    ("FETCH 2 BODY.PEEK[HEADER.FIELDS.NOT (Date)]", [r"(?s)Subject", r"~Date: "]),
    ("FETCH 2 BODY.PEEK[HEADER.FIELDS (X {4+}\r\nDate)]",
     [r"FIELDS \(X DATE\)\] \{\d+\}\r\nDate: "]),
    ("FETCH 2 BODY.PEEK[TEXT]", [r"(?s)\}\r\n--xx\r\n.*--xx--"]),
    ("FETCH 2 RFC822.HEADER", [r"(?s)RFC822.HEADER \{\d+\}\r\nFrom: "]),
    ("FETCH 2 FLAGS", [r"~Seen"]),
    ("FETCH 3 FAST", [r"FLAGS \(", r'INTERNALDATE "[ \d]\d-\w{3}-\d{4} ', r"RFC822.SIZE"]),
    ("FETCH 3 BODY[TEXT]", [r"(?s)three\r\n", r"FLAGS \(.*\\Seen"]),
    ("UID FETCH 2:3 (FLAGS)", [r"^\* 2 FETCH \((?=.*UID 2)", r"^\* 3 FETCH \((?=.*UID 3)"]),
    ("UID FETCH 99 FLAGS", [r"~FETCH \("]),
    ("STORE 2 +FLAGS (\\Flagged $Label1)", [r"^\* 2 FETCH \(.*\\Flagged.*"]),
    ("FETCH 2 FLAGS", [r"\$Label1"]),
    ("STORE 2 -FLAGS.SILENT (\\Flagged)", [r"~FETCH"]),
    ("UID STORE 3 FLAGS (\\Draft \\Seen)", [r"^\* 3 FETCH \((?=.*UID 3)(?=.*\\Draft)"]),
    ("SEARCH ALL", [r"^\* SEARCH 1 2 3$"]),
    ("SEARCH UNSEEN", [r"^\* SEARCH 2$"]),
    ("SEARCH KEYWORD $Label1", [r"^\* SEARCH 2$"]),
    ('SEARCH FROM "dora"', [r"^\* SEARCH 2$"]),
    ("SEARCH OR SUBJECT one BODY three", [r"^\* SEARCH 1 3$"]),
    ("SEARCH NOT (SEEN) 1:*", [r"^\* SEARCH 2$"]),
    ("SEARCH 99,3,1:1,3:2", [r"^\* SEARCH 1 2 3$"]),
    ("SEARCH " + "NOT " * 240 + "SEEN", [r"^\* SEARCH 1 3$"]),
    ("SEARCH SENTSINCE 8-Feb-1994 SENTBEFORE 9-Feb-1994", [r"^\* SEARCH 2$"]),
    ("SEARCH LARGER 100000", [r"^\* SEARCH$"]),
    ("UID SEARCH UID 2:*", [r"^\* SEARCH 2 3$"]),
    ("SEARCH CHARSET KLINGON ALL", [r"!\[BADCHARSET"]),
    ("COPY 1:2 Work", [r"OK|COPYUID \d+ 1:2 1:2"]),
    ("COPY 1 Nowhere", [r"!\[TRYCREATE\]"]),
    ("UID COPY 3 Work", []),
    ("STATUS Work (MESSAGES)", [r"\(MESSAGES 3\)"]),
    ("STORE 1 +FLAGS (\\Deleted)", [r"\\Deleted"]),
    ("UID EXPUNGE 2", [r"~EXPUNGE$|\* 1"]),
    ("EXPUNGE", [r"^\* 1 EXPUNGE$"]),
    ("FETCH 1:* UID", [r"^\* 1 FETCH \(UID 2\)$", r"^\* 2 FETCH \(UID 3\)$"]),
    ("STORE 2 +FLAGS (\\Deleted)", []),
    ("UNSELECT", [r"~EXPUNGE"]),
    ("SELECT INBOX", [r"^\* 2 EXISTS$", r"UIDNEXT 4"]),
    ("CLOSE", [r"~EXPUNGE"]),
    ("SELECT INBOX", [r"^\* 1 EXISTS$", r"UIDNEXT 4"]),
    ("SELECT Work", [r"^\* 3 EXISTS$"]),
    ("SELECT Nowhere", ["!"]),
    ("FETCH 1 FLAGS", ["?"]),  # a failed SELECT leaves nothing selected
    ("SELECT inbox", [r"^\* 1 EXISTS$"]),
    ("FETCH 5 FLAGS", ["[?!]"]),
    ("IDLE NOW", ["?"]),
    ("LOGIN a b", ["?"]),
]  # fmt: skip


@fixture(scope="module")
def transcript(server):
    """A user's Maildir and the client that goes through TRANSCRIPT."""
    user = next(server.fresh)
    box = server.maildir(user)
    for flags, data in (("S", message("one")), ("", MULTIPART), ("", message("two", "three\r\n"))):
        entry = mailbox.MaildirMessage(data)
        entry.set_subdir("cur")
        entry.set_flags(flags)
        name = f"{len(box) + 1}.P1.example:2,{flags}"
        Path(server.home(user), "cur", name).write_bytes(data)
    box.add_folder("Work")
    with Imap(server, user) as client:
        client.user = user
        yield client


@table("number", range(len(TRANSCRIPT)))
def test_transcript(transcript, number):
    command, patterns = TRANSCRIPT[number]
    expect = {"!": "NO", "?": "BAD"}.get(patterns[0][0] if patterns else "", "OK")
    if patterns and patterns[0].startswith("["):
        expect = ""
    lines = transcript.cmd(command, expect)
    said = "\n".join(lines)
    for pattern in (x.lstrip("!?") for x in patterns if not x.startswith("[?")):
        if pattern.startswith("~"):
            assert not re.search(pattern[1:], "\n".join(lines[:-1]), re.MULTILINE), said
        else:
            assert re.search(pattern, said, re.MULTILINE | re.DOTALL), (pattern, said)


def test_the_maildir_after_the_transcript_is_what_mutt_would_see(transcript, server):
    box = server.maildir(transcript.user)
    [entry] = list(box)
    assert entry.get_flags() == "" and entry.get_payload()[0].get_payload().strip() == "first part"
    work = {entry["Subject"]: entry.get_flags() for entry in box.get_folder("Work")}
    assert work == {"one": "S", "=?utf-8?q?gr=C3=BC=C3=9Fe?=": "", "two": "DS"}
    assert not list(server.home(transcript.user).glob("**/tmp/*"))


def test_what_the_auditors_tripped_over_is_answered_as_dovecot_does(server, user):
    for number in range(3):
        server.maildir(user).add(message(str(number)))
    with Imap(server, user) as client, Imap(server, user) as other:
        client.cmd("CREATE INBOX.work")
        client.cmd("CREATE x")
        for pattern in ("*.work", "%.work", "inbox.work"):
            assert "INBOX.work" in "".join(client.cmd(f'LIST "" {pattern}')), pattern
        assert "INBOX" not in "".join(client.cmd('LIST "" ' + "*a" * 20000))
        client.cmd("SUBSCRIBE x")
        assert client.cmd('LSUB "" *')[:-1] == ['* LSUB () "." x']
        client.cmd("APPEND x ($Label)", literal=b"Subject: a\r\n\r\n")
        client.cmd("SELECT INBOX")
        client.cmd("STORE 1 FLAGS ($label)")
        for text in ("STORE 1 +FLAGS (%s)", "APPEND INBOX (%s) {3+}\r\nabc"):
            client.cmd(text % ("k" * 101), r"NO \[LIMIT\]")
        client.cmd("UID COPY 1 x")
        told = "".join(client.cmd("FETCH 1:3 MODSEQ"))
        highest = max(map(int, re.findall(r"MODSEQ \((\d+)", told)))
        assert not client.cmd(f"FETCH 1:3 (BODY[]) (CHANGEDSINCE {highest})")[:-1]
        other.cmd("SELECT INBOX")
        other.cmd("STORE 2 +FLAGS (\\Deleted)")
        other.cmd("EXPUNGE")
        assert "* 2 EXPUNGE" in client.cmd("COPY 1:3 x", "NO \\[EXPUNGEISSUED\\]")
        assert client.cmd("COPY 1:2 x")[-1].count("COPYUID") == 1
        client.cmd("SELECT x")
        assert "$label" not in "".join(client.cmd("FETCH 1:* FLAGS"))  # one spelling: $Label
        client.cmd("STORE 1:* -FLAGS ($LABEL)")
        assert client.cmd("SEARCH KEYWORD $label")[0] == "* SEARCH"
        assert "MODSEQ" not in client.cmd('SEARCH OR ALL SUBJECT "x modseq"')[0]
        client.cmd("RENAME x y")
        client.cmd("DELETE y")
        client.cmd("NOOP")
        client.cmd("RENAME INBOX INBOX.old")
        assert "* 2 EXISTS" in client.cmd("SELECT INBOX.old")
        other.cmd("DELETE INBOX.old")
        client.cmd("DELETE INBOX.work")
        client.send("x NOOP\r\n")
        assert "* BYE" in client.ended()


def test_append_keeps_bytes_flags_and_date(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        data = message("appended", "a\r\n.\r\n\x80" * 100)
        done = client.cmd(
            'APPEND INBOX (\\Seen \\Flagged) "17-Jul-1996 02:44:25 -0700"', literal=data
        )
        assert "* 1 EXISTS" in done + client.cmd("NOOP")
        [line, _] = client.cmd("FETCH 1 (FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])")
        assert f"RFC822.SIZE {len(data)}" in line and data.decode() in line
        assert "\\Seen" in line and "\\Flagged" in line
        date = re.search(r'INTERNALDATE "(.*?)"', line)[1]
        assert imaplib.Internaldate2tuple(f'INTERNALDATE "{date}"'.encode())[:5] == time.localtime(
            837596665
        )[:5]
        [entry] = list(server.maildir(user))
        assert sorted(entry.get_flags()) == ["F", "S"]
        client.cmd("APPEND Nowhere {3+}\r\nabc", r"NO \[TRYCREATE\]")


@table("text", ["APPEND Nowhere", "APPEND INBOX {1+}\r\nx", "APPEND INBOX (\\Wrong)", "FROB",
                "FETCH 1", "SELECT {0+}\r\nx", "APPEND {5+}\r\nINBOX x"])
def test_a_literal_that_comes_with_a_refused_command_is_never_executed(server, user, text):
    with Imap(server, user) as client:
        client.cmd(f"{text} {{12+}}\r\nz CREATE Z\r\n", "NO|BAD")
        assert client.cmd('LIST "" Z')[:-1] == [] == client.cmd("NOOP")[:-1]


def test_uids_stay_and_uidvalidity_with_them_whatever_is_renamed(server, user):
    home = three_messages(server, user)
    with Imap(server, user) as client:
        first = client.cmd("SELECT Work")
        before = client.cmd("FETCH 1:* UID")[:-1]
        for name in list((home / ".Work" / "cur").iterdir()):
            name.rename(name.with_name(name.name.partition(":")[0] + ":2,FRS"))
        client.cmd("UNSELECT")
        again = client.cmd("SELECT Work")
        assert client.cmd("FETCH 1:* UID")[:-1] == before
        validity = [x for x in first if "UIDVALIDITY" in x]
        assert validity and validity == [x for x in again if "UIDVALIDITY" in x]
        assert client.cmd("SEARCH FLAGGED ANSWERED")[0] == "* SEARCH 1 2 3"


def test_two_sessions_of_one_mailbox_see_each_other_in_order(server, user):
    home = three_messages(server, user)
    with Imap(server, user) as one, Imap(server, user) as two:
        one.cmd("SELECT Work")
        two.cmd("SELECT Work")
        one.cmd("STORE 1,3 +FLAGS.SILENT (\\Deleted)")
        said = two.cmd("NOOP")
        assert len([x for x in said if "\\Deleted" in x]) == 2
        gone = (["* 1 EXPUNGE", "* 2 EXPUNGE"], ["* 3 EXPUNGE", "* 1 EXPUNGE"])
        assert one.cmd("EXPUNGE")[:2] in gone
        assert not any("EXPUNGE" in x for x in two.cmd("FETCH 2 FLAGS", ""))  # RFC 3501 7.4.1
        assert not any(x.endswith("EXPUNGE") for x in two.cmd("SEARCH ALL", ""))
        assert [x for x in two.cmd("NOOP") + two.cmd("NOOP") if "EXPUNGE" in x] in gone
        assert two.cmd("SEARCH ALL")[0] == "* SEARCH 1"
        assert len(list((home / ".Work" / "cur").iterdir())) == 1


def test_who_listens_to_a_mailbox_whose_index_is_busy_does_not_hold_up_the_others():
    with Server("imap_hibernate_timeout = 0") as server:
        clients, other = many(server, ["alice"] * 3), Imap(server, "bob")
        index = sqlite3.connect(
            server.home("alice") / "hibernate.sqlite3", isolation_level=None)
        index.execute("BEGIN IMMEDIATE")
        deliver_by_hand(server.home("alice"))
        start, count = time.monotonic(), 0
        while time.monotonic() < start + 2:
            other.cmd("NOOP")
            count += 1
        index.execute("ROLLBACK")
        index.close()
        for client in clients:
            client.until(r"^\* 1 EXISTS$")
            client.close()
        assert count > 30


def test_of_several_processes_that_look_at_once_one_writes(hibernate, tmp_path):
    home = str(tmp_path)
    box = hibernate.Index.at(home).by_name("INBOX")
    index, file = hibernate.Index.at(home), os.stat(tmp_path / "hibernate.sqlite3")
    other = hibernate.Index(home, file.st_ino)  # another process's
    deliver_by_hand(tmp_path)
    seen = eventually(lambda: (found := index.refresh(box)).new > 0 and found)
    stamp, mark = index.number("SELECT stamp FROM last"), os.stat(tmp_path / "hibernate.uids")
    assert other.refresh(box) == seen  # the row is from before, as if they had waited for the lock
    assert other.number("SELECT stamp FROM last") == stamp
    assert os.stat(tmp_path / "hibernate.uids").st_mtime_ns == mark.st_mtime_ns
    assert other.refresh(box, claim=True).recent == 1  # nobody has been told of the message
    assert index.refresh(seen, claim=True).recent == 2
    hibernate.open_index.cache_clear()


def test_a_busy_index_is_waited_for_but_not_for_long(server, user):
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        path = server.home(user) / "hibernate.sqlite3"
        lock = sqlite3.connect(path, isolation_level=None)
        for mode in ("IMMEDIATE", "EXCLUSIVE"):  # writing, and in its commit
            lock.execute(f"BEGIN {mode}")
            client.cmd("CREATE Work", r"NO \[INUSE\]")
            client.send("x CREATE Work\r\n")
            time.sleep(0.05)
            lock.execute("ROLLBACK")
            client.until("^x OK")
            client.cmd("DELETE Work")
        lock.close()


def test_pythons_imaplib_is_served(server, user):
    server.maildir(user).add(message("for imaplib"))
    with imaplib.IMAP4("127.0.0.1", server.port, timeout=PATIENCE) as client:
        client.login(user, server.password)
        assert client.select()[1] == [b"1"]
        assert b"for imaplib" in client.fetch("1", "(RFC822)")[1][0][1]
        assert client.append("INBOX", None, None, message())[0] == "OK"
        assert client.uid("SEARCH", "ALL")[1] == [b"1 2"]
        assert client.store("1", "+FLAGS", "\\Deleted")[0] == "OK"
        assert client.expunge()[1] == [b"1"]
        client.close()


def test_a_large_message_is_streamed_while_others_are_served(server, user):
    server.maildir(user).add(message("large", "x" * 78 + "\r\n" + "0123456789\r\n" * 1_000_000))
    with Imap(server, user) as slow, Imap(server, user) as other:
        slow.cmd("SELECT INBOX")
        slow.send("x FETCH 1 BODY.PEEK[]\r\n")
        for _ in range(20):
            other.cmd("NOOP")
        assert all(proc_bytes(pid, "Rss") < 100 * 2**20 for pid in server.pids("imap"))
        assert slow.until("^x OK")[-2].endswith(")")


def test_of_many_large_messages_one_at_a_time_is_in_memory():
    with Server() as server, Imap(server, "alice") as client:
        home = server.maildir("alice")
        first = Path(home._path, "cur", "0.P1.example:2,")
        first.write_bytes(message("large", "0123456789\r\n" * 400_000))
        for number in range(1, 40):
            os.link(first, first.with_name(f"{number}.P1.example:2,"))
        client.cmd("SELECT INBOX")
        [worker] = server.pids("imap")
        before = proc_bytes(worker, "Rss")
        assert len(client.cmd("FETCH 1:* BODY.PEEK[]<0.1>")) == 41
        assert proc_bytes(worker, "Rss") - before < 40 * 2**20


@table("start, unit", [("", "a:\n"), ("Content-Type: text/plain", "; a=b")])
def test_a_header_of_any_size_takes_bounded_time_and_memory(server, user, start, unit):
    repeated = f"MIME-Version: 1.0\n{start}" + unit * (8_000_000 // len(unit))
    Path(server.maildir(user)._path, "cur", "1.P1.example:2,").write_text(repeated + "\n\nx\n")
    with Imap(server, user) as client:
        client.cmd("SELECT INBOX")
        before = sum(proc_bytes(pid, "Rss") for pid in server.pids("imap"))
        client.cmd("FETCH 1 (ENVELOPE BODYSTRUCTURE BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
        after = sum(proc_bytes(pid, "Rss") for pid in server.pids("imap"))
        assert after - before < 220 * 2**20


def test_a_list_pattern_that_takes_long_leaves_the_others_their_turns():
    with Server() as server, Imap(server, "alice") as client, Imap(server, "bob") as other:
        for number in range(400):
            server.maildir("alice").add_folder("a" * 230 + str(number))
        client.send('x LIST "" ' + "*a" * 115 + "b\r\n")
        for _ in range(3):
            other.cmd("NOOP")
        assert client.silent()
        assert client.line().startswith("x OK")


def test_a_search_decodes_a_text_once_however_many_keys_ask_for_it(hibernate, monkeypatch):
    calls = []
    monkeypatch.setattr(hibernate, "decoded", lambda *given: calls.append(given) or "Text")
    mail = hibernate.Message(MULTIPART)
    for _ in range(250):
        assert mail.header_text("Subject") == "Text"
        assert "text" in mail.text(False) and "subject" in mail.text(True)
    assert len(calls) < 10


def test_one_session_has_the_process_for_a_moment_however_dear_its_chunks_are(hibernate):
    """Not measured by time: each chunk takes longer than a turn."""
    turns = []

    class Dear(hibernate.Session):
        user = "u"

        def step(self):
            return self.reply()

        def reply(self):
            for _ in range(10):
                time.sleep(1.2 * hibernate.TURN_TIME)
                turns.append("chunk")
                yield b""

    class Home(hibernate.Client):
        def clock(self):
            turns.append("others")

    ours, theirs = socket.socketpair()
    loop = hibernate.Loop()
    with ours, theirs:
        client = Home(argparse.Namespace(loop=loop), ours, Dear())
        client.pump()
        for _ in range(2):  # and it goes on from the loop
            [(key, mask)] = loop.selector.select(0)
            assert mask == hibernate.WRITE
            key.data(key.fd, mask)
        assert turns == ["chunk", "others"] * 3
    loop.close()


def test_a_search_in_texts_is_short_and_its_memory_bounded(hibernate):
    parser = hibernate.Parser(b" TEXT a" * 25, None)
    parser.search()
    for keys in (b" TEXT a" * 26, b" OR BODY a BODY b" * 12 + b" (TEXT c) TEXT d", b" ALL" * 251):
        with pytest.raises(hibernate.BadCommand, match="many"):
            hibernate.Parser(keys, None).search()
    hibernate.Parser(b" ALL" * 250, None).search()
    parts = b"".join(b"--b\r\n\r\n%b\r\n" % (letter * 9 * 2**20) for letter in (b"x", b"y", b"z"))
    head = b"Subject: s\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
    text = hibernate.Message(head + parts + b"--b--\r\n").text(False)
    assert text.count("x") == 9 * 2**20 and "y" in text and "z" not in text
    assert len(text) < hibernate.TEXT_LIMIT + 100


def test_a_word_in_a_string_makes_no_client_one_that_knows_modseqs(server, user):
    with Imap(server, user) as client:
        server.maildir(user).add(message())
        client.cmd("SELECT INBOX")
        client.cmd('SEARCH SUBJECT "x modseq y" NOT FROM "(condstore)"')
        client.send("x SEARCH SUBJECT {10+}\r\na modseq b\r\n")
        client.until("^x OK")
        assert "MODSEQ" not in "".join(client.cmd("STORE 1 +FLAGS (\\Flagged)"))
        client.cmd("SEARCH KEYWORD \\Seen", "BAD")
        client.cmd('SEARCH MODSEQ "/flags/\\\\Seen" all 5')
        assert "MODSEQ" in "".join(client.cmd("STORE 1 +FLAGS (\\Seen)"))


def test_a_refusal_costs_the_same_for_each_user_and_for_none(hibernate, monkeypatch, tmp_path):
    spent, pbkdf2 = [], hashlib.pbkdf2_hmac
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", lambda name, given, salt, rounds: (
        spent.append(rounds) or pbkdf2(name, given, salt, rounds)))
    monkeypatch.setattr(hibernate.AuthSession, "users", {})
    entry = hibernate.encode_password
    lines = [f"u{rounds}:{entry('PBKDF2', 'right', b'salt', rounds)}\n" for rounds in (9, 999, 5000)]
    (tmp_path / "users").write_text("".join(lines) + "plain:{PLAIN}right\n")

    class Configured:
        passwd_file, folder, mail_location = f"{tmp_path}/users", str(tmp_path), "maildir:%u"

    session = hibernate.AuthSession()
    session.config = Configured()
    for name in ("u9", "u999", "u5000", "plain", "nobody"):
        spent.clear()
        assert session.log_in("i", "s", "r", name, "wrong") == []
        assert sum(spent) == 5000, name
    assert session.log_in("i", "s", "r", "u9", "right")[0] == "ok"


@table("stored, rounds", [
    ("{PBKDF2}$1$salt$5000$00", 5000), ("{PBKDF2}$1$salt$0005$00", 5), ("{PLAIN}$1$a$99$b", 0),
    ("{PBKDF2}$1$salt$5000", None), ("{PBKDF2}$1$salt$12345678$00", None),
    ("{PBKDF2}$1$salt$5000x$00", None), ("{PBKDF2}$1$salt$000$00", None), ("{PBKDF2}x", None),
])
def test_an_entry_that_no_password_could_fit_is_a_wrong_line(hibernate, stored, rounds):
    if rounds is None:
        with pytest.raises(ValueError):
            hibernate.read_secret(stored)
    else:
        assert hibernate.read_secret(stored)[0] == rounds


@table("name", ["a@", "a@.", "@x", "a@@b", ".a", "a@.b", "a..b", "a/b", "", "x" * 129])
def test_no_user_has_the_folder_above_all_users(hibernate, name):
    for place in ("maildir:mail/%d/%n", "maildir:mail/%n", "maildir:mail/%d"):
        config = argparse.Namespace(mail_location=place, folder="/srv")
        with pytest.raises(ValueError):
            hibernate.home_of(config, name)
    assert hibernate.home_of(config, "a.b+c@d.e").endswith("/mail/d.e")


def test_from_and_to_are_searched_as_the_envelope_has_them(server, user):
    """As imaptest's search-addresses: comments and white space within an address are no part."""
    with Imap(server, user) as client:
        for text in (b"From: <al (x)@ (y) example.org>\n", b"To: al@example.org (Al)\n",
                     b"Cc: a: \"b c\" <al @example.org>, x@y;\n", b"Bcc: <@z:al@example.org>\n"):
            server.maildir(user).add(text + b"\nbody\n")
        client.cmd("SELECT INBOX")
        for name in ("FROM", "TO", "CC", "BCC"):
            found = client.cmd(f"FETCH 1:* BODY.PEEK[HEADER.FIELDS ({name})]")
            number = next(x.split()[1] for x in found if "@" in x)
            assert client.cmd(f"SEARCH {name} al@EXAMPLE.org")[0] == f"* SEARCH {number}"
        assert client.cmd('SEARCH FROM "(x)@ (y)" CC "b c"')[0] == "* SEARCH"
        assert client.cmd('SEARCH OR FROM "(x)@ (y)" CC "b c"')[0].count(" ") == 3


def test_a_search_says_that_others_have_expunged(server, user):
    with Imap(server, user) as client, Imap(server, user) as other:
        for _ in range(3):
            server.maildir(user).add(message())
        for each in (client, other):
            each.cmd("SELECT INBOX")
        other.cmd("STORE 2 FLAGS (\\Deleted)")
        other.cmd("EXPUNGE")
        assert client.cmd("SEARCH ALL", r"OK \[EXPUNGEISSUED\]")[0] == "* SEARCH 1 3"
        assert client.cmd("UID SEARCH ALL", r"OK \[EXPUNGEISSUED\]")[1] == "* 2 EXPUNGE"
        assert client.cmd("SEARCH ALL", "OK Search")[0] == "* SEARCH 1 2"


def test_a_keyword_of_another_session_is_told_before_it_is_used(server, user):
    with Imap(server, user) as client, Imap(server, user) as other:
        server.maildir(user).add(message())
        for each in (client, other):
            each.cmd("SELECT INBOX")
        other.cmd("STORE 1 +FLAGS ($Label)")
        told = client.cmd("FETCH 1 (FLAGS BODY)")
        assert told[0].startswith("* FLAGS (") and "$Label" in told[0]
        assert "PERMANENTFLAGS" in told[1] and "$Label" in told[2]
        assert len(client.cmd("FETCH 1 FLAGS")) == 2


@table("name", ["rename", "link"])
def test_a_mailbox_on_another_file_system_takes_copies(hibernate, tmp_path, monkeypatch, name):
    """A folder may be a link to elsewhere: link(2) and rename(2) then fail with EXDEV."""
    real, home = getattr(os, name), str(tmp_path)

    def refuses(old, new):
        mailboxes = {os.path.dirname(os.path.dirname(path)) for path in (old, new)}
        if os.path.isfile(old) and len(mailboxes) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(old, new)

    monkeypatch.setattr(hibernate.os, name, refuses)
    index = hibernate.Index.at(home)
    index.create_folder("Archive")
    for number in (1, 2):
        path = tmp_path / "new" / deliver_by_hand(tmp_path, message(str(number)))
        os.utime(path, (number, number))
    inbox = index.refresh(index.by_name("INBOX"))
    index.store(inbox.id, [1], "+", "S", ["work"])
    assert index.copy(inbox, [1, 2], index.by_name("Archive"), name == "rename") == [(1, 1), (2, 2)]
    archive = index.refresh(index.by_name("Archive"))
    rows = index.rows(archive.id, [1, 2])
    assert [(row.flags, row.keywords) for row in rows] == [("S", "work"), ("", "")]
    for number, row in enumerate(rows, 1):
        path = tmp_path / ".Archive" / os.fsdecode(row.file)
        assert path.read_bytes() == message(str(number)) and path.stat().st_mtime == number
    left = index.rows(inbox.id, [1, 2]), hibernate.listing(os.fsencode(tmp_path))
    assert [len(x) for x in left] == ([0, 0] if name == "rename" else [2, 2])
    assert not list((tmp_path / ".Archive" / "tmp").iterdir())
    before = hibernate.listing(os.fsencode(tmp_path))
    with pytest.raises(ZeroDivisionError), index.transaction():
        index.take(os.fsencode(tmp_path), "", name == "rename", os.fsencode(path))
        1 / 0  # noqa: B018
    assert hibernate.listing(os.fsencode(tmp_path)) == before and path.exists()


def test_what_is_no_file_is_no_message(server, user):
    home = three_messages(server, user)
    (home / ".Work" / "cur" / "1.directory").mkdir()
    os.mkfifo(home / ".Work" / "new" / "2.fifo")
    (home / ".Work" / "new" / "3.loop").symlink_to("3.loop")
    (home / ".Work" / "new" / "4.dangling").symlink_to("nowhere")
    with Imap(server, user) as client:
        assert "* 3 EXISTS" in client.cmd("SELECT Work")
        assert len(client.cmd("FETCH 1:* BODY.PEEK[]")) == 4


def test_a_maildir_of_1970_is_read_as_any_other(server, user):
    home = three_messages(server, user)
    for part in ("new", "cur"):
        os.utime(home / ".Work" / part, (0, 0))
    with Imap(server, user) as client:
        assert "* 3 EXISTS" in client.cmd("SELECT Work")
        deliver_by_hand(home / ".Work")
        assert "* 4 EXISTS" in client.cmd("NOOP")


def test_an_index_restored_from_a_backup_gives_no_uid_twice(server, user):
    home = three_messages(server, user)

    def seen():
        with Imap(server, user) as client:
            said = "".join(client.cmd("SELECT Work"))
        return [int(re.search(rf"{what} (\d+)", said)[1]) for what in ("UIDVALIDITY", "UIDNEXT")]

    validity = seen()[0]
    for more in (1, 2):  # one lost transaction, then two
        copy = sqlite3.connect(home / "backup")
        sqlite3.connect(home / "hibernate.sqlite3").backup(copy)
        copy.close()
        for _ in range(more):
            deliver_by_hand(home / ".Work")
            before = seen()
        (home / "backup").replace(home / "hibernate.sqlite3")
        now = seen()
        assert before[0] == validity < now[0]
        validity = now[0]
    (home / "hibernate.uids").unlink()  # then nobody can tell
    assert validity <= seen()[0]


def test_a_backup_written_over_an_index_in_use_gives_no_uid_twice(server, user):
    home = three_messages(server, user)
    with Imap(server, user) as client:
        before = client.cmd("SELECT Work")
        index, copy = sqlite3.connect(home / "hibernate.sqlite3"), sqlite3.connect(":memory:")
        index.backup(copy)
        deliver_by_hand(home / ".Work")
        assert "* 4 EXISTS" in client.cmd("NOOP")
        client.cmd("STORE 4 +FLAGS (\\Deleted)")
        client.cmd("EXPUNGE")
        copy.backup(index)
        index.close()
        deliver_by_hand(home / ".Work")
        client.send("x NOOP\r\n")
        assert "* BYE" in client.ended()
    with Imap(server, user) as client:
        after = client.cmd("SELECT Work")
        validity = [re.findall(r"UIDVALIDITY (\d+)", "".join(said))[0] for said in (before, after)]
        assert int(validity[0]) < int(validity[1])


@table("asleep", [True, False])
@table("emptied", [True, False])
def test_an_index_deleted_under_a_session_ends_it_and_the_next_is_right(
    server, user, asleep, emptied
):
    home = three_messages(server, user)
    with Imap(server, user) as client:
        before = [x for x in client.cmd("SELECT Work") if "UIDVALIDITY" in x]
        if asleep:
            falls_asleep(server, user)
        if emptied:
            (home / "hibernate.sqlite3").write_bytes(b"")
        else:
            (home / "hibernate.sqlite3").unlink()
        client.send("x FETCH 1 FLAGS\r\n")
        assert "* BYE" in client.ended()
    with Imap(server, user) as client:
        again = client.cmd("SELECT Work")
        assert "* 3 EXISTS" in again and before and before != [x for x in again if "UIDVAL" in x]


@table("silent", ["", ".SILENT"])
def test_a_mailbox_deleted_under_a_session_ends_it_with_one_good_bye(server, user, silent):
    three_messages(server, user)
    with Imap(server, user) as client, Imap(server, user) as other:
        client.cmd("SELECT Work")
        other.cmd("DELETE Work")
        client.send(f"x STORE 1 +FLAGS{silent} (\\Seen)\r\n")
        assert client.ended().count("* BYE") == 1


@table("part", ["tmp", "new", "cur"])
def test_what_is_missing_of_a_maildir_is_made_again(server, user, part):
    home = three_messages(server, user)
    with Imap(server, user) as client:
        client.cmd("CREATE other")
        for folder in (home, home / ".Work"):
            shutil.rmtree(folder / part)
        client.cmd("DELETE other")
        client.cmd("CREATE another")
        client.cmd("SELECT INBOX")
        client.cmd("APPEND Work (\\Seen)", literal=message())
        assert f"* {1 if part == 'cur' else 4} EXISTS" in client.cmd("SELECT Work")


def test_what_fetch_computes_is_kept_and_told_again(server, user):
    home, items = three_messages(server, user), "(ENVELOPE BODYSTRUCTURE BODY RFC822.SIZE)"
    (home / ".Work" / "cur" / "2.P1.example:2,S").write_bytes(MULTIPART)
    with Imap(server, user) as client:
        client.cmd("SELECT Work")
        said = client.cmd(f"FETCH 1:* {items}")[:-1]
        for file in (home / ".Work" / "cur").iterdir():
            file.write_bytes(b"")
        client.cmd("STORE 2 +FLAGS.SILENT (\\Flagged)")
        assert client.cmd(f"FETCH 1:* {items}")[:-1] == said
        assert "Flagged" in client.cmd("FETCH 2 (FLAGS BODY)")[0]


@table("command", ["COPY 1 other", "STATUS other (MESSAGES)"])
def test_a_mailbox_deleted_while_another_is_selected_ends_no_session(
    server, user, hibernate, command, monkeypatch
):
    def deleted_at_once(index, name, *missing):
        box = by_name(index, name, *missing)
        if name == "other":
            index.delete_folder(name)
        return box

    by_name, session = hibernate.Index.by_name, hibernate.ImapSession()
    session.home = session.user = str(three_messages(server, user))
    monkeypatch.setattr(hibernate.Index, "by_name", deleted_at_once)
    for line, answer in (("SELECT Work", b"x OK"), ("CREATE other", b"x OK"), (command, b"x NO")):
        session.buffer += f"x {line}\r\n".encode()
        assert answer in b"".join(session.resume()) and not session.ended, line
    hibernate.open_index.cache_clear()


def test_no_query_reads_the_messages_of_other_mailboxes(server, user, hibernate):
    home, queries = three_messages(server, user), list[str]()
    session = hibernate.ImapSession()
    session.home = session.user = str(home)
    index = session.index
    index.db.set_trace_callback(queries.append)
    for command in ("SELECT Work", "STATUS Work (MESSAGES RECENT UNSEEN)", "STORE 1 +FLAGS (x)",
                    "FETCH 1 BODY", "COPY 1 INBOX", "STORE 2 FLAGS (\\Deleted)", "EXPUNGE"):
        session.buffer += f"x {command}\r\n".encode()
        assert b"x OK" in b"".join(session.resume()), command
    index.db.set_trace_callback(None)
    queries = [query for query in queries if query.startswith(("SELECT", "INSERT", "DELETE"))]
    plans = [index.all(f"EXPLAIN QUERY PLAN {query}") for query in queries]
    read = [row[3] for plan in plans for row in plan]
    assert len(read) > 20 and not re.search("SCAN (message|parsed|expunged)", "\n".join(read))
    hibernate.open_index.cache_clear()


def filled_index(hibernate, monkeypatch, home):
    """An index that agrees with its folders, INBOX with four messages and Work with none; scans
    of it count from here on."""
    monkeypatch.setattr(hibernate, "told_apart", lambda tmp: True)
    index, scans, scan = hibernate.Index.at(str(home)), [], hibernate.Index.scan
    index.create_folder("Work")
    for number in range(4):
        deliver_by_hand(home)
    for name in ("INBOX", "Work"):
        index.refresh(index.by_name(name))

    def counted(self, box):
        scans.append(box.name)
        return scan(self, box)

    monkeypatch.setattr(hibernate.Index, "scan", counted)
    return index, scans


def test_what_this_server_changes_in_a_folder_is_known_without_a_scan(
    hibernate, monkeypatch, tmp_path
):
    index, scans = filled_index(hibernate, monkeypatch, tmp_path)
    inbox, work = index.by_name("INBOX"), index.by_name("Work")
    index.store(inbox.id, [1, 2], "+", "S", ["word"])
    index.store(inbox.id, [1, 2], "+", "", ["other"])  # which renames nothing
    index.copy(inbox, [1, 2], work, move=False)
    index.copy(work, [2], work, move=False)
    index.copy(inbox, [1, 3], work, move=True)
    index.store(inbox.id, [4], "+", "T")
    with contextlib.closing(hibernate.Delivery(index.folder("Work"))) as delivery:
        delivery.write(b"x")
        delivery.finish()
        index.append(work.id, delivery, "S", [])
    for box in (inbox, work):
        index.refresh(index.by_id(box.id), claim=False)
    assert not scans
    index.expunge(inbox.id, [4])
    index.refresh(index.by_id(inbox.id))
    assert scans == ["INBOX"]  # by expunge() itself, which finds the times it knows
    query = "SELECT uid, file FROM message WHERE box = ? ORDER BY uid"
    for box, uids in (inbox, [2]), (work, [1, 2, 3, 4, 5, 6]):
        rows, found = index.all(query, box.id), hibernate.listing(index.folder(box.name))
        assert [uid for uid, _ in rows] == uids
        assert sorted(file for _, file in rows) == sorted(found.values())
    hibernate.open_index.cache_clear()


@table("when", ["before", "after"])
@table("act", ["rename", "to cur", "delete", "deliver", "move away", "nothing"])
def test_what_another_program_changes_while_this_server_does_is_seen(
    hibernate, monkeypatch, tmp_path, act, when
):
    index, scans = filled_index(hibernate, monkeypatch, tmp_path)
    index.store(1, [1, 2], "+", "S")
    rows = {row.uid: tmp_path / os.fsdecode(row.file) for row in index.rows(1, range(5))}

    def another(uid):
        path = Path(str(rows[uid]))
        if act in ("rename", "to cur"):
            path.rename(tmp_path / "cur" / f"{path.name.partition(':')[0]}:2,FS")
        elif act == "delete":
            path.unlink()
        elif act == "move away":
            path.rename(tmp_path / ".Work" / "new" / path.name)
        elif act == "deliver":
            deliver_by_hand(tmp_path)

    reflag = hibernate.reflag

    def disturbed(*arguments):
        victim = 4 if act == "to cur" else 2
        if when == "before":
            another(victim)
        file = reflag(*arguments)
        if when == "after":
            another(victim)
        return file

    monkeypatch.setattr(hibernate, "reflag", disturbed)
    index.store(1, [1], "+", "F")
    index.refresh(index.by_id(1))
    assert scans == ["INBOX"] * (act != "nothing")
    files = sorted(file for file, in index.all("SELECT file FROM message WHERE box = 1"))
    assert files == sorted(hibernate.listing(os.fsencode(tmp_path)).values())
    hibernate.open_index.cache_clear()


def test_two_workers_mutt_and_a_delivery_agent_share_a_mailbox_and_nothing_is_lost():
    """SHARE_SECONDS=60 does it for longer."""
    end = time.monotonic() + float(os.environ.get("SHARE_SECONDS", "3"))
    subjects = "BODY[HEADER.FIELDS (SUBJECT)]"
    with Server("imap_hibernate_timeout = 0\nservice imap {\nclient_limit = 1\n}") as server:
        home, told = server.home("alice"), {}
        server.maildir("alice").add_folder("Work")

        def agent():
            for number in itertools.count():
                if time.monotonic() > end:
                    break
                deliver_by_hand(home, message(f"mail{number}"))
                yield f"mail{number}"
                time.sleep(0.02)

        def mutt():
            """From new/ to cur/, and flags on and off: names change. It makes no message."""
            chance = random.Random(1)
            while time.monotonic() < end:
                for path in [*home.glob("new/*"), *home.glob("cur/*")][: chance.randrange(9)]:
                    base, _, info = path.name.partition(":2,")
                    flags = chance.choice(("S", "FS", "RS", info))
                    with contextlib.suppress(FileNotFoundError):
                        path.rename(home / "cur" / f"{base}:2,{flags}")
                time.sleep(0.01)
                yield from ()

        def reader(name):
            """A client that appends, flags and moves. What it is told of a UID never changes."""
            chance = random.Random(name)
            with Imap(server, "alice") as client:
                for number in itertools.count():
                    said = "".join(client.cmd("SELECT INBOX"))
                    validity = re.search(r"UIDVALIDITY (\d+)", said)[1]
                    moved = f"{chance.randrange(1, 99)}:{chance.randrange(1, 99)}"
                    for command in (
                        f"UID FETCH 1:* {subjects}", "STORE 1 +FLAGS (\\Flagged x)",
                        "UID STORE 1:* -FLAGS (\\Flagged)", f"UID MOVE {moved} Work", "NOOP",
                    ):  # fmt: skip
                        for line in client.cmd(command, "OK|NO|BAD"):
                            if found := re.search(r"UID (\d+) .*Subject: (\S+)", line, re.DOTALL):
                                known = told.setdefault((validity, found[1]), found[2])
                                assert known == found[2], (known, line)
                    if time.monotonic() > end:
                        break
                    subject = f"{name}{number}"
                    if " OK " in client.cmd("APPEND INBOX", "OK|NO", message(subject))[-1]:
                        yield subject

        with concurrent.futures.ThreadPoolExecutor() as pool:
            work = agent(), mutt(), reader("one"), reader("two")
            made = [*itertools.chain(*pool.map(list, work))]
        found = []
        with Imap(server, "alice") as client:
            for box in ("INBOX", "Work"):
                client.cmd(f"SELECT {box}")
                said = "".join(client.cmd(f"UID FETCH 1:* {subjects}", "OK|BAD"))
                found += re.findall(r"Subject: (\S+?)(?=\r|$)", said)
                flags = re.findall(r"FLAGS \((.*?)\)", "".join(client.cmd("UID FETCH 1:* FLAGS")))
                files = server.home("alice").glob("cur/*" if box == "INBOX" else ".Work/cur/*")
                info = [path.name.partition(":2,")[2] for path in files]
                for name, letter in (("Seen", "S"), ("Flagged", "F"), ("Answered", "R")):
                    assert sum(name in row for row in flags) == sum(letter in row for row in info)
        assert sorted(found) == sorted(made) and len(made) > 50


def test_folders_are_made_and_renamed_whole_or_not_at_all():
    with Server(allow="NotADirectoryError") as server, Imap(server, "alice") as client:
        for name in ("A", "A.one", "A.two"):
            client.cmd(f"CREATE {name}")
        for name in (".B.two", ".C"):
            (server.home("alice") / name).touch()  # in the way of a folder
        client.cmd("RENAME A B", "NO")
        client.cmd("CREATE C", "NO")
        names = [x.split()[-1] for x in client.cmd('LIST "" *')[:-1]]
        assert names == ["A", "A.one", "A.two", "INBOX"]
        assert not os.listdir(server.home("alice") / "tmp")


# ------------------------------------------------------------------------------------------------
# 9  The command line and the configuration
# ------------------------------------------------------------------------------------------------


def test_help_version_and_usage():
    wrong = (["--nonsense"], ["nonsense"], ["deliver"], ["status", "x", "y"], ["-c"])
    version, text, *refused = together(program, ["--version"], ["--help"], *wrong)
    assert version.stdout.startswith(b"hibernate")
    for word in b"status who kick reload stop deliver passwd --check --json".split():
        assert word in text.stdout
    assert [(done.returncode, done.stdout) for done in refused] == [(64, b"")] * len(wrong)
    assert all(done.stderr for done in refused)


def test_status_and_who_tell_what_is_going_on():
    with Server() as server, Imap(server, "alice") as awake, Imap(server, "bob") as asleep:
        asleep.cmd("SELECT INBOX")
        asleep.idle()
        eventually(lambda: "bob" in [row["user"] for row in server.who("imap-hibernate")])
        awake.cmd("NOOP")
        eventually(lambda: {row["user"] for row in server.who()} >= {"alice", "bob"})
        services = {row["service"] for row in server.control("status")}
        assert services == {"imap-login", "auth", "imap", "imap-hibernate"}
        status, who = together(server.run, ["status"], ["who"])
        assert status.returncode == who.returncode == 0 and b"imap-hibernate" in status.stdout
        assert re.search(rb"imap-hibernate.*bob.*127\.0\.0\.1", who.stdout)
        assert b"1 sessions" in server.run("kick", "bob").stdout
        assert "* BYE" in asleep.ended()
        awake.cmd("NOOP")


def test_who_asks_while_a_process_is_forked_hears_the_end_of_the_answer():
    with Server(allow="SIGKILL") as server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(4)
            sock.connect(str(server.dir / "hibernate.run" / "master"))
            before = server.pids("imap")
            os.kill(before[0], signal.SIGKILL)
            eventually(lambda: server.pids("imap") not in ([], before))
            sock.send(b"status")
            answer = b"".join(iter(lambda: sock.recv(1 << 20), b""))
            assert answer.count(b'"service"') == 3, answer


def test_who_prints_no_control_character_that_a_user_has_chosen(hibernate, capsys):
    hibernate.print_table([{"user": "ann", "since": 0}, {"user": "a\x1b[2J\ud800", "since": None}])
    assert capsys.readouterr().out == "user              since\nann               0\n" + (
        r"'a\x1b[2J\ud800'  -" "\n"
    )


def test_stop_ends_the_server_and_then_nothing_is_running():
    with Server() as server:
        client = Imap(server, "alice")
        assert server.run("stop").returncode == 0
        assert "* BYE" in client.ended()
        server.process.wait(PATIENCE)
        commands = (["status"], ["who"], ["stop"], ["kick", "alice"], ["reload"])
        for done in together(server.run, *commands):
            assert done.returncode == 75 and not done.stdout and done.stderr, done
        server.stop()


def test_a_command_whose_master_does_not_answer_says_so(hibernate, tmp_path, monkeypatch, capsys):
    (tmp_path / "c").touch()
    (tmp_path / "hibernate.run").mkdir()
    ask = lambda *words: hibernate.main(["-c", str(tmp_path / "c"), *words])  # noqa: E731
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as master:
        master.bind(str(tmp_path / "hibernate.run" / "master"))
        master.listen()
        monkeypatch.setattr(hibernate, "CHECK_TIME", 0)
        monkeypatch.setattr(hibernate, "STOP_TIME", 0.1)
        assert ask("stop") == 75 and "does not answer" in capsys.readouterr().err
        monkeypatch.setattr(hibernate, "STOP_TIME", PATIENCE)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, master.accept()[0]:
            for answer in (b"", b"refused: no"):
                asking = pool.submit(ask, "kick", os.fsdecode(b"\xff"))
                with master.accept()[0] as sock:
                    select.select([sock], (), (), PATIENCE)
                    if answer:
                        assert sock.recv(99) == b"kick \xff"
                        sock.send(answer)
                assert asking.result() == (78 if answer else 75)  # unread: it was killed
                assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_password_that_is_no_utf_8_is_refused_in_one_line():
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    done = program("passwd", input=b"\xff\n", env=strict)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (64, b"", 1), done


def test_ctrl_c_at_the_password_prompt_is_no_traceback(hibernate, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hibernate, "make_password", interrupted)
    assert hibernate.main(["-c", os.devnull, "passwd"]) == 130
    assert capsys.readouterr() == ("", "")


@table("line", ["base_dir = file", "log_path = directory", "log_path = no/log"])
def test_a_log_or_a_directory_that_can_not_be_opened_is_said_in_one_line(tmp_path, line):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "c").write_text(line)
    done = program("-c", tmp_path / "c", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (69, b"")
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path).encode() in done.stderr, done


def test_deliver_puts_a_message_where_it_belongs(server, user):
    done = server.run("deliver", user, input=message("one"))
    assert done.returncode == 0, done
    [entry] = list(server.maildir(user))
    assert entry["Subject"] == "one" and entry.get_subdir() == "new"
    wrong = ("../evil", "a/b", "", ".", "x\ty")
    for done in together(server.run, *(["deliver", name] for name in wrong)):
        assert done.returncode == 64, done
    assert not (server.dir / "evil").exists()


def test_deliver_finds_the_mail_of_a_user_where_a_log_in_finds_it(tmp_path):
    with Server() as server:
        (server.dir / "users").write_text(f"alice:{{PLAIN}}secret::::{tmp_path}\n")
        with Imap(server, "alice") as client:
            client.cmd("SELECT INBOX")
            assert server.run("deliver", "Alice", input=message()).returncode == 0
            client.cmd("NOOP")
            assert "hello" in "".join(client.cmd("FETCH 1 BODY[HEADER]"))


def test_passwd_makes_entries_that_log_in():
    with Server("auth_failure_delay = 1 msecs") as server:
        lines, schemes = [], ([], ["SSHA512"], ["PBKDF2"], ["PLAIN"], ["ROT13"])
        passwd = lambda *scheme: program("passwd", *scheme, input=b"pass word\n")  # noqa: E731
        *made, unknown = together(passwd, *schemes)
        assert unknown.returncode == 64 and not unknown.stdout
        for nothing in (b"", b"\n"):
            assert program("passwd", input=nothing).returncode == 64
        for done, scheme in zip(made, schemes):
            entry = done.stdout.decode().strip()
            assert entry.startswith("{" + (scheme[0] if scheme else "")), entry
            lines.append(f"u{len(lines)}:{entry}\n")
        with (server.dir / "users").open("a") as users:
            users.writelines(lines)
        for number in range(len(lines)):
            with Imap(server) as client:
                client.cmd(f'LOGIN u{number} "pass wOrd"', "NO")
                client.cmd(f'LOGIN u{number} "pass word"')


def test_n_shows_what_differs_from_the_defaults_and_can_be_read_back(tmp_path):
    file = tmp_path / "c"
    file.write_text(
        "imap_idle_notify_interval = 5 mins\nverbose_proctitle = yes\n"
        "service imap {\n  client_limit = 7 # few\n}\nmail_location = 'maildir:a # b/%u'\n"
    )
    said = program("-c", file, "-n").stdout.decode()
    assert "imap_idle_notify_interval = 5 mins" in said and "client_limit = 7" in said
    assert "verbose_proctitle" not in said
    file.write_text(said)
    again = program("-c", file, "-n")
    assert again.returncode == 0 and again.stdout.decode() == said


BAD_CONFIGURATIONS = [
    ("nonsense = 1", 1), ("\nimap_hibernate_timeout = soon", 2), ("imap_hibernate_timeout = 30", 1),
    ("imap_hibernate_twin = maybe", 1), ("service imap {\n client_limit = many\n}", 2),
    ("service imap {\n client_limit = 0\n}", 2), ("service imap {\n client_limit = 1\n", 0),
    ("}", 1), ("service nonsense {\n}", 1), ("service imap\n{\n}", 1), ("just words", 1),
    ("service imap {\n nonsense = 1\n}", 2), ("base_dir = 'open", 1),
    ("service imap-login {\n inet_listener x {\n  port = 99999\n }\n}", 3),
    ("service imap-login {\n inet_listener x {\n  address = nowhere\n }\n}", 3),
    ("service imap-login {\n inet_listener x {\n  reuse_port = yes\n }\n}", 3),
    ("service imap-login {\n process_min_avail = 9\n}", 2),
    ("service imap-login {\n process_min_avail = 9\n idle_kill = 4 s\n}", 2),
    (f"base_dir = /{'x' * 120}", 1),
    ("imap_max_line_length = huge", 1), ("mail_location = mbox:x", 1), ("\x00", 1),
    ("service imap {\n inet_listener x {\n }\n}", 2), ("base_dir = x\nbase_dir", 2),
    ("service imap {\n user = nobody-of-that-name\n}", 2), ("\udcff\udcfe", 1), (None, 0),
    ("base_dir = a\0b", 1), ("base_dir =", 1), ("\nlog_path = 'a\0'", 2),
]  # fmt: skip


@table("text, line", BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_named_by_file_and_line_and_nothing_is_started(
    hibernate, tmp_path, capsys, text, line
):
    file = tmp_path / "c"
    if text is not None:
        file.write_text(text, errors="surrogateescape")
    done = program("-c", file, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, b"")
    assert hibernate.main(["-c", str(file), "--check"]) == 78
    assert capsys.readouterr() == ("", done.stderr.decode())
    [said] = done.stderr.decode().splitlines()
    assert re.match(rf"{file}:{line or '[0-9]+'}: \S", said), said
    assert [x.name for x in tmp_path.iterdir()] == ["c"] * (text is not None)


def test_a_program_of_ones_own_may_have_paths_with_its_prefix_and_short_names(hibernate, tmp_path):
    setting = hibernate.Setting("@room", "path", "room", "a folder")
    program = hibernate.Program("x", (hibernate.Role("y", hibernate.Session),), (setting,), "x_")
    assert hibernate.Config(program).room == str(Path("room").absolute())
    base = str(tmp_path).ljust(98, "x")  # with "/y.new" it would do, but not with "/master.new"
    (tmp_path / "c").write_text(f"base_dir = {base}")
    with pytest.raises(hibernate.ConfigError, match=":1: base_dir"):
        hibernate.Config(program, str(tmp_path / "c"))


def test_as_root_each_service_is_its_user_and_reads_no_more_than_it_needs():
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can give each service a user")
    users = {"imap-login": "nobody", "auth": "daemon", "imap": "mail", "imap-hibernate": "mail"}
    settings = "\n".join(f"service {name} {{\n user = {user}\n}}" for name, user in users.items())
    with Server(settings, allow="refused|deliver") as server:
        server.stop()
        server.dir.chmod(0o711)
        (server.dir / "users").chmod(0o600)
        (server.dir / "mail").mkdir()
        shutil.chown(server.dir / "mail", "mail")
        server.start()
        with Imap(server, "alice") as client:
            client.cmd("SELECT INBOX")
            client.idle()
            eventually(lambda: server.held() == 1)
            for name, user in users.items():
                for pid in server.pids(name):
                    status = Path(f"/proc/{pid}/status").read_text()
                    number = pwd.getpwnam(user).pw_uid
                    assert re.search(rf"Uid:(\t{number}){{4}}\n", status), status
                    assert "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
            delivered = server.run("deliver", "alice", input=message("by root"))
            assert delivered.returncode == 0, delivered
            client.until(r"^\* 1 EXISTS")
            client.send("DONE\r\n")
            assert "by root" in "".join(client.cmd("FETCH 1 BODY[HEADER]"))
        for path in ("users", "mail/alice/new", "hibernate.run/key", "hibernate.run/master"):
            nobody = ["setpriv", "--reuid=nobody", "--clear-groups", "test", "-r"]
            assert subprocess.call([*nobody, server.dir / path]) == 1, path


def test_what_is_not_permitted_is_said_with_exit_status_77():
    """As an ordinary user, in a directory that is not the user's."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="hb-", dir=FOLDER))
        stack.callback(shutil.rmtree, folder)
        shutil.copy(PROGRAM, folder / "hibernate.py")
        (folder / "c").write_text("service imap-login {\n inet_listener x {\n  port = 0\n }\n}\n")
        (folder / "users").touch()
        folder.chmod(0o555)
        stack.callback(folder.chmod, 0o755)
        demoted = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        python = "/usr/bin/python3" if demoted else sys.executable  # root's own may be out of reach
        if subprocess.call([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]):
            pytest.skip("no Python that an ordinary user may run")
        done = subprocess.run(
            [python, "hibernate.py", "-c", "c"], cwd=folder, capture_output=True,
            timeout=PATIENCE, **demoted,
        )
        assert done.returncode == 77 and len(done.stderr.splitlines()) == 1, done


def test_the_example_configuration_is_right_and_names_every_setting(hibernate, tmp_path):
    example = HERE / "hibernate.conf.example"
    done = program("-c", example, "--check", cwd=tmp_path)
    assert done.returncode == 0, done
    shown = program("-c", example, "-n").stdout.decode().splitlines()
    assert not "".join(shown).replace(shown[0], ""), "the example shows the defaults"
    assert not list(tmp_path.iterdir())
    text = example.read_text()
    tables = [v for v in vars(hibernate).values() if isinstance(v, tuple) and v]
    rows = [*itertools.chain(*tables), *hibernate.PROGRAM.settings]
    names = {row.name.replace("@", "imap_") for row in rows if isinstance(row, hibernate.Setting)}
    assert len(names) >= 20
    for name in names:
        assert re.search(rf"(?m)^\s*#?\s*{name} = ", text), name


# ------------------------------------------------------------------------------------------------
# 10  Bad input
# ------------------------------------------------------------------------------------------------

BAD_COMMANDS = [
    "FROB", "", "NOOP now", "FETCH", "FETCH 1", "FETCH x FLAGS", "FETCH 0 FLAGS",
    "FETCH 1 NONSENSE", "FETCH 1 BODY[", "FETCH 1 (FLAGS", "FETCH 1 BODY[]<1>", "STORE 1",
    "STORE 1 FLAGS", "SELECT",
    'SELECT "INBOX', "SELECT INBOX extra", "STATUS INBOX", "STATUS INBOX ()", "STATUS INBOX (X)",
    "SEARCH", "SEARCH NONSENSE", "SEARCH (", "SEARCH SINCE 99-Foo-2000", "COPY 1", "APPEND INBOX",
    "UID FROB", "UID", "AUTHENTICATE PLAIN x", "FETCH 4294967296 FLAGS", "FETCH 1:2:3 FLAGS",
    "SEARCH " + "(" * 4000, "SEARCH " + "NOT " * 300 + "ALL", "FETCH 1 " + "(" * 4000,
    "FETCH 1 BODY[" + "1." * 4000 + "1",
    "STORE 1 FLAGS (\\Nonsense(", "LIST", 'LIST "" {3', "FETCH " + "9" * 5000 + " FLAGS",
]  # fmt: skip


@table("text", BAD_COMMANDS)
def test_a_malformed_command_is_bad_with_a_reason_and_the_session_goes_on(server, text):
    with Imap(server, "user99") as client:
        deliver_once(server, "user99")
        client.cmd("SELECT INBOX")
        [*_, line] = client.cmd(text, "BAD ")
        assert len(line) > len("a3 BAD ") + 3
        client.cmd("NOOP")


def deliver_once(server, user):
    if not len(server.maildir(user)):
        deliver_by_hand(server.home(user))


@table("tag", ["x%y", "x\\", 'x"y', "x{1", "x\ty", "x" * 65, "x*", "x(y"])
def test_a_tag_that_is_none_is_not_cut_into_one(server, tag):
    for user in ("", "user98"):
        with Imap(server, user) as client:
            client.send(f"{tag} NOOP\r\n")
            assert client.line() == "* BAD Invalid tag."
            client.cmd("NOOP")


@table("text", [b"\r\n", b"nonsense\r\n", b"\x00\xff\r\n", b"* OK\r\n", b") NOOP\r\n"])
def test_a_line_without_a_tag_is_bad_before_and_after_log_in(server, text):
    for user in ("", "user98"):
        with Imap(server, user) as client:
            client.send(text)
            assert re.match(r"\S+ BAD ", client.line())
            client.cmd("NOOP")


def test_what_needs_a_log_in_is_refused_before_it(server):
    for text in ("SELECT INBOX", "FETCH 1 FLAGS", 'LIST "" "*"', "IDLE", "EXPUNGE"):
        with Imap(server) as client:
            client.cmd(text, "BAD")
            assert client.cmd("LOGOUT")[0].startswith("* BYE")


def test_a_wrong_password_is_answered_late_and_holds_up_nobody():
    with Server("auth_failure_delay = 1 s") as server, Imap(server) as other:
        wrong, start = ("alice wrong", "nobody secret", 'alice ""'), time.monotonic()
        clients = [Imap(server) for _ in wrong]
        for client, text in zip(clients, wrong):
            client.send(f"x LOGIN {text}\r\n")
        other.cmd(f"LOGIN bob {server.password}")
        assert time.monotonic() - start < 0.9
        for client in clients:
            assert client.line().startswith("x NO [AUTHENTICATIONFAILED]")
            assert time.monotonic() - start >= 1
            client.cmd(f"LOGIN alice {server.password}")
        for name in ("alice", "nobody"):  # with the address, for who bans by the log
            assert re.search(rf"auth.* 127\.0\.0\.1:\d+ wrong password.* '{name}'", server.log())


@table("text", ["x", "!!!!", "*", "YWxpY2U=", "AAA=", plain("alice", "wrong"),
                base64.b64encode(b"bob\0alice\0secret").decode()])
def test_a_wrong_authenticate_is_refused_in_either_form(server, text):
    for initial in (True, False):
        with Imap(server) as client:
            client.send(f"x AUTHENTICATE PLAIN {text if initial else ''}".rstrip() + "\r\n")
            if not initial:
                client.until(r"^\+")
                client.send(text + "\r\n")
            assert re.match("x (NO|BAD) ", client.line())
            client.cmd("NOOP")


def test_too_long_lines_and_literals_are_bad_and_memory_stays_bounded():
    with Server("mail_max_message_size = 1 M") as server:
        pids = server.processes()
        before = sum(proc_bytes(pid, "Rss") for pid in pids)
        for user in ("", "alice"):
            for data in (b"x" * 10_000_000, b"x NOOP " + b"y" * 200_000 + b"\r\n"):
                client = Imap(server, user)
                with contextlib.suppress(ConnectionError):
                    client.send(data)
                assert re.match(r"\S+ (BAD|BYE)", client.line())
                client.close()
            for text in ("LOGIN {99999999}", "LOGIN {70000}", "SELECT {99999999999999999999}"):
                with Imap(server, user) as client:
                    client.cmd(text, "BAD")
                    client.cmd("NOOP")
        with Imap(server, "alice") as client:
            client.cmd("APPEND INBOX {99999999}", "NO|BAD")
            client.cmd("NOOP")
            client.send("x APPEND INBOX {4000000+}\r\n" + "y" * 4_000_000 + "\r\n")
            assert re.match(r"x (NO|BAD)", client.line())
            client.cmd("NOOP")
        assert sum(proc_bytes(pid, "Rss") for pid in pids) - before < 8 * 2**20
        with Imap(server) as client:  # the limit before log-in outlives a reload
            old = server.pids("imap-login")
            server.run("reload")
            eventually(lambda: not {*old} & {*server.pids("imap-login")})
            client.send("x" * 9000)
            assert re.match(r"\S+ (BAD|BYE)", client.line())


def test_a_client_that_never_reads_costs_no_memory_and_harms_nobody():
    with Server() as server, Imap(server, "bob") as other:
        server.maildir("alice").add(message("x", "0123456789\r\n" * 100_000))
        silent = Imap(server, "alice")
        silent.cmd("SELECT INBOX")
        [worker] = server.pids("imap")
        before = proc_bytes(worker, "Rss")
        for number in range(50):
            silent.send(f"x{number} FETCH 1 BODY.PEEK[]\r\n")
        for _ in range(50):
            other.cmd("NOOP")
        assert proc_bytes(worker, "Rss") - before < 16 * 2**20
        silent.close()
        eventually(lambda: {row["user"] for row in server.who()} == {"bob"})


def test_who_says_nothing_is_logged_out_also_where_there_is_no_bed():
    full = "service imap-hibernate {\n client_limit = 1\n process_limit = 1\n}\n"
    patch = "hibernate.REST_TIME, hibernate.AWAKE_TIME = 1.5, 0.1"
    with PatchedServer(full, patch, allow="(?!)") as server, Imap(server, "alice") as sleeper:
        sleeper.cmd("SELECT INBOX")
        sleeper.idle()
        falls_asleep(server, "alice")
        resting, listening = Imap(server, "bob"), Imap(server, "bob")
        listening.cmd("SELECT INBOX")
        tag = listening.idle()
        assert "* BYE Autologout; idle for too long" in resting.ended()
        select.select((), (), (), 0.5)
        listening.done(tag)
        listening.close()


def test_a_client_that_never_reads_is_gone_when_its_time_is_up():
    with PatchedServer("login_timeout = 1 s", patch="hibernate.REST_TIME = 1.0") as server:
        clients = Imap(server), Imap(server, "alice")
        for silent in clients:
            silent.socket.settimeout(0.5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while True:  # until no more fits into the buffers on the way
                    silent.send(b"a NOOP\r\nb CAPABILITY\r\n" * 1000)
        eventually(lambda: not server.who(), 5)
        assert all(client.socket.fileno() > 0 for client in clients)  # they are still there


def test_a_user_name_that_leaves_its_folder_is_refused_even_with_a_passwd_entry():
    bad = ["../alice", "..", ".", "a/../b", "/etc", ".hidden", "a/b"]
    bad += ["%u", "a%", "x\x01", "", "a\0b"]
    odd = ["\u00fc", "a" * 200, "~root", "x@example.org", "a.b", "a'b", "*"]  # may or may not
    settings = "auth_failure_delay = 1 msecs"
    with Server(settings, users=["alice", *bad, *odd], allow="users") as server:
        for name in bad + odd:
            with Imap(server) as client:
                data = name.encode()
                client.send(b"x LOGIN {%d+}\r\n%s secret\r\n" % (len(data), data))
                said = client.until("^x ")[-1]
                assert said.startswith("x NO" if name in bad else "x "), (name, said)
                client.cmd("SELECT INBOX", "OK" if said.startswith("x OK") else "BAD")
                assert said.startswith("x NO") or server.home(name).is_dir(), name
        homes = set(map(str, odd))
        assert {x.name for x in (server.dir / "mail").iterdir()} <= homes
        made = {x.name for x in server.dir.iterdir()}
        assert made <= {"users", "hibernate.conf", "hibernate.pyc", "log", "hibernate.run", "mail"}


@table("name", ["../bob", "..", ".", "/etc/passwd", "a/../../bob", ".hidden", "a..b", "x\x01y",
                "Trash.", "a" * 300, "~bob", "x/", "&Jjo", "a\x00b"])
def test_a_mailbox_name_that_leaves_its_folder_is_refused(server, user, name):
    with Imap(server, user) as client:
        server.maildir(user)
        before = sorted(p.name for p in server.home(user).iterdir())
        data = name.encode()
        for command in (b"SELECT ", b"EXAMINE ", b"STATUS ", b"APPEND ", b"COPY 1 "):
            more = {b"STATUS ": b" (MESSAGES)", b"APPEND ": b" {3+}\r\nabc"}.get(command, b"")
            client.send(b"x %s{%d+}\r\n%s%s\r\n" % (command, len(data), data, more))
            assert re.match("x (NO|BAD) ", client.until("^x ")[-1]), command
        client.cmd("NOOP")
        after = sorted(p.name for p in server.home(user).iterdir())
        assert set(after) - set(before) <= {x for x in after if "hibernate" in x or "index" in x}


def test_wrong_lines_of_a_passwd_file_are_named_and_the_others_work():
    users = ["alice", "bob"]
    with Server(users=users, allow="users:") as server:
        server.stop()
        server.process.stdout.close()
        (server.dir / "users").write_text(
            "# comment\n\nalice:{PLAIN}secret\nno colon\nx:{NOSUCH}y\nz:{SSHA512}!!!\n:{PLAIN}a\n"
            f"b\xffd:{{PLAIN}}x\nbob:{{PLAIN}}secret:1000:1000::{server.dir}/home::\n"
        )
        server.start()
        for user in users:
            with Imap(server, user) as client:
                client.cmd("SELECT INBOX")
        assert (server.dir / "home" / "cur").is_dir(), "the home that the entry names"
        for wrong in ("x y", "z a"):
            with Imap(server) as client:
                client.cmd(f"LOGIN {wrong}", "NO")
        for line in (4, 5, 6, 7):
            assert re.search(rf"users:{line}\b", server.log()), (line, server.log())
        (server.dir / "users").unlink()
        with Imap(server) as client:
            client.cmd("LOGIN alice secret", "NO")


def test_a_home_that_can_not_be_made_is_answered_and_logged():
    with Server("auth_failure_delay = 1 msecs", allow="/proc") as server:
        with (server.dir / "users").open("a") as users:
            users.write("carol:{PLAIN}secret:1000:1000::/proc/none::\n")
        with Imap(server) as client:
            client.send("x LOGIN carol secret\r\ny SELECT INBOX\r\n")
            assert re.search("^(x NO|y NO|\\* BYE)", client.until("^(x NO|y |\\* BYE)")[-1])
        assert "/proc/none" in server.log() and "Traceback" not in server.log()
        with Imap(server, "alice") as client:
            client.cmd("SELECT INBOX")


# ------------------------------------------------------------------------------------------------
# 11  The benchmark
#
# Clients live in processes of their own (a `Fleet` each: raw sockets, one epoll, an address of
# 127.0.0.x each), so that they are not what is measured: CPU is what the server's processes used,
# by /proc/PID/schedstat and the stat line of those that have ended; memory is smaps_rollup's.
# ------------------------------------------------------------------------------------------------

FLEET_SIZE = 9000  # clients of one process: below any usual descriptor limit, and 28,000 ports


class Dovecot(Server):
    """Debian's Dovecot 2.3 behind the same harness: as root, one imap process a session."""

    brand = "dovecot"

    def __init__(self, sessions, timeout="1s", users=("alice",)):
        self.sessions, self.timeout = sessions, timeout
        self.wanted = free_port()  # Dovecot takes port 0 for "none"
        super().__init__(users=users)

    def configure(self, settings, listener):
        self.dir.chmod(0o755)
        (self.dir / "mail").mkdir()
        entries = []
        for number, user in enumerate(self.users, 20000):  # a uid each: 128 inotify instances
            self.home(user).mkdir()
            os.chown(self.home(user), number, number)
            account = f"{number}:{number}::{self.home(user)}"
            entries.append(f"{user}:{{PLAIN}}{self.password}:{account}\n")
        (self.dir / "users").write_text("".join(entries))
        self.configuration.write_text(f"""
            base_dir = {self.dir}/run
            state_dir = {self.dir}/state
            log_path = {self.dir}/dovecot.log
            protocols = imap
            listen = 127.0.0.1
            ssl = no
            disable_plaintext_auth = no
            verbose_proctitle = yes
            mail_location = maildir:{self.dir}/mail/%u
            mail_fsync = never
            imap_hibernate_timeout = {self.timeout}
            passdb {{
              driver = passwd-file
              args = username_format=%u {self.dir}/users
            }}
            userdb {{
              driver = passwd-file
              args = username_format=%u {self.dir}/users
            }}
            default_client_limit = 50000
            default_vsz_limit = 4 G
            mail_max_userip_connections = 0
            service imap-login {{
              service_count = 0
              client_limit = 2000
              process_min_avail = 2
              inet_listener imap {{
                port = {self.wanted}
              }}
              inet_listener imaps {{
                port = 0
              }}
            }}
            service imap {{
              process_limit = {self.sessions + 1000}
              unix_listener imap-master {{
                user = dovecot
              }}
            }}
            service imap-hibernate {{
              client_limit = 9900
              process_min_avail = 1
              unix_listener imap-hibernate {{
                mode = 0666
              }}
            }}
            """)

    def command(self):
        return ["dovecot", "-F", "-c", str(self.configuration)]

    def wait_ready(self):
        self.port = self.wanted
        with Imap(eventually(self.answers)):
            return []

    def answers(self):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return self.port

    def log(self):
        path = self.dir / "dovecot.log"
        return path.read_text() if path.exists() else ""

    def owner(self, user):
        return (20000 + self.users.index(user),) * 2


class Client:
    """One raw connection of a fleet and what it is to say next."""

    __slots__ = ("user", "socket", "script", "input", "began")

    def __init__(self, user):
        self.user, self.socket, self.script, self.input, self.began = user, None, None, b"", 0.0


class Fleet:
    """Some thousand clients in one process; takes orders from a pipe, one at a time."""

    def __init__(self, pipe, address, port, users, password):
        self.pipe, self.address, self.port, self.password = pipe, address, port, password
        self.epoll = select.epoll()
        self.clients = [Client(user) for user in users]
        self.open = {}

    def serve(self):
        while order := self.pipe.recv():
            name, *arguments = order
            self.pipe.send(("answer", getattr(self, name)(*arguments)))

    def connect(self, client):
        client.socket = socket.socket()
        client.socket.bind((self.address, 0))
        client.socket.connect(("127.0.0.1", self.port))
        client.socket.setblocking(False)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open[client.socket.fileno()] = client
        self.epoll.register(client.socket.fileno(), select.EPOLLIN)

    def say(self, client):
        """The first line of the client's script; what it says back is matched from here on."""
        line = client.script[0][0].replace(b"%u", client.user.encode())
        client.input = b""
        if line:
            client.socket.send(line.replace(b"%p", self.password.encode()))

    def drop(self, client):
        self.open.pop(client.socket.fileno(), None)  # absent if it was refused
        client.socket.close()
        client.socket = None

    def run(self, members, script, window, deadline, report=""):
        """Each member says every line of the script and waits for what must follow; at most
        `window` at once. Returns (seconds of each, lost, seconds of all)."""
        waiting = collections.deque(members)
        busy, taken, lost, start = set(), [], 0, time.monotonic()
        shown, end = start, start + deadline
        while (waiting or busy) and time.monotonic() < end:
            while waiting and len(busy) < window:
                client = waiting.popleft()
                client.script, client.began = list(script), time.monotonic()
                busy.add(client)
                try:
                    if client.socket is None:
                        self.connect(client)
                    self.say(client)
                except OSError:
                    lost += 1
                    busy.discard(client)
                    if client.socket:
                        self.drop(client)
            for fd, _ in self.epoll.poll(0.2):
                client = self.open[fd]
                try:
                    data = client.socket.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    self.drop(client)
                    lost += client in busy
                    busy.discard(client)
                elif client in busy:
                    client.input += data
                    self.advance(client, busy, taken)
            if report and time.monotonic() - shown > 1:
                shown = time.monotonic()
                self.pipe.send(("progress", f"{report} {len(taken)}"))
        return taken, lost + len(busy) + len(waiting), time.monotonic() - start

    def advance(self, client, busy, taken):
        try:
            if re.search(client.script[0][1], client.input):
                client.script.pop(0)
                if client.script:
                    self.say(client)
                else:
                    taken.append(time.monotonic() - client.began)
                    busy.discard(client)
        except OSError:
            pass  # the hang-up that follows is counted

    # the orders

    def drain(self, seconds=0.0):
        """Read what was said unasked (keepalives, EXISTS); the number that are still connected."""
        self.run([], [], 1, 0)
        end = time.monotonic() + seconds
        while (events := self.epoll.poll(max(0, end - time.monotonic()))) or time.monotonic() < end:
            for fd, _ in events:
                try:
                    data = self.open[fd].socket.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    self.drop(self.open[fd])
        return len(self.open)

    def ports(self):
        """The local port of each open connection: its name in /proc/net/tcp."""
        return [client.socket.getsockname()[1] for client in self.open.values()]

    def script(self, first, last, lines, window, deadline, report=""):
        greeting = lines[0][1] == rb"^\* OK"  # for those without a connection, the rest for others
        members = [x for x in self.clients[first:last] if bool(x.socket) != greeting]
        return self.run(members, lines, window, deadline, report)

    def mail(self, homes, deadline):
        """A message for one user after the other; all of the user's clients must hear of it."""
        taken, lost, start = [], 0, time.monotonic()
        for user, (home, owner) in homes.items():
            members = [x for x in self.open.values() if x.user == user]
            deliver_by_hand(home, None, owner)
            seconds, missing, _ = self.run(members, [(b"", rb"EXISTS")], 1 << 20, 10)
            taken, lost = taken + seconds, lost + missing
            if time.monotonic() - start > deadline:
                break
        return taken, lost, time.monotonic() - start


LOG_IN = [
    (b"", rb"^\* OK"), (b"a LOGIN %u %p\r\n", rb"(?m)^a OK"),
    (b"b SELECT INBOX\r\n", rb"(?m)^b OK"), (b"c IDLE\r\n", rb"(?m)^\+ "),
]
IDLE = [(b"c IDLE\r\n", rb"(?m)^\+ ")]
DONE = [(b"DONE\r\n", rb"(?m)^c OK")]
DONE_IDLE = [(b"DONE\r\nc IDLE\r\n", rb"(?ms)^c OK.*^\+ ")]
NOOP = [(b"DONE\r\nd NOOP\r\n", rb"(?m)^d OK")]


def proc_bytes(pid, *names):
    """Bytes by smaps_rollup: the sum of the named rows."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(1024 * int(x) for x in re.findall(rf"(?m)^(?:{'|'.join(names)}):\s+(\d+)", rows))


class Meter:
    """What the processes of one server use."""

    def __init__(self, server):
        self.server = server
        self.seen = {}  # CPU of each process when it was last looked at

    def cpu(self):
        """Seconds of CPU so far. Of what has ended the last look counts; the kernel adds up its
        children's time another way, some 10 % apart. But Dovecot's end with their session."""
        alive, ended, tick = {}, 0.0, os.sysconf("SC_CLK_TCK")
        for pid in self.server.processes():
            with contextlib.suppress(OSError):
                alive[pid] = cpu_of(pid)
                fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
                ended += (int(fields[13]) + int(fields[14])) / tick
        self.seen |= alive
        if self.server.brand == "hibernate":
            return sum(self.seen.values())
        return sum(alive.values()) + ended

    def pss(self):
        total = 0
        for pid in self.server.processes():
            with contextlib.suppress(OSError):
                total += proc_bytes(pid, "Pss")
        return total

    def keeper(self):
        """(keepers, their bytes, their descriptors). A twin shares its keeper's pages, so hardly
        any is private: counted are the heap, and the memory that the two of them share."""
        pids = self.server.pids("imap-hibernate")
        twins = self.server.pids(TWIN)
        kinds = ["Anonymous"] if twins else ["Private_Clean", "Private_Dirty"]
        used = sum(proc_bytes(pid, *kinds) for pid in pids)
        used += sum(proc_bytes(pid, "Pss_Shmem") for pid in pids + twins)
        return len(pids), used, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


class Bench:
    """One run: a server, its fleets, and the rows they yield."""

    def __init__(self, brand, options):
        self.brand, self.options, self.rows = brand, options, {}
        self.users = [f"u{n}" for n in range(options.users or max(1, options.sessions // 5))]
        self.end = time.monotonic() + options.time
        self.fleets = []

    def note(self, text):
        if sys.stderr.isatty():
            print(f"\r\033[K{self.brand}: {text}", end="", file=sys.stderr, flush=True)

    def left(self, most):
        return max(1.0, min(most, self.end - time.monotonic()))

    def row(self, name, value):
        self.rows[name] = value
        self.note("")
        print(f"{self.brand}: {name}: {value}", file=sys.stderr, flush=True)

    def server(self, timeout):
        if self.brand == "dovecot":
            return Dovecot(self.options.sessions, timeout, self.users)
        limits = {"imap-login": 4000, "imap": 400, "imap-hibernate": self.options.client_limit}
        spare = {"imap-login": 2, "imap-hibernate": 1}
        settings = "".join(
            f"service {name} {{\n  client_limit = {limit}\n  idle_kill = 3 s\n"
            f"  process_min_avail = {spare.get(name, 1)}\n}}\n"
            for name, limit in limits.items()
        )
        return Server(f"imap_hibernate_timeout = {timeout}\n{settings}", self.users)

    def start_fleets(self, port, sessions):
        context = multiprocessing.get_context("fork")
        count = min(len(self.users), -(-sessions // FLEET_SIZE))
        for number in range(count):
            indexes = (n % len(self.users) for n in range(sessions))
            mine = [self.users[n] for n in indexes if n % count == number]
            ours, theirs = context.Pipe()
            fleet = Fleet(theirs, f"127.0.0.{10 + number}", port, mine, Server.password)
            process = context.Process(target=fleet.serve, daemon=True)
            process.start()
            theirs.close()
            self.fleets.append((ours, process, len(mine)))

    def stop_fleets(self):
        for pipe, process, _ in self.fleets:
            pipe.close()
            process.terminate()
            process.join(10)
        self.fleets = []

    def order(self, name, *arguments, fleets=None, watch=None):
        """Give all fleets, or the first few, one order at once; their answers. `watch()` is called
        while they work."""
        answers, waiting = [], [pipe for pipe, _, _ in self.fleets[:fleets]]
        for pipe in waiting:
            pipe.send((name, *arguments))
        while waiting:
            for pipe in multiprocessing.connection.wait(waiting, 0.5):
                kind, value = pipe.recv()
                if kind == "answer":
                    answers.append(value)
                    waiting.remove(pipe)
                else:
                    self.note(f"{value} …")
            if watch:
                watch()
        return answers

    def talk(self, lines, window, deadline, first=0, last=None, report="", **options):
        """A script for fleets: (seconds of each client, lost, seconds of all)."""
        script = "script", first, last, lines, window, self.left(deadline), report
        answers = self.order(*script, **options)
        taken = [x for answer in answers for x in answer[0]]
        return taken, sum(x[1] for x in answers), max(x[2] for x in answers)

    def all_asleep(self, deadline=120):
        """Wait until every connected client sleeps; False if that does not come true."""
        self.order("drain", 1.5)  # titles are up to a second old
        end = time.monotonic() + self.left(deadline)
        while (asleep := self.live.asleep()) < (connected := sum(self.order("drain"))):
            self.note(f"asleep {asleep} of {connected} …")
            if time.monotonic() > end:
                return False
            self.order("drain", 0.3)
        return True

    def latency(self, name, taken, cpu):
        if taken:
            taken = sorted(taken)
            self.row(f"{name}, p50 ms", round(1000 * statistics.median(taken), 3))
            self.row(f"{name}, p99 ms", round(1000 * taken[int(len(taken) * 0.99)], 3))
            self.row(f"{name}, CPU ms", round(1000 * cpu / len(taken), 3))

    def spent(self, work, *arguments, **options):
        before = self.meter.cpu()
        answer = work(*arguments, **options)
        return answer, self.meter.cpu() - before

    # the phases

    def measure(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.stop_fleets)
            self.live = stack.enter_context(self.server("2 s"))
            self.meter = Meter(self.live)
            self.warm_up()
            self.start_fleets(self.live.port, self.options.sessions)
            for phase in (
                self.log_in, self.memory, self.idle, self.done, self.wake, self.by_mail,
                self.done_idle, self.stampede, self.reload,
            ):
                if time.monotonic() < self.end:
                    try:
                        phase()
                    except (AssertionError, OSError, EOFError) as error:
                        self.row(f"{phase.__name__} failed", repr(error)[:60])
            self.row("errors in the log", len(self.live.errors()))
            self.stop_fleets()
        if not self.options.quick and time.monotonic() < self.end:
            self.awake()
        return self.rows

    def awake(self):
        """Last: ext4 passes over each inode that was freed in the last minutes one by one, so what
        a server before deleted would make the files of new users dear."""
        with self.server("0") as self.live:
            self.meter, sessions = Meter(self.live), min(200, self.options.sessions)
            self.warm_up(sleeps=False)
            self.start_fleets(self.live.port, sessions)
            before = self.meter.pss()
            _, lost, _ = self.talk(LOG_IN, 16, 60)
            grown = self.meter.pss() - before
            self.row("a session awake, KB PSS", round(grown / 1024 / max(1, sessions - lost), 1))
            self.stop_fleets()

    def warm_up(self, sleeps=True):
        """What the first sessions cost once and for all is not what a session costs."""
        self.start_fleets(self.live.port, 50)
        self.talk(LOG_IN, 8, 60)
        if sleeps:
            self.all_asleep()
        self.stop_fleets()
        eventually(lambda: not self.live.asleep())

    def log_in(self):
        """All of them. The first of each user makes an index, which is a row of its own; of the
        others the first and the last thousand are too, if they are many: does the cost grow? Those
        are over before any of them falls asleep; with the many between them others do."""
        self.empty = self.meter.keeper()
        self.empty_pss = self.meter.pss()
        pair = self.live.pids("imap-hibernate")[:1] + self.live.pids(TWIN)[:1]
        self.pair = sum(proc_bytes(pid, "Private_Clean", "Private_Dirty") for pid in pair)
        fleets = len(self.fleets)
        most = max(size for _, _, size in self.fleets)
        new = min(most, -(-len(self.users) // fleets))
        some = 1000 // fleets
        bounds = [new, new + some, most - some, most] if most - new > 4 * some else [new, most]
        parts = [(0, new), *itertools.pairwise(bounds)]
        names = ["by new users", "the first of the others", "and falling asleep", "the last"]
        done = lost = time_all = 0
        for (first, last), name in zip(parts, names if len(parts) > 2 else ["by new users", ""]):
            if first == last:
                continue
            self.all_asleep(300)
            (taken, missing, seconds), cpu = self.spent(
                self.talk, LOG_IN, max(1, 64 // fleets), 7200, first, last, "log-in"
            )
            done, lost, time_all = done + len(taken), lost + missing, time_all + seconds
            each = round(1000 * cpu / max(1, len(taken)), 2)
            self.row(f"log-in, SELECT, IDLE: CPU ms{name and f', {name} {len(taken)}'}", each)
        self.row("logged in", done)
        self.row("lost at log-in", lost)
        self.row("log-in, SELECT, IDLE: sessions/s, all", round(done / time_all))

    def memory(self):
        self.row("all asleep", self.all_asleep(300))
        # processes that were only needed for the log-ins go first, so that sleepers are measured
        pss, end = self.meter.pss(), time.monotonic() + self.left(20)
        while time.monotonic() < end and self.brand == "hibernate":
            if len(self.live.pids("imap")) <= 1:
                break
            self.order("drain", 0.5)
        asleep = max(1, self.live.asleep())
        keepers, private, descriptors = self.meter.keeper()
        base = keepers / max(1, self.empty[0])
        pss = self.meter.pss()
        self.row("asleep", asleep)
        self.row("keepers", keepers)
        grown = private - self.empty[1] * base
        self.row("a sleeper, keeper's own bytes", round(grown / asleep))
        grown = pss - self.empty_pss
        self.row("a sleeper, all processes' PSS bytes", round(grown / asleep))
        grown -= (keepers - self.empty[0]) * self.pair
        self.row("… without what further keepers have empty", round(grown / asleep))
        self.row("a sleeper, descriptors", round((descriptors - self.empty[2] * base) / asleep, 2))

    def idle(self):
        before, start = self.meter.cpu(), time.monotonic()
        self.note(f"idle for {self.options.idle} s …")
        self.order("drain", self.left(self.options.idle))
        used = (self.meter.cpu() - before) / (time.monotonic() - start)
        self.row("idle CPU, % of a core", round(100 * used, 3))

    def sample(self, name, lines, back, size=300, batch=2000):
        """Latency one at a time, then CPU of many; `back` takes each into IDLE again."""
        taken, _, _ = self.talk(lines, 1, 60, 0, size, fleets=1)
        self.talk(back, 8, 60, 0, size, fleets=1)
        first, last = size, size + batch // len(self.fleets)
        (many, lost, _), cpu = self.spent(self.talk, lines, 8, 120, first, last)
        if not many:  # few sessions: the sample's have to do
            first, last = 0, None
            self.all_asleep()
            (many, lost, _), cpu = self.spent(self.talk, lines, 8, 120)
        self.latency(name, taken, cpu * len(taken) / max(1, len(many)))
        self.talk(back, 8, 60, first, last)
        self.row(f"{name}, lost", lost)
        self.all_asleep()

    def done(self):
        self.sample("DONE of a sleeper", DONE, IDLE)

    def wake(self):
        self.sample("full wake by a command", NOOP, IDLE)

    def by_mail(self):
        """Some mailboxes at a time: all must have heard before the first falls asleep again."""
        mine = self.users[:: len(self.fleets)][:200]  # of the first fleet
        taken, lost, cpu_awake, cpu_asleep = [], 0, 0.0, 0.0
        for at in range(0, len(mine), 40):
            some = {u: (self.live.home(u), self.live.owner(u)) for u in mine[at : at + 40]}
            [(seconds, missing, _)], cpu = self.spent(self.order, "mail", some, 60, fleets=1)
            taken, lost, cpu_awake = taken + seconds, lost + missing, cpu_awake + cpu
            cpu_asleep += self.spent(self.all_asleep)[1]
        self.latency("wake by mail", taken, cpu_awake)
        self.row("… and back to sleep, CPU ms", round(1000 * cpu_asleep / max(1, len(taken)), 3))
        self.row("wake by mail, lost", lost)

    def done_idle(self):
        rounds = max(1, 5000 // self.options.sessions)
        (taken, _, _), cpu = self.spent(self.talk, DONE_IDLE * rounds, 8, 60, 0, 5000)
        each = 1000 * cpu / max(1, len(taken) * rounds)
        self.row("DONE + IDLE in one packet, CPU ms", round(each, 4))
        self.all_asleep()

    def stampede(self):
        """All wake at once by a command."""
        peak = [self.meter.pss()]
        looked = [time.monotonic()]

        def look():
            if time.monotonic() - looked[0] > 1:
                peak.append(self.meter.pss())
                looked[0] = time.monotonic()

        before = sum(self.order("drain"))
        taken, _, seconds = self.talk(NOOP, 1 << 20, 120, report="woken", watch=look)
        self.row("all wake at once: seconds", round(seconds, 1))
        self.row("all wake at once: lost", before - len(taken))
        self.row("all wake at once: peak MB PSS", round(max(*peak, self.meter.pss()) / 2**20))
        self.talk(IDLE, 64, 60)
        self.all_asleep()

    def reload(self):
        """SIGHUP with all asleep, until no process of the old generation is left."""
        old = {*self.live.pids("imap-hibernate"), *self.live.pids("imap")}
        connected, start = sum(self.order("drain")), time.monotonic()
        self.live.process.send_signal(signal.SIGHUP)
        end = start + self.left(60)
        while old & set(self.live.processes()) and time.monotonic() < end:
            self.order("drain", 0.05)
        seconds = time.monotonic() - start
        gone = not old & set(self.live.processes())
        self.row("reload: seconds", round(seconds, 2) if gone else "over 60")
        self.row("reload: lost", connected - sum(self.order("drain", 0.5)))


def bench(arguments):
    parser = argparse.ArgumentParser(prog="test_hibernate.py bench")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--users", type=int, default=0, help="default: a fifth of the sessions")
    parser.add_argument("--client-limit", type=int, default=19000, help="sessions of one keeper")
    parser.add_argument("--idle", type=float, default=30, help="seconds of the idle measurement")
    parser.add_argument("--time", type=float, default=900, help="seconds, at most, for a server")
    parser.add_argument("--dovecot", action="store_true", help="Debian's Dovecot beside it (root)")
    parser.add_argument("--only-dovecot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without the second server awake")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    Server.loud = False
    brands = [] if options.only_dovecot else ["hibernate"]
    brands += ["dovecot"] if options.dovecot or options.only_dovecot else []
    if "dovecot" in brands and not shutil.which("dovecot"):
        parser.error("there is no dovecot here: apt-get install -y dovecot-imapd")
    if "dovecot" in brands and os.geteuid():
        parser.error("dovecot has to be started as root")
    columns = {brand: Bench(brand, options).measure() for brand in brands}
    if options.json:
        print(json.dumps({"sessions": options.sessions, **columns}, indent=1))
        return
    print(f"\n{options.sessions} sessions".ljust(45) + "".join(x.rjust(14) for x in brands))
    for name in dict.fromkeys(name for rows in columns.values() for name in rows):
        values = (str(columns[brand].get(name, "-")) for brand in brands)
        print(name.ljust(44) + "".join(value.rjust(14) for value in values))


class Drill(Bench):
    """Clients that check every reply, while reloads and kills of every role come at random."""

    ROLES = f"reload,master,imap-hibernate,{TWIN},imap,imap-login,auth"
    ROUND = [
        (b"DONE\r\nd NOOP\r\n", rb"(?m)^c OK[^\n]*\n(?s:.*)^d OK"),
        (b"e UID SEARCH ALL\r\n", rb"(?m)^\* SEARCH[^\n]*\n(?s:.*)^e OK"),
        (b"c IDLE\r\n", rb"(?m)^\+ "),
    ]

    def __init__(self, options):
        super().__init__("hibernate", options)
        self.random = random.Random(options.seed)
        self.acts, self.doomed, self.next = collections.Counter(), set(), 0.0

    def act(self):
        """One misfortune, a second or more after the last."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self.random.uniform(1, 4)
        what = self.random.choice(self.options.roles.split(","))
        pids = [self.live.process.pid] if what in ("reload", "master") else self.live.pids(what)
        if not pids:
            return
        pid = self.random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            if what == "imap":  # what is awake in there ends with it, and nothing else may
                os.kill(pid, signal.SIGSTOP)
                eventually(lambda: Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T")
                self.doomed |= connections_of(pid)
            os.kill(pid, signal.SIGHUP if what == "reload" else signal.SIGKILL)
            self.acts[what if what == "reload" else f"kill -9 {what}"] += 1
            self.note(f"{time.strftime('%X')} {what} {pid}")
        if what == "master":
            self.live.restart()

    def measure(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.stop_fleets)
            self.live = stack.enter_context(self.server("500 msecs"))
            self.meter = Meter(self.live)
            self.start_fleets(self.live.port, self.options.sessions)
            self.talk(LOG_IN, 32, 600, report="log-in")
            self.all_asleep(120)
            known, gone, rounds, unanswered, slowest = self.connected(), set(), 0, 0, 0.0
            print(f"{len(known)} sessions asleep; {self.options.seconds} s begin", flush=True)
            end = time.monotonic() + self.options.seconds
            while time.monotonic() < end:
                before = self.connected()
                taken, lost, _ = self.talk(self.ROUND, 64, 120, report="answered", watch=self.act)
                rounds += len(taken)
                unanswered += max(0, lost - len(before - self.connected()))
                slowest = max(slowest, *taken, 0.0)
                gone |= known - self.connected()
                self.talk(LOG_IN, 32, 60)
                known |= self.connected()
                self.act()
            self.all_asleep(60)
            gone |= known - self.connected()
            for what, count in sorted(self.acts.items()):
                print(f"{count:5} x {what}")
            print(f"{rounds:5} rounds of DONE, NOOP, SEARCH, IDLE were answered as they must be")
            print(f"{len(gone & self.doomed):5} sessions ended, awake in a worker that was killed")
            print(f"{unanswered:5} rounds without a right answer; the slowest took {slowest:.1f} s")
            for line in self.live.log().splitlines() if gone - self.doomed else ():
                if re.search("ERROR|WARNING", line) or (" ended: " in line and "INFO" in line):
                    print(line, file=sys.stderr)
            print(f"lost {len(gone - self.doomed)}")
            mine = self.live.process.pid  # those of a killed master first hand over and end
            eventually(lambda: self.live.processes() == processes(mine), 60)
            return not unanswered and not gone - self.doomed

    def connected(self):
        """The ports of all that are connected, each with its fleet's address."""
        self.order("drain", 0.3)
        return {
            (f"127.0.0.{10 + number}", port)
            for number in range(len(self.fleets)) for port in self.ask(number, "ports")
        }  # fmt: skip

    def ask(self, number, name):
        pipe = self.fleets[number][0]
        pipe.send((name,))
        return pipe.recv()[1]


def connections_of(pid):
    """The peers of the TCP connections that a process holds: {(address, port)}."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(fd))
    found = set()
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if f"socket:[{fields[9]}]" in inodes:
            address, port = fields[2].split(":")
            host = socket.inet_ntoa(struct.pack("=I", int(address, 16)))
            found.add((host, int(port, 16)))
    return found


def drill(arguments):
    parser = argparse.ArgumentParser(prog="test_hibernate.py drill")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--users", type=int, default=0, help="default: a fifth of the sessions")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--roles", default=Drill.ROLES, help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.client_limit, options.time = 19000, 900 + options.seconds
    Server.loud = False
    sys.exit(0 if Drill(options).measure() else 1)


def spread(arguments):
    """Connections over four log-in processes: a shared listener against SO_REUSEPORT."""
    parser = argparse.ArgumentParser(prog="test_hibernate.py spread")
    parser.add_argument("--connections", type=int, default=2000)
    options = parser.parse_args(arguments)
    Server.loud = False
    limit = max(1000, options.connections)
    settings = FOUR.replace("\n}", f"\n client_limit = {limit}\n}}")
    print(f"{options.connections} connections".ljust(24) + "in each process".ljust(28)
          + "busiest/fair  CPU ms each")
    for name, extra in (("shared listener", ""), ("reuse_port = yes", "\n reuse_port = yes")):
        with Server(settings, listener="port = 0" + extra) as server:
            eventually(lambda: len(server.titles("imap-login")) == 4)
            meter = Meter(server)
            before, clients = meter.cpu(), []
            for _ in range(options.connections):
                clients.append(socket.create_connection(("127.0.0.1", server.port)))
            for client in clients:
                assert client.recv(4096).startswith(b"* OK")
            used = 1000 * (meter.cpu() - before) / len(clients)
            eventually(lambda: server.held("imap-login") == len(clients))
            loads = server.loads("imap-login")
            told = " ".join(map(str, reversed(loads)))
            print(f"{name:24}{told:28}{4 * max(loads) / len(clients):12.2f}{used:13.3f}")
            for client in clients:
                client.close()


class Storm:
    """Many connects, at most `window` at once: what each client saw, and how long it took."""

    def __init__(self, port, count, window=100):
        self.port, self.seen, self.waits = port, collections.Counter(), []
        self.selector, self.left, self.open = selectors.DefaultSelector(), count, {}
        while self.left or self.open:
            while self.left and len(self.open) < window:
                self.connect()
            for key, _ in self.selector.select(1.0):
                self.hear(key.fileobj)
            for sock in [x for x, since in self.open.items() if time.monotonic() - since > 15]:
                self.saw(sock, "nothing for 15 s")
        self.selector.close()

    def connect(self):
        self.left -= 1
        sock = socket.socket()
        sock.setblocking(False)
        self.open[sock] = time.monotonic()
        sock.connect_ex(("127.0.0.1", self.port))
        self.selector.register(sock, selectors.EVENT_READ)

    def hear(self, sock):
        try:
            said = sock.recv(4096)
        except ConnectionRefusedError:
            return self.saw(sock, "refused")
        except OSError:
            return self.saw(sock, "reset")
        self.saw(sock, "greeted" if said.startswith(b"* OK") else "BYE" if said else "closed")

    def saw(self, sock, what):
        self.seen[what] += 1
        self.waits.append(time.monotonic() - self.open.pop(sock))
        self.selector.unregister(sock)
        sock.close()


def pressure(arguments):
    """Connects while all is full, descriptors are short, or a process is stopped."""
    parser = argparse.ArgumentParser(prog="test_hibernate.py pressure")
    parser.add_argument("--connects", type=int, default=5000)
    options = parser.parse_args(arguments)
    Server.loud = False
    shared, own = FOUR, "port = 0\n reuse_port = yes"
    two = "service imap-login {\n client_limit = 100\n process_limit = 2\n}"
    print(f"{options.connects} connects".ljust(38) + "p50, p99, worst ms".ljust(24)
          + "CPU ms each  seen by the clients")
    for name, settings, listener, files, act in (
        ("nothing is short", shared, "port = 0", 0, ""),
        ("all full, 200 idle clients", two, "port = 0", 0, "fill"),
        ("200 descriptors a process", shared, "port = 0", 200, "fill"),
        ("one of 4 stopped, shared listener", shared, "port = 0", 0, "stop"),
        ("one of 4 stopped, reuse_port", shared, own, 0, "stop"),
        ("one of 4 killed, reuse_port", shared, own, 0, "kill"),
    ):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server(settings, listener=listener))
            sleeper = stack.enter_context(Imap(server, "alice"))
            sleeper.cmd("SELECT INBOX")
            idle = sleeper.idle()
            eventually(lambda: server.held() == 1)
            eventually(lambda: len(server.titles("imap-login")) >= 1)
            meter, pids = Meter(server), server.pids("imap-login")
            for pid in pids if files else ():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, files))
            if act == "fill":
                for _ in range(200):
                    stack.enter_context(Imap(server))
            if act in ("stop", "kill"):
                os.kill(pids[0], signal.SIGSTOP if act == "stop" else signal.SIGKILL)
            before = meter.cpu()
            storm = Storm(server.port, options.connects)
            used = 1000 * (meter.cpu() - before) / options.connects
            if act == "stop":
                os.kill(pids[0], signal.SIGCONT)
            sleeper.done(idle)  # nobody else has noticed
            waits = sorted(1000 * x for x in storm.waits)
            told = ", ".join(f"{waits[int(at * (len(waits) - 1))]:.0f}" for at in (0.5, 0.99, 1))
            seen = ", ".join(f"{count} {what}" for what, count in storm.seen.most_common())
            print(f"{name:38}{told:24}{used:11.2f}  {seen}", flush=True)


def large(arguments):
    """One INBOX with many messages: what commands take, and mail that wakes three sleepers."""
    parser = argparse.ArgumentParser(prog="test_hibernate.py large")
    parser.add_argument("--messages", type=int, default=50000)
    parser.add_argument("--dovecot", action="store_true", help="Debian's Dovecot beside it (root)")
    options = parser.parse_args(arguments)
    Server.loud = False
    print(f"{options.messages} messages".ljust(46) + "p50 ms    CPU ms")
    servers = [Server] + [functools.partial(Dovecot, 100)] * options.dovecot
    for make in servers:
        with make(users=["alice"]) as server:
            home, owner = server.home("alice"), server.owner("alice")
            for folder in (home, *(home / sub for sub in ("tmp", "new", "cur"))):
                folder.mkdir(parents=True, exist_ok=True)
                os.chown(folder, *owner or (-1, -1))
            for number in range(options.messages):
                path = home / "cur" / f"{1600000000 + number}.P1.example:2,S"
                path.write_bytes(message())
                os.chown(path, *owner or (-1, -1))
            meter, numbers = Meter(server), itertools.count(1)

            def row(name, act, times):
                taken, before = [], meter.cpu()
                for _ in range(times):
                    start = time.monotonic()
                    act()
                    taken.append(1000 * (time.monotonic() - start))
                    time.sleep(1.5 if sleepers else 0)  # titles are up to a second old
                    eventually(lambda: server.asleep() == len(sleepers), 60)
                used = 1000 * (meter.cpu() - before) / times
                name = f"{server.brand}: {name}"
                print(f"{name:40}{statistics.median(taken):12.1f}{used:10.1f}", flush=True)

            def mail():
                deliver_by_hand(home, None, owner)
                for sleeper in sleepers:
                    sleeper.until("EXISTS", 60)

            sleepers, client = [], Imap(server, "alice")
            row("first SELECT", lambda: client.cmd("SELECT INBOX"), 1)
            row("SELECT", lambda: client.cmd("SELECT INBOX"), 5)
            row("FETCH 1:* FLAGS", lambda: client.cmd("FETCH 1:* FLAGS"), 3)
            row("UID SEARCH UNSEEN", lambda: client.cmd("UID SEARCH UNSEEN"), 5)
            row("STORE", lambda: client.cmd(f"STORE {next(numbers)} +FLAGS (\\Flagged)"), 20)
            client.cmd("LOGOUT")
            for _ in range(3):
                sleepers.append(Imap(server, "alice"))
                sleepers[-1].cmd("SELECT INBOX")
                sleepers[-1].idle()
            time.sleep(3)
            row("mail to three sleepers", mail, 5)


def crowd(arguments):
    """Clients of a server that runs already: in IDLE, telling what they hear, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="test_hibernate.py crowd")
    parser.add_argument("sessions", type=int)
    parser.add_argument("user")
    parser.add_argument("password")
    parser.add_argument("--port", type=int, default=1143)
    options = parser.parse_args(arguments)
    target = argparse.Namespace(port=options.port, password=options.password)
    clients = many(target, [options.user] * options.sessions)
    poll, sockets = select.poll(), {client.socket.fileno(): client.socket for client in clients}
    for fd in sockets:
        poll.register(fd, select.POLLIN)
    print(f"{len(sockets)} sessions in IDLE", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while sockets:
            heard = collections.Counter()
            for fd, _ in poll.poll():
                data = b""
                with contextlib.suppress(OSError):
                    data = sockets[fd].recv(65536)
                heard.update(data.decode(errors="replace").splitlines() or ["the end"])
                if not data:
                    poll.unregister(fd)
                    sockets.pop(fd).close()
            for text, count in heard.items():
                print(f"{time.strftime('%X')}  {count} heard: {text}", flush=True)
            select.select((), (), (), 0.5)  # so that the next line tells of many


if __name__ == "__main__":
    FOLDER = "/tmp"  # what is measured is a server on a disk
    tools = {"bench": bench, "drill": drill, "spread": spread, "pressure": pressure,
             "large": large, "crowd": crowd}
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        sys.exit(f"usage: python3 test_hibernate.py {'|'.join(tools)}; the tests: -m pytest")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tools[sys.argv[1]](sys.argv[2:])
