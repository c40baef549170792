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
* Not covered is what a killed process had not sent yet, and what a process
  that exits could not send within the second that it is given for that.

``subscribe()``, the transport ``unix://`` for notification listeners, and
``python -m unix_notifier`` are such subscribers, which come back by
themselves.

What a service can rely on: ``notify()`` never blocks, never raises and never
logs. It serializes, and sends the line itself where that is plainly possible.
Else it appends it to a queue and wakes the loop, a daemon thread that does
everything else. Who may touch what:

=================  ========================================================
any thread         ``UnixDriver``; ``_Hub``: start(), and close() at exit;
                   ``_Inbox``: the queue, the gate, what was dropped;
                   ``_HandOver``: the sends in notify(), with the turn
who has the turn   ``_Loop``, and all that it holds: ``_Log``, ``_Visits``,
                   ``_Files``, ``_Path`` with its ``_Lock``, ``_Fanout``
                   with the ``_Backlog``, and the role: ``_Seeker``,
                   ``_Leader`` with ``_Door``, ``_Places`` and ``_Relay``,
                   or ``_Follower`` with its ``_Sight``. The role owns its
                   streams, the ``_Subscriber`` of each or the ``_Uplink``;
                   what it is passed, an ``_Estate``, and what it passes, a
                   ``_Bequest``
any reader         ``_Subscription``, ``_Listener``: a lock, or one thread
=================  ========================================================

The turn is held by the loop from its waking to its sleeping; by the exit
handler once the loop has ended; by ``notify()``, if nobody has it, for one
line, or, where a loop would starve, for all the loop's work. Without the turn
the loop's thread sleeps, looks at the path, and logs what is wrong; settings,
pid, ``closing`` and the time of the next try are for any to read. The inbox is
where both sides meet: what both write there they write in one step. Without a
GIL that relies on CPython's locks of deques, dicts and objects, most of which
its documentation promises: as of 3.14, the first to encode no payload while
another thread changes it.
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
import marshal
import math
from multiprocessing import process
from multiprocessing import util
import os
import random
import re
import reprlib
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import sys
import termios
import threading
import time
import types
import unicodedata
import urllib.parse
import uuid
import warnings
import weakref

# Whoever starts the command did not choose eventlet, which warns of itself at
# length when oslo.messaging imports it: not shown, unless -W says otherwise.
# To any other process than the command, by its script or -m, nothing is done.
if (__name__ == '__main__'
        or 'unix-notifier' in map(os.path.basename, sys.argv[:1])):
    warnings.filterwarnings('ignore', r'\s*Eventlet is deprecated',
                            append=True)

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
_PATH_MAX = 101

# Bytes: of a chunk, the unit that subscribers share and one that lags loses;
# and of a send. Large sends keep the loop ahead: each system call gives up the
# GIL, which a busy publisher returns only after 5 ms.
_CHUNK_MAX = 256 * 1024
_SEND_MAX = 1024 * 1024

# Bytes a chunk costs beside its data: _Chunk, bytes object and two counts.
_CHUNK_COST = 256

# Bytes of a line; a notification that takes more is lost. Who reads lines,
# a leader or a consumer, may take a longer one for nonsense.
_LINE_MAX = 64 * 1024 * 1024

# Bytes per entry of the queue: a line takes one for each KiB that it begins
# (itself, then None), so the length, exact without a lock, bounds the bytes.
_QUEUE_UNIT = 1024

# Entries that are taken from the queue at a time.
_BATCH = 256

# Seconds that a publisher far ahead of the loop sleeps at each call, for the
# loop to get the GIL and catch up: of what one emits flat out, ten readers
# lose 1 %, and without that 64 %.
_GIVE_WAY = 50e-6

# errno of accept() if process or machine has no descriptor or buffer left.
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# errno: we cannot lead, but another may. The lock is held, or denied to us (a
# container may have the directory mounted read-only); or the path is in use,
# perhaps by a leader that has lost its lock.
_LED = (errno.EAGAIN, errno.EPERM, errno.EACCES, errno.EROFS,
        errno.EADDRINUSE)

# The backlog of listen(): a hundred readers may come back between two turns.
# While more than _CROWD come within a second it is _CROWD_BACKLOG, for a turn
# has to accept all who wait before it sends.
_BACKLOG = 128
_CROWD = 256
_CROWD_BACKLOG = 8

# Seconds between turns while subscribers come, go or talk without a pause.
_REST = 5e-3
_REST_MAX = 15e-3

# Seconds between lines of log on who comes and goes, or lags; and the number
# of events that such a line tells in full.
_VISITS_INTERVAL = 1
_VISITS_NAMED = 4

# Bytes that a subscriber may send us, which are discarded; then it is cut off.
_DISCARD_MAX = 64 * 1024

# SO_PASSRIGHTS (Linux 6.16): at 0, who passes a descriptor to the socket gets
# EPERM. Else one that was passed and not taken is closed as we read or close
# the socket; if it is a socket that lingers, that takes us as long as its
# other end likes.
_PASSRIGHTS = 83

# Seconds: the least between two looks at a path in use; the most for sending
# at exit, and of that the most without any progress.
_CHECK_INTERVAL = 1
_EXIT_TIME = 1
_EXIT_STALL = 0.1

# Seconds until what lasts is logged again, as the log may have been opened, or
# rotated, since: a trouble, after twice as long each time, up to _AGAIN_MAX;
# and who serves the path, then daily.
_AGAIN = 10
_AGAIN_MAX = 60 * 60
_DAY = 24 * 60 * 60

# notify() itself sends some 32 lines in a row, then one each 0.5 ms, to
# at most 16 streams; what is beyond goes to the loop, whose batches cost less.
_HAND_OVER_TIME = 0.5e-3
_HAND_OVER_AHEAD = 32 * _HAND_OVER_TIME
_HAND_OVER_MAX = 16

# Seconds: a send that takes longer had to wait for the GIL; the turn's later
# sends then keep it. Without that, ten subscribers of a process with a thread
# that never rests get a line after twice the time (p99: 3.6 times). Bytes: a
# longer send would keep the GIL from other threads for too long.
_GIL_LATE = 1e-3
_SHORT = 16 * 1024

# For calls into the kernel that are short and never wait. Through PyDLL they
# keep the GIL, which a busy thread returns only after 5 ms: beside one, a poll
# in notify() takes 1 us, where select.poll() takes 250 on average; and a loop
# that is woken cannot take the GIL from its waker, which cost that one 25 us.
# Monkey patching, which removes select.poll(), does not reach it.
_libc = ctypes.PyDLL(None)

# A sigset_t: signals that our threads block. Not those that a thread raises by
# its own fault: their handler, such as faulthandler's, has to run in it.
_signals = ctypes.create_string_buffer(128)
_libc.sigfillset(_signals)
for _number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
                signal.SIGTRAP, signal.SIGSYS):
    _libc.sigdelset(_signals, _number)


def _start(thread):
    """Start a thread, which will take no signal, unless it is a green one.

    A signal that the service blocks, to wait for it, would be given to a
    thread that does not, and may end the process there. The mask is inherited
    since the thread could set one only once it has the GIL. No handler that
    raises can leave our mask set here: handlers run at the end of a call, or
    at the start of a function, and from there ``finally`` restores the mask.
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


# An int: to combine the IntFlags at each send would take 2 us.
_AT_ONCE = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _send_noted(filenos, data, sent):
    """Send to each, waiting for none; ``sent`` gets what send() returned.

    Each result is in the list before a signal's handler can raise.
    """
    sent.extend(map(_libc.send, filenos, itertools.repeat(data),
                    itertools.repeat(ctypes.c_size_t(len(data))),
                    itertools.repeat(_AT_ONCE)))


def _send_short(sock, data):
    """``sock.send()``, without giving up the GIL."""
    sent = _libc.send(sock.fileno(), data, ctypes.c_size_t(len(data)),
                      socket.MSG_NOSIGNAL)
    # It failed: a second try, by Python, tells or raises why.
    return sent if sent >= 0 else sock.send(data, socket.MSG_NOSIGNAL)


# -- format: a message becomes one line -------------------------------------

# Limits of _plain(), which copies what the encoder cannot take, so that it
# ends within a second: levels; containers, and items of what may have no end;
# and for how many containers one that is cut counts: among three dozen dicts
# that hold one another there are 10 ** 41 paths.
_DEPTH_MAX = 100
_ITEMS_MAX = 256 * 1024
_CUT_COST = 256

# For repr(), which Python 3.14 bounds by the size of the stack alone: a dict
# 30 000 deep takes it 0.4 s, and no other thread runs meanwhile.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = _REPR.maxset = 64
_REPR.maxfrozenset = _REPR.maxdeque = _REPR.maxarray = 64
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 64 * 1024


def _as_text(value):
    """The repr of what JSON cannot take, or a constant.

    For netaddr's classes and their subclasses the str, as jsonutils does.
    """
    try:
        if any(str(each.__module__).startswith('netaddr.')
               for each in type(value).__mro__):
            return str(value)
        return _REPR.repr(value)
    except Exception:
        return '<no repr>'


def _taken(items):
    """A list of the items; ValueError: they are many, or have no end."""
    taken = list(itertools.islice(items, _ITEMS_MAX))
    if len(taken) == _ITEMS_MAX:
        raise ValueError
    return taken


def _primitive(value):
    """One level of what ``jsonutils.dumps`` would print, else a text.

    jsonutils itself would recurse: drain an iterator, which is the caller's,
    and never come back from one without an end.
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
    # Containers as they are: out of stack, _primitive() would make them texts.
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


# The encoder's check for cycles: ids of what is being encoded, by any thread.
# Two that encode the same at once see a cycle, and fall back: it costs time.
_markers = {}


def _make_encoder():
    """A ``json.dumps()`` that makes its C encoder once: 8.6 us, not 9.5.

    The separators are the defaults, so that a line is what the log driver
    prints, byte for byte, where nothing was masked.
    """
    if json.encoder.c_make_encoder is None:
        return json.JSONEncoder(allow_nan=False, default=_plain).encode

    def make(markers):
        return json.encoder.c_make_encoder(
            markers, _plain, json.encoder.encode_basestring_ascii, None, ': ',
            ', ', False, False, False)

    if getattr(sys, '_is_gil_enabled', lambda: True)():
        encode = make(_markers)
        return lambda value: ''.join(encode(value, 0))
    # Without a GIL none can be shared: to test and to mark are two steps, and
    # who fails clears the marks of all.
    return lambda value: ''.join(make({})(value, 0))


_dumps = _make_encoder()

# What the Notifier puts into a message, and no more of it goes out.
_KEYS = ('message_id', 'publisher_id', 'event_type', 'priority', 'payload',
         'timestamp')

# A Notifier's topics, unless it is given others. A line without the key is of
# these.
_TOPICS = ['notifications']

# What is sent of a request context, if sock_send_context is set: which request
# it is, and whose. Only what is listed, for services add what they like: a
# service catalogue, the token by another name. The keys are messagingv2's. In
# oslo.context's dict user, project and domain are ids; user_id and the names
# are attributes alone.
_CONTEXT_KEYS = (
    'request_id', 'global_request_id', 'user_id', 'project_id', 'domain_id',
    'user_domain_id', 'project_domain_id', 'user_name', 'project_name',
    'domain_name', 'user_domain_name', 'project_domain_name', 'is_admin',
    'roles')
_CONTEXT_OTHERS = ('user', 'tenant', 'project', 'domain', 'user_domain',
                   'project_domain', 'tenant_id', 'tenant_name')

# _LONE finds what is half of a surrogate pair, or only looks so. _ESCAPE then
# takes the line escape by escape, which tells: one with a group stays.
_LONE = re.compile(rb'\\(?:ud(?:[89ab]..(?!\\ud[c-f])'
                   rb'|[c-f](?<!\\ud[89ab]..\\ud.))|\\ud[89a-f])')
_ESCAPE = re.compile(rb'\\(?:(ud[89ab]..\\ud[c-f]..|[^u])|ud[89a-f]..)')


def _is_harmless(value):
    """Whether it is what ids, names and roles are; not what holds others."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, (str, int))


def _context(ctxt):
    """What is sent of a request context: a dict, empty if it has nothing.

    A Notifier passes what its serializer made of the context: by default the
    object itself without its tokens, or {} where it cannot remove them, as
    from a plain dict.
    """
    try:
        values = ctxt
        if not isinstance(ctxt, dict):
            values = dict(ctxt.to_dict())
            for key in _CONTEXT_KEYS:
                if key not in values:
                    values[key] = getattr(ctxt, key, None)
        return {key: value for key in _CONTEXT_KEYS + _CONTEXT_OTHERS
                if key in values and _is_harmless(value := values[key])}
    except Exception:   # None, or of a service's own class
        return {}


# As of Python 3.14 the encoder goes as deep as the stack lets it and, as it
# fails, adds a note to the error at each level: of a dict 30 000 deep it took
# 37 ms, while no other thread ran. So marshal is asked first: it takes 1 us,
# and refuses 2000 levels.
_PROBES = sys.version_info >= (3, 14)


def _is_deep(message):
    try:
        marshal.dumps(message)
    except ValueError as error:     # or it knows nothing of a type
        return 'deep' in str(error)
    return False


def _encode(message, mask=False, ctxt=None, topics=None):
    """Serialize a notification to one line of ASCII, LF included.

    It is valid JSON (RFC 8259) whatever the payload. Only _KEYS go out, for
    all drivers share the message, and messagingv2, if it comes first, adds the
    request context, tokens included.

    :param ctxt: the request context to send of; None for no key
    :param topics: what to send as that, a list; None for no key
    """
    if len(message) > len(_KEYS):
        message = {key: message[key] for key in _KEYS if key in message}
    if ctxt is not None:
        message = dict(message, context=_context(ctxt))
    if topics is not None:
        message = dict(message, topics=topics)
    try:
        if _PROBES and _is_deep(message):
            raise RecursionError
        return _line(message, mask)
    except Exception:
        _markers.clear()    # an encoder that failed leaves its marks
        return _line(_plain(message), mask)


def _line(message, mask):
    text = _dumps(message)
    if mask:    # not message: of an IPNetwork it would walk every address
        text = _dumps(strutils.mask_dict_password(json.loads(text)))
    line = text.encode('ascii') + b'\n'
    if b'\\' in line and _LONE.search(line):    # jq would stop there for good
        line = _ESCAPE.sub(
            lambda found: found[0] if found[1] else b'\\ufffd', line)
    return line


_LOST = 'notifications.lost'
_REFUSED = 'notifications.refused'


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
    return _record(_LOST, lost=lost, reason=reason)


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
    cfg.BoolOpt('sock_send_context',
                default=False,
                help='Send of the request context, as the key context, what '
                     'identifies the request, its user, project and domain, '
                     'and their roles. Tokens and the service catalogue are '
                     'never sent.'),
]


def register_opts(conf):
    """Register the options of the unix driver.

    An option that is already registered under the name is used as it is: a
    vendored copy of this module may differ in the help text.

    :param oslo_config.cfg.ConfigOpts conf: where to register
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
    'mask_secrets', 'send_context'))


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


def _at_least(value, limit):
    if value < limit:
        raise ValueError('%d is less than the limit, %d' % (value, limit))
    return value


def _read_settings(conf):
    """Read and check the options; a ValueError names one and its limit."""
    group = conf[_GROUP]    # outside read(): its failure is no option's

    def read(name, parse=lambda value: value, *limit):
        try:
            return parse(group[name], *limit)
        except (ValueError, cfg.Error) as error:    # or bad type, bad $option
            raise ValueError('Option %s of [%s]: %s' % (name, _GROUP, error))

    return _Settings(read('sock_path', _parse_path),
                     read('sock_mode', _parse_mode),
                     read('sock_group') or None,
                     read('sock_max_subscribers', _at_least, 1),
                     read('sock_buffer_size', _at_least, 64 * 1024),
                     read('sock_mask_secrets'),
                     read('sock_send_context'))


# -- the lock and the socket file -------------------------------------------

_no_forks = {}      # by pid: a forked child needs one that nobody holds


def _no_fork():
    """The lock that is held during a fork.

    Held, too, while a descriptor is opened and put where abandon() finds it: a
    child that inherits the lock of a path unknowingly would keep everybody
    from leading after the parent's death; a listener, or a connection, would
    keep others waiting. And while the loop logs: the buffer of a stream that
    is being written to would stay locked in the child.
    """
    return _no_forks.setdefault(os.getpid(), threading.RLock())


def _identity(info):
    """What tells a file from another that takes its path, or its inode.

    Of a socket, mtime is when it was bound; chmod and chown change ctime.
    """
    return [info.st_dev, info.st_ino, info.st_mtime_ns]


def _name(path):
    """The name in its directory, which others may reach by another path."""
    return '/' + os.path.basename(path)     # and which is not 'pid'


def _file_id(file):
    """What tells an open file from another that gets its descriptor."""
    info = os.fstat(file.fileno())
    # None for what has no type, such as an eventfd: all share one inode.
    return _identity(info)[:2] if stat.S_IFMT(info.st_mode) else None


def _is_at(path, identity):
    """Whether the path is that file, by all but mtime: writing changes it."""
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
    until that leaves in good order, and by name the identity of what it bound.
    It is never removed: removing it while another process waits for it would
    make two owners.
    """

    def __init__(self, path, fd=None):
        self.path = path
        self.fd = fd    # passed to an heir: the flock is the open file's

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
            # Perhaps not by the owner: who may only read it can lock it, too.
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

    def write(self, bound=(), vacated=False):
        """Name the owner and what it bound, for who comes after a crash.

        :param vacated: it leaves in good order, and owes nobody a line
        """
        record = dict(self.read(), pid=None if vacated else os.getpid(),
                      **{_name(each.path): each.identity for each in bound})
        data = json.dumps(record).encode('ascii')
        if os.pwrite(self.fd, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        os.ftruncate(self.fd, len(data))

    def vacated(self):
        """Whether its last owner left in good order; False for a new file."""
        return self.read().get('pid', 'unknown') is None

    def intact(self):
        """Whether the lock is held, and on the file that others would open."""
        with contextlib.suppress(OSError):  # not held, or closed by others
            return _is_at(self.path, _identity(os.fstat(self.fileno())))
        return False

    def free(self):
        """Unlock, as close() would not while a would-be heir has it open."""
        if self.fd is not None:
            with contextlib.suppress(OSError):  # others have closed it
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self):
        """Only close: LOCK_UN in a forked child would free the parent's."""
        # A child must not be left one that it does not know of.
        with _no_fork(), contextlib.suppress(OSError):  # as above
            fd, self.fd = self.fileno(), None
            os.close(fd)


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
        """Remove the file, if it is ours. If it fails, the next owner will."""
        with contextlib.suppress(OSError):
            if self.intact():
                os.unlink(self.path)


def _bind(sock, path, mode, lock, gid=None, backlog=None):
    """Bind the socket; who connects is refused until it listens.

    Mode and group are set before it does, so that nobody slips in (the umask
    is the whole process's). The lock names it, for who comes after a crash.

    :param backlog: to listen with at the end; None: it does not listen yet
    :raises: OSError, naming the path; nothing is left behind
    """
    bound = None
    try:
        now = time.time()
        sock.bind(path)
        # At once, so that any failure unlinks it: left, it would look served.
        bound = _Bound(path, sock, _new_socket(os.lstat(path), now))
        _set_access(bound, mode, gid)
        lock.write([bound])
        if backlog is not None:
            sock.listen(backlog)
        return bound
    except OSError as error:
        if bound is not None:
            bound.unlink()
        sock.close()
        raise OSError(error.errno, error.strerror, path)


def _set_access(bound, mode, gid):
    """Set group and mode; not by the name, which may be a link by now.

    Whoever may write to the directory may have it point to another's file.
    """
    file = os.open(bound.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _identity(os.fstat(file)) != bound.identity:
            raise OSError(errno.EEXIST, 'replaced as it was bound')
        name = '/proc/self/fd/%d' % file
        if not os.path.lexists(name):
            raise OSError(errno.ENOENT, 'no /proc, by which to set its mode')
        if gid is not None:     # a sandbox may forbid even chown(-1, -1)
            os.chown(name, -1, gid)
        os.chmod(name, mode)
    finally:
        os.close(file)


def _new_socket(info, now):
    """The identity of a socket that we have just bound; else an OSError."""
    # The clock of a file system may be behind, by a second if it is coarse.
    if not (stat.S_ISSOCK(info.st_mode) and info.st_uid == os.geteuid()
            and info.st_mtime > now - 1):
        raise OSError(errno.EEXIST, 'replaced as it was bound')
    return _identity(info)


def _answers(path):
    """Whether a process listens at the path."""
    with _no_fork(), _unix_socket() as probe:   # a child would stay connected
        # EAGAIN: its backlog is full. Any other error: leave it alone, too.
        return probe.connect_ex(path) not in (errno.ECONNREFUSED,
                                              errno.ENOENT)


def _clear(path, left):
    """Remove a dead owner's socket, if it is at the path. Needs the lock.

    ``left`` is the identity of what the last owner bound: dead, for we have
    its lock, even if a child of it still answers there. Anything else in the
    way raises OSError, and is kept.
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
    """Some lines, which all subscribers share, and the way to the next.

    A chunk without a next one is the tail: empty, and filled in place.
    """

    __slots__ = ('data', 'lost', 'reason', 'start', 'first', 'next')

    def __init__(self, start, first, data=b'', lost=0, reason=None,
                 following=None):
        self.start = start  # bytes before it, since the backlog began
        self.first = first  # notifications before it, likewise
        self.data = data
        # Losses, if it is a record of those. Its data is written by the first
        # subscriber that is to be sent it; until then, it is empty.
        self.lost = lost
        self.reason = reason    # why they were lost
        self.next = following

    def preceded(self, first, data, lost, reason):
        """A chunk that one subscriber alone sends, before this one."""
        return _Chunk(self.start, first, data, lost, reason, self)

    def before(self, offset):
        """Notifications before this byte of its lines, since it all began."""
        return self.first + self.data.count(b'\n', 0, offset)


class _Backlog:
    """What subscribers have yet to send: a linked list of chunks.

    No I/O; for whoever has the turn, of which notify() only counts in the
    tail. A subscriber holds the chunk that it is at, and thereby all that
    follow: what everybody was sent, or came while there was nobody, is freed
    by itself. It stays bounded since a subscriber that is further behind than
    ``limit`` moves on (see ``_Subscriber.trim``).
    """

    def __init__(self, limit):
        self.limit = limit
        self.tail = _Chunk(0, 0)

    def append(self, data, lines, lost=0, reason=None):
        """Add a chunk of whole lines, or of losses, without data."""
        chunk = self.tail
        chunk.data, chunk.lost, chunk.reason = data, lost, reason
        chunk.next = self.tail = _Chunk(
            chunk.start + len(data) + _CHUNK_COST, chunk.first + lines + lost)

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
    """A connected socket, and a cursor in the backlog."""

    slow = 'subscriber too slow'    # the reason in the records of its losses
    visits = True           # its input counts as a visit: see slow_down()

    def __init__(self, sock, backlog, who, uid=None, start=None):
        self.sock = sock
        self.who = who
        self.uid = uid
        self.mask = 0           # what the selector watches
        self.blocked = False    # the kernel takes no more for now
        self.half_closed = False    # it will send no more, but reads on
        self.discarded = 0      # bytes it sent us
        self.ended = None       # why, once it is to be seen off
        # The cursor: at the tail, or where another stream has its own.
        self.chunk = start.chunk if start else backlog.tail
        self.offset = start.offset if start else 0  # bytes that were sent
        # The account, in notifications: see received().
        self.joined = self.chunk.before(self.offset)
        self.lost = 0           # as told by records that were sent whole
        self.lagging = None     # ``lost`` when it began to lag; else None

    def wanted(self):
        return (0 if self.half_closed else selectors.EVENT_READ) | (
            selectors.EVENT_WRITE if self.blocked else 0)

    def pending(self):
        return self.chunk.next is not None

    def chunks(self):
        chunk = self.chunk
        while chunk.next:
            chunk.data = chunk.data or self.lost_line(chunk.lost, chunk.reason)
            yield chunk
            chunk = chunk.next

    def flush(self, keep_gil=False):
        """Send once, what the kernel takes; an OSError: the peer is gone.

        :param keep_gil: keep the GIL, if no more than _SHORT bytes are sent
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
        self.advance(sent)

    lost_line = staticmethod(_lost_record)

    def _buffers(self):
        """What comes next, up to about _SEND_MAX bytes."""
        buffers, size = [], 0
        for chunk in self.chunks():
            buffers.append(chunk.data)
            # Each counts for 2 KiB at least: the kernel takes 1024 buffers.
            size += max(len(chunk.data), _SEND_MAX // 512)
            if size >= _SEND_MAX:
                break
        if self.offset:
            buffers[0] = memoryview(buffers[0])[self.offset:]
        return buffers

    def advance(self, sent):
        """Note that so many bytes were sent."""
        self.offset += sent
        # Not beyond a record that has yet to be written, nor the tail.
        while self.chunk.data and self.offset >= len(self.chunk.data):
            self.offset -= len(self.chunk.data)
            self.lost += self.chunk.lost
            self.chunk = self.chunk.next

    def received(self):
        """How many were sent: what is before the cursor and was not lost."""
        return self.chunk.before(self.offset) - self.joined - self.lost

    def trim(self, backlog):
        """Skip the oldest lines if too far behind; whether any were.

        A line that is half sent goes whole. The newest chunk is kept in any
        case, so that a notification that is larger than the buffer reaches
        who is ready for it.
        """
        here = chunk = self.chunk
        while backlog.behind(chunk) > backlog.limit and chunk.next.next:
            chunk = chunk.next
        if chunk.start == here.start:   # not moved, or by preceded() alone
            return False
        data, sent = here.data, self.offset
        start = end = data.rfind(b'\n', 0, sent) + 1
        if start < sent:
            end = data.index(b'\n', sent) + 1
        # Lines count for one each; a record, a whole chunk, for its losses.
        first = here.before(start)
        after = (here.next.first if 0 < end == len(data)
                 else here.before(end))
        lost = chunk.first - after
        if lost:
            chunk = chunk.preceded(after, b'', lost, self.slow)
        if start < sent:
            chunk = chunk.preceded(first, data[start:end], here.lost,
                                   here.reason)
        self.chunk, self.offset = chunk, sent - start
        return lost > 0

    def listen(self):
        """Discard what the peer sent; why it must part, or None."""
        try:
            size = len(_recv(self.sock, _DISCARD_MAX))
            self.half_closed = not size
        except BlockingIOError:     # perhaps for out-of-band data: dropped
            size = 1
        except PermissionError as error:
            return error.strerror
        except OSError:
            return 'it is gone'
        self.discarded += size
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
    """Who connected, or else who listens, in words; and the uid."""
    pid, uid, _ = struct.unpack('iII', sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return 'pid %d, uid %d' % (pid, uid), uid


# -- sockets ------------------------------------------------------------------

def _is_patched():
    """Whether threads are green: to sleep is to let others run."""
    return not isinstance(time.sleep, types.BuiltinFunctionType)


@functools.cache
def _can_guard():
    """See _guarded(); an OSError: it could not be found out."""
    with _no_fork(), socket.socket(socket.AF_UNIX) as sock:
        return _libc.setsockopt(sock.fileno(), socket.SOL_SOCKET, _PASSRIGHTS,
                                bytes(4), 4) == 0


def _guarded():
    """Whether the kernel has _PASSRIGHTS, by which our sockets refuse any."""
    with contextlib.suppress(OSError):  # out of descriptors: ask again later
        return _can_guard()
    return False


def _unix_socket(fileno=None):
    """A non-blocking socket; of ``fileno``, if given, which is so already."""
    # Family and type even with a fileno: a green socket does not look them up.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM
                         | socket.SOCK_NONBLOCK, fileno=fileno)
    if sock.gettimeout() != 0:      # only a green one: it is a system call
        sock.setblocking(False)
    if fileno is None and _guarded():   # inherited by what it accepts
        sock.setsockopt(socket.SOL_SOCKET, _PASSRIGHTS, 0)
    return sock


def _recv(sock, size):
    """``sock.recv()``; a PermissionError if descriptors come with it."""
    if not _guarded():
        # Else out-of-band data could not be peeked, nor be waited for.
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
    if fd >= 0:
        return _unix_socket(fd)
    sock = sock.accept()[0]     # why it failed is raised by another try
    sock.setblocking(False)
    return sock


def _hang_up(sock):
    """End the stream, though a forked child has it open. Keeps the GIL."""
    _libc.shutdown(sock.fileno(), socket.SHUT_RDWR)     # the peer may be first
    _close(sock)


def _close(sock):
    """Close it; in a thread where that may block: see _PASSRIGHTS.

    A thread of C: Python's are green under eventlet.
    """
    with _no_fork():    # a child would not know of the number
        thread, fd = ctypes.c_ulong(), sock.detach()
        if _guarded() or _libc.pthread_create(
                ctypes.byref(thread), None, _libc.close, ctypes.c_void_p(fd)):
            _libc.close(fd)
        else:
            _libc.pthread_detach(thread)


def _close_all(files):
    """Close them; a child that is forked amid that would keep them open."""
    with _no_fork():
        for each in filter(None, files):
            each.close()


# -- any thread ---------------------------------------------------------------

_ONE = struct.pack('Q', 1)
_count = ctypes.create_string_buffer(len(_ONE))     # for read(); unused


class _Event:
    """An eventfd: readable while it is set. Half a socketpair's cost."""

    def __init__(self, fd=-1):
        self._fd = fd
        if fd < 0:
            # On the number of a new socket, which eventlet is told of: in a
            # forked child it takes numbers that we closed for waited for, and
            # would raise at every wait for an eventfd that got one of them.
            with socket.socket(socket.AF_UNIX) as new:
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._fd = new.detach()     # or a green one would close it
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    def close(self, _close=os.close):   # there is no ``os`` at the very end
        """Call it only where no thread can be about to write to it.

        Elsewhere leave it to __del__: who is about to write has a reference,
        and must not write to another file that gets the number.
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
        # Under eventlet, after a fork, it may be reported though it is not
        # set: then this fails, and nothing is done.
        _libc.read(self._fd, _count, ctypes.c_size_t(len(_ONE)))


def _poll(*filenos):
    """A function that polls them, in order; 0.5 us, for it has no frame."""
    # An array of struct pollfd. All threads share it: the kernel reads it,
    # returns a count of its own, and writes to what nobody looks at.
    pollfds = ctypes.create_string_buffer(b''.join(
        struct.pack('ihh', fileno, select.POLLIN, 0) for fileno in filenos))
    # The number is no c_ulong object, for Linux reads just an int of it.
    return functools.partial(
        _libc.poll, ctypes.byref(pollfds), len(filenos), 0)


_yes = functools.partial(bool, True)    # somebody is, or may be, there
_no = functools.partial(bool, False)    # nobody can be


class _Inbox:
    """All that publishers may touch: what they leave for the loop.

    ``look`` is the gate, which notify() asks before it serializes: is anybody
    there? It is ``_yes``, ``_no``, or a look of the kernel's at those who have
    connected and whom the loop has not met yet.

    No subscriber is missed. notify() looks, finds nothing, and reads the gate
    again; let G be that moment. If the loop has changed the gate before G,
    notify() looks once more, by the new one. If it did so after G, it
    accepted after the look, so the look would have found the connection
    waiting. (A number that was closed and taken by another file can make a
    look say yes, which only costs a line to the loop.)
    """

    def __init__(self, settings, start):
        self._start = start     # where there is no loop to be woken
        self._mask_secrets = settings.mask_secrets
        self.hand_over = None   # _HandOver.send
        self.look = _yes        # until it is clear who serves
        self.lines = collections.deque()    # and None, as pads: _QUEUE_UNIT
        self.room = settings.buffer_size // _QUEUE_UNIT
        self.ahead = self.room // 2     # more queued: publishers give way
        self.rest = None        # a line, and what each stream got of it
        # += is not one step; next() is, in CPython without a GIL as well.
        self.drops = itertools.count()
        self.gap = None         # the number of the last drop, or nearly
        self.asleep = True      # the loop must be woken, or started
        self.waker = None
        self.checked = time.monotonic()     # when the path was looked after
        # What follows, look, room, ahead and rest are written with the turn.
        self._gap_seen = None   # last seen; while gap is another, all drop
        self._drops_read = 0    # what next(drops) gives if none was since
        self.lost = 0           # drops that a record is due for

    def emit(self, message, ctxt=None, topics=None):
        """Queue a notification for whoever is connected; else drop it."""
        look = self.look
        if not (look() or self._anyone(look)):
            return
        queued = len(self.lines)
        if self.gap is not self._gap_seen or queued >= self.room:
            self.drop()
            return
        line = _encode(message, self._mask_secrets, ctxt, topics)
        if self.gap is not self._gap_seen or len(line) > _LINE_MAX:
            self.drop()
            return
        if queued or len(line) > _SHORT or not self.hand_over(line):
            # In one step: the loop finds no line without its pads (without a
            # GIL, not for long). And += is no call, where a handler may raise.
            lines = self.lines
            lines += (line,) + (None,) * (len(line) // _QUEUE_UNIT)
        elif self.rest is None:
            return
        # The loop raises the flag before it looks at the queue for the last
        # time. We append before we read the flag. One sees the other.
        try:
            if self.asleep:
                self.wake()
            if queued > self.ahead:
                self._give_way()
        except Exception:  # nosec B110
            pass        # out of stack; it is queued, and the next one wakes

    def _anyone(self, look):
        """Whether the gate has changed since, and then finds anybody."""
        while look is not self.look:
            look = self.look
            if look():
                return True
        self.wake_if_due(time.monotonic())
        return False

    def wake_if_due(self, now):
        """Have the loop look after the path, now and then: _Loop.step()."""
        if now - self.checked > _CHECK_INTERVAL:
            self.wake()

    def drop(self):
        """Count a notification for which there is no room, at its place.

        It opens a gap: nothing more is queued until the loop closes that. It
        first reads gap, count and length of the queue, in this order: so what
        it closes is in the count, and the record goes behind that length, that
        is behind all that a thread queued before it dropped something, and
        before all that it queues later.
        """
        for self.gap in self.drops:     # next(), but no call, after which a
            break                       # signal's handler might raise
        try:
            if self.asleep:
                self.wake()
            if self.gap % _BATCH == _BATCH - 1:
                self._give_way()    # a drop takes 0.5 us; the loop waits 5 ms
        except Exception:  # nosec B110
            pass        # as in emit(); it is counted

    @staticmethod
    def _give_way():
        """Let the loop have the GIL.

        A system call of the loop costs it the GIL for up to 5 ms while we
        run flat out. Not when sleep is patched: that would switch to other
        green threads, in the middle of the caller's.
        """
        if not _is_patched():
            time.sleep(_GIVE_WAY)

    def wake(self):
        waker = self.waker
        if waker is None:
            self._start()   # the flag stays up: it may fail
            return
        # Lowered first: once set() has woken the loop it may sleep again, with
        # the flag up; if we lowered that, nobody would wake it any more.
        self.asleep = False
        try:
            waker.set()
        except BaseException:   # out of stack, or a signal handler raises
            self.asleep = True      # or nobody would wake it again
            raise

    def waiting(self):
        """Whether publishers have left anything for the loop."""
        return (bool(self.lines) or self.gap is not self._gap_seen
                or self.rest is not None)

    def count(self):
        """How much is due; ``lost`` gets what was dropped after it: drop()."""
        gap, drops, due = self.gap, next(self.drops), len(self.lines)
        self._gap_seen = gap    # closed, unless there is a new one
        self.lost += drops - self._drops_read
        self._drops_read = drops + 1    # our own next() took one
        return due

    def left(self):
        """How many came and will not be sent from here, as of now."""
        due, lines = self.count(), self.lines.copy()    # they may go on
        return self.lost + sum(
            line is not None for line in itertools.islice(lines, due))

    def take(self, due):
        """Yield what is due, in batches, or there would be three copies."""
        self.room -= due    # it is the backlog's now: see _Fanout._share()
        for size in range(due, 0, -_BATCH):
            yield [self.lines.popleft() for _ in range(min(size, _BATCH))]


# Whom notify() sends to: their descriptors; what send() returns if none took
# it; the look to take before, and whether that has to find anybody.
_Aim = collections.namedtuple('_Aim', 'fds none look expected')


class _Turn:
    """The turn: who has it does the loop's work, and no other thread does.

    The loop has it from its waking to its sleeping, notify() for a single
    send, if it can be had. No lock: monkey patching makes those green, and
    of green threads and native ones both may call notify().
    """

    def __init__(self):
        self.renew()

    def renew(self):
        """Take it from whoever has it, who is not here any more."""
        self.free = collections.deque([True])   # empty while someone has it
        self.holder = None  # the thread that has it, or was the last to
        self.aim = None     # an _Aim, if notify() may send; set as a turn ends

    def take(self, until=math.inf):
        """Wait for it; returns the deque to give it back to: append(True).

        self.free may be another by then: see renew(). A TimeoutError: until
        time.monotonic() it was not to be had.
        """
        us = _thread.get_ident()
        while True:
            free = self.free
            try:
                del free[0]     # as in _HandOver.send()
                self.holder = us
            except IndexError:
                if time.monotonic() > until:
                    raise TimeoutError('another thread has the turn')
                time.sleep(_GIVE_WAY)   # for notify() to send
            else:
                self.aim = None
                return free

    @contextlib.contextmanager
    def taken(self, until=math.inf):
        free = self.take(until)
        try:
            yield
        finally:
            free.append(True)

    def take_from_us(self):
        """At exit, by a signal's handler: from the notify() that waits for us.

        Any other thread gives it back.
        """
        if not self.free and self.holder == _thread.get_ident():
            self.renew()


class _HandOver:
    """notify() sends a line here and now, if that plainly can be.

    Then it is out of this process, whatever becomes of that. It saves the
    waking and the loop's wait for the GIL, too. All else is left to the loop,
    as are errors and the rest of a line.

    Only to a few streams, which at the end of the last turn had been sent all
    there was: the ``aim``. Order is kept: what this thread emitted since was
    sent, or is in the queue, which only who has the turn empties: now us. And
    only if nobody has connected whom the loop must accept first; or, at a
    follower, if listener or presence of the leader tell of somebody.
    """

    def __init__(self, turn, inbox, backlog):
        self._turn = turn
        self._inbox = inbox
        self._backlog = backlog
        # time.monotonic() up to which sends count. Read without the turn.
        self.busy_until = 0

    def aim_at(self, role):
        """At the end of a turn: see above."""
        if 0 < len(role.streams) <= _HAND_OVER_MAX and not any(
                each.blocked or each.ended or each.pending()
                for each in role.streams):
            self._turn.aim = _Aim(
                [each.sock.fileno() for each in role.streams],
                [-1] * len(role.streams), *role.clear())

    def send(self, line):
        """Send it, if that can be; whether it was, or has begun to be."""
        turn, inbox, now = self._turn, self._inbox, time.monotonic()
        aim, free, sent = turn.aim, turn.free, []
        if aim is None or self.busy_until - now > _HAND_OVER_AHEAD:
            return False
        whole, us = [len(line)] * len(aim.fds), _thread.get_ident()
        try:
            del free[0]     # no call, after which a handler might raise
            turn.holder = us
        except IndexError:      # another thread has it
            return False
        try:
            try:
                self._send(aim, line, sent, now)
            finally:    # no call, where a handler may raise, till all is noted
                if inbox.rest and inbox.rest[1] is sent:    # not taken over
                    if sent == whole:
                        self._backlog.tail.first += 1   # as if it were there
                    if not sent or sent == whole or sent == aim.none:
                        inbox.rest = None
                turn.holder = None
                free.append(True)
            inbox.wake_if_due(now)
        except BaseException as error:
            if inbox.rest is not None:
                inbox.wake()
            if not sent or not isinstance(error, Exception):
                raise
        return bool(sent) and sent != aim.none

    def _send(self, aim, line, sent, now):
        """Send it, unless something goes first; what each took is in sent."""
        if (self._turn.aim is not aim       # there was a turn since
                or self._inbox.waiting()
                or bool(aim.look()) is not aim.expected):
            return
        self.busy_until = max(self.busy_until, now) + _HAND_OVER_TIME
        # Before the sends: right after them a signal's handler may run the
        # exit handlers, which take it on.
        self._inbox.rest = line, sent
        _send_noted(aim.fds, line, sent)


# -- the desk: what lasts, what is told, what is open -------------------------

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
        """Whether it has failed for about a second: the delay is longest."""
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


class _Told(OSError):
    """An error that has been logged already, by who raised it."""


class _Log:
    """What a hub tells: who serves the path, and what keeps it from that.

    What lasts is told of again, but nothing wakes for that: a trouble at one
    of its tries, who serves when the path is looked after.
    """

    def __init__(self, path):
        self._path = path
        self.unsaid = None      # records, while nothing may be logged
        self._state = None      # who serves
        self.due = math.inf     # time.monotonic() to say that again
        self._strangers = collections.deque(maxlen=64)  # told of already
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
        if isinstance(error, _Told):
            return
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
        if self._kinds:
            self.say(logging.WARNING, 'all is well again: %s; tried %d times '
                     'since %s: %s', self._state, self._tries,
                     self._trouble.since, self._last)
            self._forget()
        elif time.monotonic() > self.due:
            self.due = time.monotonic() + _DAY
            self.say(logging.INFO, '%s, since %s', self._state, self._began)

    def stranger(self, who, why):
        """Refused by the relay: once for each, whatever it comes up with."""
        if who not in self._strangers:
            self._strangers.append(who)
            self.say(logging.WARNING, 'relay refused: %s: %s', who, why)


class _Visits:
    """Who comes, goes or lags: a line of log a second; and how long to rest.

    For who may connect may do so in a loop, without end. The first are told
    of when their turn ends, the others when the second is over.
    """

    def __init__(self, say, level=logging.INFO):
        self._say = functools.partial(say, level)
        self._next = 0          # no line sooner
        self.lately = False     # someone came, went or talked in this turn
        self._rested = self._worked = 0     # monotonic() and thread_time()
        self._forget()

    def _forget(self):
        self.at = None          # when there is something to tell, if there is
        self._lost = 0          # by them
        self._texts = []
        self._events = collections.Counter()
        self._peers = collections.Counter()

    def note(self, event, who, more='', lost=0):
        if len(self._texts) < _VISITS_NAMED:
            self._texts.append('subscriber %s: %s%s' % (event, who, more))
        self._events[event] += 1
        self._peers[who] += 1
        self._lost += lost
        self.at = self._next

    def crowd(self):
        return self._events['connected'] + self._events['refused'] > _CROWD

    def tell(self):
        if self._events.total() > len(self._texts):
            counts = self._events + collections.Counter(
                {'notifications lost': self._lost})     # if there are any
            self._texts = ['subscribers %s; most often %s' % (
                ', '.join('%s: %d' % each for each in counts.items()),
                '; '.join('%s: %d times' % each
                          for each in self._peers.most_common(3)))]
        if self._texts:
            self._say('; '.join(self._texts))
        crowd = self.crowd()
        self._next = time.monotonic() + _VISITS_INTERVAL
        self._forget()
        self.at = self._next if crowd else None     # to look again

    def slow_down(self):
        """Let time pass if visits come without a pause; lines wait, too.

        All who wait are accepted before anything is sent, or connect() would
        not be the start. A fifth of the time is for work: under eventlet, a
        turn with 64 subscribers takes milliseconds.
        """
        self.lately = False
        now, worked = time.monotonic(), time.thread_time() - self._worked
        if now - self._rested - worked < 2 * _REST:
            end = min(self._rested + max(_REST, 5 * worked), now + _REST_MAX)
            # Under eventlet another event of the same wait ends the sleep.
            while (now := time.monotonic()) < end:
                time.sleep(end - now)
        self._rested, self._worked = now, time.thread_time()


class _Files:
    """The open files of a hub, and the selector that watches them."""

    def __init__(self):
        self._owned = weakref.WeakKeyDictionary()   # with their identities
        self._selector = None

    def is_open(self):
        return self._selector is not None

    def open(self, waker):
        """Watch files from now on; or raise OSError.

        The selector is looked up now: bound before monkey patching, it would
        block all green threads of the process.
        """
        with _no_fork():
            selector = selectors.DefaultSelector()
            if waker is not None:
                selector.register(waker, selectors.EVENT_READ,
                                  lambda _: waker.clear())
            self._selector = selector

    def own(self, make, *args):
        """A new file of ours, which a forked child is sure to know of."""
        with _no_fork():
            file = make(*args)
            self._owned[file] = _file_id(file)
        return file

    def watch(self, sock, callback=None):
        """Without a callback it only ends the wait."""
        self._selector.register(sock, selectors.EVENT_READ, callback)

    def unwatch(self, sock):
        with contextlib.suppress(KeyError):
            self._selector.unregister(sock)

    def rewatch(self, stream, callback):
        """Have the selector watch for what a stream can do next."""
        mask = stream.wanted()
        if mask != stream.mask:
            old, stream.mask = stream.mask, 0   # should it fail
            if not mask:
                self.unwatch(stream.sock)
                return
            # In one system call, where it can be.
            watch = self._selector.modify if old else self._selector.register
            watch(stream.sock, mask, functools.partial(callback, stream))
            stream.mask = mask

    def wait(self, timeout):
        """The (callback or None, mask) of what has happened."""
        return [(key.data, mask)
                for key, mask in self._selector.select(timeout)]

    def abandon(self, certain, waker):
        """In a forked child: only close, as _Hub.abandon() says."""
        files = dict(self._owned)
        if certain:     # these, too: no other thread is left to use them
            files.update(dict.fromkeys((self._selector, waker)))
        for each, identity in files.items():
            with contextlib.suppress(OSError, AttributeError):
                if (identity == _file_id(each) if identity else certain):
                    each.close()

    def close(self):
        # By refs: as we iterate, a garbage collection may remove keys.
        owned = [ref() for ref in self._owned.keyrefs()]
        for each in filter(None, (*owned, self._selector)):
            with contextlib.suppress(OSError):  # a service closes all
                each.close()


class _Path:
    """The path: its lock, and what the owner of that has bound, by suffix.

    The subscribers' socket has none, the relay's is '.relay'.
    """

    def __init__(self, settings, files):
        self._settings = settings
        self._files = files
        self.lock = _Lock(settings.path + '.lock')
        self.bound = {}

    def name(self, suffix):
        return self._settings.path + suffix

    def intact(self):
        """Whether lock and path are still ours; 5 us."""
        return self.lock.intact() and all(
            each.intact() for each in self.bound.values())

    def take(self):
        """Take the lock, or raise OSError; BlockingIOError if it is held."""
        self.lock.close()
        self._files.own(self.lock.acquire)

    def make_way(self, suffix):
        """Free the path of what the last owner of the lock bound there."""
        path = self.name(suffix)
        _clear(path, self.lock.read().get(_name(path)))

    def bind(self, suffix='', mode=0o600, gid=None, backlog=None):
        """Bind a socket there. It is not ours yet: see put()."""
        self.make_way(suffix)
        return _bind(self._files.own(_unix_socket), self.name(suffix), mode,
                     self.lock, gid, backlog)

    def put(self, bound, suffix=''):
        """Have it take the place of what was bound before."""
        self.free(suffix)
        self.bound[suffix] = bound

    def free(self, suffix='', keep=False):
        """Close what is bound there, and remove the file unless it is kept."""
        bound = self.bound.pop(suffix, None)
        if bound is None:
            return
        # Before it is closed: a child may hold it open, so that it would stay
        # in the selector, and be reported for ever.
        self._files.unwatch(bound.sock)
        if not keep:
            bound.unlink()
        _close(bound.sock)

    def give_up(self, keep=False):
        """Free all that is bound, and the lock, for another: see free()."""
        for suffix in list(self.bound):
            self.free(suffix, keep)
        self.lock.close()


class _Door:
    """A listener: who comes is let in, or told why not.

    A descriptor is kept in reserve, to refuse with when there is no other.
    """

    def __init__(self, files, log, visits):
        self._files = files
        self._log = log
        self._visits = visits
        self._sock = None
        self.locked = True      # nobody is let in, nor watched for
        self._reserve = None    # a descriptor to give up when there is none
        self._starved = None    # accepting fails for want of descriptors
        self._recovered = False     # accepting works again; not logged yet
        self._listens = None    # the backlog, as the kernel was told
        self._held = 0          # the largest one since all who waited came in
        self._refusals = {}     # records of this turn

    def open(self, sock):
        """Listen at it from now on, or raise OSError."""
        self._sock, self._listens = sock, None
        self.let_wait(_BACKLOG)
        self.unlock()
        self._keep_reserve()

    def close(self):
        """Keep nothing in reserve. The listener is the path's."""
        if self._reserve is not None:
            self._reserve.close()

    def unlock(self):
        self._files.watch(self._sock)
        self.locked = False

    def lock(self):
        """Let who comes wait, unwatched: it would be reported for ever."""
        self._files.unwatch(self._sock)
        self.locked = True

    def let_wait(self, backlog):
        """Tell the kernel how many may wait, less one."""
        if self._listens != backlog:
            self._listens = backlog
            self._held = max(self._held, backlog)
            self._sock.listen(backlog)

    def come(self):
        """Yield the sockets of all who wait, in their order.

        Who can get no descriptor is refused. Without one to do even that with,
        it raises OSError, and is locked.
        """
        self._refusals = {}
        for _ in range(self._held + 2):     # held + 1 wait; one may fail
            try:
                sock = self._files.own(_accept, self._sock)
            except BlockingIOError:
                break       # nobody waits any more
            except OSError as error:
                self._visits.lately = True
                if error.errno in _STARVED:
                    self._spare(error)
            else:
                self._visits.lately = True
                if self._reserve is not None:
                    self._recovered = self._starved is not None
                    yield sock
                else:   # has the reserve's place, or missed lines as it waited
                    self.refuse(sock, _peer(sock)[0], 'the service is out of '
                                'file descriptors')
        self._held = self._listens      # for all who waited are in
        if self._visits.crowd():
            self.let_wait(_CROWD_BACKLOG)
        if self.locked:
            self.unlock()
        self._keep_reserve()

    def _spare(self, error):
        """Give up the reserve, to refuse who waits, or raise the error."""
        self._recovered = False
        if self._starved is None or self._starved.due():
            self._starved = self._starved or _Lasting()
            self._log.say(logging.WARNING, 'subscribers are refused since '
                          '%s: %s', self._starved.since, error)
        reserve, self._reserve = self._reserve, None
        if reserve is None:     # another thread was faster, or it never was
            self.lock()
            raise _Told(error.errno, error.strerror)
        reserve.close()

    def _keep_reserve(self):
        with contextlib.suppress(OSError):
            self._reserve = self._reserve or self._files.own(_unix_socket)

    def refuse(self, sock, who, reason):
        self.tell_why(sock, reason)
        _hang_up(sock)
        self._visits.note('refused', who, '; ' + reason)

    def tell_why(self, sock, reason):
        if reason not in self._refusals:    # to make one may wait for the GIL
            self._refusals[reason] = _record(_REFUSED, reason=reason)
        with contextlib.suppress(OSError):  # it may not wait for an answer
            # It fits, if nothing was sent on this connection before.
            _send_short(sock, self._refusals[reason])

    def settle(self):
        """The end of a turn: once there are no visits to log, or to expect."""
        if self._visits.at is None:
            self.let_wait(_BACKLOG)
            if self._recovered:
                self._starved, self._recovered = None, False
                self._log.say(logging.WARNING,
                              'subscribers are accepted again')


# -- who serves the path ----------------------------------------------------
#
# A role: what this process is on its path. look_after() returns the role to
# go on with, or raises OSError, which the loop tells of, to try again. Streams
# come and go in look_after(), see_off(), accept() and close() alone: never
# while anybody iterates over them.

def _nothing(*_):
    """What a role, or _Alone, does where it has nothing to do, or give."""
    return ()


class _Alone:
    """The other processes on a path: there are none. See _Relay."""

    def __init__(self, _loop):
        pass

    announce = look_after = show = take = _nothing
    followed = give_time = hand_on = cut_off = close = _nothing


class _Seeker:
    """Who would serve the path, and cannot: nobody can connect to us."""

    streams = ()

    def __init__(self, loop):
        self._loop = loop
        loop.inbox.look = _yes  # until it is clear who serves

    def look_after(self):
        return _Leader.claim(self._loop)

    def shut(self, _error):
        """Have nothing kept for who cannot connect."""
        self._loop.inbox.look = _no

    take = accept = settle = hear = _nothing
    intact = hand_on = cut_off = last_call = close = _nothing


class _Leader:
    """Who has the lock, and serves the path. Its streams: the subscribers."""

    def __init__(self, loop, start):
        self._loop = loop
        self._path = loop.path
        self.intact = loop.path.intact
        self._start = start     # for who waits, in the first turn
        self._others = loop.others(loop)
        self._door = _Door(loop.files, loop.log, loop.visits)
        self.last_call = self._door.lock    # who comes is for the next leader
        self.take = self._others.take
        self._places = _Places(loop)
        self.streams = self._places.taken
        self._followed = False  # others go on with the listener

    @classmethod
    def claim(cls, loop, inherit=_nothing, start=None, take=_Path.take):
        """Lead from now on, or raise OSError, and leave it to others.

        :param inherit: what gives the last leader's listener, if we have it
        :param start: a stream, from whose cursor those begin who wait
        :param take: what gives the path its lock
        """
        if loop.starves:
            # Everybody else on the path would be silent while it stands still.
            raise PermissionError(
                errno.EPERM, 'this process only follows', loop.settings.path)
        take(loop.path)
        try:
            leader = cls(loop, start)
            leader._serve(inherit())
        except BaseException:
            loop.path.give_up()
            raise
        return leader

    def look_after(self):
        path, bound = self._path, self._path.bound['']
        if self._loop.closing:
            return self     # who leaves does not come back
        ours = bound.intact()
        if not path.lock.intact():
            try:
                path.take()
            except BlockingIOError:
                if ours:
                    raise
                return self._resign()
            if ours:
                path.lock.write(path.bound.values())  # it is new
        if not ours:
            self.let_in()       # who came before the path was taken away
            self._serve()
        if self._door.locked:
            self.let_in()
        self._others.look_after()
        return self

    def _serve(self, bound=None):
        """Bind and listen. What was bound before has lost the path."""
        settings = self._loop.settings
        try:
            bound = bound or self._path.bind(
                mode=settings.mode, gid=_gid(settings.group))
        except OSError:
            self._path.lock.close()     # whoever can may have the path
            raise
        self._look = _poll(bound.sock.fileno())     # at who waits
        # Before the old listener is closed: see _Inbox. With a _start, who
        # waits will begin at its cursor: nothing after that may be dropped.
        self._loop.inbox.look = (
            _yes if self.streams or self._start else self._look)
        self._others.announce(bound)
        self._path.put(bound)
        try:
            self._door.open(bound.sock)
        except OSError:
            bound.unlink()      # or it would pass for served
            raise
        self._loop.log.serves('served with mode %04o, group %s, by pid %d' % (
            settings.mode, settings.group or 'unchanged', self._loop.pid))

    def accept(self):
        """Let in who waits, looked at now, whatever was reported before."""
        if not self._door.locked and (self._start or self._look()):
            self.let_in()

    def let_in(self):
        """Let in who waits, or raise OSError."""
        self._open(True)    # before the first: see _Inbox
        self._places.swept = False
        for sock in self._door.come():
            self._places.admit(sock, self._door, self._start)

    def go_on_with(self, subscribers):
        """Serve those of the last leader."""
        self._open(True)    # before a follower is told that we lead
        for each in subscribers:
            self._places.keep(each)

    def see_off(self, subscriber):
        self._places.clear(subscriber, subscriber.ended)

    def settle(self):
        """The end of a turn: the gate is shut here alone.

        Not while anything is queued: who comes next would get that, and not
        what was dropped behind it.
        """
        self._start = None      # or its cursor would keep all that follows
        self._others.give_time(self.streams, self._loop.fanout)
        self._open(bool(self.streams) or self._loop.inbox.waiting())
        self._door.settle()

    def _open(self, anyone):
        self._others.show(anyone)   # before accept(), as the gate is
        self._loop.inbox.look = _yes if anyone else self._look

    def clear(self):
        """What notify() has to find before it sends: nobody waits."""
        return self._look, False

    shut = hear = _nothing

    def _resign(self):
        """Another process owns the path: send the subscribers there.

        What followers have handed on goes to those who are still here. Not to
        the new leader, who may have heard from them before us, and what they
        emitted later: that one is told that it was lost.
        """
        loop = self._loop
        self._others.cut_off()
        handed = self._others.take()
        loop.fanout.take(0, handed)
        loop.fanout.flush(self.streams)
        loop.inbox.look = _yes  # until it is clear who serves
        self._places.clear_all('another process took the path')
        self._others.close()
        self._door.close()
        loop.path.give_up()
        loop.tell()
        role = loop.seek(loop)
        lost = sum(lines + lost for _, lines, lost, *_ in handed)
        if lost:
            loop.fanout.backlog.append(b'', 0, lost, 'leader replaced')
        return role

    def hand_on(self, until):
        """Whether another process goes on with all that there is."""
        return self.streams and self._others.hand_on(self, until)

    def let_go(self):
        """Close what is another process's by now, without ending anything."""
        for each in self.streams:
            self._loop.files.unwatch(each.sock)
        _close_all(each.sock for each in self.streams)
        self._others.close()
        self._path.give_up(keep=True)

    def cut_off(self):
        """Let nobody in who is not there yet."""
        self._loop.retry.clear()
        self._followed = self._others.followed()
        if not self._followed:
            self._path.bound[''].unlink()
        self._others.cut_off()

    def close(self):
        """End all streams. Followers go on with the listener."""
        self._places.clear_all('the service stops')
        self._path.free('', self._followed)
        self._others.close()
        self._path.lock.free()


class _Places:
    """Who is subscribed: each takes a place of those there are."""

    def __init__(self, loop):
        self._loop = loop
        self._limit = loop.settings.max_subscribers
        self.taken = {}         # an ordered set
        self.swept = False      # of those who are gone, in this turn

    def admit(self, sock, door, start):
        """Let one in, or have it refused at the door.

        :param start: see _Subscriber
        """
        who, uid = _peer(sock)
        subscriber = _Subscriber(sock, self._loop.fanout.backlog, who, uid,
                                 start)
        if not subscriber.alive():
            self._loop.visits.note('connected', who)
            self.taken[subscriber] = None
            self.clear(subscriber, 'it is gone')
        elif self.free() or self.make_room(uid, door.tell_why):
            self._loop.visits.note('connected', who)
            self.keep(subscriber)
        else:
            door.refuse(sock, who, 'sock_max_subscribers is %d' % self._limit)

    def keep(self, subscriber):
        self.taken[subscriber] = None
        try:
            self._loop.fanout.watch(subscriber)
        except OSError as error:    # there is a limit of what is watched
            self.clear(subscriber, error.strerror)

    def clear(self, subscriber, reason):
        """End the stream of a subscriber, or take note that it has ended."""
        del self.taken[subscriber]
        if subscriber.mask:     # else it takes 30 us to find that it is not
            self._loop.files.unwatch(subscriber.sock)
        subscriber.ended = reason
        _hang_up(subscriber.sock)
        lost = subscriber.lost + sum(each.lost for each in subscriber.chunks())
        self._loop.visits.note(
            'parted', subscriber.who, ', %d lines, %d lost; %s' % (
                subscriber.received(), lost, reason), lost)

    def clear_all(self, reason):
        for subscriber in list(self.taken):
            self.clear(subscriber, reason)

    def free(self):
        """Whether there are places; if not, clear those of who is gone.

        A half-closed one is not watched, for the end of its stream would be
        reported for ever; the end of others may not have been reported yet.
        """
        if len(self.taken) >= self._limit and not self.swept:
            self.swept = True
            for subscriber in list(self.taken):
                if not subscriber.alive():
                    self.clear(subscriber, 'it is gone')
        return len(self.taken) < self._limit

    def make_room(self, uid, tell_why):
        """End the newest stream of who has the most places; whether it did.

        Only for a user who has then no more than that one keeps, or the two
        would take turns.
        """
        places = collections.Counter(each.uid for each in self.taken)
        greedy, most = places.most_common(1)[0]
        if places[uid] + 2 > most:
            return False
        newest = next(each for each in reversed(self.taken)
                      if each.uid == greedy)
        if not newest.pending():    # else it is in the middle of a line
            tell_why(newest.sock, 'a user who has fewer places takes it')
        self.clear(newest, 'uid %d has fewer places' % uid)
        return True


# -- the loop -----------------------------------------------------------------

class _Fanout:
    """From the inbox to the streams of the role, each at its own pace."""

    def __init__(self, settings, inbox, files, visits, lags):
        self.backlog = _Backlog(settings.buffer_size)
        self._inbox = inbox
        self._files = files
        self._visits = visits
        self._lags = lags
        self.again = False      # someone may be sent more at once
        self.drained = False    # someone has read a lot
        self._late = False      # others want the GIL: it is kept where it can

    def take(self, due, handed):
        """Move what is due to the backlog, in its order."""
        for batch in self._inbox.take(due):
            self.backlog.extend(batch)
        if self._inbox.lost:
            self.backlog.append(b'', 0, self._inbox.lost, 'queue full')
            self._inbox.lost = 0
        for chunk in handed:
            self.backlog.append(*chunk)

    def take_rest(self, streams):
        """Queue what notify() has sent in part, or to some streams only.

        Before any stream comes or goes: what each took is in their order.
        """
        if self._inbox.rest is not None:
            line, sent = self._inbox.rest
            self.backlog.append(line, 1)
            for stream, size in zip(streams, sent):
                stream.advance(max(size, 0))
            self._inbox.rest = None

    def flush(self, streams):
        """Send to all who take more, and hold the others to the bound."""
        self.again = self._late = False
        held = 0
        for stream in streams:
            if stream.ended or not stream.pending():
                continue
            if not stream.blocked:
                self._send(stream)
            elif stream.sock is not None:
                self.watch(stream)      # if that has failed
            if stream.pending() and not stream.ended:
                if stream.trim(self.backlog) and stream.lagging is None:
                    stream.lagging = stream.lost
                    self._lags.note(
                        'lagging by more than %d bytes, losing notifications'
                        % self.backlog.limit, stream.who)
                held = max(held, self.backlog.behind(stream.chunk))
                self.again |= not stream.blocked
        self.again |= any(each.ended for each in streams)
        self._share(held)

    def _share(self, held):
        """Have queue and backlog share the memory.

        One that lags leaves at least an eighth to those that do not.
        Publishers may be ahead by half of the whole, be it in the queue or in
        the backlog; by a quarter of the room that is left, if that is more,
        as where one that lags has most of it.
        """
        limit = self.backlog.limit
        room = max(limit - held, limit // 8) // _QUEUE_UNIT
        self._inbox.room = room
        self._inbox.ahead = max(room - limit // 2 // _QUEUE_UNIT, room // 4)

    def _send(self, stream):
        begin = time.monotonic()
        try:
            stream.flush(self._late)
        except OSError:
            stream.ended = 'it is gone'     # the next turn will see it off
            return
        if time.monotonic() - begin > _GIL_LATE:
            self._late = True
        self.watch(stream)
        if stream.lagging is not None and not stream.pending():
            lost = stream.lost - stream.lagging
            self._lags.note('caught up', stream.who,
                            '; it lost %d notifications' % lost, lost)
            stream.lagging = None

    def watch(self, stream):
        self._files.rewatch(stream, self.on_event)

    def on_event(self, stream, mask):
        if stream.ended:
            return      # earlier in this turn
        if mask & selectors.EVENT_READ:
            self._visits.lately |= stream.visits
            stream.ended = stream.listen()
            if stream.ended:
                return
            self.watch(stream)
        if mask & selectors.EVENT_WRITE:
            self.drained = True
            self._send(stream)


class _Loop:
    """What is done on a path in a turn, and the parts that do it.

    Mostly the loop's thread; once that has ended, the exit handler. A test
    may call step() without any thread.
    """

    others = _Alone
    seek = _Seeker

    def __init__(self, settings, start):
        self.settings = settings
        self.pid = os.getpid()      # whose it is; None in a forked child
        self.log = _Log(settings.path)
        self.inbox = _Inbox(settings, start)
        self.files = _Files()
        self.path = _Path(settings, self.files)
        self.visits = _Visits(self.log.say)
        self.lags = _Visits(self.log.say, logging.WARNING)
        self.fanout = _Fanout(settings, self.inbox, self.files, self.visits,
                              self.lags)
        self.retry = _Backoff()     # for the path
        self.closing = False
        self.starves = False        # _Hub: it runs in notify() alone
        self.turn = _Turn()
        self.hand_over = _HandOver(self.turn, self.inbox, self.fanout.backlog)
        self.inbox.hand_over = self.hand_over.send
        self.role = self.seek(self)

    def step(self, limit=None):
        """Wait for something to do, at most ``limit`` seconds, and do it.

        :returns: whether there was anything to do
        """
        if not self.files.is_open():
            with self.turn.taken():
                self.open()
        events = self._wait(limit)
        self._look()
        free = self.turn.take()     # not taken(), which takes 2 us
        try:
            self.stay()
            return self.work(events)
        finally:
            free.append(True)

    def _look(self):
        """Look whether all is still well, before the turn is taken.

        Each system call gives up the GIL, which a busy thread returns after
        5 ms: as notify() did this, it took 16 ms once a second. Now the turn
        is free meanwhile, and notify() sends. A turn that finds nothing to do
        makes no such call: else a thread could find it taken, and queue a
        line, which a process about to die may not send.
        """
        now = time.monotonic()
        if (self.retry.at is None and now > self.inbox.checked
                + _CHECK_INTERVAL and self.role.intact()):
            self.inbox.checked = now
            self.log.well()

    def work(self, events):
        """Do what is to be done; events are (callback or None, mask).

        A line that is due may come from a call after a connect() returned. So:
        see how much is due, then accept who has come, and only then take what
        is due.
        """
        self._begin(events)
        due = self.inbox.count()
        try:
            self.role.accept()
        except OSError as error:
            self.trouble(error)
        handed = self.role.take()
        self.fanout.take(due, handed)
        self.fanout.flush(self.role.streams)
        self.tell(time.monotonic())
        self.role.settle()
        self.hand_over.aim_at(self.role)
        return bool(events or due or handed or self.fanout.again)

    def tell(self, now=math.inf):
        """Log what is due by then of who has come, gone, or lagged."""
        for each in self.visits, self.lags:
            if each.at is not None and each.at < now:
                each.tell()

    def _begin(self, events):
        self.fanout.take_rest(self.role.streams)
        for callback, mask in events:
            if callback is not None:
                callback(mask)
        for stream in [each for each in self.role.streams if each.ended]:
            self.role.see_off(stream)
        if time.monotonic() >= (self.retry.at or
                                self.inbox.checked + _CHECK_INTERVAL):
            self.look_after()

    def _wait(self, limit):
        """Sleep until there is something to do; the turn is free."""
        timeout = 0
        if not (self.inbox.waiting() or self.fanout.again):
            self.inbox.asleep = True
            # Without a GIL a store may be seen late, unless both sides take a
            # lock in between. That is the queue's for the lines; for gap and
            # rest it is the object's, which a store to them or the flag takes.
            self.inbox.lines.extend(())
            if not self.inbox.waiting():    # after the flag: see emit()
                timeout = self._timeout(limit)
        events = self.files.wait(timeout)
        if self.visits.lately:
            self.visits.slow_down()
        self.inbox.asleep = False
        return events

    def stay(self):
        """After a wait: green threads survive a fork, and may wake in a child.

        That has a loop of its own.
        """
        if self.pid != os.getpid():
            raise RuntimeError('not the loop of this process')

    def _timeout(self, limit):
        due = [each.at for each in (self.retry, self.visits, self.lags)
               if each.at]
        if limit is not None:
            due.append(time.monotonic() + limit)
        return max(0, min(due) - time.monotonic()) if due else None

    def open(self):
        if not self.files.is_open():
            self.files.open(self.inbox.waker)
            self.look_after()
            self.fanout.again = True    # a turn follows, which settles that

    def look_after(self):
        """Have the role that can be had, or say why not, and when to try."""
        self.inbox.checked = time.monotonic()
        try:
            while (role := self.role.look_after()) is not self.role:
                self.role = role
        except OSError as error:
            self.trouble(error)
        else:
            self.retry.clear()
            self.log.well()

    def trouble(self, error):
        """The role cannot do what it should, and will try again."""
        passing = error.errno in _LED and not self.retry.for_long()
        self.retry.fail()
        if not passing:     # else another may lead soon, who is owed all lines
            self.role.shut(error)
            self.log.fault(error)

    def shut(self, error):
        """The loop could not start, or open its files; try again later."""
        self.retry.fail()
        self.inbox.checked = time.monotonic()
        self.role.shut(error)


def _unread(streams):
    """Bytes that the kernel still holds for them.

    They fall as a slow reader reads; its socket becomes writable only once it
    has read three quarters of them.
    """
    return sum(struct.unpack('i', fcntl.ioctl(
        each.sock, termios.TIOCOUTQ, bytes(4)))[0]
        for each in streams if each.sock is not None)


class _Hub:
    """All drivers of a process on one path: one loop, its start and its end.

    For any thread: nothing here blocks but close().
    """

    def __init__(self, settings):
        self.loop = _Loop(settings, self.start)
        self.inbox = self.loop.inbox
        self.thread = self.no_thread = None     # or why there was none
        self._starting = threading.Lock()   # tried, never waited for

    def start(self):
        """Start the loop, if need be. Never raises.

        Not in uWSGI's master. Where a loop would starve there is none: who
        has come to start it does its work. Without a thread (3.12 gives none
        at exit) a later line tries again, and close() does what is left.
        """
        if _is_uwsgi_master():
            self.inbox.lines.clear()
        elif self.thread is None and _starves():
            # The leader gets the line at once. What it answers, and what the
            # kernel does not take now, is for the next call.
            while self._take_a_turn() and self.inbox.waiting():
                pass    # what others queued, who did not get the turn
        elif not self.loop.closing and self._starting.acquire(blocking=False):
            try:
                if self.thread is None and (
                        time.monotonic() > (self.loop.retry.at or 0)):
                    self._start()
            except RuntimeError as error:
                self.thread, self.no_thread = None, error
                self.loop.shut(error)
            except BaseException:   # a signal handler raises
                if self.thread not in threading.enumerate():
                    self.thread = None
                raise
            finally:
                self._starting.release()

    def _start(self):
        # Known before it starts: a signal handler may raise as we wait for
        # it to run.
        self.thread = threading.Thread(
            target=self._run, name='unix-notifier', daemon=True)
        _start(self.thread)
        # A child of multiprocessing exits without atexit, but runs finalizers:
        # registered here, as its bootstrap clears those from before the fork.
        if process.parent_process() is not None:
            util.Finalize(None, self.close, exitpriority=0)

    def _take_a_turn(self):
        """For a follower that has no loop; whether there was one to be had."""
        loop, free, us = self.loop, self.loop.turn.free, _thread.get_ident()
        free.count(None)    # raises where the stack has no room for append()
        try:
            del free[0]     # as in _HandOver.send()
            loop.turn.holder = us
        except IndexError:
            return False
        loop.turn.aim = None
        unsaid = loop.log.unsaid = []       # notify() never logs
        try:
            if loop.closing:
                return False
            if not loop.starves:
                loop.starves = True
                loop.log.say(
                    logging.WARNING, 'monkey-patched, under a server that '
                    'runs no hub between requests, this process only follows, '
                    'and sends as it emits')
            loop.open()
            loop.work([(loop.role.hear, 0)])
            return True
        finally:
            loop.log.unsaid = None
            free.append(True)
            if unsaid:
                # Not a Thread, whose start() waits for it to run.
                _thread.start_new_thread(
                    list, (itertools.starmap(LOG.log, unsaid),))

    def close(self):
        """Send what is queued, for a second at most, and free the path."""
        loop = self.loop
        if loop.closing or loop.pid != os.getpid():
            return
        loop.closing = True
        deadline = time.monotonic() + _EXIT_TIME
        loop.turn.take_from_us()
        if self.thread is not None:
            if self.inbox.waker is not None:
                self.inbox.waker.set()
            with contextlib.suppress(RuntimeError):     # it never started
                self.thread.join(_EXIT_TIME)
            if self.thread.is_alive():
                return      # stuck in a log handler, say; leave it its state
        if (self.thread is not None or loop.files.is_open()
                or self.inbox.waiting()):
            self._leave(deadline)

    def _leave(self, deadline):
        """Serve who is there with what is there; then close, lock last.

        Runs in the exit handler, once the loop has ended, for a turn at
        least, and until time.monotonic() is ``deadline``.
        """
        loop = self.loop
        with loop.turn.taken(deadline):
            loop.open()
            if loop.role.hand_on(deadline - _EXIT_TIME / 5):
                loop.files.close()
                return
            loop.role.cut_off()
        loop.step(0)
        accounted = loop.fanout.backlog.tail.first
        loop.role.last_call()
        self._send_on(deadline)
        with loop.turn.taken():
            loop.inbox.look = _no
            # Not if lines came since: who has come meanwhile is owed them.
            if (loop.path.lock.fd is not None and not loop.inbox.waiting()
                    and loop.fanout.backlog.tail.first == accounted):
                with contextlib.suppress(OSError):
                    loop.path.lock.write(vacated=True)
            loop.role.close()
            loop.tell()
            loop.files.close()

    def _send_on(self, deadline):
        """Send what is left, until then, or while somebody reads."""
        loop, progress = self.loop, time.monotonic()
        while (any(each.pending() for each in loop.role.streams)
               and time.monotonic() < min(deadline, progress + _EXIT_STALL)):
            unread = _unread(loop.role.streams)
            if (loop.step(_EXIT_STALL)
                    or _unread(loop.role.streams) != unread):
                progress = time.monotonic()

    def abandon(self, certain):
        """In a forked child: leave to the parent what is its own.

        It only closes: to unregister, unlock or shut down would reach the
        parent, who shares all that. It does not log: locks may be held.

        :param certain: whether nobody can have closed our numbers meanwhile,
                        nor have been given them anew
        """
        loop = self.loop
        loop.pid = None     # a green thread survives a fork, and looks
        loop.turn.renew()   # its holder may not be here, nor is the aim ours
        loop.files.abandon(certain, self.inbox.waker)
        if not certain:     # keep all for ever: no __del__ may close a number
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def _run(self):
        loop = self.loop
        if self.no_thread is not None:
            loop.log.fault(self.no_thread)      # notify() may not log
        while not loop.closing and loop.pid == os.getpid():
            try:
                if self.inbox.waker is None:
                    with _no_fork():
                        self.inbox.waker = _Event()
                    continue    # close() may have come before it had a waker
                loop.step()
            except Exception as error:
                if loop.pid == os.getpid():
                    loop.fanout.again = True    # whatever it was about to do
                    if not loop.files.is_open():
                        loop.shut(error)
                    loop.log.fault(error, not isinstance(error, OSError))
                    time.sleep(_Backoff.MAX)


def _is_uwsgi_master():
    """Whether this is uWSGI's master, or what will be it.

    uWSGI forks in C, without hooks; a thread that is busy at that instant
    hangs the worker for good. Mules have worker_id 0, too.
    """
    uwsgi = sys.modules.get('uwsgi')
    return (uwsgi is not None and uwsgi.worker_id() == 0
            and uwsgi.mule_id() == 0
            and uwsgi.masterpid() in (0, os.getpid()))


def _starves():
    """Whether a loop would stand still between two requests.

    It would be a green thread, which mod_wsgi never runs between requests, and
    uWSGI only if it has a loop engine, such as gevent's.
    """
    return _is_patched() and ('mod_wsgi' in sys.modules or (
        'uwsgi' in sys.modules
        and getattr(sys.modules['uwsgi'], 'loop', None) is None))


# -- the driver -------------------------------------------------------------

_hubs = {}      # by pid, then by path: one for each


def _hub_of(settings):
    """The hub of this process on the path; made, if there is none.

    Each step is atomic, for any threads may be here at once; a hub too many
    was never started, and has nothing open. If a fork ran no hook, whoever
    pops the parent's hubs closes what they have open.
    """
    pid = os.getpid()
    hubs = _hubs.setdefault(pid, {})
    for other in [each for each in list(_hubs) if each != pid]:
        for hub in _hubs.pop(other, {}).values():
            hub.abandon(certain=False)
    return hubs.setdefault(settings.path, _Hub(settings))


def _at_exit():
    for hub in list(_hubs.get(os.getpid(), {}).values()):
        try:
            hub.close()
        except Exception:
            hub.loop.log.say(logging.ERROR, 'closing failed', exc_info=True)


_forker = None      # the pid of the process that is about to fork


def _before_fork():
    global _forker
    # Not for ever: the loop may hold it, waiting for a log handler that forks.
    _no_fork().acquire(timeout=1)
    _forker = os.getpid()


def _after_fork_in_parent():
    global _forker
    _forker = None      # uWSGI may run the child's hook without _before_fork()
    with contextlib.suppress(RuntimeError):     # acquire() has timed out
        _no_fork().release()


def _after_fork_in_child():
    """Drop all hubs: in a pid namespace the parent's pid may be ours."""
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

    _failed = None      # why there will be no hub

    def __init__(self, conf=None, topics=None, transport=None):
        """Read the options and start to serve the path.

        Without ``conf``, as the routing driver constructs all drivers there
        are, nothing happens until the first notification, which takes the
        options from the global ``cfg.CONF``.

        :param oslo_config.cfg.ConfigOpts conf: configuration options
        :param list topics: of the Notifier, str; sent where they are not the
            default, for listeners to choose by: every subscriber gets all
        :param transport: not used
        :raises: ValueError, naming the option, the value and the limit
        """
        super().__init__(conf, topics, transport)
        # With each notification, for several Notifiers share the hub: nova
        # has two, of different topics.
        default = topics is None or list(topics) == _TOPICS
        self._topics = None if default else list(topics)
        self._settings = self._hub = None
        if conf is not None:
            settings = self._configure(conf)
            if self._settings != settings:
                LOG.warning('The notification socket is configured twice, '
                            'and what came first counts: %s, not %s',
                            self._settings, settings)
            self._hub.start()
            if self._hub.thread is None and self._hub.no_thread is not None:
                self._hub.loop.log.fault(self._hub.no_thread)

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
        hub = _hub_of(settings)
        self._settings, self._hub = hub.loop.settings, hub
        return settings

    def notify(self, ctxt, message, priority, retry):
        """Hand a notification to whoever is connected, or drop it.

        Never blocks, raises or logs: an exception would make the Notifier
        log the payload, and a log handler may be what calls us.

        :param ctxt: the request context, sent if sock_send_context says so,
                     and then in part: see _CONTEXT_KEYS
        :param dict message: the notification; serialized before this returns
        :param priority: not used; the message has it
        :param retry: not used
        """
        hub = self._hub
        try:
            if hub is None or hub.loop.pid != os.getpid():
                hub = None
                hub = self._late_hub()
            if hub is not None:
                hub.inbox.emit(
                    message, ctxt if self._settings.send_context else None,
                    self._topics)
        except Exception:   # out of memory, say: lost, and accounted for
            if hub is None:
                return
            try:
                hub.inbox.drop()
            except Exception:   # out of stack: it has not even begun
                hub.inbox.gap = next(hub.inbox.drops)

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
            # setdefault() is atomic: of all threads here, only one logs it.
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
# A follower misses no subscriber either. It polls listener, presence and
# uplink, in this order. Who connects waits at the listener until it is
# accepted; the leader raises the presence before that, and lowers it at the
# end of a turn if nobody is there. So who was accepted before the listener was
# polled is found by the presence, polled later. A new listener listens only
# once the hello that passes it was sent: unread, this makes the uplink
# readable; while it is read, the gate is open. The rest is in _Inbox.
#
# When the uplink ends, the followers try the lock. Who gets it goes on with
# the listener that it was passed, so that nobody in its backlog is stranded;
# the others follow the new leader. What an uplink has not sent is kept. Unless
# the lock says that the last leader left in good order, the lines that it had
# read are lost: whoever waits at the listener sees the end of the stream, as
# do those whom it had accepted.
#
# A leader that leaves in good order asks its followers for an heir, and passes
# each that could be one a socket, the channel, for its answer. The first to
# answer is passed the lock (a flock belongs to the open file, so it is never
# free), the relay, where the other followers wait, what subscribers are owed,
# and their sockets. It answers each message but the last, which says how many
# lines the leader dropped meanwhile. Before that the heir touches nothing: if
# either ends, all goes on as without an heir. With the last message all is the
# heir's; its own lines go behind what is owed.

_HELLO = b'unix-notifier relay 2'
_ASK = _HELLO + b' heir?\n'
_YES = b'yes'

# Followers that are asked: the newest, as the least likely to leave next;
# seconds that they have to answer; descriptors in a message: the kernel takes
# 253, and holds, of one user, as many as one process may have open.
_ASKED_MAX = 16
_ANSWER_TIME = 0.1
_PASSED_MAX = 64

# Naps in a row of a leader far ahead of all subscribers, 1 to 2 ms in all: a
# reader takes megabytes meanwhile, a stopped one costs them once.
_PATIENCE = 20

# A leader's hello; control lines of a follower that stand together, and each.
_WELCOME = re.compile(_HELLO + rb' \[(\d+), (\d+), (\d+)\]\n')
_LOSSES = re.compile(rb'^(?:-\d{1,18} [ -~]{0,80}\n)++', re.MULTILINE)
_LOSS = re.compile(rb'-(\d+) (.*)\n')

# What a leader says last to its heir.
_LAST = re.compile(rb'lost (\d{1,18})')

# Gaps in one read of a follower that get a record each, at 40 us; more are
# joined. Who drops lines takes a turn between two, so there are fewer.
_GAPS_MAX = 256

# Bytes to ask recv() for while little comes: to allocate 64 KiB takes 1.5 us,
# 256 KiB 12 us.
_RECV_MIN = 64 * 1024


def _chunks(block):
    """Yield a follower's whole lines as arguments of _Backlog.append().

    Losses that stand together make one record. A malformed control line
    raises ValueError, once what precedes it was yielded.
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
                yield b'', 0, lost, max(each)[1].decode()
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

    slow = 'relay stalled'
    visits = False      # or slow_down() makes a hand-over 8.7 ms, not 4.7

    def __init__(self, backlog, listen):
        super().__init__(None, backlog, 'the leader')
        self.listen = listen    # the follower's: a hello changes its gate
        self.greeted = False    # the leader has said hello
        self.since = 0          # time.monotonic() when it last did
        self.blocked = True

    def wanted(self):
        return super().wanted() if self.greeted else selectors.EVENT_READ

    @staticmethod
    def lost_line(lost, reason):
        return b'-%d %s\n' % (lost, reason.encode('ascii'))

    def disconnect(self):
        """Keep what was not sent.

        A half-sent line goes whole to the next leader: its LF never left, so
        the last leader has dropped it. Records lose their text: if we lead
        next, subscribers need it in another format.
        """
        self.sock, self.mask, self.ended = None, 0, None
        self.greeted, self.blocked = False, True
        self.offset = self.chunk.data.rfind(b'\n', 0, self.offset) + 1
        chunk = self.chunk
        while chunk:
            chunk.data = b'' if chunk.lost else chunk.data
            chunk = chunk.next

    def precede(self, lost, reason):
        """Have a record, if any were lost, go ahead of what is to be sent."""
        chunk = self.chunk
        if self.offset:
            chunk = chunk.next.preceded(
                chunk.before(self.offset), chunk.data[self.offset:], 0, None)
        if lost:
            chunk = chunk.preceded(chunk.first - lost, b'', lost, reason)
        self.chunk, self.offset = chunk, 0

    def forget(self, backlog):
        """Owe nothing: nobody is there to whom it could go."""
        self.chunk, self.offset = backlog.tail, 0


class _LineBuffer:
    """Whole lines of what a stream gives in pieces; scans each byte once."""

    def __init__(self, limit=_LINE_MAX):
        self._limit = limit
        # The start of a line, in one object: pieces of one or two bytes in a
        # list would take thirty times the memory.
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


class _Source:
    """A follower, as the leader sees it: where lines come from."""

    def __init__(self, sock, who, uid):
        self.sock = sock
        self.who = who
        self.uid = uid
        self.greeted = False    # its hello has come
        self._buffer = _LineBuffer()

    def read(self):
        """Chunks that have come. An OSError, or EOFError: it is gone.

        A line without its end is dropped: the follower sends it again, to
        the next leader, or was killed. Nonsense raises a ValueError, maybe
        only as the caller extends a list, which then has what preceded it.
        """
        block = self._buffer.receive(self.sock)
        if self._buffer.too_long():
            raise ValueError('a line of more than %d bytes' % _LINE_MAX)
        if not self.greeted:    # which comes in one piece, as it was sent
            hello, _, block = block.partition(b'\n')
            if hello != _HELLO:
                raise ValueError('%r is not the protocol %r' % (
                    hello[:80], _HELLO))
            self.greeted = True
        return _chunks(block)


def _check_peer(sock, loop):
    """Who it is, as _peer(); a PermissionError, and a line of log: no."""
    who, uid = _peer(sock)
    trusted = {0, os.geteuid()}
    if os.geteuid() == 0:       # root only follows: see _Lock._refuse_root()
        trusted.add(os.stat(os.path.dirname(loop.settings.path)).st_uid)
    if uid not in trusted:
        loop.log.stranger(who, 'not trusted')
        raise PermissionError
    return who, uid


def _receive(sock, most):
    """A message, and its descriptors. Needs _no_fork()."""
    # Not recv_fds(), whose descriptors a program started meanwhile inherits.
    data, passed, _, _ = sock.recvmsg(
        4096, socket.CMSG_LEN(most * 4), socket.MSG_CMSG_CLOEXEC)
    return data, [fd for _, _, each in passed
                  for fd, in struct.iter_unpack('i', each)]


def _read_leader(sock, own):
    """Read a hello: identity of the listener, the listener, the presence.

    Or the question for an heir: [channel], or [] if out of descriptors.
    A ValueError: it is neither. An OSError: nothing comes.
    """
    with _no_fork():
        data, fds = _receive(sock, 2)
        hello = _WELCOME.fullmatch(data)
        with contextlib.suppress(OSError):      # it is no socket
            if data == _ASK and len(fds) < 2:
                return [own(_unix_socket, fd) for fd in fds]
            if hello and len(fds) == 2:
                return (list(map(int, hello.groups())),
                        own(_unix_socket, fds[0]), own(_Event, fds[1]))
        for fd in fds:
            os.close(fd)
    if not data:
        raise ConnectionResetError
    # Or a hello whose descriptors did not come, for we are out of them.
    raise ValueError('%r is not the protocol %r, with two descriptors' % (
        data[:80], _HELLO))


def _let_go(listener, own):
    """End the streams of all who wait.

    What a leader that was killed had taken in for them has gone with it. Out
    of descriptors, it raises, for one that was left would go on as if nothing
    were missing.
    """
    with contextlib.suppress(BlockingIOError):
        for _ in range(_BACKLOG + 1):
            _hang_up(own(_accept, listener))


# What is told of a subscriber beside its cursor.
_CARRIED = 'who', 'uid', 'half_closed', 'discarded', 'lost', 'lagging'


def _owed(streams, tail, identity):
    """What an heir has to know of the streams, and what they are owed.

    A line of JSON, and the data of all chunks, each once, whoever shares it.
    Positions are told from the tail, for each process has a count of its own.

    :param identity: of the relay
    """
    places, chunks = {tail: None}, []
    for stream in streams:
        chunk = stream.chunk
        while chunk not in places:
            places[chunk] = len(chunks)
            chunks.append(chunk)
            chunk = chunk.next
    yield json.dumps([identity, [
        (len(each.data), each.lost, each.reason, tail.start - each.start,
         tail.first - each.first, places[each.next]) for each in chunks
    ], [
        (places[each.chunk], each.offset, each.received(),
         {name: getattr(each, name) for name in _CARRIED})
        for each in streams]]).encode() + b'\n'
    yield from (each.data for each in chunks)


def _inherited(owed, data, tail):
    """The chunks that _owed() told of, by place, ahead of this tail."""
    chunks, start = {None: tail}, 0
    for place, (size, lost, reason, behind, count, _) in enumerate(owed):
        chunks[place] = _Chunk(tail.start - behind, tail.first - count,
                               data[start:start + size], lost, reason)
        start += size
    for place, (*_, following) in enumerate(owed):
        chunks[place].next = chunks[following]
    return chunks


def _memory_file():
    """A memory file. A Python built with an old libc lacks os.memfd_create."""
    try:
        return open(_libc.memfd_create(b'unix-notifier', 1), 'wb')  # CLOEXEC
    except (AttributeError, ValueError):    # an old libc, or it has failed
        raise OSError


def _first_answer(channels, until):
    """Which of them answers first, until time.monotonic(); or None."""
    asked = list(channels)
    while asked and time.monotonic() < until:
        if not _poll(*(each.fileno() for each in asked))():
            time.sleep(_GIVE_WAY)
            continue
        for each in list(asked):
            try:
                if each.recv(16):
                    return each
            except BlockingIOError:
                continue
            except OSError:
                pass
            asked.remove(each)      # it has hung up
    return None


class _Bequest:
    """A leader that leaves, as it hands on what it has: see the top."""

    def __init__(self, leader, relay, own, until):
        self._leader = leader
        self._relay = relay
        self._own = own
        self._until = until     # time.monotonic()
        self._heir = None       # the channel to it
        self._sent = []         # what send() returned of the last message

    def ask(self):
        """Which of the followers will be the heir; None: nobody."""
        asked = {}
        for source in list(self._relay.sources)[:-_ASKED_MAX - 1:-1]:
            # Another uid may not remove what we bound.
            if source.greeted and source.uid == os.geteuid():
                with contextlib.suppress(OSError):
                    asked[self._invite(source)] = source
        self._heir = _first_answer(asked, min(
            time.monotonic() + _ANSWER_TIME, self._until))
        _close_all(each for each in asked if each is not self._heir)
        return asked.get(self._heir)

    def _invite(self, source):
        """The channel on which it may answer."""
        with _no_fork():
            ours, theirs = [
                self._own(lambda: each) for each in
                socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        ours.setblocking(False)
        theirs.setblocking(False)   # there, too: it is the same open file
        try:
            socket.send_fds(source.sock, [_ASK], [theirs.fileno()],
                            socket.MSG_NOSIGNAL)
        except OSError:
            _close_all([ours])
            raise
        finally:
            _close_all([theirs])
        return ours

    def pass_on(self, loop):
        """Pass everything, or raise OSError; passed() tells what it came to.

        As in a turn: see what is due, then let in who has come, as owed it.
        """
        inbox, fanout = loop.inbox, loop.fanout
        # Before the followers are drained, for they reconnect at once: the
        # heir listens by then, so the kernel names it as their leader.
        self._tell(loop.path.lock, loop.path.bound['.relay'].sock)
        self._relay.drain()
        fanout.take_rest(self._leader.streams)
        due = inbox.count()
        self._leader.let_in()
        fanout.take(due, self._relay.take())
        streams = list(self._leader.streams)
        file = self._own(_memory_file)
        try:
            file.writelines(_owed(streams, fanout.backlog.tail,
                                  loop.path.bound['.relay'].identity))
            file.flush()
            self._tell(file)
        finally:
            _close_all([file])
        for start in range(0, len(streams), _PASSED_MAX):
            self._tell(*(each.sock for each
                         in streams[start:start + _PASSED_MAX]))
        inbox.look = _no
        _send_noted([self._heir.fileno()], b'lost %d' % inbox.left(),
                    self._sent)

    def passed(self):
        """Whether the last word was said: then all is the heir's."""
        return bool(self._sent) and self._sent[0] > 0

    def close(self):
        """If the last word was not said, the heir hears that it is none."""
        _close_all([self._heir])

    def _tell(self, *files):
        """Pass these, and wait for the answer; or raise OSError."""
        socket.send_fds(self._heir, [b'%d' % len(files)],
                        [each.fileno() for each in files],
                        socket.MSG_NOSIGNAL)
        if _first_answer([self._heir], self._until) is None:
            raise TimeoutError


class _Estate:
    """What a leader that leaves hands on, as its heir receives it."""

    def __init__(self, loop, channel):
        self._loop = loop
        self._channel = channel
        self._lock = self._relay = None     # a _Lock, and a socket
        # What _owed() told of the relay, of chunks and of streams.
        self._identity = self._chunks = self._streams = None
        self._data = b''
        self._socks = []        # of the streams
        self._lost = None       # what the last message says: all is ours
        self.over = False       # nothing came of it, or all was taken
        loop.retry.at = time.monotonic()    # look_after(), until it is over
        self._until = loop.retry.at + _EXIT_TIME
        loop.files.watch(channel, self._on_message)
        self._answer()

    def _is_open(self):
        """Whether messages are to come: it is neither ours, nor over."""
        return not self.over and self._lost is None

    def is_coming(self):
        """Whether messages are to come, and the leader has time for them."""
        return self._is_open() and time.monotonic() <= self._until

    def _answer(self):
        with contextlib.suppress(OSError):  # the end of it is read next
            self._channel.send(_YES, socket.MSG_NOSIGNAL)

    def _on_message(self, _mask=0):
        """Take in what has come, until it is ours, or will not be."""
        try:
            if self._is_open():
                self._take_message()
        except BlockingIOError:     # eventlet: see _Event.clear()
            return
        except (OSError, ValueError, TypeError):
            self._close()
        if not self._is_open():
            self._loop.retry.at = time.monotonic()  # look_after(), at once

    def finish(self):
        """Whether it is ours: if the last message was sent by now.

        What the leader sends from here on fails; what was sent is read.
        """
        if not self.over:
            self._channel.shutdown(socket.SHUT_RD)
        while self._is_open():
            self._on_message()
        return not self.over

    def _take_message(self):
        """Take in what is passed, and answer, but to the last word.

        An OSError or ValueError: nothing will come of it.
        """
        with _no_fork():
            data, fds = _receive(self._channel, _PASSED_MAX)
            if data == b'%d' % len(fds):
                self._take_in(*fds)
                self._answer()
                return
            for fd in fds:      # the others did not find room here
                os.close(fd)
        last = _LAST.fullmatch(data)
        if not (last and self._streams is not None
                and len(self._socks) == len(self._streams)):
            raise ValueError    # nonsense, or the channel has ended
        self._lost = int(last[1])

    def _take_in(self, *fds):
        """Lock and relay; then what is owed; then streams, some at a time."""
        own = self._loop.files.own
        if self._relay is None:
            lock, relay = fds
            self._lock = own(_Lock, self._loop.path.lock.path, lock)
            self._relay = own(_unix_socket, relay)
            if not self._lock.intact():
                raise ValueError
            self._relay.listen(_BACKLOG)    # see _Bequest.pass_on()
        elif self._streams is None:
            file, = fds
            # In few calls: beside busy threads each waits 5 ms for the GIL.
            head, _, self._data = os.pread(
                file, os.fstat(file).st_size, 0).partition(b'\n')
            os.close(file)
            self._identity, self._chunks, self._streams = json.loads(head)
        else:
            self._socks += [own(_unix_socket, fd) for fd in fds]

    def lead(self, uplink, listener):
        """Be the leader, with all that the last one had: returns the role.

        :param uplink: ours; what it has not sent goes behind what is owed
        """
        loop = self._loop
        uplink.precede(self._lost, 'leader left')
        try:
            leader = _Leader.claim(loop, lambda: listener, uplink,
                                   self._move_to)
            leader.go_on_with(self.subscribers(
                uplink.chunk, loop.fanout.backlog))
        finally:
            self._close()
        loop.log.say(logging.INFO, 'handed on to pid %d, %d subscribers',
                     loop.pid, len(leader.streams))
        return leader

    def _move_to(self, path):
        """Have the path's lock and relay from here: as _Path.take()."""
        path.lock, self._lock = self._lock, path.lock
        path.put(_Bound(path.name('.relay'), self._relay, self._identity),
                 '.relay')
        self._relay = None
        with contextlib.suppress(OSError):  # disk full: only the pid is wrong
            path.lock.write()

    def subscribers(self, tail, backlog):
        """Yield who was passed; what they are owed precedes ``tail``."""
        chunks = _inherited(self._chunks, self._data, tail)
        while self._socks:
            place, offset, received, carried = self._streams.pop(0)
            each = _Subscriber(self._socks.pop(0), backlog, None)
            vars(each).update(carried, chunk=chunks[place], offset=offset)
            each.joined = each.chunk.before(offset) - received - each.lost
            yield each

    def _close(self):
        """Leave what is left to the leader: nothing is ended, nor unlocked."""
        self.over = True
        self._loop.files.unwatch(self._channel)
        _close_all((self._channel, self._lock, self._relay, *self._socks))


class _Sight:
    """Whom a follower sees: who waits at the leader's listener, or is there.

    The gate is open while it is not clear who serves.
    """

    def __init__(self, loop):
        self._loop = loop
        self.listener = None    # the leader's, by hello
        self._presence = None   # likewise
        self.look_at(_yes)

    def look_at(self, look):
        # The gate may be open instead: see settle().
        self.look = self._loop.inbox.look = look

    def widen(self, identity, sock, presence, uplink):
        """Look at what a hello has passed, from now on: see the top.

        :returns: whether anybody is there
        """
        loop = self._loop
        look = _poll(sock.fileno(), presence.fileno(), uplink.fileno())
        if loop.starves:
            # Without a loop we would hear late of the leader's end, and hold
            # open its listener, at which others would wait in vain.
            sock.close()
            look = _yes
        self.look_at(look)
        self._presence = presence
        old, self.listener = self.listener, _Bound(
            loop.settings.path, sock, identity)
        if old is not None:
            old.sock.close()
        return look()

    def intact(self):
        """Whether that listener is still at the path."""
        return self.listener is not None and self.listener.intact()

    def inherit(self):
        """The last leader's listener, if the path is still that socket.

        Needs the lock. An OSError: not yet.
        """
        loop, passed = self._loop, self.listener
        if passed is None:
            return None
        if not passed.intact():
            with contextlib.suppress(OSError), passed.sock as sock:
                _let_go(sock, loop.files.own)   # it has lost the path
            return None
        # Raises while another, whose lock was removed, goes on with it.
        loop.path.make_way('.relay')
        if not loop.path.lock.vacated():
            _let_go(passed.sock, loop.files.own)
        loop.path.lock.write([passed])
        return passed

    def settle(self):
        """The end of a turn: ask the kernel who is there.

        notify() does so itself while there is nobody.
        """
        self._loop.inbox.look = _yes if self.look() else self.look


def _is_socket(*paths):
    """Whether a socket is at any of the paths."""
    for path in paths:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                return True
    return False


class _Follower:
    """Who sends to the leader, or looks for one. Its stream: the uplink."""

    def __init__(self, loop):
        self._loop = loop
        self._relay_path = loop.path.name('.relay')
        us = weakref.proxy(self)    # a cycle would keep all that is emitted
        self._uplink = _Uplink(loop.fanout.backlog, lambda: us._on_leader())
        self.streams = {self._uplink: None}
        self._sight = _Sight(loop)
        self.settle = self._sight.settle
        self._left_by = None    # the leader that hung up last
        self._hasty = _Backoff()    # from one that does so again, at once
        self._estate = None     # what a leader that leaves hands on to us

    def look_after(self):
        loop, uplink = self._loop, self._uplink
        if self._inherits():
            if self._estate.is_coming():
                raise BlockingIOError(errno.EAGAIN, 'handed on by '
                                      + uplink.who, self._relay_path)
            if self._estate.finish():
                if uplink.sock is not None:
                    self.see_off(uplink)
                return self._estate.lead(uplink, self._sight.listener)
        if uplink.sock is None:
            try:
                return _Leader.claim(loop, self._sight.inherit, uplink)
            except OSError as error:
                if error.errno not in _LED:
                    raise
                self._follow(error)
        if not uplink.greeted:
            raise BlockingIOError(errno.EAGAIN, 'no answer from %s'
                                  % uplink.who, self._relay_path)
        if not self.intact() and not uplink.pending():
            # Have the leader check its path, as any line sent to it does.
            with contextlib.suppress(OSError):
                uplink.sock.send(b'-0 look\n', _AT_ONCE)
        return self

    def _inherits(self):
        """Whether a leader that leaves is handing on to us, or has."""
        return self._estate is not None and not self._estate.over

    def intact(self):
        return self._sight.intact() and os.path.exists(self._relay_path)

    def _follow(self, error):
        """Connect to the leader, who answers with a hello; or raise."""
        loop = self._loop
        sock = loop.files.own(socket.socket, socket.AF_UNIX)  # unguarded
        try:
            sock.setblocking(False)
            sock.connect(self._relay_path)
            who, self._uplink.uid = _check_peer(sock, loop)
            sock.send(_HELLO + b'\n', socket.MSG_NOSIGNAL)
            self._uplink.sock, self._uplink.who = sock, 'the leader, ' + who
            loop.fanout.watch(self._uplink)
        except OSError as reason:
            self._uplink.sock = None
            sock.close()
            if reason.errno == errno.ENOENT and loop.retry.for_long():
                # A leader that has lost its relay does not notice while there
                # is nothing to do. So wake it by a connection; not before it
                # would look itself, nor if it is about to leave.
                _answers(loop.settings.path)
            raise error

    def hear(self, _mask):
        """Take what the leader has sent, where there is no loop to do it."""
        if self._uplink.sock is not None:
            self._loop.fanout.on_event(self._uplink, selectors.EVENT_READ)
            self._uplink.blocked = not self._uplink.greeted

    def _on_leader(self):
        """Read a hello, one for each new listener, or _ASK; why to part."""
        # The gate opens first, for it looks for an unread hello, too.
        look = self._sight.look
        self._sight.look_at(_yes)
        try:
            said = _read_leader(self._uplink.sock, self._loop.files.own)
        except BlockingIOError:     # eventlet: see _Event.clear()
            said = ()
        except OSError:
            return 'it is gone'
        except ValueError as error:
            self._loop.log.stranger(self._uplink.who, error)
            return 'it is gone'
        if len(said) == 3:
            self._greeted(*said)
        else:
            self._sight.look_at(look)
            for channel in said:
                self._answer(channel)
        return None

    def _answer(self, channel):
        """Say that we would be the leader's heir, or close the channel: no.

        No: who leaves, who has no loop, root for another user, whose files it
        would write to, and who could not bind a path that was deleted.
        """
        loop, uplink = self._loop, self._uplink
        if not (self._inherits() or loop.closing or loop.starves
                or not uplink.greeted or uplink.uid != os.geteuid()
                or not os.access(os.path.dirname(self._relay_path), os.W_OK)):
            with contextlib.suppress(OSError):      # it cannot be watched
                self._estate = _Estate(loop, channel)
                return
        _close_all([channel])

    def hand_on(self, until):
        """Hand on what was handed to us, if it all came; else be no heir."""
        if not (self._estate and self._estate.finish()):
            return False
        self._loop.fanout.take_rest(self.streams)
        self._loop.look_after()
        role = self._loop.role
        return role is not self and role.hand_on(until)

    def _greeted(self, *passed):
        loop, uplink = self._loop, self._uplink
        anyone = self._sight.widen(*passed, uplink.sock)
        if not uplink.greeted:
            loop.log.serves('relayed to ' + uplink.who, anew=False)
            if not anyone:
                uplink.forget(loop.fanout.backlog)    # nobody is owed it
        uplink.greeted, uplink.blocked = True, False
        uplink.since = loop.retry.at = time.monotonic()     # look_after() now

    def see_off(self, uplink):
        """The leader has gone. What it is owed is kept for the next."""
        loop, greeted, sock = self._loop, uplink.greeted, uplink.sock
        self._sight.look_at(_yes)   # before what it looks at goes
        loop.files.unwatch(sock)
        sock.close()
        uplink.disconnect()
        if not greeted:
            return      # to be tried when due: at once might go on for ever
        if (uplink.who != self._left_by
                or time.monotonic() - uplink.since > _CHECK_INTERVAL):
            self._left_by = uplink.who
            self._hasty.clear()
        else:           # again, so it was not killed
            self._hasty.fail()
        loop.retry.at = self._hasty.at or time.monotonic()  # at once
        if self._hasty.for_long():
            loop.log.stranger(uplink.who, 'it hangs up each time')

    def shut(self, error):
        """Keep what comes, unless nobody can be there to whom we owe it."""
        loop, code = self._loop, getattr(error, 'errno', None)
        # For about a second in any case: a leader whose directory is away for
        # a moment keeps its subscribers.
        if (code == errno.EAGAIN
                or not loop.retry.for_long()
                or self._sight.intact()):
            self._sight.look_at(_yes)
            return
        if code not in _STARVED:    # with no descriptors, another may lead
            self._uplink.forget(loop.fanout.backlog)
        # Nobody can connect while there is no socket at the path. To see that
        # takes 3 us, to keep what comes 70.
        self._sight.look_at(functools.partial(
            _is_socket, loop.settings.path, self._relay_path))

    # The leader has the listener, and the files are closed for us.
    take = accept = cut_off = last_call = close = _nothing

    def clear(self):
        """What notify() has to find before it sends: there is somebody."""
        return self._sight.look, True


class _Relay:
    """The followers of a leader: what they look at, and hand on."""

    def __init__(self, loop):
        self._loop = loop
        self._presence = loop.files.own(_Event)
        self._shown = False     # whether it is set
        self.sources = {}       # an ordered set
        self._handed = []       # chunks
        self._patience = _PATIENCE  # how often more it waits for readers

    def show(self, anyone):
        if anyone != self._shown:
            self._shown = anyone
            (self._presence.set if anyone else self._presence.clear)()

    def announce(self, bound):
        for source in list(self.sources):
            self._greet(source, bound)

    def look_after(self):
        """Have others find us, or raise OSError."""
        path = self._loop.path
        relay = path.bound.get('.relay')
        if not (relay and relay.intact()):
            path.put(path.bind('.relay', backlog=_BACKLOG), '.relay')
        self._let_in()

    def _on_relay(self, _mask):
        try:
            self._let_in()
        except OSError as error:
            self._loop.trouble(error)

    def _let_in(self):
        """Accept all who come to follow, or raise OSError.

        Out of descriptors, they wait, and keep what they have; the relay,
        which would be reported for ever, is not watched until the next try.
        """
        files, sock = self._loop.files, self._loop.path.bound['.relay'].sock
        files.unwatch(sock)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BACKLOG + 1):
                self._welcome(files.own(_accept, sock))
        files.watch(sock, self._on_relay)

    def _welcome(self, sock):
        loop = self._loop
        try:
            source = _Source(sock, *_check_peer(sock, loop))
            loop.files.watch(sock, functools.partial(self._on_source, source))
        except OSError:
            _hang_up(sock)
            return
        self.sources[source] = None
        self._greet(source, loop.path.bound[''])

    def _greet(self, source, bound):
        hello = b'%s %s\n' % (_HELLO, json.dumps(bound.identity).encode())
        try:
            socket.send_fds(source.sock, [hello], [
                bound.sock.fileno(), self._presence.fileno()],
                socket.MSG_NOSIGNAL)
        except OSError:
            self._drain(source)     # gone, it may have left much to read
            self._dismiss(source)

    def _on_source(self, source, _mask):
        if source not in self.sources:
            return      # dismissed earlier in this turn
        try:
            self._handed += source.read()
        except BlockingIOError:
            pass        # eventlet: see _Event.clear()
        except (OSError, EOFError):
            self._dismiss(source)
        except ValueError as error:
            self._loop.log.stranger(source.who, error)
            self._dismiss(source)

    def _dismiss(self, source):
        del self.sources[source]
        self._loop.files.unwatch(source.sock)
        _hang_up(source.sock)

    def take(self):
        handed, self._handed = self._handed, []
        return handed

    def give_time(self, streams, fanout):
        """Let subscribers read, before more is taken in for them.

        A turn takes in 200 KB, what the kernel holds, from each follower, but
        sends a subscriber no more: of what eight busy processes emit a reader
        in Python would lose 76 %, not 43. It soon stops if nobody reads.
        """
        if fanout.drained:
            self._patience, fanout.drained = _PATIENCE, False
        while self.sources and streams and min(
                fanout.backlog.behind(each.chunk) for each in streams
                ) > fanout.backlog.limit // 4:
            if not self._patience:
                return
            self._patience -= 1
            time.sleep(_GIVE_WAY)
            self._loop.stay()
            for each in streams:
                each.blocked = False    # to try is to know
            fanout.flush(streams)
        self._patience = _PATIENCE

    def hand_on(self, leader, until):
        """Whether an heir goes on with all, from now on."""
        loop = self._loop
        with contextlib.closing(_Bequest(
                leader, self, loop.files.own, until)) as bequest:
            try:
                heir = ('.relay' in loop.path.bound and leader.intact()
                        and self._meet() and bequest.ask())
                if heir:
                    bequest.pass_on(loop)
            except OSError:
                pass    # all is still ours, unless passed() says otherwise
            finally:
                if bequest.passed():
                    loop.tell()
                    loop.log.say(
                        logging.INFO, 'handed on to %s, %d subscribers',
                        heir.who.partition(',')[0], len(leader.streams))
                    leader.let_go()
            return bequest.passed()

    def _meet(self):
        """Let in followers, and read their hellos; whether there are any."""
        self._let_in()
        for each in [each for each in self.sources if not each.greeted]:
            self._on_source(each, 0)
        return bool(self.sources)

    def followed(self):
        # Asked, for one that left just now is still among them.
        return any(map(_Subscriber.alive, self.sources))

    def cut_off(self):
        relay = self._loop.path.bound.get('.relay')
        if relay is not None:
            # Not only closed: if another has it open, such as a stopped
            # process that was to be the heir, those who wait there would wait
            # for that.
            _libc.shutdown(relay.sock.fileno(), socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                _let_go(relay.sock, self._loop.files.own)
        self._loop.path.free('.relay')
        self.drain()

    def drain(self):
        for each in self.sources:
            self._drain(each)

    def _drain(self, source):
        """Take in what a follower has sent; what it sends next fails."""
        self._loop.files.unwatch(source.sock)
        with contextlib.suppress(OSError, EOFError, ValueError):
            source.sock.shutdown(socket.SHUT_RD)
            while True:
                self._handed += source.read()

    def close(self):
        for source in list(self.sources):
            self._dismiss(source)
        self._presence.close()


# All that RELAY changes of STREAM.
_Loop.seek, _Loop.others = _Follower, _Relay


# ---------------------------------------------------------------------------
# CONSUMERS: whoever reads the socket
# ---------------------------------------------------------------------------
#
# A subscription: a connection that is made anew when it ends, and its lines.
# The iterator, the listener of the transport and the command line are built on
# it. Losses are the publisher's to report, as records in the stream: a reader
# that does not keep up stops reading, and is told. What is missed between two
# connections nobody can count: the subscription makes a record of that.

_INTERRUPTED = 'notifications.interrupted'
_CONTROL = (_LOST, _REFUSED, _INTERRUPTED)

# Bytes of a path: a reader appends nothing to it. See _PATH_MAX.
_CONNECT_MAX = 107

# Seconds. A wait that took longer began with all read, and the stream not
# ended; one that finds something takes 10 us.
_WAITED = 1e-3

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

# Bytes of lines, each counted as a KiB at least, of the messages that are
# handed out; and, beside these, of those that were requeued and wait.
_HELD_MAX = 8 * 1024 * 1024

# Seconds after which a requeued message returns: doubling, from and up to.
_REQUEUE_FIRST = 1
_REQUEUE_MAX = 30

# Seconds without progress after which the log says so, and then from time to
# time: doubling, up to _AGAIN_MAX.
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
    """Any value, on one line, and harmless to a terminal and a log."""
    text = _word(text)
    text = text if len(text) <= limit else text[:limit] + '...'
    return text if text.isprintable() else ascii(text)[1:-1]


def _lost_by(payload):
    """How many notifications a record says were lost, if that can be."""
    lost = payload.get('lost') if isinstance(payload, dict) else None
    return lost if type(lost) is int and 0 < lost <= _LOST_MAX else 0


def _decode(line):
    """The message that a line holds, or None: it is no JSON object."""
    try:
        # Not json.loads(), which guesses the encoding: 8 us, not 7.
        message = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _strict(message):
    """The line of a message that was read, as the driver would send it."""
    try:
        return _line(message, False)
    except ValueError:      # of an infinity: 1e999 is good JSON
        return _line(_plain(message), False)


class _ReaderLog:
    """What a reader tells: of its connection, and of control records."""

    def __init__(self, path):
        self._path = path
        self._told = set()      # what need not be told again
        self._lost = 0          # notifications, by the records
        self._lost_told = -math.inf     # time.monotonic() when that was told

    def say(self, level, text, *args):
        LOG.log(level, 'Notifications from %s: ' + text, self._path, *args)

    def once(self, level, text, *args):
        """Once, until a connection has lasted."""
        if text not in self._told:
            self._told.add(text)
            self.say(level, text, *args)

    def lasted(self):
        self._told.clear()

    def refused(self, reason):
        self.once(logging.WARNING, 'refused: %s', reason)

    def lost(self, payload):
        """Losses, at most once a second, with the sum."""
        self._lost += _lost_by(payload)
        now = time.monotonic()
        if now - self._lost_told > _CHECK_INTERVAL:
            self._lost_told = now
            self.say(logging.WARNING, '%d notifications were lost since it '
                     'began: %s', self._lost, _reason(payload))


def _reason(payload):
    return _printable(payload.get('reason')
                      if isinstance(payload, dict) else None)


class _Gap:
    """What a reader may have missed between two connections."""

    def __init__(self):
        self._seen_until = time.monotonic()     # nothing is missed before
        self._since = None      # that, when the stream ended; None: no gap
        self._reason = None
        self._refusal = None    # why this connection was refused, if it was

    def __bool__(self):
        return self._since is not None

    def seen(self, now):
        """All that had come was taken in, and the stream had not ended."""
        self._seen_until = now

    def refused(self, reason):
        self._refusal = 'refused: ' + reason

    def connected(self):
        self._at = self._seen_until = time.monotonic()
        self._refusal = None

    def begin(self, reason):
        """The stream has ended."""
        self._since = self._since if self else self._seen_until
        self._reason = self._refusal or reason

    def lasts_at(self):
        """From when on the connection has lasted: see is_over()."""
        return self._at + _Backoff.MAX

    def is_over(self, first):
        """Whether the gap has ended: this connection lasts.

        It does if its first line is no refusal, or a second passes without
        any. Till then the gap goes on.
        """
        if first is None:
            return time.monotonic() >= self.lasts_at()
        return (_decode(first) or {}).get('event_type') != _REFUSED

    def line(self):
        since, self._since = self._since, None
        return _record(_INTERRUPTED, seconds=round(self._at - since, 3),
                       reason=self._reason)


def _select(until, waker, sock):
    """Which of them, if any, can be read; and how long that took."""
    # Not epoll, which forked children share: one that closes its copy takes it
    # out for us, too: we would wait for ever. eventlet has no poll().
    selector = getattr(selectors, 'PollSelector', selectors.DefaultSelector)()
    selector.register(waker, selectors.EVENT_READ)
    try:
        if sock is not None:
            selector.register(sock, selectors.EVENT_READ)
    except ValueError:      # a forked child has closed it, as recv() will say
        return [sock], 0
    began = time.monotonic()
    ready = selector.select(None if until == math.inf else until - began)
    return [key.fileobj for key, _ in ready], time.monotonic() - began


def _dial(sock, path, until):
    """Connect; until time.monotonic(), wait where the backlog is full.

    The kernel would have us wait for ever, if the service is stopped.
    """
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(_WAITED)


class _Subscription(contextlib.AbstractContextManager, abc.Iterator):
    """A socket that is followed; what subscribe() returns.

    One thread reads. close() and wake() are for any.
    """

    _sock = None            # while there is no connection

    def __init__(self, path, reconnect=True, max_line=_READ_MAX):
        self.path = _parse_path(path, _CONNECT_MAX)
        self.line = b''         # of the last message; for who calls take()
        self._reconnect = reconnect
        self._max_line = max_line
        self.closed = False     # for good: no more will come
        self._reading = threading.Lock()    # held to read, or to disconnect
        self._gap = _Gap()
        # Received and not taken yet; None stands for the record of a gap.
        self._lines = collections.deque()
        self._retry = _Backoff()    # cleared when a connection has lasted
        self.log = _ReaderLog(self.path)
        self._waker = _Event()
        self.wake = self._waker.set     # have take() return early, once
        self._connect(_deadline(_CHECK_INTERVAL))

    def __next__(self):
        while not self.closed:
            message = self.take()
            if message is not None:
                return message
        raise StopIteration

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        """End the subscription; an iteration in another thread ends, too.

        It does not wait for who reads: a signal's handler may have come amid.
        """
        self.closed = True
        self._waker.set()
        if self.is_inherited():     # who read when it was forked is not here
            self._reading = threading.Lock()
        if self._reading.acquire(blocking=False):
            try:
                self._disconnect()
            finally:    # a signal's handler may raise
                self._reading.release()

    def is_inherited(self):
        """Whether this is the copy of a forked child."""
        return self._pid != os.getpid()

    def take(self, deadline=math.inf, paused=False):
        """The next message, or None: none came in time, or before wake().

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
            self.close()    # it was called while we held the lock
        return message

    def _wait(self, deadline, paused):
        """Take in what comes, or try again; False after wake() or too late."""
        sock, until = self._sock, deadline
        if sock is None and time.monotonic() >= self._retry.at:
            self._connect()
            return True
        if sock is None:
            until = min(deadline, self._retry.at)
        elif self._gap and not paused:
            until = min(deadline, self._gap.lasts_at())
        sock = None if paused else sock
        ready, waited = _select(until, self._waker, sock)
        if sock is not None and (sock not in ready or waited > _WAITED):
            self._gap.seen(time.monotonic())
        if self._waker in ready:
            self._waker.clear()
            return False
        if ready:
            self._receive(sock)
        if self._gap and not paused and self._sock is not None:
            first = self._lines[0][:self._max_line] if self._lines else None
            if self._gap.is_over(first):
                self._lines.appendleft(None)
        return bool(self._lines and not paused) or time.monotonic() < deadline

    def _connect(self, until=0):
        self._buffer = _LineBuffer(self._max_line)
        self._pid = os.getpid()     # whose the connection is
        try:
            self._sock = _unix_socket()
            _dial(self._sock, self.path, until)
        except OSError as error:
            self._disconnect()
            if not self._reconnect:
                raise OSError(error.errno, error.strerror, self.path)
            if not isinstance(error, BlockingIOError):
                self._gap.seen(time.monotonic())    # nobody is there
            elif not self._gap:
                self._gap.begin('the service let nobody in')
            self._retry.fail()
            self.log.once(logging.INFO, 'waiting for it: %s', error.strerror)
            return
        self._gap.connected()
        self.log.once(logging.INFO, 'connected')

    def _receive(self, sock):
        try:
            block = self._buffer.receive(sock)
            # Not splitlines(), which would split at a carriage return, too.
            self._lines.extend(block.split(b'\n')[:-1])
        except EOFError:
            self._on_end('the stream ended')
        except OSError as error:    # reset: it had not read all we sent
            self._on_end(error.strerror)

    def _on_end(self, reason):
        """The stream has ended. A line without its end is discarded."""
        self._disconnect()
        self._gap.begin(reason)
        if not self._reconnect:
            self.closed = True
        # Not after a refusal: it would be asked, and logged, without a pause.
        if time.monotonic() > self._gap.lasts_at():
            self._retry.clear()
            self.log.lasted()
        self._retry.fail()
        self.log.once(logging.INFO, 'disconnected')

    def _disconnect(self):
        if self._sock is not None:
            # Also of the copies of forked children, but not by one of them.
            if not self.is_inherited():
                _libc.shutdown(self._sock.fileno(), socket.SHUT_RDWR)
            # _close() only where it needs its thread: of that, eventlet would
            # not hear.
            if _guarded():
                self._sock.close()
            else:
                _close(self._sock)
            self._sock = None

    def __del__(self):
        if self._sock is not None:      # the module may have been cleared
            self._sock.close()

    def _parse(self, line):
        if line is None:
            line = self._gap.line()
        elif len(line) > self._max_line:
            line = _lost_record(1, 'it took more than %d bytes' %
                                self._max_line)
        self.line = line
        message = _decode(line)
        if message is None:
            self.log.once(logging.WARNING, 'not a JSON object, dropped: %r',
                          line[:80])
            return None
        event_type, payload = message.get('event_type'), message.get('payload')
        if event_type == _LOST:
            self.log.lost(payload)
        elif event_type == _REFUSED:
            reason = _reason(payload)
            self._gap.refused(reason)
            self.log.refused(reason)
        return message


def subscribe(path, *, reconnect=True, max_line=_READ_MAX):
    """Follow a socket: an iterator of notifications.

    When this returns it is connected, if the service is there, and sees all
    that is published from then on. It waits for a service that is not there,
    or has gone, trying again after 10 ms, doubling to 1 s. Then what comes
    next follows a record, ``notifications.interrupted``, with the payload
    ``{'seconds': number, 'reason': text}``: what was published in so many
    seconds before it came back may be missing. Who does not keep up loses
    the oldest, and gets ``notifications.lost``, with ``{'lost': number,
    'reason': text}``, as for a line that is too long. The service says why
    it ends a connection by ``notifications.refused``. What is no JSON object
    is dropped, and logged once.

    Leaving the loop closes the socket, as do ``close()``, by any thread or a
    signal's handler, and ``with``. A forked child may only close its copy.

    :param str path: absolute path of the socket, or a ``unix://`` URI of it
    :param bool reconnect: whether to wait for the service and to come back;
        else the iterator ends with the stream
    :param int max_line: bytes of a notification, which in memory may take
        thirty times that; 4 MiB unless given, and 64 MiB at most
    :returns: an iterator, and context manager, of dicts: ``payload`` (as
        emitted); ``message_id``, ``publisher_id``, ``event_type``,
        ``priority``, ``timestamp`` (str); ``context`` (dict), if the service
        has set ``sock_send_context``; ``topics`` (list), unless the default
    :raises: ValueError, naming the path and what is wrong with it; OSError,
        without ``reconnect``, if the service is not there
    """
    return _Subscription(path, reconnect, max_line)


# -- the transport ----------------------------------------------------------

@functools.cache
def _warn_once(text):
    LOG.warning('A unix:// transport ' + text)


class _NoContext(dict):
    """The request context that was not sent; says so if a filter asks."""

    def __contains__(self, key):
        _warn_once('got a notification without the request context: a filter '
                   'on that (%s) only matches where the service has set '
                   'sock_send_context' % key)
        return False


def _context_of(message):
    """The request context of a message that was read, for endpoints."""
    if message.get('event_type') in _CONTROL:
        return {}       # which are of no request, whatever is sent else
    context = message.get('context')
    return context if isinstance(context, dict) else _NoContext()


class _Incoming(_base.IncomingMessage):
    """A message that was handed out, until it is settled by any thread."""

    def __init__(self, listener, message, size=0):
        super().__init__(_context_of(message), message,
                         message.get('message_id'))
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


def _is_of(message, topics):
    """Whether it is of one of the topics, as at a broker; None: of any."""
    of = message.get('topics')
    return topics is None or any(
        isinstance(each, str) and each in topics
        for each in (of if isinstance(of, list) else _TOPICS))


class _Unsettled(dict):     # an ordered set
    """What was handed out, the first first. Needs the listener's lock."""

    size = 0        # bytes
    moved = 0       # time.monotonic(): one came or went

    def add(self, incoming):
        self.moved = time.monotonic()
        self[incoming] = True
        self.size += incoming.size
        return incoming

    def remove(self, incoming):
        self.moved = time.monotonic()
        if self.pop(incoming, False):
            self.size -= incoming.size


class _PutOff:
    """What was requeued, until it is due. Needs the listener's lock."""

    def __init__(self):
        self._queues = collections.defaultdict(collections.deque)   # by delay
        self.size = 0           # bytes

    def __len__(self):
        return sum(map(len, self._queues.values()))

    def add(self, when, incoming):
        self._queues[incoming.delay].append((when, incoming))
        self.size += incoming.size

    def first_due(self):
        """When it is due, and its delay."""
        return min(((queue[0][0], delay) for delay, queue
                    in self._queues.items() if queue), default=(math.inf, 0))

    def last_due(self):
        """The delay of what was put off for longest."""
        return max(delay for delay, queue in self._queues.items() if queue)

    def pop(self, delay):
        """The first of those that were put off so long."""
        incoming = self._queues[delay].popleft()[1]
        self.size -= incoming.size
        return incoming


class _Listener(_base.PollStyleListener):
    """One connection, whatever the targets and priorities.

    One thread calls poll(); settle(), put_off() and stop() are for any.
    """

    def __init__(self, path, batch_size, topics=None):
        super().__init__()
        self._topics = topics   # a set, of what it is given; None: of all
        self._limit = max(_UNSETTLED_MAX, batch_size or 0)
        self._subscription = _Subscription(path)
        self._lock = threading.Lock()   # guards what follows
        self._unsettled = _Unsettled()
        self._put_off = _PutOff()
        self._is_new = True     # or a requeued one came last: they take turns
        self._record = None     # of what was given up, while in _put_off
        self._record_at = -math.inf     # when the last record was due
        self._worst = None      # requeued most often, if more than twice
        self._tell_at = 0       # when to say again what is stuck
        self._tell_pause = _STUCK_FIRST

    # Any thread. First the change, then the waking: poll() looks at what may
    # have changed after it has taken note that it was woken.

    def settle(self, incoming):
        with self._lock:
            self._unsettled.remove(incoming)
            if incoming is self._worst:
                self._worst = None
        self._subscription.wake()

    def put_off(self, incoming):
        with self._lock:
            self._unsettled.remove(incoming)
            self._put_off.add(_deadline(incoming.delay), incoming)
            if incoming.requeues > 2 and (
                    self._worst is None
                    or incoming.requeues >= self._worst.requeues):
                self._worst = incoming
            while self._put_off.size > _HELD_MAX:
                self._give_up()
        self._subscription.wake()
        if self._subscription.closed:
            self.stop()

    def stop(self):
        """Have poll() return what was received by now, and then nothing.

        The connection goes now: designate-sink never calls cleanup().
        """
        self._subscription.close()
        if self._subscription.is_inherited():   # whoever has the lock is not
            return
        with self._lock:
            dropped, self._put_off = len(self._put_off), _PutOff()
        if dropped:
            self._subscription.log.once(
                logging.WARNING, 'the listener stops; what was requeued (%d) '
                'is dropped', dropped)

    cleanup = stop

    # Whoever holds the lock.

    def _give_up(self):
        """Drop what was put off for longest, and have a record tell of it.

        The record is put off, too, to a second after the last at least: an
        endpoint may requeue it as well.
        """
        incoming = self._put_off.pop(self._put_off.last_due())
        lost = 1
        if incoming.message.get('event_type') == _LOST:
            lost = _lost_by(incoming.message.get('payload'))
        if self._record is None:
            self._record_at = max(time.monotonic(),
                                  self._record_at + _CHECK_INTERVAL)
            self._record = _Incoming(self, json.loads(_lost_record(0, '')))
            self._put_off.add(self._record_at, self._record)
        self._record.message['payload'] = {
            'lost': self._record.message['payload']['lost'] + lost,
            'reason': 'the listener gave up on %s' % incoming}

    # The thread that polls.

    def poll(self, timeout=None, batch_size=1, batch_timeout=None):
        """See PollStyleListener. Without batch_size: whatever has come.

        A requeued message is a batch of its own: in one with a message that
        makes it fail it might stay for ever.
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
                        or self._unsettled.size >= _HELD_MAX)
                if full and len(self._unsettled) == len(batch):
                    return None     # all are in this batch: none gets settled
                until, delay = self._put_off.first_due()
                if until <= time.monotonic() and not full:
                    if batch:
                        return None
                    if self._is_new:
                        return self._return(delay)
            if full:
                until = max(self._tell_at,
                            self._unsettled.moved + _STUCK_FIRST)
            if full or self._worst is not None:
                self._complain(full)
            message = self._subscription.take(min(deadline, until),
                                              paused=full)
            self._is_new = True     # or none came: a requeued one is next
            if message is not None and self._is_wanted(message):
                with self._lock:
                    return self._unsettled.add(_Incoming(
                        self, message, len(self._subscription.line)))
            if (time.monotonic() >= deadline
                    or message is None and self._subscription.closed):
                return None

    def _return(self, delay):
        incoming = self._put_off.pop(delay)
        self._is_new = False
        if incoming is self._record:
            self._record = None
            self._subscription.log.lost(incoming.message['payload'])
        return self._unsettled.add(incoming)

    def _complain(self, full):
        """Log what is stuck: requeued for ever, or never settled at all."""
        now = time.monotonic()
        with self._lock:
            worst = self._worst
            if full and now - self._unsettled.moved >= _STUCK_FIRST:
                worst = next(iter(self._unsettled))
            if worst is None:
                self._tell_pause = _STUCK_FIRST
                self._tell_at = min(self._tell_at, now + _STUCK_FIRST)
            if worst is None or now < self._tell_at:
                return
            self._tell_at = now + self._tell_pause
            self._tell_pause = min(2 * self._tell_pause, _AGAIN_MAX)
            numbers = len(self._unsettled), len(self._put_off)
        self._subscription.log.say(
            logging.WARNING, 'stuck: %s; %d handed out and not settled, %d '
            'to be tried again', worst, *numbers)

    def _is_wanted(self, message):
        event_type = message.get('event_type')
        if event_type == _REFUSED or not (      # that was logged
                event_type in _CONTROL or _is_of(message, self._topics)):
            return False
        if isinstance(message.get('priority'), str):
            return True
        # The dispatcher would fail on it, and have it requeued, for ever.
        self._subscription.log.once(
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

    Every listener gets, once, every notification of its targets' topics, or
    of any with ``*``; and a record, with priority warn, of what it lost, and
    of each interruption. It waits for the service, and reconnects. At most
    100 messages, or one batch, are unacknowledged at a time; a requeued one
    returns after 1 s, doubling to 30 s.
    """

    def __init__(self, conf, url, default_exchange=None,
                 allowed_remote_exmods=None):
        """Read the URL, and no more: services fork after this.

        :param oslo_messaging.TransportURL url: the absolute path of the
            socket, without host or query
        :raises: InvalidTransportURL, naming the URL and what is wrong
        """
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        try:
            self._path = _parse_path(str(url), _CONNECT_MAX)
        except ValueError as error:
            raise oslo_messaging.InvalidTransportURL(str(url), str(error))

    def require_features(self, requeue=False):
        """Whatever a listener may ask for is there."""

    def send(self, *_args, **_kwargs):
        """RPC needs a broker: raises NotImplementedError."""
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
            _warn_once('sends everything to every listener, and so to every '
                       'process of a pool: run just one')
        topics = {target.topic for target, _ in targets_and_priorities}
        return _base.PollStyleListenerAdapter(
            _Listener(self._path, batch_size,
                      None if '*' in topics else topics),
            batch_size, batch_timeout)

    def cleanup(self):
        """Nothing is held; listeners are cleaned up by their servers."""


# -- the command line -------------------------------------------------------

_DESCRIPTION = """
Show the notifications of a service as they come:

  unix-notifier /run/nova/notifications.sock
  unix-notifier --event-type '^compute[.]' /run/nova/notifications.sock
  unix-notifier /run/nova/notifications.sock | jq .payload

At a terminal it prints lines for people, else lines of JSON. It waits for
the service, and comes back to it; Ctrl-C ends it."""

_EPILOG = """
What happens to the connection, and losses, go to standard error. After a
reconnection the record notifications.interrupted comes first; it does not
count for N. Exit status: 0 after --count notifications, or when nobody reads
the output any more; 1 if it cannot write; 2 for wrong arguments; 128 and the
number of the signal that ends it, which is 130 after Ctrl-C and 143 after
SIGTERM. NO_COLOR in the environment is heeded."""

# Keys of who acted: not the resource, whose id is looked for.
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


def _fields(message):
    """When, how grave, what, from whom, and about which if that is known."""
    payload = message.get('payload')
    inner = payload if isinstance(payload, dict) else {}
    inner = next((inner[key] for key in inner if key.endswith('_object.data')
                  and isinstance(inner[key], dict)), inner)
    ids = (each for each in _ids(inner, _word(message.get('event_type')))
           if each and isinstance(each, (str, int)))
    if message.get('event_type') in _CONTROL:
        ids = [_strict(payload)[:-1].decode()]
    fields = [message.get(key) for key in (
        'timestamp', 'priority', 'event_type', 'publisher_id')]
    return list(map(_printable, (*fields, *itertools.islice(ids, 1))))


def _text_line(message):
    """One readable line, whole, for whatever reads it next."""
    return b'%s\n' % '  '.join(_fields(message)).encode()


def _cells(text):
    """For each character, how many places of a terminal it takes."""
    if text.isascii():      # a line takes 100 us, not 170
        return itertools.repeat(1, len(text))
    return (0 if unicodedata.category(each) in ('Mn', 'Me') else
            1 + (unicodedata.east_asian_width(each) in 'WF') for each in text)


def _pad(text, width, by=' '):
    return text + by * (width - sum(_cells(text)))


def _cut(text, width):
    """What fits, which ends with an ellipsis if that is not all."""
    ends = list(itertools.accumulate(_cells(text), initial=0))
    if ends[-1] <= width:
        return text
    return text[:bisect.bisect(ends, width - 1) - 1] + '\u2026'


class _Terminal:
    """Lines for people, each as wide as the terminal is by then.

    80 columns show the first fields, and enough of an id to tell two apart.
    The end of a line is cut, and a priority, but no other field: the end of
    an event type says as much as its start. One that is longer than its
    column moves what follows.
    """

    # Columns. With _WIDE there is room for the date and milliseconds. Of a
    # hundred notifications that were recorded, the longest event type had 36;
    # a request id has 40, a UUID 36.
    _WIDE = 140
    _PRIORITY = 5
    _EVENT_TYPE = 36
    _ID = 40

    _COLOURS = {'DEBUG': '2', 'INFO': '32', 'WARN': '1;33', 'ERROR': '1;31',
                'CRITICAL': '1;37;41', 'AUDIT': '36', 'SAMPLE': '36'}
    _STANDS_OUT = '1;7;33'

    def __init__(self):
        self._has_colour = (not os.environ.get('NO_COLOR')
                            and os.environ.get('TERM') != 'dumb')
        self._refused = False       # whether the last message was a refusal

    def line(self, message):
        """Empty for a refusal after a refusal: there is one a second."""
        event_type = message.get('event_type')
        again, self._refused = self._refused, event_type == _REFUSED
        if again and self._refused:
            return b''
        width = shutil.get_terminal_size().columns
        stamp, *fields = _fields(message)
        stamp = (_pad(stamp[:23], 23) if width >= self._WIDE else
                 _pad(stamp[11:19], 8))
        text = (self._record(event_type, message.get('payload'), stamp, width)
                if event_type in _CONTROL else
                self._notification(stamp, *fields, width=width))
        return b'%s\n' % text.encode()

    def _notification(self, stamp, priority, event_type, publisher, about='',
                      *, width):
        grade = _cut(priority, self._PRIORITY)
        line = _cut(' '.join((
            stamp, _pad(grade, self._PRIORITY),
            _pad(event_type, self._EVENT_TYPE), _pad(about, self._ID),
            publisher)), width)
        begin = len(stamp) + 1
        end = begin + len(grade)
        return line[:begin] + self._coloured(
            line[begin:end], self._COLOURS.get(priority)) + line[end:]

    def _record(self, event_type, payload, stamp, width):
        """A loss and the like: a rule across, to be seen without colour."""
        payload = payload if isinstance(payload, dict) else {}
        lost, seconds = (_printable(payload.get(key))
                         for key in ('lost', 'seconds'))
        text = {_LOST: 'notifications lost: ' + lost,
                _REFUSED: 'refused',
                _INTERRUPTED: 'interrupted: what came in %s s may be missing'
                % seconds}[event_type]
        text = '%s %s %s (%s) ' % (stamp, '-' * self._PRIORITY, text,
                                   _reason(payload))
        return self._coloured(_pad(_cut(text, width), width, '-'),
                              self._STANDS_OUT)

    def _coloured(self, text, colour):
        if not (self._has_colour and colour and text):
            return text
        return '\x1b[%sm%s\x1b[m' % (colour, text)


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog='unix-notifier', usage='%(prog)s [OPTION ...] PATH',
        description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument('path', metavar='PATH', help='as in sock_path')
    parser.add_argument('--event-type', metavar='REGEX', default='',
                        help='only event types in which REGEX is found')
    parser.add_argument('--count', metavar='N', type=int, default=sys.maxsize,
                        help='end after N notifications')
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--json', action='store_false', dest='text',
                        default=None, help='print JSON, at a terminal too')
    either.add_argument('--text', action='store_true', default=None,
                        help='print time, priority, event type, publisher, '
                        'and an id, to a file or a pipe too')
    parser.add_argument('-h', '--help', action='help',
                        help='print this, and exit')
    arguments = parser.parse_args(argv)
    try:
        arguments.path = _parse_path(arguments.path, _CONNECT_MAX)
        arguments.event_type = re.compile(arguments.event_type)
        _at_least(arguments.count, 1)
    except (ValueError, re.error) as error:
        parser.error(error)
    return arguments


def _is_terminal(file):
    return file is not None and file.isatty()


class _StandardError(logging.Handler):
    """Drops what cannot be written; a StreamHandler would fail at exit, too.

    At a terminal it leaves out the path: who sees it has just typed that,
    and with it the lines would not fit into 80 columns.
    """

    def __init__(self, path):
        super().__init__()
        self._known = 'Notifications from %s: ' % path

    def emit(self, record):
        text = self.format(record)
        if _is_terminal(sys.stderr):
            text = text.replace(self._known, '-- ', 1)
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(),
                     b'%s\n' % text.encode(errors='backslashreplace'))


def _write(data):
    """Write all of it. An unbuffered sys.stdout might write only a part.

    If the output does not block, it waits, as for any slow reader.
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
    # Not the line as it came, which need not be strict, nor harmless.
    line_of = _text_line if arguments.text else _strict
    terminal = arguments.text is not False and _is_terminal(sys.stdout)
    if terminal:
        line_of = _Terminal().line
        if _is_terminal(sys.stderr):    # where it would be said once more
            stream.log.lost = stream.log.refused = lambda _: None
    for message in stream:
        event_type = _word(message.get('event_type'))
        found = arguments.event_type.search(event_type)
        if found or terminal and event_type in _CONTROL:
            _write(line_of(message))
        if found:
            count += event_type not in (_REFUSED, _INTERRUPTED)
            if count == arguments.count:
                break


def _close_unread(stream):
    """Close the stream once nobody reads the output, even if it is idle."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)     # only for errors
    poller.poll()
    stream.close()


def main(argv=None):
    """Follow a socket: see ``--help``. Returns the exit status."""
    arguments = _arguments(argv)
    # A signal ends it at once, whatever it does. Not by the default, which for
    # a container's process 1 is to go on. One ignored before (nohup) stays so.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))
    logging.basicConfig(
        format='%(message)s', level=logging.INFO,
        handlers=[_StandardError(arguments.path) if sys.stderr
                  else logging.NullHandler()])
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
