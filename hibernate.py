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
 2. imap-login accepts (5, Service.accept_client) and greets (10, ImapSession).
 3. LOGIN: imap-login asks auth (10, AuthSession), which checks the password and answers with the
    session's state, sealed for this very connection (4, seal).
 4. Descriptor and record go to imap (4, Mover; 5, Service.arriving), which says "OK Logged in".
 5. Commands run on a view of one mailbox (10, ImapSession, View; 8, Index; 9, Message).
 6. IDLE. At rest for imap_hibernate_timeout, the session is frozen (5, Client.record) and handed
    to a keeper (6, Keeper.hold): a slot of 329 bytes in shared memory, no object. A twin holds a
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
import stat
import struct
import subprocess
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from encodings.aliases import aliases
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn
from weakref import WeakValueDictionary

__all__ = [
    "Ask", "Config", "ConfigError", "Master", "Move", "Pause", "Program", "Role", "Session",
    "Setting", "main", "ticket",
]  # fmt: skip
__version__ = "0.1"

RECORD_VERSION = 1  # of what travels in a hand-over; what a process does not know it refuses
RECORD_LIMIT = 128 * 1024  # bytes of one message; stays below the default SO_SNDBUF of 208 KB
RESERVE = 64  # descriptors kept back for log, channels and index files: never for clients
IN_FLIGHT = 64  # hand-overs under way at once in one process; more of them are slower
ANSWER_TIME = 10.0  # seconds a sender waits for "+" before it goes on as the owner
COMMIT_TIME = 30.0  # seconds a receiver waits for "!": longer, so that the sender gives up first
SPEAK_TIME = 5.0  # seconds a new channel may stay silent
FLOW_TIME = 0.5  # seconds since a service took a session, in which it is at work on the others
RETRY_TIME = 0.1  # seconds; one timer for all that was refused (10 ms once flooded Dovecot's log)
TICKET_TIME = 60  # seconds from a log-in to the worker
MOVE_TIME = 30.0  # seconds a log-in, or a sleeper whose client waits, tries to get a worker
MAIL_TIME = 300.0  # the same for a sleeper that has only news for its client
SLEEP_TIME = 1.0  # seconds of one attempt to fall asleep …
AWAKE_TIME = 5.0  # … and at least until the next: full keepers are not to be stormed
YOUNG = 20_000_000  # ns: a directory changed this recently may change again within one tick
FILE_CLOCK = 5 if sys.platform == "linux" else time.CLOCK_REALTIME  # ticks: CLOCK_REALTIME_COARSE
OUTPUT_HIGH = 64 * 1024  # a reply pauses while this much waits for a slow client
TURN_TIME = 0.005  # seconds of one session's replies before the others have a turn
LOOK_TIME = 0.05  # seconds between two looks at the siblings' SO_REUSEPORT sockets
FULL_TIME = 10.0  # seconds that connections wait while all processes are full
THROTTLE = 2, 60  # seconds without a fork after one that failed: the first time and at most
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
CHECKING = "HIBERNATE_CHECKING"  # environment: say, by the same word, that it was read
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

    def __init__(self, program: Program, path: str = "", usual: str = "") -> None:
        """Without a path the file `usual` is read, if there is one by then: see reload()."""
        super().__init__((*SETTINGS, *program.settings), program.prefix)
        self.program, self.usual = program, usual
        self.path = path = path or usual * os.path.exists(usual)
        self.folder = os.path.abspath(os.path.dirname(path))
        for role in program.roles:
            texts = *role.limits, "", ""
            rows = [row._replace(default=text) for row, text in zip(LIMITS, texts)]
            self.sections[role.name] = Section(rows)
            self.sections[role.name].listener = role if role.listener else None
        try:
            self.parse(Path(path or os.devnull).read_text("utf-8", "replace").split("\n"))
        except OSError as error:
            self.fail(0, str(error.strerror))
        self.finish()
        if CHECKING in os.environ:
            print(CHECKING)

    def inbox(self, service: str) -> str:
        return os.path.join(self.base_dir, service)

    def fail(self, line: int, reason: str) -> NoReturn:
        raise ConfigError(78, f"{self.path or 'defaults'}:{line}: {reason}")

    def parse(self, lines: list[str]) -> None:
        """Dovecot's syntax: `key = value`, `service NAME {`, `inet_listener NAME {`, `}`."""
        stack: list[Section] = [self]
        for number, line in enumerate(lines, 1):
            match = LINE.fullmatch(line)
            if not match or "\0" in line:  # which no path can have
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
            name = row.name.strip("@")
            if row.kind == "path" and (path := os.path.expanduser(self.values[name])):
                self.values[name] = os.path.normpath(os.path.join(self.folder, path))
        names = "master", *self.sections
        longest = max(len(os.fsencode(self.inbox(name + ".new"))) for name in names)
        if not self.base_dir or longest > 107:  # sockaddr_un.sun_path, unix(7)
            self.fail(self.lines["base_dir"], "base_dir: empty, or too long for a socket's name")
        for name, service in self.sections.items():
            if service.listener and not service.sections:
                service.open(service.listener.listener)
            spare = service.process_limit - service.process_min_avail
            if spare < 0:
                line = max(service.lines["process_limit"], service.lines["process_min_avail"])
                self.fail(line, f"{name}: process_min_avail is above process_limit")
            for listener in service.sections.values():
                if listener.reuse_port and spare:
                    reason = f"reuse_port: {name} needs process_min_avail = process_limit"
                    self.fail(listener.lines["reuse_port"], reason)


# ------------------------------------------------------------------------------------------------
# 2  Event loop and timers
#
# One selector, one heap of timers, one thread. Signals arrive as bytes in a pipe and so are
# events like any other: without that, a handler runs while select() sleeps on. A callback waits
# for nobody but our own processes, and for them not long: a twin that is behind, a child that ends,
# new code that reads its settings. One that raises is logged with its traceback and costs its own
# session, not the process.
# ------------------------------------------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


@dataclass(slots=True, eq=False)  # told apart by identity: so NEVER can be a field's default
class Timer:
    """A call that is due at `when` (monotonic seconds). cancel() may come late, and twice."""

    when: float
    call: Callable[[], None] | None  # None: it was called, or cancelled
    fd: int  # whose session a bug in it would cost; -1 nobody's

    def cancel(self) -> None:
        self.call = None


NEVER = Timer(0, None, -1)  # in place of one that was not set yet


class Loop:
    """Watches descriptors, as plain ints since a keeper has thousands, and calls what is due."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.keys: dict[int, selectors.SelectorKey] = {}  # to ask get_map() takes a microsecond
        self.timers: list[tuple[float, int, Timer]] = []  # a heap: when, serial number
        self.serial = itertools.count()
        self.purge_at = 256  # so many timers are looked through for cancelled ones
        self.running = True
        self.failed: Callable[[int], None] = lambda fd: None
        self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def watch(self, fd: int, events: int, call: Callable[[int, int], None]) -> None:
        """call(fd, ready) from now on, in place of what was watched before; no events: unwatch,
        which must come before close(): epoll forgets a closed descriptor, selectors does not."""
        known = self.keys.get(fd)
        if not events:
            self.unwatch(fd)
        elif known is None:
            self.keys[fd] = self.selector.register(fd, events, call)
        elif known.events != events or known.data != call:
            self.keys[fd] = self.selector.modify(fd, events, call)

    def unwatch(self, fd: int) -> None:
        if self.keys.pop(fd, None):
            self.selector.unregister(fd)

    def later(self, seconds: float, call: Callable[[], None], fd: int = -1) -> Timer:
        if len(self.timers) >= self.purge_at:
            self.timers = sorted(entry for entry in self.timers if entry[2].call)  # a heap too
            self.purge_at = 2 * len(self.timers) + 256
        timer = Timer(time.monotonic() + seconds, call, fd)
        heapq.heappush(self.timers, (timer.when, next(self.serial), timer))
        return timer

    def on_signals(self, table: dict[int, Callable[[], None]]) -> None:
        """From now on a signal of `table` is a call from this loop."""

        def heard(fd: int, mask: int) -> None:
            # One at a time: what follows a SIGHUP is reload()'s to keep.
            table.get(os.read(fd, 1)[0], lambda: None)()  # all with a handler come this way

        for number in table:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.bell[1], warn_on_full_buffer=False)
        self.watch(self.bell[0], READ, heard)

    def run(self) -> None:
        while self.running:
            while self.timers and not self.timers[0][2].call:  # cancelled: not worth waking for
                heapq.heappop(self.timers)
            # Not for days: epoll_wait(2) counts milliseconds in an int.
            wait = self.timers[0][0] - time.monotonic() if self.timers else 3600.0
            for key, mask in self.selector.select(min(max(0.0, wait), 3600.0)):
                # An earlier event of this batch may have closed this descriptor, and its number
                # may belong to another session by now: only the very key registered counts.
                if self.keys.get(key.fd) is key:
                    self.guarded(key.fd, key.data, key.fd, mask)
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                timer = heapq.heappop(self.timers)[2]
                call, timer.call = timer.call, None
                if call:
                    self.guarded(timer.fd, call)

    def guarded(self, fd: int, call: Callable[..., Any], *args: Any) -> Any:
        """What call(*args) gives. A bug in it costs the session `fd`, not who has called."""
        try:
            return call(*args)
        except Exception:
            log.exception("a callback failed; it costs one session")
            if fd >= 0:
                self.unwatch(fd)  # or it would fail again at once, and for ever
                self.failed(fd)

    def close(self) -> None:
        """For a forked child: what it has copied is still the parent's."""
        signal.set_wakeup_fd(-1)
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
Heard = Callable[[Any, bytes, list[int]], None]  # the first one is the Channel
Main = Callable[[socket.socket, socket.socket], None]  # of a new process: see fork()


def end_socket(sock: socket.socket) -> None:
    """End the *session*: with a copy open in another process close() alone sends no FIN."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class Borrowed(socket.socket):
    """Socket methods for a descriptor held as a plain int, which stays open; not for addresses."""

    def __init__(self, fd: int) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM, 0, fd)

    def __exit__(self, *_: object) -> None:
        self.detach()


def identity(sock: socket.socket) -> str:
    """Names this very connection; each receiver computes it anew. OSError: the client is gone.

    The cookie alone is not enough: a hostile holder can connect() a TCP socket elsewhere.
    """
    try:
        number = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
    except OSError:
        number = os.fstat(sock.fileno()).st_ino
    return f"{number}{sock.getpeername()}{sock.getsockname()}".replace(" ", "")


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors; b"" is the end. BlockingIOError, TimeoutError: not yet."""
    # Not socket.recv_fds(): it ignores its flags. MSG_CMSG_CLOEXEC comes back in `flags`.
    size = socket.CMSG_SPACE(8 * 4)
    try:
        message, rights, flags, _ = sock.recvmsg(RECORD_LIMIT, size, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return b"", []
    fds = [fd for _, _, data in rights for fd in array("i", data)]
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or not message:
        close_all(fds)  # near the descriptor limit a message arrives without its descriptor
        return message, []
    return message, fds


class Channel:
    """One SEQPACKET connection between two processes.

    heard(channel, message, fds) is called for each message and owns its descriptors; b"" is the
    end of the channel, by the peer or `timeout` seconds from now (see expire()), and comes once.
    """

    def __init__(self, loop: Loop, sock: socket.socket, heard: Heard, timeout: float = 0) -> None:
        self.loop, self.sock, self.heard = loop, sock, heard
        self.timer = NEVER
        sock.setblocking(False)
        loop.watch(sock.fileno(), READ, self.readable)  # epoll(7) may refuse it: no timer then
        self.expire(timeout)

    def expire(self, seconds: float, word: bytes = b"") -> None:
        """heard() of the end, or of `word`, after so many seconds from now; 0: not at all."""
        self.timer.cancel()
        self.timer = self.loop.later(seconds, partial(self.finish, word)) if seconds else NEVER

    def send(self, message: bytes, *fds: int) -> None:
        """OSError if it can't be sent. Never empty: that reads like the end."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        self.sock.sendmsg([message], rights if fds else [])

    def tell(self, word: str, *fds: int) -> None:
        """Send it, unless the other end is gone, or is stopped and has not read for long."""
        with contextlib.suppress(OSError):
            self.send(word.encode(), *fds)

    def readable(self, fd: int, mask: int) -> None:
        try:
            message, fds = receive(self.sock)
        except BlockingIOError:
            return
        if not message:
            self.close()
        self.heard(self, message, fds)

    def finish(self, word: bytes) -> None:
        self.close()
        self.heard(self, word, [])

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

LATE = b"late"  # in place of a "!" that has not come
RETRIED = {  # any other reason is final
    "full", "busy", "lost", "EAGAIN", "ECONNREFUSED", "ECONNRESET", "ENOENT", "ETOOMANYREFS",
    "EPIPE", "EMFILE", "ENFILE", "ENOBUFS",
}  # fmt: skip
compact = json.JSONEncoder(separators=(",", ":")).encode


def checked(text: str, kinds: tuple[type, ...]) -> list[Any]:
    """The JSON array `text`, as long as `kinds` and of these types; else ValueError."""
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, list) or [type(item) for item in row[: len(kinds)]] != [*kinds]:
        raise ValueError("not the fields that are expected")
    return row[: len(kinds)]


class State(NamedTuple):
    """The sealed part of a record: who the session is, and its protocol's own state."""

    expires: int  # monotonic second after which a log-in's ticket is refused; 0 for a session
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
        folder = state.watch[0] if state.watch else ""
        if not isinstance(folder, str) or folder == ".." or re.search(r"[/\0]", folder):
            raise ValueError("a watch outside of home")
        if re.search(r"[\r\n\0]", state.sid + state.user + state.remote + state.home):
            raise ValueError("characters that no log or path can have")
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


def seal(key: bytes, name: str, state: str) -> str:
    """What a taken-over log-in process or keeper can't make: `state`'s bytes, bound to the very
    connection that identity() calls `name`."""
    text = f"{len(name)} {name}{state}".encode()
    return base64.b64encode(hashlib.blake2s(text, key=key, digest_size=15).digest()).decode()


def ticket(key: bytes, name: str, sid: str, user: str, remote: str, home: str) -> tuple[str, str]:
    """(state, seal) of a log-in, good for this connection and for TICKET_TIME seconds."""
    expires, since = int(time.monotonic()) + TICKET_TIME, int(time.time())
    state = compact(State(expires, sid, user, since, remote, home, [], []))
    return state, seal(key, name, state)


class Mover:
    """The sender's half towards one service, for all sessions of a process; also asks questions.

    At most IN_FLIGHT at once, the others wait in order of deadline; all that is refused is tried
    again from one timer. It calls parcel(fd) for the record (None: the session is over), then
    leaving(fd), "!" and given(fd), or stays(fd) if that fails; and kept(fd, reason) in the end.
    """

    def __init__(self, owner: Service, service: str) -> None:
        self.loop, self.owner, self.address = owner.loop, owner, owner.config.inbox(service)
        self.queue: list[tuple[float, int]] = []  # deadline, descriptor
        self.offers: dict[int, tuple[float, bytes]] = {}  # deadline, question
        self.channels: dict[int, Channel] = {}
        self.timer = self.pause = NEVER  # the next offer(); none before the end of a pause
        self.moved_at = -math.inf  # when it has taken the last session

    def give(self, fd: int, patience: float, question: bytes = b"") -> None:
        """Hand the session over: ends in given() or, after `patience` seconds, in kept(). With a
        question nothing is handed over: kept() tells the answer, or ""."""
        deadline = time.monotonic() + patience
        self.offers[fd] = deadline, question
        heapq.heappush(self.queue, (deadline, fd))
        self.soon()

    def hurry(self, fd: int, patience: float) -> None:
        """For parcel(): now somebody waits for this one, if it was not refused for good."""
        if fd in self.offers:
            deadline, question = self.offers[fd]
            self.offers[fd] = min(deadline, time.monotonic() + patience), question

    def keep(self, fd: int) -> None:
        """Give up: the receiver sees the channel's end and touches nothing."""
        self.offers.pop(fd, None)
        if channel := self.channels.pop(fd, None):
            channel.close()
            self.soon()  # there is a place for the next one

    def soon(self) -> None:
        """Offer from the loop only: who is kept may give() anew at once, and of many whose time
        is up each would call the next."""
        if self.queue and not self.timer.call:
            self.timer = self.loop.later(0, self.offer)

    def offer(self) -> None:
        while self.queue and len(self.channels) < IN_FLIGHT and not self.pause.call:
            deadline, fd = heapq.heappop(self.queue)
            known, question = self.offers.get(fd, (0.0, b""))
            if known != deadline or fd in self.channels:
                continue  # an entry of the past
            if not (message := question or self.loop.guarded(fd, self.owner.parcel, fd)):
                self.keep(fd)
                continue
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                left = self.offers[fd][0] - time.monotonic()
                # To give up an offer that is behind others in a drain would cost its place.
                drains = self.owner.draining and left > 0 or self.flows()
                wait = ANSWER_TIME if drains else min(ANSWER_TIME, max(left, RETRY_TIME))
                channel = Channel(self.loop, sock, partial(self.answered, fd), wait)
                self.channels[fd] = channel
                sock.connect(self.address)
                channel.send(message, *([] if question else [fd]))
            except OSError as error:
                self.refused(fd, errno.errorcode.get(error.errno or 0, "?"))

    def answered(self, fd: int, channel: Channel, reply: bytes, fds: list[int]) -> None:
        close_all(fds)
        if reply and self.offers[fd][1]:
            self.keep(fd)
            self.owner.kept(fd, reply.decode())
        elif reply == b"+":
            self.owner.leaving(fd)
            try:
                channel.send(b"!")
            except OSError:
                self.owner.stays(fd)
                self.refused(fd, "lost")
            else:
                self.moved_at = time.monotonic()
                self.keep(fd)
                self.owner.given(fd)
        else:
            self.refused(fd, reply[1:80].decode("ascii", "replace") or "lost")

    def flows(self) -> bool:
        """In a drain: does the service take one session after the other? Then nobody's time is
        up, for it is their number that takes long."""
        return self.owner.draining and time.monotonic() - self.moved_at < FLOW_TIME

    def refused(self, fd: int, reason: str) -> None:
        word = reason if reason in RETRIED else "other"  # for it is the peer's
        self.owner.refusals[word] += 1
        deadline, question = self.offers[fd]
        self.keep(fd)
        left = deadline - time.monotonic()
        late = left <= 0 and (reason == "full" or not self.flows())
        if late or reason not in RETRIED:
            return self.owner.kept(fd, "" if question else reason)
        if not self.pause.call:
            self.pause = self.loop.later(RETRY_TIME, self.offer)
        self.give(fd, max(left, 0.0), question)


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
Ask = NamedTuple("Ask", [("service", str), ("message", bytes)])  # gives the answer, or ""
Pause = NamedTuple("Pause", [("seconds", float)])  # go on later, execute nothing meanwhile
Move = NamedTuple(  # go on in another service, by a ticket(); gives only the reason why not
    "Move", [("service", str), ("ticket", str), ("seal", str), ("answer", str)]
)
Reply = Generator["bytes | Ask | Pause | Move", Any, None]


class Session:
    """A protocol as the engine sees it: subclass it. It never meets a socket or a process.

    The engine appends input to `buffer` and calls step() until that returns None. What the
    session wants it yields: bytes, Ask, Pause, Move. `ended = reason` closes the connection when
    all is sent. Before it has a `user` it can't sleep, and login_timeout ends it; a non-empty
    `tag` says that it listens for changes below home/folder.
    """

    input_limit = 64 * 1024  # no more is read from the client while this much is in `buffer`
    watch_dirs: tuple[str, ...] = ()  # at most two, below home/folder
    tag_syntax = re.compile("")
    still_here = b""  # keepalive for who listens

    config: Config  # these are set by the engine, before any call
    key = b""  # what tickets are sealed with, if the role is trusted
    sid = user = remote = home = identity = ""  # the last: of the connection, for its ticket
    since = 0  # unix time of the log-in
    times: Sequence[int] = ()

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.tag = self.ended = ""

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Called in each process before it gives up root's rights; OSError is no matter. What it
        opens is closed in a twin."""

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
        """As JSON. A sleeper has room for some 350 bytes of it, up to 100 of them at little cost:
        see TEXT_SIZE."""
        return []

    def thaw(self, own: list[Any]) -> None:
        """The reverse of freeze(): quick, touches nothing; ValueError if it makes no sense.
        `times` are those that watch() has told."""

    def watch(self) -> tuple[str, tuple[int, ...]] | None:
        """(folder, st_mtime_ns of each of watch_dirs as it was before the last look), or None;
        the folder is one name, or "" for the home itself."""
        return None

    @classmethod
    def peeked(cls, tag: str, data: bytes) -> tuple[bytes, int, str] | None:
        """What a sleeper answers by itself: (answer, bytes used up, new tag); None: wake it.
        Of more than 512 bytes these are the first."""
        return None

    @classmethod
    def farewell(cls, reason: str) -> bytes:
        return b""

    def closed(self) -> None:
        """The session ends here, or has moved on."""


is_global = lru_cache(1024)(lambda address: ipaddress.ip_address(address).is_global)


def seconds_to_beat(interval: float, remote: str, user: str) -> float:
    """Until the next keepalive. Its phase hangs on the address if that is public, else on the
    user: a phone's radio wakes once for all its sessions, and the others are spread. The monotonic
    clock is the same in all processes, and does not jump."""
    address = remote.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        user = address if is_global(address) else user
    return interval - (time.monotonic() + zlib.crc32(user.encode())) % interval


def inotify() -> tuple[Any, int]:
    """The C library and a new inotify(7) instance, -1 if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):
        return libc, libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    return libc, -1


def inotify_events(fd: int) -> Iterator[tuple[int, int]]:
    """(watch, mask) of each event that waits to be read."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, at = os.read(fd, 64 * 1024), 0
            while at < len(data):
                number, mask, _, length = struct.unpack_from("iIII", data, at)
                at += 16 + length
                yield number, mask


class Watcher:
    """Tells whose directories have changed: one inotify(7) instance a process, one watch a
    directory however many sessions share it. Whom inotify fails, because there is none or no
    watch is left, is stirred every POLL seconds: who is stirred looks at the times anyway."""

    MASK = 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800  # ATTRIB … MOVE_SELF, not MODIFY
    POLL = 3.0
    POLLED = -1  # stands for a watch's number

    def __init__(self, loop: Loop, stirred: Callable[[int], None]) -> None:
        self.loop, self.stirred = loop, stirred
        self.sessions: dict[int, int | array[int]] = {}  # sets would take 216 or 728 bytes each
        self.timer, self.warned = NEVER, False
        self.libc, self.fd = inotify()
        if self.fd >= 0:
            loop.watch(self.fd, READ, self.readable)

    def add(self, path: str, fd: int, has: Iterable[int]) -> int:
        """Watch `path` for the session `fd`, which `has` these numbers; a number is never 0."""
        number = self.fd
        if number >= 0:
            number = self.libc.inotify_add_watch(self.fd, os.fsencode(path), self.MASK)
        if number < 0:
            number, reason = self.POLLED, ctypes.get_errno()
            if not self.warned and reason != errno.ENOENT:  # that is a folder's own fate
                log.warning("inotify: %s; looking at times", os.strerror(reason))
                self.warned = True
            if not self.timer.call:
                self.timer = self.loop.later(self.POLL, self.poll)
        if number in has:  # to look through all the sessions of a mailbox would take long
            return number
        known = self.sessions.setdefault(number, fd)
        if isinstance(known, array):
            known.append(fd)
        elif known != fd:
            self.sessions[number] = array("i", (known, fd))
        return number

    def drop(self, number: int, fd: int) -> None:
        known = self.sessions.get(number)
        if isinstance(known, array) and len(known) > 1:
            with contextlib.suppress(ValueError):
                known.remove(fd)
        elif known in (fd, array("i", [fd])):
            del self.sessions[number]
            if number != self.POLLED:
                self.libc.inotify_rm_watch(self.fd, number)

    def readable(self, fd: int, mask: int) -> None:
        numbers = set()
        for number, what in inotify_events(fd):
            numbers.add(number)
            if what & 0x4000:  # Q_OVERFLOW, events were lost: look at all
                numbers.update(self.sessions)
        for number in numbers:
            self.stir(number)

    def poll(self) -> None:
        if self.POLLED in self.sessions:
            self.timer = self.loop.later(self.POLL, self.poll)
            self.stir(self.POLLED)

    def stir(self, number: int) -> None:
        known = self.sessions.get(number, array("i"))
        for fd in [known] if isinstance(known, int) else list(known):
            self.loop.guarded(fd, self.stirred, fd)


def directories(session: Session | type[Session], home: str, watch: Sequence[Any]) -> list[str]:
    """The paths that it watches: below the folder that `watch` begins with, if it is not empty."""
    return [os.path.join(home, watch[0], name) for name in session.watch_dirs if watch]


def directory_time(path: str) -> int:
    """st_mtime_ns, 0 if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def changed_since(paths: list[str], times: Sequence[int], young: int) -> bool:
    """Has a directory another time than it had, or one less than `young` ns ago?"""
    now = time.clock_gettime_ns(FILE_CLOCK)
    found = [directory_time(path) for path in paths]
    return found != list(times) or any(abs(now - stamp) < young for stamp in found)


class Phase(enum.Enum):
    RUNNING = "executes commands, or is at rest"
    WAITING = "its reply waits for another process, or for time"
    MOVING = "a hand-over is under way: nothing is executed"
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
    awake: float = 0  # not to be put to sleep until then
    timer: Timer = NEVER  # see clock()
    beat: Timer = NEVER  # the next keepalive
    again: Timer = NEVER  # the next look: one is enough
    wait: float = 0  # seconds before it, twice as long each time
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
                return self.clock()
            except OSError as error:
                return self.close(f"connection lost: {error.strerror}")
            self.eof = not data  # a half-close: the commands before it still run
            self.received += len(data)
            self.session.buffer += data
        self.pump()

    def pump(self, value: Any = None) -> None:
        """Run the session. A bug in it costs itself, not who has called: inotify, or a channel."""
        self.loop.guarded(self.fd, self.run, value)

    def run(self, value: Any) -> None:
        """Until it waits for its client, the network or another process, or until it is the
        others' turn."""
        if self.session.user or self.session.tag:
            self.rested, self.awake = time.monotonic(), 0.0
        dry, end = False, time.monotonic() + TURN_TIME  # by the clock: a chunk may take long
        while not dry and self.phase is Phase.RUNNING and len(self.output) < OUTPUT_HIGH:
            try:
                if self.reply is None and not self.session.ended:
                    self.reply = self.session.step()
                if self.reply:
                    self.perform(self.reply.send(value))
                else:
                    dry = True
            except StopIteration:
                self.reply = None
            value = None
            if time.monotonic() > end:
                break
        self.settle(dry)

    def perform(self, item: bytes | Ask | Pause | Move) -> None:
        if not isinstance(item, Ask | Pause | Move):  # bytes, or a bytearray cut off `buffer`
            self.output += item
            return
        self.phase = Phase.WAITING
        if isinstance(item, Ask):
            self.service.mover(item.service).give(self.fd, MOVE_TIME, item.message)
        elif isinstance(item, Pause):
            self.loop.later(item.seconds, self.go_on)
        else:
            self.move = item  # begun by settle() when all is sent

    def go_on(self, value: Any = None) -> None:
        """What the reply waited for is here."""
        if self.phase is Phase.WAITING:
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

    def settle(self, dry: bool) -> None:
        """After each run: send, decide what to watch for, and see whether this is rest."""
        if self.phase in (Phase.CLOSED, Phase.MOVING) or not self.flush():
            return
        runs = self.phase is Phase.RUNNING and not dry  # goes on as soon as it can write
        if self.session.ended and dry and not self.output:
            self.close(self.session.ended)
        elif self.move and not self.output:
            self.depart(self.move.service, MOVE_TIME)
        else:
            reads = not self.eof and len(self.session.buffer) < self.session.input_limit
            writes = runs or bool(self.output)
            self.loop.watch(self.fd, READ * reads | WRITE * writes, self.ready)
            if dry and not self.output:
                self.rest()
            else:
                self.clock()

    def at_rest(self) -> bool:
        return self.phase is Phase.RUNNING and not self.reply and not self.output

    def rest(self) -> None:
        """Nothing to execute, nothing to send: listen, sleep later, or move on now."""
        leaves = self.service.draining and not self.service.role.requests  # a question stays
        # In JSON a byte of input takes six at most. With too much of it a later boundary must do.
        fits = 6 * len(self.session.buffer) < RECORD_LIMIT - 16 * 1024
        if self.eof:
            self.close("client closed the connection")
        elif leaves and fits and self.session.movable():
            self.depart(self.service.role.name, self.session.config.orphan_timeout)
        else:
            if self.listen():  # not at once, but when times that are young have settled
                spent = time.monotonic() - self.rested  # if the last look took long, later
                # On a full disk a look fails, and its times stay what they were.
                self.wait = min(max(1.25 * YOUNG / 1e9, 9 * spent, 2 * self.wait), Watcher.POLL)
                self.again.cancel()
                self.again = self.loop.later(self.wait, self.look)
            else:
                self.wait = 0
            self.clock()

    def listen(self) -> bool:
        """Watch while there is a tag. True: the session must look again, now that we watch."""
        session, watcher = self.session, self.service.watcher
        if not session.tag or not (watch := session.watch()):
            self.unlisten()
            return False
        paths = directories(session, session.home, watch)
        # Each time: a directory that was removed and made again is another.
        watches: list[int] = []
        for path in paths:
            watches.append(watcher.add(path, self.fd, self.watches + watches))
        known = watches == self.watches
        for number in {*self.watches} - {*watches}:
            watcher.drop(number, self.fd)
        self.watches = watches
        interval = session.config.idle_notify_interval
        if interval and session.still_here and not self.beat.call:
            wait = seconds_to_beat(interval, session.remote, session.user)
            self.beat = self.loop.later(wait, self.keep_alive, self.fd)
        return changed_since(paths, watch[1], 0 if known else YOUNG)

    def unlisten(self) -> None:
        for number in self.watches:
            self.service.watcher.drop(number, self.fd)
        self.watches = []
        self.beat.cancel()

    def stirred(self) -> None:
        if self.phase is not Phase.CLOSED and self.listen() and not self.service.draining:
            self.stay()
            self.look()

    def look(self) -> None:
        if self.at_rest() and not self.session.ended:
            self.start(self.session.stirred())

    def keep_alive(self) -> None:
        if self.at_rest():  # else the next rest sets the next beat
            self.output += self.session.still_here
            self.settle(True)

    def clock(self) -> None:
        """Do what is due of one at rest, or of one that does not read; else set the timer for it,
        which may fire in vain: commands are too many to set it anew after each."""
        session, role, config = self.session, self.service.role, self.session.config
        limit, ending = REST_TIME, "Autologout; idle for too long"
        if not session.user:
            limit = SPEAK_TIME if role.requests else config.login_timeout
            ending = "log-in took too long"
        elif (role.keeper and config.hibernate_timeout and session.movable()
              and not session.buffer and not self.output):
            sleep = max(config.hibernate_timeout, self.awake - self.rested)
            if session.tag or sleep < limit:
                limit, ending = sleep, ""
        now, rests = time.monotonic(), self.at_rest()
        due = self.rested + limit
        if due <= now and (rests or self.output):
            if not ending:
                return self.depart(role.keeper, SLEEP_TIME)
            if self.output or not session.tag:  # who listens, and reads, is kept alive
                return self.close(ending, farewell=True)
        if due <= now or not rests:
            due = now + 1.0
        if not self.timer.call or self.timer.when > due:
            self.timer.cancel()
            self.timer = self.loop.later(due - now, self.clock, self.fd)

    def depart(self, service: str, patience: float) -> None:
        """Begin to hand over. Should its client stir meanwhile, a sleeper-to-be stays; in a drain
        it does not, or a busy one would never leave: its new home reads what it says."""
        self.phase = Phase.MOVING
        stays = not self.move and not self.service.draining
        self.loop.watch(self.fd, READ * stays, self.ready)
        self.service.mover(service).give(self.fd, patience)

    def stay(self) -> None:
        if self.phase is Phase.MOVING and not self.move:
            self.service.keep(self.fd)
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
            self.phase, self.move = Phase.WAITING, None
            return self.go_on(reason)
        self.stay()
        if self.service.draining:
            return self.close("server was shut down", farewell=True)
        wait = max(AWAKE_TIME, self.session.config.hibernate_timeout)
        if reason not in RETRIED | {"changed"}:
            log.warning("<%s> stays awake: %r", self.session.sid, reason)
            wait = REST_TIME  # it will be no other while the client says nothing
        rested = self.rested  # of its client nothing was heard, or we would not be here
        self.pump()
        self.rested, self.awake = rested, time.monotonic() + wait

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
        self.service.keep(self.fd)
        self.unlisten()
        self.timer.cancel()
        self.again.cancel()
        self.service.clients.pop(self.fd, None)
        if self.reply:
            self.loop.guarded(-1, self.reply.close)
        self.loop.guarded(-1, self.session.closed)  # a bug in it must not cost the place, too


class Service:
    """A process of a service: accepts, adopts, reports, and moves its sessions on.

    `Any` in hold(), begin() and abandon() is what this kind of process holds of a session
    between "+" and "!": here a Client, in a keeper less.
    """

    def __init__(self, master: Master, pool: Pool, slot: int) -> None:
        self.config = master.config
        self.role = pool.role
        self.peers = master.peers
        self.slot = slot
        self.inbox = pool.inbox
        # (slot, socket) of each open inet listener; slot -1 where all share one.
        self.sockets = [
            (slot if len(group) > 1 else -1, sock)
            for group in pool.listeners for slot, sock in enumerate(group)
        ]  # fmt: skip
        self.limit: int = min(pool.settings.client_limit, file_limit() - RESERVE)
        self.counts: collections.Counter[str] = collections.Counter()
        self.draining = self.stopping = False
        self.stretched = False  # all are full: take a few more from the inbox, or refuse them
        self.unread: set[int] = set()  # of the siblings' SO_REUSEPORT sockets: see cover()
        self.covered: dict[int, float] = {}
        self.title = Title(f"{self.config.program.name}/{self.role.name}")
        key = Path(self.config.base_dir, "key")
        self.key = key.read_bytes()[:32] if self.role.trusted else b""
        with contextlib.suppress(OSError):
            self.role.session.prepare(self.config)
        drop_privileges(pool.settings)

    def start(self, channel: socket.socket) -> None:
        """What is this process's own; a keeper's survivor makes it anew."""
        self.loop = Loop()
        self.loop.failed = self.failed
        self.movers: dict[str, Mover] = {}  # one each: a service that is stuck delays no other
        self.refusals: collections.Counter[str] = collections.Counter()
        self.watcher = Watcher(self.loop, self.stirred)
        self.clients: dict[int, Client] = {}
        self.arrivals: dict[Channel, Any] = {}
        self.told: tuple[int, int] | None = None  # (room, sessions) as last reported
        self.report_timer = NEVER
        self.pause = NEVER  # no descriptor is left until then
        self.loop.on_signals({signal.SIGTERM: self.stop})
        if any(slot >= 0 for slot, _ in self.sockets):
            self.cover()
        self.master = Channel(self.loop, channel, self.word)

    def run(self, channel: socket.socket) -> None:
        """Serve until told to stop, or until the last session has left after a drain."""
        self.start(channel)
        self.update()  # the first report: only now can it serve
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
        accepts = not self.draining and not self.pause.call
        spare = max(1, self.limit // 4) if self.stretched else 0
        shed = spare > 0 and self.role.sheds
        for slot, sock in self.sockets:
            mine = slot in (-1, self.slot) or sock.fileno() in self.covered
            wanted = accepts and mine and (room > 0 or shed)
            self.loop.watch(sock.fileno(), READ * wanted, self.accept_client)
        if self.inbox.fileno() >= 0:
            self.loop.watch(self.inbox.fileno(), READ * (accepts and room + spare > 0), self.invite)
        told = (max(0, room), self.count())
        if self.told is None or (self.told[0] == 0) != (told[0] == 0):
            self.report()
        elif told != self.told and not self.report_timer.call:
            self.report_timer = self.loop.later(1.0, self.report)
        if self.draining and not self.count() and not self.arrivals:
            self.loop.running = False

    def cover(self) -> None:
        """The share of a process that is full, stopped or missing would wait in its SO_REUSEPORT
        socket: what two looks in a row find unread, its siblings read for a second. No word of
        the master's could do it: it hears nothing of a process that is stopped."""
        self.loop.later(LOOK_TIME, self.cover)
        poll, now, before = select.poll(), time.monotonic(), self.unread
        for slot, sock in self.sockets:
            if slot != self.slot:
                poll.register(sock, select.POLLIN)
        self.unread = {fd for fd, _ in poll.poll(0)}
        self.covered = {fd: end for fd, end in self.covered.items() if end > now}
        self.covered |= dict.fromkeys(self.unread & before, now + 1.0)
        if self.covered or before:
            self.update()

    def report(self) -> None:
        """Room 0 ↔ non-0 at once, the rest once a second."""
        self.report_timer.cancel()
        self.told = max(0, self.room()), self.count()
        self.master.tell(compact(self.told))
        if self.config.verbose_proctitle:
            unit = self.role.unit and f" [{self.count()} {self.role.unit}]"
            self.title.set(f"{self.config.program.name}/{self.role.name}{unit}")

    def accept(self, listener: socket.socket) -> socket.socket | None:
        """One connection; None if another process was faster, or no descriptor is left."""
        try:
            return listener.accept()[0]
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:  # EMFILE and its kin: a level-triggered listener would spin
            log.error("accept: %s; pausing for a second", error.strerror)
            self.pause = self.loop.later(1.0, self.update)
            return None

    def accept_client(self, fd: int, mask: int) -> None:
        """In small bites, so that siblings get their share of a burst."""
        listener = next(sock for _, sock in self.sockets if sock.fileno() == fd)
        for _ in range(4):
            full = self.room() <= 0  # then who has not tried to log in gives way
            sheds = self.clients.values() if full and self.role.sheds and self.stretched else ()
            idle = [client for client in sheds if client.phase is Phase.RUNNING]
            if full and not idle or not (sock := self.accept(listener)):
                break
            if full:  # only now: a sibling may have been faster
                min(idle, key=lambda client: client.rested).close("Too many connections", True)
            self.welcome(sock)
        self.update()

    def welcome(self, sock: socket.socket) -> None:
        """A client from outside, or, without an address, one of our processes with a question."""
        try:
            session = self.new_session(sock)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                host, port = sock.getpeername()[:2]
                session.remote = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except OSError:
            return sock.close()
        session.sid, session.since = secrets.token_urlsafe(9), int(time.time())
        client = Client(self, sock, session)
        self.clients[client.fd] = client
        client.start(session.opened())

    # Hand-over, the receiver's half

    def invite(self, fd: int, mask: int) -> None:
        """A channel to the inbox: it counts as a client from now on."""
        sock = self.accept(self.inbox)
        if sock and not self.trusts(sock):
            sock.close()
        elif sock and self.role.requests:
            self.welcome(sock)
        elif sock:
            self.expect(sock)
        self.update()

    def expect(self, sock: socket.socket, held: Any = None) -> None:
        """Listen to a sender: for its record, or, if that is held, for its "!"."""
        channel = Channel(self.loop, sock, self.arriving, SPEAK_TIME)
        self.arrivals[channel] = held
        if held is not None:
            channel.expire(COMMIT_TIME, LATE)

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
                # A sender that was told "+" and is stopped must leave no client hanging.
                channel.expire(COMMIT_TIME, LATE)
                word = "+"
            except Exception as error:  # a bug in thaw() must not cost the channel's room
                close_all(fds)
                known = str(error) in RETRIED | {"changed"}
                self.counts[f"refused {error}" if known else "refused"] += 1
                if not known:
                    bug = not isinstance(error, ValueError | OSError)
                    log.warning("a session was refused: %.70r", str(error), exc_info=bug)
                word = f"-{error}"[:80]
            channel.tell(word)  # a sender that has left: its end comes next
            return
        del self.arrivals[channel]
        try:
            if message == b"!":  # at once: a twin can't know that it was read
                self.begin(held)
                if self.stopping:
                    self.stop()
            elif held is not None:  # the sender has given up, or is gone: touch nothing
                if message is LATE:
                    log.warning("a hand-over was not committed within %d s", COMMIT_TIME)
                self.abandon(held, shutdown=message is LATE)
        finally:
            channel.close()
            close_all(fds)
            self.update()

    def read_record(self, message: bytes) -> tuple[Record, State]:
        record = Record.decode(message)
        if record.tag and not self.role.session.tag_syntax.fullmatch(record.tag):
            raise ValueError("tag")
        return record, State.decode(record.state)

    def hold(self, record: Record, state: State, fd: int, channel: Channel) -> Any:
        """Check, and hold session and descriptor, ready to begin(). An exception says why not,
        and leaves `fd` to the caller."""
        if state.expires and self.room() < 0:
            raise ValueError("full")  # only who sleeps may exceed the limit, so that it can wake
        sock = socket.socket(fileno=fd)
        try:
            session = self.new_session(sock)
            fits = self.role.trusted and seal(self.key, session.identity, record.state)
            if fits and not hmac.compare_digest(fits.encode(), record.seal.encode()):
                raise ValueError("seal")
            if state.expires and not 0 <= state.expires - time.monotonic() <= TICKET_TIME:
                raise ValueError("ticket too late")
            _, session.sid, session.user, session.since, session.remote = state[:5]
            session.home, session.tag, session.times = state.home, record.tag, state.watch[1:]
            session.buffer += record.pending.encode("latin-1")
            session.thaw(state.own)
        except Exception:
            sock.detach()
            raise
        return Client(self, sock, session, record.received, record.sent, record.answer)

    def new_session(self, sock: socket.socket) -> Session:
        session = self.role.session()
        session.config, session.key = self.config, self.key
        session.identity = "" if self.role.requests else identity(sock)
        return session

    def begin(self, client: Any) -> None:
        """The "!" has come: this process is the owner."""
        self.clients[client.fd] = client
        self.adopted(client.session)
        client.start(client.session.arrived(client.answer))

    def abandon(self, client: Any, shutdown: bool = False) -> None:
        """Not ours: close the copy and touch nothing; `shutdown` ends it for every holder."""
        if shutdown:
            end_socket(client.sock)
        client.sock.close()
        self.loop.guarded(-1, client.session.closed)

    # Hand-over, the sender's half: see Mover

    def mover(self, service: str) -> Mover:
        if service not in self.movers:
            self.movers[service] = Mover(self, service)
        return self.movers[service]

    def keep(self, fd: int) -> None:
        for mover in self.movers.values():
            mover.keep(fd)

    def parcel(self, fd: int) -> bytes | None:
        try:
            return self.clients[fd].record()
        except OSError as error:
            self.clients[fd].close(f"connection lost: {error.strerror}")
            return None

    def leaving(self, fd: int) -> None:
        """Nothing to mark: until "!" is sent this process can go on with it."""

    def stays(self, fd: int) -> None:
        """The "!" could not be sent."""

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
        self.clients[fd].stirred()

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

    def adopted(self, session: Session | State) -> None:
        self.counts["adopted"] += 1
        log.info("<%s> %s %s is here", session.sid, session.user, session.remote)

    def ended(self, session: Session | State, reason: str, received: int, sent: int) -> None:
        if not self.role.requests:
            who = f"<{session.sid}> {session.user or session.remote}"
            log.info("%s ended: %s, in=%d out=%d", who, reason, received, sent)
        self.update()

    # Words of the master, and its end

    def word(self, channel: Channel, message: bytes, fds: list[int]) -> None:
        name, _, rest = message.decode().partition(" ")
        if not message:
            self.drain()
        elif name in ("who", "status", "kick") and fds:
            report = Report(self, name, rest)
            Client(self, socket.socket(fileno=fds.pop()), report).start(report.opened())
        elif name == "stop":
            self.stop()
        elif name == "close":
            self.close_listeners()
        elif name == "end-if-idle" and not self.count() and not self.arrivals:
            self.draining = True  # update() ends it, and accepts nobody of the same batch
        elif name == "full":
            self.stretched = True
            if float(rest) > FULL_TIME and not self.role.sheds:
                self.relieve()
        close_all(fds)
        self.update()

    def relieve(self) -> None:
        """All have been full for long: a clear good-bye to those who wait."""
        for _, sock in self.sockets:
            while self.room() <= 0 and (newcomer := self.accept(sock)):
                with contextlib.suppress(OSError):  # it may have left
                    newcomer.send(self.role.session.farewell("Too many connections"))
                end_socket(newcomer)

    def close_listeners(self) -> None:
        """Serve what waits in the queues first: closing them would reset it."""
        while self.sockets:
            _, sock = self.sockets.pop()
            while newcomer := self.accept(sock):
                self.welcome(newcomer)
            self.loop.unwatch(sock.fileno())
            sock.close()

    def drain(self) -> None:
        """The master is gone. What comes next has the same inboxes: hand everything over."""
        self.draining = True
        self.close_listeners()
        if self.inbox.fileno() >= 0:
            self.loop.unwatch(self.inbox.fileno())
            # Not only close(): in a twin's copy senders would wait. They try the next inbox.
            end_socket(self.inbox)
        self.await_heir(time.monotonic())
        for fd, _ in self.states():
            self.move_on(fd)
        self.update()

    def await_heir(self, since: float) -> None:
        """Draining: end when nobody has taken a session for long."""
        last = max([since, *(mover.moved_at for mover in self.movers.values())])
        wait = last + self.config.orphan_timeout - time.monotonic()
        if wait > 0:
            self.loop.later(wait, partial(self.await_heir, last))
        else:
            self.stop()

    def stop(self) -> None:
        """End all sessions with a farewell, then the process; one whose "!" is still to come
        has nobody else to say it."""
        self.draining = self.stopping = True
        for fd, _ in self.states():
            self.end(fd, "Server shutting down.")
        self.update()


class Report(Session):
    """Lines for the command line, in JSON: a session only so that a slow reader is no matter."""

    def __init__(self, service: Service, what: str, user: str) -> None:
        super().__init__()
        self.service, self.what, self.only = service, what, user
        self.config = service.config

    def opened(self) -> Reply:
        service = self.service
        row: dict[str, Any] = {"service": service.role.name, "pid": os.getpid()}
        count = 0
        for fd, state in service.states() if self.what != "status" else ():
            if self.what == "kick" and state.user == self.only:
                service.loop.guarded(fd, service.end, fd, "Disconnected by the administrator")
                count += 1
            elif self.what == "who" and not service.role.requests:
                rest = dict(zip(("session", "user", "since", "remote"), state[1:5]))
                yield compact(row | rest).encode() + b"\n"
        if self.what == "kick":
            yield compact(row | {"kicked": count}).encode() + b"\n"
        elif self.what == "status":
            row |= {"slot": service.slot, "clients": service.count(), "room": service.room()}
            row |= {"counts": service.counts, "refusals": service.refusals}
            yield compact(row).encode() + b"\n"
        self.ended = "done"


def file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


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


def open_pipes() -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        for fd in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # it was that of the directory itself
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    found.add(fd)
    return found


def fork(name: str, main: Main) -> tuple[Any, socket.socket, set[int]]:
    """A process that runs main(our end, its own end) of a new channel: the process, our end, and
    the pipes that multiprocessing keeps for it. OSError: there is none, and nothing is left."""
    before = open_pipes()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=main, args=(ours, theirs), name=name)
    try:
        process.start()
    except OSError:
        if before:  # could be listed: multiprocessing forgets its pipes if the fork fails
            close_all(open_pipes() - before)
        raise
    theirs.close()
    return process, ours, open_pipes() - before


class Title:
    """What ps shows: the argument area, whose bounds are in /proc/self/stat, proc(5)."""

    def __init__(self, text: str) -> None:
        self.start = self.size = 0
        path = "/proc/self/stat"
        with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
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
# A sleeper is one slot of an anonymous mmap, found by its descriptor's number: no object, no
# timer. The keeper peeks and never reads, so what a client sends is still in the socket for the
# worker: nothing lost, nothing doubled. While a sleeper waits to wake, its descriptor is not
# watched: left armed it costs a whole core.
# ------------------------------------------------------------------------------------------------

# What a slot holds. GONE: "!" is about to be sent. OFFERED: it has not come yet, and CHANNEL is the
# slot of the descriptor on which it will. Before, both are COPIED to the twin: what that has under
# their numbers may be of their predecessors.
FREE, HELD, GONE, OFFERED, CHANNEL, COPIED = range(6)
LIVING = (HELD, OFFERED, CHANNEL, COPIED)
IS_LIVING = bytes(state in LIVING for state in range(256))  # for translate()
TEXT_SIZE, TAIL_SIZE = 296, 256  # bytes of a sleeper's text, and of what goes beyond them
SWEEP_TIME = 2.0  # seconds between two looks of a twin
TWIN_TIME = 1.0  # seconds that a keeper waits for a twin that does not read, at most
ARMED = 200  # sessions that a survivor watches for mail before the others have a turn


class Slot(ctypes.Structure):
    """A sleeper, in memory that the keeper and its twin share. Field by field: an array to which
    a Slot is assigned keeps 300 bytes for it for ever."""

    _fields_ = [
        ("beat", ctypes.c_uint32),  # the second of the keepalive interval when it has its turn
        ("rest", ctypes.c_uint32),  # monotonic second: since when it has sent nothing
        ("watches", ctypes.c_int * 2),
        ("received", ctypes.c_uint64),
        ("sent", ctypes.c_uint64),
        ("text", ctypes.c_char * TEXT_SIZE),  # see Keeper.lines()
    ]  # of a CHANNEL, `text` is the number of the descriptor that is offered on it


def slot_text(*lines: str) -> bytes:
    text = "\n".join(lines).encode()
    if len(text) > TEXT_SIZE + TAIL_SIZE or 0 in text or len(lines) != text.count(b"\n") + 1:
        raise ValueError("more than a sleeper can have")
    return text


class Keeper(Service):
    """Thousands of sleepers: keepalive, watch, wake."""

    def __init__(self, master: Master, pool: Pool, slot: int) -> None:
        super().__init__(master, pool, slot)
        # There are numbers beyond the slots: a twin has its log file there.
        count = min(file_limit() - 8, self.limit + 4 * RESERVE)
        size = count * ctypes.sizeof(Slot)
        memory = mmap.mmap(-1, size + count * TAIL_SIZE + count)
        self.slots = (Slot * count).from_buffer(memory)
        # Few have one, and a page takes no memory before something is written to it.
        self.tails = (ctypes.c_char * TAIL_SIZE * count).from_buffer(memory, size)
        # Side by side, as all are looked at together: from slot to slot each would be a cache miss.
        self.state = memoryview(memory)[-count:]
        self.held = 0
        self.period = max(1, math.ceil(self.config.idle_notify_interval or 60))
        self.peeker = self.peek  # one bound method for all, not 64 bytes for each
        self.twin: tuple[Any, Channel] | None = None  # its process, and the way to it

    def start(self, channel: socket.socket) -> None:
        super().start(channel)
        self.channel = channel
        self.waking: dict[int, str] = {}  # and why
        self.turns: dict[int, array[int]] = collections.defaultdict(partial(array, "i"))
        self.turned = int(time.monotonic())
        # Where there is epoll(7), an inner one for the sleepers: a key of selectors has 150 bytes.
        self.beds: Any = select.epoll() if hasattr(select, "epoll") else None
        if self.beds:
            self.loop.watch(self.beds.fileno(), READ, self.peek_all)
        self.loop.later(1.0, self.take_turns)
        self.resume()

    def run(self, channel: socket.socket) -> None:
        super().run(channel)
        self.end_twin()

    def count(self) -> int:
        return self.held

    @property
    def top(self) -> int:
        """No slot from here on was ever used; to look at one would give it memory."""
        return int(self.slots[0].beat)  # of no session: there the twin finds it, too

    def slot_states(self) -> bytes:
        """The state of every slot in use."""
        return bytes(self.state[: self.top])

    def lines(self, fd: int) -> list[str]:
        """[state as it came, seal, tag]; JSON has no line feed, and neither have the others."""
        text = self.slots[fd].text
        if len(text) == TEXT_SIZE:
            text += self.tails[fd].value
        return str(text, "utf-8").split("\n")

    def set_lines(self, fd: int, text: bytes) -> None:
        self.slots[fd].text = text[:TEXT_SIZE]
        if len(text) >= TEXT_SIZE:
            self.tails[fd].value = text[TEXT_SIZE:]

    def known(self, fd: int) -> State:
        return State.decode(self.lines(fd)[0])

    def tag(self, fd: int) -> str:
        return self.lines(fd)[2]

    # Arriving

    def hold(self, record: Record, state: State, fd: int, channel: Channel) -> Any:
        number = channel.sock.fileno()
        if self.room() < 0 or max(fd, number) >= len(self.slots) or 0 in (fd, number):
            raise ValueError("full")
        with Borrowed(fd) as sock:
            sock.getpeername()  # OSError: no socket, or its client has gone
        if record.pending or record.answer:
            raise ValueError("more than a sleeper can have")
        text = slot_text(record.state, record.seal, record.tag)
        os.set_blocking(fd, False)
        self.slots[0].beat = max(self.top, fd + 1, number + 1)
        now, wait = time.monotonic(), seconds_to_beat(self.period, state.remote, state.user)
        slot = self.slots[fd]
        slot.beat, slot.rest = round(now + wait) % self.period, int(now)
        slot.received, slot.sent = record.received, record.sent
        self.set_lines(fd, text)
        self.make_bed(fd)
        if record.tag and not self.listen(fd, state):
            self.unwatch(fd)
            raise ValueError("changed")
        self.slots[number].text = b"%d" % fd
        self.state[fd] = self.state[number] = COPIED
        self.copy(fd, number)
        self.state[number] = CHANNEL
        self.state[fd] = OFFERED  # never without it
        return fd, state, number

    def listen(self, fd: int, state: State) -> bool:
        """Watch its directories. Arm first, then compare: False, and no watch, if they changed,
        or may have, before the watch was there."""
        paths = directories(self.role.session, state.home, state.watch)
        watches = self.slots[fd].watches
        for at, path in enumerate(paths):
            watches[at] = watches[at] or self.watcher.add(path, fd, watches)
        if not paths or changed_since(paths, state.watch[1:], YOUNG):
            self.unlisten(fd)
            return False
        return True

    def unlisten(self, fd: int) -> None:
        watches = self.slots[fd].watches
        for number in filter(None, watches):
            self.watcher.drop(number, fd)
        watches[:] = 0, 0

    def begin(self, held: Any) -> None:
        fd, state, number = held
        self.state[fd] = HELD
        self.state[number] = FREE
        self.held += 1
        self.adopted(state)
        self.tend(fd)
        self.arm(fd, state)

    def make_bed(self, fd: int) -> None:
        """Before "+": epoll(7) may refuse it, see max_user_watches. Until "!" it tells one event
        at most."""
        if self.beds:
            self.beds.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def tend(self, fd: int) -> None:
        """A sleeper is ours from now on."""
        self.turns[self.slots[fd].beat].append(fd)
        if self.beds:
            self.beds.modify(fd, select.EPOLLIN)
        else:
            self.loop.watch(fd, READ, self.peeker)

    def unwatch(self, fd: int) -> None:
        if self.beds:
            with contextlib.suppress(FileNotFoundError):
                self.beds.unregister(fd)
        else:
            self.loop.unwatch(fd)

    def arm(self, fd: int, state: State) -> None:
        """Watch its mailbox and look, unless it is watched since hold() and has not stirred."""
        if self.draining:
            self.move_on(fd)
        elif self.tag(fd) and not self.slots[fd].watches[0] and not self.listen(fd, state):
            self.wake(fd, "mail")

    def abandon(self, held: Any, shutdown: bool = False) -> None:
        fd, _, number = held
        self.unlisten(fd)
        self.unwatch(fd)
        self.state[fd] = self.state[number] = FREE
        if shutdown:
            end_socket(socket.socket(fileno=fd))
        else:
            os.close(fd)

    # Asleep

    def peek_all(self, beds: int, mask: int) -> None:
        for fd, events in self.beds.poll(0, IN_FLIGHT):
            if self.state[fd] == HELD and fd not in self.waking:
                self.loop.guarded(fd, self.peek, fd, events)

    def peek(self, fd: int, mask: int) -> None:
        """The client has sent something, or has left. Answer first, then consume."""
        slot = self.slots[fd]
        with Borrowed(fd) as sock:
            try:
                data = sock.recv(512, socket.MSG_PEEK)
                *sealed, tag = self.lines(fd)
                answer = self.role.session.peeked(tag, data) if data else None
                if not data:
                    self.over(fd, "client closed the connection")
                elif not answer or not (text := self.adopt_tag(fd, sealed, tag, answer[2])):
                    self.wake(fd, "input")
                elif self.say(fd, answer[0]):
                    self.set_lines(fd, text)
                    slot.rest = int(time.monotonic())
                    os.read(fd, answer[1])
                    slot.received += answer[1]
                    self.counts["answered asleep"] += 1
            except BlockingIOError:
                pass
            except OSError as error:
                self.over(fd, f"connection lost: {error.strerror}")

    def adopt_tag(self, fd: int, sealed: list[str], before: str, tag: str) -> bytes:
        """The client ends listening, begins it, or both: the slot's new text. b"": only a worker
        can say."""
        try:
            text = slot_text(*sealed, tag)
        except ValueError:
            return b""
        if tag and not before:
            return text if self.listen(fd, State.decode(sealed[0])) else b""
        if not tag:
            self.unlisten(fd)
        return text

    def say(self, fd: int, data: bytes) -> bool:
        """Whole, or it ends the session: a sleeper has no output buffer."""
        with contextlib.suppress(OSError):
            if os.write(fd, data) == len(data):
                self.slots[fd].sent += len(data)
                return True
        self.over(fd, "client does not read")
        return False

    def stirred(self, fd: int) -> None:
        if self.state[fd] == OFFERED:
            self.unlisten(fd)  # for arm() to find
        elif self.state[fd] == HELD and fd not in self.waking:
            state = self.known(fd)
            paths = directories(self.role.session, state.home, state.watch)
            if changed_since(paths, state.watch[1:], 0):
                self.wake(fd, "mail")

    def take_turns(self) -> None:
        """Once a second, for those whose second it is. Each sleeper is in one list; one that has
        left stays there until then, and its slot shows it."""
        self.loop.later(1.0, self.take_turns)
        now = int(time.monotonic())
        for second in range(max(self.turned, now - self.period) + 1, now + 1):
            at = second % self.period
            for fd in set(self.turns.pop(at, ())):
                if self.state[fd] == HELD and self.slots[fd].beat == at:
                    self.turns[at].append(fd)
                    self.loop.guarded(fd, self.take_turn, fd)
        self.turned = now
        if now - self.slots[0].rest > 5 * SWEEP_TIME:  # stopped
            self.end_twin()
        self.spawn_twin()

    def take_turn(self, fd: int) -> None:
        if fd in self.waking:
            return
        tag = self.tag(fd)
        if tag and self.config.idle_notify_interval:
            self.say(fd, self.role.session.still_here)
        elif not tag and time.monotonic() - self.slots[fd].rest > REST_TIME:
            self.end(fd, "Autologout; idle for too long")

    # Leaving

    def wake(self, fd: int, cause: str) -> None:
        self.counts[f"woken by {cause}"] += 1
        self.depart(fd, cause, self.role.wakes, MOVE_TIME if cause == "input" else MAIL_TIME)

    def move_on(self, fd: int) -> None:
        if fd not in self.waking:
            self.depart(fd, "drain", self.role.name, self.config.orphan_timeout / 2)

    def depart(self, fd: int, cause: str, service: str, patience: float) -> None:
        self.unwatch(fd)
        self.waking[fd] = cause
        self.mover(service).give(fd, patience)

    def parcel(self, fd: int) -> bytes | None:
        """Look whether the client is still there: nobody watches the descriptor meanwhile."""
        poll = select.poll()
        poll.register(fd, select.POLLIN | getattr(select, "POLLRDHUP", 0))
        events = dict(poll.poll(0)).get(fd, 0)
        unread = False
        if events:
            with Borrowed(fd) as sock, contextlib.suppress(OSError):
                unread = bool(sock.recv(1, socket.MSG_PEEK))
        # A half-close behind input is not the end yet; a reset is.
        if events and not unread or events & (select.POLLERR | select.POLLHUP):
            self.over(fd, "client closed the connection")
            return None
        if unread and self.waking[fd] == "mail":
            self.waking[fd] = "input"  # now somebody waits: should this try fail, sooner
            self.mover(self.role.wakes).hurry(fd, MOVE_TIME)
        slot = self.slots[fd]
        state, mark, tag = self.lines(fd)
        return Record(tag, slot.received, slot.sent, "", "", state, mark).encode()

    def leaving(self, fd: int) -> None:
        self.state[fd] = GONE

    def stays(self, fd: int) -> None:
        self.state[fd] = HELD
        self.copy(fd)  # the twin may have let it go

    def given(self, fd: int) -> None:
        self.forget(fd)
        os.close(fd)
        self.update()

    def forget(self, fd: int) -> None:
        self.unlisten(fd)
        self.unwatch(fd)
        self.keep(fd)
        self.state[fd] = FREE
        self.waking.pop(fd, None)
        self.held -= 1

    def kept(self, fd: int, reason: str) -> None:
        """No worker took it in time, or one refused it for good: it can't go on."""
        if self.waking[fd] == "drain":  # the next generation has not the room for all to sleep
            self.depart(fd, "room", self.role.wakes, self.config.orphan_timeout / 2)
            return
        if self.parcel(fd):  # else it was refused since its client had left
            log.error("a sleeper could not be moved: %r", reason)
            self.end(fd, "Server is too busy, please log in again")

    def end(self, fd: int, reason: str) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, self.role.session.farewell(reason))
        self.over(fd, reason)

    def over(self, fd: int, reason: str) -> None:
        self.forget(fd)
        end_socket(socket.socket(fileno=fd))
        slot = self.slots[fd]
        self.ended(self.known(fd), reason, slot.received, slot.sent)

    def failed(self, fd: int) -> None:
        if 0 <= fd < len(self.slots) and self.state[fd] == HELD:
            self.end(fd, "Internal error")

    def states(self) -> Iterator[tuple[int, State]]:
        for fd, state in enumerate(self.slot_states()):
            if state == HELD == self.state[fd]:  # still
                yield fd, self.known(fd)

    # The twin: a process with a copy of every descriptor, under the same number, and the slots in
    # shared memory. When the keeper is killed, it goes on. Seeding is the fork itself; after it,
    # one message for each arrival, none for a change or an end.

    def spawn_twin(self) -> None:
        if not self.config.hibernate_twin or self.draining or self.twin:
            return
        try:
            process, ours, _ = fork(self.role.name, self.guard)
        except OSError as error:
            log.error("no twin: %s", error.strerror)
        else:
            self.twin = process, Channel(self.loop, ours, lambda *_: self.end_twin())
            ours.settimeout(TWIN_TIME)
            self.slots[0].rest = int(time.monotonic())  # the twin's last sweep

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
        of its queue before it sees the end. For one that is behind it waits, as a new one would
        cost more; one that does not read is replaced."""
        self.tell_twin(compact(fds).encode(), *fds)

    def tell_twin(self, message: bytes, *fds: int) -> None:
        if self.twin:
            try:
                self.twin[1].send(message, *fds)
            except OSError:
                self.end_twin()
                self.spawn_twin()  # its seed is the fork: it has all of them

    def guard(self, ours: socket.socket, theirs: socket.socket) -> None:
        """The twin. Each number that it uses itself is in use in the keeper, too, so that no
        session can have it: hence no selector, and the channel under the keeper's number."""
        # No destructor may close a number that is another's by then.
        past = self.loop, self.movers, self.arrivals, self.clients, self.beds
        os.dup2(theirs.fileno(), ours.fileno(), inheritable=False)
        theirs.close()
        self.loop.close()
        for handler in (*log.handlers, *logging.root.handlers):
            if isinstance(handler, logging.FileHandler) and (stream := handler.stream):
                # The keeper may give this number to a session, once the file was rotated.
                number = fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, len(self.slots))
                handler.setStream(open(number, "a", encoding=handler.encoding))
                stream.close()
        kept = {0, 1, 2, ours.fileno(), self.channel.fileno(), self.inbox.fileno()}
        copies = bytearray(self.slot_states().translate(IS_LIVING))
        copies += bytes(len(self.slots) - len(copies))
        for fd in range(len(copies)):
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
            for number in json.loads(message):
                copies[number] = 1
                fd = fds.pop(0)
                if number in fds:  # in the way of its neighbour
                    fds[fds.index(number)] = os.dup(number)
                if fd != number:
                    os.dup2(fd, number, inheritable=False)
                    os.close(fd)
        self.survive(ours, copies)
        del past

    def sweep(self, copies: bytearray) -> None:
        """Close what is not, or no longer, in the slots."""
        self.slots[0].rest = int(time.monotonic())
        living = self.slot_states().translate(IS_LIVING)
        if living != copies[: len(living)]:  # while all sleep they are the same
            for fd in [fd for fd, lives in enumerate(living) if copies[fd] > lives]:
                copies[fd] = 0
                with contextlib.suppress(OSError):  # one that came and went during the fork
                    os.close(fd)
        name = f"{self.config.program.name}/{self.role.name}-twin"
        self.title.set(f"{name} [{copies.count(1)} copies]")

    def survive(self, ours: socket.socket, copies: bytearray) -> None:
        """The keeper is dead."""
        self.sweep(copies)
        for fd, slot in enumerate(self.slots[: self.top]):
            slot.watches[:] = 0, 0
            if not copies[fd]:
                self.state[fd] = FREE
        self.held = self.slot_states().count(HELD)
        log.error("the keeper was killed; its twin goes on with %d sessions", self.held)
        self.counts.clear()
        # If the master was gone already, this end of a pair tells it as well.
        self.run(ours if self.channel.fileno() < 0 else self.channel)

    def resume(self) -> None:
        """Go on with what a killed keeper has left in the slots, if this is its survivor. An
        OFFERED session is its sender's until the "!" has come: it may wait unread in the channel,
        of which there is a copy, too."""
        slots: dict[int, list[int]] = {state: [] for state in (FREE, *LIVING)}
        for fd, state in enumerate(self.slot_states()):
            slots[state].append(fd)
        for fd in slots[HELD] + slots[OFFERED]:
            self.make_bed(fd)
        for fd in slots[HELD]:  # who speaks is answered at once; to arm 10,000 takes a second
            self.tend(fd)
        for number in slots[CHANNEL]:
            fd = int(self.slots[number].text)
            if self.state[fd] == OFFERED:
                self.expect(socket.socket(fileno=number), (fd, self.known(fd), number))
            else:  # the "!" was read, or the offer had come to nothing
                slots[COPIED].append(number)
        for fd in slots[COPIED]:
            self.state[fd] = FREE
            os.close(fd)
        self.arm_all(slots[HELD])

    def arm_all(self, fds: list[int]) -> None:
        for fd in fds[:ARMED]:
            if self.state[fd] == HELD and fd not in self.waking:
                self.arm(fd, self.known(fd))
        if len(fds) > ARMED:
            self.loop.later(0, partial(self.arm_all, fds[ARMED:]))
        else:  # to fork with 10,000 descriptors takes long: only now
            self.spawn_twin()


# ------------------------------------------------------------------------------------------------
# 7  Master
#
# Opens the listeners, forks, reaps, throttles. It never reads a client's bytes and never holds a
# client's descriptor. While a service has a process with room it does not listen for it; when none
# has, it does, and forks upon a connection: balance() alone decides that. What depends on time is
# seen to once a second, by tick(). A reload is an exec: the children see their channel end, as if
# the master had been killed, and hand over to what comes. Here the engine ends.
# ------------------------------------------------------------------------------------------------

BIND_TIME = 5.0  # seconds in which a predecessor may give up its port or its lock
CHECK_TIME = 10.0  # seconds for new code to read its configuration
STOP_TIME = 5  # seconds for the farewells of a stop
INHERIT = "HIBERNATE_INHERIT"  # environment: {what: descriptors} that an exec keeps


class Child(Channel):
    """A process as the master knows it, and the way to it."""

    slot: int
    process: Any  # of a keeper that was killed, if its survivor is at the other end now
    room: int  # until its first report: what it will have
    pipes: set[int]  # which multiprocessing keeps for it, and which its siblings inherit
    clients = 0
    reported = False


@dataclass(eq=False)
class Pool:
    """The processes of one service, and what they listen on."""

    role: Role
    settings: Section
    inbox: socket.socket
    listeners: list[list[socket.socket]]
    children: list[Child] = field(default_factory=list)
    delay: int = 0  # seconds, of the last throttle
    rests: float = 0  # throttled, or all are full: for so many ticks neither fork nor listen
    full: int = 0  # for how many seconds connections have found all full
    idle_low: int = 0  # fewest idle processes seen in this idle_kill interval

    def sockets(self) -> list[socket.socket]:
        return [self.inbox, *itertools.chain(*self.listeners)]

    def free(self) -> int:
        """How many processes have room."""
        return sum(child.room > 0 for child in self.children)

    def idle(self) -> list[Child]:
        return [child for child in self.children if child.reported and not child.clients]

    def tell(self, word: str, *fds: int) -> None:
        for child in self.children:
            child.tell(word, *fds)


class Master:
    """Runs a program's services until it is told to stop."""

    def __init__(self, config: Config, ready: Callable[[Master], None] | None) -> None:
        """`ready` is called once, when all listen and every reserve has reported; after a reload
        only if it has not been called before."""
        self.config, self.loop = config, Loop()
        inherited: dict[str, list[int]] = json.loads(os.environ.pop(INHERIT, "{}"))
        self.ready = ready if not inherited or "unready" in inherited else None
        self.settled = False  # every reserve has reported
        for fd in itertools.chain(*inherited.values()):
            os.set_inheritable(fd, False)  # or it would survive the next exec, unknown to all
        [self.lock] = inherited.pop("lock", [-1])
        self.groups = {  # see open_listeners()
            key: [socket.socket(fileno=fd) for fd in fds] for key, fds in inherited.items()
        }
        if "master" in self.groups:  # the inbox of commands: who asks waits over an exec
            [self.control] = self.groups.pop("master")
        self.pools: list[Pool] = []
        users = {service.user for service in config.sections.values()} - {""}
        self.peers = {os.getuid(), *(pwd.getpwnam(user).pw_uid for user in users)}
        self.ticks = 0
        self.stopping = 0  # the tick after which all are killed
        self.deserted = -math.inf  # ticks without a client, once the ports are released
        self.prepare_directory()

    # From start to ready

    def run(self) -> None:
        # All of them before any fork: a process inherits its service's whole group.
        self.groups = self.open_listeners(self.config)
        for role in self.config.program.roles:
            groups = [group for key, group in self.groups.items() if key.split("/")[0] == role.name]
            settings, inbox = self.config.sections[role.name], self.open_inbox(role.name)
            self.pools.append(Pool(role, settings, inbox, groups))
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
        self.tick()
        self.loop.run()

    def prepare_directory(self) -> None:
        """base_dir and its key, which is its lock, too: by lockf, as a fork does not inherit that
        and an exec keeps it. Nobody in this process may open and close the key meanwhile."""
        base = self.config.base_dir
        os.makedirs(base, exist_ok=True)
        os.chmod(base, 0o711 if len(self.peers) > 1 else 0o700)
        path = os.path.join(base, "key")
        if self.lock < 0 or not (os.path.exists(path) and os.path.samefile(path, self.lock)):
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self.persist(lambda: fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB), base)
            control = self.open_inbox("master")
            if self.lock >= 0:  # it was removed, or replaced, while we run: the sessions' key stays
                os.pwrite(lock, os.pread(self.lock, 32, 0), 0)
                os.close(self.lock)
                self.loop.unwatch(self.control.fileno())
            self.lock, self.control = lock, control
        if os.fstat(self.lock).st_size < 32:
            os.pwrite(self.lock, secrets.token_bytes(32), 0)
        self.loop.watch(self.control.fileno(), READ, self.accept_control)

    def open_listeners(self, config: Config) -> dict[str, list[socket.socket]]:
        """For each listener of `config` one socket, or one SO_REUSEPORT socket a slot: those that
        are open, and new ones. One that is in no such table any more is closed by its last
        reference: in the master over an exec, in a process when it has accepted what waits."""
        groups = {}
        for service, settings in config.sections.items():
            for name, row in settings.sections.items():
                address, port, shared = row.address, row.port, row.reuse_port
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                make = partial(socket.create_server, family=family, backlog=4096, reuse_port=shared)
                wanted = settings.process_limit if shared else 1
                key = f"{service}/{name} {address} {port}"
                groups[key] = group = self.groups.get(key, [])[:wanted]
                while len(group) < wanted:
                    for sock in group:  # two on one port need the option both
                        port = sock.getsockname()[1]
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    bind = partial(make, (address, port))
                    group.append(self.persist(bind, f"{address}:{port}"))
                    group[-1].setblocking(False)
        return groups

    def persist(self, attempt: Callable[[], Any], what: str) -> Any:
        """Try for some seconds, which only a master that serves nobody yet has; then Failure."""
        end = time.monotonic() + (0 if self.pools else BIND_TIME)
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
        least, most = pool.settings.process_min_avail, pool.settings.process_limit
        while pool.free() < least and len(pool.children) < most and not pool.rests:
            self.spawn(pool)
        free = pool.free()
        pool.full = 0 if free else pool.full
        pool.idle_low = min(pool.idle_low, len(pool.idle()))
        for sock in pool.sockets():
            events = READ * (not free and not pool.rests)
            self.loop.watch(sock.fileno(), events, lambda *_: self.called(pool))

    def called(self, pool: Pool) -> None:
        """A connection waits, and no process has room."""
        if len(pool.children) < pool.settings.process_limit:
            self.spawn(pool)
        else:
            text = "service %s: all are full, process_limit (%d) is reached: connections wait"
            log.warning(text, pool.role.name, pool.settings.process_limit)
            pool.tell(f"full {pool.full}")
            pool.full += 1
            pool.rests = 1
        self.balance(pool)

    def spawn(self, pool: Pool) -> None:
        slot = min({*range(len(pool.children) + 1)} - {child.slot for child in pool.children})
        try:
            process, ours, pipes = fork(pool.role.name, partial(self.child_main, pool, slot))
        except OSError as error:
            log.error("service %s: fork: %s", pool.role.name, error.strerror)
            return self.throttle(pool)
        child = Child(self.loop, ours, partial(self.heard, pool))
        child.slot, child.process, child.pipes = slot, process, pipes
        child.room = pool.settings.client_limit
        pool.children.append(child)

    def throttle(self, pool: Pool) -> None:
        """A process has died before it reported: no new one for a while."""
        pool.delay = min(max(pool.delay * 2, THROTTLE[0]), THROTTLE[1])
        pool.rests = pool.delay + 1  # the first tick may come at once
        log.error("service %s: no new process for %d s", pool.role.name, pool.delay)

    def child_main(self, pool: Pool, slot: int, ours: socket.socket, theirs: socket.socket) -> None:
        """The new process: put in order what the fork has copied, then be a service."""
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole process group
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, a twin could not be waited for
        # With a copy of a channel, to a sibling or to who asks, its peer would not see its end.
        known = [getattr(key.data, "__self__", None) for key in self.loop.keys.values()]
        channels = [one.sock for one in known if isinstance(one, Channel)]
        others = [sock for other in self.pools if other is not pool for sock in other.sockets()]
        for sock in (ours, self.control, *channels, *others):
            sock.close()
        self.loop.close()  # an epoll object is shared over fork: not even unregister in it
        os.close(self.lock)
        for other in self.pools:
            for sibling in other.children:
                close_all(sibling.pipes)
        (Keeper if pool.role.wakes else Service)(self, pool, slot).run(theirs)

    def heard(self, pool: Pool, child: Child, message: bytes, fds: list[int]) -> None:
        """A report. It can't be a stale one: each process has a channel of its own."""
        close_all(fds)
        try:
            child.room, child.clients = checked(message.decode(), (int, int))
        except ValueError:  # the end; or nonsense, of one that has been taken over
            if message:
                child.process.kill()
            return self.bury(pool, child)
        if self.stopping:  # a survivor knows nothing of earlier words
            child.tell("stop")
        child.reported, pool.delay = True, 0
        self.balance(pool)
        self.settle()

    def settle(self) -> None:
        """Tell who has started us, once, that every reserve has reported."""
        if not self.settled and all(
            sum(child.reported for child in pool.children) >= pool.settings.process_min_avail
            for pool in self.pools
        ):
            self.settled = True
            notify("READY=1")
            ready, self.ready = self.ready, None
            if ready:
                ready(self)

    def bury(self, pool: Pool, child: Child) -> None:
        """Neither the process nor a survivor is left."""
        child.close()
        pool.children.remove(child)
        child.process.join(1.0)
        if status := child.process.exitcode:
            how = f"status {status}"  # below 0: a signal; not each has a name
            with contextlib.suppress(ValueError):
                how = signal.Signals(-status).name
            log.error("service %s: process %d ended: %s", pool.role.name, child.process.pid, how)
        if not child.reported and not self.stopping:
            self.throttle(pool)
        self.balance(pool)

    def reap(self) -> None:
        """Collect the dead, whoever they were: ours, those of the last generation, survivors."""
        try:
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                multiprocessing.active_children()  # reaps its own, and keeps their status
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(dead.si_pid, os.WNOHANG)
        except ChildProcessError:  # nobody is left
            self.loop.running = not self.stopping

    def tick(self) -> None:
        """Once a second. It counts its own turns: a clock would go on while this process, or the
        machine, is stopped."""
        self.loop.later(1.0, self.tick)
        self.ticks += 1
        for pool in self.pools:
            if self.ticks % max(1, round(pool.settings.idle_kill or 60)) == 0:
                # As many as were idle all the time, above the reserve, end.
                surplus = max(0, pool.idle_low - pool.settings.process_min_avail)
                for child in pool.idle()[:surplus]:
                    child.tell("end-if-idle")
                pool.idle_low = len(pool.idle())
            pool.rests = max(0, pool.rests - 1)
            self.balance(pool)
        self.settle()  # without any reserve nobody reports
        # Three looks in a row: reports are up to a second old, and a session may be on its way.
        busy = any(child.clients for pool in self.pools for child in pool.children)
        self.deserted = min(self.deserted, 0) if busy else self.deserted + 1
        if self.deserted >= 3:
            self.stop()
        if self.stopping and self.ticks > self.stopping:
            self.kill(signal.SIGKILL)

    # What it is told

    def accept_control(self, fd: int, mask: int) -> None:
        try:
            Channel(self.loop, self.control.accept()[0], self.command, SPEAK_TIME)
        except OSError as error:
            log.error("control: %s", error.strerror)
            self.loop.unwatch(fd)
            self.loop.later(1.0, lambda: self.loop.watch(fd, READ, self.accept_control))

    def command(self, channel: Channel, message: bytes, fds: list[int]) -> None:
        close_all(fds)
        channel.expire(0)
        line = message.decode("utf-8", "replace")
        name = line.partition(" ")[0]
        if name == "stop":
            return self.stop()  # the channel's end will tell that it is done
        if name == "reload":
            self.reload(channel.tell)  # comes back only if it is refused
        for pool in self.pools if name in ("who", "status", "kick") else ():
            if name == "status" and pool.delay:
                channel.tell(compact({"service": pool.role.name, "delay": pool.delay}) + "\n")
            pool.tell(line, channel.sock.fileno())
        channel.close()

    def stop(self) -> None:
        """Now, with a farewell to every client."""
        if not self.stopping:
            self.stopping = self.ticks + STOP_TIME
            log.info("stopping")
            notify("STOPPING=1")
            for pool in self.pools:
                pool.rests = math.inf
                self.balance(pool)  # which no longer listens
                pool.tell("stop")
            self.kill(signal.SIGTERM)
            self.reap()

    def kill(self, number: int) -> None:
        """All children: the last generation's and survivors, too. The kernel keeps the list."""
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in file.read().split():
                os.kill(int(pid), number)

    def quit(self) -> None:
        """Release the ports now; serve who is connected until they have left."""
        log.info("the ports are released; sessions go on")
        for pool in self.pools:
            pool.tell("close")
            for sock in itertools.chain(*pool.listeners):
                self.loop.unwatch(sock.fileno())
                sock.close()
            pool.listeners = []
        self.groups, self.deserted = {}, 0

    def reload(self, tell: Callable[[str], None] = lambda word: None) -> None:
        """Become the new code and the new settings: same pid, same ports, same children. As long
        as there is a way back a new process checks file and code, what is added is bound, and
        what else the next generation has to open is tried."""
        if self.stopping:
            return
        # From here on signals wait for who comes out of it: unblocked, a second SIGHUP in the
        # 40 ms of the exec killed it. Those that have rung, but were not heard, do it once more.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.loop.bell[0], 4096):
                os.kill(os.getpid(), number)
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        command = [sys.executable, *sys.orig_argv[1:]]
        try:
            check = subprocess.run([*command, "--check"], capture_output=True, timeout=CHECK_TIME,
                                   env={**os.environ, CHECKING: "1"})
            # Of a file that was copied to a full disk nothing may be left, not even a mistake.
            if check.returncode or CHECKING.encode() not in check.stdout:
                text = check.stderr[:4000].decode("utf-8", "replace").strip()
                raise Failure(78, text or f"the check failed, status {check.returncode}")
            config = Config(self.config.program, self.config.path, self.config.usual)
            if config.base_dir != self.config.base_dir:
                config.fail(config.lines["base_dir"], "base_dir can't change: sessions live in it")
            self.prepare_directory()
            self.open_inbox("trial").close()
            os.unlink(self.config.inbox("trial"))
            if config.log_path:
                open(config.log_path, "ab").close()
            groups = self.open_listeners(config)
            fds = {key: [sock.fileno() for sock in group] for key, group in groups.items()}
            fds |= {"lock": [self.lock], "master": [self.control.fileno()]}
            fds |= {"unready": []} if self.ready else {}
            for fd in itertools.chain(*fds.values()):
                os.set_inheritable(fd, True)
            os.environ[INHERIT] = json.dumps(fds)
            log.info("reloading")
            tell("reloading")
            os.execv(command[0], command)
        except (Failure, OSError, subprocess.TimeoutExpired) as error:
            log.error("refused: %s", error)
            tell(f"refused: {error}")
        finally:
            if self.settled:
                notify("READY=1")
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def notify(text: str) -> None:
    """Tell systemd, if it has started us: sd_notify(3). "@" begins an abstract name, unix(7)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.0)  # it may be stuck, and must not hold up a stop
            sock.sendto(text.encode(), re.sub("^@", "\0", path))


# ------------------------------------------------------------------------------------------------
# 8  Maildir and index
#
# Messages and their flags are the files of a Maildir, so that any delivery agent fills it and any
# other reader shares it. What files can't say (UIDs, keywords, MODSEQs, what was expunged) is in
# one SQLite file per user, which may be deleted at any time: it costs new UIDVALIDITYs and the
# keywords, no mail.
#
# Each transaction has a stamp: the time in seconds, or one more than the last. UIDVALIDITYs and
# MODSEQs are stamps, so that they only grow. The last one is also the time of `hibernate.uids`: an
# index that is behind it is from a backup, and gets new UIDVALIDITYs, for its UIDs are used up.
#
# The directories' times are the change notice: whoever commits what others must hear of changes
# new/ or cur/ in the same transaction, so a session that finds the times it knows has missed
# nothing and opens no database. Rows are compared with a folder, and files renamed, only while the
# index is locked; nothing in here may yield to the engine with that lock held.
#
# Delivered files stay in new/ until a flag is set: moving them to cur/ at SELECT, as others do,
# stirs all sleepers again, to tell them nothing. Symbolic links are followed: none is made here.
# ------------------------------------------------------------------------------------------------

INDEX_VERSION = 0x48420006  # as application_id; any other file in its place is put aside
INDEXES_OPEN = 8  # connections a worker keeps, at about 105 KB and a descriptor each
INDEX_PATIENCE = 0.2  # seconds to wait for another process's transaction, then NO [INUSE]
INDEX_POLL = 0.0002  # seconds between two attempts
EXPUNGED_KEPT = 7 * 86400  # in stamps: about as many seconds; no session is that far behind
KEYWORD_LIMIT = 500  # keywords of one mailbox
TICK = 500_000  # ns: less than any clock's for files that isn't exact
NO_LINK = errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP  # link(2): then copy it
NAMES_CHANGED = 0x40 | 0x80 | 0x100 | 0x200  # MOVED_FROM, MOVED_TO, CREATE, DELETE of inotify(7)
UNSETTLED = (-1, -1)  # in place of times: look again, the folder is changing right now
LEVEL = "(?:[ -%'-\\-0-~]|&[A-Za-z0-9+,]*-)+"  # printable, modified UTF-7 (RFC 3501 5.1.3)
NAME = re.compile(rf"(?=.{{1,240}}\Z){LEVEL}(?:\.{LEVEL})*")  # NAME_MAX is 255
LETTERS = {"\\Answered": "R", "\\Flagged": "F", "\\Deleted": "T", "\\Seen": "S", "\\Draft": "D"}
COMBINE: dict[str, Callable[[set[str], set[str]], set[str]]] = {  # STORE FLAGS, +FLAGS, -FLAGS
    "": lambda old, new: new, "+": set.union, "-": set.difference}

# Not in WAL mode: most connections are opened for one look, which costs double there, and its two
# more files would have to be restored and deleted together with this one.
SCHEMA = f"""
BEGIN;
CREATE TABLE last AS SELECT %d AS stamp;
CREATE TABLE mailbox (id INTEGER PRIMARY KEY AUTOINCREMENT, name UNIQUE, uidvalidity, modseq,
    uidnext DEFAULT 1, recent DEFAULT 1, keywords DEFAULT '', new DEFAULT -1, cur DEFAULT -1);
INSERT INTO mailbox (name, uidvalidity, modseq) SELECT 'INBOX', stamp, stamp FROM last;
CREATE TABLE message (box, uid, file, flags, keywords, modseq, PRIMARY KEY (box, uid))
    WITHOUT ROWID;
CREATE TABLE parsed (box, uid, item, value, PRIMARY KEY (box, uid, item)) WITHOUT ROWID;
CREATE TABLE expunged (box, modseq, uid, PRIMARY KEY (box, modseq, uid)) WITHOUT ROWID;
CREATE TRIGGER written BEFORE INSERT ON message BEGIN
    UPDATE mailbox SET modseq = new.modseq, uidnext = max(uidnext, new.uid + 1)
        WHERE id = new.box; END;
CREATE TRIGGER gone AFTER DELETE ON message BEGIN
    DELETE FROM parsed WHERE box = old.box AND uid = old.uid;
    UPDATE mailbox SET modseq = (SELECT stamp FROM last) WHERE id = old.box;
    INSERT INTO expunged SELECT id, modseq, old.uid FROM mailbox WHERE id = old.box;
    DELETE FROM expunged WHERE box = old.box
        AND modseq < (SELECT stamp FROM last) - {EXPUNGED_KEPT}; END;
CREATE TRIGGER erased AFTER DELETE ON mailbox BEGIN
    DELETE FROM message WHERE box = old.id; DELETE FROM expunged WHERE box = old.id; END;
PRAGMA application_id = {INDEX_VERSION};
COMMIT;
"""
CHOSEN = "FROM message WHERE box = ? AND uid IN (SELECT value FROM json_each(?))"
# A new row, or a change to one. Moved to cur/ without another flag it is no news for clients.
PUT = """
INSERT INTO message VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    modseq = iif((flags, keywords) = (excluded.flags, excluded.keywords), modseq, excluded.modseq),
    file = excluded.file, flags = excluded.flags, keywords = excluded.keywords
"""

Pairs = list[tuple[int, int]]  # UIDs: in the source, in the target
Parsed = dict[tuple[int, bytes], bytes]  # by UID and item of FETCH


class MailError(Exception):
    """What was asked for can't be done: response code and text of the NO."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Vanished(MailError):
    """A message that the session still knows is no longer in the Maildir."""


class Deleted(MailError):
    """The mailbox, or the index that knew it: all that a session knows of it means nothing now."""


class Mailbox(NamedTuple):
    """A row of the index; `new` and `cur` are the times of the folder it agrees with."""

    id: int
    name: str
    uidvalidity: int
    modseq: int
    uidnext: int
    recent: int  # nobody has been told of this UID and those above
    keywords: str
    new: int
    cur: int


class MessageRow(NamedTuple):
    box: int
    uid: int
    file: bytes  # below the folder: b"new/…" or b"cur/…:2,FS"
    flags: str  # the letters of the file's name that IMAP knows
    keywords: str
    modseq: int


def unique_name() -> bytes:
    name = f"{time.time():.6f}P{os.getpid()}R{secrets.token_hex(4)}.hibernate"
    return name.replace(".", ".M", 1).encode()


def base_of(file: bytes) -> bytes:
    """What stays the same when flags change: the name without folder and flags."""
    return file[4:].partition(b":")[0]


def folder_times(folder: bytes) -> tuple[int, int]:
    """st_mtime_ns of new/ and cur/, or what no folder and no row has."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(folder + b"/new").st_mtime_ns, os.stat(folder + b"/cur").st_mtime_ns
    return -2, -2


TOLD_APART: dict[int, bool] = {}  # by device


def told_apart(tmp: bytes) -> bool:
    """Do two changes of a directory always leave two times, if somebody has looked in between?
    Linux 6.13 and newer see to it on ext4, XFS and Btrfs (on tmpfs an unlink may not); else a
    clock has to tick."""
    start = os.stat(tmp)
    if start.st_dev not in TOLD_APART:
        path, times = tmp + b"/" + unique_name(), [start.st_mtime_ns]
        with contextlib.suppress(OSError):
            for _ in range(3):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
                times.append(os.stat(tmp).st_mtime_ns)
                os.unlink(path)
                times.append(os.stat(tmp).st_mtime_ns)
            gaps = [after - before for before, after in itertools.pairwise(times)]
            TOLD_APART[start.st_dev] = 0 < min(gaps) < TICK
    return TOLD_APART.get(start.st_dev, False)


def listing(folder: bytes, subs: Sequence[bytes] = (b"new/", b"cur/")) -> dict[bytes, bytes]:
    """All messages: base name to file. new/ comes first: what moves to cur/ in between is seen."""
    names = [sub + file.name for sub in subs for file in os.scandir(folder + b"/" + sub)
             if file.is_file(follow_symlinks=False) or os.path.isfile(file)]
    return {base_of(name): name for name in names if not name.startswith(b".", 4)}


def reflag(how: str, flags: str, path: bytes) -> bytes:
    """Rename for new flags; letters that IMAP doesn't know stay (Dovecot's keywords, mutt's P)."""
    folder, _, name = path.decode("latin-1").rsplit("/", 2)
    base, _, info = name.partition(":")
    foreign = {*info.removeprefix("2,")} - {*LETTERS.values()}
    letters = COMBINE[how]({*info.removeprefix("2,")}, {*flags}) | foreign
    file = f"cur/{base}:2,{''.join(sorted(letters))}".encode("latin-1")
    os.rename(path, folder.encode("latin-1") + b"/" + file)
    return file


def mend(folder: bytes) -> None:
    """Make what a Maildir needs and doesn't have; FileNotFoundError if nothing of it is there."""
    for sub in (b"/tmp", b"/new", b"/cur"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder + sub, 0o700)


class Delivery:
    """A message on its way into a folder: write() it to tmp/, then finish() and keep(), after
    which it is on disk under its final name; then close(). Lines end in LF, as mutt expects."""

    def __init__(self, folder: bytes) -> None:
        self.folder, self.name = folder, unique_name()
        self.path = folder + b"/tmp/" + self.name
        self.file = open(self.path, "xb")
        self.held = b""  # a CR at the end of a chunk, until we see what follows

    def write(self, data: bytes) -> None:
        text = (self.held + data).replace(b"\r\n", b"\n")
        self.held = b"\r" if text.endswith(b"\r") else b""
        self.file.write(text.removesuffix(b"\r"))

    def finish(self, when: float | None = None) -> None:
        """The slow half, for those who then lock the index."""
        with self.file:
            self.file.write(self.held)
            self.file.flush()
            os.utime(self.path, None if when is None else (when, when))
            os.fsync(self.file.fileno())

    def keep(self, flags: str = "") -> bytes:
        file = b"cur/" + self.name + b":2," + flags.encode() if flags else b"new/" + self.name
        os.rename(self.path, self.folder + b"/" + file)
        sync_directory(self.folder + b"/" + file[:3])
        return file

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: close() tries to write what is left
            self.file.close()
        with contextlib.suppress(OSError):  # scan() removes what can't be removed now
            os.unlink(self.path)


def sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def deliver(home: str, source: BinaryIO) -> None:
    """Put a message into the INBOX, as a delivery agent does; OSError if that can't be done."""
    os.makedirs(home, 0o700, exist_ok=True)
    mend(os.fsencode(home))
    with contextlib.closing(Delivery(os.fsencode(home))) as delivery:
        shutil.copyfileobj(source, delivery)
        delivery.finish()
        delivery.keep()


class Connection(sqlite3.Connection):
    """A patient one: while another process has the index, it asks again soon. SQLite's own waits
    are 1, 2, 5 … 100 ms, but most transactions take less than one."""

    def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
        end = time.monotonic() + INDEX_PATIENCE
        while True:
            try:
                return super().execute(sql, values)
            except sqlite3.OperationalError as error:
                busy = getattr(error, "sqlite_errorcode", 0) & 255 == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > end:
                    raise
            time.sleep(INDEX_POLL)


class Index:
    """The SQLite file of one user, and all that is done to folders under its lock. Get one by
    at() where it is needed and keep it over no yield: meanwhile the file may be another."""

    @staticmethod
    def at(home: str) -> Index:
        """The user's index, opened anew if its file was deleted, emptied or replaced."""
        for _ in range(5):
            with contextlib.suppress(FileNotFoundError):
                file = os.stat(f"{home}/hibernate.sqlite3")
                if file.st_size:
                    return open_index(home, file.st_ino)
            Index.make(home)
        raise OSError(f"{home}/hibernate.sqlite3 is nothing that can be filled")

    def __init__(self, home: str, inode: int) -> None:
        """FileNotFoundError: make() it. By the `inode` open_index() tells it from others."""
        self.home, self.mark = os.fsencode(home), f"{home}/hibernate.uids"
        path = f"{home}/hibernate.sqlite3"
        self.db = sqlite3.connect(path, timeout=0, isolation_level=None, factory=Connection)
        self.db.execute("PRAGMA cache_size = -64")
        self.db.execute("PRAGMA synchronous = FULL")
        # That its journal is removed is only on disk later: a power cut could take back UIDs that
        # clients were told. That it is empty is synced, and costs less.
        self.db.execute("PRAGMA journal_mode = TRUNCATE")
        mark = int(os.stat(self.mark).st_mtime)  # before the stamp, which others move on
        if self.number("PRAGMA application_id") != INDEX_VERSION:
            raise FileNotFoundError
        if mark > self.number("SELECT stamp FROM last"):
            last = self.number("SELECT ifnull(max(id), 0) FROM mailbox")
            with self.transaction(mark + last + 1):
                # No two the same: RENAME. Who came first has seen to it, perhaps.
                query = "UPDATE mailbox SET uidvalidity = ? - id WHERE uidvalidity <= ?"
                if self.db.execute(query, (self.stamp, mark)).rowcount:
                    log.warning("%s: the index is from a backup, new UIDVALIDITYs", home)

    @staticmethod
    def make(home: str) -> None:
        """What is missing of an index; one that isn't ours is put aside. By one process at a
        time, and another may have been faster."""
        os.makedirs(home, 0o700, exist_ok=True)
        mend(os.fsencode(home))
        with open(f"{home}/hibernate.uids", "a") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)
            path = f"{home}/hibernate.sqlite3"
            with contextlib.closing(sqlite3.connect(path, timeout=INDEX_PATIENCE)) as db:
                if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    # It need not be on disk before there are UIDs: these wait for all of it.
                    db.execute("PRAGMA synchronous = OFF")
                    stamp = max(int(os.fstat(mark.fileno()).st_mtime) + 1, int(time.time()))
                    db.executescript(SCHEMA % stamp)
                elif db.execute("PRAGMA application_id").fetchone() != (INDEX_VERSION,):
                    Index.put_aside(home, "not our index, or of another version")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never opened
            self.db.close()  # a Connection and its cache of statements keep each other

    @staticmethod
    def put_aside(home: str, reason: object) -> None:
        """Out of the way, but there for whoever wants to look. It costs new UIDVALIDITYs."""
        log.warning("%s/hibernate.sqlite3: %s, put aside as .bad", home, reason)
        os.replace(f"{home}/hibernate.sqlite3", f"{home}/hibernate.sqlite3.bad")

    def all(self, query: str, *values: Any) -> list[Any]:
        return self.db.execute(query, values).fetchall()

    def number(self, query: str) -> int:
        return int(self.all(query)[0][0])

    @contextlib.contextmanager
    def transaction(self, least: int = 0) -> Iterator[None]:
        """A change, on disk when it is over. If it fails, `undo` takes back what was done to
        files; killed, the next look at the folder finds it."""
        with contextlib.ExitStack() as self.undo:
            with self.db:  # ROLLBACK if it fails
                if not self.db.in_transaction:
                    self.db.execute("BEGIN IMMEDIATE")
                last = self.number("SELECT stamp FROM last")
                if not least and directory_time(self.mark) // 10**9 > last:
                    open_index.cache_clear()  # the next to ask for it gets new UIDVALIDITYs
                    raise Deleted("UNAVAILABLE", "The index was replaced by a backup")
                self.stamp = max(last + 1, int(time.time()), least)
                self.db.execute("UPDATE last SET stamp = ?", (self.stamp,))
                yield
                self.db.execute("COMMIT")
            self.undo.pop_all()
        with contextlib.suppress(FileNotFoundError):  # after the commit: never ahead of it
            os.utime(self.mark, (self.stamp, self.stamp))

    # Mailboxes

    def folder(self, name: str) -> bytes:
        """The INBOX is the home. No other name may become part of a path."""
        if name == "INBOX":
            return self.home
        if not NAME.fullmatch(name):
            raise MailError("CANNOT", "Invalid mailbox name")
        return self.home + b"/." + name.encode()

    def exists(self, name: str) -> bool:
        return os.path.isdir(self.folder(name))

    def must_exist(self, name: str, code: str = "NONEXISTENT") -> bytes:
        """Its folder, in which nothing is missing."""
        folder = self.folder(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mend(folder)
            return folder
        raise MailError(code, f"Mailbox doesn't exist: {name}")

    def spare(self) -> bytes:
        """A path for a folder that is not yet, or no longer, a mailbox."""
        return self.must_exist("INBOX") + b"/tmp/" + unique_name()

    def names(self) -> list[str]:
        """All mailboxes that have a folder."""
        found = [each[1:] for each in os.listdir(os.fsdecode(self.home)) if each.startswith(".")]
        return sorted({"INBOX", *(x for x in found if NAME.fullmatch(x) and self.exists(x))})

    def by_id(self, number: int, uidvalidity: int = 0) -> Mailbox:
        """A row known before; with its UIDVALIDITY it is the one that a session has selected."""
        query = "SELECT * FROM mailbox WHERE id = ? AND ? IN (0, uidvalidity)"
        if rows := self.all(query, number, uidvalidity):
            return Mailbox(*rows[0])
        raise (Deleted if uidvalidity else MailError)("NONEXISTENT", "Mailbox was deleted")

    def by_name(self, name: str, missing: str = "NONEXISTENT") -> Mailbox:
        """The row of a folder that exists, made if need be."""
        self.must_exist(name, missing)
        query = "SELECT * FROM mailbox WHERE name = ?"
        if not (rows := self.all(query, name)):
            with self.transaction():
                new = "INSERT OR IGNORE INTO mailbox (name, uidvalidity, modseq) VALUES (?, ?, ?)"
                self.db.execute(new, (name, self.stamp, self.stamp))
                rows = self.all(query, name)
        return Mailbox(*rows[0])

    def move_folder(self, source: bytes, target: bytes, name: str) -> None:
        """Rename a folder, and forget what the index has of that name."""
        os.rename(source, target)
        self.undo.callback(os.rename, target, source)
        self.db.execute("DELETE FROM mailbox WHERE name = ?", (name,))

    def create_folder(self, name: str) -> None:
        name, made = name.removesuffix("."), self.spare()
        with self.transaction():
            if self.exists(name):
                raise MailError("ALREADYEXISTS", "Mailbox already exists")
            self.undo.callback(shutil.rmtree, made, ignore_errors=True)
            os.mkdir(made, 0o700)
            mend(made)
            open(made + b"/maildirfolder", "wb").close()  # Maildir++: this is no home
            self.move_folder(made, self.folder(name), name)

    def delete_folder(self, name: str) -> None:
        if name == "INBOX":
            raise MailError("CANNOT", "INBOX can't be deleted")
        trash = self.spare()
        with self.transaction():
            self.move_folder(self.must_exist(name), trash, name)
        shutil.rmtree(trash, ignore_errors=True)

    def rename_folder(self, old: str, new: str) -> None:
        """With all folders below it. The INBOX stays with its own; its messages go to the new."""
        if old == "INBOX":
            self.create_folder(new)
            inbox, query = self.refresh(self.by_name(old)), "SELECT uid FROM message WHERE box = ?"
            uids = [uid for uid, in self.all(query, inbox.id)]
            self.copy(inbox, uids, self.by_name(new.removesuffix(".")), move=True)
            return
        below = [name for name in self.names() if name == old or name.startswith(old + ".")]
        moves = {name: new + name[len(old):] for name in below}
        if not moves:
            self.must_exist(old)
        if new.startswith(old + ".") or any(map(self.exists, moves.values())):
            raise MailError("ALREADYEXISTS", "Mailbox already exists, or would be below itself")
        with self.transaction():
            for name, target in moves.items():
                self.move_folder(self.folder(name), self.folder(target), target)
                self.db.execute("UPDATE mailbox SET name = ? WHERE name = ?", (target, name))

    def subscriptions(self) -> list[str]:
        """Dovecot's file, so that they outlive the index: one name in a line, in its newer form
        under a version line and with tabs between the levels."""
        names, path = set[str](), self.home + b"/subscriptions"
        with contextlib.suppress(FileNotFoundError), open(path, errors="ignore") as file:
            names.update(file.read().removeprefix("V\t2\n").replace("\t", ".").split("\n"))
        return sorted(names - {""})

    def subscribe(self, name: str, wanted: bool) -> None:
        path = self.home + b"/subscriptions"
        if wanted:
            self.must_exist(name)
        with self.transaction():  # for its lock
            names = sorted({*self.subscriptions(), name} - (set() if wanted else {name}))
            with open(path + b".tmp", "w", encoding="ascii", errors="ignore") as file:
                file.writelines(f"{each}\n" for each in names)
            os.replace(path + b".tmp", path)

    # Messages

    def rows(self, number: int, uids: Iterable[int]) -> list[MessageRow]:
        """Those of a mailbox's UIDs, as far as they exist, in order."""
        query = f"SELECT * {CHOSEN} ORDER BY uid"
        return [MessageRow(*row) for row in self.all(query, number, compact([*uids]))]

    def put(self, number: int, messages: Iterable[tuple[int, bytes, str]]) -> None:
        """Write the rows of UIDs, files and keywords."""
        rows = []
        for uid, file, keywords in messages:
            info = file.partition(b":2,")[2].decode("latin-1")
            flags = "".join(letter for letter in "DFRST" if letter in info)
            rows.append((number, uid, file, flags, keywords, self.stamp))
        self.db.executemany(PUT, rows)

    def refresh(self, box: Mailbox, claim: bool = False) -> Mailbox:
        """The row in agreement with its folder; its times are UNSETTLED if it may not be yet.
        `claim`: new messages are \\Recent for the caller and for nobody later."""

        def agrees(box: Mailbox) -> bool:
            known = folder_times(self.folder(box.name)) == (box.new, box.cur)
            return known and not (claim and box.recent < box.uidnext)

        if agrees(box):
            return box
        with self.db:
            # One mail wakes all sessions of a mailbox, in several processes. Who is not the first
            # to get the lock finds nothing left to write, and nobody waits for the disk again.
            self.db.execute("BEGIN IMMEDIATE")
            if agrees(box := self.by_id(box.id)):
                self.db.rollback()  # a COMMIT would keep readers out, if only for a moment
                return box
            with self.transaction():
                box = self.scan(box)
                if claim:
                    self.db.execute("UPDATE mailbox SET recent = uidnext WHERE id = ?", (box.id,))
        return box

    def scan(self, box: Mailbox) -> Mailbox:
        """Bring the rows in line with the folder. readdir(3) may miss a file that is renamed
        meanwhile, so a message is only gone if it is missing in a folder whose times were old
        before the listing, and the same after it."""
        folder, changed, gone = self.must_exist(box.name), [], []
        times, now = folder_times(folder), time.clock_gettime_ns(FILE_CLOCK)
        if times == (box.new, box.cur):
            return box
        # The clock for files ticks every few milliseconds, on some file systems every 2 seconds.
        young = any(abs(now - t) < (YOUNG if t % 10**9 else 2 * 10**9) for t in times)
        tmp = folder + b"/tmp"
        young = young and not told_apart(tmp)
        # A delivery costs the same however many messages lie in cur/.
        part = [b"new/"] if times[1] == box.cur else [b"new/", b"cur/"]
        found = listing(folder, part)
        with contextlib.suppress(OSError):  # what was left unfinished 36 hours ago (Maildir's rule)
            for entry in os.scandir(tmp):
                if time.time() - entry.stat(follow_symlinks=False).st_ctime > 36 * 3600:
                    remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
                    remove(entry.path)
        if young or folder_times(folder) != times:
            times = UNSETTLED
        query = "SELECT uid, file, keywords FROM message WHERE box = ? AND file >= ?"
        for uid, old, keywords in self.db.execute(query, (box.id, min(part))):
            file = found.pop(base_of(old), None)
            if file is None:
                gone.append(uid)
            elif file != old:
                changed.append((uid, file, keywords))
        if times != UNSETTLED:
            self.db.execute(f"DELETE {CHOSEN}", (box.id, compact(gone)))
        fresh = sorted(found.values(), key=lambda file: (len(file.partition(b".")[0]), file[4:]))
        self.put(box.id, changed + [(uid, file, "") for uid, file in enumerate(fresh, box.uidnext)])
        self.db.execute("UPDATE mailbox SET new = ?, cur = ? WHERE id = ?", (*times, box.id))
        return self.by_id(box.id)

    @contextlib.contextmanager
    def alone(self, *boxes: Mailbox) -> Iterator[list[bytes]]:
        """Spares the next look a scan, which takes long in a large folder: the rows of `boxes`
        agree with their folders afterwards if they did before and nobody but the caller has
        changed a name meanwhile. Of each name that appears or goes it adds an item to the list."""
        made, numbers = list[bytes](), list[int]()
        folders = [self.folder(box.name) for box in boxes]
        paths = [folder + sub for folder in folders for sub in (b"/new", b"/cur")]
        libc, fd = witness()
        try:
            if all(told_apart(folder + b"/tmp") for folder in folders):
                numbers = [libc.inotify_add_watch(fd, path, NAMES_CHANGED) for path in paths]
            before = [folder_times(folder) for folder in folders]
            yield made
            after = [folder_times(folder) for folder in folders]
            if min(numbers, default=-1) < 0:
                return  # inotify can't tell, or times can't
            for path in paths:  # waits for who has it locked: only then the kernel tells of it
                with contextlib.suppress(OSError):
                    os.unlink(path + b"/.none")
            heard = sum(number in (*numbers, -1) for number, _ in inotify_events(fd))
            for box, old, times in zip(boxes, before, after) if heard == len(made) else ():
                query = "UPDATE mailbox SET new = ?, cur = ? WHERE (id, new, cur) = (?, ?, ?)"
                self.db.execute(query, (*times, box.id, *old))
        finally:
            for number in numbers:
                libc.inotify_rm_watch(fd, number)

    def on_file(self, box: Mailbox, row: MessageRow, action: Callable[[bytes], Any]) -> Any:
        """action(path of the file), wherever another program has just renamed it to."""
        folder, file = self.folder(box.name), row.file
        with contextlib.suppress(FileNotFoundError, KeyError):
            for _ in range(3):
                with contextlib.suppress(FileNotFoundError):
                    return action(folder + b"/" + file)
                file = listing(folder)[base_of(file)]
        raise Vanished("EXPUNGEISSUED", "Some of the messages no longer exist")

    def remember(self, number: int, parsed: Parsed) -> None:
        """Keep what had to be computed. That it fails when others are busy is no loss."""
        query = f"INSERT OR IGNORE INTO parsed SELECT box, uid, ?, ? {CHOSEN}"
        rows = [(item, value, number, f"[{uid}]") for (uid, item), value in parsed.items()]
        with contextlib.suppress(sqlite3.OperationalError), self.transaction():
            self.db.executemany(query, rows)

    def known_keywords(self, box: Mailbox, wanted: Iterable[str]) -> set[str]:
        """The keywords in the spelling this mailbox has for them; new ones are added to it."""
        known = {keyword.lower(): keyword for keyword in box.keywords.split()}
        names = {known.setdefault(keyword.lower(), keyword) for keyword in wanted}
        if len(known) > KEYWORD_LIMIT:
            raise MailError("LIMIT", "Too many keywords in this mailbox")
        words = " ".join(known.values())
        self.db.execute("UPDATE mailbox SET keywords = ? WHERE id = ?", (words, box.id))
        return names

    def store(
        self, number: int, uids: Sequence[int], how: str, flags: str,
        keywords: Sequence[str] = (), unchanged_since: int = 2**63,
    ) -> tuple[int, list[int]]:
        """STORE with how "+", "-" or "" (replace): the MODSEQ of the change, and the UIDs left
        alone because they have changed since."""
        updates, refused, change = [], [], COMBINE[how]
        with self.transaction():
            box = self.by_id(number)
            names = self.known_keywords(box, keywords)
            with self.alone(box) as made:
                for row in self.rows(number, uids):
                    letters, words = {*row.flags}, {*row.keywords.split()}
                    if row.modseq > unchanged_since:
                        refused.append(row.uid)
                    elif change(letters, {*flags}) != letters or change(words, names) != words:
                        with contextlib.suppress(Vanished):  # of which the next look will tell
                            file = self.on_file(box, row, partial(reflag, how, flags))
                            updates.append((row.uid, file, " ".join(sorted(change(words, names)))))
                            made += {row.file} ^ {file}  # a rename to the same name is none
                self.put(number, updates)
                if updates:  # keywords rename nothing, but must stir
                    os.utime(self.folder(box.name) + b"/cur")
        return self.stamp, refused

    def append(self, number: int, delivery: Delivery, flags: str, keywords: Sequence[str]) -> int:
        """Take in a delivery that is finished; return its UID."""
        with self.transaction():
            box = self.by_id(number)
            words = " ".join(sorted(self.known_keywords(box, keywords)))
            with self.alone(box) as made:
                file = delivery.keep(flags)
                self.undo.callback(os.unlink, delivery.folder + b"/" + file)
                made.append(file)
            self.put(number, [(box.uidnext, file, words)])
        return box.uidnext

    def copy(self, source: Mailbox, uids: Sequence[int], target: Mailbox, move: bool) -> Pairs:
        """All or nothing: the UIDs here and there. A message moves by a rename: whatever happens,
        it is in one of the two; only from another file system it may end in both."""
        copies, left = [], []
        with self.transaction():
            source, target = self.by_id(source.id), self.by_id(target.id)
            there = self.must_exist(target.name, "TRYCREATE")
            if len(rows := self.rows(source.id, uids)) < len(uids):
                raise Vanished("EXPUNGEISSUED", "Some of the messages no longer exist")
            used = {word for row in rows for word in row.keywords.split()}
            spelt = {word.lower(): word for word in self.known_keywords(target, used)}
            with self.alone(target, source) as made:
                for uid, row in enumerate(rows, target.uidnext):
                    take = partial(self.take, there, row.flags, move)
                    file, *old = self.on_file(source, row, take)
                    left += old
                    made += [file, row.file][: 1 + (move and not old)]
                    words = " ".join(spelt[word.lower()] for word in row.keywords.split())
                    copies.append((uid, file, words))
            sync_directory(there + b"/cur")
            self.put(target.id, copies)
            if move:
                self.db.execute(f"DELETE {CHOSEN}", (source.id, compact([r.uid for r in rows])))
        for path in left:
            with contextlib.suppress(FileNotFoundError):  # renamed: it will be a new message
                os.unlink(path)
        return [(row.uid, uid) for row, (uid, *_) in zip(rows, copies)]

    def take(self, folder: bytes, flags: str, move: bool, path: bytes) -> list[bytes]:
        """The new file below `folder`, and the old one if it has to be removed in the end."""
        file = b"cur/" + unique_name() + b":2," + flags.encode()
        copy = folder + b"/" + file
        try:
            (os.rename if move else os.link)(path, copy)
            self.undo.callback(*(os.rename, copy, path) if move else (os.unlink, copy))
        except OSError as error:
            if error.errno not in ([errno.EXDEV] if move else NO_LINK):
                raise
            with open(path, "rb") as source, contextlib.closing(Delivery(folder)) as delivery:
                shutil.copyfileobj(source, delivery.file)  # its very bytes
                delivery.finish(os.fstat(source.fileno()).st_mtime)
                file = delivery.keep(flags)
            self.undo.callback(os.unlink, folder + b"/" + file)
            return [file, path][: 1 + move]
        return [file]

    def expunge(self, number: int, uids: Sequence[int]) -> None:
        """Those that are \\Deleted."""
        with self.transaction():
            box = self.scan(self.by_id(number))  # \Deleted may have been taken off again
            rows = [row for row in self.rows(number, uids) if "T" in row.flags]
            with self.alone(box) as made:
                for row in rows:
                    with contextlib.suppress(Vanished):
                        self.on_file(box, row, os.unlink)
                        made.append(row.file)
            self.db.execute(f"DELETE {CHOSEN}", (number, compact([row.uid for row in rows])))


open_index = lru_cache(INDEXES_OPEN)(Index)
witness = lru_cache(1)(inotify)  # one a process: to close one takes milliseconds


# ------------------------------------------------------------------------------------------------
# 9  Messages
#
# A message is its bytes with CRLF line ends and a tree of offsets into them: every answer is cut
# from those bytes, nothing is put together again from parsed pieces. Mail is written by anybody,
# so nothing in here raises, recurses by the sender's will or takes more than linear time; where
# no RFC says what broken mail means, the answer is Dovecot's.
# ------------------------------------------------------------------------------------------------

MAX_DEPTH, MAX_PARTS, MAX_BOUNDARY = 100, 10_000, 80  # a part beyond these stays opaque
MAX_HEADERS = 2**20  # bytes of a mail's headers that are looked into, those of its parts included
TEXT_LIMIT = 16 * 2**20  # bytes of a message's text that are searched; at most 12 each in memory
ATOM_CHAR, MIME = rb"[!#-'*+\-/-9=?A-Z^-~\x80-\xff]", rb"[!#-'*+\-.0-9A-Z^-~\x80-\xff]"
QUOTED, DOTTED = rb'"(?:[^"\\]++|\\.)*+"', rb"(?:%b|\.)++" % ATOM_CHAR
COMMENT = rb"\((?:[^()\\]++|\\.|\((?:[^()\\]++|\\.|\([^()]*+\))*+\))*+\)"  # nests three deep
CFWS = rb"(?:[ \t\r\n]++|%b)*+" % COMMENT
SPACE = re.compile(CFWS, re.S)
TOKEN = re.compile(rb'(%b)|(%b|%b)|["(].*' % (COMMENT, QUOTED, DOTTED), re.S)  # the last: no end
ADDRESS = re.compile(rb"""(?!\Z) (?: (?P<group> %(word)b*+) : %(s)b)?+
    (?P<box> (?: (?P<name> %(word)b*+) (?P<angle> < %(s)b)
                 (?: (?P<route> (?:@%(dots)b,?)++) : %(s)b)? )?
             (?P<user> %(word)b?) (?P<at> @ %(s)b (?:(?P<host> %(host)b) | (?:%(dots)b)?) %(s)b)?
             (?(angle) (?P<end> > %(s)b)? | (?(at) | (?P<more> %(word)b*+))) )
    (?P<close> ; %(s)b)? (?P<next> , %(s)b)?""" % {
        b"s": CFWS, b"word": rb"(?:(?:%b|%b)%b)" % (DOTTED, QUOTED, CFWS), b"dots": DOTTED,
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


@dataclass
class Tree:
    """What all parts of a message have in common. It holds none of them: a cycle would keep the
    bytes in memory until the garbage collector comes, which may take a hundred messages."""

    room: int = MAX_PARTS
    unread: int = MAX_HEADERS
    numbered: WeakValueDictionary[Numbers, Message] = field(default_factory=WeakValueDictionary)


class Message:
    """A message, or a part of one: its header from `start`, its body from `body` to `end`.
    All offsets are those with CRLF."""

    def __init__(
        self, data: bytes, start: int = 0, number: Numbers = (), parent: Message | None = None
    ) -> None:
        if not parent:
            data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        self.data, self.start, self.children = data, start, list[Message]()
        self.texts = dict[bool, str]()
        self.tree: Tree = parent.tree if parent else Tree()
        self.opened: tuple[bytes, ...] = parent.opened if parent else ()  # boundaries
        self.depth: int = parent.depth + 1 if parent else 1
        ends = (match.end() for match in HEADER_END.finditer(data, start) if match[0]
                or match.end() == len(data) or data.startswith(self.opened, match.end() + 2))
        self.body = self.end = next(ends)  # after the blank line, or at a boundary
        header = data[start:min(self.body, start + self.tree.unread)]
        self.tree.unread -= len(header)
        self.fields = header_fields(header)
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
        self.tree.room -= 1
        self.tree.numbered.setdefault(number, self)
        if self.kind != "multipart" and not (inside and self.kind == "message"):
            number += (1,)  # RFC 3501 6.4.5: what is not multipart has a part 1
            self.tree.numbered.setdefault(number, self)
        self.number = number
        if parent:
            parent.children.append(self)

    def parts(self) -> Iterator[Message]:
        """This one and all below it, in order."""
        yield self
        for child in self.children:
            yield from child.parts()

    def boundary(self, at: int) -> tuple[int, bytes | None]:
        """The next line that begins with an open boundary, and the longest such."""
        for match in DASHES.finditer(self.data, max(at - 1, 0)):
            if self.data.startswith(self.opened, match.end()) and self.tree.room > 0:
                fits = (text for text in self.opened if self.data.startswith(text, match.end()))
                return match.end() - 2, max(fits, key=len)
        return len(self.data), None

    @cached_property
    def after(self) -> int:
        """Read the body and what is in it, up to the boundary of another; where it ends. Often a
        header is all that is asked for, so it is done when the rest is."""
        at, mine, number = self.body, None, self.number
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
        self.after  # noqa: B018
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
        if part or what in ("", "TEXT"):
            self.after  # noqa: B018  has all parts been read
        found = self.tree.numbered.get(part)
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
        lines = re.findall(rb"(?!\r\n)[^\n]+\n?(?:[ \t][^\n]*\n?)*+", text[:MAX_HEADERS])
        blank = not exclude or text == b"\r\n" or text.endswith(b"\r\n\r\n")
        return b"".join(line for line in lines if exclude != (
            line.partition(b":")[0].rstrip(b" \t").lower() in names)) + b"\r\n" * blank

    @cached_property
    def header_texts(self) -> dict[bytes, str]:
        """The decoded fields, those of one name a line each; once for all keys of a SEARCH. With
        addresses as the envelope has them, for those in which white space or a comment stands."""
        found = collections.defaultdict[bytes, list[str]](list)
        for name, value in self.fields:
            found[name].append(decoded_words(value))
            if name in (b"from", b"to", b"cc", b"bcc") and re.search(rb"[\s)]@|@[\s(]", value):
                people = (row[2:] for row in addresses(value) if row[3])
                found[name] += (b"@".join(person).decode("utf-8", "replace") for person in people)
        return {name: "\n".join(texts) for name, texts in found.items()}

    def header_text(self, name: str) -> str | None:
        return self.header_texts.get(name.lower().encode())

    def text(self, with_header: bool) -> str:
        """What BODY and TEXT search: the text parts; for TEXT the headers of all parts too.
        Folded and kept, as a SEARCH may have several such keys."""
        if with_header in self.texts:
            return self.texts[with_header]
        found, room, _ = list[str](), TEXT_LIMIT, self.after
        for part in self.parts():
            if with_header:
                found.append(decoded_words(self.data[part.start:part.body]))
            if not part.children and part.media[0].lower() in (b"text", b"message"):
                encoding = dict(part.fields).get(b"content-transfer-encoding", b"")
                encoding = FIRST_WORD.findall(encoding)[0][0].lower()
                charset = part.named.get(b"charset", b"")
                body = self.data[part.body:min(part.end, part.body + room)]
                found.append(decoded(body, encoding, charset))
                room -= len(body)
        return self.texts.setdefault(with_header, "\n".join(found).casefold())

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
# What a session knows is its View, the tag of its IDLE, and whether its client wants MODSEQs:
# that is all that sleeps.
# ------------------------------------------------------------------------------------------------

CAPABILITY = "IMAP4rev1 LITERAL+ SASL-IR ID ENABLE IDLE"
AFTER_LOGIN = " NAMESPACE CHILDREN UNSELECT UIDPLUS MOVE CONDSTORE"
LOGIN_INPUT = 8 * 1024  # bytes of a command with its literals before log-in
BAD_LIMIT = 3  # bad commands in a row before log-in until BYE
KEYS = 250  # of one SEARCH; if each is in another, Python's limit of 1000 calls is near
TEXT_KEY = 10  # for so many counts one that looks through all the text: nobody else has a turn
BATCH, BATCH_SEEN = 500, 25  # messages at a time; fewer if \Seen is set before they are sent

TAG = rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]{1,64}"
SLEEPER_INPUT = re.compile(rb"(DONE\r?\n)?(?:(%b) IDLE\r?\n)?" % TAG, re.I)
LITERAL = re.compile(rb"\{(\d{1,18})(\+?)\}\r?\n")
GAP = rb"(?:(?<=\()| )"  # before an argument
STRING = rb'"(?:[^"\\]|\\["\\])*+"'
ATOM = rb'[^\x00-\x20\x7f-\xff(){%*"\\\]]+'
ASTRING = rb'(?:[^\x00-\x20\x7f-\xff(){%%*"\\]+|%b)' % STRING
LIST_PATTERN = rb'[^\x00-\x20\x7f-\xff(){"\\]+|' + STRING
FLAG = rb"(?:%b|(?i:\\(?:Answered|Flagged|Deleted|Seen|Draft)))" % ATOM
FLAG_LIST = rb"%b(?: %b)*" % (FLAG, FLAG)
RANGE = rb"(?:[1-9]\d{0,9}|\*)(?::(?:[1-9]\d{0,9}|\*))?"
SET = rb"%b(?:,%b)*" % (RANGE, RANGE)
ITEM = (
    rb"(?i:BODY(\.PEEK)?\[((?:[1-9]\d{0,8}(?:\.|(?=\])))*)"
    rb"(HEADER\.FIELDS(?:\.NOT)?(?= )|(?:HEADER|TEXT|(?<=\.)MIME|(?<!\.))(?=\]))"
    rb"(?: (\(%b(?: %b)*\)))?\](?:<(\d{1,10})\.([1-9]\d{0,9})>)?|([A-Z0-9.]++)(?!\[))"
    % (ASTRING, ASTRING))

APPEND = re.compile(rb"(?i)%b APPEND (?!\{\d+\+?\}\r?\n\Z)" % TAG)  # the message comes next
STATUS = {  # each item in SQL, of mailbox LEFT JOIN message
    "MESSAGES": "count(uid)", "RECENT": "count(uid) FILTER (WHERE uid >= recent)",
    "UNSEEN": "count(uid) FILTER (WHERE flags NOT LIKE '%S%')", "UIDNEXT": "uidnext",
    "UIDVALIDITY": "uidvalidity", "HIGHESTMODSEQ": "mailbox.modseq"}
# What makes a session one that knows MODSEQs, outside of strings. A mailbox whose name is such an
# atom does so too: no harm.
CONDSTORE = re.compile(
    rb"(?i)(?:[ (]|\A)(?:CONDSTORE|(?:HIGHEST)?MODSEQ|(?:UN)?CHANGEDSINCE \d+)(?:[ )]|\Z)")

Step = Generator["bytes | Ask | Pause | Move | None", Any, Any]
FAULTS = MailError, OSError, sqlite3.Error  # what is answered by NO

# The auth service: one request for each log-in, answered with a ticket sealed for that client's
# socket. Who asks faces the world and may be taken over, so no request is trusted, and a refusal
# tells neither by its words nor by its time whether there is such a user.

ROUNDS = 100_000  # of PBKDF2: 25 ms of a processor for each log-in; Dovecot's default is 5000

Secret = tuple[int, Callable[[str], bool]]  # how dear it is to check a password, and the check


def encode_password(scheme: str, password: str, salt: bytes = b"", rounds: int = ROUNDS) -> str:
    """`{SCHEME}...` for a passwd-file, as by `doveadm pw`; ValueError: it can't be written so.
    Given a `salt` it is to be compared, and a wrong password no error."""
    fine = scheme == "PLAIN" and (salt or re.fullmatch("[^:\0\r\n]+", password))
    if not fine and scheme not in ("SSHA512", "PBKDF2"):
        raise ValueError("PLAIN, SSHA512 or PBKDF2; PLAIN neither empty nor with a colon")
    given, salt = password.encode("utf-8", "surrogateescape"), salt or secrets.token_hex(8).encode()
    if scheme == "SSHA512":
        password = base64.b64encode(hashlib.sha512(given + salt).digest() + salt).decode()
    elif scheme == "PBKDF2":
        digest = hashlib.pbkdf2_hmac("sha1", given, salt, rounds)
        password = f"$1${salt.decode()}${rounds}${digest.hex()}"
    return f"{{{scheme}}}{password}"


def read_secret(stored: str) -> Secret:
    """From `{SCHEME}...` of a passwd-file: a password is right if it can be encoded to that."""
    pbkdf2 = r"(?<=PBKDF2\})\$1\$([!-~]+)\$(?!0+\$)(\d{1,7})\$"
    known = rf"\{{(PLAIN|SSHA512|PBKDF2)\}}(?:{pbkdf2}|(?<!PBKDF2\}}))(.+)"
    if not (found := re.fullmatch(known, stored, re.A)):
        # Without a scheme Dovecot reads CRYPT; to take such a hash for the password gives it away.
        raise ValueError("not {PLAIN}, {SSHA512} or {PBKDF2} and a password")
    scheme, salt, rounds, text = found.groups("0")
    raw = base64.b64decode(text, validate=True)[64:] if scheme == "SSHA512" else salt.encode()
    return int(rounds) or scheme == "SSHA512", lambda given: hmac.compare_digest(
        stored.encode("utf-8", "surrogateescape"),
        encode_password(scheme, given, raw, int(rounds)).encode("utf-8", "surrogateescape"))


def home_of(config: Config, user: str) -> str:
    """Where mail_location puts the user's Maildir; ValueError for a name that could leave it."""
    # No half of it may be empty or begin with a dot: "%n" or "%d" would then be the folder above.
    half = r"[\w+=-][\w.+=-]*"
    if not re.fullmatch(rf"(?=.{{1,128}}\Z){half}(@{half})*", user, re.ASCII) or ".." in user:
        raise ValueError(f"{user!r} is not a user name")
    name, _, domain = user.partition("@")
    values = {"u": user, "n": name, "d": domain, "%": "%"}
    path = re.sub("%(.)", lambda m: values.get(m[1], m[0]), config.mail_location)
    return os.path.normpath(os.path.join(config.folder, path.removeprefix("maildir:")))


@lru_cache(1)
def read_passwords(config: Config, version: object) -> dict[str, tuple[Secret, str]]:
    """Dovecot's passwd-file, read again when its `version` has changed: secret and home of each
    user; as that of "" one that is as dear as the dearest. A wrong line costs only its user."""
    users: dict[str, tuple[Secret, str]] = {}
    with open(config.passwd_file, encoding="utf-8", errors="surrogateescape") as file:
        rows = [(line.rstrip("\n") + ":" * 6).split(":") for line in file]
    for number, (name, stored, _, _, _, home, *_) in enumerate(rows, 1):
        try:
            if (name.strip() or stored) and not name.startswith("#"):
                usual = home_of(config, name.lower())  # which checks the name, too
                place = home if os.path.isabs(home) else usual
                users.setdefault(name.lower(), (read_secret(stored), place))
        except ValueError as error:
            log.warning("%s:%d: %s", config.passwd_file, number, error)
    dearest = max((rounds for (rounds, _), _ in users.values()), default=0)
    return users | {"": ((dearest, lambda given: False), "")}


class AuthSession(Session):
    """[identity, sid, remote, user, password] -> ["ok", user, ticket, seal] or ["no", reason]."""

    input_limit = LOGIN_INPUT
    users: dict[str, tuple[Secret, str]] = {}

    @classmethod
    def prepare(cls, config: Config) -> None:
        file = os.stat(config.passwd_file)
        cls.users = read_passwords(config, (file.st_mtime_ns, file.st_size, file.st_ino))

    def step(self) -> Reply | None:
        return self.answer() if self.buffer else None

    def answer(self) -> Reply:
        reply = ["no", "[AUTHENTICATIONFAILED] Authentication failed."]
        try:
            reply = self.log_in(*checked(self.buffer.decode(), (str,) * 5)) or reply
        except ValueError as error:  # its words may hold a password
            log.info("auth: request refused: %s", type(error).__name__)
        except OSError as error:
            log.error("%s: %s", self.config.passwd_file, error.strerror)
            reply = ["no", "[UNAVAILABLE] Temporary authentication failure."]
        yield compact(reply).encode()
        self.ended = "answered"

    def log_in(self, identity: str, sid: str, remote: str, name: str, password: str) -> list[str]:
        """The answer; empty if that is no."""
        if not re.fullmatch("[!-~]{0,400}", identity + sid + remote) or len(password) > 1024:
            raise ValueError("not a request")
        user = name.lower()  # as Dovecot's default, %Lu
        try:
            self.prepare(self.config)
        except PermissionError:
            if not self.users:  # else they are as root could read them when the process began
                raise
        (dearest, never), _ = self.users[""]
        (rounds, fits), home = self.users.get(user, ((0, never), ""))
        if fits(password) and home:
            return ["ok", user, *ticket(self.key, identity, sid, user, remote, home)]
        if rounds < dearest:  # a refusal takes as long as for the dearest: what is left of it
            hashlib.pbkdf2_hmac("sha1", password.encode(errors="replace"), b"", dearest - rounds)
        log.info("<%s> %s wrong password or no such user: %.64r", sid, remote, name)
        return []


class BadCommand(Exception):
    """The client's mistake: the text of the BAD."""


Item = tuple[bytes, Callable[["Candidate"], bytes]]  # of FETCH: its name in the answer, the value
Test = Callable[["Candidate"], bool]
Key = tuple[int, Test]  # of SEARCH; for the cost see SEARCH_KEYS


def kind(
    pattern: bytes, value: Callable[[bytes], Any], what: str = "arguments", gap: bytes = GAP
) -> Any:
    """A kind of argument: its syntax, and what becomes of it."""
    def taken(parser: Parser) -> Any:
        try:
            return value(parser.must(gap + b"(%b)" % pattern, what)[1])
        except ValueError:
            raise BadCommand(f"Invalid {what}") from None

    return taken


def string(text: bytes) -> bytes:
    return re.sub(rb"(?s)\\(.)", rb"\1", text[1:-1]) if text.startswith(b'"') else text


def mailbox_name(text: bytes) -> str:
    return re.sub(r"(?i)\Ainbox(?=\.|$)", "INBOX", string(text).decode("latin-1"))


def split_flags(text: bytes) -> tuple[str, list[str]]:
    """(letters of system flags, keywords)"""
    names = text.strip(b"()").decode().split()
    letters = sorted({LETTERS[name.title()] for name in names if name[0] == "\\"})
    keywords = [name for name in names if name[0] != "\\"]
    if any(len(name) > 100 for name in keywords):  # cut, two would be one
        raise MailError("LIMIT", "Keyword is too long")
    return "".join(letters), keywords


class Parser:
    """Takes the arguments off a command, each with the space before it. What can't be what RFC
    3501 section 9 describes is BadCommand; a date without its quotes is understood."""

    def __init__(self, text: bytes, view: View | None) -> None:
        self.text, self.view, self.at = text, view, 0
        self.keys, self.see, self.modseq_asked = 0, False, False

    def may(self, pattern: bytes) -> re.Match[bytes] | None:
        found = re.compile(pattern).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def must(self, pattern: bytes, what: str = "arguments") -> re.Match[bytes]:
        if not (found := self.may(pattern)):
            raise BadCommand(f"Invalid {what}")
        return found

    end = kind(rb"\Z", bool, "text after the arguments", b"")
    rest = kind(rb"(?s:.*)", bytes, gap=b"")
    condstore = kind(rb"(?i: \(CONDSTORE\))?", bool, gap=b"")
    atom = kind(ATOM, lambda text: text.decode().upper())
    words = kind(rb"\(%b(?: %b)*\)" % (ATOM, ATOM), lambda t: t[1:-1].decode().upper().split())
    number = kind(rb"\d{1,18}", int, "number")
    sequence = kind(SET, bytes, "messageset")  # see View.mask()
    astring = kind(ASTRING, string)
    mailbox = kind(ASTRING, mailbox_name)
    pattern = kind(LIST_PATTERN, mailbox_name)
    flags = kind(rb"\((?:%b)?\)|%b" % (FLAG_LIST, FLAG_LIST), split_flags, "flags")
    keyword = kind(ATOM, lambda text: text.decode().lower())
    sought = kind(ASTRING, lambda text: string(text).decode(errors="replace").casefold())
    day = kind(rb'"?[\w-]+"?', lambda text: datetime.datetime.strptime(
        text.decode().strip('"'), "%d-%b-%Y").toordinal(), "date")
    time = kind(rb'"[ :\w+-]+"', lambda text: datetime.datetime.strptime(
        text.decode().strip('" '), "%d-%b-%Y %H:%M:%S %z").timestamp(), "date")
    # The name of an entry may come first; all of a message have one MODSEQ.
    modseq = kind(rb"(?:%b [a-zA-Z]+ )?\d{1,18}" % STRING, lambda text: int(text.split()[-1]))

    def several(self, item: Callable[[Parser], Any], end: bytes = rb"\)") -> list[Any]:
        found = [item(self)]
        while not self.may(end):
            found.append(item(self))
        return found

    def store(self) -> tuple[str, bool, int, str, list[str]]:
        found = self.must(rb"(?i) (?:\(UNCHANGEDSINCE (\d{1,18})\) )?([+-]?)FLAGS(\.SILENT)?")
        return found[2].decode(), bool(found[3]), int(found[1] or 2**63), *self.flags()

    def append(self) -> tuple[str, str, list[str], float | None]:
        """All that comes before APPEND's message, of which nothing is in the command."""
        name = self.mailbox()
        flags = self.flags() if self.may(rb"(?= \()") else ("", [])
        when = self.time() if self.may(rb'(?= ")') else None
        self.must(rb" \{\d+\+?\}\r?\n")
        return name, *flags, when

    def fetch(self) -> tuple[list[Item], bool, int]:
        """The items, whether they set \\Seen, and CHANGEDSINCE."""
        if macro := self.may(rb"(?i) (ALL|FAST|FULL)"):
            items = [*ITEMS.items()][: {b"FAST": 3, b"ALL": 4, b"FULL": 5}[macro[1].upper()]]
        else:
            items = self.several(Parser.item) if self.may(rb" \(") else [self.item()]
        since = self.may(rb"(?i) \(CHANGEDSINCE (\d{1,18})\)")
        return items, self.see, int(since[1]) if since else -1

    def item(self) -> Item:
        found = self.must(GAP + ITEM, "FETCH item")
        peek, part, what, names, start, length, name = found.groups(b"")
        if name:
            self.see |= name.upper() in (b"RFC822", b"RFC822.TEXT")
            if name.upper() not in ITEMS:
                raise BadCommand("Unknown FETCH item " + name.decode())
            return name.upper(), ITEMS[name.upper()]
        self.see |= not peek
        fields = [string(name).decode("latin-1").upper() for name in re.findall(ASTRING, names)]
        label = b"BODY[%b%b" % (part, what.upper())
        label += b" (%b)]" % b" ".join(map(atom_or_quoted, fields)) if fields else b"]"
        label += b"<%d>" % int(start) if start else b""
        numbers = tuple(map(int, re.findall(rb"\d+", part)))
        some = slice(int(start), int(start) + int(length)) if start else slice(None)
        return label, lambda m: m.literal((numbers, what.decode().upper(), tuple(fields)), some)

    def search(self) -> tuple[Test, bool]:
        """The keys as one test, and whether MODSEQ is among them."""
        charset = self.astring().upper() if self.may(rb"(?i) CHARSET") else b"UTF-8"
        if charset not in (b"US-ASCII", b"UTF-8"):
            raise MailError("BADCHARSET (US-ASCII UTF-8)", "Unknown charset")
        return every(self.several(Parser.key, rb"\Z"))[1], self.modseq_asked

    def key(self) -> Key:
        name = None
        if not self.may(GAP + rb"\("):
            name = "" if self.may(b"(?=%b%b)" % (GAP, SET)) else self.atom()
        self.keys += TEXT_KEY if name in ("BODY", "TEXT") else 1
        if self.keys > KEYS:
            raise BadCommand("Too many keys in SEARCH")
        if name is None:
            return every(self.several(Parser.key))
        if name not in SEARCH_KEYS:
            raise BadCommand(f"Unknown SEARCH key {name}")
        self.modseq_asked |= name == "MODSEQ"
        cost, test, *kinds = SEARCH_KEYS[name]
        values = [kind(self) for kind in kinds]
        cost = max([cost, *(value[0] for value in values if isinstance(value, tuple))])
        return cost, lambda m: test(m, *values)


@dataclass
class View:
    """A mailbox as one session knows it: what its client was told, and up to where in history.

    All but `uids` fits into a sleeper's record, if the name is not over 100 characters or so: who
    has selected such a mailbox stays awake. That list is made when it is needed: the UIDs
    below `uidnext` that exist, and those expunged since `expunged`, which the client still counts.
    """

    home: str
    id: int
    name: str
    readonly: bool
    uidvalidity: int
    uidnext: int = 0  # before the first look
    recent: list[int] = field(default_factory=list)  # pairs: UIDs from one, below next; last four
    keywords: int = -1  # how many the client knows
    modseq: int = 0  # up to here it knows of changed flags
    expunged: int = 0  # and up to here of expunged messages
    new: int = -1  # the folder's times before the last look
    cur: int = -1

    @property
    def index(self) -> Index:
        return Index.at(self.home)

    def box(self) -> Mailbox:
        return self.index.by_id(self.id, self.uidvalidity)

    @cached_property
    def uids(self) -> array[int]:
        if not self.uidnext:
            return array("I")
        self.box()  # it must still be this one
        [[uids]] = self.index.all(  # as one text, in half the time of rows
            "SELECT json_group_array(uid) FROM ("
            "SELECT uid FROM message WHERE box = ?1 AND uid < ?2 UNION ALL "
            "SELECT uid FROM expunged WHERE box = ?1 AND uid < ?2 AND modseq > ?3 ORDER BY 1)",
            self.id, self.uidnext, self.expunged)
        return array("I", json.loads(uids))

    def number(self, uid: int) -> int:
        """The sequence number of a UID; 0 if the session doesn't know it."""
        at = bisect.bisect_left(self.uids, uid)
        return at + 1 if at < len(self.uids) and self.uids[at] == uid else 0

    def mask(self, ranges: bytes, by_uid: bool, strict: bool = False) -> bytearray:
        """A set as a byte for each message; to be `strict` is an error if one isn't there."""
        keys = self.uids if by_uid else range(1, len(self.uids) + 1)
        mask, last = bytearray(len(keys)), b"%d" % (keys[-1] if keys else 0)
        for part in ranges.replace(b"*", last).split(b","):
            low, *_, high = sorted(map(int, part.split(b":") * 2))
            if strict and not 0 < low <= high <= len(keys):
                raise BadCommand("Invalid messageset")
            start, stop = bisect.bisect_left(keys, low), bisect.bisect(keys, high)
            mask[start:stop] = b"\1" * (stop - start)
        return mask

    def pick(self, ranges: bytes, by_uid: bool) -> list[int]:
        """The UIDs of a set, in order. A number that isn't there is an error, a UID isn't."""
        return [*itertools.compress(self.uids, self.mask(ranges, by_uid, strict=not by_uid))]

    def recents(self) -> int:
        at = [bisect.bisect_left(self.uids, uid) for uid in self.recent]
        return sum(at[1::2]) - sum(at[::2])

    def folder(self) -> str:
        return "" if self.name == "INBOX" else "." + self.name

    def look(self, expunges: bool) -> tuple[list[str], Iterable[Candidate]]:
        """The untagged lines that bring the client up to date, and the messages whose flags have
        changed. Without `expunges` (RFC 3501 7.4.1) the dead stay in the view, and new messages
        then wait for them too."""
        if folder_times(os.fsencode(f"{self.home}/{self.folder()}")) == (self.new, self.cur):
            return [], ()  # nothing can have happened: the index need not be opened
        index = self.index
        box = index.refresh(self.box(), not self.readonly)
        times = box.new, box.cur
        # What nobody had been told of is \Recent here, and in no other session.
        if self.recent and box.recent <= self.recent[-1]:
            self.recent[-1] = box.uidnext
        elif box.recent < box.uidnext:
            self.recent = [*self.recent, box.recent, box.uidnext][-8:]
        with index.db:
            index.db.execute("BEGIN")  # all of what follows is of one moment
            box = self.box()
            self.uids  # noqa: B018  made now
            dead, changed, end = list[Any](), list[Any](), self.uidnext
            if end:  # it is not the first look
                since = "WHERE box = ? AND modseq > ? AND uid < ? ORDER BY uid"
                dead = index.all(f"SELECT uid FROM expunged {since}", box.id, self.expunged, end)
                changed = index.all(f"SELECT * FROM message {since}", box.id, self.modseq, end)
            query = "SELECT uid FROM message WHERE box = ? AND uid >= ? ORDER BY uid"
            fresh = index.all(query, box.id, end)
            lines = self.flag_lines(box.keywords.split())
            self.name, self.modseq = box.name, box.modseq
            self.new, self.cur = UNSETTLED
            if expunges or not dead:
                lines += self.resize([uid for uid, in dead], [uid for uid, in fresh], not end)
                self.uidnext, self.expunged = box.uidnext, box.modseq
                self.new, self.cur = times
        return lines, (Candidate(self, box, MessageRow(*row), {}) for row in changed)

    def resize(self, dead: list[int], fresh: list[int], first: bool) -> list[str]:
        """EXPUNGE, EXISTS and RECENT."""
        recents, gone = self.recents(), {*dead}
        numbers = sorted(filter(None, map(self.number, gone)), reverse=True)
        lines = [f"* {number} EXPUNGE\r\n" for number in numbers]
        if gone:  # each taken out by itself would be quadratic
            self.uids = array("I", itertools.filterfalse(gone.__contains__, self.uids))
        self.uids.extend(fresh)
        if fresh or first:
            lines.append(f"* {len(self.uids)} EXISTS\r\n")
        if self.recents() != recents or first:
            lines.append(f"* {self.recents()} RECENT\r\n")
        return lines

    def flag_lines(self, words: list[str]) -> list[str]:
        if len(words) == self.keywords:
            return []
        self.keywords, flags = len(words), " ".join([*LETTERS, *words])
        kept = ")] Read-only mailbox." if self.readonly else f"{flags} \\*)] Flags permitted."
        return [f"* FLAGS ({flags})\r\n* OK [PERMANENTFLAGS ({kept}\r\n"]


class Candidate:
    """A message that FETCH or SEARCH looks at; its file is read when something in it is asked."""

    def __init__(self, view: View, box: Mailbox, row: MessageRow, parsed: Parsed) -> None:
        self.view, self.box, self.row = view, box, row
        self.parsed = parsed  # what the index knows, and what it will
        self.number = view.number(row.uid)
        self.recent = bisect.bisect(view.recent, row.uid) % 2 == 1

    @cached_property
    def message(self) -> Message:
        with self.view.index.on_file(self.box, self.row, partial(open, mode="rb")) as file:
            return Message(file.read())

    def recall(self, item: bytes) -> bytes:
        if (found := self.parsed.get((self.row.uid, item))) is None:
            found = self.parsed[self.row.uid, item] = PARSED[item](self.message)
        return found

    def size(self) -> int:
        return int(self.recall(b"RFC822.SIZE"))

    def when(self) -> datetime.datetime:
        """INTERNALDATE: the file's time, which renames, links and backups keep."""
        seconds = self.view.index.on_file(self.box, self.row, os.stat).st_mtime
        possible = min(max(seconds, -(2**31)), 2**35)  # years that datetime can do
        return datetime.datetime.fromtimestamp(possible).astimezone()

    def has(self, name: str, text: str) -> bool:
        found = self.message.header_text(name)
        return found is not None and text in found.casefold()

    def literal(self, section: tuple[Any, ...], some: slice = slice(None)) -> bytes:
        """What BODY[...]<...> is."""
        data = (self.message.section(*section) or b"")[some]
        return b"{%d}\r\n%b" % (len(data), data)


PARSED: dict[bytes, Callable[[Message], bytes]] = {  # never change, and are kept in the index
    b"RFC822.SIZE": lambda m: b"%d" % len(m.data),
    b"ENVELOPE": lambda m: quoted(m.envelope()),
    b"BODY": lambda m: quoted(m.structure(False)),
    b"BODYSTRUCTURE": lambda m: quoted(m.structure(True)),
}
INDEXED = (b"UID", b"FLAGS", b"INTERNALDATE", b"RFC822.SIZE", b"MODSEQ")  # first in an answer
ITEMS: dict[bytes, Callable[[Candidate], bytes]] = {  # the first are those of FAST, ALL and FULL
    b"FLAGS": lambda m: b"(%b)" % " ".join([
        *(name for name, letter in LETTERS.items() if letter in m.row.flags),
        *["\\Recent"] * m.recent, *m.row.keywords.split()]).encode(),
    b"INTERNALDATE": lambda m: f'"{m.when():%d-%b-%Y %H:%M:%S %z}"'.encode(),
    **{name: partial(Candidate.recall, item=name) for name in PARSED},
    b"UID": lambda m: b"%d" % m.row.uid,
    b"MODSEQ": lambda m: b"(%d)" % m.row.modseq,
    b"RFC822": lambda m: m.literal(((), "", ())),
    b"RFC822.HEADER": lambda m: m.literal(((), "HEADER", ())),
    b"RFC822.TEXT": lambda m: m.literal(((), "TEXT", ())),
}
UID, FLAGS, MODSEQ = ((name, ITEMS[name]) for name in (b"UID", b"FLAGS", b"MODSEQ"))
# The cost of a key, its test, what follows it. Cheap ones are tried first: for 0 the index is
# enough, 1 takes the file's status, or its size if that is known, 2 the message, 3 all its text.
SEARCH_KEYS: dict[str, tuple[Any, ...]] = {
    "ALL": (0, lambda m: True),
    "NEW": (0, lambda m: m.recent and "S" not in m.row.flags),
    "OLD": (0, lambda m: not m.recent),
    "RECENT": (0, lambda m: m.recent),
    "NOT": (0, lambda m, key: not key[1](m), Parser.key),
    "OR": (0, lambda m, one, two: one[1](m) or two[1](m), Parser.key, Parser.key),
    "": (0, lambda m, mask: mask[m.number - 1], lambda p: p.view.mask(p.sequence(), False)),
    "UID": (0, lambda m, mask: mask[m.number - 1], lambda p: p.view.mask(p.sequence(), True)),
    "KEYWORD": (0, lambda m, word: word in m.row.keywords.lower().split(), Parser.keyword),
    "UNKEYWORD": (0, lambda m, word: word not in m.row.keywords.lower().split(), Parser.keyword),
    "MODSEQ": (0, lambda m, modseq: m.row.modseq >= modseq, Parser.modseq),
    "LARGER": (1, lambda m, size: m.size() > size, Parser.number),
    "SMALLER": (1, lambda m, size: m.size() < size, Parser.number),
    "BEFORE": (1, lambda m, day: m.when().toordinal() < day, Parser.day),
    "ON": (1, lambda m, day: m.when().toordinal() == day, Parser.day),
    "SINCE": (1, lambda m, day: m.when().toordinal() >= day, Parser.day),
    "SENTBEFORE": (2, lambda m, day: m.message.sent_day() < day, Parser.day),
    "SENTON": (2, lambda m, day: m.message.sent_day() == day, Parser.day),
    "SENTSINCE": (2, lambda m, day: m.message.sent_day() >= day, Parser.day),
    "HEADER": (2, lambda m, name, text: m.has(name, text), Parser.sought, Parser.sought),
    "BODY": (3, lambda m, text: text in m.message.text(False), Parser.sought),
    "TEXT": (3, lambda m, text: text in m.message.text(True), Parser.sought),
}
for _name in ("BCC", "CC", "FROM", "SUBJECT", "TO"):
    SEARCH_KEYS[_name] = 2, lambda m, text, name=_name: m.has(name, text), Parser.sought
for _name, _letter in LETTERS.items():
    SEARCH_KEYS[_name[1:].upper()] = 0, lambda m, letter=_letter: letter in m.row.flags
    SEARCH_KEYS["UN" + _name[1:].upper()] = 0, lambda m, letter=_letter: letter not in m.row.flags


def every(keys: list[Key]) -> Key:
    keys = sorted(keys, key=lambda key: key[0])
    return keys[-1][0], lambda m: all(test(m) for _, test in keys)


def atom_or_quoted(name: str) -> bytes:
    plain = re.fullmatch(ATOM, name.encode("utf-8")) and name.upper() != "NIL"
    return name.encode() if plain else quoted(name.encode())


def wildcard(pattern: str, name: str) -> bool:
    """LIST's "*" and "%", in time pattern × name, however many there are.

    >>> wildcard("a%.*", "ab.c.d"), wildcard("a%", "ab.c"), wildcard("*", "x")
    (True, False, True)
    """
    fold = 5 * (name == "INBOX" or name.startswith("INBOX."))  # in any case
    pattern = re.sub(r"[*%]{2,}", lambda run: "*" if "*" in run[0] else "%", pattern)
    reached = {0}  # the pattern so far matches these lengths of the name
    for char in pattern:
        if char in "*%":
            for at, each in enumerate(name):
                if at in reached and (char == "*" or each != "."):
                    reached.add(at + 1)
        else:
            reached = {at + 1 for at in reached
                       if name[at : at + 1] == (char.upper() if at < fold else char)}
        if not reached:
            break
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
    runs = itertools.groupby(enumerate(uids), lambda pair: pair[1] - pair[0])
    ends = ([*run] for _, run in runs)
    return ",".join(":".join(str(uid) for _, uid in run[:: len(run) - 1 or 1]) for run in ends)


ANY = ("before log-in", "without a mailbox", "with a mailbox")  # RFC 3501 section 3
BEFORE, AFTER, SELECTED = ANY[:1], ANY[1:], ANY[2:]
NAMED, SOME = (Parser.mailbox,), (Parser.sequence,)


class Command(NamedTuple):
    """The method returns a response code for the OK, or what is to be sent before that."""

    states: tuple[str, ...]
    method: Callable[..., Any]  # if for SELECTED only, it gets the view first
    arguments: tuple[Callable[[Parser], Any], ...] = ()  # each after a space
    tells: bool | None = None  # what is new: nothing, all but EXPUNGE (False), or all


class ImapSession(Session):
    """Reads commands and runs them by the table at its end, from the greeting to LOGOUT.

    All of it is one coroutine, `work`: where that yields None it waits for input. Between two
    commands it has no state of its own, so it begins anew wherever the session goes. What comes
    right after a log-in stays in `buffer`, which the engine carries along to the imap process.
    """

    input_limit = LOGIN_INPUT + 1  # a command that fills it is too long
    watch_dirs = ("new", "cur")
    tag_syntax = re.compile(TAG.decode())
    still_here = b"* OK Still here\r\n"
    view: View | None = None
    condstore = False
    running = ""  # tag of the command that is read or executed
    by_uid = False
    literal = -1  # bytes of a literal that are still to come; -1: none does
    waits = False  # the client, for our "+", before it sends them
    seen = 0  # this much input was not enough to go on

    def __init__(self) -> None:
        super().__init__()
        self.own = set[int]()  # MODSEQs of changes that the client made and knows
        self.work = self.life()

    @property
    def index(self) -> Index:
        return Index.at(self.home)

    def movable(self) -> bool:
        return not self.running

    def freeze(self) -> list[Any]:
        known = fields(self.view)[1:-2] if self.view else ()  # home and times travel anyway
        return [self.condstore, *(getattr(self.view, each.name) for each in known)]

    def thaw(self, state: list[Any]) -> None:
        if len(state) > 1 and (len(state) < 10 or len(self.times) != 2):
            raise ValueError("not an IMAP session")
        if self.user:
            self.input_limit = int(self.config.max_line_length) + 1
        self.condstore = bool(state and state[0])
        self.view = View(self.home, *state[1:10], *self.times) if state[1:] else None

    def watch(self) -> tuple[str, tuple[int, ...]] | None:
        return (self.view.folder(), (self.view.new, self.view.cur)) if self.view else None

    def closed(self) -> None:
        self.work.close()

    @classmethod
    def farewell(cls, reason: str) -> bytes:
        return f"* BYE {reason}\r\n".encode()

    def bye(self, reason: str) -> bytes:
        """Once: a command and the look after it may find out the same."""
        if self.ended:
            return b""
        self.ended = reason
        return self.farewell(reason)

    @classmethod
    def peeked(cls, tag: str, data: bytes) -> tuple[bytes, int, str] | None:
        found = SLEEPER_INPUT.fullmatch(data)
        if not data or not found or bool(found[1]) != bool(tag):
            return None
        answer = f"{tag} OK Idle completed.\r\n" * bool(tag) + "+ idling\r\n" * bool(found[2])
        return answer.encode(), len(data), (found[2] or b"").decode()

    def capability(self) -> str:
        return CAPABILITY + (AFTER_LOGIN if self.user else " AUTH=PLAIN")

    def opened(self) -> Reply:
        yield f"* OK [CAPABILITY {self.capability()}] hibernate.py ready.\r\n".encode()

    def arrived(self, answer: str) -> Reply:
        if answer:
            yield f"{answer} OK [CAPABILITY {self.capability()}] Logged in\r\n".encode()
        elif self.tag:
            yield from self.stirred()

    # Commands are read, executed, answered

    def step(self) -> Reply | None:
        return self.resume() if len(self.buffer) > self.seen else None

    def resume(self) -> Reply:
        answer = None
        while (item := self.work.send(answer)) is not None:
            answer = yield item
        self.seen = len(self.buffer)

    def life(self) -> Step:
        """One command after the other; whatever comes of it, it is answered."""
        bad = 0
        while not self.ended:
            self.running = ""
            try:
                text = yield from self.command()
            except BadCommand as error:
                text = f"BAD {error}."
            except Deleted as error:
                text = f"NO {error}."
                yield self.bye(str(error))
            except FAULTS as error:
                text = self.refusal(error)
                if isinstance(error, Vanished):  # of a COPY or MOVE: let the client know which
                    yield from self.tell(True)
            while self.literal >= 0 and not self.waits:  # sent in spite of the error
                yield from self.receive(len)
                yield from self.line()
            bad = bad + 1 if text.startswith("BAD") else 0
            if text:
                yield f"{self.running or '*'} {text}\r\n".encode()
            if bad == BAD_LIMIT and not self.user:
                yield self.bye("Too many invalid commands")
        yield None

    def refusal(self, error: Exception) -> str:
        """The NO for what went wrong; the system's and our own faults are logged."""
        if isinstance(error, MailError):
            return f"NO [{error.code}] {error}."
        code, number = getattr(error, "sqlite_errorcode", 0) & 255, getattr(error, "errno", 0)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "NO [INUSE] Mailbox is in use by another session."
        log.error("%s: %s", type(error).__name__, error)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            Index.put_aside(self.home, error)
        if code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "NO [OVERQUOTA] Not enough disk space."
        return "NO [SERVERBUG] Internal error, it is in the server's log."

    def line(self) -> Step:
        """The next line; its end is left on if a literal follows."""
        while not (end := self.buffer.find(b"\n") + 1):
            if len(self.buffer) >= self.input_limit:
                yield b"* BAD Command line too long.\r\n" + self.bye("Command line too long")
            yield None
        line = bytes(self.buffer[:end])
        del self.buffer[:end]
        found = LITERAL.search(line)
        self.literal, self.waits = (int(found[1]), not found[2]) if found else (-1, False)
        return line if found else line[:-1].removesuffix(b"\r")

    def receive(self, write: Callable[[bytes], Any]) -> Step:
        """The literal, in pieces as they come."""
        if self.waits:
            self.waits = False
            yield b"+ OK\r\n"
        while self.literal:
            if not self.buffer:
                yield None
            data = bytes(self.buffer[: self.literal])
            del self.buffer[: len(data)]
            self.literal -= len(data)
            write(data)

    def command(self) -> Step:
        """Read a command whole, but for APPEND's message, and execute it: what its answer says,
        "" if that comes later."""
        text = bytearray((yield from self.line()))
        if self.tag:  # this ends IDLE
            self.running, self.tag = self.tag, ""
            yield from self.tell(True)
            if text.strip().upper() != b"DONE":
                raise BadCommand("Expected DONE")
            return "OK Idle completed."
        found = Parser(bytes(text), None).must(rb"(%b)(?: |\Z)" % TAG, "tag")
        self.running = found[1].decode()
        while self.literal >= 0 and not APPEND.match(text):
            if len(text) + self.literal >= self.input_limit:
                raise BadCommand("[TOOBIG] Literal too long")
            data = bytearray()
            yield from self.receive(data.extend)
            text[text.rindex(b"{"):] = b'"%b"' % re.sub(rb'(["\\])', rb"\\\1", data)
            text += yield from self.line()
        return (yield from self.execute(Parser(bytes(text), self.view)))

    def execute(self, parser: Parser) -> Step:
        found = parser.must(rb"(?i)%b ((?:UID )?[A-Z]+)" % TAG, "command")
        name = found[1].decode().upper()
        state = ANY[bool(self.user) + bool(self.view)]
        command = self.commands.get(name)
        if not command or state not in command.states:
            raise BadCommand(f"Unknown command {state}: {name}")
        self.by_uid = name.startswith("UID ")
        values: list[Any] = [self.view] if command.states == SELECTED else []
        values += [argument(parser) for argument in command.arguments]
        parser.end()
        if CONDSTORE.search(re.sub(STRING, b'""', parser.text)) and not self.condstore:
            self.condstore = True  # from now on MODSEQs are told (RFC 7162 3.1)
            if self.view:
                yield f"* OK [HIGHESTMODSEQ {self.view.modseq}] Highest\r\n".encode()
        code = command.method(self, *values) or ""
        if not isinstance(code, str):
            code = (yield from code) or ""
        if command.tells is not None:
            yield from self.tell(command.tells)
        return "" if self.tag else f"OK {code}{' ' if code else ''}{name.capitalize()} completed."

    def stirred(self) -> Reply:
        return self.tell(True)

    def tell(self, expunges: bool) -> Reply:
        """What is new in the selected mailbox. A busy index is asked again next time."""
        try:
            lines, changed = self.view.look(expunges) if self.view else ([], ())
            yield "".join(lines).encode()
            for message in changed:
                items = [MODSEQ] * self.condstore + [FLAGS] * (message.row.modseq not in self.own)
                yield from self.fetched(message, [UID] * self.by_uid + items) if items else ()
            self.own.clear()
        except MailError as error:
            yield self.bye(str(error))
        except FAULTS as error:
            self.refusal(error)

    # Log-in

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
        log.info("<%s> log-in impossible: %s", self.sid, reason)
        raise MailError("UNAVAILABLE", "Temporary failure, try again later")

    def authenticate(self, mechanism: str, initial: bytes) -> Step:
        if mechanism != "PLAIN":
            raise MailError("CANNOT", "Unsupported authentication mechanism")
        if not initial:
            yield b"+ \r\n"
            initial = yield from self.line()
        try:
            identity, user, password = base64.b64decode(initial.strip(), validate=True).split(b"\0")
        except ValueError:
            raise BadCommand("Authentication aborted") from None
        if identity not in (b"", user):
            raise MailError("AUTHORIZATIONFAILED", "Nobody logs in for others here")
        return (yield from self.login(user, password))

    # Mailboxes

    def idle(self) -> Reply:
        self.tag = self.running
        yield b"+ idling\r\n"

    def select(self, name: str, condstore: bool, readonly: bool = False) -> Step:
        if self.view:
            self.view = None
            yield b"* OK [CLOSED] Previous mailbox closed.\r\n"
        box = self.index.by_name(name)
        view = View(self.home, box.id, box.name, readonly, box.uidvalidity)
        lines, _ = view.look(True)
        self.view = view
        query = "SELECT min(uid) FROM message WHERE box = ? AND flags NOT LIKE '%S%'"
        if unseen := view.number(view.index.all(query, box.id)[0][0] or 0):
            lines.append(f"* OK [UNSEEN {unseen}] First unseen.\r\n")
        lines += [
            f"* OK [UIDVALIDITY {view.uidvalidity}] UIDs valid\r\n",
            f"* OK [UIDNEXT {view.uidnext}] Predicted next UID\r\n",
            f"* OK [HIGHESTMODSEQ {view.modseq}] Highest\r\n"]
        yield "".join(lines).encode()
        return "[READ-ONLY]" if readonly else "[READ-WRITE]"

    def delete(self, name: str) -> None:
        query = "SELECT 1 FROM mailbox WHERE id = ? AND name = ?"
        mine = self.view and self.index.all(query, self.view.id, name)
        self.index.delete_folder(name)
        if mine:
            self.view = None

    def list_names(self, reference: str, pattern: str, lsub: bool = False) -> Reply:
        """LIST and LSUB; there a parent that isn't subscribed itself shows only where "%" hides
        its children."""
        names = self.index.subscriptions() if lsub else self.index.names()
        command, row = b"LSUB" if lsub else b"LIST", b'* %b (%b) "." %b\r\n'
        if not pattern:
            yield row % (command, b"\\Noselect", b'""')
            return
        every = with_parents(names)
        parents, mailboxes = {each.rpartition(".")[0] for each in every}, {*names}
        for name in names if lsub and not pattern.endswith("%") else every:
            if wildcard(reference + pattern, name):
                flags = [b"\\HasChildren" if name in parents else b"\\HasNoChildren"] * (not lsub)
                flags = [b"\\Noselect"] * (name not in mailboxes) + flags
                yield row % (command, b" ".join(flags), atom_or_quoted(name))
            yield b""  # the others have a turn: a name takes up to 5 ms

    def status(self, name: str, items: list[str]) -> Reply:
        box = self.index.refresh(self.index.by_name(name))
        if not STATUS.keys() >= {*items}:
            raise BadCommand("Invalid STATUS item")
        pairs = ", ".join(f"'{item}', {STATUS[item]}" for item in dict.fromkeys(items))
        # The plus: compared to a column of integers, `box` could not be searched for.
        query = f"SELECT {pairs} FROM mailbox LEFT JOIN message ON box = +id WHERE id = ?"
        text = " ".join(map(str, self.index.all(query, box.id)[0]))
        yield b"* STATUS %b (%b)\r\n" % (atom_or_quoted(box.name), text.encode())

    def append(self, arguments: tuple[str, str, list[str], float | None]) -> Step:
        name, flags, keywords, when = arguments
        if not self.literal:
            raise MailError("CANNOT", "Can't save a message without a byte")
        if self.literal > self.config.mail_max_message_size:
            raise MailError("TOOBIG", "Message is too large")
        folder = self.index.folder(self.index.by_name(name, "TRYCREATE").name)
        with contextlib.closing(Delivery(folder)) as upload:
            yield from self.receive(upload.write)
            if (yield from self.line()):
                raise BadCommand("Text after the message")
            box = self.index.by_name(name, "TRYCREATE")  # it may have been deleted meanwhile
            upload.finish(when)
            uid = self.index.append(box.id, upload, flags, keywords)
        return f"[APPENDUID {box.uidvalidity} {uid}]"

    # With a mailbox

    def expunge(self, view: View, ranges: bytes | None = None, leave: bool = False) -> None:
        if not view.readonly:
            uids = view.uids if ranges is None else view.pick(ranges, self.by_uid)
            view.index.expunge(view.box().id, uids)
        if leave:
            self.view = None

    def walk(
        self, view: View, uids: Sequence[int], items: Iterable[bytes], see: bool, since: int = -1
    ) -> Iterator[Candidate]:
        """The messages that still exist, some looked up at a time, with what is known of the
        `items`; to `see` them sets \\Seen, of few before they are sent."""
        recall = PARSED.keys() & items
        size = BATCH_SEEN if see else BATCH
        query = ("SELECT uid, item, value FROM parsed WHERE box = ? AND uid BETWEEN ? AND ? "
                 f"AND item IN ({','.join('?' * len(recall))})")
        box = view.box()
        if (box.new, box.cur) != UNSETTLED:  # or each file that others renamed costs a listing
            with contextlib.suppress(sqlite3.OperationalError):
                view.index.refresh(box)
        for at in range(0, len(uids), size):
            box, part = view.box(), uids[at : at + size]
            found = view.index.all(query, box.id, part[0], part[-1], *recall) if recall else []
            parsed = {(uid, item): value for uid, item, value in found}
            rows = view.index.rows(box.id, part)
            unseen = [row.uid for row in rows
                      if see and "S" not in row.flags and row.modseq > since]
            if unseen:
                self.own.add(view.index.store(box.id, unseen, "+", "S")[0])
                rows = view.index.rows(box.id, part)
            for row in rows:
                yield Candidate(view, box, row, parsed)
            if len(parsed) > len(found):
                view.index.remember(box.id, parsed)

    def copy(self, view: View, ranges: bytes, name: str, move: bool = False) -> Step:
        if not (uids := view.pick(ranges, self.by_uid)):
            return ""
        if move and view.readonly:
            raise MailError("READ-ONLY", "Mailbox is read-only")
        target = self.index.by_name(name, "TRYCREATE")
        old, new = zip(*view.index.copy(view.index.refresh(view.box()), uids, target, move))
        code = f"[COPYUID {target.uidvalidity} {compact_set(old)} {compact_set(new)}]"
        if move:
            yield f"* OK {code} Moved UIDs.\r\n".encode()
        return "" if move else code

    def store(self, view: View, ranges: bytes, change: tuple[Any, ...]) -> Step:
        how, silent, since, flags, keywords = change
        uids, refused = view.pick(ranges, self.by_uid), list[int]()
        if view.readonly:
            raise MailError("READ-ONLY", "Mailbox is read-only")
        if silent:  # what others changed before would be hidden with our own change
            yield from self.tell(False)
        else:
            view.index.refresh(view.box())  # what others did counts, too
        for at in range(0, len(uids), BATCH):
            part = uids[at : at + BATCH]
            modseq, left = view.index.store(view.box().id, part, how, flags, keywords, since)
            refused += left if self.by_uid else map(view.number, left)
            self.own.update([modseq] * silent)
            yield b""
        return f"[MODIFIED {compact_set(refused)}]" if refused else ""

    def search(self, view: View, wanted: tuple[Test, bool]) -> Step:
        test, modseqs = wanted
        found, highest, there = [""], 0, 0
        for message in self.walk(view, view.uids, [b"RFC822.SIZE"], False):
            with contextlib.suppress(Vanished):
                if test(message):
                    found.append(str(message.row.uid if self.by_uid else message.number))
                    highest = max(highest, message.row.modseq)
                there += 1
            yield b""  # the worker's other sessions have a turn
        more = f" (MODSEQ {highest})" if modseqs and highest else ""
        yield f"* SEARCH{' '.join(found)}{more}\r\n".encode()
        return "[EXPUNGEISSUED]" if there < len(view.uids) else ""

    def fetch(self, view: View, ranges: bytes, wanted: tuple[list[Item], bool, int]) -> Step:
        items, see, since = wanted
        uids, there = view.pick(ranges, self.by_uid), 0
        items = [UID] * self.by_uid + items + [MODSEQ] * (since >= 0)
        names = [name for name, _ in items]
        for message in self.walk(view, uids, names, see and not view.readonly, since):
            with contextlib.suppress(Vanished):
                seen = [FLAGS] * (message.row.modseq in self.own)  # just now
                new = message.row.modseq > since
                yield from self.fetched(message, items + seen) if new else [b""]
                there += 1
        return "[EXPUNGEISSUED]" if there < len(uids) else ""

    def fetched(self, message: Candidate, items: list[Item]) -> Iterator[bytes]:
        """An answer, first what is told without the message, as Dovecot orders it. Nothing is
        yielded before the message is there for the rest, and never more than an item is in
        memory."""
        wanted = dict(items)
        known = [name + b" " + value(message) for name, value in wanted.items() if name in INDEXED]
        others = {name: value for name, value in wanted.items() if name not in INDEXED}
        for name in others:
            if name in PARSED:
                message.recall(name)
            else:
                message.message  # noqa: B018
        words = message.box.keywords.split()  # another session may have made one
        text = "".join(message.view.flag_lines(words)).encode()
        text += b"* %d FETCH (%b" % (message.number, b" ".join(known))
        for number, (name, value) in enumerate(others.items(), len(known)):
            data = b"%b%b%b %b" % (text, b" "[:number], name, value(message))
            yield from (data[at : at + 32768] for at in range(0, len(data), 32768))
            text = b""
        yield text + b")\r\n"

    commands = {
        "CAPABILITY": Command(
            ANY, lambda self: [f"* CAPABILITY {self.capability()}\r\n".encode()]),
        "NOOP": Command(ANY, lambda self: None, tells=True),
        "ID": Command(ANY, lambda self, _: [b'* ID ("name" "hibernate.py")\r\n'], (Parser.rest,)),
        "LOGOUT": Command(ANY, lambda self: [self.bye("Logging out")]),
        "LOGIN": Command(BEFORE, login, (Parser.astring, Parser.astring)),
        "AUTHENTICATE": Command(BEFORE, authenticate, (Parser.atom, Parser.rest)),
        "ENABLE": Command(AFTER, lambda self, names: [
            b"* ENABLED CONDSTORE\r\n"] * bool(CONDSTORE.search(names)), (Parser.rest,)),
        "NAMESPACE": Command(AFTER, lambda self: [b'* NAMESPACE (("" ".")) NIL NIL\r\n']),
        "IDLE": Command(AFTER, idle),
        "SELECT": Command(AFTER, select, (*NAMED, Parser.condstore)),
        "EXAMINE": Command(AFTER, partial(select, readonly=True), (*NAMED, Parser.condstore)),
        "CREATE": Command(AFTER, lambda self, name: self.index.create_folder(name), NAMED),
        "DELETE": Command(AFTER, delete, NAMED),
        "RENAME": Command(AFTER, lambda self, *names: self.index.rename_folder(*names), NAMED * 2),
        "SUBSCRIBE": Command(AFTER, lambda self, name: self.index.subscribe(name, True), NAMED),
        "UNSUBSCRIBE": Command(AFTER, lambda self, name: self.index.subscribe(name, False), NAMED),
        "LIST": Command(AFTER, list_names, (*NAMED, Parser.pattern)),
        "LSUB": Command(AFTER, partial(list_names, lsub=True), (*NAMED, Parser.pattern)),
        "STATUS": Command(AFTER, status, (*NAMED, Parser.words), True),
        "APPEND": Command(AFTER, append, (Parser.append,), True),
        "CHECK": Command(SELECTED, lambda self, view: None, (), True),
        "CLOSE": Command(SELECTED, partial(expunge, leave=True)),
        "UNSELECT": Command(SELECTED, lambda self, view: setattr(self, "view", None)),
        "EXPUNGE": Command(SELECTED, expunge, (), True),
        "UID EXPUNGE": Command(SELECTED, expunge, SOME, True),
        "SEARCH": Command(SELECTED, search, (Parser.search,), False),
        "FETCH": Command(SELECTED, fetch, (*SOME, Parser.fetch), False),
        "STORE": Command(SELECTED, store, (*SOME, Parser.store), False),
        "COPY": Command(SELECTED, copy, SOME + NAMED, True),
        "MOVE": Command(SELECTED, partial(copy, move=True), SOME + NAMED, True),
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
    Role("imap-login", ImapSession, ("1000", "4", "1", "60 s"), sheds=True, unit="pre-login",
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
        usual = "hibernate.conf" if options.file is None else ""
        config = Config(PROGRAM, options.file or "", usual)
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
    except OSError as error:
        status = 77 if isinstance(error, PermissionError) else 69
        reason = f"{error.filename or 'hibernate'}: {error.strerror}"
    except KeyboardInterrupt:
        return 130  # as a shell says it
    print(reason, file=sys.stderr)
    return status


class LogFile(logging.FileHandler):
    """Opened anew when it was moved away. Who can't, without the right, a descriptor or the
    directory, writes on in the old one: no line of the log may cost a session."""

    def emit(self, record: logging.LogRecord) -> None:
        path, old = self.baseFilename, self.stream
        with contextlib.suppress(OSError):
            if old and not (os.path.exists(path) and os.path.samefile(path, old.fileno())):
                self.stream = self._open()
                old.close()
        super().emit(record)


def serve(config: Config, options: argparse.Namespace) -> None:
    # Titles are written over the arguments: with too little room, start once more with some.
    if len(" ".join(sys.orig_argv)) < 80 and os.path.exists("/proc/self/stat"):
        os.execv(sys.executable, [*sys.orig_argv, "--title-room=" + "." * 80])
    os.umask(0o077)
    handler = LogFile(config.log_path) if config.log_path else logging.StreamHandler()
    layout = "%(asctime)s %(processName)s[%(process)d] %(levelname)s %(message)s"
    logging.basicConfig(handlers=[handler], format=layout, level=logging.INFO)
    logging._srcfile = None  # to look for the calling line is a third of a line's cost (HOWTO)
    multiprocessing.current_process().name = "master"
    if not config.path:
        config.values["passwd_file"] = config.inbox("demo-users")

    def ready(master: Master) -> None:
        with contextlib.suppress(OSError):  # nobody reads it, or there is no room: no matter
            for pool in master.pools:
                for name, group in zip(pool.settings.sections, pool.listeners):
                    host, port = group[0].getsockname()[:2]
                    print(f"listening {name} {f'[{host}]' if ':' in host else host}:{port}")
            print(*lines, "ready", sep="\n", flush=True)

    master = Master(config, ready)  # from here on base_dir is ours
    lines = [] if config.path or not master.ready else make_demo(config)
    master.run()


def make_demo(config: Config) -> list[str]:
    """Without a configuration: a user with a password made up now, and a message to read."""
    password = secrets.token_hex(12)
    with open(config.inbox("demo-users"), "w", encoding="ascii") as file:
        file.write(f"demo:{encode_password('SSHA512', password)}\n")
    home = home_of(config, "demo")
    if not os.path.exists(home):
        deliver(home, io.BytesIO(WELCOME.format(email.utils.formatdate(localtime=True)).encode()))
    return ["user: demo", f"password: {password}"]


def make_password(config: Config, options: argparse.Namespace) -> None:
    try:
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        if not password:  # as when the script before it has failed
            raise ValueError("an empty password")
        print(encode_password((options.operand or "SSHA512").upper(), password))
    except (ValueError, EOFError) as error:
        raise Failure(64, error) from None


def deliver_message(config: Config, options: argparse.Namespace) -> None:
    os.umask(0o077)
    user = options.operand.lower()  # as at a log-in, which may know another home, too
    with contextlib.suppress(OSError):  # who delivers need not be able to read the passwd-file
        AuthSession.prepare(config)
    _, home = AuthSession.users.get(user, ("", ""))
    try:
        drop_privileges(config.sections["imap"])  # what root puts there that user could not read
        deliver(home or home_of(config, user), sys.stdin.buffer)
    except ValueError as error:
        raise Failure(64, error) from None
    except OSError as error:  # 75, EX_TEMPFAIL: a mail server keeps the message and tries again
        status = 77 if isinstance(error, PermissionError) else 75
        raise Failure(status, f"deliver: {error}") from None


def control(config: Config, options: argparse.Namespace) -> None:
    """Send one command to the master, print what comes back until the connection's end."""
    text = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(CHECK_TIME + STOP_TIME)  # longer than what a reload or a stop may take
        try:
            sock.connect(config.inbox("master"))
            sock.send(os.fsencode(f"{options.command} {options.operand}".strip()))
            while data := sock.recv(1 << 20):
                text += data
        except (FileNotFoundError, ConnectionRefusedError):
            raise Failure(75, f"hibernate is not running in {config.base_dir}") from None
        except (TimeoutError, BlockingIOError, ConnectionError):
            if not text:  # else it is one process that does not answer; the others have
                raise Failure(75, "the master does not answer") from None
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
        text = "-" if value in (None, "") else str(value)
        return text if text.isprintable() else ascii(text)  # a terminal obeys control characters

    names = list(dict.fromkeys(itertools.chain(*rows)))
    table = [names, *([shown(name, row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
