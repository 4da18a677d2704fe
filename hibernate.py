#!/usr/bin/env python3
"""hibernate.py: an IMAP server for Maildirs whose idle sessions sleep, in one file.

    python3 hibernate.py            serves 127.0.0.1:1143, for a demo user with a made-up password
    python3 hibernate.py --help     the commands; hibernate.conf.example explains every setting

The one idea: a session is a descriptor plus a record. The descriptor is the client's socket, the
record a few hundred bytes that say all the rest. Who holds both is the session's home, and homes
change by one primitive, the hand-over of part 4.

    client ──► imap-login ──────► imap ◄──────► imap-hibernate
                   │ asks                       (a keeper: sleeps; wakes for input and for mail)
                   ▼
                 auth               master: opens the ports, forks, reaps; never holds a client

The life of a session:
 1. The master has opened the listeners and forked the processes (7, Master).
 2. imap-login accepts (5, Service.accept_client) and greets (10, LoginSession).
 3. LOGIN: imap-login asks auth (10, AuthSession), which checks the password and answers with the
    session's state, sealed for this very connection (4, seal).
 4. Descriptor and record go to imap (4, Mover; 5, Service.arriving), which says "OK Logged in".
 5. Commands run on a view of one mailbox (10, ImapSession, View; 8, Index; 9, Message).
 6. IDLE. At rest for imap_hibernate_timeout, the session is frozen (5, Client.record) and handed
    to a keeper (6, Keeper.hold): 384 bytes and a key in the selector, no object. A twin holds a
    copy (6, Keeper.guard) and goes on when the keeper is killed (6, Keeper.survive).
 7. Mail stirs the Maildir (5, Watcher), or the client sends something (6, Keeper.peek). "DONE" and
    "IDLE" the keeper answers by itself; for all else it hands the session back to imap.
 8. There it is thawed and looks for what has changed since (10, ImapSession.thaw, View).
 9. Reload, upgrade, or the master's death: each process hands its sessions to the same service of
    the next generation (5, Service.drain), by the very same primitive.
10. LOGOUT, an error or a farewell end it (5, Client.close; 6, Keeper.over): one line in the log.

Parts 1 to 7 are an engine that knows no IMAP: subclass Session, describe the services as Roles of
a Program, run Master(Config(program), ready).run().

Left out on purpose: TLS (put a proxy in front), SORT, THREAD, ACL, QUOTA, COMPRESS, NOTIFY,
CATENATE, system users, mbox, POP3, LMTP, sieve, replication.
"""
from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import collections
import contextlib
import ctypes
import datetime
import email.utils
import enum
import errno
import fcntl
import gc
import getpass
import grp
import hashlib
import heapq
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import os
import pwd
import re
import resource
import secrets
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from encodings.aliases import aliases
from functools import cached_property, lru_cache, partial, partialmethod
from logging.handlers import WatchedFileHandler
from typing import Any, BinaryIO, NamedTuple, NoReturn

__all__ = [
    "Ask", "Config", "ConfigError", "Master", "Move", "Pause", "Program", "Role", "Session",
    "Setting", "main",
]  # fmt: skip
__version__ = "0.1"

RECORD_VERSION = 1  # of what travels in a hand-over; what a process does not know it refuses
RECORD_LIMIT = 128 * 1024  # bytes of one message; stays below the default SO_SNDBUF of 208 KB
RESERVE = 64  # descriptors kept back for log, channels and index files: never for clients
IN_FLIGHT = 64  # hand-overs under way at once in one process; more of them are slower
ANSWER_TIME = 10.0  # seconds a sender waits for "+" before it goes on as the owner
COMMIT_TIME = 30.0  # seconds a receiver waits for "!": longer, so that the sender gives up first
SPEAK_TIME = 5.0  # seconds a new channel may stay silent
RETRY_TIME = 0.1  # seconds; one timer for all that was refused (10 ms once flooded Dovecot's log)
TICKET_TIME = 60  # seconds from a log-in to the worker
MOVE_TIME = 30.0  # seconds a log-in, or a sleeper whose client waits, tries to get a worker
MAIL_TIME = 300.0  # the same for a sleeper that has only news for its client
SLEEP_TIME = 1.0  # seconds of one attempt to fall asleep …
AWAKE_TIME = 5.0  # … and at least until the next: full keepers are not to be stormed
YOUNG = 20_000_000  # ns: a directory changed this recently may change again within one tick
OUTPUT_HIGH = 64 * 1024  # a reply pauses while this much waits for a slow client
BURST = 32  # chunks of one session's replies before the others have a turn
FULL_TIME = 10.0  # seconds that connections wait while all processes are full
REST_TIME = 30 * 60.0  # seconds without a command until log-out (RFC 3501 5.4)

log = logging.getLogger("hibernate")


# ------------------------------------------------------------------------------------------------
# 1  Configuration
#
# One row a setting: name, kind, default as one would write it, a sentence. Parser, `-n` and the
# example file follow from the rows. A mistake is reported as FILE:LINE: reason before anything is
# bound or forked; nothing here is ever guessed.
# ------------------------------------------------------------------------------------------------


class Failure(Exception):
    """Ends the program: the text goes to standard error, the status is one of sysexits(3)."""

    def __init__(self, status: int, text: object) -> None:
        super().__init__(text)
        self.status = status


class ConfigError(Failure):
    """`FILE:LINE: reason`; the command line exits with 78 (EX_CONFIG)."""


class Setting(NamedTuple):
    name: str  # one that begins with "@" is spelled with the program's prefix in the file
    kind: str  # see read()
    default: str
    help: str


@dataclass(frozen=True)
class Role:
    """What a service is: the program's part of it, which no configuration can change."""

    name: str
    session: type[Session]
    limits: tuple[str, str, str, str] = ("1000", "1", "1", "60 s")  # of LIMITS
    keeper: str = ""  # the service in which its sessions sleep; "" = they never do
    wakes: str = ""  # makes it a keeper: the service in which its sleepers wake
    requests: bool = False  # its inbox takes questions, not sessions
    trusted: bool = False  # it has the sealing key
    sheds: bool = False  # when all is full it drops its oldest session, not the newcomer
    unit: str = "connections"  # for the title in ps; "" = no number
    listener: str = ""  # its inet_listener when the file names none; "" = it can have none
    port: int = 0  # the default port of its listeners


@dataclass(frozen=True)
class Program:
    """A server: its services, and the settings that they have beyond the engine's."""

    name: str
    roles: tuple[Role, ...]
    settings: tuple[Setting, ...] = ()
    prefix: str = ""


SETTINGS = (
    Setting("base_dir", "path", "hibernate.run", "sockets, lock and sealing key"),
    Setting("log_path", "path", "", "the log file; empty: standard error"),
    Setting("@hibernate_timeout", "time", "30 s", "a session this long at rest sleeps; 0: never"),
    Setting("@hibernate_twin", "bool", "yes", "a second process guards each keeper's sessions"),
    Setting("@idle_notify_interval", "time", "2 mins", "keepalive of who listens; 0: none"),
    Setting("login_timeout", "time", "3 mins", "from the connection to the log-in"),
    Setting("orphan_timeout", "time", "60 s", "how long sessions wait for a new master"),
    Setting("verbose_proctitle", "bool", "yes", "show the number of clients in ps"),
)
LIMITS = (
    Setting("client_limit", "count", "", "clients in one process"),
    Setting("process_limit", "count", "", "processes of this service"),
    Setting("process_min_avail", "number", "", "processes with room, kept in reserve"),
    Setting("idle_kill", "time", "", "idle processes above the reserve end after this"),
    Setting("user", "user", "", "run as this user, if started by root"),
    Setting("group", "group", "", "run with this group, if started by root"),
)
LISTENER = (
    Setting("port", "port", "", "0: the kernel picks one"),
    Setting("address", "address", "127.0.0.1", "IPv4 or IPv6 address"),
    Setting("reuse_port", "bool", "no", "one SO_REUSEPORT socket for each process"),
)
LINE = re.compile(
    r"""\s* (?: ([\w.]+) \s* = \s*+ ((["']) ((?: \\["'\\] | (?!\3)[^\\] )*) \3 | (?!["']) .*?)
            | (\w+) \s+ "?([\w.-]+)"? \s* \{
            | (\}) )? \s* (?: (?<!\S) \#.* )?""", re.VERBOSE)
UNITS: dict[str, dict[str, float]] = {  # any beginning of a name will do
    "size": {"b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40},
    "time": {"secs": 1.0, "seconds": 1.0, "mins": 60.0, "minutes": 60.0, "msecs": 0.001,
             "hours": 3600.0, "days": 86400.0},
}
RANGES = {"count": range(1, 10**9), "number": range(10**9), "port": range(65536)}
BLOCKS = ("service", "inet_listener", "")  # in the file, in a service, in a listener


def read(kind: str, text: str) -> Any:
    """The value that `text` means; ValueError says what is expected.

    >>> read("time", "2 mins"), read("time", "200msecs"), read("size", "64 k"), read("bool", "No")
    (120.0, 0.2, 65536, False)
    """
    number, unit = (re.findall(r"\A([0-9]{1,9})\s*([a-z]*)\Z", text.lower()) or [("", "")])[0]
    if number and not unit and int(number) in RANGES.get(kind, ()):
        return int(number)
    for name, factor in UNITS.get(kind, {}).items() if number else ():
        # As in Dovecot, of times only zero may go without its unit.
        if name.startswith(unit) and (unit or kind == "size" or not int(number)):
            return int(number) * factor
    with contextlib.suppress(KeyError):
        if kind == "bool":
            return {"yes": True, "y": True, "no": False, "n": False}[text.lower()]
        if kind == "address":
            return str(ipaddress.ip_address(text))  # numeric: no resolver can hold up a start
        if text and kind in ("user", "group"):
            return pwd.getpwnam(text).pw_name if kind == "user" else grp.getgrnam(text).gr_name
        if kind in ("string", "path", "user", "group"):
            return text
    raise ValueError(f"{text!r} is not a {kind}" + " with its unit" * (kind == "time"))


class Section:
    """The settings of one block, read as attributes: the file's value, else the default."""

    def __init__(self, rows: Sequence[Setting], prefix: str = "") -> None:
        self.rows = {row.name.replace("@", prefix): row for row in rows}
        self.values = {row.name.strip("@"): read(row.kind, row.default) for row in rows}
        self.lines: dict[str, int] = collections.defaultdict(int)  # where the file sets it
        self.changed: dict[str, str] = {}  # what is not the default, as written in the file
        self.sections: dict[str, Section] = {}
        self.listener: Role | None = None  # whose inet_listeners it may hold

    def __getattr__(self, name: str) -> Any:
        if name == "values" or name not in self.values:
            raise AttributeError(name)
        return self.values[name]

    def put(self, key: str, text: str, written: str, line: int) -> None:
        """Read one `key = value`; ValueError says what is wrong with it."""
        if key not in self.rows:
            raise ValueError("there is no such setting here")
        row = self.rows[key]
        self.values[row.name.strip("@")] = value = read(row.kind, text)
        self.lines[key], self.changed[key] = line, written
        if value == read(row.kind, row.default):
            del self.changed[key]

    def open(self, name: str) -> Section:
        """The section inside this one; ValueError if there can be none."""
        if self.listener and name not in self.sections:
            port = LISTENER[0]._replace(default=str(self.listener.port))
            self.sections[name] = Section((port, *LISTENER[1:]))
        if name not in self.sections:
            raise ValueError(f"there is no {name} here")
        return self.sections[name]

    def dump(self, blocks: Sequence[str] = BLOCKS) -> list[str]:
        """What differs from the defaults, as the parser reads it."""
        lines = [f"{key} = {written}" for key, written in self.changed.items()]
        for name, section in self.sections.items():
            if inner := section.dump(blocks[1:]):
                lines += [f"{blocks[0]} {name} {{", *(f"  {line}" for line in inner), "}"]
        return lines


class Config(Section):
    """All settings of a program; without a file, the defaults. ConfigError names a mistake."""

    def __init__(self, program: Program, path: str = "") -> None:
        super().__init__((*SETTINGS, *program.settings), program.prefix)
        self.program, self.path = program, path
        self.folder = os.path.abspath(os.path.dirname(path))
        for role in program.roles:
            texts = *role.limits, "", ""
            rows = [row._replace(default=text) for row, text in zip(LIMITS, texts)]
            self.sections[role.name] = Section(rows)
            self.sections[role.name].listener = role if role.listener else None
        try:
            with open(path or os.devnull, encoding="utf-8", errors="replace") as file:
                self.parse(file.read().split("\n"))
        except OSError as error:
            self.fail(0, str(error.strerror))
        self.finish()

    def inbox(self, service: str) -> str:
        return os.path.join(self.base_dir, service)

    def fail(self, line: int, reason: str) -> NoReturn:
        raise ConfigError(78, f"{self.path or 'defaults'}:{line}: {reason}")

    def parse(self, lines: list[str]) -> None:
        """Dovecot's syntax: `key = value`, `service NAME {`, `inet_listener NAME {`, `}`."""
        stack: list[Section] = [self]
        for number, line in enumerate(lines, 1):
            match = LINE.fullmatch(line)
            if not match:
                self.fail(number, "expected 'key = value', 'service NAME {', or '}'")
            key, written, _, quoted, kind, name, closing = match.groups()
            try:
                if key:
                    text = written if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                    stack[-1].put(key, text, written, number)
                elif kind and kind != BLOCKS[len(stack) - 1]:
                    raise ValueError(f"there can be no {kind} here")
                elif kind:
                    stack.append(stack[-1].open(name))
                elif closing and stack.pop() is self:
                    raise ValueError("this '}' closes nothing")
            except ValueError as error:
                self.fail(number, f"{key}: {error}" if key else str(error))
        if len(stack) > 1:
            self.fail(len(lines), "'}' is missing")

    def finish(self) -> None:
        """Paths, which are relative to the file's own folder, and the checks of the whole."""
        for row in self.rows.values():
            if row.kind == "path" and (path := os.path.expanduser(self.values[row.name])):
                self.values[row.name] = os.path.normpath(os.path.join(self.folder, path))
        if max(len(os.fsencode(self.inbox(name + ".new"))) for name in self.sections) > 107:
            # sockaddr_un.sun_path, unix(7)
            self.fail(self.lines["base_dir"], "base_dir: too long for a socket's name")
        for name, service in self.sections.items():
            if service.listener and not service.sections:
                service.open(service.listener.listener)
            spare = service.process_limit - service.process_min_avail
            if spare < 0:
                line = max(service.lines.values())
                self.fail(line, f"{name}: process_min_avail is above process_limit")
            for listener in service.sections.values():
                if listener.reuse_port and spare:
                    reason = f"reuse_port: {name} needs process_min_avail = process_limit"
                    self.fail(listener.lines["reuse_port"], reason)


# ------------------------------------------------------------------------------------------------
# 2  Event loop and timers
#
# One selector, one heap of timers, one thread. Signals arrive as bytes in a pipe and so are
# events like any other: without that, a handler runs while select() sleeps on. A callback never
# blocks. One that raises is logged with its traceback and costs its own session, not the process.
# ------------------------------------------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(slots=True, order=True)
class Timer:
    """A call that is due at `when` (monotonic seconds). cancel() may come late, and twice."""

    when: float
    call: Callable[[], None] | None = field(compare=False)
    fd: int = field(compare=False)  # whose session a bug in it would cost; -1 nobody's

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Watches descriptors, as plain ints since a keeper has thousands, and calls what is due."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.keys = self.selector.get_map()
        self.timers: list[Timer] = []
        self.purge_at = 256  # so many timers are looked through for cancelled ones
        self.running = True
        self.failed: Callable[[int], None] = lambda fd: None
        self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def watch(self, fd: int, events: int, call: Callable[[int, int], None]) -> None:
        """call(fd, ready) from now on, in place of what was watched before; no events: unwatch,
        which must come before close(): epoll forgets a closed descriptor, selectors does not."""
        known = self.keys.get(fd)
        if known is None and events:
            self.selector.register(fd, events, call)
        elif known is not None and not events:
            self.selector.unregister(fd)
        elif known is not None and (known.events != events or known.data != call):
            self.selector.modify(fd, events, call)

    def unwatch(self, fd: int) -> None:
        self.watch(fd, 0, lambda fd, mask: None)

    def later(self, seconds: float, call: Callable[[], None], fd: int = -1) -> Timer:
        if len(self.timers) >= self.purge_at:
            self.timers = sorted(timer for timer in self.timers if timer.call)  # it is a heap too
            self.purge_at = 2 * len(self.timers) + 256
        timer = Timer(time.monotonic() + seconds, call, fd)
        heapq.heappush(self.timers, timer)
        return timer

    def on_signals(self, table: dict[int, Callable[[], None]]) -> None:
        """From now on a signal of `table` is a call from this loop."""

        def heard(fd: int, mask: int) -> None:
            for number in os.read(fd, 4096):
                table.get(number, lambda: None)()

        for number in table:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.bell[1], warn_on_full_buffer=False)
        self.watch(self.bell[0], READ, heard)

    def run(self) -> None:
        while self.running:
            wait = max(0.0, self.timers[0].when - time.monotonic()) if self.timers else None
            for key, mask in self.selector.select(wait):
                # An earlier event of this batch may have closed this descriptor, and its number
                # may belong to another session by now: only the very key registered counts.
                if self.keys.get(key.fd) is key:
                    self.guarded(key.fd, key.data, key.fd, mask)
            now = time.monotonic()
            while self.timers and self.timers[0].when <= now:
                timer = heapq.heappop(self.timers)
                if timer.call:
                    self.guarded(timer.fd, timer.call)

    def guarded(self, fd: int, call: Callable[..., None], *args: int) -> None:
        try:
            call(*args)
        except Exception:
            log.exception("a callback failed; it costs one session")
            if fd >= 0:
                self.unwatch(fd)  # or it would fail again at once, and for ever
                self.failed(fd)

    def close(self) -> None:
        """For a forked child: what it has copied is still the parent's."""
        self.selector.close()
        close_all(self.bell)


# ------------------------------------------------------------------------------------------------
# 3  Connections
#
# A client's socket belongs to the Client of part 5 or, asleep, is a plain number. A Channel joins
# two of our processes over SOCK_SEQPACKET: one send is one message, whole or not at all, and may
# carry one descriptor. Who closes unwatches first.
# ------------------------------------------------------------------------------------------------

SO_COOKIE = 57  # Linux: a number that no other socket of this boot has, socket(7)
Heard = Callable[[bytes, list[int]], None]


def end_socket(sock: socket.socket) -> None:
    """End the *session*: with a copy open in another process close() alone sends no FIN."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextlib.contextmanager
def borrowed(fd: int, family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """Socket methods for a descriptor held as a plain int, which stays open. The family matters
    for addresses alone; -1 asks the kernel for it."""
    sock = socket.socket(family, socket.SOCK_STREAM, 0 if family >= 0 else -1, fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def identity(sock: socket.socket) -> str:
    """Names this very connection; each receiver computes it anew. OSError: the client is gone.

    The cookie alone is not enough: a hostile holder can connect() a TCP socket elsewhere.
    """
    try:
        number = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
    except OSError:
        number = os.fstat(sock.fileno()).st_ino
    return f"{number}{sock.getpeername()}{sock.getsockname()}".replace(" ", "")


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors; b"" is the end. BlockingIOError, TimeoutError: not yet."""
    # Not socket.recv_fds(): it ignores its flags. MSG_CMSG_CLOEXEC comes back in `flags`.
    size, fds = socket.CMSG_SPACE(8 * 4), array("i")
    try:
        message, rights, flags, _ = sock.recvmsg(RECORD_LIMIT, size, socket.MSG_CMSG_CLOEXEC)
    except (BlockingIOError, TimeoutError):
        raise
    except OSError:
        return b"", []
    for _, _, data in rights:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or not message:
        close_all(fds)  # near the descriptor limit a message arrives without its descriptor
        return message, []
    return message, list(fds)


class Channel:
    """One SEQPACKET connection between two processes.

    heard(message, fds) is called for each message and owns its descriptors; b"" is the end of the
    channel, by the peer or after `timeout` seconds of silence, and comes once.
    """

    def __init__(self, loop: Loop, sock: socket.socket, heard: Heard, timeout: float = 0) -> None:
        self.loop, self.sock, self.heard = loop, sock, heard
        self.timer: Timer | None = None
        sock.setblocking(False)
        self.expire(timeout)
        loop.watch(sock.fileno(), READ, self.readable)

    def expire(self, seconds: float) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = self.loop.later(seconds, self.finish) if seconds else None

    def send(self, message: bytes, fd: int = -1) -> None:
        """OSError if it can't be sent. Never empty: that reads like the end."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        self.sock.sendmsg([message], rights if fd >= 0 else [])

    def readable(self, fd: int, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            message, fds = receive(self.sock)
            if message:
                self.heard(message, fds)
            else:
                self.finish()

    def finish(self) -> None:
        """Close, and tell this side that the channel has ended."""
        self.close()
        self.heard(b"", [])

    def close(self) -> None:
        """Close without a word; at any time, and twice."""
        self.expire(0)
        if self.sock.fileno() >= 0:
            self.loop.unwatch(self.sock.fileno())
            self.sock.close()


# ------------------------------------------------------------------------------------------------
# 4  Hand-over: one owner at every instant
#
#     sender (owner)                       receiver
#       connect; record + descriptor  ─►   checks, prepares, touches nothing
#                                     ◄─   "+" I hold it         (or "-reason": the sender goes on)
#       takes it off its books; "!"   ─►   starts: it is the owner now
#       closes its copy
#
# Only "!" makes the receiver start; end, reset or anything else before it means: close the copy,
# touch nothing. A sender gives up by closing. Taking the channel's end for the commit would make
# two owners: with an unread "+", Linux delivers ECONNRESET before what was sent earlier.
# ------------------------------------------------------------------------------------------------

RETRIED_ERRORS = "EAGAIN ECONNREFUSED ECONNRESET ENOENT ETOOMANYREFS EPIPE EMFILE ENFILE ENOBUFS"
RETRIED = {"full", "busy", "lost", *RETRIED_ERRORS.split()}  # any other reason is final


class State(NamedTuple):
    """The sealed part of a record: who the session is, and its protocol's own state."""

    expires: int  # unix time after which a log-in's ticket is refused; 0 for a session
    sid: str
    user: str
    since: int  # unix time of the log-in
    remote: str
    home: str
    watch: list[Any]  # [folder below home, st_mtime_ns of each watched directory]; [] none
    own: list[Any]

    @classmethod
    def decode(cls, text: str) -> State:
        """ValueError unless each field has its type: a keeper can't check the seal."""
        state = cls(*checked(text, (int, str, str, int, str, str, list, list)))
        folder, *times = state.watch or [""]
        if [type(item) for item in (folder, *times)] != [str] + [int] * len(times):
            raise ValueError("a watch that is none")
        if folder == ".." or re.search(r"[/\0]", folder):
            raise ValueError("a watch outside of home")
        return state


class Record(NamedTuple):
    """What travels beside the descriptor: a JSON array, which no client's byte can break.

    An added field goes at the end and has a default: the previous release's are understood.
    """

    tag: str  # a keeper may change it; its grammar is checked at every hop
    received: int  # bytes so far, for the log-out line
    sent: int
    pending: str  # input already read from the client, one character a byte
    answer: str  # the tag that the receiver still has to answer
    state: str  # State; sealed are these exact bytes
    seal: str

    def encode(self) -> bytes:
        return compact([RECORD_VERSION, *self]).encode()

    @classmethod
    def decode(cls, message: bytes) -> Record:
        """ValueError says what is wrong."""
        version, *row = checked(message.decode(), (int, str, int, int, str, str, str, str))
        if version != RECORD_VERSION or len(message) >= RECORD_LIMIT:
            raise ValueError(f"version {version}, {len(message)} bytes")
        if not all(0 <= count < 2**63 for count in row[1:3]):
            raise ValueError("counters")  # a slot has 64 bits for each
        return cls(*row)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def checked(text: str, kinds: tuple[type, ...]) -> list[Any]:
    """The JSON array `text`, as long as `kinds` and of these types; else ValueError."""
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, list) or [type(item) for item in row[: len(kinds)]] != [*kinds]:
        raise ValueError("not the fields that are expected")
    return row[: len(kinds)]


def seal(key: bytes, name: str, state: str) -> str:
    """What a taken-over log-in process or keeper can't make: `state`'s bytes, bound to the very
    connection that identity() calls `name`."""
    text = f"{len(name)} {name}{state}".encode()
    return base64.b64encode(hashlib.blake2s(text, key=key, digest_size=15).digest()).decode()


def ticket(
    key: bytes, name: str, sid: str, user: str, remote: str, home: str, own: list[Any]
) -> tuple[str, str]:
    """(state, seal) of a log-in, good for this connection and for TICKET_TIME seconds."""
    now = int(time.time())
    state = compact(State(now + TICKET_TIME, sid, user, now, remote, home, [], own))
    return state, seal(key, name, state)


class Mover:
    """The sender's half, for all sessions of a process; also asks questions of other services.

    At most IN_FLIGHT at once, the others wait in order of deadline; all that is refused is tried
    again from one timer. It calls parcel(fd) for the record (None: the session is over), then
    leaving(fd), "!" and given(fd); or else kept(fd, reason).
    """

    def __init__(self, loop: Loop, config: Config, owner: Service) -> None:
        self.loop, self.config, self.owner = loop, config, owner
        self.queue: list[tuple[float, int]] = []  # deadline, descriptor
        self.target: dict[int, tuple[str, float, bytes]] = {}  # service, deadline, question
        self.channels: dict[int, Channel] = {}
        self.resume_at = 0.0
        self.refusals: collections.Counter[str] = collections.Counter()

    def give(self, fd: int, service: str, patience: float, question: bytes = b"") -> None:
        """Hand the session over to `service`: ends in given() or, after `patience`, in kept().
        With a question nothing is handed over: kept() tells the answer, or ""."""
        self.target[fd] = service, time.monotonic() + patience, question
        heapq.heappush(self.queue, (self.target[fd][1], fd))
        self.pump()

    def keep(self, fd: int) -> None:
        """Give up: the receiver sees the channel's end and touches nothing."""
        self.target.pop(fd, None)
        if channel := self.channels.pop(fd, None):
            channel.close()
            if self.queue:  # there is a place for the next one
                self.loop.later(0, self.pump)

    def pump(self) -> None:
        while self.queue and len(self.channels) < IN_FLIGHT and time.monotonic() >= self.resume_at:
            deadline, fd = heapq.heappop(self.queue)
            service, known, question = self.target.get(fd, ("", 0.0, b""))
            if known != deadline or fd in self.channels:
                continue  # an entry of the past
            if not (message := question or self.owner.parcel(fd)):
                self.keep(fd)
                continue
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                channel = Channel(self.loop, sock, partial(self.answered, fd), ANSWER_TIME)
                self.channels[fd] = channel
                sock.connect(self.config.inbox(service))
                channel.send(message, -1 if question else fd)
            except OSError as error:
                self.refused(fd, errno.errorcode.get(error.errno or 0, "?"))

    def answered(self, fd: int, reply: bytes, fds: list[int]) -> None:
        close_all(fds)
        if reply and self.target[fd][2]:
            self.keep(fd)
            self.owner.kept(fd, reply.decode())
        elif reply == b"+":
            self.owner.leaving(fd)
            try:
                self.channels[fd].send(b"!")
            except OSError:
                self.refused(fd, "lost")
            else:
                self.keep(fd)
                self.owner.given(fd)
        else:
            self.refused(fd, reply[1:80].decode("ascii", "replace") or "lost")
        self.pump()

    def refused(self, fd: int, reason: str) -> None:
        self.refusals[reason] += 1
        target, now = self.target[fd], time.monotonic()
        self.keep(fd)
        if reason not in RETRIED or now >= target[1]:
            self.owner.kept(fd, "" if target[2] else reason)
            return
        self.target[fd] = target
        heapq.heappush(self.queue, (target[1], fd))
        if now >= self.resume_at:
            self.resume_at = now + RETRY_TIME
            self.loop.later(RETRY_TIME, self.pump)


# ------------------------------------------------------------------------------------------------
# 5  Service process
#
# A service is a number of forked processes that run the same Session class. A session takes bytes
# and yields bytes; the Client is its home here: socket, buffers, clock, watches. One function,
# Service.update(), decides whether this process accepts. When the channel to the master ends, the
# master is dead or has become the next generation; it makes no difference: every session goes to
# the same service's inbox, by the one way there is.
# ------------------------------------------------------------------------------------------------


# What a session may yield besides bytes:
Ask = NamedTuple("Ask", [("service", str), ("message", bytes)])  # a question; gives the answer
Pause = NamedTuple("Pause", [("seconds", float)])  # go on later, execute nothing meanwhile
Move = NamedTuple(  # go on in another service; comes back only with the reason why not
    "Move", [("service", str), ("ticket", str), ("seal", str), ("answer", str)]
)
Reply = Generator["bytes | Ask | Pause | Move", Any, None]


class Session:
    """A protocol as the engine sees it: subclass it. It never meets a socket or a process.

    The engine appends input to `buffer` and calls step() until that returns None. What the
    session wants it yields: bytes, Ask, Pause, Move. `ended = reason` closes the connection when
    all is sent; a non-empty `tag` says that it listens for changes below home/folder.
    """

    input_limit = 64 * 1024  # no more is read from the client while this much is in `buffer`
    watch_dirs: tuple[str, ...] = ()  # at most two, below home/folder
    tag_syntax = re.compile("")
    still_here = b""  # keepalive for who listens

    config: Config  # these are set by the engine, before any call
    key = b""
    sid = user = remote = home = identity = ""
    since = 0  # unix time of the log-in

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.tag = self.ended = ""

    def opened(self) -> Reply:
        """A new connection: the greeting."""
        yield from ()

    def arrived(self, answer: str) -> Reply:
        """Handed over to this process; `answer` is the tag that still waits for a reply."""
        yield from ()

    def step(self) -> Reply | None:
        """Take the next command off `buffer`, return its reply; None: more input is needed."""
        return None

    def stirred(self) -> Reply:
        """A watched directory has changed, or may have."""
        yield from ()

    def movable(self) -> bool:
        """Does freeze() say all, now? (`buffer` and `tag` travel along by themselves.)"""
        return True

    def freeze(self) -> list[Any]:
        return []

    def thaw(self, own: list[Any]) -> None:
        """The reverse of freeze(): quick, touches nothing; ValueError if it makes no sense."""

    def watch(self) -> tuple[str, tuple[int, ...]] | None:
        """(folder, st_mtime_ns of each of watch_dirs as it was before the last look), or None."""
        return None

    @classmethod
    def peeked(cls, tag: str, data: bytes) -> tuple[bytes, int, str] | None:
        """What a sleeper answers by itself: (answer, bytes used up, new tag); None: wake it."""
        return None

    @classmethod
    def farewell(cls, reason: str) -> bytes:
        return b""

    def closed(self) -> None:
        """The session ends here, or has moved on."""

    def log(self, text: str) -> None:
        log.info("<%s> %s", self.sid, text)


def seconds_to_beat(interval: float, remote: str, user: str) -> float:
    """Until the next keepalive. Its phase hangs on the address if that is public, else on the
    user: a phone's radio wakes once for all its sessions, and the others are spread."""
    address = remote.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        user = address if ipaddress.ip_address(address).is_global else user
    return interval - (time.time() + zlib.crc32(user.encode())) % interval


class Watcher:
    """Tells whose directories have changed: one inotify(7) instance a process, one watch a
    directory however many sessions share it. Without inotify, or with no watches left, the
    directory's time is looked at every POLL seconds instead."""

    MASK = 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800  # ATTRIB … MOVE_SELF, not MODIFY
    OVERFLOW = 0x4000
    POLL = 3.0

    def __init__(self, loop: Loop, stirred: Callable[[int], None]) -> None:
        self.loop = loop
        self.stirred = stirred
        self.sessions: dict[int, int | array[int]] = {}  # sets would take 216 or 728 bytes each
        self.polled: dict[int, tuple[str, int]] = {}  # numbers below -1: (path, its time)
        self.warned = False
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = -1
        with contextlib.suppress(AttributeError):
            self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd >= 0:
            loop.watch(self.fd, READ, self.readable)

    def add(self, path: str, fd: int) -> int:
        """Watch `path` for the session `fd`; the number returned is never 0."""
        number = self.fd
        if number >= 0:
            number = self.libc.inotify_add_watch(self.fd, os.fsencode(path), self.MASK)
        if number < 0:
            number = self.poll_for(path)
        known = self.sessions.setdefault(number, fd)
        if isinstance(known, array) and fd not in known:
            known.append(fd)
        elif isinstance(known, int) and known != fd:
            self.sessions[number] = array("i", (known, fd))
        return number

    def poll_for(self, path: str) -> int:
        if not self.warned:
            self.warned = True
            log.warning("inotify: %s; looking at times", os.strerror(ctypes.get_errno()))
        if not self.polled:
            self.loop.later(self.POLL, self.poll)
        for number, (known, _) in self.polled.items():
            if known == path:
                return number
        number = min(self.polled, default=-1) - 1
        self.polled[number] = path, directory_time(path)
        return number

    def drop(self, number: int, fd: int) -> None:
        known = self.sessions.get(number)
        if isinstance(known, array) and len(known) > 1:
            with contextlib.suppress(ValueError):
                known.remove(fd)
        elif known in (fd, array("i", [fd])):
            del self.sessions[number]
            if self.polled.pop(number, None) is None:
                self.libc.inotify_rm_watch(self.fd, number)

    def readable(self, fd: int, mask: int) -> None:
        data = os.read(fd, 64 * 1024)
        numbers = set()
        at = 0
        while at < len(data):
            number, kind, _, length = struct.unpack_from("iIII", data, at)
            at += 16 + length
            numbers.add(number)
            if kind & self.OVERFLOW:  # events were lost: look at all
                numbers.update(self.sessions)
        for number in numbers:
            self.stir(number)

    def stir(self, number: int) -> None:
        known = self.sessions.get(number, array("i"))
        for fd in [known] if isinstance(known, int) else list(known):
            self.loop.guarded(fd, self.stirred, fd)

    def poll(self) -> None:
        for number, (path, before) in list(self.polled.items()):
            self.polled[number] = path, directory_time(path)
            if self.polled[number][1] != before:
                self.stir(number)
        if self.polled:
            self.loop.later(self.POLL, self.poll)


def directory_time(path: str) -> int:
    """st_mtime_ns, 0 if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def changed_since(paths: list[str], times: Sequence[int], young: int) -> bool:
    """Has a directory another time than it had, or one less than `young` ns ago?"""
    now = time.time_ns()
    found = [directory_time(path) for path in paths]
    return found != list(times) or any(abs(now - stamp) < young for stamp in found)


class Phase(enum.Enum):
    RUNNING = "executes commands, or is at rest"
    WAITING = "its reply waits for another process, or for time"
    MOVING = "a hand-over is under way: nothing is read or written"
    CLOSED = "not ours any more"


@dataclass(slots=True, eq=False)
class Client:
    """One session awake in this process, and its socket: its home between two hand-overs."""

    service: Service
    sock: socket.socket
    session: Session
    received: int = 0
    sent: int = 0
    answer: str = ""
    output: bytearray = field(default_factory=bytearray)
    reply: Reply | None = None
    phase: Phase = Phase.RUNNING
    eof: bool = False
    rested: float = field(default_factory=time.monotonic)  # at rest (before log-in: here) since
    beat: float = 0.0  # when the next keepalive is due; 0: none
    timer: Timer | None = None  # what comes next at rest: see clock()
    turn: Timer | None = None  # the others first, or a Pause; then go on
    move: Move | None = None
    watches: list[int] = field(default_factory=list)
    loop: Loop = field(init=False)
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.loop, self.fd = self.service.loop, self.sock.fileno()
        self.sock.setblocking(False)  # O_NONBLOCK travels with a descriptor, or does not

    def start(self, reply: Reply) -> None:
        self.reply = reply
        self.pump()

    def ready(self, fd: int, mask: int) -> None:
        self.stay()
        if mask & READ:
            try:
                # No more than the limit: a log-in carries it along in its record.
                free = self.session.input_limit - len(self.session.buffer)
                data = self.sock.recv(max(free, 1))
            except BlockingIOError:
                return
            except OSError as error:
                self.close(f"connection lost: {error.strerror}")
                return
            self.eof = not data  # a half-close: the commands before it still run
            self.received += len(data)
            self.session.buffer += data
        self.pump()

    def pump(self, value: Any = None) -> None:
        """Run the session until it waits: for its client, the network or another process."""
        for _ in range(BURST):
            if self.phase is not Phase.RUNNING or len(self.output) >= OUTPUT_HIGH:
                break
            try:
                if self.reply is None and not self.session.ended:
                    self.reply = self.session.step()
                if self.reply is None:
                    break
                item = self.reply.send(value)
            except StopIteration:
                self.reply = None
            except Exception:  # here, or it would cost who called: inotify, or the master's channel
                log.exception("a session failed; it ends")
                self.close("Internal error", farewell=True)
                return
            else:
                self.perform(item)
            value = None
        else:
            self.turn = self.turn or self.loop.later(0, self.go_on, self.fd)
        self.settle()

    def perform(self, item: bytes | Ask | Pause | Move) -> None:
        if isinstance(item, bytes):
            self.output += item
            return
        self.phase = Phase.WAITING
        if isinstance(item, Ask):
            self.service.mover.give(self.fd, item.service, MOVE_TIME, item.message)
        elif isinstance(item, Pause):
            self.turn = self.loop.later(item.seconds, self.go_on, self.fd)
        else:
            self.move = item  # begun by settle() when all is sent

    def go_on(self, value: Any = None) -> None:
        """What the reply waited for is here."""
        self.turn = None
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.RUNNING
            self.pump(value)

    def flush(self) -> bool:
        """Send what the kernel takes; False if the client turns out to be gone."""
        try:
            while self.output:
                count = self.sock.send(self.output)
                self.sent += count
                del self.output[:count]
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(f"connection lost: {error.strerror}")
        return self.phase is not Phase.CLOSED

    def settle(self) -> None:
        """After each run: send, decide what to watch for, and see whether this is rest."""
        if self.phase in (Phase.CLOSED, Phase.MOVING) or not self.flush():
            return
        if self.reply and self.phase is Phase.RUNNING and len(self.output) < OUTPUT_HIGH:
            self.turn = self.turn or self.loop.later(0, self.go_on, self.fd)
        busy = self.output or self.reply or self.turn
        if self.session.ended and not busy:
            self.close(self.session.ended)
        elif self.move and not self.output:
            self.depart(self.move.service, MOVE_TIME)
        else:
            reads = not self.eof and len(self.session.buffer) < self.session.input_limit
            self.loop.watch(self.fd, READ * reads | WRITE * bool(self.output), self.ready)
            if not busy:
                self.rest()

    def rest(self) -> None:
        """Nothing to execute, nothing to send: listen, sleep later, or move on now."""
        if self.session.user:
            self.rested = time.monotonic()
        if self.eof:
            self.close("client closed the connection")
        elif self.service.draining and self.session.movable():
            self.depart(self.service.role.name, self.session.config.orphan_timeout)
        elif self.listen():
            self.start(self.session.stirred())
        else:
            self.clock()

    def listen(self) -> bool:
        """Watch while there is a tag. True: the session must look again, now that we watch."""
        session = self.session
        if not session.tag or not (watch := session.watch()):
            self.unlisten()
            return False
        paths = [os.path.join(session.home, watch[0], name) for name in session.watch_dirs]
        known = bool(self.watches)
        self.watches = self.watches or [self.service.watcher.add(at, self.fd) for at in paths]
        return changed_since(paths, watch[1], 0 if known else YOUNG)

    def unlisten(self) -> None:
        for number in self.watches:
            self.service.watcher.drop(number, self.fd)
        self.watches = []

    def stir(self) -> None:
        self.stay()
        if self.phase is Phase.RUNNING and not self.reply and not self.session.ended:
            self.start(self.session.stirred())

    def clock(self) -> None:
        """At rest: do what is due, then set the timer for what is next. It may fire in vain:
        commands are too many to set it anew after each."""
        session, config, now = self.session, self.session.config, time.monotonic()
        if self.phase is not Phase.RUNNING or self.reply or self.output:
            due = now + 1.0
        elif not session.user:
            limit = SPEAK_TIME if self.service.role.requests else config.login_timeout
            due = self.rested + limit
            if due <= now:
                return self.close("log-in took too long", farewell=True)
        elif self.service.role.keeper and config.hibernate_timeout and session.movable():
            due = self.rested + config.hibernate_timeout
            if due <= now:
                return self.depart(self.service.role.keeper, SLEEP_TIME)
        else:
            due = self.rested + REST_TIME
            if due <= now and not session.tag:
                return self.close("Autologout; idle for too long", farewell=True)
        if session.tag and config.idle_notify_interval and session.still_here:
            if 0 < self.beat <= now and not self.output:
                self.output += session.still_here
                if not self.flush():
                    return None
            if self.beat <= now:
                wait = seconds_to_beat(config.idle_notify_interval, session.remote, session.user)
                self.beat = now + wait
            due = min(due, self.beat)
        if self.timer and (self.timer.when <= now or self.timer.when > due):
            self.timer.cancel()
            self.timer = None
        self.timer = self.timer or self.loop.later(max(due - now, 0.01), self.clock, self.fd)
        return None

    def depart(self, service: str, patience: float) -> None:
        """Begin to hand over. Should its client stir meanwhile, a sleeper-to-be stays."""
        self.phase = Phase.MOVING
        self.loop.watch(self.fd, 0 if self.move else READ, self.ready)
        self.service.mover.give(self.fd, service, patience)

    def stay(self) -> None:
        if self.phase is Phase.MOVING and not self.move:
            self.service.mover.keep(self.fd)
            self.phase = Phase.RUNNING

    def record(self) -> bytes:
        """Freeze the session. Its state is sealed here, but for a log-in: that auth has sealed."""
        session, answer = self.session, ""
        if self.move:
            _, state, sealed, answer = self.move
        else:
            watch = session.watch()
            times = [watch[0], *watch[1]] if watch else []
            state = compact(self.state()._replace(watch=times, own=session.freeze()))
            sealed = seal(session.key, identity(self.sock), state) if session.key else ""
        pending = session.buffer.decode("latin-1")
        carried = session.tag, self.received, self.sent, pending
        return Record(*carried, answer, state, sealed).encode()

    def state(self) -> State:
        s = self.session
        return State(0, s.sid, s.user, s.since, s.remote, s.home, [], [])

    def kept(self, reason: str) -> None:
        """The hand-over did not come about, or a question is answered: go on as before."""
        if self.phase is Phase.WAITING or self.move:
            self.move = None
            self.go_on(reason)
            return
        self.stay()
        if self.service.draining:
            self.close("server was shut down", farewell=True)
            return
        if reason not in RETRIED | {"changed"}:
            log.warning("<%s> stays awake: %s", self.session.sid, reason)
        self.pump()
        self.rested += max(0.0, AWAKE_TIME - self.session.config.hibernate_timeout)

    def close(self, reason: str, farewell: bool = False) -> None:
        """End the session, whatever it was doing; at any time, and twice."""
        if self.phase is Phase.CLOSED:
            return
        if farewell:
            self.output += self.session.farewell(reason)
            with contextlib.suppress(OSError):
                self.sock.send(self.output)
        self.release()
        if isinstance(self.session, Report):
            self.sock.close()  # the others still write to it
        else:
            end_socket(self.sock)
            self.service.ended(self.session, reason, self.received, self.sent)

    def release(self) -> None:
        """Free what the session holds in this process, the open socket apart."""
        self.phase = Phase.CLOSED
        self.loop.unwatch(self.fd)
        self.service.mover.keep(self.fd)
        self.unlisten()
        for timer in filter(None, (self.timer, self.turn)):
            timer.cancel()
        with contextlib.suppress(ValueError):  # it is the reply itself that ends the session
            if self.reply:
                self.reply.close()
        self.session.closed()
        self.service.clients.pop(self.fd, None)


class Service:
    """A process of a service: accepts, adopts, reports, and moves its sessions on.

    `Any` in prepare(), begin() and abandon() is what this kind of process holds of a session
    between "+" and "!": here a Client, in a keeper less.
    """

    def __init__(self, master: Master, pool: Pool, slot: int, generation: int) -> None:
        self.config = master.config
        self.role = pool.role
        self.peers = master.peers
        self.slot = slot
        self.generation = generation
        self.inbox = pool.inbox
        self.groups = pool.listeners  # one a listener: one socket, or one for each slot
        self.limit: int = min(pool.settings.client_limit, file_limit() - RESERVE)
        self.counts: collections.Counter[str] = collections.Counter()
        self.draining = False
        self.stretched = False  # all are full: take a few more from the inbox, or refuse them
        self.covered = {slot}  # the SO_REUSEPORT sockets that this process reads
        self.paused = False  # no descriptors left
        self.title = Title(f"{self.config.program.name}/{self.role.name}")
        self.key = sealing_key(self.config.base_dir) if self.role.trusted else b""
        drop_privileges(pool.settings)

    def start(self, channel: socket.socket) -> None:
        """What is this process's own; a keeper's survivor makes it anew."""
        self.loop = Loop()
        self.loop.failed = self.failed
        self.mover = Mover(self.loop, self.config, self)
        self.watcher = Watcher(self.loop, self.stirred)
        self.clients: dict[int, Client] = {}
        self.arrivals: dict[Channel, Any] = {}
        self.told: tuple[int, int] | None = None  # (room, sessions) as last reported
        self.report_timer: Timer | None = None
        self.loop.on_signals({signal.SIGTERM: self.stop})
        self.master: Channel | None = Channel(self.loop, channel, self.word)
        self.update()

    def run(self, channel: socket.socket) -> None:
        """Serve until told to stop, or until the last session has left after a drain."""
        self.start(channel)
        self.loop.run()

    # Who accepts

    def count(self) -> int:
        return len(self.clients)

    def room(self) -> int:
        return self.limit - self.count() - len(self.arrivals)

    def update(self) -> None:
        """The one place that decides whether this process accepts, and what the master hears."""
        room = self.room()
        self.stretched = self.stretched and room <= 0
        accepts = not self.draining and not self.paused
        spare = self.limit // 4 if self.stretched else 0
        shed = spare > 0 and self.role.sheds
        for slot, sock in self.sockets():
            wanted = accepts and (room > 0 or shed) and (slot < 0 or slot in self.covered)
            self.loop.watch(sock.fileno(), READ * wanted, self.accept_client)
        if self.inbox.fileno() >= 0:
            self.loop.watch(self.inbox.fileno(), READ * (accepts and room + spare > 0), self.invite)
        told = (max(0, room), self.count())
        if self.told is None or (self.told[0] == 0) != (told[0] == 0):
            self.report()
        elif told != self.told and not self.report_timer:
            self.report_timer = self.loop.later(1.0, self.report)
        if self.draining and not self.count() and not self.arrivals:
            self.loop.running = False

    def sockets(self) -> list[tuple[int, socket.socket]]:
        """(slot, socket) of each open inet listener; slot -1 where all share one."""
        return [
            (slot if len(group) > 1 else -1, sock)
            for group in self.groups for slot, sock in enumerate(group) if sock.fileno() >= 0
        ]  # fmt: skip

    def report(self) -> None:
        """Room 0 ↔ non-0 at once, the rest once a second; the generation shows a stale one."""
        if self.report_timer:
            self.report_timer.cancel()
            self.report_timer = None
        self.told = max(0, self.room()), self.count()
        with contextlib.suppress(OSError):  # the channel's end will say so
            if self.master:
                report = [self.generation, *self.told, os.getpid()]
                self.master.send(compact(report).encode())
        if self.config.verbose_proctitle:
            unit = self.role.unit and f" [{self.count()} {self.role.unit}]"
            self.title.set(f"{self.config.program.name}/{self.role.name}{unit}")

    def accept(self, listener: int) -> socket.socket | None:
        """One connection; None if another process was faster, or no descriptor is left."""
        with borrowed(listener) as sock:
            try:
                return socket.socket(fileno=sock.accept()[0].detach())  # with its true family
            except (BlockingIOError, ConnectionError):
                return None
            except OSError as error:
                # EMFILE and its kin: a level-triggered listener would spin.
                log.error("accept: %s; pausing for a second", error.strerror)
                self.paused = True
                self.loop.later(1.0, self.unpause)
                return None

    def unpause(self) -> None:
        self.paused = False
        self.update()

    def accept_client(self, listener: int, mask: int) -> None:
        """In small bites, so that siblings get their share of a burst."""
        for _ in range(4):
            if (self.room() <= 0 and not self.shed()) or not (sock := self.accept(listener)):
                break
            self.welcome(sock)
        self.update()

    def shed(self) -> bool:
        """Make room: the oldest session that has not tried to log in gives way."""
        idle = [client for client in self.clients.values() if client.phase is Phase.RUNNING]
        if self.role.sheds and self.stretched and idle:
            min(idle, key=lambda client: client.rested).close("Too many connections", True)
        return self.room() > 0

    def welcome(self, sock: socket.socket) -> None:
        """A client from outside, or, without an address, one of our processes with a question."""
        try:
            session = self.new_session(sock.fileno())
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                host, port = sock.getpeername()[:2]
                session.remote = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except OSError:
            sock.close()
            return
        session.sid, session.since = secrets.token_urlsafe(9), int(time.time())
        client = Client(self, sock, session)
        self.clients[client.fd] = client
        client.start(session.opened())

    # Hand-over, the receiver's half

    def invite(self, listener: int, mask: int) -> None:
        """A channel to the inbox: it counts as a client from now on."""
        sock = self.accept(listener)
        if sock and not self.trusts(sock):
            sock.close()
        elif sock and self.role.requests:
            self.welcome(sock)
        elif sock:
            self.expect(sock, None, SPEAK_TIME)
        self.update()

    def expect(self, sock: socket.socket, held: Any, timeout: float) -> None:
        """Listen to a sender: for its record, or, if that is held, for its "!"."""

        def heard(message: bytes, fds: list[int]) -> None:
            self.arriving(channel, message, fds)

        channel = Channel(self.loop, sock, heard, timeout)
        self.arrivals[channel] = held

    def trusts(self, sock: socket.socket) -> bool:
        """Is the peer one of our processes? The kernel knows its user: SO_PEERCRED, unix(7)."""
        if not hasattr(socket, "SO_PEERCRED"):
            return True  # elsewhere the mode of base_dir is the only guard
        uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in self.peers:
            log.warning("a process of user %d was turned away", uid)
        return uid in self.peers

    def arriving(self, channel: Channel, message: bytes, fds: list[int]) -> None:
        held = self.arrivals[channel]
        if message and held is None:
            try:
                if len(fds) != 1:
                    raise ValueError("descriptor" if fds else "busy")
                record, state = self.read_record(message)
                self.arrivals[channel] = self.hold(record, state, fds[0], channel)
                word = "+"
                channel.expire(0)
                channel.timer = self.loop.later(COMMIT_TIME, lambda: self.silent(channel))
            except (ValueError, OSError) as error:
                close_all(fds)
                self.counts[f"refused {error}"[:60]] += 1
                if str(error) not in RETRIED | {"changed"}:
                    log.warning("a session was refused: %.70s", error)
                word = f"-{error}"[:80]
            with contextlib.suppress(OSError):  # a sender that has left: its end comes next
                channel.send(word.encode())
            return
        del self.arrivals[channel]
        channel.close()
        close_all(fds)
        if message == b"!":
            self.begin(held)
        elif held is not None:  # the sender has given up, or is gone: touch nothing
            self.abandon(held)
        self.update()

    def silent(self, channel: Channel) -> None:
        """The sender was told "+" and is stopped: end the session, so that no client hangs."""
        log.warning("a hand-over was not committed within %d s", COMMIT_TIME)
        self.abandon(self.arrivals.pop(channel), shutdown=True)
        channel.close()
        self.update()

    def read_record(self, message: bytes) -> tuple[Record, State]:
        record = Record.decode(message)
        if record.tag and not self.role.session.tag_syntax.fullmatch(record.tag):
            raise ValueError("tag")
        return record, State.decode(record.state)

    def hold(self, record: Record, state: State, fd: int, channel: Channel) -> Any:
        """Check, and hold session and descriptor, ready to begin(). ValueError and OSError say
        why not, and leave `fd` to the caller."""
        if state.expires and self.room() < 0:
            raise ValueError("full")  # only who sleeps may exceed the limit, so that it can wake
        session = self.new_session(fd)
        fits = seal(self.key, session.identity, record.state) if self.role.trusted else record.seal
        if not hmac.compare_digest(fits.encode(), record.seal.encode()):
            raise ValueError("seal")
        if state.expires and not 0 <= state.expires - time.time() <= TICKET_TIME:
            raise ValueError("ticket too late")
        _, session.sid, session.user, session.since, session.remote, session.home, _, own = state
        session.tag = record.tag
        session.buffer += record.pending.encode("latin-1")
        session.thaw(own)
        sock = socket.socket(fileno=fd)
        return Client(self, sock, session, record.received, record.sent, record.answer)

    def new_session(self, fd: int) -> Session:
        session = self.role.session()
        session.config, session.key = self.config, self.key
        with borrowed(fd, -1) as sock:
            session.identity = identity(sock)
        return session

    def begin(self, client: Any) -> None:
        """The "!" has come: this process is the owner."""
        self.clients[client.fd] = client
        self.counts["adopted"] += 1
        client.start(client.session.arrived(client.answer))

    def abandon(self, client: Any, shutdown: bool = False) -> None:
        """Not ours: close the copy and touch nothing; `shutdown` ends it for every holder."""
        client.session.closed()
        if shutdown:
            end_socket(client.sock)
        client.sock.close()

    # Hand-over, the sender's half: see Owner

    def parcel(self, fd: int) -> bytes | None:
        try:
            return self.clients[fd].record()
        except OSError as error:
            self.clients[fd].close(f"connection lost: {error.strerror}")
            return None

    def leaving(self, fd: int) -> None:
        """Nothing to mark: until "!" is sent this process can go on with it."""

    def given(self, fd: int) -> None:
        client = self.clients[fd]
        client.release()
        client.sock.close()
        self.counts["moved on"] += 1
        self.update()

    def kept(self, fd: int, reason: str) -> None:
        self.clients[fd].kept(reason)

    # All sessions, and one of them; a keeper has its own of these

    def states(self) -> Iterator[tuple[int, State]]:
        for fd, client in list(self.clients.items()):
            if client.phase is not Phase.CLOSED:  # by what was done with one before it
                yield fd, client.state()

    def stirred(self, fd: int) -> None:
        self.clients[fd].stir()

    def failed(self, fd: int) -> None:
        if fd in self.clients:
            self.end(fd, "Internal error")

    def end(self, fd: int, reason: str) -> None:
        self.clients[fd].close(reason, farewell=True)

    def move_on(self, fd: int) -> None:
        """Draining: to the next generation, at the next boundary; not to sleep any more."""
        client = self.clients[fd]
        client.stay()
        if client.phase is Phase.RUNNING:
            client.pump()

    def ended(self, session: Session | State, reason: str, received: int, sent: int) -> None:
        if not self.role.requests:
            who = f"<{session.sid}> {session.user or session.remote}"
            log.info("%s ended: %s, in=%d out=%d", who, reason, received, sent)
        self.update()

    # Words of the master, and its end

    def word(self, message: bytes, fds: list[int]) -> None:
        name, _, rest = message.decode().partition(" ")
        if not message:
            self.master = None
            self.drain()
        elif name in ("who", "status", "kick") and fds:
            report = Report(self, name, rest)
            Client(self, socket.socket(fileno=fds.pop()), report).start(report.opened())
        elif name == "stop":
            self.stop()
        elif name == "close":
            self.close_listeners()
        elif name == "end-if-idle" and not self.count() and not self.arrivals:
            self.loop.running = False
        elif name == "cover":
            self.covered = {self.slot, *map(int, rest.split())}
        elif name == "full":
            self.stretched = True
            if float(rest) > FULL_TIME and not self.role.sheds:
                self.relieve()
        close_all(fds)
        self.update()

    def relieve(self) -> None:
        """All have been full for long: a clear good-bye to those who wait."""
        for _, sock in self.sockets():
            while self.room() <= 0 and (newcomer := self.accept(sock.fileno())):
                with contextlib.suppress(OSError):  # it may have left
                    newcomer.send(self.role.session.farewell("Too many connections"))
                end_socket(newcomer)

    def close_listeners(self) -> None:
        """Serve what waits in the queues first: closing them would reset it."""
        for _, sock in self.sockets():
            while newcomer := self.accept(sock.fileno()):
                self.welcome(newcomer)
            self.loop.unwatch(sock.fileno())
            sock.close()

    def drain(self) -> None:
        """The master is gone. What comes next has the same inboxes: hand everything over."""
        self.draining = True
        self.close_listeners()
        if self.inbox.fileno() >= 0:
            self.invite(self.inbox.fileno(), READ)
            self.loop.unwatch(self.inbox.fileno())
            end_socket(self.inbox)  # not only close(): in a twin's copy senders would wait
        self.loop.later(self.config.orphan_timeout, self.stop)
        for fd, _ in self.states():
            self.move_on(fd)
        self.update()

    def stop(self) -> None:
        """End all sessions with a farewell, then the process."""
        for fd, _ in self.states():
            self.end(fd, "Server shutting down.")
        self.loop.running = False


class Report(Session):
    """Lines for the command line, in JSON: a session only so that a slow reader is no matter."""

    def __init__(self, service: Service, what: str, user: str) -> None:
        super().__init__()
        self.service, self.what, self.only = service, what, user

    def opened(self) -> Reply:
        service = self.service
        row: dict[str, Any] = {"service": service.role.name, "pid": os.getpid()}
        count = 0
        for fd, state in service.states() if self.what != "status" else ():
            if self.what == "kick" and state.user == self.only:
                service.end(fd, "Disconnected by the administrator")
                count += 1
            elif self.what == "who" and not service.role.requests:
                rest = dict(zip(("session", "user", "since", "remote"), state[1:5]))
                yield compact(row | rest).encode() + b"\n"
        if self.what == "kick":
            yield compact(row | {"kicked": count}).encode() + b"\n"
        elif self.what == "status":
            row |= {"slot": service.slot, "clients": service.count(), "room": service.room()}
            row |= {"counts": service.counts, "refusals": service.mover.refusals}
            yield compact(row).encode() + b"\n"
        self.ended = "done"


def file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def sealing_key(base_dir: str) -> bytes:
    with open(os.path.join(base_dir, "key"), "rb") as file:
        return file.read(32)


def drop_privileges(settings: Section) -> None:
    """Become the service's user for good, if root; gain no rights by an exec. prctl(2)"""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if os.getuid() == 0 and (settings.user or settings.group):
        account = pwd.getpwnam(settings.user or "root")
        group = grp.getgrnam(settings.group).gr_gid if settings.group else account.pw_gid
        os.setgroups([group])
        os.setgid(group)
        os.setuid(account.pw_uid)


class Title:
    """What ps shows: the argument area, whose bounds are in /proc/self/stat, proc(5)."""

    def __init__(self, text: str) -> None:
        self.start = self.size = 0
        with contextlib.suppress(OSError):
            with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            self.start, self.size = int(fields[45]), int(fields[46]) - int(fields[45])
        self.set(text)

    def set(self, text: str) -> None:
        if self.size > 1:
            # Without a NUL at its end the kernel would read on into the environment.
            data = text.encode()[: self.size - 1].ljust(self.size, b"\0")
            ctypes.memmove(self.start, data, self.size)


# ------------------------------------------------------------------------------------------------
# 6  Keeper
#
# A sleeper is a descriptor in the selector and one slot of an anonymous mmap, found by the
# descriptor's number: no object, no timer. The keeper peeks and never reads, so what a client
# sends is still in the socket for the worker: nothing lost, nothing doubled. While a sleeper waits
# to wake, its descriptor is not watched: left armed it costs a whole core.
# ------------------------------------------------------------------------------------------------

SLOT_SIZE = 384
SLOT = struct.Struct("<BBHHiiIQQ")
# The first byte of a slot. GONE: "!" is about to be sent; OFFERED: it has not come yet, and CHANNEL
# is the slot of the descriptor on which it will, with the session's number.
FREE, HELD, GONE, OFFERED, CHANNEL = range(5)
LIVING = (HELD, OFFERED, CHANNEL)
SWEEP_TIME = 2.0  # seconds between two looks of a twin
TWIN_TIME = 1000  # milliseconds that a keeper waits for a twin that does not read, at most
ARMED = 200  # sessions that a survivor watches for mail before the others have a turn


class Sleeper(NamedTuple):
    """A slot, unpacked."""

    state: int = FREE
    tag: str = ""
    tail: str = ""  # JSON of [state, seal], as they came
    beat: int = 0  # the second of the keepalive interval at which it has its turn
    watches: tuple[int, int] = (0, 0)
    rest: int = 0  # unix time: since when it has sent nothing
    received: int = 0
    sent: int = 0

    def sealed(self) -> State:
        return State.decode(json.loads(self.tail)[0])


class Keeper(Service):
    """Thousands of sleepers: keepalive, watch, wake."""

    def __init__(self, master: Master, pool: Pool, slot: int, generation: int) -> None:
        super().__init__(master, pool, slot, generation)
        self.slots = min(file_limit(), self.limit + 4 * RESERVE)
        self.memory = mmap.mmap(-1, self.slots * SLOT_SIZE)
        self.held = 0
        self.period = max(1, math.ceil(self.config.idle_notify_interval or 60))
        self.peeker = self.peek  # one bound method for all, not 64 bytes for each
        self.twin: tuple[Any, Channel] | None = None  # its process, and the way to it

    def start(self, channel: socket.socket) -> None:
        super().start(channel)
        self.channel = channel
        self.waking: dict[int, str] = {}  # and why
        self.turns = [array("i") for _ in range(self.period)]
        self.turned = int(time.time())
        self.loop.later(1.0, self.take_turns)
        self.spawn_twin()

    def run(self, channel: socket.socket) -> None:
        super().run(channel)
        self.end_twin()

    def count(self) -> int:
        return self.held

    def load(self, fd: int) -> Sleeper:
        at = fd * SLOT_SIZE
        state, tag, tail, beat, one, two, *rest = SLOT.unpack_from(self.memory, at)
        text = self.memory[at + SLOT.size : at + SLOT.size + tag + tail].decode()
        return Sleeper(state, text[:tag], text[tag:], beat, (one, two), *rest)

    def store(self, fd: int, sleeper: Sleeper) -> None:
        state, tag, tail, beat, watches, *rest = sleeper
        at, text = fd * SLOT_SIZE, (tag + tail).encode()
        self.memory[at + SLOT.size : at + SLOT.size + len(text)] = text
        SLOT.pack_into(self.memory, at, state, len(tag), len(tail), beat, *watches, *rest)

    def fits(self, tag: str, tail: str) -> bool:
        fit = len(tag) < 256 and SLOT.size + len(tag) + len(tail) <= SLOT_SIZE
        return fit and (tag + tail).isascii()

    # Arriving

    def hold(self, record: Record, state: State, fd: int, channel: Channel) -> Any:
        tail, number = compact([record.state, record.seal]), channel.sock.fileno()
        if self.room() < 0 or max(fd, number) >= self.slots:
            raise ValueError("full")
        with borrowed(fd, -1) as sock:
            identity(sock)  # OSError: no socket, or its client has gone
        if record.pending or record.answer or not self.fits(record.tag, tail):
            raise ValueError("more than a sleeper can have")
        wait = seconds_to_beat(self.period, state.remote, state.user)
        beat = int(time.time() + wait) % self.period
        os.set_blocking(fd, False)
        now, counts = int(time.time()), (record.received, record.sent)
        sleeper = self.listen(fd, Sleeper(HELD, record.tag, tail, beat, (0, 0), now, *counts))
        if not sleeper:
            raise ValueError("changed")
        self.store(fd, sleeper._replace(state=OFFERED))
        self.store(number, Sleeper(CHANNEL, tail=str(fd)))
        self.copy(fd, number)
        return fd, sleeper, number

    def listen(self, fd: int, sleeper: Sleeper) -> Sleeper | None:
        """The sleeper with watches, if it has a tag. Arm first, then compare: None if its
        directories changed, or may have, before the watch was there."""
        if not sleeper.tag:
            return sleeper
        state = sleeper.sealed()
        if not state.watch:
            return None
        folder = os.path.join(state.home, state.watch[0])
        paths = [os.path.join(folder, name) for name in self.role.session.watch_dirs]
        one, two = [*(self.watcher.add(path, fd) for path in paths), 0, 0][:2]
        sleeper = sleeper._replace(watches=(one, two))
        if not changed_since(paths, state.watch[1:], YOUNG):
            return sleeper
        self.unlisten(fd, sleeper)
        return None

    def unlisten(self, fd: int, sleeper: Sleeper) -> Sleeper:
        for number in filter(None, sleeper.watches):
            self.watcher.drop(number, fd)
        return sleeper._replace(watches=(0, 0))

    def begin(self, held: Any) -> None:
        fd, sleeper, number = held
        self.held += 1
        self.counts["adopted"] += 1
        self.mark(number, FREE)
        self.tend(fd, sleeper)
        self.arm(fd)

    def tend(self, fd: int, sleeper: Sleeper) -> None:
        """A sleeper is ours from now on."""
        self.store(fd, sleeper)
        self.turns[sleeper.beat].append(fd)
        self.loop.watch(fd, READ, self.peeker)

    def arm(self, fd: int) -> None:
        """Watch its mailbox, which may have stirred while nobody would have noticed."""
        sleeper = self.load(fd)
        if sleeper.state != HELD or fd in self.waking:
            return
        if self.draining:
            self.move_on(fd)
        elif listening := self.listen(fd, sleeper):
            self.store(fd, listening)
        else:
            self.wake(fd, "mail")

    def abandon(self, held: Any, shutdown: bool = False) -> None:
        fd, sleeper, number = held
        self.unlisten(fd, sleeper)
        self.mark(fd, FREE)
        self.mark(number, FREE)
        if shutdown:
            end_socket(socket.socket(fileno=fd))
        else:
            os.close(fd)

    # Asleep

    def peek(self, fd: int, mask: int) -> None:
        """The client has sent something, or has left. Answer first, then consume."""
        with borrowed(fd) as sock:
            try:
                data = sock.recv(512, socket.MSG_PEEK)
                sleeper = self.load(fd)
                answer = self.role.session.peeked(sleeper.tag, data) if data else None
                changed = self.adopt_tag(fd, sleeper, answer[2]) if answer else None
                if answer and changed and self.say(fd, changed, answer[0]):
                    os.read(fd, answer[1])
                    sleeper = self.load(fd)
                    self.store(fd, sleeper._replace(received=sleeper.received + answer[1]))
                    self.counts["answered asleep"] += 1
                elif not data:
                    self.over(fd, "client closed the connection")
                elif not changed:
                    self.wake(fd, "input")
            except BlockingIOError:
                pass
            except OSError as error:
                self.over(fd, f"connection lost: {error.strerror}")

    def adopt_tag(self, fd: int, sleeper: Sleeper, tag: str) -> Sleeper | None:
        """The client ends listening, begins it, or both. None: only a worker can say."""
        changed = sleeper._replace(tag=tag, rest=int(time.time()))
        if not self.fits(tag, sleeper.tail):
            return None
        if tag and sleeper.tag:
            return changed
        return self.listen(fd, changed) if tag else self.unlisten(fd, changed)

    def say(self, fd: int, sleeper: Sleeper, data: bytes) -> bool:
        """Whole, or it ends the session: a sleeper has no output buffer."""
        with contextlib.suppress(OSError):
            if os.write(fd, data) == len(data):
                self.store(fd, sleeper._replace(sent=sleeper.sent + len(data)))
                return True
        self.over(fd, "client does not read")
        return False

    def stirred(self, fd: int) -> None:
        if self.memory[fd * SLOT_SIZE] == HELD and fd not in self.waking:
            self.wake(fd, "mail")

    def take_turns(self) -> None:
        """Once a second, for those whose second it is. Each sleeper is in one list; one that has
        left stays there until then, and its slot shows it."""
        self.loop.later(1.0, self.take_turns)
        now = int(time.time())
        for second in range(max(self.turned, now - self.period) + 1, now + 1):
            at = second % self.period
            here = {fd: self.load(fd) for fd in set(self.turns[at])}
            here = {fd: one for fd, one in here.items() if (one.state, one.beat) == (HELD, at)}
            self.turns[at] = array("i", here)
            for fd in here.keys() - self.waking.keys():
                self.take_turn(fd, here[fd])
        self.turned = now

    def take_turn(self, fd: int, sleeper: Sleeper) -> None:
        if sleeper.tag and self.config.idle_notify_interval:
            self.say(fd, sleeper, self.role.session.still_here)
        elif not sleeper.tag and time.time() - sleeper.rest > REST_TIME:
            self.end(fd, "Autologout; idle for too long")

    # Leaving

    def wake(self, fd: int, cause: str) -> None:
        self.counts[f"woken by {cause}"] += 1
        self.depart(fd, cause, self.role.wakes, MOVE_TIME if cause == "input" else MAIL_TIME)

    def move_on(self, fd: int) -> None:
        if fd not in self.waking:
            self.depart(fd, "drain", self.role.name, self.config.orphan_timeout)

    def depart(self, fd: int, cause: str, service: str, patience: float) -> None:
        self.loop.unwatch(fd)
        self.waking[fd] = cause
        self.mover.give(fd, service, patience)

    def parcel(self, fd: int) -> bytes | None:
        """Look whether the client is still there: nobody watches the descriptor meanwhile."""
        poll = select.poll()
        poll.register(fd, select.POLLIN | getattr(select, "POLLRDHUP", 0))
        events = dict(poll.poll(0)).get(fd, 0)
        unread = False
        if events:
            with borrowed(fd) as sock, contextlib.suppress(OSError):
                unread = bool(sock.recv(1, socket.MSG_PEEK))
        if events and not unread:  # a half-close behind input is not the end yet
            self.over(fd, "client closed the connection")
            return None
        if unread and self.waking[fd] == "mail":
            self.waking[fd] = "input"  # now somebody waits: should this try fail, sooner
            self.mover.target[fd] = self.role.wakes, time.monotonic() + MOVE_TIME, b""
        sleeper = self.load(fd)
        if sleeper.state == GONE:  # an earlier "!" failed, and the twin may have let it go
            self.mark(fd, HELD)
            self.copy(fd)
        return Record(
            sleeper.tag, sleeper.received, sleeper.sent, "", "", *json.loads(sleeper.tail)
        ).encode()

    def mark(self, fd: int, state: int) -> None:
        self.memory[fd * SLOT_SIZE] = state

    def leaving(self, fd: int) -> None:
        self.mark(fd, GONE)

    def given(self, fd: int) -> None:
        self.forget(fd)
        os.close(fd)
        self.update()

    def forget(self, fd: int) -> None:
        self.unlisten(fd, self.load(fd))
        self.loop.unwatch(fd)
        self.mover.keep(fd)
        self.mark(fd, FREE)
        self.waking.pop(fd, None)
        self.held -= 1

    def kept(self, fd: int, reason: str) -> None:
        """No worker took it in time, or one refused it for good: it can't go on."""
        self.mark(fd, HELD)
        log.error("a sleeper could not be moved: %s", reason)
        self.end(fd, "Server is too busy, please log in again")

    def end(self, fd: int, reason: str) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, self.role.session.farewell(reason))
        self.over(fd, reason)

    def over(self, fd: int, reason: str) -> None:
        sleeper = self.load(fd)
        self.forget(fd)
        end_socket(socket.socket(fileno=fd))
        self.ended(sleeper.sealed(), reason, sleeper.received, sleeper.sent)

    def failed(self, fd: int) -> None:
        if 0 <= fd < self.slots and self.memory[fd * SLOT_SIZE] == HELD:
            self.end(fd, "Internal error")

    def states(self) -> Iterator[tuple[int, State]]:
        for fd in range(self.slots):
            if self.memory[fd * SLOT_SIZE] == HELD:
                yield fd, self.load(fd).sealed()

    # The twin: a process with a copy of every descriptor, under the same number, and the slots in
    # shared memory. When the keeper is killed, it goes on. Seeding is the fork itself; after it,
    # one message for each arrival, none for a change or an end.

    def spawn_twin(self) -> None:
        if not self.config.hibernate_twin or self.draining or self.twin:
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            log.error("no twin: %s", error.strerror)
            self.loop.later(THROTTLE[0], self.spawn_twin)
            return
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self.guard, args=(ours, theirs), name=self.role.name)
        try:
            process.start()
        except OSError as error:
            log.error("no twin: fork: %s", error.strerror)
            ours.close()
            self.loop.later(THROTTLE[0], self.spawn_twin)
        else:
            self.twin = process, Channel(self.loop, ours, self.twin_ended)
        theirs.close()

    def twin_ended(self, message: bytes, fds: list[int]) -> None:
        close_all(fds)
        self.end_twin()
        self.loop.later(1.0, self.spawn_twin)

    def end_twin(self) -> None:
        if self.twin:
            process, channel = self.twin
            self.twin = None
            process.kill()
            process.join()
            channel.close()

    def drain(self) -> None:
        self.draining = True  # first: a twin forked from here on would not be told
        self.tell_twin(b"drain")
        super().drain()

    def copy(self, *fds: int) -> None:
        """To the twin: a session and the channel on which its "!" will come, perhaps after our
        death. No answer is needed: what is queued holds the descriptors, and the twin reads all
        of its queue before it sees the end. A twin that does not read is replaced."""
        for fd in fds:
            self.tell_twin(b"%d" % fd, fd)

    def tell_twin(self, message: bytes, fd: int = -1) -> None:
        if not self.twin:
            return
        channel = self.twin[1]
        try:
            try:
                channel.send(message, fd)
            except BlockingIOError:  # it is behind: a new one would cost more than to wait
                room = select.poll()
                room.register(channel.sock.fileno(), select.POLLOUT)
                room.poll(TWIN_TIME)
                channel.send(message, fd)
        except OSError:
            self.end_twin()
            self.spawn_twin()  # its seed is the fork: it has all of them

    def guard(self, ours: socket.socket, theirs: socket.socket) -> None:
        """The twin. Each number that it uses itself is in use in the keeper, too, so that no
        session can have it: hence no selector, and the channel under the keeper's number."""
        signal.set_wakeup_fd(-1)
        past = self.loop, self.mover, self.arrivals, self.clients  # no destructor may close a
        os.dup2(theirs.fileno(), ours.fileno(), inheritable=False)  # number that is another's now
        theirs.close()
        self.loop.close()
        for handler in log.handlers:
            handler.close()  # its next line opens a log file anew, standard error stays open
        kept = {0, 1, 2, ours.fileno(), self.channel.fileno(), self.inbox.fileno()}
        copies = bytearray(state in LIVING for state in self.memory[::SLOT_SIZE])
        for fd in range(self.slots):
            if not copies[fd] and fd not in kept:
                os.closerange(fd, fd + 1)  # which ignores errors
        ours.settimeout(SWEEP_TIME)
        swept = -math.inf
        while True:
            if time.monotonic() - swept >= SWEEP_TIME:
                swept = time.monotonic()
                self.sweep(copies)
            try:
                message, fds = receive(ours)
            except TimeoutError:
                continue
            if not message:
                break
            if message == b"drain":  # the keeper closes these now, and uses their numbers again
                self.inbox.close()
                self.channel.close()
                continue
            if not fds:
                os._exit(1)  # no descriptors left here: the keeper forks another
            number = int(message)
            if fds[0] != number:
                os.dup2(fds[0], number, inheritable=False)
                os.close(fds[0])
            copies[number] = 1
        self.survive(ours, copies)
        del past

    def sweep(self, copies: bytearray) -> None:
        """Close what is not, or no longer, in the slots."""
        for fd in range(self.slots):
            if copies[fd] and self.memory[fd * SLOT_SIZE] not in LIVING:
                copies[fd] = 0
                with contextlib.suppress(OSError):  # one that came and went during the fork
                    os.close(fd)
        name = f"{self.config.program.name}/{self.role.name}-twin"
        self.title.set(f"{name} [{sum(copies)} copies]")

    def survive(self, ours: socket.socket, copies: bytearray) -> None:
        """The keeper is dead. An OFFERED session is its sender's until the "!" has come: it may
        wait unread in the channel, of which there is a copy, too."""
        self.sweep(copies)
        ours.close()
        slots = {}
        for fd in range(self.slots):
            if copies[fd]:
                slots[fd] = self.load(fd)._replace(watches=(0, 0))
            else:
                self.mark(fd, FREE)
        self.held = sum(sleeper.state == HELD for sleeper in slots.values())
        log.error("the keeper was killed; its twin goes on with %d sessions", self.held)
        self.twin = None
        self.counts.clear()
        if self.channel.fileno() < 0:  # the master was gone already, as this end of a pair tells
            self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            other.close()
        self.start(self.channel)
        offered = {fd for fd, sleeper in slots.items() if sleeper.state == OFFERED}
        sleepers = [fd for fd, sleeper in slots.items() if sleeper.state == HELD]
        for fd in sleepers:  # who speaks is answered at once; to arm 10,000 takes a second
            self.tend(fd, slots[fd])
        self.arm_all(sleepers)
        for fd, sleeper in slots.items():
            if sleeper.state == CHANNEL and (session := int(sleeper.tail)) in offered:
                offered.discard(session)
                held = session, slots[session]._replace(state=HELD), fd
                self.expect(socket.socket(fileno=fd), held, COMMIT_TIME)
        for fd in offered:
            self.mark(fd, FREE)
            os.close(fd)
        self.loop.run()
        self.end_twin()

    def arm_all(self, fds: list[int]) -> None:
        for fd in fds[:ARMED]:
            self.arm(fd)
        if len(fds) > ARMED:
            self.loop.later(0, partial(self.arm_all, fds[ARMED:]))


# ------------------------------------------------------------------------------------------------
# 7  Master
#
# Opens the listeners, forks, reaps, throttles. It never reads a client's bytes and never holds a
# client's descriptor. While a service has a process with room it does not listen for it; when none
# has, it does, and forks upon a connection: balance() alone decides that. A reload is an exec: the
# children see their channel end, as if the master had been killed, and hand over to what comes.
# Here the engine ends.
# ------------------------------------------------------------------------------------------------

BIND_TIME = 5.0  # seconds in which a predecessor may give up its port or its lock
STOP_TIME = 5.0  # seconds for the farewells of a stop
REPORT_TIME = 30.0  # seconds from its fork until a process must have reported
THROTTLE = 2.0, 60.0  # seconds: the first delay and the longest
INHERIT = "HIBERNATE_INHERIT"  # environment: what one generation leaves to the next


@dataclass(eq=False)
class Child:
    """A process as the master knows it."""

    slot: int
    room: int  # until its first report: what it will have
    process: Any
    pid: int  # of its survivor, if it was a keeper
    channel: Channel = field(init=False)
    clients: int = 0
    reported: bool = False
    covers: str = ""  # what it was told last, see Master.cover()


@dataclass(eq=False)
class Pool:
    """The processes of one service, and what they listen on."""

    role: Role
    settings: Section
    inbox: socket.socket
    listeners: list[list[socket.socket]]
    children: list[Child] = field(default_factory=list)
    delay: float = 0.0  # seconds, of the last throttle
    rests_until: float = 0.0  # throttled, or all are full: neither fork nor listen until then
    full: int = 0  # for how many seconds connections have found all full
    idle_low: int = 0  # fewest idle processes seen in this idle_kill interval

    def idle(self) -> list[Child]:
        return [child for child in self.children if child.reported and not child.clients]

    def tell(self, word: str, fd: int = -1) -> None:
        for child in self.children:
            tell(child.channel, word, fd)


def tell(channel: Channel, word: str, fd: int = -1) -> None:
    """Say it, unless the other end is gone or stopped."""
    with contextlib.suppress(OSError):
        channel.send(word.encode(), fd)


class Master:
    """Runs a program's services until it is told to stop."""

    def __init__(self, config: Config, ready: Callable[[Master], None] | None) -> None:
        """`ready` is called once, when all listen and every reserve has reported."""
        self.config = config
        self.ready = ready
        inherited: list[Any] = json.loads(os.environ.pop(INHERIT, "[-1, 0, [], {}]"))
        self.lock, self.generation, old_pids, listeners = inherited
        self.old_pids: set[int] = set(old_pids)
        self.groups: dict[str, list[socket.socket]] = {  # all listeners, see open_group()
            key: [socket.socket(fileno=fd) for fd in fds] for key, fds in listeners.items()
        }
        self.loop = Loop()
        self.pools: list[Pool] = []
        users = {service.user for service in config.sections.values()} - {""}
        self.peers = {os.getuid(), *(pwd.getpwnam(user).pw_uid for user in users)}
        self.stopping = False
        self.check: tuple[subprocess.Popen[bytes], Channel | None] | None = None
        self.context = multiprocessing.get_context("fork")

    # From start to ready

    def run(self) -> None:
        self.prepare_directory()
        # All of them before any fork: a process inherits its service's whole group.
        groups = self.open_listeners(self.config, BIND_TIME)
        wanted = [id(group) for group in itertools.chain(*groups.values())]
        for key, group in list(self.groups.items()):
            if id(group) not in wanted:  # gone from the configuration
                for sock in self.groups.pop(key):
                    sock.close()
        for role in self.config.program.roles:
            settings, inbox = self.config.sections[role.name], self.open_inbox(role.name)
            self.pools.append(Pool(role, settings, inbox, groups[role.name]))
        self.control = self.open_inbox("master")
        self.loop.watch(self.control.fileno(), READ, self.accept_control)
        gc.collect()
        gc.freeze()  # a collection in a child would unshare every page that it counts on
        self.loop.on_signals({
            signal.SIGHUP: self.reload, signal.SIGTERM: self.stop, signal.SIGINT: self.stop,
            signal.SIGQUIT: self.quit, signal.SIGCHLD: self.reap,
        })  # fmt: skip
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        Title(f"{self.config.program.name}/master")
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: survivors are ours
        for pool in self.pools:
            self.balance(pool)
            self.end_idle(pool)
        self.reap()
        self.loop.run()

    def prepare_directory(self) -> None:
        """base_dir, its lock (lockf: a fork does not inherit it, an exec keeps it), the key."""
        base = self.config.base_dir
        os.makedirs(base, exist_ok=True)
        os.chmod(base, 0o711 if len(self.peers) > 1 else 0o700)
        if self.lock < 0:
            self.lock = os.open(os.path.join(base, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
            persist(lambda: fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB), base)
        path = os.path.join(base, "key")
        if not os.path.exists(path):
            with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            os.rename(path + ".new", path)

    def open_listeners(
        self, config: Config, patience: float
    ) -> dict[str, list[list[socket.socket]]]:
        """{service: groups} of `config`: what is open already, and what has to be bound."""
        return {
            service: [
                self.open_group(f"{service}/{name}", listener, patience, settings.process_limit)
                for name, listener in settings.sections.items()
            ] for service, settings in config.sections.items()
        }  # fmt: skip

    def open_group(
        self, name: str, listener: Section, patience: float, slots: int
    ) -> list[socket.socket]:
        """One socket, or one SO_REUSEPORT socket a slot. A socket is closed only between two
        generations, when the old one's processes accept what waits in it."""
        key, other = (
            f"{name} {listener.address} {listener.port} {shared}"
            for shared in (listener.reuse_port, not listener.reuse_port)
        )
        group, before = self.groups.setdefault(key, []), self.groups.get(other, [])
        if before and not listener.reuse_port and not group:
            # Not socket.dup(): its settimeout() would make the listener a blocking one for all.
            group.append(socket.socket(fileno=os.dup(before[0].fileno())))
        for sock in before:  # or the port could not be bound again until these are closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        while len(group) < (slots if listener.reuse_port else 1):
            port = next((s.getsockname()[1] for s in group + before), listener.port)
            group.append(bind(listener.address, port, listener.reuse_port, patience))
        return group

    def open_inbox(self, service: str) -> socket.socket:
        """Bound aside and renamed into place: the name never lacks a listener."""
        path = self.config.inbox(service)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".new")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        sock.bind(path + ".new")
        sock.listen(1024)
        os.chmod(path + ".new", 0o666 if len(self.peers) > 1 and service != "master" else 0o600)
        os.rename(path + ".new", path)
        return sock

    # Processes

    def balance(self, pool: Pool) -> None:
        """Fork what the reserve asks for; listen exactly while no process has room."""
        missing = pool.settings.process_min_avail - sum(c.room > 0 for c in pool.children)
        free = pool.settings.process_limit - len(pool.children)
        for _ in range(min(missing, free)):
            if not self.rests(pool):
                self.spawn(pool)
        full = not any(child.room > 0 for child in pool.children)
        pool.full *= full
        events = READ if full and not self.rests(pool) else 0
        for sock in (pool.inbox, *(group[0] for group in pool.listeners if len(group) == 1)):
            self.loop.watch(sock.fileno(), events, lambda *_: self.called(pool))
        pool.idle_low = min(pool.idle_low, len(pool.idle()))
        self.cover(pool)

    def called(self, pool: Pool) -> None:
        """A connection waits, and no process has room."""
        if len(pool.children) < pool.settings.process_limit:
            self.spawn(pool)
        else:
            if not pool.full:
                text = "service %s: all are full, process_limit (%d) is reached: connections wait"
                log.warning(text, pool.role.name, pool.settings.process_limit)
            pool.tell(f"full {pool.full}")
            pool.full += 1
            self.rest(pool, 1.0)
        self.balance(pool)

    def rest(self, pool: Pool, seconds: float) -> None:
        pool.rests_until = time.monotonic() + seconds
        self.loop.later(seconds, lambda: self.balance(pool))

    def rests(self, pool: Pool) -> bool:
        return self.stopping or time.monotonic() < pool.rests_until

    def throttle(self, pool: Pool) -> None:
        """A process has died before it reported: no new one for a while."""
        pool.delay = min(max(pool.delay * 2, THROTTLE[0]), THROTTLE[1])
        log.error("service %s: no new process for %d s", pool.role.name, pool.delay)
        self.rest(pool, pool.delay)

    def cover(self, pool: Pool) -> None:
        """A SO_REUSEPORT socket whose process is full or missing would keep its share of new
        connections waiting: siblings read it, too."""
        served = {child.slot for child in pool.children if child.room > 0}
        alone = sorted({*range(pool.settings.process_limit)} - served)
        words = "cover " + " ".join(map(str, alone))
        for child in pool.children:
            if child.covers != words and any(len(group) > 1 for group in pool.listeners):
                child.covers = words
                tell(child.channel, words)

    def spawn(self, pool: Pool) -> None:
        slot = min({*range(len(pool.children) + 1)} - {child.slot for child in pool.children})
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.generation += 1
        main = partial(self.child_main, pool, slot, ours, theirs)
        process = self.context.Process(target=main, name=pool.role.name)
        try:
            process.start()
        except OSError as error:
            log.error("service %s: fork: %s", pool.role.name, error.strerror)
            ours.close()
            self.throttle(pool)
            return
        finally:
            theirs.close()
        child = Child(slot, pool.settings.client_limit, process, process.pid or 0)
        child.channel = Channel(self.loop, ours, partial(self.heard, pool, child))
        pool.children.append(child)
        self.loop.later(REPORT_TIME, lambda: self.overdue(pool, child))

    def overdue(self, pool: Pool, child: Child) -> None:
        if child in pool.children and not child.reported:
            log.error("service %s: process %d has not reported", pool.role.name, child.pid)
            child.process.kill()

    def child_main(self, pool: Pool, slot: int, ours: socket.socket, theirs: socket.socket) -> None:
        """The new process: put in order what the fork has copied, then be a service."""
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole process group
        signal.set_wakeup_fd(-1)
        self.loop.close()  # an epoll object is shared over fork: not even unregister in it
        ours.close()
        self.control.close()
        os.close(self.lock)
        for other in self.pools:
            for sibling in other.children:
                sibling.channel.sock.close()
            if other is not pool:
                for sock in (other.inbox, *itertools.chain(*other.listeners)):
                    sock.close()
        kind = Keeper if pool.role.wakes else Service
        kind(self, pool, slot, self.generation).run(theirs)

    def heard(self, pool: Pool, child: Child, message: bytes, fds: list[int]) -> None:
        close_all(fds)
        if not message:
            self.bury(pool, child)
            return
        try:
            _, room, clients, pid = checked(message.decode(), (int, int, int, int))
        except ValueError:  # it may have been taken over; its end comes next
            log.error("service %s: nonsense from process %d", pool.role.name, child.pid)
            self.kill({child.pid}, signal.SIGKILL)
            return
        pool.delay = 0.0
        if pid != child.pid and pool.role.wakes:  # a survivor: it knows nothing of earlier words
            with contextlib.suppress(OSError, OverflowError):  # not a child of ours: a lie
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                child.pid = pid
                self.old_pids.add(pid)
                if self.stopping:
                    tell(child.channel, "stop")
        child.reported, child.room, child.clients = True, room, clients
        self.balance(pool)
        if self.ready and all(
            sum(child.reported for child in pool.children) >= pool.settings.process_min_avail
            for pool in self.pools
        ):
            self.ready(self)
            self.ready = None

    def reap(self) -> None:
        multiprocessing.active_children()  # reaps those that have ended
        for pid in list(self.old_pids):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            self.old_pids.discard(pid)
        if self.check and self.check[0].poll() is not None:
            self.checked(*self.check)
        if self.stopping and not self.old_pids and not any(pool.children for pool in self.pools):
            for name in (*self.config.sections, "master"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.config.inbox(name))
            self.loop.running = False

    def bury(self, pool: Pool, child: Child) -> None:
        """Its channel has ended: neither the process nor a survivor is left."""
        pool.children.remove(child)
        child.process.join(1.0)
        if status := child.process.exitcode:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            log.error("service %s: process %d ended: %s", pool.role.name, child.pid, how)
        if not child.reported and not self.stopping:
            self.throttle(pool)
        self.balance(pool)
        self.reap()

    def end_idle(self, pool: Pool) -> None:
        """Every idle_kill seconds: as many as were idle all the time, above the reserve, end."""
        surplus = max(0, pool.idle_low - pool.settings.process_min_avail)
        for child in pool.idle()[:surplus]:
            tell(child.channel, "end-if-idle")
        pool.idle_low = len(pool.idle())
        self.loop.later(pool.settings.idle_kill or 60.0, lambda: self.end_idle(pool))

    # What it is told

    def accept_control(self, fd: int, mask: int) -> None:
        def heard(message: bytes, fds: list[int]) -> None:
            close_all(fds)
            if message:
                self.command(channel, message.decode("utf-8", "replace"))

        channel = Channel(self.loop, self.control.accept()[0], heard, SPEAK_TIME)

    def command(self, channel: Channel, line: str) -> None:
        name = line.partition(" ")[0]
        channel.expire(0)
        if name == "stop":
            self.stop()  # the channel's end will tell that it is done
        elif name == "reload":
            self.reload(channel)
        else:
            for pool in self.pools if name in ("who", "status", "kick") else ():
                if name == "status" and pool.delay:
                    tell(channel, compact({"service": pool.role.name, "delay": pool.delay}) + "\n")
                pool.tell(line, channel.sock.fileno())
            channel.close()

    def stop(self) -> None:
        """Now, with a farewell to every client."""
        if self.stopping:
            return
        self.stopping = True
        log.info("stopping")
        for pool in self.pools:
            self.balance(pool)  # which no longer listens
            pool.tell("stop")
        self.kill(self.old_pids, signal.SIGTERM)
        self.loop.later(STOP_TIME, lambda: self.kill(self.pids(), signal.SIGKILL))
        self.reap()

    def pids(self) -> set[int]:
        return self.old_pids | {child.pid for pool in self.pools for child in pool.children}

    def kill(self, pids: set[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def quit(self) -> None:
        """Release the ports now; serve who is connected until they have left."""
        log.info("the ports are released; sessions go on")
        for pool in self.pools:
            pool.tell("close")
            for sock in itertools.chain(*pool.listeners):
                self.loop.unwatch(sock.fileno())
                sock.close()
            pool.listeners = []
        self.groups = {}
        self.see_empty(0)

    def see_empty(self, times: int) -> None:
        """Stop once three looks in a row saw no client: reports are up to a second old, and a
        session may be on its way from one process to another."""
        busy = any(child.clients for pool in self.pools for child in pool.children)
        if times == 3:
            self.stop()
        else:
            self.loop.later(1.0, lambda: self.see_empty(0 if busy else times + 1))

    def reload(self, channel: Channel | None = None) -> None:
        """A new process checks file and code first; checked() goes on."""
        if not self.check and not self.stopping:
            command = [sys.executable, *sys.orig_argv[1:], "--check"]
            pipe = subprocess.PIPE
            self.check = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT), channel
        elif channel:
            channel.close()

    def checked(self, process: subprocess.Popen[bytes], channel: Channel | None) -> None:
        self.check = None
        text = process.communicate()[0][:4000].decode("utf-8", "replace").strip()
        if process.returncode:
            text = text or f"the check ended with {process.returncode}"
        else:
            text = self.open_added_listeners()
        word = f"refused: {text}" if text else "reloading"
        if channel:
            tell(channel, word)
            channel.close()
        log.log(logging.ERROR if text else logging.INFO, word)
        if not text:
            self.exec()

    def open_added_listeners(self) -> str:
        """Bind what a new configuration adds, while there is still a way back; or why not."""
        had = {key: len(group) for key, group in self.groups.items()}
        try:
            self.open_listeners(Config(self.config.program, self.config.path), 0.0)
        except (Failure, OSError) as error:
            for key, group in self.groups.items():
                for sock in group[had.get(key, 0) :]:
                    sock.close()
                del group[had.get(key, 0) :]
            return str(error)
        return ""

    def exec(self) -> NoReturn:
        """Become the new code and the new settings: same pid, same ports, same children."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        listeners = {key: [sock.fileno() for sock in group] for key, group in self.groups.items()}
        for fd in (self.lock, *itertools.chain(*listeners.values())):
            os.set_inheritable(fd, True)
        inherited = json.dumps([self.lock, self.generation, [*self.pids()], listeners])
        sys.stdout.flush()
        environment = os.environ | {INHERIT: inherited}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def persist(attempt: Callable[[], Any], what: str, patience: float = BIND_TIME) -> Any:
    """Try for some seconds, which only a master that serves nobody yet has; then Failure."""
    end = time.monotonic() + patience
    while True:
        try:
            return attempt()
        except OSError as error:
            in_use = error.errno in (errno.EADDRINUSE, errno.EAGAIN)
            if not in_use or time.monotonic() > end:
                status = 77 if isinstance(error, PermissionError) else 69
                reason = "is in use" if in_use else error.strerror
                raise Failure(status, f"{what}: {reason}") from None
        time.sleep(0.05)


def bind(address: str, port: int, reuse_port: bool, patience: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    create = partial(socket.create_server, family=family, backlog=4096, reuse_port=reuse_port)
    sock: socket.socket = persist(lambda: create((address, port)), f"{address}:{port}", patience)
    sock.setblocking(False)
    return sock


# ------------------------------------------------------------------------------------------------
# 8  Maildir and index
#
# Messages and their flags are the files of a Maildir, so that any delivery agent fills it and any
# other reader shares it. What files can't say (UIDs, keywords, MODSEQs, what was expunged) is in
# one SQLite file per user, which may be deleted at any time: it costs new UIDVALIDITYs, no mail.
#
# The directories' times are the change notice: whoever commits what others must hear of changes
# new/ or cur/ in the same transaction, so a session that finds the times it knows has missed
# nothing and opens no database. Folders are listed and files renamed only while the index is
# locked; nothing in here may yield to the engine with that lock held.
#
# Delivered files stay in new/ until a flag is set. Moving them to cur/ at SELECT, as others do,
# would stir all sleepers of the mailbox a second time for each delivery, to tell them nothing;
# \Recent goes by UID. Symbolic links are followed: nobody can make one by IMAP.
# ------------------------------------------------------------------------------------------------

INDEX_VERSION = 0x48420005  # as application_id; any other file in its place is put aside
INDEXES_OPEN = 8  # connections a worker keeps, at about 160 KB and three descriptors each
INDEX_PATIENCE = 0.2  # seconds to wait for another process's transaction, then NO [INUSE]
EXPUNGED_KEPT = 7 * 86400  # seconds; no session is that far behind
NAME_LIMIT = 240  # bytes of a mailbox name, as NAME_MAX is 255
KEYWORD_LIMIT = 500  # keywords of one mailbox
LETTERS = {"\\Answered": "R", "\\Flagged": "F", "\\Deleted": "T", "\\Seen": "S", "\\Draft": "D"}
UNSETTLED = (0, 0)  # in place of times: look again, the folder is changing right now

SCHEMA = f"""
BEGIN;
CREATE TABLE mailbox (id INTEGER PRIMARY KEY AUTOINCREMENT, name UNIQUE, uidvalidity,
    uidnext DEFAULT 1, modseq DEFAULT 1, recent DEFAULT 1, keywords DEFAULT '', new DEFAULT 0,
    cur DEFAULT 0);
CREATE TABLE message (uid, file, flags, keywords, modseq, size, box,
    PRIMARY KEY (box, uid)) WITHOUT ROWID;
CREATE INDEX changed ON message (box, modseq);
CREATE TABLE expunged (box, modseq, uid, time, PRIMARY KEY (box, modseq, uid)) WITHOUT ROWID;
CREATE TRIGGER erased AFTER DELETE ON mailbox BEGIN
    DELETE FROM message WHERE box = old.id; DELETE FROM expunged WHERE box = old.id; END;
CREATE TRIGGER gone AFTER DELETE ON message BEGIN INSERT INTO expunged
    SELECT id, modseq + 1, old.uid, strftime('%s') + 0 FROM mailbox WHERE id = old.box; END;
PRAGMA application_id = {INDEX_VERSION};
COMMIT;
"""

Times = tuple[int, int]  # st_mtime_ns of new/ and cur/; negative if there is no such folder
Look = tuple["Mailbox", Times]
Pairs = list[tuple[int, int]]  # UIDs: in the source, in the target


class MailError(Exception):
    """What was asked for can't be done: response code and text of the NO."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Vanished(MailError):
    """A message that the session still knows is no longer in the Maildir."""

    def __init__(self) -> None:
        super().__init__("EXPUNGEISSUED", "Some of the messages no longer exist")


class Mailbox(NamedTuple):
    """A row of the index. `new` and `cur` are the times of the folder it agrees with: negative
    if we changed the folder ourselves since it was listed, and nobody else seems to have."""

    id: int
    name: str
    uidvalidity: int
    uidnext: int
    modseq: int
    recent: int  # nobody has been told of this UID and those above
    keywords: str
    new: int
    cur: int

    def added(self, uid: int, file: bytes, keywords: str = "") -> MessageRow:
        return MessageRow(uid, file, flags_of(file), keywords, self.modseq + 1, None, self.id)


class MessageRow(NamedTuple):
    uid: int
    file: bytes  # below the folder: b"new/…" or b"cur/…:2,FS"
    flags: str  # the letters of the file's name that IMAP knows
    keywords: str
    modseq: int
    size: int | None  # with CRLF line ends; None until somebody asks
    box: int


def unique_name() -> bytes:
    seconds, micros = divmod(time.time_ns() // 1000, 10**6)
    host = socket.gethostname().replace("/", "\\057").replace(":", "\\072")
    return f"{seconds}.M{micros:06}P{os.getpid()}R{secrets.token_hex(4)}.{host}".encode()


def base_of(file: bytes) -> bytes:
    """What stays the same when flags change: the name without folder and flags."""
    return file[4:].partition(b":")[0]


def flags_of(file: bytes) -> str:
    """The letters that IMAP knows."""
    return "".join(x for x in "DFRST" if x.encode() in file.partition(b":2,")[2])


def folder_times(folder: bytes) -> Times:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(folder + b"/new").st_mtime_ns, os.stat(folder + b"/cur").st_mtime_ns
    return -1, -1


def settled(times: Times) -> bool:
    """Would a change from now on show in the times? The kernel's clock for files ticks every few
    milliseconds, that of some file systems every second or two."""
    now = time.time_ns()
    return all(abs(now - t) > (YOUNG if t % 10**9 else 2 * 10**9) for t in times)


def listing(folder: bytes) -> dict[bytes, bytes]:
    """All messages: base name to file. new/ comes first: what moves to cur/ in between is seen."""
    names = [b"new/" + file.name for file in os.scandir(folder + b"/new") if file.is_file()]
    names += [b"cur/" + file.name for file in os.scandir(folder + b"/cur") if file.is_file()]
    return {base_of(name): name for name in names if not name.startswith(b".", 4)}


def sweep(folder: bytes) -> None:
    """Remove what deliveries that failed have left in tmp/ for 36 hours, the Maildir rule. By
    ctime: an APPEND under way may have given its file a date of long ago."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder + b"/tmp"):
            old = time.time() - entry.stat(follow_symlinks=False).st_ctime > 36 * 3600
            if old and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def on_file(folder: bytes, file: bytes, action: Callable[[bytes], Any]) -> Any:
    """action(path of the file), wherever another program has just renamed it to."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                return action(folder + b"/" + file)
            file = listing(folder)[base_of(file)]
    raise Vanished


def read_file(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_home(home: str) -> None:
    """A Maildir with its parents, private; one that exists is left alone."""
    for sub in ("tmp", "new", "cur"):  # cur/ last: with it the folder exists
        os.makedirs(os.path.join(home, sub), 0o700, exist_ok=True)


class Delivery:
    """A message on its way into a folder: write() it to tmp/, then finish() and keep(), after
    which it is on disk under its final name; or drop(). Stored lines end in LF, as mutt expects."""

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        self.name = unique_name()
        self.path = folder + b"/tmp/" + self.name
        self.held = b""  # a CR at the end of a chunk, until we see what follows
        self.file = open(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")

    def write(self, data: bytes) -> None:
        data = self.held + data
        self.held = b"\r" if data.endswith(b"\r") else b""
        self.file.write(data[: len(data) - len(self.held)].replace(b"\r\n", b"\n"))

    def finish(self, when: float | None = None) -> None:
        """The slow half, for those who then lock the index."""
        with self.file:
            self.file.write(self.held)
            self.file.flush()
            if when is not None:
                os.utime(self.path, (when, when))
            os.fsync(self.file.fileno())

    def keep(self, flags: str = "") -> bytes:
        file = b"cur/" + self.name + b":2," + flags.encode() if flags else b"new/" + self.name
        os.rename(self.path, self.folder + b"/" + file)
        sync_directory(self.folder + b"/" + file[:3])
        return file

    def drop(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: close() tries to write what is left
            self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def deliver(home: str, source: BinaryIO) -> None:
    """Put a message into the INBOX, as a delivery agent does; OSError if that can't be done."""
    make_home(home)
    delivery = Delivery(os.fsencode(home))
    try:
        shutil.copyfileobj(source, delivery)
        delivery.finish()
        delivery.keep()
    finally:
        delivery.drop()


def check_name(name: str) -> str:
    """A mailbox name that can be a folder `.NAME`, in the only spelling that modified UTF-7 has
    for it (RFC 3501 5.1.3); else NO [CANNOT]. Nothing else may become part of a path."""
    if name.upper() == "INBOX":
        return "INBOX"
    fine = bool(re.fullmatch("[ -.0-~]{,%d}" % NAME_LIMIT, name)) and all(name.split("."))
    for run in re.findall("&([^-]*-?)", name):
        try:
            text = base64.b64decode(run[:-1].replace(",", "/") + "==").decode("utf-16-be")
        except ValueError:
            text = " "  # refused, as is all of ASCII in this form
        again = base64.b64encode(text.encode("utf-16-be")).rstrip(b"=").decode().replace("/", ",")
        fine = fine and again + "-" == run and not re.search("[ -~]", text)
    if not fine:
        raise MailError("CANNOT", "Invalid mailbox name")
    return name


class Index:
    """The SQLite file of one user, and all that is done to folders under its lock. Get one by
    at() where it is needed and keep it over no yield: it may be closed while others work."""

    opened: dict[str, Index] = {}  # this process's connections, the least recently used first

    @classmethod
    def at(cls, home: str) -> Index:
        index = cls.opened.pop(home, None) or cls(home)
        if index.identity() != index.file:  # deleted or put aside meanwhile
            index.db.close()
            index = cls(home)
        cls.opened[home] = index
        if len(cls.opened) > INDEXES_OPEN:
            cls.opened.pop(next(iter(cls.opened))).db.close()
        return index

    def __init__(self, home: str) -> None:
        make_home(home)
        self.home, self.path = os.fsencode(home), os.path.join(home, "hibernate.sqlite3")
        self.mark = self.path.replace("sqlite3", "uids")
        with open(self.mark, "a") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)  # one process at a time makes or discards an index
            try:
                self.connect()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                self.put_aside(error)
                self.connect()
        self.file = self.identity()

    def identity(self) -> tuple[int, int]:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            return status.st_dev, status.st_ino
        return 0, 0

    def put_aside(self, error: Exception) -> None:
        """Out of the way, but there for whoever wants to look. It costs new UIDVALIDITYs."""
        self.db.close()
        log.warning("%s: %s, put aside as .bad", self.path, error)
        os.replace(self.path, self.path + ".bad")

    def connect(self) -> None:
        self.db = sqlite3.connect(self.path, INDEX_PATIENCE, isolation_level=None)
        self.db.execute("PRAGMA cache_size = -64")
        version = self.number("PRAGMA application_id")
        if not version and not self.number("SELECT count(*) FROM sqlite_master"):
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.executescript(SCHEMA)
        elif version != INDEX_VERSION:
            raise sqlite3.DatabaseError("not our index, or of another version")
        if self.marked()[2] > self.number("PRAGMA user_version"):
            with self.transaction():  # not before another process's commit is over
                self.recover()

    def number(self, query: str) -> int:
        return int(self.db.execute(query).fetchone()[0])

    def marked(self, *values: int) -> list[int]:
        """What must outlive the index, beside it: the last UIDVALIDITY, and how many UIDs were
        given out before and after the last transaction that did (the index has its own count as
        user_version). Written before that commits, and never synced: a copy tells, no crash."""
        with open(self.mark, "r+b", 0) as file:
            if values:
                file.write(b"%11d%11d%11d\n" % values)
            return [*values] or [int(word) for word in file.read().split()] or [0, 0, 0]

    def recover(self) -> None:
        """The index has given out fewer UIDs than the mark says: those are never given again. A
        commit may have failed; or it is new or from a backup, not what clients know."""
        _, before, after = self.marked()
        missing = max(0, after - self.given)
        self.db.execute("UPDATE mailbox SET uidnext = uidnext + ?", (missing,))
        self.db.execute(f"PRAGMA user_version = {self.given + missing}")
        if self.given < before:
            log.warning("%s: new, or from a backup: new UIDVALIDITYs", self.path)
            self.db.execute("UPDATE mailbox SET uidvalidity = ?", (self.new_uidvalidity(),))

    def new_uidvalidity(self) -> int:
        """Greater than any before, of this index or of a deleted one."""
        last, *others = self.marked()
        return self.marked(max(int(time.time()), last + 1), *others)[0]

    @contextlib.contextmanager
    def transaction(self, kind: str = "IMMEDIATE", durable: bool = True) -> Iterator[None]:
        """`durable`: on disk when it is over. Whatever hands out UIDs needs that; lost flags or
        sizes are found again in the folder."""
        self.db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with self.db:  # COMMIT at its end, or ROLLBACK
            self.db.execute(f"BEGIN {kind}")
            self.given = self.number("PRAGMA user_version")  # UIDs, in all mailboxes
            yield

    # Mailboxes

    def folder(self, name: str) -> bytes:
        return self.home if name == "INBOX" else self.home + b"/." + check_name(name).encode()

    def exists(self, name: str) -> bool:
        return os.path.isdir(self.folder(name) + b"/cur")

    def must_exist(self, name: str) -> None:
        if not self.exists(name):
            raise MailError("NONEXISTENT", f"Mailbox doesn't exist: {name}")

    def names(self) -> list[str]:
        """All mailboxes that have a folder."""
        names = {"INBOX"}
        for entry in os.listdir(os.fsdecode(self.home)):
            with contextlib.suppress(MailError):
                if entry.startswith(".") and self.exists(entry[1:]):
                    names.add(check_name(entry[1:]))
        return sorted(names)

    def by_id(self, number: int, uidvalidity: int = 0) -> Mailbox:
        row = self.db.execute("SELECT * FROM mailbox WHERE id = ?", (number,)).fetchone()
        if row is None or uidvalidity not in (0, row[2]):
            raise MailError("NONEXISTENT", "Mailbox was deleted")
        return Mailbox(*row)

    def by_name(self, name: str) -> Mailbox:
        """The row of a folder that exists, made if need be."""
        self.must_exist(name)
        query = "SELECT * FROM mailbox WHERE name = ?"
        if not (row := self.db.execute(query, (name,)).fetchone()):
            with self.transaction():
                insert = "INSERT OR IGNORE INTO mailbox (name, uidvalidity) VALUES (?, ?)"
                self.db.execute(insert, (name, self.new_uidvalidity()))
            return self.by_name(name)
        return Mailbox(*row)

    def create_folder(self, name: str) -> Mailbox:
        with self.transaction():
            if self.exists(name):
                raise MailError("ALREADYEXISTS", "Mailbox already exists")
            self.db.execute("DELETE FROM mailbox WHERE name = ?", (name,))  # others took its folder
            make_home(os.fsdecode(self.folder(name)))
            open(self.folder(name) + b"/maildirfolder", "ab").close()  # Maildir++: no home
        return self.by_name(name)

    def delete_folder(self, name: str) -> None:
        if name == "INBOX":
            raise MailError("CANNOT", "INBOX can't be deleted")
        trash = self.home + b"/tmp/" + unique_name()
        with self.transaction():
            self.must_exist(name)
            os.rename(self.folder(name), trash)
            self.db.execute("DELETE FROM mailbox WHERE name = ?", (name,))
        shutil.rmtree(trash, ignore_errors=True)

    def rename_folder(self, old: str, new: str) -> None:
        """With all folders below it. The INBOX stays; its messages go to the new one."""
        below = [name for name in self.names() if name == old or name.startswith(old + ".")]
        targets = [check_name(new + name[len(old):]) for name in below]
        if not below:
            self.must_exist(old)
        if new.startswith(old + ".") or any(self.exists(name) for name in targets):
            raise MailError("ALREADYEXISTS", "Mailbox already exists, or would be below itself")
        if old == "INBOX":
            source, target = self.refresh(self.by_name(old))[0], self.create_folder(new)
            self.copy(source, [row.uid for row in self.rows(source.id)], target, move=True)
            return
        with self.transaction():
            for name, target_name in zip(below, targets):
                os.rename(self.folder(name), self.folder(target_name))
                self.db.execute("DELETE FROM mailbox WHERE name = ?", (target_name,))
                self.db.execute("UPDATE mailbox SET name = ? WHERE name = ?", (target_name, name))

    def subscriptions(self) -> list[str]:
        """Dovecot's file, so that they outlive the index: one name in a line, in its newer form
        under a version line and with tabs between the levels."""
        try:
            text = read_file(self.home + b"/subscriptions").decode("ascii", "ignore")
        except FileNotFoundError:
            return []
        return sorted(set(re.findall("(?m)^(?!V\\.).+$", text.replace("\t", "."))))

    def subscribe(self, name: str, wanted: bool) -> None:
        path = self.home + b"/subscriptions"
        with self.transaction():  # for its lock
            names = sorted({*self.subscriptions(), name} - (set() if wanted else {name}))
            with open(path + b".tmp", "w", encoding="ascii", errors="ignore") as file:
                file.writelines(f"{each}\n" for each in names)
            os.replace(path + b".tmp", path)

    # Messages

    def rows(self, number: int, low: int = 0, high: int = 2**32) -> list[MessageRow]:
        query = "SELECT * FROM message WHERE box = ? AND uid BETWEEN ? AND ? ORDER BY uid"
        return [MessageRow(*row) for row in self.db.execute(query, (number, low, high))]

    def picked(self, number: int, uids: Sequence[int]) -> list[MessageRow]:
        """The rows of these (ascending) UIDs, as far as they exist."""
        wanted = set(uids)
        rows = self.rows(number, uids[0], uids[-1]) if wanted else []
        return [row for row in rows if row.uid in wanted]

    def refresh(self, box: Mailbox, claim: bool = False, thorough: bool = True) -> Look:
        """The row in agreement with its folder, and the folder's times as of then, or UNSETTLED.

        `claim`: new messages are \\Recent for the caller and for nobody later. Unless `thorough`,
        a folder that seems to be changed by nobody but ourselves isn't listed again.
        """
        folder = self.folder(box.name)
        times = folder_times(folder)
        known = times == (box.new, box.cur)
        if known and not (claim and box.recent < box.uidnext):
            return box, times
        if not self.db.in_transaction:
            with self.transaction():
                return self.refresh(self.by_id(box.id), claim, thorough)
        if not thorough and times == (-box.new, -box.cur):
            times = UNSETTLED
        elif not known:
            box, times = self.compare(box, folder, times)
        if claim and box.recent < box.uidnext:
            self.db.execute("UPDATE mailbox SET recent = uidnext WHERE id = ?", (box.id,))
        return box, times

    def compare(self, box: Mailbox, folder: bytes, times: Times) -> Look:
        """Bring the rows in line with the folder. readdir(3) may miss a file that is renamed
        meanwhile, so a message is only gone if it is missing in a folder whose times were old
        before the listing, and the same after it."""
        calm, gone, changed = settled(times), [], []
        try:
            found = listing(folder)
        except FileNotFoundError:
            raise MailError("NONEXISTENT", "Mailbox was deleted") from None
        sweep(folder)
        if not calm or folder_times(folder) != times:
            times = UNSETTLED
        for row in self.rows(box.id):
            file = found.pop(base_of(row.file), None)
            if file is None:
                gone.append(row.uid)
            elif file != row.file:
                modseq = row.modseq if flags_of(file) == row.flags else box.modseq + 1
                changed.append(row._replace(file=file, flags=flags_of(file), modseq=modseq))
        if gone and times != UNSETTLED:
            self.forget(box.id, gone)
        fresh = sorted(found.values(), key=lambda file: (len(file.partition(b".")[0]), file[4:]))
        changed += [box.added(uid, file) for uid, file in enumerate(fresh, box.uidnext)]
        self.put(changed)
        return self.note(box, times), times

    def note(self, before: Mailbox, times: Times) -> Mailbox:
        """The end of a change: count on from what it has left in the tables."""
        self.db.execute(
            "UPDATE mailbox SET new = ?, cur = ?,"
            " uidnext = max(uidnext, (SELECT ifnull(max(uid), 0) + 1 FROM message WHERE box = id)),"
            " modseq = max(modseq, (SELECT ifnull(max(modseq), 0) FROM message WHERE box = id),"
            " (SELECT ifnull(max(modseq), 0) FROM expunged WHERE box = id)) WHERE id = ?",
            (*times, before.id),
        )
        box = self.by_id(before.id)
        if more := box.uidnext - before.uidnext:
            given = self.number("PRAGMA user_version") + more
            self.db.execute(f"PRAGMA user_version = {given}")
            self.marked(self.marked()[0], self.given, given)
        return box

    @contextlib.contextmanager
    def change(self, number: int, durable: bool = True) -> Iterator[Mailbox]:
        """A change of our own, under the lock, to a mailbox that agrees with its folder. The
        times are then negative: ours say nothing of others' changes."""
        with self.transaction(durable=durable):
            box = self.refresh(self.by_id(number), thorough=False)[0]
            before = self.db.total_changes
            yield box
            if self.db.total_changes != before:
                new, cur = folder_times(self.folder(box.name))
                self.note(box, (-new, -cur))

    def put(self, rows: Iterable[MessageRow]) -> None:
        """Add or change rows; for the trigger, REPLACE deletes nothing."""
        self.db.executemany("REPLACE INTO message VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def forget(self, number: int, uids: Sequence[int]) -> None:
        """Delete rows; a trigger remembers their UIDs for sessions that know them."""
        old = int(time.time()) - EXPUNGED_KEPT
        self.db.execute("DELETE FROM expunged WHERE time < ?", (old,))
        keys = [(number, uid) for uid in uids]
        self.db.executemany("DELETE FROM message WHERE box = ? AND uid = ?", keys)

    def read(self, box: Mailbox, row: MessageRow) -> bytes:
        """The message as stored."""
        return bytes(on_file(self.folder(box.name), row.file, read_file))

    def date(self, box: Mailbox, row: MessageRow) -> float:
        """INTERNALDATE: the file's time, which renames, links and backups keep."""
        when = on_file(self.folder(box.name), row.file, os.stat).st_mtime
        return float(min(max(when, -(2**31)), 2**35))  # years that datetime can do

    def keep_sizes(self, number: int, sizes: dict[int, int]) -> None:
        """Remember what had to be computed. That it fails when others are busy is no loss."""
        rows = [(size, number, uid) for uid, size in sizes.items()]
        with contextlib.suppress(sqlite3.OperationalError), self.transaction(durable=False):
            self.db.executemany("UPDATE message SET size = ? WHERE box = ? AND uid = ?", rows)

    def known_keywords(self, box: Mailbox, wanted: Sequence[str]) -> list[str]:
        """The keywords in the spelling this mailbox has for them; new ones are added to it."""
        known = {keyword.lower(): keyword for keyword in box.keywords.split()}
        names = [known.setdefault(keyword.lower(), keyword) for keyword in wanted]
        if len(known) > KEYWORD_LIMIT:
            raise MailError("LIMIT", "Too many keywords in this mailbox")
        if (words := " ".join(known.values())) != box.keywords:
            self.db.execute("UPDATE mailbox SET keywords = ? WHERE id = ?", (words, box.id))
        return list(dict.fromkeys(names))

    def store(
        self, number: int, uids: Sequence[int], how: str, flags: str,
        keywords: Sequence[str] = (), unchanged_since: int = 2**63,
    ) -> tuple[int, list[int]]:
        """STORE with how "+", "-" or "" (replace): the MODSEQ of the change, and the UIDs left
        alone because they have changed since."""
        updates, refused = [], []
        self.refresh(self.by_id(number), thorough=False)  # new messages get their UIDs durably
        with self.change(number, durable=False) as box:
            folder, names = self.folder(box.name), self.known_keywords(box, keywords)
            for row in self.picked(number, uids):
                if row.modseq > unchanged_since:
                    refused.append(row.uid)
                    continue
                file, letters = row.file, sorted(combine(how, row.flags, flags))
                words = " ".join(combine(how, row.keywords.split(), names))
                if letters != sorted(row.flags):
                    with contextlib.suppress(Vanished):  # of which the next look will tell
                        file = on_file(folder, file, lambda path: reflag(path, how, flags))
                elif words == row.keywords:
                    continue
                updates.append(box.added(row.uid, file, words)._replace(size=row.size))
            self.put(updates)
            if updates:
                os.utime(folder + b"/cur")  # keywords rename nothing, and yet sleepers must stir
        return box.modseq + 1, refused

    def append(self, number: int, delivery: Delivery, flags: str, keywords: Sequence[str]) -> int:
        """Take in a delivery that is finished; return its UID."""
        with self.change(number) as box:
            names = " ".join(self.known_keywords(box, keywords))
            self.put([box.added(box.uidnext, delivery.keep(flags), names)])
        return box.uidnext

    def copy(self, source: Mailbox, uids: Sequence[int], target: Mailbox, move: bool) -> Pairs:
        """All or nothing: the UIDs here and there. Moving expunges when the copies are safe:
        killed in between, it leaves both, never none."""
        with contextlib.ExitStack() as undo:
            with self.change(target.id):
                source = self.refresh(self.by_id(source.id), thorough=False)[0]
                target = self.by_id(target.id)  # as it is now, if it is the source too
                here, there = self.folder(source.name), self.folder(target.name)
                if len(rows := self.picked(source.id, uids)) < len(uids):
                    raise Vanished
                words = {word for row in rows for word in row.keywords.split()}
                self.known_keywords(target, sorted(words))
                for uid, row in enumerate(rows, target.uidnext):
                    file = b"cur/" + unique_name() + b":2," + row.flags.encode()
                    path = there + b"/" + file
                    on_file(here, row.file, partial(os.link, dst=path))
                    undo.callback(os.unlink, path)
                    self.put([target.added(uid, file, row.keywords)])
                sync_directory(there + b"/cur")
            undo.pop_all()
        if move:
            self.expunge(source.id, uids)
        return [(row.uid, uid) for uid, row in enumerate(rows, target.uidnext)]

    def expunge(self, number: int, uids: Sequence[int], deleted_only: bool = False) -> None:
        with self.change(number) as box:
            rows = [r for r in self.picked(number, uids) if "T" in r.flags or not deleted_only]
            for row in rows:
                with contextlib.suppress(Vanished):
                    on_file(self.folder(box.name), row.file, os.unlink)
            if rows:
                self.forget(number, [row.uid for row in rows])


def combine(how: str, old: Sequence[str], change: Sequence[str]) -> list[str]:
    """STORE's arithmetic.

    >>> combine("+", "RS", "FS"), combine("-", "RS", "FS"), combine("", "RS", "FS")
    (['R', 'S', 'F'], ['R'], ['F', 'S'])
    """
    if how == "-":
        return [each for each in old if each not in change]
    return list(dict.fromkeys([*(old if how else ()), *change]))


def reflag(path: bytes, how: str, flags: str) -> bytes:
    """Rename for new flags; letters that IMAP doesn't know stay (Dovecot's keywords, mutt's P)."""
    folder, _, name = path.rsplit(b"/", 2)
    info = name.partition(b":2,")[2].decode("latin-1")
    kept = [letter for letter in info if how or letter not in "DFRST"]
    letters = "".join(sorted({*combine(how or "+", kept, flags)}))
    renamed = b"cur/" + name.partition(b":")[0] + b":2," + letters.encode("latin-1")
    os.rename(path, folder + b"/" + renamed)
    return renamed


# ------------------------------------------------------------------------------------------------
# 9  Messages
#
# A message is its bytes with CRLF line ends and a tree of offsets into them: every answer is cut
# from those bytes, nothing is put together again from parsed pieces. Mail is written by anybody,
# so nothing in here raises, recurses by the sender's will or takes more than linear time; where
# no RFC says what broken mail means, the answer is Dovecot's.
# ------------------------------------------------------------------------------------------------

MAX_DEPTH, MAX_PARTS, MAX_BOUNDARY = 100, 10_000, 80  # a part beyond these stays opaque
ATOM_CHAR, MIME = rb"[!#-'*+\-/-9=?A-Z^-~\x80-\xff]", rb"[!#-'*+\-.0-9A-Z^-~\x80-\xff]"
QUOTED, DOTTED = rb'"(?:[^"\\]++|\\.)*+"', rb"(?:%b|\.)++" % ATOM_CHAR
COMMENT = rb"\((?:[^()\\]++|\\.|\((?:[^()\\]++|\\.|\([^()]*+\))*+\))*+\)"  # nests three deep
GAP = rb"(?:[ \t\r\n]++|%b)*+" % COMMENT
SPACE = re.compile(GAP, re.S)
TOKEN = re.compile(rb'(%b)|(%b|%b)|["(].*' % (COMMENT, QUOTED, DOTTED), re.S)  # the last: no end
ADDRESS = re.compile(rb"""(?!\Z) (?: (?P<group> %(word)b*+) : %(s)b)?+
    (?P<box> (?: (?P<name> %(word)b*+) (?P<angle> < %(s)b)
                 (?: (?P<route> (?:@%(dots)b,?)++) : %(s)b)? )?
             (?P<user> %(word)b?) (?P<at> @ %(s)b (?:(?P<host> %(host)b) | (?:%(dots)b)?) %(s)b)?
             (?(angle) (?P<end> > %(s)b)? | (?(at) | (?P<more> %(word)b*+))) )
    (?P<close> ; %(s)b)? (?P<next> , %(s)b)?""" % {
        b"s": GAP, b"word": rb"(?:(?:%b|%b)%b)" % (DOTTED, QUOTED, GAP), b"dots": DOTTED,
        b"host": rb"(?:\[(?:[^][\\]|\\.)*+\]|%b++(?:\.%b++)*+(?!\.))" % (ATOM_CHAR, ATOM_CHAR),
    }, re.S | re.X)
MEDIA = re.compile(rb"\s*(%b+)\s*(?:\Z|/\s*(%b+)\s*(;.*|\Z))" % (MIME, MIME), re.S)
KIND = re.compile(b"(?P<text>text/)|(?P<message>message/rfc822$)|(?P<multipart>multipart/.)", re.I)
PARAMETER = re.compile(  # the digits and asterisks are RFC 2231's
    rb';\s*+(%b+?)(?:\*([0-9]{1,9}))?+(\*?)\s*+=\s*+(%b|=[^; \t\r\n]*+|%b++|(?!"))'
    % (MIME, QUOTED, MIME), re.S)
FIRST_WORD = re.compile(rb"\s*(%b*)\s*(.*)" % MIME, re.S)
LANGUAGE = re.compile(rb"(?:\A\s*|(?<=[^\s,])\s*,\s*)(%b+)" % ATOM_CHAR)
HEADER_END, DASHES = re.compile(rb"^(?:\r\n|(?=--))|\Z", re.M), re.compile(rb"\n--")
ENCODED_WORD = re.compile(
    rb"=\?([^?*]*+)(?:\*[^?]*+)?\?([bq])\?([^?]*+)\?=(?:[ \t\r\n]++(?==\?))?", re.I)
# Only what is in Python's own table: looking up any other name imports, and is never forgotten.
CHARSETS = {name for name in (*aliases, *aliases.values(), "koi8_u", "cp874")
            if not re.search("codec|rot_13|mbcs", aliases.get(name, name))}
Numbers = tuple[int, ...]


def quoted(value: Any) -> bytes:
    """None, numbers, strings and lists as IMAP writes them; a tuple is its items side by side.
    A string is a literal where it must, where that is shorter, and if it is a bytearray."""
    if value is None or value == []:
        return b"NIL"
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, list | tuple):
        items = map(quoted, value)
        return b"".join(items) if isinstance(value, tuple) else b"(%b)" % b" ".join(items)
    raw = value.replace(b"\0", "\ufffd".encode())  # not even a literal can hold it
    literal = isinstance(value, bytearray) or re.search(rb'[\r\n]|(?:["\\][^"\\]*){5}', raw)
    if literal or not raw.isascii():
        return b"{%d}\r\n%b" % (len(raw), raw)
    return b'"%b"' % re.sub(rb'(["\\])', rb"\\\1", raw)


def by_name(fields: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The fields unfolded; of several of one name, the last."""
    return {name: value.replace(b"\r\n", b"") for name, value in fields}


def human(value: bytes | None) -> bytes | bytearray | None:
    """A subject or name: white space is squeezed, and anything special makes it a literal."""
    text = re.sub(rb"[ \t\r\n]+", b" ", value or b"").strip(b" ")
    special = text != value or re.search(rb'[\x80-\xff"\\]', text)
    return bytearray(text) if text and special else value and text


def unquoted(text: bytes) -> bytes:
    """What a word, a quoted string or a comment means."""
    text = text[1:-1] if text[:1] in (b'"', b"(") else text
    return re.sub(rb"\r?\n|\\([^\r\n\0])", rb"\1", text)


def phrase(text: bytes | None) -> bytes:
    return b" ".join(unquoted(word) for _, word in TOKEN.findall(text or b"") if word)


def header_fields(header: bytes) -> list[tuple[bytes, bytes]]:
    """(lower-case name, value with its folds) of each field in order; other lines are skipped."""
    lines = (line.partition(b":") for line in re.split(rb"\r\n(?![ \t])", header))
    return [(name.rstrip(b" \t").lower(), value.lstrip(b" \t") or value[1:])
            for name, colon, value in lines if colon and b"\n" not in name]


def addresses(value: bytes) -> list[list[Any]]:
    """The addresses of a From, To, ... for ENVELOPE; faults are marked as Dovecot does."""
    found, grouped = list[list[Any]](), False
    for match in ADDRESS.finditer(SPACE.sub(b"", value, 1)):
        group, box, user, at, host = match.group("group", "box", "user", "at", "host")
        if group is not None:
            grouped = True
            found.append([None, None, phrase(group), None])
        name, mailbox = phrase(match["name"]), phrase(user) if user else b"MISSING_MAILBOX"
        if match["angle"]:
            host = b"SYNTAX_ERROR" if not match["end"] or at and not host else host
        elif comments := [text for text, _ in TOKEN.findall(box) if text not in (b"", b"()")]:
            name = unquoted(comments[-1])
        elif not at and (match["more"] or user[:1] == b'"'):
            name, mailbox = phrase(box), b"MISSING_MAILBOX"
        if group is None or box or match["next"] and not match["close"]:
            host = host or b"MISSING_DOMAIN"
            found.append([human(name or None), match["route"], mailbox, host])
        if grouped and (match["close"] or not match["next"]):
            grouped = False
            found.append([None] * 4)
        if not match["next"] or len(found) >= MAX_PARTS:  # garbage: the rest is not guessed at
            break
    return found


def parameters(value: bytes) -> list[bytes]:
    r"""Names and values of a media type or disposition, the pieces of RFC 2231 put together.

    >>> parameters(b"; a=1; b*1*=%C3; b*0*=utf-8''x; c=\"d e\"")
    [b'a', b'1', b'c', b'd e', b'b*', b"utf-8''x%C3"]
    """
    found, pieces = list[bytes](), collections.defaultdict[bytes, list[Any]](list)
    for name, number, star, text in PARAMETER.findall(value):
        if number or star:
            pieces[name.lower()].append((int(number or 0), star, unquoted(text), name))
        else:
            found += [name, unquoted(text)]
    for _, rows in sorted(pieces.items()):
        rows.sort()
        if [row[0] for row in rows] != [*range(len(rows))]:  # some are missing: as they are
            for number, star, text, name in rows:
                found += [b"%b*%d%b" % (name, number, star), text]
            continue
        star = max(row[1] for row in rows)
        texts = (row[2] if row[1] == star else row[2].replace(b"%", b"%25") for row in rows)
        found += [rows[0][3] + star, b"".join(texts)]
    return found


def decoded(raw: bytes, encoding: bytes, charset: bytes) -> str:
    """The text below a transfer encoding; of base64, what comes before the first fault."""
    if encoding in (b"quoted-printable", b"q"):
        raw = binascii.a2b_qp(raw, header=encoding == b"q")
    elif encoding in (b"base64", b"b"):
        digits = re.split(rb"[^A-Za-z0-9+/]", raw.translate(None, b" \t\r\n"), 1)[0]
        raw = binascii.a2b_base64(digits[:len(digits) - (len(digits) % 4 == 1)] + b"===")
    name = charset.decode("latin-1").lower().replace("-", "_")
    return raw.decode(name if name in CHARSETS else "utf-8", "replace")


def decoded_words(value: bytes) -> str:
    """A header's text with folds and encoded words (RFC 2047) undone."""
    def plain(word: re.Match[bytes]) -> bytes:
        return decoded(word[3], word[2].lower(), word[1]).encode("utf-8", "replace")

    return ENCODED_WORD.sub(plain, re.sub(rb"\r\n[ \t]+", b" ", value)).decode("utf-8", "replace")


class Message:
    """A message, or a part of one: its header from `start`, its body from `body` to `end`.
    All offsets are those with CRLF."""

    def __init__(
        self, data: bytes, start: int = 0, number: Numbers = (), parent: Message | None = None
    ) -> None:
        if not parent:
            data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        self.data, self.start, self.children = data, start, list[Message]()
        self.parts: list[Message] = parent.parts if parent else []  # all of them, in order
        self.numbered: dict[Numbers, Message] = parent.numbered if parent else {}
        self.opened: tuple[bytes, ...] = parent.opened if parent else ()  # boundaries
        self.depth: int = parent.depth + 1 if parent else 1
        ends = (match.end() for match in HEADER_END.finditer(data, start) if match[0]
                or match.end() == len(data) or data.startswith(self.opened, match.end() + 2))
        self.body = self.end = next(ends)  # after the blank line, or at a boundary
        self.fields = header_fields(data[start:self.body])
        self.first = by_name(reversed(self.fields))
        digest = parent and parent.media[1].lower() == b"digest"
        usual = b"message/rfc822" if digest else b"text/plain"
        media = MEDIA.match(self.content(b"type", usual)) if self.depth < MAX_DEPTH else None
        main, sub, more = media.groups(b"") if media else (b"", b"", b"")
        kind = KIND.match(b"%b/%b" % (main, sub))
        self.kind = kind and kind.lastgroup  # None: nothing that we look into
        if self.kind == "message":
            main, sub = b"message", b"rfc822"
        self.media: tuple[bytes, bytes] = main, sub
        self.parameters = flat = parameters(more)
        self.named = {name.lower(): text for name, text in zip(flat[-2::-2], flat[::-2])}
        inside = parent is not None and parent.kind == "multipart"
        if not inside and not {b"mime-version", b"content-type"} & set(self.first):
            self.first = {}
        self.parts.append(self)
        self.numbered.setdefault(number, self)
        if self.kind != "multipart" and not (inside and self.kind == "message"):
            number += (1,)  # RFC 3501 6.4.5: what is not multipart has a part 1
            self.numbered.setdefault(number, self)
        self.after = self.read(number)
        if parent:
            parent.children.append(self)

    def boundary(self, at: int) -> tuple[int, bytes | None]:
        """The next line that begins with an open boundary, and the longest such."""
        for match in DASHES.finditer(self.data, max(at - 1, 0)):
            if self.data.startswith(self.opened, match.end()) and len(self.parts) < MAX_PARTS:
                fits = (text for text in self.opened if self.data.startswith(text, match.end()))
                return match.end() - 2, max(fits, key=len)
        return len(self.data), None

    def read(self, number: Numbers) -> int:
        """Read the body and what is in it, up to the boundary of another; where it ends."""
        at, mine = self.body, None
        if self.kind == "message":
            at = Message(self.data, at, number, self).after
        elif self.kind == "multipart" and b"boundary" in self.named:
            mine = self.named[b"boundary"][:MAX_BOUNDARY]
            self.opened += (mine,)
        while True:
            line, text = self.boundary(at)
            if text is None or text != mine:
                break
            after = line + 2 + len(text)
            at = self.data.find(b"\n", after) + 1 or len(self.data)
            if self.data.startswith(b"--", after):
                mine, self.opened = None, self.opened[:-1]
            elif self.data.startswith(b"\n", at - 1):
                at = Message(self.data, at, (*number, len(self.children) + 1), self).after
        self.end = at = line if line == at or text is None else line - 2
        if line == self.body < len(self.data):
            self.body = self.end = max(line - 2, self.start)  # the boundary owns the line end
        return at

    def content(self, name: bytes, usual: bytes = b"") -> bytes:
        value = self.first.get(b"content-" + name, usual)
        return TOKEN.sub(rb"\2 ", value) if b"(" in value else value  # comments go

    def envelope(self) -> list[Any]:
        """ENVELOPE; of several fields of a name all addresses count, or the last text."""
        def people(name: bytes) -> list[Any]:
            rows = (row for key, value in self.fields if key == name for row in addresses(value))
            found = tuple(itertools.islice(rows, MAX_PARTS))
            return [found] if found else []

        last, author = by_name(self.fields), people(b"from")
        return [last.get(b"date"), human(dict(self.fields).get(b"subject")), author,
                people(b"sender") or author, people(b"reply-to") or author, people(b"to"),
                people(b"cc"), people(b"bcc"), last.get(b"in-reply-to"), last.get(b"message-id")]

    def structure(self, extended: bool) -> list[Any]:
        """BODYSTRUCTURE, or BODY; it recurses, but not deeper than MAX_DEPTH."""
        if self.kind == "multipart":
            inner = self.children or [Message(b"")]  # the grammar wants one
            words: list[Any] = [tuple(child.structure(extended) for child in inner), self.media[1]]
            more: Any = self.parameters
        else:
            implied = self.kind == "text" and b"charset" not in self.named
            encoding, rest = FIRST_WORD.findall(self.content(b"transfer-encoding"))[0]
            words = [*self.media, self.parameters + [b"charset", b"us-ascii"] * implied,
                     self.first.get(b"content-id"), self.first.get(b"content-description"),
                     encoding if encoding and not rest else b"7bit", self.end - self.body]
            for child in self.children:
                words += [child.envelope(), child.structure(extended)]
            if self.kind:
                words.append(self.data.count(b"\n", self.body, self.end))
            more = self.first.get(b"content-md5")
        if extended:
            word, rest = FIRST_WORD.findall(self.content(b"disposition"))[0]
            named = b"content-disposition" in self.first
            words += [more, [word, parameters(rest)] if named else None,
                      LANGUAGE.findall(self.content(b"language")),
                      self.first.get(b"content-location")]
        return words

    def section(self, part: Numbers, what: str, fields: tuple[str, ...]) -> bytes | None:
        """BODY[part.what (fields)]; None if there is no such part."""
        found = self.numbered.get(part)
        if found and part and what not in ("", "MIME"):
            found = found.children[0] if found.kind == "message" else None
        if not found:
            return None
        start = found.body if what == "TEXT" or part and not what else found.start
        text = self.data[start:found.end if what in ("", "TEXT") else found.body]
        text = text.replace(b"\0", b"\x80")  # IMAP can't send NULs
        if not what.startswith("HEADER.FIELDS"):
            return text
        names, exclude = {name.lower().encode() for name in fields}, what == "HEADER.FIELDS.NOT"
        lines = re.findall(rb"(?!\r\n)[^\n]+\n?(?:[ \t][^\n]*\n?)*+", text)
        blank = not exclude or text == b"\r\n" or text.endswith(b"\r\n\r\n")
        return b"".join(line for line in lines if exclude != (
            line.partition(b":")[0].rstrip(b" \t").lower() in names)) + b"\r\n" * blank

    def header_text(self, name: str) -> str | None:
        """The decoded fields of this name, a line each; None if there are none."""
        wanted = name.lower().encode()
        found = [decoded_words(value) for key, value in self.fields if key == wanted]
        return "\n".join(found) if found else None

    def text(self, with_header: bool) -> str:
        """What BODY and TEXT search: the text parts; for TEXT the headers of all parts too."""
        found = []
        for part in self.parts:
            if with_header:
                found.append(decoded_words(self.data[part.start:part.body]))
            if not part.children and part.media[0].lower() in (b"text", b"message"):
                encoding = dict(part.fields).get(b"content-transfer-encoding", b"")
                encoding = FIRST_WORD.findall(encoding)[0][0].lower()
                charset = part.named.get(b"charset", b"")
                found.append(decoded(self.data[part.body:part.end], encoding, charset))
        return "\n".join(found)

    def sent_day(self) -> float:
        """The day as written in the Date field: the SENT keys disregard the time zone."""
        found = email.utils.parsedate_tz(self.header_text("Date") or "") or (0, 0, 0)
        with contextlib.suppress(ValueError, OverflowError):
            return datetime.date(*found[:3]).toordinal()
        return math.nan  # which is before and after nothing


# ------------------------------------------------------------------------------------------------
# 10  IMAP
#
# A command is read whole (only APPEND's message goes to disk as it comes), looked up in a table,
# parsed and executed; then the client is told what else has changed, where RFC 3501 7.4.1 allows
# it. Whatever a client sends gets its tagged answer; there is no socket and no waiting in here.
# What a session knows is its View and the tag of its IDLE: that is all that sleeps.
# ------------------------------------------------------------------------------------------------

CAPABILITY = "IMAP4rev1 LITERAL+ SASL-IR ID ENABLE IDLE"
SYSTEM_FLAGS = "\\Answered \\Flagged \\Deleted \\Seen \\Draft"
LOGIN_INPUT = 8 * 1024  # bytes of a command with its literals before log-in
BAD_LIMIT = 20  # bad commands in a row until BYE; before log-in 3
NESTING = 100  # levels of a SEARCH; Python's limit of 1000 calls would allow 330
BATCH, BATCH_READ = 500, 25  # messages at a time: by the index alone; reading their files
STAR = 10**10  # "*" in a sequence set: above every number that SET takes

ATOM = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\\]]+')
ASTRING = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\]+')
LIST_PATTERN = re.compile(rb'[^\x00-\x20\x7f-\xff(){"\\]+')
QUOTED_STRING = re.compile(rb'"((?:[^"\\\r\n\x00]|\\["\\])*)"')
LITERAL = re.compile(rb"\{(\d{1,18})(\+?)\}\r?\n")
RANGE = rb"(?:[1-9]\d{0,9}|\*)(?::(?:[1-9]\d{0,9}|\*))?"
SET = re.compile(rb"%b(?:,%b)*" % (RANGE, RANGE))
SECTION = re.compile(
    rb"\[((?:[1-9]\d{0,8}(?:\.|(?=\])))*)"
    rb"(HEADER\.FIELDS(?:\.NOT)?(?= )|(?:HEADER|TEXT|(?<=\.)MIME|(?<!\.))(?=\]))", re.I)
TAG = re.compile(rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]{1,64}")
SLEEPER_INPUT = re.compile(rb"(DONE\r?\n)?(?:(%b) IDLE\r?\n)?" % TAG.pattern, re.I)

Ranges = list[tuple[int, int]]
Step = Generator["bytes | Ask | Pause | Move", Any, str]

# The auth service: one request for each log-in, answered with a ticket sealed for that client's
# socket. Who asks faces the world and may be taken over, so no request is trusted, and a refusal
# tells neither by its words nor by its time whether there is such a user.

REFUSED = "[AUTHENTICATIONFAILED] Authentication failed."
PBKDF2_ROUNDS = 100_000  # 25 ms of a processor for each log-in; Dovecot's default is 5000

Secret = tuple[int, Callable[[bytes], bool]]  # how dear it is to check a password, and the check


def read_secret(stored: str) -> Secret:
    """From `{SCHEME}...` of a passwd-file; ValueError says what is wrong with it."""
    same = hmac.compare_digest
    match = re.fullmatch(r"\{([^{}]*)\}(.+)", stored)
    scheme, text = (match[1].upper(), match[2]) if match else ("", "")
    if scheme in ("PLAIN", "CLEARTEXT"):
        return 0, partial(same, text.encode("utf-8", "surrogateescape"))
    if scheme == "SSHA512" and len(raw := base64.b64decode(text, validate=True)) > 64:
        return 1, lambda given: same(raw[:64], hashlib.sha512(given + raw[64:]).digest())
    found = re.fullmatch(r"\$1\$([^$]*)\$([1-9]\d{0,6})\$([0-9a-fA-F]{40})", text, re.A)
    if scheme == "PBKDF2" and found:
        salt, rounds, digest = found[1].encode(), int(found[2]), bytes.fromhex(found[3])
        return rounds, lambda given: same(digest, hashlib.pbkdf2_hmac("sha1", given, salt, rounds))
    # Without a scheme Dovecot reads CRYPT; to take such a hash for the password gives it away.
    raise ValueError(f"not {{PLAIN}}, {{SSHA512}} or {{PBKDF2}} and a password: {{{scheme}}}")


def encode_password(scheme: str, password: str) -> str:
    """`{SCHEME}...` for a passwd-file, as by `doveadm pw`; ValueError: it can't be written so."""
    given, salt = password.encode("utf-8", "surrogateescape"), secrets.token_hex(8).encode()
    if scheme.upper() == "SSHA512":
        digest = hashlib.sha512(given + salt).digest()
        return "{SSHA512}" + base64.b64encode(digest + salt).decode()
    if scheme.upper() == "PBKDF2":
        digest = hashlib.pbkdf2_hmac("sha1", given, salt, PBKDF2_ROUNDS)
        return f"{{PBKDF2}}$1${salt.decode()}${PBKDF2_ROUNDS}${digest.hex()}"
    if scheme.upper() != "PLAIN" or not re.fullmatch("[^:\0\r\n]+", password):
        raise ValueError("PLAIN, SSHA512 or PBKDF2; PLAIN neither empty nor with a colon")
    return "{PLAIN}" + password


@lru_cache(1)
def read_passwords(path: str, version: object) -> tuple[dict[str, tuple[Secret, str]], Secret]:
    """Dovecot's passwd-file, read again when its `version` has changed: secret and home ("" if
    none is named) of each user, and the dearest secret. A wrong line costs only its user."""
    users: dict[str, tuple[Secret, str]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            name, stored, _, _, _, home, *_ = (line.rstrip("\n") + ":" * 6).split(":")
            if not line.strip() or line.startswith("#"):
                continue
            try:  # the name becomes part of a path
                if name in users or not re.fullmatch(r"(?!\.)(?!.*\.\.)[a-z0-9._@-]{1,128}", name):
                    raise ValueError("not a user name (in lower case), or it has an earlier line")
                users[name] = read_secret(stored), home
            except ValueError as error:
                log.warning("%s:%d: %s", path, number, error)
    known = [secret for secret, _ in users.values()]
    return users, max(known, key=lambda secret: secret[0], default=(0, lambda given: False))


class AuthSession(Session):
    """[identity, sid, remote, user, password] -> ["ok", user, ticket, seal] or ["no", reason]."""

    input_limit = 8 * 1024

    def step(self) -> Reply | None:
        return self.answer() if self.buffer else None

    def answer(self) -> Reply:
        try:
            reply = self.log_in(*checked(self.buffer.decode(), (str,) * 5))
        except ValueError as error:  # its words may hold a password
            log.info("auth: request refused: %s", type(error).__name__)
            reply = ["no", REFUSED]
        except OSError as error:
            log.error("%s: %s", self.config.passwd_file, error.strerror)
            reply = ["no", "[UNAVAILABLE] Temporary authentication failure."]
        self.buffer.clear()
        yield compact(reply).encode()
        self.ended = "answered"

    def log_in(self, identity: str, sid: str, remote: str, name: str, password: str) -> list[str]:
        if not re.fullmatch("[!-~]{0,400}", identity + sid + remote) or len(password) > 1024:
            raise ValueError("not a request")
        path, user = self.config.passwd_file, name.lower()  # Dovecot's auth_username_format, %Lu
        found = os.stat(path)
        users, dearest = read_passwords(path, (found.st_mtime_ns, found.st_size, found.st_ino))
        (rounds, fits), home = users.get(user, (dearest, ""))
        given = password.encode("utf-8", "surrogateescape")
        if not fits(given) or user not in users:
            if rounds < dearest[0]:  # a refusal takes as long as the dearest
                dearest[1](given)
            log.info("<%s> auth: wrong password or no such user: %.64r", sid, name)
            return ["no", REFUSED]
        home = home if os.path.isabs(home) else home_of(self.config, user)
        return ["ok", user, *ticket(self.key, identity, sid, user, remote, home, [])]


class BadCommand(Exception):
    """The client's mistake: the text of the BAD."""


class Item(NamedTuple):
    """A data item of FETCH: its name in the answer, a key of ITEMS or b"[]", and which bytes."""

    label: bytes
    kind: bytes
    part: tuple[int, ...] = ()
    what: str = ""
    fields: tuple[str, ...] = ()
    start: int = 0
    length: int = STAR
    seen: bool = False


class Key(NamedTuple):
    """A SEARCH key. Cost: 0 the index tells, 1 the file's status, 2 the message, 3 all its text."""

    cost: int
    test: Callable[[Candidate], bool]


class Parser:
    """Takes the arguments off a command, in which literals stand as they came. What RFC 3501
    section 9 doesn't allow is BadCommand."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def sees(self, token: bytes) -> bool:
        return self.text.startswith(token, self.at)

    def take(self, token: bytes) -> bool:
        return bool(self.may(re.escape(token)))

    def need(self, token: bytes) -> None:
        self.must(re.escape(token), "or missing argument")

    def may(self, pattern: bytes | re.Pattern[bytes]) -> re.Match[bytes] | None:
        found = re.compile(pattern).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def must(self, pattern: bytes | re.Pattern[bytes], what: str = "arguments") -> re.Match[bytes]:
        if not (found := self.may(pattern)):
            raise BadCommand(f"Invalid {what}")
        return found

    def end(self) -> None:
        self.must(rb"\Z", "text after the arguments")

    def rest(self) -> bytes:
        return self.must(rb"(?s).*")[0]

    def atom(self) -> str:
        return self.must(ATOM)[0].decode().upper()

    def astring(self, plain: re.Pattern[bytes] = ASTRING) -> bytes:
        if found := self.may(plain):
            return found[0]
        if found := self.may(QUOTED_STRING):
            return re.sub(rb"\\(.)", rb"\1", found[1])
        size = int(self.must(LITERAL)[1])  # which the session has read whole
        self.at += size
        return self.text[self.at - size : self.at]

    def mailbox(self, plain: re.Pattern[bytes] = ASTRING) -> str:
        return re.sub(r"(?i)\Ainbox(?=\.|$)", "INBOX", self.astring(plain).decode("latin-1"))

    pattern = partialmethod(mailbox, LIST_PATTERN)

    def number(self) -> int:
        return int(self.must(rb"\d{1,18}", "number")[0])

    def several(self, item: Callable[[Parser], Any]) -> list[Any]:
        found = [item(self)]
        while self.take(b" "):
            found.append(item(self))
        return found

    def items(self, item: Callable[[Parser], Any], least: int = 1) -> list[Any]:
        """A parenthesised list."""
        self.need(b"(")
        found = [] if not least and self.sees(b")") else self.several(item)
        self.need(b")")
        return found

    words = partialmethod(items, atom)

    def sequence(self) -> Ranges:
        text = self.must(SET, "messageset")[0].replace(b"*", b"%d" % STAR)
        parts = [part.split(b":") for part in text.split(b",")]
        return [(int(ends[0]), int(ends[-1])) for ends in parts]

    def flag(self) -> str:
        name = self.must(rb"\\?" + ATOM.pattern, "flag")[0].decode()[:100]
        if name[0] == "\\" and (name := name.title()) not in LETTERS:
            raise BadCommand(f"Invalid system flag {name}")
        return name

    def flags(self) -> tuple[str, list[str]]:
        """(letters of system flags, keywords); STORE does without parentheses, too."""
        names = self.items(Parser.flag, 0) if self.sees(b"(") else self.several(Parser.flag)
        letters = sorted({LETTERS[name] for name in names if name in LETTERS})
        return "".join(letters), [name for name in names if name not in LETTERS]

    def time(self, form: str) -> datetime.datetime:
        try:
            return datetime.datetime.strptime(self.astring().decode("ascii").strip(), form)
        except ValueError:
            raise BadCommand("Invalid date") from None

    def day(self) -> int:
        return self.time("%d-%b-%Y").toordinal()

    def condstore(self) -> bool:
        return bool(self.may(rb"(?i) \(CONDSTORE\)"))

    def store(self) -> tuple[str, bool, int, str, list[str]]:
        found = self.must(rb"(?i)(?:\(UNCHANGEDSINCE (\d{1,18})\) )?([+-]?)FLAGS(\.SILENT)? ")
        return found[2].decode(), bool(found[3]), int(found[1] or 2**63), *self.flags()

    def append(self) -> tuple[str, str, list[str], float | None, int]:
        """All that comes before APPEND's message, and where that begins."""
        name, when, flags, keywords = self.mailbox(), None, "", list[str]()
        self.need(b" ")
        if self.sees(b"("):
            flags, keywords = self.flags()
            self.need(b" ")
        if self.sees(b'"'):
            when = self.time("%d-%b-%Y %H:%M:%S %z").timestamp()
            self.need(b" ")
        return name, flags, keywords, when, self.must(LITERAL).start()

    def fetch(self) -> tuple[list[Item], int]:
        if macro := self.may(rb"(?i)(ALL|FAST|FULL)(?= |$)"):
            count = {b"FAST": 3, b"ALL": 4, b"FULL": 5}[macro[0].upper()]
            names = (b"FLAGS", b"INTERNALDATE", b"RFC822.SIZE", b"ENVELOPE", b"BODY")
            items = [Item(each, each) for each in names[:count]]
        else:
            items = self.items(Parser.fetch_item) if self.sees(b"(") else [self.fetch_item()]
        since = self.may(rb"(?i) \(CHANGEDSINCE (\d{1,18})\)")
        return items, int(since[1]) if since else -1

    def fetch_item(self) -> Item:
        name = self.must(rb"[A-Za-z0-9.]+", "FETCH item")[0].upper()
        if self.sees(b"[") and name in (b"BODY", b"BODY.PEEK"):
            return self.section(name == b"BODY")
        if name in (b"RFC822", b"RFC822.TEXT", b"RFC822.HEADER"):
            return Item(name, b"[]", what=name[7:].decode(), seen=name != b"RFC822.HEADER")
        if name not in ITEMS:
            raise BadCommand("Unknown FETCH item " + name.decode())
        return Item(name, name)

    def section(self, seen: bool) -> Item:
        found = self.must(SECTION, "BODY[...] section")
        part = tuple(int(number) for number in found[1].split(b".") if number)
        what, label = found[2].decode().upper(), b"BODY" + found[0].upper()
        names = self.items(Parser.astring) if self.take(b" ") else []
        fields = tuple(name.decode("latin-1").upper() for name in names)
        if fields:
            label += b" (" + b" ".join(map(atom_or_quoted, fields)) + b")"
        self.need(b"]")
        some = self.may(rb"<(\d{1,10})\.([1-9]\d{0,9})>")
        start, length = (int(some[1]), int(some[2])) if some else (0, STAR)
        label += b"]<%d>" % start if some else b"]"
        return Item(label, b"[]", part, what, fields, start, length, seen)

    def search(self) -> tuple[Key, bool]:
        """The keys as one, and whether MODSEQ may be among them."""
        if self.may(rb"(?i)CHARSET "):
            if self.astring().upper() not in (b"US-ASCII", b"UTF-8"):
                raise MailError("BADCHARSET (US-ASCII UTF-8)", "Unknown charset")
            self.need(b" ")
        return every(self.several(Parser.key)), b"MODSEQ" in self.text.upper()

    def key(self) -> Key:
        if self.depth > NESTING:
            raise BadCommand("Too many levels in SEARCH")
        self.depth += 1
        if self.sees(b"("):
            key = every(self.items(Parser.key))
        elif SET.match(self.text, self.at):
            ranges = self.sequence()
            key = Key(0, lambda m: within(m.number, ranges, len(m.view.uids)))
        else:
            key = self.named_key(self.atom())
        self.depth -= 1
        return key

    def named_key(self, name: str) -> Key:
        if name.startswith("UN") and name[2:] in (*SEARCH_FLAGS, "KEYWORD"):
            key = self.named_key(name[2:])
            return Key(key.cost, lambda m: not key.test(m))
        if letter := SEARCH_FLAGS.get(name):
            return Key(0, lambda m: letter in m.row.flags)
        if name not in SEARCH_KEYS:
            raise BadCommand(f"Unknown SEARCH key {name}")
        arguments, cost, test = SEARCH_KEYS[name]
        values = []
        for argument in arguments:
            self.need(b" ")
            values.append(argument(self))
        cost = max([cost, *(value.cost for value in values if isinstance(value, Key))])
        return Key(cost, lambda m: test(m, *values))

    def words_sought(self) -> str:
        return self.astring().decode(errors="replace").casefold()

    header_name = words_sought

    def modseq(self) -> int:
        self.may(QUOTED_STRING.pattern + rb" [a-zA-Z]+ ")  # an entry; all have one MODSEQ here
        return self.number()


@dataclass
class View:
    """A mailbox as one session knows it: what its client was told, and up to where in history.

    All but `uids` fits into a sleeper's record. That list is made when it is needed: the UIDs
    below `uidnext` that exist, and those expunged since `expunged`, which the client still counts.
    """

    home: str
    id: int
    name: str
    readonly: bool
    uidvalidity: int
    uidnext: int = 0  # before the first look
    recent: list[int] = field(default_factory=list)  # pairs: UIDs from one, below the other
    keywords: int = -1  # how many the client knows
    modseq: int = 0  # up to here it knows of changed flags
    expunged: int = 0  # and up to here of expunged messages
    new: int = 0  # the folder's times before the last look
    cur: int = 0
    known: array[int] | None = None

    def claim(self, box: Mailbox) -> None:
        """What nobody had been told of is \\Recent here, and in no other session."""
        if self.recent and box.recent <= self.recent[-1]:
            self.recent[-1] = box.uidnext
        elif box.recent < box.uidnext:
            self.recent = [*self.recent, box.recent, box.uidnext][-8:]

    @property
    def index(self) -> Index:
        return Index.at(self.home)

    def box(self) -> Mailbox:
        return self.index.by_id(self.id, self.uidvalidity)

    def query(self, what: str, *values: Any) -> list[Any]:
        return self.index.db.execute(what, (self.id, *values)).fetchall()

    @property
    def uids(self) -> array[int]:
        if self.known is None:
            rows = self.query(
                "SELECT uid FROM message WHERE box = ?1 AND uid < ?2 UNION "
                "SELECT uid FROM expunged WHERE box = ?1 AND uid < ?2 AND modseq > ?3 ORDER BY 1",
                self.uidnext, self.expunged)
            self.known = array("I", (row[0] for row in rows))
        return self.known

    def number(self, uid: int) -> int:
        """The sequence number of a UID; 0 if the session doesn't know it."""
        at = bisect.bisect_left(self.uids, uid)
        return at + 1 if at < len(self.uids) and self.uids[at] == uid else 0

    def recents(self) -> int:
        at = [bisect.bisect_left(self.uids, uid) for uid in self.recent]
        return sum(at[1::2]) - sum(at[::2])

    def is_recent(self, uid: int) -> bool:
        return bisect.bisect(self.recent, uid) % 2 == 1

    def folder(self) -> str:
        return "" if self.name == "INBOX" else "." + self.name

    def quiet(self) -> bool:
        """Can nothing have happened? Then the index need not be opened."""
        try:
            times = folder_times(os.fsencode(os.path.join(self.home, self.folder())))
        except FileNotFoundError:
            return False
        return times == (self.new, self.cur)

    def look(self, expunges: bool, describe: Callable[[Any, int, bool], str]) -> list[str]:
        """The untagged lines that bring the client up to date. Without `expunges` (RFC 3501
        7.4.1) the dead stay in the view, and new messages then wait for them too."""
        if self.quiet():
            return []
        index = self.index
        claimed, times = index.refresh(self.box(), not self.readonly, thorough=expunges)
        self.claim(claimed)
        with index.transaction("DEFERRED"):  # all of what follows is of one moment
            box = self.box()
            since = "WHERE box = ? AND modseq > ? AND uid < ? ORDER BY uid"
            rows = self.query(f"SELECT uid FROM expunged {since}", self.expunged, self.uidnext)
            dead = [row[0] for row in rows]
            query = f"SELECT uid, flags, keywords, modseq FROM message {since}"
            changed = self.query(query, self.modseq, self.uidnext)
            query = "SELECT uid FROM message WHERE box = ? AND uid >= ? ORDER BY uid"
            fresh = [row[0] for row in self.query(query, self.uidnext)]
            if dead or fresh or changed:
                self.uids  # noqa: B018  made now, of this moment
        words = box.keywords.split()
        lines = [self.flag_lines(words)] if len(words) != self.keywords else []
        lines += [describe(row, self.number(row[0]), self.is_recent(row[0])) for row in changed]
        self.name, self.modseq = box.name, box.modseq
        self.new, self.cur = UNSETTLED
        if expunges or not dead:
            lines += self.resize(dead, fresh) if dead or fresh or not self.uidnext else []
            self.uidnext, self.expunged = box.uidnext, box.modseq
            self.new, self.cur = times
        return lines

    def resize(self, dead: list[int], fresh: list[int]) -> list[str]:
        lines, recents = [], self.recents()
        for uid in reversed(dead):
            if number := self.number(uid):
                del self.uids[number - 1]
                lines.append(f"* {number} EXPUNGE\r\n")
        self.uids.extend(fresh)
        if fresh or not self.uidnext:
            lines.append(f"* {len(self.uids)} EXISTS\r\n")
        if self.recents() != recents or not self.uidnext:
            lines.append(f"* {self.recents()} RECENT\r\n")
        return lines

    def flag_lines(self, words: list[str]) -> str:
        self.keywords = len(words)
        flags = " ".join([SYSTEM_FLAGS, *words])
        usual = f"({flags} \\*)] Flags permitted."
        permanent = "()] Read-only mailbox." if self.readonly else usual
        return f"* FLAGS ({flags})\r\n* OK [PERMANENTFLAGS {permanent}\r\n"


class Candidate:
    """A message that FETCH or SEARCH looks at; its file is read when something in it is asked."""

    def __init__(self, view: View, box: Mailbox, row: MessageRow, sizes: dict[int, int]) -> None:
        self.view, self.box, self.row = view, box, row
        self.sizes = sizes  # those computed, for the index
        self.number = view.number(row.uid)
        self.recent = view.is_recent(row.uid)

    @cached_property
    def message(self) -> Message:
        return Message(self.view.index.read(self.box, self.row))

    def size(self) -> int:
        if self.row.size is None:
            self.sizes[self.row.uid] = len(self.message.data)
        return self.row.size or len(self.message.data)

    def when(self) -> datetime.datetime:
        seconds = self.view.index.date(self.box, self.row)
        return datetime.datetime.fromtimestamp(seconds).astimezone()

    def day(self) -> int:
        return self.when().toordinal()

    def has(self, name: str, text: str) -> bool:
        found = self.message.header_text(name)
        return found is not None and text in found.casefold()

    def value(self, item: Item) -> bytes:
        if item.kind in ITEMS:
            return item.label + b" " + ITEMS[item.kind](self)
        data = self.message.section(item.part, item.what, item.fields) or b""
        data = data[item.start : item.start + item.length]
        return b"%b {%d}\r\n%b" % (item.label, len(data), data)


ITEMS: dict[bytes, Callable[[Candidate], bytes]] = {
    b"UID": lambda m: b"%d" % m.row.uid,
    b"FLAGS": lambda m: flag_list(m.row.flags, m.row.keywords, m.recent).encode(),
    b"INTERNALDATE": lambda m: f'"{m.when():%d-%b-%Y %H:%M:%S %z}"'.encode(),
    b"RFC822.SIZE": lambda m: b"%d" % m.size(),
    b"MODSEQ": lambda m: b"(%d)" % m.row.modseq,
    b"ENVELOPE": lambda m: quoted(m.message.envelope()),
    b"BODY": lambda m: quoted(m.message.structure(False)),
    b"BODYSTRUCTURE": lambda m: quoted(m.message.structure(True)),
}
INDEXED = (b"UID", b"FLAGS", b"INTERNALDATE", b"RFC822.SIZE", b"MODSEQ")  # first in an answer

SEARCH_FLAGS = {"ANSWERED": "R", "DELETED": "T", "DRAFT": "D", "FLAGGED": "F", "SEEN": "S"}
SEARCH_KEYS: dict[str, tuple[tuple[Callable[[Parser], Any], ...], int, Callable[..., bool]]] = {
    "ALL": ((), 0, lambda m: True),
    "NEW": ((), 0, lambda m: m.recent and "S" not in m.row.flags),
    "OLD": ((), 0, lambda m: not m.recent),
    "RECENT": ((), 0, lambda m: m.recent),
    "NOT": ((Parser.key,), 0, lambda m, key: not key.test(m)),
    "OR": ((Parser.key, Parser.key), 0, lambda m, one, two: one.test(m) or two.test(m)),
    "UID": ((Parser.sequence,), 0, lambda m, ranges: within(m.row.uid, ranges, m.view.uids[-1])),
    "KEYWORD": ((Parser.flag,), 0, lambda m, w: w.lower() in m.row.keywords.lower().split()),
    "MODSEQ": ((Parser.modseq,), 0, lambda m, modseq: m.row.modseq >= modseq),
    "LARGER": ((Parser.number,), 1, lambda m, size: m.size() > size),
    "SMALLER": ((Parser.number,), 1, lambda m, size: m.size() < size),
    "BEFORE": ((Parser.day,), 1, lambda m, day: m.day() < day),
    "ON": ((Parser.day,), 1, lambda m, day: m.day() == day),
    "SINCE": ((Parser.day,), 1, lambda m, day: m.day() >= day),
    "SENTBEFORE": ((Parser.day,), 2, lambda m, day: m.message.sent_day() < day),
    "SENTON": ((Parser.day,), 2, lambda m, day: m.message.sent_day() == day),
    "SENTSINCE": ((Parser.day,), 2, lambda m, day: m.message.sent_day() >= day),
    "HEADER": ((Parser.header_name, Parser.words_sought), 2, Candidate.has),
    "BODY": ((Parser.words_sought,), 3, lambda m, t: t in m.message.text(False).casefold()),
    "TEXT": ((Parser.words_sought,), 3, lambda m, t: t in m.message.text(True).casefold()),
}
for _name in ("Bcc", "Cc", "From", "Subject", "To"):
    SEARCH_KEYS[_name.upper()] = (
        (Parser.words_sought,), 2, lambda m, text, name=_name: m.has(name, text))


def pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 32768] for at in range(0, len(data) or 1, 32768))


def every(keys: list[Key]) -> Key:
    keys = sorted(keys, key=lambda key: key.cost)
    return Key(keys[-1].cost, lambda m: all(key.test(m) for key in keys))


def bounds(ranges: Ranges, last: int) -> Iterator[list[int]]:
    return (sorted(last if end == STAR else end for end in ends) for ends in ranges)


def within(number: int, ranges: Ranges, last: int) -> bool:
    return any(low <= number <= high for low, high in bounds(ranges, last))


def flag_list(letters: str, keywords: str, recent: bool) -> str:
    names = [name for name, letter in LETTERS.items() if letter in letters]
    return "(" + " ".join(names + ["\\Recent"] * recent + keywords.split()) + ")"


def atom_or_quoted(name: str) -> bytes:
    plain = ATOM.fullmatch(name.encode("utf-8")) and name.upper() != "NIL"
    return name.encode() if plain else quoted(name.encode())


def wildcard(pattern: str, name: str) -> bool:
    """LIST's "*" and "%", in time pattern × name, however many there are.

    >>> wildcard("a%.*", "ab.c.d"), wildcard("a%", "ab.c"), wildcard("*", "x")
    (True, False, True)
    """
    if name == "INBOX" or name.startswith("INBOX."):
        pattern = pattern[:5].upper() + pattern[5:]
    reached = {0}  # the pattern so far matches these lengths of the name
    for char in pattern:
        if char in "*%":
            for at, each in enumerate(name):
                if at in reached and (char == "*" or each != "."):
                    reached.add(at + 1)
        else:
            reached = {at + 1 for at in reached if name[at : at + 1] == char}
    return len(name) in reached


def with_parents(names: Sequence[str]) -> list[str]:
    """And those that are only there because something is below them."""
    levels = [name.split(".") for name in names]
    return sorted({".".join(level[:n]) for level in levels for n in range(1, len(level) + 1)})


def compact_set(uids: Sequence[int]) -> str:
    """
    >>> compact_set([1, 2, 3, 7, 5])
    '1:3,7,5'
    """
    runs: list[list[int]] = []
    for uid in uids:
        if runs and runs[-1][-1] == uid - 1:
            runs[-1][1:] = [uid]
        else:
            runs.append([uid])
    return ",".join(":".join(map(str, run)) for run in runs)


class Command(NamedTuple):
    """The method returns, or yields and then returns, a response code for the OK, or None."""

    method: Callable[..., Any]
    arguments: tuple[Callable[[Parser], Any], ...] = ()  # each after a space
    selected: bool = False  # needs a mailbox; the method gets the view first
    tells: bool | None = None  # what is new: nothing, all but EXPUNGE (False), or all


FAULTS = MailError, OSError, sqlite3.Error  # what is answered by NO
ONE_NAME, TWO_NAMES = (Parser.mailbox,), (Parser.mailbox, Parser.mailbox)


class CommandSession(Session):
    """Cuts commands and their literals off the input and runs them by a table."""

    commands: dict[str, Command] = {}
    bad_limit = BAD_LIMIT
    line_limit = LOGIN_INPUT
    tag_syntax = re.compile(TAG.pattern.decode())
    command = b""  # the command so far
    literal = 0  # bytes of its literal that are still to come
    upload: Delivery | None = None  # where they go if they are APPEND's message
    fault: Exception | None = None  # why they are skipped: the answer of the command
    bad = 0  # bad commands in a row
    running = "*"  # tag of the command that is executed
    by_uid = False
    asked = ""  # tag of the command that waits for the next line: see continued()
    view: View | None = None

    @property
    def index(self) -> Index:
        return Index.at(self.home)

    def movable(self) -> bool:
        return not (self.command or self.asked)

    def closed(self) -> None:
        self.drop_upload()

    @classmethod
    def farewell(cls, reason: str) -> bytes:
        return f"* BYE {reason}\r\n".encode()

    def bye(self, reason: str) -> bytes:
        self.ended = reason
        return self.farewell(reason)

    def say(self, text: str) -> bytes:
        return f"{self.running} {text}\r\n".encode()

    def step(self) -> Reply | None:
        self.running = "*"
        if self.literal and not self.take_literal():
            return None
        end = self.buffer.find(b"\n") + 1
        if len(self.command) + (end or len(self.buffer)) > self.line_limit:
            return self.too_long()
        if not end:
            return None
        start, line = len(self.command), self.command + self.buffer[:end]
        self.command = b""
        del self.buffer[:end]
        if self.asked or self.tag:
            return self.run(self.continued(line.strip(b"\r\n")))
        if found := LITERAL.search(line, start):
            return self.run(self.literal_begins(line, found))
        return self.run(self.execute(line[: -2 if line.endswith(b"\r\n") else -1]))

    def take_literal(self) -> bool:
        data = bytes(self.buffer[: self.literal])
        del self.buffer[: len(data)]
        self.literal -= len(data)
        try:
            if self.upload and not self.fault:
                self.upload.write(data)
            elif not self.fault:
                self.command += data
        except OSError as error:
            self.fault = error
        return not self.literal

    def drop_upload(self) -> None:
        if self.upload:
            self.upload.drop()
        self.upload = self.fault = None

    def too_long(self) -> Reply:
        self.buffer.clear()
        yield b"* BAD Command line too long.\r\n" + self.bye("Command line too long")

    def literal_begins(self, line: bytes, found: re.Match[bytes]) -> Step:
        """It may be refused before it is sent, unless the client doesn't wait (RFC 7888)."""
        size, waits = int(found[1]), not found[2]
        if tag := TAG.match(line):
            self.running = tag[0].decode()
        try:
            if self.upload or self.fault:
                raise self.fault or BadCommand("Invalid arguments")
            self.upload = self.upload_for(line, found.start(), size)
            if not self.upload and len(line) + size > self.line_limit:
                raise BadCommand("[TOOBIG] Literal too long")
        except (BadCommand, *FAULTS) as error:
            if waits:
                raise
            self.fault = error
        self.command, self.literal = line, size
        if waits:
            yield b"+ OK\r\n"
        return ""

    def upload_for(self, line: bytes, start: int, size: int) -> Delivery | None:
        """Where a literal goes that is a message; None: it is an argument like others."""
        return None

    def continued(self, line: bytes) -> Step:
        raise NotImplementedError

    def run(self, work: Step) -> Reply:
        """Whatever comes of a line, it is answered; "" says that more lines are to come."""
        try:
            if text := (yield from work):
                text = f"OK {text}"
        except BadCommand as error:
            text = f"BAD {error}."
        except FAULTS as error:
            text = self.refusal(error)
        if not text:
            return
        self.drop_upload()
        self.bad = self.bad + 1 if text.startswith("BAD") else 0
        if not self.ended:
            yield self.say(text)
        if self.bad >= self.bad_limit:
            yield self.bye("Too many invalid commands")

    def refusal(self, error: Exception) -> str:
        """The NO for what went wrong; the system's and our own faults are logged."""
        if isinstance(error, MailError):
            return f"NO [{error.code}] {error}."
        code, number = getattr(error, "sqlite_errorcode", 0) & 255, getattr(error, "errno", 0)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "NO [INUSE] Mailbox is in use by another session."
        log.error("%s: %s", type(error).__name__, error)
        if code == sqlite3.SQLITE_CORRUPT:
            self.index.put_aside(error)
        if code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "NO [OVERQUOTA] Not enough disk space."
        return "NO [SERVERBUG] Internal error, it is in the server's log."

    def execute(self, line: bytes) -> Step:
        """One command; what its OK says."""
        parser = Parser(line)
        self.running = parser.must(TAG, "tag")[0].decode()
        if self.fault:
            raise self.fault
        parser.need(b" ")
        name = parser.atom()
        self.by_uid = name == "UID" and parser.take(b" ")
        name = parser.atom() if self.by_uid else name
        if not (command := self.commands.get("UID " * self.by_uid + name)):
            raise BadCommand(f"Unknown command {name}")
        if command.selected and not self.view:
            raise BadCommand("No mailbox selected")
        arguments: list[Any] = [self.view] if command.selected else []
        for argument in command.arguments:
            if argument not in (Parser.rest, Parser.condstore):  # which may be absent
                parser.need(b" ")
            arguments.append(argument(parser))
        parser.end()
        result = command.method(self, *arguments)
        code = (yield from result) if isinstance(result, Generator) else result
        if command.tells is not None:
            yield from self.tell(command.tells)
        if self.asked or self.tag:
            return ""
        return " ".join(filter(None, (code, name.capitalize(), "completed.")))

    def tell(self, expunges: bool) -> Reply:
        yield from ()

    def capabilities(self) -> str:
        after_login = " NAMESPACE CHILDREN UNSELECT UIDPLUS MOVE CONDSTORE"
        return CAPABILITY + (after_login if self.user else " AUTH=PLAIN")

    def capability(self) -> Reply:
        yield f"* CAPABILITY {self.capabilities()}\r\n".encode()

    def noop(self, view: View | None = None) -> None:
        """Also CHECK: what is new is told in any case."""

    def id(self, client: bytes) -> Reply:
        yield b'* ID ("name" "hibernate.py")\r\n'

    def logout(self) -> Reply:
        yield self.bye("Logging out") + self.say("OK Logout completed.")

    commands = {
        "CAPABILITY": Command(capability),
        "NOOP": Command(noop, tells=True),
        "ID": Command(id, (Parser.rest,)),
        "LOGOUT": Command(logout),
    }


class LoginSession(CommandSession):
    """Before log-in. What comes right after the log-in command stays in `buffer`: the engine
    carries it along to the imap process."""

    input_limit = LOGIN_INPUT + 1
    bad_limit = 3

    def opened(self) -> Reply:
        yield f"* OK [CAPABILITY {self.capabilities()}] hibernate.py ready.\r\n".encode()

    def login(self, user: bytes, password: bytes) -> Step:
        who = [text.decode("utf-8", "surrogateescape") for text in (user, password)]
        request = json.dumps([self.identity, self.sid, self.remote, *who])
        reply = json.loads((yield Ask("auth", request.encode())) or "[]")
        if reply[:1] == ["no"]:
            yield Pause(self.config.auth_failure_delay)
            raise MailError(*reply[1][1:-1].split("] "))
        reason = "no answer from auth"
        if reply:
            self.user = reply[1]
            reason = yield Move("imap", reply[2], reply[3], self.running)
            self.user = ""
        self.log(f"log-in impossible: {reason}")
        raise MailError("UNAVAILABLE", "Temporary failure, try again later")

    def authenticate(self, mechanism: str, initial: bytes) -> Step:
        if mechanism != "PLAIN":
            raise MailError("CANNOT", "Unsupported authentication mechanism")
        if initial:
            return (yield from self.plain(initial.strip(b" ")))
        self.asked = self.running
        yield b"+ \r\n"
        return ""

    def continued(self, line: bytes) -> Step:
        self.running, self.asked = self.asked, ""
        return (yield from self.plain(line))

    def plain(self, line: bytes) -> Step:
        try:
            identity, user, password = base64.b64decode(line, validate=True).split(b"\0")
        except ValueError:
            raise BadCommand("Authentication aborted") from None
        if identity not in (b"", user):
            raise MailError("AUTHORIZATIONFAILED", "Nobody logs in for others here")
        return (yield from self.login(user, password))

    commands = CommandSession.commands | {
        "LOGIN": Command(login, (Parser.astring, Parser.astring)),
        "AUTHENTICATE": Command(authenticate, (Parser.atom, Parser.rest)),
    }


class ImapSession(CommandSession):
    """After log-in."""

    watch_dirs = ("new", "cur")
    still_here = b"* OK Still here\r\n"
    condstore = False

    def arrived(self, answer: str) -> Reply:
        if answer:
            yield f"{answer} OK [CAPABILITY {self.capabilities()}] Logged in\r\n".encode()
        elif self.tag:
            yield from self.stirred()

    def freeze(self) -> list[Any]:
        return [self.condstore, *(list(vars(self.view).values())[1:-1] if self.view else [])]

    def thaw(self, state: list[Any]) -> None:
        self.line_limit = int(self.config.max_line_length)
        self.input_limit = max(self.input_limit, self.line_limit + 1)
        if len(state) not in (0, 1, 12):
            raise ValueError("not an IMAP session")
        self.own = set[int]()  # MODSEQs of changes that the client made and knows
        self.condstore = bool(state and state[0])
        self.view = View(self.home, *state[1:]) if state[1:] else None

    def watch(self) -> tuple[str, tuple[int, ...]] | None:
        return (self.view.folder(), (self.view.new, self.view.cur)) if self.view else None

    @classmethod
    def peeked(cls, tag: str, data: bytes) -> tuple[bytes, int, str] | None:
        found = SLEEPER_INPUT.fullmatch(data)
        if not data or not found or bool(found[1]) != bool(tag):
            return None
        answer = f"{tag} OK Idle completed.\r\n".encode() if tag else b""
        again = b"+ idling\r\n" if found[2] else b""
        return answer + again, len(data), (found[2] or b"").decode()

    def stirred(self) -> Reply:
        """Tell all; if the folder is changing this moment, again when its time has settled."""
        yield from self.tell(True)
        if self.view and (self.view.new, self.view.cur) == UNSETTLED and not self.ended:
            yield Pause(0.025)
            yield from self.tell(True)

    def tell(self, expunges: bool) -> Reply:
        """What is new in the selected mailbox. A busy index is asked again next time."""
        try:
            lines = self.view.look(expunges, self.describe) if self.view else []
        except MailError as error:
            yield self.bye(str(error))
        except FAULTS as error:
            self.refusal(error)
        else:
            self.own.clear()
            yield from pieces("".join(lines).encode())

    def describe(self, row: tuple[int, str, str, int], number: int, recent: bool) -> str:
        """A FETCH line for changed flags; the client knows of what it has done itself."""
        uid, flags, keywords, modseq = row
        items = [f"UID {uid}"] if self.by_uid else []
        items += [f"MODSEQ ({modseq})"] if self.condstore else []
        if modseq not in self.own:
            items.append("FLAGS " + flag_list(flags, keywords, recent))
        elif not self.condstore:
            return ""
        return f"* {number} FETCH ({' '.join(items)})\r\n" if number else ""

    def use_condstore(self) -> Reply:
        """From now on MODSEQs are told (RFC 7162 3.1)."""
        if self.view and not self.condstore:
            yield f"* OK [HIGHESTMODSEQ {self.view.modseq}] Highest\r\n".encode()
        self.condstore = True

    def enable(self, names: bytes) -> Reply:
        if b"CONDSTORE" in names.upper().split():
            yield from self.use_condstore()
            yield b"* ENABLED CONDSTORE\r\n"

    def namespace(self) -> Reply:
        yield b'* NAMESPACE (("" ".")) NIL NIL\r\n'

    def idle(self) -> Reply:
        yield b"+ idling\r\n"
        self.tag = self.running
        yield from self.stirred()

    def continued(self, line: bytes) -> Step:
        """The end of IDLE."""
        self.running, self.tag = self.tag, ""
        yield from self.tell(True)
        if line.strip().upper() != b"DONE":
            raise BadCommand("Expected DONE")
        return "Idle completed."

    # Mailboxes

    def select(self, name: str, condstore: bool, readonly: bool = False) -> Step:
        if self.view:
            self.view = None
            yield b"* OK [CLOSED] Previous mailbox closed.\r\n"
        self.condstore |= condstore
        box = self.index.by_name(name)
        view = View(self.home, box.id, box.name, readonly, box.uidvalidity)
        lines = view.look(True, self.describe)
        self.view = view
        query = "SELECT min(uid) FROM message WHERE box = ? AND flags NOT LIKE '%S%'"
        if unseen := view.number(view.query(query)[0][0] or 0):
            lines.append(f"* OK [UNSEEN {unseen}] First unseen.\r\n")
        lines.append(f"* OK [UIDVALIDITY {view.uidvalidity}] UIDs valid\r\n")
        lines.append(f"* OK [UIDNEXT {view.uidnext}] Predicted next UID\r\n")
        lines.append(f"* OK [HIGHESTMODSEQ {view.modseq}] Highest\r\n")
        yield "".join(lines).encode()
        return "[READ-ONLY]" if readonly else "[READ-WRITE]"

    def create(self, name: str) -> None:
        self.index.create_folder(name.removesuffix("."))

    def delete(self, name: str) -> None:
        self.index.delete_folder(name)
        if self.view and self.view.name == name:
            self.view = None

    def subscribe(self, name: str) -> None:
        self.index.must_exist(name)
        self.index.subscribe(name, True)

    def list_names(self, reference: str, pattern: str, lsub: bool = False) -> Reply:
        """LIST and LSUB; there a parent that isn't subscribed itself shows only where "%" hides
        its children."""
        names = self.index.subscriptions() if lsub else self.index.names()
        command, row = b"LSUB" if lsub else b"LIST", b'* %b (%b) "." %b\r\n'
        if not pattern:
            yield row % (command, b"\\Noselect", b'""')
            return
        for name in names if lsub and not pattern.endswith("%") else with_parents(names):
            if wildcard(reference + pattern, name):
                flags = [b"\\Noselect"] * (name not in names)
                if not lsub:
                    children = any(each.startswith(name + ".") for each in names)
                    flags.append(b"\\HasChildren" if children else b"\\HasNoChildren")
                yield row % (command, b" ".join(flags), atom_or_quoted(name))

    def status(self, name: str, items: list[str]) -> Reply:
        box = self.index.refresh(self.index.by_name(name))[0]
        query = (
            "SELECT count(*), ifnull(sum(uid >= ?), 0), ifnull(sum(flags NOT LIKE '%S%'), 0)"
            " FROM message WHERE box = ?")
        count, recent, unseen = self.index.db.execute(query, (box.recent, box.id)).fetchone()
        if self.view and self.view.id == box.id and not self.view.readonly:
            recent += self.view.recents()
        values = {
            "MESSAGES": count, "RECENT": recent, "UIDNEXT": box.uidnext, "UNSEEN": unseen,
            "UIDVALIDITY": box.uidvalidity, "HIGHESTMODSEQ": box.modseq}
        if unknown := set(items) - set(values):
            raise BadCommand(f"Invalid status item {unknown.pop()}")
        if "HIGHESTMODSEQ" in items:
            yield from self.use_condstore()
        text = " ".join(f"{item} {values[item]}" for item in items)
        yield b"* STATUS %b (%b)\r\n" % (atom_or_quoted(box.name), text.encode())

    def target(self, name: str) -> Mailbox:
        """Where to append or copy to; the client may create it and try again."""
        if not self.index.exists(name):
            raise MailError("TRYCREATE", f"Mailbox doesn't exist: {name}")
        return self.index.by_name(name)

    def upload_for(self, line: bytes, start: int, size: int) -> Delivery | None:
        parser = Parser(line)
        try:
            parser.must(re.compile(TAG.pattern + rb" APPEND ", re.I))
            name, *_, begins = parser.append()
        except BadCommand:
            return None
        if begins != start:
            return None
        if not size:
            raise MailError("CANNOT", "Can't save a message without a byte")
        if size > self.config.mail_max_message_size:
            raise MailError("TOOBIG", "Message is too large")
        return Delivery(self.index.folder(self.target(name).name))

    def append(self, arguments: tuple[str, str, list[str], float | None, int]) -> str:
        name, flags, keywords, when, _ = arguments
        if not self.upload:
            raise BadCommand("Invalid arguments")
        self.upload.finish(when)
        box = self.target(name)
        uid = self.index.append(box.id, self.upload, flags, keywords)
        self.upload = None
        return f"[APPENDUID {box.uidvalidity} {uid}]"

    # With a mailbox

    def unselect(self, view: View) -> None:
        self.view = None

    def close(self, view: View) -> None:
        self.expunge(view)
        self.view = None

    def expunge(self, view: View, ranges: Ranges | None = None) -> None:
        if not view.readonly:
            uids = view.uids if ranges is None else self.pick(view, ranges)
            view.index.expunge(view.box().id, uids, deleted_only=True)

    def pick(self, view: View, ranges: Ranges) -> list[int]:
        """The UIDs of a set, in order. A number that isn't there is an error, a UID isn't."""
        uids, wanted = view.uids, set[int]()
        last = (uids[-1] if uids else 0) if self.by_uid else len(uids)
        for low, high in bounds(ranges, last):
            if self.by_uid:
                first, stop = bisect.bisect_left(uids, low), bisect.bisect_right(uids, high)
            elif 0 < low and high <= last:
                first, stop = low - 1, high
            else:
                raise BadCommand("Invalid messageset")
            wanted.update(uids[first:stop])
        return sorted(wanted)

    def walk(self, view: View, uids: Sequence[int], see: bool = False) -> Iterator[Candidate]:
        """The messages that still exist, some looked up at a time; to `see` them sets \\Seen, of
        few before they are sent."""
        size = BATCH_READ if see else BATCH
        for at in range(0, len(uids), size):
            box, sizes, part = view.box(), dict[int, int](), uids[at : at + size]
            rows = view.index.picked(box.id, part)
            unseen = [row.uid for row in rows if see and "S" not in row.flags]
            if unseen:
                self.own.add(view.index.store(box.id, unseen, "+", "S")[0])
                rows = view.index.picked(box.id, part)
            for row in rows:
                yield Candidate(view, box, row, sizes)
            if sizes:
                view.index.keep_sizes(box.id, sizes)

    def copy(self, view: View, ranges: Ranges, name: str, move: bool = False) -> Step:
        if not (uids := self.pick(view, ranges)):
            return ""
        if move and view.readonly:
            raise MailError("READ-ONLY", "Mailbox is read-only")
        target = self.target(name)
        old, new = zip(*view.index.copy(view.box(), uids, target, move))
        code = f"[COPYUID {target.uidvalidity} {compact_set(old)} {compact_set(new)}]"
        if not move:
            return code
        yield f"* OK {code} Moved UIDs.\r\n".encode()
        return ""

    def store(self, view: View, ranges: Ranges, change: tuple[Any, ...]) -> Step:
        how, silent, since, flags, keywords = change
        uids, refused = self.pick(view, ranges), list[int]()
        if view.readonly:
            raise MailError("READ-ONLY", "Mailbox is read-only")
        if since < 2**63:
            yield from self.use_condstore()
        if silent:  # what others changed before would be hidden with our own change
            yield from self.tell(False)
        for at in range(0, len(uids), BATCH):
            part = uids[at : at + BATCH]
            modseq, left = view.index.store(view.box().id, part, how, flags, keywords, since)
            refused += left if self.by_uid else [view.number(uid) for uid in left]
            self.own.update([modseq] * silent)
            yield b""
        return f"[MODIFIED {compact_set(refused)}]" if refused else ""

    def search(self, view: View, wanted: tuple[Key, bool]) -> Reply:
        key, modseqs = wanted
        if modseqs:
            yield from self.use_condstore()
        found, highest = [""], 0
        for message in self.walk(view, view.uids):
            with contextlib.suppress(Vanished):
                if key.test(message):
                    found.append(str(message.row.uid if self.by_uid else message.number))
                    highest = max(highest, message.row.modseq)
            yield b""  # the worker's other sessions have a turn
        more = f" (MODSEQ {highest})" if modseqs and highest else ""
        yield f"* SEARCH{' '.join(found)}{more}\r\n".encode()

    def fetch(self, view: View, ranges: Ranges, wanted: tuple[list[Item], int]) -> Step:
        items, since = wanted
        uids, there = self.pick(view, ranges), 0
        items = [Item(b"UID", b"UID")] * self.by_uid + items
        items += [Item(b"MODSEQ", b"MODSEQ")] * (since >= 0)
        if any(item.kind == b"MODSEQ" for item in items):
            yield from self.use_condstore()
        see = not view.readonly and any(item.seen for item in items)
        chunk = b""  # small answers travel together, but none waits for long
        for count, message in enumerate(self.walk(view, uids, see), 1):
            with contextlib.suppress(Vanished):
                for part in self.fetched(message, items) if message.row.modseq > since else ():
                    chunk += part
                    if len(chunk) > 16384:
                        yield from pieces(chunk)
                        chunk = b""
                there += 1
            if count % 100 == 0:  # the worker's other sessions have a turn
                yield chunk
                chunk = b""
        yield chunk
        return "[EXPUNGEISSUED]" if there < len(uids) else ""

    def fetched(self, message: Candidate, items: list[Item]) -> Iterator[bytes]:
        """The answer, first what the index knows, as Dovecot orders it. Nothing is yielded before
        the message is there for the rest, and never more than an item is in memory."""
        if message.row.modseq in self.own:  # by walk(): tell the flags here
            items = [*items, Item(b"FLAGS", b"FLAGS")]
        items = sorted(dict.fromkeys(items), key=lambda item: item.kind not in INDEXED)
        if items[-1].kind not in INDEXED:
            message.message  # noqa: B018
        text, gap = b"* %d FETCH" % message.number, b" ("
        for item in items:
            if item.kind not in INDEXED:
                yield text
                text = b""
            text += gap + message.value(item)
            gap = b" "
        yield text + b")\r\n"

    commands = CommandSession.commands | {
        "ENABLE": Command(enable, (Parser.rest,)),
        "NAMESPACE": Command(namespace),
        "IDLE": Command(idle),
        "SELECT": Command(select, (Parser.mailbox, Parser.condstore)),
        "EXAMINE": Command(partial(select, readonly=True), (Parser.mailbox, Parser.condstore)),
        "CREATE": Command(create, ONE_NAME),
        "DELETE": Command(delete, ONE_NAME),
        "RENAME": Command(lambda self, *names: self.index.rename_folder(*names), TWO_NAMES),
        "SUBSCRIBE": Command(subscribe, ONE_NAME),
        "UNSUBSCRIBE": Command(lambda self, name: self.index.subscribe(name, False), ONE_NAME),
        "LIST": Command(list_names, (Parser.mailbox, Parser.pattern)),
        "LSUB": Command(partial(list_names, lsub=True), (Parser.mailbox, Parser.pattern)),
        "STATUS": Command(status, (Parser.mailbox, Parser.words), tells=True),
        "APPEND": Command(append, (Parser.append,), tells=True),
        "CHECK": Command(CommandSession.noop, (), True, True),
        "CLOSE": Command(close, (), True),
        "UNSELECT": Command(unselect, (), True),
        "EXPUNGE": Command(expunge, (), True, True),
        "UID EXPUNGE": Command(expunge, (Parser.sequence,), True, True),
        "SEARCH": Command(search, (Parser.search,), True, False),
        "FETCH": Command(fetch, (Parser.sequence, Parser.fetch), True, False),
        "STORE": Command(store, (Parser.sequence, Parser.store), True, False),
        "COPY": Command(copy, (Parser.sequence, Parser.mailbox), True, True),
        "MOVE": Command(partial(copy, move=True), (Parser.sequence, Parser.mailbox), True, True),
    }
    for name in ("SEARCH", "FETCH", "STORE", "COPY", "MOVE"):
        commands["UID " + name] = commands[name]._replace(tells=True)
# ------------------------------------------------------------------------------------------------
# 11  Command line
#
# `run` starts a server in the foreground; every other command asks the master's control socket,
# or does its work by itself. Standard output carries only what other programs may read.
# ------------------------------------------------------------------------------------------------

COMMANDS = {
    "run": ("", "serve in the foreground; the default"),
    "status": ("", "processes, sessions, room, refusals and wakes"),
    "who": ("", "one line a session: user, where, since when"),
    "kick": ("USER", "end all sessions of a user"),
    "reload": ("", "check the file, then go on with new code and settings"),
    "stop": ("", "end all sessions and the server"),
    "deliver": ("USER", "put the message on standard input into the user's INBOX"),
    "passwd": ("[SCHEME]", "read a password, print a passwd-file entry (SSHA512, PBKDF2, PLAIN)"),
}

PROGRAM = Program("hibernate", (
    Role("imap-login", LoginSession, ("1000", "4", "1", "60 s"), sheds=True, unit="pre-login",
         listener="imap", port=1143),
    Role("auth", AuthSession, ("1000", "2", "1", "60 s"), requests=True, trusted=True, unit=""),
    Role("imap", ImapSession, ("100", "8", "1", "60 s"), keeper="imap-hibernate", trusted=True),
    Role("imap-hibernate", ImapSession, ("19000", "64", "0", "60 s"), wakes="imap"),
), (
    Setting("mail_location", "string", "maildir:mail/%u", "%u user, %n before @, %d after"),
    Setting("passwd_file", "path", "users", "lines user:{SCHEME}password"),
    Setting("auth_failure_delay", "time", "2 s", "before a wrong password is answered"),
    Setting("@max_line_length", "size", "64 k", "longest command line"),
    Setting("mail_max_message_size", "size", "50 M", "largest message of an APPEND"),
), "imap_")

WELCOME = """From: hibernate.py <hibernate@localhost>
Subject: Welcome
Date: {}

Your session is awake. Send IDLE, wait half a minute, and it sleeps in imap-hibernate;
deliver a message to this Maildir, or send DONE, and it wakes.
"""


def home_of(config: Config, user: str) -> str:
    """Where mail_location puts the user's Maildir; ValueError for a name that could leave it."""
    if not re.fullmatch(r"[\w@+=-][\w.@+=-]{0,127}", user, re.ASCII) or ".." in user:
        raise ValueError(f"{user!r} is not a user name")
    name, _, domain = user.partition("@")
    values = {"u": user, "n": name, "d": domain, "%": "%"}
    path = re.sub("%(.)", lambda m: values.get(m[1], m[0]), config.mail_location)
    return os.path.normpath(os.path.join(config.folder, path.removeprefix("maildir:")))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    rows = [f"  {name} {operand}".ljust(22) + text for name, (operand, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        "hibernate.py", epilog="\n".join(["commands:", *rows]), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", dest="file", metavar="FILE", help="default: hibernate.conf, or none without it")
    add("-n", dest="dump", action="store_true", help="print the settings that are not the default")
    add("--check", action="store_true", help="read the configuration, start nothing")
    add("--json", action="store_true", help="for status and who: one JSON object a line")
    add("--version", action="version", version=f"hibernate.py {__version__}")
    add("--title-room", help=argparse.SUPPRESS)  # see serve()
    add("command", nargs="?", default="run", choices=COMMANDS, metavar="COMMAND")
    add("operand", nargs="?", default="")
    options = parser.parse_args(arguments)
    operand = COMMANDS[options.command][0]
    if options.operand and not operand or operand == "USER" and not options.operand:
        parser.error(f"{options.command} takes {operand or 'no operand'}")
    return options


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status of sysexits(3)."""
    try:
        options = parse_arguments(arguments)
        usual = "hibernate.conf" if os.path.exists("hibernate.conf") else ""
        config = Config(PROGRAM, usual if options.file is None else options.file)
        if not config.mail_location.startswith("maildir:"):
            config.fail(config.lines["mail_location"], "mail_location: only maildir:PATH is known")
        if options.dump:
            print(f"# {__version__}: {config.path or 'no configuration'}", *config.dump(), sep="\n")
        elif not options.check:
            ours = {"run": serve, "deliver": deliver_message, "passwd": make_password}
            ours.get(options.command, control)(config, options)
        return 0
    except SystemExit as end:  # argparse has printed the help, or what is wrong
        return 64 if end.code else 0
    except Failure as error:
        status, reason = error.status, str(error)
    except (PermissionError, FileNotFoundError) as error:
        status = 77 if isinstance(error, PermissionError) else 69
        reason = f"{error.filename}: {error.strerror}"
    print(reason, file=sys.stderr)
    return status


def serve(config: Config, options: argparse.Namespace) -> None:
    # Titles are written over the arguments: with too little room, start once more with some.
    if len(" ".join(sys.orig_argv)) < 80 and os.path.exists("/proc/self/stat"):
        os.execv(sys.executable, [*sys.orig_argv, "--title-room=" + "." * 80])
    os.umask(0o077)
    handler = WatchedFileHandler(config.log_path) if config.log_path else logging.StreamHandler()
    layout = "%(asctime)s %(processName)s[%(process)d] %(levelname)s %(message)s"
    logging.basicConfig(handlers=[handler], format=layout, level=logging.INFO)
    multiprocessing.current_process().name = "master"
    first = INHERIT not in os.environ
    lines = [] if config.path or not first else make_demo(config)
    if not config.path:
        config.values["passwd_file"] = config.inbox("demo-users")

    def ready(master: Master) -> None:
        for pool in master.pools:
            for name, group in zip(pool.settings.sections, pool.listeners):
                host, port = group[0].getsockname()[:2]
                print(f"listening {name} {f'[{host}]' if ':' in host else host}:{port}")
        print(*lines, "ready", sep="\n", flush=True)

    Master(config, ready if first else None).run()


def make_demo(config: Config) -> list[str]:
    """Without a configuration: a user with a password made up now, and a message to read."""
    password = secrets.token_hex(12)
    os.makedirs(config.base_dir, 0o700, exist_ok=True)
    with open(config.inbox("demo-users"), "w", encoding="ascii") as file:
        file.write(f"demo:{encode_password('SSHA512', password)}\n")
    home = home_of(config, "demo")
    if not os.path.exists(home):
        deliver(home, io.BytesIO(WELCOME.format(email.utils.formatdate(localtime=True)).encode()))
    return ["user: demo", f"password: {password}"]


def make_password(config: Config, options: argparse.Namespace) -> None:
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    try:
        print(encode_password(options.operand or "SSHA512", password))
    except ValueError as error:
        raise Failure(64, error) from None


def deliver_message(config: Config, options: argparse.Namespace) -> None:
    os.umask(0o077)
    try:
        deliver(home_of(config, options.operand), sys.stdin.buffer)
    except ValueError as error:
        raise Failure(64, error) from None
    except OSError as error:  # 75, EX_TEMPFAIL: a mail server keeps the message and tries again
        status = 77 if isinstance(error, PermissionError) else 75
        raise Failure(status, f"deliver: {error}") from None


def control(config: Config, options: argparse.Namespace) -> None:
    """Send one command to the master, print what comes back until the connection's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        try:
            sock.connect(config.inbox("master"))
        except (FileNotFoundError, ConnectionRefusedError):
            raise Failure(75, f"hibernate is not running in {config.base_dir}") from None
        sock.send(f"{options.command} {options.operand}".strip().encode())
        text = b""
        with contextlib.suppress(TimeoutError):  # of who does not answer; the others have
            while data := sock.recv(1 << 20):
                text += data
    if text.startswith(b"refused"):
        raise Failure(78, text.decode())
    if options.command in ("reload", "stop"):
        return print(text.decode(), end="\n" if text else "")
    rows: dict[object, dict[str, Any]] = {}
    for line in text.splitlines():
        row = json.loads(line)
        rows.setdefault(row.get("session", line), row)  # moving, it may have been told twice
    if options.command == "kick":
        print(f"{sum(row['kicked'] for row in rows.values())} sessions ended")
    elif options.json:
        print(*map(json.dumps, rows.values()), sep="\n", end="\n" if rows else "")
    elif rows:
        print_table(list(rows.values()))


def print_table(rows: list[dict[str, Any]]) -> None:
    def shown(name: str, value: Any) -> str:
        if name == "since" and value:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        if isinstance(value, dict):
            value = ", ".join(f"{count} {what}" for what, count in value.items())
        return "-" if value in (None, "") else str(value)

    names = list(dict.fromkeys(itertools.chain(*rows)))
    table = [names, *([shown(name, row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
