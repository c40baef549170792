#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""
Notification driver that publishes to every process on a local Unix socket.

Each notification is relayed, as one line of JSON, to every process that is
connected to the stream socket at ``sock_path``::

    [oslo_messaging_notifications]
    driver = unix
    sock_path = /run/nova/notifications.sock

What a subscriber can rely on:

* A notification whose ``notify()`` begins after the subscriber's
  ``connect()`` returned reaches it. Nothing is kept for later: while nobody
  is connected everything is dropped, before it is even serialized.
* Lines are in the order of the calls, for each publishing thread.
* Notifications are sent 'at-most-once' and are never lost in silence: where
  some were dropped, a ``notifications.lost`` record stands in their place
  and says how many. A subscriber that lags behind by more than
  ``sock_buffer_size`` loses its oldest lines, not its connection.
* Not covered is what a killed process had not handed on yet, and what a
  process could not hand on within its last second.

``subscribe()``, the transport ``unix://`` for notification listeners, and
``python -m unix_notifier`` are such subscribers, which come back by
themselves.

What a service can rely on: ``notify()`` never blocks, never raises and never
logs. It serializes, and sends the line itself where that is plainly possible.
Else it appends it to a queue and wakes the loop, a daemon thread that does
everything else. Who may do what:

==================  =====================================================
any thread          appends to the queue; reads the gate; wakes the loop
who has the turn    all else: takes from the queue, owns the lock file, the
                    listener, the subscribers and the backlog, sets the gate
==================  =====================================================

The loop has the turn from its waking to its sleeping, the exit handler once
the loop has ended, and ``notify()`` if nobody has it, for a single send.
"""

import _thread
import argparse
import atexit
import bisect
import collections
from collections import abc
import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import grp
import itertools
import json
import logging
import math
from multiprocessing import process
from multiprocessing import util
import os
import random
import re
import reprlib
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import termios
import threading
import time
import types
import urllib.parse
import uuid
import weakref

from oslo_config import cfg
import oslo_messaging
from oslo_messaging.notify import notifier
from oslo_serialization import jsonutils
from oslo_utils import importutils
from oslo_utils import strutils
from oslo_utils import timeutils

LOG = logging.getLogger(__name__)

# ---------------------------------------------------------------------------
# STREAM: from notify() to the subscribers of one process
# ---------------------------------------------------------------------------

# Bytes: sun_path holds 108 with the NUL. The relay appends '.relay'.
_CONNECT_MAX = 107
_PATH_MAX = 101

# Bytes. Large sends are what keeps the loop ahead: each system call gives up
# the GIL, which a busy publisher returns only after 5 ms. One chunk is what
# the subscribers share and what one that lags can lose at once.
_CHUNK_MAX = 256 * 1024
_SEND_MAX = 1024 * 1024

# Bytes that are received at a time while little comes. To allocate 256 KiB
# takes 12 us, for what takes 1.5 with 64.
_RECV_MIN = 64 * 1024

# Bytes a chunk costs beside its data: two objects, their cursors' counts.
_CHUNK_COST = 256

# Bytes of a line; a notification that takes more is lost. Who reads lines,
# a leader or a consumer, may take a longer one for nonsense.
_LINE_MAX = 64 * 1024 * 1024

# The queue is bounded by its length, which is exact without a lock because
# a line occupies one entry for each KiB that it begins.
_QUEUE_UNIT = 1024

# Entries that are taken from the queue at a time.
_BATCH = 256

# Seconds. A publisher that is far ahead of the loop gives way so long at each
# call, and the loop, which needs the GIL, catches up.
_GIVE_WAY = 50e-6

# What accept() says when the process or the machine has run out.
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Connections that the kernel holds for us between two turns: a hundred readers
# may come back at once. While more than so many come within a second it is
# told to hold fewer, for a turn has to accept all who wait before it sends.
_BACKLOG = 128
_CROWD = 256
_CROWD_BACKLOG = 8

# Seconds between turns while subscribers come, go or talk without a pause.
_REST = 5e-3
_REST_MAX = 15e-3

# Seconds between lines on who comes and goes; as many as each names in full.
_VISITS_INTERVAL = 1
_VISITS_NAMED = 4

# Bytes that a subscriber may send us, who only talk.
_DISCARD_MAX = 64 * 1024

# SO_PASSRIGHTS (Linux 6.16): whether a socket may be passed descriptors, else
# the sender gets EPERM. One that was passed and not taken is closed by whoever
# reads or closes the socket, and to close a connection that lingers takes as
# long as its other end likes.
_PASSRIGHTS = 83

# Seconds: how often, at most, a path in use is looked after; what is granted
# at exit, and how much of it without any progress.
_CHECK_INTERVAL = 1
_EXIT_TIME = 1
_EXIT_STALL = 0.1

# Seconds: when what lasts is said again, for the log may have been opened, or
# rotated, since: a trouble, then ever later; and who serves the path, then
# daily.
_AGAIN = 10
_AGAIN_MAX = 60 * 60
_DAY = 24 * 60 * 60

# notify() itself sends so many lines in a row, and after that one in so many
# seconds; what is beyond goes in batches, which cost less.
_HAND_OVERS = 32
_HAND_OVER_TIME = 0.5e-3

# Seconds: a send that takes longer has waited for the GIL. Bytes: a send of
# more takes so long that another thread should have the GIL meanwhile.
_GIL_LATE = 1e-3
_SHORT = 16 * 1024

# For calls into the kernel that are short and never wait. By way of PyDLL they
# do not give up the GIL, which a busy thread returns only after 5 ms. Beside
# one, select.poll() takes 250 us on average in notify(), this 1; and a loop
# that is woken does not take the GIL from its waker, who would wait for 25 us.
# Monkey patching, which removes select.poll(), does not reach it.
_libc = ctypes.PyDLL(None)

# A sigset_t: what no thread of ours takes. Not what a thread gets for what it
# has done itself, which has to find its handler, such as faulthandler's.
_signals = ctypes.create_string_buffer(128)
_libc.sigfillset(_signals)
for _number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
                signal.SIGTRAP, signal.SIGSYS):
    _libc.sigdelset(_signals, _number)


def _start(thread):
    """Start a thread, which will take no signal, unless it is a green one.

    A signal that the service has blocked, to wait for it, is given to any
    thread that has not, and may end the process there. The thread inherits
    its mask, for it could not set one before it has the GIL. In between, no
    handler of a signal can run, and raise, at a place where ours would stay:
    that takes the end of a call, or the start of a function in Python.
    """
    if not isinstance(_thread.start_new_thread, types.BuiltinFunctionType):
        thread.start()      # others run in this very thread meanwhile
        return
    mask = ctypes.create_string_buffer(len(_signals))
    _libc.pthread_sigmask(signal.SIG_BLOCK, None, mask)
    try:
        _libc.pthread_sigmask(signal.SIG_BLOCK, _signals, None)
        thread.start()
    finally:
        _libc.pthread_sigmask(signal.SIG_SETMASK, mask, None)


# Not an IntFlag each time, which takes 2 us.
_AT_ONCE = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _send_short(sock, data):
    """``sock.send()``, without giving up the GIL."""
    sent = _libc.send(sock.fileno(), data, ctypes.c_size_t(len(data)),
                      socket.MSG_NOSIGNAL)
    # Why it failed is told, or raised, by another try.
    return sent if sent >= 0 else sock.send(data, socket.MSG_NOSIGNAL)


# -- format: a message becomes one line -------------------------------------

# Levels and containers of a message that are copied where the encoder cannot
# go on, in a second at most; and items of one that may have no end. What is
# cut counts for many: among three dozen dicts that hold one another there are
# 10 ** 41 paths.
_DEPTH_MAX = 100
_ITEMS_MAX = 256 * 1024
_CUT_COST = 256

# Python 3.14 holds its own to the size of the stack alone: of a dict that is
# 30 000 deep it takes 0.4 s, and no other thread runs meanwhile.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = _REPR.maxset = 64
_REPR.maxfrozenset = _REPR.maxdeque = _REPR.maxarray = 64
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 64 * 1024


def _as_text(value):
    """The repr of what JSON cannot take, or a constant.

    Of netaddr's classes, and those that are derived from them, the str.
    """
    try:
        if any(str(each.__module__).startswith('netaddr.')
               for each in type(value).__mro__):
            return str(value)
        return _REPR.repr(value)
    except Exception:
        return '<no repr>'


def _taken(items):
    """They, unless they are so many that there may be no end of them."""
    taken = list(itertools.islice(items, _ITEMS_MAX))
    if len(taken) == _ITEMS_MAX:
        raise ValueError
    return taken


def _primitive(value):
    """One level of what ``jsonutils.dumps`` would print, else a text.

    jsonutils would go on inside: it would empty an iterator, which is the
    caller's, and not come back from one without an end.
    """
    try:
        if isinstance(value, Exception):
            if type(value).__repr__ is Exception.__repr__:
                return '%s(%s)' % (type(value).__name__, ', '.join(
                    map(_REPR.repr, value.args)))
        elif hasattr(value, 'items'):
            return dict(_taken(value.items()))
        elif isinstance(value, bytes) or not hasattr(value, '__iter__'):
            return jsonutils.to_primitive(value, fallback=_as_text)
        elif isinstance(value, (abc.Set, abc.Sequence, abc.ValuesView)):
            return _taken(value)
    except Exception:  # nosec B110
        pass
    return _as_text(value)


def _plain(value, above=(), left=None):
    """A copy of the value that strict JSON can hold.

    Cut short where it has no end. ``above`` are the ids of what is around the
    value; ``left`` is how many containers may yet come, in a list.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        try:
            return value if int.__repr__(value) else None
        except ValueError:      # too long to print
            return '<no repr>'
    left = left or [_ITEMS_MAX]
    left[0] -= 1
    if id(value) in above or len(above) > _DEPTH_MAX or left[0] < 0:
        left[0] -= _CUT_COST
        return '...'
    above += (id(value),)
    # Not these: out of stack, it would leave nothing of them but a text.
    if type(value) not in (dict, list, tuple):
        value = _primitive(value)
    if isinstance(value, dict):
        return {_plain_key(key): _plain(item, above, left)
                for key, item in list(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(item, above, left) for item in list(value)]
    return value


def _plain_key(key):
    plain = _plain(key)
    return _as_text(key) if isinstance(plain, (dict, list)) else plain


# Ids of the containers that are being encoded, by any thread. Two that encode
# the same at once take it for a cycle, which costs them time, no more.
_markers = {}


def _make_encoder():
    """A ``json.dumps()`` that makes its C encoder once: 8.6 us, not 9.5.

    The separators are the defaults, so that a line is what the log driver
    prints, byte for byte, where nothing was masked.
    """
    if json.encoder.c_make_encoder is None:
        return json.JSONEncoder(allow_nan=False, default=_plain).encode
    encode = json.encoder.c_make_encoder(
        _markers, _plain, json.encoder.encode_basestring_ascii, None, ': ',
        ', ', False, False, False)
    return lambda value: ''.join(encode(value, 0))


_dumps = _make_encoder()

# What the Notifier puts into a message, and no more goes out.
_KEYS = ('message_id', 'publisher_id', 'event_type', 'priority', 'payload',
         'timestamp')

# What may be half of a surrogate pair, or only look like it; and, to tell, any
# escape: one with a group is to stay.
_LONE = re.compile(rb'\\(?:ud(?:[89ab]..(?!\\ud[c-f])'
                   rb'|[c-f](?<!\\ud[89ab]..\\ud.))|\\ud[89a-f])')
_ESCAPE = re.compile(rb'\\(?:(ud[89ab]..\\ud[c-f]..|[^u])|ud[89a-f]..)')


def _encode(message, mask=False):
    """Serialize a notification to one line of ASCII, LF included.

    It is valid JSON (RFC 8259) whatever the payload. All drivers share the
    message, and messagingv2, if it comes first, adds the request context,
    tokens included: see _KEYS.
    """
    if len(message) > len(_KEYS):
        message = {key: message[key] for key in _KEYS if key in message}
    try:
        return _line(message, mask)
    except Exception:
        _markers.clear()    # for it stopped in the middle
        return _line(_plain(message), mask)


def _line(message, mask):
    text = _dumps(message)
    if mask:    # what was made of it: a network would be walked for ever
        text = _dumps(strutils.mask_dict_password(json.loads(text)))
    line = text.encode('ascii') + b'\n'
    if b'\\' in line and _LONE.search(line):    # jq would stop there for good
        line = _ESCAPE.sub(
            lambda found: found[0] if found[1] else b'\\ufffd', line)
    return line


def _record(event_type, **payload):
    """A line of our own, which reads like any notification."""
    return _encode({'message_id': str(uuid.uuid4()),
                    'publisher_id': 'notifications.%s.%d' % (
                        socket.gethostname(), os.getpid()),
                    'event_type': event_type,
                    'priority': 'WARN',
                    'payload': payload,
                    'timestamp': str(timeutils.utcnow())})


def _lost_record(lost, reason):
    return _record('notifications.lost', lost=lost, reason=reason)


# -- options ----------------------------------------------------------------

_GROUP = 'oslo_messaging_notifications'

_OPTS = [
    cfg.StrOpt('sock_path',
               sample_default='/run/<service>/notifications.sock',
               help='Path of the socket on which the unix driver publishes '
                    'notifications, or a unix:// URI of it. It must be '
                    'absolute and at most 101 bytes long. Its directory must '
                    'be writable by the user of the service alone. Required '
                    'by the unix driver.'),
    cfg.StrOpt('sock_mode',
               default='0660',
               help='Permission bits of the socket, in octal. A subscriber '
                    'needs write permission to connect.'),
    cfg.StrOpt('sock_group',
               help='Name or number of the group that owns the socket. While '
                    'the group does not exist, or the service may not give '
                    'the socket to it, there is no socket.'),
    cfg.IntOpt('sock_max_subscribers',
               default=64,
               help='Number of subscribers that may be connected at a time. '
                    'One more is refused with a reason, or takes the place '
                    'of a user who has at least two more than its own.'),
    cfg.IntOpt('sock_buffer_size',
               default=8 * 1024 * 1024,
               help='Number of bytes that a subscriber may lag behind before '
                    'it loses the oldest notifications; at least 65536. It '
                    'bounds the memory of the process, however many '
                    'subscribers there are.'),
    cfg.BoolOpt('sock_mask_secrets',
                default=False,
                help='Mask passwords and tokens in notifications, as the log '
                     'driver does. This takes about ten times as long as the '
                     'rest, and also rewrites harmless keys such as '
                     'token_count.'),
]


def register_opts(conf):
    """Register the options of the unix driver.

    An option that is already registered under the name is used as it is: a
    vendored copy of this module may differ in the help text.

    :param conf: where to register
    :type conf: oslo_config.cfg.ConfigOpts
    """
    for opt in _OPTS:
        # No log: notify() may be what called, see _late_hub().
        with contextlib.suppress(cfg.DuplicateOptError):
            conf.register_opt(opt, group=_GROUP)


def list_opts():
    """List the options for the sample configuration generator.

    :returns: a list of (group name, options) tuples
    """
    return [(_GROUP, copy.deepcopy(_OPTS))]


_Settings = collections.namedtuple('_Settings', (
    'path', 'mode', 'group', 'max_subscribers', 'buffer_size',
    'mask_secrets'))


def _parse_path(text, limit=_PATH_MAX):
    """The path that a path or a ``unix://`` URI names, or a ValueError."""
    if not text:
        raise ValueError('not set, and the unix driver needs it')
    path = text
    if text.startswith('unix:'):
        uri = urllib.parse.urlsplit(text)
        if uri.netloc or uri.query or uri.fragment:
            raise ValueError('%r: a unix:// URI has no host, query or '
                             'fragment' % text)
        path = urllib.parse.unquote(uri.path)
    if not path.startswith('/') or path.endswith('/') or '\0' in path:
        raise ValueError('%r is not an absolute path of a file' % text)
    if any(mark in path for mark in ('<', '%(', '{')):
        raise ValueError('%r: nothing is substituted but $option; put the '
                         'name itself' % text)
    size = len(os.fsencode(path))
    if size > limit:
        raise ValueError('%r is %d bytes long; the limit is %d' % (
            text, size, limit))
    return path


def _parse_mode(text):
    if not re.fullmatch('(0o)?0*[0-7]{1,3}', text):
        raise ValueError('%r is not octal, within 0000 and 0777' % text)
    return int(text, 8)


def _at_least(limit):
    def parse(value):
        if value < limit:
            raise ValueError('%d is less than the limit, %d' % (value, limit))
        return value
    return parse


def _read_settings(conf):
    """Read and check the options; a ValueError names one and its limit."""
    group = conf[_GROUP]    # hides what goes wrong: out here, no option is it

    def read(name, parse=lambda value: value):
        try:
            return parse(group[name])
        except (ValueError, cfg.Error) as error:    # type, $option
            raise ValueError('Option %s of [%s]: %s' % (name, _GROUP, error))

    return _Settings(read('sock_path', _parse_path),
                     read('sock_mode', _parse_mode),
                     read('sock_group') or None,
                     read('sock_max_subscribers', _at_least(1)),
                     read('sock_buffer_size', _at_least(64 * 1024)),
                     read('sock_mask_secrets'))


# -- the lock and the socket file -------------------------------------------

_no_forks = {}      # by pid: a child's are not held by its parent's threads


def _no_fork():
    """The lock that is held during a fork.

    And while a descriptor is opened and put where abandon() finds it. A child
    that did not know that it holds the lock of a path would keep everybody
    from leading after the parent's death; one that holds a listener, or a
    connection, would keep others waiting. Held, too, while the loop logs: the
    buffer of a stream that is being written to stays locked in the child.
    """
    return _no_forks.setdefault(os.getpid(), threading.RLock())


def _identity(info):
    """What tells a file from another that takes its path, or its inode.

    Of a socket, mtime is when it was bound; chmod and chown change ctime.
    """
    return [info.st_dev, info.st_ino, info.st_mtime_ns]


def _file_id(file):
    """What tells an open file from another that gets its number.

    None of an eventfd, say: all of those share one inode.
    """
    info = os.fstat(file.fileno())
    return _identity(info)[:2] if stat.S_IFMT(info.st_mode) else None


def _is_at(path, identity):
    """Whether the path is the file, which may be written to, as a lock is."""
    try:
        return _identity(os.lstat(path))[:2] == identity[:2]
    except OSError:
        return False


class _Lock:
    """The lock on ``<sock_path>.lock``: who holds it owns the path.

    A lock, since a connect probe lies: a forked child keeps a dead service's
    listener connectable. flock, since a POSIX lock vanishes when any
    descriptor of the file is closed, and two copies of this module in one
    process would both get it. The file holds, in JSON, the pid of its owner,
    until that leaves in good order, and the identity of what the owner bound.
    It is never removed: removing it while another process waits for it would
    make two owners.
    """

    def __init__(self, path):
        self.path = path
        self.fd = None

    def acquire(self):
        """Take the lock, or raise OSError; BlockingIOError if it is held."""
        self._refuse_root()
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                          | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            self._take(os.fstat(self.fd))
        except OSError:
            self.close()
            raise
        return self

    def fileno(self):
        return -1 if self.fd is None else self.fd

    def _refuse_root(self):
        """Keep root out of a service's directory, before it creates a file.

        A lock left behind by a management command that runs as root would
        shut the service out for good, and what root opens, chowns or removes
        there is what the service's user put there.
        """
        owner = os.stat(os.path.dirname(self.path)).st_uid
        if os.geteuid() == 0 and owner != 0:
            raise PermissionError(
                errno.EPERM, 'root does not serve in a directory that '
                'belongs to uid %d' % owner, os.path.dirname(self.path))

    def _take(self, info):
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise OSError(errno.EINVAL, 'not a regular file with one link',
                          self.path)
        if info.st_uid != os.geteuid():
            raise PermissionError(
                errno.EPERM, 'the lock belongs to uid %d' % info.st_uid,
                self.path)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # By whoever can open it, if only to read.
            owner = self.read().get('pid')
            known = isinstance(owner, int) and owner < 2 ** 32
            raise BlockingIOError(
                error.errno, 'held; its last owner was process %s'
                % (owner if known else 'unknown'), self.path)
        if not self.intact():
            raise BlockingIOError(
                errno.EAGAIN, 'replaced as we took it', self.path)

    def read(self):
        """What the last owner left: its pid, identities by path."""
        try:
            return dict(json.loads(os.pread(self.fd, 4096, 0)))
        except (ValueError, TypeError, RecursionError):
            return {}   # new, or its owner died as it wrote

    def write(self, bound):
        """Name the owner and what it bound, for who comes after a crash."""
        self._write(os.getpid(), {each.path: each.identity for each in bound})

    def vacate(self):
        """Note that the owner leaves in good order: it owes nobody a line."""
        self._write(None, {})

    def vacated(self):
        """Whether the last owner did; not if the file was lost meanwhile."""
        return self.read().get('pid', 'unknown') is None

    def _write(self, pid, identities):
        record = dict(self.read(), pid=pid, **identities)
        data = json.dumps(record).encode('ascii')
        if os.pwrite(self.fd, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        os.ftruncate(self.fd, len(data))

    def intact(self):
        """Whether the lock is held, and on the file that others would open."""
        return self.fd is not None and _is_at(
            self.path, _identity(os.fstat(self.fd)))

    def close(self):
        """Only close: LOCK_UN in a forked child would free the parent's."""
        with _no_fork():    # a child would close what has the number by then
            if self.fd is not None:
                os.close(self.fd)
                self.fd = None


class _Bound:
    """A socket, the path it is bound to, and the identity of the file."""

    def __init__(self, path, sock, identity):
        self.path = path
        self.sock = sock
        self.identity = identity

    def intact(self):
        """Whether the path is still our file."""
        return _is_at(self.path, self.identity)

    def unlink(self):
        """Remove the file, if it is still ours.

        If we cannot, the next owner will, by the identity in the lock.
        """
        with contextlib.suppress(OSError):
            if self.intact():
                os.unlink(self.path)


def _bind(sock, path, mode, lock, gid=None, backlog=None):
    """Bind the socket; who connects is refused until it listens.

    Mode and group are set in between, so that nobody slips in, and the
    umask, which belongs to the whole process, is left alone. The lock names
    it, for who comes after a crash.

    :param backlog: that it is to listen with, at last
    :raises: OSError, naming the path; nothing is left behind
    """
    bound = file = None
    try:
        sock.setblocking(False)
        now = time.time()
        sock.bind(path)
        # Of what was bound, not of what the name says by now: whoever may
        # write to the directory may have made it a link to another file.
        file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        bound = _Bound(path, sock, _new_socket(os.fstat(file), now))
        name = '/proc/self/fd/%d' % file
        if not os.path.lexists(name):
            raise OSError(errno.ENOENT, 'no /proc, by which to set its mode')
        if gid is not None:     # a sandbox may forbid even to change nothing
            os.chown(name, -1, gid)
        os.chmod(name, mode)
        lock.write([bound])
        if backlog is not None:
            sock.listen(backlog)
        return bound
    except OSError as error:
        if bound is not None:
            bound.unlink()
        sock.close()
        raise OSError(error.errno, error.strerror, path)
    finally:
        if file is not None:
            os.close(file)


def _new_socket(info, now):
    """The identity of a socket that we have just bound; else an OSError."""
    # The clock of a file system may be behind, by a second if it is coarse.
    if not (stat.S_ISSOCK(info.st_mode) and info.st_uid == os.geteuid()
            and info.st_mtime > now - 1):
        raise OSError(errno.EEXIST, 'replaced as it was bound')
    return _identity(info)


def _is_socket(*paths):
    """Whether a socket is at any of the paths."""
    for path in paths:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                return True
    return False


def _answers(path):
    """Whether a process listens at the path."""
    with _no_fork(), _unix_socket() as probe:   # a child would subscribe
        probe.setblocking(False)
        # EAGAIN: its backlog is full. Whatever else: not ours.
        return probe.connect_ex(path) not in (errno.ECONNREFUSED,
                                              errno.ENOENT)


def _clear(path, left):
    """Remove a dead owner's socket, if it is at the path. Needs the lock.

    What the last owner bound, and ``left``, is dead, for we have its lock,
    even if a child of it still answers. Anything else that is in the way
    raises OSError, and is kept.
    """
    try:
        info = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise FileExistsError(
            errno.EEXIST, 'not a socket, so it is left alone', path)
    if _identity(info) != left and _answers(path):
        raise OSError(errno.EADDRINUSE, 'the socket of another program that '
                      'is alive, so it is left alone', path)
    os.unlink(path)


def _gid(group):
    """The number of the group, or None. May be slow; raises OSError."""
    if group is None:
        return None
    with contextlib.suppress(KeyError):
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        if gid < 2 ** 32 - 1:   # that one leaves the group as it is
            return gid
    raise OSError(errno.EINVAL, 'sock_group: no such group', group)


# -- the backlog ------------------------------------------------------------

class _Chunk:
    """Some lines, as all subscribers send them, and the way to the next.

    A chunk without a next one is the tail: empty, and filled in place.
    """

    __slots__ = ('data', 'lost', 'start', 'first', 'next')

    def __init__(self, start, first):
        self.start = start  # bytes before it, since the backlog began
        self.first = first  # notifications before it, likewise
        self.data = b''
        self.lost = 0       # notifications that it, a record, stands for
        self.next = None

    def preceded(self, first, data, lost):
        """A chunk that one subscriber alone sends, before this one."""
        chunk = _Chunk(self.start, first)
        chunk.data, chunk.lost, chunk.next = data, lost, self
        return chunk


class _Backlog:
    """What subscribers have yet to send: a linked list of chunks.

    Pure, and the loop's alone. A subscriber holds the chunk that it is at,
    and thereby all that follow: what everybody has sent, or comes while
    there is nobody, is freed by itself. What keeps it within its bound is
    that a subscriber that is further behind than ``limit`` moves on (see
    ``_Subscriber.trim``).
    """

    def __init__(self, limit):
        self.limit = limit
        self.tail = _Chunk(0, 0)

    def append(self, data, lines, lost=0):
        """Add a chunk of whole lines, or a record of losses."""
        chunk = self.tail
        chunk.data, chunk.lost = data, lost
        chunk.next = self.tail = _Chunk(
            chunk.start + len(data) + _CHUNK_COST,
            chunk.first + lines + lost)

    def extend(self, batch):
        """Add lines, in chunks of at most _CHUNK_MAX bytes or one line."""
        lines = list(filter(None, batch))   # without the pads
        ends = list(itertools.accumulate(map(len, lines)))
        low = base = 0
        while low < len(lines):
            high = max(low + 1, bisect.bisect_right(
                ends, base + _CHUNK_MAX, low))
            self.append(b''.join(lines[low:high]), high - low)
            low, base = high, ends[high - 1]

    def behind(self, chunk):
        """How many bytes a subscriber that is at the chunk holds."""
        return self.tail.start - chunk.start


class _Subscriber:
    """A connected socket, and a cursor in the backlog. The loop's alone."""

    def __init__(self, sock, backlog, who, uid=None):
        self.sock = sock
        self.who = who
        self.uid = uid
        self.mask = 0           # what the selector watches
        self.blocked = False    # the kernel takes no more for now
        self.half_closed = False    # it will send no more, but reads on
        self.discarded = 0      # bytes it sent us
        # The cursor.
        self.chunk = backlog.tail
        self.offset = 0         # bytes of the chunk that were sent
        # The account, in notifications: see received().
        self.joined = self.chunk.first
        self.lost = 0           # reported as lost
        self.lagging = None     # ``lost`` when it began to lag

    def wanted(self):
        """What the selector is to watch."""
        return (0 if self.half_closed else selectors.EVENT_READ) | (
            selectors.EVENT_WRITE if self.blocked else 0)

    def pending(self):
        """Whether there is anything to send."""
        return self.chunk.next is not None

    def chunks(self):
        """What there is to send."""
        chunk = self.chunk
        while chunk.next:
            if not chunk.data:      # of a record that trim() has put there
                chunk.data = self.lost_line(chunk.lost)
            yield chunk
            chunk = chunk.next

    def flush(self, keep_gil=False):
        """Send once, what the kernel takes; an OSError: the peer is gone.

        :param keep_gil: whether to, in a send that is short
        """
        chunk, sent = self.chunk, 0
        try:
            # A service may have restored SIGPIPE, which would kill it.
            if self.offset or not chunk.data or chunk.next.next:
                buffers = self._buffers()
                size = sum(map(len, buffers))
                sent = self.sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
            else:       # one chunk, whole, as it mostly is: 2 us, not 2.9
                size = len(chunk.data)
                sent = (_send_short(self.sock, chunk.data)
                        if keep_gil and size <= _SHORT else
                        self.sock.send(chunk.data, socket.MSG_NOSIGNAL))
        except BlockingIOError:
            pass
        self.blocked = sent < size
        self._advance(sent)

    def lost_line(self, lost):
        return _lost_record(lost, 'subscriber too slow')

    def _buffers(self):
        """What comes next, up to about _SEND_MAX bytes."""
        buffers, size = [], 0
        for chunk in self.chunks():
            buffers.append(chunk.data)
            # Small chunks count for more: the kernel takes 1024 at a time.
            size += max(len(chunk.data), _SEND_MAX // 512)
            if size >= _SEND_MAX:
                break
        if self.offset:
            buffers[0] = memoryview(buffers[0])[self.offset:]
        return buffers

    def _advance(self, sent):
        self.offset += sent
        # Not beyond a record that has yet to be written, nor the tail.
        while self.chunk.data and self.offset >= len(self.chunk.data):
            self.offset -= len(self.chunk.data)
            self.lost += self.chunk.lost
            self.chunk = self.chunk.next

    def received(self):
        """How many were sent: what is before the cursor and was not lost."""
        return (self.chunk.first - self.joined - self.lost
                + self.chunk.data.count(b'\n', 0, self.offset))

    def trim(self, backlog):
        """Skip the oldest lines if too far behind; whether any were.

        A line that is half sent goes whole. The newest chunk is kept in any
        case, so that a notification that is larger than the buffer reaches
        who is ready for it.
        """
        here = chunk = self.chunk
        while backlog.behind(chunk) > backlog.limit and chunk.next.next:
            chunk = chunk.next
        if chunk.start == here.start:   # what precedes it starts there, too
            return False
        data, sent = here.data, self.offset
        start = end = data.rfind(b'\n', 0, sent) + 1
        if start < sent:
            end = data.index(b'\n', sent) + 1
        # A line counts for one; a record, which is a chunk, for more.
        first = here.first + data.count(b'\n', 0, start)
        after = (here.next.first if 0 < end == len(data)
                 else here.first + data.count(b'\n', 0, end))
        lost = chunk.first - after
        if lost:
            chunk = chunk.preceded(after, b'', lost)
        if start < sent:
            chunk = chunk.preceded(first, data[start:end], here.lost)
        self.chunk, self.offset = chunk, sent - start
        return lost > 0

    def listen(self):
        """Discard what the peer sent; why it must part, or None."""
        try:
            data = _recv(self.sock, _DISCARD_MAX)
        except BlockingIOError:
            return None
        except PermissionError as error:
            return error.strerror
        except OSError:
            return 'it is gone'
        self.discarded += len(data)
        self.half_closed = not data
        if self.half_closed and not self.alive():
            return 'it is gone'
        if self.discarded > _DISCARD_MAX:
            return 'it sent more than %d bytes' % _DISCARD_MAX
        return None

    def alive(self):
        """Whether the peer is there; the end of its stream does not tell."""
        return _libc.send(self.sock.fileno(), b'', ctypes.c_size_t(0),
                          socket.MSG_NOSIGNAL) == 0


def _peer(sock):
    """The pid and the uid of who connected, or else of who listens."""
    return struct.unpack('3i', sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[:2]


# -- the loop ---------------------------------------------------------------

_ONE = struct.pack('Q', 1)
_count = ctypes.create_string_buffer(len(_ONE))     # of sets; nobody looks


class _Event:
    """An eventfd: readable while it is set. Half a socketpair's cost."""

    def __init__(self, fd=None):
        self._fd = -1 if fd is None else fd
        if fd is None:
            # On the number of a new socket, for eventlet hears of those: in
            # a forked child it believes that numbers which we closed are
            # still waited for, and would raise at every wait for this one.
            with socket.socket(socket.AF_UNIX) as new:
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._fd = new.detach()     # or a green one would close it
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    def close(self, _close=os.close):   # there is no ``os`` at the very end
        """Only where no thread can be about to write to it.

        Else the last reference closes it, which such a thread holds: it must
        not write to whatever gets the number next.
        """
        fd, self._fd = self._fd, -1     # None would be 0 to write()
        if fd >= 0:
            _close(fd)

    __del__ = close

    def fileno(self):
        return self._fd

    def set(self):
        """Any thread; it keeps the GIL."""
        _libc.write(self._fd, _ONE, ctypes.c_size_t(len(_ONE)))

    def clear(self):
        # Under eventlet, after a fork, one is reported that is not set, for
        # which this fails.
        _libc.read(self._fd, _count, ctypes.c_size_t(len(_ONE)))


class _Gate:
    """What notify() asks before it serializes: is anybody there?

    ``open`` is the loop's answer. While it is False, the kernel knows of
    those who have connected and whom the loop has not met yet.

    No subscriber is missed. notify() finds the gate shut, looks, finds
    nothing, and reads the gate again; let G be that moment. If the loop
    opened the gate before G, notify() sees it. If it did so after G, it
    accepted after the look, so the look would have found the connection
    waiting. A look that was too late for its gate, which was replaced, sees
    the new gate at G. (A number that was closed and taken by another file
    can make a look say yes, which only costs a line to the loop.)
    """

    def __init__(self, look=bool, is_open=False):
        self.open = is_open
        self.look = look        # any thread; bool() is False


def _poll(*filenos):
    """A look at descriptors, in this order; 0.5 us, for it has no frame."""
    # An array of struct pollfd. All threads share it: each keeps the GIL for
    # the whole of the call.
    pollfds = ctypes.create_string_buffer(b''.join(
        struct.pack('ihh', fileno, select.POLLIN, 0) for fileno in filenos))
    # Without an object for the number, of which Linux reads an int.
    return functools.partial(
        _libc.poll, ctypes.byref(pollfds), len(filenos), 0)


def _keep_all():
    """A look of who does not know: somebody may be there."""
    return True


class _Backoff:
    """When to try again: from 10 ms, doubling to 1 s, jittered.

    Jittered, so that workers that lost the same thing do not march in step.
    """

    MAX = 1

    def __init__(self):
        self.delay = 0
        self.at = None          # time.monotonic(), or None when all is well

    clear = __init__

    def fail(self):
        self.delay = min(max(2 * self.delay, 0.01), self.MAX)
        jitter = random.uniform(0.5, 1)  # nosec B311
        self.at = time.monotonic() + self.delay * jitter

    def for_long(self):
        """Whether it has for about a second, and is at its longest delay."""
        return self.delay >= self.MAX


def _now():
    return time.strftime('%Y-%m-%d %H:%M:%S')


class _Lasting:
    """A trouble: since when it lasts, and when to say so again."""

    def __init__(self):
        self.since = _now()
        self._delay = _AGAIN
        self._next = time.monotonic() + _AGAIN

    def due(self):
        if time.monotonic() < self._next:
            return False
        self._delay = min(2 * self._delay, _AGAIN_MAX)
        self._next = time.monotonic() + self._delay
        return True


class _Log:
    """What a hub tells: who serves the path, and what keeps it from that.

    A trouble is told of again while it lasts, at a try that is made anyway;
    who serves, when the path is looked after.
    """

    def __init__(self, path):
        self._path = path
        self.unsaid = None      # records, while nothing may be logged
        self._state = None      # who serves
        self.due = math.inf     # time.monotonic() to say that again
        self._forget()

    def _forget(self):
        self._kinds = set()     # of troubles that were told of
        self._tries = 0

    def say(self, level, text, *args, exc_info=None):
        record = (level, 'Notifications on %s: ' + text, self._path, *args)
        if self.unsaid is not None:
            self.unsaid.append(record)
            return
        with _no_fork():
            LOG.log(*record, exc_info=exc_info)

    def serves(self, state, anew=True):
        """Who serves from now on; it is told if it is new."""
        if anew or state != self._state:
            self._state, self._began = state, _now()
            self.due = time.monotonic() + _AGAIN
            self.say(logging.INFO, '%s', state)

    def fault(self, error, exc_info=None):
        """Something failed, and will be tried again."""
        kind, more = (type(error), getattr(error, 'errno', None),
                      getattr(error, 'filename', None)), ''
        self._tries += 1
        self._last = str(error)
        if not self._kinds:
            self._trouble = _Lasting()
        elif kind in self._kinds:
            if not self._trouble.due():
                return
            more = ' since ' + self._trouble.since
        self._kinds.add(kind)
        self.say(logging.WARNING, '%s; trying again%s', error, more,
                 exc_info=exc_info)

    def well(self):
        """Nothing failed."""
        if self._kinds:
            self.say(logging.WARNING, 'all is well again: %s; tried %d times '
                     'since %s: %s', self._state, self._tries,
                     self._trouble.since, self._last)
            self._forget()
        elif time.monotonic() > self.due:
            self.due = time.monotonic() + _DAY
            self.say(logging.INFO, '%s, since %s', self._state, self._began)


class _Visits:
    """The log of who comes and goes: a line a second, at most.

    For whoever may connect may do so in a loop. The first are told of when
    their turn ends, the others when the second is over.
    """

    def __init__(self, say):
        self._say = say
        self._next = 0          # no line sooner
        self._forget()

    def _forget(self):
        self.at = None          # when there is something to tell, if there is
        self.came = 0           # how many, since the last line
        self._texts = []
        self._events = collections.Counter()
        self._peers = collections.Counter()

    def note(self, event, who, more=''):
        if len(self._texts) < _VISITS_NAMED:
            self._texts.append('subscriber %s: %s%s' % (event, who, more))
        self._events[event] += 1
        self._peers[who] += 1
        self.came += event != 'parted'
        self.at = self._next

    def tell(self):
        """Log what was noted; returns whether it is a crowd that comes."""
        if self._events.total() > len(self._texts):
            self._texts = ['subscribers %s; most often %s' % (
                ', '.join('%s: %d' % each for each in self._events.items()),
                '; '.join('%s: %d times' % each
                          for each in self._peers.most_common(3)))]
        if self._texts:
            self._say(logging.INFO, '; '.join(self._texts))
        crowd = self.came > _CROWD
        self._next = time.monotonic() + _VISITS_INTERVAL
        self._forget()
        if crowd:
            self.at = self._next    # look again
        return crowd


class _Token:
    """The turn: who has it does the loop's work, and no other thread does.

    The loop has it from its waking to its sleeping, notify() for a single
    send, if it can be had. No lock: monkey patching makes those green, and
    of green threads and native ones both may call notify().
    """

    def __init__(self):
        self.free = collections.deque([True])   # empty while someone has it

    def __enter__(self):
        while True:
            try:
                return self.free.pop()
            except IndexError:
                time.sleep(_GIVE_WAY)   # for notify() to send

    def __exit__(self, *_exception):
        self.free.append(True)

    def outwait(self, seconds):
        """Wait so long for who has it, and then take it for gone.

        At exit, for the handler of a signal may run the exit handlers amid
        notify(); and in a forked child, which does not have that thread.
        """
        until = time.monotonic() + seconds
        while not self.free and time.monotonic() < until:
            time.sleep(_GIVE_WAY)
        if not self.free:
            self.free = collections.deque([True])


class _Hub:
    """All drivers of a process on one path: one queue, one loop.

    emit(), drop(), start() and close() are for any thread, and never block
    but for close(). The rest runs in the loop: in its thread or, once that
    has ended, in close(). A test may call _turn() without any thread.
    """

    def __init__(self, settings):
        self.settings = settings
        self._log = _Log(settings.path)
        self._say = self._log.say
        self._pid = os.getpid()     # whose it is; None in a forked child
        # Any thread.
        self._queue = collections.deque()   # lines, and pads (None)
        self._room = self.settings.buffer_size // _QUEUE_UNIT
        self._ahead = self._room // 2   # from here on they give way
        self._drops = itertools.count()     # next() is atomic, += is not
        self._gap = None        # the last drop, or one of the last
        self._gap_seen = None   # by the loop: nothing is queued till then
        self._asleep = True     # the loop must be woken, or started
        self._gate = _Gate(_keep_all, True)     # until the first claim
        self._starting = threading.Lock()   # tried, never waited for
        self._thread = self._waker = None
        self._no_thread = None  # why there was none
        self._token = _Token()      # of whoever has the turn
        self._closing = False
        self._checked = time.monotonic()    # when the path was looked after
        # Whoever has the turn: mostly the loop.
        self._credit = 0        # time.monotonic() until which it is used up
        self._selector = self._bound = None
        self._files = weakref.WeakKeyDictionary()   # all, from _own()
        self._lock = _Lock(self.settings.path + '.lock')
        self._handed = []       # RELAY's joint: chunks from other processes
        self._subscribers = {}  # an ordered set
        self._backlog = _Backlog(self.settings.buffer_size)
        self._rest = None       # a line, and how much of it was handed over
        self._unsent = False    # someone may be sent more at once
        self._late = False      # others want the GIL: it is kept where it can
        self._retry = _Backoff()    # for the path
        self._reserve = None    # a descriptor to give up when there is none
        self._starved = None    # accepting fails for want of descriptors
        self._recovered = False     # it did, which is yet to be told
        self._visits = _Visits(self._say)
        self._visited = False   # by someone who came, went or talked
        self._rested = self._worked = 0     # see _slow_down()
        self._listens = _BACKLOG    # what the kernel was told
        self._held = _BACKLOG   # how many it may hold by now
        self._swept = False     # of those who are gone, in this turn
        self._refusals = {}     # records of this turn
        self._pause = _Backoff()    # and refusing fails, too
        self._drops_read = 0    # what next(_drops) gives if none was since
        self._lost = 0          # drops that a record is due for

    # Any thread.

    def emit(self, message):
        """Queue a notification for whoever is connected; else drop it."""
        gate = self._gate
        if not gate.open and not self._anyone(gate):
            return
        queued = len(self._queue)
        if self._gap is not self._gap_seen or queued >= self._room:
            self.drop()
            return
        line = _encode(message, self.settings.mask_secrets)
        if self._gap is not self._gap_seen or len(line) > _LINE_MAX:
            self.drop()
            return
        if queued or len(line) > _SHORT or not self._hand_over(line):
            # In one step, so that the loop never finds a line without pads;
            # and no call, after which a signal's handler might raise.
            queue = self._queue
            queue += (line,) + (None,) * (len(line) // _QUEUE_UNIT)
        elif self._rest is None:
            return
        # The loop raises the flag before it looks at the queue for the last
        # time. We append before we read the flag. One sees the other.
        try:
            if self._asleep:
                self._wake()
            if queued > self._ahead:
                self._give_way()
        except Exception:  # nosec B110
            pass        # out of stack; it is queued, and the next one wakes

    def _hand_over(self, line):
        """Send the line here and now, if that plainly can be; whether it was.

        Then it is out of this process, whatever becomes of that. It saves the
        waking and the loop's wait for the GIL, too. Only to a single stream,
        which is not behind: all else is left to the loop, as are errors and
        the rest of a line.
        """
        if len(self._subscribers) != 1:     # _ready() looks again, with the
            return False                    # turn, which would be for nothing
        now, size, sent = time.monotonic(), len(line), []
        free = self._token.free
        if not free or self._credit - now > _HAND_OVERS * _HAND_OVER_TIME:
            return False
        try:
            # A signal's handler may raise after any call, which this is not.
            del free[0]
        except IndexError:      # another thread was faster
            return False
        try:
            try:
                stream = self._ready()
                if stream is None:
                    return False
                self._credit = max(self._credit, now) + _HAND_OVER_TIME
                # What map() calls has left its result in the list by then.
                sent.extend(map(_libc.send, (stream.sock.fileno(),), (line,),
                                (ctypes.c_size_t(size),), (_AT_ONCE,)))
            finally:    # without a call, or a frame, until all is noted
                if sent and sent[0] == size:
                    self._backlog.tail.first += 1   # as if it had been there
                elif sent and sent[0] > 0:
                    self._rest = line, sent[0]
                free.append(True)
            if now - self._checked > _CHECK_INTERVAL and self._asleep:
                self._wake()    # to look after the path: see _turn()
        except BaseException as error:
            if self._rest is not None:
                self._wake()
            if not sent or not isinstance(error, Exception):
                raise
        return sent[0] > 0

    def _ready(self):
        """The only stream, if it was sent all there was, and none waits.

        Whatever this thread emitted before is in the queue, or else pending,
        or was sent: the loop moves it while it has the turn, which is ours.
        """
        if len(self._subscribers) != 1 or self._waiting():
            return None
        stream = next(iter(self._subscribers))
        if stream.blocked or stream.pending():
            return None
        return stream if self._none_waits() else None

    def _none_waits(self):
        """Whether nobody has connected who must be accepted first."""
        return not self._gate.look()

    def _anyone(self, gate):
        """See _Gate for why nobody is missed."""
        while not gate.look():
            if gate is self._gate and not gate.open:
                if time.monotonic() - self._checked > _CHECK_INTERVAL:
                    self._wake()
                return False
            gate = self._gate
            if gate.open:
                break
        return True

    def drop(self):
        """Count a notification for which there is no room, at its place.

        It opens a gap, behind which nothing is queued until the loop has
        looked: at the gap, the count and the length of the queue, in this
        order, before it closes the gap. So a gap that it saw is in the count,
        and the record goes behind what is due: all that a thread queued
        before it dropped something, and nothing that it queues later.
        """
        for self._gap in self._drops:
            break       # no call, after which a signal's handler might raise
        try:
            if self._asleep:
                self._wake()
            if self._gap % _BATCH == _BATCH - 1:
                self._give_way()    # it takes 0.5 us, the loop waits for 5 ms
        except Exception:  # nosec B110
            pass        # as in emit(); it is counted

    def _give_way(self):
        """Let the loop have the GIL.

        A system call of the loop costs it the GIL for up to 5 ms while we
        run flat out. Not when sleep is patched: that would switch to other
        green threads, in the middle of the caller's.
        """
        if not _is_patched():
            time.sleep(_GIVE_WAY)

    def _wake(self):
        waker = self._waker
        if waker is None:
            self.start()    # the flag stays up: it may fail
            return
        # Lowered first. After the loop has woken it is the loop's to raise;
        # to lower it then would leave the loop asleep with the flag down.
        self._asleep = False
        try:
            waker.set()
        except BaseException:   # out of stack, or a signal handler raises
            self._asleep = True     # or nobody would wake it again
            raise

    def start(self):
        """Start the loop, if need be. Never raises.

        Without a thread to be had (3.12 has none at exit) a later line
        tries again, and close() does what is left to do.
        """
        if self._closing or not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None and (
                    time.monotonic() > (self._retry.at or 0)):
                # Known before it starts: a signal handler may raise as we
                # wait for it to run.
                self._thread = threading.Thread(
                    target=self._run, name='unix-notifier', daemon=True)
                _start(self._thread)
                # A child of multiprocessing leaves without atexit. It runs
                # its finalizers, which its bootstrap clears: not sooner.
                if process.parent_process() is not None:
                    util.Finalize(None, self.close, exitpriority=0)
        except RuntimeError as error:
            self._thread, self._no_thread = None, error
            self._retry.fail()
            self._checked = time.monotonic()
            self._shut(error)
        finally:
            self._starting.release()

    def close(self):
        """Send what is queued, for a second at most, and free the path."""
        if self._closing or self._pid != os.getpid():
            return
        self._closing = True
        deadline = time.monotonic() + _EXIT_TIME
        self._token.outwait(_EXIT_STALL)
        if self._thread is not None:
            if self._waker is not None:
                self._waker.set()
            with contextlib.suppress(RuntimeError):     # it never started
                self._thread.join(_EXIT_TIME)
            if self._thread.is_alive():
                return      # stuck in a log handler, say; leave it its state
        if self._thread is not None or self._selector or self._waiting():
            self._leave(deadline)

    def abandon(self, certain):
        """In a forked child: leave to the parent what is its own.

        It only closes: to unregister, unlock or shut down would reach the
        parent, who shares all that. It does not log: locks may be held.

        :param certain: whether nobody can have closed our numbers meanwhile,
                        nor have been given them anew
        """
        self._pid = None    # a green thread survives a fork, and looks
        self._token.outwait(0)  # it may wait for one that does not
        files = dict(self._files)
        if certain:     # to the last reference: no other thread is here
            files.update(dict.fromkeys((self._selector, self._waker)))
        for each, identity in files.items():
            with contextlib.suppress(OSError, AttributeError):
                if (identity == _file_id(each) if identity else certain):
                    each.close()
        if not certain:     # what is open must not be closed by its object
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def _own(self, make, *args):
        """A new file of ours, which a forked child is sure to know of."""
        with _no_fork():
            file = make(*args)
            self._files[file] = _file_id(file)
        return file

    def _close_files(self):
        for each in (*self._files, self._selector):
            if each is not None:
                with contextlib.suppress(OSError):  # closed by others
                    each.close()

    # The loop.

    def _run(self):
        if self._no_thread is not None:
            self._log.fault(self._no_thread)    # notify() could not
        while not self._closing and self._pid == os.getpid():
            try:
                if self._waker is None:
                    with _no_fork():
                        self._waker = _Event()
                    continue    # close() did not have it to set
                self._turn()
            except Exception as error:
                if self._pid == os.getpid():
                    self._unsent = True     # whatever it was about to do
                    if self._selector is None:
                        self._checked = time.monotonic()
                        self._shut(error)
                    self._log.fault(error, not isinstance(error, OSError))
                    time.sleep(_Backoff.MAX)

    def _turn(self, limit=None):
        """Wait for something to do, at most ``limit`` seconds, and do it.

        What is due came from calls that may follow any connect() that has
        returned. So: see how much is due, then accept who has come, then
        take what is due.

        :returns: whether there was anything to do
        """
        if self._selector is None:
            with self._token:
                self._open()
        events = self._wait(limit)
        self._look_at_path()
        with self._token:
            self._stay()
            return self._work([(key.data, mask) for key, mask in events])

    def _work(self, events):
        """Do what is to be done; events are (callback or None, mask)."""
        if self._rest is not None:
            line, sent = self._rest
            self._backlog.append(line, 1)
            for stream in self._subscribers:
                stream.offset = sent
            self._rest = None
        for callback, mask in events:
            if callback is not None:
                callback(mask)
        self._look_after_path()
        due = self._count()
        handed, self._handed = self._handed, []
        # Looked at now, whatever was reported before.
        if self._bound is not None and (
                self._pause.at or self._gate.look()):
            self._accept()
        self._take(due, handed)
        self._flush()
        if handed:
            self._ahead = _BATCH    # others need the loop as much as we do
        self._set_open(bool(self._subscribers))     # lowered here alone
        if self._visits.at is not None and self._visits.at < time.monotonic():
            self._tell_visits()
        return bool(events or due or handed or self._unsent)

    def _wait(self, limit):
        timeout = 0
        if not (self._waiting() or self._unsent):
            self._asleep = True
            if not self._waiting():     # after the flag: see emit()
                timeout = self._timeout(limit)
        events = self._selector.select(timeout)
        if self._visited:
            self._slow_down()
        self._asleep = False
        return events

    def _slow_down(self):
        """Let time pass if visits come without a pause; lines wait, too.

        To accept just some of those who wait, and send, would break
        connect() as the start. A fifth of the time is for work: under
        eventlet, a turn with 64 subscribers takes milliseconds.
        """
        self._visited = False
        now, worked = time.monotonic(), time.thread_time() - self._worked
        if now - self._rested - worked < 2 * _REST:
            end = min(self._rested + max(_REST, 5 * worked), now + _REST_MAX)
            # Under eventlet another event of the same wait ends the sleep.
            while (now := time.monotonic()) < end:
                time.sleep(end - now)
        self._rested, self._worked = now, time.thread_time()

    def _stay(self):
        """After a wait in which a green thread may have forked.

        They all survive it, and this one may wake in the child, which has a
        loop of its own.
        """
        if self._pid != os.getpid():
            raise RuntimeError('not the loop of this process')

    def _waiting(self):
        """Whether publishers have left anything for the loop."""
        return (bool(self._queue) or self._gap is not self._gap_seen
                or self._rest is not None)

    def _timeout(self, limit):
        due = [each.at for each in (self._retry, self._pause, self._visits)
               if each.at]
        if limit is not None:
            due.append(time.monotonic() + limit)
        return max(0, min(due) - time.monotonic()) if due else None

    def _open(self):
        if self._selector is None:
            # Looked up now: bound before monkey patching, it would block
            # all green threads of the process.
            with _no_fork():
                selector = selectors.DefaultSelector()
                if self._waker is not None:
                    selector.register(self._waker, selectors.EVENT_READ,
                                      lambda _: self._waker.clear())
                self._selector = selector
            self._check_path()

    def _set_open(self, is_open):
        self._gate.open = is_open

    # The path.

    def _look_at_path(self):
        """Look whether all is still well, before the turn is taken.

        Each system call gives up the GIL, which a busy thread returns after
        5 ms: in notify(), this took 16 ms once a second. Meanwhile that goes
        on to send. A turn that finds nothing to do has no such call, so that
        no other thread sees it, and queues what its process does not live to
        send.
        """
        now = time.monotonic()
        if (self._retry.at is None and now > self._checked + _CHECK_INTERVAL
                and self._intact()):
            self._checked = now
            self._log.well()

    def _look_after_path(self):
        if self._closing and self._bound is not None:
            return      # who leaves does not come back
        due = self._retry.at or self._checked + _CHECK_INTERVAL
        if time.monotonic() > due:
            self._check_path()

    def _check_path(self):
        """Own the path, or say once why not and when to try again."""
        self._checked = time.monotonic()
        try:
            self._claim()
        except OSError as error:
            self._trouble(error)
        else:
            self._retry.clear()
            self._log.well()

    def _intact(self):
        """Whether lock and path are still ours; 5 us."""
        return self._lock.intact() and all(
            each.intact() for each in self._owned())

    def _trouble(self, error):
        """We could not own the path: nobody can connect to us."""
        self._retry.fail()
        if self._bound is None:
            self._shut(error)
        self._log.fault(error)

    def _shut(self, error):
        """Have nothing kept for who cannot connect."""
        self._gate = _Gate(is_open=bool(self._subscribers))

    def _claim(self):
        """Own the lock and the path, as they are now; or raise OSError."""
        ours = self._bound is not None and self._bound.intact()
        if not self._lock.intact():
            self._lock.close()
            try:
                self._own(self._lock.acquire)
            except BlockingIOError:
                if self._bound is not None and not ours:
                    self._resign()
                raise
            if ours:
                self._lock.write(self._owned())
        if not ours:
            self._serve()

    def _serve(self):
        """Bind and listen. What was bound before has lost the path."""
        if self._bound is not None:
            self._accept()      # who came before the path was taken away
        try:
            bound = self._listener()
        except OSError:
            self._lock.close()  # whoever can may have the path
            raise
        old, self._bound = self._bound, bound
        # In place before the old listener is closed: see _Gate.
        self._gate = _Gate(_poll(bound.sock.fileno()),
                           bool(self._subscribers))
        self._announce()
        if old is not None:
            self._close_listener(old)
        try:
            self._listens = None
            self._let_wait(_BACKLOG)
            self._watch(bound.sock)
        except OSError:
            bound.unlink()      # or it would pass for served
            raise
        self._pause.clear()
        self._keep_reserve()
        self._log.serves('served with mode %04o, group %s, by pid %d' % (
            self.settings.mode, self.settings.group or 'unchanged',
            self._pid))

    def _owned(self):
        """What a new lock file has to name."""
        return [self._bound]

    def _make_way(self, path):
        """Free the path of what the last owner of the lock bound there."""
        _clear(path, self._lock.read().get(path))

    def _listener(self):
        path = self.settings.path
        self._make_way(path)
        gid = _gid(self.settings.group)
        return _bind(self._own(_unix_socket), path, self.settings.mode,
                     self._lock, gid)

    def _announce(self):
        """RELAY's joint: before it listens, tell who looks at it."""

    def _let_wait(self, backlog):
        """Tell the kernel how many may wait at the listener, less one."""
        if self._bound is not None and self._listens != backlog:
            self._listens = backlog
            self._held = max(self._held, backlog)
            self._bound.sock.listen(backlog)

    def _close_listener(self, bound):
        # First: a forked child may hold it open, and what happens to it
        # would be reported here for ever.
        self._unwatch(bound.sock)
        bound.unlink()
        _close(bound.sock)

    def _watch(self, sock, callback=None, mask=selectors.EVENT_READ):
        """Without a callback it only ends the wait."""
        self._selector.register(sock, mask, callback)

    def _unwatch(self, sock):
        with contextlib.suppress(KeyError):
            self._selector.unregister(sock)

    def _resign(self):
        """Another process owns the path: send the subscribers there."""
        bound, self._bound = self._bound, None
        self._gate = _Gate(_keep_all, True)     # until it is clear who serves
        self._pause.clear()
        self._close_listener(bound)
        for subscriber in list(self._subscribers):
            self._part(subscriber, 'another process took the path')

    # Subscribers.

    def _accept(self):
        """Accept all that wait; the kernel hands them over in their order."""
        paused = self._pause.at
        if paused and time.monotonic() < paused:
            return
        self._set_open(True)    # before the first: see _Gate
        self._visited, self._swept, self._refusals = True, False, {}
        for _ in range(self._held + 2):     # one may fail, and take none
            try:
                sock = self._own(_accept, self._bound.sock)
            except BlockingIOError:
                break       # nobody waits any more
            except OSError as error:
                if error.errno in _STARVED and not self._spare(error):
                    return
            else:
                self._admit(sock)
        self._held = self._listens      # for all who waited are in
        if self._visits.came > _CROWD:
            self._let_wait(_CROWD_BACKLOG)
        self._keep_reserve()
        if paused:
            self._pause.clear()
            self._watch(self._bound.sock)

    def _admit(self, sock):
        pid, uid = _peer(sock)
        who = 'pid %d, uid %d' % (pid, uid)
        if self._reserve is None:
            # It has the last, or waited in a pause and missed what was sent.
            self._refuse(sock, who, 'the service is out of file descriptors')
            return
        self._recovered = self._starved is not None
        subscriber = _Subscriber(sock, self._backlog, who, uid)
        alive = subscriber.alive()
        if alive and self._full() and not self._make_room(uid):
            self._refuse(sock, who, 'sock_max_subscribers is %d'
                         % self.settings.max_subscribers)
            return
        self._subscribers[subscriber] = None
        self._visits.note('connected', who)
        if alive:
            self._rewatch(subscriber)
        else:
            self._part(subscriber, 'it is gone')

    def _full(self):
        """Whether all places are taken by subscribers that are still there.

        One that half-closed is not watched, for the end of its stream would
        be reported for ever; of others it may wait to be reported.
        """
        limit = self.settings.max_subscribers
        if len(self._subscribers) >= limit and not self._swept:
            self._swept = True
            for subscriber in list(self._subscribers):
                if not subscriber.alive():
                    self._part(subscriber, 'it is gone')
        return len(self._subscribers) >= limit

    def _make_room(self, uid):
        """Part the newest of the user with the most places; whether it was.

        For a user who will have no more than the other has left, or they
        would take turns.
        """
        places = collections.Counter(each.uid for each in self._subscribers)
        greedy, most = places.most_common(1)[0]
        if places[uid] + 2 > most:
            return False
        newest = next(each for each in reversed(self._subscribers)
                      if each.uid == greedy)
        if not newest.pending():    # else it is in the middle of a line
            self._tell_why(newest.sock, 'a user who has fewer places takes it')
        self._part(newest, 'uid %d has fewer places' % uid)
        return True

    def _refuse(self, sock, who, reason):
        self._tell_why(sock, reason)
        _hang_up(sock)
        self._visits.note('refused', who, '; ' + reason)

    def _tell_why(self, sock, reason):
        if reason not in self._refusals:    # to make one may wait for the GIL
            self._refusals[reason] = _record('notifications.refused',
                                             reason=reason)
        with contextlib.suppress(OSError):  # it may not wait for an answer
            # It fits, if nothing was sent on this connection before.
            _send_short(sock, self._refusals[reason])

    def _tell_visits(self):
        """Log who came and went, and have fewer wait if it is a crowd."""
        crowd = self._visits.tell()
        self._let_wait(_CROWD_BACKLOG if crowd else _BACKLOG)
        if self._recovered:     # not at each change while some get in
            self._starved, self._recovered = None, False
            self._say(logging.WARNING, 'subscribers are accepted again')

    def _spare(self, error):
        """Give up the reserve, to refuse who waits; False if there is none.

        Then accepting pauses: the listener stays readable and would be
        reported for ever.
        """
        self._recovered = False
        if self._starved is None or self._starved.due():
            self._starved = self._starved or _Lasting()
            self._say(logging.WARNING, 'subscribers are refused since %s: %s',
                      self._starved.since, error)
        reserve, self._reserve = self._reserve, None
        if reserve is None:     # another thread was faster
            self._unwatch(self._bound.sock)
            self._pause.fail()
            return False
        reserve.close()
        return True

    def _keep_reserve(self):
        with contextlib.suppress(OSError):
            self._reserve = self._reserve or self._own(_unix_socket)

    def _rewatch(self, subscriber):
        """Have the selector watch for what the subscriber can do next."""
        mask = subscriber.wanted()
        if mask != subscriber.mask:
            old, subscriber.mask = subscriber.mask, mask
            if not mask:
                self._unwatch(subscriber.sock)
                return
            # In one system call, where it can be.
            watch = self._selector.modify if old else self._selector.register
            watch(subscriber.sock, mask, functools.partial(
                self._on_subscriber, subscriber))

    def _on_subscriber(self, subscriber, mask):
        if subscriber not in self._subscribers:
            return      # it parted earlier in this turn
        if mask & selectors.EVENT_READ:
            self._visited = True
            reason = subscriber.listen()
            if reason is not None:
                self._part(subscriber, reason)
                return
            self._rewatch(subscriber)
        if mask & selectors.EVENT_WRITE:
            self._send(subscriber)

    def _part(self, subscriber, reason):
        """End the stream of a subscriber, or take note that it has ended."""
        del self._subscribers[subscriber]
        if subscriber.mask:     # else it takes 30 us to find that it is not
            self._unwatch(subscriber.sock)
        _hang_up(subscriber.sock)
        lost = subscriber.lost + sum(each.lost for each in subscriber.chunks())
        self._visits.note('parted', subscriber.who, ', %d lines, %d lost; %s'
                          % (subscriber.received(), lost, reason))

    # Lines.

    def _count(self):
        """How much is due, and how much was dropped after it: see drop()."""
        gap, drops, due = self._gap, next(self._drops), len(self._queue)
        self._gap_seen = gap    # closed, unless there is a new one
        self._lost += drops - self._drops_read
        self._drops_read = drops + 1    # for we count, too
        return due

    def _take(self, due, handed):
        """Move what is due to the backlog, in its order.

        In batches, or queue, batch and chunks would be three copies of a
        queue that is full.
        """
        self._room -= due   # in the backlog it takes as much; see _flush()
        for size in range(due, 0, -_BATCH):
            self._backlog.extend([self._queue.popleft()
                                  for _ in range(min(size, _BATCH))])
        if self._lost:
            self._backlog.append(self._gap_line(
                self._lost, 'queue full'), 0, self._lost)
            self._lost = 0
        for chunk in handed:
            self._backlog.append(*chunk)

    _gap_line = staticmethod(_lost_record)

    def _flush(self):
        """Send to all who take more, and hold the others to the bound."""
        self._unsent = self._late = False
        held = 0
        for subscriber in list(self._subscribers):
            if subscriber.pending() and not subscriber.blocked:
                self._send(subscriber)
            if subscriber in self._subscribers and subscriber.pending():
                self._hold(subscriber)
                held = max(held, self._backlog.behind(subscriber.chunk))
                self._unsent |= not subscriber.blocked
        # Queue and backlog share the memory; but one that lags must not
        # leave too little room for those that do not.
        limit = self._backlog.limit
        self._room = max(limit - held, limit // 8) // _QUEUE_UNIT
        # Half of the whole, be it in the queue or in the backlog; a quarter of
        # what is left, where one that lags has most of it.
        self._ahead = max(self._room - limit // 2 // _QUEUE_UNIT,
                          self._room // 4)

    def _send(self, subscriber):
        begin = time.monotonic()
        try:
            subscriber.flush(self._late)
        except OSError:
            self._part(subscriber, 'it is gone')
            return
        if time.monotonic() - begin > _GIL_LATE:
            self._late = True
        self._rewatch(subscriber)
        if subscriber.lagging is not None and not subscriber.pending():
            self._say(logging.WARNING, 'subscriber caught up: %s; it lost %d '
                      'notifications', subscriber.who,
                      subscriber.lost - subscriber.lagging)
            subscriber.lagging = None

    def _hold(self, subscriber):
        """Keep within the bound what the subscriber has yet to be sent."""
        if subscriber.trim(self._backlog) and subscriber.lagging is None:
            subscriber.lagging = subscriber.lost
            self._say(logging.WARNING, 'subscriber lags by more than %d '
                      'bytes and loses notifications: %s',
                      self._backlog.limit, subscriber.who)

    # The end.

    def _leave(self, deadline):
        """Serve who is there with what is there; then close, lock last.

        Runs in the exit handler, once the loop has ended, for a turn at
        least, and until time.monotonic() is ``deadline``.
        """
        with self._token:
            self._open()
            if self._bound is not None:
                self._retry.clear()
                self._cut_off()
        self._turn(0)
        accounted = self._backlog.tail.first
        if self._bound is not None:
            self._unwatch(self._bound.sock)
            self._pause.at = math.inf   # who comes now is for the next leader
        progress = time.monotonic()
        while (any(each.pending() for each in self._subscribers)
               and time.monotonic() < min(deadline, progress + _EXIT_STALL)):
            unread = self._unread()
            if self._turn(_EXIT_STALL) or self._unread() != unread:
                progress = time.monotonic()
        with self._token:
            self._gate = _Gate()
            # Else it owes, to who came meanwhile, what it emitted since.
            if (self._lock.fd is not None and not self._waiting()
                    and self._backlog.tail.first == accounted):
                with contextlib.suppress(OSError):
                    self._lock.vacate()
            self._close_all()

    def _unread(self):
        """Bytes that the kernel still holds for subscribers.

        One that reads slowly is at it long before its socket is writable:
        for that it must have read three quarters of it.
        """
        return sum(struct.unpack('i', fcntl.ioctl(
            each.sock, termios.TIOCOUTQ, bytes(4)))[0]
            for each in self._subscribers if each.sock is not None)

    def _cut_off(self):
        """Let nobody in who is not there yet."""
        self._bound.unlink()

    def _close_all(self):
        for subscriber in list(self._subscribers):
            self._part(subscriber, 'the service stops')
        self._visits.tell()
        if self._bound is not None:
            self._close_listener(self._bound)
        self._close_files()


def _is_patched():
    """Whether threads are green: to sleep is to let others run."""
    return not isinstance(time.sleep, types.BuiltinFunctionType)


@functools.cache
def _guarded():
    """Whether sockets can refuse to be passed descriptors, and so do ours."""
    try:
        with _no_fork(), socket.socket(socket.AF_UNIX) as sock:
            sock.setsockopt(socket.SOL_SOCKET, _PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def _unix_socket(fileno=None):
    # In full even with a fileno, for a green socket does not ask the kernel.
    # One with a fileno does not block.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if fileno is None
                         else socket.SOCK_STREAM | socket.SOCK_NONBLOCK,
                         fileno=fileno)
    if fileno is None and _guarded():   # whom it accepts is, too
        sock.setsockopt(socket.SOL_SOCKET, _PASSRIGHTS, 0)
    return sock


def _recv(sock, size):
    """``sock.recv()``; a PermissionError if descriptors come with it."""
    if not _guarded():
        # What is out of band could not be peeked, nor be waited for.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        peeked, _, flags, _ = sock.recvmsg(
            size, 0, socket.MSG_PEEK)   # with no room for descriptors
        if flags & socket.MSG_CTRUNC:
            raise PermissionError(errno.EPERM, 'it sent descriptors')
        size = len(peeked)
    return sock.recv(size)


def _accept(sock):
    """``sock.accept()[0]``, non-blocking, without giving up the GIL."""
    fd = _libc.accept4(sock.fileno(), None, None,
                       socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # Why it failed is raised by another try.
    sock = sock.accept()[0] if fd < 0 else _unix_socket(fd)
    if sock.gettimeout() != 0:      # green, or else it does not have to ask
        sock.setblocking(False)
    return sock


def _hang_up(sock):
    """End the stream, even while a forked child holds the socket open.

    Without giving up the GIL, as _accept().
    """
    _libc.shutdown(sock.fileno(), socket.SHUT_RDWR)     # the peer may be first
    _close(sock)


def _close(sock):
    """Close it: in a thread if that may close what it was passed.

    Not in one of Python's, of which eventlet makes green ones.
    """
    with _no_fork():    # a child would not know of the number
        thread, fd = ctypes.c_ulong(), sock.detach()
        if _guarded() or _libc.pthread_create(
                ctypes.byref(thread), None, _libc.close, ctypes.c_void_p(fd)):
            _libc.close(fd)
        else:
            _libc.pthread_detach(thread)


# -- the driver -------------------------------------------------------------

_hubs = {}      # by pid, then by path: one for each


def _hub_of(settings, hub_class):
    """The hub of this process on the path; made, if there is none.

    Each step is one, for any threads that get here at once; a hub that was
    never started is nothing. Where no hook was run at the fork, whoever
    removes what is left of the parent's closes it.
    """
    pid = os.getpid()
    hubs = _hubs.setdefault(pid, {})
    for other in [each for each in list(_hubs) if each != pid]:
        for hub in _hubs.pop(other, {}).values():
            hub.abandon(certain=False)
    return hubs.setdefault(settings.path, hub_class(settings))


def _at_exit():
    for hub in list(_hubs.get(os.getpid(), {}).values()):
        try:
            hub.close()
        except Exception:
            LOG.exception('Notifications on %s: closing failed',
                          hub.settings.path)


_forker = None      # the pid of the process that is about to fork


def _before_fork():
    global _forker
    # Not for ever: a log handler that forks may be what the loop waits for.
    _no_fork().acquire(timeout=1)
    _forker = os.getpid()


def _after_fork_in_parent():
    global _forker
    _forker = None      # uWSGI may run the hook for a child alone
    with contextlib.suppress(RuntimeError):     # it waited in vain
        _no_fork().release()


def _after_fork_in_child():
    """Not by the pid: in a namespace of its own it may be the parent's."""
    _no_forks.clear()
    for pid in list(_hubs):
        for hub in _hubs.pop(pid).values():
            hub.abandon(certain=pid == _forker)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child,
                    after_in_parent=_after_fork_in_parent)
atexit.register(_at_exit)


class UnixDriver(notifier.Driver):

    """Publish notifications to every process connected to a Unix socket.

    Delivery is at most once, in order, and to whoever is connected when
    ``notify()`` is called. See the module's docstring.
    """

    hub_class = _Hub
    _failed = None      # why there will be no hub

    def __init__(self, conf=None, topics=None, transport=None):
        """Read the options and start to serve the path.

        Without ``conf``, as the routing driver constructs all drivers there
        are, nothing happens until the first notification, which takes the
        options from the global ``cfg.CONF``.

        :param conf: configuration options
        :type conf: oslo_config.cfg.ConfigOpts
        :param topics: not used: every subscriber gets everything
        :param transport: not used
        :raises: ValueError, naming the option, the value and the limit
        """
        super().__init__(conf, topics, transport)
        self._settings = self._hub = None
        if conf is not None:
            settings = self._configure(conf)
            if self._settings != settings:
                LOG.warning('The notification socket is configured twice, '
                            'and what came first counts: %(first)s, not '
                            '%(other)s', {'first': self._settings,
                                          'other': settings})
            self._hub.start()
            if self._hub._thread is None and self._hub._no_thread is not None:
                self._hub._log.fault(self._hub._no_thread)

    def __getstate__(self):
        """Leave behind whatever is of this process."""
        return dict(self.__dict__, conf=None, transport=None, _hub=None)

    def _configure(self, conf):
        """Find or make the hub; the options as they were read.

        Those of the hub count, here and in forked children and copies.
        """
        settings = self._settings
        if settings is None:
            register_opts(conf)
            settings = _read_settings(conf)
        self._hub = _hub_of(settings, self.hub_class)
        self._settings = self._hub.settings
        return settings

    def notify(self, ctxt, message, priority, retry):
        """Hand a notification to whoever is connected, or drop it.

        Never blocks, raises or logs: an exception would make the Notifier
        log the payload, and a log handler may be what calls us.

        :param ctxt: not sent
        :param message: the notification; serialized before this returns
        :type message: dict
        :param priority: not used; the message has it
        :param retry: not used
        """
        hub = self._hub
        try:
            if hub is None or hub._pid != os.getpid():
                hub = None
                hub = self._late_hub()
            if hub is not None:
                hub.emit(message)
        except Exception:   # out of memory, say: lost, and accounted for
            if hub is None:
                return
            try:
                hub.drop()
            except Exception:   # out of stack: it has not even begun
                hub._gap = next(hub._drops)

    def _late_hub(self):
        """The hub at the first call of a process; None if there will be none.

        There is nobody to raise an error to, and notify() must not log: a
        thread does. Without one to be had, or out of stack, there is another
        try at the next call.
        """
        if self._failed is not None:
            return None
        try:
            self._configure(cfg.CONF)
        except ValueError as error:     # of an option
            # In one step: one of the threads that may be here tells.
            if self.__dict__.setdefault('_failed', error) is error:
                try:
                    _start(threading.Thread(
                        target=LOG.error, daemon=True, args=(
                            'No notifications are published: %s',
                            str(error))))
                except BaseException:
                    del self._failed
                    raise
        return self._hub


# ---------------------------------------------------------------------------
# RELAY: all processes of a user on one path
# ---------------------------------------------------------------------------
#
# The process that holds the lock, the leader, serves the path. The others
# follow: each is a hub with one subscriber, its uplink, which is connected
# to the leader's second socket, <sock_path>.relay. Both sides begin with a
# line that names the protocol. The leader adds two descriptors: the listener,
# so that a follower sees who has connected and not been accepted yet, and
# the presence, an eventfd that is readable while there are subscribers.
# Then the follower's lines go up. A line that begins with '-', as no JSON
# object does, is for the leader: '-12 reason' stands for 12 notifications
# that were lost, '-0 ...' for none, and only wakes it.
#
# A follower misses no subscriber either. It looks at the listener first, then
# at the presence, then at the uplink. Who connects waits at the listener until
# it is accepted; the leader raises the presence before that, and lowers it at
# the end of a turn, if nobody is there. So who has left the listener when that
# is looked at is found by the presence, which comes later. A new listener
# listens once the hello that passes it has been sent: this waits at the
# uplink, and while it is heard the gate is open. The rest is in _Gate.
#
# When the uplink ends, the followers try the lock. Who gets it goes on with
# the listener that it was passed, so that nobody in its backlog is stranded;
# the others follow the new leader. What an uplink has not sent is kept. If
# the lock does not say that the last leader left in good order, what that had
# taken in is lost, and who waits by then sees the end of the stream, as those
# do whom it had accepted.

_HELLO = b'unix-notifier relay 1'

# How often a leader, far ahead of all subscribers, gives way to them: 1 to 2
# ms, in which a reader takes megabytes, and which a stopped one costs once.
_PATIENCE = 20

# Why we cannot lead, but another may: the lock is held, or not for us; or the
# path is in use, by a leader, it may be, that has lost its lock.
_LED = (errno.EAGAIN, errno.EPERM, errno.EACCES, errno.EADDRINUSE)


# What a leader says; control lines that stand together, and each of them.
_WELCOME = re.compile(_HELLO + rb' \[(\d+), (\d+), (\d+)\]\n')
_LOSSES = re.compile(rb'^(?:-\d{1,18} [ -~]{0,80}\n)++', re.MULTILINE)
_LOSS = re.compile(rb'-(\d+) (.*)\n')

# Places at which what a follower sends at a time may have records, which take
# 40 us each. Who drops lines takes a turn between two, so there are fewer.
_GAPS_MAX = 256


def _chunks(block):
    """Whole lines of a follower as chunks: (data, lines, lost).

    Losses that stand together make one record. A ValueError, once what
    precedes it was given: it speaks nonsense.
    """
    if block.count(b'\n-') > _GAPS_MAX:
        block = b''.join(_LOSSES.findall(block)) + _LOSSES.sub(b'', block)
    start = 0
    while start < len(block):
        losses = _LOSSES.match(block, start)
        if losses:
            end = losses.end()
            each = [(int(lost), reason)
                    for lost, reason in _LOSS.findall(losses[0])]
            lost = min(sum(lost for lost, _ in each), 10 ** 18 - 1)
            if lost:
                yield _lost_record(lost, max(each)[1].decode()), 0, lost
        elif block.startswith(b'-', start):
            raise ValueError('%r is no loss' % block[start:start + 80])
        else:
            end = block.find(b'\n-', start) + 1 or len(block)
            yield block[start:end], block.count(b'\n', start, end), 0
        start = end


class _Uplink(_Subscriber):
    """The leader, as its follower sees it: the one subscriber there is.

    The cursor, the bound and the account are any subscriber's. While there
    is no leader it has no socket, and is blocked.
    """

    def __init__(self, backlog, listen):
        super().__init__(None, backlog, 'the leader')
        self.listen = listen    # the hub's: what it hears is for its gate
        self.greeted = False    # the leader has said hello
        self.since = 0          # time.monotonic() when it last did
        self.blocked = True

    def wanted(self):
        return super().wanted() if self.greeted else selectors.EVENT_READ

    def greet(self):
        """The leader takes lines from now on."""
        self.greeted = True
        self.since = time.monotonic()
        self.blocked = False

    def lost_line(self, lost):
        return b'-%d relay stalled\n' % lost

    def disconnect(self):
        """Keep what was not sent. A half-sent line goes whole to the next:

        its LF never left, so the last leader has dropped it.
        """
        self.sock, self.mask = None, 0
        self.greeted, self.blocked = False, True
        self.offset = self.chunk.data.rfind(b'\n', 0, self.offset) + 1

    def forget(self, backlog):
        """Owe nothing: nobody is there to whom it could go."""
        self.chunk, self.offset = backlog.tail, 0

    def rest(self):
        """All that is pending, as chunks."""
        parts = [chunk.data for chunk in self.chunks()]
        if self.offset:
            parts[0] = parts[0][self.offset:]
        return [each for part in parts for each in _chunks(part)]


class _LineBuffer:
    """Whole lines of what a stream gives in pieces; scans each byte once."""

    def __init__(self, limit=_LINE_MAX):
        self._limit = limit
        # Of a line whose end has not come. In one, for pieces of one or two
        # bytes, in a list, take thirty times the memory.
        self._rest = bytearray()
        self._most = _RECV_MIN  # bytes to receive at a time

    def receive(self, sock):
        """The lines that are whole by now, or an EOFError."""
        data = _recv(sock, self._most)
        if not data:
            raise EOFError
        self._most = _CHUNK_MAX if len(data) >= _RECV_MIN else _RECV_MIN
        return self.feed(data)

    def feed(self, data):
        """The lines that are whole by now, as one block; it may be empty.

        Of a line that is too long, not much more is kept than tells so.
        """
        whole, newline, rest = data.rpartition(b'\n')
        if newline:
            whole = b''.join((self._rest, whole, newline))
            self._rest = bytearray()
        if not self.too_long():
            self._rest += rest
        return whole

    def too_long(self):
        """Whether the line that has begun is."""
        return len(self._rest) > self._limit


class _Follower:
    """A follower, as the leader sees it: where lines come from."""

    alive = _Subscriber.alive

    def __init__(self, sock, who):
        self.sock = sock
        self.who = who
        self._greeted = False
        self._buffer = _LineBuffer()

    def read(self):
        """Chunks that have come. An OSError, or EOFError: it is gone.

        A line without its end is dropped: the follower sends it again, to
        the next leader, or was killed. A ValueError, perhaps once some were
        taken, which extends a list by those: it speaks nonsense.
        """
        block = self._buffer.receive(self.sock)
        if self._buffer.too_long():
            raise ValueError('a line of more than %d bytes' % _LINE_MAX)
        if not self._greeted:   # which comes in one piece, as it was sent
            hello, _, block = block.partition(b'\n')
            if hello != _HELLO:
                raise ValueError('%r is not the protocol %r' % (
                    hello[:80], _HELLO))
            self._greeted = True
        return _chunks(block)


def _starves():
    """Whether a loop would stand still between two requests.

    It would be a green thread, and nobody runs those there, unless uWSGI has
    a loop engine, such as gevent's.
    """
    return _is_patched() and ('mod_wsgi' in sys.modules or (
        'uwsgi' in sys.modules
        and getattr(sys.modules['uwsgi'], 'loop', None) is None))


def _log_all(records):
    for record in records:
        LOG.log(*record)


class _RelayHub(_Hub):
    """A hub that shares its path with the hubs of other processes."""

    def __init__(self, settings):
        super().__init__(settings)
        self._relay_path = self.settings.path + '.relay'
        # The loop alone. As a follower, and before anything is known:
        self._uplink = _Uplink(self._backlog, self._on_leader)  # or we lead
        self._subscribers[self._uplink] = None
        self._left_by = None    # the leader that hung up last
        self._hasty = _Backoff()    # from one that does so again, at once
        self._passed = None     # the leader's listener, by hello
        self._presence = None   # the leader's, by hello, or our own
        # As a leader:
        self._relay = None      # what followers connect to
        self._followers = {}    # an ordered set
        self._patience = _PATIENCE  # how often more it waits for readers
        self._strangers = collections.deque(maxlen=64)  # logged already

    def start(self):
        """Start the loop, but not in uWSGI's master, or what will be it.

        uWSGI forks in C, without hooks; a thread that is busy at that instant
        hangs the worker for good. Mules have worker_id 0, too. Where a loop
        would starve there is none: who has come to start it does its work.
        """
        uwsgi = sys.modules.get('uwsgi')
        if (uwsgi is not None and uwsgi.worker_id() == 0
                and uwsgi.mule_id() == 0
                and uwsgi.masterpid() in (0, os.getpid())):
            self._queue.clear()
        elif _starves():
            self._work_here()
        else:
            super().start()

    def _work_here(self):
        """What a turn is for a follower that has no loop, in notify().

        The leader hears of it at once. Its answer is taken at the next call,
        and so is what the kernel does not take now.
        """
        free = self._token.free
        free.count(None)    # raises where the stack has no room for append()
        try:
            del free[0]     # as in _hand_over()
        except IndexError:
            return
        unsaid = self._log.unsaid = []      # notify() never logs
        try:
            if not self._closing:
                self._say_what_it_is()
                self._open()
                self._work([(self._try_uplink, 0)])
        finally:
            self._log.unsaid = None
            free.append(True)
            if unsaid:
                # Not a Thread, whose start() waits for it to run.
                _thread.start_new_thread(_log_all, (unsaid,))

    def _say_what_it_is(self):
        if self._selector is None:
            self._say(logging.WARNING, 'monkey-patched, under a server that '
                      'runs no hub between requests, this process only '
                      'follows, and sends as it emits')

    def _try_uplink(self, _mask):
        if self._uplink.sock is not None:
            self._on_subscriber(self._uplink, selectors.EVENT_READ)
            self._uplink.blocked = not self._uplink.greeted

    def _set_open(self, is_open):
        if self._uplink is not None:
            # A follower asks the kernel: itself, while the gate is shut, or
            # once a turn.
            is_open = self._gate.look()
        elif is_open:
            self._presence.set()    # before accept(), as the gate is
        else:
            self._presence.clear()
        super()._set_open(is_open)

    def _flush(self):
        super()._flush()
        uplink = self._uplink
        if uplink is None:
            self._let_read()
        elif self._backlog.behind(uplink.chunk) > self._backlog.limit // 2:
            # It is the leader that is short of time, and of the CPU we take.
            self._ahead = -1

    def _let_read(self):
        """Give subscribers time, before more is taken in for them.

        A turn takes in 200 KB from each follower, as much as the kernel
        holds, and sends as much: the fastest of readers would lose half of
        what eight busy processes emit. Not for long, unless they do read.
        """
        while self._followers and self._subscribers and min(
                self._backlog.behind(each.chunk) for each in self._subscribers
                ) > self._backlog.limit // 4:
            if not self._patience:
                return
            self._patience -= 1
            time.sleep(_GIVE_WAY)
            self._stay()
            for each in self._subscribers:
                each.blocked = False    # to try is to know
            super()._flush()
        self._patience = _PATIENCE

    def _gap_line(self, lost, reason):
        if self._uplink is None:
            return super()._gap_line(lost, reason)
        return b'-%d %s\n' % (lost, reason.encode('ascii'))

    def _owned(self):
        return [each for each in (self._bound, self._relay) if each]

    def _trouble(self, error):
        if error.errno in _LED and not self._retry.for_long():
            # It has just come, or is about to leave, or is stopped, or has
            # lost lock and relay, which it notices within a second. Keep all.
            self._retry.fail()
            return
        super()._trouble(error)

    def _shut(self, error):
        if self._uplink is None:
            super()._shut(error)
            return
        code = getattr(error, 'errno', None)
        # For about a second in any case: a leader whose directory is away for
        # a moment keeps its subscribers.
        if (code == errno.EAGAIN
                or self._retry.delay and not self._retry.for_long()
                or self._passed and self._passed.intact()):
            self._gate = _Gate(_keep_all, True)
            return
        # Nobody can connect while there is no socket at the path. To see that
        # takes 3 us, to keep what comes 70.
        if code not in _STARVED:    # or another may lead, whom we owe it
            self._uplink.forget(self._backlog)
        self._gate = _Gate(functools.partial(
            _is_socket, self.settings.path, self._relay_path))

    def _none_waits(self):
        # There is somebody, or there is no need to tell the leader.
        return bool(self._gate.look()) != (self._uplink is None)

    def _intact(self):
        if self._uplink is None:
            return super()._intact()
        return (self._passed is not None and self._passed.intact()
                and os.path.exists(self._relay_path))

    # Following.

    def _claim(self):
        if self._uplink is None or self._uplink.sock is None:
            try:
                self._lead()
                return
            except OSError as error:
                if self._uplink is None or error.errno not in _LED:
                    raise       # we lead, if only those who are connected
                self._follow(error)
        if not self._uplink.greeted:
            raise BlockingIOError(errno.EAGAIN, 'no answer from %s'
                                  % self._uplink.who, self._relay_path)
        if not self._intact():
            # The leader does not know yet, or it would be there.
            self._backlog.append(b'-0 look\n', 0)

    def _lead(self):
        if self._thread is None and _starves():
            # Everybody else on the path would be silent while it stands still.
            raise PermissionError(
                errno.EPERM, 'this process only follows', self.settings.path)
        super()._claim()
        if self._uplink is not None:
            self._take_over()
        if not self._closing:
            if not (self._relay and self._relay.intact()):
                self._serve_relay()
            self._let_in()

    def _follow(self, error):
        """Connect to the leader, who answers with a hello; or raise."""
        sock = self._own(socket.socket, socket.AF_UNIX)     # is passed two
        try:
            sock.setblocking(False)
            sock.connect(self._relay_path)
            who = self._check_peer(sock)
            sock.send(_HELLO + b'\n', socket.MSG_NOSIGNAL)
        except OSError as reason:
            sock.close()
            if reason.errno == errno.ENOENT and self._retry.for_long():
                # A leader that has lost its relay does not notice while there
                # is nothing to do. So knock; not sooner than it would look,
                # nor at one that is about to leave.
                _answers(self.settings.path)
            raise error
        self._uplink.sock, self._uplink.who = sock, 'the leader, ' + who
        self._rewatch(self._uplink)

    def _on_subscriber(self, subscriber, mask):
        if mask & selectors.EVENT_WRITE:
            self._patience = _PATIENCE
        super()._on_subscriber(subscriber, mask)

    def _check_peer(self, sock):
        """Who the peer is; raises PermissionError unless it may be one."""
        pid, uid = _peer(sock)
        who = 'pid %d, uid %d' % (pid, uid)
        trusted = {0, os.geteuid()}
        if os.geteuid() == 0:   # who only follows: see _Lock
            trusted.add(os.stat(os.path.dirname(self.settings.path)).st_uid)
        if uid not in trusted:
            self._log_stranger(who, 'not trusted')
            raise PermissionError
        return who

    def _log_stranger(self, who, why):
        """Once for each process, whatever it comes up with."""
        if who not in self._strangers:
            self._strangers.append(who)
            self._say(logging.WARNING, 'relay refused: %s: %s', who, why)

    def _on_leader(self):
        """Hear a hello, again when the listener is new; or why to part."""
        # Open, for a new hello is one of the things that the gate looks at.
        gate, self._gate = self._gate, _Gate(_keep_all, True)
        try:
            hello = self._hear()
        except BlockingIOError:     # see _Event.clear()
            self._gate = gate
            return None
        except OSError:
            return 'it is gone'
        except ValueError as error:
            self._log_stranger(self._uplink.who, error)
            return 'it is gone'
        self._greeted(*hello)
        return None

    def _hear(self):
        """The identity of a listener, the listener, and the presence.

        A ValueError: it is no hello that comes. An OSError: nothing does.
        """
        with _no_fork():
            data, fds, _, _ = socket.recv_fds(self._uplink.sock, 4096, 2)
            for fd in fds:
                os.set_inheritable(fd, False)   # recv_fds cannot be told
            hello = _WELCOME.fullmatch(data)
            if hello and len(fds) == 2:
                with contextlib.suppress(OSError):      # it is no socket
                    return (list(map(int, hello.groups())),
                            self._own(_unix_socket, fds[0]),
                            self._own(_Event, fds[1]))
            for fd in fds:
                os.close(fd)
        if not data:
            raise ConnectionResetError
        # Without its descriptors, if we are out of them.
        raise ValueError('%r is not the protocol %r, with two descriptors' % (
            data[:80], _HELLO))

    def _greeted(self, identity, sock, presence):
        sock.setblocking(False)
        # In this order: see the top of this part.
        gate = _Gate(_poll(sock.fileno(), presence.fileno(),
                           self._uplink.sock.fileno()))
        if _starves():
            # It would hear late of the leader's end, and hold its listener
            # meanwhile, at which others would wait in vain.
            sock.close()
            gate = _Gate(_keep_all, True)
        if not self._uplink.greeted:
            self._log.serves('relayed to ' + self._uplink.who, anew=False)
            if not gate.look():
                self._uplink.forget(self._backlog)  # nobody is owed it
        self._gate = gate
        self._presence = presence
        old, self._passed = self._passed, _Bound(
            self.settings.path, sock, identity)
        if old is not None:
            old.sock.close()
        self._uplink.greet()
        self._check_path()      # all is well

    def _part(self, subscriber, reason):
        if subscriber is not self._uplink:
            super()._part(subscriber, reason)
            return
        # The leader has gone. What it is owed is kept for the next.
        greeted = subscriber.greeted
        self._gate = _Gate(_keep_all, True)     # before what it looks at goes
        self._unwatch(subscriber.sock)
        subscriber.sock.close()
        subscriber.disconnect()
        if not greeted:
            return      # it is tried again when due, not without end
        if (subscriber.who != self._left_by
                or time.monotonic() - subscriber.since > _CHECK_INTERVAL):
            self._left_by = subscriber.who
            self._hasty.clear()
            self._check_path()
        else:           # again, so it was not killed
            self._hasty.fail()
            self._retry.at = self._hasty.at
            if self._hasty.for_long():
                self._log_stranger(subscriber.who, 'it hangs up each time')

    # Leading.

    def _listener(self):
        """The last leader's listener, if the path is still that socket."""
        if self._uplink is not None:
            self._presence = self._own(_Event)
        passed = self._passed
        if passed is None:
            return super()._listener()
        if passed.intact():
            # Another may go on with it already, whose lock was removed.
            self._make_way(self._relay_path)
            if not self._lock.vacated():
                self._let_go(passed.sock)
            self._lock.write([passed])
            return passed
        self._passed = None
        with contextlib.suppress(OSError), passed.sock as sock:
            self._let_go(sock)      # it has lost the path
        return super()._listener()

    def _let_go(self, listener):
        """End the streams of all who wait.

        What a leader that was killed had taken in for them has gone with it.
        Out of descriptors, it raises, for one that was left would go on as if
        nothing were missing.
        """
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BACKLOG + 1):
                _hang_up(self._own(_accept, listener))

    def _take_over(self):
        """Lead. What the uplink is owed goes to those who wait."""
        uplink, self._uplink, self._passed = self._uplink, None, None
        del self._subscribers[uplink]
        self._accept()
        for chunk in uplink.rest():
            self._backlog.append(*chunk)
        self._unsent = True     # we may be in _flush(), and past them

    def _announce(self):
        for follower in list(self._followers):
            self._greet(follower)

    def _serve_relay(self):
        self._make_way(self._relay_path)
        relay = _bind(self._own(_unix_socket), self._relay_path, 0o600,
                      self._lock, backlog=_BACKLOG)
        self._close_relay()
        self._relay = relay

    def _close_relay(self):
        if self._relay is not None:
            self._close_listener(self._relay)
            self._relay = None

    def _on_relay(self, _mask):
        try:
            self._let_in()
        except OSError as error:
            self._trouble(error)

    def _let_in(self):
        """Accept all who come to follow, or raise OSError.

        Out of descriptors, they wait, and keep what they have; the relay,
        which would be reported for ever, is not watched until the next try.
        """
        self._unwatch(self._relay.sock)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BACKLOG + 1):
                self._welcome(self._own(_accept, self._relay.sock))
        self._watch(self._relay.sock, self._on_relay)

    def _welcome(self, sock):
        sock.setblocking(False)
        try:
            follower = _Follower(sock, self._check_peer(sock))
        except OSError:
            _hang_up(sock)
            return
        self._followers[follower] = None
        self._watch(sock, functools.partial(self._on_follower, follower))
        self._greet(follower)

    def _greet(self, follower):
        hello = b'%s %s\n' % (
            _HELLO, json.dumps(self._bound.identity).encode())
        try:
            socket.send_fds(follower.sock, [hello], [
                self._bound.sock.fileno(), self._presence.fileno()],
                socket.MSG_NOSIGNAL)
        except OSError:
            self._drain(follower)   # gone, it may have left much to read
            self._dismiss(follower)

    def _on_follower(self, follower, _mask):
        try:
            self._handed += follower.read()
        except BlockingIOError:
            pass        # see _Event.clear()
        except (OSError, EOFError):
            self._dismiss(follower)
        except ValueError as error:
            self._log_stranger(follower.who, error)
            self._dismiss(follower)

    def _dismiss(self, *followers):
        for follower in followers:
            del self._followers[follower]
            self._unwatch(follower.sock)
            _hang_up(follower.sock)

    def _resign(self):
        self._cut_off_followers()
        self._dismiss(*self._followers)
        # What followers have handed on is for those who are still here. It
        # must not go on to the new leader: the followers may get there before
        # us, with what they emitted later. There, it is lost.
        lost = sum(lines + lost for _, lines, lost in self._handed)
        self._take(0, self._handed)
        self._handed = []
        self._flush()
        super()._resign()
        self._uplink = _Uplink(self._backlog, self._on_leader)
        self._subscribers[self._uplink] = None
        if lost:
            self._backlog.append(self._gap_line(lost, 'leader replaced'),
                                 0, lost)

    def _cut_off(self):
        # Asked, for one that left just now is still among them.
        if not any(each.alive() for each in self._followers):
            super()._cut_off()
        self._cut_off_followers()

    def _cut_off_followers(self):
        self._close_relay()
        for follower in self._followers:
            self._drain(follower)

    def _drain(self, follower):
        """Take in what a follower has sent; what it sends next fails."""
        self._unwatch(follower.sock)
        with contextlib.suppress(OSError, EOFError, ValueError):
            follower.sock.shutdown(socket.SHUT_RD)
            while True:
                self._handed += follower.read()

    def _close_all(self):
        self._subscribers.pop(self._uplink, None)
        if self._followers:
            # They go on with the listener; who has connected waits in it.
            self._bound.sock.close()
            self._bound = None
        self._dismiss(*self._followers)
        super()._close_all()


UnixDriver.hub_class = _RelayHub


# ---------------------------------------------------------------------------
# CONSUMERS: whoever reads the socket
# ---------------------------------------------------------------------------
#
# A subscription is a connection that comes back, and the lines on it. The
# iterator, the listener of the transport and the command line are built on
# it. Losses are the publisher's to report, as records in the stream: who
# does not keep up stops reading, and hears of them.

_LOST = 'notifications.lost'
_REFUSED = 'notifications.refused'

# NaN and infinities are no JSON: null, as the driver sends it.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)

# Bytes of a line. In memory a message can take thirty times that, of small
# objects; the largest of a hundred that were recorded was of 2 KB.
_READ_MAX = 4 * 1024 * 1024

# Notifications that one record may say were lost: a million a second, for
# eleven days.
_LOST_MAX = 10 ** 12

# Messages that a listener has handed out and that are neither acknowledged
# nor requeued. Upstream's server would take them without a bound.
_UNSETTLED_MAX = 100

# Bytes of the lines, each as a KiB at least, of which messages are handed
# out; and as many of those that were requeued and wait.
_HELD_MAX = 8 * 1024 * 1024

# Seconds after which a requeued message returns: doubling, from and up to.
_REQUEUE_FIRST = 1
_REQUEUE_MAX = 30

# Seconds without progress after which the log says so: doubling, up to what
# a trouble of the driver does.
_STUCK_FIRST = 10

# Only the transport derives from it; without it, only that one is lost.
_base = importutils.try_import(
    'oslo_messaging._drivers.base',
    types.SimpleNamespace(BaseDriver=object, IncomingMessage=object,
                          PollStyleListener=object))


def _word(value):
    """What should be a text; not str(), which can run out of stack."""
    return value if isinstance(value, str) else _as_text(value)


def _printable(text, limit=200):
    """On its line, and harmless to a terminal and a log, whatever it is."""
    text = _word(text)
    text = text if len(text) <= limit else text[:limit] + '...'
    return text if text.isprintable() else ascii(text)[1:-1]


def _lost_by(payload):
    """How many notifications a record says were lost, if that can be."""
    lost = payload.get('lost') if isinstance(payload, dict) else None
    return lost if type(lost) is int and 0 < lost <= _LOST_MAX else 0


def _strict(message):
    """The line of a message that was read, as the driver would send it."""
    try:
        return _line(message, False)
    except ValueError:      # of an infinity: 1e999 is good JSON
        return _line(_plain(message), False)


class _Subscription(abc.Iterator):
    """A socket that is followed; what subscribe() returns.

    One thread reads. close() and wake() are for any.
    """

    _sock = None            # while there is no connection

    def __init__(self, path, reconnect=True, max_line=_READ_MAX):
        self.path = _parse_path(path, _CONNECT_MAX)
        self.line = b''         # what the last message was read from
        self._reconnect = reconnect
        self._max_line = max_line
        self.closed = False     # for good: no more will come
        self._reading = threading.Lock()    # by who reads, or disconnects
        self._since = 0         # time.monotonic() when it connected
        self._lines = collections.deque()   # that came and were not taken
        self._retry = _Backoff()    # its delay outlasts a connection
        self._told = set()      # what was logged and need not be again
        self._lost = 0          # notifications, by the records
        self._lost_told = -math.inf     # time.monotonic() when it was logged
        self._waker = _Event()
        self._connect()

    def __next__(self):
        while not self.closed:
            message = self.take()
            if message is not None:
                return message
        raise StopIteration

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        """End the subscription; an iteration in another thread ends, too.

        It does not wait for who reads: a signal's handler may have come amid.
        """
        self.closed = True
        self._waker.set()
        if self._reading.acquire(blocking=False):
            self._disconnect()
            self._reading.release()

    def wake(self):
        """Have take(), now or the next time it would wait, return early."""
        self._waker.set()

    def take(self, deadline=math.inf, paused=False):
        """The next message, or None: in time, or after wake(), there is none.

        What had come before close() is still handed out.

        :param deadline: when to give up, by time.monotonic()
        :param paused: whether to wait for no message, only for wake()
        """
        message = None
        with self._reading:
            while message is None:
                if self._lines and not paused:
                    message = self._parse(self._lines.popleft())
                    if time.monotonic() >= deadline:
                        break       # there may be no end of what is dropped
                elif self.closed or not self._wait(deadline, paused):
                    break
        if self.closed:
            self.close()    # whoever called it found us reading
        return message

    def _wait(self, deadline, paused):
        """Take in what comes, or try again; False after wake() or too late."""
        if self._sock is None and time.monotonic() >= self._retry.at:
            self._connect()
            return True
        # Not epoll, which a forked child shares: what it took out there, when
        # it closed its copy, we would await for ever. eventlet has no poll().
        selector = getattr(selectors, 'PollSelector',
                           selectors.DefaultSelector)()
        selector.register(self._waker, selectors.EVENT_READ)
        until = deadline
        if self._sock is None:
            until = min(deadline, self._retry.at)
        elif not paused:
            selector.register(self._sock, selectors.EVENT_READ)
        ready = [key.fileobj for key, _ in selector.select(
            None if until == math.inf else until - time.monotonic())]
        if self._waker in ready:
            self._waker.clear()
            return False
        if ready:
            self._receive()
        return bool(ready and self._lines) or time.monotonic() < deadline

    def _connect(self):
        self._buffer = _LineBuffer(self._max_line)
        try:
            self._sock = _unix_socket()
            self._sock.setblocking(False)   # connect() would await a backlog
            self._sock.connect(self.path)
        except OSError as error:
            self._disconnect()
            if not self._reconnect:
                raise OSError(error.errno, error.strerror, self.path)
            self._retry.fail()
            self.say_once(logging.INFO, 'waiting for it: %s', error.strerror)
            return
        self._since = time.monotonic()
        self.say_once(logging.INFO, 'connected')

    def _receive(self):
        try:
            block = self._buffer.receive(self._sock)
            # Not splitlines(), which would split at a carriage return, too.
            self._lines.extend(block.split(b'\n')[:-1])
        except (EOFError, OSError):     # reset: it had not read all we sent
            self._on_end()

    def _on_end(self):
        """The stream has ended. A line without its end is discarded."""
        self._disconnect()
        if not self._reconnect:
            self.closed = True
        # Unless it refuses us: it must not be asked, nor be logged, for ever.
        if time.monotonic() - self._since > _Backoff.MAX:
            self._retry.clear()
            self._told.clear()
        self._retry.fail()
        self.say_once(logging.INFO, 'disconnected')

    def _disconnect(self):
        if self._sock is not None:
            # No shutdown: it may be a forked child's copy. Nor _close(), where
            # it has no need of a thread: eventlet would not hear of it.
            (self._sock.close if _guarded() else
             functools.partial(_close, self._sock))()
            self._sock = None

    def __del__(self):
        if self._sock is not None:      # the module may have been cleared
            self._sock.close()

    def _parse(self, line):
        if len(line) > self._max_line:
            line = _lost_record(1, 'it took more than %d bytes' %
                                self._max_line)
        self.line = line
        try:
            # Not json.loads(), which guesses the encoding: 8 us, not 7.
            message = _DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.say_once(logging.WARNING, 'not a JSON object, dropped: %r',
                          line[:80])
            return None
        if message.get('event_type') in (_LOST, _REFUSED):
            self.note(message['event_type'], message.get('payload'))
        return message

    def note(self, event_type, payload):
        """Log a control record; losses at most once a second, with the sum."""
        payload = payload if isinstance(payload, dict) else {}
        reason = _printable(payload.get('reason'))
        if event_type == _REFUSED:
            self.say_once(logging.WARNING, 'refused: %s', reason)
            return
        self._lost += _lost_by(payload)
        now = time.monotonic()
        if now - self._lost_told > _CHECK_INTERVAL:
            self._lost_told = now
            self.say(logging.WARNING, '%d notifications were lost since it '
                     'began: %s', self._lost, reason)

    def say_once(self, level, text, *args):
        """Once, until a connection has lasted."""
        if text not in self._told:
            self._told.add(text)
            self.say(level, text, *args)

    def say(self, level, text, *args):
        LOG.log(level, 'Notifications from %s: ' + text, self.path, *args)


def subscribe(path, *, reconnect=True, max_line=_READ_MAX):
    """Follow a socket: an iterator of notifications.

    When this returns it is connected, if the service is there, and whatever
    is published from then on will be seen. It waits for a service that is
    not there, and for one that has gone, trying again after 10 ms, doubling
    to 1 s. What is published in between is not seen, nor counted. A
    subscriber that does not keep up loses the oldest, and gets a record of
    it: a ``notifications.lost``, like any notification, whose payload is
    ``{'lost': number, 'reason': text}``. A ``notifications.refused`` says
    why the service has closed the connection. Lines that are no JSON
    objects are dropped, and logged once; of one that is too long there is a
    record, too.

    Leaving the loop closes the socket; so do ``close()``, from any thread or
    a signal's handler, and the end of a ``with`` block. A forked child may
    close its copy, and no more.

    :param path: absolute path of the socket, or a ``unix://`` URI of it
    :type path: str
    :param reconnect: whether to wait for the service and to come back; else
                      the iterator ends with the stream
    :type reconnect: bool
    :param max_line: bytes of a notification, which in memory may take thirty
                     times that; 4 MiB unless given, and 64 MiB at most
    :type max_line: int
    :returns: an iterator, and context manager, of dicts: ``message_id``,
              ``publisher_id``, ``event_type``, ``priority``, ``timestamp``
              (all str) and ``payload`` (whatever was emitted)
    :raises: ValueError, naming the path and what is wrong with it; OSError,
             without ``reconnect``, if the service is not there
    """
    return _Subscription(path, reconnect, max_line)


# -- the transport ----------------------------------------------------------

@functools.cache
def _warn_once(text):
    LOG.warning('A unix:// transport ' + text)


class _NoContext(dict):
    """The request context, which is not sent; says so if a filter asks."""

    def __contains__(self, key):
        _warn_once('does not carry the request context: a filter on it (%s) '
                   'never matches' % key)
        return False


class _Incoming(_base.IncomingMessage):
    """A message that was handed out, until it is settled by any thread."""

    def __init__(self, listener, message, size=0):
        super().__init__(_NoContext(), message, message.get('message_id'))
        self._listener = listener
        self.size = max(size, 1024)
        self.since = time.monotonic()
        self.requeues = 0
        self.delay = 0      # seconds that it was last put off

    def __str__(self):
        return '%s %s, requeued %d times in %d s' % (
            _printable(self.message.get('event_type')),
            _printable(self.msg_id), self.requeues,
            time.monotonic() - self.since)

    def acknowledge(self):
        self._listener.settle(self)

    def requeue(self):
        self.requeues += 1
        self.delay = min(max(2 * self.delay, _REQUEUE_FIRST), _REQUEUE_MAX)
        self._listener.put_off(self)


class _Listener(_base.PollStyleListener):
    """One connection, whatever the targets and priorities.

    One thread calls poll(); settle(), put_off() and stop() are for any.
    """

    def __init__(self, path, batch_size):
        super().__init__()
        self._limit = max(_UNSETTLED_MAX, batch_size or 0)
        self._subscription = _Subscription(path)
        self._lock = threading.Lock()   # guards what follows
        self._unsettled = {}    # handed out, the first first; its keys
        self._unsettled_size = 0
        # By delay, what was requeued: (when it is due, it), the first first.
        self._put_off = collections.defaultdict(collections.deque)
        self._put_off_size = 0
        self._is_new = True     # whether what came last was: by turns
        self._record = None     # of what was given up, while it waits there
        self._record_at = -math.inf     # when the last was due
        self._worst = None      # of what was requeued again and again
        self._moved = 0         # when any was last handed out, or settled
        self._tell_at = 0       # when to say again what is stuck
        self._tell_pause = _STUCK_FIRST

    # Any thread. First the change, then the waking: poll() looks at what may
    # have changed after it has taken note that it was woken.

    def settle(self, incoming):
        with self._lock:
            self._take_back(incoming)
            if incoming is self._worst:
                self._worst = None
        self._subscription.wake()

    def put_off(self, incoming):
        with self._lock:
            self._take_back(incoming)
            self._wait_for(_deadline(incoming.delay), incoming)
            if incoming.requeues > 2 and (
                    self._worst is None
                    or incoming.requeues >= self._worst.requeues):
                self._worst = incoming
            while self._put_off_size > _HELD_MAX:
                self._give_up()
        self._subscription.wake()
        if self._subscription.closed:
            self.stop()

    def stop(self):
        """Have poll() return what it holds, and no more than has come.

        The connection goes now: designate-sink never calls cleanup().
        """
        self._subscription.close()
        with self._lock:
            dropped = sum(map(len, self._put_off.values()))
            self._put_off.clear()
            self._put_off_size = 0
        if dropped:
            self._subscription.say_once(
                logging.WARNING, 'the listener stops; what was requeued (%d) '
                'is dropped', dropped)

    cleanup = stop

    # Whoever holds the lock.

    def _take_back(self, incoming):
        self._moved = time.monotonic()
        if self._unsettled.pop(incoming, False):
            self._unsettled_size -= incoming.size

    def _hand_out(self, incoming):
        self._moved = time.monotonic()
        self._unsettled[incoming] = True
        self._unsettled_size += incoming.size
        return incoming

    def _wait_for(self, when, incoming):
        self._put_off[incoming.delay].append((when, incoming))
        self._put_off_size += incoming.size

    def _give_up(self):
        """Drop what was put off for longest, and have a record tell of it.

        That waits its turn as well, a second after the last at least, for
        who is told may requeue it, too.
        """
        delay = max(each for each in self._put_off if self._put_off[each])
        incoming = self._put_off[delay].popleft()[1]
        self._put_off_size -= incoming.size
        lost = 1
        if incoming.message.get('event_type') == _LOST:
            lost = _lost_by(incoming.message.get('payload'))
        if self._record is None:
            self._record_at = max(time.monotonic(),
                                  self._record_at + _CHECK_INTERVAL)
            self._record = _Incoming(self, json.loads(_lost_record(0, '')))
            self._wait_for(self._record_at, self._record)
        self._record.message['payload'] = {
            'lost': self._record.message['payload']['lost'] + lost,
            'reason': 'the listener gave up on %s' % incoming}

    # The thread that polls.

    def poll(self, timeout=None, batch_size=1, batch_timeout=None):
        """See PollStyleListener. Without batch_size: whatever has come.

        What was requeued returns alone: not for ever in one batch with what
        has it fail.
        """
        if batch_size is None and batch_timeout is None:
            batch_timeout = 0
        batch, deadline = [], _deadline(timeout)
        try:
            while len(batch) < (batch_size or self._limit):
                incoming = self._next(deadline, batch)
                if incoming is None:
                    break
                batch.append(incoming)
                if incoming.requeues:
                    break
                if len(batch) == 1 and batch_timeout is not None:
                    deadline = _deadline(batch_timeout)
        except Exception:
            LOG.exception('Notifications from %s', self._subscription.path)
            time.sleep(_Backoff.MAX)
        return batch

    def _next(self, deadline, batch):
        """What to hand out next, or None: too late, stopped, a batch ends."""
        while True:
            with self._lock:
                full = (len(self._unsettled) >= self._limit
                        or self._unsettled_size >= _HELD_MAX)
                if full and len(self._unsettled) == len(batch):
                    return None     # nobody else could make room
                until, queue = self._first_due()
                if until <= time.monotonic() and not full:
                    if batch:
                        return None
                    if self._is_new:
                        return self._return(queue)
            if full:
                until = max(self._moved + _STUCK_FIRST, self._tell_at)
            if full or self._worst is not None:
                self._complain(full)
            message = self._subscription.take(min(deadline, until),
                                              paused=full)
            self._is_new = True     # or there was none
            if message is not None and self._is_wanted(message):
                with self._lock:
                    return self._hand_out(_Incoming(
                        self, message, len(self._subscription.line)))
            if (time.monotonic() >= deadline
                    or message is None and self._subscription.closed):
                return None

    def _first_due(self):
        """Of what was put off: when it is due, and the queue it heads."""
        if not self._put_off_size:
            return math.inf, None
        return min(((queue[0][0], queue) for queue in self._put_off.values()
                    if queue), key=lambda each: each[0])

    def _return(self, queue):
        incoming = queue.popleft()[1]
        self._put_off_size -= incoming.size
        self._is_new = False
        if incoming is self._record:
            self._record = None
            self._subscription.note(_LOST, incoming.message['payload'])
        return self._hand_out(incoming)

    def _complain(self, full):
        """Log what is stuck: requeued for ever, or never settled at all."""
        now = time.monotonic()
        with self._lock:
            worst = self._worst
            if full and now - self._moved >= _STUCK_FIRST:
                worst = next(iter(self._unsettled))
            if worst is None:
                self._tell_pause = _STUCK_FIRST
                self._tell_at = min(self._tell_at, now + _STUCK_FIRST)
            if worst is None or now < self._tell_at:
                return
            self._tell_at = now + self._tell_pause
            self._tell_pause = min(2 * self._tell_pause, _AGAIN_MAX)
            numbers = (len(self._unsettled),
                       sum(map(len, self._put_off.values())))
        self._subscription.say(
            logging.WARNING, 'stuck: %s; %d handed out and not settled, %d '
            'to be tried again', worst, *numbers)

    def _is_wanted(self, message):
        if message.get('event_type') == _REFUSED:
            return False        # it was logged
        if isinstance(message.get('priority'), str):
            return True
        # The dispatcher would fail on it, and have it requeued, for ever.
        self._subscription.say_once(
            logging.WARNING, 'dropped, for it has no priority: %r',
            self._subscription.line[:80])
        return False


def _deadline(seconds):
    return math.inf if seconds is None else time.monotonic() + seconds


class UnixTransportDriver(_base.BaseDriver):

    """Listen to what the unix notification driver publishes.

    For notification listeners, by configuration alone::

        [oslo_messaging_notifications]
        transport_url = unix:///run/nova/notifications.sock

    Every listener gets every notification, whatever its targets, and a
    record of those that it lost, with priority warn. It waits for the
    service, and reconnects. At most 100 messages, or one batch, wait for
    being acknowledged; a requeued one returns after 1 s, doubling to 30 s.
    """

    def __init__(self, conf, url, default_exchange=None,
                 allowed_remote_exmods=None):
        """Read the URL, and no more: services fork after this.

        :param url: the absolute path of the socket, without host or query
        :type url: oslo_messaging.TransportURL
        :raises: InvalidTransportURL, naming the URL and what is wrong
        """
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        try:
            if url.hosts:
                raise ValueError('%r: a unix:// URI has no host' % str(url))
            self._path = _parse_path(str(url), _CONNECT_MAX)
        except ValueError as error:
            raise oslo_messaging.InvalidTransportURL(str(url), str(error))

    def require_features(self, requeue=False):
        """Whatever a listener may ask for is there."""

    def send(self, *_args, **_kwargs):
        """RPC needs a broker.

        :raises: NotImplementedError
        """
        raise NotImplementedError('A unix:// transport is for notification '
                                  'listeners; it has no RPC')

    listen = send

    def send_notification(self, target, ctxt, message, version, retry):
        """Drop it: who publishes is the driver of a Notifier."""
        _warn_once('does not send notifications, which are dropped; use '
                   'driver = unix')

    def listen_for_notifications(self, targets_and_priorities, pool,
                                 batch_size, batch_timeout):
        """A listener, already connected if the service is there."""
        if pool:
            _warn_once('sends everything to every listener; only one process '
                       'of a pool gets it as pools mean it')
        return _base.PollStyleListenerAdapter(
            _Listener(self._path, batch_size), batch_size, batch_timeout)

    def cleanup(self):
        """Nothing is held; listeners are cleaned up by their servers."""


# -- the command line -------------------------------------------------------

_EPILOG = """
  unix-notifier /run/nova/notifications.sock | jq .payload
  unix-notifier --text --event-type '^compute[.]' /run/nova/notifications.sock

What happens to the connection, and losses, go to standard error. Exit status:
0 after --count notifications, or when nobody reads the output any more; 1 if
it cannot write; 2 for wrong arguments; 128 and the number of the signal that
ends it, which is 130 after Ctrl-C and 143 after SIGTERM."""

# Who did it, which is not what it was done to.
_OWNERS = ('user', 'tenant', 'project', 'domain')


def _ids(payload, event_type):
    """Where services put the id of the request or the resource, best first."""
    yield from map(payload.get, ('request_id', 'resource_info', 'resource_id'))
    words = event_type.split('.')
    for thing in (*words, *map('_'.join, itertools.pairwise(words))):
        part = payload.get(thing, payload.get(thing + 's'))
        part = part[0] if isinstance(part, list) and part else part
        if isinstance(part, dict):
            yield part.get('id')
        for suffix in ('_id', '_uuid', '_identity', 'id'):
            yield payload.get(thing + suffix)
    yield from map(payload.get, ('uuid', 'id'))
    for suffixes in ('_id', '_uuid', '_identity'), ('name',):
        for key in payload:
            if key.endswith(suffixes) and not key.startswith(_OWNERS):
                yield payload[key]


def _text(message):
    """One readable line: when, how grave, what, from whom, about which."""
    payload = message.get('payload')
    inner = payload if isinstance(payload, dict) else {}
    inner = next((inner[key] for key in inner if key.endswith('_object.data')
                  and isinstance(inner[key], dict)), inner)
    ids = (each for each in _ids(inner, _word(message.get('event_type')))
           if each and isinstance(each, (str, int)))
    if message.get('event_type') in (_LOST, _REFUSED):
        ids = iter([_strict(payload)[:-1].decode()])
    fields = [message.get(key) for key in (
        'timestamp', 'priority', 'event_type', 'publisher_id')]
    return '  '.join(map(_printable, (*fields, *itertools.islice(ids, 1))))


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog='unix-notifier', epilog=_EPILOG,
        description='Print the notifications of a service, as lines of JSON.'
                    '\nWaits for the service, and comes back to it.',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', metavar='PATH', help='as in sock_path')
    parser.add_argument('--event-type', metavar='REGEX', default='',
                        help='only event types in which REGEX is found')
    parser.add_argument('--count', metavar='N', type=int, default=sys.maxsize,
                        help='end after N notifications')
    parser.add_argument('--text', action='store_true', help='print time, '
                        'priority, event type, publisher, and an id')
    arguments = parser.parse_args(argv)
    try:
        arguments.path = _parse_path(arguments.path, _CONNECT_MAX)
        arguments.event_type = re.compile(arguments.event_type)
        _at_least(1)(arguments.count)
    except (ValueError, re.error) as error:
        parser.error(error)
    return arguments


class _StandardError(logging.Handler):
    """Drops what cannot be written. A stream would fail once more, at exit."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), b'%s\n' % self.format(
                record).encode(errors='backslashreplace'))


def _write(data):
    """Write all of it. Not by sys.stdout, which, if it is unbuffered, cuts.

    Also to who does not block: it waits, as for any slow reader.
    """
    output = sys.stdout.fileno()
    data = memoryview(data)
    while data:
        try:
            data = data[os.write(output, data):]
        except BlockingIOError:
            select.select([], [output], [])


def _print(stream, arguments):
    count = 0
    for message in stream:
        event_type = _word(message.get('event_type'))
        if arguments.event_type.search(event_type):
            # Not the line as it came, which need not be strict, nor harmless.
            _write(b'%s\n' % _text(message).encode() if arguments.text
                   else _strict(message))
            count += event_type != _REFUSED
            if count == arguments.count:
                break


def _close_unread(stream):
    """End the stream when nobody reads the output, though nothing comes."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)     # only for errors
    poller.poll()
    stream.close()


def main(argv=None):
    """Follow a socket: see ``--help``. Returns the exit status."""
    arguments = _arguments(argv)
    # At once, wherever it is. Not left to the default: for process 1, that of
    # a container, that is to go on. Who had it ignored (nohup) wants that.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))
    logging.basicConfig(
        format='%(message)s', level=logging.INFO,
        handlers=[_StandardError() if sys.stderr else logging.NullHandler()])
    if sys.stdout is None:
        LOG.error('Standard output is closed')
        return 1
    try:
        with subscribe(arguments.path) as stream:
            threading.Thread(target=_close_unread, args=(stream,),
                             daemon=True).start()
            _print(stream, arguments)
        os.write(sys.stdout.fileno(), b'')  # a lost terminal refuses that
    except BrokenPipeError:
        pass
    except OSError as error:
        LOG.error('Cannot write: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
